"""How a step's batch is divided over ranks and micro-batches."""

from __future__ import annotations

from dataclasses import dataclass

from training.config.schema import ConfigError, TrainingConfig


@dataclass(frozen=True)
class BatchPlan:
    """global_batch_size = micro_batch_size x accumulation_steps x world_size, in windows per step."""

    micro_batch_size: int
    accumulation_steps: int
    world_size: int
    global_batch_size: int


def plan_batch(cfg: TrainingConfig, world_size: int) -> BatchPlan:
    """Divides the batch over this many ranks; where global_batch_size is set, the accumulation follows from it.

    Raises ConfigError, listing what fits, when the global batch is not a multiple of the ranks' micro-batches, or when
    an accumulation is given as well and does not multiply out.
    """
    micro, wanted, total = cfg.micro_batch_size, cfg.gradient_accumulation_steps, cfg.global_batch_size
    if total is None:
        accumulation = wanted or 1
        return BatchPlan(micro, accumulation, world_size, micro * accumulation * world_size)
    part = micro * world_size
    if total % part:
        micros = [m for m in range(1, total // world_size + 1) if total % (m * world_size) == 0]
        ranks = [w for w in range(1, total // micro + 1) if total % (micro * w) == 0]
        totals = sorted({max(1, total // part) * part, -(-total // part) * part})
        fits = [f"a micro_batch_size of {_short(micros)}"] if micros else []
        fits += [f"{_short(ranks)} ranks"] if ranks else []
        fits += [f"a global_batch_size of {' or '.join(map(str, totals))}"]
        raise ConfigError(
            f"training.global_batch_size={total} is not a multiple of training.micro_batch_size={micro} x {world_size} "
            f"ranks; choose {', or '.join(fits)}"
        )
    accumulation = total // part
    if wanted is not None and wanted != accumulation:
        raise ConfigError(
            f"training.global_batch_size={total} and training.gradient_accumulation_steps={wanted} contradict each "
            f"other: {world_size} rank(s) x {micro} windows x {wanted} are {part * wanted}. Leave one out: "
            f"training.gradient_accumulation_steps=null makes it {accumulation} here"
        )
    return BatchPlan(micro, accumulation, world_size, total)


def windows_per_step(config: dict, world_size: int) -> int:
    """Windows per optimizer step of a run with this plain configuration on this many ranks."""
    training = config["training"]
    return training.get("global_batch_size") or (
        training["micro_batch_size"] * (training.get("gradient_accumulation_steps") or 1) * world_size
    )


def _short(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:12])) + (", ..." if len(numbers) > 12 else "")
