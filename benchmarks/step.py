"""A whole training step of GSA and of the same model with dense attention: forward, losses, backward, AdamW.

    python -m benchmarks.step [--config YAML] [--micro_batch_size N] [--repeats 10] [key=value ...]

One process without DeepSpeed; precision, length and activation checkpointing are those of the configuration (default:
the 512M one). Tokens are random and packed as in training: each sequence holds four documents, of 1/2, 1/4, 1/8 and 1/8
of its length. The two models take turns. Writes benchmarks/results/step_<device>.md.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import torch

from benchmarks.measuring import commit
from gsa import GSAForCausalLM
from gsa.kernels.choice import Shape, resolve
from gsa.loss import IGNORE
from gsa.model import count_params
from training.config import load_config
from training.engine.optimizer import build_optimizer
from training.loop.step import indexer_rows
from training.record.run_folder import environment

DEFAULT = Path("training/configs/pretrain_512m_low_memory.yaml")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=DEFAULT)
    parser.add_argument(
        "--micro_batch_size", type=int, help="sequences per micro-batch (default: as in the configuration)"
    )
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="configuration keys that replace those of the yaml"
    )
    args = parser.parse_args(argv)
    cfg = load_config(args.config, args.overrides)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if cfg.training.precision == "bf16" else torch.float32
    c = cfg.model
    shape = Shape(c.n_heads, c.n_kv_heads, c.d_head, c.n_indexer_heads, c.d_indexer, dtype)
    backend, fault = resolve(cfg.training.backend, shape, device)
    if fault:
        print(f"warning: using the chunked kernels: {fault}", file=sys.stderr)
    size = (args.micro_batch_size or cfg.training.micro_batch_size, cfg.training.max_seq_len)
    random = torch.Generator().manual_seed(0)
    tokens, targets = (torch.randint(0, c.vocab_size, size, generator=random).to(device) for _ in range(2))
    start = document_starts(*size).to(device)
    targets[:, :-1][start[:, 1:] != start[:, :-1]] = IGNORE
    rows = indexer_rows(0, 0, size[1], cfg.training.indexer_loss_rows).to(device)

    steps, peaks = {}, {}
    for name, config in (("dense", replace(c, sparse=False)), ("gsa", c)):
        torch.manual_seed(0)
        model = GSAForCausalLM(config).to(device, dtype)
        model.set_backend(backend)
        model.set_activation_checkpointing(cfg.training.recomputed)
        steps[name] = step_of(model, build_optimizer(model, cfg.training), tokens, targets, start, rows, cfg, device)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(args.repeats + 2):
        for name, step in steps.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            step()
            if repeat >= 2:  # the first two compile and allocate
                seconds[name].append(time.perf_counter() - began)
                peaks[name] = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else float("nan")
    text = report(args, argv, cfg, backend, size, seconds, peaks)
    print(text)
    (Path(__file__).parent / "results" / f"step_{device.type}.md").write_text(text)
    return 0


def document_starts(rows: int, length: int) -> torch.Tensor:
    """(rows, length) int64: the position where the document of each token begins."""
    begins = torch.tensor([0, length // 2, length * 3 // 4, length * 7 // 8])
    place = torch.arange(length)
    return begins[torch.bucketize(place, begins, right=True) - 1].expand(rows, length).contiguous()


def step_of(model, optimizer, tokens, targets, start, rows, cfg, device):
    def step() -> None:
        out = model(tokens, targets, start, indexer_rows=rows)
        (out.loss + cfg.training.indexer_loss_weight * out.indexer_loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        model.update_v_ref(out.selection_stats)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


def report(args, argv, cfg, backend, size, seconds, peaks) -> str:
    env = environment()
    ratios = [ours / dense for ours, dense in zip(seconds["gsa"], seconds["dense"], strict=True)]
    lines = [
        f"| {name} | {statistics.median(spent):.3f} [{min(spent):.3f} - {max(spent):.3f}] | {peaks[name]:.1f} |"
        for name, spent in seconds.items()
    ]
    return f"""# A whole training step

`python -m benchmarks.step {" ".join(argv)}`, commit {commit()}, {datetime.now(UTC):%Y-%m-%d},
{", ".join(env["devices"])}, torch {env["torch"]}. {args.config.name}:
{count_params(cfg.model)["total"]:,} parameters, {size[0]} x {size[1]} tokens in four documents each,
{cfg.training.precision}, backend {backend}, k_base {cfg.model.k_base}. Medians of {args.repeats}, smallest and largest.
Memory is that of both models and optimizers and of the step itself.

| attention | s | peak, GiB |
|---|---|---|
{chr(10).join(lines)}

GSA to dense, step by step: {statistics.median(ratios):.3f} [{min(ratios):.3f} - {max(ratios):.3f}].
"""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
