"""TensorBoard as a sink: event files in the run's folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from training.observe.tracking.mirror import Fields


class TensorboardSink:
    """Writes the numbers of each step; text is left out. A step that is trained again replaces the earlier one.

    step: the step that the launch resumes from, 0 for a new run.
    """

    name = "TensorBoard"
    advice = "training goes on, metrics.jsonl has every row"

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer_class, self._folder, self._step = SummaryWriter, folder, step

    def open(self, renew_exit_handler: Callable[[], None]) -> int:
        has_events = any(self._folder.glob("events.*"))
        # a killed run may lack the last step before its checkpoint: the mirror held it until the next step began
        self._last = max(0, self._step - 1) if has_events else 0
        self._writer = self._writer_class(str(self._folder), purge_step=self._last + 1 if has_events else None)
        return self._last

    def write(self, step: int, fields: Fields) -> None:
        if step <= self._last:  # trained again after a rollback
            self._writer.close()
            self._writer = self._writer_class(str(self._folder), purge_step=step)
        when = fields.get("_timestamp")
        for name, value in fields.items():
            if isinstance(value, int | float) and name not in ("step", "_timestamp"):
                self._writer.add_scalar(name, value, step, walltime=when)
        self._writer.flush()
        self._last = step

    def close(self, exit_code: int) -> None:
        self._writer.close()

    def abandon(self) -> None:
        pass
