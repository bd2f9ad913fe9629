"""Full fine-tuning: the targets' own weights, trained by the step, the loop and the layout that adapters have."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny

from rora_theory import adapters, llama
from rora_theory.adapters import FullConfig
from rora_theory.data.batches import Batch
from rora_theory.errors import InputError
from rora_theory.finetune import FinetuneConfig, sharding
from rora_theory.finetune import step as steps
from rora_theory.llama.weights import tensor_names
from rora_theory.sweep.cells import training_of
from rora_theory.sweep.design import Design

CONFIG = FinetuneConfig(method="full", targets=("q_proj", "down_proj"), batch_size=8, warmup=1, lr=0.01, held_out=0)
CHOSEN = ("self_attn.q_proj", "mlp.down_proj")
STEPS = 3


@pytest.fixture(scope="module")
def params():
    return tiny.params()


@pytest.fixture(scope="module")
def batches():
    random = np.random.default_rng(0)
    tokens = random.integers(1, 128, (STEPS, 8, 17)).astype(np.int32)
    weights = (np.arange(16) < random.integers(5, 17, (STEPS, 8, 1))).astype(np.float32)
    return [Batch(t[:, :-1], t[:, 1:], w, None) for t, w in zip(tokens, weights, strict=True)]


def train(params, batches, layout=None):
    """Losses and gradient norms of the steps, and the adapter after the last."""
    adapter = adapters.init(jax.random.key(1), CONFIG.adapter(), tiny.CONFIG, params)
    state, place, base, shardings = (
        steps.init_state(adapter, steps.finetune_optimizer(CONFIG, STEPS), jax.random.key(2)),
        None,
        params,
        None,
    )
    own = adapter
    if layout is not None:
        shardings, place, base = layout.state_shardings(state), layout.batch, layout.params(params)
        state, own = layout.state(state), sharding.Gathered(adapter, layout)
    function = steps.train_step(own, tiny.CONFIG, CONFIG, STEPS, state_shardings=shardings)
    found = []
    for batch in batches:
        state, metrics = function(state, base, place(batch) if place else batch)
        found.append((float(metrics.loss), float(metrics.grad_norm)))
    return np.array(found), adapters.replace(adapter, state.params), state


@pytest.fixture(scope="module")
def trained(params, batches):
    return train(params, batches)


@pytest.mark.slow
def test_the_gradient_is_that_of_the_loss_in_the_weights(params, batches):
    """By the model's own logits, and by the loss itself a little along the gradient and against it."""
    batch = jax.tree.map(jnp.asarray, batches[0])

    @jax.jit
    @jax.value_and_grad
    def plain(weights, batch):
        old = params["layers"]
        layers = {**old, **{name: {**old[name], **own} for name, own in weights.items()}}
        logits = llama.forward({**params, "layers": layers}, batch.inputs, tiny.CONFIG)
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), batch.targets[..., None], axis=-1)[..., 0]
        return -jnp.sum(batch.weights * picked)

    adapter = adapters.init(jax.random.key(1), CONFIG.adapter(), tiny.CONFIG, params)
    own = jax.jit(jax.grad(lambda p, b: steps.batch_loss(params, b, tiny.CONFIG, adapters.replace(adapter, p))))(
        adapter.params, batch
    )
    weights = {name: {"weight": params["layers"][name]["weight"]} for name in CHOSEN}
    assert set(own) == set(CHOSEN)
    # Float32 sums over the batch in another order.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), own, plain(weights, batch)[1])
    squared = sum(float(jnp.sum(jnp.square(one))) for one in jax.tree.leaves(own))
    size = 1e-2 / math.sqrt(squared)
    ahead, behind = (
        float(plain(jax.tree.map(lambda w, g, s=s: w + s * size * g, weights, own), batch)[0]) for s in (1.0, -1.0)
    )
    # The loss is in float32, of which some 1e-7 of 400 is lost in a difference of about 1.
    assert (ahead - behind) / (2 * size) == pytest.approx(squared, rel=1e-2)


