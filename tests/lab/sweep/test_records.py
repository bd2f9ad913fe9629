"""The records of a sweep: seeded, held out once and then never trained on, and each file with its share."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from support import checkpoint

from rora_theory.errors import InputError
from rora_theory.lab.data.records import DataConfig
from rora_theory.lab.finetune import read_records
from rora_theory.lab.sweep.records import draw_records


def write_files(folder: Path, **rows_by_name: list[dict[str, Any]]) -> list[str]:
    """Write records to NAME/train.json and return the paths."""
    for name, rows in rows_by_name.items():
        (folder / name).mkdir()
        (folder / name / "train.json").write_text(json.dumps(rows))
    return [str(folder / name / "train.json") for name in rows_by_name]


def prompts(word: str, count: int) -> list[dict[str, Any]]:
    return [{"instruction": f"{word} {i}", "output": "a"} for i in range(count)]


def test_held_out_records_are_in_no_training_set(tmp_path) -> None:
    data = checkpoint.two_files(tmp_path)
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
    """Every instruction occurs twice in one file and once in another; it is held out once, and then never trained
    on.
    """
    rows = prompts("say", 12)
    files = write_files(tmp_path, one=rows * 2, two=rows[:6] + prompts("tell", 9))
    for seed in range(6):
        sample = draw_records(files, held_out=8, seed=seed)
        held_out = [record.instruction for _, _, record in sample.held_out]
        assert len(held_out) == len(set(held_out)) == 8
        trained = {record.instruction for record in sample.train}
        assert not trained & set(held_out)
        assert len(trained) == 21 - 8, "all others are trained on"


def test_records_of_one_instruction_with_different_inputs_are_distinct(tmp_path) -> None:
    """Of eight records that share one instruction, as in Alpaca, four are held out and four trained on."""
    rows = [{"instruction": "Translate", "input": str(i), "output": "a"} for i in range(8)]
    sample = draw_records(write_files(tmp_path, x=rows), held_out=4)
    inputs = [{record.input for record in side} for side in (sample.train, [r for *_, r in sample.held_out])]
    assert [len(side) for side in inputs] == [4, 4]
    assert not inputs[0] & inputs[1]


def test_chats_with_the_same_question_are_on_one_side(tmp_path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"say {i % 8}"}, {"role": "assistant", "content": str(i)}]}
        for i in range(16)
    ]
    files = write_files(tmp_path, chats=rows)
    sample = draw_records(files, held_out=4)
    sides = sample.train, [record for *_, record in sample.held_out]
    questions = [{record.messages[0]["content"] for record in side} for side in sides]
    assert not questions[0] & questions[1]
    assert [len(side) for side in questions] == [4, 4]
    assert sample.source.template(None) == "chat"
    dated = draw_records(files, held_out=4, config=DataConfig(chat_date="2026-01-31"))
    assert dated.summary == sample.summary | {"chat_date": "2026-01-31"}


def test_texts_have_no_answers_to_measure(tmp_path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\nthree\n")
    with pytest.raises(InputError, match=r"a\.txt: .* got texts"):
        draw_records([str(tmp_path / "a.txt")], held_out=2)


def test_files_contribute_equally_and_sampling_is_reproducible(tmp_path) -> None:
    """A held-out record is named by its folder, file and place in it; training records are in the seed's order."""
    files = write_files(tmp_path, one=prompts("one", 30), two=prompts("two", 10))
    sample = draw_records(files, held_out=5, train_records=13)
    assert Counter(name for name, *_ in sample.held_out) == {"one/train.json": 3, "two/train.json": 2}
    for name, index, record in sample.held_out:
        assert record == read_records([tmp_path / name])[index]
    instructions = [record.instruction.split() for record in sample.train]
    assert Counter(name for name, _ in instructions) == {"one": 7, "two": 6}
    places = [int(place) for _, place in instructions[:7]]
    assert places != sorted(places)
    with pytest.raises(InputError, match=r"9 records .* got 8"):
        draw_records(files[1:], held_out=2, train_records=9)
