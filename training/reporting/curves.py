"""The curves of a report: which charts there are, which metrics they show, and what they are called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from markupsafe import Markup

from training.record.metric_schema import EVENTS, HEALTH_METRICS, PROBE_METRICS, STEP_METRICS, Metric
from training.record.reader import finite
from training.reporting.analysis import SPIKE_SIGMA, Analysis, utilisation
from training.reporting.charts import Level, Series, heat_bins, heat_map, line_chart
from training.reporting.format import NOTHING, compact, count, number, percent
from training.reporting.tables import Table

By = Literal["step", "tokens"]

PALETTE = 8
"""Number of colours for runs and curves: --c0 to --c7 in report.css."""
_UTILISATION = {"utilisation": Metric("share", "time in which any kernel ran, mean over GPUs")}
"""A curve that is computed from several fields."""
_MOST_DOTS = 60
_SPARKS = "▁▂▃▄▅▆▇█"
_SPARK_WIDTH = 24
"""Characters of a curve in report.md."""


@dataclass(frozen=True)
class ChartSpec:
    """One chart. lines: metric -> its name in the legend. A chart of several runs shows the first metric only, with a
    line for each run."""

    title: str
    lines: dict[str, str]
    scale: Literal["linear", "log"] = "linear"
    from_zero: bool = False
    about: str = ""


LEARNING = (
    ChartSpec("Held-out text", {"eval_bpb": "sparse", "eval_bpb_dense": "dense"}, "log"),
    ChartSpec("Indexer loss", {"indexer_loss": "indexer loss"}, "log"),
    ChartSpec(
        "Gradient norm",
        {"grad_norm": "all", "grad_norm/indexer": "indexer", "grad_norm/gates": "gates", "grad_norm/rest": "rest"},
        "log",
    ),
    ChartSpec("Learning rate", {"lr": "main", "lr_indexer": "indexer"}, from_zero=True),
    ChartSpec(
        "Update to weights",
        {"update_ratio/main": "main", "update_ratio/indexer": "indexer"},
        "log",
        about="norm of a step's change of the matrices over their norm, on a sample",
    ),
)
SPEED = (
    ChartSpec("Throughput", {"tokens_per_s": "tokens/s"}, from_zero=True),
    ChartSpec(
        "Use of the devices",
        {"mfu": "MFU", "utilisation": "utilisation"},
        from_zero=True,
        about="MFU: useful arithmetic over the devices' peak; utilisation: kernels running",
    ),
    ChartSpec("Memory", {"memory_gib": "peak"}, from_zero=True),
    ChartSpec(
        "Seconds of a step",
        {
            "seconds": "whole",
            "seconds_forward": "forward",
            "seconds_backward": "backward",
            "seconds_step": "update",
            "seconds_data": "data",
        },
        from_zero=True,
        about="wall time on rank 0, whole and in parts",
    ),
)
ATTENTION = (
    ChartSpec(
        "Keys per query",
        {"selected_k": "selected", "visible_k": "visible"},
        from_zero=True,
        about="keys attended to, and keys that could be: those of the document so far",
    ),
    ChartSpec(
        "Coverage",
        {"indexer/coverage": "mean", "indexer/coverage_worst": "worst layer", "indexer/oracle": "perfect"},
        about="dense attention mass on the selected keys; perfect: on the best ones",
    ),
    ChartSpec("Recall", {"indexer/recall": "recall"}),
    ChartSpec(
        "Saturated gates",
        {"gate/value_saturation": "value", "gate/output_saturation": "output"},
        from_zero=True,
        about="gates below 0.05 or above 0.95",
    ),
    ChartSpec("First token", {"attention/first_token": "first token"}, from_zero=True),
)
BY_LAYER: dict[str, tuple[str, str]] = {
    "coverage": ("Coverage", "indexer/coverage"),
    "recall": ("Recall", "indexer/recall"),
    "value_saturation": ("Saturated value gates", "gate/value_saturation"),
    "output_saturation": ("Saturated output gates", "gate/output_saturation"),
    "first_token": ("First token", "attention/first_token"),
}
"""Names in "layers" -> title, and the metric that is their mean over layers."""


def described(metric: str) -> Metric:
    """Unit and meaning, from the tables of training.metrics."""
    return (STEP_METRICS | PROBE_METRICS | HEALTH_METRICS | EVENTS["eval"].fields | _UTILISATION)[metric]


def in_percent(metric: str) -> bool:
    return described(metric).unit == "share"


def curve(run: Analysis, metric: str, by: By = "step") -> tuple[np.ndarray, np.ndarray]:
    """x and y of a metric, y in its unit; empty where the run does not have it."""
    record = run.record
    if metric.startswith("eval_"):
        points = [(row["step"], v) for row in record.events_of("eval") if (v := finite(row, metric)) is not None]
        x, y = (np.array([point[i] for point in points], np.float64) for i in (0, 1))
    else:
        y = utilisation(record.steps) if metric == "utilisation" else record.steps.of(metric)
        x = record.steps.of("step")
        x, y = (x, y) if np.isfinite(y).any() else (x[:0], y[:0])
    if by == "tokens" and len(x):
        x = np.interp(x, record.steps.of("step"), record.steps.of("tokens"))
    return x, y


def axis_of(runs: Sequence[Analysis]) -> By:
    """Tokens where a step of one run has more of them than a step of another, else steps."""
    sizes = {
        round(run.record.steps.last("tokens") / run.record.steps.last("step"))
        for run in runs
        if run.record.steps.last("tokens") and run.record.steps.last("step")
    }
    whole = all(np.isfinite(run.record.steps.of("tokens")).all() for run in runs if len(run.record.steps))
    return "tokens" if len(sizes) > 1 and whole else "step"


def draw(spec: ChartSpec, runs: Sequence[Analysis]) -> Markup:
    """The chart; empty when no run has a value for it."""
    by, first, note = axis_of(runs), next(iter(spec.lines)), ""
    if len(runs) == 1:
        drawn = {m: name for m, name in spec.lines.items() if m == first or _multiple(runs[0], m, first) is None}
        named = [(name, runs[0], metric, i) for i, (metric, name) in enumerate(drawn.items())]
        note = _left_out(runs[0], spec, drawn)
    else:
        named = [(run.label, run, first, i % PALETTE) for i, run in enumerate(runs)]
    factor = 100 if in_percent(first) else 1
    series = []
    for name, run, metric, colour in named:
        x, y = curve(run, metric, by)
        series.append(Series(name, x, factor * y, colour))
    if len(runs) > 1:
        note = _absent(series)
    return line_chart(
        spec.title,
        "%" if factor == 100 else described(first).unit,
        series,
        x_unit=by,
        about=spec.about or described(first).meaning,
        note=note,
        scale=spec.scale,
        from_zero=spec.from_zero,
        levels=_levels(first, runs),
        verticals=_resumed(runs[0]) if len(runs) == 1 and first == "tokens_per_s" else (),
    )


def draw_all(specs: Sequence[ChartSpec], runs: Sequence[Analysis]) -> tuple[Markup, list[str]]:
    """The charts that have a value, and the titles of those that have none."""
    charts = [draw(spec, runs) for spec in specs]
    absent = [spec.title for spec, chart in zip(specs, charts, strict=True) if not chart]
    return Markup("").join(charts), absent


def _absent(series: Sequence[Series]) -> str:
    """Which runs a chart of several cannot show."""
    names = [one.name for one in series if not np.isfinite(one.y).any()]
    return f"Without a finite value: {', '.join(names)}." if names else ""


def _multiple(run: Analysis, metric: str, first: str) -> float | None:
    """The constant factor between a metric and `first`, None where there is none. With one, it needs no own line."""
    y, of = curve(run, metric)[1], curve(run, first)[1]
    if len(y) == 0 or len(y) != len(of) or not np.nanmax(np.abs(of)):
        return None
    ratio = float(np.nansum(y) / np.nansum(of))
    return ratio if np.allclose(y, ratio * of, rtol=1e-6, atol=0.0, equal_nan=True) else None


def _left_out(run: Analysis, spec: ChartSpec, drawn: dict[str, str]) -> str:
    first = next(iter(spec.lines))
    words = []
    for metric, name in spec.lines.items():
        if metric not in drawn and (ratio := _multiple(run, metric, first)) != 1:
            words.append(f"{name}: {number(ratio)} times as much")
    return "; ".join(words)


def _levels(metric: str, runs: Sequence[Analysis]) -> list[Level]:
    """Dashed lines that mean the same in all runs."""
    name, values = {
        "eval_bpb": ("unigram", {run.unigram_bpb for run in runs}),
        "grad_norm": ("clipped at", {run.record.settings.grad_clip for run in runs}),
        "memory_gib": ("device", {run.record.device.memory_gib for run in runs}),
    }.get(metric, ("", set()))
    value = next(iter(values)) if len(values) == 1 else None
    return [Level(name, value)] if value is not None and value > 0 else []


def _resumed(run: Analysis) -> list[float]:
    return [launch.at for launch in run.launches if launch.kind == "resume" and launch.at is not None]


def loss_charts(runs: Sequence[Analysis]) -> Markup:
    """The loss with its spikes marked; and its second half alone, on a scale that shows small changes."""
    by, several = axis_of(runs), len(runs) > 1
    series = [
        Series(run.label if several else "loss", *curve(run, "loss", by), i % PALETTE) for i, run in enumerate(runs)
    ]
    one = None if several else runs[0]
    about = described("loss").meaning
    whole = line_chart(
        "Loss",
        "nats/token",
        series,
        x_unit=by,
        about=about,
        scale="log",
        wide=True,
        note=_marked(one) if one else _absent(series),
        verticals=_resumed(one) if one else (),
        marks=_spikes(one) if one else (),
    )
    ends = [s.x[-1] for s in series if len(s.x)]
    if not ends or max(len(s.x) for s in series) < 40:
        return whole
    halves = [Series(s.name, s.x[late], s.y[late], s.colour) for s in series for late in [s.x >= max(ends) / 2]]
    return whole + line_chart(
        "Loss, second half",
        "nats/token",
        halves,
        x_unit=by,
        about=f"the same from {by} {compact(max(ends) / 2)} on",
        cut=0.02,
        note="The scale leaves out the most extreme 2 % at either end.",
    )


def _spikes(run: Analysis) -> list[tuple[float, float]]:
    """(step, loss) of the largest spikes, at most _MOST_DOTS of them."""
    at = run.spikes.at
    at = at[np.argsort(-np.abs(run.spikes.score[at]), kind="stable")][:_MOST_DOTS]
    steps = run.record.steps
    return [(x, y) for x, y in zip(steps.of("step")[at].tolist(), steps.of("loss")[at].tolist(), strict=True)]


def _marked(run: Analysis) -> str:
    """What the marks of the loss chart mean."""
    words = []
    if len(run.spikes.at):
        dots, sigma = count(len(run.spikes.at)), number(SPIKE_SIGMA)
        losses = "loss" if len(run.spikes.at) == 1 else "losses"
        words.append(f"Dots: {dots} {losses} more than {sigma} standard deviations above the mean before")
    if resumed := _resumed(run):
        words.append(f"Dotted lines: resumed after step {', '.join(count(at) for at in resumed[:6])}")
    words += [f"Attention is {stage} from step {count(step)} on" for step, stage in run.record.steps.stages()[1:3]]
    return ". ".join(words) + ("." if words else "")


def heat_maps(runs: Sequence[Analysis]) -> list[Markup]:
    """For each measure of BY_LAYER that any run has, the maps of all runs side by side, on one colour scale."""
    found = []
    for name, (title, metric) in BY_LAYER.items():
        bins = {}
        for run in runs:
            rows = [(step, 100 * np.array(layers[name])) for step, layers in run.record.steps.layers if name in layers]
            rows = [(step, values) for step, values in rows if np.isfinite(values).any()]
            if rows:
                bins[run.label] = heat_bins([step for step, _ in rows], [values for _, values in rows])
        if not bins:
            continue
        known = np.concatenate([values[np.isfinite(values)] for values, _, _ in bins.values()])
        low, high = float(known.min()), float(known.max())
        maps = [
            heat_map(
                title if len(runs) == 1 else f"{title}, {label}",
                "%",
                one,
                low=low,
                high=high,
                about=described(metric).meaning.removesuffix(", mean over layers"),
            )
            for label, one in bins.items()
        ]
        found.append(Markup("").join(maps))
    return found


# -- as text ------------------------------------------------------------------------------------------


def curve_table(run: Analysis, specs: Sequence[ChartSpec], *metrics: str) -> Table:
    """A row for each of `metrics` and each metric of the charts that the run has: its course, its ends, its range."""
    rows = []
    for metric in (*metrics, *(metric for spec in specs for metric in spec.lines)):
        y = curve(run, metric)[1]
        y = y[np.isfinite(y)]
        if len(y):
            unit, show = ("", percent) if in_percent(metric) else (described(metric).unit, number)
            ends = (show(float(v)) for v in (y[0], y[-1], y.min(), y.max()))
            rows.append((metric, unit, _sparkline(y), *ends))
    columns = ("metric", "unit", "over the run", "first", "last", "least", "greatest")
    return Table(columns, tuple(rows), frozenset({3, 4, 5, 6}))


def _sparkline(values: np.ndarray) -> str:
    means = np.array([part.mean() for part in np.array_split(values, min(_SPARK_WIDTH, len(values)))])
    low, span = means.min(), np.ptp(means)
    if span <= 1e-9 * np.abs(means).max():  # the rounding of means of equal values
        return _SPARKS[0] * len(means)
    return "".join(_SPARKS[min(len(_SPARKS) - 1, int((m - low) / span * len(_SPARKS)))] for m in means)


def layer_table(run: Analysis) -> Table:
    """The newest values by layer, a column for each measure; without rows where no layer was measured."""
    _, layers = (run.record.steps.layers or ((0.0, {}),))[-1]
    named = {title: layers[name] for name, (title, _) in BY_LAYER.items() if name in layers}
    rows = [
        (str(i), *(percent(values[i]) if i < len(values) else NOTHING for values in named.values()))
        for i in range(max(map(len, named.values()), default=0))
    ]
    return Table(("layer", *named), tuple(rows), frozenset(range(1, len(named) + 1)))
