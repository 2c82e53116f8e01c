"""Results that a checkpointed block saves in its forward pass, so that its recomputation does not compute them again.

The selected sets and the indexer's gradients take long to compute and little memory to save. torch's selective
checkpointing would save them too, but it watches every operation of the block and fails at the gathers that ZeRO 3
adds in the recomputation.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

_active = threading.local()
"""`.pass_`: the _Pass that this thread is in, or absent. A GPU's backward pass runs in a thread of its own."""


class _Pass(AbstractContextManager):
    """The forward pass of a checkpointed block, which appends to `results`, or its recomputation, which reads them."""

    def __init__(self, results: list, recomputing: bool) -> None:
        self.results, self.recomputing = results, recomputing

    def __enter__(self) -> _Pass:
        self._outer, _active.pass_ = getattr(_active, "pass_", None), self
        self._next = 0  # a retained graph can be recomputed more than once
        return self

    def __exit__(self, *failure: object) -> None:
        _active.pass_ = self._outer

    def result(self, compute: Callable[[], Any]) -> Any:
        if not self.recomputing:
            self.results.append(compute())
            return self.results[-1]
        self._next += 1
        return self.results[self._next - 1]


def reuse_when_recomputing(compute: Callable[[], Any]) -> Any:
    """compute(); in the recomputation of a checkpointed block, what the same call returned in the forward pass.

    The tensors that compute returns must carry no gradient, and the calls of a block must come in the same order.
    """
    here = getattr(_active, "pass_", None)
    return compute() if here is None else here.result(compute)


def recomputation_contexts() -> tuple[_Pass, _Pass]:
    """The `context_fn` of torch.utils.checkpoint: one context for a block's forward pass, one for its recomputation."""
    results: list = []
    return _Pass(results, recomputing=False), _Pass(results, recomputing=True)
