"""Counts what a training step costs, without a GPU: memory by part, arithmetic, communication, seconds.

Memory saved for the backward pass is counted from what the code saves; benchmarks/memory.py compares the count with
what autograd really saves (benchmarks/results/memory_cpu.md). Seconds depend on `Assumed`: shares of a device's peaks
that nobody has measured yet on that device. Every report that shows seconds prints these assumptions.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gsa.checkpoint import manifest
from gsa.config import ModelConfig
from gsa.loss import BLOCK_BYTES, n_blocks
from gsa.model import Recomputed, count_params, flops_per_token
from gsa.units import GIB
from training.config import BatchPlan, RunConfig
from training.planning.devices import Device

Kernels = Literal["triton", "chunked", "naive gather"]


@dataclass(frozen=True)
class Assumed:
    """What predicted seconds assume, besides counts and the device's peaks; every prediction is printed with it.

    A field without a unit is a share of the device's peak, unless its docstring says otherwise.
    """

    matmul: float = 0.65
    half_matmul_tokens: int = 1024
    """Tokens of a micro-batch at which matrix products reach half of `matmul`. Smaller micro-batches leave
    multiprocessors idle."""
    dense_attention: float = 0.40
    masked_attention: float = 0.22
    index_scores: float = 0.20
    memory_bandwidth: float = 0.75
    elementwise_passes: float = 5.0
    """Passes over a block's saved activations by elementwise kernels."""
    head_bytes_per_logit: float = 20.0
    """Memory traffic of the loss head per logit with Triton's kernels: two float32 writes, two float32 reads, one bf16
    write and one bf16 read."""
    adam_bytes: float = 60.0
    """Memory traffic of AdamW per parameter, in separate passes. It is host memory traffic with offloading."""
    launch_s: float = 10e-6
    """Seconds that the host needs to launch one operation, autograd and hooks included."""
    block_launches: float = 190.0
    """Operations of one dense block, forward and backward, as counted by torch's dispatcher."""
    sparse_launches: float = 110.0
    """Extra operations of a block with an indexer: its projections, selection in strips and the alignment loss."""
    zero3_launches: float = 200.0
    """Extra kernel-launch equivalents per block for ZeRO 3's gather and release hooks."""
    collectives: float = 0.80
    """Share of the link's bandwidth."""
    host_link_gb_s: float = 20.0
    """Bandwidth between each GPU and host memory, in each direction."""
    host_memory_gb_s: float = 40.0
    """Host memory bandwidth that AdamW reaches on the CPU, for all ranks together."""
    fragmentation: float = 0.04
    """Share of the allocated memory that is lost between the allocator's blocks."""
    context_gib: float = 1.0
    """CUDA context, workspaces of libraries and NCCL's buffers."""


ASSUMED = Assumed()


@dataclass(frozen=True)
class ParallelSetting:
    """One way to run a global batch of world_size x micro_batch_size x accumulation_steps windows."""

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


def setting_of(cfg: RunConfig, ds_config: dict, plan: BatchPlan) -> ParallelSetting:
    """The setting that a configuration and its resolved DeepSpeed dict describe."""
    zero = ds_config["zero_optimization"]
    gather = "stage3_prefetch_bucket_size" if zero.get("stage") == 3 else "allgather_bucket_size"
    return ParallelSetting(
        plan.world_size,
        zero.get("stage", 0),
        plan.micro_batch_size,
        plan.accumulation_steps,
        cfg.training.recomputed,
        offload="offload_optimizer" in zero,
        overlap=bool(zero.get("overlap_comm", False)),
        reduce_bucket=int(zero.get("reduce_bucket_size", ParallelSetting.reduce_bucket)),
        allgather_bucket=int(zero.get(gather, ParallelSetting.allgather_bucket)),
    )


# -- memory ---------------------------------------------------------------------------------------------


