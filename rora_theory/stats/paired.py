"""Means with standard errors over records or items that several runs share and are compared by, one by one.

What makes a record hard for one run does for the other, so that the error of a mean difference is several times below
those of the two means.
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Num

from rora_theory.errors import InputError
from rora_theory.stats.estimate import Estimate, over_seeds


def mean_per_token(losses: Sequence[float], tokens: Sequence[int]) -> Estimate:
    r"""Mean loss a token with its standard error over records.

    :math:`R = \sum l_i / \sum t_i` is a ratio of two sums over records drawn together; to first order its error is
    that of the mean of :math:`(l_i - R t_i) / \bar t`. For one record it is NaN, over nothing.

    Args:
      losses: summed over each record's tokens, or differences of two such sums.
      tokens: of each record, some of them above 0.

    Raises:
      InputError: no token, or another number of records in one of the two.
    """
    if len(losses) != len(tokens) or not sum(tokens) > 0:
        raise InputError(
            f"losses has {len(losses)} records and tokens {len(tokens)}, of {sum(tokens)} tokens; accepted are as many "
            "records, of 1 token or more together"
        )
    count, total = len(losses), math.fsum(tokens)
    ratio = math.fsum(losses) / total
    spread = math.fsum((loss - ratio * size) ** 2 for loss, size in zip(losses, tokens, strict=True))
    if count < 2:
        return Estimate(ratio, math.nan, count, "")
    return Estimate(ratio, math.sqrt(spread * count / (count - 1)) / total, count, "records")


def mean_per_token_over_seeds(
    losses: Float[np.ndarray, "seeds records"], tokens: Sequence[int]
) -> tuple[Estimate, Estimate]:
    """Mean loss a token over seeds, with its standard error over records (of the seeds' mean) and with that over seeds.

    The first speaks of other records, the second of training again.

    Args:
      losses: of each seed on the same records, see `mean_per_token`.
      tokens: of each record.
    """
    by_seed = np.array([one.sum() / sum(tokens) for one in losses])
    return mean_per_token(np.mean(losses, axis=0).tolist(), tokens), over_seeds(by_seed)


def mean_of_groups(groups: Sequence[Num[np.ndarray, "_seeds _items"]]) -> Estimate:
    r"""The unweighted mean of the groups' means, with its standard error over items.

    :math:`\sqrt{\sum_g s_g^2 / n_g}` over the number of groups, :math:`s_g` the sample deviation of the group's items,
    each averaged over seeds. Where a group has one item it is NaN, over nothing. Where the items of every group are
    equal it is 0: unlike that of `proportion` it does not say that further items could differ.

    Args:
      groups: of each group its items at every seed.
    """
    means = [np.mean(columns, axis=0) for columns in groups]
    mean, count = float(np.mean([np.mean(items) for items in means])), sum(map(len, means))
    if min(map(len, means)) < 2:
        return Estimate(mean, math.nan, count, "")
    error = math.sqrt(sum(np.var(items, ddof=1) / len(items) for items in means)) / len(means)
    return Estimate(mean, error, count, "items")


def resampled_ratios(
    sums: Sequence[Float[np.ndarray, " records"]], sizes: Float[np.ndarray, " records"], *, draws: int, seed: int = 0
) -> Float[np.ndarray, "draws series"]:
    """Ratios of sums over bootstrap samples of the records, the same records for every series.

    Args:
      sums: of each series, a figure a record.
      sizes: of each record, what the figures are divided by.
      draws: how many samples.
      seed: of the samples; the same seed draws the same records in every call.

    Examples:
      >>> resampled_ratios([np.array([3.0])], np.array([2.0]), draws=2).tolist()
      [[1.5], [1.5]]
    """
    index = np.random.default_rng(seed).integers(0, len(sizes), (draws, len(sizes)))
    whole = sizes[index].sum(axis=1)
    return np.stack([one[index].sum(axis=1) / whole for one in sums], axis=1)
