"""Exponents in the rank of an adapted layer's change during training, and the questions that they answer.

The input rows come from `training_grid`: one row per cell (`CELL`), seed and step, with all fields of
`controlled.Measures` and whether the run has diverged.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import pandas as pd

from rora_theory.lab.sweep.controlled import Measures, Model
from rora_theory.optimizers import DISPLAY_NAMES, OptimizerName
from rora_theory.runs import frames
from rora_theory.stats import slopes
from rora_theory.stats.estimate import ROUNDING, over_seeds

CELL = ("model", "start", "trained", "optimizer", "rule", "kappa", "rank", "scaling", "learning_rate")
"""Columns that identify a cell."""

QUANTITIES = Measures._fields
"""Measured quantities."""

MEAN_COLUMNS = (*CELL, "step", "seeds", "diverged", *(name for q in QUANTITIES for name in (q, f"{q}_se")))
"""Columns of the table of means over seeds."""

FIT_COLUMNS = (
    "model", "start", "trained", "optimizer", "rule", "kappa", "range", "lowest_rank", "highest_rank", "ranks", "step",
    "quantity", "slope", "standard_error", "seeds", "verdict", "loss_left",
)  # fmt: skip
"""Columns of the table of fits."""

FITTED = ("output_train", "output_held_out", "delta_frobenius", "delta_spectral", "inner", "grad_A", "grad_B")
"""Quantities with a fitted slope."""

MIN_EXPONENT_CHANGE = 0.05
"""Smallest relevant difference of two exponents."""

SATURATED = 0.5
"""Training loss relative to its initial value below which the loss, not the step, limits the output change."""


def summarise_seeds(table: pd.DataFrame) -> pd.DataFrame:
    """Compute means over seeds with standard errors, one row per cell and step, without diverged seeds.

    Args:
      table: Rows of `training_grid`.

    Returns:
      A table with the columns `MEAN_COLUMNS`, which include the number of diverged seeds.
    """
    rows = []
    for cell, group in table.groupby([*CELL, "step"], sort=False):
        # Diverged seeds are counted, but they would make every mean infinite.
        finite = group[group["diverged"] == 0]
        row = dict(zip((*CELL, "step"), cell, strict=True))
        row |= {"seeds": len(group), "diverged": len(group) - len(finite)}
        for name in QUANTITIES if len(finite) else ():
            mean = over_seeds(finite[name].to_numpy(float))
            row[name] = mean.value
            row[f"{name}_se"] = mean.known_error
        rows.append(row)
    return frames.from_rows(rows, MEAN_COLUMNS)


def exponent_fits(table: pd.DataFrame) -> pd.DataFrame:
    """Fit slopes in the rank, over all ranks and over the upper half; ranks with a diverged seed are excluded.

    Args:
      table: Rows of `training_grid`.

    Returns:
      A table with the columns `FIT_COLUMNS`, the ``fitted_ranks``, and the slope of each seed, ``by_seed``.
    """
    ranks, steps = (sorted(table[name].unique().tolist()) for name in ("rank", "step"))
    # All ranks, and the upper half if that leaves two or more.
    ranges = {"all": ranks} if len(ranks) < 4 else {"all": ranks, "upper": ranks[len(ranks) // 2 :]}
    fits = []
    for cell, cell_rows in table.groupby(list(CELL[:6]), sort=False):
        measured = cell_rows.pivot(index="seed", columns=["step", "rank"], values=["diverged", "loss_train", *FITTED])
        for (span, members), step in itertools.product(ranges.items(), steps):
            at_step = measured.xs(step, axis=1, level="step")
            # Ranks at which no seed has diverged by this step.
            fitted_ranks = [rank for rank in members if not at_step["diverged", rank].any()]
            if len(fitted_ranks) < 2:
                continue
            # Mean loss over seeds by rank, now and at the start: their ratio shows how far the training has come.
            loss = at_step["loss_train"][fitted_ranks].mean()
            start_loss = measured.xs(0, axis=1, level="step")["loss_train"][fitted_ranks].mean()
            for quantity in FITTED:
                values = at_step[quantity][fitted_ranks].to_numpy(float)
                if not (values > 0).all():
                    continue  # nothing has changed yet
                fit = slopes.seed_fit(fitted_ranks, values)
                fits.append(
                    dict(zip(CELL[:6], cell, strict=True))
                    | {
                        "range": span,
                        "lowest_rank": min(fitted_ranks),
                        "highest_rank": max(fitted_ranks),
                        "ranks": len(fitted_ranks),
                    }
                    | {"step": step, "quantity": quantity, "slope": fit.slope}
                    | {"standard_error": fit.standard_error, "seeds": fit.seeds}
                    | {"verdict": slopes.trend(fit), "loss_left": (loss / start_loss).min()}
                    | {"fitted_ranks": tuple(fitted_ranks), "by_seed": slopes.seed_slopes(fitted_ranks, values)}
                )
    return pd.DataFrame(fits, columns=[*FIT_COLUMNS, "fitted_ranks", "by_seed"])


class Answer(NamedTuple):
    """Answer to a question about the exponents.

    Attributes:
      question: Question about the exponents.
      answer: Verdicts along the steps.
      figures: Slopes with standard errors.
    """

    question: str
    answer: str
    figures: str


def answers(
    fits: pd.DataFrame,
    *,
    models: Sequence[Model],
    optimizers: Sequence[OptimizerName],
    kappas: Sequence[float],
    ranks: Sequence[int],
    overlap: float,
    freeze_control: bool,
) -> list[Answer]:
    """Answer questions about claims in the literature, for every model with A random at the start.

    Args:
      fits: Table from `exponent_fits`.
      models: Models that were trained with A random at the start.
      optimizers: Optimizers that were used.
      kappas: Exponents of the scaling rules.
      ranks: Ranks of the adapters.
      overlap: Overlap of the inputs.
      freeze_control: Whether B was also trained alone.

    Returns:
      The answers.
    """
    collected: list[Answer] = []
    ranks = sorted(ranks)
    upper_range = f"from r = {ranks[len(ranks) // 2]} on" if len(ranks) >= 4 else ""

    # Questions about optimizers and rules that were not run have no answer.
    def add(model: str, optimizer: str, quantity: str, kappa: float, question: str, span: str = "all") -> None:
        if optimizer in optimizers and kappa in kappas:
            rows = _fits_of_curve(fits, model, optimizer, quantity, kappa, span=span)
            collected.append(Answer(f"{model}, {question}", verdicts_by_step(rows), slopes_by_step(rows)))

    held_out = f"output change on held-out inputs (overlap {overlap:g})"
    for model in models:
        # Is the output change on training inputs flat, over all ranks and over the upper half?
        for span, where in {"all": "", "upper": upper_range}.items():
            if span == "all" or where:
                question = f"SGD: output change on training inputs flat under alpha/sqrt(r) (rsLoRA's theorem) {where}"
                add(model, "sgd", "output_train", 0.5, question.strip() + "?", span)
                question = f"Adam: output change on training inputs flat under alpha/r, so as r at fixed gamma {where}"
                add(model, "adam", "output_train", 1.0, question.strip() + "?", span)
        # Is it flat on held-out inputs?
        add(model, "sgd", "output_held_out", 0.25, f"SGD: {held_out} flat under kappa = 1/4?")
        add(model, "adam", "output_held_out", 0.5, f"Adam: {held_out} flat under kappa = 1/2?")
        # Does training A change the exponent of the weight change?
        for optimizer, power in (("sgd", 2), ("adam", 1)):
            if optimizer not in optimizers or not freeze_control or 1.0 not in kappas:
                continue
            both, frozen = (
                _fits_of_curve(fits, model, optimizer, "delta_frobenius", 1.0, trained) for trained in ("both", "B")
            )
            question = f"{model}, {DISPLAY_NAMES[optimizer]}: exponent of |dM|_F changes once A moves?"
            trained_slopes, frozen_slopes = (slopes_at_constant_gamma(rows, power) for rows in (both, frozen))
            figures = f"under alpha/r, plus {power}: A trained: {trained_slopes}; A frozen: {frozen_slopes}"
            collected.append(Answer(question, exponent_change(both, frozen), figures))
    return collected


def _fits_of_curve(
    fits: pd.DataFrame,
    model: str,
    optimizer: str,
    quantity: str,
    kappa: float,
    trained: str = "both",
    span: str = "all",
) -> list[dict[Any, Any]]:
    """Return the fits of one curve along the steps, with A random at the start."""
    key: dict[str, Any] = {"model": model, "start": "A", "trained": trained, "range": span}
    key |= {"optimizer": optimizer, "quantity": quantity, "kappa": kappa}
    return frames.where(fits[fits["step"] > 0], key).to_dict("records")


def verdicts_by_step(rows: Sequence[dict[Any, Any]]) -> str:
    """Return a sentence with the verdicts along the steps, marking steps with a loss below half of its start."""
    if not rows:
        return "not measured: the runs diverged"
    # Merge neighbouring steps with the same verdict.
    groups: list[tuple[str, list[str]]] = []
    for row in rows:
        is_saturated = row["loss_left"] < SATURATED
        verdict = row["verdict"] + (" (loss below half)" if is_saturated else "")
        if not groups or groups[-1][0] != verdict:
            groups.append((verdict, []))
        groups[-1][1].append(str(row["step"]))
    return "; ".join(f"{verdict} at step{'s' if len(steps) > 1 else ''} {' '.join(steps)}" for verdict, steps in groups)


def slopes_by_step(rows: Sequence[dict[Any, Any]]) -> str:
    """Format the slopes and standard errors along the steps."""
    return ", ".join(f"{row['step']}: {row['slope']:+.3f} ± {row['standard_error']:.3f}" for row in rows)


def slopes_at_constant_gamma(rows: Sequence[dict[Any, Any]], power: int) -> str:
    """Format the exponents after dividing out the first step's power of gamma."""
    return ", ".join(
        f"{row['step']}: {row['slope'] + power * row['kappa']:.2f} ± {row['standard_error']:.2f}" for row in rows
    )


