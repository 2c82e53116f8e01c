"""The passes of a step: the host never waits for the device once per micro-batch, and time is counted by phase."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.launching import ROOT, rank_environment

from training.config import BatchPlan, TrainingConfig
from training.loop import step as step_module
from training.loop.step import forward_backward, indexer_rows
from training.observe.step_clock import StepClock


def waits(config, *argv: str) -> dict[str, dict[str, int]]:
    done = subprocess.run(
        [sys.executable, "tests/support/count_waits.py", str(config), *argv],
        cwd=ROOT,
        env=rank_environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("WAITS "))[6:])


def test_the_host_waits_once_per_step_whatever_the_accumulation(tiny_yaml):
    found = waits(tiny_yaml)
    for stage in "123":
        one, four = found[f"{stage}/1"], found[f"{stage}/4"]
        assert one["numbers read"] == four["numbers read"] < 20, stage  # DeepSpeed's norm and clipping
        assert "device waited for" not in one and "device waited for" not in four, stage
    for way in ("computing waits for reducing", "reducing waits for computing"):
        assert found["2/4"][way] >= 4  # instead of the wait that DeepSpeed has there
    unpatched = waits(tiny_yaml, "--keep_synchronize")
    assert (unpatched["2/1"]["device waited for"], unpatched["2/4"]["device waited for"]) == (1, 4)


class FakeEngine:
    """An engine whose forward, backward and update take 0.01 s each."""

    device = torch.device("cpu")
    module = SimpleNamespace(layers=[None])

    def forward(self, *args, **kwargs):
        time.sleep(0.01)
        one = torch.ones(())
        return SimpleNamespace(loss=one, indexer_loss=one, n_selected=torch.ones(1), selection_stats=torch.ones(1, 2))

    def backward(self, loss) -> None:
        time.sleep(0.01)

    def step(self, drop: bool) -> None:
        time.sleep(0.01)


def test_time_after_the_last_micro_batch_counts_as_other_and_not_as_update():
    batch = SimpleNamespace(tokens=None, targets=None, doc_start=torch.zeros(1, 8))
    batch.to = lambda *args, **kwargs: batch
    phases, clock = [], StepClock(torch.device("cpu"))

    def phase(name: str) -> None:
        phases.append(name)
        clock.lap(name)

    cfg = TrainingConfig(max_seq_len=8)
    plan = BatchPlan(1, 2, 2, 1)
    forward_backward(
        FakeEngine(), iter([batch, batch]), cfg, plan, step=0, n_targets=1, probing=False, measuring=False, phase=phase
    )
    time.sleep(2)  # what the trainer does with the results
    seconds = clock.read()
    assert phases == [*["data", "forward", "backward", "step"] * 2, "other"]
    assert seconds["other"] > 1.9 and seconds["step"] < 1.0


def test_drawn_rows_are_sorted_differ_between_steps_and_are_the_same_when_drawn_again():
    rows = [indexer_rows(7, step, 64, 0.25) for step in (0, 1)]
    assert all(len(r) == 16 and torch.equal(r, r.unique()) and 0 <= r[0] and r[-1] < 64 for r in rows)
    assert not torch.equal(*rows) and torch.equal(rows[0], indexer_rows(7, 0, 64, 0.25))
    counts = np.bincount(np.concatenate([indexer_rows(7, step, 64, 0.25).numpy() for step in range(400)]), minlength=64)
    assert counts.min() > 60 and counts.max() < 145  # 100 on average


def test_sums_over_ranks_keep_their_shapes(monkeypatch):
    monkeypatch.setattr(step_module.dist, "all_reduce", lambda flat: flat.mul_(2))
    parts = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(True), "c": torch.tensor([5], dtype=torch.int32)}
    found = step_module.sum_over_ranks(parts)
    assert all(torch.equal(found[name], part.double() * 2) for name, part in parts.items())
    assert found["a"].shape == (2, 3) and found["b"].shape == () and found["c"].shape == (1,)


@pytest.mark.parametrize("share, count", [(1.0, 32), (0.001, 1), (0.5, 16)])
def test_a_share_of_the_rows_is_at_least_one_row(share, count):
    assert len(indexer_rows(0, 0, 32, share)) == count
