"""Units of memory, and nested settings as flat names: helpers without an owner of their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

MIB = 2**20
GIB = 2**30


def flatten(tree: Mapping[str, Any], separator: str = ".") -> dict[str, Any]:
    """{"a": {"b": 1}, "c": 2} as {"a.b": 1, "c": 2}; a mapping without entries has no name of its own."""
    return dict(_leaves(tree, "", separator))


def _leaves(tree: Mapping[str, Any], prefix: str, separator: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}{separator}", separator)
        else:
            yield f"{prefix}{key}", value
