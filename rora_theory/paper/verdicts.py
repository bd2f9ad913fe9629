"""Each equation of the paper judged: claim + law + samples -> a verdict, with figures.

Identities are judged against automatic differentiation, moments against samples. A claim about a moment *differs* in a
cell when the estimate is further from it than 2% and than the sampling threshold, *agrees* when it is not and the
threshold is narrow enough to have seen a claim that is wrong by a quarter, and is *open* otherwise. It holds when it
agrees in all cells, holds in a limit when it agrees in all cells of that limit and differs in another, fails when it
differs in that limit, and is undecided else.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from rora_theory.optimizers import make_optimizer
from rora_theory.paper import equations
from rora_theory.scaling import Rule, scaling_factor
from rora_theory.stats.estimate import Estimate, root
from rora_theory.stats.moments import Fit, log_log_fit, threshold
from rora_theory.theory import first_step, laws, sampling
from rora_theory.theory.grid import RANKS

Status = Literal["holds", "holds in a limit", "fails", "undecided"]
Outcome = Literal["agrees", "differs", "open"]

TOLERANCE = 0.02
"""Relative difference up to which a claim counts as agreeing with an exact figure: less than any reader acts on."""

FALSE_ALARM = 1e-6
"""Probability that a true claim is rejected by sampling error anywhere among the cells of one claim."""

RESOLUTION = 0.25
"""Relative sampling threshold above which a cell can't tell. At 0.5% a second moment, the default, it is 3%."""

SLOPE_TOLERANCE, SLOPE_RESOLUTION = 0.05, 0.1
"""As `TOLERANCE` and `RESOLUTION`, of an exponent of the rank."""

_ROUNDING = 1e-4
"""Relative difference of two float32 computations of one identity: sums of p_in terms, each rounded to 6e-8."""

NARROW, WIDE = 4, 4096
"""The p_in at which the limits r >> p_in and r << p_in are within reach, where the sweep's own does not show them."""

Sample = Callable[[sampling.RandomStep], sampling.Sums]
"""Gives the sums of a setting (unit scaling and learning rate)."""


@dataclass(frozen=True)
class Verdict:
    """One equation's verdict.

    Attributes:
      equation: its number, or ``gradient A`` and ``gradient B`` for the two formulas above Eq. 3.
      claim: what is claimed, in one line.
      status: ``holds``, ``holds in a limit``, ``fails``, or ``undecided`` where the samples could not have told.
      where: the condition under which it holds, or what is wrong.
      evidence: the figures that show it.
    """

    equation: str
    claim: str
    status: Status
    where: str
    evidence: str


def outcome(gap: float, threshold: float, *, tolerance: float = TOLERANCE, resolution: float = RESOLUTION) -> Outcome:
    """A claim in one cell.

    Args:
      gap: |estimate - claim|, in the claim's unit.
      threshold: the largest gap that sampling error alone leaves, in the same unit.
      tolerance: gap that does not count.
      resolution: threshold above which a gap that counts would not have been seen.

    Examples:
      >>> outcome(0.01, 0.02), outcome(24.8, 5.0), outcome(24.8, 33.0)
      ('agrees', 'differs', 'open')
    """
    if gap > max(tolerance, threshold):
        return "differs"
    return "agrees" if threshold <= resolution else "open"


def decide(limit: Sequence[Outcome], others: Sequence[Outcome]) -> Status:
    """The verdict on a claim from its cells: those of the limit in which it may hold alone, and the others.

    Examples:
      >>> decide(["agrees"], ["differs"]), decide(["agrees"], ["open"]), decide(["differs"], ["agrees"])
      ('holds in a limit', 'undecided', 'fails')
    """
    if "differs" in limit:
        return "fails"
    if "open" in limit:
        return "undecided"
    if "differs" in others:
        return "holds in a limit"
    return "undecided" if "open" in others else "holds"


def judge_equations(sample: Sample, *, ranks: Sequence[int], p_in: int, p_out: int) -> list[Verdict]:
    """Judge Eq. 1-15 and both gradients.

    Args:
      sample: gives the sums for a `sampling.RandomStep` of unit scaling and learning rate, ``"normal"`` A and SGD.
      ranks: at least two ranks, ascending.
      p_in, p_out: the layer's sizes.
    """
    layer, draws = RandomLayer.draw(), Draws(sample, tuple(ranks), p_in, p_out)
    identities = (eq1, eq2, eq_gradient_A, eq_gradient_B, eq3, eq4, eq10)
    moments = (eq5, eq6, eq7, eq8, eq9, eq11, eq12, eq13, eq14, eq15)
    return [*(one(layer) for one in identities), *(one(draws) for one in moments)]


