"""The same run on 1, 2 and 4 ranks and at every ZeRO stage; resume; divergence; overfitting.

One launch per number of ranks runs all cases with real engines; the tests read what these wrote.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import yaml
from support.launching import ROOT, Case, run_cases
from support.tiny_dataset import write_dataset

from gsa.generation import load_model
from gsa.weights import load_weights, save_weights
from training.config import RunSpec, load_config, plan_batch
from training.data.dataset import PackedTokens
from training.engine.world import World
from training.observe.telemetry import Telemetry
from training.record.metric_schema import EVENTS, PROBE_METRICS, STEP_METRICS, TIME_METRICS
from training.record.metrics_log import read_rows

STAGES = ("zero0", "zero1", "zero2", "zero3")
POISONED = 30
"""A token that some windows hold and others do not."""
ATTENTION = {"dense": "training.indexer_warmup_steps=100", "sparse": "training.indexer_warmup_steps=0"}


def rows_of(folder: Path) -> list[dict]:
    return [row for row in read_rows(folder / "metrics.jsonl") if "loss" in row]


def events_of(folder: Path, kind: str) -> list[dict]:
    return [row for row in read_rows(folder / "metrics.jsonl") if row.get("event") == kind]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_yaml):
    """Folder of all runs: <ranks>/<case>/; and what each launch printed: <ranks>/output.txt."""
    base = tmp_path_factory.mktemp("runs")
    four_windows = base / "four_windows"
    random = np.random.Generator(np.random.PCG64(3))
    texts = [random.integers(1, 60, 31).tolist() for _ in range(4)]
    write_dataset(four_windows, texts, vocab_size=64, held_out=texts)

    for ranks in (1, 2, 4):
        folder = base / str(ranks)

        def case(name, *extra, stage="zero2", code=0, folder=folder, into=None):
            argv = (
                "--config",
                str(tiny_yaml),
                "--output_dir",
                str(folder / (into or name)),
                "--deepspeed_config",
                str(ROOT / "ds_configs" / f"{stage}.json"),
                *extra,
            )
            return Case(name, argv, code)

        cases = [
            case(f"{stage}_{attention}", key, stage=stage)
            for stage in STAGES
            for attention, key in ATTENTION.items()
            if ranks < 4 or attention == "dense" or stage == "zero2"
        ]
        if ranks == 1:
            cases += [
                case(
                    "diverged",
                    "training.learning_rate=1e30",
                    "training.grad_clip=0",
                    "training.save_interval=1",
                    code=4,
                ),
                case(
                    "overfit",
                    f"data.data_dir={four_windows}",
                    "training.max_steps=150",
                    "training.global_batch_size=4",
                    "training.learning_rate=1e-2",
                    "training.eval_interval=0",
                    "training.weight_decay=0",
                ),
                case("init_from", f"training.init_from={folder / 'zero2_sparse' / 'step_6'}", "training.max_steps=1"),
                case("nothing_to_do", "--resume_from", "step_6", into="zero2_sparse"),
            ]
            cases += [case("untied", "model.tie_embeddings=false", "training.max_steps=1")]
            cases += [case("compiled", ATTENTION["dense"], "training.compile=true")]
        if ranks == 2:
            poisoned, broken = base / "poisoned_weights", base / "broken_weights"
            for path, tokens in ((poisoned, POISONED), (broken, slice(None))):
                config, weights = load_weights(base / "1" / "untied" / "step_1")
                weights["embed.weight"][tokens] = float("nan")
                save_weights(weights, {"model": config}, path)
            cases += [
                case(
                    "poisoned",
                    "model.tie_embeddings=false",
                    "training.micro_batch_size=1",
                    f"training.init_from={poisoned}",
                    code=4,
                ),
                case(
                    "lost",
                    "model.tie_embeddings=false",
                    "training.micro_batch_size=1",
                    "training.on_spike=skip",
                    "training.global_batch_size=2",
                    "training.max_steps=30",
                    "training.eval_interval=0",
                    "training.save_interval=1",
                    "training.keep_last=null",
                    f"training.init_from={poisoned}",
                ),
            ]
            hopeless = (
                "model.tie_embeddings=false",
                "training.max_steps=40",
                "training.on_spike=skip",
                "training.eval_interval=0",
                f"training.init_from={broken}",
            )
            cases += [
                case("hopeless_a", *hopeless, "training.stop_at_step=4", into="hopeless"),
                case("hopeless_b", *hopeless, "--resume_from", "step_4", code=4, into="hopeless"),
            ]
            for stage in ("zero1", "zero2", "zero3"):
                half = ("training.stop_at_step=3", "training.precision=bf16", "training.indexer_warmup_steps=2")
                cases += [
                    case(f"{stage}_straight", *half[1:], stage=stage),
                    case(f"{stage}_halves_a", *half, stage=stage, into=f"{stage}_halves"),
                    case(
                        f"{stage}_halves_b", *half[1:], "--resume_from", "step_3", stage=stage, into=f"{stage}_halves"
                    ),
                ]
            cases += [
                case("zero2_offload", ATTENTION["dense"], stage="zero2_offload"),
                case("zero3_offload", ATTENTION["dense"], stage="zero3_offload"),
                case("recomputed", ATTENTION["sparse"], "training.gradient_checkpointing=true"),
                *(
                    case(
                        f"recomputed_ffn_{stage}",
                        ATTENTION["sparse"],
                        "training.gradient_checkpointing=true",
                        "training.checkpointing_scope=ffn",
                        stage=stage,
                    )
                    for stage in ("zero2", "zero3")
                ),
                case("workers", ATTENTION["sparse"], "data.num_workers=3"),
                case("inline", ATTENTION["sparse"], "data.num_workers=0"),
                case("micro_1", ATTENTION["dense"], "training.micro_batch_size=1"),
            ]
        output = run_cases(ranks, cases, folder)
        (folder / "output.txt").write_text(output)
    return base


def spread(a: list[dict], b: list[dict], key: str) -> float:
    assert len(a) == len(b) == 6
    return max(abs(x[key] - y[key]) / abs(y[key]) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("stage", STAGES)
def test_in_the_dense_stage_every_step_is_the_same_on_any_ranks_and_zero_stage(runs, ranks, stage):
    reference, rows = rows_of(runs / "1" / "zero0_dense"), rows_of(runs / str(ranks) / f"{stage}_dense")
    for key in ("loss", "indexer_loss", "grad_norm"):
        assert spread(rows, reference, key) < 1e-5, key
    assert [r["samples"] for r in rows] == [8 * (i + 1) for i in range(6)]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_in_the_sparse_stage_the_loss_is_the_same_on_any_ranks_and_zero_stage(runs, ranks):
    """Rounding noise may flip a key near the threshold (docs/gsa.md, identity 9). Measured: 6e-8, no flip in these runs."""
    reference = rows_of(runs / "1" / "zero0_sparse")
    for stage in STAGES:
        folder = runs / str(ranks) / f"{stage}_sparse"
        if folder.exists():
            assert spread(rows_of(folder), reference, "loss") < 1e-5, stage
    assert (runs / str(ranks) / "zero2_sparse").exists()


def test_the_sparse_stage_is_sparse(runs):
    dense, sparse = (rows_of(runs / "1" / f"zero2_{stage}") for stage in ATTENTION)
    assert {row["stage"] for row in dense} == {"dense"} and {row["stage"] for row in sparse} == {"sparse"}
    assert all(row["selected_k"] <= 9 for row in sparse)
    assert abs(dense[0]["loss"] - sparse[0]["loss"]) > 1e-4


@pytest.mark.parametrize("case", ["zero2_offload", "zero3_offload", "micro_1"])
def test_offload_and_accumulation_change_nothing(runs, case):
    assert spread(rows_of(runs / "2" / case), rows_of(runs / "1" / "zero0_dense"), "loss") < 1e-5


@pytest.mark.parametrize(
    "case, plain",
    [
        ("recomputed", "zero2_sparse"),
        ("recomputed_ffn_zero2", "zero2_sparse"),
        ("recomputed_ffn_zero3", "zero3_sparse"),
        ("workers", "zero2_sparse"),
        ("inline", "zero2_sparse"),
    ],
)
def test_recomputation_and_loader_workers_change_no_bit(runs, case, plain):
    assert [timeless(r) for r in rows_of(runs / "2" / case)] == [timeless(r) for r in rows_of(runs / "2" / plain)]


def test_compiled_parts_change_rounding_only(runs):
    compiled, plain = rows_of(runs / "1" / "compiled"), rows_of(runs / "1" / "zero2_dense")
    for key in ("loss", "indexer_loss", "grad_norm"):
        assert spread(compiled, plain, key) < 1e-5, key


def test_every_run_records_its_device_its_prediction_and_what_was_measured(runs):
    folder = runs / "2" / "zero2_sparse"
    (device,), (predicted,) = events_of(folder, "device"), events_of(folder, "predicted")
    assert device["world_size"] == 2 and device["peak_tflops"] > 0 and device["peak_source"] == "measured"
    assert predicted["step"] == 3 and predicted["memory_gib"] > 0
    assert predicted["measured_gib"] >= 0  # this model is smaller than the memory of freed pages: see the next test
    for row in rows_of(folder):
        parts = [row[f"seconds_{name}"] for name in ("data", "forward", "backward", "step", "other")]
        assert sum(parts) == pytest.approx(row["seconds"], rel=1e-6)
        assert row["tokens_per_s_per_device"] == pytest.approx(row["tokens_per_s"] / 2)
        assert 0 < row["mfu"] < 1
        assert 1 <= row["selected_k"] <= row["visible_k"] <= 16.5
    later = rows_of(folder)[1:]
    assert all(row["rank_seconds_slowest"] >= row["rank_seconds_median"] > 0 for row in later)
    evaluated = [row["step"] for row in rows_of(folder) if row["seconds_eval"] > 0]
    assert evaluated == [4]  # after step 3


def test_measured_memory_is_the_growth_since_the_start_of_the_run(tiny_yaml):
    cfg = load_config(tiny_yaml, [])
    telemetry = Telemetry(RunSpec(cfg, plan_batch(cfg.training, 1), {}), World(0, 1, 0, 1, torch.device("cpu")))
    assert telemetry.run_bytes() >= 0
    free = telemetry.peak_bytes() - psutil.Process().memory_info().rss  # the peak of earlier tests in this process
    held = torch.ones(max(0, free) + 512 * 2**20, dtype=torch.uint8)
    assert telemetry.run_bytes() == pytest.approx(held.numel(), abs=64 * 2**20)


def timeless(row: dict) -> dict:
    return {key: value for key, value in row.items() if key not in TIME_METRICS}


@pytest.mark.parametrize("stage", ["zero1", "zero2", "zero3"])
def test_a_resumed_run_equals_the_uninterrupted_run(runs, stage):
    """bf16, two ranks, across the indexer's dense-to-sparse boundary: every number of every row is the same."""
    straight, halves = rows_of(runs / "2" / f"{stage}_straight"), rows_of(runs / "2" / f"{stage}_halves")
    assert [row["step"] for row in halves] == [1, 2, 3, 4, 5, 6]
    assert [timeless(row) for row in halves] == [timeless(row) for row in straight]
    assert [row["stage"] for row in halves] == ["dense"] * 2 + ["sparse"] * 4
    evals = [
        [(e["step"], e["eval_loss"]) for e in events_of(runs / "2" / f"{stage}_{n}", "eval")]
        for n in ("straight", "halves")
    ]
    assert evals[0] == evals[1]
    assert [e["reason"] for e in events_of(runs / "2" / f"{stage}_halves", "stop")] == ["stop_at_step", "finished"]


