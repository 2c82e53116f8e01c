"""Writes the pages of docs/ that are made from the code: `python scripts/write_docs.py`. Tests compare them."""

from __future__ import annotations

from pathlib import Path

from training.config.load import markdown_table
from training.metrics import schema

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGES = {"configuration.md": markdown_table, "metrics.md": schema}

if __name__ == "__main__":
    for name, make in PAGES.items():
        (DOCS / name).write_text(make(), encoding="utf-8")
        print(DOCS / name)
