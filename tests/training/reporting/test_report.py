"""The report on real runs, on rows of a run of days, on runs that lack files or fields; and the page in a real browser."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from jinja2 import UndefinedError
from support import browser as headless
from support.launching import ROOT, Case, rank_environment, run_cases

from gsa.checkpoint import manifest
from training import config as run_config
from training.config.command import run_command
from training.record.reader import NoRunError, labels, read
from training.record.spike_score import SpikeDetector
from training.report import main
from training.reporting.analysis import analyse, find_spikes
from training.reporting.charts import INTERVALS, Axis, heat_bins, thin
from training.reporting.curves import PALETTE
from training.reporting.format import compact, duration, number, percent
from training.reporting.pages import escape, html_page, write

LAYERS = 6
SECTIONS = ["learning", "time", "speed", "attention", "launches", "checkpoints", "samples", "configuration"]


def analysis_of(folder: Path, *, verify: bool = False):
    return analyse(read(folder), verify=verify)


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# -- a run of days, as the trainer writes it ----------------------------------------------------------


def step_row(step: int, at: float, random: np.random.Generator) -> dict:
    """A row with every field that the trainer writes: 4 GPUs, dense attention until step 100."""
    seconds = 7.0 + abs(random.normal(0, 0.05))
    row = {
        "step": step,
        "epoch": step / 5000,
        "samples": 256 * step,
        "tokens": 524288 * step,
        "loss": 3.0 + 7.6 * math.exp(-step / 60) + random.normal(0, 0.03),
        "spike_score": 0.0,
        "indexer_loss": 0.05 + math.exp(-step / 80),
        "grad_norm": 0.4 + 2 * math.exp(-step / 50),
        "lr": 3e-4,
        "lr_indexer": 3e-3,
        "stage": "dense" if step <= 100 else "sparse",
        "selected_k": 480.0,
        "visible_k": 700.0,
        "tokens_per_s": 524288 / seconds,
        "tokens_per_s_per_device": 131072 / seconds,
        "mfu": 0.42,
        "seconds": seconds,
        "seconds_data": 0.01,
        "seconds_forward": 2.1,
        "seconds_backward": seconds - 2.5,
        "seconds_step": 0.3,
        "seconds_other": 0.09,
        "seconds_save": 2.0 if step % 200 == 1 and step > 1 else 0.0,
        "seconds_eval": 20.0 if step % 100 == 1 and step > 1 else 0.0,
        "rank_seconds_slowest": 2.13,
        "rank_seconds_median": 2.11,
        "allocator_retries": 0,
        "memory_gib": 33.7,
        "time": at,
    }
    for gpu in range(4):
        row |= {
            f"gpu/{gpu}/utilisation": 0.96,
            f"gpu/{gpu}/power_w": 340.0,
            f"gpu/{gpu}/power_limit_w": 350.0,
            f"gpu/{gpu}/clock_mhz": 1905.0,
            f"gpu/{gpu}/max_clock_mhz": 2520.0,
            f"gpu/{gpu}/memory_gib": 36.0,
            f"gpu/{gpu}/temperature_c": 66.0,
            f"gpu/{gpu}/throttled": 0.6,
            f"gpu/{gpu}/throttle_reasons": "power cap",
        }
    if step % 10 == 0:
        row |= {
            "grad_norm/indexer": 0.1,
            "grad_norm/gates": 0.05,
            "grad_norm/rest": 0.4,
            "update_ratio/main": 2e-3,
            "update_ratio/indexer": 4e-3,
        }
    if step % 20 == 0:
        by_layer = {
            "coverage": 0.9,
            "oracle": 0.95,
            "recall": 0.8,
            "value_saturation": 0.1,
            "output_saturation": 0.2,
            "first_token": 0.12,
        }
        row["layers"] = {name: [v * (1 - 0.05 * i) for i in range(LAYERS)] for name, v in by_layer.items()}
        row["layers"]["value_saturation"][0] = None
        row |= {
            "indexer/coverage": 0.8,
            "indexer/coverage_worst": 0.7,
            "indexer/oracle": 0.9,
            "indexer/recall": 0.7,
            "gate/value_saturation": 0.1,
            "gate/output_saturation": 0.2,
            "attention/first_token": 0.1,
        }
    return row


def long_run(
    folder: Path,
    *,
    steps: int = 700,
    crash: int = 430,
    back: int = 400,
    seed: int = 0,
    overrides=(),
    status: str = "running",
    sealed=(200, 400, 600),
) -> Path:
    """The folder of a run that was killed after step `crash`, resumed from `back`, and is now at `steps`; a spike at 250."""
    random, now = np.random.default_rng(seed), time.time() - 9 * steps - 3600
    config = run_config.load_config(ROOT / "training/configs/pretrain_512m_low_memory.yaml", list(overrides))
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(run_config.to_plain(config)))
    (folder / "ds_config.json").write_text(
        json.dumps(
            {"train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 8, "zero_optimization": {"stage": 2}}
        )
    )
    (folder / "env.json").write_text(
        json.dumps({"torch": "2.13.0", "python": "3.11.7", "devices": ["NVIDIA L40S"] * 4})
    )
    (folder / "run.json").write_text(
        json.dumps(
            {
                "status": status,
                "reason": None,
                "step": steps,
                "world_size": 4,
                "zero_stage": 2,
                "backend": "triton",
                "tracking_id": "9f3c1a20",
                "updated": now,
            }
        )
    )

    def event(kind: str, step: int, **fields: object) -> dict:
        return {"event": kind, "step": step, **fields, "time": now}

    def device(step: int) -> dict:
        return event(
            "device", step, name="NVIDIA L40S", world_size=4, memory_gib=44.4, peak_tflops=149.7, peak_source="table"
        )

    curve, discarded = [event("start", 0, world_size=4, zero_stage=2, segment=0), device(0)], []
    plan = [(step, curve if step <= back or crash >= steps else discarded) for step in range(1, min(crash, steps) + 1)]
    plan += [(step, curve) for step in range(back + 1, steps + 1)] if crash < steps else []
    before = 0
    for step, rows in plan:
        resumed = step <= before
        if resumed:
            now += 1200
            rows += [
                event(
                    "resume",
                    back,
                    world_size=4,
                    zero_stage=2,
                    segment=1,
                    checkpoint=f"step_{back}",
                    rows_moved=crash - back,
                    config_diff={"data.num_workers": [2, 4]},
                ),
                device(back),
            ]
        before = step
        row = step_row(step, now, random)
        if resumed:
            row |= {"seconds_save": 0.0, "seconds_eval": 0.0}
        now += row["seconds"] + row["seconds_save"] + row["seconds_eval"]
        row["time"] = now
        if step == 250:
            row |= {"loss": row["loss"] + 3, "spike_score": 22.5}
        rows.append(row)
        if step == 250:
            rows.append(event("spike", step, spike_loss=row["loss"], score=22.5, samples=[63744, 63999], action="log"))
        if step == 3:
            rows.append(event("predicted", step, memory_gib=33.1, measured_gib=33.7, seconds=6.6, measured_seconds=7.0))
        if step == crash and crash < steps and rows is curve:
            rows.append(event("receipt", step, compared=crash - back, identical=True, first_difference=None))
        if step % 100 == 0:
            rows.append(
                event(
                    "eval",
                    step,
                    eval_loss=3.0,
                    eval_bpb=0.9 + 2 * math.exp(-step / 150),
                    unigram_bpb=2.31,
                    eval_seconds=20.0,
                )
                | {"time": now + 20}
            )
            rows.append(event("sample", step, prompt="def ", text=f"f(x):\n    return {step} < x & `x`"))
            rows.append(event("sample", step, prompt="The ", text="river had been rising since the thaw."))
        if step in sealed:
            (folder / f"step_{step}").mkdir()
            (folder / f"step_{step}" / "model.safetensors").write_bytes(bytes(1000))
            manifest.seal(folder / f"step_{step}")
            manifest.publish(folder, f"step_{step}")
            rows.append(event("save", step, tag=f"step_{step}", bytes=1000, save_stall_seconds=2.0))
    if status == "finished":
        curve.append(event("stop", steps, reason="finished"))
    shift = time.time() - 30 - now  # the last lines are some seconds old
    for row in curve + discarded:
        row["time"] += shift
    write_rows(folder / "metrics.jsonl", curve)
    if discarded:
        write_rows(folder / "segments/metrics_0.jsonl", discarded)
    return folder


@pytest.fixture(scope="module")
def days(tmp_path_factory) -> Path:
    """A run of days that tests share: copy it before you change it."""
    return long_run(tmp_path_factory.mktemp("days") / "gsa-512m")


@pytest.fixture
def copy(days, tmp_path) -> Path:
    return shutil.copytree(days, tmp_path / "copy")


# -- reading a page -----------------------------------------------------------------------------------


class Elements(HTMLParser):
    """Tags with their attributes, and the text between them, without scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.words: list[str] = []
        self._hidden = False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._hidden = tag in ("script", "style")

    def handle_endtag(self, tag):
        self._hidden = False

    def handle_data(self, data):
        if not self._hidden:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def ids(self, tag: str) -> list[str]:
        return [attrs["id"] for name, attrs in self.tags if name == tag and "id" in attrs]

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def rendered(*runs) -> Elements:
    return Elements(html_page(list(runs)))


