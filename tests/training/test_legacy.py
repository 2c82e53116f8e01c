"""The predecessor's checkpoints: recognised, read without running them, resumed at any stage.

A writer makes small files of its layout; the real ones are used where ../shared/fixtures is there.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch
import yaml
from conftest import documents
from helpers_dataset import write_dataset
from launching import ROOT, Case, run_cases, start_training, train_alone
from omegaconf import OmegaConf

from gsa import GSAForCausalLM
from gsa.checkpoint import legacy, manifest
from gsa.checkpoint.full_state import read_full_state
from gsa.checkpoint.manifest import CheckpointError
from training.metrics import read_rows

FIXTURES = ROOT.parent / "shared" / "fixtures"
YAML = """
model:
  d_model: 32
  n_layers: 2
  n_heads: 4
  n_kv_heads: 2
  d_ffn: 64
  vocab_size: 64
  max_position_embeddings: 64
  gsa: {d_indexer: 8, n_indexer_heads: 2, k_base: 6, k_min: 2, k_max: 12, use_value_gate: true,
        use_output_gate: true, use_adaptive_k: false}
training:
  optimizer: adamw
  learning_rate: 3.0e-4
  min_learning_rate: 3.0e-5
  warmup_steps: 2000
  lr_scheduler: cosine
  max_steps: 100000
  micro_batch_size: 1
  gradient_accumulation_steps: 2
  global_batch_size: 8
  max_seq_len: 16
  precision: fp32
  grad_clip: 1.0
  indexer_warmup_steps: 2
  indexer_lr_multiplier: 10.0
data: {data_dir: DATA, dataset: some/corpus, tokenizer: some/tokenizer, num_workers: 0, use_packing: true}
logging: {project: gsa-pretrain, log_interval: 10, eval_interval: 1000, save_interval: 5000}
"""
TUNED = ("training.max_seq_len=32", "training.micro_batch_size=2", "training.gradient_accumulation_steps=1",
         "training.stop_at_step=5003", "training.eval_windows=4")  # fmt: skip


def their_name(name: str) -> str:
    back = {ours: theirs for theirs, ours in legacy._LAYER.items()} | {
        ours: theirs for theirs, ours in legacy._TOP.items()
    }
    parts = name.split(".", 2)
    return f"model.layers.{parts[1]}.{back[parts[2]]}" if parts[0] == "layers" else back[name]


def write_legacy(step_dir: Path, config: dict, *, omegaconf: bool, step: int = 5000, epoch: int = 51) -> dict:
    """A checkpoint of the predecessor's layout with random weights and moments; returns what is in it."""
    torch.manual_seed(3)
    model = {
        k.partition(".")[2]: v for k, v in legacy.translate(legacy._flat(config)).items() if k.startswith("model.")
    }
    made = GSAForCausalLM(legacy.ModelConfig(**model))
    names = [name for name, _ in made.named_parameters() if not name.endswith("log_alpha")]
    parameters = dict(made.named_parameters())
    weights = {their_name(name): torch.randn_like(parameters[name]) * 0.1 for name in names}
    groups = [[], [], [], []]
    for name in weights:
        groups[2 * ("indexer" in name) + ("bias" in name or "norm" in name)].append(name)
    order = [name for group in groups for name in group]
    state = {
        number: {"step": torch.tensor(20.0), "exp_avg": torch.randn_like(weights[name]) * 1e-3,
                 "exp_avg_sq": torch.rand_like(weights[name]) * 1e-6}
        for number, name in enumerate(order) if "indexer" not in name
    }  # fmt: skip
    numbers = iter(range(len(order)))
    training = config["training"]
    data = {
        "step": step, "model_state_dict": weights,
        "optimizer_state_dict": {"state": state, "param_groups": [
            {"lr": 3e-4, "params": [next(numbers) for _ in group]} for group in groups if group
        ]},
        "scheduler_state_dict": {"last_epoch": step}, "extra_state": {"epoch": epoch},
        "config": OmegaConf.create(config).training if omegaconf else training,
    }  # fmt: skip
    step_dir.mkdir(parents=True)
    torch.save(data, step_dir / f"checkpoint_{step}.pt")
    (step_dir / "checkpoint_latest.pt").symlink_to(f"checkpoint_{step}.pt")
    (step_dir / "config.json").write_text("" if omegaconf else "{}")
    return {"weights": weights, "moments": {order[n]: s for n, s in state.items()}}


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """Both variants, and what became of them: ZeRO 2 on two ranks under torchrun, ZeRO 3 on two, ZeRO 0 on one."""
    base = tmp_path_factory.mktemp("legacy")
    write_dataset(base / "text", documents(200, seed=1), vocab_size=64, held_out=documents(20, seed=2))
    (base / "run.yaml").write_text(YAML.replace("DATA", str(base / "text")))
    config = yaml.safe_load((base / "run.yaml").read_text())
    written = {}
    for variant in ("dict", "omegaconf"):
        written[variant] = write_legacy(base / variant / "step_5000", config, omegaconf=variant == "omegaconf")
    cases = []
    for stage, variant in ((1, "dict"), (3, "omegaconf")):
        cases.append(Case(f"zero{stage}", (
            "--config", str(base / "run.yaml"), "--output_dir", str(base / f"zero{stage}"), "--resume_from",
            str(base / variant / "step_5000"), "--deepspeed_config", str(ROOT / "ds_configs" / f"zero{stage}.json"), *TUNED,
        )))  # fmt: skip
    cases.append(Case("untouched", (
        *cases[0].argv[:3], str(base / "untouched"), *cases[0].argv[4:], "training.stop_at_step=5000",
    )))  # fmt: skip
    output = run_cases(2, cases, base / "launch")
    return base, config, written, output


