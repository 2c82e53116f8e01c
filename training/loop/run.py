"""A prepared run on every rank, from the first barrier to the exit code."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace

from gsa.checkpoint.manifest import CheckpointError
from gsa.units import printable
from training.config import to_yaml
from training.config.exit_codes import ExitCode, Refusal, exit_code_of
from training.data.dataset import raise_fault
from training.data.proof import BackgroundProof
from training.engine.world import World
from training.loop.agreement import open_same_data, require_same_folder
from training.loop.evaluate import EvaluationError
from training.loop.last_words import LastWords, is_broken_connection
from training.loop.preflight import Prepared
from training.loop.spike_policy import Diverged
from training.loop.trainer import Trainer
from training.loop.watchdog import Watchdog
from training.record.run_folder import RunFolder


def run(prepared: Prepared, world: World, watched: Callable[[], None] = lambda: None) -> ExitCode:
    """Trains on every rank of `world` and returns the exit code. Errors are printed and recorded in run.json.

    watched: called once the watchdog has begun.
    """
    folder = prepared.folder
    # rank 0 alone has read the checkpoint, which may decide some keys
    shared = (
        prepared.spec.cfg,
        prepared.start,
        time.time_ns(),
        folder.read_run().get("ends") if world.is_main else None,
    )
    cfg, start, launch, ends = world.broadcast(shared)
    spec = replace(prepared.spec, cfg=cfg)
    try:
        data, held_out = open_same_data(prepared.given, cfg, world)
        require_same_folder(folder, world)
        world.from_main(lambda: folder.write_inputs(config_yaml=to_yaml(cfg), ds_config=spec.ds_config))
    except (Refusal, CheckpointError) as err:  # the same on every rank
        prepared.release()
        if world.local_rank == 0:
            print(printable(f"error: {err}"), file=sys.stderr, flush=True)
        world.barrier()  # a launcher ends all ranks when the first one exits
        return exit_code_of(err)
    words, trainer = LastWords(folder.path, rank=world.rank, launch=str(launch)), None
    try:
        unproved = [*held_out.unproved, *data.unproved]
        with (
            BackgroundProof(unproved, failed=data.report_fault, part=world.local_rank, parts=world.local_size),
            Watchdog(
                folder.path,
                rank=world.rank,
                size=world.size,
                timeout_s=cfg.training.hang_timeout_s,
                launch=str(launch),
                ending=folder.record_end,
            ) as watchdog,
        ):
            watched()
            trainer = Trainer(
                spec,
                world=world,
                folder=folder,
                data=data,
                held_out=held_out,
                start=start,
                watchdog=watchdog,
                bytes_needed=prepared.bytes_needed,
                log_level=prepared.log_level,
            )
            if prepared.lease is not None:
                stop = trainer.stop
                prepared.lease.phase = lambda: "stopping" if stop.number else "running"
            trainer.train()
            raise_fault(world.gather(data.fault))  # found after the last step
            trainer.close()
        return ExitCode.FINISHED
    except Exception as err:
        failure = explain(err, words, world)
        step = None if trainer is None else trainer.progress.step
        ends = count_end(ends, step, failure)
        if trainer is not None:
            trainer.recorder.failed(step, str(err) if isinstance(err, Diverged) else failure.reason)
        if world.is_main:
            _record_failure(folder, failure, step, ends)
        if failure.printed:
            print(printable(f"error: {failure.printed}"), file=sys.stderr, flush=True)
        if ends is not None and ends["count"] >= SAME_END:
            failure = replace(failure, exit_code=ExitCode.DIVERGED)
            if world.local_rank == 0:
                print(f"error: {_same_end(ends)}", file=sys.stderr, flush=True)
        if isinstance(err, Diverged):  # all ranks are here, and rank 0 has printed
            world.barrier()  # a launcher ends all ranks when the first one exits
        return failure.exit_code
    finally:
        prepared.release()


SAME_END = 3
"""So many launches in a row that end at one step are reported, with an exit code that a job script need not retry."""


def count_end(ends: dict | None, step: int | None, failure: Failure) -> dict | None:
    """How often launches in a row have ended at this step, as run.json holds it: {"step", "count"}.

    ends: what it held before this launch. step: the one that the run has reached; None, where it had not begun to
    train, and a refusal count as no end, and neither does a kill, which may come at any step.
    """
    if step is None or failure.exit_code in (ExitCode.REFUSED_CONFIG, ExitCode.REFUSED_INPUT):
        return None
    again = ends is not None and ends.get("step") == step
    return {"step": step, "count": ends["count"] + 1 if again else 1}


def _same_end(ends: dict) -> str:
    return (
        f"{ends['count']} launches in a row have ended at step {ends['step']}: another one will not get further. Look "
        f"at the error and at the samples of the step (python -m training.replay), lower training.learning_rate, or go "
        f"back further with --resume_from step_N"
    )


@dataclass(frozen=True)
class Failure:
    """reason: for run.json. printed: what this rank has to say; empty when another says it."""

    reason: str
    printed: str
    exit_code: ExitCode


def explain(err: Exception, words: LastWords, world: World) -> Failure:
    """Why the run ends, and with which code: that of the rank at fault, whose words the others repeat."""
    if isinstance(err, Diverged):  # on all ranks
        return Failure("diverged", str(err) if world.is_main else "", ExitCode.DIVERGED)
    if isinstance(err, EvaluationError):  # on all ranks; the one at fault shows where
        trace = "".join(traceback.format_exception(err.__cause__)) if err.__cause__ else ""
        shown = f"{err}\n{trace}" if trace or world.local_rank == 0 else ""
        return Failure(str(err), shown, ExitCode.FAILED)
    if is_broken_connection(err):
        heard = words.of_another()
        if heard is not None:
            text = f"rank {heard.rank} on {heard.host}: {heard.reason}"
            return Failure(text, text if world.local_rank == 0 else "", ExitCode(heard.exit_code))
        lost = "the connection to another rank broke: it was killed, or its host or the network failed"
        return Failure(lost, f"rank {world.rank}: {lost}\n({_first_line(err)})", ExitCode.FAILED)
    if isinstance(err, Refusal | CheckpointError):
        code = exit_code_of(err)
        words.leave(str(err), code)
        return Failure(str(err), f"rank {world.rank}: {err}", code)
    reason = f"{type(err).__name__}: {err}"
    words.leave(reason, ExitCode.FAILED)
    trace = "".join(traceback.format_exception(err))
    return Failure(reason, f"rank {world.rank} failed:\n{trace}", ExitCode.FAILED)


def _first_line(err: Exception) -> str:
    return (str(err).splitlines() or [type(err).__name__])[0]


def _record_failure(folder: RunFolder, failure: Failure, step: int | None, ends: dict | None) -> None:
    """Writes it into run.json, unless the launch was refused before it began.

    step: the one that the run has reached; None: it had not begun to train. ends: see count_end. A disk that refuses
    the write as well must not change the exit code.
    """
    refused = failure.exit_code in (ExitCode.REFUSED_CONFIG, ExitCode.REFUSED_INPUT)
    if refused and folder.read_run().get("status") != "running":
        return
    try:
        reached = {} if step is None else {"step": step, "ends": ends}
        folder.update_run(status="failed", reason=failure.reason, **reached)
        if failure.exit_code == ExitCode.DIVERGED:
            folder.suspect(step)
    except CheckpointError as err:
        print(f"warning: {err}", file=sys.stderr, flush=True)
