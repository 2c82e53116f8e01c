"""Says what bounds a run and which knob to turn: `python -m training.doctor OUTPUT_DIR [--last N] [--json]`.

Reads the folder of a run that is live, finished or dead, and changes nothing in it. What counts are the steps since
the last start or resume, which config.yaml describes, without the first WARM_UP_STEPS. Each finding comes with its
arithmetic: a gain of "at most 1.8x" is what the run would reach if that cost fell to nothing. Exit code 2 when the
folder holds no run, or no finished step.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Literal

from training.reporting.summary import THROTTLED_SHARE, Gpu, Summary, read, read_mapping

DATA_SHARE = 0.02
"""Of the time. A loader that reads ahead costs less than 0.5 %; four times that is no noise of the clock."""
SAVE_SHARE, SAVE_GOAL = 0.02, 0.01
"""Of the time: worth a word; what a new save_interval is computed for."""
EVAL_SHARE, EVAL_GOAL = 0.05, 0.02
"""As for saves. Evaluations tell something, so they may cost more."""
COMMUNICATION_SHARE = 0.20
"""Of the step. The estimate takes a backward pass for twice its forward. Kernels of attention take up to three times:
were they half of the forward pass, a backward pass of 2.5 times it would look like 14 % of communication."""
OFFLOAD_SHARE = 0.10
"""Of the step. The same update on a GPU is bound by its memory and takes one to a few hundredths."""
IDLE_SHARE = 0.15
"""Of the time, beyond all waits that are known. A tuned run is busy for 90 %, and NVML is right to a few per cent."""
MFU_GOAL = 0.40
"""Of the device's peak: what a tuned configuration of this project is asked to reach."""
MEMORY_USABLE = 0.90
"""Of a device's memory. The allocator needs the rest for fragments, CUDA and NCCL for themselves."""
RETRY_STEPS = 0.05
"""Of the steps. A retry now and then is an odd size; one step in twenty is a pool that is too small."""
SLOW_RANK_SHARE = 0.05
"""Of the step, lost by all ranks to the slowest. Equal ranks on equal cards differ by one or two per cent."""
CLOCK_SHARE = 0.90
"""A card below this share of the others' clock is slowed; cards of one kind differ by a few per cent."""
POWER_CAP_SHARE = 0.50
"""A card that is capped by power above this share of its highest clock does what busy cards do: matrix products at full
power run at 60-90 % of it. Below, the cap has been set low."""
GPU_AT_WORK = 0.05
"""Utilisation of a GPU that belongs to the run; a node may have others, idle."""


# -- what it means ------------------------------------------------------------------------------------

Name = Literal[
    "data-bound",
    "launch-bound",
    "communication-bound",
    "offload-bound",
    "memory pressure",
    "throttled card",
    "mismatched card",
    "slow rank",
    "too small micro-batch",
    "slow kernels",
    "saving too often",
    "evaluating too often",
    "nothing to gain",
]


@dataclass(frozen=True)
class Verdict:
    """gain: throughput over today's, if the cost fell to nothing; hedge: how sure. turn: knobs, the first one first."""

    name: Name
    gain: float
    finding: str
    turn: tuple[str, ...]
    arithmetic: str
    hedge: Literal["at most", "about"] = "at most"


def without(share: float) -> float:
    """How many times faster a run is without this share of its time."""
    return 1 / (1 - min(share, 0.99))


def _said(share: float) -> str:
    return f"1 / (1 - {share:.3f}) = {without(share):.2f}"


def data_bound(s: Summary) -> Verdict | None:
    share = s.total_data / s.total
    if share < DATA_SHARE:
        return None
    workers = s.settings.num_workers
    more = "data.num_workers above what it is" if workers is None else f"data.num_workers={max(1, 2 * workers)}"
    return Verdict(
        "data-bound",
        without(share),
        f"{_percent(share)} of the time was waiting for data: {s.data:.3g} s of a step of {s.step_seconds:.3g} s",
        (
            f"{more} (now {'unknown' if workers is None else workers}), while the machine has idle cores",
            "data.data_dir on a disk of this machine, when it lies on a network",
        ),
        _said(share),
    )


