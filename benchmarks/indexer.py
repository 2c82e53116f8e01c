"""Does the indexer learn? Trains benchmarks/indexer.yaml and measures what its layers select, before and after.

    make data && python -m benchmarks.indexer [--steps 600] [--windows 32]

The trained indexer is compared with an oracle, which selects the keys of largest attention mass, and with an untrained
indexer in the trained model. Writes benchmarks/results/indexer_cpu.md; the run's folder is outputs/indexer.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import torch

from benchmarks.measuring import commit
from gsa import GSAForCausalLM, ModelConfig
from gsa.checkpoint.state import read_config_json
from gsa.generation import load_model
from gsa.inspection import coverage_table, measure_coverage, measure_spread, spread_table, with_untrained_indexer
from training.inspect_indexer import held_out
from training.record.metrics_log import read_rows
from training.record.run_folder import environment

CONFIG = Path(__file__).with_suffix(".yaml")
RUN = Path("outputs/indexer")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.indexer", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--windows", type=int, default=32, help="held-out windows (default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=2)
    args = parser.parse_args(argv)
    began = time.perf_counter()
    subprocess.run(
        [
            sys.executable,
            "-m",
            "training.launch",
            "--num_gpus",
            str(args.ranks),
            "training/train.py",
            "--config",
            str(CONFIG),
            "--output_dir",
            str(RUN),
            "--resume_from",
            "auto",
            f"training.max_steps={args.steps}",
        ],
        check=True,
    )
    seconds = time.perf_counter() - began
    step_dir = RUN / f"step_{args.steps}"
    model = load_model(step_dir)
    plain = read_config_json(step_dir)
    windows = held_out({plain["data"]["data_dir"]: 1.0}, plain["training"]["max_seq_len"], args.windows)
    torch.manual_seed(plain["training"]["seed"])
    untrained_model = GSAForCausalLM(ModelConfig(**plain["model"])).eval()
    before = measure_coverage(untrained_model, windows)
    after = measure_coverage(model, windows)
    untrained = measure_coverage(with_untrained_indexer(model, windows), windows)
    env = environment()
    evals = [r for r in read_rows(RUN / "metrics.jsonl") if r.get("event") == "eval"]
    text = f"""# Does the indexer learn?

`python -m benchmarks.indexer {" ".join(argv)}`, commit {commit()}, {datetime.now(UTC):%Y-%m-%d}, {env["cpus"]} CPUs
(shared), torch {env["torch"]}. {CONFIG.name}: {model.config.n_layers} layers, T = {plain["training"]["max_seq_len"]},
k = {model.config.k_base}; {args.steps} steps, of these {plain["training"]["indexer_warmup_steps"]} dense, in
{seconds:.0f} s; held-out {evals[-1]["eval_bpb"]:.3f} bits per byte (unigram {evals[-1]["unigram_bpb"]:.3f}).
{len(windows)} held-out windows. Shares of dense attention mass, over queries with more than k visible keys.

After training:

{coverage_table(after, untrained)}

Before the first step (attention is nearly uniform, so that even the oracle covers little):

{coverage_table(before, before)}

How far selected sets overlap, which decides the kernel for long context (training.inspect_indexer):

{spread_table(*measure_spread(model, windows[:8]))}
"""
    print(text)
    (Path(__file__).parent / "results" / "indexer_cpu.md").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
