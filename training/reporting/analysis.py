"""What follows from a run's folder: its launches, how its time was spent, its spikes, its checkpoints, its state."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from gsa.checkpoint import legacy, manifest
from gsa.checkpoint.manifest import CheckpointError
from training.config.lease import Owner, is_dead, read_lease
from training.record.reader import Record, Steps, finite, mapping
from training.record.spike_score import KNOWN, WINDOW
from training.reporting.diagnosis import GPU_AT_WORK, Diagnosis, diagnose_record
from training.reporting.format import duration

RECENT_STEPS = 200
"""Pace, throughput and use of the devices are medians or means over this many of the last steps."""
LOSS_STEPS = 100
"""The loss of a run is the mean over this many of its last steps."""
SPIKE_SIGMA = 7.0
"""A spike is a loss more than this many standard deviations above the mean before it, whatever training.spike_sigmas
acted on: so runs can be compared."""
SILENT_S, SILENT_STEPS = 600.0, 30
"""A run whose run.json has status "running" counts as silent after this many seconds without a line, or after the time
of this many of its steps if that is longer."""

State = Literal["running", "finished", "stopped", "failed", "silent", "unknown"]


@dataclass(frozen=True)
class Launch:
    """One launch of the run. Times are unix s, steps are step numbers; None where no row has them.

    kind: "start", or "resume" from `checkpoint` after step `at`. began, ended: its first and last line.
    first, last: the steps it trained. lost: how many of them were discarded later. replayed: how many had been
    trained before. ending: why it ended; good: False if it did not end in order, None while it runs.
    config_diff: key -> [old, new], None when nothing changed. receipt: the event that compares the replay, if any.
    """

    kind: str
    at: float | None
    checkpoint: str | None
    began: float | None
    ended: float | None
    first: float | None
    last: float | None
    lost: int
    replayed: int
    world_size: float | None
    zero_stage: float | None
    ending: str
    good: bool | None
    config_diff: dict | None
    receipt: dict | None

    @property
    def seconds(self) -> float | None:
        return None if self.began is None or self.ended is None else max(0.0, self.ended - self.began)


Part = Literal["productive", "replayed", "lost", "data", "save", "evaluation", "other"]
PARTS: dict[Part, tuple[str, str]] = {
    "productive": ("productive", "forward, backward and update of steps that were trained for the first time"),
    "replayed": ("replayed", "the same for steps that had been trained before and lost"),
    "lost": ("lost to crashes", "steps after the checkpoint that a resume or a rollback went back to"),
    "data": ("data wait", "waiting for the loader"),
    "save": ("save", "training stood still for a checkpoint"),
    "evaluation": ("evaluation", "training stood still for an evaluation"),
    "other": ("waiting and other", "what no row accounts for: the start of a launch, bookkeeping, its last moments"),
}


@dataclass(frozen=True)
class Budget:
    """seconds: of rank 0, by part; each second counts once. between: s without a process, between launches."""

    seconds: dict[Part, float]
    between: float

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    def share(self, part: Part) -> float | None:
        """The part's share of the total; None where the total is zero."""
        return self.seconds[part] / self.total if self.total else None


@dataclass(frozen=True)
class Spikes:
    """Loss spikes.

    score: (n,) standard deviations above the rolling mean, 0 where unknown. share: of steps above SPIKE_SIGMA, or
    without a finite loss. at: indices of those steps. counted_here: the rows have no spike_score. undone: steps that
    a rollback discarded; they count in the share, but their rows are no longer in metrics.jsonl.
    """

    score: np.ndarray
    share: float
    at: np.ndarray
    counted_here: bool
    undone: int = 0


@dataclass(frozen=True)
class Checkpoint:
    """good: None where nobody can know: it is in the legacy format, or it may be being written. bytes: None where no
    manifest has them."""

    tag: str
    step: int
    bytes: int | None
    created: str | None
    state: str
    good: bool | None
    marks: tuple[str, ...]


@dataclass(frozen=True)
class Analysis:
    """One run, analysed. Numbers are None where the run's files do not have them.

    loss: mean of the last LOSS_STEPS steps. left_s: seconds to max_steps at the recent pace. unsaved: steps after the
    newest good checkpoint. samples: prompt -> (step, continuation), the newest first.
    """

    record: Record
    state: State
    state_words: str
    step: float | None
    loss: float | None
    bpb: float | None
    best_bpb: float | None
    unigram_bpb: float | None
    tokens_per_s: float | None
    mfu: float | None
    memory_gib: float | None
    elapsed_s: float | None
    left_s: float | None
    unsaved: int | None
    launches: tuple[Launch, ...]
    budget: Budget | None
    spikes: Spikes
    checkpoints: tuple[Checkpoint, ...]
    checkpoint_notes: tuple[str, ...]
    samples: dict[str, list[tuple[float, str]]]
    diagnosis: Diagnosis

    @property
    def label(self) -> str:
        return self.record.label

    @property
    def done(self) -> float | None:
        """The share of max_steps that is trained, at most 1."""
        whole = self.record.settings.max_steps
        return min(1.0, self.step / whole) if self.step is not None and whole else None


