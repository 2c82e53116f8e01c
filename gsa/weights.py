"""Weights for use: model.safetensors beside config.json, readable without running anything."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from gsa.checkpoint.errors import CheckpointError
from gsa.checkpoint.state import read_config_json

WEIGHTS = "model.safetensors"


def save_weights(state_dict: dict[str, torch.Tensor], step_dir: Path) -> None:
    """Writes a model's state dict, synced to disk; config.json is gsa.checkpoint.state's to write."""
    path = step_dir / WEIGHTS
    save_file({name: tensor.contiguous() for name, tensor in state_dict.items()}, path)
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def load_weights(step_dir: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """The model section of config.json, and the state dict. CheckpointError when one is missing or damaged."""
    config = read_config_json(step_dir)
    path = step_dir / WEIGHTS
    try:
        return config["model"], load_file(path)
    except (OSError, SafetensorError) as err:
        raise CheckpointError(f"{path}: {err}; choose another checkpoint") from err
