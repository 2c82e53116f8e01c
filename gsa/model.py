"""The language model: embedding, blocks, norm and head; its parameter count and FLOPs. Source: docs/gsa.md."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from gsa import kernels
from gsa.attention.cache import Cache, LayerCache
from gsa.attention.gated_sparse import AttentionOutput, AttentionStage, GatedSparseAttention
from gsa.attention.gates import GATE_BIAS, Gate
from gsa.attention.positions import Positions, make_positions
from gsa.config import ModelConfig
from gsa.kernels import Backend
from gsa.loss import IGNORE, linear_cross_entropy

Recomputed = Literal["none", "ffn", "block"]
"""Which part of a block the backward pass computes again: see GSAForCausalLM.set_activation_checkpointing."""


class GSAOutput(NamedTuple):
    """What a forward pass returns.

    logits: (B, T, V) float32 (float64 for float64 weights); None with targets.
    loss: 0-dim, nats per target; None without targets.
    indexer_loss: 0-dim, nats, mean over layers and rows; None without targets.
    selection_stats: (n_layers, 2) float64, sum and count of the score variance, for `update_v_ref`.
    n_selected: (n_layers,) float32, mean number of attended keys per query.
    probe: (n_layers, len(PROBES)) float32; None without probe_rows.
    """

    logits: torch.Tensor | None
    loss: torch.Tensor | None
    indexer_loss: torch.Tensor | None
    selection_stats: torch.Tensor
    n_selected: torch.Tensor
    probe: torch.Tensor | None


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, computed in float32 whatever the dtype; on a GPU in one kernel."""

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
        if torch.compiler.is_compiling():  # the compiler fuses the product and saves as little
            return self.down_proj(F.silu(gate) * up)
        return self.down_proj(kernels.silu_product(self.backend, gate, up))


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream.

    recompute_ffn: the backward pass recomputes the feed-forward's activations instead of saving them.
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
        pos: Positions,
        rows: torch.Tensor | None,
        probe_rows: torch.Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> AttentionOutput:
        attended = self.attention(self.attention_norm(x), pos, rows, probe_rows, cache)
        x = x + attended.out
        if self.recompute_ffn and torch.is_grad_enabled():
            out = checkpoint(self._feed_forward, x, use_reentrant=False, preserve_rng_state=False)
        else:
            out = self._feed_forward(x)
        return attended._replace(out=x + out)

    def _feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.ffn(self.ffn_norm(x))


