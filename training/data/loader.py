"""Micro-batches of one rank, step after step: which windows each step trains on, read ahead by threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from training.config import BatchPlan
from training.data.dataset import Batch, DataError, PackedTokens


def step_samples(samples_consumed: int, plan: BatchPlan, rank: int) -> list[np.ndarray]:
    """The sample numbers of each micro-batch of one rank, in the step that begins at samples_consumed.

    Micro-batch m of all ranks together covers consecutive sample numbers, so that a step trains on the same windows for
    any number of ranks.
    """
    width = plan.micro_batch_size
    starts = [samples_consumed + (m * plan.world_size + rank) * width for m in range(plan.accumulation_steps)]
    return [np.arange(start, start + width) for start in starts]


def past(skipped: Iterable[tuple[int, int]], first: int, count: int) -> int:
    """The lowest sample number s >= `first` such that none of s ... s + count - 1 lies in a skipped range.

    skipped: (first, count) ranges of sample numbers.
    """
    for start, length in sorted(skipped):
        if first < start + length and start < first + count:
            first = start + length
    return first


class Loader:
    """Micro-batches of one rank, step after step, read ahead by threads.

    num_workers: threads; 0 reads each batch when it is requested. The sequence does not depend on it.
    skipped: (first, count) ranges of sample numbers that no step trains on.
    When a batch cannot be read, the `next` that would have returned it raises DataError with its sample numbers; or,
    with defer_faults, it sets `data.fault` and returns a batch of padding, so that this rank can still take part in the
    step at whose end all ranks stop.
    """

    def __init__(
        self,
        data: PackedTokens,
        *,
        samples_consumed: int,
        plan: BatchPlan,
        rank: int,
        num_workers: int,
        pin_memory: bool,
        skipped: Sequence[tuple[int, int]] = (),
        defer_faults: bool = False,
    ) -> None:
        self._data, self._pin, self._defer = data, pin_memory, defer_faults
        self._numbers = self._forever(samples_consumed, plan, rank, skipped)
        self._pool = ThreadPoolExecutor(num_workers, thread_name_prefix="loader") if num_workers else None
        self._ahead: deque[Future[Batch]] = deque()
        if self._pool is not None:
            self._ahead.extend(self._pool.submit(self._read, next(self._numbers)) for _ in range(2 * num_workers))

    @staticmethod
    def _forever(consumed: int, plan: BatchPlan, rank: int, skipped: Sequence[tuple[int, int]]) -> Iterator[np.ndarray]:
        while True:
            consumed = past(skipped, consumed, plan.global_batch_size)
            yield from step_samples(consumed, plan, rank)
            consumed += plan.global_batch_size

    def _read(self, samples: np.ndarray) -> Batch:
        try:
            batch = self._data.batch(samples)
        except Exception as err:
            reason = str(err) if isinstance(err, DataError) else f"{type(err).__name__}: {err}"
            message = f"samples {samples[0]}..{samples[-1]} cannot be read: {reason}"
            if not self._defer:
                raise DataError(message) from err
            self._data.report_fault(message)
            batch = self._data.padding(len(samples))
        return batch.pin_memory() if self._pin else batch

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Batch:
        if self._pool is None:
            return self._read(next(self._numbers))
        self._ahead.append(self._pool.submit(self._read, next(self._numbers)))
        return self._ahead.popleft().result()

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
