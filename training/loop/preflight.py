"""Everything that can be wrong with the input of a run, checked before any process group exists."""

from __future__ import annotations

import argparse
import importlib.util
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from gsa.checkpoint.manifest import require_space
from gsa.checkpoint.state import require_plain
from gsa.weights import load_weights
from training.checkpointing.resume import Start, decided_by, find_checkpoint, start_from, with_origin
from training.checkpointing.tokenizer import require_same_tokenizer
from training.config import ConfigError, RunConfig, RunSpec, config_changes, load_config, plan_batch, to_plain
from training.config.deepspeed import resolve_ds_config
from training.config.lease import Lease
from training.data.dataset import DataError, PackedTokens
from training.data.open import open_data
from training.engine.world import environment_rank, environment_world_size
from training.loop.progress import Progress
from training.observe.console import LogLevel
from training.observe.gpu_monitor import require_usable_gpus
from training.observe.tracking.wandb_sink import run_id_of_agent
from training.planning.cost_model import checkpoint_bytes
from training.record.metrics_log import require_rows
from training.record.run_folder import RunFolder

SOFT_EPOCH_LIMIT = 4.0
"""Passes over the same text after which repetition is known to stop paying."""


@dataclass(frozen=True)
class Prepared:
    """A run whose input has been read and found good, before any process group exists.

    given: what this rank was started with. spec: with the keys that the checkpoint decides, on rank 0. start,
    bytes_needed, lease: known on rank 0 alone, which owns the run folder and has read it and the checkpoint.
    """

    given: RunSpec
    spec: RunSpec
    folder: RunFolder
    start: Start | None
    bytes_needed: int
    log_level: LogLevel
    lease: Lease | None

    def release(self) -> None:
        """Gives the run folder back to others."""
        if self.lease is not None:
            self.lease.release()


def prepare(args: argparse.Namespace) -> Prepared:
    """Reads and checks everything that training/train.py was given; rank 0 also the folder, checkpoint and data.

    Raises ConfigError, FolderError, CheckpointError or DataError, each with what to do.
    """
    is_main, quiet = environment_rank() == 0, args.log_level == "warning"
    cfg = load_config(args.config, args.overrides)
    _require_plain(cfg)
    plan = plan_batch(cfg.training, environment_world_size())
    ds_config = resolve_ds_config(args.deepspeed_config, cfg, plan, args.config)
    require_usable_gpus()
    require_backend(cfg)
    if cfg.logging.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ConfigError("logging.tensorboard=true needs a package that is not installed: pip install tensorboard")
    run_id_of_agent(cfg.logging)  # refuses one that cannot be used
    folder = RunFolder(args.output_dir, warn=_print_warning if is_main else lambda text: None)
    given = RunSpec(cfg, plan, ds_config)
    if not is_main:
        return Prepared(given, given, folder, None, 0, args.log_level, None)

    if args.fresh and args.resume_from is not None:
        raise ConfigError("--fresh starts over and --resume_from goes on; give one of them")
    folder.claim(going_on=args.fresh or args.resume_from is not None)
    lease = folder.take_lease(command="training/train.py", take_over=args.take_over)
    try:
        return _prepare_folder(args, given, folder, lease, quiet=quiet)
    except BaseException:
        lease.release()
        raise


def _prepare_folder(
    args: argparse.Namespace, given: RunSpec, folder: RunFolder, lease: Lease, *, quiet: bool
) -> Prepared:
    """What rank 0 alone checks, now that nobody else writes to the folder."""
    cfg = given.cfg
    require_rows(folder.metrics)
    found = None if args.resume_from is None else find_checkpoint(args.resume_from, folder)
    if found is not None:
        cfg = with_origin(found, decided_by(found, cfg))
    spec = replace(given, cfg=cfg)
    data, held_out = open_data(cfg)  # makes the window tables, which the other ranks then find
    _require_tokenizer(cfg, data)
    _require_scores(cfg, held_out)
    _require_emergency_dir(cfg)
    data.require_true_token_bytes()
    for note in () if quiet else data.notes():
        print(f"note: {note}", flush=True)
    start = None
    if found is not None:
        start = start_from(found, spec, data, args.allow_config_change, quiet=quiet)
        _require_work(start, spec, folder)
    elif cfg.training.init_from:
        _require_same_shapes(Path(cfg.training.init_from), cfg)
        if not args.allow_config_change:
            accept = ", or accept with --allow_config_change"
            require_same_tokenizer(Path(cfg.training.init_from), data, otherwise=accept)
    bytes_needed = checkpoint_bytes(cfg, found)
    require_space(args.output_dir, bytes_needed)
    _announce_epochs(spec, data, start)
    return Prepared(given, spec, folder, start, bytes_needed, args.log_level, lease)


