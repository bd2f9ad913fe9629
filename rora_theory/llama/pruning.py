r"""Structured pruning: a smaller LLaMA out of a larger one, by what each part contributes on calibration text.

Three kinds of parts are taken out, each by a published criterion.

* A feature of the feed-forward network, an input j of down_proj, and a key/value head with the query heads that share
  it, a block G of inputs of o_proj, by magnitude times activation (Sun et al. 2023, "Wanda"): a weight's score is
  :math:`|W_{ij}| \lVert x_j \rVert_2` over the calibration tokens, and a part's the root of the sum of squares of its
  weights',

  .. math:: s_j = \lVert W_{:,j} \rVert_2\, \lVert x_j \rVert_2, \qquad s_G = \sqrt{\sum_{j \in G} s_j^2}

  so that :math:`s_j` is the Frobenius norm of what the module's outputs lose with feature j.
* A layer by its block influence (Men et al. 2024, "ShortGPT"): one minus the cosine between the residual stream before
  and after it, averaged over tokens.

Every layer keeps as many features and heads as every other, each the best of its own: a Hugging Face configuration has
one width for all. The hidden size stays. Nothing is retrained.
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
from rora_theory.io import frames
from rora_theory.llama import rope
from rora_theory.llama.attention import attend
from rora_theory.llama.config import LlamaConfig
from rora_theory.llama.model import (
    Params,
    abstract_params,
    count_parameters,
    decoder_layer,
    embed,
    linear,
    windowed_layers,
    within_window,
)
from rora_theory.scaling import check_share

if TYPE_CHECKING:
    import pandas as pd

    from rora_theory.llama.loading import Model

COLUMNS = ("layer", "influence", "kept", "heads", "heads_kept_score", "features_kept_score")
"""Of `pruning_table`."""
UNITS = {
    "influence": "mean over tokens of 1 - cosine between the residual stream before and after the layer",
    "heads": "indices of the key/value heads kept",
    "heads_kept_score": "share of the layer's squared score in the heads kept",
    "features_kept_score": "share of the layer's squared score in the feed-forward features kept",
}
MULTIPLE = 8
"""The feed-forward width that `plan_shape` chooses is a multiple of this, as matrix units like it."""
TINY = 1e-30


class Statistics(NamedTuple):
    """Sums over calibration tokens, float32 of one batch; numpy float64 where batches were added.

    Attributes:
      attended: squares of o_proj's inputs.
      gated: squares of down_proj's inputs.
      influence: one minus the cosine between a layer's input and output.
      tokens: their number.
    """

    attended: Any  # [layers, heads x head_dim]
    gated: Any  # [layers, intermediate]
    influence: Any  # [layers]
    tokens: Any


class Scores(NamedTuple):
    """What each part contributes, float64, >= 0; see the module docstring."""

    layers: Float[np.ndarray, " layers"]
    heads: Float[np.ndarray, "layers kv_heads"]
    features: Float[np.ndarray, "layers intermediate"]


class Shape(NamedTuple):
    """What is kept: layers, and of each layer key/value heads (with their query heads) and feed-forward features."""

    layers: int
    kv_heads: int
    width: int


class Kept(NamedTuple):
    """Which parts are kept, in order: layers of the model, and of each kept layer its heads and features."""

    layers: Int[np.ndarray, " n"]
    heads: Int[np.ndarray, "n kept_heads"]
    features: Int[np.ndarray, "n kept_features"]


@partial(jax.jit, static_argnames="config")
def batch_statistics(params: Params, tokens: Int[Array, "b s"], config: LlamaConfig) -> Statistics:
    """Sums over the tokens of a batch of whole sequences; those of several batches add up."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
    angles = rope.layer_angles(config, positions)

    def squares(u: Array) -> Array:
        return jnp.sum(jnp.square(u.astype(jnp.float32)), axis=(0, 1))

    def body(x: Array, xs: tuple[Params, Array | None]) -> tuple[Array, tuple[Array, Array, Array]]:
        weights, windowed = xs
        seen: dict[str, Array] = {}

        def apply(name: str, u: Array) -> Array:
            seen[name] = u
            return linear(u, weights[name]["weight"], weights[name].get("bias"))

        def attend_all(q: Array, k: Array, v: Array) -> Array:
            return attend(q, k, v, within_window(config, None, positions, positions, k.shape[1], windowed))

        y = decoder_layer(x, weights, config, angles(windowed), apply, attend_all)
        before, after = x.astype(jnp.float32), y.astype(jnp.float32)
        norms = jnp.linalg.norm(before, axis=-1) * jnp.linalg.norm(after, axis=-1)
        cosine = jnp.sum(before * after, axis=-1) / jnp.maximum(norms, TINY)
        return y, (squares(seen["self_attn.o_proj"]), squares(seen["mlp.down_proj"]), jnp.sum(1.0 - cosine))

    _, sums = jax.lax.scan(body, embed(params, tokens, config), (params["layers"], windowed_layers(config)))
    return Statistics(*sums, jnp.int32(tokens.size))


