"""The words and tables of report.html and report.md as plain text; the templates escape them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import NamedTuple

import numpy as np

from gsa.units import flatten
from training.config import RunConfig, to_plain
from training.record.reader import finite, mapping
from training.record.spike_score import WINDOW
from training.reporting.analysis import (
    LOSS_STEPS,
    PARTS,
    RECENT_STEPS,
    SPIKE_SIGMA,
    Analysis,
    Launch,
    Part,
    Spikes,
    as_json,
    recent,
)
from training.reporting.format import NOTHING, brief, compact, count, duration, moment, number, percent, sentence, size

_PART_COLOURS: dict[Part, int] = {
    "productive": 0,
    "replayed": 5,
    "lost": 1,
    "data": 4,
    "save": 2,
    "evaluation": 3,
    "other": 6,
}
_OLDER_SAMPLES = 10


@dataclass(frozen=True)
class Table:
    """Every row has a cell for each column. numeric: indices of the columns that hold numbers.

    swatches: for each row the index of a colour to show beside its name; empty for none.
    good: for each row whether the cell in column `good_column` reports something good; empty for none.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: frozenset[int] = frozenset()
    swatches: tuple[int, ...] = ()
    good: tuple[bool | None, ...] = ()
    good_column: int = -1

    def part(self, begin: int, end: int | None = None) -> Table:
        """The table with rows `begin` to `end` only."""
        rows = slice(begin, end)
        return replace(self, rows=self.rows[rows], swatches=self.swatches[rows], good=self.good[rows])


class Figure(NamedTuple):
    """One of the numbers at the top. beside: what puts it into proportion."""

    name: str
    value: str
    beside: str = ""


class Segment(NamedTuple):
    """A part of the bar of time. share: from 0 to 1. colour: index into the palette."""

    words: str
    share: float
    colour: int


# -- the head -----------------------------------------------------------------------------------------


def figures(run: Analysis) -> list[Figure]:
    """The numbers at the top of the report."""
    steps = run.record.steps
    of = "" if run.done is None else f"of {count(run.record.settings.max_steps)}, {percent(run.done)}"
    tokens, epoch = steps.last("tokens"), steps.last("epoch")
    found = [
        Figure("step", count(run.step), of),
        Figure("tokens", compact(tokens), "" if epoch is None else f"epoch {number(epoch, 3)}"),
        Figure("loss", number(run.loss), f"nats/token, last {min(LOSS_STEPS, len(steps))} steps"),
        Figure(
            "held-out",
            number(run.bpb),
            "bits/byte" if run.unigram_bpb is None else f"bits/byte, unigram {number(run.unigram_bpb, 3)}",
        ),
        Figure("tokens/s", compact(run.tokens_per_s), "" if run.mfu is None else f"MFU {percent(run.mfu)}"),
        Figure("time spent", duration(run.elapsed_s)),
    ]
    if run.state == "finished":
        return found
    live = run.left_s is not None and run.state == "running"
    end = f"until {moment(run.record.read_at + run.left_s)}" if live else "once it goes on"
    return [*found, Figure("time left", duration(run.left_s), end)]


def facts(run: Analysis) -> list[tuple[str, str]]:
    """Model, data, devices, versions: (name, text)."""
    env, launches, names = run.record.env, run.launches, ("torch", "deepspeed", "cuda", "python", "project")
    found = [
        ("Model", _model(run)),
        ("Data", _data(run)),
        ("Batch", _batch(run)),
        ("Devices", _devices(run)),
        ("Versions", ", ".join(f"{name} {env[name]}" for name in names if env.get(name)) or NOTHING),
        ("Began", moment(launches[0].began) if launches else NOTHING),
        ("Last line", moment(launches[-1].ended) if launches else NOTHING),
    ]
    if parent := run.record.run_json.get("parent"):
        found.append(("Forked from", brief(as_json(parent))))
    if run.record.run_json.get("tracking_id"):
        found.append(("Tracking id", brief(run.record.run_json["tracking_id"])))
    return found


