r"""Chi squares of any whole freedom, many at a time, by rejection from normals.

:math:`\chi^2_1 = N^2`; from two degrees of freedom on, :math:`\chi^2_n` is twice a gamma of shape :math:`a = n / 2`,
which is :math:`d v` with :math:`d = a - 1/3` and :math:`v = (1 + N / \sqrt{9 d})^3`, kept where v > 0 and
:math:`\ln U < N^2 / 2 + d (1 - v + \ln v)`. At least 95% of the trials are kept. All numbers take their trial together,
so that a processor's vectors are full; `jax.random.chisquare` takes one number after the other on a CPU.

Source: Marsaglia and Tsang, "A simple method for generating gamma variables" (2000).
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from rora_theory.random.normals import normal_of, threefry, words_of


def chi_squares(key: PRNGKeyArray, freedoms: Float[Array, " laws"], draws: int) -> Float[Array, "laws draws"]:
    """Independent draws of each law, in float32.

    Args:
      key: of JAX's default generator, threefry2x32.
      freedoms: degrees of freedom, whole numbers of 1 or more.
      draws: of each law, 1 or more.

    Raises:
      TypeError: a key of another generator.
    """
    freedom = freedoms[:, None]
    shift = jnp.maximum(freedom / 2, 1) - 1 / 3
    slope = 1 / (3 * jnp.sqrt(shift))
    shape = (len(freedoms), draws)
    words = words_of(key)
    counters = jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)

    def trial(state: tuple[Array, Array]) -> tuple[Array, Array]:
        turn, found = state
        left, right = threefry(words, turn, counters)
        normal = normal_of(left)
        log_uniform = jnp.log(((right >> jnp.uint32(9)).astype(jnp.float32) + 0.5) * 2**-23)
        # 1 - v + ln v by powers of v's cube root less 1, whose ones do not cancel where the freedom is large.
        part = slope * normal
        bound = normal**2 / 2 + shift * (3 * jnp.log1p(jnp.maximum(part, -0.999)) - part * (3 + 3 * part + part**2))
        kept = (part > -1) & (log_uniform < bound)
        drawn = jnp.where(freedom == 1, normal**2, jnp.where(kept, 2 * shift * (1 + part) ** 3, -1))
        return turn + 1, jnp.where(found < 0, drawn, found)

    start = jnp.uint32(0), jnp.full(shape, -1, jnp.float32)  # -1: not drawn yet
    return jax.lax.while_loop(lambda state: jnp.any(state[1] < 0), trial, start)[1]
