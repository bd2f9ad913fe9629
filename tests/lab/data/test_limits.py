"""Hostile data and templates end in one line, in bounded time and memory; valid data give the same result."""

import json
import pickle
import random
import resource

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support import chat_templates, tiny
from support.limited_work import work

from rora_theory.errors import InputError
from rora_theory.lab.data import batches, chat, formats, limited_process, records, texts
from rora_theory.lab.data.batches import tokenize
from rora_theory.lab.data.chat import ChatTemplate
from rora_theory.lab.data.formats import Chat, Record, Text
from rora_theory.lab.data.records import read_record_set
from rora_theory.lab.llama.tokenizer import Tokenizer

EXCHANGE = tuple(chat_templates.turns("Hi", "Ho"))


def parquet(path, table, **options):
    pq.write_table(table, path, **options)
    return str(path)


def bad_text():
    """Return a string whose bytes are not UTF-8."""
    return pa.StringArray.from_buffers(1, pa.py_buffer(np.array([0, 2], np.int32)), pa.py_buffer(b"\xff\xfe"))


def messages(**more):
    """Return a column of chats of one turn, in a struct with ``more`` fields."""
    fields = {"role": pa.array(["assistant"]), "content": pa.array(["x"])} | more
    struct = pa.StructArray.from_arrays(list(fields.values()), names=[name.rstrip("2") for name in fields])
    return pa.table({"messages": pa.ListArray.from_arrays([0, 1], struct)})


TABLES = {
    "utf8": pa.table({"text": bad_text()}),
    "nested utf8": messages(sent=bad_text()),
    "zone": messages(sent=pa.array([1], pa.timestamp("us", tz="Mars/Olympus"))),
    "date": messages(sent=pa.array([2**31 - 1], pa.date32())),
    "timestamp": messages(sent=pa.array([2**62], pa.timestamp("ms"))),
    "duration": messages(sent=pa.array([2**62], pa.duration("s"))),
    "duplicate field": messages(content2=pa.array(["y"])),
    "duplicate column": pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]),
    "utf8 name": pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", b"\xff"]),
}


@pytest.mark.parametrize("name", TABLES)
def test_values_that_python_cannot_hold_are_refused(name, tmp_path):
    with pytest.raises(InputError, match=r"x\.parquet: .*") as caught:
        read_record_set([parquet(tmp_path / "x.parquet", TABLES[name])])
    assert "\n" not in str(caught.value)


def test_columns_that_no_format_has_are_not_read(tmp_path):
    table = pa.table({"text": ["a"], "sent": pa.array([2**62], pa.timestamp("ms", tz="Mars/Olympus")), "b": bad_text()})
    assert read_record_set([parquet(tmp_path / "x.parquet", table)]).records == [Text("a")]
    with pytest.raises(InputError, match=r"row 0: keys .* 'sent', 'b'"):
        read_record_set([parquet(tmp_path / "y.parquet", table.drop_columns(["text"]))])


@pytest.mark.parametrize("nested", [False, True])
def test_a_small_parquet_file_that_expands_is_refused(nested, tmp_path, monkeypatch, time_limit):
    """One value is repeated a million times, as rows and as turns of one chat: 5 GB from some kilobytes."""
    text = pa.DictionaryArray.from_arrays(np.zeros(50_000, np.int32), ["x" * 100_000])
    table = pa.table({"text": text})
    if nested:
        struct = pa.StructArray.from_arrays([text, text], names=["role", "content"])
        table = pa.table({"messages": pa.ListArray.from_arrays([0, len(text)], struct)})
    source = parquet(tmp_path / "x.parquet", table, compression="zstd", store_schema=False)
    assert (tmp_path / "x.parquet").stat().st_size < 100_000
    monkeypatch.setattr(records, "MAX_TABLE_BYTES", 1 << 26)
    monkeypatch.setattr(records, "TABLE_OVERHEAD_BYTES", 1 << 29)
    with time_limit(60), pytest.raises(InputError, match=r"x\.parquet: .*67,108,864"):
        read_record_set([source])


def test_blank_lines_take_no_memory_and_keep_their_count(tmp_path, time_limit):
    (tmp_path / "x.jsonl").write_text("\n" * 30_000_000)
    with time_limit(20), pytest.raises(InputError, match="has no records"):
        read_record_set([tmp_path / "x.jsonl"])
    (tmp_path / "y.jsonl").write_text('\n\n{"text": "a"}\n \r\n\n{"text": 3}')
    with pytest.raises(InputError, match=r"line 6: 'text' .* a number"):
        read_record_set([tmp_path / "y.jsonl"])


