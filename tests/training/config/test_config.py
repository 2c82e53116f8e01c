"""Reading and checking a configuration, its batch arithmetic, DeepSpeed's dict, and the effects of a change."""

from __future__ import annotations

import json
import os
from enum import Enum
from pathlib import Path
from typing import get_args

import pytest
from support.launching import ROOT

from gsa.model import count_params
from training.config import (
    EFFECT_WORDS,
    RESUME_EFFECT,
    ConfigError,
    TrainingConfig,
    all_keys,
    config_changes,
    format_help,
    from_plain,
    load_config,
    plan_batch,
    to_plain,
    to_yaml,
    windows_per_step,
)
from training.config.deepspeed import resolve_ds_config
from training.config.deepspeed_fields import RENAMED, SECTIONS, Value
from training.config.load import TYPES, markdown_table

QUICKSTART = ROOT / "training" / "configs" / "quickstart.yaml"
YAMLS = sorted((ROOT / "training" / "configs").glob("*.yaml"))
JSONS = sorted((ROOT / "ds_configs").glob("*.json"))


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


# -- reading ----------------------------------------------------------------------------------------------


def test_overrides_take_precedence_over_the_yaml_and_the_yaml_over_defaults(tmp_path):
    path = written(tmp_path, "training:\n  max_steps: 70\n  learning_rate: 3e-4\nmodel: {d_model: 192, n_heads: 6}\n")
    cfg = load_config(
        path, ["training.max_steps=80", "training.stop_at_step=${training.max_steps}", "logging.wandb=true"]
    )
    assert (cfg.training.max_steps, cfg.training.stop_at_step, cfg.training.learning_rate) == (80, 80, 3e-4)
    assert cfg.training.beta2 == 0.95 and cfg.logging.wandb is True
    assert cfg.model.d_head == 32  # this model's, not the default model's


def test_the_mixture_is_read_and_checked(tmp_path):
    path = written(tmp_path, "data:\n  mixture: {a: 1, b/c: 0.5}\n")
    assert load_config(path, []).data.mixture == {"a": 1.0, "b/c": 0.5}
    assert "weight -1.0 of a must be above 0" in refusal(path, "data.mixture={a: -1}")
    assert "data.mixture is empty" in refusal(path, "data.mixture={}")


OMEGACONF_WORDS = ("nterpolation", "viable", "mandatory", "Config`", "converted", "assigned", "subclass", "(type")


