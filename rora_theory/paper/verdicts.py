"""Each equation of the paper judged: claim + law + samples -> a verdict, with figures.

Identities are judged against automatic differentiation, moments against samples. A claim about a moment *differs* in a
cell when the estimate is further from it than 2% and than the sampling threshold, *agrees* when it is not and the
threshold is narrow enough to have seen a claim that is wrong by a quarter, and is *open* otherwise. It holds when it
agrees in all cells, holds in a limit when it agrees in all cells of that limit and differs in another, fails when it
differs in that limit, and is undecided else.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from rora_theory.paper import equations
from rora_theory.scaling import scaling_factor
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

    Example:
      >>> outcome(0.01, 0.02), outcome(24.8, 5.0), outcome(24.8, 33.0)
      ('agrees', 'differs', 'open')
    """
    if gap > max(tolerance, threshold):
        return "differs"
    return "agrees" if threshold <= resolution else "open"


def decide(limit: Sequence[Outcome], others: Sequence[Outcome]) -> Status:
    """The verdict on a claim from its cells: those of the limit in which it may hold alone, and the others.

    Example:
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


def judge(sample: Sample, *, ranks: Sequence[int], p_in: int, p_out: int) -> list[Verdict]:
    """Judge Eq. 1-15 and both gradients.

    Args:
      sample: gives the sums for a `sampling.RandomStep` of unit scaling and learning rate, ``"normal"`` A and SGD.
      ranks: at least two ranks, ascending.
      p_in, p_out: the layer's sizes.
    """
    return [*_identities(), *_moments(sample, tuple(ranks), p_in, p_out)]


def enough_ranks(ranks: Sequence[int]) -> list[int]:
    """Ascending ranks for the verdicts: a sweep's own, or `RANKS` where it has fewer than three."""
    return sorted(ranks) if len(ranks) >= 3 else list(RANKS)


def place(verdict: Verdict) -> float:
    """Where a verdict stands in the order of the paper: the two gradients are above Eq. 3."""
    return {"gradient A": 2.1, "gradient B": 2.2}.get(verdict.equation) or float(verdict.equation)


def _identities() -> list[Verdict]:
    """Equations that must equal what autodiff gives, on one random layer (p_out 6, rank 3, p_in 5)."""
    keys = jax.random.split(jax.random.key(15), 7)
    p_out, rank, p_in, gamma, eta = 6, 3, 5, 0.7, 0.3
    m0, B = jax.random.normal(keys[0], (p_out, p_in)), jax.random.normal(keys[1], (p_out, rank))
    A, delta = jax.random.normal(keys[2], (rank, p_in)), jax.random.normal(keys[3], (p_out,))
    x, x_next = jax.random.normal(keys[4], (p_in,)), jax.random.normal(keys[5], (p_in,))

    def loss(dm: first_step.Increment) -> jax.Array:
        return jnp.vdot(delta, m0 @ x + dm(x))

    grad_A, grad_B = jax.grad(lambda pair: loss(first_step.Increment(pair[0], pair[1], gamma)))((A, B))
    merged = m0 + first_step.Increment(A, B, gamma)(jnp.eye(p_in)).T
    steps = {
        name: first_step.run(loss, A, p_out=p_out, scaling=gamma, optimizer=first_step.optimizer(name, eta))
        for name in laws.OPTIMIZERS
    }
    sgd, adam = steps["sgd"], steps["adam"]
    eq3 = equations.eq3_first_step_B(delta, A, x, gamma, eta)
    eq4 = equations.eq4_increment(delta, A, x, x_next, gamma, eta)

    def identity(equation: str, claim: str, found: jax.Array, truth: jax.Array, where: str, more: str = "") -> Verdict:
        error = float(jnp.max(jnp.abs(found - truth)) / jnp.max(jnp.abs(truth)))
        status: Status = "holds" if error < _ROUNDING else "fails"
        return Verdict(equation, claim, status, where, f"autodiff differs by {error:.0e} of the largest entry{more}")

    adam_gap = float(jnp.max(jnp.abs(eq3 - adam.lora_B)) / jnp.max(jnp.abs(adam.lora_B)))
    adam_w = float(jnp.max(jnp.abs(eq4 - adam(x_next))) / jnp.max(jnp.abs(adam(x_next))))
    return [
        identity("1", "H(x) = (m0 + gamma B A) x", equations.eq1_output(m0, B, A, x, gamma), merged @ x, "definition"),
        identity("2", "w = gamma B A x", equations.eq2_increment(B, A, x, gamma), (merged - m0) @ x, "definition"),
        identity(
            "gradient A",
            "dL/dA = gamma B^T delta x^T",
            equations.gradient_A(delta, B, x, gamma),
            grad_A,
            "one sample",
        ),
        identity(
            "gradient B",
            "dL/dB = gamma delta (A x)^T",
            equations.gradient_B(delta, A, x, gamma),
            grad_B,
            "one sample",
        ),
        identity(
            "3",
            "B1 = -eta gamma delta (A x)^T",
            eq3,
            sgd.lora_B,
            "SGD only",
            f"; under Adam off by {adam_gap:.1f}x",
        ),
        identity(
            "4",
            "w = -eta gamma^2 delta x^T A^T A x'",
            eq4,
            sgd(x_next),
            "SGD only",
            f"; under Adam off by {adam_w:.1f}x",
        ),
        identity(
            "10",
            "|w| = root of the sum of squares of Eq. 4",
            equations.eq10_norm(delta, A, x, x_next, gamma, eta)[None],
            jnp.linalg.norm(sgd(x_next))[None],
            "definition, with Eq. 4",
        ),
    ]


