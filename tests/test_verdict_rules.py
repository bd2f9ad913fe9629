"""The benchmark of verdict rules: shares of verdicts on sweeps with a known exponent."""

import pandas as pd
import pytest

from benchmarks import verdict_rules


@pytest.fixture(scope="module")
def tables() -> dict[str, pd.DataFrame]:
    """Return tables of three seeds and five rates of the first shape."""
    every_case = verdict_rules.cases

    def few_cases():
        for over, shape, model in every_case():
            if shape == "equal parabolas" and (model.seeds, model.rates) == (3, 5):
                yield over, shape, model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verdict_rules, "cases", few_cases)
        return verdict_rules.measure(verdict_rules.VerdictRulesOptions(sweeps=40, registrations=1))


def test_shares_of_verdicts_sum_to_one(tables) -> None:
    for name in ("rules.csv", "other_rules.csv"):
        assert tables[name][["agrees", "contradicts", "undecided"]].sum(axis=1).tolist() == pytest.approx(
            [1.0] * len(tables[name])
        )


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
