r"""Laws after the first step: the change of a layer after many steps at a constant gradient.

Setting: one adapted layer, B = 0 initially, iid entries of A, and a constant gradient G of the full weight. The
gradient is nearly constant while the loss has hardly changed. Every later step then has a closed form.

**Sign descent** (Adam with epsilon 0, Lion, signSGD). With :math:`S = \mathrm{sign}(G A_0^\top)` and
:math:`D = \mathrm{sign}(S^\top G)`, row k of A moves along row k of D once B has moved along -S:

.. math:: B = -b\, S, \qquad A = A_0 + a\, D, \qquad
          w = -\gamma\, b\, \textstyle\sum_k S_k \left( a_k \cdot x' + a\, D_k \cdot x' \right)

Here b and a are the distances that every entry of B and of A has moved (`distances`): b is the sum of the learning
rates, and a starts to grow one step later. The first term is the **B part**, the second the **A part**. The law holds
as long as no entry of :math:`G A^\top` changes its sign: without limit for one sample, otherwise for distances far
below the quantiles `RowTerms.sign_change_distances`.

Rows of A are independent and identically distributed, so that with :math:`q_k = S_k(a_k \cdot x' + a D_k \cdot x')`
at every rank

.. math:: E[w_i^2] = (\gamma b)^2 [\, r\, E[q_i^2] + r (r - 1)\, E[q_i]^2 \,]

A few hundred sampled rows of A therefore estimate the law of all ranks (`row_terms`).

For SGD see `rora_theory.laws.sgd`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import scipy
from jaxtyping import Float

from rora_theory.errors import InputError
from rora_theory.scaling import check_between, check_integer, check_positive

SIGN_CHANGE_SHARES = (0.05, 0.25, 0.5, 0.75, 0.95)
"""Levels of the reported quantiles of the distance at which an entry of G A^T changes its sign."""

MatrixProduct = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Function that multiplies two matrices of the same dtype."""

MAX_GRADIENT_GROWTH = 1e100
"""Largest growth of B's gradient: float64 must represent its square."""


class Distances(NamedTuple):
    """Distances that every entry of the factors has moved, in the units of the entries.

    Attributes:
      B: Distance b of an entry of B from 0.
      A: Distance a of an entry of A from its initial value.
    """

    B: float
    A: float


def distances(
    rates: Sequence[float] | Float[np.ndarray, " steps"],
    *,
    decay: tuple[float, float] | None = (0.9, 0.999),
    crossing_distance: float = math.inf,
) -> Distances:
    r"""Compute the distances that the entries of B and A move along constant signs.

    Under sign descent an entry moves by the learning rate in every step with a nonzero gradient: A waits until B has
    moved. Adam follows a growing gradient faster, by :math:`\hat m / \sqrt{\hat v}` of the gradient's history. A's
    gradient grows with b, so that at a constant rate A moves up to :math:`\sqrt 3` times as fast as under sign descent
    (for a number of steps far above :math:`1/(1-\beta_1)` and far below :math:`1/(1-\beta_2)`). B's gradient grows as
    :math:`1 + a/a_\times`.

    Args:
      rates: Learning rate of each step, 0 or more. A warm-up that starts at 0 has 0 as its first entry.
      decay: Adam's beta_1 and beta_2. None selects sign descent.
      crossing_distance: Distance a at which the A part equals the B part (`RowTerms.crossing_distance`). It sets the
        growth of B's gradient under Adam; infinity means a constant gradient.

    Returns:
      The distances b and a after the last step.

    Raises:
      InputError: If there are no steps, a rate is negative, a decay is outside [0, 1), or the crossing distance is not
        above 0 or is negligible compared to the rates.

    Examples:
      >>> distances([0.25] * 4, decay=None)
      Distances(B=1.0, A=0.75)
      >>> round(distances([1e-3] * 200).A / distances([1e-3] * 200, decay=None).A, 2)  # Adam moves A faster
      1.47
    """
    rates = np.asarray(rates, np.float64)
    if rates.ndim != 1 or not len(rates):
        raise InputError(f"rates must have one rate per step, and at least one step, got shape {rates.shape}")
    if not (np.isfinite(rates).all() and rates.min() >= 0):
        raise InputError("rates must be finite and at least 0, got a rate that is negative or not finite")
    check_between("crossing_distance", crossing_distance, 0, closed="right")
    # Adam squares B's gradient, which grows as 1 + a / crossing_distance: float64 must represent the square.
    rate_sum = float(rates.sum())
    if rate_sum / crossing_distance > MAX_GRADIENT_GROWTH:
        raise InputError(
            f"crossing_distance must be at least {1 / MAX_GRADIENT_GROWTH:g} of the sum of the rates, which is "
            f"{rate_sum:.3g}; got {crossing_distance!r}"
        )
    # Both factors start at distance 0, each with Adam moments of its own.
    adam_B, adam_A = _AdamStep(decay), _AdamStep(decay)
    b = a = 0.0
    for rate in rates.tolist():
        # Relative sizes of both gradients before the step: both factors are updated from the same point.
        gradient_B, gradient_A = 1 + a / crossing_distance, b
        b += rate * adam_B.step(gradient_B)
        a += rate * adam_A.step(gradient_A)
    return Distances(b, a)


