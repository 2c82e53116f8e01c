"""A crash at any moment leaves the previous checkpoint; any damage is named; nothing good is deleted."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import resource
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gsa.checkpoint import manifest
from gsa.checkpoint.manifest import CheckpointError
from gsa.files import write_atomically

FILES = {
    "mp_rank_00_model_states.pt": 700,
    "zero_pp_rank_0_mp_rank_00_optim_states.pt": 500,
    "zero_pp_rank_1_mp_rank_00_optim_states.pt": 500,
    "nested/deeper/model.safetensors": 64,
    "empty_optim_states.pt": 0,
}


def write_files(step_dir: Path) -> None:
    for name, size in FILES.items():
        path = step_dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(random.Random(f"{step_dir.name}/{name}").randbytes(size))


def save(output_dir: Path, step: int) -> Path:
    step_dir = output_dir / f"step_{step}"
    manifest.clear_torn(step_dir)
    write_files(step_dir)
    manifest.seal(step_dir)
    manifest.publish(output_dir, step_dir.name)
    return step_dir


def tags(output_dir: Path) -> list[str]:
    return [f.tag for f in manifest.list_checkpoints(output_dir)]


def exit_of_child(action: Callable[[], object]) -> int:
    """Runs `action` in a forked child and returns its exit code, or minus the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_at_change(number: int) -> None:
    """Kills this process with SIGKILL just before change `number` that it makes to the file system."""
    left = number

    def audit(event: str, args: tuple) -> None:
        nonlocal left
        written = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)
        if written or event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir"):
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(audit)


def kill_at_every_change(
    prepare: Callable[[Path], object], action: Callable[[Path], object], tmp_path: Path
) -> Iterator[tuple[Path, bool]]:
    """Yields a prepared folder as each possible kill of `action` leaves it, and last, with True, without a kill."""
    for number in itertools.count():
        output_dir = tmp_path / str(number)
        output_dir.mkdir()
        prepare(output_dir)
        ended = exit_of_child(lambda n=number, path=output_dir: (kill_at_change(n), action(path)))
        assert ended in (0, -signal.SIGKILL)
        yield output_dir, ended == 0
        if ended == 0:
            return


# -- kills and full disks ----------------------------------------------------------------------------------


def check_after_crash(output_dir: Path, *, previous: str, torn: str) -> None:
    """After a crash of a save, `previous` or the new checkpoint is good, and a torn new one is reported."""
    found, passed_over = manifest.newest_good(output_dir)
    if (output_dir / torn / "manifest.json").exists():
        assert found == output_dir / torn
    else:
        assert found == output_dir / previous
        assert [line.split(":")[0] for line in passed_over] == [torn] * (output_dir / torn).exists()
    manifest.verify(output_dir / manifest.latest_tag(output_dir))


def test_a_kill_at_any_moment_of_a_save_leaves_a_good_checkpoint_and_the_save_can_be_repeated(tmp_path):
    # the second save finds a torn folder of an earlier attempt in its place
    def prepare(output_dir):
        save(output_dir, 1)
        write_files(output_dir / "step_2")
        (output_dir / "step_2" / "stale.pt.tmp").write_bytes(b"half")

    outcomes = set()
    for output_dir, finished in kill_at_every_change(prepare, lambda path: save(path, 2), tmp_path):
        check_after_crash(output_dir, previous="step_1", torn="step_2")
        sealed = (output_dir / "step_2" / "manifest.json").exists()
        outcomes.add((sealed, manifest.latest_tag(output_dir), finished))
        if not sealed:
            save(output_dir, 2)
            assert manifest.newest_good(output_dir) == (output_dir / "step_2", [])
    # the kills reached each state there is
    assert outcomes == {(False, "step_1", False), (True, "step_1", False), (True, "step_2", True)}


