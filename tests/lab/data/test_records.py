"""Records are read from files of every kind; an invalid one is named by file, place and key."""

import json
import re
import socket

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.chat_templates import turns
from support.record_files import write

from rora_theory.errors import InputError
from rora_theory.lab.data.formats import Text
from rora_theory.lab.data.records import DataConfig
from rora_theory.lab.finetune import Record, read_records

QUESTION, ANSWER = turns("Ähm?", "Yes.")
GOOD = {"instruction": "Say it.", "input": "", "output": "It.", "answer": "it"}


def test_reads_several_files_in_order(tmp_path):
    first = write(tmp_path / "a.json", [GOOD, GOOD | {"output": "Two.", "input": "More."}])
    second = tmp_path / "b.jsonl"
    write(second, json.dumps(GOOD | {"instruction": "Ähm"}) + "\n\n" + json.dumps(GOOD) + "\n")
    assert read_records([first, second]) == [
        Record("Say it.", "It."),
        Record("Say it.", "Two.", "More."),
        Record("Ähm", "It."),
        Record("Say it.", "It."),
    ]


def test_a_file_is_not_named_twice(tmp_path, monkeypatch):
    """A file under two names would put one record into both parts. Equal records of two files are no error."""
    (tmp_path / "data").mkdir()
    path = write(tmp_path / "data" / "train.json", [GOOD] * 4)
    other = write(tmp_path / "data" / "other.json", [GOOD] * 4)
    (tmp_path / "link.json").symlink_to(path)
    monkeypatch.chdir(tmp_path)
    for sources in (
        [path, path],
        [str(path), other, "data/../data/train.json"],
        [path, "link.json"],
        ["data:train", "data:train"],
    ):
        with pytest.raises(InputError, match=r"data .*different.*train"):
            read_records(sources)
    assert len(read_records([path, other])) == 8


@pytest.mark.parametrize(
    ("name", "content", "contents"),
    [
        ("one_object.json", '{"text": "a"}\n', ["a"]),
        ("lines.json", '{"text": "a"}\n\n{"text": "b"}\n', ["a", "b"]),
        ("plain.txt", "one\n\ntwo\n", ["one", "two"]),
        ("mark.txt", b"\xef\xbb\xbfa", ["a"]),
        ("mark.jsonl", b'\xef\xbb\xbf{"text": "a"}', ["a"]),
        # No other character that Python takes for a line's end ends a line.
        ("feeds.txt", "a\u2028b\nc\x85d\x0be\x0cf\x1cg\n\ni", ["a\u2028b", "c\x85d\x0be\x0cf\x1cg", "i"]),
        ("returns.txt", "a\u2028b\r\nc\x85d\r\n\r\ni", ["a\u2028b", "c\x85d", "i"]),
    ],
)
def test_lines(tmp_path, name, content, contents):
    """JSON lines are read also from a .json file, and after a byte-order mark."""
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert read_records([path]) == list(map(Text, contents))


def test_a_file_is_read_without_the_network(tmp_path, monkeypatch):
    """`datasets.load_dataset` would report each file to a server, also if its counts are on by default."""
    import datasets

    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *args, **more: asked.append(host))
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    table = pd.DataFrame([GOOD])
    table.to_csv(tmp_path / "a.csv", index=False)
    table.to_parquet(tmp_path / "b.parquet")
    write(tmp_path / "c.txt", "one\n")
    write(tmp_path / "d.json", [GOOD])
    for path in sorted(tmp_path.iterdir()):
        assert len(read_records([path])) == 1
    assert not asked


def test_cells_of_a_csv_file_are_texts(tmp_path):
    """Neither numbers nor the names of missing values are converted."""
    path = write(tmp_path / "x.csv", 'instruction,output,input\nWhich agent?,007,\n"Say,\nit.",NA,More\n')
    assert read_records([path]) == [Record("Which agent?", "007"), Record("Say,\nit.", "NA", "More")]


def test_a_key_that_only_a_late_record_has(tmp_path):
    """`datasets` reads large files in chunks of 10 MB, whose columns are those of the first chunk."""
    rows = [{"instruction": "Q", "output": "a" * 2_000_000}] * 6 + [{"instruction": "Q", "output": "A", "input": "I"}]
    assert read_records([write(tmp_path / "x.jsonl", rows)])[-1] == Record("Q", "A", "I")


