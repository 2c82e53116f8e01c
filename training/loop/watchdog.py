"""Notices a rank that hangs or dies, names it and its phase, and ends the run within a minute.

Each rank writes one small file, <output_dir>/.ranks/rank_<r>.json, with its last sign of life: a counter that grows
with each phase of the loop (data, forward, backward, ...), the phase, its process id and host. A thread on every rank
reads all of them. Ranks that wait in a collective all have the same, higher counter; they wait for the rank whose
counter is behind. NCCL ranks whose peer died wait for ever instead of raising, so a peer whose process no longer
exists on this host is reported as dead.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path

from gsa.files import write_atomically

POLL_S = 1.0
PATIENT_PHASES = {"start", "save", "load", "evaluate", "first step"}
"""Phases whose length depends on the disk or on compilers: they may take ten times as long."""


class Watchdog:
    """Context manager around a run. `beat(phase)` at the start of each phase of the loop costs one assignment.

    timeout_s: a rank that stays in one phase for longer than this counts as hung. All ranks must share output_dir and
    `launch`, a word that distinguishes this launch's files from those of an earlier one. When a rank is late or dead,
    every living rank names it, prints the stacks of all its own threads (also to .ranks/stacks_rank_<r>.txt), and exits
    with code 1.
    """

    def __init__(self, output_dir: Path, *, rank: int, size: int, timeout_s: float, launch: str) -> None:
        self._dir = output_dir / ".ranks"
        self._rank, self._size, self._timeout, self._launch = rank, size, timeout_s, launch
        self._host = socket.gethostname()
        self._count, self._phase, self._since = 0, "start", time.monotonic()
        self._stop = threading.Event()
        self._warned_of_disk = False

    def __enter__(self) -> Watchdog:
        self._dir.mkdir(parents=True, exist_ok=True)
        self._publish("running")
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self._try_publish("finished" if exc[0] is None else "failed")
        if exc[0] is not None and exc[0] is not SystemExit:
            # a peer's death reaches this rank as a broken connection: name the peer
            time.sleep(POLL_S)
            if dead := self._dead(self._peers()):
                print(f"watchdog: {self._describe('died', dead)}", file=sys.stderr, flush=True)

    def beat(self, phase: str) -> None:
        self._phase, self._since = phase, time.monotonic()
        self._count += 1

    def _patience(self, phase: str) -> float:
        return self._timeout * (10 if phase in PATIENT_PHASES else 1)

    def _file(self, rank: int) -> Path:
        return self._dir / f"rank_{rank}.json"

    def _publish(self, state: str) -> None:
        own = {
            "launch": self._launch,
            "count": self._count,
            "phase": self._phase,
            "pid": os.getpid(),
            "host": self._host,
            "state": state,
            "time": time.time(),
        }
        with write_atomically(self._file(self._rank), durable=False) as file:
            file.write(json.dumps(own).encode())

    def _try_publish(self, state: str) -> bool:
        """Publishes; False when the disk refuses. A full disk must not end the watch, nor hide the run's own error."""
        try:
            self._publish(state)
        except OSError as err:
            if not self._warned_of_disk:
                print(f"watchdog: rank {self._rank} cannot write its sign of life: {err}", file=sys.stderr, flush=True)
            self._warned_of_disk = True
            return False
        return True

    def _peers(self) -> dict[int, dict]:
        """The last signs of life of the other ranks of this launch, as far as they can be read."""
        peers = {}
        for rank in range(self._size):
            try:
                peer = json.loads(self._file(rank).read_text())
            except (OSError, json.JSONDecodeError):
                continue
            if rank != self._rank and peer["launch"] == self._launch:
                peers[rank] = peer
        return peers

    def _dead(self, peers: dict[int, dict]) -> list[int]:
        return [r for r, p in peers.items() if p["state"] == "running" and not _alive(p, self._host)]

    def _watch(self) -> None:
        while not self._stop.wait(POLL_S):
            disk_is_fine = self._try_publish("running")
            # in case another thread holds the interpreter lock and this one cannot run
            faulthandler.dump_traceback_later(self._patience(self._phase) + 10, exit=True, file=sys.stderr)
            silent = time.monotonic() - self._since
            peers = self._peers()
            dead = self._dead(peers)
            frozen = [
                r
                for r, p in peers.items()
                if disk_is_fine and p["state"] == "running" and time.time() - p["time"] > self._timeout
            ]
            if dead:
                time.sleep(POLL_S)  # its own error message may still be on its way
                self._end(self._describe("died", dead))
            if frozen:
                self._end(
                    self._describe(f"gave no sign of life for {self._timeout:.0f} s (stopped or swapped out?)", frozen)
                )
            if silent > self._patience(self._phase):
                counts = {r: p["count"] for r, p in peers.items()} | {self._rank: self._count}
                late = [r for r, c in counts.items() if c == min(counts.values())]
                # where all ranks are in the same phase, each hangs by itself, or the network does
                self._end(self._describe(f"silent for more than {self._patience(self._phase):.0f} s", late))

    def _describe(self, what: str, ranks: list[int]) -> str:
        peers = self._peers() | {
            self._rank: {"count": self._count, "phase": self._phase, "pid": os.getpid(), "host": self._host}
        }
        named = ", ".join(
            f"rank {r} (pid {peers[r]['pid']} on {peers[r]['host']}, in phase '{peers[r]['phase']}')"
            if r in peers
            else f"rank {r}"
            for r in sorted(ranks)
        )
        return f"{named}: {what}. This is rank {self._rank}, in phase '{self._phase}'. Ending the run."

    def _end(self, message: str) -> None:
        if self._stop.is_set():
            return
        print(f"watchdog: {message}", file=sys.stderr, flush=True)
        try:
            with open(self._dir / f"stacks_rank_{self._rank}.txt", "w", encoding="utf-8") as file:
                file.write(message + "\n")
                file.flush()
                faulthandler.dump_traceback(file=file, all_threads=True)
        except OSError as err:  # the run ends all the same
            print(f"watchdog: no stacks in a file: {err}", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        sys.stderr.flush()
        time.sleep(POLL_S * 2)  # let the other ranks notice and dump theirs before a launcher ends them
        os._exit(1)


def _alive(peer: dict, host: str) -> bool:
    """False only when the process is known to be gone; processes of other hosts cannot be seen."""
    if peer["host"] != host:
        return True
    try:
        stat = Path(f"/proc/{peer['pid']}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"
