"""Weights & Biases and TensorBoard: mirrors of metrics.jsonl, and never a reason for a run to fail.

One run is one W&B run. Its id is made once; a resumed run goes on where W&B stands, which after a crash is neither
where the checkpoint stands nor always where the dead segment ended:

- Steps that W&B has already, trained again, are held back. Online W&B drops them; worse, `wandb sync` of offline
  fragments that repeat steps moves the repeated ones behind the others, so that every later step has a wrong number.
- Steps that W&B has not got, though they were trained (wandb-core writes every 15 s, and dies with the trainer), are
  sent first, out of metrics.jsonl.

`python -m training.tracking rebuild OUTPUT_DIR` makes a whole new W&B run out of metrics.jsonl. Exit codes: 0 done;
1 W&B failed; 3 nothing to rebuild.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import netrc
import os
import re
import secrets
import shutil
import socket
import struct
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

import psutil
import yaml

from training.config import ConfigError, LoggingConfig
from training.observe.tracking.mirror import Fields, Limits, Mirror, Sink, by_step
from training.observe.tracking.tracking_state import Note, Parent
from training.record.metrics_log import iter_rows, read_rows

Mode = Literal["online", "offline", "disabled"]

BY_TOKENS = ("loss", "eval_loss", "eval_bpb")
"""Shown a second time as by_tokens/<name>: a W&B metric has one axis, and everything else is shown by step."""

INIT_TIMEOUT_S = 30
"""After which an online run without an answer becomes an offline one."""

DISK_CHECK_S = 60.0
"""Between looks at whether an offline run's file grows: on a full disk wandb-core drops rows and says nothing."""


def new_run_id() -> str:
    """A tracking id; made once per run, kept in run.json and in every checkpoint."""
    return secrets.token_hex(4)


# -- what a run tells ---------------------------------------------------------------------------------


class Tracker:
    """Hands rows of metrics.jsonl to W&B (logging.wandb) and TensorBoard files (logging.tensorboard), on rank 0.

    Without a key or a connection W&B writes offline, and says so. Whatever fails is switched off with one line on
    stderr, and the training goes on; nothing here raises, and `tell` never waits.

    run_id: the id that the run keeps. config: plain, the whole configuration of this segment. step: the step resumed
    from, 0 for a new run; metrics.jsonl ends there. segment: launches of this run before this one. parent: of a fork.
    quiet: the run's address is not printed. shown_by: who is told, by name.
    """

    def __init__(
        self,
        cfg: LoggingConfig,
        *,
        output_dir: Path,
        run_id: str,
        config: dict[str, Any],
        step: int = 0,
        segment: int = 0,
        parent: Parent | None = None,
        quiet: bool = False,
        limits: Limits | None = None,
    ) -> None:
        self._mirrors: list[Mirror] = []
        makers: dict[str, Callable[[], Sink | None]] = {}
        if cfg.wandb:
            makers["W&B"] = lambda: _wandb(cfg, output_dir, run_id, config, step, segment, parent, quiet)
        if cfg.tensorboard:
            makers["TensorBoard"] = lambda: _Tensorboard(output_dir / "tensorboard", step)
        for name, make in makers.items():
            try:
                # here and not on the mirror's thread, where importing would compete with the first steps
                sink = make()
            except Exception as err:  # a package that is missing or broken, an environment that says nonsense
                why = f"{type(err).__name__}: {str(err).strip().partition(chr(10))[0]}"
                print(f"{name}: {why}; training goes on without it", file=sys.stderr, flush=True)
                continue
            if sink is None:
                continue
            history = functools.partial(_rows_between, output_dir / "metrics.jsonl", step)
            self._mirrors.append(Mirror(sink, history, limits or Limits()))
        self.shown_by = [mirror.name for mirror in self._mirrors]

    def tell(self, row: dict) -> None:
        """Takes a row as metrics.jsonl has it; an event's numbers are shown with those of the last step before it."""
        for mirror in self._mirrors:
            mirror.offer(dict(row))

    def finish(self, exit_code: int) -> None:
        """Ends tracking: when all is handed on, or after Limits.finish_s seconds for each mirror."""
        for mirror in self._mirrors:
            mirror.finish(exit_code)


def _rows_between(path: Path, step: int, last: int) -> Iterator[dict]:
    """Rows of metrics.jsonl after step `last` up to step `step`, which was resumed from."""
    began = False
    for row in iter_rows(path) if last < step else ():
        if "event" not in row:
            if row["step"] > step:
                return
            began = began or row["step"] > last
        if began:
            yield row


