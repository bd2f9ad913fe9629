r"""Regime of one module by rank, optimizer and initialisation: settings, computation and tables.

From a module's gradient and inputs (`layer.Layer`) it computes signal, cross-talk and crossing rank r*, the
predicted root mean square of the first change, and the distance at which A takes over under Adam. Adapters that are
drawn and stepped test the prediction. `rora_theory.measure.regime` applies this to every module of a model.

Results are tidy: a row for each figure, floats with all digits.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float

from rora_theory import inits, plots
from rora_theory.errors import InputError
from rora_theory.inits import INITS, Init
from rora_theory.laws import constant_gradient
from rora_theory.laws.random.seeds import check_seed
from rora_theory.measure.regimes import terms
from rora_theory.measure.regimes.layer import SPLITS, Layer, Split
from rora_theory.measure.regimes.tables import (
    CROSSING_COLUMNS,
    CROSSING_DISTANCE_COLUMNS,
    CROSSING_DISTANCES,
    CROSSINGS,
    RESULT_COLUMNS,
    TOKEN_COLUMNS,
    TOKENS,
)
from rora_theory.optimizers import DISPLAY_NAMES, EPSILON, OPTIMIZERS, Optimizer
from rora_theory.runs import frames
from rora_theory.scaling import Rule, check_choice, check_integer, exponent, scaling_factor
from rora_theory.validation.ranges import Count, Natural, Positive, check_ranges
from rora_theory.validation.rules import check_list, check_rules, name_of

if TYPE_CHECKING:
    import matplotlib.figure

DISTANCE_RANKS = (8, 32, 128)
"""Ranks at which the crossing distance is computed."""

DISTANCE_ROWS, FAST_DISTANCE_ROWS = 256, 64
"""Numbers of rows of A from which crossing distances are estimated, exactly and by default.

On layers of SmolLM2-135M their draw gives a crossing distance a relative standard error of 3% and 6%.
"""

SIGN_FLIP_PERCENTS = tuple(round(100 * share) for share in constant_gradient.SIGN_CHANGE_SHARES)
"""Percentages of the entries of G A^T that have changed sign at the distances ``turn_5`` to ``turn_95``."""

MAX_RELATIVE_ERRORS = {
    "signal": 1e-5,
    "cross_talk": 1e-5,
    "crossing_rank": 1e-5,
    "lower_quartile": 1e-5,
    "median": 1e-5,
    "upper_quartile": 1e-5,
    "linear_term": 1e-3,
    "crossing_distance": 1e-4,
}
"""Largest relative error of each figure without `RegimeConfig.exact`.

