"""First steps of adapters that are drawn at random, which test the law of `module_regime` without using it."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from rora_theory import inits
from rora_theory.laws.random.draws import draw_A, stream_key
from rora_theory.measure.regimes.layer import SPLITS, Layer
from rora_theory.measure.regimes.module_regime import RegimeConfig
from rora_theory.optimizers import EPSILON, Optimizer, make_optimizer
from rora_theory.stats.estimate import square_root
from rora_theory.stats.moments import Moments
from rora_theory.validation.rules import name_of


def measure_adapters(config: RegimeConfig, layer: Layer) -> dict[tuple, dict[str, Any]]:
    """Measure the rms of the first change under the first rule, from adapters of each rank.

    Returns:
      The rms with its standard error and the number of adapters, by the keys of `module_regime.predict_rms`.
    """
    rule = config.rules[0]
    size, count = config.blocks
    results = {}
    for init in config.inits:
        stream = step_adapters(
            layer,
            stream_key(config.seed, f"{layer.name} {init}"),
            ranks=config.ranks,
            scalings=[[scaling] for scaling in config.scalings(rule)],
            optimizers=config.optimizers,
            learning_rate=config.lr,
            init=init,
            rows=size,
        )
        # Accumulate the adapters' mean squares over blocks, each an array [adapters, rules, optimizers, splits] for
        # every rank, with the first rule only.
        moments: dict[tuple, Moments] = {}
        for _ in range(count):
            for rank, squares in zip(config.ranks, next(stream), strict=True):
                for optimizer_index, optimizer in enumerate(config.optimizers):
                    for split_index, split in enumerate(SPLITS):
                        key = (init, optimizer, name_of(rule), rank, split)
                        moments[key] = moments.get(key, Moments()).add(squares[:, 0, optimizer_index, split_index])
        # The rms is the root of the mean over adapters.
        for key, total in moments.items():
            rms = square_root(total.mean)
            results[key] = {"measured": rms.value, "standard_error": rms.error, "adapters": total.count}
    return results


def step_adapters(
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
    r"""Draw adapters, step them with optax, and compute the mean of w_i^2 over tokens and outputs of each.

    A block draws ``rows`` rows of A once and groups them anew at every rank r into rows // r adapters of independent
    rows. The costly product, :math:`\partial L/\partial B = \gamma G A^T`, is thus computed once for all ranks.
    Adapters of different ranks share rows and are not independent of each other.

    Args:
      layer: Gradient and inputs.
      key: Key of the stream; block i draws from ``fold_in(key, i)``.
      ranks: Ranks, each at most ``rows``.
      scalings: Scaling gamma of each rank under one or more rules.
      optimizers: Optimizers of the step, each applied to the same gradient.
      rows: Number of rows of A in a block.

    Yields:
      Blocks without end, each a list with an array for every rank. Splits are in the order of ``layer.inputs``.
    """
    # Copy the data to the device once, not for each block.
    data = jax.device_put((layer.grad, tuple(layer.inputs.values())))
    # Scalings are dynamic arguments, so that settings with other rules or alphas reuse the compiled program.
    gammas = tuple(tuple(jnp.float32(scaling) for scaling in by_rule) for by_rule in scalings)
    block = 0
    while True:
        squares = _step_regrouped_rows(
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
        yield [np.asarray(by_rank, np.float64) for by_rank in squares]
        block += 1


@partial(jax.jit, static_argnames=("ranks", "optimizers", "init", "rows", "epsilon"))
def _step_regrouped_rows(
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
    """Draw rows of A once, and step them in groups of every rank with the gradient G A^T that all groups share."""
    p_out, p_in = grad.shape
    # Rows of A for all ranks, with the products that every rank and optimizer shares.
    lora_A = draw_A(key, init, rank=rows, p_in=p_in)
    deviation = inits.entries(init, rank=rows, p_in=p_in).deviation
    gradient_B = jnp.einsum("oi,ri->or", grad, lora_A)  # gradient of <G, B A> with respect to B
    inner = [jnp.einsum("ti,ri->tr", x, lora_A) for x in inputs]  # A x'
    mean_squares = jax.vmap(mean_square, in_axes=(1, 1))  # over adapters, the second axis of both factors
    by_rank = []
    for rank, gammas in zip(ranks, scalings, strict=True):
        # Group the rows into adapters of this rank, and rescale them to its standard deviation.
        count = rows // rank
        row_count = count * rank
        relative_deviation = inits.entries(init, rank=rank, p_in=p_in).deviation / deviation
        by_rule = []
        for gamma in gammas:
            by_optimizer = []
            for name in optimizers:
                # B after one step from zero.
                transformation = make_optimizer(name, learning_rate, epsilon=epsilon)
                gradient = gamma * relative_deviation * gradient_B[:, :row_count]
                zero = jnp.zeros_like(gradient)
                with jax.numpy_dtype_promotion("standard"):  # optax mixes floats and its integer step count
                    lora_B, _ = transformation.update(gradient, transformation.init(zero), zero)
                # Mean squares of w = B (gamma A x') at each split.
                lora_B = lora_B.reshape(p_out, count, rank)
                scaled = [
                    (gamma * relative_deviation * product[:, :row_count]).reshape(-1, count, rank) for product in inner
                ]
                by_optimizer.append(jnp.stack([mean_squares(lora_B, product) for product in scaled], axis=-1))
            by_rule.append(jnp.stack(by_optimizer, axis=1))
        by_rank.append(jnp.stack(by_rule, axis=1))
    return by_rank


def mean_square(lora_B: Float[Array, "p_out r"], inner: Float[Array, "tokens r"]) -> Float[Array, ""]:
    """Compute the mean of w_i^2 over tokens and outputs, w = B (gamma A x).

    Args:
      lora_B: Factor B after the step.
      inner: gamma A x of every token.

    Returns:
      The mean square as a scalar.
    """
    (p_out, rank), tokens = lora_B.shape, inner.shape[0]
    # At a low rank the Gram matrices of B and of gamma A x cost less than w itself.
    if rank * (tokens + p_out) >= tokens * p_out:
        return jnp.mean(jnp.einsum("or,tr->to", lora_B, inner) ** 2)
    # |w|^2 summed over tokens is tr(B^T B (A x)^T (A x)), with two matrices of shape [r, r].
    grams = jnp.vdot(jnp.einsum("tr,ts->rs", inner, inner), jnp.einsum("or,os->rs", lora_B, lora_B))
    return grams / (tokens * p_out)
