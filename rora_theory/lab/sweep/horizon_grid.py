"""Grid of fine-tuning runs from which the best learning rate is estimated at several numbers of steps (horizons)."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from rora_theory.defaults import SMALL_BATCH_SIZE
from rora_theory.errors import InputError
from rora_theory.lab.adapters.lora import PAPER_TARGETS
from rora_theory.lab.data.formats import TrainTemplate
from rora_theory.lab.finetune.config import FinetuneConfig, LossOn
from rora_theory.lab.llama.quantised import Quantization
from rora_theory.laws.random.seeds import check_seed
from rora_theory.optimizers import Schedule
from rora_theory.scaling import check_integer, check_positive
from rora_theory.validation.rules import check_list, check_steps, check_warmup

SHARED = ("batch_size", "warmup", "targets", "template", "loss_on", "cutoff")
"""Settings that all runs of a folder share and that identify it."""

VARIANTS = {"schedule": "constant", "weight_decay": 0.0, "lr_multiplier_A": 1.0, "quantization": "none"}
"""Shared settings that identify a folder only where they differ from these values."""


@dataclass(frozen=True)
class HorizonCell:
    """Fine-tuning run of the grid.

    Attributes:
      rank: Rank of the adapter; None for full fine-tuning.
      strength: Strength gamma r of the adapter; None for full fine-tuning.
      rate: Learning rate after the warm-up.
      seed: Seed.
      read_at: Numbers of steps after which the held-out records are evaluated.
    """

    rank: int | None
    strength: float | None
    rate: float
    seed: int
    read_at: tuple[int, ...]

    def __str__(self) -> str:
        """Return the label of the run, as progress messages show it."""
        size = "full" if self.rank is None else f"r={self.rank} gamma*r={self.strength:g}"
        return f"{size} lr={self.rate:g} seed={self.seed}"


@dataclass(frozen=True)
class HorizonGrid:
    """Settings of the runs.

    Raises:
      InputError: If a value is out of range.
    """

    ranks: tuple[int, ...] = (8, 128)
    """Ranks of the adapter"""
    strengths: tuple[float, ...] = (64.0, 724.0)
    """Strengths gamma r of the adapter; gamma is the strength divided by the rank"""
    lrs: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    """Learning rates after the warm-up"""
    full_lrs: tuple[float, ...] = ()
    """Learning rates of full fine-tuning of the same modules; by default there are no such runs"""
    seeds: tuple[int, ...] = (0,)
    """Seeds of initialisation and order"""
    read_at: tuple[int, ...] = (16, 64, 256)
    """Numbers of steps after which to evaluate the held-out records, in ascending order; the run ends at the last"""
    batch_size: int = SMALL_BATCH_SIZE
    """Number of records per step"""
    warmup: int = 4
    """Number of steps of linear warm-up from 0"""
    targets: tuple[str, ...] = PAPER_TARGETS
    """Adapted modules"""
    template: TrainTemplate = "clean"
    """Training prompt: train (as published, byte for byte), clean, chat (the model's chat template) or plain"""
    loss_on: LossOn = "all"
    """Tokens in the training loss: all or answer"""
    cutoff: int = 96
    """Maximum number of tokens of a training example"""
    schedule: Schedule = "constant"
    """Schedule of the learning rate after the warm-up; one that decays requires a single value of --read-at"""
    weight_decay: float = 0.0
    """Decoupled weight decay of AdamW"""
    lr_multiplier_A: float = 1.0
    """Learning rate of lora_A divided by that of lora_B"""
    quantization: Quantization = "none"
    """Format of the frozen base's linear weights"""

    def __post_init__(self) -> None:
        """Validate the settings."""
        check_list("--ranks", self.ranks, check_integer)
        for option, values, fewest in (
            ("--strengths", self.strengths, 1), ("--lrs", self.lrs, 1), ("--full-lrs", self.full_lrs, 0)
        ):  # fmt: skip
            check_list(option, values, check_positive, fewest=fewest)
        check_list("--seeds", self.seeds, check_seed)
        check_steps(self.read_at, "--read-at")
        # The first step of a warm-up has the rate 0: after it there is no change to measure.
        if self.read_at[0] == 1 and self.warmup:
            raise InputError(
                f"--read-at must begin at 2 or more with --warmup {self.warmup}, under which the first step has the "
                "rate 0, got 1"
            )
        check_warmup(self.warmup, self.read_at[-1])
        if self.schedule != "constant" and len(self.read_at) > 1:
            raise InputError(
                f"--read-at must be a single step with --schedule {self.schedule}, got "
                f"{' '.join(map(str, self.read_at))}: a rate that decays depends on where the run ends"
            )
        # Constructing the configuration of a run validates the settings that all runs share.
        self.training(next(self.cells()))

    def training(self, cell: HorizonCell) -> FinetuneConfig:
        """Return the fine-tuning configuration of a cell."""
        settings: dict[str, Any] = {"method": "full"}
        if cell.rank is not None:
            settings = {"rule": "lora", "rank": cell.rank, "alpha": cell.strength}
        return FinetuneConfig(
            **settings, **self.shared(), lr=cell.rate, seed=cell.seed, dropout=0.0, held_out=0, widths=3
        )

    def shared(self) -> dict[str, Any]:
        """Return the settings that all runs of the grid share, by name."""
        return {name: getattr(self, name) for name in (*SHARED, *VARIANTS)}

    def identity(self) -> dict[str, Any]:
        """Return the settings that identify a run folder: `shared`, without variants at their defaults."""
        return {name: value for name, value in self.shared().items() if VARIANTS.get(name) != value}

    def cells(self) -> Iterator[HorizonCell]:
        """Yield all runs of adapters by seed, then those of full fine-tuning."""
        for seed, strength, rank, rate in product(self.seeds, self.strengths, self.ranks, self.lrs):
            yield HorizonCell(rank, strength, rate, seed, self.read_at)
        for seed, rate in product(self.seeds, self.full_lrs):
            yield HorizonCell(None, None, rate, seed, self.read_at)