NOT_UTF_8 = pa.StringArray.from_buffers(1, pa.py_buffer(np.array([0, 2], np.int32)), pa.py_buffer(b"\xff\xfe"))
TOO_LATE = pa.array([2**62], pa.timestamp("ms"))


@pytest.mark.parametrize("column", [NOT_UTF_8, TOO_LATE])
def test_values_that_python_cannot_hold_are_refused_where_they_are_read(tmp_path, column):
    pq.write_table(pa.table({"text": ["a"], "other": column}), tmp_path / "x.parquet")
    assert read_records([tmp_path / "x.parquet"]) == [Text("a")]
    pq.write_table(pa.table({"text": column}), tmp_path / "y.parquet")
    with pytest.raises(InputError, match=r"y\.parquet: .* after 0 ") as caught:
        read_records([tmp_path / "y.parquet"])
    assert "\n" not in str(caught.value)


def test_the_name_of_a_file_is_no_pattern(tmp_path):
    assert read_records([write(tmp_path / "x[1]*.jsonl", [GOOD])]) == [Record("Say it.", "It.")]


def test_objects_of_different_keys_stay_as_they_are(tmp_path):
    """Tools and their arguments have keys of their own, to which a table would add those of all others."""
    calls = [ANSWER | {"tool_calls": [{"name": "f", "arguments": {key: 1}}]} for key in "ab"]
    tools = [{"name": "f", "parameters": {"properties": {key: {"type": "number"}}}} for key in "ab"]
    rows = [{"messages": [QUESTION, call], "tools": [tool]} for call, tool in zip(calls, tools, strict=True)]
    for record, row in zip(read_records([write(tmp_path / "x.jsonl", rows)]), rows, strict=True):
        assert list(record.messages) == row["messages"]
        assert list(record.tools) == row["tools"]


def test_reads_the_commonsense_data(commonsense_dir):
    files = [commonsense_dir / task / "train.json" for task in ("ARC-Easy", "ARC-Challenge", "openbookqa")]
    records = read_records(files)
    assert len(records) == 2251 + 1119 + 4957
    assert records[2251].instruction.startswith("Please choose the correct answer to the question: George wants")
    assert all(record.output.startswith("the correct answer is answer") for record in records)


def test_all_bad_records_are_counted_and_the_first_ten_are_listed(tmp_path):
    """The count includes records of several files."""
    first = write(tmp_path / "a.json", [GOOD, {"output": "x"}, GOOD])
    second = write(tmp_path / "b.jsonl", [GOOD, *[GOOD | {"output": 3}] * 12])
    third = write(tmp_path / "c.csv", "instruction,output\nSay it.,\n")
    places = (r"\(1\) \S*a\.json: record 2 has no 'instruction'", r"\(2\) \S*c\.csv: record 1: 'output' .* empty")
    with pytest.raises(InputError, match=r"^2 of 4 records.*" + ".*".join(places)):
        read_records([first, third])
    with pytest.raises(InputError, match=r"^13 of 16 records.* 10.*b\.jsonl: record 8: 'output'") as caught:
        read_records([first, second])
    assert re.findall(r"\((\d+)\)", str(caught.value)) == [str(number) for number in range(1, 11)]
    assert "\n" not in str(caught.value)


PARTS = [{"type": "text", "text": "Ähm"}, {"type": "thinking", "text": "Hm."}]
PREFERRED = {"prompt": [QUESTION], "completion": [ANSWER]}
SENT = {"sent": pd.Timestamp("2026-01-31")}


def after_good(*messages):
    """Return rows of two chats, of which the first is good."""
    return [{"messages": [QUESTION, ANSWER]}, {"messages": list(messages)}]


