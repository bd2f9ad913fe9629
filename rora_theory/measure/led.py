r"""Which part of a trained adapter's change leads, B's or A's: the takeover after training, measured.

The change of a module's output at input x' is the sum of two parts, :math:`A_0` being A at the start:

.. math:: w = \gamma B A x' = \underbrace{\gamma B A_0 x'}_{\text{B-led}}
          + \underbrace{\gamma B (A - A_0) x'}_{\text{A-led}}

At a constant gradient (`rora_theory.theory.horizon`) both grow with the rate, the first as it, the second as its
square. Where that holds of a real run, rates that keep the rms of the change at the run's end move with gamma r by the
exponent of `keeping_exponent`, which needs nothing but the rms of the parts and of their sum.
"""

import math
import sys
from typing import Any

import jax
import numpy as np
import pandas as pd
import scipy
from jaxtyping import Float

from rora_theory import llama
from rora_theory.adapters import LoraAdapter
from rora_theory.data.batches import Examples
from rora_theory.errors import InputError
from rora_theory.llama import LlamaConfig
from rora_theory.llama.shared_prompt import common_length
from rora_theory.measure.tokens import sinks

PARTS = ("led_B", "led_A", "whole")


def module_inputs(
    params: Any, config: LlamaConfig, examples: Examples, adapter: LoraAdapter, *, records: int = 8
) -> dict[str, Float[np.ndarray, "layers tokens p_in"]]:
    """The base model's inputs to an adapter's modules at the tokens of the first records, those left out with which
    all of these begin.

    Args:
      params, config: the base model.
      examples: tokenized records; their last tokens are only ever predicted.
      adapter: whose modules are read.
      records: how many.

    Raises:
      InputError: no record, or none that differs from the others.
    """
    rows = [examples[index][:-1].tolist() for index in range(min(records, len(examples)))]
    shared = common_length(min(rows), max(rows)) if len(rows) > 1 else 0
    width = max(map(len, rows), default=0)
    if width <= shared:
        raise InputError(f"{len(rows)} records have no token of their own; accepted are records that differ")
    tokens = np.array([row + [0] * (width - len(row)) for row in rows], np.int32)
    read = np.array([[shared <= at < len(row) for at in range(width)] for row in rows])
    _, inputs = _captured(params, tokens, config=config, modules=tuple(adapter.params))
    return {module: np.asarray(found)[:, read] for module, found in inputs.items()}


_captured = jax.jit(
    lambda params, tokens, *, config, modules: llama.hidden_states(params, tokens, config, capture=modules),
    static_argnames=("config", "modules"),
)


def led_parts(
    start: LoraAdapter, trained: LoraAdapter, inputs: dict[str, Float[np.ndarray, "layers tokens p_in"]]
) -> pd.DataFrame:
    """Rms over tokens and outputs of both parts of a trained adapter's change, and of the change.

    Args:
      start: the adapter before training, B = 0.
      trained: the same after it.
      inputs: of the modules, see `module_inputs`; attention sinks are left out.

    Returns:
      a row an adapted module: ``layer``, ``module``, ``led_B``, ``led_A`` and ``whole``.

    Raises:
      InputError: DoRA, whose change is not the product of A and B alone.
    """
    if trained.config.use_dora:
        raise InputError("use_dora is true; accepted is LoRA, whose change is gamma B A x")
    rows: list[dict[str, Any]] = []
    for module in (target.module for target in trained.targets):
        tensors = trained.params[module]
        first, last, B = (np.asarray(a, np.float64) for a in (
            start.params[module]["lora_A"], tensors["lora_A"], tensors["lora_B"]
        ))  # fmt: skip
        for layer, gamma in enumerate(np.asarray(trained.scaling[module], np.float64)):
            if gamma == 0:
                continue
            x = inputs[module][layer].astype(np.float64)
            x = x[~sinks(np.linalg.norm(x, axis=1))]
            led_B, led_A = x @ first[layer].T, x @ (last[layer] - first[layer]).T
            gram = B[layer].T @ B[layer]  # |B u|^2 = u' B'B u
            squares = [np.einsum("tr,rs,ts->", u, gram, u, optimize=True) for u in (led_B, led_A, led_B + led_A)]
            rms = gamma * np.sqrt(np.maximum(squares, 0) / (len(x) * B.shape[1]))
            rows.append({"layer": layer, "module": module} | dict(zip(PARTS, rms.tolist(), strict=True)))
    return pd.DataFrame(rows, columns=["layer", "module", *PARTS])


