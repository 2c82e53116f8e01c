"""The memory cap of a trial, on a CPU."""

from __future__ import annotations

import subprocess
import sys

from support.launching import ROOT, rank_environment


def test_under_the_cap_torch_raises_as_it_does_on_a_gpu(tmp_path):
    program = """
import torch
from gsa.units import GIB
from training.planning.memory_cap import memory_cap, status_bytes
from training.planning.outcome import is_out_of_memory
cpu, n = torch.device("cpu"), 150 * 2**20 // 4
try:
    with memory_cap(0.01, cpu):
        print("not reached")
except MemoryError as err:
    print(err)
with memory_cap(status_bytes("VmRSS") / GIB + 0.25, cpu):
    fits = torch.ones(n)
    try:
        torch.ones(n)
    except RuntimeError as err:
        print(is_out_of_memory(err, capped=False), "can't allocate memory" in str(err))
    del fits
    torch.ones(n)
    print("goes on")
both = torch.ones(n), torch.ones(n)
print("lifted")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=rank_environment(), capture_output=True, text=True, timeout=60
    )
    printed = done.stdout.splitlines()
    assert "before it has a model, more than --memory_cap_gib 0.01" in printed[0]
    assert printed[1:] == ["True True", "goes on", "lifted"], done.stderr