# -- real runs ----------------------------------------------------------------------------------------


def test_the_report_of_a_real_run(a_run, tmp_path, capsys):
    folder = shutil.copytree(a_run, tmp_path / "run")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert main([str(folder)]) == 0
    assert capsys.readouterr().out.split() == [str(folder / "report.html"), str(folder / "report.md")]
    html, md = ((folder / name).read_text() for name in ("report.html", "report.md"))
    shown = Elements(html)
    assert shown.ids("section") == SECTIONS
    for text in (shown.text, md):
        for words in (
            "2 layers of 32",
            "2 × CPU",
            "of 6, 100 %",
            "1 to 6",
            "2 × ZeRO 2",
            "finished",
            "step_3",
            "step_6",
            "complete: names and sizes agree",
            "latest",
            "productive",
        ):
            assert words in text, words
    loss = [row["loss"] for row in rows_of(a_run / "metrics.jsonl") if "loss" in row]
    assert number(sum(loss) / 6) in shown.text and number(loss[-1]) in shown.text
    assert "http" not in html.replace("http-equiv", "") and "Traceback" not in html
    after = {
        path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and not path.name.startswith("report")
    }
    assert after == before  # nothing else in the folder has changed
    run = analysis_of(a_run)
    assert run.state == "finished" and run.unsaved == 0 and run.launches[0].last == 6
    spent = run.budget.seconds
    assert run.budget.total == pytest.approx(run.elapsed_s) and spent["lost"] == spent["replayed"] == 0
    computing = sum(
        row["seconds_forward"] + row["seconds_backward"] + row["seconds_step"]
        for row in rows_of(a_run / "metrics.jsonl")
        if "loss" in row
    )
    assert spent["productive"] == pytest.approx(computing, rel=0.01)


