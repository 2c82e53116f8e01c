"""Lists the commands: `python -m training`; `python -m training COMMAND ...` runs one."""

from __future__ import annotations

import ast
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from training.config.exit_codes import ExitCode


def commands() -> dict[str, str]:
    """Each command's name with the first sentence of its docstring, read without importing it."""
    files = sorted(path for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith("__"))
    docs = {path.stem: ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "" for path in files}
    return {name: doc.partition("\n")[0].partition(": `")[0] for name, doc in docs.items()}


def main(argv: Sequence[str]) -> int:
    found = commands()
    if argv and argv[0] in found:
        sys.argv = [f"training.{argv[0]}", *argv[1:]]
        runpy.run_module(f"training.{argv[0]}", run_name="__main__", alter_sys=True)
        return ExitCode.FINISHED
    if argv and argv[0] not in ("-h", "--help"):
        print(f"error: no command {argv[0]!r}; python -m training lists them", file=sys.stderr)
        return ExitCode.REFUSED_CONFIG
    width = max(map(len, found))
    print("Commands, each with --help:  python -m training.COMMAND ...   (train: deepspeed training/train.py ...)\n")
    for name, summary in found.items():
        print(f"  {name:<{width}}  {summary.rstrip('.')}")
    return ExitCode.FINISHED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
