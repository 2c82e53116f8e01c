"""Damaged and malicious checkpoints are refused by verify and by resume; a changed configuration is printed and applied.

One launch makes checkpoints of ZeRO 1, 2 and 3 on two ranks; a second one resumes changed copies of them.
"""

from __future__ import annotations

import json
import mmap
import os
import pickle
import random
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from support.launching import ROOT, Case, run_cases

from gsa.checkpoint import full_state, manifest, safe_load
from gsa.checkpoint.full_state import read_full_state, read_run_state
from gsa.checkpoint.manifest import CheckpointError
from gsa.checkpoint.state import CLIENT_KEY, VERSION
from gsa.weights import load_weights, save_weights
from training import checkpoints, train, verify
from training.checkpointing import verification
from training.config import ConfigError, lease
from training.config.command import run_command
from training.record.metrics_log import read_rows

MODEL = "mp_rank_00_model_states.pt"
OPTIMIZER = tuple(f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (0, 1))
FILES = {
    2: (*OPTIMIZER, MODEL, "model.safetensors", "config.json", "tokenizer.json", "manifest.json"),
    3: (
        *(f"bf16_{name}" for name in OPTIMIZER),
        *(f"zero_pp_rank_{rank}_{MODEL}" for rank in (0, 1)),
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "manifest.json",
    ),
}
RATES = (
    "training.learning_rate=1e-3",
    "training.weight_decay=0.3",
    "training.grad_clip=0.5",
    "training.max_steps=12",
    "training.lr_scheduler=linear",
)


@pytest.fixture(scope="module")
def argv(tiny_yaml) -> Callable[..., tuple[str, ...]]:
    """Returns a function that makes the arguments of a run from its ZeRO stage, its folder and further arguments."""

    def arguments(stage: int, folder: Path, *extra: str) -> tuple[str, ...]:
        precision = "bf16" if stage == 3 else "fp32"
        return (
            "--config",
            str(tiny_yaml),
            "--output_dir",
            str(folder),
            "model.n_layers=1",
            "training.eval_interval=0",
            "training.eval_windows=1",
            "--deepspeed_config",
            str(ROOT / "ds_configs" / f"zero{stage}.json"),
            f"training.precision={precision}",
            *extra,
        )

    return arguments


@pytest.fixture(scope="module")
def good(tmp_path_factory, argv) -> dict[int, Path]:
    """ZeRO stage -> folder of a run of two ranks with step_1 and step_2; ZeRO 3 in bf16. Copy it before changing it."""
    base = tmp_path_factory.mktemp("good")
    folders = {stage: base / str(stage) for stage in (1, 2, 3)}
    two_saves = ("training.stop_at_step=2", "training.save_interval=1")
    run_cases(2, [Case(str(stage), argv(stage, folder, *two_saves)) for stage, folder in folders.items()], base)
    return folders


@pytest.fixture
def copy(good, tmp_path) -> Callable[[int], Path]:
    """Returns a function that copies the run of a ZeRO stage into the test's own folder."""

    def copied(stage: int) -> Path:
        shutil.copytree(good[stage], tmp_path / str(stage), dirs_exist_ok=True)
        return tmp_path / str(stage)

    return copied


def forge(step_dir: Path, change: Callable[[dict], None]) -> None:
    """Changes the contents of the model's .pt file and seals the checkpoint again, so that all hashes are right."""
    data = torch.load(step_dir / MODEL, weights_only=True)
    change(data)
    torch.save(data, step_dir / MODEL)
    manifest.seal(step_dir)


def forge_shard(step_dir: Path, rank: int, change: Callable[[dict], None]) -> None:
    """Changes tensors of an optimizer shard in place in its file and seals the checkpoint again."""
    with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
        shard = safe_load.load(step_dir / OPTIMIZER[rank], extra_allowed=full_state._STAND_INS, mmap=True)
        change(shard["optimizer_state_dict"])
    manifest.seal(step_dir)


