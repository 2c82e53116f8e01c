"""Finds the files that paths, folders and globs name, and says by name what it leaves out."""

from __future__ import annotations

import errno
import fnmatch
import glob
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from training.data.corpus import SUFFIXES, PrepareError, Source, known_suffix, printable

NOWHERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


class LeftOut(NamedTuple):
    """A file or folder that is not read. kind: under which it is counted. where: its printable name. what: the reason.

    A folder may hold millions of them.
    """

    kind: str
    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


class Found(NamedTuple):
    """The files to read, sorted, each once; and what was left out, in order of the names.

    left_out: of the kinds `unknown_kind`, `dangling_link`, `special_file`, `unread_folder` and `unreadable`.
    """

    sources: list[Source]
    left_out: list[LeftOut]


def find_files(inputs: Sequence[str], without: Path | None = None) -> Found:
    """The files that paths, folders and globs name. Links to folders are followed, and no file is read twice.

    without: a folder that is left out, with all that it holds: the dataset's own.
    Raises PrepareError when an input names no file, or names one that is no text.
    """
    kinds = {given: _kind(given) for given in inputs}
    walk = _Walk(without)
    for given, kind in kinds.items():
        if kind == "file":
            if not known_suffix(given):
                raise PrepareError(f"{printable(given)}: unknown kind of file; known are {', '.join(SUFFIXES)}")
            walk.add_file(str(Path(given)))
    for given, kind in kinds.items():
        if kind == "folder":
            if without is not None and os.path.realpath(given) == os.path.realpath(without):
                raise PrepareError(f"{printable(given)} is both INPUT and --out; give another --out")
            walk.add_folder(given)
    walk.follow_links()
    for given, kind in kinds.items():
        if kind == "pattern":
            walk.add_pattern(given)
    walk.follow_links()
    for given in inputs:
        if kinds[given] != "file" and given not in walk.not_empty:
            known = f"no file ending in {', '.join(SUFFIXES)}"
            what = f"{known} in this folder" if kinds[given] == "folder" else f"no such file, and as a glob {known}"
            left_out = "; ".join(str(item) for item in list(walk.left_out.values())[:3])
            raise PrepareError(f"{printable(given)}: {what}" + (f" (left out: {left_out})" if left_out else ""))
    # A file's group is its path relative to the inputs' common folder. So the split depends neither on where the text
    # lies nor on how the inputs are spelled.
    of_kind = {"folder": Path, "file": lambda given: Path(given).parent, "pattern": _fixed_part}
    root = os.path.commonpath([of_kind[kind](given).absolute() for given, kind in kinds.items()])
    sources = [
        Source(path, printable(path), os.path.relpath(path, root) if known_suffix(path) in (".txt", ".md") else None)
        for path in sorted(walk.files)
    ]
    return Found(sources, [walk.left_out[key] for key in sorted(walk.left_out)])


def _kind(given: str) -> str:
    """What an input is: "folder", "file", or "pattern" when there is nothing of this name. Raises PrepareError."""
    try:
        mode = os.stat(given).st_mode
    except OSError as err:
        if os.path.islink(given):
            raise PrepareError(
                f"{printable(given)}: a link to {printable(os.readlink(given))}: {err.strerror}"
            ) from err
        if err.errno in NOWHERE:
            return "pattern"
        raise PrepareError(f"{printable(given)}: {err.strerror}") from err
    if stat.S_ISDIR(mode):
        return "folder"
    if stat.S_ISREG(mode):
        return "file"
    raise PrepareError(f"{printable(given)}: a pipe, socket or device; give a file, a folder or a glob")


def _fixed_part(pattern: str) -> Path:
    """The longest folder of a pattern that holds no wildcard."""
    return next(parent for parent in Path(pattern).parents if not glob.has_magic(str(parent)))


State = frozenset[int]