@pytest.mark.parametrize("interrupted", ["manifest.json", "latest"])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_kill_inside_a_write_leaves_a_good_checkpoint(tmp_path, interrupted, share):
    save(tmp_path, 1)

    class HalfWritten(SimpleNamespace):
        def write(self, data: bytes) -> None:
            self.file.write(data[: int(share * len(data))])
            self.file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    @contextmanager
    def half_write(path: Path, **how: bool) -> Iterator[object]:
        with write_atomically(path, **how) as file:
            yield HalfWritten(file=file) if path.name == interrupted else file

    def interrupted_save() -> None:
        write_files(tmp_path / "step_2")
        manifest.write_atomically = half_write
        manifest.seal(tmp_path / "step_2")
        manifest.publish(tmp_path, "step_2")

    assert exit_of_child(interrupted_save) == -signal.SIGKILL
    assert len(list(tmp_path.rglob(f"{interrupted}.tmp"))) == 1
    check_after_crash(tmp_path, previous="step_1", torn="step_2")
    assert manifest.latest_tag(tmp_path) == "step_1"


def test_nothing_gets_its_name_before_it_is_on_disk(tmp_path, monkeypatch):
    """A power cut loses what was not synced: files before the manifest, the manifest before `latest`."""
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda fd: (events.append(("sync", os.readlink(f"/proc/self/fd/{fd}"))), fsync(fd))
    )
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append(("name", str(b))), replace(a, b)))
    step_dir = save(tmp_path, 1)

    sealed, published = (
        events.index(("name", f"{step_dir}/manifest.json")),
        events.index(("name", f"{tmp_path}/latest")),
    )
    before_seal = {path for _, path in events[:sealed]}
    assert {str(step_dir / name) for name in FILES} <= before_seal
    assert {f"{step_dir}", f"{step_dir}/nested", f"{step_dir}/nested/deeper"} <= before_seal
    assert f"{step_dir}/manifest.json.tmp" in before_seal
    assert {str(step_dir), str(tmp_path)} <= {path for _, path in events[sealed:published]}
    assert ("sync", f"{tmp_path}/latest.tmp") in events[:published]
    assert ("sync", str(tmp_path)) in events[published:]


def test_a_disk_that_fills_at_any_moment_is_reported_and_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    fsync, lock = os.fsync, threading.Lock()
    for syncs_before_full in itertools.count():
        output_dir = tmp_path / str(syncs_before_full)
        save(output_dir, 1)
        write_files(output_dir / "step_2")
        left = syncs_before_full

        def full(descriptor: int) -> None:
            nonlocal left
            with lock:
                left -= 1
                if left < 0:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            fsync(descriptor)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            try:
                manifest.seal(output_dir / "step_2")
                manifest.publish(output_dir, "step_2")
            except CheckpointError as err:
                assert "could not be written: No space left on device" in str(err) and "Free space" in str(err)
        check_after_crash(output_dir, previous="step_1", torn="step_2")
        if left >= 0:
            break
    assert syncs_before_full > len(FILES) + 5 and manifest.latest_tag(output_dir) == "step_2"


def test_a_file_size_limit_reached_for_real_is_reported_and_leaves_the_previous_checkpoint(tmp_path):
    save(tmp_path, 1)
    write_files(tmp_path / "step_2")

    def seal_with_limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        with pytest.raises(CheckpointError, match="manifest.json could not be written: File too large"):
            manifest.seal(tmp_path / "step_2")

    assert exit_of_child(seal_with_limit) == 0
    assert not list((tmp_path / "step_2").glob("manifest.json*"))
    check_after_crash(tmp_path, previous="step_1", torn="step_2")
    save(tmp_path, 2)


# -- corruption --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sealed(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("sealed"), 7)


def assert_refused(step_dir: Path, *names: str) -> None:
    with pytest.raises(CheckpointError) as refusal:
        manifest.verify(step_dir)
    lines = str(refusal.value).splitlines()
    assert str(step_dir) in lines[0] and "--resume_from auto" in lines[-1]
    assert [line.strip().split(":")[0] for line in lines[1:-1]] == sorted(names)


