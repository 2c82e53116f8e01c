"""Charts as inline SVG. Curves stretch to any width; their labels are HTML beside them and do not stretch.

A chart of many points is thinned to a few hundred intervals: the line is the mean of each, and a band behind it
reaches from the least to the greatest value, so that one odd step of a million is still visible.

Every text is escaped here, so what comes back is Markup, which the templates of the report insert as it is.
"""

from __future__ import annotations

import base64
import json
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

import numpy as np
from markupsafe import Markup

from training.reporting.format import compact, number

INTERVALS, INTERVALS_WIDE = 150, 300
"""For a chart of half the page's width, and of all of it: about three pixels each, too narrow to see."""
HEAT_COLUMNS = 120
_SIDE = 1000
"""The width and the height of a plot in units of its drawing."""

# anchors of cividis, a colour map that looks the same with and without colour blindness
_RAMP = ("00224e", "223a70", "4a4f6c", "6a6a70", "848279", "a59c74", "cab669", "fee838")


@dataclass(frozen=True)
class Series:
    """x, y: (n,) float64, NaN in y where there is no value. colour: index into the categorical palette."""

    name: str
    x: np.ndarray
    y: np.ndarray
    colour: int = 0


@dataclass(frozen=True)
class Level:
    """A dashed horizontal line and its name."""

    name: str
    y: float


@dataclass(frozen=True)
class Axis:
    """low, high: the ends, in the unit of the data. log: the axis is logarithmic."""

    low: float
    high: float
    log: bool = False

    def place(self, value: np.ndarray | float) -> np.ndarray:
        """0 at `low`, 1 at `high`."""
        low, high, value = self.low, self.high, np.asarray(value, np.float64)
        if self.log:
            low, high, value = math.log(low), math.log(high), np.log(value)
        return (value - low) / (high - low)

    def ticks(self) -> list[tuple[float, str]]:
        """Round values on the axis, and how they are written."""
        if self.log and self.high / self.low > 4:
            exponents = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for digits in ((1,), (1, 3), (1, 2, 5), (1, 2, 3, 4, 5, 7)):
                found = [d * 10.0**e for e in exponents for d in digits if self.low <= d * 10.0**e <= self.high]
                if len(found) >= 4:
                    break
            found = found[:: math.ceil(len(found) / 7)]
            return [(value, compact(value)) for value in found]
        step = _round_step((self.high - self.low) / 4.5)
        values = [i * step for i in range(math.ceil(self.low / step - 1e-6), math.floor(self.high / step + 1e-6) + 1)]
        largest = max(abs(self.low), abs(self.high))
        if largest < 0.01:  # all with one exponent, so that they compare
            power = math.floor(math.log10(largest))
            return [(v, f"{number(v / 10**power, 3)}e{power}" if v else "0") for v in values]
        digits = 1 + math.floor(math.log10(max(largest, step)) + 1e-9) - math.floor(math.log10(step) + 1e-9)
        return [(v, compact(v, max(1, digits))) for v in values]


def _round_step(wanted: float) -> float:
    """The number among 1, 2 and 5 times powers of ten that is nearest by ratio."""
    power = 10.0 ** math.floor(math.log10(wanted))
    return min((1 * power, 2 * power, 5 * power, 10 * power), key=lambda step: abs(math.log(step / wanted)))


