"""Real launchers: what happens when a rank dies or hangs, and what is refused before there is a process group."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
import yaml
from support import launching
from support.launching import ROOT, Case, free_port, rank_environment, run_cases, start_training, train_alone
from support.tiny_dataset import write_dataset

from gsa.checkpoint import manifest
from gsa.checkpoint.full_state import read_run_state
from training import checkpoints, report, train
from training.config.command import run_command
from training.engine.launcher import output_dir, true_code
from training.observe.terminal import LossyStream
from training.record.metrics_log import read_rows
from training.record.run_folder import RunFolder

WAIT_S = 60
"""A rank that dies or hangs is to be reported within a minute."""


def started(tmp_path: Path, tiny_yaml: Path, *extra: str):
    """Starts two ranks under `deepspeed` and waits for a few steps. Returns the launcher, the folder and the ranks' pids."""
    folder = tmp_path / "run"
    process = start_training(
        2,
        [
            "--config",
            str(tiny_yaml),
            "--output_dir",
            str(folder),
            "training.max_steps=1000000",
            "training.eval_interval=0",
            *extra,
        ],
    )
    deadline = time.monotonic() + 400
    while not (folder / "metrics.jsonl").exists() or (folder / "metrics.jsonl").read_text().count('"loss"') < 5:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    time.sleep(2)  # until every rank's watchdog has read the others' files
    pids = [json.loads((folder / ".ranks" / f"rank_{r}.json").read_text())["pid"] for r in (0, 1)]
    return process, folder, pids


def test_a_rank_that_is_killed_is_named_within_a_minute(tmp_path, tiny_yaml):
    process, folder, pids = started(tmp_path, tiny_yaml)
    began = time.monotonic()
    os.kill(pids[1], signal.SIGKILL)
    output = process.communicate(timeout=WAIT_S)[0]
    assert time.monotonic() - began < WAIT_S and process.returncode != 0
    assert f"rank 1 (pid {pids[1]} on" in output and "died" in output, output[-3000:]
    assert not Path(f"/proc/{pids[0]}").exists()


def test_a_rank_that_hangs_is_named_with_stacks_within_a_minute(tmp_path, tiny_yaml):
    process, folder, pids = started(tmp_path, tiny_yaml, "training.hang_timeout_s=5")
    began = time.monotonic()
    os.kill(pids[1], signal.SIGSTOP)
    try:
        while not (folder / ".ranks" / "stacks_rank_0.txt").exists():
            assert time.monotonic() - began < WAIT_S
            time.sleep(0.2)
    finally:
        os.kill(pids[1], signal.SIGKILL)
    output = process.communicate(timeout=WAIT_S)[0]
    assert process.returncode != 0
    assert f"watchdog: rank 1 (pid {pids[1]} on" in output, output[-3000:]
    stacks = (folder / ".ranks" / "stacks_rank_0.txt").read_text()
    assert "trainer.py" in stacks and "watchdog.py" in stacks


# -- refusals: one rank, no launcher, no process group ----------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_yaml) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    done = train_alone(["--config", str(tiny_yaml), "--output_dir", str(folder), "training.max_steps=2"])
    assert done.returncode == 0, done.stderr
    return folder


def test_plain_python_is_one_rank(finished):
    assert json.loads((finished / "run.json").read_text())["world_size"] == 1
    assert (finished / "step_2" / "manifest.json").exists()


