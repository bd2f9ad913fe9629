"""A run read on the way: each reading is that of a run that ends there, to the bit."""

from dataclasses import replace

import pandas as pd
import pytest
from support import checkpoint

from rora_theory.errors import InputError
from rora_theory.evaluate.scoring import Scoring
from rora_theory.finetune import FinetuneConfig
from rora_theory.horizon import readings
from rora_theory.llama import locate
from rora_theory.measure import led
from rora_theory.sweep.records import draw_records
from rora_theory.sweep.workbench import Workbench

TRAINING = FinetuneConfig(
    rank=2, alpha=4, rule="lora", lr=1e-2, warmup=1, schedule="constant", dropout=0.0, batch_size=4, cutoff=400,
    widths=1, template="clean", held_out=0, seed=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Workbench:
    data = checkpoint.two_files(tmp_path_factory.mktemp("data"))
    model = str(checkpoint.model(tmp_path_factory.mktemp("model")))
    records = draw_records([str(data / name / "train.json") for name in ("one", "two")], held_out=6, train_records=12)
    found = Workbench(TRAINING, records, {}, {model: locate(model)}, scoring=Scoring("label", "clean"))
    found.open(model)
    return found


@pytest.mark.slow
def test_a_reading_on_the_way_is_that_of_a_run_which_ends_there(bench) -> None:
    whole = readings.read_run(bench, TRAINING, (2, 3, 5))
    assert [one.step for one in whole.readings] == [2, 3, 5]
    assert len(whole.train_losses) == 5
    assert len({tuple(one.losses) for one in whole.readings}) == 3
    for step, reading in ((2, 0), (3, 1)):
        part = readings.read_run(bench, TRAINING, (step,))
        assert part.readings == [whole.readings[reading]]
        assert part.train_losses == whole.train_losses[:step]
    first, _, last = (pd.DataFrame(one.parts) for one in whole.readings)
    assert list(first) == ["layer", "module", *led.PARTS]
    assert (first["led_A"] == 0).all(), "the first rate is 0, and while B = 0 A has no gradient"
    assert (first["led_B"] > 0).all()
    assert ((last["led_A"] > 0) & (last["led_A"] < last["led_B"])).all()
    tokens, answers = readings.token_counts(bench)
    assert len(tokens) == len(answers) == len(whole.readings[0].losses) == 6
    assert all(0 < answer < count for count, answer in zip(tokens, answers, strict=True))


@pytest.mark.slow
def test_a_run_that_diverges_keeps_what_was_read_before(bench, monkeypatch) -> None:
    whole = readings.read_run(bench, TRAINING, (1, 2))
    real = readings.read_held_out

    def spoilt(bench, step, params):
        found = real(bench, step, params)
        return readings.Reading(step, [float("nan")] * len(found.losses), []) if step == 2 else found

    monkeypatch.setattr(readings, "read_held_out", spoilt)
    found = readings.read_run(bench, TRAINING, (1, 2))
    assert found.readings == whole.readings[:1]
    assert found.diverged_at == 2


@pytest.mark.parametrize(
    ("changes", "steps", "said"),
    [
        ({}, (), "read_at"),
        ({}, (0, 2), "read_at"),
        ({}, (4, 2), "read_at"),
        ({"schedule": "linear"}, (2, 4), "schedule 'linear', got 2 4"),
        ({}, (10**6,), "read_at must end at .*, got 1000000"),
    ],
)
def test_bad_steps_are_refused(bench, changes, steps, said) -> None:
    with pytest.raises(InputError, match=said):
        readings.read_run(bench, replace(TRAINING, **changes), steps)


def test_a_run_in_words() -> None:
    """Losses a token of all records together, and where it ended before its time."""
    first, second = {"step": 2, "losses": [2.0, 4.0]}, {"step": 3, "losses": [1.0, 0.5]}
    found = {"readings": [first, second], "diverged_at": None}
    assert readings.describe_run(found, [1, 2]) == "2.0000 at 2, 0.5000 at 3"
    assert readings.describe_run(found | {"diverged_at": 4}, [1, 2]).endswith(" at 3, diverged at 4")
