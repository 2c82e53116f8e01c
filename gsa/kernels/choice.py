"""Which backend runs: the requested one or, for "auto", the fastest one that passes a check on its device."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from gsa import kernels
from gsa.kernels.reference import LEVELS, keys_per_query, score_variance


class Shape(NamedTuple):
    """What the kernels are compiled for: number and width of the heads of attention and indexer, and the dtype."""

    n_heads: int
    n_kv_heads: int
    d_head: int
    n_indexer_heads: int
    d_indexer: int
    dtype: torch.dtype


WIDEST_BYTES = 256
"""Widest head that Triton's kernels take: 128 numbers in bfloat16, 64 in float32. Wider ones overflow the shared memory
of some GPUs."""


def why_not_triton(shape: Shape, device: torch.device) -> str | None:
    """Why the Triton backend cannot run this shape on this device, or None. Runs no kernel; `fault_of` does."""
    if device.type != "cuda":
        return "Triton's kernels need a GPU"
    try:
        import gsa.kernels.triton_backend  # noqa: F401
    except ImportError as err:
        return f"triton cannot be imported here ({err})"
    widest = WIDEST_BYTES // shape.dtype.itemsize
    for name, width in (("d_head", shape.d_head), ("d_indexer", shape.d_indexer)):
        if not 16 <= width <= widest or width & (width - 1):
            dtype = str(shape.dtype).removeprefix("torch.")
            return f"model.{name}={width} is not a power of two from 16 to {widest}, the widest head in {dtype}"
    group = shape.n_heads // shape.n_kv_heads
    if group & (group - 1) or group > 64:
        return f"{group} query heads share a key/value head; their number must be a power of two up to 64"
    return None


def resolve(wanted: str, shape: Shape, device: torch.device) -> tuple[kernels.Backend, str | None]:
    """The backend to run, and for "auto" on a GPU the reason why it is not Triton, or None.

    Raises ValueError when a backend that was requested by name cannot run; only "auto" falls back.
    """
    if wanted == "auto":
        if device.type != "cuda":
            return "chunked", None
        fault = why_not_triton(shape, device) or fault_of("triton", shape, device)
        return ("triton", None) if fault is None else ("chunked", fault)
    if wanted == "triton" and (fault := why_not_triton(shape, device)):
        raise ValueError(f"training.backend=triton cannot run: {fault}; use auto or chunked")
    return wanted, None


# -- the check ------------------------------------------------------------------------------------------


class CheckCase(NamedTuple):
    """One comparison with the reference: `rows` sequences of `length` tokens, two documents in each.

    mode: of the selection rule. all_keys: attention and loss run over every visible key, not over the selected ones.
    """

    rows: int
    length: int
    mode: kernels.Mode
    all_keys: bool


CHECK_CASES = (CheckCase(2, 150, "off", all_keys=False), CheckCase(1, 1024, "variance", all_keys=True))
"""Together these cover both variants of every kernel, an odd length, a length divisible by 16 (Triton specialises it)
and more than one strip."""


def fault_of(backend: kernels.Backend, shape: Shape, device: torch.device) -> str | None:
    """What is wrong with a backend on this device, or None: compares it with the reference on CHECK_CASES.

    Most of the time is spent on compilation, about a second for each of some thirty kernels; Triton caches them on
    disk.
    """
    bound = 2e-2 if shape.dtype == torch.bfloat16 else 2e-4
    try:
        for name, error in _all_deviations(backend, shape, device):
            if not error <= bound:
                return f"its {name} is off by {error:.1e}, more than {bound:.0e}"
    except WrongSelection as err:
        return str(err)
    except Exception as err:  # a compiler or a driver can raise anything; all of it means: does not work here
        return f"{type(err).__name__}: {str(err).splitlines()[0] if str(err) else 'no message'}"
    return None


def _all_deviations(backend: kernels.Backend, shape: Shape, device: torch.device) -> Iterator[tuple[str, float]]:
    for case in CHECK_CASES:
        yield from deviations(backend, shape, device, case).items()
    yield from head_deviations(backend, shape.dtype, device).items()
    yield from product_deviations(backend, shape.dtype, device).items()


class WrongSelection(ValueError):
    """A selected set, its size or the statistic that it follows from differs from the reference."""


def deviations(backend: kernels.Backend, shape: Shape, device: torch.device, case: CheckCase) -> dict[str, float]:
    """Largest deviation of output, loss and every gradient from the float64 reference, relative to its largest value.

    Raises WrongSelection when a selected set is wrong.
    """
    B, T = case.rows, case.length
    H, G, D, J, E, dtype = shape
    random = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=random).to(dtype).to(device)

    index = kernels.Index(draw(B, T, J, E), draw(B, T, E), draw(B, T, J), draw(J))
    q, key, value, d_out = draw(B, T, H, D), draw(B, T, G, D), draw(B, T, G, D), draw(B, T, H, D)
    cut = T // 2 - 5
    starts = torch.where(torch.arange(T) < cut, 0, cut).expand(B, T).contiguous().to(device)
    rows = torch.arange(T, device=device)
    rows = rows[rows % 4 != 3]
    alpha = torch.tensor(4.0, device=device)
    bits = _checked_selection(backend, index, alpha, starts, case)
    if case.all_keys:
        bits = None
    found = []
    for name, to in ((backend, dtype), ("reference", torch.float64)):
        leaves = [x.to(to).requires_grad_() for x in (q, key, value, *index)]
        temperature = alpha.clone().requires_grad_()
        out, lse = kernels.attend(name, *leaves[:3], bits, starts)
        loss = kernels.alignment_kl(
            name, leaves[0], leaves[1], lse, kernels.Index(*leaves[3:]), temperature, bits, starts, rows
        )
        gradients = torch.autograd.grad([out, loss], [*leaves, temperature], [d_out.to(to), torch.ones_like(loss)])
        found.append([x.detach().double() for x in (out, loss, *gradients)])
    names = ("output", "loss", "q", "k", "v", "index q", "index k", "index weight", "index bias", "alpha")
    return {
        name: ((ours - exact).abs().max() / exact.abs().max()).item()
        for name, ours, exact in zip(names, *found, strict=True)
    }


def head_deviations(backend: kernels.Backend, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Like `deviations`, for the loss head: 150 rows of 1000 logits, in two blocks."""
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(150, 1000, generator=random).to(device).mul_(3)
    targets = torch.randint(0, 1000, (150,), generator=random).to(device)
    exact = logits.double().requires_grad_()
    wanted = torch.nn.functional.cross_entropy(exact, targets, reduction="none")
    (gradient,) = torch.autograd.grad(wanted.sum(), exact)
    top = torch.full((150,), -torch.inf, device=device)
    mass, label = torch.zeros_like(top), torch.zeros_like(top)
    blocks = [(start, logits[:, start : start + 600]) for start in (0, 600)]
    for start, block in blocks:
        kernels.fold_logits(backend, block.clone(), targets, start, top, mass, label)
    log_z, ones = top + mass.log(), torch.ones_like(top)
    d_logits = [kernels.logits_gradient(backend, b.clone(), targets, start, log_z, ones, dtype) for start, b in blocks]
    weight = torch.randn(1000, 64, generator=random).to(dtype).to(device)
    total = logits.new_zeros(150, 64)
    for (start, block), part in zip(blocks, d_logits, strict=True):
        kernels.add_product(backend, total, part, weight[start : start + block.shape[1]])
    ours = torch.cat(d_logits, 1)
    pairs = {
        "loss head": (log_z - label, wanted),
        "loss head's gradient": (ours, gradient),
        "loss head's sum": (total, ours.double() @ weight.double()),
    }
    return {name: ((a - b).abs().max() / b.abs().max()).item() for name, (a, b) in pairs.items()}


