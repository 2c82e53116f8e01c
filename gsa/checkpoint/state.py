"""RunState: what the trainer adds to DeepSpeed's checkpoint, as plain values under one private key."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from gsa.checkpoint.errors import CheckpointError

CLIENT_KEY = "gsa_run"
"""The one key of client_state: DeepSpeed lets a client key overwrite its own of the same name."""

VERSION = 1
CONFIG_JSON = "config.json"


@dataclass(frozen=True)
class RunState:
    """Where a run stands. Equal on all ranks: under ZeRO 1 and 2 every rank reads rank 0's.

    step: optimizer steps finished. epoch: passes over the text. samples_consumed: windows, the position in
    the data. config: the whole run configuration. stage: what attention ran over in the last step.
    created: UTC, ISO 8601.
    """

    step: int
    epoch: float
    samples_consumed: int
    tokens_seen: int
    config: dict
    data_fingerprint: str
    tracking_id: str | None
    stage: Literal["dense", "sparse"]
    versions: dict[str, str]
    world_size: int
    zero_stage: int
    created: str

    def to_dict(self) -> dict:
        """Plain values only, with "version". TypeError names the path of anything else: it would not load again."""
        plain = {"version": VERSION, **asdict(self)}
        _require_plain(plain, CLIENT_KEY)
        return plain

    @classmethod
    def from_dict(cls, saved: Any) -> RunState:
        """Reads what any version of this project wrote. CheckpointError for a newer one, or a missing value."""
        if not isinstance(saved, dict) or not isinstance(saved.get("version"), int):
            raise CheckpointError("the checkpoint carries no state of a run of this project; use training.init_from for weights alone")
        if saved["version"] > VERSION:
            raise CheckpointError(
                f"the checkpoint's run state has version {saved['version']}, this project reads up to {VERSION}; "
                f"update the project"
            )
        missing = [f.name for f in fields(cls) if f.name not in saved]
        if missing:
            raise CheckpointError(f"the checkpoint's run state lacks {', '.join(missing)}; choose another checkpoint")
        return cls(**{f.name: saved[f.name] for f in fields(cls)})


def _require_plain(value: Any, path: str) -> None:
    if value is None or type(value) in (bool, int, float, str):
        return
    if type(value) is dict:
        for key, item in value.items():
            if type(key) is not str:
                raise TypeError(f"{path}: key {key!r} is a {type(key).__name__}, not a str")
            _require_plain(item, f"{path}.{key}")
    elif type(value) in (list, tuple):
        for i, item in enumerate(value):
            _require_plain(item, f"{path}[{i}]")
    else:
        raise TypeError(f"{path} is a {type(value).__name__}; only plain values may enter a checkpoint")


def write_config_json(config: dict, step_dir: Path) -> None:
    """The run's configuration beside its weights, in one json; its "model" section is the model's."""
    _require_plain(config, "config")
    with open(step_dir / CONFIG_JSON, "w", encoding="utf-8") as file:
        json.dump(config, file, indent=2)
        file.flush()
        os.fsync(file.fileno())


def read_config_json(step_dir: Path) -> dict:
    """The configuration of the run that wrote a checkpoint. CheckpointError when it cannot be read."""
    path = step_dir / CONFIG_JSON
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise CheckpointError(f"{path}: {err}; choose another checkpoint") from err
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
        raise CheckpointError(f"{path}: no model section in it; choose another checkpoint")
    return config
