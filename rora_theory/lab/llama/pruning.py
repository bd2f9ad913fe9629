r"""Structured pruning: a smaller model from a larger one, chosen by each part's contribution on calibration text.

Three kinds of parts are removed, each by a published criterion.

* Features of the feed-forward network, and key/value heads with the query heads that share them, by magnitude times
  activation (Sun et al. 2023, "Wanda"). A feature is an input j of down_proj, a head a block G of inputs of o_proj. The
  score of a weight is :math:`|W_{ij}| \lVert x_j \rVert_2` over the calibration tokens, and that of a part the root of
  the sum of squares over its weights,

  .. math:: s_j = \lVert W_{:,j} \rVert_2\, \lVert x_j \rVert_2, \qquad s_G = \sqrt{\sum_{j \in G} s_j^2}

  so that :math:`s_j` is the Frobenius norm of the change in the module's outputs if feature j is removed.
* Layers by their block influence (Men et al. 2024, "ShortGPT"): one minus the cosine between the residual stream before
  and after the layer, averaged over tokens.

Every layer keeps the same number of features and heads, the best ones of that layer, because a Hugging Face
configuration has one width for all layers. The hidden size stays. Nothing is retrained.
"""

import math
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rora_theory.errors import InputError
from rora_theory.lab.llama import rope
from rora_theory.lab.llama.attention import attend
from rora_theory.lab.llama.config import LlamaConfig
from rora_theory.lab.llama.model import (
    Params,
    abstract_params,
    apply_window,
    count_parameters,
    decoder_layer,
    embed,
    linear,
    windowed_layers,
)
from rora_theory.lab.llama.quantised import dense_params
from rora_theory.runs import frames
from rora_theory.scaling import check_share

if TYPE_CHECKING:
    import pandas as pd

    from rora_theory.lab.llama.loading import Model

COLUMNS = ("layer", "influence", "kept", "heads", "heads_kept_score", "features_kept_score")
"""Columns of `pruning_table`."""
UNITS = {
    "influence": "mean over tokens of 1 - cosine between the residual stream before and after the layer",
    "heads": "indices of the key/value heads kept",
    "heads_kept_score": "share of the layer's squared score in the heads kept",
    "features_kept_score": "share of the layer's squared score in the feed-forward features kept",
}
MULTIPLE = 8
"""Divisor of the feed-forward width that `plan_shape` chooses, for the sake of matrix units."""
MIN_NORM_PRODUCT = 1e-30
"""Lower bound of the denominator of a cosine."""


class Statistics(NamedTuple):
    """Sums over calibration tokens: float32 for one batch, NumPy's float64 for several.

    Attributes:
      attended: Squares of o_proj's inputs, [layers, heads x head_dim].
      gated: Squares of down_proj's inputs, [layers, intermediate].
      influence: One minus the cosine between a layer's input and output, [layers].
      tokens: Number of tokens.
    """

    attended: Any
    gated: Any
    influence: Any
    tokens: Any


class Scores(NamedTuple):
    """Contribution of each part, see the module docstring.

    Attributes:
      layers: Block influence of each layer.
      heads: Score of each key/value head.
      features: Score of each feed-forward feature.
    """

    layers: Float[np.ndarray, " layers"]
    heads: Float[np.ndarray, "layers kv_heads"]
    features: Float[np.ndarray, "layers intermediate"]


class PrunedShape(NamedTuple):
    """Sizes of a pruned model.

    Attributes:
      layers: Number of layers.
      kv_heads: Number of key/value heads a layer, with their query heads.
      width: Number of feed-forward features a layer.
    """

    layers: int
    kv_heads: int
    width: int


class KeptParts(NamedTuple):
    """Indices of the parts to keep, in increasing order.

    Attributes:
      layers: Layers of the model.
      heads: Key/value heads of each kept layer.
      features: Feed-forward features of each kept layer.
    """

    layers: Int[np.ndarray, " n"]
    heads: Int[np.ndarray, "n kept_heads"]
    features: Int[np.ndarray, "n kept_features"]


