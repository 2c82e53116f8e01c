"""Every operation refuses inputs of a wrong rank, size, dtype or device, and says which; without reading a value."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from gsa import kernels

B, T, S, H, G, D, J, E, R, N, V, M = 2, 5, 40, 4, 2, 8, 3, 6, 3, 7, 9, 4
RULE = kernels.SelectionRule("variance", temperature=1.0, k_base=4, k_min=2, k_max=8)

Arguments = dict[str, object]


def good(operation: str, device: str = "cpu") -> Arguments:
    """Arguments that an operation accepts, by name; the fields of the index by "index.<field>"."""

    def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.ones(shape, dtype=dtype, device=device)

    index = {
        "index.q": numbers(B, T, J, E),
        "index.k": numbers(B, S, E),
        "index.weight": numbers(B, T, J),
        "index.bias": numbers(J),
    }
    heads = {"q": numbers(B, T, H, D), "k": numbers(B, S, G, D)}
    masks = {
        "bits": numbers(B, T, 2, dtype=torch.int32),
        "doc_start": torch.zeros(B, T, dtype=torch.int64, device=device),
    }
    logits = {"logits": numbers(N, V), "targets": numbers(N, dtype=torch.int64), "start": 0}
    return {
        "select": {**index, "alpha": numbers(), "v_ref": numbers(), "doc_start": masks["doc_start"], "rule": RULE},
        "attend": {**heads, "v": numbers(B, S, G, D), **masks},
        "alignment_kl": {
            **heads,
            "lse": numbers(B, H, T),
            **index,
            "alpha": numbers(),
            **masks,
            "rows": torch.arange(R, device=device),
        },
        "silu_product": {"gate": numbers(B, T, D), "up": numbers(B, T, D)},
        "fold_logits": {**logits, "top": numbers(N), "mass": numbers(N), "label": numbers(N)},
        "logits_gradient": {**logits, "log_z": numbers(N), "scale": numbers(N), "dtype": torch.bfloat16},
        "product": {"a": numbers(N, V), "b": numbers(V, M), "exact": torch.float32},
        "add_product": {"total": numbers(N, M), "a": numbers(N, V), "b": numbers(V, M)},
    }[operation]


OPERATIONS = (
    "select",
    "attend",
    "alignment_kl",
    "silu_product",
    "fold_logits",
    "logits_gradient",
    "product",
    "add_product",
)


def call(operation: str, arguments: Arguments, backend: str = "chunked") -> object:
    index = {name: x for name, x in arguments.items() if name.startswith("index.")}
    named = {name: x for name, x in arguments.items() if name not in index}
    if index:
        named["index"] = kernels.Index(*index.values())
    if operation != "product":
        named["backend"] = backend
    return getattr(kernels, operation)(**named)


def tensors_of(operation: str) -> list[str]:
    return [name for name, x in good(operation).items() if isinstance(x, torch.Tensor)]


FREE = {
    ("select", "index.k", 1),  # S
    ("attend", "q", 2),  # H, any multiple of G
    ("alignment_kl", "rows", 0),
    ("fold_logits", "logits", 1),
    ("logits_gradient", "logits", 1),
    ("product", "a", 0),
    ("product", "b", 1),
}
"""Axes that no other argument of the operation has."""
EVERY_TENSOR = [(operation, name) for operation in OPERATIONS for name in tensors_of(operation)]


def refused(operation: str, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> str:
    """The message of the refusal when one argument is changed."""
    arguments = good(operation)
    with pytest.raises(ValueError) as err:
        call(operation, {**arguments, name: change(arguments[name])})
    return str(err.value)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_right_inputs_are_accepted(operation):
    call(operation, good(operation))


@pytest.mark.parametrize("operation, name", EVERY_TENSOR)
def test_a_wrong_rank_is_refused(operation, name):
    message = refused(operation, name, lambda x: x[None])
    # the size of the feed-forward's product is that of gate, whatever that is
    argument = "up" if operation == "silu_product" else name
    assert message.startswith(f"{operation}: {argument} has shape (")
    assert "; wanted " in message


@pytest.mark.parametrize(
    "operation, name, axis",
    [
        (operation, name, axis)
        for operation, name in EVERY_TENSOR
        for axis in range(good(operation)[name].dim())
        if (operation, name, axis) not in FREE
    ],
)
def test_a_wrong_size_is_refused_on_every_axis(operation, name, axis):
    """The message may name another argument with the same axis: which of the two is wrong, the sizes do not show."""
    message = refused(operation, name, lambda x: x.repeat_interleave(3, axis))
    assert message.startswith(f"{operation}: ") and "; wanted " in message


@pytest.mark.parametrize("operation, name", EVERY_TENSOR)
def test_a_wrong_dtype_is_refused(operation, name):
    message = refused(operation, name, lambda x: x.to(torch.int16))
    assert message.startswith(f"{operation}: {name} has dtype int16; wanted ")


@pytest.mark.parametrize("operation, name", EVERY_TENSOR)
def test_mixed_devices_are_refused(operation, name):
    message = refused(operation, name, lambda x: x.to("meta"))
    assert message.startswith(f"{operation}: ") and "is on " in message and "meta" in message


@pytest.mark.parametrize(
    "operation, changes, words",
    [
        ("attend", {"v": torch.ones(B, S, G, D).bfloat16()}, "attend: v has dtype bfloat16; wanted float32"),
        (
            "attend",
            {"v": torch.ones(B, S, G, 16)},
            r"attend: v has shape \(2, 40, 2, 16\); wanted \(B=2, S=40, G=2, D=8\)",
        ),
        ("attend", {"q": torch.ones(B, T, 5, D)}, "attend: k has 2 heads; wanted a divisor of q's 5 heads"),
        ("attend", {"k": torch.ones(B, 4, G, D)}, "attend: k has S=4 positions; wanted at least T=5"),
        (
            "attend",
            {"bits": torch.ones(B, T, 1).int()},
            r"attend: bits has shape \(2, 5, 1\); wanted \(B=2, T=5, W=2\)",
        ),
        ("alignment_kl", {"index.k": torch.ones(B, S, E).bfloat16()}, "index.k has dtype bfloat16; wanted float32"),
        ("select", {"index.k": torch.ones(B, 3, E)}, "select: index.k has S=3 positions"),
        ("select", {"alpha": torch.ones(1)}, r"select: alpha has shape \(1,\); wanted \(\)"),
        ("select", {"rule": RULE._replace(mode="on")}, "rule.mode='on' is not one of off, variance, entropy"),
        ("select", {"rule": RULE._replace(k_min=0)}, "k_min=0"),
        ("select", {"rule": RULE._replace(k_min=9)}, "wanted 1 <= k_min <= k_max"),
        (
            "fold_logits",
            {"logits": torch.ones(N, V).bfloat16()},
            "logits has dtype bfloat16; wanted float32 or float64",
        ),
        ("fold_logits", {"logits": torch.ones(V, N).t()}, r"logits has strides \(1, 7\); wanted a contiguous tensor"),
        ("logits_gradient", {"scale": torch.ones(N).double()}, "scale has dtype float64; wanted float32"),
        ("logits_gradient", {"dtype": torch.int8}, "dtype is torch.int8; wanted a floating-point dtype"),
        ("product", {"exact": torch.bfloat16}, "exact is torch.bfloat16; wanted float32 or float64"),
        ("product", {"b": torch.ones(8, M)}, r"product: b has shape \(8, 4\); wanted \(K=9, M\)"),
        ("add_product", {"total": torch.ones(N, M).bfloat16()}, "total has dtype bfloat16; wanted float32 or float64"),
    ],
)
def test_what_is_wrong_and_what_is_wanted_is_in_the_message(operation, changes, words):
    with pytest.raises(ValueError, match=words):
        call(operation, good(operation) | changes)


@pytest.mark.parametrize("operation", ["select", "attend", "alignment_kl", "silu_product"])
def test_an_unknown_backend_is_refused(operation):
    with pytest.raises(ValueError, match="backend='fast' is not one of reference, chunked, triton"):
        call(operation, good(operation), backend="fast")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_check_reads_no_value(operation, monkeypatch):
    """Tensors on the meta device have none: a check that read one would raise, and on a GPU wait."""
    called = []
    meta = torch.ones(B, T, 2, device="meta")

    def stand_in(*inputs: object) -> tuple[torch.Tensor, ...]:
        called.append(inputs)
        return (meta,) * (3 if operation == "select" else 6)

    monkeypatch.setattr(kernels, "_module", lambda backend: SimpleNamespace(**dict.fromkeys(OPERATIONS, stand_in)))
    monkeypatch.setattr(kernels, "_loss_module", kernels._module)
    call(operation, good(operation, "meta"))
    assert called or operation in ("product", "add_product")
