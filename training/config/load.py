"""Reads a run's configuration from its yaml and the key=value arguments, and makes help and docs from its keys.

Whatever is wrong with a configuration raises ConfigError, which names the key, the file and line or the override, and
what would fit.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import GrammarParseError, OmegaConfBaseException

from gsa import yaml_text
from gsa.checkpoint import legacy
from gsa.config import choices
from gsa.files import read_small_file
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
    or an impossible combination; the message names the file and line, or the override.
    """
    given = [*_read_yaml(path), *(_read_override(text) for text in overrides)]
    cfg = OmegaConf.structured(RunConfig)
    for node in (cfg, *(cfg[name] for name in SECTIONS)):
        OmegaConf.set_readonly(node, False)  # OmegaConf makes the nodes of frozen dataclasses read-only
    cfg.model.d_head = None  # derived from the default widths; ModelConfig derives it again from those given
    for one in given:
        if one.key not in KEYS:
            raise ConfigError(f"{one.by}: unknown key {one.key!r}{did_you_mean(one.key, KEYS)}")
        try:
            OmegaConf.update(cfg, one.key, one.value, merge=False)
        except GrammarParseError as err:
            raise _no_reference(one) from err
        except OmegaConfBaseException as err:
            raise ConfigError(f"{one.by}: {one.key}={_shown(one.value)} must be {_expected(one.key)}") from err
    for one in {one.key: one for one in given}.values():  # the last of each key is the one that counts
        _require_readable(cfg, one)
    try:
        return OmegaConf.to_object(cfg)
    except ValueError as err:
        message = str(err).splitlines()[0]
        named = {one.key: one.by for one in given if one.key in message}
        where = "; ".join(dict.fromkeys(named.values())) or str(path)
        raise ConfigError(f"{where}: {message}") from err


def _require_readable(cfg: DictConfig, one: _Given) -> None:
    """Refuses what OmegaConf gives a meaning of its own: "???", and a ${...} that leads nowhere."""
    if "???" in _texts(one.value):
        raise ConfigError(f'{one.by}: {one.key} holds "???", which stands for a value that is missing; give one')
    try:
        value = cfg
        for part in one.key.split("."):
            value = value[part]
        if OmegaConf.is_config(value):
            OmegaConf.to_container(value, resolve=True)
    except OmegaConfBaseException as err:
        raise _no_reference(one) from err


def _no_reference(one: _Given) -> ConfigError:
    return ConfigError(
        f"{one.by}: {one.key} has a ${{...}} that refers to nothing that fits here; name a key, as in "
        f"${{training.seed}}, or write \\${{ where the text itself is meant"
    )


def _texts(value: Any) -> list[str]:
    """The texts in a value from yaml, however deep."""
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for one in inner for text in _texts(one)]


def _expected(key: str) -> str:
    """What fits a key, in words."""
    hint = TYPES[key]
    if names := choices(hint):
        return f"one of {', '.join(names)}"
    null = " or null" if type(None) in get_args(hint) else ""
    plain = next((t for t in (get_args(hint) if null else (hint,)) if t is not type(None)), hint)
    words = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        list[str]: "a list of texts, as in [a, b]",
        dict[str, float]: "folders with their weights, as in {data/a: 1, data/b: 2}",
    }
    return words[plain] + null


