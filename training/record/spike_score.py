"""Scores how far a loss lies above the losses before it, to find loss spikes."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

WINDOW = 1000
"""Number of losses in the rolling mean and standard deviation."""
KNOWN = 50
"""Number of losses that must be known before a score is given: the first losses of a run fall steeply."""


class SpikeDetector:
    """Scores each loss by its distance from the mean of the last WINDOW losses, in standard deviations of these.

    A score depends only on the losses that were added, in order: a resumed run adds those of its metrics.jsonl and goes
    on as if it had never stopped.
    """

    def __init__(self, losses: Iterable[float] = ()) -> None:
        self._losses: deque[float] = deque(losses, WINDOW)

    def score(self, loss: float) -> float:
        """Standard deviations of `loss` above the mean (negative: below it); 0 while fewer than KNOWN are known."""
        if len(self._losses) < KNOWN:
            return 0.0
        mean = math.fsum(self._losses) / len(self._losses)
        deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in self._losses) / len(self._losses))
        return (loss - mean) / max(deviation, 1e-12)

    def add(self, loss: float) -> None:
        self._losses.append(loss)
