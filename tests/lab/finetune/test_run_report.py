"""Lines and table of a run: its learning rate, records and losses."""

import math

import pytest

from rora_theory.lab.finetune import FinetuneConfig, run_report
from rora_theory.lab.finetune import step as steps

STEPS = [
    {"event": "step", "step": step, "loss": 13.0 - step, "targets": 10 * step**2, "seconds": 2.0 * (step > 1)}
    for step in range(1, 13)
]
TESTED = [{"event": "validation", "step": step, "loss": loss} for step, loss in ((4, 2.0), (8, 1.0), (12, 1.5))]
TRAINING = "12.0000 nats per token on the batch of step 1, before any update; 5.5000, the mean of the last 10 steps"
VALIDATION = (
    "2.0000 at step 4 (first), 1.0000 at step 8 (best), 1.5000 at step 12 (last); "
    "nats per token over 1,200 held-out records"
)


@pytest.mark.parametrize(
    ("schedule", "warmup", "count", "words", "last"),
    [
        ("linear", 2, 6, "0.5 after 2 steps of warm-up, then linear decay to 0 after the last step", 0.125),
        ("constant", 2, 6, "0.5 after 2 steps of warm-up, then constant", 0.5),
        ("linear", 4, 4, "from 0 to 0.375 at the last step, within a warm-up of 4 steps to 0.5", 0.375),
        ("linear", 4, 5, "0.5 after 4 steps of warm-up, then linear decay to 0 after the last step", 0.5),
        ("linear", 0, 2, "0.5 after 0 steps of warm-up, then linear decay to 0 after the last step", 0.25),
    ],
)
def test_description_of_the_learning_rate(schedule, warmup, count, words, last):
    config = FinetuneConfig(schedule=schedule, warmup=warmup, lr=0.5)
    assert run_report.describe_learning_rate(config, count) == words
    rate = steps.schedule(config, count)
    assert float(rate(count - 1)) == pytest.approx(last)
    assert float(rate(count)) == pytest.approx({"linear": 0.0 if count > warmup else 0.5, "constant": 0.5}[schedule])


def test_records_that_are_cut_are_counted_at_the_start():
    counts = {"records": 9, "trained_on": 6, "truncated": 4, "skipped": 2}
    line = run_report.describe_start(FinetuneConfig(cutoff=77), counts, 3, 1, 0.1).splitlines()[-1]
    assert line.startswith("4 of 9 records were cut at 77 tokens")
    assert "2 were left out" in line
    assert "cut" not in run_report.describe_start(FinetuneConfig(), counts | {"truncated": 0, "skipped": 0}, 3, 1, 0.1)


def test_a_nan_loss_is_not_the_best():
    tested = [{"event": "validation", "step": step, "loss": loss} for step, loss in ((1, math.nan), (2, 2.0), (3, 1.5))]
    assert run_report._notable_validations(tested)["best"]["step"] == 3


def test_description_of_the_losses():
    assert run_report.describe_losses([*STEPS, *TESTED], 1200) == f"Trained for 12 steps: validation loss {VALIDATION}."
    assert run_report.describe_losses(STEPS, 0) == f"Trained for 12 steps: training loss {TRAINING}."


def test_summary_of_a_run():
    """A step that took no time has no speed."""
    assert [tuple(row.values()) for row in run_report.summary_rows([*STEPS, *TESTED], 288)] == [
        ("training loss, first", 1, 12.0),
        ("training loss, mean of the last 10", 12, 5.5),
        ("validation loss, first", 4, 2.0),
        ("validation loss, best", 8, 1.0),
        ("validation loss, last", 12, 1.5),
        ("tokens/s, median", None, 245.0),
        ("trainable parameters", None, 288),
    ]