def _shown(value: Any) -> str:
    """A value for an error message, cut where it is long."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:80]}..."


def did_you_mean(key: str, known: Sequence[str] | dict[str, Any]) -> str:
    """The end of an error message: "; did you mean ...?" with the closest known names, or how to list all keys."""
    last = key.rpartition(".")[2]
    elsewhere = [k for k in known if k.rpartition(".")[2] == last]
    close = elsewhere or difflib.get_close_matches(key, list(known), n=3, cutoff=0.6)
    if not close:
        tails = {k.rpartition(".")[2]: k for k in known}
        close = [tails[t] for t in difflib.get_close_matches(last, list(tails), n=3, cutoff=0.6)]
    return f"; did you mean {' or '.join(close)}?" if close else "; training/train.py --help lists every key"


def _read_yaml(path: Path) -> list[_Given]:
    try:
        text = read_small_file(path, yaml_text.MAX_BYTES).decode("utf-8")
    except OSError as err:
        raise ConfigError(f"--config {path}: {err.strerror}") from err
    except UnicodeDecodeError as err:
        raise ConfigError(f"--config {path}: not UTF-8 text ({err.reason} at byte {err.start})") from err
    try:
        root = yaml_text.compose(text)
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
            try:
                found = loader.construct_object(value, deep=True)
            except (yaml.YAMLError, ValueError, TypeError, RecursionError) as err:
                raise ConfigError(
                    f"{path}, line {key_line}: {section}.{key} is no plain value; put text in quotes"
                ) from err
            made = _as_word(f"{section}.{key}", found, str(value.value))
            given.append(_Given(f"{section}.{key}", made, f"{path}, line {key_line}"))
    return _translated(given, path)


def _as_word(key: str, value: Any, text: str) -> Any:
    """`value`, or its text where yaml has read the word of a text key, as in `adaptive_k: off`, as a boolean."""
    is_text = TYPES.get(key) is str or choices(TYPES.get(key))
    return text.strip() if isinstance(value, bool) and is_text else value


def _translated(given: list[_Given], path: Path) -> list[_Given]:
    """`given` under this project's key names, if the yaml has the legacy trainer's layout (a section model.gsa)."""
    by = {one.key: one.by for one in given}
    try:
        ours = legacy.translate({one.key: one.value for one in given})
    except ValueError as err:
        raise ConfigError(f"{path}: {err}") from err
    return [_Given(key, value, by.get(key, f"{path} (the legacy layout)")) for key, value in ours.items()]


def _items(node: yaml.MappingNode, path: Path) -> Iterator[tuple[str, int, yaml.Node]]:
    """(key, line, value) of every entry. Raises ConfigError for a repeated key, of which yaml would use the last."""
    seen: dict[str, int] = {}
    for key, value in node.value:
        name, line = str(key.value), key.start_mark.line + 1
        if name in seen:
            raise ConfigError(f"{path}, line {line}: {name!r} is set already in line {seen[name]}; keep one")
        seen[name] = line
        yield name, line, value


def _read_override(text: str) -> _Given:
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"override {text!r} is not key=value, e.g. training.max_steps=1000")
    try:
        return _Given(key.strip(), _as_word(key.strip(), yaml.safe_load(value), value), f"override {text!r}")
    except (yaml.YAMLError, ValueError, RecursionError) as err:
        raise ConfigError(
            f"override {text!r}: the value is not yaml; put text with special characters in quotes, as in "
            f"{key.strip()}='\"...\"'"
        ) from err


# -- help ---------------------------------------------------------------------------------------------


def format_help() -> str:
    """Every key with its type, default, bounds, meaning and effect of a change on resume, section by section."""
    lines = []
    for name in KEYS:
        section, _, short = name.partition(".")
        if f"{section}:" not in lines:
            lines.append(f"{section}:")
        text = _describe(name)
        facts = ", ".join(fact for fact in (text.kind, f"default {text.default}", text.bounds) if fact)
        lines.append(f"  {short} ({facts})\n      {text.meaning} [on resume: {text.effect}]")
    return "\n".join(lines)


def markdown_table() -> str:
    """The text of docs/configuration.md: every key, from the same fields as `--help`."""
    lines = [
        "# Configuration",
        "",
        "Made by `python scripts/write_docs.py` from the fields in training/config/schema.py and gsa/config.py; a test",
        "compares them. Every key can stand in the yaml, or on the command line as `section.key=value`.",
        "The last column is what changing the key does to a run that resumes: *harmless* changes no number,",
        "with *rounds differently* the last digits of numbers may change, which a long run amplifies,",
        "*changes the curve* needs `--allow_config_change`, and with *impossible* the saved tensors no longer fit.",
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
        kind, default, bounds, meaning, effect = _describe(name)
        lines.append(f"| `{short}` | {kind} | `{default}` | {bounds} | {meaning} | {effect} |")
    return "\n".join(lines) + "\n"


class _KeyText(NamedTuple):
    """What the help and the docs print about a key."""

    kind: str
    default: str
    bounds: str
    meaning: str
    effect: str


def _describe(name: str) -> _KeyText:
    f = KEYS[name]
    default = f.default_factory() if f.default is MISSING else f.default
    return _KeyText(
        kind=" or ".join(choices(TYPES[name])) or f.type.replace(" | None", " or null"),
        default=default if isinstance(default, str) else json.dumps(default),
        bounds=", ".join(f"{bound} {limit}" for bound, limit in f.metadata["bounds"].items()),
        meaning=f.metadata["meaning"],
        effect=EFFECT_WORDS[f.metadata["resume"]],
    )
