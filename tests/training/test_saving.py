"""A kill at any moment of a save, a full disk, retention, and saving in the background: the real engine writes."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from launching import ROOT, Case, rank_environment, run_cases, start_training

from gsa.checkpoint import manifest
from training import train
from training.metrics import read_rows
from training.saving import Retention, Saver
from training.snapshot import HostBuffers, host_tree
from training.trainer import STOP_SIGNALS, Trainer
from training.world import World


def events(folder: Path, kind: str) -> list[dict]:
    return [row for row in read_rows(folder / "metrics.jsonl") if row.get("event") == kind]


@pytest.fixture(scope="module")
def kills(tmp_path_factory, a_run, tiny_yaml):
    """[(folder, what stood after the kill)], the last one not killed."""
    base = tmp_path_factory.mktemp("kills")
    shutil.copytree(a_run, base / "source")
    shutil.rmtree(base / "source" / "step_6")
    (base / "source" / "latest").write_text("step_3\n")
    environment = {k: v for k, v in rank_environment().items() if k not in ("RANK", "WORLD_SIZE")}
    environment["PYTHONPATH"] += f":{ROOT / 'tests'}"
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "kill_runner.py"), str(tiny_yaml), str(base / "source"), str(base)],
        capture_output=True, text=True, env=environment, cwd=ROOT, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    numbers = sorted(int(path.stem) for path in base.glob("*.json"))
    return [(base / str(n), json.loads((base / f"{n}.json").read_text())) for n in numbers]


def test_a_kill_at_any_moment_of_a_save_leaves_a_good_checkpoint(kills):
    *killed, (_, calm) = kills
    assert calm["ended"] == [0] and calm["latest"] == calm["found"] == "step_4"
    for _, facts in killed:
        assert set(facts["ended"]) == {-signal.SIGKILL}
        if facts["torn"]:
            assert facts["found"] == "step_3" and facts["latest"] == "step_3"
            assert facts["passed_over"][0].startswith("step_4: manifest.json: missing"), facts
        else:
            assert facts["passed_over"] == []
    # before anything; torn; between manifest and latest: nothing else
    assert {(f["torn"], f["found"], f["latest"]) for _, f in killed} == {
        (False, "step_3", "step_3"), (True, "step_3", "step_3"), (False, "step_4", "step_3"),
    }  # fmt: skip
    assert len(killed) >= 12 and any(len(f["ended"]) == 2 for _, f in killed)


def test_after_any_kill_auto_ends_with_the_same_bytes(kills):
    calm = manifest.read(kills[-1][0] / "step_4").files
    same = ["model.safetensors", *(name for name in calm if name.endswith("_optim_states.pt"))]
    assert len(same) == 2
    resumed = [(folder, facts) for folder, facts in kills if facts["resumed"] is not None]
    assert len(resumed) >= 6
    for folder, facts in resumed:
        assert facts["resumed"] == 0
        manifest.verify(folder / "step_4")
        files = manifest.read(folder / "step_4").files
        assert all(files[name] == calm[name] for name in same), folder
        assert manifest.latest_tag(folder) == "step_4"


def test_a_full_disk_is_reported_and_the_last_checkpoint_stays(a_run, tiny_yaml, tmp_path):
    """No file may grow beyond 100 KB: the writer's thread meets it, and the run ends with its words."""
    shutil.copytree(a_run, tmp_path / "run")
    assert manifest.latest_tag(tmp_path / "run") == "step_6"  # set aside by the resume: `latest` must not stay there
    done = subprocess.run(
        [sys.executable, "training/train.py", "--config", str(tiny_yaml), "--output_dir", str(tmp_path / "run"),
         "--resume_from", "step_3", "training.save_interval=1"],
        capture_output=True, text=True, env=rank_environment(), cwd=ROOT,
        preexec_fn=lambda: (signal.signal(signal.SIGXFSZ, signal.SIG_IGN),
                            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))),
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert "step_4 was not saved" in done.stderr and "File too large" in done.stderr and "Free space" in done.stderr
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["status"] == "failed" and "step_4 was not saved" in run["reason"]
    assert manifest.newest_good(tmp_path / "run")[0].name == manifest.latest_tag(tmp_path / "run") == "step_3"


# -- the real launcher ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def killed_launches(tmp_path_factory, tiny_yaml):
    """Rank 0, rank 1 and all of a launch die while a checkpoint is being written; one more launch resumes the three."""
    base = tmp_path_factory.mktemp("killed_launches")

    def argv(name: str) -> list[str]:
        # large enough that a save takes a while
        return ["--config", str(tiny_yaml), "--output_dir", str(base / name), "--resume_from", "auto", "model.vocab_size=20000",
                "training.save_interval=1", "training.max_steps=8", "training.eval_interval=0"]  # fmt: skip

    processes = {
        victim: start_training(2, argv(victim)) for victim in ("rank_0", "rank_1", "all")
    }  # at once: they mostly start
    seen, deadline = {}, time.monotonic() + 180
    while len(seen) < len(processes) and time.monotonic() < deadline:
        time.sleep(0.0005)
        for victim in processes.keys() - seen.keys():
            if list((base / victim).glob("step_[3-9]/*.tmp")):
                if victim == "all":
                    os.killpg(processes[victim].pid, signal.SIGKILL)
                else:
                    os.kill(
                        json.loads((base / victim / ".ranks" / f"{victim}.json").read_text())["pid"], signal.SIGKILL
                    )
                seen[victim] = None
    for victim, process in processes.items():
        if victim not in seen:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=60)
        good, passed_over = manifest.newest_good(base / victim)
        seen[victim] = (victim in seen, process.returncode, good and good.name, passed_over)
    cases = [Case(name, tuple(argv(name))) for name in (*seen, "calm")]
    (base / "output.txt").write_text(run_cases(2, cases, base))
    return base, seen


