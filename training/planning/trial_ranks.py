"""Runs the ranks of one trial, ends them all, and combines their ends into the trial's outcome."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from training.config.signals import STOP_SIGNALS
from training.planning.outcome import Outcome, reports_out_of_memory

HANDLED_SIGNALS = (*STOP_SIGNALS, signal.SIGHUP)
"""Signals after which no rank may be left: those that stop a run, and a closed terminal, which a run would survive."""

PEERS_GRACE_S = 10.0
"""Seconds that the other ranks may go on when one has ended; with NCCL they would wait for it for ever."""

PRINTED_CHARACTERS = 4000
"""How much of a failed rank's output its trial's outcome holds, for --json."""

POLL_S = 0.1


class Interrupted(Exception):
    """A signal asked this process to end. Its message is the signal's name."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class SignalCheck:
    """Context manager that only records signals, so that none can arrive between starting a rank and recording it.

    `check` raises Interrupted once a signal has arrived.
    """

    def __init__(self) -> None:
        self._number = 0

    def __enter__(self) -> SignalCheck:
        # nohup ignores SIGHUP, and whoever started this process under it wants it to go on
        under_nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        handled = [number for number in HANDLED_SIGNALS if number != signal.SIGHUP or not under_nohup]
        self._before = {number: signal.signal(number, self._record) for number in handled}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _record(self, number: int, frame: FrameType | None) -> None:
        self._number = number

    def check(self) -> None:
        if self._number:
            raise Interrupted(self._number)


def run_ranks(
    command: Sequence[str], size: int, folder: Path, *, patience_s: float, signals: SignalCheck
) -> list[int | None]:
    """Runs `size` ranks of a command as one process group; none of them is left when this returns or raises.

    Returns each rank's exit code, or None for a rank that had to be ended: its peers had ended, or nothing had changed
    in `folder` for patience_s. The output of a rank goes to folder/rank_<r>.log. Raises Interrupted after a signal.

    torchrun would not do: it starts every rank in a session of its own, so that ranks and their children outlive a
    launcher that is killed; and it ends the peers of a failed rank at once, before they can write their outcomes.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks: list[subprocess.Popen] = []
    try:
        for rank in range(size):
            env = {
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(size),
                "LOCAL_WORLD_SIZE": str(size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            with open(folder / f"rank_{rank}.log", "wb") as log:
                ranks.append(
                    subprocess.Popen(
                        command,
                        env=env,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        process_group=ranks[0].pid if ranks else 0,
                    )
                )
        _wait(ranks, folder, patience_s, signals)
        return [rank.poll() for rank in ranks]
    finally:
        if ranks:
            _end_group(ranks)


def _wait(ranks: Sequence[subprocess.Popen], folder: Path, patience_s: float, signals: SignalCheck) -> None:
    """Returns when all ranks have ended or waiting longer is pointless."""
    first_end: float | None = None
    while any(rank.poll() is None for rank in ranks):
        signals.check()
        now = time.time()
        if first_end is None and any(rank.poll() is not None for rank in ranks):
            first_end = now
        newest = max(path.stat().st_mtime for path in (folder, *folder.glob("*"), *folder.glob(".ranks")))
        if (first_end is not None and now - first_end > PEERS_GRACE_S) or now - newest > patience_s:
            return
        time.sleep(POLL_S)


def _end_group(ranks: Sequence[subprocess.Popen]) -> None:
    try:
        os.killpg(ranks[0].pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # every process of the group has ended
    for rank in ranks:
        rank.wait()


@dataclass(frozen=True)
class RankEnd:
    """How one rank ended.

    code: its exit code; None when it had to be ended. outcome: what it wrote, if anything. capped: it ran under a
    memory cap.
    """

    rank: int
    code: int | None
    outcome: Outcome | None
    printed: str
    capped: bool

    @property
    def out_of_memory(self) -> str | None:
        """The reason to conclude that the rank ran out of memory, or None."""
        if self.outcome is not None:
            return self.outcome.reason if self.outcome.verdict == "out_of_memory" else None
        if self.code in (-signal.SIGKILL, 128 + signal.SIGKILL):
            return f"rank {self.rank} was killed, as the kernel does when the machine runs out of memory"
        return self.reason if reports_out_of_memory(self.printed, capped=self.capped) else None

    @property
    def reason(self) -> str:
        """Why the rank ended, in one line: what its watchdog reported, what it wrote, or the last line it printed."""
        lines = [line.strip() for line in self.printed.splitlines() if line.strip()]
        if found := next((line for line in lines if line.startswith("watchdog: ")), None):
            return found
        if self.outcome is not None:
            return self.outcome.reason
        ended = "gave no sign of life" if self.code is None else f"ended with code {self.code}"
        return f"rank {self.rank} {ended}: {lines[-1] if lines else 'it printed nothing'}"


def read_ends(folder: Path, codes: Sequence[int | None], *, capped: bool) -> list[RankEnd]:
    """How the ranks of a trial ended, in the order in which they wrote their outcomes, then those without one.

    The first one is the likely cause: the others may have lost their connection to it.
    """
    ends = []
    for rank, code in enumerate(codes):
        path, outcome, written_at = folder / f"rank_{rank}.json", None, time.time()
        if path.exists():
            plain = json.loads(path.read_text(encoding="utf-8"))
            outcome = Outcome(**{**plain, "step_seconds": tuple(plain["step_seconds"])})
            written_at = path.stat().st_mtime
        printed = (folder / f"rank_{rank}.log").read_text(encoding="utf-8", errors="replace")
        ends.append((written_at, RankEnd(rank, code, outcome, printed, capped)))
    return [end for _, end in sorted(ends, key=lambda pair: pair[0])]


def combined_outcome(ends: Sequence[RankEnd]) -> Outcome:
    """The trial's outcome: out of memory when any rank was; otherwise each step is as slow as its slowest rank."""
    reasons = [reason for end in ends if (reason := end.out_of_memory) is not None]
    if reasons:
        return Outcome("out_of_memory", reasons[0])
    outcomes = [end.outcome for end in ends if end.outcome is not None and end.outcome.verdict == "ok"]
    if len(outcomes) < len(ends):
        culprit = _culprit(ends)
        return Outcome("failed", culprit.reason, printed=culprit.printed[-PRINTED_CHARACTERS:])
    steps = tuple(max(step) for step in zip(*(o.step_seconds for o in outcomes), strict=True))
    allocated = [o.peak_allocated_gib for o in outcomes if o.peak_allocated_gib is not None]
    return Outcome(
        "ok", None, steps, max(o.peak_gib for o in outcomes), max(allocated, default=None), outcomes[0].backend
    )


def _culprit(ends: Sequence[RankEnd]) -> RankEnd:
    """The rank to blame: one that died without an outcome, else the first that wrote a failure, else one that hung."""
    died = [end for end in ends if end.outcome is None and end.code is not None]
    failed = [end for end in ends if end.outcome is not None and end.outcome.verdict != "ok"]
    hung = [end for end in ends if end.outcome is None]
    return next(iter([*died, *failed, *hung]))
