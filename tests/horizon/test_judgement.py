"""The judge of the horizon grid: a known best rate is found, and what is planted against the law is told."""

import json
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from figures import horizon as figure
from rora_theory.errors import InputError
from rora_theory.horizon import curves as horizon_curves
from rora_theory.horizon import grid as horizon_grid
from rora_theory.horizon import judgement as horizons
from rora_theory.horizon import law as horizon_law
from rora_theory.horizon import parts as horizon_parts
from rora_theory.horizon import regret as horizon_regret
from rora_theory.horizon import runs as horizon_runs
from rora_theory.horizon.estimators import estimator_table
from rora_theory.horizon.readings import Reading, ReadRun
from rora_theory.horizon.runs import HorizonRun
from rora_theory.io import frames
from rora_theory.runs import seals
from rora_theory.stats import rate_curves
from rora_theory.stats.paired import resampled_ratios
from rora_theory.stats.rate_curves import Curve
from rora_theory.theory.displacement import displacement_ratio
from rora_theory.theory.horizon import distances, rate_factor, rate_for_equal_change

RATES = [10 ** (k / 4) for k in range(-18, -7)]
TOKENS = list(range(40, 72))
TAKEOVERS = (0.002, 0.004, 0.008)


def grid(exponent: float, *, in_rank: float = 0.0, seeds: int = 1, noise: float = 1e-3) -> list[HorizonRun]:
    """Runs whose best rate is 1e-3 (strength / 64)^exponent (rank / 8)^in_rank at every step, 2^-seed aside."""
    random, found = np.random.default_rng(3), []
    hard = random.normal(size=len(TOKENS))
    for rank in (8, 128):
        for strength in (64.0, 724.0):
            best = 1e-3 * (strength / 64) ** exponent * (rank / 8) ** in_rank
            for seed in range(seeds):
                for rate in RATES:
                    level = 1 + 0.1 * math.log10(rate / best / 1.1**seed) ** 2
                    losses = (level * np.exp(0.1 * hard + noise * random.normal(size=len(TOKENS)))) * TOKENS
                    reading = [Reading(step, losses.tolist(), losses.tolist()) for step in (16, 64)]
                    found.append(HorizonRun(rank, strength, rate, seed, ReadRun([], reading)))
    return found


def exponents(runs: list[HorizonRun], step: int = 64):
    found = horizon_law.horizon_exponents(
        horizon_curves.curves_at(runs, TOKENS, step), step, takeovers=TAKEOVERS, warmup=4
    )
    return found.set_index(["over", "at"])


def test_the_law_says_the_exponent_falls_from_one_to_a_half_with_the_horizon() -> None:
    found = horizon_law.predictions(TAKEOVERS, (64.0, 724.0), steps=(2, 64, 4096), rates=(1e-5, 1e-3), warmup=0)
    middle = found[found["quantile"] == 0.5].set_index(["steps", "rate"])["exponent"]
    assert middle[2, 1e-5] == pytest.approx(-1, abs=0.01)
    assert middle[4096, 1e-3] == pytest.approx(-0.5, abs=0.01)
    assert middle.groupby("rate").apply(lambda one: one.is_monotonic_increasing).all()
    np.testing.assert_allclose(found["factor"], (724 / 64) ** -found["exponent"], rtol=1e-12)


def test_a_warm_up_makes_the_takeover_later() -> None:
    plain, warm = (
        horizon_law.predictions(TAKEOVERS, (64.0, 724.0), steps=(16,), rates=(1e-3,), warmup=warmup)["factor"]
        for warmup in (0, 8)
    )
    assert (warm > plain).all()


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [1, 2])
def test_a_planted_exponent_is_found_and_judged(seeds: int) -> None:
    found = exponents(grid(-0.53, seeds=seeds))
    for rank in (8, 128):
        row = found.loc["strength", rank]
        assert row["exponent"] == pytest.approx(-0.53, abs=0.02)
        assert (row["first"], row["second"]) == (64, 724)
        assert row["error_over"] == ("held-out records" if seeds == 1 else "seeds")
        assert row["verdict"] == ("undecided" if seeds == 1 else "agrees"), "one seed decides nothing"
    for strength in (64, 724):
        row = found.loc["rank", strength]
        assert row["exponent"] == pytest.approx(0, abs=0.02)
        assert row["law"] == pytest.approx(0, abs=1e-12)
        assert row["verdict"] == ("undecided" if seeds == 1 else "agrees")


@pytest.mark.parametrize("planted", [-1.0, -0.8, -0.2, 0.0])
def test_an_exponent_off_the_law_contradicts_it(planted: float) -> None:
    assert exponents(grid(planted, seeds=2)).loc["strength", 128]["verdict"] == "contradicts"


@pytest.mark.slow
def test_a_rank_that_moves_the_best_rate_contradicts_it() -> None:
    found = exponents(grid(-0.53, in_rank=-0.25, seeds=2))
    assert found.loc["rank", 64]["exponent"] == pytest.approx(-0.25, abs=0.02)
    assert found.loc["rank", 64]["verdict"] == "contradicts"
    assert found.loc["strength", 8]["verdict"] == "agrees"


@pytest.mark.slow
def test_the_law_is_taken_at_the_measured_rate_of_the_first_strength() -> None:
    row = exponents(grid(-0.53)).loc["strength", 8]
    wanted = horizon_law.predictions(TAKEOVERS, (64.0, 724.0), steps=(64,), rates=(1e-3,), warmup=4)["exponent"]
    assert [row["law_low"], row["law"], row["law_high"]] == pytest.approx(sorted(wanted), abs=2e-3)


@pytest.mark.slow
def test_the_law_is_the_range_of_all_modules() -> None:
    """An exponent that is some modules' and not the median one's does not contradict it."""
    runs = grid(-0.65, seeds=2)
    curves = horizon_curves.curves_at(runs, TOKENS, 64)
    found = horizon_law.horizon_exponents(curves, 64, takeovers=(0.002, 0.004, 0.1), warmup=4).set_index(["over", "at"])
    row = found.loc["strength", 128]
    assert row["law"] < -0.6 or row["law"] > -0.6 + row["half_width"]
    assert row["law_low"] < -0.68 < row["law"] < row["law_high"]
    assert row["verdict"] == "agrees"


