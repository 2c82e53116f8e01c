"""A background thread that forwards the rows of metrics.jsonl to a sink: a service that may be slow, full or dead.

The training loop only puts rows into a queue and never waits for the sink. A call that fails or takes too long, or a
queue that is full, ends the mirror with one line on stderr.
"""

from __future__ import annotations

import atexit
import itertools
import queue
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

Fields = dict[str, float | str]
"""The values of one step by name, as charts show them."""

LAUNCH_EVENTS = frozenset({"start", "resume", "device"})
"""Events that describe a launch; they have nothing to draw."""

NON_FINITE = {text: float(text) for text in ("nan", "inf", "-inf")}
"""metrics.jsonl holds non-finite numbers as these strings, since JSON has no number for them."""


def by_step(rows: Iterable[dict]) -> Iterator[tuple[int, Fields]]:
    """Yields (step, fields) once per optimizer step: the fields of its row and of all events before the next step's.

    A step is yielded when the next one begins, or at the end of the rows. Events before the first step are dropped.
    """
    step, fields = 0, None
    for row in rows:
        if "event" not in row:
            if fields is not None:
                yield step, fields
            step, fields = row["step"], chart_fields(row)
        elif fields is not None and row["event"] not in LAUNCH_EVENTS:
            fields |= chart_fields(row)
    if fields is not None:
        yield step, fields


def chart_fields(row: dict) -> Fields:
    """A row as a flat mapping of numbers and strings. Its unix time is named "_timestamp".

    The fields of a step row keep their names. A field of an event is named <event>/<field>, or <field> where that
    begins with <event>_ already; the event's step and time are left out. A "sample" event becomes one field, named
    sample/<its prompt with _ for everything but letters and digits, cut to 40 characters>. An entry of a list or
    mapping is named <name>/<index or key>. None is left out.
    """
    event = row.get("event")
    if event is None:
        return dict(_chart_items({"_timestamp" if key == "time" else key: value for key, value in row.items()}))
    if event == "sample":
        name = re.sub(r"\W+", "_", row["prompt"])[:40]
        return {f"sample/{name}": row["prompt"] + row["text"]}
    own = {key: value for key, value in row.items() if key not in ("event", "step", "time")}
    return dict(_chart_items({k if k.startswith(f"{event}_") else f"{event}/{k}": value for k, value in own.items()}))


