"""The doctor finds each cost of a run by its arithmetic, and finds none in a healthy run."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support.launching import ROOT, clean_environment, rank_environment

from training import config as run_config
from training.config.command import run_command
from training.doctor import main
from training.record import reader
from training.reporting import summary as summaries
from training.reporting.diagnosis import CHECKS, diagnose

STEPS = 60

# a row as the trainer writes it, on 4 L40S: micro-batch 8 x 2048, accumulation 8, gradient checkpointing
HEALTHY = {
    "loss": 3.1,
    "indexer_loss": 0.2,
    "grad_norm": 0.9,
    "lr": 3e-4,
    "lr_indexer": 3e-3,
    "stage": "sparse",
    "selected_k": 480.0,
    "seconds": 7.0,
    "seconds_data": 0.01,
    "seconds_forward": 2.1,
    "seconds_backward": 4.5,
    "seconds_step": 0.3,
    "seconds_other": 0.09,
    "seconds_save": 0.0,
    "seconds_eval": 0.0,
    "tokens_per_s": 74898.0,
    "tokens_per_s_per_device": 18724.0,
    "mfu": 0.42,
    "rank_seconds_slowest": 2.13,
    "rank_seconds_median": 2.11,
    "allocator_retries": 0,
    "memory_gib": 36.0,
}
# at its power limit, as a busy L40S is, and far from its highest clock
HEALTHY_GPU = {
    "utilisation": 0.97,
    "power_w": 345.0,
    "power_limit_w": 350.0,
    "clock_mhz": 1905.0,
    "max_clock_mhz": 2520.0,
    "memory_gib": 38.0,
    "temperature_c": 66.0,
    "throttled": 0.8,
    "throttle_reasons": "power cap",
}
ZERO = {"stage": 2, "overlap_comm": True}
MODEL = {
    "d_model": 1024,
    "n_layers": 26,
    "n_heads": 16,
    "n_kv_heads": 4,
    "d_ffn": 3072,
    "vocab_size": 151936,
    "d_indexer": 64,
    "n_indexer_heads": 4,
}


def row(step, changes, gpus):
    return {"step": step, **HEALTHY, **changes, "time": 1.8e9 + 7 * step} | {
        f"gpu/{i}/{field}": value
        for i in range(4)
        for field, value in {**HEALTHY_GPU, **gpus.get(i, {}), **gpus.get("all", {})}.items()
    }


def a_run(
    folder,
    changes=None,
    *,
    gpus=None,
    training=None,
    data=None,
    zero=None,
    micro=8,
    accumulation=8,
    backend="triton",
    rows=None,
    events=(),
):
    """The folder of a run of STEPS steps, healthy but for the changes. gpus: by index, or "all"."""
    folder.mkdir(exist_ok=True)
    cfg = run_config.to_plain(run_config.RunConfig())
    cfg["model"] |= MODEL
    cfg["training"] |= {"gradient_checkpointing": True, **(training or {})}
    cfg["data"] |= {"num_workers": 2, **(data or {})}
    (folder / "config.yaml").write_text(yaml.safe_dump(cfg))
    (folder / "ds_config.json").write_text(
        json.dumps(
            {
                "train_micro_batch_size_per_gpu": micro,
                "gradient_accumulation_steps": accumulation,
                "zero_optimization": zero or ZERO,
            }
        )
    )
    (folder / "env.json").write_text(json.dumps({"devices": ["NVIDIA L40S"] * 4, "cpus": 64}))
    (folder / "run.json").write_text(
        json.dumps({"status": "running", "reason": None, "world_size": 4, "zero_stage": 2, "backend": backend})
    )
    start = [
        {"event": "start", "step": 0, "world_size": 4, "zero_stage": 2},
        {
            "event": "device",
            "step": 0,
            "name": "NVIDIA L40S",
            "world_size": 4,
            "peak_tflops": 362.0,
            "peak_source": "table",
            "memory_gib": 44.4,
        },
    ]
    if rows is None:
        rows = [row(step, changes or {}, gpus or {}) for step in range(1, STEPS + 1)]
    lines = [json.dumps(one) for one in (*start, *rows, *events)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def read(folder, last=None):
    return summaries.summarise(reader.read(folder, newest=summaries.MOST_STEPS), last)


def names(folder, last=None):
    return [verdict.name for verdict in diagnose(read(folder, last)[0])]


def the_verdict(folder):
    """The only verdict on the run."""
    verdicts = diagnose(read(folder)[0])
    assert len(verdicts) == 1, [v.name for v in verdicts]
    return verdicts[0]


# -- a healthy run ------------------------------------------------------------------------------------


def test_a_tuned_run_has_nothing_to_gain(tmp_path, capsys):
    assert main([str(a_run(tmp_path / "run"))]) == 0
    out = capsys.readouterr().out
    assert "1. nothing to gain\n" in out and "94 % of the time; MFU is 42 %" in out
    assert "4 x NVIDIA L40S, ZeRO 2, micro-batch 8 x 8" in out


@pytest.mark.parametrize(
    "changes, gpus, training",
    [
        ({"seconds_backward": 4.7, "seconds_forward": 1.9}, {}, {"gradient_checkpointing": False}),
        ({"seconds_data": 0.035}, {}, {}),  # 0.5 %
        ({"allocator_retries": 0, "rank_seconds_slowest": 2.25}, {}, {}),
        ({}, {0: {"clock_mhz": 1800.0}}, {}),  # cards differ by 5 %
        ({}, {"all": {"utilisation": 0.90}}, {}),
        ({}, {"all": {"throttled": 0.05, "throttle_reasons": "hardware thermal"}}, {}),  # for a moment
    ],
)
def test_costs_that_every_run_has_are_not_reported(tmp_path, changes, gpus, training):
    assert names(a_run(tmp_path / "run", changes, gpus=gpus, training=training)) == ["nothing to gain"]


def test_a_rare_save_or_evaluation_is_not_reported(tmp_path):
    rows = [row(step, {}, {}) for step in range(1, STEPS + 1)]
    rows[40] |= {"seconds_save": 2.0, "seconds_eval": 12.0}
    assert names(a_run(tmp_path / "run", rows=rows)) == ["nothing to gain"]


def test_a_low_mfu_without_a_known_cause_asks_for_a_profiler(tmp_path, capsys):
    main([str(a_run(tmp_path / "run", {"mfu": 0.25}))])
    out = capsys.readouterr().out
    assert "nothing to gain" in out and "change: a profiler: the goal is 40 %" in out


# -- each cost ----------------------------------------------------------------------------------------


def slower(seconds, **changes):
    """The same computation in a step of this many seconds: its MFU is lower."""
    return {"seconds": seconds, "mfu": 0.42 * 7 / seconds, **changes}


def busy(seconds):
    return {"all": {"utilisation": 0.97 * 7 / seconds}}


def test_data_bound(tmp_path):
    found = the_verdict(a_run(tmp_path / "run", slower(12.5, seconds_data=5.5), gpus=busy(12.5)))
    assert found.name == "data-bound" and found.gain == pytest.approx(12.5 / 7)  # 44 % of the time
    assert "44 % of the time was waiting for data" in found.finding
    assert found.turn[0].startswith("data.num_workers=4 (now 2)")


def test_data_that_is_late_in_some_steps_counts_too(tmp_path):
    rows = [row(step, {}, {}) for step in range(1, STEPS + 1)]
    for late in rows[3::10]:
        late |= {"seconds": 17.0, "seconds_data": 10.01}
    found = the_verdict(a_run(tmp_path / "run", rows=rows, data={"num_workers": 0}))
    assert found.name == "data-bound" and found.gain == pytest.approx(459 / (459 - 60.57))  # seconds
    assert found.turn[0].startswith("data.num_workers=1 (now 0)")


def test_launch_bound(tmp_path):
    slow = slower(14.0, seconds_forward=4.5, seconds_backward=9.0)
    folder = a_run(tmp_path / "run", slow, gpus=busy(14.0), micro=1, accumulation=64)
    found = the_verdict(folder)  # there is no memory for a larger micro-batch, so it is not too small
    # idle for 1 - 0.485 of the time, less 0.8 % of data and other
    assert found.name == "launch-bound" and found.gain == pytest.approx(1 / (0.485 + 0.1 / 14), rel=1e-3)
    assert found.turn == ("training.compile=true: fewer, larger kernels",)


def test_launch_bound_names_only_settings_that_can_still_change(tmp_path):
    slow = slower(14.0, seconds_forward=4.5, seconds_backward=9.0)
    folder = a_run(tmp_path / "run", slow, gpus=busy(14.0), backend="chunked", training={"compile": True})
    turn = next(v.turn for v in diagnose(read(folder)[0]) if v.name == "launch-bound")
    assert len(turn) == 1 and turn[0].startswith("training.backend=triton (now chunked)")


def test_idle_gpus_with_a_known_wait_are_not_launch_bound(tmp_path):
    waiting = slower(14.0, seconds_data=3.5, seconds_other=3.6)
    assert "launch-bound" not in names(a_run(tmp_path / "run", waiting, gpus=busy(14.0)))


def test_communication_bound(tmp_path):
    # without checkpointing a backward pass takes about twice its forward: the rest is communication
    changes = slower(10.5, seconds_backward=6.5, seconds_step=1.8)
    folder = a_run(tmp_path / "run", changes, training={"gradient_checkpointing": False})
    found = the_verdict(folder)
    assert found.name == "communication-bound" and found.hedge == "about"
    seconds = 6.5 - 2 * 2.1 + 1.8 - 0.02  # the slowest rank explains 0.02
    assert found.gain == pytest.approx(1 / (1 - seconds / 10.5))
    assert any("ds_configs/zero1.json" in knob for knob in found.turn)
    assert names(a_run(tmp_path / "run", changes)) == ["nothing to gain"]  # it may be the recomputation
    run = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(run | {"world_size": 1}))
    assert "communication-bound" not in names(folder)


def test_offload_bound(tmp_path):
    offload = {**ZERO, "offload_optimizer": {"device": "cpu"}}
    changes = slower(9.0, seconds_step=2.3)
    found = the_verdict(a_run(tmp_path / "run", changes, gpus=busy(9.0), zero=offload))
    assert found.name == "offload-bound" and found.gain == pytest.approx(9.0 / 6.7)
    # 511.9M parameters x 12 bytes over 4 ranks; 0.9 x 44.4 - 36 GiB are free
    assert found.turn[0].startswith("ds_configs/zero2.json") and "1.4 GiB more per GPU, and 4.0 GiB" in found.turn[0]
    assert "make room" not in found.turn[0]
    full = the_verdict(a_run(tmp_path / "full", {**changes, "memory_gib": 39.5}, gpus=busy(9.0), zero=offload))
    assert "make room by a smaller training.micro_batch_size" in full.turn[0]


def test_memory_pressure(tmp_path):
    rows = [row(step, {}, {}) for step in range(1, STEPS + 1)]
    for late in rows[3::3]:
        late |= {"seconds": 8.4, "seconds_forward": 3.5, "allocator_retries": 2, "memory_gib": 43.1}
    found = the_verdict(a_run(tmp_path / "run", rows=rows))
    assert found.name == "memory pressure" and found.gain == pytest.approx((19 * 8.4 + 38 * 7) / (57 * 7))
    assert "19 of 57 steps" in found.finding and "peak 43.1 GiB of 44.4" in found.finding
    assert found.turn[0].startswith("training.micro_batch_size")
    rows = [row(step, {"allocator_retries": int(step == 30)}, {}) for step in range(1, STEPS + 1)]
    assert names(a_run(tmp_path / "run", rows=rows)) == ["nothing to gain"]  # one step is too few


@pytest.mark.parametrize("reasons", ["hardware thermal", "power cap,software thermal", "power brake"])
def test_throttled_card(tmp_path, reasons):
    hot = {2: {"clock_mhz": 1270.0, "throttled": 0.7, "throttle_reasons": reasons}}
    found = the_verdict(a_run(tmp_path / "run", gpus=hot))
    assert found.name == "throttled card" and found.finding.startswith("GPU 2 slowed down in 70 % of the samples")
    assert found.gain == pytest.approx(1 / (1 - 6.6 / 7 * (1 - 1270 / 1905)))  # all ranks wait for it while computing


def test_a_power_limit_set_low_throttles_all_cards(tmp_path):
    low = {"all": {"clock_mhz": 900.0, "power_limit_w": 150.0, "throttled": 1.0}}
    found = the_verdict(a_run(tmp_path / "run", gpus=low))
    assert found.name == "throttled card" and "power limit 150 W" in found.finding
    assert found.gain == pytest.approx(1 / (1 - 6.6 / 7 * (1 - 900 / 2520)))


def test_mismatched_card(tmp_path):
    other = {
        1: {
            "clock_mhz": 1410.0,
            "max_clock_mhz": 1740.0,
            "power_limit_w": 300.0,
            "throttled": 0.0,
            "throttle_reasons": "",
        }
    }
    found = the_verdict(a_run(tmp_path / "run", gpus=other))
    assert found.name == "mismatched card" and found.gain == pytest.approx(1 / (1 - 6.6 / 7 * (1 - 1410 / 1905)))
    assert "GPU 1 runs at 1410 MHz, the others at 1905 (power limits from 300 to 350 W)" in found.finding


def test_an_idle_card_of_the_node_does_not_belong_to_the_run(tmp_path):
    idle = {3: {"clock_mhz": 210.0, "utilisation": 0.0, "throttled": 0.0, "throttle_reasons": ""}}
    assert names(a_run(tmp_path / "run", gpus=idle)) == ["nothing to gain"]


def test_slow_rank(tmp_path):
    folder = a_run(tmp_path / "run", slower(8.4, seconds_backward=5.9, rank_seconds_slowest=3.51))
    found = the_verdict(folder)
    assert found.name == "slow rank" and found.gain == pytest.approx(8.4 / 7.0)
    # rank 0 waits for it in its backward pass, which does not count as communication
    no_recomputation = a_run(
        tmp_path / "run",
        slower(8.4, seconds_backward=5.9, rank_seconds_slowest=3.51),
        training={"gradient_checkpointing": False},
    )
    assert names(no_recomputation) == ["slow rank"]


def test_too_small_micro_batch(tmp_path):
    small = slower(21.0, seconds_forward=6.3, seconds_backward=14.0, memory_gib=9.0)
    found = the_verdict(
        a_run(tmp_path / "run", small, micro=1, accumulation=64)
    )  # kernels without gaps, but small ones
    assert found.name == "too small micro-batch"
    # 0.9 x 44.4 / 9 = 4.4: 4 divides 64; computing at 0.14 x 21 / 20.3 of the peak shrinks to that over 0.40
    computing, mfu = 20.3 / 21, 0.14 * 21 / 20.3
    assert found.gain == pytest.approx(1 / (1 - computing * (1 - mfu / 0.4)))
    assert found.turn[0].startswith("training.micro_batch_size=4 (now 1), with training.gradient_accumulation_steps=16")
    roomy = the_verdict(a_run(tmp_path / "run", {**small, "memory_gib": 18.0}, micro=1, accumulation=64))
    assert roomy.gain == pytest.approx(
        1 / (1 - computing / 2)
    )  # memory allows twice the size, so the gain is at most twofold


def test_a_micro_batch_that_fills_memory_or_cannot_be_merged_is_not_too_small(tmp_path):
    small = slower(21.0, seconds_forward=6.3, seconds_backward=14.0)
    assert names(a_run(tmp_path / "a", small, micro=1, accumulation=64)) == ["nothing to gain"]
    assert names(a_run(tmp_path / "b", {**small, "memory_gib": 9.0}, accumulation=1)) == ["nothing to gain"]


def test_waiting_lowers_the_mfu_but_does_not_blame_the_kernels(tmp_path):
    waiting = slower(12.5, seconds_data=5.5, memory_gib=9.0)
    assert names(a_run(tmp_path / "run", waiting, gpus=busy(12.5), backend="chunked")) == ["data-bound"]


def test_slow_kernels(tmp_path):
    slow = slower(21.0, seconds_forward=6.3, seconds_backward=14.0)
    found = the_verdict(a_run(tmp_path / "run", slow, backend="chunked"))
    assert found.name == "slow kernels" and found.turn[0].startswith("training.backend=triton")


def test_the_untuned_run_gets_every_verdict_the_largest_gain_first(tmp_path, capsys):
    # the run this project continues: micro-batch 1, accumulation 64, 54.47 s, utilisation 22 %
    slow = slower(54.47, seconds_forward=16.0, seconds_backward=36.0, seconds_step=0.6, mfu=0.04, memory_gib=9.0)
    folder = a_run(tmp_path / "run", slow, gpus={"all": {"utilisation": 0.22}}, micro=1, accumulation=64)
    verdicts = diagnose(read(folder)[0])
    assert [v.name for v in verdicts] == ["launch-bound", "too small micro-batch"]
    assert verdicts[0].gain > verdicts[1].gain > 3
    assert main([str(folder)]) == 0
    assert "1. launch-bound: at most 4.51x" in capsys.readouterr().out


@pytest.mark.parametrize("source", ["rows", "events"])
def test_saving_too_often(tmp_path, source):
    rows = [row(step, {"seconds_save": 3.0 * (step % 10 == 1)}, {}) for step in range(1, STEPS + 1)]
    events = [
        {"event": "save", "step": step, "save_stall_seconds": 3.0, "bytes": 1} for step in range(10, STEPS + 1, 10)
    ]
    if source == "events":
        for one in rows:
            del one["seconds_save"]
    found = the_verdict(
        a_run(tmp_path / "run", rows=rows, events=events, training={"save_interval": 10, "async_save": False})
    )
    assert found.name == "saving too often"
    assert found.gain == pytest.approx((57 * 7 + 15) / (57 * 7))  # the save after the last step lies outside the window
    assert "5 saves, 3 s each" in found.finding
    assert found.turn[0].startswith("training.async_save=true")
    assert found.turn[1].startswith("training.save_interval=43 (now 10)")  # 3 x 0.99 / 0.01 / 7 = 42.4


@pytest.mark.parametrize("source", ["rows", "events"])
def test_evaluating_too_often(tmp_path, source):
    rows = [row(step, {"seconds_eval": 8.0 * (step % 10 == 1)}, {}) for step in range(1, STEPS + 1)]
    events = [{"event": "eval", "step": step, "eval_seconds": 8.0} for step in range(10, STEPS + 1, 10)]
    if source == "events":
        for one in rows:
            del one["seconds_eval"]
    found = the_verdict(a_run(tmp_path / "run", rows=rows, events=events, training={"eval_interval": 10}))
    assert found.name == "evaluating too often" and found.gain == pytest.approx((57 * 7 + 40) / (57 * 7))
    assert found.turn[0].startswith("training.eval_interval=56 (now 10)")  # 8 x 0.98 / 0.02 / 7


def test_every_check_has_a_test_in_which_it_finds_something():
    here = Path(__file__).read_text()
    assert [check.__name__ for check in CHECKS if f"def test_{check.__name__}(" not in here] == []


# -- folders of all kinds -----------------------------------------------------------------------------


def test_a_live_run_with_a_torn_last_line_is_read(tmp_path, capsys):
    folder = a_run(tmp_path / "run", slower(12.5, seconds_data=5.5), gpus=busy(12.5))
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 61, "loss": 3.0, "seconds": 12')
    assert main([str(folder)]) == 0
    out = capsys.readouterr().out
    assert ": running, last row " in out and "steps 4 to 60" in out and "data-bound: at most 1.79x" in out


def test_a_run_without_the_newer_fields_is_read(tmp_path, capsys):
    old = (
        "seconds_save",
        "seconds_eval",
        "seconds_other",
        "mfu",
        "rank_seconds_slowest",
        "rank_seconds_median",
        "allocator_retries",
        "tokens_per_s_per_device",
    )
    rows = [row(step, slower(12.5, seconds_data=5.5), {}) for step in range(1, STEPS + 1)]
    rows = [{k: v for k, v in one.items() if k not in old and not k.startswith("gpu/")} for one in rows]
    folder = a_run(tmp_path / "run", rows=rows)
    assert names(folder) == ["data-bound"]
    main([str(folder)])
    out = capsys.readouterr().out
    assert "note: rows have no gpu/... fields (pip install nvidia-ml-py)" in out and "note: rows have no mfu" in out


def test_nothing_but_metrics_is_enough(tmp_path, capsys):
    folder = a_run(tmp_path / "run", slower(12.5, seconds_data=5.5), gpus=busy(12.5))
    for name in ("config.yaml", "ds_config.json", "env.json"):
        (folder / name).unlink()
    (folder / "run.json").write_text('{"status": ')
    assert names(folder) == ["data-bound"]
    main([str(folder)])
    out = capsys.readouterr().out
    assert out.count("is missing or cannot be read") == 4 and "state unknown" in out


def test_values_that_are_not_finite_are_skipped(tmp_path):
    rows = [row(step, {"loss": "nan", "mfu": "nan", "grad_norm": "inf"}, {}) for step in range(1, STEPS + 1)]
    assert names(a_run(tmp_path / "run", rows=rows)) == ["nothing to gain"]


def test_the_first_steps_of_a_launch_and_earlier_launches_do_not_count(tmp_path):
    slow = [row(step, slower(12.5, seconds_data=5.5), {}) for step in range(1, 31)]
    resumed = {"event": "resume", "step": 30, "world_size": 4}
    rows = [
        *slow,
        resumed,
        *(row(step, {} if step > 33 else {"seconds": 90.0, "seconds_data": 80.0}, {}) for step in range(31, 61)),
    ]
    folder = a_run(tmp_path / "run", rows=rows)
    summary, _ = read(folder)
    assert (summary.first, summary.last, summary.steps) == (34, 60, 27)
    assert names(folder) == ["nothing to gain"]
    assert names(a_run(tmp_path / "before", rows=slow)) == ["data-bound"]
    summary, notes = read(a_run(tmp_path / "just resumed", rows=[*slow, resumed]))
    assert summary.last == 30 and any("since the last resume" in note for note in notes)


def test_last_analyses_the_end_of_a_run(tmp_path):
    rows = [row(step, {} if step <= 50 else slower(12.5, seconds_data=5.5), {}) for step in range(1, STEPS + 1)]
    folder = a_run(tmp_path / "run", rows=rows)
    summary, _ = read(folder, 10)
    assert (summary.first, summary.last) == (51, 60) and "data-bound" in names(folder, 10)


def test_json_holds_the_same_verdicts(tmp_path, capsys):
    folder = a_run(tmp_path / "run", slower(12.5, seconds_data=5.5), gpus=busy(12.5))
    assert main([str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (verdict,) = found["verdicts"]
    assert verdict["name"] == "data-bound" and verdict["gain"] == pytest.approx(12.5 / 7)
    assert found["budget"]["data"] == pytest.approx(0.44) and sum(found["budget"].values()) == pytest.approx(1)
    assert found["status"] == "running" and found["summary"]["steps"] == 57


def test_a_folder_without_a_run_or_a_step_is_refused_with_what_to_do(tmp_path, capsys):
    assert run_command(main, [str(tmp_path / "nowhere")]) == 3
    assert "is no folder; give the --output_dir of one" in capsys.readouterr().err
    a_run(tmp_path / "run", rows=[])
    assert run_command(main, [str(tmp_path)]) == 3
    err = capsys.readouterr().err
    assert (
        f"holds no run; give the --output_dir of one, such as outputs/quickstart; runs in it: {tmp_path / 'run'}" in err
    )
    assert run_command(main, [str(tmp_path / "run")]) == 3
    assert "no finished step" in capsys.readouterr().err
    (tmp_path / "run" / "metrics.jsonl").write_text("nonsense\n{}\n")
    assert run_command(main, [str(tmp_path / "run")]) == 3
    assert "line 1: not JSON (Expecting value); restore the file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(tmp_path / "run"), "--last", "0"])
    assert "at least 1" in capsys.readouterr().err


# -- real runs ----------------------------------------------------------------------------------------

SLOWED = """
import json, sys, time
from training.data.dataset import PackedTokens
from training.engine.engine import start
from training.loop.preflight import prepare
from training.loop.run import run
from training.train import parse
from training.engine.world import exit_process

