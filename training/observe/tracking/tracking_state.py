"""tracking.json: what a run remembers of its own tracking, from one launch to the next."""

from __future__ import annotations

import copy
import json
import os
import secrets
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from training.config import config_changes

FILE = "tracking.json"


def new_run_id() -> str:
    """A tracking id; made once per run, stored in run.json and in every checkpoint."""
    return secrets.token_hex(4)


@dataclass(frozen=True)
class Parent:
    """The run whose checkpoint or weights a fork starts from, and the step they are of."""

    id: str
    step: int


@dataclass(frozen=True)
class Note:
    """id: the W&B run that the rest is about. step: the last one told to it.

    segments: {launch: {"step": resumed from, "config": all of it}} for the first launch, and for each later one
    {"step": ..., "changed": {key: [before, now]}}, so that what any launch ran with can be recovered.
    """

    id: str
    step: int = 0
    segments: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path, run_id: str) -> Note:
        """The note of this run in its folder; an empty one if there is none, or it is of another or damaged."""
        try:
            found = json.loads((folder / FILE).read_text(encoding="utf-8"))
            return cls(run_id, found["step"], found["segments"]) if found["id"] == run_id else cls(run_id)
        except (OSError, ValueError, KeyError, TypeError):
            return cls(run_id)

    def write(self, folder: Path) -> None:
        temporary = folder / f"{FILE}.tmp"
        temporary.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, folder / FILE)

    def with_segment(self, number: int, step: int, config: dict[str, Any]) -> Note:
        """With the entry of launch `number`, which resumes from `step` and runs with `config`."""
        earlier = {key: entry for key, entry in self.segments.items() if int(key) < number}
        if earlier:
            before = segment_config(earlier, max(map(int, earlier)))
            entry = {"step": step, "changed": {c.key: [c.old, c.new] for c in config_changes(before, config)}}
        else:
            entry = {"step": step, "config": config}
        return replace(self, segments={**earlier, str(number): entry})

    def as_config(self, config: dict[str, Any], parent: Parent | None) -> dict[str, Any]:
        """What W&B shows as the run's configuration: that of the newest launch, all segments, and a fork's parent."""
        told = {**config, "segments": self.segments}
        return told if parent is None else {**told, "parent": asdict(parent)}


def segment_config(segments: dict[str, dict[str, Any]], number: int) -> dict[str, Any]:
    """The whole configuration that launch `number` ran with."""
    config: dict[str, Any] = {}
    for key in sorted(segments, key=int):
        if int(key) <= number:
            config = copy.deepcopy(segments[key].get("config", config))
            for name, (_, now) in segments[key].get("changed", {}).items():
                section, option = name.split(".")
                config[section][option] = now
    return config
