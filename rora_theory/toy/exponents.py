"""How the change of an adapted layer depends on the rank along training: exponents by step, and what they answer.

Rows are those of `training_grid`: of a cell (`CELL`), a seed and a step, every one of `dynamics.Measures` and whether
the run has diverged.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import pandas as pd

from rora_theory.io import frames
from rora_theory.optimizers import WORDS, OptimizerName
from rora_theory.stats import slopes
from rora_theory.stats.estimate import ROUNDING, over_seeds
from rora_theory.toy.dynamics import Measures, Model

CELL = ("model", "start", "trained", "optimizer", "rule", "kappa", "rank", "scaling", "learning_rate")
QUANTITIES = Measures._fields
MEAN_COLUMNS = (*CELL, "step", "seeds", "diverged", *(name for q in QUANTITIES for name in (q, f"{q}_se")))
FIT_COLUMNS = (
    "model", "start", "trained", "optimizer", "rule", "kappa", "range", "lowest_rank", "highest_rank", "ranks", "step",
    "quantity", "slope", "standard_error", "seeds", "verdict", "loss_left",
)  # fmt: skip
FITTED = ("output_train", "output_held_out", "delta_frobenius", "delta_spectral", "inner", "grad_A", "grad_B")

CHANGE = 0.05
"""Least difference of two exponents that counts."""

SATURATED = 0.5
"""Below this share of its start, the training loss bounds the output change and no longer the step does."""


def summarise_seeds(table: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds with their standard errors, a row a cell and step; diverged seeds are counted and left out."""
    found = []
    for named, group in table.groupby([*CELL, "step"], sort=False):
        kept = group[group["diverged"] == 0]
        line = dict(zip((*CELL, "step"), named, strict=True))
        line |= {"seeds": len(group), "diverged": len(group) - len(kept)}
        for name in QUANTITIES if len(kept) else ():
            mean = over_seeds(kept[name].to_numpy(float))
            line[name] = mean.value
            line[f"{name}_se"] = mean.error if mean.has_error else None
        found.append(line)
    return frames.of(found, MEAN_COLUMNS)