@pytest.mark.parametrize("variant", ["dict", "omegaconf"])
def test_the_model_alone_has_the_weights(imported, variant):
    base, config, written, _ = imported
    model = legacy.load_legacy_model(base / variant / "step_5000", base / "run.yaml")
    held = model.state_dict()
    for name, tensor in written[variant]["weights"].items():
        assert torch.equal(held[legacy.our_name(name)], tensor), name
    assert not model.config.tie_embeddings and not model.config.indexer_rope and model.config.adaptive_k == "off"


@pytest.mark.parametrize("stage", [1, 3])
def test_a_resumed_predecessor_goes_on_at_its_step_epoch_and_tokens(imported, stage):
    base = imported[0]
    rows = [row for row in read_rows(base / f"zero{stage}" / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == [5001, 5002, 5003]
    assert rows[0]["samples"] == 5000 * 8 * 16 // 32 + 8 and rows[0]["tokens"] == 5000 * 8 * 16 + 8 * 32
    assert 51 < rows[0]["epoch"] < 51.1
    assert [row["stage"] for row in rows] == ["dense", "dense", "sparse"]  # its warm-up counts from the import
    factor = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 3000 / 98000))
    assert rows[0]["lr"] == pytest.approx(3e-4 * factor)
    assert (base / f"zero{stage}" / "latest").read_text().strip() == "step_5003"
    manifest.verify(base / f"zero{stage}" / "step_5003")


def test_weights_moments_and_step_arrive_bitwise_and_the_indexer_starts_untrained(imported):
    base, _, written, output = imported
    state = read_full_state(base / "untouched" / "step_5000")
    for name, tensor in written["dict"]["weights"].items():
        held = state.parameters[legacy.our_name(name)]
        assert torch.equal(held.full("master"), tensor), name
        saved = written["dict"]["moments"].get(name)
        assert held.step == (20 if saved else 0)
        for moment in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(held.full(moment), saved[moment] if saved else torch.zeros_like(tensor)), name
    assert state.schedule["last_epoch"] == 5000
    assert "training.max_seq_len: 16 -> 32 (harmless)" in output and "step 5000, epoch 51" in output


