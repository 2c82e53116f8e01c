"""docs/first_day.md shows real changes: each of its diffs is what stands in the code today."""

from __future__ import annotations

import re
import subprocess

import pytest
from support.launching import ROOT, clean_environment

PAGE = (ROOT / "docs" / "first_day.md").read_text()
DIFFS = dict(re.findall(r"^## (.+?)\n.*?^```diff\n(.*?)^```$", PAGE, re.M | re.S))


def test_every_section_has_its_diff():
    assert list(DIFFS) == re.findall(r"^## (.+)$", PAGE, re.M) and len(DIFFS) == 5


@pytest.mark.parametrize("change", DIFFS)
def test_the_diff_is_what_stands_in_the_code(change):
    """It can be taken back, which `git apply` decides by the lines themselves and the ones around them."""
    done = subprocess.run(
        ["git", "apply", "--reverse", "--check", "-"],
        cwd=ROOT,
        env=clean_environment(),
        input=DIFFS[change],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{done.stderr}\nThe code has changed: show the change of today in docs/first_day.md"


def test_tests_that_are_named_exist():
    named = re.findall(r"`(test_\w+)`[^`]*`(tests/[\w/]+\.py)`", PAGE)
    assert named
    for name, path in named:
        assert f"def {name}(" in (ROOT / path).read_text(), name


def test_files_that_are_named_exist():
    for path in re.findall(r"`((?:gsa|training|tests|scripts|docs)/[\w/]+\.\w+)`", PAGE):
        assert (ROOT / path).is_file(), path
