r"""The LLaMA transformer and the families close to it, as pure functions over a dictionary of arrays.

A layer maps the residual stream x by :math:`x \leftarrow x + W_o\,\mathrm{attn}(W_q u, W_k u, W_v u)` with
:math:`u = \mathrm{norm}(x)`, then :math:`x \leftarrow x + W_{down}(\mathrm{silu}(W_{gate} u) \odot W_{up} u)`
(Touvron et al. 2023). Other families normalise each head's queries and keys or the outputs of attention and of the
feed-forward network, scale the embeddings, use GELU, or hide all but the last positions from the queries of some
layers; `families` lists the differences. Weights keep Hugging Face's orientation [out, in]; the layers are stacked on a
leading axis and scanned, so that a model compiles in the time of one layer.

    params = {
        "embed_tokens": [V, d],
        "layers": {
            "input_layernorm": [L, d],
            "post_attention_layernorm": [L, d] (and the family's further norms),
            "self_attn.q_norm", "self_attn.k_norm": [L, head_dim] (where the configuration has them),
            "self_attn.q_proj": {"weight": [L, out, in], "bias": [L, out] (where the configuration has it)},
            ...
        },
        "norm": [d],
        "lm_head": [V, d] (absent when the embeddings are tied)
    }

A module's weight may be held in blocks of few bits in place of an array, see `quantised`.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray, Shaped

from rora_theory.errors import InputError
from rora_theory.llama import rope
from rora_theory.llama.attention import attend, causal
from rora_theory.llama.config import MODULES, LlamaConfig
from rora_theory.llama.quantised import Quantised, abstract, check_quantization, dense, is_quantised, random

REMATS = (False, "mlp", True)
"""What of a layer is made again in the backward pass: what is elementwise; the feed-forward network's products too;
or all. Kept arrays are stacked over the layers, which on a CPU costs about as much as the products that it saves."""

PRODUCT, SMALL = "product", "small"
"""Names by which an adapter has a result of its own kept (`jax.ad_checkpoint.checkpoint_name`): with ``remat`` False,
and always."""

# The last is cuDNN's kernel: a primitive whose results have no names.
_ATTENTION = (
    "query",
    "key",
    "value",
    "attention",
    "log",
    "after_attention",
    "attended",
    "dot_product_attention_fwd_wrapper",
)
_FEED_FORWARD = ("gate", "up", "after_feed_forward")
_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
}

Params: TypeAlias = dict[str, Any]
Cache: TypeAlias = dict[str, Array]


@runtime_checkable
class Adapter(Protocol):
    """What a model asks of an adapter. Any pytree with these three methods will do."""

    def layers(self) -> Any:
        """Pytree of arrays with a leading axis of ``num_hidden_layers``, scanned beside the weights."""
        ...

    def linear(
        self,
        name: str,
        x: Float[Array, "b s i"],
        weight: Float[Array, "o i"],
        bias: Float[Array, " o"] | None,
        layer: Any,
        *,
        key: PRNGKeyArray | None,
    ) -> Float[Array, "b s o"]:
        """The adapted module ``name`` of one layer; `linear` where the adapter leaves it alone.

        Called for every name in `MODULES`. ``layer`` is that layer's slice of `layers`; ``key`` is of
        this module in this layer, for dropout, or None in evaluation.
        """
        ...

    def prefix(self, layer: Any) -> tuple[Float[Array, "p k d"], Float[Array, "p k d"]] | None:
        """Extra keys and values that every query may attend to, taken as they are; None for none."""
        ...


class NoAdapter:
    """The base model alone, in the shape of an `Adapter`."""

    def layers(self) -> dict[str, Array]:
        return {}

    def linear(
        self,
        name: str,  # noqa: ARG002
        x: Array,
        weight: Array,
        bias: Array | None,
        layer: Any,  # noqa: ARG002
        *,
        key: PRNGKeyArray | None,  # noqa: ARG002
    ) -> Array:
        return linear(x, weight, bias)

    def prefix(self, layer: Any) -> None:  # noqa: ARG002
        return None


def linear(
    x: Float[Array, "*b i"], weight: Float[Array, "o i"], bias: Float[Array, " o"] | None = None
) -> Float[Array, "*b o"]:
    r""":math:`x W^\top + b`: multiplied in the weight's dtype, accumulated in float32, in ``x``'s dtype."""
    # No preferred_element_type: its transpose would multiply a float32 cotangent by bfloat16 weights, at
    # float32's speed. Every backend accumulates a bfloat16 product in float32 by itself (tested).
    y = jnp.einsum("...i,oi->...o", x.astype(weight.dtype), weight)
    if bias is not None:
        y = y + jnp.broadcast_to(bias, y.shape).astype(y.dtype)
    return y.astype(x.dtype)


def rms_norm(x: Float[Array, "*b d"], weight: Float[Array, " d"], config: LlamaConfig) -> Float[Array, "*b d"]:
    r"""Compute :math:`(c + w) \odot x / \sqrt{\overline{x^2} + \epsilon}`, c the family's offset, in ``x``'s dtype."""
    wide = x.astype(jnp.float32)
    scaled = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + config.rms_norm_eps)
    weight = jnp.broadcast_to(weight, scaled.shape)
    # Rounded where the checkpoints' reference rounds: after the product if there is an offset, before it otherwise.
    if offset := config.family.norm_offset:
        return (scaled * (offset + weight.astype(jnp.float32))).astype(x.dtype)
    return weight.astype(x.dtype) * scaled.astype(x.dtype)


def forward(
    params: Params,
    tokens: Int[Array, "b s"],
    config: LlamaConfig,
    adapter: Adapter | None = None,
    *,
    attention_mask: Shaped[Array, "b s"] | None = None,
    key: PRNGKeyArray | None = None,
    remat: bool | str = False,
    attention: str = "auto",
    capture: Sequence[str] | None = None,
) -> Any:
    """Logits of the next token at every position: [b, s, vocab_size] float32.

    Args:
      params: weights (module docstring); their dtype is the dtype of the activations.
      tokens: ids from 0 to ``vocab_size`` - 1; one outside gives NaN, never another token's embedding.
      config: static.
      adapter: None is the base model.
      attention_mask: [b, s], non-zero at real tokens. Positions count real tokens, so left padding does not
        shift them. A right-padded batch needs none: causal attention never looks right, and the outputs at
        padding mean nothing either way. None is every token real.
      key: of the adapter's dropout; None is evaluation.
      remat: how much of each layer is made again in the backward pass, one of `REMATS`.
      attention: implementation, see `attention.choose_route`.
      capture: names of `MODULES` whose inputs to return too.

    Returns:
      logits, or ``(logits, {name: inputs [layers, b, s, in]})`` when ``capture`` is given.

    Raises:
      InputError: an empty sequence or one above ``max_position_embeddings``, or an unknown route, remat or captured
        name.
    """
    out = hidden_states(
        params,
        tokens,
        config,
        adapter,
        attention_mask=attention_mask,
        key=key,
        remat=remat,
        attention=attention,
        capture=capture,
    )
    if capture is None:
        return unembed(params, out, config)
    return unembed(params, out[0], config), out[1]


def hidden_states(
    params: Params,
    tokens: Int[Array, "b s"],
    config: LlamaConfig,
    adapter: Adapter | None = None,
    *,
    attention_mask: Shaped[Array, "b s"] | None = None,
    positions: Int[Array, "b s"] | None = None,
    visible: Bool[Array, "b s s"] | None = None,
    key: PRNGKeyArray | None = None,
    remat: bool | str = False,
    attention: str = "auto",
    capture: Sequence[str] | None = None,
) -> Any:
    """Output of the final norm, [b, s, hidden_size] in the weights' dtype. Arguments of `forward`, and:

    Args:
      positions: each token's position in its own sequence, where a row holds several sequences or a tree of
        continuations; given together with ``visible``, in place of ``attention_mask``. A row's first position is the
        one that follows what ``adapter.prefix`` holds.
      visible: [b, query, key], True where a query may attend to a key, never a later one: the whole mask, but for the
        sliding window of layers that have one.
    """
    adapter = NoAdapter() if adapter is None else adapter
    unknown = sorted(set(capture or ()) - set(MODULES))
    if unknown:
        raise InputError(f"capture names {unknown[0]!r}; accepted are {', '.join(MODULES)}")
    if (positions is None) != (visible is None) or (visible is not None and attention_mask is not None):
        raise InputError("positions and visible go together, without attention_mask")
    length = tokens.shape[1]
    if positions is None:  # otherwise a row is not one sequence, and positions are the caller's
        _check_length(length, config)
    x = embed(params, tokens, config)
    mask = None
    if positions is not None and visible is not None:
        mask = visible[:, None]
    elif attention_mask is not None:
        real = attention_mask != 0
        positions = jnp.maximum(jnp.cumsum(real.astype(jnp.int32), axis=1) - 1, 0)
        mask = causal(length, length)[None, None] & real[:, None, None, :]
    else:
        positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], tokens.shape)
    angles = rope.layer_angles(config, positions)

    def body(x: Array, xs: tuple[Params, Any, Array | None, Array | None]) -> tuple[Array, dict[str, Array]]:
        weights, slices, own_keys, windowed = xs
        inputs: dict[str, Array] = {}

        def apply(name: str, u: Array) -> Array:
            if capture is not None and name in capture:
                inputs[name] = u
            module = weights[name]
            own = None if own_keys is None else own_keys[MODULES.index(name)]
            return adapter.linear(name, u, dense(module["weight"]), module.get("bias"), slices, key=own)

        def attend_all(q: Array, k: Array, v: Array) -> Array:
            k, v, wide = with_prefix(adapter.prefix(slices), k, v, mask)
            wide = within_window(config, wide, positions, positions, k.shape[1], windowed)
            return attend(q, k, v, wide, route=attention)

        return decoder_layer(x, weights, config, angles(windowed), apply, attend_all), inputs

    keys = None if key is None else _module_keys(key, config.num_hidden_layers)
    xs = (params["layers"], adapter.layers(), keys, windowed_layers(config))
    x, captured = jax.lax.scan(_checkpointed(body, remat), x, xs)
    hidden = rms_norm(x, params["norm"], config)
    return hidden if capture is None else (hidden, captured)


def _module_keys(key: PRNGKeyArray, layers: int) -> Key[Array, "layers modules"]:
    """A key for every module of every layer, in the order of `MODULES`: all in one draw, which is one loop to compile.

    Folded in within the layers, each module had a loop of its own: a third of a training step's time to compile.
    """
    of_layer = jax.vmap(lambda k: jax.vmap(partial(jax.random.fold_in, k))(jnp.arange(len(MODULES))))
    return of_layer(jax.random.split(key, layers))


def output_matrix(params: Params, config: LlamaConfig) -> Float[Array, "v d"]:
    """The matrix from final hidden states to logits, which may be that of the embeddings."""
    matrix: Array = params["embed_tokens"] if config.tie_word_embeddings else params["lm_head"]
    return matrix


def unembed(params: Params, hidden: Float[Array, "*b d"], config: LlamaConfig) -> Float[Array, "*b v"]:
    """Logits [*b, vocab_size] in float32 of final hidden states."""
    weight = output_matrix(params, config)
    return jnp.einsum("...d,vd->...v", hidden.astype(weight.dtype), weight, preferred_element_type=jnp.float32)


def embed(params: Params, tokens: Int[Array, "b s"], config: LlamaConfig) -> Float[Array, "b s d"]:
    """Return the embeddings of tokens; NaN where an id is not in the vocabulary, be it below 0 or too large."""
    inside = jnp.where(tokens < 0, params["embed_tokens"].shape[0], tokens)  # take counts those below 0 from the end
    x = jnp.take(params["embed_tokens"], inside, axis=0, mode="fill", fill_value=jnp.nan)
    # The factor is rounded to the embeddings' dtype, as the checkpoints were trained.
    return x * jnp.asarray(math.sqrt(config.hidden_size), x.dtype) if config.family.scales_embeddings else x


def init_cache(config: LlamaConfig, batch: int, length: int, dtype: DTypeLike = jnp.float32) -> Cache:
    """An empty key/value cache for ``length`` tokens a row.

    Returns:
      ``{"k", "v": [layers, batch, length, kv_heads, head_dim], "real": [batch, length] bool, whether a slot
      holds a real token, "length": int32, the number of slots filled in every row}``.

    Raises:
      InputError: ``length`` above ``max_position_embeddings``.
    """
    _check_length(length, config)
    shape = (config.num_hidden_layers, batch, length, config.num_key_value_heads, config.head_dim)
    return {
        "k": jnp.zeros(shape, dtype),
        "v": jnp.zeros(shape, dtype),
        "real": jnp.zeros((batch, length), bool),
        "length": jnp.zeros((), jnp.int32),
    }


def forward_cached(
    params: Params,
    tokens: Int[Array, "b s"],
    cache: Cache,
    config: LlamaConfig,
    adapter: Adapter | None = None,
    *,
    attention_mask: Shaped[Array, "b s"] | None = None,
) -> tuple[Float[Array, "b v"], Cache]:
    """Read ``tokens`` after what the cache holds: the prompt in one call, then a token a call.

    Args:
      params, config, adapter: as `forward`.
      tokens: [b, s], written to slots ``cache["length"] .. + s``. The caller keeps within the cache's length.
      cache: of `init_cache` or an earlier call; donate it under jit.
      attention_mask: [b, s], non-zero at real tokens of this call: a batch of prompts is padded on the left.
        None is every token real.

    Returns:
      float32 logits at the last of ``tokens``, and the cache with them.
    """
    adapter = NoAdapter() if adapter is None else adapter
    new = tokens.shape[1]
    _check_length(new, config)
    total = cache["k"].shape[2]
    start = cache["length"]
    real = jnp.ones(tokens.shape, bool) if attention_mask is None else attention_mask != 0
    before = jnp.sum(cache["real"].astype(jnp.int32), axis=1, keepdims=True)
    positions = jnp.maximum(before + jnp.cumsum(real.astype(jnp.int32), axis=1) - 1, 0)
    angles = rope.layer_angles(config, positions)
    all_real = jax.lax.dynamic_update_slice_in_dim(cache["real"], real, start, axis=1)
    mask = causal(new, total, start)[None, None] & all_real[:, None, None, :]
    slots_at = None if config.sliding_window is None else slot_positions(all_real)

    def body(
        carry: tuple[Array, Array, Array], xs: tuple[Array, Params, Any, Array | None]
    ) -> tuple[tuple[Array, Array, Array], None]:
        x, keys, values = carry
        layer, weights, slices, windowed = xs

        def apply(name: str, u: Array) -> Array:
            module = weights[name]
            return adapter.linear(name, u, dense(module["weight"]), module.get("bias"), slices, key=None)

        def attend_all(q: Array, k: Array, v: Array) -> Array:
            nonlocal keys, values
            zero = jnp.zeros((), jnp.int32)
            at = (layer, zero, start, zero, zero)
            # The whole cache is carried and written in place: as scan's inputs and outputs it would be
            # copied.
            keys = jax.lax.dynamic_update_slice(keys, k[None].astype(keys.dtype), at)
            values = jax.lax.dynamic_update_slice(values, v[None].astype(values.dtype), at)
            k = jax.lax.dynamic_index_in_dim(keys, layer, 0, keepdims=False).astype(q.dtype)
            v = jax.lax.dynamic_index_in_dim(values, layer, 0, keepdims=False).astype(q.dtype)
            k, v, wide = with_prefix(adapter.prefix(slices), k, v, mask)
            wide = within_window(config, wide, positions, slots_at, k.shape[1], windowed)
            return attend(q, k, v, wide, route="blocked")

        x = decoder_layer(x, weights, config, angles(windowed), apply, attend_all)
        return (x, keys, values), None

    index = jnp.arange(config.num_hidden_layers, dtype=jnp.int32)
    carry = (embed(params, tokens, config), cache["k"], cache["v"])
    xs = (index, params["layers"], adapter.layers(), windowed_layers(config))
    (x, keys, values), _ = jax.lax.scan(body, carry, xs)
    hidden = rms_norm(x[:, -1], params["norm"], config)
    return unembed(params, hidden, config), {"k": keys, "v": values, "real": all_real, "length": start + new}


def abstract_params(config: LlamaConfig, dtype: DTypeLike = jnp.float32, quantization: str = "none") -> Params:
    """The tree of `jax.ShapeDtypeStruct` that the weights of this configuration have.

    Args:
      dtype: of all weights, or of what they are multiplied as.
      quantization: one of `quantised.QUANTIZATIONS`, of the modules' weights; embeddings and norms stay arrays.

    Raises:
      InputError: another quantization, or a module that has no whole number of blocks.
    """
    check_quantization(quantization)
    count, width = config.num_hidden_layers, config.hidden_size

    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

    layers: Params = {name: array(count, width) for name in config.family.norms if name is not None}
    for name in MODULES:
        shape = config.module_shape(name)
        layers[name] = {"weight": array(count, *shape)}
        if quantization != "none":
            layers[name]["weight"] = abstract(name, (count, *shape), jnp.dtype(dtype), quantization)
        if config.has_bias(name):
            layers[name]["bias"] = array(count, shape[0])
    if config.family.has_qk_norm:
        layers |= {name: array(count, config.head_dim) for name in ("self_attn.q_norm", "self_attn.k_norm")}
    params = {"embed_tokens": array(config.vocab_size, width), "layers": layers, "norm": array(width)}
    if not config.tie_word_embeddings:
        params["lm_head"] = array(config.vocab_size, width)
    return params


def count_parameters(config: LlamaConfig) -> int:
    """Number of weights of a model of this configuration, tied embeddings once."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(config)))


