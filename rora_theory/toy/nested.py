"""Random factors that are nested over ranks: the smaller rank's rows are the first rows of the larger's.

Ranks that share their noise differ by the rank alone, so that a slope against the rank is found from few seeds.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from rora_theory import inits
from rora_theory.inits import Init
from rora_theory.random.draws import draw_A


def draw_a(key: PRNGKeyArray, init: Init, *, rank: int, p_in: int) -> Float[Array, "rank p_in"]:
    """A in float32: row k depends on ``key`` and k, and on the rank through the law's deviation alone.

    Args:
      key: of all rows.
      init: the law, see `rora_theory.inits.entries`.
      rank: number of rows.
      p_in: length of a row.

    Examples:
      >>> import numpy as np
      >>> small, large = (draw_a(jax.random.key(0), "kaiming_uniform", rank=r, p_in=4) for r in (2, 8))
      >>> bool(np.array_equal(small, large[:2]))
      True
    """
    return relative(init, rank=rank, p_in=p_in) * rows(key, init, count=rank, p_in=p_in)


def rows(key: PRNGKeyArray, init: Init, *, count: int, p_in: int) -> Float[Array, "count p_in"]:
    """The first rows of A, all with the deviation of a rank of 1."""
    keys = jax.vmap(lambda k: jax.random.fold_in(key, k))(jnp.arange(count))
    return jax.vmap(lambda k: draw_A(k, init, rank=1, p_in=p_in)[0])(keys)


def relative(init: Init, *, rank: int, p_in: int) -> float:
    """Deviation of A's entries over that of a rank of 1: it depends on the rank for ``gaussian`` alone."""
    return inits.entries(init, rank=rank, p_in=p_in).deviation / inits.entries(init, rank=1, p_in=p_in).deviation


def draw_b(key: PRNGKeyArray, *, p_out: int, rank: int) -> Float[Array, "p_out rank"]:
    """B of an adapter that starts with A = 0: U(-1/sqrt(r), 1/sqrt(r)), torch's default for a layer of r inputs.

    Columns are nested up to the deviation, 1/sqrt(3 r).
    """
    columns = draw_a(key, "kaiming_uniform", rank=rank, p_in=p_out)
    drawn, wanted = (inits.entries("kaiming_uniform", rank=1, p_in=fan_in).deviation for fan_in in (p_out, rank))
    return (wanted / drawn) * columns.T
