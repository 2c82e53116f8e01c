"""Finds the largest micro-batch that fits this machine, and the fastest setting with the configured global batch.

    python -m training.tune --config training/configs/quickstart.yaml --num_gpus 2 --out tuned.yaml

For each ds_config and each kind of activation checkpointing, it doubles the micro-batch and runs a few real steps,
until memory runs out or a step takes longer. Under the kind that takes least memory it goes on until memory runs out,
however slow the steps are. Every trial has its own processes, so that running out of memory ends that trial only. It
prints a row per trial and the setting to use.

A signal ends the search, which prints and writes the best of the trials that have ended.

Exit codes: 0 found a setting; 1 nothing fits; 2 refused argument or configuration; 3 refused data; 128 + the number of
a signal that stopped it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from gsa.files import write_atomically
from training.config import ConfigError, load_config
from training.config.command import command_parser, run_command
from training.config.exit_codes import ExitCode
from training.data.open import open_data
from training.loop.preflight import require_backend
from training.observe.gpu_monitor import require_usable_gpus
from training.planning.outcome import Outcome
from training.planning.search import Trial, TrialSetting, fastest, most_trials, search
from training.planning.trial_ranks import Interrupted, SignalCheck, combined_outcome, read_ends, run_ranks
from training.planning.tune_report import HEAD, as_json, nothing_ran, recommendation, table_row, tuned_yaml
from training.planning.tune_task import TuneTask, tune_task
from training.record.run_folder import environment


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = command_parser("tune", __doc__)
    parser.add_argument("--config", type=Path, required=True, help="the run's yaml; it sets the global batch")
    parser.add_argument(
        "--deepspeed_config",
        type=Path,
        nargs="+",
        action="extend",
        metavar="JSON",
        help="ds_configs to compare (default: those of zero1, zero2 and zero3 that the configuration can use)",
    )
    parser.add_argument("--num_gpus", type=int, help="number of ranks (default: one per GPU; 1 on a CPU)")
    parser.add_argument("--steps", type=int, default=5, help="timed steps per trial (default: %(default)s)")
    parser.add_argument(
        "--memory_cap_gib",
        type=float,
        help="memory that a rank may hold; enforced by torch's allocator on a GPU and by the kernel on a CPU, where "
        "allocated memory counts before it is used",
    )
    parser.add_argument("--out", type=Path, help="write the configuration with the fastest setting to a new yaml file")
    parser.add_argument("--json", type=Path, help="write every trial to a new file")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="configuration keys, over the yaml; with training.gradient_checkpointing or checkpointing_scope among "
        "them, no other kind of activation checkpointing is tried",
    )
    args = parser.parse_intermixed_args(argv)
    # overrides after `--deepspeed_config A B` were read as further files
    given = [str(path) for path in args.deepspeed_config or ()]
    args.overrides += [word for word in given if "=" in word]
    args.deepspeed_config = [Path(word) for word in given if "=" not in word]
    return args


def prepare(args: argparse.Namespace) -> TuneTask:
    """Reads and checks everything before the first trial. Raises ConfigError or DataError, each with what to do."""
    for name, path in (("--out", args.out), ("--json", args.json)):
        _require_free(name, path)
    cfg = load_config(args.config, args.overrides)
    require_usable_gpus()
    require_backend(cfg)
    task = tune_task(
        args.config,
        args.overrides,
        cfg,
        ranks=_ranks(args.num_gpus),
        steps=args.steps,
        memory_cap_gib=args.memory_cap_gib,
        ds_configs=args.deepspeed_config,
    )
    open_data(cfg)  # builds the window tables, which the ranks then find
    return task


def _ranks(requested: int | None) -> int:
    devices = torch.cuda.device_count()
    if requested is None:
        return max(1, devices)
    if requested < 1:
        raise ConfigError(f"--num_gpus {requested} must be at least 1")
    if devices and requested > devices:
        raise ConfigError(f"--num_gpus {requested}: torch sees {devices} here")
    return requested


def _require_free(name: str, path: Path | None) -> None:
    if path is None:
        return
    if path.exists():
        raise ConfigError(f"{name} {path} exists already; give another name, or remove it")
    if not path.parent.is_dir():
        raise ConfigError(f"{name} {path}: there is no folder {path.parent}; make it first")


def try_setting(
    task: TuneTask, setting: TrialSetting, micro_batch_size: int, folder: Path, signals: SignalCheck
) -> Outcome:
    """Runs one trial, whose ranks write to `folder`, an empty one. Raises Interrupted after a signal."""
    cap = [] if task.memory_cap_gib is None else ["--memory_cap_gib", str(task.memory_cap_gib)]
    command = [
        sys.executable,
        "-m",
        "training.loop.trial",
        "--config",
        str(task.config),
        "--deepspeed_config",
        str(setting.ds_config),
        "--folder",
        str(folder),
        "--steps",
        str(task.steps),
        *cap,
        *task.overrides_for(setting, micro_batch_size),
    ]
    # as in the watchdog, the first step may take ten times as long as the others
    patience_s = 10 * task.cfg.training.hang_timeout_s
    codes = run_ranks(command, task.ranks, folder, patience_s=patience_s, signals=signals)
    return combined_outcome(read_ends(folder, codes, capped=task.memory_cap_gib is not None))


def tune(task: TuneTask, signals: SignalCheck, trials: list[Trial]) -> None:
    """Searches. Prints each trial and appends it to `trials` as it ends, so that an interruption loses none."""
    print(
        f"{task.ranks} rank(s), {task.global_batch_size} windows of {task.cfg.training.max_seq_len} tokens per step; "
        f"each trial times {task.steps} step(s)\n"
        f"at most {most_trials(task.ds_configs, task.kinds, task.sizes)} trials are to come; Ctrl-C ends the "
        f"search and keeps what it has found\n\n{HEAD}",
        flush=True,
    )
    with tempfile.TemporaryDirectory(prefix="tune_") as scratch:

        def attempt(setting: TrialSetting, micro_batch_size: int) -> Outcome:
            folder = Path(scratch) / str(len(trials))
            folder.mkdir()
            return try_setting(task, setting, micro_batch_size, folder, signals)

        for trial in search(task.ds_configs, task.kinds, task.sizes, attempt):
            trials.append(trial)
            print(table_row(task, trial), flush=True)


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    task = prepare(args)
    trials: list[Trial] = []
    stopped_by: Interrupted | None = None
    try:
        with SignalCheck() as signals:
            tune(task, signals, trials)
    except Interrupted as err:
        stopped_by = err
        print(f"stopped by {err} after {len(trials)} trial(s); no rank is left running", file=sys.stderr, flush=True)
    finally:
        if args.json is not None:
            found = as_json(task, trials, argv, environment())
            _write(args.json, json.dumps(found, indent=2) + "\n")
    if fastest(trials) is None:
        if stopped_by is not None:
            return 128 + stopped_by.number
        print(f"error: {nothing_ran(trials)}", file=sys.stderr)
        return ExitCode.FAILED
    print(f"\n{recommendation(task, trials)}")
    if args.out is not None:
        _write(args.out, tuned_yaml(task, trials, argv, environment()))
        print(f"written to {args.out}")
    return ExitCode.FINISHED if stopped_by is None else 128 + stopped_by.number


def _write(path: Path, text: str) -> None:
    with write_atomically(path, durable=False) as file:
        file.write(text.encode())


if __name__ == "__main__":
    sys.exit(run_command(main))
