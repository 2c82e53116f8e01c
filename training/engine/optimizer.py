"""AdamW's parameter groups and the learning-rate schedule."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from training.config import TrainingConfig
from training.config.schedule import Schedule


def group_hyperparameters(name: str, cfg: TrainingConfig) -> dict:
    """lr, weight_decay, betas and eps of the parameter group `name`."""
    return {
        "lr": cfg.learning_rate * (cfg.indexer_lr_multiplier if name.startswith("indexer") else 1.0),
        "weight_decay": 0.0 if name.endswith("no_decay") else cfg.weight_decay,
        "betas": (cfg.beta1, cfg.beta2),
        "eps": cfg.eps,
    }


def parameter_groups(model: nn.Module, cfg: TrainingConfig) -> list[dict]:
    """AdamW groups: decay, no_decay, indexer, indexer_no_decay; empty ones are left out.

    Parameters with fewer than two dimensions (biases, norms, scalars) have no weight decay. A parameter is the
    indexer's when its name contains ".indexer."; the indexer learns from its own loss only, so it may have its own
    learning rate (training.indexer_lr_multiplier). A group has the order of named_parameters(), and torch stores the
    names, so that a checkpoint shows which moments belong to which parameter.
    """
    groups: dict[str, list[tuple[str, nn.Parameter]]] = {
        "decay": [],
        "no_decay": [],
        "indexer": [],
        "indexer_no_decay": [],
    }
    for name, parameter in model.named_parameters():
        if ".indexer." in name:
            group = "indexer" if parameter.ndim >= 2 else "indexer_no_decay"
        else:
            group = "decay" if parameter.ndim >= 2 else "no_decay"
        groups[group].append((name, parameter))
    return [
        {"name": name, "params": parameters, **group_hyperparameters(name, cfg)}
        for name, parameters in groups.items()
        if parameters
    ]


def build_optimizer(model: nn.Module, cfg: TrainingConfig) -> torch.optim.AdamW:
    """torch's AdamW, for every ZeRO stage and device; DeepSpeed's own would have to be compiled on first use."""
    return torch.optim.AdamW(parameter_groups(model, cfg))


def schedule_factor(cfg: TrainingConfig) -> Callable[[int], float]:
    """Returns factor(step): the multiplier of the base learning rate for the update after `step` finished ones."""
    return Schedule.of(cfg).factor


def build_schedule(optimizer: torch.optim.Optimizer, cfg: TrainingConfig) -> torch.optim.lr_scheduler.LambdaLR:
    """`schedule_factor` as a scheduler that DeepSpeed steps and saves."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, schedule_factor(cfg))
