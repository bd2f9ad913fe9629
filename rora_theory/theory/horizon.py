r"""After the first step: how far an adapter has changed its layer after many steps, at a constant gradient.

Setting: one adapted layer, B = 0 at the start, A iid, and the full weight's gradient G held constant, as it nearly is
while the loss has hardly moved. Then every later step is known.

**Sign descent** (Adam with epsilon 0, Lion, signSGD). With :math:`S = \mathrm{sign}(G A_0^\top)` and
:math:`D = \mathrm{sign}(S^\top G)`, row k of A moves along row k of D once B has moved along -S:

.. math:: B = -b\, S, \qquad A = A_0 + a\, D, \qquad
          w = -\gamma\, b\, \textstyle\sum_k S_k \left( a_k \cdot x' + a\, D_k \cdot x' \right)

with b and a the distances that every entry of B and of A has moved (`distances`): b is the sum of the rates, and a
begins one step later. The first term is **B-led**, the second **A-led**. It holds as long as no entry of
:math:`G A^\top` changes sign: for ever with one sample, and otherwise for as long as `RowTerms.turned` stays small.

Rows of A are independent and equal in law, so that with :math:`q_k = S_k(a_k \cdot x' + a D_k \cdot x')` at every rank

.. math:: E[w_i^2] = (\gamma b)^2 [\, r\, E[q_i^2] + r (r - 1)\, E[q_i]^2 \,]

and a few hundred rows of A give the law of all ranks (`row_terms`).

**SGD** is linear in the factors: with :math:`G = U \Sigma V^\top` each singular direction moves by itself, and the
change after t steps is a first step's with another gradient and another input (`sgd_equivalent`), so that
`rora_theory.theory.laws.first_step_moments` has its exact moments.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import scipy
from jaxtyping import Float

from rora_theory.errors import InputError
from rora_theory.scaling import check_integer, check_positive, check_rank

TURNS = (0.05, 0.25, 0.5, 0.75, 0.95)
"""Quantiles of the distance at which an entry of G A^T changes its sign."""

GROWTH = 1e100
"""The most that B's gradient may grow: its squares must be numbers."""


class Distances(NamedTuple):
    """How far every entry has moved, in the entries' own units.

    Attributes:
      B: b, the distance of an entry of B from 0.
      A: a, the distance of an entry of A from its start.
    """

    B: float
    A: float


def distances(
    rates_B: Sequence[float] | Float[np.ndarray, " steps"],
    rates_A: Sequence[float] | Float[np.ndarray, " steps"] | None = None,
    *,
    decay: tuple[float, float] | None = (0.9, 0.999),
    takeover: float = math.inf,
) -> Distances:
    r"""Distances that B and A move along constant signs.

    Under sign descent an entry moves by the rate in every step in which its gradient is not zero: A waits until B has
    moved. Under Adam a gradient that grows is followed faster, by :math:`\hat m / \sqrt{\hat v}` of its history: A's
    grows with b, so that at a constant rate A moves up to :math:`\sqrt 3` times as fast as under sign descent (for
    steps far above :math:`1/(1-\beta_1)` and far below :math:`1/(1-\beta_2)`), and B's grows as
    :math:`1 + a/\mathrm{takeover}`.

    Args:
      rates_B: learning rate of B in each step, 0 or more; a warm-up that begins at 0 has a first entry of 0.
      rates_A: of A, where it has its own (LoRA+); None is ``rates_B``.
      decay: Adam's beta_1 and beta_2; None is sign descent.
      takeover: a at which the A-led term equals the B-led one (`RowTerms.takeover`), which tells how B's gradient
        grows under Adam; infinite: it stays.

    Raises:
      InputError: no steps, unequal numbers of them, a negative rate, a decay outside [0, 1), or a takeover that is not
        above 0 or is next to nothing beside A's rates.

    Examples:
      >>> distances([0.25] * 4, decay=None)
      Distances(B=1.0, A=0.75)
      >>> round(distances([1e-3] * 200).A / distances([1e-3] * 200, decay=None).A, 2)  # Adam follows A's ramp faster
      1.47
    """
    each_B = np.asarray(rates_B, np.float64)
    each_A = each_B if rates_A is None else np.asarray(rates_A, np.float64)
    if each_B.ndim != 1 or not len(each_B) or each_A.shape != each_B.shape:
        raise InputError(
            f"rates have shapes {each_B.shape} and {each_A.shape}; accepted is one rate a step, one step or more"
        )
    if not (np.isfinite(each_B).all() and np.isfinite(each_A).all() and min(each_B.min(), each_A.min()) >= 0):
        raise InputError("a rate is negative or not finite; accepted are numbers of 0 or more")
    if not takeover > 0:
        raise InputError(f"takeover is {takeover!r}; accepted is a number above 0, or inf")
    if (reach := float(each_A.sum())) / takeover > GROWTH:
        raise InputError(
            f"takeover is {takeover!r} where A's rates add up to {reach:.3g}; accepted is {1 / GROWTH:g} of that or "
            "more"
        )
    paces = [_AdamStep(decay), _AdamStep(decay)]
    b = a = 0.0
    for rate_B, rate_A in zip(each_B.tolist(), each_A.tolist(), strict=True):
        gradients = (1 + a / takeover, b)  # of the step's start
        b += rate_B * paces[0].step(gradients[0])
        a += rate_A * paces[1].step(gradients[1])
    return Distances(b, a)


