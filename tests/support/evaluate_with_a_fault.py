"""Runs cases on this rank, as run_cases_on_rank.py does, with a fault in the middle of an evaluation, or of a step.

Arguments: the folder of the cases, and a json list of [name, fault, argv of training/train.py, exit code].
"""

import json
import os
import signal
import sys
from pathlib import Path

from training.data.dataset import PackedTokens
from training.engine.engine import start
from training.engine.world import exit_process
from training.loop import trainer
from training.loop.preflight import prepare
from training.loop.run import run
from training.train import parse

BATCH = PackedTokens.batch
world = start(timeout_s=120)


def faulty(fault: str, counts: list[int]):
    """A `batch` whose third one does what `fault` says, on rank 1."""

    def batch(self, samples):
        if self.split == "held_out":
            counts.append(1)
            if len(counts) == 3 and world.rank == 1:
                if fault == "memory":
                    raise MemoryError("out of memory in the evaluation")
                if fault == "signal":
                    os.kill(os.getpid(), signal.SIGTERM)
        return BATCH(self, samples)

    return batch


def broken(*args: object, **options: object) -> None:
    raise ZeroDivisionError("a bug on one rank")


def main() -> int:
    for name, fault, argv, code in json.loads(Path(sys.argv[1]).read_text()):
        prepared, counts = prepare(parse(argv)), []
        PackedTokens.batch = faulty(fault, counts)
        if fault == "code" and world.rank == 1:
            trainer.reduce_step = broken
        ended = run(prepared, world)
        PackedTokens.batch = BATCH
        print(f"{name}: rank {world.rank} ended with {ended} after {len(counts)} batches", flush=True)
        if ended != code:
            return 1
    return 0  # the last case has broken the process group


exit_process(main())
