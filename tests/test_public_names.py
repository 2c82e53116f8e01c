"""Names under which others build stay importable: those that commit 625a451 offered."""

from __future__ import annotations

import importlib

import pytest

NAMES = {
    "gsa": "ModelConfig GSAForCausalLM",
    "gsa.checkpoint.manifest": "CheckpointError Manifest write_durably replace_durably seal publish verify read resolve newest_good list_checkpoints retain",
    "gsa.checkpoint.state": "RunState CLIENT_KEY VERSION read_config_json read_json_object require_plain",
    "gsa.checkpoint.full_state": "FullState ParameterState Layout read_full_state read_layout read_run_state read_ds_config",
    "gsa.checkpoint.legacy": "read_legacy read_legacy_run load_legacy_model legacy_model_config is_legacy translate",
    "gsa.checkpoint.safe_load": "load",
    "gsa.weights": "load_weights save_weights",
    "gsa.config": "ModelConfig ADAPTIVE_K",
    "gsa.attention.gated_sparse": "GatedSparseAttention Stage",
    "gsa.attention.positions": "Positions positions",
    "gsa.kernels": "select attend alignment_kl silu_product Index Selection Backend visible saved_by_checkpointing",
    "gsa.kernels.kept": "kept saved_by_checkpointing",
    "gsa.kernels.reference": "visible",
    "training.config": "Effect ConfigError OnSpike TrainingConfig DataConfig LoggingConfig RunConfig SECTIONS all_keys "
    "load_config did_you_mean BatchPlan plan_batch global_batch_size to_plain from_plain to_yaml format_help "
    "RESUME_EFFECT EFFECT_WORDS Change config_changes ModelConfig PRECISIONS SCHEDULES",
    "training.data": "IGNORE FORMAT MANIFEST_KEYS DataError Batch PackedTokens read_manifest step_samples past Loader "
    "BLOCK BatchPlan Order permute",
}


@pytest.mark.parametrize("module, name", [(module, name) for module in NAMES for name in NAMES[module].split()])
def test_it_can_be_imported_from_where_it_was(module, name):
    assert hasattr(importlib.import_module(module), name)
