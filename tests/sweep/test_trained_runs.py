"""Trained runs of a sweep: the exponent their scalings have, and the same resampled records at every rate."""

from dataclasses import replace

import numpy as np
import pytest

from rora_theory.errors import InputError
from rora_theory.sweep.trained_runs import TrainedRun, bootstrap, kappa_of, read_runs, stacked


def run(method: str = "lora", rank: int = 8, gamma: float = 2.0, rate: float = 0.1, **values) -> TrainedRun:
    """Return a run of seed 0 with a loss of 1 and no losses by record unless stated."""
    defaults = {"seed": 0, "loss": 1.0, "records": None, "tokens": None}
    return TrainedRun(method, rank, gamma, rate, **(defaults | values))


def test_kappa_of_a_rule():
    """Alpha / sqrt(r) has 0.5, and alpha = 2 r has 0."""
    rora = [run("rora", rank, 16 / rank**0.5) for rank in (8, 32, 128)]
    alpha_2r = [run(rank=rank) for rank in (8, 32)]
    assert (kappa_of(rora), kappa_of(alpha_2r)) == (0.5, 0)
    with pytest.raises(InputError, match="method rora must have two or more ranks, got 32"):
        kappa_of(rora[1:2])
    # Another alpha at one rank, and scalings that are no power of the rank.
    for runs in (
        [*rora, run("rora", 8, 64 / 8**0.5)],
        [*rora, run("rora", 256, 1.00001)],
        [*alpha_2r, run(rank=128, gamma=0.1)],
    ):
        with pytest.raises(InputError, match=f"method {runs[0].method} must have one rule and alpha, got"):
            kappa_of(runs)


def test_the_bootstrap_draws_the_same_records_at_every_rate():
    """Records that differ widely, and a loss a token that does not: a ratio of sums that no draw changes."""
    tokens = np.array([1.0, 10.0, 100.0])
    runs = [run(rate=factor, loss=factor, records=factor * tokens, tokens=tokens) for factor in (1.0, 3.0)]
    runs.append(run(rate=9.0, loss=np.inf))
    np.testing.assert_allclose(bootstrap(runs, draws=7), [[1.0, 3.0, np.inf]] * 7)
    np.testing.assert_allclose(bootstrap([runs[2], runs[0]], draws=2), [[np.inf, 1.0]] * 2)
    level = np.array([5.0, 1.0, 2.0]) * tokens
    uneven = [run(rate=factor, records=factor * level, tokens=tokens) for factor in (1.0, 3.0)]
    drawn = bootstrap(uneven, draws=50)
    np.testing.assert_allclose(drawn[:, 1], 3 * drawn[:, 0])
    assert len(np.unique(drawn[:, 0])) > 3
    np.testing.assert_array_equal(drawn, bootstrap(uneven, draws=50), "seeded: methods share their draws")
    shares = bootstrap([run(records=np.array([1.0, 0.0, 0.0]), tokens=np.ones(3))], draws=50)
    assert set(np.round(3 * shares.ravel()).tolist()) == {0, 1, 2, 3}, "the first record is drawn 0 to 3 times"


def test_runs_are_averaged_where_all_have_the_same_records():
    first, second = (
        run(seed=seed, records=np.array(sums), tokens=np.ones(2)) for seed, sums in enumerate(([1.0, 3.0], [3.0, 5.0]))
    )
    records, tokens = stacked([first, second])
    assert (records.tolist(), tokens.tolist()) == ([2.0, 4.0], [1.0, 1.0])
    without_records = replace(second, records=None, tokens=None)
    assert stacked([first, without_records]) == (None, None)
    assert bootstrap([first, without_records]) is None
    message = r"seed 0 and lora of rank 8 at 0\.1, seed 1 must have the same held-out records"
    for call in (stacked, bootstrap):
        with pytest.raises(InputError, match=message):
            call([first, replace(second, tokens=np.array([1.0, 2.0]))])


@pytest.mark.parametrize(("loss", "records", "tokens"), [("validation", [15.0], [10.0]), ("answer", [1.0], [2.0])])
def test_records_are_of_the_loss_that_was_asked_for(tmp_path, loss, records, tokens):
    (tmp_path / "results.csv").write_text(
        "key,status,model,method,rank,gamma,learning_rate,seed,validation_loss,answer_loss\n"
        "a,complete,m,lora,8,2.0,0.1,0,1.5,0.5\n"
    )
    (tmp_path / "cells" / "a").mkdir(parents=True)
    (tmp_path / "cells" / "a" / "losses.csv").write_text(
        "file,index,tokens,loss,answer_tokens,answer_loss\nx,0,10,15.0,2,1.0\n"
    )
    (run,) = read_runs(tmp_path, loss=loss)
    assert (run.records.tolist(), run.tokens.tolist()) == (records, tokens)
