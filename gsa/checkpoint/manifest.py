"""A folder is a checkpoint when it has a manifest, and a good checkpoint when every file agrees with the manifest.

The manifest lists the size and sha256 of every file. It is written last: a save that is interrupted at any moment
leaves a folder without one, which is called torn and never mistaken for a checkpoint. One process per run folder
calls seal, publish, retain and clear_torn; any number of processes may read. Format: docs/checkpoints.md.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import MappingProxyType

from gsa.files import fsync, open_regular, read_small_file, write_atomically
from gsa.units import MIB, size_text

FORMAT = 1
MANIFEST = "manifest.json"
LATEST = "latest"
PIN = "pinned"
"""`retain` does not delete a checkpoint whose folder has a file of this name."""

_TAG = re.compile(r"step_(0|[1-9][0-9]*)")
_TEMPORARY = ".tmp"
_MAX_MANIFEST_BYTES = 64 * MIB
_OURS = re.compile(r".*_(?:model|optim)_states\.pt|model\.safetensors|config\.json|tokenizer\.json|pinned|.*\.tmp")
"""Names of the files that an interrupted save can leave."""
_TRASH = ".trash-"
_BLOCK_BYTES = 2**20
"""A small one: every thread that hashes leaves its block in an arena of the allocator, which does not give it back."""
_HASHING_THREADS = 4


class CheckpointError(ValueError):
    """A checkpoint cannot be read, written or found. The message names the file and says how to mend it."""


@dataclass(frozen=True)
class FileEntry:
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json.

    files: by path relative to the checkpoint's folder, with forward slashes. created: ISO 8601, UTC.
    """

    files: Mapping[str, FileEntry]
    created: str

    @property
    def digest(self) -> str:
        """sha256 of the rest of the manifest. It detects damage but not forgery: anyone can seal a folder."""
        canonical = json.dumps(self._body(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def render(self) -> bytes:
        """The content of the file; any other bytes are not this manifest."""
        return (json.dumps({**self._body(), "digest": self.digest}, sort_keys=True, indent=1) + "\n").encode()

    def _body(self) -> dict:
        return {
            "format": FORMAT,
            "created": self.created,
            "files": {name: asdict(entry) for name, entry in self.files.items()},
        }


@dataclass(frozen=True)
class Found:
    """A `step_N` folder. complete: names and sizes agree with the manifest; if not, reason says why."""

    tag: str
    step: int
    path: Path
    complete: bool
    reason: str


@dataclass(frozen=True)
class Removed:
    """A checkpoint that was deleted, or in a dry run would be.

    error: why the operating system refused to delete it, or None.
    """

    tag: str
    reason: str
    error: str | None = None

    def __str__(self) -> str:
        if self.error is None:
            return f"removed {self.tag}: {self.reason}"
        return f"warning: {self.tag} could not be removed: {self.error}; delete it by hand"


# -- writing -----------------------------------------------------------------------------------------------


def seal(
    step_dir: Path, files: Collection[str] | None = None, *, hashes: Mapping[str, tuple[int, str]] | None = None
) -> Manifest:
    """Makes a finished folder a checkpoint: forces every file to disk, then writes the manifest.

    files: the relative paths of which the checkpoint must consist; None: whatever is there.
    hashes: (bytes, sha256) by relative path, from writers that hashed while writing; the other files are read.
    Sealing again replaces the manifest. Raises CheckpointError, before a manifest is written, when a file is missing,
    unexpected, not a regular file or not as long as its writer reported, or when the disk refuses.
    """
    hashes = hashes or {}
    present = _contents(step_dir)
    wanted = set(present if files is None else files) | set(hashes)
    wrong = [f"{name}: missing; is the folder shared by all ranks?" for name in sorted(wanted - set(present))]
    wrong += [f"{name}: not one of the files to seal; delete it" for name in sorted(set(present) - wanted)]
    if not wanted:
        wrong = ["there is no file in it"]
    if wrong:
        raise CheckpointError(f"{step_dir} cannot become a checkpoint:\n  " + "\n  ".join(wrong))

    def entry_of(name: str) -> FileEntry:
        path = present[name]
        if not stat.S_ISREG(path.lstat().st_mode):
            raise CheckpointError(f"{path}: a link or special file; a checkpoint holds only files of its own")
        fsync(path)
        size = path.stat().st_size
        if name not in hashes:
            return FileEntry(size, sha256_of(path))
        written, sha256 = hashes[name]
        if size != written:
            raise CheckpointError(f"{path}: {size} bytes on disk, {written} were written; save again")
        return FileEntry(size, sha256)

    with writing(step_dir):
        with ThreadPoolExecutor(_HASHING_THREADS) as pool:
            entries = dict(zip(sorted(wanted), pool.map(entry_of, sorted(wanted)), strict=True))
        folders = {folder for path in present.values() for folder in path.parents}
        for folder in (f for f in folders if f.is_relative_to(step_dir)):
            fsync(folder)
        manifest = Manifest(entries, datetime.now(UTC).isoformat(timespec="seconds"))
        write_durably(step_dir / MANIFEST, manifest.render())
        fsync(step_dir.parent)  # the folder's own name
    return manifest


def publish(output_dir: Path, tag: str) -> None:
    """Makes `latest` name a sealed checkpoint, atomically. Raises CheckpointError when it is not sealed."""
    read(output_dir / tag)
    write_durably(output_dir / LATEST, f"{tag}\n".encode())


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an OSError while `path` is written into a CheckpointError."""
    try:
        yield
    except OSError as err:
        raise CheckpointError(
            f"{path} could not be written: {err.strerror or err}; checkpoints made before are untouched. "
            f"Free space or mend the disk, then --resume_from auto"
        ) from err


def write_durably(path: Path, data: bytes) -> None:
    """Replaces a file: after a crash at any moment it has its old content or all of the new.

    Raises CheckpointError when the disk refuses.
    """
    with writing(path), write_atomically(path, durable=True) as file:
        file.write(data)


def replace_durably(temporary: Path, path: Path) -> None:
    """Gives a finished file its name. The file and the name are on disk when this returns. Kept for others' imports."""
    fsync(temporary)
    os.replace(temporary, path)
    fsync(path.parent)


def clear_torn(step_dir: Path) -> None:
    """Removes what an interrupted save left, so that the step can be saved again. The folder need not exist.

    Raises CheckpointError when the folder has a manifest, good or damaged, or files that no save of this project
    leaves: a person has to move it.
    """
    if (step_dir / MANIFEST).exists():
        raise CheckpointError(f"{step_dir} holds a checkpoint already and is not overwritten; move it away")
    if step_dir.exists():
        if not step_dir.is_dir() or not is_torn(step_dir):
            raise CheckpointError(f"{step_dir} is or holds a file that is not of this project; move it away")
        shutil.rmtree(step_dir)  # interrupted half-way, it leaves a torn folder


def retain(
    output_dir: Path,
    keep_last: int,
    keep_every: int | None = None,
    pinned: Collection[str] = (),
    *,
    threads: int = _HASHING_THREADS,
    dry_run: bool = False,
) -> list[Removed]:
    """Deletes old checkpoints, after it has read back the newest one and found it good.

    These stay: the newest `keep_last` (at least 1), those whose step is a multiple of `keep_every`, those tagged in
    `pinned` or holding a file `pinned`, the one that `latest` names, linked folders, and damaged ones, which a person
    should look at. Torn folders older than the newest checkpoint are deleted too, unless they hold files that no save
    of this project writes.
    threads: how many read the newest one. dry_run: delete nothing and return what would be deleted.
    Returns what was deleted, and with its error what the operating system refused to delete. Raises CheckpointError,
    before any checkpoint is deleted, when the newest is not good.
    """
    if keep_last < 1 or (keep_every is not None and keep_every < 1):
        raise ValueError(f"keep_last={keep_last} and keep_every={keep_every} must be at least 1")
    stuck = [] if dry_run else _finish_deletions(output_dir)
    found = list_checkpoints(output_dir)
    complete = [f for f in found if f.complete]
    if not complete:
        return stuck
    newest = complete[-1]
    protected = {*pinned, latest_tag(output_dir), *(f.tag for f in complete[-keep_last:])}
    removable = []
    for f in found[: found.index(newest)]:
        if f.tag in protected or (f.path / PIN).exists() or f.path.is_symlink():
            continue
        if is_torn(f.path):
            removable.append(Removed(f.tag, "torn: its save was interrupted"))
        elif f.complete and (keep_every is None or f.step % keep_every):
            removable.append(Removed(f.tag, f"older than the {keep_last} newest; {newest.tag} is good"))
    if removable:
        verify(newest.path, threads=threads)
    return stuck + (removable if dry_run else [_deleted(output_dir, one, _discard) for one in removable])


def _finish_deletions(output_dir: Path) -> list[Removed]:
    """Deletes what interrupted deletions left; returns what the operating system refused to delete."""
    left = [Removed(path.name, "its deletion was interrupted") for path in output_dir.glob(f"{_TRASH}*")]
    return [done for one in left if (done := _deleted(output_dir, one, shutil.rmtree)).error is not None]


def _deleted(output_dir: Path, removable: Removed, delete: Callable[[Path], None]) -> Removed:
    try:
        delete(output_dir / removable.tag)
    except OSError as err:
        return replace(removable, error=str(err))
    return removable


def free_bytes(path: Path) -> int:
    """Bytes that can still be written on the disk of `path`, which need not exist yet."""
    while not path.exists():
        path = path.absolute().parent
    return shutil.disk_usage(path).free


def require_space(path: Path, bytes_needed: int) -> None:
    """Raises CheckpointError when fewer than `bytes_needed` bytes can be written at `path`."""
    free = free_bytes(path)
    if free < bytes_needed:
        raise CheckpointError(
            f"{path}: a checkpoint needs {size_text(bytes_needed)} and {size_text(free)} are free; "
            f"free {size_text(bytes_needed - free)}, or choose another --output_dir"
        )


# -- reading -----------------------------------------------------------------------------------------------


def read(step_dir: Path) -> Manifest:
    """Reads the manifest only. Raises CheckpointError when it is missing, edited, or of a newer format."""
    require_checkpoint_folder(step_dir)
    manifest, wrong = _read(step_dir)
    if manifest is None:
        raise _refused(step_dir, [wrong])
    return manifest


def require_checkpoint_folder(step_dir: Path) -> None:
    """Raises CheckpointError when `step_dir` is no folder, or that of a run, whose checkpoints the message lists."""
    if not step_dir.is_dir():
        what = "is no folder" if step_dir.exists() else "does not exist"
        raise CheckpointError(f"{step_dir} {what}; give a checkpoint such as outputs/mine/step_300")
    if not (step_dir / MANIFEST).exists() and list_checkpoints(step_dir):
        raise CheckpointError(f"{step_dir} is the folder of a run, not of a checkpoint: {_choices(step_dir)}")


def no_run_in(folder: Path) -> str:
    """What to say where the folder of a run was expected, and `folder` is none."""
    if (folder / MANIFEST).exists():
        return f"{folder} is a checkpoint; its run is {folder.parent}"
    what = "holds no run" if folder.is_dir() else "is no folder"
    return f"{folder} {what}; give the --output_dir of one, such as outputs/quickstart"


def verify(
    step_dir: Path, *, hashes: bool = True, threads: int = _HASHING_THREADS, files: Collection[str] | None = None
) -> None:
    """Raises CheckpointError, naming every bad file, unless the folder is exactly what was sealed.

    hashes: read every byte, in `threads` threads; without it only names and sizes are compared. files: compare only
    these, which a reader is about to use; the others may be missing.
    """
    require_checkpoint_folder(step_dir)
    wrong = _wrong(step_dir, hashes=hashes, threads=threads, files=files)
    if wrong:
        raise _refused(step_dir, wrong)


def is_complete(step_dir: Path) -> bool:
    """Whether names and sizes agree with the manifest; contents are not hashed."""
    return not _wrong(step_dir, hashes=False)


def latest_tag(output_dir: Path) -> str | None:
    """The tag in `latest`; None before the first checkpoint. Raises CheckpointError when it holds no tag."""
    path = output_dir / LATEST
    if not path.exists():
        return None
    try:
        tag = read_small_file(path, MIB).decode("utf-8", errors="replace").strip()
    except OSError as err:
        mend = "delete it, and take --resume_from auto"
        raise CheckpointError(f"{path}: cannot be read: {err.strerror}; {mend}") from err
    if not _TAG.fullmatch(tag):
        raise CheckpointError(f"{path} holds {tag[:40]!r}, no tag like step_100; take --resume_from auto")
    return tag


def list_checkpoints(output_dir: Path) -> list[Found]:
    """Every `step_N` folder, complete or not, ordered by step."""
    found = []
    for path in output_dir.iterdir() if output_dir.is_dir() else ():
        if _TAG.fullmatch(path.name) and path.is_dir():
            wrong = _wrong(path, hashes=False)
            step = int(path.name.removeprefix("step_"))
            found.append(Found(path.name, step, path, complete=not wrong, reason="; ".join(wrong)))
    return sorted(found, key=lambda f: f.step)


def newest_good(output_dir: Path, avoid: Mapping[str, str] = MappingProxyType({})) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose every byte agrees with its manifest, and one line for each that was passed over.

    avoid: tags that are taken only where no other checkpoint is good, each with the reason.
    """
    passed_over, avoided = [], None
    for found in reversed(list_checkpoints(output_dir)):
        wrong = _wrong(found.path, hashes=True)
        if not wrong and found.tag in avoid:
            avoided = avoided or found.path
            wrong = [avoid[found.tag]]
        if not wrong:
            return found.path, passed_over
        passed_over.append(f"{found.tag}: {'; '.join(wrong)}")
    if avoided is not None:
        passed_over.append(f"{avoided.name} is taken all the same: no other checkpoint is good")
    return avoided, passed_over


def resolve(resume_from: str, output_dir: Path) -> Path | None:
    """The checkpoint that `resume_from` names: a tag in `output_dir`, a path, "latest", or "auto".

    "auto" is the newest good one, every byte verified, or None when there is none. For the others only the manifest is
    read: call `verify` before loading. Raises CheckpointError, listing what there is, when it does not exist.
    """
    if resume_from == "auto":
        return newest_good(output_dir)[0]
    path = named(resume_from, output_dir)
    if not path.is_dir():
        raise CheckpointError(f"{path}, meant by {resume_from!r}, does not exist: {_choices(output_dir)}")
    read(path)
    return path


def named(resume_from: str, output_dir: Path) -> Path:
    """The folder that a tag in `output_dir`, a path or "latest" names, whether it exists or not."""
    tag = latest_tag(output_dir) if resume_from == LATEST else resume_from
    if tag is None:
        raise CheckpointError(f"{output_dir / LATEST} does not exist: {_choices(output_dir)}")
    # made absolute, so that its last part is the tag also for "." and ".."
    return output_dir / tag if _TAG.fullmatch(tag) else Path(os.path.abspath(tag))


# -- inside ------------------------------------------------------------------------------------------------


def is_torn(step_dir: Path) -> bool:
    """Whether a folder has no manifest, and no file but those that a save of this project writes before it."""
    if (step_dir / MANIFEST).exists():
        return False
    return all(path.is_dir() or _OURS.fullmatch(path.name) for path in step_dir.rglob("*"))


def _contents(step_dir: Path) -> dict[str, Path]:
    """The files that a manifest lists, by relative path: all but itself, the pin and temporaries; no folders."""
    return {
        name: path
        for path in step_dir.rglob("*")
        if (name := path.relative_to(step_dir).as_posix()) not in (MANIFEST, PIN)
        if path.is_symlink() or not path.is_dir()
        if path.suffix != _TEMPORARY
    }


def _read(step_dir: Path) -> tuple[Manifest | None, str]:
    """The manifest, or None and what is wrong with it."""
    try:
        raw = read_small_file(step_dir / MANIFEST, _MAX_MANIFEST_BYTES)
    except FileNotFoundError:
        return None, f"{MANIFEST}: missing: the save was interrupted, or this is no checkpoint"
    except OSError as err:
        return None, f"{MANIFEST}: cannot be read: {err.strerror}"
    manifest = None
    try:
        data = json.loads(raw)
        if type(data["format"]) is int and data["format"] > FORMAT:
            return (None, f"{MANIFEST}: format {data['format']}; this version reads up to {FORMAT}: update the project")
        manifest = Manifest({name: FileEntry(**entry) for name, entry in data["files"].items()}, data["created"])
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        pass  # not the shape of a manifest
    # compared byte for byte: an edit that json does not notice is an edit, too
    if manifest is None or manifest.render() != raw:
        return None, f"{MANIFEST}: edited or damaged: it does not agree with its own digest"
    return manifest, ""


def _wrong(
    step_dir: Path, *, hashes: bool, threads: int = _HASHING_THREADS, files: Collection[str] | None = None
) -> list[str]:
    """One line for every bad file; none when the folder is exactly what was sealed."""
    manifest, wrong = _read(step_dir)
    if manifest is None:
        return [wrong]
    present = {name: path for name, path in _contents(step_dir).items() if files is None or name in files}
    sealed = {name for name in manifest.files if files is None or name in files}
    lines = [f"{name}: not in the manifest" for name in set(present) - sealed]
    lines += [f"{name}: missing" for name in sealed - set(present)]
    names = sorted(sealed & set(present))
    with ThreadPoolExecutor(threads) as pool:
        lines += filter(None, pool.map(partial(_wrong_file, manifest, present, hashes=hashes), names))
    return sorted(lines)


def _wrong_file(manifest: Manifest, present: Mapping[str, Path], name: str, *, hashes: bool) -> str | None:
    path, entry = present[name], manifest.files[name]
    try:
        info = path.lstat()
        if not stat.S_ISREG(info.st_mode):
            return f"{name}: replaced by a link or special file"
        if info.st_size != entry.bytes:
            return f"{name}: {info.st_size} bytes, {entry.bytes} in the manifest"
        sha256 = sha256_of(path) if hashes else entry.sha256
    except OSError as err:
        return f"{name}: cannot be read: {err.strerror}"
    if sha256 == entry.sha256:
        return None
    owner = next((other for other, e in manifest.files.items() if e.sha256 == sha256), None)
    return f"{name}: its sha256 is not that of the manifest" + (f" but that of {owner}" if owner else "")


def _refused(step_dir: Path, wrong: list[str]) -> CheckpointError:
    return CheckpointError(
        f"{step_dir} is not a good checkpoint:\n  " + "\n  ".join(wrong) + "\n"
        "Restore it from a copy, or take another: --resume_from auto finds the newest good one"
    )


def _choices(output_dir: Path) -> str:
    tags = [f.tag for f in list_checkpoints(output_dir) if f.complete]
    return f"choose one of {', '.join(tags)} in {output_dir}" if tags else f"{output_dir} holds no complete checkpoint"


def _discard(step_dir: Path) -> None:
    """Deletes a folder. It is renamed first, so that what a kill leaves no longer has a checkpoint's name."""
    trash = step_dir.with_name(_TRASH + step_dir.name)
    os.replace(step_dir, trash)
    fsync(trash.parent)  # a power cut must not restore the name of a half-deleted folder
    shutil.rmtree(trash)


def sha256_of(path: Path) -> str:
    """The hexadecimal sha256 of a file, which is read in blocks."""
    sha, block = hashlib.sha256(), memoryview(bytearray(_BLOCK_BYTES))
    with open(open_regular(path), "rb", buffering=0) as file:
        while count := file.readinto(block):
            sha.update(block[:count])
    return sha.hexdigest()
