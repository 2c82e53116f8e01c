"""Weights & Biases: a mirror of metrics.jsonl, and never a reason for a run to fail."""

from __future__ import annotations

import netrc
import os
import secrets
import sys
from pathlib import Path
from urllib.parse import urlparse

from training.config import LoggingConfig


def new_run_id() -> str:
    """A tracking id; made once per run, kept in run.json and in every checkpoint."""
    return secrets.token_hex(4)


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


class Tracker:
    """Sends step rows and evaluations to W&B under one run id, from rank 0.

    Off unless logging.wandb is set. Without a key it runs offline and says so. When W&B fails, now or
    later, it is switched off with one line on stderr, and the training goes on.
    """

    def __init__(self, cfg: LoggingConfig, *, output_dir: Path, run_id: str, config: dict, enabled: bool) -> None:
        self._run = None
        if not (enabled and cfg.wandb):
            return
        mode = os.environ.get("WANDB_MODE") or ("online" if _has_key() else "offline")
        if mode == "offline" and "WANDB_MODE" not in os.environ:
            print(
                f"W&B: no key found, so this run is tracked offline under {output_dir / 'wandb'}",
                file=sys.stderr,
            )
        try:
            import wandb

            self._run = wandb.init(
                project=cfg.project,
                entity=cfg.entity,
                name=cfg.run_name or output_dir.name,
                id=run_id,
                resume="allow",
                mode=mode,
                dir=str(output_dir),
                config=config,
                settings=wandb.Settings(silent=True, init_timeout=60, x_disable_stats=True),
            )
            self._run.define_metric("tokens")
            self._run.define_metric("*", step_metric="step")
        except Exception as err:  # whatever a tracking service does, the training outlives it
            self._give_up("could not start", err)

    def log(self, row: dict, *, step: int) -> None:
        """One row, shown at optimizer step `step`."""
        if self._run is None:
            return
        try:
            self._run.log({k: v for k, v in row.items() if k != "time"}, step=step)
        except Exception as err:  # as above
            self._give_up("stopped taking rows", err)

    def finish(self, exit_code: int) -> None:
        if self._run is None:
            return
        try:
            self._run.finish(exit_code=exit_code)
        except Exception as err:  # as above
            self._give_up("could not finish", err)

    def _give_up(self, what: str, err: Exception) -> None:
        self._run = None
        print(
            f"W&B {what} ({type(err).__name__}: {err}); training goes on, metrics.jsonl has every row",
            file=sys.stderr,
        )