def _print_warning(text: str) -> None:
    print(f"warning: {text}", flush=True)


def _require_plain(cfg: RunConfig) -> None:
    """Refuses values that no checkpoint may hold, such as infinity."""
    try:
        require_plain(to_plain(cfg), "configuration")
    except TypeError as err:
        raise ConfigError(str(err)) from err


def _require_tokenizer(cfg: RunConfig, data: PackedTokens) -> None:
    """A dataset without its tokenizer can be trained on, but there is no text to show."""
    if cfg.training.sample_interval:
        try:
            data.load_tokenizer()
        except DataError as err:
            raise DataError(f"training.sample_interval={cfg.training.sample_interval}: {err}, or set it to 0") from err


def _require_scores(cfg: RunConfig, held_out: PackedTokens) -> None:
    """What only the last step's evaluation would meet: held-out text without a target that stands for text."""
    windows = held_out.distinct(cfg.training.eval_windows)
    for window in windows:
        targets = held_out.batch(np.array([window])).targets.numpy()
        if held_out.token_bytes[targets[targets >= 0]].any():
            return
    raise DataError(
        f"the {len(windows)} held-out windows under {', '.join(held_out.sources)} hold nothing to predict but ends of "
        f"documents, so that there are no bytes to score; prepare the dataset with longer held-out documents, or raise "
        f"training.eval_windows"
    )


def _require_emergency_dir(cfg: RunConfig) -> None:
    path = cfg.training.emergency_dir
    if path is not None and not (Path(path).is_dir() and os.access(path, os.W_OK)):
        raise ConfigError(f"training.emergency_dir={path} is not a folder that can be written to; make it first")


def _require_work(start: Start, spec: RunSpec, folder: RunFolder) -> None:
    """Refuses to resume a finished legacy checkpoint into its own folder: there is nothing to train, and no free
    folder to save into."""
    in_place = start.checkpoint.parent.resolve() == folder.path.resolve()
    if start.legacy and start.state.step >= spec.last_step and in_place:
        raise ConfigError(
            f"nothing to train: {start.checkpoint} is at step {start.state.step}, and this run ends at "
            f"{spec.last_step}; raise training.max_steps or training.stop_at_step, or give a new --output_dir for a "
            f"copy in the present layout"
        )


def require_backend(cfg: RunConfig) -> None:
    """Raises ConfigError when the kernels that were asked for need a device that is not here."""
    if cfg.training.backend == "triton" and not torch.cuda.is_available():
        raise ConfigError("training.backend=triton needs a GPU, and torch sees none here; use auto or chunked")


def _require_same_shapes(checkpoint: Path, cfg: RunConfig) -> None:
    """The weights to start from must be there and fit the model."""
    saved = load_weights(checkpoint)[0]
    changes = config_changes({**to_plain(cfg), "model": saved}, to_plain(cfg))
    wrong = [f"{c.key} ({c.old!r} there, {c.new!r} here)" for c in changes if c.effect == "impossible"]
    if wrong:
        raise ConfigError(f"training.init_from={checkpoint}: its weights do not fit: {', '.join(wrong)}")


def _announce_epochs(spec: RunSpec, data: PackedTokens, start: Start | None) -> None:
    progress = Progress() if start is None else Progress.from_state(start.state)
    end = progress.planned_samples(spec.cfg.training.max_steps, spec.plan.global_batch_size)
    planned = data.epochs_by_source(end)
    for source, passes in planned.items():
        if passes > SOFT_EPOCH_LIMIT:
            print(
                f"warning: this run is planned for {passes:.1f} passes over {source}; beyond {SOFT_EPOCH_LIMIT:.0f}, "
                f"repeated text teaches little. Prepare more text, or lower training.max_steps",
                flush=True,
            )
