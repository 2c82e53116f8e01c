"""What a search has to find: the global batch, the ranks, and the settings to try."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gsa.model import Recomputed
from training.config import BatchPlan, ConfigError, RunConfig, global_batch_size, to_plain
from training.config.deepspeed import DEFAULT, resolve_ds_config
from training.planning.outcome import Outcome
from training.planning.search import LEAST_MEMORY_FIRST, TrialSetting, divisors


@dataclass(frozen=True)
class TuneTask:
    """A checked search. sizes: the micro-batch sizes of which these ranks can make up the global batch, ascending."""

    config: Path
    overrides: tuple[str, ...]
    cfg: RunConfig
    ranks: int
    steps: int
    memory_cap_gib: float | None
    global_batch_size: int
    ds_configs: tuple[Path, ...]
    kinds: tuple[Recomputed, ...]
    sizes: tuple[int, ...]

    def tokens_per_s(self, outcome: Outcome) -> float:
        return self.global_batch_size * self.cfg.training.max_seq_len / outcome.seconds

    def accumulation_steps(self, micro_batch_size: int) -> int:
        return self.global_batch_size // (micro_batch_size * self.ranks)

    def overrides_for(self, setting: TrialSetting, micro_batch_size: int) -> list[str]:
        """The key=value overrides of a run with this setting: the user's, then those that the search has decided."""
        kind = setting.recomputed
        decided = {
            "micro_batch_size": micro_batch_size,
            "gradient_accumulation_steps": "null",  # it follows, on any number of ranks
            "global_batch_size": self.global_batch_size,
            "gradient_checkpointing": kind != "none",
            **({} if kind == "none" else {"checkpointing_scope": kind}),
        }
        own = [word for word in self.overrides if _key(word).removeprefix("training.") not in decided]
        return [*own, *(f"training.{key}={str(value).lower()}" for key, value in decided.items())]


def tune_task(
    config: Path,
    overrides: Sequence[str],
    cfg: RunConfig,
    *,
    ranks: int,
    steps: int,
    memory_cap_gib: float | None,
    ds_configs: Sequence[Path],
) -> TuneTask:
    """Checks what to search. cfg: `config` with `overrides`. ds_configs: those to compare; empty for the usual three.

    Raises ConfigError when the ranks cannot share the global batch, or a given ds_config contradicts the configuration.
    """
    if steps < 1:
        raise ConfigError(f"--steps {steps} must be at least 1")
    if memory_cap_gib is not None and not memory_cap_gib > 0:
        raise ConfigError(f"--memory_cap_gib {memory_cap_gib:g} must be above 0")
    total = global_batch_size(to_plain(cfg), ranks)
    if total % ranks:
        raise ConfigError(
            f"training.global_batch_size={total} cannot be shared by --num_gpus {ranks} ranks; choose "
            f"{', '.join(map(str, divisors(total)))} ranks, or a global_batch_size of "
            f"{' or '.join(str(n) for n in (total // ranks * ranks, -(-total // ranks) * ranks) if n)}"
        )
    sizes = tuple(divisors(total // ranks))
    plans = [BatchPlan(size, total // (size * ranks), ranks, total) for size in sizes]
    return TuneTask(
        config,
        tuple(overrides),
        cfg,
        ranks,
        steps,
        memory_cap_gib,
        total,
        _ds_configs(ds_configs, cfg, plans, config),
        _kinds(cfg, overrides),
        sizes,
    )


def _ds_configs(given: Sequence[Path], cfg: RunConfig, plans: Sequence[BatchPlan], config: Path) -> tuple[Path, ...]:
    """The given files, each checked with every plan; or those of zero1, zero2 and zero3 that this run can use."""

    def check(path: Path) -> None:
        for plan in plans:
            resolve_ds_config(path, cfg, plan, config)

    for path in given:
        check(path)
    if given:
        return tuple(dict.fromkeys(given))
    usable = []
    for name in ("zero1.json", "zero2.json", "zero3.json"):
        path = Path(os.path.relpath(DEFAULT.with_name(name)))
        try:
            check(path)
        except ConfigError:
            continue
        usable.append(path)
    return tuple(usable)


def _kinds(cfg: RunConfig, overrides: Sequence[str]) -> tuple[Recomputed, ...]:
    """The kind of activation checkpointing that the overrides ask for; all of them when they ask for none."""
    named = {_key(word) for word in overrides}
    requested = named & {"training.gradient_checkpointing", "training.checkpointing_scope"}
    return (cfg.training.recomputed,) if requested else LEAST_MEMORY_FIRST


def _key(override: str) -> str:
    return override.partition("=")[0].strip()
