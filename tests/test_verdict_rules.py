"""The benchmark of verdict rules: shares of verdicts on sweeps with a known exponent."""

import numpy as np
import pandas as pd
import pytest

from benchmarks import verdict_rules
from rora_theory.stats.rate_curves import Curve


@pytest.fixture(scope="module")
def tables() -> dict[str, pd.DataFrame]:
    """Return tables of three seeds and five rates of the first shape."""
    every_case = verdict_rules.yield_cases

    def few_cases():
        for over, shape, model in every_case():
            if shape == "equal parabolas" and (model.seeds, model.rates) == (3, 5):
                yield over, shape, model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verdict_rules, "yield_cases", few_cases)
        patch.setattr(verdict_rules, "POWER_EXPONENTS", (-0.65,))
        patch.setattr(verdict_rules, "POWER_DESIGNS", ((3, 5, 1), (5, 7, 2)))
        patch.setattr(verdict_rules, "SHAPES", {"equal parabolas": {}})
        return verdict_rules.measure_rules(verdict_rules.VerdictRulesOptions(sweeps=40, registrations=1))


def test_shares_of_verdicts_sum_to_one(tables) -> None:
    for name in ("rules.csv", "other_rules.csv"):
        assert tables[name][["agrees", "contradicts", "undecided"]].sum(axis=1).tolist() == pytest.approx(
            [1.0] * len(tables[name])
        )


def test_power_grows_with_the_sweep_and_with_the_whole_curve(tables) -> None:
    """A share of 40 sweeps has a standard error of at most 0.08. Published: 0.27, 0.42, 0.78 and 0.94."""
    power = tables["power.csv"].set_index(["estimate", "seeds"])
    assert power["decided"].to_numpy() == pytest.approx(1 - power["undecided"].to_numpy())
    assert power.loc[("three points", 3), "undecided"] == pytest.approx(0.73, abs=0.3)
    assert power.loc[("whole curve", 5), "right"] > 0.7
    assert power.loc[("whole curve", 5), "right"] > power.loc[("three points", 3), "right"] + 0.2
    assert (power["contradicts"] < 0.15).all(), "the claim is true"


def test_the_recommended_sweep_has_power_and_the_former_one_had_not() -> None:
    power = pd.read_csv(verdict_rules.PUBLISHED / "power.csv")
    recommended = power.query("estimate == 'whole curve' and seeds == 5 and rates == 7 and ranks == 2")
    assert len(recommended) == 2 * 6
    assert recommended["right"].min() >= 0.9
    former = power.query(
        "estimate == 'three points' and seeds == 3 and rates == 5 and ranks == 1 and exponent == -0.65"
    )
    assert former["undecided"].between(0.7, 0.85).all()


def test_rivals_prevent_false_agreement(tables) -> None:
    by_rule = tables["by_rule.csv"].set_index("rule")
    for law in ("constant gradient", "displacement", "no change in the rank"):
        with_rivals, alone = by_rule.loc[f"{law}, rivals"], by_rule.loc[f"{law}, overlap alone"]
        assert with_rivals["false_agrees"] < 0.1
        assert with_rivals["false_agrees"] <= alone["false_agrees"]
        assert with_rivals["false_contradicts"] == pytest.approx(alone["false_contradicts"])


def test_precise_data_are_decided_rightly(tables) -> None:
    other = tables["other_rules.csv"].set_index(["rule", "truth", "error"])
    assert other.loc[("equations, ratio", 1.0, 0.005), "agrees"] == 1
    assert other.loc[("equations, ratio", 1.25, 0.005), "contradicts"] == 1
    assert (other.loc[("regime, all ratios", 1.25, 0.013), "contradicts"] == 1).all()
    check = other.loc[("coordinate check, flat", 0.5, 0.024)].set_index("samples")
    assert check.loc[4, "contradicts"] == 1


def test_the_summary_states_settings_and_coverage(tables) -> None:
    described = verdict_rules.summary(verdict_rules.VerdictRulesOptions(sweeps=40, registrations=1), tables)
    assert described["settings"] == {"sweeps": 40, "registrations": 1, "seed": 0}
    assert described["coverage"]["3"]["mean"] > 0.85


@pytest.mark.parametrize("method", ["vertex", "quadratic", "registration"])
def test_the_pooled_exponent_is_the_planted_one(method) -> None:
    """Its error is that of the mean over seeds of each seed's mean over the pairs."""
    rates, planted, ratio = 10 ** (np.arange(-18, -7) / 4), -0.7, 8.0
    pairs = []
    for level in (1.0, 1.2):
        best = [np.array([1e-3, 1.1e-3, 1.3e-3]) * level * ratio**power for power in (0.0, planted)]
        best[1][2] *= 1.1
        pairs.append(
            tuple(
                Curve("adamw", "both", "lora", 1.0, 8, 1.0, rates, 1 + 0.1 * np.log10(rates / optima[:, None]) ** 2)
                for optima in best
            )
        )
    exponent = verdict_rules.pooled_exponent(pairs, ratio, method)
    by_seed = planted + np.array([0, 0, np.log(1.1) / np.log(ratio)])
    assert exponent.value == pytest.approx(by_seed.mean(), abs=0.03)
    assert (exponent.n, exponent.over) == (3, "seeds")
    assert exponent.error == pytest.approx(by_seed.std(ddof=1) / 3**0.5, rel=0.2)
    swapped = verdict_rules.pooled_exponent([pair[::-1] for pair in pairs], ratio, method)
    assert swapped.value == pytest.approx(-exponent.value, abs=0.01)
