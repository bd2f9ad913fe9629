"""Means and standard errors over records or items that several runs share, for paired comparisons.

A record that is hard for one run is hard for the other. The error of a mean difference is therefore several times
smaller than the errors of the two means.
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Num

from rora_theory.errors import InputError
from rora_theory.stats.estimate import Estimate, over_seeds


def mean_per_token(losses: Sequence[float], tokens: Sequence[int]) -> Estimate:
    r"""Compute the mean loss per token with its standard error over records.

    :math:`R = \sum l_i / \sum t_i` is a ratio of two sums over the same sampled records. To first order its error is
    that of the mean of :math:`(l_i - R t_i) / \bar t`.

    Args:
      losses: Loss of each record summed over its tokens, or the difference of two such sums.
      tokens: Number of tokens of each record, at least one above 0.

    Returns:
      The mean loss per token. Its error is NaN for a single record.

    Raises:
      InputError: If there are no tokens or the two arguments differ in length.
    """
    if len(losses) != len(tokens) or not sum(tokens) > 0:
        raise InputError(
            "losses and tokens must have the same number of records, with at least 1 token in total, "
            f"got {len(losses)} losses and {len(tokens)} records with {sum(tokens)} tokens"
        )
    count, total = len(losses), math.fsum(tokens)
    ratio = math.fsum(losses) / total
    if count < 2:
        return Estimate(ratio, math.nan, count, "")
    # Sum of squares of the residuals l - R t, the mean of which has the error of the ratio.
    residual_squares = math.fsum((loss - ratio * size) ** 2 for loss, size in zip(losses, tokens, strict=True))
    return Estimate(ratio, math.sqrt(residual_squares * count / (count - 1)) / total, count, "records")


def mean_per_token_over_seeds(
    losses: Float[np.ndarray, "seeds records"], tokens: Sequence[int]
) -> tuple[Estimate, Estimate]:
    """Compute the mean loss per token over seeds, with its standard error over records and that over seeds.

    The first error describes other records, the second repeated training runs.

    Args:
      losses: Summed loss of each seed on the same records, see `mean_per_token`.
      tokens: Number of tokens of each record.

    Returns:
      The mean with its error over records (of the mean over seeds), and the mean with its error over seeds.
    """
    by_seed = np.array([seed_losses.sum() / sum(tokens) for seed_losses in losses])
    return mean_per_token(np.mean(losses, axis=0).tolist(), tokens), over_seeds(by_seed)


def mean_of_groups(groups: Sequence[Num[np.ndarray, "_seeds _items"]]) -> Estimate:
    r"""Compute the unweighted mean of the groups' means, with its standard error over items.

    The error is :math:`\sqrt{\sum_g s_g^2 / n_g}` divided by the number of groups. Here :math:`s_g` is the sample
    deviation of a group's items after averaging over seeds. The error is 0 if the items of every group are equal:
    unlike the error of `proportion` it does not allow for further items that differ.

    Args:
      groups: Items of each group for every seed.

    Returns:
      The mean of the groups' means. Its error is NaN if a group has a single item.
    """
    # Items of each group, averaged over seeds first: repeated runs on an item are not independent samples.
    item_means = [np.mean(group, axis=0) for group in groups]
    mean, count = float(np.mean([np.mean(items) for items in item_means])), sum(map(len, item_means))
    if min(map(len, item_means)) < 2:
        return Estimate(mean, math.nan, count, "")
    error = math.sqrt(sum(np.var(items, ddof=1) / len(items) for items in item_means)) / len(item_means)
    return Estimate(mean, error, count, "items")