@pytest.mark.parametrize(
    "code, words, argv",
    [
        (2, "unknown key 'training.max_stepz'", ["training.max_stepz=1"]),
        (2, "not a multiple of training.micro_batch_size=3", ["training.micro_batch_size=3"]),
        (2, 'training.backend="tritn" must be one of auto, ', ["training.backend=tritn"]),
        (2, "training.backend=triton needs a GPU", ["training.backend=triton"]),
        (2, "stray first step", ["training.precision=bf16", "--deepspeed_config", "ds_configs/zero0.json"]),
        (2, "zero9.json: No such file", ["--deepspeed_config", "ds_configs/zero9.json"]),
        (2, "already holds a run; continue it with --resume_from auto", ["@finished"]),
        (
            2,
            "made with another model.d_head, model.d_model",
            ["@finished", "--resume_from", "latest", "model.d_model=64"],
        ),
        (
            2,
            "training.learning_rate (0.003 there, 0.01 here) differ",
            ["@finished", "--resume_from", "latest", "training.learning_rate=1e-2"],
        ),
        (3, "meant by 'step_77', does not exist", ["@finished", "--resume_from", "step_77"]),
        (3, "choose one of step_2", ["@finished", "--resume_from", "step_77"]),
        (3, "is not a prepared dataset", ["data.data_dir=nowhere"]),
        (3, "has 64 entries, more than model.vocab_size=32", ["model.vocab_size=32"]),
        (3, "latest does not exist", ["--resume_from", "latest"]),
        (3, "nowhere/config.json: cannot be read", ["training.init_from=nowhere"]),
        (
            2,
            "its weights do not fit: model.d_ffn (64 there, 32 here)",
            ["model.d_ffn=32", "training.init_from=@finished/step_2"],
        ),
        (3, "model.safetensors: its sha256 is not that of the manifest", ["@damaged", "--resume_from", "auto"]),
    ],
)
def test_bad_input_is_refused_before_any_process_group(
    tmp_path, tiny_yaml, finished, monkeypatch, capsys, code, words, argv
):
    folder = tmp_path / "new"
    if argv[0] in ("@finished", "@damaged"):
        folder = tmp_path / "copy"
        shutil.copytree(finished, folder)
        if argv[0] == "@damaged":
            path = folder / "step_2" / "model.safetensors"
            raw = bytearray(path.read_bytes())
            raw[-5] ^= 16
            path.write_bytes(raw)
            argv = ["@damaged", "--resume_from", "step_2"]
        argv = argv[1:]
    argv = [word.replace("@finished", str(finished)) for word in argv]
    before = sorted(folder.rglob("*")) if folder.exists() else []
    monkeypatch.setitem(sys.modules, "training.engine.engine", None)  # importing DeepSpeed would raise
    assert train.main(["--config", str(tiny_yaml), "--output_dir", str(folder), *argv]) == code
    printed = capsys.readouterr().err
    assert words in printed and printed.count("error:") == 1 and "Traceback" not in printed
    assert (sorted(folder.rglob("*")) if folder.exists() else []) == before


def test_a_refusal_under_a_launcher_is_printed_once_and_sets_the_exit_code(tmp_path, tiny_yaml):
    process = start_training(2, ["--config", str(tiny_yaml), "--output_dir", str(tmp_path / "x"), "training.seeed=1"])
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 2
    assert (
        output.count("error: override 'training.seeed=1': unknown key 'training.seeed'; did you mean training.seed")
        == 1
    )


@pytest.fixture(scope="module")
def resumed(tmp_path_factory, tiny_yaml, finished) -> tuple[Path, str]:
    """The folders `torn`, `dead` and `other`, each resumed once, and what the two that went on printed."""
    base = tmp_path_factory.mktemp("resumed")
    shutil.copytree(finished, base / "torn")
    (base / "torn" / "step_4").mkdir()
    (base / "torn" / "step_4" / "mp_rank_00_model_states.pt").write_bytes(b"half")
    dead = base / "dead"  # a run that was killed before its first checkpoint
    dead.mkdir()
    (dead / "run.json").write_text('{"status": "running"}')
    (dead / "metrics.jsonl").write_text('{"event": "start", "step": 0}\n{"step": 1, "loss": 9.0}\n{"step": 2, "lo')
    write_dataset(base / "text", [[1, 2, 3]] * 400, vocab_size=64, held_out=[[1, 2]])
    moved = base / "moved.yaml"  # the same configuration, but the text at its data_dir is replaced
    shutil.copytree(data_of(tiny_yaml), base / "data")
    moved.write_text(tiny_yaml.read_text().replace(str(data_of(tiny_yaml)), str(base / "data")))
    first = ["--config", str(moved), "--output_dir", str(base / "other"), "training.max_steps=2"]
    assert train_alone(first).returncode == 0
    shutil.rmtree(base / "data")
    shutil.copytree(base / "text", base / "data")
    (base / "refused.txt").write_text(train_alone([*first, "--resume_from", "latest", "training.max_steps=3"]).stderr)

    def case(name, config, resume, code=0):
        return Case(
            name,
            (
                "--config",
                str(config),
                "--output_dir",
                str(base / name),
                "--resume_from",
                resume,
                "training.max_steps=3",
            ),
            code,
        )

    output = run_cases(1, [case("torn", tiny_yaml, "auto"), case("dead", tiny_yaml, "auto")], base)
    return base, output


