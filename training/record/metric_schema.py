"""Every metric and event of metrics.jsonl, with unit and meaning. docs/metrics.md is generated from these tables."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    unit: str
    meaning: str


STEP_METRICS: dict[str, Metric] = {
    "step": Metric("optimizer steps", "optimizer steps finished, including this one"),
    "epoch": Metric("passes", "passes over the present training text so far, as a fraction"),
    "samples": Metric("windows", "windows of the present training text consumed so far, over all ranks"),
    "tokens": Metric("tokens", "positions of all windows consumed so far, targets or not"),
    "loss": Metric("nats/token", "next-token cross-entropy of the step's global batch, mean over target tokens"),
    "spike_score": Metric(
        "deviations", "standard deviations of the loss above the mean of the last 1000; 0 while fewer than 50 are known"
    ),
    "indexer_loss": Metric(
        "nats/row", "alignment loss of the indexer (KL), mean over layers and sampled rows (query positions)"
    ),
    "grad_norm": Metric("1", "global L2 norm of the gradient before clipping"),
    "lr": Metric("1", "learning rate of the main parameter groups in this step"),
    "lr_indexer": Metric("1", "learning rate of the indexer's parameter groups in this step"),
    "stage": Metric("dense or sparse", "whether attention ran over all visible keys or over the selected ones"),
    "selected_k": Metric("keys", "keys that a query attended to, mean over queries and layers"),
    "visible_k": Metric("keys", "keys of its document that a query could have attended to, mean over queries"),
    "tokens_per_s": Metric("tokens/s", "throughput of all devices together in this step"),
    "tokens_per_s_per_device": Metric("tokens/s", "throughput per device in this step"),
    "mfu": Metric("share", "model FLOPs utilisation: useful FLOPs of the step over the devices' peak in its wall time"),
    "seconds": Metric("s", "wall time of the step; its five parts follow"),
    "seconds_data": Metric("s", "waiting for the loader and copying batches to the device"),
    "seconds_forward": Metric("s", "forward passes"),
    "seconds_backward": Metric("s", "backward passes, including their communication"),
    "seconds_step": Metric("s", "optimizer step, including its communication"),
    "seconds_other": Metric("s", "the rest of the step: all-reduce of its metrics, bookkeeping"),
    "seconds_save": Metric("s", "time that saves blocked the loop since the previous step; not part of `seconds`"),
    "seconds_eval": Metric("s", "time of evaluations and completions since the previous step; not part of `seconds`"),
    "rank_seconds_slowest": Metric("s", "data and forward time of the previous step on the slowest rank"),
    "rank_seconds_median": Metric("s", "data and forward time of the previous step on the median rank"),
    "memory_gib": Metric("GiB", "peak memory of rank 0: allocated on its GPU, or resident on a CPU"),
    "time": Metric("unix s", "when the row was written"),
}
PROBE_METRICS: dict[str, Metric] = {
    "indexer/coverage": Metric("share", "dense attention mass on the selected keys, mean over layers"),
    "indexer/coverage_worst": Metric("share", "dense attention mass on the selected keys, in the layer with the least"),
    "indexer/oracle": Metric(
        "share", "dense attention mass on equally many keys of largest mass (a perfect indexer), mean over layers"
    ),
    "indexer/recall": Metric("share", "selected keys that are among those of largest mass, mean over layers"),
    "gate/value_saturation": Metric("share", "value gates below 0.05 or above 0.95, mean over layers"),
    "gate/output_saturation": Metric("share", "output gates below 0.05 or above 0.95, mean over layers"),
    "attention/first_token": Metric("share", "attention on the first token of the document, mean over layers"),
    "layers": Metric("share", "lists by layer: coverage, oracle, recall, value_ and output_saturation, first_token"),
}
"""Fields of every probe_interval-th row, where the model has the part. Measured on PROBED_ROWS queries of one sequence
of every rank."""

HEALTH_METRICS: dict[str, Metric] = {
    "grad_norm/indexer": Metric("1", "L2 norm of the gradient of the indexer's parameters, before clipping"),
    "grad_norm/gates": Metric("1", "L2 norm of the gradient of the gates' parameters, before clipping"),
    "grad_norm/rest": Metric("1", "L2 norm of the gradient of all other parameters, before clipping"),
    "update_ratio/main": Metric("1", "norm of the step's change of the main matrices over their norm, on a subset"),
    "update_ratio/indexer": Metric("1", "norm of the step's change of the indexer's matrices over theirs, on a subset"),
}
"""Fields of every health_interval-th row. The gradient norms are absent where gradients are offloaded."""

GPU_METRICS: dict[str, Metric] = {
    "allocator_retries": Metric(
        "1", "times that torch's allocator had to empty its cache since the previous row; worst rank"
    ),
    "gpu/{i}/utilisation": Metric("share", "share of time in which any kernel ran, by NVML"),
    "gpu/{i}/power_w": Metric("W", "power drawn"),
    "gpu/{i}/power_limit_w": Metric("W", "enforced power limit"),
    "gpu/{i}/clock_mhz": Metric("MHz", "clock of the multiprocessors"),
    "gpu/{i}/max_clock_mhz": Metric("MHz", "maximum clock of the multiprocessors"),
    "gpu/{i}/memory_gib": Metric("GiB", "memory in use by all processes"),
    "gpu/{i}/temperature_c": Metric("degrees C", "temperature of the chip"),
    "gpu/{i}/throttled": Metric("share", "share of samples in which power or heat limited the clocks"),
    "gpu/{i}/throttle_reasons": Metric("text", "the reasons for throttling; absent when there was none"),
}
"""Fields on GPUs only; {i} counts the GPUs of rank 0's node. They are means over the samples since the previous row."""

