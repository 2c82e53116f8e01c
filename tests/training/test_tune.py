"""The tuner: what it tries, what it makes of the ends of its ranks, and one real search under a memory cap."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.launching import ROOT, rank_environment

from training import tune
from training.config import load_config, plan_batch
from training.loop.trial import Outcome
from training.tune import Setting, Stop, Trial, best, divisors, largest, read_ends, run_ranks, search, together

ZERO2, ZERO3 = Path("zero2.json"), Path("zero3.json")

# -- what is tried, and in which order --------------------------------------------------------------------


def ran(seconds: float, peak_gib: float = 1.0, *, spread: float = 0.0) -> Outcome:
    return Outcome(
        "ok", None, (seconds - spread, seconds - spread, seconds, seconds + spread, seconds + spread), peak_gib
    )


NO_MEMORY, FAILED = Outcome("out_of_memory", "no room"), Outcome("failed", "a bug")


def tried(sizes, attempt: Callable[[Setting, int], Outcome], kinds=("none",), ds_configs=(ZERO2,)) -> list[tuple]:
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
def test_the_largest_divisor_that_fits_is_found_and_nothing_above_a_failure_is_tried(total, fitting):
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


def test_growth_ends_where_a_step_takes_longer_by_more_than_noise():
    seconds = {1: 4.0, 2: 3.0, 4: 3.03, 8: 3.5, 16: 1.0}
    found = tried(divisors(16), lambda setting, size: ran(seconds[size]), ("block", "none"))
    # under the thriftiest kind it goes on, to find what fits
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


def test_a_size_without_room_is_not_tried_again_where_less_is_recomputed_but_again_under_another_zero_stage():
    room = {"block": 8, "ffn": 4, "none": 1}

    def attempt(setting: Setting, size: int) -> Outcome:
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
    order = tried(divisors(16), attempt, tune.THRIFTIEST_FIRST, (ZERO2, ZERO3))
    assert order == [("zero2", *pair) for pair in one] + [("zero3", *pair) for pair in one]


def test_a_failure_ends_its_setting_and_no_other():
    def attempt(setting: Setting, size: int) -> Outcome:
        return FAILED if setting == Setting(ZERO2, "block") and size == 2 else ran(1 / size)

    assert tried([1, 2, 4], attempt, ("block", "none")) == [
        ("zero2", "block", 1),
        ("zero2", "block", 2),
        ("zero2", "none", 1),
        ("zero2", "none", 2),
        ("zero2", "none", 4),
    ]


def test_the_fastest_wins_and_among_equals_the_one_that_leaves_most_memory_free():
    fast, equal, slow = (
        Trial(Setting(ZERO2, kind), size, outcome)
        for kind, size, outcome in (
            ("none", 4, ran(1.0, 9.0)),
            ("block", 8, ran(1.01, 3.0)),
            ("block", 16, ran(1.2, 2.0)),
        )
    )
    lost = Trial(Setting(ZERO2, "none"), 32, NO_MEMORY)
    assert best([fast, slow, lost]) is fast
    assert best([fast, equal, slow, lost]) is equal
    assert largest([fast, equal, slow, lost]) is slow
    assert best([lost]) is None


# -- how ranks end ----------------------------------------------------------------------------------------


def end_of_ranks(tmp_path: Path, programs: list[str], *, patience_s: float = 60.0, capped: bool = False) -> Outcome:
    """The outcome of ranks that run these programs, written for speed without torch."""
    script = (
        "import json, os, sys, time\nrank = int(os.environ['RANK'])\nfolder = sys.argv[1]\nexec(sys.argv[2 + rank])\n"
    )
    with Stop() as stop:
        command = [sys.executable, "-c", script, str(tmp_path), *programs]
        codes = run_ranks(command, len(programs), tmp_path, patience_s=patience_s, stop=stop)
    return together(read_ends(tmp_path, codes, capped=capped))


def leaves(outcome: str) -> str:
    return f"open(f'{{folder}}/rank_{{rank}}.json', 'w').write(json.dumps({outcome}))"


OK = "dict(verdict='ok', step_seconds=[1.0 + rank, 3.0 - rank], peak_gib=0.5 + rank, backend='chunked')"
WAIT = "time.sleep(1000)"


def test_a_trial_is_as_slow_as_its_slowest_rank_and_holds_what_the_fullest_holds(tmp_path):
    outcome = end_of_ranks(tmp_path, [leaves(OK), leaves(OK)])
    assert outcome == Outcome("ok", None, (2.0, 3.0), 1.5, None, "chunked")


@pytest.mark.parametrize(
    "programs, verdict, words",
    [
        (
            [leaves("dict(verdict='out_of_memory', reason='no room', step_seconds=[])") + "; sys.exit(1)", WAIT],
            "out_of_memory",
            "no room",
        ),
        ([WAIT, "os.kill(os.getpid(), 9)"], "out_of_memory", "rank 1 was killed"),
        ([WAIT, "sys.exit(137)"], "out_of_memory", "rank 1 was killed"),
        (
            [WAIT, "print('terminate called: std::bad_alloc', flush=True); os.abort()"],
            "out_of_memory",
            "std::bad_alloc",
        ),
        ([WAIT, "print('MemoryError: while printing a traceback'); sys.exit(1)"], "out_of_memory", "MemoryError"),
        ([WAIT, "os.abort()"], "failed", "rank 1 ended with code -6: it printed nothing"),
        (
            [WAIT, leaves("dict(verdict='failed', reason='ValueError: k', step_seconds=[])") + "; sys.exit(1)"],
            "failed",
            "ValueError: k",
        ),
        (
            [leaves(OK), "print('Traceback'); print('ImportError: x'); sys.exit(1)"],
            "failed",
            "rank 1 ended with code 1: ImportError: x",
        ),
    ],
)
def test_what_the_ends_of_ranks_are_taken_for(tmp_path, monkeypatch, programs, verdict, words):
    """And the other rank, which would wait for ever, is ended."""
    monkeypatch.setattr(tune, "PEERS_GRACE_S", 0.5)
    outcome = end_of_ranks(tmp_path, programs)
    assert (outcome.verdict, words in outcome.reason) == (verdict, True), outcome


@pytest.mark.parametrize("capped, verdict", [(True, "out_of_memory"), (False, "failed")])
def test_a_thread_that_finds_no_room_is_out_of_memory_under_a_cap(tmp_path, monkeypatch, capped, verdict):
    """Seen while process groups were made close to the cap; without one it may be a limit on processes."""
    monkeypatch.setattr(tune, "PEERS_GRACE_S", 0.5)
    aborts = "print('terminate called without an active exception', flush=True); os.abort()"
    assert end_of_ranks(tmp_path, [aborts, WAIT], capped=capped).verdict == verdict


def test_ranks_that_hang_are_ended(tmp_path):
    began = time.monotonic()
    outcome = end_of_ranks(tmp_path, [WAIT, WAIT], patience_s=0.5)
    assert time.monotonic() - began < 10
    assert (outcome.verdict, outcome.reason) == ("failed", "rank 0 gave no sign of life: it printed nothing")


@pytest.mark.parametrize("number", tune.STOP_SIGNALS)
def test_nothing_outlives_a_tuner_that_is_stopped(tmp_path, number):
    """Two ranks, and a child of a rank, that would sleep for ever."""
    rank = "import os, subprocess, time; subprocess.Popen(['sleep', '1000']); time.sleep(1000)"
    program = f"""
