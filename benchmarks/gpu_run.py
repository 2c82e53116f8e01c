"""The 512M configuration on one GPU with the work of one GPU of four: real runs of training/train.py, one by one.

    python -m benchmarks.gpu_run [--runs tuned untuned ...] [--seconds 60] [--smoke]

tuned: training/configs/pretrain_512m_low_memory.yaml unchanged, micro-batch 8 x 2048, accumulation 8, ZeRO 2 on one
    rank, sparse stage.   untuned: pretrain_512m_untuned.yaml, 1 x 1024, accumulation 64.
naive: untuned, with the attention of the legacy layer (benchmarks/layers.py), which needs adaptive_k off.
dense: tuned, with model.sparse=false.   flash: dense, on torch's fused attention.
recomputed: tuned, with training.gradient_checkpointing.   compiled: tuned, with training.compile.

The text is random tokens in documents of whole windows, so that every window is one document: this is the most work
that a window can be, and it is the same for every run. A run is measured for at least `--seconds` after its first
steps, from its metrics.jsonl, and is then killed, since its checkpoint is not needed. Results of earlier calls at the
same commit on the same kind of GPU stay in the table, so that one call may measure a part of it. Writes
benchmarks/results/run_cuda.{json,md}; exit code 1 when a run failed. --smoke: a tiny model in float32, on any device, a
few steps per run; prints the table and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch

from benchmarks.layers import Layer
from benchmarks.measuring import RESULTS, certificate, commit
from benchmarks.synthetic import write_dataset
from training.config import RunConfig, load_config, plan_batch
from training.observe.telemetry import SETTLED
from training.planning.devices import DEVICES, Device, find_device
from training.planning.options import Option, Request
from training.record.metrics_log import read_rows

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "training" / "configs"
ZERO2, ZERO2_PCIE = (ROOT / "ds_configs" / name for name in ("zero2.json", "zero2_pcie.json"))
LIMIT_S = 300.0
"""Time for a run to reach its first steps, in addition to `--seconds`."""
PER_GPU = {"training.global_batch_size": 64}
"""A quarter of the global batch of both configurations: the share of one of four GPUs."""
QUIET = {
    "logging.wandb": "false",
    "training.eval_interval": 0,
    "training.save_interval": 0,
    "training.indexer_warmup_steps": 0,
}
TINY = {
    "model.d_model": 64,
    "model.n_layers": 2,
    "model.n_heads": 4,
    "model.n_kv_heads": 2,
    "model.d_ffn": 128,
    "model.vocab_size": 512,
    "model.d_indexer": 16,
    "model.k_base": 16,
    "model.k_min": 4,
    "model.k_max": 32,
    "training.precision": "fp32",
}
"""The model of --smoke."""
SMOKE_SHRINK = 32
"""With --smoke, windows are this many times shorter."""
SMOKE_SECONDS = 1.0
DATA_TOKENS = 2**24


@dataclass(frozen=True)
class Run:
    """One run: a yaml of training/configs/, overrides, and the attention layer when it is not the trainer's own."""

    config: str
    changes: dict[str, object]
    layer: Layer | None = None


TUNED, UNTUNED = "pretrain_512m_low_memory.yaml", "pretrain_512m_untuned.yaml"
RUNS = {
    "tuned": Run(TUNED, {}),
    "untuned": Run(UNTUNED, {}),
    "naive": Run(UNTUNED, {"model.adaptive_k": "'off'"}, "naive_gather"),
    "dense": Run(TUNED, {"model.sparse": "false"}),
    "flash": Run(TUNED, {"model.sparse": "false"}, "flash"),
    "recomputed": Run(TUNED, {"training.gradient_checkpointing": "true"}),
    "compiled": Run(TUNED, {"training.compile": "true"}),
}


