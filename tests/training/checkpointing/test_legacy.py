"""Legacy checkpoints are recognised, read without executing anything in them, and resumed at any ZeRO stage.

`write_legacy` makes small files in the legacy layout; real ones are tested too where ../shared/fixtures exists.
"""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import documents
from omegaconf import DictConfig, OmegaConf
from support.launching import ROOT, Case, run_cases, start_training
from support.tiny_dataset import write_dataset

from gsa import GSAForCausalLM
from gsa.checkpoint import legacy, manifest
from gsa.checkpoint.full_state import read_full_state
from gsa.checkpoint.manifest import CheckpointError
from training import train
from training.checkpointing import verification
from training.config import ConfigError
from training.record.metrics_log import read_rows

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
SHAPE = 0.5 * (1 + math.cos(math.pi * 3000 / 98000))
"""The factor of the legacy cosine schedule at step 5000."""
TUNED = (
    "training.max_seq_len=32",
    "training.micro_batch_size=2",
    "training.gradient_accumulation_steps=null",
    "training.stop_at_step=5003",
    "training.eval_windows=4",
)


def legacy_name(name: str) -> str:
    """The name of a parameter in a legacy checkpoint."""
    back = {ours: theirs for theirs, ours in legacy._LAYER.items()} | {
        ours: theirs for theirs, ours in legacy._TOP.items()
    }
    parts = name.split(".", 2)
    return f"model.layers.{parts[1]}.{back[parts[2]]}" if parts[0] == "layers" else back[name]


def write_legacy(
    step_dir: Path,
    config: dict,
    *,
    omegaconf: bool,
    training: DictConfig | None = None,
    step: int = 5000,
    epoch: int = 51,
) -> dict:
    """Writes a checkpoint in the legacy layout with random weights and moments; returns weights and moments by name.

    omegaconf: the older variant, whose configuration is an OmegaConf node. training: its training section, if it is to
    differ from that of `config`.
    """
    torch.manual_seed(3)
    model = {
        k.partition(".")[2]: v for k, v in legacy.translate(legacy._flat(config)).items() if k.startswith("model.")
    }
    made = GSAForCausalLM(legacy.ModelConfig(**model))
    names = [name for name, _ in made.named_parameters() if not name.endswith("log_alpha")]
    parameters = dict(made.named_parameters())
    weights = {legacy_name(name): torch.randn_like(parameters[name]) * 0.1 for name in names}
    groups = [[], [], [], []]
    for name in weights:
        groups[2 * ("indexer" in name) + ("bias" in name or "norm" in name)].append(name)
    order = [name for group in groups for name in group]
    state = {
        number: {
            "step": torch.tensor(20.0),
            "exp_avg": torch.randn_like(weights[name]) * 1e-3,
            "exp_avg_sq": torch.rand_like(weights[name]) * 1e-6,
        }
        for number, name in enumerate(order)
        if "indexer" not in name
    }
    numbers = iter(range(len(order)))
    if training is None:
        training = OmegaConf.create(config).training if omegaconf else config["training"]
    data = {
        "step": step,
        "model_state_dict": weights,
        "optimizer_state_dict": {
            "state": state,
            "param_groups": [{"lr": 3e-4, "params": [next(numbers) for _ in group]} for group in groups if group],
        },
        "scheduler_state_dict": {"last_epoch": step, "_last_lr": [3e-4 * SHAPE]},
        "extra_state": {"epoch": epoch},
        "config": training,
    }
    step_dir.mkdir(parents=True)
    torch.save(data, step_dir / f"checkpoint_{step}.pt")
    (step_dir / "checkpoint_latest.pt").symlink_to(f"checkpoint_{step}.pt")
    (step_dir / "config.json").write_text("" if omegaconf else "{}")
    return {"weights": weights, "moments": {order[n]: s for n, s in state.items()}}


