"""The attention layer. Its indexer and its two gates are parts that may be absent. Source: docs/gsa.md."""

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
from gsa.kernels import Backend

AttentionStage = Literal["dense", "sparse"]
"""Whether queries attend to all visible keys, while the indexer learns, or to the selected ones."""

Stage = AttentionStage  # its earlier name, under which others may import it


class AttentionOutput(NamedTuple):
    """What a layer returns.

    out: (B, T, d). indexer_loss: 0-dim, mean over batch and rows, nats. variance_sums: (2,) float64, see
    gsa/attention/selection.py. n_selected: 0-dim float32, mean number of attended keys per query. probe:
    (len(PROBES),) float32, or None without probe_rows.
    """

    out: torch.Tensor
    indexer_loss: torch.Tensor
    variance_sums: torch.Tensor
    n_selected: torch.Tensor
    probe: torch.Tensor | None


class GatedSparseAttention(nn.Module):
    """Attention over the keys that an indexer selects, with a gate on the values and one on the output."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        H, G, D = config.n_heads, config.n_kv_heads, config.d_head
        self.n_heads, self.n_kv_heads, self.width = H, G, D
        self.stage: AttentionStage = "sparse"
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
        pos: Positions,
        rows: torch.Tensor | None,
        probe_rows: torch.Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> AttentionOutput:
        """x: (B, T, d), normalised. pos: of the T tokens.

        rows: (R,) int64, ascending query positions of the alignment loss; None: no loss, indexer_loss is 0.
        probe_rows: (R,) int64 query positions to measure, see gsa/attention/probe.py; None: no probe.
        cache: of the tokens before these, which are all visible; the layer adds these tokens to it.
        """
        B, T, _ = x.shape
        q = rotate(self.q_proj(x).view(B, T, self.n_heads, self.width), pos.cos, pos.sin)
        k = rotate(self.k_proj(x).view(B, T, self.n_kv_heads, self.width), pos.cos, pos.sin)
        v = self.v_proj(x)
        value_gate = output_gate = None
        if self.value_gate is not None:
            value_gate = self.value_gate(x)
            v = v * value_gate
        v = v.view(B, T, self.n_kv_heads, self.width)

        if cache is not None:
            k, v = cache.store(pos.n_cached, k, v)
        exact = torch.promote_types(x.dtype, torch.float32)
        sums, indexer_loss = x.new_zeros(2, dtype=torch.float64), x.new_zeros((), dtype=exact)
        bits, n_selected = None, _mean_visible(pos, T, x.device)
        index = None
        if self.indexer is not None:
            index = self.indexer(x, pos.indexer_cos, pos.indexer_sin)
            if cache is not None:
                index = index._replace(k=cache.store_index(pos.n_cached, index.k))
            # the dense stage computes the variance too, so that the sparse one starts with a settled v_ref
            if self.stage == "sparse" or self.selector.rule.mode == "variance":
                selection = self.selector(
                    self.backend, index, self.indexer.alpha, pos.doc_start, select_all=self.stage == "dense"
                )
                if self.selector.rule.mode == "variance":
                    sums = variance_sums(selection, pos.doc_start, pos.n_cached)
            if self.stage == "sparse":
                bits, n_selected = selection.bits, selection.k.float().mean()
        out, lse = kernels.attend(self.backend, q, k, v, bits, pos.doc_start)
        if index is not None and rows is not None:
            indexer_loss = kernels.alignment_kl(
                self.backend, q, k, lse, index, self.indexer.alpha, bits, pos.doc_start, rows
            )
        out = out.reshape(B, T, self.n_heads * self.width)
        if self.output_gate is not None:
            output_gate = self.output_gate(x)
            out = out * output_gate
        probed = None
        if probe_rows is not None:
            alpha = None if self.indexer is None else self.indexer.alpha
            probed = probe(
                q,
                k,
                index,
                self.selector,
                alpha,
                (value_gate, output_gate),
                pos.doc_start,
                probe_rows,
                sparse=self.stage == "sparse",
            )
        return AttentionOutput(self.o_proj(out), indexer_loss, sums, n_selected, probed)


def _mean_visible(pos: Positions, T: int, device: torch.device) -> torch.Tensor:
    """0-dim float32, the mean number of visible keys per query."""
    mean = pos.n_cached + (T + 1) / 2
    return torch.tensor(mean, device=device) if pos.doc_start is None else mean - pos.doc_start.float().mean()
