r"""Which regime a module is in, by rank, optimizer and init, and whether adapters really stepped agree with the law.

From one layer's gradient and inputs (`layer_data.Layer`): signal, cross-talk and crossing rank r*, the predicted root
mean square of the first change, that of adapters really drawn and stepped, and the distance at which A takes over
under Adam. `rora_theory.measure.regime` goes through a model with it.

Results are tidy: a row one measured thing, floats with every digit.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float

from rora_theory import inits
from rora_theory.errors import InputError
from rora_theory.inits import INITS, Init
from rora_theory.io import frames
from rora_theory.measure.layers.layer_data import SPLITS, Layer, Split
from rora_theory.measure.regimes import terms
from rora_theory.measure.regimes.tables import (
    CROSSING_COLUMNS,
    CROSSINGS,
    RESULT_COLUMNS,
    TAKEOVER,
    TAKEOVER_COLUMNS,
    TOKEN_COLUMNS,
    TOKENS,
)
from rora_theory.optimizers import EPSILON, WORDS
from rora_theory.random.seeds import check_seed
from rora_theory.scaling import Rule, exponent, scaling_factor
from rora_theory.theory import horizon
from rora_theory.theory.laws import OPTIMIZERS, Optimizer
from rora_theory.validation.ranges import Count, Natural, Positive, check_ranges
from rora_theory.validation.rules import check_ranks, check_rules, name_of

TAKEOVER_RANKS = (8, 32, 128)
"""Ranks whose takeover distance is told."""

TAKEOVER_ROWS = 256
"""Rows of A that a takeover distance rests on."""

TURNS = tuple(round(100 * share) for share in horizon.TURNS)
"""Per cent of the entries of G A^T that have turned their sign at the distances ``turn_5`` to ``turn_95``."""

ERRORS = {
    "signal": 1e-5,
    "cross_talk": 1e-5,
    "crossing_rank": 1e-5,
    "linear_term": 1e-3,
    "takeover": 1e-4,
}
"""Largest relative difference of each figure from the exact one, without `RegimeConfig.exact`. The figures' own errors,
from the tokens and the rows of A that are read, are far larger."""

BLOCK_ROWS = 256
"""Rows of A in one block."""

MOST_ROWS = 10**8
"""Most rows of A for each module and init."""


@dataclass(frozen=True)
class RegimeConfig:
    """What to measure of every module, and how finely.

    Raises:
      InputError: a value out of range.
    """

    ranks: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    """ranks to predict and to step"""
    rules: tuple[Rule, ...] = ("lora", "rora", 0.25)
    """scaling rules to predict; adapters are stepped under the first, whose gamma is a factor of what is measured"""
    optimizers: tuple[Optimizer, ...] = OPTIMIZERS
    """sgd, adam"""
    inits: tuple[Init, ...] = ("kaiming_uniform", "gaussian")
    """laws of lora_A: PEFT's default and its gaussian (deviation 1/r); also normal, rademacher"""
    alpha: float = 16.0
    """alpha of every rule"""
    lr: Positive = 3e-4
    """learning rate of the step; the change is proportional to it"""
    rows: Natural = 4096
    """rows of lora_A drawn for each module and init, dealt out as rows / r adapters at every rank; 0 steps none"""
    tokens: Count = 64
    """tokens of each split at which modules are read, drawn among all of it that the mask leaves"""
    mask: bool = True
    """leave out held-out tokens that share their whole beginning with the training batch (template, first tokens), and
    attention sinks: an input whose norm is above 10 times the median of the module's held-out inputs"""
    seed: int = 0
    """of the records, the tokens and the adapters"""
    exact: bool = False
    """compute in float64 with exact integrals, and add predicted sizes of steps and the distances at which signs turn;
    implied where adapters are stepped"""

    def __post_init__(self) -> None:
        check_ranks(self.ranks, fewest=1)
        check_rules(self.rules)
        for name, known in (("optimizers", OPTIMIZERS), ("inits", INITS)):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise InputError(f"{name} is {' '.join(map(str, values))!r}; accepted are one or more, each once")
            wrong = [value for value in values if value not in known]
            if wrong:
                raise InputError(f"{name} has {wrong[0]!r}; accepted are {', '.join(known)}")
        for rule in self.rules:
            scaling_factor(rule, alpha=self.alpha, rank=max(self.ranks))
        check_ranges(self, str)
        if self.rows > MOST_ROWS:
            raise InputError(
                f"--rows is {self.rows}; accepted are at most {MOST_ROWS:,}: at rank 1 the rms is then known to 0.01% "
                "of itself, and more would take days a module"
            )
        check_seed(self.seed)
        least = 4 * max(self.ranks)
        if self.rows and self.rows < least:
            raise InputError(f"rows is {self.rows}; accepted are 0, or {least} or more: 4 adapters of the largest rank")

    @property
    def is_exact(self) -> bool:
        """Whether figures are exact: asked for, or needed to judge adapters that are stepped."""
        return self.exact or self.rows > 0

    @property
    def blocks(self) -> tuple[int, int]:
        """Rows of A in a block (room for the largest rank), and the number of blocks."""
        size = max(BLOCK_ROWS, max(self.ranks))
        return size, -(-self.rows // size)

    def scalings(self, rule: Rule) -> list[float]:
        """Gamma of every rank."""
        return [scaling_factor(rule, alpha=self.alpha, rank=rank) for rank in self.ranks]


class ModuleRegime(NamedTuple):
    """One module's figures, as rows of tables.

    Attributes:
      crossings: a row a split, optimizer and init: signal, cross-talk, r* with its quartiles, the linear term.
      results: a row a split, optimizer, init, rule and rank: predicted and, under the first rule, measured rms; none
        unless exact.
      takeover: a row a split, init and rank: the distance at which A leads under Adam.
    """

    crossings: list[dict[str, Any]]
    results: list[dict[str, Any]]
    takeover: list[dict[str, Any]]


class LayerRegime(NamedTuple):
    """Rows of `Regime`'s tables, of the modules of a layer."""

    crossings: list[dict[str, Any]]
    results: list[dict[str, Any]]
    takeover: list[dict[str, Any]]
    tokens: list[dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Regime:
    """What was found of a model, as tidy frames: columns as in `regime_tables`.

    Attributes:
      crossings: signal, cross-talk, r* and its quartiles over tokens, by module, split, optimizer and init.
      results: predicted and measured rms of the first change, by those and rule and rank.
      takeover: the distance at which A leads under Adam, by module, split, init and rank.
      tokens: by module and split how many tokens there are, were ``seen``, are ``sinks`` besides, and were ``read``.
      training_loss, held_out_loss: of the base model, nats a token.
    """

    crossings: pd.DataFrame
    results: pd.DataFrame
    takeover: pd.DataFrame
    tokens: pd.DataFrame
    training_loss: float
    held_out_loss: float

    @classmethod
    def of(cls, parts: Iterable[LayerRegime], training_loss: float, held_out_loss: float) -> "Regime":
        """The frames of some layers' rows."""
        columns = (CROSSING_COLUMNS, RESULT_COLUMNS, TAKEOVER_COLUMNS, TOKEN_COLUMNS)
        found = [[row for part in table for row in part] for table in zip(*parts, strict=True)]
        crossings, results, takeover, tokens = map(frames.of, found, columns)
        return cls(crossings, results, takeover, tokens, training_loss, held_out_loss)

    def sentence(self, optimizer: Optimizer = "adam", init: Init = "kaiming_uniform", split: Split = "heldout") -> str:
        """Return a sentence with the rank above which the signal leads in each module's own first step.

        Raises:
          InputError: nothing was measured of them.
        """
        rows = self.crossings_of(optimizer, init, split)
        pooled, token = rows["crossing_rank"].astype(float), rows["median"].astype(float).median()
        read = {"train": "tokens that were trained on", "heldout": "held-out tokens"}[split]
        return (
            f"In a module's own first step the signal leads above rank {pooled.median():.3g} ({WORDS[optimizer]}, "
            f"{init}, {read}): the median of {len(rows)} modules' crossing ranks, which go from {pooled.min():.3g} to "
            f"{pooled.max():.3g}; a typical token's is {token:.3g}. In the step of the whole model cross-talk averages "
            "out over modules, which a coordinate check tests."
        )

    def crossings_of(self, optimizer: Optimizer, init: Init, split: Split) -> pd.DataFrame:
        """The rows of `crossings` of one optimizer, law of A and split.

        Raises:
          InputError: nothing was measured of them.
        """
        wanted = {"optimizer": optimizer, "init": init, "split": split}
        rows = frames.where(self.crossings, wanted)
        if rows.empty:
            said = ", ".join(f"{name} {value}" for name, value in wanted.items())
            raise InputError(f"nothing was measured of {said}; accepted is what the RegimeConfig named")
        return rows

    @property
    def errors(self) -> dict[str, float]:
        """Largest relative difference of each figure from the exact one; empty where the figures are exact."""
        return ERRORS if self.results.empty else {}

    def files(self) -> dict[str, pd.DataFrame]:
        """The frames by the names of a run's files."""
        return {CROSSINGS: self.crossings, "results.csv": self.results, TAKEOVER: self.takeover, TOKENS: self.tokens}


def measure_module(
    config: RegimeConfig,
    layer: Layer,
    index: int,
    lora_A: Callable[[Init], Float[np.ndarray, "rows p_in"]],
    measured: Mapping[tuple, dict[str, Any]] | None = None,
) -> ModuleRegime:
    """Crossing ranks, predictions, stepped adapters and takeover distances of one module of layer ``index``.

    Args:
      config: what to measure.
      layer: the module's gradient and inputs.
      index: of its layer.
      lora_A: `TAKEOVER_ROWS` rows of A, drawn by a law at that rank, on which the takeover distances rest.
      measured: of `drawn_steps.measured`, where adapters were stepped.
    """
    x = np.concatenate([layer.inputs[split] for split in SPLITS])
    crossings: list[dict[str, Any]] = []
    predicted: dict[tuple, float] = {}
    fast = None if config.is_exact else terms.FastTerms(layer.grad, x)
    for init in config.inits:
        for optimizer in config.optimizers:
            if fast is not None:
                law = fast.terms(optimizer, init)
            else:
                law = terms.terms(layer.grad, x, optimizer=optimizer, init=init)
                predicted |= predict(config, layer, law)
            crossings += [_crossing(law, layer, index, split) for split in SPLITS]
    measured = measured or {}
    results = []
    for row in _cells(config, index, layer.name) if config.is_exact else ():
        key = tuple(row[name] for name in ("init", "optimizer", "rule", "rank", "split"))
        results.append(row | {"predicted": predicted[key]} | measured.get(key, {}))
    led = takeover(config, layer, index, lora_A) if "adam" in config.optimizers else []
    return ModuleRegime(crossings, results, led)


def _cells(config: RegimeConfig, index: int, module: str) -> Iterator[dict[str, Any]]:
    """A module's rows without figures."""
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


def _places(layer: Layer) -> dict[str, slice]:
    """Where each split's tokens are in all of them."""
    edges = np.cumsum([0, *(len(layer.inputs[split]) for split in SPLITS)]).tolist()
    return {split: slice(*pair) for split, pair in zip(SPLITS, itertools.pairwise(edges), strict=True)}


def _crossing(law: terms.Terms, layer: Layer, index: int, split: str) -> dict[str, Any]:
    found = law.crossing(_places(layer)[split])
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
        "signal": found.signal,
        "cross_talk": found.cross_talk,
        "crossing_rank": found.rank,
        "lower_quartile": found.quartiles[0],
        "median": found.quartiles[1],
        "upper_quartile": found.quartiles[2],
        "linear_term": found.linear_term,
    }


def predict(config: RegimeConfig, layer: Layer, law: terms.Terms) -> dict[tuple, float]:
    """The law's rms by init, optimizer, rule, rank and split.

    Under the first rule, which is stepped, with Adam's epsilon; under the others in the sign limit, where the rms of
    another gamma is a power of it away.
    """
    found = {}
    for position, rule in enumerate(config.rules):
        exact = law.rms(
            config.ranks,
            config.scalings(rule),
            learning_rate=config.lr,
            epsilon=EPSILON if position == 0 else 0.0,
        )
        for rank, row in zip(config.ranks, exact, strict=True):
            for split, place in _places(layer).items():
                found[law.init, law.optimizer, name_of(rule), rank, split] = math.sqrt(float(np.mean(row[place] ** 2)))
    return found


def takeover(
    config: RegimeConfig, layer: Layer, index: int, lora_A: Callable[[Init], Float[np.ndarray, "rows p_in"]]
) -> list[dict[str, Any]]:
    """The distance that A's entries move under Adam until A leads, of `horizon.row_terms`, by split, init and rank.

    Over the learning rate it is t_A, a number of steps. ``turn_5`` to ``turn_95`` are the distances at which so many
    per cent of the entries of G A^T have turned their sign: far beyond the first the law is only approximate. They are
    left out unless exact.
    """
    found = []
    for init in config.inits:
        shared = horizon.row_signs(layer.grad, lora_A(init), exact=config.is_exact)
        drawn = inits.entries(init, rank=TAKEOVER_ROWS, p_in=_p_in(layer)).deviation
        for split in SPLITS:
            rows = shared.terms(layer.inputs[split])
            turns = dict(zip(TURNS, rows.turn, strict=True)) if config.is_exact else {}
            for rank in TAKEOVER_RANKS:
                # Signs don't know A's deviation: where it depends on the rank, every distance is proportional to it.
                relative = inits.entries(init, rank=rank, p_in=_p_in(layer)).deviation / drawn
                found.append(
                    {
                        "layer": index,
                        "module": layer.name,
                        "split": split,
                        "init": init,
                        "rank": rank,
                        "takeover": relative * rows.takeover(rank),
                        **{f"turn_{n}": relative * turn for n, turn in turns.items()},
                    }
                )
    return found


def _p_in(layer: Layer) -> int:
    return int(layer.grad.shape[1])