def exponent_change(both: Sequence[dict[Any, Any]], frozen: Sequence[dict[Any, Any]]) -> str:
    """Test whether training A changes the exponent, paired by seed, at the last step with a loss above half its start.

    Only slopes over the same ranks are compared, because the slope of a bent curve depends on the ranks. A change is
    "small" if its interval excludes 0 and lies within `MIN_EXPONENT_CHANGE`.

    Args:
      both: Fits with both factors trained.
      frozen: Fits with A frozen.

    Returns:
      The verdict with the change of the exponent.
    """
    # Fits of both runs at the same step, with the loss above half of its start.
    pairs = [
        (trained_fit, frozen_fit)
        for trained_fit in both
        for frozen_fit in frozen
        if trained_fit["step"] == frozen_fit["step"]
        and min(trained_fit["loss_left"], frozen_fit["loss_left"]) >= SATURATED
    ]
    # The last step with the same ranks in both runs decides.
    if not pairs:
        return "not settled: the loss is below half of its start at every step"
    same_ranks = [
        (trained_fit, frozen_fit)
        for trained_fit, frozen_fit in pairs
        if trained_fit["fitted_ranks"] == frozen_fit["fitted_ranks"]
    ]
    if not same_ranks:
        return "not settled: other ranks diverged with A trained than with A frozen, at every step"
    trained_fit, frozen_fit = same_ranks[-1]
    fit = slopes.SeedFit.from_estimate(over_seeds(trained_fit["by_seed"] - frozen_fit["by_seed"]))
    is_nonzero = abs(fit.slope) > fit.half_width() + ROUNDING
    verdicts = {"flat": "small" if is_nonzero else "no", "undecided": "undecided"}
    verdict = verdicts.get(slopes.trend(fit, MIN_EXPONENT_CHANGE), "yes")
    return f"{verdict}: by {fit.slope:+.3f} ± {fit.standard_error:.3f} at step {trained_fit['step']}"