def enough_ranks(ranks: Sequence[int]) -> list[int]:
    """Ascending ranks for the verdicts: a sweep's own, or `RANKS` where it has fewer than three."""
    return sorted(ranks) if len(ranks) >= 3 else list(RANKS)


def order_in_paper(verdict: Verdict) -> float:
    """Where a verdict stands in the order of the paper: the two gradients are above Eq. 3."""
    return {"gradient A": 2.1, "gradient B": 2.2}.get(verdict.equation) or float(verdict.equation)


GAMMA, ETA = 0.7, 0.3
"""The random layer's scaling and learning rate."""


class RandomLayer(NamedTuple):
    """One random layer (p_out 6, rank 3, p_in 5) with what automatic differentiation and optax make of it.

    Attributes:
      m0, B, A, delta, x, x_next: its numbers, by the paper's names.
      grad_A, grad_B: dL/dA and dL/dB.
      merged: m0 + gamma B A.
      sgd_B, adam_B: B after the first step from B = 0.
      sgd_w, adam_w: [p_out], the increment at x' after that step.
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
        """The layer of seed 15."""
        random, (p_out, rank, p_in) = np.random.default_rng(15), (6, 3, 5)
        shapes = (p_out, p_in), (p_out, rank), (rank, p_in), (p_out,), (p_in,), (p_in,)
        m0, B, A, delta, x, x_next = (random.standard_normal(shape, np.float32) for shape in shapes)
        return cls(m0, B, A, delta, x, x_next, *jax.device_get(_differentiated(m0, B, A, delta, x, x_next)))


@jax.jit
def _differentiated(m0: Array, B: Array, A: Array, delta: Array, x: Array, x_next: Array) -> tuple[Array, ...]:
    def loss(dm: first_step.Increment) -> Array:
        return jnp.vdot(delta, m0 @ x + dm(x))

    gradients = jax.grad(lambda pair: loss(first_step.Increment(pair[0], pair[1], GAMMA)))((A, B))
    merged = m0 + first_step.Increment(A, B, GAMMA)(jnp.eye(A.shape[1])).T
    sgd, adam = (
        first_step.run(loss, A, p_out=len(m0), scaling=GAMMA, optimizer=make_optimizer(name, ETA, epsilon=0.0))
        for name in laws.OPTIMIZERS
    )
    return (*gradients, merged, sgd.lora_B, adam.lora_B, sgd(x_next), adam(x_next))


def _identity(equation: str, claim: str, found: np.ndarray, truth: np.ndarray, where: str, more: str = "") -> Verdict:
    """The verdict on an equation that must equal what autodiff gives."""
    error = _gap(found, truth)
    status: Status = "holds" if error < _ROUNDING else "fails"
    return Verdict(equation, claim, status, where, f"autodiff differs by {error:.0e} of the largest entry{more}")


def _gap(found: np.ndarray, truth: np.ndarray) -> float:
    """The largest difference, relative to the largest entry."""
    return float(np.max(np.abs(found - truth)) / np.max(np.abs(truth)))


def eq1(layer: RandomLayer) -> Verdict:
    """Eq. 1."""
    found = equations.eq1_output(layer.m0, layer.B, layer.A, layer.x, GAMMA)
    return _identity("1", "H(x) = (m0 + gamma B A) x", found, layer.merged @ layer.x, "definition")


def eq2(layer: RandomLayer) -> Verdict:
    """Eq. 2."""
    found = equations.eq2_increment(layer.B, layer.A, layer.x, GAMMA)
    return _identity("2", "w = gamma B A x", found, (layer.merged - layer.m0) @ layer.x, "definition")


def eq_gradient_A(layer: RandomLayer) -> Verdict:
    """The first formula above Eq. 3."""
    found = equations.gradient_A(layer.delta, layer.B, layer.x, GAMMA)
    return _identity("gradient A", "dL/dA = gamma B^T delta x^T", found, layer.grad_A, "one sample")


def eq_gradient_B(layer: RandomLayer) -> Verdict:
    """The second formula above Eq. 3."""
    found = equations.gradient_B(layer.delta, layer.A, layer.x, GAMMA)
    return _identity("gradient B", "dL/dB = gamma delta (A x)^T", found, layer.grad_B, "one sample")


def eq3(layer: RandomLayer) -> Verdict:
    """Eq. 3."""
    found = equations.eq3_first_step_B(layer.delta, layer.A, layer.x, GAMMA, ETA)
    off = f"; under Adam off by {_gap(found, layer.adam_B):.1f}x"
    return _identity("3", "B1 = -eta gamma delta (A x)^T", found, layer.sgd_B, "SGD only", off)


def eq4(layer: RandomLayer) -> Verdict:
    """Eq. 4."""
    found = equations.eq4_increment(layer.delta, layer.A, layer.x, layer.x_next, GAMMA, ETA)
    off = f"; under Adam off by {_gap(found, layer.adam_w):.1f}x"
    claim = "w = -eta gamma^2 delta x^T A^T A x'"
    return _identity("4", claim, found, layer.sgd_w, "SGD only", off)


def eq10(layer: RandomLayer) -> Verdict:
    """Eq. 10."""
    found = equations.eq10_norm(layer.delta, layer.A, layer.x, layer.x_next, GAMMA, ETA)[None]
    truth = np.sqrt(np.sum(layer.sgd_w**2, keepdims=True))
    return _identity("10", "|w| = root of the sum of squares of Eq. 4", found, truth, "definition, with Eq. 4")


UNIT = {"scaling": 1.0, "learning_rate": 1.0}


class Draws:
    """The sums that the verdicts on moments are from, at unit scaling and rate, and every threshold's |z|.

    Attributes:
      independent, overlapping: of each rank, at overlap 0 and 0.5.
      low, high: the least and the largest rank.
      tall: the rank at which r >> `NARROW` inputs.
    """

    tall = 512 * NARROW

    def __init__(self, sample: Sample, ranks: tuple[int, ...], p_in: int, p_out: int) -> None:
        self._sample, self.ranks, self.p_in, self.p_out = sample, ranks, p_in, p_out
        self.low, self.high = ranks[0], ranks[-1]
        self.independent = {rank: self.sums(rank, 0.0) for rank in ranks}
        self.overlapping = {rank: self.sums(rank, 0.5) for rank in ranks}
        self.z = threshold(FALSE_ALARM, 2 * len(ranks))

    def sums(self, rank: int, overlap: float, p_in: int | None = None) -> sampling.Sums:
        """Of one setting; None is the layer's own p_in."""
        width = self.p_in if p_in is None else p_in
        return self._sample(sampling.RandomStep(rank=rank, p_in=width, p_out=self.p_out, overlap=overlap))

    def by_means(self, one: Callable[[int, sampling.Sums], Outcome]) -> Status:
        """The verdict on a claim about the mean, which may hold at overlap 0 alone."""
        cells = (self.independent, self.overlapping)
        return decide(*([one(rank, sums) for rank, sums in own.items()] for own in cells))

    def against(self, claim: Callable[..., float], rank: int, p_in: int | None = None) -> Estimate:
        """The second moment at overlap 0, over what is claimed."""
        printed = claim(1.0, rank=rank, p_in=self.p_in if p_in is None else p_in, **UNIT)
        return self.sums(rank, 0.0, p_in).first.second_moment.times(1 / printed)

    def near_one(self, ratio: Estimate) -> Outcome:
        """Whether a ratio is 1."""
        return outcome(abs(ratio.value - 1), self.z * ratio.error)

    def everywhere(self, claim: Callable[..., float]) -> list[Outcome]:
        """Whether the second moment is what is claimed: at every rank, and where the rank is far above p_in."""
        cells = [(rank, self.p_in) for rank in self.ranks] + [(rank, NARROW) for rank in (64 * NARROW, self.tall)]
        return [self.near_one(self.against(claim, *cell)) for cell in cells]


