"""Compiles the project's Triton kernels for a Hopper GPU in parallel processes, before anything is launched.

    TRITON_CACHE_DIR=folder python ahead.py [--jobs 12] [--what trainer benchmark sweep] [--arch 90]

The project's own host code runs on torch's meta device, so that Triton's cache keys are those of the real launches. It
needs no GPU (without one it tests that everything compiles); on the GPU machine it takes 10 s instead of a minute.
"""

from __future__ import annotations

import argparse
import collections
import os
import subprocess
import sys
import time
import zlib

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit


class Driver:
    """Replaces triton's driver, which needs a GPU."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def set_current_device(self, device):
        pass

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        return torch.device("meta")


FOUND: collections.Counter = collections.Counter()
SECONDS = [0.0]


def install(arch: int, part: int = 0, parts: int = 1) -> None:
    """From here on, a launch compiles its kernel if it belongs to this part, and does not run it."""
    driver.set_active(Driver(arch))
    original = jit.JITFunction.run
    seen = set()

    def run(self, *args, grid, warmup, **kwargs):
        binder = self.device_caches[0][4]
        _, specialization, options = binder(*args, **kwargs)
        key = f"{self.fn.__module__}.{self.fn.__name__}{specialization}{sorted(options.items())}"
        if key in seen or zlib.crc32(key.encode()) % parts != part:
            return None
        seen.add(key)
        began = time.perf_counter()
        try:
            original(self, *args, grid=grid, warmup=True, **kwargs)
        except Exception as err:  # a tile that does not fit is a finding, and no reason to stop
            print(
                f"FAILED {self.fn.__name__} {sorted(options.items())}: {type(err).__name__} {str(err)[:120]}",
                flush=True,
            )
        FOUND[self.fn.__name__] += 1
        SECONDS[0] += time.perf_counter() - began
        return None

    jit.JITFunction.run = run


def layer_calls(
    B, T, H=16, G=4, D=64, J=4, E=64, k=512, documents=True, share=0.25, mode="variance", dtype=torch.bfloat16
):
    """The launches of one layer, forward and backward, in both stages."""
    from gsa import kernels

    like = {"device": "meta", "dtype": dtype}

    def leaf(*shape):
        return torch.empty(*shape, **like, requires_grad=True)

    q, key, value, d_out = leaf(B, T, H, D), leaf(B, T, G, D), leaf(B, T, G, D), torch.empty(B, T, H, D, **like)
    index = kernels.Index(leaf(B, T, J, E), leaf(B, T, E), leaf(B, T, J), leaf(J))
    alpha, v_ref = torch.empty((), device="meta", requires_grad=True), torch.empty((), device="meta")
    start = torch.empty(B, T, dtype=torch.long, device="meta") if documents else None
    rows = torch.empty(max(1, round(T * share)), dtype=torch.long, device="meta")
    for everything in (False, True):
        low, high = (T, T) if everything else (max(1, k // 4), 2 * k)
        rule = kernels.SelectionRule(mode, temperature=1.0, k_base=k, k_min=low, k_max=high)
        chosen = kernels.select("triton", index, alpha, v_ref, start, rule)
        bits = None if everything else chosen.bits
        if bits is None and start is None:
            continue  # torch's own attention
        out, lse = kernels.attend("triton", q, key, value, bits, start)
        loss = kernels.alignment_kl("triton", q, key, lse, index, alpha, bits, start, rows)
        torch.autograd.grad([out, loss], (q, key, value, *index, alpha), [d_out, torch.empty_like(loss)])


def head_calls(shapes):
    from gsa import kernels

    for rows, width, start in shapes:
        x, targets = torch.empty(rows, width, device="meta"), torch.empty(rows, dtype=torch.long, device="meta")
        top, mass, label = (torch.empty(rows, device="meta") for _ in range(3))
        kernels.fold_logits("triton", x, targets, start, top, mass, label)
        kernels.logits_gradient("triton", x, targets, start, top, mass, torch.bfloat16)


def product_calls(*shape):
    from gsa import kernels

    gate, up = (torch.empty(*shape, device="meta", dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    kernels.silu_product("triton", gate, up).backward(torch.empty(*shape, device="meta", dtype=torch.bfloat16))


def trainer():
    """The 512M configuration's micro-batches, tuned and untuned, and the check at the start of a run."""
    from gsa.kernels import choice

    for case in choice.CHECK_CASES:
        layer_calls(case.rows, case.length, k=case.length // 6, share=0.75, mode=case.mode)
    product_calls(150, 1000)
    head_calls(
        [(150, 600, 0), (150, 400, 600), (16384, 1024, 0), (16384, 1024, 1024), (16384, 384, 151552), (4096, 151936, 0)]
    )
    for B, T in ((8, 2048), (1, 1024)):
        layer_calls(B, T)
        product_calls(B, T, 3072)


def benchmark():
    for B, T in ((8, 2048), (2, 8192), (1, 16384), (1, 32768), (1, 131072)):
        layer_calls(B, T, documents=False)
    head_calls([(2048, 151936, 0), (8192, 151936, 0)])


def sweep():
    import kernels_table

    for name, settings in kernels_table.SWEEP.items():
        for setting in settings:
            with kernels_table.tiles(name, setting):
                layer_calls(8, 2048, documents=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, default=90)
    parser.add_argument("--what", nargs="+", default=["trainer", "benchmark", "sweep"])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--part", type=int)
    args = parser.parse_args()
    began = time.time()
    if args.part is None and args.jobs > 1:
        command = [sys.executable, __file__, "--arch", str(args.arch), "--what", *args.what, "--jobs", str(args.jobs)]
        environment = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
        workers = [subprocess.Popen([*command, "--part", str(i)], env=environment) for i in range(args.jobs)]
        failed = [w.wait() for w in workers]
        print(f"ahead: all parts done in {time.time() - began:.0f} s", flush=True)
        return max(failed)
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    install(args.arch, args.part or 0, args.jobs)
    for what in args.what:
        globals()[what]()
    print(f"ahead {args.part or 0}: {sum(FOUND.values())} kernels, {SECONDS[0]:.0f} s of compiling", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