def test_a_killed_run_and_its_resumption(a_run, tiny_yaml, tmp_path):
    """The folder of a real run is cut off as if it had been killed after step 5, and then the run is resumed."""
    folder = shutil.copytree(a_run, tmp_path / "run")
    shutil.rmtree(folder / "step_6")
    manifest.publish(folder, "step_3")
    run = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(run | {"status": "running", "reason": None, "updated": 1.8e9}))
    rows = rows_of(folder / "metrics.jsonl")
    cut = next(i for i, row in enumerate(rows) if "loss" in row and row["step"] == 5) + 1
    whole = "".join(json.dumps(row | {"time": 1.8e9 + i}) + "\n" for i, row in enumerate(rows[:cut]))
    (folder / "metrics.jsonl").write_text(whole + '{"step": 6, "epoch": 0.0')
    # if this machine's clock is before 1.8e9, the row is in its future, and the run counts as running
    killed = analysis_of(folder)
    assert (
        killed.step == 5 and killed.unsaved == 2 and any("1 line(s) are torn" in note for note in killed.record.notes)
    )
    assert (killed.state == "silent") == (time.time() - 1.8e9 > 3600)

    run_cases(
        1,
        [
            Case(
                "resume",
                (
                    "--config",
                    str(tiny_yaml),
                    "--output_dir",
                    str(folder),
                    "--resume_from",
                    "auto",
                    "training.save_interval=3",
                    "training.log_interval=7",
                ),
            )
        ],
        tmp_path,
    )
    run = analysis_of(folder)
    assert run.state == "finished" and run.step == 6 and not run.record.notes
    first, second = sorted(run.launches, key=lambda launch: launch.kind == "resume")
    assert (first.first, first.last, first.lost, first.good) == (1, 5, 2, False)
    assert (second.checkpoint, second.first, second.last, second.replayed, second.ending) == (
        "step_3",
        4,
        6,
        2,
        "finished",
    )
    assert second.config_diff == {"training.log_interval": [10, 7]}
    spent, lost = run.budget.seconds, rows_of(folder / "segments/metrics_0.jsonl")
    assert spent["lost"] == pytest.approx(
        sum(row.get("seconds", 0) + row.get("seconds_eval", 0) + row.get("seconds_save", 0) for row in lost)
    )
    assert spent["replayed"] > 0
    assert second.receipt is not None and second.receipt["compared"] == 2
    shown = rendered(run).text
    assert "2 lost" in shown and "2 replayed; receipt: " in shown and "training.log_interval" in shown


# -- analysis of the rows -----------------------------------------------------------------------------


def test_each_launch_has_its_steps_and_its_ending(days):
    first, second = analysis_of(days).launches
    assert (first.kind, first.first, first.last, first.lost, first.good) == ("start", 1, 430, 30, False)
    assert "no stop event" in first.ending
    assert (second.kind, second.first, second.last, second.replayed, second.good) == ("resume", 401, 700, 30, None)
    assert second.ending == "running" and second.receipt["identical"]


def test_every_second_of_the_budget_counts_once(days):
    run = analysis_of(days)
    rows = [row for row in rows_of(days / "metrics.jsonl") if "loss" in row]
    lost = [row for row in rows_of(days / "segments/metrics_0.jsonl") if "loss" in row]
    computing = {row["step"]: row["seconds"] - row["seconds_data"] - row["seconds_other"] for row in rows}
    spent = run.budget.seconds
    assert spent["replayed"] == pytest.approx(sum(computing[step] for step in range(401, 431)))
    assert spent["productive"] == pytest.approx(sum(computing.values()) - spent["replayed"])
    assert spent["lost"] == pytest.approx(sum(r["seconds"] + r["seconds_save"] + r["seconds_eval"] for r in lost))
    assert spent["data"] == pytest.approx(7.0)  # 700 steps of 0.01 s
    # only the discarded row 401 has the stalls after step 400: they count as lost
    assert spent["save"] == pytest.approx(2.0 * 2)
    assert spent["evaluation"] == pytest.approx(20.0 * 6)  # after 100, 200, 300, 500, 600, and 700, by its event alone
    assert run.budget.total == pytest.approx(sum(launch.seconds for launch in run.launches))
    assert run.budget.between == pytest.approx(1200, abs=1)


