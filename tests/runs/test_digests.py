"""Digests of files equal those of `sha256sum`, and change with a byte or a name."""

import hashlib

import pytest

from rora_theory.errors import InputError
from rora_theory.runs import digests


def test_a_digest_is_what_sha256sum_prints(tmp_path):
    contents = {"b.json": b"two", "B.json": b"", "a.json": b"one"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    assert {name: digests.of_file(tmp_path / name) for name in contents} == sums
    printed = "".join(f"{sums[name]}  {name}\n" for name in ("B.json", "a.json", "b.json"))
    whole = digests.of_files(tmp_path / name for name in contents)
    assert whole == hashlib.sha256(printed.encode()).hexdigest()
    (tmp_path / "b.json").write_bytes(b"twp")
    assert digests.of_files(tmp_path / name for name in contents) != whole


def test_a_file_that_can_t_be_read_is_named(tmp_path):
    with pytest.raises(InputError, match="none: no such file"):
        digests.of_file(tmp_path / "none")
