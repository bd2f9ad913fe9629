"""What the log-likelihood protocols ask, against golden requests and tokens made by lm-evaluation-harness."""

import json
from pathlib import Path

import pytest
import tokenizers

from rora_theory.data.prompts import TEMPLATES, prompt
from rora_theory.data.tasks import TASKS, TaskRecord, render_instruction
from rora_theory.errors import InputError
from rora_theory.evaluate import choices
from rora_theory.evaluate.choices import (
    Choice,
    Scored,
    encode_choices,
    harness_choices,
    hellaswag_parts,
    label_choices,
)
from rora_theory.io import digests
from rora_theory.llama.tokenizer import Tokenizer

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "harness.json").read_text())
BACKEND = tokenizers.Tokenizer.from_str(json.dumps(GOLDEN["tokenizer"]))
TOKENIZERS = {
    "plain": Tokenizer(BACKEND, bos_id=0, eos_id=1),
    "bos": Tokenizer(BACKEND, bos_id=0, eos_id=1, prefix=(0,)),
}


def _record(key: str, index: int = 0) -> TaskRecord:
    question, choices, gold = GOLDEN["items"][key][index]
    task = TASKS[key]
    instruction = render_instruction(task, question, choices)
    return TaskRecord(key, index, instruction, question, tuple(choices), task.labels[: len(choices)], gold)


@pytest.mark.parametrize("key", TASKS)
def test_harness_asks_what_lm_eval_asks(key: str) -> None:
    for index, expected in enumerate(GOLDEN["requests"][key]):
        found = [[choice.context, choice.continuation] for choice in harness_choices(_record(key, index))]
        assert found == expected


def test_texts_that_change_have_another_version() -> None:
    """One record of each task under every protocol and template: where this fails, raise `choices.TEXTS` too, so that
    no run goes on with other texts."""
    asked = [
        [
            *((choice.context, choice.continuation, choice.length) for choice in harness_choices(record)),
            *((c.context, c.continuation) for template in TEMPLATES for c in label_choices(record, template)),
            *(prompt(record.instruction, template) for template in TEMPLATES),
        ]
        for record in map(_record, TASKS)
    ]
    assert (choices.TEXTS, digests.of_json(asked)[:16]) == ("2", "b5ffb9dcc108d61f")


@pytest.mark.parametrize(
    ("context", "parts"),
    [
        ("Baking: A man bakes bread. he", ("Baking", "A man bakes bread.", "he")),
        ("Sailing: . the crew", ("Sailing", ".", "the crew")),
        ('Chess: One says "check!" 50', ("Chess", 'One says "check!"', "50")),
        ("Running: people run", ("Running", "", "people run")),
        # A point inside of a word ends no sentence, and a context that ends on a sentence has no fragment.
        ("Polo: Two teams meet. prince st.john and", ("Polo", "Two teams meet.", "prince st.john and")),
        ("Food: How to fry. Heat it (3.5 minutes).", ("Food", "How to fry. Heat it (3.5 minutes).", "")),
    ],
)
def test_parts_of_a_hellaswag_context(context: str, parts: tuple[str, str, str]) -> None:
    assert hellaswag_parts(context) == parts


def test_parts_of_the_data(commonsense_dir: Path) -> None:
    """ActivityNet's contexts, the file's first 3243, end on a fragment, which begins no sentence; WikiHow's do not."""
    lines = (commonsense_dir / "hellaswag" / "test_mc.jsonl").read_text().splitlines()
    fragments = 0
    for row in map(json.loads, lines):
        activity, sentences, fragment = hellaswag_parts(row["context"])
        assert f"{activity}: {sentences} {fragment}".strip() == row["context"]
        assert bool(fragment) == (row["index"] < 3243)
        assert not fragment[:1].isupper()
        fragments += bool(fragment)
    assert fragments == 1604


