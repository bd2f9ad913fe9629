"""Verdicts on the equations of the paper, from a claim, the exact law and samples.

Identities are compared with automatic differentiation, moments with samples. In one cell, samples *contradict* a
claim about a moment if the estimate deviates from it by more than 2% and by more than the sampling threshold. They
*agree* with it if they do not contradict it and the threshold is narrow enough to detect an error of a quarter
(`stats.verdicts.judge_gap`). A claim holds if all cells agree with it. It holds in a limit if all cells of that limit
agree and another cell contradicts it. It fails if a cell of that limit contradicts it, and is undecided otherwise.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from rora_theory import laws
from rora_theory.laws import first_step, sampling
from rora_theory.optimizers import OPTIMIZERS, make_optimizer
from rora_theory.paper import equations
from rora_theory.scaling import Rule, scaling_factor
from rora_theory.stats.estimate import Estimate, square_root
from rora_theory.stats.moments import threshold
from rora_theory.stats.slopes import log_log_fit
from rora_theory.stats.verdicts import TOLERANCE, Outcome, judge_gap, summarise_outcomes

Status = Literal["holds", "holds in a limit", "fails", "undecided"]
"""Verdict on a claim."""

FALSE_ALARM = 1e-6
"""Probability that sampling error rejects a true claim in any of its cells."""

SLOPE_TOLERANCE, SLOPE_RESOLUTION = 0.05, 0.1
"""Counterparts of `stats.verdicts.TOLERANCE` and ``RESOLUTION`` for an exponent of the rank, in absolute units."""

_ROUNDING = 1e-4
"""Relative difference of two float32 computations of one identity: sums of p_in terms, each rounded to 6e-8."""

RANKS = tuple(2**n for n in range(11))
"""Default ranks, 1 to 1024. Verdicts on growth use them unless a sweep has three or more ranks of its own."""

NARROW, WIDE = 4, 4096
"""Values of p_in for the limits r >> p_in and r << p_in, if the sweep's p_in does not reach them."""

Sample = Callable[[sampling.RandomStep], sampling.StreamMoments]
"""Function that returns the moments of a setting at unit scaling and learning rate."""


@dataclass(frozen=True)
class Verdict:
    """Verdict on one equation.

    Attributes:
      equation: Number of the equation, or ``gradient A`` and ``gradient B`` for the two formulas above Eq. 3.
      claim: Claim in one line.
      status: ``holds``, ``holds in a limit``, ``fails``, or ``undecided`` if the samples cannot decide.
      where: Condition under which the claim holds, or its error.
      evidence: Figures that support the verdict.
    """

    equation: str
    claim: str
    status: Status
    where: str
    evidence: str


def decide(limit: Sequence[Outcome], other_cells: Sequence[Outcome]) -> Status:
    """Derive the verdict on a claim from its cells.

    Args:
      limit: Outcomes in the limit in which the claim may hold.
      other_cells: Outcomes outside that limit.

    Returns:
      The verdict.

    Examples:
      >>> decide(["agrees"], ["contradicts"]), decide(["agrees"], ["undecided"]), decide(["contradicts"], ["agrees"])
      ('holds in a limit', 'undecided', 'fails')
    """
    in_limit, elsewhere = summarise_outcomes(limit), summarise_outcomes(other_cells)
    if in_limit != "holds":
        return in_limit
    return "holds in a limit" if elsewhere == "fails" else elsewhere


