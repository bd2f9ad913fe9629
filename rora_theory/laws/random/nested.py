"""Random factors that are nested over ranks: the rows of a smaller rank are the first rows of a larger one.

Adapters that share their random entries differ only in the rank, so that a slope in the rank needs few seeds.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from rora_theory import inits
from rora_theory.inits import Init
from rora_theory.laws.random.draws import draw_A


def draw_nested_A(key: PRNGKeyArray, init: Init, *, rank: int, p_in: int) -> Float[Array, "rank p_in"]:
    """Sample A in float32; row k depends on ``key`` and k, and on the rank only through the standard deviation.

    Args:
      key: Key of all rows.
      init: Initialisation, see `rora_theory.inits.entries`.
      rank: Number of rows.
      p_in: Length of a row.

    Returns:
      The factor A.

    Examples:
      >>> import numpy as np
      >>> small, large = (draw_nested_A(jax.random.key(0), "kaiming_uniform", rank=r, p_in=4) for r in (2, 8))
      >>> bool(np.array_equal(small, large[:2]))
      True
    """
    return relative_deviation(init, rank=rank, p_in=p_in) * draw_rows(key, init, count=rank, p_in=p_in)


def draw_rows(key: PRNGKeyArray, init: Init, *, count: int, p_in: int) -> Float[Array, "count p_in"]:
    """Sample the first rows of A with the standard deviation that belongs to rank 1."""
    # A key for each row, which depends on its index alone.
    keys = jax.vmap(lambda k: jax.random.fold_in(key, k))(jnp.arange(count))
    return jax.vmap(lambda k: draw_A(k, init, rank=1, p_in=p_in)[0])(keys)


def relative_deviation(init: Init, *, rank: int, p_in: int) -> float:
    """Return the standard deviation of A's entries relative to rank 1; it depends on the rank only for ``gaussian``."""
    return inits.entries(init, rank=rank, p_in=p_in).deviation / inits.entries(init, rank=1, p_in=p_in).deviation