def analyse(record: Record, *, verify: bool) -> Analysis:
    """verify: read every byte of every checkpoint instead of names and sizes."""
    steps = record.steps
    state, words = _state(record)
    step = steps.last("step")
    launches = _launches(record, state, words)
    checkpoints, notes = _checkpoints(record, verify=verify, live=state == "running")
    whole = [c.step for c in checkpoints if c.good]
    evals = [row for row in record.events_of("eval") if finite(row, "eval_bpb") is not None]
    scores = [row["eval_bpb"] for row in evals]
    unigrams = [v for row in evals if (v := finite(row, "unigram_bpb")) is not None]
    elapsed = [launch.seconds for launch in launches if launch.seconds is not None]
    return Analysis(
        record,
        state,
        words,
        step,
        loss=_over_last(steps.of("loss"), LOSS_STEPS, np.mean),
        bpb=scores[-1] if scores else None,
        best_bpb=min(scores, default=None),
        unigram_bpb=unigrams[-1] if unigrams else None,
        tokens_per_s=recent(steps, "tokens_per_s"),
        mfu=recent(steps, "mfu"),
        memory_gib=_over_last(steps.of("memory_gib"), len(steps), np.max),
        elapsed_s=sum(elapsed) if elapsed else None,
        left_s=_left(steps, record.settings.max_steps),
        unsaved=None if step is None else max(0, int(step) - max((s for s in whole if s <= step), default=0)),
        launches=launches,
        budget=_budget(record, launches),
        spikes=find_spikes(steps, sum(row.get("action") == "rollback" for row in record.events_of("spike"))),
        checkpoints=checkpoints,
        checkpoint_notes=notes,
        samples=_samples(record),
        diagnosis=diagnose_record(record),
    )


def utilisation(steps: Steps) -> np.ndarray:
    """(n,) mean share of time in which the GPUs of rank 0's node ran kernels, NaN where unknown; without idle GPUs."""
    found = [column for i in steps.gpus() if np.isfinite(column := steps.of(f"gpu/{i}/utilisation")).any()]
    found = [column for column in found if np.nanmedian(column) > GPU_AT_WORK]
    return np.mean(found, axis=0) if found else np.full(len(steps), np.nan)


def recent(steps: Steps, name: str) -> float | None:
    """Median over the last RECENT_STEPS steps."""
    return _over_last(steps.of(name), RECENT_STEPS, np.median)


def find_spikes(steps: Steps, undone: int = 0) -> Spikes:
    """By the rows' spike_score; where they have none, by a score that is computed here from the loss."""
    recorded = steps.of("spike_score")
    here = not np.isfinite(recorded).any()
    score = _spike_scores(steps.of("loss")) if here else np.nan_to_num(recorded)
    at = np.flatnonzero((score > SPIKE_SIGMA) | ~np.isfinite(steps.of("loss")))
    total = len(score) + undone
    return Spikes(score, (len(at) + undone) / total if total else 0.0, at, here, undone)


def _spike_scores(loss: np.ndarray) -> np.ndarray:
    """(n,) each loss against the mean and standard deviation of those before it, as in training.record.spike_score."""
    known = np.isfinite(loss)
    if not known.any():
        return np.zeros(len(loss))
    centred = np.where(known, loss - np.median(loss[known]), 0.0)  # sums of squares near zero do not lose digits
    end = np.arange(len(loss))
    begin = np.maximum(0, end - WINDOW)
    n, total, squares = (
        sums[end] - sums[begin]
        for part in (known.astype(float), centred, centred**2)
        for sums in [np.concatenate([[0.0], np.cumsum(part)])]
    )
    enough = known & (n >= KNOWN)
    mean = total / np.maximum(n, 1)
    spread = np.sqrt(np.maximum(0.0, squares / np.maximum(n, 1) - mean**2))
    usable = enough & (spread > 0)
    return np.where(usable, (centred - mean) / np.where(usable, spread, 1.0), 0.0)


def _over_last(values: np.ndarray, steps: int, combine: np.ufunc) -> float | None:
    values = values[-steps:] if steps else values
    known = values[np.isfinite(values)]
    return float(combine(known)) if len(known) else None


