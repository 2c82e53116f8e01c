"""RunState: what a run needs to continue, besides what the engine saves. Plain values only, versioned."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from gsa.checkpoint.manifest import CheckpointError
from gsa.files import read_small_file
from gsa.units import MIB

CLIENT_KEY = "gsa_run"
"""Our only key in DeepSpeed's client state, which would overwrite DeepSpeed's own entries of the same name."""

CONFIG = "config.json"
"""The configuration of the run, beside its weights; its "model" section is the model's."""

TOKENIZER = "tokenizer.json"
"""The tokenizer of the run's text, which checkpoints carry since version 4 of the run state, if the dataset has one."""


TEXT_FIELDS = ("data_fingerprint", "max_seq_len", "samples_consumed", "epoch", "epoch_offset", "skipped")
"""The position in a text: max_seq_len of the windows that it is counted in, and fields of RunState."""


def _since(version: int, default: Any = MISSING, *, factory: Any = MISSING) -> Any:
    """A field that older versions of the run state do not have; there it has its default."""
    return field(default=default, default_factory=factory, metadata={"since": version})


@dataclass(frozen=True)
class RunState:
    """The position and the origin of a run; the same on every rank.

    Everything that a step needs follows from it and the engine's own files. A new field takes `_since` the next
    version; the version that is written is the newest of any field.
    """

    step: int
    """optimizer steps done"""
    epoch: float
    """passes over the present data, with the fraction"""
    samples_consumed: int
    """windows of max_seq_len tokens, over all ranks; the position in the data, and in no earlier text"""
    tokens_seen: int
    """window positions trained on, over all ranks and texts, the ends of documents included"""
    config: dict[str, Any]
    """the run's whole configuration, resolved"""
    data_fingerprint: str
    """hash of the prepared data and of how it is cut into windows: another one means another order"""
    tracking_id: str | None
    stage: Literal["dense", "sparse"]
    """which attention the last step used"""
    versions: dict[str, str]
    """of torch, deepspeed, project"""
    world_size: int
    zero_stage: int
    created: str
    """ISO 8601, UTC"""
    epoch_offset: float = _since(2, 0.0)
    """passes of an imported run before its import, minus the position in the data at that moment"""
    indexer_start: int = _since(2, 0)
    """step from which the indexer's warm-up counts: where an untrained indexer was imported"""
    decided: dict[str, Any] = _since(2, factory=dict)
    """dotted keys of the configuration in which an imported checkpoint takes precedence over the yaml"""
    skipped: list[list[int]] = _since(3, factory=list)
    """[first, count] of samples that no step may train on again, ruled out by a rollback"""
    tokenizer_sha256: str | None = _since(4, None)
    """sha256 of the tokenizer.json with which the text was prepared; None: not known"""
    tokenizer_entries: int | None = _since(4, None)
    """entries of that tokenizer; the model's vocabulary may be padded beyond them"""
    eod_id: int | None = _since(4, None)
    """its end-of-document token"""
    earlier_texts: list[dict[str, Any]] = _since(5, factory=list)
    """other texts that the run has trained on, each with its `TEXT_FIELDS` where the run left it"""

    def to_dict(self) -> dict[str, Any]:
        """A copy made of JSON types. Raises TypeError naming the key of any other value, at any depth."""
        plain = require_plain({f.name: getattr(self, f.name) for f in fields(self)}, CLIENT_KEY)
        for name, expected in _misfits(plain):
            raise TypeError(f"{CLIENT_KEY}.{name}={plain[name]!r} is not {expected}")
        return {"version": VERSION, **plain}

    @classmethod
    def from_dict(cls, data: object) -> RunState:
        """Reads what any version up to this one wrote; CheckpointError for a newer or a damaged one."""
        version = data.get("version") if isinstance(data, dict) else None
        if type(version) is not int or version < 1:
            raise CheckpointError(f"the run state has no version: {_MEND}")
        if version > VERSION:
            versions = data.get("versions")
            needed = versions.get("project") if isinstance(versions, dict) else None
            raise CheckpointError(
                f"the run state has version {version}, this project reads up to {VERSION}: "
                f"update the project to {needed or 'the version that wrote it'} or later"
            )
        younger = [f for f in fields(cls) if f.metadata.get("since", 1) > version]
        data = {**{f.name: f.default if f.default is not MISSING else f.default_factory() for f in younger}, **data}
        names = {f.name for f in fields(cls)}
        differing = sorted(names ^ (set(data) - {"version"}))
        if differing:
            raise CheckpointError(f"the run state lacks, or does not know, {', '.join(differing)}: {_MEND}")
        for name, expected in list(_misfits(data)) or _out_of_range(data):
            raise CheckpointError(f"the run state has {name}={data[name]!r:.80}, which is not {expected}: {_MEND}")
        return cls(**{name: data[name] for name in names})


