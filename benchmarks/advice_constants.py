"""Fit the constants of the advice, and judge them on models that gave none.

    python benchmarks/advice_constants.py --out results/published/constants

Public sweeps give the exponent in the rank; our models give the displacement constant (``gain_policies``) and the
exponent in the number of steps (``steps_policies``), and our runs that in the number of records and the factor of the
schedule. The spreads of a pair and of the rank are fitted to pairs of best rates at one gain, the spread of the gain to
our pairs with two gains, since a single public model has such pairs; every model has the same weight. Coverage is that
of the stated 90% ranges: of pairs at one gain with the exponent and the spreads that the other models give, of public
pairs with two gains by constants that none of them gave. Our own pairs with two gains are the only ones that are judged
by their own spread.
"""

import argparse
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from gain_policies import FITTED_SEEDS
from scipy.optimize import minimize
from steps_policies import chosen_way, spread_over_models

from rora_theory.advice.best_rate import QUANTILE
from rora_theory.evidence.policies import LEFT_OUT, policies_for
from rora_theory.evidence.regrets import regrets_on_sweeps
from rora_theory.evidence.sweeps import load_sweeps, read_run_table
from rora_theory.laws.displacement import best_rate_factor
from rora_theory.runs import frames

PUBLISHED = Path(__file__).parents[1] / "results" / "published"
TABLES = Path(__file__).parents[1] / "rora_theory" / "evidence" / "tables"

OURS = {
    "horizon": ("SmolLM2-135M", "constant"),
    "horizon_cosine": ("SmolLM2-135M", "cosine"),
    "horizon_gemma": ("Gemma 3 270M", "constant"),
    "horizon_gemma_cosine": ("Gemma 3 270M", "cosine"),
}
"""Model and schedule of each folder of our runs."""

OURS_BY_SEED = {"small_models": "small model", "gain_seeds/smollm2": "SmolLM2-135M", "gain_seeds/gemma": "Gemma 3 270M"}
"""Model of each folder of our runs over G, with data of its own for each seed (``benchmarks/gain_laws.py``)."""

MIN_STEPS = 64
"""Fewest steps of our runs that count: shorter ones end during the first drop of the loss."""

MIN_BATCH_SPREAD = 0.1
"""Smallest standard deviation of the exponent in the batch size, as few pairs show none."""

EVIDENCE_RANK = 16
"""Lowest rank of the pairs whose regrets the advice quotes."""

DERIVED_RUNS = {"qwen2.5-7b": 51, "qwen3-4b": 50}
"""Number of runs with adapters in the sweeps of which the package has derived tables only."""

MIN_RANK = 4
"""Lowest rank that counts for the exponent: users rarely choose less, and the slope is steeper below."""


@dataclass(frozen=True)
class BestRate:
    """Best rate of a setting inside its grid.

    Attributes:
      model: Name of the model.
      rank: Rank of the adapter.
      gain: G, scaling times rank.
      steps: Number of optimizer steps.
      schedule: Schedule of the learning rate.
      log_rate: Natural logarithm of the best rate.
    """

    model: str
    rank: int
    gain: float
    steps: int
    schedule: str
    log_rate: float


class Pair(NamedTuple):
    """Two best rates of one model, steps and schedule.

    Attributes:
      model: Name of the model.
      rank_growth: Logarithm of the ratio of the ranks.
      gain_growth: Logarithm of the ratio of the gains.
      residual: Logarithm of the ratio of the best rates minus the law's.
    """

    model: str
    rank_growth: float
    gain_growth: float
    residual: float


