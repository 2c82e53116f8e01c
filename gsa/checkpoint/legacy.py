"""Checkpoints and yaml files of the legacy trainer: the `gsa` code whose step_5000 checkpoint this project had to
rescue. They are read, never written, and nothing in them is executed.

`<output_dir>/step_N/checkpoint_N.pt` holds model_state_dict, optimizer_state_dict, scheduler_state_dict, step,
config and extra_state.epoch. The config is the training section, as a dict or, in the older variant, as an OmegaConf
node whose `_parent` is the whole configuration. Format: docs/checkpoints.md, "Legacy checkpoints".
"""

from __future__ import annotations

import collections
import math
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import yaml

from gsa import yaml_text
from gsa.attention.indexer import INITIAL_ALPHA
from gsa.checkpoint import safe_load
from gsa.checkpoint.full_state import FullState, ParameterState
from gsa.checkpoint.manifest import CheckpointError
from gsa.checkpoint.state import RunState
from gsa.config import ModelConfig
from gsa.files import read_small_file
from gsa.model import GSAForCausalLM

_FILE = re.compile(r"checkpoint_(\d+)\.pt")
_STEP = re.compile(r"step_(\d+)|final")

DECIDED: dict[str, Any] = {"model.tie_embeddings": False, "model.indexer_rope": False}
"""Keys of the configuration in which a legacy checkpoint takes precedence over the yaml, and their values."""

ANNOUNCED = frozenset({"training.max_seq_len", "training.micro_batch_size", "training.gradient_accumulation_steps"})
"""Keys that the import may change without --allow_config_change, because the tuned configuration changes them."""


@dataclass(frozen=True)
class LegacyRun:
    """What a legacy checkpoint records about its run.

    training, model: the sections of its configuration, under this project's key names; model is None when the file has
    none. next_learning_rate: that of the step that would have followed; None when the schedule does not record it.
    """

    file: Path
    step: int
    epoch: int
    training: dict[str, Any]
    model: dict[str, Any] | None
    next_learning_rate: float | None


# -- recognising -------------------------------------------------------------------------------------------


def is_legacy(step_dir: Path) -> bool:
    """Whether a folder is a legacy checkpoint."""
    return not (step_dir / "manifest.json").exists() and _file_of(step_dir) is not None


def newest_legacy(output_dir: Path) -> Path | None:
    """The legacy checkpoint of the highest step in an output folder, or None. Looks at names only."""
    found = [path for path in output_dir.glob("*") if _STEP.fullmatch(path.name) and is_legacy(path)]
    return max(found, key=lambda path: _number(_file_of(path)), default=None)


def _file_of(step_dir: Path) -> Path | None:
    files = [path for path in step_dir.glob("checkpoint_*.pt") if _FILE.fullmatch(path.name)]
    return max(files, key=_number, default=None)


def _number(file: Path) -> int:
    return int(_FILE.fullmatch(file.name)[1])


# -- its configuration -------------------------------------------------------------------------------------

_RENAMED: dict[str, str] = {
    **{f"model.gsa.{key}": f"model.{key}" for key in ("d_indexer", "n_indexer_heads", "k_base", "k_min", "k_max")},
    "model.gsa.use_value_gate": "model.value_gate",
    "model.gsa.use_output_gate": "model.output_gate",
    "logging.log_interval": "training.log_interval",
    "logging.eval_interval": "training.eval_interval",
    "logging.save_interval": "training.save_interval",
}
_DROPPED = ("data.dataset", "data.tokenizer", "data.use_packing")
"""Keys of the legacy data section that have no meaning here, where data.data_dir is a prepared dataset."""


