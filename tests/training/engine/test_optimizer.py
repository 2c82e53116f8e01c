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


def test_a_wsd_decay_of_one_step_decays():
    wsd = replace(BASE, lr_scheduler="wsd", min_learning_rate=1e-4)
    one = schedule_factor(replace(wsd, wsd_decay_steps=1))
    assert [one(step) for step in (10, 98, 99, 100)] == pytest.approx([1.0, 1.0, 0.1, 0.1])
    two = schedule_factor(replace(wsd, wsd_decay_steps=2))
    assert [two(step) for step in (97, 98, 99, 100)] == pytest.approx([1.0, 1.0, 0.55, 0.1])
    for short in (replace(wsd, max_steps=4, warmup_steps=0), replace(wsd, max_steps=12, warmup_steps=11)):
        factor = schedule_factor(short)
        assert [factor(short.max_steps - 2), factor(short.max_steps - 1)] == pytest.approx([1.0, 0.1])
    constant = schedule_factor(replace(wsd, wsd_decay_steps=0))
    assert {constant(step) for step in range(10, 101)} == {1.0}


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd"])
def test_the_last_update_has_the_rate_that_help_names(kind):
    """min_learning_rate's line in --help: the share of the way from the peak that is left after n decaying steps."""
    n = 90 if kind != "wsd" else 20
    left = {"cosine": (1.57 / n) ** 2, "linear": 1 / n, "wsd": 1 / n}[kind]
    last = schedule_factor(replace(BASE, lr_scheduler=kind))(BASE.max_steps - 1)
    assert (last - 0.1) / 0.9 == pytest.approx(left, rel=1e-2)


def test_schedule_steps_takes_the_place_of_max_steps():
    for kind in ("cosine", "linear", "wsd"):
        cfg = replace(BASE, lr_scheduler=kind)
        short, long = schedule_factor(cfg), schedule_factor(replace(cfg, max_steps=1000, schedule_steps=100))
        assert [short(step) for step in range(300)] == [long(step) for step in range(300)]


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