class Evil:
    """Unpickling it would create the file `marker`."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


# -- damage: verify, and resume before a launch ---------------------------------------------------------------


def refused(step_dir: Path, capsys, argv, stage: int, *names: str) -> None:
    """Asserts that verify and resume refuse the checkpoint, both naming all of `names`, and print no traceback."""
    capsys.readouterr()
    assert run_command(verify.main, [str(step_dir)]) == 3
    out = capsys.readouterr()
    assert "✗" in out.out and "Traceback" not in out.out + out.err
    with pytest.raises(CheckpointError) as by_resume:
        train.prepare(train.parse([*argv(stage, step_dir.parent, "--resume_from", step_dir.name)]))
    for name in names:
        assert name in out.out and name in str(by_resume.value)


@pytest.mark.parametrize("damage", ["bit", "truncated", "deleted"])
@pytest.mark.parametrize(("stage", "name"), [(stage, name) for stage, names in FILES.items() for name in names])
def test_damage_to_any_file_is_refused_by_name(copy, capsys, argv, stage, name, damage):
    step_dir = copy(stage) / "step_2"
    assert {path.name for path in step_dir.iterdir()} == set(FILES[stage])
    path, dice = step_dir / name, random.Random(f"{stage} {name}")
    data = path.read_bytes()
    if damage == "bit":
        for at in sorted({0, len(data) - 1, *(dice.randrange(len(data)) for _ in range(4))}):
            flipped = bytearray(data)
            flipped[at] ^= 1 << dice.randrange(8)
            path.write_bytes(flipped)
            refused(step_dir, capsys, argv, stage, name)
        return
    path.unlink()
    if damage == "truncated":
        path.write_bytes(data[: dice.randrange(len(data))])
    refused(step_dir, capsys, argv, stage, name)


@pytest.mark.parametrize(("stage", "kind"), [(2, "optim_states"), (3, "optim_states"), (3, "model_states")])
def test_files_swapped_between_ranks_are_refused(copy, capsys, argv, stage, kind):
    step_dir = copy(stage) / "step_2"
    a, b = (step_dir / name for name in FILES[stage] if "_pp_rank_" in name and kind in name)
    one, other = a.read_bytes(), b.read_bytes()
    a.write_bytes(other), b.write_bytes(one)
    # the model shards of ZeRO 3 are placeholders: if they are equal, nothing has been swapped
    if one != other:
        refused(step_dir, capsys, argv, stage, a.name, b.name)
    assert one != other or kind == "model_states"


def test_one_bad_checkpoint_of_a_run_decides_the_exit_code_of_both_commands(copy, capsys):
    run = copy(2)
    assert verify.main([str(run), "--all"]) == 0
    (run / "step_1" / "config.json").write_text("{}")
    capsys.readouterr()
    assert run_command(verify.main, [str(run), "--all"]) == 3
    out = capsys.readouterr().out
    assert "1 of 2 checkpoints are good" in out
    assert run_command(checkpoints.main, ["verify", str(run), "--config", "run.yaml"]) == 3
    assert capsys.readouterr().out == out


# -- wrong contents with right hashes: sealed again after the change -------------------------------------------


def not_verified(step_dir: Path) -> str:
    """The line with which verify refuses a checkpoint."""
    printed: list[str] = []
    assert not verification.verify(step_dir, report=printed.append)
    assert printed[-1].startswith("✗")
    return printed[-1]


def test_a_config_json_that_differs_from_the_shards_is_found(copy):
    step_dir = copy(2) / "step_2"
    config = json.loads((step_dir / "config.json").read_text())
    config["training"]["seed"] = 8
    (step_dir / "config.json").write_text(json.dumps(config))
    manifest.seal(step_dir)
    assert "config.json is not the configuration in the shards" in not_verified(step_dir)


def test_shapes_are_compared_with_the_configuration(copy, argv):
    step_dir = copy(2) / "step_2"
    config = json.loads((step_dir / "config.json").read_text())
    config["model"]["d_ffn"] = 32
    (step_dir / "config.json").write_text(json.dumps(config))
    forge(step_dir, lambda data: data[CLIENT_KEY]["config"]["model"].update(d_ffn=32))
    printed = not_verified(step_dir)
    assert "ffn.down_proj.weight is (32, 64) in the shards and (32, 32) by the configuration" in printed


def test_a_model_safetensors_that_differs_from_the_masters_is_found(copy):
    step_dir = copy(2) / "step_2"
    _, weights = load_weights(step_dir)
    weights["norm.weight"] = weights["norm.weight"] + 1e-3
    save_weights(weights, read_run_state(step_dir).config, step_dir)
    manifest.seal(step_dir)
    assert "norm.weight is not what the float32 masters in the shards round to" in not_verified(step_dir)
    weights["norm.weight"] = torch.ones(3)
    save_weights(weights, read_run_state(step_dir).config, step_dir)
    manifest.seal(step_dir)
    assert "model.safetensors: norm.weight is (3,), by the configuration (32,)" in not_verified(step_dir)


@pytest.mark.parametrize("what", ["master", "exp_avg_sq"])
def test_a_number_that_is_not_finite_is_found(copy, what):
    step_dir = copy(2) / "step_2"

    def spoil(state: dict) -> None:
        adam = state["base_optimizer_state"]["state"][0]
        tensor = state["single_partition_of_fp32_groups"][0] if what == "master" else adam[what]
        with torch.no_grad():
            tensor.view(-1)[5] = float("nan")

    forge_shard(step_dir, 1, spoil)
    assert f"{what} of " in (printed := not_verified(step_dir)) and "is not finite" in printed


def test_ranks_with_different_numbers_of_updates_are_found(copy, argv):
    step_dir = copy(2) / "step_2"
    forge_shard(step_dir, 1, lambda state: state["base_optimizer_state"]["state"][0]["step"].add_(1))
    printed = not_verified(step_dir)
    assert (
        OPTIMIZER[1] in printed
        and "Adam has done 3 updates of " in printed
        and "here, 2 in the shards before it" in printed
    )


def test_a_renamed_folder_is_refused_by_verify_and_by_resume(copy, argv, capsys):
    run = copy(2)
    (run / "step_2").rename(run / "step_20")
    refused(run / "step_20", capsys, argv, 2, "step_20 holds step 2: it was renamed; name it step_2 again")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_pickle_in_place_of_a_file_of_another_format_is_refused_and_not_run(copy, tmp_path, name):
    step_dir, marker = copy(2) / "step_2", tmp_path / "ran"
    for content in (pickle.dumps(Evil(marker)), None):
        if content is None:
            torch.save(Evil(marker), step_dir / name)
        else:
            (step_dir / name).write_bytes(content)
        manifest.seal(step_dir)
        assert name in not_verified(step_dir)
        with pytest.raises(CheckpointError, match=name):
            load_weights(step_dir)
    assert not marker.exists()


# -- the second launch ----------------------------------------------------------------------------------------


def as_version_1(state: dict) -> dict:
    """A run state as the first version of the format held it."""
    newer = ("epoch_offset", "indexer_start", "decided", "skipped")
    return {**{key: value for key, value in state.items() if key not in newer}, "version": 1}


@pytest.fixture(scope="module")
def resumed(tmp_path_factory, good, argv):
    """The folder with all resumed runs, in which a malicious file would have created `ran`, and what was printed."""
    base = tmp_path_factory.mktemp("resumed")

    def copied(stage: int, name: str) -> Path:
        shutil.copytree(good[stage], base / name)
        return base / name

    cases = []
    for stage in (2, 3):
        resume = ("--resume_from", "step_1", "training.stop_at_step=2", *RATES, "--allow_config_change")
        cases.append(Case(f"rates_{stage}", argv(stage, copied(stage, f"rates_{stage}"), *resume)))
    first = copied(2, "first_version")
    forge(first / "step_2", lambda data: data.update({CLIENT_KEY: as_version_1(data[CLIENT_KEY])}))
    length = ("--resume_from", "step_2", "training.max_seq_len=16", "--allow_config_change", "training.stop_at_step=3")
    damaged = copied(2, "damaged") / "step_2" / OPTIMIZER[0]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    cases += [
        Case("first_version", argv(2, first, "--resume_from", "step_2", "training.stop_at_step=3")),
        Case("length", argv(2, copied(2, "length"), *length)),
        Case("damaged", argv(2, base / "damaged", "--resume_from", "auto", "training.stop_at_step=2")),
        Case("straight", argv(2, copied(2, "straight"), "--resume_from", "auto", "training.stop_at_step=3")),
    ]
    for stage in (1, 2, 3):
        for name in sorted(path.name for path in (good[stage] / "step_2").glob("*.pt")):
            folder = copied(stage, f"evil_{stage}_{name}")
            content = {"module": Evil(base / "ran"), "optimizer_state_dict": Evil(base / "ran")}
            torch.save(content, folder / "step_2" / name)
            manifest.seal(folder / "step_2")
            if name not in (MODEL, f"zero_pp_rank_0_{MODEL}"):  # these are refused before a launch
                cases.append(Case(folder.name, argv(stage, folder, "--resume_from", "step_2"), 3))
    return base, run_cases(2, cases, base)


def test_a_malicious_pickle_in_any_file_is_refused_and_not_run(resumed, argv):
    """Each .pt file at ZeRO 1, 2 and 3 is refused by verify, and either before the launch or by each rank that loads it."""
    base, output = resumed
    folders = sorted(base.glob("evil_*"))
    assert len(folders) == 3 + 3 + 4
    for folder in folders:
        stage, name = int(folder.name.split("_")[1]), folder.name.split("_", 2)[2]
        assert name in (printed := not_verified(folder / "step_2")) and "nothing in it was run" in printed
        if name in (MODEL, f"zero_pp_rank_0_{MODEL}"):
            with pytest.raises(CheckpointError, match="nothing in it was run"):
                train.prepare(train.parse([*argv(stage, folder, "--resume_from", "step_2")]))
        else:
            # printed by both ranks; neither waits for the other
            assert output.count(f"{folder / 'step_2' / name}: refused, and nothing in it was run") == 2
    assert not (base / "ran").exists()


def test_auto_skips_a_damaged_checkpoint(resumed):
    base, output = resumed
    assert f"passed over: step_2: {OPTIMIZER[0]}" in output
    assert (base / "damaged" / "latest").read_text().strip() == "step_2"  # the step was trained and saved again
    manifest.verify(base / "damaged" / "step_2")


@pytest.mark.parametrize("stage", [2, 3])
def test_changed_rates_apply_although_deepspeed_restores_the_old_ones(resumed, stage):
    """With the same ranks and stage, DeepSpeed's own loader is used, which restores rate, decay and clipping."""
    base, output = resumed
    assert "training.learning_rate: 0.003 -> 0.001 (changes the curve)" in output
    assert "training.max_steps: 6 -> 12 (harmless)" in output
    row = [r for r in read_rows(base / f"rates_{stage}" / "metrics.jsonl") if "loss" in r][-1]
    assert row["step"] == 2 and row["lr"] == pytest.approx(1e-3)  # the last step of warm-up, to another peak
    step_dir = base / f"rates_{stage}" / "step_2"
    state = read_full_state(step_dir)
    assert state.groups["decay"]["weight_decay"] == 0.3 and state.groups["no_decay"]["weight_decay"] == 0.0
    # the rate of the next step, the first of the linear decay from step 2 to 12
    assert state.groups["decay"]["lr"] == pytest.approx(1e-3) and state.schedule["base_lrs"][0] == 1e-3
    if stage == 2:  # the files of ZeRO 3 hold no clipping
        shard = safe_load.load(step_dir / OPTIMIZER[0], extra_allowed=full_state._STAND_INS)
        assert shard["optimizer_state_dict"]["clip_grad"] == 0.5