@pytest.mark.parametrize(
    ("planted", "noise", "verdicts"),
    [
        (-0.53, 1e-3, ("agrees", "contradicts")),
        (-0.79, 1e-3, ("contradicts", "agrees")),
        (-0.65, 6e-2, ("undecided", "undecided")),
    ],
)
def test_each_law_is_a_rival_of_the_other(planted, noise, verdicts) -> None:
    """The constant-gradient law predicts about -0.53 here, the displacement law -0.63 to -0.79 at K of 105 to 170."""
    curves = horizon_curves.curves_at(grid(planted, seeds=3, noise=noise), TOKENS, 64)
    law = {"takeovers": TAKEOVERS, "warmup": 4, "constants": {64: (105.0, 170.0)}}
    row = horizon_law.horizon_exponents(curves, 64, **law).set_index(["over", "at"]).loc["strength", 8]
    assert (row["displacement_low"], row["displacement_high"]) == pytest.approx((-0.789, -0.631), abs=2e-3)
    assert (row["verdict"], row["displacement_verdict"]) == verdicts


def test_full_fine_tuning_stands_beside_the_adapters_and_in_no_exponent() -> None:
    """Planted a twentieth of their rate and 5% of their loss below; without three rates of its own it is left out."""
    runs = grid(-0.53)
    own = [run for run in runs if (run.rank, run.strength) == (8, 64)]
    for run, rate in zip(own, np.array(RATES) / 20, strict=True):
        reading = [Reading(one.step, [0.95 * loss for loss in one.losses], one.losses) for one in run.read.readings]
        runs.append(HorizonRun(None, None, float(rate), 0, ReadRun([], reading)))
    curves = horizon_curves.curves_at(runs, TOKENS, 64, draws=50)
    found = horizon_curves.compare_best_rates(curves, 64).query("beside == 'full'").set_index(["rank", "strength"])
    assert len(found) == 4
    row = found.loc[8, 64]
    assert row["ratio"] == pytest.approx(20, rel=0.05)
    assert row["difference"] == pytest.approx(0.05, rel=0.05)
    assert row["verdict"].startswith("undecided: one seed (+5.")
    assert found.loc[128, 724]["ratio"] == pytest.approx(20 * (724 / 64) ** -0.53, rel=0.05)
    best_rate_table = frames.rows(horizon_curves.best_rate_table(curves, 64))
    assert [row["strength"] for row in best_rate_table if row["rank"] is None] == [None]
    assert len(best_rate_table) == 5
    assert {row["rank"] for row in best_rate_table} == {None, 8, 128}
    assert all(isinstance(row["rank"], int) for row in best_rate_table if row["rank"]), "8, not 8.0, in the file"
    law = {"takeovers": TAKEOVERS, "warmup": 4}
    lora = [curve for curve in curves if curve.rule == "lora"]
    pd.testing.assert_frame_equal(
        horizon_law.horizon_exponents(curves, 64, **law), horizon_law.horizon_exponents(lora, 64, **law)
    )
    table = frames.rows(horizon_runs.horizon_table(runs, TOKENS, TOKENS))
    assert [row["gamma"] for row in table[-1:]] == [None]
    assert horizon_curves.compare_best_rates(
        horizon_curves.curves_at([*own, *runs[-2:]], TOKENS, 64, draws=50), 64
    ).empty


CONSTANT = -math.log(61.5 / 13.5, 4)
"""The power of the steps at a constant gradient, from 16 to 64 after a warm-up of 4: 13.5 and 61.5 whole steps."""


def adams_power(takeover: float, rate: float = 1e-3) -> float:
    """Of the steps from 16 to 64 under Adam, by halving an interval of rates: b (1 + a / takeover) is kept."""

    def change(steps: int, each: float) -> float:
        moved = distances([each * factor for factor in horizon_grid.warmed_up(steps, 4)], takeover=takeover)
        return moved.B * (1 + moved.A / takeover)

    low, high = rate / 64, rate
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if change(64, middle) < change(16, rate) else (low, middle)
    return math.log(low / rate, 4)


@pytest.mark.parametrize("takeover", [1e-4, 0.004, 1.0, math.inf])
def test_the_law_in_the_steps_is_adam_s(takeover: float) -> None:
    """Beyond one over the number of steps, where A's gradient grows and Adam follows it faster; there where B leads."""
    kept = rate_for_equal_change(1e-3, horizon_grid.warmed_up(16, 4), horizon_grid.warmed_up(64, 4), takeover=takeover)
    power = math.log(kept / 1e-3, 4)
    assert power == pytest.approx(adams_power(takeover), abs=1e-6)
    assert (power < CONSTANT - 0.1) if takeover < 0.01 else power == pytest.approx(CONSTANT, abs=0.01)


ADAM = adams_power(0.004, 1.1e-3)
"""At the median takeover and the mean best rate of `grid`'s three seeds."""


@pytest.mark.parametrize(("planted", "verdict"), [(ADAM, "agrees"), (-0.5, "contradicts"), (-1.0, "contradicts")])
def test_how_the_best_rate_falls_with_the_steps(planted: float, verdict: str) -> None:
    early = [run for run in grid(-0.53, seeds=3) if (run.rank, run.strength) == (8, 64)]
    by_step = {16: early, 64: [replace(run, rate=run.rate * 4**planted) for run in early]}
    curves = {step: horizon_curves.curves_at(runs, TOKENS, 64, draws=50) for step, runs in by_step.items()}
    (row,) = frames.rows(horizon_law.step_exponents(curves, takeovers=TAKEOVERS, warmup=4))
    assert (row["rank"], row["strength"], row["first"], row["second"], row["seeds"]) == (8, 64, 16, 64, 3)
    assert row["exponent"] == pytest.approx(planted, abs=0.01)
    assert row["law"] == pytest.approx(ADAM, abs=2e-3)
    assert row["law_low"] < row["law"] < row["law_high"] < CONSTANT
    assert row["half_width"] < 0.05
    assert row["verdict"] == verdict


FINE = 10.0 ** np.arange(-6, -1, 0.25)
LAW = {"takeovers": TAKEOVERS, "warmup": 4}


def curve(best: list[float], strength: float = 64.0, seeds: tuple[int, ...] = ()) -> Curve:
    """Of r = 8, with a best rate for each seed."""
    losses = np.exp(0.1 * np.log(FINE / np.array(best)[:, None]) ** 2)
    return Curve("adamw", "both", "lora", 1.0, 8, strength / 8, FINE, losses, seeds=seeds or tuple(range(len(best))))


def moved(powers: list[float], factor: float) -> list[float]:
    return [1e-3 * factor**power for power in powers]


def in_steps(first: Curve, second: Curve) -> dict:
    (row,) = frames.rows(horizon_law.step_exponents({16: [first], 64: [second]}, **LAW))
    return row


def test_each_horizon_is_judged_against_the_longest() -> None:
    by_step = {step: [curve(moved([power] * 3, 4))] for step, power in ((16, 0), (64, -1), (256, -2))}
    found = horizon_law.step_exponents(by_step, **LAW)
    assert found[["first", "second"]].to_numpy().tolist() == [[16, 256], [64, 256]]


