"""What the indexer of a checkpoint selects: `python -m training.selected_sets outputs/quickstart`.

First whether it selects well: the dense attention mass that the selected keys cover, beside what as many best keys (the
oracle) and an untrained indexer in its place would cover. Then what decides which kernel pays at long context: over how
many keys neighbouring queries spread (union/k), and the share of tiles of the causal triangle in which nothing is
selected, both beside random sets of the same size. Held-out windows; queries that see no more keys than they may
select are left out.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from gsa import GSAForCausalLM, kernels
from gsa.attention.probe import PROBES, largest
from gsa.checkpoint import manifest
from gsa.checkpoint.manifest import CheckpointError
from gsa.checkpoint.state import read_config_json
from gsa.generation import check_device, load_model
from training.data import Batch, DataError, PackedTokens

NEIGHBOURS = (2, 4, 8, 16, 32, 64, 128)
TILES = ((16, 64), (64, 64), (128, 128))
BLOCK = 128
"""Queries whose sets exist as masks at a time: a multiple of all of NEIGHBOURS, and of every tile's queries."""


@dataclass(frozen=True)
class Coverage:
    """Of one layer: shares of dense attention mass, and of the oracle's keys that were selected."""

    covered: float
    oracle: float
    recall: float

    @property
    def of_oracle(self) -> float:
        return self.covered / self.oracle


@dataclass(frozen=True)
class Spread:
    """Of one layer: mean k; union/k by number of neighbouring queries; share of empty tiles by (queries, keys)."""

    k: float
    union: dict[int, float]
    empty: dict[tuple[int, int], float]


def measure_coverage(model: GSAForCausalLM, batches: list[Batch]) -> list[Coverage]:
    """Every layer's, averaged over the first sequence of each batch."""
    device = model.embed.weight.device
    found = []
    with torch.no_grad():
        for batch in (b.to(device) for b in batches):
            rows = torch.arange(batch.tokens.shape[1], device=device)
            found.append(model(batch.tokens, doc_start=batch.doc_start, probe_rows=rows, last_only=True).probe)
    mean = torch.stack(found).nanmean(0)
    at = [PROBES.index(name) for name in ("coverage", "oracle", "recall")]
    return [Coverage(*(layer[i].item() for i in at)) for layer in mean]


def with_untrained_indexer(model: GSAForCausalLM, batches: list[Batch], seed: int = 0) -> GSAForCausalLM:
    """A copy whose indexers are new, with the running variance that they would have found on these batches."""
    other = copy.deepcopy(model)
    torch.manual_seed(seed)
    fresh = GSAForCausalLM(model.config)
    for ours, new in zip(other.layers, fresh.layers, strict=True):
        ours.attention.indexer.load_state_dict(new.attention.indexer.state_dict())
        ours.attention.selector.v_ref.zero_()
    with torch.no_grad():
        moved = (batch.to(model.embed.weight.device) for batch in batches)
        stats = [other(batch.tokens, doc_start=batch.doc_start, last_only=True).selection_stats for batch in moved]
    other.update_v_ref(torch.stack(stats).sum(0))
    return other


def measure_spread(model: GSAForCausalLM, batches: list[Batch]) -> tuple[list[Spread], list[Spread]]:
    """Every layer's selected sets, and random sets of the same sizes among the visible keys.

    A layer's sets are measured as soon as it has made them, BLOCK queries at a time: nothing of size T x T is held.
    """
    device = model.embed.weight.device
    random = torch.Generator(device).manual_seed(0)
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
            for batch in (b.to(device) for b in batches):
                model(batch.tokens, doc_start=batch.doc_start, last_only=True)
    finally:
        for hook in hooks:
            hook.remove()
    return [mean_spread(layer) for layer in selected], [mean_spread(layer) for layer in by_chance]


Blocks = Iterator[tuple[torch.Tensor, torch.Tensor]]
"""Of one sequence, BLOCK queries after BLOCK queries: the selected and the visible keys, each (up to BLOCK, T) bool."""


def selected_blocks(choice: kernels.Selection, doc_start: torch.Tensor, row: int) -> Blocks:
    s = torch.arange(doc_start.shape[1], device=doc_start.device)
    for part in s.split(BLOCK):
        seen = (s <= part[:, None]) & (s >= doc_start[row, part, None])
        yield seen if choice.bits is None else kernels.unpack(choice.bits[row, part], len(s)), seen


def random_blocks(choice: kernels.Selection, doc_start: torch.Tensor, row: int, random: torch.Generator) -> Blocks:
    for (_, seen), k in zip(selected_blocks(choice, doc_start, row), choice.k[row].split(BLOCK), strict=True):
        yield largest(torch.rand(seen.shape, generator=random, device=seen.device), seen, k), seen


