"""The shape of the learning-rate schedule, and which parameters have weight decay."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gsa import GSAForCausalLM, ModelConfig
from training.config import TrainingConfig
from training.engine.optimizer import parameter_groups, schedule_factor

BASE = TrainingConfig(max_steps=100, warmup_steps=10, learning_rate=1e-3, min_learning_rate=1e-4)


def test_warmup_rises_linearly_and_ends_at_one():
    factor = schedule_factor(BASE)
    assert [factor(step) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])


@pytest.mark.parametrize("kind, halfway", [("cosine", 0.55), ("linear", 0.55), ("wsd", 1.0)])
def test_decay_ends_at_the_minimum_and_stays(kind, halfway):
    factor = schedule_factor(replace(BASE, lr_scheduler=kind))
    assert factor(10) == pytest.approx(1.0)
    assert factor(55) == pytest.approx(halfway)
    assert factor(100) == factor(1000) == pytest.approx(0.1)
    values = [factor(step) for step in range(10, 101)]
    assert values == sorted(values, reverse=True)


def test_cosine_is_not_linear():
    cosine, linear = (schedule_factor(replace(BASE, lr_scheduler=kind)) for kind in ("cosine", "linear"))
    assert cosine(30) > linear(30) + 0.02


def test_wsd_decays_over_its_own_steps():
    factor = schedule_factor(replace(BASE, lr_scheduler="wsd", wsd_decay_steps=40))
    assert factor(60) == pytest.approx(1.0)
    assert factor(80) == pytest.approx(0.55)


def test_warmup_may_be_longer_than_the_run():
    factor = schedule_factor(replace(BASE, warmup_steps=1000))
    assert factor(99) == pytest.approx(0.1)


def test_groups_hold_every_parameter_once_and_only_matrices_decay():
    model = GSAForCausalLM(ModelConfig(d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ffn=64, vocab_size=64))
    groups = parameter_groups(model, replace(BASE, indexer_lr_multiplier=10.0))
    by_name = {group["name"]: group for group in groups}
    names = {id(p): n for n, p in model.named_parameters()}
    assert all(name == names[id(p)] for group in groups for name, p in group["params"])
    members = {g: {name for name, _ in group["params"]} for g, group in by_name.items()}
    assert sorted(n for ns in members.values() for n in ns) == sorted(names.values())
    assert all(".indexer." in n for g in ("indexer", "indexer_no_decay") for n in members[g])
    assert not any(".indexer." in n for g in ("decay", "no_decay") for n in members[g])
    assert all(p.ndim >= 2 for g in ("decay", "indexer") for _, p in by_name[g]["params"])
    assert any("log_alpha" in n for n in members["indexer_no_decay"])
    assert {g: (group["lr"], group["weight_decay"]) for g, group in by_name.items()} == {
        "decay": (1e-3, 0.1),
        "no_decay": (1e-3, 0.0),
        "indexer": (1e-2, 0.1),
        "indexer_no_decay": (1e-2, 0.0),
    }
