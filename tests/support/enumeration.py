"""Exact first-step moments by brute force: every sign matrix A, in integer arithmetic. Shares no code with the laws."""

from fractions import Fraction
from itertools import product


def sign(value: int) -> int:
    return (value > 0) - (value < 0)


def enumerate_first_step(
    grad: list[list[int]], x: list[int], rank: int, optimizer: str
) -> tuple[list[Fraction], list[Fraction], Fraction]:
    """Return E[w_i], E[w_i^2] and E|dM|_F^2 over all A in {-1, 1}^(rank x p_in), at eta = gamma = 1.

    B1 = -f(G A^T) with f the identity (SGD) or the sign (Adam), dM = B1 A, w = dM x, all in Python integers.
    """
    p_out, p_in = len(grad), len(x)
    mean, second, matrix = [0] * p_out, [0] * p_out, 0
    for entries in product((-1, 1), repeat=rank * p_in):
        rows = [entries[k * p_in : (k + 1) * p_in] for k in range(rank)]
        for i in range(p_out):
            weights = [sum(g * a for g, a in zip(grad[i], row, strict=True)) for row in rows]
            if optimizer == "adam":
                weights = [sign(weight) for weight in weights]
            dm = [-sum(weight * row[j] for weight, row in zip(weights, rows, strict=True)) for j in range(p_in)]
            w = sum(d * value for d, value in zip(dm, x, strict=True))
            mean[i] += w
            second[i] += w * w
            matrix += sum(d * d for d in dm)
    count = 2 ** (rank * p_in)
    return [Fraction(m, count) for m in mean], [Fraction(s, count) for s in second], Fraction(matrix, count)
