"""The identities of docs/gsa.md, 9, on whole models and every backend in PyTorch; and wrong layers that each check
is shown to catch. tests/gsa/kernels/test_triton.py has the Triton backend's.

k is far below T throughout: many faults vanish when every key is selected.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gsa import GSAForCausalLM, ModelConfig, kernels
from gsa.attention import selection
from gsa.attention.cache import Cache, LayerCache
from gsa.attention.gates import Gate
from gsa.attention.indexer import Indexer
from gsa.kernels import chunked, reference

T = 37
TINY = ModelConfig(
    d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ffn=48, vocab_size=61, max_position_embeddings=64,
    init_std=0.2, d_indexer=8, n_indexer_heads=2, k_base=6, k_min=2, k_max=10, tie_embeddings=False,
)  # fmt: skip
MODES = ("off", "variance", "entropy")
BACKEND = "chunked"


@pytest.fixture(params=["reference", "chunked"], autouse=True, scope="module")
def backend(request):
    """What `make` builds with. Chunks of 8 queries, so that these short sequences have several, and ragged ones."""
    global BACKEND
    BACKEND, saved = request.param, chunked.CHUNK
    chunked.CHUNK = 8
    yield BACKEND
    chunked.CHUNK = saved


def make(seed: int = 0, dtype: torch.dtype = torch.float64, **changes) -> GSAForCausalLM:
    torch.manual_seed(seed)
    model = GSAForCausalLM(replace(TINY, **changes)).to(dtype)
    model.set_backend(BACKEND)
    # a settled v_ref, so that the variance rule is at work
    model.update_v_ref(torch.tensor([[0.002, 1.0]] * model.config.n_layers))
    return model


def some_tokens(rows: int = 2, length: int = T, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 61, (rows, length), generator=torch.Generator().manual_seed(seed))


def two_documents(rows: int = 2, cut: int = 20, length: int = T) -> torch.Tensor:
    return torch.where(torch.arange(length) < cut, 0, cut).expand(rows, length).contiguous()


def check_no_future(model: GSAForCausalLM, t: int = 22) -> None:
    tokens = some_tokens()
    later = tokens.clone()
    later[:, t + 1 :] = (later[:, t + 1 :] + 7) % 61
    assert torch.equal(model(tokens).logits[:, : t + 1], model(later).logits[:, : t + 1])


def check_rows_are_alone(model: GSAForCausalLM) -> None:
    tokens = some_tokens(rows=3)
    other = tokens.clone()
    other[1:] = 5
    torch.testing.assert_close(model(tokens).logits[0], model(other).logits[0], rtol=0, atol=1e-12)


def check_documents_are_alone(model: GSAForCausalLM, cut: int = 20) -> None:
    tokens, start = some_tokens(), two_documents(cut=cut)
    packed = model(tokens, doc_start=start).logits
    torch.testing.assert_close(packed[:, cut:], model(tokens[:, cut:]).logits, rtol=0, atol=1e-10)
    torch.testing.assert_close(packed[:, :cut], model(tokens[:, :cut]).logits, rtol=0, atol=1e-10)


def gradients(model: GSAForCausalLM, of: str, **kwargs) -> dict[str, torch.Tensor]:
    model.zero_grad()
    tokens = some_tokens()
    out = model(tokens, some_tokens(seed=2), **kwargs)
    getattr(out, of).backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def check_who_learns_from_what(model: GSAForCausalLM) -> None:
    language, alignment = gradients(model, "loss"), gradients(model, "indexer_loss")
    for name in language:
        indexer = ".indexer." in name
        assert bool(language[name].any()) is not indexer, name
        assert bool(alignment[name].any()) is indexer, name


# -- 1, 2: what a position may depend on ----------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_the_future_cannot_move_the_past(mode, training):
    check_no_future(make(adaptive_k=mode).train(training))


@pytest.mark.parametrize("mode", MODES)
def test_a_row_cannot_hear_its_neighbour(mode):
    check_rows_are_alone(make(adaptive_k=mode))


@pytest.mark.parametrize("mode", MODES)
def test_a_document_cannot_hear_what_is_packed_with_it(mode):
    check_documents_are_alone(make(adaptive_k=mode))


@settings(deadline=None, max_examples=15)
@given(
    length=st.integers(2, 41),
    cut=st.integers(1, 40),
    group=st.sampled_from([1, 2, 4, 8]),
    seed=st.integers(0, 99),
)
def test_documents_and_future_at_odd_sizes_and_every_group_size(length, cut, group, seed):
    cut = min(cut, length - 1)
    model = make(seed, n_heads=8, n_kv_heads=8 // group)
    tokens = some_tokens(1, length, seed)
    packed = model(tokens, doc_start=two_documents(1, cut, length)).logits
    torch.testing.assert_close(packed[:, cut:], model(tokens[:, cut:]).logits, rtol=0, atol=1e-10)
    torch.testing.assert_close(packed[:, :cut], model(tokens[:, :cut]).logits, rtol=0, atol=1e-10)


def swap(monkeypatch, name: str, wrong) -> None:
    """Puts wrong(honest) in the place of an operation, in the backend at work."""
    module, name = (reference, name) if BACKEND == "reference" else (chunked, CHUNKED_NAMES[name])
    monkeypatch.setattr(module, name, wrong(getattr(module, name)))


CHUNKED_NAMES = {"score_variance": "_variance", "visible": "_chunks", "top_keys": "_top_keys"}


def test_a_variance_over_the_batch_or_the_future_is_caught(monkeypatch):
    def over_all_positions(honest):
        return lambda scores, seen, *n: scores.var(-1, unbiased=False)

    with monkeypatch.context() as patch:
        swap(patch, "score_variance", over_all_positions)
        with pytest.raises(AssertionError):
            check_no_future(make(adaptive_k="variance", k_base=12, k_max=20))

    def relative_to_the_batch(honest):
        def wrong(*args):
            variance = honest(*args)
            return variance / variance.mean() * 0.002

        return wrong

    swap(monkeypatch, "score_variance", relative_to_the_batch)
    with pytest.raises(AssertionError):
        check_rows_are_alone(make(adaptive_k="variance", k_base=12, k_max=20))


def test_a_mask_that_forgets_documents_is_caught(monkeypatch):
    def forget(honest):
        if BACKEND == "reference":
            return lambda start, n_keys=None: honest(torch.zeros_like(start), n_keys)

        def chunks(T, S, doc_start, rows=None, *, device):
            start = None if doc_start is None else torch.zeros_like(doc_start)
            return honest(T, S, start, rows, device=device)

        return chunks

    swap(monkeypatch, "visible", forget)
    with pytest.raises(AssertionError):
        check_documents_are_alone(make())


def test_a_set_of_older_keys_on_ties_is_caught(monkeypatch):
    def oldest_first(honest):
        return lambda scores, seen, *rest: honest(scores.flip(-1), seen.flip(-1), *rest).flip(-1)

    swap(monkeypatch, "top_keys", oldest_first)
    with pytest.raises(AssertionError):
        check_repeated_tokens()


# -- 3, 5: what the layer becomes at its limits ---------------------------------------------------------


@pytest.mark.parametrize("start", [None, two_documents()])
def test_selecting_every_key_equals_dense_attention(start):
    sparse = make(k_min=T, k_base=T, k_max=T)
    dense = make(sparse=False)
    missing = dense.load_state_dict(sparse.state_dict(), strict=False)
    assert not missing.missing_keys
    ours, theirs = (gradients(model, "loss", doc_start=start) for model in (sparse, dense))
    torch.testing.assert_close(
        sparse(some_tokens(), doc_start=start).logits,
        dense(some_tokens(), doc_start=start).logits,
        rtol=0,
        atol=1e-10,
    )
    for name, grad in theirs.items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-9, atol=1e-12)
    few = make()
    few.load_state_dict(sparse.state_dict())
    assert (few(some_tokens()).logits - dense(some_tokens()).logits).abs().max() > 1e-3


def test_the_dense_stage_is_dense_attention():
    sparse, dense = make(), make(sparse=False)
    dense.load_state_dict(sparse.state_dict(), strict=False)
    sparse.set_stage("dense")
    torch.testing.assert_close(sparse(some_tokens()).logits, dense(some_tokens()).logits, rtol=0, atol=1e-10)


def test_gates_wide_open_equal_the_ungated_layer():
    gated = make()
    for module in gated.modules():
        if isinstance(module, Gate):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.constant_(module.bias, 100.0)
    plain = make(value_gate=False, output_gate=False)
    plain.load_state_dict(gated.state_dict(), strict=False)
    torch.testing.assert_close(gated(some_tokens()).logits, plain(some_tokens()).logits, rtol=0, atol=1e-12)
    assert (make()(some_tokens()).logits - make(value_gate=False)(some_tokens()).logits).abs().max() > 1e-3


def test_parts_that_are_off_have_no_parameters():
    names = " ".join(name for name, _ in make(sparse=False, value_gate=False, output_gate=False).named_parameters())
    assert "indexer" not in names and "gate." not in names.replace("ffn.gate_proj", "")
    out = make(sparse=False)(some_tokens(), some_tokens())
    assert out.indexer_loss == 0 and out.loss > 0


# -- 4: what each parameter learns from -----------------------------------------------------------------


@pytest.mark.parametrize("stage", ["dense", "sparse"])
@pytest.mark.parametrize("mode", MODES)
def test_every_parameter_learns_the_indexer_from_its_own_loss_alone(mode, stage):
    model = make(adaptive_k=mode)
    model.set_stage(stage)
    check_who_learns_from_what(model)


def test_an_indexer_that_teaches_the_rest_is_caught(monkeypatch):
    forward = Indexer.forward

    def undetached(self, x, cos, sin):
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "detach", lambda tensor: tensor)
            return forward(self, x, cos, sin)

    monkeypatch.setattr(Indexer, "forward", undetached)
    with pytest.raises(AssertionError):
        check_who_learns_from_what(make())


def test_alignment_loss_falls_when_trained_and_sees_only_the_sampled_rows():
    model = make(dtype=torch.float32)
    model.set_stage("dense")
    tokens = some_tokens(4)
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


# -- 6: decoding ----------------------------------------------------------------------------------------


def decoded(model: GSAForCausalLM, tokens: torch.Tensor, parts: list[int]) -> torch.Tensor:
    """Logits of `tokens` fed to a cache in parts."""
    cache = Cache(model.config, tokens.shape[0], tokens.shape[1], model.embed.weight.dtype)
    with torch.no_grad():
        return torch.cat([model(part, cache=cache).logits for part in tokens.split(parts, 1)], 1)


@settings(deadline=None, max_examples=12)
@given(
    mode=st.sampled_from(MODES), length=st.integers(2, 41), prompt=st.integers(1, 40),
    group=st.sampled_from([1, 2, 4, 8]), sparse=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_cached_decoding_equals_the_full_forward(mode, length, prompt, group, sparse, seed):
    prompt = min(prompt, length - 1)
    model = make(seed, adaptive_k=mode, n_heads=8, n_kv_heads=8 // group, sparse=sparse).eval()
    tokens = some_tokens(2, length, seed)
    tokens[:, ::3] = 5  # ties
    token_by_token = decoded(model, tokens, [prompt] + [1] * (length - prompt))
    torch.testing.assert_close(token_by_token, model(tokens).logits, rtol=0, atol=1e-10)
    in_two = decoded(model, tokens, [prompt, length - prompt])
    torch.testing.assert_close(in_two, model(tokens).logits, rtol=0, atol=1e-10)


def test_a_cache_without_the_indexers_older_keys_is_caught(monkeypatch):
    monkeypatch.setattr(LayerCache, "take_index", lambda cache, at, k: cache.index_k.zero_()[:, : at + k.shape[1]])
    model = make().eval()
    with pytest.raises(AssertionError):
        torch.testing.assert_close(
            decoded(model, some_tokens(), [20] + [1] * 17), model(some_tokens()).logits, rtol=0, atol=1e-10
        )


def test_a_cache_is_linear_in_its_length_and_refuses_more():
    sizes = [Cache(TINY, 2, n).bytes for n in (8, 16, 32)]
    assert sizes[1] == 2 * sizes[0] and sizes[2] == 4 * sizes[0]
    assert sizes[0] == 2 * 8 * TINY.n_layers * (2 * TINY.n_kv_heads * TINY.d_head + TINY.d_indexer) * 4
    with pytest.raises(ValueError, match="65.*max_position_embeddings=64"):
        Cache(TINY, 1, 65)
    model, cache = make(dtype=torch.float32), Cache(TINY, 2, 8)
    with pytest.raises(ValueError, match=r"torch.no_grad\(\)"):
        model(some_tokens(length=4), cache=cache)
    with torch.no_grad(), pytest.raises(ValueError, match="37 tokens are more than the cache's capacity=8"):
        model(some_tokens(), cache=cache)


# -- 7: precision ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-4), (torch.bfloat16, 0.15)])
def test_lower_precision_stays_near_float64(dtype, bound):
    exact, rough = make(), make(dtype=dtype)
    exact.set_stage("dense")
    rough.set_stage("dense")  # in the sparse stage a rounded score may flip a key
    rough.load_state_dict(exact.state_dict())
    difference = (exact(some_tokens()).logits - rough(some_tokens()).logits.double()).abs().max()
    assert difference / exact(some_tokens()).logits.abs().max() < bound


def test_v_ref_stays_float32_in_a_bf16_model():
    model = make()
    model.update_v_ref(torch.tensor([[0.0012345678, 1.0]] * 2))
    before = [b.clone() for n, b in model.named_buffers() if n.endswith("v_ref")]
    model.to(torch.bfloat16)
    assert all(torch.equal(b.float(), a.float()) for (n, b), a in zip(model.named_buffers(), before, strict=True))
    assert {b.dtype for n, b in model.named_buffers() if n.endswith("v_ref")} == {torch.float32}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


# -- 8: recomputation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["dense", "sparse"])
@pytest.mark.parametrize("mode", MODES)
def test_recomputing_changes_no_bit(mode, stage):
    plain, again = make(adaptive_k=mode, dtype=torch.float32), make(adaptive_k=mode, dtype=torch.float32)
    again.set_activation_checkpointing(True)
    for model in (plain, again):
        model.set_stage(stage)
    for of in ("loss", "indexer_loss"):
        ours, theirs = gradients(plain, of), gradients(again, of)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    one, two = (model(some_tokens(), some_tokens()) for model in (plain, again))
    assert torch.equal(one.selection_stats, two.selection_stats) and torch.equal(one.loss, two.loss)


def test_recomputing_selects_and_aligns_once(monkeypatch):
    if BACKEND == "reference":
        pytest.skip("the reference's alignment loss is plain autograd: what it would keep is its graph")
    calls = []
    for name in ("select", "alignment_kl"):
        honest = getattr(chunked, name)
        monkeypatch.setattr(chunked, name, lambda *x, name=name, honest=honest: [calls.append(name), honest(*x)][1])
    model = make()
    model.set_activation_checkpointing(True)
    out = model(some_tokens(), some_tokens())
    (out.loss + out.indexer_loss).backward(retain_graph=True)
    first = {n: p.grad.clone() for n, p in model.named_parameters()}
    assert sorted(calls) == ["alignment_kl"] * 2 + ["select"] * 2
    model.zero_grad()
    (out.loss + out.indexer_loss).backward()
    assert sorted(calls) == ["alignment_kl"] * 2 + ["select"] * 2
    assert all(torch.equal(first[n], p.grad) for n, p in model.named_parameters())


# -- 9 in one process: parts of a batch add up ----------------------------------------------------------


def test_two_halves_with_the_whole_count_give_the_whole_gradient():
    model = make()
    tokens, targets = some_tokens(4), some_tokens(4, seed=5)
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


def test_nothing_to_predict_is_a_loss_of_zero():
    out = make()(some_tokens(), torch.full((2, T), -100))
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


def test_forward_measures_and_does_not_move_v_ref():
    model = make()
    before = model.state_dict()["layers.0.attention.selector.v_ref"].clone()
    stats = model.train()(some_tokens(), some_tokens()).selection_stats
    assert torch.equal(model.state_dict()["layers.0.attention.selector.v_ref"], before)
    assert stats[:, 1].tolist() == [2 * (T - 1)] * 2  # positions that see more than one key, over the batch
    halves = [model(some_tokens()[i : i + 1], some_tokens()[i : i + 1]).selection_stats for i in (0, 1)]
    torch.testing.assert_close(halves[0] + halves[1], stats)


@pytest.mark.parametrize("scale, k", [(0.0, 9), (1.0, 6), (3.0, 4), (1e9, 3)])
def test_flat_scores_buy_more_keys(scale, k):
    """m = 1/2 + 1/(1 + v / v_ref): 1.5 for flat scores, 1 at the reference, 1/2 for very sharp ones."""
    n, v_ref = torch.tensor([40]), torch.tensor(0.25)
    variance = torch.tensor([0.25 * scale])
    assert reference.keys_per_query(n, variance, v_ref, "variance", 1.0, 6, 1, 30).item() == k


def index_of(scores: torch.Tensor) -> kernels.Index:
    """An index whose scores are, in float64, `scores` (B, T, S), between 0 and 2: one head for each position."""
    B, T, S = scores.shape
    gate = (scores / 2).clamp(1e-12, 1 - 1e-12).double()
    one_hot = torch.eye(S, dtype=torch.float64).expand(B, S, S)
    q = torch.logit(gate)[:, :, None].expand(B, T, 2, S) * S**0.5
    return kernels.Index(q, one_hot, torch.full((B, T, 2), 40.0).double(), torch.zeros(2).double())


def selected(scores: torch.Tensor, doc_start=None, mode="off", v_ref=0.0, k_base=6, k_min=2, k_max=10):
    """mask (B, T, S) and k of the backend at work, for given scores."""
    choice = kernels.select(
        BACKEND, index_of(scores), torch.tensor(4.0), torch.tensor(v_ref), doc_start, mode=mode, temperature=1.0,
        k_base=k_base, k_min=k_min, k_max=k_max,
    )  # fmt: skip
    S = scores.shape[-1]
    if choice.bits is None:
        start = torch.zeros(scores.shape[:2]).long() if doc_start is None else doc_start
        return kernels.visible(start, S), choice.k
    return kernels.unpack(choice.bits, S), choice.k


def test_unset_reference_gives_k_base_and_bounds_hold():
    _, k = selected(torch.rand(1, T, T), mode="variance")
    assert k[0].tolist() == [min(t + 1, 6) for t in range(T)]
    _, k = selected(torch.ones(1, T, T), mode="entropy")
    assert k[0].tolist() == [min(t + 1, 9 if t else 6) for t in range(T)]  # uniform: m = 3/2
    _, k = selected(torch.ones(1, T, T), mode="entropy", k_max=8)
    assert k.max() == 8


# -- section 5: which keys ------------------------------------------------------------------------------


def by_hand(scores: list[float], visible: list[int], k: int, heads: int) -> set[int]:
    ranked = sorted(visible, key=lambda s: (-int(scores[s] * (65535 / heads)), -s))
    return set(ranked[:k])


@settings(deadline=None, max_examples=60)
@given(
    data=st.data(),
    length=st.integers(1, 45),
    queries=st.integers(1, 45),
    k=st.integers(1, 45),
    levels=st.sampled_from([1, 2, 5, 100000]),
)
def test_the_selected_set_is_exact_ties_to_the_more_recent(data, length, queries, k, levels):
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    queries = min(queries, length)  # the last of them, as in decoding
    scores = (torch.randint(0, levels, (1, queries, length), generator=random).double() + 0.5) / levels * 2
    starts = torch.randint(0, length, (1, queries), generator=random).sort().values
    starts = starts.minimum(torch.arange(length - queries, length))
    mask, chosen = selected(scores, starts, k_base=k, k_min=k, k_max=k)
    for t in range(queries):
        visible = list(range(int(starts[0, t]), length - queries + t + 1))
        assert chosen[0, t] == min(k, len(visible))
        wanted = by_hand(scores[0, t].tolist(), visible, k, 2)
        assert set(mask[0, t].nonzero().flatten().tolist()) == wanted


@settings(deadline=None, max_examples=40)
@given(rows=st.integers(1, 9), width=st.integers(1, 130), seed=st.integers(0, 999))
def test_bits_hold_every_set(rows, width, seed):
    mask = torch.rand(2, rows, width, generator=torch.Generator().manual_seed(seed)) < 0.5
    bits = kernels.pack(mask)
    assert bits.dtype == torch.int32 and bits.shape == (2, rows, -(-width // 32))
    assert torch.equal(kernels.unpack(bits, width), mask)
    assert torch.equal(chunked._pack(mask), bits)


def check_repeated_tokens() -> None:
    model = make(indexer_rope=False, adaptive_k="off", n_layers=1)
    choices = []
    selector = model.layers[0].attention.selector
    selector.register_forward_hook(lambda module, inputs, choice: choices.append(choice))
    model(torch.full((1, T), 5))
    chosen = kernels.unpack(choices[0].bits, T)
    assert chosen[0, 30].nonzero().flatten().tolist() == [25, 26, 27, 28, 29, 30]


def test_repeated_tokens_tie_and_the_recent_ones_win():
    check_repeated_tokens()
