"""The public names of this package, which `from training.config import ...` finds."""

from typing import get_args, get_type_hints

from gsa.config import Effect, ModelConfig
from training.config.batch import BatchPlan, plan_batch, windows_per_step
from training.config.batch import windows_per_step as global_batch_size
from training.config.changes import EFFECT_WORDS, Change, config_changes
from training.config.load import did_you_mean, format_help, load_config
from training.config.run_spec import RunSpec
from training.config.schema import (
    KEYS,
    RESUME_EFFECT,
    SECTIONS,
    ConfigError,
    DataConfig,
    LoggingConfig,
    OnSpike,
    RunConfig,
    TrainingConfig,
    all_keys,
    from_plain,
    to_plain,
    to_yaml,
)

PRECISIONS = get_args(get_type_hints(TrainingConfig)["precision"])
SCHEDULES = get_args(get_type_hints(TrainingConfig)["lr_scheduler"])

__all__ = [
    "EFFECT_WORDS",
    "KEYS",
    "PRECISIONS",
    "RESUME_EFFECT",
    "SCHEDULES",
    "SECTIONS",
    "BatchPlan",
    "Change",
    "ConfigError",
    "DataConfig",
    "Effect",
    "LoggingConfig",
    "ModelConfig",
    "OnSpike",
    "RunConfig",
    "RunSpec",
    "TrainingConfig",
    "all_keys",
    "config_changes",
    "did_you_mean",
    "format_help",
    "from_plain",
    "global_batch_size",
    "load_config",
    "plan_batch",
    "to_plain",
    "to_yaml",
    "windows_per_step",
]
