"""`make soak`: a run that is killed many times ends with the same rows and weights as one that never was killed."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
from support.launching import start_training

from gsa.checkpoint import manifest
from training.record.metric_schema import TIME_METRICS
from training.record.metrics_log import read_rows

KILLS = int(os.environ.get("SOAK_KILLS", "30"))
"""Number of kills; set SOAK_KILLS=200 for a longer soak."""
STEPS = 40 * KILLS // 20 * 20


def argv(folder: Path, tiny_yaml: Path) -> list[str]:
    return [
        "--config",
        str(tiny_yaml),
        "--output_dir",
        str(folder),
        "--resume_from",
        "auto",
        f"training.max_steps={STEPS}",
        "training.save_interval=20",
        "training.eval_interval=0",
        "training.indexer_warmup_steps=150",
    ]


def rows(folder: Path) -> list[dict]:
    found = [row for row in read_rows(folder / "metrics.jsonl") if "loss" in row]
    return [{key: value for key, value in row.items() if key not in TIME_METRICS} for row in found]


@pytest.mark.slow
def test_random_kills_of_all_ranks_change_no_row_and_no_weight(tmp_path, tiny_yaml):
    calm = start_training(2, argv(tmp_path / "calm", tiny_yaml))
    output = calm.communicate(timeout=120 + STEPS)[0]
    assert calm.returncode == 0, output
    dice, kills = random.Random(0), 0
    while True:
        process = start_training(2, argv(tmp_path / "killed", tiny_yaml))
        if kills < KILLS:
            before = len(rows(tmp_path / "killed"))
            while process.poll() is None and len(rows(tmp_path / "killed")) <= before + dice.randrange(5, 45):
                time.sleep(0.05)
            time.sleep(dice.random() * 0.3)
        if kills < KILLS and process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
            process.communicate()
            continue
        output = process.communicate(timeout=120 + STEPS)[0]
        assert process.returncode == 0, output
        break
    assert kills == KILLS
    assert rows(tmp_path / "killed") == rows(tmp_path / "calm")
    ours, theirs = (manifest.read(tmp_path / name / f"step_{STEPS}").files for name in ("killed", "calm"))
    assert ours.keys() == theirs.keys()
    # mp_rank_00_model_states.pt also holds the time of the save and the tracking id
    same = [name for name in ours if name == "model.safetensors" or name.endswith("_optim_states.pt")]
    assert len(same) == 3 and all(ours[name] == theirs[name] for name in same)
