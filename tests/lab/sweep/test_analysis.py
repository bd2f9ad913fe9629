"""The judge of the horizon grid: a planted best rate is found, and deviations from the law are detected."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from figures import horizon as figure
from rora_theory import Setting, transfer
from rora_theory.advice.best_rate import Run
from rora_theory.evidence.policies import measured_policies
from rora_theory.lab.sweep import analysis, change_parts, regret
from rora_theory.lab.sweep import curves as horizon_curves
from rora_theory.lab.sweep import law as horizon_law
from rora_theory.lab.sweep.results import results_table
from rora_theory.lab.sweep.runs import FULL, Reading, ReadRun, SweepRun, merge_repeated_runs
from rora_theory.laws.constant_gradient import distances, rate_for_equal_change
from rora_theory.laws.displacement import displacement_ratio
from rora_theory.optimizers import schedule_factor
from rora_theory.runs import frames
from rora_theory.stats import trained_runs
from rora_theory.stats.rate_curves import Curve

RATES = [10 ** (k / 4) for k in range(-18, -7)]
TOKENS = list(range(40, 72))
CROSSING_DISTANCES = (0.002, 0.004, 0.008)
LAW = horizon_law.RateLaw(CROSSING_DISTANCES, warmup=4)
NO_LAW = horizon_law.RateLaw(warmup=4)
BY_LOSS = {"all": TOKENS}
GROWTH = 724 / 64
"""Ratio of the two gains of `grid`."""

# ---- runs and curves with planted best rates


def grid(exponent: float, *, in_rank: float = 0.0, seeds: int = 1, noise: float = 1e-3) -> list[SweepRun]:
    """Return runs with the best rate 1e-3 (gain / 64)^exponent (rank / 8)^in_rank 1.1^seed at every step."""
    random, runs = np.random.default_rng(3), []
    hard = random.normal(size=len(TOKENS))
    for rank in (8, 128):
        for gain in (64.0, 724.0):
            best = 1e-3 * (gain / 64) ** exponent * (rank / 8) ** in_rank
            for seed in range(seeds):
                for rate in RATES:
                    level = 1 + 0.1 * math.log10(rate / best / 1.1**seed) ** 2
                    losses = (level * np.exp(0.1 * hard + noise * random.normal(size=len(TOKENS)))) * TOKENS
                    readings = [Reading(step, losses.tolist(), losses.tolist()) for step in (16, 64)]
                    runs.append(SweepRun(rank, gain, rate, seed, ReadRun([], readings)))
    return runs


def table_of(runs: Sequence[SweepRun]) -> pd.DataFrame:
    return results_table(runs, {"": (TOKENS, TOKENS)})


def select(runs: Sequence[SweepRun], **fields) -> list[SweepRun]:
    return [run for run in runs if all(getattr(run, name) == value for name, value in fields.items())]


def scaled(runs: Sequence[SweepRun], losses: float, rate: float = 1.0) -> list[SweepRun]:
    """Return the runs with their losses and rates multiplied."""
    result = []
    for run in runs:
        readings = [replace(r, losses=[losses * loss for loss in r.losses]) for r in run.read.readings]
        result.append(replace(run, rate=rate * run.rate, read=ReadRun([], readings)))
    return result


def with_parts(runs: Sequence[SweepRun], ratio: float) -> list[SweepRun]:
    """Add two modules to every reading, with parallel parts: the A part is the B part times the ratio."""
    measured = {"layer": [0, 1], "module": ["q_proj"] * 2, "B_part": [1.0, 3.0]}
    measured |= {"A_part": [ratio, 3 * ratio], "whole": [1 + ratio, 3 + 3 * ratio]}
    return [
        replace(
            run, read=replace(run.read, readings=[replace(reading, parts=measured) for reading in run.read.readings])
        )
        for run in runs
    ]


def displaced_runs() -> list[SweepRun]:
    """Return three seeds of runs with the parts of a displacement constant of 130."""
    return [
        run
        for planted in grid(-0.77, seeds=3)
        for run in with_parts([planted], displacement_ratio(planted.gain, displacement_constant=130.0))
    ]


@pytest.fixture(autouse=True)
def few_draws(monkeypatch) -> None:
    """Resample the records less often in a judgement than by default, which no figure here needs."""
    monkeypatch.setattr(analysis, "BOOTSTRAP_SAMPLES", 100)


def curves_of(runs: Sequence[SweepRun], step: int = 64, draws: int = 200) -> list[Curve]:
    return horizon_curves.curves_at(runs, TOKENS, step, draws=draws)


def exponents(runs: Sequence[SweepRun], *, constants=None, **law) -> pd.DataFrame:
    """Return the exponents after 64 steps by ``over`` and ``at``."""
    table = horizon_law.setting_exponents(curves_of(runs), 64, replace(LAW, **law), constants=constants).by_setting
    return table.set_index(["over", "at"])


FINE = 10.0 ** np.arange(-6, -1, 0.25)


def curve(best: Sequence[float], gain: float = 64.0, seeds: tuple[int, ...] = (), rank: int = 8) -> Curve:
    """Return a curve with a best rate for each seed."""
    losses = np.exp(0.1 * np.log(FINE / np.array(best)[:, None]) ** 2)
    seeds = seeds or tuple(range(len(best)))
    return Curve("adamw", "both", "lora", 1.0, rank, gain / rank, FINE, losses, seeds=seeds)


def moved(powers: Sequence[float], factor: float) -> list[float]:
    return [1e-3 * factor**power for power in powers]


def in_gain(first: Sequence[float], second: Sequence[float]) -> dict:
    """Return the exponent between two gains with these best rates of the seeds."""
    ends = [curve(first), curve(second, gain=724.0)]
    (row,) = frames.rows(horizon_law.setting_exponents(ends, 64, LAW).by_setting)
    return row


def in_steps(first: Curve, second: Curve) -> dict:
    """Return the exponent between 16 and 64 steps."""
    (row,) = frames.rows(horizon_law.step_exponents({16: [first], 64: [second]}, LAW))
    return row


CONSTANT = -math.log(61.5 / 13.5, 4)
"""The power of the steps at a constant gradient, from 16 to 64 after a warm-up of 4: 13.5 and 61.5 whole steps."""


def warm_up_factors(steps: int) -> np.ndarray:
    """Return the factors of a constant rate after a warm-up of four steps."""
    return schedule_factor("constant", np.arange(steps), steps=steps, warmup=4)


def adams_power(crossing_distance: float, rate: float = 1e-3) -> float:
    """Find the power of the steps from 16 to 64 that preserves b (1 + a / distance) under Adam, by bisection."""

    def change(steps: int, rate: float) -> float:
        distance = distances(rate * warm_up_factors(steps), crossing_distance=crossing_distance)
        return distance.B * (1 + distance.A / crossing_distance)

    low, high = rate / 64, rate
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if change(64, middle) < change(16, rate) else (low, middle)
    return math.log(low / rate, 4)


# ---- the laws and the exponents in gain and rank


def predicted(steps: int = 64, rate: float = 1e-3, warmup: int = 4, **options) -> list[float]:
    law = replace(LAW, warmup=warmup, **options)
    return law.gain_exponents((64.0, 724.0), steps=steps, rate=rate)


def test_the_predicted_exponent_rises_from_minus_one_to_minus_a_half_with_the_horizon() -> None:
    """A warm-up delays the crossing."""
    for rate in (1e-5, 1e-3):
        medians = [predicted(steps, rate, warmup=0)[1] for steps in (2, 64, 4096)]
        assert medians == sorted(medians)
        assert medians[0] == pytest.approx(-1, abs=0.01 if rate == 1e-5 else 0.3)
        assert medians[2] == pytest.approx(-0.5, abs=0.01 if rate == 1e-3 else 0.2)
    plain, warm = (np.array(predicted(16, warmup=warmup)) for warmup in (0, 8))
    assert (warm < plain).all()


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [1, 2])
def test_a_planted_exponent_is_found_and_judged(seeds: int) -> None:
    """The law is that at the measured best rate of the first gain. One seed decides nothing."""
    table = exponents(grid(-0.53, seeds=seeds))
    verdict = "undecided" if seeds == 1 else "agrees"
    best = 1e-3 * 1.1 ** ((seeds - 1) / 2)
    for rank in (8, 128):
        row = table.loc["gain", rank]
        assert row["exponent"] == pytest.approx(-0.53, abs=0.02)
        assert [row["law_low"], row["law"], row["law_high"]] == pytest.approx(sorted(predicted(rate=best)), abs=2e-3)
        assert (row["first"], row["second"], row["verdict"]) == (64, 724, verdict)
        assert row["error_over"] == ("held-out records" if seeds == 1 else "seeds")
    for gain in (64, 724):
        row = table.loc["rank", gain]
        assert row["exponent"] == pytest.approx(0, abs=0.02)
        assert row["law"] == pytest.approx(0, abs=1e-12)
        assert row["verdict"] == verdict


@pytest.mark.slow
def test_the_law_is_the_range_of_all_modules() -> None:
    """The exponent agrees if it is that of some modules, though not that of the median one."""
    row = exponents(grid(-0.65, seeds=2), crossing_distances=(0.002, 0.004, 0.1)).loc["gain", 128]
    assert row["law"] < -0.6 or row["law"] > -0.6 + row["half_width"]
    assert row["law_low"] < -0.68 < row["law"] < row["law_high"]
    assert row["verdict"] == "agrees"


@pytest.mark.parametrize(
    ("planted", "noise", "verdicts"),
    [
        (-0.53, 1e-3, ("agrees", "contradicts")),
        (-0.79, 1e-3, ("contradicts", "agrees")),
        (-0.65, 6e-2, ("undecided", "undecided")),
        (-0.2, 1e-3, ("contradicts", "contradicts")),
    ],
)
def test_each_law_is_a_rival_of_the_other(planted, noise, verdicts) -> None:
    """The constant-gradient law predicts about -0.53 here, the displacement law -0.63 to -0.79 at K of 105 to 170."""
    table = exponents(grid(planted, seeds=3, noise=noise), constants={64: (105.0, 170.0)})
    row = table.loc["gain", 8]
    assert (row["displacement_low"], row["displacement_high"]) == pytest.approx((-0.789, -0.631), abs=2e-3)
    assert (row["verdict"], row["displacement_verdict"]) == verdicts


def test_full_fine_tuning_is_compared_with_the_adapters_and_in_no_exponent() -> None:
    """Plant a twentieth of the rates and losses 5% lower; without three rates of its own it is left out."""
    runs = grid(-0.53)
    arm = select(runs, rank=8, gain=64.0)
    runs += [replace(run, rank=None, gain=None, method=FULL) for run in scaled(arm, 0.95, rate=1 / 20)]
    curves = curves_of(runs, draws=50)
    table = horizon_curves.compare_best_rates(curves, 64).query("compared_with == 'full'").set_index(["rank", "gain"])
    assert len(table) == 4
    row = table.loc[8, 64]
    assert row["ratio"] == pytest.approx(20, rel=0.05)
    assert row["difference"] == pytest.approx(0.05, rel=0.05)
    assert row["verdict"].startswith("undecided: one seed (+5.")
    assert table.loc[128, 724]["ratio"] == pytest.approx(20 * GROWTH**-0.53, rel=0.05)
    best = frames.rows(horizon_curves.best_rate_table(curves, 64))
    settings = {(row["rank"], row["gain"]) for row in best}
    assert settings == {(None, None), (8, 64), (8, 724), (128, 64), (128, 724)}
    assert list(best[0])[:3] == ["step", "rank", "gain"]
    assert all(isinstance(row["rank"], int) for row in best if row["rank"]), "8, not 8.0, in the file"
    assert {curve.line for curve in curves} == {("adamw", "both", rule, 1.0) for rule in ("full", "lora")}
    lora = [curve for curve in curves if curve.rule == "lora"]
    tables = [horizon_law.setting_exponents(selected, 64, LAW).by_setting for selected in (curves, lora)]
    pd.testing.assert_frame_equal(*tables)
    assert frames.rows(table_of(runs))[0]["gamma"] is None
    assert horizon_curves.compare_best_rates(curves_of([*arm, *runs[-2:]], draws=50), 64).empty


@pytest.mark.parametrize("powers", [(-0.38, -0.58, -0.78), (-0.25, -0.45, -0.65)])
def test_an_interval_that_includes_a_rival_does_not_agree(powers: tuple[float, ...]) -> None:
    """The interval includes the law, and -1 (the law of the first step) or 0."""
    row = in_gain([1e-3] * 3, moved(powers, GROWTH))
    low, high = row["exponent"] - row["half_width"], row["exponent"] + row["half_width"]
    assert low < row["law"] < high
    assert low < -1 or high > 0
    assert row["verdict"] == "undecided"


@pytest.mark.parametrize(
    ("exponent", "spread", "linear_term", "verdict", "displacement"),
    [
        (0.02, 0.03, 0.0, "agrees", "agrees"),
        (0.06, 0.03, 0.0, "undecided", "undecided"),  # an eighth, which a user would notice
        (-0.06, 0.03, 0.0, "undecided", "undecided"),
        (0.40, 0.03, 1e3, "agrees", "contradicts"),  # cross-talk dominates below rank 1000: the law is 0 to 0.48
        (0.44, 0.03, 1e3, "undecided", "contradicts"),  # a half, if it dominates at every rank
        (0.06, 0.03, 1e3, "undecided", "undecided"),  # 0 is within, which both laws predict
        (0.02, 0.03, 1e3, "undecided", "agrees"),
    ],
)
def test_a_rival_in_the_rank_prevents_agreement(exponent, spread, linear_term, verdict, displacement) -> None:
    """Three seeds, whose interval is 2.5 spreads wide on either side."""
    powers = (exponent - spread, exponent, exponent + spread)
    ends = [curve([1e-3] * 3), curve(moved(powers, 16), rank=128)]
    (row,) = frames.rows(horizon_law.setting_exponents(ends, 64, replace(LAW, linear_terms=(linear_term,))).by_setting)
    assert (row["over"], row["verdict"], row["displacement_verdict"]) == ("rank", verdict, displacement)


def test_an_edge_at_either_gain_decides_nothing() -> None:
    """The same exponent without an edge contradicts the law."""
    for first, second, verdict, edge in (
        (1e-3, 1e-5, "contradicts", ""), (1e-1, 1e-3, "undecided", "first"), (1e-4, 1e-6, "undecided", "second"),
        (1e-1, 1e-6, "undecided", "both"),
    ):  # fmt: skip
        row = in_gain([first] * 3, [second] * 3)
        assert (row["verdict"], row["edge"]) == (verdict, edge)


def test_in_the_rank_the_law_includes_cross_talk() -> None:
    """An exponent of 0.1 contradicts a signal that leads everywhere; with modules' linear terms it is within."""
    runs = grid(-0.53, in_rank=0.1, seeds=3)
    signal = exponents(runs)
    row = signal.loc["rank", 64.0]
    assert row["exponent"] == pytest.approx(0.1, abs=0.02)
    assert (row["law_low"], row["law"], row["law_high"], row["verdict"]) == (0, 0, 0, "contradicts")
    assert signal.loc["gain", 8]["verdict"] == "agrees"
    for terms in ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)):  # the signal dominates at every rank; an exponent of 0.016 at most
        assert exponents(runs, linear_terms=terms).loc["rank", 64.0]["verdict"] == "contradicts"
    terms = (8.0, 10.0, 58.0)
    crossed = exponents(runs, linear_terms=terms)
    row = crossed.loc["rank", 64.0]
    preserving = [math.log((1 + c / 8) / (1 + c / 128)) / 2 / math.log(16) for c in terms]
    assert row["law_low"] == 0
    assert row["law"] == pytest.approx(preserving[1], rel=1e-9)
    assert row["law_high"] == pytest.approx(np.quantile(preserving, 0.95), rel=1e-9)
    # The rank has an effect beyond gamma r, against the displacement law.
    assert (row["verdict"], row["displacement_verdict"]) == ("agrees", "contradicts")
    pd.testing.assert_frame_equal(crossed.loc["gain"], signal.loc["gain"])
    judged = analysis.judge_runs(runs, BY_LOSS, replace(LAW, linear_terms=terms))["exponents"]
    assert set(judged[judged["over"] == "rank"]["verdict"]) == {"agrees"}


