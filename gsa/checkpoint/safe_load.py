"""Reads files that torch.save wrote without running anything in them."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from gsa.checkpoint.errors import CheckpointError

__all__ = ["CheckpointError", "load"]


def load(path: str | Path, *, extra_allowed: Sequence[type | Callable] = (), mmap: bool = False) -> Any:
    """The object in a torch.save file, tensors on the CPU.

    Only tensors and plain containers are built, and the classes in extra_allowed; mmap: leave tensors on
    disk until they are read. Raises CheckpointError, and has run nothing, when the file holds anything else
    or is not a whole torch file.
    """
    path = Path(path)
    try:
        with torch.serialization.safe_globals(list(extra_allowed)):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError as err:
        raise CheckpointError(f"{path} is missing; choose another checkpoint") from err
    except pickle.UnpicklingError as err:
        raise CheckpointError(f"{path}: {_refused(str(err))}; nothing in it was run. Choose a checkpoint you trust") from err
    except Exception as err:  # a damaged file can fail anywhere in zip, pickle or tensor code
        raise CheckpointError(
            f"{path} is damaged: not a whole torch file ({type(err).__name__}); choose another checkpoint"
        ) from err


def _refused(message: str) -> str:
    """The name of what was refused, out of torch's long advice to switch safety off."""
    named = re.search(r"GLOBAL ([\w.]+)|(?:import|class|function) ([\w.]+)", message)
    name = next((group for group in named.groups() if group), None) if named else None
    if name:
        return f"refused: it asks for {name}, which is not on the allow-list"
    return "refused: it holds something other than tensors and plain values, or is damaged"
