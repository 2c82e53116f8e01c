"""The walls of docs/architecture.md: who may import whom, read from the source of gsa/ and training/."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.launching import ROOT, rank_environment

FILES = sorted(
    path.relative_to(ROOT).as_posix() for package in ("gsa", "training") for path in (ROOT / package).rglob("*.py")
)
TEST_MODULES = {"tests", "benchmarks", "scripts", "support"}

# Room of gsa/ (a file, or a folder and all below it) -> what of gsa and what third-party packages it may import.
# The longest name that fits decides.
ROOMS: dict[str, tuple[set[str], set[str]]] = {
    "gsa/__init__.py": ({"gsa.config", "gsa.model"}, set()),
    "gsa/config.py": (set(), set()),
    "gsa/files.py": (set(), set()),
    "gsa/units.py": (set(), set()),
    "gsa/yaml_text.py": (set(), {"yaml"}),
    "gsa/loss.py": ({"gsa.kernels"}, {"torch"}),
    "gsa/model.py": ({"gsa.config", "gsa.attention", "gsa.kernels", "gsa.loss"}, {"torch"}),
    "gsa/attention/": ({"gsa.config", "gsa.kernels", "gsa.attention"}, {"torch"}),
    "gsa/kernels/": ({"gsa.kernels"}, {"torch"}),
    "gsa/kernels/chunked.py": ({"gsa.kernels"}, {"torch", "numpy"}),
    "gsa/kernels/triton_": ({"gsa.kernels"}, {"torch", "triton"}),
    "gsa/checkpoint/": ({"gsa.config", "gsa.checkpoint", "gsa.files", "gsa.units"}, {"torch"}),
    "gsa/checkpoint/full_state.py": ({"gsa.checkpoint", "gsa.weights"}, {"torch"}),
    "gsa/checkpoint/legacy.py": (
        {"gsa.config", "gsa.checkpoint", "gsa.files", "gsa.model", "gsa.attention", "gsa.units", "gsa.yaml_text"},
        {"torch", "yaml"},
    ),
    "gsa/generation.py": (
        {"gsa.config", "gsa.model", "gsa.attention", "gsa.kernels", "gsa.weights", "gsa.checkpoint"},
        {"torch", "tokenizers"},
    ),
    "gsa/inspection.py": ({"gsa.model", "gsa.attention", "gsa.kernels"}, {"torch"}),
    "gsa/weights.py": ({"gsa.config", "gsa.checkpoint", "gsa.files"}, {"torch", "safetensors"}),
}
# Wing of training/ -> what it may import of this project besides itself. The data wing and the loop may use the model's
# checkpoint format; a wing is named by its folder.
WINGS: dict[str, set[str]] = {
    "config": {"gsa"},
    "record": {"gsa", "config"},
    "data": {"gsa", "config"},
    "engine": {"gsa", "config"},
    "planning": {"gsa", "config"},
    "observe": {"gsa", "config", "record", "planning", "engine"},
    "checkpointing": {"gsa", "config", "record", "data", "engine"},
    "reporting": {"gsa", "config", "record", "planning"},
    "loop": {"gsa", "config", "record", "data", "engine", "planning", "observe", "checkpointing"},
}
HOMES: dict[str, str] = {
    "deepspeed": "training/engine/engine.py",
    "wandb": "training/observe/tracking/wandb_",
    "tensorboard": "training/observe/tracking/tensorboard_sink.py",
    "pynvml": "training/observe/gpu_monitor.py",
    "pyarrow": "training/data/corpus.py",
    "jinja2": "training/reporting/",
    "omegaconf": "training/config/",
}
"""Where a third party may be imported: the beginning of the path of a file."""
WITHOUT_RANKS = ("config", "record", "planning", "reporting")
"""Wings that know no torch.distributed: they run where no process group is."""


def imports(source: str, file: str) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of everything that `source` imports, at its top or inside a function.

    `from a import b` yields "a.b", since b may be a module.
    """
    package = Path(file).parent.parts
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield node.lineno, name.name
        elif isinstance(node, ast.ImportFrom):
            parts = [*package[: len(package) - node.level + 1]] if node.level else []
            base = ".".join([*parts, *([node.module] if node.module else [])])
            for name in node.names:
                yield node.lineno, f"{base}.{name.name}"
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            target = node.args[0]
            yield node.lineno, target.value if isinstance(target, ast.Constant) else "<computed>"


def broken_walls(source: str, file: str) -> list[str]:
    """One line for each import of `source`, were it the content of `file`, that goes through a wall."""
    return [f"{file}:{line} may not import {name}" for line, name in imports(source, file) if not _allowed(file, name)]


def _allowed(file: str, name: str) -> bool:
    top = "tensorboard" if name.startswith("torch.utils.tensorboard") else name.split(".")[0]
    if top in TEST_MODULES or top == "<computed>" or not file.startswith(HOMES.get(top, "")):
        return False
    if top in sys.stdlib_module_names:
        return True
    return _allowed_in_gsa(file, name, top) if file.startswith("gsa/") else _allowed_in_training(file, name, top)


def _allowed_in_gsa(file: str, name: str, top: str) -> bool:
    fitting = [room for room in ROOMS if file.startswith(room)]
    assert fitting, f"{file} is in no room: say in ROOMS what it may import"
    inner, outer = ROOMS[max(fitting, key=len)]
    if top == "gsa":
        return any(name == room or name.startswith(f"{room}.") for room in inner)
    return top in outer


