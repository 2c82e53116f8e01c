"""Makes one clean W&B run from metrics.jsonl: `python -m training.tracking rebuild RUN`.

Use it when W&B was switched off during a run, or holds a curve that was cut by crashes. Exit codes: 0 done; 1 W&B
failed; 3 there is nothing to rebuild, or the run's folder is damaged.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from training.config.command import add_run, command_parser, run_command
from training.config.exit_codes import ExitCode, Refusal
from training.config.lease import owned
from training.observe.tracking.rebuild import rebuild
from training.observe.tracking.wandb_sink import wandb_mode


def main(argv: Sequence[str]) -> int:
    parser = command_parser("tracking", __doc__)
    command = parser.add_subparsers(required=True).add_parser(
        "rebuild", help="make one whole W&B run from metrics.jsonl", allow_abbrev=False
    )
    add_run(command)
    command.add_argument("--project", help="W&B project (default: the run's)")
    command.add_argument("--entity", help="W&B entity (default: the run's)")
    command.add_argument("--run_id", help="W&B id of the new run (default: the run's own, which W&B must not have)")
    command.add_argument("--mode", choices=("offline", "online"), help="default: online with a key, offline without")
    args = parser.parse_args(argv)
    mode = args.mode or wandb_mode()
    mode = "offline" if mode == "disabled" else mode
    try:
        with owned(args.run, command="training.tracking rebuild"):
            steps, folder, run_id = rebuild(
                args.run, project=args.project, entity=args.entity, run_id=args.run_id, mode=mode
            )
    except Refusal:
        raise
    except Exception as err:  # wandb's errors have no common class
        print(f"error: W&B: {type(err).__name__}: {err}", file=sys.stderr)
        return ExitCode.FAILED
    print(f"run {run_id}: {len(steps)} steps, {steps[0]} to {steps[-1]}, in {folder}")
    if mode != "online":
        print(f"to upload it: wandb sync {folder}\nIf W&B has a run {run_id} already, give --run_id first.")
    return ExitCode.FINISHED


if __name__ == "__main__":
    sys.exit(run_command(main))
