"""Formats numbers, durations, dates and sizes for people."""

from __future__ import annotations

import math
from datetime import UTC, datetime

from gsa.units import size_text

NOTHING = "–"
"""What stands in place of a missing value."""
_SUFFIXES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def number(value: float | None, digits: int = 4) -> str:
    """1234567.8 -> "1,234,568", 3.14159 -> "3.142", 0.0003 -> "3e-4"."""
    if value is None or not math.isfinite(value):
        return NOTHING
    if value == 0:
        return "0"
    size = abs(value)
    if size < 1e-3 or size >= 1e15:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{_bare(mantissa)}e{int(exponent)}"
    return _bare(f"{value:,.{max(0, digits - 1 - math.floor(math.log10(size)))}f}")


def _bare(text: str) -> str:
    """Removes zeros at the end of a fraction."""
    return text.rstrip("0").rstrip(".") if "." in text else text


def compact(value: float | None, digits: int = 3) -> str:
    """12500 -> "12.5k", 2.1e9 -> "2.1B"."""
    if value is None or not math.isfinite(value):
        return NOTHING
    for size, suffix in _SUFFIXES:
        if abs(value) >= size * (1 - 0.5 * 10**-digits):
            return number(value / size, digits) + suffix
    return number(value, digits)


def count(value: float | None) -> str:
    """1234567.8 -> "1,234,568"."""
    return NOTHING if value is None or not math.isfinite(value) else f"{round(value):,}"


def percent(share: float | None) -> str:
    """0.0213 -> "2.1 %". A share that is not zero never reads as 0."""
    if share is None or not math.isfinite(share):
        return NOTHING
    if share == 0:
        return "0 %"
    if 0 < share < 0.0005:
        return "< 0.1 %"
    return f"{100 * share:.1f} %" if share < 0.0995 else f"{100 * share:.0f} %"


def duration(seconds: float | None) -> str:
    """0.42 -> "0.42 s", 3725 -> "1h 02m", 200000 -> "2d 7h"."""
    if seconds is None or not math.isfinite(seconds):
        return NOTHING
    if seconds < 59.95:
        return f"{number(seconds, 2 if seconds < 10 else 3)} s"
    minutes, s = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m {s:02d}s"
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours < 48:
        return f"{hours}h {minutes:02d}m"
    days, hours = divmod(round(seconds / 3600), 24)
    return f"{days}d {hours}h"


def moment(unix_s: float | None) -> str:
    """A Unix time to the minute, in UTC: "2026-11-27 08:49 UTC"."""
    if unix_s is None or not 0 <= unix_s < 1e11:
        return NOTHING
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%d %H:%M UTC")


def size(n_bytes: float | None) -> str:
    """2147483648 -> "2 GiB"."""
    if n_bytes is None:
        return NOTHING
    return size_text(n_bytes)


def plural(n: int, one: str, many: str | None = None) -> str:
    """1 -> "1 spike", 1200 -> "1,200 spikes"."""
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def sentence(text: str) -> str:
    """Adds a full stop and a capital letter, unless the text begins with the name of a file or key."""
    if not text:
        return text
    named = "." in text.split()[0].rstrip(".:")
    return (text[0] if named else text[0].upper()) + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")


def brief(value: object, limit: int = 200) -> str:
    """A value on one line, at most `limit` characters long."""
    text = NOTHING if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"
