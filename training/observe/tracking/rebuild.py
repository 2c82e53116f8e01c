"""Makes one complete W&B run from metrics.jsonl."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from gsa import yaml_text
from gsa.checkpoint.manifest import no_run_in
from gsa.files import read_small_file
from training.config import ConfigError, LoggingConfig
from training.config.exit_codes import ExitCode, Refusal
from training.observe.tracking.mirror import Fields, by_step
from training.observe.tracking.tracking_state import Parent, TrackingState, new_run_id
from training.observe.tracking.wandb_files import last_step
from training.observe.tracking.wandb_sink import Mode, WandbRun
from training.record.metrics_log import read_rows


class RebuildError(Refusal):
    """No W&B run can be made from this folder. The message says why and what to do."""

    exit_code = ExitCode.REFUSED_INPUT


def rebuild(
    output_dir: Path, *, project: str | None, entity: str | None, mode: Mode, run_id: str | None
) -> tuple[list[int], Path, str]:
    """Logs metrics.jsonl as one new W&B run: every step once, in order, with its events.

    project, entity: instead of those of config.yaml. run_id: instead of that of run.json. Returns the steps, the
    folder that wandb wrote, and the run's id. Raises RebuildError when there is nothing to log, OSError when the file
    of an offline run is not complete, and what wandb raises.
    """
    config, run, steps = _read_run(output_dir)
    own = run.get("tracking_id") or new_run_id()
    try:
        saved = config.get("logging", {})
        cfg = LoggingConfig(
            wandb=True,
            project=project or saved.get("project") or LoggingConfig.project,
            entity=entity or saved.get("entity"),
            run_name=saved.get("run_name"),
            run_id=run_id or own,  # becomes the name of a folder; LoggingConfig refuses anything but a name
        )
        parent = Parent(**run["parent"]) if run.get("parent") else None
    except (ConfigError, TypeError, AttributeError) as err:
        raise RebuildError(f"{output_dir}: config.yaml, run.json or --run_id is not as a run writes it: {err}") from err
    target = output_dir / "wandb_rebuilt" / cfg.run_id
    if target.exists():
        shutil.rmtree(target)  # an earlier rebuild
    target.mkdir(parents=True)
    wandb_run = WandbRun(cfg, name=output_dir.resolve().name, folder=target, run_id=target.name, resume="never")
    wandb_run.start(mode, TrackingState.read(output_dir, own).as_config(config, parent), lambda: None)
    for step, fields in steps:
        wandb_run.log(step, fields)
    file = wandb_run.file
    wandb_run.finish(0 if run.get("status") in ("finished", "stopped") else 1)
    if mode == "offline" and last_step(file) != steps[-1][0]:
        raise OSError(f"{file} ends at step {last_step(file)} instead of {steps[-1][0]}; is the disk full?")
    return [step for step, _ in steps], file.parent, target.name


def _read_run(folder: Path) -> tuple[dict[str, Any], dict[str, Any], list[tuple[int, Fields]]]:
    """What config.yaml, run.json and metrics.jsonl hold; steps out of order are left out. Raises RebuildError."""
    try:
        rows = read_rows(folder / "metrics.jsonl")
        config, run = (
            read(read_small_file(path, yaml_text.MAX_BYTES).decode("utf-8")) if (path := folder / name).exists() else {}
            for name, read in (("config.yaml", yaml_text.load), ("run.json", json.loads))
        )
    except (ValueError, OSError, yaml.YAMLError) as err:
        raise RebuildError(str(err)) from err
    if not isinstance(config, dict) or not isinstance(run, dict):
        raise RebuildError(f"{folder}: config.yaml or run.json is not a mapping; restore it")
    steps: list[tuple[int, Fields]] = []
    for step, fields in by_step(rows):
        if not steps or step > steps[-1][0]:
            steps.append((step, fields))
    if not steps and not (folder / "run.json").exists():
        raise RebuildError(no_run_in(folder))
    if not steps:
        raise RebuildError(f"{folder / 'metrics.jsonl'} has no step; give the folder of a run that has trained")
    return config, run, steps