def init_params(
    key: PRNGKeyArray, config: LlamaConfig, dtype: DTypeLike = jnp.float32, quantization: str = "none"
) -> Params:
    """Draw random weights for tests and benchmarks: normal with deviation 0.02, biases 0, norms that scale by 1.

    In blocks, weights are uniform with the same deviation; arguments and errors as of `abstract_params`.
    """
    leaves, tree = jax.tree.flatten_with_path(abstract_params(config, dtype, quantization), is_leaf=is_quantised)
    keys = jax.random.split(key, len(leaves))

    def make(path: tuple[Any, ...], leaf: Any, key: PRNGKeyArray) -> Any:
        if isinstance(leaf, Quantised):
            return random(key, leaf, 0.02)
        name = path[-1].key
        if name.endswith("norm"):
            return jnp.full(leaf.shape, 1 - config.family.norm_offset, leaf.dtype)
        if name == "bias":
            return jnp.zeros(leaf.shape, leaf.dtype)
        return (0.02 * jax.random.normal(key, leaf.shape, jnp.float32)).astype(leaf.dtype)

    return jax.tree.unflatten(tree, [make(path, leaf, key) for (path, leaf), key in zip(leaves, keys, strict=True)])


def decoder_layer(
    x: Array,
    weights: Params,
    config: LlamaConfig,
    angles: rope.Angles,
    apply: Callable[[str, Array], Array],
    attend_all: Callable[[Array, Array, Array], Array],
) -> Array:
    """Compute one layer of the residual stream, the one place that has its mathematics.

    Args:
      x: Residual stream [b, s, d].
      weights: Weights of the layer.
      config: Configuration of the model.
      angles: Angles of the layer, from `rope.layer_angles`.
      apply: ``apply(name, u)`` is a module, adapted or not.
      attend_all: ``attend_all(q, k, v)`` is attention over all that the queries may see.
    """
    batch, length, _ = x.shape
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    family, norms = config.family, config.family.norms

    def normed_output(output: Array, norm: str | None, name: str) -> Array:
        # The backward pass of a norm needs its input, which would otherwise cost a matrix product again.
        return output if norm is None else rms_norm(checkpoint_name(output, name), weights[norm], config)

    # Queries, keys and values of every head.
    u = rms_norm(x, weights[norms.before_attention], config)
    q = apply("self_attn.q_proj", u).reshape(batch, length, heads, config.head_dim)
    k = apply("self_attn.k_proj", u).reshape(batch, length, kv_heads, config.head_dim)
    v = apply("self_attn.v_proj", u).reshape(batch, length, kv_heads, config.head_dim)
    if family.has_qk_norm:
        q = rms_norm(q, weights["self_attn.q_norm"], config)
        k = rms_norm(k, weights["self_attn.k_norm"], config)
    q, k = rope.rotate(q, *angles), rope.rotate(k, *angles)
    # Attention divides scores by sqrt(head_dim); another divisor is applied to the queries.
    if config.query_pre_attn_scalar not in (None, config.head_dim):
        q = q * math.sqrt(config.head_dim / config.query_pre_attn_scalar)
    q, k, v = (checkpoint_name(a, name) for a, name in ((q, "query"), (k, "key"), (v, "value")))

    # Attention, added to the residual stream.
    mixed = attend_all(q, k, v).reshape(batch, length, heads * config.head_dim)
    output = apply("self_attn.o_proj", mixed)
    x = checkpoint_name(x + normed_output(output, norms.after_attention, "after_attention"), "attended")

    # Gated feed-forward network, added to the residual stream.
    u = rms_norm(x, weights[norms.before_feed_forward], config)
    gate = checkpoint_name(apply("mlp.gate_proj", u), "gate")
    up = checkpoint_name(apply("mlp.up_proj", u), "up")
    output = apply("mlp.down_proj", _ACTIVATIONS[family.activation](gate) * up)
    return x + normed_output(output, norms.after_feed_forward, "after_feed_forward")


