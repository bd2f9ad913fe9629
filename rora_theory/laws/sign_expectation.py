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
from jaxtyping import Bool, Float, Int
from scipy import special

from rora_theory.inits import Entries

_UNIFORM = Entries("uniform", 1.0, 9 / 5)

_ENDS = (12.0, 24.0, 48.0)
"""Upper ends of the integral over t, tried in turn. A small end requires little weight in large entries; a large end
takes more nodes."""

_MIN_DECAY = 72.0
"""Minimum of end^2 times the small entries' share of |g|^2, which bounds P at the end by exp(-36) = 2e-16."""

_MAX_SERIES_ARGUMENT = 0.8 * math.pi / math.sqrt(3)
"""Upper bound of \\|end g_j\\| for small entries: 0.8 of the series' radius of convergence."""

_SERIES_TERMS = 40
"""Number of terms of the series. The first omitted term is 0.8^80 = 2e-8 of the first term at the end, where P is
2e-16, and less before it."""


_MIN_LARGE_ENTRY = 0.4
"""Lower bound of large entries in `uniform_fast`, relative to the small entries' root sum of squares. The first omitted
term is then at most 0.26 * 0.4^6 = 1e-3 of the expectation of a small entry."""

_FAST_END = 7.0
"""Upper end of the integral in `uniform_fast`, in standard deviations of the small entries' sum."""

_NODES = ((0.05, 24), (5e-3, 112), (5e-4, 300), (0.0, 640))
"""Lower bounds of the small entries' share of |g|^2, and numbers of nodes of the integral in `uniform_fast`.

phi of a large entry oscillates up to a phase of 7 sqrt(3 / share), which needs about half as many nodes."""

_LINEAR_SHARE = 1e-4
"""Share of the small entries in |g|^2 below which their expectations are linear in the entries, to 1e-4 of |g|."""

_FOURTH, _SIXTH = -6 / 5, 48 / 7
"""Fourth and sixth cumulants of a uniform entry of variance 1."""

_BLOCK_ENTRIES = 1 << 16
"""Number of matrix entries processed together: half a megabyte, which stays in a processor's cache."""

_FAST_BLOCK_ENTRIES, _FAST_BLOCK_ROWS = 1 << 18, 512
"""Maximum numbers of matrix entries and of rows that `uniform_fast` processes together.

One megabyte in float32 is little enough for the cache, and enough for the cost of each NumPy call to be small. The
number of rows bounds the memory of the integrals.
"""


