"""Loss spikes, skipped and rolled-back steps, health metrics and replay receipts, with real engines on two ranks."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import pytest
from support.launching import ROOT, Case, run_cases

from gsa.checkpoint.full_state import read_run_state
from training.data.loader import past
from training.record.metric_schema import HEALTH_METRICS, is_timing
from training.record.metrics_log import read_rows
from training.record.reader import read
from training.record.replay_receipt import ReplayReceipt
from training.record.spike_score import KNOWN, WINDOW, SpikeDetector
from training.replay import trainings_of
from training.reporting.analysis import analyse

STAGES = ("zero0", "zero1", "zero2", "zero3")
SIGMA = 1.0
STEPS = 64
"""Steps of the long runs. Their losses hardly fall, so that some of the last ones lie SIGMA above the rest."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_yaml) -> Path:
    base = tmp_path_factory.mktemp("spikes")

    def case(name, *extra, stage="zero2", into=None):
        return Case(
            name,
            (
                "--config",
                str(tiny_yaml),
                "--output_dir",
                str(base / (into or name)),
                "training.eval_interval=0",
                "--deepspeed_config",
                str(ROOT / "ds_configs" / f"{stage}.json"),
                *extra,
            ),
        )

    health = [
        case(f"health_{stage}", "training.health_interval=1", "training.max_steps=3", stage=stage) for stage in STAGES
    ]
    long = (
        f"training.max_steps={STEPS}",
        "training.save_interval=10",
        "training.learning_rate=1e-5",
        "training.min_learning_rate=1e-6",
        "training.keep_last=null",
        f"training.spike_sigmas={SIGMA}",
        "training.global_batch_size=4",
    )
    skips = [
        case(f"skip_{stage}", *long, "training.on_spike=skip", "training.health_interval=1", stage=stage)
        for stage in ("zero0", "zero2", "zero3")
    ]
    back = (*long, "training.on_spike=rollback")
    run_cases(
        2,
        [
            *health,
            *skips,
            case("log", *long),
            case("rollback", *back),
            case("stopped", *back, "training.stop_at_step=60"),
            case("resumed", *back, "--resume_from", "latest", into="stopped"),
            case("unevaluated", "training.save_interval=2", "training.max_steps=4"),
            case(
                "evaluated",
                "--resume_from",
                "step_2",
                "training.eval_interval=2",
                "training.max_steps=4",
                into="unevaluated",
            ),
            case("no_checkpoint", *back, "training.save_interval=0"),
            case(
                "sampled",
                "training.indexer_warmup_steps=5",
                "training.sample_interval=1",
                "training.save_interval=1",
                "training.max_steps=2",
                "training.sample_prompts=[w3]",
                "training.sample_tokens=2",
            ),
            case("replayed", "training.save_interval=3"),
            case("replay", "--resume_from", "step_3", into="replayed"),
            case(
                "changed",
                "--resume_from",
                "step_3",
                "--allow_config_change",
                "training.learning_rate=1e-3",
                into="replayed",
            ),
        ],
        base,
        timeout_s=900,
    )
    return base


def rows_of(folder: Path) -> list[dict]:
    return [row for row in read_rows(folder / "metrics.jsonl") if "loss" in row]


def events_of(folder: Path, kind: str) -> list[dict]:
    return [row for row in read_rows(folder / "metrics.jsonl") if row.get("event") == kind]


def timeless(row: dict) -> dict:
    return {key: value for key, value in row.items() if not is_timing(key)}


@pytest.mark.parametrize("stage", STAGES)
def test_gradient_norms_by_part_add_up_and_health_metrics_are_the_same_at_every_stage(runs, stage):
    reference = rows_of(runs / "health_zero0")
    for row, plain in zip(rows_of(runs / f"health_{stage}"), reference, strict=True):
        parts = [row[f"grad_norm/{part}"] for part in ("indexer", "gates", "rest")]
        assert math.hypot(*parts) == pytest.approx(row["grad_norm"], rel=1e-5) and min(parts) > 0
        for name in HEALTH_METRICS:
            assert row[name] == pytest.approx(plain[name], rel=1e-4), name
        assert 1e-4 < row["update_ratio/main"] < 0.1


@pytest.mark.parametrize("stage", ["zero0", "zero2", "zero3"])
def test_a_skipped_step_makes_no_update_and_the_run_goes_on(runs, stage):
    folder = runs / f"skip_{stage}"
    spikes, rows = events_of(folder, "spike"), rows_of(folder)
    assert spikes and {event["action"] for event in spikes} == {"skip"} and len(rows) == STEPS
    dropped = {event["step"] for event in spikes}
    for row in rows:
        assert (row["update_ratio/main"] == 0) == (row["step"] in dropped)
        assert (row["spike_score"] > SIGMA) == (row["step"] in dropped)
    for event in spikes:
        assert event["samples"] == [4 * (event["step"] - 1), 4 * event["step"] - 1]
    # the schedule counts a skipped step
    assert [row["lr"] for row in rows] == [row["lr"] for row in rows_of(runs / "log")]


def test_on_spike_log_writes_an_event_for_every_spike(runs):
    spikes = events_of(runs / "log", "spike")
    assert spikes and {event["action"] for event in spikes} == {"log"}
    scores = {row["step"]: row["spike_score"] for row in rows_of(runs / "log")}
    assert {event["step"] for event in spikes} == {step for step, score in scores.items() if score > SIGMA}
    assert all(scores[step] == 0 for step in range(1, KNOWN + 1))


