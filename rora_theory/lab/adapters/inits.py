"""Initialisation of lora_A. lora_B is initialised to zero, so that an adapted model starts as its base.

The variance of the first update depends on Var(A). With ``"kaiming_uniform"`` it is 1/(3 p_in) at any rank; with
``"gaussian"`` it is 1/r^2. The scaling exponent that keeps the first update's variance constant over ranks therefore
differs between the two.
"""

from collections.abc import Sequence
from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from rora_theory import inits
from rora_theory.laws.random.draws import draw_A

LoraInit = Literal["kaiming_uniform", "gaussian"]
"""Initialisations of lora_A, with PEFT's names."""

LORA_INITS: tuple[LoraInit, ...] = get_args(LoraInit)


def init_a(
    key: PRNGKeyArray, init: LoraInit, ranks: Sequence[int], width: int, p_in: int
) -> Float[Array, "layers {width} {p_in}"]:
    """Initialise lora_A of one module in every layer.

    ``"kaiming_uniform"`` is U(-1/sqrt(p_in), 1/sqrt(p_in)), torch's kaiming_uniform_ with a = sqrt(5) and PEFT's
    default. ``"gaussian"`` is N(0, 1/r^2), PEFT's option of that name.

    Args:
      key: Random key; each layer folds its index into it.
      init: Distribution of the entries.
      ranks: Rank of each layer, 0 if the module is not adapted there.
      width: Number of rows to return, at least the largest rank; rows beyond a layer's rank are zero.
      p_in: Input width of the module.

    Returns:
      Stacked matrices [layers, width, p_in] in float32.
    """
    if not any(ranks):
        return jnp.zeros((len(ranks), width, p_in), jnp.float32)
    # All layers draw entries for rank `width`, rescaled to the standard deviation at their own rank. Only that of
    # "gaussian" depends on the rank.
    distributions = [inits.entries(init, rank=max(rank, 1), p_in=p_in) for rank in ranks]
    drawn_deviation = inits.entries(init, rank=width, p_in=p_in).deviation
    relative = [distribution.deviation / drawn_deviation for distribution in distributions]
    return _draw_layers(key, np.asarray(relative, np.float32), np.asarray(ranks), init=init, width=width, p_in=p_in)


@partial(jax.jit, static_argnames=("init", "width", "p_in"))
def _draw_layers(
    key: PRNGKeyArray,
    relative: Float[Array, " layers"],
    ranks: Int[Array, " layers"],
    *,
    init: LoraInit,
    width: int,
    p_in: int,
) -> Float[Array, "layers {width} {p_in}"]:
    """Draw the entries of every layer, multiply them by ``relative``, and set rows beyond the layer's rank to zero."""
    keys = jax.vmap(lambda layer: jax.random.fold_in(key, layer))(jnp.arange(len(ranks)))
    drawn = jax.vmap(lambda k: draw_A(k, init, rank=width, p_in=p_in))(keys) * relative[:, None, None]
    rows = jnp.arange(width)[None, :, None] < ranks[:, None, None]
    return jnp.where(rows, drawn, jnp.zeros((), jnp.float32))
