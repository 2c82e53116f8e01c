"""W&B with the real package, offline, read back with wandb's own reader; TensorBoard, read back with its accumulator.

The wandb package is replaced by a stand-in only where a call of it has to fail or hang; online runs talk to a stand-in
for W&B's server.
"""

from __future__ import annotations

import dataclasses
import http.server
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from support.launching import ROOT, clean_environment, free_port
from wandb.util import get_core_path

from training import tracking
from training.config import ConfigError, LoggingConfig, RunConfig, to_plain
from training.config.command import run_command
from training.observe.tracking import wandb_files, wandb_sink
from training.observe.tracking.mirror import Limits, by_step, chart_fields
from training.observe.tracking.run_identity import identify_run
from training.observe.tracking.tracker import Tracker
from training.observe.tracking.tracking_state import Parent, TrackingState, launch_config
from training.record.metrics_log import MetricsLog, read_rows
from training.record.run_folder import RunFolder

CONFIG = to_plain(RunConfig())
RUN = "abcd1234"
OFFER_S, BUSY_S, HANG_S = 1e-3, 0.1, 60
"""Bounds for one call of `offer`: the median, the slowest (a busy machine stops any thread for some milliseconds), and
how long a stand-in that hangs does not return."""

WANDB, BOARD = LoggingConfig(wandb=True), LoggingConfig(tensorboard=True)


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """No test reaches a server or a wandb service that it has not started itself."""
    os.environ.pop("WANDB_SERVICE", None)  # not by monkeypatch, which would put the dead address back
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    yield
    os.environ.pop("WANDB_SERVICE", None)


def wandb_environment() -> dict[str, str]:
    """A clean environment with the variables that this test has set for wandb."""
    names = ("HOME", "WANDB_MODE", "WANDB_ERROR_REPORTING", "WANDB_API_KEY", "WANDB_BASE_URL")
    return clean_environment() | {name: os.environ[name] for name in names if name in os.environ}


def row(step: int) -> dict:
    return {"step": step, "tokens": 100 * step, "loss": 1 / step, "lr": 1e-3, "time": 1e9 + step}


def evaluation(step: int) -> dict:
    return {"event": "eval", "step": step, "eval_loss": 2.0, "eval_bpb": 1 / step, "unigram_bpb": 3.0, "time": 1e9}


