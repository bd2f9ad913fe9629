r"""E[sign(g . a) a] for uniform entries, by power series in a row's small entries: the fast part of Adam's law.

For a of iid entries with characteristic function :math:`\phi` and a row g,

.. math:: m_j = E[\mathrm{sign}(g \cdot a)\, a_j]
    = \frac{2}{\pi} \int_0^\infty \frac{dt}{t}\, \psi(t g_j)\, P(t), \qquad
    P(t) = \prod_l \phi(t g_l), \quad \psi = -\phi'/\phi.

For uniform entries of variance 1 :math:`\log \phi(t) = -\sum_n \zeta(2n)/n\,(\sqrt 3\, t/\pi)^{2n}`. So a product over
entries is the exponential of a polynomial in t whose coefficients are the row's power sums, and :math:`m_j` is a
polynomial in :math:`g_j` whose coefficients are integrals of P: a few passes over the matrix, not one for each t.
A row's few large entries enter P by their :math:`\phi` itself.
"""

import math
from functools import lru_cache

import numpy as np
from jaxtyping import Bool, Float
from scipy import special

from rora_theory.inits import Entries

_UNIFORM = Entries("uniform", 1.0, 9 / 5)

_ENDS = (12.0, 24.0, 48.0)
"""Of the integral over t, tried in turn: an end asks for little weight in large entries, the next for more work."""

_DECAY = 72.0
"""Least end^2 times the small entries' share of |g|^2: they alone leave exp(-36) = 2e-16 of P there."""

_REACH = 0.8 * math.pi / math.sqrt(3)
"""An entry is small where \\|end g_j\\| is below: 0.8 of the radius at which the series stops converging."""

_TERMS = 40
"""Of the series: the first left out is 0.8^80 = 2e-8 of the first at the end, where P is 2e-16, and less before."""


_BLOCK = 1 << 16
"""Entries of the rows that are taken together: half a megabyte, which a processor keeps near over the passes."""


def uniform(
    unit: Float[np.ndarray, "p_out p_in"],
) -> tuple[Bool[np.ndarray, " p_out"], Float[np.ndarray, "p_out p_in"]]:
    """The rows that the series serves, and E[sign(g . a) a] of them (zeros in the others), entries of variance 1.

    Args:
      unit: rows of length 1, or of zeros.

    Returns:
      which rows are done, and the expectations, to 1e-11 of the largest.
    """
    done = np.zeros(len(unit), bool)
    found = np.zeros_like(unit)
    size = max(1, _BLOCK // max(1, unit.shape[1]))
    for first in range(0, len(unit), size):
        rows = slice(first, first + size)
        done[rows], found[rows] = _block(unit[rows])
    return done, found


def _block(unit: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    done = np.zeros(len(unit), bool)
    found = np.zeros_like(unit)
    for end in _ENDS:
        left = np.flatnonzero(~done)
        large = np.abs(unit[left]) * end > _REACH
        chosen = np.sum(np.where(large, 0.0, unit[left] ** 2), axis=1) * end**2 >= _DECAY
        if chosen.any():
            found[left[chosen]] = _series(unit[left[chosen]], large[chosen], end)
            done[left[chosen]] = True
    return done, found


@lru_cache
def _nodes(count: int) -> tuple[np.ndarray, np.ndarray]:
    return np.polynomial.legendre.leggauss(count)


def _series(rows: np.ndarray, large: np.ndarray, end: float) -> np.ndarray:
    nodes, weights = _nodes(int(16 * end / 3))
    t, weights = end * (nodes + 1) / 2, end / 2 * weights
    order = np.arange(1, _TERMS + 1)
    # In powers of t/end and of end g, which neither overflow nor underflow.
    ratio = special.zeta(2.0 * order) * (math.sqrt(3) / math.pi) ** (2 * order)
    small = np.where(large, 0.0, end * rows)
    squares, power, sums = small**2, np.ones_like(small), []
    for _ in order:
        power *= squares
        sums.append(np.sum(power, axis=1))
    powers = (t / end)[None, :] ** (2 * order[:, None])
    product = np.exp(-(np.array(sums).T * (ratio / order)) @ powers)
    at_row, at_column = np.nonzero(large)
    phi, slope = _UNIFORM.characteristic(t[None, :] * rows[at_row, at_column][:, None])
    phi[phi == 0.0] = np.finfo(np.float64).tiny
    if len(at_row):  # np.nonzero goes row by row
        present, first = np.unique(at_row, return_index=True)
        product[present] *= np.multiply.reduceat(phi, first, axis=0)

    # m_j = (2/pi) sum_n 2 ratio_n g_j^(2n-1) int t^(2n-2) P dt, by Horner's rule.
    moments = 4 / math.pi * ratio * ((product * weights * (end / t**2)) @ powers.T)
    result = np.zeros_like(small)
    for column in moments.T[::-1]:
        result = result * squares + column[:, None]
    result *= small
    result[at_row, at_column] = -2 / math.pi * ((slope / t) * (product[at_row] / phi)) @ weights
    return result