def _chart_items(tree: dict) -> Iterator[tuple[str, float | str]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _chart_items({f"{name}/{key}": entry for key, entry in value.items()})
        elif isinstance(value, list):
            yield from _chart_items({f"{name}/{index:02d}": entry for index, entry in enumerate(value)})
        elif isinstance(value, str):
            yield name, NON_FINITE.get(value, value)
        elif value is not None:
            yield name, +value  # True is drawn as 1


class Sink(Protocol):
    """Where a mirror sends steps. Its thread calls all methods but `abandon`, and they may raise anything."""

    name: str
    advice: str
    """What the user can do once the mirror has given up; the end of its line on stderr."""

    def open(self, renew_exit_handler: Callable[[], None]) -> int:
        """Connects, and returns the last step that the sink already has.

        renew_exit_handler: call it after registering atexit handlers that may block for ever. Python runs the handler
        that was registered last first, and the mirror's own must run before those.
        """

    def write(self, step: int, fields: Fields) -> None:
        """Logs one step.

        Steps that the sink already has may arrive again after a crash or a rollback; the sink decides what to do with
        them.
        """

    def close(self, exit_code: int) -> None:
        """Finishes what was written. exit_code: of the training process."""

    def abandon(self) -> None:
        """Releases everything at once, so that nothing blocks the end of the process. May be called on any thread."""


@dataclass(frozen=True)
class Limits:
    """Timeouts for a sink, and the length of its queue."""

    rows: int = 10_000
    """Rows and events in the queue."""
    open_s: float = 120.0
    call_s: float = 30.0
    """For one call of `write`."""
    finish_s: float = 45.0
    """After training: for all rows that are still in the queue and for closing the sink."""


class _Call(NamedTuple):
    """What the mirror's thread is doing. failure: how stderr describes it if it fails. began: by time.monotonic."""

    failure: str
    began: float
    limit_s: float


class _GivenUp(Exception):
    """A call of the sink returned after the mirror had given up."""


class Mirror:
    """Sends rows to one sink on a thread of its own. `offer` and `finish` are for the training thread.

    history: returns, for the last step that the sink has, the rows of metrics.jsonl between that step and the first
    row that will be offered: those that the previous launch did not manage to send.
    """

    def __init__(self, sink: Sink, history: Callable[[int], Iterable[dict]], limits: Limits) -> None:
        self.name = sink.name
        self._sink, self._history, self._limits = sink, history, limits
        self._queue: queue.Queue[dict | None] = queue.Queue(limits.rows)
        self._call = _Call("could not start", time.monotonic(), limits.open_s)
        self._lock, self._given_up = threading.Lock(), False
        self._abandoning: threading.Thread | None = None
        self._exit_code = 0
        atexit.register(self.finish, 1)  # a run that fails does not reach its own call of `finish`
        self._worker = threading.Thread(target=self._work, name=f"{sink.name} mirror", daemon=True)
        self._worker.start()

    def offer(self, row: dict) -> None:
        """Queues a row of metrics.jsonl, a step's or an event's, in the order of the file. Never blocks or raises."""
        self._put(row)

    def finish(self, exit_code: int) -> None:
        """Sends all rows in the queue and closes the sink; gives up after Limits.finish_s."""
        atexit.unregister(self.finish)
        self._exit_code = exit_code
        self._put(None)
        if not self._given_up:
            self._worker.join(self._limits.finish_s)
            if self._worker.is_alive():
                self._give_up(f"could not finish (no answer for {self._limits.finish_s:.0f} s)")
        if self._abandoning is not None:
            self._abandoning.join(5)

    def _put(self, row: dict | None) -> None:
        if self._given_up:
            return
        call = self._call
        if (waited := time.monotonic() - call.began) > call.limit_s:
            return self._give_up(f"{call.failure} (no answer for {waited:.0f} s)")
        try:
            self._queue.put_nowait(row)
        except queue.Full:
            self._give_up(f"stopped taking rows ({self._limits.rows} are waiting)")

    def _work(self) -> None:
        try:
            with self._timed("could not start", self._limits.open_s):
                last = self._sink.open(self._renew_exit_handler)
            for step, fields in by_step(itertools.chain(self._history(last), iter(self._queue.get, None))):
                with self._timed("stopped taking rows", self._limits.call_s):
                    self._sink.write(step, fields)
            with self._timed("could not finish", self._limits.finish_s):
                self._sink.close(self._exit_code)
        except Exception as err:  # nothing that a service does may end the training
            self._give_up(f"{self._call.failure} ({type(err).__name__}: {err})")
            if isinstance(err, _GivenUp):
                self._sink.abandon()  # also what the sink has created since the first `abandon`

    @contextmanager
    def _timed(self, failure: str, limit_s: float) -> Iterator[None]:
        """Lets the training thread see how long the block takes. Raises _GivenUp when it took too long."""
        self._call = _Call(failure, time.monotonic(), limit_s)
        yield
        self._call = _Call(failure, 0.0, float("inf"))
        if self._given_up:
            raise _GivenUp

    def _renew_exit_handler(self) -> None:
        atexit.unregister(self.finish)
        atexit.register(self.finish, 1)

    def _give_up(self, why: str) -> None:
        with self._lock:
            if self._given_up:
                return
            self._given_up = True
        print(f"{self._sink.name} {why}; {self._sink.advice}", file=sys.stderr, flush=True)
        abandoning = threading.Thread(target=self._sink.abandon, name=f"{self._sink.name} end", daemon=True)
        abandoning.start()
        self._abandoning = abandoning  # only once it runs: `finish` joins it, on another thread
