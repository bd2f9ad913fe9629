"""The three protocols on a tiny random model with a small byte-level tokenizer."""

import copy
import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from support import gguf_files
from support.harness import GOLDEN, TOKENIZER, plain_log_likelihoods
from support.harness import records as golden_records

from rora_theory.errors import InputError
from rora_theory.lab.data.prompts import prompt
from rora_theory.lab.data.tasks import TASKS, TaskRecord, render_instruction
from rora_theory.lab.evaluate import scoring
from rora_theory.lab.evaluate.choices import encode_choices, harness_choices, label_choices
from rora_theory.lab.evaluate.scoring import Sample, Scoring, score
from rora_theory.lab.llama import Model, ModelSource, load
from rora_theory.lab.llama.config import LlamaConfig
from rora_theory.lab.llama.generate import beam_search
from rora_theory.lab.llama.model import init_params

CONFIG = LlamaConfig(340, 16, 24, 2, 4, 2, 4, max_position_embeddings=1024, tie_word_embeddings=True)
# Ten times the usual spread: answers then differ by much more than rounding.
PARAMS = jax.tree.map(lambda leaf: 10 * leaf if leaf.ndim > 1 else leaf, init_params(jax.random.key(1), CONFIG))
RECORDS = [record for key in TASKS for record in golden_records(key)]
BOOLQ = golden_records("boolq")[0]


def _score(records: list[TaskRecord], protocol: Scoring, **options: object) -> dict[tuple[str, int], Sample]:
    samples = score(PARAMS, CONFIG, TOKENIZER, records, protocol, **options)  # type: ignore[arg-type]
    return {(sample.task, sample.index): sample for sample in samples}


@pytest.fixture(scope="module", params=["label", "harness"])
def scored(request) -> tuple[str, dict[tuple[str, int], Sample]]:
    """Return a log-likelihood protocol and the samples of all records under it."""
    return request.param, _score(RECORDS, Scoring(request.param), batch_size=1)


@pytest.mark.slow
def test_log_likelihood_protocols(scored) -> None:
    protocol, samples = scored
    records = [golden_records(key)[0] for key in ("boolq", "piqa", "winogrande")]
    item_choices = [
        harness_choices(record) if protocol == "harness" else label_choices(record, "train") for record in records
    ]
    encoded = encode_choices(TOKENIZER, item_choices, max_length=1024)
    reference = iter(plain_log_likelihoods(PARAMS, CONFIG, [choice for item in encoded for choice in item], length=512))
    for record, choices in zip(records, item_choices, strict=True):
        sample, expected = samples[record.task, record.index], [next(reference) for _ in choices]
        labels, values = zip(*sample.log_likelihoods, strict=True)
        assert labels == tuple(choice.label for choice in choices)
        # Sums of up to 40 float32 log-probabilities of order 10, each to about 1e-6 of its size.
        np.testing.assert_allclose(values, expected, rtol=0, atol=1e-3)
        assert sample.prediction == labels[int(np.argmax(expected))]
        assert sample.gold == record.answer
        assert sample.correct is (sample.prediction == record.answer)


def test_results_are_bitwise_independent_of_batch_size_and_interruption(scored) -> None:
    """One compiled program gives the same bits for equal inputs."""
    protocol, whole = scored
    assert _score(RECORDS, Scoring(protocol), batch_size=5) == whole
    done = list(whole)[::2]
    rest = _score(RECORDS, Scoring(protocol), done=done)
    assert rest == {key: sample for key, sample in whole.items() if key not in done}


def test_only_tasks_with_acc_norm_have_it(scored) -> None:
    protocol, samples = scored
    normed = {task for (task, _), sample in samples.items() if sample.correct_norm is not None}
    with_norm = {"piqa", "hellaswag", "ARC-Easy", "ARC-Challenge", "openbookqa"}
    assert normed == (with_norm if protocol == "harness" else set())
    assert len(samples) == len(RECORDS)


@pytest.mark.slow
def test_smollm2_scores_as_lm_eval_scores_it() -> None:
    """Both sides use float32: sums of up to 40 log-probabilities differ by their rounding."""
    gguf_files.packaged("smollm2-135m")
    model = load("smollm2-135m")
    samples = score(model.params, model.config, model.tokenizer, RECORDS, Scoring("harness"))
    values_by_item = {(sample.task, sample.index): [value for _, value in sample.log_likelihoods] for sample in samples}
    assert len(values_by_item) == len(RECORDS)
    for (key, index), values in values_by_item.items():
        np.testing.assert_allclose(values, GOLDEN["smollm2"][key][index], rtol=0, atol=1e-3)


def test_the_length_that_acc_norm_divides_by() -> None:
    """A choice three times as long wins per character although it is less likely."""
    record = golden_records("piqa")[0]
    pairs = zip(harness_choices(record), (10, 30), strict=True)
    choices = [dataclasses.replace(choice, length=length) for choice, length in pairs]
    sample = scoring._likeliest(record, choices, [-10.0, -20.0], norm=True)
    assert (sample.prediction, sample.prediction_norm) == ("solution1", "solution2")
    assert (sample.correct, sample.correct_norm) == (False, True)
    assert scoring._likeliest(record, choices, [-10.0, -20.0], norm=False).prediction_norm is None


