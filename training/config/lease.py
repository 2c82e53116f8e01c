"""One folder, one writer: the lease that a process holds on a folder for as long as it writes there.

    no file  -- take -->  owned  -- release -->  no file
                            |
                            +-- its owner is dead, or its heartbeat stands still, or --take_over -->  owned by another

The lease is a small file in the folder. It says who the owner is, and holds a heartbeat: a number that a thread of the
owner raises every few seconds. A reader on the owner's machine asks the system whether that process lives; any other
watches the number by its own monotonic clock, and never compares the clocks of two machines. An owner that finds
another's lease in the place of its own ends at once, without writing. Reading a folder needs no lease.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from training.config.exit_codes import ExitCode, Refusal

LEASE = ".lease.json"
HEARTBEAT_S = 2.0
PATIENCE_S = 120.0
"""An owner on another machine whose heartbeat stands still for so long is gone. A disk may stall for a minute."""
REQUEUE_S = 300.0
"""The longest that a launch waits for an owner that is about to end: a requeued job, for its earlier self."""
SETTLE_S = 1.0
"""After a take-over, until it is believed: a third process may have done the same at the same moment."""
_MAX_BYTES = 4096
_JOB_VARIABLES = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_ID", "FLUX_JOB_ID")


class LeaseError(Refusal):
    """Another process owns the folder."""


@dataclass(frozen=True)
class Owner:
    """Who holds a lease.

    token: a word that no other lease has. machine: boot id and pid namespace. started: when the process began, in clock
    ticks since the boot. job: the scheduler's id, or "". launch: the number of the launch of this run; 0 for a command
    that is none. since: for people. phase: "running" or "stopping". count: the heartbeat.
    """

    token: str
    command: str
    host: str
    machine: str
    pid: int
    started: int
    job: str
    launch: int
    since: str
    phase: str = "running"
    count: int = 0

    def __str__(self) -> str:
        job = f", job {self.job}" if self.job else ""
        launch = f", launch {self.launch}" if self.launch else ""
        return f"{self.command} (pid {self.pid} on {self.host}{job}{launch}, since {self.since})"


class Lease:
    """The lease that this process holds; a thread keeps its heartbeat going until it is released as often as taken.

    lost: called with the new owner when another has taken the folder over.
    """

    def __init__(self, folder: Path, owner: Owner, *, created: bool, lost: Callable[[str], None]) -> None:
        self.folder, self.owner, self._created, self._lost = folder, owner, created, lost
        self.phase: Callable[[], str] = lambda: "running"
        """Asked at each heartbeat."""
        self._count, self._holders, self._ended = 0, 1, threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()

    def hold(self) -> Lease:
        """The same lease, for another holder in this process."""
        self._holders += 1
        return self

    def release(self) -> None:
        """Gives the folder back, and removes it when it was made for this lease and nothing was written to it."""
        self._holders -= 1
        if self._holders > 0 or self._ended.is_set():
            return
        self._ended.set()
        _held.pop(self.owner.token, None)
        self._thread.join(timeout=2 * HEARTBEAT_S)  # a disk that stalls must not keep the process
        with suppress(OSError):
            found = read_lease(self.folder)
            if isinstance(found, Owner) and found.token == self.owner.token:
                (self.folder / LEASE).unlink()
            if self._created:
                self.folder.rmdir()  # fails where there is something

    def _keep(self) -> None:
        while not self._ended.wait(HEARTBEAT_S):
            try:
                self._beat()
            except OSError:
                continue  # the disk does not answer; whether the lease is lost shows when it does

    def _beat(self) -> None:
        """Raises the number in place: a file that another has put there meanwhile is another one, and stays."""
        self._count += 1
        own = _render(Owner(**{**asdict(self.owner), "phase": self.phase(), "count": self._count}))
        try:
            file = open(self.folder / LEASE, "r+b", buffering=0)  # noqa: SIM115
        except FileNotFoundError:
            _create(self.folder, own)  # somebody has removed it: nobody owns the folder now
            return
        with file:
            found = _parse(file.read(_MAX_BYTES))
            if isinstance(found, Owner) and found.token == self.owner.token:
                os.pwrite(file.fileno(), own, 0)
            elif not self._ended.is_set():
                self._ended.set()
                self._lost(str(found))


_held: dict[str, Lease] = {}
"""The leases of this process, by token."""


def take(
    folder: Path,
    *,
    command: str,
    launch: int = 0,
    take_over: bool = False,
    lost: Callable[[str], None] | None = None,
    patience_s: float = PATIENCE_S,
    requeue_s: float = REQUEUE_S,
) -> Lease:
    """Makes this process the owner of `folder`, which is made when it is not there.

    A dead owner is replaced: on this machine at once, on another after its heartbeat has stood still for `patience_s`.
    An owner that is about to end, or belongs to the same job, is waited for, for at most `requeue_s`. take_over:
    replaces a living owner too, which ends. lost: called when another takes this lease over; by default the process
    ends. Raises LeaseError, naming the owner, when another process owns the folder, and OSError when the disk refuses.
    """
    created = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    own = _this_process(command, launch)
    watch, began, announced = _Watch(patience_s), time.monotonic(), False
    while not _create(folder, _render(own)):
        found = read_lease(folder)
        if found is None:
            continue  # it was given back at this moment
        if isinstance(found, Owner) and found.token in _held:
            return _held[found.token].hold()
        verdict = watch.verdict(found)
        if take_over or verdict == "dead":
            print(f"{folder}: taken over from {found}" + (", who is dead" if verdict == "dead" else ""), flush=True)
            if _replace(folder, own, found):
                break
            take_over = False
            continue
        waits = verdict == "unknown" or (_ends_soon(found, own) and time.monotonic() - began < requeue_s)
        if not waits:
            raise LeaseError(
                f"{folder} is in use by {found}. Wait for it or stop it; train.py --take_over takes the folder from it"
            )
        if not announced:
            print(f"{folder} belongs to {found}; waiting to see whether it lives, or for it to end", flush=True)
            announced = True
        time.sleep(0.25)
    lease = _held[own.token] = Lease(folder, own, created=created, lost=lost or (lambda by: _end_process(folder, by)))
    return lease


@contextmanager
def owned(folder: Path, *, command: str, take_over: bool = False) -> Iterator[None]:
    """Owns a folder during the block; one that cannot be written needs no owner, and the block meets the same error.

    Raises LeaseError when another process owns it.
    """
    lease = None
    with suppress(OSError):
        lease = take(folder, command=command, take_over=take_over)
    try:
        yield
    finally:
        if lease is not None:
            lease.release()


def read_lease(folder: Path) -> Owner | str | None:
    """The owner of a folder, None when it has none, or a text that says why the lease cannot be read. Never waits."""
    try:
        descriptor = os.open(folder / LEASE, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    except OSError as err:
        return f"somebody whose lease cannot be read ({err.strerror})"
    try:
        return _parse(os.read(descriptor, _MAX_BYTES))
    except OSError as err:
        return f"somebody whose lease cannot be read ({err.strerror})"
    finally:
        os.close(descriptor)


def is_dead(owner: Owner) -> bool | None:
    """Whether the owner's process is gone; None on other machines than its own, where that cannot be seen."""
    if owner.machine != machine():
        return None
    return _started(owner.pid) != owner.started