def test_full_fine_tuning_is_judged_by_the_law_of_a_weight_that_moves_by_itself() -> None:
    """It keeps the sum of the rates; the takeover distances are those of adapters."""
    adapter_law = adams_power(0.004)
    for power, full, adapter in ((CONSTANT, "agrees", "contradicts"), (adapter_law, "contradicts", "agrees")):
        ends = curve([1e-3] * 3), curve(moved([power - 0.01, power, power + 0.01], 4))
        assert in_steps(*ends)["verdict"] == adapter
        row = in_steps(*(replace(end, rule=horizon_curves.FULL, rank=0, scaling=1.0) for end in ends))
        assert row["verdict"] == full
        assert [row["law_low"], row["law"], row["law_high"]] == pytest.approx([CONSTANT] * 3)


def test_a_step_at_which_nothing_has_moved_is_in_no_exponent_of_the_steps() -> None:
    """The first step's rate is 0 under a warm-up."""
    by_step = {step: [curve([1e-3] * 3)] for step in (1, 16, 64)}
    assert horizon_law.step_exponents(by_step, **LAW)["first"].tolist() == [16]
    assert horizon_law.step_exponents(by_step, takeovers=TAKEOVERS, warmup=0)["first"].tolist() == [1, 16]


def test_one_seed_or_an_edge_decides_nothing_in_the_steps() -> None:
    base = curve([1e-3] * 3)
    assert in_steps(base, curve(moved([-0.2] * 3, 4)))["verdict"] == "contradicts"
    assert in_steps(curve([1e-3]), curve(moved([-0.2], 4)))["verdict"] == "undecided"
    assert in_steps(curve([1e-1] * 3), curve([1e-2] * 3))["verdict"] == "undecided"
    assert in_steps(curve([1e-5] * 3), curve([1e-7] * 3))["verdict"] == "undecided"


def test_best_rates_in_the_steps_are_paired_by_seed() -> None:
    apart, seeds = [1e-3, 4e-3, 16e-3], (0, 1, 2)
    later = curve([rate / 4 for rate in reversed(apart)], seeds=seeds[::-1])
    row = in_steps(curve(apart, seeds=seeds), later)
    assert (row["exponent"], row["standard_error"]) == (pytest.approx(-1.0), pytest.approx(0, abs=1e-9))
    other = {16: [curve(apart, seeds=seeds)], 64: [curve(apart, seeds=(3, 4, 5))]}
    assert horizon_law.step_exponents(other, **LAW).empty


@pytest.mark.parametrize("powers", [(-0.38, -0.58, -0.78), (-0.25, -0.45, -0.65)])
def test_what_leaves_room_for_the_first_step_s_law_or_for_none_does_not_agree(powers: tuple[float, ...]) -> None:
    """An interval around the law that reaches -1, or 0."""
    ends = [curve([1e-3] * 3), curve(moved(list(powers), 724 / 64), strength=724.0)]
    (row,) = frames.rows(horizon_law.horizon_exponents(ends, 64, **LAW))
    low, high = row["exponent"] - row["half_width"], row["exponent"] + row["half_width"]
    assert low < row["law"] < high
    assert low < -1 or high > 0
    assert row["verdict"] == "undecided"


def test_what_leaves_room_for_a_random_walk_does_not_agree() -> None:
    row = in_steps(curve([1e-3] * 3), curve(moved([-0.7, -1.0, -1.3], 4)))
    assert row["exponent"] - row["half_width"] < row["law"]
    assert row["exponent"] + row["half_width"] > -0.5
    assert row["verdict"] == "undecided"


def test_an_edge_at_the_first_strength_decides_nothing() -> None:
    ends = [curve([1e-1] * 3), curve([1e-3] * 3, strength=724.0)]
    assert horizon_law.horizon_exponents(ends, 64, **LAW)["verdict"].tolist() == ["undecided"]


def test_others_stand_beside_the_runs_of_their_strength() -> None:
    found = [curve([1e-3] * 3, strength=strength) for strength in (64.0, 724.0)]
    others = [curve([best] * 3, strength=strength) for strength, best in ((64.0, 2e-3), (724.0, 4e-3))]
    table = horizon_curves.compare_best_rates(found, 64, {"other": others}).set_index("strength")
    assert table["ratio"].to_dict() == {64.0: pytest.approx(0.5, rel=1e-3), 724.0: pytest.approx(0.25, rel=1e-3)}


def test_without_the_law_best_rates_are_told() -> None:
    judged = horizons.judge_runs(grid(-0.53), TOKENS, takeovers=(), warmup=4)
    assert judged.exponents.empty
    assert judged.steps.empty
    assert len(judged.best) == 8


def test_parts_of_one_seed_decide_nothing() -> None:
    """Three seeds of best rates, of which one alone was taken apart."""
    ratio = 50.0
    runs = grid(math.log(rate_factor(724 / 64, 1.2)) / math.log(724 / 64), seeds=3, noise=3e-3)
    own = with_parts([run for run in runs if run.seed == 0], ratio) + [run for run in runs if run.seed]
    found = horizon_law.horizon_exponents(horizon_curves.curves_at(own, TOKENS, 64), 64, **LAW, runs=own)
    row = found.set_index(["over", "at"]).loc["strength", 8.0]
    assert (row["seeds"], row["by_parts_verdict"]) == (3, "undecided")
    whole = with_parts(runs, ratio)
    found = horizon_law.horizon_exponents(horizon_curves.curves_at(whole, TOKENS, 64), 64, **LAW, runs=whole)
    assert found.set_index(["over", "at"]).loc["strength", 8.0]["by_parts_verdict"] == "contradicts"


def worse(runs: list[HorizonRun], factor: float, rate: float = 1.0) -> list[HorizonRun]:
    """The same runs with losses and rates a factor higher."""
    found = []
    for run in runs:
        reading = [Reading(one.step, [factor * x for x in one.losses], one.losses) for one in run.read.readings]
        found.append(replace(run, rate=rate * run.rate, read=ReadRun([], reading)))
    return found


def with_one_behind() -> pd.DataFrame:
    """Every curve beside others, of runs that have 5% planted on the losses of r = 8 at gamma r = 64."""
    runs = grid(-0.53, seeds=3)
    low = [run for run in runs if (run.rank, run.strength) == (8, 64)]
    runs = [run for run in runs if run not in low] + worse(low, 1.05)
    return horizon_curves.compare_best_rates(horizon_curves.curves_at(runs, TOKENS, 64, draws=50), 64).set_index(
        ["rank", "strength"]
    )


