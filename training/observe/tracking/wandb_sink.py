"""Weights & Biases as a sink. It may never be a reason for a training run to fail.

One run is one W&B run, under one id over all launches, so that W&B shows one curve. After a crash the last step that
W&B has can lie before or after the step of the checkpoint that the next launch resumes from:

- W&B has steps that are trained again: they are held back, that is, not sent a second time. Online, W&B would drop
  them. Offline it would be worse: `wandb sync` of files that repeat steps puts the repeated ones behind the others,
  and every later step gets a wrong number.
- W&B lacks steps that were trained: wandb-core, the process that writes for wandb, writes every 15 s and dies with the
  trainer. These steps are sent first, out of metrics.jsonl.

`python -m training.tracking rebuild RUN` makes one complete new W&B run from metrics.jsonl.
"""

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

from training.config import ConfigError, LoggingConfig
from training.config.schema import is_run_id
from training.observe.tracking.mirror import Fields, Sink
from training.observe.tracking.tracking_state import LaunchInfo, TrackingState
from training.observe.tracking.wandb_files import last_step, logged_step

Mode = Literal["online", "offline", "disabled"]

BY_TOKENS = ("loss", "eval_loss", "eval_bpb")
"""Metrics that are logged a second time as by_tokens/<name>, with tokens as the x axis: W&B gives a metric one axis."""

INIT_TIMEOUT_S = 30
"""An online run that gets no answer for this long becomes an offline one."""

DISK_CHECK_S = 60.0
"""How often to check that an offline run's file grows: on a full disk wandb-core drops rows and reports nothing."""

FLUSH_S = 5.0
"""How long the end of an offline run waits for the last steps on disk: a service that another process started goes on
writing after this one has closed its run."""

PROBE_TIMEOUT_S = 2.0
"""A wandb service on this machine accepts a connection at once; one that takes longer is not used."""

_SERVICE_TOKEN = re.compile(r"3-\d+-(?:unix-(?P<path>.+)|tcp-localhost-(?P<port>\d+))", re.ASCII)
"""WANDB_SERVICE as wandb 0.31 writes and reads it: version, pid of the process that started the service, address."""


def wandb_mode() -> Mode:
    """WANDB_MODE where it is set; otherwise online with a key and offline without one."""
    mode = os.environ.get("WANDB_MODE")
    if mode:
        return {"dryrun": "offline", "run": "online"}.get(mode, mode)
    return "online" if _has_key() else "offline"


def run_id_of_agent(cfg: LoggingConfig) -> str | None:
    """The id that a W&B agent, or a person, gave the run by WANDB_RUN_ID; None where there is none or W&B is off.

    Under a sweep (WANDB_SWEEP_ID) W&B accepts no other id. Raises ConfigError for one that logging.run_id contradicts,
    or that cannot be a part of file names.
    """
    given = os.environ.get("WANDB_RUN_ID")
    if not given or not cfg.wandb or wandb_mode() == "disabled":
        return None
    if cfg.run_id not in (None, given):
        raise ConfigError(
            f"logging.run_id={cfg.run_id} is not the id in the environment, WANDB_RUN_ID={given}; give one of them"
        )
    if not is_run_id(given):
        raise ConfigError(
            f"WANDB_RUN_ID={given!r} in the environment is not an id that this project can use: letters, digits, - and "
            f"_, up to 128; set another one, or unset it"
        )
    return given


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, ValueError, netrc.NetrcParseError):
        return False


def open_wandb(cfg: LoggingConfig, folder: Path, launch: LaunchInfo, *, quiet: bool) -> Sink | None:
    """The sink of a launch of the run in `folder`; None where the environment switches W&B off."""
    mode = wandb_mode()
    return None if mode == "disabled" else WandbSink(cfg, mode, folder, launch, quiet=quiet)


