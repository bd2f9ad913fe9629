"""Files of a user's are read whole, or refused in one line before memory goes."""

import os
from pathlib import Path

import pytest

from rora_theory import files
from rora_theory.errors import InputError


def test_a_file_is_read_whole(tmp_path: Path) -> None:
    (path := tmp_path / "a.json").write_bytes(b'{"a": ["\xc3\xa9", 1.5]}\r\n')
    assert files.read_json(path) == {"a": ["é", 1.5]}
    assert files.read_text(path).endswith("}\r\n")
    assert files.read_bytes(path, limit=path.stat().st_size) == path.read_bytes()
    assert files.read_bytes("/proc/self/cmdline")  # a file whose size is given as 0


def test_what_does_not_end_is_not_begun(tmp_path: Path) -> None:
    """A device would take all memory, a pipe without a writer waits for ever."""
    os.mkfifo(pipe := tmp_path / "pipe")
    os.symlink("/dev/zero", link := tmp_path / "link")
    for path, kind in ((pipe, "a pipe"), (link, "a device"), (Path("/dev/zero"), "a device"), (tmp_path, "a folder")):
        with pytest.raises(InputError, match=f"^{path}: is {kind}; accepted is a list$"):
            files.read_json(path, accepted="a list")


def test_a_file_above_the_limit_is_not_read(tmp_path: Path) -> None:
    (path := tmp_path / "a.txt").write_bytes(b"12345")
    assert files.read_bytes(path, limit=5) == b"12345"
    with pytest.raises(InputError, match="has more than 4 bytes, the most that are read; accepted is a regular file"):
        files.read_bytes(path, limit=4)
    with open(path, "wb") as file:
        file.truncate(1 << 40)  # a terabyte that takes no room
    with pytest.raises(InputError, match="more than 1,073,741,824 bytes"):
        files.read_text(path)


@pytest.mark.parametrize("name", ["missing", "x" * 300, "file/below", "nul\0byte", "latin\udce9"])
def test_a_name_that_names_no_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"; accepted is a JSON file$"):
        files.read_json(tmp_path / name)


def test_text_and_json_are_refused_by_place(tmp_path: Path) -> None:
    (path := tmp_path / "a.json").write_bytes(b'["ab\xff"]')
    with pytest.raises(InputError, match="byte 4 is not UTF-8"):
        files.read_json(path)
    path.write_bytes(b'["ab"')
    with pytest.raises(InputError, match=r"is not JSON \(.*line 1 column 6"):
        files.read_json(path)
    with pytest.raises(InputError, match=r"^a: line 3: is not JSON \(.*4300 digits"):
        files.parse_json("9" * 5000, where="a: line 3")


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_json_is_at_most_64_deep(opening: str) -> None:
    closing = "]" if opening == "[" else "}"

    def nested(depth: int) -> str:
        return opening * depth + "1" + closing * depth

    files.parse_json(nested(files.DEPTH), where="a")
    for depth in (files.DEPTH + 1, 900, 100_000):
        with pytest.raises(InputError, match=r"^a: is JSON more than 64 lists and objects deep; accepted is JSON$"):
            files.parse_json(nested(depth), where="a")