def translate(config: Mapping[str, Any]) -> dict[str, Any]:
    """A legacy configuration under this project's key names. Unknown keys stay, so that they are refused by name.

    config: "section.key" -> value, where "model.gsa" is a mapping. Without a "model.gsa" it is not a legacy
    configuration and is returned as it is. Raises ValueError for an optimizer other than AdamW.
    """
    if not isinstance(config.get("model.gsa"), Mapping):
        return dict(config)
    flat = {key: value for key, value in config.items() if key != "model.gsa"}
    flat.update({f"model.gsa.{key}": value for key, value in config["model.gsa"].items()})
    ours: dict[str, Any] = dict(DECIDED)
    for key, value in flat.items():
        if key == "model.gsa.use_adaptive_k":
            ours["model.adaptive_k"] = "variance" if value else "off"
        elif key == "training.optimizer":
            if str(value).lower() != "adamw":
                raise ValueError(f"training.optimizer={value}: only adamw is supported; remove the key")
        elif key not in _DROPPED:
            ours[_RENAMED.get(key, key)] = value
    return ours


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """ "section.key" -> value. Unlike `gsa.units.flatten` it leaves mappings below a section whole, as data.mixture."""
    return {
        f"{section}.{key}": value
        for section, keys in config.items()
        if isinstance(keys, Mapping)
        for key, value in keys.items()
    }


def _model_section(config: Mapping[str, Any], whose: str) -> dict[str, Any]:
    """The model section of a legacy configuration or of one of this project, under this project's key names."""
    try:
        ours = translate(_flat(config))
    except ValueError as err:
        raise CheckpointError(f"{whose}: {err}") from err
    return {key.partition(".")[2]: value for key, value in ours.items() if key.startswith("model.")}


# -- reading without running -------------------------------------------------------------------------------


class _Node:
    """Stands in for an OmegaConf node: takes the fields from the pickle and has no code."""


class _Name:
    """Stands in for typing.Any, which the file only names."""


_STAND_INS = (
    (_Node, "omegaconf.dictconfig.DictConfig"),
    (_Node, "omegaconf.listconfig.ListConfig"),
    (_Node, "omegaconf.nodes.AnyNode"),
    (_Node, "omegaconf.base.Metadata"),
    (_Node, "omegaconf.base.ContainerMetadata"),
    (_Name, "typing.Any"),
    dict,
    list,
    collections.defaultdict,
)


