"""Makes the one DeepSpeed dict of a run: ZeRO from a ds_configs/*.json, everything else from the run's yaml."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gsa.files import read_small_file
from training.config.batch import BatchPlan
from training.config.deepspeed_fields import RENAMED, SECTIONS, STAGE_3, Fields
from training.config.load import did_you_mean
from training.config.schema import ConfigError, RunConfig

LARGEST_BYTES = 1 << 20
"""A longer file is no DeepSpeed configuration."""
DEFAULT = Path(__file__).resolve().parents[2] / "ds_configs" / "zero2.json"

_OURS = "it belongs to the run's yaml"
REFUSED = {
    "optimizer": f"{_OURS}: training.learning_rate and the keys beside it",
    "scheduler": f"{_OURS}: training.lr_scheduler and the keys beside it",
    "fp16": "float16 is not supported; use training.precision=bf16",
    "amp": "apex amp is not supported; use training.precision=bf16",
    "torch_autocast": "use training.precision=bf16",
    "checkpoint": "checkpoints are written by this project, which verifies them",
    "wandb": "tracking belongs to logging.wandb",
    "tensorboard": "use logging.tensorboard",
    "csv_monitor": "metrics.jsonl has every number",
    "gradient_accumulation_dtype": "set it as data_types.grad_accum_dtype",
    "zero_allow_untested_optimizer": "set by this project",
    "zero_force_ds_cpu_optimizer": "set by this project: torch's AdamW serves offload too, and needs no compiler",
    "timers": "metrics.jsonl has the seconds of every phase; DeepSpeed's timers wait for the device in every pass",
    "elasticity": "removed from DeepSpeed 0.19.8; here a run resumes on any number of ranks",
    "curriculum_learning": "removed from DeepSpeed 0.19.8",
    "compression_training": "removed from DeepSpeed 0.19.8",
    "sparse_gradients": "removed from DeepSpeed 0.19.8",
    "disable_allgather": "DeepSpeed 0.19.8 reads it and does nothing with it; leave it out",
    "sparse_attention": "removed from DeepSpeed 0.19.8; the layer is model.sparse",
    "progressive_layer_drop": "removed from DeepSpeed 0.19.8",
    "nebula": "removed from DeepSpeed 0.19.8",
    "datastates_ckpt": "checkpoints are written by this project, which verifies them",
    "managed_gradient_accumulation": "the engine counts accumulation in this project",
}
ALLOWED = tuple(SECTIONS)
"""Top-level sections that a json may set. DeepSpeed itself silently ignores an unknown one."""


def resolve_ds_config(path: Path | None, cfg: RunConfig, plan: BatchPlan, config_path: Path) -> dict[str, Any]:
    """The complete DeepSpeed configuration, with nothing left "auto".

    path: a ds_configs/*.json, or None for ZeRO 2. config_path: the run's yaml, for messages. A key that the yaml
    decides may be left out of the json, be "auto", or have the same value. Raises ConfigError, naming both files, for
    another value, and for sections that are unknown, refused, or do not go with the yaml.
    """
    path = path or DEFAULT
    given = _read(path)
    owned: dict[str, Any] = {
        "train_batch_size": plan.global_batch_size,
        "train_micro_batch_size_per_gpu": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.accumulation_steps,
        "gradient_clipping": cfg.training.grad_clip,
        "bf16": {"enabled": cfg.training.precision == "bf16"},
    }
    sources = {
        "train_batch_size": "training.global_batch_size",
        "train_micro_batch_size_per_gpu": "training.micro_batch_size",
        "gradient_accumulation_steps": "training.gradient_accumulation_steps",
        "gradient_clipping": "training.grad_clip",
        "bf16": "training.precision",
    }
    result: dict[str, Any] = {}
    for key, value in given.items():
        if key in REFUSED:
            raise ConfigError(f"{path}: section {key!r} does not belong here: {REFUSED[key]}")
        if key in owned:
            if _differs(value, owned[key]):
                raise ConfigError(
                    f"{path} sets {key}={json.dumps(value)}, but {sources[key]} of {config_path} makes it "
                    f'{json.dumps(owned[key])}; leave {key!r} out of the json, or set it to "auto"'
                )
        elif key in ALLOWED:
            result[key] = value
        else:
            raise ConfigError(f"{path}: unknown key {key!r}{_close(key, [*ALLOWED, *owned])}")
    _refuse_auto(result, path)
    result.setdefault("zero_optimization", {"stage": 0})
    _require_fields(result, SECTIONS, path)
    stage = _require_effect(result["zero_optimization"], path)
    if stage == 0 and cfg.training.precision == "bf16":
        raise ConfigError(
            f"{path} has ZeRO stage 0 and {config_path} training.precision=bf16: DeepSpeed 0.19.8 takes a stray first "
            f"step in this pair; use stage 1, or training.precision=fp32"
        )
    if stage == 3 and cfg.training.compile:
        raise ConfigError(
            f"{path} has ZeRO stage 3 and {config_path} training.compile=true: compiled code does not see the weights "
            f"that ZeRO gathers around it; use stage 1 or 2, or training.compile=false"
        )
    return {
        "steps_per_print": 2**31 - 1,
        "wall_clock_breakdown": False,
        **result,
        **owned,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "timers": {"throughput": {"enabled": False}},
    }


def _read(path: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for i, (key, _) in enumerate(pairs):
            if key in (k for k, _ in pairs[:i]):
                raise ConfigError(f"{path}: {key!r} is set twice; keep one")
        return dict(pairs)

    try:
        given = json.loads(read_small_file(path, LARGEST_BYTES).decode(), object_pairs_hook=unique)
    except OSError as err:
        raise ConfigError(f"--deepspeed_config {path}: {err.strerror}") from err
    except UnicodeDecodeError as err:
        raise ConfigError(f"--deepspeed_config {path}: not UTF-8 text ({err.reason} at byte {err.start})") from err
    except json.JSONDecodeError as err:
        raise ConfigError(f"{path}, line {err.lineno}: not JSON: {err.msg}") from err
    except (RecursionError, ValueError) as err:  # ConfigError has its words; the others are nested or long beyond sense
        if isinstance(err, ConfigError):
            raise
        raise ConfigError(f"{path}: not a DeepSpeed configuration: nested too deeply, or a number too long") from None
    if not isinstance(given, dict):
        raise ConfigError(f"{path}: a DeepSpeed configuration is a JSON object")
    return given


def _differs(given: Any, owned: Any) -> bool:
    if given == "auto":
        return False
    if isinstance(owned, dict):
        return not isinstance(given, dict) or any(_differs(value, owned.get(key)) for key, value in given.items())
    return given != owned


def _require_fields(section: dict[str, Any], fields: Fields, path: Path, prefix: str = "") -> None:
    """Refuses keys inside sections that DeepSpeed would crash on or ignore, and values that do not fit."""
    for key, value in section.items():
        name, expected = f"{prefix}{key}", fields.get(key)
        if expected is None:
            if prefix == "zero_optimization." and key in RENAMED:
                raise ConfigError(f"{path}: {name} is an old name; {RENAMED[key]}")
            hint = did_you_mean(key, list(fields))
            hint = hint if "did you mean" in hint else f"; it may hold {', '.join(fields)}"
            raise ConfigError(f"{path}: unknown key {name!r}{hint}")
        if isinstance(expected, Mapping):
            if not isinstance(value, dict):
                raise ConfigError(f"{path}: {name} must be an object, not {json.dumps(value)}; leave it out or fill it")
            _require_fields(value, expected, path, f"{name}.")
        elif not expected.fits(value):
            raise ConfigError(f"{path}: {name} must be {expected}, not {json.dumps(value)}")


def _require_effect(zero: dict[str, Any], path: Path) -> int:
    """Refuses what the ZeRO stage of the file would ignore in silence. Returns the stage."""
    stage = zero.get("stage", 0)
    if stage < 3:
        useless = [key for key in zero if key.removeprefix("stage3_") in STAGE_3 or key == "offload_param"]
        useless += [
            f"offload_optimizer.{key}"
            for key in ("ratio", "super_offload", "cpuadam_cores_perc")
            if key in zero.get("offload_optimizer", {})
        ]
        if useless:
            raise ConfigError(
                f"{path}: only ZeRO 3 reads {', '.join(useless)} of zero_optimization, and the stage is {stage}; "
                f"leave it out, or set the stage to 3"
            )
    for section in ("offload_optimizer", "offload_param"):
        offload = zero.get(section, {})
        device = offload.get("device", "none")
        if stage == 0 and device != "none":
            raise ConfigError(f"{path}: ZeRO 0 ignores zero_optimization.{section}; set the stage to 1, 2 or 3")
        if device == "nvme" and stage < 3:
            raise ConfigError(
                f"{path}: zero_optimization.{section}.device is nvme, which ZeRO {stage} treats as cpu; "
                f"set it to cpu, or the stage to 3"
            )
        if device == "nvme" and not offload.get("nvme_path"):
            raise ConfigError(f"{path}: zero_optimization.{section}.device is nvme; set nvme_path beside it")
        if device != "nvme" and offload.get("nvme_path"):
            raise ConfigError(
                f"{path}: zero_optimization.{section}.nvme_path does nothing, since device is {device}; leave it out, "
                f"or set device to nvme"
            )
    return stage


def _refuse_auto(section: dict[str, Any], path: Path, prefix: str = "") -> None:
    for key, value in section.items():
        if isinstance(value, dict):
            _refuse_auto(value, path, f"{prefix}{key}.")
        elif value == "auto":
            # DeepSpeed would silently use its default
            raise ConfigError(f'{path}: {prefix}{key} is "auto", which nothing resolves; give a value or leave it out')


def _close(key: str, known: list[str]) -> str:
    hint = did_you_mean(key, known)
    return hint if "did you mean" in hint else f"; a json may set {', '.join(ALLOWED)}"
