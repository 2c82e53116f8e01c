"""What the operations take and return as tuples, and the checks of their inputs.

A check compares ranks, sizes, dtypes and devices, which the host knows: it reads no element and waits for no device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Mode = Literal["off", "variance", "entropy"]

EXACT = (torch.float32, torch.float64)
"""Dtypes of sums and statistics."""
FLOATING = (torch.bfloat16, torch.float16, *EXACT)


class Index(NamedTuple):
    """The indexer's projections, from which scores are computed (docs/gsa.md, 3).

    q: (B, T, J, E). k: (B, S, E), of the same dtype. weight: (B, T, J), before its sigmoid. bias: (J,).
    """

    q: Tensor
    k: Tensor
    weight: Tensor
    bias: Tensor


class SelectionRule(NamedTuple):
    """How many keys a query selects (docs/gsa.md, 4).

    mode: the statistic of the scores that k follows; "off": k is k_base. temperature: c of mode "variance".
    """

    mode: Mode
    temperature: float
    k_base: int
    k_min: int
    k_max: int


class Selection(NamedTuple):
    """The selected keys of every query.

    bits: (B, T, ceil(S / 32)) int32, the set as packed bits; None when every visible key is selected.
    k: (B, T) int64, the number of selected keys.
    statistic: (B, T), variance or entropy of the scores; None in mode "off".
    """

    bits: Tensor | None
    k: Tensor
    statistic: Tensor | None


class InputCheck:
    """Checks the inputs of one call of an operation; every failure is a ValueError that names operation and argument.

    An axis is a letter, with one size throughout the call. All inputs are on `device`.
    """

    __slots__ = ("operation", "device", "sizes")

    def __init__(self, operation: str, device: torch.device) -> None:
        self.operation, self.device = operation, device
        self.sizes: dict[str, int] = {}

    def tensor(
        self, name: str, x: Tensor, axes: str, dtypes: Sequence[torch.dtype], *, contiguous: bool = False
    ) -> None:
        """x has the axes of `axes`, one letter each, one of `dtypes`, and is on the device.

        A letter that has no size yet gets that of x.
        """
        shape, sizes = x.shape, self.sizes
        if len(shape) != len(axes):
            self._refuse_shape(name, shape, axes)
        for axis, size in zip(axes, shape, strict=True):
            if sizes.setdefault(axis, size) != size:
                self._refuse_shape(name, shape, axes)
        self.dtype_and_device(name, x, dtypes)
        if contiguous and not x.is_contiguous():
            self.refuse(name, f"has strides {x.stride()}", "wanted a contiguous tensor")

    def dtype_and_device(self, name: str, x: Tensor, dtypes: Sequence[torch.dtype]) -> None:
        """x has one of `dtypes` and is on the device."""
        if x.dtype not in dtypes:
            self.refuse(name, f"has dtype {_name(x.dtype)}", f"wanted {' or '.join(map(_name, dtypes))}")
        if x.device != self.device:
            self.refuse(name, f"is on {x.device}", f"wanted {self.device}, where the other inputs are")

    def index(self, index: Index) -> None:
        """The four tensors of an Index."""
        self.tensor("index.q", index.q, "BTJE", FLOATING)
        self.tensor("index.k", index.k, "BSE", (index.q.dtype,))
        self.tensor("index.weight", index.weight, "BTJ", FLOATING)
        self.tensor("index.bias", index.bias, "J", FLOATING)

    def visibility(self, bits: Tensor | None, doc_start: Tensor | None, *, keys: str = "k") -> None:
        """`bits` and `doc_start`, once T and S are known; and S >= T, where `keys` is the argument with S."""
        T, S = self.sizes["T"], self.sizes["S"]
        if T > S:
            self.refuse(keys, f"has S={S} positions", f"wanted at least T={T}: the queries are the last positions")
        if doc_start is not None:
            self.tensor("doc_start", doc_start, "BT", (torch.int64,))
        if bits is not None:
            self.sizes["W"] = -(-S // 32)
            self.tensor("bits", bits, "BTW", (torch.int32,))

    def groups(self) -> None:
        """The key/value heads divide the query heads."""
        if self.sizes["H"] % self.sizes["G"]:
            self.refuse("k", f"has {self.sizes['G']} heads", f"wanted a divisor of q's {self.sizes['H']} heads")

    def refuse(self, name: str, found: str, wanted: str) -> None:
        raise ValueError(f"{self.operation}: {name} {found}; {wanted}")

    def _refuse_shape(self, name: str, shape: Sequence[int], axes: str) -> None:
        """The message gives the size of every axis that has one: wanted (B=2, T=37, H)."""
        wanted = [f"{axis}={self.sizes[axis]}" if axis in self.sizes else axis for axis in axes]
        self.refuse(name, f"has shape {tuple(shape)}", f"wanted ({', '.join(wanted)})")


def check_rule(operation: str, rule: SelectionRule) -> None:
    """The mode is known, and 1 <= k_min <= k_max, 1 <= k_base. Raises ValueError."""
    if rule.mode not in get_args(Mode):
        raise ValueError(f"{operation}: rule.mode={rule.mode!r} is not one of {', '.join(get_args(Mode))}")
    if not (1 <= rule.k_min <= rule.k_max and rule.k_base >= 1):
        raise ValueError(
            f"{operation}: rule has k_base={rule.k_base}, k_min={rule.k_min}, k_max={rule.k_max}; "
            f"wanted 1 <= k_min <= k_max and k_base >= 1"
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
