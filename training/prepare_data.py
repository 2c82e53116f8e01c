"""Turns text into token shards with a manifest: `python -m training.prepare_data --out DIR INPUT ...`.

It reads the input twice, in parallel: first to check and hash every document, then to tokenise the documents that are
chosen. It says how long this takes, compares every document with what the tokenizer gives back, and names what it
leaves out. A killed preparation continues where it was when the same command runs again. The result does not depend on
the number of workers. Formats, and how to add text later: docs/data.md.

Exit codes: 0 prepared, now or before; 2 refused argument; 3 refused text, tokenizer or folder; 1 anything else.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:  # run as a script: see training/train.py
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from training.config.command import command_parser, run_command  # noqa: E402
from training.config.exit_codes import ExitCode  # noqa: E402
from training.config.lease import owned  # noqa: E402
from training.data.corpus import Reading  # noqa: E402
from training.data.manifest import MAX_VOCAB_SIZE  # noqa: E402
from training.data.prepare import DEFAULT_VOCAB_SIZE, PrepareOptions, prepare, summary  # noqa: E402
from training.data.proof import verify_dataset  # noqa: E402
from training.data.tokenizer import EOD, MIN_VOCAB_SIZE  # noqa: E402
from training.observe.terminal import survive_lost_output  # noqa: E402

MAX_WORKERS = 1024
MAX_DOCUMENT_MB = 1 << 16


def main(argv: Sequence[str]) -> int:
    args = _parse(argv)
    if args.verify:
        return ExitCode.FINISHED if verify_dataset(args.out) else ExitCode.REFUSED_INPUT
    with owned(args.out, command="training.prepare_data"):
        prepared = prepare(
            PrepareOptions(
                out=args.out,
                inputs=tuple(args.inputs),
                reading=Reading(args.text_field, args.group_field, args.max_document_mb << 20),
                vocab_size=args.vocab_size,
                tokenizer=args.tokenizer,
                eod_token=args.eod_token,
                held_out=args.held_out,
                limit_mb=args.limit_mb,
                skip_bad=(args.on_bad or ("skip" if args.embedded else "error")) == "skip",
                workers=args.workers,
                force=args.force,
                on_changed=args.on_changed,
            )
        )
    if prepared.was_finished:
        print(f"{args.out} is prepared already from this input")
    print(summary(prepared.manifest, args.out))
    return ExitCode.FINISHED


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = command_parser("prepare_data", __doc__)
    parser.add_argument(
        "inputs", nargs="*", metavar="INPUT", help=".txt .md .jsonl .jsonl.gz .jsonl.zst .parquet, folders, globs"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the prepared dataset")
    parser.add_argument(
        "--embedded",
        action="store_true",
        help="instead of INPUT: the source text of Python and of this project's dependencies",
    )
    parser.add_argument(
        "--vocab_size", type=int, help=f"entries of the byte-level BPE to train (default: {DEFAULT_VOCAB_SIZE})"
    )
    parser.add_argument(
        "--tokenizer", type=Path, help="tokenizer.json, or qwen.tiktoken, to use instead of training one"
    )
    parser.add_argument(
        "--eod_token", default=EOD, help="end-of-document token of the tokenizer (default: %(default)s)"
    )
    parser.add_argument(
        "--text_field", default="text", help="field or column that holds the text (default: %(default)s)"
    )
    parser.add_argument(
        "--group_field", help="field whose equal values stay in one split (default: each record is a group)"
    )
    parser.add_argument("--held_out", type=float, default=0.015, help="share of groups held out (default: %(default)s)")
    parser.add_argument("--limit_mb", type=float, help="use about this many MB of documents, chosen by hash")
    parser.add_argument(
        "--max_document_mb", type=int, default=64, help="largest document, in MiB (default: %(default)s)"
    )
    parser.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: %(default)s)"
    )
    parser.add_argument(
        "--on_bad",
        choices=("error", "skip"),
        help="stop at a bad document, or count it and leave it out (default: error; skip for --embedded)",
    )
    parser.add_argument(
        "--on_changed",
        choices=("error", "skip", "keep"),
        default="error",
        help="a document that the tokenizer does not give back as it was: stop, count it and leave it out, or count it "
        "and keep it as the tokenizer gives it back (default: %(default)s)",
    )
    parser.add_argument(
        "--force", action="store_true", help="replace a dataset that is damaged, or made from other input or options"
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="instead of INPUT: read every byte of the dataset in --out and prove that it is as it was prepared",
    )
    args = parser.parse_args(argv)
    if args.verify:
        if args.inputs or args.embedded or args.force:
            parser.error(
                "--verify reads the dataset in --out and changes nothing; leave INPUT, --embedded, --force out"
            )
        return args
    if args.embedded == bool(args.inputs):
        parser.error("give INPUT files, or --embedded")
    if args.tokenizer and args.vocab_size:
        parser.error("--vocab_size is for a tokenizer that is trained; leave it out with --tokenizer")
    if not 0 < args.held_out < 1:
        parser.error(f"--held_out {args.held_out} is a share: it must be between 0 and 1")
    if args.eod_token != EOD and not args.tokenizer:
        parser.error(f"--eod_token names a token of --tokenizer; a tokenizer that is trained ends documents with {EOD}")
    bounds = {"workers": MAX_WORKERS, "max_document_mb": MAX_DOCUMENT_MB}
    for name, most in bounds.items():
        if not 1 <= getattr(args, name) <= most:
            parser.error(f"--{name} {getattr(args, name)} must be from 1 to {most:,}")
    if args.vocab_size is not None and not MIN_VOCAB_SIZE <= args.vocab_size <= MAX_VOCAB_SIZE:
        parser.error(
            f"--vocab_size {args.vocab_size} must be from {MIN_VOCAB_SIZE} (the 256 bytes and {EOD}) to "
            f"{MAX_VOCAB_SIZE:,}"
        )
    if args.limit_mb is not None and not args.limit_mb > 0:
        parser.error("--limit_mb must be above 0")
    return args


if __name__ == "__main__":
    survive_lost_output()  # progress that nobody can read any more is no reason to stop
    sys.exit(run_command(main))