@pytest.mark.parametrize(
    "text, override, words",
    [
        (
            "training:\n  micro_batch_sise: 3\n",
            None,
            ["run.yaml, line 2", "unknown key", "did you mean training.micro_batch_size"],
        ),
        ("training:\n  n_layers: 3\n", None, ["run.yaml, line 2", "did you mean model.n_layers?"]),
        ("trainning:\n  seed: 3\n", None, ["run.yaml, line 1", "unknown section 'trainning'; did you mean training"]),
        ("training:\n  seed: 3\n  seed: 4\n", None, ["line 3", "'seed' is set already in line 2"]),
        ("training: {}\ntraining: {}\n", None, ["line 2", "set already in line 1"]),
        ("data:\n  mixture: {a: 1, a: 2}\n", None, ["'a' is set already"]),
        (
            "training:\n  max_steps: many\n",
            None,
            ["run.yaml, line 2", 'training.max_steps="many" must be a whole number'],
        ),
        ("training:\n  max_steps: 2.5\n", None, ["training.max_steps=2.5 must be a whole number"]),
        ("training:\n  seed: null\n", None, ["training.seed=null must be a whole number"]),
        ("training: 5\n", None, ["section 'training' must be a mapping"]),
        ("", None, ["a configuration is a mapping"]),
        ("- a\n", None, ["a configuration is a mapping"]),
        ("training: [\n", None, ["run.yaml, line 2", "not yaml"]),
        (
            "training:\n  max_steps: 5\n",
            "training.stop_at_step=6",
            ["override 'training.stop_at_step=6'", "line 2", "lies beyond training.max_steps=5"],
        ),
        (
            "model:\n  n_heads: 8\n",
            "model.n_kv_heads=3",
            ["override 'model.n_kv_heads=3'", "choose one of [1, 2, 4, 8]"],
        ),
        ("{}", "training.max_steps", ["not key=value"]),
        ("{}", "training.max_stepz=1", ["override 'training.max_stepz=1'", "did you mean training.max_steps"]),
        ("{}", "training.precision=fp16", ["override 'training.precision=fp16'", '"fp16" must be one of bf16, fp32']),
        ("{}", "training.lr_scheduler=constant", ["must be one of cosine, linear, wsd"]),
        ("{}", "training.wsd_decay_steps=5", ["means nothing with training.lr_scheduler=cosine"]),
        ("{}", "training.min_learning_rate=1", ["above training.learning_rate"]),
        ("{}", "training.indexer_loss_rows=1.5", ["at most 1"]),
        ("{}", "training.micro_batch_size=0", ["must be at least 1"]),
        ("{}", "training.beta1=1.0", ["below 1"]),
        ("{}", "training.max_seq_len=4096", ["above model.max_position_embeddings=2048"]),
        ("{}", "training.hang_timeout_s=0", ["must be above 0"]),
        ("{}", "training.seed=18446744073709551616", ["training.seed=", "must be at most 18446744073709551615"]),
        ("{}", "training.max_steps=9223372036854775808", ["must be at most 9223372036854775807"]),
        ("training:\n  max_steps: 5\n", "training.max_steps=${nope}", ["override 'training.max_steps=$"]),
        ("{}", "training.max_steps=${nope}", ["refers to nothing that fits", "as in ${training.seed}", "write \\${"]),
        (
            "{}",
            "training.max_steps=${data.data_dir}",
            ["override 'training.max_steps=$", "refers to nothing that fits"],
        ),
        ("{}", "data.data_dir='${data.data_dir}'", ["data.data_dir has a ${...} that refers to nothing"]),
        ("{}", "training.sample_prompts=['${', b]", ["training.sample_prompts has a ${...}"]),
        ("training:\n  sample_prompts: ['a ${b']\n", None, ["run.yaml, line 2", "sample_prompts has a ${...}"]),
        ("{}", "logging.run_name='???'", ['logging.run_name holds "???"', "give one"]),
        ("{}", "data.mixture={a: '???'}", ['data.mixture holds "???"']),
        ("{}", "training.sample_prompts=a", ['="a" must be a list of texts, as in [a, b]']),
        ("{}", "training.sample_prompts=[null]", ["must be a list of texts"]),
        ("{}", "training.init_from=[a]", ['training.init_from=["a"] must be text or null']),
        ("{}", "data.mixture=[a]", ["must be folders with their weights, as in {data/a: 1, data/b: 2}"]),
        ("{}", "data.mixture={1: 2}", ["must be folders with their weights"]),
        ("{}", "training.compile=maybe", ['training.compile="maybe" must be true or false']),
        ("{}", "training.learning_rate=true", ["training.learning_rate=true must be a number"]),
        ("{}", "training.max_steps=2024-13-45", ["the value is not yaml"]),
        ("{}", "logging.project={", ["the value is not yaml; put text with special characters in quotes"]),
        ("{}", "logging.project=!!python/object:os.system x", ["the value is not yaml"]),
        (
            "training:\n  seed: !!python/object:os.system x\n",
            None,
            ["run.yaml, line 2: training.seed is no plain value"],
        ),
        ("training:\n  seed: 2024-13-45\n", None, ["run.yaml, line 2: training.seed is no plain value"]),
    ],
)
def test_a_refusal_names_the_file_and_line_or_the_override(tmp_path, text, override, words):
    message = refusal(written(tmp_path, text), *([override] if override else []))
    assert not [word for word in OMEGACONF_WORDS if word in message], message
    for word in words:
        assert word in message, message


def test_a_missing_or_binary_file_is_named(tmp_path):
    assert "nowhere.yaml: No such file" in refusal(tmp_path / "nowhere.yaml")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    assert "b.yaml: not UTF-8" in refusal(tmp_path / "b.yaml")


def test_warmup_and_intervals_longer_than_the_run_are_allowed(tmp_path):
    path = written(
        tmp_path,
        "training: {max_steps: 5, warmup_steps: 50, indexer_warmup_steps: 50, eval_interval: 99, save_interval: 99}\n",
    )
    assert load_config(path, []).training.warmup_steps == 50


