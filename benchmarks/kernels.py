"""Time of each attention operation alone, in ms and as a share of a dense forward and backward pass.

    python -m benchmarks.kernels [--device cuda] [--backend triton] [--dtype bfloat16] [--lengths 2048 8192 32768]

Nothing is timed before the backend has passed its self-check (gsa/kernels/choice.py). Writes
benchmarks/results/kernels_<device>.md.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.measuring import commit
from gsa import kernels
from gsa.kernels.choice import Shape, fault_of
from training.record.run_folder import environment

H, G, D, J, E, K = 16, 4, 64, 4, 64, 512


def operations(T: int, device: str, dtype: torch.dtype, backend: str) -> dict[str, Callable[[], object]]:
    random = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random).to(device, dtype).requires_grad_()

    q, k, v, d_out = leaf(1, T, H, D), leaf(1, T, G, D), leaf(1, T, G, D), leaf(1, T, H, D).detach()
    index = kernels.Index(leaf(1, T, J, E), leaf(1, T, E), leaf(1, T, J), leaf(J))
    alpha, v_ref = torch.tensor(4.0, device=device), torch.zeros((), device=device)
    rows = torch.randperm(T, generator=random)[: T // 4].sort().values.to(device)
    rule = kernels.SelectionRule("variance", temperature=1.0, k_base=K, k_min=K // 4, k_max=2 * K)
    fixed = rule._replace(mode="off")
    bits = kernels.select(backend, index, alpha, v_ref, None, rule).bits
    out, lse = kernels.attend(backend, q, k, v, bits, None)

    def dense() -> None:
        heads = (x.transpose(1, 2) for x in (q, k, v))
        F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True).transpose(1, 2).backward(d_out)

    return {
        "dense, forward and backward": dense,
        "select, adaptive_k off": lambda: kernels.select(backend, index, alpha, v_ref, None, fixed),
        "select, adaptive_k variance": lambda: kernels.select(backend, index, alpha, v_ref, None, rule),
        "attend, forward": lambda: kernels.attend(backend, q.detach(), k.detach(), v.detach(), bits, None),
        "attend, backward": lambda: torch.autograd.grad(out, (q, k, v), d_out, retain_graph=True),
        "alignment loss and gradients, a quarter of the rows": lambda: kernels.alignment_kl(
            backend, q, k, lse, index, alpha, bits, None, rows
        ),
    }


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--backend", default="chunked", choices=["chunked", "triton"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048])
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args(argv)
    dtype = getattr(torch, args.dtype)
    fault = fault_of(args.backend, Shape(H, G, D, J, E, dtype), torch.device(args.device))
    if fault:
        print(f"error: refusing to time {args.backend}: {fault}", file=sys.stderr)
        return 1
    lines = []
    for T in args.lengths:
        seconds: dict[str, list[float]] = {}
        runs = operations(T, args.device, dtype, args.backend)
        for repeat in range(args.repeats + 2):
            for name, run in runs.items():
                began = time.perf_counter()
                run()
                if args.device == "cuda":
                    torch.cuda.synchronize()
                if repeat >= 2:
                    seconds.setdefault(name, []).append(time.perf_counter() - began)
        dense = statistics.median(seconds["dense, forward and backward"])
        for name, spent in seconds.items():
            median = statistics.median(spent)
            lines.append(
                f"| {T} | {name} | {median * 1e3:.2f} [{min(spent) * 1e3:.2f} - {max(spent) * 1e3:.2f}] "
                f"| {median / dense:.3f} |"
            )
            print(lines[-1], flush=True)
    env = environment()
    text = f"""# The kernels, one by one

`python -m benchmarks.kernels {" ".join(argv)}`, commit {commit()}, {datetime.now(UTC):%Y-%m-%d},
{", ".join(env["devices"])}, torch {env["torch"]}, {args.dtype}, backend {args.backend}, batch 1,
{H} heads of {D}, {G} key/value heads, indexer {J} x {E}, k = {K}.
Milliseconds: median of {args.repeats}, smallest and largest; then the share of dense attention.

| T | operation | ms | of dense |
|---|---|---|---|
{chr(10).join(lines)}
"""
    (Path(__file__).parent / "results" / f"kernels_{args.device}.md").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