@dataclass(frozen=True)
class Measured:
    """Medians over the steady steps, except the peak memory. utilisation: share of time, None without NVML.

    memory_gib: tensors at the peak. predicted_gib, predicted_s: from the plan, None where there was no prediction.
    """

    shape: str
    steps: int
    steady_s: float
    tokens_per_s: float
    seconds: float
    mfu: float
    utilisation: float | None
    power_w: float | None
    memory_gib: float
    predicted_gib: float | None
    predicted_s: float | None
    seconds_data: float
    throttled: float | None


class RunFailed(RuntimeError):
    """A run ended early or was too slow; the message has the last lines that it printed."""


# -- one run ---------------------------------------------------------------------------------------------


def overrides(run: Run, data_dir: Path, smoke: bool) -> list[str]:
    changes = PER_GPU | QUIET | run.changes | {"data.data_dir": data_dir}
    if smoke:
        length = load_config(CONFIGS / run.config, []).training.max_seq_len // SMOKE_SHRINK
        changes |= TINY | {"training.max_seq_len": length}
    return [f"{key}={value}" for key, value in changes.items()]


def command_of(run: Run, folder: Path, given: Sequence[str]) -> list[str]:
    entry = ["training/train.py"] if run.layer is None else ["-m", "benchmarks.layers", run.layer]
    config = ["--config", str(CONFIGS / run.config), "--deepspeed_config", str(ZERO2), "--output_dir", str(folder)]
    return [sys.executable, *entry, *config, *given]


