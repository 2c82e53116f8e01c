"""A resumed run equals one that never stopped, in every row and byte, at any stage and precision; and after a resize.

For each number of ranks, one launch trains every cell (a ZeRO stage and a precision) once without a stop and once to
step 2; a second launch resumes the stopped ones. After the resume, each cell passes the end of an epoch and of the
indexer's dense stage, with loader threads and, except on four ranks, accumulation. Activation checkpointing is on in
the bf16 cells and at ZeRO 0, off in the others.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import TINY_YAML, documents
from support.launching import ROOT, Case, run_cases
from support.tiny_dataset import write_dataset

from gsa.checkpoint import manifest
from gsa.checkpoint.full_state import read_full_state, read_layout
from training.record.metric_schema import TIME_METRICS
from training.record.metrics_log import read_rows

CELLS = [("zero0", "fp32")] + [(f"zero{z}", p) for z in (1, 2, 3) for p in ("bf16", "fp32")]
RESUME = ("path", "step_2", "latest", "auto")
RANKS = (4, 2, 1)
LAYERS = {4: 1, 2: 2, 1: 2}  # a ZeRO 3 step of four ranks takes seconds on two cores
SAME_RANKS = {"down": (3, 2), "up": (2, 3)}
"""name -> (ZeRO stage before, after): resumed in bf16 on two ranks without training a step."""
CHAINS = {"same": (2, 2, 2, 2), "up": (1, 2, 3, 3), "down": (3, 3, 1, 1), "across": (2, 3, 0, 2)}
"""name -> ZeRO stages on 4 ranks, then on 2, on 1 and on 4 again. Each link of a chain trains one step."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder that holds every run, under its number of ranks and its name, and the chains under chain/."""
    base = tmp_path_factory.mktemp("runs")
    write_dataset(base / "text", documents(32, seed=1), vocab_size=64, held_out=documents(8, seed=2))
    (base / "run.yaml").write_text(TINY_YAML.format(data=base / "text"))

    def case(ranks, name, stage, *extra, into=None):
        return Case(
            name,
            (
                "--config",
                str(base / "run.yaml"),
                "--output_dir",
                str(base / str(ranks) / (into or name)),
                "--deepspeed_config",
                str(ROOT / "ds_configs" / f"{stage}.json"),
                "data.num_workers=2",
                "training.max_steps=5",
                f"training.micro_batch_size={4 if ranks == 1 else 2}",
                "training.indexer_warmup_steps=3",
                f"model.n_layers={LAYERS[ranks]}",
                "training.eval_interval=0",
                "training.eval_windows=1",
                *extra,
            ),
        )

    chained = base / "chain"
    for launch in ("first", "second"):
        for ranks in RANKS:
            cases = []
            for number, (stage, precision) in enumerate(CELLS):
                name, recomputed = f"{stage}_{precision}", str(stage == "zero0" or precision == "bf16").lower()
                kind = (f"training.precision={precision}", f"training.gradient_checkpointing={recomputed}")
                if launch == "first":
                    cases += [
                        case(ranks, f"{name}_straight", stage, *kind),
                        case(ranks, f"{name}_halves", stage, *kind, "training.stop_at_step=2"),
                    ]
                else:
                    how = RESUME[number % len(RESUME)]
                    given = str(base / str(ranks) / f"{name}_halves" / "step_2") if how == "path" else how
                    cases += [case(ranks, name, stage, *kind, "--resume_from", given, into=f"{name}_halves")]
            if (launch, ranks) == ("second", 2):
                for name, (before, now) in SAME_RANKS.items():
                    saved = base / "2" / f"zero{before}_bf16_halves" / "step_2"
                    still = ("training.precision=bf16", "training.stop_at_step=2", "--resume_from", str(saved))
                    cases.append(case(2, f"bf16_{name}", f"zero{now}", *still))
            for chain, stages in CHAINS.items():
                link = {("first", 4): 0, ("first", 2): 1, ("first", 1): 2, ("second", 4): 3}.get((launch, ranks))
                if link is None:
                    continue
                steps = f"training.stop_at_step={2 + link}"
                resume = ("--resume_from", str(chained / chain / str(link - 1) / f"step_{1 + link}")) if link else ()
                argv = case(ranks, chain, f"zero{stages[link]}", "model.n_layers=1", *resume).argv
                folder = ("--output_dir", str(chained / chain / str(link)))
                cases.append(Case(f"{chain}_{link}", (*argv, steps, *folder)))
                if link:  # also resumed without training a step: what is saved again must be what was loaded
                    same = ("--output_dir", str(chained / chain / f"{link}_same"), f"training.stop_at_step={1 + link}")
                    cases.append(Case(f"{chain}_{link}_same", (*argv, *same)))
            output = run_cases(ranks, cases, base / str(ranks), timeout_s=1200)
            (base / f"{ranks}_{launch}.txt").write_text(output)
    return base


