"""Finds, on the machine itself, the largest micro-batch that fits and the fastest setting at a constant global batch.

    python -m training.tune --config training/configs/quickstart.yaml --num_gpus 2 --out tuned.yaml

For each ds_config and each kind of activation checkpointing the micro-batch grows, a few real steps at a time, until
memory runs out or a step takes longer; under the thriftiest kind until memory runs out, whatever it takes. Every trial
has processes of its own, so running out of memory ends that trial alone. Prints a row per trial and what to use. Exit
codes: 0 a setting was found; 2 refused configuration; 3 refused data; 1 nothing fits; 128 + the number of the signal
that stopped it.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

import torch

from gsa.model import Recomputed
from training.config import BatchPlan, ConfigError, RunConfig, global_batch_size, load_config, to_plain, to_yaml
from training.config import deepspeed as ds_config
from training.data import DataError
from training.data.open import open_data
from training.loop.preflight import require_backend
from training.loop.trial import Outcome, says_out_of_memory
from training.record.run_folder import environment

FINISHED, FAILED, REFUSED_CONFIG, REFUSED_INPUT = 0, 1, 2, 3

NOISE = 0.02
"""Of a step's seconds: differences below it, or below the trials' own spread, decide nothing."""

THRIFTIEST_FIRST: tuple[Recomputed, ...] = ("block", "ffn", "none")
"""What runs out of memory under one runs out under the next as well."""

PEERS_GRACE_S = 10.0
"""How long the other ranks may go on when one has ended; NCCL would let them wait for ever."""

KEPT_CHARACTERS = 4000
"""Of what the rank that failed printed, for --json."""

POLL_S = 0.1
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


# -- the search -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """One way to spend memory; the micro-batch grows within it."""

    ds_config: Path
    recomputed: Recomputed


@dataclass(frozen=True)
class Trial:
    """slower: than the setting's smaller micro-batch before it, by more than noise."""

    setting: Setting
    micro_batch_size: int
    outcome: Outcome
    slower: bool = False


Attempt = Callable[[Setting, int], Outcome]
"""Tries a setting with a micro-batch size."""


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def search(
    ds_configs: Sequence[Path], kinds: Sequence[Recomputed], sizes: Sequence[int], attempt: Attempt
) -> Iterator[Trial]:
    """Trials as they finish, ds_config by ds_config.

    kinds: of activation checkpointing, the thriftiest first: a size at which one ran out of memory is not tried under
    the next. sizes: ascending micro-batch sizes.
    """
    for path in ds_configs:
        fitting = list(sizes)
        for number, kind in enumerate(kinds):
            for trial in grow(Setting(path, kind), fitting, attempt, to_the_limit=number == 0):
                yield trial
                if trial.outcome.verdict == "out_of_memory":
                    fitting = [size for size in fitting if size < trial.micro_batch_size]


def grow(setting: Setting, sizes: Sequence[int], attempt: Attempt, *, to_the_limit: bool) -> Iterator[Trial]:
    """Doubles the micro-batch until memory runs out, then halves the gap; ends early when a step takes longer, unless
    it is to find the largest that fits.

    No size is tried at or above one that ran out of memory. A trial that fails for another reason ends it too.
    """
    low, high, before = -1, len(sizes), None  # sizes[low] fits, sizes[high] does not
    while low + 1 < high:
        at = (low + high) // 2 if high < len(sizes) else _doubled(sizes, low)
        outcome = attempt(setting, sizes[at])
        longer = outcome.verdict == "ok" and before is not None and slower(outcome, before)
        yield Trial(setting, sizes[at], outcome, longer)
        if outcome.verdict == "failed" or (longer and not to_the_limit):
            return
        if outcome.verdict == "out_of_memory":
            high = at
        else:
            low, before = at, outcome


def _doubled(sizes: Sequence[int], low: int) -> int:
    """The index of the smallest size that is at least twice sizes[low]; the last where there is none."""
    if low < 0:
        return 0
    return next((i for i, size in enumerate(sizes) if size >= 2 * sizes[low]), len(sizes) - 1)


def slower(later: Outcome, earlier: Outcome) -> bool:
    """Whether a step takes longer by more than noise."""
    noise = max(NOISE * earlier.seconds, later.spread + earlier.spread)
    return later.seconds - earlier.seconds > noise