class TrackedLaunch:
    """One launch of a run, reported as the trainer does it: every row goes to metrics.jsonl and to the tracker."""

    def __init__(
        self, folder: Path, cfg: LoggingConfig = WANDB, *, step: int = 0, limits: Limits | None = None, **more
    ):
        folder.mkdir(exist_ok=True)
        kept = [old for old in read_rows(folder / "metrics.jsonl") if old["step"] <= step]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(old) + "\n" for old in kept))
        self.log = MetricsLog(folder / "metrics.jsonl", print)
        self.tracker = Tracker(
            cfg, output_dir=folder, run_id=RUN, config=more.pop("config", CONFIG), step=step, limits=limits, **more
        )
        self.seconds: list[float] = []

    def offer(self, *rows: dict) -> None:
        for given in rows:
            self.log.write(given)
            began = time.perf_counter()
            self.tracker.offer(given)
            self.seconds.append(time.perf_counter() - began)

    def train(self, first: int, last: int) -> TrackedLaunch:
        for step in range(first, last + 1):
            self.offer(row(step), *([evaluation(step)] if step % 3 == 0 else []))
        return self

    def never_waited(self) -> bool:
        """One call may coincide with a pause of the whole machine; a service that hangs does so for HANG_S."""
        seconds = sorted(self.seconds)
        return seconds[len(seconds) // 2] < OFFER_S and seconds[-2] < BUSY_S and seconds[-1] < HANG_S / 10

    def end(self, code: int = 0) -> float:
        began = time.perf_counter()
        self.tracker.finish(code)
        self.log.close()
        return time.perf_counter() - began


def inspect(file: Path) -> list[dict]:
    """The records of a transaction log, read by wandb's own reader."""
    command = [get_core_path(), "leet", "inspect", "-no-observability", "-json", "-run-file", str(file)]
    done = subprocess.run(
        command, env=wandb_environment(), capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def records(folder: Path, kind: str) -> list[dict]:
    """Records of one kind from the files of all launches, oldest first."""
    files = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    return [record[kind] for file in files for record in inspect(file) if record["type"] == kind]


def shown(folder: Path) -> dict[int, dict]:
    """Fields by step. Fails when a step appears twice or moves backwards, over the files of all launches together."""
    history = [record["item"] for record in records(folder, "history")]
    steps = [fields["_step"] for fields in history]
    assert steps == sorted(set(steps)), steps
    assert steps == [fields["step"] for fields in history]
    return dict(zip(steps, history, strict=True))


def config_of(folder: Path) -> dict:
    return records(folder, "config")[-1]["update"]


# -- one run, one curve ---------------------------------------------------------------------------------


def test_wandb_logs_a_step_once_with_its_evaluation_and_events(tmp_path):
    launch = TrackedLaunch(tmp_path).train(1, 4)
    launch.offer({"event": "save", "step": 3, "tag": "step_3", "bytes": 5, "save_stall_seconds": 0.5, "time": 1e9})
    launch.train(5, 6).end()
    found = shown(tmp_path)
    assert list(found) == [1, 2, 3, 4, 5, 6]
    assert (found[3]["loss"], found[3]["eval_bpb"], found[3]["eval/unigram_bpb"]) == (1 / 3, 1 / 3, 3.0)
    assert "eval_bpb" not in found[4]
    assert (found[4]["save_stall_seconds"], found[4]["save/bytes"]) == (0.5, 5)  # when it was published
    assert found[6]["_timestamp"] == 1e9 + 6 and found[6]["eval_loss"] == 2.0


def test_losses_are_logged_by_step_and_by_tokens(tmp_path):
    TrackedLaunch(tmp_path).train(1, 3).end()
    by = {m.get("name") or m["glob_name"]: m.get("step_metric") for m in records(tmp_path, "metric")}
    assert by == {
        "step": None,
        "tokens": None,
        "by_tokens/loss": "tokens",
        "by_tokens/eval_loss": "tokens",
        "by_tokens/eval_bpb": "tokens",
        "*": "step",
    }
    third = shown(tmp_path)[3]
    assert (third["tokens"], third["by_tokens/loss"], third["by_tokens/eval_bpb"]) == (300, 1 / 3, 1 / 3)


def test_a_resumed_launch_continues_the_run_and_holds_replayed_steps_back(tmp_path):
    TrackedLaunch(tmp_path).train(1, 8).end()
    TrackedLaunch(tmp_path, step=4, segment=1).train(5, 12).end()
    runs = records(tmp_path, "run")
    assert [run["run_id"] for run in runs] == [RUN, RUN] and all(run["resume"] for run in runs)
    assert list(shown(tmp_path)) == list(range(1, 13))


ENDS = {
    "power cut": """
core = core_of_this_process()
core.suspend()  # it writes nothing of what it receives from here on
launch.train(21, 40)
wait_for(lambda: sent(launch) == 39)
core.kill()
os.kill(os.getpid(), signal.SIGKILL)""",
    "failed": "launch.train(21, 40); exit_process(4)",
    "failed, wandb-core hung": "core_of_this_process().suspend(); exit_process(4)",
}


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> dict[str, tuple[Path, int, str]]:
    """Three processes that end without a call of Tracker.finish, run at once: run folder, exit code, stderr."""
    base = tmp_path_factory.mktemp("ended")
    environment = clean_environment() | {
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests" / "training"))),
        "OMP_NUM_THREADS": "1",
        "WANDB_MODE": "offline",
        "WANDB_ERROR_REPORTING": "false",
        "HOME": str(base),
    }
    program = """
from test_tracking import *
from training.engine.world import exit_process
launch = TrackedLaunch(Path({folder!r}), limits=Limits(finish_s={finish_s})).train(1, 20)
wait_for(lambda: sent(launch) == 19)  # the last one is sent when the next begins
{end}
"""
    processes = {
        how: subprocess.Popen(
            [
                sys.executable,
                "-c",
                program.format(folder=str(base / how), end=end, finish_s=2 if "hung" in how else 60),
            ],
            env=environment,
            text=True,
            stderr=subprocess.PIPE,
        )
        for how, end in ENDS.items()
    }
    found = {}
    try:
        for how, process in processes.items():
            stderr = process.communicate(timeout=300)[1]
            found[how] = (base / how, process.returncode, stderr)
    finally:
        for process in processes.values():
            if process.poll() is None:
                for child in psutil.Process(process.pid).children():  # wandb-core has a session of its own
                    child.kill()
                process.kill()
    return found


def test_steps_lost_in_a_power_cut_are_sent_by_the_next_launch(ended, tmp_path):
    folder, code, stderr = ended["power cut"]
    assert code == -signal.SIGKILL, stderr
    shutil.copytree(folder, tmp_path / "run")
    assert len(shown(tmp_path / "run")) < 21
    TrackedLaunch(tmp_path / "run", step=36, segment=1).train(37, 41).end()
    assert list(shown(tmp_path / "run")) == list(range(1, 42))


def test_a_failed_process_sends_all_steps_and_marks_the_run_failed(ended):
    folder, code, stderr = ended["failed"]
    assert code == 4 and stderr == "", stderr
    assert list(shown(folder)) == list(range(1, 41))
    assert records(folder, "exit")[-1]["exit_code"] == 1


def test_a_failed_process_ends_although_wandb_core_hangs(ended):
    _, code, stderr = ended["failed, wandb-core hung"]
    assert code == 4 and stderr.startswith("W&B could not finish (no answer for 2 s)") and stderr.count("\n") == 1, (
        stderr
    )


def test_steps_trained_again_after_a_rollback_are_sent_once(tmp_path):
    launch = TrackedLaunch(tmp_path).train(1, 6)
    launch.offer(
        {"event": "spike", "step": 6, "spike_loss": 9.0, "score": 8.0, "samples": [1, 2], "action": "rollback"}
    )
    launch.train(4, 9).end()
    found = shown(tmp_path)
    assert list(found) == list(range(1, 10)) and found[6]["spike/score"] == 8.0


def test_steps_trained_without_wandb_are_sent_on_resume(tmp_path):
    TrackedLaunch(tmp_path, LoggingConfig()).train(1, 5).end()
    assert not (tmp_path / "wandb").exists()
    TrackedLaunch(tmp_path, step=4, segment=1).train(5, 7).end()
    found = shown(tmp_path)
    assert list(found) == list(range(1, 8)) and found[3]["eval_bpb"] == 1 / 3


def test_steps_whose_files_were_removed_are_not_sent_again(tmp_path):
    """`wandb clean` removes what has been uploaded; the last step that was sent is stored in tracking.json."""
    TrackedLaunch(tmp_path).train(1, 8).end()
    shutil.rmtree(tmp_path / "wandb")
    assert TrackingState.read(tmp_path, RUN).step == 8
    TrackedLaunch(tmp_path, step=6, segment=1).train(7, 9).end()
    assert list(shown(tmp_path)) == [9]


def changed(lr: float, warmup: int) -> dict:
    cfg = RunConfig()
    return to_plain(
        dataclasses.replace(cfg, training=dataclasses.replace(cfg.training, learning_rate=lr, warmup_steps=warmup))
    )


def test_the_runs_configuration_holds_that_of_every_launch(tmp_path):
    ran_with = [changed(3e-4, 100), changed(3e-4, 100), changed(1e-4, 50), changed(2e-4, 50)]
    for number, config in enumerate(ran_with):
        TrackedLaunch(tmp_path, step=number, segment=number, config=config).train(number + 1, number + 1).end()
    found = config_of(tmp_path)
    assert found["training"] == ran_with[-1]["training"]
    segments = found["segments"]
    assert segments["1"] == {"step": 1, "changed": {}}
    assert segments["2"]["changed"] == {"training.learning_rate": [3e-4, 1e-4], "training.warmup_steps": [100, 50]}
    assert [launch_config(segments, number) for number in range(4)] == ran_with
    assert "parent" not in found


def test_a_fork_has_its_parent_in_its_configuration(tmp_path):
    TrackedLaunch(tmp_path, parent=Parent("feedbeef", 40)).train(41, 42).end()
    assert config_of(tmp_path)["parent"] == {"id": "feedbeef", "step": 40}


@pytest.mark.parametrize("agent", [{"WANDB_RUN_ID": RUN, "WANDB_SWEEP_ID": "swp123"}, {"WANDB_SWEEP_ID": "swp123"}])
def test_under_a_sweep_the_run_ends_whole_under_its_id(agent, tmp_path, monkeypatch, capfd):
    for name in ("WANDB_RUN_ID", "WANDB_SWEEP_ID"):
        monkeypatch.setenv(name, "")  # so that what wandb leaves behind goes away
        monkeypatch.delenv(name)
    for name, value in agent.items():
        monkeypatch.setenv(name, value)
    TrackedLaunch(tmp_path).train(1, 4).end()
    assert "could not" not in capfd.readouterr().err
    assert sorted(shown(tmp_path)) == [1, 2, 3, 4]
    (file,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    assert file.name == f"run-{RUN}.wandb"


def test_the_id_that_an_agent_sets_is_the_runs(tmp_path, monkeypatch):
    def identity(cfg: LoggingConfig = WANDB, **run) -> str:
        folder = RunFolder(tmp_path)
        if run:
            folder.update_run(**run)
        return identify_run(RunConfig(logging=cfg), folder, None, continued=False).id

    monkeypatch.setenv("WANDB_RUN_ID", "agentid1")
    assert identity() == "agentid1" and identity(LoggingConfig()) != "agentid1"
    with pytest.raises(ConfigError, match=r"logging.run_id=mine is not .* WANDB_RUN_ID=agentid1; give one"):
        identity(LoggingConfig(wandb=True, run_id="mine"))
    assert identity(tracking_id="older") == "agentid1"  # the next trial in the same folder
    monkeypatch.setenv("WANDB_RUN_ID", "a/b")
    with pytest.raises(ConfigError, match="letters, digits"):
        identity()
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert identity() == "older"
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_RUN_ID")
    assert identity() == "older"  # a requeue without the agent


def test_a_run_id_from_the_configuration_must_exist(tmp_path):
    launch = TrackedLaunch(tmp_path, LoggingConfig(wandb=True, run_id=RUN))
    assert launch.tracker._mirrors[0]._sink._run._resume == "must"
    launch.end()


@pytest.mark.parametrize(
    "break_it, words",
    [
        (lambda patch: patch.setitem(sys.modules, "wandb", None), "ModuleNotFoundError: import of wandb halted"),
        (
            lambda patch: patch.setattr(wandb_sink, "WandbRun", broken_package),
            "TypeError: Descriptors cannot be created",
        ),
        (lambda patch: patch.setenv("WANDB_BASE_URL", "http://[bad"), "ValueError: Invalid IPv6 URL"),
    ],
)
def test_a_broken_package_or_environment_costs_one_line_on_stderr(break_it, words, tmp_path, monkeypatch, capfd):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    break_it(monkeypatch)
    launch = TrackedLaunch(tmp_path).train(1, 3)
    launch.end()
    stderr = capfd.readouterr().err
    assert stderr.count("training goes on without it") == 1 and words in stderr and launch.tracker.shown_by == []
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 4


def broken_package(*args, **kwargs):
    raise TypeError("Descriptors cannot be created directly.\nIf this call came from a _pb2.py file, ...")


@pytest.mark.parametrize("run_id", ["..", "../step_10", "/abs", "a/b"])
def test_a_rebuild_refuses_an_id_that_is_a_path(run_id, copy, capsys):
    victim = copy / "step_10"
    victim.mkdir()
    (victim / "weights").write_text("precious")
    before = sorted(copy.rglob("*"))
    assert run_command(tracking.main, ["rebuild", str(copy), f"--run_id={run_id}"]) == 3
    assert "is not a W&B id" in capsys.readouterr().err and sorted(copy.rglob("*")) == before
    assert (victim / "weights").read_text() == "precious"


@pytest.mark.parametrize(
    "name, text", [("config.yaml", "[1, 2]"), ("run.json", '{"tracking_id": "../.."}'), ("run.json", '{"parent": 5}')]
)
def test_a_rebuild_refuses_a_damaged_folder(name, text, copy, capsys):
    (copy / name).write_text(text)
    before = sorted(copy.rglob("*"))
    assert run_command(tracking.main, ["rebuild", str(copy)]) == 3
    assert capsys.readouterr().err.startswith("error: ") and sorted(copy.rglob("*")) == before


def test_chart_fields_are_flat_numbers_and_strings():
    assert chart_fields({"step": 2, "loss": "nan", "layers": {"coverage": [0.5, None, 1.0]}, "time": 7.0}) == {
        "step": 2,
        "loss": pytest.approx(float("nan"), nan_ok=True),
        "layers/coverage/00": 0.5,
        "layers/coverage/02": 1.0,
        "_timestamp": 7.0,
    }
    assert chart_fields({"event": "sample", "step": 2, "prompt": "def f", "text": "(x):"}) == {
        "sample/def_f": "def f(x):"
    }
    assert chart_fields({"event": "receipt", "step": 2, "identical": True, "first_difference": None, "time": 7.0}) == {
        "receipt/identical": 1
    }
    assert list(
        by_step([{"event": "start", "step": 0}, row(1), {"event": "stop", "step": 1, "reason": "finished"}])
    ) == [(1, {**chart_fields(row(1)), "stop/reason": "finished"})]


# -- a failure of W&B never ends the training -------------------------------------------------------------------


class Broken:
    """A stand-in for the wandb package, one call of which raises or hangs."""

    def __init__(self, monkeypatch, call: str, how: str) -> None:
        self.call, self.how, self.rows, self.released = call, how, [], threading.Event()
        names = types.SimpleNamespace(CommError=ConnectionError)
        run = types.SimpleNamespace(
            config=types.SimpleNamespace(update=lambda *a, **k: None),
            define_metric=lambda *a, **k: None,
            log=lambda fields, step, commit: self._meet("log") or self.rows.append(step),
            finish=lambda exit_code: self._meet("finish"),
            starting_step=0,
            url="",
            dir="",
        )
        module = types.SimpleNamespace(
            setup=lambda settings: None,
            teardown=lambda: None,
            errors=names,
            Settings=lambda **k: None,
            init=lambda **k: self._meet("init") or run,
        )
        monkeypatch.setitem(sys.modules, "wandb", module)

    def _meet(self, call: str) -> None:
        if call == self.call and self.how == "hangs":
            self.released.wait(HANG_S)
        elif call == self.call:
            raise OSError(f"{call} does not work")


@pytest.mark.parametrize("how", ["raises", "hangs"])
@pytest.mark.parametrize(
    "call, words", [("init", "could not start"), ("log", "stopped taking rows"), ("finish", "could not finish")]
)
def test_a_failure_or_a_hang_prints_one_line_and_training_does_not_wait(
    tmp_path, monkeypatch, capsys, call, words, how
):
    broken = Broken(monkeypatch, call, how)
    monkeypatch.setattr(wandb_sink, "last_step", lambda path: 60)
    short = {"init": Limits(open_s=0.3), "log": Limits(call_s=0.3), "finish": Limits(finish_s=0.6)}[call]
    launch = TrackedLaunch(tmp_path, limits=short)
    for step in range(1, 61):
        launch.train(step, step)
        time.sleep(0.01)
    assert launch.end() < 2
    broken.released.set()
    stderr = capsys.readouterr().err
    why = f"(OSError: {call} does not work)" if how == "raises" else "(no answer for "
    assert stderr.count("W&B") == 1 and f"W&B {words} {why}" in stderr, stderr
    assert f"metrics.jsonl has every row: python -m training.tracking rebuild {tmp_path}" in stderr
    assert launch.never_waited()
    assert broken.rows == (list(range(1, 61)) if call == "finish" else [])


def test_a_full_queue_ends_the_mirror(tmp_path, monkeypatch, capsys):
    broken = Broken(monkeypatch, "log", "hangs")
    launch = TrackedLaunch(tmp_path, limits=Limits(rows=50)).train(1, 200)
    assert capsys.readouterr().err.count("W&B stopped taking rows (50 are waiting)") == 1
    assert launch.never_waited()
    broken.released.set()
    launch.end()


def core_of_this_process() -> psutil.Process:
    return next(child for child in psutil.Process().children() if child.name() == "wandb-core")


def wait_for(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def sent(launch: TrackedLaunch) -> int:
    """The last step that its sink has handed to wandb."""
    return vars(launch.tracker._mirrors[0]._sink).get("_last", 0)


def test_the_death_of_wandb_core_prints_one_line(tmp_path, capfd):
    launch = TrackedLaunch(tmp_path).train(1, 5)
    wait_for(lambda: sent(launch))
    core_of_this_process().kill()
    for step in range(6, 40):
        launch.train(step, step)
        time.sleep(0.01)
    launch.end()
    stderr = capfd.readouterr().err
    assert stderr.count("training goes on") == 1 and "W&B stopped taking rows (ConnectionResetError" in stderr, stderr
    TrackedLaunch(tmp_path, step=39, segment=1).train(40, 41).end()  # the next launch sends all steps
    assert list(shown(tmp_path)) == list(range(1, 42))


def test_a_wandb_core_that_hangs_blocks_neither_training_nor_finish(tmp_path, capfd):
    launch = TrackedLaunch(tmp_path, limits=Limits(call_s=0.5, finish_s=1)).train(1, 5)
    wait_for(lambda: sent(launch))
    core = core_of_this_process()
    core.suspend()
    began, step = time.monotonic(), 6
    while time.monotonic() - began < 2:
        launch.offer({**row(step), **{f"x{i}": float(i) for i in range(200)}})
        step += 1
        time.sleep(0.002)
    assert launch.end() < 5
    stderr = capfd.readouterr().err
    assert stderr.count("W&B stopped taking rows (no answer for ") == stderr.count("training goes on") == 1, stderr
    assert launch.never_waited()
    assert not core.is_running()


def test_a_full_disk_under_wandbs_files_prints_one_line(tmp_path, capfd, monkeypatch):
    """wandb-core drops what it cannot write and reports it only in a log on the same disk: here its files may not grow."""
    monkeypatch.setattr(wandb_sink, "DISK_CHECK_S", 0.4)
    launch = TrackedLaunch(tmp_path).train(1, 5)
    wait_for(lambda: sent(launch))
    resource.prlimit(core_of_this_process().pid, resource.RLIMIT_FSIZE, (70_000, 70_000))
    for step in range(6, 600):
        launch.offer({**row(step), **{f"x{i}": float(i) for i in range(20)}})
        time.sleep(0.003)
    launch.end()
    stderr = capfd.readouterr().err
    assert stderr.count("training goes on") == 1, stderr
    assert re.search(
        r"W&B stopped taking rows \(OSError: \S+ ends at step \d+ instead of \d+; [\d,]+ bytes are", stderr
    )


def test_rows_missing_at_the_end_are_reported(tmp_path, capfd):
    launch = TrackedLaunch(tmp_path).train(1, 5)
    wait_for(lambda: sent(launch))
    resource.prlimit(core_of_this_process().pid, resource.RLIMIT_FSIZE, (8_000, 8_000))
    launch.train(6, 200).end()
    stderr = capfd.readouterr().err
    assert stderr.count("training goes on") == 1 and "ends at step" in stderr and "instead of 200" in stderr, stderr


def test_a_run_with_a_key_but_no_network_is_tracked_offline(tmp_path, monkeypatch, capfd):
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(wandb_sink, "INIT_TIMEOUT_S", 1)
    TrackedLaunch(tmp_path).train(1, 5).end()
    stderr = capfd.readouterr().err
    assert stderr.count("W&B: no connection (") == 1 and "this launch is tracked offline" in stderr, stderr
    assert list(shown(tmp_path)) == [1, 2, 3, 4, 5]


# -- a wandb service that another process left behind -------------------------------------------------------

SERVICE_OF_ANOTHER_PROCESS = """
import os, wandb
wandb.setup(wandb.Settings(silent=True))
print(os.environ["WANDB_SERVICE"], flush=True)
input()
"""

TRACKED = """
import sys
from pathlib import Path
from training.config import LoggingConfig
from training.observe.tracking.run_identity import identify_run
from training.observe.tracking.tracker import Tracker
folder = Path(sys.argv[1])
folder.mkdir()
tracker = Tracker(LoggingConfig(wandb=True), output_dir=folder, run_id="abcd1234", config={})
for step in range(1, 4):
    tracker.offer({"step": step, "tokens": step, "loss": 1.0, "time": 1e9})
tracker.finish(0)
"""


def track_in_child(folder: Path, token: str) -> str:
    """Three steps tracked by a child process that inherits WANDB_SERVICE; returns its stderr."""
    done = subprocess.run(
        [sys.executable, "-c", TRACKED, str(folder)],
        cwd=ROOT,
        env=wandb_environment() | {"WANDB_SERVICE": token},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_an_inherited_service_is_used_while_it_runs_and_dropped_once_it_is_dead(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", SERVICE_OF_ANOTHER_PROCESS],
        env=wandb_environment(),
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as owner:
        token = owner.stdout.readline().strip()
        assert wandb_sink.service_answers(token), token
        assert track_in_child(tmp_path / "live", token) == ""
        owner.communicate("\n", timeout=60)
    assert not wandb_sink.service_answers(token), token
    stderr = track_in_child(tmp_path / "dead", token)
    for run in ("live", "dead"):
        assert list(shown(tmp_path / run)) == [1, 2, 3], stderr
    assert (
        stderr.count("\n") == 1 and f"no wandb service answers at the inherited address WANDB_SERVICE={token}" in stderr
    )


@pytest.mark.parametrize("token", ["garbage", "2-5-unix-/socket", "3-5-tcp-localhost-99999", "3-5-unix-/" + 200 * "x"])
def test_a_malformed_service_address_is_removed(token, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_SERVICE", token)
    wandb_sink.drop_dead_service()
    wandb_sink.drop_dead_service()
    assert "WANDB_SERVICE" not in os.environ
    assert capsys.readouterr().err.count(f"WANDB_SERVICE={token}, so it is ignored") == 1


@pytest.mark.parametrize("family", ["unix", "tcp"])
def test_a_service_answers_while_its_socket_listens(family, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # a socket's path may have about 100 characters
    port = free_port()
    where, token = {"unix": ("socket", "3-5-unix-socket"), "tcp": (("localhost", port), f"3-5-tcp-localhost-{port}")}[
        family
    ]
    with socket.socket(socket.AF_UNIX if family == "unix" else socket.AF_INET) as service:
        service.bind(where)
        service.listen()
        monkeypatch.setenv("WANDB_SERVICE", token)
        wandb_sink.drop_dead_service()
        assert os.environ["WANDB_SERVICE"] == token and capsys.readouterr().err == ""
    assert not wandb_sink.service_answers(token)  # the unix socket's file is still there


# -- online: a stand-in for W&B's server ------------------------------------------------------------------


class Server(http.server.ThreadingHTTPServer):
    """The part of W&B's server that wandb-core calls. runs: the history of each run by its id."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.runs: dict[str, list[dict]] = {}
        self.url = f"http://127.0.0.1:{self.server_port}"

    def steps(self, run: str = RUN) -> list[int]:
        return [fields["_step"] for fields in self.runs[run]]

    def answer(self, operation: str, asked: dict) -> dict:
        name = asked.get("name")
        project = {"id": "p", "name": "p", "entity": {"id": "e", "name": "e"}}
        rows = self.runs.get(name)
        if operation == "RunResumeStatus" and rows is None:
            return {"model": {**project, "bucket": None}}
        if operation == "RunResumeStatus":
            bucket = {
                "id": "b",
                "name": name,
                "displayName": name,
                "config": "{}",
                "tags": [],
                "wandbConfig": '{"t": {}}',
                "summaryMetrics": json.dumps(rows[-1] if rows else {}),
                "historyLineCount": len(rows),
                "historyTail": json.dumps([json.dumps(fields) for fields in rows[-1:]]),
                "eventsTail": "[]",
                "logLineCount": 0,
                "eventsLineCount": 0,
            }
            return {"model": {**project, "bucket": bucket}}
        if operation == "UpsertBucket":
            rows = self.runs.setdefault(name, [])
            bucket = {"id": "b", "name": name, "displayName": name, "config": "{}", "historyLineCount": len(rows)}
            return {"upsertBucket": {"bucket": {**bucket, "project": project}, "inserted": not rows}}
        assert operation == "CreateRunFiles", operation
        files = [{"name": file, "uploadUrl": f"{self.url}/file"} for file in asked["files"]]
        return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        reply: dict = {}
        if self.path == "/graphql":
            asked = json.loads(body)
            operation = re.search(r"(?:query|mutation)\s+(\w+)", asked["query"])[1]
            reply = {"data": self.server.answer(operation, asked.get("variables") or {})}
        elif "file_stream" in self.path:
            history = json.loads(body).get("files", {}).get("wandb-history.jsonl")
            if history:
                rows = self.server.runs[self.path.split("/")[-2]]
                rows[history["offset"] :] = [json.loads(line) for line in history["content"]]
        answer = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_PUT = do_POST

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    with Server() as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        monkeypatch.delenv("WANDB_MODE")
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
        monkeypatch.setenv("WANDB_BASE_URL", running.url)
        yield running
        running.shutdown()


def test_an_online_run_continues_after_the_servers_last_step(tmp_path, server, capfd):
    TrackedLaunch(tmp_path).train(1, 8).end()
    assert server.steps() == list(range(1, 9)) and capfd.readouterr().err == ""
    TrackedLaunch(tmp_path, step=4, segment=1).train(
        5, 9
    ).end()  # the server has steps 5 to 8 already: they are held back
    assert server.steps() == list(range(1, 10))
    assert capfd.readouterr().err == (
        f"W&B: run {RUN} already has the steps up to 8, so steps 5 to 8 of this launch are not sent\n"
    )
    del server.runs[RUN][6:]  # the server never received the last ones
    TrackedLaunch(tmp_path, step=8, segment=2).train(9, 11).end()
    assert server.steps() == list(range(1, 12)) and capfd.readouterr().err == ""
    assert server.runs[RUN][8]["eval_bpb"] == 1 / 9


def test_a_new_run_with_the_id_of_a_longer_one_prints_which_steps_are_not_sent(tmp_path, server, capfd):
    TrackedLaunch(tmp_path / "old").train(1, 5).end()
    TrackedLaunch(tmp_path / "new", LoggingConfig(wandb=True, run_id=RUN)).train(1, 7).end()
    advice = "leave logging.run_id unset to track this run as a new one"
    assert f"steps 1 to 5 of this launch are not sent; {advice}" in capfd.readouterr().err
    assert server.steps() == list(range(1, 8))


def test_a_run_id_that_the_server_does_not_have_is_refused(tmp_path, server, capfd):
    TrackedLaunch(tmp_path, LoggingConfig(wandb=True, run_id=RUN)).train(1, 2).end()
    stderr = capfd.readouterr().err
    assert f"W&B could not start (UsageError: Run ({RUN}) does not exist" in stderr and stderr.count("goes on") == 1, (
        stderr
    )
    assert RUN not in server.runs


def test_the_files_of_two_offline_launches_upload_as_one_run(tmp_path, server, monkeypatch):
    """With plain `wandb sync`, which would put repeated steps behind the others: no step may be repeated."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    TrackedLaunch(tmp_path).train(1, 8).end()
    TrackedLaunch(tmp_path, step=4, segment=1).train(5, 12).end()
    monkeypatch.delenv("WANDB_MODE")
    sync(*sorted(tmp_path.glob("wandb/offline-run-*")))
    assert server.steps() == list(range(1, 13))


def sync(*folders: Path) -> None:
    command = [str(Path(sys.executable).with_name("wandb")), "sync", "--yes", *map(str, folders)]
    done = subprocess.run(
        command, env=wandb_environment(), capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr


# -- rebuild ----------------------------------------------------------------------------------------------


@pytest.fixture
def copy(tmp_path, a_run) -> Path:
    shutil.copytree(a_run, tmp_path / "run", ignore=shutil.ignore_patterns("step_*"))
    return tmp_path / "run"


def rebuilt(run: Path, name: str) -> dict[int, dict]:
    return shown(run / "wandb_rebuilt" / name)


def test_a_rebuilt_run_has_every_step_of_metrics_jsonl_once(copy, capsys):
    own = json.loads((copy / "run.json").read_text())["tracking_id"]
    for _ in range(2):  # the second replaces the first
        assert run_command(tracking.main, ["rebuild", str(copy)]) == 0
    found = rebuilt(copy, own)
    rows = [row for row in read_rows(copy / "metrics.jsonl") if "event" not in row]
    evals = {row["step"]: row["eval_bpb"] for row in read_rows(copy / "metrics.jsonl") if row.get("event") == "eval"}
    assert [(step, fields["loss"]) for step, fields in found.items()] == [(row["step"], row["loss"]) for row in rows]
    assert {step: fields["eval_bpb"] for step, fields in found.items() if "eval_bpb" in fields} == evals != {}
    assert (
        config_of(copy / "wandb_rebuilt" / own)["training"]
        == yaml.safe_load((copy / "config.yaml").read_text())["training"]
    )
    (run,) = records(copy / "wandb_rebuilt" / own, "run")
    assert (run["run_id"], run["project"]) == (own, "gsa-pretrain")
    assert f"run {own}: 6 steps, 1 to 6, in {copy}" in capsys.readouterr().out


def test_a_rebuilt_run_takes_another_id_and_has_its_parent_in_its_configuration(copy):
    state = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps({**state, "parent": {"id": "feedbeef", "step": 40}}))
    assert (
        run_command(
            tracking.main, ["rebuild", str(copy), "--run_id", "clean", "--project", "other", "--mode", "offline"]
        )
        == 0
    )
    (run,) = records(copy / "wandb_rebuilt" / "clean", "run")
    assert (run["run_id"], run["project"]) == ("clean", "other")
    assert config_of(copy / "wandb_rebuilt" / "clean")["parent"] == {"id": "feedbeef", "step": 40}


def test_a_run_with_a_lost_offline_file_is_rebuilt_whole_and_uploaded(tmp_path, server, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    TrackedLaunch(tmp_path).train(1, 8).end()
    TrackedLaunch(tmp_path, step=4, segment=1, config=changed(1e-4, 50)).train(5, 12).end()
    shutil.rmtree(sorted(tmp_path.glob("wandb/offline-run-*"))[0])
    (tmp_path / "run.json").write_text(json.dumps({"status": "finished", "tracking_id": RUN}))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(changed(1e-4, 50)))
    assert run_command(tracking.main, ["rebuild", str(tmp_path)]) == 0
    monkeypatch.delenv("WANDB_MODE")
    sync(*tmp_path.glob(f"wandb_rebuilt/{RUN}/wandb/offline-run-*"))
    assert server.steps() == list(range(1, 13))
    segments = config_of(tmp_path / "wandb_rebuilt" / RUN)["segments"]
    assert launch_config(segments, 0) == CONFIG and launch_config(segments, 1) == changed(1e-4, 50)
    assert run_command(tracking.main, ["rebuild", str(tmp_path), "--run_id", "online"]) == 0
    assert server.steps("online") == list(range(1, 13))


def test_a_rebuild_does_not_write_into_a_run_that_the_server_has(copy, server, capsys):
    server.runs["taken"] = [{"_step": 1}]
    assert run_command(tracking.main, ["rebuild", str(copy), "--run_id", "taken"]) == 1
    assert "Run (taken) already exists" in capsys.readouterr().err
    assert server.steps("taken") == [1]


def test_a_rebuild_refuses_a_folder_without_steps(tmp_path, capsys):
    assert run_command(tracking.main, ["rebuild", str(tmp_path / "nothing")]) == 3
    assert "nothing holds no run" in capsys.readouterr().err and not (tmp_path / "nothing").exists()
    (tmp_path / "run.json").write_text("{}")
    assert run_command(tracking.main, ["rebuild", str(tmp_path)]) == 3
    assert "metrics.jsonl has no step; give the folder of a run that has trained" in capsys.readouterr().err


def test_the_reader_of_transaction_logs_agrees_with_wandbs_own(tmp_path):
    """Over many blocks, from the front and from the end of the file, and up to the damage in a damaged file."""
    launch = TrackedLaunch(tmp_path)
    for step in range(1, 501):
        launch.offer({**row(step), **{f"x{i}": float(i) for i in range(40)}})
    launch.end()
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert file.stat().st_size > 20 * 32 * 1024
    assert sum(1 for _ in wandb_files.log_records(file)) == len(inspect(file))
    assert list(shown(tmp_path)) == list(range(1, 501))
    assert wandb_files.last_step(file) == 500 == wandb_files.logged_step(tmp_path / "wandb", RUN)
    raw = file.read_bytes()
    file.write_bytes(raw[: len(raw) // 2])
    assert 200 < wandb_files.last_step(file) < 300
    file.write_bytes(raw[: 32 * 1024 * 2] + bytes(32 * 1024 * 20))
    assert 1 < wandb_files.last_step(file) < 100


# -- TensorBoard ------------------------------------------------------------------------------------------


def scalars(folder: Path, name: str) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    events = board.Scalars(name)
    assert len({event.step for event in events}) == len(events)
    return {event.step: event.value for event in sorted(events, key=lambda event: event.step)}


def test_tensorboard_shows_every_step_once_after_a_resume(tmp_path):
    TrackedLaunch(tmp_path, BOARD).train(1, 8).end()
    time.sleep(1.1)  # TensorBoard names its files by the second
    launch = TrackedLaunch(tmp_path, BOARD, step=4, segment=1)
    for step in range(5, 11):
        launch.offer({**row(step), "loss": -step})
    launch.end()
    assert scalars(tmp_path, "loss") == pytest.approx({s: 1 / s if s <= 4 else -s for s in range(1, 11)})
    assert scalars(tmp_path, "eval_bpb") == pytest.approx({3: 1 / 3})


def test_tensorboard_replaces_the_steps_that_a_rollback_trains_again(tmp_path):
    launch = TrackedLaunch(tmp_path, BOARD).train(1, 6)
    for step in range(4, 8):
        launch.offer({**row(step), "loss": -step})
    launch.end()
    assert scalars(tmp_path, "loss") == pytest.approx({1: 1, 2: 1 / 2, 3: 1 / 3, 4: -4, 5: -5, 6: -6, 7: -7})


def test_tensorboard_switched_on_later_has_the_earlier_steps(tmp_path):
    TrackedLaunch(tmp_path, LoggingConfig()).train(1, 5).end()
    TrackedLaunch(tmp_path, BOARD, step=5, segment=1).train(6, 7).end()
    assert list(scalars(tmp_path, "loss")) == [1, 2, 3, 4, 5, 6, 7]


def test_a_tensorboard_folder_that_cannot_be_written_prints_one_line(tmp_path, capsys):
    (tmp_path / "tensorboard").write_text("a file where a folder belongs")
    launch = TrackedLaunch(tmp_path, BOARD).train(1, 5)
    launch.end()
    stderr = capsys.readouterr().err
    assert stderr.count("TensorBoard could not start (") == 1 and stderr.count("training goes on") == 1, stderr