def norm_saved(c: ModelConfig, width: int, fused: bool) -> float:
    """Bytes per token that a norm saves, including its output, which the next matrix product saves.

    fused: torch's GPU kernel saves the input and its inverse root mean square. Otherwise torch computes the norm in
    parts, and saves the input and the scaled input in float32.
    """
    return (width * c.d_model if fused else 8 * c.d_model) + 4 + width * c.d_model


def attention_saved(c: ModelConfig, T: int, width: int, rows: float, fused: bool) -> float:
    """Bytes per token that the attention half of a block saves for its backward pass.

    width: bytes per activation. rows: share of positions whose alignment loss is computed. fused: see `norm_saved`.
    """
    q, kv, E = c.n_heads * c.d_head, c.n_kv_heads * c.d_head, c.d_indexer
    saved = norm_saved(c, width, fused)
    saved += width * (2 * q + 2 * kv) + 4 * c.n_heads  # q, k, v, out, log-sum-exp
    saved += width * (2 * kv * c.value_gate + 2 * q * c.output_gate)
    if width == 2:  # float32 models save the rotation tables once for all blocks; bf16 models cast them in each
        saved += 4 * width * c.d_head / 2
        if c.sparse and c.indexer_rope:
            saved += 4 * width * E / 2
    if c.sparse:
        saved += _selected_set(c, T) + _indexer_gradients(c, width, rows)
    return saved


def ffn_saved(c: ModelConfig, width: int, fused: bool) -> float:
    """Bytes per token that the feed-forward half of a block saves: its norm, gate, up, and their product."""
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
    """Bytes that a forward pass over B x T tokens saves for its backward pass ("activations"), and bytes that
    recomputing one block adds during the backward pass ("recomputed block")."""
    N = B * T
    ends = (norm_saved(c, width, fused) + 4) * N  # the final norm and the head's log-sum-exp
    back = {"none": 0.0, "ffn": ffn_saved(c, width, fused), "block": held_per_token(c, T, width, rows, "none", fused)}[
        recomputed
    ]
    return {
        "activations": c.n_layers * held_per_token(c, T, width, rows, recomputed, fused) * N + ends,
        "recomputed block": back * N,
    }


def naive_gather_bytes(c: ModelConfig, B: int, T: int, width: int) -> float:
    """Bytes of the keys and values that the legacy layer gathers for every query: (B, T, k_base, H, D) each."""
    return 2.0 * B * T * min(c.k_base, T) * c.n_heads * c.d_head * width