def _model(run: Analysis) -> str:
    m, parameters = mapping(run.record.config.get("model")), run.record.parameters
    if not m:
        return "unknown: config.yaml does not say"
    words = [f"{compact(parameters['total'], 4)} parameters"] if parameters else []
    words.append(f"{m.get('n_layers')} layers of {m.get('d_model')}, {m.get('n_heads')} heads on {m.get('n_kv_heads')}")
    if m.get("sparse"):
        words.append(f"{m.get('k_min')} to {m.get('k_max')} keys per query, {m.get('k_base')} before adaptation")
    else:
        words.append("dense attention")
    gates = [name for name, key in (("value", "value_gate"), ("output", "output_gate")) if m.get(key)]
    return "; ".join([*words, f"gates: {', '.join(gates) or 'none'}"])


def _data(run: Analysis) -> str:
    data = mapping(run.record.config.get("data"))
    mixture = mapping(data.get("mixture"))
    if mixture:
        return ", ".join(f"{folder} ({brief(weight)})" for folder, weight in mixture.items())
    return brief(data.get("data_dir"))


def _batch(run: Analysis) -> str:
    s = run.record.settings
    if None in (s.world_size, s.micro_batch_size, s.accumulation_steps, s.max_seq_len):
        return NOTHING
    windows = s.world_size * s.micro_batch_size * s.accumulation_steps
    return (
        f"{count(windows * s.max_seq_len)} tokens: {count(windows)} windows of {count(s.max_seq_len)} = "
        f"{count(s.world_size)} {'rank' if s.world_size == 1 else 'ranks'} × "
        f"{count(s.micro_batch_size)} × {count(s.accumulation_steps)} accumulated"
    )


def _devices(run: Analysis) -> str:
    device, s = run.record.device, run.record.settings
    words = [f"{s.world_size} × {device.name}" if device.name and s.world_size else brief(device.name)]
    if device.memory_gib is not None:
        words.append(f"{number(device.memory_gib, 3)} GiB")
    if device.peak_tflops is not None:
        words.append(f"{number(device.peak_tflops, 3)} TFLOP/s ({brief(device.peak_source)})")
    if s.zero_stage is not None:
        words.append(f"ZeRO {s.zero_stage}")
    if s.backend:
        words.append(f"{s.backend} kernels")
    return ", ".join(words)


def head_table(run: Analysis) -> Table:
    """The state, the figures and the facts of the run in one table."""
    shown = [(f.name, f"{f.value} ({f.beside})" if f.beside else f.value) for f in figures(run)]
    return Table(("", ""), (("state", run.state_words), *shown, *facts(run)))


def folder_notes(runs: Sequence[Analysis]) -> list[str]:
    """What is missing or broken in the folders, in sentences; of several runs, each with the run's name."""
    notes = [(run.label, sentence(brief(note))) for run in runs for note in run.record.notes]
    return [f"{label}: {note}" if len(runs) > 1 else note for label, note in notes]


# -- sections -----------------------------------------------------------------------------------------


def spike_line(run: Analysis) -> str:
    """The share of spikes in a sentence; "" without steps."""
    spikes = run.spikes
    if not len(run.record.steps):
        return ""
    source = "computed here from the loss" if spikes.counted_here else "by the trainer's score"
    undone = f" This includes {count(spikes.undone)} that a rollback discarded." if spikes.undone else ""
    return (
        f"Spike score {percent(spikes.share)}: the loss of {count(len(spikes.at))} of {count(len(spikes.score))} steps "
        f"lies more than {number(SPIKE_SIGMA)} standard deviations above the mean of the {count(WINDOW)} before, "
        f"{source}.{undone}"
    )


def _spike_cell(spikes: Spikes) -> str:
    found = len(spikes.at) + spikes.undone
    return f"{percent(spikes.share)} ({count(found)})" if len(spikes.score) else "-"