import sys
from pathlib import Path
from training.tune import Interrupted, Stop, run_ranks
try:
    with Stop() as stop:
        run_ranks([sys.executable, "-c", {rank!r}], 2, Path(sys.argv[1]), patience_s=1000, stop=stop)
except Interrupted as err:
    sys.exit(f"stopped by {{err}}")
"""
    tuner = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        cwd=ROOT,
        env=rank_environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline, started = time.monotonic() + 60, []
    try:
        while len(started := psutil.Process(tuner.pid).children(recursive=True)) < 4:
            assert time.monotonic() < deadline and tuner.poll() is None
            time.sleep(0.05)
        tuner.send_signal(number)
        assert f"stopped by {number.name}" in tuner.communicate(timeout=60)[1] and tuner.returncode == 1
        assert not psutil.wait_procs(started, timeout=60)[1]
    finally:
        tuner.kill()
        for process in started:
            if process.is_running():
                process.kill()


# -- the memory cap ---------------------------------------------------------------------------------------


def test_under_the_cap_torch_raises_as_it_does_on_a_gpu(tmp_path):
    program = """
import torch
from training.loop.trial import GIB, is_out_of_memory, memory_cap, status_bytes
cpu, n = torch.device("cpu"), 150 * 2**20 // 4
try:
    with memory_cap(0.01, cpu):
        print("not reached")
except MemoryError as err:
    print(err)
with memory_cap(status_bytes("VmRSS") / GIB + 0.25, cpu):
    fits = torch.ones(n)
    try:
        torch.ones(n)
    except RuntimeError as err:
        print(is_out_of_memory(err, capped=False), "can't allocate memory" in str(err))
    del fits
    torch.ones(n)
    print("goes on")
both = torch.ones(n), torch.ones(n)
print("lifted")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=rank_environment(), capture_output=True, text=True, timeout=60
    )
    said = done.stdout.splitlines()
    assert "before it has a model, more than --memory_cap_gib 0.01" in said[0]
    assert said[1:] == ["True True", "goes on", "lifted"], done.stderr


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
        (2, "@fixed.json says train_micro_batch_size_per_gpu=1", ["--deepspeed_config", "@fixed.json"]),
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
    assert tune.main(["--config", str(tiny_yaml), *argv]) == code
    said = capsys.readouterr().err
    assert said.startswith("error: ") and words.replace("@", f"{tmp_path}/") in said and "Traceback" not in said