def test_a_low_rank_stands_beside_the_largest_at_its_strength() -> None:
    """5% planted on the losses of r = 8 at one strength: it is behind there, by so much, and not at the other."""
    found = with_one_behind()
    found = found[found["beside"].str.startswith("r = ")]
    assert found.index.tolist() == [(8, 64), (8, 724)], "the largest rank stands beside nothing"
    assert (found["beside"] == "r = 128").all()
    assert (found["seeds"] == 3).all()
    behind, equal = found.loc[8, 64], found.loc[8, 724]
    assert behind["difference"] == pytest.approx(0.05, rel=0.1)
    assert behind["verdict"].startswith("r = 128 is better by 5.")
    assert abs(equal["difference"]) < equal["half_width"]
    assert equal["ratio"] == pytest.approx(1, abs=0.1)


def test_strengths_of_one_rank_stand_beside_each_other() -> None:
    """5% planted on the losses of r = 8 at the lower strength, none on those of r = 128, each at its own best rate."""
    found = with_one_behind()
    found = found[found["beside"].str.startswith("gamma")]
    assert found.index.tolist() == [(8, 64), (128, 64)], "the largest strength stands beside nothing"
    assert (found["beside"] == "gamma r = 724").all()
    assert found["ratio"].to_numpy() == pytest.approx((724 / 64) ** 0.53, rel=0.05)
    behind, equal = found.loc[8, 64], found.loc[128, 64]
    assert behind["difference"] == pytest.approx(0.05, rel=0.1)
    assert behind["verdict"].startswith("gamma r = 724 is better by 5.")
    assert abs(equal["difference"]) < equal["half_width"] < 0.05


def test_at_one_rate_a_difference_may_be_of_the_rate_alone() -> None:
    """Both strengths have one least loss; at one rate either is lower, by how far the rate is from its own best."""
    runs = [run for run in grid(-0.53, seeds=3) if (run.rank, run.rate) != (8, RATES[0])]
    runs[0] = replace(runs[0], read=ReadRun([], [], diverged_at=3))
    runs = [run for run in runs if (run.rank, run.strength, run.seed) != (128, 724, 2)]
    runs += [replace(run, rank=None, strength=None) for run in runs[:3]]
    runs += [replace(run, rank=16, strength=5000.0) for run in runs[:3]]
    assert runs[0].rate == RATES[1]
    found = horizon_curves.at_one_rate(runs, TOKENS, 64)
    assert (found["strength"] == 64).all(), "the largest strength stands beside nothing"
    assert (found["beside"] == "gamma r = 724").all()
    assert (found["step"] == 64).all()
    by = {rank: own.set_index("learning_rate") for rank, own in found.groupby("rank")}
    assert by[8].index.tolist() == RATES[1:], "not where neither ran"
    assert by[128].index.tolist() == RATES
    assert by[8]["seeds"].tolist() == [2, *[3] * (len(RATES) - 2)], "a seed that diverged is left out"
    assert (by[128]["seeds"] == 2).all(), "and one that ran at one strength alone"
    hard = np.random.default_rng(3).normal(size=len(TOKENS))
    level = np.average(np.exp(0.1 * hard), weights=TOKENS)
    for rank in (8, 128):
        for rate, row in by[rank].iterrows():
            seeds = [0, 1] if rank == 128 else [1, 2] if rate == RATES[1] else [0, 1, 2]
            squares = [
                np.mean([math.log10(rate / 1e-3 / (strength / 64) ** -0.53 / 1.1**seed) ** 2 for seed in seeds])
                for strength in (64, 724)
            ]
            assert row["difference"] == pytest.approx(0.1 * level * (squares[0] - squares[1]), abs=3e-3)
            assert 0 < row["half_width"] < 0.3
    assert by[8]["difference"].iloc[1] > 0.08
    assert by[8]["difference"].iloc[-1] < -0.08
    judged = horizons.judge_runs(runs, TOKENS, takeovers=(), warmup=4)
    assert len(judged.one_rate) == 2 * len(found)
    assert "one_rate.csv" in judged.files()


def test_in_the_rank_the_law_goes_up_to_cross_talk() -> None:
    """An exponent of 0.1 contradicts a signal that leads everywhere; with modules' linear terms it is within."""
    curves = horizon_curves.curves_at(grid(-0.53, in_rank=0.1, seeds=3), TOKENS, 64)

    def judged(terms: tuple[float, ...], strength: float = 64.0):
        found = horizon_law.horizon_exponents(curves, 64, **LAW, linear_terms=terms)
        return found.set_index(["over", "at"]).loc["rank", strength]

    signal = judged(())
    assert (signal["law_low"], signal["law"], signal["law_high"], signal["verdict"]) == (0, 0, 0, "contradicts")
    assert judged((0.0, 0.0, 0.0))["verdict"] == "contradicts", "a signal that leads at every rank"
    crossed = judged((8.0, 10.0, 58.0))
    kept = [math.log((1 + c / 8) / (1 + c / 128)) / 2 / math.log(16) for c in (8.0, 10.0, 58.0)]
    assert crossed["law_low"] == 0
    assert crossed["law"] == pytest.approx(kept[1], rel=1e-9)
    assert crossed["law_high"] == pytest.approx(np.quantile(kept, 0.95), rel=1e-9)
    assert crossed["verdict"] == "agrees"
    assert judged((1.0, 1.0, 1.0))["verdict"] == "contradicts", "0.016 at most"
    over_strength = horizon_law.horizon_exponents(curves, 64, **LAW, linear_terms=(8.0, 10.0, 58.0))
    plain = horizon_law.horizon_exponents(curves, 64, **LAW)
    strengths = [frame[frame["over"] == "strength"].reset_index(drop=True) for frame in (over_strength, plain)]
    pd.testing.assert_frame_equal(*strengths)
    runs = grid(-0.53, in_rank=0.1, seeds=3)
    whole = horizons.judge_runs(runs, TOKENS, takeovers=TAKEOVERS, warmup=4, linear_terms=(8.0, 10.0, 58.0)).exponents
    assert set(whole[whole["over"] == "rank"]["verdict"]) == {"agrees"}


def test_runs_stand_beside_those_of_another_setting() -> None:
    """Twice the rate and 3% less loss are planted in the others; full fine-tuning has its own beside it."""
    runs = [run for run in grid(-0.53, seeds=2) if (run.rank, run.strength) == (8, 64)]
    runs += [replace(run, rank=None, strength=None) for run in runs]
    others = worse(runs, 0.97, rate=2.0)
    found = horizons.judge_runs(runs, TOKENS, takeovers=(), warmup=4, other_runs={"targets all": others}).comparisons
    found = found[(found["step"] == 64) & (found["beside"] == "targets all")]
    assert found["rank"].fillna(0).tolist() == [0, 8], "full fine-tuning has its own beside it"
    assert found["ratio"].to_numpy() == pytest.approx(0.5, rel=0.02)
    assert found["difference"].to_numpy() == pytest.approx(0.03, rel=0.1)
    assert all(one.startswith("targets all is better by 3.") for one in found["verdict"])