def test_help_lists_every_key_with_type_default_bounds_meaning_and_effect():
    text = format_help()
    for key, field in all_keys().items():
        effect = EFFECT_WORDS[RESUME_EFFECT[key]]
        assert f"  {key.split('.')[1]} (" in text, key
        assert f"      {field.metadata['meaning']} [on resume: {effect}]\n" in text + "\n", key
    for line in (
        "max_steps (int, default 1000, at least 1)",
        "precision (bf16 or fp32, default bf16)",
        "beta1 (float, default 0.9, at least 0, below 1)",
        "stop_at_step (int or null, default null, at least 1)",
        "async_save (bool, default true)",
    ):
        assert f"  {line}\n" in text
    assert "the accumulation follows from it and the number of ranks. [on resume: changes the curve]" in text


def test_the_resolved_configuration_reads_back_the_same(tmp_path):
    cfg = load_config(QUICKSTART, ["training.seed=9"])
    assert load_config(written(tmp_path, to_yaml(cfg)), []) == cfg
    assert json.loads(json.dumps(to_plain(cfg))) == to_plain(cfg)
    assert from_plain(to_plain(cfg)) == cfg


@pytest.mark.parametrize(
    "plain", [{"model": {"n_heads": 0}}, {"training": {"seed": -1}}, {"training": {"no_such_key": 1}}, {"data": None}]
)
def test_a_plain_configuration_that_does_not_fit_is_refused(plain):
    with pytest.raises(ConfigError, match="not a configuration of this version"):
        from_plain(plain)


# -- batch arithmetic -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "micro, accumulation, total, ranks, expected",
    [
        (4, None, None, 2, (1, 8)),
        (4, 3, None, 2, (3, 24)),
        (4, None, 16, 1, (4, 16)),
        (4, None, 16, 4, (1, 16)),
        (8, 8, 256, 4, (8, 256)),
        (8, None, 256, 2, (16, 256)),
    ],
)
def test_accumulation_follows_from_the_global_batch(micro, accumulation, total, ranks, expected):
    cfg = TrainingConfig(micro_batch_size=micro, gradient_accumulation_steps=accumulation, global_batch_size=total)
    plan = plan_batch(cfg, ranks)
    assert (plan.accumulation_steps, plan.global_batch_size) == expected
    assert plan.micro_batch_size * plan.accumulation_steps * ranks == plan.global_batch_size


def test_an_accumulation_that_contradicts_the_global_batch_is_refused():
    with pytest.raises(ConfigError) as caught:
        plan_batch(TrainingConfig(micro_batch_size=8, gradient_accumulation_steps=8, global_batch_size=256), 2)
    for words in ("2 rank(s) x 8 windows x 8 are 128", "training.gradient_accumulation_steps=null makes it 16 here"):
        assert words in str(caught.value)


def test_the_quickstart_runs_on_any_number_of_ranks():
    cfg = load_config(QUICKSTART, [])
    assert [plan_batch(cfg.training, ranks).global_batch_size for ranks in range(1, 10)] == [
        8 * r for r in range(1, 10)
    ]


def test_an_indivisible_batch_lists_what_fits():
    with pytest.raises(ConfigError) as caught:
        plan_batch(TrainingConfig(micro_batch_size=4, global_batch_size=24), 4)
    assert "choose a micro_batch_size of 1, 2, 3, 6, or 1, 2, 3, 6 ranks, or a global_batch_size of 16 or 32" in str(
        caught.value
    )
    with pytest.raises(ConfigError, match="8 ranks; choose 1, 2, 4 ranks, or a global_batch_size of 8$"):
        plan_batch(TrainingConfig(micro_batch_size=1, global_batch_size=4), 8)
    with pytest.raises(ConfigError, match="x 3 ranks; choose a global_batch_size of 12$"):  # no list is empty
        plan_batch(TrainingConfig(micro_batch_size=4, global_batch_size=2), 3)
    for micro in (1, 2, 3, 6):
        plan_batch(TrainingConfig(micro_batch_size=micro, global_batch_size=24), 4)
    for ranks in (1, 2, 3, 6):
        plan_batch(TrainingConfig(micro_batch_size=4, global_batch_size=24), ranks)


# -- DeepSpeed's dict -------------------------------------------------------------------------------------