def test_no_config_is_refused(tmp_path, capsys):
    assert tune.main(["--config", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml: No such file" in capsys.readouterr().err


def task_of(tiny_yaml: Path, *argv: str) -> tune.Task:
    return tune.prepare(tune.parse(["--config", str(tiny_yaml), *argv]))


def test_what_is_said_of_checkpointing_on_the_command_line_is_kept_to(tiny_yaml):
    assert task_of(tiny_yaml).kinds == ("block", "ffn", "none")
    assert task_of(tiny_yaml, "training.gradient_checkpointing=false").kinds == ("none",)
    assert task_of(tiny_yaml, "training.gradient_checkpointing=true", "training.checkpointing_scope=ffn").kinds == (
        "ffn",
    )


def test_the_global_batch_is_that_of_the_yaml_or_what_its_parts_give(tiny_yaml):
    assert task_of(tiny_yaml, "--num_gpus", "4").global_batch_size == 8
    parts = task_of(
        tiny_yaml, "--num_gpus", "4", "training.global_batch_size=null", "training.gradient_accumulation_steps=3"
    )
    assert (parts.global_batch_size, parts.sizes) == (2 * 3 * 4, (1, 2, 3, 6))


def test_nothing_fits_or_runs(tiny_yaml, monkeypatch, capsys):
    monkeypatch.setattr(tune, "try_setting", lambda *args: NO_MEMORY)
    assert tune.main(["--config", str(tiny_yaml)]) == 1
    captured = capsys.readouterr()
    assert captured.out.count("out of memory") == 3  # once per ds_config: the thriftiest checkpointing
    assert captured.err.startswith("error: no setting fits: micro-batch 1 already ran out of memory under zero1")
    assert "ds_configs/zero3_offload.json" in captured.err
    monkeypatch.setattr(tune, "try_setting", lambda *args: FAILED)
    assert tune.main(["--config", str(tiny_yaml)]) == 1
    assert capsys.readouterr().err == "error: no setting ran; the first failure: a bug\n"


# -- a real search ----------------------------------------------------------------------------------------

WINDOWS = 13
"""Per rank and step: a prime, so that after micro-batch 1 comes the one that does not fit, whatever the timing says."""

WIDE = f"""model.d_model=16 model.n_heads=2 model.n_kv_heads=1 model.d_ffn=16384 model.n_layers=3
training.global_batch_size={2 * WINDOWS} training.gradient_checkpointing=false training.indexer_warmup_steps=2""".split()
"""Memory is mostly what the feed-forwards keep: measured above the imports, 0.33 GiB with one window, 0.7 with all."""


@pytest.fixture(scope="module")
def search_under_a_cap(tmp_path_factory, tiny_yaml) -> tuple[Path, str]:
    """A folder with trials.json and tuned.yaml, and what was printed: two ds_configs, 0.52 GiB above what imports take."""
    folder = tmp_path_factory.mktemp("tuned")
    for stage in (1, 2):
        zero = {"stage": stage, "reduce_bucket_size": 1000000, "allgather_bucket_size": 1000000}
        (folder / f"zero{stage}.json").write_text(json.dumps({"zero_optimization": zero}))
    imported = subprocess.run(
        [
            sys.executable,
            "-c",
            "import training.engine.engine, training.loop.trial as t; print(t.status_bytes('VmRSS') / t.GIB)",
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


def test_a_search_survives_running_out_of_memory_and_takes_what_fits(search_under_a_cap):
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


def test_the_override_is_a_configuration_with_the_same_global_batch(search_under_a_cap, tiny_yaml):
    folder, printed = search_under_a_cap
    text = (folder / "tuned.yaml").read_text()
    words = json.loads((folder / "trials.json").read_text())["override"]
    assert words[-4:] == [
        "training.micro_batch_size=1",
        f"training.gradient_accumulation_steps={WINDOWS}",
        f"training.global_batch_size={2 * WINDOWS}",
        "training.gradient_checkpointing=false",
    ]
    assert " ".join(words) in printed
    cfg = load_config(folder / "tuned.yaml", [])
    assert cfg == load_config(tiny_yaml, words) and cfg.model.d_ffn == 16384  # whole: the model is in it too
    plan = plan_batch(cfg.training, 2)
    assert (plan.global_batch_size, plan.accumulation_steps, plan.note) == (2 * WINDOWS, WINDOWS, None)
    assert "torch 2." in text and "# command: python -m training.tune" in text


def test_no_rank_is_left(search_under_a_cap):
    folder, _ = search_under_a_cap
    assert not [p.pid for p in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(p.info["cmdline"] or [])]
