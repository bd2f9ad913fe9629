r"""E[sign(g . a) a] for uniform entries, by power series in the small entries of a row.

For a of iid entries with characteristic function :math:`\phi` and a row g,

.. math:: m_j = E[\mathrm{sign}(g \cdot a)\, a_j]
    = \frac{2}{\pi} \int_0^\infty \frac{dt}{t}\, \psi(t g_j)\, P(t), \qquad
    P(t) = \prod_l \phi(t g_l), \quad \psi = -\phi'/\phi.

For uniform entries of variance 1 :math:`\log \phi(t) = -\sum_n \zeta(2n)/n\,(\sqrt 3\, t/\pi)^{2n}`. The product
over entries is thus the exponential of a polynomial in t with the power sums of the row as coefficients, and
:math:`m_j` is a polynomial in :math:`g_j` with integrals of P as coefficients. This takes a few passes over the matrix
instead of one for each t. The few large entries of a row enter P by :math:`\phi` itself.
"""

import math
from functools import lru_cache

import numpy as np
from jaxtyping import Bool, Float
from scipy import special

from rora_theory.inits import Entries

_UNIFORM = Entries("uniform", 1.0, 9 / 5)

_ENDS = (12.0, 24.0, 48.0)
"""Upper ends of the integral over t, tried in turn. A small end requires little weight in large entries; a large end
takes more nodes."""

_DECAY = 72.0
"""Minimum of end^2 times the small entries' share of |g|^2, which bounds P at the end by exp(-36) = 2e-16."""

_REACH = 0.8 * math.pi / math.sqrt(3)
"""Upper bound of \\|end g_j\\| for small entries: 0.8 of the series' radius of convergence."""

_TERMS = 40
"""Number of terms of the series. The first omitted term is 0.8^80 = 2e-8 of the first term at the end, where P is
2e-16, and less before it."""


_LARGE = 0.4
"""Lower bound of large entries in `uniform_fast`, relative to the small entries' root sum of squares. The first omitted
term is then at most 0.26 * 0.4^6 = 1e-3 of the expectation of a small entry."""

_DEVIATIONS = 7.0
"""Upper end of the integral in `uniform_fast`, in standard deviations of the small entries' sum."""

_NODES = ((0.05, 24), (5e-3, 112), (5e-4, 300), (0.0, 640))
"""Lower bounds of the small entries' share of |g|^2, and numbers of nodes of the integral in `uniform_fast`.

phi of a large entry oscillates up to a phase of 7 sqrt(3 / share), which needs about half as many nodes."""

_LINEAR_SHARE = 1e-4
"""Share of the small entries in |g|^2 below which their expectations are linear in the entries, to 1e-4 of |g|."""

_INTEGRAND_ENTRIES = 1 << 20
"""Maximum number of large entries times nodes that are processed together: eight megabytes."""

_FOURTH, _SIXTH = -6 / 5, 48 / 7
"""Fourth and sixth cumulants of a uniform entry of variance 1."""

_BLOCK_ENTRIES = 1 << 16
"""Number of matrix entries processed together: half a megabyte, which stays in a processor's cache."""


