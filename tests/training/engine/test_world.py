"""World.from_main: rank 0 alone runs a call, and all ranks get its result or its error."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from support.launching import ROOT, rank_environment

PROGRAM = """
import sys
import torch, torch.distributed as dist
from gsa.checkpoint.manifest import CheckpointError
from training.engine.world import World

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
world = World(rank, 2, rank, 2, torch.device("cpu"))
ran = []
print("got", world.from_main(lambda: ran.append(1) or {"a": [1]}), "ran", len(ran))
try:
    world.from_main(lambda: (_ for _ in ()).throw(CheckpointError("the disk is full")))
except CheckpointError as err:
    print("raised", err)
dist.destroy_process_group()
"""


def test_a_call_runs_on_rank_0_alone_and_its_result_or_error_reaches_all(tmp_path: Path):
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(rank), str(tmp_path / "meet")],
            cwd=ROOT,
            env=rank_environment(),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]
    printed = [rank.communicate(timeout=120)[0] for rank in ranks]
    for rank, text in enumerate(printed):
        assert f"got {{'a': [1]}} ran {1 - rank}" in text and "raised the disk is full" in text, text