class _AdamStep:
    """Adam's step in units of the rate, for an entry whose gradient keeps its sign; 1 under sign descent."""

    def __init__(self, decay: tuple[float, float] | None) -> None:
        if decay is not None and not all(0 <= beta < 1 for beta in decay):
            raise InputError(f"decay is {decay}; accepted are two numbers from 0 to below 1")
        self._decay = decay
        self._first = self._second = 0.0
        self._count = 0

    def step(self, gradient: float) -> float:
        if self._decay is None:
            return float(gradient > 0)
        beta1, beta2 = self._decay
        self._count += 1
        self._first = beta1 * self._first + (1 - beta1) * gradient
        self._second = beta2 * self._second + (1 - beta2) * gradient**2
        if self._second == 0:
            return 0.0
        return self._first / (1 - beta1**self._count) / math.sqrt(self._second / (1 - beta2**self._count))


class Quadratic(NamedTuple):
    """c0 + c1 a + c2 a^2 in A's distance a."""

    c0: float
    c1: float
    c2: float

    def __call__(self, distance: float) -> float:
        return self.c0 + distance * (self.c1 + distance * self.c2)


@dataclass(frozen=True)
class RowTerms:
    r"""What one row of A adds to the change, summed over outputs and averaged over tokens; see `row_terms`.

    Attributes:
      coherent: :math:`\sum_i E[q_i]^2`, as a polynomial in a.
      total: :math:`\sum_i E[q_i^2]`, likewise.
      turn: quantiles `TURNS` of the distance at which an entry of :math:`G A^\top` changes its
        sign (infinite where it never does): far below the first the law is exact.
      p_out: outputs.
      rows: of A that the terms rest on.
    """

    coherent: Quadratic
    total: Quadratic
    turn: tuple[float, float, float, float, float]
    p_out: int
    rows: int

    def rms(self, rank: int, *, scaling: float, moved: Distances) -> float:
        """Root mean square of w over the draw of A, outputs and tokens.

        Args:
          rank, scaling: r >= 1 and gamma > 0.
          moved: how far the factors have moved, of `distances`.

        Raises:
          InputError: a rank or scaling out of range.
        """
        check_positive("scaling", scaling)
        square = self._square(rank, self.coherent(moved.A), self.total(moved.A))
        return scaling * moved.B * math.sqrt(square / self.p_out)

    def takeover(self, rank: int) -> float:
        r"""The distance a at which the A-led term alone is as large as the B-led one: :math:`m_1 / m_2`.

        Over A's rate it is the number of steps t_A after which A leads.
        """
        led_B = self._square(rank, self.coherent.c0, self.total.c0)
        led_A = self._square(rank, self.coherent.c2, self.total.c2)
        return math.sqrt(led_B / led_A) if led_A > 0 else math.inf

    @staticmethod
    def _square(rank: int, coherent: float, total: float) -> float:
        check_rank(rank)
        return max(rank * total + rank * (rank - 1.0) * coherent, 0.0)


