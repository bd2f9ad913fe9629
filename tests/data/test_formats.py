"""Formats and files: each reads to its records, is recognised by its keys, and refuses what is not as it says."""

import json

import pandas as pd
import pytest
from support.hub import serving

from rora_theory.data import hub_files
from rora_theory.data.formats import FORMATS, Chat, Record, Text, question_key, records_digest
from rora_theory.data.hub_files import Split
from rora_theory.data.records import DataConfig, read_record_set
from rora_theory.errors import InputError
from rora_theory.io.files import parse_yaml

MESSAGES = [{"role": "user", "content": "Ähm?"}, {"role": "assistant", "content": "Yes."}]
SHAREGPT = [{"from": "human", "value": "Ähm?"}, {"from": "gpt", "value": "Yes."}]
ROWS = {
    "messages": {"messages": MESSAGES},
    "sharegpt": {"conversations": SHAREGPT},
    "alpaca": {"instruction": "Ähm?", "input": "", "output": "Yes."},
    "prompt-response": {"prompt": "Ähm?", "response": "Yes."},
    "prompt-completion": {"prompt": "Ähm?", "completion": "Yes."},
    "conversational": {"prompt": MESSAGES[:1], "completion": MESSAGES[1:]},
    "text": {"text": "Ähm? Yes."},
}
RECORDS = {
    "messages": Chat(tuple(MESSAGES)),
    "sharegpt": Chat(tuple(MESSAGES)),
    "conversational": Chat(tuple(MESSAGES), context=1),
    "text": Text("Ähm? Yes."),
} | dict.fromkeys(("alpaca", "prompt-response", "prompt-completion"), Record("Ähm?", "Yes."))
TEMPLATES = dict(zip(FORMATS, ("chat", "chat", "train", "chat", "plain", "chat", "plain"), strict=True))


def write(path, rows):
    if path.suffix == ".parquet":
        pd.DataFrame(rows).to_parquet(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_in_every_file_is_recognised(tmp_path, name, suffix):
    source = write(tmp_path / f"x.{suffix}", [ROWS[name] | {"id": 3}] * 2)
    found = read_record_set([source])
    assert found.records == [RECORDS[name]] * 2
    assert found.formats == ((name, 2),)
    assert found.template(None) == TEMPLATES[name]
    assert found.template("clean") == "clean"
    assert found.summary == f"records: 2 as {name} (detected from the first record's keys; --format selects another)"
    assert found.notes == ()
    assert read_record_set([source], DataConfig(format=name)).records == found.records


def test_names_of_their_own(tmp_path):
    own = {"question": "Q", "context": None, "reply": "A", "text": "T"}
    source = write(tmp_path / "x.parquet", [own, own | {"context": "C"}])
    config = DataConfig(fields={"instruction": "question", "input": "context", "output": "reply"})
    found = read_record_set([source], config)
    assert found.records == [Record("Q", "A"), Record("Q", "A", "C")]
    assert found.notes == (f"{source}: read as alpaca; it also matches text (--format)",)
    assert read_record_set([source], DataConfig(fields={"prompt": "question", "response": "reply"})).formats == (
        ("prompt-response", 2),
    )
    source = write(tmp_path / "both.json", [{"question": "Q", "reply": "A"} | ROWS["alpaca"]])
    assert read_record_set([source], DataConfig(fields={"prompt": "question", "response": "reply"})).formats[0][0] == (
        "prompt-response"
    )
    turns = [{"who": "user", "said": "Ähm?"}, {"who": "assistant", "said": "Yes."}]
    source = write(tmp_path / "x.json", [{"conversations": turns}])
    fields = {"messages": "conversations", "role": "who", "content": "said"}
    found = read_record_set([source], DataConfig(fields=fields))
    assert found.records == [RECORDS["messages"]]
    assert found.formats == (("messages", 1),)


def test_a_chats_further_keys_reach_the_template(tmp_path):
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "weather"}]}
    tools = [{"name": "weather"}]
    row = {"messages": [*MESSAGES, call, {"role": "tool", "content": "sun", "name": "weather"}], "tools": tools}
    (chat,) = read_record_set([write(tmp_path / "x.json", [row])]).records
    assert chat.messages[2] == {"role": "assistant", "content": "", "tool_calls": [{"name": "weather"}]}
    assert chat.messages[3]["name"] == "weather"
    assert chat.tools == tuple(tools)
    said = {"conversations": SHAREGPT, "system": "Be brief."}
    (chat,) = read_record_set([write(tmp_path / "y.json", [said])]).records
    assert chat.messages == ({"role": "system", "content": "Be brief."}, *MESSAGES)