def judge_equations(sample: Sample, *, ranks: Sequence[int], p_in: int, p_out: int) -> list[Verdict]:
    """Compare Eq. 1-15 and both gradients with automatic differentiation and with samples.

    Args:
      sample: Function that returns the moments of a `sampling.RandomStep` with unit scaling and learning rate,
        ``"normal"`` A and SGD.
      ranks: At least two ranks, ascending.
      p_in: Number of inputs of the layer.
      p_out: Number of outputs of the layer.

    Returns:
      One verdict per equation.
    """
    layer, draws = RandomLayer.draw(), Draws(sample, tuple(ranks), p_in, p_out)
    identities = (judge_eq1, judge_eq2, judge_eq_gradient_A, judge_eq_gradient_B, judge_eq3, judge_eq4, judge_eq10)
    moments = (
        judge_eq5, judge_eq6, judge_eq7, judge_eq8, judge_eq9, judge_eq11, judge_eq12, judge_eq13, judge_eq14,
        judge_eq15,
    )  # fmt: skip
    return [*(judge(layer) for judge in identities), *(judge(draws) for judge in moments)]


def choose_ranks(ranks: Sequence[int]) -> list[int]:
    """Return the ranks for the verdicts, ascending: those of a sweep, or `RANKS` if it has fewer than three."""
    return sorted(ranks) if len(ranks) >= 3 else list(RANKS)


def order_in_paper(verdict: Verdict) -> float:
    """Return the sort key of a verdict in the paper's order; the two gradients precede Eq. 3."""
    return {"gradient A": 2.1, "gradient B": 2.2}.get(verdict.equation) or float(verdict.equation)


GAMMA, ETA = 0.7, 0.3
"""Scaling and learning rate of the random layer."""


class RandomLayer(NamedTuple):
    """A random layer (p_out 6, rank 3, p_in 5) with its gradients and first steps by automatic differentiation.

    Attributes:
      m0: Frozen weight.
      B: Factor B.
      A: Factor A.
      delta: Derivatives of the loss with respect to the outputs.
      x: Input before the step.
      x_next: Input x' after the step.
      grad_A: Gradient dL/dA.
      grad_B: Gradient dL/dB.
      merged: Merged weight m0 + gamma B A.
      sgd_B: B after SGD's first step from B = 0.
      adam_B: B after Adam's first step from B = 0.
      sgd_w: Increment at x' after SGD's step, [p_out].
      adam_w: Increment at x' after Adam's step, [p_out].
    """

    m0: np.ndarray
    B: np.ndarray
    A: np.ndarray
    delta: np.ndarray
    x: np.ndarray
    x_next: np.ndarray
    grad_A: np.ndarray
    grad_B: np.ndarray
    merged: np.ndarray
    sgd_B: np.ndarray
    adam_B: np.ndarray
    sgd_w: np.ndarray
    adam_w: np.ndarray

    @classmethod
    def draw(cls) -> "RandomLayer":
        """Draw the layer with seed 15."""
        random, (p_out, rank, p_in) = np.random.default_rng(15), (6, 3, 5)
        shapes = (p_out, p_in), (p_out, rank), (rank, p_in), (p_out,), (p_in,), (p_in,)
        m0, B, A, delta, x, x_next = (random.standard_normal(shape, np.float32) for shape in shapes)
        return cls(m0, B, A, delta, x, x_next, *jax.device_get(_differentiate_layer(m0, B, A, delta, x, x_next)))


@jax.jit
def _differentiate_layer(m0: Array, B: Array, A: Array, delta: Array, x: Array, x_next: Array) -> tuple[Array, ...]:
    """Compute the fields of `RandomLayer` declared after ``x_next``, in that order."""

    # Linear loss with the derivatives delta, at the layer's input x.
    def loss(dm: first_step.Increment) -> Array:
        return jnp.vdot(delta, m0 @ x + dm(x))

    # Gradients at the given B and A; the merged weight is the layer's output at the unit vectors.
    gradients = jax.grad(lambda factors: loss(first_step.Increment(factors[0], factors[1], GAMMA)))((A, B))
    merged = m0 + first_step.Increment(A, B, GAMMA)(jnp.eye(A.shape[1])).T
    # First steps from B = 0.
    sgd, adam = (
        first_step.take_first_step(
            loss, A, p_out=len(m0), scaling=GAMMA, optimizer=make_optimizer(name, ETA, epsilon=0.0)
        )
        for name in OPTIMIZERS
    )
    return (*gradients, merged, sgd.lora_B, adam.lora_B, sgd(x_next), adam(x_next))


