"""A run's configuration: yaml and key=value in, frozen and checked dataclasses out.

Everything wrong with a configuration is a ConfigError that names the key, who said it, and what would fit;
it is raised before any process group starts.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gsa import kernels
from gsa.checkpoint import legacy
from gsa.config import ModelConfig
from gsa.model import Recomputed
from training.config.exit_codes import Refusal

Effect = Literal["harmless", "curve", "impossible"]
"""What changing a key on resume does: nothing to the numbers; bends the curve; does not fit the tensors."""


class ConfigError(Refusal):
    """A configuration that cannot run; the message names the key, the file or override, and what would fit."""


def _setting(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


OnSpike = Literal["log", "skip", "rollback"]
PRECISIONS = ("bf16", "fp32")
SCHEDULES = ("cosine", "linear", "wsd")


@dataclass(frozen=True)
class TrainingConfig:
    """How a run trains. Steps are optimizer steps; sizes of batches are in windows of max_seq_len tokens."""

    seed: int = _setting(0, "decides initial weights, data order and sampled rows")
    max_steps: int = _setting(1000, "steps of the whole run; the schedule ends here")
    stop_at_step: int | None = _setting(None, "stop early with a checkpoint, schedule unchanged")
    micro_batch_size: int = _setting(8, "windows per rank and forward pass")
    global_batch_size: int | None = _setting(None, "windows per step over all ranks; rules over accumulation")
    gradient_accumulation_steps: int | None = _setting(
        None, "forward passes per step; default 1, or what global_batch_size needs"
    )
    max_seq_len: int = _setting(1024, "tokens per window")
    precision: str = _setting("bf16", "bf16 (float32 masters) or fp32")
    learning_rate: float = _setting(3e-4, "peak learning rate of AdamW")
    min_learning_rate: float = _setting(3e-5, "learning rate at the end of the schedule")
    warmup_steps: int = _setting(100, "steps of linear warm-up; may exceed the run")
    lr_scheduler: str = _setting("cosine", "decay after warm-up: cosine, linear, or wsd (constant, then linear)")
    wsd_decay_steps: int | None = _setting(None, "steps of the final decay of wsd; default a fifth of max_steps")
    weight_decay: float = _setting(0.1, "decay of matrices; biases, norms and scalars have none")
    beta1: float = _setting(0.9, "AdamW's decay of the first moment")
    beta2: float = _setting(0.95, "AdamW's decay of the second moment")
    eps: float = _setting(1e-8, "AdamW's epsilon")
    grad_clip: float = _setting(1.0, "largest global gradient norm; 0 switches clipping off")
    gradient_checkpointing: bool = _setting(
        False, "compute activations again in the backward pass instead of keeping them"
    )
    checkpointing_scope: str = _setting(
        "block", "what gradient_checkpointing computes again: block (all but each block's input), or ffn (less of both)"
    )
    compile: bool = _setting(False, "fuse norms, gates and feed-forwards by torch.compile; not with ZeRO 3")
    indexer_warmup_steps: int = _setting(
        0, "first steps with dense attention, while the indexer learns; may exceed the run"
    )
    indexer_lr_multiplier: float = _setting(1.0, "learning rate of the indexer over that of the rest")
    indexer_loss_weight: float = _setting(0.1, "weight of the alignment loss; matters only through the clipped norm")
    indexer_loss_rows: float = _setting(0.25, "share of row positions whose alignment loss is taken")
    probe_interval: int = _setting(
        50, "steps between measurements of indexer, gates and attention on a few rows; 0: never"
    )
    backend: str = _setting(
        "auto", "kernels of attention: triton, chunked, reference, or auto (what has passed a check on the device)"
    )
    health_interval: int = _setting(50, "steps between gradient norms by part and updates beside weights; 0: never")
    on_spike: str = _setting(
        "log", "a loss beyond spike_sigmas: log; skip (drop the step's update); or rollback (past its samples)"
    )
    spike_sigmas: float = _setting(7.0, "standard deviations above the last 1000 losses that make a spike")
    sample_interval: int = _setting(0, "steps between continuations of sample_prompts; 0: never")
    sample_prompts: list[str] = field(
        default_factory=lambda: ["The ", "def "],
        metadata={"help": "what the model continues, greedily, every sample_interval steps"},
    )
    sample_tokens: int = _setting(48, "tokens of a continuation")
    eval_interval: int = _setting(500, "steps between held-out evaluations; 0: only at the end")
    eval_windows: int = _setting(64, "held-out windows per evaluation; 0: all")
    save_interval: int = _setting(1000, "steps between checkpoints; 0: only at the stop or the end")
    keep_last: int | None = _setting(3, "newest checkpoints that are kept, besides pinned ones; null keeps all")
    keep_every: int | None = _setting(None, "checkpoints of steps that are multiples of this are kept for ever")
    async_save: bool = _setting(True, "write checkpoints in the background, out of a copy in host memory")
    log_interval: int = _setting(10, "steps between lines on a console that is not a terminal")
    init_from: str | None = _setting(None, "checkpoint folder whose weights a new run starts from")
    hang_timeout_s: float = _setting(45.0, "seconds of silence in one phase of a step before a rank is taken for hung")

    def __post_init__(self) -> None:
        _at_least(
            self,
            "training",
            1,
            (
                "max_steps",
                "stop_at_step",
                "micro_batch_size",
                "global_batch_size",
                "gradient_accumulation_steps",
                "max_seq_len",
                "keep_last",
                "keep_every",
                "sample_tokens",
            ),
        )
        _at_least(
            self,
            "training",
            0,
            (
                "seed",
                "warmup_steps",
                "wsd_decay_steps",
                "weight_decay",
                "grad_clip",
                "indexer_warmup_steps",
                "indexer_loss_weight",
                "eval_interval",
                "eval_windows",
                "save_interval",
                "log_interval",
                "probe_interval",
                "min_learning_rate",
                "health_interval",
                "sample_interval",
            ),
        )
        _above_zero(
            self,
            "training",
            ("learning_rate", "eps", "indexer_lr_multiplier", "indexer_loss_rows", "hang_timeout_s", "spike_sigmas"),
        )
        _one_of(self, "training", "precision", PRECISIONS)
        _one_of(self, "training", "lr_scheduler", SCHEDULES)
        _one_of(self, "training", "backend", ("auto", *get_args(kernels.Backend)))
        _one_of(self, "training", "checkpointing_scope", ("block", "ffn"))
        _one_of(self, "training", "on_spike", get_args(OnSpike))
        if self.sample_interval and not all(self.sample_prompts):
            raise ConfigError("training.sample_prompts: an empty prompt; give each at least one character")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"training.{name}={getattr(self, name)} must be at least 0 and below 1")
        if self.indexer_loss_rows > 1:
            raise ConfigError(f"training.indexer_loss_rows={self.indexer_loss_rows} is a share: at most 1")
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

    @property
    def recomputed(self) -> Recomputed:
        """What the backward pass computes again."""
        return self.checkpointing_scope if self.gradient_checkpointing else "none"


@dataclass(frozen=True)
class DataConfig:
    """Where the text lies: folders that training/prepare_data.py made."""

    data_dir: str = _setting("data/quickstart", "a prepared dataset")
    mixture: dict[str, float] | None = _setting(
        None, "several prepared datasets, folder -> weight, in place of data_dir"
    )
    num_workers: int = _setting(1, "threads that read ahead; 0 reads in line. Never changes the data")

    def __post_init__(self) -> None:
        _at_least(self, "data", 0, ("num_workers",))
        if self.mixture is not None:
            if not self.mixture:
                raise ConfigError("data.mixture is empty; name at least one folder, or leave it out for data.data_dir")
            for folder, weight in self.mixture.items():
                if not weight > 0:
                    raise ConfigError(f"data.mixture: weight {weight} of {folder} must be above 0")


@dataclass(frozen=True)
class LoggingConfig:
    """Weights & Biases and TensorBoard; metrics.jsonl is written in any case."""

    wandb: bool = _setting(False, "mirror metrics to W&B; offline without a key")
    project: str = _setting("gsa-pretrain", "W&B project")
    entity: str | None = _setting(None, "W&B entity; default: yours")
    run_name: str | None = _setting(None, "W&B name of the run; default: the output folder's")
    run_id: str | None = _setting(None, "W&B id of a run that exists and is to be continued; default: made once")
    tensorboard: bool = _setting(False, "TensorBoard files in the run's folder too; needs the extra `tensorboard`")

    def __post_init__(self) -> None:
        if self.run_id is not None and not re.fullmatch(r"[A-Za-z0-9_-]{1,128}", self.run_id):
            raise ConfigError(f"logging.run_id={self.run_id!r} is not a W&B id: letters, digits, - and _, up to 128")


@dataclass(frozen=True)
class RunConfig:
    """Everything a run is told, but for the ZeRO settings in ds_configs/*.json."""

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


def _at_least(cfg: object, section: str, low: int, names: Sequence[str]) -> None:
    for name in names:
        value = getattr(cfg, name)
        if value is not None and not value >= low:
            raise ConfigError(f"{section}.{name}={value} must be at least {low}")


def _above_zero(cfg: object, section: str, names: Sequence[str]) -> None:
    for name in names:
        if not getattr(cfg, name) > 0:
            raise ConfigError(f"{section}.{name}={getattr(cfg, name)} must be above 0")


def _one_of(cfg: object, section: str, name: str, choices: Sequence[str]) -> None:
    if getattr(cfg, name) not in choices:
        raise ConfigError(f"{section}.{name}={getattr(cfg, name)!r} is not one of {', '.join(choices)}")


# -- reading ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Said:
    """One value and who said it."""

    key: str
    value: Any
    by: str


SECTIONS: dict[str, type] = {f.name: f.default_factory for f in fields(RunConfig)}


def all_keys() -> dict[str, Any]:
    """Every dotted key with its dataclass field, in order."""
    return {f"{section}.{f.name}": f for section, made in SECTIONS.items() for f in fields(made)}


def load_config(path: Path, overrides: Sequence[str]) -> RunConfig:
    """The run's configuration: defaults, then the yaml, then each key=value.

    Raises ConfigError for a missing or broken file, an unknown or repeated key, a value of the wrong type,
    a combination that cannot be; the message names the file and line, or the override.
    """
    said = [*_read_yaml(path), *(_read_override(text) for text in overrides)]
    cfg = OmegaConf.structured(RunConfig)
    for node in (cfg, *(cfg[name] for name in SECTIONS)):
        OmegaConf.set_readonly(node, False)  # OmegaConf's reading of "frozen"
    cfg.model.d_head = None  # the default instance has worked out its own: this model's may differ
    for one in said:
        if one.key not in all_keys():
            raise ConfigError(f"{one.by}: unknown key {one.key!r}{did_you_mean(one.key, all_keys())}")
        try:
            OmegaConf.update(cfg, one.key, one.value, merge=False)
        except OmegaConfBaseException as err:
            raise ConfigError(f"{one.by}: {one.key}: {str(err).splitlines()[0]}") from err
    try:
        return OmegaConf.to_object(cfg)
    except (ValueError, OmegaConfBaseException) as err:
        message = str(err).splitlines()[0]
        named = {one.key: one.by for one in said if one.key in message}
        where = "; ".join(dict.fromkeys(named.values())) or str(path)
        raise ConfigError(f"{where}: {message}") from err


def did_you_mean(key: str, known: Sequence[str] | dict[str, Any]) -> str:
    """ "; did you mean ...?" with the closest known names, or how to list them all."""
    last = key.rpartition(".")[2]
    elsewhere = [k for k in known if k.rpartition(".")[2] == last]
    close = elsewhere or difflib.get_close_matches(key, list(known), n=3, cutoff=0.6)
    if not close:
        tails = {k.rpartition(".")[2]: k for k in known}
        close = [tails[t] for t in difflib.get_close_matches(last, list(tails), n=3, cutoff=0.6)]
    return f"; did you mean {' or '.join(close)}?" if close else "; training/train.py --help lists every key"


def _read_yaml(path: Path) -> list[_Said]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as err:
        raise ConfigError(f"--config {path}: {err.strerror}") from err
    except UnicodeDecodeError as err:
        raise ConfigError(f"--config {path}: not UTF-8 text ({err.reason} at byte {err.start})") from err
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as err:
        mark = getattr(err, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: not yaml: {getattr(err, 'problem', None) or err}") from err
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{path}: a configuration is a mapping with sections {', '.join(SECTIONS)}; this is not")
    loader, said = yaml.SafeLoader(""), []
    for section, line, node in _items(root, path):
        if section not in SECTIONS:
            flat = did_you_mean(section, [*SECTIONS, *all_keys()])
            raise ConfigError(f"{path}, line {line}: unknown section {section!r}{flat}")
        if node.tag == "tag:yaml.org,2002:null":
            continue
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{path}, line {line}: section {section!r} must be a mapping of keys")
        for key, key_line, value in _items(node, path):
            if isinstance(value, yaml.MappingNode):
                list(_items(value, path))  # refuses repeated keys inside
            made = _as_said(f"{section}.{key}", loader.construct_object(value, deep=True), str(value.value))
            said.append(_Said(f"{section}.{key}", made, f"{path}, line {key_line}"))
    return _translated(said, path)


def _as_said(key: str, value: Any, text: str) -> Any:
    """`value`, but for a word that yaml takes for true or false where a word is wanted, as adaptive_k: off."""
    known = all_keys().get(key)
    return text.strip() if isinstance(value, bool) and known is not None and known.type == "str" else value


def _translated(said: list[_Said], path: Path) -> list[_Said]:
    """The predecessor's layout, known by its model.gsa, in our words; who said it stays."""
    by = {one.key: one.by for one in said}
    try:
        ours = legacy.translate({one.key: one.value for one in said})
    except ValueError as err:
        raise ConfigError(f"{path}: {err}") from err
    return [_Said(key, value, by.get(key, f"{path} (the predecessor's layout)")) for key, value in ours.items()]


def _items(node: yaml.MappingNode, path: Path) -> Iterator[tuple[str, int, yaml.Node]]:
    seen: dict[str, int] = {}
    for key, value in node.value:
        name, line = str(key.value), key.start_mark.line + 1
        if name in seen:
            # yaml itself takes the last in silence
            raise ConfigError(f"{path}, line {line}: {name!r} is set already in line {seen[name]}; keep one")
        seen[name] = line
        yield name, line, value


def _read_override(text: str) -> _Said:
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"override {text!r} is not key=value, e.g. training.max_steps=1000")
    try:
        return _Said(key.strip(), _as_said(key.strip(), yaml.safe_load(value), value), f"override {text!r}")
    except yaml.YAMLError as err:
        raise ConfigError(f"override {text!r}: the value is not yaml") from err


# -- batch arithmetic ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class BatchPlan:
    """global_batch_size = micro_batch_size x accumulation_steps x world_size. note: a line to log, or None."""

    micro_batch_size: int
    accumulation_steps: int
    world_size: int
    global_batch_size: int
    note: str | None = None


def plan_batch(cfg: TrainingConfig, world_size: int) -> BatchPlan:
    """Batch arithmetic for this many ranks: global_batch_size rules where it is set.

    ConfigError, listing what fits, when the ranks' micro-batches cannot make up the global batch.
    """
    micro, wanted, total = cfg.micro_batch_size, cfg.gradient_accumulation_steps, cfg.global_batch_size
    if total is None:
        accumulation = wanted or 1
        return BatchPlan(micro, accumulation, world_size, micro * accumulation * world_size)
    if total % (micro * world_size):
        micros = [m for m in range(1, total // world_size + 1) if total % (m * world_size) == 0]
        ranks = [w for w in range(1, total // micro + 1) if total % (micro * w) == 0]
        near = sorted(
            {
                max(1, total // (micro * world_size)) * micro * world_size,
                -(-total // (micro * world_size)) * micro * world_size,
            }
        )
        raise ConfigError(
            f"training.global_batch_size={total} is not a multiple of training.micro_batch_size={micro} x {world_size} "
            f"ranks; choose a micro_batch_size of {_short(micros) or 'nothing: too many ranks'}, "
            f"or {_short(ranks)} ranks, "
            f"or a global_batch_size of {' or '.join(map(str, near))}"
        )
    accumulation = total // (micro * world_size)
    note = None
    if wanted is not None and wanted != accumulation:
        note = (
            f"training.gradient_accumulation_steps: {wanted} -> {accumulation}, so that {world_size} rank(s) x "
            f"{micro} windows make up training.global_batch_size={total}"
        )
    return BatchPlan(micro, accumulation, world_size, total, note)


def global_batch_size(config: dict, world_size: int) -> int:
    """Windows per step of a run with this plain configuration on this many ranks."""
    training = config["training"]
    return training.get("global_batch_size") or (
        training["micro_batch_size"] * (training.get("gradient_accumulation_steps") or 1) * world_size
    )


def _short(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:12])) + (", ..." if len(numbers) > 12 else "")


# -- telling ------------------------------------------------------------------------------------------


def to_plain(cfg: RunConfig) -> dict:
    """The configuration as dicts, lists, numbers, strings and None: what files and checkpoints hold."""
    return asdict(cfg)


def from_plain(plain: dict[str, Any]) -> RunConfig:
    """What `to_plain` gave, of this version or an earlier one. ConfigError for anything else."""
    try:
        return RunConfig(**{name: made(**plain.get(name, {})) for name, made in SECTIONS.items()})
    except (TypeError, AttributeError) as err:
        raise ConfigError(f"not a configuration of this version: {err}") from err


def to_yaml(cfg: RunConfig) -> str:
    return yaml.safe_dump(to_plain(cfg), sort_keys=False)


def format_help() -> str:
    """Every key with its type, default, meaning and what changing it on resume does, section by section."""
    lines = []
    for section, made in SECTIONS.items():
        lines.append(f"{section}:")
        for f in fields(made):
            kind = f.type.removesuffix(" | None")
            default = "none" if f.default is None or f.default is MISSING else f.default
            effect = EFFECT_WORDS[RESUME_EFFECT[f"{section}.{f.name}"]]
            lines.append(f"  {f.name} ({kind}, default {default})\n      {f.metadata['help']} [on resume: {effect}]")
    return "\n".join(lines)


# -- what a change on resume does ---------------------------------------------------------------------

_HARMLESS = """
    training.max_steps training.stop_at_step training.micro_batch_size training.gradient_accumulation_steps
    training.gradient_checkpointing training.checkpointing_scope training.compile
    training.eval_interval training.eval_windows training.save_interval
    training.keep_last training.keep_every training.async_save training.log_interval training.init_from
    training.hang_timeout_s training.backend training.probe_interval training.health_interval
    training.sample_interval training.sample_prompts training.sample_tokens data.num_workers
    logging.wandb logging.project logging.entity logging.run_name logging.run_id logging.tensorboard
""".split()
_IMPOSSIBLE = """
    model.d_model model.n_layers model.n_heads model.n_kv_heads model.d_head model.d_ffn model.vocab_size
    model.tie_embeddings model.sparse model.value_gate model.output_gate model.d_indexer model.n_indexer_heads
""".split()
_CURVE = """
    model.max_position_embeddings model.rope_base model.norm_eps model.init_std model.indexer_rope model.k_base
    model.k_min model.k_max model.adaptive_k model.adaptive_k_temperature
    training.seed training.global_batch_size training.max_seq_len training.precision training.learning_rate
    training.min_learning_rate training.warmup_steps training.lr_scheduler training.wsd_decay_steps
    training.weight_decay training.beta1 training.beta2 training.eps training.grad_clip
    training.indexer_warmup_steps training.indexer_lr_multiplier training.indexer_loss_weight
    training.indexer_loss_rows training.on_spike training.spike_sigmas data.data_dir data.mixture
""".split()
RESUME_EFFECT: dict[str, Effect] = {
    **dict.fromkeys(_HARMLESS, "harmless"),
    **dict.fromkeys(_CURVE, "curve"),
    **dict.fromkeys(_IMPOSSIBLE, "impossible"),
}
"""Every key, and what changing it on resume does. The one table that code and docs share."""


EFFECT_WORDS: dict[Effect, str] = {"harmless": "harmless", "curve": "changes the curve", "impossible": "impossible"}


@dataclass(frozen=True)
class Change:
    key: str
    old: Any
    new: Any
    effect: Effect


def config_changes(old: dict, new: dict) -> list[Change]:
    """Keys that differ between two plain configurations, by key; a key that one lacks counts as its default.

    Micro-batch and accumulation are harmless by themselves: compare `global_batch_size` of both runs as well.
    A max_steps below the old one changes the curve.
    """
    defaults = to_plain(RunConfig())
    changes = []
    for key, effect in RESUME_EFFECT.items():
        section, name = key.split(".")
        before, after = (cfg.get(section, {}).get(name, defaults[section][name]) for cfg in (old, new))
        if before != after:
            if key == "training.max_steps" and after < before:
                effect = "curve"  # what was trained so far had a longer schedule in mind
            changes.append(Change(key, before, after, effect))
    return sorted(changes, key=lambda change: change.key)
