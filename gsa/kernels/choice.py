"""Which backend runs: the one asked for, or, for "auto", the fastest that has passed a check on the device in hand."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from gsa import kernels
from gsa.kernels.reference import LEVELS, keys_per_query, score_variance


class Shape(NamedTuple):
    """What a kernel is compiled for: heads and widths of attention and indexer, and the dtype of the model."""

    n_heads: int
    n_kv_heads: int
    d_head: int
    n_indexer_heads: int
    d_indexer: int
    dtype: torch.dtype


WIDEST_BYTES = 256
"""Of a head, in Triton: 128 numbers in bfloat16, 64 in float32. Wider ones do not fit every GPU's shared memory."""


def why_not_triton(shape: Shape, device: torch.device) -> str | None:
    """Why the Triton backend cannot run this shape on this device, before trying; None when it may."""
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
            return f"model.{name}={width} is not a power of two from 16 to {widest}, which is the widest in {dtype}"
    group = shape.n_heads // shape.n_kv_heads
    if group & (group - 1) or group > 64:
        return f"{group} query heads share a key/value head; a power of two up to 64 can"
    return None


def resolve(wanted: str, shape: Shape, device: torch.device) -> tuple[kernels.Backend, str | None]:
    """The backend to run, and for "auto" on a GPU why it is not the fastest, or None.

    ValueError when the one that was asked for cannot run: nothing falls back in silence.
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


class Trial(NamedTuple):
    """One comparison with the reference: `rows` sequences of `length` tokens, two documents in each.

    mode: how k adapts. all_keys: attention and loss run over every visible key, not over the selected ones.
    """

    rows: int
    length: int
    mode: str
    all_keys: bool


TRIALS = (Trial(2, 150, "off", all_keys=False), Trial(1, 1024, "variance", all_keys=True))
"""Between them: both forms of every kernel, an odd length, and one that, like most in training, 16 divides, for which
Triton compiles other code, and which takes more than one strip."""


def fault_of(backend: kernels.Backend, shape: Shape, device: torch.device) -> str | None:
    """What is wrong with a backend on this device, found by comparing TRIALS with the reference; None if nothing.

    Most of its time goes into compiling: a second or so for each of some thirty kernels, which Triton then has on disk.
    """
    bound = 2e-2 if shape.dtype == torch.bfloat16 else 2e-4
    try:
        for name, error in _all_deviations(backend, shape, device):
            if not error <= bound:
                return f"its {name} is off by {error:.1e}, more than {bound:.0e}"
    except WrongSelection as err:
        return str(err)
    except Exception as err:  # whatever a compiler or a driver throws: the answer is that it does not work here
        return f"{type(err).__name__}: {str(err).splitlines()[0] if str(err) else 'no message'}"
    return None


def _all_deviations(backend: kernels.Backend, shape: Shape, device: torch.device) -> Iterator[tuple[str, float]]:
    for trial in TRIALS:
        yield from deviations(backend, shape, device, trial).items()
    yield from head_deviations(backend, shape.dtype, device).items()
    yield from product_deviations(backend, shape.dtype, device).items()


class WrongSelection(ValueError):
    """A selected set, its size or the statistic behind it is not the reference's."""


def deviations(backend: kernels.Backend, shape: Shape, device: torch.device, trial: Trial) -> dict[str, float]:
    """Output, loss and every gradient against the float64 reference: the largest difference, by the largest value.

    WrongSelection when a selected set is not right.
    """
    B, T = trial.rows, trial.length
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
    bits = _checked_selection(backend, index, alpha, starts, trial)
    if trial.all_keys:
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
    """As `deviations`, of the loss head: 150 rows of 1000 logits in two blocks."""
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
    by_logit = [kernels.logits_gradient(backend, b.clone(), targets, start, log_z, ones, dtype) for start, b in blocks]
    weight = torch.randn(1000, 64, generator=random).to(dtype).to(device)
    total = logits.new_zeros(150, 64)
    for (start, block), part in zip(blocks, by_logit, strict=True):
        kernels.add_product(backend, total, part, weight[start : start + block.shape[1]])
    ours = torch.cat(by_logit, 1)
    pairs = {
        "loss head": (log_z - label, wanted),
        "loss head's gradient": (ours, gradient),
        "loss head's sum": (total, ours.double() @ weight.double()),
    }
    return {name: ((a - b).abs().max() / b.abs().max()).item() for name, (a, b) in pairs.items()}


def product_deviations(backend: kernels.Backend, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """As `deviations`, of the feed-forward's product: 150 rows of 1000."""
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
    backend: kernels.Backend, index: kernels.Index, alpha: Tensor, starts: Tensor, trial: Trial
) -> Tensor:
    """The bits that the backend selects. WrongSelection when they are not those of the reference, but for rounding."""
    T, J, device = trial.length, index.q.shape[2], index.q.device
    k = T // 6
    v_ref = torch.tensor(0.01 * J, device=device)
    rule = (trial.mode, 1.0, k, k // 2, 2 * k)
    names = ("mode", "temperature", "k_base", "k_min", "k_max")
    choice = kernels.select(backend, index, alpha, v_ref, starts, **dict(zip(names, rule, strict=True)))
    mask, seen = kernels.unpack(choice.bits, T), kernels.visible(starts)
    wanted = keys_per_query(seen.sum(-1), choice.statistic, v_ref, *rule)
    if (mask & ~seen).any() or not torch.equal(mask.sum(-1), choice.k) or not torch.equal(choice.k, wanted):
        raise WrongSelection("a selected set has the wrong size, or a hidden key")
    scores = kernels.index_scores(*(x.double() for x in index))
    step = J / LEVELS + 2e-6 * J
    if trial.mode == "variance":
        # a level less moves a score by a step at most, and a deviation by no more
        ours, exact = (x.double().sqrt() for x in (choice.statistic, score_variance(scores, seen)))
        if not ((ours - exact).abs() <= step + 1e-5 * exact).all():
            raise WrongSelection("the variance of the scores is wrong")
    worst_in = scores.masked_fill(~mask, math.inf).amin(-1)
    best_out = scores.masked_fill(mask | ~seen, -math.inf).amax(-1)
    if not (worst_in >= best_out - step).all():
        raise WrongSelection("a selected set leaves out a better key")
    return choice.bits
