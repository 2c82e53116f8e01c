"""Where a run stands: the one owner of its position in steps and in the data."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from gsa.checkpoint.state import RunState
from training.data.loader import past


@dataclass
class Progress:
    """The fields of RunState that training changes, under the same names; RunState documents each.

    To add one, declare it here and in RunState: `from_state` and `to_state` go by the names of the fields.
    """

    step: int = 0
    samples_consumed: int = 0
    tokens_seen: int = 0
    epoch_offset: float = 0.0
    indexer_start: int = 0
    decided: dict[str, Any] = field(default_factory=dict)
    skipped: list[list[int]] = field(default_factory=list)
    earlier_texts: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def from_state(cls, state: RunState) -> Progress:
        return cls(**{f.name: copy.deepcopy(getattr(state, f.name)) for f in fields(cls)})

    def to_state(self, **others: Any) -> RunState:
        """The state to save. others: the fields of RunState that are not part of the position."""
        return RunState(**asdict(self), **others)

    def next_sample(self, count: int) -> int:
        """The first window of the next step, whose batch has `count`: a batch that was ruled out is passed over."""
        return past(self.skipped, self.samples_consumed, count)

    def advance(self, first: int, count: int, window_tokens: int) -> None:
        """Counts a step that trained on `count` windows from `first` on, each of `window_tokens` positions."""
        self.step += 1
        self.samples_consumed = first + count
        self.tokens_seen += count * window_tokens

    @property
    def rollbacks(self) -> int:
        """Spans of samples that the run has ruled out, in this text and in earlier ones."""
        return len(self.skipped) + sum(len(text["skipped"]) for text in self.earlier_texts)

    def planned_samples(self, max_steps: int, count: int) -> int:
        """The position in the present text after max_steps steps of `count` windows."""
        return self.samples_consumed + max(0, max_steps - self.step) * count

    def rule_out(self, spans: list[list[int]]) -> None:
        """Adds [first, count] spans of samples that no step may train on again."""
        self.skipped = sorted([first, count] for first, count in {tuple(span) for span in [*self.skipped, *spans]})