def _state(record: Record) -> tuple[State, str]:
    """What the run is doing: its state, and the same in words."""
    run, stops = record.run_json, record.events_of("stop")
    status, reason = run.get("status"), run.get("reason")
    why = f": {reason}" if reason and reason != status else ""
    if status in ("finished", "stopped", "failed"):
        return status, f"{status}{why}"
    if status != "running":
        return ("unknown", f"its last stop was: {stops[-1].get('reason')}") if stops else ("unknown", "state unknown")
    owner = read_lease(record.folder)
    if isinstance(owner, Owner) and is_dead(owner):
        return "silent", f"died: {owner} is gone, and run.json still says running"
    signs = [v for v in (record.last_written, finite(run, "updated")) if v is not None]
    if not signs:
        return "unknown", "running, by run.json; no line says when"
    silence = max(0.0, record.read_at - max(signs))
    pace = recent(record.steps, "seconds") or 0.0
    if silence <= max(SILENT_S, SILENT_STEPS * pace):
        return "running", f"running, last sign of life {duration(silence)} ago"
    return "silent", f"silent for {duration(silence)}: killed, crashed or hung"


def _left(steps: Steps, max_steps: int | None) -> float | None:
    """Seconds to the end at the recent pace, with as much time for evaluations and saves per step as so far."""
    pace, step = recent(steps, "seconds"), steps.last("step")
    if max_steps is None or pace is None or step is None:
        return None
    stalls = sum(np.nansum(steps.of(f"seconds_{part}")) for part in ("save", "eval"))
    return max(0.0, max_steps - step) * (pace + float(stalls) / len(steps))


def _samples(record: Record) -> dict[str, list[tuple[float, str]]]:
    found: dict[str, list[tuple[float, str]]] = {}
    for row in record.events_of("sample"):
        prompt, text = row.get("prompt"), row.get("text")
        if isinstance(prompt, str) and isinstance(text, str):
            found.setdefault(prompt, []).insert(0, (row["step"], text))
    return found


# -- launches and time --------------------------------------------------------------------------------


def _launches(record: Record, state: State, words: str) -> tuple[Launch, ...]:
    """Every launch there ever was, oldest first, those of discarded branches included."""
    events = [*record.discarded_events, *record.events]
    opened = [row for row in events if row["event"] in ("start", "resume")]
    opened.sort(key=lambda row: finite(row, "time") or 0.0)
    found = []
    for row, following in zip(opened, [*opened, None][1:], strict=True):
        began, until = finite(row, "time"), math.inf if following is None else finite(following, "time")
        if began is None or until is None:  # without times, nobody knows which rows belong to the launch
            began, until = None, -math.inf
        within = [e for e in events if began is not None and began <= (finite(e, "time") or -math.inf) < until]
        ending = _ending(within, record.run_json, state, words, last=following is None)
        found.append(_launch(record, row, within, began, until, ending))
    return tuple(found)


def _launch(
    record: Record,
    opening: dict,
    within: Sequence[dict],
    began: float | None,
    until: float,
    ending: tuple[str, bool | None],
) -> Launch:
    """within: events from `began` until the next launch."""
    kept, lost = (_between(steps, began, until) for steps in (record.steps, record.discarded_steps))
    numbers = [step for step, _ in (*kept, *lost)]
    times = [*(at for _, at in (*kept, *lost)), *(e["time"] for e in within)]
    before = set(record.discarded_steps.of("step"))
    return Launch(
        opening["event"],
        finite(opening, "step"),
        opening.get("checkpoint"),
        began,
        max(times, default=None),
        min(numbers, default=None),
        max(numbers, default=None),
        lost=len(lost),
        replayed=sum(step in before for step, _ in kept),
        world_size=finite(opening, "world_size"),
        zero_stage=finite(opening, "zero_stage"),
        ending=ending[0],
        good=ending[1],
        config_diff=mapping(opening.get("config_diff")) or None,
        receipt=next((e for e in within if e["event"] == "receipt"), None),
    )


def _between(steps: Steps, began: float | None, until: float) -> list[tuple[float, float]]:
    """(step, time) of the rows written in that time; none where `began` is unknown."""
    if began is None:
        return []
    times = steps.of("time")
    inside = (times >= began) & (times < until)
    return list(zip(steps.of("step")[inside].tolist(), times[inside].tolist(), strict=True))


def _ending(within: Sequence[dict], run: dict, state: State, words: str, *, last: bool) -> tuple[str, bool | None]:
    """Why a launch ended, and whether in order; None while it runs."""
    for row in reversed(within):
        if row["event"] in ("stop", "error"):
            return str(row.get("reason") or row["event"]), row["event"] == "stop"
    if last and state == "running":
        return "running", None
    if last and state in ("failed", "silent"):
        return (str(run.get("reason")) if state == "failed" and run.get("reason") else words), False
    return "killed or crashed (no stop event)", False


