r"""The LLaMA transformer and closely related families, as pure functions of a dictionary of arrays.

A layer maps the residual stream x by :math:`x \leftarrow x + W_o\,\mathrm{attn}(W_q u, W_k u, W_v u)` with
:math:`u = \mathrm{norm}(x)`, then :math:`x \leftarrow x + W_{down}(\mathrm{silu}(W_{gate} u) \odot W_{up} u)`
(Touvron et al. 2023). Other families normalise each head's queries and keys or the outputs of attention and of the
feed-forward network, scale the embeddings, use GELU, or have a sliding window in some layers; `families` lists the
differences. Weights keep Hugging Face's orientation [out, in]. The layers are stacked on a leading axis and scanned, so
that a model compiles in the time of one layer.

    params = {
        "embed_tokens": [V, d],
        "layers": {
            "input_layernorm": [L, d],
            "post_attention_layernorm": [L, d] (and further norms of the family),
            "self_attn.q_norm", "self_attn.k_norm": [L, head_dim] (if the family has them),
            "self_attn.q_proj": {"weight": [L, out, in], "bias": [L, out] (if the configuration has it)},
            ...
        },
        "norm": [d],
        "lm_head": [V, d] (absent when the embeddings are tied)
    }

A module's weight may be a `quantised.QuantisedWeight` in place of an array.
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
from rora_theory.lab.llama import rope
from rora_theory.lab.llama.attention import attend, causal_mask
from rora_theory.lab.llama.config import MODULES, LlamaConfig
from rora_theory.lab.llama.quantised import QUANTIZATIONS, abstract_weight, to_dense
from rora_theory.scaling import check_choice

REMAT_CHOICES = (False, "mlp", True)
"""Parts of a layer that the backward pass recomputes: elementwise operations (False), the feed-forward network's
products too (``"mlp"``), or everything (True). Saved arrays are stacked over the layers, which on a CPU costs about as
much as the products that it saves."""

SAVED_PRODUCT, ALWAYS_SAVED = "product", "small"
"""Names that an adapter gives its results with `jax.ad_checkpoint.checkpoint_name` to have them saved for the backward
pass: with ``remat`` False only, and always."""

# Names of the saved results of attention. The last is cuDNN's kernel, a primitive whose results have no names.
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
"""Weights of a model, in the tree of the module docstring."""
Cache: TypeAlias = dict[str, Array]
"""Keys and values of earlier tokens, see `init_cache`."""


@runtime_checkable
class Adapter(Protocol):
    """Interface of an adapter: any pytree with these three methods."""

    def layers(self) -> Any:
        """Return a pytree of arrays with a leading axis of ``num_hidden_layers``, scanned beside the weights."""
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
        """Apply the module ``name`` of one layer, adapted or not; called for every name in `MODULES`.

        Args:
          name: Name of the module.
          x: Inputs.
          weight: Weight of the module.
          bias: Bias of the module; None if it has none.
          layer: This layer's slice of `layers`.
          key: Random key of this module in this layer, for dropout; None in evaluation.
        """
        ...

    def prefix(self, layer: Any) -> tuple[Float[Array, "p k d"], Float[Array, "p k d"]] | None:
        """Return extra keys and values that every query may attend to, without rotation; None if there are none."""
        ...


class NoAdapter:
    """An `Adapter` that changes nothing: the base model."""

    def layers(self) -> Any:
        """Return no arrays."""
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
        """Apply the base model's module."""
        return linear(x, weight, bias)

    def prefix(self, layer: Any) -> tuple[Array, Array] | None:  # noqa: ARG002
        """Return None: there are no extra keys and values."""
        return None


def linear(
    x: Float[Array, "*b i"], weight: Float[Array, "o i"], bias: Float[Array, " o"] | None = None
) -> Float[Array, "*b o"]:
    r"""Compute :math:`x W^\top + b` in the weight's dtype, accumulated in float32 and returned in ``x``'s dtype."""
    # No preferred_element_type: the backward pass would multiply a float32 cotangent by bfloat16 weights, at float32's
    # speed. Every backend accumulates a bfloat16 product in float32 without being asked (tested).
    y = jnp.einsum("...i,oi->...o", x.astype(weight.dtype), weight)
    if bias is not None:
        y = y + jnp.broadcast_to(bias, y.shape).astype(y.dtype)
    return y.astype(x.dtype)