def machine() -> str:
    """What identifies the processes that this one can see: boot id and pid namespace. Cloned hosts share their name."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"


class _Watch:
    """Watches the heartbeat of a lease by this machine's monotonic clock."""

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._seen: Owner | str | None = None
        self._since, self._moved = 0.0, False

    def verdict(self, found: Owner | str) -> str:
        """ "alive", "dead", or "unknown" as long as it has neither moved nor stood still for long enough."""
        if found != self._seen:
            same = isinstance(found, Owner) and isinstance(self._seen, Owner) and found.token == self._seen.token
            self._moved, self._seen, self._since = same, found, time.monotonic()
        dead = is_dead(found) if isinstance(found, Owner) else None
        if dead is not None:
            return "dead" if dead else "alive"
        if time.monotonic() - self._since > self._patience_s:
            return "dead"
        return "alive" if self._moved else "unknown"


def _ends_soon(found: Owner | str, own: Owner) -> bool:
    return isinstance(found, Owner) and (found.phase == "stopping" or (own.job != "" and found.job == own.job))


def _this_process(command: str, launch: int) -> Owner:
    return Owner(
        token=uuid.uuid4().hex,
        command=command,
        host=socket.gethostname(),
        machine=machine(),
        pid=os.getpid(),
        started=_started(os.getpid()) or 0,
        job=next((os.environ[name] for name in _JOB_VARIABLES if os.environ.get(name)), ""),
        launch=launch,
        since=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _started(pid: int) -> int | None:
    """When a process began, in clock ticks since the boot; None when there is none, or only its remains."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _render(owner: Owner) -> bytes:
    # of one length, so that a heartbeat in place leaves nothing of the text before
    return json.dumps(asdict(owner)).encode().ljust(_MAX_BYTES // 4) + b"\n"


def _parse(raw: bytes) -> Owner | str:
    try:
        plain: dict[str, Any] = json.loads(raw)
        owner = Owner(**plain)
        if any(type(value) is not type(getattr(_EXAMPLE, name)) for name, value in plain.items()):
            raise TypeError
    except (ValueError, TypeError, RecursionError):
        return f"somebody whose lease ({LEASE}) is damaged"
    return owner


_EXAMPLE = Owner("", "", "", "", 0, 0, "", 0, "")


def _create(folder: Path, content: bytes) -> bool:
    """Makes the lease, whole, where there is none; False where there is one."""
    temporary = _temporary(folder, content)
    try:
        os.link(temporary, folder / LEASE)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        try:
            descriptor = os.open(folder / LEASE, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        os.write(descriptor, content)
        os.close(descriptor)
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _replace(folder: Path, own: Owner, before: Owner | str) -> bool:
    """Puts the lease of `own` in the place of `before`; False when another process did at the same moment."""
    now = read_lease(folder)
    token = before.token if isinstance(before, Owner) else before
    if (now.token if isinstance(now, Owner) else now) != token:
        return False
    os.replace(_temporary(folder, _render(own)), folder / LEASE)
    time.sleep(SETTLE_S)
    found = read_lease(folder)
    return isinstance(found, Owner) and found.token == own.token


def _temporary(folder: Path, content: bytes) -> Path:
    path = folder / f"{LEASE}.{uuid.uuid4().hex}"
    path.write_bytes(content)
    return path


def _end_process(folder: Path, by: str) -> None:
    print(f"error: {folder} was taken over by {by}; this process ends without writing", file=sys.stderr, flush=True)
    os._exit(ExitCode.FAILED)