TIME_METRICS = frozenset(
    k for k in STEP_METRICS if k.startswith(("seconds", "tokens_per_s", "memory", "time", "mfu", "rank_seconds"))
)
"""Times, and metrics computed from them: they differ between two runs that are otherwise identical."""


def is_timing(name: str) -> bool:
    """Whether a field of a step row may differ between two runs that are otherwise identical."""
    return name in TIME_METRICS or name in GPU_METRICS or name.startswith("gpu/")


@dataclass(frozen=True)
class Event:
    """meaning: when the row is written. fields: those beside "event", "step" (finished by then) and "time" (unix s)."""

    meaning: str
    fields: dict[str, Metric]


_LAUNCH = {
    "data_fingerprint": Metric("text", "identifies the training text and its mixture"),
    "world_size": Metric("ranks", "processes, one per device"),
    "zero_stage": Metric("0 to 3", "ZeRO stage"),
    "segment": Metric("launches", "number of launches of this run before this one"),
    "numerics": Metric("mapping", "what the last digits of numbers depend on: ranks, kernels, device, versions, ..."),
    "config": Metric("mapping", "the whole configuration of the launch, by section"),
}
EVENTS: dict[str, Event] = {
    "start": Event("a launch begins a run", _LAUNCH),
    "resume": Event(
        "a launch continues from a checkpoint",
        {
            **_LAUNCH,
            "checkpoint": Metric("tag", "name of the checkpoint"),
            "rows_moved": Metric("rows", "rows of later steps that were moved to segments/"),
            "config_diff": Metric("mapping", "changed keys: [value in the checkpoint, value now]"),
        },
    ),
    "device": Event(
        "the devices that the launch runs on",
        {
            "name": Metric("text", "name of the device"),
            "world_size": Metric("devices", "number of devices"),
            "memory_gib": Metric("GiB", "memory of one device"),
            "peak_tflops": Metric("10^12/s", "peak of one device at the run's precision, in FLOP/s"),
            "peak_source": Metric("text", "`table`, or `measured` by a matrix product"),
        },
    ),
    "predicted": Event(
        "a few steps into a launch, the prediction of training.plan beside what rank 0 measured",
        {
            "memory_gib": Metric("GiB", "predicted peak memory"),
            "measured_gib": Metric(
                "GiB", "measured peak memory; on a CPU the growth of the process since before the model"
            ),
            "seconds": Metric("s", "predicted time of a step; only for Triton kernels on a device in the table"),
            "measured_seconds": Metric("s", "measured time of a step"),
        },
    ),
    "eval": Event(
        "held-out text was evaluated",
        {
            "eval_loss": Metric("nats/token", "cross-entropy, mean over target tokens, with sparse attention"),
            "eval_bpb": Metric("bits/byte", "cross-entropy per UTF-8 byte of held-out text, with sparse attention"),
            "eval_loss_dense": Metric("nats/token", "in the dense stage: cross-entropy with dense attention"),
            "eval_bpb_dense": Metric("bits/byte", "in the dense stage: bits per byte with dense attention"),
            "eval_tokens": Metric("tokens", "target tokens evaluated"),
            "unigram_bpb": Metric("bits/byte", "bits per byte of the best model without context, for comparison"),
            "eval_seconds": Metric("s", "wall time of the evaluation"),
        },
    ),
    "save": Event(
        "a checkpoint was published; `step` is the checkpoint's",
        {
            "tag": Metric("tag", "name of the checkpoint's folder"),
            "bytes": Metric("bytes", "size of the checkpoint"),
            "save_stall_seconds": Metric("s", "time that the save blocked the loop"),
            "save_background_seconds": Metric("s", "time from then until publication"),
            "save_background_cpu_seconds": Metric("s", "CPU time of rank 0's writer"),
        },
    ),
    "spike": Event(
        "a step's loss is more than training.spike_sigmas deviations above the mean, or not finite",
        {
            "spike_loss": Metric("nats/token", "loss of the step"),
            "score": Metric("deviations", "standard deviations of the loss above the mean of the steps before"),
            "samples": Metric("windows", "[first, last] window of the step"),
            "action": Metric("text", "`log`, `skip` (the update was dropped) or `rollback`"),
            "checkpoint": Metric("tag", "the checkpoint that a rollback restored"),
        },
    ),
    "receipt": Event(
        "the steps that a resume trained again have been compared with their discarded rows",
        {
            "compared": Metric("steps", "number of compared steps"),
            "identical": Metric(
                "yes or no", "whether every number except times came out the same in every compared step"
            ),
            "first_difference": Metric("mapping", "step, field, before, now"),
            "changed": Metric("mapping", "why numbers may differ: name -> [in the launches before, now]"),
        },
    ),
    "sample": Event(
        "the model continued a fixed prompt greedily",
        {"prompt": Metric("text", "the prompt"), "text": Metric("text", "the model's completion")},
    ),
    "stop": Event(
        "the run finished or was stopped on request", {"reason": Metric("text", "finished, stop_at_step, or a signal")}
    ),
    "save_failed": Event(
        "a checkpoint could not be saved, and training went on", {"reason": Metric("text", "what the disk refused")}
    ),
    "error": Event("the run failed", {"reason": Metric("text", "what went wrong")}),
}


def schema() -> str:
    """The text of docs/metrics.md: every field and event of the tables above."""
    kinds = (
        ("Every step", STEP_METRICS),
        ("Every `training.probe_interval` steps", PROBE_METRICS),
        ("Every `training.health_interval` steps", HEALTH_METRICS),
        ("On GPUs", GPU_METRICS),
    )
    lines = [
        "# metrics.jsonl",
        "",
        "Generated by `python -m training.metrics` from training/record/metric_schema.py; a test compares the two.",
        "",
        "One JSON object per line, appended and flushed as things happen. A row with `loss` is an optimizer step; a",
        "row with `event` is an event, with its `step` and `time`. The file always reads as one curve: when a launch",
        "resumes at step N, the rows of later steps move to `segments/metrics_<k>.jsonl` and a torn last line is",
        "dropped. Once the moved steps have been trained again, a `receipt` event states whether every number came out",
        "the same. Fields marked with a clock (⏱) may differ between two runs that are otherwise identical. Numbers",
        'that are not finite are strings: "nan", "inf", "-inf".',
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