@pytest.mark.parametrize("name", [*(n for n, size in FILES.items() if size), "manifest.json"])
@settings(max_examples=20, deadline=None, database=None)
@given(data=st.data())
def test_a_flipped_bit_or_a_cut_anywhere_is_refused_by_name(sealed, name, data):
    path = sealed / name
    original = path.read_bytes()
    position = data.draw(st.integers(0, len(original) - 1))
    if data.draw(st.booleans(), label="cut"):
        damaged = original[:position]
    else:
        damaged = bytearray(original)
        damaged[position] ^= 1 << data.draw(st.integers(0, 7))
    try:
        path.write_bytes(damaged)
        assert_refused(sealed, name)
        assert manifest.newest_good(sealed.parent)[0] is None
    finally:
        path.write_bytes(original)
    manifest.verify(sealed)


def test_every_missing_longer_exchanged_added_or_linked_file_is_named(tmp_path):
    step_dir = save(tmp_path, 7)
    a, b, c, d, e = FILES
    (step_dir / a).unlink()
    (step_dir / d).write_bytes(b"x" * (FILES[d] + 1))
    (step_dir / e).unlink()
    (step_dir / e).symlink_to(step_dir / d)
    (step_dir / "extra.pt").touch()
    (step_dir / b).rename(step_dir / "swap.tmp")
    (step_dir / c).rename(step_dir / b)
    (step_dir / "swap.tmp").rename(step_dir / c)
    assert_refused(step_dir, a, b, c, d, e, "extra.pt")
    with pytest.raises(CheckpointError, match=f"{b}: its sha256 .* but that of {c}"):
        manifest.verify(step_dir)


def test_a_link_is_refused_also_where_it_leads_to_the_same_bytes(tmp_path):
    step_dir = save(tmp_path, 7)
    name = next(iter(FILES))
    (step_dir / name).rename(tmp_path / "elsewhere")
    (step_dir / name).symlink_to(tmp_path / "elsewhere")
    (step_dir / "folder").symlink_to(tmp_path)
    os.mkfifo(step_dir / "fifo")
    assert_refused(step_dir, name, "folder", "fifo")
    with pytest.raises(CheckpointError, match=f"{name}: replaced by a link"):
        manifest.verify(step_dir, hashes=False)


def test_a_file_the_disk_cannot_read_is_named_and_passed_over(tmp_path, monkeypatch):
    save(tmp_path, 1)
    step_dir = save(tmp_path, 2)
    bad, sha256 = step_dir / next(iter(FILES)), manifest.sha256_of

    def failing(path: Path) -> str:
        if path == bad:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return sha256(path)

    monkeypatch.setattr(manifest, "sha256_of", failing)
    assert_refused(step_dir, bad.name)
    found, passed_over = manifest.newest_good(tmp_path)
    assert found == tmp_path / "step_1"
    assert passed_over == [f"step_2: {bad.name}: cannot be read: Input/output error"]


def test_temporaries_are_neither_sealed_nor_missed(tmp_path):
    write_files(tmp_path)
    (tmp_path / "nested" / "model.pt.tmp").write_bytes(b"half")
    assert set(manifest.seal(tmp_path).files) == set(FILES)
    manifest.verify(tmp_path)
    (tmp_path / "nested" / "model.pt.tmp").unlink()
    manifest.verify(tmp_path)


def test_without_hashes_names_and_sizes_are_compared_all_the_same(tmp_path):
    step_dir = save(tmp_path, 7)
    first = step_dir / next(iter(FILES))
    first.write_bytes(bytes(first.stat().st_size))
    manifest.verify(step_dir, hashes=False)
    assert manifest.is_complete(step_dir)
    first.write_bytes(b"")
    with pytest.raises(CheckpointError, match="0 bytes, 700 in the manifest"):
        manifest.verify(step_dir, hashes=False)
    assert not manifest.is_complete(step_dir)