def data_of(tiny_yaml: Path) -> Path:
    return Path(yaml.safe_load(tiny_yaml.read_text())["data"]["data_dir"])


def steps_of(folder: Path) -> list[int]:
    return [row["step"] for row in read_rows(folder / "metrics.jsonl") if "loss" in row]


def test_auto_passes_over_a_torn_checkpoint_and_resumes_the_newest_good_one(resumed):
    base, output = resumed
    assert "passed over: step_4: manifest.json: missing: the save was interrupted" in output
    assert "resumed step_2: continuing at step 3 of 3" in output
    assert "step_4 lies after the step resumed from, and its save was interrupted: removed" in output
    assert not (base / "torn" / "step_4").exists()
    assert steps_of(base / "torn") == [1, 2, 3]


def test_auto_starts_afresh_where_a_run_died_before_its_first_checkpoint(resumed):
    """Rows of the dead run once stayed in the file, so that the curve began twice; the soak test found it."""
    base, output = resumed
    assert f"there has been no checkpoint under {base / 'dead'}: starting a run" in output
    assert steps_of(base / "dead") == [1, 2, 3]
    assert read_rows(base / "dead" / "segments" / "metrics_0.jsonl") == [{"step": 1, "loss": 9.0}]


def test_a_resume_on_other_text_is_refused(resumed):
    base, _ = resumed
    assert "error: step_2 was trained on other text: the data's fingerprint is" in (base / "refused.txt").read_text()
    assert steps_of(base / "other") == [1, 2] and not (base / "other" / "step_3").exists()


def test_a_checkpoint_of_another_run_cannot_be_resumed_into_a_folder_that_holds_a_run(
    tmp_path, tiny_yaml, finished, capsys
):
    shutil.copytree(finished, tmp_path / "own")
    argv = [
        "--config",
        str(tiny_yaml),
        "--output_dir",
        str(tmp_path / "own"),
        "--resume_from",
        str(finished / "step_2"),
    ]
    assert train.main(argv) == 2
    assert "belongs to another; give a new --output_dir" in capsys.readouterr().err


