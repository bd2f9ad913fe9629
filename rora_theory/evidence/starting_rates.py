r"""Learning rates to start from without any tuned setting, by model family and size.

The best rate of a model is modelled as

.. math:: \log \eta = a + b \log P + u_{family} + e

with the number of parameters P, a deviation u of the family and a deviation e of the model. The slope b is fitted
within families; the deviation of a family is shrunk towards 0 by its number of models (a random effect). All rates are
those at rank 16 and alpha 32 with `alpha / r`, batches of 128 and 780 steps with linear decay.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rora_theory.errors import InputError
from rora_theory.evidence.policies import advised
from rora_theory.evidence.sources import PACKAGE, read_table
from rora_theory.runs import frames
from rora_theory.scaling import check_choice, check_positive
from rora_theory.stats.slopes import slope_weights

if TYPE_CHECKING:
    import pandas as pd

RANK, ALPHA = 16, 32.0
"""Rank and alpha, with `alpha / r`, to which all rates are transferred."""

SOURCE = "tinker"
"""Source of the best rates."""

SIZES = ((0, 10, "below 10B"), (10, 100, "10B to 100B"), (100, math.inf, "100B and more"))
"""Lowest and highest number of parameters in billions of each size class, and its name."""

CLASS_COLUMNS = ("family", "size", "models", "rate", "lowest", "highest", "bounds", "low", "high")
"""Columns of the table of `starting_table`."""


@dataclass(frozen=True)
class PublicModel:
    """A model of the public sweep.

    Attributes:
      name: Name of the model.
      family: Family of the model.
      parameters: Number of parameters in billions, all experts included.
      active_parameters: Number of parameters in billions that a token uses.
      hidden_size: Hidden size.
      log_rate: Natural logarithm of the best rate at `RANK` and `ALPHA`, the mean over the ranks that were run.
      is_bound: Whether no best rate of the model lies inside its grid, so that the rate is only known to a grid step.
    """

    name: str
    family: str
    parameters: float
    active_parameters: float
    hidden_size: int
    log_rate: float
    is_bound: bool


@dataclass(frozen=True)
class StartingRate:
    """Learning rate to start from, with its spread over models.

    Attributes:
      log_mean: Natural logarithm of the rate.
      log_spread: Standard deviation of the natural logarithm of the best rate of a further model around it.
      models: Number of models behind it, of the family if one is named.
    """

    log_mean: float
    log_spread: float
    models: int

    @property
    def rate(self) -> float:
        """Learning rate."""
        return math.exp(self.log_mean)

    @property
    def interval(self) -> tuple[float, float]:
        """Ends of the interval that has the best rate of 95% of models."""
        return math.exp(self.log_mean - 1.96 * self.log_spread), math.exp(self.log_mean + 1.96 * self.log_spread)


@cache
def models() -> tuple[PublicModel, ...]:
    """Return the models of the public sweep that have a curve, with their best rates transferred to one rank and alpha.

    The numbers of parameters are those in the models' names. For DeepSeek-V3.1, Kimi K2 and gpt-oss, whose names do not
    state the active ones, they come from the model cards (column ``parameters_from`` of ``models.csv``).
    """
    best = read_table("best_rates")
    best = best[best["source"] == SOURCE]
    return tuple(
        PublicModel(
            row["model"], row["family"], float(row["parameters"]), float(row["active_parameters"]),
            int(row["hidden_size"]), *_log_rate(frames.rows(best[best["model"] == row["model"]])),
        )
        for row in frames.rows(model_table())
        if (best["model"] == row["model"]).any()
    )  # fmt: skip


def model_table() -> "pd.DataFrame":
    """Return the families, numbers of parameters in billions and hidden sizes of all models of the public sweeps."""
    text_columns = ("model", "family", "parameters_from")
    return frames.read_csv(Path(str(PACKAGE.joinpath("models.csv"))), text_columns=text_columns)


def _log_rate(rows: Sequence[Mapping[str, Any]]) -> tuple[float, bool]:
    """Return the mean log rate at one rank over the curves of a model, and whether it is only a bound.

    Curves whose best rate lies beside a diverged run are known to a grid step. Those at the end of a grid are only used
    if there is no other.
    """
    known = [row for row in rows if row["place"] in ("inside", "beside a diverged run")] or rows
    logs = [math.log(row["best_rate"] * advised(row["rank"], row["gain"], RANK, ALPHA)) for row in known]
    return float(np.mean(logs)), not any(row["place"] == "inside" for row in rows)


@dataclass(frozen=True)
class RateModel:
    """Fitted model of the starting rates.

    Attributes:
      slope: Exponent b of the rate in the number of parameters.
      intercept: log rate of a model of an unknown family with a billion parameters.
      family_spread: Standard deviation of the families' deviations.
      model_spread: Standard deviation of the models' deviations within a family.
      families: Mean deviation of the models of each family from the intercept, and their number.
    """

    slope: float
    intercept: float
    family_spread: float
    model_spread: float
    families: Mapping[str, tuple[float, int]]

    def predict(self, family: str | None, parameters: float | None) -> StartingRate:
        """Return the starting rate of a further model; without its size, that of the median model."""
        variance = self.model_spread**2
        mean = self.intercept + self.slope * math.log(parameters or MEDIAN_PARAMETERS)
        deviation, count = self.families.get(family or "", (0.0, 0))
        # Posterior mean and variance of the family's deviation.
        shrinkage = self.family_spread**2 / (self.family_spread**2 + variance / count) if count else 0.0
        family_variance = self.family_spread**2 * (1 - shrinkage)
        if not count:
            family_variance += self.family_spread**2 / max(len(self.families), 1)
            count = sum(number for _, number in self.families.values())
        return StartingRate(mean + shrinkage * deviation, math.sqrt(variance + family_variance), count)


MEDIAN_PARAMETERS = 30.0
"""Median number of parameters, in billions, of the models of the public sweep."""


def fit(known: Sequence[PublicModel]) -> RateModel:
    """Fit the model of the starting rates.

    Args:
      known: Models with a best rate, of two families or more.

    Returns:
      The fitted model. The spreads are estimated by the method of moments.

    Raises:
      InputError: If there are fewer than two families, or no family has models of two sizes.
    """
    names = list(dict.fromkeys(model.family for model in known))
    x, y = np.log([model.parameters for model in known]), np.array([model.log_rate for model in known])
    groups = [np.array([model.family == name for model in known]) for name in names]
    centred = [np.concatenate([values[group] - values[group].mean() for group in groups]) for values in (x, y)]
    if len(names) < 2 or not np.any(np.abs(centred[0]) > 0):
        raise InputError("known must have two families, and a family with models of two sizes")
    slope = float(slope_weights(centred[0]) @ centred[1])
    # Mean level of each family, and the scatter of its models around it.
    levels = y - slope * x
    means, counts = np.array([levels[group].mean() for group in groups]), np.array([group.sum() for group in groups])
    residuals = np.concatenate([levels[group] - levels[group].mean() for group in groups])
    variance = float(residuals @ residuals) / (len(known) - len(names) - 1)
    between = float(np.var(means, ddof=1)) - variance * float(np.mean(1 / counts))
    intercept = float(means.mean())
    deviations = dict(zip(names, zip((means - intercept).tolist(), counts.tolist(), strict=True), strict=True))
    return RateModel(slope, intercept, math.sqrt(max(between, 0.0)), math.sqrt(variance), deviations)


@cache
def _fitted() -> RateModel:
    return fit(models())


def families() -> tuple[str, ...]:
    """Return the families of the public sweep."""
    return tuple(dict.fromkeys(model.family for model in models()))


def starting_rate(*, family: str | None = None, parameters: float | None = None) -> StartingRate:
    """Return a learning rate to start from, and how far the best rate of a model may lie from it.

    It holds for AdamW on all linear layers at rank 16 and alpha 32 with `alpha / r`, with batches of 128 and about 780
    steps with linear decay. `rora_theory.evidence.rate_prior.rate_prior` transfers it to another run.

    Args:
      family: Family of the model, one of `families`; None is a family that was not measured.
      parameters: Number of parameters in billions, all experts included; None is not known.

    Returns:
      The rate as the mean and the standard deviation of its natural logarithm.

    Raises:
      InputError: If a value is out of range.

    Examples:
      >>> f"{starting_rate(family='Qwen3', parameters=8).rate:.1e}"
      '6.0e-04'
    """
    if family is not None:
        check_choice("family", family, families())
    if parameters is not None:
        check_positive("parameters", parameters)
    return _fitted().predict(family, parameters)


def starting_table() -> "pd.DataFrame":
    """Return the starting rates by family and size class, with the columns `CLASS_COLUMNS`.

    ``rate``, ``lowest`` and ``highest`` are the geometric mean and the ends of the models' best rates, ``bounds`` the
    number of models whose rate is only a bound or known to a grid step, ``low`` and ``high`` the ends of the interval
    of 95% for a further model of the family and of the class's mean size.
    """
    rows = []
    for family in families():
        for least, most, size in SIZES:
            members = [m for m in models() if m.family == family and least <= m.parameters < most]
            if not members:
                continue
            logs = [model.log_rate for model in members]
            parameters = math.exp(float(np.mean([math.log(model.parameters) for model in members])))
            low, high = _fitted().predict(family, parameters).interval
            rows.append(
                {"family": family, "size": size, "models": len(members), "rate": math.exp(float(np.mean(logs)))}
                | {"lowest": math.exp(min(logs)), "highest": math.exp(max(logs))}
                | {"bounds": sum(model.is_bound for model in members), "low": low, "high": high}
            )
    return frames.from_rows(rows, CLASS_COLUMNS)