@pytest.mark.slow
def test_a_folder_that_has_not_grown_evenly_is_judged_by_the_seeds_that_both_ends_have() -> None:
    """Seeds 0 and 1 of one arm, 0 of another: seed 0 alone, undecided; seeds that no other arm has change nothing."""
    runs = grid(-0.53, seeds=2)
    part = [run for run in runs if run.seed == 0 or (run.rank, run.strength) != (128, 724)]
    found, whole = exponents(part), exponents(runs)
    assert found.loc["strength", 128]["seeds"] == found.loc["rank", 724]["seeds"] == 1
    assert found.loc["strength", 128]["verdict"] == "undecided"
    pd.testing.assert_series_equal(found.loc["strength", 8], whole.loc["strength", 8])
    alone = exponents([run for run in runs if run.seed == 0]).loc["strength", 128]
    pd.testing.assert_series_equal(found.loc["strength", 128], alone)


@pytest.mark.slow
def test_the_error_of_an_exponent_is_of_both_sources() -> None:
    """Two seeds that agree to the last digit on records that do not: the records' error is told, and judged by."""
    runs = [run for run in grid(-0.53, noise=0.1) if run.seed == 0]
    twice = [*runs, *(HorizonRun(run.rank, run.strength, run.rate, 1, run.read) for run in runs)]
    alone, found = (exponents(one).loc["strength", 8] for one in (runs, twice))
    assert (found["error_over"], found["seeds"]) == ("held-out records", 2)
    assert found["standard_error"] == pytest.approx(alone["standard_error"])
    assert found["half_width"] > 0.02


@pytest.mark.slow
def test_a_best_rate_at_the_grids_edge_is_undecided() -> None:
    runs = [run for run in grid(-0.53, seeds=2) if run.strength == 64 or run.rate > 2.7e-4]
    assert exponents(runs).loc["strength", 128]["verdict"] == "undecided"


def test_diverged_and_shorter_runs() -> None:
    """A run that diverged is above every loss from then on; one that ended before a step is not in its curve."""
    runs = grid(-0.53)
    bare = [run for run in runs if run.rate < 2e-3]
    (top,) = {run.rate for run in runs if 2e-3 < run.rate < 4e-3}
    first = [HorizonRun(8, s, top, 0, ReadRun([], runs[0].read.readings[:1], diverged_at=20)) for s in (64.0, 724.0)]
    with_top = {curve.rank: curve for curve in horizon_curves.curves_at(bare + first, TOKENS, 64)}[8]
    assert with_top.rates[-1] == top
    assert np.isinf(with_top.losses[:, -1]).all()
    short = [HorizonRun(run.rank, run.strength, top, 0, ReadRun([], run.read.readings[:1])) for run in first]
    assert {curve.rates[-1] for curve in horizon_curves.curves_at(bare + short, TOKENS, 64)} == {
        max(r.rate for r in bare)
    }
    (late,) = [replace(run, read=replace(run.read, diverged_at=100)) for run in first[:1]]
    assert [late.reaches(step) for step in (16, 64, 99, 100, 256)] == [True, False, False, True, True]
    rows = horizon_runs.horizon_table(first, TOKENS, TOKENS)
    assert rows["status"].tolist() == ["complete", "diverged"] * 2
    assert rows["step"].tolist() == [16, 20] * 2


def test_a_rate_that_a_seed_lacks_is_left_out() -> None:
    runs = [run for run in grid(-0.53, seeds=2) if not (run.seed == 1 and run.rate < 9e-5)]
    for curve in horizon_curves.curves_at(runs, TOKENS, 16):
        assert curve.rates[0] == pytest.approx(1e-4)
        assert curve.losses.shape[0] == 2


def test_a_seed_counts_from_three_shared_rates_on() -> None:
    runs = grid(-0.53, seeds=2)
    for count, seeds in ((3, (0, 1)), (2, (0,))):
        kept = sorted(RATES)[4 : 4 + count]
        part = [run for run in runs if run.seed == 0 or any(math.isclose(run.rate, rate) for rate in kept)]
        for curve in horizon_curves.curves_at(part, TOKENS, 64, draws=20):
            assert (curve.seeds, len(curve.rates)) == (seeds, 3 if seeds == (0, 1) else len(RATES))


def test_a_poor_seed_spoils_no_curve() -> None:
    """A seed of two rates, one whose rates are another's no more, one that diverged wherever it got so far, and an arm
    of nothing else: left out, the others as they were."""
    runs = [run for run in grid(-0.53, seeds=2) if (run.rank, run.strength) == (8, 64.0)]
    whole = horizon_curves.curves_at(runs, TOKENS, 64, draws=20)[0]

    def diverged(rate: float, seed: int, rank: int = 8) -> HorizonRun:
        return HorizonRun(rank, 64.0, rate, seed, ReadRun([0.0] * 40, [], diverged_at=40))

    poor = [replace(run, seed=2) for run in runs[:2]]
    poor += [replace(run, seed=3, rate=1.1 * run.rate) for run in runs[:4]]
    poor += [diverged(rate, 4) for rate in RATES[-4:]]
    poor += [diverged(rate, seed, rank=16) for rate in RATES[-4:] for seed in (0, 1)]
    (found,) = horizon_curves.curves_at([*runs, *poor], TOKENS, 64, draws=20)
    assert found.seeds == (0, 1)
    assert found.rates.tolist() == whole.rates.tolist()
    np.testing.assert_allclose(found.losses, whole.losses, rtol=1e-12)  # sums beside those of other runs
    few = [replace(run, seed=5) for run in runs[:4] if run.seed == 0]
    (found,) = horizon_curves.curves_at([*runs, *few], TOKENS, 64, draws=20)
    assert (found.seeds, found.rates.tolist()) == ((0, 1, 5), RATES[:4])


def test_runs_that_differ_in_their_length_are_one() -> None:
    """The longer one's readings, but those that the shorter has the parts of; counted once in every table."""
    short = ReadRun([1.0] * 64, [Reading(16, [1.0], [1.0]), Reading(64, [2.0], [2.0])])
    parts = {"led_B": [1.0], "led_A": [1.0], "whole": [2.0]}
    long = ReadRun([1.0] * 256, [Reading(step, [9.0], [9.0]) for step in (64, 256)])
    runs = [HorizonRun(8, 64.0, 1e-3, 0, read) for read in (long, short)]
    (found,) = horizon_runs.distinct(runs)
    assert len(found.read.train_losses) == 256
    assert [(one.step, one.losses) for one in found.read.readings] == [(16, [1.0]), (64, [9.0]), (256, [9.0])]
    short.readings[1] = replace(short.readings[1], parts=parts)
    assert [one.losses for one in horizon_runs.distinct(runs)[0].read.readings] == [[1.0], [2.0], [9.0]]
    long.readings[0] = replace(long.readings[0], parts=parts)
    assert [one.losses for one in horizon_runs.distinct(runs)[0].read.readings] == [[1.0], [9.0], [9.0]]
    others = [replace(runs[0], **own) for own in ({"seed": 1}, {"rate": 2e-3}, {"rank": 4}, {"strength": 8.0})]
    assert len(horizon_runs.distinct([*runs, *others])) == 5
    assert len(horizons.judge_runs([*runs, *others], [1], takeovers=(), warmup=4).led) == 5


