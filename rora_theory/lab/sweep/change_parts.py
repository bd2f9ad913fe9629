r"""B part and A part of a trained adapter's change, and the rate that preserves the change.

With :math:`A_0` for A before training, the change of a module's output at input x' is the sum of two parts:

.. math:: w = \gamma B A x' = \underbrace{\gamma B A_0 x'}_{\text{B part}}
          + \underbrace{\gamma B (A - A_0) x'}_{\text{A part}}

At a constant gradient (`rora_theory.laws.constant_gradient`) the first part is proportional to the learning rate and
the second to its square. If this holds in a real run, the rate that preserves the rms of the change at the end of the
run is a power of gamma r. `preserving_exponent` computes the exponent from the rms of the parts and of their sum.
"""

import math
import sys
from typing import Any

import jax
import numpy as np
import pandas as pd
import scipy
from jaxtyping import Float

from rora_theory.errors import InputError
from rora_theory.lab import llama
from rora_theory.lab.adapters import LoraAdapter
from rora_theory.lab.data.batches import Examples
from rora_theory.lab.llama import LlamaConfig
from rora_theory.lab.llama.shared_prompt import common_length
from rora_theory.measure.tokens import mark_sinks

PARTS = ("B_part", "A_part", "whole")
"""Columns of `compute_part_rms` with the rms of the B part, the A part and their sum."""


def module_inputs(
    params: Any, config: LlamaConfig, examples: Examples, adapter: LoraAdapter, *, records: int = 8
) -> dict[str, Float[np.ndarray, "layers tokens p_in"]]:
    """Return the base model's inputs to an adapter's modules at the tokens of the first records.

    Tokens of the beginning that all these records share are left out.

    Args:
      params: Weights of the base model.
      config: Configuration of the base model.
      examples: Tokenized records. Their last tokens are targets only.
      adapter: Adapter of the modules.
      records: Maximum number of records.

    Returns:
      The inputs of every module, [layers, tokens, p_in], with the tokens of all records one after the other.

    Raises:
      InputError: If there is no record, or if the records do not differ.
    """
    rows = [examples[index][:-1].tolist() for index in range(min(records, len(examples)))]
    # The smallest and the largest row in lexicographic order share the beginning that all rows share.
    shared = common_length(min(rows), max(rows)) if len(rows) > 1 else 0
    width = max(map(len, rows), default=0)
    if width <= shared:
        raise InputError(f"examples must have records that differ, got {len(rows)} without a distinct token")
    # Pad on the right, which causal attention ignores.
    tokens = np.array([row + [0] * (width - len(row)) for row in rows], np.int32)
    mask = np.array([[shared <= position < len(row) for position in range(width)] for row in rows])
    _, inputs = _capture_inputs(params, tokens, config=config, modules=tuple(adapter.params))
    return {module: np.asarray(x)[:, mask] for module, x in inputs.items()}


_capture_inputs = jax.jit(
    lambda params, tokens, *, config, modules: llama.hidden_states(params, tokens, config, capture=modules),
    static_argnames=("config", "modules"),
)


def compute_part_rms(
    start: LoraAdapter, trained: LoraAdapter, inputs: dict[str, Float[np.ndarray, "layers tokens p_in"]]
) -> pd.DataFrame:
    """Compute the rms over tokens and outputs of both parts of a trained adapter's change, and of their sum.

    Args:
      start: Adapter before training, with B = 0.
      trained: The same adapter after training.
      inputs: Inputs of the modules, see `module_inputs`. Attention sinks are left out.

    Returns:
      A row for each adapted module, with ``layer``, ``module``, ``B_part``, ``A_part`` and ``whole``.

    Raises:
      InputError: If the adapter uses DoRA, which does not only add gamma B A x.
    """
    if trained.config.use_dora:
        raise InputError("use_dora must be false, got true: DoRA's change is not gamma B A x")
    rows: list[dict[str, Any]] = []
    for module in (target.module for target in trained.targets):
        # Factors of all layers: [layers, r, p_in] and [layers, p_out, r].
        start_A = np.asarray(start.params[module]["lora_A"], np.float64)
        trained_A = np.asarray(trained.params[module]["lora_A"], np.float64)
        trained_B = np.asarray(trained.params[module]["lora_B"], np.float64)
        for layer, gamma in enumerate(np.asarray(trained.scaling[module], np.float64)):
            # The scaling is 0 in layers that are not adapted.
            if gamma == 0:
                continue
            # A_0 x' and (A - A_0) x' at the tokens that are not attention sinks, [tokens, r].
            x = inputs[module][layer].astype(np.float64)
            x = x[~mark_sinks(np.linalg.norm(x, axis=1))]
            B_part, A_part = x @ start_A[layer].T, x @ (trained_A[layer] - start_A[layer]).T
            # |B u|^2 = u^T B^T B u: avoids forming B u, which has p_out instead of r columns.
            gram = trained_B[layer].T @ trained_B[layer]
            squares = [np.einsum("tr,rs,ts->", u, gram, u, optimize=True) for u in (B_part, A_part, B_part + A_part)]
            # Rounding may make a sum of squares negative.
            rms = gamma * np.sqrt(np.maximum(squares, 0) / (len(x) * trained_B.shape[1]))
            rows.append({"layer": layer, "module": module} | dict(zip(PARTS, rms.tolist(), strict=True)))
    return pd.DataFrame(rows, columns=["layer", "module", *PARTS])


