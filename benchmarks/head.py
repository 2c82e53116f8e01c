"""The loss head: time, peak memory and error of several ways to compute cross-entropy and its gradients.

    python -m benchmarks.head [--rows 2048] [--vocab_size 151936] [--d_model 1024] [--dtype float32] [--repeats 3]

The ways take turns; peak memory is measured in a separate process for each, and excludes inputs and gradients.
`blocks` is gsa/loss.py. `row chunks` computes the gradients in the forward pass, a chunk of rows at a time, as
liger-kernel does; liger-kernel itself needs a GPU and is measured there when it is installed. Writes
benchmarks/results/head_<device>_<dtype>_<rows>.md.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress

import torch
import torch.nn.functional as F

from benchmarks.measuring import RESULTS, certificate, peak_mib
from gsa.loss import linear_cross_entropy

IGNORE = -100
ROW_CHUNK = 256


class _RowChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets):
        d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.float32)
        total = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, len(hidden), ROW_CHUNK):
            part = slice(start, start + ROW_CHUNK)
            logits = (hidden[part] @ weight.t()).float()
            log_z = logits.logsumexp(-1)
            total += (log_z - logits.gather(1, targets[part, None])[:, 0]).sum()
            logits.sub_(log_z[:, None]).exp_()
            logits.scatter_add_(1, targets[part, None], logits.new_full((len(logits), 1), -1.0))
            by_logit = logits.div_(len(hidden)).to(weight.dtype)
            d_hidden[part] = by_logit @ weight
            d_weight += by_logit.t() @ hidden[part]
        ctx.save_for_backward(d_hidden, d_weight.to(weight.dtype))
        return total / len(hidden)

    @staticmethod
    def backward(ctx, grad):
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden.mul_(grad), d_weight.mul_(grad), None


def plain(hidden, weight, targets):
    return F.cross_entropy(F.linear(hidden, weight).float(), targets)


WAYS: dict[str, Callable] = {
    "plain": plain,
    "row chunks": _RowChunks.apply,
    "blocks": lambda hidden, weight, targets: linear_cross_entropy(hidden, weight, targets, float(len(targets))),
}
if torch.cuda.is_available():
    WAYS["blocks, triton"] = lambda h, w, t: linear_cross_entropy(h, w, t, float(len(t)), "triton")
    with suppress(ImportError):
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        WAYS["liger-kernel"] = lambda h, w, t: liger_fused_linear_cross_entropy(h, w, t, accum_dtype=torch.float32)
if hasattr(F, "linear_cross_entropy"):
    WAYS["torch's linear_cross_entropy"] = F.linear_cross_entropy


def inputs(args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    dtype = getattr(torch, args.dtype)
    hidden = torch.randn(args.rows, args.d_model, generator=random).to(args.device, dtype).requires_grad_()
    weight = (0.02 * torch.randn(args.vocab_size, args.d_model, generator=random)).to(args.device, dtype)
    targets = torch.randint(0, args.vocab_size, (args.rows,), generator=random).to(args.device)
    return hidden, weight.requires_grad_(), targets


def forward_backward(way: str, args: argparse.Namespace) -> Callable[[], float]:
    hidden, weight, targets = inputs(args)

    def run() -> float:
        hidden.grad = weight.grad = None
        loss = WAYS[way](hidden, weight, targets)
        loss.backward()
        if args.device == "cuda":
            torch.cuda.synchronize()
        return float(loss.detach())

    return run


def beyond_gradients_mib(way: str, args: argparse.Namespace) -> float:
    """Peak memory above the inputs in MiB, without the gradients themselves."""
    small = argparse.Namespace(**{**vars(args), "rows": 64, "vocab_size": 512})
    forward_backward(way, small)()  # loads libraries and starts thread pools before memory is measured
    size = torch.finfo(getattr(torch, args.dtype)).bits // 8
    gradients = (args.rows + args.vocab_size) * args.d_model * size / 2**20
    return peak_mib(forward_backward(way, args), args.device) - gradients


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.head", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=2048, help="micro-batch x length (default: %(default)s)")
    parser.add_argument("--vocab_size", type=int, default=151936)
    parser.add_argument("--d_model", type=int, default=1024)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=3, help="0: memory only")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--peak_of", choices=list(WAYS), help="only print the peak of one way, in MiB")
    args = parser.parse_args(argv)
    if args.peak_of:
        print(beyond_gradients_mib(args.peak_of, args))
        return 0
    seconds: dict[str, list[float]] = {way: [] for way in args.ways}
    losses: dict[str, float] = {}
    for _ in range(args.repeats):
        for way in args.ways:
            run = forward_backward(way, args)
            began = time.perf_counter()
            losses[way] = run()
            seconds[way].append(time.perf_counter() - began)
    exact = exact_loss(args)
    lines = []
    for way in args.ways:
        command = [sys.executable, "-m", "benchmarks.head", *argv, "--peak_of", way]
        peak = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
        lines.append(f"| {way} | {spread(seconds[way])} | {peak:.0f} | {error(losses.get(way), exact)} |")
        print(lines[-1], flush=True)
    name = f"head_{args.device}_{args.dtype}_{args.rows}"
    (RESULTS / f"{name}.md").write_text(f"""# The loss head, forward and backward

{certificate("head", argv)}
{args.rows} rows, width {args.d_model}, vocabulary {args.vocab_size}, {args.dtype}, {torch.get_num_threads()} thread(s).
Medians of {args.repeats}, smallest and largest. Peak memory excludes inputs and gradients.

| way | s | peak, MiB | loss off by |
|---|---|---|---|
{chr(10).join(lines)}
""")
    return 0


@torch.no_grad()
def exact_loss(args: argparse.Namespace) -> float:
    """The loss in float64 from the same rounded inputs, computed a few rows at a time."""
    hidden, weight, targets = inputs(args)
    if not args.repeats:
        return float("nan")
    sums = [
        F.cross_entropy(h.double() @ weight.double().t(), t, reduction="sum")
        for h, t in zip(hidden.split(128), targets.split(128), strict=True)
    ]
    return float(sum(sums)) / args.rows


def spread(found: list[float]) -> str:
    return f"{statistics.median(found):.2f} [{min(found):.2f} - {max(found):.2f}]" if found else "not timed"


def error(loss: float | None, exact: float) -> str:
    return "" if loss is None else f"{abs(loss - exact) / exact:.1e}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
