"""Batches: tokens as in the published code, little padding, and an order that any step can be requested from."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import tiny

from rora_theory.errors import InputError
from rora_theory.lab.data import prompts
from rora_theory.lab.data.batches import WIDTH_MULTIPLE, plan_epoch
from rora_theory.lab.finetune import Batches, Record, choose_widths, prefetch, read_records, split_records, tokenize

ENCODER = tiny.ByteEncoder()


def examples(records, **options):
    return tokenize(records, ENCODER, template="clean", **options)


def text(record):
    return prompts.prompt(record.instruction, "clean") + record.output


def test_short_texts_get_an_end_token_and_long_texts_are_truncated():
    record = Record("q", "a")
    all_tokens = [1, *text(record).encode()]
    for cutoff in (len(all_tokens) - 1, len(all_tokens), len(all_tokens) + 1):
        tokenized = examples([record], cutoff=cutoff)
        assert tokenized[0].tolist() == [*all_tokens, 2][:cutoff]
        assert tokenized.truncated == (cutoff < len(all_tokens))
    assert tokenized[0][-1] == 2


def test_defaults_are_the_published_template_and_256_tokens():
    expected = prompts.prompt("q", "train", input="more") + "a"
    assert bytes(tokenize([Record("q", "a", "more")], ENCODER, cutoff=1000)[0][1:-1].tolist()).decode() == expected
    tokenized = examples([Record("q" * 300, "answer")])
    assert (tokenized.lengths.tolist(), tokenized.truncated) == ([256], 1)


def test_no_second_end_token_and_none_for_a_model_without_one():
    class Ended(tiny.ByteEncoder):
        def encode_batch(self, texts):
            return [[*ids, 2] for ids in super().encode_batch(texts)]

    class Endless(tiny.ByteEncoder):
        eos_id = None

    record = Record("q", "a")
    assert tokenize([record], Ended(), template="clean")[0].tolist() == [1, *text(record).encode(), 2]
    assert tokenize([record], Endless(), template="clean")[0].tolist() == [1, *text(record).encode()]


def test_records_whose_answer_is_cut_off_are_left_out_only_from_the_answers_loss():
    records = [Record("q" * 50, "answer"), Record("q", "answer")]
    cutoff = len(text(records[1])) + 2
    assert (len(examples(records, cutoff=cutoff)), examples(records, cutoff=cutoff).skipped) == (2, 0)
    tokenized = examples(records, cutoff=cutoff, answer_only=True)
    assert (len(tokenized), tokenized.skipped, tokenized.truncated) == (1, 1, 1)
    with pytest.raises(InputError, match=r"cutoff .* 1 records, got 20"):
        examples(records[:1], cutoff=20, answer_only=True)


def test_batches_within_a_model_s_positions():
    """The longest width is capped, narrower ones stay, and a record without any position left is refused."""
    data = Batches(examples([Record("q", "a"), Record("q" * 60, "a")]), (160, 256), batch_size=1)
    smaller, size = data.examples.input_lengths.tolist()
    assert smaller < 160 < size < 256
    assert data.limit_widths(256) is data
    assert {batch.inputs.shape[1] for batch in prefetch(data.limit_widths(size))} == {160, size}
    with pytest.raises(InputError, match=f"{size + 1} tokens, .* at most {size}"):
        data.limit_widths(size - 1)


def test_split_is_a_seeded_partition():
    records = tiny.records(30)
    train, validation = split_records(records, 7, 42)
    assert len(validation) == 7
    assert sorted(train + validation) == sorted(records)
    # The permutation of `datasets.Dataset.train_test_split`: numpy's default generator, the first part held out.
    assert validation == [records[i] for i in np.random.default_rng(42).permutation(30)[:7]]
    assert split_records(records, 0, 1) == (records, [])
    with pytest.raises(InputError, match=r"held_out .* 30, got 30"):
        split_records(records, 30, 1)
    with pytest.raises(InputError, match=r"^records .*empty"):
        split_records([], 0, 1)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=20), st.integers(1, 4))
def test_widths_minimise_the_padding(lengths, count):
    lengths = np.array(lengths)
    widths = choose_widths(lengths, count)

    def padded(widths):
        return sum(min(w for w in widths if w >= length) for length in lengths)

    top = -(-int(lengths.max()) // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
    lower = range(WIDTH_MULTIPLE, top, WIDTH_MULTIPLE)
    others = ((*rest, top) for k in range(count) for rest in itertools.combinations(lower, k))
    assert list(widths) == sorted(set(widths))
    assert len(widths) <= count
    assert set(widths) <= set((-(-lengths // WIDTH_MULTIPLE) * WIDTH_MULTIPLE).tolist()), "each has a record"
    assert padded(widths) == min(map(padded, others))


def test_widths_of_long_records_are_chosen_quickly(time_limit):
    lengths = np.random.default_rng(0).integers(1, 32_768, 20_000)
    with time_limit(10):
        assert len(choose_widths(lengths, 6)) == 6


@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(1, 5), st.integers(0, 3))
def test_an_epoch_has_each_record_once_and_one_short_batch_at_most(lengths, batch, epoch):
    lengths = np.array(lengths)
    widths = choose_widths(lengths, 3)
    for seed in (None, 7):
        plan = plan_epoch(lengths, widths, batch, seed=seed, epoch=epoch)
        assert sorted(plan.rows[plan.rows >= 0]) == list(range(len(lengths)))
        assert (np.count_nonzero((plan.rows < 0).any(axis=1))) == bool(len(lengths) % batch)
        assert len(plan.rows) == -(-len(lengths) // batch)
        for rows, width in zip(plan.rows, plan.widths, strict=True):
            assert lengths[rows[rows >= 0]].max() <= width


def batches(count=22, batch=4, epochs=2, seed=3, **options):
    tokenized = examples(tiny.records(count), **options)
    widths = choose_widths(tokenized.input_lengths, 3)
    answer_only = options.get("answer_only", False)
    return Batches(tokenized, widths, batch_size=batch, epochs=epochs, seed=seed, answer_only=answer_only)


def contents(batch):
    """Return the records in a batch, after checking that each row's targets follow its inputs."""
    rows = []
    for inputs, targets, weights in zip(batch.inputs, batch.targets, batch.weights, strict=True):
        count = int(weights.sum())
        assert weights.tolist() == [1.0] * count + [0.0] * (len(weights) - count)
        assert inputs[1:count].tolist() == targets[: max(count - 1, 0)].tolist()
        assert not inputs[count:].any()
        if count:
            rows.append((*inputs[:count].tolist(), int(targets[count - 1])))
    return rows