def call(arguments):
    return {"id": "1", "type": "function", "function": {"name": "weather", "arguments": arguments}}


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_arguments_of_tool_calls_written_as_json_are_encoded_once(tmp_path, suffix):
    """OpenAI's strings and the objects that templates expect are one record; a note counts the strings."""
    pytest.importorskip("jinja2")
    from rora_theory.data.chat import ChatTemplate

    def row(*arguments):
        turn = {"role": "assistant", "content": None, "tool_calls": [call(one) for one in arguments]}
        return {"messages": [MESSAGES[0], turn]}

    rows = [row('{"city": "Köln", "days": [1]}', ""), row(" {} ")]
    found = read_record_set([write(tmp_path / f"x.{suffix}", rows)])
    expected = [row({"city": "Köln", "days": [1]}, {}), row({})]
    assert found.records == read_record_set([write(tmp_path / "y.jsonl", expected)]).records
    (note,) = found.notes
    assert note.startswith("3 tool calls")
    template = ChatTemplate("{% for m in messages %}{{ m.tool_calls | tojson if m.tool_calls }}{% endfor %}")
    assert '"arguments": {"city": "Köln", "days": [1]}' in template.render(found.records[0].messages)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("{city", r"x\.json: record 0: messages 1: arguments of tool_calls 0: is not JSON"),
        ('["Bonn"]', r"messages 1: arguments of tool_calls 0 .* a list"),
        ('{"city": "\\ud800"}', r"messages 1: 'tool_calls' .* half a surrogate pair"),
    ],
)
def test_arguments_that_encode_no_object_are_refused(tmp_path, arguments, message):
    turn = {"role": "assistant", "content": "", "tool_calls": [call(arguments)]}
    with pytest.raises(InputError, match=message):
        read_record_set([write(tmp_path / "x.json", [{"messages": [MESSAGES[0], turn]}])])


def test_a_turn_of_weight_0_is_not_learned(tmp_path):
    """OpenAI's and ShareGPT's; a weight of 1 is as none."""
    weights = (0, 1, 0.0, None)
    chats = [{"messages": [MESSAGES[0], MESSAGES[1] | {"weight": weight}, *MESSAGES]} for weight in weights]
    talks = [{"conversations": [SHAREGPT[0], SHAREGPT[1] | {"weight": one}, *SHAREGPT]} for one in weights]
    ignored, plain = Chat((MESSAGES[0], MESSAGES[1] | {"weight": 0}, *MESSAGES)), Chat((*MESSAGES, *MESSAGES))
    for name, rows in (("x.jsonl", chats), ("x.parquet", chats), ("y.jsonl", talks), ("y.parquet", talks)):
        found = read_record_set([write(tmp_path / name, rows)])
        assert found.records == [ignored, plain, ignored, plain]
        (note,) = found.notes
        assert note.startswith("2 turns have weight 0")
    assert records_digest([ignored]) != records_digest([plain])
    renamed = [{"messages": [MESSAGES[0], MESSAGES[1] | {"train": 0}, *MESSAGES]}]
    named = read_record_set([write(tmp_path / "w.parquet", renamed)], DataConfig(fields={"weight": "train"}))
    assert named.records == [ignored]
    for weight, message in ((0.5, "'weight' .* 0.5"), ("0", "'weight' .* '0'"), (0, "'messages' .* weight 0")):
        row = {"messages": [MESSAGES[0], MESSAGES[1] | {"weight": weight}]}
        with pytest.raises(InputError, match=message):
            read_record_set([write(tmp_path / "z.json", [row])])


def test_roles_of_sharegpt_are_those_of_chat_templates(tmp_path):
    speakers = ["system", "human", "gpt", "observation", "assistant", "tool", "chatgpt", "user"]
    rows = [{"conversations": [{"from": speaker, "value": "."} for speaker in speakers]}]
    (found,) = read_record_set([write(tmp_path / "x.json", rows)]).records
    roles = ["system", "user", "assistant", "tool", "assistant", "tool", "assistant", "user"]
    assert [message["role"] for message in found.messages] == roles