def test_pooled_exponents_have_narrower_intervals_and_the_same_predictions() -> None:
    """Two ranks of three seeds; a third rank with one seed is left out of the pool."""
    runs = grid(-0.7, seeds=3, noise=3e-3)
    single = [replace(run, rank=1) for run in select(runs, rank=8, seed=0)]
    judged = analysis.judge_runs([*runs, *single], BY_LOSS, LAW)
    rows = judged["pooled"].query("step == 64 and over == 'gain' and verdict.notna()")
    (row,) = frames.rows(rows)
    assert (row["at"], row["first"], row["second"], row["seeds"]) == ("8 128", 64, 724, 3)
    assert row["exponent"] == pytest.approx(-0.7, abs=0.02)
    alone = judged["exponents"].query("step == 64 and over == 'gain' and seeds == 3")
    assert row["half_width"] < alone["half_width"].min()
    assert (row["law_low"], row["law_high"]) == pytest.approx((alone["law_low"].min(), alone["law_high"].max()))
    assert row["verdict"] == "contradicts", "a constant gradient has about -0.5"


def test_every_rank_is_compared_with_the_largest() -> None:
    """A rank with one seed is compared by that seed, and leaves the comparison of two ranks with three as it is."""
    runs = grid(-0.7, seeds=3)
    single = [replace(run, rank=1) for run in select(runs, rank=8, seed=0)]
    table = exponents([*runs, *single]).loc["rank"]
    assert table.loc[64.0, ["first", "second", "seeds"]].to_numpy().tolist() == [[1, 128, 1], [8, 128, 3]]
    pd.testing.assert_frame_equal(exponents(runs).loc["rank"], table[table["first"] == 8], rtol=1e-9)
    of_seed_0 = exponents(select(runs, seed=0)).loc["rank"]
    octaves = table["first"].map({1: 7, 8: 4})  # from each rank to 128
    moves = (table["exponent"] * octaves)[table["first"] == 1]
    assert moves.to_numpy() == pytest.approx(4 * of_seed_0["exponent"].to_numpy(), abs=1e-9)