read, world = PackedTokens.batch, start(timeout_s=60)
for argv, read_s in json.loads(sys.argv[1]):
    def slowed(self, samples, read_s=read_s):
        time.sleep(read_s)
        return read(self, samples)
    PackedTokens.batch = slowed
    code = run(prepare(parse(argv)), world)
    if code:
        exit_process(code)
world.leave()
exit_process(0)
"""
"""Trains several runs on one rank. Reading a micro-batch of a run takes read_s seconds longer than it would."""


@pytest.fixture(scope="module")
def real(tmp_path_factory, tiny_yaml):
    """Three runs of the trainer on a CPU, each of which loses its time in one way."""
    folder = tmp_path_factory.mktemp("doctor")
    wrong = {
        # one read per step, which outweighs the rest of it
        "data": (["training.eval_interval=0", "training.micro_batch_size=8"], 1.0),
        "saving": (["training.eval_interval=0", "training.save_interval=1", "training.async_save=false"], 0.0),
        "evaluating": (["training.eval_interval=1", "training.eval_windows=0"], 0.0),
    }
    cases = [
        (["--config", str(tiny_yaml), "--output_dir", str(folder / name), "training.max_steps=12", *overrides], read_s)
        for name, (overrides, read_s) in wrong.items()
    ]
    command = [sys.executable, "-c", SLOWED, json.dumps(cases)]
    done = subprocess.run(command, cwd=ROOT, env=rank_environment(), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.parametrize(
    "name, verdict, knob",
    [
        ("data", "data-bound", "data.num_workers=2 (now 1)"),
        ("saving", "saving too often", "training.async_save=true"),
        ("evaluating", "evaluating too often", "training.eval_interval="),
    ],
)
def test_a_real_run_gets_the_verdict_on_its_cost(real, name, verdict, knob):
    found = diagnose(read(real / name)[0])
    assert found[0].name == verdict and found[0].turn[0].startswith(knob), found
    costs = {"data-bound", "saving too often", "evaluating too often"}
    # other costs may be there, but small ones: a step of this tiny model takes a twentieth of a second
    assert all(v.gain < 1.1 for v in found[1:] if v.name in costs), found
    assert found[0].gain > 1.15


@pytest.mark.parametrize("name, field", [("saving", "seconds_save"), ("evaluating", "seconds_eval")])
def test_a_real_run_without_the_field_gets_the_same_verdict_from_its_events(real, tmp_path, name, field):
    rows = [json.loads(line) for line in (real / name / "metrics.jsonl").read_text().splitlines()]
    shutil.copytree(real / name, tmp_path / name, ignore=shutil.ignore_patterns("step_*"))
    with open(tmp_path / name / "metrics.jsonl", "w") as file:
        file.writelines(json.dumps({k: v for k, v in one.items() if k != field}) + "\n" for one in rows)
    by_events, by_rows = (diagnose(read(folder / name)[0])[0] for folder in (tmp_path, real))
    assert by_events.name == by_rows.name and by_events.gain == pytest.approx(by_rows.gain, rel=0.1)


def test_the_command_prints_the_verdict_on_a_real_run(real):
    command = [sys.executable, "-m", "training.doctor", str(real / "data")]
    done = subprocess.run(command, cwd=ROOT, env=clean_environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "1. data-bound: at most " in done.stdout, done.stdout + done.stderr
    assert "finished (finished); 1 x " in done.stdout
