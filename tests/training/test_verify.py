"""Every corruption is named, by verify and by resume; nothing in a file is run; the predecessor's files resume."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from launching import ROOT, Case, run_cases, train_alone

from gsa.checkpoint import manifest
from gsa.checkpoint.full_state import read_full_state
from training import checkpoints, train, verify
from training.metrics import read_rows

FILES = (
    "zero_pp_rank_0_mp_rank_00_optim_states.pt", "zero_pp_rank_1_mp_rank_00_optim_states.pt",
    "mp_rank_00_model_states.pt", "model.safetensors", "config.json", "manifest.json",
)  # fmt: skip


@pytest.fixture
def copy(a_run, tmp_path) -> Path:
    shutil.copytree(a_run, tmp_path / "run")
    return tmp_path / "run"


def refused(step_dir: Path, capsys, named: str) -> None:
    capsys.readouterr()
    assert verify.main([str(step_dir)]) == 1
    out = capsys.readouterr()
    assert "✗" in out.out and named in out.out and "Traceback" not in out.out + out.err
    with pytest.raises(manifest.CheckpointError, match=named.replace(".", r"\.")):
        manifest.verify(step_dir)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["bit", "truncated", "deleted"])
def test_damage_to_any_file_is_refused_by_name(copy, capsys, name, damage):
    path = copy / "step_6" / name
    data = bytearray(path.read_bytes())
    if damage == "bit":
        data[random.Random(name).randrange(len(data))] ^= 1 << random.Random(name).randrange(8)
    path.write_bytes(data[: len(data) // 2] if damage == "truncated" else data)
    if damage == "deleted":
        path.unlink()
    refused(copy / "step_6", capsys, name)


def test_shards_swapped_between_ranks_are_refused(copy, capsys):
    a, b = (copy / "step_6" / name for name in FILES[:2])
    a.rename(copy / "x"), b.rename(a), (copy / "x").rename(b)
    for name in FILES[:2]:
        refused(copy / "step_6", capsys, name)


def test_auto_passes_a_damaged_checkpoint_over(copy, tiny_yaml):
    path = copy / "step_6" / FILES[0]
    path.write_bytes(path.read_bytes()[:-1])
    argv = ("--config", str(tiny_yaml), "--output_dir", str(copy), "training.stop_at_step=4", "--resume_from")
    done = train_alone([*argv, "step_6"])
    assert done.returncode == 3 and FILES[0] in done.stderr and "Traceback" not in done.stderr
    done = train_alone([*argv, "auto"])
    assert done.returncode == 0, done.stderr
    assert f"passed over: step_6: {FILES[0]}" in done.stdout and "continuing at step 4 of 4" in done.stdout
    assert "taking it up on 1 at ZeRO 2" in done.stdout


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_a_malicious_pickle_in_any_file_is_refused_and_not_run(tmp_path, tiny_yaml):
    """ZeRO 1, 2, 3, each file in turn, resealed: verify, the checks before a launch, and the engine's own loaders."""

    def argv(stage: int, folder: Path, *extra: str) -> tuple[str, ...]:
        return ("--config", str(tiny_yaml), "--output_dir", str(folder), "model.n_layers=1", "training.eval_interval=0",
                "--deepspeed_config", str(ROOT / "ds_configs" / f"zero{stage}.json"), *extra)  # fmt: skip

    stages = (1, 2, 3)
    good = {stage: tmp_path / f"good_{stage}" for stage in stages}
    run_cases(2, [Case(f"{s}", argv(s, good[s], "training.stop_at_step=1")) for s in stages], tmp_path)
    marker, cases, refused_before = tmp_path / "ran", [], []
    for stage in stages:
        names = sorted(path.name for path in (good[stage] / "step_1").glob("*.pt"))
        assert len(names) == {1: 3, 2: 3, 3: 4}[stage]
        for name in names:
            folder = tmp_path / f"bad_{stage}_{name}"
            shutil.copytree(good[stage], folder)
            torch.save({"module": Evil(marker), "optimizer_state_dict": Evil(marker)}, folder / "step_1" / name)
            manifest.seal(folder / "step_1")
            said: list[str] = []
            assert not verify.verify_and_tell(folder / "step_1", say=said.append)
            assert name in said[-1] and "nothing in it was run" in said[-1]
            resume = argv(stage, folder, "--resume_from", "step_1")
            if name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):
                with pytest.raises(manifest.CheckpointError, match="nothing in it was run"):
                    train.prepare(train.parse(list(resume)))
                refused_before.append(name)
            else:
                cases.append(Case(f"{stage} {name}", resume, 3))
    assert len(refused_before) == 3 and len(cases) == 7
    output = run_cases(2, cases, tmp_path)
    assert output.count("nothing in it was run") == 7 * 2  # on both ranks, none of which waits for the other
    assert not marker.exists()