@pytest.mark.parametrize("yaml_path", YAMLS, ids=lambda p: p.stem)
@pytest.mark.parametrize("json_path", JSONS, ids=lambda p: p.stem)
def test_every_shipped_yaml_resolves_with_every_shipped_json_or_is_refused_with_a_reason(yaml_path, json_path):
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    cfg = load_config(yaml_path, [])
    plan = plan_batch(cfg.training, 4)
    if json_path.stem == "zero0" and cfg.training.precision == "bf16":
        with pytest.raises(ConfigError, match="stray first step"):
            resolve_ds_config(json_path, cfg, plan, yaml_path)
        return
    resolved = resolve_ds_config(json_path, cfg, plan, yaml_path)
    assert '"auto"' not in json.dumps(resolved)
    assert resolved["train_batch_size"] == plan.global_batch_size == 4 * plan.micro_batch_size * plan.accumulation_steps
    assert resolved["gradient_clipping"] == cfg.training.grad_clip  # DeepSpeed's own default would be 1.0
    DeepSpeedZeroConfig(**resolved["zero_optimization"])  # refuses unknown keys


@pytest.mark.parametrize(
    "content, words",
    [
        (
            '{"gradient_clipping": 0.5}',
            ["zero.json sets gradient_clipping=0.5", "training.grad_clip of", "quickstart.yaml", "1.0"],
        ),
        ('{"train_batch_size": 99}', ["train_batch_size=99", "training.global_batch_size"]),
        ('{"bf16": {"enabled": true}}', ["training.precision", "false"]),
        ('{"optimizer": {"type": "Adam"}}', ["section 'optimizer' does not belong here"]),
        ('{"fp16": {"enabled": true}}', ["use training.precision=bf16"]),
        ('{"elasticity": {}}', ["removed from DeepSpeed 0.19.8"]),
        ('{"zero_optimisation": {"stage": 2}}', ["unknown key 'zero_optimisation'", "did you mean zero_optimization"]),
        (
            '{"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}',
            ['zero_optimization.reduce_bucket_size is "auto"'],
        ),
        (
            '{"zero_optimization": {"stage": 4}}',
            ["zero_optimization.stage must be a whole number at least 0 and at most 3, not 4"],
        ),
        ('{"zero_optimization": {"stage": 1}, "zero_optimization": {}}', ["'zero_optimization' is set twice"]),
        ('{"a": 1,}', ["zero.json, line 1", "not JSON"]),
        (
            '{"zero_optimization": {"stage": 2, "overlap_com": true}}',
            ["unknown key 'zero_optimization.overlap_com'", "did you mean overlap_comm?"],
        ),
        ('{"zero_optimization": {"stage": 2, "nonsense": 1}}', ["'zero_optimization.nonsense'", "it may hold stage, "]),
        (
            '{"zero_optimization": {"stage": 2, "overlap_comm": "yes"}}',
            ['zero_optimization.overlap_comm must be true or false (or null), not "yes"'],
        ),
        (
            '{"zero_optimization": {"stage": 2, "reduce_bucket_size": 0}}',
            ["zero_optimization.reduce_bucket_size must be a whole number above 0, not 0"],
        ),
        ('{"zero_optimization": {"stage": 2, "reduce_bucket_size": 1.5}}', ["must be a whole number", "not 1.5"]),
        ('{"zero_optimization": {"stage": 2, "reduce_bucket_size": 1e999}}', ["must be a whole number", "Infinity"]),
        ('{"zero_optimization": {"stage": true}}', ["stage must be a whole number", "not true"]),
        ('{"zero_optimization": true}', ["zero_optimization must be an object, not true"]),
        (
            '{"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "gpu"}}}',
            ['zero_optimization.offload_optimizer.device must be "none" or "cpu" or "nvme", not "gpu"'],
        ),
        (
            '{"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}',
            ["zero_optimization.offload_param.device is nvme; set nvme_path"],
        ),
        (
            '{"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme", "nvme_path": "/x"}}}',
            ["which ZeRO 2 treats as cpu", "set it to cpu"],
        ),
        (
            '{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "nvme_path": "/x"}}}',
            ["nvme_path does nothing, since device is cpu"],
        ),
        (
            '{"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}, "stage3_max_live_parameters": 1}}',
            ["only ZeRO 3 reads offload_param, stage3_max_live_parameters"],
        ),
        ('{"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}', ["ZeRO 0 ignores", "set the stage to 1"]),
        ('{"zero_optimization": {"stage": 2, "cpu_offload": true}}', ["old name; set offload_optimizer to"]),
        ('{"flops_profiler": {"enable": true}}', ["unknown key 'flops_profiler.enable'; did you mean enabled?"]),
        ('{"data_types": {"grad_accum_dtype": "bfloat16"}}', ['must be "fp32" or "fp16" or "bf16" (or null)']),
        ('{"communication_data_type": "fp8"}', ["communication_data_type must be"]),
        ('{"prescale_gradients": 1}', ["prescale_gradients must be true or false, not 1"]),
        ('{"sparse_gradients": true}', ["removed from DeepSpeed"]),
        ('{"disable_allgather": true}', ["does nothing with it"]),
        ("[" * 100000, ["nested too deeply"]),
        ("[]", ["is a JSON object"]),
    ],
)
def test_a_json_with_a_wrong_value_or_section_is_refused(tmp_path, content, words):
    path = tmp_path / "zero.json"
    path.write_text(content)
    cfg = load_config(QUICKSTART, [])
    with pytest.raises(ConfigError) as caught:
        resolve_ds_config(path, cfg, plan_batch(cfg.training, 2), QUICKSTART)
    for word in words:
        assert word in str(caught.value)


