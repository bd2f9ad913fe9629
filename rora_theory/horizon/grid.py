"""Which fine-tuning runs tell the best rate at several horizons, and where each is read."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from rora_theory.adapters.lora import PAPER_TARGETS
from rora_theory.data.formats import TrainTemplate
from rora_theory.errors import InputError
from rora_theory.finetune.config import FinetuneConfig, LossOn, Schedule
from rora_theory.llama.quantised import Quantization
from rora_theory.scaling import check_positive
from rora_theory.validation.rules import check_list, check_ranks, check_seeds, check_steps

SHARED = ("batch_size", "warmup", "targets", "template", "loss_on", "cutoff")
"""Settings that all runs of a folder share and that identify it."""

VARIANTS = {"schedule": "constant", "weight_decay": 0.0, "lr_multiplier_A": 1.0, "quantization": "none"}
"""Shared settings that identify a folder only where they differ from these values."""


@dataclass(frozen=True)
class HorizonCell:
    """One fine-tuning run to do, and the steps it is read at; full fine-tuning has no rank and no strength, gamma r."""

    rank: int | None
    strength: float | None
    rate: float
    seed: int
    read_at: tuple[int, ...]

    def __str__(self) -> str:
        size = "full" if self.rank is None else f"r={self.rank} gamma*r={self.strength:g}"
        return f"{size} lr={self.rate:g} seed={self.seed}"


@dataclass(frozen=True)
class HorizonGrid:
    """Which runs, and where they are read.

    Raises:
      InputError: a value out of range.
    """

    ranks: tuple[int, ...] = (8, 128)
    """ranks of the adapter"""
    strengths: tuple[float, ...] = (64.0, 724.0)
    """gamma r of the adapter: gamma is the strength over the rank"""
    lrs: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    """learning rates after the warm-up"""
    full_lrs: tuple[float, ...] = ()
    """learning rates of full fine-tuning of the same modules; none is no such run"""
    seeds: tuple[int, ...] = (0,)
    """seeds of initialisation and order"""
    read_at: tuple[int, ...] = (16, 64, 256)
    """steps after which the held-out records are read, ascending; the last ends the run"""
    batch_size: int = 4
    """records a step"""
    warmup: int = 4
    """steps of linear warm-up from 0"""
    targets: tuple[str, ...] = PAPER_TARGETS
    """adapted modules"""
    template: TrainTemplate = "clean"
    """training prompt: train (published, to the byte), clean, chat (the model's chat template) or plain"""
    loss_on: LossOn = "all"
    """tokens in the training loss"""
    cutoff: int = 96
    """longest training example in tokens"""
    schedule: Schedule = "constant"
    """learning rate after the warm-up; one that decays takes a single value of --read-at"""
    weight_decay: float = 0.0
    """decoupled weight decay of AdamW"""
    lr_multiplier_A: float = 1.0
    """learning rate of lora_A divided by that of lora_B"""
    quantization: Quantization = "none"
    """format of the frozen base's linear weights"""

    def __post_init__(self) -> None:
        check_ranks(self.ranks, fewest=1)
        for option, values, fewest in (
            ("--strengths", self.strengths, 1), ("--lrs", self.lrs, 1), ("--full-lrs", self.full_lrs, 0)
        ):  # fmt: skip
            check_list(option, values, fewest=fewest)
            for value in values:
                check_positive(option, value)
        check_seeds(self.seeds)
        try:
            check_steps(self.read_at)
        except InputError as error:
            raise InputError(f"--read-at: {error}") from None
        if self.schedule != "constant" and len(self.read_at) > 1:
            raise InputError(
                f"--read-at must be a single step with --schedule {self.schedule}, got "
                f"{' '.join(map(str, self.read_at))}: a rate that decays depends on where the run ends"
            )
        self.training(next(self.cells()))

    def training(self, cell: HorizonCell) -> FinetuneConfig:
        """The fine-tuning run of a cell."""
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
        """Every run, a seed after the other; then those of full fine-tuning."""
        for seed, strength, rank, rate in product(self.seeds, self.strengths, self.ranks, self.lrs):
            yield HorizonCell(rank, strength, rate, seed, self.read_at)
        for seed, rate in product(self.seeds, self.full_lrs):
            yield HorizonCell(None, None, rate, seed, self.read_at)


def warmed_up(steps: int, warmup: int) -> list[float]:
    """Factor of the rate in each step of a run of the grid: constant after a linear warm-up from 0."""
    return [min(1.0, step / warmup) if warmup else 1.0 for step in range(steps)]
