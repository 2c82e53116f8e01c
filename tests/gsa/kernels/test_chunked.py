"""The chunked backend against the float64 reference, at odd sizes; and wrong kernels that the checks catch."""

from __future__ import annotations

import pytest
import torch
from backend_checks import Case, check_attention, check_selection, choose, inputs, outputs_and_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from gsa import kernels
from gsa.kernels import chunked

BOUNDS = {torch.float64: 1e-11, torch.float32: 5e-6, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK", 8)


@st.composite
def cases(draw) -> Case:
    T = draw(st.integers(1, 50))
    return Case(
        B=draw(st.integers(1, 3)), T=T, S=T + draw(st.sampled_from([0, 0, 1, 9])),
        H=8, G=draw(st.sampled_from([1, 2, 4, 8])), J=draw(st.integers(1, 4)), k=draw(st.integers(1, 60)),
        documents=draw(st.integers(1, 4)), mode=draw(st.sampled_from(["off", "variance", "entropy"])),
        tied=draw(st.booleans()), seed=draw(st.integers(0, 999)),
    )  # fmt: skip


@settings(deadline=None, max_examples=40)
@given(case=cases())
def test_sets_equal_the_reference(case):
    check_selection("chunked", case)


@settings(deadline=None, max_examples=40)
@given(case=cases())
def test_outputs_and_every_gradient_equal_the_reference(case):
    check_attention("chunked", case, BOUNDS[torch.float64])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("documents", [1, 3])
def test_lower_precision_stays_near(dtype, documents):
    case = Case(T=53, S=53, documents=documents, dtype=dtype, mode="variance")
    check_selection("chunked", case)
    check_attention("chunked", case, BOUNDS[dtype])


@settings(deadline=None, max_examples=15)
@given(case=cases())
def test_the_form_for_other_devices_equals_the_reference_too(case):
    """Where torch has no flash attention for a CPU: the same chunks in explicit softmax."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "_flash", chunked._explicit)
        patch.setattr(chunked, "_flash_backward", chunked._explicit_backward)
        check_attention("chunked", case, BOUNDS[torch.float64])


def test_keys_that_a_whole_block_of_flash_attention_hides_are_no_nan(monkeypatch):
    """torch's CPU kernel walks blocks of 512 keys: rows whose first blocks are all hidden must come out right."""
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


def test_selecting_all_takes_the_dense_path():
    case = Case(k=40)
    assert check_selection("chunked", case).bits is None
    assert check_selection("chunked", Case(k=80, mode="variance")).bits is None
    assert check_selection("chunked", Case(k=5)).bits is not None


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
        ("_visible_keys", lambda honest: lambda B, T, S, start, device: honest(B, T, S, None, device)),
        ("_gates", lambda honest: lambda q, k, bias: honest(q * 0.9, k, bias)),
        ("_pack", lambda honest: lambda mask: honest(mask.roll(1, -1))),
    ],
)
def test_a_wrong_selection_is_caught(monkeypatch, name, wrong):
    monkeypatch.setattr(chunked, name, wrong(getattr(chunked, name)))
    with pytest.raises((AssertionError, RuntimeError)):
        check_selection("chunked", Case(mode="variance", documents=2))


class Largest(TorchDispatchMode):
    """Remembers the largest floating tensor that any operation made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for x in made if isinstance(made, (tuple, list)) else (made,):
            # views of one element, as expand makes them, take no memory
            if isinstance(x, torch.Tensor) and x.is_floating_point() and 0 not in x.stride():
                self.numel = max(self.numel, x.numel())
        return made


def largest_float(backend: str, documents: int) -> int:
    case = Case(B=1, T=512, S=512, H=2, G=1, k=32, documents=documents, mode="variance", dtype=torch.float32)
    x = inputs(case).to(torch.float32, "cpu")
    with Largest() as seen:
        outputs_and_gradients(backend, x, choose(backend, x, case).bits)
    return seen.numel


@pytest.mark.parametrize("documents", [1, 3])
def test_no_float_tensor_is_as_large_as_the_scores(documents):
    """One of (T, S) would be 262,144 numbers, one of (T, k, H, D) 524,288. A chunk of 8 queries has 8 x 512 x 2."""
    assert largest_float("chunked", documents) <= 512 * 32  # the inputs' own size
    assert largest_float("reference", documents) >= 512 * 512