class _AdamStep:
    """Adam's step in units of the learning rate for a gradient of constant sign; 1 under sign descent."""

    def __init__(self, decay: tuple[float, float] | None) -> None:
        for beta in decay or ():
            check_between("decay", beta, 0, 1, closed="left")
        self._decay = decay
        self._first = self._second = 0.0
        self._count = 0

    def step(self, gradient: float) -> float:
        if self._decay is None:
            return float(gradient > 0)
        beta1, beta2 = self._decay
        self._count += 1
        # Moments of the gradient so far, and Adam's step with bias correction.
        self._first = beta1 * self._first + (1 - beta1) * gradient
        self._second = beta2 * self._second + (1 - beta2) * gradient**2
        if self._second == 0:
            return 0.0
        return self._first / (1 - beta1**self._count) / math.sqrt(self._second / (1 - beta2**self._count))


class Quadratic(NamedTuple):
    """Quadratic polynomial c0 + c1 a + c2 a^2 in A's distance a."""

    c0: float
    c1: float
    c2: float

    def __call__(self, distance: float) -> float:
        """Evaluate the polynomial at a distance of A."""
        return self.c0 + distance * (self.c1 + distance * self.c2)


@dataclass(frozen=True)
class RowTerms:
    r"""Contribution of one row of A to the change, summed over outputs and averaged over tokens; see `row_terms`.

    Attributes:
      coherent: Polynomial in a of :math:`\sum_i E[q_i]^2`.
      total: Polynomial in a of :math:`\sum_i E[q_i^2]`.
      sign_change_distances: Quantiles (`SIGN_CHANGE_SHARES`) of the distance at which an entry of :math:`G A^\top`
        changes its sign; infinity if it never does. The law is exact far below the first quantile.
      p_out: Number of outputs.
      rows: Number of rows of A in the estimate.
    """

    coherent: Quadratic
    total: Quadratic
    sign_change_distances: tuple[float, float, float, float, float]
    p_out: int
    rows: int

    def rms(self, rank: int, *, scaling: float, moved: Distances) -> float:
        """Compute the root mean square of w over draws of A, outputs and tokens.

        Args:
          rank: Rank r of the adapter, 1 or more.
          scaling: Scaling factor gamma, above 0.
          moved: Distances that the factors have moved, from `distances`.

        Returns:
          The root mean square of the change.

        Raises:
          InputError: If the rank or the scaling is out of range.
        """
        check_positive("scaling", scaling)
        square = self._square(rank, self.coherent(moved.A), self.total(moved.A))
        return scaling * moved.B * math.sqrt(square / self.p_out)

    def crossing_distance(self, rank: int) -> float:
        r"""Compute the distance a at which the A part equals the B part, :math:`m_1 / m_2`.

        Divided by A's learning rate it is the number of steps t_A after which the A part is larger.
        """
        B_part = self._square(rank, self.coherent.c0, self.total.c0)
        A_part = self._square(rank, self.coherent.c2, self.total.c2)
        return math.sqrt(B_part / A_part) if A_part > 0 else math.inf

    @staticmethod
    def _square(rank: int, coherent: float, total: float) -> float:
        check_integer("rank", rank)
        return max(rank * total + rank * (rank - 1.0) * coherent, 0.0)


