"""The forward pass against transformers' logits, an independent float64 LLaMA, and itself by other routes."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import make_llama
import numpy as np
import pytest

from rora_theory.errors import InputError
from rora_theory.llama import (
    MODULES,
    LinearRope,
    Llama3Rope,
    LlamaConfig,
    abstract_params,
    forward,
    forward_cached,
    hidden_states,
    init_cache,
    init_params,
    linear,
    rope,
    unembed,
)
from rora_theory.llama.attention import attend, attend_segments, choose_route
from rora_theory.llama.model import NoAdapter, rms_norm

VARIANTS = (
    "llama1",
    "llama2",
    "llama3",
    "llama31",
    "llama31_new_names",
    "linear",
    "smollm2",
    "head_dim",
    "attention_bias",
    "mlp_bias",
    "left_padded",
)
STATIC = ("config", "remat", "attention", "capture")
run = jax.jit(forward, static_argnames=STATIC)
step = jax.jit(forward_cached, static_argnames="config")


def reference(params, tokens, config: LlamaConfig, prefix=None) -> np.ndarray:
    """LLaMA in NumPy and float64, one sequence, written from the paper: head by head, row by row.

    ``prefix``: keys and values that every query sees, each [layers, count, kv_heads, head_dim].
    """
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)

    def norm(x, weight):
        return weight * x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + config.rms_norm_eps)

    half = config.head_dim // 2
    omega = config.rope_theta ** (-np.arange(half) / half)

    def turn(vector, position):
        pairs = (vector[:half] + 1j * vector[half:]) * np.exp(1j * position * omega)
        return np.concatenate([pairs.real, pairs.imag])

    x = params["embed_tokens"][tokens]
    group = config.num_attention_heads // config.num_key_value_heads
    for i in range(config.num_hidden_layers):
        layer = jax.tree.map(lambda a, i=i: a[i], params["layers"])

        def module(name, u, layer=layer):
            return u @ layer[name]["weight"].T + layer[name].get("bias", 0.0)

        u = norm(x, layer["input_layernorm"])
        q, k, v = (module(f"self_attn.{name}_proj", u).reshape(len(u), -1, config.head_dim) for name in ("q", "k", "v"))
        mixed = np.zeros_like(q)
        for n in range(config.num_attention_heads):
            keys = [turn(row, s) for s, row in enumerate(k[:, n // group])]
            values = list(v[:, n // group])
            count = 0
            if prefix is not None:
                keys = [*np.asarray(prefix[0][i, :, n // group]), *keys]
                values = [*np.asarray(prefix[1][i, :, n // group]), *values]
                count = prefix[0].shape[1]
            for s in range(len(u)):
                seen = slice(0, count + s + 1)
                scores = np.array(keys[seen]) @ turn(q[s, n], s) / np.sqrt(config.head_dim)
                weights = np.exp(scores - scores.max())
                mixed[s, n] = weights / weights.sum() @ np.array(values[seen])
        x = x + module("self_attn.o_proj", mixed.reshape(len(u), -1))
        u = norm(x, layer["post_attention_layernorm"])
        gate = module("mlp.gate_proj", u)
        x = x + module("mlp.down_proj", gate / (1 + np.exp(-gate)) * module("mlp.up_proj", u))
    head = params["embed_tokens"] if config.tie_word_embeddings else params["lm_head"]
    return norm(x, params["norm"]) @ head.T


@pytest.fixture(scope="module")
def params(draw_params, tiny):
    return draw_params(tiny)


@pytest.fixture(scope="module")
def tokens(tiny):
    return jax.random.randint(jax.random.key(0), (3, 11), 0, tiny.vocab_size)


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_equal_transformers(name, golden_configs, draw_params):
    config = LlamaConfig.from_hf(golden_configs[name])
    tokens, mask = make_llama.batch(name)
    expected = np.load(make_llama.HERE / "llama.npz")[name]
    logits = run(draw_params(config), tokens, config, attention_mask=None if mask.all() else jnp.asarray(mask))
    real = mask.astype(bool)
    # The tolerance is float32's: logits reach 4 (23 where the embeddings are tied), and two correct programs differ
    # by a few units in the last place of the largest terms: 1e-5 is 10 to 20 of them, at 23 ten are 1.9e-5.
    largest = np.abs(expected[real]).max()
    assert largest > 3
    atol = max(1e-5, 10 * float(np.spacing(np.float32(largest))))
    np.testing.assert_allclose(np.asarray(logits)[real], expected[real], rtol=0, atol=atol)


def test_all_variants_are_tested():
    assert set(make_llama.VARIANTS) == set(VARIANTS)


def test_logits_equal_a_float64_reference(params, tokens, tiny):
    logits = run(params, tokens, tiny)
    for row, expected in zip(logits, tokens, strict=True):
        # Logits reach 4; 2 layers of float32 rounding stay under 100 units in the last place of 1.
        np.testing.assert_allclose(row, reference(params, np.asarray(expected), tiny), rtol=0, atol=1e-5)


CHANGES = {
    "vocab_size": 49,
    "hidden_size": 36,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 9,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "rms_norm_eps": 0.1,
    "rope_theta": 100.0,
    "rope_scaling": LinearRope(2.0),
    "tie_word_embeddings": True,
    "attention_bias": True,
    "mlp_bias": True,
    "max_position_embeddings": 10,
    "model_type": "qwen2",
    "sliding_window": 4,
    "full_attention_layers": (0,),
    "query_pre_attn_scalar": 2,
    "rope_local_base_freq": 100.0,
}
GEMMA = {
    "model_type": "gemma3_text",
    "query_pre_attn_scalar": 8,
    "rope_local_base_freq": 10000.0,
    "sliding_window": 4,
    "full_attention_layers": (1,),
}
# What a field needs beside it to be there.
BESIDE = {
    "sliding_window": {"model_type": "mistral"},
    "full_attention_layers": {"model_type": "qwen3", "sliding_window": 4},
    "query_pre_attn_scalar": GEMMA,
    "rope_local_base_freq": GEMMA,
}
# They reach tokenization and generation, not the logits; that each is carried there is tested in test_config.
TOKEN_IDS = {"bos_token_id", "eos_token_id", "pad_token_id"}


def test_every_field_has_a_change():
    assert {field.name for field in dataclasses.fields(LlamaConfig)} == set(CHANGES) | TOKEN_IDS


@pytest.mark.parametrize("field", CHANGES)
def test_every_field_changes_the_output(field, draw_params, params, tokens, tiny):
    plain = dataclasses.replace(tiny, **BESIDE.get(field, {}))
    changed = dataclasses.replace(plain, **{field: CHANGES[field]})
    before = np.asarray(run(draw_params(plain), tokens, plain))
    if field == "max_position_embeddings":
        with pytest.raises(InputError, match=r"length .*10.* 11"):
            forward(params, tokens, changed)
        return
    after = np.asarray(run(draw_params(changed), tokens, changed))
    assert np.all(np.isfinite(after))
    assert before.shape != after.shape or np.abs(before - after).max() > 1e-3


LLAMA3 = Llama3Rope(8.0, 1.0, 4.0, 32)


@pytest.mark.parametrize(
    "scaling",
    [
        dataclasses.replace(LLAMA3, factor=4.0),
        dataclasses.replace(LLAMA3, low_freq_factor=2.0),
        dataclasses.replace(LLAMA3, high_freq_factor=3.0),
        dataclasses.replace(LLAMA3, original_max_position_embeddings=48),
        LinearRope(8.0),
    ],
)
def test_every_field_of_the_scaling_changes_the_frequencies(scaling, tiny):
    wide = dataclasses.replace(tiny, head_dim=64)  # frequencies of every wavelength
    before = rope.frequencies(dataclasses.replace(wide, rope_scaling=LLAMA3))
    after = rope.frequencies(dataclasses.replace(wide, rope_scaling=scaling))
    assert np.abs(after / before - 1).max() > 1e-2


def test_llama3_scaling_keeps_short_and_stretches_long_wavelengths():
    config = LlamaConfig(8, 128, 8, 1, 1, 1, 128, rope_theta=5e5)
    plain = rope.frequencies(config)
    divisor = rope.scaling_divisor(Llama3Rope(8.0, 1.0, 4.0, 8192), plain)
    wavelength = 2 * np.pi / plain
    np.testing.assert_array_equal(divisor[wavelength < 8192 / 4], 1)
    np.testing.assert_array_equal(divisor[wavelength > 8192 / 1], 8)
    between = (wavelength > 8192 / 4) & (wavelength < 8192)
    assert between.sum() > 5
    assert np.all(np.diff(divisor[between]) > 0)


def test_left_padding_does_not_shift_or_leak(params, tokens, tiny):
    mask = jnp.ones(tokens.shape, jnp.int32).at[1, :4].set(0)
    padded = run(params, tokens, tiny, attention_mask=mask)
    alone = run(params, tokens[1:2, 4:], tiny)
    np.testing.assert_allclose(padded[1, 4:], alone[0], rtol=0, atol=1e-5)
    other = run(params, tokens.at[1, :4].set(7), tiny, attention_mask=mask)
    np.testing.assert_array_equal(other[1, 4:], padded[1, 4:])


def test_positions_count_real_tokens(params, tokens, tiny):
    """A row with a hole is the row without it. Padding on the left alone would not show: only distances matter."""
    mask = jnp.ones(tokens.shape, jnp.int32).at[0, 3:6].set(0)
    holed = run(params, tokens, tiny, attention_mask=mask)
    closed = run(params, jnp.delete(tokens[:1], jnp.arange(3, 6), axis=1), tiny)
    np.testing.assert_allclose(holed[0, 6:], closed[0, 3:], rtol=0, atol=1e-5)


def test_right_padding_needs_no_mask(params, tokens, tiny):
    whole, cut = run(params, tokens, tiny), run(params, tokens.at[:, 6:].set(0), tiny)
    np.testing.assert_array_equal(whole[:, :6], cut[:, :6])


def test_a_token_outside_the_vocabulary_is_nan(params, tokens, tiny):
    logits = run(params, tokens.at[0, 5].set(tiny.vocab_size), tiny)
    assert np.all(np.isnan(logits[0, 5:]))
    assert np.all(np.isfinite(logits[1:]))


def test_a_token_below_zero_is_nan(params, tokens, tiny):
    """It is no index from the end: -1 is not the last token."""
    logits = run(params, tokens.at[0, 5].set(-1).at[1, 0].set(-tiny.vocab_size), tiny)
    assert np.all(np.isnan(logits[0, 5:]))
    assert np.all(np.isnan(logits[1]))
    assert np.all(np.isfinite(logits[2]))
    last, _ = step(params, jnp.array([[-1]]), init_cache(tiny, 1, 4), tiny)
    assert np.all(np.isnan(last))


def test_an_empty_sequence_is_refused(params, tiny):
    empty = jnp.zeros((2, 0), jnp.int32)
    with pytest.raises(InputError, match=r"sequence length .* 0$"):
        forward(params, empty, tiny)
    with pytest.raises(InputError, match=r"sequence length .* 0$"):
        forward_cached(params, empty, init_cache(tiny, 2, 4), tiny)


# torch 2's float32 bits of 1 / theta^(2i/64), as transformers computes them; theta of LLaMA and of SmolLM2.
FREQUENCIES = {
    1e4: """
    1065353216 1061157137 1058010522 1054337179 1050798235 1047712803 1043732615 1040747895 1036831949 1033475085
    1030116802 1026341397 1023510243 1019364175 1016180025 1012562930 1008981770 1005959600 1001931932 998911607
    995049016 991652109 988353832 984533390 981668463 977573004 974350870 970790693 967166816 964208661 960132947
    957076594""",
    1e5: """
    1065353216 1060283654 1056527311 1051589887 1047712803 1042904073 1038909398 1034226006 1030116802 1025555485
    1021334738 1016892311 1012562930 1008236293 1003801109 999587246 995049016 990944987 986306396 982309339
    977573004 973680130 968848599 965057193 960132947 956440363 951425819 947746260 942726994 938924694 934036253
    930114413""",
}


def test_rotary_frequencies_are_computed_in_float32(tiny):
    """As the checkpoints were trained: of float64's, rounded, 21 of 64 differ from torch's, of NumPy's float32 7."""
    differ = 0
    for theta, bits in FREQUENCIES.items():
        found = rope.frequencies(dataclasses.replace(tiny, head_dim=64, rope_theta=theta))
        assert found.dtype == np.float32
        away = np.abs(found.view(np.int32) - np.array(bits.split(), np.int32))
        assert away.max() <= 2  # units in the last place, of two libraries' power
        differ += np.count_nonzero(away)
    assert differ <= 12


