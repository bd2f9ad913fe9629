"""Slopes during training: the ranks that count, diverged runs, and whether training A changes an exponent."""

import itertools

import numpy as np
import pandas as pd
import pytest

from rora_theory.lab.sweep import rank_exponents
from rora_theory.lab.sweep.rank_exponents import exponent_change


def line(step: int, by_seed: list[float], left: float = 0.9, fitted_ranks: tuple[int, ...] = (4, 16, 64)) -> dict:
    return {"step": step, "by_seed": np.array(by_seed), "loss_left": left, "fitted_ranks": fitted_ranks}


@pytest.mark.parametrize(
    ("both", "frozen", "expected"),
    [
        ([1.0, 1.1, 1.2], [0.5, 0.6, 0.7], "yes: by +0.500 ± 0.000 at step 10"),
        ([0.5, 0.6, 0.7], [1.0, 1.1, 1.2], "yes: by -0.500 ± 0.000 at step 10"),
        ([0.5, 0.6, 0.7], [0.5, 0.6, 0.701], "no: by -0.000 ± 0.000 at step 10"),
        ([0.47, 0.57, 0.672], [0.5, 0.6, 0.7], "small: by -0.029 ± 0.001 at step 10"),  # there, and within 0.05
        ([0.0, 0.01, 0.02], [0.0, 0.0, 0.0], "no: by +0.010 ± 0.006 at step 10"),  # beyond an error, not an interval
        ([0.5, 0.6, 0.7], [0.7, 0.6, 0.5], "undecided: by +0.000 ± 0.115 at step 10"),
        ([0.5 + 2e-16, 0.6 + 2e-16, 0.7 + 2e-16], [0.5, 0.6, 0.7], "no: by +0.000 ± 0.000 at step 10"),  # rounding
    ],
)
def test_whether_the_exponent_changes(both, frozen, expected):
    """Trained A is compared with frozen A by seed, at the last step where neither loss is below half of its start."""
    early, late = line(1, [9.0] * 3), line(100, [5.0, 6.0, 7.0], left=0.4)
    for last_both, last_frozen in ((line(100, [1.0] * 3), late), (late, line(100, [1.0] * 3))):
        change = exponent_change([early, line(10, both), last_both], [early, line(10, frozen), last_frozen])
        assert change == expected
    assert exponent_change([late], [late]) == "not settled: the loss is below half of its start at every step"


def test_an_exponent_changes_between_slopes_over_the_same_ranks_alone():
    """A curve that bends from 1/2 to 1, the same with A trained and frozen, has another slope without its last rank.

    That rank diverged with A trained. The last step at which both have the same ranks is the one that tells.
    """
    rows = []
    for trained, rank, seed, step in itertools.product(("both", "B"), (4, 16, 64, 256), range(3), (0, 1, 2)):
        value = (rank**0.5 if rank <= 64 else rank / 8) * (1 + seed)
        has_diverged = int((trained, rank, step) == ("both", 256, 2))
        rows.append(seed_row(rank, seed, step, has_diverged, trained=trained, loss_train=1.0, delta_frobenius=value))
    fitted = rank_exponents.exponent_fits(pd.DataFrame(rows))
    fitted = fitted[(fitted["quantity"] == "delta_frobenius") & (fitted["range"] == "all") & (fitted["step"] > 0)]
    both, frozen = (fitted[fitted["trained"] == trained].to_dict("records") for trained in ("both", "B"))
    assert [fit["fitted_ranks"] for fit in both] == [(4, 16, 64, 256), (4, 16, 64)]
    assert frozen[1]["slope"] - both[1]["slope"] == pytest.approx(0.15, abs=1e-3), (
        "the effect of the missing rank alone"
    )
    assert exponent_change(both, frozen) == "no: by +0.000 ± 0.000 at step 1"
    assert exponent_change(both[1:], frozen) == (
        "not settled: other ranks diverged with A trained than with A frozen, at every step"
    )
    middle = [line(1, [1.0, 1.1], fitted_ranks=(4, 64, 256)), line(1, [0.5, 0.6], fitted_ranks=(4, 16, 256))]
    assert exponent_change(middle[:1], middle[1:]).startswith("not settled"), (
        "the same number of ranks between the same ends"
    )


def test_verdicts_mark_steps_with_a_loss_below_half():
    verdicts = ((1, "flat", 0.9), (2, "flat", 0.5), (5, "flat", 0.49), (9, "grows", 0.2))
    rows = [{"step": step, "verdict": verdict, "loss_left": left} for step, verdict, left in verdicts]
    expected = "flat at steps 1 2; flat (loss below half) at step 5; grows (loss below half) at step 9"
    assert rank_exponents.verdicts_by_step(rows) == expected


