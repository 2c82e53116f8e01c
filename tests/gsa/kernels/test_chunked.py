"""The chunked backend against the float64 reference, at odd sizes; and wrong kernels that the checks catch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from support.kernel_contract import (
    GROUPS,
    MODES,
    Case,
    cases,
    check_attention,
    check_selection,
    choose,
    inputs,
    oldest_first,
    one_thread,  # noqa: F401
    outputs_and_gradients,
    trials,
)
from torch.utils._python_dispatch import TorchDispatchMode

from gsa import kernels
from gsa.kernels import chunked

BOUNDS = {torch.float64: 1e-11, torch.float32: 5e-6, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK", 8)


@trials(40)
@given(case=cases())
def test_sets_equal_the_reference(case):
    check_selection("chunked", case)


@trials(40)
@given(case=cases())
def test_outputs_and_every_gradient_equal_the_reference(case):
    check_attention("chunked", case, BOUNDS[torch.float64])


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", BOUNDS)
def test_every_group_size_and_mode_with_packed_documents_and_ties(group, mode, dtype):
    case = Case(T=41, S=48, H=8, G=8 // group, k=5, documents=3, tied=True, mode=mode, dtype=dtype)
    check_selection("chunked", case)
    check_attention("chunked", case, BOUNDS[dtype])


def test_the_64_bit_order_of_long_sequences():
    """From 32768 keys on, level and position together pass 31 bits."""
    S = 40_000
    scores = torch.randint(0, 50, (1, 2, S), generator=torch.Generator().manual_seed(0)) / 25 + 0.01
    seen, k, n = torch.ones(1, 2, S, dtype=torch.bool), torch.tensor([[300, 9000]]), torch.tensor([[S, S]])
    assert torch.equal(chunked._top_keys(scores, seen, k, n, 2), kernels.top_keys(scores, seen, k, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("documents", [1, 3])
def test_lower_precision_stays_near(dtype, documents):
    case = Case(T=53, S=53, documents=documents, dtype=dtype, mode="variance")
    check_selection("chunked", case)
    check_attention("chunked", case, BOUNDS[dtype])


@trials(15)
@given(case=cases())
def test_the_form_for_other_devices_equals_the_reference(case):
    """On devices without torch's flash attention for CPUs, the same chunks are computed by explicit softmax."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "_flash", chunked._explicit)
        patch.setattr(chunked, "_flash_backward", chunked._explicit_backward)
        check_attention("chunked", case, BOUNDS[torch.float64])


def test_rows_that_see_nothing_in_a_whole_block_of_keys_are_right(monkeypatch):
    """torch's CPU kernel goes through blocks of 512 keys: rows whose first blocks are all hidden must not become NaN."""
    monkeypatch.setattr(chunked, "CHUNK", 128)
    T = 1300
    mask = torch.zeros(1, T, T, dtype=torch.bool)
    mask[0, torch.arange(T), torch.arange(T)] = True
    mask[0, 1200:, 1100:1150] = True
    q, k, v = (torch.randn(1, T, h, 16, dtype=torch.float64, requires_grad=True) for h in (2, 1, 1))
    results = []
    for backend in ("chunked", "reference"):
        out, _ = kernels.attend(backend, q, k, v, kernels.pack(mask), None)
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-11)


@pytest.mark.parametrize("mode, scored", [("off", False), ("variance", True)])
def test_selecting_all_keys_is_one_call_of_dense_attention(monkeypatch, mode, scored):
    """It is then as fast as torch. Scores are computed only when a statistic is needed, and never sorted."""
    called = []
    for where, name in ((chunked, "_gates"), (chunked, "_sorted"), (F, "scaled_dot_product_attention")):
        honest = getattr(where, name)
        monkeypatch.setattr(
            where, name, lambda *a, name=name, honest=honest, **k: [called.append(name), honest(*a, **k)][1]
        )
    case = Case(k=80, mode=mode)
    x = inputs(case).to(torch.float64, "cpu")
    bits = choose("chunked", x, case).bits
    assert bits is None and set(called) == ({"_gates"} if scored else set())
    called.clear()
    out, _ = kernels.attend("chunked", x.q, x.k, x.v, bits, None)
    torch.autograd.grad(out.sum(), (x.q, x.k, x.v))
    assert called == ["scaled_dot_product_attention"]
    assert check_selection("chunked", case).bits is None and check_selection("chunked", Case(k=5)).bits is not None


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("_flash", lambda honest: lambda q, k, v, mask: honest(q, k, v, mask * 0)),
        ("_flash_backward", lambda honest: lambda *x: [y * 1.01 for y in honest(*x)]),
        ("_probabilities", lambda honest: lambda *x: honest(*x).roll(1, -1)),
        ("_gates", lambda honest: lambda q, k, bias: honest(q, k, bias * 0)),
        ("_unpack", lambda honest: lambda bits, chunk: honest(bits, chunk).roll(1, -1)),
    ],
)
def test_a_wrong_kernel_is_caught(monkeypatch, name, wrong):
    monkeypatch.setattr(chunked, name, wrong(getattr(chunked, name)))
    with pytest.raises(AssertionError):
        check_attention("chunked", Case(), BOUNDS[torch.float64])


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("_variance", lambda honest: lambda scores, seen, n: scores.var(-1)),
        ("_count_visible", lambda honest: lambda *sizes: (honest(*sizes) - 1).clamp_min(1)),
        ("_gates", lambda honest: lambda q, k, bias: honest(q * 0.9, k, bias)),
        ("_pack", lambda honest: lambda mask: honest(mask.roll(1, -1))),
        ("_top_keys", lambda honest: lambda scores, seen, k, n, J: oldest_first(scores, seen, k, J)),
        ("_top_keys", lambda honest: lambda scores, seen, k, n, J: honest(scores, seen, (k - 1).clamp_min(1), n, J)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_wrong_selection_is_caught(monkeypatch, name, wrong, dtype):
    monkeypatch.setattr(chunked, name, wrong(getattr(chunked, name)))
    with pytest.raises(AssertionError):
        check_selection("chunked", Case(mode="variance", documents=2, tied=True, dtype=dtype))


class Largest(TorchDispatchMode):
    """Records the size of the largest floating-point tensor that any operation creates."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for x in made if isinstance(made, (tuple, list)) else (made,):
            # a view with stride 0, as from expand, takes no memory
            if isinstance(x, torch.Tensor) and x.is_floating_point() and 0 not in x.stride():
                self.numel = max(self.numel, x.numel())
        return made


def largest_float(backend: str, documents: int) -> int:
    case = Case(B=1, T=512, S=512, H=2, G=1, k=32, documents=documents, mode="variance", dtype=torch.float32)
    x = inputs(case).to(torch.float32, "cpu")
    with Largest() as created:
        outputs_and_gradients(backend, x, choose(backend, x, case).bits)
    return created.numel


@pytest.mark.parametrize("documents", [1, 3])
def test_no_float_tensor_is_as_large_as_the_scores(documents):
    """(T, S) would have 262,144 elements, (T, k, H, D) 524,288; a chunk of 8 queries has 8 x 512 x 2."""
    assert largest_float("chunked", documents) <= 512 * 32  # the inputs' own size
    assert largest_float("reference", documents) >= 512 * 512
