"""Trained runs of a sweep: the exponent their scalings have, and the losses that are read."""

import pytest
from support.trained_runs import trained_run

from rora_theory.errors import InputError
from rora_theory.lab.sweep.trained_runs import kappa_of, read_runs
from rora_theory.stats.trained_runs import TrainedRun


def test_kappa_of_a_rule():
    """The rule alpha / sqrt(r) has kappa 0.5, and alpha = 2 r has 0."""
    rora = [trained_run("rora", rank, 16 / rank**0.5) for rank in (8, 32, 128)]
    alpha_2r = [trained_run(rank=rank) for rank in (8, 32)]
    assert (kappa_of(rora), kappa_of(alpha_2r)) == (0.5, 0)
    with pytest.raises(InputError, match=r"method rora .* ranks, got 32"):
        kappa_of(rora[1:2])
    # Another alpha at one of two ranks, and scalings that are no power of the rank.
    for runs in (
        [*rora[:2], trained_run("rora", 8, 64 / 8**0.5)],
        [*rora, trained_run("rora", 256, 1.00001)],
        [*alpha_2r, trained_run(rank=128, gamma=0.1)],
    ):
        with pytest.raises(InputError, match=f"method {runs[0].method} .* rule and alpha, got"):
            kappa_of(runs)


@pytest.mark.parametrize(("loss", "records", "tokens"), [("validation", [15.0], [10.0]), ("answer", [1.0], [2.0])])
def test_records_belong_to_the_requested_loss(tmp_path, loss, records, tokens):
    """Losses are infinite if a run diverged; the base and unfinished cells are no runs."""
    (tmp_path / "results.csv").write_text(
        "key,status,model,method,rank,gamma,learning_rate,seed,validation_loss,answer_loss\n"
        "base,complete,m,base,,,,,2.0,2.0\n"
        "a,complete,m,lora,8,2.0,0.1,0,1.5,0.5\n"
        "b,diverged,m,rora,8,2.0,0.3,0,,\n"
        "c,running,m,lora,8,2.0,0.3,0,,\n"
    )
    (tmp_path / "cells" / "a").mkdir(parents=True)
    (tmp_path / "cells" / "a" / "losses.csv").write_text(
        "file,index,tokens,loss,answer_tokens,answer_loss\nx,0,10,15.0,2,1.0\n"
    )
    run, diverged = read_runs(tmp_path, loss=loss)
    assert run.loss == {"validation": 1.5, "answer": 0.5}[loss]
    assert (run.records.tolist(), run.tokens.tolist()) == (records, tokens)
    assert diverged == TrainedRun("rora", 8, 2.0, 0.3, 0, float("inf"), None, None)