def test_a_checkpoint_of_version_1_verifies_and_resumes_like_a_current_one(resumed):
    base, _ = resumed
    assert verification.verify(base / "first_version" / "step_2", report=lambda line: None)
    assert read_run_state(base / "first_version" / "step_2").indexer_start == 0
    ours, theirs = (manifest.read(base / name / "step_3").files for name in ("first_version", "straight"))
    same = ["model.safetensors", *OPTIMIZER]
    assert all(ours[name] == theirs[name] for name in same)
    state = torch.load(base / "first_version" / "step_3" / MODEL, weights_only=True)[CLIENT_KEY]
    assert state["version"] == VERSION > 1 and state["decided"] == {}


def test_with_another_window_length_the_position_is_the_same_number_of_tokens(resumed):
    row = [r for r in read_rows(resumed[0] / "length" / "metrics.jsonl") if "loss" in r][-1]
    assert row["samples"] == 2 * 8 * 2 + 8 and row["tokens"] == 2 * 8 * 32 + 8 * 16


# -- changes since the checkpoint, found before a launch ------------------------------------------------------------------


def start(argv, folder: Path, *extra: str):
    """The Start of a resumed run on one rank, although the checkpoint was made by two."""
    return train.prepare(train.parse([*argv(2, folder, "--resume_from", "step_2", *extra)])).start