@pytest.mark.parametrize(
    "edit",
    [
        lambda m: m["files"].popitem(),
        lambda m: m["files"].update({"x": {"bytes": 1, "sha256": "0" * 64}}),
        lambda m: m.update(created="2020-01-01T00:00:00+00:00"),
        lambda m: m.update(format=0),
        lambda m: m.update(format="1"),
        lambda m: m.update(files=[]),
        lambda m: m.pop("files"),
        lambda m: m.update(note="hello"),
        lambda m: m,  # the same object, written otherwise
    ],
)
def test_an_edited_manifest_is_refused(tmp_path, edit):
    step_dir = save(tmp_path, 7)
    path = step_dir / "manifest.json"
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data, indent=2))
    with pytest.raises(CheckpointError, match="manifest.json: edited or damaged"):
        manifest.read(step_dir)
    assert_refused(step_dir, "manifest.json")


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[]", b"1", b"[" * 200_000, b"1" * 5000, b'{"format": NaN}'])
def test_a_file_that_is_no_manifest_is_refused(tmp_path, content):
    step_dir = save(tmp_path, 7)
    (step_dir / "manifest.json").write_bytes(content)
    assert_refused(step_dir, "manifest.json")


def test_a_manifest_of_a_newer_format_asks_for_a_newer_project(tmp_path):
    step_dir = save(tmp_path, 7)
    (step_dir / "manifest.json").write_text('{"format": 2, "tree": {}}')
    with pytest.raises(CheckpointError, match="format 2; this version reads up to 1: update the project"):
        manifest.read(step_dir)


def test_a_manifest_cannot_point_outside_its_folder(tmp_path):
    step_dir = save(tmp_path, 7)
    outside = tmp_path / "outside"
    outside.write_bytes(b"secret")
    forged = manifest.Manifest({"../outside": manifest.FileEntry(6, manifest.sha256_of(outside))}, "now")
    (step_dir / "manifest.json").write_bytes(forged.render())
    with pytest.raises(CheckpointError, match=r"\.\./outside: missing"):
        manifest.verify(step_dir)


# -- sealing -----------------------------------------------------------------------------------------------


def test_hashes_of_the_writers_are_sealed_without_reading_the_files(tmp_path):
    write_files(tmp_path)
    name = next(iter(FILES))
    sealed = manifest.seal(tmp_path, hashes={name: (700, "0" * 64)})
    assert sealed.files[name] == manifest.FileEntry(700, "0" * 64)
    assert manifest.read(tmp_path) == sealed
    assert_refused(tmp_path, name)


def test_a_file_that_a_rank_wrote_elsewhere_or_in_part_is_not_sealed(tmp_path):
    write_files(tmp_path)
    with pytest.raises(CheckpointError, match="rank_9.pt: missing; is the folder shared"):
        manifest.seal(tmp_path, hashes={"rank_9.pt": (1, "0" * 64)})
    with pytest.raises(CheckpointError, match="700 bytes on disk, 701 were written"):
        manifest.seal(tmp_path, hashes={next(iter(FILES)): (701, "0" * 64)})
    with pytest.raises(CheckpointError, match="empty_optim_states.pt: not one of the files"):
        manifest.seal(tmp_path, files=[name for name in FILES if name != "empty_optim_states.pt"])
    assert not (tmp_path / "manifest.json").exists()
    manifest.seal(tmp_path, files=list(FILES))
    manifest.verify(tmp_path)


def test_links_and_empty_folders_are_not_sealed(tmp_path):
    with pytest.raises(CheckpointError, match="no file in it"):
        manifest.seal(tmp_path / "nowhere")
    write_files(tmp_path)
    for make in (
        lambda path: path.symlink_to("empty_optim_states.pt"),
        lambda path: path.symlink_to("nested"),
        os.mkfifo,
    ):
        make(tmp_path / "other")
        with pytest.raises(CheckpointError, match="other: a link or special file"):
            manifest.seal(tmp_path)
        (tmp_path / "other").unlink()


def test_files_longer_than_a_block_are_hashed_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "_BLOCK_BYTES", 64)
    write_files(tmp_path)
    small_blocks = manifest.seal(tmp_path).files
    monkeypatch.undo()
    assert manifest.seal(tmp_path).files == small_blocks


def test_only_a_sealed_checkpoint_is_published(tmp_path):
    write_files(tmp_path / "step_1")
    with pytest.raises(CheckpointError, match="missing: the save was interrupted"):
        manifest.publish(tmp_path, "step_1")
    assert manifest.latest_tag(tmp_path) is None


