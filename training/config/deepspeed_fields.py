"""What DeepSpeed 0.19.8 accepts inside each section of its json: checked before DeepSpeed itself is imported.

A test compares these tables with DeepSpeed's own models. DeepSpeed refuses an unknown key in some sections with a
traceback and silently ignores it in others.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Value:
    """What one key may hold.

    kind: of JSON value; a "number" is a float. low, high: inclusive limits, unless `open`. choices: of text. null: it
    may be null.
    """

    kind: Literal["bool", "integer", "number", "text", "texts", "integer or text"]
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    null: bool = False
    open: bool = False

    def fits(self, value: Any) -> bool:
        if value is None:
            return self.null
        if self.kind == "bool":
            return isinstance(value, bool)
        if self.kind == "texts":
            return isinstance(value, list) and all(isinstance(one, str) for one in value)
        if isinstance(value, str):
            return "text" in self.kind and (not self.choices or value in self.choices)
        if self.kind == "text" or isinstance(value, bool) or not isinstance(value, int | float):
            return False
        if not math.isfinite(value) or ("integer" in self.kind and value != int(value)):
            return False
        above = self.low is None or value > self.low or (value == self.low and not self.open)
        return above and (self.high is None or value < self.high or (value == self.high and not self.open))

    def __str__(self) -> str:
        """What fits, for an error message."""
        words = " or ".join(json.dumps(choice) for choice in self.choices) or {
            "bool": "true or false",
            "integer": "a whole number",
            "number": "a number",
            "text": "text",
            "texts": "a list of texts",
            "integer or text": "a whole number or text",
        }.get(self.kind)
        limits = [f"above {self.low:g}" if self.open else f"at least {self.low:g}"] if self.low is not None else []
        limits += [f"below {self.high:g}" if self.open else f"at most {self.high:g}"] if self.high is not None else []
        return " ".join(filter(None, [words, " and ".join(limits)])) + (" (or null)" if self.null else "")


Fields = Mapping[str, "Value | Fields"]

BOOL, INT, TEXT, TEXTS = Value("bool"), Value("integer"), Value("text"), Value("texts")
COUNT = Value("integer", low=0)
SHARE = Value("number", low=0, high=1)
DTYPE = Value("text", choices=("fp32", "fp16", "bf16"), null=True)
DEVICE = Value("text", choices=("none", "cpu", "nvme"))

OFFLOAD_PARAM: Fields = {
    "device": DEVICE,
    "nvme_path": Value("text", null=True),
    "buffer_count": COUNT,
    "buffer_size": COUNT,
    "max_in_cpu": COUNT,
    "pin_memory": BOOL,
}
OFFLOAD_OPTIMIZER: Fields = {
    "device": DEVICE,
    "nvme_path": Value("text", null=True),
    "buffer_count": COUNT,
    "pin_memory": BOOL,
    "pipeline_read": BOOL,
    "pipeline_write": BOOL,
    "fast_init": BOOL,
    "ratio": SHARE,
    "super_offload": BOOL,
    "cpuadam_cores_perc": SHARE,
}
ZENFLOW: Fields = {
    "topk_ratio": Value("number", low=0, high=1, open=True),
    "select_strategy": TEXT,
    "select_interval": Value("integer or text"),
    "update_interval": Value("integer or text"),
    "overlap_step": BOOL,
    "offload": BOOL,
    "auto_ratio": SHARE,
    "full_warm_up_rounds": INT,
    "pt_reserved_cores_perc": SHARE,
    "steps_per_epoch": Value("integer", null=True),
}
STAGE_3: Fields = {
    "prefetch_bucket_size": COUNT,
    "param_persistence_threshold": COUNT,
    "model_persistence_threshold": COUNT,
    "max_live_parameters": COUNT,
    "max_reuse_distance": COUNT,
    "gather_16bit_weights_on_model_save": BOOL,
    "module_granularity_threshold": INT,
    "use_all_reduce_for_fetch_params": BOOL,
    "allgather_sequential": BOOL,
}
"""Keys that only ZeRO 3 reads; each may also have the prefix stage3_."""

ZERO: Fields = {
    "stage": Value("integer", low=0, high=3),
    "contiguous_gradients": BOOL,
    "reduce_scatter": BOOL,
    "reduce_bucket_size": Value("integer", low=0, open=True),
    "use_multi_rank_bucket_allreduce": BOOL,
    "allgather_partitions": BOOL,
    "allgather_bucket_size": COUNT,
    "overlap_comm": Value("bool", null=True),
    "compute_grad_norm": BOOL,
    "load_from_fp32_weights": BOOL,
    "elastic_checkpoint": BOOL,
    "offload_param": OFFLOAD_PARAM,
    "offload_optimizer": OFFLOAD_OPTIMIZER,
    "zenflow": ZENFLOW,
    "sub_group_size": COUNT,
    **STAGE_3,
    **{f"stage3_{name}": value for name, value in STAGE_3.items()},
    "ignore_unused_parameters": BOOL,
    "round_robin_gradients": BOOL,
    "parameter_alignment": BOOL,
    "zero_hpz_partition_size": COUNT,
    "zero_quantized_weights": BOOL,
    "zero_quantized_nontrainable_weights": BOOL,
    "zero_quantized_gradients": BOOL,
    "memory_efficient_linear": BOOL,
    "pipeline_loading_checkpoint": BOOL,
    "override_module_apply": BOOL,
    "log_trace_cache_warnings": BOOL,
    "enable_sanity_checks": BOOL,
    "save_muon_momentum_buffer_in_memory": BOOL,
    "leaf_module": {"classes": TEXTS, "names": TEXTS, "name_suffixes": TEXTS},
}
RENAMED = {
    "legacy_stage1": "DeepSpeed has removed it: leave it out",
    "cpu_offload": 'set offload_optimizer to {"device": "cpu"}',
    "cpu_offload_param": 'set offload_param to {"device": "cpu"}',
    "cpu_offload_use_pin_memory": "set pin_memory inside offload_optimizer or offload_param",
    "stage3_gather_fp16_weights_on_model_save": "set stage3_gather_16bit_weights_on_model_save",
}
"""Keys of zero_optimization that DeepSpeed has given up; it crashes on some of them."""

SECTIONS: Fields = {
    "zero_optimization": ZERO,
    "communication_data_type": DTYPE,
    "seq_parallel_communication_data_type": DTYPE,
    "prescale_gradients": BOOL,
    "gradient_predivide_factor": Value("number", low=0, open=True),
    "data_types": {
        "grad_accum_dtype": DTYPE,
        "param_dtype": DTYPE,
        "buffer_dtype": DTYPE,
        "keep_in_fp32_modules": TEXTS,
    },
    "comms_logger": {"enabled": BOOL, "prof_all": BOOL, "prof_ops": TEXTS, "verbose": BOOL, "debug": BOOL},
    "flops_profiler": {
        "enabled": BOOL,
        "recompute_fwd_factor": Value("number", low=0),
        "profile_step": COUNT,
        "module_depth": INT,
        "top_modules": INT,
        "detailed": BOOL,
        "output_file": Value("text", null=True),
    },
    "memory_breakdown": BOOL,
    "dump_state": BOOL,
    "disable_python_gc": BOOL,
    "aio": {
        "block_size": Value("integer", low=1),
        "queue_depth": Value("integer", low=1),
        "intra_op_parallelism": Value("integer", low=1),
        "single_submit": BOOL,
        "overlap_events": BOOL,
        "use_gds": BOOL,
    },
    "compile": {
        "deepcompile": BOOL,
        "autoep_non_moe": BOOL,
        "free_activation": BOOL,
        "free_activation_threshold": INT,
        "offload_activation": BOOL,
        "offload_activation_pin_memory": BOOL,
        "offload_opt_states": BOOL,
        "double_buffer": BOOL,
        "symmetric_memory": BOOL,
        "debug_log": BOOL,
        "offload_parameters": BOOL,
        "sync_before_reduce": BOOL,
        "sync_after_reduce": BOOL,
        "sync_before_allgather": BOOL,
        "sync_after_allgather": BOOL,
        "keep_int_input_tensors": BOOL,
        "keep_all_input_tensors": BOOL,
        "passes": Value("texts", null=True),
    },
    "steps_per_print": Value("integer", low=1, null=True),
    "wall_clock_breakdown": BOOL,
}
"""Every section that a json of this project may set, besides those that the run's yaml owns."""
