"""Every metric and event of metrics.jsonl, with unit and meaning: the tables that docs/metrics.md is made of."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    unit: str
    meaning: str


STEP_METRICS: dict[str, Metric] = {
    "step": Metric("optimizer steps", "steps finished, this one included"),
    "epoch": Metric("passes", "fractional passes over the training text so far"),
    "samples": Metric("windows", "training windows consumed so far, over all ranks"),
    "tokens": Metric("tokens", "token positions consumed so far (samples x max_seq_len)"),
    "loss": Metric("nats/token", "next-token cross-entropy of the step's global batch, mean over valid targets"),
    "spike_score": Metric("deviations", "the loss above the mean of the last 1000 steps; 0 while under 50 are known"),
    "indexer_loss": Metric("nats/row", "alignment KL of the indexer, mean over layers and sampled rows"),
    "grad_norm": Metric("1", "global L2 norm of the gradient before clipping"),
    "lr": Metric("1", "learning rate of the main groups in this step"),
    "lr_indexer": Metric("1", "learning rate of the indexer's groups in this step"),
    "stage": Metric("dense or sparse", "what attention ran over: all visible keys, or the selected ones"),
    "selected_k": Metric("keys", "mean number of keys attended to per query, over layers"),
    "visible_k": Metric("keys", "mean number of keys a query could attend to: those of its document so far"),
    "tokens_per_s": Metric("tokens/s", "throughput of the whole cluster in this step"),
    "tokens_per_s_per_device": Metric("tokens/s", "the same per device"),
    "mfu": Metric("share", "useful arithmetic of the step over what the devices' peak could do in its time"),
    "seconds": Metric("s", "wall time of the step; its parts follow"),
    "seconds_data": Metric("s", "waiting for the loader and copying to the device"),
    "seconds_forward": Metric("s", "forward passes"),
    "seconds_backward": Metric("s", "backward passes, with the communication in them"),
    "seconds_step": Metric("s", "optimizer step, with the communication in it"),
    "seconds_other": Metric("s", "the rest of the step: the collective of its metrics, bookkeeping"),
    "seconds_save": Metric("s", "the loop stood still for a save since the step before; not in `seconds`"),
    "seconds_eval": Metric("s", "the same for an evaluation, and for samples"),
    "rank_seconds_slowest": Metric("s", "data and forward of the step before, on the slowest rank"),
    "rank_seconds_median": Metric("s", "the same on the median rank"),
    "memory_gib": Metric("GiB", "peak device memory allocated on rank 0; on CPU its peak resident memory"),
    "time": Metric("unix s", "when the row was written"),
}
PROBE_METRICS: dict[str, Metric] = {
    "indexer/coverage": Metric("share", "dense attention mass on the selected keys, mean over layers"),
    "indexer/coverage_worst": Metric("share", "the same, in the layer where it is least"),
    "indexer/oracle": Metric("share", "the same for as many keys of largest mass: what a perfect indexer covers"),
    "indexer/recall": Metric("share", "selected keys among those of largest mass, mean over layers"),
    "gate/value_saturation": Metric("share", "value gates below 0.05 or above 0.95, mean over layers"),
    "gate/output_saturation": Metric("share", "output gates below 0.05 or above 0.95, mean over layers"),
    "attention/first_token": Metric("share", "attention on the first token of the document, mean over layers"),
    "layers": Metric("share", "lists by layer: coverage, oracle, recall, value_ and output_saturation, first_token"),
}
"""In the rows of every probe_interval-th step, where the model has the part: measured on PROBED_ROWS queries of one
sequence of every rank."""

HEALTH_METRICS: dict[str, Metric] = {
    "grad_norm/indexer": Metric("1", "L2 norm of the indexer's part of the gradient, before clipping"),
    "grad_norm/gates": Metric("1", "the same of the gates"),
    "grad_norm/rest": Metric("1", "the same of everything else"),
    "update_ratio/main": Metric("1", "norm of the step's change of the main matrices over their norm, on a sample"),
    "update_ratio/indexer": Metric("1", "the same of the indexer's matrices"),
}
"""In the rows of every health_interval-th step. Not where gradients leave the device (offload)."""

GPU_METRICS: dict[str, Metric] = {
    "allocator_retries": Metric("1", "times the allocator emptied its cache to go on since the row before; worst rank"),
    "gpu/{i}/utilisation": Metric("share", "time in which any kernel ran, by NVML"),
    "gpu/{i}/power_w": Metric("W", "power drawn"),
    "gpu/{i}/power_limit_w": Metric("W", "power limit in force"),
    "gpu/{i}/clock_mhz": Metric("MHz", "clock of the multiprocessors"),
    "gpu/{i}/max_clock_mhz": Metric("MHz", "its maximum"),
    "gpu/{i}/memory_gib": Metric("GiB", "memory in use, by all processes"),
    "gpu/{i}/temperature_c": Metric("degrees C", "temperature of the chip"),
    "gpu/{i}/throttled": Metric("share", "samples in which power or heat held the clocks down"),
    "gpu/{i}/throttle_reasons": Metric("text", "by what; absent when nothing did"),
}
"""On GPUs only; {i} counts the GPUs of rank 0's node. Means over the samples since the row before."""

TIME_METRICS = frozenset(
    k for k in STEP_METRICS if k.startswith(("seconds", "tokens_per_s", "memory", "time", "mfu", "rank_seconds"))
)
"""Metrics that may differ between two runs that are otherwise the same."""


def is_timing(name: str) -> bool:
    """Whether a field of a step row may differ between two runs that are otherwise the same."""
    return name in TIME_METRICS or name in GPU_METRICS or name.startswith("gpu/")


