"""Records are read from files and the hub's cache; a bad one is named by file and index."""

import json
import re

import pytest

from rora_theory.data.formats import Text
from rora_theory.errors import InputError
from rora_theory.finetune import Record, read_records

GOOD = {"instruction": "Say it.", "input": "", "output": "It.", "answer": "it"}


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_reads_several_files_in_order(tmp_path):
    first = write(tmp_path / "a.json", json.dumps([GOOD, GOOD | {"output": "Two.", "input": "More."}]))
    second = write(tmp_path / "b.jsonl", json.dumps(GOOD | {"instruction": "Ähm"}) + "\n\n" + json.dumps(GOOD) + "\n")
    assert read_records([first, str(second)]) == [
        Record("Say it.", "It."),
        Record("Say it.", "Two.", "More."),
        Record("Ähm", "It."),
        Record("Say it.", "It."),
    ]


def test_one_object_on_one_line_is_an_object_a_line(tmp_path):
    assert read_records([write(tmp_path / "a.json", json.dumps(GOOD) + "\n")]) == [Record("Say it.", "It.")]


def test_a_line_ends_where_its_file_says(tmp_path):
    """At a newline, with a carriage return or without, and at no other sign that Python takes for a line's end."""
    lines = ["a\u2028b", "c\x85d\x0be\x0cf\x1cg\rh", "", "i"]
    for end in ("\n", "\r\n"):
        path = write(tmp_path / "a.txt", end.join(lines))
        assert [record.text for record in read_records([path])] == [*lines[:2], "i"]


@pytest.mark.parametrize(("name", "content"), [("a.txt", "It."), ("a.jsonl", '{"text": "It."}')])
def test_a_byte_order_mark_is_no_text(tmp_path, name, content):
    path = write(tmp_path / name, b"\xef\xbb\xbf" + content.encode())
    assert read_records([path]) == [Text("It.")]


def test_reads_the_commonsense_data(commonsense_dir):
    files = [commonsense_dir / task / "train.json" for task in ("ARC-Easy", "ARC-Challenge", "openbookqa")]
    records = read_records(files)
    assert len(records) == 2251 + 1119 + 4957
    assert records[2251].instruction.startswith("Please choose the correct answer to the question: George wants")
    assert all(record.output.startswith("the correct answer is answer") for record in records)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_null_is_a_key_that_is_not_there(tmp_path, name):
    path = write(tmp_path / name, json.dumps(GOOD | {"input": None}))
    assert read_records([path]) == [Record("Say it.", "It.")]


def test_all_bad_records_are_counted_and_the_first_ten_are_listed(tmp_path):
    """Those of several files, and lines that are not JSON too."""
    first = write(tmp_path / "a.json", json.dumps([GOOD, {"output": "x"}, GOOD, "text"]))
    second = write(tmp_path / "b.jsonl", "\n".join([json.dumps(GOOD), "{", *[json.dumps(GOOD | {"output": 3})] * 11]))
    third = write(tmp_path / "c.jsonl", "\n".join([json.dumps(GOOD), "{"]))
    with pytest.raises(InputError, match=r"^3 of 6 records") as caught:
        read_records([first, third])
    places = (
        r"\(1\) \S*a\.json: record 1 has no 'instruction'",
        r"\(2\) \S*a\.json: record 3",
        r"\(3\) \S*c\.jsonl: line 2: is not J",
    )
    assert re.search(".*".join(places), str(caught.value))
    with pytest.raises(InputError, match=r"^14 of 17 records.* 10") as caught:
        read_records([first, second])
    listed = str(caught.value)
    assert "(10)" in listed
    assert "b.jsonl: line 9: 'output'" in listed
    assert "(11)" not in listed
    assert "\n" not in listed


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([GOOD, {"instruction": "x"}], r"bad\.json: record 1 has no 'output'; its keys are 'instruction'"),
        ([GOOD, GOOD, {}], r"record 2 has no 'instruction'; its keys are none"),
        ([GOOD, "text"], r"record 1 must be an object, got a string"),
        ([GOOD | {"output": 3}], r"record 0: 'output' must be a string, got a number"),
        ([GOOD, GOOD | {"output": None}], r"record 1 has no 'output'; its keys are 'instruction', 'input', 'answer'"),
        ([GOOD | {"instruction": ""}], r"record 0: 'instruction' .* empty"),
        ([GOOD | {"output": "\ud800"}], r"record 0: 'output' .* half a surrogate pair"),
        ({"data": [GOOD]}, r"bad\.json: line 1: keys .* 'data'"),
        ([], r"bad\.json: has no records"),
    ],
)
def test_bad_records_are_named(tmp_path, content, message):
    path = write(tmp_path / "bad.json", json.dumps(content))
    with pytest.raises(InputError, match=message):
        read_records([path])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("cut.json", json.dumps([GOOD])[:-9], r"cut\.json: is not JSON .* a list"),
        ("lines.json", json.dumps(GOOD, indent=1), r"lines\.json: .* a list of records, got an object"),
        ("empty.json", "", r"empty\.json: is not JSON"),
        ("deep.json", "[" * 100_000, r"deep\.json: .* 64 "),
        ("cut.jsonl", json.dumps(GOOD) + "\n{", r"cut\.jsonl: line 2: is not JSON"),
        ("empty.jsonl", "\n", r"empty\.jsonl: has no records"),
        ("latin.json", b'[{"instruction": "\xe9"}]', r"latin\.json: byte 18 is not UTF-8"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    with pytest.raises(InputError, match=message):
        read_records([write(tmp_path / name, content)])


def test_missing_files_and_none_at_all_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"none\.json: no such file.* a \.json, \.jsonl, "):
        read_records([tmp_path / "none.json"])
    with pytest.raises(InputError, match="data must name at least one source"):
        read_records([])


def test_hub_files_are_taken_at_their_revision(tmp_path, monkeypatch):
    path = write(tmp_path / "x.json", json.dumps([GOOD]))
    asked = []

    def download(repository, filename, **options):
        asked.append((repository, filename, options))
        return str(path)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert read_records(["hf://datasets/them/set@v1/train/x.json"]) == [Record("Say it.", "It.")]
    assert asked == [("them/set", "train/x.json", {"repo_type": "dataset", "revision": "v1"})]


def test_hub_failures_are_one_line(monkeypatch):
    def download(*_, **__):
        raise OSError("no route\nmany lines")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(InputError, match=r"^hf://datasets/them/set/x.json: cannot be downloaded \(no route\)"):
        read_records(["hf://datasets/them/set/x.json"])
    with pytest.raises(InputError, match="them/set: not the name of a file or split"):
        read_records(["hf://datasets/them/set"])
