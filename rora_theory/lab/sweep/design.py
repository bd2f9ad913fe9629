"""Methods of a sweep by name, and the grid of what varies between its cells."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

from rora_theory.errors import InputError
from rora_theory.lab.finetune.config import LEARNING_RATES
from rora_theory.laws.random.seeds import check_seed
from rora_theory.runs.files import parse_yaml
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


@dataclass(frozen=True)
class SweepGrid:
    """Settings that vary between the cells of a sweep. Every combination of method, rank, alpha, rate and seed is one.

    Raises:
      InputError: If models, methods or seeds are empty, a value repeats, or a value is unknown.
    """

    model: tuple[str, ...] = ("smollm2-135m",)
    """One or more models: a folder in Hugging Face layout, a .gguf file, a hub id or a built-in name"""
    methods: tuple[str, ...] = (BASE, "lora", "dora", "rora")
    """Methods: base, full, prefix, series, parallel, lora, dora, rora, quarter, dora-rora. base is the model without an
    adapter, full trains the targets' own weights"""
    ranks: tuple[int, ...] = (4, 8, 16, 32, 64, 128)
    """Ranks of the adapter"""
    gains: tuple[float, ...] = ()
    """Values of G = gamma r (scaling times rank), in place of alpha; methods with a rank must scale by alpha / r"""
    lrs: tuple[float, ...] | None = None
    """Peak learning rates. The default is the published rate of each method (3e-4; dora 2e-4, with LLaMA-3 1e-4; prefix
    3e-2; full 2e-5)"""
    full_lrs: tuple[float, ...] = ()
    """Learning rates of full fine-tuning of the same modules; by default there are no such runs"""
    seeds: tuple[int, ...] = (0, 1)
    """Seeds of initialisation, order and dropout; methods of the same rank and seed share initialisation and order"""
    read_at: tuple[int, ...] = ()
    """Numbers of steps after which to evaluate the held-out records, in ascending order; by default the end of the run.
    A run at a constant rate has all of them; under another schedule each is the end of a run of its own"""
    axes: tuple[str, ...] = ()
    """Further axes as NAME=VALUE,VALUE, such as schedule=constant,cosine batch_size=4,32 quantization=none,q4_0;
    supported: schedule, batch_size, warmup, weight_decay, lr_multiplier_A, quantization, clip"""

    def __post_init__(self) -> None:
        # Lists of distinct values.
        check_list("model", self.model)
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

    def rates(self, method: str, model: str) -> tuple[float, ...]:
        """Return the learning rates of a method."""
        if method == "full" and self.full_lrs:
            return self.full_lrs
        return self.lrs or (published_rate(method, model),)

    def variants(self) -> list[dict[str, Any]]:
        """Return the combinations of the further axes, each as settings by name.

        Raises:
          InputError: If an axis is unknown or has no values.
        """
        values: dict[str, list[Any]] = {}
        for axis in self.axes:
            name, _, words = axis.partition("=")
            check_choice("axes", name, AXES)
            values[name] = [parse_yaml(word, where=f"axes {axis!r}") for word in words.split(",")]
            if not words or len(set(map(str, values[name]))) < len(values[name]):
                raise InputError(f"axes must have the form NAME=VALUE,VALUE with different values, got {axis!r}")
        return [dict(zip(values, combination, strict=True)) for combination in product(*values.values())]


def published_rate(method: str, model: str) -> float:
    """Return the learning rate with which a method was published."""
    kind = METHODS[method].settings["method"]
    # DoRA's scripts use a lower rate for Llama 3.
    return 1e-4 if kind == "dora" and "Llama-3" in model else LEARNING_RATES[kind]