def _identity(
    equation: str, claim: str, printed: np.ndarray, exact: np.ndarray, where: str, suffix: str = ""
) -> Verdict:
    """Compare an equation with automatic differentiation, whose result it must equal."""
    error = _gap(printed, exact)
    status: Status = "holds" if error < _ROUNDING else "fails"
    return Verdict(equation, claim, status, where, f"autodiff differs by {error:.0e} of the largest entry{suffix}")


def _gap(printed: np.ndarray, exact: np.ndarray) -> float:
    """Return the largest difference, relative to the largest entry."""
    return float(np.max(np.abs(printed - exact)) / np.max(np.abs(exact)))


def judge_eq1(layer: RandomLayer) -> Verdict:
    """Compare Eq. 1 with the output of the merged weight."""
    printed = equations.eq1_output(layer.m0, layer.B, layer.A, layer.x, GAMMA)
    return _identity("1", "H(x) = (m0 + gamma B A) x", printed, layer.merged @ layer.x, "definition")


def judge_eq2(layer: RandomLayer) -> Verdict:
    """Compare Eq. 2 with the output of the merged weight less that of the frozen one."""
    printed = equations.eq2_increment(layer.B, layer.A, layer.x, GAMMA)
    return _identity("2", "w = gamma B A x", printed, (layer.merged - layer.m0) @ layer.x, "definition")


def judge_eq_gradient_A(layer: RandomLayer) -> Verdict:
    """Compare the first formula above Eq. 3, the gradient of A, with automatic differentiation."""
    printed = equations.gradient_A(layer.delta, layer.B, layer.x, GAMMA)
    return _identity("gradient A", "dL/dA = gamma B^T delta x^T", printed, layer.grad_A, "one sample")


def judge_eq_gradient_B(layer: RandomLayer) -> Verdict:
    """Compare the second formula above Eq. 3, the gradient of B, with automatic differentiation."""
    printed = equations.gradient_B(layer.delta, layer.A, layer.x, GAMMA)
    return _identity("gradient B", "dL/dB = gamma delta (A x)^T", printed, layer.grad_B, "one sample")


def judge_eq3(layer: RandomLayer) -> Verdict:
    """Compare Eq. 3 with B after SGD's first step, and state its error under Adam."""
    printed = equations.eq3_first_step_B(layer.delta, layer.A, layer.x, GAMMA, ETA)
    off = f"; under Adam off by {_gap(printed, layer.adam_B):.1f}x"
    return _identity("3", "B1 = -eta gamma delta (A x)^T", printed, layer.sgd_B, "SGD only", off)


def judge_eq4(layer: RandomLayer) -> Verdict:
    """Compare Eq. 4 with the increment after SGD's first step, and state its error under Adam."""
    printed = equations.eq4_increment(layer.delta, layer.A, layer.x, layer.x_next, GAMMA, ETA)
    off = f"; under Adam off by {_gap(printed, layer.adam_w):.1f}x"
    claim = "w = -eta gamma^2 delta x^T A^T A x'"
    return _identity("4", claim, printed, layer.sgd_w, "SGD only", off)


def judge_eq10(layer: RandomLayer) -> Verdict:
    """Compare Eq. 10 with the norm of the increment after SGD's first step."""
    printed = equations.eq10_norm(layer.delta, layer.A, layer.x, layer.x_next, GAMMA, ETA)[None]
    truth = np.sqrt(np.sum(layer.sgd_w**2, keepdims=True))
    return _identity("10", "|w| = root of the sum of squares of Eq. 4", printed, truth, "definition, with Eq. 4")


UNIT = {"scaling": 1.0, "learning_rate": 1.0}


