"""Formats: each is recognised by its keys, and accepts what the families of data sets write."""

import pytest
from support.chat_templates import turns
from support.record_files import write

from rora_theory.chat_templates import ChatTemplate
from rora_theory.errors import InputError
from rora_theory.lab.data.formats import FORMATS, Chat, Record, Text, question_key, records_digest
from rora_theory.lab.data.records import DataConfig, read_record_set

MESSAGES = turns("Ähm?", "Yes.")
SHAREGPT = [{"from": "human", "value": "Ähm?"}, {"from": "gpt", "value": "Yes."}]
CHAT, RECORD = Chat(tuple(MESSAGES)), Record("Ähm?", "Yes.")
CASES = {
    "messages": ({"messages": MESSAGES}, CHAT, "chat"),
    "sharegpt": ({"conversations": SHAREGPT}, CHAT, "chat"),
    "alpaca": ({"instruction": "Ähm?", "input": "", "output": "Yes."}, RECORD, "train"),
    "prompt-completion": ({"prompt": "Ähm?", "completion": "Yes."}, RECORD, "plain"),
    "text": ({"text": "Ähm? Yes."}, Text("Ähm? Yes."), "plain"),
}
"""A row of each format, its record and the record's template."""


@pytest.fixture
def read(tmp_path):
    """Return a function that writes rows to a file and reads them."""

    def read_rows(rows, suffix="json", **options):
        return read_record_set([write(tmp_path / f"x.{suffix}", rows)], DataConfig(**options))

    return read_rows


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_in_every_file_is_recognised(read, name, suffix):
    row, record, template = CASES[name]
    rows = [row | {"id": 3}] * 2
    loaded = read(rows, suffix)
    assert loaded.records == [record] * 2
    assert loaded.formats == ((name, 2),)
    assert (loaded.template(None), loaded.template("clean")) == (template, "clean")
    assert loaded.summary == f"records: 2 as {name} (detected from the first record's keys; format selects another)"
    assert read(rows, suffix, format=name).records == loaded.records


def test_renamed_fields(read):
    row = {"question": "Q", "context": None, "reply": "A", "text": "T"}
    rows = [row, row | {"context": "C"}]
    loaded = read(rows, "parquet", fields={"instruction": "question", "input": "context", "output": "reply"})
    assert loaded.records == [Record("Q", "A"), Record("Q", "A", "C")]
    # Formats that use more of the renamed fields come first.
    for renamed in (row, {"question": "Q", "reply": "A"} | CASES["alpaca"][0]):
        fields = {"prompt": "question", "completion": "reply"}
        assert read([renamed], fields=fields).formats == (("prompt-completion", 1),)
    messages = [{"who": message["role"], "said": message["content"]} for message in MESSAGES]
    loaded = read([{"conversations": messages}], fields={"messages": "conversations", "role": "who", "content": "said"})
    assert (loaded.records, loaded.formats) == ([CHAT], (("messages", 1),))


def test_other_keys_of_messages_reach_the_template(read):
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "weather"}]}
    result = {"role": "tool", "content": "sun", "name": "weather"}
    tools = [{"name": "weather"}]
    (chat,) = read([{"messages": [*MESSAGES, call, result], "tools": tools}]).records
    assert chat == Chat((*MESSAGES, call | {"content": ""}, result), tuple(tools))
    (chat,) = read([{"conversations": SHAREGPT, "system": "Be brief."}]).records
    assert chat == Chat(tuple(turns("Ähm?", "Yes.", system="Be brief.")))


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_arguments_of_tool_calls_written_as_json_are_encoded_once(read, suffix):
    """OpenAI's strings and the objects that templates expect give the same record."""

    def row(*arguments):
        functions = [{"name": "weather", "arguments": value} for value in arguments]
        calls = [{"id": "1", "type": "function", "function": function} for function in functions]
        return {"messages": [MESSAGES[0], {"role": "assistant", "content": None, "tool_calls": calls}]}

    loaded = read([row('{"city": "Köln", "days": [1]}', ""), row(" {} ")], suffix)
    assert loaded.records == read([row({"city": "Köln", "days": [1]}, {}), row({})], "jsonl").records
    template = ChatTemplate("{% for m in messages %}{{ m.tool_calls | tojson if m.tool_calls }}{% endfor %}")
    assert '"arguments": {"city": "Köln", "days": [1]}' in template.render(loaded.records[0].messages)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize(("key", "messages"), [("messages", MESSAGES), ("conversations", SHAREGPT)])
