"""Compares a backend's operations with the float64 reference: outputs, every gradient, selected sets."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gsa import kernels
from gsa.kernels.reference import LEVELS


@dataclass(frozen=True)
class Case:
    """Sizes of one comparison. documents: how many are packed into each row, at random places."""

    B: int = 2
    T: int = 37
    S: int = 37
    H: int = 4
    G: int = 2
    D: int = 16
    J: int = 2
    E: int = 16
    k: int = 7
    documents: int = 1
    mode: str = "off"
    tied: bool = False
    seed: int = 0
    dtype: torch.dtype = torch.float64
    device: str = "cpu"


@dataclass
class Inputs:
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    index: kernels.Index
    alpha: torch.Tensor
    doc_start: torch.Tensor | None
    rows: torch.Tensor
    d_out: torch.Tensor

    def to(self, dtype: torch.dtype, device: str) -> Inputs:
        """Leaves of `dtype` on `device`; what the layer keeps in float32 stays there, unless all is float64."""
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        leaf = lambda x, dtype: x.to(device, dtype).detach().requires_grad_()  # noqa: E731
        index = kernels.Index(*(leaf(x, dtype) for x in self.index))
        start = None if self.doc_start is None else self.doc_start.to(device)
        q, k, v = (leaf(x, dtype) for x in (self.q, self.k, self.v))
        return Inputs(
            q, k, v, index, leaf(self.alpha, exact), start, self.rows.to(device), self.d_out.to(device, dtype)
        )


def inputs(case: Case) -> Inputs:
    """Random tensors, rounded to the case's dtype first, so that the reference sees the same numbers."""
    random = torch.Generator().manual_seed(case.seed)
    B, T, S, H, G, D, J, E = case.B, case.T, case.S, case.H, case.G, case.D, case.J, case.E

    def draw(*shape):
        return torch.randn(*shape, generator=random).to(case.dtype).double()

    start = None
    if case.documents > 1:
        ends = torch.randint(0, S, (B, case.documents - 1, 1), generator=random)
        place = torch.arange(S - T, S)
        start = torch.where(ends <= place, ends, 0).amax(1)
    index = kernels.Index(draw(B, T, J, E), draw(B, S, E), draw(B, T, J), draw(J) * 0.1)
    if case.tied:  # every third token is the same token
        index.k[:, ::3] = index.k[:, :1].clone()
    rows = torch.randperm(T, generator=random)[: max(1, T // 4)].sort().values
    return Inputs(
        draw(B, T, H, D), draw(B, S, G, D), draw(B, S, G, D), index, torch.tensor(4.0).double(), start, rows,
        draw(B, T, H, D),
    )  # fmt: skip


def choose(backend: str, x: Inputs, case: Case) -> kernels.Selection:
    return kernels.select(
        backend, x.index, x.alpha, torch.tensor(0.01, device=case.device), x.doc_start, mode=case.mode,
        temperature=1.0, k_base=case.k, k_min=max(1, case.k // 2), k_max=case.k * 2,
    )  # fmt: skip


def mask_of(bits: torch.Tensor | None, x: Inputs, n_keys: int) -> torch.Tensor:
    if bits is not None:
        return kernels.unpack(bits, n_keys)
    start = torch.zeros(x.q.shape[:2], dtype=torch.long) if x.doc_start is None else x.doc_start
    return kernels.visible(start, n_keys)


def outputs_and_gradients(backend: str, x: Inputs, bits: torch.Tensor | None) -> dict[str, torch.Tensor]:
    out, lse = kernels.attend(backend, x.q, x.k, x.v, bits, x.doc_start)
    loss = kernels.alignment_kl(backend, x.q, x.k, lse, x.index, x.alpha, bits, x.doc_start, x.rows)
    found = {"out": out, "loss": loss}
    names = ("q", "k", "v", "index q", "index k", "weight", "bias", "alpha")
    leaves = (x.q, x.k, x.v, *x.index, x.alpha)
    gradients = torch.autograd.grad([out, loss], leaves, [x.d_out, torch.ones_like(loss)])
    return {n: t.detach().cpu().double() for n, t in (found | dict(zip(names, gradients, strict=True))).items()}


def check_selection(backend: str, case: Case) -> kernels.Selection:
    """Sets equal those of the reference, save keys whose scores lie within a rounding of the threshold; k likewise."""
    given = inputs(case)
    ours, exact = given.to(case.dtype, case.device), given.to(torch.float64, "cpu")
    choice, wanted = choose(backend, ours, case), choose("reference", exact, case)
    mask = mask_of(choice.bits, ours, case.S).cpu()
    k = choice.k.cpu()
    assert torch.equal(mask.sum(-1), k), "a row's set does not have the size it claims"
    seen = mask_of(None, exact, case.S)
    assert not (mask & ~seen).any(), "a hidden key is in a set"
    moved = (k - wanted.k).abs()
    assert moved.max() <= (0 if case.dtype == torch.float64 else 1)
    if case.dtype == torch.float64:
        assert torch.equal(mask, mask_of(wanted.bits, exact, case.S))
        return choice
    # in lower precision: with its own k, every key that is in scores no less than every key that is out, within a step
    scores = kernels.index_scores(*exact.index)
    step = case.J / LEVELS + 2e-6 * case.J
    worst_in = scores.masked_fill(~mask, torch.inf).amin(-1)
    best_out = scores.masked_fill(mask | ~seen, -torch.inf).amax(-1)
    assert (worst_in >= best_out - step).all(), "a key is out that scores higher than one that is in"
    return choice


def check_attention(backend: str, case: Case, bound: float) -> None:
    """Outputs, loss and all gradients within `bound` of the reference's, relative to the largest; twice the same bits."""
    given = inputs(case)
    ours, exact = given.to(case.dtype, case.device), given.to(torch.float64, "cpu")
    bits = choose("reference", exact, case).bits if case.k < case.S else None
    wanted = outputs_and_gradients("reference", exact, bits)
    there = None if bits is None else bits.to(case.device)
    found, again = (outputs_and_gradients(backend, ours, there) for _ in range(2))
    for name, tensor in found.items():
        assert torch.equal(tensor, again[name]), f"{name} is not repeatable"
        # where the true gradient is nothing, as of a query that sees one key, rounding is judged by the inputs' size;
        # the gradients of bias and alpha sum terms of a tenth over all pairs, which may cancel
        least = 0.5 if name in ("out", "q", "k", "v") else 1e-2 if name in ("bias", "alpha") else 1e-3
        scale = max(wanted[name].abs().max().item(), least)
        difference = (tensor - wanted[name]).abs().max().item() / scale
        assert difference <= bound, f"{name}: {difference:.2e} > {bound:.0e}"