def saving_too_often(s: Summary) -> Verdict | None:
    share = s.total_saves / s.total
    if share < SAVE_SHARE:
        return None
    stall = s.total_saves / s.saves
    background = () if s.settings.async_save else ("training.async_save=true, which waits only for a copy in memory",)
    return Verdict(
        "saving too often",
        without(share),
        f"{_percent(share)} of the time the loop stood still for {s.saves} saves, {stall:.3g} s each",
        (
            *background,
            f"training.save_interval={_interval(stall, s.step_seconds, SAVE_GOAL)} "
            f"(now {s.settings.save_interval}): then saves cost {_percent(SAVE_GOAL)}",
        ),
        _said(share),
    )


def evaluating_too_often(s: Summary) -> Verdict | None:
    share = s.total_evals / s.total
    if share < EVAL_SHARE:
        return None
    stall = s.total_evals / s.evals
    return Verdict(
        "evaluating too often",
        without(share),
        f"{_percent(share)} of the time went into {s.evals} evaluations, {stall:.3g} s each",
        (
            f"training.eval_interval={_interval(stall, s.step_seconds, EVAL_GOAL)} (now {s.settings.eval_interval}): "
            f"then evaluations cost {_percent(EVAL_GOAL)}",
            "training.eval_windows, fewer of them",
        ),
        _said(share),
    )


def _interval(stall: float, step_seconds: float, goal: float) -> int:
    """Steps between stalls so that they take `goal` of the time, rounded up to two digits."""
    steps = stall * (1 - goal) / goal / step_seconds
    digit = 10 ** max(0, math.floor(math.log10(max(1.0, steps))) - 1)
    return max(1, math.ceil(steps / digit) * digit)


def computation(s: Summary) -> float | None:
    """Seconds of a step that computing takes: forward, and of the backward pass no more than that explains.

    A backward pass has twice the matrix products of its forward; with gradient checkpointing it repeats the forward.
    """
    if s.forward is None or s.backward is None:
        return None
    return s.forward + min(s.backward, _passes(s) * s.forward)


def _passes(s: Summary) -> int:
    return 3 if s.settings.gradient_checkpointing else 2


def communication_bound(s: Summary) -> Verdict | None:
    """Excess of backward over computation, and the update, which gathers weights; less what a slow rank explains.

    Gathers of ZeRO 3 in the forward pass are not seen, and the update's own arithmetic is taken for communication.
    """
    c, computing = s.settings, computation(s)
    if c.world_size < 2 or computing is None:
        return None
    excess = s.forward + s.backward - computing
    update = 0.0 if c.offload else s.update or 0.0
    seconds = max(0.0, excess + update - (s.rank_wait or 0.0))
    if seconds < COMMUNICATION_SHARE * s.step_seconds:
        return None
    share, turn = s.share(seconds), []
    if c.zero_stage in (2, 3) and (c.accumulation_steps or 1) > 1:
        size = f"={growth(s) * c.micro_batch_size}" if growth(s) > 1 else ", larger"
        turn = [
            f"training.micro_batch_size{size}: under ZeRO {c.zero_stage} gradients are sent {c.accumulation_steps} "
            f"times per step, with each micro-batch",
            "ds_configs/zero1.json, where it fits: gradients are sent once per step",
        ]
    return Verdict(
        "communication-bound",
        without(share),
        f"{_percent(share)} of the time goes into communication between {c.world_size} ranks that computing does not "
        f"hide: {seconds:.3g} s of a step of {s.step_seconds:.3g} s",
        (*turn, "ds_configs/...: zero_optimization.overlap_comm=true, and a larger reduce_bucket_size"),
        f"backward {s.backward:.3g} s is {excess:.3g} s above {_passes(s)} x forward {s.forward:.3g} s; update "
        f"{update:.3g} s; slowest rank {s.rank_wait or 0.0:.3g} s; {_said(share)}",
        hedge="about",
    )


