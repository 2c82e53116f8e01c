"""Installs a full training state in the partitions of a DeepSpeed engine of any ZeRO stage and number of ranks.

The reverse of gsa/checkpoint/full_state.py, which reads a full state from a checkpoint's files. Uses internals of the
optimizers of DeepSpeed 0.19.8. Only one parameter's state is in memory at a time.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from gsa.checkpoint.full_state import FullState, ParameterState
from gsa.checkpoint.manifest import CheckpointError

MOMENTS = ("exp_avg", "exp_avg_sq")


def install(state: FullState, model: nn.Module, optimizer: Any, zero_stage: int) -> None:
    """Sets weights, master weights, moments, Adam's step, buffers and hyperparameters to those of `state`.

    optimizer: the engine's: DeepSpeed's for the ZeRO stage, or torch's at stage 0. Raises CheckpointError when the
    state has other parameters or shapes than the model, before anything is changed; or when it cannot be represented
    at this ZeRO stage.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    _require_fit(state, model)
    with torch.no_grad():
        if zero_stage == 0:
            _install_whole(state, names, optimizer)
        elif zero_stage == 3:
            _install_partitioned_parameters(state, names, optimizer)
        else:
            _install_flat_partitions(state, names, optimizer)
        for name, buffer in model.named_buffers():
            if name in state.buffers:
                buffer.copy_(state.buffers[name])
    for group in optimizer.param_groups:
        group.update(state.groups.get(group["name"], {}))


def _require_fit(state: FullState, model: nn.Module) -> None:
    shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in model.named_parameters()}
    saved = {name: parameter.shape for name, parameter in state.parameters.items()}
    wrong = [
        f"{name}: {tuple(saved[name]) if name in saved else 'nothing'} in the checkpoint, "
        f"{tuple(shapes[name]) if name in shapes else 'nothing'} in the model"
        for name in sorted(saved.keys() | shapes.keys())
        if saved.get(name) != shapes.get(name)
    ]
    if wrong:
        more = f"\n  and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        raise CheckpointError("the checkpoint does not fit the model:\n  " + "\n  ".join(wrong[:10]) + more)


def _adam_state(like: torch.Tensor, members: list[ParameterState]) -> dict[str, torch.Tensor]:
    """A new AdamW state for one tensor of the optimizer: zero moments, and the step that its parameters share."""
    steps = {member.step for member in members}
    if len(steps) > 1:
        raise CheckpointError(
            f"parameters of one group have had {sorted(steps)} updates of Adam, but ZeRO has one count for a group; "
            f"resume with ZeRO 0 and training.precision=fp32"
        )
    zeros = {moment: torch.zeros_like(like.detach()) for moment in MOMENTS}
    return {"step": torch.tensor(steps.pop() if steps else 0.0, dtype=torch.float32), **zeros}


def _install_whole(state: FullState, names: dict[int, str], optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            saved = state.parameters[names[id(parameter)]]
            parameter.copy_(saved.full("master"))
            adam = optimizer.state[parameter] = _adam_state(parameter, [saved])
            for moment in MOMENTS:
                adam[moment].copy_(saved.full(moment))


def _install_flat_partitions(state: FullState, names: dict[int, str], optimizer: Any) -> None:
    """ZeRO 1 and 2: the master weights of a group are one flat tensor, of which each rank has a contiguous part."""
    for group, flat in zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True):
        members = [state.parameters[names[id(parameter)]] for parameter in group]
        adam = optimizer.optimizer.state[flat] = _adam_state(flat, members)
        for parameter, saved in zip(group, members, strict=True):
            master = saved.full("master")
            parameter.data.copy_(master)
            at = parameter._hp_mapping
            if at is None:  # this rank's partition has no part of it
                continue
            whole, mine = at.lp_fragment_address, at.hp_fragment_address
            pairs = [(flat, master)] + [(adam[moment], saved.full(moment)) for moment in MOMENTS]
            for partition, full in pairs:
                partition.data.narrow(0, mine.start, mine.numel).copy_(
                    full.flatten().narrow(0, whole.start, whole.numel)
                )


def _install_partitioned_parameters(state: FullState, names: dict[int, str], optimizer: Any) -> None:
    """ZeRO 3: each rank has an equal part of every parameter, and the last part is padded."""
    if optimizer.swap_optimizer or optimizer.params_in_nvme_and_cpu:
        raise CheckpointError(
            "a checkpoint of another layout cannot be loaded with NVMe offload; resume without offload, save, and "
            "resume from that checkpoint with NVMe offload"
        )
    optimizer.checkpoint_event_prologue()
    rank = dist.get_rank(optimizer.dp_process_group)
    for number, group in enumerate(optimizer.fp16_groups):
        flat = optimizer.fp32_partitioned_groups_flat[number]
        members = [state.parameters[names[id(parameter)]] for parameter in group]
        adam = optimizer.optimizer.state[flat] = _adam_state(flat, members)
        flat.data.zero_()
        offset = 0
        for parameter, saved in zip(group, members, strict=True):
            width = parameter.partition_numel()
            mine = max(0, min(width, saved.shape.numel() - rank * width))
            if mine:
                pairs = [(flat, saved.full("master"))] + [(adam[moment], saved.full(moment)) for moment in MOMENTS]
                for partition, full in pairs:
                    partition.data.narrow(0, offset, mine).copy_(full.flatten().narrow(0, rank * width, mine))
            offset += width
        working = optimizer.fp16_partitioned_groups_flat[number]
        working.data.copy_(flat.data)
        parts = optimizer.unflatten(working, optimizer.fp16_partitioned_groups[number])
        for part, now in zip(optimizer.fp16_partitioned_groups[number], parts, strict=True):
            part.data = now.data
    optimizer.checkpoint_event_epilogue()


def zero_padding(optimizer: Any) -> None:
    """Sets the padding of ZeRO 3's partitions to zero, so that equal states are saved as equal files.

    DeepSpeed leaves it uninitialised.
    """
    rank = dist.get_rank(optimizer.dp_process_group)
    for number, group in enumerate(optimizer.fp16_groups):
        offset = 0
        for parameter, part in zip(group, optimizer.fp16_partitioned_groups[number], strict=True):
            width = parameter.partition_numel()
            mine = max(0, min(width, parameter.ds_numel - rank * width))
            flat = optimizer.fp32_partitioned_groups_flat[number]
            if mine < width and flat.numel():
                flat.data.narrow(0, offset + mine, width - mine).zero_()
                part.data.narrow(0, mine, width - mine).zero_()
            offset += width
