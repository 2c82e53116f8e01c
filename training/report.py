"""Writes report.html and report.md of a run: `python -m training.report RUN [RUN ...] [--out FOLDER]`.

The run may be live, finished, stopped or dead, and may lack files: the report names what is missing where it would
stand. Several runs are compared, and then --out names the folder to write to. The page fetches nothing: it can be
mailed, or read on a machine without a network. Checkpoints are checked by names and sizes; --verify reads every byte.

Exit codes: 0 both reports are written; 2 the reports cannot be written; 3 a folder holds no run.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from training.config.command import command_parser, run_command
from training.config.exit_codes import ExitCode, Refusal
from training.reporting.pages import write


def main(argv: Sequence[str]) -> int:
    parser = command_parser("report", __doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="the folder of a run")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to write; default: the run's folder")
    parser.add_argument("--verify", action="store_true", help="read every byte of every checkpoint")
    args = parser.parse_args(argv)
    if len(args.runs) > 1 and args.out is None:
        raise Refusal("several runs need --out FOLDER: their comparison belongs to none of them")
    out = args.out or args.runs[0]
    try:
        written = write(args.runs, out, verify=args.verify)
    except OSError as err:
        raise Refusal(f"{err.filename or out}: {err.strerror}; give another folder with --out") from err
    for path in written:
        print(path)
    return ExitCode.FINISHED


if __name__ == "__main__":
    sys.exit(run_command(main))