# -- W&B ----------------------------------------------------------------------------------------------


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    where = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(where) is not None
    except (OSError, ValueError, netrc.NetrcParseError):
        return False


def _mode() -> Mode:
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


class _WandbRun:
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


def _wandb(cfg: LoggingConfig, folder: Path, *told: Any) -> Sink | None:
    """The sink of a training run, or None where W&B is switched off by the environment."""
    mode = _mode()
    return None if mode == "disabled" else _Wandb(cfg, mode, folder, *told)


class _NoConnection(Exception):
    """W&B's server does not answer, or refuses."""


class _Wandb:
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
        self._run = _WandbRun(cfg, name=folder.resolve().name, folder=folder, run_id=run_id, resume=resume)
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


# -- what wandb has written ---------------------------------------------------------------------------

_BLOCK = 32 * 1024
_FILE_HEAD, _CHUNK_HEAD = 7, struct.Struct("<IHB")
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def logged_step(folder: Path, run_id: str) -> int | None:
    """The greatest step in any transaction log of this run under wandb's folder; None when there is none."""
    found = [last_step(path) for path in folder.glob(f"*run-*-{run_id}/run-{run_id}.wandb")]
    return max((step for step in found if step is not None), default=None)


def last_step(path: Path) -> int | None:
    """The step of the last history row in a transaction log of wandb; None when it has none, or is not there."""
    from wandb.proto.wandb_internal_pb2 import Record

    size = path.stat().st_size if path.exists() else 0
    for blocks in (8, 128, size // _BLOCK + 1):  # a log has gigabytes, and its last row is near its end
        found = None
        for raw in log_records(path, first_block=max(0, size // _BLOCK + 1 - blocks)):
            record = Record.FromString(raw)
            if record.WhichOneof("record_type") == "history":
                found = record.history.step.num
        if found is not None or blocks > size // _BLOCK:
            return found
    return found


def log_records(path: Path, first_block: int = 0) -> Iterator[bytes]:
    """The serialized records of a transaction log of wandb: LevelDB's log format behind a head of 7 bytes.

    first_block: where to begin, in blocks of 32 KiB; a record that began before is left out. What a torn or wrong
    checksum spoils is left out too, up to the next block.
    """
    with open(path, "rb") as file:
        file.seek(first_block * _BLOCK)
        whole: bytes | None = None
        while block := file.read(_BLOCK):
            place = _FILE_HEAD if first_block == 0 and file.tell() <= _BLOCK else 0
            while place + _CHUNK_HEAD.size <= len(block):
                checksum, length, kind = _CHUNK_HEAD.unpack_from(block, place)
                place += _CHUNK_HEAD.size
                data = block[place : place + length]
                if checksum != zlib.crc32(data, zlib.crc32(bytes([kind]))):
                    whole = None
                    break
                place += length
                if kind in (_FULL, _FIRST):
                    whole = b""
                if whole is not None:
                    whole += data
                    if kind in (_FULL, _LAST):
                        yield whole
                        whole = None


# -- TensorBoard --------------------------------------------------------------------------------------


class _Tensorboard:
    """Event files of the same steps; text is left out. Steps trained again replace what was shown of them."""

    name = "TensorBoard"
    advice = "training goes on, metrics.jsonl has every row"

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._make, self._folder, self._step = SummaryWriter, folder, step

    def open(self, guard: Callable[[], None]) -> int:
        known = any(self._folder.glob("events.*"))
        # of a killed run the last step before the checkpoint may be missing: it was waiting for its evaluation
        self._last = max(0, self._step - 1) if known else 0
        self._writer = self._make(str(self._folder), purge_step=self._last + 1 if known else None)
        return self._last

    def write(self, step: int, fields: Fields) -> None:
        if step <= self._last:  # a rollback
            self._writer.close()
            self._writer = self._make(str(self._folder), purge_step=step)
        when = fields.get("_timestamp")
        for name, value in fields.items():
            if isinstance(value, int | float) and name not in ("step", "_timestamp"):
                self._writer.add_scalar(name, value, step, walltime=when)
        self._writer.flush()
        self._last = step

    def close(self, exit_code: int) -> None:
        self._writer.close()

    def abandon(self) -> None:
        pass


# -- rebuild ------------------------------------------------------------------------------------------


class RebuildError(ValueError):
    """A folder that no run can be rebuilt from; the message says why and what to do."""


def rebuild(
    output_dir: Path, *, project: str | None, entity: str | None, mode: Mode, run_id: str | None
) -> tuple[list[int], Path, str]:
    """Emits a run's metrics.jsonl as one new W&B run: every step once, in order, with its events.

    project, entity: over those of config.yaml. run_id: over that of run.json. Returns the steps, the folder that
    wandb wrote, and the run's id. Raises RebuildError when there is nothing to emit, and what wandb raises.
    """
    config, run, steps = _run_folder(output_dir)
    own = run.get("tracking_id") or new_run_id()
    try:
        said = config.get("logging", {})
        cfg = LoggingConfig(
            wandb=True,
            project=project or said.get("project") or LoggingConfig.project,
            entity=entity or said.get("entity"),
            run_name=said.get("run_name"),
            run_id=run_id or own,  # it becomes the name of a folder: LoggingConfig refuses what is more than a name
        )
        parent = Parent(**run["parent"]) if run.get("parent") else None
    except (ConfigError, TypeError, AttributeError) as err:
        raise RebuildError(f"{output_dir}: config.yaml, run.json or --run_id is not what a run has: {err}") from err
    target = output_dir / "wandb_rebuilt" / cfg.run_id
    if target.exists():
        shutil.rmtree(target)  # an earlier rebuild
    target.mkdir(parents=True)
    told = _WandbRun(cfg, name=output_dir.resolve().name, folder=target, run_id=target.name, resume="never")
    told.start(mode, Note.read(output_dir, own).as_config(config, parent), lambda: None)
    for step, fields in steps:
        told.log(step, fields)
    file = told.file
    told.finish(0 if run.get("status") in ("finished", "stopped") else 1)
    if mode == "offline" and last_step(file) != steps[-1][0]:
        raise OSError(f"{file} ends at step {last_step(file)} instead of {steps[-1][0]}; is the disk full?")
    return [step for step, _ in steps], file.parent, target.name


def _run_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Any], list[tuple[int, Fields]]]:
    """Configuration, run.json and the steps of a run folder. Raises RebuildError."""
    try:
        rows = read_rows(folder / "metrics.jsonl")
        config, run = (
            read(path.read_text(encoding="utf-8")) if (path := folder / name).exists() else {}
            for name, read in (("config.yaml", yaml.safe_load), ("run.json", json.loads))
        )
    except (ValueError, OSError, yaml.YAMLError) as err:
        raise RebuildError(str(err)) from err
    if not isinstance(config, dict) or not isinstance(run, dict):
        raise RebuildError(f"{folder}: config.yaml or run.json is not a mapping; restore it")
    steps: list[tuple[int, Fields]] = []
    for step, fields in by_step(rows):
        if not steps or step > steps[-1][0]:
            steps.append((step, fields))
    if not steps:
        raise RebuildError(f"{folder / 'metrics.jsonl'} has no step; give the --output_dir of a run that has trained")
    return config, run, steps


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m training.tracking", description=__doc__.split("\n\n")[-1])
    command = parser.add_subparsers(required=True).add_parser(
        "rebuild", help="one whole W&B run out of metrics.jsonl", allow_abbrev=False
    )
    command.add_argument("output_dir", type=Path, metavar="OUTPUT_DIR", help="the run's folder")
    command.add_argument("--project", help="W&B project (default: the run's)")
    command.add_argument("--entity", help="W&B entity (default: the run's)")
    command.add_argument("--run_id", help="W&B id of the new run (default: the run's own, which W&B must not have)")
    command.add_argument("--mode", choices=("offline", "online"), help="default: online with a key, offline without")
    args = parser.parse_args(argv)
    mode = args.mode or _mode()
    try:
        steps, folder, run_id = rebuild(
            args.output_dir,
            project=args.project,
            entity=args.entity,
            run_id=args.run_id,
            mode="offline" if mode == "disabled" else mode,
        )
    except RebuildError as err:
        print(f"error: {err}", file=sys.stderr)
        return 3
    except Exception as err:  # wandb's own have no common class
        print(f"error: W&B: {type(err).__name__}: {err}", file=sys.stderr)
        return 1
    print(f"run {run_id}: {len(steps)} steps, {steps[0]} to {steps[-1]}, in {folder}")
    if mode != "online":
        print(f"to upload it: wandb sync {folder}\nIf W&B has a run {run_id} already, give --run_id first.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
