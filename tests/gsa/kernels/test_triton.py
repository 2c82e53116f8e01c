"""The Triton backend against the float64 reference, and the identities of docs/gsa.md, 9, of a model that runs on it.

On a GPU where there is one, else under Triton's interpreter, which runs programs one after another: what it cannot
show is speed, and races between the warps of a program.
"""

from __future__ import annotations

import triton_here  # isort: skip  before anything imports triton

from dataclasses import replace

import pytest
import torch
from backend_checks import Case, check_attention, check_selection
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from gsa import GSAForCausalLM, ModelConfig
from gsa.attention.cache import Cache
from gsa.kernels import triton_alignment, triton_attention, triton_select

BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def scratch_is_garbage(monkeypatch):
    """Fresh memory holds NaN, or -1: what a kernel reads and nobody wrote shows."""

    def filled(make):
        def garbage(*args, **kwargs):
            fresh = make(*args, **kwargs)
            return (
                fresh.fill_(torch.nan) if fresh.is_floating_point() else fresh.fill_(-1 if fresh.dtype.is_signed else 7)
            )

        return garbage

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, filled(getattr(torch, name)))


@pytest.fixture(autouse=True)
def small_tiles(request, monkeypatch):
    """Tiles and strips so small that these short sequences have several, and ragged ones."""
    if "shipped_tiles" in request.keywords:
        return
    monkeypatch.setattr(triton_select, "STRIP", 16)
    monkeypatch.setattr(triton_alignment, "STRIP", 5)
    monkeypatch.setattr(triton_select, "SCORE", triton_select.SCORE | {"BM": 16, "BN": 32})
    for name in ("FORWARD", "BACKWARD_QUERIES", "BACKWARD_KEYS"):
        smaller = getattr(triton_attention, name) | {"rows": 32, "BN": 32}
        monkeypatch.setattr(triton_attention, name, smaller)
    for name in ("LOGITS", "QUERIES", "KEYS"):
        monkeypatch.setattr(triton_alignment, name, getattr(triton_alignment, name) | {"BM": 16, "BN": 32})


@st.composite
def cases(draw) -> Case:
    T = draw(st.integers(1, 50))
    return Case(
        B=draw(st.integers(1, 2)), T=T, S=T + draw(st.sampled_from([0, 0, 1, 9])),
        H=8, G=draw(st.sampled_from([1, 2, 4, 8])), J=draw(st.integers(1, 4)), k=draw(st.integers(1, 60)),
        documents=draw(st.integers(1, 4)), mode=draw(st.sampled_from(["off", "variance", "entropy"])),
        tied=draw(st.booleans()), seed=draw(st.integers(0, 999)), dtype=draw(st.sampled_from(DTYPES)),
        device=triton_here.DEVICE,
    )  # fmt: skip


few = settings(deadline=None, max_examples=8, phases=[Phase.explicit, Phase.reuse, Phase.generate])
"""Without shrinking: a case takes a second."""


@few
@given(case=cases())
def test_sets_equal_the_reference(case):
    check_selection("triton", case)


@few
@given(case=cases())
def test_outputs_and_every_gradient_equal_the_reference(case):
    check_attention("triton", case, BOUNDS[case.dtype])


@pytest.mark.shipped_tiles
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_shipped_tiles_and_heads_of_64(dtype):
    case = Case(B=1, T=80, S=150, H=8, G=2, D=64, J=4, E=64, k=20, documents=3, mode="variance", dtype=dtype,
                device=triton_here.DEVICE)  # fmt: skip
    check_selection("triton", case)
    check_attention("triton", case, BOUNDS[dtype])


@pytest.mark.parametrize("documents", [1, 3])
def test_without_bits_every_visible_key_is_attended(documents):
    check_attention("triton", Case(k=40, documents=documents, dtype=torch.float32, device=triton_here.DEVICE), 1e-5)


def wrong_arguments(change):
    """Replaces a kernel by one that is launched with changed arguments."""

    def wrap(kernel):
        class Wrong:
            def __getitem__(self, grid):
                return lambda *args, **kwargs: kernel[grid](*change(list(args)), **kwargs)

        return Wrong()

    return wrap


def scaled(i: int, by: float):
    def change(args):
        args[i] = args[i] * by
        return args

    return wrong_arguments(change)