def test_exit_process_runs_exit_handlers_but_not_the_interpreters_shutdown():
    """gloo's threads sometimes abort during that shutdown; the object here always does."""
    program = """
import atexit, os, sys
from training.engine.world import exit_process
class AbortsAtShutdown:
    def __del__(self):
        os.abort()
keep = AbortsAtShutdown()
atexit.register(print, "the handler ran")
print("printed")
exit_process(3)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=rank_environment(), cwd=ROOT
    )
    assert (done.returncode, done.stdout) == (3, "printed\nthe handler ran\n"), done.stderr


def test_help_lists_every_key():
    done = train_alone(["--help"])
    assert done.returncode == 0
    assert "--resume_from" in done.stdout and "indexer_loss_weight (float, default 0.1, at least 0)" in done.stdout


def test_without_a_key_wandb_runs_offline_and_its_failure_does_not_stop_training(tmp_path, tiny_yaml, monkeypatch):
    environment = {k: v for k, v in launching.rank_environment().items() if k != "WANDB_MODE"}
    environment["HOME"] = str(tmp_path)  # no netrc
    monkeypatch.setattr(launching, "rank_environment", lambda: environment)
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "wandb").write_text("a file where W&B wants a folder")
    argv = ("--config", str(tiny_yaml), "training.max_steps=2", "logging.wandb=true", "--output_dir")
    environment |= {"WANDB_RUN_ID": "agentid1", "WANDB_SWEEP_ID": "swp123"}  # as `wandb agent` sets them
    output = run_cases(
        1, [Case("free", (*argv, str(tmp_path / "free"))), Case("blocked", (*argv, str(blocked)))], tmp_path
    )
    assert list((tmp_path / "free" / "wandb").glob("offline-run-*-agentid1/run-agentid1.wandb"))
    assert json.loads((tmp_path / "free" / "run.json").read_text())["tracking_id"] == "agentid1"
    assert read_run_state(tmp_path / "free" / "step_2").tracking_id == "agentid1"
    assert "could not finish" not in output
    assert "no key found, so this run is tracked offline" in output
    assert list((tmp_path / "free" / "wandb").glob("offline-run-*")), output
    assert (blocked / "step_2" / "manifest.json").exists()
    assert output.count("W&B could not start (NotADirectoryError") == 1
    assert "training goes on, metrics.jsonl has every row" in output


EVENTS = {
    "SIGTERM": 1,
    "SIGUSR1 to rank 1": 2,
    "its child dies": 1,
    "SIGHUP, then SIGTERM": 1,
    "before there is a rank": 1,
}
"""What happens to a launch under training.launch -> its number of ranks."""


@pytest.fixture(scope="module")
def wrapped(tmp_path_factory, tiny_yaml) -> dict[str, tuple[Path, int, str]]:
    """Launches under training.launch, run in parallel, each with its event: folder, exit code, output."""
    folders = {event: tmp_path_factory.mktemp("wrapped") / "run" for event in EVENTS}
    long_steps = {"SIGHUP, then SIGTERM": ["training.global_batch_size=8000"]}  # so that no step ends in between

    def hang_up(ignored: bool) -> None:  # as nohup does
        signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)

    processes = {
        event: subprocess.Popen(
            [
                sys.executable,
                "-m",
                "training.launch",
                "--num_gpus",
                str(EVENTS[event]),
                "--master_port",
                str(free_port()),
                "training/train.py",
                "--config",
                str(tiny_yaml),
                "--output_dir",
                str(folder),
                "training.max_steps=100000",
                "training.eval_interval=0",
                *long_steps.get(event, []),
            ],
            cwd=ROOT,
            env=rank_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            preexec_fn=partial(hang_up, event == "before there is a rank"),
        )
        for event, folder in folders.items()
    }

    def until(true, event: str) -> None:
        deadline = time.monotonic() + 400
        while not true():
            assert processes[event].poll() is None and time.monotonic() < deadline, event
            time.sleep(0.05)

    ended = {}
    try:
        early = processes["before there is a rank"]
        until(lambda: psutil.Process(early.pid).children(), "before there is a rank")
        early.send_signal(signal.SIGHUP)  # ignored
        time.sleep(0.3)
        early.send_signal(signal.SIGTERM)
        for event in ("SIGTERM", "SIGUSR1 to rank 1", "its child dies"):
            until(lambda folder=folders[event]: folder.exists() and len(steps_of(folder)) > 3, event)
        processes["SIGTERM"].send_signal(signal.SIGTERM)
        os.kill(watched(folders["SIGUSR1 to rank 1"], 1)["pid"], signal.SIGUSR1)
        children = psutil.Process(processes["its child dies"].pid).children(recursive=True)
        next(c for c in children if "deepspeed.launcher.launch" in " ".join(c.cmdline())).kill()
        twice, folder = processes["SIGHUP, then SIGTERM"], folders["SIGHUP, then SIGTERM"]
        until(
            lambda: (folder / ".ranks" / "rank_0.json").exists() and watched(folder, 0)["count"] > 50,
            "SIGHUP, then SIGTERM",
        )
        twice.send_signal(signal.SIGHUP)
        time.sleep(1.0)
        still = watched(folder, 0)["count"]
        until(lambda: watched(folder, 0)["count"] > still, "SIGHUP, then SIGTERM")  # it goes on to the end of its step
        twice.send_signal(signal.SIGTERM)
        for event, process in processes.items():
            output = process.communicate(timeout=240)[0]
            ended[event] = (folders[event], process.returncode, output)
    except BaseException:
        for folder in folders.values():
            for process in processes_of(folder):
                process.kill()
        raise
    return ended


def processes_of(folder: Path) -> list[psutil.Process]:
    return [p for p in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(p.info["cmdline"] or [])]


def watched(folder: Path, rank: int) -> dict:
    """A rank's last sign of life."""
    return json.loads((folder / ".ranks" / f"rank_{rank}.json").read_text())


@pytest.mark.parametrize("event", EVENTS)
def test_training_launch_leaves_no_process_behind(wrapped, event):
    assert not processes_of(wrapped[event][0])


@pytest.mark.parametrize(("event", "reason"), [("SIGTERM", "SIGTERM"), ("SIGUSR1 to rank 1", "SIGUSR1")])
def test_after_a_signal_all_ranks_save_and_exit_in_order(wrapped, event, reason):
    """The signal is sent to training.launch only, or to one of two ranks only."""
    folder, code, output = wrapped[event]
    assert code == 0, output[-3000:]
    run = json.loads((folder / "run.json").read_text())
    assert (run["status"], run["reason"]) == ("stopped", reason)
    manifest.verify(folder / f"step_{steps_of(folder)[-1]}")


