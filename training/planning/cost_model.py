"""What a training step costs, by count: memory by part, arithmetic, seconds, communication. No GPU is asked.

Memory held for the backward pass is counted from what the code saves; benchmarks/memory.py compares it with what
autograd really saves (benchmarks/results/memory_cpu.md). Seconds rest on `Assumed`, shares of a device's peak that
nobody has measured yet on the device in question: every report that shows seconds says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gsa.config import ModelConfig
from gsa.loss import BLOCK_BYTES, n_blocks
from gsa.model import Recomputed, count_params, flops_per_token
from training.config import BatchPlan, RunConfig
from training.planning.devices import Device

GIB = 2**30
Kernels = Literal["triton", "chunked", "naive gather"]


@dataclass(frozen=True)
class Assumed:
    """What seconds are predicted from, beside counts and the device's peaks: all of it printed with every prediction.

    Shares of those peaks, unless said.
    """

    matmul: float = 0.65
    half_matmul_tokens: int = 1024
    """Tokens of a micro-batch at which matrix products reach half of it: small ones leave multiprocessors idle."""
    dense_attention: float = 0.40
    masked_attention: float = 0.22
    index_scores: float = 0.20
    memory_bandwidth: float = 0.75
    elementwise_passes: float = 5.0
    """Times that what a block holds for its backward pass crosses the memory's bus."""
    head_bytes_per_logit: float = 20.0
    """Memory traffic of the loss head per float32 logit, on Triton's kernels: twice written and twice read, once
    written in bf16 and read by a matrix product."""
    adam_bytes: float = 60.0
    """Memory traffic of AdamW per parameter, in separate passes; of the host's memory where it runs there."""
    launch_s: float = 10e-6
    """Seconds the host needs for one operation, autograd and hooks included."""
    block_launches: float = 190.0
    """Operations of one dense block, forward and backward, as torch's dispatcher saw them."""
    sparse_launches: float = 110.0
    """More of them with an indexer: its projections, selection in strips, the alignment loss."""
    zero3_launches: float = 200.0
    """As many more operations' time per block for the hooks that gather and release weights."""
    collectives: float = 0.80
    host_link_gb_s: float = 20.0
    """Of each GPU to host memory, each way."""
    host_memory_gb_s: float = 40.0
    """What AdamW on the host reaches, for all ranks together."""
    fragmentation: float = 0.04
    """Of what is allocated, lost between blocks of the allocator."""
    context_gib: float = 1.0
    """CUDA context, libraries' workspaces and NCCL's buffers."""


ASSUMED = Assumed()


@dataclass(frozen=True)
class Setting:
    """One way to run a global batch of micro_batch_size x accumulation_steps x world_size windows."""

    world_size: int
    zero_stage: int
    micro_batch_size: int
    accumulation_steps: int
    recomputed: Recomputed
    offload: bool = False
    reduce_bucket: int = 500_000_000
    allgather_bucket: int = 500_000_000
    overlap: bool = True

    @property
    def global_batch_size(self) -> int:
        return self.world_size * self.micro_batch_size * self.accumulation_steps


def setting_of(cfg: RunConfig, ds_config: dict, plan: BatchPlan) -> Setting:
    """The Setting that a resolved configuration and DeepSpeed dict describe."""
    zero = ds_config["zero_optimization"]
    gather = "stage3_prefetch_bucket_size" if zero.get("stage") == 3 else "allgather_bucket_size"
    return Setting(
        plan.world_size,
        zero.get("stage", 0),
        plan.micro_batch_size,
        plan.accumulation_steps,
        cfg.training.recomputed,
        offload="offload_optimizer" in zero,
        overlap=bool(zero.get("overlap_comm", False)),
        reduce_bucket=int(zero.get("reduce_bucket_size", Setting.reduce_bucket)),
        allgather_bucket=int(zero.get(gather, Setting.allgather_bucket)),
    )


# -- memory ---------------------------------------------------------------------------------------------


def norm_saved(c: ModelConfig, width: int, fused: bool) -> float:
    """Bytes per token that a norm saves, its output included, which a matrix product saves.

    fused: torch's kernel for GPUs keeps the input and its root; in parts, the input and the scaled one in float32.
    """
    return (width * c.d_model if fused else 8 * c.d_model) + 4 + width * c.d_model


