"""Runs one step's batch again and shows it: `python -m training.replay OUTPUT_DIR --step N`.

For a loss that looked odd: which windows the step trained on, what they say, and what the model makes of each. The
weights are those of the newest checkpoint before the step, or of one that is named; on one device, without an
engine, in float32. The text is exactly the step's; the loss is the step's too where the checkpoint is that of the step
before, and both are of the branch that went on. A step that was trained more than once, before a crash or a rollback,
has a row for each: --segment chooses.
Exit codes: 2 no such run or step; 3 a checkpoint or dataset that is refused.
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
from gsa.generation import load_model
from training.config import BatchPlan, ConfigError, RunConfig, from_plain, load_config, plan_batch
from training.data import DataError, PackedTokens, step_samples
from training.record.metrics_log import iter_rows
from training.record.run_folder import RunFolder

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


@dataclass(frozen=True)
class Trained:
    """One training of a step: its row, the number of the segment that it was moved to (None: it is in metrics.jsonl),
    and the configuration and number of ranks of the launch that trained it."""

    row: dict
    segment: int | None
    cfg: RunConfig
    world_size: int


def trainings_of(folder: Path, step: int) -> list[Trained]:
    """All of a step's, that of the run's one curve first, then the newest segment's. ValueError when there is none."""
    segments = {int(p.stem.removeprefix("metrics_")): p for p in (folder / "segments").glob("metrics_*.jsonl")}
    files: dict[int | None, Path] = {None: RunFolder(folder).metrics, **dict(sorted(segments.items(), reverse=True))}
    found: list[tuple[int | None, dict]] = []
    launches: list[dict] = []
    for segment, path in files.items():
        for row in iter_rows(path):
            if row.get("event") in ("start", "resume"):
                launches.append(row)
            elif "loss" in row and row.get("step") == step:
                found.append((segment, row))
    if not found:
        raise ValueError(f"{folder} has no step {step} in metrics.jsonl; its rows say which steps there are")
    return [Trained(row, segment, *_told_by(folder, launches, row)) for segment, row in found]


def _told_by(folder: Path, launches: list[dict], row: dict) -> tuple[RunConfig, int]:
    """Configuration and ranks of the launch that a row is of; of the newest where the row's launch does not say."""
    before = [launch for launch in launches if launch.get("time", 0) <= row.get("time", 0)]
    launch = max(before, key=lambda launch: launch.get("time", 0), default={})
    cfg = from_plain(launch["config"]) if "config" in launch else load_config(folder / "config.yaml", [])
    return cfg, launch.get("world_size") or RunFolder(folder).read_run().get("world_size", 1)


def chosen(trainings: list[Trained], segment: int | None) -> Trained:
    """The one of that segment; by default the first. ValueError, with what there is, when there is none."""
    for trained in trainings:
        if segment is None or trained.segment == segment:
            return trained
    there = ", ".join("metrics.jsonl" if t.segment is None else f"segment {t.segment}" for t in trainings)
    raise ValueError(f"step {trainings[0].row['step']} is not in segment {segment}; it is in {there}")


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


def tell(trained: Trained, others: list[Trained], checkpoint: Path, windows: list[Window], whole: bool) -> str:
    row = trained.row
    mean = sum(window.loss * window.targets for window in windows) / sum(window.targets for window in windows)
    also = [
        f"also trained: {'in metrics.jsonl' if t.segment is None else f'--segment {t.segment}'}, loss "
        f"{float(t.row['loss']):.4f}, samples up to {t.row['samples'] - 1}"
        for t in others
        if t is not trained
    ]
    branch = "" if trained.segment is None else " of the branch that went on"
    lines = [
        *also,
        f"step {row['step']}: loss {float(row['loss']):.4f} then, gradient norm {float(row['grad_norm']):.3f}, samples "
        f"{windows[0].sample}..{windows[-1].sample}; with the weights of {checkpoint.name}{branch}: {mean:.4f}",
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
    parser = argparse.ArgumentParser(
        prog="python -m training.replay", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a run's folder, e.g. outputs/quickstart")
    parser.add_argument("--step", type=int, required=True, help="whose batch to run again")
    parser.add_argument("--checkpoint", type=Path, help="a step_N folder (default: the newest before the step)")
    parser.add_argument("--whole", action="store_true", help="print windows whole, not their ends")
    parser.add_argument("--segment", type=int, metavar="K", help="the step as segments/metrics_K.jsonl has it")
    args = parser.parse_args(argv)
    try:
        if not (args.run / "config.yaml").exists():
            raise ConfigError(f"{args.run} holds no run (no config.yaml); give the --output_dir of one")
        trainings = trainings_of(args.run, args.step)
        trained = chosen(trainings, args.segment)
        row, cfg = trained.row, trained.cfg
        if missing := {"samples", "stage", "grad_norm"} - row.keys():
            raise ValueError(f"the row of step {args.step} in {args.run} has no {', '.join(sorted(missing))}")
        checkpoint = args.checkpoint or weights_before(args.run, args.step)
        data = _data_of(cfg)
        if args.checkpoint is None and read_run_state(checkpoint).data_fingerprint != data.fingerprint:
            raise DataError(f"the text under {', '.join(data.sources)} is not what {checkpoint.name} was trained on")
        if not data.tokenizer_file.is_file():
            raise DataError(f"{data.tokenizer_file} is missing: there is no text to show; restore the dataset")
        tokenizer = Tokenizer.from_file(str(data.tokenizer_file))
        model = load_model(checkpoint)
        model.set_stage(row["stage"])
        windows = rerun(model, data, tokenizer, samples_of(row, plan_batch(cfg.training, trained.world_size)))
    except (CheckpointError, DataError) as err:
        print(f"error: {err}", file=sys.stderr)
        return 3
    except ValueError as err:
        print(f"error: {err}", file=sys.stderr)
        return 2
    print(tell(trained, trainings, checkpoint, windows, args.whole))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
