"""Sentences that state a command's result are correct for given figures."""

import math

import pandas as pd
import pytest

from rora_theory.lab.evaluate.accuracies import TaskAccuracy, describe_accuracy
from rora_theory.lab.sweep.analysis import POWERFUL_SWEEP, describe_exponents
from rora_theory.lab.sweep.results import describe_results
from rora_theory.measure.rank_check.rules import CheckConfig, describe_check
from rora_theory.paper.verdicts import Verdict, describe_verdicts
from rora_theory.stats.rate_curves import describe_slopes


def test_accuracies() -> None:
    accuracy = TaskAccuracy("piqa", 200, 0.6, 0.034, None, None, 0.0, 0.5, 0.51)
    assert describe_accuracy([accuracy], "label") == (
        "60.0 % of the answers are correct on PIQA under the protocol label (standard error 3.4 points); chance "
        "is 50.0 %."
    )
    several = [accuracy, accuracy, TaskAccuracy("average", 400, 0.55, 0.02, None, None, 0.0, 0.4, 0.41)]
    assert describe_accuracy(several, "harness").startswith("55.0 % of the answers are correct on average over 2")


def test_a_check() -> None:
    config = CheckConfig(optimizers=("sgd",), steps=(1, 5), controls=False)
    assert describe_check(config, pd.DataFrame({"whole_model": ["flat", "grows with the rank"]})) == (
        "Change of the whole model after 1 and 5 steps, against the rank: SGD, alpha/r, A kaiming_uniform: flat; SGD, "
        "alpha/sqrt(r), A kaiming_uniform: grows with the rank."
    )


def test_verdicts() -> None:
    judged = [Verdict(str(9 - i), "", status, "", "") for i, status in enumerate(("fails", "holds", "fails", "holds"))]
    assert describe_verdicts(judged) == "Of 4 claims of the paper's equations and gradients 2 hold, 2 fail (7, 9)."


def test_slopes() -> None:
    rows = {
        "optimizer": ["adam", "adam"],
        "rule": ["lora", "rora"],
        "trained": ["both"] * 2,
        "verdict": ["flat", "shrinks"],
    }
    assert describe_slopes(pd.DataFrame(rows)) == (
        "The best rate does not move with the rank for 1 of 2 combinations of optimizer, rule and trained factors: "
        "adam lora (both)."
    )
    assert describe_slopes(pd.DataFrame(rows).iloc[:0]).startswith(
        "No combination of optimizer, rule and trained factors has "
    )


def test_a_sweep() -> None:
    rows = {"status": ["complete", "complete", "diverged"], "model": ["m"] * 3, "method": ["base", "rora", "lora"]}
    rows |= {"key": ["a", "b", "c"], "rank": [None, 8, 8], "learning_rate": [math.nan, 3e-4, 1.0]}
    rows |= {"validation_loss": [2.0, 1.5, math.nan], "validation_error": [0.1, 0.05, math.nan]}
    rows |= {"alpha": [math.nan, 16.0, 16.0], "best_rate": ["", "yes", ""]}
    assert describe_results(pd.DataFrame(rows)) == (
        "Lowest validation loss of 3 cells: m: 1.5000 (0.0500), rora r=8 at 0.0003. In brackets: standard error over "
        "records. 1 diverged."
    )
    rows["best_rate"] = ["", "edge", ""]
    sentence = describe_results(pd.DataFrame(rows))
    assert sentence.endswith(
        " 1 of 2 best learning rates lie at the edge of the rates that were tried: the best may lie beyond."
    )


@pytest.mark.parametrize(
    ("best", "verdicts", "law", "sentence"),
    [
        (0, [], True, "No rank and gamma r has runs at three learning rates yet (5 runs in all)."),
        (2, [], False, "5 runs give 2 best rates. Pass a run of sims.regime to compare them with the law."),
        (2, [], True, "No two best rates of the 5 runs can be compared yet."),
        (
            2,
            ["agrees", "undecided", "agrees"],
            True,
            "Exponents of 5 runs: the displacement law contradicts 3 times; "
            f"the law of a constant gradient agrees 2 times, undecided 1 times. {POWERFUL_SWEEP}",
        ),
        (
            2,
            ["agrees"],
            True,
            "Exponents of 5 runs: the displacement law contradicts 1 times; "
            "the law of a constant gradient agrees 1 times.",
        ),
    ],
)
def test_a_horizon(best, verdicts, law, sentence) -> None:
    exponents = pd.DataFrame({"verdict": verdicts, "displacement_verdict": ["contradicts"] * len(verdicts)})
    assert describe_exponents(5, pd.DataFrame({"step": [1] * best}), exponents, law=law) == sentence
