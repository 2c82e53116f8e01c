"""Compares two configurations of a run: what differs, and what each difference does when the run is resumed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from gsa.config import Effect
from gsa.units import flatten
from training.config.batch import windows_per_step
from training.config.run_spec import RunSpec
from training.config.schedule import HORIZON_KEYS, Schedule
from training.config.schema import RESUME_EFFECT, RunConfig, to_plain

if TYPE_CHECKING:
    from gsa.checkpoint.state import RunState

EFFECT_WORDS: dict[Effect, str] = {
    "harmless": "harmless",
    "rounding": "rounds differently",
    "curve": "changes the curve",
    "impossible": "impossible",
}

WHERE_TEXT_LIES = ("data.data_dir", "data.mixture")
"""Keys whose change is harmless while the fingerprint of the data stays the same."""

_DS_CURVE = (
    "communication_data_type",
    "seq_parallel_communication_data_type",
    "data_types",
    "prescale_gradients",
    "gradient_predivide_factor",
    "sparse_gradients",
    "zero_optimization.zero_quantized_weights",
    "zero_optimization.zero_quantized_nontrainable_weights",
    "zero_optimization.zero_quantized_gradients",
)
"""Keys of a ds_configs/*.json that change the curve: how gradients are stored, scaled and sent. The rest is layout."""

_DS_OWNED = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "bf16",
    "zero_optimization.stage",
)
"""Keys that follow from the run's yaml, which is compared itself, or that are printed with the layout."""


@dataclass(frozen=True)
class Change:
    """A key whose value differs, and what that does on resume."""

    key: str
    old: Any
    new: Any
    effect: Effect


def config_changes(
    old: Mapping[str, Any], new: Mapping[str, Any], *, steps: Iterable[int] | None = None
) -> list[Change]:
    """Keys that differ between two plain configurations, sorted; a missing key counts as its default.

    Micro-batch and accumulation do not change the curve by themselves: compare `windows_per_step` of both runs as well.
    steps: those whose learning rate matters, counted from 0. Where all of them have the same rate with the old end of
    the schedule, another end is harmless: with wsd before its decay, say. None: another end changes the curve.
    """
    same_rates = steps is not None and _same_rates(old, new, steps)
    defaults = to_plain(RunConfig())
    changes = []
    for name, effect in RESUME_EFFECT.items():
        section, short = name.split(".")
        before, after = (cfg.get(section, {}).get(short, defaults[section][short]) for cfg in (old, new))
        if before != after:
            if same_rates and section == "training" and short in HORIZON_KEYS:
                effect = "harmless"
            changes.append(Change(name, before, after, effect))
    return sorted(changes, key=lambda change: change.key)


def _same_rates(old: Mapping[str, Any], new: Mapping[str, Any], steps: Iterable[int]) -> bool:
    """Whether the new configuration gives the same rates at `steps` with the old end of its schedule."""
    try:
        before, after = (Schedule.from_plain(cfg.get("training", {})) for cfg in (old, new))
        kept = after.with_horizon_of(before)
        return all(kept.factor(step) == after.factor(step) for step in steps)
    except (TypeError, ZeroDivisionError):  # a checkpoint may hold anything
        return False


def changes_on_resume(
    state: RunState, old_ds_config: Mapping[str, Any], spec: RunSpec, *, same_text: bool
) -> list[Change]:
    """Everything that differs between a checkpoint's run and this one.

    state, old_ds_config: the checkpoint's run state and DeepSpeed dict. same_text: the fingerprint of the data is the
    same, wherever the text lies.
    """
    old, new = state.config, to_plain(spec.cfg)
    before = windows_per_step(old, state.world_size)
    changes = config_changes(old, new, steps=[state.step])
    changes = with_batch_size(changes, before, spec.plan.global_batch_size)
    if same_text:
        changes = [replace(c, effect="harmless") if c.key in WHERE_TEXT_LIES else c for c in changes]
    return changes + _ds_changes(old_ds_config, spec.ds_config)


def with_batch_size(changes: list[Change], before: int, now: int) -> list[Change]:
    """`changes`, where a changed global_batch_size is harmless if micro-batch, accumulation and ranks make up for it.

    before, now: windows per step.
    """
    name = "training.global_batch_size"
    others = [c for c in changes if c.key != name]
    if before != now:
        return [*others, Change(name, before, now, "curve")]
    return others + [replace(c, effect="harmless") for c in changes if c.key == name]


def _ds_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """Differences between two resolved DeepSpeed dicts; none where the checkpoint holds no dict (`old` is empty)."""
    before, after = flatten(old), flatten(new)
    names = sorted(before.keys() | after.keys()) if old else []
    changed = [n for n in names if before.get(n) != after.get(n) and not _is_below(n, _DS_OWNED)]
    return [
        Change(f"deepspeed_config.{n}", before.get(n), after.get(n), "curve" if _is_below(n, _DS_CURVE) else "harmless")
        for n in changed
    ]


def _is_below(name: str, sections: tuple[str, ...]) -> bool:
    return any(name == section or name.startswith(f"{section}.") for section in sections)
