"""Every method trains, is counted, and is laid out over devices by the same step."""

import math

import jax
import numpy as np
import pytest
from support import tiny

from rora_theory import adapters
from rora_theory.adapters import BottleneckConfig, LoraConfig, PrefixConfig
from rora_theory.data.batches import Batch
from rora_theory.errors import InputError
from rora_theory.finetune import FinetuneConfig, capacity, sharding
from rora_theory.finetune import step as steps

OTHERS = {
    "prefix": {"virtual_tokens": 3},
    "series": {"bottleneck": 4, "dropout": 0.0},
    "parallel": {"bottleneck": 4, "dropout": 0.0},
}
STEPS = 12


def settings(method, **changes):
    common = {"batch_size": 8, "warmup": 2, "lr": 0.03, "held_out": 0}
    return FinetuneConfig(method=method, **common | OTHERS[method] | changes)


def batch(width=16):
    random = np.random.default_rng(0)
    tokens = random.integers(1, 128, (8, width + 1)).astype(np.int32)
    weights = (np.arange(width) < random.integers(5, width + 1, (8, 1))).astype(np.float32)
    return Batch(tokens[:, :-1], tokens[:, 1:], weights, None)


def train(params, config, layout=None):
    """Losses of `STEPS` steps on one batch, and the adapter before and after."""
    adapter = adapters.init(jax.random.key(1), config.adapter(), tiny.CONFIG, params)
    before = jax.tree.map(np.asarray, adapter.params)
    state = steps.init_state(adapter, steps.finetune_optimizer(config, STEPS), jax.random.key(2))
    shardings, item, base = None, batch(), params
    if layout is not None:
        shardings, item, base = layout.state_shardings(state), layout.batch(item), layout.params(params)
        state, adapter = layout.state(state), sharding.Gathered(adapter, layout)
    function = steps.train_step(adapter, tiny.CONFIG, config, STEPS, state_shardings=shardings)
    losses = []
    for _ in range(STEPS):
        state, metrics = function(state, base, item)
        losses.append(float(metrics.loss))
    return losses, before, jax.tree.map(np.asarray, state.params)


@pytest.fixture(scope="module")
def params():
    return tiny.params()


@pytest.mark.slow
@pytest.mark.parametrize("method", OTHERS)
def test_a_step_changes_every_tensor_for_the_better(method, params):
    losses, before, after = train(params, settings(method))
    assert losses[-1] < losses[2] - 0.05
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        changed = (old != new).reshape(len(old), -1).any(axis=1)
        assert changed.all(), "of every layer"


@pytest.mark.slow
def test_devices_that_share_the_weights_train_the_same(params):
    """To float32 sums in another order, through as many Adam steps. A prefix: what no linear module takes part in."""
    layout = sharding.Layout(sharding.mesh(fsdp=4))
    alone, shared = train(params, settings("prefix")), train(params, settings("prefix"), layout)
    np.testing.assert_allclose(shared[0], alone[0], rtol=1e-4)


@pytest.mark.parametrize("method", [*OTHERS, "full"])
def test_capacity_counts_them(method, params):
    config = FinetuneConfig(method="full", batch_size=8) if method == "full" else settings(method)
    found = capacity.account(tiny.CONFIG, config, 16)
    adapter = adapters.init(jax.random.key(1), config.adapter(), tiny.CONFIG, params)
    assert found.adapter == 4 * found.trainable == 4 * adapters.count(adapter)
    assert found.optimizer - 2 * found.adapter in range(8, 33), "beside the moments: counters and the dropout key"
    assert found.flops > 2 * found.tokens * sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params["layers"]))


@pytest.mark.parametrize("method", ["series", "parallel"])
def test_no_product_with_a_weight_is_made_again(method):
    """Six products an adapter, as LoRA of the same width on the same modules, and no more.

    Each is 2 x tokens x width x the length of what it maps from or to: in + out for LoRA and parallel, twice
    the model's width for series, which stands before up_proj and after down_proj.
    """
    targets = ("up_proj", "down_proj")
    config = settings(method, targets=targets)
    low_rank = FinetuneConfig(rank=4, targets=targets, batch_size=8, dropout=0.0, held_out=0)
    found, known = (capacity.account(tiny.CONFIG, one, 16) for one in (config, low_rank))
    if method == "parallel":
        assert found.flops == known.flops
    else:
        sizes = [tiny.CONFIG.module_shape(f"mlp.{name}") for name in targets]
        more = sum(2 * tiny.CONFIG.hidden_size - (p_in + p_out) for p_out, p_in in sizes)
        assert found.flops - known.flops == 6 * found.tokens * 4 * more * tiny.CONFIG.num_hidden_layers < 0


def test_published_settings():
    assert FinetuneConfig(method="prefix").adapter() == PrefixConfig(10)
    assert FinetuneConfig(method="series").adapter() == BottleneckConfig(
        "series", 256, ("up_proj", "gate_proj"), "tanh", 1.0, 0.05
    )
    assert FinetuneConfig(method="parallel").adapter() == BottleneckConfig(
        "parallel", 256, ("up_proj", "down_proj"), "tanh", 1.0, 0.05
    )
    assert isinstance(FinetuneConfig(method="dora").adapter(), LoraConfig)
    assert FinetuneConfig(method="dora").lora().use_dora
    assert FinetuneConfig(targets=("o_proj",)).lora().target_modules == ("o_proj",)
    rates = {method: FinetuneConfig(method=method).peak_learning_rate for method in ("prefix", "series", "parallel")}
    assert rates == {"prefix": 3e-2, "series": 3e-4, "parallel": 3e-4}


def test_a_run_is_identified_by_the_settings_of_its_method():
    """Settings of other methods do not change the identity of a run."""
    own = {
        "lora": {"rule", "rank", "alpha", "rank_pattern", "alpha_pattern", "init", "lr_multiplier_A", "targets"},
        "prefix": {"virtual_tokens"},
        "series": {"bottleneck", "non_linearity", "targets"},
    }
    found = {method: FinetuneConfig(method=method).settings() for method in own}
    common = set.intersection(*map(set, found.values()))
    assert {method: set(plain) - common for method, plain in found.items()} == own
    assert found["lora"]["targets"] == ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
    assert {"method", "seed", "dropout"} <= common


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"method": "prefix", "rank": 8},
            "rank .*method prefix, got 8.*lora or dora",
        ),
        ({"method": "series", "rule": "lora"}, "rule .*method series, got 'lora'"),
        ({"method": "prefix", "targets": ("q_proj",)}, "targets .*method prefix"),
        ({"virtual_tokens": 3}, "virtual_tokens .*method lora, got 3.*prefix"),
        ({"method": "dora", "bottleneck": 8}, "bottleneck .*method dora, got 8"),
        ({"method": "prefix", "virtual_tokens": 0}, "virtual_tokens .*0"),
        ({"method": "parallel", "bottleneck": 0}, "bottleneck width .*0"),
        ({"method": "parallel", "dropout": 1.0}, "dropout .*1.0"),
        ({"method": "ia3"}, "method .*lora, dora, prefix, series, parallel, full, got 'ia3'"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_refuses(changes, message):
    with pytest.raises(InputError, match=message):
        FinetuneConfig(**changes)


def test_lora_s_settings_are_not_those_of_others():
    with pytest.raises(InputError, match=r"method .*lora or dora, got 'series'"):
        FinetuneConfig(method="series").lora()