def measure(run: Run, folder: Path, data_dir: Path, seconds: float, smoke: bool) -> Measured:
    """Starts the run, waits for its steady steps and kills it. Raises RunFailed."""
    given = overrides(run, data_dir, smoke)
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    log = folder.with_suffix(".log")
    with open(log, "w") as out:
        process = subprocess.Popen(
            command_of(run, folder, given),
            cwd=ROOT,
            env=environment,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        rows = steady_rows(process, folder / "metrics.jsonl", log, seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    cfg = load_config(CONFIGS / run.config, given)
    return summary(cfg, rows, read_rows(folder / "metrics.jsonl"))


def steady_rows(process: subprocess.Popen, metrics: Path, log: Path, seconds: float) -> list[dict]:
    """Rows of the steps after the first SETTLED ones; waits until they add up to `seconds`. Raises RunFailed."""
    deadline = time.monotonic() + seconds + LIMIT_S
    while True:
        time.sleep(0.2)
        ended = process.poll() is not None
        rows = [row for row in read_rows(metrics) if "loss" in row and row["step"] > SETTLED]
        if sum(row["seconds"] for row in rows) >= seconds and len(rows) > 1:
            return rows
        if ended or time.monotonic() > deadline:
            what = f"ended with {process.returncode}" if ended else f"took more than {seconds + LIMIT_S:.0f} s"
            end = "".join(log.read_text(errors="replace").splitlines(keepends=True)[-15:])
            raise RunFailed(f"{what} after {len(rows)} steady steps; the end of its log:\n{end}")


def summary(cfg: RunConfig, rows: Sequence[dict], everything: Sequence[dict]) -> Measured:
    def middle(field: str) -> float | None:
        found = [row[field] for row in rows if field in row]
        return median(found) if found else None

    predicted = next((row for row in everything if row.get("event") == "predicted"), {})
    plan = plan_batch(cfg.training, 1)
    return Measured(
        shape=f"{plan.micro_batch_size} x {cfg.training.max_seq_len}, {plan.accumulation_steps}",
        steps=len(rows),
        steady_s=sum(row["seconds"] for row in rows),
        tokens_per_s=middle("tokens_per_s"),
        seconds=middle("seconds"),
        mfu=middle("mfu"),
        utilisation=middle("gpu/0/utilisation"),
        power_w=middle("gpu/0/power_w"),
        memory_gib=max(row["memory_gib"] for row in rows),
        predicted_gib=predicted.get("memory_gib"),
        predicted_s=predicted.get("seconds"),
        seconds_data=sum(row["seconds_data"] for row in rows),
        throttled=middle("gpu/0/throttled"),
    )


# -- report ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Goal:
    """A goal for a measured value. value: None where no run measured it."""

    words: str
    value: float | None
    bound: float
    at_least: bool = True
    form: str = ".2f"

    def __str__(self) -> str:
        if self.value is None:
            return f"| {self.words} | not measured | |"
        met = self.value >= self.bound if self.at_least else self.value <= self.bound
        return f"| {self.words} | {self.value:{self.form}} | {'met' if met else 'missed'} |"


def goals(runs: dict[str, Measured]) -> list[Goal]:
    tuned = runs.get("tuned")

    def over(other: str) -> float | None:
        return tuned.tokens_per_s / runs[other].tokens_per_s if tuned and other in runs else None

    return [
        Goal("utilisation of the tuned run, median, at least 90 %", tuned and tuned.utilisation, 0.90, form=".1%"),
        Goal("MFU of the tuned run, at least 40 % (H100, H200)", tuned and tuned.mfu, 0.40, form=".1%"),
        Goal("tokens/s, to dense flash attention, at least 0.87", over("flash"), 0.87),
        Goal("peak of the tuned run, GiB, at most 40", tuned and tuned.memory_gib, 40.0, at_least=False, form=".1f"),
        Goal("tokens/s, to untuned on the naive layer, at least 7", over("naive"), 7.0, form=".1f"),
        Goal("tokens/s, to untuned on the trainer's own layer", over("untuned"), 1.0, form=".1f"),
        Goal("tokens/s, to dense on the trainer's own kernel", over("dense"), 0.87),
    ]


def row_of(name: str, m: Measured) -> str:
    def number(value: float | None, form: str) -> str:
        return "" if value is None else f"{value:{form}}"

    cells = [
        name,
        m.shape,
        f"{m.tokens_per_s:,.0f}",
        f"{m.seconds:.3f}",
        number(m.predicted_s, ".2f"),
        f"{m.mfu:.1%}",
        number(m.utilisation, ".1%"),
        number(m.power_w, ".0f"),
        number(m.throttled, ".0%"),
        f"{m.memory_gib:.2f}",
        number(m.predicted_gib, ".2f"),
        f"{m.seconds_data / m.steady_s:.2%}",
        f"{m.steps} in {m.steady_s:.0f} s",
    ]
    return f"| {' | '.join(cells)} |"


def planned(cfg: RunConfig, device: Device, gpus: int, ds_config: Path) -> Option:
    """What training.plan predicts for a configuration on this many GPUs."""
    request = Request(cfg, Path(__file__), plan_batch(cfg.training, gpus), device, ds_config)
    return request.option(request.setting(ds_config))


def what_is_planned(runs: dict[str, Measured], device_name: str) -> str:
    """Text that separates what was measured on one device from what is predicted for four."""
    cfg = load_config(CONFIGS / TUNED, [])
    lines = [
        "Measured: one GPU with the work of one GPU of four. No gradient was reduced between GPUs, no weight\n"
        "was gathered, and the optimizer's state was not divided. Predicted for four GPUs, by training.plan from\n"
        "counts and assumed shares of the peaks, and not measured:"
    ]
    for name in ("A40", "L40S"):
        four = planned(cfg, DEVICES[name], 4, ZERO2_PCIE)
        lines.append(
            f"on 4 x {name} {four.time.seconds:.2f} s per step, {four.time.communication:.2f} s of it communication, "
            f"of which {four.time.exposed:.2f} s do not overlap with computation, and {four.peak_gib:.1f} GiB per GPU;"
        )
    tuned, here = runs.get("tuned"), find_device(device_name)
    if tuned is None or here is None:
        lines.append(
            f"{device_name} has no figures in training/planning/devices.py to plan from, or the tuned run is missing."
        )
        return "\n".join(lines)
    one = planned(load_config(CONFIGS / TUNED, [f"{k}={v}" for k, v in PER_GPU.items()]), here, 1, ZERO2)
    off = tuned.seconds / one.time.seconds
    four = planned(cfg, DEVICES["A40"], 4, ZERO2_PCIE)
    lines.append(
        f"for one {here.name} the same plan predicts {one.time.seconds:.2f} s; {tuned.seconds:.2f} s were measured:\n"
        f"{off:.2f} times as long. With the same error on 4 x A40, a step would take {four.time.seconds * off:.2f} s."
    )
    return "\n".join(lines)


def report(runs: dict[str, Measured], births: dict[str, str], device_name: str, smoke: bool) -> str:
    rows = [row_of(name, runs[name]) for name in RUNS if name in runs]
    by_birth: dict[str, list[str]] = {}
    for name in runs:
        by_birth.setdefault(births[name], []).append(name)
    sources = "\n".join(f"- {', '.join(names)}: {birth}" for birth, names in by_birth.items())
    scale = "A tiny model: this shows only that the benchmark runs.\n\n" if smoke else ""
    goal_rows = "\n".join(str(goal) for goal in goals(runs))
    return f"""# The 512M configuration on one GPU

{scale}Medians over the steps after the first {SETTLED}, except the peak, which is the largest. Utilisation, power and
throttling are means per step, from NVML. Predicted: the run's own "predicted" event, from counts.

| run | micro-batch, accumulation | tokens/s | s/step | s predicted | MFU | utilisation | W | throttled | peak, GiB | GiB predicted | waiting for data | steady |
|---|---|---|---|---|---|---|---|---|---|---|---|---|
{chr(10).join(rows)}

| goal | found | |
|---|---|---|
{goal_rows}

{what_is_planned(runs, device_name)}

Runs, {device_name}:

{sources}
"""  # noqa: E501


def device_name() -> str:
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU"


def earlier(path: Path) -> dict[str, dict]:
    """Runs measured by earlier calls, if they ran at this commit on this kind of device; {} otherwise."""
    if not path.exists():
        return {}
    found = json.loads(path.read_text())
    if (found["device"], found["commit"]) == (device_name(), commit()):
        return found["runs"]
    print(f"replacing {path.name}, which was measured on {found['device']} at {found['commit']}", flush=True)
    return {}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.gpu_run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=list(RUNS))
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="seconds of steady steps of each run (default: %(default)s)"
    )
    parser.add_argument(
        "--smoke", action="store_true", help="a tiny model on any device, to see that the benchmark runs"
    )
    args = parser.parse_args(argv)
    if not (args.smoke or torch.cuda.is_available()):
        print("error: torch sees no GPU here; --smoke shows on a CPU that the benchmark runs", file=sys.stderr)
        return 2
    seconds = SMOKE_SECONDS if args.smoke else args.seconds
    failed = []
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        path = (work if args.smoke else RESULTS) / "run_cuda.json"
        shrink = SMOKE_SHRINK if args.smoke else 1
        vocab_size = TINY["model.vocab_size"] if args.smoke else 151936
        window = load_config(CONFIGS / TUNED, []).training.max_seq_len // shrink
        write_dataset(work / "data", np.full(DATA_TOKENS // shrink**2 // window, window), vocab_size=vocab_size)
        found = earlier(path)
        for name in args.runs:
            print(f"== {name}", flush=True)
            try:
                measured = measure(RUNS[name], work / name, work / "data", seconds, args.smoke)
            except RunFailed as err:
                print(f"error: {name} {err}", file=sys.stderr, flush=True)
                failed.append(name)
                continue
            found[name] = {"birth": certificate("gpu_run", argv), **asdict(measured)}
            print(row_of(name, measured), flush=True)
            results = {"device": device_name(), "commit": commit(), "runs": found}
            path.write_text(json.dumps(results, indent=1) + "\n")
        births = {name: run["birth"] for name, run in found.items()}
        runs = {name: Measured(**{k: v for k, v in run.items() if k != "birth"}) for name, run in found.items()}
        text = report(runs, births, device_name(), args.smoke)
        path.with_suffix(".md").write_text(text)
        print(text)
    if failed:
        print(f"error: failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
