"""Shows that two checkouts train the same run: the rows and the checkpoints of tiny runs, compared bit for bit.

    python scripts/compare_checkouts.py record --checkout OLD --out outputs/old   # a git worktree of an earlier commit
    python scripts/compare_checkouts.py record --checkout . --out outputs/new
    python scripts/compare_checkouts.py compare outputs/old outputs/new

`record` trains at ZeRO 0-3 on 1 and 2 CPU ranks through training/train.py: held-out evaluations, completions, a dense
warm-up of the indexer, probes, spikes that are skipped or rolled back, a stop, and a resume by tag. `compare` compares
every row of metrics.jsonl (except times) and every file of every checkpoint. Inside a checkpoint, only the time of the
save may differ. Exit code 1 when anything differs.

Use it before and after a change that must not change numbers. Both recordings must be made on one machine.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tests" / "fixtures" / "run_625a451" / "data"
SHAPE = (
    "model.d_model=16 model.n_layers=2 model.n_heads=4 model.n_kv_heads=2 model.d_ffn=32 model.vocab_size=64 "
    "model.max_position_embeddings=32 model.d_indexer=8 model.n_indexer_heads=2 model.k_base=6 model.k_min=2 "
    "model.k_max=12 model.init_std=0.2"
).split()
RUN = (
    "training.seed=7 training.max_steps=64 training.micro_batch_size=2 training.global_batch_size=4 "
    "training.max_seq_len=32 training.learning_rate=1e-5 training.min_learning_rate=1e-6 training.warmup_steps=2 "
    "training.eval_interval=16 training.eval_windows=6 training.save_interval=10 training.indexer_warmup_steps=5 "
    "training.probe_interval=8 training.health_interval=8 training.spike_sigmas=1.0 training.sample_interval=32 "
    "training.sample_prompts=[w3] training.sample_tokens=2 logging.run_id=identity"
).split()
STOP = 57
TIMES = ("time", "eval_seconds", "mfu", "tokens_per_second", "config", "predicted", "config_diff")
CASES = [(stage, ranks, "fp32") for stage in (0, 1, 2, 3) for ranks in (1, 2)] + [(2, 2, "bf16"), (3, 2, "bf16")]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def record(checkout: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "empty.yaml").write_text("model: {}\n")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "PYTEST_", "RANK", "WORLD_SIZE"))}
    env = inherited | {
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PYTHONWARNINGS": "ignore",
        "PYTHONPATH": str(checkout),
    }
    for stage, ranks, precision in CASES:
        folder = out / f"zero{stage}_{ranks}ranks_{precision}"
        on_spike = "rollback" if ranks == 2 else "skip"
        given = [
            "--config",
            str(out / "empty.yaml"),
            "--output_dir",
            str(folder),
            "--log_level",
            "warning",
            "--deepspeed_config",
            str(checkout / "ds_configs" / f"zero{stage}.json"),
            f"data.data_dir={DATA}",
            f"training.precision={precision}",
            f"training.on_spike={on_spike}",
            *SHAPE,
            *RUN,
        ]
        for extra in ([f"training.stop_at_step={STOP}"], ["--resume_from", "latest"]):
            command = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--nproc_per_node",
                str(ranks),
                "--master_port",
                str(free_port()),
                str(checkout / "training" / "train.py"),
                *given,
                *extra,
            ]
            done = subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True, timeout=600)
            if done.returncode:
                sys.exit(f"{folder.name} {extra}: exit {done.returncode}\n{(done.stdout + done.stderr)[-6000:]}")
        print(f"{folder.name}: {len(rows(folder))} rows", flush=True)


def rows(folder: Path) -> list[dict]:
    """The rows of metrics.jsonl without times and what depends on the device alone."""
    kept = []
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row.get("event") in ("telemetry", "device", "prediction", "predicted"):
            continue
        kept.append({k: v for k, v in row.items() if not (k in TIMES or "second" in k or is_measured(k))})
    # a save is published in the background, some steps later: where its row stands depends on the disk
    return sorted(kept, key=lambda row: row.get("event") == "save")


def is_measured(name: str) -> bool:
    """Whether a metric is measured on the machine: two runs of one checkout differ in it too."""
    return name.startswith(("mem", "rank", "gpu", "cpu", "host", "tokens_per", "mfu", "hfu", "peak", "util", "flops"))


def differences(old, new, where: str) -> list[str]:
    """Where two plain values or tensors differ, deeply; the time of the save is passed over."""
    if where.endswith(("['created']", ".created")):
        return []
    if isinstance(old, torch.Tensor) or isinstance(new, torch.Tensor):
        same = (
            type(old) is type(new)
            and old.dtype == new.dtype
            and old.shape == new.shape
            and torch.equal(
                old.contiguous().view(torch.uint8) if old.dim() else old,
                new.contiguous().view(torch.uint8) if new.dim() else new,
            )
        )
        return [] if same else [f"{where}: tensors differ"]
    if isinstance(old, dict) and isinstance(new, dict):
        found = [f"{where}: only one has {key!r}" for key in old.keys() ^ new.keys()]
        return found + [
            d for key in old.keys() & new.keys() for d in differences(old[key], new[key], f"{where}[{key!r}]")
        ]
    if isinstance(old, (list, tuple)) and isinstance(new, (list, tuple)) and len(old) == len(new):
        return [d for i, pair in enumerate(zip(old, new, strict=True)) for d in differences(*pair, f"{where}[{i}]")]
    return (
        [] if old == new or (old != old and new != new) or repr(old) == repr(new) else [f"{where}: {old!r} -> {new!r}"]
    )


def compare_file(old: Path, new: Path) -> list[str]:
    if old.read_bytes() == new.read_bytes():
        return []
    if old.suffix == ".pt":
        return differences(*(torch.load(p, map_location="cpu", weights_only=False) for p in (old, new)), old.name)
    if old.suffix == ".json":
        # a manifest holds the hash of the file with the time of the save, which is compared value by value itself
        one, two = (json.loads(p.read_text()) for p in (old, new))
        return [
            d
            for d in differences(one, two, old.name)
            if "mp_rank_00_model_states" not in d and "['digest']" not in d and "created" not in d
        ]
    return [f"{old.name}: bytes differ"]


def compare(old: Path, new: Path) -> int:
    failures = n_files = n_rows = 0
    for folder in sorted(p for p in old.iterdir() if p.is_dir()):
        other, found = new / folder.name, []
        one, two = rows(folder), rows(other)
        n_rows += len(one)
        if len(one) != len(two):
            found.append(f"{len(one)} rows -> {len(two)}")
        for i, pair in enumerate(zip(one, two, strict=False)):
            found += differences(*pair, f"row {i} (step {pair[0].get('step')}, {pair[0].get('event', 'step')})")
        files = {p.relative_to(folder) for p in folder.glob("step_*/**/*") if p.is_file()}
        others = {p.relative_to(other) for p in other.glob("step_*/**/*") if p.is_file()}
        found += [f"only one has {path}" for path in sorted(files ^ others)]
        n_files += len(files & others)
        for path in sorted(files & others):
            found += [f"{path.parent}/{d}" for d in compare_file(folder / path, other / path)]
        failures += bool(found)
        print(f"{folder.name}: {'same' if not found else 'DIFFERS'} ({len(one)} rows, {len(files)} checkpoint files)")
        for line in found[:20]:
            print(f"    {line}")
    print(f"{n_rows} rows and {n_files} checkpoint files compared; {failures} runs differ")
    return 1 if failures else 0


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/compare_checkouts.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="train the tiny runs with one checkout")
    recording.add_argument("--checkout", type=Path, required=True, help="root of the checkout that trains")
    recording.add_argument("--out", type=Path, required=True, help="a new folder for the runs")
    comparing = commands.add_parser("compare", help="compare two recordings")
    comparing.add_argument("old", type=Path)
    comparing.add_argument("new", type=Path)
    args = parser.parse_args(argv)
    if args.command == "record":
        record(args.checkout.resolve(), args.out.resolve())
        return 0
    return compare(args.old, args.new)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
