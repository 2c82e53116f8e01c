"""Reads files of torch.save without executing anything in them."""

from __future__ import annotations

import threading
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from gsa.checkpoint.manifest import CheckpointError
from gsa.files import open_regular

_ZIP_MAGIC = b"PK\x03\x04"
_MEND = "take another checkpoint: --resume_from auto finds the newest good one"
_allow_list_lock = threading.Lock()

Allowed = type | Callable[..., object] | tuple[type | Callable[..., object], str]


def load(path: str | Path, *, extra_allowed: Sequence[Allowed] = (), mmap: bool = False) -> object:
    """The content of a file of `torch.save`, on the CPU: tensors, plain containers and numbers.

    extra_allowed: classes and functions that the file may name besides torch's own allow-list; (stand-in, name) puts
    the stand-in where the file names that class. mmap: tensors are read from the file when they are first used; the
    file must not change as long as they exist.
    Raises CheckpointError, before anything in the file is executed, when it is missing, damaged, older than torch 1.6,
    or names anything else.
    """
    try:
        with open(open_regular(Path(path)), "rb") as file:
            magic = file.read(len(_ZIP_MAGIC))
            packed = magic == _ZIP_MAGIC and _is_packed(file)
    except OSError as err:
        raise CheckpointError(f"{path}: cannot be read: {err.strerror}; {_MEND}") from err
    # torch would read anything else as one of its old formats: a pickle, or a tar archive of pickles
    if magic != _ZIP_MAGIC:
        raise CheckpointError(f"{path}: not a file of torch.save (torch 1.6 or later), or damaged; {_MEND}")
    if packed:
        what = "its parts are compressed, which torch.save never does: they might fill all memory"
        raise CheckpointError(f"{path}: {what}; {_MEND}")
    # torch has one allow-list per process, and safe_globals removes its names at the end
    with _allow_list_lock, safe_globals(list(extra_allowed)):
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        except Exception as err:  # untrusted bytes can make torch raise anything
            raise CheckpointError(f"{path}: {_explain(path, err)}") from err


def _is_packed(file: BinaryIO) -> bool:
    """Whether a part of a zip file is larger than what it takes there; False for a file that is no whole zip file."""
    try:
        with zipfile.ZipFile(file) as parts:
            return any(part.compress_type != zipfile.ZIP_STORED for part in parts.infolist())
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError):
        return False  # torch says what is wrong with it


def _explain(path: str | Path, err: Exception) -> str:
    try:
        refused = sorted(get_unsafe_globals_in_checkpoint(path))  # reads the pickle as data
    except Exception:  # untrusted bytes, as above
        refused = []
    if not refused:
        return f"damaged, or not made of tensors and plain values ({type(err).__name__}); {_MEND}"
    if any(name.startswith("omegaconf.") for name in refused):
        return (
            f"refused: it holds an OmegaConf object ({', '.join(refused)}), which only its own code could "
            f"restore; save OmegaConf.to_container(config, resolve=True) instead"
        )
    return (
        f"refused, and nothing in it was run: it names {', '.join(refused)}, but a checkpoint holds only "
        f"tensors and plain values. Do not trust where it came from; {_MEND}"
    )