def row_terms(
    grad: Float[np.ndarray, "p_out p_in"],
    x: Float[np.ndarray, "tokens p_in"],
    lora_A: Float[np.ndarray, "rows p_in"],
) -> RowTerms:
    r"""The terms of sign descent from rows of A that were drawn.

    :math:`E[q_i]^2` is estimated without bias from pairs of different rows.

    Args:
      grad: G, held constant.
      x: inputs x' at which the layer is read.
      lora_A: rows drawn as A starts, two or more; hundreds for a per cent.

    Raises:
      InputError: shapes that don't match, fewer than two rows, or a value that is not finite.
    """
    return row_signs(grad, lora_A).terms(x)


@dataclass(frozen=True, eq=False)
class RowSigns:
    r"""What the terms of rows of A need of a gradient, shared by all inputs; see `row_signs`.

    Attributes:
      lora_A: Rows of A.
      moves: D, the directions in which they move.
      live: Number of outputs that have a gradient, for each row.
      gram: :math:`S^\top S`.
      turn: Quantiles of the distance at which a sign turns; NaN where they were not asked for.
      p_out: Number of outputs.
    """

    lora_A: Float[np.ndarray, "rows p_in"]
    moves: Float[np.ndarray, "rows p_in"]
    live: Float[np.ndarray, " rows"]
    gram: Float[np.ndarray, "rows rows"]
    turn: tuple[float, float, float, float, float]
    p_out: int

    def terms(self, x: Float[np.ndarray, "tokens p_in"]) -> RowTerms:
        """Compute the terms at some inputs, in the precision of the rows.

        Raises:
          InputError: No inputs, another p_in, or a value that is not finite.
        """
        x = np.asarray(x, self.lora_A.dtype)
        if x.ndim != 2 or x.shape[1] != self.lora_A.shape[1] or not len(x):
            raise InputError(
                f"x has shape {x.shape} and lora_A {self.lora_A.shape}; accepted are [tokens, p_in] and [rows, p_in] "
                "of one p_in, with one token or more"
            )
        if not np.isfinite(x).all():
            raise InputError("x holds a value that is not finite; accepted are finite numbers")
        rows, tokens = len(self.lora_A), len(x)
        each = _pairs(x @ self.lora_A.T, x @ self.moves.T)  # [tokens, rows]
        total = [float(np.sum(self.live * first * second, dtype=np.float64) / rows) for first, second in each]
        # The sum over outputs of (S u) (S v) by the Gram matrix of S, without forming S u.
        sums = [float(np.sum((first @ self.gram) * second, dtype=np.float64)) for first, second in each]
        pairs = rows * (rows - 1.0)
        coherent = [(both - alone * rows) / pairs for both, alone in zip(sums, total, strict=True)]
        return RowTerms(
            _quadratic([value / tokens for value in coherent]),
            _quadratic([value / tokens for value in total]),
            self.turn,
            self.p_out,
            rows,
        )


