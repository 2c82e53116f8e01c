"""Was the replay identical? Steps that a resumed run trains again, held against the rows of the dead segment."""

from __future__ import annotations

from collections.abc import Iterable

from training.record.metric_schema import is_timing
from training.record.metrics_log import as_written


class ReplayReceipt:
    """Fed every new row; `event` is due once the last step of the dead segment has been trained again.

    dead_rows: what metrics.jsonl held after the step resumed from. Times, and what follows from them, may differ.
    """

    def __init__(self, dead_rows: Iterable[dict]) -> None:
        self._dead = {row["step"]: row for row in dead_rows if "loss" in row}
        self._last = max(self._dead, default=0)
        self._compared = 0
        self._first_difference: dict | None = None

    def compare(self, row: dict) -> dict | None:
        """The receipt event, when this row was the last to be compared; else None."""
        before, row = self._dead.pop(row["step"], None), as_written(row)
        if before is not None:
            self._compared += 1
            self._first_difference = self._first_difference or first_difference(before, row)
        return self.event() if row["step"] == self._last else None

    def event(self) -> dict | None:
        """What has been compared so far; None when nothing was to be compared, or it has been told."""
        if not self._last:
            return None
        self._last = 0
        return {
            "event": "receipt",
            "compared": self._compared,
            "identical": self._first_difference is None,
            "first_difference": self._first_difference,
        }


def first_difference(before: dict, now: dict) -> dict | None:
    """The first field, in the order of the rows, that is not the same in both; None when all are."""
    for field in dict.fromkeys([*before, *now]):
        if not is_timing(field) and before.get(field) != now.get(field):
            return {"step": now["step"], "field": field, "before": before.get(field), "now": now.get(field)}
    return None


def describe(event: dict) -> str:
    """The receipt as a line for the console."""
    if event["identical"]:
        return f"resume receipt: {event['compared']} replayed steps, every number as before"
    found = event["first_difference"]
    return (
        f"resume receipt: {event['compared']} replayed steps, NOT as before: first at step {found['step']}, "
        f"{found['field']} was {found['before']!r} and is {found['now']!r}"
    )
