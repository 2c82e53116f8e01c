"""A checkpoint whose next step is not finite is passed over, and launches that end at one step are counted."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from support.launching import Case, run_cases

from gsa.checkpoint import manifest
from training.checkpoints import main as checkpoints
from training.record.metrics_log import read_rows

TOO_HIGH = (
    "training.warmup_steps=0",
    "training.learning_rate=1e25",
    "training.min_learning_rate=1e25",
    "--allow_config_change",
)


@pytest.fixture(scope="module")
def launches(tmp_path_factory, tiny_yaml) -> tuple[Path, str]:
    """Runs whose step_5 holds weights that one update has broken, and what was done with them."""
    base = tmp_path_factory.mktemp("broken")

    def case(name, *argv, code=0):
        common = ("--config", str(tiny_yaml), "--output_dir", str(base / name), "training.eval_interval=0")
        return Case(name, (*common, "training.save_interval=1", "training.keep_last=null", *argv), code)

    cases = []
    for name in ("auto", "rollback"):
        cases.append(case(name, "training.max_steps=10", "training.stop_at_step=4"))
        cases.append(case(name, "training.max_steps=10", "--resume_from", "auto", *TOO_HIGH, code=4))
    good = ("training.max_steps=10", "training.stop_at_step=8", "--allow_config_change")
    cases.append(case("auto", *good, "--resume_from", "auto"))
    cases.append(case("rollback", *good, "training.on_spike=rollback", "--resume_from", "step_5"))
    never = ("training.max_steps=10", "training.save_interval=0", "--resume_from", "auto")
    cases += [case("ends", *never, *TOO_HIGH, code=4)] * 3
    return base, run_cases(1, cases, base)


def test_auto_passes_over_a_checkpoint_whose_next_step_was_not_finite(launches):
    base, output = launches
    words = "passed over: step_5: its next step, 6, was not finite: its weights may be broken"
    assert output.count(words) == 1 and "resumed step_4: continuing at step 5 of 8" in output
    assert manifest.newest_good(base / "auto")[0].name == "step_8"
    assert json.loads((base / "auto" / "run.json").read_text())["status"] == "stopped"


def test_a_rollback_goes_back_past_such_a_checkpoint_and_naming_it_warns(launches):
    base, output = launches
    assert "warning: step_5: its next step, 6, was not finite" in output
    assert "resumed step_5: continuing at step 6 of 8" in output
    (spike,) = [row for row in read_rows(base / "rollback" / "metrics.jsonl") if row.get("event") == "spike"]
    assert (spike["action"], spike["checkpoint"]) == ("rollback", "step_4")
    assert manifest.newest_good(base / "rollback")[0].name == "step_8"


def test_the_third_launch_that_ends_at_one_step_says_so(launches):
    base, output = launches
    run = json.loads((base / "ends" / "run.json").read_text())
    assert run["ends"]["count"] == 3 and run["step"] == run["ends"]["step"]
    said = re.findall(r"error: (\d) launches in a row have ended at step (\d+)", output)
    assert said == [("3", str(run["step"]))]
    assert json.loads((base / "auto" / "run.json").read_text())["ends"] is None  # a launch that ends well counts anew


def test_a_suspect_is_taken_where_no_other_checkpoint_is_good(launches):
    base, _ = launches
    found, lines = manifest.newest_good(base / "auto", {path.name: "reason" for path in (base / "auto").glob("step_*")})
    assert found.name == "step_8" and lines[-1] == "step_8 is taken all the same: no other checkpoint is good"


def test_the_list_of_checkpoints_shows_it(launches, capsys):
    base, _ = launches
    from training.record.run_folder import RunFolder

    RunFolder(base / "auto").suspect(8)
    assert checkpoints(["list", str(base / "auto")]) == 0
    assert re.search(r"step_7 .*complete, its next step, 8, was not finite", capsys.readouterr().out)