def test_a_text_of_100_mb_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "MAX_TEXT_LENGTH", 1000)
    for row in ({"text": "a" * 1001}, {"messages": [EXCHANGE[0], EXCHANGE[1] | {"content": "\n" * 1001}]}):
        (tmp_path / "x.jsonl").write_text(json.dumps(row))
        with pytest.raises(InputError, match=r"line 1.* '(text|content)' .* got 1,001"):
            read_record_set([tmp_path / "x.jsonl"])


class Counting(tiny.ByteEncoder):
    """Tokenizer that counts the characters it is given."""

    seen = 0

    def encode_batch(self, texts):
        self.seen += sum(map(len, texts))
        return super().encode_batch(texts)


def test_only_the_beginning_of_a_long_text_is_tokenized():
    encoder = Counting()
    tokenized = tokenize([Text("ab" * 1_000_000), Text("short")], encoder, cutoff=16)
    assert tokenized[0].tolist() == [1, *b"ab" * 7, ord("a")]
    assert tokenized[1].tolist() == [1, *b"short", 2]
    assert tokenized.truncated == 1
    assert encoder.seen < 2000
    answers = tokenize(
        [Record("q" * 1_000_000, "a"), Record("q", "a" * 1_000_000)], encoder, cutoff=400, answer_only=True
    )
    assert (answers.skipped, answers.truncated, answers.lengths.tolist()) == (1, 2, [400])


@pytest.fixture(scope="module")
def tokenizer(model_folder) -> Tokenizer:
    return Tokenizer.from_folder(model_folder)


class Long(tiny.ByteEncoder):
    """Tokenizer that turns ten letters into one token, recognised by the first letter."""

    def encode_batch(self, texts):
        return [[1, *(ord(text[at]) for at in range(0, len(text), 10))] for text in texts]


@pytest.mark.parametrize(("template", "answer_only"), [("plain", True), ("chat", True), ("chat", False)])
@pytest.mark.usefixtures("no_child")
def test_a_beginning_has_the_tokens_of_the_whole_text(template, answer_only, tokenizer, monkeypatch):
    """A beginning with too few tokens is lengthened, also if turns are out of the loss."""
    draw = random.Random(0)
    written = ["".join(draw.choices(["a", "b ", "\n", "    ", "é"], k=300)) for _ in range(20)]
    options = {"template": template, "answer_only": answer_only, "chat": ChatTemplate(chat.CHATML)}
    if template == "plain":
        records, encoder, options["cutoff"] = [Record(text[:30], text[30:]) for text in written], Long(), 40
    else:
        encoder, options["cutoff"] = tokenizer, 240
        chats = [chat_templates.turns(*(text[7 * i : 7 * i + 7] for i in range(20))) for text in written]
        records = [Chat(tuple(turn | {"weight": int(i % 4 != 1)} for i, turn in enumerate(turns))) for turns in chats]
    expected = tokenize(records, encoder, **options)
    if template == "chat":
        assert {*expected.target_mask(0)[1:].tolist()} == {True, False}
    monkeypatch.setattr(batches, "CHARACTERS_PER_TOKEN", 1)
    by_beginning = tokenize(records, encoder, **options)
    assert np.array_equal(by_beginning.tokens, expected.tokens)
    assert np.array_equal(by_beginning.is_target, expected.is_target)
    assert (by_beginning.truncated, by_beginning.skipped) == (expected.truncated, expected.skipped)


HOSTILE = {
    "nested ranges": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "endless macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "long string": "{{ 'a' * 10**10 }}",
    "large number": "{{ 10**10**10 % 7 }}",
    "filter": "{{ 'a'|center(10**10) }}",
    "doubling": "{% set n = namespace(x='aaaa') %}{% for a in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "digits": "{{ " + "9" * 5000 + " }}",
    "many pieces": "{% for a in range(99999) %}{{ 'a' * 99999 }}{% endfor %}",
}


@pytest.mark.parametrize(
    "name",
    # The first uses up its second.
    [pytest.param(name, marks=pytest.mark.slow) if name == "nested ranges" else name for name in HOSTILE],
)
def test_a_hostile_template_ends_in_one_line(name, monkeypatch, time_limit):
    monkeypatch.setattr(texts, "RENDER_SECONDS", 1)
    monkeypatch.setattr(texts, "RENDER_MEMORY", 1 << 28)
    with time_limit(60), pytest.raises(InputError, match="template") as caught:
        texts.render_records([Chat(EXCHANGE, where="x.jsonl: line 7")], "chat", ChatTemplate(HOSTILE[name]))
    assert "\n" not in str(caught.value)
    assert name == "digits" or "x.jsonl: line 7" in str(caught.value)


