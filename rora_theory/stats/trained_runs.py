"""Trained runs of a grid of learning rates: their resampled records, their curve of loss against rate, their losses."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

from rora_theory.errors import InputError
from rora_theory.stats.estimate import Estimate, over_seeds
from rora_theory.stats.paired import mean_per_token_over_seeds
from rora_theory.stats.rate_curves import RECORDS, Curve, combine_errors


@dataclass(frozen=True)
class TrainedRun:
    """Loss of one training run after a number of steps: the cell of every matrix of runs.

    Attributes:
      method: Name of the method or scaling rule, the rule of its curve.
      rank: Rank of the adapter.
      gamma: Scaling of the adapter.
      rate: Peak learning rate.
      seed: Seed of the run.
      loss: Loss, of a language model in nats per token on held-out records; infinite if the run diverged.
      records: Loss of each held-out record, summed over its tokens; None if the run diverged or has no such losses.
      tokens: Number of tokens of each record; None if ``records`` is None.
      optimizer: Optimizer of the run.
      trained: Trained factors: both, or B alone.
      kappa: Exponent of the scaling rule gamma = alpha / r^kappa.
    """

    method: str
    rank: int
    gamma: float
    rate: float
    seed: int
    loss: float
    records: np.ndarray | None = None
    tokens: np.ndarray | None = None
    optimizer: str = "adamw"
    trained: str = "both"
    kappa: float = 1.0

    @property
    def setting(self) -> tuple[str, str, str, float, int, float]:
        """Everything but the rate and the seed: optimizer, trained factors, method, kappa, rank and scaling."""
        return self.optimizer, self.trained, self.method, self.kappa, self.rank, self.gamma


def bootstrap(runs: Sequence[TrainedRun], draws: int, seed: int = 0) -> Float[np.ndarray, "draws runs"] | None:
    """Compute losses over resampled held-out records, which are the same for every run.

    Args:
      runs: Runs with the same held-out records.
      draws: Number of bootstrap samples.
      seed: Seed of the bootstrap; the same seed draws the same records in every call.

    Returns:
      The losses, infinite for runs that diverged; None if a run has no losses by record.

    Raises:
      InputError: If runs have different records.
    """
    finite = [run for run in runs if math.isfinite(run.loss)]
    records = [run.records for run in finite if run.records is not None]
    if len(records) < len(finite):
        return None
    losses = np.full((draws, len(runs)), np.inf)
    if finite:
        # Resample records rather than tokens, because the tokens of a record are dependent. A run that diverged keeps
        # an infinite loss in every sample.
        tokens = tokens_of(finite)
        index = np.random.default_rng(seed).integers(0, len(tokens), (draws, len(tokens)))
        drawn_tokens = tokens[index].sum(axis=1)
        columns = [math.isfinite(run.loss) for run in runs]
        losses[:, columns] = np.stack([sums[index].sum(axis=1) / drawn_tokens for sums in records], axis=1)
    return losses


def curve_of_runs(runs: Sequence[TrainedRun], *, draws: int = 0) -> Curve:
    """Return the curve of loss against learning rate of one setting.

    The bootstrap samples of the records are the same for every seed, rate and curve. If a run has no losses by record,
    the curve has no resampled losses.

    Args:
      runs: A run for every seed and rate of the curve.
      draws: Number of bootstrap samples of the records.

    Raises:
      InputError: If runs of one seed have different records.
    """
    # Runs in a grid of seeds and rates.
    by_cell = {(run.seed, run.rate): run for run in runs}
    seeds, rates = sorted({run.seed for run in runs}), sorted({run.rate for run in runs})
    grid = [[by_cell[seed, rate] for rate in rates] for seed in seeds]
    losses = np.array([[run.loss for run in seed_runs] for seed_runs in grid])
    # Bootstrap of each seed's runs, stacked to [draws, seeds, rates].
    samples = [sample for sample in (bootstrap(seed_runs, draws) for seed_runs in grid) if sample is not None]
    resampled = np.stack(samples, axis=1) if len(samples) == len(seeds) else None
    records = next((len(run.records) for run in runs if run.records is not None), 0)
    return Curve(*runs[0].setting, np.array(rates), losses, resampled, tuple(seeds), records)


def curves_of_runs(runs: Iterable[TrainedRun], *, draws: int = 0) -> list[Curve]:
    """Return the curve of every setting with runs at three or more rates, in the order of the runs.

    A curve needs the same rates at every seed. Seeds with more rates are chosen first. A seed is left out if fewer than
    three rates would remain, or none at which no seed diverged.

    Args:
      runs: Runs of one matrix.
      draws: Number of bootstrap samples of the records.
    """
    by_setting: dict[tuple[str, str, str, float, int, float], list[TrainedRun]] = {}
    for run in runs:
        by_setting.setdefault(run.setting, []).append(run)
    grids = map(_select_grid, by_setting.values())
    return [curve_of_runs(grid, draws=draws) for grid in grids if grid]


def _select_grid(runs: Sequence[TrainedRun]) -> list[TrainedRun]:
    """Select the runs of one setting that form a grid of seeds and rates."""
    # Rates that each seed ran at, and those at which it did not diverge.
    rates_of_seed: dict[int, set[float]] = {}
    finite_rates_of_seed: dict[int, set[float]] = {}
    for run in runs:
        rates_of_seed.setdefault(run.seed, set()).add(run.rate)
        finite_rates = finite_rates_of_seed.setdefault(run.seed, set())
        if math.isfinite(run.loss):
            finite_rates.add(run.rate)
    seeds: list[int] = []
    rates: set[float] = set()
    # Add one seed after the other, those with the most rates first, if the rates that remain still give a curve.
    for seed in sorted(rates_of_seed, key=lambda seed: (-len(rates_of_seed[seed]), seed)):
        shared_rates = rates & rates_of_seed[seed] if seeds else rates_of_seed[seed]
        finite_rates = set.intersection(*(finite_rates_of_seed[member] for member in (*seeds, seed)))
        if len(shared_rates) >= 3 and shared_rates & finite_rates:
            seeds, rates = [*seeds, seed], shared_rates
    return [run for run in runs if run.seed in seeds and run.rate in rates]


def loss_difference(first: Sequence[TrainedRun], second: Sequence[TrainedRun]) -> Estimate:
    """Estimate the mean loss of the first runs minus that of the second, with the error over seeds and over records.

    The two errors are combined by `combine_errors`. For a single seed without losses per record there is no error.

    Args:
      first: Runs that did not diverge, one per seed.
      second: Runs of the same seeds in the same order.

    Returns:
      The difference in nats per token, with the combined error.

    Raises:
      InputError: If runs have different records.
    """
    runs = [*first, *second]
    records = [run.records for run in runs if run.records is not None]
    if len(records) < len(runs):
        return over_seeds(np.array([a.loss - b.loss for a, b in zip(first, second, strict=True)]))
    gaps = np.stack(records[: len(first)]) - np.stack(records[len(first) :])
    over_records, by_seeds = mean_per_token_over_seeds(gaps, tokens_of(runs).astype(int).tolist())
    return combine_errors(by_seeds, replace(over_records, over=RECORDS))


def tokens_of(runs: Sequence[TrainedRun]) -> Float[np.ndarray, " records"]:
    """Return the number of tokens of each held-out record, which must be the same for all runs.

    Raises:
      InputError: If runs have different records.
    """
    first_tokens = np.asarray(runs[0].tokens)
    for run in runs:
        if not np.array_equal(first_tokens, np.asarray(run.tokens)):
            names = [
                f"{differing.method} of rank {differing.rank} at {differing.rate:g}, seed {differing.seed}"
                for differing in (runs[0], run)
            ]
            raise InputError(f"{' and '.join(names)} must have the same held-out records, got different ones")
    return first_tokens