def eq5(draws: Draws) -> Verdict:
    """Eq. 5, of the draws themselves: the unbiased variance is n/(n-1) times theirs."""
    sums = draws.overlapping[draws.low].first
    drawn = sums.variance.value * (sums.count - 1) / sums.count
    gap = abs(drawn / equations.eq5_variance(sums.second_moment.value, sums.mean.value) - 1)
    status: Status = "holds" if gap < _ROUNDING else "fails"
    return Verdict("5", "Var = E[w^2] - E[w]^2", status, "identity", f"differs by {gap:.0e}")


def verdicts_in_words(judged: Sequence[Verdict]) -> str:
    """How many equations hold, and which do not, in a sentence."""
    names = {
        status: [v.equation for v in sorted(judged, key=order_in_paper) if v.status == status]
        for status in get_args(Status)
    }
    parts = [
        f"{len(found)} {status if len(found) == 1 else status.replace('holds', 'hold').replace('fails', 'fail')}"
        + (f" ({', '.join(found)})" if status != "holds" else "")
        for status, found in names.items()
        if found
    ]
    return f"Of {len(judged)} claims of the paper's equations {', '.join(parts)}."


def verdict_rows(judged: Sequence[Verdict]) -> list[tuple[str, Status, str]]:
    """In the paper's order the equation, its verdict, and a line each for claim, where it holds and figures."""
    return [
        (v.equation, v.status, "\n".join(filter(None, (v.claim, v.where, v.evidence))))
        for v in sorted(judged, key=order_in_paper)
    ]