class GSAForCausalLM(nn.Module):
    """A decoder of GSA blocks. A new model is in the sparse stage, on the chunked kernels, without checkpointing."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.head = None if config.tie_embeddings else nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.stage: AttentionStage = "sparse"
        self._checkpointing = False
        self._backend: Backend = "chunked"
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        """Normal with init_std, divided by sqrt(2 n_layers) for outputs into the residual stream: docs/gsa.md, 1."""
        if not isinstance(module, (nn.Linear, nn.Embedding)):
            if isinstance(module, (GatedSparseAttention, SwiGLU)):
                into_residual = module.o_proj if isinstance(module, GatedSparseAttention) else module.down_proj
                nn.init.normal_(into_residual.weight, std=self.config.init_std / math.sqrt(2 * self.config.n_layers))
            return
        nn.init.normal_(module.weight, std=self.config.init_std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.constant_(module.bias, GATE_BIAS if isinstance(module, Gate) else 0.0)

    def set_stage(self, stage: AttentionStage) -> None:
        """Sets the stage of every layer. "dense": attend to all visible keys; "sparse": to the selected ones."""
        if stage not in ("dense", "sparse"):
            raise ValueError(f'stage={stage!r} is not "dense" or "sparse"')
        self.stage = stage
        for layer in self.layers:
            layer.attention.stage = stage

    def set_backend(self, backend: Backend) -> None:
        """Sets the implementation of the kernels in every layer and in the loss: see gsa/kernels/__init__.py."""
        self._backend = backend
        for layer in self.layers:
            layer.attention.backend = layer.ffn.backend = backend

    def set_activation_checkpointing(self, scope: Recomputed) -> None:
        """Sets which activations the backward pass recomputes instead of saving them.

        "none": no activations. "ffn": those of the feed-forwards, about half of a block's; this repeats two of their
        three products. "block": all but each block's input, its selected sets and its indexer's gradients.
        """
        if scope not in get_args(Recomputed):
            raise ValueError(f"activation checkpointing {scope!r} is not one of {', '.join(get_args(Recomputed))}")
        self._checkpointing = scope == "block"
        for layer in self.layers:
            layer.recompute_ffn = scope == "ffn"

    def compile_parts(self) -> None:
        """Has torch.compile fuse norms, gates and feed-forwards when they first run. Attention has its own kernels."""
        for module in self.modules():
            if isinstance(module, (RMSNorm, SwiGLU, Gate)):
                module.compile(dynamic=False)

    def update_v_ref(self, selection_stats: torch.Tensor) -> None:
        """Updates every layer's running mean v_ref with the variance of one global batch: docs/gsa.md, 4.

        selection_stats: (n_layers, 2), summed over micro-batches and ranks. Call it once per optimizer step.
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
        """Returns logits, or with targets the losses.

        tokens: (B, T) int64. targets: (B, T) int64, already shifted by the data, -100 where there is none.
        doc_start: (B, T) int64, the position at which the document of each token begins; None: 0.
        indexer_rows: (R,) int64 query positions of the alignment loss; None: all when gradients are enabled, else
        none (indexer_loss is then 0).
        probe_rows: (R,) int64 query positions of the first sequence to measure, see gsa/attention/probe.py; None: no
        probe.
        n_targets: divisor of the summed token losses; None: the number of valid targets of this call. A trainer
        passes that of its whole global batch, so that the losses of its parts add up.
        cache: of the tokens before these; the call adds these tokens to it. It excludes targets, doc_start and
        gradients.
        last_only: return logits of the last position only, (B, 1, V).
        Raises ValueError when there are more tokens than the model or the cache has positions, or when a cache is
        combined with what it excludes.
        """
        B, T = tokens.shape
        n_cached = 0 if cache is None else cache.length
        limit = self.config.max_position_embeddings if cache is None else cache.capacity
        if n_cached + T > limit:
            what = "model.max_position_embeddings" if cache is None else "the cache's capacity"
            raise ValueError(f"{n_cached + T} tokens are more than {what}={limit}; pass fewer")
        if cache is not None and (targets is not None or doc_start is not None or torch.is_grad_enabled()):
            raise ValueError("a cache serves decoding: no targets, no doc_start, and within torch.no_grad()")
        pos = make_positions(tokens, doc_start, self.config, n_cached)
        rows = None
        if targets is not None and (indexer_rows is not None or torch.is_grad_enabled()):
            rows = torch.arange(T, device=tokens.device) if indexer_rows is None else indexer_rows.sort().values
        x = self.embed(tokens)
        parts: list[AttentionOutput] = []
        for i, layer in enumerate(self.layers):
            if self._checkpointing and torch.is_grad_enabled():
                # no block draws random numbers: there is no generator state to preserve
                part = checkpoint(
                    layer,
                    x,
                    pos,
                    rows,
                    probe_rows,
                    use_reentrant=False,
                    preserve_rng_state=False,
                    context_fn=kernels.recomputation_contexts,
                )
            else:
                part = layer(x, pos, rows, probe_rows, None if cache is None else cache.layers[i])
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
    """Number of parameters by part, and "total"; a tied head counts 0."""
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
    """Useful floating-point operations per token of one training step, by part, and "total".

    A multiply-add counts as two. Forward and backward pass of a matrix product cost three forward products;
    recomputation is not counted. The projections of the indexer have no input gradient, because its input is detached.
    Attention and the gradient of the alignment loss count the selected pairs of query and key, the indexer's scores
    all visible ones.

    keys, visible: mean number of attended and of visible keys per query; by default those of one document of seq_len
    tokens that selects k_base keys. indexer_rows: share of query positions in the alignment loss, whose target
    probabilities have no backward pass.
    """
    c, n = config, count_params(config)
    if visible is None:
        visible = (seq_len + 1) / 2
    if keys is None:
        k = min(c.k_base, seq_len)
        # mean over t = 1 .. L of min(t, k)
        keys = (k * (k + 1) / 2 + (seq_len - k) * k) / seq_len if c.sparse else visible
    pair = 4.0 * c.n_heads * c.d_head  # q k and p v, of all heads
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