def test_beside_a_run_that_diverged_the_exponent_is_known_to_half_a_step_of_the_grid() -> None:
    """All seeds have the same best rate of the grid there. Their spread of 0 does not contradict a law."""
    runs = []
    for run in grid(-0.53, seeds=3, noise=0.0):
        best = 1e-3 * (run.gain / 64) ** -0.53  # the next rate above it diverges
        diverges = run.rate > 10 ** (math.ceil(4 * math.log10(best)) / 4) * 1.01
        runs.append(replace(run, read=ReadRun([], [], diverged_at=5)) if diverges else run)
    row = exponents(runs).loc["gain", 8]
    step = math.log2(10) / 4
    assert row["half_width"] == pytest.approx((step / 2 + step / 2) / math.log2(GROWTH), rel=1e-6)
    assert row["verdict"] != "contradicts"


# ---- exponents in the steps


@pytest.mark.parametrize("crossing_distance", [1e-4, 0.004, 1.0, math.inf])
def test_the_law_in_the_steps_is_that_of_adam(crossing_distance: float) -> None:
    """If A takes over, its gradient grows and Adam follows faster than a constant gradient; not where B dominates."""
    rate = rate_for_equal_change(1e-3, warm_up_factors(16), warm_up_factors(64), crossing_distance=crossing_distance)
    power = math.log(rate / 1e-3, 4)
    assert power == pytest.approx(adams_power(crossing_distance), abs=1e-6)
    assert (power < CONSTANT - 0.1) if crossing_distance < 0.01 else power == pytest.approx(CONSTANT, abs=0.01)