def test_list_prune_pin_and_diff(copy, capsys):
    assert checkpoints.main(["list", str(copy)]) == 0
    assert "step_6" in (out := capsys.readouterr().out) and "complete, latest" in out and "2 x ZeRO 2" in out
    assert checkpoints.main(["pin", str(copy / "step_3")]) == 0
    assert checkpoints.main(["prune", str(copy), "--keep_last", "1", "--yes"]) == 0
    assert (copy / "step_3").exists()
    assert checkpoints.main(["unpin", str(copy / "step_3")]) == 0
    capsys.readouterr()
    assert checkpoints.main(["diff", str(copy / "step_3"), str(copy / "step_6")]) == 0
    assert "3 -> 6" in capsys.readouterr().out
    assert checkpoints.main(["prune", str(copy), "--keep_last", "1"]) == 0
    assert (copy / "step_3").exists() and "would remove step_3" in capsys.readouterr().out
    assert checkpoints.main(["prune", str(copy), "--keep_last", "1", "--yes"]) == 0
    assert not (copy / "step_3").exists()
    assert checkpoints.main(["verify", str(copy)]) == 0
    assert checkpoints.main(["list", str(copy / "nothing")]) == 1


# -- changed settings --------------------------------------------------------------------------------------


def test_changed_settings_are_refused_then_run(copy, tiny_yaml):
    argv = ["--config", str(tiny_yaml), "--output_dir", str(copy), "--resume_from", "step_3", "training.stop_at_step=4",
            "training.learning_rate=1e-3", "training.weight_decay=0.3", "training.grad_clip=0.5", "training.max_steps=12",
            "training.lr_scheduler=linear"]  # fmt: skip
    done = train_alone(argv)
    assert done.returncode == 2 and "training.weight_decay (0.1 there, 0.3 here)" in done.stderr
    done = train_alone([*argv, "--allow_config_change"])
    assert done.returncode == 0, done.stderr
    assert "training.learning_rate: 0.003 -> 0.001 (changes the curve)" in done.stdout
    assert "training.max_steps: 6 -> 12 (harmless)" in done.stdout
    row = [r for r in read_rows(copy / "metrics.jsonl") if "loss" in r][-1]
    factor = 0.3 + 0.7 * (1 - 1 / 10)  # linear from step 2 to 12; the update after 3 steps
    assert row["step"] == 4 and row["lr"] == pytest.approx(1e-3 * factor)
    state = read_full_state(copy / "step_4")
    assert state.groups["decay"]["weight_decay"] == 0.3 and state.groups["no_decay"]["weight_decay"] == 0.0
    shard = torch.load(next((copy / "step_4").glob("*optim_states.pt")), weights_only=False)
    assert shard["optimizer_state_dict"]["clip_grad"] == 0.5


def test_another_window_length_carries_the_position_over_in_tokens(copy, tiny_yaml):
    done = train_alone(["--config", str(tiny_yaml), "--output_dir", str(copy), "--resume_from", "step_3",
                        "training.stop_at_step=4", "training.max_seq_len=16", "--allow_config_change"])  # fmt: skip
    assert done.returncode == 0, done.stderr
    row = [r for r in read_rows(copy / "metrics.jsonl") if "loss" in r][-1]
    assert row["samples"] == 3 * 8 * 2 + 8 and row["tokens"] == 3 * 8 * 32 + 8 * 16
