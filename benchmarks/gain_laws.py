"""Judge the laws of the best rate on LoRA runs of several seeds: the analysis that was written before the runs.

    python benchmarks/gain_laws.py small --out results/published/small_models

The folder has a run folder for each seed from ``benchmarks/gain_grid.py``, each with records of its own, and
``predictions.csv``, which is older than the runs. ``--runs`` names folders with further runs of the seeds: for
``small_more`` those of ``small``, to whose settings it is compared. A seed counts for a setting if all its rates have
finished. Settings of a schedule are compared after the number of steps that the design has for it.

- ``best.csv`` has the best rate of each setting and seed, by the quadratic through the whole curve and by the parabola
  through the lowest loss and its neighbours, with the error over the held-out records. Verdicts rest on the whole
  curve; the tables have both. "near the minimum" was added after the runs, because whole curves depend on the width of
  their grids: the lowest point of a cubic in log loss through all rates within a factor of 3.5 of the lowest loss.
- ``mixed.csv`` is the primary analysis: one mixed model of log2 of the best rate for each schedule and number of steps,
  fitted by restricted maximum likelihood. A setting has a fixed effect, a seed a random one, and a best rate the error
  over its held-out records and a residual of unknown size. A best rate at an edge of its rates is left out.
- ``outcomes.csv`` has each predicted ratio beside the measured one, with a verdict on every law. The others are its
  rivals. Two seeds or fewer decide nothing.
- ``tokens.csv`` has each ratio by the loss over all tokens, which the runs learned and which all other tables have, and
  by that over the answers: means over the seeds whose two best rates lie inside their grids.
- ``laws.csv`` compares the laws as wholes: the same model with one free level and the law's ratios, by maximum
  likelihood, with its AIC.
- ``regret.csv`` has what each policy costs in nats per token: the rate that the other seeds tuned at the first setting
  of a predicted ratio, carried to the second one of one seed. With a single seed it is tuned on that seed, and
  ``tuned_on`` says so. A policy that gives the same rate as an earlier one has no row.
- ``policies.csv`` has the mean over seeds for each pair of settings, and over all pairs of a schedule in which the same
  changes.
- ``steps_policies.csv`` has the mean regret over seeds of powers of the number of steps: the constant rate that the
  other seeds tuned at the reference setting after fewer steps, carried to more.
- ``lowest_losses.csv`` has what G does beyond the rate: the lowest loss at each G, at its own best rate, minus that at
  G = 32 and the same rank. Differences are paired by seed; seeds with a best rate at an edge of its rates are left out.
"""

import argparse
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import mul
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy
from gain_grid import DESIGNS, REFERENCE_GAIN, REFERENCE_RANK, Design, GridSetting
from jaxtyping import Float
from sweep_folders import DRAWS, distinct_factors, mean_regrets

from rora_theory.advice.best_rate import Run
from rora_theory.advice.constants import CONSTANTS
from rora_theory.evidence.policies import (
    RatePolicy,
    displacement_law,
    measured_policies,
    power_of_gain,
    rate_policy,
    with_rank,
)
from rora_theory.evidence.sweeps import REACH
from rora_theory.lab.finetune.config import LossOn
from rora_theory.lab.sweep.curves import ESTIMATORS, curves_at
from rora_theory.lab.sweep.runs import SweepRun, read_runs, read_tokens
from rora_theory.optimizers import Schedule
from rora_theory.runs import frames
from rora_theory.stats.estimate import Estimate, over_seeds
from rora_theory.stats.rate_curves import Curve, estimate
from rora_theory.stats.regret import regret
from rora_theory.stats.verdicts import judge_range

STEPS_POLICIES = {"keep the rate": 0.0, "T^-0.25": -0.25, "T^-0.5": -0.5}
"""Exponents in the number of steps whose regret is computed."""

REFERENCE = GridSetting(REFERENCE_RANK, REFERENCE_GAIN, "constant", 1024).name
"""Rank and G of the setting to which all others are compared."""

Curves = Mapping[GridSetting, Curve]
"""Loss curves of a seed."""


