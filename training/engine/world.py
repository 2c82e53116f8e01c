"""Where this process stands among the ranks of a run, before and after they have met."""

from __future__ import annotations

import atexit
import os
import sys
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.distributed as dist


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
    """Ends this process with this code, after the handlers of atexit; the interpreter is not taken down.

    A gloo thread may let go of its last tensor while the interpreter ends, and aborts then (pytorch issue 190489):
    a run that finished would leave with SIGABRT, and its launcher would report a failure.
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
