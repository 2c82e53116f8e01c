"""What the loop, ZeRO, the configuration and the loader add to a training step, as ratios measured in one run.

    python -m benchmarks.train_step [--ranks 2] [--parts overhead watching zero tuned] [--pairs 60] [--rounds 12]

overhead: the whole loop of Trainer.train against a bare `engine(batch); engine.backward(loss); engine.step()` with the
    same model, engine and micro-batches. The bare loop's micro-batches and their normalisation are prepared in memory,
    so that reading, counting targets and drawing rows for the alignment loss count as the loop's cost. The loss is the
    trainer's, `loss + indexer_loss_weight * indexer_loss`. Also the loader's share of the trainer's steps, from its
    metrics.
watching: steps that measure the indexer (training.probe_interval) or the gradient and the update
    (training.health_interval) against the plain step before each of them, in one run of the trainer.
zero: ZeRO 1 and 2 against torch's DistributedDataParallel with AdamW (in bf16 with float32 masters) on the same
    micro-batches, with clipping and schedule, as bare loops.
tuned: the tuned against the untuned configuration, and against the untuned one with the attention of the legacy layer
    (benchmarks/layers.py), as bare loops. On a CPU everything is scaled down: a small model, an eighth of the lengths
    and of the number of keys, a quarter of the accumulation.

On a CPU it starts `--ranks` processes with one thread each; on GPUs one process per GPU, with the 512M model.
model.adaptive_k is off: under `variance` a step ends with a collective that belongs to the model, which a bare loop
would lack. What is compared takes turns, A B B A, so that a busy machine slows all of it equally; ratios are computed
for each pair, with the 95 % interval of their median in brackets, by order statistics. CPU time is given with wall
time, since other work on the machine lengthens it less. Nothing is timed before the losses agree. Writes
benchmarks/results/train_step_<device>.{json,md}.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from benchmarks.comparing import Clocks, Ratio, Refused, in_turns, mean_loss, now, ratio, require_equal, spent_on
from benchmarks.layers import layer
from benchmarks.loops import Bare, Case, Micro, Plain, case_of, trainer_of
from benchmarks.measuring import RESULTS, certificate
from benchmarks.synthetic import write_dataset
from gsa import ModelConfig
from gsa.model import count_params
from training.config import DataConfig, RunConfig, TrainingConfig, load_config
from training.engine.world import World, exit_process
from training.record.metrics_log import read_rows

if TYPE_CHECKING:
    from training.loop.trainer import Step, Trainer

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("overhead", "watching", "zero", "tuned")
WARM = 3
"""Steps before anything is timed. They set up connections, kernels and optimizer state; their losses are compared."""
GOAL_OVERHEAD, GOAL_DATA = 0.02, 0.005
CLOCKS = {"wall_s": "wall time", "cpu_s": "CPU time of rank 0"}

CPU_MODEL = ModelConfig(
    d_model=192,
    n_layers=3,
    n_heads=6,
    n_kv_heads=2,
    d_ffn=512,
    vocab_size=4096,
    max_position_embeddings=256,
    d_indexer=32,
    n_indexer_heads=4,
    k_base=64,
    k_min=16,
    k_max=128,
    adaptive_k="off",
)
CPU_LENGTH = 256


# -- the parts -------------------------------------------------------------------------------------------


class _Enough(Exception):
    """Raised to leave Trainer.train when all pairs are timed."""


class Interleaved:
    """Replaces Trainer._train_step: a bare loop takes turns with the trainer's steps.

    A turn of the trainer lasts from the beginning of one step to the beginning of the next, so that it includes all
    that the loop does between steps. Turn i of both sides is a pair; the order is A B B A.
    """

    def __init__(
        self, trainer: Trainer, bare: Bare, micros: list[list[Micro]], pairs: int, steps: int, tolerance: float
    ) -> None:
        self._step, self._bare, self._micros, self._world = trainer._train_step, bare, micros, trainer.world
        self._pairs, self._steps = pairs, steps
        self._tolerance = tolerance
        self.rows: list[dict] = []
        self.ours: list[Clocks] = []
        self.theirs: list[Clocks] = []
        self.apart = math.nan

    def __call__(self) -> Step:
        timed = len(self.rows) - WARM
        if timed == 0:
            self._compare()
        if timed >= 0 and timed % self._steps == 0:
            self._between_turns(timed // self._steps)
        step = self._step()
        self.rows.append(step.row)
        return step

    def _compare(self) -> None:
        theirs = [mean_loss(self._bare.step(micros), self._world) for micros in self._micros[:WARM]]
        ours = [row["loss"] for row in self.rows]
        self.apart = require_equal("the trainer", ours, theirs, later=self._tolerance)

    def _between_turns(self, done: int) -> None:
        if done:
            self.ours.append(now(self._world).since(self._began))
        if done % 2:
            for turn in (done - 1, done):
                first = WARM + turn * self._steps
                micros = self._micros[first : first + self._steps]
                self.theirs.append(spent_on(lambda: [self._bare.step(m) for m in micros], self._world))  # noqa: B023
        if done == self._pairs:
            raise _Enough
        self._world.barrier()
        self._began = now(self._world)


def compared(ours: Sequence[Clocks], theirs: Sequence[Clocks]) -> dict:
    """By either clock: both sides' seconds, and their ratio."""
    found = {}
    for clock in CLOCKS:
        a, b = ([getattr(turn, clock) for turn in side] for side in (ours, theirs))
        found[clock] = {"ours": a, "theirs": b, "ratio": asdict(ratio(a, b))}
    return found


