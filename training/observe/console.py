"""The terminal of rank 0: start banner, progress, one line per evaluation and save, closing summary."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from typing import Literal

from tqdm import tqdm

from gsa.units import printable

LogLevel = Literal["debug", "info", "warning"]


def text_chart(values: list[float], *, width: int = 72, height: int = 10, label: str = "") -> str:
    """A curve in plain characters, y labelled at top and bottom, for a terminal. Non-finite values are gaps."""
    finite = [v for v in values if math.isfinite(v)]
    if not finite:
        return f"{label}: nothing to draw"
    low, high = min(finite), max(finite)
    span = (high - low) or 1.0
    width = min(width, len(values))
    grid = [[" "] * width for _ in range(height)]
    for column in range(width):
        chunk = values[column * len(values) // width : max(1, (column + 1) * len(values) // width)]
        chunk = [v for v in chunk if math.isfinite(v)]
        if chunk:
            row = round((high - sum(chunk) / len(chunk)) / span * (height - 1))
            grid[row][column] = "*"
    lines = ["".join(row) for row in grid]
    margins = [f"{high:8.3f} |"] + [" " * 8 + " |"] * (height - 2) + [f"{low:8.3f} |"]
    return "\n".join([label] + [m + line for m, line in zip(margins, lines, strict=True)])


class Console:
    """Prints lines and progress. A progress bar replaces the lines of steps on a real terminal, but not under CI.

    level: `"warning"` prints warnings only; `"info"` prints everything; `"debug"` also enables DeepSpeed's log.
    """

    def __init__(self, total: int, log_interval: int = 10, level: LogLevel = "info") -> None:
        self._enabled = level != "warning"
        self._interval = max(1, log_interval)
        self._bar: tqdm | None = None
        self._wants_bar = self._enabled and sys.stderr.isatty() and not os.environ.get("CI")
        self._total = total

    def line(self, text: str) -> None:
        if self._enabled:
            self._print(text)

    def warn(self, text: str) -> None:
        """A line that every level prints."""
        self._print(f"warning: {text}")

    def _print(self, text: str) -> None:
        text = printable(text)
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)

    def table(self, title: str, entries: Sequence[tuple[str, str]]) -> None:
        """A title with aligned entries below it: the start banner and the closing summary."""
        wide = max(len(name) for name, _ in entries)
        self.line("\n".join([title, *(f"  {name:<{wide}}  {value}" for name, value in entries)]))

    def step(self, row: dict, eta_s: float) -> None:
        """One finished step: moves the bar, or prints a line every log_interval steps."""
        if not self._enabled:
            return
        if self._wants_bar:
            if self._bar is None:
                self._bar = tqdm(total=self._total, initial=row["step"] - 1, unit="step", dynamic_ncols=True)
            self._bar.set_postfix_str(
                f"loss {row['loss']:.4f} lr {row['lr']:.2e} {row['tokens_per_s']:,.0f} tok/s", refresh=False
            )
            self._bar.update(1)
        elif row["step"] % self._interval == 0 or row["step"] == self._total:
            print(
                f"step {row['step']}/{self._total}  loss {row['loss']:.4f}  indexer {row['indexer_loss']:.4f}  "
                f"grad norm {row['grad_norm']:.3f}  lr {row['lr']:.2e}  {row['tokens_per_s']:,.0f} tokens/s  "
                f"epoch {row['epoch']:.3f}  ETA {format_seconds(eta_s)}",
                flush=True,
            )

    def rewound(self, step: int) -> None:
        """The run has gone back to `step`; the bar follows."""
        if self._bar is not None:
            self._bar.n = step
            self._bar.refresh()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def format_seconds(seconds: float) -> str:
    """3725 -> "1:02:05"."""
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
