"""Chooses the checkpoint that a run continues, and prints what has changed since and where in the data it goes on.

Except for `restore`, all of this happens on rank 0, before any process group exists.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gsa.checkpoint import legacy, manifest
from gsa.checkpoint.full_state import read_ds_config, read_layout, read_run_state, require_own_name
from gsa.checkpoint.manifest import CheckpointError
from gsa.checkpoint.state import TEXT_FIELDS, RunState
from gsa.config import ModelConfig
from gsa.units import printable
from training.checkpointing.tokenizer import other_tokenizer
from training.config import SECTIONS, ConfigError, RunConfig, RunSpec, to_plain
from training.config.batch import windows_per_step
from training.config.changes import EFFECT_WORDS, Change, changes_on_resume, config_changes, with_batch_size
from training.config.schedule import HORIZON_KEYS, Schedule
from training.data import DataError, PackedTokens
from training.record.run_folder import FolderError, RunFolder

if TYPE_CHECKING:  # importing DeepSpeed takes seconds
    from training.engine.engine import Engine


@dataclass(frozen=True)
class Start:
    """A verified checkpoint, and the state from which the run goes on.

    state: its position is in windows of this run's length. legacy: the checkpoint was written by the legacy trainer.
    """

    checkpoint: Path
    state: RunState
    legacy: bool

    def continues(self, folder: RunFolder) -> bool:
        """Whether the launch goes on with the run in `folder`, and does not begin one from another's checkpoint."""
        ours = self.checkpoint.parent.resolve() == folder.path.resolve()
        return ours and not self.legacy and self.state.step > 0


def find_checkpoint(resume_from: str, folder: RunFolder) -> Path | None:
    """The checkpoint that --resume_from names, every byte verified; None when "auto" finds that a new run starts.

    Prints each checkpoint that it passes over, with the reason. Raises CheckpointError when the named checkpoint is
    missing or damaged, or when there once was a checkpoint and "auto" finds none that is good; FolderError when the
    named one belongs to another run than the one in the output folder.
    """
    if resume_from == "auto":
        found, passed_over = manifest.newest_good(folder.path, folder.suspects())
        for line in passed_over:
            print(printable(f"passed over: {line}"), flush=True)
        if found is None and (old := legacy.newest_legacy(folder.path)) is not None:
            print(f"no checkpoint of this project under {folder.path}, but a legacy one", flush=True)
            return old
        if found is None:
            _require_a_new_run(folder, passed_over)
            print(f"there has been no checkpoint under {folder.path}: starting a run", flush=True)
        return found
    meant = manifest.named(resume_from, folder.path)
    if not legacy.is_legacy(meant):
        meant = manifest.resolve(resume_from, folder.path)
        manifest.verify(meant)
    if meant.parent.resolve() == folder.path.resolve() and (words := folder.suspects().get(meant.name)):
        print(f"warning: {meant.name}: {words}", flush=True)
    if meant.parent.resolve() != folder.path.resolve() and folder.holds_a_run():
        raise FolderError(
            f"--output_dir {folder.path} already holds a run, and {meant} belongs to another; "
            f"give a new --output_dir for its continuation"
        )
    return meant


def _require_a_new_run(folder: RunFolder, passed_over: list[str]) -> None:
    """Refuses to start over where there has been a checkpoint. What an interrupted save left is none."""
    saved = folder.saved_checkpoints()
    torn = {path.name for path in folder.path.glob("step_*") if path.is_dir() and manifest.is_torn(path)}
    reasons = {line.partition(":")[0]: line for line in passed_over}
    lines = [line for tag, line in reasons.items() if tag in saved or tag not in torn]
    lines += [f"{tag}: was saved, and is not here any more" for tag in saved if tag not in reasons][:3]
    if lines:
        raise manifest.CheckpointError(
            "\n  ".join([f"{folder.path} has had checkpoints, and none of them is good:", *lines[:20]])
            + "\n`auto` never starts over by itself. Restore one of them (is the right disk mounted?), name another\n"
            "with --resume_from, or begin again with --fresh, which moves what is here to segments/"
        )


