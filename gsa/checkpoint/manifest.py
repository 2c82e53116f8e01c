"""When a checkpoint exists, and which one to take: docs/checkpoints.md.

A folder step_N is a checkpoint once its manifest.json is there: every file's size and sha256, and a digest
of the manifest itself. The manifest is written last, synced and renamed into place; then the text file
`latest` is replaced. So a kill at any moment leaves whole checkpoints and, at worst, a torn folder, which
everything here passes over by name.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

from gsa.checkpoint.errors import CheckpointError

__all__ = ["CheckpointError"]

FORMAT = 1
MANIFEST = "manifest.json"
LATEST = "latest"
PIN = "pinned"
TEMPORARY = ".tmp"
TRASH = ".trash-"
BLOCK_BYTES = 8 * 2**20


@dataclass(frozen=True)
class Entry:
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """files: path relative to the step folder -> size and hash. created: UTC, ISO 8601."""

    files: dict[str, Entry]
    created: str


@dataclass(frozen=True)
class Found:
    """A step folder. complete: its manifest is there and whole; reason: why not."""

    tag: str
    step: int
    path: Path
    complete: bool
    reason: str


# -- writing ------------------------------------------------------------------------------------------


def seal(step_dir: Path, *, hashes: Mapping[str, tuple[int, str]] | None = None) -> Manifest:
    """Makes a folder a checkpoint: writes the manifest of every file in it.

    hashes: {relative path: (bytes, sha256)} of files whose writer synced and hashed them; the others are
    synced and hashed here. A size that disagrees with the disk is a CheckpointError.
    """
    known = dict(hashes or {})
    names = _payload(step_dir)
    for name, (size, _) in known.items():
        if name not in names or (step_dir / name).stat().st_size != size:
            raise CheckpointError(f"{step_dir / name} is not what its writer reported ({size} bytes); the save is void")

    def entry(name: str) -> Entry:
        if name in known:
            return Entry(*known[name])
        _sync(step_dir / name)
        return _hash(step_dir / name)

    with ThreadPoolExecutor(4) as pool:
        files = dict(zip(names, pool.map(entry, names), strict=True))
    manifest = Manifest(files, datetime.now(timezone.utc).isoformat(timespec="seconds"))
    body = _body(manifest)
    _write_synced(step_dir / MANIFEST, json.dumps(body | {"digest": _digest(body)}, indent=1) + "\n")
    _sync(step_dir.parent)
    return manifest


def publish(output_dir: Path, tag: str) -> None:
    """Points `latest` at a sealed checkpoint, atomically."""
    _write_synced(output_dir / LATEST, tag + "\n")


def clear_torn(step_dir: Path) -> None:
    """Removes what an interrupted save left at this place. CheckpointError if a whole checkpoint is there."""
    if is_complete(step_dir):
        raise CheckpointError(f"{step_dir} is a checkpoint already; it is never overwritten in place")
    if step_dir.exists():
        shutil.rmtree(step_dir)


# -- reading ------------------------------------------------------------------------------------------


def read(step_dir: Path) -> Manifest:
    """The manifest of a checkpoint. CheckpointError when it is absent, edited, or of a newer format."""
    path = step_dir / MANIFEST
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        body = {key: raw[key] for key in ("format", "created", "files")}
        digest = raw["digest"]
    except FileNotFoundError as err:
        if not step_dir.exists():
            raise CheckpointError(f"{step_dir} does not exist") from err
        raise CheckpointError(f"{step_dir} has no {MANIFEST}: its save was interrupted; choose another checkpoint") from err
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise CheckpointError(f"{path} is damaged ({type(err).__name__}); choose another checkpoint") from err
    if raw["format"] != FORMAT:
        raise CheckpointError(f"{path} has format {raw['format']!r}, this project reads {FORMAT}; update the project")
    if digest != _digest(body):
        raise CheckpointError(f"{path} was edited or is damaged: its digest does not hold; choose another checkpoint")
    return Manifest({name: Entry(**entry) for name, entry in body["files"].items()}, body["created"])


def verify(step_dir: Path, *, hashes: bool = True) -> Manifest:
    """Checks every file of a checkpoint: presence and size, and with `hashes` every byte.

    CheckpointError lists all bad files. A file that the manifest does not know is one of them.
    """
    manifest = read(step_dir)

    def fault(name: str) -> str | None:
        path, entry = step_dir / name, manifest.files[name]
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry.bytes:
            return f"{name} has {path.stat().st_size} bytes, not {entry.bytes}"
        if hashes and _hash(path).sha256 != entry.sha256:
            return f"{name} is damaged: its sha256 is not the manifest's"
        return None

    with ThreadPoolExecutor(4) as pool:
        faults = [found for found in pool.map(fault, manifest.files) if found]
    faults += [f"{name} is not in the manifest" for name in _payload(step_dir) if name not in manifest.files]
    if faults:
        raise CheckpointError(f"{step_dir}: {'; '.join(faults)}. Choose another checkpoint, or restore the file(s)")
    return manifest


def is_complete(step_dir: Path) -> bool:
    """Is there a whole manifest? Says nothing of the other files' bytes: `verify` does."""
    try:
        read(step_dir)
    except CheckpointError:
        return False
    return True


