"""The identities of docs/gsa.md, 9, for whole models on both PyTorch backends, and wrong layers on which they fail; then
sections 4, 5 and 8 in numbers. tests/gsa/kernels/test_triton_identities.py has the Triton backend.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import kernel_contract as checks
from support.kernel_contract import (
    KINDS,
    TINY,
    WRONG,
    Size,
    Way,
    at_random_sizes,
    check_is_caught,
    make,
    one_thread,  # noqa: F401
    tokens_of,
    trials,
)

from gsa import kernels
from gsa.attention import probe, selection
from gsa.attention.cache import Cache
from gsa.attention.probe import PROBES, largest
from gsa.kernels import chunked, reference

T = 41
PLAIN = Size(cut=None)
WAYS = {"reference": Way("reference", reference), "chunked": Way("chunked", chunked)}


@pytest.fixture(params=WAYS, scope="module")
def way(request) -> Way:
    """With chunks of 8 queries, so that these short sequences have several, and a shorter last one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "CHUNK", 8)
        yield WAYS[request.param]


# -- 1 to 8 ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode, group, tied", KINDS)
@pytest.mark.parametrize(
    "check",
    [
        checks.check_no_future,
        checks.check_rows_are_alone,
        checks.check_documents_are_alone,
        checks.check_open_gates,
        checks.check_decoding,
    ],
)
def test_identity(check, way, mode, group, tied):
    at_random_sizes(check, way, mode, group, tied)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", ["dense", "sparse"])
