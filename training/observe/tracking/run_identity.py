"""Which run a launch is, for whoever follows runs: the same as before, a new one, or a fork of another."""

from __future__ import annotations

from pathlib import Path

from gsa.checkpoint.full_state import read_run_state
from gsa.checkpoint.manifest import CheckpointError
from training.checkpointing.resume import Start
from training.config import RunConfig, config_changes, to_plain
from training.observe.tracking.tracking_state import Parent
from training.record.metrics_log import iter_rows
from training.record.run_folder import RunFolder
from training.tracking import new_run_id


def tracked_as(cfg: RunConfig, folder: RunFolder, start: Start | None, continued: bool) -> tuple[str, Parent | None]:
    """The id that W&B knows a run by, and what the run was forked from: both are kept from launch to launch.

    A run that goes back and trains on with another curve is a fork of what it was: W&B takes no step twice, and would
    go on showing the old curve. continued: start is a checkpoint of this folder.
    """
    run = folder.read_run()
    kept = run.get("tracking_id") or (start.state.tracking_id if start is not None else None)
    if not continued and (start is not None or not run):
        return cfg.logging.run_id or new_run_id(), _parent(cfg, start)
    # else it goes on, or begins again since it died before its first checkpoint
    if start is not None and kept and cfg.logging.run_id is None and _bends(cfg, folder, start):
        return new_run_id(), Parent(kept, start.state.step)
    parent = run.get("parent")
    return cfg.logging.run_id or kept or new_run_id(), Parent(**parent) if parent else None


def _bends(cfg: RunConfig, folder: RunFolder, start: Start) -> bool:
    """Whether the folder has rows of steps that are about to be trained again with another curve."""
    newest = max((row["step"] for row in iter_rows(folder.metrics) if "loss" in row), default=0)
    changes = config_changes(start.state.config, to_plain(cfg))
    return newest > start.state.step and any(change.effect == "curve" for change in changes)


def _parent(cfg: RunConfig, start: Start | None) -> Parent | None:
    """The run that a fork comes from: another folder's checkpoint, or the weights that training.init_from names."""
    if start is not None:
        return None if start.state.tracking_id is None else Parent(start.state.tracking_id, start.state.step)
    if cfg.training.init_from is None:
        return None
    try:
        state = read_run_state(Path(cfg.training.init_from))
    except CheckpointError:  # weights alone, of whatever origin
        return None
    return None if state.tracking_id is None else Parent(state.tracking_id, state.step)
