"""Mistral, Qwen2, Qwen3 and Gemma 3 against transformers and peft (`tests/golden/make_families.py`)."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import make_families
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rora_theory.lab.adapters import LoraConfig, PrefixConfig, load_peft, save_peft
from rora_theory.lab.llama import LlamaConfig, count_parameters, forward, generate, hidden_states, init_cache
from rora_theory.lab.llama.model import forward_cached
from rora_theory.lab.llama.weights import expected_shapes, load_hf, read_config, save_hf, tensor_names

EXPECTED = np.load(Path(__file__).parents[2] / "golden" / "families.npz")
run = jax.jit(forward, static_argnames="config")
step = jax.jit(forward_cached, static_argnames="config")


def config_of(name: str) -> LlamaConfig:
    """Return the configuration of a variant."""
    return LlamaConfig.from_hf(make_families.SIZES | make_families.VARIANTS[name])


@pytest.fixture(params=make_families.VARIANTS)
def case(request, draw_params):
    """Return name, configuration, weights, tokens and mask (None if every token is real)."""
    name = request.param
    config = config_of(name)
    tokens, mask = make_families.batch(name)
    return name, config, draw_params(config), jnp.asarray(tokens), None if mask.all() else jnp.asarray(mask)


def logit_tolerance(config: LlamaConfig) -> float:
    """Return the tolerance of float32 sums in another order: logits reach 4, with tied embeddings 35, Gemma's 70."""
    return 2e-4 if config.family.norm_offset and config.tie_word_embeddings else 2e-5


def test_logits_and_gradients_equal_transformers(case):
    name, config, params, tokens, mask = case

    def loss(params):
        logits = forward(params, tokens, config, attention_mask=mask)
        logp = jax.nn.log_softmax(logits[:, :-1])
        losses = -jnp.take_along_axis(logp, tokens[:, 1:, None], axis=-1)[..., 0]
        return jnp.sum(losses if mask is None else losses * mask[:, :-1].astype(jnp.float32)), logits

    gradient, logits = jax.jit(jax.grad(loss, has_aux=True))(params)
    real = np.ones(tokens.shape, bool) if mask is None else np.asarray(mask, bool)
    expected = EXPECTED[f"{name}/logits"][real]
    np.testing.assert_allclose(np.asarray(logits)[real], expected, rtol=0, atol=logit_tolerance(config))
    compared = 0
    for path, leaf in jax.tree.leaves_with_path(gradient):
        keys = tuple(entry.key for entry in path)
        for layer, key in enumerate(tensor_names(keys, config.num_hidden_layers)):
            reduced = make_families.reduced(key, np.asarray(leaf[layer] if keys[0] == "layers" else leaf))
            expected = EXPECTED[f"{name}/gradient/{key}"]
            # A bias of k adds the same to all scores of a query up to the rotation: small, so measured by the largest.
            atol = 1e-4 * max(1.0, np.abs(expected).max())
            np.testing.assert_allclose(reduced, expected, rtol=0, atol=atol, err_msg=key)
            compared += 1
    assert compared == sum(key.startswith(f"{name}/gradient/") for key in EXPECTED.files)


@pytest.mark.slow
@pytest.mark.parametrize("name", make_families.GENERATED)
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_equals_transformers(name, beams, draw_params):
    """Prompts in a padded batch are longer and shorter than the window; beams may share the reading of a beginning."""
    config = config_of(name)
    params, prompts = draw_params(config), make_families.prompts(name)
    settings = {"max_new_tokens": make_families.NEW_TOKENS, "eos_ids": (), "num_beams": beams}
    generated = EXPECTED[f"{name}/generated/{beams}"].tolist()
    assert generate.beam_search(params, config, prompts, **settings) == generated
    if beams > 1:
        assert generate.beam_search(params, config, prompts[:1], shared=11, **settings) == generated[:1]


@pytest.mark.slow
@pytest.mark.parametrize("case", make_families.ADAPTED, indirect=True)
def test_adapters_equal_pefts(case, tmp_path):
    """Logits agree with LoRA on every linear module, with or without bias, and merged; the file has PEFT's names."""
    name, config, params, tokens, mask = case
    settings = LoraConfig(rank=make_families.RANK, alpha=make_families.ALPHA, rule="rora", target_modules="all-linear")
    save_peft(tmp_path, settings.build(jax.random.key(0), config, params))
    file = tmp_path / "adapter_model.safetensors"
    shapes = {key: tensor.shape for key, tensor in load_file(file).items()}
    assert {key: list(shape) for key, shape in shapes.items()} == json.loads(str(EXPECTED[f"{name}/adapter"]))
    # The golden script drew the weights by PEFT's names of the parameters, which contain the name of the adapter.
    draw = make_families.draw
    save_file({key: draw(key.replace(".weight", ".default.weight"), shape) for key, shape in shapes.items()}, file)
    adapter = load_peft(tmp_path, config)
    expected = EXPECTED[f"{name}/adapted"]
    plain, last = EXPECTED[f"{name}/logits"][:, -make_families.LAST :], slice(-make_families.LAST, None)
    assert np.abs(expected - plain).max() > 1  # the adapter does something
    tolerance = {"rtol": 0, "atol": 2e-5 * np.abs(expected).max()}
    adapted = run(params, tokens, config, adapter, attention_mask=mask)[:, last]
    np.testing.assert_allclose(adapted, expected, **tolerance)
    merged = run(adapter.merge(params), tokens, config, attention_mask=mask)[:, last]
    np.testing.assert_allclose(merged, expected, **tolerance)