def eq6(draws: Draws) -> Verdict:
    """Eq. 6."""

    def one(rank: int, sums: sampling.Sums) -> Outcome:
        claimed = equations.eq6_mean(1.0, rank=rank, p_in=draws.p_in, **UNIT)
        found, size = sums.first.mean, math.sqrt(sums.first.second_moment.value)
        return outcome(abs(found.value - claimed) / size, draws.z * found.error / size, tolerance=0.0)

    largest = max(abs(sums.first.mean.value / sums.first.mean.error) for sums in draws.independent.values())
    law = laws.random_input_moments(rank=draws.high, p_in=draws.p_in, overlap=0.5, scaling=1.0).mean[0]
    return Verdict(
        "6",
        "E[w] = 0",
        draws.by_means(one),
        "overlap 0 only; E[A_kl A_kj] is not 0 at l = j",
        f"largest |z| {largest:.1f} at overlap 0; at overlap 0.5, r = {draws.high}: E[w] = "
        f"{draws.overlapping[draws.high].first.mean.value:.4g} (exact {law:.4g})",
    )


def eq7(draws: Draws) -> Verdict:
    """Eq. 7: what is missing of the claimed variance is the mean's square, judged as the mean is."""

    def missing(sums: sampling.Sums) -> float:
        second = sums.first.second_moment.value
        claimed = equations.eq7_variance(second)
        return 1 - equations.eq5_variance(second, sums.first.mean.value) / claimed

    def one(_: int, sums: sampling.Sums) -> Outcome:
        size = math.sqrt(sums.first.second_moment.value)
        gap = math.sqrt(abs(missing(sums)))  # of a claim that is too small the sign is another
        return outcome(gap, draws.z * sums.first.mean.error / size, tolerance=0.0)

    low, high = (missing(draws.overlapping[rank]) for rank in (draws.low, draws.high))
    return Verdict(
        "7",
        "Var = E[w^2]",
        draws.by_means(one),
        "where Eq. 6 holds: overlap 0",
        f"E[w]^2 / E[w^2] at overlap 0.5: {low:.3f} at r = {draws.low}, {high:.3f} at r = {draws.high}",
    )


def eq8(draws: Draws) -> Verdict:
    """Eq. 8, whose limit is a rank far below p_in."""
    claim = equations.eq8_second_moment
    thin = [(rank, draws.p_in) for rank in draws.ranks if rank <= TOLERANCE * draws.p_in / 2] or [(1, WIDE)]
    limit = [draws.near_one(draws.against(claim, *cell)) for cell in thin]
    return Verdict(
        "8",
        "E[w^2] = eta^2 delta^2 gamma^4 r p_in^2 (its sum, counted)",
        decide(limit, draws.everywhere(claim)),
        "r << p_in, overlap 0: drops the terms k != k'",
        f"simulated/printed {_shown(draws.against(claim, draws.low))} at r = {draws.low}, "
        f"{_shown(draws.against(claim, draws.tall, NARROW))} at r = {draws.tall}, p_in = {NARROW}",
    )


def eq9(draws: Draws) -> Verdict:
    """Eq. 9, whose limit is a rank far above p_in."""
    claim, p_in, low, high = equations.eq9_variance, draws.p_in, draws.low, draws.high
    limit = draws.against(claim, draws.tall, NARROW)
    return Verdict(
        "9",
        "Var = eta^2 delta^2 gamma^4 r^2 p_in",
        decide([draws.near_one(limit)], draws.everywhere(claim)),
        "r >> p_in, overlap 0; does not follow from Eq. 8, whose sum has r p_in^2 terms",
        f"simulated/printed {_shown(draws.against(claim, low))} at r = {low} (exact {(p_in + low + 1) / low:.4g}), "
        f"{_shown(draws.against(claim, high))} at r = {high} (exact {(p_in + high + 1) / high:.4g}), "
        f"{_shown(limit)} at r = {draws.tall}, p_in = {NARROW}",
    )


