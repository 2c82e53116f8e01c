"""The weights for use, model.safetensors with config.json; no pickle is involved. Format: docs/checkpoints.md."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from gsa.checkpoint.manifest import MANIFEST, CheckpointError, verify, write_durably, writing
from gsa.checkpoint.state import CONFIG, read_json_object, require_plain
from gsa.files import write_atomically

FORMAT = 1
WEIGHTS = "model.safetensors"


def save_weights(state_dict: Mapping[str, torch.Tensor], config: dict[str, Any], dir: Path) -> None:
    """Writes both files into `dir`, each whole or not at all; existing files are replaced.

    state_dict: tensors keep their dtypes; a tensor under several names is stored once.
    config: the configuration of the run, or any mapping with a "model" section that holds the fields of ModelConfig.
    Raises TypeError when config has values that are not of JSON types, and CheckpointError when the disk refuses.
    """
    assert "model" in config
    header = {"format": FORMAT, **require_plain(config, "config")}
    stored: dict[str, torch.Tensor] = {}
    tied: dict[str, str] = {}
    first_name: dict[tuple, str] = {}
    storages: set[int] = set()
    for name, tensor in state_dict.items():
        view = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        owner = first_name.setdefault(view, name) if tensor.numel() else name
        if owner != name:
            tied[name] = owner
            continue
        tensor = tensor.detach().cpu().contiguous()
        # safetensors accepts one tensor per storage: a second view of it is stored as a copy
        stored[name] = tensor.clone() if tensor.untyped_storage().data_ptr() in storages else tensor
        storages.add(tensor.untyped_storage().data_ptr())
    with writing(dir / WEIGHTS):
        dir.mkdir(parents=True, exist_ok=True)
        with write_atomically(dir / WEIGHTS, durable=True) as file:
            temporary = Path(file.name)
            mode = temporary.stat().st_mode
            try:
                # one metadata key: safetensors writes several in random order, and equal weights must be equal files
                save_file(stored, temporary, metadata={"format": "pt"})
            except SafetensorError as err:  # safetensors raises it in place of OSError
                raise OSError(str(err)) from err
            temporary.chmod(mode)  # safetensors replaces the file by one that group and others cannot read
    header["tied"] = tied
    write_durably(dir / CONFIG, (json.dumps(header, indent=2) + "\n").encode())


def verify_weights(dir: Path) -> None:
    """Raises CheckpointError when the weights in `dir` are not those that its manifest, if it has one, was made for."""
    if (dir / MANIFEST).exists() or next(dir.glob("*_states.pt"), None) is not None:
        verify(dir, files=(WEIGHTS, CONFIG))


def load_weights(dir: Path, *, verified: bool = False) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The fields of ModelConfig, and the state dict on the CPU under all names; tied names share one tensor.

    In a checkpoint, every byte of both files is compared with the manifest, unless the caller has `verified` them.
    Raises CheckpointError when a file is missing, changed, damaged, or of a newer format, and for a checkpoint whose
    save was interrupted. A folder with nothing but weights, as `save_weights` writes it, has no manifest.
    """
    if not verified:
        verify_weights(dir)
    header = read_json_object(dir / CONFIG)
    version, config = header.get("format"), header.get("model")
    if type(version) is int and version > FORMAT:
        raise CheckpointError(
            f"{dir / CONFIG}: format {version}; this version reads up to {FORMAT}: update the project"
        )
    if version != FORMAT or not isinstance(config, dict):
        raise CheckpointError(f"{dir / CONFIG}: not written by save_weights; restore it from a copy")
    path = dir / WEIGHTS
    try:
        with safe_open(path, framework="pt") as file:
            state_dict = {name: file.get_tensor(name) for name in file.keys()}
        state_dict.update({name: state_dict[owner] for name, owner in header.get("tied", {}).items()})
    except OSError as err:
        raise CheckpointError(f"{path}: cannot be read: {err.strerror or err}; restore it from a copy") from err
    except (SafetensorError, ValueError, KeyError, AttributeError, TypeError) as err:
        raise CheckpointError(f"{path}: damaged ({err}); restore it from a copy") from err
    return config, state_dict
