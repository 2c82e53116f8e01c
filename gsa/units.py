"""Units of memory, and nested settings as flat names: helpers without an owner of their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

KIB = 2**10
MIB = 2**20
GIB = 2**30


def size_text(n_bytes: float) -> str:
    """A number of bytes for people, with three digits: "2 GiB", "1.25 MiB", "12 bytes"."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(n_bytes) >= unit:
            n = n_bytes / unit
            return f"{n:,.0f} {name}" if abs(n) >= 100 else f"{n:.3g} {name}"
    return f"{n_bytes:.0f} bytes"


def printable(text: str) -> str:
    """`text` with every control character but line breaks and tabs escaped: what a stranger wrote may move the cursor,
    change a title or hide a line."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def flatten(tree: Mapping[str, Any], separator: str = ".") -> dict[str, Any]:
    """{"a": {"b": 1}, "c": 2} as {"a.b": 1, "c": 2}; a mapping without entries has no name of its own."""
    return dict(_leaves(tree, "", separator))


def _leaves(tree: Mapping[str, Any], prefix: str, separator: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}{separator}", separator)
        else:
            yield f"{prefix}{key}", value
