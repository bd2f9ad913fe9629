"""Settings of cells, slopes of sizes, and verdicts that follow from the slopes."""

import itertools
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from figures import coordinate_check as figure
from rora_theory import scaling_factor
from rora_theory.measure.rank_check.coordinate_table import Coordinate, slope_rows
from rora_theory.measure.rank_check.rules import (
    COLUMNS,
    SLOPE_COLUMNS,
    Case,
    CheckConfig,
    CoordinateCell,
    cases,
    control_direction,
    coordinate_cells,
    coordinate_rows,
    coordinate_slopes,
    setting_of,
    verdicts,
)
from rora_theory.runs import frames
from rora_theory.validation.rules import name_of


def config_of(**changed) -> CheckConfig:
    """Return the settings of a small check: AdamW at alpha/r, three ranks, one step, two seeds, without controls."""
    small = {"ranks": (2, 8, 32), "rules": ("lora",), "optimizers": ("adamw",), "controls": False}
    return CheckConfig(**small | {"steps": (1,), "seeds": (0, 1)} | changed)


def size_table(rows: Iterable[dict[str, Any]]) -> pd.DataFrame:
    return frames.from_rows(rows, COLUMNS)


def judge(config: CheckConfig, value: Callable[..., float]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return slopes and verdicts of invented sizes of a module's output and the whole model.

    Args:
      config: Settings of the check.
      value: Function of a rank, a seed, a split, a step and a quantity.
    """
    sizes = size_table(
        {"optimizer": case.optimizer, "rule": name_of(case.rule), "init": case.init, "rank": rank, "seed": seed}
        | {"step": step, "split": split, "module": module, "quantity": quantity}
        | {"value": value(rank, seed, split, step, quantity)}
        for case, rank, seed, split, step, (module, quantity) in itertools.product(
            cases(config), config.ranks, config.seeds, ("train", "held_out"), config.steps,
            (("a", "output"), ("model", "hidden"), ("model", "logits")),
        )
    )  # fmt: skip
    slopes = coordinate_slopes(config, sizes)
    return slopes, verdicts(config, slopes)


def test_a_control_that_is_flat_by_the_law_is_left_out() -> None:
    """Constant gamma with the gaussian init is no control: where the signal dominates under Adam, the two effects
    cancel.
    """
    config = config_of(rules=(0.0,), controls=True)
    _, judged = judge(config, lambda *_: 1.0)
    gaussian = judged[judged["init"] == "gaussian"]
    assert gaussian["whole_model"].tolist() == ["flat, which the law allows if one term dominates: no control"]


def test_verdicts_use_the_requested_band_and_confidence() -> None:
    """For slopes of three seeds around 0.2, half of the 95% interval is Student's 4.3027 standard errors."""
    slopes = np.array([[0.2], [0.21], [0.19]])
    values = {Coordinate("hidden", "train", "model", 1): np.exp(np.log([2, 8, 32]) * slopes)}
    (row,) = slope_rows((2, 8, 32), values)
    assert (slope_rows((2, 8, 32), values, band=0.3)[0]["verdict"], row["verdict"]) == ("flat", "grows")
    error = 0.01 / math.sqrt(3)
    assert (row["standard_error"], row["half_width"]) == pytest.approx((error, 4.3027 * error), rel=0.03)


@pytest.mark.parametrize(
    ("zero", "whole_model", "modules"),
    [
        (None, "flat", "flat"),
        ((32, 0, "train", 3, "hidden"), "mixed (7 flat, 1 undecided)", "flat"),
        ((32, 0, "held_out", 1, "logits"), "mixed (7 flat, 1 undecided)", "flat"),
        ((8, 1, "held_out", 1, "output"), "flat", "mixed (3 flat, 1 undecided)"),
    ],
)
def test_a_quantity_that_is_zero_at_some_rank_is_undecided(zero, whole_model, modules) -> None:
    """It has no slope and makes the verdict undecided, for hidden states and logits, on either split, at any step.

    A quantity that is 0 at all ranks did not move.
    """
    slopes, judged = judge(config_of(steps=(1, 3)), lambda *where: 0.0 if where == zero else 1.0)
    (row,) = judged.to_dict("records")
    assert (row["whole_model"], row["modules"], len(slopes)) == (whole_model, modules, 16)
    assert math.isnan(row["kappa_flat"]) == (zero is not None and zero[2:] == ("train", 3, "hidden"))
    assert row["flat train 1"] == "1 of 1"
    slopes, judged = judge(config_of(), lambda _, __, split, ___, name: float((split, name) != ("train", "hidden")))
    assert (judged["whole_model"].tolist(), len(slopes)) == (["flat"], 7)


CHANGES = {
    "ranks": ((2, 16, 32), {"ranks"}),
    "rules": (("lora", "rora"), {"rules", "alphas"}),
    "optimizers": (("sgd", "adam"), {"optimizers", "rates"}),
    "inits": (("kaiming_uniform", "gaussian"), {"inits"}),
    "controls": (True, {"rules", "inits", "controls", "alphas"}),
    "steps": ((1, 3), {"steps"}),
    "seeds": ((0, 5), {"seeds"}),
    "gamma": (4.0, {"alphas"}),
    "reference_rank": (16, {"alphas"}),
    "adam_lr": (1e-3, {"rates"}),
    "sgd_lr": (0.5, {"rates"}),
    "band": (0.01, {"verdicts"}),
}
"""Another value of each setting, and all that it changes."""


@pytest.mark.parametrize("name", CHANGES)
def test_a_setting_changes_what_it_should_alone(name) -> None:
    """Cases, cells and their settings, and the verdicts on sizes that grow as rank^0.05."""

    def observed(**changed) -> dict[str, object]:
        config = config_of(**{"optimizers": ("adamw", "sgd")} | changed)
        cells, settings = coordinate_cells(config), [setting_of(config, cell) for cell in coordinate_cells(config)]
        slopes, judged = judge(config, lambda rank, *_: rank**0.05)
        return {
            "ranks": sorted({setting.rank for setting in settings}),
            "rules": sorted({str(setting.rule) for setting in settings}),
            "optimizers": sorted({setting.optimizer for setting in settings}),
            "inits": sorted({setting.init for setting in settings}),
            "controls": sorted({cell.case.control for cell in cells}),
            "steps": sorted(set(slopes["step"])),
            "seeds": sorted({cell.seed for cell in cells}),
            "alphas": sorted({setting.alpha for setting in settings}),
            "rates": sorted({(setting.optimizer, setting.learning_rate) for setting in settings}),
            "verdicts": sorted({verdict.split(",")[0] for verdict in judged["whole_model"][:2]}),
        }

    value, changed = CHANGES[name]
    before, after = observed(), observed(**{name: value})
    assert {what for what in before if before[what] != after[what]} == changed
    if name in ("ranks", "rules", "optimizers", "inits", "steps", "seeds"):
        assert after[name] == sorted(value)


RIGHT, WRONG = "with the rank, as expected of the control", "with the rank, AGAINST THE LAW: this control"


@pytest.mark.parametrize(
    ("powers", "constant", "gaussian"),
    [
        ((0.5, 0.51), f"grows {RIGHT}", f"grows {WRONG} shrinks"),
        ((-0.5, -0.51), f"shrinks {WRONG} grows", f"shrinks {RIGHT}"),
        ((0.0, 0.0), "FLAT: the check has no power", "FLAT: the check has no power"),
        ((0.0, 0.3), "undecided", "undecided"),
    ],
)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_control_must_change_in_the_direction_of_the_law(optimizer, powers, constant: str, gaussian: str) -> None:
    """With constant gamma the whole model and the modules must grow; with the gaussian init they must shrink."""
    config = config_of(optimizers=(optimizer,), controls=True)
    _, judged = judge(config, lambda rank, seed, *_: rank ** powers[seed])
    assert judged["whole_model"].tolist()[1:] == judged["modules"].tolist()[1:] == [constant, gaussian]


@pytest.mark.parametrize(
    ("optimizer", "rule", "init", "direction"),
    [
        *((name, 0.0, "kaiming_uniform", "grows") for name in ("sgd", "momentum", "adam", "adamw")),
        *((name, rule, "gaussian", "shrinks") for name in ("sgd", "adam") for rule in (0.0, "rora", "lora", 3.0)),
        ("sgd", -1.0, "gaussian", "grows"),
        ("adam", -1.0, "gaussian", "grows"),
        ("adam", -0.25, "gaussian", ""),  # r^(1/4) where the signal dominates, r^(-1/4) where cross-talk does
        ("sgd", -0.6, "gaussian", ""),
        ("sgd", -0.3, "gaussian", "shrinks"),
    ],
)
def test_the_direction_of_a_control(optimizer, rule, init, direction: str) -> None:
    """By the first step's powers (gamma and A's deviation are squared under SGD) it is 1 - 2 kappa - 2 a, and half a
    rank less.
    """
    assert control_direction(Case(optimizer, rule, init, True)) == direction


@pytest.mark.parametrize(("optimizer", "rate"), [("adamw", 1.0), ("adam", 1.0), ("sgd", 2.0), ("momentum", 0.2)])
def test_settings_and_rows_of_a_cell(optimizer, rate) -> None:
    """Each optimizer has its own rate, and each rule the same scaling at the reference rank."""
    config = CheckConfig(adam_lr=1.0, sgd_lr=2.0, gamma=5.0, reference_rank=4)
    for seed, (rule, kappa), rank in itertools.product(range(2), (("lora", 1), ("rora", 0.5)), (2, 16)):
        cell = CoordinateCell(Case(optimizer, rule, "gaussian", False), seed, rank)
        setting = setting_of(config, cell)
        (row,) = coordinate_rows(config, cell, [(Coordinate("loss", "train", "model", 1), 1.25)])
        assert (setting.rank, setting.rule, setting.init, setting.optimizer) == (rank, rule, "gaussian", optimizer)
        assert setting.learning_rate == row["learning_rate"] == rate
        gamma = scaling_factor(rule, alpha=setting.alpha, rank=rank)
        assert gamma == row["scaling"] == pytest.approx(5 * (4 / rank) ** kappa)
        names = ("rank", "seed", "rule", "quantity", "value")
        assert [row[name] for name in names] == [rank, seed, rule, "loss", 1.25]


@pytest.mark.parametrize(("optimizer", "power"), [("adamw", 1), ("adam", 1), ("sgd", 2), ("momentum", 2)])
def test_the_exponent_at_which_the_slope_is_flat(optimizer, power) -> None:
    """If the change is gamma^p r^(1/2) with gamma = alpha / r^kappa, the slope is 1/2 - p kappa, and kappa = 1/(2p) is
    flat.

    Ranks in no order; two modules, whose outputs are averaged in the logarithm; two seeds a factor apart.
    """
    config = config_of(ranks=(32, 2, 8), optimizers=(optimizer,))
    labels = {"optimizer": optimizer, "rule": "lora", "init": "kaiming_uniform", "step": 1, "split": "train"}
    excess = {("a", "output"): 0.2, ("b", "output"): -0.2, ("model", "hidden"): 0.0}
    constant = {("a", "unscaled"): 1.0, ("a", "zero"): 0.0, ("model", "loss"): 2.0}
    sizes = [
        labels | {"rank": rank, "seed": seed, "module": module, "quantity": quantity, "value": value}
        for rank, seed in itertools.product(config.ranks, range(2))
        for (module, quantity), value in (
            constant | {where: (1 + seed) * rank ** (0.5 - power + more) for where, more in excess.items()}
        ).items()
    ]
    slopes = coordinate_slopes(config, size_table(sizes)).set_index(["module", "quantity"])
    excess |= {("model", "output"): 0.0}
    assert set(slopes.index) == {*excess, ("a", "unscaled")}
    for where, more in excess.items():
        row = slopes.loc[where]
        assert (row["slope"], row["kappa_flat"]) == pytest.approx((0.5 - power + more, (0.5 + more) / power), abs=1e-4)
        assert row["verdict"] == "shrinks"
    unscaled = slopes.loc["a", "unscaled"]
    assert math.isnan(unscaled["kappa_flat"])
    assert unscaled["verdict"] == "flat"
    diverged = [row | {"value": math.nan} if row["quantity"] == "hidden" else row for row in sizes]
    assert coordinate_slopes(config, size_table(diverged)).query("quantity == 'hidden'")["verdict"].tolist() == [
        "diverged"
    ]


def test_controls_are_cases_that_were_not_requested() -> None:
    def listed(**more) -> list[tuple]:
        return [tuple(case) for case in cases(CheckConfig(**more))]

    plain = [(o, r, "kaiming_uniform", False) for o in ("adamw", "sgd") for r in ("lora", "rora")]
    assert listed(controls=False) == plain
    assert listed() == [*plain, ("adamw", 0.0, "kaiming_uniform", True), ("adamw", "lora", "gaussian", True)]
    assert listed(rules=(0.25, 0.0))[-1] == ("adamw", 0.25, "gaussian", True)
    assert not any(case[3] for case in listed(rules=(0.0,), inits=("kaiming_uniform", "gaussian")))


@pytest.fixture(scope="module")
def published() -> tuple[CheckConfig, pd.DataFrame]:
    """Return settings and slopes of the published run on SmolLM2-135M."""
    folder = Path(__file__).parents[3] / "results" / "published" / "coordinate_check"
    used = json.loads((folder / "manifest.json").read_text())["config"]
    names = ("band", "controls", "inits", "optimizers", "ranks", "rules", "seeds", "steps")
    settings = {name: tuple(used[name]) if isinstance(used[name], list) else used[name] for name in names}
    return CheckConfig(**settings), frames.read_csv(folder / "slopes.csv", SLOPE_COLUMNS)


def verdicts_of(config: CheckConfig, slopes: pd.DataFrame) -> dict[str, dict]:
    """Return the verdicts by the name of the case."""
    return dict(zip(map(str, cases(config)), verdicts(config, slopes).to_dict("records"), strict=True))


def test_the_verdict_is_on_the_whole_model(published) -> None:
    """A rule that keeps the model's hidden states and logits is flat, whatever its modules' own outputs do."""
    judged = verdicts_of(*published)
    row = judged["AdamW, alpha/r, A kaiming_uniform"]
    assert (row["whole_model"], round(row["kappa_flat"], 2)) == ("flat", 1.0)
    assert row["modules"].startswith("mixed (")
    assert "shrinks" in row["modules"]
    assert judged["SGD, alpha/sqrt(r), A kaiming_uniform"]["whole_model"] == "flat"
    assert judged["AdamW, alpha/sqrt(r), A kaiming_uniform"]["whole_model"] == "grows with the rank"
    assert judged["SGD, alpha/r, A kaiming_uniform"]["whole_model"] == "shrinks with the rank"
    controls = [row["whole_model"] for name, row in judged.items() if name.endswith("(control)")]
    assert controls == [f"grows {RIGHT}", f"shrinks {RIGHT}"]


def test_the_figure_has_the_table_s_intervals(published) -> None:
    """Half of the 95% interval agrees as stored and as printed."""
    config, slopes = published
    manifest = {"config": {"model": "m", "batches": "fixed", "seeds": config.seeds, "band": config.band}}
    bars = (
        figure.draw_slope_panels(manifest, slopes).axes[0].containers[0]
    )  # the first case, trained on, the first module
    rows = frames.where(slopes, {"split": "train", "module": "self_attn.q_proj", "quantity": "output"})
    half = [(high - low) / 2 for (_, low), (_, high) in bars[2][0].get_segments()]
    np.testing.assert_allclose(half, rows["half_width"][: len(config.steps)], rtol=1e-9)
