"""Notices a rank that hangs or dies, names it and its phase, and ends the run within a minute.

Each rank writes one small file, <output_dir>/.ranks/rank_<r>.json, with its last sign of life: the phase of the loop
(data, forward, backward, ...), a count that grows with each phase, and a tick that grows once a second. What counts is
whether those of another rank have changed between two looks at this rank's own monotonic clock: no clock of another
host, and no time of day, is ever compared with anything.

As long as this rank itself goes from phase to phase, all is well, since every step waits for all ranks. Only when this
rank stands still does it look for the one that it waits for: ranks that wait in a collective all have the same, higher
count. How long that may take depends on the phase of the rank that is late: several minutes where storage can be at
fault, `timeout_s` elsewhere, and never less than some times the longest that this run has seen. NCCL ranks whose peer
died wait for ever instead of raising, so a peer whose process no longer exists on this machine is reported as dead.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gsa.files import write_atomically

POLL_S = 1.0
STORAGE_S = 300.0
"""The least patience, in seconds, where only storage can be at fault: a file server may fail over in the meantime."""
STORAGE_PHASES = {"start", "save", "load", "evaluate", "first step", "data"}
"""Phases that read or write files, or compile."""
LONG_PHASES = STORAGE_PHASES - {"data"}
"""Phases whose length depends on the disk or on compilers: they may take ten times as long."""
LEARNT = 5.0
"""A phase may take this many times the longest that it has taken on this rank so far."""
ASLEEP_S = 5.0
"""When this rank's own watch was late by more than this, the whole process was stopped: nobody else is at fault."""


@dataclass
class _Seen:
    """The last sign of life of a peer, and since when it stands still, by this rank's monotonic clock."""

    sign: dict[str, Any]
    since: float