def test_each_answer_uses_its_own_curve():
    """Every curve has a unique slope, and each answer states its own."""
    curves = list(itertools.product(("sgd", "adam"), (0.25, 0.5, 1.0), ("both", "B"), rank_exponents.FITTED))
    slopes = {curve: round(0.01 * place, 2) for place, curve in enumerate(curves, start=1)}
    rows = []
    for rank, seed, step, (optimizer, kappa, trained) in itertools.product(
        (4, 16, 64, 256), range(2), (0, 1), dict.fromkeys(curve[:3] for curve in curves)
    ):
        values = {name: rank ** slopes[optimizer, kappa, trained, name] for name in rank_exponents.FITTED}
        row = seed_row(rank, seed, step, loss_train=1.0, **values)
        rows.append(row | {"optimizer": optimizer, "kappa": kappa, "rule": str(kappa), "trained": trained})
    answers = rank_exponents.answers(
        rank_exponents.exponent_fits(pd.DataFrame(rows)),
        models=("linear",),
        optimizers=("sgd", "adam"),
        kappas=(0.25, 0.5, 1.0),
        ranks=(4, 16, 64, 256),
        overlap=0.0,
        freeze_control=True,
    )
    train, held_out, delta = "output_train", "output_held_out", "delta_frobenius"
    expected = [
        *[("sgd", 0.5, "both", train), ("adam", 1.0, "both", train)] * 2,  # over all ranks, and the upper half
        ("sgd", 0.25, "both", held_out),
        ("adam", 0.5, "both", held_out),
    ]
    assert [answer.figures for answer in answers[:6]] == [f"1: {slopes[curve]:+.3f} ± 0.000" for curve in expected]
    for answer, optimizer, power in zip(answers[6:], ("sgd", "adam"), (2, 1), strict=True):
        a, b = (slopes[optimizer, 1.0, trained, delta] for trained in ("both", "B"))
        shown = f"A trained: 1: {a + power:.2f} ± 0.00; A frozen: 1: {b + power:.2f} ± 0.00"
        assert answer.figures == f"under alpha/r, plus {power}: {shown}"
        assert answer.answer == f"yes: by {a - b:+.3f} ± 0.000 at step 1"
    words = [answer.question for answer in answers]
    assert ["from r = 64 on" in text for text in words] == [False, False, True, True, *[False] * 4]
    assert ["held-out" in text for text in words] == [*[False] * 4, True, True, False, False]


def seed_row(rank: int, seed: int, step: int, diverged: int = 0, **values: float | str) -> dict:
    """Return a row of seeds.csv with every quantity as r^(1/2) times a factor of the seed, updated by ``values``."""
    row = {"model": "linear", "start": "A", "trained": "both", "optimizer": "sgd", "rule": "lora", "kappa": 1.0}
    row |= {"rank": rank, "scaling": 4 / rank, "learning_rate": 0.1, "seed": seed, "step": step, "diverged": diverged}
    return row | dict.fromkeys(rank_exponents.QUANTITIES, rank**0.5 * (1 + seed)) | values


FOUR = (64, 4, 16, 256)


def test_fits_leave_out_diverged_ranks_and_take_the_upper_half():
    """The slope is 1/2 up to rank 16 and 1 above; rank 4 diverged at one seed."""

    def value(rank: int, step: int) -> float:
        return (rank**0.5 if rank <= 16 else rank / 4) * (step + 1)

    rows = []
    for rank, seed, step in itertools.product(FOUR, range(2), (0, 1)):
        has_diverged = int((rank, seed, step) == (4, 1, 1))
        left = 1.0 if (rank, step) == (64, 1) else 8.0
        rows.append(seed_row(rank, seed, step, has_diverged, output_train=value(rank, step), loss_train=left))
    fitted = rank_exponents.exponent_fits(pd.DataFrame(rows)).to_dict("records")
    fits = {(row["range"], row["step"]): row for row in fitted if row["quantity"] == "output_train"}
    assert fits["upper", 1]["slope"] == pytest.approx(1.0, abs=1e-4)
    assert (fits["upper", 1]["lowest_rank"], fits["upper", 1]["ranks"]) == (64, 2)
    assert fits["all", 1]["slope"] == pytest.approx(1.0, abs=1e-4)
    assert (fits["all", 1]["lowest_rank"], fits["all", 1]["highest_rank"], fits["all", 1]["ranks"]) == (16, 256, 3)
    assert fits["all", 0]["ranks"] == 4
    assert fits["all", 0]["slope"] < 0.9
    assert fits["all", 1]["loss_left"] == 1 / 8, "the least over ranks"


def test_means_leave_out_diverged_seeds():
    rows = [seed_row(4, seed, 1, diverged=int(seed == 2), inner=float(10**seed)) for seed in range(3)]
    (line_,) = rank_exponents.summarise_seeds(pd.DataFrame(rows)).to_dict("records")
    assert (line_["seeds"], line_["diverged"], line_["inner"]) == (3, 1, pytest.approx(5.5, rel=1e-12))
    assert line_["inner_se"] == pytest.approx(4.5, rel=1e-12)  # |10 - 1| / sqrt(2) / sqrt(2)
