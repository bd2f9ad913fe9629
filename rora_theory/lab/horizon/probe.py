"""Training runs of a probe for a learning rate, on the workbench of a sweep."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from rora_theory.advice.adapter_config import peft_targets
from rora_theory.defaults import TRAIN_BATCH_SIZE
from rora_theory.errors import InputError
from rora_theory.lab import led
from rora_theory.lab.adapters.lora import PAPER_TARGETS
from rora_theory.lab.data.batches import Examples
from rora_theory.lab.data.formats import TrainTemplate
from rora_theory.lab.finetune.config import FinetuneConfig, LossOn
from rora_theory.lab.sweep.workbench import Workbench
from rora_theory.laws.random.seeds import check_seed
from rora_theory.measure.tuning.plan import (
    BUDGET,
    MAX_PROBE_STEPS,
    ProbePlan,
    ProbeRun,
    Trial,
    make_plan,
    scaled_warmup,
)
from rora_theory.optimizers import Schedule
from rora_theory.scaling import Rule, scaling_factor
from rora_theory.validation.ranges import AtLeastTwo, Count, Natural, NotNegative, Positive, Share, check_ranges
from rora_theory.validation.rules import check_list, check_warmup

MAX_INPUT_RECORDS = 8
"""Maximum number of held-out records at which the parts of the change are measured."""

SHARED_SETTINGS = (
    "targets", "dropout", "batch_size", "schedule", "weight_decay", "clip", "template", "loss_on", "cutoff",
)  # fmt: skip
"""Settings of `ProbeConfig` that are settings of every run."""


@dataclass(frozen=True)
class ProbeConfig:
    """Planned fine-tuning run, and the probe that finds its learning rate.

    Raises:
      InputError: If a value is out of range.
    """

    steps: Count = 2000
    """Number of optimizer steps of the planned run"""
    rank: Count = 128
    """Rank of the planned run"""
    alpha: Positive = 16.0
    """Numerator of the scaling factor of the planned run"""
    rule: Rule = "lora"
    """Scaling rule of the planned run, alpha / rank**kappa: lora, rora or rslora, or a number for kappa"""
    targets: tuple[str, ...] = PAPER_TARGETS
    """Adapted modules"""
    dropout: float = 0.0
    """Dropout probability of the adapter's input"""
    batch_size: Count = TRAIN_BATCH_SIZE
    """Number of records per step"""
    warmup: Natural = 0
    """Number of warm-up steps of the planned run"""
    schedule: Schedule = "cosine"
    """Learning-rate schedule of the planned run"""
    weight_decay: NotNegative = 0.0
    """Decoupled weight decay of AdamW"""
    clip: float = 1.0
    """Maximum norm of the gradient; inf disables clipping"""
    template: TrainTemplate | None = None
    """Prompt template, by default that of the records' format"""
    loss_on: LossOn = "all"
    """Tokens in the loss: all or answer"""
    cutoff: AtLeastTwo = 256
    """Maximum length of an example in tokens"""
    lr: Positive | None = None
    """Learning rate of the planned run from which the search starts; by default the best rate of published runs"""
    probe_rank: Count = 8
    """Maximum rank of the probe's adapters"""
    budget: Share = BUDGET
    """Maximum cost of the probe as a share of the planned run"""
    held_out: AtLeastTwo = 96
    """Number of records that no run trains on; fewer are evaluated if the budget does not allow all"""
    seed: int = 0
    """Seed of the samples of records, of the order and of the initialisation"""

    def __post_init__(self) -> None:
        """Validate the settings."""
        check_ranges(self)
        check_seed("--seed", self.seed)
        check_list("--targets", self.targets)
        check_warmup(self.warmup, self.steps)
        self.training(Trial(1.0, self.steps))
        # A plan without the sizes of the records raises an error early if the budget is too small for any.
        make_plan(
            self.steps,
            self.strength,
            batch_tokens=1.0,
            held_out_tokens=1.0,
            schedule=self.schedule,
            budget=self.budget,
        )

    @property
    def strength(self) -> float:
        """Scaling times rank, G, of the planned run and of the probe."""
        return scaling_factor(self.rule, alpha=self.alpha, rank=self.rank) * self.rank

    @property
    def train_records(self) -> int:
        """Number of records that the longest run of any probe trains on."""
        return MAX_PROBE_STEPS * self.batch_size

    def training(self, trial: Trial) -> FinetuneConfig:
        """Return the fine-tuning configuration of a run."""
        return FinetuneConfig(
            rule="lora",
            rank=min(self.probe_rank, self.rank),
            # Under alpha / r, alpha equals gamma r at every rank.
            alpha=self.strength,
            lr=trial.learning_rate,
            warmup=scaled_warmup(self.warmup, self.steps, trial.steps),
            held_out=0,
            widths=3,
            seed=self.seed,
            **{name: getattr(self, name) for name in SHARED_SETTINGS},
        )

    def peft_entries(self) -> dict[str, Any]:
        """Return the entries of PEFT's ``LoraConfig`` for the planned run: alpha / r of the same gamma."""
        return {
            "r": self.rank,
            "lora_alpha": self.strength,
            "use_rslora": False,
            "lora_dropout": self.dropout,
            "target_modules": peft_targets(self.targets),
        }