def offload_bound(s: Summary) -> Verdict | None:
    if s.settings.offload is None or s.update is None or s.update < OFFLOAD_SHARE * s.step_seconds:
        return None
    share, more = s.share(s.update), s.settings.offloaded_gib
    whole = f"ds_configs/zero{s.settings.zero_stage}.json, without offload"
    if more is not None and s.memory_gib is not None and s.device_memory_gib is not None:
        room = MEMORY_USABLE * s.device_memory_gib - s.memory_gib
        whole += f": it takes {more:.1f} GiB more per GPU, and {max(0.0, room):.1f} GiB are free"
        if more > room:
            more_room = "" if s.settings.gradient_checkpointing else "training.gradient_checkpointing=true or "
            whole += f"; make room by {more_room}a smaller training.micro_batch_size"
    return Verdict(
        "offload-bound",
        without(share),
        f"{_percent(share)} of the time the optimizer worked on states in {_PLACES[s.settings.offload]}: "
        f"{s.update:.3g} s of a step of {s.step_seconds:.3g} s",
        (whole, "training.global_batch_size, larger, where they must stay there: fewer updates (it changes the curve)"),
        _said(share),
    )


_PLACES = {"cpu": "host memory", "nvme": "files"}


def memory_pressure(s: Summary) -> Verdict | None:
    r = s.retries
    if r is None or r.steps < RETRY_STEPS * s.steps or not r.steps:
        return None
    gain = max(1.0, s.total / (s.total - s.total_steps + s.steps * r.clean_seconds))
    peak = "" if s.memory_gib is None else f"; peak {s.memory_gib:.1f} GiB"
    of = "" if s.device_memory_gib is None else f" of {s.device_memory_gib:.1f}"
    return Verdict(
        "memory pressure",
        gain,
        f"in {r.steps} of {s.steps} steps the allocator ran out of memory, gave back what it kept and asked again "
        f"({r.total} times){peak}{of}; the next larger request ends the run",
        (
            "training.micro_batch_size, half of it",
            *(() if s.settings.gradient_checkpointing else ("training.gradient_checkpointing=true",)),
            "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True in the environment, against fragments",
        ),
        f"{s.total:.4g} s against {s.steps} steps like those without retries, {r.clean_seconds:.3g} s each: {gain:.2f}",
    )


def _working(s: Summary) -> tuple[Gpu, ...]:
    return tuple(gpu for gpu in s.gpus if gpu.utilisation is None or gpu.utilisation > GPU_AT_WORK)


def slowed(s: Summary) -> list[Gpu]:
    """GPUs that heat, their power supply or a low power cap slows, the slowest first."""
    return sorted(
        (
            gpu
            for gpu in _working(s)
            if (gpu.throttled or 0.0) > THROTTLED_SHARE
            and gpu.clock_mhz
            and gpu.max_clock_mhz
            and (set(gpu.reasons) - {"power cap"} or gpu.clock_mhz < POWER_CAP_SHARE * gpu.max_clock_mhz)
        ),
        key=lambda gpu: gpu.clock_mhz,
    )


def _clock_verdict(s: Summary, name: Name, gpu: Gpu, reference: float, finding: str, turn: str) -> Verdict:
    """All ranks compute at the pace of `gpu`; `reference` is the clock they could have."""
    computing = s.share(computation(s) or s.step_seconds)
    saved = computing * max(0.0, 1 - gpu.clock_mhz / reference)
    how = f"{_percent(computing)} computing at {gpu.clock_mhz:.0f} of {reference:.0f} MHz: {_said(saved)}"
    return Verdict(name, without(saved), finding, (turn,), how)