@pytest.mark.slow
def test_three_steps_are_torch_s_adamw_on_the_same_modules(params, batches, trained):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**tiny.CONFIG.to_hf()))
    tensors = {}
    for path, leaf in jax.tree.leaves_with_path(params):
        names = tensor_names([entry.key for entry in path], tiny.CONFIG.num_hidden_layers)
        tensors |= zip(names, leaf if len(names) > 1 else [leaf], strict=True)
    theirs.load_state_dict({name: torch.tensor(np.asarray(one)) for name, one in tensors.items()})
    chosen = [one for name, one in theirs.named_parameters() if name.split(".")[-2] in CONFIG.modules]
    optimizer = torch.optim.AdamW(chosen, lr=1.0, betas=CONFIG.betas, eps=CONFIG.epsilon, weight_decay=0.0)
    for step, (batch, (loss, norm)) in enumerate(zip(batches, trained[0], strict=True)):
        logits = theirs(torch.tensor(batch.inputs)).logits
        each = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), torch.tensor(batch.targets).flatten().long(), reduction="none"
        )
        weights = torch.tensor(batch.weights).flatten()
        own = (each * weights).sum() / weights.sum()
        theirs.zero_grad()
        own.backward()
        assert own.item() == pytest.approx(loss, rel=1e-5)
        assert float(torch.nn.utils.clip_grad_norm_(chosen, CONFIG.clip)) == pytest.approx(norm, rel=1e-4)
        optimizer.param_groups[0]["lr"] = [0.0, CONFIG.lr, CONFIG.lr / 2][step]
        optimizer.step()
    merged = trained[1].merge(params)
    for name, one in theirs.named_parameters():
        if name.startswith("model.layers."):
            layer, module = int(name.split(".")[2]), ".".join(name.split(".")[3:-1])
            ours = merged["layers"][module]
            ours = ours["weight"] if isinstance(ours, dict) else ours
            # Adam divides by the gradient's size: entries whose gradient is float32's rounding move by up to a rate.
            off = np.abs(np.asarray(ours[layer]) - one.detach().numpy())
            assert np.quantile(off, 0.99) < 1e-5
            assert off.max() < CONFIG.lr


@pytest.mark.slow
def test_devices_that_share_the_weights_share_their_training_too(params, batches, trained):
    layout = sharding.Layout(sharding.mesh(fsdp=4))
    found, _, state = train(params, batches, layout)
    np.testing.assert_allclose(found, trained[0], rtol=1e-4)
    held = state.optimizer[1][0].mu["self_attn.q_proj"]["weight"]
    assert held.addressable_shards[0].data.shape == (2, 4, 16), "of the moments each device has its rows"


def test_merging_puts_the_trained_weights_in_place_and_nothing_else(params, trained):
    merged = trained[1].merge(params)
    for path, leaf in jax.tree.leaves_with_path(merged):
        names = [entry.key for entry in path]
        old = params
        for name in names:
            old = old[name]
        assert bool(jnp.any(leaf != old)) == (names[-1] == "weight" and names[1] in CHOSEN), names
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    own = sum(params["layers"][name]["weight"].size for name in CHOSEN)
    assert adapters.count(trained[1]) == own
    assert adapters.share(trained[1], params) == own / total, "the trained weights are the base's, counted once"


@pytest.mark.usefixtures("unchecked")
def test_refuses(params, trained, tmp_path):
    with pytest.raises(InputError, match=r"trained weights.*save_merged"):
        adapters.save_peft(tmp_path / "adapter", trained[1])
    with pytest.raises(InputError, match="cannot be undone"):
        adapters.unmerge(trained[1], params)
    with pytest.raises(InputError, match="layers 0 of 2"):
        FullConfig(("model.layers.0.mlp.up_proj",)).table(tiny.CONFIG)
    with pytest.raises(InputError, match=r"rank .*method full, got 8"):
        FinetuneConfig(method="full", rank=8)


def test_a_sweep_trains_the_adapters_targets():
    shared = FinetuneConfig(targets=("q_proj", "o_proj"), dropout=0.1)
    found = training_of(Design(), shared, "full", None, 1e-5, 3)
    assert (found.method, found.modules, found.dropout, found.lr) == ("full", ("q_proj", "o_proj"), 0.0, 1e-5)
    assert found.adapter() == FullConfig(("q_proj", "o_proj"))
