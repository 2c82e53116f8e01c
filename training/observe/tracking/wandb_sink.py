"""Weights & Biases as a sink: one run on disk or on the server, and never a reason for training to fail."""

from __future__ import annotations

import contextlib
import netrc
import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

import psutil

from training.config import LoggingConfig
from training.observe.tracking.mirror import Fields, Sink
from training.observe.tracking.tracking_state import Note, Parent
from training.observe.tracking.wandb_files import last_step, logged_step

Mode = Literal["online", "offline", "disabled"]

BY_TOKENS = ("loss", "eval_loss", "eval_bpb")
"""Shown a second time as by_tokens/<name>: a W&B metric has one axis, and everything else is shown by step."""

INIT_TIMEOUT_S = 30
"""After which an online run without an answer becomes an offline one."""

DISK_CHECK_S = 60.0
"""Between looks at whether an offline run's file grows: on a full disk wandb-core drops rows and says nothing."""


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    where = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(where) is not None
    except (OSError, ValueError, netrc.NetrcParseError):
        return False


def wandb_mode() -> Mode:
    """WANDB_MODE where it is set; else online with a key and offline without one."""
    said = os.environ.get("WANDB_MODE")
    if said:
        return {"dryrun": "offline", "run": "online"}.get(said, said)
    return "online" if _has_key() else "offline"


_SERVICE_TOKEN = re.compile(r"3-\d+-(?:unix-(?P<path>.+)|tcp-localhost-(?P<port>\d+))", re.ASCII)
"""WANDB_SERVICE as wandb 0.31 writes and reads it: version, pid of the process that started the service, address."""

PROBE_TIMEOUT_S = 2.0
"""A wandb service on this machine accepts a connection at once; one that takes longer is not used."""


def service_answers(token: str) -> bool:
    """Whether a WANDB_SERVICE token has wandb's format and a process accepts connections at its address."""
    address = _SERVICE_TOKEN.fullmatch(token)
    if address is None:
        return False
    try:
        if address["path"] is None:
            socket.create_connection(("localhost", int(address["port"])), PROBE_TIMEOUT_S).close()
        else:
            with socket.socket(socket.AF_UNIX) as probe:
                probe.settimeout(PROBE_TIMEOUT_S)
                probe.connect(address["path"])
    except (OSError, OverflowError, ValueError):  # the latter two: a port or a path that no address can have
        return False
    return True


def _drop_dead_service() -> None:
    """Removes WANDB_SERVICE from the environment, with one line on stderr, where no service answers at its address.

    wandb leaves the address of its service in the environment of the process that started it, for its children. The
    service ends with that process: a child that outlives it, or is started after it ended, could not track at all.
    """
    token = os.environ.get("WANDB_SERVICE")
    if token and not service_answers(token):
        del os.environ["WANDB_SERVICE"]
        print(
            f"W&B: no wandb service answers at the inherited address WANDB_SERVICE={token}, so it is ignored and this"
            " run starts its own",
            file=sys.stderr,
            flush=True,
        )


class WandbRun:
    """One W&B run from wandb.init to its end, offline or online.

    name: W&B's display name where logging.run_name has none. folder: where wandb makes its own folder. resume: W&B's
    word: "allow", "must" (exist already) or "never".
    """

    def __init__(
        self, cfg: LoggingConfig, *, name: str, folder: Path, run_id: str, resume: Literal["allow", "must", "never"]
    ) -> None:
        import wandb

        self._wandb, self._cfg, self._name, self._folder = wandb, cfg, cfg.run_name or name, folder
        self._id, self._resume = run_id, resume
        self._core: list[psutil.Process] = []
        self._started = False

    def start(self, mode: Mode, config: dict[str, Any], guard: Callable[[], None]) -> None:
        """Raises _NoConnection when W&B's server does not answer or refuses, otherwise what wandb raises.

        guard: as of Sink.open.
        """
        _drop_dead_service()
        self._wandb.setup(self._wandb.Settings(silent=True))  # what there is to say, we say
        self._started = True
        self._core = [child for child in psutil.Process().children() if child.name() == "wandb-core"]
        guard()
        try:
            self._run = self._wandb.init(
                project=self._cfg.project,
                entity=self._cfg.entity,
                name=self._name,
                id=self._id,
                resume=self._resume,
                mode=mode,
                dir=str(self._folder),
                config=config,
                # no console: wandb would stand between the training and its standard output
                settings=self._wandb.Settings(console="off", init_timeout=INIT_TIMEOUT_S, x_disable_stats=True),
            )
        except self._wandb.errors.CommError as err:
            self._stop()  # wandb-core takes an id once
            raise _NoConnection(str(err)) from err
        self._run.config.update(config, allow_val_change=True)  # over what a resumed run had before
        self._run.define_metric("step")
        self._run.define_metric("tokens")
        for name in BY_TOKENS:
            self._run.define_metric(f"by_tokens/{name}", step_metric="tokens")
        self._run.define_metric("*", step_metric="step")

    @property
    def server_step(self) -> int:
        """The last step that W&B's server has of this run; 0 for a new one, or offline."""
        return max(0, self._run.starting_step - 1)

    @property
    def url(self) -> str:
        return self._run.url

    @property
    def file(self) -> Path:
        """Its transaction log: offline all there is, online a copy."""
        return Path(self._run.dir).parent / f"run-{self._id}.wandb"

    def log(self, step: int, fields: Fields) -> None:
        by_tokens = {f"by_tokens/{name}": fields[name] for name in BY_TOKENS if name in fields}
        self._run.log({**fields, **by_tokens}, step=step, commit=True)

    def finish(self, exit_code: int) -> None:
        self._run.finish(exit_code=exit_code)
        self._stop()

    def _stop(self) -> None:
        self._started = False
        with contextlib.suppress(SystemExit):  # it exits with the code that wandb-core ended with
            self._wandb.teardown()

    def abandon(self) -> None:
        """Kills wandb-core, so that neither the calls that wait for it nor the end of the process hang."""
        for process in self._core:
            with contextlib.suppress(psutil.Error):
                process.kill()
                process.wait(2)
        if self._started:
            with contextlib.suppress(Exception):
                self._stop()  # or its handler of atexit would complain of the dead service