def test_a_rollback_within_a_launch_loses_and_replays_steps(tmp_path):
    (tmp_path / "segments").mkdir()
    rows = [{"step": i, "loss": 3.0, "seconds": 1.0, "time": 1000.0 + i} for i in range(1, 61)]
    again = [{"step": i, "loss": 3.0, "seconds": 1.0, "time": 1100.0 + i} for i in range(41, 81)]
    start = {"event": "start", "step": 0, "time": 1000.0}
    spike = {
        "event": "spike",
        "step": 61,
        "spike_loss": 9.0,
        "score": 31.5,
        "samples": [480, 487],
        "action": "rollback",
        "time": 1065.0,
    }
    write_rows(tmp_path / "metrics.jsonl", [start, *rows[:40], spike, *again])
    write_rows(tmp_path / "segments/metrics_0.jsonl", rows[40:])
    run = analysis_of(tmp_path)
    (launch,) = run.launches
    assert (launch.first, launch.last, launch.lost, launch.replayed) == (1, 80, 20, 20)
    spent = run.budget.seconds
    assert (spent["productive"], spent["replayed"], spent["lost"], spent["other"]) == (60, 20, 20, 80)
    assert "31.5" in rendered(run).text and "480 to 487" in rendered(run).text


def test_time_left_includes_saves_and_evaluations(days):
    run = analysis_of(days)
    rows = [row for row in rows_of(days / "metrics.jsonl") if "loss" in row]
    pace = np.median([row["seconds"] for row in rows[-200:]])
    stalls = sum(row["seconds_save"] + row["seconds_eval"] for row in rows) / 700
    assert run.left_s == pytest.approx((100_000 - 700) * (pace + stalls))


def test_spike_scores_are_those_of_the_trainer(copy):
    random = np.random.default_rng(3)
    losses = (3 + np.exp(-np.arange(1500) / 100) + random.normal(0, 0.05, 1500)).tolist()
    losses[40] = losses[700] = losses[1300] = 9.0
    detector, wanted = SpikeDetector(), []
    for loss in losses:
        wanted.append(detector.score(loss))
        detector.add(loss)
    write_rows(copy / "metrics.jsonl", [{"step": i, "loss": loss} for i, loss in enumerate(losses, 1)])
    found = find_spikes(read(copy, "copy").steps)
    np.testing.assert_allclose(found.score, wanted, atol=1e-6)
    assert found.at.tolist() == [700, 1300] and found.share == 2 / 1500 and found.counted_here
    write_rows(copy / "metrics.jsonl", [{"step": i, "loss": 3.0, "spike_score": 8.0 * (i == 2)} for i in (1, 2, 3)])
    recorded = find_spikes(read(copy, "copy").steps)
    assert recorded.at.tolist() == [1] and not recorded.counted_here


@pytest.mark.parametrize(
    "status, silence, state",
    [
        ("running", 30, "running"),
        ("running", 7200, "silent"),
        ("finished", 7200, "finished"),
        ("stopped", 9, "stopped"),
        ("failed", 9, "failed"),
        ("strange", 9, "unknown"),
    ],
)
def test_the_state_of_a_run(copy, status, silence, state):
    rows = rows_of(copy / "metrics.jsonl")
    late = max(row["time"] for row in rows) + silence - time.time()
    write_rows(copy / "metrics.jsonl", [row | {"time": row["time"] - late} for row in rows])
    run = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(
        json.dumps(run | {"status": status, "reason": "SIGTERM" if status == "stopped" else None})
    )
    run = analysis_of(copy)
    assert run.state == state
    if state == "silent":
        assert "killed, crashed or hung" in run.state_words and run.launches[-1].good is False
        assert "100 steps are in no checkpoint: a crash costs them" in rendered(run).text


def test_states_of_checkpoints(copy):
    (copy / "step_700").mkdir()
    (copy / "step_700" / "model.safetensors.tmp").write_bytes(b"half")
    (copy / "step_400" / "model.safetensors").write_bytes(bytes(999))
    flipped = copy / "step_600" / "model.safetensors"
    flipped.write_bytes(b"\1" + flipped.read_bytes()[1:])
    (copy / "step_200" / manifest.PIN).touch()
    quick = {c.tag: c for c in analysis_of(copy).checkpoints}
    assert quick["step_700"].state.startswith("unsealed: being written") and quick["step_700"].good is None
    assert not quick["step_400"].good and "999 bytes, 1000 in the manifest" in quick["step_400"].state
    assert quick["step_600"].good and quick["step_600"].marks == ("latest",) and quick["step_600"].bytes == 1000
    assert quick["step_200"].marks == ("pinned",)
    read_whole = {c.tag: c for c in analysis_of(copy, verify=True).checkpoints}
    assert not read_whole["step_600"].good and "sha256" in read_whole["step_600"].state
    assert read_whole["step_200"].state == "verified: every byte as it was written"
    (copy / "latest").write_text("step_999\n")
    assert any("step_999, which is not there" in note for note in analysis_of(copy).checkpoint_notes)