VERSION = max(f.metadata.get("since", 1) for f in fields(RunState))
MAX_JSON_BYTES = 16 * MIB
"""Size of config.json, run.json and the like."""
_MEND = "it is damaged or not from this project; take another checkpoint with --resume_from"


def read_config_json(step_dir: Path) -> dict[str, Any]:
    """The configuration a checkpoint was made with. Raises CheckpointError when it is missing or damaged."""
    config = read_json_object(step_dir / CONFIG)
    for own in ("format", "tied"):  # written by gsa/weights.py
        config.pop(own, None)
    return config


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises CheckpointError naming it otherwise."""
    try:
        data = json.loads(read_small_file(path, MAX_JSON_BYTES))
    except OSError as err:
        raise CheckpointError(f"{path}: cannot be read: {err.strerror}; is its folder a checkpoint?") from err
    except (ValueError, RecursionError) as err:
        raise CheckpointError(f"{path}: not JSON ({err}); restore it from a copy") from err
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: holds no JSON object; restore it from a copy")
    return data


def require_plain(value: object, where: str) -> Any:
    """A deep copy, if it is made of JSON types only; else TypeError naming the key.

    where: name of the value in the message. Subclasses are refused as well: a numpy float64 is a float, an
    OmegaConf node behaves like a dict, and both put code into a pickle.
    """
    if type(value) is dict:
        for key in value:
            if type(key) is not str:
                raise TypeError(f"{where} has the key {key!r} of type {_type_name(key)}; JSON keys are str")
        return {key: require_plain(entry, f"{where}.{key}") for key, entry in value.items()}
    if type(value) is list:
        return [require_plain(entry, f"{where}[{i}]") for i, entry in enumerate(value)]
    if value is None or type(value) in (str, int, bool) or (type(value) is float and math.isfinite(value)):
        return value
    raise TypeError(
        f"{where} is {value!r:.80} of type {_type_name(value)}; a checkpoint takes only str, int, "
        f"finite float, bool, None, list and dict: convert it (OmegaConf.to_container, .item(), .tolist())"
    )


def _type_name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _misfits(data: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Each field of RunState whose value in `data` has another type, with the type that it should have."""
    hints = get_type_hints(RunState)
    kinds = {
        float: (int, float),
        dict[str, Any]: dict,
        dict[str, str]: dict,
        list[list[int]]: list,
        list[dict[str, Any]]: list,
    }
    for known in fields(RunState):
        hint, value = hints[known.name], data[known.name]
        if get_origin(hint) is Literal:
            fits = value in get_args(hint)
        else:  # a bool is an int to Python, and no field is one
            fits = isinstance(value, kinds.get(hint, hint)) and type(value) is not bool
        if fits and known.name == "earlier_texts":
            fits = all(_is_position(text) for text in value)
        if not fits:
            yield known.name, known.type


_LARGEST = 2**53
"""No count of a run comes near it, and every JSON reader has it exactly."""
_RANGES: dict[str, tuple[float, float]] = {
    "step": (0, _LARGEST),
    "epoch": (0, _LARGEST),
    "samples_consumed": (0, _LARGEST),
    "tokens_seen": (0, _LARGEST),
    "world_size": (1, 2**20),
    "zero_stage": (0, 3),
    "epoch_offset": (-_LARGEST, _LARGEST),
    "indexer_start": (0, _LARGEST),
    "tokenizer_entries": (1, 2**31),
    "eod_id": (0, 2**31),
}


def _out_of_range(data: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Each field of the run state that has the right type and a value that no run can have."""
    for name, (least, most) in _RANGES.items():
        value = data.get(name)
        if value is not None and not (type(value) in (int, float) and least <= value <= most):
            yield name, f"between {least:,} and {most:,}"
    for name in ("tracking_id", "data_fingerprint", "created"):
        text = data.get(name)
        if isinstance(text, str) and (len(text) > 200 or not text.isprintable() or "/" in text):
            yield name, "a short word"
    for spans in (data.get("skipped", []), *(text["skipped"] for text in data.get("earlier_texts", []))):
        if not all(isinstance(span, list) and [*map(_is_count, span)] == [True, True] for span in spans):
            yield "skipped" if spans is data.get("skipped") else "earlier_texts", "a list of [first, count]"
    for text in data.get("earlier_texts", []):
        counts = (text["samples_consumed"], text["epoch"])
        if not all(type(count) in (int, float) and 0 <= count <= _LARGEST for count in counts):
            yield "earlier_texts", "positions"


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= _LARGEST


def _is_position(text: object) -> bool:
    return isinstance(text, dict) and set(text) == set(TEXT_FIELDS) and isinstance(text["skipped"], list)
