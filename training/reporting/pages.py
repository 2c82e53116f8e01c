"""Writes report.html and report.md from the templates page.html.j2 and page.md.j2.

Text of a run is escaped by construction. In page.html.j2 jinja2 escapes everything but Markup, which only our own
charts, style sheet and script are. In page.md.j2 `escape` is applied to everything but Markdown.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path

import jinja2
from markupsafe import Markup

from gsa.files import write_atomically
from gsa.units import printable
from training.record.reader import labels, read
from training.reporting import curves, format, tables
from training.reporting.analysis import Analysis, analyse
from training.reporting.tables import Table

_HERE = Path(__file__).parent


def write(folders: Sequence[Path], out: Path, *, verify: bool = False) -> list[Path]:
    """Writes both reports on the runs in `folders` into `out`, and returns their paths.

    verify: read every byte of every checkpoint. Raises NoRunError; OSError when `out` cannot be written.
    """
    named = zip(folders, labels(folders), strict=True)
    runs = [analyse(read(folder, label), verify=verify) for folder, label in named]
    out.mkdir(parents=True, exist_ok=True)
    for name, text in (("report.html", html_page(runs)), ("report.md", markdown_page(runs))):
        with write_atomically(out / name, durable=False) as file:
            # a run's text may hold what UTF-8 cannot, such as half a surrogate pair
            file.write(text.encode(errors="replace"))
    return [out / "report.html", out / "report.md"]


def html_page(runs: Sequence[Analysis]) -> str:
    """The page on one run, or on several to be compared. It is complete in itself and fetches nothing."""
    return _HTML.get_template("page.html.j2").render(runs=runs)


def markdown_page(runs: Sequence[Analysis]) -> str:
    """The same without pictures, for a terminal, a pull request or a mail."""
    return _MARKDOWN.get_template("page.md.j2").render(runs=runs)


class Markdown(str):
    """Text that is markdown already: `escape` leaves it as it is."""


def escape(value: object) -> Markdown:
    """The value as markdown that reads as plain text: it stays on its line and holds no markup."""
    if isinstance(value, Markdown):
        return value
    text = " ".join(str(value).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    # an underscore inside a word is not markup
    return Markdown(re.sub(r"([\\`*\[\]|~]|^#|(?<!\w)_|_(?!\w))", r"\\\1", text))


# The blocks of report.md: each ends with a blank line, and is empty when it has no content.


def _paragraph(text: str) -> Markdown:
    return Markdown(f"{escape(text)}\n\n" if text else "")


def _bullets(lines: Sequence[str]) -> Markdown:
    return Markdown("".join(f"- {escape(line)}\n" for line in lines) + "\n" if lines else "")


def _fenced(text: str) -> Markdown:
    fence = "`" * max(3, 1 + max((len(list(run)) for mark, run in groupby(text) if mark == "`"), default=0))
    return Markdown(f"{fence}text\n{text}\n{fence}\n\n")


def _table(table: Table, otherwise: str = "") -> Markdown:
    """otherwise: what stands in place of a table without rows."""
    if not table.rows:
        return _paragraph(otherwise)
    rule = ["---:" if i in table.numeric else "---" for i in range(len(table.columns))]
    lines = [map(escape, table.columns), rule, *(map(escape, row) for row in table.rows)]
    return Markdown("".join(f"| {' | '.join(cells)} |\n" for cells in lines) + "\n")


def _environment(finalize: Callable[[object], object] = lambda value: value, **options: object) -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: finalize(printable(value) if type(value) is str else value),
        trim_blocks=True,
        lstrip_blocks=True,
        **options,
    )
    made.globals |= {"curves": curves, "format": format, "tables": tables}
    return made


_SCRIPT = (_HERE / "report.js").read_text(encoding="utf-8")
_HTML = _environment(autoescape=True)
_HTML.globals |= {
    "style": Markup((_HERE / "report.css").read_text(encoding="utf-8")),
    "script": Markup(_SCRIPT),
    "script_sha256": base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode(),
}
_MARKDOWN = _environment(finalize=escape, keep_trailing_newline=True)
_MARKDOWN.globals |= {"bullets": _bullets, "fenced": _fenced, "paragraph": _paragraph, "table": _table}