def test_a_prompt_of_several_turns_is_context(tmp_path):
    """TRL's: the assistant's turns in the prompt are given, and the record says so."""
    row = {"prompt": [*MESSAGES, {"role": "user", "content": "Sure?"}], "completion": [MESSAGES[1]], "tools": [{}]}
    (chat,) = read_record_set([write(tmp_path / "x.json", [row])]).records
    assert chat == Chat((*row["prompt"], MESSAGES[1]), ({},), context=3)
    assert records_digest([chat]) != records_digest([Chat(chat.messages, chat.tools)])
    with pytest.raises(InputError, match=r"record 0: 'completion' .* assistant turn"):
        read_record_set([write(tmp_path / "y.json", [row | {"completion": MESSAGES[:1]}])])
    with pytest.raises(InputError, match=r"record 0: 'completion' must be a string, got a list"):
        read_record_set([write(tmp_path / "z.json", [row | {"prompt": "Sure?"}])])


def test_the_parts_of_a_message_are_one_text(tmp_path):
    """OpenAI's lists of parts; a picture is none that a text model reads."""
    parts = [{"type": "text", "text": "Ähm"}, {"type": "input_text", "text": "?"}]
    source = write(tmp_path / "x.jsonl", [{"messages": [{"role": "user", "content": parts}, MESSAGES[1]]}])
    assert read_record_set([source]).records == [RECORDS["messages"]]
    picture = {"type": "image_url", "image_url": {"url": "x.png"}}
    source = write(tmp_path / "y.jsonl", [{"messages": [{"role": "user", "content": [*parts, picture]}, MESSAGES[1]]}])
    with pytest.raises(InputError, match=r"line 1: messages 0: 'content' .* 'image_url' at 2"):
        read_record_set([source])
    thought = {"type": "thinking", "text": "Hm."}
    source = write(tmp_path / "z.jsonl", [{"messages": [MESSAGES[0], MESSAGES[1] | {"content": [thought, *parts]}]}])
    with pytest.raises(InputError, match=r"messages 1: 'content' .* 'thinking'"):
        read_record_set([source])


def test_what_no_template_can_read_is_refused(tmp_path):
    late = [MESSAGES[0] | {"sent": pd.Timestamp("2026-01-31")}, MESSAGES[1] | {"sent": pd.Timestamp("2026-01-31")}]
    with pytest.raises(InputError, match=r"row 0: messages 0: 'sent' .* JSON .* got a \w+"):
        read_record_set([write(tmp_path / "x.parquet", [{"messages": late}])])


def test_lines_under_the_name_of_json_and_plain_lines(tmp_path):
    (tmp_path / "x.json").write_text('{"text": "a"}\n\n{"text": "b"}\n')
    (tmp_path / "x.txt").write_text("one\n\ntwo\n")
    found = read_record_set([str(tmp_path / "x.json"), str(tmp_path / "x.txt")])
    assert found.records == [Text("a"), Text("b"), Text("one"), Text("two")]


def test_formats_that_differ_ask_for_a_template(tmp_path):
    data = read_record_set([write(tmp_path / f"{name}.json", [ROWS[name]]) for name in ("alpaca", "messages")])
    with pytest.raises(InputError, match=r"template .* None .* alpaca \(train\), messages \(chat\)"):
        data.template(None)
    assert data.template("chat") == "chat"
    with pytest.raises(InputError, match=r"template .* train, clean, chat, plain, got 'none'"):
        data.template("none")


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("x.jsonl", {"messages": "hi"}, r"x\.jsonl: line 2: 'messages' .* list of objects, got a string"),
        ("x.jsonl", {"messages": ["hi"]}, r"line 2: 'messages' .* objects, got a string at 0"),
        ("x.json", {"messages": [{"content": "a"}]}, r"x\.json: record 1: messages 0 has no 'role'; its keys are"),
        ("x.json", {"messages": [MESSAGES[0], {"role": "assistant"}]}, r"record 1: messages 1 has no 'content'"),
        ("x.json", {"messages": [{"role": "user", "content": [1]}]}, r"messages 0: 'content' .* a number at 0"),
        ("x.json", {"messages": MESSAGES[:1]}, r"record 1: 'messages' .* assistant turn"),
        ("x.json", {"messages": []}, r"record 1: 'messages' .* assistant turn"),
        (
            "x.json",
            {"messages": [{"role": "user", "content": "\ud800"}]},
            r"messages 0: 'content' .* half a surrogate pair",
        ),
        ("x.json", {}, r"record 1 has no 'messages'; its keys are none"),
        (
            "x.parquet",
            {"messages": [{"role": "user", "content": "a"}]},
            r"x\.parquet: row 1: 'messages' .* assistant turn",
        ),
    ],
)
def test_a_bad_chat_is_named_by_place_and_key(tmp_path, name, row, message):
    source = write(tmp_path / name, [ROWS["messages"], row])
    with pytest.raises(InputError, match=message) as caught:
        read_record_set([source])
    assert "\n" not in str(caught.value)