def throttled_card(s: Summary) -> Verdict | None:
    found = slowed(s)
    if not found:
        return None
    worst = found[0]
    # a card at full power does not reach its highest clock: where there are others, they say what is possible
    free = [gpu.clock_mhz for gpu in _working(s) if gpu not in found and gpu.clock_mhz]
    limit = "" if worst.power_limit_w is None else f", power limit {worst.power_limit_w:.0f} W"
    return _clock_verdict(
        s,
        "throttled card",
        worst,
        median(free) if free else worst.max_clock_mhz,
        f"GPU {', '.join(str(gpu.index) for gpu in found)} slowed down in {_percent(worst.throttled)} of the samples "
        f"({', '.join(worst.reasons) or 'power cap'}): {worst.clock_mhz:.0f} MHz of {worst.max_clock_mhz:.0f}{limit}",
        "cooling and power of the machine, or the card's power limit (nvidia-smi -q -d PERFORMANCE,POWER); no "
        "configuration key mends it",
    )


def mismatched_card(s: Summary) -> Verdict | None:
    """A GPU whose clock lies below the others' for no reason that NVML gives."""
    gpus = [gpu for gpu in _working(s) if gpu.clock_mhz]
    if len(gpus) < 2:
        return None
    slowest = min(gpus, key=lambda gpu: gpu.clock_mhz)
    others = median(gpu.clock_mhz for gpu in gpus if gpu is not slowest)
    if slowest.clock_mhz >= CLOCK_SHARE * others or slowest in slowed(s):
        return None
    limits = {gpu.power_limit_w for gpu in gpus if gpu.power_limit_w is not None}
    differ = f" (power limits from {min(limits):.0f} to {max(limits):.0f} W)" if len(limits) > 1 else ""
    return _clock_verdict(
        s,
        "mismatched card",
        slowest,
        others,
        f"GPU {slowest.index} runs at {slowest.clock_mhz:.0f} MHz, the others at {others:.0f}{differ}: all wait for it",
        "that card's limits (nvidia-smi -q -d CLOCK,POWER,PERFORMANCE), or another card in its place; "
        "CUDA_VISIBLE_DEVICES leaves it out",
    )


def slow_rank(s: Summary) -> Verdict | None:
    if s.settings.world_size < 2 or s.rank_wait is None or s.rank_wait < SLOW_RANK_SHARE * s.step_seconds:
        return None
    share = s.share(s.rank_wait)
    return Verdict(
        "slow rank",
        without(share),
        f"the slowest of {s.settings.world_size} ranks needs {s.rank_wait:.3g} s more than the median for its data and "
        f"forward passes, in a step of {s.step_seconds:.3g} s, and all wait for it",
        (
            "the machine of that rank: other jobs on its cores or GPU, its disk, its card's clock; data.num_workers, when "
            "only its reading is slow",
        ),
        _said(share),
    )


def idle(s: Summary) -> float | None:
    """Share of the time in which the GPUs had nothing to run and no known wait explains it; None without NVML.

    A GPU that waits in a collective counts as busy. Known waits: data, saves, evaluations, what lies between steps
    ("other"), and an update in host memory.
    """
    busy = [gpu.utilisation for gpu in _working(s) if gpu.utilisation is not None]
    if not busy:
        return None
    waits = (s.other or 0.0) + (s.update or 0.0 if s.settings.offload else 0.0)
    known = s.share(waits) + (s.total_data + s.total_saves + s.total_evals) / s.total
    return max(0.0, 1 - median(busy) - known)


def launch_bound(s: Summary) -> Verdict | None:
    """Gaps between kernels: the host is slower at launching them than the GPU at running them."""
    share = idle(s)
    if share is None or share < IDLE_SHARE:
        return None
    # torch.compile and the gathers of ZeRO 3 exclude each other here
    can_compile = not s.settings.compile and s.settings.zero_stage != 3
    turn = ["training.compile=true: fewer, larger kernels"] if can_compile else []
    if s.settings.backend in ("chunked", "reference"):
        turn.append(f"training.backend=triton (now {s.settings.backend}): one kernel where that has many")
    if (factor := growth(s)) > 1:
        turn.append(f"training.micro_batch_size={factor * s.settings.micro_batch_size}: as many launches for more work")
    return Verdict(
        "launch-bound",
        without(share),
        f"{_percent(share)} of the time the GPUs had nothing to run, and no wait explains it: the host launches many "
        f"small kernels and does not keep up",
        tuple(turn) or ("a faster host core, or fewer other jobs on it",),
        f"busy {_percent(1 - share)} with data, saves, evaluations and what lies between steps added: {_said(share)}",
    )


