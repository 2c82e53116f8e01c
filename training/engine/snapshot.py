"""Copies of a training state in host memory, made fast because their memory is used again and again."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch


@dataclass
class Snapshot:
    """What one rank has to write: DeepSpeed's files by path, and on rank 0 the whole weights."""

    files: dict[Path, object] = field(default_factory=dict)
    weights: dict[str, torch.Tensor] | None = None


class HostBuffers:
    """Host tensors that one save after another is copied into. pin: page-locked, so that a GPU writes them itself."""

    def __init__(self, *, pin: bool) -> None:
        self._pin = pin
        self._tensors: dict[str, torch.Tensor] = {}

    def copy(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` as a host tensor of its own; a later call with the same key overwrites it.

        From a GPU the copy may be under way when this returns: call `wait` before reading it.
        """
        held = self._tensors.get(key)
        if held is None or held.shape != tensor.shape or held.dtype != tensor.dtype:
            held = self._tensors[key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._pin)
        held.copy_(tensor.detach(), non_blocking=self._pin)
        return held

    def wait(self) -> None:
        if self._pin:
            torch.cuda.synchronize()


def host_tree(value: object, key: str, buffers: HostBuffers | None) -> object:
    """`value` with its tensors replaced by compact host ones, containers rebuilt, everything else as it is.

    buffers: where to copy to; None: tensors that are compact and on the host already are taken as they are.
    """
    if isinstance(value, torch.Tensor):
        if buffers is not None:
            return buffers.copy(key, value)
        value = value.detach()
        # a view would bring its whole storage into the file
        compact = value.is_contiguous() and value.untyped_storage().nbytes() == value.nbytes
        return value if compact and value.device.type == "cpu" else value.cpu().clone()
    if isinstance(value, dict):
        return type(value)((name, host_tree(entry, f"{key}/{name}", buffers)) for name, entry in value.items())
    if type(value) in (list, tuple):
        return type(value)(host_tree(entry, f"{key}/{i}", buffers) for i, entry in enumerate(value))
    return value
