"""What bounds a run and which setting to change: a verdict for each cost, with its arithmetic.

Every check reads a Summary. A gain is what the run would reach if that cost fell to nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from training.record.metrics_log import DamagedRowsError
from training.record.reader import NoRunError, Record
from training.reporting.format import percent
from training.reporting.summary import THROTTLED_SHARE, Gpu, Summary, summarise

DATA_SHARE = 0.02
"""Data loading above this share of the time is reported. A healthy loader that reads ahead costs less than 0.5 %; 2 %
is well above the noise of the clock."""
SAVE_SHARE, SAVE_GOAL = 0.02, 0.01
"""Saves above the first share of the time are reported; the proposed save_interval brings them down to the second."""
EVAL_SHARE, EVAL_GOAL = 0.05, 0.02
"""The same for evaluations. They yield information, so they may cost more."""
COMMUNICATION_SHARE = 0.20
"""Share of the step. The estimate assumes that a backward pass takes twice its forward. Attention kernels take up to
three times: if they were half of the forward pass, a backward pass of 2.5 times would look like 14 % of
communication."""
OFFLOAD_SHARE = 0.10
"""Share of the step. The same update on a GPU is bound by memory bandwidth and takes one to a few per cent."""
IDLE_SHARE = 0.15
"""Idle share of the time beyond all known waits. A tuned run is busy for 90 %, and NVML is right to a few per cent."""
MFU_GOAL = 0.40
"""Share of the device's peak that a tuned configuration of this project should reach."""
MEMORY_USABLE = 0.90
"""Share of a device's memory. The rest goes to fragmentation, to CUDA and to NCCL."""
RETRY_STEPS = 0.05
"""Share of the steps. A rare retry is an unusual size; one step in twenty means that memory is too small."""
SLOW_RANK_SHARE = 0.05
"""Share of the step that all ranks lose to the slowest. Equal ranks on equal cards differ by one or two per cent."""
CLOCK_SHARE = 0.90
"""A card below this share of the others' clock is reported; cards of one kind differ by a few per cent."""
POWER_CAP_SHARE = 0.50
"""A card at its power cap that still runs above this share of its highest clock behaves like any busy card: matrix
products at full power run at 60-90 % of it. Below this share, the cap has been set low."""
GPU_AT_WORK = 0.05
"""Utilisation above which a GPU belongs to the run; a node may have others, which are idle."""

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
    """One cost. gain: throughput relative to today's if the cost fell to nothing; hedge: how certain that is.

    turn: what to change, the best first.
    """

    name: Name
    gain: float
    finding: str
    turn: tuple[str, ...]
    arithmetic: str
    hedge: Literal["at most", "about"] = "at most"


@dataclass(frozen=True)
class Diagnosis:
    """The verdicts on a run, or in `missing` why there are none."""

    verdicts: tuple[Verdict, ...] = ()
    notes: tuple[str, ...] = ()
    missing: str | None = None


def diagnose_record(record: Record) -> Diagnosis:
    """The diagnosis of whatever the folder holds; does not raise."""
    try:
        summary, notes = summarise(record)
        return Diagnosis(tuple(diagnose(summary)), (*notes, *blind_spots(summary)))
    except (NoRunError, DamagedRowsError) as err:
        return Diagnosis(missing=str(err))
    except ArithmeticError as err:  # rows edited by hand, such as clocks below zero
        return Diagnosis(missing=f"the numbers in the rows contradict each other ({err})")


def diagnose(s: Summary) -> list[Verdict]:
    """Every cost above its threshold, the largest gain first; "nothing to gain" alone when there is none.

    Each gain is that of its cost alone: two of them together are less than their product.
    """
    found = [verdict for check in CHECKS if (verdict := check(s)) is not None]
    return sorted(found, key=lambda verdict: -verdict.gain) or [nothing_to_gain(s)]


