"""The records of a sweep: seeded, held out once, trained on nowhere else, each file with its share."""

import json
from collections import Counter
from pathlib import Path

import pytest
from support import checkpoint

from rora_theory.data.records import DataConfig
from rora_theory.errors import InputError
from rora_theory.finetune import read_records
from rora_theory.sweep.records import apportion, draw_records


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return checkpoint.two_files(tmp_path_factory.mktemp("data"))


def test_held_out_records_are_in_no_training_set(data) -> None:
    files = tuple(str(data / name / "train.json") for name in ("one", "two"))
    sample = draw_records(files, held_out=10, train_records=20)
    held_out = {record.instruction for _, _, record in sample.held_out}
    assert len(held_out) == 10
    assert not held_out & {record.instruction for record in sample.train}
    assert [sum(text.startswith("two ") for text in held_out), len(sample.train)] == [5, 20]
    again = draw_records(files, held_out=10, train_records=20)
    assert again.summary == sample.summary
    other = draw_records(files, held_out=10, train_records=20, seed=1)
    assert other.summary["held_out_sha256"] != sample.summary["held_out_sha256"]


def test_a_repeated_record_is_on_one_side_alone(tmp_path) -> None:
    """Every instruction twice in one file and once in another: held out once, and nowhere trained on."""
    rows = [{"instruction": f"say {i}", "output": "a"} for i in range(12)]
    for name, held in (
        ("one", rows * 2),
        ("two", rows[:6] + [{"instruction": f"tell {i}", "output": "a"} for i in range(9)]),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.json").write_text(json.dumps(held))
    files = tuple(str(tmp_path / name / "train.json") for name in ("one", "two"))
    for seed in range(6):
        sample = draw_records(files, held_out=8, seed=seed)
        held_out = [record.instruction for _, _, record in sample.held_out]
        assert len(held_out) == len(set(held_out)) == 8
        trained = {record.instruction for record in sample.train}
        assert not trained & set(held_out)
        assert len(trained) == 21 - 8, "everything else is"


def test_one_instruction_with_other_inputs_is_other_records(tmp_path) -> None:
    """Alpaca's: of eight records with one instruction four are held out, and the other four are trained on."""
    rows = [{"instruction": "Translate", "input": str(i), "output": "a"} for i in range(8)]
    (tmp_path / "x.json").write_text(json.dumps(rows))
    sample = draw_records([str(tmp_path / "x.json")], held_out=4)
    parts = [{one.input for one in part} for part in (sample.train, [record for *_, record in sample.held_out])]
    assert [len(part) for part in parts] == [4, 4]
    assert not parts[0] & parts[1]


def test_a_record_of_two_files_is_held_out_once(tmp_path) -> None:
    """Both files have the same eight; by chance alone six held-out ones would differ once in five draws."""
    for name in ("one", "two"):
        rows = [{"instruction": f"say {i}", "output": "a"} for i in range(8)]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    files = [str(tmp_path / f"{name}.json") for name in ("one", "two")]
    for seed in range(6):
        sample = draw_records(files, held_out=6, seed=seed)
        assert len({record.instruction for _, _, record in sample.held_out}) == 6
        assert len(sample.train) == 2 * 2


def test_chats_that_ask_the_same_are_on_one_side(tmp_path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"say {i % 8}"}, {"role": "assistant", "content": str(i)}]}
        for i in range(16)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sample = draw_records([str(tmp_path / "chats.jsonl")], held_out=4)
    asked = [{one.messages[0]["content"] for one in part} for part in (sample.train, [r for *_, r in sample.held_out])]
    assert not asked[0] & asked[1]
    assert [len(part) for part in asked] == [4, 4]
    assert sample.source.template(None) == "chat"
    named = draw_records([str(tmp_path / "chats.jsonl")], held_out=4, config=DataConfig(chat_date="2026-01-31"))
    assert named.summary == sample.summary | {"chat_date": "2026-01-31"}


def test_texts_have_no_answers_to_measure(tmp_path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\nthree\n")
    with pytest.raises(InputError, match=r"a\.txt: .* got texts"):
        draw_records([str(tmp_path / "a.txt")], held_out=2)


def test_files_give_in_proportion_and_records_are_found_again(tmp_path) -> None:
    """A held-out record is named by its folder, file and place in it; those trained on are in the seed's order."""
    files = {f"{name}/train.json": tmp_path / name / "train.json" for name in ("one", "two")}
    for (name, path), count in zip(files.items(), (30, 10), strict=True):
        path.parent.mkdir()
        path.write_text(json.dumps([{"instruction": f"{name} {i}", "output": "a"} for i in range(count)]))
    sources = list(map(str, files.values()))
    sample = draw_records(sources, held_out=8, train_records=12, shares="proportional")
    assert Counter(name for name, *_ in sample.held_out) == {"one/train.json": 6, "two/train.json": 2}
    for name, index, record in sample.held_out:
        assert record == read_records([files[name]])[index]
    asked = [record.instruction.split() for record in sample.train]
    assert Counter(name for name, _ in asked) == {"one/train.json": 9, "two/train.json": 3}
    places = [int(place) for _, place in asked[:9]]
    assert places != sorted(places)
    with pytest.raises(InputError, match=r"9 records .* got 8"):
        draw_records(sources[1:], held_out=2, train_records=9)


def test_shares_of_the_files() -> None:
    assert apportion(10, [90, 10, 50], "equal") == [4, 3, 3]
    assert apportion(10, [90, 10, 50], "proportional") == [6, 1, 3]