def test_beside_a_run_that_diverged_the_exponent_is_known_to_half_a_step_of_the_grid() -> None:
    """Every seed has the grid's own rate there, so that their spread is nothing: no law is contradicted by that."""
    runs = []
    for run in grid(-0.53, seeds=3, noise=0.0):
        best = 1e-3 * (run.strength / 64) ** -0.53  # the next rate above it diverges
        gone = run.rate > 10 ** (math.ceil(4 * math.log10(best)) / 4) * 1.01
        runs.append(replace(run, read=ReadRun([], [], diverged_at=5)) if gone else run)
    row = exponents(runs).loc["strength", 8]
    step = math.log2(10) / 4
    assert row["half_width"] == pytest.approx((step / 2 + step / 2) / math.log2(724 / 64), rel=1e-6)
    assert row["verdict"] != "contradicts"


def test_the_table_of_best_rates_names_the_arm() -> None:
    found = horizon_curves.best_rate_table(horizon_curves.curves_at(grid(-0.5), TOKENS, 16), 16)
    assert found["step"].tolist() == [16] * 4
    assert list(zip(found["rank"], found["strength"], strict=True)) == [(8, 64), (8, 724), (128, 64), (128, 724)]
    np.testing.assert_allclose(found["best_rate"], 1e-3 * (found["strength"] / 64) ** -0.5, rtol=0.05)
    assert not found["edge"].any()


@pytest.mark.slow
def test_the_figure_draws_best_rates_and_exponents(tmp_path) -> None:
    runs = grid(-0.53)
    found = {step: horizon_curves.curves_at(runs, TOKENS, step) for step in (16, 64)}
    found[64] = [curve for curve in found[64] if curve.rank == 8]
    judged = [horizon_law.horizon_exponents(one, step, takeovers=TAKEOVERS, warmup=4) for step, one in found.items()]
    tables = {"results": horizon_runs.horizon_table(runs, TOKENS, TOKENS), "exponents": pd.concat(judged)}
    tables["best"] = pd.concat([horizon_curves.best_rate_table(one, step) for step, one in found.items()])
    for name, table in tables.items():
        (tmp_path / f"{name}.csv").write_text(frames.to_csv(table))
    (tmp_path / "manifest.json").write_text(json.dumps(seals.seal({"experiment": "horizon", "files": {}})))
    assert [path.name for path in figure.draw(figure.Config(tmp_path))] == ["horizon.png", "horizon.svg"]
    drawn = (tmp_path / "horizon.svg").read_text()
    assert all(name in drawn for name in ("16 steps", "64 steps", "r = 8", "r = 128"))
    assert "256 steps" not in drawn, "no name of what is not there"


def test_which_part_leads_is_told_of_each_reading_beside_the_law() -> None:
    """Quantiles over modules; nothing of a run in which it was not measured; the law's ratio is A's distance over the
    takeover."""
    parts = {"layer": [0, 0, 1], "module": ["q_proj", "v_proj", "q_proj"]}
    parts |= {"led_B": [1.0, 2.0, 4.0], "led_A": [2.0, 2.0, 2.0], "whole": [3.0, 4.0, 6.0]}
    read = ReadRun([], [Reading(16, [1.0], [1.0], parts), Reading(64, [1.0], [1.0])])
    runs = [
        HorizonRun(8, 64.0, 1e-3, 2, read),
        HorizonRun(None, None, 1e-4, 0, ReadRun([], [Reading(16, [1.0], [1.0])])),
    ]
    found = horizon_parts.led_table(runs, takeovers=TAKEOVERS, warmup=4).to_dict("records")
    assert len(found) == 1
    (row,) = found
    assert [row[name] for name in ("rank", "strength", "learning_rate", "seed", "step")] == [8, 64.0, 1e-3, 2, 16]
    assert (row["ratio"], row["exponent"]) == (1.0, pytest.approx(-2 / 3))
    assert row["change"] == pytest.approx(math.sqrt((9 + 16 + 36) / 3))
    assert 0.5 < row["ratio_low"] < 0.6 < 1.8 < row["ratio_high"] < 2
    assert row["exponent_low"] < row["exponent"] < row["exponent_high"], "the least is B's alone, -1"
    rates = [0, 2.5e-4, 5e-4, 7.5e-4] + 12 * [1e-3]
    assert row["law_ratio"] == pytest.approx(distances(rates, takeover=0.004).A / 0.004)
    assert "law_ratio" not in horizon_parts.led_table(runs, takeovers=[], warmup=4)
    assert horizon_parts.led_table(runs[1:], takeovers=TAKEOVERS, warmup=4).empty


def test_the_change_at_the_best_rate_lies_between_its_neighbours() -> None:
    """A change that grows as the rate to the power 1.5, of two seeds a factor of four apart; no row beyond the rates
    at which it was measured, none of full fine-tuning."""
    led = pd.DataFrame(
        {"rank": 8, "strength": 64.0, "learning_rate": rate, "seed": seed, "step": 64, "change": 4.0**seed * rate**1.5}
        for seed in (0, 1)
        for rate in (1e-3, 1e-4, 3e-4)
    )
    best = pd.DataFrame(
        [(64, 8, 64.0, 2e-4, 0.2), (64, 8, 64.0, 2e-3, 0.2), (16, 8, 64.0, 2e-4, 0.2), (64, None, None, 2e-4, 0.2)],
        columns=["step", "rank", "strength", "best_rate", "log2_error"],
    ).assign(edge="")
    near = led.replace({1e-4: 1.000001e-4})
    for rate in (1e-3, 1e-4):
        end = best.iloc[:1].assign(strength=64.0 + 1e-10, best_rate=rate)
        assert horizon_parts.change_at_best(end, near)["change"].tolist() == pytest.approx([2 * rate**1.5], rel=1e-4)
    best = best.drop(1)
    beyond = best.iloc[:1].assign(best_rate=2e-3)
    assert horizon_parts.change_at_best(beyond, led).empty
    (row,) = horizon_parts.change_at_best(best, led).to_dict("records")
    assert row["change"] == pytest.approx(2 * 2e-4**1.5, rel=1e-9)
    assert (row["log2_error"], row["seeds"], row["step"], row["rank"]) == (pytest.approx(0.3), 2, 64, 8)
    assert horizon_parts.change_at_best(best, led.iloc[:0]).empty
    end = best.iloc[:1].assign(best_rate=1e-3, log2_error=None, edge="high")
    (row,) = horizon_parts.change_at_best(end, led).to_dict("records")
    assert (row["log2_error"], row["edge"]) == (None, "high")
    other = led[led["seed"] == 1].assign(strength=724.0)
    two = pd.concat([best.iloc[:1], best.iloc[:1].assign(strength=724.0)])
    rows = horizon_parts.change_at_best(two, pd.concat([led, other])).to_dict("records")
    assert [(row["seeds"], row["change"]) for row in rows] == [(1, pytest.approx(4 * 2e-4**1.5, rel=1e-9))] * 2
    apart = horizon_parts.change_at_best(two, pd.concat([led[led["seed"] == 0], other]))
    assert apart.empty, "no seed of both"