ADAM = adams_power(0.004, 1.1e-3)
"""The power at the median crossing distance and the mean best rate of `grid`'s three seeds."""


@pytest.mark.parametrize(("planted", "verdict"), [(ADAM, "agrees"), (-0.5, "contradicts"), (-1.0, "contradicts")])
def test_how_the_best_rate_falls_with_the_steps(planted: float, verdict: str) -> None:
    early = select(grid(-0.53, seeds=3), rank=8, gain=64.0)
    by_step = {16: early, 64: scaled(early, 1.0, rate=4**planted)}
    curves = {step: curves_of(runs, draws=50) for step, runs in by_step.items()}
    (row,) = frames.rows(horizon_law.step_exponents(curves, LAW))
    assert (row["rank"], row["gain"], row["first"], row["second"], row["seeds"]) == (8, 64, 16, 64, 3)
    assert row["exponent"] == pytest.approx(planted, abs=0.01)
    assert row["law"] == pytest.approx(ADAM, abs=2e-3)
    assert row["law_low"] < row["law"] < row["law_high"] < CONSTANT
    assert row["half_width"] < 0.05
    assert row["verdict"] == verdict


@pytest.mark.parametrize("order", [(16, 64, 256), (256, 16, 64)])
def test_all_pairs_of_steps_are_compared_within_a_setting(order) -> None:
    """Planted powers of 4 for each fourfold number of steps: -1/2 from 16 to 64, -1 from 64 to 256."""
    powers = {16: 0.0, 64: -0.5, 256: -1.5}
    at_64 = {step: curve(moved([powers[step]] * 3, 4)) for step in order}
    at_724 = {step: curve([1e-4] * 3, gain=724.0) for step in (16, 64)}
    rank_32 = replace(at_64[64], rank=32, scaling=2.0)  # one number of steps
    by_step = {step: [at_64[step], *([at_724[step]] if step in at_724 else [])] for step in order}
    by_step[64].append(rank_32)
    table = horizon_law.step_exponents(by_step, LAW)
    pairs = [tuple(row) for row in table[["rank", "gain", "first", "second"]].to_numpy().tolist()]
    assert pairs == [(8, 64, 16, 64), (8, 64, 16, 256), (8, 64, 64, 256), (8, 724, 16, 64)]
    assert table["exponent"].tolist() == pytest.approx([-0.5, -0.75, -1.0, 0.0], abs=1e-6)
    assert table["edge"].tolist() == [""] * 4


def test_a_pair_of_steps_names_the_best_rate_at_an_end_of_its_grid() -> None:
    """Such a pair decides nothing; the same exponent without an edge contradicts the law."""
    inside, low, high = (curve([rate] * 3) for rate in (1e-3, 1e-7, 1e-1))
    for first, second, edge in (
        (inside, curve(moved([-0.2] * 3, 4)), ""),
        (high, inside, "first"),
        (inside, low, "second"),
        (high, low, "both"),
        (low, high, "both"),
    ):
        row = in_steps(first, second)
        assert (row["edge"], row["verdict"]) == (edge, "undecided" if edge else "contradicts")
    # Only the seeds of both numbers of steps count.
    mixed = curve([1e-3, 1e-3, 1e-7], seeds=(0, 1, 2))
    assert in_steps(mixed, curve([2e-4] * 2, seeds=(0, 1)))["edge"] == ""
    assert in_steps(mixed, curve([2e-4] * 3, seeds=(0, 1, 2)))["edge"] == "first"


def test_full_fine_tuning_is_judged_by_the_law_of_a_weight_that_moves_by_itself() -> None:
    """It preserves the sum of the rates; the crossing distances are those of adapters."""
    adapter_law = adams_power(0.004)
    for power, full, adapter in ((CONSTANT, "agrees", "contradicts"), (adapter_law, "contradicts", "agrees")):
        ends = curve([1e-3] * 3), curve(moved([power - 0.01, power, power + 0.01], 4))
        assert in_steps(*ends)["verdict"] == adapter
        row = in_steps(*(replace(end, rule=FULL, rank=0, scaling=1.0) for end in ends))
        assert row["verdict"] == full
        assert [row["law_low"], row["law"], row["law_high"]] == pytest.approx([CONSTANT] * 3)


def test_a_step_before_anything_has_moved_has_no_exponent() -> None:
    """The first step's rate is 0 under a warm-up."""
    by_step = {step: [curve([1e-3] * 3)] for step in (1, 16, 64)}
    assert horizon_law.step_exponents(by_step, LAW)["first"].tolist() == [16]
    assert horizon_law.step_exponents(by_step, replace(LAW, warmup=0))["first"].tolist() == [
        1,
        1,
        16,
    ]


def test_one_seed_or_a_rival_decides_nothing_in_the_steps() -> None:
    assert in_steps(curve([1e-3]), curve(moved([-0.2], 4)))["verdict"] == "undecided"
    # The interval includes the law, and -1/2: a random walk.
    row = in_steps(curve([1e-3] * 3), curve(moved([-0.7, -1.0, -1.3], 4)))
    assert row["exponent"] - row["half_width"] < row["law"]
    assert row["exponent"] + row["half_width"] > -0.5
    assert row["verdict"] == "undecided"


def test_best_rates_in_the_steps_are_paired_by_seed() -> None:
    apart, seeds = [1e-3, 4e-3, 16e-3], (0, 1, 2)
    later = curve([rate / 4 for rate in reversed(apart)], seeds=seeds[::-1])
    row = in_steps(curve(apart, seeds=seeds), later)
    assert (row["exponent"], row["standard_error"]) == (pytest.approx(-1.0), pytest.approx(0, abs=1e-9))
    other = {16: [curve(apart, seeds=seeds)], 64: [curve(apart, seeds=(3, 4, 5))]}
    assert horizon_law.step_exponents(other, LAW).empty


# ---- comparisons of curves


