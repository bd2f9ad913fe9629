"""A run resumes where it stopped, keeps its best adapter, and stops at the first loss that is not finite."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from support import tiny

from rora_theory.lab.data.batches import prefetch
from rora_theory.lab.finetune import (
    Batches,
    FinetuneConfig,
    NonFiniteLossError,
    Paused,
    Record,
    StepCompleted,
    Trainer,
    ValidationCompleted,
    choose_widths,
    split_records,
    tokenize,
)
from rora_theory.lab.finetune import step as steps

CONFIG = FinetuneConfig(
    rank=2, alpha=4, targets=("q_proj", "down_proj"), dropout=0.1, template="clean", held_out=6, widths=2, epochs=2,
    batch_size=4, warmup=2, lr=0.03, evaluate_every=4, checkpoint_every=3,
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """Share the compiled steps of runs that differ only in settings that no step reads.

    That a new process's own step gives the same bits is shown where a process is killed.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name in ("train_step", "eval_step"):
            patch.setattr(steps, name, _memo(getattr(steps, name)))
        yield


def _memo(original):
    cache = {}
    unread = {"seed": 0, "evaluate_every": 1, "checkpoint_every": 1}

    def make(adapter, *arguments, **options):
        read = [dataclasses.replace(a, **unread) if isinstance(a, FinetuneConfig) else a for a in arguments]
        key = repr((adapter.config, read, options))
        if key not in cache:
            cache[key] = original(adapter, *arguments, **options)
        return cache[key]

    return make


RECORDS = [*tiny.records(24), Record("~" * 30, "answer0")]


def trainer(params, folder, pauses=(), **changes):
    config = dataclasses.replace(CONFIG, **changes)
    train, held_out = (
        tokenize(part, tiny.ByteEncoder(), template=config.template)
        for part in split_records(RECORDS, config.held_out, config.seed)
    )
    widths = choose_widths(np.concatenate([train.input_lengths, held_out.input_lengths]), config.widths)
    adapter = config.adapter().build(jax.random.key(config.seed), tiny.CONFIG, params)
    batches = Batches(train, widths, batch_size=config.batch_size, epochs=config.epochs, seed=config.seed)
    held_out = Batches(held_out, widths, batch_size=config.batch_size)
    run = Trainer(params, tiny.CONFIG, adapter, config, batches, held_out, folder, pauses=pauses)
    return run, batches, held_out


def timeless(events):
    return [dataclasses.replace(e, seconds=0.0) if isinstance(e, StepCompleted) else e for e in events]


def checkpoints(folder):
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


@pytest.fixture(scope="module")
def complete(params, tmp_path_factory):
    """Return an uninterrupted run: its events, trainer, validation batches and the traced shapes."""
    run, _, held_out = trainer(params, tmp_path_factory.mktemp("complete"))
    traces = []
    original = steps.llama.hidden_states
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps.llama, "hidden_states", lambda *a, **k: (traces.append(a[1].shape), original(*a, **k))[1])
        events = list(run.train())
    yield events, run, held_out, traces
    run.close()


@pytest.mark.slow
def test_a_run_takes_every_step_and_validates_at_its_interval(complete):
    """The learning rate rises from 0 over 2 updates, then falls to 0 after the 10th."""
    events, run, held_out, traces = complete
    completed = [event for event in events if isinstance(event, StepCompleted)]
    assert [event.step for event in completed] == list(range(1, 11))
    assert run.step == run.steps == 10
    assert [event.step for event in events if isinstance(event, ValidationCompleted)] == [4, 8, 10]
    assert (completed[4].epoch, completed[9].epoch) == (1.0, 2.0)
    assert np.mean([event.loss for event in completed[-3:]]) < np.mean([event.loss for event in completed[:3]])
    assert completed[0].targets < completed[0].positions
    rates = [event.learning_rate for event in completed]
    assert rates == pytest.approx([0.0, 0.015, *(0.03 * left / 8 for left in range(8, 0, -1))])
    widths = {shape[1] for shape in traces}
    assert len(widths) == 2
    validated = {batch.inputs.shape[1] for batch in prefetch(held_out)}
    assert len(traces) == len(widths) + len(validated), "one trace for each width of training and of validation"


@pytest.mark.parametrize(
    "changes", [{"lr": 0.01}, {"schedule": "constant"}, {"clip": 1e-3}, {"warmup": 1}, {"steps": 5}, {"epochs": 1}]
)
def test_the_step_uses_the_settings_of_the_run(params, monkeypatch, changes):
    """The settings include the number of steps, on which the schedule depends."""
    arguments = []
    monkeypatch.setattr(steps, "train_step", lambda _, model, *settings, **options: arguments.append(settings))
    run, *_ = trainer(params, None, **changes)
    assert arguments == [(dataclasses.replace(CONFIG, **changes), run.steps)]
    assert run.steps == (5 if {"steps", "epochs"} & set(changes) else 10)


