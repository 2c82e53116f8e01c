"""Benchmarks can be started, and do not compare what computes something else."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from benchmarks import comparing, gpu_run, train_step
from benchmarks.layers import layer
from benchmarks.synthetic import write_dataset
from gsa import GSAForCausalLM, ModelConfig
from training.config import load_config, plan_batch
from training.data.dataset import PackedTokens
from training.engine.world import World

PARTS = {"comparing", "layers", "loops", "measuring", "synthetic"}
"""Of benchmarks/: what entries share. `layers` is an entry too, of training/train.py."""
MODULES = sorted(path.stem for path in Path(comparing.__file__).parent.glob("*.py") if path.stem != "__init__")
ENTRIES = [name for name in MODULES if name not in PARTS] + ["layers"]

TINY = ModelConfig(
    d_model=32,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    d_ffn=64,
    vocab_size=64,
    max_position_embeddings=64,
    d_indexer=8,
    n_indexer_heads=2,
    k_base=8,
    k_min=4,
    k_max=16,
    adaptive_k="off",
    init_std=0.2,
)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_can_be_imported(name):
    importlib.import_module(f"benchmarks.{name}")


@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry_explains_itself(name, capsys):
    module = importlib.import_module(f"benchmarks.{name}")
    with pytest.raises(SystemExit) as ended:
        module.main(["--help"])
    assert ended.value.code == 0
    assert f"usage: benchmarks.{name}" in capsys.readouterr().out


@pytest.fixture
def world(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    yield World(0, 1, 0, 1, torch.device("cpu"))
    dist.destroy_process_group()


@pytest.mark.parametrize("off_by, refused", [(0.9 * comparing.TOLERANCE, False), (2 * comparing.TOLERANCE, True)])
def test_train_step_does_not_time_unequal_losses(world, off_by, refused):
    # a trainer whose loop never ends by itself, and a bare loop whose last loss before the timing is off
    trainer = SimpleNamespace(_train_step=lambda: SimpleNamespace(row={"loss": 2.0}), world=world)
    fed = []

    def bare_step(micros):
        fed.append(micros)
        return [torch.tensor(2.0 + (off_by if len(fed) == train_step.WARM else 0), dtype=torch.float64)]

    micros = [[number] for number in range(train_step.WARM + 4)]
    turns = train_step.Interleaved(
        trainer, SimpleNamespace(step=bare_step), micros, pairs=4, steps=1, tolerance=comparing.TOLERANCE
    )
    with pytest.raises(comparing.Refused if refused else train_step._Enough) as ended:
        for _ in range(100):
            turns()
    if refused:
        assert "refusing to time the trainer: in step 3" in str(ended.value)
        assert not turns.ours and not turns.theirs
    else:
        assert len(turns.ours) == len(turns.theirs) == 4
        assert fed == micros  # all that the trainer saw, in the same order


def test_a_loss_that_is_not_a_number_is_refused():
    with pytest.raises(comparing.Refused):
        comparing.require_equal("it", [1.0, float("nan")], [1.0, float("nan")])


def test_the_interval_of_a_median():
    # tables of the sign test: the 6th and the 15th of 20, the first and last of 6, nothing for 5
    assert comparing.interval_of(range(1, 21)) == (6, 15)
    assert comparing.interval_of(range(1, 7)) == (1, 6)
    assert comparing.interval_of(range(1, 6)) is None


def loss_and_gradients(config: ModelConfig, doc_start: torch.Tensor) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = GSAForCausalLM(config).double()
    tokens = torch.randint(0, config.vocab_size, (2, 64))
    out = model(tokens, tokens.roll(-1, 1), doc_start)
    (out.loss + 0.1 * out.indexer_loss).backward()
    return [out.loss.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("name", ["naive_gather", "flash"])
def test_another_layer_computes_the_same(name):
    config = replace(TINY, sparse=name == "naive_gather")
    doc_start = torch.zeros(2, 64, dtype=torch.int64)
    if name == "naive_gather":
        doc_start[:, 40:] = 40
    expected = loss_and_gradients(config, doc_start)
    with layer(name):
        torch.testing.assert_close(loss_and_gradients(config, doc_start), expected)


def test_flash_refuses_documents_that_it_would_join():
    doc_start = torch.zeros(2, 64, dtype=torch.int64)
    doc_start[1, 40:] = 40
    with layer("flash"), pytest.raises(ValueError, match="one document per window"):
        loss_and_gradients(replace(TINY, sparse=False), doc_start)


def test_synthetic_documents_of_whole_windows_fill_windows(tmp_path):
    write_dataset(tmp_path, np.full(30, 64), vocab_size=100_000)
    data = PackedTokens({str(tmp_path): 1.0}, split="train", max_seq_len=32, seed=0)
    data.verify()
    batch = data.batch(np.arange(60))
    assert data.n_windows == 60 and data.vocab_size == 100_000
    assert not batch.doc_start.any()
    assert (batch.targets >= 0).sum() == 60 * 32 - 30  # only a document's last token has none
    assert batch.tokens.max() == 99_999 == data.eod_id


@pytest.mark.parametrize("name, shape", [("tuned", (8, 2048, 8)), ("untuned", (1, 1024, 64)), ("naive", (1, 1024, 64))])
def test_a_gpu_has_the_work_of_one_of_four(name, shape):
    run = gpu_run.RUNS[name]
    cfg = load_config(gpu_run.CONFIGS / run.config, gpu_run.overrides(run, Path("data"), smoke=False))
    plan = plan_batch(cfg.training, 1)
    assert (plan.micro_batch_size, cfg.training.max_seq_len, plan.accumulation_steps) == shape
    assert cfg.training.indexer_warmup_steps == 0  # the sparse stage is measured


def write_rows(folder: Path, seconds: list[float]) -> Path:
    path = folder / "metrics.jsonl"
    rows = [{"step": i + 1, "loss": 1.0, "seconds": spent} for i, spent in enumerate(seconds)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [{"event": "start", "step": 0}, *rows]))
    return path


def test_a_run_is_measured_after_its_first_steps(tmp_path):
    metrics = write_rows(tmp_path, [100.0, 50.0, 20.0, 1.0, 1.1, 1.2])
    rows = gpu_run.steady_rows(SimpleNamespace(poll=lambda: None), metrics, tmp_path / "log", 3.0)
    assert [row["step"] for row in rows] == [4, 5, 6]


def test_a_run_that_ends_early_is_told_with_its_last_words(tmp_path):
    (tmp_path / "log").write_text("CUDA out of memory\n")
    metrics = write_rows(tmp_path, [100.0, 50.0, 20.0, 1.0])
    dead = SimpleNamespace(poll=lambda: 1, returncode=1)
    with pytest.raises(gpu_run.RunFailed, match="(?s)ended with 1 after 1 steady steps.*CUDA out of memory"):
        gpu_run.steady_rows(dead, metrics, tmp_path / "log", 3.0)
