"""A user's files are read completely, or refused in one line before memory is allocated."""

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rora_theory.errors import InputError
from rora_theory.runs import files
from rora_theory.runs.folder import RunFolder


def test_a_file_is_read_completely(tmp_path: Path) -> None:
    (path := tmp_path / "a.json").write_bytes(b'{"a": ["\xc3\xa9", 1.5]}\r\n')
    assert files.read_json(path) == {"a": ["é", 1.5]}
    assert files.read_text(path).endswith("}\r\n")
    assert files.read_bytes(path) == path.read_bytes()
    assert files.read_bytes("/proc/self/cmdline")  # a file whose size is given as 0


def test_folders_are_not_read(tmp_path: Path) -> None:
    for read in (files.read_json, files.check_regular):
        with pytest.raises(InputError, match=rf"^{tmp_path}: .*(a|A|a )(folder|directory).* Expected a list.$"):
            read(tmp_path, accepted="a list")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing", "no such file"),
        ("x" * 300, "File name too long"),
        ("file/below", "Not a directory"),
        ("nul\0byte", "null"),
        ("latin\udce9", "no such file"),
    ],
)
def test_paths_that_name_no_file_are_refused(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "file").touch()
    for read in (files.read_json, files.check_regular):
        with pytest.raises(InputError, match=rf"{reason}.* Expected a list"):
            read(tmp_path / name, accepted="a list")


def test_text_and_json_are_refused_by_place(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for content, message in (
        (b'["ab\xff"]', "byte 4 is not UTF-8"),
        (b'["ab"', r"is not JSON \(.*line 1 column 6"),
        (b"[1]", r"holds a list\. Expected a JSON object"),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match=message):
            files.read_object(path)
    path.write_text("{}")
    assert files.read_object(path) == {}
    with pytest.raises(InputError, match=r"^a: line 3: is not JSON \(.*4300 digits"):
        files.parse_json("9" * 5000, where="a: line 3")


def test_deep_json_is_refused() -> None:
    with pytest.raises(InputError, match=r"^a: is not JSON"):
        files.parse_json("[" * 100_000, where="a")


@pytest.mark.parametrize(
    "text", ["a: [", "a: *b", "a: !!int x", "a: 1\na: 2", "!!python/object:os.system {}", "[" * 9999]
)
def test_yaml_that_cannot_be_read_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(InputError, match=r"^run\.yml: is not YAML \(") as error:
        files.parse_yaml(text, where="run.yml")
    assert "\n" not in str(error.value)


def test_yaml_is_read() -> None:
    text = "a: [1, 2.5, 3e-4, yes]  # a comment\nb: {c: null}\n"
    assert files.parse_yaml(text, where="") == {"a": [1, 2.5, 3e-4, "yes"], "b": {"c": None}}


@contextmanager
def nobody() -> Iterator[None]:
    """Switch to another user if the tests run as root, who may read and write everything."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_files_without_permission_are_refused() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (file := folder / "a.json").write_text("[]")
        (empty := folder / "empty").mkdir()
        empty.chmod(0o555)
        file.chmod(0o000)
        folder.chmod(0o555)
        with nobody():
            with pytest.raises(
                InputError, match=r"a.json: cannot be read \(Permission denied\)\. Expected a JSON file"
            ):
                files.read_json(file)
            with pytest.raises(InputError, match=r"\.lock: cannot be opened \(Permission denied\)\. Use a writable"):
                RunFolder.open("name", {}, out=empty)
            with pytest.raises(
                InputError, match=r"run/deeper: cannot be created \(Permission denied\)\. Use a writable"
            ):
                RunFolder.open("name", {}, out=folder / "run" / "deeper")
        for changed in (folder, empty):
            changed.chmod(0o755)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("file", "File exists"),
        ("file/run", "Not a directory"),
        ("new/" + "x" * 256, "File name too long"),
        ("loop/run", "symbolic links"),
        ("nul\0byte", "null (byte|character)"),
    ],
)
def test_a_folder_that_cannot_be_created_is_refused(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InputError, match=rf"cannot be created \(.*{message}.*\)\. Use a writable folder"):
        RunFolder.open("name", {}, out=tmp_path / name)


def test_a_full_disk_preserves_the_old_file_and_is_named(tmp_path, full_disk):
    path = tmp_path / "results.csv"
    files.write_whole(path, "old figures")
    full_disk()
    with pytest.raises(InputError, match=r"results\.csv: cannot be written \(No space left on device\)"):
        files.write_whole(path, "new figures")
    assert path.read_text() == "old figures"
    assert list(tmp_path.iterdir()) == [path], "no temporary file remains"


def test_no_symbolic_link_is_followed(tmp_path):
    """A link in place of a file is replaced, and a journal is not written through one."""
    victim, path = tmp_path / "victim", tmp_path / "results.csv"
    victim.write_text("mine")
    path.symlink_to(victim)
    files.write_whole(path, "figures")
    assert (path.read_text(), path.is_symlink(), victim.read_text()) == ("figures", False, "mine")
    link = tmp_path / "cells.jsonl"
    link.symlink_to(victim)
    with pytest.raises(InputError, match=r"cells\.jsonl: cannot be written"):
        files.append(link, "line\n")
    assert victim.read_text() == "mine"


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_are_the_umask_s(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        files.write_whole(tmp_path / "a", "x")
        files.append(tmp_path / "b", "x\n")
    finally:
        os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in "ab"] == [mode, mode]


@pytest.mark.parametrize("name", ["/etc/passwd", "../mine", "a/../../mine", "link/file", "", ".", "a\0b", 3, None])
def test_a_name_that_leads_outside_a_folder_is_refused(tmp_path: Path, name: object) -> None:
    (folder := tmp_path / "run").mkdir()
    (folder / "link").symlink_to(tmp_path)
    with pytest.raises(InputError, match=re.escape(f"manifest.json: names {name!r}, which is not a path inside")):
        files.resolve_inside(folder, name, where="manifest.json")


def test_links_are_followed_only_inside_a_folder(tmp_path: Path) -> None:
    (folder := tmp_path / "run").mkdir()
    (folder / "file").write_text("")
    (folder / "inner").symlink_to("file")
    files.check_links(folder)
    for name in ("file", "inner", "new/file"):
        assert files.resolve_inside(folder, name, where="") == folder / name
    (tmp_path / "shard").write_text("")
    (folder / "sub").mkdir()
    (folder / "sub" / "outer").symlink_to(tmp_path / "shard")
    with pytest.raises(InputError, match="outer: symbolic link out of"):
        files.check_links(folder)
    (folder / "sub" / "outer").unlink()
    (folder / "sub" / "circle").symlink_to("circle")
    with pytest.raises(InputError, match="circle: symbolic link"):
        files.check_links(folder)