class Draws:
    """Moments for the verdicts, at unit scaling and rate.

    Attributes:
      independent: Moments of each rank at overlap 0.
      overlapping: Moments of each rank at overlap 0.5.
      ranks: Ranks, ascending.
      p_in: Number of inputs.
      p_out: Number of outputs.
      low: Smallest rank.
      high: Largest rank.
      far_rank: Rank that is far above `NARROW` inputs.
      z: Threshold on |z| of every comparison.
    """

    far_rank = 512 * NARROW

    def __init__(self, sample: Sample, ranks: tuple[int, ...], p_in: int, p_out: int) -> None:
        self._sample, self.ranks, self.p_in, self.p_out = sample, ranks, p_in, p_out
        self.low, self.high = ranks[0], ranks[-1]
        self.independent = {rank: self.moments(rank, 0.0) for rank in ranks}
        self.overlapping = {rank: self.moments(rank, 0.5) for rank in ranks}
        self.z = threshold(FALSE_ALARM, 2 * len(ranks))

    def moments(self, rank: int, overlap: float, p_in: int | None = None) -> sampling.StreamMoments:
        """Return the moments of one setting; None uses the layer's p_in."""
        width = self.p_in if p_in is None else p_in
        return self._sample(sampling.RandomStep(rank=rank, p_in=width, p_out=self.p_out, overlap=overlap))

    def judge_means(self, judge_cell: Callable[[int, sampling.StreamMoments], Outcome]) -> Status:
        """Derive the verdict on a claim about the mean, which may hold only at overlap 0."""
        cells = (self.independent, self.overlapping)
        return decide(*([judge_cell(rank, moments) for rank, moments in group.items()] for group in cells))

    def second_moment_ratio(self, claim: Callable[..., float], rank: int, p_in: int | None = None) -> Estimate:
        """Estimate the second moment at overlap 0 divided by the claimed one."""
        printed = claim(1.0, rank=rank, p_in=self.p_in if p_in is None else p_in, **UNIT)
        return self.moments(rank, 0.0, p_in).first.second_moment.times(1 / printed)

    def judge_ratio(self, ratio: Estimate) -> Outcome:
        """Compare a ratio with 1."""
        return judge_gap(abs(ratio.value - 1), self.z * ratio.error)

    def judge_all_cells(self, claim: Callable[..., float]) -> list[Outcome]:
        """Compare a claimed second moment with samples at every rank, and at ranks far above p_in."""
        cells = [(rank, self.p_in) for rank in self.ranks] + [(rank, NARROW) for rank in (64 * NARROW, self.far_rank)]
        return [self.judge_ratio(self.second_moment_ratio(claim, *cell)) for cell in cells]


def judge_eq5(draws: Draws) -> Verdict:
    """Check Eq. 5 on the sample itself, of which the variance is (n - 1)/n times the unbiased one."""
    moments = draws.overlapping[draws.low].first
    drawn = moments.variance.value * (moments.count - 1) / moments.count
    gap = abs(drawn / equations.eq5_variance(moments.second_moment.value, moments.mean.value) - 1)
    status: Status = "holds" if gap < _ROUNDING else "fails"
    return Verdict("5", "Var = E[w^2] - E[w]^2", status, "identity", f"differs by {gap:.0e}")


def describe_verdicts(judged: Sequence[Verdict]) -> str:
    """Return a sentence with the number of claims that hold and the equations that do not."""
    parts = []
    for status in get_args(Status):
        numbers = [verdict.equation for verdict in sorted(judged, key=order_in_paper) if verdict.status == status]
        if not numbers:
            continue
        # The verb agrees with the number of claims.
        verb = status if len(numbers) == 1 else status.replace("holds", "hold").replace("fails", "fail")
        equation_list = "" if status == "holds" else f" ({', '.join(numbers)})"
        parts.append(f"{len(numbers)} {verb}{equation_list}")
    return f"Of {len(judged)} claims of the paper's equations and gradients {', '.join(parts)}."


