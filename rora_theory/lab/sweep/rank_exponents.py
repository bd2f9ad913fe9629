"""Exponents in the rank of an adapted layer's change during training.

The input rows come from `controlled_grid`: one row per cell (`CELL`), seed and step, with all fields of
`controlled.Measures` and whether the run has diverged.
"""

import itertools

import pandas as pd

from rora_theory.lab.sweep.controlled import Measures
from rora_theory.runs import frames
from rora_theory.stats import slopes
from rora_theory.stats.estimate import over_seeds

CELL = ("model", "trained", "optimizer", "rule", "kappa", "rank", "scaling", "learning_rate")
"""Columns that identify a cell."""

QUANTITIES = Measures._fields
"""Measured quantities."""

MEAN_COLUMNS = (*CELL, "step", "seeds", "diverged", *(name for q in QUANTITIES for name in (q, f"{q}_se")))
"""Columns of the table of means over seeds."""

FIT_COLUMNS = (
    "model", "trained", "optimizer", "rule", "kappa", "range", "lowest_rank", "highest_rank", "ranks", "step",
    "quantity", "slope", "standard_error", "seeds", "verdict", "loss_left",
)  # fmt: skip
"""Columns of the table of fits."""

FITTED = ("output_train", "output_held_out", "delta_frobenius")
"""Quantities with a fitted slope."""

SATURATED = 0.5
"""Training loss relative to its initial value below which the loss, not the step, limits the output change."""


def summarise_seeds(table: pd.DataFrame) -> pd.DataFrame:
    """Compute means over seeds with standard errors, one row per cell and step, without diverged seeds.

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

    Returns:
      A table with the columns `FIT_COLUMNS`.
    """
    ranks, steps = (sorted(table[name].unique().tolist()) for name in ("rank", "step"))
    # All ranks, and the upper half if that leaves two or more.
    ranges = {"all": ranks} if len(ranks) < 4 else {"all": ranks, "upper": ranks[len(ranks) // 2 :]}
    fits = []
    for cell, cell_rows in table.groupby(list(CELL[:5]), sort=False):
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
                fits.append(
                    dict(zip(CELL[:5], cell, strict=True))
                    | {"range": span, "lowest_rank": min(fitted_ranks), "highest_rank": max(fitted_ranks)}
                    | {"ranks": len(fitted_ranks), "step": step, "quantity": quantity}
                    | slopes.seed_fit(fitted_ranks, values).row()
                    | {"loss_left": (loss / start_loss).min()}
                )
    return pd.DataFrame(fits, columns=FIT_COLUMNS)


def describe_fits(fits: pd.DataFrame) -> str:
    """Return a sentence with the settings whose output change on training inputs does not depend on the rank.

    It is about the last step with both factors trained, and about the upper half of the ranks if there are four.
    """
    last = fits[(fits["step"] == fits["step"].max()) & (fits["quantity"] == "output_train")]
    last = last[last["trained"] == "both"]
    upper = last[last["range"] == "upper"]
    last = last if upper.empty else upper
    if last.empty:
        return "No setting has an output change at two ranks without a diverged seed. Use lower learning rates."
    flat = [f"{row['model']} {row['optimizer']} {row['rule']}" for row in frames.rows(last[last["verdict"] == "flat"])]
    return (
        f"After {last['step'].iloc[0]} steps the output change on training inputs does not depend on the rank from "
        f"r = {last['lowest_rank'].min()} on for {len(flat)} of {len(last)} combinations of model, optimizer and rule"
        f"{': ' if flat else ''}{', '.join(flat)}."
    )