def test_a_change_of_the_curve_needs_the_flag_and_an_impossible_one_is_always_refused(copy, argv):
    run = copy(2)
    with pytest.raises(ConfigError, match=r"training.weight_decay \(0.1 there, 0.3 here\)"):
        start(argv, run, *RATES)
    assert start(argv, run, *RATES, "--allow_config_change").state.step == 2
    for allowed in ((), ("--allow_config_change",)):
        with pytest.raises(ConfigError, match="made with another model.d_ffn: its tensors do not fit"):
            start(argv, run, "model.d_ffn=32", *allowed)


def test_init_from_beside_a_resume_must_be_the_one_of_the_run(copy, argv):
    run, weights = copy(2), "elsewhere/step_9"
    with pytest.raises(ConfigError, match=r"init_from=elsewhere/step_9 starts a new run, .*new weights.*Leave") as err:
        start(argv, run, f"training.init_from={weights}")
    assert err.value.exit_code == 2

    def began_there(data):
        data[CLIENT_KEY]["config"]["training"]["init_from"] = weights

    forge(run / "step_2", began_there)
    (run / "step_2" / "config.json").unlink()  # not read here
    manifest.seal(run / "step_2")
    for given in (weights, str(ROOT / weights), "null"):  # the yaml of every launch, whole path or not; or left out
        prepared = train.prepare(train.parse([*argv(2, run, "--resume_from", "step_2", f"training.init_from={given}")]))
        assert prepared.start.state.step == 2 and prepared.spec.cfg.training.init_from == weights
    with pytest.raises(ConfigError, match=r"began from the weights of elsewhere/step_9"):
        start(argv, run, "training.init_from=elsewhere/step_8")