def product_deviations(backend: kernels.Backend, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Like `deviations`, for the product in the feed-forward: 150 rows of 1000."""
    random = torch.Generator().manual_seed(0)
    gate, up, d_out = (torch.randn(150, 1000, generator=random).to(dtype).to(device).mul_(3) for _ in range(3))
    found = []
    for name, to in ((backend, dtype), ("reference", torch.float64)):
        leaves = gate.to(to, copy=True).requires_grad_(), up.to(to, copy=True).requires_grad_()
        product = kernels.silu_product(name, *leaves)
        found.append([product.detach().double(), *torch.autograd.grad(product, leaves, d_out.to(to))])
    names = ("feed-forward", "feed-forward's gate gradient", "feed-forward's up gradient")
    return {n: ((a - b).abs().max() / b.abs().max()).item() for n, a, b in zip(names, *found, strict=True)}


def _checked_selection(
    backend: kernels.Backend, index: kernels.Index, alpha: Tensor, starts: Tensor, case: CheckCase
) -> Tensor:
    """The bits that the backend selects. Raises WrongSelection when they differ from the reference beyond rounding."""
    T, J, device = case.length, index.q.shape[2], index.q.device
    k = T // 6
    v_ref = torch.tensor(0.01 * J, device=device)
    rule = kernels.SelectionRule(case.mode, temperature=1.0, k_base=k, k_min=k // 2, k_max=2 * k)
    choice = kernels.select(backend, index, alpha, v_ref, starts, rule)
    mask, visible = kernels.unpack(choice.bits, T), kernels.visible_keys(starts)
    wanted = keys_per_query(visible.sum(-1), choice.statistic, v_ref, rule)
    if (mask & ~visible).any() or not torch.equal(mask.sum(-1), choice.k) or not torch.equal(choice.k, wanted):
        raise WrongSelection("a selected set has the wrong size, or a hidden key")
    scores = kernels.index_scores(*(x.double() for x in index))
    step = J / LEVELS + 2e-6 * J
    if case.mode == "variance":
        # rounding to levels moves a score, and so the standard deviation, by at most one step
        ours, exact = (x.double().sqrt() for x in (choice.statistic, score_variance(scores, visible)))
        if not ((ours - exact).abs() <= step + 1e-5 * exact).all():
            raise WrongSelection("the variance of the scores is wrong")
    worst_in = scores.masked_fill(~mask, math.inf).amin(-1)
    best_out = scores.masked_fill(mask | ~visible, -math.inf).amax(-1)
    if not (worst_in >= best_out - step).all():
        raise WrongSelection("a selected set leaves out a better key")
    return choice.bits
