"""Trained runs of a sweep: the exponent their scalings have, and the same resampled records at every rate."""

from dataclasses import replace

import numpy as np
import pytest

from rora_theory.errors import InputError
from rora_theory.sweep.trained_runs import TrainedRun, bootstrap, kappa_of, read_runs, stacked


def test_alpha_2r_has_kappa_0():
    runs = [TrainedRun("lora", rank, 2.0, 1e-3, 0, 1.0, None, None) for rank in (8, 32)]
    assert kappa_of(runs) == 0
    mixed = [*runs, TrainedRun("lora", 128, 0.1, 1e-3, 0, 1.0, None, None)]
    with pytest.raises(InputError, match="one rule and alpha"):
        kappa_of(mixed)


def test_the_bootstrap_draws_the_same_records_at_every_rate():
    """Records that differ widely, and a loss a token that does not: a ratio of sums that no draw changes."""
    tokens = np.array([1.0, 10.0, 100.0])
    runs = [
        TrainedRun("lora", 8, 2.0, rate, 0, factor, factor * tokens, tokens)
        for rate, factor in ((0.1, 1.0), (0.2, 3.0))
    ]
    runs.append(TrainedRun("lora", 8, 2.0, 0.3, 0, np.inf, None, None))
    np.testing.assert_allclose(bootstrap(runs, draws=7), [[1.0, 3.0, np.inf]] * 7)
    np.testing.assert_allclose(bootstrap([runs[2], runs[0]], draws=2), [[np.inf, 1.0]] * 2)
    level = np.array([5.0, 1.0, 2.0]) * tokens
    uneven = [
        TrainedRun("lora", 8, 2.0, rate, 0, 1.0, factor * level, tokens) for rate, factor in ((0.1, 1.0), (0.2, 3.0))
    ]
    drawn = bootstrap(uneven, draws=50)
    np.testing.assert_allclose(drawn[:, 1], 3 * drawn[:, 0])
    assert len(np.unique(drawn[:, 0])) > 3
    np.testing.assert_array_equal(drawn, bootstrap(uneven, draws=50), "seeded: methods share their draws")
    assert bootstrap([TrainedRun("lora", 8, 2.0, 0.1, 0, 1.0, None, None)]) is None
    first = [TrainedRun("lora", 8, 2.0, 0.1, 0, 1.0, np.array([1.0, 0.0, 0.0]), np.ones(3))]
    shares = bootstrap(first, draws=50)  # the first record is drawn 0 to 3 times
    assert set(np.round(3 * shares.ravel()).tolist()) == {0, 1, 2, 3}


def test_kappa_of_a_rule():
    runs = [TrainedRun("rora", rank, 16 / rank**0.5, 1e-3, 0, 1.0, None, None) for rank in (8, 32, 128)]
    assert kappa_of(runs) == 0.5
    with pytest.raises(InputError, match="method rora must have two or more ranks, got 32"):
        kappa_of(runs[1:2])
    with pytest.raises(InputError, match="method rora must have one rule and alpha, got"):
        kappa_of([*runs, TrainedRun("rora", 8, 64 / 8**0.5, 3e-3, 0, 1.0, None, None)])
    with pytest.raises(InputError, match="method rora must have one rule and alpha, got"):
        kappa_of([*runs, TrainedRun("rora", 256, 1.00001, 1e-3, 0, 1.0, None, None)])


def test_runs_are_averaged_where_all_have_the_same_records():
    first, second = (
        TrainedRun("lora", 8, 2.0, 0.1, seed, 1.0, np.array(sums), np.ones(2))
        for seed, sums in enumerate(([1.0, 3.0], [3.0, 5.0]))
    )
    records, tokens = stacked([first, second])
    assert (records.tolist(), tokens.tolist()) == ([2.0, 4.0], [1.0, 1.0])
    bare = replace(second, records=None, tokens=None)
    assert stacked([first, bare]) == (None, None)
    assert bootstrap([first, bare]) is None
    for call in (stacked, bootstrap):
        with pytest.raises(
            InputError, match=r"seed 0 and lora of rank 8 at 0\.1, seed 1 must have the same held-out records"
        ):
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