def test_rotary_angles_are_products_in_float32(tiny):
    config = dataclasses.replace(tiny, head_dim=64, max_position_embeddings=8192)
    omega = rope.frequencies(config)
    rounded = np.float32(8191) * omega
    exact = 8191 * omega.astype(np.float64)
    found = rope.angles(config, jnp.array([[8191]]))
    for values, function in zip(found, (np.cos, np.sin), strict=True):
        # The last bit of an angle of 8191 is 5e-4; cosine and sine in float32 add 2e-7.
        np.testing.assert_allclose(values[0, 0], function(rounded.astype(np.float64)), rtol=0, atol=2e-6)
        assert np.abs(function(exact) - function(rounded.astype(np.float64))).max() > 1e-5


@pytest.mark.parametrize("compiled", [False, True])
def test_rms_norm_rounds_before_the_weight_in_bfloat16(compiled, tiny):
    config = dataclasses.replace(tiny, rms_norm_eps=1e-5)
    random = np.random.default_rng(0)
    x = random.normal(size=(64, 32)).astype(jnp.bfloat16)
    weight = random.uniform(0.5, 1.5, 32).astype(jnp.bfloat16)
    norm = jax.jit(rms_norm, static_argnums=2) if compiled else rms_norm
    found = np.asarray(norm(jnp.asarray(x), jnp.asarray(weight), config))
    wide, scale = x.astype(np.float64), weight.astype(np.float64)
    scaled = wide / np.sqrt(np.mean(wide * wide, axis=-1, keepdims=True) + 1e-5)
    early = (scaled.astype(jnp.bfloat16).astype(np.float64) * scale).astype(jnp.bfloat16)
    late = (scaled * scale).astype(jnp.bfloat16)
    assert found.dtype == jnp.bfloat16
    # A quotient in float32 that is a last bit off can round the other way: rarely.
    assert np.mean(found != early) < 0.01
    assert np.mean(late != early) > 0.2