def test_a_json_that_is_no_text_or_no_file_is_refused(tmp_path):
    cfg = load_config(QUICKSTART, [])
    (tmp_path / "latin.json").write_bytes(b'{"a": "\xe9"}')
    os.mkfifo(tmp_path / "pipe.json")
    for name, words in (("latin.json", "not UTF-8 text"), ("pipe.json", "not a regular file"), (".", "not a regular")):
        with pytest.raises(ConfigError, match=words):
            resolve_ds_config(tmp_path / name, cfg, plan_batch(cfg.training, 2), QUICKSTART)


def _notation(model) -> dict:
    """A pydantic model of DeepSpeed as deepspeed_fields.py writes it; deprecated keys are left out."""
    from pydantic import BaseModel

    found = {}
    for name, info in model.model_fields.items():
        if (info.json_schema_extra or {}).get("deprecated") or name in RENAMED:
            continue
        inner = [t for t in (info.annotation, *get_args(info.annotation)) if isinstance(t, type)]
        models = [t for t in inner if issubclass(t, BaseModel)]
        found[name] = _notation(models[0]) if models else _value(info, inner)
        if info.alias:
            found[info.alias] = found[name]
    return found


def _value(info, inner: list[type]) -> Value:
    types = {t for t in inner if t is not type(None)}
    bounds = {type(m).__name__: getattr(m, type(m).__name__.lower()) for m in info.metadata}
    enums = [t for t in types if issubclass(t, Enum)]
    low, high = bounds.get("Ge", bounds.get("Gt")), bounds.get("Le", bounds.get("Lt"))
    kind = "texts"
    for made, word in ((str, "text"), (Path, "text"), (float, "number"), (int, "integer"), (bool, "bool")):
        kind = word if made in types else kind
    kind = "integer or text" if {int, str} <= types else kind
    kind = "texts" if "list" in str(info.annotation).lower() else kind
    choices = ()
    if enums and issubclass(enums[0], str):
        kind, choices = "text", tuple(e.value for e in enums[0])
    elif enums:
        kind, low, high = "integer", 0, 3
    null = type(None) in get_args(info.annotation)
    return Value(kind, low, high, choices, null, bool({"Gt", "Lt"} & bounds.keys()))


def test_the_table_of_deepspeed_keys_is_true_of_the_installed_deepspeed():
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.compile.config import CompileConfig
    from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig
    from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    assert _notation(DeepSpeedZeroConfig) == SECTIONS["zero_optimization"]
    assert _notation(CommsLoggerConfig) == SECTIONS["comms_logger"]
    assert _notation(CompileConfig) == SECTIONS["compile"]
    assert AIO_DEFAULT_DICT.keys() == SECTIONS["aio"].keys()
    assert vars(DeepSpeedFlopsProfilerConfig({})).keys() == SECTIONS["flops_profiler"].keys()
    assert all(value.fits(AIO_DEFAULT_DICT[key]) for key, value in SECTIONS["aio"].items())
    assert all(SECTIONS["flops_profiler"][k].fits(v) for k, v in vars(DeepSpeedFlopsProfilerConfig({})).items())


