"""A kill at any moment of a save, a full disk, retention, and saving in the background: the real engine writes."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.launching import ROOT, Case, rank_environment, run_cases, start_training

from gsa import files
from gsa.checkpoint import manifest
from gsa.checkpoint.manifest import CheckpointError
from gsa.checkpoint.state import RunState
from training import train
from training.checkpointing import saver as saving
from training.checkpointing.saver import Retention, Saver
from training.config.exit_codes import ExitCode
from training.engine.engine import _SnapshotFiles
from training.engine.snapshot import HostBuffers, Snapshot, host_tree
from training.engine.world import World
from training.loop.run import Failure, _record_failure
from training.record.metrics_log import read_rows
from training.record.run_folder import RunFolder


def events(folder: Path, kind: str) -> list[dict]:
    return [row for row in read_rows(folder / "metrics.jsonl") if row.get("event") == kind]


@pytest.fixture(scope="module")
def kills(tmp_path_factory, a_run, tiny_yaml):
    """[(folder, facts after the kill)], the last one without a kill; and the folder of an undisturbed run."""
    base = tmp_path_factory.mktemp("kills")
    shutil.copytree(a_run, base / "source")
    shutil.rmtree(base / "source" / "step_6")
    (base / "source" / "latest").write_text("step_3\n")
    environment = rank_environment()
    environment["PYTHONPATH"] += f":{ROOT / 'tests'}"
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "tests" / "support" / "kill_during_save.py"),
            str(tiny_yaml),
            str(base / "source"),
            str(base),
        ],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    numbers = sorted(int(path.stem) for path in base.glob("*.json"))
    return [(base / str(n), json.loads((base / f"{n}.json").read_text())) for n in numbers], base / "calm"


def test_a_kill_at_any_moment_of_a_save_leaves_a_good_checkpoint(kills):
    *killed, (_, whole) = kills[0]
    assert whole["ended"] == [0] and whole["latest"] == whole["found"] == "step_4"
    for _, facts in killed:
        assert set(facts["ended"]) == {-signal.SIGKILL}
        if facts["torn"]:
            assert facts["found"] == "step_3" and facts["latest"] == "step_3"
            assert facts["passed_over"][0].startswith("step_4: manifest.json: missing"), facts
        else:
            assert facts["passed_over"] == []
    # before the save; torn; between manifest and latest: there is no other case
    assert {(f["torn"], f["found"], f["latest"]) for _, f in killed} == {
        (False, "step_3", "step_3"),
        (True, "step_3", "step_3"),
        (False, "step_4", "step_3"),
    }
    moments = [facts["moment"] for _, facts in killed]
    names = [name for name in manifest.read(kills[1] / "step_4").files] + ["manifest.json", "latest"]
    assert len(names) == 7
    for name in names:
        assert f"inside {name}" in moments and f"before os.rename of {name}.tmp" in moments
    assert (
        sum(len(facts["ended"]) == 2 for _, facts in killed) >= 12
    )  # killed again while saving over a torn checkpoint


def test_after_any_kill_a_resume_by_auto_ends_with_the_same_bytes(kills):
    calm = manifest.read(kills[1] / "step_4").files
    same = ["model.safetensors", *(name for name in calm if name.endswith("_optim_states.pt"))]
    assert len(same) == 2
    resumed = [(folder, facts) for folder, facts in kills[0] if facts["resumed"] is not None]
    assert {facts["torn"] for _, facts in resumed} == {True, False} and len(resumed) >= 5
    for folder, facts in [*resumed, kills[0][-1]]:
        assert not facts["resumed"]
        manifest.verify(folder / "step_4")
        files = manifest.read(folder / "step_4").files
        assert all(files[name] == calm[name] for name in same), folder
        assert manifest.latest_tag(folder) == "step_4"


def test_a_disk_that_takes_no_checkpoint_ends_the_run_after_its_last_step(a_run, tiny_yaml, tmp_path):
    """No file may grow beyond 100 KB: the periodic saves fail, training goes on, and the last save ends the run."""
    shutil.copytree(a_run, tmp_path / "run")
    # the resume moves step_6 to segments/: `latest` must not go on naming it
    assert manifest.latest_tag(tmp_path / "run") == "step_6"
    done = subprocess.run(
        [
            sys.executable,
            "training/train.py",
            "--config",
            str(tiny_yaml),
            "--output_dir",
            str(tmp_path / "run"),
            "--resume_from",
            "step_3",
            "training.save_interval=1",
        ],
        capture_output=True,
        text=True,
        env=rank_environment(),
        cwd=ROOT,
        preexec_fn=lambda: (
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN),
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
        ),
    )
    assert done.returncode == 3, done.stderr
    assert "error: rank 0: step_6 was not saved" in done.stderr and "Free space" in done.stderr
    warned = re.findall(r"warning: (step_\d) was not saved:\n.*File too large", done.stdout)
    assert warned == ["step_4", "step_5", "step_6"] and done.stdout.count("training goes on") == 3
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["status"] == "failed" and "step_6 was not saved" in run["reason"]
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if row.get("event") == "save_failed"] == [4, 5, 6]
    assert manifest.newest_good(tmp_path / "run")[0].name == manifest.latest_tag(tmp_path / "run") == "step_3"
    assert not list((tmp_path / "run").glob("step_[456]"))  # what was written of them takes no room


# -- the real launcher ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def killed_launches(tmp_path_factory, tiny_yaml):
    """Three launches in which rank 0, rank 1 or all processes are killed during a save; one more launch resumes all three."""
    base = tmp_path_factory.mktemp("killed_launches")

    def argv(name: str) -> list[str]:
        # large enough for a save to take a while
        return [
            "--config",
            str(tiny_yaml),
            "--output_dir",
            str(base / name),
            "--resume_from",
            "auto",
            "model.vocab_size=20000",
            "training.save_interval=1",
            "training.max_steps=8",
            "training.eval_interval=0",
        ]

    launchers = {"rank_0": "torchrun", "rank_1": "deepspeed", "all": "deepspeed"}
    processes = {  # in parallel, since most of their time is start-up
        victim: start_training(2, argv(victim), launcher=launcher) for victim, launcher in launchers.items()
    }
    seen, deadline = {}, time.monotonic() + 500
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
        process.communicate(timeout=240)
        good, passed_over = manifest.newest_good(base / victim)
        seen[victim] = (victim in seen, process.returncode, good and good.name, passed_over)
    cases = [Case(name, tuple(argv(name))) for name in (*seen, "calm")]
    (base / "output.txt").write_text(run_cases(2, cases, base))
    return base, seen


@pytest.mark.parametrize("victim", ["rank_0", "rank_1", "all"])
def test_a_launch_killed_while_it_saves_can_be_resumed_with_equal_bytes(killed_launches, victim):
    base, seen = killed_launches
    torn, code, good, passed_over = seen[victim]
    assert torn and code != 0 and good is not None
    assert len(passed_over) <= 1 and all("manifest.json: missing" in line for line in passed_over)
    ours, theirs = (manifest.read(base / name / "step_8").files for name in (victim, "calm"))
    same = [name for name in ours if name == "model.safetensors" or name.endswith("_optim_states.pt")]
    assert len(same) == 3 and all(ours[name] == theirs[name] for name in same)


# -- retention and reports ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saves(tmp_path_factory, tiny_yaml):
    base = tmp_path_factory.mktemp("saves")

    def case(name, *extra, stage=2):
        return Case(
            name,
            (
                "--config",
                str(tiny_yaml),
                "--output_dir",
                str(base / name),
                "training.save_interval=1",
                "--deepspeed_config",
                str(ROOT / "ds_configs" / f"zero{stage}.json"),
                *extra,
            ),
        )

    keep = ("training.keep_last=2", "training.keep_every=3")
    cases = [case("background", *keep)]
    cases += [
        case(f"{kind}_{stage}", "training.save_interval=0", f"training.async_save={kind == 'later'}", stage=stage)
        for stage in (2, 3)
        for kind in ("later", "at_once")
    ]
    (base / "output.txt").write_text(run_cases(2, cases, base))
    return base


def test_retention_keeps_the_last_and_every_mth_and_prints_what_it_removes(saves):
    tags = [found.tag for found in manifest.list_checkpoints(saves / "background")]
    assert tags == ["step_3", "step_5", "step_6"]
    assert "removed step_1: older than the 2 newest; step_3 is good" in (saves / "output.txt").read_text()


def test_every_save_reports_its_stall_and_its_time_in_the_background(saves):
    saved = events(saves / "background", "save")
    assert [e["step"] for e in saved] == [1, 2, 3, 4, 5, 6]
    assert all(e["save_stall_seconds"] > 0 and e["save_background_seconds"] > 0 for e in saved)
    assert all(e["save_background_cpu_seconds"] > 0 for e in saved)
    assert all(e["save_background_seconds"] == 0 for e in events(saves / "at_once_2", "save"))


@pytest.mark.parametrize("stage", [2, 3])
def test_a_background_save_writes_the_same_bytes_as_a_blocking_one(saves, stage):
    later, at_once = (manifest.read(saves / f"{kind}_{stage}" / "step_6").files for kind in ("later", "at_once"))
    assert later.keys() == at_once.keys()
    same = [name for name in later if name == "model.safetensors" or name.endswith("_optim_states.pt")]
    assert len(same) == 3 and all(later[name] == at_once[name] for name in same)


def test_a_snapshot_is_a_copy_whose_memory_the_next_one_uses_again():
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
    ranks = Ranks(tmp_path, [SHARD])
    ranks.savers[0]._bytes_needed = 2**21
    ranks.start(1)
    assert "a checkpoint needs" in ranks.failures[0][0][1] and not (tmp_path / "step_1").exists()


# -- the saver without an engine, ranks as threads ---------------------------------------------------------------


class Slow:
    """Pickling it waits for its event."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __reduce__(self):
        self.event.wait(timeout=60)
        return dict, ()