@pytest.mark.slow
@pytest.mark.parametrize(("stop", "checkpoint"), [(2, 0), (7, 6)])  # checkpoints are taken at 3, 4, 6, 8, 9 and 10
def test_a_resumed_run_ends_in_the_same_bits(params, complete, tmp_path, stop, checkpoint):
    expected, finished = timeless(complete[0]), complete[1]
    first, *_ = trainer(params, tmp_path)
    before = list(itertools.takewhile(lambda e: e.step <= stop, first.train()))
    first.close()
    assert timeless(before) == [event for event in expected if event.step <= stop]
    second, *_ = trainer(params, tmp_path)
    assert second.step == checkpoint
    assert timeless(second.train()) == [event for event in expected if event.step > checkpoint]
    jax.tree.map(np.testing.assert_array_equal, second.adapter("last").params, finished.adapter("last").params)
    assert (second.best_step, second.best_loss) == (finished.best_step, finished.best_loss)
    second.close()
    third, *_ = trainer(params, tmp_path)
    assert list(third.train()) == [], "a finished run has nothing left to do"
    assert third.best_loss == finished.best_loss
    third.close()


@pytest.mark.slow
def test_the_seed_determines_the_dropout(params):
    """Another seed, with the same adapter and batches, has another first gradient.

    B is still 0, so that the first loss does not show the masks.
    """
    run, batches, _ = trainer(params, None)
    norms = []
    for seed in (CONFIG.seed, CONFIG.seed, CONFIG.seed + 1):
        config = dataclasses.replace(CONFIG, seed=seed)
        again = Trainer(params, tiny.CONFIG, run.adapter("last"), config, batches, None, None)
        norms.append(next(again.train()).grad_norm)
    assert norms[0] == norms[1]
    assert norms[0] != pytest.approx(norms[2], rel=1e-3)


@pytest.mark.slow
def test_the_best_adapter_is_the_one_of_the_lowest_validation_loss(params, complete, tmp_path):
    run, _, held_out = trainer(params, tmp_path)
    evaluate, completed_steps = run._evaluate, []

    def worse_and_worse(weights, base, batch):
        total, count = evaluate(weights, base, batch)
        return total * float(len({step for step in completed_steps if step in (4, 8, 10)})), count

    run._evaluate = worse_and_worse
    losses = {}
    for event in run.train():
        completed_steps.append(event.step)
        if isinstance(event, ValidationCompleted):
            losses[event.step] = event
    assert [(step, event.best) for step, event in losses.items()] == [(4, True), (8, False), (10, False)]
    assert (run.best_step, run.best_loss) == (4, losses[4].loss)

    def loss(which):
        sums = [evaluate(run.adapter(which).params, params, batch) for batch in prefetch(held_out)]
        return float(sum(s for s, _ in sums) / sum(n for _, n in sums))

    true = {event.step: event.loss for event in complete[0] if isinstance(event, ValidationCompleted)}
    assert true[10] < true[4], "the adapters differ"
    assert loss("best") == pytest.approx(true[4], rel=1e-6)
    assert loss("last") == pytest.approx(true[10], rel=1e-6)
    run.close()
    assert checkpoints(tmp_path) == [4, 10]


@pytest.mark.slow
def test_a_returned_adapter_survives_later_steps(params, tmp_path):
    """The check lies between two checkpoints, at 4 and 6, where the best is not the last."""
    run, *_ = trainer(params, tmp_path, pauses=(4, 5))
    held = {}
    for event in run.train():
        if isinstance(event, Paused):
            assert run.step == event.step
            held |= {(event.step, which): run.adapter(which).params for which in ("best", "last")}
        if event.step == 6:
            break
    run.close()
    assert run.best_step == 4
    for step in (4, 5):
        jax.tree.map(np.testing.assert_array_equal, held[step, "best"], held[4, "last"])
    four, five = (held[step, "last"]["self_attn.q_proj"]["lora_B"] for step in (4, 5))
    assert not np.array_equal(four, five)


@pytest.mark.slow
def test_a_nan_loss_stops_the_run(params, tmp_path):
    # One byte's embedding is no number; a record with that byte comes in the batch of step ``bad``, not before.
    _, batches, _ = trainer(params, tmp_path / "unused")
    words = [set(batches[step].inputs.ravel().tolist()) for step in range(5)]
    new_words = [words[step].difference(*words[:step]) for step in range(5)]
    bad = max(step + 1 for step in range(1, 5) if new_words[step])
    byte = min(new_words[bad - 1])
    poisoned = {**params, "embed_tokens": params["embed_tokens"].at[byte].set(np.nan)}
    for every, saved in ((1, [bad - 1]), (50, [])):
        folder = tmp_path / str(every)
        run, *_ = trainer(poisoned, folder, checkpoint_every=every, evaluate_every=50)
        location = f"last good checkpoint is {folder}/{bad - 1}\\." if saved else "no checkpoint yet"
        with pytest.raises(NonFiniteLossError, match=f"^loss is nan at step {bad}\\. .*{location}") as caught:
            list(run.train())
        assert caught.value.step == bad
        run.close()
        assert checkpoints(folder) == saved