def test_curves_are_compared_with_the_largest_rank_and_the_largest_gain() -> None:
    """Losses of r = 8 at gamma r = 64 are planted 5% higher: it is behind in rank and gain, by that much."""
    runs = grid(-0.53, seeds=3)
    low = select(runs, rank=8, gain=64.0)
    runs = [run for run in runs if run not in low] + scaled(low, 1.05)
    table = horizon_curves.compare_best_rates(curves_of(runs, draws=50), 64).set_index(["rank", "gain"])
    for largest, settings in (("r = 128", [(8, 64), (8, 724)]), ("gamma r = 724", [(8, 64), (128, 64)])):
        rows = table[table["compared_with"] == largest]
        assert rows.index.tolist() == settings, "the largest has no reference"
        assert (rows["seeds"] == 3).all()
        behind, equal = rows.iloc[0], rows.iloc[1]
        assert behind["difference"] == pytest.approx(0.05, rel=0.1)
        assert behind["verdict"].startswith(f"{largest} is better by 5.")
        assert abs(equal["difference"]) < equal["half_width"] < 0.05
        ratio = 1 if largest == "r = 128" else GROWTH**0.53
        assert rows["ratio"].to_numpy() == pytest.approx(ratio, rel=0.1)
    assert len(table) == 4


def test_at_one_rate_a_difference_can_come_from_the_rate_alone() -> None:
    """Both gains have one lowest loss; at one rate either is lower, by its distance from its own best rate."""
    runs = [run for run in grid(-0.53, seeds=3) if (run.rank, run.rate) != (8, RATES[0])]
    runs[0] = replace(runs[0], read=ReadRun([], [], diverged_at=3))
    runs = [run for run in runs if (run.rank, run.gain, run.seed) != (128, 724, 2)]
    runs += [replace(run, rank=None, gain=None, method=FULL) for run in runs[:3]]
    runs += [replace(run, rank=16, gain=5000.0) for run in runs[:3]]
    assert runs[0].rate == RATES[1]
    table = horizon_curves.compare_at_one_rate(runs, TOKENS, 64)
    assert (table["gain"] == 64).all(), "the largest gain has no reference"
    assert (table["compared_with"] == "gamma r = 724").all()
    assert (table["step"] == 64).all()
    by_rank = {rank: rows.set_index("learning_rate") for rank, rows in table.groupby("rank")}
    assert by_rank[8].index.tolist() == RATES[1:], "not at a rate that neither ran"
    assert by_rank[128].index.tolist() == RATES
    assert by_rank[8]["seeds"].tolist() == [2, *[3] * (len(RATES) - 2)], "a seed that diverged is left out"
    assert (by_rank[128]["seeds"] == 2).all(), "and a seed that ran at only one gain"
    hard = np.random.default_rng(3).normal(size=len(TOKENS))
    level = np.average(np.exp(0.1 * hard), weights=TOKENS)
    for rank in (8, 128):
        for rate, row in by_rank[rank].iterrows():
            seeds = [0, 1] if rank == 128 else [1, 2] if rate == RATES[1] else [0, 1, 2]
            squares = [
                np.mean([math.log10(rate / 1e-3 / (gain / 64) ** -0.53 / 1.1**seed) ** 2 for seed in seeds])
                for gain in (64, 724)
            ]
            assert row["difference"] == pytest.approx(0.1 * level * (squares[0] - squares[1]), abs=3e-3)
            assert 0 < row["half_width"] < 0.3
    assert by_rank[8]["difference"].iloc[1] > 0.08
    assert by_rank[8]["difference"].iloc[-1] < -0.08
    judged = analysis.judge_runs(runs, BY_LOSS, NO_LAW)
    assert len(judged["one_rate"]) == 2 * len(table)
    assert len(judged["best"]) == 2 * (4 + 2), "a curve for each arm and step, also for three runs without a partner"
    assert (len(judged["exponents"]), len(judged["steps"])) == (0, 0), "no crossing distances, no law"


def test_runs_are_compared_with_those_of_another_setting() -> None:
    """The others have 3% lower losses, and rates higher by 2 and 4. Full fine-tuning is compared with its own."""
    runs = select(grid(-0.53, seeds=2), rank=8)
    runs += [replace(run, rank=None, gain=None, method=FULL) for run in select(runs, gain=64.0)]
    other_runs = [other for run in runs for other in scaled([run], 0.97, rate=4.0 if run.gain == 724.0 else 2.0)]
    judged = analysis.judge_runs(runs, BY_LOSS, NO_LAW, other_runs={"targets all": other_runs})
    table = judged["comparisons"].query("step == 64 and compared_with == 'targets all'")
    assert table["rank"].fillna(0).tolist() == [0, 8, 8]
    assert table["ratio"].to_numpy() == pytest.approx([0.5, 0.5, 0.25], rel=0.02)
    assert table["difference"].to_numpy() == pytest.approx(0.03, rel=0.1)
    assert all(verdict.startswith("targets all is better by 3.") for verdict in table["verdict"])


# ---- which runs make a curve


def test_diverged_and_shorter_runs() -> None:
    """A run that diverged has an infinite loss from then on; one that ended before a step is not in its curve."""
    runs = grid(-0.53)
    bare = [run for run in runs if run.rate < 2e-3]
    (top,) = {run.rate for run in runs if 2e-3 < run.rate < 4e-3}
    first = runs[0].read.readings[:1]
    diverged = [SweepRun(8, gain, top, 0, ReadRun([], first, diverged_at=20)) for gain in (64.0, 724.0)]
    with_top = {curve.rank: curve for curve in curves_of(bare + diverged)}[8]
    assert with_top.rates[-1] == top
    assert np.isinf(with_top.losses[:, -1]).all()
    short = [replace(run, read=ReadRun([], first)) for run in diverged]
    assert {curve.rates[-1] for curve in curves_of(bare + short)} == {max(run.rate for run in bare)}
    late = replace(diverged[0], read=replace(diverged[0].read, diverged_at=100))
    assert [late.reaches(step) for step in (16, 64, 99, 100, 256)] == [True, False, False, True, True]
    decaying = replace(diverged[0], read=replace(diverged[0].read, readings=[]), steps=64)
    assert [decaying.reaches(step) for step in (20, 64, 256)] == [False, True, False], "it had another rate there"
    table = table_of(diverged)
    assert table["status"].tolist() == ["complete", "diverged"] * 2
    assert table["step"].tolist() == [16, 20] * 2


