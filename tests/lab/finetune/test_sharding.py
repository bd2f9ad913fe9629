"""Eight devices, each with an eighth of the base weights, take the steps of one device."""

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
from support import tiny, training

from rora_theory.errors import InputError
from rora_theory.lab import adapters
from rora_theory.lab.finetune import Batches, FinetuneConfig, Trainer, choose_widths, sharding, tokenize
from rora_theory.lab.finetune.memory import StepMemory
from rora_theory.lab.finetune.sharding import Layout, Rules
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


@pytest.fixture(scope="module")
def sharded(params):
    """Return ``sharded(fsdp, rules)``: layout, result of `train`, and the functions compiled; each is trained once."""

    @functools.cache
    def make(fsdp, rules):
        layout = Layout(sharding.mesh(fsdp=fsdp), rules)
        with count_compilations() as compiled:
            return layout, training.train(params, MODEL, CONFIG, BATCHES, layout), compiled

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
    layout, trained, compiled = sharded(fsdp, rules)
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
    assert layout.batch(BATCHES[0]).inputs.addressable_shards[0].data.shape == (8 // layout.parts, 16)
    assert compiled.count("step") == 1, "the new state has the shardings of the old one"
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
    """Forward and backward pass gather each of 7 weights inside the scan: [out, in], never all [2, out, in]."""
    layout, trained, _ = sharded(8, Rules())
    text = trained.step.lower(trained.state, trained.base, layout.batch(BATCHES[0])).compile().as_text()
    gathered = re.findall(r"f32\[([\d,]+)\]\S* all-gather\(", text)
    shapes = [",".join(map(str, MODEL.module_shape(name))) for name in MODULES]
    assert sorted(shape for shape in gathered if shape in shapes) == sorted(2 * shapes)
    assert not [shape for shape in shapes if f"f32[2,{shape}]" in text], "not kept for the backward pass either"
    parts = {f"f32[2,{p_out // 8},{p_in}]" for p_out, p_in in map(MODEL.module_shape, MODULES)}
    orders = {order for part, order in re.findall(r"(f32\[2,\d+,\d+\])(\{[\d,]+\})", text) if part in parts}
    assert orders == {"{2,1,0}"}, "row-major: any other layout copies a part"


@pytest.mark.slow
def test_dora_in_parts_over_devices(params):
    config = dataclasses.replace(CONFIG, method="dora", accumulation=2, dropout=0.0, remat=True)
    layout = Layout(sharding.mesh(fsdp=2, devices=jax.devices()[:4]))
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
    for fsdp in (2, 4):
        memory = compiled_memory(model, config, fsdp)
        assert memory.arguments == pytest.approx(weights / fsdp + 3 * 4 * trainable, rel=0.01)
        assert memory.temporaries < 2.5 * layer


def compiled_memory(model, config, fsdp):
    layout = Layout(sharding.mesh(fsdp=fsdp, devices=jax.devices()[:fsdp]))
    return StepMemory.from_compiled(training.lower(model, config, 8, layout).compile())


@pytest.mark.slow
def test_no_device_gathers_the_unembedding_for_a_block_of_the_loss():
    """Four devices share a vocabulary of four blocks: consecutive rows in a block would gather all rows."""
    model = LlamaConfig(4 * 8192, 64, 128, 1, 4, 4, 16, max_position_embeddings=128)
    memory = compiled_memory(model, FinetuneConfig(rank=8, batch_size=4, dropout=0.0), 4)
    assert memory.temporaries < 4 * model.vocab_size * model.hidden_size / 2


def test_shardings_of_abstract_weights_follow_the_rules():
    model = dataclasses.replace(MODEL, vocab_size=129, tie_word_embeddings=True)
    shardings = Layout(sharding.mesh(fsdp=8)).params_shardings(abstract_params(model, jnp.bfloat16))
    assert shardings["layers"]["mlp.up_proj"]["weight"].spec == P(None, "fsdp")
    assert shardings["layers"]["self_attn.q_proj"]["bias"].spec == P(None, "fsdp")
    assert shardings["layers"]["input_layernorm"].spec == P()
    assert shardings["embed_tokens"].spec == P(), "129 is not divisible by 8: not split"
    by_layers = Layout(sharding.mesh(fsdp=2), Rules(layers=("fsdp",), outputs=())).params_shardings(
        abstract_params(model)
    )
    assert by_layers["norm"].spec == P()
    assert by_layers["layers"]["input_layernorm"].spec == P("fsdp")


def test_a_run_takes_all_devices():
    layout, shardings = sharding.layout_over_all_devices(MODEL, CONFIG, fsdp=4)
    assert layout is not None
    assert dict(layout.mesh.shape) == {"data": 2, "fsdp": 4}
    assert shardings == layout.params_shardings(abstract_params(MODEL))


@pytest.mark.slow
def test_an_adapter_that_is_handed_out_lies_where_the_run_s_does(params):
    """The adapter also has memory of its own."""
    layout = Layout(sharding.mesh(data=2, fsdp=4))
    adapter = adapters.init(jax.random.key(1), CONFIG.lora(), MODEL, params)
    examples = tokenize(tiny.records(8), tiny.ByteEncoder(), cutoff=65, template="clean")
    data = Batches(examples, choose_widths(examples.input_lengths, 1), batch_size=8)
    run = Trainer(layout.params(params), MODEL, adapter, CONFIG, data, None, None, layout=layout)
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
        (lambda: sharding.layout_over_all_devices(MODEL, CONFIG, fsdp=3), "fsdp .*divisor .*8, got 3"),
        (lambda: Rules(inputs=("fsdp",)), "mesh axis 'fsdp' splits both outputs and inputs"),
        (lambda: Rules(batch=("data", "data")), "splits both batch and batch"),
        (lambda: Rules(vocab=("model",)), "vocab .*mesh axis 'model'.*data, fsdp"),
        (lambda: sharding.mesh(data=3, fsdp=4), "data .* 2 with fsdp 4.*got 3"),
        (lambda: Layout(sharding.mesh()).batch(training.batch(12)), "batch_size .*multiple of 8 .*got 12"),
        (lambda: Layout(sharding.mesh()).check_batch(24, 2), "batch_size .*8 .*times 2 .*got 24"),
    ],
)
def test_refused_by_name(make, match):
    with pytest.raises(InputError, match=match):
        make()


def test_one_device_has_no_layout_and_cannot_share_weights(monkeypatch):
    first = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: first)
    assert sharding.layout_over_all_devices(MODEL, CONFIG) == (None, None)
    with pytest.raises(InputError, match=r"fsdp .*divisor .*1, got 2"):
        sharding.layout_over_all_devices(MODEL, CONFIG, fsdp=2)