def test_ties_select_the_first_choice_and_non_finite_scores_none() -> None:
    choices = harness_choices(BOOLQ)
    assert scoring._likeliest(BOOLQ, choices, [-1.0, -1.0], norm=False).prediction == "false"
    for bad in (np.nan, -np.inf):
        with pytest.raises(InputError, match=rf"boolq record 0: log-likelihoods .* {bad}"):
            scoring._likeliest(BOOLQ, choices, [-1.0, bad], norm=False)


def test_finished_samples_are_read_once() -> None:
    """The finished samples are not read again for each record, which was slow for a large task."""
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
    (sample,) = _score(golden_records("openbookqa"), Scoring("generate")).values()
    assert (sample.prediction, sample.correct) == (prediction, correct)


def test_templates_of_the_protocols(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [Scoring(name).template for name in ("generate", "label", "harness")] == ["eval", "train", None]
    scored_items: list[object] = []
    monkeypatch.setattr(scoring, "log_likelihoods", lambda *arguments, **_: scored_items.append(arguments[2]) or [])
    templates = ("train", "eval", "clean")
    for template in templates:
        score(PARAMS, CONFIG, TOKENIZER, [BOOLQ], Scoring("label", template))
    expected = [encode_choices(TOKENIZER, [label_choices(BOOLQ, name)], max_length=1024) for name in templates]
    assert scored_items == expected
    assert expected[0] != expected[1] != expected[2] != expected[0]


def test_no_prompt_ends_with_the_end_of_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint that puts its end token after every text is given the same tokens as one that does not."""
    ending = dataclasses.replace(TOKENIZER, backend=copy.deepcopy(TOKENIZER.backend))
    ending.backend.add_eos_token = True
    assert ending.encode("a") == [*TOKENIZER.encode("a"), 1]
    read: list[object] = []
    monkeypatch.setattr(scoring, "log_likelihoods", lambda *arguments, **_: read.append(arguments[2]) or [])
    monkeypatch.setattr(scoring, "beam_search", lambda *arguments, **_: read.append(arguments[2]) or [[1]])
    for protocol in scoring.PROTOCOLS:
        for tokenizer in (TOKENIZER, ending):
            list(score(PARAMS, CONFIG, tokenizer, [BOOLQ], Scoring(protocol)))
        assert read[-1] == read[-2], protocol


def test_a_long_prompt_of_any_task_is_refused_before_the_first_is_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "beam_search", lambda *_, **__: pytest.fail("scored a record"))
    piqa = golden_records("piqa")
    lengths = [len(TOKENIZER.encode(prompt(record.instruction, "eval"))) for record in (BOOLQ, *piqa)]
    assert lengths[0] < max(lengths)
    config = dataclasses.replace(CONFIG, max_position_embeddings=max(lengths) + 31)
    model = Model(PARAMS, config, TOKENIZER, ModelSource("tiny", Path("tiny")))
    with pytest.raises(InputError, match=f"piqa record .*got {max(lengths)}"):
        next(scoring.score_tasks(model, {"boolq": [BOOLQ], "piqa": piqa}, Scoring("generate")))


def test_a_label_is_scored_after_its_whole_prompt_or_not_at_all() -> None:
    """The harness truncates long prompts instead."""
    item = encode_choices(TOKENIZER, [label_choices(BOOLQ, "train")], max_length=1024)[0]
    length = max(len(choice.tokens) for choice in item)
    fits, short = (dataclasses.replace(CONFIG, max_position_embeddings=length - n) for n in (1, 2))
    score(PARAMS, fits, TOKENIZER, [BOOLQ], Scoring("label"))
    score(PARAMS, dataclasses.replace(CONFIG, max_position_embeddings=9), TOKENIZER, [BOOLQ], Scoring("harness"))
    with pytest.raises(InputError, match=f"boolq record 0: .*at most {length - 1} tokens .*got {length}"):
        score(PARAMS, short, TOKENIZER, [BOOLQ], Scoring("label"))


def test_the_longest_possible_prompt_is_accepted_and_a_longer_one_refused() -> None:
    length = len(TOKENIZER.encode(prompt(BOOLQ.instruction, "eval")))
    fits, short = (dataclasses.replace(CONFIG, max_position_embeddings=length + room) for room in (32, 31))
    score(PARAMS, fits, TOKENIZER, [BOOLQ], Scoring("generate"))
    with pytest.raises(InputError, match=f"boolq record 0: .*at most {length - 1} tokens .*got {length}"):
        score(PARAMS, short, TOKENIZER, [BOOLQ], Scoring("generate"))
    with pytest.raises(InputError, match=r"batch_size .*0"):
        score(PARAMS, CONFIG, TOKENIZER, [BOOLQ], Scoring("label"), batch_size=0)
