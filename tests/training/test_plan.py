"""training.plan and its cost model: memory against what autograd saves, the ranking, what is printed and written."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest
import torch
from support.launching import ROOT

from benchmarks.memory import BASE, case, counted
from training.config import load_config, plan_batch
from training.config.command import run_command
from training.config.deepspeed import resolve_ds_config
from training.plan import main
from training.planning import cost_model as cost
from training.planning.devices import DEVICES
from training.planning.options import DS_CONFIGS, Request, ds_config_for, ranked, why_not

CONFIGS = ROOT / "training" / "configs"
TUNED = CONFIGS / "pretrain_512m_low_memory.yaml"
UNTUNED = CONFIGS / "pretrain_512m_untuned.yaml"


def request_for(path=TUNED, *overrides, gpus=4, gpu="L40S", file=None) -> Request:
    cfg, device = load_config(path, overrides), DEVICES[gpu]
    file = DS_CONFIGS / (file or ds_config_for(2, False, gpus, device))
    return Request(cfg, path, plan_batch(cfg.training, gpus), device, file)


def given(*args, **kwargs):
    """(configuration, option of its own setting)."""
    request = request_for(*args, **kwargs)
    return request.cfg, request.option(request.setting(request.file))


@pytest.mark.parametrize("recomputed", ["none", "ffn", "block"])
@pytest.mark.parametrize(
    "config", [BASE, replace(BASE, sparse=False, n_kv_heads=8), replace(BASE, output_gate=False, adaptive_k="off")]
)
def test_predicted_activations_are_what_autograd_saves(config, recomputed):
    forward, known = case(replace(config, n_layers=2), 2, 256, torch.bfloat16, recomputed)
    with counted(known, recomputed) as counter:
        forward()
    predicted = cost.saved_bytes(replace(config, n_layers=2), 2, 256, 2, recomputed=recomputed, rows=0.25, fused=False)[
        "activations"
    ]
    assert predicted == pytest.approx(counter.bytes, rel=0.02)


def test_the_tuned_configuration_has_the_requested_batch_and_fits():
    cfg, tuned = given()
    assert (cfg.training.micro_batch_size, cfg.training.max_seq_len, tuned.setting.accumulation_steps) == (8, 2048, 8)
    assert tuned.setting.global_batch_size == 256 and tuned.setting.zero_stage == 2
    assert 20 < tuned.peak_gib < 40
    _, lean = given(TUNED, "training.gradient_checkpointing=true", "training.checkpointing_scope=block")
    assert lean.peak_gib < 8 and lean.time.seconds > tuned.time.seconds
    cfg, untuned = given(UNTUNED)
    assert (cfg.training.micro_batch_size, cfg.training.max_seq_len, untuned.setting.accumulation_steps) == (
        1,
        1024,
        64,
    )
    assert untuned.time.launch_bound and not tuned.time.launch_bound
    assert untuned.time.mfu < tuned.time.mfu / 2


def test_the_legacy_layer_would_not_fit():
    c = load_config(TUNED, []).model
    assert cost.naive_gather_bytes(c, 8, 2048, 2) / 2**30 == pytest.approx(
        32.0
    )  # only the keys and values of one layer
    s = cost.ParallelSetting(4, 2, 8, 8, "none")
    naive = cost.memory_bytes(c, 2048, s, bf16=True, rows=0.25, kernels="naive gather")
    assert naive["peak"] / 2**30 > DEVICES["L40S"].memory_gib


def test_zero_divides_what_it_shards_by_the_number_of_ranks():
    c = load_config(TUNED, []).model
    s = cost.ParallelSetting(1, 2, 8, 8, "none")
    alone, four = (cost.memory_bytes(c, 2048, replace(s, world_size=w), bf16=True, rows=0.25) for w in (1, 4))
    for part in ("gradients", "masters and moments", "optimizer step"):
        assert four[part] == pytest.approx(alone[part] / 4)
    assert four["weights"] == alone["weights"] == 2 * 511_899_370
    whole = cost.memory_bytes(c, 2048, replace(s, world_size=4, zero_stage=3), bf16=True, rows=0.25)
    assert whole["weights"] == pytest.approx(alone["weights"] / 4)
    offloaded = cost.memory_bytes(c, 2048, replace(s, offload=True), bf16=True, rows=0.25)
    assert offloaded["masters and moments"] == 0


def test_the_recommended_option_fits_is_fastest_and_has_the_same_global_batch():
    device = DEVICES["L40S"]
    options = ranked(request_for())
    assert {o.setting.global_batch_size for o in options} == {256}
    fitting = [o for o in options if o.fits(device)]
    assert options[: len(fitting)] == fitting and fitting[0].peak_gib <= 40
    assert fitting[0] == given()[1]  # a change would gain nothing
    assert fitting[0].time.seconds <= 1.02 * min(o.time.seconds for o in fitting)
    reasons = {why_not(o, fitting[0], device).split(" (")[0].split(": ")[-1] for o in options}
    assert {"recommended", "recomputation", "waiting for launches"} <= reasons
    assert any(reason.endswith("usable") for reason in reasons)


def test_a_slow_link_costs_communication_that_computation_hides():
    _, slow = given(gpu="L40S")
    assert slow.time.communication > 5 * given(gpu="H100")[1].time.communication
    assert slow.time.exposed < 0.2 * slow.time.communication


def test_communication_is_what_deepspeed_sends():
    """Counted by hand: an all-reduce takes two passes over the ring, a gather or a scatter one, each of 3/4 of the weights."""
    c, device = load_config(TUNED, []).model, DEVICES["A40"]
    one = 2 * 511_899_370 * 3 / 4 / (25e9 * 0.8)
    passes = {0: (0, 2), 1: (0, 3), 2: (2, 1), 3: (3, 0)}
    for stage, (per_micro, per_step) in passes.items():
        s = cost.ParallelSetting(4, stage, 8, 8, "none")
        found = cost.communication_seconds(c, s, device)
        assert found == pytest.approx((per_micro * one, per_step * one)), stage
        assert cost.communication_seconds(c, s, device, width=4) == pytest.approx([2 * x for x in found])
        assert cost.communication_seconds(c, replace(s, world_size=1), device) == (0, 0)


def test_float32_is_slower_and_twice_as_large_to_send():
    fast, slow = given(gpu="A100-80")[1], given(TUNED, "training.precision=fp32", gpu="A100-80", file="zero2.json")[1]
    assert slow.time.seconds > 8 * fast.time.seconds
    assert slow.time.communication == pytest.approx(2 * fast.time.communication)


def test_offloading_costs_time_and_frees_device_memory():
    on, off = (given(gpu="A40", file=f"zero2{kind}.json")[1] for kind in ("", "_offload"))
    assert off.peak_gib < on.peak_gib - 1.4
    # by hand: gradients are sent to the host in every micro-batch, weights come back once, and AdamW runs on the host
    moved = 9 * 2 * 511_899_370 / 4 / 20e9
    adam = 60 * 511_899_370 / 40e9
    assert off.time.seconds - on.time.seconds == pytest.approx(moved + adam, abs=0.02)


def test_offloading_is_considered_only_when_nothing_else_fits():
    small = replace(DEVICES["A40"], memory_gib=4.6)
    request = replace(request_for(), device=small)
    best = ranked(request)[0]
    assert best.setting.offload and best.fits(small)
    assert not any(o.setting.offload for o in ranked(request_for()))


def test_the_json_has_every_number(capsys):
    began = time.perf_counter()
    assert main(["--config", str(TUNED), "--num_gpus", "4", "--gpu", "A40", "--json"]) == 0
    assert time.perf_counter() - began < 5
    plan = json.loads(capsys.readouterr().out)
    assert plan["parameters"] == 511_899_370 == sum(plan["parameters_by_part"].values())
    assert {"peak_gib_per_gpu", "seconds_per_step", "mfu", "memory_gib", "checkpoint_gib", "days", "assumed"} <= set(
        plan
    )
    assert plan["days"] == pytest.approx(100_000 * plan["seconds_per_step"] / 86400)
    assert plan["recommended"] in [{k: v for k, v in a.items() if k != "why"} for a in plan["alternatives"]]


def test_the_report_compares_gsa_with_dense_attention(capsys):
    assert main(["--config", str(TUNED), "--gpu", "44.4,149.7,25"]) == 0
    out = capsys.readouterr().out
    for words in (
        "511,899,370",
        "GSA needs less arithmetic than dense attention from 768 tokens on",
        "GSA costs more than dense attention at every length",
        "predicted, not measured",
        "unknown bandwidth",
        "Whole run   100,000 steps",
    ):
        assert words in out, words
    assert main(["--config", str(TUNED), "model.sparse=false"]) == 0
    assert "This model has dense attention" in capsys.readouterr().out


def test_a_written_run_loads(tmp_path, capsys):
    argv = ["--config", str(UNTUNED), "--num_gpus", "4", "--gpu", "L40S", "--write", str(tmp_path / "plan")]
    assert main(argv) == 0
    cfg = load_config(tmp_path / "plan" / "plan.yaml", [])
    batch = plan_batch(cfg.training, 4)
    ds_config = resolve_ds_config(
        tmp_path / "plan" / "plan_ds_config.json", cfg, batch, tmp_path / "plan" / "plan.yaml"
    )
    assert batch.global_batch_size == 256 and plan_batch(cfg.training, 2).global_batch_size == 256
    assert cfg.training.micro_batch_size > 1 and ds_config["zero_optimization"]["stage"] in (1, 2, 3)
    assert run_command(main, argv) == 2  # nothing is overwritten
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    "gpu, gpus, file",
    [
        ("44.4,362,25,864", 4, None),
        ("79,989,370,3350", 4, None),
        ("79,989,370,3350", 1, None),
        ("4.6,150,25,700", 4, None),
        ("44.4,362,25,864", 4, "zero2_offload.json"),
    ],
)
def test_a_written_run_is_predicted_as_the_recommendation_was(gpu, gpus, file, tmp_path, capsys):
    argv = ["--config", str(TUNED), "--num_gpus", str(gpus), "--gpu", gpu, "--json"]
    argv += ["--deepspeed_config", str(DS_CONFIGS / file)] if file else []
    assert main([*argv, "--write", str(tmp_path / "plan")]) == 0
    recommended = json.loads(capsys.readouterr().out)["recommended"]
    again = ["--config", str(tmp_path / "plan" / "plan.yaml"), *argv[2:7]]
    assert main([*again, "--deepspeed_config", str(tmp_path / "plan" / "plan_ds_config.json")]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert {key: plan[key] for key in recommended} == recommended


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--gpu", "Voodoo2"], "is not known"),
        (["--num_gpus", "0"], "at least 1"),
        (["--num_gpus", "3"], "not a multiple"),
        (["training.nonsense=1"], "unknown key"),
        (["--gpu", "2,100,25", "--write", "x"], "nothing fits"),
        (["--write", "/proc/x"], "--write /proc/x: "),
        (["--write", "/etc/hosts"], "--write /etc/hosts: "),
        (["--gpu", "B200", "training.precision=fp32"], "the peak of B200 at training.precision=fp32 is not known"),
    ],
)
def test_bad_input_is_refused(argv, words, capsys):
    assert run_command(main, ["--config", str(TUNED), *argv]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and words in err


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("pretrain_*.yaml")), ids=lambda p: p.stem)
def test_every_pretraining_configuration_fits_the_gpus_that_its_comment_names(path, capsys):
    gpus, gpu = {
        "pretrain_125m": ("1", "A40"),
        "pretrain_1b": ("4", "A100-80"),
        "pretrain_512m_32k": ("4", "A100-80"),
    }.get(path.stem, ("4", "A40"))
    assert main(["--config", str(path), "--num_gpus", gpus, "--gpu", gpu, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["peak_gib_per_gpu"] <= 0.9 * DEVICES[gpu].memory_gib


def test_the_earlier_spelling_of_num_gpus_is_accepted_and_hidden(capsys):
    assert main(["--config", str(TUNED), "--gpus", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["gpus"] == 2
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = capsys.readouterr().out
    assert "--num_gpus" in printed and "--gpus" not in printed