def row_terms(
    grad: Float[np.ndarray, "p_out p_in"],
    x: Float[np.ndarray, "tokens p_in"],
    lora_A: Float[np.ndarray, "rows p_in"],
) -> RowTerms:
    r"""Estimate the terms of sign descent from sampled rows of A.

    Pairs of different rows give an unbiased estimate of :math:`E[q_i]^2`.

    Args:
      grad: Constant gradient G of the full weight.
      x: Inputs x' at which the layer is evaluated.
      lora_A: Rows drawn from A's initial distribution, two or more. A precision of 1% takes hundreds.

    Returns:
      The terms of one row.

    Raises:
      InputError: If the shapes don't match, there are fewer than two rows, or a value is not finite.
    """
    return row_signs(grad, lora_A).terms(x)


@dataclass(frozen=True, eq=False)
class RowSigns:
    r"""Part of `row_terms` that depends on the gradient alone and is shared by all inputs; see `row_signs`.

    Attributes:
      lora_A: Sampled rows of A.
      directions: Signs D of the directions in which the rows move.
      moving_outputs: Number of outputs for which the entry of B moves, for each row.
      gram: Gram matrix :math:`S^\top S`.
      sign_change_distances: Quantiles of the distance at which a sign changes; NaN if they were not requested.
      p_out: Number of outputs.
      multiply: Product of two matrices.
    """

    lora_A: Float[np.ndarray, "rows p_in"]
    directions: Float[np.ndarray, "rows p_in"]
    moving_outputs: Float[np.ndarray, " rows"]
    gram: Float[np.ndarray, "rows rows"]
    sign_change_distances: tuple[float, float, float, float, float]
    p_out: int
    multiply: MatrixProduct = np.matmul

    def terms(self, x: Float[np.ndarray, "tokens p_in"]) -> RowTerms:
        """Compute the terms at the inputs, in the precision of the rows.

        Args:
          x: Inputs x' at which the layer is evaluated.

        Returns:
          The terms of one row.

        Raises:
          InputError: If there are no inputs, p_in differs, or a value is not finite.
        """
        return self.terms_by_part(x, [slice(None)])[0]

    def terms_by_part(self, x: Float[np.ndarray, "tokens p_in"], parts: Sequence[slice]) -> list[RowTerms]:
        """Compute the terms at each of several parts of the inputs from products that the parts share.

        Args:
          x: Inputs x' at which the layer is evaluated.
          parts: Slices of the inputs with at least one token each.

        Returns:
          The terms of one row at each part.

        Raises:
          InputError: If a part has no inputs, p_in differs, or a value is not finite.
        """
        x = np.asarray(x, self.lora_A.dtype)
        if x.ndim != 2 or x.shape[1] != self.lora_A.shape[1] or not all(len(x[part]) for part in parts):
            raise InputError(
                "x and lora_A must have shapes [tokens, p_in] and [rows, p_in] with the same p_in and at least one "
                f"token, got {x.shape} and {self.lora_A.shape}"
            )
        if not np.isfinite(x).all():
            raise InputError("x must be finite, got a NaN or infinite value")
        # Products of the inputs with A (the B part u) and with D (the A part v), each [tokens, rows].
        products_A, products_D = self.multiply(x, self.lora_A.T), self.multiply(x, self.directions.T)
        return [self._terms(products_A[part], products_D[part]) for part in parts]

    def _terms(self, u: Float[np.ndarray, "tokens rows"], v: Float[np.ndarray, "tokens rows"]) -> RowTerms:
        tokens, rows = u.shape
        u, v, gram = (np.asarray(matrix, np.float64) for matrix in (u, v, self.gram))
        # Sums over outputs of (S u) (S u), (S u) (S v) and (S v) (S v) by the Gram matrix of S, without forming S u.
        u_gram, v_gram = self.multiply(u, gram), self.multiply(v, gram)
        pair_sums = [float(np.sum(left * right)) for left, right in ((u_gram, u), (u_gram, v), (v_gram, v))]
        # The same of each row with itself.
        by_row = [np.sum(left * right, axis=0) for left, right in ((u, u), (u, v), (v, v))]
        total = [float(np.sum(self.moving_outputs * products)) / rows for products in by_row]
        # Without the pairs of a row with itself, the mean over pairs estimates E[q_i]^2 without bias.
        pairs = rows * (rows - 1.0)
        coherent = [(all_pairs - same_row * rows) / pairs for all_pairs, same_row in zip(pair_sums, total, strict=True)]
        return RowTerms(
            _quadratic([value / tokens for value in coherent]),
            _quadratic([value / tokens for value in total]),
            self.sign_change_distances,
            self.p_out,
            rows,
        )