def uniform(
    unit: Float[np.ndarray, "p_out p_in"],
) -> tuple[Bool[np.ndarray, " p_out"], Float[np.ndarray, "p_out p_in"]]:
    """Compute E[sign(g . a) a] for entries of variance 1, in the rows for which the series converges.

    Args:
      unit: Rows of length 1, or of zeros.

    Returns:
      A mask of the rows that were computed, and the expectations to 1e-11 of the largest (zeros in the other rows).
    """
    done = np.zeros(len(unit), bool)
    expectations = np.zeros_like(unit)
    size = max(1, _BLOCK_ENTRIES // max(1, unit.shape[1]))
    for first in range(0, len(unit), size):
        rows = slice(first, first + size)
        done[rows], expectations[rows] = _block(unit[rows])
    return done, expectations


def uniform_fast(unit: Float[np.ndarray, "p_out p_in"]) -> Float[np.ndarray, "p_out p_in"]:
    r"""Compute E[sign(g . a) a] in float32 from the first three terms of the series, to 1e-3 of a row's norm.

    With :math:`Q_n = \sum_l g_l^n` over a row's small entries and the cumulants :math:`\kappa_4 = -6/5` and
    :math:`\kappa_6 = 48/7`,

    .. math::
        \log P_\mathrm{small}(t) \approx -\tfrac12 Q_2 t^2 + \tfrac{\kappa_4}{24} Q_4 t^4
            - \tfrac{\kappa_6}{720} Q_6 t^6, \qquad
        \psi(t g) \approx t g - \tfrac{\kappa_4}{6} (t g)^3 + \tfrac{\kappa_6}{120} (t g)^5

    The few large entries enter by :math:`\phi` itself, and the integral over t is computed numerically for each row.
    Without large entries, and with the exponential expanded to second order in 1 / p_in, the result is

    .. math::
        m = \sqrt{2/\pi}\, [ g (1 + \tfrac{\kappa_4}{8} Q_4 - \tfrac{\kappa_6}{48} Q_6
            + \tfrac{105}{1152} \kappa_4^2 Q_4^2) - \tfrac{\kappa_4}{6} g^3 (1 + \tfrac58 \kappa_4 Q_4)
            + \tfrac{\kappa_6}{40} g^5 ]

    Args:
      unit: Rows of length 1, or of zeros.

    Returns:
      The expectations in float32 for entries of variance 1; zeros in rows of zeros.
    """
    expectations = np.zeros(unit.shape, np.float32)
    size = max(1, _BLOCK_ENTRIES // max(1, unit.shape[1]))
    for first in range(0, len(unit), size):
        rows = unit[first : first + size].astype(np.float32)
        is_large, share = _split_entries(rows)
        # The smaller the share of the small entries, the more nodes the integral needs.
        counts = np.select([share > bound for bound, _ in _NODES], [count for _, count in _NODES], _NODES[-1][1])
        counts[~rows.any(axis=1)] = 0
        for _, count in _NODES:
            members = np.flatnonzero(counts == count)
            if not len(members):
                continue
            entries_per_row = count * max(1, int(np.max(np.sum(is_large[members], axis=1))))
            for chunk in np.array_split(members, -(-len(members) * entries_per_row // _INTEGRAND_ENTRIES)):
                expectations[first + chunk] = _integrate(rows[chunk], is_large[chunk], count)
    return expectations


def _split_entries(
    rows: Float[np.ndarray, "rows p_in"],
) -> tuple[Bool[np.ndarray, "rows p_in"], Float[np.ndarray, " rows"]]:
    """Split the entries of rows into large and small ones.

    An entry is large relative to the root sum of squares of the small ones, which decreases as entries become large.

    Returns:
      A mask of the large entries, and the sum of the squares of the small ones in each row.
    """
    share, is_large = np.einsum("ij,ij->i", rows, rows), np.zeros(rows.shape, bool)
    # Most rows have no large entry, so that one pass suffices for them.
    largest = np.maximum(np.max(rows, axis=1, initial=0.0), -np.min(rows, axis=1, initial=0.0))
    changed = np.flatnonzero(largest > _LARGE * np.sqrt(share))
    # Repeat for the rows in which the small entries' share decreased, until it is so small that they do not matter.
    while len(changed):
        is_large[changed] = np.abs(rows[changed]) > _LARGE * np.sqrt(share[changed])[:, None]
        squares = np.sum(np.where(is_large[changed], 0.0, rows[changed]) ** 2, axis=1)
        decreased = squares < 0.999 * share[changed]
        changed, squares = changed[decreased], squares[decreased]
        share[changed] = squares
        changed = changed[squares > _LINEAR_SHARE]
    return is_large, share


def _integrate(
    rows: Float[np.ndarray, "rows p_in"], is_large: Bool[np.ndarray, "rows p_in"], count: int
) -> Float[np.ndarray, "rows p_in"]:
    """Integrate the series over t with a number of nodes, for rows that are not zero."""
    at_row, at_column = np.nonzero(is_large)
    large = rows[at_row, at_column]

    # Power sums Q_2, Q_4 and Q_6 of the small entries.
    small = np.where(is_large, np.float32(0.0), rows) if len(at_row) else rows
    small2 = small * small
    second = np.einsum("ij->i", small2).astype(np.float64)
    fourth = np.einsum("ij,ij->i", small2, small2).astype(np.float64)
    sixth = np.einsum("ij,ij,ij->i", small2, small2, small2).astype(np.float64)
    # Where the small entries hardly matter, a Gaussian of a little more variance stands in for their sum: the integral
    # ends there, and only the term linear in an entry is left.
    is_linear = second < _LINEAR_SHARE
    second[is_linear] = _LINEAR_SHARE
    fourth[is_linear] = sixth[is_linear] = 0.0

    # P at the nodes of each row, in units of the small entries' root sum of squares.
    deviation = np.sqrt(second)
    nodes, weights = _nodes(count)
    t = (_DEVIATIONS / 2 * (nodes + 1))[None, :] / deviation[:, None]
    weights = _DEVIATIONS / 2 * weights[None, :] / deviation[:, None]
    product = np.exp(
        -second[:, None] * t**2 / 2 + _FOURTH / 24 * fourth[:, None] * t**4 - _SIXTH / 720 * sixth[:, None] * t**6
    )
    phi, slope = _UNIFORM.characteristic(t[at_row] * large[:, None].astype(np.float64))
    phi[phi == 0.0] = np.finfo(np.float64).tiny
    if len(at_row):  # np.nonzero returns entries row by row, so that each row is one segment
        present, first_entry = np.unique(at_row, return_index=True)
        product[present] *= np.multiply.reduceat(phi, first_entry, axis=0)

    # m_j as a polynomial in g_j for small entries, and as the integral itself for large ones.
    product *= 2 / math.pi * weights
    first, third, fifth = (np.sum(product * t**power, axis=1)[:, None] for power in (0, 2, 4))
    third[is_linear] = fifth[is_linear] = 0.0
    cubic, quintic = (-_FOURTH / 6 * third).astype(np.float32), (_SIXTH / 120 * fifth).astype(np.float32)
    expectations = ((quintic * small2 + cubic) * small2 + first.astype(np.float32)) * small
    expectations[at_row, at_column] = np.sum(-slope / phi / t[at_row] * product[at_row], axis=1)
    return expectations


def _block(unit: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    done = np.zeros(len(unit), bool)
    expectations = np.zeros_like(unit)
    # The cheapest end of the integral first; rows with too much weight in large entries wait for the next.
    for end in _ENDS:
        remaining = np.flatnonzero(~done)
        # Large entries leave the series' range of convergence; the small ones must make the integrand decay by the end.
        large = np.abs(unit[remaining]) * end > _REACH
        is_served = np.sum(np.where(large, 0.0, unit[remaining] ** 2), axis=1) * end**2 >= _DECAY
        if is_served.any():
            expectations[remaining[is_served]] = _series(unit[remaining[is_served]], large[is_served], end)
            done[remaining[is_served]] = True
    return done, expectations


@lru_cache
def _nodes(count: int) -> tuple[np.ndarray, np.ndarray]:
    return np.polynomial.legendre.leggauss(count)


def _series(rows: np.ndarray, large: np.ndarray, end: float) -> np.ndarray:
    nodes, weights = _nodes(int(16 * end / 3))
    t, weights = end * (nodes + 1) / 2, end / 2 * weights
    order = np.arange(1, _TERMS + 1)
    # Coefficients of the series in powers of t / end and end g, which neither overflow nor underflow.
    ratio = special.zeta(2.0 * order) * (math.sqrt(3) / math.pi) ** (2 * order)
    # Power sums of the small entries, one order after the other.
    small = np.where(large, 0.0, end * rows)
    squares, power, sums = small**2, np.ones_like(small), []
    for _ in order:
        power *= squares
        sums.append(np.sum(power, axis=1))
    # P at the nodes: the exponential of the series, times phi of the large entries.
    powers = (t / end)[None, :] ** (2 * order[:, None])
    product = np.exp(-(np.array(sums).T * (ratio / order)) @ powers)
    at_row, at_column = np.nonzero(large)
    phi, slope = _UNIFORM.characteristic(t[None, :] * rows[at_row, at_column][:, None])
    phi[phi == 0.0] = np.finfo(np.float64).tiny
    if len(at_row):  # np.nonzero returns entries row by row, so that each row is one segment
        present, first = np.unique(at_row, return_index=True)
        product[present] *= np.multiply.reduceat(phi, first, axis=0)

    # Small entries: m_j = (2/pi) sum_n 2 ratio_n g_j^(2n-1) int t^(2n-2) P dt, by Horner's rule.
    moments = 4 / math.pi * ratio * ((product * weights * (end / t**2)) @ powers.T)
    result = np.zeros_like(small)
    for column in moments.T[::-1]:
        result = result * squares + column[:, None]
    result *= small
    # Large entries: the integral itself.
    result[at_row, at_column] = -2 / math.pi * ((slope / t) * (product[at_row] / phi)) @ weights
    return result
