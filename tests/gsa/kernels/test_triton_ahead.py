"""Every Triton kernel compiles for GPUs that are not here, without spills, within their shared memory.

And `make soak` runs the Triton tests once with the oldest supported triton, whose interpreter needs an older numpy.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SHARED_KIB = {80: 163, 89: 99, 90: 227}


def run(command: list[str], **env: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), **env}, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout


def check(printed: str, archs: set[int]) -> None:
    compiled = [json.loads(line) for line in printed.splitlines()]
    assert {c["arch"] for c in compiled} == archs and len(compiled) == 15 * len(archs)
    for c in compiled:
        assert c["spill_bytes"] == 0, c
        assert c["shared_kib"] <= SHARED_KIB[c["arch"]], c
    attention = [c["tensor_cores"] for c in compiled if c["arch"] == 90 and c["kernel"].startswith("attend")]
    assert set(attention) == {"wgmma"}


def test_every_kernel_compiles_ahead_without_spills_within_shared_memory(tmp_path):
    check(run(["tests/triton_ahead.py", "80", "89", "90"], TRITON_CACHE_DIR=str(tmp_path)), {80, 89, 90})


@pytest.mark.slow
def test_the_oldest_supported_triton(tmp_path):
    old = tmp_path / "old"
    run(["-m", "pip", "install", "--quiet", "--target", str(old), "--no-deps", "triton==3.6.0", "numpy==2.3.5"])
    path = {"PYTHONPATH": f"{old}{os.pathsep}{ROOT}", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    assert run(["-c", "import triton, numpy; print(triton.__version__, numpy.__version__)"], **path).split() == [
        "3.6.0",
        "2.3.5",
    ]
    run(["-m", "pytest", "-q", "-p", "no:xdist", "tests/gsa/kernels/test_triton.py"], **path)
    check(run(["tests/triton_ahead.py", "80", "89", "90"], **path), {80, 89, 90})