def test_labels_follow_the_choices_whatever_their_order() -> None:
    assert [(c.label, c.continuation) for c in harness_choices(_record("boolq"))] == [
        ("false", " no"),
        ("true", " yes"),
    ]
    assert [c.label for c in harness_choices(_record("ARC-Easy"))] == [f"answer{n}" for n in range(1, 6)]


def test_lengths_are_characters_of_the_choice_without_the_space_before() -> None:
    assert [c.length for c in harness_choices(_record("piqa"))] == [25, 16]
    assert [c.length for c in harness_choices(_record("ARC-Challenge"))] == [3, 3, 4]
    # Winogrande's choice is the context.
    assert [c.length for c in harness_choices(_record("winogrande", 1))] == [3, 3]


@pytest.mark.parametrize("key", ["piqa", "hellaswag", "winogrande", "ARC-Easy"])
def test_lengths_are_not_bytes(key: str) -> None:
    """Each of these letters is two or three bytes of UTF-8."""
    question = "_ is" if key == "winogrande" else "is it"
    found = harness_choices(TaskRecord(key, 0, "", question, ("é", "über", "日本"), ("a", "b", "c"), 0))
    assert [c.length for c in found] == [1, 4, 2]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokens_are_lm_evals(name: str) -> None:
    items = [[Choice("a", context, continuation, 1)] for context, continuation in GOLDEN["pairs"]]
    found = encode_choices(TOKENIZERS[name], items, max_length=100)
    expected = [Scored((*context, *scored), len(scored)) for context, scored in GOLDEN["tokens"][name]]
    assert [choices[0] for choices in found] == expected


def test_a_continuation_that_begins_with_bos_after_nothing_is_not_given_it_twice() -> None:
    ((scored,),) = encode_choices(TOKENIZERS["plain"], [[Choice("a", "", "<s>the sun", 1)]], max_length=9)
    assert scored.tokens[0] == 0
    assert 0 not in scored.tokens[1:]


def test_long_sequences_lose_their_beginning() -> None:
    choice = Choice("a", "the sun is a star because the box", " fit", 4)
    ((whole,),) = encode_choices(TOKENIZERS["plain"], [[choice]], max_length=100)
    ((cut,),) = encode_choices(TOKENIZERS["plain"], [[choice]], max_length=4)
    assert cut.tokens == whole.tokens[-5:]  # 4 to read, and the last, which is only scored
    assert cut.count == whole.count


@pytest.mark.parametrize("continuation", ["", " the sun is a star because the box"])
def test_continuations_without_a_token_or_too_long_are_refused(continuation: str) -> None:
    item = [Choice("answer2", "the sun", continuation, 1)]
    with pytest.raises(InputError, match=r"item 0: choice answer2 .*tokens after its context, got \d+"):
        encode_choices(TOKENIZERS["plain"], [item], max_length=4)


def test_a_continuation_of_as_many_tokens_as_are_read_is_scored() -> None:
    item = [Choice("a", "the sun", " is a star", 1)]
    ((scored,),) = encode_choices(TOKENIZERS["plain"], [item], max_length=100)
    ((cut,),) = encode_choices(TOKENIZERS["plain"], [item], max_length=scored.count)
    assert cut.count == scored.count > 1
    with pytest.raises(InputError, match=f"tokens after its context, got {scored.count}"):
        encode_choices(TOKENIZERS["plain"], [item], max_length=scored.count - 1)


def test_label_choices_stand_where_training_put_them() -> None:
    record = _record("openbookqa")
    choices = label_choices(record, "train")
    assert [c.continuation for c in choices] == ["answer1", "answer2", "answer3", "answer4"]
    assert {c.context for c in choices} == {prompt(record.instruction, "train") + "the correct answer is "}
    # The space goes with the label, as in the training text.
    scored = encode_choices(TOKENIZERS["plain"], [choices], max_length=500)[0][0]
    whole = TOKENIZERS["plain"].encode(choices[0].context + choices[0].continuation)
    assert list(scored.tokens) == whole
