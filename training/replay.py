"""Runs one step's batch again and shows it: `python -m training.replay OUTPUT_DIR --step N`.

For a loss that looked odd: which windows the step trained on, what they say, and what the model makes of each. The
weights are those of the newest checkpoint before the step, or of one that is named; on one device, without an
engine, in float32. The text is exactly the step's; the loss is the step's too where the checkpoint is that of the step
before.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from gsa import GSAForCausalLM
from gsa.checkpoint import manifest
from gsa.checkpoint.full_state import read_run_state
from gsa.checkpoint.manifest import CheckpointError
from training.config import BatchPlan, ConfigError, RunConfig, load_config, plan_batch
from training.data import DataError, PackedTokens, step_samples
from training.generate import load_model
from training.metrics import read_rows
from training.run_folder import RunFolder

SHOWN_CHARACTERS = 200
"""Of each end of a window's text."""


@dataclass(frozen=True)
class Window:
    """One window of a step. loss: nats per target token, of which there are `targets`. worst: the largest losses, with
    the target's text."""

    sample: int
    rank: int
    place: str
    loss: float
    targets: int
    worst: list[tuple[str, float]]
    text: str


def step_row(folder: Path, step: int) -> dict:
    """The row of a step, from metrics.jsonl or, where the step was trained again or never resumed, a segment."""
    for path in [RunFolder(folder).metrics, *sorted((folder / "segments").glob("metrics_*.jsonl"), reverse=True)]:
        for row in read_rows(path):
            if "loss" in row and row["step"] == step:
                return row
    raise ValueError(f"{folder} has no step {step} in metrics.jsonl; its rows say which steps there are")


def weights_before(folder: Path, step: int) -> Path:
    """The newest checkpoint of steps before `step`, every byte verified. CheckpointError when there is none."""
    tags = sorted(
        (int(path.name.removeprefix("step_")), path)
        for path in folder.glob("step_*")
        if path.name.removeprefix("step_").isdigit() and (path / manifest.MANIFEST).exists()
    )
    before = [path for number, path in tags if number < step]
    if not before:
        raise CheckpointError(
            f"{folder} has no checkpoint before step {step}; name one with --checkpoint (of another step, or run)"
        )
    manifest.verify(before[-1])
    return before[-1]


@torch.no_grad()
def rerun(
    model: GSAForCausalLM, data: PackedTokens, tokenizer: Tokenizer, samples: list[tuple[int, int]]
) -> list[Window]:
    """Each (sample, rank) through the model, one window at a time."""
    found = []
    for sample, rank in samples:
        batch = data.batch(np.array([sample]))
        logits = model(batch.tokens, doc_start=batch.doc_start).logits[0]
        targets = batch.targets[0]
        valid = targets >= 0
        losses = torch.nn.functional.cross_entropy(logits[valid], targets[valid], reduction="none")
        largest = losses.topk(min(5, len(losses)))
        ids = targets[valid][largest.indices].tolist()
        worst = [(tokenizer.decode([i]), loss) for i, loss in zip(ids, largest.values.tolist(), strict=True)]
        text = tokenizer.decode(batch.tokens[0].tolist(), skip_special_tokens=False)
        found.append(
            Window(sample, rank, data.describe(np.array([sample]))[0], losses.mean().item(), len(losses), worst, text)
        )
    return found


def samples_of(row: dict, plan: BatchPlan) -> list[tuple[int, int]]:
    """(sample, rank) of every window of a step."""
    first = row["samples"] - plan.global_batch_size
    return sorted(
        (int(sample), rank)
        for rank in range(plan.world_size)
        for numbers in step_samples(first, plan, rank)
        for sample in numbers
    )


def tell(row: dict, checkpoint: Path, windows: list[Window], whole: bool) -> str:
    mean = sum(window.loss * window.targets for window in windows) / sum(window.targets for window in windows)
    lines = [
        f"step {row['step']}: loss {row['loss']:.4f} then, gradient norm {row['grad_norm']:.3f}, samples "
        f"{windows[0].sample}..{windows[-1].sample}; with the weights of {checkpoint.name}: {mean:.4f}",
        "",
    ]
    for window in sorted(windows, key=lambda w: -w.loss):
        text = window.text if whole else _ends(window.text)
        worst = ", ".join(f"{token!r} {loss:.1f}" for token, loss in window.worst)
        lines += [
            f"sample {window.sample} (rank {window.rank}; {window.place}): loss {window.loss:.4f}; worst: {worst}",
            *(f"    {line}" for line in text.splitlines()),
        ]
    return "\n".join(lines)


def _ends(text: str) -> str:
    if len(text) <= 2 * SHOWN_CHARACTERS:
        return text
    left_out = len(text) - 2 * SHOWN_CHARACTERS
    return f"{text[:SHOWN_CHARACTERS]}\n[... {left_out} characters ...]\n{text[-SHOWN_CHARACTERS:]}"


def _data_of(cfg: RunConfig) -> PackedTokens:
    sources = cfg.data.mixture or {cfg.data.data_dir: 1.0}
    return PackedTokens(sources, split="train", max_seq_len=cfg.training.max_seq_len, seed=cfg.training.seed)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m training.replay", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("run", type=Path, help="a run's folder, e.g. outputs/quickstart")
    parser.add_argument("--step", type=int, required=True, help="whose batch to run again")
    parser.add_argument("--checkpoint", type=Path, help="a step_N folder (default: the newest before the step)")
    parser.add_argument("--whole", action="store_true", help="print windows whole, not their ends")
    args = parser.parse_args(argv)
    try:
        if not (args.run / "config.yaml").exists():
            raise ConfigError(f"{args.run} holds no run (no config.yaml); give the --output_dir of one")
        cfg = load_config(args.run / "config.yaml", [])
        row = step_row(args.run, args.step)
        world = RunFolder(args.run).read_run().get("world_size", 1)
        checkpoint = args.checkpoint or weights_before(args.run, args.step)
        data = _data_of(cfg)
        if args.checkpoint is None and read_run_state(checkpoint).data_fingerprint != data.fingerprint:
            raise DataError(f"the text under {', '.join(data.sources)} is not what {checkpoint.name} was trained on")
        tokenizer = Tokenizer.from_file(str(Path(next(iter(data.sources))) / "tokenizer.json"))
        model = load_model(checkpoint)
        model.set_stage(row["stage"])
        windows = rerun(model, data, tokenizer, samples_of(row, plan_batch(cfg.training, world)))
    except (CheckpointError, DataError) as err:
        print(f"error: {err}", file=sys.stderr)
        return 3
    except ValueError as err:
        print(f"error: {err}", file=sys.stderr)
        return 2
    print(tell(row, checkpoint, windows, args.whole))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