@pytest.mark.parametrize("padded", [False, True])
def test_cached_decoding_equals_the_forward_pass(padded, params, tokens, tiny):
    mask = jnp.ones(tokens.shape, jnp.int32)
    if padded:
        mask = mask.at[0, :3].set(0).at[2, :5].set(0)
    whole = run(params, tokens, tiny, attention_mask=mask)
    cache = init_cache(tiny, len(tokens), tokens.shape[1] + 3)
    logits, cache = step(params, tokens[:, :6], cache, tiny, attention_mask=mask[:, :6])
    np.testing.assert_allclose(logits, whole[:, 5], rtol=0, atol=1e-5)
    logits, cache = step(params, tokens[:, 6:8], cache, tiny)
    np.testing.assert_allclose(logits, whole[:, 7], rtol=0, atol=1e-5)
    for i in range(8, tokens.shape[1]):
        logits, cache = step(params, tokens[:, i : i + 1], cache, tiny)
        np.testing.assert_allclose(logits, whole[:, i], rtol=0, atol=1e-5)
    assert int(cache["length"]) == tokens.shape[1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Probe(NoAdapter):
    """An adapter that uses all that a model hands it: layer slices, the key, and a prefix."""

    factor: jax.Array  # [layers]
    keys: jax.Array  # [layers, count, kv_heads, head_dim]
    values: jax.Array

    def layers(self):
        return {"factor": self.factor, "k": self.keys, "v": self.values}

    def linear(self, name, x, weight, bias, layer, *, key):
        y = linear(x, weight, bias) * layer["factor"]
        if key is not None and name == "mlp.up_proj":
            y = y * jax.random.bernoulli(key, 0.5, y.shape).astype(y.dtype)
        return y

    def prefix(self, layer):
        return layer["k"], layer["v"]


@pytest.fixture(scope="module")
def probe(tiny):
    keys, values = jax.random.normal(jax.random.key(3), (2, tiny.num_hidden_layers, 4, 3, 8))
    return Probe(jnp.array([1.25, 0.75]), keys, values)


@pytest.mark.slow
def test_adapters_get_their_layers_slice_and_prefix(params, probe, tokens, tiny):
    # Scaling a module's output scales its weight: the reference can do it.
    scaled = dict(params["layers"])
    for name in MODULES:
        weight = params["layers"][name]["weight"]
        scaled[name] = {"weight": weight * probe.factor[:, None, None]}
    expected = reference(params | {"layers": scaled}, np.asarray(tokens[0]), tiny, (probe.keys, probe.values))
    logits = run(params, tokens, tiny, probe)
    np.testing.assert_allclose(logits[0], expected, rtol=0, atol=1e-5)
    # The same through a mask, the plain route and the cache.
    mask = jnp.ones_like(tokens)
    for other in (
        run(params, tokens, tiny, probe, attention_mask=mask)[:, -1],
        run(params, tokens, tiny, probe, attention="xla")[:, -1],
        step(params, tokens, init_cache(tiny, 3, 12), tiny, probe)[0],
    ):
        np.testing.assert_allclose(other, logits[:, -1], rtol=0, atol=1e-5)


def test_dropout_keys_differ_by_layer_and_by_key(params, probe, tokens, tiny):
    still = run(params, tokens, tiny, probe)
    one = run(params, tokens, tiny, probe, key=jax.random.key(1))
    np.testing.assert_array_equal(one, run(params, tokens, tiny, probe, key=jax.random.key(1)))
    assert np.abs(one - still).max() > 1e-2
    assert np.abs(one - run(params, tokens, tiny, probe, key=jax.random.key(2))).max() > 1e-2
    # What up_proj dropped is zero in down_proj's input, and no layer drops what another does.
    _, inputs = run(params, tokens, tiny, probe, key=jax.random.key(1), capture=("mlp.down_proj",))
    dropped = np.asarray(inputs["mlp.down_proj"] == 0)
    assert 0.4 < dropped.mean() < 0.6
    assert 0.4 < (dropped[0] == dropped[1]).mean() < 0.6


def test_every_module_of_every_layer_has_a_key_of_its_own(params, tokens, tiny):
    seen = []

    class Reader(NoAdapter):
        def linear(self, name, x, weight, bias, layer, *, key):
            jax.debug.callback(lambda data: seen.append((name, tuple(data.tolist()))), jax.random.key_data(key))
            return super().linear(name, x, weight, bias, layer, key=key)

    jax.block_until_ready(forward(params, tokens, tiny, Reader(), key=jax.random.key(1)))
    jax.effects_barrier()
    layers = jax.random.split(jax.random.key(1), tiny.num_hidden_layers)
    own = {name: [jax.random.fold_in(key, place) for key in layers] for place, name in enumerate(MODULES)}
    expected = [(name, tuple(jax.random.key_data(key).tolist())) for name, keys in own.items() for key in keys]
    assert len(set(expected)) == len(MODULES) * tiny.num_hidden_layers
    assert sorted(seen) == sorted(expected)


@pytest.mark.slow
def test_remat_changes_no_gradient_and_keeps_less(params, probe, tokens, tiny):
    def loss(probe, remat):
        return jnp.mean(jnp.square(forward(params, tokens, tiny, probe, key=jax.random.key(1), remat=remat)))

    def kept(remat):
        """Elements that the backward pass gets from the forward pass, by the shape of one layer's."""
        vjp = jax.eval_shape(lambda probe: jax.vjp(partial(loss, remat=remat), probe)[1], probe)
        return {a.shape[1:] for a in jax.tree.leaves(vjp) if a.shape[:1] == (tiny.num_hidden_layers,)}

    plain, mlp, everything = (jax.jit(jax.grad(partial(loss, remat=r)))(probe) for r in (False, "mlp", True))
    for other in (mlp, everything):
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), plain, other)
    inner, queries = (3, 11, tiny.intermediate_size), (3, 11, 6, 8)
    assert {inner, queries} <= kept(False)
    assert queries in kept("mlp") - {inner}
    assert inner not in kept("mlp")
    assert not {inner, queries} & kept(True)
    with pytest.raises(InputError, match="'all'"):
        forward(params, tokens, tiny, remat="all")