@dataclass(frozen=True)
class ThreadWorld(World):
    """A rank that is a thread; its collectives exchange values with the other threads."""

    meet: Callable[[int, object], list]

    def gather(self, value: object) -> list:
        return self.meet(self.rank, value)

    def broadcast(self, value: object) -> object:
        return self.gather(value)[0]


class Ranks:
    """One saver per rank, each used by its own thread. reports: what was published. beats: signs of life per rank.
    failures: (step, reason) of each save that failed, per rank.
    """

    def __init__(self, folder: Path, files: list[dict[str, object]], keep_last: int | None = None) -> None:
        self.size, self.reports, self.beats = len(files), [], [0] * len(files)
        self.failures: list[list[tuple[int, str]]] = [[] for _ in files]
        self._meeting, self._values = threading.Barrier(len(files), timeout=60), [None] * len(files)
        self.savers = [
            Saver(
                SimpleNamespace(snapshot=lambda into, *_, buffers, rank=rank: self._snapshot(into, rank, files[rank])),
                ThreadWorld(rank, self.size, rank, self.size, torch.device("cpu"), self.gather),
                folder,
                background=True,
                retention=Retention(keep_last, None),
                bytes_needed=0,
                published=self.reports.append,
                failed=lambda step, reason, rank=rank: self.failures[rank].append((step, reason)),
                beat=lambda rank=rank: self._beat(rank),
            )
            for rank in range(self.size)
        ]
        self._step = 0

    def _snapshot(self, folder: Path, rank: int, files: dict[str, object]) -> Snapshot:
        step_dir = folder / f"step_{self._step}"
        step_dir.mkdir(parents=True, exist_ok=True)
        named = {step_dir / name.format(rank=rank): content for name, content in files.items()}
        return Snapshot(named, {"w": torch.ones(3)} if rank == 0 else None)

    def gather(self, rank: int, value: object) -> list:
        self._values[rank] = value
        self._meeting.wait()
        values = list(self._values)
        self._meeting.wait()
        return values

    def _beat(self, rank: int) -> None:
        self.beats[rank] += 1

    def state(self, step: int) -> RunState:
        self._step = step
        return RunState(
            step=step,
            epoch=0.0,
            samples_consumed=0,
            tokens_seen=0,
            config={"model": {}},
            data_fingerprint="f",
            tracking_id="id",
            stage="sparse",
            versions={},
            world_size=self.size,
            zero_stage=2,
            created="now",
        )

    def start(self, step: int) -> None:
        state = self.state(step)
        self.each(lambda saver: saver.start(state))

    def save_last(self, step: int, emergency_dir: Path | None = None) -> list:
        state = self.state(step)
        return self.each(lambda saver: saver.save_last(state, emergency_dir and str(emergency_dir)))

    def each(self, call) -> list:
        """What `call(saver)` returns or raises, for every rank."""

        def outcome(saver: Saver) -> object:
            try:
                return call(saver)
            except CheckpointError as err:
                return err

        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(outcome, self.savers))

    def one_step(self) -> list:
        """Polls as the trainer's loop does, with the flags of all ranks summed."""
        done, failed = (sum(column) for column in zip(*self.each(Saver.status), strict=True))
        return self.each(lambda saver: saver.poll(done, failed))


