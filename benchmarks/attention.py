"""Time and memory of GSA's attention, forward and backward, beside dense attention and a naive gather, in one run.

    python -m benchmarks.attention [--device cpu] [--backend chunked] [--lengths 512 1024 ... 16384] [--repeats 5]

GSA's time includes indexer scores, selection and attention, and in "gsa + KL" the alignment loss on a quarter of the
rows; it excludes the projections around them. The ways take turns within a repeat, so that a busy machine slows all of
them equally; ratios are computed per repeat. Peak memory is measured in a separate process for each way and length, and
excludes the inputs. Nothing is timed before selected sets, output, loss and every gradient have matched the float64
reference (gsa/kernels/choice.py). Writes benchmarks/results/attention_<device>.{json,md}.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.measuring import commit, peak_mib
from gsa import kernels
from gsa.kernels.choice import CHECK_CASES, Shape, deviations, fault_of
from training.record.run_folder import environment

H, G, D, J, E, K = 8, 2, 64, 4, 64, 512
WAYS = ("dense", "gsa", "gsa + KL", "naive gather")
NAIVE_LONGEST = 1024


def way(name: str, T: int, device: str, dtype: torch.dtype, backend: str) -> Callable[[], None]:
    """A function that runs one forward and backward pass at length T on inputs that are already allocated."""
    random = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random).to(device, dtype).requires_grad_()

    q, k, v, d_out = leaf(1, T, H, D), leaf(1, T, G, D), leaf(1, T, G, D), leaf(1, T, H, D).detach()
    index = kernels.Index(leaf(1, T, J, E), leaf(1, T, E), leaf(1, T, J), leaf(J))
    alpha = torch.tensor(4.0, device=device, requires_grad=True)
    rule = kernels.SelectionRule("variance", temperature=1.0, k_base=K, k_min=K // 4, k_max=2 * K)
    # v_ref is the mean variance of these inputs, so that k is 512 on average
    unset = torch.zeros((), device=device)
    v_ref = kernels.select(backend, index, alpha, unset, None, rule).statistic[:, T // 2 :].mean()
    rows = torch.randperm(T, generator=random)[: T // 4].sort().values.to(device)
    leaves = (q, k, v, *index, alpha)

    kinds = dense_kinds(device)

    def dense() -> torch.Tensor:
        heads = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(kinds):
            return F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True).transpose(1, 2)

    def gsa(with_loss: bool) -> list[torch.Tensor]:
        chosen = kernels.select(backend, index, alpha, v_ref, None, rule)
        out, lse = kernels.attend(backend, q, k, v, chosen.bits, None)
        if not with_loss:
            return [out]
        return [out, kernels.alignment_kl(backend, q, k, lse, index, alpha, chosen.bits, None, rows)]

    def run() -> None:
        for x in leaves:
            x.grad = None
        if name == "dense":
            outs = [dense()]
        elif name == "naive gather":
            outs = [naive_gather(q, k, v, index)]
        else:
            outs = gsa(with_loss=name.endswith("KL"))
        torch.autograd.backward(outs, [d_out, torch.ones_like(alpha)][: len(outs)])
        if device == "cuda":
            torch.cuda.synchronize()

    return run


@functools.cache
def dense_kinds(device: str) -> list[SDPBackend]:
    """On a GPU, the fastest of torch's dense kernels at 4096 tokens in bf16; on a CPU, all of them: torch chooses."""
    every = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    if device != "cuda":
        return every
    q, k, v = (torch.randn(1, h, 4096, D, device=device, dtype=torch.bfloat16, requires_grad=True) for h in (H, G, G))
    seconds = {}
    for kind in every[:-1]:
        try:
            for _ in range(4):  # only the last one is measured
                torch.cuda.synchronize()
                began = time.perf_counter()
                with sdpa_kernel([kind]):
                    F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).sum().backward()
                torch.cuda.synchronize()
                seconds[kind] = time.perf_counter() - began
        except RuntimeError:  # not on this device, or not with grouped heads
            seconds.pop(kind, None)
    fastest = min(seconds, key=seconds.get)
    print(f"dense kernel: {fastest.name}, of {', '.join(k.name for k in seconds)}", file=sys.stderr)
    return [fastest]


