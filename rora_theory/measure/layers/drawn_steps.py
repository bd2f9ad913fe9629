"""Adapters really drawn and stepped: they know no law, and judge the one of `module_regime`."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from rora_theory import inits
from rora_theory.inits import Init
from rora_theory.measure.layers.layer_data import SPLITS, Layer
from rora_theory.measure.regimes.module_regime import TAKEOVER_ROWS, RegimeConfig
from rora_theory.optimizers import EPSILON, make_optimizer
from rora_theory.random.draws import draw_A, stream_key
from rora_theory.stats.estimate import root
from rora_theory.stats.moments import Moments
from rora_theory.theory.laws import Optimizer
from rora_theory.validation.rules import name_of


def measured(config: RegimeConfig, layer: Layer) -> dict[tuple, dict[str, Any]]:
    """The rms that adapters of each rank measure under the first rule, by the keys of `predict`."""
    rule = config.rules[0]
    size, count = config.blocks
    found = {}
    for init in config.inits:
        stream = steps(
            layer,
            stream_key(config.seed, f"{layer.name} {init}"),
            ranks=config.ranks,
            scalings=[[scaling] for scaling in config.scalings(rule)],
            optimizers=config.optimizers,
            learning_rate=config.lr,
            init=init,
            rows=size,
        )
        moments: dict[tuple, Moments] = {}
        for _ in range(count):
            for rank, part in zip(config.ranks, next(stream), strict=True):
                for o, optimizer in enumerate(config.optimizers):
                    for s, split in enumerate(SPLITS):
                        key = (init, optimizer, name_of(rule), rank, split)
                        moments[key] = moments.get(key, Moments()).add(part[:, 0, o, s])
        for key, total in moments.items():
            estimate = root(total.mean)
            figures = {"measured": estimate.value, "standard_error": estimate.error, "adapters": total.count}
            found[key] = figures
    return found


def takeover_rows(config: RegimeConfig, layer: Layer, init: Init) -> Float[np.ndarray, "rows p_in"]:
    """The rows of A from which `module_regime.takeover` tells when A leads."""
    key = stream_key(config.seed, f"{layer.name} {init} takeover")
    return np.asarray(draw_A(key, init, rank=TAKEOVER_ROWS, p_in=layer.grad.shape[1]))


def steps(
    layer: Layer,
    key: PRNGKeyArray,
    *,
    ranks: Sequence[int],
    scalings: Sequence[Sequence[float]],
    optimizers: Sequence[Optimizer],
    learning_rate: float,
    init: inits.Init,
    rows: int,
    epsilon: float = EPSILON,
) -> Iterator[list[Float[np.ndarray, "adapters rules optimizers splits"]]]:
    r"""Without end, adapters drawn, stepped with optax and read: the mean of w_i^2 over tokens and outputs of each.

    A block draws ``rows`` rows of A once and deals them out anew at every rank: rows // r adapters of rank r, each of
    independent rows. So :math:`\partial L/\partial B = \gamma G A^T`, the costly product, is made once for all ranks;
    adapters of different ranks share rows and are not independent of each other.

    Args:
      layer: gradient and inputs.
      key: of the stream; block i draws from ``fold_in(key, i)``.
      ranks: at most ``rows`` each.
      scalings: gamma of each rank, under one or more rules.
      optimizers: whose first step is taken, each from the same gradient.
      learning_rate, init, epsilon: of the step.
      rows: of A in a block.

    Yields:
      for each rank an array; splits are the keys of ``layer.inputs`` in their order.
    """
    data = jax.device_put((layer.grad, tuple(layer.inputs.values())))
    gammas = tuple(tuple(jnp.float32(scaling) for scaling in each) for each in scalings)
    block = 0
    while True:
        found = _block(
            jax.random.fold_in(key, block),
            *data,
            gammas,
            jnp.float32(learning_rate),
            ranks=tuple(ranks),
            optimizers=tuple(optimizers),
            init=init,
            rows=rows,
            epsilon=epsilon,
        )
        yield [np.asarray(each, np.float64) for each in found]
        block += 1


@partial(jax.jit, static_argnames=("ranks", "optimizers", "init", "rows", "epsilon"))
def _block(
    key: PRNGKeyArray,
    grad: Array,
    inputs: tuple[Array, ...],
    scalings: tuple[tuple[Array, ...], ...],
    learning_rate: Array,
    *,
    ranks: tuple[int, ...],
    optimizers: tuple[Optimizer, ...],
    init: inits.Init,
    rows: int,
    epsilon: float,
) -> list[Float[Array, "adapters rules optimizers splits"]]:
    p_out, p_in = grad.shape
    drawn = draw_A(key, init, rank=rows, p_in=p_in)
    deviation = inits.entries(init, rank=rows, p_in=p_in).deviation
    gradient = jnp.einsum("oi,ri->or", grad, drawn)  # of <G, B A> in B
    inner = [jnp.einsum("ti,ri->tr", x, drawn) for x in inputs]  # A x'
    found = []
    for rank, gammas in zip(ranks, scalings, strict=True):
        count = rows // rank
        used = count * rank
        relative = inits.entries(init, rank=rank, p_in=p_in).deviation / deviation
        by_rule = []
        for gamma in gammas:
            by_optimizer = []
            for name in optimizers:
                transformation = make_optimizer(name, learning_rate, epsilon=epsilon)
                slope = gamma * relative * gradient[:, :used]
                zero = jnp.zeros_like(slope)
                with jax.numpy_dtype_promotion("standard"):  # optax mixes floats and its integer step count
                    lora_B, _ = transformation.update(slope, transformation.init(zero), zero)
                lora_B = lora_B.reshape(p_out, count, rank)
                read_at = [(gamma * relative * each[:, :used]).reshape(-1, count, rank) for each in inner]
                by_optimizer.append(jnp.stack([_mean_squares(lora_B, each) for each in read_at], axis=-1))
            by_rule.append(jnp.stack(by_optimizer, axis=1))
        found.append(jnp.stack(by_rule, axis=1))
    return found


def _mean_squares(
    lora_B: Float[Array, "p_out adapters r"], inner: Float[Array, "tokens adapters r"]
) -> Float[Array, " adapters"]:
    """Mean of w_i^2 over tokens and outputs, w = B (gamma A x'), of each adapter.

    At a low rank through the Gram matrices of B and of A x', as in `layer_data`.
    """
    p_out, _, rank = lora_B.shape
    tokens = inner.shape[0]
    if rank * (tokens + p_out) >= tokens * p_out:
        w = jnp.einsum("onr,tnr->not", lora_B, inner)
        return jnp.mean(w**2, axis=(1, 2))
    grams = jnp.einsum("onr,ons->nrs", lora_B, lora_B) * jnp.einsum("tnr,tns->nrs", inner, inner)
    return jnp.sum(grams, axis=(1, 2)) / (tokens * p_out)