def verdict_rows(judged: Sequence[Verdict]) -> list[tuple[str, Status, str]]:
    """Return equation, verdict, and lines with the claim, its condition and its evidence, in the paper's order."""
    return [
        (verdict.equation, verdict.status, "\n".join(filter(None, (verdict.claim, verdict.where, verdict.evidence))))
        for verdict in sorted(judged, key=order_in_paper)
    ]


def judge_eq6(draws: Draws) -> Verdict:
    """Compare Eq. 6 with the mean of the samples at overlaps 0 and 0.5."""

    def judge_cell(rank: int, moments: sampling.StreamMoments) -> Outcome:
        claimed = equations.eq6_mean(1.0, rank=rank, p_in=draws.p_in, **UNIT)
        # Relative to the rms of w, so that the size of the step cancels.
        mean, size = moments.first.mean, math.sqrt(moments.first.second_moment.value)
        return judge_gap(abs(mean.value - claimed) / size, draws.z * mean.error / size, tolerance=0.0)

    # Figures for the evidence: the largest deviation from 0 where the claim holds, and the mean where it does not.
    largest = max(abs(moments.first.mean.value / moments.first.mean.error) for moments in draws.independent.values())
    law = laws.random_input_moments(rank=draws.high, p_in=draws.p_in, overlap=0.5, scaling=1.0).mean[0]
    return Verdict(
        "6",
        "E[w] = 0",
        draws.judge_means(judge_cell),
        "overlap 0 only; E[A_kl A_kj] is not 0 at l = j",
        f"largest |z| {largest:.1f} at overlap 0; at overlap 0.5, r = {draws.high}: E[w] = "
        f"{draws.overlapping[draws.high].first.mean.value:.4g} (exact {law:.4g})",
    )


def judge_eq7(draws: Draws) -> Verdict:
    """Compare Eq. 7 with the variance of the samples at overlaps 0 and 0.5.

    The claimed variance exceeds the true one by the squared mean, which has the tolerance and the error of the mean.
    """

    # Share of the claimed variance that is the squared mean.
    def excess_share(moments: sampling.StreamMoments) -> float:
        second = moments.first.second_moment.value
        claimed = equations.eq7_variance(second)
        return 1 - equations.eq5_variance(second, moments.first.mean.value) / claimed

    def judge_cell(_: int, moments: sampling.StreamMoments) -> Outcome:
        # The root of that share is the mean over the rms, so its error is that of the mean.
        size = math.sqrt(moments.first.second_moment.value)
        gap = math.sqrt(abs(excess_share(moments)))  # the sign differs for a claim that is too small
        return judge_gap(gap, draws.z * moments.first.mean.error / size, tolerance=0.0)

    low, high = (excess_share(draws.overlapping[rank]) for rank in (draws.low, draws.high))
    return Verdict(
        "7",
        "Var = E[w^2]",
        draws.judge_means(judge_cell),
        "where Eq. 6 holds: overlap 0",
        f"E[w]^2 / E[w^2] at overlap 0.5: {low:.3f} at r = {draws.low}, {high:.3f} at r = {draws.high}",
    )


def judge_eq8(draws: Draws) -> Verdict:
    """Compare Eq. 8 with the second moment of the samples; it may hold at ranks far below p_in."""
    claim = equations.eq8_second_moment
    # Ranks at which the dropped terms, of relative size r / p_in, are below the tolerance.
    low_ranks = [(rank, draws.p_in) for rank in draws.ranks if rank <= TOLERANCE * draws.p_in / 2] or [(1, WIDE)]
    limit = [draws.judge_ratio(draws.second_moment_ratio(claim, *cell)) for cell in low_ranks]
    return Verdict(
        "8",
        "E[w^2] = eta^2 delta^2 gamma^4 r p_in^2 (printed sum, evaluated)",
        decide(limit, draws.judge_all_cells(claim)),
        "r << p_in, overlap 0: drops the terms k != k'",
        f"simulated/printed {_format(draws.second_moment_ratio(claim, draws.low))} at r = {draws.low}, "
        f"{_format(draws.second_moment_ratio(claim, draws.far_rank, NARROW))} at r = {draws.far_rank}, p_in = {NARROW}",
    )


