"""Trains a Gated Sparse Attention language model: `deepspeed training/train.py --config ... --output_dir ...`.

Works the same under `deepspeed`, `torchrun`, and alone (one rank). Everything that can be wrong with the input is
refused before any process group starts. Exit codes: 0 finished, or stopped on request with a checkpoint (run.json says
which); 2 refused configuration; 3 refused checkpoint or data; 4 diverged; 1 anything else.
"""

from __future__ import annotations

import argparse
import faulthandler
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import get_args

# As a script, Python puts training/ itself first on the path, where its folders would be mistaken for other people's
# modules. The project's root belongs there, installed or not.
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from gsa.checkpoint.manifest import CheckpointError  # noqa: E402
from gsa.units import printable  # noqa: E402
from training.config import format_help  # noqa: E402
from training.config.command import refuse_empty, snake_case_flags  # noqa: E402
from training.config.exit_codes import ExitCode, Refusal, exit_code_of  # noqa: E402
from training.engine.rendezvous import Meeting, meet  # noqa: E402
from training.engine.world import environment_rank, exit_process  # noqa: E402
from training.loop.preflight import prepare  # noqa: E402
from training.observe.console import LogLevel  # noqa: E402
from training.observe.terminal import survive_lost_output  # noqa: E402

MEETING_S = 600.0
"""Seconds to wait for ranks that have not come, or that are still reading their input."""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="training/train.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"Every key of the yaml, or key=value on the command line:\n\n{format_help()}",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", type=Path, required=True, help="the run's yaml, e.g. training/configs/quickstart.yaml"
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="the run's folder, e.g. outputs/quickstart")
    parser.add_argument(
        "--deepspeed_config",
        type=Path,
        help="ZeRO stage, buckets and offload, e.g. ds_configs/zero3.json (default: ZeRO 2)",
    )
    parser.add_argument(
        "--resume_from",
        metavar="PATH|TAG|latest|auto",
        help="continue a checkpoint; auto takes the newest good one, and starts a run where there never was one",
    )
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="start over at step 0 in a folder that holds a run, whose rows and checkpoints move to segments/",
    )
    parser.add_argument(
        "--take_over",
        action="store_true",
        help="take the folder from the launch that owns it, which then ends; for when you know that it is gone",
    )
    parser.add_argument(
        "--allow_config_change",
        action="store_true",
        help="resume although a changed key changes the curve, and use the new value",
    )
    parser.add_argument(
        "--log_level",
        choices=get_args(LogLevel),
        default="info",
        help="debug: DeepSpeed's own lines too; warning: warnings and errors only (default: %(default)s)",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration keys, over the yaml")
    return parser.parse_intermixed_args(refuse_empty(snake_case_flags(argv)))


def main(argv: Sequence[str]) -> int:
    with suppress(AttributeError, ValueError, OSError, RuntimeError):  # standard error is closed, or no file
        faulthandler.enable()  # a signal that kills the process leaves the stack behind
    survive_lost_output()
    meeting, refused, prepared = None, None, None
    try:
        meeting = meet(MEETING_S)
        prepared = prepare(parse(argv))
    except (Refusal, CheckpointError) as err:
        refused = str(err), exit_code_of(err)
    except SystemExit as end:  # of argparse, which has printed why
        if not end.code:
            raise
        refused = "its command line is refused; what it printed says why", ExitCode.REFUSED_CONFIG
    except Exception as err:
        print(f"error: rank {environment_rank()} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        refused = f"{type(err).__name__}: {err}", ExitCode.FAILED
    if (code := tell_the_others(meeting, refused)) is not None:
        if prepared is not None:
            prepared.release()
        return code

    # DeepSpeed takes seconds to import: not before the input is known to be good
    from training.engine.engine import start
    from training.loop.run import run

    timeout_s = max(600.0, 20 * prepared.spec.cfg.training.hang_timeout_s)
    world = start(timeout_s=timeout_s, verbose=prepared.log_level == "debug", meeting=meeting)
    code = run(prepared, world, watched=lambda: meeting and meeting.dismiss())
    if code == ExitCode.FINISHED:
        world.leave()
    return code


def tell_the_others(meeting: Meeting | None, refused: tuple[str, int] | None) -> int | None:
    """Prints what this rank or another has refused, and returns the exit code of all; None when all are ready.

    meeting: of this launch; None for a rank that is alone, or that did not find the others.
    """
    if meeting is None:
        if refused is not None:
            print(printable(f"error: {refused[0]}"), file=sys.stderr, flush=True)
        return refused and refused[1]
    heard = meeting.hear_all(*refused or (None,))
    if heard is None:
        return None
    if meeting.speaks:
        print(printable(f"error: {heard}"), file=sys.stderr, flush=True)
    meeting.part()
    return heard.exit_code


if __name__ == "__main__":
    exit_process(main(sys.argv[1:]))
