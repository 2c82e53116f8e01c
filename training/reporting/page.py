"""report.html: one page of one run or of several, complete in itself. Every word of the run is escaped here."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape

from training.reporting import tables
from training.reporting.analysis import PARTS, Story
from training.reporting.curves import ATTENTION, LEARNING, SPEED, Plan, axis_of, draw, heat_maps, loss_charts
from training.reporting.format import count, moment, number, percent, plural, sentence
from training.reporting.style import CSS, PALETTE, SCRIPT
from training.reporting.tables import Setting, Table

_PART_COLOURS = {"productive": 0, "replayed": 5, "lost": 1, "data": 4, "save": 2, "evaluation": 3, "other": 6}
_OLDER_SAMPLES = 10
_NEWEST_LAUNCHES = 20
"""Shown; a run that was restarted hundreds of times folds the others away."""
_MOST_ROWS = 200
"""Of a folded list; metrics.jsonl has the rest."""
_SHORT = 22
"""Characters of a cell that stays on one line."""


def render(stories: Sequence[Story]) -> str:
    """The page. stories: of one run, or of several to be compared."""
    sections = [
        ("learning", "Learning", _learning),
        ("time", "Time", _time),
        ("speed", "Speed", _speed),
        ("attention", "Attention", _attention),
        ("launches", "Launches", _launches),
        ("checkpoints", "Checkpoints", _checkpoints),
        ("samples", "Samples", _samples),
        ("configuration", "Configuration", _configuration),
    ]
    title = stories[0].label if len(stories) == 1 else " · ".join(story.label for story in stories)
    head = _head(stories[0]) if len(stories) == 1 else _comparison(stories)
    links = "".join(f'<li><a href="#{name}">{heading}</a></li>' for name, heading, _ in sections)
    body = "".join(
        f'<section id="{name}" aria-labelledby="h-{name}"><h2 id="h-{name}">{heading}</h2>{show(stories)}</section>\n'
        for name, heading, show in sections
    )
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    # no network, and no script but ours, whatever a run's text says
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f'<title>{escape(title)}</title>\n<link rel=icon href="data:,">\n<style>{CSS}</style>\n</head>\n<body>\n'
        f"<div class=page>\n<header>{head}\n<nav aria-label=Sections><ul>{links}</ul></nav></header>\n<main>\n{body}"
        f"</main>\n<footer>Written {moment(stories[0].record.read_at)} by training.report. Names, units and meanings "
        f"of the fields: training/record/metrics_log.py.</footer>\n</div>\n"
        f"<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


# -- pieces -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cells:
    """How some cells of a table look. swatches: a colour for each row. judged: a class for each row's cell in
    `column`."""

    swatches: Sequence[int] = ()
    judged: Sequence[str] = ()
    column: int = -1


_PLAIN = Cells()


def _table(table: Table, *, scroll: bool = False, cells: Cells = _PLAIN, kind: str = "") -> str:
    """scroll: a wide one moves inside its own box; others are stacked on a phone. The first column names the row.
    kind: a class of its own."""
    heads = "".join(
        f'<th scope="col"{_class("n" if i in table.numeric else "")}>{escape(name)}</th>'
        for i, name in enumerate(table.columns)
    )
    body = "".join(f"<tr>{_row(table, r, cells)}</tr>" for r in range(len(table.rows)))
    named = _class(" ".join(filter(None, ["" if scroll else "stack", kind])))
    made = f"<table{named}><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class=scroll tabindex=0 role="region" aria-label="Table">{made}</div>' if scroll else made


def _row(table: Table, r: int, cells: Cells) -> str:
    first, *others = table.rows[r]
    swatch = f'<i class="swatch c{cells.swatches[r]}"></i>' if cells.swatches else ""
    bare = f' class=bare data-name="{escape(table.columns[0])}"' if first.isdecimal() else ""
    shown = f'<th scope="row"{bare}>{swatch}{escape(first)}</th>'
    for i, cell in enumerate(others, 1):
        kinds = ["n" if i in table.numeric else "short" if len(cell) <= _SHORT else ""]
        kind = " ".join(filter(None, [*kinds, cells.judged[r] if i == cells.column else ""]))
        shown += f'<td data-name="{escape(table.columns[i])}"{_class(kind)}>{escape(cell)}</td>'
    return shown


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""


def _missing(text: str) -> str:
    return f"<p class=missing>{escape(text)}</p>"


def _say(text: str) -> str:
    return f"<p class=say>{escape(text)}</p>" if text else ""


def _details(summary: str, content: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def _each(stories: Sequence[Story], show: Callable[[Story], str], *, folded: bool = False) -> str:
    """Of one run what it shows; of several the same, each under its name, or folded behind it."""
    if len(stories) == 1:
        return show(stories[0])
    made = ""
    for i, story in enumerate(stories):
        name = f'<i class="swatch c{i % PALETTE}"></i>{escape(story.label)}'
        if folded:
            made += f"<details><summary>{name}</summary>{show(story)}</details>"
        else:
            made += f"<div class=run><h3>{name}</h3>{show(story)}</div>"
    return made


def _charts(drawn: Sequence[str], plans: Sequence[Plan], made: Sequence[str]) -> str:
    absent = [plan.title for plan, chart in zip(plans, made, strict=True) if not chart]
    said = _missing(f"Not in the rows of metrics.jsonl: {', '.join(absent).lower()}.") if absent else ""
    return f"<div class=charts>{''.join(drawn)}{''.join(made)}</div>{said}"


# -- the head -----------------------------------------------------------------------------------------


def _head(story: Story) -> str:
    shown = "".join(
        f"<div><dt>{escape(f.name)}</dt><dd>{escape(f.value)}<small>{escape(f.beside)}</small></dd></div>"
        for f in tables.figures(story)
    )
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in tables.facts(story))
    bar = ""
    if story.step is not None and story.max_steps:
        share = min(1.0, story.step / story.max_steps)
        bar = (
            f'<div class=progress role="progressbar" aria-label="steps done" aria-valuemin="0" aria-valuemax="100" '
            f'aria-valuenow="{100 * share:.0f}"><i style="width:{100 * share:.2f}%"></i></div>'
        )
    notes = "".join(_missing(note) for note in tables.missing_words(story))
    return (
        f'<p class="state {story.state}">{escape(story.state_words)}</p><h1>{escape(story.label)}</h1>'
        f"<dl class=figures>{shown}</dl>{bar}<dl class=facts>{facts}</dl>{notes}"
    )


def _comparison(stories: Sequence[Story]) -> str:
    differing = tables.difference_table(stories)
    notes = "".join(_missing(f"{s.label}: {note}") for s in stories for note in tables.missing_words(s))
    untold = [s.label for s in stories if not s.record.config]
    none = f"Not known: no config.yaml of {', '.join(untold)}." if untold else "None: these runs were told the same."
    shown = _table(differing, scroll=True) if differing.rows else _missing(none)
    return (
        f"<h1>{len(stories)} runs side by side</h1><p class=lead>{escape(', '.join(s.label for s in stories))}</p>"
        f"{_table(tables.number_table(stories), scroll=True)}{notes}<h4>What they were told differently</h4>{shown}"
    )


# -- sections -----------------------------------------------------------------------------------------


def _learning(stories: Sequence[Story]) -> str:
    by = axis_of(stories)
    if not any(len(s.record.steps) for s in stories):
        return _missing("No optimizer step is recorded yet.")
    made = [draw(plan, stories, by) for plan in LEARNING]
    if len(stories) > 1:
        note = "" if by == "step" else "Over tokens: steps of these runs do not have as many of them."
        return _say(note) + _charts([loss_charts(stories, by)], LEARNING, made)
    spikes = tables.spike_table(stories[0])
    many = f", the newest {_MOST_ROWS}" if len(spikes.rows) > _MOST_ROWS else ""
    told = f"What was done about {plural(len(spikes.rows), 'spike')}{many}"
    listed = _details(told, _table(replace(spikes, rows=spikes.rows[:_MOST_ROWS]))) if spikes.rows else ""
    return _say(tables.spike_line(stories[0])) + _charts([loss_charts(stories, by)], LEARNING, made) + listed


def _time(stories: Sequence[Story]) -> str:
    if len(stories) == 1:
        return _time_of(stories[0])
    bars = "".join(f"<div class=bar-row><h3>{escape(s.label)}</h3>{_bar(s)}</div>" for s in stories)
    return bars + _table(tables.share_table(stories), scroll=True, cells=Cells(list(_PART_COLOURS.values())))


def _time_of(story: Story) -> str:
    if story.budget is None:
        return _missing("The rows do not tell their seconds, so there is no budget of time.")
    table = _table(tables.budget_table(story), cells=Cells(list(_PART_COLOURS.values())), kind="budget")
    return f"{_say(tables.budget_line(story))}{_bar(story)}{table}"


def _bar(story: Story) -> str:
    if story.budget is None or not story.budget.total:
        return _missing("The rows do not tell their seconds.")
    shares = {part: spent / story.budget.total for part, spent in story.budget.seconds.items() if spent > 0}
    spoken = ", ".join(f"{PARTS[part][0]} {percent(share)}" for part, share in shares.items())
    pieces = "".join(
        f'<i class="c{_PART_COLOURS[part]}" style="flex:{share:.5f} 0 0" title="{PARTS[part][0]} {percent(share)}"></i>'
        for part, share in shares.items()
    )
    return f'<div class=bar role="img" aria-label="{escape(spoken)}">{pieces}</div>'


def _speed(stories: Sequence[Story]) -> str:
    by = axis_of(stories)
    made = [draw(plan, stories, by) for plan in SPEED]
    if not any(len(s.record.steps) for s in stories):
        return _missing("No optimizer step is recorded yet.")
    return _charts([], SPEED, made) + _each(stories, lambda story: _devices(story) + _doctor(story), folded=True)


def _devices(story: Story) -> str:
    table, counted = tables.gpu_table(story), tables.predictions(story)
    shown = f"<h4>Counted and measured</h4><p class=small>{escape(counted)}</p>" if counted else ""
    if table.rows:
        shown += (
            f"<h4>Devices of rank 0's node, over the last steps</h4>{_table(table, scroll=True)}"
            f"<p class='soft small'>Held down: samples in which power or heat kept the clock low.</p>"
        )
    return shown


def _doctor(story: Story) -> str:
    d = story.diagnosis
    if d.missing:
        return f"<h4>What bounds it</h4>{_missing(d.missing)}"
    items = []
    for v in d.verdicts:
        gain = f"<span class=gain>{v.hedge} {number(v.gain, 3)}×</span>" if v.gain > 1 else ""
        turn = "".join(f"<p>{escape(knob)}</p>" for knob in v.turn)
        items.append(
            f"<li><h3>{escape(v.name.capitalize())} {gain}</h3><p>{escape(sentence(v.finding))}</p>"
            f"{f'<div class=turn>{turn}</div>' if turn else ''}<p class='soft small'>{escape(v.arithmetic)}</p></li>"
        )
    notes = "".join(_missing(note) for note in d.notes)
    return f"<h4>What bounds it, by training.doctor</h4><ol class=verdicts>{''.join(items)}</ol>{notes}"


def _attention(stories: Sequence[Story]) -> str:
    by = axis_of(stories)
    maps = heat_maps(stories)
    made = [draw(plan, stories, by) for plan in ATTENTION]
    shown = _charts([], ATTENTION, made)
    if not maps:
        return shown + _missing(
            "The rows have no values by layer (`layers`, every training.probe_interval steps): there is no heat map."
        )
    if len(stories) == 1:
        grids = f"<div class=charts>{''.join(maps.values())}</div>"
    else:
        grids = "".join(f'<div class="charts maps">{row}</div>' for row in maps.values())
    return f"{shown}<h4>By layer, the first at the top</h4>{grids}"


def _launches(stories: Sequence[Story]) -> str:
    def show(story: Story) -> str:
        if not story.launches:
            return _missing("metrics.jsonl tells of no start and no resume.")
        kinds = ["" if one.good is None else "good" if one.good else "bad" for one in story.launches]
        table, newest = tables.launch_table(story), len(kinds) - _NEWEST_LAUNCHES

        def part(rows: slice) -> str:
            return _table(replace(table, rows=table.rows[rows]), cells=Cells(judged=kinds[rows], column=6))

        if newest <= 0:
            return part(slice(None))
        before = _details(f"{plural(newest, 'launch', 'launches')} before", part(slice(newest)))
        return part(slice(newest, None)) + before

    return _each(stories, show)


def _checkpoints(stories: Sequence[Story]) -> str:
    def show(story: Story) -> str:
        notes = "".join(_missing(note) for note in story.checkpoint_notes)
        if not story.checkpoints:
            return _missing("There is no step_N folder yet.") + notes
        kinds = ["" if c.good is None else "good" if c.good else "bad" for c in reversed(story.checkpoints)]
        table = _table(tables.checkpoint_table(story), cells=Cells(judged=kinds, column=5))
        return _say(tables.unsaved_line(story)) + table + notes

    return _each(stories, show)


def _samples(stories: Sequence[Story]) -> str:
    def show(story: Story) -> str:
        if not story.samples:
            return _missing("There is no continuation yet (training.sample_interval says how often one is made).")
        return "".join(_sample(prompt, told) for prompt, told in story.samples.items())

    return _each(stories, show)


def _sample(prompt: str, told: Sequence[tuple[float, str]]) -> str:
    texts = [
        f'<p class="soft small">step {count(step)}</p><p class=text><span class=prompt>{escape(prompt)}</span>'
        f"{escape(text)}</p>"
        for step, text in told
    ]
    older = texts[1:][:: max(1, -(-len(texts[1:]) // _OLDER_SAMPLES))]
    shown = "".join(f"<div class=sample>{text}</div>" for text in older)
    before = _details(f"{len(older)} of {len(texts) - 1} before", shown) if older else ""
    return f"<div class=sample>{texts[0]}{before}</div>"


def _configuration(stories: Sequence[Story]) -> str:
    def show(story: Story) -> str:
        record, changes = story.record, tables.change_table(story)
        none = "None is recorded." if len(story.launches) > 1 else "There was no second launch."
        shown = f"<h4>Changed between launches</h4>{_table(changes) if changes.rows else _missing(none)}"
        if record.config:
            shown += f"<h4>Set to something else than the default (in grey)</h4>{_settings(story, changed_only=True)}"
            shown += _details("All of config.yaml", _settings(story, changed_only=False))
        for name, content in (("ds_config.json", record.ds_config), ("env.json", record.env)):
            if content:
                shown += _details(name, f"<pre>{escape(tables.as_json(content))}</pre>")
        return shown

    return _each(stories, show, folded=True)


def _settings(story: Story, *, changed_only: bool) -> str:
    items = [
        f"<div{_class('' if one.changed else 'same')}><dt>{escape(section)}.{escape(one.name)}</dt>"
        f"<dd>{escape(one.value)}{_default(one)}</dd></div>"
        for section, told in tables.settings(story).items()
        for one in told
        if one.changed or not changed_only
    ]
    return f"<dl class=keys>{''.join(items)}</dl>" if items else _missing("Nothing: every key has its default.")


def _default(setting: Setting) -> str:
    return f" <s>{escape(setting.default)}</s>" if setting.changed and setting.default else ""