def rows_of(folder: Path) -> list[dict]:
    rows = [row for row in read_rows(folder / "metrics.jsonl") if "loss" in row]
    return [{key: value for key, value in row.items() if key not in TIME_METRICS} for row in rows]


def assert_same_state(one: Path, other: Path) -> None:
    """Asserts that masters, moments, Adam's step, hyper-parameters, buffers and schedule are bitwise the same."""
    a, b = read_full_state(one), read_full_state(other)
    assert a.parameters.keys() == b.parameters.keys() and len(a.parameters) in (21, 40)
    for name in a.parameters:
        assert a.parameters[name].step == b.parameters[name].step == a.run.step
        for what in ("master", "exp_avg", "exp_avg_sq"):
            assert torch.equal(a.parameters[name].full(what), b.parameters[name].full(what)), (name, what)
            assert a.parameters[name].full(what).any() or name.endswith("bias"), (name, what)
    assert a.groups == b.groups and a.schedule == b.schedule
    assert all(torch.equal(a.buffers[name], b.buffers[name]) for name in a.buffers)
    assert (a.run.step, a.run.samples_consumed) == (b.run.step, b.run.samples_consumed)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize(("stage", "precision"), CELLS)
def test_a_resumed_run_equals_the_straight_run_in_every_row_and_byte(runs, ranks, stage, precision):
    straight, halves = (runs / str(ranks) / f"{stage}_{precision}_{half}" for half in ("straight", "halves"))
    assert rows_of(halves) == rows_of(straight) and len(rows_of(halves)) == 5
    assert [row["stage"] for row in rows_of(halves)] == ["dense"] * 3 + ["sparse"] * 2
    epochs = [int(row["epoch"]) for row in rows_of(halves)]
    assert epochs[1] < epochs[-1]
    assert_same_state(halves / "step_5", straight / "step_5")
    ours, theirs = (manifest.read(folder / "step_5").files for folder in (halves, straight))
    assert ours.keys() == theirs.keys()
    # the model's *.pt also holds the time of the save and the tracking id
    same = [name for name in ours if name == "model.safetensors" or name.endswith("_optim_states.pt")]
    assert len(same) == 1 + (0 if stage == "zero0" else ranks)
    assert all(ours[name] == theirs[name] for name in same)


@pytest.mark.parametrize("link", [1, 2, 3])
@pytest.mark.parametrize("chain", CHAINS)
def test_another_number_of_ranks_and_stage_load_every_bit(runs, chain, link):
    before, after = runs / "chain" / chain / str(link - 1), runs / "chain" / chain / f"{link}_same"
    assert_same_state(before / f"step_{1 + link}", after / f"step_{1 + link}")


@pytest.mark.parametrize("name", SAME_RANKS)
def test_another_stage_on_the_same_ranks_loads_every_bit_in_bf16(runs, name):
    before, now = SAME_RANKS[name]
    saved, again = runs / "2" / f"zero{before}_bf16_halves" / "step_2", runs / "2" / f"bf16_{name}" / "step_2"
    assert_same_state(saved, again)
    assert read_layout(again).family == now and read_layout(again).precision == "bf16"
    weights = [manifest.read(folder).files["model.safetensors"] for folder in (saved, again)]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("chain", CHAINS)
def test_a_resized_run_trains_on_the_same_samples_to_the_same_losses(runs, chain):
    """In fp32 on 4 -> 2 -> 1 -> 4 ranks; losses are within 1e-5 of the run that stayed on four."""
    resized = [row for link in range(4) for row in rows_of(runs / "chain" / chain / str(link))]
    straight = rows_of(runs / "4" / "zero2_fp32_straight")
    assert [row["samples"] for row in resized] == [row["samples"] for row in straight]
    assert [row["lr"] for row in resized] == [row["lr"] for row in straight]
    for a, b in zip(resized, straight, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


def test_resizing_is_announced(runs):
    assert "step_2 was saved by 4 rank(s) at ZeRO 1" in (runs / "2_first.txt").read_text()