# -- what is missing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.yaml", "ds_config.json", "env.json", "run.json", "metrics.jsonl"])
@pytest.mark.parametrize("content", [None, "", "{a: [", "[1]\xff"])
def test_a_missing_or_broken_file_is_named(copy, name, content):
    (copy / name).unlink() if content is None else (copy / name).write_text(content, encoding="latin-1")
    write([copy], copy)
    shown = Elements((copy / "report.html").read_text())
    assert shown.ids("section") == SECTIONS
    if (name, content) != ("metrics.jsonl", ""):  # an empty one is that of a run that has just begun
        assert name in " ".join(analysis_of(copy).record.notes)


def test_fields_that_no_row_has_are_named(copy):
    rows = rows_of(copy / "metrics.jsonl")
    bare = [{k: row[k] for k in ("step", "loss")} if "loss" in row else {"event": row["event"]} for row in rows]
    write_rows(copy / "metrics.jsonl", bare)
    shutil.rmtree(copy / "segments")
    write([copy], copy)
    text = Elements((copy / "report.html").read_text()).text
    for words in (
        "Not in the rows of metrics.jsonl: held-out text, indexer loss, gradient norm, learning rate, update to weights.",
        "throughput, use of the devices, memory, seconds of a step.",
        "there is no budget of time",
        "there is no heat map",
        "There is no continuation yet",
    ):
        assert words in text, words


WRONG = ("x", None, [], [None], {}, {"a": 1}, True, 1e400, -1, "nan", "Infinity", 10**400, "<b>", 0)


@pytest.mark.parametrize("share", [0.03, 0.3])
def test_fields_of_wrong_kinds_break_no_page(tmp_path, share):
    """A share of the fields of all rows and of the keys of all files gets values of a wrong type or size."""
    run = long_run(tmp_path / "run", steps=25, crash=22, back=20, sealed=(20,))
    random = np.random.default_rng(round(100 * share))

    def spoilt(value: object, always: set[str]) -> object:
        if not isinstance(value, dict):
            return value
        inner = {key: spoilt(one, always) for key, one in value.items()}
        bad = {key for key in inner if key in always or random.random() < share / 2}
        return inner | {key: WRONG[random.integers(len(WRONG))] for key in bad - {"event"}}

    rows = {path: rows_of(path) for path in (run / "metrics.jsonl", run / "segments/metrics_0.jsonl")}
    files = {
        run / name: yaml.safe_load((run / name).read_text())
        for name in ("run.json", "ds_config.json", "env.json", "config.yaml")
    }
    fields = sorted({key for all_rows in rows.values() for row in all_rows for key in row})
    for _ in range(20):
        always = {field for field in fields if random.random() < share / 2}  # these in all rows
        for path, all_rows in rows.items():
            write_rows(path, [spoilt(row, always) for row in all_rows])
        for path, content in files.items():
            path.write_text(json.dumps(spoilt(content, set())))  # JSON is YAML too
        write([run], tmp_path / "out")
        assert Elements((tmp_path / "out/report.html").read_text()).ids("section") == SECTIONS


def test_a_run_that_has_just_begun(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"status": "running", "updated": time.time()}))
    write_rows(folder / "metrics.jsonl", [{"event": "start", "step": 0, "world_size": 2, "time": time.time()}])
    text = rendered(analysis_of(folder)).text
    assert "No optimizer step is recorded yet." in text and "There is no step_N folder yet." in text


def test_a_torn_line_anywhere_costs_only_itself(copy):
    lines = (copy / "metrics.jsonl").read_text().splitlines()
    lines[20] = lines[20][:30]
    (copy / "metrics.jsonl").write_text("\n".join([*lines, "\x00\x00\x00", '{"step": 701, "lo']))
    run = analysis_of(copy)
    assert len(run.record.steps) == 699 and "2 line(s) are torn" in run.record.notes[0]


def test_losses_that_are_not_finite_are_gaps(copy):
    rows = rows_of(copy / "metrics.jsonl")
    for row in rows:
        if row.get("step") in (699, 700) and "loss" in row:
            row |= {"loss": "nan", "grad_norm": "inf"}
    write_rows(copy / "metrics.jsonl", rows)
    run = analysis_of(copy)
    assert math.isfinite(run.loss) and math.isnan(run.record.steps.of("loss")[-1])
    assert "nan" not in html_page([run]).replace("provenance", "").lower()


# -- text of a run is text ----------------------------------------------------------------------------

ATTACK = "</script><script>window.attacked=1</script><img src=x onerror=attack()>\"'&`|*"