def row_signs(
    grad: Float[np.ndarray, "p_out p_in"],
    lora_A: Float[np.ndarray, "rows p_in"],
    *,
    exact: bool = True,
    multiply: MatrixProduct = np.matmul,
) -> RowSigns:
    """Prepare `row_terms` for one gradient and the inputs of several splits.

    Args:
      grad: Constant gradient G of the full weight.
      lora_A: Rows drawn from A's initial distribution, two or more.
      exact: Whether to compute in float64, with the quantiles of the distance at which a sign changes. Otherwise
        products are computed in float32, with a relative error of about 1e-6 in the terms.
      multiply: Product of two matrices.

    Returns:
      The signs, directions and Gram matrix of the rows.

    Raises:
      InputError: If the shapes don't match, there are fewer than two rows, or a value is not finite.
    """
    dtype: Any = np.float64 if exact else np.float32
    grad, lora_A = np.asarray(grad, dtype), np.asarray(lora_A, dtype)
    if not (grad.ndim == lora_A.ndim == 2 and grad.shape[1] == lora_A.shape[1]):
        raise InputError(
            "grad and lora_A must have shapes [p_out, p_in] and [rows, p_in] with the same p_in, "
            f"got {grad.shape} and {lora_A.shape}"
        )
    if len(lora_A) < 2:
        raise InputError(f"lora_A must have at least 2 rows, got {len(lora_A)}")
    # The extreme entries are finite if all are; unlike a mask of all entries, they take no memory.
    if not all(np.isfinite([matrix.min(), matrix.max()]).all() for matrix in (grad, lora_A) if matrix.size):
        raise InputError("grad and lora_A must be finite, got a NaN or infinite value")
    # S, the constant sign of B's gradient, and D, that of A's gradient once B has moved.
    projections = multiply(grad, lora_A.T)
    signs = np.sign(projections)
    directions = np.sign(multiply(signs.T, grad))
    # Number of outputs with a gradient in each row: an entry of 0 has no sign and does not move.
    moving_outputs = np.sum(signs**2, axis=0)
    # Distance at which the motion of A along D turns the sign of an entry of G A^T.
    quantiles: Any = (math.nan,) * len(SIGN_CHANGE_SHARES)
    if exact:
        with np.errstate(divide="ignore", invalid="ignore"):
            drift = signs * multiply(grad, directions.T)  # negative if the entry moves towards 0
            distance = np.where(drift < 0, -np.abs(projections) / drift, np.inf)
        quantiles = tuple(np.quantile(distance, SIGN_CHANGE_SHARES, method="lower").tolist())
    return RowSigns(lora_A, directions, moving_outputs, multiply(signs.T, signs), quantiles, grad.shape[0], multiply)


def _quadratic(products: Sequence[float]) -> Quadratic:
    """Return (u + a v)^2 as a polynomial in a, from uu, uv and vv."""
    return Quadratic(products[0], 2 * products[1], products[2])


class RateExponents(NamedTuple):
    """Exponents of the best learning rate.

    Attributes:
      scaling: Exponent in gamma at a fixed rank.
      rank: Exponent in the rank at a fixed gamma.
    """

    scaling: float
    rank: float


def rate_exponents(rho: float) -> RateExponents:
    r"""Compute the exponents of the rate that preserves the change at a horizon, in the signal regime.

    Both terms then grow as r, and the change is :math:`\propto \gamma r\, \eta (1 + \rho)`. The ratio :math:`\rho` of
    the A part to the B part at the horizon is proportional to :math:`\eta`. A constant change requires

    .. math:: \frac{d \log \eta^*}{d \log \gamma} = \frac{d \log \eta^*}{d \log r} = -\frac{1 + \rho}{1 + 2\rho}

    The exponent is -1 if the B part dominates and -1/2 if the A part does.

    Args:
      rho: Ratio of the A part to the B part, 0 or more, or infinity; ``moved.A / crossing_distance``.

    Returns:
      The exponents in gamma and in the rank.

    Raises:
      InputError: If rho is below 0 or not a number.

    Examples:
      >>> rate_exponents(0.0), rate_exponents(math.inf)
      (RateExponents(scaling=-1.0, rank=-1.0), RateExponents(scaling=-0.5, rank=-0.5))
    """
    check_between("rho", rho, 0)
    slope = -0.5 if math.isinf(rho) else -(1 + rho) / (1 + 2 * rho)
    return RateExponents(slope, slope)


