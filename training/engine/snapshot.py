"""Copies a training state to host memory, quickly because every save reuses the same memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch


@dataclass
class Snapshot:
    """What one rank has to write. files: the content of DeepSpeed's files by path. weights: all weights, on rank 0."""

    files: dict[Path, object] = field(default_factory=dict)
    weights: dict[str, torch.Tensor] | None = None


class HostBuffers:
    """Host tensors that every save is copied into. pin: page-locked, so that the GPU copies in the background."""

    def __init__(self, *, pin: bool) -> None:
        self._pin = pin
        self._tensors: dict[str, torch.Tensor] = {}

    def copy(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        """A host tensor that `tensor` is copied to. A later call with the same key overwrites it.

        With `pin` the copy may still be running when this returns: call `wait` before reading the result.
        """
        held = self._tensors.get(key)
        if held is None or held.shape != tensor.shape or held.dtype != tensor.dtype:
            held = self._tensors[key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._pin)
        held.copy_(tensor.detach(), non_blocking=self._pin)
        return held

    def wait(self) -> None:
        """Waits until all copies are complete."""
        if self._pin:
            torch.cuda.synchronize()


def host_tree(value: object, key: str, buffers: HostBuffers | None) -> object:
    """A copy of the nested dicts, lists and tuples in `value` with its tensors as compact host tensors.

    key: a name for `value` that is unique in the save; tensors are copied under names derived from it. buffers: the
    host memory to copy to; None: tensors that are compact and on the host already are not copied. Values of any other
    type are returned as they are.
    """
    if isinstance(value, torch.Tensor):
        if buffers is not None:
            return buffers.copy(key, value)
        value = value.detach()
        # torch.save writes the whole storage of a view
        compact = value.is_contiguous() and value.untyped_storage().nbytes() == value.nbytes
        return value if compact and value.device.type == "cpu" else value.cpu().clone()
    if isinstance(value, dict):
        return type(value)((name, host_tree(entry, f"{key}/{name}", buffers)) for name, entry in value.items())
    if type(value) in (list, tuple):
        return type(value)(host_tree(entry, f"{key}/{i}", buffers) for i, entry in enumerate(value))
    return value
