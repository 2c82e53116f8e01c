"""This process among the ranks of a run: what the launcher's environment says, and the process group."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """A process that has joined its process group."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value on every rank; any picklable object."""
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def from_main(self, call: Callable[[], T]) -> T:
        """The result of `call`, which only rank 0 runs, on every rank. What it raises is raised on all of them."""
        result, error = None, None
        if self.is_main:
            try:
                result = call()
            except Exception as err:  # the other ranks are waiting for the answer
                error = err
        result, error = self.broadcast((result, error))
        if error is not None:
            raise error
        return result

    def gather(self, value: Any) -> list:
        """Every rank's value, in rank order, on every rank."""
        gathered: list = [None] * self.size
        dist.all_gather_object(gathered, value)
        return gathered

    def barrier(self) -> None:
        dist.barrier()

    def leave(self) -> None:
        dist.destroy_process_group()


def exit_process(code: int) -> NoReturn:
    """Ends this process with this code after running the atexit handlers, without tearing down the interpreter.

    A gloo thread that frees its last tensor while the interpreter shuts down aborts the process (pytorch issue
    190489): a run that finished would end with SIGABRT, and its launcher would report a failure.
    """
    atexit._run_exitfuncs()  # W&B closes its run in one
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def environment_rank() -> int:
    """This process's rank as the launcher set it, before any process group exists; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def environment_world_size() -> int:
    """The number of ranks as the launcher set it; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))