def growth(s: Summary) -> int:
    """By how much the micro-batch can grow at the same global batch: memory is taken to grow with all of it.

    1 where it cannot, or nobody knows.
    """
    micro, steps = s.settings.micro_batch_size, s.settings.accumulation_steps
    if not (s.on_gpu and micro and steps and s.memory_gib and s.device_memory_gib):
        return 1
    room = MEMORY_USABLE * s.device_memory_gib / s.memory_gib
    return max(f for f in range(1, steps + 1) if steps % f == 0 and (f == 1 or f <= room))


def _mfu_of_computing(s: Summary) -> float | None:
    """MFU within computation alone: a run that waits has a low MFU, and kernels with nothing wrong."""
    computing = computation(s)
    return s.mfu * s.step_seconds / computing if s.mfu is not None and computing else None


def too_small_micro_batch(s: Summary) -> Verdict | None:
    """Kernels too small to fill the GPU, memory left, and micro-batches to merge."""
    factor, mfu = growth(s), _mfu_of_computing(s)
    gap = idle(s) or 0.0
    if factor < 2 or (gap < IDLE_SHARE if mfu is None else mfu >= MFU_GOAL):
        return None
    if mfu is None:
        saved = gap * (1 - 1 / factor)
        arithmetic = f"{_percent(gap)} idle, in 1 / {factor} as many micro-batches: {_said(saved)}"
    else:
        computing = s.share(computation(s))
        # a micro-batch of f times the tokens is no faster than one of them, nor beyond the goal
        left = max(1 / factor, mfu / MFU_GOAL)
        saved = computing * (1 - left)
        arithmetic = (
            f"{_percent(computing)} computing at {_percent(mfu)} of the peak; the larger of 1 / {factor} and "
            f"{_percent(mfu)} / {_percent(MFU_GOAL)} of it is left: {_said(saved)}"
        )
    size = s.settings.micro_batch_size
    return Verdict(
        "too small micro-batch",
        without(saved),
        f"micro-batch {size} takes {s.memory_gib:.1f} of {s.device_memory_gib:.1f} GiB and does not fill the GPU"
        + ("" if mfu is None else f" ({_percent(mfu)} of its peak while computing)"),
        (
            f"training.micro_batch_size={factor * size} (now {size}), with training.gradient_accumulation_steps="
            f"{s.settings.accumulation_steps // factor}: the same global batch. training.plan counts whether more fits",
        ),
        arithmetic,
    )


def slow_kernels(s: Summary) -> Verdict | None:
    mfu = _mfu_of_computing(s)
    if not s.on_gpu or mfu is None or mfu >= MFU_GOAL or s.settings.backend not in ("chunked", "reference"):
        return None
    saved = s.share(computation(s)) * (1 - mfu / MFU_GOAL)
    return Verdict(
        "slow kernels",
        without(saved),
        f"attention runs on the {s.settings.backend} kernels, and computing reaches {_percent(mfu)} of the peak",
        ("training.backend=triton; auto says at the start why it took another one",),
        f"computing would shrink to {_percent(mfu)} / {_percent(MFU_GOAL)}: {_said(saved)}",
    )


CHECKS: tuple[Callable[[Summary], Verdict | None], ...] = (
    data_bound,
    launch_bound,
    communication_bound,
    offload_bound,
    memory_pressure,
    throttled_card,
    mismatched_card,
    slow_rank,
    too_small_micro_batch,
    slow_kernels,
    saving_too_often,
    evaluating_too_often,
)


def diagnose(s: Summary) -> list[Verdict]:
    """All that holds, the largest gain first; "nothing to gain" alone when nothing does.

    Each gain is of its cost alone: two of them together are less than their product.
    """
    found = [verdict for check in CHECKS if (verdict := check(s)) is not None]
    return sorted(found, key=lambda verdict: -verdict.gain) or [nothing_to_gain(s)]


