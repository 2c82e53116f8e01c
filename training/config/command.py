"""What every command shares: its parser, the spelling of its flags, and how an error becomes an exit code."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, TextIO

from gsa.checkpoint.manifest import CheckpointError
from gsa.units import printable
from training.config.exit_codes import Refusal, exit_code_of


def command_parser(name: str, doc: str | None, **options: object) -> argparse.ArgumentParser:
    """The parser of `python -m training.<name>`; its help begins with the module's docstring, `doc`, as it is written.

    options: further arguments of argparse.ArgumentParser. Flags are spelled in snake_case; `snake_case_flags` accepts
    the kebab-case spellings of earlier versions.
    """
    return argparse.ArgumentParser(
        prog=f"python -m training.{name}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        **options,
    )


def add_run(parser: argparse.ArgumentParser, help: str = "the folder of a run, e.g. outputs/quickstart") -> None:
    """The positional argument RUN, a run's folder; it is a Path named `run` in the namespace."""
    parser.add_argument("run", type=Path, metavar="RUN", help=help)


def snake_case_flags(argv: Sequence[str]) -> list[str]:
    """argv with `--vocab-size 8` or `--vocab-size=8` spelled `--vocab_size`; everything else is left as it is."""
    spelled = []
    for word in argv:
        flag, equals, value = word.partition("=")
        if flag.startswith("--") and flag != "--":
            flag = "--" + flag[2:].replace("-", "_")
        spelled.append(flag + equals + value)
    return spelled


FREE_TEXT = ("--prompt",)
"""Flags whose value may be empty."""


def refuse_empty(argv: Sequence[str]) -> list[str]:
    """argv, unless a value in it is empty, as it is when a variable in a job script is not set: then Refusal.

    An empty path would mean the working directory, and an empty --resume_from a run that starts over.
    """
    before = ""
    for word in argv:
        flag, equals, value = word.partition("=")
        if not word and before in FREE_TEXT:
            continue
        if not word or (equals and not value and flag not in FREE_TEXT):
            which = flag or (f"what follows {before}" if before else "the first argument")
            null = "" if flag.startswith("--") or not flag else f", or {flag}=null"
            raise Refusal(f"{which} is empty; is a variable unset in the script that calls this? Give a value{null}")
        before = word
    return list(argv)


def run_command(main: Callable[[list[str]], int], argv: Sequence[str] | None = None) -> int:
    """Runs a command's `main` and returns its exit code; a refusal is printed to stderr as one `error:` line.

    Only refusals are caught (Refusal and its subclasses, CheckpointError): any other exception is a bug and keeps its
    traceback. When the reader of a pipe has gone, the command ends as if by SIGPIPE, with 141.
    """
    out = sys.stdout
    try:
        with redirect_stdout(Escaping(out)):
            code = main(refuse_empty(snake_case_flags(sys.argv[1:] if argv is None else argv)))
        out.flush()
        return code
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())  # Python flushes once more at its end
        return 128 + signal.SIGPIPE
    except (Refusal, CheckpointError) as err:
        print(printable(f"error: {err}"), file=sys.stderr, flush=True)
        return exit_code_of(err)


class Escaping:
    """Wraps an output stream; control characters in what a stranger wrote are shown, not obeyed."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return self._stream.write(printable(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
