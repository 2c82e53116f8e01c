"""`make soak`: a run of thousands of steps needs no more memory, descriptors, threads or files than a short one."""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from support.launching import start_ranks

from training.record.metrics_log import rows_from_end

STEPS = int(os.environ.get("SOAK_STEPS", "5000"))
WARM_UP = STEPS // 5
"""Steps until every kind of work has been done many times: saves, evaluations, completions, probes."""
MAX_GROWTH_MIB = 8.0
"""Growth of a rank's memory from the end of the warm-up to the end of the run: the noise of a trend line. A leak of 4 KiB
per step would be 16 MiB in 5,000 steps."""


class Sample(NamedTuple):
    """What a rank holds while it trains. files: in the run's folder, of all ranks."""

    step: int
    rss_mib: float
    descriptors: int
    threads: int
    files: int


def sample(pid: int, folder: Path) -> Sample | None:
    """None before the first step, after the last one, and when the rank has died."""
    step = next((row["step"] for row in rows_from_end(folder / "metrics.jsonl") if "loss" in row), 0)
    if not 0 < step < STEPS:
        return None
    process = Path(f"/proc/{pid}")
    try:
        status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
        descriptors = len(os.listdir(process / "fd"))
    except OSError:
        return None
    if "VmRSS" not in status:  # a process that is ending
        return None
    files = sum(len(files) for _, _, files in os.walk(folder))
    return Sample(step, int(status["VmRSS"].split()[0]) / 1024, descriptors, int(status["Threads"]), files)


def growth_mib(samples: list[Sample]) -> float:
    """By how much the trend line of the memory rises."""
    steps = np.array([s.step for s in samples])
    per_step = np.polyfit(steps, [s.rss_mib for s in samples], 1)[0]
    return float(per_step * (steps[-1] - steps[0]))


@pytest.mark.slow
def test_a_long_run_does_not_grow(tmp_path, tiny_yaml):
    run = tmp_path / "run"
    argv = ["--config", str(tiny_yaml), "--output_dir", str(run), "--log_level", "warning"]
    argv += [f"training.max_steps={STEPS}", "training.save_interval=20", "training.eval_interval=50"]
    argv += ["training.sample_interval=50", "training.sample_prompts=[w1]", "training.sample_tokens=8"]
    argv += ["training.probe_interval=10", "training.health_interval=10", "training.keep_last=3"]
    argv += ["training.on_spike=log", "logging.tensorboard=true"]
    ranks = start_ranks([argv, argv])
    taken: list[list[Sample]] = [[] for _ in ranks]
    while all(rank.poll() is None for rank in ranks):
        for rank, samples in zip(ranks, taken, strict=True):
            if (now := sample(rank.pid, run)) is not None:
                samples.append(now)
        time.sleep(0.5)
    outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(outputs)[-4000:]
    for number, samples in enumerate(taken):
        warm = [s for s in samples if s.step >= WARM_UP]
        early, late = warm[: len(warm) // 4], warm[-len(warm) // 4 :]
        for name in ("descriptors", "threads", "files"):
            # between saves, which have more of them while they are in flight: a leak raises that level too
            before, after = (np.quantile([getattr(s, name) for s in part], 0.1) for part in (early, late))
            assert after <= before, f"rank {number}: {name} rose from {before:g} to {after:g}"
        before, after = (statistics.median(s.rss_mib for s in part) for part in (early, late))
        grown = growth_mib(warm)
        print(
            f"rank {number}: {before:.1f} -> {after:.1f} MiB, {grown:+.1f} MiB over {STEPS - WARM_UP} steps; {late[-1]}"
        )
        assert grown < MAX_GROWTH_MIB, f"rank {number}: memory rose by {grown:.1f} MiB from step {WARM_UP} to {STEPS}"