def nothing_to_gain(s: Summary) -> Verdict:
    computing = computation(s)
    facts = [] if computing is None else [f"forward and backward take {_percent(s.share(computing))} of the time"]
    facts += [] if s.mfu is None else [f"MFU is {_percent(s.mfu)}"]
    low = s.mfu is not None and s.mfu < MFU_GOAL
    return Verdict(
        "nothing to gain",
        1.0,
        "no cost that is known here is worth a change" + "".join(f"; {fact}" for fact in facts),
        (f"a profiler: the goal is {_percent(MFU_GOAL)}, and nothing here explains the rest",) if low else (),
        f"{len(CHECKS)} checks, none above its threshold",
    )


# -- telling ------------------------------------------------------------------------------------------


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share < 0.0995 else f"{100 * share:.0f} %"


def budget(s: Summary) -> dict[str, float]:
    """Shares of the time by part; those of a step by its medians, "rest" being what they leave."""
    parts = {"data": s.data, "forward": s.forward, "backward": s.backward, "update": s.update, "other": s.other}
    shares = {name: s.share(seconds) for name, seconds in parts.items() if seconds is not None}
    shares |= {"save": s.total_saves / s.total, "evaluation": s.total_evals / s.total}
    return shares | {"rest": max(0.0, 1 - sum(shares.values()))}


def tell(folder: Path, run: dict, s: Summary, verdicts: Sequence[Verdict], notes: Sequence[str]) -> str:
    c = s.settings
    where = f"{c.world_size} x {s.device or 'device unknown'}, ZeRO {'?' if c.zero_stage is None else c.zero_stage}"
    batch = f"micro-batch {c.micro_batch_size or '?'} x {c.accumulation_steps or '?'}"
    live = run.get("status") == "running" and s.written is not None
    ago = f", last row {time.time() - s.written:.0f} s ago" if live else ""
    state = f"{run.get('status', 'state unknown')}{ago}" + (f" ({run['reason']})" if run.get("reason") else "")
    lines = [
        f"{folder}: {state}; {where}, {batch}",
        f"steps {s.first} to {s.last}, {s.step_seconds:.3g} s each: "
        + ", ".join(f"{name} {_percent(share)}" for name, share in budget(s).items() if share >= 0.0005),
        *(f"note: {note}" for note in notes),
    ]
    for number, v in enumerate(verdicts, 1):
        gain = f": {v.hedge} {v.gain:.2f}x" if v.name != "nothing to gain" else ""
        lines += ["", f"{number}. {v.name}{gain}", f"   {v.finding}."]
        lines += [f"   {'turn' if i == 0 else '  or'}: {knob}" for i, knob in enumerate(v.turn)]
        lines.append(f"   how: {v.arithmetic}")
    return "\n".join(lines)


def unseen(s: Summary) -> list[str]:
    """What could not be looked for, as notes."""
    notes = []
    if s.on_gpu and not s.gpus:
        notes.append(
            "rows have no gpu/... fields (pip install nvidia-ml-py): launch-bound runs and slowed cards are unseen"
        )
    if s.on_gpu and s.mfu is None:
        notes.append("rows have no mfu: small micro-batches and slow kernels are judged without it")
    return notes


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="training.doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="OUTPUT_DIR", help="the folder of a run")
    parser.add_argument("--last", type=positive_number, metavar="N", help="judge the last N steps only")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    try:
        summary, notes = read(args.run, args.last)
    except ValueError as err:
        print(f"error: {err}", file=sys.stderr)
        return 2
    run = read_mapping(args.run / "run.json", json.loads, [])
    verdicts, notes = diagnose(summary), notes + unseen(summary)
    if args.json:
        print(
            json.dumps(
                {
                    "run": str(args.run),
                    "status": run.get("status"),
                    "summary": asdict(summary),
                    "budget": budget(summary),
                    "verdicts": [asdict(verdict) for verdict in verdicts],
                    "notes": notes,
                },
                indent=2,
            )
        )
    else:
        print(tell(args.run, run, summary, verdicts, notes))
    return 0


def positive_number(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is no number of steps: at least 1")
    return number


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