def attention_saved(c: ModelConfig, T: int, width: int, rows: float, fused: bool) -> float:
    """Bytes per token that the attention half of a block saves for its backward pass.

    width: bytes of an activation. rows: share of positions whose alignment loss is taken. fused: see `norm_saved`.
    """
    q, kv, E = c.n_heads * c.d_head, c.n_kv_heads * c.d_head, c.d_indexer
    saved = norm_saved(c, width, fused)
    saved += width * (2 * q + 2 * kv) + 4 * c.n_heads  # q, k, v, out, log-sum-exp
    saved += width * (2 * kv * c.value_gate + 2 * q * c.output_gate)
    if width == 2:  # a float32 model's rotations are saved once for all blocks; others cast their own
        saved += 4 * width * c.d_head / 2
        if c.sparse and c.indexer_rope:
            saved += 4 * width * E / 2
    if c.sparse:
        saved += _selected_set(c, T) + _indexer_gradients(c, width, rows)
    return saved


def ffn_saved(c: ModelConfig, width: int, fused: bool) -> float:
    """Bytes per token that the feed-forward half of a block saves: the norm, gate, up, and their product."""
    return norm_saved(c, width, fused) + 3 * width * c.d_ffn


def held_per_token(
    c: ModelConfig, T: int, width: int, rows: float, recomputed: Recomputed, fused: bool = True
) -> float:
    """Bytes per token that one block holds between its forward and its backward pass."""
    if recomputed == "none":
        return attention_saved(c, T, width, rows, fused) + ffn_saved(c, width, fused)
    if recomputed == "ffn":
        return attention_saved(c, T, width, rows, fused) + width * c.d_model
    held = width * c.d_model
    if c.sparse:
        held += _selected_set(c, T) + 8 + 4 * (c.adaptive_k != "off") + _indexer_gradients(c, width, rows)
    return held


