"""Starts ranks for tests. The first engine of a process takes seconds, so one launch runs many cases."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Case:
    """One launch of a training run: the arguments of training/train.py, and the expected exit code.

    rank_1: arguments that only rank 1 is given. rank_1_cwd: the working directory of rank 1, where relative paths lead
    elsewhere. patches: values of module attributes, by dotted name, on every rank while the case runs.
    """

    name: str
    argv: tuple[str, ...]
    code: int = 0
    rank_1: tuple[str, ...] = ()
    rank_1_cwd: str | None = None
    patches: dict[str, object] = field(default_factory=dict)


_AT_START = dict(os.environ)
"""conftest.py imports this module before the first test runs."""

_LEFTOVERS = re.compile(
    r"(WANDB|TORCHELASTIC|MASTER|OMPI|PMI|PMIX|SLURM|MV2)_.*"
    r"|((LOCAL|GROUP|ROLE|CROSS|NODE)_)?(RANK|WORLD_SIZE|SIZE)|GROUP_WORLD_SIZE|ROLE_NAME"
    r"|DS_ACCELERATOR|TRITON_INTERPRET"
)
"""Variables by which a process is a rank of a launch, or uses a wandb service, or interprets Triton kernels."""


def clean_environment() -> dict[str, str]:
    """The environment for a child process of a test.

    It is the environment of the shell that started pytest. Variables that tests, fixtures and libraries have set since
    then are not passed on, nor are variables of wandb, of a distributed launch and of Triton's interpreter.
    """
    return {name: value for name, value in _AT_START.items() if not _LEFTOVERS.fullmatch(name)}


_PORTS_EACH = 2000
_ports = itertools.count(os.getpid())


def free_port() -> int:
    """A free port for a launch, which binds it only seconds later.

    Each pytest worker has its own range of ports, below the range from which the system assigns ports: one of those
    could be assigned to another process in the meantime.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    while True:
        port = 12_000 + worker % 8 * _PORTS_EACH + next(_ports) % _PORTS_EACH
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port


def rank_environment() -> dict[str, str]:
    """clean_environment() for a process that trains: on the CPU, with one thread, without W&B."""
    return {
        **clean_environment(),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PYTHONWARNINGS": "ignore",
        "PYTHONPATH": str(ROOT),
        "WANDB_MODE": "disabled",
    }


def run_cases(ranks: int, cases: Sequence[Case], folder: Path, *, timeout_s: float = 900, cwd: Path = ROOT) -> str:
    """Runs the cases one after another on the same `ranks` processes in `cwd`; returns what they printed.

    AssertionError with the end of the output unless each case ends with its expected exit code.
    """
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / f"cases_{ranks}.json"
    script.write_text(json.dumps([asdict(case) for case in cases]))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        str(ranks),
        "--master_port",
        str(free_port()),
        str(ROOT / "tests" / "support" / "run_cases_on_rank.py"),
        str(script),
    ]
    done = subprocess.run(command, cwd=cwd, env=rank_environment(), capture_output=True, text=True, timeout=timeout_s)
    output = done.stdout + done.stderr
    assert done.returncode == 0, f"{ranks} ranks:\n{output[-12000:]}"
    return output


def start_training(
    ranks: int, argv: Sequence[str], *, launcher: str = "deepspeed", env: dict[str, str] | None = None
) -> subprocess.Popen:
    """Starts training/train.py under a real launcher in a new session; stdout and stderr are one pipe."""
    if launcher == "python":
        head = [sys.executable]
    elif launcher == "deepspeed":
        head = [
            str(Path(sys.executable).with_name("deepspeed")),
            "--num_gpus",
            str(ranks),
            "--master_port",
            str(free_port()),
        ]
    else:
        head = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            str(ranks),
            "--master_port",
            str(free_port()),
        ]
    return subprocess.Popen(
        [*head, "training/train.py", *argv],
        cwd=ROOT,
        env={**rank_environment(), **(env or {})},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def start_ranks(argvs: Sequence[Sequence[str]], env: dict[str, str] | None = None) -> list[subprocess.Popen]:
    """Starts training/train.py once for each of `argvs`, as ranks without a launcher: none ends the others."""
    together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(len(argvs))}
    return [
        subprocess.Popen(
            [sys.executable, "training/train.py", *argv],
            cwd=ROOT,
            env={**rank_environment(), **together, "RANK": str(rank), "LOCAL_RANK": str(rank), **(env or {})},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank, argv in enumerate(argvs)
    ]


def train_alone(argv: Sequence[str], *, timeout_s: float = 400) -> subprocess.CompletedProcess:
    """Runs training/train.py under plain python, on one rank."""
    return subprocess.run(
        [sys.executable, "training/train.py", *argv],
        cwd=ROOT,
        env=rank_environment(),
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