UNTOUCHED = {"zero0": "fp32", "zero1": "fp32", "zero2": "bf16", "zero3": "fp32", "zero3_bf16": "bf16"}
"""name -> precision: resumed at this stage without training a step, so that what is saved must be what was imported."""


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """Both variants, imported on two ranks: at ZeRO 1 and 3 for three steps, at every stage without a step.

    Returns the folder of all runs, the yaml's contents, what each variant's checkpoint holds, and what was printed.
    """
    base = tmp_path_factory.mktemp("legacy")
    write_dataset(base / "text", documents(200, seed=1), vocab_size=64, held_out=documents(20, seed=2))
    (base / "run.yaml").write_text(YAML.replace("DATA", str(base / "text")))
    config = yaml.safe_load((base / "run.yaml").read_text())
    written = {}
    for variant in ("dict", "omegaconf"):
        written[variant] = write_legacy(base / variant / "step_5000", config, omegaconf=variant == "omegaconf")

    def case(name: str, checkpoint: Path | str, stage: str, *extra: str, yaml: Path = base / "run.yaml") -> Case:
        return Case(
            name,
            (
                "--config",
                str(yaml),
                "--output_dir",
                str(base / name),
                "--resume_from",
                str(checkpoint),
                "--deepspeed_config",
                str(ROOT / "ds_configs" / f"{stage}.json"),
                *TUNED,
                *extra,
            ),
        )

    cases = [
        case("zero1", base / "dict" / "step_5000", "zero1"),
        case("zero3", base / "omegaconf" / "step_5000", "zero3"),
    ]
    for name, precision in UNTOUCHED.items():
        still = (f"training.precision={precision}", "training.stop_at_step=5000", "--allow_config_change")
        cases.append(case(f"untouched_{name}", base / "dict" / "step_5000", name.split("_")[0], *still))
    # the checkpoint decides tie_embeddings and indexer_rope: the yaml, in our layout, may have other values
    ours = {**config, "model": {**legacy._model_section(config, ""), "tie_embeddings": True, "indexer_rope": True}}
    ours["training"] = {k: v for k, v in config["training"].items() if k != "optimizer"}
    ours["data"], ours["logging"] = {"data_dir": str(base / "text")}, {}
    (base / "ours.yaml").write_text(yaml.safe_dump(ours))
    cases.append(
        case("on", base / "zero1" / "step_5003", "zero1", "training.stop_at_step=5004", yaml=base / "ours.yaml")
    )
    shutil.copytree(base / "dict", base / "beside", symlinks=True)
    cases.append(case("beside", "auto", "zero1", "training.stop_at_step=5001", "training.keep_last=1"))
    if FIXTURES.exists():
        for variant in ("legacy_dict", "legacy_dictconfig"):
            run = (f"data.data_dir={base / 'text'}", "training.stop_at_step=5001")
            cases.append(
                case(
                    f"real_{variant}",
                    FIXTURES / variant / "step_5000",
                    "zero2",
                    *run,
                    yaml=FIXTURES / "pretrain_tiny.yaml",
                )
            )
    output = run_cases(2, cases, base / "launch")
    return base, config, written, output


@pytest.mark.parametrize("variant", ["dict", "omegaconf"])
def test_the_model_loads_with_the_weights_alone(imported, variant):
    base, config, written, _ = imported
    model = legacy.load_legacy_model(base / variant / "step_5000", base / "run.yaml")
    held = model.state_dict()
    for name, tensor in written[variant]["weights"].items():
        assert torch.equal(held[legacy.our_name(name)], tensor), name
    assert not model.config.tie_embeddings and not model.config.indexer_rope and model.config.adaptive_k == "off"