class _Pattern:
    """A glob, read name by name from its first wildcard on.

    A state holds the positions in the pattern that a path can have reached: none when nothing below it can match.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self.start = self._closure(0)

    def _closure(self, at: int) -> State:
        """`**` also matches no folder at all."""
        further = self._closure(at + 1) if at < len(self.names) and self.names[at] == "**" else frozenset()
        return further | {at}

    def step(self, state: State, name: str) -> State:
        """The state after one more name of a path."""
        reached: State = frozenset()
        for at in state - {len(self.names)}:
            if self._fits(name, self.names[at]):
                reached |= self._closure(at if self.names[at] == "**" else at + 1)
        return reached

    def _fits(self, name: str, wanted: str) -> bool:
        if name.startswith(".") and not wanted.startswith("."):
            return False
        return wanted == "**" or fnmatch.fnmatchcase(name, wanted)

    def matches(self, state: State) -> bool:
        return len(self.names) in state


class _Everything(_Pattern):
    """What a folder as an input matches: all that it holds, also what is hidden."""

    def __init__(self) -> None:
        super().__init__(("**",))

    def _fits(self, name: str, wanted: str) -> bool:
        return True


class _Walk:
    """Collects files below folders.

    Real folders are read first, links to folders after them, so that a folder that is reachable both ways has its real
    name. A folder is known by its real path, so a link into a folder that was read adds nothing, and loops end.
    """

    def __init__(self, without: Path | None) -> None:
        self.files: list[str] = []
        self.left_out: dict[tuple[str, str], LeftOut] = {}
        self.not_empty: set[str] = set()
        """The inputs in which a file was found, or that had been read already as part of another."""
        self._without = None if without is None else os.path.realpath(without)
        self._places: set[tuple[str, str]] = set()
        self._read: set[tuple[str, tuple[str, ...], State]] = set()
        self._links: list[tuple[str, str, _Pattern, State]] = []
        self._everything = _Everything()

    def add_file(self, path: str) -> None:
        """Adds a file, unless it was added under another name of its folder."""
        folder, name = os.path.split(path)
        place = (os.path.realpath(folder), name)
        if place not in self._places:
            self._places.add(place)
            self.files.append(path)

    def add_folder(self, folder: str) -> None:
        """Reads the real folders below `folder`; links wait for `follow_links`."""
        self._read_tree(str(Path(folder)), folder, self._everything, self._everything.start)

    def add_pattern(self, glob_pattern: str) -> None:
        """Reads the real folders in which files can match; links wait for `follow_links`."""
        root = _fixed_part(glob_pattern)
        pattern = _Pattern(Path(glob_pattern).relative_to(root).parts)
        if root.is_dir():
            top = glob_pattern[: len(glob_pattern) - len("/".join(pattern.names))].rstrip("/") or root.anchor
            self._read_tree(top, glob_pattern, pattern, pattern.start)

    def follow_links(self) -> None:
        while self._links:
            links, self._links = sorted(self._links, key=lambda link: link[0]), []
            for link in links:
                self._read_tree(*link)

    def _read_tree(self, top: str, given: str, pattern: _Pattern, state: State) -> None:
        """Reads a folder and the real folders below it. given: the input by which it was reached."""
        pending = [(top, state)]
        while pending:
            folder, state = pending.pop()
            real = os.path.realpath(folder)
            if real == self._without:
                continue
            if (real, pattern.names, state) in self._read:
                self.not_empty.add(given)
                continue
            self._read.add((real, pattern.names, state))
            try:
                names = sorted(os.listdir(folder or "."))
            except OSError as err:
                self._leave_out("unreadable", folder, f"this folder cannot be read ({err.strerror})")
                continue
            for name in names:
                reached = pattern.step(state, name)
                if not reached:
                    continue
                path = name if folder in ("", ".") else os.path.join(folder, name)
                kind = self._classify(path, counts=pattern.matches(reached))
                if kind == "file":
                    self.add_file(path)
                    self.not_empty.add(given)
                elif kind == "folder" and reached == {len(pattern.names)}:
                    what = "the glob matches this folder; give it as an INPUT to read it"
                    self._leave_out("unread_folder", path, what)
                elif kind == "folder" and os.path.islink(path):
                    self._links.append((path, given, pattern, reached))
                elif kind == "folder":
                    pending.append((path, reached))

    def _classify(self, path: str, *, counts: bool) -> str | None:
        """ "folder", "file" when it can be text, otherwise None, after it was counted as left out.

        counts: whether a file of this name is wanted; otherwise only a folder matters.
        """
        try:
            mode = os.stat(path).st_mode
        except OSError as err:
            if err.errno not in NOWHERE:
                self._leave_out("unreadable", path, f"cannot be read ({err.strerror})")
            elif counts:
                self._leave_out("dangling_link", path, "a link to what does not exist")
            return None
        if stat.S_ISDIR(mode):
            return "folder"
        if not counts:
            return None
        if not stat.S_ISREG(mode):
            self._leave_out("special_file", path, "a pipe, socket or device")
        elif not known_suffix(path):
            self._leave_out("unknown_kind", path, "a suffix that is not supported")
        else:
            return "file"
        return None

    def _leave_out(self, kind: str, path: str, what: str) -> None:
        self.left_out[path, kind] = LeftOut(kind, printable(path), what)