def _checkpointed(body: Callable, remat: bool | str) -> Callable:
    """The body of the scan over layers, that keeps for the backward pass what ``remat`` says and no more."""
    if remat not in REMATS:
        raise InputError(f"remat is {remat!r}; accepted are {', '.join(map(repr, REMATS))}")
    kept = {SMALL}
    if remat in (False, "mlp"):
        kept.update(_ATTENTION)
    if not remat:
        kept.update(_FEED_FORWARD, (PRODUCT,))

    def policy(primitive: Any, *_: Any, **settings: Any) -> bool:
        return (settings["name"] if primitive.name == "name" else primitive.name) in kept

    # Inside a scan the compiler cannot merge the recomputation into the forward pass: no barrier is needed.
    return jax.checkpoint(body, policy=policy, prevent_cse=False)


def with_prefix(
    prefix: tuple[Array, Array] | None, k: Array, v: Array, mask: Array | None
) -> tuple[Array, Array, Array | None]:
    """Keys and values [b, n, kv heads, head_dim] and the mask of attention, with a prefix before them that every query
    sees; as they are where there is none."""
    if prefix is None:
        return k, v, mask
    count = prefix[0].shape[0]
    shape = (k.shape[0], *prefix[0].shape)
    k, v = (
        jnp.concatenate([jnp.broadcast_to(extra[None], shape).astype(own.dtype), own], axis=1)
        for extra, own in zip(prefix, (k, v), strict=True)
    )
    if mask is not None:
        mask = jnp.pad(mask, ((0, 0), (0, 0), (0, 0), (count, 0)), constant_values=True)
    return k, v, mask