def test_a_turn_of_weight_0_is_not_learned(read, key, messages, suffix):
    """This holds for OpenAI's and ShareGPT's format; a weight of 1 has no effect."""
    question, answer = messages
    rows = [{key: [question, answer | {"weight": weight}, *messages]} for weight in (0, 1, 0.0, None)]
    ignored, plain = Chat((MESSAGES[0], MESSAGES[1] | {"weight": 0}, *MESSAGES)), Chat((*MESSAGES, *MESSAGES))
    loaded = read(rows, suffix)
    assert loaded.records == [ignored, plain, ignored, plain]
    assert records_digest([ignored]) != records_digest([plain])
    renamed = [{key: [question, answer | {"train": 0}, *messages]}]
    assert read(renamed, suffix, fields={"weight": "train"}).records == [ignored]


def test_roles_of_sharegpt_are_those_of_chat_templates(read):
    speakers = ["system", "human", "gpt", "observation", "assistant", "tool", "chatgpt", "user"]
    (chat,) = read([{"conversations": [{"from": speaker, "value": "."} for speaker in speakers]}]).records
    roles = ["system", "user", "assistant", "tool", "assistant", "tool", "assistant", "user"]
    assert [message["role"] for message in chat.messages] == roles


def test_the_text_parts_of_a_message_are_joined(read):
    """OpenAI's lists of parts are joined."""
    parts = [{"type": "text", "text": "Ähm"}, {"type": "input_text", "text": "?"}]
    assert read([{"messages": [{"role": "user", "content": parts}, MESSAGES[1]]}]).records == [CHAT]


def test_a_named_format_is_read_where_several_would_match(tmp_path):
    path = write(tmp_path / "both.json", [{"instruction": "a", "output": "b", "text": "c"}])
    for name in ("alpaca", "text"):
        assert read_record_set([path], DataConfig(format=name)).formats == ((name, 1),)


def test_mixed_formats_require_a_template(tmp_path):
    data = read_record_set([write(tmp_path / f"{name}.json", [CASES[name][0]]) for name in ("alpaca", "messages")])
    with pytest.raises(InputError, match=r"template .* None .* train, chat"):
        data.template(None)
    assert data.template("chat") == "chat"
    with pytest.raises(InputError, match=r"template .* train, clean, chat, plain, got 'none'"):
        data.template("none")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fields": {"question": "q"}}, "fields .* messages, role.* 'question'"),
        ({"chat_date": "today"}, "chat_date .* 'today'"),
        ({"chat_template": "none.jinja"}, r"none\.jinja: no such file.* a file of Jinja source, or chatml"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        DataConfig(**options)


def test_the_chat_template_sees_noon_of_the_date():
    assert DataConfig(chat_date="2024-07-26").now.isoformat() == "2024-07-26T12:00:00"


def test_digests_depend_on_records_and_not_on_their_location():
    other = Chat(tuple(MESSAGES), where="b")
    assert (records_digest([CHAT]), CHAT) == (records_digest([other]), other)
    assert records_digest([RECORD]) == records_digest([Record("Ähm?", "Yes.", "")])
    assert records_digest([CHAT]) != records_digest([Chat(tuple(MESSAGES), ({"name": "x"},))])
    assert question_key(CHAT) == question_key(Chat(tuple(turns("Ähm?", "No."))))
    assert question_key(CHAT) != question_key(Chat(tuple(turns("?", "Yes."))))
    assert (question_key(Record("Q", "A")), question_key(Text("T"))) == ("Q", "T")