@partial(jax.jit, static_argnames="config")
def batch_statistics(params: Params, tokens: Int[Array, "b s"], config: LlamaConfig) -> Statistics:
    """Compute the sums over the tokens of a batch of whole sequences; the sums of several batches add up."""
    # Calibration batches are whole sequences: attention is causal, with the layer's window if it has one.
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
    angles = rope.layer_angles(config, positions)

    def squares(u: Array) -> Array:
        return jnp.sum(jnp.square(u.astype(jnp.float32)), axis=(0, 1))

    def body(x: Array, xs: tuple[Params, Array | None]) -> tuple[Array, tuple[Array, Array, Array]]:
        weights, windowed = xs
        module_inputs: dict[str, Array] = {}

        # Record the inputs of the modules whose columns are scored.
        def apply(name: str, u: Array) -> Array:
            module_inputs[name] = u
            return linear(u, weights[name]["weight"], weights[name].get("bias"))

        def attend_to_all(q: Array, k: Array, v: Array) -> Array:
            return attend(q, k, v, apply_window(config, None, positions, positions, k.shape[1], windowed))

        # The layer, and the cosine between its input and its output for each token.
        y = decoder_layer(x, weights, config, angles(windowed), apply, attend_to_all)
        before, after = x.astype(jnp.float32), y.astype(jnp.float32)
        norms = jnp.linalg.norm(before, axis=-1) * jnp.linalg.norm(after, axis=-1)
        cosine = jnp.sum(before * after, axis=-1) / jnp.maximum(norms, MIN_NORM_PRODUCT)
        attended, gated = module_inputs["self_attn.o_proj"], module_inputs["mlp.down_proj"]
        return y, (squares(attended), squares(gated), jnp.sum(1.0 - cosine))

    # Only the sums leave the scan, so no layer's activations stay in memory.
    _, sums = jax.lax.scan(body, embed(params, tokens, config), (params["layers"], windowed_layers(config)))
    return Statistics(*sums, jnp.int32(tokens.size))


def sum_statistics(params: Params, batches: Iterable[Int[np.ndarray, "b s"]], config: LlamaConfig) -> Statistics:
    """Compute the statistics of several batches, summed in float64."""
    sums: list[Any] = [0.0, 0.0, 0.0, 0.0]
    for tokens in batches:
        statistics = batch_statistics(params, tokens, config)
        sums = [total + np.asarray(part, np.float64) for total, part in zip(sums, statistics, strict=True)]
    return Statistics(*sums)


def score_parts(params: Params, statistics: Statistics, config: LlamaConfig) -> Scores:
    """Compute the contribution of every part, see the module docstring."""

    def squared_scores(module: str, squares: Any) -> np.ndarray:
        # For each input of the module: squared norm of its column of weights times its squared activation.
        weight = params["layers"][module]["weight"]
        magnitudes = jax.lax.map(lambda w: jnp.sum(jnp.square(w.astype(jnp.float32)), axis=0), weight)
        return np.asarray(magnitudes, np.float64) * np.asarray(squares, np.float64)

    # Each key/value head is scored by the inputs of o_proj that its query heads produce.
    layers, groups = config.num_hidden_layers, config.num_key_value_heads
    heads = squared_scores("self_attn.o_proj", statistics.attended).reshape(layers, groups, -1).sum(axis=-1)
    features = squared_scores("mlp.down_proj", statistics.gated)
    # Influence is 1 minus a cosine, and rounding can make it slightly negative.
    influence = np.asarray(statistics.influence, np.float64) / int(statistics.tokens)
    return Scores(np.maximum(influence, 0.0), np.sqrt(heads), np.sqrt(features))


def plan_shape(config: LlamaConfig, share: float) -> PrunedShape:
    """Choose the sizes of a pruned model with at most ``share`` of the model's parameters, embeddings included.

    Layers, and heads within them, are cut in the same proportion. The feed-forward width uses the remaining parameters,
    in steps of `MULTIPLE`.

    Raises:
      InputError: The share is outside (0, 1] or smaller than that of the embeddings.
    """
    check_share("share", share)
    total, inside = count_parameters(config), _count(abstract_params(config)["layers"])
    # Cutting layers and heads in the same proportion c leaves about c^2 of the parameters inside the layers.
    cut = math.sqrt(min(1.0, max(0.0, 1 - (1 - share) * total / inside)))
    layers = max(1, round(cut * config.num_hidden_layers))
    kv_heads = max(1, round(cut * config.num_key_value_heads))
    # The widest feed-forward that fits, found by counting exactly, since the square root above is an approximation.
    max_parameters = share * total
    counts = {
        width: count_parameters(pruned_config(config, PrunedShape(layers, kv_heads, width)))
        for width in [*range(MULTIPLE, config.intermediate_size, MULTIPLE), config.intermediate_size]
    }
    fitting_widths = [width for width, count in counts.items() if count <= max_parameters]
    if not fitting_widths:
        raise InputError(
            f"share must be at least {min(counts.values()) / total:.3f} with {layers} layers and {kv_heads} "
            f"key/value heads, got {share} ({int(max_parameters):,} parameters)"
        )
    return PrunedShape(layers, kv_heads, fitting_widths[-1])