def exponent_fits(table: pd.DataFrame) -> pd.DataFrame:
    """Slopes against the rank, over all ranks and over the upper half; ranks with a diverged seed are left out.

    Returns:
      `FIT_COLUMNS`, and ``kept``, the ranks that were fitted, and ``by_seed``, each seed's own slope.
    """
    ranks, steps = (sorted(table[name].unique().tolist()) for name in ("rank", "step"))
    ranges = {"all": ranks} if len(ranks) < 4 else {"all": ranks, "upper": ranks[len(ranks) // 2 :]}
    found = []
    for named, line in table.groupby(list(CELL[:6]), sort=False):
        measured = line.pivot(index="seed", columns=["step", "rank"], values=["diverged", "loss_train", *FITTED])
        for (span, members), step in itertools.product(ranges.items(), steps):
            now = measured.xs(step, axis=1, level="step")
            kept = [rank for rank in members if not now["diverged", rank].any()]
            if len(kept) < 2:
                continue
            loss, origin = (at["loss_train"][kept].mean() for at in (now, measured.xs(0, axis=1, level="step")))
            for quantity in FITTED:
                values = now[quantity][kept].to_numpy(float)
                if not (values > 0).all():
                    continue  # nothing has moved yet
                fit = slopes.seed_fit(kept, values)
                found.append(
                    dict(zip(CELL[:6], named, strict=True))
                    | {"range": span, "lowest_rank": min(kept), "highest_rank": max(kept), "ranks": len(kept)}
                    | {"step": step, "quantity": quantity, "slope": fit.slope}
                    | {"standard_error": fit.standard_error, "seeds": fit.seeds}
                    | {"verdict": slopes.trend(fit), "loss_left": (loss / origin).min()}
                    | {"kept": tuple(kept), "by_seed": slopes.seed_slopes(kept, values)}
                )
    return pd.DataFrame(found, columns=[*FIT_COLUMNS, "kept", "by_seed"])


class Answer(NamedTuple):
    """A question that the run settles, or doesn't."""

    question: str
    answer: str
    figures: str


def answers(
    found: pd.DataFrame,
    *,
    models: Sequence[Model],
    optimizers: Sequence[OptimizerName],
    kappas: Sequence[float],
    ranks: Sequence[int],
    overlap: float,
    freeze_control: bool,
) -> list[Answer]:
    """What the slopes say of the claims in the literature, for every model with A random at the start.

    Args:
      found: of `exponent_fits`.
      models, optimizers, kappas, ranks, overlap: what was trained; A was random at the start.
      freeze_control: whether B was trained alone too.
    """
    listed: list[Answer] = []
    ranks = sorted(ranks)
    far = f"from r = {ranks[len(ranks) // 2]} on" if len(ranks) >= 4 else ""

    def add(model: str, optimizer: str, quantity: str, kappa: float, question: str, span: str = "all") -> None:
        if optimizer in optimizers and kappa in kappas:
            rows = _line(found, model, optimizer, quantity, kappa, span=span)
            listed.append(Answer(f"{model}, {question}", by_step(rows), slopes_by_step(rows)))

    apart = f"output change on held-out inputs (overlap {overlap:g})"
    for model in models:
        for span, where in {"all": "", "upper": far}.items():
            if span == "all" or where:
                theorem = f"SGD: output change on training inputs flat under alpha/sqrt(r) (rsLoRA's theorem) {where}"
                add(model, "sgd", "output_train", 0.5, theorem.strip() + "?", span)
                theta = f"Adam: output change on training inputs flat under alpha/r, so as r at fixed gamma {where}"
                add(model, "adam", "output_train", 1.0, theta.strip() + "?", span)
        add(model, "sgd", "output_held_out", 0.25, f"SGD: {apart} flat under kappa = 1/4?")
        add(model, "adam", "output_held_out", 0.5, f"Adam: {apart} flat under kappa = 1/2?")
        for optimizer, power in (("sgd", 2), ("adam", 1)):
            if optimizer not in optimizers or not freeze_control or 1.0 not in kappas:
                continue
            both, frozen = (
                _line(found, model, optimizer, "delta_frobenius", 1.0, trained) for trained in ("both", "B")
            )
            question = f"{model}, {WORDS[optimizer]}: exponent of |dM|_F changes once A moves?"
            shown = f"A trained: {at_gamma_one(both, power)}; A frozen: {at_gamma_one(frozen, power)}"
            listed.append(Answer(question, changed(both, frozen), f"under alpha/r, plus {power}: {shown}"))
    return listed


def _line(
    found: pd.DataFrame,
    model: str,
    optimizer: str,
    quantity: str,
    kappa: float,
    trained: str = "both",
    span: str = "all",
) -> list[dict[Any, Any]]:
    """The fits of one curve, A random at the start, along the steps."""
    wanted: dict[str, Any] = {"model": model, "start": "A", "trained": trained, "range": span}
    wanted |= {"optimizer": optimizer, "quantity": quantity, "kappa": kappa}
    return frames.where(found[found["step"] > 0], wanted).to_dict("records")


def by_step(rows: Sequence[dict[Any, Any]]) -> str:
    """The verdicts along the steps, in words; steps at which the loss has come below half are named so."""
    if not rows:
        return "not measured: the runs diverged"
    parts = []
    for row in rows:
        ended = row["loss_left"] < SATURATED
        parts.append((row["verdict"] + (" (loss below half)" if ended else ""), str(row["step"])))
    groups: list[tuple[str, list[str]]] = []
    for verdict, step in parts:
        if not groups or groups[-1][0] != verdict:
            groups.append((verdict, []))
        groups[-1][1].append(step)
    return "; ".join(f"{verdict} at step{'s' if len(steps) > 1 else ''} {' '.join(steps)}" for verdict, steps in groups)


def slopes_by_step(rows: Sequence[dict[Any, Any]]) -> str:
    """Slopes with standard errors along the steps."""
    return ", ".join(f"{row['step']}: {row['slope']:+.3f} ± {row['standard_error']:.3f}" for row in rows)


def at_gamma_one(rows: Sequence[dict[Any, Any]], power: int) -> str:
    """Exponents with the first step's power of gamma divided out."""
    return ", ".join(
        f"{row['step']}: {row['slope'] + power * row['kappa']:.2f} ± {row['standard_error']:.2f}" for row in rows
    )


def changed(both: Sequence[dict[Any, Any]], frozen: Sequence[dict[Any, Any]]) -> str:
    """Whether training A changes the exponent, seed by seed, at the last step before the loss is below half.

    Only slopes over the same ranks are compared: a curve that bends has another slope without the ranks that diverged.
    "small" is a change that is there, its interval clear of 0, and that does not count, the interval within `CHANGE`.
    """
    pairs = [
        (a, b)
        for a in both
        for b in frozen
        if a["step"] == b["step"] and min(a["loss_left"], b["loss_left"]) >= SATURATED
    ]
    if not pairs:
        return "not settled: the loss is below half of its start at every step"
    alike = [(a, b) for a, b in pairs if a["kept"] == b["kept"]]
    if not alike:
        return "not settled: other ranks diverged with A trained than with A frozen, at every step"
    a, b = alike[-1]
    fit = slopes.SeedFit.from_estimate(over_seeds(a["by_seed"] - b["by_seed"]))
    there = abs(fit.slope) > fit.half_width() + ROUNDING
    word = {"flat": "small" if there else "no", "undecided": "undecided"}.get(slopes.trend(fit, CHANGE), "yes")
    return f"{word}: by {fit.slope:+.3f} ± {fit.standard_error:.3f} at step {a['step']}"
