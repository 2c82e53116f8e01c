"""The keys of a run's configuration, as frozen dataclasses that check themselves. Reading them: load.py.

One line per key: type (a Literal lists the choices), default, meaning with unit, bounds, and what changing it on resume
does. `training/train.py --help`, docs/configuration.md, the checks and the comparison on resume are made from them.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

import yaml

from gsa import kernels
from gsa.config import Effect, ModelConfig, check_keys, key
from gsa.model import Recomputed
from training.config.exit_codes import Refusal

OnSpike = Literal["log", "skip", "rollback"]
Backend = Literal["auto", *get_args(kernels.Backend)]


class ConfigError(Refusal):
    """A configuration that cannot run; the message names the key, the file or override, and what would fit."""


def _check(cfg: Any, section: str) -> None:
    try:
        check_keys(cfg, section)
    except ValueError as err:
        raise ConfigError(str(err)) from None


@dataclass(frozen=True)
class TrainingConfig:
    """How a run trains. Steps are optimizer steps; batch sizes count windows of max_seq_len tokens."""

    seed: int = key(
        0,
        "Decides initial weights, data order and the rows of the indexer's loss.",
        at_least=0,
        at_most=2**64 - 1,
        resume="curve",
    )
    max_steps: int = key(
        1000,
        "Steps of the whole run. The schedule of the learning rate ends here too, unless schedule_steps is given.",
        at_least=1,
        resume="curve",
    )
    schedule_steps: int | None = key(
        None,
        "Steps of the learning-rate schedule. Default: max_steps. A run that is made longer keeps its rates with the "
        "earlier max_steps here.",
        at_least=1,
        resume="curve",
    )
    stop_at_step: int | None = key(
        None, "Stop early, at this step, with a checkpoint; the schedule stays the same.", at_least=1, resume="harmless"
    )
    micro_batch_size: int = key(8, "Windows per rank and forward pass.", at_least=1, resume="rounding")
    global_batch_size: int | None = key(
        None,
        "Windows per optimizer step over all ranks; the accumulation follows from it and the number of ranks.",
        at_least=1,
        resume="curve",
    )
    gradient_accumulation_steps: int | None = key(
        None,
        "Passes per rank and step. Default: 1, or what global_batch_size needs, which it may not contradict.",
        at_least=1,
        resume="rounding",
    )
    max_seq_len: int = key(1024, "Tokens per window.", at_least=1, resume="curve")
    precision: Literal["bf16", "fp32"] = key(
        "bf16", "Number format of the passes; the master weights are float32 in both cases.", resume="curve"
    )
    learning_rate: float = key(3e-4, "Peak learning rate of AdamW.", above=0, resume="curve")
    min_learning_rate: float = key(
        3e-5,
        "Learning rate that the schedule reaches after its last step. The last update itself is above it by this share "
        "of the way from the peak: cosine about (1.57 / n)^2, linear 1 / n, wsd 1 / n, where n is the number of "
        "decaying steps; wsd with n = 1: nothing.",
        at_least=0,
        resume="curve",
    )
    warmup_steps: int = key(100, "Steps of linear warm-up; may be longer than the run.", at_least=0, resume="curve")
    lr_scheduler: Literal["cosine", "linear", "wsd"] = key(
        "cosine", "Learning rate after the warm-up; wsd stays constant, then decays linearly.", resume="curve"
    )
    wsd_decay_steps: int | None = key(
        None,
        "Steps of the final decay of lr_scheduler=wsd; 0: none. Default: a fifth of the schedule, at least 1.",
        at_least=0,
        resume="curve",
    )
    weight_decay: float = key(
        0.1, "AdamW's weight decay of matrices; biases, norms and scalars have none.", at_least=0, resume="curve"
    )
    beta1: float = key(0.9, "AdamW's decay rate of the first moment.", at_least=0, below=1, resume="curve")
    beta2: float = key(0.95, "AdamW's decay rate of the second moment.", at_least=0, below=1, resume="curve")
    eps: float = key(1e-8, "AdamW's epsilon.", above=0, resume="curve")
    grad_clip: float = key(1.0, "Clip gradients to this global norm; 0: no clipping.", at_least=0, resume="curve")
    gradient_checkpointing: bool = key(
        False, "Recompute activations in the backward pass instead of storing them.", resume="harmless"
    )
    checkpointing_scope: Literal["block", "ffn"] = key(
        "block",
        "What gradient_checkpointing recomputes: everything but each block's input (block: least memory, slowest), or "
        "only the feed-forward (ffn).",
        resume="harmless",
    )
    compile: bool = key(
        False, "Fuse norms, gates and feed-forwards with torch.compile; not with ZeRO 3.", resume="rounding"
    )
    indexer_warmup_steps: int = key(
        0,
        "Steps of dense attention at the start, while the indexer learns; may be longer than the run.",
        at_least=0,
        resume="curve",
    )
    indexer_lr_multiplier: float = key(
        1.0, "Learning rate of the indexer divided by that of the rest.", above=0, resume="curve"
    )
    indexer_loss_weight: float = key(
        0.1,
        "Weight of the indexer's loss. Adam ignores its scale, so it matters only for gradient clipping.",
        at_least=0,
        resume="curve",
    )
    indexer_loss_rows: float = key(
        0.25,
        "Share of the query positions for which the indexer's loss is computed.",
        above=0,
        at_most=1,
        resume="curve",
    )
    probe_interval: int = key(
        50,
        "Steps between measurements of indexer, gates and attention on a few rows; 0: never.",
        at_least=0,
        resume="harmless",
    )
    backend: Backend = key(
        "auto", "Attention kernels. auto: the fastest that pass a check on the device.", resume="rounding"
    )
    health_interval: int = key(
        50,
        "Steps between measurements of gradient norms by part and of update sizes; 0: never.",
        at_least=0,
        resume="harmless",
    )
    on_spike: OnSpike = key(
        "log",
        "What happens at a loss spike. log: only log it. skip: drop the step's update. rollback: restore the last good "
        "checkpoint and skip the step's windows.",
        resume="curve",
    )
    spike_sigmas: float = key(
        7.0, "A spike is a loss this many standard deviations above the mean of the last 1000.", above=0, resume="curve"
    )
    sample_interval: int = key(
        0, "Steps between completions of sample_prompts; 0: never.", at_least=0, resume="harmless"
    )
    sample_prompts: list[str] = key(
        factory=lambda: ["The ", "def "],
        meaning="Prompts that the model continues, greedily, every sample_interval steps.",
        resume="harmless",
    )
    sample_tokens: int = key(48, "Tokens per completion.", at_least=1, resume="harmless")
    eval_interval: int = key(
        500, "Steps between held-out evaluations; 0: only at the end.", at_least=0, resume="harmless"
    )
    eval_windows: int = key(
        64, "Held-out windows per evaluation, each counted once; 0: all.", at_least=0, resume="harmless"
    )
    save_interval: int = key(
        1000, "Steps between checkpoints; 0: only at the stop or the end.", at_least=0, resume="harmless"
    )
    keep_last: int | None = key(
        3, "Newest checkpoints that are not deleted, besides pinned ones; null: all.", at_least=1, resume="harmless"
    )
    keep_every: int | None = key(
        None, "Never delete the checkpoints of steps that are multiples of this.", at_least=1, resume="harmless"
    )
    emergency_dir: str | None = key(
        None,
        "Existing folder, best on another disk, for the last checkpoint of a run whose own folder refuses it.",
        resume="harmless",
    )
    async_save: bool = key(True, "Write checkpoints in the background, from a copy in host memory.", resume="harmless")
    log_interval: int = key(
        10, "Steps between printed lines when not on a terminal; 0: every step.", at_least=0, resume="harmless"
    )
    init_from: str | None = key(None, "Folder of a checkpoint whose weights a new run starts from.", resume="harmless")
    hang_timeout_s: float = key(
        45.0,
        "Seconds that a phase of a step may take before its rank counts as hung; at least 300 for files.",
        above=0,
        resume="harmless",
    )

    def __post_init__(self) -> None:
        _check(self, "training")
        if self.sample_interval and not all(self.sample_prompts):
            raise ConfigError("training.sample_prompts: an empty prompt; give each at least one character")
        if self.min_learning_rate > self.learning_rate:
            raise ConfigError(
                f"training.min_learning_rate={self.min_learning_rate} is above "
                f"training.learning_rate={self.learning_rate}"
            )
        if self.stop_at_step is not None and self.stop_at_step > self.max_steps:
            raise ConfigError(
                f"training.stop_at_step={self.stop_at_step} lies beyond training.max_steps={self.max_steps}; "
                f"leave it out to run to the end"
            )
        if self.wsd_decay_steps is not None and self.lr_scheduler != "wsd":
            raise ConfigError(
                f"training.wsd_decay_steps={self.wsd_decay_steps} means nothing with training.lr_scheduler="
                f"{self.lr_scheduler}; leave it out, or set training.lr_scheduler=wsd"
            )
        if self.wsd_decay_steps is not None and self.wsd_decay_steps > self._steps_after_warmup:
            raise ConfigError(
                f"training.wsd_decay_steps={self.wsd_decay_steps} is more than the {self._steps_after_warmup} steps "
                f"that the schedule of {self.schedule_steps or self.max_steps} (training."
                f"{'schedule_steps' if self.schedule_steps else 'max_steps'}) has after training.warmup_steps="
                f"{self.warmup_steps}; set training.wsd_decay_steps={self._steps_after_warmup} or less"
            )

    @property
    def _steps_after_warmup(self) -> int:
        return max(0, (self.schedule_steps or self.max_steps) - self.warmup_steps)

    @property
    def recomputed(self) -> Recomputed:
        """What the backward pass recomputes."""
        return self.checkpointing_scope if self.gradient_checkpointing else "none"


@dataclass(frozen=True)
class DataConfig:
    """The prepared text: folders that training/prepare_data.py made."""

    data_dir: str = key("data/quickstart", "A prepared dataset.", resume="curve")
    mixture: dict[str, float] | None = key(
        None, "Several prepared datasets in place of data_dir: folder -> weight.", resume="curve"
    )
    num_workers: int = key(
        1, "Threads that load ahead; 0: load when needed. Never changes the data.", at_least=0, resume="harmless"
    )

    def __post_init__(self) -> None:
        _check(self, "data")
        if self.mixture is not None:
            if not self.mixture:
                raise ConfigError("data.mixture is empty; name at least one folder, or leave it out for data.data_dir")
            for folder, weight in self.mixture.items():
                if not weight > 0:
                    raise ConfigError(f"data.mixture: weight {weight} of {folder} must be above 0")


def is_run_id(text: str) -> bool:
    """Whether W&B takes it as the id of a run, and a file name may hold it."""
    return re.fullmatch(r"[A-Za-z0-9_-]{1,128}", text) is not None


@dataclass(frozen=True)
class LoggingConfig:
    """Weights & Biases and TensorBoard; metrics.jsonl is written in any case."""

    wandb: bool = key(False, "Send metrics to W&B; without an API key they are recorded offline.", resume="harmless")
    project: str = key("gsa-pretrain", "W&B project.", resume="harmless")
    entity: str | None = key(None, "W&B entity. Default: the owner of the API key.", resume="harmless")
    run_name: str | None = key(None, "W&B name of the run. Default: the name of the output folder.", resume="harmless")
    run_id: str | None = key(
        None, "W&B id of an existing run to continue. Default: a new id for each new run.", resume="harmless"
    )
    tensorboard: bool = key(
        False, "Write TensorBoard files into the run's folder; needs the extra `tensorboard`.", resume="harmless"
    )

    def __post_init__(self) -> None:
        _check(self, "logging")
        if self.run_id is not None and not is_run_id(self.run_id):
            raise ConfigError(f"logging.run_id={self.run_id!r} is not a W&B id: letters, digits, - and _, up to 128")


@dataclass(frozen=True)
class RunConfig:
    """The whole configuration of a run, except for the ZeRO settings in ds_configs/*.json."""

    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def __post_init__(self) -> None:
        if self.training.max_seq_len > self.model.max_position_embeddings:
            raise ConfigError(
                f"training.max_seq_len={self.training.max_seq_len} is above model.max_position_embeddings="
                f"{self.model.max_position_embeddings}; raise the latter or shorten the windows"
            )


SECTIONS: dict[str, type] = {f.name: f.default_factory for f in fields(RunConfig)}
KEYS: dict[str, Any] = {f"{section}.{f.name}": f for section, made in SECTIONS.items() for f in fields(made)}
"""Every dotted key with its dataclass field, in order."""

RESUME_EFFECT: dict[str, Effect] = {name: f.metadata["resume"] for name, f in KEYS.items()}
"""Every key, and what changing it on resume does."""


def all_keys() -> dict[str, Any]:
    """KEYS: every dotted key with its dataclass field, in order."""
    return KEYS


def to_plain(cfg: RunConfig) -> dict:
    """The configuration as dicts, lists, numbers, strings and None, as files and checkpoints hold it."""
    return asdict(cfg)


def from_plain(plain: dict[str, Any]) -> RunConfig:
    """The configuration from what `to_plain` returned, in this version or an earlier one; else raises ConfigError."""
    try:
        plain = {**plain, "training": _with_decay_that_fits(plain.get("training", {}))}
        return RunConfig(**{name: made(**plain.get(name, {})) for name, made in SECTIONS.items()})
    except (TypeError, AttributeError, ValueError) as err:
        raise ConfigError(f"not a configuration of this version: {err}") from err


def _with_decay_that_fits(training: dict[str, Any]) -> dict[str, Any]:
    """Cuts a wsd_decay_steps that does not fit, as an earlier version did, which did not refuse it."""
    decay, steps = training.get("wsd_decay_steps"), training.get("max_steps", TrainingConfig.max_steps)
    if decay is None or training.get("schedule_steps") is not None:
        return training
    fits = max(0, steps - training.get("warmup_steps", TrainingConfig.warmup_steps))
    return {**training, "wsd_decay_steps": min(decay, fits)}


def to_yaml(cfg: RunConfig) -> str:
    """The whole configuration, every key, in the layout that `load_config` reads."""
    return yaml.safe_dump(to_plain(cfg), sort_keys=False)