def memory_bytes(
    c: ModelConfig,
    T: int,
    s: ParallelSetting,
    *,
    bf16: bool,
    rows: float,
    kernels: Kernels = "triton",
    fused: bool = True,
) -> dict[str, float]:
    """Memory of one rank's device by part, in bytes, with the totals "allocated" and "peak". fused: see `norm_saved`.

    The peak is reached either in the backward pass, which holds activations, or in the optimizer step, which holds
    float32 gradients and AdamW's temporaries. "allocated" is the larger of the two; "peak" adds fragmentation and the
    device's context.
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
    # a tied head's gradient stays in memory until the embedding's is added, at the end of the backward pass
    waiting = width * c.vocab_size * c.d_model if c.tie_embeddings else 0.0
    in_a_block = parts["recomputed block"] + parts["attention workspace"] + waiting
    backward = parts["activations"] + max(in_a_block, parts["loss head"])
    allocated = always + max(backward, parts["optimizer step"])
    parts["allocator and context"] = ASSUMED.fragmentation * allocated + ASSUMED.context_gib * GIB
    return parts | {"allocated": allocated, "peak": allocated + parts["allocator and context"]}


def _buckets(P: int, s: ParallelSetting, width: int) -> float:
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
    """Bytes of a block of logits (in float32 and in the model's width), and of the gradients of hidden states (float32)
    and weight."""
    block = min(BLOCK_BYTES, 4 * N * c.vocab_size)
    return block * (1 + width / 4 * (width == 2)) + 4.0 * N * c.d_model * 2 + width * c.vocab_size * c.d_model


# -- seconds --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepTime:
    """Predicted time of one optimizer step.

    parts: seconds of computation by kind. communication: seconds of all of it. exposed: the communication that no
    computation hides. useful_flops: those of one rank.
    """

    seconds: float
    parts: dict[str, float]
    communication: float
    exposed: float
    launch_bound: bool
    useful_flops: float
    mfu: float


def visible_keys(T: int) -> float:
    """Mean number of visible keys of a query, in one document of T tokens."""
    return (T + 1) / 2


def step_time(
    c: ModelConfig, T: int, s: ParallelSetting, device: Device, *, bf16: bool, rows: float
) -> StepTime | None:
    """Predicts a step with Triton's kernels: counted work divided by assumed shares of the device's peaks.

    Returns None when the device's peak at this precision is unknown.
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
        # the float32 gradient of the hidden states is read and written for every block of logits
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
    # overlapped communication hides behind the backward pass, which is two thirds of a micro-batch
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


def _adam_seconds(P: int, s: ParallelSetting, width: int, bandwidth: float) -> float:
    """Seconds of the optimizer's update. With offloading, gradients are sent to the host in every micro-batch and the
    weights come back once per step."""
    W = s.world_size if s.zero_stage else 1
    if s.offload:
        moved = (s.accumulation_steps + 1) * width * P / W / (ASSUMED.host_link_gb_s * 1e9)
        return moved + P * ASSUMED.adam_bytes / (ASSUMED.host_memory_gb_s * 1e9)
    return P / W * ASSUMED.adam_bytes / bandwidth if bandwidth else 0.0


def attention_seconds(c: ModelConfig, T: int, peak: float, *, sparse: bool, recomputed: Recomputed = "none") -> float:
    """Seconds per token and layer, forward and backward.

    Today's sparse kernels visit every visible key and mask those that are not selected.
    """
    pair = 2.0 * c.n_heads * c.d_head * visible_keys(T)  # one product of queries and keys
    forward = 2 * pair * (2 if recomputed == "block" else 1)
    # the backward pass has five products, or seven with separate kernels for the gradients of queries and keys
    backward, share = (7, ASSUMED.masked_attention) if sparse else (5, ASSUMED.dense_attention)
    return (forward + backward * pair) / (share * peak)


def indexer_seconds(c: ModelConfig, T: int, peak: float, rows: float) -> float:
    """Seconds per token and layer: index scores for the selection, and the alignment loss on its rows."""
    score = 2.0 * c.n_indexer_heads * c.d_indexer * visible_keys(T)
    align = rows * (6 * score + 2.0 * c.n_heads * c.d_head * visible_keys(T))
    return (score + align) / (ASSUMED.index_scores * peak)


def communication_seconds(c: ModelConfig, s: ParallelSetting, device: Device, width: int = 2) -> tuple[float, float]:
    """(seconds per micro-batch, which may overlap its backward pass; seconds per step, which nothing hides).

    Messages pass over the slowest link of a ring. DeepSpeed 0.19.8 sums gradients with an all-reduce, which takes two
    passes over the ring, at stages 1 and 2 as well: every rank receives all gradients and uses its part. Stage 3 uses a
    reduce-scatter, which takes one pass.
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


# -- disk -----------------------------------------------------------------------------------------------


def checkpoint_bytes(cfg: RunConfig, last: Path | None) -> int:
    """Bytes that a checkpoint of this run takes on disk: the size of the `last` one, or a count when there is none."""
    if last is not None and (last / manifest.MANIFEST).exists():
        return sum(entry.bytes for entry in manifest.read(last).files.values())
    parameters = count_params(cfg.model)["total"]
    working = 2 if cfg.training.precision == "bf16" else 4
    # masters and two moments, and the working weights twice: once for DeepSpeed, once as model.safetensors
    return int(parameters * (12 + 2 * working) * 1.02) + 2**20
