"""Writes the pages of docs/ that are made from the code: `python scripts/write_docs.py`. Tests compare them.

docs/configuration.md and docs/metrics.md are made whole; in docs/architecture.md the list of modules is, from the first
sentence of each module's docstring.
"""

from __future__ import annotations

import ast
from pathlib import Path

from training.config.load import markdown_table
from training.record.metric_schema import schema

ROOT = Path(__file__).resolve().parent.parent
MARK = "<!-- from here on made by scripts/write_docs.py -->\n"


def module_list() -> str:
    """Every folder of gsa/ and training/ with its modules, a line each."""
    lines = []
    for package in ("gsa", "training"):
        for folder in sorted({path.parent for path in (ROOT / package).rglob("*.py")}):
            name = folder.relative_to(ROOT).as_posix()
            lines += ["", f"### {name}/", "", _summary(folder / "__init__.py"), "", "| module | |", "|---|---|"]
            files = sorted(path for path in folder.glob("*.py") if path.stem not in ("__init__", "__main__"))
            lines += [f"| `{path.stem}` | {_summary(path)} |" for path in files]
    return "\n".join(lines).lstrip("\n") + "\n"


def _summary(path: Path) -> str:
    """The first paragraph of a module's docstring, as one line that a table can hold."""
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(doc.partition("\n\n")[0].split()).replace("|", "\\|")


def architecture() -> str:
    """docs/architecture.md: its own text, and below the mark the list of modules."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    return text.partition(MARK)[0] + MARK + "\n" + module_list()


PAGES = {"configuration.md": markdown_table, "metrics.md": schema, "architecture.md": architecture}

if __name__ == "__main__":
    for name, make in PAGES.items():
        path = ROOT / "docs" / name
        path.write_text(make(), encoding="utf-8")
        print(path)
