"""Where the ranks of a launch meet before there is a process group: what one of them refuses, all of them hear.

The meeting is torch's own store at MASTER_ADDR:MASTER_PORT, which rank 0 (or torchrun) serves and which the process
group is made from afterwards. No group, no device and no DeepSpeed is needed for it.
"""

from __future__ import annotations

import json
import os
import socket
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from training.config.exit_codes import ExitCode, Refusal
from training.engine.world import environment_rank, environment_world_size

FAREWELL = timedelta(seconds=10)
"""How long a rank that has heard of a refusal waits until all have: rank 0 may not take the store away before."""


@dataclass(frozen=True)
class Refused:
    """What a rank has refused. host: where it runs."""

    rank: int
    host: str
    message: str
    exit_code: int

    def __str__(self) -> str:
        return self.message if self.rank == 0 else f"rank {self.rank} on {self.host}: {self.message}"


class Meeting:
    """The ranks of one launch. Every rank must join it, and call `hear_all` once.

    timeout_s: how long to wait for a rank that has not come. Raises Refusal when rank 0 cannot listen on its port, and
    on the other ranks when they do not reach it.
    """

    def __init__(self, timeout_s: float) -> None:
        self.rank, self.size = environment_rank(), environment_world_size()
        address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
        try:
            store, *_ = next(rendezvous("env://", timeout=timedelta(seconds=timeout_s)))
        except dist.DistNetworkError as err:
            raise Refusal(_cannot_listen(port) if "EADDRINUSE" in str(err) else _cannot_reach(address, port)) from err
        except (dist.DistError, ValueError) as err:
            raise Refusal(f"the ranks cannot meet at {address}:{port}: {_first_line(err)}") from err
        # torchrun keeps its store over a restart of the ranks: what the dead ones left in it must not be read
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.store = dist.PrefixStore(f"gsa/{restart}", store)

    @property
    def speaks(self) -> bool:
        """Whether this rank prints what all have heard: one does on each host."""
        return self.rank == 0 or os.environ.get("LOCAL_RANK") == "0"

    def hear_all(self, message: str | None, exit_code: int = 0) -> Refused | None:
        """Waits until every rank has called this; returns the refusal of the lowest rank that has one.

        message: why this rank refuses its input, or None. exit_code: what it would end with.
        """
        said = None if message is None else Refused(self.rank, socket.gethostname(), message, int(exit_code))
        self.store.set(f"heard/{self.rank}", json.dumps(said and asdict(said)))
        heard = [self._said_by(rank) for rank in range(self.size)]
        return next((Refused(**words) for words in heard if words is not None), None)

    def _said_by(self, rank: int) -> dict | None:
        try:
            return json.loads(self.store.get(f"heard/{rank}"))
        except dist.DistError:
            words = f"rank {rank} has ended before it was ready, or has not been ready in time; see its output"
            return asdict(Refused(self.rank, socket.gethostname(), words, ExitCode.FAILED))

    def part(self) -> None:
        """Waits until every rank has heard and printed what there was to print: the first to exit ends the launch."""
        try:
            self.store.add("parted", 1)
            if self.store.add("parted", 0) == self.size:
                self.store.set("all parted", "")
            self.store.wait(["all parted"], FAREWELL)
        except dist.DistError:
            return  # the store went with rank 0, who had heard all


def meet(timeout_s: float) -> Meeting | None:
    """The meeting of this launch; None for a rank that is alone."""
    return Meeting(timeout_s) if environment_world_size() > 1 else None


def _cannot_listen(port: str | None) -> str:
    return (
        f"port {port}, where the ranks are to meet, is taken on this host, perhaps by another run; choose a free one: "
        f"`deepspeed --master_port N ...`, or start with `python -m training.launch`"
    )


def _cannot_reach(address: str | None, port: str | None) -> str:
    return (
        f"rank 0 was not found at {address}:{port}; it may have ended (see its output), or the network between the "
        f"hosts does not let this port through"
    )


def _first_line(err: Exception) -> str:
    return (str(err).splitlines() or [type(err).__name__])[0]
