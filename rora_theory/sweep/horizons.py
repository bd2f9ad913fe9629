"""The best rate against gamma r at several horizons: what the law says beforehand, and what runs say."""

import math
from collections.abc import Sequence
from itertools import product

import numpy as np
import pandas as pd

from rora_theory.advice.setting import Setting
from rora_theory.advice.transfer import transfer

QUANTILES = (0.05, 0.5, 0.95)
"""Of the takeover distances of a model's modules: each module has its own, one rate serves all."""


def predictions(
    takeovers: Sequence[float],
    strengths: tuple[float, float],
    *,
    steps: Sequence[int],
    rates: Sequence[float],
    warmup: int,
) -> pd.DataFrame:
    """By what factor the law has the best rate fall between two values of gamma r, given the best rate at the first.

    The rate is constant after a warm-up from 0, the optimizer Adam, the signal leads.

    Args:
      takeovers: distances at which A takes over, of a model's modules (`rora_theory.theory.horizon`).
      strengths: gamma r that the rate is known at, and the other.
      steps: horizons.
      rates: best rates that the first may turn out to have.
      warmup: steps.

    Returns:
      ``steps``, ``rate``, ``quantile`` (of the takeovers), ``takeover``, ``factor`` (rate at the first strength over
      rate at the second) and ``exponent`` (d log rate / d log gamma r).
    """
    rows = []
    for count, rate, quantile in product(steps, rates, QUANTILES):
        takeover = float(np.quantile(takeovers, quantile))
        schedule = [min(1.0, step / warmup) if warmup else 1.0 for step in range(count)]
        old = Setting(rank=1, alpha=strengths[0], learning_rate=rate, rule="lora")
        advice = transfer(old, 1, rule="lora", alpha=strengths[1], steps=count, takeover=takeover, schedule=schedule)
        factor = rate / advice.learning_rate
        exponent = -math.log(factor) / math.log(strengths[1] / strengths[0])
        rows.append((count, rate, quantile, takeover, factor, exponent))
    return pd.DataFrame(rows, columns=["steps", "rate", "quantile", "takeover", "factor", "exponent"])
