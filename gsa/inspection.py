"""What the indexer of a model selects: the attention mass that its keys cover, and how selected sets are spread.

The spread decides which kernel pays at long context: union/k is the number of distinct keys that neighbouring queries
select together, by the number of keys of one query; an empty tile is a rectangle of queries and keys of the causal
triangle in which nothing is selected. Queries that select all their visible keys are left out of coverage and union.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from gsa import kernels
from gsa.attention.probe import PROBES, largest
from gsa.model import GSAForCausalLM

NEIGHBOURS = (2, 4, 8, 16, 32, 64, 128)
"""Numbers of neighbouring queries whose union is measured."""
TILES = ((16, 64), (64, 64), (128, 128))
"""Sizes of tiles, (queries, keys)."""
BLOCK = 128
"""Queries whose sets exist as masks at a time: a multiple of all of NEIGHBOURS, and of every tile's queries."""

Windows = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""Texts to measure: (tokens, doc_start) of each batch, both (B, T) int64 on the model's device."""


@dataclass(frozen=True)
class Coverage:
    """How well one layer selects, in shares between 0 and 1.

    covered: dense attention mass on the selected keys. oracle: that on equally many keys of largest mass. recall: share
    of the oracle's keys that are selected.
    """

    covered: float
    oracle: float
    recall: float

    @property
    def of_oracle(self) -> float:
        return self.covered / self.oracle


@dataclass(frozen=True)
class Spread:
    """How the selected sets of one layer are spread.

    k: mean number of selected keys. union: union/k by number of neighbouring queries. empty: share of empty tiles by
    size, (queries, keys).
    """

    k: float
    union: dict[int, float]
    empty: dict[tuple[int, int], float]


def measure_coverage(model: GSAForCausalLM, windows: Windows) -> list[Coverage]:
    """The coverage of every layer, averaged over the first sequence of each batch."""
    found = []
    with torch.no_grad():
        for tokens, doc_start in windows:
            rows = torch.arange(tokens.shape[1], device=tokens.device)
            found.append(model(tokens, doc_start=doc_start, probe_rows=rows, last_only=True).probe)
    mean = torch.stack(found).nanmean(0)
    at = [PROBES.index(name) for name in ("coverage", "oracle", "recall")]
    return [Coverage(*(layer[i].item() for i in at)) for layer in mean]


def with_untrained_indexer(model: GSAForCausalLM, windows: Windows, seed: int = 0) -> GSAForCausalLM:
    """A copy of the model whose indexers are new, with the v_ref that they would have on these windows."""
    other = copy.deepcopy(model)
    torch.manual_seed(seed)
    fresh = GSAForCausalLM(model.config)
    for ours, new in zip(other.layers, fresh.layers, strict=True):
        ours.attention.indexer.load_state_dict(new.attention.indexer.state_dict())
        ours.attention.selector.v_ref.zero_()
    with torch.no_grad():
        stats = [other(tokens, doc_start=start, last_only=True).selection_stats for tokens, start in windows]
    other.update_v_ref(torch.stack(stats).sum(0))
    return other


def measure_spread(model: GSAForCausalLM, windows: Windows) -> tuple[list[Spread], list[Spread]]:
    """The spread of every layer's selected sets, and that of random sets of the same sizes among the visible keys.

    Sets are measured as soon as a layer has selected them, BLOCK queries at a time: no tensor is T x T.
    """
    random = torch.Generator(model.embed.weight.device).manual_seed(0)
    selected: list[list[Spread]] = [[] for _ in model.layers]
    by_chance: list[list[Spread]] = [[] for _ in model.layers]

    def measure(layer: int, choice: kernels.Selection, doc_start: torch.Tensor) -> None:
        for row in range(len(doc_start)):
            selected[layer].append(spread(selected_blocks(choice, doc_start, row)))
            by_chance[layer].append(spread(random_blocks(choice, doc_start, row, random)))

    hooks = [
        layer.attention.selector.register_forward_hook(
            lambda module, inputs, choice, i=i: measure(i, choice, inputs[-1])  # the selector's last input: doc_start
        )
        for i, layer in enumerate(model.layers)
    ]
    try:
        with torch.no_grad():
            for tokens, doc_start in windows:
                model(tokens, doc_start=doc_start, last_only=True)
    finally:
        for hook in hooks:
            hook.remove()
    return [mean_spread(layer) for layer in selected], [mean_spread(layer) for layer in by_chance]


Blocks = Iterator[tuple[torch.Tensor, torch.Tensor]]
"""Selected and visible keys of one sequence, each (up to BLOCK, T) bool, BLOCK queries after BLOCK queries."""