def test_every_rank_is_compared_with_the_largest() -> None:
    """A rank with one seed beside two with three leaves theirs as it is."""
    runs = grid(-0.7, seeds=3)
    lone = [replace(run, rank=1) for run in runs if (run.rank, run.seed) == (8, 0)]
    found = exponents([*runs, *lone]).loc["rank"]
    assert found.loc[64.0, ["first", "second", "seeds"]].to_numpy().tolist() == [[1, 128, 1], [8, 128, 3]]
    pd.testing.assert_frame_equal(exponents(runs).loc["rank"], found[found["first"] == 8], rtol=1e-9)


def with_parts(runs: list[HorizonRun], ratio: float) -> list[HorizonRun]:
    """Every reading with two modules whose A-led part is so many times the B-led one, in one direction with it."""
    parts = {"layer": [0, 1], "module": ["q_proj"] * 2, "led_B": [1.0, 3.0]}
    parts |= {"led_A": [ratio, 3 * ratio], "whole": [1 + ratio, 3 + 3 * ratio]}
    found = []
    for run in runs:
        readings = [replace(one, parts=parts) for one in run.read.readings]
        found.append(replace(run, read=replace(run.read, readings=readings)))
    return found


def test_measured_parts_judge_in_place_of_the_laws_takeover() -> None:
    """Best rates that move as the parts say agree with them, where the law's own takeover is contradicted; and not
    with parts that say something else. Runs without parts say nothing."""
    ratio = 1.2
    exponent = math.log(rate_factor(724 / 64, ratio)) / math.log(724 / 64)
    runs = grid(exponent, seeds=3, noise=3e-3)
    for planted, verdict in ((ratio, "agrees"), (50.0, "contradicts")):
        own = with_parts(runs, planted)
        curves = horizon_curves.curves_at(own, TOKENS, 64)
        found = horizon_law.horizon_exponents(curves, 64, takeovers=TAKEOVERS, warmup=4, runs=own)
        row = found.set_index(["over", "at"]).loc["strength", 8.0]
        expected = math.log(rate_factor(724 / 64, planted)) / math.log(724 / 64)
        assert row["by_parts"] == pytest.approx(expected, rel=1e-6)
        assert row["by_parts_low"] == pytest.approx(row["by_parts_high"], rel=1e-9)
        assert (row["by_parts_verdict"], row["verdict"]) == (verdict, "contradicts")
        assert found.loc[found["over"] == "rank", "by_parts"].isna().all()
    where = {"rank": 8, "strengths": (64.0, 724.0), "rate": 1e-3, "seeds": (0, 1, 2)}
    assert horizon_parts.exponent_of_parts(runs, 64, **where) == []


@pytest.mark.slow
def test_parts_decide_no_more_than_the_runs_do() -> None:
    """Neither of one seed nor where a best rate is at the grid's edge; and seeds whose parts differ are a range."""
    exponent = math.log(rate_factor(724 / 64, 1.2)) / math.log(724 / 64)
    runs = grid(exponent, seeds=2, noise=3e-3)
    law = {"takeovers": TAKEOVERS, "warmup": 4}

    def verdict(own: list[HorizonRun]) -> pd.Series:
        found = horizon_law.horizon_exponents(horizon_curves.curves_at(own, TOKENS, 64), 64, runs=own, **law)
        return found.set_index(["over", "at"]).loc["strength", 8.0]

    assert verdict(with_parts([run for run in runs if run.seed == 0], 50.0))["by_parts_verdict"] == "undecided"
    cut = [run for run in runs if run.strength == 64 or run.rate > 2.7e-4]
    assert verdict(with_parts(cut, 50.0))["by_parts_verdict"] == "undecided"
    apart = [run for run in runs if run.seed == 0], [run for run in runs if run.seed == 1]
    row = verdict([*with_parts(apart[0], 0.5), *with_parts(apart[1], 50.0)])
    assert row["by_parts_low"] < row["by_parts"] < row["by_parts_high"]
    assert row["by_parts_verdict"] != "contradicts"


def test_parts_are_those_of_the_runs_beside_the_best_rate() -> None:
    """Along a line between two a grid step apart at most; of one within half a step; none of another seed, rank,
    strength or step, nor of one whose parts are opposite and tell no factor."""

    def run(seed: int, rate: float, ratio: float, rank: int = 8, strength: float = 64 + 1e-9, step: int = 64):
        bare = HorizonRun(rank, strength, rate, seed, ReadRun([], [Reading(step, [1.0], [1.0])]))
        return with_parts([bare], ratio)[0]

    runs = [run(0, 1e-3 * 10 ** (-1 / 16), 1.0), run(0, 1e-3 * 10 ** (3 / 16), 9.0), run(0, 5e-3, 30.0)]
    runs += [run(1, 1.1e-3, 2.0), run(2, 1.5e-3, 30.0), run(6, 1e-3, 30.0)]
    runs += [run(3, 0.9e-3, 3.0), run(3, 3e-3, 30.0)]  # too far apart for a line
    runs += [run(4, 1e-3, 30.0, rank=16), run(4, 1e-3, 30.0, strength=32.0), run(5, 1e-3, 30.0, step=16)]
    runs += [run(5, 1e-3, -0.9)]
    where = {"rank": 8, "strengths": (64.0, 724.0), "rate": 1e-3, "seeds": (0, 1, 2, 3, 4, 5)}
    found = horizon_parts.exponent_of_parts(runs, 64, **where)
    one, nine, two, three = (math.log(rate_factor(724 / 64, q)) / math.log(724 / 64) for q in (1.0, 9.0, 2.0, 3.0))
    assert found == pytest.approx([0.75 * one + 0.25 * nine, two, three], rel=1e-6)


