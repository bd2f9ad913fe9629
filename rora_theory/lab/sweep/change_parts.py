r"""B part and A part of a trained adapter's change, and the displacement constant from their ratio.

With :math:`A_0` for A before training, the change of a module's output at input x' is the sum of two parts:

.. math:: w = \gamma B A x' = \underbrace{\gamma B A_0 x'}_{\text{B part}}
          + \underbrace{\gamma B (A - A_0) x'}_{\text{A part}}

At a constant gradient (`rora_theory.laws.constant_gradient`) the first part is proportional to the learning rate and
the second to its square.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pandas as pd
from jaxtyping import Float

from rora_theory.errors import InputError
from rora_theory.lab import llama
from rora_theory.lab.adapters import LoraAdapter
from rora_theory.lab.data.batches import Examples
from rora_theory.lab.llama import LlamaConfig
from rora_theory.lab.llama.shared_prompt import common_length
from rora_theory.lab.sweep.runs import SweepRun
from rora_theory.measure.tokens import mark_sinks
from rora_theory.runs import frames

PARTS = ("B_part", "A_part", "whole")
"""Columns of `compute_part_rms` with the rms of the B part, the A part and their sum."""

QUANTILES = (0.05, 0.5, 0.95)
"""Quantiles over a model's modules of quantities such as the crossing distance."""

GRID_STEP = 1 / 4
"""Distance between adjacent learning rates of the grid, in decades."""


def module_inputs(
    params: Any, config: LlamaConfig, examples: Examples, adapter: LoraAdapter, *, records: int = 8
) -> dict[str, Float[np.ndarray, "layers tokens p_in"]]:
    """Return the base model's inputs to an adapter's modules at the tokens of the first records.

    Tokens of the beginning that all these records share are left out.

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


def part_table(runs: Sequence[SweepRun]) -> pd.DataFrame:
    """Tabulate the ratio of the A part to the B part of the change at every reading where they were measured.

    Returns:
      A row for each reading after which a B has moved: ``rank``, ``gain``, ``learning_rate``, ``seed`` and ``step``,
      and the median and the quantiles 5% and 95% over modules of ``ratio``, the rms of the A part over that of the B
      part.
    """
    rows: list[dict[str, Any]] = []
    for run in runs:
        for reading in run.read.readings:
            if reading.parts is None:
                continue
            b, a = (np.asarray(reading.parts[name]) for name in PARTS[:2])
            # A module whose B has not moved has no ratio.
            moved = b > 0
            if moved.any():
                low, middle, high = np.quantile(a[moved] / b[moved], QUANTILES).tolist()
                row = {"rank": run.rank, "gain": run.gain, "learning_rate": run.rate, "seed": run.seed}
                rows.append(row | {"step": reading.step, "ratio": middle, "ratio_low": low, "ratio_high": high})
    return pd.DataFrame(rows)


def constants_by_steps(parts: pd.DataFrame, best: pd.DataFrame) -> pd.DataFrame:
    """Compute the displacement constant K of every condition from runs at or below its best rate.

    Args:
      parts: `part_table`.
      best: `curves.best_rate_table` of every step.

    Returns:
      A row for each ``step``, ``rank`` and ``gain``: ``constant``, the mean of K over runs, its smallest
      and largest value ``constant_low`` and ``constant_high``, and ``runs``, how many there are. A run belongs to it if
      its learning rate is at most half a grid step of a quarter decade above the best rate.
    """
    rows: list[dict[str, Any]] = []
    optima = {
        (row["step"], row["rank"], round(row["gain"], 6)): row["best_rate"]
        for row in frames.rows(best[best["rank"].notna()])
    }
    for (step, rank, gain), runs in parts.groupby(["step", "rank", "gain"]) if len(parts) else ():
        # Runs up to the best rate, with half a grid step of slack because it lies between the rates of the grid.
        optimum = optima.get((step, rank, round(gain, 6)))
        near_best = runs[runs["learning_rate"] <= (optimum or 0.0) * 10 ** (GRID_STEP / 2)]
        if len(near_best):
            # K = G rho (1 + rho), with the measured ratio rho of the A part to the B part.
            values = gain * near_best["ratio"] * (1 + near_best["ratio"])
            rows.append(
                {"step": int(step), "rank": int(rank), "gain": float(gain)}
                | {"constant": float(values.mean())}
                | {"constant_low": float(values.min()), "constant_high": float(values.max()), "runs": len(near_best)}
            )
    columns = ["step", "rank", "gain", "constant", "constant_low", "constant_high", "runs"]
    return frames.from_rows(rows, columns)
