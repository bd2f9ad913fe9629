"""Eight devices take the steps that one takes, on base weights of which each holds an eighth."""

import dataclasses
import functools
import logging
import re
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from support import tiny

from rora_theory import adapters
from rora_theory.data.batches import Batch
from rora_theory.errors import InputError
from rora_theory.finetune import Batches, FinetuneConfig, Trainer, choose_widths, sharding, tokenize
from rora_theory.finetune import step as steps
from rora_theory.finetune.sharding import Gathered, Layout, Rules
from rora_theory.llama import MODULES, LlamaConfig, init_params
from rora_theory.llama.model import abstract_params

MODEL = LlamaConfig(128, 32, 48, 2, 8, 8, 4, attention_bias=True, max_position_embeddings=64)
CONFIG = FinetuneConfig(rank=8, alpha=16, batch_size=8, warmup=0, lr=1e-2, held_out=0)
STEPS = 4


@pytest.fixture(scope="module")
def params():
    return init_params(jax.random.key(0), MODEL)


def batches(count=STEPS, rows=8, width=16):
    random = np.random.default_rng(0)
    for _ in range(count):
        tokens = random.integers(1, 128, (rows, width + 1)).astype(np.int32)
        weights = (np.arange(width) < random.integers(5, width + 1, (rows, 1))).astype(np.float32)
        yield Batch(tokens[:, :-1], tokens[:, 1:], weights, None)


def train(params, config=CONFIG, layout=None):
    """Losses and the last adapter of a few steps; with the function, its base weights and state."""
    base = params if layout is None else layout.params(params)
    adapter = adapters.init(jax.random.key(1), config.lora(), MODEL, base)
    state = steps.init_state(adapter, steps.finetune_optimizer(config, STEPS), jax.random.key(2))
    shardings = None
    if layout is not None:
        shardings = layout.state_shardings(state)
        state = layout.state(state)
        adapter = Gathered(adapter, layout)
    function = steps.train_step(adapter, MODEL, config, STEPS, state_shardings=shardings)
    losses = []
    for batch in batches():
        before = state
        state, metrics = function(state, base, batch if layout is None else layout.batch(batch))
        assert all(a.is_deleted() for a in jax.tree.leaves(before.params)), "the old state's memory is taken"
        losses.append(float(metrics.loss))
    return losses, jax.tree.map(np.asarray, state.params), (function, base, state)


@contextmanager
def count_compilations():
    """Names of the functions that are compiled meanwhile."""
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
    return train(params)


