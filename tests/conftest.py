"""A corpus and a configuration so small that a run takes seconds; made by the tests themselves."""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from support.launching import ROOT, Case, run_cases
from support.tiny_dataset import write_dataset

# The suite tries the same examples every time, so that what landed stays green; HYPOTHESIS_PROFILE=soak draws others.
# The machine may pause: an example has no deadline.
patient = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("suite", derandomize=True, **patient)
hypothesis.settings.register_profile("soak", derandomize=False, print_blob=True, **patient)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))

TINY_YAML = """
model:
  d_model: 32
  n_layers: 2
  n_heads: 4
  n_kv_heads: 2
  d_ffn: 64
  vocab_size: 64
  max_position_embeddings: 32
  d_indexer: 8
  n_indexer_heads: 2
  k_base: 6
  k_min: 2
  k_max: 12
  init_std: 0.2
training:
  seed: 7
  max_steps: 6
  micro_batch_size: 2
  global_batch_size: 8
  max_seq_len: 32
  precision: fp32
  learning_rate: 3.0e-3
  min_learning_rate: 3.0e-4
  warmup_steps: 2
  eval_interval: 3
  eval_windows: 6
  save_interval: 0
  indexer_warmup_steps: 0
  probe_interval: 3
data:
  data_dir: {data}
"""


def documents(count: int, seed: int) -> list[list[int]]:
    """Token documents with something to learn: each walks a ring of 40 ids with its own stride."""
    random = np.random.Generator(np.random.PCG64(seed))
    walks = []
    for _ in range(count):
        length, start, stride = (int(random.integers(3, 60)), int(random.integers(40)), int(random.integers(1, 4)))
        walks.append([(start + stride * i) % 40 + 1 for i in range(length)])
    return walks


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_dataset(folder, documents(200, seed=1), vocab_size=64, held_out=documents(20, seed=2), shard_tokens=2000)
    return folder


@pytest.fixture(scope="session")
def tiny_yaml(tmp_path_factory, corpus) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(TINY_YAML.format(data=corpus))
    return path


@pytest.fixture(scope="session")
def a_run(tmp_path_factory, tiny_yaml) -> Path:
    """A finished run of two ranks at ZeRO 2 with checkpoints step_3 and step_6. Copy before you change it."""
    folder = tmp_path_factory.mktemp("a_run")
    case = Case(
        "a run",
        (
            "--config",
            str(tiny_yaml),
            "--output_dir",
            str(folder / "run"),
            "training.save_interval=3",
            "--deepspeed_config",
            str(ROOT / "ds_configs" / "zero2.json"),
        ),
    )
    run_cases(2, [case], folder)
    return folder / "run"
