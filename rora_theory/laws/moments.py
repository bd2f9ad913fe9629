r"""Exact moments of the first adapter step: SGD and Adam, fixed or random data.

Setting: one adapted layer :math:`h = m_0 x + \gamma B A x`, B = 0, iid entries of A with variance s2 and kurtosis k,
and the gradient :math:`G = \partial L / \partial m` of the full weight. At the first step dL/dA = 0, so that only B
moves. The increment applied to x' is :math:`w = \Delta M x'` with

- SGD: :math:`\Delta M = -\eta \gamma^2 G A^T A`,
- Adam: :math:`\Delta M = -\eta \gamma\, f(G A^T) A` with :math:`f(u) = u / (|u| + \epsilon/\gamma)`, the bias-corrected
  first step; :math:`\epsilon = 0` is the sign limit, which is also signSGD's step.

All values are computed in float64 on the host.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import scipy
from jaxtyping import Float
from scipy import special

from rora_theory.errors import InputError
from rora_theory.inits import Entries, Init, entries
from rora_theory.laws import sign_expectation
from rora_theory.optimizers import OPTIMIZERS, Optimizer, scaling_power
from rora_theory.scaling import check_between, check_choice, check_integer, check_not_negative, check_positive

HALF_NORMAL_MEAN = math.sqrt(2 / math.pi)
"""E|z| of a standard normal z."""

_MAX_ENUMERATED_INPUTS = 16
"""Largest p_in for which the law of Rademacher entries enumerates the 2^p_in values of a row."""


@dataclass(frozen=True)
class FirstStepMoments:
    """Moments over draws of A, and of the inputs if they are random.

    Attributes:
      mean: Mean E[w_i] of each output.
      second_moment: Second moment E[w_i^2] of each output.
      matrix_second_moment: Mean squared Frobenius norm E|dM|_F^2 of the increment.
    """

    mean: Float[np.ndarray, "*tokens p_out"]
    second_moment: Float[np.ndarray, "*tokens p_out"]
    matrix_second_moment: float

    @property
    def variance(self) -> Float[np.ndarray, "*tokens p_out"]:
        """Variance of each output: E[w_i^2] - E[w_i]^2."""
        return self.second_moment - self.mean**2

    @property
    def norm_second_moment(self) -> Float[np.ndarray, "*tokens"]:
        """Mean squared norm E|w|_2^2, the sum of E[w_i^2] over i."""
        return np.asarray(np.sum(self.second_moment, axis=-1))


def first_step_moments(
    grad: Float[np.ndarray, "p_out p_in"],
    x: Float[np.ndarray, "*tokens p_in"],
    *,
    rank: int,
    scaling: float,
    learning_rate: float = 1.0,
    optimizer: Optimizer = "sgd",
    init: Init = "normal",
    epsilon: float = 0.0,
) -> FirstStepMoments:
    r"""Compute the moments of w over draws of A for fixed data (G, x').

    SGD, with g_i the i-th row of G:

    .. math::
        E[w_i]   &= -\eta \gamma^2 s_2 r\, (g_i \cdot x') \\
        E[w_i^2] &= \eta^2 \gamma^4 s_2^2 [ (r^2 + r)(g_i \cdot x')^2 + r |g_i|^2 |x'|^2
                    + r (k - 3) \textstyle\sum_j g_{ij}^2 x_j'^2 ] \\
        E|\Delta M|_F^2 &= \eta^2 \gamma^4 s_2^2\, r (r + p_{in} + k - 2) |G|_F^2

    Adam, with m_i = E[f(g_i . a) a] over one row a of A (Gaussian sign limit: :math:`s \sqrt{2/\pi}\, g_i/|g_i|`):

    .. math::
        E[w_i]   &= -\eta \gamma r\, (m_i \cdot x') \\
        E[w_i^2] &= \eta^2 \gamma^2 [ r E[f^2 (a \cdot x')^2] + r (r - 1) (m_i \cdot x')^2 ] \\
        E|\Delta M|_F^2 &= \eta^2 \gamma^2 \textstyle\sum_i [ r E[f^2 |a|^2] + r (r - 1) |m_i|^2 ]

    Args:
      grad: Gradient G of the loss with respect to the full weight.
      x: Inputs x' at which the updated layer is evaluated; leading axes are tokens.
      rank: Rank r of the adapter, 1 or more.
      scaling: Scaling factor gamma, above 0, from `rora_theory.scaling_factor`.
      learning_rate: Learning rate eta, above 0.
      optimizer: Optimizer of the step, ``"sgd"`` or ``"adam"``.
      init: Initialisation of A, see `rora_theory.inits.entries`.
      epsilon: Adam's epsilon, 0 or more, added to the gradient of B; 0 is the sign limit. Neglecting epsilon changes
        m_i by about the factor 1 - (epsilon / (gamma s |g_i|)) log(gamma s |g_i| / epsilon).

    Returns:
      The moments. They are exact for SGD, and for Adam with Gaussian A at any epsilon and with Rademacher A up to
      p_in = 16. Other cases in the sign limit are one-dimensional integrals for data without ties g_i . a = 0. Their
      error is 1e-9 if at least four entries of a gradient row matter, and 1e-5 for a single entry. With epsilon > 0
      they use the Gaussian correction factor, with a relative error below epsilon / (gamma s |g_i|).

    Raises:
      InputError: If an argument is out of range or the shapes don't match.
    """
    grad, x = np.asarray(grad, np.float64), np.asarray(x, np.float64)
    if grad.ndim != 2 or x.ndim < 1 or x.shape[-1] != grad.shape[1]:
        raise InputError(
            "grad and x must have shapes [p_out, p_in] and [..., p_in] with the same p_in, "
            f"got grad {grad.shape} and x {x.shape}"
        )
    if not (np.isfinite(grad).all() and np.isfinite(x).all()):
        raise InputError("grad and x must be finite, got a NaN or infinite value")
    check_step(rank=rank, scaling=scaling, learning_rate=learning_rate, optimizer=optimizer)
    p_in = grad.shape[1]
    law = entries(init, rank=rank, p_in=p_in)
    r, s2, k = float(rank), law.variance, law.kurtosis
    # Gamma enters SGD's change twice, through the gradient of B and through the output; Adam's only through the output.
    step = learning_rate * scaling ** scaling_power(optimizer)
    signal, grad2, x2 = x @ grad.T, np.sum(grad**2, axis=1), np.sum(x**2, axis=-1, keepdims=True)

    if optimizer == "sgd":
        # E[w_i^2] contains fourth moments of A's entries. As for Gaussian entries, they are sums over pairings of equal
        # indices; the excess kurtosis k - 3 adds a term where all four indices are equal.
        fourth = (x**2) @ (grad**2).T
        mean = -step * s2 * r * signal
        second = (step * s2) ** 2 * ((r**2 + r) * signal**2 + r * grad2 * x2 + r * (k - 3) * fourth)
        matrix = (step * s2) ** 2 * r * (r + p_in + k - 2) * float(np.sum(grad2))
        return FirstStepMoments(mean, second, matrix)

    # Adam: a sum over r independent rows of A, r (r - 1) of the pairs with different rows.
    check_not_negative("epsilon", float(epsilon))
    # The gradient of B is gamma G A^T: dividing it by gamma moves gamma to epsilon.
    row = _adam_row_moments(grad, law, epsilon / scaling)
    coupled = x @ row.direction.T
    mean = -step * r * coupled
    second = step**2 * (r * row.second_moment(x) + r * (r - 1) * coupled**2)
    matrix = step**2 * float(np.sum(r * row.norm_second_moment + r * (r - 1) * np.sum(row.direction**2, axis=1)))
    return FirstStepMoments(mean, second, matrix)


def random_input_moments(
    *,
    rank: int,
    p_in: int,
    scaling: float,
    overlap: float = 0.0,
    learning_rate: float = 1.0,
    delta: float | Float[np.ndarray, " p_out"] = 1.0,
    optimizer: Optimizer = "sgd",
    init: Init = "normal",
) -> FirstStepMoments:
    r"""Compute the moments over A, x and x' for one sample with Gaussian inputs, the paper's setting.

    The gradient has rows :math:`g_i = \delta_i x`; x and z are iid N(0, 1), and
    :math:`x' = \rho x + \sqrt{1 - \rho^2}\, z`. SGD:

    .. math::
        E[w_i]   &= -\eta \delta_i \gamma^2 s_2 \rho\, r p \\
        E[w_i^2] &= \eta^2 \delta_i^2 \gamma^4 s_2^2 \{ (r^2 + r)[\rho^2 p(p+2) + (1-\rho^2) p]
                    + r [\rho^2 p(p+2) + (1-\rho^2) p^2] + r (k-3) p (1 + 2\rho^2) \}

    For Gaussian A, :math:`s_2^2` times the braces is :math:`s_2^2\, r p [\rho^2 (r+2)(p+2) + (1-\rho^2)(r+p+1)]`.
    Adam, sign limit:

    .. math::
        E[w_i]   &= -\eta\, \mathrm{sign}(\delta_i) \gamma s r \sqrt{2/\pi}\, \rho\, E|x| \\
        E[w_i^2] &= \eta^2 \gamma^2 s_2 [ r p + r(r-1)(2/\pi)(\rho^2 p + 1 - \rho^2) ]

    Args:
      rank: Rank r of the adapter, 1 or more.
      p_in: Number of inputs p, 1 or more.
      scaling: Scaling factor gamma, above 0, from `rora_theory.scaling_factor`.
      overlap: Correlation rho of x and x', from -1 to 1; 0 is the paper's independence.
      learning_rate: Learning rate eta, above 0.
      delta: Derivative :math:`\delta_i = \partial L / \partial w_i`: a number (then p_out = 1), or one for each output.
      optimizer: Optimizer of the step, ``"sgd"`` or ``"adam"`` (sign limit).
      init: Initialisation of A.

    Returns:
      The moments, of shape [p_out]. They are exact for SGD, and for Adam with Gaussian or Rademacher A. Adam with
      uniform A is a series. Its relative error in E[w_i^2] is below 0.6% at every p_in (largest near p_in = 3) and
      decreases at least as fast as 1/p_in (0.1% at 16).

    Raises:
      InputError: If an argument is out of range.
    """
    check_step(rank=rank, scaling=scaling, learning_rate=learning_rate, optimizer=optimizer)
    check_between("overlap", overlap, -1, 1)
    check_integer("p_in", p_in)
    delta = np.atleast_1d(np.asarray(delta, np.float64))
    if delta.ndim != 1 or not np.isfinite(delta).all():
        raise InputError(f"delta must be a finite number or a vector of finite numbers, got {delta.tolist()}")
    law = entries(init, rank=rank, p_in=p_in)
    r, p, s2, k = float(rank), float(p_in), law.variance, law.kurtosis
    rho2 = overlap**2
    step = learning_rate * scaling ** scaling_power(optimizer)

    if optimizer == "sgd":
        # Moments of the two Gaussian inputs that the law for fixed data contains.
        inner2 = rho2 * p * (p + 2) + (1 - rho2) * p  # E[(x . x')^2]
        norms2 = rho2 * p * (p + 2) + (1 - rho2) * p**2  # E[|x|^2 |x'|^2]
        fourth = p * (1 + 2 * rho2)  # E[sum_j x_j^2 x'_j^2]
        moment = s2**2 * ((r**2 + r) * inner2 + r * norms2 + r * (k - 3) * fourth)
        mean = -step * s2 * overlap * r * p * delta
        matrix = (step * s2) ** 2 * r * (r + p + k - 2) * p * float(np.sum(delta**2))
        return FirstStepMoments(mean, step**2 * moment * delta**2, matrix)

    # Adam in the sign limit depends on the sign of delta alone.
    signs = np.sign(delta)
    mean_norm, along, direction2 = _sign_coupling(law, p_in)
    moment = r * s2 * p + r * (r - 1) * (rho2 * along + (1 - rho2) * direction2)
    mean = -step * r * HALF_NORMAL_MEAN * mean_norm * overlap * signs
    matrix = step**2 * float(np.sum(signs**2)) * (r * s2 * p + r * (r - 1) * direction2)
    return FirstStepMoments(mean, step**2 * moment * signs**2, matrix)


def crossing_rank(
    grad: Float[np.ndarray, "p_out p_in"],
    x: Float[np.ndarray, "*tokens p_in"],
    *,
    optimizer: Optimizer = "sgd",
) -> Float[np.ndarray, "*tokens"]:
    r"""Compute the rank r* at which signal and cross-talk are equal in E|w|^2, for each token.

    Above r* the signal dominates. SGD: :math:`r^* = |G|_F^2 |x'|^2 / |G x'|^2`, which is 1/cos^2 for a single row. Adam
    (Gaussian A, sign limit): :math:`r^* = 1 + (\pi/2)\, p_{out} |x'|^2 / \sum_i (\hat g_i \cdot x')^2` over rows with a
    nonzero gradient.

    Args:
      grad: Gradient G of the loss with respect to the full weight.
      x: Inputs x' at which the updated layer is evaluated; leading axes are tokens.
      optimizer: Optimizer of the step.

    Returns:
      The crossing rank of each token; a very large number if the signal is zero.

    Raises:
      InputError: If the optimizer is unknown.
    """
    grad, x = np.asarray(grad, np.float64), np.asarray(x, np.float64)
    check_choice("optimizer", optimizer, OPTIMIZERS)
    x2 = np.sum(x**2, axis=-1)
    row_norms = np.linalg.norm(grad, axis=1)
    if optimizer == "adam":
        # The sign step sees only the direction of a row, so that every row with a gradient counts as a unit vector.
        grad, row_norms = grad[row_norms > 0] / row_norms[row_norms > 0, None], np.ones(np.count_nonzero(row_norms))
    # Without a signal the ratio is very large rather than a division by 0.
    signal2 = np.maximum(np.sum((x @ grad.T) ** 2, axis=-1), np.finfo(np.float64).tiny)
    ratio = np.sum(row_norms**2) * x2 / signal2
    return np.asarray(ratio if optimizer == "sgd" else 1 + math.pi / 2 * ratio)


def random_input_crossing_rank(p_in: float, overlap: float, *, optimizer: Optimizer = "sgd") -> float:
    r"""Compute the rank r* at which signal and cross-talk are equal in `random_input_moments`, for Gaussian A.

    It is that of `crossing_rank`, with expectations over inputs in place of tokens. SGD:
    :math:`r^* = E|x|^2|x'|^2 / E(x\cdot x')^2`; Adam: :math:`r^* = 1 + (\pi/2)\, p / (\rho^2 p + 1 - \rho^2)`.

    Args:
      p_in: Number of inputs p, 1 or more.
      overlap: Correlation rho of x and x', from -1 to 1.
      optimizer: Optimizer of the step.

    Returns:
      The crossing rank.

    Raises:
      InputError: If the optimizer is unknown or the overlap is out of range.
    """
    check_choice("optimizer", optimizer, OPTIMIZERS)
    check_between("overlap", overlap, -1, 1)
    rho2 = overlap**2
    if optimizer == "adam":
        return 1 + math.pi / 2 * p_in / (rho2 * p_in + 1 - rho2)
    inner2 = rho2 * (p_in + 2) + (1 - rho2)
    norms2 = rho2 * (p_in + 2) + (1 - rho2) * p_in
    return norms2 / inner2


def linear_term(crossing: Float[np.ndarray, "..."] | float, *, optimizer: Optimizer) -> Float[np.ndarray, "..."]:
    r"""Compute the linear term c from the crossing rank r*, for Gaussian A.

    E[w^2] at one gamma is proportional to :math:`r^2 + c\, r`. SGD has terms in :math:`r^2 + r` and r, so that
    :math:`c = r^* + 1`; Adam has terms in :math:`r (r - 1)` and :math:`r (r^* - 1)`, so that :math:`c = r^* - 2`.

    Args:
      crossing: Crossing rank, from `crossing_rank` or `random_input_crossing_rank`.
      optimizer: Optimizer of the step.

    Returns:
      The linear term at each crossing rank.
    """
    return np.asarray(np.asarray(crossing, np.float64) + (1 if optimizer == "sgd" else -2))


def local_exponent(
    rank: Float[np.ndarray, "..."] | float, linear_term: Float[np.ndarray, "..."] | float
) -> Float[np.ndarray, "..."]:
    r"""Compute the slope d log E[w^2] / d log r of :math:`r^2 + c\, r` at gamma = 1.

    The slope is 1 far below the crossing rank and 2 far above it.

    Args:
      rank: Rank r of the adapter.
      linear_term: Linear term c, see `linear_term`.

    Returns:
      The slope at each rank.
    """
    rank, c = np.asarray(rank, np.float64), np.asarray(linear_term, np.float64)
    return np.asarray((2 * rank + c) / (rank + c))


def equal_change_rank_exponent(
    first: float, second: float, linear_term: Float[np.ndarray, "..."] | float
) -> Float[np.ndarray, "..."]:
    r"""Compute the exponent in the rank of Adam's rate that preserves the first step's E[w^2] at constant gamma r.

    At constant gamma r, E[w^2] is proportional to :math:`1 + c / r` and to the rate squared. The exponent is 0 in the
    signal regime and 1/2 in the cross-talk regime.

    Args:
      first: First rank.
      second: Second rank, different from the first.
      linear_term: Linear term c, measured for a module, or from `linear_term` for Gaussian A.

    Returns:
      The mean exponent between the two ranks.
    """
    c = np.asarray(linear_term, np.float64)
    return np.asarray(np.log((1 + c / first) / (1 + c / second)) / 2 / math.log(second / first))


def flat_kappa(slope: Float[np.ndarray, "..."] | float, *, optimizer: Optimizer) -> Float[np.ndarray, "..."]:
    """Compute the kappa of gamma = alpha / r^kappa that makes the step independent of r.

    E[w^2] is proportional to gamma^4 under SGD and to gamma^2 under Adam, so that kappa is slope/4 and slope/2.

    Args:
      slope: Slope of E[w^2] at gamma = 1, from `local_exponent`.
      optimizer: Optimizer of the step.

    Returns:
      The exponent kappa.
    """
    return np.asarray(slope, np.float64) / (2 * scaling_power(optimizer))


def check_step(*, rank: int, scaling: float, learning_rate: float, optimizer: Optimizer) -> None:
    """Raise `InputError` unless the rank, scaling, learning rate and optimizer are valid."""
    check_integer("rank", rank)
    check_positive("scaling", scaling)
    check_positive("learning_rate", learning_rate)
    check_choice("optimizer", optimizer, OPTIMIZERS)


@dataclass(frozen=True)
class _AdamRowMoments:
    """Moments over one row a of A of Adam's step f(u) = u / (|u| + e), with u = g_i . a and e = epsilon / gamma.

    Attributes:
      direction: Vectors m_i = E[f a], [p_out, p_in].
      norm_second_moment: E[f^2 |a|^2], [p_out].
      unit: Unit vectors g_i / |g_i|, 0 for a zero row, [p_out, p_in].
      along: E[f^2 (a.v)^2] for a unit vector v along g_i, [p_out].
      across: E[f^2 (a.v)^2] for a unit vector v orthogonal to g_i, [p_out].
      table: All 2^p_in values of a, [2^p_in, p_in], and of f, [2^p_in, p_out], if they are enumerated.
        E[f^2 (a.x)^2] is then their mean.
    """

    direction: np.ndarray
    norm_second_moment: np.ndarray
    unit: np.ndarray
    along: np.ndarray
    across: np.ndarray
    table: tuple[np.ndarray, np.ndarray] | None = None

    def second_moment(self, x: Float[np.ndarray, "*tokens p_in"]) -> Float[np.ndarray, "*tokens p_out"]:
        """Compute E[f^2 (a . x')^2] for each token and output."""
        if self.table is not None:
            a, f = self.table
            return ((x @ a.T) ** 2) @ (f**2) / len(a)
        # Split |x'|^2 into the components along g_i and orthogonal to it.
        inner2 = (x @ self.unit.T) ** 2
        return self.along * inner2 + self.across * (np.sum(x**2, axis=-1, keepdims=True) - inner2)


def _adam_row_moments(grad: Float[np.ndarray, "p_out p_in"], law: Entries, e: float) -> _AdamRowMoments:
    """Compute the moments for the gradient G, the distribution of A's entries and e = epsilon / gamma."""
    p_out, p_in = grad.shape
    norms = np.linalg.norm(grad, axis=1)
    has_gradient = norms > 0  # the other rows contribute nothing
    unit = np.where(has_gradient[:, None], grad / np.where(has_gradient, norms, 1.0)[:, None], 0.0)
    # Rademacher entries of a short row: mean over all 2^p_in values.
    if law.shape == "rademacher" and p_in <= _MAX_ENUMERATED_INPUTS:
        # Bit j of the index n gives the sign of entry j.
        signs = 1 - 2 * ((np.arange(2**p_in)[:, None] >> np.arange(p_in)) & 1)
        a = law.deviation * signs.astype(np.float64)
        u = a @ grad.T
        u[np.abs(u) <= 1e-12 * np.abs(grad).sum(axis=1) * law.deviation] = 0.0  # ties, up to rounding
        f = np.divide(u, np.abs(u) + e, out=np.zeros_like(u), where=u != 0)
        norm2 = law.variance * p_in * np.mean(f**2, axis=0)
        return _AdamRowMoments(f.T @ a / len(a), norm2, unit, norm2, norm2, (a, f))
    # Otherwise: the exact sign direction, corrected for epsilon by the factor of a Gaussian u.
    ratio = np.divide(e, law.deviation * norms, out=np.full(p_out, np.inf), where=has_gradient)
    mean_fz, mean_f2, mean_f2z2 = _smoothed_sign_moments(ratio)
    direction = law.deviation * sign_direction(unit, law.shape) * (mean_fz / HALF_NORMAL_MEAN)[:, None]
    # Along g_i the row a determines f; orthogonal to g_i it is independent of f, exactly so if a is Gaussian.
    along, across = law.variance * mean_f2z2, law.variance * mean_f2
    return _AdamRowMoments(direction, along + (p_in - 1) * across, unit, along, across)


def _smoothed_sign_moments(ratio: Float[np.ndarray, " n"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compute E[f z], E[f^2] and E[f^2 z^2] of f = z / (|z| + e), z standard normal, for each e.

    The trapezoidal rule in log z converges geometrically, because the integrands are smooth and vanish at both ends.
    An infinite e gives zeros.
    """
    # Half of the density doubled, because the integrands are even; dz = z d(log z). Beyond 40 the density underflows.
    z = np.exp(np.linspace(math.log(1e-16), math.log(40.0), 1201))
    weight = 2 * np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi) * z * math.log(z[1] / z[0])
    # Rows often share a ratio, in the sign limit all of them: integrate once for each distinct value.
    values, inverse = np.unique(ratio, return_inverse=True)
    is_infinite = np.isinf(values)[:, None]
    f = np.where(is_infinite, 0.0, z / (z + np.where(is_infinite, 1.0, values[:, None])))
    return (f @ (weight * z))[inverse], (f**2 @ weight)[inverse], (f**2 @ (weight * z**2))[inverse]


def sign_direction(
    unit: Float[np.ndarray, "p_out p_in"], entry: Literal["normal", "uniform", "rademacher"]
) -> Float[np.ndarray, "p_out p_in"]:
    """Compute E[sign(g . a) a] for entries of a with variance 1.

    Args:
      unit: Rows g of length 1, or of zeros.
      entry: Distribution of the entries of a.

    Returns:
      The expectation for each row, in float64.
    """
    if entry == "normal":
        return HALF_NORMAL_MEAN * unit
    # The bytes of the matrix are hashable, unlike the array, so that the result can be cached.
    return _sign_direction(unit.tobytes(), unit.shape, entry)


@lru_cache(maxsize=4)  # shared by all ranks, rules and scalings of a layer
def _sign_direction(data: bytes, shape: tuple[int, int], entry: Literal["uniform", "rademacher"]) -> np.ndarray:
    r"""Compute E[sign(g . a) a] of unit-variance entries for unit rows g.

    From sign(u) = (2/pi) int sin(tu) dt/t and E[a sin(ta)] = -phi'(t):

    .. math:: m_j = -\frac{2}{\pi} \int_0^\infty \frac{dt}{t}\, \phi'(t g_j) \prod_{l \ne j} \phi(t g_l).
    """
    unit = np.frombuffer(data).reshape(shape)
    law = Entries(entry, 1.0, 1.0 if entry == "rademacher" else 9 / 5)
    direction = np.zeros_like(unit)
    # The power series is much faster; it serves uniform entries in most rows.
    is_done = np.zeros(shape[0], bool)
    if entry == "uniform":
        is_done, direction = sign_expectation.uniform(unit)
    # Gauss-Legendre rule on one interval after the other, until the integrand of a row is negligible.
    nodes, weights = np.polynomial.legendre.leggauss(8)
    width, end = 2.0, 400.0  # in units of 1 / deviation of u, which is 1 for unit rows
    remaining = np.flatnonzero(np.any(unit != 0, axis=1) & ~is_done)
    start = 0.0
    while remaining.size and start < end:
        largest = np.zeros(remaining.size)
        integral = np.zeros((remaining.size, unit.shape[1]))
        for node, weight in zip(nodes, weights, strict=True):
            t = start + width * (node + 1) / 2
            phi, slope = law.characteristic(t * unit[remaining])
            phi[phi == 0.0] = np.finfo(np.float64).tiny  # the product over the others is a quotient
            integrand = (-2 / math.pi / t) * slope * (np.prod(phi, axis=1, keepdims=True) / phi)
            integral += weight * width / 2 * integrand
            largest = np.maximum(largest, np.max(np.abs(integrand), axis=1))
        direction[remaining] += integral
        remaining = remaining[largest * end > 1e-11]
        start += width
    return direction


def _sign_coupling(law: Entries, p_in: int) -> tuple[float, float, float]:
    r"""Compute E|a|, E_x[(m . x)^2] and E_x|m|^2 for m(x) = E_a[sign(a . x) a] and x ~ N(0, I).

    With independent copies a, a' and their cosine c, exchanging the averages (Grothendieck's identity) gives
    E_x(m.x)^2 = (2/pi) E[|a||a'| (sqrt(1-c^2) + c asin c)] and E_x|m|^2 = (2/pi) E[a.a' asin c].
    """
    p, s2 = float(p_in), law.variance
    # Gaussian: m is parallel to x, and E|a| is that of a chi distribution.
    if law.is_normal:
        mean_norm = law.deviation * math.sqrt(2) * math.exp(special.gammaln((p + 1) / 2) - special.gammaln(p / 2))
        return mean_norm, 2 / math.pi * s2 * p, 2 / math.pi * s2
    # Rademacher: c depends on the number of entries that agree, which is binomial.
    if law.shape == "rademacher":
        agree = np.arange(p_in + 1)
        log_probability = special.gammaln(p + 1) - special.gammaln(agree + 1) - special.gammaln(p - agree + 1)
        probability = np.exp(log_probability - p * math.log(2))
        c = (2 * agree - p) / p
        along = s2 * p * float(probability @ (np.sqrt(1 - c**2) + c * np.arcsin(c)))
        direction2 = s2 * p * float(probability @ (c * np.arcsin(c)))
        return math.sqrt(s2 * p), 2 / math.pi * along, 2 / math.pi * direction2
    return _uniform_sign_coupling(s2, p_in)


def _uniform_sign_coupling(s2: float, p_in: int) -> tuple[float, float, float]:
    """Compute the coupling of `_sign_coupling` for uniform entries, by its series in the cosine c.

    The first two terms of the series are one-dimensional integrals. The rest is that of Gaussian entries with the same
    E|a|. By the symmetry of signs E[(a.a')^2/(|a||a'|)] = (E|a|)^2/p, and E[(a.a')^4/(|a||a'|)^3] is the sum over j, l
    of squares of E[a_j^2 a_l^2/|a|^3].
    """
    p = float(p_in)
    half_width = math.sqrt(3 * s2)  # entries are uniform from -half_width to half_width

    def laplace_moments(t: float) -> tuple[float, float, float]:
        """Compute E exp(-t a^2), E a^2 exp(-t a^2) and E a^4 exp(-t a^2)."""
        y = half_width * math.sqrt(t)
        zeroth = math.sqrt(math.pi) * math.erf(y) / (2 * y) if y > 1e-8 else 1.0
        if y < 0.3:  # the closed forms cancel at small y: sum_n (-y^2)^n / n! / (2n + 1 + m)
            second = s2 * 3 * sum((-y * y) ** n / math.factorial(n) / (2 * n + 3) for n in range(9))
            fourth = s2**2 * 9 * sum((-y * y) ** n / math.factorial(n) / (2 * n + 5) for n in range(9))
            return zeroth, second, fourth
        # Integration by parts, with exp(-y^2) at the ends of the interval.
        end = math.exp(-y * y)
        second = (zeroth - end) / (2 * t)
        return zeroth, second, (3 * second - half_width**2 * end) / (2 * t)

    def norm_integrand(t: float) -> float:
        zeroth, second, _ = laplace_moments(t)
        return p * second * zeroth ** (p - 1) * math.sqrt(t)

    def same_entry_integrand(t: float) -> float:
        zeroth, _, fourth = laplace_moments(t)
        return fourth * zeroth ** (p - 1) * t**1.5

    def integrate_over_log(integrand: Callable[[float], float]) -> float:
        # In log t the integrand is smooth and concentrated near 1 / E|a|^2.
        centre = -math.log(s2 * p)
        value, _ = scipy.integrate.quad(lambda log_t: integrand(math.exp(log_t)), centre - 30, centre + 60, limit=400)
        return value

    # E[Q / sqrt(Q)] = int E[Q exp(-tQ)] t^(-1/2) dt / Gamma(1/2), and with t^(1/2) / Gamma(3/2) for 1 / Q^(3/2).
    mean_norm = integrate_over_log(norm_integrand) / math.gamma(0.5)
    # E[a_j^2 a_l^2/|a|^3] for j = l and for j != l. Its sum over j, l is E|a|.
    same_entry = integrate_over_log(same_entry_integrand) / math.gamma(1.5)
    two_entries = (mean_norm - p * same_entry) / (p * (p - 1)) if p_in > 1 else 0.0
    # E[(a.a')^2/(|a||a'|)] and E[(a.a')^4/(|a||a'|)^3], the first two terms of the series.
    second = mean_norm**2 / p
    fourth = p * same_entry**2 + 3 * p * (p - 1) * two_entries**2
    # The rest of the series from Gaussian entries, for which ratio is (E|a|)^2 / (s2 p).
    ratio = 2 / p * math.exp(2 * (special.gammaln((p + 1) / 2) - special.gammaln(p / 2)))
    rest_along = (1 - ratio * (1 + 1 / (2 * p) + 1 / (8 * p * (p + 2)))) / ratio * mean_norm**2
    rest_direction2 = (1 - ratio * (1 + 1 / (2 * (p + 2)))) / ratio * second
    along = mean_norm**2 + second / 2 + fourth / 24 + rest_along
    return mean_norm, 2 / math.pi * along, 2 / math.pi * (second + fourth / 6 + rest_direction2)
