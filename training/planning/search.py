"""Which trials to run, in which order, and which of them is best. Running one is the caller's part (`Attempt`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gsa.model import Recomputed
from training.planning.outcome import Outcome

NOISE = 0.02
"""Relative difference of step times that decides nothing; neither does one below the trials' own spread."""

LEAST_MEMORY_FIRST: tuple[Recomputed, ...] = ("block", "ffn", "none")
"""A micro-batch that runs out of memory under one of these kinds also does under the next."""


@dataclass(frozen=True)
class TrialSetting:
    """A ds_config and a kind of activation checkpointing; the micro-batch grows within it."""

    ds_config: Path
    recomputed: Recomputed


@dataclass(frozen=True)
class Trial:
    """One trial that has ended. slower: a step takes longer than with the setting's previous, smaller micro-batch."""

    setting: TrialSetting
    micro_batch_size: int
    outcome: Outcome
    slower: bool = False


Attempt = Callable[[TrialSetting, int], Outcome]
"""Runs a setting with a micro-batch size."""


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def search(
    ds_configs: Sequence[Path], kinds: Sequence[Recomputed], sizes: Sequence[int], attempt: Attempt
) -> Iterator[Trial]:
    """Yields trials as they finish, one ds_config after the other.

    kinds: of activation checkpointing, the one that takes least memory first. A size that ran out of memory under one
    kind is not tried under the next ones. sizes: micro-batch sizes in ascending order.
    """
    for path in ds_configs:
        fitting = list(sizes)
        for number, kind in enumerate(kinds):
            for trial in grow(TrialSetting(path, kind), fitting, attempt, to_the_limit=number == 0):
                yield trial
                if trial.outcome.verdict == "out_of_memory":
                    fitting = [size for size in fitting if size < trial.micro_batch_size]


def grow(setting: TrialSetting, sizes: Sequence[int], attempt: Attempt, *, to_the_limit: bool) -> Iterator[Trial]:
    """Doubles the micro-batch until memory runs out, then bisects between the last two sizes.

    No size at or above one that ran out of memory is tried. A trial that fails for another reason ends the growth.
    Unless to_the_limit, so does a step that takes longer than the one before.
    """
    low, high, before = -1, len(sizes), None  # sizes[low] fits, sizes[high] does not
    while low + 1 < high:
        at = (low + high) // 2 if high < len(sizes) else _doubled(sizes, low)
        outcome = attempt(setting, sizes[at])
        longer = outcome.verdict == "ok" and before is not None and is_slower(outcome, before)
        yield Trial(setting, sizes[at], outcome, longer)
        if outcome.verdict == "failed" or (longer and not to_the_limit):
            return
        if outcome.verdict == "out_of_memory":
            high = at
        else:
            low, before = at, outcome


def most_trials(ds_configs: Sequence[Path], kinds: Sequence[Recomputed], sizes: Sequence[int]) -> int:
    """The most trials that a search can take, whichever size is the first that runs out of memory."""

    def trials(first_too_large: int) -> int:
        def attempt(_: TrialSetting, size: int) -> Outcome:
            fits = size < first_too_large
            return Outcome("ok", step_seconds=(1.0,)) if fits else Outcome("out_of_memory")

        return sum(1 for _ in grow(TrialSetting(Path(), "none"), sizes, attempt, to_the_limit=True))

    return len(ds_configs) * len(kinds) * max(trials(limit) for limit in (*sizes, math.inf))


def _doubled(sizes: Sequence[int], low: int) -> int:
    """The index of the smallest size that is at least twice sizes[low], or of the last size when there is none."""
    if low < 0:
        return 0
    return next((i for i, size in enumerate(sizes) if size >= 2 * sizes[low]), len(sizes) - 1)


def is_slower(later: Outcome, earlier: Outcome) -> bool:
    """Whether a step of `later` takes longer than one of `earlier` by more than noise."""
    noise = max(NOISE * earlier.seconds, later.spread + earlier.spread)
    return later.seconds - earlier.seconds > noise


def fastest(trials: Sequence[Trial]) -> Trial | None:
    """The fastest trial; of those within NOISE of it, the one with the lowest peak of memory. None when none ran."""
    fitting = [t for t in trials if t.outcome.verdict == "ok"]
    if not fitting:
        return None
    limit = min(t.outcome.seconds for t in fitting) * (1 + NOISE)
    return min((t for t in fitting if t.outcome.seconds <= limit), key=lambda t: t.outcome.peak_gib)


def largest(trials: Sequence[Trial]) -> Trial | None:
    """The trial with the largest micro-batch that fits; of several settings, the fastest. None when none ran."""
    fitting = [t for t in trials if t.outcome.verdict == "ok"]
    return max(fitting, key=lambda t: (t.micro_batch_size, -t.outcome.seconds), default=None)
