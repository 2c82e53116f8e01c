"""Runs the batch of one step again and prints it: `python -m training.replay RUN --step N`.

For a loss that looks odd: it prints the text of every window that the step trained on, and the loss that a model
gives each. The weights are those of the newest checkpoint before the step, or of --checkpoint; they run on one device,
without an engine, in float32. The text is exactly that of the step. The loss is that of the step, too, when the
checkpoint is of the step right before it and on the same branch. A step that was trained more than once, before a crash
or a rollback, has a row for each training, and --segment chooses one.

Exit codes: 0 done; 2 no such step, or a refused argument; 3 refused run, checkpoint or data; 1 anything else.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from gsa.checkpoint.manifest import no_run_in
from training.config.command import add_run, command_parser, run_command
from training.config.exit_codes import ExitCode
from training.loop.rerun import TrainedStep, Window, checkpoint_before, choose_training, rerun_step, trainings_of
from training.record.reader import NoRunError

SHOWN_CHARACTERS = 200
"""Characters printed of either end of a window's text."""


def render(
    trained: TrainedStep, others: Sequence[TrainedStep], checkpoint: Path, windows: Sequence[Window], whole: bool
) -> str:
    """The report: other trainings of the step, its loss then and now, and its windows, the largest loss first.

    whole: the whole text of every window, not its ends.
    """
    row = trained.row
    mean = sum(window.loss * window.targets for window in windows) / sum(window.targets for window in windows)
    also = [
        f"also trained: {'in metrics.jsonl' if t.segment is None else f'--segment {t.segment}'}, loss "
        f"{float(t.row['loss']):.4f}, samples up to {t.row['samples'] - 1}"
        for t in others
        if t is not trained
    ]
    branch = "" if trained.segment is None else " of the branch that went on"
    lines = [
        *also,
        f"step {row['step']}: loss {float(row['loss']):.4f} then, gradient norm {float(row['grad_norm']):.3f}, samples "
        f"{windows[0].sample}..{windows[-1].sample}; with the weights of {checkpoint.name}{branch}: {mean:.4f}",
        "",
    ]
    for window in sorted(windows, key=lambda w: -w.loss):
        text = window.text if whole else _ends(window.text)
        worst = ", ".join(f"{token!r} {loss:.1f}" for token, loss in window.worst)
        lines += [
            f"sample {window.sample} (rank {window.rank}; {window.place}): loss {window.loss:.4f}; worst: {worst}",
            *(f"    {line}" for line in text.splitlines()),
        ]
    return "\n".join(lines)


def _ends(text: str) -> str:
    if len(text) <= 2 * SHOWN_CHARACTERS:
        return text
    left_out = len(text) - 2 * SHOWN_CHARACTERS
    return f"{text[:SHOWN_CHARACTERS]}\n[... {left_out} characters ...]\n{text[-SHOWN_CHARACTERS:]}"


def main(argv: Sequence[str]) -> int:
    parser = command_parser("replay", __doc__)
    add_run(parser)
    parser.add_argument("--step", type=int, required=True, help="the step whose batch is run again")
    parser.add_argument("--checkpoint", type=Path, help="a step_N folder (default: the newest before the step)")
    parser.add_argument("--whole", action="store_true", help="print the whole text of every window, not its ends")
    parser.add_argument(
        "--segment", type=int, metavar="K", help="the training of the step that segments/metrics_K.jsonl holds"
    )
    args = parser.parse_args(argv)
    if not (args.run / "config.yaml").exists():
        raise NoRunError(no_run_in(args.run))
    trainings = trainings_of(args.run, args.step)
    trained = choose_training(trainings, args.segment)
    checkpoint = args.checkpoint or checkpoint_before(args.run, args.step)
    windows = rerun_step(trained, checkpoint, same_data=args.checkpoint is None)
    print(render(trained, trainings, checkpoint, windows, args.whole))
    return ExitCode.FINISHED


if __name__ == "__main__":
    sys.exit(run_command(main))