@pytest.mark.parametrize("stage", [1, 3])
def test_a_resumed_legacy_run_goes_on_at_its_step_epoch_and_tokens(imported, stage):
    base = imported[0]
    rows = [row for row in read_rows(base / f"zero{stage}" / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == [5001, 5002, 5003]
    assert rows[0]["samples"] == 5000 * 8 * 16 // 32 + 8 and rows[0]["tokens"] == 5000 * 8 * 16 + 8 * 32
    assert 51 < rows[0]["epoch"] < 51.1
    assert [row["stage"] for row in rows] == [
        "dense",
        "dense",
        "sparse",
    ]  # the indexer's warm-up counts from the import
    assert rows[0]["lr"] == pytest.approx(3e-4 * (0.1 + 0.9 * SHAPE))
    assert (base / f"zero{stage}" / "latest").read_text().strip() == "step_5003"
    manifest.verify(base / f"zero{stage}" / "step_5003")


@pytest.mark.parametrize("name", UNTOUCHED)
def test_weights_moments_and_step_arrive_bitwise_and_the_indexer_starts_untrained(imported, name):
    base, _, written, output = imported
    state = read_full_state(base / f"untouched_{name}" / "step_5000")
    for name, tensor in written["dict"]["weights"].items():
        held = state.parameters[legacy.our_name(name)]
        assert torch.equal(held.full("master"), tensor), name
        saved = written["dict"]["moments"].get(name)
        assert held.step == (20 if saved else 0)
        for moment in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(held.full(moment), saved[moment] if saved else torch.zeros_like(tensor)), name
    assert state.schedule["last_epoch"] == 5000


def test_an_import_prints_what_has_changed_and_both_learning_rates(imported):
    """The schedule is at the same step, but its formula differs at the ends: docs/checkpoints.md."""
    output = imported[3]
    assert "training.max_seq_len: 16 -> 32 (harmless)" in output and "step 5000, epoch 51" in output
    rates = f"the learning rate of step 5001 is {3e-4 * (0.1 + 0.9 * SHAPE):.6e} here, {3e-4 * SHAPE:.6e} there"
    assert rates in output and rates.split(" is ")[1] == "2.993762e-04 here, 2.993069e-04 there"


def test_a_checkpoint_made_after_the_import_resumes_with_a_yaml_that_ties_the_head(imported):
    base, output = imported[0], imported[3]
    assert "step_5003 decides model.tie_embeddings: False, not True" in output
    assert [r["step"] for r in read_rows(base / "on" / "metrics.jsonl") if "loss" in r] == [5004]


def test_torchrun_resumes_a_legacy_checkpoint(imported, tmp_path):
    base = imported[0]
    process = start_training(
        4,
        [
            "--config",
            str(base / "run.yaml"),
            "--output_dir",
            str(tmp_path / "run"),
            "--resume_from",
            str(base / "omegaconf" / "step_5000"),
            *TUNED,
            "training.stop_at_step=5001",
        ],
        launcher="torchrun",
    )
    output = process.communicate(timeout=600)[0]
    assert process.returncode == 0, output
    assert "continuing at step 5001 of 5001" in output


def test_auto_resumes_a_legacy_checkpoint_in_its_own_folder(imported):
    base, output = imported[0], imported[3]
    assert f"no checkpoint of this project under {base / 'beside'}, but a legacy one" in output
    assert [r["step"] for r in read_rows(base / "beside" / "metrics.jsonl") if "loss" in r] == [5001]
    assert (
        base / "beside" / "step_5000" / "checkpoint_5000.pt"
    ).exists()  # retention never deletes a legacy checkpoint


@pytest.mark.skipif(not FIXTURES.exists(), reason="the real legacy checkpoints are not beside this clone")
@pytest.mark.parametrize("variant", ["legacy_dict", "legacy_dictconfig"])
def test_real_legacy_checkpoints_resume(imported, variant):
    base, output = imported[0], imported[3]
    assert output.count("2.993762e-04 here, 2.993069e-04 there") >= 2
    rows = [row for row in read_rows(base / f"real_{variant}" / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == [5001] and 51 < rows[0]["epoch"] < 51.1
    manifest.verify(base / f"real_{variant}" / "step_5001")


# -- refused before a launch ----------------------------------------------------------------------------------


def resume(base: Path, folder: Path, *extra: str):
    """Resumes the newer variant in `folder`/step_5000 into that folder on one rank; returns its Start."""
    argv = [
        "--config",
        str(base / "run.yaml"),
        "--output_dir",
        str(folder),
        "--resume_from",
        "step_5000",
        *TUNED,
        *extra,
    ]
    return train.prepare(train.parse(argv)).start


def refused(base: Path, folder: Path, words: str) -> None:
    """Asserts that verify and the import refuse the checkpoint with the same `words`."""
    printed: list[str] = []
    assert not verification.verify(folder / "step_5000", config=base / "run.yaml", report=printed.append)
    assert printed[-1].startswith("✗") and words in printed[-1], printed
    with pytest.raises(CheckpointError) as err:
        resume(base, folder)
    assert words in str(err.value)


@pytest.fixture
def old(imported, tmp_path) -> Path:
    shutil.copytree(imported[0] / "dict", tmp_path / "old", symlinks=True)
    return tmp_path / "old"


def test_a_good_legacy_checkpoint_is_verified_and_a_flipped_bit_in_its_numbers_is_found(imported, old):
    base = imported[0]
    printed: list[str] = []
    assert verification.verify(old / "step_5000", config=base / "run.yaml", report=printed.append), printed
    assert resume(base, old).state.step == 5000
    file = old / "step_5000" / "checkpoint_5000.pt"
    data = file.read_bytes()
    tensor = imported[2]["dict"]["weights"]["model.layers.1.mlp.up_proj.weight"]
    for at in (data.index(tensor.numpy().tobytes()) + 1, len(data) // 3, len(data) * 2 // 3):
        file.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
        refused(base, old, "checkpoint_5000.pt: damaged")
    file.write_bytes(data[:-40])
    refused(base, old, "checkpoint_5000.pt: damaged")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda data: data["optimizer_state_dict"]["state"][0].pop("step"),
            "its optimizer state does not fit its weights (KeyError: 'step')",
        ),
        (
            lambda data: data["optimizer_state_dict"]["state"][0].update(step=None),
            "does not fit its weights (TypeError",
        ),
        (
            lambda data: data["optimizer_state_dict"]["state"][0].update(exp_avg=torch.ones(2)),
            "exp_avg of model.embed_tokens.weight has shape (2,)",
        ),
        (
            lambda data: data["model_state_dict"].update({"model.norm.weight": 1.0}),
            "model.norm.weight: float, not a tensor",
        ),
        (lambda data: data["model_state_dict"].pop("model.norm.weight"), "norm.weight: missing from the checkpoint"),
        (lambda data: data["extra_state"].update(epoch=None), "its extra_state.epoch is None"),
        (lambda data: data["config"].update(optimizer="lion"), "made with training.optimizer=lion; only adamw"),
        (
            lambda data: data["config"].update(global_batch_size="8"),
            "its training.global_batch_size is '8', not a number",
        ),
        (
            lambda data: [data["config"].pop(key) for key in ("global_batch_size", "micro_batch_size")],
            "neither global_batch_size nor micro_batch_size",
        ),
        (lambda data: data.pop("scheduler_state_dict"), "lacks scheduler_state_dict"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_contents_are_refused_with_a_message_that_names_them(imported, old, change, words):
    file = old / "step_5000" / "checkpoint_5000.pt"
    data = torch.load(file, weights_only=True)
    change(data)
    torch.save(data, file)
    refused(imported[0], old, words)


def test_the_older_variant_with_another_optimizer_is_refused(imported, tmp_path):
    base, config, *_ = imported
    lion = {**config, "training": {**config["training"], "optimizer": "lion"}}
    write_legacy(tmp_path / "old" / "step_5000", config, omegaconf=True, training=OmegaConf.create(lion).training)
    refused(base, tmp_path / "old", "training.optimizer=lion: only adamw is supported")


def test_another_schedule_than_the_imported_one_changes_the_curve(imported, old):
    for steps in (50000, 200000):
        with pytest.raises(ConfigError, match=rf"training.max_steps \(100000 there, {steps} here\).*5001 is .*=100000"):
            resume(imported[0], old, f"training.max_steps={steps}")
    kept = ("training.max_steps=200000", "training.schedule_steps=100000")
    assert resume(imported[0], old, *kept).state.step == 5000


def test_a_finished_legacy_run_has_nothing_to_train_in_its_own_folder(imported, old):
    with pytest.raises(ConfigError, match="nothing to train: .*step_5000 is at step 5000, and this run ends at 5000"):
        resume(imported[0], old, "training.stop_at_step=5000")


def test_the_legacy_adaptive_k_is_mapped_with_a_warning(imported, tmp_path, capsys):
    base, config, *_ = imported
    adaptive = {**config, "model": {**config["model"], "gsa": {**config["model"]["gsa"], "use_adaptive_k": True}}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(adaptive))
    write_legacy(tmp_path / "old" / "step_5000", adaptive, omegaconf=True)
    with pytest.warns(UserWarning, match="normalised the score variance over the batch and over later positions"):
        model = legacy.load_legacy_model(tmp_path / "old" / "step_5000")
    assert model.config.adaptive_k == "variance"
    resume(tmp_path, tmp_path / "old")
    assert "warning: the legacy trainer's use_adaptive_k normalised the score variance" in capsys.readouterr().out


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
    """Unpickling it would create the file `marker`."""

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


@pytest.mark.skipif(not FIXTURES.exists(), reason="the real legacy checkpoints are not beside this clone")
@pytest.mark.parametrize("variant", ["legacy_dict", "legacy_dictconfig"])
def test_real_legacy_checkpoints_give_the_logits_of_the_legacy_model(variant):
    config = FIXTURES / "pretrain_tiny.yaml" if variant == "legacy_dict" else None
    model = legacy.load_legacy_model(FIXTURES / variant / "step_5000", config)
    expected = torch.load(FIXTURES / "expected.pt", weights_only=True)
    with torch.no_grad():
        logits = model(expected["input_ids"]).logits
    assert (logits - expected["logits"]).abs().max() < 1e-5