def test_a_folder_with_a_manifest_is_never_cleared(tmp_path):
    step_dir = save(tmp_path, 1)
    (step_dir / "manifest.json").write_text("edited")
    with pytest.raises(CheckpointError, match="holds a checkpoint already"):
        manifest.clear_torn(step_dir)
    assert (step_dir / "empty_optim_states.pt").exists()


# -- finding -----------------------------------------------------------------------------------------------


def test_the_newest_good_checkpoint_is_found_past_torn_and_damaged_ones(tmp_path):
    for step in (2, 10, 9, 30):
        save(tmp_path, step)
    write_files(tmp_path / "step_100")
    damaged = tmp_path / "step_30" / next(iter(FILES))
    damaged.write_bytes(bytes(700))
    (tmp_path / "step_10" / "empty_optim_states.pt").unlink()
    for other in ("step_07", "step_x", "final", ".trash-step_99"):
        (tmp_path / other).mkdir()
    (tmp_path / "step_5").write_text("a file")

    assert tags(tmp_path) == ["step_2", "step_9", "step_10", "step_30", "step_100"]
    assert [f.tag for f in manifest.list_checkpoints(tmp_path) if f.complete] == ["step_2", "step_9", "step_30"]
    found, passed_over = manifest.newest_good(tmp_path)
    assert found == tmp_path / "step_9" == manifest.resolve("auto", tmp_path)
    assert passed_over == [
        "step_100: manifest.json: missing: the save was interrupted, or this is no checkpoint",
        f"step_30: {damaged.name}: its sha256 is not that of the manifest",
        "step_10: empty_optim_states.pt: missing",
    ]


def test_auto_without_a_good_checkpoint_is_a_fresh_start(tmp_path):
    assert manifest.newest_good(tmp_path / "nowhere") == (None, [])
    assert manifest.resolve("auto", tmp_path / "nowhere") is None


def test_a_checkpoint_is_found_by_tag_path_and_latest(tmp_path, monkeypatch):
    run, other = tmp_path / "run", tmp_path / "other"
    for step in (1, 2):
        save(run, step)
    kept = save(other, 5)
    assert manifest.resolve("step_1", run) == run / "step_1"
    assert manifest.resolve("latest", run) == run / "step_2"
    assert manifest.resolve(f"{kept}/", run) == kept
    monkeypatch.chdir(kept)
    assert manifest.resolve(".", run) == kept
    moved = run.rename(tmp_path / "moved")
    assert manifest.resolve("latest", moved) == moved / "step_2"


def test_a_checkpoint_not_found_is_an_error_that_names_the_choices(tmp_path):
    run = tmp_path / "run"
    with pytest.raises(CheckpointError, match="latest does not exist: .*run holds no complete checkpoint"):
        manifest.resolve("latest", run)
    for step in (1, 2):
        save(run, step)
    with pytest.raises(CheckpointError, match="'step_3', does not exist: choose one of step_1, step_2 in"):
        manifest.resolve("step_3", run)
    with pytest.raises(CheckpointError, match="nowhere.*does not exist: choose one of step_1, step_2"):
        manifest.resolve(str(tmp_path / "nowhere"), run)
    with pytest.raises(CheckpointError, match="folder of a run, not of a checkpoint: choose one of step_1, step_2"):
        manifest.resolve(str(run), tmp_path / "new")
    write_files(run / "step_3")
    with pytest.raises(CheckpointError, match="step_3 is not a good checkpoint"):
        manifest.resolve("step_3", run)
    with pytest.raises(CheckpointError, match="choose one of step_1, step_2 in"):
        manifest.resolve("step_4", run)
    (run / "latest").write_text("../../elsewhere\n")
    with pytest.raises(CheckpointError, match="no tag like step_100"):
        manifest.resolve("latest", run)


# -- retention ---------------------------------------------------------------------------------------------


