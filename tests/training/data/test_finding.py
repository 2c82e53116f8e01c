"""Every file below the inputs is read once, or counted and named."""

from __future__ import annotations

import os
import socket
from collections import Counter
from pathlib import Path

import pytest
from support.permissions import permissions_apply

from training.data.corpus import PrepareError, Reading, Source, read_documents
from training.data.finding import Found, find_files


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "other" / "deep").mkdir(parents=True)
    for name in ("in/a.txt", "in/sub/b.txt", "other/c.txt", "other/deep/d.txt"):
        (tmp_path / name).write_text(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(found: Found) -> list[str]:
    return [source.path for source in found.sources]


def left_out(found: Found) -> list[tuple[str, str]]:
    return [(item.kind, item.where) for item in found.left_out]


def test_folders_behind_links_are_read(here):
    (here / "in" / "link").symlink_to("../other")
    found = find_files(["in"])
    assert names(found) == ["in/a.txt", "in/link/c.txt", "in/link/deep/d.txt", "in/sub/b.txt"]
    assert left_out(found) == []


def test_loops_end_and_nothing_is_read_twice(here):
    for path, target in [
        ("in/loop", "."),
        ("in/sub/up", ".."),
        ("in/first", "../other/deep"),
        ("in/second", "../other"),
        ("other/deep/back", "../../in"),
    ]:
        (here / path).symlink_to(target)
    found = find_files(["in"])
    assert Counter(map(os.path.realpath, names(found))).most_common(1)[0][1] == 1
    assert names(found) == ["in/a.txt", "in/first/d.txt", "in/second/c.txt", "in/sub/b.txt"]
    assert len(find_files(["in/**/*.txt"]).sources) == 4


def test_a_real_folder_keeps_its_name_when_a_link_leads_to_it_too(here):
    (here / "in" / "aaa").symlink_to("sub")
    assert names(find_files(["in"])) == ["in/a.txt", "in/sub/b.txt"]
    assert names(find_files(["in/sub", "in"])) == names(find_files(["in", "in/sub"])) == ["in/a.txt", "in/sub/b.txt"]


def test_what_is_no_text_is_counted_and_named(here):
    (here / "in" / "gone.txt").symlink_to("nowhere")
    (here / "in" / "circle").symlink_to("circle")
    (here / "in" / "table.csv").write_text("a,b")
    os.mkfifo(here / "in" / "pipe.txt")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("in/socket.txt")
        expected = [
            ("dangling_link", "in/circle"),
            ("dangling_link", "in/gone.txt"),
            ("special_file", "in/pipe.txt"),
            ("special_file", "in/socket.txt"),
            ("unknown_kind", "in/table.csv"),
        ]
        assert left_out(find_files(["in"])) == left_out(find_files(["in/**"])) == expected
    for given, words in {"in/gone.txt": "a link to nowhere", "in/pipe.txt": "a pipe, socket or device"}.items():
        with pytest.raises(PrepareError, match=words):
            find_files([given])


def test_a_folder_that_a_glob_matches_is_not_read_but_named(here):
    found = find_files(["in/*"])
    assert names(found) == ["in/a.txt"] and left_out(found) == [("unread_folder", "in/sub")]
    assert left_out(find_files(["in/**"])) == []


def test_folders_without_permission_are_named(here):
    (here / "in" / "sub").chmod(0)
    (here / "other" / "deep").chmod(0o400)  # its names can be listed, its files cannot be opened
    try:
        with permissions_apply():
            assert left_out(find_files(["in"])) == [("unreadable", "in/sub")]
            assert left_out(find_files(["in/**/*.txt"])) == [("unreadable", "in/sub")]
            assert left_out(find_files(["in/a.*"])) == []
            assert left_out(find_files(["other"])) == [("unreadable", "other/deep/d.txt")]
            with pytest.raises(PrepareError, match=r"in/sub: no file ending in .*cannot be read \(Permission denied\)"):
                find_files(["in/sub"])
            with pytest.raises(PrepareError, match=r"in/sub/\*.txt: Permission denied"):
                find_files(["in/sub/*.txt"])
            with pytest.raises(PrepareError, match="in/sub/b.txt: Permission denied"):
                find_files(["in/sub/b.txt"])
    finally:
        (here / "in" / "sub").chmod(0o700)
        (here / "other" / "deep").chmod(0o700)


def test_a_file_without_permission_is_an_unreadable_document(here):
    (here / "in" / "a.txt").chmod(0)
    with permissions_apply():
        (item,) = read_documents(Source("in/a.txt", "in/a.txt", "a"), Reading("text", None, 1 << 20))
    assert item.kind == "unreadable" and "in/a.txt" in str(item) and "Permission denied" in str(item)


def test_the_dataset_itself_is_no_input(here):
    (here / "in" / "out" / "work").mkdir(parents=True)
    (here / "in" / "out" / "work" / "scan.npz").write_text("x")
    found = find_files(["in"], without=here / "in" / "out")
    assert names(found) == ["in/a.txt", "in/sub/b.txt"] and left_out(found) == []
    with pytest.raises(PrepareError, match="in is both INPUT and --out"):
        find_files(["in"], without=here / "in" / "sub" / "..")


def test_names_that_are_not_utf8_or_hold_control_characters_are_printable(here):
    for name in (b"caf\xe9.txt", b"red\x1b[31m.txt", "ordinär 日本.txt".encode()):
        with open(os.path.join(b"in", name), "wb") as file:
            file.write(name)
    found = find_files(["in"])
    shown = [source.name for source in found.sources]
    assert "in/caf\\xe9.txt" in shown and "in/red\\x1b[31m.txt" in shown and "in/ordinär 日本.txt" in shown
    texts = {source.name: next(read_documents(source, Reading("text", None, 1 << 20))) for source in found.sources}
    assert texts["in/red\\x1b[31m.txt"].text == "red\x1b[31m.txt"
