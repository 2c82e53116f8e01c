"""Results that activation checkpointing keeps, so that recomputing a block does not compute them again.

The selected sets and the indexer's gradients cost much and weigh little. torch's selective checkpointing would keep
them too, but it watches every operation of the block, and stops at the gathers that ZeRO 3 adds when it recomputes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

_here = threading.local()
"""`.memory`: the _Memory at work in this thread, or absent. The backward pass of a GPU runs in a thread of its own."""


class _Memory(AbstractContextManager):
    """Within it, `kept` records into `results`, or reads them in the same order."""

    def __init__(self, results: list, replaying: bool) -> None:
        self.results, self.replaying = results, replaying

    def __enter__(self) -> _Memory:
        self._outer, _here.memory = getattr(_here, "memory", None), self
        self._next = 0  # a graph that is retained may be recomputed more than once
        return self

    def __exit__(self, *failure: object) -> None:
        _here.memory = self._outer

    def recall(self, compute: Callable[[], Any]) -> Any:
        if not self.replaying:
            self.results.append(compute())
            return self.results[-1]
        self._next += 1
        return self.results[self._next - 1]


def kept(compute: Callable[[], Any]) -> Any:
    """compute(), whose tensors carry no gradient; in a checkpointed block's recomputation, what it returned before."""
    memory = getattr(_here, "memory", None)
    return compute() if memory is None else memory.recall(compute)


def saved_by_checkpointing() -> tuple[_Memory, _Memory]:
    """The `context_fn` of torch.utils.checkpoint: for a block's forward pass, and for its recomputation."""
    results: list = []
    return _Memory(results, replaying=False), _Memory(results, replaying=True)