@dataclass(frozen=True)
class MixedFit:
    """Fitted mixed model.

    Attributes:
      effects: Fixed effects.
      covariance: Covariance of the fixed effects.
      seed_spread: Standard deviation of the seeds.
      residual_spread: Standard deviation of a best rate around setting and seed, beside its own error.
      log_likelihood: Logarithm of the maximised likelihood, restricted or not.
    """

    effects: Float[np.ndarray, " effects"]
    covariance: Float[np.ndarray, "effects effects"]
    seed_spread: float
    residual_spread: float
    log_likelihood: float


def fit_mixed(
    values: Float[np.ndarray, " n"],
    design: Float[np.ndarray, "n effects"],
    seeds: Sequence[int],
    errors: Float[np.ndarray, " n"],
    *,
    restricted: bool = True,
) -> MixedFit:
    r"""Fit y = X b + u[seed] + e with known measurement errors.

    The variance of y is :math:`V = \tau^2 Z Z^\top + \mathrm{diag}(\sigma^2 + s_i^2)` with the seeds' variance
    :math:`\tau^2`, the residual variance :math:`\sigma^2` and the known errors :math:`s_i`. Given both, b is the
    generalised least-squares estimate; both maximise the (restricted) likelihood.

    Args:
      values: Measured values y.
      design: Matrix X of full column rank.
      seeds: Seed of each value.
      errors: Standard error of each value.
      restricted: Whether to use the restricted likelihood, which corrects the variances for the fitted effects;
        likelihoods of models with different effects are compared without it.
    """
    same_seed = (np.asarray(seeds)[:, None] == np.asarray(seeds)).astype(float)

    def solve(variances: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        covariance = variances[0] * same_seed + np.diag(variances[1] + errors**2 + 1e-12)
        factor = scipy.linalg.cho_factor(covariance, lower=True)
        information = design.T @ scipy.linalg.cho_solve(factor, design)
        effects = np.linalg.solve(information, design.T @ scipy.linalg.cho_solve(factor, values))
        residuals = values - design @ effects
        deviance = residuals @ scipy.linalg.cho_solve(factor, residuals) + 2 * np.log(np.diag(factor[0])).sum()
        count = len(values)
        if restricted:
            deviance += np.linalg.slogdet(information)[1]
            count -= design.shape[1]
        return float(deviance + count * math.log(2 * math.pi)), effects, np.linalg.inv(information)

    # Start from several pairs of variances: the likelihood may have its maximum at zero for either.
    def objective(spreads: np.ndarray) -> float:
        return solve(spreads**2)[0]

    starts = itertools.product((0.01, 0.3), repeat=2)
    bounds = [(0.0, 10.0)] * 2
    fits = [scipy.optimize.minimize(objective, start, bounds=bounds, method="L-BFGS-B") for start in starts]
    best = min(fits, key=lambda fit: fit.fun)
    deviance, effects, covariance = solve(best.x**2)
    return MixedFit(effects, covariance, float(best.x[0]), float(best.x[1]), -deviance / 2)


def read_curves(folder: Path, design: Design, loss_on: LossOn = "all") -> dict[GridSetting, Curve]:
    """Return the curves of a seed's folder that have all rates, of the loss over all tokens or over the answers."""
    all_tokens, answer_tokens = next(iter(read_tokens(folder).values()))
    tokens = answer_tokens if loss_on == "answer" else all_tokens
    groups: dict[tuple[Schedule, int], list[SweepRun]] = {}
    for run in read_runs(folder):
        axes = dict(run.axes)
        key = axes.get("schedule", "constant"), axes.get("batch_size", 4)
        groups.setdefault(key, []).append(replace(run, loss_on=loss_on))
    curves = {}
    for (schedule, batch_size), runs in groups.items():
        if schedule not in design.schedules:
            continue
        for steps in design.read_at if schedule == "constant" else (design.steps(schedule),):
            for curve in curves_at(runs, tokens, steps, draws=DRAWS):
                if len(curve.rates) >= design.rates:
                    curves[GridSetting(curve.rank, round(curve.gain, 6), schedule, steps, batch_size)] = curve
    return curves


def read_seeds(folders: Sequence[Path], design: Design, loss_on: LossOn = "all") -> dict[int, dict[GridSetting, Curve]]:
    """Return the curves of every seed in its run folders."""
    curves: dict[int, dict[GridSetting, Curve]] = {}
    for folder in folders:
        for path in folder.glob("seed_*"):
            curves.setdefault(int(path.name.split("_")[1]), {}).update(read_curves(path, design, loss_on))
    return dict(sorted(curves.items()))


def cubic_optima(curve: Curve) -> Float[np.ndarray, " seeds"]:
    """Return log2 of each seed's best rate by a cubic through the rates within `REACH` of its lowest loss.

    Losses rise more steeply above the best rate than below it, which a parabola takes for a lower best rate. Through
    three rates it is a parabola.
    """
    log_rates, optima = np.log2(curve.rates), []
    for losses in np.log(curve.losses):
        lowest = log_rates[np.argmin(losses)]
        x = log_rates - lowest
        is_near = np.isfinite(losses) & (np.abs(x) * math.log(2) <= REACH)
        near = x[is_near]
        cubic = np.polyfit(near, losses[is_near], min(3, len(near) - 1))
        fine = np.linspace(near[0], near[-1], 2001)
        optima.append(lowest + fine[np.argmin(np.polyval(cubic, fine))])
    return np.array(optima)


def best_rows(curves: Mapping[int, Curves]) -> pd.DataFrame:
    """Return the best rate of every setting and seed by both estimators."""
    rows = []
    for seed, by_key in curves.items():
        for setting, curve in by_key.items():
            estimates = {name: compute((1.0,), curve) for name, compute in ESTIMATORS.items()}
            for name, logs in (estimates | {"near the minimum": estimate(cubic_optima, curve)}).items():
                row = {"estimator": name, "seed": seed} | vars(setting) | {"setting": setting.name}
                row |= {"best_rate": 2**logs.value, "log2_error": logs.known_error}
                rows.append(row | {"edge": curve.edge, "lowest_loss": float(curve.losses.min())})
    return pd.DataFrame(rows)


def inner_rates(best: pd.DataFrame, schedule: str, steps: Sequence[int]) -> pd.DataFrame:
    """Return the best rates of a schedule inside their grids."""
    chosen = best[(best["schedule"] == schedule) & best["steps"].isin(steps) & (best["edge"].fillna("") == "")]
    return chosen.assign(log2=np.log2(chosen["best_rate"]))


def fit_effects(rates: pd.DataFrame) -> tuple[list[str], MixedFit]:
    """Fit the mixed model with an effect for each value of the column ``effect``."""
    names = list(dict.fromkeys(rates["effect"]))
    design = (rates["effect"].to_numpy()[:, None] == np.array(names)).astype(float)
    return names, fit_mixed(rates["log2"].to_numpy(), design, list(rates["seed"]), rates["log2_error"].to_numpy(float))


def mixed_rows(best: pd.DataFrame, design: Design) -> tuple[list[dict[str, Any]], dict[tuple[str, str, str], Estimate]]:
    """Return the fitted effects, and log2 of the measured ratios by schedule and the two settings of a prediction."""
    rows: list[dict[str, Any]] = []
    ratios: dict[tuple[str, str, str], Estimate] = {}

    def add(schedule: str, rates: pd.DataFrame, column: str, label: str) -> None:
        if rates.empty:
            return
        suffix = " steps" if column == "steps" else ""
        rates = rates.assign(effect=rates[column].astype(str) + suffix)
        names, fit = fit_effects(rates)
        errors = np.sqrt(np.diag(fit.covariance))
        seeds = rates.groupby("effect")["seed"].nunique()
        for name, effect, error in zip(names, fit.effects, errors, strict=True):
            row = {"schedule": schedule, "model": label, "setting": name, "best_rate": 2**effect, "log2_error": error}
            row |= {"seeds": int(seeds[name]), "seed_spread": fit.seed_spread, "residual_spread": fit.residual_spread}
            rows.append(row)
        # Differences of two effects; seeds cancel, and the degrees of freedom are those of the fewer seeds.
        for first, second in itertools.permutations(range(len(names)), 2):
            variance = fit.covariance[first, first] + fit.covariance[second, second] - 2 * fit.covariance[first, second]
            count = int(min(seeds[names[first]], seeds[names[second]]))
            value = float(fit.effects[second] - fit.effects[first])
            key = schedule, names[first], names[second]
            ratios[key] = Estimate(value, math.sqrt(max(variance, 0.0)), count, "seeds")

    for schedule in design.schedules:
        last = design.steps(schedule)
        add(schedule, inner_rates(best, schedule, (last,)), "setting", f"settings after {last} steps")
    # Steps at the reference setting.
    at_reference = best[best["setting"] == REFERENCE]
    add("constant", inner_rates(at_reference, "constant", design.read_at), "steps", "steps at rank 8, G 32")
    # Schedules at the reference setting, where they are compared after the same number of steps.
    both = pd.concat([inner_rates(at_reference, schedule, (design.steps(schedule),)) for schedule in design.schedules])
    if both["schedule"].nunique() == 2 and both["steps"].nunique() == 1:
        add("cosine", both, "schedule", "schedules at rank 8, G 32")
    return rows, ratios


def outcome_rows(
    predictions: pd.DataFrame, ratios: Mapping[tuple[str, str, str], Estimate], edges: set[tuple[str, str]]
) -> pd.DataFrame:
    """Return each prediction with the measured ratio and the verdict on its law."""
    rows = []
    for (schedule, first, second), laws in predictions.groupby(["schedule", "from", "to"], sort=False):
        logs = ratios.get((schedule, first, second))
        for law in laws.to_dict("records"):
            row = dict(law)
            if logs is None:
                reason = "edge" if {(schedule, first), (schedule, second)} & edges else "not run"
                rows.append(row | {"ratio": None, "ratio_low": None, "ratio_high": None, "seeds": 0, "verdict": reason})
                continue
            rivals = np.log2(laws[laws["law"] != law["law"]]["prediction"]).tolist()
            span = (math.log2(law["low"]), math.log2(law["high"]))
            # Two seeds or fewer decide nothing.
            verdict = judge_range(logs, span, rivals, is_bound=logs.n < 3, seeds=logs.n)
            width = logs.half_width() if logs.n > 1 else math.nan
            row |= {"ratio": 2**logs.value, "ratio_low": 2 ** (logs.value - width)}
            rows.append(row | {"ratio_high": 2 ** (logs.value + width), "seeds": logs.n, "verdict": verdict})
    return pd.DataFrame(rows)


def token_rows(best: Mapping[LossOn, pd.DataFrame], predictions: pd.DataFrame, design: Design) -> pd.DataFrame:
    """Return each predicted ratio as measured by the loss over all tokens and over the answers: means over seeds."""
    rows = []
    pairs = predictions[predictions["change"] != "schedule"].drop_duplicates(["schedule", "from", "to"])
    for (loss_on, table), pair in itertools.product(best.items(), pairs.to_dict("records")):
        at_schedule = table[(table["schedule"] == pair["schedule"]) & (table["edge"].fillna("") == "")]

        def rates_of(name: str, rates: pd.DataFrame = at_schedule, schedule: str = pair["schedule"]) -> pd.DataFrame:
            steps = int(name.split()[0]) if name.endswith("steps") else design.steps(schedule)
            setting = REFERENCE if name.endswith("steps") else name
            return rates[(rates["setting"] == setting) & (rates["steps"] == steps)]

        both = rates_of(pair["from"]).merge(rates_of(pair["to"]), on=["estimator", "seed"])
        logs = np.log2(both["best_rate_y"] / both["best_rate_x"])
        for estimator, ratios in logs.groupby(both["estimator"], sort=False):
            mean = over_seeds(ratios.to_numpy())
            width = mean.half_width() if mean.has_error else math.nan
            row = {"estimator": estimator, "loss_on": loss_on}
            row |= {name: pair[name] for name in ("schedule", "change", "from", "to")} | {"ratio": 2**mean.value}
            rows.append(row | {"low": 2 ** (mean.value - width), "high": 2 ** (mean.value + width), "seeds": mean.n})
    return pd.DataFrame(rows)


def law_rows(best: pd.DataFrame, predictions: pd.DataFrame, design: Design) -> pd.DataFrame:
    """Return the fit of each law in G to all settings that differ from the reference in G alone."""
    rows = []
    for schedule in design.schedules:
        rates = inner_rates(best, schedule, (design.steps(schedule),))
        rates = rates[rates["rank"] == REFERENCE_RANK] if len(rates) else rates
        in_gain = predictions[(predictions["schedule"] == schedule) & (predictions["change"] == "G")]
        for law, ratios in in_gain.groupby("law", sort=False):
            by_setting = dict(zip(ratios["to"], np.log2(ratios["prediction"]), strict=True)) | {REFERENCE: 0.0}
            known = rates[rates["setting"].isin(by_setting)] if len(rates) else rates
            if len(known) < 2:
                continue
            levels = known["log2"].to_numpy() - known["setting"].map(by_setting).to_numpy(float)
            errors = known["log2_error"].to_numpy(float)
            fit = fit_mixed(levels, np.ones((len(known), 1)), list(known["seed"]), errors, restricted=False)
            row = {"schedule": schedule, "law": law, "best_rates": len(known), "seeds": known["seed"].nunique()}
            row |= {"log_likelihood": fit.log_likelihood, "aic": 6 - 2 * fit.log_likelihood}
            rows.append(row | {"residual_spread": fit.residual_spread, "rms_octaves": float(np.std(levels))})
    return pd.DataFrame(rows)


def regret_rows(
    curves: Mapping[int, Curves], predictions: pd.DataFrame, constant: float, design: Design
) -> pd.DataFrame:
    """Return the regret of every policy for each predicted ratio of two settings, by seed."""
    rows = []
    pairs = predictions[predictions["from"].str.startswith("rank")].drop_duplicates(["schedule", "from", "to"])
    for (seed, by_setting), pair in itertools.product(curves.items(), pairs.to_dict("records")):
        steps = design.steps(pair["schedule"])
        compared = {key.name: key for key in by_setting if (key.schedule, key.steps) == (pair["schedule"], steps)}
        if not {pair["from"], pair["to"]} <= set(compared):
            continue
        old, new = compared[pair["from"]], compared[pair["to"]]
        tuned, tuned_on = tuned_elsewhere(curves, seed, old)
        target = by_setting[new]
        if tuned is None or target.edge:
            continue
        old_run, new_run = (Run(key.rank, key.gain, steps, batch_size=key.batch_size) for key in (old, new))
        for policy, factor in distinct_factors(compared_policies(steps, constant), old_run, new_run).items():
            row = {"seed": seed} | {name: pair[name] for name in ("schedule", "change", "from", "to")}
            cost = regret(tuned, target, partial(mul, factor))
            rows.append(row | {"policy": policy, "tuned_on": tuned_on} | cost.row())
    return pd.DataFrame(rows)


def compared_policies(steps: int, constant: float) -> dict[str, RatePolicy]:
    """Return the policies of the sweeps, those in G with the power law of the rank, and the root of the batch size."""
    by_name = measured_policies({steps: constant})
    del by_name["displacement and steps"]  # no number of steps changes here
    rank_exponent = CONSTANTS["rank_exponent"].value
    by_name["displacement, r^0.15"] = rate_policy(with_rank(displacement_law(constant), rank_exponent))
    by_name["G^-0.75, r^0.15"] = rate_policy(with_rank(power_of_gain(-0.75), rank_exponent))
    by_name["B^0.5"] = lambda old, new, rate: rate * math.sqrt((new.batch_size or 4) / (old.batch_size or 4))
    return by_name


def tuned_elsewhere(curves: Mapping[int, Curves], seed: int, setting: GridSetting) -> tuple[Curve | None, str]:
    """Return the curve of a setting over the other seeds, or of this seed if there is no other; None at an edge."""
    others = [keys[setting] for other, keys in curves.items() if other != seed and setting in keys]
    tuned_on = "other seeds" if others else "this seed"
    tuned = others or ([curves[seed][setting]] if setting in curves[seed] else [])
    if not tuned or any(curve.edge for curve in tuned):
        return None, tuned_on
    losses = np.concatenate([curve.losses for curve in tuned])
    return replace(tuned[0], losses=losses, resampled=None, seeds=tuple(range(len(tuned)))), tuned_on


def lowest_loss_rows(curves: Mapping[int, Curves]) -> pd.DataFrame:
    """Return the lowest loss of each setting minus that of the same one at the reference G, with its error over seeds.

    A grid of rates may miss the minimum: the larger bound of the two grids is added to the interval.
    """
    rows = []
    for setting in dict.fromkeys(itertools.chain.from_iterable(curves.values())):
        reference = replace(setting, gain=REFERENCE_GAIN)
        pairs = [(each[setting], each[reference]) for each in curves.values() if {setting, reference} <= each.keys()]
        inner = [pair for pair in pairs if not any(curve.edge for curve in pair)]
        if setting == reference or not inner:
            continue
        bound = float(np.mean([max(curve.grid_error for curve in pair) for pair in inner]))
        values = np.array([first.losses.min() - second.losses.min() for first, second in inner])
        difference = replace(over_seeds(values), bound=bound)
        row = vars(setting) | {"difference": difference.value, "half_width": difference.half_width()}
        row |= {"grid_error": bound}
        has_sign = abs(difference.value) > difference.half_width()
        verdict = ("lower" if difference.value < 0 else "higher") if has_sign else "undecided"
        rows.append(row | {"seeds": difference.n, "left_out": len(pairs) - len(inner), "verdict": verdict})
    return pd.DataFrame(rows)


def steps_regret_rows(curves: Mapping[int, Curves], design: Design) -> pd.DataFrame:
    """Return the regret of every power of the number of steps at the reference setting, by seed."""
    rows = []
    for seed, by_key in curves.items():
        for first, second in itertools.combinations(design.read_at, 2):
            old, new = (GridSetting(REFERENCE_RANK, REFERENCE_GAIN, "constant", steps) for steps in (first, second))
            tuned, tuned_on = tuned_elsewhere(curves, seed, old)
            target = by_key.get(new)
            if tuned is None or target is None or target.edge:
                continue
            for policy, exponent in STEPS_POLICIES.items():
                factor = (second / first) ** exponent
                cost = regret(tuned, target, partial(mul, factor))
                row: dict[str, Any] = {"seed": seed, "from": f"{first} steps", "to": f"{second} steps"}
                rows.append(row | {"policy": policy, "tuned_on": tuned_on} | cost.row())
    return pd.DataFrame(rows)


def main() -> None:
    """Write the tables of the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("design", choices=tuple(DESIGNS))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", type=Path, nargs="+", default=[], help="folders with further runs of the seeds")
    args = parser.parse_args()
    design = DESIGNS[args.design]
    curves = read_seeds([*args.runs, args.out], design)
    predictions = pd.read_csv(args.out / "predictions.csv")
    all_best = best_rows(curves)
    at_edge = all_best[all_best["edge"].fillna("") != ""]
    edges = set(zip(at_edge["schedule"], at_edge["setting"], strict=True))
    mixed: list[pd.DataFrame] = []
    outcomes: list[pd.DataFrame] = []
    laws: list[pd.DataFrame] = []
    for estimator, best in all_best.groupby("estimator", sort=False):
        effects, ratios = mixed_rows(best, design)
        judged = outcome_rows(predictions, ratios, edges), law_rows(best, predictions, design)
        for frames_of, frame in zip((mixed, outcomes, laws), (pd.DataFrame(effects), *judged), strict=True):
            frame.insert(0, "estimator", estimator)
            frames_of.append(frame)
    by_tokens = {"all": all_best, "answer": best_rows(read_seeds([*args.runs, args.out], design, "answer"))}
    tables = {
        "best": all_best,
        "mixed": pd.concat(mixed),
        "outcomes": pd.concat(outcomes),
        "tokens": token_rows(by_tokens, predictions, design),
    }
    # A design without a pilot compares numbers of steps only.
    if (args.out / "pilot.csv").exists():
        constant = float(
            pd.read_csv(args.out / "pilot.csv").set_index("quantity").loc["displacement constant", "value"]
        )
        costs = regret_rows(curves, predictions, constant, design)
        by = ["schedule", "change", "from", "to", "policy"]
        averages = pd.concat([mean_regrets(costs, by), mean_regrets(costs, ["schedule", "change", "policy"])])
        tables |= {"regret": costs, "policies": averages}
        if (predictions["change"] == "G").any():
            tables["laws"] = pd.concat(laws)
    if len(design.read_at) > 1:
        tables["steps_policies"] = mean_regrets(steps_regret_rows(curves, design), ["from", "to", "policy"])
    lowest_losses = lowest_loss_rows(curves)
    if len(lowest_losses):
        tables["lowest_losses"] = lowest_losses
    for name, frame in tables.items():
        (args.out / f"{name}.csv").write_text(frames.to_csv(frame))
        print(f"{name}.csv\n{frame.to_string(index=False)}\n")


if __name__ == "__main__":
    main()