@dataclass(frozen=True)
class Event:
    """meaning: when it is told. fields: beside "event", "step" (finished by then) and "time" (unix s)."""

    meaning: str
    fields: dict[str, Metric]


_LAUNCH = {
    "world_size": Metric("ranks", "processes, one per device"),
    "zero_stage": Metric("0 to 3", "ZeRO stage"),
    "segment": Metric("launches", "launches of this run before this one"),
    "config": Metric("mapping", "the whole configuration of the launch, by section"),
}
EVENTS: dict[str, Event] = {
    "start": Event("a process group began training", _LAUNCH),
    "resume": Event(
        "a checkpoint was loaded",
        {
            **_LAUNCH,
            "checkpoint": Metric("tag", "its name"),
            "rows_moved": Metric("rows", "rows of later steps that went to segments/"),
            "config_diff": Metric("mapping", "key: [in the checkpoint, now]"),
        },
    ),
    "device": Event(
        "what runs it",
        {
            "name": Metric("text", "the device's name"),
            "world_size": Metric("devices", "how many"),
            "memory_gib": Metric("GiB", "memory of one"),
            "peak_tflops": Metric("10^12/s", "its peak at the run's precision"),
            "peak_source": Metric("text", "`table`, or `measured` by a matrix product"),
        },
    ),
    "predicted": Event(
        "a few steps in: training.plan's count beside what rank 0 measures",
        {
            "memory_gib": Metric("GiB", "counted"),
            "measured_gib": Metric("GiB", "measured; on a CPU what the process grew by since before the model"),
            "seconds": Metric("s", "predicted per step, on Triton's kernels and a device in the table"),
            "measured_seconds": Metric("s", "measured"),
        },
    ),
    "eval": Event(
        "held-out text was scored",
        {
            "eval_loss": Metric("nats/token", "cross-entropy, mean over target tokens, with sparse attention"),
            "eval_bpb": Metric("bits/byte", "what the model needs for each UTF-8 byte of held-out text"),
            "eval_loss_dense": Metric("nats/token", "in the dense stage: the loss with dense attention"),
            "eval_bpb_dense": Metric("bits/byte", "in the dense stage: bits per byte with dense attention"),
            "eval_tokens": Metric("tokens", "target tokens scored"),
            "unigram_bpb": Metric("bits/byte", "what the best model without context needs"),
            "eval_seconds": Metric("s", "wall time"),
        },
    ),
    "save": Event(
        "a checkpoint was published; step is its own",
        {
            "tag": Metric("tag", "its folder"),
            "bytes": Metric("bytes", "its size"),
            "save_stall_seconds": Metric("s", "the loop stood still"),
            "save_background_seconds": Metric("s", "from then to publication"),
            "save_background_cpu_seconds": Metric("s", "CPU time of rank 0's writer"),
        },
    ),
    "spike": Event(
        "a loss beyond training.spike_sigmas, or none at all",
        {
            "spike_loss": Metric("nats/token", "the loss"),
            "score": Metric("deviations", "above the mean of the steps before"),
            "samples": Metric("windows", "[first, last] of the step"),
            "action": Metric("text", "`log`, `skip` (the update was dropped) or `rollback`"),
            "checkpoint": Metric("tag", "what a rollback went back to"),
        },
    ),
    "receipt": Event(
        "the steps that a resume trained again are over",
        {
            "compared": Metric("steps", "held against the rows of the dead segment"),
            "identical": Metric("yes or no", "every number of every one"),
            "first_difference": Metric("mapping", "step, field, before, now"),
        },
    ),
    "sample": Event(
        "a fixed prompt was continued by the model, greedily",
        {"prompt": Metric("text", "the prompt"), "text": Metric("text", "what the model added")},
    ),
    "stop": Event("the run ended in order", {"reason": Metric("text", "finished, stop_at_step, or a signal")}),
    "error": Event("the run ended out of order", {"reason": Metric("text", "what went wrong")}),
}


def schema() -> str:
    """docs/metrics.md: every field and event, from the tables above."""
    kinds = (
        ("Every step", STEP_METRICS),
        ("Every `training.probe_interval` steps", PROBE_METRICS),
        ("Every `training.health_interval` steps", HEALTH_METRICS),
        ("On GPUs", GPU_METRICS),
    )
    lines = [
        "# metrics.jsonl",
        "",
        "Made by `python -m training.metrics`; a test holds it to the tables in training/record/metrics_log.py.",
        "",
        "One JSON object per line, appended and flushed as things happen. A row with `loss` is an optimizer step; a",
        "row with `event` is an event, with its `step` and `time`. After a resume at step N the file reads as one",
        "curve: rows after N move to `segments/metrics_<k>.jsonl`, a torn last line is dropped, and once the steps of",
        "the dead segment have been trained again a `receipt` says whether every number came out as before. Fields",
        "marked with a clock may differ between equal runs.",
    ]
    for title, table in kinds:
        lines += ["", f"## {title}", "", "| field | unit | meaning |", "|---|---|---|"]
        lines += [
            f"| `{name}`{' ⏱' if is_timing(name) else ''} | {metric.unit} | {metric.meaning} |"
            for name, metric in table.items()
        ]
    for name, event in EVENTS.items():
        lines += ["", f"## Event `{name}`: {event.meaning}", "", "| field | unit | meaning |", "|---|---|---|"]
        lines += [f"| `{field}` | {metric.unit} | {metric.meaning} |" for field, metric in event.fields.items()]
    return "\n".join(lines) + "\n"