@pytest.mark.parametrize("name", make_families.PREFIXED)
def test_a_prefix_equals_pefts(name, draw_params):
    """The prefix lies before the first token and leaves the window as tokens do."""
    config = config_of(name)
    params, tokens = draw_params(config), jnp.asarray(make_families.batch(name)[0])
    adapter = PrefixConfig(make_families.PREFIX).build(jax.random.key(0), config, params)
    layers, count, heads, width = adapter.params["key"].shape
    # As peft has it: a row a token, in it key and value of every layer.
    drawn = make_families.draw("prefix", (count, layers * 2 * heads * width)).reshape(count, layers, 2, heads, width)
    key, value = (jnp.asarray(drawn[:, :, part].swapaxes(0, 1)) for part in (0, 1))
    logits = run(params, tokens, config, adapter.replace({"key": key, "value": value}))
    np.testing.assert_allclose(logits, EXPECTED[f"{name}/prefixed"], rtol=0, atol=logit_tolerance(config))
    assert np.abs(logits - EXPECTED[f"{name}/logits"])[:, 0].max() > 0.1


def test_a_saved_folder_is_the_same_model(case, tmp_path):
    _, config, params, *_ = case
    save_hf(tmp_path / "saved", params, config)
    assert read_config(tmp_path / "saved") == config
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["model_type"] == config.model_type
    again = load_hf(tmp_path / "saved", config)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    assert count_parameters(config) == sum(np.prod(shape) for shape in expected_shapes(config).values())


# One layer without window, and two with a window of 5.
WINDOWED = config_of("qwen3_window_padded")


@pytest.fixture(scope="module")
def windowed(draw_params):
    """Return weights and tokens of a model with a window."""
    return draw_params(WINDOWED), jax.random.randint(jax.random.key(1), (2, 24), 0, 48)


@pytest.mark.slow
@pytest.mark.parametrize("prefixed", [False, True])
def test_every_route_masks_the_same_keys(prefixed, windowed):
    """The routes are a causal pass, a pass under a mask, the cache, and a prefix before the tokens."""
    params, tokens = windowed
    adapter = PrefixConfig(7).build(jax.random.key(2), WINDOWED, params) if prefixed else None
    expected = run(params, tokens, WINDOWED, adapter)
    masked = run(params, tokens, WINDOWED, adapter, attention_mask=jnp.ones_like(tokens))
    np.testing.assert_allclose(masked, expected, rtol=0, atol=1e-5)
    padded = jnp.concatenate([jnp.zeros((2, 3), tokens.dtype), tokens], axis=1)
    mask = (jnp.arange(27) >= 3).astype(jnp.int32)[None] * jnp.ones((2, 1), jnp.int32)
    np.testing.assert_allclose(
        run(params, padded, WINDOWED, adapter, attention_mask=mask)[:, 3:], expected, rtol=0, atol=1e-5
    )
    # A prompt in one call, then two tokens in one call, then one a call. Positions of the padded rows start at 3.
    cache = init_cache(WINDOWED, 2, 30)
    for start, end in ((0, 12), (12, 14), (14, 15), (15, 16)):
        call_mask = mask[:, :12] if start == 0 else None
        logits, cache = step(params, padded[:, start:end], cache, WINDOWED, adapter, attention_mask=call_mask)
        np.testing.assert_allclose(logits, expected[:, end - 4], rtol=0, atol=1e-5)
    assert int(cache["length"]) == 16


def test_short_sequences_need_no_mask(windowed):
    """If no key is outside the window, the program is the one without a window."""
    params, tokens = windowed
    plain = dataclasses.replace(WINDOWED, sliding_window=None, full_attention_layers=())
    short = dataclasses.replace(plain, sliding_window=24)
    programs = [str(jax.make_jaxpr(lambda t, c=c: hidden_states(params, t, c))(tokens)) for c in (plain, short)]
    body, other = (re.sub(" at 0x[0-9a-f]+", "", program.split("let", 1)[1]) for program in programs)
    assert body == other
