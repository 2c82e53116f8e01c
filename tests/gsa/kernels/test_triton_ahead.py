"""Every Triton kernel compiles for GPUs that this machine need not have, without spills, within their shared memory.

`make soak` also runs the Triton tests once with the oldest supported triton, whose interpreter needs an older numpy.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from support.launching import ROOT, clean_environment

SHARED_KIB = {80: 163, 89: 99, 90: 227}


def run(command: list[str], **env: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**clean_environment(), "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout


def check(printed: str, wanted: set[tuple[int, str]], most_spilled: int = 0) -> None:
    compiled = [json.loads(line) for line in printed.splitlines()]
    assert {(c["arch"], c["sizes"]) for c in compiled} == wanted
    kernels = {"model": 19, "wide": 7, "float32": 5}
    assert len(compiled) == sum(kernels[sizes] for _, sizes in wanted)
    for c in compiled:
        assert c["shared_kib"] <= SHARED_KIB[c["arch"]], c
        # float32 is multiplied out of registers: it fits, but spills
        assert c["spill_bytes"] <= most_spilled or c["sizes"] == "float32", c
    attention = [c for c in compiled if c["kernel"].startswith("attend")]
    assert {c["tensor_cores"] for c in attention if c["arch"] == 90 and c["sizes"] != "float32"} <= {"wgmma"}


MODELS = ("80", "89", "90")


def test_every_kernel_compiles_ahead_without_spills_within_shared_memory(tmp_path):
    """The widest heads and float32 for the GPU with the least shared memory."""
    printed = run(
        ["tests/support/compile_triton_ahead.py", *MODELS, "89:wide", "89:float32"], TRITON_CACHE_DIR=str(tmp_path)
    )
    check(printed, {(80, "model"), (89, "model"), (90, "model"), (89, "wide"), (89, "float32")})


@pytest.mark.slow
def test_the_widest_heads_and_float32_on_the_other_gpus(tmp_path):
    others = [f"{arch}:{sizes}" for arch in (80, 90) for sizes in ("wide", "float32")]
    printed = run(["tests/support/compile_triton_ahead.py", *others], TRITON_CACHE_DIR=str(tmp_path))
    check(printed, {(arch, sizes) for arch in (80, 90) for sizes in ("wide", "float32")})


@pytest.mark.slow
def test_the_oldest_supported_triton(tmp_path):
    old = tmp_path / "old"
    run(["-m", "pip", "install", "--quiet", "--target", str(old), "--no-deps", "triton==3.6.0", "numpy==2.3.5"])
    path = {"PYTHONPATH": f"{old}{os.pathsep}{ROOT}", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    assert run(["-c", "import triton, numpy; print(triton.__version__, numpy.__version__)"], **path).split() == [
        "3.6.0",
        "2.3.5",
    ]
    tests = [
        f"tests/gsa/kernels/{name}.py"
        for name in ("test_triton", "test_triton_identities", "test_triton_loss", "test_silu_product")
    ]
    run(["-m", "pytest", "-q", "-p", "no:xdist", *tests], **path)
    # 8 or 16 in attend_backward_keys, on sm_80 and sm_89
    printed = run(["tests/support/compile_triton_ahead.py", *MODELS], **path)
    check(printed, {(80, "model"), (89, "model"), (90, "model")}, most_spilled=16)
