"""Rows of metrics.jsonl handed on to a service that may be slow, full or dead, from a thread of its own.

The training loop only puts rows into a queue. Whatever the service does, the loop never waits for it: a call that
fails or takes too long, or a queue that is full, ends the mirror with one line on stderr.
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
from typing import Protocol

Fields = dict[str, float | str]
"""What one step has to show, by name."""

UNSHOWN_EVENTS = frozenset({"start", "resume", "device"})
"""Facts of a launch: nothing to draw."""

NON_FINITE = {text: float(text) for text in ("nan", "inf", "-inf")}
"""How metrics.jsonl spells what JSON has no number for."""


def by_step(rows: Iterable[dict]) -> Iterator[tuple[int, Fields]]:
    """(step, fields) once per optimizer step: its row, and every event told before the next step's row.

    A step is yielded when the next one begins, or at the end. Events before the first step are dropped.
    """
    step, fields = 0, None
    for row in rows:
        if "event" not in row:
            if fields is not None:
                yield step, fields
            step, fields = row["step"], flat(row)
        elif fields is not None and row["event"] not in UNSHOWN_EVENTS:
            fields |= flat(row)
    if fields is not None:
        yield step, fields


def flat(row: dict) -> Fields:
    """A row on one level, as charts want it: numbers and strings, the unix time as "_timestamp".

    A step row keeps its names. A field of an event is called <event>/<field>, unless its name begins with
    <event>_ already, and a sample sample/<letters of its prompt>; an event's step and time are left out. Lists and
    mappings become <name>/<index or key>.
    """
    event = row.get("event")
    if event is None:
        return dict(_leaves({"_timestamp" if key == "time" else key: value for key, value in row.items()}))
    if event == "sample":
        name = re.sub(r"\W+", "_", row["prompt"])[:40]
        return {f"sample/{name}": row["prompt"] + row["text"]}
    own = {key: value for key, value in row.items() if key not in ("event", "step", "time")}
    return dict(_leaves({k if k.startswith(f"{event}_") else f"{event}/{k}": value for k, value in own.items()}))


def _leaves(tree: dict) -> Iterator[tuple[str, float | str]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves({f"{name}/{key}": entry for key, entry in value.items()})
        elif isinstance(value, list):
            yield from _leaves({f"{name}/{index:02d}": entry for index, entry in enumerate(value)})
        elif isinstance(value, str):
            yield name, NON_FINITE.get(value, value)
        elif value is not None:
            yield name, +value  # True is drawn as 1


class Sink(Protocol):
    """Where a mirror puts steps. All but `abandon` is called on the mirror's thread, and may raise anything."""

    name: str
    advice: str
    """ends the line that says that the mirror gave up"""

    def open(self, guard: Callable[[], None]) -> int:
        """Connects. Returns the last step it has.

        guard: to be called whenever handlers of atexit have been registered that may wait for ever.
        """

    def write(self, step: int, fields: Fields) -> None:
        """Takes a step. What of one at or before the last, trained again after a crash or a rollback, is its choice."""

    def close(self, exit_code: int) -> None: ...

    def abandon(self) -> None:
        """Lets go of everything at once, so that nothing waits for it when the process ends. From any thread."""


@dataclass(frozen=True)
class Limits:
    """How long a mirror bears with its sink."""

    rows: int = 10_000
    """rows and events that may wait"""
    open_s: float = 120.0
    call_s: float = 30.0
    finish_s: float = 45.0
    """once training is over, for all that is waiting and the sink's end"""


class _TooLate(Exception):
    """A call came back after the mirror had given up."""


class Mirror:
    """One sink behind one thread. `offer` and `finish` belong to the training thread; `offer` never waits.

    history: given the last step that the sink has, the rows of metrics.jsonl between it and the first that will be
    offered: what an earlier life of the run did not get through.
    """

    def __init__(self, sink: Sink, history: Callable[[int], Iterable[dict]], limits: Limits) -> None:
        self.name = sink.name
        self._sink, self._history, self._limits = sink, history, limits
        self._queue: queue.Queue[dict | None] = queue.Queue(limits.rows)
        self._call: tuple[str, float, float]  # what is said if it fails, since when, seconds it may take
        self._call = ("could not start", time.monotonic(), limits.open_s)
        self._lock, self._over = threading.Lock(), False
        self._cleaner: threading.Thread | None = None
        self._exit_code = 0
        atexit.register(self.finish, 1)  # a run that fails does not come to its own finish
        self._worker = threading.Thread(target=self._work, name=f"{sink.name} mirror", daemon=True)
        self._worker.start()

    def offer(self, row: dict) -> None:
        """Takes a row of metrics.jsonl, of a step or an event, in the order of the file."""
        self._put(row)

    def finish(self, exit_code: int) -> None:
        """Hands on what is waiting and ends; after finish_s seconds without the rest."""
        atexit.unregister(self.finish)
        self._exit_code = exit_code
        self._put(None)
        if not self._over:
            self._worker.join(self._limits.finish_s)
            if self._worker.is_alive():
                self._give_up(f"could not finish (no answer for {self._limits.finish_s:.0f} s)")
        if self._cleaner is not None:
            self._cleaner.join(5)

    def _put(self, row: dict | None) -> None:
        if self._over:
            return
        doing, since, limit_s = self._call
        if (waited := time.monotonic() - since) > limit_s:
            return self._give_up(f"{doing} (no answer for {waited:.0f} s)")
        try:
            self._queue.put_nowait(row)
        except queue.Full:
            self._give_up(f"stopped taking rows ({self._limits.rows} are waiting)")

    def _work(self) -> None:
        try:
            with self._watched("could not start", self._limits.open_s):
                last = self._sink.open(self._guard)
            for step, fields in by_step(itertools.chain(self._history(last), iter(self._queue.get, None))):
                with self._watched("stopped taking rows", self._limits.call_s):
                    self._sink.write(step, fields)
            with self._watched("could not finish", self._limits.finish_s):
                self._sink.close(self._exit_code)
        except Exception as err:  # whatever a service does, the training outlives it
            self._give_up(f"{self._call[0]} ({type(err).__name__}: {err})")
            if isinstance(err, _TooLate):
                self._sink.abandon()  # what it made since it was given up must go too

    @contextmanager
    def _watched(self, doing: str, limit_s: float) -> Iterator[None]:
        self._call = (doing, time.monotonic(), limit_s)
        yield
        self._call = (doing, 0.0, float("inf"))
        if self._over:
            raise _TooLate

    def _guard(self) -> None:
        # handlers run last in, first out: ours ends what theirs would wait for
        atexit.unregister(self.finish)
        atexit.register(self.finish, 1)

    def _give_up(self, what: str) -> None:
        with self._lock:
            if self._over:
                return
            self._over = True
        print(f"{self._sink.name} {what}; {self._sink.advice}", file=sys.stderr, flush=True)
        cleaner = threading.Thread(target=self._sink.abandon, name=f"{self._sink.name} end", daemon=True)
        cleaner.start()
        self._cleaner = cleaner  # only now: `finish` may be waiting to join it
