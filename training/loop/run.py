"""A prepared run on every rank, from the first barrier to the exit code."""

from __future__ import annotations

import sys
import time
import traceback
from dataclasses import replace

from gsa.checkpoint.manifest import CheckpointError
from training.config import to_yaml
from training.config.exit_codes import ExitCode, Refusal, exit_code_of
from training.engine.world import World
from training.loop.agreement import open_same_data, require_same_folder
from training.loop.preflight import Prepared
from training.loop.spike_policy import Diverged
from training.loop.trainer import Trainer
from training.loop.watchdog import Watchdog
from training.record.run_folder import RunFolder


def run(prepared: Prepared, world: World) -> ExitCode:
    """Trains on every rank of `world` and returns the exit code. Errors are printed and recorded in run.json."""
    folder = prepared.folder
    # rank 0 alone has read the checkpoint, which may decide some keys
    cfg, start, launch = world.broadcast((prepared.spec.cfg, prepared.start, time.time_ns()))
    spec = replace(prepared.spec, cfg=cfg)
    try:
        data, held_out = open_same_data(prepared.given, cfg, world)
        require_same_folder(folder, world)
        world.from_main(lambda: folder.write_inputs(config_yaml=to_yaml(cfg), ds_config=spec.ds_config))
    except (Refusal, CheckpointError) as err:  # the same on every rank
        if world.local_rank == 0:
            print(f"error: {err}", file=sys.stderr, flush=True)
        world.barrier()  # a launcher ends all ranks when the first one exits
        return exit_code_of(err)
    try:
        with Watchdog(
            folder.path, rank=world.rank, size=world.size, timeout_s=cfg.training.hang_timeout_s, launch=str(launch)
        ) as watchdog:
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
            trainer.train()
            trainer.close()
        return ExitCode.FINISHED
    except Diverged as err:
        if world.is_main:
            _record_failure(folder, "diverged")
            print(f"error: {err}", file=sys.stderr, flush=True)
        world.barrier()  # a launcher ends all ranks when the first one exits: rank 0 has printed its message by now
        return ExitCode.DIVERGED
    except (Refusal, CheckpointError) as err:
        print(f"error: rank {world.rank}: {err}", file=sys.stderr, flush=True)
        if world.is_main and folder.read_run().get("status") == "running":  # it had begun: a save or a read failed
            _record_failure(folder, str(err))
        return exit_code_of(err)
    except Exception as err:
        # an error of one rank reaches the others as a broken connection; each prints what it saw
        print(f"error: rank {world.rank} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        if world.is_main:
            _record_failure(folder, f"{type(err).__name__}: {err}")
        return ExitCode.FAILED


def _record_failure(folder: RunFolder, reason: str) -> None:
    """Writes it into run.json; a disk that refuses that as well must not change the exit code."""
    try:
        folder.update_run(status="failed", reason=reason)
    except CheckpointError as err:
        print(f"warning: {err}", file=sys.stderr, flush=True)