def test_a_rollback_restores_the_last_checkpoint_and_passes_over_the_samples(runs):
    folder = runs / "rollback"
    first = events_of(folder, "spike")[0]
    assert first["action"] == "rollback"
    back_to = int(first["checkpoint"].removeprefix("step_"))
    assert back_to == (first["step"] - 1) // 10 * 10
    rows = rows_of(folder)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    skipped = read_run_state(folder / f"step_{STEPS}").skipped
    assert [first["samples"][0], 4] in skipped
    trained = [range(row["samples"] - 4, row["samples"]) for row in rows]
    for start, count in skipped:
        assert not any(set(samples) & set(range(start, start + count)) for samples in trained)
    assert rows[-1]["samples"] == 4 * STEPS + 4 * len(skipped)
    # up to the checkpoint nothing differs from the run that only logs spikes
    logged = rows_of(runs / "log")
    assert [timeless(row) for row in rows[:back_to]] == [timeless(row) for row in logged[:back_to]]
    # each discarded step keeps its row, with its samples, in segments/
    spikes = events_of(folder, "spike")
    for event in spikes:
        back = [t for t in trainings_of(folder, event["step"]) if t.segment is not None]
        spans = [[t.row["samples"] - 4, t.row["samples"] - 1] for t in back if t.row["loss"] == event["spike_loss"]]
        assert spans == [event["samples"]]
    story = analyse(read(folder, "rollback"), verify=False)
    assert story.spikes.undone == len(spikes) > 0


def test_a_checkpoint_records_the_stage_of_the_run_also_when_completions_were_made(runs):
    state = read_run_state(runs / "sampled" / "step_2")
    assert state.stage == rows_of(runs / "sampled")[1]["stage"] == "dense"
    assert len(events_of(runs / "sampled", "sample")) == 2  # after the first and the second step


def test_a_run_with_rollbacks_resumes_exactly(runs):
    straight, resumed = (read_rows(runs / name / "metrics.jsonl") for name in ("rollback", "stopped"))
    straight, resumed = ([timeless(row) for row in rows if "loss" in row] for rows in (straight, resumed))
    assert straight == resumed
    assert (
        read_run_state(runs / "stopped" / f"step_{STEPS}").skipped
        == read_run_state(runs / "rollback" / f"step_{STEPS}").skipped
    )


def test_without_a_checkpoint_a_spike_is_logged(runs):
    assert {event["action"] for event in events_of(runs / "no_checkpoint", "spike")} == {"log"}
    assert len(rows_of(runs / "no_checkpoint")) == STEPS


def test_a_receipt_says_whether_the_replay_was_identical_and_names_the_first_difference(runs):
    changed, identical = events_of(runs / "replayed", "receipt"), []
    for segment in (runs / "replayed" / "segments").glob("metrics_*.jsonl"):
        identical += [row for row in read_rows(segment) if row.get("event") == "receipt"]
    assert [(r["compared"], r["identical"], r["first_difference"]) for r in identical] == [(3, True, None)]
    (receipt,) = changed
    assert receipt["compared"] == 3 and not receipt["identical"] and receipt["step"] == 6
    assert receipt["first_difference"]["field"] == "lr" and receipt["first_difference"]["step"] == 4
    resume = events_of(runs / "replayed", "resume")[-1]
    assert resume["config_diff"]["training.learning_rate"] == [0.003, 0.001] and resume["segment"] == 2


def test_a_resume_runs_the_evaluation_that_is_missing_for_its_checkpoint(runs):
    """As when a signal stopped the run after the checkpoint and before the evaluation of its step."""
    assert [row["step"] for row in events_of(runs / "unevaluated", "eval")] == [2, 4]


def test_a_replayed_step_whose_numbers_are_not_finite_can_be_identical():
    receipt = ReplayReceipt([{"step": 2, "loss": "nan", "layers": {"coverage": [0.5, "inf"]}}])
    receipt_row = receipt.compare({"step": 2, "loss": math.nan, "layers": {"coverage": (0.5, math.inf)}})
    assert receipt_row["identical"] and receipt_row["compared"] == 1


def test_steps_without_a_finite_loss_count_as_spikes_in_the_report(runs, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    rows = [{"step": n, "loss": 1.0, "spike_score": 0.0} for n in range(1, 81)]
    rows[60] |= {"loss": "nan", "spike_score": "nan"}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spikes = analyse(read(folder, "lost"), verify=False).spikes
    assert spikes.at.tolist() == [60] and spikes.share == pytest.approx(1 / 80)


def test_a_score_is_the_distance_from_the_mean_in_standard_deviations_of_the_window():
    losses = [math.sin(i) for i in range(WINDOW + 200)]
    detector = SpikeDetector(losses)
    window = losses[-WINDOW:]
    expected = (3.0 - statistics.fmean(window)) / statistics.pstdev(window)
    assert detector.score(3.0) == pytest.approx(expected)
    one_by_one = SpikeDetector()
    for loss in losses:
        one_by_one.add(loss)
    assert one_by_one.score(3.0) == detector.score(3.0)
    assert SpikeDetector(losses[: KNOWN - 1]).score(99.0) == 0 < SpikeDetector(losses[:KNOWN]).score(99.0)


@pytest.mark.parametrize(
    "skipped, first, expected",
    [([], 16, 16), ([(16, 8)], 16, 24), ([(16, 8)], 8, 8), ([(24, 8), (16, 8)], 16, 32), ([(20, 8)], 16, 28)],
)
def test_no_step_reads_a_skipped_range_of_samples(skipped, first, expected):
    assert past(skipped, first, 8) == expected