def row_signs(
    grad: Float[np.ndarray, "p_out p_in"],
    lora_A: Float[np.ndarray, "rows p_in"],
    *,
    exact: bool = True,
) -> RowSigns:
    """Prepare `row_terms` for one gradient and the inputs of several splits.

    Args:
      grad: G, held constant.
      lora_A: Rows drawn as A starts, two or more.
      exact: Whether to compute in float64, with the quantiles of the distance at which a sign turns. Otherwise products
        are taken in float32, which changes the terms by 1e-6 of themselves.

    Raises:
      InputError: Shapes that don't match, fewer than two rows, or a value that is not finite.
    """
    dtype: Any = np.float64 if exact else np.float32
    grad, lora_A = np.asarray(grad, dtype), np.asarray(lora_A, dtype)
    if not (grad.ndim == lora_A.ndim == 2 and grad.shape[1] == lora_A.shape[1]):
        raise InputError(
            f"grad has shape {grad.shape} and lora_A {lora_A.shape}; accepted are [p_out, p_in] and [rows, p_in] of "
            "one p_in"
        )
    if len(lora_A) < 2:
        raise InputError(f"lora_A has {len(lora_A)} rows; accepted are 2 or more")
    if not all(np.isfinite(each).all() for each in (grad, lora_A)):
        raise InputError("grad or lora_A holds a value that is not finite; accepted are finite numbers")
    read = grad @ lora_A.T
    signs = np.sign(read)
    moves = np.sign(signs.T @ grad)
    live = np.sum(signs**2, axis=0)  # outputs in which a row takes part: all, but for those without a gradient
    turn = [math.nan] * len(TURNS)
    if exact:
        with np.errstate(divide="ignore", invalid="ignore"):
            drift = signs * (grad @ moves.T)  # below zero where A's motion turns the sign
            distance = np.where(drift < 0, -np.abs(read) / drift, np.inf)
        turn = np.quantile(distance, TURNS, method="lower").tolist()
    quantiles: Any = tuple(turn)
    return RowSigns(lora_A, moves, live, signs.T @ signs, quantiles, grad.shape[0])


def _pairs(first: np.ndarray, second: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(first, first), (first, second), (second, second)]


def _quadratic(parts: Sequence[float]) -> Quadratic:
    """Of (u + a v)^2 from uu, uv and vv."""
    return Quadratic(parts[0], 2 * parts[1], parts[2])


def one_sample_takeover(deviation: float, p_in: int) -> float:
    r"""A's distance at which it leads, for one sample at its own input, all its entries alike in size.

    :math:`s \sqrt{2/\pi}\, |x|_2 / |x|_1 = s / \sqrt{p_{in}}` where the entries of x are as a Gaussian's: with PEFT's
    default, :math:`1 / (\sqrt 3\, p_{in})`.

    Args:
      deviation: s > 0, of A's entries.
      p_in: inputs, 1 or more.

    Raises:
      InputError: an argument out of range.
    """
    check_positive("deviation", deviation)
    check_integer("p_in", p_in)
    return deviation / math.sqrt(p_in)


class RateExponents(NamedTuple):
    """How the best rate moves with gamma at a fixed rank, and with the rank at a fixed gamma."""

    scaling: float
    rank: float


def rate_exponents(rho: float) -> RateExponents:
    r"""Exponents of the rate that keeps the change at a horizon, where the signal leads (both terms grow as r).

    The change is :math:`\propto \gamma r\, \eta (1 + \rho)` with :math:`\rho` = A-led over B-led term at the horizon, a
    multiple of :math:`\eta`. Keeping it,

    .. math:: \frac{d \log \eta^*}{d \log \gamma} = \frac{d \log \eta^*}{d \log r} = -\frac{1 + \rho}{1 + 2\rho}

    -1 where B leads, -1/2 where A does.

    Args:
      rho: 0 or more, or infinite; of `RowTerms` it is ``moved.A / takeover``.

    Raises:
      InputError: a rho below 0 or not a number.

    Examples:
      >>> rate_exponents(0.0), rate_exponents(math.inf)
      (RateExponents(scaling=-1.0, rank=-1.0), RateExponents(scaling=-0.5, rank=-0.5))
    """
    _check_rho(rho)
    slope = -0.5 if math.isinf(rho) else -(1 + rho) / (1 + 2 * rho)
    return RateExponents(slope, slope)


