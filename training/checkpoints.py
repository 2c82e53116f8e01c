"""Manages the checkpoints of a run: `python -m training.checkpoints list|verify|prune|pin|unpin|diff ...`.

    list   RUN                          every checkpoint: step, epoch, tokens, size, layout, complete or torn, pinned
    verify RUN                          proves that each of them can be used, as `training.verify --all RUN` does
    prune  RUN --keep_last N [--keep_every M] [--yes [--force]]   lists what would be deleted; --yes deletes it
    pin    STEP_DIR                     protects a checkpoint: neither a run nor prune deletes it
    unpin  STEP_DIR                     ends that protection
    diff   STEP_DIR STEP_DIR            configuration, position, and how far weights and moments have moved

Exit codes: 0 done; 2 refused argument, or the run is still training; 3 a checkpoint is missing or not good, or could
not be deleted.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch

from gsa.checkpoint import legacy, manifest
from gsa.checkpoint.full_state import read_full_state, read_run_state
from gsa.checkpoint.manifest import CheckpointError
from gsa.units import MIB
from training.checkpointing.verification import verify_all
from training.config import config_changes
from training.config.changes import EFFECT_WORDS
from training.config.command import add_run, command_parser, run_command
from training.config.exit_codes import ExitCode, Refusal
from training.config.lease import owned
from training.record.run_folder import RunFolder


def main(argv: Sequence[str]) -> int:
    parser = command_parser("checkpoints", __doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    add_run(commands.add_parser("list", allow_abbrev=False))
    check = commands.add_parser("verify", allow_abbrev=False)
    add_run(check)
    check.add_argument("--config", type=Path, help="the run's yaml, which a legacy checkpoint may need")
    prune = commands.add_parser("prune", allow_abbrev=False)
    add_run(prune)
    prune.add_argument("--keep_last", type=int, required=True, help="number of newest checkpoints to leave, at least 1")
    prune.add_argument("--keep_every", type=int, help="leave the steps that are multiples of this, too")
    prune.add_argument("--yes", action="store_true", help="delete; without it, only list")
    prune.add_argument("--force", action="store_true", help="delete although another process owns the folder")
    for name in ("pin", "unpin"):
        commands.add_parser(name, allow_abbrev=False).add_argument("checkpoint", type=Path, metavar="STEP_DIR")
    diff = commands.add_parser("diff", allow_abbrev=False)
    diff.add_argument("old", type=Path, metavar="STEP_DIR")
    diff.add_argument("new", type=Path, metavar="STEP_DIR")
    args = parser.parse_args(argv)
    match args.command:
        case "list":
            return _list(args.run)
        case "verify":
            return ExitCode.FINISHED if verify_all(args.run, config=args.config) else ExitCode.REFUSED_INPUT
        case "prune":
            return _prune(args.run, args.keep_last, args.keep_every, delete=args.yes, force=args.force)
        case "pin" | "unpin":
            return _pin(args.checkpoint, pinned=args.command == "pin")
        case _:
            return _diff(args.old, args.new)


def _list(run: Path) -> int:
    found = manifest.list_checkpoints(run)
    if not found:
        raise CheckpointError(manifest.no_run_in(run))
    latest, suspects = manifest.latest_tag(run), RunFolder(run).suspects()
    print(f"{'tag':<14}{'epoch':>9}{'tokens':>16}{'MiB':>11}  {'made by':<18}state")
    for f in found:
        notes = ["latest"] * (f.tag == latest) + ["pinned"] * (f.path / manifest.PIN).exists()
        notes += [suspects[f.tag]] if f.tag in suspects else []
        if legacy.is_legacy(f.path):
            print(f"{f.tag:<14}{'':>36}  {'legacy trainer':<18}{', '.join(['no manifest', *notes])}")
        elif not f.complete:
            print(f"{f.tag:<14}{'':>36}  {'':<18}{', '.join([*notes, f.reason])}")
        else:
            state = read_run_state(f.path)
            size = sum(entry.bytes for entry in manifest.read(f.path).files.values()) / MIB
            made = f"{state.world_size} x ZeRO {state.zero_stage}"
            print(
                f"{f.tag:<14}{state.epoch:>9.3f}{state.tokens_seen:>16,}{size:>11,.1f}  {made:<18}"
                f"{', '.join(['complete', *notes])}"
            )
    return ExitCode.FINISHED


def _prune(run: Path, keep_last: int, keep_every: int | None, *, delete: bool, force: bool) -> int:
    if keep_last < 1 or (keep_every is not None and keep_every < 1):
        raise Refusal("--keep_last and --keep_every must be at least 1")
    if not manifest.list_checkpoints(run):
        raise CheckpointError(manifest.no_run_in(run))
    # only one process may delete here: a run that trains prunes by training.keep_last itself
    with owned(run, command="training.checkpoints prune") if delete and not force else nullcontext():
        removed = manifest.retain(run, keep_last, keep_every, dry_run=not delete)
    for one in removed:
        print(one if delete else f"would remove {one.tag}: {one.reason}")
    if not removed:
        print("nothing to remove")
    elif not delete:
        print("nothing was deleted; add --yes")
    failed = any(one.error is not None for one in removed)
    return ExitCode.REFUSED_INPUT if failed else ExitCode.FINISHED


def _pin(checkpoint: Path, *, pinned: bool) -> int:
    manifest.read(checkpoint)
    if pinned:
        (checkpoint / manifest.PIN).touch()
    else:
        (checkpoint / manifest.PIN).unlink(missing_ok=True)
    print(f"{checkpoint} is {'pinned: it is never deleted' if pinned else 'no longer pinned'}")
    return ExitCode.FINISHED


def _diff(old: Path, new: Path) -> int:
    for checkpoint in (old, new):
        manifest.verify(checkpoint)
    before, after = read_full_state(old), read_full_state(new)
    for name in ("step", "epoch", "samples_consumed", "tokens_seen", "world_size", "zero_stage", "data_fingerprint"):
        a, b = getattr(before.run, name), getattr(after.run, name)
        print(f"{name:<18}{a!s:.24}" + ("" if a == b else f" -> {b!s:.24}"))
    for change in config_changes(before.run.config, after.run.config):
        print(f"{change.key}: {change.old!r} -> {change.new!r} ({EFFECT_WORDS[change.effect]})")
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
    return ExitCode.FINISHED


if __name__ == "__main__":
    sys.exit(run_command(main))