@pytest.mark.parametrize(
    "module, name, wrong",
    [
        (triton_attention, "attend_forward", scaled(-1, 1.01)),
        (triton_attention, "attend_backward_queries", scaled(5, 0.9)),
        (triton_attention, "attend_backward_keys", wrong_arguments(lambda a: [*a[:8], a[8] * 0 + 16, *a[9:]])),
        (triton_alignment, "align_logits", scaled(7, 1.1)),
        (triton_alignment, "align_queries", scaled(2, 0.9)),
        (triton_alignment, "align_keys", wrong_arguments(lambda a: [*a[:8], a[8] + 1, *a[9:]])),
    ],
)
def test_a_wrong_kernel_is_caught(monkeypatch, module, name, wrong):
    monkeypatch.setattr(module, name, wrong(getattr(module, name)))
    with pytest.raises(AssertionError):
        check_attention("triton", Case(dtype=torch.float32, device=triton_here.DEVICE), BOUNDS[torch.float32])


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("level_strip", scaled(-2, 0.9)),
        ("select_rows", wrong_arguments(lambda a: [a[0], a[1], a[2] - 1, *a[3:]])),
        ("select_rows", wrong_arguments(lambda a: [a[0], a[1] * 0, *a[2:]])),
        ("row_statistic", scaled(-1, 3.0)),
    ],
)
def test_a_wrong_selection_is_caught(monkeypatch, name, wrong):
    case = Case(B=1, T=40, S=40, k=8, documents=2, mode="variance", dtype=torch.float32, device=triton_here.DEVICE)
    check_selection("triton", case)
    monkeypatch.setattr(triton_select, name, wrong(getattr(triton_select, name)))
    with pytest.raises(AssertionError):
        check_selection("triton", case)


# -- the identities, on whole models --------------------------------------------------------------------

T = 23
TINY = ModelConfig(
    d_model=32, n_layers=1, n_heads=4, n_kv_heads=2, d_head=16, d_ffn=48, vocab_size=61, max_position_embeddings=64,
    init_std=0.2, d_indexer=16, n_indexer_heads=2, k_base=6, k_min=2, k_max=10, tie_embeddings=False,
)  # fmt: skip
MODES = ("off", "variance", "entropy")


def make(backend: str = "triton", **changes) -> GSAForCausalLM:
    torch.manual_seed(0)
    model = GSAForCausalLM(replace(TINY, **changes)).to(triton_here.DEVICE)
    model.set_backend(backend)
    model.update_v_ref(torch.tensor([[0.002, 1.0]], device=triton_here.DEVICE))
    return model


def some_tokens(rows: int = 2, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 61, (rows, T), generator=torch.Generator().manual_seed(seed)).to(triton_here.DEVICE)


def gradients(model: GSAForCausalLM, of: str, **kwargs) -> dict[str, torch.Tensor]:
    model.zero_grad()
    getattr(model(some_tokens(), some_tokens(seed=2), **kwargs), of).backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("mode", MODES)
def test_neither_the_future_nor_a_neighbour_nor_another_document_is_heard(mode):
    model, tokens, cut = make(adaptive_k=mode), some_tokens(), 9
    with torch.no_grad():
        whole = model(tokens).logits
        later = tokens.clone()
        later[:, 14:] = (later[:, 14:] + 7) % 61
        assert torch.equal(model(later).logits[:, :14], whole[:, :14])
        other = tokens.clone()
        other[1] = 5
        assert torch.equal(model(other).logits[0], whole[0])
        start = torch.where(torch.arange(T) < cut, 0, cut).expand(2, T).to(tokens.device)
        packed = model(tokens, doc_start=start).logits
        torch.testing.assert_close(packed[:, :cut], model(tokens[:, :cut]).logits, rtol=0, atol=2e-5)
        torch.testing.assert_close(packed[:, cut:], model(tokens[:, cut:]).logits, rtol=0, atol=2e-5)


@pytest.mark.parametrize("stage", ["dense", "sparse"])
def test_every_parameter_learns_as_on_the_reference(stage):
    for of in ("loss", "indexer_loss"):
        found = []
        for backend in ("triton", "reference"):
            model = make(backend)
            model.set_stage(stage)
            found.append(gradients(model, of))
        for name, ours in found[0].items():
            assert bool(ours.any()) == ((".indexer." in name) == (of == "indexer_loss")), name
            largest = found[1][name].abs().max().item()
            assert (ours - found[1][name]).abs().max().item() <= 2e-4 * largest, name


def test_selecting_every_key_equals_dense_attention():
    model = make(k_min=T, k_base=T, k_max=T)
    dense = make(sparse=False)
    dense.load_state_dict(model.state_dict(), strict=False)
    ours, theirs = gradients(model, "loss"), gradients(dense, "loss")
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_cached_decoding_equals_the_full_forward(mode):
    model, tokens = make(adaptive_k=mode), some_tokens()
    cache = Cache(model.config, 2, T, device=tokens.device)
    with torch.no_grad():
        logits = [model(part, cache=cache).logits for part in tokens.split([18] + [1] * (T - 18), 1)]
        torch.testing.assert_close(torch.cat(logits, 1), model(tokens).logits, rtol=0, atol=2e-5)


def test_recomputing_changes_no_bit():
    plain, again = make(), make()
    again.set_activation_checkpointing(True)
    found = []
    for model in (plain, again):
        out = model(some_tokens(), some_tokens(seed=2))
        (out.loss + out.indexer_loss).backward()
        found.append([p.grad for p in model.parameters()])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))