def overhead(case: Case, folder: Path, pairs: int, steps: int) -> dict:
    """The trainer against the bare loop at ZeRO 2. pairs: of turns of `steps` steps; even."""
    micros = case.micros(WARM + pairs * steps)
    with trainer_of(case, 2, folder / "run") as trainer:
        bare = Bare(case, 2)
        turns = Interleaved(trainer, bare, micros, pairs, steps, case.tolerance)
        with patch.object(trainer, "_train_step", turns):
            try:
                reason = trainer.train()
                raise RuntimeError(f"the trainer ended ({reason}) after {len(turns.ours)} of {pairs} pairs")
            except _Enough:
                pass
        bare.close()
    rows = turns.rows[WARM:]
    return {
        **compared(turns.ours, turns.theirs),
        "steps_per_turn": steps,
        "losses_apart": turns.apart,
        "seconds": [row["seconds"] for row in rows],
        "seconds_data": [row["seconds_data"] for row in rows],
        "seconds_other": [row["seconds_other"] for row in rows],
    }


WATCHED = {"probe_interval": "indexer measured", "health_interval": "norms by part and updates measured"}


def watching(case: Case, folder: Path, pairs: int) -> dict:
    """Times measuring steps against the plain steps before them: one run for each of WATCHED, at ZeRO 2."""
    found = {}
    for key in WATCHED:
        intervals = {**dict.fromkeys(WATCHED, 0), key: 2, "max_steps": 2 * (WARM + pairs)}
        cfg = replace(case.cfg, training=replace(case.cfg.training, **intervals))
        with trainer_of(replace(case, cfg=cfg), 2, folder / key) as trainer:
            trainer.train()
        if not case.world.is_main:
            continue
        seconds = [row["seconds"] for row in read_rows(folder / key / "metrics.jsonl") if "loss" in row][2 * WARM :]
        every = getattr(TrainingConfig(), key)
        found[key] = {"ratio": asdict(ratio(seconds[1::2], seconds[::2])), "every": every}
    return found


def zero(case: Case, rounds: int) -> dict:
    """Times bare loops at ZeRO 1 and 2 against data-parallel training."""
    ways = {"data-parallel": Plain(case), "ZeRO 1": Bare(case, 1), "ZeRO 2": Bare(case, 2)}
    micros = case.micros(WARM + rounds)
    curves = {name: [mean_loss(way.step(m), case.world) for m in micros[:WARM]] for name, way in ways.items()}
    plain = curves["data-parallel"]
    apart = {name: require_equal(name, curves[name], plain, later=case.tolerance) for name in ("ZeRO 1", "ZeRO 2")}
    turns = {name: lambda number, way=way: way.step(micros[WARM + number]) for name, way in ways.items()}
    spent = in_turns(turns, rounds, case.world)
    for way in ways.values():
        way.close()
    plain = spent["data-parallel"]
    return {name: compared(spent[name], plain) | {"losses_apart": apart[name]} for name in ("ZeRO 1", "ZeRO 2")}