class WandbSink:
    """Continues the W&B run at its last step, and goes offline where there is no key or no connection."""

    name = "W&B"

    def __init__(self, cfg: LoggingConfig, mode: Mode, folder: Path, launch: LaunchInfo, *, quiet: bool) -> None:
        resume = "allow" if cfg.run_id is None else "must"
        self._run = WandbRun(cfg, name=folder.resolve().name, folder=folder, run_id=launch.run_id, resume=resume)
        self._mode, self._folder, self._launch, self._quiet = mode, folder, launch, quiet
        self._files = folder / "wandb"
        self.advice = f"training goes on, metrics.jsonl has every row: python -m training.tracking rebuild {folder}"

    def open(self, renew_exit_handler: Callable[[], None]) -> int:
        launch = self._launch
        self._state = TrackingState.read(self._folder, launch.run_id).with_launch(launch)
        self._state.write(self._folder)
        config = self._state.as_config(launch.config, launch.parent)
        logged = logged_step(self._files, launch.run_id)
        if self._mode == "offline" and "WANDB_MODE" not in os.environ:
            self._notify(f"no key found, so this run is tracked offline under {self._files}")
        try:
            self._run.start(self._mode, config, renew_exit_handler)
        except NoConnection as err:
            if self._mode == "offline":
                raise
            self._notify(f"no connection ({err}), so this launch is tracked offline under {self._files}")
            self._mode = "offline"
            self._run.start(self._mode, config, renew_exit_handler)
        if self._mode == "offline":
            self._last = self._state.step if logged is None else logged
        else:
            self._last = self._run.server_step
            if not self._quiet:
                print(f"W&B: {self._run.url}", flush=True)
            if self._last < launch.step and list(self._files.glob(f"offline-run-*-{launch.run_id}")):
                self._notify(
                    "steps of earlier launches that were tracked offline are sent now; do not `wandb sync` their files"
                    f" under {self._files}"
                )
        if self._last > launch.step:
            advice = "" if launch.number else "; leave logging.run_id unset to track this run as a new one"
            self._notify(
                f"run {launch.run_id} already has the steps up to {self._last}, so steps {launch.step + 1} to"
                f" {self._last} of this launch are not sent{advice}"
            )
        self._checked_at, self._due_on_disk = time.monotonic(), 0
        return self._last

    def write(self, step: int, fields: Fields) -> None:
        if step <= self._last:  # trained again, and W&B has it
            return
        self._run.log(step, fields)
        self._last = step
        if time.monotonic() - self._checked_at > DISK_CHECK_S:
            self._check_files()

    def close(self, exit_code: int) -> None:
        self._run.finish(exit_code)
        self._due_on_disk = self._last
        deadline = time.monotonic() + FLUSH_S
        while self._mode == "offline" and not self._is_on_disk() and time.monotonic() < deadline:
            time.sleep(0.1)
        self._check_files()

    def abandon(self) -> None:
        self._run.abandon()

    def _is_on_disk(self) -> bool:
        return (last_step(self._run.file) or 0) >= self._due_on_disk

    def _check_files(self) -> None:
        """Updates tracking.json. Raises OSError when steps sent before the previous check are still not on disk."""
        with contextlib.suppress(OSError):
            replace(self._state, step=self._last).write(self._folder)
        if self._mode == "offline" and (logged := last_step(self._run.file) or 0) < self._due_on_disk:
            free = shutil.disk_usage(self._run.file.parent).free
            raise OSError(
                f"{self._run.file} ends at step {logged} instead of {self._due_on_disk}; {free:,} bytes are free"
            )
        self._checked_at, self._due_on_disk = time.monotonic(), self._last

    def _notify(self, text: str) -> None:
        print(f"W&B: {text}", file=sys.stderr, flush=True)


class NoConnection(Exception):
    """W&B's server does not answer, or refuses."""


class WandbRun:
    """One W&B run from wandb.init to its end, offline or online.

    name: the display name, unless logging.run_name gives one. folder: where wandb makes its own folder. resume: as for
    wandb.init: "allow", "must" (the run must exist) or "never" (it must not).
    """

    def __init__(
        self, cfg: LoggingConfig, *, name: str, folder: Path, run_id: str, resume: Literal["allow", "must", "never"]
    ) -> None:
        import wandb

        self._wandb, self._cfg, self._name, self._folder = wandb, cfg, cfg.run_name or name, folder
        self._id, self._resume = run_id, resume
        self._core: list[psutil.Process] = []
        self._started = False

    def start(self, mode: Mode, config: dict[str, Any], renew_exit_handler: Callable[[], None]) -> None:
        """Starts wandb's service and the run. renew_exit_handler: as in Sink.open.

        Raises NoConnection when W&B's server does not answer or refuses, and otherwise what wandb raises.
        """
        drop_dead_service()
        if "WANDB_SWEEP_ID" in os.environ:  # under a sweep, wandb.init takes the id from there alone
            os.environ["WANDB_RUN_ID"] = self._id
        self._wandb.setup(self._wandb.Settings(silent=True))  # the sink prints what is worth a line
        self._started = True
        self._core = [child for child in psutil.Process().children() if child.name() == "wandb-core"]
        renew_exit_handler()
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
                # console="off": otherwise wandb wraps the training's standard output
                settings=self._wandb.Settings(console="off", init_timeout=INIT_TIMEOUT_S, x_disable_stats=True),
            )
        except self._wandb.errors.CommError as err:
            self._stop()  # one wandb-core process accepts an id only once, and `start` may be called again
            raise NoConnection(str(err)) from err
        self._run.config.update(config, allow_val_change=True)  # replaces the values of a resumed run
        self._run.define_metric("step")
        self._run.define_metric("tokens")
        for name in BY_TOKENS:
            self._run.define_metric(f"by_tokens/{name}", step_metric="tokens")
        self._run.define_metric("*", step_metric="step")

    @property
    def server_step(self) -> int:
        """The last step that W&B's server has of this run; 0 for a new run, and offline."""
        return max(0, self._run.starting_step - 1)

    @property
    def url(self) -> str:
        return self._run.url

    @property
    def file(self) -> Path:
        """The run's transaction log: the only record of an offline run, a copy of an online one."""
        return Path(self._run.dir).parent / f"run-{self._run.id}.wandb"

    def log(self, step: int, fields: Fields) -> None:
        by_tokens = {f"by_tokens/{name}": fields[name] for name in BY_TOKENS if name in fields}
        self._run.log({**fields, **by_tokens}, step=step, commit=True)

    def finish(self, exit_code: int) -> None:
        self._run.finish(exit_code=exit_code)
        self._stop()

    def _stop(self) -> None:
        self._started = False
        with contextlib.suppress(SystemExit):  # teardown exits with the code of wandb-core
            self._wandb.teardown()

    def abandon(self) -> None:
        """Kills wandb-core, so that neither calls that wait for it nor the end of the process hang."""
        for process in self._core:
            with contextlib.suppress(psutil.Error):
                process.kill()
                process.wait(2)
        if self._started:
            with contextlib.suppress(Exception):
                self._stop()  # otherwise wandb's atexit handler reports that its service has died


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


def drop_dead_service() -> None:
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