def blind_spots(s: Summary) -> list[str]:
    """Notes on what could not be checked."""
    notes = []
    if s.on_gpu and not s.gpus:
        notes.append(
            "rows have no gpu/... fields (pip install nvidia-ml-py): launch-bound runs and slowed cards are not seen"
        )
    if s.on_gpu and s.mfu is None:
        notes.append("rows have no mfu: small micro-batches and slow kernels are looked for without it")
    return notes


def time_shares(s: Summary) -> dict[str, float]:
    """Shares of the time by part; those of a step by its medians, and "rest" for what is left."""
    parts = {"data": s.data, "forward": s.forward, "backward": s.backward, "update": s.update, "other": s.other}
    shares = {name: s.share(seconds) for name, seconds in parts.items() if seconds is not None}
    shares |= {"save": s.total_saves / s.total, "evaluation": s.total_evals / s.total}
    return shares | {"rest": max(0.0, 1 - sum(shares.values()))}


def render(record: Record, s: Summary, verdicts: Sequence[Verdict], notes: Sequence[str]) -> str:
    """The diagnosis as text for a terminal."""
    c, run = s.settings, record.run_json
    where = f"{_or_unknown(c.world_size)} x {s.device or 'device unknown'}, ZeRO {_or_unknown(c.zero_stage)}"
    batch = f"micro-batch {_or_unknown(c.micro_batch_size)} x {_or_unknown(c.accumulation_steps)}"
    live = run.get("status") == "running" and s.written is not None
    ago = f", last row {record.read_at - s.written:.0f} s ago" if live else ""
    state = f"{run.get('status', 'state unknown')}{ago}" + (f" ({run['reason']})" if run.get("reason") else "")
    lines = [
        f"{record.folder}: {state}; {where}, {batch}",
        f"steps {s.first} to {s.last}, {s.step_seconds:.3g} s each: "
        + ", ".join(f"{name} {percent(share)}" for name, share in time_shares(s).items() if share >= 0.0005),
        *(f"note: {note}" for note in notes),
    ]
    for number, v in enumerate(verdicts, 1):
        gain = f": {v.hedge} {v.gain:.2f}x" if v.name != "nothing to gain" else ""
        lines += ["", f"{number}. {v.name}{gain}", f"   {v.finding}."]
        lines += [f"   {'change' if i == 0 else '    or'}: {setting}" for i, setting in enumerate(v.turn)]
        lines.append(f"   how: {v.arithmetic}")
    return "\n".join(lines)


def _or_unknown(value: int | None) -> str:
    return "?" if value is None else str(value)


# -- the checks ---------------------------------------------------------------------------------------


def without(share: float) -> float:
    """How many times faster a run is without this share of its time."""
    return 1 / (1 - min(share, 0.99))


def _without(share: float) -> str:
    return f"1 / (1 - {share:.3f}) = {without(share):.2f}"


def data_bound(s: Summary) -> Verdict | None:
    share = s.total_data / s.total
    if share < DATA_SHARE:
        return None
    workers = s.settings.num_workers
    more = "a larger data.num_workers" if workers is None else f"data.num_workers={max(1, 2 * workers)}"
    return Verdict(
        "data-bound",
        without(share),
        f"{percent(share)} of the time was waiting for data: {s.data:.3g} s of a step of {s.step_seconds:.3g} s",
        (
            f"{more} (now {'unknown' if workers is None else workers}), while the machine has idle cores",
            "data.data_dir on a local disk, if it lies on a network",
        ),
        _without(share),
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
        f"{percent(share)} of the time training stood still for {s.saves} saves, {stall:.3g} s each",
        (
            *background,
            f"training.save_interval={_interval(stall, s.step_seconds, SAVE_GOAL)} "
            f"(now {_or_unknown(s.settings.save_interval)}): then saves cost {percent(SAVE_GOAL)}",
        ),
        _without(share),
    )