The sampling errors, from the tokens and the rows of A, are far larger; see `FAST_DISTANCE_ROWS`.
"""

BLOCK_ROWS = 256
"""Minimum number of rows of A in one block."""

MAX_ROWS = 10**8
"""Maximum number of rows of A sampled per module and initialisation."""


@dataclass(frozen=True)
class RegimeConfig:
    """Settings of the measurement of a module.

    Raises:
      InputError: If a value is out of range.
    """

    ranks: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    """Ranks to predict, and of the adapters to step"""
    rules: tuple[Rule, ...] = ("lora", "rora", 0.25)
    """Scaling rules to predict; adapters are stepped under the first only, since gamma is a factor of the result"""
    optimizers: tuple[Optimizer, ...] = OPTIMIZERS
    """Optimizers: sgd, adam"""
    inits: tuple[Init, ...] = ("kaiming_uniform", "gaussian")
    """Initialisations of lora_A: kaiming_uniform (PEFT's default), gaussian (PEFT's, with standard deviation 1/r),
    normal or rademacher"""
    alpha: float = 16.0
    """Alpha under every rule"""
    lr: Positive = 3e-4
    """Learning rate of the step; the change is proportional to it"""
    rows: Natural = 4096
    """Number of rows of lora_A to draw per module and initialisation, which make rows / r adapters of each rank r; 0
    steps no adapters"""
    tokens: Count = 64
    """Number of tokens of each split at which to sample the inputs of a module, after masking"""
    mask: bool = True
    """Leave out held-out tokens that repeat the beginning of a training record (template, first tokens), and attention
    sinks, which are inputs with a norm above 10 times the median of the module's held-out inputs"""
    seed: int = 0
    """Seed of the records, the tokens and the adapters"""
    exact: bool = False
    """Compute in float64 with exact integrals, and add the predicted sizes of steps and the distances at which signs
    change; implied if adapters are stepped"""

    def __post_init__(self) -> None:
        # Lists of distinct and known values.
        check_list("ranks", self.ranks, check_integer)
        check_rules(self.rules)
        for name, known in (("optimizers", OPTIMIZERS), ("inits", INITS)):
            check_list(name, getattr(self, name), partial(check_choice, choices=known))
        # Computing the scaling validates the rule together with alpha.
        for rule in self.rules:
            scaling_factor(rule, alpha=self.alpha, rank=max(self.ranks))
        check_ranges(self)
        if self.rows > MAX_ROWS:
            raise InputError(
                f"rows must be at most {MAX_ROWS:,}, got {self.rows}. That many rows already give the rms at rank 1 "
                "to 0.01%, and more would take days per module."
            )
        check_seed("seed", self.seed)
        # A standard error needs several adapters, also of the largest rank.
        min_rows = 4 * max(self.ranks)
        if self.rows and self.rows < min_rows:
            raise InputError(
                f"rows must be 0 or at least {min_rows} (four adapters of the largest rank), got {self.rows}"
            )

    @property
    def is_exact(self) -> bool:
        """Whether figures are exact, as requested or because adapters are stepped and compared with them."""
        return self.exact or self.rows > 0

    @property
    def distance_rows(self) -> int:
        """Number of rows of A from which crossing distances are estimated."""
        return DISTANCE_ROWS if self.is_exact else FAST_DISTANCE_ROWS

    @property
    def blocks(self) -> tuple[int, int]:
        """Number of rows of A in a block, at least the largest rank, and number of blocks."""
        size = max(BLOCK_ROWS, max(self.ranks))
        return size, -(-self.rows // size)

    def scalings(self, rule: Rule) -> list[float]:
        """Compute the scaling gamma of every rank under a rule."""
        return [scaling_factor(rule, alpha=self.alpha, rank=rank) for rank in self.ranks]


class RegimeRows(NamedTuple):
    """Figures of one or more modules as rows of tables, whose columns are those of `Regime`.

    Attributes:
      crossings: Signal, cross-talk, r* with its quartiles, and the linear term; a row for each module, split, optimizer
        and initialisation.
      results: Predicted and, under the first rule, measured rms of the change; a row for each module, split, optimizer,
        initialisation, rule and rank. Empty unless exact.
      crossing_distances: Crossing distance under Adam; a row for each module, split, initialisation and rank.
      tokens: Numbers of tokens; a row for each module and split.
    """

    crossings: list[dict[str, Any]]
    results: list[dict[str, Any]]
    crossing_distances: list[dict[str, Any]]
    tokens: list[dict[str, Any]]

    @classmethod
    def concatenate(cls, parts: Iterable["RegimeRows"]) -> "RegimeRows":
        """Concatenate each table of several modules or layers."""
        concatenated = cls([], [], [], [])
        for part in parts:
            for table, rows in zip(concatenated, part, strict=True):
                table.extend(rows)
        return concatenated


@dataclass(frozen=True, eq=False)
class Regime:
    """Measured regime of a model as tidy frames, with the columns of `rora_theory.measure.regimes.tables`.

    Attributes:
      crossings: Signal, cross-talk, r* with its quartiles over tokens, and the linear term, by module, split, optimizer
        and initialisation.
      results: Predicted and measured rms of the first change, by module, split, optimizer, initialisation, rule and
        rank.
      crossing_distances: Crossing distance under Adam by module, split, initialisation and rank.
      tokens: Numbers of tokens by module and split: ``all``, ``seen``, other ``sinks``, and ``read``.
      training_loss: Loss of the base model on the training batch, in nats per token.
      held_out_loss: Loss of the base model on the held-out batch, in nats per token.
    """

    crossings: pd.DataFrame
    results: pd.DataFrame
    crossing_distances: pd.DataFrame
    tokens: pd.DataFrame
    training_loss: float
    held_out_loss: float

    @classmethod
    def from_rows(cls, parts: Iterable[RegimeRows], training_loss: float, held_out_loss: float) -> "Regime":
        """Create a regime from the rows of modules or layers."""
        columns = (CROSSING_COLUMNS, RESULT_COLUMNS, CROSSING_DISTANCE_COLUMNS, TOKEN_COLUMNS)
        crossings, results, crossing_distances, tokens = map(frames.from_rows, RegimeRows.concatenate(parts), columns)
        return cls(crossings, results, crossing_distances, tokens, training_loss, held_out_loss)

    def sentence(self, optimizer: Optimizer = "adam", init: Init = "kaiming_uniform") -> str:
        """Return a sentence with the rank above which the signal term dominates, and the check to run next.

        The values of single modules and of a typical token are in `crossings`.

        Args:
          optimizer: Optimizer of the step.
          init: Initialisation of A.

        Raises:
          InputError: If nothing was measured for these arguments.
        """
        ranks = self.crossings_of(optimizer, init, "heldout")["crossing_rank"].astype(float)
        return (
            f"In the first step of a module, the signal term dominates above rank {ranks.median():.3g} "
            f"({DISPLAY_NAMES[optimizer]}, {init}, held-out tokens; median of {len(ranks)} modules, "
            f"range {ranks.min():.3g} to {ranks.max():.3g}). "
            "The whole model can differ: run a coordinate check."
        )

    def plot(self, split: Split = "heldout", init: Init | None = None) -> "matplotlib.figure.Figure":
        """Plot the crossing rank of every module over the layers, with a panel for each type of module.

        See `rora_theory.plots.plot_regime`. Save the figure with ``regime.plot().savefig("regime.png")``.

        Args:
          split: Split at which the change is measured.
          init: Initialisation of A; None is the first that was measured.

        Raises:
          InputError: If nothing was measured for these arguments.
        """
        init = self.crossings["init"].iloc[0] if init is None and len(self.crossings) else init
        rows = frames.where(self.crossings, {"init": init, "split": split})
        if rows.empty:
            raise InputError(f"nothing was measured for init {init} and split {split}. Add it to the RegimeConfig.")
        tokens = ", ".join(str(count) for count in sorted(set(rows["tokens"])))
        title = f"A {init}, {tokens} {plots.REGIME_SPLITS[split]} tokens a module"
        return plots.plot_regime(rows, f"{title}; line: $r^*$ of all of them together")

    def crossings_of(self, optimizer: Optimizer, init: Init, split: Split) -> pd.DataFrame:
        """Return the rows of `crossings` for one optimizer, initialisation and split.

        Raises:
          InputError: If there are none.
        """
        selection = {"optimizer": optimizer, "init": init, "split": split}
        rows = frames.where(self.crossings, selection)
        if rows.empty:
            described = ", ".join(f"{name} {value}" for name, value in selection.items())
            raise InputError(f"nothing was measured for {described}. Add it to the RegimeConfig.")
        return rows

    @property
    def errors(self) -> dict[str, float]:
        """Largest relative error of each figure; empty if the figures are exact."""
        return MAX_RELATIVE_ERRORS if self.results.empty else {}

    def files(self) -> dict[str, pd.DataFrame]:
        """Return the frames by the names of a run's files."""
        return {
            CROSSINGS: self.crossings,
            "results.csv": self.results,
            CROSSING_DISTANCES: self.crossing_distances,
            TOKENS: self.tokens,
        }


def measure_module(
    config: RegimeConfig,
    layer: Layer,
    index: int,
    draw_rows: Callable[[Init], Float[np.ndarray, "rows p_in"]],
    measured: Mapping[tuple, dict[str, Any]] | None = None,
    counts: Mapping[str, Mapping[str, int]] | None = None,
    multiply: constant_gradient.MatrixProduct = np.matmul,
) -> RegimeRows:
    """Compute crossing ranks, predictions and crossing distances of one module.

    Args:
      config: Settings of the measurement.
      layer: Gradient and inputs of the module.
      index: Index of the module's layer.
      draw_rows: Function that draws `RegimeConfig.distance_rows` rows of A by an initialisation at that rank.
      measured: Results of `drawn_steps.measure_adapters`; None if no adapters were drawn.
      counts: Numbers of tokens by split, see `choose_tokens`; None leaves out their rows.
      multiply: Product of two matrices.

    Returns:
      The rows of the module for every table.
    """
    # One set of products serves the tokens of both splits, which are separated afterwards.
    x, slices = _all_inputs(layer), _token_slices(layer)
    crossings: list[dict[str, Any]] = []
    predicted: dict[tuple, float] = {}
    # Terms of the law, from shared float32 products or exactly; they give the crossing rank of each split.
    fast = None if config.is_exact else terms.FastTerms(layer.grad, x, multiply)
    for init in config.inits:
        for optimizer in config.optimizers:
            if fast is not None:
                law = fast.terms(optimizer, init)
            else:
                law = terms.compute_terms(layer.grad, x, optimizer=optimizer, init=init)
                predicted |= predict_rms(config, layer, law)
            crossings += [_crossing_row(law, layer, index, split, tokens) for split, tokens in slices.items()]
    # Predicted rms, with the measured rms where adapters were stepped.
    measured = measured or {}
    results = []
    for row in _result_keys(config, index, layer.name) if config.is_exact else ():
        key = tuple(row[name] for name in ("init", "optimizer", "rule", "rank", "split"))
        results.append(row | {"predicted": predicted[key]} | measured.get(key, {}))
    # Crossing distances, which exist under Adam only.
    distance_rows = (
        measure_crossing_distances(config, layer, index, draw_rows, multiply) if "adam" in config.optimizers else []
    )
    label = {"layer": index, "module": layer.name}
    tokens = [label | {"split": split} | dict(numbers) for split, numbers in (counts or {}).items()]
    return RegimeRows(crossings, results, distance_rows, tokens)


def _result_keys(config: RegimeConfig, index: int, module: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a module's results without the figures."""
    for init in config.inits:
        for optimizer in config.optimizers:
            for rule in config.rules:
                for rank, scaling in zip(config.ranks, config.scalings(rule), strict=True):
                    for split in SPLITS:
                        yield {
                            "layer": index,
                            "module": module,
                            "split": split,
                            "optimizer": optimizer,
                            "init": init,
                            "rule": name_of(rule),
                            "kappa": exponent(rule),
                            "rank": rank,
                            "alpha": config.alpha,
                            "scaling": scaling,
                        }


def _all_inputs(layer: Layer) -> Float[np.ndarray, "tokens p_in"]:
    """Return the inputs of all splits, one after the other."""
    return np.concatenate([layer.inputs[split] for split in SPLITS])


def _token_slices(layer: Layer) -> dict[str, slice]:
    """Return the slice of each split's tokens in the concatenation of all splits."""
    edges = np.cumsum([0, *(len(layer.inputs[split]) for split in SPLITS)]).tolist()
    return {split: slice(*pair) for split, pair in zip(SPLITS, itertools.pairwise(edges), strict=True)}


def _crossing_row(law: terms.Terms, layer: Layer, index: int, split: str, tokens: slice) -> dict[str, Any]:
    crossing = law.crossing(tokens)
    p_out, p_in = layer.grad.shape
    return {
        "layer": index,
        "module": layer.name,
        "p_in": p_in,
        "p_out": p_out,
        "split": split,
        "tokens": len(layer.inputs[split]),
        "optimizer": law.optimizer,
        "init": law.init,
        "signal": crossing.signal,
        "cross_talk": crossing.cross_talk,
        "crossing_rank": crossing.rank,
        "lower_quartile": crossing.quartiles[0],
        "median": crossing.quartiles[1],
        "upper_quartile": crossing.quartiles[2],
        "linear_term": crossing.linear_term,
    }


def predict_rms(config: RegimeConfig, layer: Layer, law: terms.Terms) -> dict[tuple, float]:
    """Predict the rms of the first change by the law.

    Adam's epsilon is included under the first rule only, under which adapters are stepped. Without it the rms is a
    power of gamma, which saves an integral for each rank.

    Args:
      config: Settings of the measurement.
      layer: Gradient and inputs of the module.
      law: Terms of the module at the inputs of all splits.

    Returns:
      The rms by initialisation, optimizer, rule, rank and split.
    """
    predicted = {}
    for position, rule in enumerate(config.rules):
        # Root mean square at every rank and token, [ranks, tokens].
        rms = law.rms(
            config.ranks,
            config.scalings(rule),
            learning_rate=config.lr,
            epsilon=EPSILON if position == 0 else 0.0,
        )
        # Average the mean squares over the tokens of each split.
        for rank, by_token in zip(config.ranks, rms, strict=True):
            for split, tokens in _token_slices(layer).items():
                key = (law.init, law.optimizer, name_of(rule), rank, split)
                predicted[key] = math.sqrt(float(np.mean(by_token[tokens] ** 2)))
    return predicted


def measure_crossing_distances(
    config: RegimeConfig,
    layer: Layer,
    index: int,
    draw_rows: Callable[[Init], Float[np.ndarray, "rows p_in"]],
    multiply: constant_gradient.MatrixProduct = np.matmul,
) -> list[dict[str, Any]]:
    """Compute the distance that A's entries move under Adam until A's part of the change dominates.

    Divided by the learning rate, it is the number of steps t_A (see `constant_gradient.row_terms`). If exact, rows also
    have the distances ``turn_5`` to ``turn_95`` at which that percentage of the entries of G A^T has changed sign. The
    law is only approximate far beyond the first of them.

    Args:
      config: Settings of the measurement.
      layer: Gradient and inputs of the module.
      index: Index of the module's layer.
      draw_rows: Function that draws rows of A by an initialisation, see `measure_module`.
      multiply: Product of two matrices.

    Returns:
      A row for each split, initialisation and rank.
    """
    x, slices, p_in = _all_inputs(layer), _token_slices(layer), int(layer.grad.shape[1])
    results = []
    for init in config.inits:
        # Signs of G A^T, which all splits and ranks share, and products with the inputs, which all ranks share.
        lora_A = draw_rows(init)
        signs = constant_gradient.row_signs(layer.grad, lora_A, exact=config.is_exact, multiply=multiply)
        laws = signs.terms_by_part(x, list(slices.values()))
        # Signs do not depend on A's standard deviation, but every distance is proportional to it.
        deviation = inits.entries(init, rank=len(lora_A), p_in=p_in).deviation
        for split, law in zip(slices, laws, strict=True):
            for rank in DISTANCE_RANKS:
                relative_deviation = inits.entries(init, rank=rank, p_in=p_in).deviation / deviation
                row = {"layer": index, "module": layer.name, "split": split, "init": init, "rank": rank}
                row["crossing_distance"] = relative_deviation * law.crossing_distance(rank)
                if config.is_exact:
                    for percent, distance in zip(SIGN_FLIP_PERCENTS, law.sign_change_distances, strict=True):
                        row[f"turn_{percent}"] = relative_deviation * distance
                results.append(row)
    return results