def judge_eq9(draws: Draws) -> Verdict:
    """Compare Eq. 9 with the second moment of the samples; it may hold at ranks far above p_in."""
    claim = equations.eq9_variance
    limit = draws.second_moment_ratio(claim, draws.far_rank, NARROW)
    # By the exact law the ratio is (p_in + r + 1) / r.
    figures = [
        f"{_format(draws.second_moment_ratio(claim, rank))} at r = {rank} (exact {(draws.p_in + rank + 1) / rank:.4g})"
        for rank in (draws.low, draws.high)
    ]
    return Verdict(
        "9",
        "Var = eta^2 delta^2 gamma^4 r^2 p_in",
        decide([draws.judge_ratio(limit)], draws.judge_all_cells(claim)),
        "r >> p_in, overlap 0; does not follow from Eq. 8, whose sum has r p_in^2 terms",
        f"simulated/printed {', '.join(figures)}, {_format(limit)} at r = {draws.far_rank}, p_in = {NARROW}",
    )


def judge_eq11(draws: Draws) -> Verdict:
    """Compare Eq. 11 with the norm of the samples, in which all delta_i are 1.

    For other delta_i no samples are needed: by Eq. 4, every w_i is delta_i times the same number.
    """

    def ratio(rank: int, p_in: int) -> Estimate:
        printed = float(equations.eq11_norm(np.ones(draws.p_out), rank=rank, p_in=p_in, **UNIT))
        return square_root(draws.moments(rank, 0.0, p_in).norm2.mean).times(1 / printed)

    # The printed formula uses the largest |delta_i| for all outputs, which inflates the norm if they differ.
    deltas = np.linspace(-1.0, 1.0, 101)
    inflation = math.sqrt(deltas.size * np.max(deltas**2) / np.sum(deltas**2))
    wide, narrow = ratio(draws.high, draws.p_in), ratio(draws.far_rank, NARROW)
    return Verdict(
        "11",
        "|w| = sqrt(p_out) times the largest term of Eq. 9",
        decide([draws.judge_ratio(narrow)], ["contradicts"]),  # always for other delta_i: a maximum is not a mean
        "r >> p_in and all |delta_i| equal; else an upper bound of the signal term alone",
        f"rms |w|/printed {wide.value:.4g} at r = {draws.high}, {narrow.value:.4g} at r = {draws.far_rank}, "
        f"p_in = {NARROW}; delta_i even over [-1, 1] inflates it {inflation:.2f} times",
    )


def judge_eq12(draws: Draws) -> Verdict:
    """Compare the printed constant of Eq. 12 with that of Eq. 11, at a learning rate other than 1."""
    eta, p_in, rank = 1e-3, draws.p_in, draws.high
    printed = equations.eq12_constant(1.0, p_out=draws.p_out, p_in=p_in, learning_rate=eta)
    from_eq11 = equations.eq11_norm(np.ones(draws.p_out), rank=rank, p_in=p_in, scaling=1.0, learning_rate=eta)
    excess = equations.eq12_norm(printed, rank=rank, scaling=1.0) / float(from_eq11)
    return Verdict(
        "12",
        "|w| = c gamma^2 r, c = sqrt(p_out p_in eta) delta_m",
        "holds" if abs(excess - 1) < 1e-6 else "fails",
        "c must be eta sqrt(p_out p_in) delta_m: eta does not belong under the root",
        f"at eta = {eta:g} the printed c is {excess:.1f} = eta^(-1/2) times Eq. 11's",
    )