def sgd_rate_exponents(growth: float) -> RateExponents:
    r"""`rate_exponents` of SGD: of the rate that keeps the change in a singular direction of the gradient.

    With :math:`\tau = \gamma \sigma \sum \eta`, small steps and the signal leading, the change is
    :math:`\propto \gamma r \sinh(2\tau)` (`sgd_equivalent`: :math:`\sigma_t c_t = \sinh(2\tau) / 2`). Keeping it, with
    :math:`q = 2\tau \coth 2\tau`,

    .. math:: \frac{d \log \eta^*}{d \log \gamma} = -1 - \frac1q, \qquad
              \frac{d \log \eta^*}{d \log r} = -\frac1q

    -2 and -1 at the first step (q = 1); -1 and 0 in a long run, in which both factors grow as
    :math:`e^\tau` and only the product of gamma and the rate counts, whatever the rank.

    Args:
      growth: tau, 0 or more, or infinite.

    Raises:
      InputError: a growth below 0 or not a number.

    Examples:
      >>> sgd_rate_exponents(0.0), sgd_rate_exponents(math.inf)
      (RateExponents(scaling=-2.0, rank=-1.0), RateExponents(scaling=-1.0, rank=0.0))
    """
    if not growth >= 0:
        raise InputError(f"growth is {growth!r}; accepted is a number of 0 or more, or inf")
    inverse = math.tanh(2 * growth) / (2 * growth) if growth else 1.0
    return RateExponents(-1 - inverse, -inverse or 0.0)


def rate_factor(strength: float, rho: float) -> float:
    r"""The factor of the rate that keeps the change at the horizon where :math:`\gamma r` grows ``strength`` times.

    The positive root y of :math:`y (1 + \rho y) = (1 + \rho) / \mathrm{strength}`: 1/strength where B leads (rho = 0),
    1/sqrt(strength) where A does.

    Args:
      strength: :math:`\gamma' r' / (\gamma r)` > 0.
      rho: A-led over B-led term at the horizon under the old rate, 0 or more, or infinite.

    Raises:
      InputError: an argument out of range.

    Examples:
      ``use_rslora`` at r = 128 and the same alpha makes gamma sqrt(128) times as large:

      >>> tuple(round(1 / rate_factor(math.sqrt(128), rho), 1) for rho in (0.0, 1.0, math.inf))
      (11.3, 6.5, 3.4)
    """
    check_positive("strength", strength)
    _check_rho(rho)
    if math.isinf(rho):
        return strength**-0.5
    target = (1 + rho) / strength
    # the root of rho y^2 + y - target without the difference that cancels at small rho
    return 2 * target / (1 + math.sqrt(1 + 4 * rho * target))


def matching_rate(
    terms: RowTerms,
    *,
    old: tuple[int, float, float],
    new: tuple[int, float],
    steps: int,
    decay: tuple[float, float] | None = (0.9, 0.999),
) -> float:
    """The constant rate at which a new rank and gamma change the layer as much after ``steps`` steps as the old did.

    Cross-talk is counted, so that this differs from `rate_factor` where the signal does not lead.

    Args:
      terms: of the module.
      old: rank, gamma and learning rate.
      new: rank and gamma.
      steps: the horizon, 1 or more.
      decay: see `distances`.

    Raises:
      InputError: an argument out of range, or terms of an output that does not change.
    """
    check_positive("learning_rate", old[2])
    check_integer("steps", steps)

    def log_size(rank: int, scaling: float, rate: float) -> float:
        moved = distances([rate] * steps, decay=decay, takeover=terms.takeover(rank))
        size = terms.rms(rank, scaling=scaling, moved=moved)
        if not size > 0:
            raise InputError(f"terms say that rank {rank} changes the output by {size:g}; accepted is a change above 0")
        return math.log(size)

    target = log_size(*old)
    return _rate_without(lambda rate: log_size(*new, rate) - target, old[2])


def keeping_rate(
    rate: float,
    first: Sequence[float] | Float[np.ndarray, " steps"],
    second: Sequence[float] | Float[np.ndarray, " other_steps"],
    *,
    takeover: float,
) -> float:
    r"""The rate that changes a model as much over a second schedule as ``rate`` does over a first, at one gamma r.

    Under Adam along a constant gradient, where the signal leads: :math:`b (1 + a / \mathrm{takeover})` is kept, see
    `distances`.

    Args:
      rate: learning rate over the first schedule, above 0.
      first, second: factor of the rate in each step, some of them above 0.
      takeover: see `distances`; infinite is a weight that moves by itself, full fine-tuning.

    Raises:
      InputError: a rate out of range, a schedule in which nothing moves, or as `distances`.
    """
    check_positive("rate", rate)
    for name, schedule in (("first", first), ("second", second)):
        if not np.any(np.asarray(schedule, np.float64) > 0):
            raise InputError(f"{name} has no factor above 0; accepted is a schedule with one or more")

    def log_change(schedule: Sequence[float] | Float[np.ndarray, "..."], each: float) -> float:
        moved = distances(each * np.asarray(schedule), takeover=takeover)
        return math.log(moved.B) + math.log1p(moved.A / takeover)

    target = log_change(first, rate)
    return _rate_without(lambda each: log_change(second, each) - target, rate)


