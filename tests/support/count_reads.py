"""Trains like training/train.py and counts what is read of metrics.jsonl: `python count_reads.py ARGUMENTS`.

The last line that it prints is JSON: bytes that were read from the file, and rows that were parsed.
"""

import builtins
import io
import json
import sys
from typing import Any

from training.engine.world import exit_process
from training.record import metrics_log
from training.train import main

counts = {"bytes": 0, "rows": 0}
real_open, real_parse = builtins.open, metrics_log._parse


class CountedFile(io.FileIO):
    def readinto(self, buffer: Any) -> int | None:
        size = super().readinto(buffer)
        counts["bytes"] += size or 0
        return size

    def readall(self) -> bytes:
        data = super().readall()
        counts["bytes"] += len(data)
        return data


def counting_open(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
    if str(file).endswith("metrics.jsonl") and mode in ("r", "rb"):
        raw = io.BufferedReader(CountedFile(file))
        return raw if mode == "rb" else io.TextIOWrapper(raw)
    return real_open(file, mode, *args, **kwargs)


def counting_parse(line: bytes) -> dict:
    counts["rows"] += 1
    return real_parse(line)


if __name__ == "__main__":
    builtins.open = io.open = counting_open  # pathlib opens with io.open
    metrics_log._parse = counting_parse
    code = main(sys.argv[1:])
    print(json.dumps(counts), flush=True)
    exit_process(code)