def our_best_rates() -> list[BestRate]:
    """Return the best rates of our runs that lie inside their grids."""
    rates = []
    for folder, (model, schedule) in OURS.items():
        table = pd.read_csv(PUBLISHED / folder / "best.csv")
        inside = table[table["edge"].isna() & table["rank"].notna() & (table["step"] >= MIN_STEPS)]
        rates += [
            BestRate(model, int(row.rank), float(row.gain), int(row.step), schedule, math.log(row.best_rate))
            for row in inside.itertuples()
        ]
    for folder, model in OURS_BY_SEED.items():
        table = pd.read_csv(PUBLISHED / folder / "best.csv").query("estimator == 'three points'")
        # Later runs of the larger models, those under cosine decay among them, are tests as in `gain_policies`.
        if folder.startswith("gain_seeds"):
            seeds = FITTED_SEEDS[Path(folder).name]
            table = table[(table["schedule"] == "constant") & table["seed"].isin(seeds)]
        # Readings on the way are of the same runs.
        inside = table[table["edge"].isna() & (table["steps"] == table.groupby("schedule")["steps"].transform("max"))]
        logs = np.log(inside["best_rate"]).groupby([inside[name] for name in ("rank", "gain", "steps", "schedule")])
        rates += [BestRate(model, *setting, log_rate) for setting, log_rate in logs.mean().items()]
    return rates


def public_best_rates() -> list[BestRate]:
    """Return the best rates of the public sweeps that lie inside their grids."""
    table = pd.read_csv(TABLES / "best_rates.csv")
    return [
        BestRate(row.model, int(row.rank), float(row.gain), int(row.steps), row.source, math.log(row.best_rate))
        for row in table[table["place"] == "inside"].itertuples()
    ]


def fit_rank_exponent(rates: Sequence[BestRate]) -> tuple[float, float, int]:
    """Fit the exponent in the rank at one gain within models; return it, its error over models, and their number."""
    by_model: dict[str, list[BestRate]] = {}
    for rate in rates:
        if rate.rank >= MIN_RANK:
            by_model.setdefault(rate.model, []).append(rate)
    sums = []
    for members in by_model.values():
        if len(members) < 2:
            continue
        x = np.log([rate.rank for rate in members])
        y = np.array([rate.log_rate for rate in members])
        sums.append(((x - x.mean()) @ (y - y.mean()), (x - x.mean()) @ (x - x.mean())))
    table = np.array(sums)
    exponent = table[:, 0].sum() / table[:, 1].sum()
    left_out = (table[:, 0].sum() - table[:, 0]) / (table[:, 1].sum() - table[:, 1])
    count = len(table)
    error = math.sqrt((count - 1) / count * ((left_out - left_out.mean()) ** 2).sum())
    return float(exponent), error, count


def pairs_of(rates: Sequence[BestRate], *, rank_exponent: float, displacement_constant: float) -> list[Pair]:
    """Return all pairs of best rates of one model, steps and schedule, from rank `MIN_RANK` on."""
    pairs = []
    for first, second in itertools.combinations(rates, 2):
        shares_run = (first.model, first.steps, first.schedule) == (second.model, second.steps, second.schedule)
        if not shares_run or min(first.rank, second.rank) < MIN_RANK:
            continue
        rank_growth, gain_growth = math.log(second.rank / first.rank), math.log(second.gain / first.gain)
        law = rank_exponent * rank_growth + math.log(
            best_rate_factor(first.gain, second.gain, displacement_constant=displacement_constant)
        )
        pairs.append(Pair(first.model, rank_growth, gain_growth, second.log_rate - first.log_rate - law))
    return pairs


def is_at_one_gain(pair: Pair) -> bool:
    """Return whether the two best rates of a pair share a gain."""
    return abs(pair.gain_growth) < 1e-3


def deviations(pairs: Sequence[Pair], spreads: Sequence[float]) -> np.ndarray:
    """Return the standard deviation of every pair's residual for the spreads of a pair, the rank and the gain."""
    pair, rank, gain = spreads
    growths = np.array([(item.rank_growth, item.gain_growth) for item in pairs])
    return np.sqrt(pair**2 + (rank * growths[:, 0]) ** 2 + (gain * growths[:, 1]) ** 2)


def model_weights(pairs: Sequence[Pair]) -> np.ndarray:
    """Return the weight of every pair, of which those of a model sum to 1."""
    models = [pair.model for pair in pairs]
    return np.array([1 / models.count(model) for model in models])


