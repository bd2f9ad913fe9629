r"""Initial values of lora_A. lora_B starts at zero, so that an adapted model starts as its base.

The laws of the first step depend on Var(A): under ``"kaiming_uniform"`` it is 1/(3 p_in) whatever the rank,
under ``"gaussian"`` it is 1/r^2, so the exponent that keeps the first step's variance over rank is not the
same.
"""

from collections.abc import Sequence
from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from rora_theory import inits
from rora_theory.random.draws import draw_A

LoraInit = Literal["kaiming_uniform", "gaussian"]
"""The laws that an adapter's A may have: those of PEFT."""

LORA_INITS: tuple[LoraInit, ...] = get_args(LoraInit)


def init_a(
    key: PRNGKeyArray, init: LoraInit, ranks: Sequence[int], width: int, p_in: int
) -> Float[Array, "layers {width} {p_in}"]:
    r"""lora_A of one module in every layer.

    ``"kaiming_uniform"`` is U(-1/sqrt(p_in), 1/sqrt(p_in)), torch's kaiming_uniform_ with a = sqrt(5), which
    PEFT uses by default; ``"gaussian"`` is N(0, 1/r^2), PEFT's option of that name.

    Args:
      key: each layer draws from its own fold of it.
      init: the law.
      ranks: rank of each layer, 0 where the module is not adapted.
      width: rows to return, at least the largest rank; those from a layer's rank on are zero.
      p_in: input width.

    Returns:
      [layers, width, p_in] float32.
    """
    if not any(ranks):
        return jnp.zeros((len(ranks), width, p_in), jnp.float32)
    # Standard entries of the law's shape, times each layer's own deviation: only "gaussian"'s depends on the rank.
    laws = [inits.entries(init, rank=max(rank, 1), p_in=p_in) for rank in ranks]
    relative = [law.deviation / inits.entries(init, rank=width, p_in=p_in).deviation for law in laws]
    return _drawn(key, np.asarray(relative, np.float32), np.asarray(ranks), init=init, width=width, p_in=p_in)


@partial(jax.jit, static_argnames=("init", "width", "p_in"))
def _drawn(
    key: PRNGKeyArray,
    relative: Float[Array, " layers"],
    ranks: Int[Array, " layers"],
    *,
    init: LoraInit,
    width: int,
    p_in: int,
) -> Float[Array, "layers {width} {p_in}"]:
    """Of every layer ``relative`` times the law's entries, zero from its rank on."""
    keys = jax.vmap(lambda layer: jax.random.fold_in(key, layer))(jnp.arange(len(ranks)))
    drawn = jax.vmap(lambda k: draw_A(k, init, rank=width, p_in=p_in))(keys) * relative[:, None, None]
    rows = jnp.arange(width)[None, :, None] < ranks[:, None, None]
    return jnp.where(rows, drawn, jnp.zeros((), jnp.float32))
