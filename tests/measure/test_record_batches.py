"""Batches of records for training and for reading: fixed or fresh, different for each seed, and disjoint."""

from dataclasses import replace

import numpy as np
import pytest
from support import checkpoint

from rora_theory import InputError
from rora_theory.lab.finetune import read_records
from rora_theory.lab.llama import load
from rora_theory.lab.llama.tokenizer import Tokenizer
from rora_theory.measure.record_batches import BatchConfig, PairConfig, SeedBatches, make_batch_pair, make_seed_batches


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return load(checkpoint.model(tmp_path_factory.mktemp("model"))).tokenizer


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> list:
    return read_records([str(checkpoint.records(tmp_path_factory.mktemp("data") / "train.json", 40))])


def batches_of(records, tokenizer, seeds, steps, **changed) -> dict[int, SeedBatches]:
    settings = {"batches": "fresh", "batch_size": 4, "held_out": 6, "cutoff": 160, "template": "clean"} | changed
    return make_seed_batches(BatchConfig(**settings), records, tokenizer, seeds=seeds, steps=steps)


def test_fixed_and_fresh_batches(tokenizer, data) -> None:
    """Fixed batches are the same in every step and fresh ones differ; no held-out record is trained on."""
    fixed, fresh = (batches_of(data, tokenizer, (0, 7), 10, batches=kind, batch_size=2) for kind in ("fixed", "fresh"))
    np.testing.assert_array_equal(fixed[0].at(0).inputs, fixed[0].at(3).inputs)
    assert not np.array_equal(fresh[0].at(0).inputs, fresh[0].at(3).inputs)
    assert not np.array_equal(fixed[0].at(0).inputs, fixed[7].at(0).inputs)
    assert not np.array_equal(fixed[0].held_out.inputs, fixed[7].held_out.inputs)
    trained = {row.tobytes() for step in range(17) for row in fresh[0].at(step).inputs}
    assert len(trained) == 34
    for row, weights in zip(fresh[0].held_out.inputs, fresh[0].held_out.weights, strict=True):
        assert row.tobytes() not in trained
        first = int(np.argmax(weights))  # what is read begins where the prompt's common opening ends
        assert any(row[:first].tobytes() == other[: first * row.itemsize] for other in trained)
        assert not any(row[: first + 1].tobytes() == other[: (first + 1) * row.itemsize] for other in trained)


def test_every_row_of_every_batch_is_a_record(tokenizer, data) -> None:
    """11 training records make two batches of 4, and 6 held-out records one; the rest is in no batch."""
    for batches in batches_of(data[:17], tokenizer, range(8), 2).values():
        trained = np.concatenate([batches.at(step).inputs for step in range(2)])
        assert len({row.tobytes() for row in trained if row.any()}) == 8
        assert batches.held_out.inputs.any(axis=1).tolist() == [True] * 4
        with pytest.raises(InputError, match=r"step 2 .*, got 2"):
            batches.at(2)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({}, r"at least 12 records .*3 batches of --batch-size 4\), got 11"),
        ({"batches": "fixed", "batch_size": 12, "held_out": 12}, "at least 12 records .*, got 5"),
        ({"held_out": 3}, "at least --batch-size 4 held-out records, got 3"),
    ],
)
def test_too_few_records_for_separate_batches(changed, message, tokenizer, data) -> None:
    with pytest.raises(InputError, match=message):
        batches_of(data[:17], tokenizer, (0,), 3, **changed)


def test_too_few_records_for_a_pair(tokenizer, data) -> None:
    with pytest.raises(InputError, match=r"at least 5 records .* got 4 records"):
        make_batch_pair(PairConfig(batch_size=2, held_out=3), data[:4], tokenizer)
    long_questions = [record._replace(instruction="a " * 40) if i % 2 else record for i, record in enumerate(data[:17])]
    config = PairConfig(batch_size=8, held_out=8, cutoff=80, loss_on="answer")
    with pytest.raises(InputError, match="of 8 records of a batch have a target within --cutoff 80"):
        make_batch_pair(config, long_questions, tokenizer, template="plain")
    assert (
        len(make_batch_pair(replace(config, cutoff=160), long_questions, tokenizer, template="plain").train.inputs) == 8
    )
