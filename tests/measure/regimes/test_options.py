"""Settings of a regime: what each of them changes in the tables, and what it leaves."""

from typing import Any

import pytest
from support import torch_models
from support.torch_models import padded

from rora_theory.measure import regime
from rora_theory.measure.regimes.module_regime import RegimeConfig

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers and peft

USUAL = RegimeConfig(
    ranks=(1, 4), rules=("lora",), optimizers=("sgd", "adam"), inits=("gaussian",), rows=0, tokens=9, exact=True
)
TRAIN = padded([[5, 6, 7, 8, 9, 10, 33], [5, 6, 7, 8, 12, 13, 34]])
HELD_OUT = padded([[5, 6, 7, 20, 21, 22, 23, 24, 35], [5, 6, 40, 41, 42, 43, 44, 45, 36]])
STEP, FIGURES, DRAWN = "predicted size", "signal", "crossing distance"
CHANGES: dict[str, tuple[Any, set[str]]] = {
    "ranks": ((2, 4), {"ranks", "scaling", STEP}),
    "rules": (("rora",), {"rules", "scaling", STEP}),
    "optimizers": (("adam",), {"optimizers", "scaling", FIGURES, STEP}),
    "inits": (("kaiming_uniform",), {"inits", STEP, DRAWN}),
    "alpha": (8.0, {"scaling", STEP}),
    "lr": (1e-3, {STEP}),
    "tokens": (4, {"tokens read", FIGURES, STEP, "linear term"}),
    "mask": (False, {"tokens seen", FIGURES, STEP, "linear term"}),
    "seed": (1, {FIGURES, STEP, "linear term", DRAWN}),
    "exact": (False, {"ranks", "rules", "scaling", STEP, "sign changes"}),
}
"""Another value of each setting, and what it certainly changes. The test of the command steps adapters (``rows``)."""


def observed(config: RegimeConfig) -> dict[str, Any]:
    measured = regime(torch_models.model(), TRAIN, HELD_OUT, ["q_proj"], config=config, layers=[0])
    results, crossings, distances = measured.results, measured.crossings, measured.crossing_distances
    turns = [name for name in distances if name.startswith("turn") and distances[name].notna().any()]
    return {
        "ranks": sorted(set(results["rank"])),
        "rules": sorted(set(results["rule"])),
        "optimizers": sorted(set(crossings["optimizer"])),
        "inits": sorted(set(crossings["init"])),
        "scaling": results["scaling"].tolist(),
        STEP: results["predicted"].tolist(),
        FIGURES: [round(value, 9) for value in crossings["signal"]],
        "linear term": [round(value, 9) for value in crossings["linear_term"]],
        DRAWN: [f"{value:.6g}" for value in distances["crossing_distance"]],
        "sign changes": turns,
        "tokens read": measured.tokens["read"].tolist(),
        "tokens seen": measured.tokens["seen"].tolist(),
    }


@pytest.fixture(scope="module")
def usual() -> dict[str, Any]:
    return observed(USUAL)


@pytest.mark.parametrize("name", CHANGES)
def test_a_setting_changes_what_it_should(name, usual) -> None:
    value, changed = CHANGES[name]
    after = observed(RegimeConfig(**vars(USUAL) | {name: value}))
    assert {what for what in usual if usual[what] != after[what]} >= changed
    if name in ("alpha", "lr", "rules"):
        assert {what for what in usual if usual[what] != after[what]} == changed
    if name == "alpha":
        assert [2 * scaling for scaling in after["scaling"]] == pytest.approx(usual["scaling"])
    if name in ("ranks", "optimizers", "inits"):
        assert after[name] == sorted(value)
