"""The same step trains every method, counts its parameters, and lays it out over devices."""

import functools
import math

import jax
import numpy as np
import pytest
from support import tiny, training

from rora_theory.lab.adapters import BottleneckConfig, LoraConfig, PrefixConfig
from rora_theory.lab.finetune import FinetuneConfig
from rora_theory.lab.finetune.sharding import Layout

METHOD_SETTINGS = {
    "prefix": {"virtual_tokens": 3},
    "series": {"bottleneck": 4, "dropout": 0.0},
    "parallel": {"bottleneck": 4, "dropout": 0.0},
}
BATCHES = [training.batch()] * 12


def settings(method, **changes):
    common = {"batch_size": 8, "warmup": 2, "lr": 0.03, "held_out": 0}
    return FinetuneConfig(method=method, **common | METHOD_SETTINGS.get(method, {}) | changes)


@pytest.fixture(scope="module")
def trained(params):
    """Return a function that trains a method once."""
    return functools.cache(lambda method: training.train(params, tiny.CONFIG, settings(method), BATCHES))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHOD_SETTINGS)
def test_a_step_changes_every_tensor_for_the_better(method, trained):
    run = trained(method)
    assert run.losses[-1] < run.losses[2] - 0.05
    for old, new in zip(jax.tree.leaves(run.adapter.params), jax.tree.leaves(run.weights[-1]), strict=True):
        changed = (np.asarray(old) != new).reshape(len(old), -1).any(axis=1)
        assert changed.all(), "in every layer"


@pytest.mark.slow
def test_devices_that_share_the_weights_train_the_same(params, trained):
    """A prefix, in which no linear module takes part, agrees up to float32 sums in another order."""
    layout = Layout.over(jax.devices()[:4], split_weights=True)
    shared = training.train(params, tiny.CONFIG, settings("prefix"), BATCHES, layout)
    np.testing.assert_allclose(shared.losses, trained("prefix").losses, rtol=1e-4)


@pytest.mark.parametrize("method", ["series", "parallel"])
def test_adapters_need_no_further_product_with_a_weight(method):
    """Each adapter makes six products, as LoRA of the same width on the same modules, and no more.

    Each is 2 x tokens x width x the length of what it maps from or to: in + out for LoRA and parallel, twice
    the model's width for series, which stands before up_proj and after down_proj.
    """
    targets = ("up_proj", "down_proj")
    low_rank = FinetuneConfig(rank=4, targets=targets, batch_size=8, dropout=0.0, held_out=0)
    ours, known = (
        count_operations(training.trace(tiny.CONFIG, config, 16).jaxpr)
        for config in (settings(method, targets=targets), low_rank)
    )
    if method == "parallel":
        assert ours == known
    else:
        sizes = [tiny.CONFIG.module_shape(f"mlp.{name}") for name in targets]
        more = sum(2 * tiny.CONFIG.hidden_size - (p_in + p_out) for p_out, p_in in sizes)
        assert ours - known == 6 * (8 * 16) * 4 * more * tiny.CONFIG.num_hidden_layers < 0


def count_operations(jaxpr) -> int:
    """Return the operations of all matrix products: 2 m n k for each, times the lengths of the enclosing loops."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            left, out = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
            total += 2 * math.prod(out) * math.prod(left[axis] for axis in contracted)
        inner = [getattr(value, "jaxpr", value) for value in eqn.params.values()]
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        total += times * sum(count_operations(value) for value in inner if hasattr(value, "eqns"))
    return total


def test_published_settings():
    expected = {
        "prefix": (PrefixConfig(10), 3e-2),
        "series": (BottleneckConfig("series", 256, ("up_proj", "gate_proj"), 0.05), 3e-4),
        "parallel": (BottleneckConfig("parallel", 256, ("up_proj", "down_proj"), 0.05), 3e-4),
    }
    configs = {method: FinetuneConfig(method=method) for method in expected}
    assert {method: (c.adapter(), c.peak_learning_rate) for method, c in configs.items()} == expected
    assert isinstance(FinetuneConfig(method="dora").adapter(), LoraConfig)
    assert FinetuneConfig(method="dora").adapter().use_dora
    assert FinetuneConfig(targets=("o_proj",)).adapter().target_modules == ("o_proj",)


def test_a_run_is_identified_by_the_settings_of_its_method():
    """Settings of other methods do not change the identity of a run; the order of patterns does."""
    expected = {
        "lora": {"rule", "rank", "alpha", "rank_pattern", "alpha_pattern", "init", "lr_multiplier_A", "targets"},
        "prefix": {"virtual_tokens"},
        "series": {"bottleneck", "targets"},
    }
    identities = {method: FinetuneConfig(method=method).settings() for method in expected}
    common = set.intersection(*map(set, identities.values()))
    assert {method: set(identity) - common for method, identity in identities.items()} == expected
    assert identities["lora"]["targets"] == ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
    assert {"method", "seed", "dropout", "quantization"} <= common
    pattern = {"q_proj": 2, ".*_proj": 4}
    orders = [FinetuneConfig(rank_pattern=p).settings() for p in (pattern, dict(reversed(pattern.items())))]
    assert orders[0] != orders[1]