def test_a_killed_child_is_a_failure_although_the_launcher_returns_0(wrapped):
    _, code, output = wrapped["its child dies"]
    assert code != 0, output[-3000:]


def test_a_closed_terminal_counts_as_a_signal_and_a_second_signal_ends_the_ranks_at_once(wrapped):
    folder, code, output = wrapped["SIGHUP, then SIGTERM"]
    assert code == 128 + signal.SIGTERM, output[-3000:]
    assert steps_of(folder) == [] and not list(folder.glob("step_*"))


def test_a_run_can_go_on_printing_after_its_terminal_was_closed():
    ours, theirs = os.openpty()
    with os.fdopen(theirs, "w") as stream:
        terminal = LossyStream(stream)
        print("shown", file=terminal, flush=True)
        assert terminal.isatty() and os.read(ours, 100) == b"shown\r\n"
        os.close(ours)
        for _ in range(3):
            print("dropped", file=terminal, flush=True)


def test_a_second_launch_is_refused_and_a_killed_one_is_called_dead(tmp_path, tiny_yaml, capsys):
    run = tmp_path / "run"
    argv = [
        "--config",
        str(tiny_yaml),
        "--output_dir",
        str(run),
        "training.save_interval=2",
        "training.eval_interval=0",
    ]
    first = start_training(1, [*argv, "training.max_steps=100000"], launcher="python")
    while not (run / "step_4").exists():
        assert first.poll() is None
        time.sleep(0.1)
    assert train.main([*argv, "--resume_from", "auto", "training.max_steps=3"]) == 2
    assert f"{run} is in use by training/train.py (pid {first.pid} on " in capsys.readouterr().err
    prune = ["prune", str(run), "--keep_last", "1", "--yes"]
    assert run_command(checkpoints.main, prune) == 2
    assert f"(pid {first.pid} on " in capsys.readouterr().err
    os.kill(first.pid, signal.SIGKILL)
    first.communicate(timeout=60)
    assert RunFolder(run).status() == "died"
    assert report.main([str(run)]) == 0
    assert f"died: training/train.py (pid {first.pid} on " in (run / "report.md").read_text()
    assert run_command(checkpoints.main, prune) == 0  # nobody owns it any more
    kept = steps_of(run)
    assert kept == list(range(1, len(kept) + 1)) and not (run / "segments").exists()


def test_a_run_needs_no_output(tmp_path, tiny_yaml):
    """A full log disk, a reader that has gone (`| head`), and descriptors that were closed before the start."""

    def run(name: str, **streams) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "training/train.py", "--config", str(tiny_yaml), "--output_dir", str(tmp_path / name)],
            cwd=ROOT,
            env=rank_environment(),
            **streams,
        )

    with open("/dev/full", "w") as full:
        runs = {"full": run("full", stdout=full, stderr=full)}
    runs["closed"] = run("closed", preexec_fn=lambda: os.closerange(0, 3))
    reading, writing = os.pipe()
    runs["head"] = run("head", stdout=writing, stderr=writing)
    os.close(writing)
    os.close(reading)
    for name, process in runs.items():
        assert process.wait(timeout=300) == 0, name
        assert json.loads((tmp_path / name / "run.json").read_text())["status"] == "finished"
        rows = read_rows(tmp_path / name / "metrics.jsonl")  # nothing that was printed went into a file
        assert [row["step"] for row in rows if "loss" in row] == list(range(1, len(steps_of(tmp_path / name)) + 1))


def test_a_signal_before_there_is_a_rank_ends_the_launch(wrapped):
    folder, code, output = wrapped["before there is a rank"]
    assert code == 128 + signal.SIGTERM, output[-3000:]
    assert not folder.exists()


def test_exit_code_0_without_a_readable_run_json_counts_as_a_failure(tmp_path):
    (tmp_path / "run.json").write_bytes(b"")
    assert true_code(0, 0, tmp_path) == 1 and true_code(0, 0, tmp_path / "none") == 0
    assert true_code(241, 0, tmp_path) == true_code(-15, 0, tmp_path) == 143


@pytest.mark.parametrize("flag", ["--output_dir", "--output-dir"])
def test_the_launcher_finds_the_run_folder_in_either_spelling(flag):
    words = ["--num_gpus", "2", "training/train.py"]
    assert output_dir([*words, flag, "outputs/x"]) == output_dir([*words, f"{flag}=outputs/x"]) == Path("outputs/x")
