"""The GPU kit fits the project: every name that it uses exists, and each part that needs no GPU runs on tiny sizes.

A GPU is lent for minutes. A module that moved or a function that was renamed must show here, not there.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.launching import ROOT, clean_environment, rank_environment

FOLDER = ROOT / "benchmarks" / "gpu_kit"
KIT = FOLDER / "kit"
FILES = sorted(path.name for path in KIT.glob("*.py"))
PACKAGES = {"gsa", "training", "benchmarks"}
NO_TRITON = "triton is not installed (it exists for Linux only), and the kit uses the Triton kernels"

Use = tuple[int, str, str]
"""Line, module, and a name that the module must have; the name is empty where only the module is imported."""


def uses(source: str) -> list[Use]:
    """What `source` uses of the project: imports at any depth, and attributes of the modules that they bind.

    `patch.object(module, "name", ...)`, `getattr` and `setattr` with a literal name count as attributes. A name is a
    module only within the function that imports it.
    """
    return list(_uses(ast.parse(source), {}))


def _uses(scope: ast.AST, modules: dict[str, str]) -> Iterator[Use]:
    nodes, inner = [], []
    waiting = list(ast.iter_child_nodes(scope))
    while waiting:
        node = waiting.pop(0)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            inner.append(node)
        else:
            nodes.append(node)
            waiting.extend(ast.iter_child_nodes(node))
    modules = dict(modules)
    for node in nodes:
        if isinstance(node, ast.Import):
            for name in node.names:
                if name.name.split(".")[0] in PACKAGES:
                    yield node.lineno, name.name, ""
                    modules[name.asname or name.name] = name.name
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PACKAGES:
            for name in node.names:
                yield node.lineno, node.module, name.name
                if _is_module(f"{node.module}.{name.name}"):
                    modules[name.asname or name.name] = f"{node.module}.{name.name}"
    for node in nodes:
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in modules:
            yield node.lineno, modules[ast.unparse(node.value)], node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in {"patch.object", "getattr", "setattr"}:
            owner, name = node.args[:2]
            if ast.unparse(owner) in modules and isinstance(name, ast.Constant):
                yield node.lineno, modules[ast.unparse(owner)], name.value
    for function in inner:
        yield from _uses(function, modules)


@functools.cache
def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent is no package
        return False


def missing(module: str, name: str) -> str | None:
    """Why `module`, or `name` in it, cannot be had; None where it can."""
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as err:
        if err.name and err.name.split(".")[0] in PACKAGES:
            return f"there is no module {err.name}"
        raise
    if not name or hasattr(found, name) or _is_module(f"{module}.{name}"):
        return None
    return f"{module} has no {name}"


@pytest.mark.parametrize("file", FILES)
def test_every_name_of_the_project_exists(file):
    pytest.importorskip("triton", reason=NO_TRITON)
    found = [(line, missing(module, name)) for line, module, name in uses((KIT / file).read_text())]
    assert not [f"{file}:{line}: {why}" for line, why in found if why]
    assert found or file == "summary.py"  # which reads metrics.jsonl and imports nothing of the project


def test_missing_names_are_found_however_they_are_used():
    source = """
import training.absent
from gsa import GSAForCausalLM, absent
def one():
    from gsa import kernels as door
    door.attend, door.absent
    with patch.object(door, "absent_too", None):
        pass
def two(door):
    door.anything
