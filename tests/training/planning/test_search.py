"""The order of trials, and which of them is recommended."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.planning.outcome import Outcome
from training.planning.search import LEAST_MEMORY_FIRST, Trial, TrialSetting, divisors, fastest, largest, search

ZERO2, ZERO3 = Path("zero2.json"), Path("zero3.json")


def ran(seconds: float, peak_gib: float = 1.0, *, spread: float = 0.0) -> Outcome:
    return Outcome(
        "ok", None, (seconds - spread, seconds - spread, seconds, seconds + spread, seconds + spread), peak_gib
    )


NO_MEMORY, FAILED = Outcome("out_of_memory", "no room"), Outcome("failed", "a bug")


def tried(sizes, attempt: Callable[[TrialSetting, int], Outcome], kinds=("none",), ds_configs=(ZERO2,)) -> list[tuple]:
    trials = list(search(ds_configs, kinds, sizes, attempt))
    return [(t.setting.ds_config.stem, t.setting.recomputed, t.micro_batch_size) for t in trials]


def sizes_tried(sizes, attempt: Callable[[int], Outcome]) -> list[int]:
    return [size for *_, size in tried(sizes, lambda setting, size: attempt(size))]


@pytest.mark.parametrize(
    "total, fitting, order",
    [
        (16, 16, [1, 2, 4, 8, 16]),
        (24, 11, [1, 2, 4, 8, 24, 12]),  # 12 is the only divisor between
        (48, 13, [1, 2, 4, 8, 16, 12]),
        (60, 7, [1, 2, 4, 10, 5, 6]),
        (17, 16, [1, 17]),
        (16, 0, [1]),
        (1, 1, [1]),
    ],
)
def test_the_micro_batch_doubles_until_memory_runs_out_then_tries_divisors_between(total, fitting, order):
    assert sizes_tried(divisors(total), lambda size: ran(1 / size) if size <= fitting else NO_MEMORY) == order


@given(total=st.integers(1, 500), fitting=st.integers(0, 600))
def test_the_largest_divisor_that_fits_is_found_and_nothing_above_a_size_that_did_not_fit_is_tried(total, fitting):
    failed = []

    def attempt(size: int) -> Outcome:
        assert all(size < too_large for too_large in failed)
        if size > fitting:
            failed.append(size)
        return NO_MEMORY if size > fitting else ran(1 / size)

    order = sizes_tried(divisors(total), attempt)
    assert len(set(order)) == len(order)
    assert max((s for s in order if s <= fitting), default=0) == max(
        (d for d in divisors(total) if d <= fitting), default=0
    )


def test_growth_ends_when_a_step_takes_longer_by_more_than_noise():
    seconds = {1: 4.0, 2: 3.0, 4: 3.03, 8: 3.5, 16: 1.0}
    found = tried(divisors(16), lambda setting, size: ran(seconds[size]), ("block", "none"))
    # under the first kind, which takes least memory, it goes on to find the largest size that fits
    assert found == [("zero2", "block", s) for s in (1, 2, 4, 8, 16)] + [("zero2", "none", s) for s in (1, 2, 4, 8)]
    found = tried(divisors(16), lambda setting, size: ran(seconds[size], spread=0.3), ("block", "none"))
    assert [size for _, kind, size in found if kind == "none"] == [1, 2, 4, 8, 16]


@given(total=st.integers(1, 300), fitting=st.integers(1, 300), dearer=st.integers(0, 9))
def test_the_largest_that_fits_is_found_even_where_larger_ones_are_slower(total, fitting, dearer):
    trials = list(
        search(
            [ZERO2],
            ("block", "none"),
            divisors(total),
            lambda setting, size: (
                ran(1.0 + dearer * size)
                if size <= fitting * (1 if setting.recomputed == "block" else 0.5)
                else NO_MEMORY
            ),
        )
    )
    assert largest(trials).micro_batch_size == max(d for d in divisors(total) if d <= fitting)


def test_a_size_that_ran_out_of_memory_is_not_tried_where_less_is_recomputed_but_is_under_another_zero_stage():
    room = {"block": 8, "ffn": 4, "none": 1}

    def attempt(setting: TrialSetting, size: int) -> Outcome:
        return ran(1 / size) if size <= room[setting.recomputed] else NO_MEMORY

    one = [
        ("block", 1),
        ("block", 2),
        ("block", 4),
        ("block", 8),
        ("block", 16),
        ("ffn", 1),
        ("ffn", 2),
        ("ffn", 4),
        ("ffn", 8),
        ("none", 1),
        ("none", 2),
    ]
    order = tried(divisors(16), attempt, LEAST_MEMORY_FIRST, (ZERO2, ZERO3))
    assert order == [("zero2", *pair) for pair in one] + [("zero3", *pair) for pair in one]


def test_a_failure_ends_its_setting_and_no_other():
    def attempt(setting: TrialSetting, size: int) -> Outcome:
        return FAILED if setting == TrialSetting(ZERO2, "block") and size == 2 else ran(1 / size)

    assert tried([1, 2, 4], attempt, ("block", "none")) == [
        ("zero2", "block", 1),
        ("zero2", "block", 2),
        ("zero2", "none", 1),
        ("zero2", "none", 2),
        ("zero2", "none", 4),
    ]


def test_the_fastest_wins_and_among_equally_fast_trials_the_one_with_the_lowest_peak():
    fast, equal, slow = (
        Trial(TrialSetting(ZERO2, kind), size, outcome)
        for kind, size, outcome in (
            ("none", 4, ran(1.0, 9.0)),
            ("block", 8, ran(1.01, 3.0)),
            ("block", 16, ran(1.2, 2.0)),
        )
    )
    lost = Trial(TrialSetting(ZERO2, "none"), 32, NO_MEMORY)
    assert fastest([fast, slow, lost]) is fast
    assert fastest([fast, equal, slow, lost]) is equal
    assert largest([fast, equal, slow, lost]) is slow
    assert fastest([lost]) is None
