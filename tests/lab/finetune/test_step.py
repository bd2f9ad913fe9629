"""One step is AdamW on the adapter's exact gradient, for any padding, number of parts and shape."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny, training

from rora_theory.lab import llama
from rora_theory.lab.data.batches import Batch
from rora_theory.lab.finetune import Batches, FinetuneConfig, choose_widths, tokenize
from rora_theory.lab.finetune import step as steps
from rora_theory.lab.llama import attention

STEPS = 10
TARGETS = ("q_proj", "down_proj")
PLAIN = FinetuneConfig(rank=2, alpha=4, targets=TARGETS, batch_size=4, dropout=0.0, warmup=2, clip=0.05)
FULL = FinetuneConfig(method="full", targets=TARGETS, batch_size=4, dropout=0.0, warmup=2, clip=0.05)


def batch(rows=4, width=24, seed=0):
    return training.batch(rows, width, seed)


def adapter(params, config):
    """Return an adapter with a non-zero lora_B, so that no gradient is zero."""
    return training.start(params, tiny.CONFIG, config, noise=0.1)


def train_steps(params, config, batches, adapted=None):
    """Return the weights and metrics of steps on ``batches``."""
    adapted = adapter(params, config) if adapted is None else adapted
    trained = training.train(params, tiny.CONFIG, config, batches, adapter=adapted, schedule=STEPS)
    return list(zip(trained.weights, trained.metrics, strict=True))


@jax.jit
def direct_loss(params, adapted, inputs, targets, weights):
    """Return the mean cross-entropy from the model's own logits."""
    log_probabilities = jax.nn.log_softmax(llama.forward(params, inputs, tiny.CONFIG, adapted), axis=-1)
    picked = jnp.take_along_axis(log_probabilities, targets[..., None], axis=-1)[..., 0]
    return -jnp.sum(weights * picked) / jnp.sum(weights)


def changed(**values):
    return dataclasses.replace(PLAIN, **values)


def test_schedules():
    """Linear and cosine schedules decay to zero after the last step and have the published peaks."""
    linear = steps.schedule(FinetuneConfig(warmup=3, lr=0.5), 10)
    expected = [0.5 * min(t / 3, (10 - t) / 7) for t in range(10)]
    np.testing.assert_allclose([float(linear(t)) for t in range(10)], expected, rtol=1e-6, atol=1e-8)
    cosine = steps.schedule(FinetuneConfig(warmup=2, lr=0.5, schedule="cosine"), 10)
    decay = [0.25 * (1 + np.cos(np.pi * share)) for share in np.arange(9) / 8]
    np.testing.assert_allclose([float(cosine(t)) for t in range(11)], [0.0, 0.25, *decay], atol=1e-7)
    assert float(steps.schedule(FinetuneConfig(warmup=0, lr=0.5), 10)(0)) == 0.5
    assert float(steps.schedule(FinetuneConfig(method="dora"), 1000)(100)) == pytest.approx(2e-4)
    assert float(steps.schedule(FinetuneConfig(), 1000)(100)) == pytest.approx(3e-4)


