"""Shows the whole life of a small run, as `make quickstart` does: train, stop, resume by tag, evaluate, generate.

Each command is printed before it runs, so that it can be repeated by hand. Parts that are finished are not repeated.
Exit codes: 0 done; otherwise the exit code of the command that failed.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from gsa.checkpoint import manifest
from training.config.command import command_parser, run_command
from training.config.exit_codes import ExitCode
from training.observe.console import format_seconds, text_chart
from training.observe.gpu_monitor import require_usable_gpus
from training.record.metrics_log import read_rows
from training.record.run_folder import RunFolder

CPU_RANKS = 2
"""Ranks on a machine without a GPU."""
PROMPTS = ("import os\n", "def main(", "class Test")


def main(argv: Sequence[str]) -> int:
    parser = command_parser("quickstart", __doc__)
    parser.add_argument(
        "--config", type=Path, default=Path("training/configs/quickstart.yaml"), help="(default: %(default)s)"
    )
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/quickstart"), help="(default: %(default)s)")
    parser.add_argument("--stop_at", type=int, default=80, help="step to stop and resume at (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration keys, over the yaml")
    args = parser.parse_intermixed_args(argv)
    began = time.monotonic()

    tag = f"step_{args.stop_at}"
    require_usable_gpus()  # without GPUs it sets DS_ACCELERATOR=cpu, which is for a person to say
    if RunFolder(args.output_dir).read_run().get("status") == "finished":
        print(f"{args.output_dir} is finished already; delete it to train again\n")
    else:
        if not manifest.is_complete(args.output_dir / tag):
            resume = ["--resume_from", "auto"] if args.output_dir.exists() else []
            _train(args, [*resume, f"training.stop_at_step={args.stop_at}"], "train, then stop with a checkpoint")
        _train(args, ["--resume_from", tag], f"resume {tag} and go on")
    step_dir = manifest.resolve("latest", args.output_dir)
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    _run("a few lines from the model", [sys.executable, "-m", "training.generate", str(step_dir), *prompts])
    _print_summary(args.output_dir, step_dir, time.monotonic() - began)
    return ExitCode.FINISHED


def _train(args: argparse.Namespace, extra: list[str], title: str) -> None:
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    launch = [launcher, "--log_level", "error", "--num_gpus", str(torch.cuda.device_count() or CPU_RANKS)]
    train = ["training/train.py", "--config", str(args.config), "--output_dir", str(args.output_dir)]
    _run(title, [*launch, *train, "--deepspeed_config", "ds_configs/zero2.json", *args.overrides, *extra])


def _run(title: str, command: list[str]) -> None:
    """Prints a command and runs it, with its output shown. If it fails, the quickstart ends with its exit code."""
    print(f"--- {title}\n$ {shlex.join(command)}", flush=True)
    quiet = {"PYTHONWARNINGS": "ignore", "DS_LOG_LEVEL": "error"}
    if not torch.cuda.is_available():
        quiet |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    code = subprocess.run(command, env={**os.environ, **quiet}).returncode
    if code:
        sys.exit(code)
    print(flush=True)


def _print_summary(output_dir: Path, step_dir: Path, seconds: float) -> None:
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
    sys.exit(run_command(main))