def naive_gather(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, index: kernels.Index) -> torch.Tensor:
    """Attention as the legacy layer computed it: the whole score matrix, and a copy of keys and values per query."""
    B, T, H, D = q.shape
    scores = kernels.index_scores(*(x.detach() for x in index))
    causal = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
    best = scores.masked_fill(~causal, -torch.inf).topk(min(K, T), -1)
    heads = (x.repeat_interleave(H // x.shape[2], 2) for x in (k, v))
    every = best.indices[..., None, None].expand(-1, -1, -1, H, D)
    keys, values = (x[:, None].expand(-1, T, -1, -1, -1).gather(2, every) for x in heads)
    logits = torch.einsum("bthd,btkhd->bthk", q, keys) / math.sqrt(D)
    p = logits.masked_fill(best.values[:, :, None].isinf(), -torch.inf).softmax(-1)
    return torch.einsum("bthk,btkhd->bthd", p, values)


def check(device: str, dtype: torch.dtype, backend: str) -> float:
    """Largest deviation of output, loss and gradients from the float64 reference, each relative to its largest value.

    Raises SystemExit when a deviation exceeds rounding, a selected set is wrong, or the naive gather's output is wrong.
    """
    shape, on = Shape(H, G, D, J, E, dtype), torch.device(device)
    if fault := fault_of(backend, shape, on):
        raise SystemExit(f"refusing to time {backend}: {fault}")
    if gather := check_gather(device, dtype):
        raise SystemExit(f"refusing to time the naive gather: {gather}")
    return max(error for case in CHECK_CASES for error in deviations(backend, shape, on, case).values())


def check_gather(device: str, dtype: torch.dtype) -> str | None:
    """What is wrong with the naive gather where it selects K of 700 keys, or None."""
    random = torch.Generator().manual_seed(1)
    shapes = [(1, 700, H, D), (1, 700, G, D), (1, 700, G, D), (1, 700, J, E), (1, 700, E), (1, 700, J), (J,)]
    q, k, v, *index = (torch.randn(*shape, generator=random).to(device, dtype) for shape in shapes)
    exact = kernels.Index(*(x.double() for x in index))
    rule = kernels.SelectionRule("off", temperature=1.0, k_base=K, k_min=K, k_max=K)
    alpha, v_ref = torch.tensor(4.0, device=device), torch.zeros((), device=device)
    bits = kernels.select("reference", exact, alpha, v_ref, None, rule).bits
    wanted = kernels.attend("reference", q.double(), k.double(), v.double(), bits, None)[0]
    off = (naive_gather(q, k, v, kernels.Index(*index)).double() - wanted).abs().amax((0, 2, 3)) / wanted.abs().max()
    # the gather ranks float scores, not quantised levels: one or two keys of a row may differ
    usual = off.median().item()
    return None if usual <= (1e-5 if dtype == torch.float32 else 2e-2) else f"off by {usual:.1e} in most rows"


def peak_of(name: str, T: int, args: argparse.Namespace) -> float:
    """Peak memory above the inputs in MiB, measured in a separate process."""
    command = [sys.executable, "-m", "benchmarks.attention", "--peak_of", name, "--lengths", str(T)]
    command += [
        "--device",
        args.device,
        "--backend",
        args.backend,
        "--dtype",
        args.dtype,
        "--threads",
        str(args.threads),
    ]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def measure_peak(name: str, T: int, args: argparse.Namespace) -> float:
    dtype = getattr(torch, args.dtype)
    way(
        name, 64, args.device, dtype, args.backend
    )()  # loads libraries and starts thread pools before memory is measured
    run = way(name, T, args.device, dtype, args.backend)
    return peak_mib(run, args.device)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.attention", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--backend", default="chunked", choices=["chunked", "triton"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peak_of", choices=WAYS, help="only print the peak of one way at one length, in MiB")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.peak_of:
        print(measure_peak(args.peak_of, args.lengths[0], args))
        return 0
    dtype = getattr(torch, args.dtype)
    error = check(args.device, dtype, args.backend)
    results = []
    for T in args.lengths:
        names = [n for n in WAYS if n != "naive gather" or T <= NAIVE_LONGEST]
        runs = {n: way(n, T, args.device, dtype, args.backend) for n in names}
        seconds: dict[str, list[float]] = {n: [] for n in names}
        for repeat in range(args.repeats + 1):
            for n, run in runs.items():
                began = time.perf_counter()
                run()
                if repeat:  # the first repeat warms caches
                    seconds[n].append(time.perf_counter() - began)
        runs.clear()
        for n in names:
            ratios = [ours / dense for ours, dense in zip(seconds[n], seconds["dense"], strict=True)]
            results.append(
                {
                    "T": T,
                    "way": n,
                    "seconds": seconds[n],
                    "median_s": statistics.median(seconds[n]),
                    "to_dense": statistics.median(ratios),
                    "to_dense_range": [min(ratios), max(ratios)],
                    "peak_mib": peak_of(n, T, args),
                }
            )
            print(row_of(results[-1]), flush=True)
    env = environment()
    command = f"python -m benchmarks.attention {' '.join(argv)}".strip()
    birth = {
        "command": command,
        "commit": commit(),
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "devices": env["devices"],
        "cpus": env["cpus"],
        "threads": args.threads,
        "torch": env["torch"],
        "dtype": args.dtype,
        "backend": args.backend,
        "check_error": error,
    }
    out = Path(__file__).parent / "results" / f"attention_{args.device}"
    out.with_suffix(".json").write_text(json.dumps({"birth": birth, "results": results}, indent=1) + "\n")
    out.with_suffix(".md").write_text(report(birth, results))
    return 0


def row_of(r: dict) -> str:
    low, high = r["to_dense_range"]
    return (
        f"| {r['T']} | {r['way']} | {r['median_s'] * 1e3:.1f} | {r['to_dense']:.2f} [{low:.2f} - {high:.2f}] "
        f"| {r['peak_mib']:.0f} |"
    )


def growth(results: list[dict], name: str) -> float:
    """Exponent of peak memory in T: the slope of a least-squares line through the logarithms, from T = 1024 on."""
    points = [(math.log(r["T"]), math.log(r["peak_mib"])) for r in results if r["way"] == name and r["T"] >= 1024]
    if len(points) < 2:
        return math.nan
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def report(birth: dict, results: list[dict]) -> str:
    lines = [
        "# Attention, forward and backward",
        "",
        f"`{birth['command']}`, commit {birth['commit']}, {birth['date']}, {', '.join(birth['devices'])}, "
        f"{birth['cpus']} CPUs (shared), {birth['threads']} threads, torch {birth['torch']}, {birth['dtype']}, backend "
        f"{birth['backend']}. Batch 1, {H} heads of {D}, {G} key/value heads, indexer {J} x {E}, k = {K} "
        f"(`adaptive_k: variance`, {K // 4} to {2 * K}). Medians; smallest and largest ratio of a repeat in brackets.",
        f"Largest deviation of output, loss and gradients from the float64 reference: {birth['check_error']:.1e}.",
        "",
        "| T | way | ms | to dense | peak, MiB |",
        "|---|---|---|---|---|",
        *(row_of(r) for r in results),
        "",
        "Peak memory grows with T to the power of "
        + ", ".join(f"{growth(results, n):.2f} ({n})" for n in ("dense", "gsa", "gsa + KL"))
        + ".",
    ]
    at = {(r["T"], r["way"]): r for r in results}
    if (NAIVE_LONGEST, "naive gather") in at:
        naive, ours = at[NAIVE_LONGEST, "naive gather"], at[NAIVE_LONGEST, "gsa"]
        lines.append(
            f"At T = {NAIVE_LONGEST} the naive gather takes {naive['median_s'] / ours['median_s']:.1f} times as long "
            f"as gsa and {naive['peak_mib'] / ours['peak_mib']:.1f} times the memory."
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
