"""The matrix of training runs: its cells, what every grid of them has in common, and the grid of language models.

A grid lists cells. `controlled_grid` has the grid of the controlled problem.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any

from rora_theory.errors import InputError
from rora_theory.lab.finetune import FinetuneConfig
from rora_theory.lab.sweep.methods import BASE, METHODS, find_method, published_rate
from rora_theory.laws.random.seeds import check_seed
from rora_theory.runs.files import parse_yaml
from rora_theory.scaling import check_choice, check_integer, check_positive, exponent, scaling_factor
from rora_theory.validation.rules import check_list, check_steps

AXES = ("schedule", "batch_size", "warmup", "weight_decay", "lr_multiplier_A", "quantization", "clip")
"""Settings of the training runs that may be further axes of a matrix."""


@dataclass(frozen=True)
class SweepCell:
    """Part of a matrix that is computed at once. With what all runs of a folder share, it determines the result.

    That is one training run of a language model. Runs of the controlled problem take so little that all rates and seeds
    of a setting are one cell.

    Attributes:
      model: Name of the base model, or of the controlled problem's.
      method: Name from `METHODS` or an exponent, see `find_method`; or `BASE`.
      rank: Rank; None for `BASE` and for methods without a rank.
      alpha: Alpha; None for `BASE` and for methods without a rank.
      rate: Peak learning rate; None for `BASE`, and if the cell has all rates.
      seed: Seed; None for `BASE`, and if the cell has all seeds.
      read_at: Numbers of steps after which to measure; the run ends at the last. Empty for `BASE`.
      axes: Settings of the run in place of the shared ones, by name.
      evaluation: Protocol, tasks, limit and digests of the task files; None if the tasks are not scored.
    """

    model: str
    method: str
    rank: int | None = None
    alpha: float | None = None
    rate: float | None = None
    seed: int | None = None
    read_at: tuple[int, ...] = ()
    axes: Mapping[str, Any] = field(default_factory=dict)
    evaluation: Mapping[str, Any] | None = None

    def __str__(self) -> str:
        if self.method == BASE:
            return f"{self.model}: base"
        size = f" r={self.rank} alpha={self.alpha:g} gamma={self.gamma:.4g}" if self.rank is not None else ""
        rate = f" lr={self.rate:g}" if self.rate is not None else ""
        axes = "".join(f" {name}={value}" for name, value in self.axes.items())
        seed = f" seed={self.seed}" if self.seed is not None else ""
        return f"{self.model}: {self.method}{size}{rate}{axes}{seed}"

    @property
    def gamma(self) -> float | None:
        """Scaling of the adapter; None for methods without a rank."""
        if self.rank is None or self.alpha is None:
            return None
        return scaling_factor(find_method(self.method).rule, alpha=self.alpha, rank=self.rank)

    def training(self, shared: FinetuneConfig) -> FinetuneConfig | None:
        """Return the fine-tuning configuration of a language model's run; None for `BASE`.

        Args:
          shared: Settings that all runs share. Targets and dropout apply to methods with a rank; other methods adapt
            their published modules (full fine-tuning these targets) without dropout.

        Raises:
          InputError: If a value is out of range.
        """
        if self.method == BASE:
            return None
        settings: dict[str, Any] = dict(self.axes) | {"lr": self.rate, "seed": self.seed, "steps": self.read_at[-1]}
        settings |= find_method(self.method).settings
        if self.rank is None:
            # Full fine-tuning is compared with adapters of the same modules; other methods have modules of their own.
            settings |= {"targets": shared.modules if settings["method"] == "full" else None, "dropout": 0.0}
        else:
            settings |= {"rank": self.rank, "alpha": self.alpha, "targets": shared.modules}
        return shared.with_method(**settings | {"held_out": 0})


@dataclass(frozen=True)
class RunGrid:
    """Settings that vary between the runs of a matrix, whatever is trained.

    Raises:
      InputError: If a list is empty or repeats a value, or if a value is out of range.
    """

    model: tuple[str, ...]
    """Models"""
    methods: tuple[str, ...]
    """Methods"""
    ranks: tuple[int, ...]
    """Ranks of the adapter"""
    seeds: tuple[int, ...]
    """Seeds of the runs"""
    read_at: tuple[int, ...]
    """Numbers of steps after which to measure, in ascending order"""

    def __post_init__(self) -> None:
        check_list("model", self.model)
        check_list("ranks", self.ranks, check_integer)
        check_list("seeds", self.seeds, check_seed)
        if self.read_at:
            check_steps(self.read_at, "read_at")

    @property
    def trained_methods(self) -> tuple[str, ...]:
        """Methods that train."""
        return tuple(method for method in self.methods if method != BASE)

    def settings(
        self, model: str, variants: Sequence[Mapping[str, Any]], alphas: Callable[[str], Sequence[float]]
    ) -> Iterator[SweepCell]:
        """Yield the settings of a model's runs as cells without rate, seed and steps: those of one curve each.

        Args:
          model: Name of the model.
          variants: Combinations of the further axes.
          alphas: Function of a method with a rank that returns its alphas.

        Yields:
          The settings by combination of axes, rank (methods without a rank first), method and alpha.
        """
        for axes, rank, method in product(variants, (None, *self.ranks), self.trained_methods):
            # Methods without a rank belong to the first turn of the loop, in which the rank is None.
            if find_method(method).has_rank == (rank is not None):
                for alpha in (None,) if rank is None else alphas(method):
                    yield SweepCell(model, method, rank, alpha, axes=axes)


@dataclass(frozen=True)
class SweepGrid(RunGrid):
    """Settings that vary between runs of language models: every combination of method, rank, alpha, rate and seed.

    Raises:
      InputError: If models, methods or seeds are empty, a value repeats, or a value is unknown.
    """

    model: tuple[str, ...] = ("smollm2-135m",)
    """One or more models: a folder in Hugging Face layout, a .gguf file, a hub id or a built-in name"""
    methods: tuple[str, ...] = (BASE, "lora", "dora", "rora")
    """Methods: base, full, prefix, series, parallel, lora, dora, rora, quarter, dora-rora. base is the model without an
    adapter, full trains the targets' own weights"""
    ranks: tuple[int, ...] = (4, 8, 16, 32, 64, 128)
    seeds: tuple[int, ...] = (0, 1)
    """Seeds of initialisation, order and dropout; methods of the same rank and seed share initialisation and order"""
    read_at: tuple[int, ...] = ()
    """Numbers of steps after which to evaluate the held-out records, in ascending order; by default the end of the run.
    A run at a constant rate has all of them; under another schedule each is the end of a run of its own"""
    gains: tuple[float, ...] = ()
    """Values of G = gamma r (scaling times rank), in place of alpha; methods with a rank must scale by alpha / r"""
    lrs: tuple[float, ...] | None = None
    """Peak learning rates. The default is the published rate of each method (3e-4; dora 2e-4, with LLaMA-3 1e-4; prefix
    3e-2; full 2e-5)"""
    full_lrs: tuple[float, ...] = ()
    """Learning rates of full fine-tuning of the same modules; by default there are no such runs"""
    axes: tuple[str, ...] = ()
    """Further axes as NAME=VALUE,VALUE, such as schedule=constant,cosine batch_size=4,32 quantization=none,q4_0;
    supported: schedule, batch_size, warmup, weight_decay, lr_multiplier_A, quantization, clip"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_list("methods", self.methods, partial(check_choice, choices=(BASE, *METHODS)))
        if self.lrs is not None:
            check_list("lrs", self.lrs, check_positive)
        check_list("gains", self.gains, check_positive, fewest=0)
        check_list("full_lrs", self.full_lrs, check_positive, fewest=0)
        for method in map(find_method, self.trained_methods if self.gains else ()):
            if method.has_rank and exponent(method.rule) != 1:
                raise InputError(f"gains requires methods that scale by alpha / r, got {method.name}")
        self.variants()

    @property
    def trained_methods(self) -> tuple[str, ...]:
        """Methods that train, full fine-tuning among them if it has learning rates."""
        methods = super().trained_methods
        return (*methods, "full") if self.full_lrs and "full" not in methods else methods

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