def spread(blocks: Blocks) -> Spread:
    """Of the selected and visible keys of one sequence."""
    rows = keys = 0
    united, chosen = (dict.fromkeys(NEIGHBOURS, 0) for _ in range(2))
    filled, possible = (dict.fromkeys(TILES, 0) for _ in range(2))
    for mask, seen in blocks:
        rows, keys = rows + len(mask), keys + int(mask.sum())
        choosing = mask.sum(-1) < seen.sum(-1)
        for n in NEIGHBOURS:
            groups = len(mask) // n
            whole = choosing[: groups * n].view(groups, n).all(-1)
            sets = mask[: groups * n].view(groups, n, mask.shape[-1])[whole]
            united[n] += int(sets.any(1).sum()) * n
            chosen[n] += int(sets.sum())
        for tile in TILES:
            filled[tile] += int(occupied(mask, tile).sum())
            possible[tile] += int(occupied(seen, tile).sum())
    return Spread(
        keys / rows,
        {n: united[n] / chosen[n] for n in NEIGHBOURS if chosen[n]},
        {tile: 1 - filled[tile] / possible[tile] for tile in TILES},
    )


def occupied(mask: torch.Tensor, tile: tuple[int, int]) -> torch.Tensor:
    """(tiles of queries, tiles of keys) bool: is anything in the tile."""
    rows, columns = (-(-size // t) * t for size, t in zip(mask.shape, tile, strict=True))
    padded = mask.new_zeros(rows, columns)
    padded[: mask.shape[0], : mask.shape[1]] = mask
    return padded.view(rows // tile[0], tile[0], columns // tile[1], tile[1]).any(1).any(-1)


def mean_spread(parts: list[Spread]) -> Spread:
    """Of several sequences; a number of neighbours that no sequence had room for is left out."""

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    sizes = [n for n in NEIGHBOURS if any(n in p.union for p in parts)]
    return Spread(
        mean([p.k for p in parts]),
        {n: mean([p.union[n] for p in parts if n in p.union]) for n in sizes},
        {tile: mean([p.empty[tile] for p in parts]) for tile in TILES},
    )


def coverage_table(trained: list[Coverage], untrained: list[Coverage]) -> str:
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
    sizes = [n for n in NEIGHBOURS if n in selected[0].union]
    head = [f"union/k, {n}" for n in sizes] + [f"empty {m} x {n}" for m, n in TILES]
    lines = ["| layer | sets | k | " + " | ".join(head) + " |", "|" + "---|" * (3 + len(head))]
    for i, pair in enumerate(zip(selected, by_chance, strict=True)):
        for name, layer in zip(("selected", "random"), pair, strict=True):
            cells = [f"{layer.union.get(n, float('nan')):.2f}" for n in sizes]
            cells += [f"{layer.empty[tile]:.1%}" for tile in TILES]
            lines.append(f"| {i} | {name} | {layer.k:.1f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def held_out(sources: dict[str, float], seq_len: int, windows: int) -> list[Batch]:
    """The first `windows` held-out windows of prepared data, one to a batch. DataError when it cannot be read."""
    data = PackedTokens(sources, split="held_out", max_seq_len=seq_len, seed=0)
    return [data.batch(np.array([i])) for i in range(min(windows, data.n_windows))]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="training.selected_sets", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a run folder (its latest checkpoint) or a step_N folder")
    parser.add_argument("--data", type=Path, help="folder of prepared data (default: that of the run)")
    parser.add_argument("--max_seq_len", type=int, help="tokens per window (default: that of the run)")
    parser.add_argument("--windows", type=int, default=8, help="held-out windows (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="where the model runs, as cuda (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        if args.windows < 1:
            raise ValueError(f"--windows {args.windows} must be at least 1")
        check_device(args.device)
    except ValueError as err:
        print(f"error: {err}", file=sys.stderr)
        return 2
    try:
        step_dir = args.run if args.run.name.startswith("step_") else manifest.resolve("latest", args.run)
        model = load_model(step_dir, args.device)
        if not model.config.sparse:
            raise CheckpointError(f"{step_dir} holds a dense model (model.sparse=false): nothing selects keys in it")
        plain = read_config_json(step_dir)
        length = args.max_seq_len or plain["training"]["max_seq_len"]
        if length > model.config.max_position_embeddings:
            raise CheckpointError(
                f"--max_seq_len {length} is more than the model's max_position_embeddings="
                f"{model.config.max_position_embeddings}"
            )
        own = plain["data"]["mixture"] or {plain["data"]["data_dir"]: 1.0}
        batches = held_out({str(args.data): 1.0} if args.data else own, length, args.windows)
    except (CheckpointError, DataError) as err:
        print(f"error: {err}", file=sys.stderr)
        return 3
    print(f"{step_dir.name}: {len(batches)} held-out windows of {length} tokens, k_base {model.config.k_base}\n")
    trained = measure_coverage(model, batches)
    untrained = measure_coverage(with_untrained_indexer(model, batches), batches)
    print(coverage_table(trained, untrained) + "\n")
    print(spread_table(*measure_spread(model, batches)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