def decided_by(checkpoint: Path, cfg: RunConfig) -> RunConfig:
    """`cfg` with the keys that the checkpoint decides: those of an architecture imported from the legacy trainer."""
    if legacy.is_legacy(checkpoint):
        decided = legacy.DECIDED
    else:
        state = read_run_state(checkpoint)
        _require_config(checkpoint, state.config)
        decided = state.decided
    plain = to_plain(cfg)
    if any(key not in legacy.DECIDED or type(value) is not type(legacy.DECIDED[key]) for key, value in decided.items()):
        raise manifest.CheckpointError(
            f"{checkpoint} wants to set {', '.join(sorted(map(str, decided)))}; a checkpoint may set only "
            f"{', '.join(legacy.DECIDED)}. Do not trust where it came from"
        )
    for key, value in decided.items():
        section, name = key.split(".")
        if plain[section][name] != value:
            print(f"{checkpoint.name} decides {key}: {value!r}, not {plain[section][name]!r}", flush=True)
            cfg = replace(cfg, **{section: replace(getattr(cfg, section), **{name: value})})
    return cfg


def with_origin(checkpoint: Path, cfg: RunConfig) -> RunConfig:
    """`cfg` with the training.init_from of the run of the checkpoint: a resume does not read those weights.

    The same value may stand in the yaml of every launch. Raises ConfigError when `cfg` names another one.
    """
    given = cfg.training.init_from
    recorded = None if legacy.is_legacy(checkpoint) else read_run_state(checkpoint).config["training"].get("init_from")
    if given is not None and not (isinstance(recorded, str) and Path(given).resolve() == Path(recorded).resolve()):
        began = f"the weights of {recorded}" if recorded else "new weights"
        raise ConfigError(
            f"training.init_from={given} starts a new run, and {checkpoint} continues one that began from {began}: "
            f"the resume would not read it. Leave training.init_from out to continue the run, or leave --resume_from "
            f"out and give a new --output_dir to start one from these weights"
        )
    return replace(cfg, training=replace(cfg.training, init_from=recorded or None))


def start_from(
    checkpoint: Path, spec: RunSpec, data: PackedTokens, allow_change: bool, *, quiet: bool = False
) -> Start:
    """Compares the checkpoint's configuration, text and layout with this run's, and prints every difference.

    quiet: differences that do not change the curve are not printed. Raises ConfigError for a change that is impossible,
    or that changes the curve without allow_change; CheckpointError for a file that is refused; DataError for other
    text.
    """
    cfg, plan, ds_config = spec.cfg, spec.plan, spec.ds_config
    if legacy.is_legacy(checkpoint):
        return _start_from_legacy(checkpoint, spec, data, allow_change, quiet)
    state = read_run_state(checkpoint)
    require_own_name(checkpoint, state)
    same_text = state.data_fingerprint == data.fingerprint
    changes = changes_on_resume(state, read_ds_config(checkpoint), spec, same_text=same_text)
    rates = _rates(checkpoint, state.config["training"], cfg, state.step)
    _refuse_or_print(checkpoint, changes, rates, allow_change, quiet)
    if not same_text:
        message = (
            f"{checkpoint.name} was trained on other text: the data's fingerprint is {data.fingerprint[:16]}, "
            f"the checkpoint's {state.data_fingerprint[:16]}"
        )
        if (line := other_tokenizer(checkpoint, state, data)) is not None:
            message += f"; {line}, so that the same ids mean other text"
        if not allow_change:
            raise DataError(f"{message}; restore the dataset, or accept with --allow_config_change")
        print(message, flush=True)
    layout, zero_stage = read_layout(checkpoint), ds_config["zero_optimization"]["stage"]
    if (state.world_size, state.zero_stage) != (plan.world_size, zero_stage):
        print(
            f"{checkpoint.name} was saved by {state.world_size} rank(s) at ZeRO {state.zero_stage} ({layout}); "
            f"this run has {plan.world_size} at ZeRO {zero_stage} (rounds differently)",
            flush=True,
        )
    here = position_in_text(state, data)
    if not same_text:
        _announce_text(state, here)
    elif state.samples_consumed != here.samples_consumed:
        length = _window_length(state)["max_seq_len"]
        _announce_position(state.samples_consumed, length, here.samples_consumed, data.max_seq_len)
    return Start(checkpoint, here, False)


