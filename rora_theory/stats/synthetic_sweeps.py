r"""Synthetic learning-rate sweeps with a known exponent, on which estimators and verdict rules are tested.

The log loss of a run is a curve in the log2 of the rate,

.. math:: \log L = \kappa \left( u^2 + s u^3 \right) + \varepsilon, \qquad u = x - m - d_{seed} - d_{record}

with the optimum m of the population, a displacement of every seed and of every held-out record, and noise of every run.
Curves of one seed share most of its displacement, since they train on the same batches in the same order.
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from rora_theory.stats.rate_curves import Curve

GRID_STEP = math.log2(10) / 4
"""Distance between learning rates in octaves: a quarter of a decade."""


@dataclass(frozen=True)
class SweepModel:
    """Distribution of a sweep: pairs of curves, at two values of a setting, for one or more ranks.

    The defaults are medians over the published curves of SmolLM2-135M after 64 and 256 steps.

    Attributes:
      exponent: True exponent of the best rate between the two values.
      ratio: Second value divided by the first.
      seeds: Number of seeds.
      rates: Number of learning rates of each curve, a quarter of a decade apart; the optimum of the population lies
        within half a step of the middle one.
      ranks: Number of pairs of curves.
      curvature: Curvature kappa of the first curve of each pair, per octave squared.
      second_curvature: Curvature of the second curve of each pair.
      skew: Skew s, per octave; above 0 the curve is steeper towards high rates.
      seed_spread: Standard deviation of a seed's optimum in octaves.
      seed_correlation: Correlation of a seed's optima between two curves.
      record_spread: Standard deviation of a record's optimum in octaves.
      record_correlation: Correlation of a record's optima between two curves.
      noise: Standard deviation of a run's log loss.
      records: Number of held-out records.
    """

    exponent: float
    ratio: float
    seeds: int
    rates: int
    ranks: int = 2
    curvature: float = 0.009
    second_curvature: float = 0.009
    skew: float = 0.0
    seed_spread: float = 0.25
    seed_correlation: float = 0.85
    record_spread: float = 1.3
    record_correlation: float = 0.7
    noise: float = 0.002
    records: int = 96


def draw_sweeps(
    model: SweepModel, count: int, random: np.random.Generator, *, draws: int = 200
) -> list[list[tuple[Curve, Curve]]]:
    """Draw independent sweeps.

    Args:
      model: Distribution of a sweep.
      count: Number of sweeps.
      random: Source of random numbers.
      draws: Number of bootstrap samples of the records, the same for all curves.

    Returns:
      For every sweep, a pair of curves for each rank.
    """
    shape = (count, model.ranks, 2)
    # Middle of each grid; the population's optimum lies within half a step of it.
    optima = np.zeros(shape)
    optima[..., 1] = model.exponent * math.log2(model.ratio)
    middle = optima + GRID_STEP * random.uniform(-0.5, 0.5, shape)
    x = middle[..., None] + GRID_STEP * (np.arange(model.rates) - (model.rates - 1) / 2)
    # Displacements of seeds and records, correlated between curves.
    by_seed = _correlated(random, shape, model.seeds, model.seed_spread, model.seed_correlation)
    by_record = _correlated(random, shape, model.records, model.record_spread, model.record_correlation)
    # Distance u of each rate from the optimum, and the losses: [sweeps, ranks, ends, seeds, rates, records].
    u = (x - optima[..., None])[..., None, :, None] - by_seed[..., None, None] - by_record[..., None, None, :]
    curvature = np.array([model.curvature, model.second_curvature])[:, None, None, None]
    noise = model.noise * random.normal(size=(*shape, model.seeds, model.rates, 1))
    losses = np.exp(curvature * (u**2 + model.skew * u**3) + noise)
    # Bootstrap of the records, as weights that every curve shares.
    picks = random.integers(0, model.records, (draws, model.records))
    weights = np.stack([np.bincount(pick, minlength=model.records) for pick in picks]) / model.records
    # Means over all records, [..., seeds, rates], and over each bootstrap sample, [..., draws, seeds, rates].
    means, resampled = losses.mean(axis=-1), np.moveaxis(losses @ weights.T, -1, 3)
    seeds = tuple(range(model.seeds))

    def make_curve(sweep: int, rank: int, end: int) -> Curve:
        index = (sweep, rank, end)
        samples = resampled[index], seeds, model.records
        return Curve("adamw", "both", "lora", 1.0, rank + 1, 1.0, 2.0 ** x[index], means[index], *samples)

    return [
        [(make_curve(sweep, rank, 0), make_curve(sweep, rank, 1)) for rank in range(model.ranks)]
        for sweep in range(count)
    ]


def _correlated(
    random: np.random.Generator, shape: tuple[int, ...], members: int, spread: float, correlation: float
) -> Float[np.ndarray, "sweeps ranks ends members"]:
    """Draw normal displacements of the members, with a given correlation between the curves of a sweep."""
    shared = random.normal(size=(shape[0], 1, 1, members))
    specific = random.normal(size=(*shape, members))
    return spread * (math.sqrt(correlation) * shared + math.sqrt(1 - correlation) * specific)