def test_the_same_global_batch_from_other_factors_is_harmless(copy, argv, capsys):
    run = copy(2)
    unset = ("training.global_batch_size=null", "training.gradient_accumulation_steps=4")
    assert start(argv, run, *unset).state.step == 2
    assert "training.global_batch_size: 8 -> None (harmless)" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"training.global_batch_size \(8 there, 4 here\)"):
        start(argv, run, unset[0], "training.gradient_accumulation_steps=2")


def test_the_same_text_in_another_place_is_harmless(copy, argv, corpus, tmp_path, capsys):
    shutil.copytree(corpus, tmp_path / "elsewhere")
    assert start(argv, copy(2), f"data.data_dir={tmp_path / 'elsewhere'}").state.step == 2
    printed = capsys.readouterr().out
    assert f"data.data_dir: '{corpus}' -> '{tmp_path / 'elsewhere'}' (harmless)" in printed
    half = f"data.mixture={{{corpus}: 0.5, {tmp_path / 'elsewhere'}: 0.5}}"
    with pytest.raises(ConfigError, match="data.mixture"):  # the same documents, but in another order
        start(argv, copy(2), half)


def test_a_deepspeed_configuration_that_changes_the_numbers_needs_the_flag(copy, argv, tmp_path, capsys):
    json_file, run = tmp_path / "ds.json", copy(2)
    ours = ("--deepspeed_config", str(json_file))
    zero = {"stage": 2, "reduce_bucket_size": 1000}
    json_file.write_text(json.dumps({"zero_optimization": zero}))
    assert start(argv, run, *ours).state.step == 2
    assert (
        "deepspeed_config.zero_optimization.reduce_bucket_size: 50000000 -> 1000 (harmless)" in capsys.readouterr().out
    )
    numbers = {"communication_data_type": "bf16", "data_types": {"grad_accum_dtype": "bf16"}}
    json_file.write_text(json.dumps({"zero_optimization": zero, **numbers}))
    with pytest.raises(ConfigError) as err:
        start(argv, run, *ours)
    for key in (
        "communication_data_type (None there, 'bf16' here)",
        "data_types.grad_accum_dtype (None there, 'bf16' here)",
    ):
        assert f"deepspeed_config.{key}" in str(err.value)
    assert start(argv, run, *ours, "--allow_config_change").state.step == 2