@pytest.mark.parametrize(
    "check", [checks.check_all_keys_are_dense_attention, checks.check_who_learns_from_what, checks.check_recomputing]
)
def test_identity_in_either_stage(check, way, stage, kind):
    at_random_sizes(lambda way, size: check(way, size, stage), way, *kind, examples=2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", ["dense", "sparse"])
def test_losses_and_gradients_equal_those_on_the_reference(stage, kind):
    at_random_sizes(
        lambda way, size: checks.check_as_the_reference(way, size, stage), WAYS["chunked"], *kind, examples=2
    )


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_layer_is_caught(fault, way):
    check_is_caught(fault, way)


def test_selection_and_gates_change_the_output(way):
    """The identities about limits (all keys, open gates) would also hold if selection and gates had no effect."""
    tokens = tokens_of(way, PLAIN)
    few = checks.logits_of(make(way), tokens)
    for changes in ({"sparse": False}, {"value_gate": False}, {"output_gate": False}):
        other = make(way, **changes)
        other.load_state_dict(make(way).state_dict(), strict=False)
        assert (checks.logits_of(other, tokens) - few).abs().max() > 1e-3


def test_parts_that_are_off_have_no_parameters(way):
    model = make(way, sparse=False, value_gate=False, output_gate=False)
    names = " ".join(name for name, _ in model.named_parameters())
    assert "indexer" not in names and "gate." not in names.replace("ffn.gate_proj", "")
    out = checks.losses_of(way, model, PLAIN)
    assert out.indexer_loss == 0 and out.loss > 0


def test_the_alignment_loss_falls_when_trained_and_covers_the_sampled_rows_only(way):
    way = replace(way, dtype=torch.float32)
    model = make(way)
    model.set_stage("dense")
    tokens = tokens_of(way, PLAIN, rows=4)
    indexer = [p for n, p in model.named_parameters() if ".indexer." in n]
    optimizer = torch.optim.Adam(indexer, lr=1e-2)
    first = model(tokens, tokens).indexer_loss.item()
    for _ in range(60):
        optimizer.zero_grad()
        model(tokens, tokens).indexer_loss.backward()
        optimizer.step()
    assert model(tokens, tokens).indexer_loss.item() < 0.5 * first
    rows = torch.tensor([3, 17, 30])
    each = [model(tokens, tokens, indexer_rows=rows[i : i + 1]).indexer_loss.item() for i in range(3)]
    assert model(tokens, tokens, indexer_rows=rows).indexer_loss.item() == pytest.approx(sum(each) / 3, rel=1e-5)
    assert len({round(e, 6) for e in each}) == 3


def test_decoding_a_dense_model(way):
    checks.check_decoding(way, Size(group=4), sparse=False)


def test_saved_results_serve_a_second_backward_pass(way):
    model = make(way)
    model.set_activation_checkpointing("block")
    out = checks.losses_of(way, model, Size())
    first, second = (checks.gradients_of(model, out.loss + out.indexer_loss)[0] for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_cache_is_linear_in_its_length_and_refuses_more(way):
    sizes = [Cache(TINY, 2, n).bytes for n in (8, 16, 32)]
    assert sizes[1] == 2 * sizes[0] and sizes[2] == 4 * sizes[0]
    assert sizes[0] == 2 * 8 * TINY.n_layers * (2 * TINY.n_kv_heads * TINY.d_head + TINY.d_indexer) * 4
    with pytest.raises(ValueError, match="65.*max_position_embeddings=64"):
        Cache(TINY, 1, 65)
    model, cache = make(replace(way, dtype=torch.float32)), Cache(TINY, 2, 8)
    tokens = tokens_of(way, PLAIN, rows=2)
    with pytest.raises(ValueError, match=r"torch.no_grad\(\)"):
        model(tokens[:, :4], cache=cache)
    with torch.no_grad(), pytest.raises(ValueError, match="41 tokens are more than the cache's capacity=8"):
        model(tokens, cache=cache)


# -- 7: precision ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-4), (torch.bfloat16, 0.15)])
def test_lower_precision_stays_near_float64(dtype, bound, way):
    exact, rough = make(way), make(replace(way, dtype=dtype))
    for model in (exact, rough):
        model.set_stage("dense")  # in the sparse stage a rounded score may flip a key
    rough.load_state_dict(exact.state_dict())
    wanted, found = (checks.logits_of(model, tokens_of(way, PLAIN)).double() for model in (exact, rough))
    assert (wanted - found).abs().max() / wanted.abs().max() < bound


def test_v_ref_stays_float32_in_a_bf16_model(way):
    model = make(way)
    model.update_v_ref(torch.tensor([[0.0012345678, 1.0]] * 2))
    before = [b.clone() for n, b in model.named_buffers() if n.endswith("v_ref")]
    model.to(torch.bfloat16)
    assert all(torch.equal(b.float(), a.float()) for (n, b), a in zip(model.named_buffers(), before, strict=True))
    assert {b.dtype for n, b in model.named_buffers() if n.endswith("v_ref")} == {torch.float32}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


# -- 9 in one process: parts of a batch add up ----------------------------------------------------------


def test_two_halves_with_the_whole_count_give_the_whole_gradient(way):
    model = make(way)
    tokens, targets = tokens_of(way, PLAIN, rows=4), tokens_of(way, PLAIN, rows=4, offset=5)
    targets[0, 3:] = -100  # unequal halves: a mean of means would be wrong
    whole = (targets >= 0).sum()
    model(tokens, targets).loss.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for half in (slice(0, 2), slice(2, 4)):
        model(tokens[half], targets[half], n_targets=whole).loss.backward()
    for name, p in model.named_parameters():
        if name in wanted:
            torch.testing.assert_close(p.grad, wanted[name], rtol=1e-9, atol=1e-12)


def test_the_loss_without_targets_is_zero(way):
    out = make(way)(tokens_of(way, PLAIN), torch.full((1, T), -100))
    assert out.loss == 0


# -- section 4: how many keys ---------------------------------------------------------------------------


def test_v_ref_is_assigned_then_decays_and_ignores_empty_batches():
    selector = selection.Selector(TINY)
    selector.update_v_ref(torch.tensor(0.0), torch.tensor(0.0))
    assert selector.v_ref == 0
    selector.update_v_ref(torch.tensor(6.0), torch.tensor(3.0))
    assert selector.v_ref == 2
    selector.update_v_ref(torch.tensor(1.0), torch.tensor(1.0))
    assert float(selector.v_ref) == pytest.approx(0.99 * 2 + 0.01)
    selector.update_v_ref(torch.tensor(0.0), torch.tensor(0.0))
    assert float(selector.v_ref) == pytest.approx(1.99)


def test_forward_measures_and_does_not_move_v_ref(way):
    model, tokens = make(way), tokens_of(way, PLAIN, rows=2)
    before = model.state_dict()["layers.0.attention.selector.v_ref"].clone()
    stats = model.train()(tokens, tokens).selection_stats
    assert torch.equal(model.state_dict()["layers.0.attention.selector.v_ref"], before)
    assert stats[:, 1].tolist() == [2 * (T - 1)] * 2  # positions that see more than one key, over the batch
    halves = [model(tokens[i : i + 1], tokens[i : i + 1]).selection_stats for i in (0, 1)]
    torch.testing.assert_close(halves[0] + halves[1], stats)


@pytest.mark.parametrize("scale, k", [(0.0, 9), (1.0, 6), (3.0, 4), (1e9, 3)])
def test_flat_scores_select_more_keys(scale, k):
    """m = 1/2 + 1/(1 + v / v_ref) is 1.5 for flat scores, 1 at v_ref and 1/2 for very sharp scores."""
    n, v_ref = torch.tensor([40]), torch.tensor(0.25)
    variance = torch.tensor([0.25 * scale])
    assert reference.keys_per_query(n, variance, v_ref, kernels.SelectionRule("variance", 1.0, 6, 1, 30)).item() == k


def index_of(scores: torch.Tensor) -> kernels.Index:
    """An index whose scores are, in float64, `scores` (B, T, S), between 0 and 2: one head for each position."""
    B, T, S = scores.shape
    gate = (scores / 2).clamp(1e-12, 1 - 1e-12).double()
    one_hot = torch.eye(S, dtype=torch.float64).expand(B, S, S)
    q = torch.logit(gate)[:, :, None].expand(B, T, 2, S) * S**0.5
    return kernels.Index(q, one_hot, torch.full((B, T, 2), 40.0).double(), torch.zeros(2).double())


def selected(way, scores: torch.Tensor, doc_start=None, mode="off", v_ref=0.0, k_base=6, k_min=2, k_max=10):
    """mask (B, T, S) and k that a backend chooses, for given scores."""
    choice = kernels.select(
        way.backend,
        index_of(scores),
        torch.tensor(4.0),
        torch.tensor(v_ref),
        doc_start,
        kernels.SelectionRule(mode, 1.0, k_base, k_min, k_max),
    )
    S = scores.shape[-1]
    if choice.bits is None:
        start = torch.zeros(scores.shape[:2]).long() if doc_start is None else doc_start
        return kernels.visible_keys(start, S), choice.k
    return kernels.unpack(choice.bits, S), choice.k


def test_an_unset_v_ref_gives_k_base_and_bounds_hold(way):
    _, k = selected(way, torch.rand(1, T, T), mode="variance")
    assert k[0].tolist() == [min(t + 1, 6) for t in range(T)]
    _, k = selected(way, torch.ones(1, T, T), mode="entropy")
    assert k[0].tolist() == [min(t + 1, 9 if t else 6) for t in range(T)]  # uniform: m = 3/2
    _, k = selected(way, torch.ones(1, T, T), mode="entropy", k_max=8)
    assert k.max() == 8


# -- section 5: which keys ------------------------------------------------------------------------------


def by_hand(scores: list[float], visible: list[int], k: int, heads: int) -> set[int]:
    ranked = sorted(visible, key=lambda s: (-int(scores[s] * (65535 / heads)), -s))
    return set(ranked[:k])


@trials(60)
@given(
    data=st.data(),
    length=st.integers(1, 45),
    queries=st.integers(1, 45),
    k=st.integers(1, 45),
    levels=st.sampled_from([1, 2, 5, 100000]),
)
def test_the_selected_set_is_exact_and_ties_go_to_the_more_recent_key(way, data, length, queries, k, levels):
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    queries = min(queries, length)  # the last of them, as in decoding
    scores = (torch.randint(0, levels, (1, queries, length), generator=random).double() + 0.5) / levels * 2
    starts = torch.randint(0, length, (1, queries), generator=random).sort().values
    starts = starts.minimum(torch.arange(length - queries, length))
    mask, chosen = selected(way, scores, starts, k_base=k, k_min=k, k_max=k)
    for t in range(queries):
        visible = list(range(int(starts[0, t]), length - queries + t + 1))
        assert chosen[0, t] == min(k, len(visible))
        wanted = by_hand(scores[0, t].tolist(), visible, k, 2)
        assert set(mask[0, t].nonzero().flatten().tolist()) == wanted


@trials(40)
@given(rows=st.integers(1, 9), width=st.integers(1, 130), seed=st.integers(0, 999))
def test_packing_is_lossless(rows, width, seed):
    mask = torch.rand(2, rows, width, generator=torch.Generator().manual_seed(seed)) < 0.5
    bits = kernels.pack(mask)
    assert bits.dtype == torch.int32 and bits.shape == (2, rows, -(-width // 32))
    assert torch.equal(kernels.unpack(bits, width), mask)
    assert torch.equal(chunked._pack(mask), bits)


def test_the_oracle_is_exact_beside_an_attention_sink():
    """A sink of 0.99 leaves 0.01 for the other keys: in steps of 1/65535 of the sink many of them would tie."""
    random = torch.Generator().manual_seed(0)
    rest = torch.rand(1, 1, 999, generator=random, dtype=torch.float64).square()
    p = torch.cat([torch.tensor([[[0.99]]]).double(), 0.01 * rest / rest.sum()], -1)
    seen, size = torch.ones(1, 1, 1000, dtype=torch.bool), torch.tensor([[40]])
    exact = set(sorted(range(1000), key=lambda s: -p[0, 0, s].item())[:40])
    assert set(largest(p, seen, size)[0, 0].nonzero().flatten().tolist()) == exact
    by_level = kernels.top_keys(p / p.amax(-1, keepdim=True), seen, size, 1)[0, 0]
    assert set(by_level.nonzero().flatten().tolist()) != exact
    seen[..., :500] = False
    assert largest(p, seen, size)[0, 0].nonzero().min() >= 500


def test_a_probe_does_not_depend_on_its_blocks_of_rows(way, monkeypatch):
    model, rows = make(way, Size(length=T)), torch.arange(1, T, 2)
    with torch.no_grad():
        tokens, start = tokens_of(way, Size()), checks.starts_of(way, Size())
        whole = model(tokens, doc_start=start, probe_rows=rows).probe
        monkeypatch.setattr(probe, "BLOCK", 7)
        assert torch.equal(model(tokens, doc_start=start, probe_rows=rows).probe, whole)
    coverage, oracle, recall = whole[:, [PROBES.index(n) for n in ("coverage", "oracle", "recall")]].unbind(1)
    assert (0 < coverage).all() and (coverage < oracle).all() and (oracle < 1).all() and (recall < 1).all()


def test_repeated_tokens_tie_and_the_recent_ones_win(way):
    model = make(replace(way, n_layers=1), Size("off", tied=True))
    choices = []
    selector = model.layers[0].attention.selector
    selector.register_forward_hook(lambda module, inputs, choice: choices.append(choice))
    model(torch.full((1, T), 5))
    chosen = kernels.unpack(choices[0].bits, T)
    assert chosen[0, 30].nonzero().flatten().tolist() == [25, 26, 27, 28, 29, 30]