def spike_table(run: Analysis) -> Table:
    """What was done about spikes, newest first."""
    rows = [
        (
            count(row["step"]),
            number(finite(row, "spike_loss")),
            number(finite(row, "score"), 3),
            brief(row.get("action")),
            _span(row.get("samples")),
        )
        for row in reversed(run.record.events_of("spike"))
    ]
    return Table(("Step", "Loss", "Score", "Action", "Samples"), tuple(rows), frozenset({0, 1, 2}))


def _span(pair: object) -> str:
    if isinstance(pair, list) and len(pair) == 2 and all(type(v) is int for v in pair):
        return f"{count(pair[0])} to {count(pair[1])}"
    return brief(pair)


def budget_table(run: Analysis) -> Table:
    """How the time of the run was spent; only for a run with a budget."""
    budget = run.budget
    rows = [
        (name, duration(budget.seconds[part]), percent(budget.share(part)), meaning)
        for part, (name, meaning) in PARTS.items()
    ]
    columns = ("Part", "Time", "Share", "What it is")
    return Table(columns, tuple(rows), frozenset({1, 2}), tuple(_PART_COLOURS[part] for part in PARTS))


def share_table(runs: Sequence[Analysis]) -> Table:
    """How the time was spent, a column for each run."""
    rows = [(name, *(_share(run, part) for run in runs)) for part, (name, _) in PARTS.items()]
    columns = ("Part", *(run.label for run in runs))
    return Table(columns, tuple(rows), _all_but_first(runs), tuple(_PART_COLOURS[part] for part in PARTS))


def _share(run: Analysis, part: Part) -> str:
    return percent(run.budget.share(part)) if run.budget else NOTHING


def _all_but_first(runs: Sequence[Analysis]) -> frozenset[int]:
    return frozenset(range(1, len(runs) + 1))


def time_bar(run: Analysis) -> list[Segment]:
    """The parts of the run's time that are not zero; empty where the time is unknown."""
    if run.budget is None or not run.budget.total:
        return []
    shares = {part: run.budget.share(part) for part, seconds in run.budget.seconds.items() if seconds > 0}
    return [Segment(f"{PARTS[p][0]} {percent(share)}", share, _PART_COLOURS[p]) for p, share in shares.items()]


def budget_line(run: Analysis) -> str:
    """The total of the budget in a sentence; only for a run with a budget."""
    words = f"{duration(run.budget.total)} on rank 0's clock."
    if len(run.launches) > 1:
        words += f" In addition, {duration(run.budget.between)} between launches, in which no step could run."
    return words


def predictions(run: Analysis) -> str:
    """Memory and seconds as training.plan counts them, beside what was measured; "" without such an event."""
    found = run.record.events_of("predicted")
    if not found:
        return ""
    row, words = found[-1], []
    if finite(row, "memory_gib") is not None and finite(row, "measured_gib") is not None:
        words.append(f"memory {number(row['memory_gib'], 3)} GiB by count, {number(row['measured_gib'], 3)} measured")
    if finite(row, "seconds") is not None and finite(row, "measured_seconds") is not None:
        words.append(f"{duration(row['seconds'])} a step by count, {duration(row['measured_seconds'])} measured")
    return "; ".join(words)


def gpu_table(run: Analysis) -> Table:
    """Medians over the last steps, a row for each GPU of rank 0's node; no row without GPUs."""
    steps, rows = run.record.steps, []
    for i in steps.gpus():
        busy, clock, max_clock, power, limit, memory, heat = (
            recent(steps, f"gpu/{i}/{name}")
            for name in (
                "utilisation",
                "clock_mhz",
                "max_clock_mhz",
                "power_w",
                "power_limit_w",
                "memory_gib",
                "temperature_c",
            )
        )
        throttled = steps.of(f"gpu/{i}/throttled")[-RECENT_STEPS:]
        held = float(np.nanmean(throttled)) if np.isfinite(throttled).any() else None
        rows.append(
            (
                str(i),
                percent(busy),
                f"{count(clock)} of {count(max_clock)} MHz",
                f"{count(power)} of {count(limit)} W",
                f"{number(memory, 3)} GiB",
                f"{count(heat)} °C",
                percent(held),
            )
        )
    columns = ("GPU", "Busy", "Clock", "Power", "Memory", "Temperature", "Throttled")
    return Table(columns, tuple(rows), frozenset(range(1, 7)))