def _plain(node: object) -> Any:
    """The plain value of an OmegaConf node."""
    if not isinstance(node, _Node):
        return node
    held = vars(node)
    if "_val" in held:
        return held["_val"]
    content = held.get("_content")
    if isinstance(content, dict):
        return {key: _plain(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_plain(value) for value in content]
    return content


def _load(step_dir: Path) -> tuple[Path, dict[str, Any]]:
    file = _file_of(step_dir)
    if file is None:
        raise CheckpointError(f"{step_dir}: holds no legacy checkpoint_N.pt; give the step_N folder of one")
    data = safe_load.load(file, extra_allowed=_STAND_INS, mmap=True)
    needed = {"step": int, "model_state_dict": dict, "optimizer_state_dict": dict, "scheduler_state_dict": dict}
    wrong = [key for key, kind in needed.items() if not isinstance(data, dict) or not isinstance(data.get(key), kind)]
    if wrong or "config" not in data:
        raise CheckpointError(
            f"{file}: lacks {', '.join(wrong or ['config'])}, so it is not a whole checkpoint; restore it from a copy"
        )
    return file, data


def require_whole(step_dir: Path) -> None:
    """Reads every byte of a legacy checkpoint and compares it with the checksums in its zip file.

    A legacy checkpoint has no manifest, and torch.load does not notice a flipped bit in a tensor. Raises
    CheckpointError when a checksum is wrong.
    """
    file = _file_of(step_dir)
    if file is None:
        raise CheckpointError(f"{step_dir}: holds no legacy checkpoint_N.pt; give the step_N folder of one")
    try:
        with zipfile.ZipFile(file) as archive:
            bad = archive.testzip()
    except Exception as err:  # untrusted bytes can make the reader raise anything
        raise CheckpointError(f"{file}: damaged: {err or type(err).__name__}; restore it from a copy") from err
    if bad is not None:
        raise CheckpointError(f"{file}: damaged: {bad} in it does not have its checksum; restore it from a copy")


def read_legacy_run(step_dir: Path) -> LegacyRun:
    """What a legacy checkpoint records about its run. Raises CheckpointError when it is damaged or unsafe."""
    file, data = _load(step_dir)
    config, model = data["config"], None
    if isinstance(config, _Node):
        whole = _plain(vars(config).get("_parent"))  # the configuration that the training section is part of
        config = _plain(config)
        if isinstance(whole, dict) and "model" in whole:
            model = _model_section(whole, f"{file}: its configuration")
    if not isinstance(config, dict):
        raise CheckpointError(f"{file}: its config is {type(config).__name__}, not a mapping")
    optimizer = config.get("optimizer", "adamw")
    if str(optimizer).lower() != "adamw":
        raise CheckpointError(f"{file}: made with training.optimizer={optimizer}; only adamw can be imported")
    training = {key: value for key, value in config.items() if key != "optimizer"}
    _require_counts(file, training)
    extra = data.get("extra_state")
    epoch = extra.get("epoch", 0) if isinstance(extra, dict) else 0
    if type(epoch) is not int:
        raise CheckpointError(f"{file}: its extra_state.epoch is {epoch!r}, not a number of passes; restore it")
    rates = data["scheduler_state_dict"].get("_last_lr")
    rate = rates[0] if isinstance(rates, list) and rates and type(rates[0]) is float else None
    return LegacyRun(file, data["step"], epoch, training, model, rate)


_COUNTS = ("micro_batch_size", "gradient_accumulation_steps", "global_batch_size", "max_seq_len", "max_steps")


def _require_counts(file: Path, training: Mapping[str, Any]) -> None:
    """Checks the settings from which the position in the data and the end of the schedule follow."""
    for key in _COUNTS:
        value = training.get(key)
        if value is not None and (type(value) is not int or value < 1):
            raise CheckpointError(f"{file}: its training.{key} is {value!r}, not a number of at least 1; restore it")
    if training.get("global_batch_size") is None and training.get("micro_batch_size") is None:
        raise CheckpointError(
            f"{file}: its config has neither global_batch_size nor micro_batch_size, from which its position in the "
            f"data follows; restore it"
        )


# -- weights and optimizer ---------------------------------------------------------------------------------

_LAYER = {
    "input_layernorm.weight": "attention_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    **{f"mlp.{part}_proj.weight": f"ffn.{part}_proj.weight" for part in ("gate", "up", "down")},
    **{f"self_attn.{part}_proj.weight": f"attention.{part}_proj.weight" for part in "qkvo"},
    **{
        f"self_attn.indexer.{part}": f"attention.indexer.{part}"
        for part in ("q_proj.weight", "k_proj.weight", "weight_proj.weight", "weight_proj.bias", "bias")
    },
    **{
        f"self_attn.{gate}.gate_proj.{part}": f"attention.{gate}.{part}"
        for gate in ("value_gate", "output_gate")
        for part in ("weight", "bias")
    },
}
_TOP = {
    "model.embed_tokens.weight": "embed.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "head.weight",
}
_NEW = "attention.indexer.log_alpha"
"""The only parameter that legacy models lack; an import sets it to its initial value."""


def our_name(name: str) -> str | None:
    """The name in this project of a legacy parameter; None when it is unknown."""
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
    if layer is None:
        return _TOP.get(name)
    inner = _LAYER.get(layer[2])
    return None if inner is None else f"layers.{layer[1]}.{inner}"


def read_legacy(step_dir: Path, config: ModelConfig, state: RunState | None) -> FullState:
    """Weights, AdamW's moments and its step count, which any engine can load; the schedule starts at that step.

    config: of the model that loads them. state: of the run that continues, or None. The legacy trainer never trained
    the indexer, so its moments are zero. Raises CheckpointError, naming what does not fit.
    """
    file, data = _load(step_dir)
    weights = _require_shapes(file, data["model_state_dict"], config)
    parameters = {}
    for name, tensor in _fresh_parameters(config).items():
        held = weights.get(name, tensor)
        parameters[name] = ParameterState(
            held.shape, pieces={"master": [held.flatten()], "exp_avg": [], "exp_avg_sq": []}
        )
    for name, adam in _moments(file, data).items():
        if name in parameters:
            parameters[name].step = adam["step"]
            for moment in ("exp_avg", "exp_avg_sq"):
                parameters[name].pieces[moment].append(adam[moment].flatten())
    return FullState(parameters, {}, {}, None, state)


def _moments(file: Path, data: dict) -> dict[str, dict]:
    """Adam's step, a float, and its two moments, by parameter name of this project.

    The legacy optimizer numbers parameters through its groups, within a group in the order of the model.
    """
    names = sorted(data["model_state_dict"], key=_group)  # stable: the model's order stays within a group
    try:
        numbers = [number for group in data["optimizer_state_dict"]["param_groups"] for number in group["params"]]
        if len(numbers) != len(names):
            raise ValueError(f"{len(numbers)} parameters in the optimizer, {len(names)} in the model")
        state = data["optimizer_state_dict"]["state"]
        moments = {}
        for name, number in zip(names, numbers, strict=True):
            if number not in state:
                continue  # never updated
            for moment in ("exp_avg", "exp_avg_sq"):
                if state[number][moment].shape != data["model_state_dict"][name].shape:
                    raise ValueError(f"{moment} of {name} has shape {tuple(state[number][moment].shape)}")
            moments[our_name(name)] = {**state[number], "step": float(state[number]["step"])}
        return moments
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as err:
        raise CheckpointError(
            f"{file}: its optimizer state does not fit its weights ({type(err).__name__}: {err}); restore it"
        ) from err


def _group(name: str) -> int:
    """Number of the legacy parameter group: 0 weights, 1 biases and norms, 2 and 3 the same for the indexer."""
    return 2 * ("indexer" in name) + ("bias" in name or "norm" in name)


def _fresh_parameters(config: ModelConfig) -> dict[str, torch.Tensor]:
    """Parameters of a new model, in its order, on the meta device, except the one that legacy models lack."""
    with torch.device("meta"):
        model = GSAForCausalLM(config)
    initial = torch.tensor([math.log(INITIAL_ALPHA)])
    return {
        name: initial.clone().reshape(p.shape) if name.endswith(_NEW) else p.detach()
        for name, p in model.named_parameters()
    }


def _require_shapes(file: Path, saved: Mapping[str, torch.Tensor], config: ModelConfig) -> dict[str, torch.Tensor]:
    """The weights under this project's names, float32. Raises CheckpointError listing every misfit and its settings."""
    wanted = {name: tuple(p.shape) for name, p in _fresh_parameters(config).items() if not name.endswith(_NEW)}
    found, wrong = {}, []
    for name, tensor in saved.items():
        ours = our_name(str(name))
        if not isinstance(tensor, torch.Tensor):
            wrong.append(f"{name}: {type(tensor).__name__}, not a tensor")
        elif ours is None:
            wrong.append(f"{name}: not a parameter of this model")
        else:
            found[ours] = tensor.detach().to(torch.float32)
            if ours not in wanted:
                wrong.append(f"{name}: in the checkpoint, switched off in the configuration{_settings_of(ours)}")
            elif wanted[ours] != tuple(tensor.shape):
                shape = tuple(tensor.shape)
                wrong.append(
                    f"{name}: {shape} in the checkpoint, {wanted[ours]} by the configuration{_settings_of(ours)}"
                )
    wrong += [f"{name}: missing from the checkpoint{_settings_of(name)}" for name in wanted if name not in found]
    if wrong:
        more = f"\n  and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise CheckpointError(f"{file} does not fit the configuration:\n  " + "\n  ".join(wrong[:8]) + more)
    return found


_KEYS = {
    "embed": "model.vocab_size, model.d_model",
    "head": "model.vocab_size, model.tie_embeddings",
    "q_proj": "model.n_heads, model.d_head",
    "k_proj": "model.n_kv_heads, model.d_head",
    "v_proj": "model.n_kv_heads, model.d_head",
    "o_proj": "model.n_heads, model.d_head",
    "indexer": "model.d_indexer, model.n_indexer_heads",
    "value_gate": "model.value_gate",
    "output_gate": "model.output_gate",
    "ffn": "model.d_ffn",
    "layers": "model.n_layers, model.d_model",
}


def _settings_of(name: str) -> str:
    """The settings that decide the shape of a parameter, in parentheses."""
    parts = name.split(".")
    order = ("indexer", "value_gate", "output_gate", "q_proj", "k_proj", "v_proj", "o_proj", "ffn", "embed", "head")
    key = next((part for part in order if part in parts), "layers" if "layers" in parts else "embed")
    return f" ({_KEYS[key]})"


def load_legacy_model(step_dir: Path | str, config: Path | str | Mapping[str, Any] | None = None) -> GSAForCausalLM:
    """The model of a legacy checkpoint, float32, on the CPU, in evaluation mode and the sparse stage.

    config: a legacy configuration or one of this project, as a path or a mapping. Checkpoints of the older variant
    hold their own; the newer variant holds no architecture and needs it. Raises CheckpointError when it is missing or
    disagrees with the checkpoint. Warns when the model computes something else than the legacy trainer did (adaptive
    k).
    """
    step_dir = Path(step_dir)
    model_config = legacy_model_config(step_dir, _read_yaml(config) if isinstance(config, (str, Path)) else config)
    file, data = _load(step_dir)
    weights = _require_shapes(file, data["model_state_dict"], model_config)
    model = GSAForCausalLM(model_config)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and all(name.endswith((_NEW, "v_ref")) for name in missing)
    return model.eval()


def legacy_model_config(step_dir: Path, config: Mapping[str, Any] | None) -> ModelConfig:
    """The architecture: that of the checkpoint when it holds one, else that of `config`.

    config: a legacy configuration or one of this project; None: the checkpoint must hold one. Raises CheckpointError
    when there is none, when the two disagree, or when no model can have it.
    """
    run = read_legacy_run(step_dir)
    given = None if config is None else _model_section(config, "the given configuration")
    if run.model is None and given is None:
        raise CheckpointError(
            f"{run.file} holds weights and no architecture (head counts, k_base, ...): give the yaml of its run "
            f"(on a command line, --config)"
        )
    known = {f.name for f in fields(ModelConfig)}
    decided = {key.partition(".")[2]: value for key, value in DECIDED.items()}
    chosen = {**(given or {}), **(run.model or {}), **decided}
    unknown = sorted(set(chosen) - known)
    if unknown:
        raise CheckpointError(f"{run.file}: its configuration has unknown model keys: {', '.join(unknown)}")
    if given is not None and run.model is not None:
        wrong = [
            f"model.{key}: {run.model[key]!r} in the checkpoint, {given[key]!r} in the configuration"
            for key in sorted(given.keys() & run.model.keys())
            if key not in decided and given[key] != run.model[key]
        ]
        if wrong:
            raise CheckpointError(f"{run.file} disagrees with the configuration:\n  " + "\n  ".join(wrong))
    try:
        model_config = ModelConfig(**chosen)
    except (ValueError, TypeError) as err:
        raise CheckpointError(f"{run.file}: no model can have its architecture: {err}") from err
    if model_config.adaptive_k != "off":
        warnings.warn(ADAPTIVE_WARNING, stacklevel=2)
    return model_config


ADAPTIVE_WARNING = (
    "the legacy trainer's use_adaptive_k normalised the score variance over the batch and over later positions, so "
    "that later tokens changed earlier outputs; it is mapped to adaptive_k=variance, which does not do that, so logits "
    "differ from the legacy ones"
)


def _read_yaml(path: Path | str) -> Mapping[str, Any]:
    try:
        config = yaml_text.load(read_small_file(Path(path), yaml_text.MAX_BYTES).decode("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as err:
        raise CheckpointError(f"{path}: cannot be read as yaml ({err})") from err
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
        raise CheckpointError(f"{path}: a configuration is a mapping with a model section")
    return config
