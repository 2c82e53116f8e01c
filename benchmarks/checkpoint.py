"""What a save costs: how long training stands still, and the total time, for blocking and for background saves.

    python -m benchmarks.checkpoint [--gib 1.0] [--saves 5] [--out FOLDER]

One rank, ZeRO 2, bf16: masters, moments and both copies of the weights. Both kinds of save take turns in one process,
after one save each that is not counted (it allocates the host buffers); training steps continue during a background
save. Every checkpoint is verified before its time is counted. Writes benchmarks/results/checkpoint_<device>.md.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import torch

from benchmarks.measuring import commit
from gsa import GSAForCausalLM, ModelConfig
from gsa.checkpoint import manifest
from gsa.checkpoint.state import RunState
from gsa.model import count_params
from training.checkpointing.saver import Retention, Saver, SaveReport
from training.config import RunConfig, TrainingConfig, plan_batch, to_plain
from training.config.deepspeed import resolve_ds_config
from training.engine.engine import DEEPSPEED_VERSION, Engine, start
from training.engine.optimizer import build_optimizer, build_schedule
from training.record.run_folder import PROJECT, environment, version

BYTES_PER_PARAMETER = 16  # float32 master and two moments, bf16 weights for DeepSpeed and for use


def model_of(gib: float) -> ModelConfig:
    """A model with the smallest vocabulary, in steps of 1000, whose checkpoint has at least `gib` GiB."""
    for vocab_size in range(1000, 10**7, 1000):
        config = ModelConfig(d_model=512, n_layers=4, n_heads=8, n_kv_heads=2, vocab_size=vocab_size)
        if count_params(config)["total"] * BYTES_PER_PARAMETER >= gib * 2**30:
            return config
    raise ValueError(f"--gib {gib} is too large for this benchmark")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.checkpoint", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gib", type=float, default=1.0, help="size of a checkpoint in GiB (default: %(default)s)")
    parser.add_argument("--saves", type=int, default=5, help="counted saves of each kind (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder for the checkpoints (default: a temporary one)")
    args = parser.parse_args(argv)

    world = start(timeout_s=600)
    cfg = RunConfig(
        model=model_of(args.gib),
        training=TrainingConfig(
            max_steps=10**6, warmup_steps=0, max_seq_len=64, micro_batch_size=1, global_batch_size=1
        ),
    )
    torch.manual_seed(0)
    model = GSAForCausalLM(cfg.model)
    optimizer = build_optimizer(model, cfg.training)
    ds_config = resolve_ds_config(None, cfg, plan_batch(cfg.training, 1), Path("benchmarks/checkpoint.py"))
    engine = Engine(model, optimizer, build_schedule(optimizer, cfg.training), ds_config)
    tokens = torch.randint(0, 1000, (1, 64), device=world.device)

    def train_step() -> None:
        out = engine.forward(tokens, tokens)
        engine.backward(out.loss + out.indexer_loss)
        engine.step()

    folder = Path(tempfile.mkdtemp(dir=args.out))
    reports: dict[bool, list[SaveReport]] = {False: [], True: []}
    savers = {
        kind: Saver(
            engine,
            world,
            folder,
            background=kind,
            retention=Retention(None, None),
            bytes_needed=0,
            published=reports[kind].append,
            failed=lambda step, reason: sys.exit(f"step {step}: {reason}"),
        )
        for kind in (False, True)
    }
    step, slowed, calm = 0, [], []
    try:
        for turn in range(args.saves + 1):
            for saver in savers.values():
                train_step()
                began = time.perf_counter()
                train_step()
                calm.append(time.perf_counter() - began)
                step += 1
                saver.start(state_of(cfg, step))
                while saver.status()[0] == 0:
                    began = time.perf_counter()
                    train_step()
                    slowed.append(time.perf_counter() - began)
                saver.finish()
                manifest.verify(folder / f"step_{step}")
                shutil.rmtree(folder / f"step_{step}")
            if turn == 0:
                for kind in reports:
                    reports[kind].clear()
                slowed.clear(), calm.clear()
    finally:
        shutil.rmtree(folder)
    text = report(args, cfg, reports, slowed, calm)
    print(text)
    name = "cuda" if world.device.type == "cuda" else "cpu"
    (Path(__file__).parent / "results" / f"checkpoint_{name}.md").write_text(text)
    world.leave()
    return 0


def state_of(cfg: RunConfig, step: int) -> RunState:
    return RunState(
        step=step,
        epoch=0.0,
        samples_consumed=step,
        tokens_seen=step,
        config=to_plain(cfg),
        data_fingerprint="none",
        tracking_id=None,
        stage="sparse",
        versions={},
        world_size=1,
        zero_stage=2,
        created="now",
    )


def report(args, cfg: RunConfig, reports: dict, slowed: list[float], calm: list[float]) -> str:
    env = environment()
    stalls = {kind: [r.stall_s for r in reports[kind]] for kind in reports}
    at_once, background = (statistics.median(stalls[kind]) for kind in (False, True))
    pairs = [b / a for a, b in zip(stalls[False], stalls[True], strict=True)]
    total = [r.stall_s + r.background_s for r in reports[True]]
    cpu = [r.background_cpu_s for r in reports[True]]
    return f"""# Cost of a save

`python -m benchmarks.checkpoint --gib {args.gib} --saves {args.saves}`, commit {commit()},
{datetime.now(UTC):%Y-%m-%d}, {", ".join(env["devices"])}, {env["cpus"]} CPUs (shared),
torch {env["torch"]}, deepspeed {DEEPSPEED_VERSION},
{PROJECT} {version(PROJECT)}. {count_params(cfg.model)["total"]:,} parameters,
{reports[True][0].bytes / 2**30:.2f} GiB a checkpoint,
one rank, ZeRO 2, bf16, {torch.get_num_threads()} thread(s). Medians, in brackets smallest and largest of {args.saves}.

| | standstill, s | from start to published, s |
|---|---|---|
| at once | {at_once:.2f} {spread(stalls[False])} | {at_once:.2f} |
| in the background | {background:.2f} {spread(stalls[True])} | {statistics.median(total):.2f} {spread(total)} |

Ratio of standstills, pair by pair: {statistics.median(pairs):.3f} {spread(pairs)}. CPU seconds of the writer:
{statistics.median(cpu):.2f} {spread(cpu)}. A training step beside the writer took {statistics.median(slowed):.2f} s,
alone {statistics.median(calm):.2f} s.
"""


def spread(values: list[float]) -> str:
    return f"[{min(values):.3f} - {max(values):.3f}]"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