def test_lr_multiplier_scales_the_update_of_lora_A_alone(params):
    updates = {}
    for factor in (1.0, 8.0):
        config = changed(lr_multiplier_A=factor, weight_decay=0.1, warmup=0)
        start = adapter(params, config)
        ((trained, _),) = train_steps(params, config, [batch()], start)
        updates[factor] = jax.tree.map(lambda new, old: new - np.asarray(old), trained, start.params)
    for module, tensors in updates[8.0].items():
        for name, factor in (("lora_A", 8.0), ("lora_B", 1.0)):
            np.testing.assert_allclose(tensors[name], factor * updates[1.0][module][name], rtol=2e-3, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("plain", [PLAIN, FULL], ids=["lora", "full"])
def test_steps_are_adamw_on_the_clipped_gradient(params, plain):
    """The reference for full fine-tuning is the plain model with the trained weights in place."""
    config = dataclasses.replace(plain, lr=0.01, weight_decay=0.1, betas=(0.8, 0.9))
    start, data = adapter(params, config), [batch(seed=s) for s in range(4)]
    trained = train_steps(params, config, data, start)

    def loss_of(weights, item):
        adapted = start.replace(weights)
        if plain is FULL:
            return direct_loss(adapted.merge(params), None, *item[:3])
        return direct_loss(params, adapted, *item[:3])

    gradient = jax.jit(jax.value_and_grad(loss_of))
    # AdamW as torch writes it, in float64 from the float32 gradients.
    weights = jax.tree.map(lambda a: np.asarray(a, np.float64), start.params)
    first = second = jax.tree.map(np.zeros_like, weights)
    for t, (item, (after, metrics)) in enumerate(zip(data, trained, strict=True)):
        loss, g = gradient(jax.tree.map(jnp.float32, weights), item)
        norm = np.sqrt(sum(np.sum(np.square(a, dtype=np.float64)) for a in jax.tree.leaves(g)))
        g = jax.tree.map(lambda a, norm=norm: np.asarray(a, np.float64) * min(1, 0.05 / norm), g)
        first = jax.tree.map(lambda m, a: 0.8 * m + 0.2 * a, first, g)
        second = jax.tree.map(lambda v, a: 0.9 * v + 0.1 * a**2, second, g)
        rate = 0.01 * min(t / 2, (STEPS - t) / 8)

        def update(w, m, v, rate=rate, t=t):
            adam = (m / (1 - 0.8 ** (t + 1))) / (np.sqrt(v / (1 - 0.9 ** (t + 1))) + 1e-8)
            return w - rate * (adam + 0.1 * w)

        weights = jax.tree.map(update, weights, first, second)
        assert metrics.loss == pytest.approx(float(loss), rel=1e-5)
        assert metrics.grad_norm == pytest.approx(norm, rel=1e-4)
        assert metrics.learning_rate == pytest.approx(rate, rel=1e-5)
        assert metrics.targets == np.sum(item.weights)
        # Adam divides by the gradient's own size: a relative error of 1e-4 in it moves a weight by 1e-4 rates, and one
        # whose gradient is float32's rounding by up to a rate.
        for ours, expected in zip(jax.tree.leaves(after), jax.tree.leaves(weights), strict=True):
            errors = np.abs(ours - expected)
            assert np.quantile(errors, 0.99 if plain is FULL else 1) < 1e-5
            assert errors.max() < config.lr
    assert trained[0][1].grad_norm > config.clip, "the gradient is clipped"


@pytest.mark.slow
def test_microbatches_give_the_same_step(params):
    data = [batch(seed=s) for s in range(3)]
    together, parts = (train_steps(params, config, data) for config in (PLAIN, changed(accumulation=2)))
    for (weights, metrics), (other_weights, other) in zip(together, parts, strict=True):
        np.testing.assert_allclose(other, metrics, rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), other_weights, weights)


@pytest.mark.slow
def test_padding_and_empty_rows_change_nothing(params):
    short = batch(rows=3)
    padded = Batch(*(np.pad(a, ((0, 1), (0, 8))) for a in short[:3]), None)
    adapted = adapter(params, PLAIN)
    evaluate = steps.eval_step(adapted, tiny.CONFIG)
    loss, count = evaluate(adapted.params, params, short)
    other, other_count = evaluate(adapted.params, params, padded)
    assert count == other_count == np.sum(short.weights)
    assert float(loss / count) == pytest.approx(float(direct_loss(params, adapted, *short[:3])), rel=1e-5)
    # No target attends to the padding, so its token ids do not matter.
    filled = padded._replace(inputs=np.where(padded.weights == 0, 9, padded.inputs))
    assert float(evaluate(adapted.params, params, filled)[0]) == pytest.approx(float(other), rel=1e-6)
    assert float(other) == pytest.approx(float(loss), rel=1e-5)


@pytest.mark.slow
def test_loss_on_the_answer_is_the_loss_at_its_positions(params):
    records = tiny.records(8)
    few = tokenize(records, tiny.ByteEncoder(), template="clean", answer_only=True)
    widths = choose_widths(few.input_lengths, 1)
    item = Batches(few, widths, batch_size=8, answer_only=True)[0]
    full = Batches(few, widths, batch_size=8)[0]
    adapted = adapter(params, PLAIN)
    loss, count = steps.eval_step(adapted, tiny.CONFIG)(adapted.params, params, item)
    assert item.targets.shape[1] < full.targets.shape[1]
    assert count == 8 * len("answer0\0")
    assert np.sum(full.weights) == count, "the examples say where their answers begin"
    assert float(loss / count) == pytest.approx(float(direct_loss(params, adapted, *full[:3])), rel=1e-5)


