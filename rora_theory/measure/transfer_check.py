"""Check of a transferred setting: real first steps of a model under several settings, compared with the tuned one."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import geometric_mean
from typing import Any

import numpy as np
import pandas as pd
import torch

from rora_theory.advice.setting import Setting
from rora_theory.advice.transfer import Advice
from rora_theory.measure.adapters import add_adapter
from rora_theory.measure.batches import Batch
from rora_theory.measure.modules import layer_index
from rora_theory.measure.rank_check.check import FirstSteps, make_optimizer_of
from rora_theory.runs import frames
from rora_theory.scaling import KAPPAS, exponent
from rora_theory.stats.estimate import jackknife

TUNED = "tuned"
"""Name of the tuned setting, with which the others are compared."""

COLUMNS = (
    "plan", "rank", "alpha", "learning_rate", "scaling", "alpha_pattern", "quantity", "module", "layer", "seed", "rms",
)  # fmt: skip
SUMMARY_COLUMNS = (
    "plan", "rank", "alpha", "learning_rate", "quantity", "ratio", "standard_error", "smallest", "largest",
)  # fmt: skip
UNITS = {
    "rms": "root mean square over held-out tokens and outputs of the change after the first step: of a module's "
    "gamma B A x, of the final hidden states, or of the logits",
    "ratio": "rms (root mean square over seeds) divided by that of the tuned setting; for the quantity modules the "
    "geometric mean over modules, with the smallest and largest ratio",
}


@dataclass(frozen=True)
class Candidate:
    """Setting to compare with the tuned one.

    Attributes:
      setting: Setting of the candidate.
      alpha_pattern: Alphas of modules that differ from the setting's.
    """

    setting: Setting
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)


def candidates(advice: Advice) -> dict[str, Candidate]:
    """Return the settings to compare by name: the tuned one, no change at the new rank, and those of the advice."""
    new = advice.unchanged
    one_alpha = replace(new, alpha=advice.alpha_at_old_rate)
    settings = {
        TUNED: Candidate(advice.old),
        "neither changed": Candidate(new),
        "one alpha": Candidate(one_alpha),
        "one rate": Candidate(replace(new, learning_rate=advice.rate_at_alpha)),
    }
    # The common habit at a larger rank, unless the rule is rsLoRA's already.
    if exponent(new.rule) != KAPPAS["rslora"]:
        settings["neither changed, use_rslora"] = Candidate(replace(new, rule="rslora"))
    # A measured regime gives modules alphas of their own.
    if advice.regime == "measured":
        for per in ("type", "module"):
            settings[f"alpha by {per}"] = Candidate(one_alpha, advice.alpha_pattern(per))
    return settings


@dataclass(frozen=True)
class FirstStep:
    """First step of a candidate with one draw of A.

    Attributes:
      plan: Name of the candidate.
      seed: Seed of A.
    """

    plan: str
    seed: int

    def __str__(self) -> str:
        return f"{self.plan}, seed {self.seed}"


def first_steps(advice: Advice, seeds: Sequence[int]) -> Iterator[FirstStep]:
    """Yield the first steps of all candidates and seeds."""
    for plan in candidates(advice):
        for seed in seeds:
            yield FirstStep(plan, seed)


class FirstStepChecker:
    """Model and batches on which the first steps of all candidates are taken.

    Args:
      batch: Batch of the step.
      held_out: Batch at which the change is measured.
      target_modules: Target modules in PEFT's format.
    """

    def __init__(
        self, model: torch.nn.Module, batch: Batch, held_out: Batch, target_modules: Sequence[str] | str, seed: int
    ) -> None:
        self._model, self._targets, self._seed = model, target_modules, seed
        self._steps = FirstSteps([batch], held_out, (1,), label=str)

    def rows(self, advice: Advice, step: FirstStep) -> list[dict[str, Any]]:
        """Take one first step and return the sizes of its changes as rows of a table.

        Args:
          step: Candidate and seed of A.

        Returns:
          A row with the columns `COLUMNS` for each module, and for the hidden states and the logits.

        Raises:
          InputError: If a target module or an initialisation does not suit the model.
        """
        candidate = candidates(advice)[step.plan]
        setting, pattern = candidate.setting, candidate.alpha_pattern
        # The same draws of A for every candidate, nested over ranks.
        make_optimizer = make_optimizer_of(setting.optimizer, setting.learning_rate)
        # PEFT freezes the weights of the base model.
        requirements = [(parameter, parameter.requires_grad) for parameter in self._model.parameters()]
        try:
            adapted = add_adapter(self._model, setting, self._targets, pattern)
            sizes = self._steps.measure(adapted, setting.rank, [self._seed, step.seed], make_optimizer)
        finally:
            for parameter, requires_grad in requirements:
                parameter.requires_grad_(requires_grad)
        labels = {
            "plan": step.plan,
            "rank": setting.rank,
            "alpha": setting.alpha,
            "learning_rate": setting.learning_rate,
            "scaling": setting.scaling,
            "alpha_pattern": len(pattern),
            "seed": step.seed,
        }
        # A row for each module, and two for the whole model.
        rows = []
        for coordinate, value in sizes:
            if coordinate.split != "held_out" or coordinate.quantity == "loss":
                continue
            place: dict[str, Any] = {"quantity": coordinate.quantity}
            if coordinate.quantity == "output":
                place = {
                    "quantity": "module", "module": coordinate.module, "layer": layer_index(coordinate.module)
                }  # fmt: skip
            rows.append(labels | place | {"rms": value})
        return rows


def summarise_ratios(table: pd.DataFrame, advice: Advice) -> pd.DataFrame:
    """Compute the ratio of each candidate's changes to those of the tuned setting.

    Changes are root mean squares over seeds. Standard errors come from the jackknife over seeds.

    Args:
      table: Rows of `FirstStepChecker.rows`, with two seeds or more.

    Returns:
      A frame with the columns `SUMMARY_COLUMNS`, with a row for each candidate and quantity.
    """

    def mean_squares(plan: str, quantity: str) -> np.ndarray:
        """Return an array [seeds, modules]."""
        rows = table[(table["plan"] == plan) & (table["quantity"] == quantity)]
        return np.array([by_seed["rms"].to_numpy(float) ** 2 for _, by_seed in rows.groupby("seed")])

    summary = []
    for name, candidate in candidates(advice).items():
        setting = candidate.setting
        for quantity in ("module", "hidden", "logits"):
            candidate_squares, tuned_squares = mean_squares(name, quantity), mean_squares(TUNED, quantity)
            # The seeds of both settings are the same draws of A: the jackknife leaves them out together.
            seeds = len(candidate_squares)
            estimate = jackknife(partial(_mean_ratio, candidate_squares, tuned_squares), seeds, "seeds")
            # Ratios of single modules over all seeds, for their range.
            by_module = _ratios(candidate_squares, tuned_squares, range(seeds))
            summary.append(
                {
                    "plan": name,
                    "rank": setting.rank,
                    "alpha": setting.alpha,
                    "learning_rate": setting.learning_rate,
                    "quantity": "modules" if quantity == "module" else quantity,
                    "ratio": estimate.value,
                    "standard_error": estimate.error,
                    "smallest": float(np.min(by_module)),
                    "largest": float(np.max(by_module)),
                }
            )
    return frames.from_rows(summary, SUMMARY_COLUMNS)


def _ratios(candidate_squares: np.ndarray, tuned_squares: np.ndarray, seeds: Sequence[int]) -> np.ndarray:
    """Compute the ratio of root mean squares over some of the seeds, by module."""
    indices = list(seeds)
    return np.sqrt(np.mean(candidate_squares[indices], axis=0) / np.mean(tuned_squares[indices], axis=0))


def _mean_ratio(candidate_squares: np.ndarray, tuned_squares: np.ndarray, seeds: Sequence[int]) -> float:
    return geometric_mean(_ratios(candidate_squares, tuned_squares, seeds))


HEADS = ("plan", "alpha", "rate", "modules: mean, range", "final hidden states", "logits")
"""Headers of the columns of `format_candidates`."""


def format_candidates(summary: pd.DataFrame) -> list[list[str]]:
    """Format the ratios of `summarise_ratios` with their standard errors, with a row for each but the tuned one."""
    rows = []
    for plan, group in summary[summary["plan"] != TUNED].groupby("plan", sort=False):
        records = group.to_dict("records")
        modules, hidden, logits = (f"{row['ratio']:.3f} ({row['standard_error']:.3f})" for row in records)
        # The row of the modules has the range over modules, and the setting that all rows share.
        first = records[0]
        modules += f", {first['smallest']:.2f} to {first['largest']:.2f}"
        rows.append([str(plan), f"{first['alpha']:.4g}", f"{first['learning_rate']:.3g}", modules, hidden, logits])
    return rows
