"""All ranks of a launch hold the same run: what each was given is compared before the engine is built."""

from __future__ import annotations

import hashlib
import platform
import socket
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import gsa
from gsa.checkpoint.manifest import writing
from gsa.units import flatten
from training.config import ConfigError, RunConfig, RunSpec, to_plain
from training.data import DataError, PackedTokens
from training.data.open import open_data
from training.engine.world import World
from training.record.run_folder import PROJECT, FolderError, RunFolder, version

MAX_SHOWN = 6
"""How many differences a message lists."""
SHARED_FOLDER_S = 20.0
"""How long a rank on another host looks for rank 0's file in the output folder: NFS may show it late."""
LOCAL_FOLDER_S = 2.0
"""The same on the host of rank 0."""


@dataclass(frozen=True)
class Holding:
    """What a rank was given, by name: `started` with, and the fingerprints of its `texts`, or why it has none."""

    host: str
    started: dict[str, Any]
    texts: dict[str, str]
    refusal: str | None


def open_same_data(given: RunSpec, cfg: RunConfig, world: World) -> tuple[PackedTokens, PackedTokens]:
    """Opens the training text and the held-out text on every rank, and compares what the ranks hold.

    given: what this rank was started with. cfg: rank 0's configuration, with what the checkpoint decides: every rank
    opens the text that it names. A collective. Raises, on all ranks the same: ConfigError when configuration,
    DeepSpeed's configuration, versions or source files differ; DataError when a rank cannot use its text, or has
    another.
    """
    opened, texts, refusal = None, {}, None
    try:
        opened = open_data(cfg)
        texts = {"training text": opened[0].fingerprint, "held-out text": opened[1].fingerprint}
    except DataError as err:
        refusal = str(err)
    held = world.gather(Holding(socket.gethostname(), _started_with(given), texts, refusal))
    hosts = [holding.host for holding in held]
    if lines := list(_differences([holding.started for holding in held], hosts)):
        raise ConfigError(
            _listed("the ranks were not started with the same run", lines)
            + "\nStart every rank with the same command, files, code and installation"
        )
    for rank, holding in enumerate(held):
        if holding.refusal is not None:
            raise DataError(f"rank {rank} on {holding.host}: {holding.refusal}" if rank else holding.refusal)
    if lines := list(_differences([holding.texts for holding in held], hosts)):
        raise DataError(
            _listed(f"the ranks do not have the same text under {', '.join(opened[0].sources)}", lines)
            + "\nCopy the dataset of rank 0 to every host, or put it on a file system that all share"
        )
    return opened


def require_same_folder(folder: RunFolder, world: World) -> None:
    """Makes the output folder and proves that every rank sees the same one. A collective.

    Raises, on all ranks the same, FolderError when a rank does not find in its folder what rank 0 writes there, and
    CheckpointError when rank 0 cannot write.
    """
    path, existed = folder.path, folder.path.exists()
    nonce, machine = world.broadcast((uuid.uuid4().hex, _boot_id()))
    proof = path / f".same_folder.{nonce}"
    world.from_main(lambda: _write_proof(proof))
    patience_s = LOCAL_FOLDER_S if machine == _boot_id() else SHARED_FOLDER_S
    found = world.gather((socket.gethostname(), _appears(proof, patience_s)))
    world.from_main(lambda: proof.unlink(missing_ok=True))
    missing = [f"rank {rank} on {host}" for rank, (host, seen) in enumerate(found) if not seen]
    if not missing:
        return
    if world.is_main and not existed:
        path.rmdir()
    raise FolderError(
        f"--output_dir {path} is not one folder: {', '.join(missing)} did not find there what rank 0 on {found[0][0]} "
        f"wrote; give a folder on a file system that all hosts share, and the same on every rank"
    )


def _write_proof(path: Path) -> None:
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text()


def _appears(path: Path, patience_s: float) -> bool:
    end = time.monotonic() + patience_s
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


def _started_with(spec: RunSpec) -> dict[str, Any]:
    return {
        **flatten(to_plain(spec.cfg)),
        **{f"DeepSpeed's {key}": value for key, value in flatten(spec.ds_config).items()},
        "version of Python": platform.python_version(),
        "version of torch": str(torch.__version__),
        "version of DeepSpeed": version("deepspeed"),
        f"version of {PROJECT}": version(PROJECT),
        "digest of the source files": source_digest(),
    }


PACKAGES = (Path(gsa.__file__).parent, Path(__file__).parents[1])
"""The folders of gsa and training."""


def source_digest(packages: Sequence[Path] = PACKAGES) -> str:
    """The sha256 of the names and contents of all source files in the folders `packages`."""
    digest = hashlib.sha256()
    for root in packages:
        for path in sorted(root.rglob("*.py")):
            digest.update(f"{root.name}/{path.relative_to(root)}".encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _differences(held: list[dict[str, Any]], hosts: list[str]) -> Iterator[str]:
    """One line for each name whose value is not the same on all ranks. held, hosts: of each rank."""
    for name in dict.fromkeys(name for values in held for name in values):
        shown = [_shown(values.get(name, "nothing")) for values in held]
        if len(set(shown)) > 1:
            other = next(rank for rank, value in enumerate(shown) if value != shown[0])
            yield f"{name}: {shown[0]} on rank 0 ({hosts[0]}), {shown[other]} on rank {other} ({hosts[other]})"


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({hashlib.sha256(text.encode()).hexdigest()[:12]})"


def _listed(head: str, lines: list[str]) -> str:
    more = [] if len(lines) <= MAX_SHOWN else [f"and {len(lines) - MAX_SHOWN} more"]
    return "\n  ".join([f"{head}:", *lines[:MAX_SHOWN], *more])