def thin(x: np.ndarray, y: np.ndarray, intervals: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """x, and the least, mean and greatest y, of at most this many intervals of equal length, without empty ones.

    x: in ascending order. Fewer points than intervals stay as they are.
    """
    known = np.isfinite(x) & np.isfinite(y)
    x, y = x[known], y[known]
    if len(x) <= intervals or x[0] == x[-1]:
        return x, y, y, y
    place = np.minimum((x - x[0]) / (x[-1] - x[0]) * intervals, intervals - 1).astype(int)
    starts = np.flatnonzero(np.diff(place, prepend=-1))
    sizes = np.diff(starts, append=len(x))
    return (
        np.add.reduceat(x, starts) / sizes,
        np.minimum.reduceat(y, starts),
        np.add.reduceat(y, starts) / sizes,
        np.maximum.reduceat(y, starts),
    )


def line_chart(
    title: str,
    unit: str,
    series: Sequence[Series],
    *,
    x_unit: str,
    about: str = "",
    note: str = "",
    scale: Literal["linear", "log"] = "linear",
    from_zero: bool = False,
    cut: float = 0.0,
    levels: Sequence[Level] = (),
    verticals: Sequence[float] = (),
    marks: Sequence[tuple[float, float]] = (),
    wide: bool = False,
) -> Markup:
    """A figure; empty when no series has a value.

    about: what is measured. note: what its marks mean. cut: share of the intervals that may lie beyond the scale, at
    either end. levels: drawn when the data comes near them. verticals: x of dotted lines. marks: (x, y) of dots.
    """
    if scale == "log":
        series = [Series(s.name, s.x, np.where(s.y > 0, s.y, np.nan), s.colour) for s in series]
    thinned = [(s, *thin(s.x, s.y, INTERVALS_WIDE if wide else INTERVALS)) for s in series]
    thinned = [one for one in thinned if len(one[1])]
    if not thinned:
        return Markup()
    xs = np.concatenate([x for _, x, *_ in thinned])
    x_axis = Axis(float(xs.min()), float(xs.max()) if xs.max() > xs.min() else float(xs.min()) + 1.0)
    y_axis = _y_axis(thinned, scale, from_zero, cut, [level.y for level in levels])
    levels = [level for level in levels if y_axis.low <= level.y <= y_axis.high]
    drawn = [_grid(y_axis)]
    drawn += [f'<path class="vertical" d="M{_at(x_axis, x)} 0V{_SIDE}"/>' for x in verticals if xs.min() <= x]
    drawn += [f'<path class="level" d="M0 {_down(y_axis, level.y)}H{_SIDE}"/>' for level in levels]
    for s, x, least, mean, greatest in thinned:
        if (least < greatest).any():
            many = " many" if len(thinned) > 2 else ""
            drawn.append(f'<path class="band{many} c{s.colour}" d="{_band(x_axis, y_axis, x, least, greatest)}"/>')
        lone = " lone" if len(x) == 1 else ""
        drawn.append(f'<path class="line{lone} c{s.colour}" d="{_path(x_axis, y_axis, x, mean)}"/>')
    dots = "".join(f"M{_at(x_axis, x)} {_down(y_axis, y)}h0" for x, y in marks if y > 0 or scale == "linear")
    drawn.append(f'<path class="dots" d="{dots}"/>' if dots else "")
    spoken = ". ".join(
        [f"{title}, {unit}"]
        + [_read_out(s, x, least, mean, greatest, x_unit) for s, x, least, mean, greatest in thinned]
    )
    frame = _frame(y_axis.ticks(), y_axis, x_axis, x_unit, drawn, spoken, _named_levels(levels, y_axis))
    points = [[[float(f"{v:.7g}") for v in x], [float(f"{v:.4g}") for v in mean]] for _, x, _, mean, _ in thinned]
    shown = json.dumps({"x": [x_axis.low, x_axis.high], "unit": x_unit, "s": points}, separators=(",", ":"))
    words = "".join(f"<p>{escape(text)}</p>" for text in (about, note) if text)
    unit = f" <span class=unit>{escape(unit)}</span>" if unit not in ("", "1") else ""
    return Markup(
        f'<figure class="chart{" wide" if wide else ""}" data-points="{escape(shown)}"><figcaption>'
        f"<h3>{escape(title)}{unit}</h3>{words}{_legend(thinned)}</figcaption>{frame}</figure>\n"
    )


def _y_axis(thinned: list, scale: str, from_zero: bool, cut: float, levels: list[float]) -> Axis:
    low = float(np.quantile(np.concatenate([least for _, _, least, _, _ in thinned]), cut))
    high = float(np.quantile(np.concatenate([greatest for *_, greatest in thinned]), 1 - cut))
    if scale == "log":
        near = [v for v in levels if v > 0 and low / 30 < v < high * 30]
        low, high = min([low, *near]), max([high, *near])
        room = (high / low) ** 0.05 if high > low * 1.0001 else 1.1
        return Axis(low / room, high * room, log=True)
    if from_zero:
        low, high = min(0.0, low), max(0.0, high)
    near = [v for v in levels if v <= high + 2 * (high - low)]
    high = max([high, *near])
    if high - low <= 1e-9 * max(abs(high), abs(low)):
        half = 0.5 * max(abs(high), abs(low)) or 0.5
        low, high = low - half, high + half
    room = 0.05 * (high - low)
    return Axis(low if from_zero and low == 0 else low - room, high + room)


def _at(axis: Axis, x: float) -> str:
    return _unit(float(axis.place(x)) * _SIDE)


def _down(axis: Axis, y: float) -> str:
    """The distance from the top of the drawing; far outside it, one height beyond its edge."""
    return _unit(min(max((1 - float(axis.place(y))) * _SIDE, -_SIDE), 2 * _SIDE))


def _unit(place: float) -> str:
    """To a tenth of a unit, which is about a tenth of a pixel."""
    return f"{place:.1f}".removesuffix(".0")


def _points(x_axis: Axis, y_axis: Axis, x: np.ndarray, y: np.ndarray) -> list[str]:
    return [f"{_at(x_axis, a)} {_down(y_axis, b)}" for a, b in zip(x, y, strict=True)]


def _path(x_axis: Axis, y_axis: Axis, x: np.ndarray, y: np.ndarray) -> str:
    points = _points(x_axis, y_axis, x, y)
    return "M" + "L".join(points) + ("h0" if len(points) == 1 else "")


def _band(x_axis: Axis, y_axis: Axis, x: np.ndarray, least: np.ndarray, greatest: np.ndarray) -> str:
    return "M" + "L".join(_points(x_axis, y_axis, x, greatest) + _points(x_axis, y_axis, x, least)[::-1]) + "Z"


def _grid(axis: Axis) -> str:
    lines = "".join(f"M0 {_down(axis, value)}H{_SIDE}" for value, _ in axis.ticks())
    return f'<path class="grid" d="{lines}"/>' if lines else ""


def _named_levels(levels: Sequence[Level], axis: Axis) -> str:
    return "".join(
        f'<span class="of-level" style="bottom:{100 * float(axis.place(level.y)):.2f}%">{escape(level.name)} '
        f"{number(level.y, 3)}</span>"
        for level in levels
    )


def _frame(
    y_ticks: Sequence[tuple[float, str]],
    y_axis: Axis,
    x_axis: Axis,
    x_unit: str,
    drawn: Sequence[str],
    spoken: str,
    over: str = "",
) -> str:
    """The plot, with the labels of y at its left and those of x below."""
    y = "".join(f'<span style="bottom:{100 * float(y_axis.place(v)):.2f}%">{escape(t)}</span>' for v, t in y_ticks)
    x = ""
    for value, text in x_axis.ticks():
        place = float(x_axis.place(value))
        # centred at the very edge, it would reach beyond the plot
        end = " class=end" if place > 0.97 else " class=begin" if place < 0.03 else ""
        x += f'<span{end} style="left:{100 * place:.2f}%">{escape(text)}</span>'
    return (
        f'<div class="frame"><div class="y" aria-hidden="true">{y}</div><div class="plot">'
        f'<svg viewBox="0 0 {_SIDE} {_SIDE}" preserveAspectRatio="none" role="img" aria-label="{escape(spoken)}">'
        f"<title>{escape(spoken)}</title>{''.join(drawn)}</svg>{over}<div class=rule><b></b></div></div>"
        f'<div class="x-unit" aria-hidden="true">{escape(x_unit)}</div>'
        f'<div class="x" aria-hidden="true">{x}</div></div>'
    )


def _legend(thinned: list) -> str:
    """Names and newest values; the page's script replaces these by the values under the pointer."""
    alone = len(thinned) == 1
    items = [
        f"<li>{'last' if alone else f'<i class={chr(34)}key c{s.colour}{chr(34)}></i>{escape(s.name)}'} "
        f"<output>{number(float(mean[-1]))}</output></li>"
        for s, _, _, mean, _ in thinned
    ]
    return f"<ul class=legend>{''.join(items)}</ul>"


def _read_out(s: Series, x: np.ndarray, least: np.ndarray, mean: np.ndarray, greatest: np.ndarray, x_unit: str) -> str:
    """The curve in a sentence, for a screen reader."""
    return (
        f"{s.name}: from {number(float(mean[0]))} at {x_unit} {compact(float(x[0]))} to {number(float(mean[-1]))} at "
        f"{compact(float(x[-1]))}, between {number(float(least.min()))} and {number(float(greatest.max()))}"
    )


# -- heat maps ----------------------------------------------------------------------------------------


def heat_bins(steps: Sequence[float], values: Sequence[Sequence[float]]) -> tuple[np.ndarray, float, float]:
    """(layers, columns) mean values, NaN where there is none; and the steps at which the first column begins and the
    last one ends. values: by step, one per layer."""
    at, layers = np.asarray(steps, np.float64), max(map(len, values))
    table = np.full((len(values), layers), np.nan)
    for row, line in zip(table, values, strict=True):
        row[: len(line)] = line
    columns = min(len(at), HEAT_COLUMNS)
    apart = (at[-1] - at[0]) / max(1, len(at) - 1) or 1.0
    low, high = float(at[0] - apart / 2), float(at[-1] + apart / 2)
    place = np.minimum((at - low) / (high - low) * columns, columns - 1).astype(int)
    sums, counts = np.zeros((columns, layers)), np.zeros((columns, layers))
    np.add.at(sums, place, np.nan_to_num(table))
    np.add.at(counts, place, np.isfinite(table))
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan).T, low, high


