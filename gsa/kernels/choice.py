"""Which backend runs: the one asked for, or, for "auto", the fastest that has passed a check on the device in hand."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from gsa import kernels
from gsa.kernels.reference import LEVELS


class Shape(NamedTuple):
    """What a kernel is compiled for: heads and widths of attention and indexer, and the dtype of the model."""

    n_heads: int
    n_kv_heads: int
    d_head: int
    n_indexer_heads: int
    d_indexer: int
    dtype: torch.dtype


def why_not_triton(shape: Shape, device: torch.device) -> str | None:
    """Why the Triton backend cannot run this shape on this device, before trying; None when it may."""
    if device.type != "cuda":
        return "Triton's kernels need a GPU"
    try:
        import gsa.kernels.triton_backend  # noqa: F401
    except ImportError as err:
        return f"triton cannot be imported here ({err})"
    for name, width in (("d_head", shape.d_head), ("d_indexer", shape.d_indexer)):
        if width < 16 or width & (width - 1):
            return f"model.{name}={width} is not a power of two of at least 16"
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


def fault_of(backend: kernels.Backend, shape: Shape, device: torch.device) -> str | None:
    """What is wrong with a backend on this device, found by comparing a small case with the reference; None if nothing.

    Takes seconds, most of them for compiling what training will use anyway.
    """
    try:
        return _compare(backend, shape, device)
    except Exception as err:  # whatever a compiler or a driver throws: the answer is that it does not work here
        return f"{type(err).__name__}: {str(err).splitlines()[0] if str(err) else 'no message'}"


def _compare(backend: kernels.Backend, shape: Shape, device: torch.device) -> str | None:
    B, T, k = 2, 150, 24
    H, G, D, J, E, dtype = shape
    random = torch.Generator().manual_seed(0)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=random).to(dtype).to(device)

    index = kernels.Index(draw(B, T, J, E), draw(B, T, E), draw(B, T, J), draw(J))
    q, key, value, d_out = draw(B, T, H, D), draw(B, T, G, D), draw(B, T, G, D), draw(B, T, H, D)
    starts = torch.where(torch.arange(T) < 70, 0, 70).expand(B, T).contiguous().to(device)
    rows = torch.arange(3, T, 4, device=device)
    alpha, v_ref = torch.tensor(4.0, device=device), torch.tensor(0.01, device=device)

    choice = kernels.select(
        backend, index, alpha, v_ref, starts, mode="off", temperature=1.0, k_base=k, k_min=k, k_max=k
    )
    mask, seen = kernels.unpack(choice.bits, T), kernels.visible(starts)
    if (mask & ~seen).any() or not torch.equal(mask.sum(-1), choice.k) or not torch.equal(
        choice.k, seen.sum(-1).clamp(max=k)
    ):  # fmt: skip
        return "a selected set has the wrong size, or a hidden key"
    scores = kernels.index_scores(*(x.double() for x in index))
    worst_in = scores.masked_fill(~mask, math.inf).amin(-1)
    best_out = scores.masked_fill(mask | ~seen, -math.inf).amax(-1)
    if not (worst_in >= best_out - J / LEVELS - 2e-6 * J).all():
        return "a selected set leaves out a better key"

    found = []
    for name, to in ((backend, dtype), ("reference", torch.float64)):
        leaves = [x.to(to).requires_grad_() for x in (q, key, value, *index)]
        temperature = alpha.clone().requires_grad_()
        out, lse = kernels.attend(name, *leaves[:3], choice.bits, starts)
        loss = kernels.alignment_kl(
            name, leaves[0], leaves[1], lse, kernels.Index(*leaves[3:]), temperature, choice.bits, starts, rows
        )
        gradients = torch.autograd.grad([out, loss], [*leaves, temperature], [d_out.to(to), torch.ones_like(loss)])
        found.append([x.detach().double() for x in (out, loss, *gradients)])
    names = ("output", "loss", "q", "k", "v", "index q", "index k", "index weight", "index bias", "alpha")
    bound = 2e-2 if dtype == torch.bfloat16 else 2e-4
    for name, ours, exact in zip(names, *found, strict=True):
        error = ((ours - exact).abs().max() / exact.abs().max()).item()
        if not error <= bound:
            return f"its {name} is off by {error:.1e}, more than {bound:.0e}"
    return None