def judge_eq13(draws: Draws) -> Verdict:
    """Compare the growth with the rank in Eq. 13 with that of the samples at a constant gamma."""

    def printed(rank: int) -> float:
        return equations.eq13_norm(1.0, rank=rank, scaling=1.0)

    return _judge_growth(draws, "13", "|w| grows as gamma^2 r", 0.0, printed)


def judge_eq14(draws: Draws) -> Verdict:
    """Compare the growth with the rank in Eq. 14 with that of the samples under LoRA's rule."""

    def printed(rank: int) -> float:
        return equations.eq14_lora_norm(1.0, alpha=1.0, rank=rank)

    return _judge_growth(draws, "14", "under alpha/r, |w| falls as 1/r", "lora", printed)


def judge_eq15(draws: Draws) -> Verdict:
    """Compare the growth with the rank in Eq. 15 with that of the samples under RoRA's rule."""

    def printed(rank: int) -> float:
        return equations.eq15_rora_norm(1.0, alpha=1.0, rank=rank)

    claim = "under alpha/sqrt(r), |w| does not depend on r"
    return _judge_growth(draws, "15", claim, "rora", printed)


def _judge_growth(draws: Draws, equation: str, claim: str, rule: Rule, printed: Callable[[int], float]) -> Verdict:
    """Compare the growth of a printed norm with that of the samples.

    The samples have overlap 0 and 0.5. The claim may hold far above the crossing rank, at overlap 0.5.
    """

    # The samples have unit scaling; w is proportional to gamma^2 under SGD.
    def slope(cells: Mapping[int, sampling.StreamMoments]) -> Estimate:
        gamma_squares = [scaling_factor(rule, alpha=1.0, rank=rank) ** 2 for rank in cells]
        unit_norms = [square_root(moments.norm2.mean) for moments in cells.values()]
        norms = [norm.times(square) for norm, square in zip(unit_norms, gamma_squares, strict=True)]
        return log_log_fit(list(cells), [norm.value for norm in norms], [norm.error for norm in norms])

    # Ranks far above the linear term c: those of the sweep, or two others if it has fewer than two.
    overlapping_term, independent_term = (
        float(laws.linear_term(laws.random_input_crossing_rank(draws.p_in, overlap), optimizer="sgd"))
        for overlap in (0.5, 0.0)
    )
    beyond = {rank: moments for rank, moments in draws.overlapping.items() if rank >= 10 * overlapping_term}
    if len(beyond) < 2:
        beyond = {rank: draws.moments(rank, 0.5) for rank in (math.ceil(far * overlapping_term) for far in (16, 64))}
    # Claimed slope against the fitted slopes; the limit decides.
    ranks = (draws.low, draws.high)
    claimed = log_log_fit(ranks, [printed(rank) for rank in ranks], [0.0, 0.0]).value
    fits = [slope(draws.independent), slope(draws.overlapping), slope(beyond)]
    outcomes = [
        judge_gap(
            abs(fit.value - claimed),
            draws.z * fit.error,
            tolerance=SLOPE_TOLERANCE,
            resolution=SLOPE_RESOLUTION,
        )
        for fit in fits
    ]
    independent, overlapping, in_limit = (f"{fit.value:+.3f} ({fit.error:.3f})" for fit in fits)
    return Verdict(
        equation,
        claim,
        decide(outcomes[-1:], outcomes[:-1]),
        f"r >> linear term c (c = {overlapping_term:.1f} at overlap 0.5); "
        f"at overlap 0 c = p_in + 1 = {independent_term:.0f}",
        f"slope of |w| over ranks {draws.low}-{draws.high}: {independent} at overlap 0, {overlapping} at 0.5, "
        f"{in_limit} at 0.5 from r = {min(beyond)}",
    )


def _format(ratio: Estimate) -> str:
    return f"{ratio.value:.4g} ({ratio.error:.1g})"
