"""First-step moments by algebra: expectations of products of entries of A, by coincidence of indices (sympy).

An independent route: moments of products of A's entries are summed over all index coincidences, symbolically in the
step, s2 and k; no closed form of the package is used.
"""

from collections import Counter
from itertools import product

import sympy as sp

s2, k, step = sp.symbols("s2 k step", positive=True)


def expectation(entries: tuple[tuple[int, int], ...]) -> sp.Expr:
    """Return E[product of A's entries at these (row, column) places]: iid, symmetric, variance s2, kurtosis k."""
    value: sp.Expr = sp.Integer(1)
    for power in Counter(entries).values():
        if power % 2:
            return sp.Integer(0)
        value *= s2 if power == 2 else k * s2**2
    return value


def sgd_moments(grad: list[int], x: list[int], rank: int) -> tuple[sp.Expr, sp.Expr]:
    """Return E[w] and E[w^2] of w = -step g^T A^T A x, for one output row g and step = eta gamma^2."""
    columns = range(len(x))
    mean: sp.Expr = sp.Integer(0)
    second: sp.Expr = sp.Integer(0)
    for row, left, right in product(range(rank), columns, columns):
        mean += -step * grad[left] * x[right] * expectation(((row, left), (row, right)))
    for row, left, right in product(range(rank), columns, columns):
        for row2, left2, right2 in product(range(rank), columns, columns):
            places = ((row, left), (row, right), (row2, left2), (row2, right2))
            second += step**2 * grad[left] * x[right] * grad[left2] * x[right2] * expectation(places)
    return sp.expand(mean), sp.expand(second)


def sgd_matrix_moment(grad: list[int], rank: int) -> sp.Expr:
    """Return E|dM|_F^2 of dM = -step g^T A^T A for one row: the sum over columns of E[w^2] at unit inputs."""
    units = [[int(i == j) for i in range(len(grad))] for j in range(len(grad))]
    return sp.expand(sum(sgd_moments(grad, unit, rank)[1] for unit in units))


def random_input_second_moment(rank: int, p: int) -> sp.Expr:
    """Return E[w^2] / step^2 over Gaussian x, z and A with x' = rho x + sqrt(1 - rho^2) z, delta = 1.

    Every index sum is done by Wick's theorem for the inputs (x and z unit normals) and `expectation` for A.
    """
    rho = sp.Symbol("rho")
    total: sp.Expr = sp.Integer(0)
    for row, l, j, row2, l2, j2 in product(range(rank), range(p), range(p), range(rank), range(p), range(p)):  # noqa: E741
        weight = expectation(((row, l), (row, j), (row2, l2), (row2, j2)))
        if weight == 0:
            continue
        # E[x_l x_l2 x'_j x'_j2] by pairings: cov(x, x) = 1, cov(x, x') = rho, cov(x', x') = 1 at equal indices.
        wick = (l == l2) * (j == j2) + rho**2 * ((l == j) * (l2 == j2) + (l == j2) * (l2 == j))
        total += weight * wick
    return sp.expand(total)
