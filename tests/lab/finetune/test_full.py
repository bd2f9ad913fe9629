"""Full fine-tuning: the step, the loop and the layout of adapters train the target modules' own weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny, training

from rora_theory.errors import InputError
from rora_theory.lab import adapters
from rora_theory.lab.adapters import FullConfig
from rora_theory.lab.finetune import FinetuneConfig
from rora_theory.lab.finetune.sharding import Layout
from rora_theory.lab.sweep.grid import SweepCell

CONFIG = FinetuneConfig(method="full", targets=("q_proj", "down_proj"), batch_size=8, warmup=1, lr=0.01, held_out=0)
CHOSEN = ("self_attn.q_proj", "mlp.down_proj")


BATCHES = [training.batch(seed=seed) for seed in range(3)]


@pytest.fixture(scope="module")
def trained(params):
    return training.train(params, tiny.CONFIG, CONFIG, BATCHES)


@pytest.mark.slow
def test_devices_that_share_the_weights_share_their_training_too(params, trained):
    shared = training.train(params, tiny.CONFIG, CONFIG, BATCHES, Layout.over(jax.devices()[:4], split_weights=True))
    np.testing.assert_allclose((shared.losses, shared.norms), (trained.losses, trained.norms), rtol=1e-4)
    held = shared.state.optimizer[1][0].mu["self_attn.q_proj"]["weight"]
    assert held.addressable_shards[0].data.shape == (2, 4, 16), "each device has its rows of the moments"


def test_merging_puts_the_trained_weights_in_place_and_nothing_else(params, trained):
    merged = trained.adapter.replace(trained.state.params).merge(params)
    changed = jax.tree.map(lambda new, old: bool(jnp.any(new != old)), merged, params)
    for path, is_changed in jax.tree.leaves_with_path(changed):
        names = [entry.key for entry in path]
        assert is_changed == (names[-1] == "weight" and names[1] in CHOSEN), names
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    weights = sum(params["layers"][name]["weight"].size for name in CHOSEN)
    assert trained.adapter.count() == weights
    assert adapters.share(trained.adapter, params) == weights / total, "the trained weights are the base's"


@pytest.mark.usefixtures("unchecked")
def test_refuses(trained, tmp_path):
    with pytest.raises(InputError, match=r"trained weights.*save_merged"):
        adapters.save_peft(tmp_path / "adapter", trained.adapter)
    with pytest.raises(InputError, match="layers 0 of 2"):
        FullConfig(("model.layers.0.mlp.up_proj",)).table(tiny.CONFIG)


def test_a_sweep_trains_the_adapters_targets():
    shared = FinetuneConfig(targets=("q_proj", "o_proj"), dropout=0.1)
    config = SweepCell("m", "full", rate=1e-5, seed=3, read_at=(9,)).training(shared)
    assert (config.method, config.modules, config.dropout, config.lr) == ("full", ("q_proj", "o_proj"), 0.0, 1e-5)
    assert config.adapter() == FullConfig(("q_proj", "o_proj"))