def choose_parts(scores: Scores, shape: PrunedShape) -> KeptParts:
    """Choose the parts that contribute most; among equal ones the earlier."""
    layers = _best(scores.layers, shape.layers)
    heads = np.stack([_best(scores.heads[layer], shape.kv_heads) for layer in layers])
    features = np.stack([_best(scores.features[layer], shape.width) for layer in layers])
    return KeptParts(layers, heads, features)


def pruned_config(config: LlamaConfig, shape: PrunedShape, full: tuple[int, ...] = ()) -> LlamaConfig:
    """Return the configuration of a model of this shape whose layers ``full`` have no sliding window."""
    shared = config.num_attention_heads // config.num_key_value_heads
    has_window = len(full) < shape.layers
    return replace(
        config,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.kv_heads * shared,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.width,
        sliding_window=config.sliding_window if has_window else None,
        full_attention_layers=full if has_window else (),
    )


def prune(params: Params, config: LlamaConfig, parts: KeptParts) -> tuple[Params, LlamaConfig]:
    """Return the unchanged weights of the kept parts, and the configuration of their model."""
    heads, width = config.num_key_value_heads, config.head_dim
    # A key/value head is kept with all query heads that share it.
    queries = width * (config.num_attention_heads // heads)
    query_positions, key_positions = _positions(parts.heads, queries), _positions(parts.heads, width)
    # The axis of each module that is cut (0 is the axis of the layers), and the kept positions along it.
    cuts = {
        "self_attn.q_proj": (1, query_positions),
        "self_attn.k_proj": (1, key_positions),
        "self_attn.v_proj": (1, key_positions),
        "self_attn.o_proj": (2, query_positions),
        "mlp.gate_proj": (1, parts.features),
        "mlp.up_proj": (1, parts.features),
        "mlp.down_proj": (2, parts.features),
    }
    layers: Params = {}
    # Keep the rows of the kept layers; parts within a layer differ from layer to layer, so they are gathered by index.
    for name, value in params["layers"].items():
        if name not in cuts:
            layers[name] = value[parts.layers]
            continue
        axis, positions = cuts[name]
        layers[name] = {}
        for kind, tensor in value.items():
            selected = tensor[parts.layers]
            # A bias has one entry for each output, so it is cut with the outputs (axis 1) only.
            if kind == "weight" or axis == 1:
                index = positions[:, :, None] if axis == 1 and kind == "weight" else positions
                index = positions[:, None, :] if axis == 2 else index
                selected = jnp.take_along_axis(selected, jnp.asarray(index), axis=axis)
            layers[name][kind] = selected
    # Among the kept layers, those without a sliding window keep having none.
    shape = PrunedShape(len(parts.layers), parts.heads.shape[1], parts.features.shape[1])
    full = tuple(np.flatnonzero(np.isin(parts.layers, config.full_attention_layers)).tolist())
    return {**params, "layers": layers}, pruned_config(config, shape, full)


def prune_model(
    model: "Model", batches: Iterable[Int[np.ndarray, "b s"]], shape: PrunedShape
) -> "tuple[Model, pd.DataFrame]":
    """Prune a model to the parts that contribute most on batches of text.

    Returns:
      The pruned model, and the `pruning_table` of its parts.
    """
    params = dense_params(model.params)
    statistics = sum_statistics(params, batches, model.config)
    scores = score_parts(params, statistics, model.config)
    parts = choose_parts(scores, shape)
    params, config = prune(params, model.config, parts)
    return replace(model, params=params, config=config), pruning_table(scores, parts)


def _count(tree: Params) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _best(scores: np.ndarray, count: int) -> np.ndarray:
    return np.sort(np.argsort(-scores, kind="stable")[:count])


def _positions(blocks: np.ndarray, size: int) -> np.ndarray:
    """Expand indices of blocks to positions: [n, blocks] to [n, blocks x size]."""
    return (blocks[:, :, None] * size + np.arange(size)[None, None, :]).reshape(len(blocks), -1)


def pruning_table(scores: Scores, parts: KeptParts) -> "pd.DataFrame":
    """Make a table with one row for each layer of the original model, see `UNITS`."""
    rows = []
    for layer, influence in enumerate(scores.layers.tolist()):
        row: dict[str, Any] = {"layer": layer, "influence": influence, "kept": layer in parts.layers}
        if row["kept"]:
            at = parts.layers.tolist().index(layer)
            row["heads"] = " ".join(map(str, parts.heads[at].tolist()))
            for name, values, chosen in (
                ("heads_kept_score", scores.heads[layer], parts.heads[at]),
                ("features_kept_score", scores.features[layer], parts.features[at]),
            ):
                total = float(np.sum(values**2))
                # Share of the squared score that the kept parts hold; the scores are norms.
                row[name] = float(np.sum(values[chosen] ** 2)) / total if total else 1.0
        rows.append(row)
    return frames.from_rows(rows, COLUMNS)