def tuned(tuned_case: Case, untuned_case: Case, rounds: int) -> dict:
    """Tokens per second of the tuned configuration over the untuned one's, without the naive layer and with it."""
    cases = {"tuned": tuned_case, "untuned": untuned_case, "untuned, naive gather": untuned_case}
    loops = {name: Bare(case, 2) for name, case in cases.items()}
    # the micro-batches of one step: their content does not change the time
    micros = {name: case.micros(1)[0] for name, case in cases.items()}

    def step(name: str) -> list[Tensor]:
        with layer("naive_gather") if "naive" in name else nullcontext():
            return loops[name].step(micros[name])

    curves = {name: [mean_loss(step(name), cases[name].world) for _ in range(2)] for name in cases}
    # only the first step: later losses differ where keys of almost equal score were chosen differently
    first = {name: curve[:1] for name, curve in curves.items()}
    naive, own = first["untuned, naive gather"], first["untuned"]
    apart = require_equal("the naive gather", naive, own, first=untuned_case.tolerance)
    spent = in_turns({name: lambda number, name=name: step(name) for name in cases}, rounds, tuned_case.world)
    for loop in loops.values():
        loop.close()
    per_token = {
        name: [Clocks(s.wall_s / case.tokens_per_step, s.cpu_s / case.tokens_per_step) for s in spent[name]]
        for name, case in cases.items()
    }
    # seconds per token of the other over ours equals tokens per second of ours over the other's
    return {
        name: compared(per_token[name], per_token["tuned"]) | {"shape": case.shape, "losses_apart": apart}
        for name, case in cases.items()
    }


# -- configurations --------------------------------------------------------------------------------------


def cpu_config(data_dir: Path, *, micro_batch_size: int, accumulation: int, length: int) -> RunConfig:
    return RunConfig(
        CPU_MODEL,
        TrainingConfig(
            micro_batch_size=micro_batch_size,
            gradient_accumulation_steps=accumulation,
            max_seq_len=length,
            precision="fp32",
            max_steps=10**6,
            warmup_steps=100,
            eval_interval=0,
            save_interval=0,
        ),
        DataConfig(str(data_dir)),
    )


def gpu_config(name: str, data_dir: Path, *, micro_batch_size: int, accumulation: int, ranks: int) -> RunConfig:
    return load_config(
        ROOT / "training" / "configs" / f"{name}.yaml",
        [
            f"data.data_dir={data_dir}",
            "logging.wandb=false",
            "model.adaptive_k='off'",
            f"training.micro_batch_size={micro_batch_size}",
            f"training.gradient_accumulation_steps={accumulation}",
            f"training.global_batch_size={micro_batch_size * accumulation * ranks}",
            "training.eval_interval=0",
            "training.save_interval=0",
            "training.indexer_warmup_steps=0",
        ],
    )


