"""The tuner's command: what it refuses, and one real search under a memory cap."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from support.launching import ROOT, rank_environment

from training import tune
from training.config import load_config, plan_batch
from training.config.command import run_command
from training.planning.outcome import Outcome
from training.planning.tune_task import TuneTask

NO_MEMORY, FAILED = Outcome("out_of_memory", "no room"), Outcome("failed", "a bug")

# -- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code, words, argv",
    [
        (
            2,
            "override 'training.seeed=1': unknown key 'training.seeed'; did you mean training.seed",
            ["training.seeed=1"],
        ),
        (
            2,
            "training.global_batch_size=8 cannot be shared by --num_gpus 3 ranks; choose 1, 2, 4, 8 ranks, or a "
            "global_batch_size of 6 or 9",
            ["--num_gpus", "3"],
        ),
        (2, "zero9.json: No such file", ["--deepspeed_config", "ds_configs/zero9.json"]),
        (
            2,
            "stray first step",
            ["--deepspeed_config", "ds_configs/zero2.json", "ds_configs/zero0.json", "training.precision=bf16"],
        ),
        (2, "@fixed.json sets train_micro_batch_size_per_gpu=1", ["--deepspeed_config", "@fixed.json"]),
        (2, "--steps 0 must be at least 1", ["--steps", "0"]),
        (2, "--memory_cap_gib 0 must be above 0", ["--memory_cap_gib", "0"]),
        (2, "@fixed.json exists already", ["--out", "@fixed.json"]),
        (2, "there is no folder @nowhere", ["--json", "@nowhere/trials.json"]),
        (2, "training.backend=triton needs a GPU", ["training.backend=triton"]),
        (3, "is not a prepared dataset", ["data.data_dir=nowhere"]),
    ],
)
def test_bad_input_is_refused_before_any_trial(tmp_path, tiny_yaml, monkeypatch, capsys, code, words, argv):
    (tmp_path / "fixed.json").write_text('{"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1}}')
    monkeypatch.setattr(tune, "try_setting", None)
    argv = [word.replace("@", f"{tmp_path}/") for word in argv]
    assert run_command(tune.main, ["--config", str(tiny_yaml), *argv]) == code
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and words.replace("@", f"{tmp_path}/") in printed
    assert "Traceback" not in printed


def test_a_missing_config_is_refused(tmp_path, capsys):
    assert run_command(tune.main, ["--config", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml: No such file" in capsys.readouterr().err


def task_of(tiny_yaml: Path, *argv: str) -> TuneTask:
    return tune.prepare(tune.parse(["--config", str(tiny_yaml), *argv]))


def test_activation_checkpointing_on_the_command_line_is_the_only_kind_tried(tiny_yaml):
    assert task_of(tiny_yaml).kinds == ("block", "ffn", "none")
    assert task_of(tiny_yaml, "training.gradient_checkpointing=false").kinds == ("none",)
    assert task_of(tiny_yaml, "training.gradient_checkpointing=true", "training.checkpointing_scope=ffn").kinds == (
        "ffn",
    )


def test_the_global_batch_is_the_yaml_s_or_the_product_of_its_parts(tiny_yaml):
    assert task_of(tiny_yaml, "--num_gpus", "4").global_batch_size == 8
    parts = task_of(
        tiny_yaml, "--num_gpus", "4", "training.global_batch_size=null", "training.gradient_accumulation_steps=3"
    )
    assert (parts.global_batch_size, parts.sizes) == (2 * 3 * 4, (1, 2, 3, 6))


def test_when_nothing_fits_or_runs_the_message_says_why_and_what_to_change(tiny_yaml, monkeypatch, capsys):
    monkeypatch.setattr(tune, "try_setting", lambda *args: NO_MEMORY)
    assert tune.main(["--config", str(tiny_yaml)]) == 1
    captured = capsys.readouterr()
    # once per ds_config, under the kind of checkpointing that takes least memory
    assert captured.out.count("out of memory") == 3
    assert captured.err.startswith("error: no setting fits: micro-batch 1 already ran out of memory under zero1")
    assert "ds_configs/zero3_offload.json" in captured.err
    monkeypatch.setattr(tune, "try_setting", lambda *args: FAILED)
    assert tune.main(["--config", str(tiny_yaml)]) == 1
    assert capsys.readouterr().err == "error: no setting ran; the first failure: a bug\n"


# -- a real search ----------------------------------------------------------------------------------------

WINDOWS = 13
"""Windows per rank and step: a prime, so that the size after 1 is the one that does not fit, whatever the timing."""

WIDE = f"""model.d_model=16 model.n_heads=2 model.n_kv_heads=1 model.d_ffn=16384 model.n_layers=3
training.global_batch_size={2 * WINDOWS} training.gradient_checkpointing=false training.indexer_warmup_steps=2""".split()
"""Most memory is saved by the feed-forwards: 0.33 GiB above the imports with one window, 0.7 with all (measured)."""


@pytest.fixture(scope="module")
def search_under_a_cap(tmp_path_factory, tiny_yaml) -> tuple[Path, str]:
    """(folder with trials.json and tuned.yaml, output) of a search over two ds_configs, capped 0.52 GiB above the imports."""
    folder = tmp_path_factory.mktemp("tuned")
    for stage in (1, 2):
        zero = {"stage": stage, "reduce_bucket_size": 1000000, "allgather_bucket_size": 1000000}
        (folder / f"zero{stage}.json").write_text(json.dumps({"zero_optimization": zero}))
    imported = subprocess.run(
        [
            sys.executable,
            "-c",
            "import training.engine.engine, training.loop.trial; from training.planning.memory_cap import status_bytes; "
            "print(status_bytes('VmRSS') / 2**30)",
        ],
        cwd=ROOT,
        env=rank_environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    cap = float(imported.stdout) + 0.52
    command = [
        sys.executable,
        "-m",
        "training.tune",
        "--config",
        str(tiny_yaml),
        "--num_gpus",
        "2",
        "--steps",
        "2",
        "--memory_cap_gib",
        f"{cap:.3f}",
        "--json",
        str(folder / "trials.json"),
        "--out",
        str(folder / "tuned.yaml"),
        "--deepspeed_config",
        str(folder / "zero1.json"),
        str(folder / "zero2.json"),
        *WIDE,
    ]
    done = subprocess.run(command, cwd=ROOT, env=rank_environment(), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


def test_a_search_survives_running_out_of_memory_and_finds_what_fits(search_under_a_cap):
    folder, printed = search_under_a_cap
    found = json.loads((folder / "trials.json").read_text())
    assert [(Path(t["deepspeed_config"]).stem, t["micro_batch_size"], t["verdict"]) for t in found["trials"]] == [
        ("zero1", 1, "ok"),
        ("zero1", WINDOWS, "out_of_memory"),
        ("zero2", 1, "ok"),
        ("zero2", WINDOWS, "out_of_memory"),
    ], found["trials"]
    assert all("can't allocate memory" in t["reason"] for t in found["trials"] if t["verdict"] == "out_of_memory")
    for trial in (t for t in found["trials"] if t["verdict"] == "ok"):
        assert trial["tokens_per_s"] == pytest.approx(2 * WINDOWS * 32 / trial["seconds_per_step"])
        assert len(trial["step_seconds"]) == 2 and 0 < trial["peak_gib"] < found["memory_cap_gib"]
    assert found["fastest"] in found["trials"] and found["fastest"]["verdict"] == "ok"
    assert printed.count("out of memory") == 2


def test_the_written_yaml_is_a_whole_configuration_with_the_same_global_batch(search_under_a_cap, tiny_yaml):
    folder, printed = search_under_a_cap
    text = (folder / "tuned.yaml").read_text()
    words = json.loads((folder / "trials.json").read_text())["override"]
    assert words[-4:] == [
        "training.micro_batch_size=1",
        "training.gradient_accumulation_steps=null",
        f"training.global_batch_size={2 * WINDOWS}",
        "training.gradient_checkpointing=false",
    ]
    assert " ".join(words) in printed
    cfg = load_config(folder / "tuned.yaml", [])
    assert cfg == load_config(tiny_yaml, words) and cfg.model.d_ffn == 16384  # the model is in it too
    plan = plan_batch(cfg.training, 2)
    assert (plan.global_batch_size, plan.accumulation_steps) == (2 * WINDOWS, WINDOWS)
    assert "torch 2." in text and "# command: python -m training.tune" in text


def test_no_rank_is_left_running(search_under_a_cap):
    folder, _ = search_under_a_cap
    assert not [p.pid for p in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(p.info["cmdline"] or [])]
