"""Timing of things that should be the same: in turns, as ratios with an interval, and only if they agree."""

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
"""Largest difference of two losses in nats."""
BF16_TOLERANCE = 1e-3
"""The same in bf16 between kernels that round differently, and after an update whose sums have no fixed order."""


class Refused(RuntimeError):
    """What was to be compared does not compute the same."""


def mean_loss(losses: Sequence[Tensor], world: World) -> float:
    """Of one step, over micro-batches and ranks: what a row of metrics.jsonl has."""
    mean = torch.stack(list(losses)).double().mean() / world.size
    dist.all_reduce(mean)
    return mean.item()


def require_equal(
    name: str, ours: Sequence[float], theirs: Sequence[float], *, first: float = TOLERANCE, later: float = TOLERANCE
) -> float:
    """The largest difference of two loss curves, in nats.

    first, later: what it may be in the first step, and after an update. Raises Refused where it is more.
    """
    apart = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    for step, distance in enumerate(apart):
        bound = later if step else first
        if not distance <= bound:
            raise Refused(
                f"refusing to time {name}: in step {step + 1} its loss is {ours[step]:.7f}, the other's "
                f"{theirs[step]:.7f}; they differ by {distance:.1e}, more than {bound:.0e}"
            )
    return max(apart)


@dataclass(frozen=True)
class Clocks:
    """Two readings of a rank, or what lies between two: wall time, and CPU time of all threads of its process.

    A machine that is busy with other things stretches the first, not the second.
    """

    wall_s: float
    cpu_s: float

    def since(self, began: Clocks) -> Clocks:
        return Clocks(self.wall_s - began.wall_s, self.cpu_s - began.cpu_s)


def now(world: World) -> Clocks:
    """When this rank's device has done what it was given."""
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    return Clocks(time.perf_counter(), time.process_time())


def spent_on(run: Callable[[], object], world: World) -> Clocks:
    """Begun by all ranks together."""
    world.barrier()
    began = now(world)
    run()
    return now(world).since(began)


def in_turns(ways: dict[str, Callable[[int], object]], rounds: int, world: World) -> dict[str, list[Clocks]]:
    """What each way takes in each round, A B C then C B A. A way is told which round it is."""
    spent: dict[str, list[Clocks]] = {name: [] for name in ways}
    for number in range(rounds):
        for name in list(ways) if number % 2 == 0 else reversed(ways):
            spent[name].append(spent_on(lambda: ways[name](number), world))  # noqa: B023
    return spent


@dataclass(frozen=True)
class Ratio:
    """Median of pairwise ratios, its 95 % interval (None of fewer than six), and the ratio of the sums."""

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
    """Holds the median in at least 95 % of samples, whatever the distribution: the r-th smallest and largest value.

    None where no r will do: of fewer than six values.
    """
    n = len(ordered)
    tail, r = 0.0, 0
    while tail + math.comb(n, r) / 2**n <= 0.025:
        tail += math.comb(n, r) / 2**n
        r += 1
    return (ordered[r - 1], ordered[n - r]) if r else None