def launch_table(run: Analysis) -> Table:
    """A row for each launch, the oldest first."""
    rows = []
    for i, launch in enumerate(run.launches):
        steps = NOTHING if launch.first is None else f"{count(launch.first)} to {count(launch.last)}"
        rows.append(
            (
                str(i),
                "start" if launch.kind == "start" else brief(launch.checkpoint),
                moment(launch.began),
                f"{count(launch.world_size)} × ZeRO {count(launch.zero_stage)}",
                steps,
                duration(launch.seconds),
                launch.ending,
                _replay(launch),
            )
        )
    columns = ("Launch", "From", "Began", "Ranks", "Steps", "Time", "Ended", "Replay")
    good = tuple(launch.good for launch in run.launches)
    return Table(columns, tuple(rows), frozenset({5}), good=good, good_column=6)


def _replay(launch: Launch) -> str:
    words = [f"{count(launch.lost)} lost"] if launch.lost else []
    if launch.replayed:
        words.append(f"{count(launch.replayed)} replayed")
    if launch.receipt is not None:
        words.append(receipt_words(launch.receipt))
    return "; ".join(words) or NOTHING


def receipt_words(receipt: dict) -> str:
    """The result of comparing replayed steps with the lost ones."""
    compared = count(finite(receipt, "compared"))
    changed = ", ".join(map(str, mapping(receipt.get("changed"))))
    why = f" (numbers may differ, because these changed: {brief(changed)})" if changed else ""
    if receipt.get("identical") is True:
        return f"receipt: identical in {compared} steps{why}"
    d = mapping(receipt.get("first_difference"))
    if not d:
        return f"receipt: {compared} steps compared, not identical{why}"
    return (
        f"receipt: {compared} steps compared, {brief(d.get('field'))} differs first, at step {brief(d.get('step'))}: "
        f"{brief(d.get('before'))} → {brief(d.get('now'))}{why}"
    )


def change_table(run: Analysis) -> Table:
    """All changes of the configuration between launches, newest first."""
    rows = [
        (str(i), str(key), brief(values[0]), brief(values[1]))
        for i, launch in reversed(list(enumerate(run.launches)))
        for key, values in (launch.config_diff or {}).items()
        if isinstance(values, list) and len(values) == 2
    ]
    return Table(("Launch", "Key", "Before", "Now"), tuple(rows))


def checkpoint_table(run: Analysis) -> Table:
    """A row for each checkpoint, newest first."""
    steps = run.record.steps
    at = {int(step): i for i, step in enumerate(steps.of("step"))}
    rows = []
    for c in reversed(run.checkpoints):
        i = at.get(c.step)
        tokens, loss = (None, None) if i is None else (float(steps.of("tokens")[i]), float(steps.of("loss")[i]))
        marks = ", ".join(c.marks) or NOTHING
        rows.append((c.tag, compact(tokens), number(loss), size(c.bytes), _created(c.created), c.state, marks))
    columns = ("Tag", "Tokens", "Loss", "Size", "Made", "State", "Marks")
    good = tuple(c.good for c in reversed(run.checkpoints))
    return Table(columns, tuple(rows), frozenset({1, 2, 3}), good=good, good_column=5)


def older_samples(texts: Sequence[tuple[float, str]]) -> Sequence[tuple[float, str]]:
    """At most _OLDER_SAMPLES of the continuations before the newest, which comes first, at equal distances."""
    return texts[1:][:: max(1, math.ceil((len(texts) - 1) / _OLDER_SAMPLES))]


def _created(iso: str | None) -> str:
    try:
        return moment(datetime.fromisoformat(iso).timestamp()) if iso else NOTHING
    except ValueError:  # sealed by another version
        return brief(iso)