def windowed_layers(config: LlamaConfig) -> Bool[Array, " layers"] | None:
    """Return which layers have the sliding window if some have and some have not; None if all are alike."""
    full = config.full_attention_layers
    return jnp.array([layer not in full for layer in range(config.num_hidden_layers)]) if full else None


def slot_positions(real: Bool[Array, "b n"]) -> Int[Array, "b n"]:
    """Position of the token in each slot of a cache, counted over the real ones."""
    return jnp.maximum(jnp.cumsum(real.astype(jnp.int32), axis=1) - 1, 0)


def within_window(
    config: LlamaConfig,
    mask: Bool[Array, "#b 1 s t"] | None,
    at: Int[Array, "#b s"],
    keys_at: Int[Array, "#b n"] | None,
    keys: int,
    windowed: Bool[Array, ""] | None,
) -> Bool[Array, "#b 1 s t"] | None:
    """The mask of one layer: what lies ``sliding_window`` positions or more before a query is hidden from it.

    Args:
      config: without a window, the mask is returned as it is.
      mask: True where a query may attend to a key; None is all up to its own, and positions that all rows share.
      at, keys_at: positions of queries and keys; None where there is no window.
      keys: number of keys t, which may begin with t - n of a prefix, whose positions end where ``keys_at`` begins.
      windowed: whether this layer has the window, of `windowed_layers`.
    """
    window = config.sliding_window
    if window is None or keys_at is None or (mask is None and keys <= window):
        return mask
    before = keys - keys_at.shape[1]
    if mask is None:
        mask = causal(at.shape[1], keys, before)[None, None]
        at, keys_at = at[:1], keys_at[:1]
    first = keys_at[:, :1] - jnp.arange(before, 0, -1, dtype=jnp.int32)[None]
    near = jnp.concatenate([first, keys_at], axis=1)[:, None, None, :] > at[:, None, :, None] - window
    return mask & (near if windowed is None else near | ~windowed)


def _check_length(length: int, config: LlamaConfig) -> None:
    if length < 1:
        raise InputError("sequence length is 0; accepted is one token or more")
    if length > config.max_position_embeddings:
        raise InputError(
            f"sequence length is {length}; accepted is at most {config.max_position_embeddings}, the model's "
            "max_position_embeddings"
        )
