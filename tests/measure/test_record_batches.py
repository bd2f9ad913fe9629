"""Batches of records to step on and to read at: fixed or fresh, each seed's own, no record in both."""

import numpy as np
import pytest
from support import checkpoint

from rora_theory import InputError
from rora_theory.finetune import read_records
from rora_theory.llama import load
from rora_theory.measure.record_batches import BatchConfig, PairConfig, by_seed, pair


def test_fixed_and_fresh_batches(tmp_path) -> None:
    """Fixed: one batch in every step; fresh: another in each; no held-out record is trained on."""
    tokenizer = load(checkpoint.model(tmp_path)).tokenizer
    records = read_records([str(checkpoint.records(tmp_path / "train.json", 40))])
    found = {}
    for kind in ("fixed", "fresh"):
        config = BatchConfig(batches=kind, batch_size=2, held_out=6, cutoff=160, template="clean")
        found[kind] = by_seed(config, records, tokenizer, seeds=(0, 7), steps=10)
    fixed, fresh = found["fixed"], found["fresh"]
    np.testing.assert_array_equal(fixed[0].at(0).inputs, fixed[0].at(3).inputs)
    assert not np.array_equal(fresh[0].at(0).inputs, fresh[0].at(3).inputs)
    assert not np.array_equal(fixed[0].at(0).inputs, fixed[7].at(0).inputs)
    trained = {row.tobytes() for step in range(17) for row in fresh[0].at(step).inputs}
    assert len(trained) == 34
    for row, weights in zip(fresh[0].held_out.inputs, fresh[0].held_out.weights, strict=True):
        assert row.tobytes() not in trained
        first = int(np.argmax(weights))  # what is read begins where the prompt's common opening ends
        assert any(row[:first].tobytes() == other[: first * row.itemsize] for other in trained)
        assert not any(row[: first + 1].tobytes() == other[: (first + 1) * row.itemsize] for other in trained)


def test_too_few_records(tmp_path) -> None:
    tokenizer = load(checkpoint.model(tmp_path)).tokenizer
    records = read_records([str(checkpoint.records(tmp_path / "train.json", 4))])
    with pytest.raises(InputError, match="hold 4 records; accepted are 5 or more"):
        pair(PairConfig(batch_size=2, held_out=3), records, tokenizer)


@pytest.mark.parametrize("config", [BatchConfig, PairConfig])
@pytest.mark.parametrize(("name", "value"), [("batch_size", 0), ("held_out", 0), ("cutoff", 1)])
def test_what_is_out_of_range_is_named(config: type, name: str, value: int) -> None:
    with pytest.raises(InputError, match=f"--{name.replace('_', '-')} is {value}"):
        config(**{name: value})
