"""One setting, tried by every rank for a few optimizer steps: `training.tune` starts it, one process per rank.

Model, engine, kernels, data and loader are those of a run of training/train.py; nothing is evaluated, saved or
tracked. Each rank leaves one JSON line in <folder>/rank_<r>.json: its Outcome. Exit code 0 when the setting ran.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import resource
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Literal

import torch

from training.config import BatchPlan, RunConfig, load_config, plan_batch
from training.config.deepspeed import resolve_ds_config
from training.data import Loader, PackedTokens
from training.data.open import open_data
from training.engine.world import World, environment_rank, environment_world_size, exit_process
from training.loop.step import StepSums, forward_backward, sum_over_ranks
from training.loop.watchdog import Watchdog

GIB = 2**30

Verdict = Literal["ok", "out_of_memory", "failed"]
Stage = Literal["dense", "sparse"]

OUT_OF_MEMORY_WORDS = (
    "can't allocate memory",
    "cannot allocate memory",
    "out of memory",
    "bad_alloc",
    "alloc_failed",
    "memoryerror",
)
"""What allocators say: torch's on a CPU, the system, CUDA and NCCL, C++, cuBLAS; and what a reader thread passes on."""

STARVED_WORDS = ("resource temporarily unavailable", "can't start new thread", "terminate called")
"""What running out looks like under a cap only: a thread without room for its stack, and C++ not ready for that."""


@dataclass(frozen=True)
class Outcome:
    """How a trial ended. step_seconds: of the timed steps. peak_gib: the most that a rank held: resident memory on
    a CPU, what the allocator reserved on a GPU, where peak_allocated_gib is the tensors' part of it. printed: the end
    of what a rank that failed had to say."""

    verdict: Verdict
    reason: str | None = None
    step_seconds: tuple[float, ...] = ()
    peak_gib: float | None = None
    peak_allocated_gib: float | None = None
    backend: str | None = None
    printed: str | None = None

    @property
    def seconds(self) -> float:
        """Of a step, the median."""
        return median(self.step_seconds)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles of the steps, in seconds; 0 of a single step."""
        if len(self.step_seconds) == 1:
            return 0.0
        low, _, high = quantiles(self.step_seconds, n=4, method="inclusive")
        return (high - low) / 2


def main(argv: list[str]) -> int:
    args = _parse(argv)
    # when the machine itself runs out, the kernel shall end this process, not the tuner or a stranger
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    try:
        outcome = run(args)
    except Exception as err:  # whatever an allocator or a library throws is this setting's result
        traceback.print_exc()
        capped = args.memory_cap_gib is not None
        outcome = Outcome("out_of_memory" if is_out_of_memory(err, capped=capped) else "failed", said(err))
    path = args.folder / f"rank_{environment_rank()}.json"
    path.write_text(json.dumps(asdict(outcome)) + "\n", encoding="utf-8")
    return 0 if outcome.verdict == "ok" else 1


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="training.loop.trial",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--deepspeed_config", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="where the ranks leave their outcomes")
    parser.add_argument("--steps", type=int, required=True, help="steps to time, after the untimed first ones")
    parser.add_argument("--memory_cap_gib", type=float, help="what a rank may hold")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser.parse_intermixed_args(argv)


def run(args: argparse.Namespace) -> Outcome:
    """Builds on this rank what the arguments say, under the cap, and times it."""
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
    """The Outcome of `steps` timed steps, after untimed ones in which kernels compile and state is allocated.

    Timed is the stage that the run will be in for longest. A dense warm-up has to fit as well: it is run, untimed.
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
    """A run's engine and loader, and its step without what only a run needs."""

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
        self.done = 0
        self.engine.train()
        gc.collect()
        gc.freeze()
        gc.disable()  # a run collects between steps

    def step(self, stage: Stage, *, first: bool) -> None:
        """One optimizer step as Trainer takes it, with one collective and one wait at its end.

        first: of its stage. It may take long, for compilers; it probes and examines, where the run will.
        """
        cfg, plan = self.cfg.training, self.plan
        model = self.engine.module
        model.set_stage(stage)
        done = forward_backward(
            self.engine,
            self.loader,
            cfg,
            plan,
            step=self.done,
            probing=first and bool(cfg.probe_interval),
            n_targets=self.data.n_targets(self.done * plan.global_batch_size, plan.global_batch_size),
            measuring=first and bool(cfg.health_interval),
            phase=lambda name: self.watchdog.beat("first step" if first else name),
            drop=self._waits if cfg.on_spike == "skip" else None,
        )
        shared = {"means": done.means(), "selection": done.selection, "probes": done.probes}
        if done.updates is not None:
            shared["updates"] = done.updates.squares().to(done.selection)
        shared = sum_over_ranks(shared)
        model.update_v_ref(shared["selection"])
        shared["means"].tolist()
        self.engine.grad_norm()
        self.done += 1

    @staticmethod
    def _waits(done: StepSums) -> bool:
        """A run that may drop an update waits for the step's loss before it."""
        sum_over_ranks({"means": done.means()})["means"].tolist()
        return False

    def close(self) -> None:
        gc.enable()
        gc.unfreeze()
        self.loader.close()


