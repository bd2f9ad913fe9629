"""What a sweep varies: methods by name, and the designs of this project's and the paper's experiments."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from rora_theory.errors import InputError
from rora_theory.evaluate.scoring import Protocol
from rora_theory.finetune.config import LEARNING_RATES, BaseDtype
from rora_theory.random.seeds import check_seed
from rora_theory.scaling import check_positive
from rora_theory.validation.rules import check_list, check_ranks

BASE = "base"
"""The model without an adapter: one cell, neither trained nor repeated."""


@dataclass(frozen=True)
class Method:
    """A row of the paper's tables: its printed name, and what it sets in a fine-tuning run."""

    name: str
    settings: Mapping[str, Any]

    @property
    def ranked(self) -> bool:
        """Whether it has a rank, alpha and a scaling; the others are run once a seed, at their published size."""
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
"""Methods by name. A new kind of adapter is one more line here."""

AlphaRule = Literal["fixed", "2r"]


@dataclass(frozen=True)
class Design:
    """What varies, where nothing else is asked for.

    Attributes:
      models: by hub id or built-in name.
      methods, ranks, seeds: every combination of these is a cell.
      alpha_rule: ``fixed``: the same alpha at every rank; ``2r``: twice the rank, which makes alpha/r constant.
      lrs: learning rates; None is each method's published one, or under ``tuned`` its grid, `RATE_GRIDS`.
      tuned: choose among the rates at the first seed by validation loss, a method and rank at a time, and run the
        other seeds at the chosen rate.
      protocol: of scoring.
      dtype: of the frozen base weights.

    Raises:
      InputError: no model, method or seed, one of them, a rank or a rate twice, or one that there is not.
    """

    models: tuple[str, ...] = ("smollm2-135m",)
    methods: tuple[str, ...] = (BASE, "lora", "dora", "rora")
    ranks: tuple[int, ...] = (4, 8, 16, 32, 64, 128)
    alpha_rule: AlphaRule = "fixed"
    lrs: tuple[float, ...] | None = None
    seeds: tuple[int, ...] = (0, 1)
    tuned: bool = False
    protocol: Protocol = "label"
    dtype: BaseDtype = "float32"

    def __post_init__(self) -> None:
        for name, values in (("model", self.models), ("methods", self.methods), ("seeds", self.seeds)):
            if not values or len(set(values)) < len(values):
                raise InputError(f"{name} is {' '.join(map(str, values))!r}; accepted are one or more, each once")
        for method in self.methods:
            if method not in (BASE, *METHODS):
                raise InputError(f"method is {method!r}; accepted are {', '.join((BASE, *METHODS))}")
        for seed in self.seeds:
            check_seed(seed, "seeds")
        check_ranks(self.ranks, fewest=1)
        if self.lrs is not None:
            check_list("--lrs", self.lrs)
            for rate in self.lrs:
                check_positive("--lrs", rate)


RATE_GRID = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
RATE_GRIDS = {"prefix": (3e-3, 1e-2, 3e-2, 1e-1, 3e-1), "full": (3e-6, 1e-5, 3e-5, 1e-4, 3e-4)}
"""Learning rates of a tuned design, around the published one; `RATE_GRID` for a method that is not named."""

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
}
"""The last four are the paper's. One budget for every method: what the published prefix runs have otherwise (batch 8, 5
epochs), and their choice of the step of lowest validation loss, is not repeated; the last step counts."""


def rates_of(method: str, model: str, *, tuned: bool) -> tuple[float, ...]:
    """The learning rates of a method where none are given: its published one, or its grid."""
    kind = METHODS[method].settings["method"]
    if tuned:
        return RATE_GRIDS.get(kind, RATE_GRID)
    return (1e-4,) if kind == "dora" and "Llama-3" in model else (LEARNING_RATES[kind],)  # as DoRA's scripts
