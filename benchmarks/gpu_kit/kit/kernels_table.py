"""Times every operation of the attention layer and torch's dense kernels, from 2K to 128K tokens; sweeps tile settings.

    python kernels_table.py [--parts table sweep head adam] [--lengths 2048 ...] [--out FOLDER] [--smoke]

16 heads of 64, 4 key/value heads, indexer 4 x 64, k 512 (128 to 1024), bf16, about 16K tokens a call (one sequence
from 16K on). Times are device times of each kernel as torch.profiler records them, without the host's share. Inputs are
random, so that selected sets have no locality; today's kernels visit every tile in any case.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

H, G, D, J, E, K = 16, 4, 64, 4, 64, 512

SWEEP = {
    "FORWARD": [
        {"rows": 128, "BN": 64, "num_warps": 8, "num_stages": 2},
        {"rows": 128, "BN": 64, "num_warps": 8, "num_stages": 3},
        {"rows": 128, "BN": 64, "num_warps": 4, "num_stages": 2},
        {"rows": 128, "BN": 128, "num_warps": 8, "num_stages": 2},
        {"rows": 64, "BN": 64, "num_warps": 4, "num_stages": 2},
        {"rows": 64, "BN": 128, "num_warps": 4, "num_stages": 2},
        {"rows": 256, "BN": 64, "num_warps": 8, "num_stages": 2},
    ],
    "BACKWARD_QUERIES": [
        {"rows": 128, "BN": 64, "num_warps": 8, "num_stages": 2},
        {"rows": 128, "BN": 64, "num_warps": 8, "num_stages": 2, "maxnreg": 128},
        {"rows": 64, "BN": 64, "num_warps": 4, "num_stages": 2},
        {"rows": 64, "BN": 64, "num_warps": 4, "num_stages": 3},
        {"rows": 128, "BN": 128, "num_warps": 8, "num_stages": 2},
        {"rows": 64, "BN": 128, "num_warps": 4, "num_stages": 2},
    ],
    "BACKWARD_KEYS": [
        {"rows": 64, "BN": 64, "num_warps": 8, "num_stages": 2},
        {"rows": 64, "BN": 64, "num_warps": 4, "num_stages": 2},
        {"rows": 64, "BN": 64, "num_warps": 4, "num_stages": 1},
        {"rows": 64, "BN": 128, "num_warps": 8, "num_stages": 2},
        {"rows": 64, "BN": 128, "num_warps": 8, "num_stages": 1},
        {"rows": 32, "BN": 128, "num_warps": 8, "num_stages": 2},
        {"rows": 32, "BN": 128, "num_warps": 4, "num_stages": 1},
    ],
}
"""Tile settings to try; the first of each list is the one in use."""
KERNELS = {
    "FORWARD": "attend_forward",
    "BACKWARD_QUERIES": "attend_backward_queries",
    "BACKWARD_KEYS": "attend_backward_keys",
}


@contextlib.contextmanager
def tiles(name, setting):
    from gsa.kernels import triton_attention as module

    before = getattr(module, name)
    setattr(module, name, dict(setting))
    try:
        yield
    finally:
        setattr(module, name, before)


def device_ms(call, repeats):
    """{kernel: milliseconds of one call}, from CUPTI; and of wall time with the device waited for."""
    call()
    torch.cuda.synchronize()
    began = time.perf_counter()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as prof:
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
    wall = (time.perf_counter() - began) * 1e3 / repeats
    found = {e.key: e.self_device_time_total / 1e3 / repeats for e in prof.key_averages() if e.self_device_time_total}
    return found, wall


def cpu_ms(call, repeats):
    call()
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    wall = (time.perf_counter() - began) * 1e3 / repeats
    return {"cpu": wall}, wall


def inputs(B, T, device, dtype):
    random = torch.Generator(device=device).manual_seed(0)

    def leaf(*shape):
        return torch.randn(*shape, generator=random, device=device).to(dtype).requires_grad_()

    from gsa import kernels

    q, k, v, d_out = leaf(B, T, H, D), leaf(B, T, G, D), leaf(B, T, G, D), leaf(B, T, H, D).detach()
    return q, k, v, d_out, kernels.Index(leaf(B, T, J, E), leaf(B, T, E), leaf(B, T, J), leaf(J))


def table(args, measure, device, backend, dtype, say):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from gsa import kernels

    rows_of_table = []
    for T in args.lengths:
        B = max(1, args.tokens // T)
        repeats = max(1, min(10, 2**16 // T))
        q, k, v, d_out, index = inputs(B, T, device, dtype)
        alpha, v_ref = torch.tensor(4.0, device=device), torch.zeros((), device=device)
        k_base = min(K, T // 4)
        rule = kernels.SelectionRule("variance", temperature=1.0, k_base=k_base, k_min=k_base // 4, k_max=2 * k_base)
        v_ref = kernels.select(backend, index, alpha, v_ref, None, rule).statistic[:, T // 2 :].mean()
        rows = torch.arange(0, T, 4, device=device)
        chosen = kernels.select(backend, index, alpha, v_ref, None, rule)
        out, lse = kernels.attend(backend, q, k, v, chosen.bits, None)
        heads = [x.detach().transpose(1, 2).requires_grad_() for x in (q, k, v)]
        d_heads = d_out.transpose(1, 2)
        calls = {
            "select": lambda: kernels.select(backend, index, alpha, v_ref, None, rule),
            "attend forward": lambda: kernels.attend(backend, q.detach(), k.detach(), v.detach(), chosen.bits, None),
            "attend backward": lambda: torch.autograd.grad(out, (q, k, v), d_out, retain_graph=True),
            "alignment, a quarter of the rows": lambda: kernels.alignment_kl(
                backend, q, k, lse, index, alpha, chosen.bits, None, rows
            ),
        }
        for kind in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):

            def dense(kind=kind):
                with sdpa_kernel([kind]):
                    return F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)

            try:
                held = dense()
                torch.autograd.grad(held, heads, d_heads, retain_graph=True)
            except RuntimeError as err:
                say(f"{kind.name}: {str(err).splitlines()[0][:100]}")
                continue
            calls[f"{kind.name} forward"] = lambda dense=dense: dense()
            calls[f"{kind.name} backward"] = lambda held=held: torch.autograd.grad(
                held, heads, d_heads, retain_graph=True
            )
        pairs = B * T * (T + 1) / 2
        useful = {"forward": 4 * H * D * pairs, "backward": 10 * H * D * pairs}
        selected = chosen.k.float().mean().item()
        for name, call in calls.items():
            try:
                found, wall = measure(call, repeats)
            except Exception as err:
                say(f"{T} {name} FAILED {type(err).__name__}: {str(err)[:120]}")
                continue
            total = sum(found.values())
            kind = next((n for n in useful if name.endswith(n)), None)
            rate = f"{useful[kind] / total / 1e9:.0f} TFLOP/s dense-equivalent" if kind else ""
            worst = sorted(found.items(), key=lambda item: -item[1])[:5]
            say(
                f"T {T} x {B}  {name:<34} {total:9.3f} ms (wall {wall:.3f}) {rate}  "
                + ", ".join(f"{n[:34]} {ms:.3f}" for n, ms in worst)
            )
            rows_of_table.append(
                {"T": T, "B": B, "name": name, "ms": total, "wall_ms": wall, "kernels": found, "k": selected}
            )
        del q, k, v, out, lse, heads, chosen, calls
        if device == "cuda":
            torch.cuda.empty_cache()
    return rows_of_table


def sweep(args, measure, device, backend, dtype, say):
    """Tiles of the three attention kernels at 8 x 2048 and 1 x 16384; one that spills or does not fit is a line."""
    from gsa import kernels

    found = []
    for B, T in ((8, 2048), (1, 16384)) if device == "cuda" else ((1, 128),):
        q, k, v, d_out, index = inputs(B, T, device, dtype)
        alpha, unset = torch.tensor(4.0, device=device), torch.zeros((), device=device)
        rule = kernels.SelectionRule("off", temperature=1.0, k_base=min(K, T // 4), k_min=T // 16, k_max=T // 2)
        bits = kernels.select(backend, index, alpha, unset, None, rule).bits
        for name, settings in SWEEP.items():
            for setting in settings if device == "cuda" else settings[:1]:
                with tiles(name, setting):
                    try:
                        out, _ = kernels.attend(backend, q, k, v, bits, None)
                        call = (
                            (lambda: kernels.attend(backend, q, k, v, bits, None))
                            if name == "FORWARD"
                            else (lambda: torch.autograd.grad(out, (q, k, v), d_out, retain_graph=True))
                        )
                        spent, _ = measure(call, 5)
                    except Exception as err:
                        say(f"{T} {name} {setting} FAILED {type(err).__name__}: {str(err)[:100]}")
                        continue
                ms = sum(s for n, s in spent.items() if n.startswith(KERNELS[name]) or device == "cpu")
                say(f"T {T} {name:<17} {str(setting):<80} {ms:.3f} ms")
                found.append({"T": T, "name": name, "setting": setting, "ms": ms})
    return found


def head(args, measure, device, backend, dtype, say):
    """The loss head as it is, by row chunks with whole rows of logits, and liger-kernel where it is installed."""
    from gsa import kernels
    from gsa.loss import linear_cross_entropy

    N, V, d = (16384, 151936, 1024) if device == "cuda" else (64, 512, 32)
    random = torch.Generator(device=device).manual_seed(0)
    hidden = torch.randn(N, d, generator=random, device=device).to(dtype).requires_grad_()
    weight = (0.02 * torch.randn(V, d, generator=random, device=device)).to(dtype).requires_grad_()
    targets = torch.randint(0, V, (N,), generator=random, device=device)
    module = "triton" if backend == "triton" else "reference"

    def chunks(size):
        """Gradients made in the forward pass, `size` rows at a time: three products instead of four."""
        with torch.no_grad():
            d_hidden, d_weight = torch.empty_like(hidden), torch.zeros(V, d, device=device)
            scale = torch.full((size,), 1.0 / N, device=device)
            total = torch.zeros((), device=device)
            for start in range(0, N, size):
                part = slice(start, start + size)
                logits = kernels.product(hidden[part], weight.t(), torch.float32)
                top = torch.full((size,), -torch.inf, device=device)
                mass, label = torch.zeros_like(top), torch.zeros_like(top)
                at = targets[part]
                kernels.fold_logits(
                    module, logits.clone() if module == "reference" else logits, at, 0, top, mass, label
                )
                log_z = top + mass.log()
                total += (log_z - label).sum()
                by_logit = kernels.logits_gradient(module, logits, at, 0, log_z, scale, dtype)
                del logits
                torch.mm(by_logit, weight, out=d_hidden[part])
                kernels.add_product(module, d_weight, by_logit.t(), hidden[part])
            return total / N, d_hidden, d_weight.to(dtype)

    def both(call):
        hidden.grad = weight.grad = None
        loss = call()
        loss.backward()
        return loss

    ways = {"as it is": lambda: both(lambda: linear_cross_entropy(hidden, weight, targets, float(N), backend))}
    sizes = (2048, 4096, 8192) if device == "cuda" else (32,)
    ways |= {f"row chunks of {size}, float32 logits": lambda size=size: chunks(size)[0] for size in sizes}
    with contextlib.suppress(Exception):
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Liger

        if device == "cuda":
            ways["liger-kernel (Triton)"] = lambda: both(lambda: Liger.apply(hidden, weight, targets)[0])
    with contextlib.suppress(Exception):
        from cut_cross_entropy import linear_cross_entropy as cut

        if device == "cuda" and os.environ.get("CCE"):  # it tunes itself for a minute or more
            ways["cut-cross-entropy, exact"] = lambda: both(lambda: cut(hidden, weight, targets, impl="cce_exact"))
    found = []
    for name, call in ways.items():
        try:
            if device == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            loss = call().item()
            spent, wall = measure(call, 3)
            peak = (torch.cuda.max_memory_allocated() - before) / 2**30 if device == "cuda" else float("nan")
        except Exception as err:
            say(f"head {name} FAILED {type(err).__name__}: {str(err)[:140]}")
            continue
        total = sum(spent.values())
        say(
            f"head {name:<36} {total:8.2f} ms (wall {wall:.2f}), loss {loss:.5f}, peak {peak:.2f} GiB; "
            + ", ".join(f"{n[:40]} {ms:.2f}" for n, ms in sorted(spent.items(), key=lambda item: -item[1])[:4])
        )
        found.append({"way": name, "ms": total, "wall_ms": wall, "loss": loss, "peak_gib": peak})
    return found


def adam(args, measure, device, backend, dtype, say):
    n = 511_899_370 if device == "cuda" else 10_000
    found = []
    for name, kind in (("foreach", {"foreach": True}), ("fused", {"fused": True})):
        try:
            p = torch.zeros(n, device=device, requires_grad=True)
            p.grad = torch.ones_like(p)
            optimizer = torch.optim.AdamW([p], lr=1e-3, **kind)
            spent, wall = measure(optimizer.step, 3)
            found.append({"way": name, "ms": sum(spent.values())})
            say(f"AdamW {name} of {n:,} masters {sum(spent.values()):.2f} ms")
            del optimizer, p
        except Exception as err:
            say(f"AdamW {name} FAILED {type(err).__name__}: {str(err)[:100]}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parts", nargs="+", default=["table", "sweep", "adam", "head"], choices=["table", "sweep", "head", "adam"]
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 16384, 32768, 131072])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        if not args.smoke:
            print("no GPU; --smoke shows that this runs", file=sys.stderr)
            return 2
        args.lengths, args.tokens = [128], 128
    backend, dtype = ("triton", torch.bfloat16) if device == "cuda" else ("chunked", torch.bfloat16)
    measure = device_ms if device == "cuda" else cpu_ms
    lines: list[str] = []

    def say(line):
        lines.append(line)
        print(line, flush=True)

    card = torch.cuda.get_device_name(0) if device == "cuda" else "CPU"
    say(f"# {card}, torch {torch.__version__}, {time.strftime('%F %T')}")
    results = {}
    for part in args.parts:
        began = time.time()
        results[part] = globals()[part](args, measure, device, backend, dtype, say)
        say(f"-- {part}: {time.time() - began:.0f} s")
        (args.out / "kernels.json").write_text(json.dumps(results, indent=1))
        (args.out / "kernels.txt").write_text("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