@pytest.mark.slow
def test_dropout_draws_a_mask_for_each_step_and_part(params):
    """The same batch has another loss at the next step, and a record has another loss in the second part."""
    config = changed(dropout=0.3, warmup=0, lr=1e-30)
    losses = [metrics.loss for _, metrics in train_steps(params, config, [batch()] * 2)]
    assert losses[0] != losses[1]
    still = float(direct_loss(params, adapter(params, config), *batch()[:3]))
    assert min(abs(loss - still) for loss in losses) > 1e-4 * still, "a mask at every step"
    record = batch(rows=1)
    in_first, in_second = (Batch(*(np.pad(a, (rows, (0, 0))) for a in record[:3]), None) for rows in ((0, 1), (1, 0)))
    config = dataclasses.replace(config, accumulation=2)
    losses = [train_steps(params, config, [item])[0][1].loss for item in (in_first, in_second)]
    assert losses[0] != pytest.approx(losses[1], rel=1e-5)


def take_shared(shared, params, config, batches, adapted):
    """Return weights and metrics as `run` does, from steps that are compiled for several runs."""
    function = shared.train_step(adapted, tiny.CONFIG, config, STEPS)
    state = steps.init_state(adapted, steps.finetune_optimizer(config, STEPS), jax.random.key(3))
    results = []
    for item in batches:
        state, metrics = function(state, params, item)
        results.append((jax.tree.map(np.asarray, state.params), jax.tree.map(float, metrics)))
    return results


@pytest.mark.slow
def test_shared_steps_equal_those_compiled_for_each_run(params):
    """One step is compiled for runs of other rules, alphas and rates, and equals each run's own step."""
    shared, data = steps.SharedSteps(), [batch(seed=s) for s in range(2)]
    ends = []
    for changes in ({}, {"lr": 0.03}, {"alpha": 9.0, "rule": "lora"}):
        config = changed(**{"warmup": 1, "lr": 0.01} | changes)
        adapted = adapter(params, config)
        results = take_shared(shared, params, config, data, adapted)
        for (weights, metrics), (expected, known) in zip(
            results, train_steps(params, config, data, adapted), strict=True
        ):
            np.testing.assert_allclose(metrics, known, rtol=1e-5)
            # A weight moves by the rate; programs that differ in what is constant round differently.
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), weights, expected)
        ends.append(np.concatenate([np.ravel(a) for a in jax.tree.leaves(weights)]))
    assert shared.compilations == 1
    assert min(np.abs(a - b).max() for a, b in itertools.combinations(ends, 2)) > 1e-4


@pytest.mark.slow
def test_shared_steps_depend_on_the_adapter(params):
    """The step applies the adapter's own dropout, rule and alpha, without another program."""
    config, shared, losses = changed(dropout=0.3, lr=1e-30), steps.SharedSteps(), []
    for changes in ({}, {"dropout": 0.0}, {"dropout": 0.0, "rule": "lora"}):
        adapted = adapter(params, dataclasses.replace(config, **changes))
        losses += [metrics.loss for _, metrics in take_shared(shared, params, config, [batch()], adapted)]
        if changes:
            assert losses[-1] == pytest.approx(float(direct_loss(params, adapted, *batch()[:3])), rel=1e-5)
    assert len(set(losses)) == 3
    assert shared.compilations == 2


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"method": "dora", "dropout": 0.05, "remat": True, "accumulation": 2}])
def test_the_whole_step_lowers_for_cuda(changes, monkeypatch):
    """The program for an NVIDIA GPU is made from abstract shapes, without a GPU.

    It has a bfloat16 base, fused attention both ways and products in bfloat16, and it reuses the state's memory.
    """
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(attention, "_has_fused_kernel", lambda: True)
    model, config = dataclasses.replace(tiny.CONFIG, head_dim=64), changed(**changes)
    shapes = llama.abstract_params(model, jnp.bfloat16)

    def start(params):
        fresh = config.adapter().build(jax.random.key(0), model, params)
        return fresh, steps.init_state(fresh, steps.finetune_optimizer(config, STEPS), jax.random.key(0))

    fresh = start(llama.init_params(jax.random.key(0), model, jnp.bfloat16))[0]
    state = jax.eval_shape(start, shapes)[1]
    part = jax.ShapeDtypeStruct((4, 64), jnp.int32)
    data = Batch(part, part, jax.ShapeDtypeStruct((4, 64), jnp.float32), None)
    step = steps.train_step(fresh, model, config, STEPS)
    text = step.trace(state, shapes, data).lower(lowering_platforms=("cuda",)).as_text()
    assert "@__cudnn$fmhaSoftmax(" in text
    assert "@__cudnn$fmhaSoftmaxBackward(" in text
    assert "xbf16>, tensor<24x16xbf16>) -> tensor<" in text, "a product with W in bfloat16"
    assert text.count("tf.aliasing_output") == len(jax.tree.leaves(state))