def test_golden_first_steps(runs):
    """A change of data order, initialisation, layer or optimizer shows here first."""
    rows = rows_of(runs / "1" / "zero2_sparse")[:3]
    assert [row["loss"] for row in rows] == pytest.approx(GOLDEN_LOSS, rel=2e-5)
    assert [row["grad_norm"] for row in rows] == pytest.approx(GOLDEN_NORM, rel=2e-4)
    assert [row["indexer_loss"] for row in rows] == pytest.approx(GOLDEN_INDEXER, rel=2e-4)


GOLDEN_LOSS = [4.820311427, 4.753742933, 4.343747139]
GOLDEN_NORM = [2.481747150, 2.428875208, 2.211919546]
GOLDEN_INDEXER = [0.136967085, 0.171767734, 0.165773317]


def test_four_windows_are_memorised(runs):
    rows = rows_of(runs / "1" / "overfit")
    assert rows[-1]["loss"] < 0.05
    assert rows[0]["loss"] > 3.0


def test_a_run_that_will_repeat_its_data_many_times_warns(runs):
    assert "planned for 150.0 passes" in (runs / "1" / "output.txt").read_text()


def test_divergence_names_step_and_samples_and_the_last_checkpoint_stays(runs):
    folder, output = runs / "1" / "diverged", (runs / "1" / "output.txt").read_text()
    bad = rows_of(folder)[-1]["step"]  # its row was written, for training.replay
    assert rows_of(folder)[-1]["grad_norm"] == "inf" and bad == len(rows_of(folder))
    assert f"error: step {bad}: loss " in output
    assert "the gradient of samples 8..15 is not finite" in output and "Nothing was saved after it" in output
    assert json.loads((folder / "run.json").read_text())["status"] == "failed"
    tags = sorted(path.name for path in folder.glob("step_*"))
    assert tags == [f"step_{n}" for n in range(1, bad)]
    assert (folder / "latest").read_text().strip() == f"step_{bad - 1}"


