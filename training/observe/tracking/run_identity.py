"""Decides whether a launch continues the tracked run, starts a new one or forks it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from gsa.checkpoint.full_state import read_run_state
from gsa.checkpoint.manifest import CheckpointError
from gsa.checkpoint.state import RunState
from training.config import RunConfig, config_changes, to_plain
from training.observe.tracking.tracking_state import Parent, new_run_id
from training.observe.tracking.wandb_sink import run_id_of_agent
from training.record.metrics_log import rows_from_end
from training.record.run_folder import RunFolder


class Identity(NamedTuple):
    """id: what W&B knows the run by. parent: the run that it was forked from. Both stay the same over launches."""

    id: str
    parent: Parent | None


def identify_run(cfg: RunConfig, folder: RunFolder, state: RunState | None, *, continued: bool) -> Identity:
    """The identity of a launch that resumes from `state` (None: it starts anew).

    continued: the checkpoint of `state` lies in this folder. An id that the configuration or a W&B agent gives
    (WANDB_RUN_ID) is the run's. A run that goes back and trains on with another curve
    becomes a fork of itself: W&B accepts no step twice, and would go on showing the old curve.
    """
    run, given = folder.read_run(), run_id_of_agent(cfg.logging) or cfg.logging.run_id
    known = run.get("tracking_id") or (state.tracking_id if state is not None else None)
    if not continued and (state is not None or not run):
        return Identity(given or new_run_id(), _parent(cfg, state))
    # else the run goes on, or begins again because it died before its first checkpoint
    if state is not None and known and given is None and _retrains_steps_differently(cfg, folder, state):
        return Identity(new_run_id(), Parent(known, state.step))
    parent = run.get("parent")
    return Identity(given or known or new_run_id(), Parent(**parent) if parent else None)


def _retrains_steps_differently(cfg: RunConfig, folder: RunFolder, state: RunState) -> bool:
    """Whether the folder has rows of steps that are about to be trained again with another curve."""
    newest = next((row["step"] for row in rows_from_end(folder.metrics) if "loss" in row), 0)
    changes = config_changes(state.config, to_plain(cfg), steps=range(state.step, newest))
    return newest > state.step and any(change.effect == "curve" for change in changes)


def _parent(cfg: RunConfig, state: RunState | None) -> Parent | None:
    """The run that a fork comes from: another folder's checkpoint, or the weights that training.init_from names."""
    if state is None and cfg.training.init_from is not None:
        try:
            state = read_run_state(Path(cfg.training.init_from))
        except CheckpointError:  # weights alone, of unknown origin
            return None
    return None if state is None or state.tracking_id is None else Parent(state.tracking_id, state.step)
