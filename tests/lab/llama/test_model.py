"""The forward pass against transformers' logits, an independent float64 LLaMA, and its own other routes."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import make_llama
import numpy as np
import pytest
from support import numpy_llama
from support.shapes import SHAPES

from rora_theory.errors import InputError
from rora_theory.lab import adapters
from rora_theory.lab.llama import (
    MODULES,
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
from rora_theory.lab.llama.attention import attend, attend_segments, causal_mask, choose_route
from rora_theory.lab.llama.model import NoAdapter, rms_norm

GOLDEN_CONFIGS = json.loads((make_llama.HERE / "llama.json").read_text())["configs"]
run = jax.jit(forward, static_argnames="config")
step = jax.jit(forward_cached, static_argnames="config")


@pytest.fixture(scope="module")
def params(draw_params, tiny):
    return draw_params(tiny)


@pytest.fixture(scope="module")
def tokens(tiny):
    return jax.random.randint(jax.random.key(0), (3, 11), 0, tiny.vocab_size)


@pytest.mark.parametrize("name", make_llama.VARIANTS)
def test_logits_equal_transformers(name, draw_params):
    config = LlamaConfig.from_hf(GOLDEN_CONFIGS[name])
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


def test_logits_equal_a_float64_reference(params, tokens, tiny, draw_tensors):
    """The epsilon of the norms is large enough to matter, unlike that of the golden models."""
    expected = numpy_llama.logits(draw_tensors(tiny), dataclasses.asdict(tiny), tokens)
    # Logits reach 4; 2 layers of float32 rounding stay under 100 units in the last place of 1.
    np.testing.assert_allclose(run(params, tokens, tiny), expected, rtol=0, atol=1e-5)


def test_llama3_scaling_equals_its_definition():
    config = SHAPES["llama3-8b"]  # frequencies of every wavelength
    plain = rope.frequencies(config)
    for parameters in ((8.0, 1.0, 4.0, 8192), (4.0, 1.0, 4.0, 8192), (8.0, 2.0, 3.0, 8192), (8.0, 1.0, 4.0, 4096)):
        expected = numpy_llama.llama3_divisors(plain, *parameters)
        assert len(set(expected)) > 2  # some are kept, some divided, some interpolated
        np.testing.assert_allclose(rope.scaling_divisor(Llama3Rope(*parameters), plain), expected, rtol=1e-5)


def test_positions_count_real_tokens(params, tokens, tiny):
    """A row with a hole equals the row without it. Left padding alone would not test this, as only distances matter."""
    mask = jnp.ones(tokens.shape, jnp.int32).at[0, 3:6].set(0)
    holed = run(params, tokens, tiny, attention_mask=mask)
    closed = run(params, jnp.delete(tokens[:1], jnp.arange(3, 6), axis=1), tiny)
    np.testing.assert_allclose(holed[0, 6:], closed[0, 3:], rtol=0, atol=1e-5)


def test_a_token_outside_the_vocabulary_is_nan(params, tokens, tiny):
    """A negative token is no index from the end: -1 is not the last token."""
    outside = tokens.at[0, 5].set(tiny.vocab_size).at[1, 3].set(-1).at[1, 0].set(-tiny.vocab_size)
    logits = run(params, outside, tiny)
    assert np.all(np.isnan(logits[0, 5:]))
    assert np.all(np.isnan(logits[1]))
    assert np.all(np.isfinite(logits[2]))
    last, _ = step(params, jnp.array([[-1]]), init_cache(tiny, 1, 4), tiny)
    assert np.all(np.isnan(last))


REFUSED_CALLS = [
    (lambda params, tokens, config: forward(params, tokens[:, :0], config), r"sequence length .* 0$"),
    (
        lambda params, tokens, config: forward_cached(params, tokens[:, :0], init_cache(config, 3, 4), config),
        r"sequence length .* 0$",
    ),
    (
        lambda params, tokens, config: forward(params, tokens, dataclasses.replace(config, max_position_embeddings=10)),
        r"length .*10.* 11",
    ),
    (lambda _, __, config: init_cache(config, 1, config.max_position_embeddings + 1), "max_position_embeddings.* 257"),
    (
        lambda params, tokens, config: hidden_states(params, tokens, config, positions=jnp.zeros_like(tokens)),
        "positions and visible",
    ),
    (lambda params, tokens, config: forward(params, tokens, config, remat="all"), "remat .*'all'"),
    (lambda params, tokens, config: hidden_states(params, tokens, config, capture=("lm_head",)), "capture .*'lm_head'"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED_CALLS)
def test_a_wrong_argument_is_refused_by_name(call, message, params, tokens, tiny):
    with pytest.raises(InputError, match=message):
        call(params, tokens, tiny)


# torch 2's float32 bits of 1 / 1e4^(2i/64), as transformers computes them.
FREQUENCIES = """
    1065353216 1061157137 1058010522 1054337179 1050798235 1047712803 1043732615 1040747895 1036831949 1033475085
    1030116802 1026341397 1023510243 1019364175 1016180025 1012562930 1008981770 1005959600 1001931932 998911607
    995049016 991652109 988353832 984533390 981668463 977573004 974350870 970790693 967166816 964208661 960132947
    957076594"""


def test_rotary_frequencies_are_computed_in_float32(tiny):
    """The checkpoints were trained so.

    Rounded from float64, 10 of 32 frequencies differ from torch's; NumPy's float32, 2.
    """
    frequencies = rope.frequencies(dataclasses.replace(tiny, head_dim=64))
    assert frequencies.dtype == np.float32
    difference = np.abs(frequencies.view(np.int32) - np.array(FREQUENCIES.split(), np.int32))
    assert difference.max() <= 2  # units in the last place, of two libraries' power
    assert np.count_nonzero(difference) <= 6


def test_rotary_angles_are_products_in_float32(tiny):
    config = dataclasses.replace(tiny, head_dim=64, max_position_embeddings=8192)
    omega = rope.frequencies(config)
    rounded = np.float32(8191) * omega
    exact = 8191 * omega.astype(np.float64)
    angles = rope.angles(config, jnp.array([[8191]]))
    for values, function in zip(angles, (np.cos, np.sin), strict=True):
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
    normed = np.asarray(norm(jnp.asarray(x), jnp.asarray(weight), config))
    wide, scale = x.astype(np.float64), weight.astype(np.float64)
    scaled = wide / np.sqrt(np.mean(wide * wide, axis=-1, keepdims=True) + 1e-5)
    early = (scaled.astype(jnp.bfloat16).astype(np.float64) * scale).astype(jnp.bfloat16)
    late = (scaled * scale).astype(jnp.bfloat16)
    assert normed.dtype == jnp.bfloat16
    # A quotient in float32 that is a last bit off can round the other way: rarely.
    assert np.mean(normed != early) < 0.01
    assert np.mean(late != early) > 0.2


def test_every_module_of_every_layer_has_a_key_of_its_own(params, tokens, tiny):
    received = []

    class Reader(NoAdapter):
        def linear(self, name, x, weight, bias, layer, *, key):
            jax.debug.callback(lambda data: received.append((name, tuple(data.tolist()))), jax.random.key_data(key))
            return super().linear(name, x, weight, bias, layer, key=key)

    jax.block_until_ready(forward(params, tokens, tiny, Reader(), key=jax.random.key(1)))
    jax.effects_barrier()
    layers = jax.random.split(jax.random.key(1), tiny.num_hidden_layers)
    module_keys = {name: [jax.random.fold_in(key, place) for key in layers] for place, name in enumerate(MODULES)}
    expected = [(name, tuple(jax.random.key_data(key).tolist())) for name, keys in module_keys.items() for key in keys]
    assert len(set(expected)) == len(MODULES) * tiny.num_hidden_layers
    assert sorted(received) == sorted(expected)


@pytest.mark.slow
def test_remat_changes_no_gradient_and_saves_less(params, tokens, tiny):
    settings = adapters.LoraConfig(rank=2, alpha=4.0, dropout=0.5, target_modules=("mlp.up_proj", "self_attn.q_proj"))
    adapter = settings.build(jax.random.key(2), tiny, params)
    trained = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(3), leaf.shape), adapter.params)

    def loss(trained, remat):
        logits = forward(params, tokens, tiny, adapter.replace(trained), key=jax.random.key(1), remat=remat)
        return jnp.mean(jnp.square(logits))

    def saved_shapes(remat):
        """Return the shapes, per layer, of the arrays that the backward pass gets from the forward pass."""
        vjp = jax.eval_shape(lambda trained: jax.vjp(partial(loss, remat=remat), trained)[1], trained)
        return {leaf.shape[1:] for leaf in jax.tree.leaves(vjp) if leaf.shape[:1] == (tiny.num_hidden_layers,)}

    plain, mlp, everything = (jax.jit(jax.grad(partial(loss, remat=remat)))(trained) for remat in (False, "mlp", True))
    for other in (mlp, everything):
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), plain, other)
    features, queries = (3, 11, tiny.intermediate_size), (3, 11, 6, 8)
    assert {features, queries} <= saved_shapes(False)
    assert {features, queries} & saved_shapes("mlp") == {queries}
    assert not {features, queries} & saved_shapes(True)


@pytest.mark.slow
def test_capture_returns_the_modules_inputs(params, tokens, tiny):
    names = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    hidden, inputs = jax.jit(hidden_states, static_argnames=("config", "capture"))(params, tokens, tiny, capture=names)
    logits = run(params, tokens, tiny)
    np.testing.assert_allclose(unembed(params, hidden, tiny), logits, rtol=0, atol=1e-5)  # another program
    expected_shapes = {name: (2, 3, 11, tiny.module_shape(name)[1]) for name in names}
    assert {name: values.shape for name, values in inputs.items()} == expected_shapes
    # A layer is the sum of its two branches, both of which the captured inputs give.
    layers, embeddings = params["layers"], params["embed_tokens"][tokens]
    x = embeddings
    for i in range(2):
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            x = x + linear(inputs[name][i], layers[name]["weight"][i])
    np.testing.assert_allclose(unembed(params, rms_norm(x, params["norm"], tiny), tiny), logits, rtol=0, atol=1e-5)
    first = rms_norm(embeddings, layers["input_layernorm"][0], tiny)
    np.testing.assert_allclose(inputs["self_attn.q_proj"][0], first, rtol=1e-5, atol=1e-6)


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
    """Compute softmax attention in float64: heads are repeated, scores masked by minus infinity."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    k, v = (np.repeat(a, q.shape[2] // a.shape[2], axis=2) for a in (k, v))
    scores = np.einsum("bsnd,btnd->bnst", q, k) / np.sqrt(q.shape[3])
    scores = np.where(mask, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.einsum("bnst,btnd->bsnd", weights / weights.sum(axis=-1, keepdims=True), v)


@pytest.mark.parametrize(
    ("length", "keys", "heads", "kv_heads", "masked", "dtype"),
    [
        (1, 1, 2, 2, False, jnp.float32),
        (70, 70, 6, 2, False, jnp.float32),
        (70, 70, 2, 1, True, jnp.float32),
        (3, 70, 6, 3, True, jnp.float32),
        (130, 134, 2, 2, False, jnp.float32),
        (70, 70, 4, 2, False, jnp.bfloat16),
        (70, 70, 4, 2, False, jnp.float16),
    ],
)
def test_attention_equals_its_definition(length, keys, heads, kv_heads, masked, dtype):
    random_keys = jax.random.split(jax.random.key(length), 3)
    q = jax.random.normal(random_keys[0], (2, length, heads, 8)).astype(dtype)
    k, v = (jax.random.normal(key, (2, keys, kv_heads, 8)).astype(dtype) for key in random_keys[1:])
    causal = np.arange(keys)[None, :] <= np.arange(keys - length, keys)[:, None]
    mask = np.broadcast_to(causal[None, None], (2, 1, length, keys)).copy()
    if masked:
        mask[1, :, :, :2] = False
        mask[:, :, :, 2] = True
    out = jax.jit(attend)(q, k, v, jnp.asarray(mask) if masked else None)
    assert out.dtype == dtype
    # In half precision, probabilities and output are rounded once each: two roundings of values up to about 2.
    tolerance = 3e-6 if dtype == jnp.float32 else 4 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(out.astype(jnp.float32), plain_attention(q, k, v, mask), rtol=0, atol=tolerance)


@pytest.mark.parametrize("masked", [False, True])
def test_blocked_attention_has_the_gradient_of_the_plain_form(masked):
    shape = jax.random.split(jax.random.key(5), 4)
    q, g = (jax.random.normal(key, (2, 130, 6, 8)) for key in shape[:2])
    k, v = (jax.random.normal(key, (2, 133, 3, 8)) for key in shape[2:])
    mask = None
    if masked:
        seen = np.arange(133)[None, :] <= np.arange(3, 133)[:, None]
        mask = jnp.asarray(seen[None, None] & (np.arange(133) >= np.array([0, 40])[:, None])[:, None, None])

    def plain(q, k, v, mask):
        visible = causal_mask(130, 133, 3)[None, None] if mask is None else mask
        return jax.nn.dot_product_attention(q, k, v, mask=visible, implementation="xla")

    def gradient(attention):
        def loss(q, k, v):
            out = attention(q, k, v, mask)
            # Queries that see nothing give no meaningful output; here they are the first rows of the second.
            return jnp.sum((out * g)[:, 40:])

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)

    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=1e-5), gradient(attend), gradient(plain))