# -- memory -----------------------------------------------------------------------------------------------


@contextmanager
def memory_cap(cap_gib: float, device: torch.device) -> Iterator[None]:
    """Within it, an allocation that would take this process beyond the cap raises. MemoryError: it is beyond already.

    On a CPU by RLIMIT_DATA, which counts private writable memory: what tensors, heaps and stacks are made of. Torch's
    allocator then raises as a GPU's does. RLIMIT_AS counts address space, which mapped files, libraries and the
    heaps that glibc reserves per thread fill without using memory, and RLIMIT_RSS is not enforced by Linux. What is
    held already counts in full, so the room left is the cap less the resident memory of now; pages of libraries that
    are touched later come on top (a peak of 0.95 GiB was seen under a cap of 0.9). The text's shards should be mapped
    before, as their whole length counts as data. Lifted at the end: to print what went wrong takes memory too.
    """
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap_gib * GIB / total), device)
        yield
        return
    held = status_bytes("VmRSS")
    room = int(cap_gib * GIB) - held
    if room <= 0:
        raise MemoryError(
            f"a rank holds {held / GIB:.2f} GiB before it has a model, more than --memory_cap_gib {cap_gib:g}"
        )
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (status_bytes("VmData") + room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def peak_gib(device: torch.device) -> tuple[float, float | None]:
    """The most that this process has held, and on a GPU the tensors' part of it: see Outcome."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / GIB, torch.cuda.max_memory_allocated(device) / GIB
    # not getrusage's ru_maxrss: it starts from what the process that started this one held
    return status_bytes("VmHWM") / GIB, None


def status_bytes(field: str) -> int:
    """A memory field of /proc/self/status, such as VmRSS."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)[1]) * 1024


def is_out_of_memory(err: BaseException, *, capped: bool) -> bool:
    """Whether an exception, or one that it came from, says that memory has run out. capped: under a memory cap."""
    if isinstance(err, (MemoryError, torch.OutOfMemoryError)):
        return True
    cause = err.__cause__ or err.__context__
    return says_out_of_memory(str(err), capped=capped) or (cause is not None and is_out_of_memory(cause, capped=capped))


def says_out_of_memory(text: str, *, capped: bool) -> bool:
    words = (*OUT_OF_MEMORY_WORDS, *STARVED_WORDS) if capped else OUT_OF_MEMORY_WORDS
    return any(word in text.lower() for word in words)


def said(err: BaseException) -> str:
    """An exception in one line, without the C++ frames that torch appends."""
    lines = [line for line in str(err).splitlines() if line.strip()]
    return f"{type(err).__name__}: {lines[0].strip()}" if lines else type(err).__name__


if __name__ == "__main__":
    exit_process(main(sys.argv[1:]))