def evaluating_too_often(s: Summary) -> Verdict | None:
    share = s.total_evals / s.total
    if share < EVAL_SHARE:
        return None
    stall = s.total_evals / s.evals
    return Verdict(
        "evaluating too often",
        without(share),
        f"{percent(share)} of the time went into {s.evals} evaluations, {stall:.3g} s each",
        (
            f"training.eval_interval={_interval(stall, s.step_seconds, EVAL_GOAL)} "
            f"(now {_or_unknown(s.settings.eval_interval)}): then evaluations cost {percent(EVAL_GOAL)}",
            "training.eval_windows, fewer of them",
        ),
        _without(share),
    )


def _interval(stall: float, step_seconds: float, goal: float) -> int:
    """Steps between stalls so that they take `goal` of the time, rounded up to two digits."""
    steps = stall * (1 - goal) / goal / step_seconds
    digit = 10 ** max(0, math.floor(math.log10(max(1.0, steps))) - 1)
    return max(1, math.ceil(steps / digit) * digit)


def computation(s: Summary) -> float | None:
    """Seconds of a step that go into computing: the forward pass, and as much of the backward pass as that explains.

    A backward pass has twice the matrix products of its forward; with gradient checkpointing it repeats the forward.
    """
    if s.forward is None or s.backward is None:
        return None
    return s.forward + min(s.backward, _backward_over_forward(s) * s.forward)


def _backward_over_forward(s: Summary) -> int:
    return 3 if s.settings.gradient_checkpointing else 2


def communication_bound(s: Summary) -> Verdict | None:
    """The backward pass beyond computation, and the update, which gathers weights; less what a slow rank explains.

    ZeRO 3's gathers in the forward pass are not seen, and the update's own arithmetic counts as communication.
    """
    c, computing = s.settings, computation(s)
    if (c.world_size or 1) < 2 or computing is None:
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
            "ds_configs/zero1.json, if it fits: gradients are sent once per step",
        ]
    return Verdict(
        "communication-bound",
        without(share),
        f"{percent(share)} of the time goes into communication between {c.world_size} ranks that does not overlap with "
        f"computing: {seconds:.3g} s of a step of {s.step_seconds:.3g} s",
        (*turn, "ds_configs/...: zero_optimization.overlap_comm=true, and a larger reduce_bucket_size"),
        f"backward {s.backward:.3g} s is {excess:.3g} s above {_backward_over_forward(s)} x forward {s.forward:.3g} s; "
        f"update {update:.3g} s; slowest rank {s.rank_wait or 0.0:.3g} s; {_without(share)}",
        hedge="about",
    )


def offload_bound(s: Summary) -> Verdict | None:
    if s.settings.offload is None or s.update is None or s.update < OFFLOAD_SHARE * s.step_seconds:
        return None
    share, more = s.share(s.update), s.offloaded_gib
    whole = f"ds_configs/zero{s.settings.zero_stage}.json, without offload"
    if more is not None and s.memory_gib is not None and s.device_memory_gib is not None:
        room = MEMORY_USABLE * s.device_memory_gib - s.memory_gib
        whole += f": it takes {more:.1f} GiB more per GPU, and {max(0.0, room):.1f} GiB are free"
        if more > room:
            checkpointing = "" if s.settings.gradient_checkpointing else "training.gradient_checkpointing=true or "
            whole += f"; make room by {checkpointing}a smaller training.micro_batch_size"
    return Verdict(
        "offload-bound",
        without(share),
        f"{percent(share)} of the time the optimizer worked on states in {_PLACES[s.settings.offload]}: "
        f"{s.update:.3g} s of a step of {s.step_seconds:.3g} s",
        (
            whole,
            "a larger training.global_batch_size, if the states must stay there: fewer updates (it changes the curve)",
        ),
        _without(share),
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
        f"in {r.steps} of {s.steps} steps the allocator ran out of memory, freed its cache and tried again "
        f"({r.total} times){peak}{of}; the next larger request ends the run",
        (
            "training.micro_batch_size, half of it",
            *(() if s.settings.gradient_checkpointing else ("training.gradient_checkpointing=true",)),
            "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True in the environment, against fragmentation",
        ),
        f"{s.total:.4g} s against {s.steps} steps like those without retries, {r.clean_seconds:.3g} s each: {gain:.2f}",
    )


