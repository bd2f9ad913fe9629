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


_LARGE = 0.4
"""In `uniform_fast` an entry is large beyond this share of the small entries' root sum of squares: the first of the
terms that are left out is then 0.26 * 0.4^6 = 1e-3 of an entry's expectation, and less of a smaller one's."""

_NODES, _DEVIATIONS = 24, 7.0
"""Of the integral in `uniform_fast`: its nodes, and its end in standard deviations of P."""

_LEAST_REST = 0.05
"""Least share of the small entries in |g|^2 that `uniform_fast` serves."""

_FOURTH, _SIXTH = -6 / 5, 48 / 7
"""Cumulants of a uniform entry of variance 1."""

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


def uniform_fast(
    unit: Float[np.ndarray, "p_out p_in"],
) -> tuple[Bool[np.ndarray, " p_out"], Float[np.ndarray, "p_out p_in"]]:
    r"""Compute `uniform` in float32 from the first three terms of the series, to 1e-3 of a row's length.

    With :math:`Q_n = \sum_l g_l^n` over a row's small entries and the cumulants :math:`\kappa_4 = -6/5` and
    :math:`\kappa_6 = 48/7`,

    .. math::
        \log P_\mathrm{small}(t) \approx -\tfrac12 Q_2 t^2 + \tfrac{\kappa_4}{24} Q_4 t^4
            - \tfrac{\kappa_6}{720} Q_6 t^6, \qquad
        \psi(t g) \approx t g - \tfrac{\kappa_4}{6} (t g)^3 + \tfrac{\kappa_6}{120} (t g)^5

    The few large entries enter by their :math:`\phi` itself, and the integral over t is taken numerically for each row.
    Without large entries, and with the exponential expanded to the second order in 1 / p_in, this is

    .. math::
        m = \sqrt{2/\pi}\, [ g (1 + \tfrac{\kappa_4}{8} Q_4 - \tfrac{\kappa_6}{48} Q_6
            + \tfrac{105}{1152} \kappa_4^2 Q_4^2) - \tfrac{\kappa_4}{6} g^3 (1 + \tfrac58 \kappa_4 Q_4)
            + \tfrac{\kappa_6}{40} g^5 ]

    Args:
      unit: Rows of length 1, or of zeros.

    Returns:
      Which rows are done, and the expectations in float32 (zeros in the others), for entries of variance 1.
    """
    done = np.zeros(len(unit), bool)
    found = np.zeros(unit.shape, np.float32)
    size = max(1, _BLOCK // max(1, unit.shape[1]))
    for first in range(0, len(unit), size):
        rows = slice(first, first + size)
        done[rows] = _fast_block(unit[rows].astype(np.float32), found[rows])
    return done, found


def _fast_block(rows: Float[np.ndarray, "rows p_in"], found: Float[np.ndarray, "rows p_in"]) -> np.ndarray:
    # A row's large entries, and the root sum of squares of the rest, which decides what is large.
    rest = np.ones(len(rows), np.float32)
    size, is_large = np.abs(rows), np.zeros(rows.shape, bool)
    changed = np.arange(len(rows))
    while len(changed):
        is_large[changed] = size[changed] > _LARGE * rest[changed, None]
        squares = np.sum(np.where(is_large[changed], 0.0, rows[changed]) ** 2, axis=1)
        fewer = squares < 0.999 * rest[changed] ** 2
        changed, squares = changed[fewer], squares[fewer]
        rest[changed] = np.sqrt(squares)
        changed = changed[squares > _LEAST_REST]
    at_row, at_column = np.nonzero(is_large)
    large = rows[at_row, at_column]
    small = rows.copy()
    small[at_row, at_column] = 0.0
    power = small * small
    second = np.einsum("ij->i", power).astype(np.float64)
    fourth = np.einsum("ij,ij->i", power, power).astype(np.float64)
    sixth = np.einsum("ij,ij,ij->i", power, power, power).astype(np.float64)
    done = np.asarray(second > _LEAST_REST)

    # P at the nodes of each row, in units of the small entries' root sum of squares.
    deviation = np.sqrt(np.where(done, second, 1.0))
    nodes, weights = _nodes(_NODES)
    t = (_DEVIATIONS / 2 * (nodes + 1))[None, :] / deviation[:, None]
    weights = _DEVIATIONS / 2 * weights[None, :] / deviation[:, None]
    product = np.exp(
        -second[:, None] * t**2 / 2 + _FOURTH / 24 * fourth[:, None] * t**4 - _SIXTH / 720 * sixth[:, None] * t**6
    )
    phi, slope = _UNIFORM.characteristic(t[at_row] * large[:, None].astype(np.float64))
    phi[phi == 0.0] = np.finfo(np.float64).tiny
    if len(at_row):
        present, first = np.unique(at_row, return_index=True)
        product[present] *= np.multiply.reduceat(phi, first, axis=0)

    # m_j as a polynomial in a small g_j, and by the integral itself for a large one.
    product *= 2 / math.pi * weights * done[:, None]
    first, third, fifth = (np.sum(product * t**n, axis=1).astype(np.float32)[:, None] for n in (0, 2, 4))
    found[:] = ((_SIXTH / 120 * fifth) * power - _FOURTH / 6 * third) * power
    found += first
    found *= small
    found[at_row, at_column] = np.sum(-slope / phi / t[at_row] * product[at_row], axis=1)
    return done


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
