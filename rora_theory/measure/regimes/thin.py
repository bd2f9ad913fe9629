r"""Warnings about measurements with too few held-out tokens, layers or ranks.

The advised alpha at rank r' depends on a module's linear term c, under Adam as
:math:`\alpha' / \alpha \propto \sqrt{r (r + c) / (r' (r' + c))}`, so that :math:`|d \ln \alpha' / d \ln c| \le 1/2`
at any ranks (1/4 under SGD, where gamma enters squared). A standard error of `MAX_STANDARD_ERROR` in :math:`\ln c`
therefore changes alpha by at most a tenth. A measurement with a larger error is called thin.
"""

import math
import warnings
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
from scipy import special

MAX_STANDARD_ERROR = 0.2
"""Largest standard error of ln c, or of ln r*, that is not called thin."""

MIN_TOKENS = 16
"""Number of tokens below which quartiles are too uncertain to estimate a spread from."""

MIN_LAYERS = 3
"""Number of layers below which their spread is too uncertain to estimate an error from."""

MIN_RANKS, MIN_RANK_SPAN = 3, 8
"""Smallest number of ranks, and smallest ratio of the largest to the smallest rank, for a slope that is not thin.

A slope through two ranks can't be checked by a third. Between ranks r and s r the local slope of sqrt(r (r + c)), which
rises from 1/2 to 1, changes by at most (sqrt(s) - 1) / (2 (sqrt(s) + 1)), a quarter at s = 8. Over a smaller span, a
quantity can look flat and still depend on the rank elsewhere.
"""

WARNINGS_KEY = "warnings"
"""Key in a frame's ``attrs`` of its list of warnings."""

_MEDIAN_ERROR_PER_QUARTILE_RANGE = math.sqrt(math.pi / 2) / (2 * float(special.ndtri(0.75)))
"""Standard error of the median of n normal values, times sqrt(n), per difference of the quartiles.

The error is sqrt(pi / 2) times that of a mean, and the quartiles are 2 z standard deviations apart, z = 0.674.
"""


class ThinWarning(UserWarning):
    """Warning that a measurement rests on too few tokens, layers or ranks."""


def regime_warnings(crossings: pd.DataFrame, layers: int | None) -> list[str]:
    """Return warnings about the crossing ranks of a model.

    Args:
      crossings: Frame with the columns `tables.CROSSING_COLUMNS`.
      layers: Number of layers of the model; None if it is unknown.
    """
    held_out = crossings[crossings["split"] == "heldout"]
    return [*token_warnings(held_out), *layer_warnings(held_out, layers)]


def token_warnings(crossings: pd.DataFrame) -> list[str]:
    """Return a warning if there are too few tokens for an accurate crossing rank.

    The error is estimated from the quartiles over tokens, as if tokens were independent; those of one record are not
    quite.

    Args:
      crossings: Rows of one split.
    """
    if crossings.empty:
        return []
    # Standard error of each module's median ln r*; the median over modules is compared with the limit.
    tokens = int(crossings["tokens"].min())
    ratio = (crossings["upper_quartile"] / crossings["lower_quartile"]).fillna(math.inf).to_numpy(float)
    errors = _MEDIAN_ERROR_PER_QUARTILE_RANGE * np.log(ratio) / np.sqrt(crossings["tokens"].to_numpy(float))
    error = float(np.median(errors))
    if tokens >= MIN_TOKENS and error <= MAX_STANDARD_ERROR:
        return []
    # With too few tokens, the error itself is not known.
    if tokens < MIN_TOKENS:
        problem = f"fewer than the {MIN_TOKENS} needed to estimate an error"
    elif math.isinf(error):
        problem = "and half of the modules have a crossing rank of unknown error"
    else:
        problem = f"and half of the modules have a crossing rank with a standard error of {error:.0%} or more"
    return [
        f"thin: modules were sampled at {tokens} held-out tokens, {problem} (limit: {MAX_STANDARD_ERROR:.0%}). "
        "Use more held-out records or tokens."
    ]


def layer_warnings(crossings: pd.DataFrame, layers: int | None) -> list[str]:
    """Return a warning if there are too few layers to estimate the others.

    Layers that were not measured get the mean of ln c over measured layers, by kind of module. Its error is that of a
    sample without replacement. The error of a kind is unknown if c has no finite logarithm in one of its layers (c is
    infinite, or 0 or below, where the rank's terms subtract).

    Args:
      crossings: Rows of one split.
      layers: Number of layers of the model; None if it is unknown.
    """
    measured = int(crossings["layer"].nunique())
    if layers is None or not measured or measured >= layers:
        return []
    # Standard error of the mean of ln c over layers, by kind, with the correction for a finite population.
    kinds = crossings["module"].str.rpartition(".")[2]
    terms = crossings["linear_term"].astype(float)
    logs = crossings.assign(kind=kinds, log=np.log(terms.where((terms > 0) & (terms < math.inf))))
    by_kind = logs.groupby(["optimizer", "init", "kind"])["log"].agg(["std", "count", "size"])
    errors = by_kind["std"] / np.sqrt(by_kind["count"]) * math.sqrt(1 - measured / layers)
    # The error is unknown if a logarithm is missing (pandas counts without them), or if only one layer has the kind.
    errors = errors.where(by_kind["count"] == by_kind["size"]).fillna(math.inf)
    if measured >= MIN_LAYERS and float(errors.max()) <= MAX_STANDARD_ERROR:
        return []
    if measured < MIN_LAYERS:
        problem = f", fewer than the {MIN_LAYERS} needed to estimate an error"
    else:
        error = f"a standard error of {errors.max():.0%}" if math.isfinite(errors.max()) else "an unknown error"
        kind = errors.idxmax()[2]
        problem = f"; the mean of {kind}'s linear term over layers has {error} (limit: {MAX_STANDARD_ERROR:.0%})"
    return [f"thin: {measured} of the model's {layers} layers were measured{problem}. Measure more layers."]


def rank_warnings(ranks: Sequence[int]) -> list[str]:
    """Return a warning if there are too few ranks, or ranks too close together, for a reliable slope."""
    span = max(ranks) / min(ranks)
    if len(set(ranks)) >= MIN_RANKS and span >= MIN_RANK_SPAN:
        return []
    return [
        f"thin: slopes are fitted to ranks {' '.join(map(str, sorted(ranks)))}, over which a curve can look straight. "
        f"Use {MIN_RANKS} or more ranks over a factor of {MIN_RANK_SPAN} or more."
    ]


def warn(frames: Iterable[pd.DataFrame], messages: Sequence[str], *, stacklevel: int = 3) -> None:
    """Store warnings in the ``attrs`` of frames, and issue them as `ThinWarning`."""
    for frame in frames:
        frame.attrs[WARNINGS_KEY] = list(messages)
    for message in messages:
        warnings.warn(message, ThinWarning, stacklevel=stacklevel)