def test_a_poor_seed_spoils_no_curve() -> None:
    """Left out: a seed of two rates, one with other rates, one that diverged at every rate, an arm of these alone."""
    runs = select(grid(-0.53, seeds=2), rank=8, gain=64.0)
    unspoiled = curves_of(runs, draws=20)[0]

    def diverged(rate: float, seed: int, rank: int = 8) -> SweepRun:
        return SweepRun(rank, 64.0, rate, seed, ReadRun([0.0] * 40, [], diverged_at=40))

    poor = [replace(run, seed=2) for run in runs[:2]]
    poor += [replace(run, seed=3, rate=1.1 * run.rate) for run in runs[:4]]
    poor += [diverged(rate, 4) for rate in RATES[-4:]]
    poor += [diverged(rate, seed, rank=16) for rate in RATES[-4:] for seed in (0, 1)]
    (spoiled,) = curves_of([*runs, *poor], draws=20)
    assert spoiled.seeds == (0, 1)
    assert spoiled.rates.tolist() == unspoiled.rates.tolist()
    np.testing.assert_allclose(spoiled.losses, unspoiled.losses, rtol=1e-12)
    mirrored = [
        replace(run, seed=6, read=ReadRun([], [], diverged_at=5) if run.rate > RATES[0] else run.read)
        for run in runs if run.seed == 0
    ]  # fmt: skip
    first = [replace(run, read=ReadRun([], [], diverged_at=5)) if run.rate == RATES[0] else run for run in runs]
    assert curves_of([*first, *mirrored], draws=20)[0].seeds == (0, 1), "seeds without a common finite rate"
    for rates in (RATES[2:], RATES[4:7]):  # a seed needs three rates, which are those of the curve
        few = [replace(run, seed=5) for run in runs if run.seed == 0 and run.rate in rates]
        (shortened,) = curves_of([*runs, *few], draws=20)
        assert (shortened.seeds, shortened.rates.tolist()) == ((0, 1, 5), rates)
        assert shortened.losses.shape == (3, len(rates))


def test_runs_that_differ_in_their_length_are_one() -> None:
    """The longer run's readings, except where only the shorter has the parts; counted once in every table."""
    short = ReadRun([1.0] * 64, [Reading(16, [1.0], [1.0]), Reading(64, [2.0], [2.0])])
    measured = {"B_part": [1.0], "A_part": [1.0], "whole": [2.0]}
    long = ReadRun([1.0] * 256, [Reading(step, [9.0], [9.0]) for step in (64, 256)])
    runs = [SweepRun(8, 64.0, 1e-3, 0, read) for read in (long, short)]
    (merged,) = merge_repeated_runs(runs)
    assert len(merged.read.train_losses) == 256
    assert [(r.step, r.losses) for r in merged.read.readings] == [(16, [1.0]), (64, [9.0]), (256, [9.0])]
    short.readings[1] = replace(short.readings[1], parts=measured)
    assert [r.losses for r in merge_repeated_runs(runs)[0].read.readings] == [[1.0], [2.0], [9.0]]
    long.readings[0] = replace(long.readings[0], parts=measured)
    assert [r.losses for r in merge_repeated_runs(runs)[0].read.readings] == [[1.0], [9.0], [9.0]]
    lost = replace(runs[0], read=ReadRun([1.0] * 9, [], diverged_at=10))
    (merged,) = merge_repeated_runs([runs[1], lost])
    outcomes = [merged.at(step, [1]).loss for step in (16, 64, 256) if merged.reaches(step)]
    assert outcomes == [1.0, 2.0, math.inf], "the longer run diverged before the shorter one ended"
    distinct = [replace(runs[0], **change) for change in ({"seed": 1}, {"rate": 2e-3}, {"rank": 4}, {"gain": 8.0})]
    merged = merge_repeated_runs([*runs, *distinct])
    assert len(analysis.judge_runs(merged, {"all": [1]}, NO_LAW)["parts"]) == len(merged) == 5
    decaying = [replace(runs[0], steps=256), replace(runs[1], steps=64)]
    assert merge_repeated_runs([*decaying, *decaying]) == decaying[::-1], "two lengths, the shorter first"


def test_a_step_that_few_runs_reach_leaves_the_others_as_they_are() -> None:
    """One run of 256 steps makes no curve there, and does not convert the other steps to floats."""
    runs = select(grid(-0.7, seeds=2), rank=8)
    longer = replace(runs[0].read.readings[-1], step=256)
    runs[0] = replace(runs[0], read=replace(runs[0].read, readings=[*runs[0].read.readings, longer]))
    judged = analysis.judge_runs(runs, BY_LOSS, LAW)
    for frame in (judged["best"], judged["exponents"]):
        assert sorted(set(frame["step"])) == [16, 64]
        assert frame["step"].dtype.kind == "i"


def test_further_axes_are_analysed_by_themselves_and_compared_with_the_first() -> None:
    """Every frame then has a column for the axis, and its own law; losses of the second value are lower by 5%."""
    runs = select(grid(-0.7, seeds=2), rank=8)
    axes = {"constant": (("schedule", "constant"), ("warmup", 4)), "cosine": (("schedule", "cosine"), ("warmup", 8))}
    cosine = [replace(run, axes=axes["cosine"], steps=64) for run in scaled(runs, 0.95)]
    constant = [replace(run, axes=axes["constant"]) for run in runs]
    shared = {"warmup": 4, "schedule": "constant"}
    judged = analysis.analyse([*constant, *cosine], {"": (TOKENS, TOKENS)}, shared, law=LAW)
    assert judged["best"].groupby("schedule").size().to_dict() == {"constant": 4, "cosine": 4}
    compared = judged["comparisons"].query("compared_with == 'schedule constant, warmup 4'")
    assert set(compared["schedule"]) == {"cosine"}
    assert (compared["difference"] < -0.04).all()
    for schedule, warmup in (("constant", 4), ("cosine", 8)):
        (row,) = frames.rows(judged["exponents"].query(f"schedule == '{schedule}' and step == 64"))
        (best,) = judged["best"].query(f"schedule == '{schedule}' and step == 64 and gain == 64")["best_rate"]
        expected = predicted(rate=best, warmup=warmup, schedule=schedule)
        assert row["law"] == pytest.approx(expected[1], abs=1e-6)
    alone = analysis.analyse(runs, {"": (TOKENS, TOKENS)}, shared)
    assert "schedule" not in alone["best"]
    first = judged["best"].query("schedule == 'constant'").drop(columns=["schedule", "warmup"])
    pd.testing.assert_frame_equal(alone["best"], first)


