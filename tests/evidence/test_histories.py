"""Losses by phase and speeds: a known shift, equal runs, and the published figures by an independent path."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from rora_theory.evidence import sources
from rora_theory.evidence.histories import (
    SPEED_STEPS,
    loss_difference_table,
    loss_differences,
    relative_speed,
    speed_table,
    spread_table,
)
from rora_theory.evidence.sources import original_path

STEPS = np.arange(1, 468)


def loss(speed: float, batches: np.ndarray) -> np.ndarray:
    """Return the loss of a run that falls by 0.9 nats around step 60, plus the effect of the batches."""
    return 1.7 - 0.9 / (1 + (60 / (speed * STEPS)) ** 2) + batches


def test_a_known_speed_is_found_under_the_noise_of_shared_batches() -> None:
    """The effect of a batch, 0.035 nats as in the published runs, exceeds the difference that the speed makes."""
    batches = 0.035 * np.random.default_rng(0).normal(size=len(STEPS))
    history = {1: loss(1.2, batches), 16: loss(1.05, batches), 512: loss(1.0, batches)}
    assert math.exp(relative_speed(history, 1, 512)[0]) == pytest.approx(1.2, abs=0.02)
    assert math.exp(relative_speed(history, 16, 512)[0]) == pytest.approx(1.05, abs=0.005)
    assert relative_speed(history, 512, 512) == (0.0, 0.0)


def test_differences_are_paired_by_step() -> None:
    batches = 0.05 * np.random.default_rng(0).normal(size=len(STEPS))
    history = {8: loss(1.0, batches) + 0.001, 512: loss(1.0, batches)}
    difference, error = loss_differences(history, (17, 64), 512)[8]
    assert difference == pytest.approx(0.001)
    assert error < 1e-9
    tables = loss_difference_table({("m", 1e-4): history})
    spreads = spread_table(tables)
    assert spreads["spread"].tolist() == pytest.approx([0.001] * 3)
    assert spreads["from_rank"].tolist() == [8] * 3


def test_the_published_figures_by_an_independent_path(originals: Path) -> None:
    frame = pd.read_csv(original_path("apertus", originals))
    differences, speeds = sources.read_table("loss_differences"), sources.read_table("speeds")
    spreads = spread_table(differences)
    first_look = {  # of THEORY: model, steps, lowest rank
        ("8B", 5, 8): 0.012, ("8B", 17, 8): 0.0016, ("8B", 65, 8): 0.0006, ("8B", 5, 1): 0.037, ("8B", 17, 1): 0.009,
        ("70B", 5, 16): 0.026, ("70B", 17, 16): 0.0033, ("70B", 65, 16): 0.001,
    }  # fmt: skip
    ends = {5: 16, 17: 64, 65: 467}
    for (size, first, rank), expected in first_look.items():
        name = f"Apertus-{size}-Instruct-2509"
        runs = frame[(frame["model"] == name) & (frame["learning_rate"] == 1e-4) & (frame["rank"] >= rank)]
        means = runs[runs["step"].between(first, ends[first])].groupby("rank")["train_loss"].mean()
        is_row = (spreads["model"] == name) & (spreads["learning_rate"] == 1e-4)
        (spread,) = spreads[is_row & (spreads["first_step"] == first) & (spreads["from_rank"] == rank)]["spread"]
        assert spread == pytest.approx(means.max() - means.min(), rel=1e-6)
        assert spread == pytest.approx(expected, rel=0.25)
    # Speeds: smooth both curves and shift one in the log step, without the pairing by batch.
    low, high = SPEED_STEPS
    for size, rank in (("8B", 1), ("8B", 8), ("70B", 16), ("70B", 1)):
        name = f"Apertus-{size}-Instruct-2509"
        runs = frame[(frame["model"] == name) & (frame["learning_rate"] == 1e-5)]
        smooth = {}
        for member in (rank, 512):
            losses = runs[runs["rank"] == member].sort_values("step")["train_loss"].to_numpy()
            smooth[member] = np.poly1d(np.polyfit(np.log(STEPS[4:250]), losses[4:250], 6))
        x, shifts = np.log(np.arange(low, high + 1)), np.linspace(-0.1, 0.4, 501)
        misfits = [np.sum((smooth[rank](x) - smooth[512](x + shift)) ** 2) for shift in shifts]
        (speed,) = speeds[(speeds["model"] == name) & (speeds["rank"] == rank)]["speed"]
        assert speed == pytest.approx(math.exp(shifts[int(np.argmin(misfits))]), abs=0.02)


def test_speeds_come_from_the_lowest_rate() -> None:
    batches = np.zeros(len(STEPS))
    history = {1: loss(1.1, batches), 512: loss(1.0, batches)}
    assert speed_table({("m", 1e-4): history}).empty
    assert len(speed_table({("m", 1e-5): history})) == 2
