"""Where the ranks of a launch meet before there is a process group: what one of them refuses, all of them hear.

The meeting is torch's own store at MASTER_ADDR:MASTER_PORT, which rank 0 (or torchrun) serves and which the process
group is made from afterwards. No group, no device and no DeepSpeed is needed for it.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch.distributed as dist

from training.config.exit_codes import ExitCode, Refusal
from training.engine.world import environment_rank, environment_world_size

FAREWELL = timedelta(seconds=10)
"""How long a rank that has heard of a refusal waits until all have: rank 0 may not take the store away before."""
POLL_S = 0.2
LOST_S = 45.0
"""A rank that has met the others and gives no sign of life for this long has died."""
ABSENT_S = 30.0
"""After this time the ranks that have not come are named."""


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
    """The ranks of one launch. Every rank must join it, call `hear_all` once, and end its vigil with `dismiss`.

    timeout_s: how long to wait for a rank that has not come. lost_s: how long for a sign of life of one that has: a
    rank that dies before there is a process group is named by the others, which then exit with code 1. Raises Refusal
    when rank 0 cannot listen on its port, and on the other ranks when they do not reach it.
    """

    def __init__(self, timeout_s: float, *, lost_s: float = LOST_S) -> None:
        self.rank, self.size = environment_rank(), environment_world_size()
        self._timeout = timeout_s
        address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
        try:
            # as torch's env:// would, but without waiting here for those who have not come
            served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
            store = dist.TCPStore(
                address or "127.0.0.1",
                int(port or 0),
                is_master=self.rank == 0 and not served,
                timeout=timedelta(seconds=timeout_s),
                wait_for_workers=False,
            )
        except dist.DistNetworkError as err:
            raise Refusal(_cannot_listen(port) if "EADDRINUSE" in str(err) else _cannot_reach(address, port)) from err
        except (dist.DistError, ValueError) as err:
            raise Refusal(f"the ranks cannot meet at {address}:{port}: {_first_line(err)}") from err
        # torchrun keeps its store over a restart of the ranks: what the dead ones left in it must not be read
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.store = dist.PrefixStore(f"gsa/{restart}", store)
        self._vigil = Vigil(self.store.clone(), self.rank, self.size, lost_s)

    @property
    def speaks(self) -> bool:
        """Whether this rank prints what all have heard: one does on each host."""
        return self.rank == 0 or os.environ.get("LOCAL_RANK") == "0"

    def hear_all(self, message: str | None, exit_code: int = 0) -> Refused | None:
        """Waits until every rank has called this; returns the refusal of the lowest rank that has one.

        message: why this rank refuses its input, or None. exit_code: what it would end with.
        """
        said = None if message is None else Refused(self.rank, socket.gethostname(), message, int(exit_code))
        heard: list[dict | None] = []
        try:
            self.store.set(f"heard/{self.rank}", json.dumps(said and asdict(said)))
            if self._await_all():
                heard = [json.loads(self.store.get(f"heard/{rank}")) for rank in range(self.size)]
        except dist.DistError:
            pass
        if not heard:
            words = "not all ranks have been ready in time; see the output of the others"
            return said or Refused(self.rank, socket.gethostname(), words, ExitCode.FAILED)
        return next((Refused(**words) for words in heard if words is not None), None)

    def _await_all(self) -> bool:
        """Waits until every rank has said something; False when some have not in time.

        It asks now and then, since a store that waits answers nobody else of this process.
        """
        began, named = time.monotonic(), self.rank != 0
        while missing := [r for r in range(self.size) if not self.store.check([f"heard/{r}"])]:
            if time.monotonic() - began > self._timeout:
                return False
            if not named and time.monotonic() - began > ABSENT_S:
                if absent := [r for r in missing if not self.store.check([f"who/{r}"])]:
                    print(f"waiting for rank {', '.join(map(str, absent))}, not started yet", flush=True)
                named = True
            time.sleep(POLL_S)
        return True

    def part(self) -> None:
        """Waits until every rank has heard and printed what there was to print: the first to exit ends the launch."""
        self.dismiss()
        try:
            if self.store.add("parted", 1) == self.size:
                self.store.set("all parted", "")
            self.store.wait(["all parted"], FAREWELL)
        except dist.DistError:
            return  # the store went with rank 0, who had heard all

    def dismiss(self) -> None:
        """Ends the vigil: from here on the watchdog sees who dies."""
        self._vigil.end()


class Vigil:
    """A thread that shows the other ranks that this one lives, and ends this process when another has died.

    Rank 0 looks at all counters, by its own monotonic clock, and passes the news to the others, who look at rank 0's.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, lost_s: float) -> None:
        self._store, self._rank, self._size, self._lost_s = store, rank, size, lost_s
        self._counts: dict[int, tuple[int, float]] = {}
        self._ended = threading.Event()
        self._store.set(f"who/{rank}", f"rank {rank} (pid {os.getpid()} on {socket.gethostname()})")
        self._store.add(f"alive/{rank}", 1)
        threading.Thread(target=self._keep, name="vigil", daemon=True).start()

    def end(self) -> None:
        if not self._ended.is_set():
            self._ended.set()
            try:
                self._store.set(f"left/{self._rank}", "")
            except dist.DistError:
                return

    def _keep(self) -> None:
        try:
            woke = time.monotonic()
            while not self._ended.wait(1.0):
                asleep = time.monotonic() - woke - 1.0
                woke = time.monotonic()
                if asleep > LOST_S / 10:  # this process was stopped: the others are not at fault
                    self._counts = {rank: (count, woke) for rank, (count, _) in self._counts.items()}
                self._store.add(f"alive/{self._rank}", 1)
                if self._store.check(["lost"]):
                    self._die(self._store.get("lost").decode())
                self._look()
        except dist.DistError:
            if not self._ended.is_set():
                self._die("rank 0 has died: its store does not answer any more")

    def _look(self) -> None:
        for rank in range(self._size) if self._rank == 0 else [0]:
            if rank == self._rank or not self._store.check([f"who/{rank}"]) or self._store.check([f"left/{rank}"]):
                continue
            count, since = self._store.add(f"alive/{rank}", 0), time.monotonic()
            before = self._counts.get(rank)
            if before is None or before[0] != count:
                self._counts[rank] = (count, since)
            elif since - before[1] > self._lost_s:
                who = self._store.get(f"who/{rank}").decode()
                text = f"{who} gave no sign of life for {self._lost_s:.0f} s before training began; see its output"
                if self._rank == 0:
                    self._store.set("lost", text)
                    time.sleep(3)  # until the others have read it
                self._die(text)

    def _die(self, text: str) -> None:
        if not self._ended.is_set():
            print(f"error: {text}", file=sys.stderr, flush=True)
            os._exit(ExitCode.FAILED)


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
