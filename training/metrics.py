"""Prints docs/metrics.md, the table of every metric and event: `python -m training.metrics > docs/metrics.md`.

Exit codes: 0 printed; 2 refused arguments.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from training.config.command import command_parser, run_command
from training.config.exit_codes import ExitCode
from training.record.metric_schema import schema


def main(argv: Sequence[str]) -> int:
    command_parser("metrics", __doc__).parse_args(argv)
    print(schema(), end="")
    return ExitCode.FINISHED


if __name__ == "__main__":
    sys.exit(run_command(main))