class Watchdog:
    """Context manager around a run. `beat(phase)` at the start of each phase of the loop is cheap.

    timeout_s: a rank that stays in one phase for longer than this counts as hung. storage_s: the least patience in the
    phases in which storage can be at fault. All ranks must share output_dir and `launch`, a word that distinguishes
    this launch's files from those of an earlier one. When a rank is late or dead, every living rank names it, prints
    the stacks of all its own threads (also to .ranks/stacks_rank_<r>.txt), calls `ending` with the reason, and exits
    with code 1. A rank that cannot write its sign of life goes on.
    """

    def __init__(
        self,
        output_dir: Path,
        *,
        rank: int,
        size: int,
        timeout_s: float,
        launch: str,
        storage_s: float = STORAGE_S,
        ending: Callable[[str], None] = lambda reason: None,
    ) -> None:
        self._dir = output_dir / ".ranks"
        self._rank, self._size, self._timeout, self._launch = rank, size, timeout_s, launch
        self._storage, self._ending = storage_s, ending
        self._who = {"pid": os.getpid(), "started": _started(os.getpid()), "host": socket.gethostname()}
        self._machine = machine()
        self._count, self._phase, self._since = 0, "start", time.monotonic()
        self._longest: dict[str, float] = {}
        self._ticks, self._state, self._warned_of_disk = 0, "running", False
        self._seen: dict[int, _Seen] = {}
        self._looked = time.monotonic()
        """When the signs of all peers were last read."""
        self._stop = threading.Event()

    def __enter__(self) -> Watchdog:
        self._exchange_once()
        # files are read and written by a thread of their own: where the disk hangs, the watch does not
        self._signs = threading.Thread(target=self._exchange, name="signs of life", daemon=True)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._signs.start()
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        failed = exc[0] is not None
        self._state = "failed" if failed else "finished"
        self._stop.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self._signs.join(timeout=10)
        if failed and exc[0] is not SystemExit:
            # a peer's death reaches this rank as a broken connection: name the peer
            time.sleep(POLL_S)
            self._exchange_once()
            if dead := self._dead():
                print(f"watchdog: {self._describe('died', dead)}", file=sys.stderr, flush=True)

    def beat(self, phase: str) -> None:
        now = time.monotonic()
        spent = now - self._since
        if spent > self._longest.get(self._phase, 0.0):
            self._longest[self._phase] = spent
        self._phase, self._since = phase, now
        self._count += 1

    # -- signs of life, in files -----------------------------------------------------------------------

    def _file(self, rank: int) -> Path:
        return self._dir / f"rank_{rank}.json"

    def _exchange(self) -> None:
        while not self._stop.wait(POLL_S):
            self._exchange_once()
        self._exchange_once()

    def _exchange_once(self) -> None:
        """Writes this rank's sign of life and reads those of the others, as far as the disk allows."""
        self._ticks += 1
        own = self._own_sign() | {"launch": self._launch, "machine": self._machine, "ticks": self._ticks}
        try:
            self._dir.mkdir(parents=True, exist_ok=True)
            with write_atomically(self._file(self._rank), durable=False) as file:
                file.write(json.dumps(own | {"state": self._state}).encode())
        except OSError as err:
            if not self._warned_of_disk:
                print(f"watchdog: rank {self._rank} cannot write its sign of life: {err}", file=sys.stderr, flush=True)
            self._warned_of_disk = True
        for rank in range(self._size):
            if rank != self._rank and (sign := self._read(rank)) is not None:
                before = self._seen.get(rank)
                if before is None or (before.sign["ticks"], before.sign["count"]) != (sign["ticks"], sign["count"]):
                    self._seen[rank] = _Seen(sign, time.monotonic())
                else:
                    before.sign = sign
        self._looked = time.monotonic()

    def _own_sign(self) -> dict[str, Any]:
        return {"count": self._count, "phase": self._phase, **self._who}

    def _read(self, rank: int) -> dict[str, Any] | None:
        try:
            sign = json.loads(self._file(rank).read_text())
        except (OSError, ValueError):
            return None
        return sign if isinstance(sign, dict) and sign.get("launch") == self._launch and "ticks" in sign else None

    # -- the watch -------------------------------------------------------------------------------------

    def _watch(self) -> None:
        woke = time.monotonic()
        while not self._stop.wait(POLL_S):
            asleep = time.monotonic() - woke - POLL_S
            woke = time.monotonic()
            if asleep > ASLEEP_S:
                self._forgive(asleep)
            # in case another thread holds the interpreter lock and this one cannot run
            limit = max(self._patience(self._phase), self._storage) + 10
            faulthandler.dump_traceback_later(limit, exit=True, file=sys.stderr)
            if self._dead():
                time.sleep(POLL_S)  # its own error message may still be on its way
                if dead := self._dead():
                    self._end(self._describe("died", dead))
            self._judge_silence(woke - self._since)

    def _forgive(self, seconds: float) -> None:
        self._since += seconds
        self._looked += seconds
        for seen in list(self._seen.values()):
            seen.since += seconds

    def _dead(self) -> list[int]:
        """The peers on this machine whose process no longer exists."""
        return [
            rank
            for rank, seen in sorted(self._seen.items())
            if seen.sign["state"] == "running" and self._process_state(seen.sign) == "gone"
        ]

    def _judge_silence(self, silent: float) -> None:
        """Ends the run when this rank has stood still for longer than the rank that it waits for may take."""
        if silent <= self._timeout:
            return
        counts = {rank: seen.sign["count"] for rank, seen in self._seen.items()} | {self._rank: self._count}
        # where all ranks are in the same phase, each hangs by itself, or the network does
        late = [rank for rank, count in counts.items() if count == min(counts.values())]
        patience = max(map(self._patience_with, late))
        if silent <= patience:
            return
        if stopped := [rank for rank in late if rank != self._rank and self._stands_still(rank)]:
            self._end(self._describe(f"gave no sign of life for {patience:.0f} s (stopped or swapped out?)", stopped))
        self._end(self._describe(f"silent for more than {patience:.0f} s", late))

    def _patience(self, phase: str) -> float:
        known = self._timeout * (10 if phase in LONG_PHASES else 1)
        if phase in STORAGE_PHASES:
            known = max(known, self._storage)
        return max(known, LEARNT * self._longest.get(phase, 0.0))

    def _patience_with(self, rank: int) -> float:
        """Seconds that `rank` may keep the others waiting, from what is known of it."""
        if rank == self._rank:
            return self._patience(self._phase)
        sign = self._seen[rank].sign
        if self._process_state(sign) == "stopped":
            return self._timeout
        patience = self._patience(sign["phase"])
        # the disk may keep its sign of life from being written or read: its phase may be another by now
        disk_hangs = time.monotonic() - self._looked > ASLEEP_S or self._stands_still(rank)
        return max(patience, self._storage) if disk_hangs else patience

    def _stands_still(self, rank: int) -> bool:
        seen = self._seen[rank]
        return time.monotonic() - seen.since > ASLEEP_S or self._process_state(seen.sign) == "stopped"

    def _process_state(self, sign: dict[str, Any]) -> str:
        """ "gone", "stopped" or "runs"; processes of other machines cannot be seen, and count as running."""
        if sign["machine"] != self._machine:
            return "runs"
        state = _state(sign["pid"])
        if state is None or state in "ZX" or _started(sign["pid"]) != sign["started"]:
            return "gone"
        return "stopped" if state in "Tt" else "runs"

    def _describe(self, what: str, ranks: list[int]) -> str:
        signs = {rank: seen.sign for rank, seen in self._seen.items()} | {self._rank: self._own_sign()}
        named = ", ".join(
            f"rank {r} (pid {signs[r]['pid']} on {signs[r]['host']}, in phase '{signs[r]['phase']}')"
            for r in sorted(ranks)
        )
        return f"{named}: {what}. This is rank {self._rank}, in phase '{self._phase}'. Ending the run."

    def _end(self, message: str) -> None:
        if self._stop.is_set():
            return
        print(f"watchdog: {message}", file=sys.stderr, flush=True)
        helper = threading.Thread(target=self._leave_traces, args=(message,), daemon=True)
        helper.start()
        helper.join(timeout=10)  # a disk that hangs must not keep the run from ending
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        sys.stderr.flush()
        time.sleep(POLL_S * 2)  # let the other ranks notice and dump theirs before a launcher ends them
        os._exit(1)

    def _leave_traces(self, message: str) -> None:
        try:
            with open(self._dir / f"stacks_rank_{self._rank}.txt", "w", encoding="utf-8") as file:
                file.write(message + "\n")
                file.flush()
                faulthandler.dump_traceback(file=file, all_threads=True)
        except OSError as err:  # the run ends all the same
            print(f"watchdog: no stacks in a file: {err}", file=sys.stderr, flush=True)
        self._ending(message)


def machine() -> str:
    """What identifies the set of processes whose pids this process can see: boot id and pid namespace.

    Not the host name: containers that were cloned share it.
    """
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"


def _state(pid: int) -> str | None:
    """The state letter of a process, as in ps; None when there is none."""
    found = _stat(pid)
    return found and found[0]


def _started(pid: int) -> int | None:
    """When a process was started, in clock ticks since the boot; with its pid it identifies a process."""
    found = _stat(pid)
    return found and int(found[19])


def _stat(pid: int) -> list[str] | None:
    """/proc/<pid>/stat from the third field, the state, on; None when there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