def test_a_step_that_few_runs_reach_leaves_the_others_as_they_are() -> None:
    """One run that goes on to 256 steps makes no curve there, and no floats of the steps before."""
    runs = grid(-0.7, seeds=2)
    longer = runs[0].read.readings[-1]
    runs[0] = replace(runs[0], read=replace(runs[0].read, readings=[*runs[0].read.readings, replace(longer, step=256)]))
    judged = horizons.judge_runs(runs, TOKENS, takeovers=TAKEOVERS, warmup=4)
    for frame in (judged.best, judged.exponents):
        assert sorted(set(frame["step"])) == [16, 64]
        assert frame["step"].dtype.kind == "i"


def test_a_variant_identifies_a_folder_only_where_it_differs_from_its_default() -> None:
    plain = horizon_grid.HorizonGrid(read_at=(64,))
    assert set(plain.identity()) == set(horizon_grid.SHARED)
    variant = replace(plain, schedule="cosine", weight_decay=0.1, lr_multiplier_A=8.0, quantization="q4_1")
    assert {name: variant.identity()[name] for name in horizon_grid.VARIANTS} == {
        "schedule": "cosine", "weight_decay": 0.1, "lr_multiplier_A": 8.0, "quantization": "q4_1"
    }  # fmt: skip
    training = variant.training(next(variant.cells()))
    assert (training.schedule, training.lr_multiplier_A, training.quantization) == ("cosine", 8.0, "q4_1")


def test_a_decaying_schedule_is_read_at_its_end_alone() -> None:
    with pytest.raises(InputError, match=r"read-at.*cosine.*16 64"):
        horizon_grid.HorizonGrid(schedule="cosine", read_at=(16, 64))


def test_constants_and_regrets_of_planted_runs() -> None:
    planted = grid(-0.77, seeds=3)
    ratios = [displacement_ratio(run.strength, displacement_constant=130.0) for run in planted]
    runs = [with_parts([run], ratio)[0] for run, ratio in zip(planted, ratios, strict=True)]
    judged = horizons.judge_runs(runs, TOKENS, takeovers=TAKEOVERS, warmup=4)
    assert set(judged.constants["step"]) == {16, 64}
    for name in ("constant", "constant_low", "constant_high"):
        np.testing.assert_allclose(judged.constants[name], 130.0, rtol=1e-9)
    # Half of the rates of a curve lie at or below the best one.
    assert judged.constants["runs"].between(3, 3 * len(RATES) - 1).all()
    costs = judged.regret.query("steps == 64 and old_steps == 64 and old_strength == 64 and strength == 724")
    by_policy = costs[(costs["old_rank"] == 8) & (costs["rank"] == 8)].set_index("policy")["regret"]
    # Log10 of the rate over the best one: planted 0.77 log10(724 / 64) = 0.811 less what the policy divides by.
    for policy, decades in (("keep the rate", 0.811), ("first step", -0.242), ("square root", 0.284)):
        assert by_policy[policy] == pytest.approx(0.1 * decades**2, abs=4e-3), policy
    assert by_policy["displacement"] < 2e-3
    assert {"rank", "strength", "steps", "rank strength steps"} <= set(judged.regret["changed"])
    summary = judged.policies.set_index(["changed", "policy"])
    own = judged.regret.query("changed == 'strength' and policy == 'first step' and not is_edge")
    assert summary.loc[("strength", "first step"), "pairs"] == len(own)
    assert summary.loc[("strength", "first step"), "largest"] == pytest.approx(own["regret"].max())
    assert summary.loc[("strength", "displacement"), "largest"] < summary.loc[("strength", "square root"), "median"]
    assert (judged.regret["rank"] >= judged.regret["old_rank"]).all()
    assert (judged.regret["steps"] >= judged.regret["old_steps"]).all()


def test_a_rate_that_one_seed_alone_ran_is_read_from_that_seed() -> None:
    runs = [
        run for run in grid(-0.77, seeds=3)
        if run.strength == 64 or run.seed == 1 or run.rate < 3e-4
    ]  # fmt: skip
    curves = {step: horizon_curves.curves_at(runs, TOKENS, step, draws=50) for step in (16, 64)}
    costs = horizon_regret.regret_table(runs, TOKENS, curves, horizon_regret.policies({64: 130.0}), draws=50)
    row = costs.query("steps == 64 and old_steps == 64 and old_strength == 64 and strength == 724")
    row = row[(row["old_rank"] == 8) & (row["rank"] == 8)].set_index("policy").loc["keep the rate"]
    assert (row["seeds"], row["is_lower_bound"]) == (1, False)
    assert row["regret"] == pytest.approx(0.1 * 0.811**2, abs=0.02)


def test_every_curve_is_resampled_once(monkeypatch) -> None:
    """The curves of the best rates serve the regret too: one bootstrap for each rank, strength, step and seed."""
    planted = grid(-0.77, seeds=2)
    ratios = [displacement_ratio(run.strength, displacement_constant=130.0) for run in planted]
    runs = [with_parts([run], ratio)[0] for run, ratio in zip(planted, ratios, strict=True)]
    calls = []

    def count(*arguments, **options):
        calls.append(arguments)
        return resampled_ratios(*arguments, **options)

    monkeypatch.setattr(rate_curves, "resampled_ratios", count)
    judged = horizons.judge_runs(runs, TOKENS, takeovers=TAKEOVERS, warmup=4)
    assert len(judged.regret)
    assert len(calls) == 2 * 2 * 2 * 2


def test_estimators_of_whole_curves_stand_beside_the_vertex() -> None:
    """Two ranks and two seeds with a planted exponent: alone, pooled with seeds as clusters, and in the rank."""
    curves = horizon_curves.curves_at(grid(-0.7, in_rank=0.1, seeds=2), TOKENS, 64, draws=20)
    table = estimator_table(curves, 64).set_index(["over", "at", "estimate"])
    for at in ("8", "128", "8 128"):
        for method in ("vertex", "quadratic", "registration"):
            row = table.loc["strength", at, method]
            assert row["exponent"] == pytest.approx(-0.7, abs=0.03)
            assert (row["first"], row["second"], row["seeds"], row["edges"]) == (64, 724, 2, 0)
            assert row["pairs"] == len(at.split())
            assert row["standard_error"] > 0
    assert table.loc["rank", "64 724", "quadratic"]["exponent"] == pytest.approx(0.1, abs=0.03)


def test_all_pairs_of_strengths_are_compared_by_each_estimator() -> None:
    runs = [
        replace(run, strength=strength, rate=run.rate)
        for strength in (16.0, 64.0, 724.0)
        for run in grid(0.0, seeds=2)
        if run.strength == 64 and run.rank == 8
    ]
    table = estimator_table(horizon_curves.curves_at(runs, TOKENS, 64, draws=20), 64)
    assert {(row["first"], row["second"]) for row in frames.rows(table)} == {(16, 64), (16, 724), (64, 724)}
    assert set(table["over"]) == {"strength"}
    np.testing.assert_allclose(table["exponent"], 0, atol=1e-3)
