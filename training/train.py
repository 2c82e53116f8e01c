"""Trains a Gated Sparse Attention language model: `deepspeed training/train.py --config ... --output_dir ...`.

Works the same under `deepspeed`, `torchrun`, and alone (one rank). Everything that can be wrong with the
input is refused before any process group starts. Exit codes: 0 finished, or stopped on request with a
checkpoint (run.json tells which); 2 refused configuration; 3 refused checkpoint or data; 4 diverged;
1 anything else.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, get_args

import torch

# as a script, Python puts training/ itself first on the path, where config.py and data.py would be
# mistaken for other people's modules; the project's root belongs there, installed or not
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from gsa.checkpoint.manifest import CheckpointError, require_space  # noqa: E402
from gsa.checkpoint.state import require_plain  # noqa: E402
from gsa.weights import load_weights  # noqa: E402
from training import config as run_config  # noqa: E402
from training.checkpointing.resume import Start, decided_by, find_checkpoint, start_from  # noqa: E402
from training.config import BatchPlan, ConfigError, RunConfig, config_changes, load_config, plan_batch  # noqa: E402
from training.config.deepspeed import resolve_ds_config  # noqa: E402
from training.data import DataError, PackedTokens  # noqa: E402
from training.engine.world import World, environment_rank, environment_world_size, exit_process  # noqa: E402
from training.observe.console import LogLevel  # noqa: E402
from training.planning.space import checkpoint_bytes  # noqa: E402
from training.record.metrics_log import require_rows  # noqa: E402
from training.record.run_folder import FolderError, RunFolder  # noqa: E402

FINISHED, FAILED, REFUSED_CONFIG, REFUSED_INPUT, DIVERGED = 0, 1, 2, 3, 4

SOFT_EPOCH_LIMIT = 4.0
"""StepSums over the same text after which repetition is known to stop paying."""


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="training/train.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"Every key of the yaml, or key=value on the command line:\n\n{run_config.format_help()}",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", type=Path, required=True, help="the run's yaml, e.g. training/configs/quickstart.yaml"
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="the run's folder, e.g. outputs/quickstart")
    parser.add_argument(
        "--deepspeed_config",
        type=Path,
        help="ZeRO stage, buckets and offload, e.g. ds_configs/zero3.json (default: ZeRO 2)",
    )
    parser.add_argument(
        "--resume_from",
        metavar="PATH|TAG|latest|auto",
        help="continue a checkpoint; auto takes the newest good one, and starts afresh when there is none",
    )
    parser.add_argument(
        "--allow_config_change",
        action="store_true",
        help="resume although a changed key changes the curve, and use the new value",
    )
    parser.add_argument(
        "--log_level",
        choices=get_args(LogLevel),
        default="info",
        help="debug: DeepSpeed's own lines too; warning: no progress, only what goes wrong (default: %(default)s)",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration keys, over the yaml")
    return parser.parse_intermixed_args(argv)


@dataclass(frozen=True)
class Prepared:
    """A run whose input has been read and found good, before any process group exists."""

    cfg: RunConfig
    plan: BatchPlan
    ds_config: dict
    folder: RunFolder
    start: Start | None
    log_level: LogLevel


class _Terminal:
    """A stream that falls silent when its terminal is closed: what is left of the run is to save, not to speak."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except OSError:
            self._fall_silent()
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._fall_silent()

    def _fall_silent(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def main(argv: list[str]) -> int:
    args = parse(argv)
    sys.stdout, sys.stderr = (_Terminal(s) if s.isatty() else s for s in (sys.stdout, sys.stderr))
    try:
        prepared = prepare(args)
    except (ConfigError, FolderError) as err:
        return _refuse(err, REFUSED_CONFIG)
    except (CheckpointError, DataError) as err:
        return _refuse(err, REFUSED_INPUT)

    # DeepSpeed takes seconds to import: not before the input is known to be good
    from training.engine.engine import start

    world = start(
        timeout_s=max(600.0, 20 * prepared.cfg.training.hang_timeout_s), verbose=prepared.log_level == "debug"
    )
    code = run(prepared, world)
    if code == FINISHED:
        world.leave()
    return code


def _refuse(err: ValueError, code: int) -> int:
    if environment_rank() == 0:
        print(f"error: {err}", file=sys.stderr, flush=True)
    else:
        # a launcher ends all ranks when the first one exits: let rank 0 speak
        time.sleep(10)
    return code


def prepare(args: argparse.Namespace) -> Prepared:
    """Reads and checks everything; rank 0 also the run folder, the checkpoint and the data.

    Raises ConfigError, FolderError, CheckpointError or DataError, each with what to do.
    """
    cfg = load_config(args.config, args.overrides)
    _require_plain(cfg)
    plan = plan_batch(cfg.training, environment_world_size())
    ds_config = resolve_ds_config(args.deepspeed_config, cfg, plan, args.config)
    require_backend(cfg)
    if cfg.logging.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ConfigError("logging.tensorboard=true needs a package that is not here: pip install tensorboard")
    folder = RunFolder(args.output_dir)
    start = found = None
    if environment_rank() == 0:
        folder.claim(args.resume_from)
        require_rows(folder.metrics)
        found = find_checkpoint(args.resume_from, folder) if args.resume_from else None
        if found is not None:
            cfg = decided_by(found, cfg)
        data, _ = open_data(cfg)  # builds the window tables, which the other ranks then find
        _require_samples(cfg, data)
        if found is not None:
            quiet = args.log_level == "warning"
            start = start_from(found, cfg, plan, ds_config, data, args.allow_config_change, quiet=quiet)
            _require_work(start, cfg, folder)
        elif cfg.training.init_from:
            _require_same_shapes(Path(cfg.training.init_from), cfg)
        require_space(args.output_dir, checkpoint_bytes(cfg, found))
        _announce_epochs(cfg, plan.global_batch_size, data)
        if plan.note and args.log_level != "warning":
            print(plan.note, flush=True)
    return Prepared(cfg, plan, ds_config, folder, start, args.log_level)


def run(prepared: Prepared, world: World) -> int:
    """Trains on every rank of `world` and returns the exit code."""
    from training.loop.trainer import Diverged, Trainer
    from training.loop.watchdog import Watchdog

    folder = prepared.folder
    # rank 0 alone has read the checkpoint, which may decide some keys
    cfg, start, launch = world.broadcast((prepared.cfg, prepared.start, time.time_ns()))
    try:
        data, held_out = open_data(cfg)
        if world.is_main:
            folder.write_inputs(config_yaml=run_config.to_yaml(cfg), ds_config=prepared.ds_config)
        world.barrier()
        with Watchdog(
            folder.path, rank=world.rank, size=world.size, timeout_s=cfg.training.hang_timeout_s, launch=str(launch)
        ) as watchdog:
            trainer = Trainer(
                cfg,
                ds_config=prepared.ds_config,
                plan=prepared.plan,
                world=world,
                folder=folder,
                data=data,
                held_out=held_out,
                start=start,
                watchdog=watchdog,
                log_level=prepared.log_level,
            )
            trainer.train()
            trainer.close()
        return FINISHED
    except Diverged as err:
        if world.is_main:
            _record_failure(folder, "diverged")
            print(f"error: {err}", file=sys.stderr, flush=True)
        world.barrier()  # a launcher ends all ranks when the first one exits: rank 0 has spoken now
        return DIVERGED
    except (CheckpointError, DataError) as err:
        print(f"error: rank {world.rank}: {err}", file=sys.stderr, flush=True)
        if world.is_main and folder.read_run().get("status") == "running":  # it had begun: a save failed, or a read
            _record_failure(folder, str(err))
        return REFUSED_INPUT
    except Exception as err:
        # one rank's trouble reaches the others as a broken connection; each says what it saw
        print(f"error: rank {world.rank} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        if world.is_main:
            _record_failure(folder, f"{type(err).__name__}: {err}")
        return FAILED


def _record_failure(folder: RunFolder, reason: str) -> None:
    """In run.json; a disk that refuses that as well must not change what the run ends with."""
    try:
        folder.update_run(status="failed", reason=reason)
    except CheckpointError as err:
        print(f"warning: {err}", file=sys.stderr, flush=True)


def _require_plain(cfg: RunConfig) -> None:
    """What every checkpoint will hold must be what one may hold: infinity, for one, is refused now."""
    try:
        require_plain(run_config.to_plain(cfg), "configuration")
    except TypeError as err:
        raise ConfigError(str(err)) from err


def _require_samples(cfg: RunConfig, data: PackedTokens) -> None:
    """A dataset without its tokenizer can be trained on, and has no text to show."""
    path = data.tokenizer_file
    if cfg.training.sample_interval and not path.is_file():
        raise DataError(f"training.sample_interval needs {path}, which is missing: restore the dataset, or set it to 0")


def _require_work(start: Start, cfg: RunConfig, folder: RunFolder) -> None:
    """A checkpoint of the predecessor's at its end has nothing to train, and its own folder has no room for a copy."""
    end = min(cfg.training.max_steps, cfg.training.stop_at_step or cfg.training.max_steps)
    if start.legacy and start.state.step >= end and start.checkpoint.parent.resolve() == folder.path.resolve():
        raise ConfigError(
            f"nothing to train: {start.checkpoint} is at step {start.state.step}, and this run ends at {end}; raise "
            f"training.max_steps or training.stop_at_step, or give a new --output_dir for a copy in our layout"
        )


def require_backend(cfg: RunConfig) -> None:
    """ConfigError when the kernels asked for need a device that is not here."""
    if cfg.training.backend == "triton" and not torch.cuda.is_available():
        raise ConfigError("training.backend=triton needs a GPU, and torch sees none here; use auto or chunked")


def _require_same_shapes(checkpoint: Path, cfg: RunConfig) -> None:
    """The weights to start from must be there and fit the model."""
    saved = load_weights(checkpoint)[0]
    changes = config_changes({**run_config.to_plain(cfg), "model": saved}, run_config.to_plain(cfg))
    wrong = [f"{c.key} ({c.old!r} there, {c.new!r} here)" for c in changes if c.effect == "impossible"]
    if wrong:
        raise ConfigError(f"training.init_from={checkpoint}: its weights do not fit: {', '.join(wrong)}")


def open_data(cfg: RunConfig) -> tuple[PackedTokens, PackedTokens]:
    """The training text and the held-out text of a run. DataError when they cannot serve its model."""
    sources = cfg.data.mixture or {cfg.data.data_dir: 1.0}
    length = cfg.training.max_seq_len
    data = PackedTokens(sources, split="train", max_seq_len=length, seed=cfg.training.seed)
    # the held-out order has a seed of its own: runs with other seeds are scored on the same windows
    held_out = PackedTokens(sources, split="held_out", max_seq_len=length, seed=0)
    if data.vocab_size > cfg.model.vocab_size:
        raise DataError(
            f"the tokenizer of {', '.join(sources)} has {data.vocab_size} entries, more than "
            f"model.vocab_size={cfg.model.vocab_size}; set model.vocab_size={data.vocab_size} or larger"
        )
    return data, held_out


def _announce_epochs(cfg: RunConfig, global_batch_size: int, data: PackedTokens) -> None:
    planned = data.epochs_by_source(cfg.training.max_steps * global_batch_size)
    for source, passes in planned.items():
        if passes > SOFT_EPOCH_LIMIT:
            print(
                f"warning: this run is planned for {passes:.1f} passes over {source}; beyond {SOFT_EPOCH_LIMIT:.0f}, "
                f"repeated text teaches little. Prepare more text, or lower training.max_steps",
                flush=True,
            )


if __name__ == "__main__":
    exit_process(main(sys.argv[1:]))