def test_a_child_process_renders_the_same_texts():
    records = [Chat(tuple(chat_templates.CHAT)), Record("Q", "A"), Chat(EXCHANGE, ({"name": "é\ud7ff"},), context=1)]
    for source in (chat_templates.LLAMA3, chat_templates.MARKED):
        template = ChatTemplate(source, tokens={"bos_token": "<s>", "eos_token": "</s>"})
        assert texts.render_records(records, "chat", template) == [
            texts.render_record(record, "chat", template) for record in records
        ]
    assert pickle.loads(pickle.dumps(template)).source == template.source


PICKY = "{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('not this') }}{% endif %}{% endfor %}"
"""Refuses chats with the content "no"."""


def chat_of(content, line):
    return Chat((EXCHANGE[0], EXCHANGE[1] | {"content": content}), where=f"x.jsonl: line {line}")


def test_all_chats_that_a_template_refuses_are_listed():
    records = [chat_of(content, line) for line, content in enumerate(["yes", "no", "yes", "no"], start=1)]
    with pytest.raises(InputError, match=r"^2 of 4 .*\(1\) x\.jsonl: line 2: .*\(2\) x\.jsonl: line 4: .*not this"):
        texts.render_records(records, "chat", ChatTemplate(PICKY + chat.CHATML))


@pytest.mark.parametrize(
    ("large", "reason"),
    [(HOSTILE["doubling"], "memory"), ("{{ messages[-1].content * 14000000 }}", "writes much more")],
    ids=["memory", "size"],
)
def test_an_exceeded_limit_stops_the_work_and_names_the_record(large, reason, monkeypatch):
    """The limit also applies after records that the template refuses."""
    monkeypatch.setattr(texts, "RENDER_MEMORY", 1 << 28)
    source = PICKY + chat.CHATML + "{% if messages[-1].content == 'large' %}" + large + "{% endif %}"
    records = [chat_of(content, line) for line, content in enumerate(["no", "yes", "large", "no"], start=1)]
    with pytest.raises(InputError, match=rf"^x\.jsonl: line 3: .*{reason}"):
        texts.render_records(records, "chat", ChatTemplate(source))


def test_a_limit_exceeded_while_a_turn_is_located_is_named(monkeypatch):
    """The template writes the turn differently before others, and writes much if another turn stands in its place."""
    monkeypatch.setattr(texts, "RENDER_MEMORY", 1 << 28)
    source = (
        "{% for m in messages %}{% if 'another' in m.content %}" + HOSTILE["doubling"] + "{% endif %}"
        "<{{ m.role }}>{{ m.content }}{{ loop.last }}{% endfor %}"
    )
    with pytest.raises(InputError, match=r"line 3: .*memory"):
        texts.render_records([Chat((*EXCHANGE, *EXCHANGE), where="x.jsonl: line 3")], "chat", ChatTemplate(source))


def test_time_to_locate_turns_grows_with_their_number(monkeypatch):
    limits = []
    monkeypatch.setattr(
        limited_process, "run", lambda *_, seconds, **__: limits.append(seconds - texts.RENDER_SECONDS) or []
    )
    for count in (2, 200, 200_000):
        # Strings of their own, as those of a file are: an equal object is pickled once.
        turns = chat_templates.turns(*("a" * (4_000_000 // count) for _ in range(count)))
        texts.render_records([Chat(tuple(turns))], "chat", ChatTemplate(chat.CHATML))
    assert limits[1] > 10 * limits[0]
    assert limits[2] < 10_000


def test_turns_of_a_long_chat_are_located_only_at_its_beginning(monkeypatch):
    long = [message for _ in range(2500) for message in EXCHANGE]
    rendered = []
    render = ChatTemplate.render
    monkeypatch.setattr(ChatTemplate, "render", lambda *a, **o: rendered.append(len(a[1])) or render(*a, **o))
    template = ChatTemplate(chat.CHATML)
    written = template.render_with_spans(long, max_characters=1000)
    assert sum(rendered) < 10_000
    short = template.render_with_spans(long[:60])
    assert written.spans == short.spans[: len(written.spans)]
    assert written.spans[-1][1] >= 1000


@pytest.mark.parametrize(
    ("kind", "reason"),
    [pytest.param("time", "1 s", marks=pytest.mark.slow), ("memory", "memory"), ("signal", "signal 9")],
)
def test_a_child_process_names_the_exceeded_limit(kind, reason):
    with pytest.raises(limited_process.LimitError, match=reason) as caught:
        limited_process.run(work, kind, seconds=1, memory=1 << 28)
    assert caught.value.results == [1]
    assert limited_process.run(work, "", seconds=1, memory=1 << 28) == [1, 2]


def test_a_system_without_the_size_of_a_process_has_no_limit_of_memory(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_AS)
    limited_process._limit_memory(1, tmp_path / "statm")
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_an_internal_error_of_a_child_process_is_no_input_error():
    with pytest.raises(RuntimeError, match="KeyError"):
        limited_process.run(work, "fault", seconds=1, memory=1 << 28)