def test_every_combination_is_compared_with_the_first_alone() -> None:
    """DoRA is another adapter than LoRA, while rules of scaling are the same one at another G."""
    runs = select(grid(-0.7, seeds=2), rank=8, gain=64.0)
    shared = {"warmup": 4, "schedule": "constant"}
    arms = [replace(run, axes=(("batch_size", size),)) for size in (4, 8, 16) for run in scaled(runs, 1 - size / 100)]
    judged = analysis.analyse(arms, {"": (TOKENS, TOKENS)}, shared)
    assert set(judged["comparisons"]["compared_with"]) == {"batch_size 4"}
    assert set(judged["comparisons"]["batch_size"]) == {8, 16}
    methods = [
        replace(run, method=method, gain=gain)
        for method, gain in (("lora", 64.0), ("rora", 256.0), ("dora", 64.0))
        for run in runs
    ]
    best = analysis.analyse(methods, {"": (TOKENS, TOKENS)}, shared)["best"].query("step == 64")
    adapters = list(best[["adapter", "gain"]].itertuples(index=False, name=None))
    assert adapters == [("lora", 64.0), ("lora", 256.0), ("dora", 64.0)]
    models = [replace(run, model=model) for model in ("m", "n") for run in runs]
    judged = analysis.analyse(models, dict.fromkeys("mn", (TOKENS, TOKENS)), shared)
    assert set(judged["best"]["model"]) == {"m", "n"}
    assert judged["comparisons"].empty, "losses of two models cannot be compared"


@pytest.mark.slow
def test_the_table_and_the_figure_of_best_rates(tmp_path) -> None:
    runs = grid(-0.5)
    curves = {step: curves_of(runs, step) for step in (16, 64)}
    best = {step: horizon_curves.best_rate_table(step_curves, step) for step, step_curves in curves.items()}
    settings = list(zip(best[16]["step"], best[16]["rank"], best[16]["gain"], strict=True))
    assert settings == [(16, 8, 64), (16, 8, 724), (16, 128, 64), (16, 128, 724)]
    np.testing.assert_allclose(best[16]["best_rate"], 1e-3 * (best[16]["gain"] / 64) ** -0.5, rtol=0.05)
    assert not best[16]["edge"].any()
    judged = [horizon_law.setting_exponents(step_curves, step, LAW).by_setting for step, step_curves in curves.items()]
    judged[1] = judged[1][judged[1]["at"] == 8]
    tables = {"results": table_of(runs), "exponents": pd.concat(judged)}
    tables["best"] = pd.concat([best[16], best[64][best[64]["rank"] == 8]])
    for name, table in tables.items():
        (tmp_path / f"{name}.csv").write_text(frames.to_csv(table))
    (tmp_path / "manifest.json").write_text(json.dumps({"experiment": "sweep", "files": {}}))
    assert [path.name for path in figure.draw_horizon(figure.HorizonOptions(tmp_path))] == [
        "horizon.png",
        "horizon.svg",
    ]
    drawn = (tmp_path / "horizon.svg").read_text()
    assert all(name in drawn for name in ("16 steps", "64 steps", "r = 8", "r = 128"))
    assert "256 steps" not in drawn, "no label of steps that no run has"


def test_a_bound_is_crossed_out_among_rates_and_exponents() -> None:
    rows = [
        {"step": 16, "rank": 8, "gain": 64.0, "best_rate": 1e-3, "log2_error": None, "edge": "high"},
        {"step": 64, "rank": 8, "gain": 64.0, "best_rate": 4e-4, "log2_error": 0.1, "edge": None},
    ]
    drawn, panels = figure.plt.subplots(2)
    table = frames.from_rows(rows, list(rows[0]))
    figure.draw_against_steps(panels[0], table, [8])
    exponents = table.assign(at=8.0, exponent=[-0.7, -0.6], half_width=0.1, law_low=-0.6, law_high=-0.5)
    figure.draw_exponents(panels[1], exponents, [8], [16, 64])
    lines = [line for axes in panels for line in axes.lines if line.get_marker() == "x"]
    assert [line.get_xydata().tolist() for line in lines] == [[[16, 1e-3]], [[16, -0.7]]]
    figure.plt.close(drawn)


# ---- measured parts of the change


def test_the_ratios_of_each_reading_are_summarised() -> None:
    """Quantiles over modules; no row for a reading without parts."""
    measured = {"layer": [0, 0, 1], "module": ["q_proj", "v_proj", "q_proj"]}
    measured |= {"B_part": [1.0, 2.0, 4.0], "A_part": [2.0, 2.0, 2.0], "whole": [3.0, 4.0, 6.0]}
    bare = Reading(64, [1.0], [1.0])
    runs = [
        SweepRun(8, 64.0, 1e-3, 2, ReadRun([], [Reading(16, [1.0], [1.0], measured), bare])),
        SweepRun(None, None, 1e-4, 0, ReadRun([], [bare]), method=FULL),
    ]
    (row,) = change_parts.part_table(runs).to_dict("records")
    assert [row[name] for name in ("rank", "gain", "learning_rate", "seed", "step")] == [8, 64.0, 1e-3, 2, 16]
    assert row["ratio"] == 1.0
    assert 0.5 < row["ratio_low"] < 0.6 < 1.8 < row["ratio_high"] < 2
    still = {name: [*values, 0.0] for name, values in runs[0].read.readings[0].parts.items()}
    runs[0].read.readings[0] = replace(runs[0].read.readings[0], parts=still)
    (with_still,) = change_parts.part_table(runs).to_dict("records")
    assert with_still["ratio"] == row["ratio"], "a module that has not moved has no ratio"
    assert change_parts.part_table(runs[1:]).empty


def test_the_displacement_constant_is_that_of_runs_up_to_half_a_step_above_the_best_rate() -> None:
    """A quarter decade is a step of the grid: half of it is a factor of 1.334. K is G rho (1 + rho)."""
    columns = {"rank": 8, "gain": 64.0, "step": 64}
    ratios = {5e-4: 0.5, 1.33e-3: 1.0, 1.34e-3: 9.0}
    parts = [columns | {"learning_rate": rate, "ratio": ratio} for rate, ratio in ratios.items()]
    parts.append(parts[0] | {"rank": 16})  # without a best rate
    best = pd.DataFrame([columns | {"best_rate": 1e-3}, columns | {"rank": None, "best_rate": 1.0}])
    (row,) = frames.rows(change_parts.constants_by_steps(pd.DataFrame(parts), best))
    assert row == columns | {"constant": 88.0, "constant_low": 48.0, "constant_high": 128.0, "runs": 2}


