"""How long a preparation takes: an estimate from its first unit, and progress while it works."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from multiprocessing.sharedctypes import Synchronized

from tokenizers import Tokenizer
from tqdm import tqdm

from training.data import tokenizer as bpe

SAMPLE_BYTES = 1 << 20
"""Text on which the speed of the tokenizer is measured."""
LINE_EVERY_S = 30.0
"""Between two lines of progress in a log."""


class Progress:
    """Shows how far one pass is: a bar on a terminal, otherwise a line every LINE_EVERY_S seconds.

    title: "reading" or "encoding". total_bytes: all of its work. done: the bytes that the workers have finished.
    """

    def __init__(self, title: str, total_bytes: int, done: Synchronized) -> None:
        self.title, self.total_bytes, self._done = title, total_bytes, done
        done.get_obj().value = 0  # without the lock, which a worker may hold when it is killed
        self._began = self._printed = time.monotonic()
        self._bar = tqdm(
            total=total_bytes, desc=title, unit="B", unit_scale=True, disable=not sys.stderr.isatty(), leave=False
        )

    def show(self) -> None:
        done_bytes = self._done.get_obj().value
        self._bar.update(min(done_bytes, self.total_bytes) - self._bar.n)
        now = time.monotonic()
        if self._bar.disable and now - self._printed >= LINE_EVERY_S and done_bytes:
            self._printed = now
            speed = done_bytes / (now - self._began)
            left = max(0, self.total_bytes - done_bytes) / speed
            print(
                f"{self.title}: {done_bytes / 1e6:,.0f} of {self.total_bytes / 1e6:,.0f} MB, {speed / 1e6:.1f} MB/s, "
                f"about {duration(left)} left",
                flush=True,
            )

    def close(self) -> None:
        self._bar.close()


def duration(seconds: float) -> str:
    """ "40 s", "12 min" or "3.5 h"."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def at_once(workers: int) -> int:
    """Workers that have a core each."""
    return min(workers, len(os.sched_getaffinity(0)))


def estimate(
    sample: Sequence[str],
    tokenizer: Tokenizer | int,
    *,
    text_bytes: float,
    largest_unit_bytes: float,
    tokenizer_text_bytes: float,
    reading_s: float,
    workers: int,
) -> str:
    """One line that says how long the whole takes. The speed of the tokenizer is measured on `sample`, in CPU time.

    tokenizer: the one to use, or the number of entries of the one to train. text_bytes: of all documents.
    largest_unit_bytes: text that one worker encodes alone. reading_s: of one pass; each of the two passes reads.
    """
    size = sum(len(text.encode()) for text in sample)
    training_s = 0.0
    if isinstance(tokenizer, int):
        began = time.process_time()
        tokenizer = bpe.train(sample, tokenizer)
        training_s = (time.process_time() - began) * min(text_bytes, tokenizer_text_bytes) / size
    began = time.process_time()
    for text in sample:
        bpe.encode(tokenizer, text)
    per_byte_s = (time.process_time() - began) / size
    encoding_s = reading_s + per_byte_s * max(text_bytes / at_once(workers), largest_unit_bytes)
    parts = [("reading", reading_s), ("training the tokenizer", training_s), ("encoding", encoding_s)]
    total = sum(seconds for _, seconds in parts)
    named = ", ".join(f"{name} {duration(seconds)}" for name, seconds in parts if seconds)
    return (
        f"the whole takes about {duration(total)}: {named}; measured on its first {size / 1e6:.1f} MB, "
        f"for {text_bytes / 1e6:,.0f} MB of text and {workers} worker{'s' * (workers > 1)}"
    )