def cases_of(world: World, data_dir: Path) -> tuple[Case, Case, Case]:
    """(for overhead and zero, tuned, untuned)."""
    if world.device.type == "cuda":
        low_memory = "pretrain_512m_low_memory"
        configs = (
            gpu_config(low_memory, data_dir, micro_batch_size=8, accumulation=2, ranks=world.size),
            gpu_config(low_memory, data_dir, micro_batch_size=8, accumulation=8, ranks=world.size),
            gpu_config("pretrain_512m_untuned", data_dir, micro_batch_size=1, accumulation=64, ranks=world.size),
        )
    else:
        configs = (
            cpu_config(data_dir, micro_batch_size=4, accumulation=2, length=CPU_LENGTH),
            cpu_config(data_dir, micro_batch_size=8, accumulation=2, length=CPU_LENGTH),
            cpu_config(data_dir, micro_batch_size=1, accumulation=16, length=CPU_LENGTH // 2),
        )
    main, with_tuned, with_untuned = (case_of(cfg, world) for cfg in configs)
    return main, with_tuned, with_untuned


def make_data(folder: Path, on_gpu: bool) -> None:
    """Writes documents of 1/8 to 2 windows, so that windows are packed as in real text."""
    length, vocab_size, windows = (2048, 151936, 2000) if on_gpu else (CPU_LENGTH, CPU_MODEL.vocab_size, 2000)
    random = np.random.Generator(np.random.PCG64(1))
    write_dataset(folder, random.integers(length // 8, 2 * length, windows), vocab_size=vocab_size)


# -- running ---------------------------------------------------------------------------------------------


def launch(ranks: int, argv: Sequence[str]) -> int:
    """Runs this benchmark on `ranks` processes; returns the exit code."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    if not torch.cuda.is_available():
        environment |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
    command += ["--master_port", str(port), "-m", "benchmarks.train_step", *argv]
    return subprocess.run(command, cwd=ROOT, env=environment).returncode


def measure(args: argparse.Namespace, world: World, folder: Path) -> dict:
    on_gpu = world.device.type == "cuda"
    if world.is_main:
        make_data(folder / "data", on_gpu)
    world.barrier()
    case, tuned_case, untuned_case = cases_of(world, folder / "data")
    pairs = args.pairs + args.pairs % 2
    found: dict = {"load_before": os.getloadavg(), "shape": case.shape}
    if "overhead" in args.parts:
        found["overhead"] = overhead(case, folder, pairs, steps=3 if on_gpu else 1)
    if "watching" in args.parts:
        found["watching"] = watching(case, folder, pairs)
    if "zero" in args.parts:
        found["zero"] = zero(case, args.rounds)
    if "tuned" in args.parts:
        found["tuned"] = tuned(tuned_case, untuned_case, max(2, args.rounds // 2))
    return found | {"load_after": os.getloadavg()}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.train_step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, help="processes (default: one per GPU, 2 on a CPU)")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument(
        "--pairs", type=int, default=60, help="pairs of turns of the part overhead (default: %(default)s)"
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=12,
        help="rounds of the part zero; tuned takes half as many (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    if "RANK" not in os.environ:
        return launch(args.ranks or torch.cuda.device_count() or 2, argv)

    from training.engine.engine import start

    world = start(timeout_s=600)
    with tempfile.TemporaryDirectory() as own:
        folder = Path(world.broadcast(own))
        try:
            found = measure(args, world, folder)
        except Refused as err:  # raised on all ranks, since losses are means over the ranks
            if world.is_main:
                print(f"error: {err}", file=sys.stderr, flush=True)
            world.barrier()
            return 1
        if world.is_main:
            write(argv, found, world)
        world.barrier()  # rank 0 deletes the folder that all ranks use
    return 0


# -- report ----------------------------------------------------------------------------------------------


def write(argv: list[str], found: dict, world: World) -> None:
    on_gpu = world.device.type == "cuda"
    birth = certificate("train_step", argv)
    path = RESULTS / result_name([part for part in PARTS if part in found], on_gpu)
    text = report(birth, found, world)
    print(text)
    path.with_suffix(".md").write_text(text)
    path.with_suffix(".json").write_text(json.dumps({"birth": birth, "ranks": world.size, **found}, indent=1) + "\n")


def result_name(parts: Sequence[str], on_gpu: bool) -> str:
    """The name of the result files. A call that measures some parts only writes files of its own."""
    name = f"train_step_{'cuda' if on_gpu else 'cpu'}"
    return name if tuple(parts) == PARTS else "_".join([name, *parts])


def report(birth: str, found: dict, world: World) -> str:
    before, after = (", ".join(f"{x:.1f}" for x in found[key]) for key in ("load_before", "load_after"))
    model = "The 512M model" if world.device.type == "cuda" else f"{count_params(CPU_MODEL)['total']:,} parameters"
    sections = [
        "# What the trainer adds to a training step",
        f"{birth}\n{world.size} rank(s), {torch.get_num_threads()} thread(s) each. {model}, adaptive_k off; "
        f"{found['shape']} unless stated otherwise.\nLoad of the machine over 1, 5, 15 minutes: {before} before, "
        f"{after} after (this benchmark included).",
    ]
    reports = {"overhead": report_overhead, "watching": report_watching, "zero": report_zero, "tuned": report_tuned}
    sections += [report_part(found[part]) for part, report_part in reports.items() if part in found]
    return "\n\n".join(sections) + "\n"


def met(good: bool) -> str:
    return "met" if good else "missed"


def report_overhead(part: dict) -> str:
    per_turn = part["steps_per_turn"]
    rows = []
    for clock, words in CLOCKS.items():
        r = Ratio(**part[clock]["ratio"])
        ours, theirs = (statistics.median(part[clock][side]) / per_turn for side in ("ours", "theirs"))
        within = "too few pairs" if r.interval is None else " to ".join(f"{end - 1:+.2%}" for end in r.interval)
        rows.append(f"| {words} | {ours:.4f} | {theirs:.4f} | {r.median - 1:+.2%} [{within}] | {r.of_sums - 1:+.2%} |")
    found = Ratio(**part["wall_s"]["ratio"]).median - 1
    data = sum(part["seconds_data"]) / sum(part["seconds"])
    other = statistics.median(part["seconds_other"])
    return f"""## The loop

Trainer against `engine(batch); engine.backward(loss); engine.step()`, ZeRO 2, {len(part["wall_s"]["ours"])} pairs of
{per_turn} step(s). Losses of the first {WARM} steps: {part["losses_apart"]:.1e} apart.

| | trainer, s per step | bare loop | overhead | of all steps together |
|---|---|---|---|---|
{chr(10).join(rows)}

Goal: at most {GOAL_OVERHEAD:.0%} of wall time: {met(found <= GOAL_OVERHEAD)}.
Waiting for data: {data:.3%} of the steps' seconds. Goal: under {GOAL_DATA:.1%}: {met(data < GOAL_DATA)}.
After the last micro-batch: {other * 1e3:.1f} ms (median)."""


def report_watching(part: dict) -> str:
    rows = []
    for key, words in WATCHED.items():
        r, every = Ratio(**part[key]["ratio"]), part[key]["every"]
        rows.append(f"| {words} | {r} | {every} | {(r.median - 1) / every:+.2%} |")
    return f"""## What measuring costs

Measuring steps against the plain step before each of them, {Ratio(**part["probe_interval"]["ratio"]).pairs} pairs.

| | wall time, relative to a plain step | every N steps by default | share of a run's time |
|---|---|---|---|
{chr(10).join(rows)}"""


def report_zero(part: dict) -> str:
    plain = next(iter(part.values()))
    cells = [f"{statistics.median(plain[clock]['theirs']):.3f} | 1" for clock in CLOCKS]
    rows = [f"| data-parallel | {' | '.join(cells)} | |"]
    for name, found in part.items():
        cells = [
            cell
            for clock in CLOCKS
            for cell in (f"{statistics.median(found[clock]['ours']):.3f}", str(Ratio(**found[clock]["ratio"])))
        ]
        rows.append(f"| {name} | {' | '.join(cells)} | {found['losses_apart']:.1e} |")
    return f"""## ZeRO

Against DistributedDataParallel and AdamW, bare loops, {len(plain["wall_s"]["ours"])} rounds.

| | wall s per step | to data-parallel | CPU s per step | to data-parallel | losses apart |
|---|---|---|---|---|---|
{chr(10).join(rows)}"""


def report_tuned(part: dict) -> str:
    rows = []
    for name, found in part.items():
        rate = 1 / statistics.median(found["wall_s"]["ours"])
        gains = [str(Ratio(**found[clock]["ratio"])) if name != "tuned" else "1" for clock in CLOCKS]
        rows.append(f"| {name} | {found['shape']} | {rate:,.0f} | {' | '.join(gains)} |")
    apart = part["untuned, naive gather"]["losses_apart"]
    return f"""## Tuned against untuned

Bare loops at ZeRO 2, {len(part["tuned"]["wall_s"]["ours"])} rounds. Losses with the naive gather and without it:
{apart:.1e} apart.

| configuration | micro-batch | tokens/s, median | tuned over this, tokens per wall second | per CPU second |
|---|---|---|---|---|
{chr(10).join(rows)}"""


if __name__ == "__main__":
    exit_process(main(sys.argv[1:]))