def open_wandb(cfg: LoggingConfig, folder: Path, *told: Any) -> Sink | None:
    """The sink of a training run, or None where W&B is switched off by the environment."""
    mode = wandb_mode()
    return None if mode == "disabled" else WandbSink(cfg, mode, folder, *told)


class _NoConnection(Exception):
    """W&B's server does not answer, or refuses."""


class WandbSink:
    """The sink of a training run: goes on where W&B stands, and offline where there is no key or no connection."""

    name = "W&B"

    def __init__(
        self,
        cfg: LoggingConfig,
        mode: Mode,
        folder: Path,
        run_id: str,
        config: dict[str, Any],
        step: int,
        segment: int,
        parent: Parent | None,
        quiet: bool,
    ) -> None:
        resume = "allow" if cfg.run_id is None else "must"
        self._run = WandbRun(cfg, name=folder.resolve().name, folder=folder, run_id=run_id, resume=resume)
        self._mode, self._folder, self._id, self._quiet = mode, folder, run_id, quiet
        self._config, self._step, self._segment, self._parent = config, step, segment, parent
        self._files = folder / "wandb"
        self.advice = f"training goes on, metrics.jsonl has every row: python -m training.tracking rebuild {folder}"

    def open(self, guard: Callable[[], None]) -> int:
        self._note = Note.read(self._folder, self._id).with_segment(self._segment, self._step, self._config)
        self._note.write(self._folder)
        config = self._note.as_config(self._config, self._parent)
        logged = logged_step(self._files, self._id)
        if self._mode == "offline" and "WANDB_MODE" not in os.environ:
            self._say(f"no key found, so this run is tracked offline under {self._files}")
        try:
            self._run.start(self._mode, config, guard)
        except _NoConnection as err:
            if self._mode == "offline":
                raise
            self._say(f"no connection ({err}), so this segment is tracked offline under {self._files}")
            self._mode = "offline"
            self._run.start(self._mode, config, guard)
        if self._mode == "offline":
            self._last = self._note.step if logged is None else logged
        else:
            self._last = self._run.server_step
            if not self._quiet:
                print(f"W&B: {self._run.url}", flush=True)
            if self._last < self._step and list(self._files.glob(f"offline-run-*-{self._id}")):
                self._say(f"steps of offline segments are sent now too; do not `wandb sync` those under {self._files}")
        if self._last > self._step:
            held, advice = f"{self._step + 1} to {self._last}", "; a new run is better off without its id"
            self._say(
                f"run {self._id} is there up to step {self._last} already, so steps {held} of this launch are not shown"
                + ("" if self._segment else advice)
            )
        self._looked, self._told = time.monotonic(), 0
        return self._last

    def write(self, step: int, fields: Fields) -> None:
        if step <= self._last:  # trained again: W&B has it
            return
        self._run.log(step, fields)
        self._last = step
        if time.monotonic() - self._looked > DISK_CHECK_S:
            self._look()

    def close(self, exit_code: int) -> None:
        self._run.finish(exit_code)
        self._told = self._last
        self._look()

    def abandon(self) -> None:
        self._run.abandon()

    def _look(self) -> None:
        """Whether what was told at the look before is on the disk by now."""
        with contextlib.suppress(OSError):
            replace(self._note, step=self._last).write(self._folder)
        if self._mode == "offline" and (logged := last_step(self._run.file) or 0) < self._told:
            free = shutil.disk_usage(self._run.file.parent).free
            raise OSError(f"{self._run.file} ends at step {logged} instead of {self._told}; {free:,} bytes are free")
        self._looked, self._told = time.monotonic(), self._last

    def _say(self, what: str) -> None:
        print(f"W&B: {what}", file=sys.stderr, flush=True)
