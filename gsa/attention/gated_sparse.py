"""The one attention layer. Its indexer and its two gates are parts that may be absent. Source: docs/gsa.md."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import nn

from gsa import kernels
from gsa.attention.cache import LayerCache
from gsa.attention.gates import Gate
from gsa.attention.indexer import Indexer
from gsa.attention.positions import Positions
from gsa.attention.probe import probe
from gsa.attention.rope import rotate
from gsa.attention.selection import Selector, variance_sums
from gsa.config import ModelConfig
from gsa.kernels import Backend, saved_by_checkpointing

__all__ = ["AttentionOutput", "Backend", "GatedSparseAttention", "Stage", "saved_by_checkpointing"]

Stage = Literal["dense", "sparse"]


class AttentionOutput(NamedTuple):
    """out: (B, T, d). indexer_loss: 0-dim, mean over batch and rows. variance_sums: (2,) float64. n_selected: 0-dim.
    probe: (len(PROBES),) float32, or None where none was asked for."""

    out: torch.Tensor
    indexer_loss: torch.Tensor
    variance_sums: torch.Tensor
    n_selected: torch.Tensor
    probe: torch.Tensor | None


class GatedSparseAttention(nn.Module):
    """Attention of T queries over the keys that an indexer selects, gated before and after.

    `stage` "dense" attends to all visible keys while the indexer learns; "sparse" to the selected ones.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        H, G, D = config.n_heads, config.n_kv_heads, config.d_head
        self.n_heads, self.n_kv_heads, self.width = H, G, D
        self.stage: Stage = "sparse"
        self.backend: Backend = "chunked"
        self.q_proj = nn.Linear(config.d_model, H * D, bias=False)
        self.k_proj = nn.Linear(config.d_model, G * D, bias=False)
        self.v_proj = nn.Linear(config.d_model, G * D, bias=False)
        self.o_proj = nn.Linear(H * D, config.d_model, bias=False)
        self.value_gate = Gate(config.d_model, G * D) if config.value_gate else None
        self.output_gate = Gate(config.d_model, H * D) if config.output_gate else None
        self.indexer = Indexer(config) if config.sparse else None
        self.selector = Selector(config) if config.sparse else None

    def forward(
        self,
        x: torch.Tensor,
        at: Positions,
        rows: torch.Tensor | None,
        probe_rows: torch.Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> AttentionOutput:
        """x: (B, T, d), normalised. rows: (R,) int64 positions whose alignment loss is wanted; None: no loss.

        probe_rows: (R,) int64 positions that are measured: gsa/attention/probe.py.
        cache: the tokens that went before, all visible; it takes these up too.
        """
        B, T, _ = x.shape
        q = rotate(self.q_proj(x).view(B, T, self.n_heads, self.width), at.cos, at.sin)
        k = rotate(self.k_proj(x).view(B, T, self.n_kv_heads, self.width), at.cos, at.sin)
        v = self.v_proj(x)
        value_open = output_open = None
        if self.value_gate is not None:
            value_open = self.value_gate(x)
            v = v * value_open
        v = v.view(B, T, self.n_kv_heads, self.width)

        if cache is not None:
            k, v = cache.take(at.before, k, v)
        exact = torch.promote_types(x.dtype, torch.float32)
        sums, indexer_loss = x.new_zeros(2, dtype=torch.float64), x.new_zeros((), dtype=exact)
        bits, n_selected = None, _mean_visible(at, T, x.device)
        index = None
        if self.indexer is not None:
            index = self.indexer(x, at.indexer_cos, at.indexer_sin)
            if cache is not None:
                index = index._replace(k=cache.take_index(at.before, index.k))
            # the variance is measured in the dense stage too: selection starts with a settled v_ref
            if self.stage == "sparse" or self.selector.mode == "variance":
                selection = self.selector(
                    self.backend, index, self.indexer.alpha, at.doc_start, everything=self.stage == "dense"
                )
                if self.selector.mode == "variance":
                    sums = variance_sums(selection, at.doc_start, at.before)
            if self.stage == "sparse":
                bits, n_selected = selection.bits, selection.k.float().mean()
        out, lse = kernels.attend(self.backend, q, k, v, bits, at.doc_start)
        if index is not None and rows is not None:
            indexer_loss = kernels.alignment_kl(
                self.backend, q, k, lse, index, self.indexer.alpha, bits, at.doc_start, rows
            )
        out = out.reshape(B, T, self.n_heads * self.width)
        if self.output_gate is not None:
            output_open = self.output_gate(x)
            out = out * output_open
        probed = None
        if probe_rows is not None:
            alpha = None if self.indexer is None else self.indexer.alpha
            probed = probe(
                q,
                k,
                index,
                self.selector,
                alpha,
                (value_open, output_open),
                at.doc_start,
                probe_rows,
                sparse=self.stage == "sparse",
            )
        return AttentionOutput(self.o_proj(out), indexer_loss, sums, n_selected, probed)


def _mean_visible(at: Positions, T: int, device: torch.device) -> torch.Tensor:
    mean = at.before + (T + 1) / 2
    return torch.tensor(mean, device=device) if at.doc_start is None else mean - at.doc_start.float().mean()
