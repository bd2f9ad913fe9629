"""Slopes during training: the ranks that count, diverged runs, and the sentence about them."""

import itertools

import pandas as pd
import pytest

from rora_theory.lab.sweep import rank_exponents


def test_the_sentence_is_about_the_output_change_after_the_last_step():
    """Only Adam's curve with both factors trained is flat from rank 16 on; before, at rank 4, it is not."""
    rows = []
    for rank, seed, step, (optimizer, trained) in itertools.product(
        (4, 16, 64, 256), range(3), (0, 1, 5), itertools.product(("sgd", "adam"), ("both", "B"))
    ):
        is_flat = (optimizer, trained, step) in (("adam", "both", 5), ("sgd", "both", 1), ("sgd", "B", 5))
        size = (1.0 if rank > 4 else 2.0) if is_flat else rank**0.5
        row = seed_row(rank, seed, step, loss_train=1.0, output_train=size * (1 + seed))
        rows.append(row | {"optimizer": optimizer, "trained": trained})
    fits = rank_exponents.exponent_fits(pd.DataFrame(rows))
    assert rank_exponents.describe_fits(fits) == (
        "After 5 steps the output change on training inputs does not depend on the rank from r = 64 on for 1 of 2 "
        "combinations of model, optimizer and rule: linear adam lora."
    )
    few = fits[(fits["range"] == "all") & (fits["optimizer"] == "sgd")]
    assert "from r = 4 on for 0 of 1 combinations of model, optimizer and rule." in rank_exponents.describe_fits(few)
    assert rank_exponents.describe_fits(fits.iloc[:0]).startswith("No setting ")


def seed_row(rank: int, seed: int, step: int, diverged: int = 0, **values: float | str) -> dict:
    """Return a row of seeds.csv with every quantity as r^(1/2) times a factor of the seed, updated by ``values``."""
    row = {"model": "linear", "trained": "both", "optimizer": "sgd", "rule": "lora", "kappa": 1.0}
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
    rows = [seed_row(4, seed, 1, diverged=int(seed == 2), loss_train=float(10**seed)) for seed in range(3)]
    (line_,) = rank_exponents.summarise_seeds(pd.DataFrame(rows)).to_dict("records")
    assert (line_["seeds"], line_["diverged"], line_["loss_train"]) == (3, 1, pytest.approx(5.5, rel=1e-12))
    assert line_["loss_train_se"] == pytest.approx(4.5, rel=1e-12)  # |10 - 1| / sqrt(2) / sqrt(2)
