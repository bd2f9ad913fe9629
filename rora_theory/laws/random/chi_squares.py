r"""Sampler of chi-square variates with integer degrees of freedom, vectorised rejection from normals.

For one degree of freedom, :math:`\chi^2_1 = N^2`. For :math:`n \ge 2` degrees, :math:`\chi^2_n` is twice a gamma
variate of shape :math:`a = n / 2`. With :math:`d = a - 1/3`, the proposal :math:`d v`,
:math:`v = (1 + N / \sqrt{9 d})^3`, is accepted if v > 0 and :math:`\ln U < N^2 / 2 + d (1 - v + \ln v)`. At least 95%
of the proposals are accepted. All entries are proposed at once, so that the loop is vectorised;
`jax.random.chisquare` draws one number after the other on a CPU.

References:
  Marsaglia and Tsang, "A simple method for generating gamma variables" (2000).
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from rora_theory.laws.random.normals import key_words, threefry, to_normal


def sample_chi_squares(
    key: PRNGKeyArray, degrees_of_freedom: Float[Array, " laws"], draws: int
) -> Float[Array, "laws draws"]:
    """Draw independent chi-square variates in float32.

    Args:
      key: Key of JAX's default generator, threefry2x32.
      degrees_of_freedom: Degrees of freedom of each distribution, integers of 1 or more.
      draws: Number of draws from each distribution, 1 or more.

    Returns:
      The draws, one row for each distribution.

    Raises:
      TypeError: If the key belongs to another generator.
    """
    freedom = degrees_of_freedom[:, None]
    shift = jnp.maximum(freedom / 2, 1) - 1 / 3  # d
    slope = 1 / (3 * jnp.sqrt(shift))  # 1 / sqrt(9 d)
    shape = (len(degrees_of_freedom), draws)
    words = key_words(key)
    counters = jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)

    def propose(state: tuple[Array, Array]) -> tuple[Array, Array]:
        trial, accepted = state
        # A normal and a uniform number from the two random words of this entry and trial.
        left, right = threefry(words, trial, counters)
        normal = to_normal(left)
        log_uniform = jnp.log(((right >> jnp.uint32(9)).astype(jnp.float32) + 0.5) * 2**-23)
        # Acceptance test. 1 - v + ln v is written in powers of v^(1/3) - 1, which avoids cancellation at large d.
        offset = slope * normal
        log_ratio = 3 * jnp.log1p(jnp.maximum(offset, -0.999)) - offset * (3 + 3 * offset + offset**2)
        is_accepted = (offset > -1) & (log_uniform < normal**2 / 2 + shift * log_ratio)
        proposal = jnp.where(freedom == 1, normal**2, jnp.where(is_accepted, 2 * shift * (1 + offset) ** 3, -1))
        # Entries accepted in an earlier trial keep their value.
        return trial + 1, jnp.where(accepted < 0, proposal, accepted)

    # -1 marks the entries without an accepted proposal.
    start = jnp.uint32(0), jnp.full(shape, -1, jnp.float32)
    return jax.lax.while_loop(lambda state: jnp.any(state[1] < 0), propose, start)[1]