def test_a_loss_that_is_not_finite_is_traced_to_ranks_and_samples(runs):
    """One row of the embedding is NaN: exactly the micro-batches with this token must be named."""
    output = (runs / "2" / "output.txt").read_text()
    message = output[output.index("error: step 1: loss nan") :].partition("Nothing was saved")[0]
    named = {(int(rank), int(first)) for rank, first in re.findall(r"rank (\d), samples (\d+)\.\.", message)}
    data = PackedTokens({str(corpus_of(runs)): 1.0}, split="train", max_seq_len=32, seed=7)
    guilty = {(first % 2, first) for first in range(8) if (data.batch(np.array([first])).tokens == POISONED).any()}
    assert named == guilty and 0 < len(guilty) < 8
    assert not list((runs / "2" / "poisoned").glob("step_*"))


def test_steps_without_a_finite_loss_can_be_skipped_and_do_not_change_the_weights(runs):
    data = PackedTokens({str(corpus_of(runs)): 1.0}, split="train", max_seq_len=32, seed=7)
    folder = runs / "2" / "lost"
    rows = rows_of(folder)
    guilty = {
        row["step"]
        for row in rows
        if (data.batch(np.arange(row["samples"] - 2, row["samples"])).tokens == POISONED).any()
    }
    assert {row["step"] for row in rows if row["loss"] == "nan"} == guilty and 3 < len(guilty) < 28 and len(rows) == 30
    events = events_of(folder, "spike")
    assert {e["step"] for e in events} == guilty and {(e["action"], e["spike_loss"]) for e in events} == {
        ("skip", "nan")
    }
    # a step without a finite loss saves no checkpoint; the last step saves one all the same
    saved = {int(path.name.removeprefix("step_")) for path in folder.glob("step_*")}
    assert saved == set(range(1, 31)) - guilty | {30}
    _, weights = load_weights(folder / "step_30")
    for name, weight in weights.items():
        broken = ~torch.isfinite(weight)
        assert broken[POISONED].all() and broken.sum() == 32 if name == "embed.weight" else not broken.any(), name


