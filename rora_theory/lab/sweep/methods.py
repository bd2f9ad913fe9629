"""Fine-tuning methods by name."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rora_theory.errors import InputError
from rora_theory.lab.finetune.config import LEARNING_RATES
from rora_theory.scaling import KAPPAS, Rule

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

    @property
    def rule(self) -> Rule:
        """Scaling rule of a method with a rank."""
        rule: Rule = self.settings["rule"]
        return rule


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


SCALINGS = (*(name for name, method in METHODS.items() if method.settings["method"] == "lora"), "rslora")
"""Names of LoRA with different scalings. An exponent kappa is one as well."""


def find_method(name: str) -> Method:
    """Return a method by its name; a number kappa is LoRA scaled by alpha / r^kappa.

    Raises:
      InputError: The name is unknown.
    """
    if name in METHODS:
        return METHODS[name]
    check_scaling(name)
    return Method(f"LoRA, {name}", {"method": "lora", "rule": name if name in KAPPAS else float(name)})


def check_scaling(name: str) -> None:
    """Raise `InputError` unless a method is LoRA: one of `SCALINGS`, or a finite exponent kappa."""
    if name not in SCALINGS:
        try:
            kappa = float(name)
        except ValueError:
            kappa = math.nan
        if not math.isfinite(kappa):
            raise InputError(f"methods must be {', '.join(SCALINGS)} or a finite exponent kappa, got {name}")


def published_rate(method: str, model: str) -> float:
    """Return the learning rate with which a method was published."""
    kind = find_method(method).settings["method"]
    # DoRA's scripts use a lower rate for Llama 3.
    return 1e-4 if kind == "dora" and "Llama-3" in model else LEARNING_RATES[kind]