def _allowed_in_training(file: str, name: str, top: str) -> bool:
    wing = _wing(file.removeprefix("training/").removesuffix(".py").split("/"))
    if name.startswith("torch.distributed"):
        return wing not in WITHOUT_RANKS
    if top not in ("gsa", "training"):
        return True
    to = "gsa" if top == "gsa" else _wing(name.split(".")[1:])
    if to is None:  # a command, whom nobody imports
        return False
    return wing is None or to == wing or to in WINGS[wing]


def _wing(parts: list[str]) -> str | None:
    """The wing of a module of training/, or None for a command."""
    return parts[0] if (ROOT / "training" / parts[0]).is_dir() else None


@pytest.mark.parametrize("file", FILES)
def test_imports_stay_within_the_walls(file):
    assert not broken_walls((ROOT / file).read_text(), file)


@pytest.mark.parametrize(
    "file, source",
    [
        ("gsa/kernels/reference.py", "from gsa.config import ModelConfig"),
        ("gsa/kernels/reference.py", "import triton"),
        ("gsa/kernels/chunked.py", "from ..attention import indexer"),
        ("gsa/attention/indexer.py", "from gsa import GSAForCausalLM"),
        ("gsa/attention/indexer.py", "from gsa.model import Block"),
        ("gsa/model.py", "from gsa import weights"),
        ("gsa/model.py", "def f():\n    import deepspeed.zero"),
        ("gsa/model.py", "from training.config import RunConfig"),
        ("gsa/model.py", "import omegaconf"),
        ("gsa/loss.py", "from . import model"),
        ("gsa/checkpoint/state.py", "from omegaconf import OmegaConf"),
        ("gsa/checkpoint/state.py", "from gsa.model import GSAForCausalLM"),
        ("gsa/weights.py", "import training"),
        ("training/verify.py", "from training.checkpoints import main"),
        ("training/verify.py", "from training import train"),
        ("training/loop/trainer.py", "from training.train import main"),
        ("training/loop/trainer.py", "from training.reporting.charts import curve"),
        ("training/config/batch.py", "from training.data import Batch"),
        ("training/record/reader.py", "from training.engine.world import World"),
        ("training/record/reader.py", "import torch.distributed as dist"),
        ("training/record/reader.py", "from torch import distributed"),
        ("training/data/order.py", "from training.record.run_folder import RunFolder"),
        ("training/engine/build.py", "def f():\n    from training.checkpointing.saver import Saver"),
        ("training/planning/search.py", "from training.engine.world import World"),
        ("training/observe/banner.py", "from training.data import PackedTokens"),
        ("training/observe/recorder.py", "from training.checkpointing.saver import Saver"),
        ("training/checkpointing/saver.py", "from training.observe.console import Console"),
        ("training/checkpointing/saver.py", "from training.planning.devices import find_device"),
        ("training/reporting/diagnosis.py", "from training.observe.telemetry import Telemetry"),
        ("training/planning/devices.py", "import pynvml"),
        ("training/prepare_data.py", "import pyarrow.parquet"),
        ("training/report.py", "import jinja2"),
        ("training/loop/trainer.py", "from omegaconf import OmegaConf"),
        ("training/loop/trainer.py", "import deepspeed"),
        ("training/loop/trainer.py", "from deepspeed.utils import logger"),
        ("training/engine/engine.py", "import wandb"),
        ("training/data/dataset.py", "import importlib\nimportlib.import_module('wandb')"),
        ("training/data/dataset.py", "name = 'wandb'\n__import__(name)"),
        ("training/data/dataset.py", "from torch.utils.tensorboard import SummaryWriter"),
        ("training/data/dataset.py", "from support.launching import free_port"),
        ("training/data/dataset.py", "import benchmarks.speed"),
    ],
)
def test_a_hole_in_a_wall_is_seen(file, source):
    assert broken_walls(source, file)


@pytest.mark.parametrize(
    "file, source",
    [
        ("gsa/kernels/triton_attend.py", "import triton.language as tl"),
        ("gsa/kernels/chunked.py", "from .reference import attend"),
        ("gsa/model.py", "import math\nimport torch.nn.functional as F\nfrom gsa.attention.rope import rotate"),
        ("gsa/checkpoint/legacy.py", "import yaml"),
        ("training/engine/engine.py", "import deepspeed\nfrom gsa import GSAForCausalLM"),
        ("training/observe/tracking/wandb_sink.py", "import wandb"),
        ("training/observe/tracking/tensorboard_sink.py", "from torch.utils.tensorboard import SummaryWriter"),
        (
            "training/verify.py",
            "from training.reporting.format import percent\nfrom training.loop.trainer import Trainer",
        ),
        ("training/loop/trainer.py", "import torch.distributed as dist\nfrom training.data import Loader"),
    ],
)
def test_doors_are_open(file, source):
    assert not broken_walls(source, file)


def test_the_trainer_imports_few_siblings():
    """A class is too wide before it is too long."""
    source = (ROOT / "training" / "loop" / "trainer.py").read_text()
    modules = {
        node.module
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and node.module.startswith("training")
    }
    assert len(modules) <= 15, sorted(modules)
    assert "is_main" not in source.replace("open_recorder(world.is_main", "")  # the recorder knows which rank records


def test_the_walls_are_about_folders_that_are_there():
    folders = {path.name for path in (ROOT / "training").iterdir() if (path / "__init__.py").is_file()}
    assert folders == set(WINGS)
    assert {"gsa/model.py", "gsa/kernels/reference.py", HOMES["deepspeed"]} <= set(FILES)


def test_reading_the_input_of_a_run_imports_no_deepspeed():
    """It takes seconds to import: a refusal must not wait for it."""
    program = "import sys, training.train; sys.exit('deepspeed' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=rank_environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
