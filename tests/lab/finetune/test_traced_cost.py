"""The cost of a traced program: products counted by hand, and memory against XLA's own account."""

import jax
import jax.numpy as jnp
import pytest
from support.tiny import WIDE

from rora_theory.lab.finetune import FinetuneConfig, capacity, traced_cost
from rora_theory.lab.llama import LlamaConfig

ROWS, WIDTH, RANK = 4, 16, 2


def config(**changes):
    return FinetuneConfig(**{"rank": RANK, "alpha": 4, "batch_size": ROWS, "dropout": 0.0} | changes)


def by_hand(*, remat=False):
    """Return the number of operations of one step's products."""
    tokens, width, inner, layers, words = ROWS * WIDTH, 32, 96, 2, 700
    shapes = {name: WIDE.module_shape(name) for name in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
        "mlp.down_proj",
    )}  # fmt: skip
    adapted = [shape for name, shape in shapes.items() if "o_proj" not in name and "gate" not in name]
    base = sum(2 * tokens * p_out * p_in for p_out, p_in in shapes.values())
    low_rank = sum(2 * tokens * RANK * (p_out + p_in) for p_out, p_in in adapted)
    attention = 2 * ROWS * 4 * WIDTH * WIDTH * 8  # one product of heads, q k' or p v
    forward = base + low_rank + 2 * attention
    # Backward: the input's gradient through W; input's and weights' through A and B; scores again, dp, dq, dk, dv.
    backward = base + 2 * low_rank + 5 * attention
    again = 0
    if remat:
        # The layer again, but for the last products, which nothing in the layer reads.
        again = forward - 2 * tokens * width * inner - 2 * tokens * RANK * width
    head = 2 * tokens * words * width  # logits, and the hidden states' gradient
    target_logits = 2 * tokens * width
    return layers * (forward + backward + again) + 2 * head + target_logits


@pytest.mark.parametrize("changes", [{}, {"accumulation": 2}, {"dropout": 0.1}])
def test_products_of_a_step_are_those_counted_by_hand(changes):
    remade = capacity.estimate_step(WIDE, config(remat=True, **changes), WIDTH)
    assert remade.flops == by_hand(remat=True)
    # Without rematerialisation, the model decides which products the backward pass repeats: between none and all.
    plain = capacity.estimate_step(WIDE, config(**changes), WIDTH)
    assert by_hand() <= plain.flops < remade.flops


def test_a_loop_counts_as_often_as_it_runs():
    def loop(x, w):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=10)[0]

    x, w = jax.ShapeDtypeStruct((8, 16), jnp.float32), jax.ShapeDtypeStruct((16, 16), jnp.float32)
    once = 2 * 8 * 16 * 16
    assert traced_cost.flops(jax.make_jaxpr(loop)(x, w)) == 10 * once


def test_products_with_batches_calls_and_branches():
    a, b = jnp.ones((3, 4, 5)), jnp.ones((3, 5, 6))
    assert traced_cost.flops(jax.make_jaxpr(lambda a, b: jax.jit(jnp.matmul)(a, b))(a, b)) == 2 * 3 * 4 * 5 * 6
    gradient = jax.make_jaxpr(jax.grad(lambda a, b: jnp.sum(jax.checkpoint(jnp.matmul)(a, b)), argnums=(0, 1)))
    assert traced_cost.flops(gradient(a, b)) in (2 * 2 * 3 * 4 * 5 * 6, 3 * 2 * 3 * 4 * 5 * 6)
    with pytest.raises(ValueError, match="loop of unknown length"):
        traced_cost.flops(
            jax.make_jaxpr(lambda x: jax.lax.while_loop(lambda x: jnp.max(x) < 9, lambda x: x @ x, x))(jnp.ones((2, 2)))
        )


def test_memory_of_small_programs():
    x, w = jnp.ones((64, 128)), jnp.ones((128, 128))
    size = 64 * 128 * 4

    def chain(x, w):
        for _ in range(5):
            x = jnp.tanh(x @ w) + 1
        return jnp.sum(x)

    # The fused elementwise operations reuse the memory of a product; the next product needs its input and its result.
    assert traced_cost.peak_memory(jax.make_jaxpr(chain)(x, w)).total == 2 * size

    def fused(x, w):
        y = x @ w
        return jnp.sum(jnp.tanh(y) * jnp.sin(y) + jnp.cos(y))

    assert traced_cost.peak_memory(jax.make_jaxpr(fused)(x, w)).total == size

    def layers(x, w):
        return jnp.sum(jax.lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, w)[0])

    stack = jnp.ones((7, 128, 128))
    memory = traced_cost.peak_memory(jax.make_jaxpr(jax.value_and_grad(layers, argnums=1))(x, stack))
    # Of each layer sin's derivative and the product's input are kept; the gradient has the weights' shape.
    assert memory.saved == 7 * 2 * size
    dead = traced_cost.peak_memory(
        jax.make_jaxpr(lambda x, w: (jax.lax.scan(lambda x, w: (x @ w, x @ w), x, w)[0],))(x, stack)
    )
    assert dead.stacked == 0, "an unused result is not kept"
    assert dead.total == size, "nor computed: only the carry has a next value"


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"dropout": 0.05, "method": "dora"}, {"remat": True}])
def test_memory_of_a_step_agrees_with_xla(changes):
    """The reference is XLA's buffers of the step in float32, where its CPU compiler makes no wider copies."""
    run = config(rank=8, batch_size=8, **changes)
    models = [LlamaConfig(128, 128, 384, layers, 4, 2, 32) for layers in (4, 16)]
    accounts = [capacity.estimate_step(model, run, 128) for model in models]
    programs = [capacity.analyse_compiled_step(model, run, 128) for model in models]
    for account, xla in zip(accounts, programs, strict=True):
        assert xla.arguments == account.base + account.adapter + account.optimizer + account.batch
    # What a layer adds is saved for the backward pass and leaves the compiler no choice; it aligns arrays to 64 bytes.
    few, many = (account.total - xla.arguments for account, xla in zip(accounts, programs, strict=True))
    assert many - few == pytest.approx(programs[1].temporaries - programs[0].temporaries, rel=0.02)
    # The working set is that of one layer, whatever their number. The compiler decides what to fuse, and fuses less on
    # a CPU than assumed here.
    constant = programs[1].temporaries - (accounts[1].activations + accounts[1].gradients)
    assert accounts[1].working <= constant < 2.5 * accounts[1].working
