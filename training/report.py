"""Writes report.html and report.md of a run: `python -m training.report OUTPUT_DIR [OUTPUT_DIR ...] [--out FOLDER]`.

The run may be live, finished, stopped or dead, and may lack files: what is missing is said where it would stand.
Several runs are compared, and then --out says where to. The page fetches nothing: it can be mailed, or read on a
machine without a network. Checkpoints are judged by names and sizes; --verify reads every byte.
Exit code 2 when a folder holds no run, or the reports cannot be written.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from training.record.reader import NoRunError, labels, read
from training.reporting import markdown, page
from training.reporting.analysis import tell


def write(folders: Sequence[Path], out: Path, *, verify: bool = False) -> list[Path]:
    """Writes both reports into `out`, whole or not at all, and returns their paths. Raises NoRunError, OSError."""
    stories = [tell(read(folder, label), verify=verify) for folder, label in zip(folders, labels(folders), strict=True)]
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for name, render in (("report.html", page.render), ("report.md", markdown.render)):
        temporary = out / f"{name}.tmp"
        # a run's text may hold what UTF-8 cannot, such as half a surrogate pair
        temporary.write_text(render(stories), encoding="utf-8", errors="replace")
        os.replace(temporary, out / name)
        written.append(out / name)
    return written


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="training.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="OUTPUT_DIR", help="the folder of a run")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where the reports go; default: the run's folder")
    parser.add_argument("--verify", action="store_true", help="read every byte of every checkpoint")
    args = parser.parse_args(argv)
    if len(args.runs) > 1 and args.out is None:
        print("error: several runs need --out FOLDER: their comparison belongs to none of them", file=sys.stderr)
        return 2
    try:
        written = write(args.runs, args.out or args.runs[0], verify=args.verify)
    except NoRunError as err:
        print(f"error: {err}", file=sys.stderr)
        return 2
    except OSError as err:
        where = err.filename or args.out or args.runs[0]
        print(f"error: {where}: {err.strerror}; give another folder with --out", file=sys.stderr)
        return 2
    for path in written:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
