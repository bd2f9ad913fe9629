"""Starting rates: a known mixed model, shrinkage, and the published table."""

import math
import re

import numpy as np
import pytest

from rora_theory import Setting, transfer
from rora_theory.errors import InputError
from rora_theory.evidence import absolute_rates, sources, starting_rates
from rora_theory.evidence.starting_rates import PublicModel, fit, starting_rate
from rora_theory.evidence.sweeps import load_sweeps


def made(family: str, parameters: float, log_rate: float) -> PublicModel:
    return PublicModel(f"{family}-{parameters}", family, parameters, parameters, 1024, log_rate, False)


def test_a_known_model_is_recovered() -> None:
    """300 families of 4 models: slope -0.2, spread of families 0.4, of models 0.2, a false alarm once in 15,000."""
    random = np.random.default_rng(2)
    known = [
        made(f"f{family}", size, -7 - 0.2 * math.log(size) + deviation + 0.2 * random.normal())
        for family, deviation in enumerate(0.4 * random.normal(size=300))
        for size in (1.0, 8.0, 30.0, 200.0)
    ]
    fitted = fit(known)
    assert fitted.slope == pytest.approx(-0.2, abs=4 * 0.2 / math.sqrt(1200) / np.std(np.log([1, 8, 30, 200])))
    assert fitted.model_spread == pytest.approx(0.2, rel=0.1)
    assert fitted.family_spread == pytest.approx(0.4, rel=0.2)
    assert fitted.intercept == pytest.approx(-7, abs=0.12)
    # An unknown family has the spread of both, a known one less.
    unknown = fitted.predict(None, 8.0)
    assert unknown.log_spread == pytest.approx(math.hypot(0.4, 0.2), rel=0.15)
    assert fitted.predict("f0", 8.0).log_spread < unknown.log_spread


def test_a_family_of_many_models_is_shrunk_less() -> None:
    known = [made("a", size, -8.0) for size in (1.0, 2.0, 4.0, 8.0, 16.0)]
    known += [made("b", 8.0, -7.0), made("c", 8.0, -7.5), made("c", 16.0, -7.3)]
    fitted = fit(known)
    (mean_a, _), (mean_b, _) = fitted.families["a"], fitted.families["b"]
    share_a, share_b = (
        (fitted.predict(name, 1.0).log_mean - fitted.intercept) / mean for name, mean in (("a", mean_a), ("b", mean_b))
    )
    assert 0 < share_b < share_a < 1


def test_a_known_family_has_a_narrower_interval() -> None:
    base = starting_rate(family="Qwen3", parameters=8)
    low, high = base.interval
    assert low < base.rate < high
    assert starting_rate(parameters=8).log_spread > base.log_spread


def test_bad_values_are_named() -> None:
    with pytest.raises(InputError, match=r"family.*GPT-2"):
        starting_rate(family="GPT-2")
    with pytest.raises(InputError, match=r"parameters.*-1"):
        starting_rate(parameters=-1)
    with pytest.raises(InputError, match="known"):
        fit([made("a", 8.0, -7.0), made("a", 16.0, -7.0)])


def test_the_models_and_their_sizes() -> None:
    models = {model.name: model for model in starting_rates.models()}
    assert len(models) == 34  # gpt-oss-20b has two rates only
    assert models["Qwen/Qwen3-30B-A3B"].parameters == 30
    assert models["Qwen/Qwen3-30B-A3B"].active_parameters == 3
    # Every size that a name states is in the table.
    for name, model in models.items():
        stated = re.findall(r"-(\d+)[bB](?=-|$)", name)
        assert not stated or float(stated[0]) == model.parameters
    assert sum(bool(re.search(r"-\d+[bB](?=-|$)", name)) for name in models) > 20
    rates = starting_rates.starting_table()
    assert rates["models"].sum() == 34
    assert ((rates["lowest"] <= rates["rate"] * 1.0001) & (rates["rate"] <= rates["highest"] * 1.0001)).all()


def test_the_mean_over_ranks_by_an_independent_path() -> None:
    """Best rates transferred to rank 16 and averaged, with the exponent of the advice's own power law."""
    best = sources.read_table("best_rates")
    exponent = math.log(transfer(Setting(16, 32.0, 1.0), 64, alpha=32.0).learning_rate) / math.log(4)
    for name in ("Qwen/Qwen3-8B-Base", "meta-llama/Llama-3.2-1B", "deepseek-ai/DeepSeek-V3.1"):
        rows = best[(best["model"] == name) & best["place"].isin(["inside", "beside a diverged run"])]
        logs = np.log(rows["best_rate"]) + exponent * np.log(16 / rows["rank"].astype(float))
        (model,) = (model for model in starting_rates.models() if model.name == name)
        assert model.log_rate == pytest.approx(logs.mean(), rel=1e-9)


@pytest.mark.slow
def test_the_judgement_leaves_the_model_out_and_covers_the_formula() -> None:
    name = "Qwen/Qwen3.5-9B"
    rates = absolute_rates.rates_for(name)
    others = [model for model in starting_rates.models() if model.name != name]
    assert rates["starting rate, other models"] == pytest.approx(fit(others).predict("Qwen3.5 and 3.6", 9.0).rate)
    assert rates["one rate for all"] == pytest.approx(math.exp(np.mean([model.log_rate for model in others])))
    assert absolute_rates.FORMULA not in absolute_rates.rates_for("moonshotai/Kimi-K2.5")
    summary = absolute_rates.summarise_absolute_regrets(
        absolute_rates.absolute_regrets(load_sweeps("tinker"))
    ).set_index("policy")
    assert summary["models"].tolist() == [25] * 4
    assert summary.loc["starting rate, other models", "mean"] < summary.loc[absolute_rates.FORMULA, "mean"]