def test_keys_that_the_yaml_owns_may_be_auto_or_have_the_same_value(tmp_path):
    path = tmp_path / "zero.json"
    path.write_text(
        '{"train_batch_size": "auto", "gradient_clipping": 1.0, "bf16": {"enabled": "auto"}, "zero_optimization": {"stage": 1}}'
    )
    cfg = load_config(QUICKSTART, [])
    resolved = resolve_ds_config(path, cfg, plan_batch(cfg.training, 2), QUICKSTART)
    assert resolved["train_batch_size"] == 16 and resolved["bf16"] == {"enabled": False}
    default = resolve_ds_config(None, cfg, plan_batch(cfg.training, 2), QUICKSTART)
    assert default["zero_optimization"]["stage"] == 2


# -- shipped runs, and what a change does -----------------------------------------------------------------


def test_the_512m_configuration_has_512m_parameters_and_the_documented_batch():
    cfg = load_config(ROOT / "training" / "configs" / "pretrain_512m_low_memory.yaml", [])
    m, t = cfg.model, cfg.training
    assert (m.d_model, m.n_layers, m.n_heads, m.n_kv_heads, m.d_ffn, m.vocab_size, m.tie_embeddings) == (
        1024,
        26,
        16,
        4,
        3072,
        151936,
        True,
    )
    assert count_params(m)["total"] == pytest.approx(511.9e6, rel=0.01)
    plan = plan_batch(t, 4)
    assert (plan.micro_batch_size, plan.accumulation_steps, plan.global_batch_size, t.max_seq_len) == (8, 8, 256, 2048)


def test_every_key_has_a_meaning_and_an_effect_on_resume():
    assert set(RESUME_EFFECT) == set(all_keys()) and set(RESUME_EFFECT.values()) == set(EFFECT_WORDS)
    for name, field in all_keys().items():
        assert field.metadata["meaning"].endswith("."), name


UNBOUNDED = {"model.d_head"}
"""Numbers without a bound in their field: ModelConfig itself checks that d_head is even and positive."""


def test_every_number_has_a_bound_and_every_bound_is_enforced(tmp_path):
    path = written(tmp_path, "{}")
    for name, field in all_keys().items():
        bounds = field.metadata["bounds"]
        if name not in UNBOUNDED and TYPES[name] in (int, float, int | None, float | None):
            assert bounds, f"{name} has no bound"
        for bound, limit in bounds.items():
            whole = TYPES[name] in (int, int | None)
            step, limit = (1, limit) if whole else (0.5, float(limit))
            wrong = {"at least": limit - step, "above": limit, "at most": limit + step, "below": limit}[bound]
            assert f"{name}={wrong} must be {bound} {field.metadata['bounds'][bound]}" in refusal(
                path, f"{name}={wrong}"
            )


def test_docs_configuration_md_is_up_to_date():
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert page == markdown_table(), "run python scripts/write_docs.py"


