"""The folder of a run: where each file lies, who may write into it, run.json, and the environment it ran in."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import torch

from gsa.checkpoint import manifest
from gsa.checkpoint.manifest import CheckpointError
from gsa.checkpoint.state import read_json_object
from gsa.files import write_atomically
from training.config.exit_codes import Refusal
from training.config.lease import Lease, Owner, is_dead, read_lease, take
from training.record.metrics_log import iter_rows

PROJECT = "gsa-trainer"
OWN_NAMES = (
    *("config.yaml", "ds_config.json", "env.json", "run.json", "metrics.jsonl", "latest", "segments", "tensorboard"),
    *("report.html", "report.md", "tracking.json", "wandb", "wandb_rebuilt"),
)
"""What a run puts into its folder besides step_N and hidden files; a refused launch may have left some of it."""
LOG_SUFFIXES = (".log", ".out", ".err", ".txt")
"""Files that a job may write beside the run."""


class FolderError(Refusal):
    """The output folder cannot take this run; the message says why and what to do."""


class RunFolder:
    """config.yaml ds_config.json env.json run.json metrics.jsonl step_N/ latest; nothing in it names its own place, so
    it can be moved or copied whole.

    warn: called with a line when run.json is damaged; by default the line is printed.
    """

    def __init__(self, path: Path, *, warn: Callable[[str], None] | None = None) -> None:
        self.path = path
        self.metrics = path / "metrics.jsonl"
        self.run_json = path / "run.json"
        self._warn, self._warned = warn or _print_warning, False

    def holds_a_run(self) -> bool:
        return self.run_json.exists() or any(self.path.glob("step_*"))

    def claim(self, *, going_on: bool) -> None:
        """Refuses a folder that already holds a run, unless it is to be resumed or begun again. Writes nothing."""
        if self.path.exists() and not self.path.is_dir():
            raise FolderError(f"--output_dir {self.path} is a file; give a folder")
        if not self.holds_a_run() and (others := self._of_others()):
            raise FolderError(
                f"--output_dir {self.path} exists and is no run's folder: it holds {', '.join(others[:3])}"
                f"{', ...' if len(others) > 3 else ''}; give a new or empty folder"
            )
        if not going_on and self.holds_a_run():
            raise FolderError(
                f"--output_dir {self.path} already holds a run; continue it with --resume_from auto, "
                f"begin it again with --fresh, or give another --output_dir"
            )

    def take_lease(self, *, command: str, take_over: bool = False) -> Lease:
        """Makes this process the only one that writes here.

        Raises LeaseError, which names the owner, when another process does, and FolderError when nobody can.
        """
        launch = self.read_run().get("segments", 0) + 1
        try:
            return take(self.path, command=command, launch=launch, take_over=take_over)
        except OSError as err:
            raise FolderError(f"--output_dir {self.path} cannot be written: {err.strerror or err}") from err

    def _of_others(self) -> list[str]:
        """What lies in the folder that neither a run nor a job's log has put there."""
        names = sorted(path.name for path in self.path.iterdir()) if self.path.is_dir() else []
        return [n for n in names if n not in OWN_NAMES and not n.startswith(".") and Path(n).suffix not in LOG_SUFFIXES]

    def saved_checkpoints(self) -> list[str]:
        """Tags that once were good checkpoints here, by `latest` and the rows of metrics.jsonl, newest first."""
        saved = {row["tag"]: row["step"] for row in iter_rows(self.metrics) if row.get("event") == "save"}
        return list(dict.fromkeys(filter(None, [self.latest(), *sorted(saved, key=saved.get, reverse=True)])))

    def write_inputs(self, *, config_yaml: str, ds_config: dict) -> None:
        """The resolved configuration and the environment, before step 0. CheckpointError when the disk refuses."""
        with manifest.writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        _write(self.path / "config.yaml", config_yaml)
        _write(self.path / "ds_config.json", json.dumps(ds_config, indent=2) + "\n")
        _write(self.path / "env.json", json.dumps(environment(), indent=2) + "\n")

    def read_run(self) -> dict:
        """run.json; an empty dict for a new folder, or when it is damaged, of which `warn` is called once."""
        if not self.run_json.exists():
            return {}
        try:
            return read_json_object(self.run_json)
        except CheckpointError as err:
            if not self._warned:
                self._warn(f"{err}; continuing without what it recorded of the run")
            self._warned = True
            return {}

    def update_run(self, **fields: object) -> None:
        """Sets fields of run.json: status ("running"|"finished"|"stopped"|"failed"), reason, step, tracking_id, ...

        Raises CheckpointError when the disk refuses.
        """
        _write(self.run_json, json.dumps({**self.read_run(), **fields, "updated": time.time()}, indent=2) + "\n")

    def suspect(self, step: int) -> None:
        """Step `step` is not finite: the checkpoint of the step before, if there is one, may hold broken weights.

        Its bytes are good and stay as they are; what is said of it goes into run.json, until it is saved again.
        """
        tag = f"step_{step - 1}"
        if (self.path / tag / manifest.MANIFEST).exists():
            known = self.read_run().get("suspects", {})
            self.update_run(
                suspects={**known, tag: {"next_step": step, "created": manifest.read(self.path / tag).created}}
            )

    def suspects(self) -> dict[str, str]:
        """The checkpoints whose next step was not finite: tag -> what to say of it."""
        found = {}
        for tag, words in self.read_run().get("suspects", {}).items():
            with suppress(CheckpointError):
                if manifest.read(self.path / tag).created == words["created"]:
                    found[tag] = f"its next step, {words['next_step']}, was not finite: its weights may be broken"
        return found

    def status(self) -> str | None:
        """run.json's status; "died" where that says "running" and the process that would be is gone."""
        status, owner = self.read_run().get("status"), read_lease(self.path)
        return "died" if status == "running" and isinstance(owner, Owner) and is_dead(owner) else status

    def record_end(self, reason: str) -> None:
        """Writes into run.json that the run has failed, when it still says "running". Any rank may, at any moment."""
        run = self.read_run()
        if run.get("status") == "running":
            text = json.dumps({**run, "status": "failed", "reason": reason, "updated": time.time()}, indent=2)
            with suppress(OSError), write_atomically(self.run_json, durable=True, unique=True) as file:
                file.write(text.encode() + b"\n")

    def latest(self) -> str | None:
        """The tag that `latest` names; None when the file cannot be read, which the next save mends."""
        try:
            return manifest.latest_tag(self.path)
        except CheckpointError:
            return None

    def discard_after(self, step: int, *, resumed_from: str | None) -> list[str]:
        """Moves checkpoints of steps after `step` to segments/, so that nothing resumes a discarded branch.

        resumed_from: the tag in this folder that the run continues from, or None; `latest` is made to name it first,
        since the tag that it names may be one of those that move. What an interrupted save left behind is removed.
        Returns a line for each folder.
        """
        if resumed_from is not None and self.latest() != resumed_from:
            manifest.publish(self.path, resumed_from)
        if resumed_from is None:
            (self.path / manifest.LATEST).unlink(missing_ok=True)  # the tag that it names is about to move
        lines = []
        for found in sorted(self.path.glob("step_*")):
            number = found.name.removeprefix("step_")
            if not number.isdigit() or int(number) <= step:
                continue
            if found.is_dir() and manifest.is_torn(found):
                manifest.clear_torn(found)
                lines.append(f"{found.name} lies after the step resumed from, and its save was interrupted: removed")
                continue
            segments = self.path / "segments"
            segments.mkdir(exist_ok=True)
            copy = next(p for i in range(10**6) if not (p := segments / f"{found.name}.{i}").exists())
            os.replace(found, copy)
            lines.append(f"{found.name} lies after the step resumed from: moved to {copy.relative_to(self.path)}")
        return lines


def _print_warning(text: str) -> None:
    print(f"warning: {text}", flush=True)


def environment() -> dict:
    """What a result depends on: versions and the kind of machine, without host names and paths."""
    return {
        "project": version(PROJECT),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "deepspeed": version("deepspeed"),
        "cuda": torch.version.cuda,
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or [platform.machine()],
        "cpus": os.cpu_count(),
        "argv": sys.argv[1:],
    }


def versions(deepspeed: str) -> dict[str, str]:
    """The versions that a checkpoint records. deepspeed: what DeepSpeed itself reports."""
    return {"torch": str(torch.__version__), "deepspeed": deepspeed, "project": version(PROJECT)}


def version(package: str) -> str:
    """The installed version of a package; "unknown" when it runs from a checkout without being installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


def _write(path: Path, text: str) -> None:
    manifest.write_durably(path, text.encode())