@pytest.fixture(scope="module")
def sharded(params):
    """``sharded(fsdp, rules)``: layout, what `train` gives on it, and the functions compiled; each trained once."""

    @functools.cache
    def make(fsdp, rules):
        layout = Layout(sharding.mesh(fsdp=fsdp), rules)
        with count_compilations() as compiled:
            return layout, train(params, layout=layout), compiled

    return make


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fsdp", "rules"),
    [
        (1, Rules()),
        (8, Rules()),
        (4, Rules(rank=("fsdp",), hidden=("data",))),
        (2, Rules(batch=("data",), outputs=(), inputs=("fsdp",))),
    ],
    ids=["data parallel", "fully sharded", "both, and a sharded adapter", "weights split by their inputs"],
)
def test_the_steps_of_one_device(sharded, single, fsdp, rules):
    layout, (losses, weights, (_, base, state)), compiled = sharded(fsdp, rules)
    # Sums over rows and over weight axes are taken in another order: a few float32 roundings, 1e-7 each, of losses
    # near log 128. Dropout is on: its masks do not depend on the devices.
    np.testing.assert_allclose(losses, single[0], rtol=2e-6)
    assert losses[-1] < losses[0]
    # Adam divides a gradient by its own size. Where one is near zero the rounding is all of it, and moves the weight
    # by up to a whole step; elsewhere by 1e-4 of one. So nearly all weights agree far within a step, and no weight
    # is further than the four steps can take it.
    for ours, theirs in zip(jax.tree.leaves(weights), jax.tree.leaves(single[1]), strict=True):
        difference = np.abs(ours - theirs)
        assert np.mean(difference > 1e-5) < 0.01
        assert np.max(difference) < 2 * STEPS * CONFIG.peak_learning_rate
    assert layout.batch(next(batches())).inputs.addressable_shards[0].data.shape == (8 // layout.parts, 16)
    assert compiled.count("step") == 1, "the state comes back as it went in"
    for name, (p_out, p_in) in (("self_attn.q_proj", (32, 32)), ("mlp.down_proj", (32, 48))):
        weight = base["layers"][name]["weight"]
        over_out, over_in = (8 // (8 // fsdp) if axes else 1 for axes in (rules.outputs, rules.inputs))
        assert weight.addressable_shards[0].data.shape == (2, p_out // over_out, p_in // over_in)
    tables = base["embed_tokens"].addressable_shards[0].data.shape
    assert tables == (128 // fsdp, 32 // (8 // fsdp if rules.hidden else 1))
    a = state.params["self_attn.q_proj"]["lora_A"]
    assert a.addressable_shards[0].data.shape == (2, 8 // (fsdp if rules.rank else 1), 32)
    moments = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.shape == a.shape]
    assert moments
    assert all(leaf.sharding.is_equivalent_to(a.sharding, 3) for leaf in moments)


@pytest.mark.slow
def test_each_module_gathers_one_layer_and_keeps_nothing(sharded):
    """Forward and backward, each of 7 weights is gathered inside the scan: [out, in], never all [2, out, in]."""
    layout, (_, _, (function, base, state)), _ = sharded(8, Rules())
    text = function.lower(state, base, layout.batch(next(batches()))).compile().as_text()
    found = re.findall(r"f32\[([\d,]+)\]\S* all-gather\(", text)
    shapes = [",".join(map(str, MODEL.module_shape(name))) for name in MODULES]
    assert sorted(shape for shape in found if shape in shapes) == sorted(2 * shapes)
    assert not [shape for shape in shapes if f"f32[2,{shape}]" in text], "not kept for the backward pass either"
    parts = {f"f32[2,{p_out // 8},{p_in}]" for p_out, p_in in map(MODEL.module_shape, MODULES)}
    orders = {order for part, order in re.findall(r"(f32\[2,\d+,\d+\])(\{[\d,]+\})", text) if part in parts}
    assert orders == {"{2,1,0}"}, "as they lie: in another order a device's part is copied"


@pytest.mark.slow
def test_dora_in_parts_over_devices(params):
    config = dataclasses.replace(CONFIG, method="dora", accumulation=2, dropout=0.0, remat=True)
    layout = Layout(sharding.mesh(fsdp=2, devices=jax.devices()[:4]))
    losses, _, _ = train(params, config, layout)
    np.testing.assert_allclose(losses, train(params, config)[0], rtol=2e-6)


@pytest.mark.slow
def test_validation_loss_on_devices(params):
    adapter = adapters.init(jax.random.key(1), CONFIG.lora(), MODEL, params)
    layout = Layout(sharding.mesh(fsdp=8))
    evaluate = steps.eval_step(adapter, MODEL)
    batch = next(batches())
    expected = evaluate(adapter.params, params, batch)
    found = evaluate(layout.state(adapter.params), layout.params(params), layout.batch(batch))
    np.testing.assert_allclose(found, expected, rtol=2e-6)


def test_shardings_of_abstract_weights_follow_the_rules():
    model = dataclasses.replace(MODEL, vocab_size=129, tie_word_embeddings=True)
    found = Layout(sharding.mesh(fsdp=8)).params_shardings(abstract_params(model, jnp.bfloat16))
    assert found["layers"]["mlp.up_proj"]["weight"].spec == P(None, "fsdp")
    assert found["layers"]["self_attn.q_proj"]["bias"].spec == P(None, "fsdp")
    assert found["layers"]["input_layernorm"].spec == P()
    assert found["embed_tokens"].spec == P(), "129 words do not split in 8: kept whole"
    layers = Layout(sharding.mesh(fsdp=2), Rules(layers=("fsdp",), outputs=()))
    assert layers.params_shardings(abstract_params(model))["norm"].spec == P()
    assert layers.params_shardings(abstract_params(model))["layers"]["input_layernorm"].spec == P("fsdp")


def test_a_run_takes_all_devices(monkeypatch):
    layout, shardings = sharding.layout_over_all_devices(MODEL, CONFIG, fsdp=4)
    assert layout is not None
    assert dict(layout.mesh.shape) == {"data": 2, "fsdp": 4}
    assert jax.tree.leaves(shardings)[0].mesh == layout.mesh
    assert (
        shardings["layers"]["mlp.down_proj"]["weight"].spec
        == layout.params_shardings(abstract_params(MODEL))["layers"]["mlp.down_proj"]["weight"].spec
    )
    monkeypatch.setattr(jax, "devices", lambda: [None])
    assert sharding.layout_over_all_devices(MODEL, CONFIG) == (None, None)


@pytest.mark.slow
def test_an_adapter_that_is_handed_out_lies_where_the_run_s_does(params):
    """In memory of its own."""
    layout = Layout(sharding.mesh(data=2, fsdp=4))
    adapter = adapters.init(jax.random.key(1), CONFIG.lora(), MODEL, params)
    examples = tokenize(tiny.records(8), tiny.ByteEncoder(), cutoff=65, template="clean")
    data = Batches(examples, choose_widths(examples.input_lengths, 1), batch_size=8)
    run = Trainer(layout.params(params), MODEL, adapter, CONFIG, data, None, None, layout=layout)
    own, given = jax.tree.leaves(run._state.params), jax.tree.leaves(run.adapter("last").params)
    for mine, copy in zip(own, given, strict=True):
        assert copy.sharding == mine.sharding
        np.testing.assert_array_equal(copy, mine)
        mine.delete()
        assert not copy.is_deleted()


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (
            lambda: sharding.layout_over_all_devices(MODEL, dataclasses.replace(CONFIG, batch_size=12)),
            "batch_size .*multiple of 8 .*got 12",
        ),
        (lambda: sharding.layout_over_all_devices(MODEL, CONFIG, fsdp=3), "fsdp .*divisor .*8, got 3"),
        (lambda: Rules(inputs=("fsdp",)), "mesh axis 'fsdp' splits both outputs and inputs"),
        (lambda: Rules(batch=("data", "data")), "splits both batch and batch"),
        (lambda: Rules(vocab=("model",)), "vocab .*mesh axis 'model'.*data, fsdp"),
        (lambda: sharding.mesh(fsdp=3), "fsdp .*divisor .*8, got 3"),
        (lambda: sharding.mesh(data=3, fsdp=4), "data must be 2 with fsdp 4.*got 3"),
        (
            lambda: Layout(sharding.mesh()).batch(next(batches(rows=12))),
            "batch_size .*multiple of 8 .*got 12",
        ),
        (lambda: Layout(sharding.mesh()).check_batch(24, 2), "batch_size .*8 .*times 2 .*got 24"),
    ],
)
def test_refused_by_name(make, match):
    with pytest.raises(InputError, match=match):
        make()