def call(arguments):
    """Return a turn that calls a tool."""
    function = {"name": "weather", "arguments": arguments}
    return ANSWER | {"tool_calls": [{"id": "1", "type": "function", "function": function}]}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        # What is no file of records.
        ("cut.json", json.dumps([GOOD])[:-9], r"cut\.json: cannot be read as json \(.*\).* a \.json, "),
        ("cut.jsonl", json.dumps(GOOD) + "\n{", r"cut\.jsonl: record 2 is not a JSON object"),
        ("empty.jsonl", "\n", r"empty\.jsonl: has no records"),
        ("empty.json", "[]", r"empty\.json: has no records"),
        ("latin.json", b'[{"instruction": "\xe9"}]', r"latin\.json: cannot be read as json \(.*UTF-8"),
        ("x.parquet", b"PAR1 and no more PAR1", r"x\.parquet: cannot be read as parquet \(.*\)"),
        # What is no record.
        ("x.json", [GOOD, GOOD, {}], r"x\.json: record 3 has no 'instruction'; its keys are none"),
        ("x.json", [GOOD, GOOD | {"output": None}], r"record 2 has no 'output'; its keys are 'instruction', 'input'"),
        ("x.json", [GOOD, "text"], r"x\.json: record 2 is not a JSON object"),
        ("x.json", [GOOD | {"output": 3}], "record 1: 'output' .* string, got a number"),
        ("x.json", [GOOD | {"instruction": ""}], "record 1: 'instruction' .* empty"),
        ("x.json", {"data": [GOOD]}, r"x\.json: record 1: keys .* 'data'"),
        # What is no chat.
        ("x.jsonl", [*after_good()[:1], {"messages": "hi"}], r"x\.jsonl: record 2: 'messages' .* got a string"),
        ("x.jsonl", after_good("hi"), "record 2: 'messages' .* objects, got a string at 0"),
        ("x.json", after_good({"content": "a"}), r"x\.json: record 2: messages 0 has no 'role'; its keys are"),
        ("x.json", after_good(QUESTION, {"role": "assistant"}), "record 2: messages 1 has no 'content'"),
        ("x.json", after_good({"role": "user", "content": [1]}), "messages 0: 'content' .* a number at 0"),
        ("x.json", after_good(QUESTION | {"content": PARTS}), "messages 0: 'content' .* 'thinking' at 1"),
        ("x.json", after_good(QUESTION), "record 2: 'messages' .* assistant turn"),
        ("x.parquet", after_good(QUESTION), r"x\.parquet: record 2: 'messages' .* assistant turn"),
        (
            "x.parquet",
            after_good(QUESTION | SENT, ANSWER | SENT),
            r"record 2: 'messages' .* JSON .*date",
        ),
        ("x.json", after_good(QUESTION, ANSWER | {"weight": 0.5}), "messages 1: 'weight' .* 0.5"),
        ("x.json", after_good(QUESTION, ANSWER | {"weight": "0"}), "messages 1: 'weight' .* '0'"),
        ("x.json", after_good(QUESTION, ANSWER | {"weight": 0}), "'messages' .* weight 0"),
        ("x.json", after_good(QUESTION, call("{city")), "record 2: messages 1: arguments of tool_calls 0: is not JSON"),
        ("x.json", after_good(QUESTION, call('["Bonn"]')), "messages 1: arguments of tool_calls 0 .* a list"),
        ("x.json", after_good(QUESTION, call('{"city": "\\ud800"}')), "record 2: 'messages' .* Unicode .*surrogates"),
        ("x.json", [PREFERRED | {"prompt": "Sure?"}], "record 1: 'completion' .* string, got a list"),
        ("x.json", [{"conversations": [{"from": "narrator"}]}], "conversations 0 has no 'value'"),
        (
            "x.json",
            [{"conversations": [{"from": "narrator", "value": "..."}]}],
            "conversations 0: 'from' .* human, user, gpt.* 'narrator'",
        ),
    ],
)
def test_bad_files_and_records_are_named(tmp_path, name, content, message):
    with pytest.raises(InputError, match=message) as caught:
        read_records([write(tmp_path / name, content)])
    assert "\n" not in str(caught.value)


def test_missing_sources_and_formats_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"none\.json: no such file.* a \.json, \.jsonl, "):
        read_records([tmp_path / "none.json"])
    with pytest.raises(InputError, match=r"is a folder.* a \.json.*FOLDER:SPLIT"):
        read_records([tmp_path])
    with pytest.raises(InputError, match=r"^data .*source"):
        read_records([])
    source = write(tmp_path / "y.json", [{"q": "1", "a": "2"}])
    with pytest.raises(InputError, match=r"y\.json: record 1: .* 'q', 'a'.* messages \(messages\), .* as fields"):
        read_records([source])
    with pytest.raises(InputError, match=r"y\.json: record 1 has no 'text'; its keys are 'q', 'a'"):
        read_records([source], DataConfig(format="text"))