def test_retention_keeps_the_last_every_mth_pinned_latest_and_damaged(tmp_path):
    for step in range(1, 12):
        save(tmp_path, step)
    (tmp_path / "step_2" / "pinned").touch()
    (tmp_path / "step_4" / "empty_optim_states.pt").unlink()
    (tmp_path / "step_6" / "manifest.json").unlink()
    (tmp_path / "step_10" / "manifest.json").unlink()
    (tmp_path / "step_7").rename(tmp_path / "elsewhere")
    (tmp_path / "step_7").symlink_to("elsewhere")
    write_files(tmp_path / "step_12")
    manifest.publish(tmp_path, "step_3")

    removed = {r.tag: r.reason for r in manifest.retain(tmp_path, keep_last=2, keep_every=5, pinned=["step_1"])}
    assert tags(tmp_path) == [f"step_{n}" for n in (1, 2, 3, 4, 5, 7, 9, 11, 12)]
    assert set(removed) == {"step_6", "step_8", "step_10"}
    assert "interrupted" in removed["step_6"] and "step_11 is good" in removed["step_8"]
    manifest.verify(tmp_path / "step_2")  # the pin is no foreign file
    assert manifest.retain(tmp_path, keep_last=2, keep_every=5, pinned=["step_1"]) == []
    manifest.retain(tmp_path, keep_last=1)
    assert tags(tmp_path) == [f"step_{n}" for n in (2, 3, 4, 7, 11, 12)]


def test_nothing_is_deleted_while_the_newest_is_not_good(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / "step_3" / next(iter(FILES))).write_bytes(bytes(700))
    with pytest.raises(CheckpointError, match="step_3 is not a good checkpoint"):
        manifest.retain(tmp_path, keep_last=1)
    assert tags(tmp_path) == ["step_1", "step_2", "step_3"]
    write_files(tmp_path / "torn" / "step_1")
    assert manifest.retain(tmp_path / "torn", keep_last=1) == []
    assert tags(tmp_path / "torn") == ["step_1"]


def test_a_deleted_checkpoint_has_lost_its_name_on_disk_before_its_first_file_goes(tmp_path, monkeypatch):
    for step in (1, 2):
        save(tmp_path, step)
    events = []
    fsync, replace, rmtree = os.fsync, os.replace, shutil.rmtree
    monkeypatch.setattr(
        os, "fsync", lambda fd: (events.append(("sync", os.readlink(f"/proc/self/fd/{fd}"))), fsync(fd))
    )
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append(("name", str(b))), replace(a, b)))
    monkeypatch.setattr(shutil, "rmtree", lambda path: (events.append(("gone", str(path))), rmtree(path)))
    manifest.retain(tmp_path, keep_last=1)
    trash = str(tmp_path / ".trash-step_1")
    assert events == [("name", trash), ("sync", str(tmp_path)), ("gone", trash)]


@pytest.mark.parametrize("limits", [{"keep_last": 0}, {"keep_last": 1, "keep_every": 0}])
def test_limits_that_leave_no_checkpoint_are_refused(tmp_path, limits):
    with pytest.raises(ValueError, match="at least 1"):
        manifest.retain(tmp_path, **limits)


def test_a_kill_at_any_moment_of_a_deletion_leaves_whole_checkpoints_only(tmp_path):
    def prepare(output_dir):
        for step in (1, 2):
            save(output_dir, step)

    half_deleted = 0
    for output_dir, _ in kill_at_every_change(prepare, lambda path: manifest.retain(path, 1), tmp_path):
        assert all(f.complete for f in manifest.list_checkpoints(output_dir))
        assert manifest.newest_good(output_dir) == (output_dir / "step_2", [])
        half_deleted += bool(list(output_dir.glob(".trash-*")))
        manifest.retain(output_dir, keep_last=1)
        assert sorted(p.name for p in output_dir.iterdir()) == ["latest", "step_2"]
    assert half_deleted > len(FILES)


# -- space -------------------------------------------------------------------------------------------------


def test_too_little_space_is_reported_in_gib(tmp_path, monkeypatch):
    future = tmp_path / "not" / "yet"
    assert manifest.free_bytes(future) > 0
    manifest.require_space(future, 1)
    monkeypatch.setattr(manifest, "free_bytes", lambda path: 2**30)
    manifest.require_space(future, 2**30)
    with pytest.raises(CheckpointError, match=r"needs 3.5 GiB and 1 GiB are free; free 2.5 GiB"):
        manifest.require_space(future, 7 * 2**29)
