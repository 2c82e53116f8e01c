"""Progress owns the position of a run, and spike decisions follow from rows alone."""

from __future__ import annotations

import signal
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest

from gsa.checkpoint.state import RunState
from training.config import TrainingConfig
from training.loop.progress import Progress
from training.loop.spike_policy import MAX_LOST_IN_A_ROW, MAX_ROLLBACKS, SpikePolicy, is_finite
from training.record.spike_score import KNOWN

STATE = RunState(
    step=7,
    epoch=0.5,
    samples_consumed=56,
    tokens_seen=448,
    config={},
    data_fingerprint="f",
    tracking_id=None,
    stage="sparse",
    versions={},
    world_size=2,
    zero_stage=2,
    created="2026-01-01",
    epoch_offset=1.5,
    indexer_start=3,
    decided={"model.d_ffn": 8},
    skipped=[[8, 4]],
)


def test_a_run_state_is_the_same_after_conversion_to_progress_and_back():
    progress = Progress.from_state(STATE)
    own = {f.name for f in fields(Progress)}
    others = {f.name: getattr(STATE, f.name) for f in fields(RunState) if f.name not in own}
    assert progress.to_state(**others) == STATE


def test_each_field_of_progress_is_one_of_the_run_state_and_defaults_to_a_new_run():
    assert {f.name for f in fields(Progress)} <= {f.name for f in fields(RunState)}
    assert Progress() == Progress(0, 0, 0, 0.0, 0, {}, [], [])


def test_progress_shares_nothing_with_the_state_it_came_from():
    progress = Progress.from_state(STATE)
    progress.rule_out([[16, 4]])
    progress.decided["x"] = 1
    assert STATE.skipped == [[8, 4]] and STATE.decided == {"model.d_ffn": 8}


def test_the_next_step_passes_over_samples_that_are_ruled_out():
    progress = Progress(samples_consumed=4)
    progress.rule_out([[8, 4], [8, 4], [4, 4]])
    assert progress.skipped == [[4, 4], [8, 4]]
    first = progress.next_sample(4)
    progress.advance(first, 4, window_tokens=32)
    assert (first, progress.step, progress.samples_consumed, progress.tokens_seen) == (12, 1, 16, 128)


NAN = float("nan")
CALM = {"loss": 1.0, "indexer_loss": 0.1, "grad_norm": 1.0, "spike_score": 0.0}
SPIKE = {**CALM, "loss": 9.0, "spike_score": 50.0}
LOST = {**CALM, "loss": NAN, "spike_score": 0.0}
INFINITE_GRADIENT = {**CALM, "grad_norm": float("inf")}


@pytest.mark.parametrize(
    "on_spike, row, dropped, rollbacks, action",
    [
        ("log", CALM, False, 0, "continue"),
        ("log", SPIKE, False, 0, "log"),
        ("log", LOST, False, 0, "stop"),
        ("skip", CALM, False, 0, "continue"),
        ("skip", SPIKE, True, 0, "skip"),
        ("skip", LOST, True, 0, "skip"),
        ("skip", INFINITE_GRADIENT, False, 0, "stop"),
        ("rollback", CALM, False, 0, "continue"),
        ("rollback", SPIKE, False, 0, "rollback"),
        ("rollback", LOST, False, 0, "rollback"),
        ("rollback", SPIKE, False, MAX_ROLLBACKS, "log"),
        ("rollback", LOST, False, MAX_ROLLBACKS, "stop"),
    ],
)
def test_the_action_after_a_step(on_spike, row, dropped, rollbacks, action):
    policy = SpikePolicy(replace(TrainingConfig(), on_spike=on_spike))
    assert policy.decide(row, dropped=dropped, rollbacks=rollbacks) == action


def test_skip_stops_the_run_after_consecutive_non_finite_steps():
    policy = SpikePolicy(replace(TrainingConfig(), on_spike="skip"))
    actions = [policy.decide(LOST, dropped=True, rollbacks=0) for _ in range(MAX_LOST_IN_A_ROW)]
    assert actions == ["skip"] * (MAX_LOST_IN_A_ROW - 1) + ["stop"]
    policy.decide(CALM, dropped=False, rollbacks=0)
    assert policy.lost_in_a_row == 0


def test_skip_drops_the_update_of_a_spike_and_scores_count_finite_losses_only():
    losses = [1.0 + 0.01 * (n % 3) for n in range(KNOWN)]
    policy = SpikePolicy(replace(TrainingConfig(), on_spike="skip"), losses)
    assert policy.drops_updates and policy.drops(5.0, 0.1) and policy.drops(NAN, 0.1) and policy.drops(1.0, NAN)
    assert not policy.drops(1.01, 0.1)
    before = policy.score(1.05)
    policy.accept(NAN)
    assert policy.score(1.05) == before
    policy.accept(5.0)
    assert policy.score(1.05) != before
    assert not SpikePolicy(replace(TrainingConfig(), on_spike="log")).drops_updates


def test_rows_read_back_hold_non_finite_numbers_as_strings():
    assert is_finite(CALM) and not is_finite({**CALM, "grad_norm": "inf"}) and not is_finite(LOST)


def test_a_stop_signal_in_a_step_that_is_rolled_back_ends_the_run_there():
    """The scheduler's patience is not spent on steps after it."""
    from training.loop.trainer import Step, Trainer

    trainer, steps = Trainer.__new__(Trainer), []
    trainer.spec, trainer.progress = SimpleNamespace(last_step=10), Progress(step=3)
    trainer.saver = SimpleNamespace(saved_at=3)
    trainer.stop, trainer.engine = SimpleNamespace(listen=lambda: None), SimpleNamespace(train=lambda: None)
    trainer._open_loader = trainer._finish_save = lambda: None
    trainer.loader, trainer._continued = SimpleNamespace(close=lambda: None), False
    trainer._train_step = lambda: steps.append(1) or Step({}, "rollback", [0, 4], signal.SIGTERM)
    trainer._roll_back = lambda step: True
    trainer._finish = lambda stop_signal: stop_signal
    assert trainer.train() == signal.SIGTERM and len(steps) == 1
