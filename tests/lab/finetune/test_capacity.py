"""Shapes of published models, the items of a memory account, devices, and what fits on them."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from support.tiny import LARGE, WIDE

from rora_theory.errors import InputError
from rora_theory.lab import adapters
from rora_theory.lab.finetune import FinetuneConfig, capacity, sharding
from rora_theory.lab.finetune.capacity import DEVICES, MODELS, Device, StepEstimate
from rora_theory.lab.finetune.sharding import Layout
from rora_theory.lab.llama import LlamaConfig, abstract_params, init_params
from rora_theory.lab.llama.model import count_parameters

SMALL = FinetuneConfig(rank=4, batch_size=4, dropout=0.0)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama-7b", 6_738_415_616),
        ("llama-13b", 13_015_864_320),
        ("llama2-7b", 6_738_415_616),
        ("llama2-70b", 68_976_648_192),
        ("llama3-8b", 8_030_261_248),
        ("sheared-llama-1.3b", 1_345_423_360),
        ("mistral-7b", 7_241_732_096),
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen3-8b", 8_190_735_360),
        ("gemma3-270m", 268_098_176),
        ("smollm2-135m", 134_515_008),
    ],
)
def test_named_models_have_their_published_sizes(name, parameters):
    assert count_parameters(MODELS[name]) == parameters


@pytest.mark.parametrize(
    ("model", "method", "changes", "percent"),
    [
        # The papers' tables: LoRA on q, k, v, up and down; parallel as LLM-Adapters' protocol says.
        ("llama-7b", "lora", {}, 0.83),
        ("llama-13b", "lora", {}, 0.67),
        ("llama3-8b", "lora", {}, 0.70),
        ("llama-7b", "dora", {}, 0.84),
        ("llama-13b", "prefix", {}, 0.03),
        ("llama-7b", "parallel", {}, 3.54),
        ("llama-13b", "parallel", {}, 2.89),
        # Series as one adapter a layer, as the tables count it, and as LLM-Adapters trains it.
        ("llama-7b", "series", {"targets": ("down_proj",)}, 0.99),
        ("llama-13b", "series", {"targets": ("down_proj",)}, 0.80),
        ("llama-7b", "series", {}, 1.95),
        ("llama-13b", "series", {}, 1.59),
    ],
)
def test_adapters_have_the_papers_share_of_the_weights(model, method, changes, percent):
    adapter = capacity.abstract_adapter(MODELS[model], FinetuneConfig(method=method, **changes))
    assert round(100 * adapters.share(adapter, abstract_params(MODELS[model])), 2) == percent


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        dataclasses.replace(SMALL, method="dora", dtype="bfloat16"),
        dataclasses.replace(SMALL, accumulation=2, remat=True),
        *(FinetuneConfig(method=method, batch_size=4) for method in ("prefix", "series", "parallel", "full")),
    ],
)
def test_parts_are_the_real_arrays_and_sum_up(config):
    account = capacity.estimate_step(WIDE, config, 16)
    params = init_params(jax.random.key(0), WIDE, jnp.dtype(config.dtype))
    adapter = adapters.init(jax.random.key(1), config.adapter(), WIDE, params)
    moments = 2 * sum(a.nbytes for a in jax.tree.leaves(adapter.params))
    assert account.base == sum(a.nbytes for a in jax.tree.leaves(params))
    assert account.adapter == moments // 2 == 4 * account.trainable == 4 * adapters.count(adapter)
    assert account.optimizer - moments in range(8, 33), "in addition to the moments: counters and the dropout key"
    assert account.batch == 3 * 4 * 4 * 16
    assert account.tokens == 4 * 16
    assert account.parameters == sum(a.size for a in jax.tree.leaves(params))
    assert account.total == sum(account.parts().values())
    assert account.logits == 4 * 700 * 4 * 16 // config.accumulation
    assert min(account.activations, account.working) > 0
    assert account.flops > 2 * account.tokens * sum(a.size for a in jax.tree.leaves(params["layers"]))


@pytest.mark.slow
def test_options_that_reduce_memory():
    plain, parts, again = (
        capacity.estimate_step(WIDE, dataclasses.replace(SMALL, **changes), 32)
        for changes in ({}, {"accumulation": 4}, {"remat": True})
    )
    assert again.activations == 2 * 4 * 32 * 32 * 4, "of each layer the input: [4, 32, 32] float32"
    assert plain.activations > 2 * again.activations
    assert parts.activations == plain.activations // 4
    assert parts.flops == plain.flops < again.flops
    assert (plain.passes, parts.passes, again.passes) == (2, 8, 3)


def account_of(base, flops=1):
    """Return an account of a step with some bytes of weights and nothing else."""
    return StepEstimate(1, 1, 100, flops, 2, base, 0, 0, 0, 0, 0, 0, 0)


def test_the_memory_limit_of_a_device():
    a6000 = DEVICES["a6000"]
    assert account_of(40 * 10**9).fits(a6000)
    assert account_of(40 * 10**9).memory_fraction(a6000) == 0.79
    assert account_of(38 * 10**9).memory_fraction(a6000) is None
    limit = account_of(a6000.memory - capacity.RESERVE)
    assert limit.fits(a6000)
    assert not dataclasses.replace(limit, working=1).fits(a6000)
    assert not account_of(40 * 10**9).fits(DEVICES["rtx4090"])


def test_time_is_the_larger_of_computing_and_reading_the_weights():
    step = account_of(1, int(154.8e12))
    a6000 = DEVICES["a6000"]
    assert step.seconds(a6000, "bfloat16", 0.5) == pytest.approx(2)
    assert step.seconds(a6000, "float32", 0.5) == pytest.approx(4)
    assert account_of(768 * 10**10, step.flops).seconds(a6000, "bfloat16", 1.0) == pytest.approx(20)
    for wrong in (0.0, -1.0, 1.5, float("nan")):
        with pytest.raises(InputError, match="utilisation"):
            step.seconds(a6000, "bfloat16", wrong)


def test_a_custom_device():
    step = account_of(20 * 10**9, int(50e12))
    device = Device.from_specification(24e9, 100e12)
    assert step.fits(device)
    assert not account_of(24 * 10**9).fits(device)
    assert step.seconds(device, "bfloat16", 0.5) == step.seconds(device, "float32", 0.5) == pytest.approx(1)
    slow_memory = Device.from_specification(24e9, 100e12, 1e10)
    assert step.seconds(slow_memory, "bfloat16", 0.5) == pytest.approx(4), "reading the weights"
    for figures, name in (((0.9e9, 1e12), "memory"), ((24e9, 0.0), "rate"), ((24e9, 1e12, -1.0), "bandwidth")):
        with pytest.raises(InputError, match=name):
            Device.from_specification(*figures)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "device", "planned"),
    [("llama-13b", "rtx4090", "17.2 GB of the 24.8"), ("llama2-70b", "h100", "67.0 GB of the 84.5")],
)
def test_models_that_fit_with_four_bit_weights(name, device, planned):
    """The planned total is checked too, as the pages print it."""
    config = FinetuneConfig(rank=128, batch_size=16, dtype="bfloat16", remat=True, quantization="q4_0")
    account, card = capacity.estimate_step(MODELS[name], config, 256), DEVICES[device]
    assert account.fits(card)
    assert 2 * account.parameters > card.memory
    assert planned == f"{account.total / 1e9:.1f} GB of the {(card.memory - capacity.RESERVE) / 1e9:.1f}"


def layout(data, fsdp):
    return None if data * fsdp == 1 else Layout(sharding.mesh(data, fsdp, devices=jax.devices()[: data * fsdp]))


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [1, 4])
def test_no_copy_is_made_of_the_weights(fsdp):
    """With few tokens weights are nearly all of the memory: no stack of layers is copied, and no table gathered."""
    model = LlamaConfig(8192, 256, 768, 8, 4, 4, 64, max_position_embeddings=128)
    config = FinetuneConfig(rank=8, batch_size=4, dropout=0.0)
    planned, xla = (
        make(model, config, 8, layout(1, fsdp)) for make in (capacity.estimate_step, capacity.analyse_compiled_step)
    )
    assert planned.base * fsdp == pytest.approx(44.1e6, rel=0.01)
    # A table copied would add a sixth to the total, a stack of layers more.
    assert xla.total == pytest.approx(planned.total, rel=0.1)


@pytest.mark.slow
def test_no_device_gathers_the_unembedding_for_a_block_of_the_loss():
    """Four devices share a vocabulary of four blocks: consecutive rows in a block would gather all rows."""
    model = LlamaConfig(4 * 8192, 64, 128, 1, 4, 4, 16, max_position_embeddings=128)
    xla = capacity.analyse_compiled_step(model, FinetuneConfig(rank=8, batch_size=4, dropout=0.0), 8, layout(1, 4))
    table = 4 * model.vocab_size * model.hidden_size
    assert xla.temporaries < table / 2


@pytest.mark.slow
def test_arrays_are_split_over_several_devices(monkeypatch):
    """Each device has half of the rows, half of the weights where two share a copy, and a copy of the rest."""
    monkeypatch.setattr(capacity, "LOGITS_BYTES", 4 * 700 * 4 * 8)  # 8 of 32 positions at once, on all devices together
    alone, copies, shared = (
        capacity.estimate_step(WIDE, SMALL, 32, abstract(*shape)) for shape in ((1, 1), (2, 1), (1, 2))
    )
    for account in (copies, shared):
        assert (account.devices, alone.devices) == (2, 1)
        assert account.tokens == alone.tokens
        for part in ("flops", "activations", "batch", "logits"):
            assert 2 * getattr(account, part) == getattr(alone, part), part
        assert (account.adapter, account.optimizer) == (alone.adapter, alone.optimizer)
        assert (account.parameters, account.trainable) == (alone.parameters, alone.trainable)
    assert (copies.base, copies.gathered) == (alone.base, 0)
    norms = 4 * 32 * 5
    assert shared.base == (alone.base - norms) // 2 + norms, "the norms of two layers and the last are whole"
    assert shared.gathered == 4 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 96 * 32), "one of the two layers"
    assert alone.gathered == 0
    odd = dataclasses.replace(WIDE, vocab_size=699)
    table = {part.name: part for part in capacity.placement(odd, SMALL, abstract(1, 2))}
    assert (table["embeddings"].ways, table["weights of modules"].ways, table["norms"].ways) == (1, 2, 1)
    assert table["embeddings"].bytes_per_device == table["embeddings"].bytes_whole == 4 * 699 * 32
    base = capacity.estimate_step(odd, SMALL, 32, abstract(1, 2)).base
    assert sum(part.bytes_per_device for part in table.values()) == base


def abstract(data, fsdp):
    return None if (data, fsdp) == (1, 1) else Layout(sharding.abstract_mesh(data, fsdp))


def test_a_plan_does_not_depend_on_the_machine_it_is_made_on(monkeypatch):
    """A fused kernel is no product of the program, so a plan made on a GPU would miss attention's products."""
    config = dataclasses.replace(SMALL, dtype="bfloat16")
    expected = capacity.estimate_step(WIDE, config, 16)
    monkeypatch.setattr("rora_theory.lab.llama.attention._has_fused_kernel", lambda: True)
    assert capacity.estimate_step(WIDE, config, 16) == expected


