"""Prefix tuning: against peft (`tests/golden/make_prefix.py`), against numpy, and with a cache."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from support import numpy_llama

from rora_theory import llama
from rora_theory.adapters import PrefixConfig, count, init, load_peft, merge, save_peft, share, table, unmerge
from rora_theory.errors import InputError
from rora_theory.llama import LlamaConfig, abstract_params, generate, init_cache

FOLDER = Path(__file__).parents[1] / "golden" / "prefix"
forward, forward_cached = (jax.jit(one, static_argnames="config") for one in (llama.forward, llama.forward_cached))


@pytest.fixture(scope="module")
def expected():
    return np.load(FOLDER / "golden.npz")


@pytest.fixture(scope="module")
def adapter(config):
    return load_peft(FOLDER, config)


@pytest.fixture(scope="module")
def fresh(config, params):
    return init(jax.random.key(3), PrefixConfig(4), config, params)


@pytest.mark.slow
def test_agrees_with_peft(golden, config, params, tokens, adapter, expected) -> None:
    """Logits to 1e-5, the gradient and 20 AdamW losses to 1e-4 relative: float32 sums in another order."""

    def loss(trained):
        logits = forward(params, tokens, config, adapter.replace(trained))
        picked = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
        return jnp.mean(picked), logits

    optimizer = optax.adamw(golden.RATE, eps=1e-8, weight_decay=0.01)  # torch.optim.AdamW's defaults

    @jax.jit
    def step(trained, state):
        (value, logits), gradient = jax.value_and_grad(loss, has_aux=True)(trained)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(gradient, state, trained)
        return optax.apply_updates(trained, updates), state, value, logits, gradient

    trained, state, losses = adapter.params, optimizer.init(adapter.params), []
    for index in range(golden.STEPS):
        trained, state, value, logits, gradient = step(trained, state)
        losses.append(float(value))
        if index == 0:
            np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=1e-5)
            theirs = expected["gradient"]
            ours = _laid_out(gradient)
            assert np.abs(theirs.reshape(len(theirs), 3, 2, -1)).max(axis=(0, 3)).min() > 1e-6, "in every layer"
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())
    np.testing.assert_allclose(losses, expected["losses"], rtol=1e-4)
    assert losses[-1] < losses[0] - 0.02


def _laid_out(params) -> np.ndarray:
    """PEFT's layout, an entry at a time."""
    layers, tokens, heads, width = params["key"].shape
    found = np.zeros((tokens, layers, 2, heads * width), np.float32)
    for layer in range(layers):
        for kind, name in enumerate(("key", "value")):
            for token in range(tokens):
                found[token, layer, kind] = np.asarray(params[name][layer, token]).ravel()
    return found.reshape(tokens, -1)


def test_padding_on_the_left_changes_nothing(config, params, tokens, adapter, expected) -> None:
    mask = np.ones(tokens.shape, np.int32)
    mask[0, :4] = 0
    logits = np.asarray(forward(params, tokens, config, adapter, attention_mask=jnp.asarray(mask)))
    np.testing.assert_allclose(logits[mask == 1], expected["padded"][mask == 1], rtol=0, atol=1e-5)
    assert np.abs(logits - expected["logits"])[0].max() > 0.01, "the padding hides something"


@pytest.mark.slow
def test_greedy_generation_is_peft_s_and_that_without_a_cache(config, params, tokens, adapter, expected, run) -> None:
    prompts = [np.asarray(tokens)[0, 4:].tolist(), np.asarray(tokens)[1].tolist()]
    settings = {"max_new_tokens": expected["generated"].shape[1], "eos_ids": ()}
    found = generate.greedy_search(params, config, prompts, adapter=adapter, **settings)
    assert found == expected["generated"].tolist()
    assert found != generate.greedy_search(params, config, prompts, **settings), "the prefix decides"
    again = []
    for prompt in prompts:
        whole = list(prompt)
        for _ in range(settings["max_new_tokens"]):
            padded = whole + [0] * (len(tokens[0]) + settings["max_new_tokens"] - len(whole))  # one shape for all
            whole.append(int(run(params, jnp.asarray([padded]), adapter)[0, len(whole) - 1].argmax()))
        again.append(whole[len(prompt) :])
    assert found == again


