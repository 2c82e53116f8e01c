"""Which backend runs: the check finds faults, auto falls back and reports why, an explicit request is met or refused."""

from __future__ import annotations

import pytest
import torch
from support.kernel_contract import one_thread  # noqa: F401

from gsa.kernels import choice, chunked, reference
from gsa.kernels.choice import CHECK_CASES, Shape, deviations, fault_of, resolve, why_not_triton

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SHAPE = Shape(n_heads=8, n_kv_heads=2, d_head=16, n_indexer_heads=2, d_indexer=16, dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_right_backend_has_no_fault(dtype):
    assert fault_of("chunked", SHAPE._replace(dtype=dtype), CPU) is None


def test_the_check_cases_have_both_kinds_of_length_and_more_than_one_strip():
    """Triton compiles other code for a length divisible by 16; its strips have 512 queries."""
    assert {case.length % 16 == 0 for case in CHECK_CASES} == {True, False}
    assert {case.all_keys for case in CHECK_CASES} == {True, False} and {case.mode for case in CHECK_CASES} == {
        "off",
        "variance",
    }
    assert max(case.length for case in CHECK_CASES) * 3 // 4 > 512  # also the rows of the loss


@pytest.mark.parametrize(
    "name, wrong, fault",
    [
        ("_flash", lambda honest: lambda *x: (honest(*x)[0] * 1.01, honest(*x)[1]), "its output is off by 1.0e-02"),
        ("_flash_backward", lambda honest: lambda *x: [y * 1.01 for y in honest(*x)], "its q is off by"),
        ("_probabilities", lambda honest: lambda *x: honest(*x).roll(1, -1), "its loss is off by"),
        ("_pack", lambda honest: lambda mask: honest(mask.roll(1, -1)), "a hidden key"),
        ("_gates", lambda honest: lambda q, k, bias: honest(q, k.roll(1, 1), bias), "leaves out a better key"),
        ("_variance", lambda honest: lambda *x: honest(*x) * 1.01, "the variance of the scores is wrong"),
        ("_unpack", lambda honest: lambda *x: 1 / 0, "ZeroDivisionError: division by zero"),
    ],
)
def test_a_wrong_backend_is_found(monkeypatch, name, wrong, fault):
    monkeypatch.setattr(chunked, name, wrong(getattr(chunked, name)))
    assert fault in fault_of("chunked", SHAPE, CPU)


def test_a_fault_at_long_or_even_lengths_or_without_bits_is_found(monkeypatch):
    honest = chunked._flash
    for wrong_when in (lambda q, mask: mask.shape[-1] > 512, lambda q, mask: mask.shape[-1] % 16 == 0):
        with monkeypatch.context() as patch:
            patch.setattr(
                chunked, "_flash", lambda q, k, v, mask, w=wrong_when: honest(q, k, v * (1 + 0.01 * w(q, mask)), mask)
            )
            assert "its output is off by" in fault_of("chunked", SHAPE, CPU)
    attend = chunked.attend
    monkeypatch.setattr(
        chunked, "attend", lambda q, k, v, bits, s: attend(q, k * (1 + 0.01 * (bits is None)), v, bits, s)
    )
    assert "is off by" in fault_of("chunked", SHAPE, CPU)


def test_a_wrong_loss_head_is_found(monkeypatch):
    honest = reference.logits_gradient
    monkeypatch.setattr(reference, "logits_gradient", lambda *x: honest(*x) * 1.01)
    assert "its loss head's gradient is off by" in fault_of("chunked", SHAPE, CPU)


def test_an_add_product_that_overwrites_its_total_is_found(monkeypatch):
    from gsa import kernels

    product = kernels.product
    monkeypatch.setattr(kernels, "add_product", lambda _, total, a, b: total.copy_(product(a, b, total.dtype)))
    assert "its loss head's sum is off by" in fault_of("chunked", SHAPE, CPU)


def test_a_wrong_feed_forward_is_found(monkeypatch):
    honest = chunked.silu_product
    monkeypatch.setattr(chunked, "silu_product", lambda gate, up: honest(gate, up * 1.03))
    assert "its feed-forward is off by" in fault_of("chunked", SHAPE, CPU)


def test_deviations_of_a_right_backend_are_rounding():
    found = deviations("chunked", SHAPE, CPU, CHECK_CASES[0])
    assert set(found) >= {"output", "loss", "q", "k", "v", "index k", "alpha"} and max(found.values()) < 5e-6


def test_auto_takes_triton_when_it_passes_and_otherwise_reports_why_not(monkeypatch):
    assert resolve("auto", SHAPE, CPU) == ("chunked", None)
    monkeypatch.setattr(choice, "fault_of", lambda *_: None)
    assert resolve("auto", SHAPE, GPU) == ("triton", None)
    monkeypatch.setattr(choice, "fault_of", lambda *_: "its q is off")
    assert resolve("auto", SHAPE, GPU) == ("chunked", "its q is off")
    backend, fault = resolve("auto", SHAPE._replace(d_head=48), GPU)
    assert backend == "chunked" and "model.d_head=48" in fault


def test_an_explicit_request_is_met_or_refused():
    assert resolve("reference", SHAPE, CPU) == ("reference", None)
    assert resolve("triton", SHAPE, GPU) == ("triton", None)
    with pytest.raises(ValueError, match="training.backend=triton cannot run: Triton's kernels need a GPU"):
        resolve("triton", SHAPE, CPU)
    with pytest.raises(ValueError, match="model.d_indexer=24 is not a power of two"):
        resolve("triton", SHAPE._replace(d_indexer=24), GPU)
    assert "3 query heads share" in why_not_triton(SHAPE._replace(n_heads=6), GPU)


@pytest.mark.parametrize("dtype, widest", [(torch.bfloat16, 128), (torch.float32, 64)])
def test_heads_wider_than_those_compiled_ahead_are_refused(dtype, widest):
    """tests/support/compile_triton_ahead.py compiles the widest of either dtype."""
    fits = SHAPE._replace(d_head=widest, d_indexer=widest, dtype=dtype)
    assert why_not_triton(fits, GPU) is None
    for name in ("d_head", "d_indexer"):
        assert f"model.{name}={2 * widest} is not a power of two from 16 to {widest}" in why_not_triton(
            fits._replace(**{name: 2 * widest}), GPU
        )