class Probe:
    """Probe on a workbench with an open model, whose held-out records it reduces to what the budget allows.

    Args:
      config: Configuration of the probe.
      bench: Workbench.

    Attributes:
      plan: Plan of the probe.
      tokens: Number of tokens with a loss of each held-out record that is evaluated.

    Raises:
      InputError: If the budget does not allow the evaluation of two held-out records.
    """

    def __init__(self, config: ProbeConfig, bench: Workbench) -> None:
        self._config, self._bench = config, bench
        bench.measures_parts = True
        held_out = bench.held_out
        batch_tokens = config.batch_size * float(np.mean(bench.train_examples.input_lengths))
        # Fresh adapter and batches of every run.
        training = replace(config.training(Trial(1.0, MAX_PROBE_STEPS)), steps=MAX_PROBE_STEPS)
        self._adapter, batches = bench.begin(training)
        # The inputs at which the parts of the change are measured cost one forward pass of a few records.
        inputs = evenly_spaced(len(held_out), min(MAX_INPUT_RECORDS, max(2, config.batch_size // 2)))
        self.plan: ProbePlan = make_plan(
            config.steps,
            config.strength,
            batch_tokens=batch_tokens,
            step_tokens=[batches.count_inputs(step) for step in range(MAX_PROBE_STEPS)],
            held_out_tokens=float(held_out.input_lengths.sum()),
            setup_tokens=float(held_out.input_lengths[inputs].sum()),
            schedule=config.schedule,
            learning_rate=config.lr,
            budget=config.budget,
        )
        # Held-out records that the budget allows to evaluate after every run.
        affordable = _affordable_records(held_out.input_lengths, self.plan.held_out_tokens(batch_tokens))
        self._input_examples = select_examples(held_out, inputs)
        bench.held_out = select_examples(held_out, affordable)
        self._is_answer = config.loss_on == "answer"
        self.tokens: list[int] = (
            bench.held_out.target_counts if self._is_answer else bench.held_out.input_lengths
        ).tolist()
        self._inputs: dict[str, Float[np.ndarray, "layers tokens p_in"]] | None = None

    @property
    def remark(self) -> str:
        """Sentence with the number of held-out records that are evaluated."""
        return f"Held-out losses are over {len(self.tokens)} records with {sum(self.tokens):,} tokens."

    def run(self, trial: Trial) -> ProbeRun:
        """Train an adapter and evaluate it."""
        config, bench = self._config, self._bench
        training = config.training(trial)
        # Inputs of the untrained model: the adapter's change is 0 at the start of every run.
        if self._inputs is None:
            model = bench.model
            self._inputs = led.module_inputs(model.params, model.config, self._input_examples, self._adapter)
        read = bench.train(training, (trial.steps,), inputs=self._inputs).run
        if read.diverged_at is not None:
            return ProbeRun(trial.learning_rate, trial.steps, diverged_at=read.diverged_at)
        (reading,) = read.readings
        losses = reading.answer_losses if self._is_answer else reading.losses
        ratios: list[float] = []
        if reading.parts is not None:
            # The ratio is undefined in modules where B has not moved.
            ratios = [a / b for a, b in zip(reading.parts["led_A"], reading.parts["led_B"], strict=True) if b > 0]
        return ProbeRun(trial.learning_rate, trial.steps, tuple(losses), tuple(ratios))


def select_examples(examples: Examples, indices: Sequence[int] | Int[np.ndarray, " n"]) -> Examples:
    """Return some of the examples, in the order of the indices."""
    rows = [examples[int(index)] for index in indices]
    return replace(
        examples,
        tokens=np.concatenate(rows),
        offsets=np.cumsum([0, *map(len, rows)]),
        is_target=np.concatenate([examples.target_mask(int(index)) for index in indices]),
    )


def evenly_spaced(count: int, limit: int) -> Int[np.ndarray, " n"]:
    """Return at most ``limit`` indices below ``count``, evenly spaced.

    Examples:
      >>> evenly_spaced(10, 3).tolist(), evenly_spaced(2, 3).tolist()
      ([0, 3, 6], [0, 1])
    """
    return np.arange(min(count, limit)) * count // min(count, limit)


def _affordable_records(sizes: Int[np.ndarray, " n"], tokens: int) -> Int[np.ndarray, " m"]:
    """Return evenly spaced indices of as many records as have at most this number of tokens together.

    Raises:
      InputError: If two records have more.
    """
    for limit in range(len(sizes), 1, -1):
        indices = evenly_spaced(len(sizes), limit)
        if int(sizes[indices].sum()) <= tokens:
            return indices
    raise InputError(
        f"held-out records must be short enough that two have at most {tokens} tokens, which the budget allows per "
        f"evaluation, got {sizes[:2].tolist()}. Raise budget or batch_size."
    )
