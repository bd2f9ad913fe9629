"""Eight devices take the steps of one device, with copies of the base weights or an eighth each."""

import dataclasses
import logging
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from support import tiny, training

from rora_theory.errors import InputError
from rora_theory.lab.finetune import Batches, FinetuneConfig, Trainer, choose_widths, sharding, tokenize
from rora_theory.lab.finetune.memory import StepMemory
from rora_theory.lab.finetune.sharding import AXIS, Layout
from rora_theory.lab.llama import MODULES, LlamaConfig, init_params
from rora_theory.lab.llama.model import abstract_params, count_parameters

MODEL = LlamaConfig(128, 32, 48, 2, 8, 8, 4, attention_bias=True, max_position_embeddings=64)
CONFIG = FinetuneConfig(rank=8, alpha=16, batch_size=8, warmup=0, lr=1e-2, held_out=0)
BATCHES = [training.batch(seed=seed) for seed in range(4)]


@pytest.fixture(scope="module")
def params():
    return init_params(jax.random.key(0), MODEL)


@contextmanager
def count_compilations():
    """Yield a list to which the names of the functions compiled inside the context are added."""
    names = []

    class Handler(logging.Handler):
        def emit(self, record):
            if record.msg.startswith("Compiling "):
                names.append(record.args[0].removeprefix("jit(").removesuffix(")"))  # JAX 0.6 has the name alone

    logger, handler = logging.getLogger("jax._src.interpreters.pxla"), Handler(logging.DEBUG)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        yield names
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


@pytest.fixture(scope="module")
def single(params):
    return training.train(params, MODEL, CONFIG, BATCHES)


