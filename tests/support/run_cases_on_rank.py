"""Runs the cases of launching.run_cases on this rank, with real engines and one process group."""

import gc
import json
import os
import sys
import traceback
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

from training.engine.engine import start
from training.engine.world import exit_process
from training.loop.preflight import prepare
from training.loop.run import run
from training.train import parse


def main() -> int:
    cases = json.loads(Path(sys.argv[1]).read_text())
    world = start(timeout_s=120)
    freeze, gc.freeze, gc.unfreeze = gc.freeze, lambda: None, lambda: None  # runs may not freeze objects themselves
    home = os.getcwd()
    for case in cases:
        # Every start of an engine and every run collects garbage. Freezing keeps these collections from walking all
        # that the first case has imported; little else is left of the last case.
        gc.collect()
        freeze()
        argv = [*case["argv"], *(case["rank_1"] if world.rank == 1 else ())]
        os.chdir((case["rank_1_cwd"] if world.rank == 1 else None) or home)
        patches = ExitStack()
        for name, value in case["patches"].items():
            patches.enter_context(mock.patch(name, value))
        try:
            prepared = prepare(parse(argv))
        except Exception:
            print(f"case {case['name']}:\n{traceback.format_exc()}", flush=True)
            return 1
        code = run(prepared, world)
        patches.close()
        if code != case["code"]:
            print(f"case {case['name']}: rank {world.rank} ended with {code}, expected {case['code']}", flush=True)
            return 1
    world.leave()
    return 0


if __name__ == "__main__":
    exit_process(main())