def _require_config(checkpoint: Path, config: dict) -> None:
    """Refuses a run state whose configuration is none."""
    sections = [config.get(name) for name in SECTIONS]
    length = config["training"].get("max_seq_len") if all(isinstance(s, dict) for s in sections) else None
    if type(length) is not int or length < 1:
        raise manifest.CheckpointError(
            f"{checkpoint}: its run state holds no configuration of a run; take another checkpoint"
        )


def _start_from_legacy(checkpoint: Path, spec: RunSpec, data: PackedTokens, allow_change: bool, quiet: bool) -> Start:
    cfg, plan = spec.cfg, spec.plan
    legacy.require_whole(checkpoint)
    old = legacy.read_legacy_run(checkpoint)
    plain = to_plain(cfg)
    theirs = {
        **plain,
        "training": {**plain["training"], **old.training},
        "model": {**plain["model"], **(old.model or {})},
    }
    total = windows_per_step({"training": old.training}, plan.world_size)
    changes = with_batch_size(config_changes(theirs, plain, steps=[old.step]), total, plan.global_batch_size)
    changes = [replace(c, effect="harmless") if c.key in legacy.ANNOUNCED else c for c in changes]
    print(f"{checkpoint} is a legacy checkpoint: step {old.step}, epoch {old.epoch}", flush=True)
    rates = _rates(checkpoint, theirs["training"], cfg, old.step)
    _refuse_or_print(checkpoint, changes, rates, allow_change, quiet)
    if cfg.model.adaptive_k != "off":
        print(f"warning: {legacy.ADAPTIVE_WARNING}", flush=True)
    if old.next_learning_rate is not None:
        ours = Schedule.of(cfg.training).rate(old.step)
        print(
            f"the learning rate of step {old.step + 1} is {ours:.6e} here, {old.next_learning_rate:.6e} there: the "
            f"schedule is at the same step, but its formula differs at the ends (docs/checkpoints.md)",
            flush=True,
        )
    length = old.training.get("max_seq_len") or cfg.training.max_seq_len
    samples = _converted(old.step * total, length, data.max_seq_len)
    if length != data.max_seq_len:
        _announce_position(old.step * total, length, samples, data.max_seq_len)
    state = RunState(
        step=old.step,
        epoch=float(old.epoch),
        samples_consumed=samples,
        tokens_seen=old.step * total * length,
        config=plain,
        data_fingerprint=data.fingerprint,
        tracking_id=None,
        stage="sparse",
        versions={},
        world_size=plan.world_size,
        zero_stage=0,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        epoch_offset=old.epoch - data.epoch(samples),
        indexer_start=old.step,
        decided=dict(legacy.DECIDED),
    )
    legacy.read_legacy(checkpoint, cfg.model, state)  # refuses now what does not fit the model
    return Start(checkpoint, state, True)


def restore(engine: Engine, start: Start, model: ModelConfig) -> None:
    """Loads the checkpoint of `start` into the engine; rates, decay and clipping come back as they were saved.

    Every rank must call it. Raises CheckpointError on all of them when one refuses a file.
    """
    if start.legacy:
        state = engine.raise_on_all_ranks(lambda: legacy.read_legacy(start.checkpoint, model, start.state))
        engine.load_full_state(state)
    else:
        engine.load(start.checkpoint)


class Rates(NamedTuple):
    """The schedules of a checkpoint's run and of this one, after `step` finished steps."""

    there: Schedule
    here: Schedule
    step: int

    def describe(self) -> str:
        """The learning rates of the next step with both; empty when they are the same."""
        there, here = self.there.rate(self.step), self.here.rate(self.step)
        same = math.isclose(there, here, rel_tol=1e-12)
        return "" if same else f"the learning rate of step {self.step + 1} is {here:.6e} here, {there:.6e} there"

    def advice(self, curve: list[Change]) -> str:
        """How to keep the earlier schedule, when one of the changes is to its end."""
        if not {change.key for change in curve} & {f"training.{name}" for name in HORIZON_KEYS}:
            return ""
        kept = f"training.schedule_steps={self.there.schedule_steps or self.there.max_steps}"
        decay = self.there.wsd_decay_steps
        if self.here.lr_scheduler == "wsd" and decay != self.here.wsd_decay_steps:
            kept += f" training.wsd_decay_steps={'null' if decay is None else decay}"
        return f", keep the earlier schedule with {kept}"


