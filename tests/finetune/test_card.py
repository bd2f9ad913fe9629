"""What a run's card says of its learning rate is what the schedule does."""

import math

import pytest

from rora_theory.data.records import DataConfig, RecordSet
from rora_theory.finetune import FinetuneConfig, Record, card
from rora_theory.finetune import step as steps


@pytest.mark.parametrize(
    ("schedule", "warmup", "count", "said", "last"),
    [
        ("linear", 2, 6, "0.5 after 2 steps of warm-up, then linearly, to be 0 after the last step", 0.125),
        ("constant", 2, 6, "0.5 after 2 steps of warm-up, then constant", 0.5),
        ("linear", 4, 4, "from 0 to 0.375 at the last step, within the 4 steps of warm-up to 0.5", 0.375),
        ("linear", 4, 5, "0.5 after 4 steps of warm-up, then linearly, to be 0 after the last step", 0.5),
        ("linear", 0, 2, "0.5 after 0 steps of warm-up, then linearly, to be 0 after the last step", 0.25),
    ],
)
def test_the_learning_rate_in_words(schedule, warmup, count, said, last):
    config = FinetuneConfig(schedule=schedule, warmup=warmup, lr=0.5)
    events = [{"event": "step", "step": step, "loss": 1.0} for step in range(1, count + 1)]
    summary = {"records": 1, "trained_on": 1, "validated_on": 0}
    records = RecordSet([Record("q", "a")], (("alpaca", 1),), DataConfig())
    rows = dict(card.of_run(config, records, ["x.json"], summary, events).rows)
    assert rows["learning rate"] == said
    rate = steps.schedule(config, count)
    assert float(rate(count - 1)) == pytest.approx(last)
    assert float(rate(count)) == pytest.approx({"linear": 0.0 if count > warmup else 0.5, "constant": 0.5}[schedule])


def test_a_loss_that_is_no_number_is_not_the_best():
    tested = [{"event": "validation", "step": step, "loss": loss} for step, loss in ((1, math.nan), (2, 2.0), (3, 1.5))]
    assert card._best(tested)["step"] == 3