@pytest.mark.slow
def test_beams_read_the_prefix_too(config, params, tokens, adapter) -> None:
    """The best of 4 beams is at least as likely as greedy's tokens, by the model without a cache."""
    prompt = np.asarray(tokens)[1].tolist()
    settings = {"max_new_tokens": 4, "eos_ids": (), "adapter": adapter}
    scores = []
    for new in (
        generate.beam_search(params, config, [prompt], **settings),
        generate.greedy_search(params, config, [prompt], **settings),
    ):
        logits = forward(params, jnp.asarray([prompt + new[0]]), config, adapter)
        chances = jax.nn.log_softmax(logits)[0, len(prompt) - 1 : -1]
        scores.append(float(sum(chances[i, token] for i, token in enumerate(new[0]))))
    assert scores[0] >= scores[1] - 1e-4


@pytest.mark.slow
def test_a_cache_holds_what_is_computed_without_one(config, params, tokens, fresh) -> None:
    whole = forward(params, tokens, config, fresh)
    cache = init_cache(config, *tokens.shape)
    for start, end in ((0, 5), (5, 6), (6, 12)):
        logits, cache = forward_cached(params, tokens[:, start:end], cache, config, fresh)
        # Float32 sums in another order.
        np.testing.assert_allclose(logits, whole[:, end - 1], rtol=0, atol=1e-5)


def test_agrees_with_numpy(golden, config, params, tokens, fresh) -> None:
    """The reference is float64: what differs is this side's float32 rounding."""
    embeddings = _laid_out(fresh.params)
    reference = numpy_llama.logits(golden.base_weights(), golden.SHAPE, golden.TOKENS, prefix=embeddings)
    np.testing.assert_allclose(forward(params, tokens, config, fresh), reference, rtol=0, atol=1e-5)


def test_gradient_is_the_slope_of_the_numpy_loss(golden, config, params, tokens, fresh) -> None:
    """In a random direction of the keys and one of the values."""

    def loss(trained):
        logits = forward(params, tokens, config, fresh.replace(trained))
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]))

    def reference(trained):
        prefix = _laid_out(trained)
        found = numpy_llama.logits(golden.base_weights(), golden.SHAPE, golden.TOKENS, prefix=prefix)
        return numpy_llama.loss(found, golden.TOKENS)

    gradient = jax.jit(jax.grad(loss))(fresh.params)
    for name in ("key", "value"):
        along = np.random.default_rng(0).standard_normal(fresh.params[name].shape).astype(np.float32)
        shifted = [reference(fresh.params | {name: fresh.params[name] + h * along}) for h in (1e-3, -1e-3)]
        slope = (shifted[0] - shifted[1]) / 2e-3
        # Central difference: error of order h^2; the shifted values are rounded to float32, 1e-7 / h of the slope.
        assert float(jnp.sum(gradient[name] * along)) == pytest.approx(slope, rel=2e-3)


def test_fresh_prefixes_follow_peft_s_law(config, params) -> None:
    drawn = init(jax.random.key(0), PrefixConfig(50), config, params).params
    values = np.concatenate([np.ravel(drawn[name]) for name in ("key", "value")])  # 2400 of N(0, 1)
    assert abs(values.mean()) < 5 / np.sqrt(values.size)
    assert abs(values.var() - 1) < 5 * np.sqrt(2 / values.size)
    assert abs(np.corrcoef(np.ravel(drawn["key"]), np.ravel(drawn["value"]))[0, 1]) < 5 / np.sqrt(values.size / 2)
    zero = init(jax.random.key(0), PrefixConfig(3, "zero"), config, params)
    assert not any(leaf.any() for leaf in jax.tree.leaves(zero.params))


def test_a_zero_prefix_takes_attention_away(config, params, tokens) -> None:
    """So no prefix starts as the base: said in the docstring."""
    zero = init(jax.random.key(0), PrefixConfig(3, "zero"), config, params)
    assert np.abs(forward(params, tokens, config, zero) - forward(params, tokens, config)).max() > 0.01