def rms_norm(x: Float[Array, "*b d"], weight: Float[Array, " d"], config: LlamaConfig) -> Float[Array, "*b d"]:
    r"""Compute :math:`(c + w) \odot x / \sqrt{\overline{x^2} + \epsilon}` in ``x``'s dtype, c the family's offset."""
    wide = x.astype(jnp.float32)
    scaled = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + config.rms_norm_eps)
    weight = jnp.broadcast_to(weight, scaled.shape)
    # Round where the checkpoints' reference rounds: after the product if there is an offset, before it otherwise.
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
) -> Float[Array, "b s v"]:
    """Compute the logits of the next token at every position.

    Args:
      params: Weights, in the tree of the module docstring. Their dtype is the dtype of the activations.
      tokens: Token ids from 0 to ``vocab_size`` - 1. Another id gives NaN, never another token's embedding. It spoils
        its whole row, positions before it and under a mask included, so padding needs a valid id too.
      config: Configuration of the model, static under jit.
      adapter: Adapter that runs beside the weights; None for the base model.
      attention_mask: Array that is non-zero at real tokens; None if all are real. Positions count real tokens, so left
        padding does not shift them. A right-padded batch needs no mask: causal attention does not see later tokens, and
        the outputs at padding are meaningless in any case.
      key: Random key of the adapter's dropout; None for evaluation.
      remat: Parts of each layer that the backward pass recomputes, one of `REMAT_CHOICES`.

    Returns:
      Float32 logits.

    Raises:
      InputError: The sequence is empty or longer than ``max_position_embeddings``, or ``remat`` is unknown.
    """
    hidden = hidden_states(
        params,
        tokens,
        config,
        adapter,
        attention_mask=attention_mask,
        key=key,
        remat=remat,
    )
    return unembed(params, hidden, config)


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
    capture: Sequence[str] | None = None,
) -> Any:
    """Compute the output of the final norm, [b, s, hidden_size] in the weights' dtype.

    Args:
      params: Weights of the model.
      tokens: Token ids, see `forward`.
      config: Configuration of the model, static under jit.
      adapter: Adapter that runs beside the weights; None for the base model.
      attention_mask: Array that is non-zero at real tokens, see `forward`.
      positions: Position of each token in its own sequence, for rows that hold several sequences or a tree of
        continuations. It requires ``visible`` and excludes ``attention_mask``. Position 0 follows the tokens of
        ``adapter.prefix``.
      visible: Mask [b, query, key], True if a query may attend to a key, never a later one. It is complete except for
        the sliding window of layers that have one.
      key: Random key of the adapter's dropout; None for evaluation.
      remat: Parts of each layer that the backward pass recomputes, one of `REMAT_CHOICES`.
      capture: Names of `MODULES` to return the inputs of.

    Returns:
      Hidden states; with ``capture``, also a dictionary of inputs [layers, b, s, in] by name.

    Raises:
      InputError: See `forward`; a captured name is unknown; or only one of ``positions`` and ``visible`` is given.
    """
    adapter = NoAdapter() if adapter is None else adapter
    unknown = sorted(set(capture or ()) - set(MODULES))
    if unknown:
        raise InputError(f"capture must name modules among {', '.join(MODULES)}, got {unknown[0]!r}")
    if (positions is None) != (visible is None) or (visible is not None and attention_mask is not None):
        raise InputError("positions and visible must be passed together, and without attention_mask")
    length = tokens.shape[1]
    # With positions, a row is not one sequence, and its length is not limited.
    if positions is None:
        _check_length(length, config)
    x = embed(params, tokens, config)
    # Positions and mask: the caller's, those of padded sequences, or those of whole ones (no mask: merely causal).
    mask = None
    if positions is not None and visible is not None:
        mask = visible[:, None]
    elif attention_mask is not None:
        real = attention_mask != 0
        positions = jnp.maximum(jnp.cumsum(real.astype(jnp.int32), axis=1) - 1, 0)
        mask = causal_mask(length, length)[None, None] & real[:, None, None, :]
    else:
        positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], tokens.shape)
    angles = rope.layer_angles(config, positions)

    def body(x: Array, xs: tuple[Params, Any, Array | None, Array | None]) -> tuple[Array, dict[str, Array]]:
        weights, slices, module_keys, windowed = xs
        inputs: dict[str, Array] = {}

        def apply(name: str, u: Array) -> Array:
            # The inputs leave the scan as its outputs, stacked over the layers.
            if capture is not None and name in capture:
                inputs[name] = u
            module = weights[name]
            # Dropout has a key for each module of each layer.
            module_key = None if module_keys is None else module_keys[MODULES.index(name)]
            return adapter.linear(name, u, to_dense(module["weight"]), module.get("bias"), slices, key=module_key)

        def attend_to_all(q: Array, k: Array, v: Array) -> Array:
            k, v, layer_mask = prepend_prefix(adapter.prefix(slices), k, v, mask)
            layer_mask = apply_window(config, layer_mask, positions, positions, k.shape[1], windowed)
            return attend(q, k, v, layer_mask)

        return decoder_layer(x, weights, config, angles(windowed), apply, attend_to_all), inputs

    # Scan the layers with what differs between them: weights, adapter, dropout keys, sliding window.
    keys = None if key is None else _module_keys(key, config.num_hidden_layers)
    xs = (params["layers"], adapter.layers(), keys, windowed_layers(config))
    x, captured = jax.lax.scan(_checkpointed(body, remat), x, xs)
    hidden = rms_norm(x, params["norm"], config)
    return hidden if capture is None else (hidden, captured)