def preserving_exponent(
    B_part: Float[np.ndarray, " n"], A_part: Float[np.ndarray, " n"], total: Float[np.ndarray, " n"]
) -> Float[np.ndarray, " n"]:
    r"""Compute the exponent of gamma r by which the learning rate preserves the rms of the change.

    B's part is proportional to the rate, A's to its square. If the rate is multiplied by y, the mean square is
    :math:`y^2 (b^2 + 2 c y + a^2 y^2)` with :math:`c = (w^2 - a^2 - b^2) / 2`, so that

    .. math:: \frac{d \log \eta}{d \log \gamma r} = -\left[ 1 + \frac{c + a^2}{w^2} \right]^{-1}

    The exponent is -1 if B's part dominates and -1/2 if A's part does. If both parts have the same direction, it equals
    `theory.horizon.rate_exponents`.

    Args:
      B_part: Rms b of the B part.
      A_part: Rms a of the A part.
      total: Rms w of their sum, above 0.

    Returns:
      The exponent for each module, from -1 to -1/2 if the parts do not cancel.
    """
    b, a, w = (np.asarray(rms, np.float64) for rms in (B_part, A_part, total))
    c = (w**2 - a**2 - b**2) / 2
    return -1 / (1 + (c + a**2) / w**2)


def preserving_factor(
    gain_ratio: float,
    B_part: Float[np.ndarray, " n"],
    A_part: Float[np.ndarray, " n"],
    total: Float[np.ndarray, " n"],
) -> float:
    r"""Compute the factor of the learning rate that preserves the rms of the change if gamma r is multiplied.

    In the notation of `preserving_exponent`, with s = ``gain_ratio`` and sums over modules, the factor is the y > 0
    that solves

    .. math:: s^2\, y^2 \textstyle\sum (b^2 + 2 c y + a^2 y^2) = \sum w^2

    Its logarithmic slope at s = 1 is `preserving_exponent`. If both parts have the same direction, it equals
    `theory.horizon.rate_factor`.

    If the parts are nearly opposite (a correlation below -0.94), the change decreases with the rate over a range of
    rates, and there may be several solutions. Only a solution in the same increasing range as 1 is returned.

    Args:
      gain_ratio: Factor by which gamma r is multiplied (new value over old value), above 0.
      B_part: Rms b of the B part of each module.
      A_part: Rms a of the A part of each module.
      total: Rms w of their sum for each module.

    Returns:
      The factor y, or NaN if there is none.

    Raises:
      InputError: If ``gain_ratio`` or the change is not positive.
    """
    # Sums of b^2, a^2 and w^2 over modules.
    b2, a2, w2 = (float(np.sum(np.asarray(rms, np.float64) ** 2)) for rms in (B_part, A_part, total))
    if not (gain_ratio > 0 and w2 > 0):
        raise InputError(f"gain_ratio and the change must be above 0, got {gain_ratio!r} and {math.sqrt(w2)!r}")

    # 2 c = w^2 - b^2 - a^2, limited by the Cauchy-Schwarz inequality, which rounded parts can violate.
    twice_c = max(w2 - a2 - b2, -2 * math.sqrt(a2 * b2))

    # Logarithm of the mean square at the new gain and rate over the old one: 0 at the solution.
    def log_ratio(y: float) -> float:
        ratio = gain_ratio**2 * y**2 * (b2 + twice_c * y + a2 * y**2) / w2
        return math.log(max(ratio, sys.float_info.min))

    # Restrict the search to an increasing range that contains 1. With opposite parts the change decreases between two
    # turning points, the roots of 4 a y^2 + 3 (2 c) y + 2 b.
    low, high = 1e-9 / gain_ratio, math.inf
    discriminant = 9 * twice_c**2 - 32 * a2 * b2
    if twice_c < 0 <= discriminant:
        # The smaller root in the form without a difference, which would cancel.
        root_sum = math.sqrt(discriminant) - 3 * twice_c
        maximum, minimum = 4 * b2 / root_sum, root_sum / (8 * a2)
        if maximum <= 1 <= minimum:
            return math.nan
        low, high = (low, maximum) if maximum > 1 else (minimum, high)
    # Find a finite upper end, then the root.
    if high == math.inf:
        high = max(low, 1.0)
        while log_ratio(high) < 0:
            high *= 2
    if log_ratio(low) > 0 or log_ratio(high) < 0:
        return math.nan
    return float(scipy.optimize.brentq(log_ratio, low, high, xtol=1e-12, rtol=1e-10))