def _working(s: Summary) -> tuple[Gpu, ...]:
    return tuple(gpu for gpu in s.gpus if gpu.utilisation is None or gpu.utilisation > GPU_AT_WORK)


def slowed(s: Summary) -> list[Gpu]:
    """GPUs slowed by heat, by their power supply or by a low power cap, the slowest first."""
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
    """All ranks compute at the pace of `gpu`; `reference` is the clock that they could have."""
    computing = s.share(computation(s) or s.step_seconds)
    saved = computing * max(0.0, 1 - gpu.clock_mhz / reference)
    how = f"{percent(computing)} computing at {gpu.clock_mhz:.0f} of {reference:.0f} MHz: {_without(saved)}"
    return Verdict(name, without(saved), finding, (turn,), how)


def throttled_card(s: Summary) -> Verdict | None:
    found = slowed(s)
    if not found:
        return None
    worst = found[0]
    # a card at full power does not reach its highest clock: the other cards, if there are any, show what is possible
    free = [gpu.clock_mhz for gpu in _working(s) if gpu not in found and gpu.clock_mhz]
    limit = "" if worst.power_limit_w is None else f", power limit {worst.power_limit_w:.0f} W"
    return _clock_verdict(
        s,
        "throttled card",
        worst,
        median(free) if free else worst.max_clock_mhz,
        f"GPU {', '.join(str(gpu.index) for gpu in found)} slowed down in {percent(worst.throttled)} of the samples "
        f"({', '.join(worst.reasons) or 'power cap'}): {worst.clock_mhz:.0f} MHz of {worst.max_clock_mhz:.0f}{limit}",
        "cooling and power of the machine, or the card's power limit (nvidia-smi -q -d PERFORMANCE,POWER); no "
        "configuration key changes this",
    )


def mismatched_card(s: Summary) -> Verdict | None:
    """A GPU whose clock lies below the others' without a reason from NVML."""
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
    ranks = s.settings.world_size or 1
    if ranks < 2 or s.rank_wait is None or s.rank_wait < SLOW_RANK_SHARE * s.step_seconds:
        return None
    share = s.share(s.rank_wait)
    return Verdict(
        "slow rank",
        without(share),
        f"the slowest of {ranks} ranks needs {s.rank_wait:.3g} s more than the median for its data and forward passes, "
        f"in a step of {s.step_seconds:.3g} s, and all wait for it",
        (
            "the machine of that rank: other jobs on its cores or GPU, its disk, its card's clock; data.num_workers, "
            "if only its reading is slow",
        ),
        _without(share),
    )


def idle(s: Summary) -> float | None:
    """Share of the time in which the GPUs had nothing to run and no known wait explains it; None without NVML.

    A GPU that waits in a collective counts as busy. Known waits: data, saves, evaluations, the time between steps
    ("other"), and an update in host memory.
    """
    busy = [gpu.utilisation for gpu in _working(s) if gpu.utilisation is not None]
    if not busy:
        return None
    waits = (s.other or 0.0) + (s.update or 0.0 if s.settings.offload else 0.0)
    known = s.share(waits) + (s.total_data + s.total_saves + s.total_evals) / s.total
    return max(0.0, 1 - median(busy) - known)


