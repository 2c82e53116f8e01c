"""Which curves a report draws, out of what, and what they are called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from training.record.metrics_log import EVENTS, HEALTH_METRICS, PROBE_METRICS, STEP_METRICS, Metric
from training.record.reader import finite, mapping
from training.reporting.analysis import SPIKE_SIGMA, Story, utilisation
from training.reporting.charts import Level, Series, heat_bins, heat_map, line_chart
from training.reporting.format import compact, count, number
from training.reporting.style import PALETTE

By = Literal["step", "tokens"]

_UTILISATION = {"utilisation": Metric("share", "time in which any kernel ran, mean over GPUs")}
"""Made of several fields."""


@dataclass(frozen=True)
class Plan:
    """One chart of one run. lines: metric -> its name in the legend. Of several runs, the first metric alone is drawn,
    a line for each run."""

    title: str
    lines: dict[str, str]
    scale: Literal["linear", "log"] = "linear"
    from_zero: bool = False
    about: str = ""


LEARNING = (
    Plan("Held-out text", {"eval_bpb": "sparse", "eval_bpb_dense": "dense"}, "log"),
    Plan("Indexer loss", {"indexer_loss": "indexer loss"}, "log"),
    Plan(
        "Gradient norm",
        {"grad_norm": "all", "grad_norm/indexer": "indexer", "grad_norm/gates": "gates", "grad_norm/rest": "rest"},
        "log",
    ),
    Plan("Learning rate", {"lr": "main", "lr_indexer": "indexer"}, from_zero=True),
    Plan(
        "Update to weights",
        {"update_ratio/main": "main", "update_ratio/indexer": "indexer"},
        "log",
        about="norm of a step's change of the matrices over their norm, on a sample",
    ),
)
SPEED = (
    Plan("Throughput", {"tokens_per_s": "tokens/s"}, from_zero=True),
    Plan(
        "Use of the devices",
        {"mfu": "MFU", "utilisation": "utilisation"},
        from_zero=True,
        about="MFU: useful arithmetic over the devices' peak; utilisation: kernels running",
    ),
    Plan("Memory", {"memory_gib": "peak"}, from_zero=True),
    Plan(
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
    Plan(
        "Keys per query",
        {"selected_k": "selected", "visible_k": "visible"},
        from_zero=True,
        about="keys attended to, and keys that could be: those of the document so far",
    ),
    Plan(
        "Coverage",
        {"indexer/coverage": "mean", "indexer/coverage_worst": "worst layer", "indexer/oracle": "perfect"},
        about="dense attention mass on the selected keys; perfect: on the best ones",
    ),
    Plan("Recall", {"indexer/recall": "recall"}),
    Plan(
        "Saturated gates",
        {"gate/value_saturation": "value", "gate/output_saturation": "output"},
        from_zero=True,
        about="gates below 0.05 or above 0.95",
    ),
    Plan("First token", {"attention/first_token": "first token"}, from_zero=True),
)
BY_LAYER: dict[str, tuple[str, str]] = {
    "coverage": ("Coverage", "indexer/coverage"),
    "recall": ("Recall", "indexer/recall"),
    "value_saturation": ("Saturated value gates", "gate/value_saturation"),
    "output_saturation": ("Saturated output gates", "gate/output_saturation"),
    "first_token": ("First token", "attention/first_token"),
}
"""Names in "layers" -> title, and the metric whose mean over layers it makes."""


def described(metric: str) -> Metric:
    """Unit and meaning, by the tables of training.metrics."""
    return (STEP_METRICS | PROBE_METRICS | HEALTH_METRICS | EVENTS["eval"].fields | _UTILISATION)[metric]


def in_percent(metric: str) -> bool:
    return described(metric).unit == "share"


def curve(story: Story, metric: str, by: By = "step") -> tuple[np.ndarray, np.ndarray]:
    """x and y of a metric, y in its unit; empty where the run does not have it."""
    record = story.record
    if metric.startswith("eval_"):
        told = [(row["step"], v) for row in record.told("eval") if (v := finite(row, metric)) is not None]
        x, y = (np.array([pair[i] for pair in told], np.float64) for i in (0, 1))
    else:
        y = utilisation(record.steps) if metric == "utilisation" else record.steps.of(metric)
        x = record.steps.of("step")
        x, y = (x, y) if np.isfinite(y).any() else (x[:0], y[:0])
    if by == "tokens" and len(x):
        x = np.interp(x, record.steps.of("step"), record.steps.of("tokens"))
    return x, y


def axis_of(stories: Sequence[Story]) -> By:
    """Steps; tokens where steps of different runs do not have as many of them."""
    sizes = {
        round(s.record.steps.last("tokens") / s.record.steps.last("step"))
        for s in stories
        if s.record.steps.last("tokens") and s.record.steps.last("step")
    }
    whole = all(np.isfinite(s.record.steps.of("tokens")).all() for s in stories if len(s.record.steps))
    return "tokens" if len(sizes) > 1 and whole else "step"


def draw(plan: Plan, stories: Sequence[Story], by: By) -> str:
    """The chart, or "" when nobody has a value for it."""
    first, note = next(iter(plan.lines)), ""
    if len(stories) == 1:
        drawn = {m: name for m, name in plan.lines.items() if m == first or _multiple(stories[0], m, first) is None}
        named = [(name, stories[0], metric, i) for i, (metric, name) in enumerate(drawn.items())]
        note = _left_out(stories[0], plan, drawn)
    else:
        named = [(story.label, story, first, i % PALETTE) for i, story in enumerate(stories)]
    factor = 100 if in_percent(first) else 1
    series = []
    for name, story, metric, colour in named:
        x, y = curve(story, metric, by)
        series.append(Series(name, x, factor * y, colour))
    if len(stories) > 1:
        note = _absent(series)
    return line_chart(
        plan.title,
        "%" if factor == 100 else described(first).unit,
        series,
        x_unit=by,
        about=plan.about or described(first).meaning,
        note=note,
        scale=plan.scale,
        from_zero=plan.from_zero,
        levels=_levels(first, stories),
        verticals=_resumed(stories[0]) if len(stories) == 1 and first == "tokens_per_s" else (),
    )


def _absent(series: Sequence[Series]) -> str:
    """Which runs a chart of several cannot show."""
    names = [one.name for one in series if not np.isfinite(one.y).any()]
    return f"Without a finite value: {', '.join(names)}." if names else ""


def _multiple(story: Story, metric: str, first: str) -> float | None:
    """How many times as much as `first` a metric is, where it is so all along: then a line of its own says nothing."""
    y, of = curve(story, metric)[1], curve(story, first)[1]
    if len(y) == 0 or len(y) != len(of) or not np.nanmax(np.abs(of)):
        return None
    ratio = float(np.nansum(y) / np.nansum(of))
    return ratio if np.allclose(y, ratio * of, rtol=1e-6, atol=0.0, equal_nan=True) else None


def _left_out(story: Story, plan: Plan, drawn: dict[str, str]) -> str:
    first = next(iter(plan.lines))
    said = []
    for metric, name in plan.lines.items():
        if metric not in drawn and (ratio := _multiple(story, metric, first)) != 1:
            said.append(f"{name}: {number(ratio)} times as much")
    return "; ".join(said)


def _levels(metric: str, stories: Sequence[Story]) -> list[Level]:
    """Dashed lines that mean the same in all runs."""
    name, values = {
        "eval_bpb": ("unigram", {s.unigram_bpb for s in stories}),
        "grad_norm": ("clipped at", {finite(mapping(s.record.config.get("training")), "grad_clip") for s in stories}),
        "memory_gib": ("device", {s.device_memory_gib for s in stories}),
    }.get(metric, ("", set()))
    value = next(iter(values)) if len(values) == 1 else None
    return [Level(name, value)] if value is not None and value > 0 else []


def _resumed(story: Story) -> list[float]:
    return [launch.at for launch in story.launches if launch.kind == "resume" and launch.at is not None]


def loss_charts(stories: Sequence[Story], by: By) -> str:
    """The loss, its spikes marked; and its second half by itself, where a log scale hides what happens."""
    several = len(stories) > 1
    series = [Series(s.label if several else "loss", *curve(s, "loss", by), i % PALETTE) for i, s in enumerate(stories)]
    one = None if several else stories[0]
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


def _spikes(story: Story) -> list[tuple[float, float]]:
    """The largest ones: a chart has room for so many dots."""
    at = story.spikes.at
    at = at[np.argsort(-np.abs(story.spikes.score[at]), kind="stable")][:60]
    steps = story.record.steps
    return [(x, y) for x, y in zip(steps.of("step")[at].tolist(), steps.of("loss")[at].tolist(), strict=True)]


def _marked(story: Story) -> str:
    """What the marks of the loss chart mean."""
    said = []
    if len(story.spikes.at):
        dots, sigma = count(len(story.spikes.at)), number(SPIKE_SIGMA)
        losses = "loss" if len(story.spikes.at) == 1 else "losses"
        said.append(f"Dots: {dots} {losses} more than {sigma} standard deviations above the mean before")
    if resumed := _resumed(story):
        said.append(f"Dotted lines: resumed after step {', '.join(count(at) for at in resumed[:6])}")
    changes = [(step, stage) for step, stage in story.record.steps.stages[1:]]
    said += [f"Attention is {stage} from step {count(step)} on" for step, stage in changes[:2]]
    return ". ".join(said) + ("." if said else "")


def heat_maps(stories: Sequence[Story]) -> dict[str, str]:
    """A row of maps for each measure of BY_LAYER that any run has, one for each run, all on one colour scale."""
    found = {}
    for name, (title, metric) in BY_LAYER.items():
        bins = {}
        for story in stories:
            told = story.record.steps.layers
            rows = [(step, 100 * np.array(layers[name])) for step, layers in told if name in layers]
            rows = [(step, values) for step, values in rows if np.isfinite(values).any()]
            if rows:
                bins[story.label] = heat_bins([step for step, _ in rows], [values for _, values in rows])
        if not bins:
            continue
        known = np.concatenate([values[np.isfinite(values)] for values, _, _ in bins.values()])
        low, high = float(known.min()), float(known.max())
        found[title] = "".join(
            heat_map(
                title if len(stories) == 1 else f"{title}, {label}",
                "%",
                one,
                low=low,
                high=high,
                about=described(metric).meaning.removesuffix(", mean over layers"),
            )
            for label, one in bins.items()
        )
    return found
