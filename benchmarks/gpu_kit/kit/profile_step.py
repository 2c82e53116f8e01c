"""Where a micro-batch of the 512M configuration, and the same model with dense attention, spend the device's time.

    python profile_step.py [--ways gsa flash cudnn masked] [--micro 8] [--length 2048] [--out FOLDER] [--smoke]

gsa: the model as it trains in the sparse stage. flash, cudnn: model.sparse=false on torch's fused kernels. masked: the
same on the trainer's own dense kernel. compiled: gsa with the trainer's torch.compile. Forward and backward pass only,
without optimizer and DeepSpeed. Prints ms per micro-batch, the host's ms to enqueue it, tokens/s, MFU, peak memory,
device ms by kind, the longest kernels, and how long the device was idle.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import re
import sys
import time
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F

KINDS = [
    ("attention backward, keys", r"attend_backward_keys"),
    ("attention backward, queries", r"attend_backward_queries"),
    ("attention forward", r"attend_forward"),
    ("torch's attention", r"flash_|fmha|cudnn.*(sdpa|attn|attention)|pytorch_flash|cudnn_generated"),
    ("selection: scores", r"level_strip"),
    ("selection: statistic", r"row_statistic"),
    ("selection: sets", r"select_rows"),
    ("alignment loss", r"align_"),
    ("loss head", r"fold_rows|gradient_rows"),
    ("feed-forward product", r"silu_(forward|backward)"),
    ("norms", r"[Rr]ms_?[Nn]orm|layer_norm|GammaBeta"),
    ("matrix products", r"gemm|nvjet|cutlass|sm90_xmma|splitK|cublas|gemv"),
    ("memory", r"Memcpy|Memset|fill"),
    ("cat", r"CatArray"),
    ("reductions", r"reduce_kernel"),
    ("index", r"index|gather|scatter|sort|searchsorted"),
    ("elementwise", r"elementwise|vectorized"),
    ("compiled", r"triton_"),
]


def kind_of(name):
    return next((kind for kind, pattern in KINDS if re.search(pattern, name)), "other")


@contextlib.contextmanager
def dense_kernel(kind):
    from torch.nn.attention import sdpa_kernel

    from gsa import kernels

    def attend(backend, q, k, v, bits, doc_start):
        heads = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel([kind]):
            return F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True).transpose(1, 2), None

    with patch.object(kernels, "attend", attend):
        yield


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--ways",
        nargs="+",
        default=["gsa", "flash", "cudnn", "masked"],
        choices=["gsa", "flash", "cudnn", "masked", "compiled"],
    )
    parser.add_argument("--micro", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    from torch.nn.attention import SDPBackend

    from gsa import GSAForCausalLM
    from gsa.model import flops_per_token
    from training.config import load_config
    from training.loop.step import indexer_rows
    from training.planning.devices import find_device

    gpu = torch.cuda.is_available()
    device = "cuda" if gpu else "cpu"
    if not gpu and not args.smoke:
        print("no GPU; --smoke shows that this runs", file=sys.stderr)
        return 2
    changes = [f"training.max_seq_len={args.length}", f"model.max_position_embeddings={args.length}"]
    if not gpu:
        args.micro, args.length, args.repeats = 1, 64, 2
        changes = [
            "training.max_seq_len=64",
            "model.d_model=64",
            "model.n_layers=2",
            "model.n_heads=4",
            "model.n_kv_heads=2",
            "model.d_ffn=128",
            "model.vocab_size=512",
            "model.d_indexer=16",
            "model.k_base=16",
            "model.k_min=4",
            "model.k_max=32",
        ]
    root = Path(sys.modules["gsa"].__file__).resolve().parents[1]
    cfg = load_config(root / "training/configs/pretrain_512m_low_memory.yaml", changes)
    lines, results = [], {}

    def say(line=""):
        lines.append(line)
        print(line, flush=True)

    def wait():
        if gpu:
            torch.cuda.synchronize()

    size = (args.micro, args.length)
    random = torch.Generator().manual_seed(0)
    tokens, targets = (torch.randint(0, cfg.model.vocab_size, size, generator=random).to(device) for _ in range(2))
    start = torch.zeros_like(tokens)
    rows = indexer_rows(0, 0, args.length, cfg.training.indexer_loss_rows).to(device)
    for way in args.ways:
        from dataclasses import replace

        model_cfg = cfg.model if way in ("gsa", "compiled") else replace(cfg.model, sparse=False)
        kernel = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}.get(way)
        try:
            with torch.device(device), dense_kernel(kernel) if kernel and gpu else contextlib.nullcontext():
                torch.manual_seed(0)
                model = GSAForCausalLM(model_cfg).to(torch.bfloat16)
                model.set_backend("triton" if gpu else "chunked")
                if way == "compiled":
                    model.compile_parts()
                host = [0.0]

                def once():
                    began = time.perf_counter()
                    for p in model.parameters():
                        p.grad = None
                    out = model(tokens, targets, start, indexer_rows=rows)
                    (out.loss + cfg.training.indexer_loss_weight * out.indexer_loss).backward()
                    host[0] = time.perf_counter() - began
                    return out

                began = time.perf_counter()
                out = once()
                wait()
                first = time.perf_counter() - began
                once()
                wait()
                if gpu:
                    torch.cuda.reset_peak_memory_stats()
                seconds, enqueued = [], []
                for _ in range(args.repeats):
                    wait()
                    began = time.perf_counter()
                    once()
                    wait()
                    seconds.append(time.perf_counter() - began)
                    enqueued.append(host[0])
                peak = torch.cuda.max_memory_allocated() / 2**30 if gpu else float("nan")
                s = sorted(seconds)[len(seconds) // 2]
                kinds, worst, idle, launches = {}, [], float("nan"), 0
                if gpu:
                    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as prof:
                        once()
                        wait()
                    kinds, counts = collections.Counter(), collections.Counter()
                    spans = []
                    for e in prof.events():
                        if e.device_type == torch.autograd.DeviceType.CUDA and e.device_time_total:
                            kinds[kind_of(e.name)] += e.device_time_total / 1e3
                            counts[e.name] += 1
                            spans.append((e.time_range.start, e.time_range.end))
                    launches = len(spans)
                    spans.sort()
                    busy, end = 0.0, spans[0][0]
                    for a, b in spans:
                        busy += max(0.0, b - max(a, end))
                        end = max(end, b)
                    idle = 1 - busy / (end - spans[0][0])
                    by_name = collections.Counter()
                    for e in prof.events():
                        if e.device_type == torch.autograd.DeviceType.CUDA:
                            by_name[e.name] += e.device_time_total / 1e3
                    worst = [(n, ms, counts[n]) for n, ms in by_name.most_common(32)]
        except Exception as err:
            say(f"{way} FAILED {type(err).__name__}: {str(err)[:300]}")
            continue
        finally:
            model = None
            if gpu:
                torch.cuda.empty_cache()
        n = size[0] * size[1]
        useful = flops_per_token(
            model_cfg,
            args.length,
            indexer_rows=cfg.training.indexer_loss_rows,
            keys=float(out.n_selected.mean()),
            visible=(args.length + 1) / 2,
        )["total"]
        card = find_device(torch.cuda.get_device_name(0)) if gpu else None
        mfu = useful * n / s / (card.bf16_tflops * 1e12) if card else float("nan")
        say(
            f"{way:<9} {s * 1e3:8.2f} ms a micro-batch of {size[0]} x {size[1]} "
            f"(host enqueues in {sorted(enqueued)[len(enqueued) // 2] * 1e3:.1f} ms, "
            f"{launches} launches, device idle {idle:.1%}); {n / s:,.0f} tokens/s, MFU {mfu:.1%}, "
            f"peak {peak:.1f} GiB, first {first:.1f} s, "
            f"keys {float(out.n_selected.mean()):.0f}"
        )
        for kind, ms in sorted(kinds.items(), key=lambda item: -item[1]):
            say(f"    {kind:<30}{ms:9.2f} ms {ms / sum(kinds.values()):6.1%}")
        for name, ms, count in worst:
            say(f"        {ms:9.3f} ms {count:5d} x {name[:110]}")
        results[way] = {
            "seconds": s,
            "host_seconds": enqueued,
            "mfu": mfu,
            "peak_gib": peak,
            "idle": idle,
            "launches": launches,
            "first_s": first,
            "kinds_ms": dict(kinds),
            "kernels": worst,
        }
        (args.out / "profile.json").write_text(json.dumps(results, indent=1))
        (args.out / "profile.txt").write_text("\n".join(lines) + "\n")
    if "gsa" in results:
        for other in results:
            say(f"gsa to {other}: {results['gsa']['seconds'] / results[other]['seconds']:.3f} of its time")
    (args.out / "profile.txt").write_text("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