def launch_bound(s: Summary) -> Verdict | None:
    """Gaps between kernels: the host launches them more slowly than the GPU runs them."""
    share = idle(s)
    if share is None or share < IDLE_SHARE:
        return None
    # this project does not combine torch.compile with ZeRO 3's gathers
    can_compile = not s.settings.compile and s.settings.zero_stage != 3
    turn = ["training.compile=true: fewer, larger kernels"] if can_compile else []
    if s.settings.backend in ("chunked", "reference"):
        turn.append(f"training.backend=triton (now {s.settings.backend}): one kernel in place of many")
    if (factor := growth(s)) > 1:
        turn.append(f"training.micro_batch_size={factor * s.settings.micro_batch_size}: as many launches for more work")
    return Verdict(
        "launch-bound",
        without(share),
        f"{percent(share)} of the time the GPUs had nothing to run, and no wait explains it: the host launches many "
        f"small kernels and does not keep up",
        tuple(turn) or ("a faster host core, or fewer other jobs on it",),
        f"busy {percent(1 - share)} with data, saves, evaluations and the time between steps added: {_without(share)}",
    )


def growth(s: Summary) -> int:
    """The factor by which the micro-batch can grow at the same global batch, if all memory grows with it.

    1 where it cannot grow, or where that is unknown.
    """
    micro, steps = s.settings.micro_batch_size, s.settings.accumulation_steps
    if not (s.on_gpu and micro and steps and s.memory_gib and s.device_memory_gib):
        return 1
    room = MEMORY_USABLE * s.device_memory_gib / s.memory_gib
    return max(f for f in range(1, steps + 1) if steps % f == 0 and (f == 1 or f <= room))


def _mfu_of_computing(s: Summary) -> float | None:
    """MFU within computation alone: a run that waits has a low MFU although nothing is wrong with its kernels."""
    computing = computation(s)
    return s.mfu * s.step_seconds / computing if s.mfu is not None and computing else None


def too_small_micro_batch(s: Summary) -> Verdict | None:
    """Kernels too small to fill the GPU, while memory is left and there are micro-batches to merge."""
    factor, mfu = growth(s), _mfu_of_computing(s)
    gap = idle(s) or 0.0
    if factor < 2 or (gap < IDLE_SHARE if mfu is None else mfu >= MFU_GOAL):
        return None
    if mfu is None:
        saved = gap * (1 - 1 / factor)
        arithmetic = f"{percent(gap)} idle, in 1 / {factor} as many micro-batches: {_without(saved)}"
    else:
        computing = s.share(computation(s))
        # a micro-batch of f times the tokens takes at least as long as one of them, and does not exceed the goal
        left = max(1 / factor, mfu / MFU_GOAL)
        saved = computing * (1 - left)
        arithmetic = (
            f"{percent(computing)} computing at {percent(mfu)} of the peak; the larger of 1 / {factor} and "
            f"{percent(mfu)} / {percent(MFU_GOAL)} of it is left: {_without(saved)}"
        )
    size = s.settings.micro_batch_size
    return Verdict(
        "too small micro-batch",
        without(saved),
        f"micro-batch {size} takes {s.memory_gib:.1f} of {s.device_memory_gib:.1f} GiB and does not fill the GPU"
        + ("" if mfu is None else f" ({percent(mfu)} of its peak while computing)"),
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
        f"attention runs on the {s.settings.backend} kernels, and computing reaches {percent(mfu)} of the peak",
        ("training.backend=triton; with auto, the start of the run prints why it chose another one",),
        f"computing would shrink to {percent(mfu)} / {percent(MFU_GOAL)}: {_without(saved)}",
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


def nothing_to_gain(s: Summary) -> Verdict:
    computing = computation(s)
    facts = [] if computing is None else [f"forward and backward take {percent(s.share(computing))} of the time"]
    facts += [] if s.mfu is None else [f"MFU is {percent(s.mfu)}"]
    low = s.mfu is not None and s.mfu < MFU_GOAL
    return Verdict(
        "nothing to gain",
        1.0,
        "no known cost is worth a change" + "".join(f"; {fact}" for fact in facts),
        (f"a profiler: the goal is {percent(MFU_GOAL)}, and nothing here explains the rest",) if low else (),
        f"{len(CHECKS)} checks, none above its threshold",
    )
