"""What has changed between two configurations of a run, and what each change means when the run is resumed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from gsa.config import Effect
from gsa.units import flatten
from training.config.batch import windows_per_step
from training.config.run_spec import RunSpec
from training.config.schema import RESUME_EFFECT, RunConfig, to_plain

EFFECT_WORDS: dict[Effect, str] = {"harmless": "harmless", "curve": "changes the curve", "impossible": "impossible"}

WHERE_TEXT_LIES = ("data.data_dir", "data.mixture")
"""Keys that may change where the fingerprint of the data stays the same."""

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
"""Keys of a ds_configs/*.json that change the numbers: how gradients are stored, scaled, sent. The rest is layout."""

_DS_OWNED = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "bf16",
    "zero_optimization.stage",
)
"""Keys that follow from the run's yaml, or that are announced with the layout."""


@dataclass(frozen=True)
class Change:
    """A key with different values, and what that does on resume."""

    key: str
    old: Any
    new: Any
    effect: Effect


def config_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """Keys that differ between two plain configurations, sorted; a key that one lacks counts as its default.

    Micro-batch and accumulation are harmless by themselves: compare `windows_per_step` of both runs as well.
    A max_steps below the old one changes the curve.
    """
    defaults = to_plain(RunConfig())
    changes = []
    for name, effect in RESUME_EFFECT.items():
        section, short = name.split(".")
        before, after = (cfg.get(section, {}).get(short, defaults[section][short]) for cfg in (old, new))
        if before != after:
            if name == "training.max_steps" and after < before:
                effect = "curve"  # the steps so far followed a longer schedule
            changes.append(Change(name, before, after, effect))
    return sorted(changes, key=lambda change: change.key)


def changes_on_resume(
    old: Mapping[str, Any], world_size: int, old_ds_config: Mapping[str, Any], spec: RunSpec, *, same_text: bool
) -> list[Change]:
    """Everything that differs between a checkpoint's run and this one.

    old, world_size, old_ds_config: the checkpoint's plain configuration, ranks and DeepSpeed dict. same_text: the
    fingerprint of the data is the same, wherever the text lies.
    """
    before = windows_per_step(old, world_size)
    changes = with_batch_size(config_changes(old, to_plain(spec.cfg)), before, spec.plan.global_batch_size)
    if same_text:
        changes = [replace(c, effect="harmless") if c.key in WHERE_TEXT_LIES else c for c in changes]
    return changes + _ds_changes(old_ds_config, spec.ds_config)


def with_batch_size(changes: list[Change], before: int, now: int) -> list[Change]:
    """`changes` with the effect of global_batch_size decided by the windows per step.

    Other keys may make up the same number. before, now: windows per step.
    """
    name = "training.global_batch_size"
    others = [c for c in changes if c.key != name]
    if before != now:
        return [*others, Change(name, before, now, "curve")]
    return others + [replace(c, effect="harmless") for c in changes if c.key == name]


def _ds_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """Differences between two resolved DeepSpeed dicts; none where the checkpoint does not hold its own."""
    before, after = flatten(old), flatten(new)
    names = sorted(before.keys() | after.keys()) if old else []
    changed = [n for n in names if before.get(n) != after.get(n) and not _is_below(n, _DS_OWNED)]
    return [
        Change(f"deepspeed_config.{n}", before.get(n), after.get(n), "curve" if _is_below(n, _DS_CURVE) else "harmless")
        for n in changed
    ]


def _is_below(name: str, sections: tuple[str, ...]) -> bool:
    return any(name == section or name.startswith(f"{section}.") for section in sections)
