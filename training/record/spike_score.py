"""Loss spikes: a step whose loss lies far above those before it, and what to do about it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

WINDOW = 1000
"""Steps of the rolling mean and deviation."""
KNOWN = 50
"""Steps that must be known before anything counts as a spike: the first losses of a run fall steeply."""


class SpikeDetector:
    """Scores each loss by its distance from the mean of the last WINDOW, in their standard deviations.

    A pure function of the losses it was given, in order: a resumed run that is given those of its metrics.jsonl goes
    on as if it had never stopped.
    """

    def __init__(self, losses: Iterable[float] = ()) -> None:
        self._losses: deque[float] = deque(losses, WINDOW)

    def score(self, loss: float) -> float:
        """Standard deviations above (or, negative, below) the mean; 0 while fewer than KNOWN losses are known."""
        if len(self._losses) < KNOWN:
            return 0.0
        mean = math.fsum(self._losses) / len(self._losses)
        deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in self._losses) / len(self._losses))
        return (loss - mean) / max(deviation, 1e-12)

    def add(self, loss: float) -> None:
        self._losses.append(loss)
