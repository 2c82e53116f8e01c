"""Counts how often the host waits in one optimizer step of a real engine, at each ZeRO stage and accumulation.

    python tests/support/count_waits.py CONFIG.yaml [--keep_synchronize]

Prints JSON: {"<ZeRO stage>/<accumulation>": {kind of wait: count}}. Runs on one rank on the CPU, which stands in for a
device with streams: what DeepSpeed would order between streams or wait for on a GPU is counted. --keep_synchronize:
ZeRO 2 keeps DeepSpeed's own wait in each micro-batch.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from training.config import load_config, plan_batch
from training.config.deepspeed import resolve_ds_config
from training.data.loader import Loader
from training.data.open import open_data
from training.engine import engine as engine_module
from training.engine.build import build_engine
from training.engine.world import World
from training.loop.step import forward_backward

ROOT = Path(__file__).resolve().parents[2]


class Reads(TorchDispatchMode):
    """Counts reads of single numbers from tensors; on a GPU the host waits for each."""

    def __init__(self, found: Counter) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            self.found["numbers read"] += 1
        return func(*args, **(kwargs or {}))


class Stream:
    """Stands in for a CUDA stream; counts the streams that it is made to wait for."""

    def __init__(self, name: str, found: Counter) -> None:
        self.name, self._found = name, found

    def wait_stream(self, other: "Stream") -> None:  # noqa: UP037
        self._found[f"{self.name} waits for {other.name}"] += 1

    def wait_event(self, event: object) -> None: ...


def waits(accumulation: int, stage: int, config: Path, world: World) -> Counter:
    """Counts the waits of a new engine's third step: the first two allocate, and record the order of ZeRO 3's gathers.

    Uses the reference kernels: the chunked ones read the bounds of their chunks from tensors, which the Triton kernels
    for GPUs do not.
    """
    cfg = load_config(
        config,
        ["training.micro_batch_size=1", f"training.global_batch_size={accumulation}", "training.backend=reference"],
    )
    plan = plan_batch(cfg.training, 1)
    ds_config = resolve_ds_config(ROOT / "ds_configs" / f"zero{stage}.json", cfg, plan, config)
    engine = build_engine(cfg, ds_config, world, init_from=None).engine
    loader = Loader(open_data(cfg)[0], samples_consumed=0, plan=plan, rank=0, num_workers=1, pin_memory=False)

    def step(number: int) -> None:
        forward_backward(
            engine,
            loader,
            cfg.training,
            plan,
            step=number,
            n_targets=100,
            probing=True,
            measuring=True,
            phase=lambda name: None,
        )

    step(0)
    step(1)
    found: Counter = Counter()
    with ExitStack() as patches:
        replace = patch.object
        accelerator = engine_module.get_accelerator()
        patches.enter_context(replace(accelerator, "synchronize", lambda *_: found.update(["device waited for"])))
        if stage == 2:  # makes DeepSpeed take the path that it takes on a GPU
            patches.enter_context(replace(accelerator, "resolves_data_dependency", lambda: False))
            patches.enter_context(replace(accelerator, "current_stream", lambda *_: Stream("computing", found)))
            patches.enter_context(replace(engine._engine.optimizer, "reduction_stream", Stream("reducing", found)))
            patches.enter_context(replace(torch.Tensor, "record_stream", lambda *_: None))
        with Reads(found):
            step(2)
    loader.close()
    engine.destroy()
    return found


def main() -> None:
    world = engine_module.start(timeout_s=60)
    if "--keep_synchronize" in sys.argv:
        engine_module._order_streams_instead_of_syncing = lambda optimizer: None
    found = {f"{stage}/{n}": waits(n, stage, Path(sys.argv[1]), world) for stage in (1, 2, 3) for n in (1, 4)}
    print("WAITS " + json.dumps(found))


if __name__ == "__main__":
    main()