"""
    found = {f"{line}: {missing(module, name)}" for line, module, name in uses(source) if missing(module, name)}
    assert found == {
        "2: there is no module training.absent",
        "3: gsa has no absent",
        "6: gsa.kernels has no absent",
        "7: gsa.kernels has no absent_too",
    }


def test_every_file_and_command_of_the_script_exists():
    script = (KIT / "run.sh").read_text()
    paths = re.findall(r"\b(?:training|ds_configs|benchmarks)/[\w/]+\.(?:py|yaml|json)\b", script)
    files, smoke_files = re.findall(r"files=\(([\w ]+)\)", script)
    paths += [f"tests/gsa/kernels/{name}.py" for name in f"{files} {smoke_files}".split()]
    assert len(paths) >= 9
    assert not [path for path in paths if not (ROOT / path).is_file()]
    commands = re.findall(r"-m ((?:training|benchmarks)[\w.]*)", script)
    assert {"training.doctor", "benchmarks.gpu_run"} <= set(commands)
    assert not [name for name in commands if not _is_module(name)]
    imports = re.findall(r"from ((?:gsa|training|benchmarks)[\w.]*) import (\w+)", script)
    assert imports and not [why for pair in imports if (why := missing(*pair))]
    scripts = re.findall(r"\$KIT/(\w+\.py)", script)
    assert set(scripts) == set(FILES)


def test_the_first_swept_tile_is_the_one_that_ships():
    pytest.importorskip("triton", reason=NO_TRITON)
    attention = importlib.import_module("gsa.kernels.triton_attention")
    spec = importlib.util.spec_from_file_location("gpu_kit_kernels_table", KIT / "kernels_table.py")
    table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(table)
    assert {name: settings[0] for name, settings in table.SWEEP.items()} == {
        name: getattr(attention, name) for name in table.SWEEP
    }
    assert set(table.KERNELS) == set(table.SWEEP)
    assert not [kernel for kernel in table.KERNELS.values() if not hasattr(attention, kernel)]


@pytest.mark.parametrize("script", ["pack.sh", "kit/run.sh"])
def test_a_script_can_be_run(script):
    subprocess.run(["bash", "-n", str(FOLDER / script)], env=clean_environment(), check=True)
    assert os.access(FOLDER / script, os.X_OK)


def environment(tmp_path: Path) -> dict[str, str]:
    """The kit's environment, as on a new machine."""
    return rank_environment() | {
        "KIT": str(KIT),
        "SITE": str(tmp_path / "site"),
        "OUT": str(tmp_path / "out"),
        "PYTHON": sys.executable,
        "PYTHONDONTWRITEBYTECODE": "1",
        "RUN_FOLDER": str(tmp_path / "run"),
        "TMPDIR": str(tmp_path),
        "TRITON_CACHE_DIR": str(tmp_path / "triton"),
        "CUDA_VISIBLE_DEVICES": "",
    }


def run_part(part: str, tmp_path: Path) -> tuple[str, Path]:
    """Runs a part as run.sh does, on tiny sizes. Returns the part's log and the folder of its results."""
    command = ["bash", str(KIT / "run.sh"), "--smoke", part]
    done = subprocess.run(command, cwd=ROOT, env=environment(tmp_path), capture_output=True, text=True, timeout=300)
    with tarfile.open(tmp_path / "out" / "logs.tgz") as logs:
        log = logs.extractfile(f"./{part}.log").read().decode()
    output = f"{done.stdout}{done.stderr}\n{log[-8000:]}"
    assert f"=== {part}: exit 0" in done.stdout, output
    assert "FAILED" not in output, output
    return log, tmp_path / "out"


def test_check_finds_nothing_wrong(tmp_path):
    log, _ = run_part("check", tmp_path)
    assert log.count("\nok      ") + log.startswith("ok      ") == (KIT / "check.py").read_text().count("\n@probe(")
    assert "check: 0 failed" in log


def test_profile_measures_every_way(tmp_path):
    _, out = run_part("profile", tmp_path)
    measured = json.loads((out / "profile.json").read_text())
    assert set(measured) == {"gsa", "flash", "cudnn", "masked"}
    assert all(way["seconds"] > 0 for way in measured.values())


def test_table_measures_every_operation(tmp_path):
    _, out = run_part("table", tmp_path)
    measured = json.loads((out / "kernels.json").read_text())
    assert {row["name"] for row in measured["table"]} == {
        "select",
        "attend forward",
        "attend backward",
        "alignment, a quarter of the rows",
        "FLASH_ATTENTION forward",
        "FLASH_ATTENTION backward",
    }
    assert [row["name"] for row in measured["sweep"]] == ["FORWARD", "BACKWARD_QUERIES", "BACKWARD_KEYS"]
    assert len(measured["adam"]) == 2
    losses = [row["loss"] for row in measured["head"]]
    assert len(losses) == 2 and losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_train_saves_resumes_and_proves_it(tmp_path):
    log, out = run_part("train", tmp_path)
    assert "first run: exit 0" in log and "resumed run: exit 0" in log, log[-8000:]
    summary = (out / "train.txt").read_text()
    assert "'event': 'receipt', 'compared': 4, 'identical': True" in summary, summary
    assert [int(step) for step in re.findall(r"^step +(\d+) ", summary, re.MULTILINE)][-1] == 12
    assert "steps 12 to 12" in log, log[-4000:]  # training.doctor, whose exit code the script leaves aside
    assert (out / "metrics.jsonl").is_file() and not (tmp_path / "run").exists()


def test_ahead_compiles_without_a_gpu(tmp_path):
    """All of the host's code, and one kernel in twelve: all kernels would take minutes here."""
    pytest.importorskip("triton", reason=NO_TRITON)
    command = [sys.executable, str(KIT / "ahead.py"), "--jobs", "12", "--part", "0"]
    done = subprocess.run(command, cwd=ROOT, env=environment(tmp_path), capture_output=True, text=True, timeout=300)
    output = done.stdout + done.stderr
    assert done.returncode == 0 and "FAILED" not in output, output[-8000:]
    assert int(re.search(r"ahead 0: (\d+) kernels", output)[1]) > 0
