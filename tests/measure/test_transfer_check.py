"""The plans that a check of a transferred setting compares, and their sizes against the tuned one's with errors."""

import math
from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest

from rora_theory.advice.setting import Setting
from rora_theory.advice.transfer import transfer
from rora_theory.errors import InputError
from rora_theory.lab.data.batches import Batch
from rora_theory.lab.llama import Model
from rora_theory.measure import transfer_check
from rora_theory.measure.layers.model_layers import Change, RealStep
from rora_theory.runs import frames

OLD = Setting(8, 16.0, 3e-4, 0.0, "sgd")
TERMS = {"model.layers.0.q_proj": 0.0, "model.layers.1.q_proj": 5.0}


def test_candidates() -> None:
    """The plans are the changes of the advice at the new rank; patterns occur only if the regime was measured."""
    advice = transfer(OLD, 32, TERMS)
    plans = transfer_check.candidates(advice)
    one_alpha = replace(advice.unchanged, alpha=advice.alpha_at_old_rate)
    assert {name: plan.setting for name, plan in plans.items()} == {
        "tuned": OLD,
        "neither changed": advice.unchanged,
        "neither changed, use_rslora": replace(advice.unchanged, rule="rslora"),
        "one alpha": one_alpha,
        "one rate": replace(advice.unchanged, learning_rate=advice.rate_at_alpha),
        "alpha by type": one_alpha,
        "alpha by module": one_alpha,
    }
    patterns = {name: list(plan.alpha_pattern) for name, plan in plans.items() if plan.alpha_pattern}
    assert patterns == {"alpha by module": ["layers.0.q_proj", "layers.1.q_proj"], "alpha by type": ["q_proj"]}
    assert list(transfer_check.candidates(transfer(Setting(8, 16.0, 3e-4, "rslora"), 32))) == [
        "tuned", "neither changed", "one alpha", "one rate"
    ]  # fmt: skip


class Watching(RealStep):
    """Stepper that records what a step requests and changes nothing."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def change(self, setting, key, alpha_pattern=None):
        self.calls.append((setting, jax.random.key_data(key).tolist(), alpha_pattern))
        return Change({"q_proj": np.array([1.0, 2.0]), "v_proj": np.array([3.0, 4.0])}, 5.0, 6.0)


def test_settings_and_sizes_of_a_first_step() -> None:
    """Each seed has one A for all plans, and each plan its own setting and alphas.

    There is a row for each module and layer, and for the whole model.
    """
    advice, stepper = transfer(OLD, 32, TERMS), Watching()
    steps = list(transfer_check.first_steps(advice, (0, 5)))
    assert [step.seed for step in steps[:2]] == [0, 5]
    tables = [transfer_check.first_step_rows(stepper, advice, step, 9) for step in steps]
    plans = transfer_check.candidates(advice)
    for step, (setting, key, pattern), rows in zip(steps, stepper.calls, tables, strict=True):
        assert key == jax.random.key_data(jax.random.fold_in(jax.random.key(9), step.seed)).tolist()
        assert (setting, pattern) == (plans[step.plan].setting, dict(plans[step.plan].alpha_pattern))
        labels = {"plan": step.plan, "seed": step.seed, "alpha": setting.alpha, "scaling": setting.scaling}
        labels |= {"alpha_pattern": len(pattern)}
        assert all(row.items() >= labels.items() for row in rows)
        assert [(row["quantity"], row.get("module"), row.get("layer"), row["rms"]) for row in rows] == [
            ("module", "q_proj", 0, 1.0), ("module", "q_proj", 1, 2.0), ("module", "v_proj", 0, 3.0),
            ("module", "v_proj", 1, 4.0), ("hidden", None, None, 5.0), ("logits", None, None, 6.0),
        ]  # fmt: skip
    assert {len(pattern) for _, _, pattern in stepper.calls} == {0, 1, 2}


def test_seeds_that_give_no_error_are_refused_before_any_step() -> None:
    model, batch = object.__new__(Model), Batch(*np.zeros((2, 1, 4), int), np.zeros((1, 4), np.float32), None)
    check = partial(transfer_check.check_transfer, model, transfer(OLD, 32), batch, batch, target_modules=["q_proj"])
    for seeds in ((0,), (0, 0), (0, -1)):
        with pytest.raises(InputError, match="--seeds"):
            check(seeds=seeds)


def test_ratios_are_of_root_mean_squares_over_seeds_and_their_errors_the_jackknife_s() -> None:
    advice, seeds = transfer(OLD, 32), (3, 1, 7)
    random = np.random.default_rng(0)
    quantities = (("module", "q_proj"), ("module", "v_proj"), ("hidden", None), ("logits", None))
    table = frames.from_rows(
        [
            {"plan": cell.plan, "seed": cell.seed, "quantity": quantity, "module": module, "layer": 0}
            | {"rms": (1 if cell.plan == "tuned" else 2) * math.exp(0.1 * random.normal())}
            for cell in transfer_check.first_steps(advice, seeds)
            for quantity, module in quantities
        ],
        transfer_check.COLUMNS,
    )
    summary = transfer_check.summarise(table, advice)
    assert list(summary.columns) == list(transfer_check.SUMMARY_COLUMNS)
    tuned = summary[summary["plan"] == "tuned"]
    assert tuned["ratio"].to_numpy() == pytest.approx(1, rel=1e-12)
    assert tuned["standard_error"].to_numpy() == pytest.approx(0, abs=1e-12)
    # Mean squares over seeds, of one rate over tuned.
    names = table["module"].fillna(table["quantity"])
    squares = {key: rows.to_numpy(float) ** 2 for key, rows in table["rms"].groupby([table["plan"], names])}

    def ratio(name: str, seeds: list[int]) -> float:
        return math.sqrt(squares["one rate", name][seeds].mean() / squares["tuned", name][seeds].mean())

    def mean_ratio(seeds: list[int]) -> float:
        return math.sqrt(ratio("q_proj", seeds) * ratio("v_proj", seeds))

    rows = summary[summary["plan"] == "one rate"].set_index("quantity")
    row = rows.loc["modules"]
    left_out = [mean_ratio(seeds) for seeds in ([1, 2], [0, 2], [0, 1])]
    assert row["ratio"] == pytest.approx(mean_ratio([0, 1, 2]), rel=1e-12)
    assert row["standard_error"] == pytest.approx(math.sqrt(2 * np.var(left_out)), rel=1e-9)
    assert row["smallest"] < row["ratio"] < row["largest"]
    for name in ("hidden", "logits"):
        assert rows.loc[name, "ratio"] == pytest.approx(ratio(name, [0, 1, 2]), rel=1e-12)
    printed = {
        cells[0]: dict(zip(transfer_check.HEADS, cells, strict=True))
        for cells in transfer_check.format_candidates(summary)
    }
    assert list(printed) == [plan for plan in transfer_check.candidates(advice) if plan != "tuned"]
    expected = "{ratio:.3f} ± {standard_error:.3f} ({smallest:.2f} to {largest:.2f})".format_map(row)
    assert printed["one rate"]["modules: mean (range)"] == expected
    assert printed["one rate"]["rate"] == f"{advice.rate_at_alpha:.3g}"
