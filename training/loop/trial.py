"""One rank of a trial: `training.tune` starts one such process per rank to run a setting for a few optimizer steps.

Model, engine, kernels, data and loader are those of a training run; nothing is evaluated, saved or tracked. Each rank
writes its Outcome as a line of JSON to <folder>/rank_<r>.json. Exit code 0 when the setting ran, else 1.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict
from pathlib import Path

from gsa.attention.gated_sparse import AttentionStage
from gsa.files import write_atomically
from training.config import BatchPlan, RunConfig, load_config, plan_batch
from training.config.command import command_parser
from training.config.deepspeed import resolve_ds_config
from training.data.dataset import PackedTokens
from training.data.loader import Loader
from training.data.open import open_data
from training.engine.world import World, environment_rank, environment_world_size, exit_process
from training.loop.step import StepSums, forward_backward, sum_over_ranks
from training.loop.watchdog import Watchdog
from training.planning.memory_cap import memory_cap, peak_gib
from training.planning.outcome import Outcome, first_line, is_out_of_memory


def main(argv: Sequence[str]) -> int:
    args = _parse(argv)
    # make this process the first victim of the kernel's OOM killer, rather than the tuner or somebody else's process
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    try:
        outcome = run(args)
    except Exception as err:  # whatever an allocator or a library raises is the result of this setting
        traceback.print_exc()
        capped = args.memory_cap_gib is not None
        outcome = Outcome("out_of_memory" if is_out_of_memory(err, capped=capped) else "failed", first_line(err))
    path = args.folder / f"rank_{environment_rank()}.json"
    with write_atomically(path, durable=False) as file:
        file.write(json.dumps(asdict(outcome)).encode() + b"\n")
    return 0 if outcome.verdict == "ok" else 1


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = command_parser("loop.trial", __doc__)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--deepspeed_config", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="where the ranks write their outcomes")
    parser.add_argument("--steps", type=int, required=True, help="steps to time, after the untimed first ones")
    parser.add_argument("--memory_cap_gib", type=float, help="memory that a rank may hold")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser.parse_intermixed_args(argv)


def run(args: argparse.Namespace) -> Outcome:
    """Builds the run on this rank, under the memory cap, and times it."""
    cfg = load_config(args.config, args.overrides)
    plan = plan_batch(cfg.training, environment_world_size())
    ds_config = resolve_ds_config(args.deepspeed_config, cfg, plan, args.config)
    from training.engine.engine import start

    patience = cfg.training.hang_timeout_s
    world = start(timeout_s=max(600.0, 20 * patience))
    data, _ = open_data(cfg)
    cap = nullcontext() if args.memory_cap_gib is None else memory_cap(args.memory_cap_gib, world.device)
    with (
        Watchdog(
            args.folder, rank=world.rank, size=world.size, timeout_s=patience, launch=args.folder.name
        ) as watchdog,
        cap,
    ):
        return measure(Bench(cfg, ds_config, plan, world, data, watchdog), args.steps)


def measure(bench: Bench, steps: int) -> Outcome:
    """Times `steps` optimizer steps, after untimed ones in which kernels are compiled and state is allocated.

    The timed attention stage is the one that most of the run's steps have. The other one has to fit as well, so when
    the run has both, one untimed step of it comes first.
    """
    training = bench.cfg.training
    dense, total = min(training.indexer_warmup_steps, training.max_steps), training.max_steps
    timed, other = ("dense", "sparse") if dense > total - dense else ("sparse", "dense")
    try:
        if 0 < dense < total:
            bench.step(other, first=True)
        bench.step(timed, first=True)
        seconds = []
        for _ in range(steps):
            began = time.perf_counter()
            bench.step(timed, first=False)
            seconds.append(time.perf_counter() - began)
    finally:
        bench.close()
    peak, allocated = peak_gib(bench.world.device)
    return Outcome("ok", None, tuple(seconds), peak, allocated, bench.backend)


class Bench:
    """A run's engine and loader, and its optimizer step without logging, evaluating and saving."""

    def __init__(
        self, cfg: RunConfig, ds_config: dict, plan: BatchPlan, world: World, data: PackedTokens, watchdog: Watchdog
    ) -> None:
        self.cfg, self.plan, self.world, self.data, self.watchdog = cfg, plan, world, data, watchdog
        from training.engine.build import build_engine  # DeepSpeed takes seconds to import

        self.engine, self.backend, _ = build_engine(cfg, ds_config, world, init_from=None)
        self.loader = Loader(
            data,
            samples_consumed=0,
            plan=plan,
            rank=world.rank,
            num_workers=cfg.data.num_workers,
            pin_memory=world.device.type == "cuda",
        )
        self.steps_done = 0
        self.engine.train()
        gc.collect()
        gc.freeze()
        gc.disable()  # as in a run, which collects garbage between steps

    def step(self, stage: AttentionStage, *, first: bool) -> None:
        """One optimizer step with the trainer's one collective and one wait at its end.

        first: whether it is the first step of its stage. Such a step has the long timeout, since it compiles; and it
        probes and measures health if the run ever does, since both take memory.
        """
        cfg, plan = self.cfg.training, self.plan
        model = self.engine.module
        model.set_stage(stage)
        sums = forward_backward(
            self.engine,
            self.loader,
            cfg,
            plan,
            step=self.steps_done,
            probing=first and bool(cfg.probe_interval),
            n_targets=self.data.n_targets(self.steps_done * plan.global_batch_size, plan.global_batch_size),
            measuring=first and bool(cfg.health_interval),
            phase=lambda name: self.watchdog.beat("first step" if first else name),
            drop=self._wait_for_loss if cfg.on_spike == "skip" else None,
        )
        shared = {"means": sums.means(), "selection": sums.selection, "probes": sums.probes}
        if sums.updates is not None:
            shared["updates"] = sums.updates.squares().to(sums.selection)
        shared = sum_over_ranks(shared)
        model.update_v_ref(shared["selection"])
        shared["means"].tolist()
        self.engine.grad_norm()
        self.steps_done += 1

    @staticmethod
    def _wait_for_loss(sums: StepSums) -> bool:
        """Drops nothing, but waits as a run does that may drop an update: for the step's loss on all ranks."""
        sum_over_ranks({"means": sums.means()})["means"].tolist()
        return False

    def close(self) -> None:
        gc.enable()
        gc.unfreeze()
        self.loader.close()


if __name__ == "__main__":
    exit_process(main(sys.argv[1:]))