def selected_blocks(choice: kernels.Selection, doc_start: torch.Tensor, row: int) -> Blocks:
    """The selected sets of one row of a batch. doc_start: (B, T) int64."""
    s = torch.arange(doc_start.shape[1], device=doc_start.device)
    for part in s.split(BLOCK):
        visible = (s <= part[:, None]) & (s >= doc_start[row, part, None])
        yield visible if choice.bits is None else kernels.unpack(choice.bits[row, part], len(s)), visible


def random_blocks(choice: kernels.Selection, doc_start: torch.Tensor, row: int, random: torch.Generator) -> Blocks:
    """Random sets of the sizes that one row of a batch has selected."""
    sizes = choice.k[row].split(BLOCK)
    for (_, visible), k in zip(selected_blocks(choice, doc_start, row), sizes, strict=True):
        yield largest(torch.rand(visible.shape, generator=random, device=visible.device), visible, k), visible


def spread(blocks: Blocks) -> Spread:
    """The spread of the sets of one sequence."""
    rows = keys = 0
    united, chosen = (dict.fromkeys(NEIGHBOURS, 0) for _ in range(2))
    filled, possible = (dict.fromkeys(TILES, 0) for _ in range(2))
    for mask, visible in blocks:
        rows, keys = rows + len(mask), keys + int(mask.sum())
        choosing = mask.sum(-1) < visible.sum(-1)
        for n in NEIGHBOURS:
            groups = len(mask) // n
            whole = choosing[: groups * n].view(groups, n).all(-1)
            sets = mask[: groups * n].view(groups, n, mask.shape[-1])[whole]
            united[n] += int(sets.any(1).sum()) * n
            chosen[n] += int(sets.sum())
        for tile in TILES:
            filled[tile] += int(occupied(mask, tile).sum())
            possible[tile] += int(occupied(visible, tile).sum())
    return Spread(
        keys / rows,
        {n: united[n] / chosen[n] for n in NEIGHBOURS if chosen[n]},
        {tile: 1 - filled[tile] / possible[tile] for tile in TILES},
    )


def occupied(mask: torch.Tensor, tile: tuple[int, int]) -> torch.Tensor:
    """(tiles of queries, tiles of keys) bool: whether a tile of `mask`, (queries, keys) bool, has a True element."""
    rows, columns = (-(-size // t) * t for size, t in zip(mask.shape, tile, strict=True))
    padded = mask.new_zeros(rows, columns)
    padded[: mask.shape[0], : mask.shape[1]] = mask
    return padded.view(rows // tile[0], tile[0], columns // tile[1], tile[1]).any(1).any(-1)


def mean_spread(parts: list[Spread]) -> Spread:
    """The mean over sequences. A number of neighbours that no sequence is long enough for is left out."""

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    sizes = [n for n in NEIGHBOURS if any(n in p.union for p in parts)]
    return Spread(
        mean([p.k for p in parts]),
        {n: mean([p.union[n] for p in parts if n in p.union]) for n in sizes},
        {tile: mean([p.empty[tile] for p in parts]) for tile in TILES},
    )


def coverage_table(trained: list[Coverage], untrained: list[Coverage]) -> str:
    """A markdown table, one line per layer, with the mean and the worst ratio of the layers."""
    lines = [
        "| layer | covered | oracle | covered / oracle | recall | untrained indexer / oracle | its recall |",
        "|---|---|---|---|---|---|---|",
    ]
    for i, (ours, random) in enumerate(zip(trained, untrained, strict=True)):
        lines.append(
            f"| {i} | {ours.covered:.3f} | {ours.oracle:.3f} | {ours.of_oracle:.3f} | {ours.recall:.3f} "
            f"| {random.of_oracle:.3f} | {random.recall:.3f} |"
        )
    ratios, chance = [c.of_oracle for c in trained], [c.of_oracle for c in untrained]
    lines.append(f"| mean | | | {sum(ratios) / len(ratios):.3f} | | {sum(chance) / len(chance):.3f} | |")
    lines.append(f"| worst | | | {min(ratios):.3f} | | {min(chance):.3f} | |")
    return "\n".join(lines)


def spread_table(selected: list[Spread], by_chance: list[Spread]) -> str:
    """A markdown table, two lines per layer: selected sets and random sets."""
    sizes = [n for n in NEIGHBOURS if n in selected[0].union]
    head = [f"union/k, {n}" for n in sizes] + [f"empty {m} x {n}" for m, n in TILES]
    lines = ["| layer | sets | k | " + " | ".join(head) + " |", "|" + "---|" * (3 + len(head))]
    for i, pair in enumerate(zip(selected, by_chance, strict=True)):
        for name, layer in zip(("selected", "random"), pair, strict=True):
            cells = [f"{layer.union.get(n, float('nan')):.2f}" for n in sizes]
            cells += [f"{layer.empty[tile]:.1%}" for tile in TILES]
            lines.append(f"| {i} | {name} | {layer.k:.1f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