def fit_spreads(pairs: Sequence[Pair]) -> tuple[float, float]:
    """Fit the spreads of a pair and of the rank to pairs at one gain, every model with the same weight."""
    residuals = np.array([pair.residual for pair in pairs])
    weights = model_weights(pairs)

    def negative_likelihood(logs: np.ndarray) -> float:
        sizes = deviations(pairs, (*np.exp(logs), 0.0))
        return float(weights @ (0.5 * (residuals / sizes) ** 2 + np.log(sizes)))

    pair, rank = np.exp(minimize(negative_likelihood, np.log([0.1, 0.05]), method="Nelder-Mead").x).tolist()
    return pair, rank


def fit_gain_spread(pairs: Sequence[Pair], *, pair: float, rank: float) -> float:
    """Fit the spread of the gain to pairs with two gains, given the others, every model with the same weight."""
    residuals = np.array([item.residual for item in pairs])
    weights = model_weights(pairs)

    def negative_likelihood(log: np.ndarray) -> float:
        sizes = deviations(pairs, (pair, rank, float(np.exp(log[0]))))
        return float(weights @ (0.5 * (residuals / sizes) ** 2 + np.log(sizes)))

    return float(np.exp(minimize(negative_likelihood, np.log([0.1]), method="Nelder-Mead").x[0]))


def coverage(pairs: Sequence[Pair], spreads: Sequence[float]) -> float:
    """Return the share of pairs whose residual lies inside the stated range."""
    residuals = np.array([pair.residual for pair in pairs])
    return float(np.mean(np.abs(residuals) <= QUANTILE * deviations(pairs, spreads)))


def summarise_displacement_constant() -> tuple[float, float, str]:
    """Return K, the spread of its logarithm and its source: the geometric mean of our models' own constants.

    A model's own constant has the lowest regret on its runs, see `gain_policies`. Public models give none, so that
    their runs with two gains remain a test.
    """
    own = pd.read_csv(PUBLISHED / "gain_policies" / "constants.csv").query("law == 'displacement law' and is_ours")
    logs = np.log(own["constant"])
    return float(np.exp(logs.mean())), float(logs.std()), f"{', '.join(own['model'])}: the K of the lowest regret"


def steps_exponent(estimator: str = "three points") -> tuple[float, float, str]:
    """Return the exponent in the steps that `steps_policies` chose, its spread over models, and its source."""
    folder = PUBLISHED / "steps_policies"
    way = chosen_way(pd.read_csv(folder / "policies.csv"))
    table = pd.read_csv(folder / "exponents.csv")
    table = table[table["estimator"] == estimator]
    value = float(table.set_index(["model", "way"]).loc[("all models", way), "power"])
    own = table[table["model"] != "all models"]
    models = ", ".join(own["model"].unique())
    return value, spread_over_models(own, value), f"{models}: the exponent of the {way}"


def schedule_factor() -> tuple[float, float, str]:
    """Return the best peak rate under cosine decay over the best constant rate, and the spread of its logarithm."""
    table = pd.read_csv(PUBLISHED / "horizon_cosine" / "comparisons.csv")
    logs = np.log(table[(table["compared_with"] == "schedule constant") & (table["step"] >= MIN_STEPS)]["ratio"])
    return float(np.exp(logs.mean())), float(logs.std()), "SmolLM2-135M, 64 and 256 steps, one seed"


def batch_exponent(estimator: str = "three points") -> tuple[float, float, str]:
    """Return the exponent in the batch size at one number of steps, with its spread.

    Of the pairs of one setting, which share their runs, the one that is furthest apart counts.
    """
    table = pd.read_csv(PUBLISHED / "batch_size" / "exponents.csv")
    table = table[table["estimator"] == estimator]
    table = table.assign(growth=table["to_batch"] / table["from_batch"]).sort_values("growth")
    table = table.groupby(["rank", "gain", "schedule"], sort=False).tail(1)
    # Half of the half width of a 95% interval is about a standard error.
    spread = float(np.nanmax([table["exponent"].std(), table["half_width"].max() / 2, MIN_BATCH_SPREAD]))
    records = f"{table['from_batch'].min()} to {table['to_batch'].max()} records"
    source = f"SmolLM2-135M, {len(table)} {'pair' if len(table) == 1 else 'pairs'}, 64 steps, {records}, one seed"
    return float(table["exponent"].mean()), spread, source