def test_infinity_in_the_configuration_is_refused_at_the_start(argv, tmp_path):
    with pytest.raises(ConfigError, match="configuration.training.grad_clip is inf"):
        train.prepare(train.parse([*argv(2, tmp_path / "run", "training.grad_clip=.inf")]))


# -- tools ----------------------------------------------------------------------------------------------------


def test_list_prune_pin_and_diff(copy, capsys):
    run = copy(2)
    one, two = run / "step_1", run / "step_2"
    assert run_command(checkpoints.main, ["list", str(run)]) == 0
    assert "step_2" in (out := capsys.readouterr().out) and "complete, latest" in out and "2 x ZeRO 2" in out
    assert run_command(checkpoints.main, ["pin", str(one)]) == 0
    assert run_command(checkpoints.main, ["prune", str(run), "--keep_last", "1", "--yes"]) == 0
    assert one.exists()
    assert run_command(checkpoints.main, ["unpin", str(one)]) == 0
    capsys.readouterr()
    assert run_command(checkpoints.main, ["diff", str(one), str(two)]) == 0
    assert "1 -> 2" in capsys.readouterr().out
    assert run_command(checkpoints.main, ["prune", str(run), "--keep_last", "1"]) == 0
    assert one.exists() and "would remove step_1" in capsys.readouterr().out
    with lease.owned(run, command="training/train.py"):
        mine = lease.read_lease(run)
    theirs = replace(mine, token="theirs", pid=os.getppid(), started=lease._started(os.getppid()))
    (run / lease.LEASE).write_text(json.dumps(asdict(theirs)))  # a process that lives
    assert run_command(checkpoints.main, ["prune", str(run), "--keep_last", "1"]) == 0  # without --yes it only lists
    assert run_command(checkpoints.main, ["prune", str(run), "--keep_last", "1", "--yes"]) == 2
    assert one.exists() and f"is in use by training/train.py (pid {os.getppid()}" in capsys.readouterr().err
    assert run_command(checkpoints.main, ["prune", str(run), "--keep_last", "1", "--yes", "--force"]) == 0
    assert not one.exists()
    assert run_command(checkpoints.main, ["verify", str(run)]) == 0
    assert run_command(checkpoints.main, ["list", str(run / "nothing")]) == 3
