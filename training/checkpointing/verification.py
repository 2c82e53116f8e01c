"""Proves that a checkpoint can be used, on a CPU, without a launcher and without executing anything in its files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from gsa import GSAForCausalLM, ModelConfig
from gsa.checkpoint import legacy, manifest
from gsa.checkpoint.full_state import FullState, read_full_state, read_layout, require_own_name
from gsa.checkpoint.manifest import CheckpointError
from gsa.checkpoint.state import TOKENIZER, RunState, read_config_json
from gsa.units import size_text
from gsa.weights import load_weights

PROBE_TOKENS = 32
"""Tokens of the forward pass that is run with the weights of a checkpoint."""

Report = Callable[[str], None]


def verify_all(run: Path, *, config: Path | None = None, report: Report = print) -> bool:
    """Checks every checkpoint of a run's folder, as `verify` does, and returns whether all are good.

    Raises CheckpointError when there is none.
    """
    found = [f.path for f in manifest.list_checkpoints(run)]
    if not found:
        raise CheckpointError(manifest.no_run_in(run))
    good = []
    for number, path in enumerate(found):
        report(("\n" if number else "") + f"{path}")
        good.append(verify(path, config=config, report=report))
    report(f"\n{sum(good)} of {len(good)} checkpoints are good")
    return all(good)


def verify(step_dir: Path, *, config: Path | None = None, report: Report = print) -> bool:
    """Checks one checkpoint, reports line by line, and returns whether it is good.

    config: the run's yaml, which a legacy checkpoint may need.
    """
    try:
        check = _check_legacy if legacy.is_legacy(step_dir) else _check
        check(step_dir, config, report)
    except CheckpointError as err:
        report(f"✗ {err}")
        return False
    report("✓ All checkpoint resume tests passed!")
    return True


def _check(step_dir: Path, config: Path | None, report: Report) -> None:
    manifest.verify(step_dir)
    files = manifest.read(step_dir).files
    report(f"  {len(files)} files, {size_text(sum(f.bytes for f in files.values()))}, every sha256 as in the manifest")
    state = read_full_state(step_dir)
    layout, run = read_layout(step_dir), state.run
    require_own_name(step_dir, run)
    _require_own_tokenizer(step_dir, run, files)
    report("✓ Checkpoint loaded successfully")
    report(f"  step {run.step:,}, epoch {run.epoch:.3f}, {run.samples_consumed:,} samples, {run.tokens_seen:,} tokens")
    for text in run.earlier_texts:
        report(f"  before: {text.get('epoch')!s:.5} passes over the text {text.get('data_fingerprint')!s:.16}")
    report(f"  saved by {run.world_size} rank(s) at ZeRO {run.zero_stage} ({layout})")
    report(
        f"  config type {type(run.config).__name__}, versions {', '.join(f'{k} {v}' for k, v in run.versions.items())}"
    )
    if read_config_json(step_dir) != run.config:
        raise CheckpointError(f"{step_dir}: config.json is not the configuration in the shards; restore it from a copy")
    fields, weights = load_weights(step_dir, verified=True)
    model = _fresh_model(step_dir, fields)
    _compare(step_dir, state, model, weights)
    model.load_state_dict(weights)
    _forward(step_dir, model)
    report("✓ Model state loaded successfully")
    report(
        f"  {sum(p.numel() for p in model.parameters()):,} parameters, shapes as configured, one forward pass is finite"
    )
    report("✓ Optimizer state loaded successfully")
    steps = sorted({int(p.step) for p in state.parameters.values()})
    report(f"  masters and both moments of every parameter; Adam has made {', '.join(map(str, steps))} update(s)")


def _check_legacy(step_dir: Path, config: Path | None, report: Report) -> None:
    legacy.require_whole(step_dir)
    run = legacy.read_legacy_run(step_dir)
    report("✓ Checkpoint loaded successfully")
    report(f"  a legacy checkpoint, every checksum of its file right: step {run.step:,}, epoch {run.epoch}")
    report(f"  config type {type(run.training).__name__}, {'with' if run.model else 'without'} the architecture")
    model = legacy.load_legacy_model(step_dir, config)
    state = legacy.read_legacy(step_dir, model.config, None)
    _finite(step_dir, state)
    _forward(step_dir, model)
    report("✓ Model state loaded successfully")
    report(
        f"  {sum(p.numel() for p in model.parameters()):,} parameters, shapes as configured, one forward pass is finite"
    )
    trained = [p for p in state.parameters.values() if p.pieces["exp_avg"]]
    report("✓ Optimizer state loaded successfully")
    report(f"  moments of {len(trained)} of {len(state.parameters)} parameters; the indexer was never trained")


def _require_own_tokenizer(step_dir: Path, run: RunState, files: Mapping[str, manifest.FileEntry]) -> None:
    if TOKENIZER in files and files[TOKENIZER].sha256 != run.tokenizer_sha256:
        raise CheckpointError(
            f"{step_dir / TOKENIZER} is not the tokenizer that the run state names; the files come from different runs"
        )


def _fresh_model(step_dir: Path, fields: dict) -> GSAForCausalLM:
    try:
        return GSAForCausalLM(ModelConfig(**fields))
    except (ValueError, TypeError) as err:
        raise CheckpointError(f"{step_dir / 'config.json'}: its model section is not valid: {err}") from err


def _compare(step_dir: Path, state: FullState, model: GSAForCausalLM, weights: dict[str, torch.Tensor]) -> None:
    """Compares names and shapes with the configuration, and working weights with the masters they are rounded from."""
    wanted = {name: p.shape for name, p in model.named_parameters()}
    saved = {name: p.shape for name, p in state.parameters.items()}
    for name in sorted(wanted.keys() | saved.keys()):
        if wanted.get(name) != saved.get(name):
            raise CheckpointError(
                f"{step_dir}: {name} is {_shape(saved.get(name))} in the shards and {_shape(wanted.get(name))} by the "
                f"configuration; use another checkpoint"
            )
    own = model.state_dict()
    for name in sorted(own.keys() | weights.keys()):
        shapes = [_shape(t[name].shape if name in t else None) for t in (weights, own)]
        if shapes[0] != shapes[1]:
            raise CheckpointError(
                f"{step_dir / 'model.safetensors'}: {name} is {shapes[0]}, by the configuration {shapes[1]}"
            )
    _finite(step_dir, state)
    for name, parameter in state.parameters.items():
        if not torch.equal(parameter.full("master").to(weights[name].dtype), weights[name]):
            raise CheckpointError(
                f"{step_dir / 'model.safetensors'}: {name} is not what the float32 masters in the shards round to; "
                f"the files come from different saves"
            )


def _finite(step_dir: Path, state: FullState) -> None:
    for name, parameter in state.parameters.items():
        for what in ("master", "exp_avg", "exp_avg_sq"):
            if not parameter.full(what).isfinite().all():
                raise CheckpointError(f"{step_dir}: {what} of {name} is not finite; use an earlier checkpoint")


def _shape(shape: torch.Size | None) -> str:
    return "missing" if shape is None else str(tuple(shape))


def _forward(step_dir: Path, model: GSAForCausalLM) -> None:
    length = min(PROBE_TOKENS, model.config.max_position_embeddings)
    tokens = torch.arange(length)[None] * 7919 % model.config.vocab_size
    with torch.no_grad():
        logits = model.float().eval()(tokens).logits
    if not logits.isfinite().all():
        raise CheckpointError(f"{step_dir}: a forward pass gives logits that are not finite; use an earlier checkpoint")