def whole_curve_values() -> dict[str, float]:
    """Return the constants whose best rates come from the whole curve, in place of the three lowest losses."""
    ratios = pd.read_csv(PUBLISHED / "horizon_cosine" / "ratios.csv")
    ratios = ratios.query("loss_on == 'all' and estimate == 'whole curve' and compared_with == 'schedule constant'")
    cosine = ratios[ratios["step"] >= MIN_STEPS]["ratio"]
    public = pd.read_csv(PUBLISHED / "evidence" / "exponents.csv")
    public = public[(public["source"] == "tinker") & (public["from_rank"] == MIN_RANK)].set_index("method")
    return {
        "rank_exponent": float(public.loc["registration", "exponent"]),
        "steps_exponent": steps_exponent("whole curve")[0],
        "batch_exponent": batch_exponent("whole curve")[0],
        "cosine": float(np.exp(np.log(cosine).mean())),
    }


def evidence_rows() -> pd.DataFrame:
    """Return the regrets that the advice quotes: keeping the rate, and the advice with constants of other models.

    The pairs have ranks of `EVIDENCE_RANK` and more, and best rates inside their grids.
    """
    sweeps = load_sweeps("tinker")
    costs = pd.concat(
        [regrets_on_sweeps(sweeps, lambda sweep: policies_for(sweep, sweeps)), pd.read_csv(TABLES / "regrets.csv")]
    )
    costs = costs[(costs["old_place"] == "inside") & (costs["place"] == "inside")]
    runs = read_run_table(TABLES.parent / "tinker_sft_sweep.csv")
    counts = DERIVED_RUNS | {"tinker": len(runs)}
    models = dict.fromkeys(DERIVED_RUNS, 1) | {"tinker": len({run.model for run in runs})}
    rows = []
    for name, sources, first_rank in (
        ("fixed_gain", ("tinker", "qwen3-4b"), EVIDENCE_RANK),
        ("fixed_gain_all_ranks", ("tinker", "qwen3-4b"), 1),
        ("alpha_r", ("qwen2.5-7b",), EVIDENCE_RANK),
    ):
        part = costs[costs["source"].isin(sources) & (costs[["old_rank", "rank"]].min(axis=1) >= first_rank)]
        keep, advice = (part[part["policy"] == policy]["regret"] for policy in ("keep the rate", LEFT_OUT))
        rows.append(
            {"name": name, "runs": sum(counts[source] for source in sources)}
            | {"models": sum(models[source] for source in sources)}
            | {"compared": part["model"].nunique(), "pairs": len(keep)}
            | {"keep_mean": keep.mean(), "keep": keep.max(), "advice_mean": advice.mean(), "advice": advice.max()}
        )
    return pd.DataFrame(rows)


def growth_rows() -> pd.DataFrame:
    """Return the regrets of the sweep with alpha = r by the factor by which the gain changes, in either direction."""
    costs = pd.read_csv(TABLES / "regrets.csv")
    costs = costs[(costs["source"] == "qwen2.5-7b") & (costs["old_place"] == "inside") & (costs["place"] == "inside")]
    ratios = (costs["gain"] / costs["old_gain"]).round(6)
    rows = []
    for growth, part in costs.groupby(np.maximum(ratios, 1 / ratios).round()):
        keep, power, advice = (
            part[part["policy"] == policy]["regret"] for policy in ("keep the rate", "G^-0.75", LEFT_OUT)
        )
        rows.append(
            {"growth": growth, "pairs": len(keep), "keep_mean": keep.mean(), "keep": keep.max()}
            | {"power_mean": power.mean(), "power": power.max()}
            | {"advice_mean": advice.mean(), "advice": advice.max()}
        )
    return pd.DataFrame(rows)