def calibrate(params: Params, batches: Iterable[Int[np.ndarray, "b s"]], config: LlamaConfig) -> Statistics:
    """`batch_statistics` of several batches, summed in float64."""
    sums: list[Any] = [0.0, 0.0, 0.0, 0.0]
    for tokens in batches:
        found = batch_statistics(params, tokens, config)
        sums = [total + np.asarray(one, np.float64) for total, one in zip(sums, found, strict=True)]
    return Statistics(*sums)


def part_scores(params: Params, statistics: Statistics, config: LlamaConfig) -> Scores:
    """The contribution of every part (module docstring)."""

    def columns(module: str, squares: Any) -> np.ndarray:
        weight = params["layers"][module]["weight"]
        magnitudes = jax.lax.map(lambda w: jnp.sum(jnp.square(w.astype(jnp.float32)), axis=0), weight)
        return np.asarray(magnitudes, np.float64) * np.asarray(squares, np.float64)

    layers, groups = config.num_hidden_layers, config.num_key_value_heads
    heads = columns("self_attn.o_proj", statistics.attended).reshape(layers, groups, -1).sum(axis=-1)
    features = columns("mlp.down_proj", statistics.gated)
    influence = np.asarray(statistics.influence, np.float64) / int(statistics.tokens)
    return Scores(np.maximum(influence, 0.0), np.sqrt(heads), np.sqrt(features))


def plan_shape(
    config: LlamaConfig,
    share: float,
    *,
    layers: int | None = None,
    kv_heads: int | None = None,
    width: int | None = None,
) -> Shape:
    """A shape with at most ``share`` of the model's parameters, embeddings counted.

    Layers, and heads within them, are cut in the same proportion; the feed-forward width takes what is left, in
    steps of `MULTIPLE`. What is given is kept as given; given all three, ``share`` is not looked at.

    Raises:
      InputError: a share outside (0, 1], one that the embeddings alone exceed, or a part the model does not have.
    """
    own = Shape(config.num_hidden_layers, config.num_key_value_heads, config.intermediate_size)
    for name, value, most in zip(Shape._fields, (layers, kv_heads, width), own, strict=True):
        if value is not None and not 1 <= value <= most:
            raise InputError(f"{name} is {value}; accepted are 1 to {most}, the model's")
    check_share("share", share)
    total, inside = count_parameters(config), _count(abstract_params(config)["layers"])
    # Layers and heads in one proportion c leave about c^2 of what is inside the layers.
    cut = math.sqrt(min(1.0, max(0.0, 1 - (1 - share) * total / inside)))
    layers = max(1, round(cut * own.layers)) if layers is None else layers
    kv_heads = max(1, round(cut * own.kv_heads)) if kv_heads is None else kv_heads
    if width is None:
        room = share * total
        fits = [
            step
            for step in _widths(own.width)
            if count_parameters(pruned_config(config, Shape(layers, kv_heads, step))) <= room
        ]
        if not fits:
            least = count_parameters(pruned_config(config, Shape(layers, kv_heads, _widths(own.width)[0])))
            raise InputError(
                f"share is {share}, {int(room):,} parameters; accepted is at least {least / total:.3f} with {layers} "
                f"layers and {kv_heads} key/value heads"
            )
        width = fits[-1]
    return Shape(layers, kv_heads, width)


