"""A run's card states what the run did: data, optimizer, schedule, length and losses."""

import math

import pytest

from rora_theory.lab.data.records import DataConfig, RecordSet
from rora_theory.lab.finetune import FinetuneConfig, Record, card
from rora_theory.lab.finetune import step as steps

SUMMARY = {"records": 2500, "trained_on": 1100, "validated_on": 1200}
RECORDS = RecordSet([Record("q", "a")], (("alpaca", 1),), DataConfig())
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
    events = [{"event": "step", "step": step, "loss": 1.0} for step in range(1, count + 1)]
    rows = dict(card.build_training_description(config, RECORDS, ["x.json"], SUMMARY, events).rows)
    assert rows["learning rate"] == words
    rate = steps.schedule(config, count)
    assert float(rate(count - 1)) == pytest.approx(last)
    assert float(rate(count)) == pytest.approx({"linear": 0.0 if count > warmup else 0.5, "constant": 0.5}[schedule])


def test_records_that_are_cut_are_counted_at_the_start():
    counts = {"records": 9, "trained_on": 6, "truncated": 4, "skipped": 2}
    line = card.describe_start(FinetuneConfig(cutoff=77), counts, 3, 1, 0.1).splitlines()[-1]
    assert line.startswith("4 of 9 records were cut at 77 tokens")
    assert "2 were left out" in line
    assert "cut" not in card.describe_start(FinetuneConfig(), counts | {"truncated": 0, "skipped": 0}, 3, 1, 0.1)


def test_a_nan_loss_is_not_the_best():
    tested = [{"event": "validation", "step": step, "loss": loss} for step, loss in ((1, math.nan), (2, 2.0), (3, 1.5))]
    assert card._notable_validations(tested)["best"]["step"] == 3


def test_a_card_s_rows():
    config = FinetuneConfig(
        batch_size=4, cutoff=64, loss_on="answer", template="clean", weight_decay=0.1, warmup=2, schedule="constant",
        lr=0.5,
    )  # fmt: skip
    sources = ["data/x.json", "hf://datasets/me/chats@main:train", "hf://datasets/me/chats"]
    built = card.build_training_description(config, RECORDS, sources, SUMMARY, [*STEPS, *TESTED], 8, "mit")
    assert (built.datasets, built.license) == (("me/chats",), "mit")
    assert dict(built.rows) == {
        "data": "`x.json`, `hf://datasets/me/chats@main:train`, `hf://datasets/me/chats`",
        "records": f"2,500, SHA-256 `{RECORDS.sha256}`",
        "trained on": "1,100; held out for the validation loss: 1,200",
        "prompt": "template clean, at most 64 tokens, loss on answer tokens",
        "optimizer": "AdamW, betas 0.9 and 0.999, epsilon 1e-08, weight decay 0.1, gradients clipped at norm 1",
        "learning rate": "0.5 after 2 steps of warm-up, then constant",
        "horizon": "12 steps of 4 records; adapter of step 8",
        "requested rule": "rora, alpha 64",
        "training loss": TRAINING,
        "validation loss": VALIDATION,
    }


def test_a_card_omits_properties_that_the_run_does_not_have():
    quantised = FinetuneConfig(method="prefix", quantization="q8_0", clip=math.inf)
    rows = dict(card.build_training_description(quantised, RECORDS, ["x.json"], SUMMARY, []).rows)
    assert not {"requested rule", "training loss"} & set(rows)
    assert rows["quantization"] == "the base's linear weights in q8_0 blocks, multiplied in float32"
    assert rows["optimizer"] == "AdamW, betas 0.9 and 0.999, epsilon 1e-08"
    assert rows["validation loss"] == "not measured: no record was held out"
    full = dict(
        card.build_training_description(FinetuneConfig(method="full"), RECORDS, ["x.json"], SUMMARY, STEPS).rows
    )
    assert full["horizon"] == "12 steps of 16 records; weights of step 12"


def test_description_of_the_losses():
    assert card.describe_losses([*STEPS, *TESTED], 1200) == f"Trained for 12 steps: validation loss {VALIDATION}."
    assert card.describe_losses(STEPS, 0) == f"Trained for 12 steps: training loss {TRAINING}."


def test_summary_of_a_run():
    """A step that took no time has no speed."""
    assert [tuple(row.values()) for row in card.summary_rows([*STEPS, *TESTED], 288)] == [
        ("training loss, first", 1, 12.0),
        ("training loss, mean of the last 10", 12, 5.5),
        ("validation loss, first", 4, 2.0),
        ("validation loss, best", 8, 1.0),
        ("validation loss, last", 12, 1.5),
        ("tokens/s, median", None, 245.0),
        ("trainable parameters", None, 288),
    ]