def test_a_query_without_visible_keys_gives_finite_values_and_no_gradient():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 4, 2, 8))
    mask = jnp.zeros((1, 1, 4, 4), bool)
    out, gradient = jax.jit(jax.value_and_grad(lambda q: jnp.sum(attend(q, k, v, mask, route="blocked"))))(q)
    assert np.isfinite(out)
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_attention_over_parts_equals_its_definition(dtype):
    """The parts are keys that all rows share, keys of each row, and a part of one key."""
    random = np.random.default_rng(0)
    q = random.normal(size=(3, 4, 6, 8)).astype(dtype)
    parts = [random.normal(size=(2, rows, count, 2, 8)).astype(dtype) for rows, count in ((1, 5), (3, 9), (3, 1))]
    mask = random.random((3, 1, 4, 15)) < 0.6
    mask[..., 5] = True  # no query sees nothing
    segments = [(jnp.asarray(k.transpose(0, 2, 3, 1)), jnp.asarray(v.swapaxes(1, 2))) for k, v in parts]
    out = jax.jit(attend_segments)(jnp.asarray(q), segments, jnp.asarray(mask))
    assert out.dtype == dtype
    k, v = (np.concatenate([np.broadcast_to(part[i], (3, *part[i].shape[1:])) for part in parts], 1) for i in (0, 1))
    # Rounded to bfloat16: weights of at most 1 and the output, to 8 bits each.
    tolerance = 3e-6 if dtype == jnp.float32 else 3e-2
    np.testing.assert_allclose(out.astype(jnp.float32), plain_attention(q, k, v, mask), rtol=0, atol=tolerance)
    # Scores of hundreds, whose exponentials float32 does not have.
    assert np.all(np.isfinite(jax.jit(attend_segments)(100 * jnp.asarray(q), segments, jnp.asarray(mask))))


def test_the_number_of_blocks_is_limited():
    """Compile time is bounded: there are at most 16 blocks, however long the sequence is."""
    text = str(jax.make_jaxpr(partial(attend, route="blocked"))(*jnp.zeros((3, 1, 4096, 1, 2))))
    assert 0 < text.count("dot_general") <= 2 * 16


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
    monkeypatch.setattr("rora_theory.lab.llama.attention._has_fused_kernel", lambda: gpu)
    queries, keys, masked = shape
    assert choose_route(jnp.dtype(dtype), head_dim, queries=queries, keys=keys, masked=masked) == expected


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
