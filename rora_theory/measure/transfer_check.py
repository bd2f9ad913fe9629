"""Whether a carried setting keeps the first step: real steps of a model under each choice, against the tuned one's.

found = check_transfer(model, transfer(setting, rank=128), train, held_out, target_modules=["q_proj", "v_proj"])
found.summary[["plan", "quantity", "ratio", "standard_error"]]
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import geometric_mean
from typing import Any

import jax
import numpy as np
import pandas as pd

from rora_theory.advice.setting import Setting
from rora_theory.advice.transfer import Advice
from rora_theory.data.batches import Batch
from rora_theory.io import frames
from rora_theory.llama import Model
from rora_theory.measure.layers.model_layers import RealStep
from rora_theory.scaling import KAPPAS, exponent
from rora_theory.stats.estimate import jackknife
from rora_theory.validation.rules import check_seeds

TUNED = "tuned"

COLUMNS = (
    "plan", "rank", "alpha", "learning_rate", "scaling", "alpha_pattern", "quantity", "module", "layer", "seed", "rms",
)  # fmt: skip
SUMMARY_COLUMNS = (
    "plan", "rank", "alpha", "learning_rate", "quantity", "ratio", "standard_error", "smallest", "largest",
)  # fmt: skip
UNITS = {
    "rms": "root mean square over held-out tokens and outputs of the change that the first step makes: of a module's "
    "own w = gamma B A x', of the final hidden states, of the logits",
    "ratio": "of the rms (root mean square over seeds) to that of the tuned setting; quantity modules: the geometric "
    "mean over modules, smallest and largest of them beside it",
}


@dataclass(frozen=True)
class Candidate:
    """A setting whose first step is taken, and its alphas by module where these differ."""

    setting: Setting
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)


def candidates(advice: Advice) -> dict[str, Candidate]:
    """What is compared: the tuned setting, no change at the new rank, and what the advice changes, by name."""
    new = advice.unchanged
    one_alpha = replace(new, alpha=advice.alpha_at_old_rate)
    found = {
        TUNED: Candidate(advice.old),
        "neither changed": Candidate(new),
        "one alpha": Candidate(one_alpha),
        "one rate": Candidate(replace(new, learning_rate=advice.rate_at_alpha)),
    }
    if exponent(new.rule) != KAPPAS["rslora"]:
        found["neither changed, use_rslora"] = Candidate(replace(new, rule="rslora"))
    if advice.regime == "measured":
        for per in ("type", "module"):
            found[f"alpha by {per}"] = Candidate(one_alpha, advice.alpha_pattern(per))
    return found


@dataclass(frozen=True)
class FirstStep:
    """One first step: of a candidate, with one draw of A."""

    plan: str
    seed: int

    def __str__(self) -> str:
        return f"{self.plan}, seed {self.seed}"


def first_steps(advice: Advice, seeds: Sequence[int]) -> Iterator[FirstStep]:
    """All first steps."""
    for plan in candidates(advice):
        for seed in seeds:
            yield FirstStep(plan, seed)


def first_step_rows(stepper: RealStep, advice: Advice, step: FirstStep, seed: int = 0) -> list[dict[str, Any]]:
    """The sizes of one first step, as rows of a table.

    Args:
      stepper: the model.
      advice, step: whose.
      seed: of all draws.
    """
    candidate = candidates(advice)[step.plan]
    setting, pattern = candidate.setting, dict(candidate.alpha_pattern)
    change = stepper.change(setting, jax.random.fold_in(jax.random.key(seed), step.seed), pattern)
    frame = {
        "plan": step.plan,
        "rank": setting.rank,
        "alpha": setting.alpha,
        "learning_rate": setting.learning_rate,
        "scaling": setting.scaling,
        "alpha_pattern": len(pattern),
        "seed": step.seed,
    }
    rows = [
        frame | {"quantity": "module", "module": module, "layer": layer, "rms": float(value)}
        for module, values in change.modules.items()
        for layer, value in enumerate(values)
    ]
    whole = {"hidden": change.hidden, "logits": change.logits}
    return rows + [frame | {"quantity": quantity, "rms": value} for quantity, value in whole.items()]


def summarise(table: pd.DataFrame, advice: Advice) -> pd.DataFrame:
    """Ratios to the tuned setting's: root mean squares over seeds, standard errors by leaving one out (jackknife).

    Args:
      table: of `first_step_rows`, with two seeds or more.
      advice: whose candidates.
    """

    def squares(plan: str, quantity: str) -> np.ndarray:
        """[seeds, modules]."""
        own = table[(table["plan"] == plan) & (table["quantity"] == quantity)]
        return np.array([part["rms"].to_numpy(float) ** 2 for _, part in own.groupby("seed")])

    found = []
    for name, candidate in candidates(advice).items():
        setting = candidate.setting
        for quantity in ("module", "hidden", "logits"):
            pair = squares(name, quantity), squares(TUNED, quantity)

            def ratios(kept: Sequence[int], pair: tuple[np.ndarray, np.ndarray] = pair) -> np.ndarray:
                top, bottom = (np.mean(part[list(kept)], axis=0) for part in pair)
                return np.sqrt(top / bottom)

            def mean(kept: Sequence[int], of: Any = ratios) -> float:
                return geometric_mean(of(kept))

            estimate, every = jackknife(mean, len(pair[0]), "seeds"), ratios(range(len(pair[0])))
            found.append(
                {
                    "plan": name,
                    "rank": setting.rank,
                    "alpha": setting.alpha,
                    "learning_rate": setting.learning_rate,
                    "quantity": "modules" if quantity == "module" else quantity,
                    "ratio": estimate.value,
                    "standard_error": estimate.error,
                    "smallest": float(np.min(every)),
                    "largest": float(np.max(every)),
                }
            )
    return frames.of(found, SUMMARY_COLUMNS)


HEADS = ("plan", "alpha", "rate", "modules: mean (range)", "final hidden states", "logits")
"""Of the columns of `candidates_in_words`."""


def candidates_in_words(summary: pd.DataFrame) -> list[list[str]]:
    """Of `summarise` a row a candidate, the tuned one left out: its strength and its ratios ± standard error."""
    ratio = "{ratio:.3f} ± {standard_error:.3f}".format_map
    found = []
    for plan, own in summary[summary["plan"] != TUNED].groupby("plan", sort=False):
        modules, hidden, logits = own.to_dict("records")
        spread = "{smallest:.2f} to {largest:.2f}".format_map(modules)
        strength = f"{modules['alpha']:.4g}", f"{modules['learning_rate']:.3g}"
        found.append([str(plan), *strength, f"{ratio(modules)} ({spread})", ratio(hidden), ratio(logits)])
    return found


@dataclass(frozen=True, eq=False)
class TransferCheck:
    """What `check_transfer` found: a row a first step and module, and in ``summary`` a candidate and quantity."""

    steps: pd.DataFrame
    summary: pd.DataFrame


def check_transfer(
    model: Model,
    advice: Advice,
    train: Batch,
    held_out: Batch,
    *,
    target_modules: Sequence[str] | str,
    seeds: Sequence[int] = (0, 1, 2, 3),
    seed: int = 0,
) -> TransferCheck:
    """Take the first real step of every candidate, several draws of A each.

    Args:
      model: of `rora_theory.llama.load`.
      advice: what is checked.
      train: the batch that gives the step.
      held_out: what its effect is read at.
      target_modules: what is adapted.
      seeds: of A, two or more; every candidate has the same.
      seed: of all draws.

    Raises:
      InputError: fewer than two seeds, one twice or out of range; a rank, init or target that does not fit the model.
    """
    check_seeds(seeds, fewest=2)
    stepper = RealStep(model.params, model.config, train, held_out, target_modules)
    rows = [row for step in first_steps(advice, seeds) for row in first_step_rows(stepper, advice, step, seed)]
    steps = frames.of(rows, COLUMNS)
    return TransferCheck(steps, summarise(steps, advice))
