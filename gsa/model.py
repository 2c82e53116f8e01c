"""The language model: embedding, blocks, norm, head, and what it costs. Source: docs/gsa.md."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from gsa import kernels
from gsa.attention.cache import Cache, LayerCache
from gsa.attention.gated_sparse import AttentionOutput, Backend, GatedSparseAttention, Stage, saved_by_checkpointing
from gsa.attention.gates import GATE_BIAS, Gate
from gsa.attention.positions import Positions, positions
from gsa.config import ModelConfig
from gsa.loss import IGNORE, linear_cross_entropy

Recomputed = Literal["none", "ffn", "block"]


class GSAOutput(NamedTuple):
    """What a forward pass returns.

    logits: (B, T, V) float32, without targets only. loss: 0-dim, with targets only. indexer_loss: 0-dim,
    mean over layers and rows. selection_stats: (n_layers, 2) float64, the sum of the score variance and its
    count, for `update_v_ref`. n_selected: (n_layers,) float32, mean keys attended per query. probe: (n_layers,
    len(PROBES)) float32, with probe_rows only.
    """

    logits: torch.Tensor | None
    loss: torch.Tensor | None
    indexer_loss: torch.Tensor | None
    selection_stats: torch.Tensor
    n_selected: torch.Tensor
    probe: torch.Tensor | None


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis; in float32 whatever the dtype. On a GPU torch has one kernel for it."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, d_model: int, d_ffn: int) -> None:
        super().__init__()
        self.backend: Backend = "chunked"
        self.gate_proj = nn.Linear(d_model, d_ffn, bias=False)
        self.up_proj = nn.Linear(d_model, d_ffn, bias=False)
        self.down_proj = nn.Linear(d_ffn, d_model, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if torch.compiler.is_compiling():  # whose compiler fuses it, and computes again what is cheap
            return self.down_proj(F.silu(gate) * up)
        return self.down_proj(kernels.silu_product(self.backend, gate, up))


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream.

    recompute_ffn: the backward pass computes the feed-forward's insides again instead of keeping them.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = GatedSparseAttention(config)
        self.ffn_norm = RMSNorm(config.d_model, config.norm_eps)
        self.ffn = SwiGLU(config.d_model, config.d_ffn)
        self.recompute_ffn = False

    def forward(
        self,
        x: torch.Tensor,
        at: Positions,
        rows: torch.Tensor | None,
        probe_rows: torch.Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> AttentionOutput:
        attended = self.attention(self.attention_norm(x), at, rows, probe_rows, cache)
        x = x + attended.out
        if self.recompute_ffn and torch.is_grad_enabled():
            fed = checkpoint(self._feed_forward, x, use_reentrant=False, preserve_rng_state=False)
        else:
            fed = self._feed_forward(x)
        return attended._replace(out=x + fed)

    def _feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.ffn(self.ffn_norm(x))


class GSAForCausalLM(nn.Module):
    """A decoder of GSA blocks. A new model is in the sparse stage."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.head = None if config.tie_embeddings else nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.stage: Stage = "sparse"
        self._checkpointing = False
        self._backend: Backend = "chunked"
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        """Normal with init_std, smaller by sqrt(2 n_layers) into the residual stream; gates half open."""
        if not isinstance(module, (nn.Linear, nn.Embedding)):
            if isinstance(module, (GatedSparseAttention, SwiGLU)):
                into_residual = module.o_proj if isinstance(module, GatedSparseAttention) else module.down_proj
                nn.init.normal_(into_residual.weight, std=self.config.init_std / math.sqrt(2 * self.config.n_layers))
            return
        nn.init.normal_(module.weight, std=self.config.init_std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.constant_(module.bias, GATE_BIAS if isinstance(module, Gate) else 0.0)

    def set_stage(self, stage: Stage) -> None:
        """ "dense": attend to all visible keys while the indexer learns; "sparse": to the selected ones."""
        if stage not in ("dense", "sparse"):
            raise ValueError(f'stage={stage!r} is not "dense" or "sparse"')
        self.stage = stage
        for layer in self.layers:
            layer.attention.stage = stage

    def set_backend(self, backend: Backend) -> None:
        """Which implementation of the kernels runs: see gsa/kernels/__init__.py. A new model has "chunked"."""
        self._backend = backend
        for layer in self.layers:
            layer.attention.backend = layer.ffn.backend = backend

    def set_activation_checkpointing(self, scope: Recomputed) -> None:
        """What the backward pass computes again instead of keeping it.

        "none": nothing. "ffn": what the feed-forwards keep, about half of a block, for two of their three products.
        "block": everything but each block's input, its selected sets and its indexer's gradients.
        """
        if scope not in get_args(Recomputed):
            raise ValueError(f"activation checkpointing {scope!r} is not one of {', '.join(get_args(Recomputed))}")
        self._checkpointing = scope == "block"
        for layer in self.layers:
            layer.recompute_ffn = scope == "ffn"

    def compile_parts(self) -> None:
        """Fuses norms, gates and feed-forwards by torch.compile, each when it first runs; attention has own kernels."""
        for module in self.modules():
            if isinstance(module, (RMSNorm, SwiGLU, Gate)):
                module.compile(dynamic=False)

    def update_v_ref(self, selection_stats: torch.Tensor) -> None:
        """Folds the variance of one global batch into every layer's running mean: docs/gsa.md, 4.

        selection_stats: (n_layers, 2), summed over micro-batches and ranks. Call once per optimizer step.
        """
        for layer, (total, count) in zip(self.layers, selection_stats, strict=True):
            if layer.attention.selector is not None and self.config.adaptive_k == "variance":
                layer.attention.selector.update_v_ref(total, count)

    def forward(
        self,
        tokens: torch.Tensor,
        targets: torch.Tensor | None = None,
        doc_start: torch.Tensor | None = None,
        *,
        indexer_rows: torch.Tensor | None = None,
        probe_rows: torch.Tensor | None = None,
        n_targets: torch.Tensor | float | None = None,
        cache: Cache | None = None,
        last_only: bool = False,
    ) -> GSAOutput:
        """Logits, or with targets the losses.

        tokens: (B, T) int64. targets: (B, T) int64, already shifted by the data, -100 where there is none.
        doc_start: (B, T) int64, where the document of each position begins; None: at 0.
        indexer_rows: (R,) int64 row positions for the alignment loss; None: all, while training.
        probe_rows: (R,) int64 row positions of the first sequence to measure: gsa/attention/probe.py; None: no probe.
        n_targets: what the sum of token losses is divided by; None: the valid targets of this call. A
        trainer passes the count of its whole global batch, so that its parts add up.
        cache: the tokens before these; takes these up too. Without targets, doc_start and gradients only.
        last_only: logits of the last position only, (B, 1, V).
        """
        B, T = tokens.shape
        before = 0 if cache is None else cache.length
        room = self.config.max_position_embeddings if cache is None else cache.capacity
        if before + T > room:
            what = "model.max_position_embeddings" if cache is None else "the cache's capacity"
            raise ValueError(f"{before + T} tokens are more than {what}={room}")
        if cache is not None and (targets is not None or doc_start is not None or torch.is_grad_enabled()):
            raise ValueError("a cache serves decoding: no targets, no doc_start, and within torch.no_grad()")
        at = positions(tokens, doc_start, self.config, before)
        rows = None
        if targets is not None and (indexer_rows is not None or torch.is_grad_enabled()):
            rows = torch.arange(T, device=tokens.device) if indexer_rows is None else indexer_rows.sort().values
        x = self.embed(tokens)
        parts: list[AttentionOutput] = []
        for i, layer in enumerate(self.layers):
            if self._checkpointing and torch.is_grad_enabled():
                # nothing here draws random numbers
                part = checkpoint(
                    layer,
                    x,
                    at,
                    rows,
                    probe_rows,
                    use_reentrant=False,
                    preserve_rng_state=False,
                    context_fn=saved_by_checkpointing,
                )
            else:
                part = layer(x, at, rows, probe_rows, None if cache is None else cache.layers[i])
            x = part.out
            parts.append(part)
        if cache is not None:
            cache.length += T
        x = self.norm(x[:, -1:] if last_only else x)
        stats = torch.stack([part.variance_sums for part in parts]).detach()
        n_selected = torch.stack([part.n_selected for part in parts]).detach()
        probe = None if probe_rows is None else torch.stack([part.probe for part in parts])
        weight = self.embed.weight if self.head is None else self.head.weight
        if targets is None:
            logits = F.linear(x, weight)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            return GSAOutput(logits, None, None, stats, n_selected, probe)
        if n_targets is None:
            n_targets = (targets != IGNORE).sum().clamp_min(1)
        loss = linear_cross_entropy(x.flatten(0, 1), weight, targets.flatten(), n_targets, self._backend)
        indexer_loss = torch.stack([part.indexer_loss for part in parts]).mean()
        return GSAOutput(None, loss, indexer_loss, stats, n_selected, probe)


def count_params(config: ModelConfig) -> dict[str, int]:
    """Parameters by part, with "total"; tied weights count once."""
    c, d = config, config.d_model
    q, kv = c.n_heads * c.d_head, c.n_kv_heads * c.d_head
    indexer = (
        d * c.n_indexer_heads * c.d_indexer + d * c.d_indexer + (d + 1) * c.n_indexer_heads + c.n_indexer_heads + 1
    )
    per_layer = {
        "attention": d * (q + 2 * kv) + q * d,
        "gates": (d + 1) * (kv * c.value_gate + q * c.output_gate),
        "indexer": indexer * c.sparse,
        "ffn": 3 * d * c.d_ffn,
        "norms": 2 * d,
    }
    parts = {name: size * c.n_layers for name, size in per_layer.items()}
    parts["norms"] += d
    parts["embedding"] = c.vocab_size * d
    parts["head"] = 0 if c.tie_embeddings else c.vocab_size * d
    return parts | {"total": sum(parts.values())}


def flops_per_token(
    config: ModelConfig,
    seq_len: int,
    *,
    indexer_rows: float = 0.25,
    keys: float | None = None,
    visible: float | None = None,
) -> dict[str, float]:
    """Useful floating-point operations of one training step per token, by part, with "total".

    One multiply-add is two. Forward and backward of a matrix product cost 3 forward products; recomputation
    is not useful and not counted. The indexer's input is detached, so its projections
    have no input gradient. Attention and the alignment loss's gradient count the selected pairs only, the
    indexer scores all visible ones.
    keys, visible: mean attended and visible keys per query, as measured; by default those of one document of seq_len
    tokens at k_base. indexer_rows: share of rows whose alignment loss is taken; its target probabilities are forward
    only.
    """
    c, n = config, count_params(config)
    if visible is None:
        visible = (seq_len + 1) / 2
    if keys is None:
        k = min(c.k_base, seq_len)
        # mean over t = 1 .. L of min(t, k)
        keys = (k * (k + 1) / 2 + (seq_len - k) * k) / seq_len if c.sparse else visible
    pair = 4.0 * c.n_heads * c.d_head  # QK and PV
    parts = {
        "projections": 6.0 * (n["attention"] + n["gates"] + n["ffn"]) + 4.0 * n["indexer"],
        "attention": 3 * pair * keys * c.n_layers,
        "head": 6.0 * c.vocab_size * c.d_model,
        "indexer": 0.0,
    }
    if c.sparse:
        score = 2.0 * c.n_indexer_heads * c.d_indexer * visible
        parts["indexer"] = c.n_layers * (score + indexer_rows * (2 * score * keys / visible + pair / 2 * keys))
    return parts | {"total": sum(parts.values())}