def eq11(draws: Draws) -> Verdict:
    """Eq. 11, for equal and for spread |delta_i| (Eq. 4: w is delta times one number)."""

    def ratio(rank: int, p_in: int) -> Estimate:
        printed = float(equations.eq11_norm(np.ones(draws.p_out), rank=rank, p_in=p_in, **UNIT))
        return root(draws.sums(rank, 0.0, p_in).norm2.mean).times(1 / printed)

    spread = np.linspace(-1.0, 1.0, 101)
    inflation = math.sqrt(spread.size * np.max(spread**2) / np.sum(spread**2))
    wide, narrow = ratio(draws.high, draws.p_in), ratio(draws.tall, NARROW)
    return Verdict(
        "11",
        "|w| = sqrt(p_out) times the largest term of Eq. 9",
        decide([draws.near_one(narrow)], ["differs"]),  # for other delta_i always: a maximum is no mean
        "r >> p_in and all |delta_i| equal; else an upper bound of the signal term alone",
        f"rms |w|/printed {wide.value:.4g} at r = {draws.high}, {narrow.value:.4g} at r = {draws.tall}, p_in = {NARROW}"
        f"; delta_i even over [-1, 1] inflates it {inflation:.2f} times",
    )


def eq12(draws: Draws) -> Verdict:
    """Eq. 12: its printed constant, at a learning rate that is not 1."""
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


def eq13(draws: Draws) -> Verdict:
    """Eq. 13, at a constant gamma."""

    def printed(rank: int) -> float:
        return equations.eq13_norm(1.0, rank=rank, scaling=1.0)

    return _growth(draws, "13", "|w| grows as gamma^2 r", 0.0, printed)


def eq14(draws: Draws) -> Verdict:
    """Eq. 14."""

    def printed(rank: int) -> float:
        return equations.eq14_lora_norm(1.0, alpha=1.0, rank=rank)

    return _growth(draws, "14", "under alpha/r, |w| falls as 1/r", "lora", printed)


def eq15(draws: Draws) -> Verdict:
    """Eq. 15."""

    def printed(rank: int) -> float:
        return equations.eq15_rora_norm(1.0, alpha=1.0, rank=rank)

    claim = "under alpha/sqrt(r), |w| does not depend on r"
    return _growth(draws, "15", claim, "rora", printed)


def _growth(draws: Draws, equation: str, claim: str, rule: Rule, printed: Callable[[int], float]) -> Verdict:
    """The verdict on a printed norm's growth with the rank: at overlap 0, at 0.5, and far beyond the crossing rank."""

    def slope(cells: Mapping[int, sampling.Sums]) -> Fit:
        gammas = [scaling_factor(rule, alpha=1.0, rank=rank) ** 2 for rank in cells]
        norms = [root(sums.norm2.mean).times(gamma) for sums, gamma in zip(cells.values(), gammas, strict=True)]
        return log_log_fit(list(cells), [norm.value for norm in norms], [norm.error for norm in norms])

    crossing = laws.random_input_crossing_rank(draws.p_in, 0.5)
    beyond = {rank: sums for rank, sums in draws.overlapping.items() if rank >= 10 * crossing}
    if len(beyond) < 2:  # the sweep's own ranks don't reach the limit: two that do
        beyond = {rank: draws.sums(rank, 0.5) for rank in (math.ceil(16 * crossing), math.ceil(64 * crossing))}
    ranks = (draws.low, draws.high)
    claimed = log_log_fit(ranks, [printed(rank) for rank in ranks], [0.0, 0.0]).slope
    fits = [slope(draws.independent), slope(draws.overlapping), slope(beyond)]
    outcomes = [
        outcome(
            abs(fit.slope - claimed),
            draws.z * fit.standard_error,
            tolerance=SLOPE_TOLERANCE,
            resolution=SLOPE_RESOLUTION,
        )
        for fit in fits
    ]
    zero, half, limit = (f"{fit.slope:+.3f} ± {fit.standard_error:.3f}" for fit in fits)
    return Verdict(
        equation,
        claim,
        decide(outcomes[-1:], outcomes[:-1]),
        f"r >> r* (r* = {crossing:.1f} at overlap 0.5); at overlap 0 r* = p_in + 2 = {draws.p_in + 2}",
        f"slope of |w| over ranks {draws.low}-{draws.high}: {zero} at overlap 0, {half} at 0.5, "
        f"{limit} at 0.5 from r = {min(beyond)}",
    )


def _shown(ratio: Estimate) -> str:
    return f"{ratio.value:.4g} ± {ratio.error:.1g}"