@pytest.mark.parametrize("victim", ["rank_0", "rank_1", "all"])
def test_a_launch_killed_while_it_saves_ends_as_if_it_never_was(killed_launches, victim):
    base, seen = killed_launches
    torn, code, good, passed_over = seen[victim]
    assert torn and code != 0 and good is not None
    assert len(passed_over) <= 1 and all("manifest.json: missing" in line for line in passed_over)
    ours, theirs = (manifest.read(base / name / "step_8").files for name in (victim, "calm"))
    same = [name for name in ours if name == "model.safetensors" or name.endswith("_optim_states.pt")]
    assert len(same) == 3 and all(ours[name] == theirs[name] for name in same)


# -- when and how much -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saves(tmp_path_factory, tiny_yaml):
    base = tmp_path_factory.mktemp("saves")

    def case(name, *extra, stage=2):
        return Case(name, ("--config", str(tiny_yaml), "--output_dir", str(base / name), "training.save_interval=1",
                           "--deepspeed_config", str(ROOT / "ds_configs" / f"zero{stage}.json"), *extra))  # fmt: skip

    keep = ("training.keep_last=2", "training.keep_every=3")
    cases = [case("background", *keep)]
    cases += [case(f"{kind}_{stage}", "training.save_interval=0", f"training.async_save={kind == 'later'}", stage=stage)
              for stage in (2, 3) for kind in ("later", "at_once")]  # fmt: skip
    (base / "output.txt").write_text(run_cases(2, cases, base))
    return base


def test_retention_keeps_the_last_and_every_mth_and_says_what_goes(saves):
    tags = [found.tag for found in manifest.list_checkpoints(saves / "background")]
    assert tags == ["step_3", "step_5", "step_6"]
    assert "removed step_1: older than the 2 newest; step_3 is good" in (saves / "output.txt").read_text()


def test_every_save_reports_its_stall_and_its_background(saves):
    told = events(saves / "background", "save")
    assert [e["step"] for e in told] == [1, 2, 3, 4, 5, 6]
    assert all(e["save_stall_seconds"] > 0 and e["save_background_seconds"] > 0 for e in told)
    assert all(e["save_background_cpu_seconds"] > 0 for e in told)
    assert all(e["save_background_seconds"] == 0 for e in events(saves / "at_once_2", "save"))


@pytest.mark.parametrize("stage", [2, 3])
def test_what_is_written_in_the_background_is_what_is_written_at_once(saves, stage):
    later, at_once = (manifest.read(saves / f"{kind}_{stage}" / "step_6").files for kind in ("later", "at_once"))
    assert later.keys() == at_once.keys()
    same = [name for name in later if name == "model.safetensors" or name.endswith("_optim_states.pt")]
    assert len(same) == 3 and all(later[name] == at_once[name] for name in same)


def test_a_snapshot_is_a_copy_in_memory_that_is_used_again():
    buffers, live = HostBuffers(pin=False), {"a": torch.arange(8.0), "b": [torch.ones(2)], "n": 3}
    first = host_tree(live, "file", buffers)
    memory = first["a"].data_ptr()
    live["a"] += 1
    live["b"][0].zero_()
    assert first["a"].tolist() == list(range(8)) and first["b"][0].tolist() == [1, 1] and first["n"] == 3
    second = host_tree(live, "file", buffers)
    assert second["a"].data_ptr() == memory and second["a"].tolist() == list(range(1, 9))
    assert host_tree(torch.arange(6.0)[:2], "view", None).untyped_storage().nbytes() == 8  # not the whole storage


def test_too_little_disk_is_refused_before_the_launch_and_before_each_save(tmp_path, tiny_yaml, monkeypatch, capsys):
    monkeypatch.setattr(manifest, "free_bytes", lambda path: 2**20)
    assert train.main(["--config", str(tiny_yaml), "--output_dir", str(tmp_path / "run")]) == 3
    assert "a checkpoint needs" in capsys.readouterr().err and not (tmp_path / "run").exists()
    alone = World(0, 1, 0, 1, torch.device("cpu"))
    saver = Saver(None, alone, tmp_path, background=True, retention=Retention(None, None), bytes_needed=2**21,
                  published=print)  # fmt: skip
    assert "a checkpoint needs 0.00 GiB and 0.00 GiB are free" in saver._prepare(tmp_path / "step_1")


def test_after_one_signal_the_next_ends_the_process_at_once():
    trainer = object.__new__(Trainer)
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        trainer._on_signal(signal.SIGUSR1, None)
        assert trainer._stop_signal == signal.SIGUSR1
        assert all(signal.getsignal(number) is signal.SIG_DFL for number in (signal.SIGTERM, signal.SIGUSR1))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