def as_lists(stream):
    """Return inputs, targets and weights of each batch of a stream."""
    return [[array.tolist() for array in batch[:3]] for batch in stream]


def test_batches_hold_the_records():
    data = batches()
    expected = sorted(tuple(data.examples[i].tolist()) for i in range(22))
    epochs = [[contents(data[step]) for step in range(epoch * 6, epoch * 6 + 6)] for epoch in range(2)]
    assert len(data) == 12
    for epoch in epochs:
        assert sorted(row for batch in epoch for row in batch) == expected
        assert [len(batch) for batch in epoch if len(batch) < 4] == [2]
    assert epochs[0] != epochs[1], "each epoch has its own order"


def test_a_stream_is_a_function_of_seed_and_first_step_and_ends_with_the_batches():
    data = batches()
    all_batches = as_lists(data)
    assert len(all_batches) == 12
    assert as_lists(prefetch(data)) == all_batches
    assert as_lists(prefetch(data, start=5)) == all_batches[5:]
    assert as_lists([data[-1]]) == all_batches[-1:]
    again, other = batches(), batches(seed=4)
    steps = [7, 0, 11, 5]  # without the ones before them
    assert as_lists(again[step] for step in steps) == [all_batches[step] for step in steps]
    assert as_lists(other) != all_batches
    for step in (12, -13):
        with pytest.raises(IndexError, match=f"step .* 12, got {step}"):
            data[step]


def test_batches_are_prefetched_and_errors_are_raised_at_their_step(monkeypatch, time_limit):
    data = batches()
    started_steps, get_batch = [], Batches.__getitem__

    def record_step(self, step):
        started_steps.append(step)
        if step == 11:
            raise ValueError("record 11")
        return get_batch(self, step)

    monkeypatch.setattr(Batches, "__getitem__", record_step)
    stream = prefetch(data, start=8)
    next(stream)
    with time_limit(20):
        while len(started_steps) < 3:
            time.sleep(0.001)
    assert started_steps == [8, 9, 10], "two batches are prefetched while the first is in use"
    next(stream)
    next(stream)
    with pytest.raises(ValueError, match="record 11"):
        next(stream)


def test_answer_batches_have_the_positions_of_their_targets():
    answer_data, full_data = batches(answer_only=True), batches()
    for step in range(len(answer_data)):
        answer_batch, full_batch = answer_data[step], full_data[step]
        assert np.array_equal(answer_batch.inputs, full_batch.inputs), "the same order as the loss on all tokens"
        assert answer_batch.targets.shape[1] == 8, "answers of 7 letters and the end token"
        for row in range(4):
            for target, weight, position in zip(
                answer_batch.targets[row], answer_batch.weights[row], answer_batch.positions[row], strict=True
            ):
                assert not weight or full_batch.targets[row, position] == target
        answers = [
            bytes(t[:7].tolist()).decode()
            for t, w in zip(answer_batch.targets, answer_batch.weights, strict=True)
            if w.any()
        ]
        assert all(answer in {"answer0", "answer1", "answer2", "answer3"} for answer in answers)


def test_padding_of_the_real_text_is_small(commonsense_dir):
    files = [commonsense_dir / task / "train.json" for task in ("ARC-Easy", "ARC-Challenge")]
    tokenized = tokenize(read_records(files), ENCODER, cutoff=1024)
    lengths = tokenized.input_lengths

    def padded(widths):
        plan = plan_epoch(lengths, widths, 16, seed=1, epoch=0)
        return 1 - lengths.sum() / (plan.widths * 16).sum()

    # Bytes, not tokens, but the same spread. Random batches of 16 padded to their longest waste a third.
    assert padded(choose_widths(lengths, 6)) < 0.08
    assert padded((1024,)) > 0.3