SHARD = {"rank_{rank}_optim_states.pt": {"a": torch.ones(4)}}


def until(true, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert true()


def test_a_save_is_published_at_a_later_step_once_every_rank_has_written(tmp_path):
    written = threading.Event()
    ranks = Ranks(tmp_path, [SHARD, {"rank_{rank}_optim_states.pt": Slow(written)}])
    ranks.start(3)
    until(lambda: ranks.savers[0].status() == (1.0, 0.0))
    for _ in range(3):  # rank 1 still writes: no rank waits for it
        assert ranks.one_step() == [None, None]
    assert manifest.latest_tag(tmp_path) is None and not (tmp_path / "step_3" / "manifest.json").exists()
    written.set()
    until(lambda: ranks.one_step() == [None, None] and ranks.reports)
    assert [report.tag for report in ranks.reports] == ["step_3"] and manifest.latest_tag(tmp_path) == "step_3"
    assert len(manifest.read(tmp_path / "step_3").files) == 4
    manifest.verify(tmp_path / "step_3")
    assert ranks.one_step() == [None, None] and len(ranks.reports) == 1


def test_a_writer_that_fails_on_one_rank_is_reported_on_all_ranks_at_the_next_step(tmp_path):
    ranks = Ranks(tmp_path, [SHARD, {"nowhere/rank_{rank}_optim_states.pt": {}}])
    ranks.start(3)
    assert [saver.saved_at for saver in ranks.savers] == [3, 3]
    until(lambda: ranks.savers[1].status() == (1.0, 1.0) and ranks.savers[0].status()[0])
    assert ranks.one_step() == [None, None]
    for ((step, reason),) in ranks.failures:
        assert step == 3 and reason.startswith("step_3 was not saved:\n  rank 1: ")
        assert "rank_1_optim_states.pt could not be written: No such file or directory" in reason
    assert [saver.saved_at for saver in ranks.savers] == [-1, -1]
    assert manifest.newest_good(tmp_path)[0] is None and ranks.reports == []
    assert not (tmp_path / "step_3").exists()  # half a checkpoint takes no room from the next one
    errors = ranks.save_last(3)
    assert all(isinstance(err, CheckpointError) and str(err).startswith("step_3 was not saved:") for err in errors)


def test_after_a_full_disk_the_next_save_succeeds(tmp_path, monkeypatch):
    ranks = Ranks(tmp_path, [SHARD, SHARD])
    real = manifest.free_bytes
    monkeypatch.setattr(manifest, "free_bytes", lambda path: -1)
    ranks.start(3)
    assert [failures[0][0] for failures in ranks.failures] == [3, 3]
    monkeypatch.setattr(manifest, "free_bytes", real)
    ranks.start(4)
    assert ranks.each(Saver.finish) == [None, None]
    assert manifest.latest_tag(tmp_path) == "step_4" and [saver.saved_at for saver in ranks.savers] == [4, 4]


def test_the_last_save_goes_to_the_emergency_folder_and_the_message_says_what_to_do(tmp_path, monkeypatch):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    run.mkdir()
    ranks = Ranks(run, [SHARD, SHARD])
    real = manifest.free_bytes
    monkeypatch.setattr(manifest, "free_bytes", lambda path: -1 if run in (path, *path.parents) else real(path))
    kept = elsewhere / "run_id" / "step_7"
    for err in ranks.save_last(7, elsewhere):
        assert isinstance(err, CheckpointError)
        assert f"Nothing is lost: {kept} holds it. Mend the disk, copy that folder to {run}" in str(err)
    manifest.verify(kept)
    shutil.copytree(kept, run / "step_7")  # as the message says
    assert manifest.newest_good(run)[0] == run / "step_7"
    monkeypatch.setattr(manifest, "free_bytes", lambda path: -1)
    for err in ranks.save_last(8, elsewhere):
        assert "It could not be saved in training.emergency_dir either" in str(err)


def test_a_rank_that_waits_for_another_ranks_disk_gives_signs_of_life(tmp_path, monkeypatch):
    """Rank 1 has written and waits: in one long collective, a watchdog would take it for hung."""
    monkeypatch.setattr(saving, "BEAT_S", 0.02)
    written = threading.Event()
    ranks = Ranks(tmp_path, [{"rank_{rank}_optim_states.pt": Slow(written)}, SHARD])
    ranks.start(3)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ranks.each, Saver.finish)
        until(lambda: min(ranks.beats) > 5)
        assert not waiting.done()
        written.set()
        assert waiting.result() == [None, None]
    assert manifest.latest_tag(tmp_path) == "step_3"