@pytest.mark.slow
@pytest.mark.parametrize("split_weights", [False, True])
def test_the_steps_of_one_device(params, single, split_weights):
    layout = Layout.over(jax.devices(), split_weights=split_weights)
    with count_compilations() as compiled:
        trained = training.train(params, MODEL, CONFIG, BATCHES, layout)
    base, state, losses = trained.base, trained.state, trained.losses
    # Sums over rows and over weight axes are taken in another order: a few float32 roundings, 1e-7 each, of losses
    # near log 128. Dropout is on: its masks do not depend on the devices.
    np.testing.assert_allclose(losses, single.losses, rtol=2e-6)
    assert losses[-1] < losses[0]
    # Adam divides a gradient by its own size. Where one is near zero the rounding is all of it, and moves the weight
    # by up to a whole step; elsewhere by 1e-4 of one. So nearly all weights agree far within a step, and no weight
    # is further than the four steps can take it.
    for ours, theirs in zip(jax.tree.leaves(trained.weights[-1]), jax.tree.leaves(single.weights[-1]), strict=True):
        difference = np.abs(ours - theirs)
        assert np.mean(difference > 1e-5) < 0.01
        assert np.max(difference) < 2 * len(BATCHES) * CONFIG.peak_learning_rate
    assert layout.batch(BATCHES[0]).inputs.addressable_shards[0].data.shape == (1, 16)
    assert compiled.count("step") == 1, "the new state has the shardings of the old one"
    parts = 8 if split_weights else 1
    for name, (p_out, p_in) in (("self_attn.q_proj", (32, 32)), ("mlp.down_proj", (32, 48))):
        weight = base["layers"][name]["weight"]
        assert weight.addressable_shards[0].data.shape == (2, p_out // parts, p_in)
    assert base["embed_tokens"].addressable_shards[0].data.shape == (128 // parts, 32)
    a = state.params["self_attn.q_proj"]["lora_A"]
    assert a.addressable_shards[0].data.shape == a.shape
    moments = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.shape == a.shape]
    assert moments
    assert all(leaf.sharding.is_equivalent_to(a.sharding, 3) for leaf in moments)


@pytest.mark.slow
def test_dora_in_parts_over_devices(params):
    config = dataclasses.replace(CONFIG, method="dora", accumulation=2, dropout=0.0, remat=True)
    layout = Layout.over(jax.devices()[:4], split_weights=True)
    alone, shared = (training.train(params, MODEL, config, BATCHES, where) for where in (None, layout))
    np.testing.assert_allclose(shared.losses, alone.losses, rtol=2e-6)


@pytest.mark.slow
def test_devices_that_share_the_weights_need_a_part_of_the_memory():
    """A table copied to each device would add a sixth to the total, a stack of layers more."""
    model = LlamaConfig(8192, 256, 768, 8, 4, 4, 64, max_position_embeddings=128)
    config = FinetuneConfig(rank=8, batch_size=4, dropout=0.0)
    weights = 4 * count_parameters(model)
    adapted = [name for name in MODULES if "o_proj" not in name and "gate" not in name]
    trainable = model.num_hidden_layers * 8 * sum(sum(model.module_shape(name)) for name in adapted)
    layer = 4 * sum(p_out * p_in for p_out, p_in in map(model.module_shape, MODULES))
    memory = compiled_memory(model, config, 4)
    assert memory.arguments == pytest.approx(weights / 4 + 3 * 4 * trainable, rel=0.01)
    assert memory.temporaries < 2.5 * layer


def compiled_memory(model, config, devices):
    layout = Layout.over(jax.devices()[:devices], split_weights=True)
    return StepMemory.from_compiled(training.lower(model, config, 8, layout).compile())


@pytest.mark.slow
def test_no_device_gathers_the_unembedding_for_a_block_of_the_loss():
    """Four devices share a vocabulary of four blocks: consecutive rows in a block would gather all rows."""
    model = LlamaConfig(4 * 8192, 64, 128, 1, 4, 4, 16, max_position_embeddings=128)
    memory = compiled_memory(model, FinetuneConfig(rank=8, batch_size=4, dropout=0.0), 4)
    assert memory.temporaries < 4 * model.vocab_size * model.hidden_size / 2


def test_shardings_of_abstract_weights():
    model = dataclasses.replace(MODEL, vocab_size=129, tie_word_embeddings=True)
    base = abstract_params(model, jnp.bfloat16)
    shardings = Layout.over(jax.devices(), split_weights=True).shardings(base)
    assert shardings["layers"]["mlp.up_proj"]["weight"].spec == P(None, AXIS)
    assert shardings["layers"]["self_attn.q_proj"]["bias"].spec == P(None, AXIS)
    assert shardings["layers"]["input_layernorm"].spec == P()
    assert shardings["embed_tokens"].spec == P(), "129 is not divisible by 8: not split"
    copied = Layout.over(jax.devices()).shardings(base)
    assert all(sharding.is_fully_replicated for sharding in jax.tree.leaves(copied))


def test_a_run_takes_all_devices():
    layout, shardings = sharding.layout_over_all_devices(MODEL, CONFIG, split_weights=True)
    assert layout is not None
    assert dict(layout.mesh.shape) == {AXIS: 8}
    assert shardings == layout.shardings(abstract_params(MODEL))


@pytest.mark.slow
def test_an_adapter_that_is_handed_out_lies_where_the_run_s_does(params):
    """The adapter also has memory of its own."""
    layout = Layout.over(jax.devices(), split_weights=True)
    adapter = CONFIG.adapter().build(jax.random.key(1), MODEL, params)
    examples = tokenize(tiny.records(8), tiny.ByteEncoder(), cutoff=65, template="clean")
    data = Batches(examples, choose_widths(examples.input_lengths, 1), batch_size=8)
    run = Trainer(layout.place(params), MODEL, adapter, CONFIG, data, None, None, layout=layout)
    pairs = zip(jax.tree.leaves(run._state.params), jax.tree.leaves(run.adapter("last").params), strict=True)
    for original, copy in pairs:
        assert copy.sharding == original.sharding
        np.testing.assert_array_equal(copy, original)
        original.delete()
        assert not copy.is_deleted()


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (
            lambda: sharding.layout_over_all_devices(MODEL, dataclasses.replace(CONFIG, batch_size=12)),
            "batch_size .*multiple of 8 .*got 12",
        ),
        (lambda: Layout.over(jax.devices()).batch(training.batch(12)), "batch_size .*multiple of 8 .*got 12"),
        (lambda: Layout.over(jax.devices()).check_batch(24, 2), "batch_size .*8 .*times 2 .*got 24"),
    ],
)
def test_refused_by_name(make, match):
    with pytest.raises(InputError, match=match):
        make()


def test_one_device_has_no_layout(monkeypatch):
    first = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: first)
    assert sharding.layout_over_all_devices(MODEL, CONFIG, split_weights=True) == (None, None)
