"""What the last digits of a launch's numbers depend on: ranks, ZeRO stage, kernels, device, versions, and some keys.

Two launches that differ in one of them add up in another order, and their numbers may differ, as rounding does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from gsa.checkpoint.state import RunState
from training.config import RESUME_EFFECT, RunSpec, to_plain
from training.record.run_folder import version

ROUNDING_KEYS = tuple(key for key, effect in RESUME_EFFECT.items() if effect == "rounding")


def of_this_launch(spec: RunSpec, *, zero_stage: int, backend: str, device: str) -> dict[str, Any]:
    """The facts of this launch, by name. backend: the kernels that run, whatever training.backend asked for."""
    return {
        "ranks": spec.plan.world_size,
        "ZeRO stage": zero_stage,
        "kernels": backend,
        "device": device,
        "torch": str(torch.__version__),
        "deepspeed": version("deepspeed"),
        **_of_config(to_plain(spec.cfg)),
    }


def of_checkpoint(state: RunState) -> dict[str, Any]:
    """The facts of the launch that saved a checkpoint, as far as its run state says."""
    found = {"ranks": state.world_size, "ZeRO stage": state.zero_stage, "torch": state.versions.get("torch")}
    return {**found, **_of_config(state.config)}


def of_run(run: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of the last launch in run.json; an earlier version recorded less."""
    found = run.get("numerics")
    if isinstance(found, dict):
        return found
    return {"ranks": run.get("world_size"), "ZeRO stage": run.get("zero_stage"), "kernels": run.get("backend")}


def of_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of the launch that wrote a "start" or "resume" event; an earlier version recorded less."""
    found, config = row.get("numerics"), row.get("config")
    if isinstance(found, dict):
        return found
    there = {"ranks": row.get("world_size"), "ZeRO stage": row.get("zero_stage")}
    return {**there, **_of_config(config if isinstance(config, dict) else {})}


def differences(earlier: Iterable[Mapping[str, Any]], now: Mapping[str, Any]) -> dict[str, list]:
    """name -> [before, now] of everything that differs from one of the earlier launches. Unknown is no difference."""
    found: dict[str, list] = {}
    for facts in earlier:
        for name, value in facts.items():
            if value is not None and name in now and value != now[name]:
                found.setdefault(name, [value, now[name]])
    return found


def in_words(changed: Mapping[str, Any]) -> str:
    """Differences as text: "ranks 2 -> 1, kernels 'triton' -> 'chunked'"."""
    return ", ".join(f"{name} {before!r} -> {now!r}" for name, (before, now) in changed.items())


def _of_config(config: Mapping[str, Any]) -> dict[str, Any]:
    split = [key.split(".") for key in ROUNDING_KEYS]
    return {f"{section}.{name}": config.get(section, {}).get(name) for section, name in split}
