"""One fault, one exit code and one sentence, whichever command meets it."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.launching import ROOT, Case, clean_environment, run_cases

from gsa.checkpoint import manifest
from gsa.checkpoint.manifest import CheckpointError, require_space
from gsa.units import size_text
from training.config import ConfigError
from training.config.command import run_command
from training.engine.launcher import with_free_port
from training.loop.spike_policy import diverged
from training.observe.gpu_monitor import require_usable_gpus
from training.planning import devices
from training.planning.outcome import Outcome
from training.planning.search import most_trials, search
from training.record.run_folder import FolderError, RunFolder


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_yaml) -> Path:
    """The folder of a run with two checkpoints."""
    base = tmp_path_factory.mktemp("messages")
    argv = ("--config", str(tiny_yaml), "--output_dir", str(base / "run"))
    overrides = (
        "training.max_steps=2",
        "training.save_interval=1",
        "training.eval_interval=0",
        "training.stop_at_step=2",
    )
    run_cases(1, [Case("two steps", (*argv, *overrides))], base / "launch")
    return base / "run"


def called(argv: str | list[str], capsys) -> tuple[int, str]:
    """The exit code of `python -m training.<argv>`, and what it has printed to stderr."""
    name, *rest = argv.split() if isinstance(argv, str) else argv
    try:
        code = run_command(importlib.import_module(f"training.{name}").main, rest)
    except SystemExit as end:  # of argparse
        code = end.code
    printed = capsys.readouterr()
    return int(code), printed.err + printed.out


READ_A_RUN = (
    "doctor {}",
    "report {}",
    "generate {} --prompt a",
    "inspect_indexer {}",
    "checkpoints list {}",
    "checkpoints verify {}",
    "checkpoints prune {} --keep_last 1",
    "verify --all {}",
    "tracking rebuild {} --mode offline",
    "replay {} --step 1",
)
READ_A_CHECKPOINT = ("verify {}", "checkpoints pin {}", "checkpoints unpin {}", "checkpoints diff {} {}")


@pytest.mark.parametrize("command", [*READ_A_RUN, *READ_A_CHECKPOINT])
def test_what_is_missing_or_empty_or_a_file_exits_3(command, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for name in ("nowhere", "empty", "file"):
        code, printed = called(command.format(*[tmp_path / name] * 2), capsys)
        assert code == 3 and name in printed, (name, printed)


@pytest.mark.parametrize(
    "command", ["verify {}", "generate {} --prompt a", "inspect_indexer {}", "checkpoints diff {} {}"]
)
def test_a_damaged_checkpoint_exits_3(command, run, tmp_path, capsys):
    bad = tmp_path / "step_2"
    bad.mkdir()
    for path in (run / "step_2").iterdir():
        if path.is_file():
            bad.joinpath(path.name).write_bytes(path.read_bytes())
    (bad / "model.safetensors").write_bytes(b"x")
    code, printed = called(command.format(bad, bad), capsys)
    assert code == 3 and "step_2" in printed, printed


@pytest.mark.parametrize(
    "command",
    [
        *(f"{one} --nonsense" for one in (*READ_A_RUN, *READ_A_CHECKPOINT)),
        "doctor {} --last 0",
        "generate {} --prompt a --max_new_tokens 0",
        "generate {} --prompt a --device nonsense",
        "inspect_indexer {} --device nonsense",
        "inspect_indexer {} --windows 0",
        "inspect_indexer {} --max_seq_len 4096",
        "inspect_indexer {} --max_seq_len 0",
        "checkpoints prune {} --keep_last 0",
        "tracking rebuild {} --mode nonsense",
        "replay {} --step x",
        "metrics --nonsense",
        "plan --config nowhere.yaml",
        "tune --config nowhere.yaml",
        "quickstart --nonsense",
        "prepare_data --nonsense",
        "prepare_data --out {} --embedded --held_out 2",
    ],
)
def test_a_refused_argument_or_a_missing_configuration_exits_2(command, run, capsys):
    code, printed = called(command.format(run, run), capsys)
    assert code == 2, printed


@pytest.mark.parametrize("command", ["verify {}", "checkpoints pin {}", "checkpoints diff {} {}"])
def test_a_run_where_a_checkpoint_is_meant_gets_a_hint_at_its_tags(command, run, capsys):
    code, printed = called(command.format(run, run), capsys)
    assert code == 3 and "folder of a run, not of a checkpoint: choose one of step_1, step_2" in printed, printed


@pytest.mark.parametrize("command", READ_A_RUN)
def test_a_checkpoint_where_a_run_is_meant_gets_a_hint_at_the_run(command, run, capsys):
    if command.startswith(("generate", "inspect_indexer")):
        return  # they take both
    code, printed = called(command.format(run / "step_2"), capsys)
    assert code == 3 and f"is a checkpoint; its run is {run}" in printed, printed


def test_a_folder_of_others_is_not_trained_into(tmp_path):
    with pytest.raises(FolderError, match="is no run's folder: it holds architecture.md"):
        RunFolder(ROOT / "docs").claim(going_on=False)
    with pytest.raises(FolderError, match="give a new or empty folder"):
        RunFolder(ROOT / "training" / "configs").claim(going_on=True)
    for name in ("slurm-1.out", "train.log", "config.yaml", ".ranks"):  # a job's log, and what a failed launch left
        (tmp_path / name).write_text("x")
    RunFolder(tmp_path).claim(going_on=False)
    RunFolder(tmp_path / "new").claim(going_on=True)


def test_sizes_have_units_that_say_something(tmp_path, monkeypatch):
    sizes = {0: "0 bytes", 12: "12 bytes", 2048: "2 KiB", 5 * 2**19: "2.5 MiB", 2**31: "2 GiB", 200 * 2**30: "200 GiB"}
    assert {n: size_text(n) for n in sizes} == sizes
    monkeypatch.setattr(manifest, "free_bytes", lambda path: 3 * 2**10)
    with pytest.raises(CheckpointError, match="needs 2 MiB and 3 KiB are free; free 2 MiB"):
        require_space(tmp_path, 2 * 2**20)


def test_a_divergence_before_any_save_does_not_advise_to_resume():
    world = SimpleNamespace(gather=lambda value: [value])
    sums = SimpleNamespace(losses=[torch.tensor(1.0)], indexer_losses=[torch.tensor(0.0)])
    row = {"step": 3, "loss": math.nan, "grad_norm": math.inf}
    for last_good, words in ((None, "start again with --fresh"), ("step_2", "--resume_from latest")):
        text = str(diverged(row, sums, [0, 8], plan=None, data=None, world=world, last_good=last_good))
        assert words in text and ("--resume_from" in text) is (last_good is not None), text


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """A driver with four GPUs, of which torch sees none."""
    (tmp_path / "pynvml.py").write_text(
        "def nvmlInit(): pass\ndef nvmlShutdown(): pass\ndef nvmlDeviceGetCount(): return 4\n"
        "def nvmlSystemGetDriverVersion(): return '470.1'\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    yield
    sys.modules.pop("pynvml", None)


def test_gpus_that_torch_does_not_see_are_refused_unless_a_person_asks_for_the_cpu(driver, monkeypatch):
    with pytest.raises(
        ConfigError, match=r"driver 470.1 sees 4 GPU\(s\), and torch .* sees none; .*DS_ACCELERATOR=cpu"
    ):
        require_usable_gpus()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    require_usable_gpus()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    with pytest.raises(ConfigError, match="with CUDA_VISIBLE_DEVICES=7"):
        require_usable_gpus()
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    require_usable_gpus()


def test_bf16_on_a_cpu_has_no_peak_below_that_of_float32(monkeypatch):
    speeds = {torch.bfloat16: 0.05, torch.float32: 0.4}
    monkeypatch.setattr(devices, "measured_tflops", lambda device, dtype: speeds[dtype])
    assert devices.peak_tflops(torch.device("cpu"), torch.bfloat16) == (0.4, "measured")


def test_training_launch_picks_a_free_port_unless_one_is_named():
    argv = ["--num_gpus", "2", "training/train.py", "--config", "a.yaml", "--master_port", "1"]
    flag, port, *rest = with_free_port(argv)
    assert flag == "--master_port" and 1024 < int(port) < 65536 and rest == argv
    for named in (["--master_port", "5", "a.py"], ["--master_port=5", "a.py"], ["--hostfile=h", "a.py"]):
        assert with_free_port(named) == named


def test_the_most_trials_of_a_search_are_known_before(tmp_path):
    sizes = [1, 2, 3, 4, 6, 8, 12, 16, 24]
    paths, kinds = [Path("a.json"), Path("b.json")], ("block", "ffn", "none")
    most = most_trials(paths, kinds, sizes)
    for limit in (*sizes, math.inf):

        def attempt(setting, size, limit=limit):
            return Outcome("ok", step_seconds=(1.0 / size,)) if size < limit else Outcome("out_of_memory")

        assert len(list(search(paths, kinds, sizes, attempt))) <= most
    assert most <= len(paths) * len(kinds) * len(sizes)


def test_a_reader_that_leaves_a_pipe_ends_a_command_without_a_traceback():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "training.metrics"],
        cwd=ROOT,
        env=clean_environment(),
        stdout=write,
        stderr=subprocess.PIPE,
    )
    os.close(write)
    assert done.returncode == 141 and done.stderr == b""


def test_a_plan_that_fits_nowhere_says_so_first_and_exits_1(capsys):
    argv = ["plan", "--config", str(ROOT / "training/configs/pretrain_1b.yaml"), "--num_gpus", "1", "--gpu", "1,10,10"]
    code, printed = called(argv, capsys)
    assert code == 1 and printed.startswith("Nothing fits 1 x ") and "use more GPUs or a smaller model" in printed
    code, printed = called([*argv, "--json"], capsys)
    assert code == 1 and not json.loads(printed)["fits"]