def _selected_set(c: ModelConfig, T: int) -> float:
    return 4 * -(-T // 32) if c.k_min < T else 0.0


def _indexer_gradients(c: ModelConfig, width: int, rows: float) -> float:
    return width * (rows * c.n_indexer_heads * (c.d_indexer + 1) + c.d_indexer)


def saved_bytes(
    c: ModelConfig, B: int, T: int, width: int, *, recomputed: Recomputed, rows: float, fused: bool = True
) -> dict[str, float]:
    """What a forward pass of B x T tokens holds for its backward pass ("activations"), and what computing one block
    again brings back ("recomputed block")."""
    N = B * T
    ends = (norm_saved(c, width, fused) + 4) * N  # the final norm, and the head's log-sum-exp
    back = {"none": 0.0, "ffn": ffn_saved(c, width, fused), "block": held_per_token(c, T, width, rows, "none", fused)}[
        recomputed
    ]
    return {
        "activations": c.n_layers * held_per_token(c, T, width, rows, recomputed, fused) * N + ends,
        "recomputed block": back * N,
    }


def naive_gather_bytes(c: ModelConfig, B: int, T: int, width: int) -> float:
    """Keys and values that the predecessor's layer gathers for every query: (B, T, k_base, H, D) each."""
    return 2.0 * B * T * min(c.k_base, T) * c.n_heads * c.d_head * width


def memory_bytes(
    c: ModelConfig, T: int, s: Setting, *, bf16: bool, rows: float, kernels: Kernels = "triton", fused: bool = True
) -> dict[str, float]:
    """Peak memory of one rank's device by part, in bytes, with "peak". fused: see `norm_saved`.

    Two moments compete: the backward pass, which holds activations, and the optimizer step, which holds float32
    gradients and AdamW's temporaries. "peak" is that of the larger, fragmentation and the device's context added.
    """
    P, W = count_params(c)["total"], s.world_size if s.zero_stage else 1
    width = 2 if bf16 else 4
    B, N = s.micro_batch_size, s.micro_batch_size * T
    held = saved_bytes(c, B, T, width, recomputed=s.recomputed, rows=rows, fused=fused)
    on_device = 0.0 if s.offload else 1.0
    states = (12.0 * P / W if s.zero_stage else (8.0 if not bf16 else 12.0) * P) * on_device
    sharded_gradients = s.zero_stage >= 2
    parts = {
        "weights": width * P / (W if s.zero_stage == 3 else 1),
        "gradients": width * P / (W if sharded_gradients else 1) * (on_device if sharded_gradients else 1.0),
        "masters and moments": states,
        "ZeRO buckets": _buckets(P, s, width) if W > 1 or s.zero_stage else 0.0,
        "activations": held["activations"],
        "recomputed block": held["recomputed block"],
        "attention workspace": _attention_workspace(c, B, T, rows, width, kernels),
        "loss head": _head_workspace(c, N, width),
        "optimizer step": (4.0 + 4.0 + width) * P / W * on_device if s.zero_stage else 4.0 * P,
    }
    always = parts["weights"] + parts["gradients"] + parts["masters and moments"] + parts["ZeRO buckets"]
    # the gradient that a tied head leaves waits for that of the embedding, to the end of the backward pass
    waiting = width * c.vocab_size * c.d_model if c.tie_embeddings else 0.0
    in_a_block = parts["recomputed block"] + parts["attention workspace"] + waiting
    backward = parts["activations"] + max(in_a_block, parts["loss head"])
    allocated = always + max(backward, parts["optimizer step"])
    parts["allocator and context"] = ASSUMED.fragmentation * allocated + ASSUMED.context_gib * GIB
    return parts | {"allocated": allocated, "peak": allocated + parts["allocator and context"]}


def _buckets(P: int, s: Setting, width: int) -> float:
    reduce = min(s.reduce_bucket, P) * width * (2 if s.overlap else 1)
    gather = min(s.allgather_bucket, P) * width if s.zero_stage == 3 else 0.0
    return float(reduce + gather)


def _attention_workspace(c: ModelConfig, B: int, T: int, rows: float, width: int, kernels: Kernels) -> float:
    q = c.n_heads * c.d_head
    gradients = width * B * T * (2 * q + 4 * c.n_kv_heads * c.d_head)
    if not c.sparse:
        return gradients
    if kernels == "naive gather":
        return naive_gather_bytes(c, B, T, width) * 2 + 4.0 * B * T * T
    strip = min(512, T)
    levels, logits = 2.0 * B * strip * T, 4.0 * B * min(512, max(1, round(rows * T))) * T
    return gradients + max(levels, logits)


def _head_workspace(c: ModelConfig, N: int, width: int) -> float:
    """A block of logits, in float32 and in the model's width, hidden's gradient in float32, and the weight's own."""
    block = min(BLOCK_BYTES, 4 * N * c.vocab_size)
    return block * (1 + width / 4 * (width == 2)) + 4.0 * N * c.d_model * 2 + width * c.vocab_size * c.d_model


# -- seconds --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step on every rank. parts: of computing, by kind. useful_flops: of one rank's share."""

    seconds: float
    parts: dict[str, float]
    communication: float
    exposed: float
    launch_bound: bool
    useful_flops: float
    mfu: float


def visible_keys(T: int) -> float:
    """Mean visible keys of a query in one document of T tokens."""
    return (T + 1) / 2


def step_time(c: ModelConfig, T: int, s: Setting, device: Device, *, bf16: bool, rows: float) -> StepTime | None:
    """Predicted seconds of a step on Triton's kernels: counted work over assumed shares of the device's peaks.

    None where the device's peak at the precision is not known.
    """
    tflops = device.bf16_tflops if bf16 else device.fp32_tflops
    if tflops is None:
        return None
    peak, width = tflops * 1e12, 2 if bf16 else 4
    N = s.micro_batch_size * T
    bandwidth = (device.memory_gb_s or 0.0) * 1e9 * ASSUMED.memory_bandwidth
    matmul_rate = peak * ASSUMED.matmul * N / (N + ASSUMED.half_matmul_tokens)
    n = count_params(c)
    again = {"none": 0.0, "ffn": 2.0 * 2 / 3 * n["ffn"], "block": 2.0 * (n["attention"] + n["gates"] + n["ffn"])}
    products = 6.0 * (n["attention"] + n["gates"] + n["ffn"]) + 4.0 * n["indexer"] + again[s.recomputed]
    micro = {
        "matrix products": N * products / matmul_rate,
        "loss head": N * 8.0 * c.vocab_size * c.d_model / matmul_rate,
        "attention": N * c.n_layers * attention_seconds(c, T, peak, sparse=c.sparse, recomputed=s.recomputed),
        "indexer": N * c.n_layers * indexer_seconds(c, T, peak, rows) if c.sparse else 0.0,
        "elementwise": 0.0,
    }
    if bandwidth:
        block = held_per_token(c, T, width, rows, "none")
        passes = ASSUMED.elementwise_passes + {"none": 0, "ffn": 1, "block": 2}[s.recomputed]
        # hidden's float32 gradient is read and written for every block of logits
        head = N * c.vocab_size * ASSUMED.head_bytes_per_logit + 8.0 * N * c.d_model * n_blocks(N, c.vocab_size)
        micro["elementwise"] = (N * c.n_layers * block * passes + head) / bandwidth
    busy = sum(micro.values())
    again_launches = {"none": 1.0, "ffn": 1.05, "block": 4 / 3}[s.recomputed]
    per_block = ASSUMED.block_launches + ASSUMED.sparse_launches * c.sparse
    per_block += ASSUMED.zero3_launches * (s.zero_stage == 3)
    launches = c.n_layers * per_block * again_launches * ASSUMED.launch_s
    micro_s = max(busy, launches)
    adam = _adam_seconds(n["total"], s, width, bandwidth)
    hidden, at_step = communication_seconds(c, s, device, width)
    # what overlaps hides behind the backward pass, two thirds of a micro-batch
    exposed = at_step + s.accumulation_steps * max(0.0, hidden - (micro_s * 2 / 3 if s.overlap else 0.0))
    seconds = s.accumulation_steps * micro_s + adam + exposed
    useful = flops_per_token(c, T, indexer_rows=rows)["total"] * N * s.accumulation_steps
    parts = {name: spent * s.accumulation_steps for name, spent in micro.items()}
    parts["waiting for launches"] = s.accumulation_steps * (micro_s - busy)
    parts["optimizer"] = adam
    return StepTime(
        seconds=seconds,
        parts=parts,
        communication=s.accumulation_steps * hidden + at_step,
        exposed=exposed,
        launch_bound=launches > busy,
        useful_flops=useful,
        mfu=useful / seconds / peak,
    )


def _adam_seconds(P: int, s: Setting, width: int, bandwidth: float) -> float:
    """Of the update. Offloaded, gradients go to the host with every micro-batch and weights come back once."""
    W = s.world_size if s.zero_stage else 1
    if s.offload:
        moved = (s.accumulation_steps + 1) * width * P / W / (ASSUMED.host_link_gb_s * 1e9)
        return moved + P * ASSUMED.adam_bytes / (ASSUMED.host_memory_gb_s * 1e9)
    return P / W * ASSUMED.adam_bytes / bandwidth if bandwidth else 0.0


def attention_seconds(c: ModelConfig, T: int, peak: float, *, sparse: bool, recomputed: Recomputed = "none") -> float:
    """Per token and layer, forward and backward. Today's masked kernels visit every visible key, selected or not."""
    pair = 2.0 * c.n_heads * c.d_head * visible_keys(T)  # one product of queries with keys
    forward = 2 * pair * (2 if recomputed == "block" else 1)
    # the backward pass: five products, seven where queries and keys have a kernel each
    backward, share = (7, ASSUMED.masked_attention) if sparse else (5, ASSUMED.dense_attention)
    return (forward + backward * pair) / (share * peak)


def indexer_seconds(c: ModelConfig, T: int, peak: float, rows: float) -> float:
    """Per token and layer: scores once for the selection, and the alignment loss on its rows."""
    score = 2.0 * c.n_indexer_heads * c.d_indexer * visible_keys(T)
    align = rows * (6 * score + 2.0 * c.n_heads * c.d_head * visible_keys(T))
    return (score + align) / (ASSUMED.index_scores * peak)


def communication_seconds(c: ModelConfig, s: Setting, device: Device, width: int = 2) -> tuple[float, float]:
    """(per micro-batch, beside its backward pass; per step, in the open), over the slowest link of a ring.

    DeepSpeed 0.19.8 sums gradients by an all-reduce, two passes over the ring, at stages 1 and 2 as well: every rank
    gets all of them and keeps its part. Stage 3 scatters them, in one.
    """
    W, P = s.world_size, count_params(c)["total"]
    if W == 1:
        return 0.0, 0.0
    one_pass = float(width) * P * (W - 1) / W / (device.link_gb_s * 1e9 * ASSUMED.collectives)
    if s.zero_stage == 3:
        return 3 * one_pass, 0.0  # weights gathered forward and backward, gradients scattered
    gathered = one_pass if s.zero_stage else 0.0
    if s.zero_stage == 2:
        return 2 * one_pass, gathered
    return 0.0, 2 * one_pass + gathered