def test_text_of_a_run_is_never_markup(copy, tmp_path):
    rows = rows_of(copy / "metrics.jsonl")
    for row in rows:
        row |= {
            key: ATTACK for key in ("prompt", "text", "name", "checkpoint", "action", "reason", "stage") if key in row
        }
    write_rows(copy / "metrics.jsonl", rows)
    for name in ("run.json", "env.json", "ds_config.json"):
        content = json.loads((copy / name).read_text())
        (copy / name).write_text(json.dumps(dict.fromkeys([*content, ATTACK], ATTACK)))
    config = yaml.safe_load((copy / "config.yaml").read_text())
    config["data"] = {"data_dir": ATTACK, ATTACK: ATTACK}
    (copy / "config.yaml").write_text(yaml.safe_dump(config))
    named = copy.rename(tmp_path / "<img src=x onerror=attack()>")
    for runs in ([analysis_of(named)], [analysis_of(named), analysis_of(named)]):
        shown = rendered(*runs)
        assert shown.count("script") == 1 and shown.count("img") == 0
        assert not any(key.startswith("on") for _, attrs in shown.tags for key in attrs)
    write([named], tmp_path / "out")
    md = (tmp_path / "out/report.md").read_text()
    outside = "".join(md.split("```")[::2])
    assert "<img" not in outside and "<script" not in outside


def test_only_markup_of_our_own_passes_the_templates():
    for name in ("page.html.j2", "page.md.j2"):
        source = (ROOT / "training/reporting" / name).read_text()
        # what would mark text as escaped although it is not, or let an attribute end at a space
        assert not re.search(r"\|\s*safe\b|Markup|autoescape (true|false)", source), name
        assert not re.search(r"=\{\{", source), name
    with pytest.raises(UndefinedError):
        html_page([object()])


def test_the_style_sheet_has_every_colour():
    css = (ROOT / "training/reporting/report.css").read_text()
    assert set(re.findall(r"\.c(\d)\{", css)) == {str(i) for i in range(PALETTE)}
    assert all(css.count(f"--c{i}:#") == 2 for i in range(PALETTE))  # light and dark


def test_markdown_text_stays_in_its_cell_and_readable():
    assert escape("a|b\n<b> *x* `c`") == r"a\|b &lt;b&gt; \*x\* \`c\`"
    assert escape("training.max_steps") == "training.max_steps"
    assert escape("# not a heading") == r"\# not a heading"


# -- charts -------------------------------------------------------------------------------------------


def test_one_odd_step_of_a_million_is_still_visible():
    x, y = np.arange(1.0, 1e6 + 1), np.ones(1_000_000)
    y[123_456] = 50.0
    xs, least, mean, greatest = thin(x, y, INTERVALS)
    assert len(xs) == len(mean) == INTERVALS and greatest.max() == 50.0 and least.min() == 1.0
    assert (least <= mean).all() and (mean <= greatest).all() and (np.diff(xs) > 0).all()
    assert mean.mean() == pytest.approx(y.mean(), rel=1e-3)
    odd = int(np.argmax(greatest))
    assert abs(xs[odd] - 123_457) < 1e6 / INTERVALS


def test_few_points_stay_as_they_are_and_gaps_are_left_out():
    y = np.array([3.0, np.nan, 1.0])
    x, least, mean, greatest = thin(np.array([1.0, 2, 5]), y, INTERVALS)
    assert x.tolist() == [1, 5] and least.tolist() == mean.tolist() == greatest.tolist() == [3, 1]


@pytest.mark.parametrize(
    "axis, ticks",
    [
        (Axis(0, 12_345), ["0", "2k", "4k", "6k", "8k", "10k", "12k"]),
        (Axis(2.93, 3.21), ["2.95", "3", "3.05", "3.1", "3.15", "3.2"]),
        (Axis(0, 3.1e-4), ["0", "0.5e-4", "1e-4", "1.5e-4", "2e-4", "2.5e-4", "3e-4"]),
        (Axis(0.004, 1.3, log=True), ["0.01", "0.03", "0.1", "0.3", "1"]),
        (Axis(2.7, 11.5, log=True), ["3", "4", "5", "7", "10"]),
        (Axis(0, 1.05e10), ["0", "2B", "4B", "6B", "8B", "10B"]),
    ],
)
def test_ticks_are_round_and_few(axis, ticks):
    assert [text for _, text in axis.ticks()] == ticks


def test_heat_maps_average_over_steps_and_leave_layers_without_a_value_empty():
    rows = [[float(step), math.nan, 1.0] for step in range(1000)]
    values, first, last = heat_bins(range(0, 20_000, 20), rows)
    assert values.shape == (3, 120) and np.isnan(values[1]).all() and (values[2] == 1).all()
    assert values[0].mean() == pytest.approx(499.5, rel=0.01) and (first, last) == (-10, 19_990)


def test_numbers_read_well():
    assert [number(v) for v in (0.0, 3.14159, 1234567.8, 3e-4, math.nan, None)] == [
        "0",
        "3.142",
        "1,234,568",
        "3e-4",
        "–",
        "–",
    ]
    assert [compact(v) for v in (999, 999_999, 12_500, 2.1e9)] == ["999", "1M", "12.5k", "2.1B"]
    assert [percent(v) for v in (0, 1e-5, 0.0213, 0.42, 1)] == ["0 %", "< 0.1 %", "2.1 %", "42 %", "100 %"]
    assert [duration(v) for v in (0.42, 59.99, 3725, 200_000)] == ["0.42 s", "1m 00s", "1h 02m", "2d 8h"]