def heat_map(
    title: str, unit: str, bins: tuple[np.ndarray, float, float], *, low: float, high: float, about: str
) -> Markup:
    """Layers from top to bottom, steps from left to right. low, high: values at the ends of the colour ramp."""
    values, first, last = bins
    layers = len(values)
    x_axis, y_axis = Axis(max(0.0, first) if last > 0 else first, last), Axis(0.0, float(layers))
    every = max(1, math.ceil(layers / 8))
    ticks = [(layers - i - 0.5, str(i)) for i in range(0, layers, every)]
    picture = (
        f'<image width="{_SIDE}" height="{_SIDE}" preserveAspectRatio="none" href="data:image/png;base64,'
        f'{base64.b64encode(_png(values, low, high)).decode()}"/>'
    )
    newest, spoken = values[:, -1], f"{title} by layer, {unit}"
    if np.isfinite(newest).any():
        least, most = int(np.nanargmin(newest)), int(np.nanargmax(newest))
        spoken += (
            f": in the newest steps from {number(float(newest[least]), 3)} in layer {least} to "
            f"{number(float(newest[most]), 3)} in layer {most}"
        )
    colours = f"linear-gradient(90deg,{','.join(f'#{anchor}' for anchor in _RAMP)})"
    ramp = (
        f'<div class=ramp><span>{number(low, 3)}</span><i style="background:{colours}"></i>'
        f"<span>{number(high, 3)}</span></div>"
    )
    return Markup(
        f'<figure class="chart heat"><figcaption><h3>{escape(title)} <span class=unit>{escape(unit)}</span></h3>'
        f"<p>{escape(about)}</p>{ramp}</figcaption>"
        f"{_frame(ticks, y_axis, x_axis, 'step', [picture], spoken)}</figure>\n"
    )


def _png(values: np.ndarray, low: float, high: float) -> bytes:
    """(rows, columns) as an indexed PNG with a pixel for each value; NaN is transparent."""
    span = (high - low) or 1.0
    shade = np.where(np.isfinite(values), 1 + np.clip((np.nan_to_num(values) - low) / span, 0, 1) * 254, 0)
    pixels = shade.round().astype(np.uint8)
    anchors = np.array([[int(a[i : i + 2], 16) for i in (0, 2, 4)] for a in _RAMP], float)
    at = np.linspace(0, len(_RAMP) - 1, 255)
    colours = np.stack([np.interp(at, range(len(_RAMP)), anchors[:, channel]) for channel in range(3)], 1)
    palette = b"\0\0\0" + colours.round().astype(np.uint8).tobytes()
    lines = b"".join(b"\0" + row.tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 8, 3, 0, 0, 0)
    chunks = (
        (b"IHDR", header),
        (b"PLTE", palette),
        (b"tRNS", b"\0"),
        (b"IDAT", zlib.compress(lines, 9)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