def main() -> None:
    """Write the constants, the settings behind them, the regrets that the advice quotes, and the coverage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=PUBLISHED / "constants")
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    public, ours = public_best_rates(), our_best_rates()
    tinker = [rate for rate in public if rate.schedule == "tinker"]
    exponent, exponent_error, models = fit_rank_exponent(tinker)
    constant, constant_spread, constant_source = summarise_displacement_constant()
    law = {"rank_exponent": exponent, "displacement_constant": constant}
    pairs = pairs_of([*public, *ours], **law)
    at_one_gain = [pair for pair in pairs if is_at_one_gain(pair)]
    our_models = list(dict.fromkeys(rate.model for rate in ours))
    lowest, highest = (function(rate.gain for rate in ours) for function in (min, max))
    pair_spread, rank_spread = fit_spreads(at_one_gain)
    gain_spread = fit_gain_spread(
        [pair for pair in pairs if pair.model in our_models and not is_at_one_gain(pair)],
        pair=pair_spread,
        rank=rank_spread,
    )
    rows = []
    for model in dict.fromkeys(pair.model for pair in pairs):
        # The exponent and the spreads of the other models.
        others = [rate for rate in tinker if rate.model != model]
        left_out = pairs_of([*public, *ours], **law | {"rank_exponent": fit_rank_exponent(others)[0]})
        fitted = fit_spreads([pair for pair in left_out if pair.model != model and is_at_one_gain(pair)])
        for changed, own in (
            ("rank", [pair for pair in left_out if pair.model == model and is_at_one_gain(pair)]),
            ("gain", [pair for pair in left_out if pair.model == model and not is_at_one_gain(pair)]),
        ):
            if own:
                share = coverage(own, (*fitted, gain_spread))
                judged = "own spread" if changed == "gain" and model in our_models else "others' constants"
                rows.append(
                    {"model": model, "changed": changed, "judged_by": judged, "pairs": len(own), "coverage": share}
                )
    table = pd.DataFrame(rows)
    (folder / "coverage.csv").write_text(frames.to_csv(table))
    rank_source = f"{models} public models, ranks {MIN_RANK} to 128, G = 32, 780 steps"
    entries = [
        ("displacement_constant", constant, constant_spread, None, constant_source),
        ("rank_exponent", exponent, rank_spread, exponent_error, rank_source),
        ("gain_exponent", 0.0, gain_spread, None, f"{', '.join(our_models)}, G = {lowest:g} to {highest:,g}"),
        ("pair", 0.0, pair_spread, None, "public models and ours, pairs at one G"),
        *(
            (name, value, spread, None, source)
            for name, (value, spread, source) in {
                "steps_exponent": steps_exponent(),
                "batch_exponent": batch_exponent(),
                "cosine": schedule_factor(),
            }.items()
        ),
    ]
    constants = pd.DataFrame(entries, columns=["name", "value", "spread", "standard_error", "source"])
    constants["by_whole_curves"] = constants["name"].map(whole_curve_values())
    (folder / "constants.csv").write_text(frames.to_csv(constants))
    # Range of the settings behind the constants.
    every = [*public, *ours]
    settings = pd.DataFrame([(rate.rank, rate.gain, rate.steps) for rate in every], columns=["rank", "gain", "steps"])
    (folder / "settings.csv").write_text(frames.to_csv(settings.agg(["min", "max"])))
    evidence = evidence_rows()
    (folder / "evidence.csv").write_text(frames.to_csv(evidence))
    (folder / "growth.csv").write_text(frames.to_csv(growth_rows()))
    print(evidence.round(5).to_string(index=False))
    print(constants.to_string(index=False))
    for (changed, judged), part in table.groupby(["changed", "judged_by"]):
        share, mean = np.average(part["coverage"], weights=part["pairs"]), part["coverage"].mean()
        print(
            f"{changed}, {judged}: {share:.0%} of {part['pairs'].sum()} pairs of {len(part)} models, mean over models "
            f"{mean:.0%}"
        )
    judged = table[table["judged_by"] == "others' constants"]
    share = np.average(judged["coverage"], weights=judged["pairs"])
    print(f"The stated 90% ranges hold {share:.0%} of the best rates of models that gave no constant.")


if __name__ == "__main__":
    main()
