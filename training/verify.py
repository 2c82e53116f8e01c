"""Proves that a checkpoint or a dataset can be used: `python -m training.verify STEP_DIR|DATA`, without a launcher.

A checkpoint: checks on a CPU that every file is there and unchanged, loads model and optimizer without executing
anything in the files, compares shapes with the configuration and working weights with their float32 masters, and
runs a forward pass. `--all RUN` checks every checkpoint of a run, as `python -m training.checkpoints verify RUN` does.
A dataset: reads every byte and checks hashes, ids, document ends and tables, as `prepare_data --verify` does.
Exit codes: 0 all are good; 2 refused argument; 3 a checkpoint or dataset is missing or not good.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from training.checkpointing.verification import verify, verify_all
from training.config.command import command_parser, run_command
from training.config.exit_codes import ExitCode
from training.data.manifest import is_dataset
from training.data.proof import verify_dataset


def main(argv: Sequence[str]) -> int:
    parser = command_parser("verify", __doc__)
    parser.add_argument(
        "path",
        type=Path,
        help="a checkpoint such as outputs/mine/step_300, or a dataset such as data/mine; with --all, a run's folder",
    )
    parser.add_argument("--all", action="store_true", help="check every checkpoint of the run in this folder")
    parser.add_argument("--config", type=Path, help="the run's yaml, which a legacy checkpoint may need")
    args = parser.parse_args(argv)
    if not args.all and is_dataset(args.path):
        return ExitCode.FINISHED if verify_dataset(args.path) else ExitCode.REFUSED_INPUT
    good = (verify_all if args.all else verify)(args.path, config=args.config)
    return ExitCode.FINISHED if good else ExitCode.REFUSED_INPUT


if __name__ == "__main__":
    sys.exit(run_command(main))