# -- several runs -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ablation(tmp_path_factory) -> list[Path]:
    parent = tmp_path_factory.mktemp("ablation")
    cases = {"dense gates": [], "k256": ["model.k_base=256"], "no gates": ["model.value_gate=false"]}
    return [
        long_run(parent / name, steps=300, crash=999, seed=i, overrides=overrides, status="finished")
        for i, (name, overrides) in enumerate(cases.items())
    ]


def test_several_runs_side_by_side(ablation, tmp_path):
    write(ablation, tmp_path)
    html = (tmp_path / "report.html").read_text()
    shown = Elements(html)
    assert shown.ids("section") == SECTIONS and "3 runs side by side" in shown.text
    runs = [analysis_of(folder) for folder in ablation]
    for run in runs:
        assert number(run.loss) in shown.text and number(run.bpb) in shown.text
    keys = html[html.index("Settings that differ") : html.index("<nav")]
    assert "model.k_base" in keys and "model.value_gate" in keys and "model.d_model" not in keys
    loss = next(figure for figure in html.split("<figure")[1:] if "<h3>Loss " in figure)
    assert loss.count('class="line') == 3 and all(name in loss for name in ("dense gates", "k256", "no gates"))
    assert html.count("<h3>Coverage, ") == 3  # a heat map for each
    md = (tmp_path / "report.md").read_text()
    assert "| loss, last 100 steps (nats/token) |" in md and "| model.k_base | 512 | 256 | 512 |" in md


def test_a_run_without_a_finite_loss_is_named_beside_the_chart_of_the_others(ablation, tmp_path):
    dead = shutil.copytree(ablation[1], tmp_path / "dead")
    rows = rows_of(dead / "metrics.jsonl")
    write_rows(dead / "metrics.jsonl", [row | {"loss": "NaN", "lr": None} if "loss" in row else row for row in rows])
    html = html_page([analysis_of(ablation[0]), analysis_of(dead)])
    for title in ("Loss", "Learning rate"):
        figure = next(figure for figure in html.split("<figure")[1:] if f"<h3>{title}" in figure)
        assert "Without a finite value: dead." in figure and figure.count('class="line') == 1, title
    assert html.count("Without a finite value") == 2  # every other chart has both
    assert "Without a finite value" not in html_page([analysis_of(ablation[0])])


def test_runs_with_other_batches_are_compared_over_tokens(ablation, tmp_path):
    other = shutil.copytree(ablation[0], tmp_path / "half")
    rows = rows_of(other / "metrics.jsonl")
    write_rows(other / "metrics.jsonl", [row | {"tokens": row["tokens"] / 2} if "loss" in row else row for row in rows])
    html = html_page([analysis_of(ablation[0]), analysis_of(other)])
    assert "Over tokens" in html and "&quot;unit&quot;:&quot;tokens&quot;" in html
    assert "&quot;unit&quot;:&quot;tokens&quot;" not in html_page([analysis_of(folder) for folder in ablation])


def test_labels_differ():
    assert labels([Path("/a/x"), Path("/a/y/")]) == ["x", "y"]
    assert labels([Path("/a/x/run"), Path("/a/y/run")]) == ["x/run", "y/run"]


# -- the command --------------------------------------------------------------------------------------


def test_the_command_refuses_in_a_sentence(days, ablation, tmp_path, capsys):
    assert run_command(main, [str(tmp_path / "nothing")]) == 3
    assert "is no folder; give the --output_dir of one" in capsys.readouterr().err
    assert run_command(main, [str(days.parent)]) == 3
    assert (
        f"holds no run; give the --output_dir of one, such as outputs/quickstart; runs in it: {days}"
        in capsys.readouterr().err
    )
    assert run_command(main, [str(days), str(ablation[0])]) == 2
    assert "several runs need --out FOLDER" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert run_command(main, [str(days), "--out", str(tmp_path / "file")]) == 2
    assert "give another folder with --out" in capsys.readouterr().err
    with pytest.raises(NoRunError):
        read(tmp_path, "x")


def test_the_command_in_a_process_of_its_own(days, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "training.report", str(days), "--out", str(tmp_path), "--verify"],
        cwd=ROOT,
        env=rank_environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "verified: every byte" in (tmp_path / "report.md").read_text()