def keeping_exponent(
    led_B: Float[np.ndarray, " n"], led_A: Float[np.ndarray, " n"], whole: Float[np.ndarray, " n"]
) -> Float[np.ndarray, " n"]:
    r"""The exponent of the rate in gamma r that keeps the rms of the change: B's part grows as the rate, A's as its
    square.

    With the rate times y the mean square is :math:`y^2 (b^2 + 2 c y + a^2 y^2)`, :math:`c = (w^2 - a^2 - b^2) / 2`, and

    .. math:: \frac{d \log \eta}{d \log \gamma r} = -\left[ 1 + \frac{c + a^2}{w^2} \right]^{-1}

    -1 where B leads, -1/2 where A does; where the parts have one direction it is `theory.horizon.rate_exponents`.

    Args:
      led_B, led_A, whole: rms b, a and w of the parts and of their sum, w > 0.
    """
    b, a, w = (np.asarray(each, np.float64) for each in (led_B, led_A, whole))
    c = (w**2 - a**2 - b**2) / 2
    return -1 / (1 + (c + a**2) / w**2)


def keeping_factor(
    strength: float, led_B: Float[np.ndarray, " n"], led_A: Float[np.ndarray, " n"], whole: Float[np.ndarray, " n"]
) -> float:
    r"""The factor of the rate that keeps the rms of the change of all modules together where gamma r grows ``strength``
    times: y > 0 with

    .. math:: \mathrm{strength}^2\, y^2 \textstyle\sum (b^2 + 2 c y + a^2 y^2) = \sum w^2

    in the letters of `keeping_exponent`, which is its slope at a strength of 1; where the parts have one direction it
    is `theory.horizon.rate_factor`.

    Where the parts are nearly opposite (a correlation below -0.94) there is a range of rates over which the change
    shrinks as the rate grows, and several y may solve this; only one that no such range parts from 1 is meant.

    Args:
      strength: above 0.
      led_B, led_A, whole: of each module, see `led_parts`.

    Returns:
      y, or NaN where there is none.

    Raises:
      InputError: a strength of 0 or below, or no change.
    """
    b, a, w = (float(np.sum(np.asarray(each, np.float64) ** 2)) for each in (led_B, led_A, whole))
    if not (strength > 0 and w > 0):
        raise InputError(f"strength is {strength!r} and the change {math.sqrt(w)!r}; accepted are numbers above 0")

    between = max(w - a - b, -2 * math.sqrt(a * b))  # 2 c: rounded parts may break what Cauchy and Schwarz allow

    def excess(y: float) -> float:
        square = strength**2 * y**2 * (b + between * y + a * y**2) / w
        return math.log(max(square, sys.float_info.min))

    low, high = 1e-9 / strength, math.inf
    turns = 9 * between**2 - 32 * a * b
    if between < 0 <= turns:  # it grows to the first turn and from the second on
        shift = math.sqrt(turns) - 3 * between
        first, second = 4 * b / shift, shift / (8 * a)
        if first <= 1 <= second:
            return math.nan
        low, high = (low, first) if first > 1 else (second, high)
    if high == math.inf:
        high = max(low, 1.0)
        while excess(high) < 0:
            high *= 2
    if excess(low) > 0 or excess(high) < 0:
        return math.nan
    return float(scipy.optimize.brentq(excess, low, high, xtol=1e-12, rtol=1e-10))
