"""Checks, in the first minute on a GPU, whether each thing that the trainer relies on works.

    python check.py [--smoke]

A probe that fails prints one line and does not stop the next one. Exit code: the number of failures.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback

FAILED: list[str] = []


def probe(name):
    def run(call):
        began = time.perf_counter()
        try:
            report = call()
        except Exception as err:
            FAILED.append(name)
            last = traceback.extract_tb(err.__traceback__)[-1]
            print(
                f"FAILED  {name}: {type(err).__name__}: {str(err).splitlines()[0] if str(err) else ''} "
                f"[{os.path.basename(last.filename)}:{last.lineno}]",
                flush=True,
            )
        else:
            print(f"ok      {name} ({time.perf_counter() - began:.1f} s): {report}", flush=True)
        return call

    return run


parser = argparse.ArgumentParser()
parser.add_argument("--smoke", action="store_true")
args = parser.parse_args()

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and not args.smoke:
    sys.exit("no GPU; --smoke shows that this runs")
GPU = DEVICE == "cuda"


def wait():
    if GPU:
        torch.cuda.synchronize()


def timed(call, repeats=5):
    call()
    wait()
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    wait()
    return (time.perf_counter() - began) / repeats


@probe("versions")
def _():
    import platform

    import triton

    found = [
        f"python {platform.python_version()}",
        f"torch {torch.__version__}",
        f"triton {triton.__version__}",
        f"{os.cpu_count()} cpus",
    ]
    if GPU:
        p = torch.cuda.get_device_properties(0)
        found += [
            p.name,
            f"{p.total_memory / 2**30:.1f} GiB",
            f"{p.multi_processor_count} SMs",
            f"L2 {p.L2_cache_size >> 20} MiB",
            f"cudnn {torch.backends.cudnn.version()}",
            f"nccl {torch.cuda.nccl.version()}",
        ]
    return ", ".join(found)


@probe("the device is in the table of devices, and NVML answers every query")
def _():
    from training.observe.gpu_monitor import Monitor
    from training.planning.devices import find_device

    if not GPU:
        return "no GPU"
    monitor = Monitor(interval_s=0.1)
    time.sleep(0.5)
    row = monitor.read()
    messages = monitor.new_messages()
    monitor.close()
    assert find_device(torch.cuda.get_device_name(0)) is not None, "not in the table"
    assert not messages, messages
    return {k.split("/")[-1]: round(v, 2) if isinstance(v, float) else v for k, v in row.items()}


@probe("ceilings: copy and matrix products")
def _():
    n = 2**30 if GPU else 2**20
    a = torch.empty(n, dtype=torch.uint8, device=DEVICE)
    b = torch.empty_like(a)
    found = [f"copy {2 * n / timed(lambda: b.copy_(a), 10) / 1e12:.2f} TB/s read and written"]
    del a, b
    shapes = [
        (8192, 8192, 8192),
        (16384, 3072, 1024),
        (16384, 1024, 3072),
        (16384, 1024, 1024),
        (16384, 256, 1024),
        (16384, 64, 1024),
        (16384, 4, 1024),
        (16384, 3140, 1024),
        (3072, 1024, 16384),
        (16384, 1024, 151936),
        (4096, 151936, 1024),
        (151936, 1024, 4096),
    ]
    for m, k_out, k_in in shapes if GPU else [(64, 64, 64)]:
        x, y = (
            torch.randn(m, k_in, device=DEVICE, dtype=torch.bfloat16),
            torch.randn(k_in, k_out, device=DEVICE, dtype=torch.bfloat16),
        )
        s = timed(lambda: x @ y, 10)
        found.append(f"{m}x{k_out}x{k_in} {2 * m * k_out * k_in / s / 1e12:.0f}")
    return "; ".join(found) + " TFLOP/s"


@probe("mm and addmm of bfloat16 with out_dtype float32, in place")
def _():
    from gsa import kernels

    a, b = torch.randn(150, 600, device=DEVICE).bfloat16(), torch.randn(600, 64, device=DEVICE).bfloat16()
    exact = a.double() @ b.double()
    one = kernels.product(a, b, torch.float32)
    total = torch.ones(150, 64, device=DEVICE)
    kernels.add_product("triton" if GPU else "chunked", total, a, b)
    off = [((x.double() - e).abs().max() / exact.abs().max()).item() for x, e in ((one, exact), (total, exact + 1))]
    assert one.dtype == torch.float32 and max(off) < 1e-5, off
    return off


@probe("torch's dense attention, grouped heads, forward and backward")
def _():
    from torch.nn.attention import SDPBackend, sdpa_kernel

    B, T = (8, 2048) if GPU else (1, 64)
    q = torch.randn(B, 16, T, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    k, v = (torch.randn(B, 4, T, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    report = []
    for kind in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, None):
        try:

            def both():
                if kind is None:
                    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).sum().backward()
                with sdpa_kernel([kind]):
                    F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).sum().backward()

            report.append(f"{'default' if kind is None else kind.name} {timed(both) * 1e3:.2f} ms")
        except RuntimeError as err:
            report.append(f"{kind.name} no ({str(err).splitlines()[0][:60]})")
    return "; ".join(report)


@probe("rms_norm is one kernel, and right in bfloat16")
def _():
    x, w = (
        torch.randn(512, 1024, device=DEVICE).bfloat16().requires_grad_(),
        torch.ones(1024, device=DEVICE).bfloat16().requires_grad_(),
    )
    y = F.rms_norm(x, (1024,), w, 1e-5)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    y.sum().backward()
    return f"off by {((y.double() - exact).abs().max() / exact.abs().max()).item():.1e}, {y.grad_fn.name()}"


@probe("Triton's kernels against the float64 reference, every deviation")
def _():
    from gsa.kernels import choice

    if not GPU:
        return "no GPU"
    shape = choice.Shape(16, 4, 64, 4, 64, torch.bfloat16)
    why = choice.why_not_triton(shape, torch.device("cuda"))
    assert why is None, why
    found = {name: f"{error:.1e}" for name, error in choice._all_deviations("triton", shape, torch.device("cuda"))}
    fault = choice.fault_of("triton", shape, torch.device("cuda"))
    assert fault is None, fault
    return found


@probe("twice the same bits")
def _():
    from gsa.kernels import choice

    if not GPU:
        return "no GPU"
    shape = choice.Shape(16, 4, 64, 4, 64, torch.bfloat16)
    runs = [choice.deviations("triton", shape, torch.device("cuda"), choice.CHECK_CASES[1]) for _ in range(2)]
    assert runs[0] == runs[1], runs
    return "yes"


@probe("page-locked memory: seconds per GiB, copies to the host")
def _():
    n = 2**31 - 2**26 if GPU else 2**20  # as the masters of 512M
    began = time.perf_counter()
    host = torch.empty(n, dtype=torch.uint8, pin_memory=GPU)
    allocating = time.perf_counter() - began
    there = torch.empty(n, dtype=torch.uint8, device=DEVICE)
    s = timed(lambda: host.copy_(there, non_blocking=True), 3)
    stats = torch.cuda.host_memory_stats() if GPU and hasattr(torch.cuda, "host_memory_stats") else {}
    allocated = stats.get("allocated_bytes.current", 0) / 2**30
    return (
        f"{allocating:.2f} s for {n / 2**30:.2f} GiB (allocated {allocated:.2f} GiB), "
        f"device to host {n / s / 1e9:.1f} GB/s"
    )


def ten_steps(world, host_runs_ahead):
    """Losses, norms, and the device's and the host's median milliseconds of a step."""
    from pathlib import Path
    from unittest.mock import patch

    from gsa import GSAForCausalLM, ModelConfig
    from training.config import RunConfig, TrainingConfig, plan_batch
    from training.config.deepspeed import resolve_ds_config
    from training.engine import engine as door
    from training.engine.optimizer import build_optimizer, build_schedule

    cfg = RunConfig(
        model=ModelConfig(
            d_model=512 if GPU else 64,
            n_layers=8 if GPU else 2,
            n_heads=8,
            n_kv_heads=2,
            d_head=64 if GPU else 16,
            d_ffn=1536 if GPU else 128,
            vocab_size=32768 if GPU else 512,
            max_position_embeddings=1024,
            k_base=64,
            k_min=16,
            k_max=128,
            d_indexer=64 if GPU else 16,
        ),
        training=TrainingConfig(
            max_steps=100,
            warmup_steps=0,
            max_seq_len=1024 if GPU else 64,
            micro_batch_size=4,
            gradient_accumulation_steps=2,
            global_batch_size=8,
            precision="bf16",
        ),
    )
    torch.manual_seed(0)
    model = GSAForCausalLM(cfg.model)
    model.set_backend("triton" if GPU else "chunked")
    optimizer = build_optimizer(model, cfg.training)
    ds_config = resolve_ds_config(None, cfg, plan_batch(cfg.training, 1), Path("x"))
    with patch.object(
        door,
        "_order_streams_instead_of_syncing",
        door._order_streams_instead_of_syncing if host_runs_ahead else lambda optimizer: None,
    ):
        engine = door.Engine(model, optimizer, build_schedule(optimizer, cfg.training), ds_config)
    random = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, cfg.model.vocab_size, (4, cfg.training.max_seq_len), generator=random).to(world.device)
    doc = torch.zeros_like(tokens)
    losses, norms, host, both = [], [], [], []
    for _ in range(10):
        wait()
        began = time.perf_counter()
        for _ in range(2):
            out = engine.forward(tokens, tokens, doc)
            engine.backward(out.loss + out.indexer_loss)
            if len(host) == len(both):
                host.append(time.perf_counter() - began)  # of the first micro-batch
            engine.step()
        wait()
        both.append(time.perf_counter() - began)
        losses.append(out.loss.item())
        norms.append(engine.grad_norm())
    engine.destroy()
    assert losses[-1] < losses[0] and all(0 < n < 1e4 for n in norms), (losses, norms)
    return losses, norms, sorted(both)[5] * 1e3, sorted(host)[5] * 1e3


@probe("DeepSpeed: a process group of one, ZeRO 2, ten steps, twice the same, and the same where the host waits")
def _():
    began = time.perf_counter()
    from training.engine.engine import start

    importing = time.perf_counter() - began
    world = start(timeout_s=60)
    starting = time.perf_counter() - began - importing
    ahead, again, waiting = ten_steps(world, True), ten_steps(world, True), ten_steps(world, False)
    report = (
        f"import {importing:.1f} s, start {starting:.1f} s, loss {ahead[0][0]:.3f} -> {ahead[0][-1]:.3f}, "
        f"norm {ahead[1][0]:.2f}; a step {ahead[2]:.1f} ms, "
        f"where the host waits {waiting[2]:.1f}; a micro-batch enqueued in {ahead[3]:.1f} ms, there {waiting[3]:.1f}"
    )
    assert ahead[:2] == again[:2], f"not the same twice: {ahead[:2]} {again[:2]}; {report}"
    assert ahead[:2] == waiting[:2], f"not the same where the host waits: a race: {ahead[:2]} {waiting[:2]}; {report}"
    return report


print(f"check: {len(FAILED)} failed{': ' + '; '.join(FAILED) if FAILED else ''}", flush=True)
sys.stdout.flush()
os._exit(len(FAILED))
