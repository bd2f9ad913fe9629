"""Regret of policies: known parabolas, lost and bounded pairs, and the published means by an independent path."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.interpolate import PchipInterpolator

from rora_theory import Setting, transfer
from rora_theory.advice.best_rate import Run
from rora_theory.evidence import sources
from rora_theory.evidence.policies import (
    LEFT_OUT,
    ORIGINS,
    POLICIES,
    advised_range,
    cookbook_rate,
    first_step_with_cross_talk,
    measured_policies,
    policies_for,
    power_of_gain,
    with_rank,
)
from rora_theory.evidence.regrets import lands_on_diverged, regrets_on_sweeps, summarise_regrets
from rora_theory.evidence.sources import original_path
from rora_theory.evidence.sweeps import RunRecord, load_sweeps, sweeps_of

DENSE = tuple(np.geomspace(1e-5, 1e-2, 61).tolist())


def test_the_policies_are_the_stated_functions() -> None:
    assert power_of_gain(-0.75)(8, 16.0, 64, 128.0) == pytest.approx(8**-0.75)
    assert with_rank(power_of_gain(0.0), 0.15)(8, 16.0, 64, 16.0) == pytest.approx(8**0.15)
    # Size of Adam's first step: eta G sqrt(1 + c / r) with c = 8.
    size = {rank: 32.0 * math.sqrt(1 + 8 / rank) for rank in (4, 64)}
    assert first_step_with_cross_talk(10.0)(4, 32.0, 64, 32.0) == pytest.approx(size[4] / size[64])
    advice = transfer(Setting(16, 16.0, 2e-4), 128, alpha=128.0)
    low, best, high = advised_range(16, 16.0, 128, 128.0)
    assert best == pytest.approx(advice.learning_rate / 2e-4)
    assert low < best < high
    # A change there and back, and a path over a third setting.
    factor = POLICIES["advice"]
    assert factor(16, 16.0, 128, 128.0) * factor(128, 128.0, 16, 16.0) == pytest.approx(1)
    assert factor(16, 16.0, 32, 64.0) * factor(32, 64.0, 128, 128.0) == pytest.approx(factor(16, 16.0, 128, 128.0))


def test_the_rates_of_the_policies_of_measured_runs() -> None:
    """From G 16 to 64 at 100 to 400 steps: powers of the growth 4, and of the steps for the last."""
    by_name = measured_policies({90: 0.0, 1000: 1e9}, crossing_distance=1e9)
    old, new = Run(8, 16.0, 100), Run(8, 64.0, 400)
    rates = {name: by_name[name](old, new, 1e-3) for name in by_name if name != "advice"}
    expected = {"keep the rate": 1.0, "first step": 1 / 4, "square root": 1 / 2, "G^-0.75": 4**-0.75}
    expected |= {"displacement": 1 / 4, "displacement and steps": 1 / 8, "constant gradient": 1 / 4}
    assert rates == pytest.approx({name: 1e-3 * factor for name, factor in expected.items()})
    assert {*by_name, *POLICIES, LEFT_OUT} == set(ORIGINS)
    # The constant is that of the nearest number of steps in log.
    late = Run(8, 16.0, 400)
    assert by_name["displacement"](late, Run(8, 64.0, 400), 1e-3) > 4e-4
    assert "displacement" not in measured_policies({})
    assert "constant gradient" not in measured_policies({1: 1.0})


def test_the_cookbook_formula_covers_two_families() -> None:
    assert cookbook_rate("meta-llama/Llama-3.1-70B", 8192) == pytest.approx(5e-4 * (2000 / 8192) ** 0.781)
    assert cookbook_rate("Qwen/Qwen3-8B", 4096) == pytest.approx(5e-4 * (2000 / 4096) ** 0.0775)
    assert cookbook_rate("openai/gpt-oss-20b", 2880) is None


def test_the_regret_of_a_known_parabola(sweep_of) -> None:
    """A rate that is a factor f off costs exp(0.02 ln(f)^2) - 1, for every policy and both directions."""
    sweep = sweep_of({(4, 32.0): 2e-4, (64, 32.0): 4e-4}, rates=DENSE)
    policies = {"keep": power_of_gain(0.0), "right": with_rank(power_of_gain(0.0), math.log(2) / math.log(16))}
    table = regrets_on_sweeps([sweep], lambda _: policies)
    assert table["regret"].tolist() == pytest.approx([math.exp(0.02 * math.log(2) ** 2) - 1, 0.0] * 2, abs=1e-5)
    assert table["learning_rate"].tolist() == pytest.approx([2e-4, 4e-4, 4e-4, 2e-4], rel=1e-3)
    assert not table["is_lost"].any()
    assert not table["is_lower_bound"].any()


def test_a_rate_outside_the_grid_is_a_bound_and_one_where_runs_diverged_is_lost() -> None:
    runs = [
        RunRecord("m", rank, 32.0, "lora", rate, loss)
        for rank, losses in ((8, (1.2, 1.0, 1.2, 1.4)), (64, (1.2, 1.0, 1.2, math.inf)))
        for rate, loss in zip((1e-4, 3e-4, 1e-3, 3e-3), losses, strict=True)
    ]
    (sweep,) = sweeps_of(runs, "s")
    for factor, lost, bound in ((1.0, False, False), (10.0, True, False), (30.0, True, False), (4.0, False, True)):
        table = regrets_on_sweeps([sweep], lambda _, factor=factor: {"p": lambda *_: factor})
        row = table[table["rank"] == 64].iloc[0]
        assert (row["is_lost"], row["is_lower_bound"]) == (lost, bound)
        assert math.isinf(row["regret"]) == lost
    assert lands_on_diverged(sweep.curves[1], 2e-3)
    assert not lands_on_diverged(sweep.curves[1], 1.5e-3)
    below = regrets_on_sweeps([sweep], lambda _: {"p": lambda *_: 0.1}).iloc[0]
    assert below["is_lower_bound"]
    assert below["regret"] == pytest.approx(0.2)
    # A lost pair makes the mean infinite, but not the median of the others.
    summary = summarise_regrets(regrets_on_sweeps([sweep], lambda _: {"p": lambda *_: 10.0}))
    row = summary[summary["pairs_of"] == "all ranks"].iloc[0]
    assert (row["lost"], row["pairs"], row["largest"]) == (1, 2, math.inf)


def test_bounds_are_counted_apart(sweep_of) -> None:
    sweep = sweep_of({(1, 32.0): 2e-5, (4, 32.0): 3e-4, (16, 32.0): 4e-4})
    summary = summarise_regrets(regrets_on_sweeps([sweep], lambda _: {"keep": power_of_gain(0.0)}))
    row = summary[summary["pairs_of"] == "all ranks"].iloc[0]
    assert (row["pairs"], row["bound_pairs"]) == (2, 4)
    assert row["largest_at_bound"] > row["largest"]
    higher = summary[summary["pairs_of"] == "to a higher rank, from r = 4"].iloc[0]
    assert (higher["pairs"], higher["bound_pairs"]) == (1, 0)


def test_the_left_out_policy_does_not_see_the_model(sweep_of) -> None:
    steep = sweep_of({(4, 32.0): 2e-4, (64, 32.0): 2e-4 * 16**0.4}, model="steep", rates=DENSE)
    flat = sweep_of({(4, 32.0): 3e-4, (64, 32.0): 3e-4 * 16**0.1}, model="flat", rates=DENSE)
    factor = policies_for(steep, [steep, flat])[LEFT_OUT](4, 32.0, 64, 32.0)
    assert factor == pytest.approx(16**0.1, rel=1e-3)


def independent_regrets(
    frame: pd.DataFrame, loss: str, best: pd.DataFrame, power_of_gain: float, power_of_rank: float
) -> list[float]:
    """Return the regrets of rate G^a r^b between all ranks, with PCHIP in log loss and log rate."""
    costs = []
    for old in best.itertuples():
        for new in best.itertuples():
            if old.model == new.model and old.rank != new.rank:
                runs = frame[(frame["model"] == new.model) & (frame["rank"].astype(str) == str(new.rank))]
                means = runs.groupby("learning_rate")[loss].mean()
                x, y = np.log(means.index.to_numpy()), np.log(means.to_numpy())
                rate = math.log(old.best_rate) + power_of_gain * math.log(new.gain / old.gain)
                rate = min(max(rate + power_of_rank * math.log(new.rank / old.rank), x[0]), x[-1])
                costs.append(math.exp(PchipInterpolator(x, y)(rate)) - math.exp(y.min()))
    return costs


@pytest.mark.slow
def test_the_published_means_by_an_independent_path(originals: Path) -> None:
    tables = [regrets_on_sweeps(load_sweeps("tinker"), lambda _: POLICIES), sources.read_table("regrets")]
    summary = summarise_regrets(pd.concat(tables))
    summary = summary[summary["pairs_of"] == "all ranks"].set_index(["source", "policy"])
    best = sources.read_table("best_rates")
    best = best[best["place"] == "inside"]
    first_look = {  # of the README beside the originals, where best rates are vertices in the loss itself
        ("tinker", "keep the rate"): 0.0008, ("qwen3-4b", "keep the rate"): 0.0036,
        ("qwen2.5-7b", "keep the rate"): 0.0327, ("qwen2.5-7b", "first step"): 0.0119,
        ("qwen2.5-7b", "square root"): 0.0010, ("qwen2.5-7b", "G^-0.75"): 0.0026,
    }  # fmt: skip
    powers = {"keep the rate": 0.0, "first step": -1.0, "square root": -0.5, "G^-0.75": -0.75}
    for (source, policy), expected in first_look.items():
        frame = pd.read_csv(original_path(source, originals))
        loss = "val_loss" if "val_loss" in frame else "test_nll"
        costs = independent_regrets(frame, loss, best[best["source"] == source], powers[policy], 0.0)
        row = summary.loc[source, policy]
        assert len(costs) == row["pairs"]
        assert row["mean"] == pytest.approx(np.mean(costs), rel=1e-6)
        assert row["largest"] == pytest.approx(max(costs), rel=1e-6)
        assert row["mean"] == pytest.approx(expected, rel=0.25)
    assert summary.loc["qwen2.5-7b", "keep the rate"]["largest"] == pytest.approx(0.147, abs=0.001)