def test_ten_consecutive_steps_without_a_finite_loss_end_a_run_that_skips(runs):
    """They are counted across a stop and a resume."""
    folder = runs / "2" / "hopeless"
    assert [(row["step"], row["loss"]) for row in rows_of(folder)] == [(step, "nan") for step in range(1, 11)]
    assert events_of(folder, "error")[0]["reason"].startswith("step 10: loss nan")


def test_bits_per_byte_equal_a_computation_by_hand_from_the_checkpoint(runs):
    folder = runs / "2" / "zero2_sparse"
    evaluation = events_of(folder, "eval")[-1]
    data = PackedTokens({str(corpus_of(runs)): 1.0}, split="held_out", max_seq_len=32, seed=0)
    assert data.n_windows > 6  # training.eval_windows
    batch = data.batch(np.arange(6))
    model = load_model(folder / "step_6")
    with torch.no_grad():
        logits = model(batch.tokens, doc_start=batch.doc_start).logits.double()
    nats = tokens = n_bytes = 0
    for row, targets in zip(logits, batch.targets, strict=True):
        for at, target in enumerate(targets.tolist()):
            if target >= 0:
                nats -= torch.log_softmax(row[at], -1)[target].item()
                tokens += 1
                n_bytes += 0 if target == 63 else len(f"w{target}")  # 63 ends a document, and has no text
    assert evaluation["eval_tokens"] == tokens
    assert evaluation["eval_loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert evaluation["eval_bpb"] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-5)


def test_every_event_is_in_the_schema(runs):
    events = [
        row
        for folder in sorted((runs / "2").iterdir())
        if folder.is_dir()
        for row in read_rows(folder / "metrics.jsonl")
        if "event" in row
    ]
    assert {row["event"] for row in events} >= {
        "start",
        "resume",
        "device",
        "predicted",
        "eval",
        "save",
        "stop",
        "spike",
    }
    for row in events:
        assert row.keys() - {"event", "step", "time"} <= EVENTS[row["event"]].fields.keys(), row


def corpus_of(runs: Path) -> Path:
    return Path(yaml.safe_load((runs / "2" / "poisoned" / "config.yaml").read_text())["data"]["data_dir"])


def test_a_new_run_starts_from_the_weights_of_a_checkpoint(runs):
    fresh, warm = rows_of(runs / "1" / "zero2_sparse"), rows_of(runs / "1" / "init_from")
    assert (warm[0]["step"], warm[0]["samples"]) == (1, 8)
    assert warm[0]["loss"] < fresh[0]["loss"] - 0.1


def test_resuming_a_finished_run_trains_nothing_and_changes_nothing(runs):
    folder = runs / "1" / "zero2_sparse"
    assert len(rows_of(folder)) == 6
    assert [e["reason"] for e in events_of(folder, "stop")] == ["finished", "finished"]


def test_rows_have_the_fields_of_the_schema(runs):
    known = whole = 0.0
    for row in rows_of(runs / "2" / "zero2_sparse"):
        probed = set(PROBE_METRICS) if row["step"] % 3 == 0 else set()
        assert set(STEP_METRICS) | probed == set(row)
        assert all(0 <= row[name] <= 1 for name in probed - {"layers"})
        if probed:
            layers = row["layers"]
            assert {len(values) for values in layers.values()} == {2}
            assert row["indexer/coverage"] == pytest.approx(sum(layers["coverage"]) / 2)
            assert row["indexer/coverage_worst"] == pytest.approx(min(layers["coverage"]))
            assert row["indexer/coverage_worst"] <= row["indexer/coverage"] <= row["indexer/oracle"]
        parts = sum(row[f"seconds_{part}"] for part in ("data", "forward", "backward", "step"))
        assert parts <= row["seconds"]
        known, whole = known + parts, whole + row["seconds"]
    assert known > 0.5 * whole
    assert [r["epoch"] for r in rows_of(runs / "1" / "overfit")][:3] == [1.0, 2.0, 3.0]
    assert all("loss" not in row for row in read_rows(runs / "2" / "zero2_sparse" / "metrics.jsonl") if "event" in row)


def test_evaluation_is_the_same_on_any_number_of_ranks(runs):
    scores = [events_of(runs / str(n) / "zero2_dense", "eval") for n in (1, 2, 4)]
    assert [[e["step"] for e in s] for s in scores] == [[3, 6]] * 3
    for key in ("eval_loss", "eval_bpb", "eval_loss_dense", "unigram_bpb"):
        for other in scores[1:]:
            assert [e[key] for e in other] == pytest.approx([e[key] for e in scores[0]], rel=1e-5)
    first = scores[0][0]
    assert first["eval_loss"] != first["eval_loss_dense"] and math.isfinite(first["eval_bpb"])


def test_the_run_folder_has_all_its_files(runs):
    folder = runs / "2" / "zero2_sparse"
    for name in ("config.yaml", "ds_config.json", "env.json", "run.json", "metrics.jsonl", "latest"):
        assert (folder / name).stat().st_size > 0, name
    assert "auto" not in json.loads((folder / "ds_config.json").read_text()).values()
    assert json.loads((folder / "run.json").read_text())["status"] == "finished"
    step = folder / "step_6"
    assert {"manifest.json", "model.safetensors", "config.json"} <= {path.name for path in step.iterdir()}
    assert not list(folder.glob("*.tmp")) and not (folder / "zero_to_fp32.py").exists()
