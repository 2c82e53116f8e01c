"""docs/architecture.md says how the house stands: its tables are those of the walls, its list that of the files."""

from __future__ import annotations

import importlib.util
import re

from support.launching import ROOT
from test_walls import HOMES, WINGS

PAGE = (ROOT / "docs" / "architecture.md").read_text()


def test_the_list_of_modules_is_made_from_their_docstrings():
    spec = importlib.util.spec_from_file_location("write_docs", ROOT / "scripts" / "write_docs.py")
    write_docs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(write_docs)
    assert PAGE == write_docs.architecture(), "run python scripts/write_docs.py"
    for row in re.findall(r"^\| `(\w+)` \| (.*) \|$", PAGE.partition(write_docs.MARK)[2], re.M):
        assert len(row[1]) > 20, f"{row[0]} has no summary"


def test_the_table_of_wings_is_the_one_that_the_walls_are_held_to():
    rows = dict(re.findall(r"^\| `(\w+)/` \| .* \| (.*) \|$", PAGE, re.M))
    assert rows.keys() == WINGS.keys()
    for wing, may_import in rows.items():
        expected = set(WINGS) - {"reporting", "loop"} | {"gsa"} if may_import == "all but reporting" else WINGS[wing]
        assert (expected if may_import == "all but reporting" else set(may_import.split(", "))) == WINGS[wing], wing


def test_the_homes_of_third_parties_are_named():
    for party, home in HOMES.items():
        assert re.search(rf"{party} in\s+`{re.escape(home.removeprefix('training/'))}", PAGE), (party, home)
