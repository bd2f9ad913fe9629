"""Requests of the log-likelihood protocols, against golden requests and tokens of lm-evaluation-harness."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
from support.harness import GOLDEN, TOKENIZER
from support.harness import records as golden_records

from rora_theory.errors import InputError
from rora_theory.lab.data.prompts import TEMPLATES, prompt
from rora_theory.lab.data.tasks import TASKS, TaskRecord
from rora_theory.lab.evaluate import choices
from rora_theory.lab.evaluate.choices import (
    Choice,
    EncodedChoice,
    encode_choices,
    harness_choices,
    hellaswag_parts,
    label_choices,
)
from rora_theory.runs import digests

WITH_BOS = replace(TOKENIZER, backend=copy.deepcopy(TOKENIZER.backend))
WITH_BOS.backend.add_bos_token = True
TOKENIZERS = {"plain": TOKENIZER, "bos": WITH_BOS}


@pytest.mark.parametrize("key", TASKS)
def test_harness_requests_equal_those_of_lm_eval(key: str) -> None:
    for record, expected in zip(golden_records(key), GOLDEN["requests"][key], strict=True):
        assert [[choice.context, choice.continuation] for choice in harness_choices(record)] == expected


def test_changed_texts_require_a_new_version() -> None:
    """The texts of one record of each task are pinned.

    If this fails, raise `choices.TEXTS` too, so that no run resumes with other texts.
    """
    all_texts = [
        [
            *((choice.context, choice.continuation, choice.length) for choice in harness_choices(record)),
            *((c.context, c.continuation) for template in TEMPLATES for c in label_choices(record, template)),
            *(prompt(record.instruction, template) for template in TEMPLATES),
        ]
        for record in (golden_records(key)[0] for key in TASKS)
    ]
    assert (choices.TEXTS, digests.of_json(all_texts)[:16]) == ("2", "b5ffb9dcc108d61f")


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
    """ActivityNet's contexts, the file's first 3243, end on a fragment that begins no sentence; WikiHow's do not."""
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
    choices_of_task = {key: harness_choices(golden_records(key)[0]) for key in ("boolq", "ARC-Easy")}
    assert [(c.label, c.continuation) for c in choices_of_task["boolq"]] == [("false", " no"), ("true", " yes")]
    assert [c.label for c in choices_of_task["ARC-Easy"]] == [f"answer{n}" for n in range(1, 6)]


@pytest.mark.parametrize("key", ["piqa", "hellaswag", "winogrande", "ARC-Easy"])
def test_lengths_are_characters_of_the_choice_without_the_space_before(key: str) -> None:
    """Each of these letters has two or three bytes in UTF-8. Winogrande's choice is the context."""
    question = "_ is" if key == "winogrande" else "is it"
    choices = harness_choices(TaskRecord(key, 0, "", question, ("é", "über", "日本"), ("a", "b", "c"), 0))
    assert [c.length for c in choices] == [1, 4, 2]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokens_are_lm_evals(name: str) -> None:
    items = [[Choice("a", context, continuation, 1)] for context, continuation in GOLDEN["pairs"]]
    encoded = encode_choices(TOKENIZERS[name], items, max_length=100)
    expected = [EncodedChoice((*context, *scored), len(scored)) for context, scored in GOLDEN["tokens"][name]]
    assert [choices[0] for choices in encoded] == expected


def test_bos_is_not_added_twice_without_a_context() -> None:
    ((scored,),) = encode_choices(TOKENIZER, [[Choice("a", "", "<s>the sun", 1)]], max_length=9)
    assert scored.tokens[0] == 0
    assert 0 not in scored.tokens[1:]


def test_long_sequences_are_truncated_on_the_left_and_keep_scored_tokens() -> None:
    item = [Choice("answer2", "the sun is a star because", " the box fit", 4)]
    ((whole,),) = encode_choices(TOKENIZER, [item], max_length=100)
    assert 1 < whole.count < len(whole.tokens) - 2
    for length in (whole.count, whole.count + 1):
        ((cut,),) = encode_choices(TOKENIZER, [item], max_length=length)
        assert cut.tokens == whole.tokens[-(length + 1) :]  # those to read, and the last, which is only scored
        assert cut.count == whole.count
    empty = [Choice("answer2", "the sun", "", 1)]
    for refused, length, count in ((item, whole.count - 1, whole.count), (empty, 4, 0)):
        with pytest.raises(InputError, match=rf"item 0: choice answer2 .*tokens after its context, got {count}"):
            encode_choices(TOKENIZER, [refused], max_length=length)


def test_label_choices_continue_the_training_prompt() -> None:
    record = golden_records("openbookqa")[0]
    choices = label_choices(record, "train")
    assert [c.continuation for c in choices] == ["answer1", "answer2", "answer3", "answer4"]
    assert {c.context for c in choices} == {prompt(record.instruction, "train") + "the correct answer is "}
    # The space goes with the label, as in the training text.
    scored = encode_choices(TOKENIZER, [choices], max_length=500)[0][0]
    assert list(scored.tokens) == TOKENIZER.encode(choices[0].context + choices[0].continuation)
