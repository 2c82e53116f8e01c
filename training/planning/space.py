"""How much room a checkpoint takes, before there is one."""

from __future__ import annotations

from pathlib import Path

from gsa.checkpoint import manifest
from gsa.model import count_params
from training.config import RunConfig


def checkpoint_bytes(cfg: RunConfig, last: Path | None) -> int:
    """What a checkpoint of this run takes on disk: as much as the last one, or by count before any has been made."""
    if last is not None and (last / manifest.MANIFEST).exists():
        return sum(entry.bytes for entry in manifest.read(last).files.values())
    parameters = count_params(cfg.model)["total"]
    working = 2 if cfg.training.precision == "bf16" else 4
    # masters and two moments; the working weights twice, for DeepSpeed and for use
    return int(parameters * (12 + 2 * working) * 1.02) + 2**20
