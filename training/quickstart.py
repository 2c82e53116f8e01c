"""The whole life of a small run, as `make quickstart` shows it: train, stop, resume by tag, evaluate, generate.

Each command is printed before it runs, so that it can be repeated by hand. Finished parts are not done again.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch

from gsa.checkpoint import manifest
from training.observe.console import format_seconds, text_chart
from training.record.metrics_log import read_rows

CPU_RANKS = 2


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="training.quickstart", description=__doc__)
    parser.add_argument(
        "--config", type=Path, default=Path("training/configs/quickstart.yaml"), help="(default: %(default)s)"
    )
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/quickstart"), help="(default: %(default)s)")
    parser.add_argument("--stop_at", type=int, default=80, help="step to stop and resume at (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration keys, over the yaml")
    args = parser.parse_args(argv)
    began = time.monotonic()

    tag = f"step_{args.stop_at}"
    status = _run(args.output_dir).get("status")
    if status == "finished":
        print(f"{args.output_dir} is finished already; delete it to train again\n")
    else:
        if not manifest.is_complete(args.output_dir / tag):
            resume = ["--resume_from", "auto"] if args.output_dir.exists() else []
            _launch(args, [*resume, f"training.stop_at_step={args.stop_at}"], "train, then stop with a checkpoint")
        _launch(args, ["--resume_from", tag], f"resume {tag} and go on")
    step_dir = manifest.resolve("latest", args.output_dir)
    _show(
        "a few lines from the model",
        [
            sys.executable,
            "-m",
            "training.generate",
            str(step_dir),
            "--prompt",
            "import os\n",
            "--prompt",
            "def main(",
            "--prompt",
            "class Test",
        ],
    )
    _summary(args.output_dir, step_dir, time.monotonic() - began)
    return 0


def _run(output_dir: Path) -> dict:
    path = output_dir / "run.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _launch(args: argparse.Namespace, extra: list[str], title: str) -> None:
    ranks = torch.cuda.device_count() or CPU_RANKS
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    _show(
        title,
        [
            launcher,
            "--log_level",
            "error",
            "--num_gpus",
            str(ranks),
            "training/train.py",
            "--config",
            str(args.config),
            "--output_dir",
            str(args.output_dir),
            "--deepspeed_config",
            "ds_configs/zero2.json",
            *args.overrides,
            *extra,
        ],
    )


def _show(title: str, command: list[str]) -> None:
    """Prints a command and runs it with its output in view. A failure ends the quickstart with its exit code."""
    print(f"--- {title}\n$ {shlex.join(command)}", flush=True)
    quiet = {"PYTHONWARNINGS": "ignore", "DS_LOG_LEVEL": "error"}
    if not torch.cuda.is_available():
        quiet |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    code = subprocess.run(command, env={**os.environ, **quiet}).returncode
    if code:
        sys.exit(code)
    print(flush=True)


def _summary(output_dir: Path, step_dir: Path, seconds: float) -> None:
    rows = read_rows(output_dir / "metrics.jsonl")
    steps = [row for row in rows if "loss" in row]
    score = [row for row in rows if row.get("event") == "eval"][-1]
    losses = [float(row["loss"]) for row in steps]
    print(text_chart(losses, label=f"--- training loss, nats per token, {len(steps)} steps"))
    rate = sorted(row["tokens_per_s"] for row in steps)[len(steps) // 2]
    print(
        f"\nheld-out text: {score['eval_bpb']:.3f} bits per byte; a unigram model: {score['unigram_bpb']:.3f}\n"
        f"median throughput: {rate:,.0f} tokens/s; this took {format_seconds(seconds)}\n\n"
        f"where everything lies:\n"
        f"  {output_dir / 'metrics.jsonl'}    one row per step, and events\n"
        f"  {output_dir / 'config.yaml'}, ds_config.json, env.json, run.json\n"
        f"  {step_dir}/    the last checkpoint; model.safetensors + config.json are the weights for use\n"
        f"  data/quickstart/    the prepared text and its tokenizer"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
