"""What every benchmark needs: the certificate of its numbers, and the peak memory of a call."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch

from training.planning.memory_cap import status_bytes
from training.record.run_folder import environment

RESULTS = Path(__file__).parent / "results"


def commit() -> str:
    """The short hash of the checkout, with "+" when files differ from it; $COMMIT where that is set."""
    if given := os.environ.get("COMMIT"):
        return given
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run(
        ["git", "status", "--porcelain", "--untracked-files=no", "--", "gsa", "training", "benchmarks/*.py"],
        capture_output=True,
        text=True,
    ).stdout.strip()
    return head + ("+" if changed else "")


def certificate(name: str, argv: list[str]) -> str:
    """Command, commit, date, devices and versions, as the first sentence of a result."""
    env = environment()
    return (
        f"`{' '.join(['python -m benchmarks.' + name, *argv])}`, commit {commit()}, {datetime.now(UTC):%Y-%m-%d}, "
        f"{', '.join(env['devices'])}, {env['cpus']} CPUs (shared), torch {env['torch']}, deepspeed {env['deepspeed']}."
    )


def peak_mib(run: Callable[[], object], device: str = "cpu") -> float:
    """Peak memory in MiB of a call of `run`, above the memory in use before it.

    On a CPU this is the resident memory of the whole process.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # forget the high-water mark so far
    before = status_bytes("VmRSS")
    run()
    return (status_bytes("VmHWM") - before) / 2**20
