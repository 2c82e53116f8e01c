"""TensorBoard files in the run's folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from training.observe.tracking.mirror import Fields


class TensorboardSink:
    """Event files of the same steps; text is left out. Steps trained again replace what was shown of them."""

    name = "TensorBoard"
    advice = "training goes on, metrics.jsonl has every row"

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._make, self._folder, self._step = SummaryWriter, folder, step

    def open(self, guard: Callable[[], None]) -> int:
        known = any(self._folder.glob("events.*"))
        # of a killed run the last step before the checkpoint may be missing: it was waiting for its evaluation
        self._last = max(0, self._step - 1) if known else 0
        self._writer = self._make(str(self._folder), purge_step=self._last + 1 if known else None)
        return self._last

    def write(self, step: int, fields: Fields) -> None:
        if step <= self._last:  # a rollback
            self._writer.close()
            self._writer = self._make(str(self._folder), purge_step=step)
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