@pytest.mark.parametrize(
    ("config", "width", "devices", "match"),
    [
        (FinetuneConfig(rank=33), 16, (1, 1), "rank"),
        (SMALL, 0, (1, 1), "width .*got 0"),
        (SMALL, 513, (1, 1), "sequence length.*513"),
        (SMALL, 16, (3, 1), "batch_size .*3 .*got 4"),
        (SMALL, 16, (1, 0), "fsdp .*0"),
    ],
)
def test_refused_by_name(config, width, devices, match):
    with pytest.raises(InputError, match=match):
        capacity.estimate_step(WIDE, config, width, abstract(*devices))


@pytest.mark.slow
@pytest.mark.usefixtures("optimised")  # to the module's end: the other tests' programs need it not
@pytest.mark.parametrize(("data", "fsdp"), [(1, 1), (2, 2)])
def test_a_step_takes_the_memory_that_was_planned(data, fsdp, monkeypatch):
    """Memory is measured on 1 and 4 devices, each with its own rows and its own part of the weights."""

    def constants(_, *arguments):
        """Return constant weights, with a different number in each array, which share no memory."""
        leaves, structure = jax.tree.flatten(abstract_params(*arguments))
        return jax.tree.unflatten(structure, [jnp.full(a.shape, 0.01 * i, a.dtype) for i, a in enumerate(leaves, 1)])

    monkeypatch.setattr(capacity, "init_params", constants)
    devices, place = data * fsdp, layout(data, fsdp)
    config = FinetuneConfig(rank=8, batch_size=24)
    planned = capacity.estimate_step(LARGE, config, 128, place)
    measured = capacity.measure_step(LARGE, config, 128, place)
    xla = measured.program
    assert planned.devices == devices
    assert xla.arguments == planned.base + planned.adapter + planned.optimizer + planned.batch
    predicted = xla.total  # `test_traced_cost` compares XLA's account with this package's
    assert predicted * devices > 300e6
    # A first step also brings in code, threads' stacks and packed operands, some 60 MB, shared by the devices.
    assert 0.95 * predicted < measured.peak < 1.05 * predicted + 80e6 / devices
    # On a CPU less of a layer's elementwise work is fused than is taken here.
    assert planned.total < predicted < planned.on_cpu("float32")
    assert planned.total < measured.peak < 1.6 * planned.total
    assert measured.seconds > 0