def test_the_new_checkpoint_resumes_with_the_yaml_that_ties_its_head(imported, tmp_path):
    """The import decided the head and the indexer's positions; our own layout of the yaml need not say so."""
    base, config, *_ = imported
    ours = yaml.safe_load((base / "zero1" / "config.yaml").read_text())
    ours["model"].update(tie_embeddings=True, indexer_rope=True)
    (tmp_path / "ours.yaml").write_text(yaml.safe_dump(ours))
    argv = ("--config", str(tmp_path / "ours.yaml"), "--output_dir", str(tmp_path / "on"), "training.stop_at_step=5004",
            "--resume_from", str(base / "zero1" / "step_5003"))  # fmt: skip
    done = train_alone(argv)
    assert done.returncode == 0, done.stderr
    assert "step_5003 decides model.tie_embeddings: False, not True" in done.stdout
    assert [r["step"] for r in read_rows(tmp_path / "on" / "metrics.jsonl") if "loss" in r] == [5004]


def test_torchrun_resumes_it(imported, tmp_path):
    base = imported[0]
    process = start_training(4, ["--config", str(base / "run.yaml"), "--output_dir", str(tmp_path / "run"), "--resume_from",
                                 str(base / "omegaconf" / "step_5000"), *TUNED, "training.stop_at_step=5001"],
                             launcher="torchrun")  # fmt: skip
    output = process.communicate(timeout=200)[0]
    assert process.returncode == 0, output
    assert "continuing at step 5001 of 5001" in output


def test_auto_does_not_start_afresh_beside_an_old_checkpoint(imported, tmp_path):
    base, config, *_ = imported
    write_legacy(tmp_path / "run" / "step_5000", config, omegaconf=False)
    done = train_alone(["--config", str(base / "run.yaml"), "--output_dir", str(tmp_path / "run"), "--resume_from", "auto",
                        *TUNED, "training.stop_at_step=5001", "training.keep_last=1"])  # fmt: skip
    assert done.returncode == 0 and "continuing at step 5001" in done.stdout, done.stderr
    assert (tmp_path / "run" / "step_5000" / "checkpoint_5000.pt").exists()


def test_a_configuration_that_does_not_fit_is_refused_with_the_key(imported):
    base, config, *_ = imported
    wrong = {**config, "model": {**config["model"], "d_ffn": 96}}
    with pytest.raises(CheckpointError, match=r"mlp\.gate_proj.*\(64, 32\).*\(96, 32\).*model\.d_ffn"):
        legacy.load_legacy_model(base / "dict" / "step_5000", wrong)
    with pytest.raises(CheckpointError, match="model.d_ffn: 64 in the checkpoint, 96"):
        legacy.load_legacy_model(base / "omegaconf" / "step_5000", wrong)
    with pytest.raises(CheckpointError, match="give the yaml"):
        legacy.load_legacy_model(base / "dict" / "step_5000")


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_a_malicious_file_is_refused_and_not_run(tmp_path):
    (tmp_path / "step_1").mkdir()
    torch.save({"config": Evil(tmp_path / "ran")}, tmp_path / "step_1" / "checkpoint_1.pt")
    with pytest.raises(CheckpointError, match="nothing in it was run"):
        legacy.read_legacy_run(tmp_path / "step_1")
    assert not (tmp_path / "ran").exists()


@pytest.mark.skipif(not FIXTURES.exists(), reason="the predecessor's real checkpoints are not beside this clone")
@pytest.mark.parametrize("variant", ["legacy_dict", "legacy_dictconfig"])
def test_the_real_ones_give_their_logits(variant):
    config = FIXTURES / "pretrain_tiny.yaml" if variant == "legacy_dict" else None
    model = legacy.load_legacy_model(FIXTURES / variant / "step_5000", config)
    expected = torch.load(FIXTURES / "expected.pt", weights_only=True)
    with torch.no_grad():
        logits = model(expected["input_ids"]).logits
    assert (logits - expected["logits"]).abs().max() < 1e-5