def latest_tag(output_dir: Path) -> str | None:
    """What `latest` says; None when there is no such file."""
    try:
        return (output_dir / LATEST).read_text(encoding="utf-8").strip() or None
    except OSError:
        return None


def list_checkpoints(output_dir: Path) -> list[Found]:
    """Every step_N folder of a run, by step, torn ones too."""
    found = []
    for path in output_dir.glob("step_*"):
        number = path.name.removeprefix("step_")
        if not (number.isdecimal() and path.is_dir()):
            continue
        try:
            read(path)
            found.append(Found(path.name, int(number), path, True, ""))
        except CheckpointError as err:
            found.append(Found(path.name, int(number), path, False, str(err)))
    return sorted(found, key=lambda each: each.step)


def newest_good(output_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose every byte verifies, and a line for each newer one passed over."""
    passed_over = []
    for found in reversed(list_checkpoints(output_dir)):
        try:
            verify(found.path)
            return found.path, passed_over
        except CheckpointError as err:
            passed_over.append(str(err))
    return None, passed_over


def resolve(resume_from: str, output_dir: Path) -> Path:
    """The folder that a path, a tag or "latest" means. CheckpointError names what exists when it means none."""
    if resume_from == LATEST:
        tag = latest_tag(output_dir)
        if tag is None:
            raise CheckpointError(f"{output_dir / LATEST} does not exist: {_what_exists(output_dir)}")
        path = output_dir / tag
        if Path(tag).name != tag or not path.is_dir():
            raise CheckpointError(f"{output_dir / LATEST} names {tag!r}, which is not there: {_what_exists(output_dir)}")
        return path
    for path in (output_dir / resume_from, Path(resume_from)):
        if path.is_dir():
            return path
    raise CheckpointError(f"no checkpoint {resume_from!r}, neither in {output_dir} nor as a path: {_what_exists(output_dir)}")


def _what_exists(output_dir: Path) -> str:
    complete = [found.tag for found in list_checkpoints(output_dir) if found.complete]
    return f"there are {', '.join(complete)}" if complete else f"{output_dir} holds no whole checkpoint"


# -- keeping ------------------------------------------------------------------------------------------


def retain(output_dir: Path, *, keep_last: int, keep_every: int | None = None) -> list[str]:
    """Deletes old checkpoints, and torn folders older than the newest; returns a line for each.

    Kept: the newest keep_last, those whose step is a multiple of keep_every, those with a file named
    `pinned`, and what `latest` names. Nothing is deleted unless the newest verifies. A checkpoint is renamed
    out of sight before its files go, so a kill in between leaves nothing that looks whole.
    """
    if keep_last < 1:
        raise ValueError(f"keep_last={keep_last} must be at least 1")
    for leftover in output_dir.glob(f"{TRASH}*"):
        shutil.rmtree(leftover)
    found = list_checkpoints(output_dir)
    whole = [each for each in found if each.complete]
    if not whole:
        return []
    verify(whole[-1].path)
    kept = {each.tag for each in whole[-keep_last:]} | {latest_tag(output_dir)}
    kept |= {each.tag for each in whole if keep_every and each.step % keep_every == 0}
    kept |= {each.tag for each in found if (each.path / PIN).exists()}
    removed = []
    for each in found:
        if each.tag in kept or each.step > whole[-1].step:
            continue
        hidden = output_dir / f"{TRASH}{each.tag}"
        os.replace(each.path, hidden)
        shutil.rmtree(hidden)
        removed.append(f"removed {each.tag}" + ("" if each.complete else " (torn)"))
    return removed


def require_space(path: Path, wanted_bytes: int) -> None:
    """CheckpointError, in GiB, when the disk under `path` has less room than `wanted_bytes`."""
    free = shutil.disk_usage(path).free
    if free < wanted_bytes:
        raise CheckpointError(
            f"{path}: {free / 2**30:.2f} GiB free, {wanted_bytes / 2**30:.2f} GiB needed for a checkpoint; "
            f"free some room, or keep fewer checkpoints"
        )


# -- files --------------------------------------------------------------------------------------------


def _payload(step_dir: Path) -> list[str]:
    """Relative paths of the files that make up a checkpoint, sorted."""
    return sorted(
        path.relative_to(step_dir).as_posix() for path in step_dir.rglob("*")
        if path.is_file() and path.relative_to(step_dir).as_posix() not in (MANIFEST, PIN)
        and path.suffix != TEMPORARY
    )  # fmt: skip


def _hash(path: Path) -> Entry:
    sha, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            sha.update(block)
            size += len(block)
    return Entry(size, sha.hexdigest())


def _body(manifest: Manifest) -> dict:
    files = {name: asdict(entry) for name, entry in manifest.files.items()}
    return {"format": FORMAT, "created": manifest.created, "files": files}


def _digest(body: dict) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _write_synced(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + TEMPORARY)
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
