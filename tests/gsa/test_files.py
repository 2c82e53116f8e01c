"""A file is written whole or not at all, and survives a power cut where that is requested."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from gsa.files import write_atomically

OLD, NEW = b"old content", b"new content, which is longer"


@pytest.fixture
def path(tmp_path) -> Path:
    """A file that has content already, alone in its folder."""
    (tmp_path / "f.json").write_bytes(OLD)
    return tmp_path / "f.json"


def replace(path: Path, durable: bool = True, unique: bool = False) -> None:
    with write_atomically(path, durable=durable, unique=unique) as file:
        file.write(NEW[:5])
        file.write(NEW[5:])


def recorded(monkeypatch, *names: str) -> list[tuple[str, str]]:
    """The calls of these functions of `os` from now on: (function, name of the file)."""
    calls = []

    def record(name: str, function):
        def wrapped(target, *rest):
            calls.append((name, Path(os.readlink(f"/proc/self/fd/{target}") if name == "fsync" else target).name))
            return function(target, *rest)

        monkeypatch.setattr(os, name, wrapped)

    for name in names:
        record(name, getattr(os, name))
    return calls


def fail(monkeypatch, name: str, call: int = 0) -> None:
    """Makes the given call of a function of `os` fail, as on a full disk."""
    function, left = getattr(os, name), [call]

    def failing(*args):
        left[0] -= 1
        if left[0] == -1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return function(*args)

    monkeypatch.setattr(os, name, failing)


@pytest.mark.parametrize("durable", [True, False])
@pytest.mark.parametrize("unique", [True, False])
def test_the_new_content_replaces_the_old_and_nothing_else_stays(path, durable, unique):
    with write_atomically(path, durable=durable, unique=unique) as file:
        file.write(NEW[:5])
        file.flush()
        assert path.read_bytes() == OLD
        file.write(NEW[5:])
        assert path.read_bytes() == OLD
    assert path.read_bytes() == NEW and os.listdir(path.parent) == [path.name]


def test_a_file_that_is_new_appears_with_its_content(tmp_path):
    replace(tmp_path / "new")
    assert (tmp_path / "new").read_bytes() == NEW


@pytest.mark.parametrize("error", [OSError, RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_error_in_the_block_leaves_the_old_content(path, error):
    with pytest.raises(error), write_atomically(path, durable=True) as file:
        file.write(NEW[:5])
        raise error("in the middle")
    assert path.read_bytes() == OLD and os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_disk_that_refuses_before_the_replacement_leaves_the_old_content(path, monkeypatch, name):
    fail(monkeypatch, name)
    with pytest.raises(OSError, match="No space left on device"):
        replace(path)
    assert path.read_bytes() == OLD and os.listdir(path.parent) == [path.name]


def test_a_disk_that_refuses_the_folder_is_reported_with_the_new_content_in_place(path, monkeypatch):
    fail(monkeypatch, "fsync", call=1)
    with pytest.raises(OSError, match="No space left on device"):
        replace(path)
    assert path.read_bytes() == NEW and os.listdir(path.parent) == [path.name]


def test_content_that_does_not_fit_leaves_the_old_content(path):
    with pytest.raises(OSError, match="No space left on device"), write_atomically(path, durable=False) as file:
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, file.fileno())
        os.close(full)
        file.write(NEW)  # it is buffered: the error comes when the file is closed
    assert path.read_bytes() == OLD and os.listdir(path.parent) == [path.name]


def test_a_folder_that_does_not_exist_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        replace(tmp_path / "nowhere" / "f.json")


def test_the_error_of_the_block_is_raised_when_the_temporary_file_cannot_be_removed(path, monkeypatch):
    fail(monkeypatch, "unlink")
    with pytest.raises(RuntimeError, match="in the middle"), write_atomically(path, durable=True):
        raise RuntimeError("in the middle")
    assert path.read_bytes() == OLD


def test_a_durable_file_is_on_disk_before_it_has_its_name_and_its_name_afterwards(path, monkeypatch):
    calls = recorded(monkeypatch, "fsync", "replace")
    replace(path)
    assert calls == [("fsync", "f.json.tmp"), ("replace", "f.json.tmp"), ("fsync", path.parent.name)]


def test_a_file_that_is_not_durable_waits_for_no_disk(path, monkeypatch):
    calls = recorded(monkeypatch, "fsync", "replace")
    replace(path, durable=False)
    assert calls == [("replace", "f.json.tmp")]


def test_a_file_put_in_place_of_the_temporary_one_is_the_one_that_reaches_the_disk(path, monkeypatch):
    """safetensors writes another file and renames it."""
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.fstat(fd).st_ino), fsync(fd)))
    with write_atomically(path, durable=True) as file:
        (path.parent / "other").write_bytes(NEW)
        os.rename(path.parent / "other", file.name)
    assert path.read_bytes() == NEW and synced == [path.stat().st_ino, path.parent.stat().st_ino]


def test_several_writers_of_one_path_have_temporary_files_of_their_own(path):
    with write_atomically(path, durable=False, unique=True) as first:
        with write_atomically(path, durable=False, unique=True) as second:
            assert first.name != second.name and {Path(f.name).suffix for f in (first, second)} == {".tmp"}
            first.write(b"first")
            second.write(b"second")
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first" and os.listdir(path.parent) == [path.name]
