"""The plans that a check of a transferred setting compares, and their sizes against the tuned one's with errors."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
from support import torch_models
from support.torch_models import torch

from rora_theory import inits
from rora_theory.advice.setting import Setting
from rora_theory.advice.transfer import transfer
from rora_theory.measure import transfer_check
from rora_theory.measure.batches import find_masks
from rora_theory.runs import frames
from rora_theory.scaling import exponent

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


@pytest.mark.filterwarnings("ignore")
def test_first_step_by_hand() -> None:
    """Under SGD each module changes by gamma^2 eta G A^T A x', with its own alpha, and both settings share draws of A.

    The model is left as it was.
    """
    model = torch_models.model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch, held_out = torch_models.batch(seed=0), torch_models.batch(seed=1)
    module = "model.layers.1.self_attn.q_proj"
    advice = transfer(Setting(2, 16.0, 1e-4, 0.0, "sgd"), 4, {module: 5.0})
    checker = transfer_check.FirstStepChecker(model, batch, held_out, ["layers.1.self_attn.q_proj"], 9)
    rows = {
        step.plan: {row["quantity"]: row for row in checker.rows(advice, step)}
        for step in transfer_check.first_steps(advice, (3,))
    }
    assert {name: (before[name] == value).all() for name, value in model.state_dict().items()} == dict.fromkeys(
        before, True
    )
    assert all(parameter.requires_grad for parameter in model.parameters())
    # G and the held-out inputs of the module, from hooks of our own.
    copied, inputs = copy.deepcopy(model), []
    target = copied.get_submodule(module)
    target.register_forward_hook(lambda _, x, __: inputs.append(x[0].detach()))
    copied(**batch).loss.backward()
    with torch.no_grad():
        copied(**held_out)
    masks = next(iter(find_masks(model, held_out, batch).values()))
    x = inputs[1].reshape(-1, 16)[torch.from_numpy(masks.real & ~masks.seen)].double().numpy()
    grad = target.weight.grad.double().numpy()
    lora_A = inits.draw(np.random.default_rng([9, 3, 0]), "kaiming_uniform", rank=4, p_in=16)
    for plan, candidate in transfer_check.candidates(advice).items():
        gamma = next(iter(candidate.alpha_pattern.values()), candidate.setting.alpha)
        gamma *= candidate.setting.rank ** -exponent(candidate.setting.rule)
        used = lora_A[: candidate.setting.rank]
        change = gamma**2 * candidate.setting.learning_rate * x @ used.T @ used @ grad.T
        row = rows[plan]["module"]
        assert row["rms"] == pytest.approx(np.sqrt(np.mean(change**2)), rel=1e-3)
        assert (row["module"], row["layer"], row["alpha_pattern"]) == (module, 1, len(candidate.alpha_pattern))
        assert (row["plan"], row["seed"], row["alpha"]) == (plan, 3, candidate.setting.alpha)
        assert rows[plan]["hidden"]["rms"] > 0 < rows[plan]["logits"]["rms"]


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
    summary = transfer_check.summarise_ratios(table, advice)
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
    expected = "{ratio:.3f} ({standard_error:.3f}), {smallest:.2f} to {largest:.2f}".format_map(row)
    assert printed["one rate"]["modules: mean, range"] == expected
    assert printed["one rate"]["rate"] == f"{advice.rate_at_alpha:.3g}"