def _budget(record: Record, launches: Sequence[Launch]) -> Budget | None:
    """None where no row has its seconds."""
    steps, discarded = record.steps, record.discarded_steps
    if not np.isfinite(steps.of("seconds")).any() and not np.isfinite(discarded.of("seconds")).any():
        return None
    data, other = (np.nan_to_num(steps.of(f"seconds_{part}")) for part in ("data", "other"))
    computing = np.maximum(0.0, np.nan_to_num(steps.of("seconds")) - data - other)
    again = np.isin(steps.of("step"), discarded.of("step"))
    seconds: dict[Part, float] = {
        "productive": computing[~again].sum(),
        "replayed": computing[again].sum(),
        "lost": sum(np.nansum(discarded.of(f"seconds{part}")) for part in ("", "_save", "_eval")),
        "data": data.sum(),
        "save": _stood_still(record, launches, "save"),
        "evaluation": _stood_still(record, launches, "eval"),
        "other": other.sum(),
    }
    seconds = {part: float(spent) for part, spent in seconds.items()}
    timed = [launch for launch in launches if launch.seconds is not None]
    wall = sum(launch.seconds for launch in timed)
    seconds["other"] += max(0.0, wall - sum(seconds.values()))
    gaps = [after.began - before.ended for before, after in zip(timed, timed[1:], strict=False)]
    return Budget(seconds, sum(max(0.0, gap) for gap in gaps))


def _stood_still(record: Record, launches: Sequence[Launch], event: Literal["save", "eval"]) -> float:
    """Seconds of all saves or evaluations. No row has those after the last step of a launch: their events count."""
    before, rest = record.stalls(event)
    ends = {launch.last for launch in launches}
    return float(before.sum()) + sum(seconds for step, seconds in rest if step in ends)


# -- checkpoints --------------------------------------------------------------------------------------


def _checkpoints(record: Record, *, verify: bool, live: bool) -> tuple[tuple[Checkpoint, ...], tuple[str, ...]]:
    """The checkpoints of the folder, and notes on them for the reader."""
    notes, latest = [], None
    try:
        latest = manifest.latest_tag(record.folder)
    except (CheckpointError, OSError) as err:
        notes.append(str(err))
    try:
        found = manifest.list_checkpoints(record.folder)
        aside = [path.name for path in sorted((record.folder / "segments").glob("step_*"))]
    except OSError as err:
        return (), (*notes, f"checkpoints cannot be listed: {err.strerror}")
    if latest is not None and latest not in {f.tag for f in found}:
        notes.append(f"`latest` names {latest}, which is not there")
    if aside:
        notes.append(f"checkpoints of discarded branches, in segments/: {', '.join(aside)}")
    return tuple(_checkpoint(one, latest, verify=verify, live=live) for one in found), tuple(notes)


def _checkpoint(found: manifest.Found, latest: str | None, *, verify: bool, live: bool) -> Checkpoint:
    marks = [("latest", found.tag == latest), ("pinned", (found.path / manifest.PIN).exists())]
    named = tuple(word for word, so in marks if so)
    if not found.complete:
        if legacy.is_legacy(found.path):
            return Checkpoint(found.tag, found.step, None, None, "legacy: training.verify checks it", None, named)
        if not manifest.is_torn(found.path):
            return Checkpoint(found.tag, found.step, None, None, f"damaged: {found.reason}", False, named)
        torn = "unsealed: being written, or its save was interrupted" if live else "torn: its save was interrupted"
        return Checkpoint(found.tag, found.step, None, None, torn, None if live else False, named)
    try:
        sealed = manifest.read(found.path)
    except CheckpointError:  # a live run may have removed it since it was listed
        gone = "removed meanwhile" if not found.path.exists() else "its manifest cannot be read"
        return Checkpoint(found.tag, found.step, None, None, gone, None if live else False, named)
    size, state, good = sum(f.bytes for f in sealed.files.values()), "complete: names and sizes agree", True
    if verify:
        try:
            manifest.verify(found.path)
            state = "verified: every byte as it was written"
        except CheckpointError as err:
            state, good = f"damaged: {'; '.join(line.strip() for line in str(err).splitlines()[1:-1])}", False
    return Checkpoint(found.tag, found.step, size, sealed.created, state, good, named)


def as_json(value: object) -> str:
    """A value as an indented JSON text."""
    return json.dumps(value, indent=2, default=str)
