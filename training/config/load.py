"""Reading a run's configuration: defaults, then the yaml, then each key=value; and the help made from its keys.

Everything wrong with a configuration is a ConfigError that names the key, the file and line or the override, and what
would fit. It is raised before any process group starts.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gsa.checkpoint import legacy
from gsa.config import choices
from training.config.changes import EFFECT_WORDS
from training.config.schema import KEYS, SECTIONS, ConfigError, RunConfig

TYPES = {f"{section}.{name}": hint for section, made in SECTIONS.items() for name, hint in get_type_hints(made).items()}


@dataclass(frozen=True)
class _Given:
    """One value and where it was given: a file with its line, or an override."""

    key: str
    value: Any
    by: str


def load_config(path: Path, overrides: Sequence[str]) -> RunConfig:
    """The run's configuration: defaults, then the yaml, then each key=value.

    Raises ConfigError for a missing or broken file, an unknown or repeated key, a value of the wrong type,
    a combination that cannot be; the message names the file and line, or the override.
    """
    given = [*_read_yaml(path), *(_read_override(text) for text in overrides)]
    cfg = OmegaConf.structured(RunConfig)
    for node in (cfg, *(cfg[name] for name in SECTIONS)):
        OmegaConf.set_readonly(node, False)  # OmegaConf makes frozen dataclasses read-only
    cfg.model.d_head = None  # the default instance has derived its own: this model's may differ
    for one in given:
        if one.key not in KEYS:
            raise ConfigError(f"{one.by}: unknown key {one.key!r}{did_you_mean(one.key, KEYS)}")
        try:
            OmegaConf.update(cfg, one.key, one.value, merge=False)
        except OmegaConfBaseException as err:
            raise ConfigError(f"{one.by}: {one.key}: {str(err).splitlines()[0]}") from err
    try:
        return OmegaConf.to_object(cfg)
    except (ValueError, OmegaConfBaseException) as err:
        message = str(err).splitlines()[0]
        named = {one.key: one.by for one in given if one.key in message}
        where = "; ".join(dict.fromkeys(named.values())) or str(path)
        raise ConfigError(f"{where}: {message}") from err


def did_you_mean(key: str, known: Sequence[str] | dict[str, Any]) -> str:
    """A clause with the closest known names, "; did you mean ...?", or how to list all keys."""
    last = key.rpartition(".")[2]
    elsewhere = [k for k in known if k.rpartition(".")[2] == last]
    close = elsewhere or difflib.get_close_matches(key, list(known), n=3, cutoff=0.6)
    if not close:
        tails = {k.rpartition(".")[2]: k for k in known}
        close = [tails[t] for t in difflib.get_close_matches(last, list(tails), n=3, cutoff=0.6)]
    return f"; did you mean {' or '.join(close)}?" if close else "; training/train.py --help lists every key"


def _read_yaml(path: Path) -> list[_Given]:
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
    loader, given = yaml.SafeLoader(""), []
    for section, line, node in _items(root, path):
        if section not in SECTIONS:
            flat = did_you_mean(section, [*SECTIONS, *KEYS])
            raise ConfigError(f"{path}, line {line}: unknown section {section!r}{flat}")
        if node.tag == "tag:yaml.org,2002:null":
            continue
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{path}, line {line}: section {section!r} must be a mapping of keys")
        for key, key_line, value in _items(node, path):
            if isinstance(value, yaml.MappingNode):
                list(_items(value, path))  # refuses repeated keys inside
            made = _as_word(f"{section}.{key}", loader.construct_object(value, deep=True), str(value.value))
            given.append(_Given(f"{section}.{key}", made, f"{path}, line {key_line}"))
    return _translated(given, path)


def _as_word(key: str, value: Any, text: str) -> Any:
    """`value`; where yaml has read a word such as `adaptive_k: off` as a boolean and the key wants a word, the word."""
    wants_a_word = TYPES.get(key) is str or choices(TYPES.get(key))
    return text.strip() if isinstance(value, bool) and wants_a_word else value


def _translated(given: list[_Given], path: Path) -> list[_Given]:
    """The legacy trainer's layout, which has a section model.gsa, by our keys; where each was given stays the same."""
    by = {one.key: one.by for one in given}
    try:
        ours = legacy.translate({one.key: one.value for one in given})
    except ValueError as err:
        raise ConfigError(f"{path}: {err}") from err
    return [_Given(key, value, by.get(key, f"{path} (the legacy layout)")) for key, value in ours.items()]


def _items(node: yaml.MappingNode, path: Path) -> Iterator[tuple[str, int, yaml.Node]]:
    seen: dict[str, int] = {}
    for key, value in node.value:
        name, line = str(key.value), key.start_mark.line + 1
        if name in seen:
            # yaml itself would silently take the last one
            raise ConfigError(f"{path}, line {line}: {name!r} is set already in line {seen[name]}; keep one")
        seen[name] = line
        yield name, line, value


def _read_override(text: str) -> _Given:
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"override {text!r} is not key=value, e.g. training.max_steps=1000")
    try:
        return _Given(key.strip(), _as_word(key.strip(), yaml.safe_load(value), value), f"override {text!r}")
    except yaml.YAMLError as err:
        raise ConfigError(f"override {text!r}: the value is not yaml") from err


# -- help ---------------------------------------------------------------------------------------------


def format_help() -> str:
    """Every key with its type, default, bounds, meaning and effect of a change on resume, section by section."""
    lines = []
    for name in KEYS:
        section, _, short = name.partition(".")
        if f"{section}:" not in lines:
            lines.append(f"{section}:")
        kind, default, bounds, meaning, effect = describe_key(name)
        facts = ", ".join(fact for fact in (kind, f"default {default}", bounds) if fact)
        lines.append(f"  {short} ({facts})\n      {meaning} [on resume: {effect}]")
    return "\n".join(lines)


def markdown_table() -> str:
    """docs/configuration.md: every key, from the same fields as `--help`."""
    lines = [
        "# Configuration",
        "",
        "Made by `python scripts/write_docs.py`; a test compares it with the fields in training/config/schema.py and",
        "gsa/config.py. Every key can stand in the yaml or on the command line as `section.key=value`.",
        '"On resume" says what changing the key does to a run that continues: *harmless* changes no number,',
        "*changes the curve* needs `--allow_config_change`, *impossible* does not fit the saved tensors.",
    ]
    for name in KEYS:
        section, _, short = name.partition(".")
        if f"## {section}" not in lines:
            lines += [
                "",
                f"## {section}",
                "",
                "| key | type | default | bounds | meaning | on resume |",
                "|---|---|---|---|---|---|",
            ]
        kind, default, bounds, meaning, effect = describe_key(name)
        lines.append(f"| `{short}` | {kind} | `{default}` | {bounds} | {meaning} | {effect} |")
    return "\n".join(lines) + "\n"


def describe_key(name: str) -> tuple[str, str, str, str, str]:
    """Type or choices, default, bounds, meaning, and effect of a change on resume of a dotted key, as text."""
    f = KEYS[name]
    words = choices(TYPES[name])
    kind = " or ".join(words) if words else f.type.removesuffix(" | None")
    default = f.default_factory() if f.default is MISSING else f.default
    bounds = ", ".join(f"{bound} {limit}" for bound, limit in f.metadata["bounds"].items())
    return (
        kind,
        "none" if default is None else str(default),
        bounds,
        f.metadata["meaning"],
        EFFECT_WORDS[f.metadata["resume"]],
    )