def test_a_checkpoint_that_cannot_be_deleted_is_reported_and_the_save_succeeds(tmp_path, monkeypatch):
    ranks = Ranks(tmp_path, [SHARD], keep_last=1)
    ranks.start(1)
    ranks.each(Saver.finish)
    real = manifest.shutil.rmtree

    def refused(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(manifest.shutil, "rmtree", refused)
    for step in (2, 3):
        ranks.start(step)
        assert ranks.each(Saver.finish) == [None]
    assert [str(one) for one in ranks.reports[-1].removed] == [
        f"warning: {tag} could not be removed: [Errno 13] Permission denied: '{tmp_path / trash}'; delete it by hand"
        for tag, trash in ((".trash-step_1", ".trash-step_1"), ("step_2", ".trash-step_2"))
    ]
    monkeypatch.setattr(manifest.shutil, "rmtree", real)
    ranks.start(4)
    ranks.each(Saver.finish)
    assert [str(one) for one in ranks.reports[-1].removed] == [
        "removed step_3: older than the 1 newest; step_4 is good"
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_4"]


def test_a_checkpoint_that_cannot_be_read_back_is_reported_and_older_ones_stay(tmp_path, monkeypatch):
    ranks = Ranks(tmp_path, [SHARD], keep_last=1)
    ranks.start(1)
    ranks.each(Saver.finish)
    seal = manifest.seal

    def seal_on_a_bad_disk(step_dir, **how):
        sealed = seal(step_dir, **how)
        (step_dir / "rank_0_optim_states.pt").open("r+b").write(b"0000")
        return sealed

    monkeypatch.setattr(manifest, "seal", seal_on_a_bad_disk)
    ranks.start(2)
    assert ranks.each(Saver.finish) == [None]
    (((_, reason),),) = ranks.failures
    assert reason.startswith("step_2 was saved, and older ones stay, since reading it back failed:")
    assert "rank_0_optim_states.pt: its sha256 is not that of the manifest" in reason
    assert ranks.savers[0].saved_at == -1  # it is no good
    assert manifest.newest_good(tmp_path)[0] == tmp_path / "step_1"


def test_a_save_that_cannot_update_latest_reports_that_the_checkpoint_exists(tmp_path, monkeypatch):
    ranks = Ranks(tmp_path, [SHARD, SHARD])
    replace = os.replace

    def full(source, target):
        if Path(target).name == manifest.LATEST:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(manifest.os, "replace", full)
    ranks.start(2)
    assert ranks.each(Saver.finish) == [None, None]
    for ((_, reason),) in ranks.failures:
        assert reason.startswith(
            "step_2 was saved, and `auto` finds it, but `latest` could not be set to it:\n  rank 0: "
        )
        assert f"{tmp_path / 'latest'} could not be written: No space left on device" in reason
    assert [saver.saved_at for saver in ranks.savers] == [2, 2]
    assert manifest.newest_good(tmp_path)[0] == tmp_path / "step_2" and manifest.latest_tag(tmp_path) is None


def test_a_disk_error_before_a_save_is_reported_on_every_rank(tmp_path, monkeypatch):
    ranks = Ranks(tmp_path, [SHARD, SHARD])

    def dead(path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(manifest, "free_bytes", dead)
    ranks.start(1)
    assert ranks.failures == [[(1, "[Errno 5] Input/output error")]] * 2


def test_the_loader_that_deepspeed_calls_executes_nothing_in_a_file(tmp_path):
    """Whatever was checked before it."""

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    torch.save({"module": Evil()}, tmp_path / "mp_rank_00_model_states.pt")
    with pytest.raises(CheckpointError, match="nothing in it was run"):
        _SnapshotFiles().load(str(tmp_path / "mp_rank_00_model_states.pt"), map_location="cpu")
    assert not (tmp_path / "ran").exists()


# -- the run's folder ---------------------------------------------------------------------------------------------


def test_run_json_is_synced_before_it_gets_its_name_and_a_damaged_one_is_reported_once(tmp_path, monkeypatch, capsys):
    folder, synced = RunFolder(tmp_path), []
    fsync = files.fsync
    monkeypatch.setattr(files, "fsync", lambda path: (synced.append(path.name), fsync(path)))
    folder.update_run(status="running", step=3)
    assert synced == ["run.json.tmp", tmp_path.name] and folder.read_run()["step"] == 3
    folder.run_json.write_bytes(b"")  # after a power cut, on a disk that reports writes as done too early
    assert folder.read_run() == {} == folder.read_run() and folder.holds_a_run()
    printed = capsys.readouterr().out
    assert printed.count("run.json: not JSON") == 1 and "continuing without" in printed
    folder.update_run(step=4)
    assert folder.read_run()["step"] == 4


def test_failing_to_write_run_json_does_not_raise(tmp_path, capsys):
    folder = RunFolder(tmp_path)
    (folder.run_json / "in_the_way").mkdir(parents=True)
    _record_failure(folder, Failure("step_4: KeyError", "", ExitCode.FAILED), 4, None)
    assert "run.json could not be written" in capsys.readouterr().err


def test_everything_after_the_step_resumed_from_is_moved_to_segments_or_removed_if_torn(tmp_path):
    (tmp_path / "step_9").write_text("a foreign file")
    (tmp_path / "step_8").mkdir()
    (tmp_path / "step_8" / "manifest.json").touch()
    (tmp_path / "step_7").mkdir()
    (tmp_path / "step_7" / "config.json.tmp").touch()
    lines = RunFolder(tmp_path).discard_after(6, resumed_from=None)
    assert [line.split(":")[1].strip() for line in lines] == [
        "removed",
        "moved to segments/step_8.0",
        "moved to segments/step_9.0",
    ]
    assert (tmp_path / "segments" / "step_9.0").read_text() == "a foreign file"
    assert not list(tmp_path.glob("step_*"))
    (tmp_path / "step_7").touch()
    with pytest.raises(CheckpointError, match="step_7 is or holds a file that is not of this project"):
        manifest.clear_torn(tmp_path / "step_7")
