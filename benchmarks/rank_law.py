"""Judge mechanisms by which the best rate could depend on the rank at one gain, on models that gave no constant.

    python benchmarks/rank_law.py --out results/published/rank_law

The mechanisms are those of `rora_theory.laws.rank`, with the crossing ranks that were measured in SmolLM2-135M and
Gemma 3 270M (held-out tokens, Adam), a power law, the depth of the lowest loss (capacity), and no dependence.
``predictions.csv`` of the folder was committed before any best rate was fitted; ``outcomes.csv`` stands beside it, and
``judgement.csv`` has the squared error of the logarithm of the best rate within models that were left out.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from rora_theory.laws.rank import cross_talk_factor
from rora_theory.runs import frames

PUBLISHED = Path(__file__).parents[1] / "results" / "published"
TABLES = Path(__file__).parents[1] / "rora_theory" / "evidence" / "tables"
REGIMES = {"SmolLM2-135M": "regime_held_out", "Gemma 3 270M": "regime_gemma"}
OURS = {
    ("SmolLM2-135M", "constant"): "horizon",
    ("SmolLM2-135M", "cosine"): "horizon_cosine",
    ("Gemma 3 270M", "constant"): "horizon_gemma",
    ("Gemma 3 270M", "cosine"): "horizon_gemma_cosine",
}
REFERENCE = "power law"
"""Mechanism with which all others are compared."""

Law = Callable[[np.ndarray, np.ndarray, float], np.ndarray]
"""Logarithm of the best rate up to a constant, from the ranks, the lowest losses and the law's constant."""


@dataclass(frozen=True)
class Mechanism:
    """Law with the values of its constant among which the best is chosen.

    Attributes:
      name: Name in the tables.
      law: Function of the ranks, the lowest losses and the constant.
      constants: Candidate values; one value if nothing is fitted.
    """

    name: str
    law: Law
    constants: Sequence[float]


def crossing_ranks(model: str) -> np.ndarray:
    """Return the linear terms of Adam's first step of every module on held-out tokens, which are r* for large r*."""
    table = pd.read_csv(PUBLISHED / REGIMES[model] / "crossing_ranks.csv")
    chosen = table[
        (table["split"] == "heldout") & (table["optimizer"] == "adam") & (table["init"] == "kaiming_uniform")
    ]
    return chosen["linear_term"].to_numpy()


def mechanisms(values: np.ndarray) -> list[Mechanism]:
    """Return the mechanisms, those of the modules with the given crossing ranks."""

    def cross_talk(mechanism: str, *, by_module: bool, own: Sequence[float] | None = None) -> Law:
        def law(ranks: np.ndarray, _: np.ndarray, constant: float) -> np.ndarray:
            factors = [
                cross_talk_factor(
                    int(rank), values if own is None else own, mechanism=mechanism, weight=constant, by_module=by_module
                )  # type: ignore[arg-type]
                for rank in ranks
            ]
            return np.log(factors)

        return law

    grid = np.geomspace(0.01, 30, 161)
    return [
        Mechanism("no dependence", lambda ranks, _, __: np.zeros(len(ranks)), [0.0]),
        Mechanism(REFERENCE, lambda ranks, _, power: power * np.log(ranks), np.linspace(0, 0.5, 501)),
        Mechanism("curvature, one crossing rank", cross_talk("curvature", by_module=False, own=[1.0]), grid),
        Mechanism("size, one crossing rank", cross_talk("size", by_module=False, own=[1.0]), grid),
        Mechanism("curvature, module by module, w fitted", cross_talk("curvature", by_module=True), grid),
        Mechanism("size, module by module, w fitted", cross_talk("size", by_module=True), grid),
        Mechanism("curvature, module by module, w = 1", cross_talk("curvature", by_module=True), [1.0]),
        Mechanism("size of the held-out change, no constant", cross_talk("size", by_module=False), [1.0]),
        Mechanism("size, module by module, no constant", cross_talk("size", by_module=True), [1.0]),
        Mechanism(
            "capacity: depth of the lowest loss", lambda _, losses, scale: -scale * losses, np.linspace(0, 400, 801)
        ),
    ]


