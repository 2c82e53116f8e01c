"""Measures of what an indexer selects: numbers worked out by hand, chance, and memory."""

from __future__ import annotations

import pytest
import torch
from support.kernel_contract import one_thread  # noqa: F401
from torch.utils._python_dispatch import TorchDispatchMode

from gsa import GSAForCausalLM, ModelConfig
from gsa.inspection import BLOCK, NEIGHBOURS, TILES, Spread, measure_coverage, measure_spread, occupied
from gsa.inspection import spread as spread_of_blocks


def spread(mask: torch.Tensor, visible: torch.Tensor) -> Spread:
    return spread_of_blocks(zip(mask.split(BLOCK), visible.split(BLOCK), strict=True))


def test_union_and_empty_tiles_by_hand():
    T = 8
    visible = torch.ones(T, T, dtype=torch.bool).tril()
    mask = torch.eye(T, dtype=torch.bool)
    mask[:, 0] = True  # row 0 has one key, all others two: itself and the first
    found = spread(mask, visible)
    assert found.k == pytest.approx(15 / 8)
    # row 1 sees two keys and selects both: rows 2..7 choose, pairs (2,3), (4,5), (6,7) have 3 keys of 2 each
    assert found.union == {2: pytest.approx(3 / 2), 4: pytest.approx(5 / 2)}  # 4..7: five keys


def test_tiles_are_counted_where_something_is_visible():
    mask = torch.zeros(100, 100, dtype=torch.bool)
    mask[99, 0] = True
    assert occupied(mask, (16, 64)).nonzero().tolist() == [[6, 0]]
    assert occupied(mask, (128, 128)).tolist() == [[True]]
    visible = torch.ones(128, 128, dtype=torch.bool).tril()
    assert spread(visible, visible).empty == {(16, 64): 0, (64, 64): 0, (128, 128): 0}
    assert spread(torch.eye(128, dtype=torch.bool), visible).empty[64, 64] == pytest.approx(1 / 3)


def test_blocks_add_up_to_the_whole():
    assert all(BLOCK % n == 0 for n in NEIGHBOURS) and all(BLOCK % rows == 0 for rows, _ in TILES)
    visible = torch.ones(300, 300, dtype=torch.bool).tril()
    mask = visible & (torch.rand(300, 300, generator=torch.Generator().manual_seed(0)) < 0.1)
    in_blocks, whole = spread(mask, visible), spread_of_blocks(iter([(mask, visible)]))
    assert in_blocks == whole and list(whole.union) == list(NEIGHBOURS)


def long_model(length: int) -> tuple[GSAForCausalLM, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = GSAForCausalLM(
        ModelConfig(
            d_model=16,
            n_layers=1,
            n_heads=1,
            n_kv_heads=1,
            d_head=8,
            d_ffn=16,
            vocab_size=16,
            d_indexer=8,
            n_indexer_heads=1,
            k_base=16,
            k_min=16,
            k_max=16,
            adaptive_k="off",
            max_position_embeddings=length,
        )
    )
    start = torch.where(torch.arange(length) < 100, 0, 100)[None]
    return model, torch.randint(0, 16, (1, length)), start


class Largest(TorchDispatchMode):
    """Remembers the size in bytes of the largest tensor that any operation made."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for x in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(x, torch.Tensor) and 0 not in x.stride():  # an expanded view takes no memory
                self.bytes = max(self.bytes, x.numel() * x.element_size())
        return made


def test_no_tensor_grows_with_the_square_of_the_length():
    """Twice the length, about twice the largest tensor: of float32, (T, T) would be four times as large."""
    largest = []
    for length in (512, 1024):
        model, tokens, start = long_model(length)
        with Largest() as made:
            measure_coverage(model, [(tokens, start)])
            selected, by_chance = measure_spread(model, [(tokens, start)])
        largest.append(made.bytes)
        assert selected[0].k == by_chance[0].k and 15 < selected[0].k < 16
    assert largest[1] <= 2.2 * largest[0]


def test_random_sets_spread_as_chance_says():
    T, k = 256, 16
    visible = torch.ones(T, T, dtype=torch.bool).tril()
    random = torch.Generator().manual_seed(0)
    scores = torch.rand(T, T, generator=random).masked_fill(~visible, -1)
    mask = torch.zeros(T, T, dtype=torch.bool).scatter(1, scores.topk(k, 1).indices, True) & visible
    found = spread(mask, visible).union
    # a key is missed by n rows with (1 - k/t)^n
    for n in (4, 32):
        groups = [torch.arange(g, g + n) + 1 for g in range(0, T, n) if g >= k]
        expected = []
        for sizes in groups:
            keys = torch.arange(int(sizes[-1]))
            missed = torch.where(keys[None] < sizes[:, None], 1 - k / sizes[:, None], 1.0).prod(0)
            expected.append((1 - missed).sum() / k)
        assert found[n] == pytest.approx(torch.stack(expected).mean().item(), rel=0.02)
