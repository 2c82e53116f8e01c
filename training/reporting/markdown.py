"""report.md: the same as report.html without pictures, for a terminal, a pull request, a mail."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import groupby

import numpy as np

from training.doctor import Verdict
from training.reporting import tables
from training.reporting.analysis import Story
from training.reporting.curves import ATTENTION, BY_LAYER, LEARNING, SPEED, curve, described, in_percent
from training.reporting.format import NOTHING, count, moment, number, percent, sentence
from training.reporting.tables import Table

_MARKS = "▁▂▃▄▅▆▇█"
_WIDTH = 24
"""Characters of a curve."""


def render(stories: Sequence[Story]) -> str:
    """stories: of one run, or of several to be compared."""
    head = _head(stories[0]) if len(stories) == 1 else _comparison(stories)
    sections = (
        ("Learning", _learning),
        ("Time", _time),
        ("Speed", _speed),
        ("Attention", _attention),
        ("Launches", _launches),
        ("Checkpoints", _checkpoints),
        ("Samples", _samples),
        ("Configuration", _configuration),
    )
    parts = [head, *(f"## {name}\n\n{_each(stories, show)}" for name, show in sections)]
    return "\n\n".join(parts) + f"\n\nWritten {moment(stories[0].record.read_at)} by training.report.\n"


# -- pieces -------------------------------------------------------------------------------------------


def safe(text: str) -> str:
    """Text of a run as text: no markup of its own comes through, and it stays on its line."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    # an underscore inside a word is no markup
    return re.sub(r"([\\`*\[\]|~]|^#|(?<!\w)_|_(?!\w))", r"\\\1", text)


def _fenced(text: str) -> str:
    fence = "`" * max(3, 1 + max((len(list(run)) for mark, run in groupby(text) if mark == "`"), default=0))
    return f"{fence}text\n{text}\n{fence}"


def _table(table: Table) -> str:
    rule = ["---:" if i in table.numeric else "---" for i in range(len(table.columns))]
    lines = [[safe(name) for name in table.columns], rule, *([safe(cell) for cell in row] for row in table.rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _each(stories: Sequence[Story], show: Callable[[Story], str]) -> str:
    if len(stories) == 1:
        return show(stories[0])
    return "\n\n".join(f"### {safe(story.label)}\n\n{show(story)}" for story in stories)


def _paragraphs(*parts: str) -> str:
    return "\n\n".join(part for part in parts if part)


def _curve_table(story: Story, metrics: Sequence[str]) -> str:
    """A line for each metric: its run in characters, its ends, its extremes."""
    rows = []
    for metric in metrics:
        x, y = curve(story, metric)
        y = y[np.isfinite(y)]
        if not len(y):
            continue
        meant, tell = described(metric), percent if in_percent(metric) else number
        rows.append(
            (
                metric,
                "" if in_percent(metric) else meant.unit,
                _drawn(y),
                *(tell(float(v)) for v in (y[0], y[-1], y.min(), y.max())),
            )
        )
    if not rows:
        return "No row of metrics.jsonl has any of these yet."
    columns = ("metric", "unit", "over the run", "first", "last", "least", "greatest")
    return _table(Table(columns, tuple(rows), frozenset({3, 4, 5, 6})))


def _drawn(values: np.ndarray) -> str:
    means = [part.mean() for part in np.array_split(values, min(_WIDTH, len(values)))]
    low, span = min(means), (max(means) - min(means)) or 1.0
    return "".join(_MARKS[min(len(_MARKS) - 1, int((m - low) / span * len(_MARKS)))] for m in means)


# -- the head -----------------------------------------------------------------------------------------


def _head(story: Story) -> str:
    shown = [(f.name, f"{f.value} ({f.beside})" if f.beside else f.value) for f in tables.figures(story)]
    rows = tuple([("state", story.state_words), *shown, *tables.facts(story)])
    return _paragraphs(f"# {safe(story.label)}", _table(Table(("", ""), rows)), _bullets(tables.missing_words(story)))


def _comparison(stories: Sequence[Story]) -> str:
    differing = tables.difference_table(stories)
    return _paragraphs(
        f"# {len(stories)} runs side by side",
        _table(tables.number_table(stories)),
        _bullets([f"{s.label}: {note}" for s in stories for note in tables.missing_words(s)]),
        "## What they were told differently",
        _table(differing) if differing.rows else "Nothing.",
    )


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {safe(line)}" for line in lines)


# -- sections -----------------------------------------------------------------------------------------


def _learning(story: Story) -> str:
    spikes = tables.spike_table(story)
    metrics = ["loss", *(metric for plan in LEARNING for metric in plan.lines)]
    return _paragraphs(_curve_table(story, metrics), tables.spike_line(story), _table(spikes) if spikes.rows else "")


def _time(story: Story) -> str:
    if story.budget is None:
        return "The rows do not tell their seconds, so there is no budget of time."
    return _paragraphs(_table(tables.budget_table(story)), tables.budget_line(story))


def _speed(story: Story) -> str:
    gpus, d = tables.gpu_table(story), story.diagnosis
    return _paragraphs(
        _curve_table(story, [metric for plan in SPEED for metric in plan.lines]),
        safe(tables.predictions(story)),
        _table(gpus) if gpus.rows else "",
        "What bounds it, by training.doctor:",
        safe(d.missing or ""),
        *(_verdict(i, verdict) for i, verdict in enumerate(d.verdicts, 1)),
        _bullets(d.notes),
    )


def _verdict(place: int, verdict: Verdict) -> str:
    gain = f", {verdict.hedge} {number(verdict.gain, 3)}×" if verdict.gain > 1 else ""
    lines = [f"{place}. **{verdict.name}**{gain}: {safe(sentence(verdict.finding))}"]
    return "\n".join(lines + [f"   - {safe(knob)}" for knob in verdict.turn])


def _attention(story: Story) -> str:
    lines = _curve_table(story, [metric for plan in ATTENTION for metric in plan.lines])
    if not story.record.steps.layers:
        return _paragraphs(lines, "The rows have no values by layer.")
    step, layers = story.record.steps.layers[-1]
    named = {title: layers[name] for name, (title, _) in BY_LAYER.items() if name in layers}
    rows = [
        (str(i), *(percent(values[i]) if i < len(values) else NOTHING for values in named.values()))
        for i in range(max(map(len, named.values()), default=0))
    ]
    table = Table(("layer", *named), tuple(rows), frozenset(range(1, len(named) + 1)))
    return _paragraphs(lines, f"By layer, at step {count(step)}:", _table(table))


def _launches(story: Story) -> str:
    return _table(tables.launch_table(story)) if story.launches else "metrics.jsonl tells of no start and no resume."


def _checkpoints(story: Story) -> str:
    table = _table(tables.checkpoint_table(story)) if story.checkpoints else "There is no step_N folder yet."
    return _paragraphs(table, tables.unsaved_line(story), _bullets(story.checkpoint_notes))


def _samples(story: Story) -> str:
    newest = [(prompt, *told[0]) for prompt, told in story.samples.items()]
    told = [f"At step {count(step)}:\n\n{_fenced(prompt + text)}" for prompt, step, text in newest]
    return _paragraphs(*told) or "There is no continuation yet."


def _configuration(story: Story) -> str:
    changes = tables.change_table(story)
    return _paragraphs(
        "Changes between launches:",
        _table(changes) if changes.rows else "None is recorded.",
        "Set to something else than the default:" if story.record.config else "",
        _table(tables.setting_table(story)) if story.record.config else "",
    )