def _rate_without(excess: Callable[[float], float], start: float) -> float:
    """The rate at which the log of a size is in excess by 0; the size grows at least as the rate."""
    middle, reach = math.log(start), abs(excess(start)) + 1e-9
    found = scipy.optimize.brentq(
        lambda log_rate: excess(math.exp(log_rate)), middle - reach, middle + reach, xtol=1e-10
    )
    return math.exp(found)


def sgd_equivalent(
    grad: Float[np.ndarray, "p_out p_in"],
    x: Float[np.ndarray, "*tokens p_in"],
    *,
    rates: Sequence[float] | Float[np.ndarray, " steps"],
    scaling: float,
    momentum: float = 0.0,
) -> tuple[Float[np.ndarray, "p_out p_in"], Float[np.ndarray, "*tokens p_in"]]:
    r"""The gradient and the input at which SGD's *first* step, at rate 1, is what many steps at the constant G come to.

    In the singular directions of G, with :math:`h = \gamma \eta \sigma`, a step takes (b, a) to (b - h a, a - h b), so
    that after t of them from b = 0, :math:`b_t = -\sigma_t\, a_0` and :math:`a_t = c_t\, a_0`; at a constant rate

    .. math:: \sigma_t = \tfrac12 [(1 + h)^t - (1 - h)^t], \qquad c_t = \tfrac12 [(1 + h)^t + (1 - h)^t]

    and :math:`w = -\gamma\, U \sigma_t V^\top W (V c_t V^\top) x'`, :math:`W = A_0^\top A_0`: SGD's first step with
    G replaced by :math:`U \sigma_t V^\top / \gamma` and x' by :math:`V c_t V^\top x'`. A matters once
    :math:`\gamma \eta t \sigma_1` is near 1, whatever the rank.

    Args:
      grad: G, held constant.
      x: inputs x' at which the layer is read.
      rates: learning rate of each step.
      scaling: gamma > 0.
      momentum: of the heavy ball (PyTorch's), 0 to below 1.

    Returns:
      gradient and inputs for `rora_theory.theory.laws.first_step_moments` at the same scaling and ``learning_rate=1``.

    Raises:
      InputError: an argument out of range.
    """
    check_positive("scaling", scaling)
    each = np.asarray(rates, np.float64)
    if each.ndim != 1 or not len(each) or not (np.isfinite(each).all() and (each >= 0).all()):
        raise InputError(f"rates have shape {each.shape}; accepted is one rate of 0 or more a step, one step or more")
    if not 0 <= momentum < 1:
        raise InputError(f"momentum is {momentum!r}; accepted is a number from 0 to below 1")
    grad, x = np.asarray(grad, np.float64), np.asarray(x, np.float64)
    left, values, right = np.linalg.svd(grad, full_matrices=False)
    b, a = np.zeros_like(values), np.ones_like(values)
    speed_b, speed_a = np.zeros_like(values), np.zeros_like(values)
    for rate in each.tolist():
        speed_b = momentum * speed_b + scaling * values * a
        speed_a = momentum * speed_a + scaling * values * b
        b, a = b - rate * speed_b, a - rate * speed_a
    return (left * (-b / scaling)) @ right, x + ((x @ right.T) * (a - 1)) @ right


def _check_rho(rho: float) -> None:
    if not rho >= 0:
        raise InputError(f"rho is {rho!r}; accepted is a number of 0 or more, or inf")
