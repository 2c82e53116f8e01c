"""The reader of a run folder: its columns, the rows that it holds, and what it does with broken files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from training.record.reader import Settings, read
from training.reporting import summary
from training.reporting.diagnosis import diagnose_record


def write_run(folder: Path, rows: list[dict]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def step(number: int, **fields: object) -> dict:
    return {"step": number, "loss": 3.0, "seconds": 1.0, "seconds_data": 0.1 * (number % 3), **fields}


def two_launches(steps: int) -> list[dict]:
    """The second launch begins after half of the steps."""
    rows = [{"event": "start", "step": 0, "world_size": 2}, *map(step, range(1, steps // 2 + 1))]
    return [
        *rows,
        {"event": "resume", "step": steps // 2, "world_size": 4},
        *map(step, range(steps // 2 + 1, steps + 1)),
    ]


def test_rows_know_their_launch_and_their_place_in_it(tmp_path):
    steps = read(write_run(tmp_path, two_launches(8))).steps
    assert steps.launch.tolist() == [1] * 4 + [2] * 4 and steps.place.tolist() == [1, 2, 3, 4] * 2


@pytest.mark.parametrize("newest", [1, 3, 4, 7, 20, 50])
def test_the_newest_rows_are_those_at_the_end_of_all(tmp_path, newest):
    rows = two_launches(20)
    rows[-1]["mfu"] = 0.3  # a field of one row only
    folder = write_run(tmp_path, rows)
    whole, end = read(folder), read(folder, newest=newest)
    assert len(end.steps) == min(newest, 20) and end.events == whole.events and end.launches == 2
    for name in ("step", "seconds_data", "mfu"):
        np.testing.assert_array_equal(end.steps.of(name), whole.steps.of(name)[-newest:])
    np.testing.assert_array_equal(end.steps.launch, whole.steps.launch[-newest:])
    np.testing.assert_array_equal(end.steps.place, whole.steps.place[-newest:])


def test_the_doctor_comes_to_the_same_from_the_newest_rows_and_from_all(tmp_path, monkeypatch):
    monkeypatch.setattr(summary, "MOST_STEPS", 30)
    folder = write_run(tmp_path, two_launches(200))
    whole, end = (diagnose_record(read(folder, newest=newest)) for newest in (None, 30))
    assert whole == end and whole.verdicts[0].name == "data-bound"
    assert "of 100 steps the last 30 are analysed" in whole.notes


def test_stalls_come_from_the_rows_or_from_events_and_count_once(tmp_path):
    save = [{"event": "save", "step": at, "save_stall_seconds": 5.0} for at in (2, 4, 6)]
    rows = [step(n, **({"seconds_save": 3.0 * (n == 3)} if n <= 4 else {})) for n in range(1, 7)]
    before, rest = read(write_run(tmp_path, [*rows, *save])).stalls("save")
    assert before.tolist() == [0, 0, 3, 0, 5, 0]  # row 3 has its seconds; row 5 has no field, so the event counts
    assert rest == [(2, 5.0), (6, 5.0)]


@pytest.mark.parametrize(
    "lines, damage",
    [
        (["{}", "", "\x00\x00", '{"torn'], None),
        (["nonsense", "{}"], "line 1: not JSON (Expecting value)"),
        (["{}", "[1]", '"text"', "{}"], "line 2: not a JSON object"),
    ],
)
def test_damage_is_a_broken_line_that_is_not_the_last(tmp_path, lines, damage):
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    found = read(tmp_path).damage
    assert found is None if damage is None else damage in found and "restore the file" in found


def test_stages_and_reasons_are_read_as_text(tmp_path):
    stages = ["dense", "dense", 5, "sparse", None, "sparse", "dense"]
    rows = [step(n, stage=stage) for n, stage in enumerate(stages, 1)]
    rows[2]["gpu/1/throttle_reasons"] = "power cap"
    steps = read(write_run(tmp_path, [*rows, rows[3]])).steps  # a row that repeats a step, as after a lost write
    assert steps.stages() == [(1, "dense"), (4, "sparse"), (7, "dense")]
    assert steps.words[int(steps.last("gpu/1/throttle_reasons"))] == "power cap" and steps.gpus() == [1]


def test_settings_of_a_wrong_type_are_unknown(tmp_path):
    write_run(tmp_path, two_launches(2))
    (tmp_path / "run.json").write_text('{"world_size": "many", "zero_stage": true, "backend": 5}')
    (tmp_path / "config.yaml").write_text("training: {max_steps: 1.5, compile: 1, async_save: 'no'}\ndata: [1]\n")
    (tmp_path / "ds_config.json").write_text('{"zero_optimization": {"stage": -1, "offload_param": "cpu"}}')
    assert read(tmp_path).settings == Settings(world_size=4)  # of the resume event