def unsaved_line(run: Analysis) -> str:
    """What a crash now would cost, in a sentence; "" when it would cost nothing."""
    if not run.unsaved or run.state in ("finished", "stopped"):
        return ""
    spent = recent(run.record.steps, "seconds")
    cost = "" if spent is None else f", {duration(spent * run.unsaved)} of work"
    verb = "would cost" if run.state == "running" else "costs"
    return f"{count(run.unsaved)} steps are in no checkpoint: a crash {verb} them{cost}."


# -- configuration ------------------------------------------------------------------------------------


class ConfigEntry(NamedTuple):
    """A key of config.yaml. default: None where this version has no such key. changed: the value differs from it."""

    key: str
    value: str
    default: str | None
    changed: bool


def config_entries(run: Analysis) -> list[ConfigEntry]:
    """Every key of config.yaml beside its default."""
    defaults = flatten(to_plain(RunConfig()))
    return [
        ConfigEntry(
            key,
            brief(value),
            brief(defaults[key]) if key in defaults else None,
            key not in defaults or value != defaults[key],
        )
        for key, value in flatten(run.record.config).items()
    ]


def config_table(run: Analysis) -> Table:
    """The keys that differ from their defaults."""
    rows = [
        (entry.key, entry.value, entry.default or "no such key in this version")
        for entry in config_entries(run)
        if entry.changed
    ]
    return Table(("Key", "Value", "Default"), tuple(rows))


# -- several runs -------------------------------------------------------------------------------------


def number_table(runs: Sequence[Analysis]) -> Table:
    """Final numbers, a column for each run; a row where any run has a value."""
    rows: list[tuple[str, ...]] = []
    for name, cell in (
        ("state", lambda run: run.state),
        ("steps", lambda run: count(run.step)),
        ("of", lambda run: count(run.record.settings.max_steps)),
        ("tokens", lambda run: compact(run.record.steps.last("tokens"), 4)),
        ("parameters", lambda run: compact(run.record.parameters.get("total"), 4)),
        (f"loss, last {LOSS_STEPS} steps (nats/token)", lambda run: number(run.loss)),
        ("held-out, last (bits/byte)", lambda run: number(run.bpb)),
        ("held-out, best (bits/byte)", lambda run: number(run.best_bpb)),
        ("unigram (bits/byte)", lambda run: number(run.unigram_bpb)),
        ("indexer loss (nats/row)", lambda run: number(recent(run.record.steps, "indexer_loss"))),
        ("indexer coverage", lambda run: percent(recent(run.record.steps, "indexer/coverage"))),
        ("spikes", lambda run: _spike_cell(run.spikes)),
        ("tokens/s", lambda run: count(run.tokens_per_s)),
        ("MFU", lambda run: percent(run.mfu)),
        ("peak memory (GiB)", lambda run: number(run.memory_gib)),
        ("time spent", lambda run: duration(run.elapsed_s)),
        ("productive", lambda run: _share(run, "productive")),
    ):
        cells = [cell(run) for run in runs]
        if set(cells) != {NOTHING}:
            rows.append((name, *cells))
    return Table(("", *(run.label for run in runs)), tuple(rows), _all_but_first(runs))


def difference_table(runs: Sequence[Analysis]) -> Table:
    """Settings in which the runs differ, a column for each run."""
    settings = [_all_settings(run) for run in runs]
    keys = list(dict.fromkeys(key for one in settings for key in one))
    rows = [
        (key, *cells)
        for key in keys
        for cells in [[brief(one[key]) if key in one else NOTHING for one in settings]]
        if len(set(cells)) > 1
    ]
    return Table(("Key", *(run.label for run in runs)), tuple(rows))


def _all_settings(run: Analysis) -> dict[str, object]:
    record = run.record
    zero = {"zero_optimization": mapping(record.ds_config.get("zero_optimization"))}
    ran = {name: record.run_json[name] for name in ("world_size", "zero_stage", "backend") if name in record.run_json}
    return (
        flatten(record.config)
        | {f"ds_config: {key}": value for key, value in flatten(zero).items()}
        | {f"run: {name}": value for name, value in ran.items()}
    )