def rate_factor(gain_ratio: float, rho: float) -> float:
    r"""Compute the factor of the rate that preserves the change at the horizon when :math:`\gamma r` changes.

    With s the ratio of the gains, the factor is the positive root y of :math:`y (1 + \rho y) = (1 + \rho) / s`: 1/s if
    the B part dominates (rho = 0), 1/sqrt(s) if the A part does.

    Args:
      gain_ratio: Factor :math:`\gamma' r' / (\gamma r)` by which the gain changes, above 0.
      rho: Ratio of the A part to the B part at the horizon under the old rate, 0 or more, or infinity.

    Returns:
      The new learning rate divided by the old one.

    Raises:
      InputError: If an argument is out of range.

    Examples:
      ``use_rslora`` at r = 128 with alpha unchanged multiplies gamma by sqrt(128):

      >>> tuple(round(1 / rate_factor(math.sqrt(128), rho), 1) for rho in (0.0, 1.0, math.inf))
      (11.3, 6.5, 3.4)
    """
    check_positive("gain_ratio", gain_ratio)
    check_between("rho", rho, 0)
    if math.isinf(rho):
        return gain_ratio**-0.5
    target = (1 + rho) / gain_ratio
    # The root of rho y^2 + y - target, in a form that avoids cancellation at small rho.
    return 2 * target / (1 + math.sqrt(1 + 4 * rho * target))


def rate_for_equal_change(
    rate: float,
    first: Sequence[float] | Float[np.ndarray, " steps"],
    second: Sequence[float] | Float[np.ndarray, " other_steps"],
    *,
    crossing_distance: float,
) -> float:
    r"""Compute the rate that preserves a model's change under another schedule, at one gamma r.

    The law is Adam's along a constant gradient in the signal regime: :math:`b (1 + a / a_\times)` is
    preserved, see `distances`.

    Args:
      rate: Learning rate of the first schedule, above 0.
      first: Factor of the rate in each step of the first schedule, at least one above 0.
      second: Factor of the rate in each step of the second schedule, at least one above 0.
      crossing_distance: Distance a at which the A part equals the B part, see `distances`. Infinity describes a weight
        trained directly (full fine-tuning).

    Returns:
      The learning rate of the second schedule.

    Raises:
      InputError: If the rate is out of range, a schedule has no factor above 0, or `distances` rejects an argument.
    """
    check_positive("rate", rate)
    for name, schedule in (("first", first), ("second", second)):
        if not np.any(np.asarray(schedule, np.float64) > 0):
            raise InputError(f"{name} must have at least one factor above 0, got none in {len(schedule)} steps")

    def log_change(schedule: Sequence[float] | Float[np.ndarray, "..."], peak_rate: float) -> float:
        moved = distances(peak_rate * np.asarray(schedule), crossing_distance=crossing_distance)
        return math.log(moved.B) + math.log1p(moved.A / crossing_distance)

    # A's distance depends on the rate in a way that has no closed form, so that the equation is solved numerically.
    target = log_change(first, rate)
    return _solve_rate(lambda new_rate: log_change(second, new_rate) - target, rate)


def _solve_rate(excess: Callable[[float], float], start: float) -> float:
    """Solve for the rate at which ``excess``, the log of a change over its target, is 0."""
    # The change grows at least in proportion to the rate, so that in log the root is at most the excess away from the
    # start.
    log_start, max_distance = math.log(start), abs(excess(start)) + 1e-9
    log_root = scipy.optimize.brentq(
        lambda log_rate: excess(math.exp(log_rate)), log_start - max_distance, log_start + max_distance, xtol=1e-10
    )
    return math.exp(log_root)