def _moments(sample: Sample, ranks: tuple[int, ...], p_in: int, p_out: int) -> list[Verdict]:
    low, high = ranks[0], ranks[-1]
    narrow_ranks = (64 * NARROW, 512 * NARROW)

    def cell(rank: int, overlap: float, width: int = p_in) -> sampling.Sums:
        return sample(sampling.RandomStep(rank=rank, p_in=width, p_out=p_out, overlap=overlap))

    def second(rank: int, overlap: float, width: int = p_in) -> Estimate:
        return cell(rank, overlap, width).first.second_moment

    independent = {rank: cell(rank, 0.0) for rank in ranks}
    overlapping = {rank: cell(rank, 0.5) for rank in ranks}
    z = threshold(FALSE_ALARM, 2 * len(ranks))
    unit = {"scaling": 1.0, "learning_rate": 1.0}

    # 5: Var = E w^2 - (E w)^2, of the draws themselves: the unbiased variance is n/(n-1) times theirs.
    sums = overlapping[low].first
    drawn = sums.variance.value * (sums.count - 1) / sums.count
    gap = abs(drawn / equations.eq5_variance(sums.second_moment.value, sums.mean.value) - 1)

    # 6, 7: the mean.
    def mean(sums: sampling.Sums) -> Outcome:
        found, size = sums.first.mean, math.sqrt(sums.first.second_moment.value)
        return outcome(abs(found.value) / size, z * found.error / size, tolerance=0.0)

    scores0 = max(abs(s.first.mean.value / s.first.mean.error) for s in independent.values())
    share = {rank: s.first.mean.value**2 / s.first.second_moment.value for rank, s in overlapping.items()}
    mean_law = laws.random_input_moments(rank=high, p_in=p_in, overlap=0.5, scaling=1.0).mean[0]
    zero_mean = decide(*([mean(sums) for sums in cells.values()] for cells in (independent, overlapping)))

    # 8, 9: the second moment at overlap 0, against the count of terms and against the printed result.
    def ratios(claim: Callable[..., float], cells: Sequence[tuple[int, int]]) -> list[tuple[float, float]]:
        found = [(second(rank, 0.0, width), claim(1.0, rank=rank, p_in=width, **unit)) for rank, width in cells]
        return [(estimate.value / printed, estimate.error / printed) for estimate, printed in found]

    def against_one(ratio: tuple[float, float]) -> Outcome:
        return outcome(abs(ratio[0] - 1), z * ratio[1])

    wide, narrow = [(rank, p_in) for rank in ranks], [(rank, NARROW) for rank in narrow_ranks]
    thin = [(rank, p_in) for rank in ranks if rank <= TOLERANCE * p_in / 2] or [(1, WIDE)]
    eq8 = {
        "all": ratios(equations.eq8_second_moment, wide + narrow),
        "limit": ratios(equations.eq8_second_moment, thin),
    }
    eq9 = {"all": ratios(equations.eq9_variance, wide + narrow), "limit": ratios(equations.eq9_variance, narrow[-1:])}

    def status(found: dict[str, list[tuple[float, float]]]) -> Status:
        return decide(*([against_one(ratio) for ratio in found[cells]] for cells in ("limit", "all")))

    def shown(ratio: tuple[float, float]) -> str:
        return f"{ratio[0]:.4g} ± {ratio[1]:.1g}"

    # 11: the norm, for equal and for spread |delta_i| (Eq. 4: w is delta times one number).
    spread = np.linspace(-1.0, 1.0, 101)
    inflation = math.sqrt(spread.size * np.max(spread**2) / np.sum(spread**2))
    wide_norm = root(independent[high].norm2.mean)
    printed = float(equations.eq11_norm(jnp.ones(p_out), rank=high, p_in=p_in, **unit))
    narrow_norm = root(cell(narrow_ranks[-1], 0.0, NARROW).norm2.mean)
    narrow_printed = float(equations.eq11_norm(jnp.ones(p_out), rank=narrow_ranks[-1], p_in=NARROW, **unit))
    norm_limit = against_one((narrow_norm.value / narrow_printed, narrow_norm.error / narrow_printed))

    # 12: the printed constant at a learning rate that is not 1.
    eta = 1e-3
    constant = equations.eq12_constant(1.0, p_out=p_out, p_in=p_in, learning_rate=eta)
    from_eq11 = float(equations.eq11_norm(jnp.ones(p_out), rank=high, p_in=p_in, scaling=1.0, learning_rate=eta))
    excess = equations.eq12_norm(constant, rank=high, scaling=1.0) / from_eq11

    # 13-15: growth of |w| with the rank.
    def slope(cells: dict[int, sampling.Sums], rule: float | str) -> Fit:
        gammas = [scaling_factor(rule, alpha=1.0, rank=rank) ** 2 for rank in cells]  # type: ignore[arg-type]
        norms = [root(s.norm2.mean) for s in cells.values()]
        return log_log_fit(
            list(cells),
            [norm.value * gamma for norm, gamma in zip(norms, gammas, strict=True)],
            [norm.error * gamma for norm, gamma in zip(norms, gammas, strict=True)],
        )

    crossing = laws.random_input_crossing_rank(p_in, 0.5)
    beyond = {rank: sums for rank, sums in overlapping.items() if rank >= 10 * crossing}
    if len(beyond) < 2:  # the sweep's own ranks don't reach the limit: two that do
        beyond = {rank: cell(rank, 0.5) for rank in (math.ceil(16 * crossing), math.ceil(64 * crossing))}

    def growth(equation: str, claim: str, rule: float | str, claimed: float, where: str) -> Verdict:
        fits = [slope(independent, rule), slope(overlapping, rule), slope(beyond, rule)]
        outcomes = [
            outcome(
                abs(fit.slope - claimed),
                z * fit.standard_error,
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
            where,
            f"slope of |w| over ranks {low}-{high}: {zero} at overlap 0, {half} at 0.5, "
            f"{limit} at 0.5 from r = {min(beyond)}",
        )

    regime = f"r >> r* (r* = {crossing:.1f} at overlap 0.5); at overlap 0 r* = p_in + 2 = {p_in + 2}"
    return [
        Verdict(
            "5",
            "Var = E[w^2] - E[w]^2",
            "holds" if gap < _ROUNDING else "fails",
            "identity",
            f"differs by {gap:.0e}",
        ),
        Verdict(
            "6",
            "E[w] = 0",
            zero_mean,
            "overlap 0 only; E[A_kl A_kj] is not 0 at l = j",
            f"largest |z| {scores0:.1f} at overlap 0; at overlap 0.5, r = {high}: E[w] = "
            f"{overlapping[high].first.mean.value:.4g} (exact {mean_law:.4g})",
        ),
        Verdict(
            "7",
            "Var = E[w^2]",
            zero_mean,
            "where Eq. 6 holds: overlap 0",
            f"E[w]^2 / E[w^2] at overlap 0.5: {share[low]:.3f} at r = {low}, {share[high]:.3f} at r = {high}",
        ),
        Verdict(
            "8",
            "E[w^2] = eta^2 delta^2 gamma^4 r p_in^2 (its sum, counted)",
            status(eq8),
            "r << p_in, overlap 0: drops the terms k != k'",
            f"simulated/printed {shown(eq8['all'][0])} at r = {low}, "
            f"{shown(ratios(equations.eq8_second_moment, narrow[-1:])[0])} at r = {narrow[-1][0]}, p_in = {NARROW}",
        ),
        Verdict(
            "9",
            "Var = eta^2 delta^2 gamma^4 r^2 p_in",
            status(eq9),
            "r >> p_in, overlap 0; does not follow from Eq. 8, whose sum has r p_in^2 terms",
            f"simulated/printed {shown(eq9['all'][0])} at r = {low} (exact {(p_in + low + 1) / low:.4g}), "
            f"{shown(eq9['all'][len(ranks) - 1])} at r = {high} (exact {(p_in + high + 1) / high:.4g}), "
            f"{shown(eq9['limit'][0])} at r = {narrow[-1][0]}, p_in = {NARROW}",
        ),
        Verdict(
            "11",
            "|w| = sqrt(p_out) times the largest term of Eq. 9",
            decide([norm_limit], ["differs"]),  # for other delta_i always: a maximum is no mean
            "r >> p_in and all |delta_i| equal; else an upper bound of the signal term alone",
            f"rms |w|/printed {wide_norm.value / printed:.4g} at r = {high}, {narrow_norm.value / narrow_printed:.4g} "
            f"at r = {narrow_ranks[-1]}, p_in = {NARROW}; delta_i even over [-1, 1] inflates it {inflation:.2f} times",
        ),
        Verdict(
            "12",
            "|w| = c gamma^2 r, c = sqrt(p_out p_in eta) delta_m",
            "holds" if abs(excess - 1) < 1e-6 else "fails",
            "c must be eta sqrt(p_out p_in) delta_m: eta does not belong under the root",
            f"at eta = {eta:g} the printed c is {excess:.1f} = eta^(-1/2) times Eq. 11's",
        ),
        growth("13", "|w| grows as gamma^2 r", 0.0, 1.0, regime),
        growth("14", "under alpha/r, |w| falls as 1/r", "lora", -1.0, regime),
        growth("15", "under alpha/sqrt(r), |w| does not depend on r", "rora", 0.0, regime),
    ]