# -- in a browser -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    found = headless.find_chromium()
    if found is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(headless.HOW_TO_INSTALL)
    with headless.Page(found, tmp_path_factory.mktemp("profile")) as shown:
        yield shown


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 390])
def test_the_page_in_a_browser(browser, days, tmp_path, width, scheme):
    write([days], tmp_path)
    browser.show(tmp_path / "report.html", width=width, scheme=scheme)
    assert browser.complaints == []
    assert all(
        url.startswith("file:") and url.endswith("report.html") or url.startswith("data:") for url in browser.requests
    )
    assert browser.evaluate("document.documentElement.scrollWidth") == width and headless.too_wide(browser, width) == []
    browser.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.evaluate("document.documentElement.scrollWidth") == width and headless.too_wide(browser, width) == []
    charts = browser.evaluate("""[...document.querySelectorAll("figure")].map(f => ({title: f.querySelector("h3").textContent,
        spoken: f.querySelector("svg").getAttribute("aria-label"), width: f.querySelector("svg").clientWidth,
        height: f.querySelector("svg").clientHeight}))""")
    titles = [chart["title"].split("\n")[0] for chart in charts]
    for title in (
        "Loss nats/token",
        "Held-out text bits/byte",
        "Indexer loss nats/row",
        "Gradient norm",
        "Learning rate",
        "Throughput tokens/s",
        "Use of the devices %",
        "Memory GiB",
        "Coverage %",
        "Recall %",
        "Saturated value gates %",
        "Saturated output gates %",
        "First token %",
    ):
        assert title in titles, title
    assert all(chart["spoken"] and chart["width"] > 200 and chart["height"] > 100 for chart in charts)
    assert browser.evaluate("document.querySelectorAll('.dots').length") == 1  # the spike at step 250
    smallest = browser.evaluate("""Math.min(...[...document.querySelectorAll("main *")].filter(e => e.children.length == 0
        && e.textContent.trim() && e.getClientRects().length && !e.closest("svg")).map(
        e => parseFloat(getComputedStyle(e).fontSize)))""")
    assert smallest >= 11
    paper = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(19, 21, 24)")
    shot = tmp_path / f"report_{width}_{scheme}.png"
    browser.screenshot(shot)
    assert shot.read_bytes().startswith(b"\x89PNG") and shot.stat().st_size > 50_000


def test_text_and_curves_have_enough_contrast_in_both_schemes(browser, days, tmp_path):
    """A contrast of at least 4.5 to 1 for text, as WCAG asks, and of 2.7 to 1 for the curves."""
    write([days], tmp_path)
    for scheme in ("light", "dark"):
        browser.show(tmp_path / "report.html", width=1200, scheme=scheme)
        paper, *colours = browser.evaluate("""["--paper", "--ink", "--soft", "--good", "--bad", "--c0"].map(
            name => getComputedStyle(document.documentElement).getPropertyValue(name).trim())""")
        for colour in colours:
            assert contrast(colour, paper) >= 4.5, (scheme, colour)
        curves = browser.evaluate("""[0, 1, 2, 3].map(
            i => getComputedStyle(document.documentElement).getPropertyValue("--c" + i).trim())""")
        assert all(contrast(colour, paper) >= 2.7 for colour in curves), scheme


def contrast(one: str, other: str) -> float:
    def luminance(colour: str) -> float:
        digits = colour.lstrip("#")
        digits = "".join(2 * c for c in digits) if len(digits) == 3 else digits
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted([luminance(one), luminance(other)])
    return (light + 0.05) / (dark + 0.05)


def test_the_legend_shows_the_values_under_the_pointer(browser, days, tmp_path):
    write([days], tmp_path)
    browser.show(tmp_path / "report.html", width=1200)
    box = browser.evaluate("""(() => { const p = document.querySelector(".wide .plot");
        p.scrollIntoView({block: "center", behavior: "instant"}); const b = p.getBoundingClientRect();
        return {x: b.left, y: b.top + b.height / 2, width: b.width}; })()""")
    before = browser.evaluate("document.querySelector('.wide output').textContent")
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=box["x"] + 1, y=box["y"])
    at = browser.evaluate(
        "[document.querySelector('.wide output').textContent, document.querySelector('.rule b').textContent]"
    )
    first = next(row["loss"] for row in rows_of(days / "metrics.jsonl") if "loss" in row)
    assert at[1].startswith("step ") and abs(float(at[0]) - first) < 0.5 and at[0] != before
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=2, y=2)
    assert browser.evaluate("document.querySelector('.wide output').textContent") == before
    assert browser.complaints == []


def test_no_script_in_a_runs_text_is_executed(browser, copy, tmp_path):
    rows = rows_of(copy / "metrics.jsonl")
    write_rows(copy / "metrics.jsonl", [row | ({"prompt": ATTACK} if "prompt" in row else {}) for row in rows])
    write([copy], tmp_path / "out")
    browser.show(tmp_path / "out/report.html", width=1200)
    assert browser.evaluate("window.attacked") is None and browser.complaints == []
    # and if one ever got into the page, the page's policy would stop it
    html = (tmp_path / "out/report.html").read_text()
    (tmp_path / "out/open.html").write_text(html.replace("</header>", "<script>window.attacked=1</script></header>"))
    browser.show(tmp_path / "out/open.html", width=1200)
    assert browser.evaluate("window.attacked") is None and "Content Security Policy" in browser.complaints[0]


def test_several_runs_in_a_browser(browser, ablation, tmp_path):
    write(ablation, tmp_path)
    for width in (1200, 390):
        browser.show(tmp_path / "report.html", width=width, scheme="dark")
        assert browser.complaints == [] and headless.too_wide(browser, width) == []
        assert browser.evaluate("document.documentElement.scrollWidth") == width
        browser.screenshot(tmp_path / f"several_{width}.png")