def _module_keys(key: PRNGKeyArray, layers: int) -> Key[Array, "layers modules"]:
    """Derive a key for every module of every layer, in the order of `MODULES`.

    All keys are derived in one loop before the layers. Folding in within the layers made a loop for each module, a
    third of the compile time of a training step.
    """
    fold_in_modules = jax.vmap(lambda k: jax.vmap(partial(jax.random.fold_in, k))(jnp.arange(len(MODULES))))
    return fold_in_modules(jax.random.split(key, layers))


def output_matrix(params: Params, config: LlamaConfig) -> Float[Array, "v d"]:
    """Return the matrix from final hidden states to logits, which is that of the embeddings if they are tied."""
    matrix: Array = params["embed_tokens"] if config.tie_word_embeddings else params["lm_head"]
    return matrix


def unembed(params: Params, hidden: Float[Array, "*b d"], config: LlamaConfig) -> Float[Array, "*b v"]:
    """Compute the float32 logits [*b, vocab_size] of final hidden states."""
    weight = output_matrix(params, config)
    return jnp.einsum("...d,vd->...v", hidden.astype(weight.dtype), weight, preferred_element_type=jnp.float32)


def embed(params: Params, tokens: Int[Array, "b s"], config: LlamaConfig) -> Float[Array, "b s d"]:
    """Return the embeddings of tokens; NaN for an id outside the vocabulary, negative or too large."""
    # jnp.take counts negative ids from the end, so move them beyond the end, which it fills with NaN.
    ids = jnp.where(tokens < 0, params["embed_tokens"].shape[0], tokens)
    x = jnp.take(params["embed_tokens"], ids, axis=0, mode="fill", fill_value=jnp.nan)
    # The factor is rounded to the embeddings' dtype, as in training.
    return x * jnp.asarray(math.sqrt(config.hidden_size), x.dtype) if config.family.scales_embeddings else x


