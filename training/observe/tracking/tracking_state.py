"""tracking.json: the state of a run's tracking that the next launch needs."""

from __future__ import annotations

import copy
import json
import secrets
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from gsa.files import read_small_file, write_atomically
from gsa.units import MIB
from training.config import config_changes

FILE = "tracking.json"


def new_run_id() -> str:
    """A new tracking id. A run gets one once; it is stored in run.json and in every checkpoint."""
    return secrets.token_hex(4)


@dataclass(frozen=True)
class Parent:
    """The run whose checkpoint or weights a fork starts from, and the step of that checkpoint."""

    id: str
    step: int


@dataclass(frozen=True)
class LaunchInfo:
    """What trackers need to know of one launch of a run.

    run_id: the run's tracking id, the same for all launches. config: plain, the whole configuration of this launch.
    step: the step it resumes from, 0 for a new run. number: launches of this run before this one. parent: of a fork.
    """

    run_id: str
    config: dict[str, Any]
    step: int
    number: int
    parent: Parent | None


@dataclass(frozen=True)
class TrackingState:
    """The content of tracking.json. id: the W&B run that it describes. step: the last step that was sent to W&B.

    segments: the configuration of every launch, by its number. The first one's is whole, {"step": resumed from,
    "config": ...}; a later one's is {"step": ..., "changed": {key: [before, now]}}. `launch_config` puts one together.
    """

    id: str
    step: int = 0
    segments: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path, run_id: str) -> TrackingState:
        """The state of the run in `folder`; an empty one when the file is missing, damaged or of another id."""
        try:
            found = json.loads(read_small_file(folder / FILE, MIB))
            return cls(run_id, found["step"], found["segments"]) if found["id"] == run_id else cls(run_id)
        except (OSError, ValueError, KeyError, TypeError):
            return cls(run_id)

    def write(self, folder: Path) -> None:
        """Replaces tracking.json in `folder`. Raises OSError when the disk refuses."""
        with write_atomically(folder / FILE, durable=False) as file:
            file.write((json.dumps(asdict(self), indent=2) + "\n").encode())

    def with_launch(self, launch: LaunchInfo) -> TrackingState:
        """This state with an entry for `launch`; the entries of later launches are dropped."""
        earlier = {key: entry for key, entry in self.segments.items() if int(key) < launch.number}
        if earlier:
            before = launch_config(earlier, max(map(int, earlier)))
            changed = {change.key: [change.old, change.new] for change in config_changes(before, launch.config)}
            entry = {"step": launch.step, "changed": changed}
        else:
            entry = {"step": launch.step, "config": launch.config}
        return replace(self, segments={**earlier, str(launch.number): entry})

    def as_config(self, config: dict[str, Any], parent: Parent | None) -> dict[str, Any]:
        """What W&B shows as the run's configuration: the newest launch's, `segments`, and the parent of a fork."""
        shown = {**config, "segments": self.segments}
        return shown if parent is None else {**shown, "parent": asdict(parent)}


def launch_config(segments: dict[str, dict[str, Any]], number: int) -> dict[str, Any]:
    """The whole configuration of launch `number`, from TrackingState.segments."""
    config: dict[str, Any] = {}
    for key in sorted(segments, key=int):
        if int(key) <= number:
            config = copy.deepcopy(segments[key].get("config", config))
            for name, (_, now) in segments[key].get("changed", {}).items():
                section, option = name.split(".")
                config[section][option] = now
    return config