@pytest.mark.parametrize(
    ("before", "after", "step", "effect"),
    [
        (["max_steps=500"], ["max_steps=1000"], 300, "curve"),
        (["max_steps=500"], ["max_steps=1000"], 500, "curve"),  # the end of the first schedule: from the floor, up
        (["max_steps=500"], ["max_steps=400"], 300, "curve"),
        (["max_steps=500"], ["max_steps=1000", "schedule_steps=500"], 300, "harmless"),
        (["max_steps=500"], ["max_steps=500", "schedule_steps=1000"], 300, "curve"),
        (["max_steps=500"], ["max_steps=1000"], 90, "harmless"),  # of 100 steps of warm-up
        (["max_steps=500", "min_learning_rate=3e-4"], ["max_steps=1000", "min_learning_rate=3e-4"], 300, "harmless"),
        (["max_steps=500", "lr_scheduler=linear"], ["max_steps=1000", "lr_scheduler=linear"], 300, "curve"),
        (["max_steps=500", "lr_scheduler=wsd"], ["max_steps=1000", "lr_scheduler=wsd"], 400, "harmless"),
        (["max_steps=500", "lr_scheduler=wsd"], ["max_steps=1000", "lr_scheduler=wsd"], 401, "curve"),
        (["max_steps=500", "lr_scheduler=wsd"], ["max_steps=500", "lr_scheduler=wsd", "wsd_decay_steps=50"], 400, None),
        (
            ["max_steps=500", "lr_scheduler=wsd"],
            ["max_steps=500", "lr_scheduler=wsd", "wsd_decay_steps=200"],
            400,
            None,
        ),
    ],
)
def test_another_end_of_the_schedule_changes_the_curve_where_it_changes_the_rate(before, after, step, effect):
    def plain(keys):
        values = ["warmup_steps=100", "learning_rate=3e-4", *keys]
        return to_plain(load_config(QUICKSTART, ["training.stop_at_step=null", *(f"training.{k}" for k in values)]))

    old, new = plain(before), plain(after)
    ends = [c for c in config_changes(old, new, steps=[step]) if c.key.startswith("training.")]
    assert ends
    if effect is not None:
        assert {c.effect for c in ends} == {effect}
    elif "wsd_decay_steps=50" in after:
        assert [(c.key, c.effect) for c in ends] == [("training.wsd_decay_steps", "harmless")]
    else:
        assert [(c.key, c.effect) for c in ends] == [("training.wsd_decay_steps", "curve")]
    assert {c.effect for c in config_changes(old, new) if c.key.startswith("training.")} == {"curve"}


def test_a_decay_longer_than_the_schedule_is_refused_and_read_from_earlier_runs():
    wsd = ["training.lr_scheduler=wsd", "training.warmup_steps=2", "training.wsd_decay_steps=50"]
    with pytest.raises(ConfigError, match=r"wsd_decay_steps=50 is more than the 4 steps .*wsd_decay_steps=4 or less"):
        load_config(QUICKSTART, [*wsd, "training.max_steps=6"])
    with pytest.raises(ConfigError, match=r"schedule of 20 \(training.schedule_steps\)"):
        load_config(QUICKSTART, [*wsd, "training.max_steps=100", "training.schedule_steps=20"])
    plain = to_plain(load_config(QUICKSTART, [*wsd, "training.max_steps=60"]))
    plain["training"]["max_steps"] = 6
    del plain["training"]["schedule_steps"]  # an earlier version's
    assert from_plain(plain).training.wsd_decay_steps == 4


def test_each_change_has_the_effect_of_its_key():
    old = to_plain(load_config(QUICKSTART, ["training.global_batch_size=16"]))
    new = to_plain(
        load_config(
            QUICKSTART,
            [
                "training.global_batch_size=16",
                "training.max_steps=999",
                "training.learning_rate=1e-3",
                "model.d_model=96",
                "training.micro_batch_size=2",
            ],
        )
    )
    effects = {change.key: change.effect for change in config_changes(old, new)}
    assert effects == {
        "training.max_steps": "curve",
        "training.learning_rate": "curve",
        "model.d_model": "impossible",
        "model.d_head": "impossible",
        "training.micro_batch_size": "rounding",
    }
    assert config_changes(old, old) == []
    shorter = to_plain(load_config(QUICKSTART, ["training.max_steps=2", "training.stop_at_step=null"]))
    assert {c.key: c.effect for c in config_changes(new, shorter)}["training.max_steps"] == "curve"
    del old["training"]["seed"]  # a key that an older version did not have
    assert "training.seed" not in {c.key for c in config_changes(old, new)}


def test_windows_per_step_follow_from_accumulation_when_no_global_batch_is_set():
    plain = to_plain(load_config(QUICKSTART, ["training.global_batch_size=16"]))
    assert windows_per_step(plain, 4) == 16
    plain["training"].update(global_batch_size=None, micro_batch_size=3, gradient_accumulation_steps=None)
    assert windows_per_step(plain, 4) == 12
    plain["training"]["gradient_accumulation_steps"] = 2
    assert windows_per_step(plain, 4) == 24


@pytest.mark.parametrize("name", [n for n, hint in TYPES.items() if type(None) not in get_args(hint)])
def test_null_is_refused_where_the_type_does_not_allow_it(name):
    plain = to_plain(load_config(QUICKSTART, []))
    section, _, key = name.partition(".")
    plain[section][key] = None
    with pytest.raises(ConfigError, match=key):
        from_plain(plain)
