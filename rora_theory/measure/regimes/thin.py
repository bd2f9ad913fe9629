r"""Where a measurement rests on too little: few held-out tokens, few layers, few ranks.

An advised alpha carries a setting from rank r to r' with a module's linear term c, under Adam as
:math:`\alpha' / \alpha \propto \sqrt{r (r + c) / (r' (r' + c))}`, so that :math:`|d \ln \alpha' / d \ln c| \le 1/2`
whatever the ranks (under SGD, where gamma enters squared, 1/4). A standard error of `WORST` in :math:`\ln c` therefore
moves it by at most a tenth; what is known worse is called thin.
"""

import math
import warnings
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
from scipy import special

WORST = 0.2
"""Largest standard error of ln c, or of ln r*, that is not called thin."""

FEWEST_TOKENS = 16
"""Of fewer tokens quartiles do not tell the spread that the error is told from."""

FEWEST_RANKS, LEAST_SPAN = 3, 8
"""Two ranks have no third to disagree with their slope. And between ranks r and s r the local slope of sqrt(r (r + c)),
which goes from 1/2 to 1 in all, changes by (sqrt(s) - 1) / (2 (sqrt(s) + 1)) at most, a quarter at s = 8: what is flat
over less may bend outside."""

ATTRIBUTE = "warnings"
"""Of a frame's ``attrs``: what is thin about it, a sentence each."""

# The standard error of a median is that of a mean times sqrt(pi / 2), for a normal spread; quartiles are 2 z apart.
_OF_QUARTILES = math.sqrt(math.pi / 2) / (2 * float(special.ndtri(0.75)))


class ThinWarning(UserWarning):
    """A measurement rests on too little."""


def of_regime(crossings: pd.DataFrame, layers: int | None) -> list[str]:
    """What is thin about the crossing ranks of a model.

    Args:
      crossings: columns as `regime_tables.CROSSING_COLUMNS`.
      layers: that the model has; None is not known.
    """
    held_out = crossings[crossings["split"] == "heldout"]
    return [*of_tokens(held_out), *of_layers(held_out, layers)]


def of_tokens(crossings: pd.DataFrame) -> list[str]:
    """Whether tokens are too few for r*, by its spread over them: they are taken to be independent, which in one record
    they are not quite.

    Args:
      crossings: of one split.
    """
    if crossings.empty:
        return []
    fewest = int(crossings["tokens"].min())
    ratio = (crossings["upper_quartile"] / crossings["lower_quartile"]).fillna(math.inf).to_numpy(float)
    error = float(np.median(_OF_QUARTILES * np.log(ratio) / np.sqrt(crossings["tokens"].to_numpy(float))))
    if fewest >= FEWEST_TOKENS and error <= WORST:
        return []
    if fewest < FEWEST_TOKENS:
        known = f"and of fewer than {FEWEST_TOKENS} their spread can't be told"
    elif math.isinf(error):
        known = "which do not tell the crossing rank of half of the modules"
    else:
        known = f"which tells the crossing rank of half of the modules to {error:.0%} at best"
    return [
        f"thin: modules were read at {fewest} held-out tokens, {known}; accepted is a standard error of {WORST:.0%}: "
        "more held-out records or tokens"
    ]


def of_layers(crossings: pd.DataFrame, layers: int | None) -> list[str]:
    """Whether layers are too few for what is said of those that were not measured: the mean of ln c over layers, by
    kind of module, as of a sample without replacement. Of a kind with a layer whose c has no finite logarithm (0 or
    below, where the rank's terms subtract, or infinite) nothing is known.

    Args:
      crossings: of one split.
      layers: that the model has; None is not known.
    """
    measured = int(crossings["layer"].nunique())
    if layers is None or not measured or measured >= layers:
        return []
    kinds = crossings["module"].str.rpartition(".")[2]
    terms = crossings["linear_term"].astype(float)
    own = crossings.assign(kind=kinds, log=np.log(terms.where((terms > 0) & (terms < math.inf))))
    spread = own.groupby(["optimizer", "init", "kind"])["log"].agg(["std", "count", "size"])
    errors = spread["std"] / np.sqrt(spread["count"]) * math.sqrt(1 - measured / layers)
    # A kind that one layer has, too, has no spread.
    errors = errors.where(spread["count"] == spread["size"]).fillna(math.inf)
    if measured >= 3 and float(errors.max()) <= WORST:
        return []
    of_three = ""
    if measured >= 3:
        known = f"known to {errors.max():.0%}" if math.isfinite(errors.max()) else "not known"
        of_three = f" the mean over layers of {errors.idxmax()[2]}'s linear term is {known};"
    return [
        f"thin: {measured} of the model's {layers} layers were measured;{of_three} accepted are 3 or more and a "
        f"standard error of {WORST:.0%}: more layers"
    ]


def of_ranks(ranks: Sequence[int]) -> list[str]:
    """Whether a slope against these ranks can be taken for one over others."""
    span = max(ranks) / min(ranks)
    if len(set(ranks)) >= FEWEST_RANKS and span >= LEAST_SPAN:
        return []
    return [
        f"thin: slopes rest on ranks {' '.join(map(str, sorted(ranks)))}, between which a quantity that bends looks "
        f"straight; accepted are {FEWEST_RANKS} or more ranks over a factor of {LEAST_SPAN} or more"
    ]


def warn(frames: Iterable[pd.DataFrame], words: Sequence[str], *, stacklevel: int = 3) -> None:
    """Have frames say in their ``attrs`` what is thin about them, and warn of it."""
    for frame in frames:
        frame.attrs[ATTRIBUTE] = list(words)
    for one in words:
        warnings.warn(one, ThinWarning, stacklevel=stacklevel)