@pytest.mark.slow
def test_capture_returns_the_modules_inputs(params, tokens, tiny):
    names = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    logits, inputs = run(params, tokens, tiny, capture=names)
    np.testing.assert_allclose(logits, run(params, tokens, tiny), rtol=0, atol=1e-5)  # another program
    assert {name: a.shape for name, a in inputs.items()} == {
        name: (2, 3, 11, tiny.module_shape(name)[1]) for name in names
    }
    # A layer is the sum of its two branches, both of which the captured inputs give.
    layers = params["layers"]
    x = params["embed_tokens"][tokens]
    for i in range(2):
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            x = x + linear(inputs[name][i], layers[name]["weight"][i])
    last = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + tiny.rms_norm_eps) * params["norm"][None, None]
    np.testing.assert_allclose(unembed(params, last, tiny), logits, rtol=0, atol=1e-5)
    first = params["embed_tokens"][tokens]
    first = first / jnp.sqrt(jnp.mean(first**2, axis=-1, keepdims=True) + tiny.rms_norm_eps)
    expected = first * layers["input_layernorm"][0][None, None]
    np.testing.assert_allclose(inputs["self_attn.q_proj"][0], expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(InputError, match="lm_head"):
        forward(params, tokens, tiny, capture=("lm_head",))


@pytest.mark.slow
def test_a_tree_of_continuations_in_one_row_equals_its_sequences(params, tokens, tiny):
    """Two continuations after a common start: positions and the mask say which sees which."""
    common, a, b = 5, 3, 3
    tree = tokens[:1]
    branch = jnp.array([0] * common + [1] * a + [2] * b)
    positions = jnp.array([[*range(common), *range(common, common + a), *range(common, common + b)]])
    earlier = jnp.arange(11)[None, :] <= jnp.arange(11)[:, None]
    visible = earlier & ((branch[None, :] == 0) | (branch[None, :] == branch[:, None]))
    hidden = hidden_states(params, tree, tiny, positions=positions, visible=visible[None])
    first = hidden_states(params, tree[:, :8], tiny)
    second = hidden_states(params, jnp.concatenate([tree[:, :5], tree[:, 8:]], axis=1), tiny)
    np.testing.assert_allclose(hidden[:, :8], first, rtol=0, atol=1e-5)
    np.testing.assert_allclose(hidden[:, 8:], second[:, 5:], rtol=0, atol=1e-5)


def test_bfloat16_weights_give_float32_logits_near_float32s(params, tokens, tiny):
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    logits = run(half, tokens, tiny)
    assert logits.dtype == jnp.float32
    assert jax.eval_shape(partial(hidden_states, config=tiny), half, tokens).dtype == jnp.bfloat16
    error = np.abs(logits - run(params, tokens, tiny))
    # bfloat16 rounds at 2^-8 of values near 1 in some twenty places on the way to a logit.
    assert error.mean() < 0.05
    assert error.max() < 0.3
    # The projection to the vocabulary is accumulated and returned in float32: not on bfloat16's grid.
    assert np.abs(logits - logits.astype(jnp.bfloat16).astype(jnp.float32)).max() > 1e-4


def test_bfloat16_products_accumulate_in_float32():
    # A bfloat16 sum of ones stops at 256, where 257 rounds back to it.
    y = jax.jit(linear)(jnp.ones((1, 1, 4096), jnp.bfloat16), jnp.ones((2, 4096), jnp.bfloat16))
    np.testing.assert_array_equal(y.astype(jnp.float32), 4096)


def test_linear_multiplies_in_the_weights_dtype():
    x = jnp.full((1, 1, 2), 1 + 2**-12, jnp.float32)
    y = linear(x, jnp.ones((1, 2), jnp.bfloat16), jnp.full((1,), 0.5, jnp.bfloat16))
    assert y.dtype == jnp.float32
    np.testing.assert_array_equal(y, 2.5)


def plain_attention(q, k, v, mask):
    """Softmax attention in float64: heads repeated, scores masked by minus infinity."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    k, v = (np.repeat(a, q.shape[2] // a.shape[2], axis=2) for a in (k, v))
    scores = np.einsum("bsnd,btnd->bnst", q, k) / np.sqrt(q.shape[3])
    scores = np.where(mask, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.einsum("bnst,btnd->bsnd", weights / weights.sum(axis=-1, keepdims=True), v)


@pytest.mark.parametrize("route", ["blocked", "xla"])
@pytest.mark.parametrize(
    ("length", "keys", "heads", "kv_heads", "masked"),
    [(1, 1, 2, 2, False), (70, 70, 6, 2, False), (70, 70, 2, 1, True), (3, 70, 6, 3, True), (130, 134, 2, 2, False)],
)
def test_attention_equals_its_definition(route, length, keys, heads, kv_heads, masked):
    shape = jax.random.split(jax.random.key(length), 3)
    q = jax.random.normal(shape[0], (2, length, heads, 8))
    k, v = (jax.random.normal(key, (2, keys, kv_heads, 8)) for key in shape[1:])
    seen = np.arange(keys)[None, :] <= np.arange(keys - length, keys)[:, None]
    mask = np.broadcast_to(seen[None, None], (2, 1, length, keys)).copy()
    if masked:
        mask[1, :, :, :2] = False
        mask[:, :, :, 2] = True
    out = jax.jit(partial(attend, route=route))(q, k, v, jnp.asarray(mask) if masked else None)
    np.testing.assert_allclose(out, plain_attention(q, k, v, mask), rtol=0, atol=3e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_blocked_attention_has_the_plain_routes_gradient(masked):
    shape = jax.random.split(jax.random.key(5), 4)
    q, g = (jax.random.normal(key, (2, 130, 6, 8)) for key in shape[:2])
    k, v = (jax.random.normal(key, (2, 133, 3, 8)) for key in shape[2:])
    mask = None
    if masked:
        seen = np.arange(133)[None, :] <= np.arange(3, 133)[:, None]
        mask = jnp.asarray(seen[None, None] & (np.arange(133) >= np.array([0, 40])[:, None])[:, None, None])

    def gradient(route):
        def loss(q, k, v):
            out = attend(q, k, v, mask, route=route)
            # Queries that see nothing give no meaningful output; here they are the first rows of the second.
            return jnp.sum((out * g)[:, 40:])

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)

    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=1e-5), gradient("blocked"), gradient("xla"))


def test_a_query_that_sees_nothing_gives_finite_values_and_no_gradient():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 4, 2, 8))
    mask = jnp.zeros((1, 1, 4, 4), bool)
    out, gradient = jax.jit(jax.value_and_grad(lambda q: jnp.sum(attend(q, k, v, mask, route="blocked"))))(q)
    assert np.isfinite(out)
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_attention_in_half_precision(dtype):
    q = jax.random.normal(jax.random.key(1), (2, 70, 4, 8)).astype(dtype)
    k, v = jax.random.normal(jax.random.key(2), (2, 2, 70, 2, 8)).astype(dtype)
    mask = np.tril(np.ones((70, 70), bool))
    for route in ("blocked", "xla"):
        out = jax.jit(partial(attend, route=route))(q, k, v)
        assert out.dtype == dtype
        # The probabilities are rounded once and the output once: two roundings of values up to about 2.
        tolerance = 4 * float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(out.astype(jnp.float32), plain_attention(q, k, v, mask), rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_attention_over_parts_equals_its_definition(dtype):
    """Over keys that all rows share, keys of each row's own, and a part of one key."""
    random = np.random.default_rng(0)
    q = random.normal(size=(3, 4, 6, 8)).astype(dtype)
    parts = [random.normal(size=(2, rows, count, 2, 8)).astype(dtype) for rows, count in ((1, 5), (3, 9), (3, 1))]
    mask = random.random((3, 1, 4, 15)) < 0.6
    mask[..., 5] = True  # no query sees nothing
    kept = [(jnp.asarray(k.transpose(0, 2, 3, 1)), jnp.asarray(v.swapaxes(1, 2))) for k, v in parts]
    out = jax.jit(attend_segments)(jnp.asarray(q), kept, jnp.asarray(mask))
    assert out.dtype == dtype
    k, v = (
        np.concatenate([np.broadcast_to(a, (3, *a.shape[1:])) for a in each], 1) for each in zip(*parts, strict=True)
    )
    # Rounded to bfloat16: weights of at most 1 and the output, to 8 bits each.
    tolerance = 3e-6 if dtype == jnp.float32 else 3e-2
    np.testing.assert_allclose(out.astype(jnp.float32), plain_attention(q, k, v, mask), rtol=0, atol=tolerance)
    # Scores of hundreds, whose exponentials float32 does not have.
    assert np.all(np.isfinite(jax.jit(attend_segments)(100 * jnp.asarray(q), kept, jnp.asarray(mask))))


def test_long_sequences_make_few_blocks():
    """Compile time does not grow without bound: at most 16 blocks, however long the sequence."""
    text = str(jax.make_jaxpr(partial(attend, route="blocked"))(*jnp.zeros((3, 1, 4096, 1, 2))))
    assert 0 < text.count("dot_general") <= 2 * 16


def test_cudnn_route_lowers_for_cuda(tiny, monkeypatch):
    """The fused kernel, forward and backward, is in the program for an NVIDIA GPU, made here without one."""
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    config = dataclasses.replace(tiny, head_dim=64)
    abstract = abstract_params(config, jnp.bfloat16)

    def loss(params, tokens):
        return jnp.sum(forward(params, tokens, config, attention="cudnn"))

    tokens = jax.ShapeDtypeStruct((2, 64), jnp.int32)
    text = jax.jit(jax.grad(loss)).trace(abstract, tokens).lower(lowering_platforms=("cuda",)).as_text()
    assert "@__cudnn$fmhaSoftmax(" in text
    assert "@__cudnn$fmhaSoftmaxBackward(" in text


@pytest.mark.parametrize(
    ("dtype", "head_dim", "shape", "gpu", "expected"),
    [
        (jnp.bfloat16, 64, (64, 64, False), True, "cudnn"),
        (jnp.float16, 128, (63, 63, False), True, "cudnn"),
        (jnp.bfloat16, 64, (64, 68, True), True, "cudnn"),
        (jnp.bfloat16, 64, (63, 63, True), True, "blocked"),
        (jnp.bfloat16, 64, (63, 64, False), True, "blocked"),
        (jnp.float32, 64, (64, 64, False), True, "blocked"),
        (jnp.bfloat16, 136, (64, 64, False), True, "blocked"),
        (jnp.bfloat16, 60, (64, 64, False), True, "blocked"),
        (jnp.bfloat16, 64, (64, 64, False), False, "blocked"),
    ],
)
def test_route(dtype, head_dim, shape, gpu, expected, monkeypatch):
    monkeypatch.setattr("rora_theory.llama.attention._has_fused_kernel", lambda: gpu)
    queries, keys, masked = shape
    choose = partial(choose_route, dtype=jnp.dtype(dtype), head_dim=head_dim, queries=queries, keys=keys, masked=masked)
    assert choose("auto") == expected
    assert choose("xla") == "xla"
    with pytest.raises(InputError, match="'flash'"):
        choose("flash")


def test_random_and_abstract_weights_agree(tiny):
    config = dataclasses.replace(tiny, attention_bias=True, mlp_bias=True)
    abstract = abstract_params(config, jnp.bfloat16)
    drawn = jax.jit(init_params, static_argnums=(1, 2))(jax.random.key(0), config, jnp.bfloat16)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), drawn) == jax.tree.map(lambda a: (a.shape, a.dtype), abstract)
    weight = drawn["layers"]["mlp.up_proj"]["weight"].astype(jnp.float32)
    # 2560 draws: the standard deviation's own deviation is 1.4 %; five of those.
    assert abs(float(jnp.std(weight)) / 0.02 - 1) < 0.07
    assert set(np.unique(drawn["norm"].astype(jnp.float32))) == {1.0}
    assert "lm_head" not in abstract_params(dataclasses.replace(tiny, tie_word_embeddings=True))


def test_cache_longer_than_the_model_is_refused(tiny):
    with pytest.raises(InputError, match="max_position_embeddings"):
        init_cache(tiny, 1, tiny.max_position_embeddings + 1)


def test_positions_and_visible_go_together(params, tokens, tiny):
    with pytest.raises(InputError, match="positions and visible"):
        hidden_states(params, tokens, tiny, positions=jnp.zeros_like(tokens))
