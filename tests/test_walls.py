"""The walls of docs/architecture.md: who may import whom, read from the source of gsa/ and training/."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(
    path.relative_to(ROOT).as_posix() for room in ("gsa", "training") for path in (ROOT / room).rglob("*.py")
)
TEST_MODULES = {"tests", "benchmarks"} | {"support"}

# Room (a file, or a folder and all below it) -> what of gsa and what third-party packages it may import.
# The longest name that fits decides.
ROOMS: dict[str, tuple[set[str], set[str]]] = {
    "gsa/__init__.py": ({"gsa.config", "gsa.model"}, set()),
    "gsa/config.py": (set(), set()),
    "gsa/loss.py": ({"gsa.kernels"}, {"torch"}),
    "gsa/model.py": ({"gsa.config", "gsa.attention", "gsa.kernels", "gsa.loss"}, {"torch"}),
    "gsa/attention/": ({"gsa.config", "gsa.kernels", "gsa.attention"}, {"torch"}),
    "gsa/kernels/": ({"gsa.kernels"}, {"torch"}),
    "gsa/kernels/chunked.py": ({"gsa.kernels"}, {"torch", "numpy"}),
    "gsa/kernels/triton_": ({"gsa.kernels"}, {"torch", "triton"}),
    "gsa/checkpoint/": ({"gsa.config", "gsa.checkpoint"}, {"torch"}),
    "gsa/checkpoint/full_state.py": ({"gsa.checkpoint", "gsa.weights"}, {"torch"}),
    "gsa/checkpoint/legacy.py": ({"gsa.config", "gsa.checkpoint", "gsa.model", "gsa.attention"}, {"torch", "yaml"}),
    "gsa/weights.py": ({"gsa.config", "gsa.checkpoint"}, {"torch", "safetensors"}),
}
ONLY_DOOR = {
    "deepspeed": "training/engine/engine.py",
    "wandb": "training/tracking.py",
    "tensorboard": "training/tracking.py",
}


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
    found = []
    for line, name in imports(source, file):
        top = name.removeprefix("torch.utils.").split(".")[0] if "tensorboard" in name else name.split(".")[0]
        if not _allowed(file, name, top):
            found.append(f"{file}:{line} may not import {name}")
    return found


def _allowed(file: str, name: str, top: str) -> bool:
    if top in TEST_MODULES or top == "<computed>" or ONLY_DOOR.get(top, file) != file:
        return False
    if top in sys.stdlib_module_names:
        return True
    if not file.startswith("gsa/"):
        return True
    fitting = [room for room in ROOMS if file.startswith(room)]
    assert fitting, f"{file} is in no room: say in ROOMS what it may import"
    inner, outer = ROOMS[max(fitting, key=len)]
    if top == "gsa":
        return any(name == room or name.startswith(f"{room}.") for room in inner)
    return top in outer


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
        ("training/tracking.py", "import wandb\nfrom torch.utils.tensorboard import SummaryWriter"),
    ],
)
def test_doors_are_open(file, source):
    assert not broken_walls(source, file)


def test_the_walls_are_about_files_that_are_there():
    assert {"gsa/model.py", "gsa/kernels/reference.py", "training/engine/engine.py", "training/tracking.py"} <= set(
        FILES
    )
