"""Full fine-tuning: the targets' own weights, trained by the step, the loop and the layout that adapters have."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny, training

from rora_theory import adapters
from rora_theory.adapters import FullConfig
from rora_theory.errors import InputError
from rora_theory.finetune import FinetuneConfig, sharding
from rora_theory.llama.weights import tensor_names
from rora_theory.sweep.cells import training_of
from rora_theory.sweep.design import Design

CONFIG = FinetuneConfig(method="full", targets=("q_proj", "down_proj"), batch_size=8, warmup=1, lr=0.01, held_out=0)
CHOSEN = ("self_attn.q_proj", "mlp.down_proj")


BATCHES = [training.batch(seed=seed) for seed in range(3)]


@pytest.fixture(scope="module")
def trained(params):
    return training.train(params, tiny.CONFIG, CONFIG, BATCHES)


@pytest.fixture(scope="module")
def merged(params, trained):
    """Return the model's weights after the last step."""
    return adapters.replace(trained.adapter, trained.state.params).merge(params)


@pytest.mark.slow
def test_three_steps_are_torch_s_adamw_on_the_same_modules(params, trained, merged):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**tiny.CONFIG.to_hf()))
    tensors = {}
    for path, leaf in jax.tree.leaves_with_path(params):
        names = tensor_names([entry.key for entry in path], tiny.CONFIG.num_hidden_layers)
        tensors |= zip(names, leaf if len(names) > 1 else [leaf], strict=True)
    theirs.load_state_dict({name: torch.tensor(np.asarray(tensor)) for name, tensor in tensors.items()})
    chosen = [tensor for name, tensor in theirs.named_parameters() if name.split(".")[-2] in CONFIG.modules]
    optimizer = torch.optim.AdamW(chosen, lr=1.0, betas=CONFIG.betas, eps=CONFIG.epsilon, weight_decay=0.0)
    for step, batch in enumerate(BATCHES):
        logits = theirs(torch.tensor(batch.inputs)).logits.flatten(0, 1)
        targets = torch.tensor(batch.targets).flatten().long()
        losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        weights = torch.tensor(batch.weights).flatten()
        loss = (losses * weights).sum() / weights.sum()
        theirs.zero_grad()
        loss.backward()
        assert loss.item() == pytest.approx(trained.losses[step], rel=1e-5)
        norm = float(torch.nn.utils.clip_grad_norm_(chosen, CONFIG.clip))
        assert norm == pytest.approx(trained.norms[step], rel=1e-4)
        optimizer.param_groups[0]["lr"] = [0.0, CONFIG.lr, CONFIG.lr / 2][step]
        optimizer.step()
    for name, tensor in theirs.named_parameters():
        if name.startswith("model.layers."):
            layer, module = int(name.split(".")[2]), ".".join(name.split(".")[3:-1])
            ours = merged["layers"][module]
            ours = ours["weight"] if isinstance(ours, dict) else ours
            # Adam divides by the gradient's size: entries whose gradient is float32's rounding move by up to a rate.
            off = np.abs(np.asarray(ours[layer]) - tensor.detach().numpy())
            assert np.quantile(off, 0.99) < 1e-5
            assert off.max() < CONFIG.lr


@pytest.mark.slow
def test_devices_that_share_the_weights_share_their_training_too(params, trained):
    shared = training.train(params, tiny.CONFIG, CONFIG, BATCHES, sharding.Layout(sharding.mesh(fsdp=4)))
    np.testing.assert_allclose((shared.losses, shared.norms), (trained.losses, trained.norms), rtol=1e-4)
    held = shared.state.optimizer[1][0].mu["self_attn.q_proj"]["weight"]
    assert held.addressable_shards[0].data.shape == (2, 4, 16), "of the moments each device has its rows"


def test_merging_puts_the_trained_weights_in_place_and_nothing_else(params, trained, merged):
    changed = jax.tree.map(lambda new, old: bool(jnp.any(new != old)), merged, params)
    for path, is_changed in jax.tree.leaves_with_path(changed):
        names = [entry.key for entry in path]
        assert is_changed == (names[-1] == "weight" and names[1] in CHOSEN), names
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    weights = sum(params["layers"][name]["weight"].size for name in CHOSEN)
    assert adapters.count(trained.adapter) == weights
    assert adapters.share(trained.adapter, params) == weights / total, "the trained weights are the base's"


@pytest.mark.usefixtures("unchecked")
def test_refuses(params, trained, tmp_path):
    with pytest.raises(InputError, match=r"trained weights.*save_merged"):
        adapters.save_peft(tmp_path / "adapter", trained.adapter)
    with pytest.raises(InputError, match="cannot be undone"):
        adapters.unmerge(trained.adapter, params)
    with pytest.raises(InputError, match="layers 0 of 2"):
        FullConfig(("model.layers.0.mlp.up_proj",)).table(tiny.CONFIG)


def test_a_sweep_trains_the_adapters_targets():
    shared = FinetuneConfig(targets=("q_proj", "o_proj"), dropout=0.1)
    config = training_of(Design(), shared, "full", None, 1e-5, 3)
    assert (config.method, config.modules, config.dropout, config.lr) == ("full", ("q_proj", "o_proj"), 0.0, 1e-5)
    assert config.adapter() == FullConfig(("q_proj", "o_proj"))
