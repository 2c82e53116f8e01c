"""The rules of style that a machine can check: the formatter, the linter, and words that hide what is meant."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Callable, Iterable, Iterator

import pytest
from support.launching import ROOT, clean_environment

FOLDERS = ("gsa", "training", "tests", "benchmarks", "scripts")
FILES = sorted(path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))

INSTEAD: dict[str, str] = {
    r"\balike\b": '"the same", "on all ranks", "equally"',
    r"\bkin\b": "the name of what is meant",
    r"\b(?:take|takes|taken|took|taking)[ _]up\b(?! to\b)": '"load", "use", "resume"',
    r"\b(?:bear|bears|bore) with\b": '"wait for", "allow"',
    r"\b(?:fall|falls|fell) silent\b": '"stop printing", "stop sending"',
    r"\ba room of its own\b": '"a module of its own"',
    r"\bwish(?:es|ed)?\b": '"request", "setting"',
    r"\bheld against\b": '"compared with"',
    r"\b(?:told|tells)\b": '"reported", "prints", "logged", "passed to"',
    r"\bsa(?:y|ys|id|ying) of itself\b": '"about its own ...", or the name of what is reported',
    r"\bpredecessor(?:'s|s)?\b": '"the legacy trainer", "legacy"',
    r"\bleaves? (?:\w+ ){1,2}alone\b": '"does not change", "prints only"',
    r"\b(?:judged|examined|felt)\b": '"measured", "checked", "compared"',
}
"""Words that gsa/ and training/ do not use in comments, docstrings, messages and names, and what to write instead."""


def documentation(source: str) -> Iterator[tuple[int, str]]:
    """(line, text) of every docstring, and of every string that documents the assignment before it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value


def comments(source: str) -> Iterator[tuple[int, str]]:
    """(line, text) of every comment; a `#` inside a string is none."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def words(source: str) -> Iterator[tuple[int, str]]:
    """(line, text) of all that a reader reads as words: comments, names, and strings with their line breaks as spaces."""
    yield from comments(source)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NAME:
            yield token.start[0], token.string.replace("_", " ")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, " ".join(node.value.split())


def format_marks(source: str) -> list[str]:
    return [f"line {line}: {text}" for line, text in comments(source) if re.search(r"fmt:\s*(skip|off|on)", text)]


def docstrings_without_a_subject(source: str) -> list[str]:
    return [f"line {line}: {text[:70]}" for line, text in documentation(source) if text.lstrip().startswith("Of ")]


def riddles(source: str) -> list[str]:
    """One line for each word of INSTEAD, with what to write in its place."""
    return [
        f'line {line}: "{found[0]}" in "{text[:70]}": write {instead}'
        for line, text in words(source)
        for word, instead in INSTEAD.items()
        if (found := re.search(word, text, re.IGNORECASE))
    ]


def violations(check: Callable[[str], list[str]], files: Iterable[str]) -> list[str]:
    return [f"{file}, {line}" for file in files for line in check((ROOT / file).read_text())]


@pytest.mark.parametrize("command", [("format", "--check", "--diff"), ("check",)], ids=["format", "check"])
def test_ruff_has_nothing_to_change(command):
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *command, *FOLDERS],
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning" not in done.stderr, done.stderr


def test_no_line_is_hidden_from_the_formatter():
    assert not violations(format_marks, FILES)


def test_no_docstring_begins_with_of():
    assert not violations(docstrings_without_a_subject, [file for file in FILES if not file.startswith("tests/")])


def test_words_are_plain():
    found = violations(riddles, [file for file in FILES if file.startswith(("gsa/", "training/"))])
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "check, source",
    [
        (format_marks, "x = [1,2]  # fmt: skip"),
        (format_marks, "# fmt: off\nx = 1"),
        (docstrings_without_a_subject, '"""Of a module."""'),
        (docstrings_without_a_subject, 'def f():\n    """\n    Of a function."""'),
        (docstrings_without_a_subject, 'class C:\n    """Of a class."""'),
        (docstrings_without_a_subject, 'class C:\n    x: int = 1\n    """Of an attribute."""'),
        (riddles, '"""Alike on every rank."""'),
        (riddles, "x = 1  # its kin"),
        (riddles, "def take_up(): ..."),
        (riddles, "told = 1"),
        (riddles, "# a state is taken up"),
        (riddles, '"""How long a mirror bears\nwith its sink."""'),
        (riddles, '"""A stream that falls silent."""'),
        (riddles, '"""A stop wish\nin a room of its own."""'),
        (riddles, "raise ValueError(f'{x}: held against the rows of {y}')"),
        (riddles, "print('as the program tells')"),
        (riddles, "'What a run says of itself.'"),
        (riddles, "# the predecessor's checkpoint"),
        (riddles, '"""`warning` leaves warnings alone."""'),
        (riddles, '"""What is judged."""'),
    ],
)
def test_a_violation_is_seen(check, source):
    assert check(source)


@pytest.mark.parametrize(
    "check, source",
    [
        (format_marks, "x = '# fmt: skip'"),
        (docstrings_without_a_subject, "x = 'Of no importance'"),
        (docstrings_without_a_subject, '"""Offsets of the documents."""'),
        (riddles, '"""Kernels take up to half of the step."""'),
        (riddles, "kind, skin, retold = 1, 2, 3"),
        (riddles, '"""The softmax itself; akin to nothing."""'),
    ],
)
def test_plain_code_passes(check, source):
    assert not check(source)