def test_counts(params, expected, adapter) -> None:
    assert count(adapter) == int(expected["count"]) == 5 * 3 * 2 * 2 * 4
    total = count(adapter) + sum(leaf.size for leaf in jax.tree.leaves(params))
    assert share(adapter, params) == count(adapter) / total
    llama_13b = LlamaConfig(32000, 5120, 13824, 40, 40, 40, 128)
    base = abstract_params(llama_13b)
    published = jax.eval_shape(lambda key: init(key, PrefixConfig(), llama_13b, {}), jax.random.key(0))
    assert round(100 * share(published, base), 2) == 0.03  # as the paper's Table I
    (row,) = table(adapter)
    assert (row.module, row.layers, row.rank, row.alpha, row.rule, row.scaling) == (
        "self_attn", "0-2", 5, None, "prefix", None,
    )  # fmt: skip


def test_writes_what_peft_wrote(adapter, tmp_path) -> None:
    save_peft(tmp_path, adapter)
    ours, theirs = (
        safetensors.numpy.load((folder / "adapter_model.safetensors").read_bytes()) for folder in (tmp_path, FOLDER)
    )
    assert set(ours) == set(theirs) == {"prompt_embeddings"}
    np.testing.assert_array_equal(ours["prompt_embeddings"], theirs["prompt_embeddings"], strict=True)
    written, original = (json.loads((f / "adapter_config.json").read_text()) for f in (tmp_path, FOLDER))
    assert {key: original[key] for key in written} == written
    assert set(original) - set(written) == {"auto_mapping", "modules_to_save", "peft_version", "revision"}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"prefix_projection": True}, r"prefix_projection .*got True"),
        ({"num_virtual_tokens": 0}, r"num_virtual_tokens .*got 0"),
        ({"num_virtual_tokens": 6}, r"another model: prompt_embeddings .*\[5, 48\]"),
        ({"num_layers": 4}, r"another model: num_layers .*4"),
        ({"token_dim": 16}, r"another model: token_dim .*16"),
        ({"num_transformer_submodules": 2}, r"num_transformer_submodules .*got 2"),
        ({"init_weights": "one"}, r"init_weights .*got 'one'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is"),
        ({"task_type": "SEQ_CLS"}, r"task_type .*got 'SEQ_CLS'"),
        ({"peft_type": "P_TUNING"}, "'P_TUNING'; supported: 'LORA', 'PREFIX_TUNING', 'SERIES_ADAPTER', 'PARALLEL"),
    ],
)
def test_refuses_files(entries, message, config, tmp_path) -> None:
    values = json.loads((FOLDER / "adapter_config.json").read_text()) | entries
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    (tmp_path / "adapter_model.safetensors").write_bytes((FOLDER / "adapter_model.safetensors").read_bytes())
    with pytest.raises(InputError, match=message) as error:
        load_peft(tmp_path, config)
    assert str(tmp_path) in str(error.value)


@pytest.mark.usefixtures("unchecked")
def test_refuses_settings_and_merging(params, adapter) -> None:
    for value in (0, True, 2.0):
        with pytest.raises(InputError, match="virtual_tokens must"):
            PrefixConfig(value)
    with pytest.raises(InputError, match=r"init .*'ones'"):
        PrefixConfig(3, "ones")
    for undo in (merge, unmerge):
        with pytest.raises(InputError, match="a prefix cannot be merged"):
            undo(adapter, params)


@pytest.mark.slow
def test_a_bfloat16_base_runs_it(config, params, tokens, fresh) -> None:
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    found = forward(half, tokens, config, fresh)
    # Within the rounding of a bfloat16 model: 2^-8 of logits of order 1, through 3 layers.
    assert np.abs(found - forward(params, tokens, config, fresh)).max() < 0.2
    gradient = jax.grad(lambda p: forward(half, tokens, config, fresh.replace(p)).sum())(fresh.params)
    assert all(leaf.dtype == jnp.float32 and leaf.any(axis=(1, 2, 3)).all() for leaf in jax.tree.leaves(gradient))