def choose_parts(scores: Scores, shape: Shape) -> Kept:
    """The parts that contribute most; between equals the earlier."""
    layers = _best(scores.layers, shape.layers)
    heads = np.stack([_best(scores.heads[layer], shape.kv_heads) for layer in layers])
    features = np.stack([_best(scores.features[layer], shape.width) for layer in layers])
    return Kept(layers, heads, features)


def pruned_config(config: LlamaConfig, shape: Shape, full: tuple[int, ...] = ()) -> LlamaConfig:
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


def prune(params: Params, config: LlamaConfig, kept: Kept) -> tuple[Params, LlamaConfig]:
    """The model of the kept parts: their weights as they are, and the configuration."""
    heads, width = config.num_key_value_heads, config.head_dim
    queries = width * (config.num_attention_heads // heads)
    of_queries, of_keys = _positions(kept.heads, queries), _positions(kept.heads, width)
    # Of each module the axis that is cut, counted from the layers' own, and the kept positions along it.
    cuts = {
        "self_attn.q_proj": (1, of_queries),
        "self_attn.k_proj": (1, of_keys),
        "self_attn.v_proj": (1, of_keys),
        "self_attn.o_proj": (2, of_queries),
        "mlp.gate_proj": (1, kept.features),
        "mlp.up_proj": (1, kept.features),
        "mlp.down_proj": (2, kept.features),
    }
    layers: Params = {}
    for name, value in params["layers"].items():
        if name not in cuts:
            layers[name] = value[kept.layers]
            continue
        axis, positions = cuts[name]
        layers[name] = {}
        for kind, tensor in value.items():
            own = tensor[kept.layers]
            # A bias lies along the outputs: cut where they are.
            if kind == "weight" or axis == 1:
                index = positions[:, :, None] if axis == 1 and kind == "weight" else positions
                index = positions[:, None, :] if axis == 2 else index
                own = jnp.take_along_axis(own, jnp.asarray(index), axis=axis)
            layers[name][kind] = own
    shape = Shape(len(kept.layers), kept.heads.shape[1], kept.features.shape[1])
    full = tuple(np.flatnonzero(np.isin(kept.layers, config.full_attention_layers)).tolist())
    return {**params, "layers": layers}, pruned_config(config, shape, full)


def pruned_model(
    model: "Model", batches: Iterable[Int[np.ndarray, "b s"]], shape: Shape
) -> "tuple[Model, pd.DataFrame]":
    """A model's parts that contribute most to some batches of text, as a model, and the `pruning_table` of them."""
    statistics = calibrate(model.params, batches, model.config)
    scores = part_scores(model.params, statistics, model.config)
    kept = choose_parts(scores, shape)
    params, config = prune(model.params, model.config, kept)
    return replace(model, params=params, config=config), pruning_table(scores, kept)


def _count(tree: Params) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _best(scores: np.ndarray, count: int) -> np.ndarray:
    return np.sort(np.argsort(-scores, kind="stable")[:count])


def _positions(blocks: np.ndarray, size: int) -> np.ndarray:
    """Positions of blocks of ``size``: [n, blocks] to [n, blocks x size]."""
    return (blocks[:, :, None] * size + np.arange(size)[None, None, :]).reshape(len(blocks), -1)


def _widths(most: int) -> list[int]:
    return [*range(MULTIPLE, most, MULTIPLE), most]


def pruning_table(scores: Scores, kept: Kept) -> "pd.DataFrame":
    """A row for each layer of the original: its influence, and what was kept of it.

    ``heads`` are indices; ``heads_kept_score`` and ``features_kept_score`` are shares of the layer's squared score.
    """
    rows = []
    for layer, influence in enumerate(scores.layers.tolist()):
        row: dict[str, Any] = {"layer": layer, "influence": influence, "kept": layer in kept.layers}
        if row["kept"]:
            at = kept.layers.tolist().index(layer)
            row["heads"] = " ".join(map(str, kept.heads[at].tolist()))
            for name, values, chosen in (
                ("heads_kept_score", scores.heads[layer], kept.heads[at]),
                ("features_kept_score", scores.features[layer], kept.features[at]),
            ):
                total = float(np.sum(values**2))
                row[name] = float(np.sum(values[chosen] ** 2)) / total if total else 1.0
        rows.append(row)
    return frames.from_rows(rows, COLUMNS)