def best(trials: Sequence[Trial]) -> Trial | None:
    """The fastest; of those within NOISE of it, the one that leaves most memory free. None: nothing ran."""
    fitting = [t for t in trials if t.outcome.verdict == "ok"]
    if not fitting:
        return None
    limit = min(t.outcome.seconds for t in fitting) * (1 + NOISE)
    return min((t for t in fitting if t.outcome.seconds <= limit), key=lambda t: t.outcome.peak_gib)


def largest(trials: Sequence[Trial]) -> Trial | None:
    """The largest micro-batch found to fit, the fastest of its settings."""
    fitting = [t for t in trials if t.outcome.verdict == "ok"]
    return max(fitting, key=lambda t: (t.micro_batch_size, -t.outcome.seconds), default=None)


# -- one trial --------------------------------------------------------------------------------------------


class Interrupted(Exception):
    """A signal asked this process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Stop:
    """Context manager that remembers a signal until someone asks: no child is started and lost track of in between."""

    def __init__(self) -> None:
        self._number = 0

    def __enter__(self) -> Stop:
        self._before = {number: signal.signal(number, self._remember) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._number = number

    def check(self) -> None:
        """Raises Interrupted when there has been one."""
        if self._number:
            raise Interrupted(self._number)


def run_ranks(command: Sequence[str], size: int, folder: Path, *, patience_s: float, stop: Stop) -> list[int | None]:
    """Runs `size` ranks of a command as one process group; none of it is left when this returns or raises.

    Returns each rank's exit code, None for one that had to be ended: its peers were gone, or nothing changed in
    `folder` for patience_s. Their output goes to folder/rank_<r>.log. Not by torchrun, whose ranks have process
    groups of their own and outlive it.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks: list[subprocess.Popen] = []
    try:
        for rank in range(size):
            env = {
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(size),
                "LOCAL_WORLD_SIZE": str(size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            with open(folder / f"rank_{rank}.log", "wb") as log:
                ranks.append(
                    subprocess.Popen(
                        command,
                        env=env,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        process_group=ranks[0].pid if ranks else 0,
                    )
                )
        _wait(ranks, folder, patience_s, stop)
        return [rank.poll() for rank in ranks]
    finally:
        if ranks:
            _end_group(ranks)


def _wait(ranks: Sequence[subprocess.Popen], folder: Path, patience_s: float, stop: Stop) -> None:
    """Until all have ended, or waiting longer is pointless."""
    first_end: float | None = None
    while any(rank.poll() is None for rank in ranks):
        stop.check()
        now = time.time()
        if first_end is None and any(rank.poll() is not None for rank in ranks):
            first_end = now
        newest = max(path.stat().st_mtime for path in (folder, *folder.glob("*"), *folder.glob(".ranks")))
        if (first_end is not None and now - first_end > PEERS_GRACE_S) or now - newest > patience_s:
            return
        time.sleep(POLL_S)


def _end_group(ranks: Sequence[subprocess.Popen]) -> None:
    try:
        os.killpg(ranks[0].pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # all of it has ended
    for rank in ranks:
        rank.wait()


@dataclass(frozen=True)
class RankEnd:
    """How one rank ended: exit code (None: it had to be ended), the outcome it left, and what it printed.

    capped: under a memory cap.
    """

    rank: int
    code: int | None
    outcome: Outcome | None
    printed: str
    capped: bool

    @property
    def out_of_memory(self) -> str | None:
        """Why the rank is taken to have run out of memory, or None."""
        if self.outcome is not None:
            return self.outcome.reason if self.outcome.verdict == "out_of_memory" else None
        if self.code in (-signal.SIGKILL, 128 + signal.SIGKILL):
            return f"rank {self.rank} was killed, as the kernel does when the machine's memory runs out"
        return self.last_words if says_out_of_memory(self.printed, capped=self.capped) else None

    @property
    def last_words(self) -> str:
        """What the rank, or the watchdog on it, gives as the reason, in one line."""
        lines = [line.strip() for line in self.printed.splitlines() if line.strip()]
        if found := next((line for line in lines if line.startswith("watchdog: ")), None):
            return found
        if self.outcome is not None:
            return self.outcome.reason
        ended = "gave no sign of life" if self.code is None else f"ended with code {self.code}"
        return f"rank {self.rank} {ended}: {lines[-1] if lines else 'it printed nothing'}"


def read_ends(folder: Path, codes: Sequence[int | None], *, capped: bool) -> list[RankEnd]:
    """The ranks of a trial, the first to leave an outcome first: the others may have lost their connection to it."""
    ends = []
    for rank, code in enumerate(codes):
        path, outcome, left_at = folder / f"rank_{rank}.json", None, time.time()
        if path.exists():
            plain = json.loads(path.read_text(encoding="utf-8"))
            outcome = Outcome(**{**plain, "step_seconds": tuple(plain["step_seconds"])})
            left_at = path.stat().st_mtime
        printed = (folder / f"rank_{rank}.log").read_text(encoding="utf-8", errors="replace")
        ends.append((left_at, RankEnd(rank, code, outcome, printed, capped)))
    return [end for _, end in sorted(ends, key=lambda pair: pair[0])]


def together(ends: Sequence[RankEnd]) -> Outcome:
    """The trial's outcome: a step is as slow as its slowest rank, and one rank without memory is enough."""
    reasons = [reason for end in ends if (reason := end.out_of_memory) is not None]
    if reasons:
        return Outcome("out_of_memory", reasons[0])
    outcomes = [end.outcome for end in ends if end.outcome is not None and end.outcome.verdict == "ok"]
    if len(outcomes) < len(ends):
        culprit = _culprit(ends)
        return Outcome("failed", culprit.last_words, printed=culprit.printed[-KEPT_CHARACTERS:])
    steps = tuple(max(step) for step in zip(*(o.step_seconds for o in outcomes), strict=True))
    allocated = [o.peak_allocated_gib for o in outcomes if o.peak_allocated_gib is not None]
    return Outcome(
        "ok", None, steps, max(o.peak_gib for o in outcomes), max(allocated, default=None), outcomes[0].backend
    )


def _culprit(ends: Sequence[RankEnd]) -> RankEnd:
    """One that died without a word, else the first that gave a reason, else one that hung."""
    died = [end for end in ends if end.outcome is None and end.code is not None]
    said = [end for end in ends if end.outcome is not None and end.outcome.verdict != "ok"]
    return next(iter([*died, *said, *(end for end in ends if end.outcome is None)]))


def try_setting(task: Task, setting: Setting, micro_batch_size: int, folder: Path, stop: Stop) -> Outcome:
    """The outcome of one trial; the ranks use `folder`, which must be empty."""
    cap = [] if task.memory_cap_gib is None else ["--memory_cap_gib", str(task.memory_cap_gib)]
    words = task.words(setting, micro_batch_size)
    command = [
        sys.executable,
        "-m",
        "training.loop.trial",
        "--config",
        str(task.config),
        "--deepspeed_config",
        str(setting.ds_config),
        "--folder",
        str(folder),
        "--steps",
        str(task.steps),
        *cap,
        *words,
    ]
    # as in the watchdog: the first step may take ten times as long as a rank may be silent
    patience_s = 10 * task.cfg.training.hang_timeout_s
    codes = run_ranks(command, task.ranks, folder, patience_s=patience_s, stop=stop)
    return together(read_ends(folder, codes, capped=task.memory_cap_gib is not None))


# -- what is asked for ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """What to tune, read and found good. sizes: micro-batches that make up the global batch on these ranks."""

    config: Path
    overrides: tuple[str, ...]
    cfg: RunConfig
    ranks: int
    steps: int
    memory_cap_gib: float | None
    global_batch_size: int
    ds_configs: tuple[Path, ...]
    kinds: tuple[Recomputed, ...]
    sizes: tuple[int, ...]

    def tokens_per_s(self, outcome: Outcome) -> float:
        return self.global_batch_size * self.cfg.training.max_seq_len / outcome.seconds

    def accumulation_steps(self, micro_batch_size: int) -> int:
        return self.global_batch_size // (micro_batch_size * self.ranks)

    def decided(self, setting: Setting, micro_batch_size: int) -> dict[str, int | bool | str]:
        """The keys of `training` that a setting stands for, with their values."""
        kind = setting.recomputed
        return {
            "micro_batch_size": micro_batch_size,
            "gradient_accumulation_steps": self.accumulation_steps(micro_batch_size),
            "global_batch_size": self.global_batch_size,
            "gradient_checkpointing": kind != "none",
            **({} if kind == "none" else {"checkpointing_scope": kind}),
        }

    def words(self, setting: Setting, micro_batch_size: int) -> list[str]:
        """The key=value words of a run with this setting: the user's own, then what was decided."""
        decided = self.decided(setting, micro_batch_size)
        own = [word for word in self.overrides if _key(word).removeprefix("training.") not in decided]
        return [*own, *(f"training.{key}={str(value).lower()}" for key, value in decided.items())]


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="training.tune",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, required=True, help="the run's yaml; it says the global batch")
    parser.add_argument(
        "--deepspeed_config",
        type=Path,
        nargs="+",
        action="extend",
        metavar="JSON",
        help="ds_configs to compare (default: zero1, zero2 and zero3, as far as the configuration may use them)",
    )
    parser.add_argument("--num_gpus", type=int, help="ranks (default: one per GPU; 1 on a CPU)")
    parser.add_argument("--steps", type=int, default=5, help="timed steps per trial (default: %(default)s)")
    parser.add_argument(
        "--memory_cap_gib",
        type=float,
        help="let a rank hold no more than this, enforced: on a GPU by torch's allocator, on a CPU by the system, "
        "which counts what is allocated, touched or not",
    )
    parser.add_argument("--out", type=Path, help="write the configuration with the fastest setting as a new yaml file")
    parser.add_argument("--json", type=Path, help="write every trial to a new file")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="configuration keys, over the yaml; training.gradient_checkpointing or checkpointing_scope given here "
        "are kept to, others are tried",
    )
    args = parser.parse_intermixed_args(argv)
    # what follows `--deepspeed_config A B` may be an override
    given = [str(path) for path in args.deepspeed_config or ()]
    args.overrides += [word for word in given if "=" in word]
    args.deepspeed_config = [Path(word) for word in given if "=" not in word]
    return args


def prepare(args: argparse.Namespace) -> Task:
    """Reads and checks everything before the first trial. Raises ConfigError or DataError, each with what to do."""
    for name, path in (("--out", args.out), ("--json", args.json)):
        _require_free(name, path)
    ranks = _ranks(args.num_gpus)
    if args.steps < 1:
        raise ConfigError(f"--steps {args.steps} must be at least 1")
    if args.memory_cap_gib is not None and not args.memory_cap_gib > 0:
        raise ConfigError(f"--memory_cap_gib {args.memory_cap_gib:g} must be above 0")
    cfg = load_config(args.config, args.overrides)
    require_backend(cfg)
    total = global_batch_size(to_plain(cfg), ranks)
    if total % ranks:
        raise ConfigError(
            f"training.global_batch_size={total} cannot be shared by --num_gpus {ranks} ranks; choose "
            f"{', '.join(map(str, divisors(total)))} ranks, or a global_batch_size of "
            f"{' or '.join(str(n) for n in (total // ranks * ranks, -(-total // ranks) * ranks) if n)}"
        )
    sizes = tuple(divisors(total // ranks))
    plans = [BatchPlan(size, total // (size * ranks), ranks, total) for size in sizes]
    ds_configs = _ds_configs(args.deepspeed_config, cfg, plans, args.config)
    open_data(cfg)  # builds the window tables, which the ranks then find
    return Task(
        args.config,
        tuple(args.overrides),
        cfg,
        ranks,
        args.steps,
        args.memory_cap_gib,
        total,
        ds_configs,
        _kinds(cfg, args.overrides),
        sizes,
    )


def _ranks(wanted: int | None) -> int:
    devices = torch.cuda.device_count()
    if wanted is None:
        return max(1, devices)
    if wanted < 1:
        raise ConfigError(f"--num_gpus {wanted} must be at least 1")
    if devices and wanted > devices:
        raise ConfigError(f"--num_gpus {wanted}: torch sees {devices} here")
    return wanted


def _ds_configs(given: Sequence[Path], cfg: RunConfig, plans: Sequence[BatchPlan], config: Path) -> tuple[Path, ...]:
    """Those given, each good with every plan; else zero1, zero2 and zero3 without what this run may not use."""

    def check(path: Path) -> None:
        for plan in plans:
            ds_config.resolve_ds_config(path, cfg, plan, config)

    for path in given:
        check(path)
    if given:
        return tuple(dict.fromkeys(given))
    usable = []
    for name in ("zero1.json", "zero2.json", "zero3.json"):
        path = Path(os.path.relpath(ds_config.DEFAULT.with_name(name)))
        try:
            check(path)
        except ConfigError:
            continue
        usable.append(path)
    return tuple(usable)


def _kinds(cfg: RunConfig, overrides: Sequence[str]) -> tuple[Recomputed, ...]:
    named = {_key(word) for word in overrides}
    asked_for = named & {"training.gradient_checkpointing", "training.checkpointing_scope"}
    return (cfg.training.recomputed,) if asked_for else THRIFTIEST_FIRST


def _key(word: str) -> str:
    return word.partition("=")[0].strip()


def _require_free(name: str, path: Path | None) -> None:
    if path is None:
        return
    if path.exists():
        raise ConfigError(f"{name} {path} exists already; give another name, or remove it")
    if not path.parent.is_dir():
        raise ConfigError(f"{name} {path}: there is no folder {path.parent}; make it first")


# -- telling ----------------------------------------------------------------------------------------------

# fixed widths, since rows are printed as trials end
ROW = "{:<18}  {:<10}  {:>13}  {:>15}  {:>10}  {:>8}  {}"
HEAD = ROW.format("ds_config", "recomputed", "micro x accum", "s/step", "tokens/s", "peak GiB", "verdict")


def table_row(task: Task, trial: Trial) -> str:
    out = trial.outcome
    ran = ("", "", "")
    if out.verdict == "ok":
        ran = (_seconds(out), f"{task.tokens_per_s(out):,.0f}", f"{out.peak_gib:.2f}")
    verdict = {
        "ok": "ok, slower" if trial.slower else "ok",
        "out_of_memory": "out of memory",
        "failed": f"failed: {out.reason}",
    }[out.verdict]
    return ROW.format(trial.setting.ds_config.stem, trial.setting.recomputed, _batch(task, trial), *ran, verdict)


def _batch(task: Task, trial: Trial) -> str:
    return f"{trial.micro_batch_size} x {task.accumulation_steps(trial.micro_batch_size)}"


def _seconds(outcome: Outcome) -> str:
    return f"{outcome.seconds:.3f} ±{outcome.spread:.3f}"


def sentence(task: Task, trial: Trial) -> str:
    out = trial.outcome
    return (
        f"{trial.setting.ds_config.stem}, recomputed {trial.setting.recomputed}, micro-batch x accumulation "
        f"{_batch(task, trial)}: {_seconds(out)} s per step, {task.tokens_per_s(out):,.0f} tokens/s, "
        f"peak {out.peak_gib:.2f} GiB per rank"
    )


def recommendation(task: Task, trials: Sequence[Trial]) -> str:
    """What to use, for a person; at least one trial ran."""
    winner, widest = best(trials), largest(trials)
    words = task.words(winner.setting, winner.micro_batch_size)
    also = winner.micro_batch_size == widest.micro_batch_size
    return "\n".join(
        [
            f"fastest: {sentence(task, winner)}",
            f"largest micro-batch found to fit: {'the same' if also else sentence(task, widest)}",
            f"use: --config {task.config} --deepspeed_config {winner.setting.ds_config} {shlex.join(words)}",
        ]
    )


def _nothing_ran(trials: Sequence[Trial]) -> str:
    if failed := next((t for t in trials if t.outcome.verdict == "failed"), None):
        return f"no setting ran; the first failure: {failed.outcome.reason}"
    least = trials[0]
    return (
        f"no setting fits: micro-batch {least.micro_batch_size} already ran out of memory under "
        f"{least.setting.ds_config.stem}, recomputed {least.setting.recomputed} ({least.outcome.reason}). "
        f"Use more ranks (--num_gpus), --deepspeed_config ds_configs/zero3_offload.json, a shorter "
        f"training.max_seq_len, or a smaller model"
    )


def override_yaml(task: Task, trials: Sequence[Trial], argv: Sequence[str]) -> str:
    """The run's yaml with the fastest setting in it, whole, under the birth certificate of its numbers."""
    winner, env = best(trials), environment()
    words = task.words(winner.setting, winner.micro_batch_size)
    lines = [
        f"{task.config} with {shlex.join(words)}",
        f"on {task.ranks} rank(s); the fastest of {len(trials)} trials of training.tune.",
        sentence(task, winner),
        f"(median of {task.steps} steps ± half the distance between their quartiles; {winner.outcome.backend} kernels)",
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {', '.join(env['devices'])}, {env['cpus']} CPUs, python "
        f"{env['python']}, torch {env['torch']}, deepspeed {env['deepspeed']}",
        f"command: python -m training.tune {shlex.join(argv)}",
        f"Use with: --deepspeed_config {shlex.quote(str(winner.setting.ds_config))}",
    ]
    return "".join(f"# {line}\n" for line in lines) + to_yaml(load_config(task.config, words))


def all_trials(task: Task, trials: Sequence[Trial], argv: Sequence[str]) -> dict:
    """Every number of the search, for machines."""
    winner = best(trials)
    return {
        "command": ["python", "-m", "training.tune", *argv],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **{name: value for name, value in environment().items() if name != "argv"},
        "ranks": task.ranks,
        "steps": task.steps,
        "memory_cap_gib": task.memory_cap_gib,
        "global_batch_size": task.global_batch_size,
        "max_seq_len": task.cfg.training.max_seq_len,
        "trials": [_plain(task, trial) for trial in trials],
        "fastest": None if winner is None else _plain(task, winner),
        "override": None if winner is None else task.words(winner.setting, winner.micro_batch_size),
    }


def _plain(task: Task, trial: Trial) -> dict:
    out = trial.outcome
    ran = {}
    if out.verdict == "ok":
        ran = {"seconds_per_step": out.seconds, "spread_seconds": out.spread, "tokens_per_s": task.tokens_per_s(out)}
    return {
        "deepspeed_config": str(trial.setting.ds_config),
        "recomputed": trial.setting.recomputed,
        "micro_batch_size": trial.micro_batch_size,
        "accumulation_steps": task.accumulation_steps(trial.micro_batch_size),
        **ran,
        **asdict(out),
    }


# -- the entry --------------------------------------------------------------------------------------------


def tune(task: Task, stop: Stop, trials: list[Trial]) -> None:
    """Searches, printing and appending each trial as it ends, so that an interruption loses none."""
    print(
        f"{task.ranks} rank(s), {task.global_batch_size} windows of {task.cfg.training.max_seq_len} tokens per step; "
        f"each trial times {task.steps} step(s)\n\n{HEAD}",
        flush=True,
    )
    with tempfile.TemporaryDirectory(prefix="tune_") as scratch:

        def attempt(setting: Setting, micro_batch_size: int) -> Outcome:
            folder = Path(scratch) / str(len(trials))
            folder.mkdir()
            return try_setting(task, setting, micro_batch_size, folder, stop)

        for trial in search(task.ds_configs, task.kinds, task.sizes, attempt):
            trials.append(trial)
            print(table_row(task, trial), flush=True)


def main(argv: list[str]) -> int:
    args = parse(argv)
    try:
        task = prepare(args)
    except (ConfigError, DataError) as err:
        print(f"error: {err}", file=sys.stderr)
        return REFUSED_INPUT if isinstance(err, DataError) else REFUSED_CONFIG
    trials: list[Trial] = []
    try:
        with Stop() as stop:
            tune(task, stop, trials)
    except Interrupted as err:
        print(f"stopped by {err}; no rank is left running", file=sys.stderr)
        return 128 + err.number
    finally:
        if args.json is not None:
            args.json.write_text(json.dumps(all_trials(task, trials, argv), indent=2) + "\n", encoding="utf-8")
    if best(trials) is None:
        print(f"error: {_nothing_ran(trials)}", file=sys.stderr)
        return FAILED
    print(f"\n{recommendation(task, trials)}")
    if args.out is not None:
        args.out.write_text(override_yaml(task, trials, argv), encoding="utf-8")
        print(f"written to {args.out}")
    return FINISHED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
