"""Prints what bounds a run and which setting to change: `python -m training.doctor RUN [--last N] [--json]`.

Reads the folder of a run that is live, finished or dead, and changes nothing in it. It analyses the steps since the
last start or resume, because config.yaml describes these, without the first three. Each verdict shows its arithmetic:
a gain of "at most 1.8x" is what the run would reach if that cost fell to nothing.

Exit codes: 0 a diagnosis was printed; 2 refused argument; 3 the folder holds no run or no finished step, or its
metrics.jsonl is damaged.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from training.config.command import add_run, command_parser, run_command
from training.config.exit_codes import ExitCode
from training.record.reader import read
from training.reporting.diagnosis import blind_spots, diagnose, render, time_shares
from training.reporting.summary import MOST_STEPS, summarise


def main(argv: Sequence[str]) -> int:
    parser = command_parser("doctor", __doc__)
    add_run(parser)
    parser.add_argument("--last", type=positive_number, metavar="N", help="analyse the last N steps only")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    record = read(args.run, newest=MOST_STEPS)
    summary, notes = summarise(record, args.last)
    verdicts, notes = diagnose(summary), [*record.notes, *notes, *blind_spots(summary)]
    if not args.json:
        print(render(record, summary, verdicts, notes))
        return ExitCode.FINISHED
    found = {
        "run": str(args.run),
        "status": record.run_json.get("status"),
        "summary": asdict(summary),
        "budget": time_shares(summary),
        "verdicts": [asdict(verdict) for verdict in verdicts],
        "notes": notes,
    }
    print(json.dumps(found, indent=2))
    return ExitCode.FINISHED


def positive_number(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is no number of steps: at least 1")
    return number


if __name__ == "__main__":
    sys.exit(run_command(main))
