"""Compares steps that a resumed run trains again with their discarded rows: was the replay identical?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from training.record.metric_schema import is_timing
from training.record.metrics_log import as_written
from training.record.numerics import in_words


class ReplayReceipt:
    """Compares every new row with the discarded row of the same step; the result is a "receipt" event.

    discarded: the rows that followed the step resumed from, as metrics.jsonl held them. Times, and metrics computed
    from them, are not compared. changed: name -> [before, now] of what differs from the launches that wrote those rows,
    so that numbers may differ.
    """

    def __init__(self, discarded: Iterable[dict], changed: Mapping[str, list] | None = None) -> None:
        self._changed = dict(changed or {})
        self._discarded = {row["step"]: row for row in discarded if "loss" in row}
        self._last = max(self._discarded, default=0)
        self._compared = 0
        self._first_difference: dict | None = None

    def compare(self, row: dict) -> dict | None:
        """Compares a step's row; returns the event when it was the last one with a discarded row, otherwise None."""
        before, row = self._discarded.pop(row["step"], None), as_written(row)
        if before is not None:
            self._compared += 1
            self._first_difference = self._first_difference or first_difference(before, row)
        return self.event() if row["step"] == self._last else None

    def event(self) -> dict | None:
        """The event for the rows compared so far; None when there were none to compare or it was returned before."""
        if not self._last:
            return None
        self._last = 0
        return {
            "event": "receipt",
            "compared": self._compared,
            "identical": self._first_difference is None,
            "first_difference": self._first_difference,
            "changed": self._changed,
        }


def first_difference(before: dict, now: dict) -> dict | None:
    """The first field, in the order of the rows, that differs between the two; None when none does. Ignores times."""
    for field in dict.fromkeys([*before, *now]):
        if not is_timing(field) and before.get(field) != now.get(field):
            return {"step": now["step"], "field": field, "before": before.get(field), "now": now.get(field)}
    return None


def describe(event: dict) -> str:
    """The receipt as a line for the console."""
    changed = in_words(event["changed"])
    if event["identical"]:
        why = f", although they might differ after a change of {changed}" if changed else ""
        return f"resume receipt: {event['compared']} replayed steps, every number as before{why}"
    found = event["first_difference"]
    why = f". Numbers may differ, because these have changed since: {changed}" if changed else ""
    return (
        f"resume receipt: {event['compared']} replayed steps, NOT as before: first at step {found['step']}, "
        f"{found['field']} was {found['before']!r} and is {found['now']!r}{why}"
    )
