"""Training uses the prompt template that was named, or that of the data format."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from support import tiny

from rora_theory.errors import InputError
from rora_theory.lab.data import prompts
from rora_theory.lab.data.batches import Batches, split_records
from rora_theory.lab.data.formats import Completion, Text
from rora_theory.lab.data.records import DataConfig
from rora_theory.lab.finetune import FinetuneConfig, Record, Trainer, prepare, read_record_set, read_records
from rora_theory.lab.llama.tokenizer import Tokenizer

CONFIG = FinetuneConfig(held_out=1, widths=1, batch_size=2)


def first(data):
    """Return the text of the first training record, without its first and last token."""
    return bytes(data.train.examples[0][1:-1].tolist()).decode()


@pytest.fixture
def completions(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps([{"prompt": "2 + 2 = ", "completion": "4"}] * 3))
    return path


def test_training_and_held_out_records():
    """Records are counted on each side of the seed's split; widths and skipped records cover both."""
    train, held_out = split_records(range(7), 2, 3)
    sizes = dict.fromkeys(train, (2, 2)) | {train[0]: (50, 2), held_out[0]: (50, 2), held_out[1]: (30, 20)}
    records = [Completion(chr(97 + i) * sizes[i][0], "!" * sizes[i][1]) for i in range(7)]
    config = FinetuneConfig(held_out=2, seed=3, cutoff=40, loss_on="answer", batch_size=2, widths=2)
    data = prepare(records, tiny.ByteEncoder(), config)
    summary = {"records": 7, "trained_on": 4, "validated_on": 1, "truncated": 3, "skipped": 2, "widths": (8, 40)}
    assert data.summary | summary == data.summary
    expected = Batches(data.train.examples, (8, 40), batch_size=2, epochs=config.epochs, seed=3, answer_only=True)
    for step in (0, len(expected) - 1):
        np.testing.assert_array_equal(data.train[step].inputs, expected[step].inputs)
    texts = [bytes(data.train.examples[i][1:-1].tolist()).decode() for i in range(4)]
    assert texts == [2 * chr(97 + i) + "!!" for i in train[1:]]
    assert bytes(data.validation.examples[0][1:].tolist()).decode() == 30 * chr(97 + held_out[1]) + 9 * "!"


def test_steps_replace_the_epochs():
    """More steps than the epochs have repeat the records, in a new order; fewer leave some out."""
    records = [Completion(chr(97 + i), "!") for i in range(4)]
    config = FinetuneConfig(held_out=0, batch_size=2, epochs=2)
    longer, whole, shorter = (
        prepare(records, tiny.ByteEncoder(), dataclasses.replace(config, steps=steps)).train for steps in (9, None, 3)
    )
    assert [len(batches) for batches in (longer, whole, shorter)] == [9, 4, 3]
    for step, batch in enumerate(whole):
        np.testing.assert_array_equal(batch.inputs, longer[step].inputs)
    last_epoch = np.concatenate([longer[step].inputs[:, 1] for step in (6, 7)])
    assert sorted(last_epoch.tolist()) == [97 + i for i in range(4)]


def test_a_record_set_has_the_prompt_of_its_format(completions):
    record_set = read_record_set([completions])
    assert first(prepare(record_set, tiny.ByteEncoder(), CONFIG)) == "2 + 2 = 4"
    expected = prompts.prompt("2 + 2 = ", "clean") + "4"
    assert first(prepare(record_set, tiny.ByteEncoder(), FinetuneConfig(held_out=1, template="clean"))) == expected


@pytest.mark.slow
def test_a_record_set_has_its_chat_template(model_folder, tmp_path):
    """The record set has the template it was read with, of a tokenizer that has none."""
    (tmp_path / "x.json").write_text(
        json.dumps([{"messages": [{"role": "user", "content": "fox"}, {"role": "assistant", "content": "dog"}]}] * 3)
    )
    record_set = read_record_set([tmp_path / "x.json"], DataConfig(chat_template="chatml"))
    tokenizer = Tokenizer.from_folder(model_folder)
    assert tokenizer.chat_template is None
    data = prepare(record_set, tokenizer, CONFIG)
    assert "assistant" in tokenizer.decode(data.train.examples[0].tolist())


def test_a_list_s_prompt_is_that_of_the_records_kind(completions):
    pairs = read_records([completions])
    assert first(prepare(pairs, tiny.ByteEncoder(), CONFIG)) == "2 + 2 = 4"
    assert first(prepare([Text("abc")] * 3, tiny.ByteEncoder(), CONFIG)) == "abc"
    for named in (CONFIG, FinetuneConfig(held_out=1, template="train")):
        expected = prompts.prompt("q", "train") + "a"
        assert first(prepare([Record("q", "a")] * 3, tiny.ByteEncoder(), named)) == expected
    for records in ([Text("a"), *pairs, Record("q", "a")], [*pairs, Record("q", "a")]):
        with pytest.raises(InputError, match=r"^template .* None for .*plain"):
            prepare(records, tiny.ByteEncoder(), CONFIG)


@pytest.mark.slow
@pytest.mark.parametrize("loss_on", ["all", "answer"])
def test_records_of_the_maximum_length_are_trained_on(loss_on):
    """The maximum length is no multiple of 8. Padding adds nothing to the loss and does not exceed that length."""
    config = FinetuneConfig(method="prefix", batch_size=2, steps=1, held_out=2, cutoff=70, loss_on=loss_on, widths=2)
    records = [Completion("q" * length, "!" * 80) for length in (2, 9, 30, 40)]
    params, data = tiny.params(), prepare(records, tiny.ByteEncoder(), config)
    adapter = config.adapter().build(jax.random.key(0), tiny.CONFIG, params)

    def events(longest):
        model = dataclasses.replace(tiny.CONFIG, max_position_embeddings=longest)
        return list(Trainer(params, model, adapter, config, data.train, data.validation, None).train())

    (step, validated), (roomy, other) = events(69), events(512)
    assert (step.positions, roomy.positions) == (2 * 69, 2 * 72)
    assert (step.loss, validated.loss) == (pytest.approx(roomy.loss, rel=1e-5), pytest.approx(other.loss, rel=1e-5))
    with pytest.raises(InputError, match=r"a record has 70 tokens, .* at most 69.*cutoff to 69"):
        events(68)