def init_cache(config: LlamaConfig, batch: int, length: int, dtype: DTypeLike = jnp.float32) -> Cache:
    """Return an empty key/value cache.

    Args:
      config: Configuration of the model.
      batch: Number of rows.
      length: Number of slots a row.
      dtype: Type of the keys and values.

    Returns:
      A dictionary with ``k`` and ``v`` [layers, batch, length, kv_heads, head_dim]; ``real`` [batch, length], whether a
      slot holds a real token; and ``length``, the number of slots that are filled in every row.

    Raises:
      InputError: ``length`` is above ``max_position_embeddings``.
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
    """Read tokens after those in the cache: a prompt in one call, then one token per call.

    Args:
      params: Weights of the model.
      tokens: Token ids, written to the next s slots of the cache. The caller ensures that they fit.
      cache: Result of `init_cache` or of an earlier call; donate it under jit.
      config: Configuration of the model, static under jit.
      adapter: Adapter that runs beside the weights; None for the base model.
      attention_mask: Array that is non-zero at real tokens of this call; None if all are real. Prompts of different
        lengths are padded on the left.

    Returns:
      Float32 logits after the last token, and the cache with the tokens.
    """
    adapter = NoAdapter() if adapter is None else adapter
    new_count = tokens.shape[1]
    _check_length(new_count, config)
    # Slots of the cache: those up to ``length`` hold tokens of earlier calls, padding included.
    total = cache["k"].shape[2]
    start = cache["length"]
    real = jnp.ones(tokens.shape, bool) if attention_mask is None else attention_mask != 0
    # Positions count the real tokens of this row, those in the cache included.
    before = jnp.sum(cache["real"].astype(jnp.int32), axis=1, keepdims=True)
    positions = jnp.maximum(before + jnp.cumsum(real.astype(jnp.int32), axis=1) - 1, 0)
    angles = rope.layer_angles(config, positions)
    # A query sees the real tokens in the cache and those of this call up to itself.
    all_real = jax.lax.dynamic_update_slice_in_dim(cache["real"], real, start, axis=1)
    mask = causal_mask(new_count, total, start)[None, None] & all_real[:, None, None, :]
    cached_positions = None if config.sliding_window is None else slot_positions(all_real)

    def body(
        carry: tuple[Array, Array, Array], xs: tuple[Array, Params, Any, Array | None]
    ) -> tuple[tuple[Array, Array, Array], None]:
        x, keys, values = carry
        layer, weights, slices, windowed = xs

        def apply(name: str, u: Array) -> Array:
            module = weights[name]
            return adapter.linear(name, u, to_dense(module["weight"]), module.get("bias"), slices, key=None)

        def attend_to_all(q: Array, k: Array, v: Array) -> Array:
            nonlocal keys, values
            # Write the new keys and values to this layer's slots. The whole cache is carried through the scan and
            # updated in place; as inputs and outputs of the scan it would be copied.
            zero = jnp.zeros((), jnp.int32)
            write_start = (layer, zero, start, zero, zero)
            keys = jax.lax.dynamic_update_slice(keys, k[None].astype(keys.dtype), write_start)
            values = jax.lax.dynamic_update_slice(values, v[None].astype(values.dtype), write_start)
            # Attend to all slots of this layer; the mask hides those that are still empty.
            k = jax.lax.dynamic_index_in_dim(keys, layer, 0, keepdims=False).astype(q.dtype)
            v = jax.lax.dynamic_index_in_dim(values, layer, 0, keepdims=False).astype(q.dtype)
            k, v, layer_mask = prepend_prefix(adapter.prefix(slices), k, v, mask)
            layer_mask = apply_window(config, layer_mask, positions, cached_positions, k.shape[1], windowed)
            return attend(q, k, v, layer_mask, route="blocked")

        x = decoder_layer(x, weights, config, angles(windowed), apply, attend_to_all)
        return (x, keys, values), None

    # Each layer needs its index, because it writes to its own part of the cache.
    index = jnp.arange(config.num_hidden_layers, dtype=jnp.int32)
    carry = (embed(params, tokens, config), cache["k"], cache["v"])
    xs = (index, params["layers"], adapter.layers(), windowed_layers(config))
    (x, keys, values), _ = jax.lax.scan(body, carry, xs)
    # Only the last position's logits are needed: prompts are padded on the left, so it is a real token.
    hidden = rms_norm(x[:, -1], params["norm"], config)
    return unembed(params, hidden, config), {"k": keys, "v": values, "real": all_real, "length": start + new_count}


def abstract_params(config: LlamaConfig, dtype: DTypeLike = jnp.float32, quantization: str = "none") -> Params:
    """Return the shapes of the weights of a configuration, as a tree of `jax.ShapeDtypeStruct`.

    Args:
      config: Configuration of the model.
      dtype: Type of the weights; of quantised weights, the type of the dense ones.
      quantization: Storage of the modules' weights, one of `quantised.QUANTIZATIONS`. Embeddings and norms stay arrays.

    Raises:
      InputError: The quantization is unknown, or the number of a module's inputs is not a multiple of the block.
    """
    check_choice("quantization", quantization, QUANTIZATIONS)
    # The arrays of all layers are stacked along a leading axis, for the scan over layers.
    count, width = config.num_hidden_layers, config.hidden_size

    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

    layers: Params = {name: array(count, width) for name in config.family.norms if name is not None}
    for name in MODULES:
        shape = config.module_shape(name)
        layers[name] = {"weight": array(count, *shape)}
        if quantization != "none":
            layers[name]["weight"] = abstract_weight(name, (count, *shape), jnp.dtype(dtype), quantization)
        if config.has_bias(name):
            layers[name]["bias"] = array(count, shape[0])
    # Families that normalise queries and keys have one scale per head dimension, shared by all heads.
    if config.family.has_qk_norm:
        layers |= {name: array(count, config.head_dim) for name in ("self_attn.q_norm", "self_attn.k_norm")}
    params = {"embed_tokens": array(config.vocab_size, width), "layers": layers, "norm": array(width)}
    # Tied models use the embeddings as the output layer.
    if not config.tie_word_embeddings:
        params["lm_head"] = array(config.vocab_size, width)
    return params


def count_parameters(config: LlamaConfig) -> int:
    """Return the number of weights of a model; tied embeddings count once."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(config)))