def uniform(
    unit: Float[np.ndarray, "p_out p_in"],
) -> tuple[Bool[np.ndarray, " p_out"], Float[np.ndarray, "p_out p_in"]]:
    """Compute E[sign(g . a) a] for entries of variance 1, in the rows for which the series converges.

    Args:
      unit: Rows of length 1, or of zeros.

    Returns:
      A mask of the rows that were computed, and the expectations to 1e-11 of the largest (zeros in the other rows).
    """
    is_done = np.zeros(len(unit), bool)
    expectations = np.zeros_like(unit)
    size = max(1, _BLOCK_ENTRIES // max(1, unit.shape[1]))
    for first in range(0, len(unit), size):
        rows = slice(first, first + size)
        is_done[rows], expectations[rows] = _converged_rows(unit[rows])
    return is_done, expectations


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
    expectations = np.empty(unit.shape, np.float32)
    size = min(_FAST_BLOCK_ROWS, max(1, _FAST_BLOCK_ENTRIES // max(1, unit.shape[1])))
    for first in range(0, len(unit), size):
        rows = np.asarray(unit[first : first + size], np.float32)
        expectations[first : first + size] = _block_expectations(rows)
    return expectations


def _block_expectations(rows: Float[np.ndarray, "rows p_in"]) -> Float[np.ndarray, "rows p_in"]:
    """Compute the expectations of a block of rows."""
    # Power sums Q_4 and Q_6 of the small entries; Q_2 is their share. The squares of the large ones become zeros.
    squares = np.square(rows)
    at_row, at_column, share = _remove_large(squares)
    fourth_powers = squares * squares
    fourth = np.einsum("ij->i", fourth_powers)
    sixth = np.einsum("ij,ij->i", fourth_powers, squares)

    # Integrals over t: the smaller the share of the small entries, the more nodes a row needs. Rows of zeros need none.
    counts = np.select([share > bound for bound, _ in _NODES], [count for _, count in _NODES], _NODES[-1][1])
    is_zero_row = (share == 0) & (np.bincount(at_row, minlength=len(rows)) == 0)
    counts[is_zero_row] = 0
    power_sums, large = np.stack([share, fourth, sixth], axis=1), rows[at_row, at_column]
    coefficients, at_large = np.zeros(power_sums.shape, np.float32), np.zeros_like(large)
    # Rows with one number of nodes are integrated together.
    for count in np.unique(counts[counts > 0]).tolist():
        members, with_count = np.flatnonzero(counts == count), counts[at_row] == count
        # Index of each large entry's row among the members.
        positions = np.searchsorted(members, at_row[with_count])
        integrals = _integrate(power_sums[members], large[with_count], positions, count)
        coefficients[members], at_large[with_count] = integrals

    # m_j as a polynomial in g_j for small entries, by Horner's rule in place, and as the integral for large ones.
    first, cubic, quintic = (column[:, None] for column in coefficients.T)
    result = np.multiply(squares, quintic, out=fourth_powers)  # reuses memory that is no longer needed
    result += cubic
    result *= squares
    result += first
    result *= rows
    result[at_row, at_column] = at_large
    return result


def _remove_large(
    squares: Float[np.ndarray, "rows p_in"],
) -> tuple[Int[np.ndarray, " large"], Int[np.ndarray, " large"], Float[np.ndarray, " rows"]]:
    """Find the large entries of rows, and set their squares to zero in place.

    An entry is large relative to the root sum of squares of the small ones, which decreases as entries become large.

    Returns:
      The rows and columns of the large entries, row by row, and the sum of the squares of the small ones in each row.
    """
    width = squares.shape[1]
    share = np.einsum("ij->i", squares)
    places = [np.zeros(0, np.intp)]
    # The largest entry of a row decides whether it has a large one: each pass copies only the rows that have.
    members = np.flatnonzero(np.max(squares, axis=1, initial=0.0) > _MIN_LARGE_ENTRY**2 * share)
    while len(members):
        candidates = squares[members]
        is_large = candidates > _MIN_LARGE_ENTRY**2 * share[members, None]
        # `np.nonzero` takes much longer in two dimensions.
        at_member, at_column = np.divmod(np.flatnonzero(is_large), width)
        candidates[at_member, at_column] = squares[members[at_member], at_column] = 0.0
        places.append(members[at_member] * width + at_column)
        # Without these entries the share is smaller, so that others can be large relative to it. Stop where the small
        # entries do not matter any more.
        share[members] = remaining = np.einsum("ij->i", candidates)
        has_large = np.max(candidates, axis=1) > _MIN_LARGE_ENTRY**2 * remaining
        members = members[has_large & (remaining > _LINEAR_SHARE)]
    at_row, at_column = np.divmod(np.sort(np.concatenate(places)), width)
    return at_row, at_column, share


def _integrate(
    power_sums: Float[np.ndarray, "rows 3"],
    large: Float[np.ndarray, " large"],
    at_row: Int[np.ndarray, " large"],
    count: int,
) -> tuple[Float[np.ndarray, "rows 3"], Float[np.ndarray, " large"]]:
    """Integrate the series over t with a number of nodes, for rows that are not zero.

    Returns:
      The coefficients of g_j, g_j^3 and g_j^5 in the expectations of the small entries, and the expectations of the
      large entries.
    """
    second, fourth, sixth = power_sums.astype(np.float64).T
    # Where the small entries hardly matter, a Gaussian of a little more variance stands in for their sum: the integral
    # ends there, and only the term linear in an entry is left.
    is_linear = second < _LINEAR_SHARE
    second = np.where(is_linear, _LINEAR_SHARE, second)
    fourth, sixth = np.where(is_linear, 0.0, fourth), np.where(is_linear, 0.0, sixth)

    # P of the small entries at the nodes s = t sqrt(Q_2), which all rows share.
    s, weights, powers = _scaled_nodes(count)
    relative_sums = np.stack([np.ones_like(second), fourth / second**2, sixth / second**3], axis=1)
    series_terms = np.array([[-1 / 2], [_FOURTH / 24], [-_SIXTH / 720]]) * powers[1:]
    product = np.exp(relative_sums @ series_terms)
    product *= 2 / math.pi * weights
    # Times phi(t g) = sin(y) / y of the large entries, with y = sqrt(3) t g. Sine and cotangent of y come from the
    # tangent of y / 2, which NumPy computes several times as fast in float64.
    deviation = np.sqrt(second)
    y = (math.sqrt(3) * large / deviation[at_row])[:, None] * s
    tangent = np.tan(y / 2)
    if len(at_row):  # entries are ordered row by row, so that each row is one segment
        present, first_entry = np.unique(at_row, return_index=True)
        product[present] *= np.multiply.reduceat(2 * tangent / (1 + tangent**2) / y, first_entry, axis=0)

    # Integrals of P, t^2 P and t^4 P, for the small entries.
    moments = (product @ powers[:3].T) / second[:, None] ** np.array([0.5, 1.5, 2.5])
    moments[is_linear, 1:] = 0.0
    # Integral of psi(t g) P / t, for the large entries: psi(t g) = sqrt(3) (1 / y - cot(y)).
    psi = math.sqrt(3) * (1 / y - (1 - tangent**2) / (2 * tangent))
    at_large = np.einsum("ij,ij->i", psi / s, product[at_row])
    return moments * np.array([1.0, -_FOURTH / 6, _SIXTH / 120]), at_large


def _converged_rows(
    unit: Float[np.ndarray, "rows p_in"],
) -> tuple[Bool[np.ndarray, " rows"], Float[np.ndarray, "rows p_in"]]:
    """Compute the expectations of a block of rows in `uniform`, with a mask of the rows that were computed."""
    is_done = np.zeros(len(unit), bool)
    expectations = np.zeros_like(unit)
    # The cheapest end of the integral first; rows with too much weight in large entries wait for the next.
    for end in _ENDS:
        remaining = np.flatnonzero(~is_done)
        # The series does not converge for large entries; the small ones must make the integrand decay by the end.
        is_large = np.abs(unit[remaining]) * end > _MAX_SERIES_ARGUMENT
        small_share = np.sum(np.where(is_large, 0.0, unit[remaining] ** 2), axis=1)
        converges = small_share * end**2 >= _MIN_DECAY
        if converges.any():
            rows = remaining[converges]
            expectations[rows] = _series(unit[rows], is_large[converges], end)
            is_done[rows] = True
    return is_done, expectations


@lru_cache
def _scaled_nodes(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return nodes and weights of the integral up to `_FAST_END`, and the nodes' powers 0, 2, 4 and 6."""
    nodes, weights = _nodes(count)
    s = _FAST_END / 2 * (nodes + 1)
    return s, _FAST_END / 2 * weights, np.stack([np.ones_like(s), s**2, s**4, s**6])


@lru_cache
def _nodes(count: int) -> tuple[np.ndarray, np.ndarray]:
    return np.polynomial.legendre.leggauss(count)


def _series(
    rows: Float[np.ndarray, "rows p_in"], is_large: Bool[np.ndarray, "rows p_in"], end: float
) -> Float[np.ndarray, "rows p_in"]:
    """Integrate the series from 0 to ``end`` by a Gauss-Legendre rule, with phi itself for the large entries."""
    # 16 nodes for every 3 units of t.
    nodes, weights = _nodes(int(16 * end / 3))
    t, weights = end * (nodes + 1) / 2, end / 2 * weights
    order = np.arange(1, _SERIES_TERMS + 1)
    # Coefficients of the series in powers of t / end and end g, which neither overflow nor underflow.
    ratio = special.zeta(2.0 * order) * (math.sqrt(3) / math.pi) ** (2 * order)
    # Power sums of the small entries, one order after the other.
    small = np.where(is_large, 0.0, end * rows)
    squares, power, power_sums = small**2, np.ones_like(small), []
    for _ in order:
        power *= squares
        power_sums.append(np.sum(power, axis=1))
    # P at the nodes, [rows, nodes]: the exponential of the series, times phi of the large entries.
    powers = (t / end)[None, :] ** (2 * order[:, None])
    product = np.exp(-(np.array(power_sums).T * (ratio / order)) @ powers)
    at_row, at_column = np.nonzero(is_large)
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