def squared_errors(table: pd.DataFrame, mechanism: Mechanism) -> np.ndarray:
    """Return the squared errors of the centred logarithms, by constant and model."""
    errors = []
    for constant in mechanism.constants:
        by_model = []
        for _, rows in table.groupby("model", sort=False):
            predicted = mechanism.law(rows["rank"].to_numpy(), rows["best_loss"].to_numpy(), constant)
            measured = np.log(rows["best_rate"].to_numpy())
            by_model.append(np.sum((predicted - predicted.mean() - measured + measured.mean()) ** 2))
        errors.append(by_model)
    return np.array(errors)


def leave_models_out(errors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the error of every model by the constant that the other models choose, and the index of that constant."""
    chosen = [int(np.argmin(np.delete(errors, model, axis=1).sum(axis=1))) for model in range(errors.shape[1])]
    return errors[chosen, range(errors.shape[1])], np.array(chosen)


def judge(table: pd.DataFrame, values: np.ndarray, first_rank: int) -> pd.DataFrame:
    """Compare the mechanisms on models with two or more best rates inside their grids from a rank on."""
    table = table[table["rank"] >= first_rank]
    table = table[table.groupby("model")["rank"].transform("count") > 1]
    left_out, rows = {}, []
    for mechanism in mechanisms(values):
        errors = squared_errors(table, mechanism)
        left_out[mechanism.name], chosen = leave_models_out(errors)
        constants = np.asarray(mechanism.constants)[chosen]
        count = len(constants)
        rows.append(
            {"first_rank": first_rank, "mechanism": mechanism.name}
            | {"constant": mechanism.constants[int(np.argmin(errors.sum(axis=1)))]}
            | {"constant_error": math.sqrt((count - 1) / count * np.sum((constants - constants.mean()) ** 2))}
            | {"models": count, "best_rates": len(table), "squared_error": left_out[mechanism.name].sum()}
        )
    for row in rows:
        difference = left_out[row["mechanism"]] - left_out[REFERENCE]
        row["difference"] = difference.sum()
        row["half_width"] = 1.96 * math.sqrt(len(difference)) * difference.std(ddof=1)
        is_apart = abs(row["difference"]) > row["half_width"]
        row["verdict"] = "" if row["mechanism"] == REFERENCE else "undecided"
        if is_apart:
            row["verdict"] = "worse" if row["difference"] > 0 else "better"
    return pd.DataFrame(rows)


def outcomes() -> pd.DataFrame:
    """Return the measured exponents of our models from rank 8 to 128 at one gain, with half of their 95% intervals."""
    rows = []
    for (model, schedule), folder in OURS.items():
        table = pd.read_csv(PUBLISHED / folder / "exponents.csv")
        table = table[
            (table["over"] == "rank") & (table["first"] == 8) & (table["second"] == 128) & table["edge"].isna()
        ]
        rows += [
            {"model": model, "schedule": schedule, "steps": int(row.step), "gain": row.at}
            | {"exponent": row.exponent, "half_width": row.half_width, "seeds": int(row.seeds)}
            for row in table[table["step"] >= 64].itertuples()
        ]
    return pd.DataFrame(rows)


def main() -> None:
    """Write ``judgement.csv`` and ``outcomes.csv``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=PUBLISHED / "rank_law")
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    table = pd.read_csv(TABLES / "best_rates.csv")
    table = table[(table["source"] == "tinker") & (table["place"] == "inside")]
    values = np.concatenate([crossing_ranks(model) for model in REGIMES])
    judgement = pd.concat([judge(table, values, first_rank) for first_rank in (1, 4)])
    (folder / "judgement.csv").write_text(frames.to_csv(judgement))
    (folder / "outcomes.csv").write_text(frames.to_csv(outcomes()))
    print(judgement.round(4).to_string(index=False))
    print(outcomes().round(3).to_string(index=False))
    better = judgement[judgement["verdict"] == "better"]
    print(
        "No mechanism predicts models left out better than the power law."
        if better.empty
        else f"Better than the power law: {', '.join(better['mechanism'])}."
    )


if __name__ == "__main__":
    main()
