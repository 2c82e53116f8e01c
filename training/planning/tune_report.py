"""What `python -m training.tune` prints and writes: a row per trial, the recommendation, a yaml, and JSON."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime

from gsa.units import GIB, size_text
from training.config import load_config, to_yaml
from training.planning.outcome import Outcome
from training.planning.search import Trial, fastest, largest
from training.planning.tune_task import TuneTask

# The columns have fixed widths, since rows are printed as trials end.
ROW = "{:<18}  {:<10}  {:>13}  {:>15}  {:>10}  {:>8}  {}"
HEAD = ROW.format("ds_config", "recomputed", "micro x accum", "s/step", "tokens/s", "peak GiB", "verdict")


def table_row(task: TuneTask, trial: Trial) -> str:
    out = trial.outcome
    figures = ("", "", "")
    if out.verdict == "ok":
        figures = (_seconds(out), f"{task.tokens_per_s(out):,.0f}", f"{out.peak_gib:.2f}")
    verdict = {
        "ok": "ok, slower" if trial.slower else "ok",
        "out_of_memory": "out of memory",
        "failed": f"failed: {out.reason}",
    }[out.verdict]
    return ROW.format(trial.setting.ds_config.stem, trial.setting.recomputed, _batch(task, trial), *figures, verdict)


def _batch(task: TuneTask, trial: Trial) -> str:
    return f"{trial.micro_batch_size} x {task.accumulation_steps(trial.micro_batch_size)}"


def _seconds(outcome: Outcome) -> str:
    return f"{outcome.seconds:.3f} ±{outcome.spread:.3f}"


def _summary(task: TuneTask, trial: Trial) -> str:
    """A trial that ran, in one line."""
    out = trial.outcome
    return (
        f"{trial.setting.ds_config.stem}, recomputed {trial.setting.recomputed}, micro-batch x accumulation "
        f"{_batch(task, trial)}: {_seconds(out)} s per step, {task.tokens_per_s(out):,.0f} tokens/s, "
        f"peak {size_text(out.peak_gib * GIB)} per rank"
    )


def recommendation(task: TuneTask, trials: Sequence[Trial]) -> str:
    """What to use, in three lines. At least one trial ran."""
    winner, widest = fastest(trials), largest(trials)
    overrides = task.overrides_for(winner.setting, winner.micro_batch_size)
    same = winner.micro_batch_size == widest.micro_batch_size
    return "\n".join(
        [
            f"fastest: {_summary(task, winner)}",
            f"largest micro-batch found to fit: {'the same' if same else _summary(task, widest)}",
            f"use: --config {task.config} --deepspeed_config {winner.setting.ds_config} {shlex.join(overrides)}",
        ]
    )


def nothing_ran(trials: Sequence[Trial]) -> str:
    """Why no trial ran, and what to change."""
    if failed := next((t for t in trials if t.outcome.verdict == "failed"), None):
        return f"no setting ran; the first failure: {failed.outcome.reason}"
    least = trials[0]
    return (
        f"no setting fits: micro-batch {least.micro_batch_size} already ran out of memory under "
        f"{least.setting.ds_config.stem}, recomputed {least.setting.recomputed} ({least.outcome.reason}). "
        f"Use more ranks (--num_gpus), --deepspeed_config ds_configs/zero3_offload.json, a shorter "
        f"training.max_seq_len, or a smaller model"
    )


def tuned_yaml(task: TuneTask, trials: Sequence[Trial], argv: Sequence[str], environment: dict) -> str:
    """The whole configuration with the fastest setting in it, after comments that say how it was measured.

    environment: see training.record.run_folder.environment.
    """
    winner, env = fastest(trials), environment
    overrides = task.overrides_for(winner.setting, winner.micro_batch_size)
    lines = [
        f"{task.config} with {shlex.join(overrides)}",
        f"on {task.ranks} rank(s); the fastest of {len(trials)} trials of training.tune.",
        _summary(task, winner),
        f"(median of {task.steps} steps ± half the distance between their quartiles; {winner.outcome.backend} kernels)",
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {', '.join(env['devices'])}, {env['cpus']} CPUs, python "
        f"{env['python']}, torch {env['torch']}, deepspeed {env['deepspeed']}",
        f"command: python -m training.tune {shlex.join(argv)}",
        f"Use with: --deepspeed_config {shlex.quote(str(winner.setting.ds_config))}",
    ]
    return "".join(f"# {line}\n" for line in lines) + to_yaml(load_config(task.config, overrides))


def as_json(task: TuneTask, trials: Sequence[Trial], argv: Sequence[str], environment: dict) -> dict:
    """Every number of the search. environment: see training.record.run_folder.environment."""
    winner = fastest(trials)
    return {
        "command": ["python", "-m", "training.tune", *argv],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **{name: value for name, value in environment.items() if name != "argv"},
        "ranks": task.ranks,
        "steps": task.steps,
        "memory_cap_gib": task.memory_cap_gib,
        "global_batch_size": task.global_batch_size,
        "max_seq_len": task.cfg.training.max_seq_len,
        "trials": [_figures(task, trial) for trial in trials],
        "fastest": None if winner is None else _figures(task, winner),
        "override": None if winner is None else task.overrides_for(winner.setting, winner.micro_batch_size),
    }


def _figures(task: TuneTask, trial: Trial) -> dict:
    out = trial.outcome
    ran = {}
    if out.verdict == "ok":
        ran = {"seconds_per_step": out.seconds, "spread_seconds": out.spread, "tokens_per_s": task.tokens_per_s(out)}
    return {
        "deepspeed_config": str(trial.setting.ds_config),
        "recomputed": trial.setting.recomputed,
        "micro_batch_size": trial.micro_batch_size,
        "accumulation_steps": task.accumulation_steps(trial.micro_batch_size),
        **ran,
        **asdict(out),
    }
