"""Compares the time of two ways to compute the same: they take turns, and nothing is timed unless they agree."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from training.engine.world import World

TOLERANCE = 1e-5
"""Largest difference of two losses that count as equal, in nats."""
BF16_TOLERANCE = 1e-3
"""The same bound in bf16, for kernels that round differently and after updates whose sums have no fixed order."""


class Refused(RuntimeError):
    """The two ways do not compute the same, so their times are not compared."""


def mean_loss(losses: Sequence[Tensor], world: World) -> float:
    """The mean loss of one step over micro-batches and ranks, as in a row of metrics.jsonl. Every rank must call it."""
    mean = torch.stack(list(losses)).double().mean() / world.size
    dist.all_reduce(mean)
    return mean.item()


def require_equal(
    name: str, ours: Sequence[float], theirs: Sequence[float], *, first: float = TOLERANCE, later: float = TOLERANCE
) -> float:
    """The largest difference of two loss curves, in nats.

    first, later: the largest difference allowed in the first step and in later steps. Raises Refused above it.
    """
    apart = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    for step, distance in enumerate(apart):
        bound = later if step else first
        if not distance <= bound:
            raise Refused(
                f"refusing to time {name}: in step {step + 1} its loss is {ours[step]:.7f}, the reference's is "
                f"{theirs[step]:.7f}; they differ by {distance:.1e}, more than {bound:.0e}"
            )
    return max(apart)


@dataclass(frozen=True)
class Clocks:
    """Wall time and CPU time (all threads of the process) of a rank: a reading, or the difference of two readings.

    Other work on the machine lengthens wall time, but not CPU time.
    """

    wall_s: float
    cpu_s: float

    def since(self, began: Clocks) -> Clocks:
        return Clocks(self.wall_s - began.wall_s, self.cpu_s - began.cpu_s)


def now(world: World) -> Clocks:
    """The clocks of this rank once its device has finished all queued work."""
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    return Clocks(time.perf_counter(), time.process_time())


def spent_on(run: Callable[[], object], world: World) -> Clocks:
    """Time of one call that all ranks start together."""
    world.barrier()
    began = now(world)
    run()
    return now(world).since(began)


def in_turns(ways: dict[str, Callable[[int], object]], rounds: int, world: World) -> dict[str, list[Clocks]]:
    """Time of each way in each round; the order is A B C, then C B A. A way is called with the number of its round."""
    spent: dict[str, list[Clocks]] = {name: [] for name in ways}
    for number in range(rounds):
        for name in list(ways) if number % 2 == 0 else reversed(ways):
            spent[name].append(spent_on(lambda: ways[name](number), world))  # noqa: B023
    return spent


@dataclass(frozen=True)
class Ratio:
    """Median of pairwise ratios, its 95 % interval (None for fewer than six pairs), and the ratio of the sums."""

    median: float
    interval: tuple[float, float] | None
    of_sums: float
    pairs: int

    def __str__(self) -> str:
        return f"{self.median:.3f}" + (f" [{self.interval[0]:.3f} - {self.interval[1]:.3f}]" if self.interval else "")


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    return Ratio(statistics.median(ratios), interval_of(ratios), sum(ours) / sum(theirs), len(ratios))


def interval_of(ordered: Sequence[float]) -> tuple[float, float] | None:
    """A 95 % confidence interval of the median for any distribution: the r-th smallest and r-th largest value.

    None for fewer than six values, where no r reaches 95 %.
    """
    n = len(ordered)
    tail, r = 0.0, 0
    while tail + math.comb(n, r) / 2**n <= 0.025:
        tail += math.comb(n, r) / 2**n
        r += 1
    return (ordered[r - 1], ordered[n - r]) if r else None
