"""Reading yaml that a stranger may have written: a few aliases can stand for more nodes than any memory holds."""

from __future__ import annotations

from typing import Any

import yaml

MAX_BYTES = 2**20
"""Size of a yaml file that is read."""
MAX_NODES = 100_000
"""Nodes of a document with its aliases written out."""


def compose(text: str) -> yaml.Node | None:
    """The document as yaml nodes. Raises yaml.YAMLError for what is no yaml, nested too deeply, or grows too large."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is not None and _written_out(root, {}, set()) > MAX_NODES:
            raise yaml.YAMLError(f"with its aliases written out it has more than {MAX_NODES:,} nodes")
    except RecursionError as err:
        raise yaml.YAMLError("it is nested too deeply") from err
    return root


def load(text: str) -> Any:
    """The document as plain values. Raises yaml.YAMLError as `compose` does."""
    compose(text)
    try:
        return yaml.safe_load(text)
    except (ValueError, RecursionError) as err:  # of a date, or a number with thousands of digits
        raise yaml.YAMLError(str(err)) from err


def _written_out(node: yaml.Node, known: dict[int, int], above: set[int]) -> int:
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) in above:
        raise yaml.YAMLError("an alias in it holds itself")
    if id(node) not in known:
        above.add(id(node))
        pairs = node.value
        children = [child for pair in pairs for child in pair] if isinstance(node, yaml.MappingNode) else pairs
        known[id(node)] = 1 + sum(_written_out(child, known, above) for child in children)
        above.discard(id(node))
    return known[id(node)]