def init_params(key: PRNGKeyArray, config: LlamaConfig, dtype: DTypeLike = jnp.float32) -> Params:
    """Draw random weights: normal with standard deviation 0.02, biases of 0, and norms that scale by 1.

    Args:
      key: Random key.
      config: Configuration of the model.
      dtype: Type of the weights.
    """
    leaves, tree = jax.tree.flatten_with_path(abstract_params(config, dtype))
    keys = jax.random.split(key, len(leaves))

    def make(path: tuple[Any, ...], leaf: Any, key: PRNGKeyArray) -> Any:
        name = path[-1].key
        # Some families add an offset to the stored scale: store what makes the sum 1.
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
    attend_to_all: Callable[[Array, Array, Array], Array],
) -> Array:
    """Compute one layer of the residual stream; every forward pass calls this function.

    Args:
      x: Residual stream [b, s, d].
      weights: Weights of the layer.
      config: Configuration of the model.
      angles: Angles of the layer, from `rope.layer_angles`.
      apply: Function ``apply(name, u)`` that computes a module, adapted or not.
      attend_to_all: Function ``attend_to_all(q, k, v)`` that computes attention over all keys that the queries see.

    Returns:
      The residual stream after the layer.
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
    mixed = attend_to_all(q, k, v).reshape(batch, length, heads * config.head_dim)
    output = apply("self_attn.o_proj", mixed)
    x = checkpoint_name(x + normed_output(output, norms.after_attention, "after_attention"), "attended")

    # Gated feed-forward network, added to the residual stream.
    u = rms_norm(x, weights[norms.before_feed_forward], config)
    gate = checkpoint_name(apply("mlp.gate_proj", u), "gate")
    up = checkpoint_name(apply("mlp.up_proj", u), "up")
    output = apply("mlp.down_proj", _ACTIVATIONS[family.activation](gate) * up)
    return x + normed_output(output, norms.after_feed_forward, "after_feed_forward")


def _checkpointed(body: Callable, remat: bool | str) -> Callable:
    """Return the body of the scan over layers with the checkpoint policy of ``remat``: only named results are saved."""
    check_choice("remat", remat, REMAT_CHOICES)
    # Results that the backward pass reads from memory; it recomputes all others.
    saved_names = {ALWAYS_SAVED}
    if remat in (False, "mlp"):
        saved_names.update(_ATTENTION)
    if not remat:
        saved_names.update(_FEED_FORWARD, (SAVED_PRODUCT,))

    def policy(primitive: Any, *_: Any, **settings: Any) -> bool:
        return (settings["name"] if primitive.name == "name" else primitive.name) in saved_names

    # Inside a scan the compiler cannot merge the recomputation with the forward pass, so no barrier is needed.
    return jax.checkpoint(body, policy=policy, prevent_cse=False)


def prepend_prefix(
    prefix: tuple[Array, Array] | None, k: Array, v: Array, mask: Array | None
) -> tuple[Array, Array, Array | None]:
    """Prepend a prefix that every query sees to keys, values and mask.

    Args:
      prefix: Keys and values [p, kv_heads, head_dim] for all rows; None changes nothing.
      k: Keys [b, n, kv_heads, head_dim].
      v: Values [b, n, kv_heads, head_dim].
      mask: Mask of attention, or None.
    """
    if prefix is None:
        return k, v, mask
    # Every row of the batch gets a copy of the prefix.
    count = prefix[0].shape[0]
    shape = (k.shape[0], *prefix[0].shape)
    k, v = (
        jnp.concatenate([jnp.broadcast_to(extra[None], shape).astype(states.dtype), states], axis=1)
        for extra, states in zip(prefix, (k, v), strict=True)
    )
    # Every query sees the prefix. Without a mask, attention counts the queries from the last key, so it sees it too.
    if mask is not None:
        mask = jnp.pad(mask, ((0, 0), (0, 0), (0, 0), (count, 0)), constant_values=True)
    return k, v, mask


def windowed_layers(config: LlamaConfig) -> Bool[Array, " layers"] | None:
    """Return which layers have the sliding window, if only some do; None if all layers are alike."""
    full = config.full_attention_layers
    return jnp.array([layer not in full for layer in range(config.num_hidden_layers)]) if full else None


def slot_positions(real: Bool[Array, "b n"]) -> Int[Array, "b n"]:
    """Return the position of the token in each slot of a cache, counted over the real tokens."""
    return jnp.maximum(jnp.cumsum(real.astype(jnp.int32), axis=1) - 1, 0)


def apply_window(
    config: LlamaConfig,
    mask: Bool[Array, "#b 1 s t"] | None,
    query_positions: Int[Array, "#b s"],
    key_positions: Int[Array, "#b n"] | None,
    keys: int,
    windowed: Bool[Array, ""] | None,
) -> Bool[Array, "#b 1 s t"] | None:
    """Hide the keys that lie ``sliding_window`` positions or more before a query from the mask of one layer.

    Args:
      config: Configuration of the model. Without a window, the mask is returned unchanged.
      mask: True if a query may attend to a key. None allows all keys up to the query's own, and requires that all rows
        have the same positions.
      query_positions: Positions of the queries.
      key_positions: Positions of the last n keys; None without a window.
      keys: Number of keys t. The first t - n belong to a prefix, whose positions end where ``key_positions`` begins.
      windowed: Whether this layer has the window, an entry of `windowed_layers`.

    Returns:
      The mask; None if it is merely causal.
    """
    # Nothing to hide: no window, or no more keys than one window holds.
    window = config.sliding_window
    if window is None or key_positions is None or (mask is None and keys <= window):
        return mask
    prefix_keys = keys - key_positions.shape[1]
    # All rows share their positions, so one row of the mask is enough.
    if mask is None:
        mask = causal_mask(query_positions.shape[1], keys, prefix_keys)[None, None]
        query_positions, key_positions = query_positions[:1], key_positions[:1]
    # Positions of all keys: those of the prefix count back from the first key after it.
    prefix_positions = key_positions[:, :1] - jnp.arange(prefix_keys, 0, -1, dtype=jnp.int32)[None]
    all_key_positions = jnp.concatenate([prefix_positions, key_positions], axis=1)
    is_near = all_key_positions[:, None, None, :] > query_positions[:, None, :, None] - window
    return mask & (is_near if windowed is None else is_near | ~windowed)


def _check_length(length: int, config: LlamaConfig) -> None:
    if not 1 <= length <= config.max_position_embeddings:
        raise InputError(
            f"sequence length must be 1 to {config.max_position_embeddings} (the model's max_position_embeddings), "
            f"got {length}"
        )
