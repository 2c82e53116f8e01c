"""Gradient norms by part, sizes of updates and discarded gradients, inside the optimizers of DeepSpeed 0.19.8.

Each function takes torch's optimizer (ZeRO 0) or one of DeepSpeed's two (ZeRO 1 and 2, ZeRO 3). Nothing here is a
collective: the loop sums what the ranks return, together with the other numbers of the step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

PARTS = ("indexer", "gates", "rest")
"""Parts of a model, by the names of its parameters, whose gradient norms are reported."""
UPDATED = ("main", "indexer")
"""Groups of matrices whose updates are reported."""
_GROUPS = {"decay": "main", "indexer": "indexer"}
SUBSET_SIZE = 1 << 18
"""About how many elements of each master tensor a MasterSubset holds, evenly spaced."""


def part_of(name: str) -> str:
    """Which of PARTS a parameter belongs to."""
    return "indexer" if ".indexer." in name else "gates" if "_gate." in name else "rest"


def gradient_squares(model: nn.Module, optimizer: Any, zero_stage: int) -> torch.Tensor | None:
    """(len(PARTS),) float64: this rank's share of the squared gradient norm by part, to be summed over ranks.

    Valid between the last backward pass of a step and its update. None where gradients are offloaded.
    """
    if getattr(optimizer, "cpu_offload", False) or getattr(optimizer, "offload_optimizer", False):
        return None
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = torch.zeros(len(PARTS), dtype=torch.float64, device=next(model.parameters()).device)
    for parameter, gradient in _gradients(model, optimizer, zero_stage):
        squares = torch.linalg.vector_norm(gradient, dtype=torch.float32).double() ** 2
        found[PARTS.index(part_of(names[id(parameter)]))] += squares
    if zero_stage == 0:  # every rank holds the whole gradient
        found /= torch.distributed.get_world_size()
    return found


def _gradients(model: nn.Module, optimizer: Any, zero_stage: int) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
    if zero_stage == 0:
        yield from ((p, p.grad) for p in model.parameters() if p.grad is not None)
        return
    groups = optimizer.fp16_groups if zero_stage == 3 else optimizer.params_in_partition
    for number, parameters in enumerate(groups):
        # not strict: padding follows the last parameter
        yield from zip(parameters, optimizer.averaged_gradients[number], strict=False)


class MasterSubset:
    """Copies a subset of the master weights before a step; after it, `squares` measures how much they have changed."""

    def __init__(self, optimizer: Any, zero_stage: int) -> None:
        self._on_every_rank = zero_stage == 0
        self._masters = [(_GROUPS[name], flat) for name, flat in _masters(optimizer, zero_stage) if name in _GROUPS]
        self._before = [_subset(flat).clone() for _, flat in self._masters]

    def squares(self) -> torch.Tensor:
        """(len(UPDATED), 2) float64: squared change and squared weights of the subset, to be summed over ranks."""
        device = self._before[0].device if self._before else "cpu"
        found = torch.zeros(len(UPDATED), 2, dtype=torch.float64, device=device)
        for (name, flat), before in zip(self._masters, self._before, strict=True):
            now = _subset(flat)
            found[UPDATED.index(name), 0] += (now - before).double().square().sum()
            found[UPDATED.index(name), 1] += now.double().square().sum()
        return found / torch.distributed.get_world_size() if self._on_every_rank else found


def _subset(flat: torch.Tensor) -> torch.Tensor:
    return flat.detach().flatten()[:: max(1, flat.numel() // SUBSET_SIZE)]


def _masters(optimizer: Any, zero_stage: int) -> Iterator[tuple[str, torch.Tensor]]:
    """(name of the parameter group, tensor of its masters on this rank), for every tensor of the optimizer."""
    if zero_stage == 0:
        yield from ((group["name"], p) for group in optimizer.param_groups for p in group["params"])
    elif zero_stage == 3:
        for number, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
            yield optimizer.param_groups[optimizer.sub_group_to_group_id[number]]["name"], flat
    else:
        for group, flat in zip(optimizer.param_groups, optimizer.single_partition_of_fp32_groups, strict=True):
            yield group["name"], flat


def drop_gradients(optimizer: Any, zero_stage: int) -> None:
    """Discards the accumulated gradient, as the optimizers do themselves when an fp16 gradient overflows."""
    if zero_stage == 0:
        optimizer.zero_grad(set_to_none=True)
    elif zero_stage == 3:
        optimizer._pre_step()
        optimizer._partition_all_parameters()
        optimizer._overflow_clean_up(optimizer.loss_scale)
    else:
        optimizer.zero_grad(set_to_none=True)
        optimizer._release_preflattened_grad_buffers()
        if optimizer.cpu_offload:
            optimizer.reset_cpu_buffers()
            return
        for number in optimizer.averaged_gradients:
            optimizer.averaged_gradients[number] = None
            optimizer.all_grad_tensors[number] = None
