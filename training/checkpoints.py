"""Manages the checkpoints of a run: `python -m training.checkpoints list|verify|prune|pin|unpin|diff ...`.

    list   RUN                          what there is: step, epoch, tokens, size, layout, whole or torn, pinned
    verify RUN                          training.verify for all of them
    prune  RUN --keep_last N [--keep_every M] [--yes [--force]]   shows what would go, and with --yes deletes it
    pin    STEP_DIR      unpin STEP_DIR a pinned checkpoint is never deleted
    diff   STEP_DIR STEP_DIR            configuration, position, and how far weights and moments have moved

Exit code 1 when something is wrong with a checkpoint, 2 when the command is.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from gsa.checkpoint import legacy, manifest
from gsa.checkpoint.full_state import read_full_state, read_run_state
from gsa.checkpoint.manifest import CheckpointError
from training import verify
from training.config import config_changes
from training.record.run_folder import RunFolder


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="training.checkpoints", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("list", "verify"):
        commands.add_parser(name).add_argument("run", type=Path)
    prune = commands.add_parser("prune")
    prune.add_argument("run", type=Path)
    prune.add_argument("--keep_last", type=int, required=True, help="newest checkpoints that stay, at least 1")
    prune.add_argument("--keep_every", type=int, help="steps that are multiples of this stay")
    prune.add_argument("--yes", action="store_true", help="delete; without it, only show")
    prune.add_argument("--force", action="store_true", help="also where run.json says that the run goes on")
    for name in ("pin", "unpin"):
        commands.add_parser(name).add_argument("checkpoint", type=Path)
    diff = commands.add_parser("diff")
    diff.add_argument("old", type=Path)
    diff.add_argument("new", type=Path)
    args = parser.parse_args(argv)
    try:
        match args.command:
            case "list":
                return _list(args.run)
            case "verify":
                return verify.main([str(args.run), "--all"])
            case "prune":
                return _prune(args.run, args.keep_last, args.keep_every, delete=args.yes, force=args.force)
            case "pin" | "unpin":
                return _pin(args.checkpoint, pinned=args.command == "pin")
            case _:
                return _diff(args.old, args.new)
    except (CheckpointError, ValueError) as err:
        print(f"error: {err}", file=sys.stderr)
        return 1 if isinstance(err, CheckpointError) else 2


def _list(run: Path) -> int:
    found = manifest.list_checkpoints(run)
    if not found:
        raise CheckpointError(f"{run}: no step_N folder in it; give a run's folder, such as outputs/mine")
    latest = manifest.latest_tag(run)
    print(f"{'tag':<14}{'epoch':>9}{'tokens':>16}{'MiB':>11}  {'made by':<18}state")
    for f in found:
        notes = [word for word, so in (("latest", f.tag == latest), ("pinned", (f.path / manifest.PIN).exists())) if so]
        if legacy.is_legacy(f.path):
            print(f"{f.tag:<14}{'':>36}  {'the predecessor':<18}{', '.join(['not verifiable', *notes])}")
        elif not f.complete:
            print(f"{f.tag:<14}{'':>36}  {'':<18}{', '.join([*notes, f.reason])}")
        else:
            state = read_run_state(f.path)
            size = sum(entry.bytes for entry in manifest.read(f.path).files.values()) / 2**20
            made = f"{state.world_size} x ZeRO {state.zero_stage}"
            print(
                f"{f.tag:<14}{state.epoch:>9.3f}{state.tokens_seen:>16,}{size:>11,.1f}  {made:<18}"
                f"{', '.join(['complete', *notes])}"
            )
    return 0


def _prune(run: Path, keep_last: int, keep_every: int | None, *, delete: bool, force: bool) -> int:
    if delete and not force and RunFolder(run).read_run().get("status") == "running":
        raise ValueError(
            f"{run / 'run.json'} says that the run goes on, and only one process may delete there: it prunes by "
            f"training.keep_last itself. If it was killed, add --force"
        )
    removed = manifest.retain(run, keep_last, keep_every, dry_run=not delete)
    for one in removed:
        print(one if delete else f"would remove {one.tag}: {one.reason}")
    if not removed:
        print("nothing to remove")
    elif not delete:
        print("nothing was deleted; add --yes")
    return 1 if any(one.error is not None for one in removed) else 0


def _pin(checkpoint: Path, *, pinned: bool) -> int:
    manifest.read(checkpoint)
    if pinned:
        (checkpoint / manifest.PIN).touch()
    else:
        (checkpoint / manifest.PIN).unlink(missing_ok=True)
    print(f"{checkpoint} is {'pinned: it is never deleted' if pinned else 'no longer pinned'}")
    return 0


def _diff(old: Path, new: Path) -> int:
    for checkpoint in (old, new):
        manifest.verify(checkpoint)
    before, after = read_full_state(old), read_full_state(new)
    for name in ("step", "epoch", "samples_consumed", "tokens_seen", "world_size", "zero_stage", "data_fingerprint"):
        a, b = getattr(before.run, name), getattr(after.run, name)
        print(f"{name:<18}{a!s:.24}" + ("" if a == b else f" -> {b!s:.24}"))
    for change in config_changes(before.run.config, after.run.config):
        print(f"{change.key}: {change.old!r} -> {change.new!r} ({change.effect})")
    both = [name for name in before.parameters if name in after.parameters]
    for name in sorted(before.parameters.keys() ^ after.parameters.keys()):
        print(f"{name}: only in {(old if name in before.parameters else new).name}")
    print(f"{'':<12}{'equal, of ' + str(len(both)):>16}{'relative change':>18}  largest in")
    for what in ("master", "exp_avg", "exp_avg_sq"):
        moved = {}
        for name in both:
            a, b = before.parameters[name].full(what), after.parameters[name].full(what)
            if a.shape == b.shape and not torch.equal(a, b):
                moved[name] = float((a - b).norm() / a.norm().clamp_min(1e-30))
        worst = max(moved, key=moved.get, default=None)
        print(f"{what:<12}{len(both) - len(moved):>16}{moved.get(worst, 0.0):>18.3e}  {worst or ''}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
