"""The check as a library call: frames of a tiny model, verdicts that follow from the slopes, wrong settings."""

import itertools
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pandas as pd
import pytest
from support import checkpoint

from figures import coordinate_check as figure
from rora_theory import InputError, measure, scaling_factor
from rora_theory.data.batches import Batch
from rora_theory.io import frames
from rora_theory.llama import load
from rora_theory.measure.rank_check.check import (
    SLOPE_COLUMNS,
    Case,
    CheckConfig,
    CoordinateCell,
    cases,
    control_direction,
    coordinate_rows,
    coordinate_slopes,
    size_table,
    verdicts,
)
from rora_theory.measure.rank_check.coordinate_table import Coordinate, Table, summarise_verdicts
from rora_theory.measure.rank_check.coordinates import Checker
from rora_theory.measure.regimes.thin import ThinWarning
from rora_theory.validation.rules import name_of


def batch(seed: int) -> Batch:
    tokens = np.random.default_rng(seed).integers(2, 300, (2, 7)).astype(np.int32)
    return Batch(tokens[:, :-1], tokens[:, 1:], np.ones((2, 6), np.float32), None)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::rora_theory.measure.regimes.thin.ThinWarning")
def test_frames(tmp_path, capfd) -> None:
    """Silent; a row a rank, seed and coordinate; slopes are those of the sizes, verdicts those of the slopes."""
    model = load(checkpoint.model(tmp_path))
    config = CheckConfig(
        ranks=(2, 8), rules=(0.5,), optimizers=("adamw",), controls=False, steps=(1,), seeds=(0, 1), adam_lr=1e-5
    )
    with pytest.warns(ThinWarning, match="ranks 2 8,"):
        found = measure.coordinate_check(model, batch(0), batch(1), config, target_modules=["q_proj"])
    assert all(frame.attrs["warnings"] for frame in (found.sizes, found.slopes, found.verdicts))
    assert len(found.sizes) == 2 * 2 * (2 + 4 + 1 + 6)
    outputs = found.sizes.query("quantity == 'output' and split == 'train'").pivot(
        index="seed", columns="rank", values="value"
    )
    (slope,) = found.slopes.query("quantity == 'output' and split == 'train' and module == 'self_attn.q_proj'")["slope"]
    assert slope == pytest.approx(np.log(outputs[8] / outputs[2]).mean() / np.log(4), abs=1e-4)
    (verdict,) = found.verdicts.itertuples()
    assert (verdict.optimizer, verdict.rule, verdict.control) == ("adamw", "0.5", False)
    whole = found.slopes[found.slopes["quantity"].isin(["hidden", "logits"])]["verdict"].tolist()
    assert verdict.whole_model == summarise_verdicts(whole)
    fresh = measure.coordinate_check(model, [batch(0), batch(2)], batch(1), config, target_modules=["q_proj"])
    # One step has the first batch alone: equal but for float32's rounding, of which the sizes are differences.
    np.testing.assert_allclose(fresh.sizes["value"], found.sizes["value"], rtol=1e-4)
    assert not any(capfd.readouterr())


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"ranks": (2,)}, r"--ranks .*\b[12]\b"),
        ({"ranks": (0, 2)}, r"ranks? .*\b0\b"),
        ({"optimizers": ("lion",)}, "--optimizers .*'lion'"),
        ({"inits": ("pissa",)}, "--inits .*'pissa'"),
        ({"seeds": (1,)}, r"--seeds .*\b1\b"),
        ({"seeds": (1, -1)}, "--seeds .*-1"),
        ({"steps": (2, 1)}, "steps"),
        ({"band": 0.0}, "--band"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_settings_out_of_range(changed, said) -> None:
    with pytest.raises(InputError, match=said):
        CheckConfig(**changed)


def test_a_control_that_is_flat_has_no_power() -> None:
    config = CheckConfig(ranks=(2, 8), rules=("lora",), optimizers=("adamw",), steps=(1,), seeds=(0, 1))
    assert list(cases(config))[-1] == Case("adamw", "lora", "gaussian", True)
    sizes = [
        {
            "optimizer": case.optimizer,
            "rule": name_of(case.rule),
            "init": case.init,
            "rank": rank,
            "seed": seed,
            "step": 1,
        }
        | {"split": split, "module": module, "quantity": quantity, "value": 1.0 + seed}
        for case in cases(config)
        for rank in config.ranks
        for seed in range(2)
        for split in ("train", "held_out")
        for module, quantity in (("a", "output"), ("model", "hidden"), ("model", "logits"))
    ]
    found = verdicts(config, coordinate_slopes(config, size_table(sizes)))
    assert found["whole_model"].tolist() == ["flat", *["FLAT: the check has no power"] * 2]
    assert set(found["flat held_out 1"]) == {"1 of 1"}


def test_a_control_that_the_law_has_flat_is_none() -> None:
    """Constant gamma with the gaussian init: where the signal leads under Adam the one undoes the other."""
    config = CheckConfig(ranks=(2, 8), optimizers=("adamw",), rules=(0.0,), steps=(1,), seeds=(0, 1))
    found = verdicts(config, coordinate_slopes(config, sizes_of(config, lambda case, *_: 1.0)))
    gaussian = found[found["init"] == "gaussian"]
    assert gaussian["whole_model"].tolist() == ["flat, which the law allows if one term dominates: no control"]


def sizes_of(config: CheckConfig, value: Callable[[Case, str, str, int, int], float]) -> pd.DataFrame:
    """Sizes of a module's output and the whole model: ``value`` of a case, a split, a quantity, a rank and a seed."""
    return size_table(
        {"optimizer": case.optimizer, "rule": name_of(case.rule), "init": case.init, "rank": rank, "seed": seed}
        | {"step": config.steps[0], "split": split, "module": module, "quantity": quantity}
        | {"value": value(case, split, quantity, rank, seed)}
        for case in cases(config)
        for rank in config.ranks
        for seed in config.seeds
        for split in ("train", "held_out")
        for module, quantity in (("a", "output"), ("model", "hidden"), ("model", "logits"))
    )


def test_a_table_is_judged_by_the_band_and_the_confidence_that_were_asked_for() -> None:
    """Slopes of three seeds around 0.2: half a 95% interval is Student's 4.3027 standard errors."""
    slopes = np.array([[0.2], [0.21], [0.19]])
    table = Table((2, 8, 32), {Coordinate("hidden", "train", "model", 1): np.exp(np.log([2, 8, 32]) * slopes)})
    (line,) = table.slope_rows()
    assert (table.slope_rows(band=0.3)[0]["verdict"], line["verdict"]) == ("flat", "grows")
    error = 0.01 / math.sqrt(3)
    assert (line["standard_error"], line["half_width"]) == pytest.approx((error, 4.3027 * error), rel=0.03)
    where = {"quantity": "hidden", "split": "train", "step": 1}
    table.assert_flat(**where, band=0.21, confidence=0.5)
    with pytest.raises(AssertionError):
        table.assert_flat(**where, band=0.21)


def test_a_quantity_that_is_zero_at_some_rank_is_undecided() -> None:
    """It has no slope, and does not leave the verdict to the others; one that is 0 everywhere did not move."""
    config = CheckConfig(
        ranks=(2, 8, 32), rules=("lora",), optimizers=("adamw",), controls=False, steps=(1,), seeds=(0, 1)
    )

    def verdict(zero: Callable[[str, str, int, int], bool]) -> dict:
        sizes = sizes_of(config, lambda _, *own: 0.0 if zero(*own) else 1.0)
        found = coordinate_slopes(config, sizes)
        return verdicts(config, found).to_dict("records")[0] | {"lines": len(found)}

    whole = verdict(lambda *_: False)
    assert (whole["whole_model"], whole["modules"], whole["lines"]) == ("flat", "flat", 8)
    found = verdict(lambda split, name, rank, seed: (split, name, rank) == ("train", "hidden", 32))
    assert (found["whole_model"], found["modules"], found["lines"]) == ("mixed (1 undecided, 3 flat)", "flat", 8)
    assert math.isnan(found["kappa_flat"])
    found = verdict(lambda split, name, rank, seed: (split, name, rank, seed) == ("held_out", "output", 8, 1))
    assert (found["whole_model"], found["modules"], found["lines"]) == ("flat", "mixed (1 flat, 1 undecided)", 8)
    found = verdict(lambda split, name, rank, seed: (split, name) == ("train", "hidden"))
    assert (found["whole_model"], found["modules"], found["lines"]) == ("flat", "flat", 7)


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
def test_a_control_goes_where_the_law_has_it_go(optimizer, powers, constant: str, gaussian: str) -> None:
    """Constant gamma grows and the gaussian init shrinks, of whole model and modules; nothing else will do."""
    config = CheckConfig(ranks=(2, 8, 32), optimizers=(optimizer,), rules=("lora",), steps=(1,), seeds=(0, 1))
    sizes = sizes_of(config, lambda case, split, quantity, rank, seed: rank ** powers[seed])
    found = verdicts(config, coordinate_slopes(config, sizes))
    assert found["whole_model"].tolist()[1:] == found["modules"].tolist()[1:] == [constant, gaussian]


@pytest.mark.parametrize(
    ("optimizer", "rule", "init", "direction"),
    [
        *((name, 0.0, "kaiming_uniform", "grows") for name in ("sgd", "momentum", "adam", "adamw")),
        *((name, rule, "gaussian", "shrinks") for name in ("sgd", "adam") for rule in (0.0, "rora", "lora", 3.0)),
        ("sgd", -1.0, "gaussian", "grows"),
        ("adam", -1.0, "gaussian", "grows"),
        ("adam", -0.25, "gaussian", ""),  # r^(1/4) where the signal leads, r^(-1/4) where cross-talk does
        ("sgd", -0.6, "gaussian", ""),
        ("sgd", -0.3, "gaussian", "shrinks"),
    ],
)
def test_the_direction_of_a_control(optimizer, rule, init, direction: str) -> None:
    """By the first step's powers, gamma and A's deviation squared under SGD: 1 - 2 kappa - 2 a and half a rank less."""
    assert control_direction(Case(optimizer, rule, init, True)) == direction


class Watching(Checker):
    """In a checker's place: keeps what a cell asks of it and measures nothing."""

    def __init__(self) -> None:
        pass

    def run(self, setting, key, batch_of, held_out, *, steps):
        self.asked = {
            "setting": setting,
            "key": jax.random.key_data(key).tolist(),
            "held_out": held_out,
            "steps": steps,
        }
        self.asked["batches"] = [batch_of(step) for step in range(3)]
        yield Coordinate("loss", "train", "model", 1), 1.25


def batch_of(token: int) -> Batch:
    tokens = np.full((1, 1), token, np.int32)
    return Batch(tokens, tokens, np.ones((1, 1), np.float32), None)


def test_what_a_cell_asks_for():
    """One A a seed, the same for all ranks and rules; each seed's own batches; each optimizer's own rate."""
    config = CheckConfig(adam_lr=1.0, sgd_lr=2.0, momentum_lr=3.0, gamma=5.0, reference_rank=4)
    keys = set()
    for seed in range(3):
        own = set()
        for optimizer, rate in {"adamw": 1.0, "adam": 1.0, "sgd": 2.0, "momentum": 3.0}.items():
            for rule, rank in itertools.product(("lora", "rora"), (2, 16)):
                checker = Watching()
                case = Case(optimizer, rule, "gaussian", False)
                held_out = batch_of(seed)
                cell = CoordinateCell(case, seed, rank)
                (row,) = coordinate_rows(config, checker, cell, partial("{}.{}".format, seed), held_out)
                asked = checker.asked
                own.add(tuple(asked["key"]))
                assert asked["batches"] == [f"{seed}.{step}" for step in range(3)]
                assert asked["held_out"] is held_out
                assert asked["steps"] == config.steps
                setting = asked["setting"]
                assert (setting.rank, setting.rule, setting.init, setting.optimizer) == (
                    rank,
                    rule,
                    "gaussian",
                    optimizer,
                )
                assert setting.learning_rate == row["learning_rate"] == rate
                gamma = 5 * (4 / rank) ** {"lora": 1, "rora": 0.5}[rule]
                assert scaling_factor(rule, alpha=setting.alpha, rank=rank) == row["scaling"] == pytest.approx(gamma)
                assert (row["rank"], row["seed"], row["rule"], row["quantity"], row["value"]) == (
                    rank,
                    seed,
                    rule,
                    "loss",
                    1.25,
                )
        assert len(own) == 1
        keys |= own
    assert len(keys) == 3


@pytest.mark.parametrize(("optimizer", "power"), [("adamw", 1), ("adam", 1), ("sgd", 2), ("momentum", 2)])
def test_the_exponent_that_would_have_been_flat(optimizer, power):
    """A change as gamma^p r^(1/2): with gamma = alpha / r^kappa its slope is 1/2 - p kappa, and kappa = 1/(2p) is flat.

    Ranks in no order; two modules, whose outputs are averaged in the logarithm; two seeds a factor apart.
    """
    config = CheckConfig(
        ranks=(32, 2, 8), rules=("lora",), optimizers=(optimizer,), controls=False, steps=(1,), seeds=(0, 1)
    )
    frame = {"optimizer": optimizer, "rule": "lora", "init": "kaiming_uniform", "step": 1, "split": "train"}
    sizes = []
    for rank, seed in itertools.product(config.ranks, range(2)):
        own = frame | {"rank": rank, "seed": seed}
        value = (1 + seed) * rank ** (0.5 - power)
        sizes += [own | {"module": "a", "quantity": "output", "value": value * rank**0.2}]
        sizes += [own | {"module": "b", "quantity": "output", "value": 9 * value * rank**-0.2}]
        sizes += [own | {"module": "model", "quantity": "hidden", "value": value}]
        sizes += [
            own | {"module": "a", "quantity": "inner", "value": 1.0},
            own | {"module": "a", "quantity": "grad_A", "value": 0.0},
        ]
        sizes += [own | {"module": "model", "quantity": "loss", "value": 2.0}]
    found = {
        (row["quantity"], row["module"]): row for row in coordinate_slopes(config, size_table(sizes)).to_dict("records")
    }
    assert found.keys() == {("output", "a"), ("output", "b"), ("output", "model"), ("hidden", "model"), ("inner", "a")}
    for key, more in (
        (("output", "a"), 0.2),
        (("output", "b"), -0.2),
        (("output", "model"), 0.0),
        (("hidden", "model"), 0.0),
    ):
        assert found[key]["slope"] == pytest.approx(0.5 - power + more, abs=1e-4)
        assert found[key]["kappa_flat"] == pytest.approx((0.5 + more) / power, abs=1e-3)
        assert found[key]["verdict"] == "shrinks"
    assert math.isnan(found["inner", "a"]["kappa_flat"])
    assert found["inner", "a"]["verdict"] == "flat"
    gone = [row | {"value": float("nan")} if row["quantity"] == "hidden" else row for row in sizes]
    assert coordinate_slopes(config, size_table(gone)).query("quantity == 'hidden'")["verdict"].tolist() == ["diverged"]


def test_controls_are_what_was_not_asked_for():
    def made(**more) -> list[tuple]:
        return [tuple(case) for case in cases(CheckConfig(**more))]

    plain = [(o, r, "kaiming_uniform", False) for o in ("adamw", "sgd") for r in ("lora", "rora")]
    assert made(controls=False) == plain
    assert made() == [*plain, ("adamw", 0.0, "kaiming_uniform", True), ("adamw", "lora", "gaussian", True)]
    assert made(rules=(0.25, 0.0))[-1] == ("adamw", 0.25, "gaussian", True)
    assert not any(case[3] for case in made(rules=(0.0,), inits=("kaiming_uniform", "gaussian")))


def published() -> tuple[CheckConfig, pd.DataFrame]:
    """The published run on SmolLM2-135M: its settings and slopes."""
    folder = Path(__file__).parents[3] / "results" / "published" / "coordinate_check"
    used = json.loads((folder / "manifest.json").read_text())["config"]
    names = ("band", "controls", "inits", "optimizers", "ranks", "rules", "seeds", "steps")
    settings = {name: tuple(used[name]) if isinstance(used[name], list) else used[name] for name in names}
    return CheckConfig(**settings), frames.read_csv(folder / "slopes.csv", SLOPE_COLUMNS)


def verdicts_of(config: CheckConfig, slopes: pd.DataFrame) -> dict[str, dict]:
    """By the case's name."""
    return dict(zip(map(str, cases(config)), verdicts(config, slopes).to_dict("records"), strict=True))


def test_the_verdict_is_on_the_whole_model() -> None:
    """The rule that keeps the model's hidden states and logits is called flat, whatever its modules' own outputs do."""
    found = verdicts_of(*published())
    row = found["AdamW, alpha/r, A kaiming_uniform"]
    assert (row["whole_model"], round(row["kappa_flat"], 2)) == ("flat", 1.0)
    assert row["modules"].startswith("mixed (")
    assert "shrinks" in row["modules"]
    assert found["SGD, alpha/sqrt(r), A kaiming_uniform"]["whole_model"] == "flat"
    assert found["AdamW, alpha/sqrt(r), A kaiming_uniform"]["whole_model"] == "grows with the rank"
    assert found["SGD, alpha/r, A kaiming_uniform"]["whole_model"] == "shrinks with the rank"
    controls = [row["whole_model"] for name, row in found.items() if name.endswith("(control)")]
    assert controls == [f"grows {RIGHT}", f"shrinks {RIGHT}"]


@pytest.mark.slow
def test_one_slope_that_is_not_flat_is_enough() -> None:
    """Of the hidden states or of the logits, on either split, at any step; a control that is flat has no power."""
    config, slopes = published()
    own = "optimizer == 'adamw' and rule == 'lora' and control == 0"
    for quantity, split, step in (("hidden", "train", 2), ("logits", "held_out", 10)):
        chosen = slopes.query(f"{own} and quantity == '{quantity}' and split == '{split}' and step == {step}").index
        assert len(chosen) == 1
        changed = slopes.copy()
        changed.loc[chosen, "verdict"] = "undecided"
        found = verdicts_of(config, changed)
        assert found["AdamW, alpha/r, A kaiming_uniform"]["whole_model"] == "mixed (15 flat, 1 undecided)"
    row = verdicts_of(config, slopes.assign(verdict=slopes["verdict"].mask(slopes["rule"] == "0", "flat")))[
        "AdamW, kappa = 0, A kaiming_uniform (control)"
    ]
    assert [row["whole_model"], row["modules"]] == ["FLAT: the check has no power"] * 2


def test_the_figure_has_the_table_s_intervals() -> None:
    """Half of the 95% interval, as stored and printed."""
    config, slopes = published()
    manifest = {"config": {"model": "m", "batches": "fixed", "seeds": config.seeds, "band": config.band}}
    drawn = figure.exponents(manifest, slopes)
    bars = drawn.axes[0].containers[0]  # the first case, trained on, the first module
    own = slopes.query("split == 'train' and module == 'self_attn.q_proj' and quantity == 'output'")[
        : len(config.steps)
    ]
    half = [(high - low) / 2 for (_, low), (_, high) in bars[2][0].get_segments()]
    np.testing.assert_allclose(half, own["half_width"], rtol=1e-9)