def test_who_speaks_and_what_fits_nothing_is_named(tmp_path):
    rows = [{"conversations": [*SHAREGPT, {"from": "narrator", "value": "..."}]}]
    with pytest.raises(InputError, match=r"conversations 2: 'from' .* human, user, gpt.* 'narrator'"):
        read_record_set([write(tmp_path / "x.json", rows)])
    fits_nothing = r"y\.json: record 0: .* 'q', 'a'.* messages \(messages\), .* --fields"
    with pytest.raises(InputError, match=fits_nothing):
        read_record_set([write(tmp_path / "y.json", [{"q": "1", "a": "2"}])])
    with pytest.raises(InputError, match=r"y\.json: record 0 has no 'text'; its keys are 'q', 'a'"):
        read_record_set([str(tmp_path / "y.json")], DataConfig(format="text"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fields": {"question": "q"}}, "fields .* messages, role.* 'question'"),
        ({"show": -1}, "show"),
        ({"chat_date": "today"}, "chat_date .* 'today'"),
        ({"chat_template": "none.jinja"}, r"none\.jinja: no such file.* a file of Jinja source, or chatml"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        DataConfig(**options)
    assert DataConfig(chat_date="2024-07-26").now.isoformat() == "2024-07-26T12:00:00"


def test_what_is_no_parquet_is_named(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1 and no more PAR1")
    with pytest.raises(InputError, match=r"x\.parquet: not a Parquet file \(.*\).* a \.json, ") as caught:
        read_record_set([tmp_path / "x.parquet"])
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"is a folder.* a \.json.*FOLDER:SPLIT"):
        read_record_set([tmp_path])


def test_digests_tell_records_and_not_places():
    assert records_digest([RECORDS["alpaca"]]) == records_digest([Record("Ähm?", "Yes.", "")])
    one, other = Chat(tuple(MESSAGES), where="a"), Chat(tuple(MESSAGES), where="b")
    assert (records_digest([one]), one) == (records_digest([other]), other)
    assert records_digest([one]) != records_digest([Chat(tuple(MESSAGES), ({"name": "x"},))])
    assert question_key(one) == question_key(Chat((MESSAGES[0], MESSAGES[1] | {"content": "No."})))
    assert question_key(one) != question_key(Chat(({"role": "user", "content": "?"}, MESSAGES[1])))
    assert (question_key(Record("Q", "A")), question_key(Text("T"))) == ("Q", "T")


CARD = b"""---
configs:
- config_name: english
  default: true
  data_files:
  - split: train
    path: en/*.jsonl
  - {split: test, path: [en-test/part.jsonl]}
- config_name: german
  data_dir: de
  data_files: '**/*.jsonl'
---
About it.
"""
FILES = ["README.md", "en/a.jsonl", "en/b.jsonl", "en/deep/c.jsonl", "en-test/part.jsonl", "de/x/a.jsonl"]


def test_a_card_says_which_files_a_split_is():
    card = {"configs": parse_yaml(CARD.split(b"---")[1].decode(), where="card")["configs"]}

    def files(subset, split):
        return hub_files.select_files(FILES, Split("them", subset, split), card)

    assert files(None, "train") == files("english", "train") == ["en/a.jsonl", "en/b.jsonl"]
    assert files(None, "test") == ["en-test/part.jsonl"]
    assert files("german", "train") == ["de/x/a.jsonl"]
    turned = {"configs": card["configs"][::-1]}
    assert hub_files.select_files(FILES, Split("them", None, "train"), turned) == files("english", "train")
    with pytest.raises(InputError, match=r"them: no split 'dev'.* train, test"):
        files(None, "dev")
    with pytest.raises(InputError, match=r"no subset 'french'.* english, german.* them/SUBSET"):
        files("french", "train")


def test_names_say_it_where_no_card_does():
    def files(names, subset=None, split="train"):
        return hub_files.select_files(names, Split("them", subset, split), {})

    parts = [f"data/{split}-0000{i}-of-00002.parquet" for split in ("train", "test") for i in (1, 0)]
    assert files([*parts, "data/train.csv", "train.jsonl"]) == sorted(parts[:2])
    assert files(["training.jsonl", "constrain.jsonl", "a_train.jsonl"]) == ["a_train.jsonl"]
    with pytest.raises(InputError, match="them: split 'train' must have 2 files, got 1"):
        files(parts[:1])
    assert files(["train/0.jsonl", "test/0.jsonl"]) == ["train/0.jsonl"]
    both = ["en/train.jsonl", "de/train.jsonl"]
    assert files(both, "de") == ["de/train.jsonl"]
    with pytest.raises(InputError, match=r"no subset is named.* de, en.* them/SUBSET:train"):
        files(both)
    with pytest.raises(InputError, match=r"no .* file of split 'dev'; it has en/train\.jsonl, de/train\.jsonl"):
        files(both, split="dev")


def test_a_split_of_a_folder(tmp_path):
    (tmp_path / "en").mkdir()
    write(tmp_path / "en" / "train-1.jsonl", [ROWS["text"]])
    write(tmp_path / "en" / "train-2.jsonl", [ROWS["text"] | {"text": "2"}])
    write(tmp_path / "en" / "test.jsonl", [ROWS["text"]])
    for name in (f"{tmp_path}:train", f"{tmp_path}/en:train", f"{tmp_path / 'en'}:train"):
        assert read_record_set([name]).records == [RECORDS["text"], Text("2")]
    write(tmp_path / "en" / "a:train", [ROWS["text"]])
    assert hub_files.parse_split(str(tmp_path / "en" / "a:train")) is None
    assert hub_files.parse_split(str(tmp_path / "none:train")) == Split(str(tmp_path), "none", "train")
    (tmp_path / "en" / "test.jsonl").write_text('{"text": 3}')
    with pytest.raises(InputError, match=r"en/test\.jsonl: line 1: 'text' .* a number"):
        read_record_set([f"{tmp_path}:test"])


def test_a_split_of_the_hub(tmp_path, monkeypatch):
    import huggingface_hub.constants as constants

    line = json.dumps(ROWS["messages"]).encode()
    pd.DataFrame([ROWS["text"]]).to_parquet(tmp_path / "x.parquet")
    repositories = {
        "datasets/them/set": {
            "main": {"README.md": CARD, "en/a.jsonl": line, "en/b.jsonl": line, "de/x/a.jsonl": line},
            "v1": {"train.jsonl": line + b"\n" + line + b"\n" + line},
        },
        "datasets/them/tables": {
            "main": {"train.csv": b"text\nx\n"},
            "refs/convert/parquet": {"default/train/0000.parquet": (tmp_path / "x.parquet").read_bytes()},
        },
    }
    with serving(repositories) as server:
        for name in ("ENDPOINT", "HUGGINGFACE_CO_URL_TEMPLATE"):
            end = server.environment["HF_ENDPOINT"]
            now = end if name == "ENDPOINT" else end + "/{repo_id}/resolve/{revision}/{filename}"
            monkeypatch.setattr(constants, name, now)
            monkeypatch.setattr(f"huggingface_hub.file_download.{name}", now, raising=False)  # of older versions
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        assert read_record_set(["hf://datasets/them/set:train"]).records == [RECORDS["messages"]] * 2
        assert not [path for path in server.asked if "de/" in path]
        assert len(read_record_set(["hf://datasets/them/set/german:train"]).records) == 1
        assert len(read_record_set(["hf://datasets/them/set@v1:train"]).records) == 3
        assert read_record_set(["hf://datasets/them/tables:train"]).records == [RECORDS["text"]]
        assert len(read_record_set(["hf://datasets/them/set/en/a.jsonl"]).records) == 1
        with pytest.raises(InputError, match=r"hf://datasets/them/none: cannot be listed \(.*\)"):
            read_record_set(["hf://datasets/them/none:train"])
        with pytest.raises(InputError, match=r"a\.jsonl: line 1 has no 'text'; its keys are 'messages'"):
            read_record_set(["hf://datasets/them/set:train"], DataConfig(format="text"))
    # The server is gone: what the cache has is read, and what it hasn't is refused.
    assert len(read_record_set(["hf://datasets/them/set@v1:train"]).records) == 3
    with pytest.raises(InputError, match="cannot be listed"):
        read_record_set(["hf://datasets/them/more:train"])


def test_the_names_of_splits():
    assert hub_files.parse_split("hf://datasets/them/set/x.jsonl") is None
    assert hub_files.parse_split("hf://datasets/them:train") is None
    assert hub_files.parse_split("nowhere/at/all:train") is None
