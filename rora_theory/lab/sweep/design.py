"""Methods of a sweep by name, and the designs of this project's and the paper's experiments."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any, Literal

import yaml

from rora_theory.errors import InputError
from rora_theory.lab.evaluate.scoring import Protocol
from rora_theory.lab.finetune.config import LEARNING_RATES, BaseDtype
from rora_theory.laws.random.seeds import check_seed
from rora_theory.scaling import check_choice, check_integer, check_positive, exponent
from rora_theory.validation.rules import check_list, check_steps

AXES = ("schedule", "batch_size", "warmup", "weight_decay", "lr_multiplier_A", "quantization", "clip")
"""Settings of the training runs that may be further axes of a matrix."""

BASE = "base"
"""Name of the model without an adapter, which is one cell without training or seeds."""


@dataclass(frozen=True)
class Method:
    """Fine-tuning method, a row of the paper's tables.

    Attributes:
      name: Name as printed.
      settings: Settings of the fine-tuning run.
    """

    name: str
    settings: Mapping[str, Any]

    @property
    def has_rank(self) -> bool:
        """Whether the method has a rank, alpha and scaling; other methods run once per seed at their published size."""
        return self.settings["method"] in ("lora", "dora")


METHODS = {
    "prefix": Method("Prefix", {"method": "prefix"}),
    "series": Method("Series", {"method": "series"}),
    "parallel": Method("Parallel", {"method": "parallel"}),
    "full": Method("Full fine-tuning", {"method": "full"}),
    "lora": Method("LoRA", {"method": "lora", "rule": "lora"}),
    "dora": Method("DoRA", {"method": "dora", "rule": "lora"}),
    "rora": Method("RoRA", {"method": "lora", "rule": "rora"}),
    "quarter": Method("LoRA, alpha/r^(1/4)", {"method": "lora", "rule": 0.25}),
    "dora-rora": Method("DoRA with RoRA's scaling", {"method": "dora", "rule": "rora"}),
}
"""Methods by name. A new kind of adapter needs one more entry here."""

AlphaRule = Literal["fixed", "2r"]
"""Rule for alpha: the same at every rank, or twice the rank, which makes alpha / r constant."""


@dataclass(frozen=True)
class Design:
    """Settings that vary between the cells of a sweep.

    Attributes:
      models: Models by hub id or built-in name.
      methods: Names of methods. Every combination of method, rank and seed is a cell.
      ranks: Ranks of the adapters.
      alpha_rule: Rule for alpha.
      gains: Values of G = gamma r, in place of alpha; methods with a rank must then scale by alpha / r.
      lrs: Learning rates; None is the published rate of each method, or its grid `RATE_GRIDS` if ``tuned``.
      full_lrs: Learning rates of full fine-tuning, which is added to the methods if there are any.
      seeds: Seeds of the runs.
      read_at: Numbers of steps after which the held-out records are evaluated; empty is the end of the run. A run at a
        constant rate has all of them, under another schedule each is the end of a run of its own.
      axes: Further axes, each as NAME=VALUE,VALUE with a name from `AXES`.
      tuned: Whether to choose the rate of each method and rank at the first seed by validation loss, and to run the
        other seeds at the chosen rate.
      protocol: Protocol of the scoring.
      dtype: Type of the frozen base weights.

    Raises:
      InputError: If models, methods or seeds are empty, a value repeats, or a value is unknown.
    """

    models: tuple[str, ...] = ("smollm2-135m",)
    methods: tuple[str, ...] = (BASE, "lora", "dora", "rora")
    ranks: tuple[int, ...] = (4, 8, 16, 32, 64, 128)
    alpha_rule: AlphaRule = "fixed"
    gains: tuple[float, ...] = ()
    lrs: tuple[float, ...] | None = None
    full_lrs: tuple[float, ...] = ()
    seeds: tuple[int, ...] = (0, 1)
    read_at: tuple[int, ...] = ()
    axes: tuple[str, ...] = ()
    tuned: bool = False
    protocol: Protocol = "label"
    dtype: BaseDtype = "float32"

    def __post_init__(self) -> None:
        # Lists of distinct values.
        check_list("model", self.models)
        check_list("methods", self.methods, partial(check_choice, choices=(BASE, *METHODS)))
        check_list("seeds", self.seeds, check_seed)
        check_list("ranks", self.ranks, check_integer)
        if self.lrs is not None:
            check_list("lrs", self.lrs, check_positive)
        check_list("gains", self.gains, check_positive, fewest=0)
        check_list("full_lrs", self.full_lrs, check_positive, fewest=0)
        if self.read_at:
            check_steps(self.read_at, "read_at")
        for method in (METHODS[name] for name in self.methods if self.gains and name != BASE):
            if method.has_rank and exponent(method.settings["rule"]) != 1:
                raise InputError(f"gains requires methods that scale by alpha / r, got {method.name}")
        self.variants()

    def alphas(self, rank: int, alpha: float) -> tuple[float, ...]:
        """Return the values of alpha at a rank: the gains, twice the rank, or the shared alpha."""
        return self.gains or ((2.0 * rank,) if self.alpha_rule == "2r" else (alpha,))

    def rates(self, method: str, model: str) -> tuple[float, ...]:
        """Return the learning rates of a method."""
        if method == "full" and self.full_lrs:
            return self.full_lrs
        return self.lrs or rates_of(method, model, tuned=self.tuned)

    def variants(self) -> list[dict[str, Any]]:
        """Return the combinations of the further axes, each as settings by name.

        Raises:
          InputError: If an axis is unknown or has no values.
        """
        values: dict[str, list[Any]] = {}
        for axis in self.axes:
            name, _, words = axis.partition("=")
            check_choice("axes", name, AXES)
            values[name] = [yaml.safe_load(word) for word in words.split(",")]
            if not words or len(set(map(str, values[name]))) < len(values[name]):
                raise InputError(f"axes must have the form NAME=VALUE,VALUE with different values, got {axis!r}")
        return [dict(zip(values, combination, strict=True)) for combination in product(*values.values())]


RATE_GRID = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
RATE_GRIDS = {"prefix": (3e-3, 1e-2, 3e-2, 1e-1, 3e-1), "full": (3e-6, 1e-5, 3e-5, 1e-4, 3e-4)}
"""Learning rates of a tuned design around the published rate; `RATE_GRID` for methods without an entry."""

_PAPER = Design(("yahma/llama-7b-hf",), seeds=(42,), protocol="generate", dtype="bfloat16")
DESIGNS = {
    "grid": Design(),
    "fixed_alpha": Design(),
    "alpha_2r": Design(alpha_rule="2r"),
    "tuned_rate": Design(seeds=(0, 1, 2), tuned=True),
    "fig1": replace(_PAPER, ranks=(4, 8, 16, 32, 64, 128, 256)),
    "fig3": replace(_PAPER, methods=("lora", "dora", "rora"), ranks=(128,)),
    "table1": replace(
        _PAPER,
        models=("yahma/llama-7b-hf", "yahma/llama-13b-hf", "meta-llama/Llama-2-7b-hf", "meta-llama/Meta-Llama-3-8B"),
        methods=(BASE, "prefix", "series", "parallel", "lora", "dora", "rora"),
        ranks=(32, 128),  # the paper's RoRA rows are at 128, the others at 32
    ),
    "table2": replace(_PAPER, models=("princeton-nlp/Sheared-LLaMA-1.3B",), ranks=(8, 16, 32, 64, 128)),
    "horizon": Design(
        methods=("lora",), ranks=(8, 128), gains=(64.0, 724.0), lrs=(3e-4, 1e-3, 3e-3), seeds=(0,),
        read_at=(16, 64, 256),
    ),
}  # fmt: skip
"""Designs by name; fig1, fig3, table1 and table2 are the paper's.

All methods have the same budget and are evaluated after the last step. The published prefix runs differ (batch size 8,
5 epochs, and the step of lowest validation loss).
"""


def rates_of(method: str, model: str, *, tuned: bool) -> tuple[float, ...]:
    """Return the default learning rates of a method: the published rate, or its grid if rates are tuned."""
    kind = METHODS[method].settings["method"]
    if tuned:
        return RATE_GRIDS.get(kind, RATE_GRID)
    # DoRA's scripts use a lower rate for Llama 3.
    return (1e-4,) if kind == "dora" and "Llama-3" in model else (LEARNING_RATES[kind],)