# ---- regret and whole curves


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")  # which is faster
def test_constants_and_regrets_of_planted_runs(monkeypatch) -> None:
    calls = []

    bootstrap = trained_runs.bootstrap

    def count(*arguments, **options):
        calls.append(arguments)
        return bootstrap(*arguments, **options)

    monkeypatch.setattr(trained_runs, "bootstrap", count)
    judged = analysis.judge_runs(displaced_runs(), BY_LOSS, LAW)
    assert len(calls) == 2 * 2 * 2 * 3, "one bootstrap for each rank, gain, step and seed: the regret needs no more"
    assert set(judged["constants"]["step"]) == {16, 64}
    for name in ("constant", "constant_low", "constant_high"):
        np.testing.assert_allclose(judged["constants"][name], 130.0, rtol=1e-9)
    # Half of the rates of a curve lie at or below the best one.
    assert judged["constants"]["runs"].between(3, 3 * len(RATES) - 1).all()
    costs = judged["regret"].query("steps == 64 and old_steps == 64 and old_gain == 64 and gain == 724")
    by_policy = costs[(costs["old_rank"] == 8) & (costs["rank"] == 8)].set_index("policy")["regret"]
    # Log10 of the rate over the best one: planted 0.77 log10(724 / 64) = 0.811 less what the policy divides by.
    for policy, decades in (("keep the rate", 0.811), ("first step", -0.242), ("square root", 0.284)):
        assert by_policy[policy] == pytest.approx(0.1 * decades**2, abs=4e-3), policy
    assert by_policy["displacement"] < 2e-3
    assert {"rank", "gain", "steps", "rank gain steps"} <= set(judged["regret"]["changed"])
    summary = judged["policies"].set_index(["changed", "policy"])
    pairs = judged["regret"].query("changed == 'gain' and policy == 'first step' and not is_edge")
    assert summary.loc[("gain", "first step"), "pairs"] == len(pairs)
    assert summary.loc[("gain", "first step"), "largest"] == pytest.approx(pairs["regret"].max())
    assert summary.loc[("gain", "displacement"), "largest"] < summary.loc[("gain", "square root"), "median"]
    assert (judged["regret"]["rank"] >= judged["regret"]["old_rank"]).all()
    assert (judged["regret"]["steps"] >= judged["regret"]["old_steps"]).all()


def test_a_rate_that_one_seed_alone_ran_is_read_from_that_seed() -> None:
    runs = select(grid(-0.77, seeds=3), rank=8)
    runs = [run for run in runs if run.gain == 64 or run.seed == 1 or run.rate < 3e-4]
    costs = regret.regret_table(runs, TOKENS, {64: curves_of(runs, draws=50)}, measured_policies({64: 130.0}), draws=50)
    row = costs[costs["old_gain"] == 64].set_index("policy").loc["keep the rate"]
    assert (row["seeds"], row["is_lower_bound"]) == (1, False)
    assert row["regret"] == pytest.approx(0.1 * 0.811**2, abs=0.02)


def test_a_pair_with_a_best_rate_at_the_end_of_either_grid_is_marked() -> None:
    """In the runs at G = 64 the loss rises from the lowest rate on; the others have their best rate inside."""
    runs = select(grid(-0.77, seeds=2), rank=8)
    policy = {"keep the rate": measured_policies({})["keep the rate"]}
    for at_64, is_edge in ((runs, False), ([run for run in runs if run.gain == 724 or run.rate > 2e-3], True)):
        costs = regret.regret_table(at_64, TOKENS, {64: curves_of(at_64, draws=20)}, policy, draws=20)
        marks = costs[["old_gain", "gain", "is_edge"]].to_numpy().tolist()
        assert marks == [[64, 724, is_edge], [724, 64, is_edge]]


def test_exponents_of_whole_curves_alone_and_pooled() -> None:
    """Two ranks and two seeds with a planted exponent; a verdict stands beside the pooled one alone."""
    curves = curves_of(grid(-0.7, in_rank=0.1, seeds=2), draws=20)
    measured = horizon_law.setting_exponents(curves, 64, LAW)
    table = measured.pooled.set_index(["over", "at"])
    for at in ("8", "128", "8 128"):
        row = table.loc["gain", at]
        assert row["exponent"] == pytest.approx(-0.7, abs=0.03)
        assert (row["first"], row["second"], row["seeds"], row["edge"]) == (64, 724, 2, False)
        assert row["standard_error"] > 0
        assert pd.isna(row["verdict"]) == (at != "8 128")
    assert table.loc["rank", "64 724"]["exponent"] == pytest.approx(0.1, abs=0.03)
    both = measured.by_setting[measured.by_setting["over"] == "gain"]
    assert table.loc["gain", "8 128"]["law_low"] == both["law_low"].min() < both["law_low"].max()
    assert table.loc["gain", "8 128"]["law_high"] == both["law_high"].max()


def test_the_law_of_a_constant_gradient_follows_the_schedule() -> None:
    """With a decay A moves less, and the best rate falls more."""
    constant, cosine = (np.array(predicted(schedule=name)) for name in ("constant", "cosine"))
    assert (GROWTH**-cosine > 1.03 * GROWTH**-constant).all()


def test_all_pairs_of_gains_are_compared_by_whole_curves() -> None:
    arm = select(grid(0.0, seeds=2), rank=8, gain=64.0)
    runs = [replace(run, gain=gain) for gain in (16.0, 64.0, 724.0) for run in arm]
    table = horizon_law.setting_exponents(curves_of(runs, draws=20), 64, NO_LAW).pooled
    assert {(row["first"], row["second"]) for row in frames.rows(table)} == {(16, 64), (16, 724), (64, 724)}
    assert set(table["over"]) == {"gain"}
    np.testing.assert_allclose(table["exponent"], 0, atol=1e-3)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_the_advice_is_the_rate_that_transfer_names(schedule) -> None:
    """The constants are the default ones, whatever the runs' own K is."""
    policy = measured_policies({64: 130.0})["advice"]
    old, new = Run(8, 64.0, 64), Run(128, 724.0, 256)
    run_settings = {"steps": 64, "to_steps": 256, "schedule": schedule}
    advice = transfer(Setting(8, 64.0, 1e-3), 128, alpha=724.0, **run_settings)
    assert policy(old, new, 1e-3) == pytest.approx(advice.learning_rate, rel=1e-12)
    assert policy(old, new, 1e-3) != pytest.approx(measured_policies({64: 130.0})["displacement"](old, new, 1e-3))


def test_runs_without_measured_parts_have_the_regret_of_the_other_policies() -> None:
    """Only the displacement law needs a constant K of the runs."""
    costs = analysis.judge_runs(grid(-0.53), BY_LOSS, NO_LAW)["regret"]
    assert set(costs["policy"]) == {"keep the rate", "first step", "square root", "G^-0.75", "advice"}