def _rates(checkpoint: Path, there: Mapping[str, Any], cfg: RunConfig, step: int) -> Rates:
    """there: the section "training" of the checkpoint's configuration."""
    rates = Rates(Schedule.from_plain(there), Schedule.of(cfg.training), step)
    try:
        rates.describe()
    except (TypeError, ArithmeticError) as err:
        raise CheckpointError(
            f"{checkpoint}: the learning-rate schedule in its configuration cannot be used ({err}); it is damaged or "
            f"not from this project: take another checkpoint with --resume_from"
        ) from None
    return rates


def _refuse_or_print(checkpoint: Path, changes: list[Change], rates: Rates, allow_change: bool, quiet: bool) -> None:
    for change in changes:
        if quiet and change.effect in ("harmless", "rounding"):
            continue
        effect = EFFECT_WORDS[change.effect]
        print(f"changed since {checkpoint.name}: {change.key}: {change.old!r} -> {change.new!r} ({effect})", flush=True)
    impossible = [c.key for c in changes if c.effect == "impossible"]
    if impossible:
        raise ConfigError(
            f"{checkpoint} was made with another {', '.join(impossible)}: its tensors do not fit; "
            f"restore the value(s), or start a new run"
        )
    curve = [c for c in changes if c.effect == "curve"]
    if curve and not allow_change:
        listed = ", ".join(f"{c.key} ({c.old!r} there, {c.new!r} here)" for c in curve)
        text = rates.describe()
        raise ConfigError(
            f"{listed} differ from those of {checkpoint} and would change the curve{text and f' ({text})'}; "
            f"restore the value(s){rates.advice(curve)}, or accept with --allow_config_change"
        )
    if text := rates.describe():
        print(text, flush=True)


def position_in_text(state: RunState, data: PackedTokens) -> RunState:
    """`state` with its position in the text `data`, counted in windows of the length that `data` has.

    The same text goes on after the same number of tokens. Another one begins at its own first window, or where the run
    left it; the position in the text that the checkpoint was trained on is kept in `earlier_texts`. Raises
    CheckpointError when an entry of `earlier_texts` is damaged.
    """
    try:
        own = [name for name in TEXT_FIELDS if name != "max_seq_len"]
        left = {**_window_length(state), **{name: getattr(state, name) for name in own}}
        known = [*state.earlier_texts, left]
        texts = {text["data_fingerprint"]: {name: text[name] for name in TEXT_FIELDS} for text in known}
        here = texts.pop(data.fingerprint, None)
        if here is None:
            position = {"samples_consumed": 0, "epoch": 0.0, "epoch_offset": 0.0, "skipped": []}
        else:
            position = {name: here[name] for name in ("epoch", "epoch_offset", "skipped")}
            samples = _converted(here["samples_consumed"], here["max_seq_len"], data.max_seq_len)
            position["samples_consumed"] = samples
    except (TypeError, KeyError, ArithmeticError) as err:
        raise CheckpointError(
            f"the run state of step {state.step} has an unusable position in its texts ({type(err).__name__}: {err}); "
            f"take another checkpoint with --resume_from"
        ) from None
    return replace(state, data_fingerprint=data.fingerprint, earlier_texts=list(texts.values()), **position)


def _window_length(state: RunState) -> dict[str, int]:
    return {"max_seq_len": state.config["training"]["max_seq_len"]}


def _converted(samples: int, length: int, now: int) -> int:
    """Windows of `now` tokens for `samples` windows of `length`: the same number of tokens, rounded up."""
    return samples if now == length else -(-samples * length // now)


def _announce_position(samples: int, length: int, now_samples: int, now: int) -> None:
    print(
        f"the data goes on after the same {samples * length:,} tokens: {samples:,} windows of {length} are "
        f"{now_samples:,} of {now}",
        flush=True,
    )


def _announce_text(left: RunState, here: RunState) -> None:
    place = f"at its window {here.samples_consumed:,}" if here.samples_consumed else "at the beginning"
    print(
        f"the new text is read {place}; the earlier one was left after {left.samples_consumed:,} windows, "
        f"{left.epoch:.3f} passes",
        flush=True,
    )
