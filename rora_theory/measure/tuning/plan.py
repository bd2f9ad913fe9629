"""Plan of a probe: which learning rates to train for how many steps, within a share of the planned run's cost.

A probe has up to two phases. In the first, short runs screen a coarse grid of learning rates. In the second, the rates
around the best one of the screening are trained for more steps. Both phases extend their grid while the best rate lies
at an edge. The pattern is that of successive halving (Jamieson and Talwalkar 2016), with complete schedules in every
phase: a rate that is stopped early has seen its own schedule to the end, so that losses within a phase are comparable.

`next_trial` is a pure function of the plan and the finished runs. A probe that was interrupted therefore continues with
the same runs.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rora_theory.advice.best_rate import LogChange, Run, best_rate_change
from rora_theory.errors import InputError
from rora_theory.measure.tuning.belief import CURVATURE, RateBelief
from rora_theory.measure.tuning.posterior import SEED_SPREAD
from rora_theory.measure.tuning.prior import rate_prior
from rora_theory.measure.tuning.trial import ProbeRun, Trial
from rora_theory.scaling import check_integer, check_not_negative, check_positive, check_share

BUDGET = 0.1
"""Usual cost of a probe, as a share of the planned run. Without a stated budget nothing is trained."""

EVALUATION_COST = 0.5
"""Cost of evaluating a token, relative to training on it.

With frozen base weights, training needs a forward pass and the gradients of the inputs: twice a forward pass.
"""

EVALUATION_SHARE = 0.15
"""Share of the budget that is reserved for evaluations."""

MAX_PROBE_STEPS = 64
"""Maximum number of steps of a run in a probe."""

MIN_PROBE_STEPS = 5
"""Minimum number of steps of a run in a probe."""

MIN_STEPS_RATIO = 16
"""Minimum ratio of the planned number of steps to that of a run in a probe, except for the shortest runs."""

MIN_MEASURED_STEPS = 16
"""Fewest steps at which the published runs of a curve measured a best rate; shorter probes have a coarser grid."""

MIN_SCREENING_STEPS = 8
"""Minimum number of steps of a screening run. With fewer, there is no screening."""

SCREENING_SHARE = 3
"""Number of screening runs that cost as much as a run of full length."""

MIN_SCREENED_STEPS = SCREENING_SHARE * MIN_SCREENING_STEPS
"""Minimum number of steps of the full runs of a probe with screening."""

MIN_FULL_RUNS = 3
"""Minimum number of full runs: the best rate and its neighbours."""

MIN_SCREENING_RUNS = 5
"""Number of learning rates that are screened before the grid is extended."""

FIT_SPREAD = 0.3
"""Typical error of the logarithm of a probe's own best rate by its parabola, with held-out losses without error."""

PAIRED_ERROR = 0.3
"""Standard error of the difference of two held-out losses on the same records, times the root of their tokens.

In nats per token, for neighbouring rates: the middle of ``results/published/tune/paired_errors.csv``.
"""

MAX_ERROR_SHARE = 1 / 3
"""Largest error of a difference of two losses, relative to the difference that a probe must see."""

MAX_SHARE_LEFT = 0.8
"""Largest share of the prior's expected regret that a probe may be expected to leave, to be worth its cost."""

LARGER_BUDGETS = (0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75, 1.0)
"""Budgets that are tried if a smaller one cannot beat the prior."""

ALL_DIVERGED_JUMP = 2
"""Number of grid steps by which the grid is extended downwards if every rate diverged."""


@dataclass(frozen=True)
class ProbePlan:
    """Plan of a probe. Costs are in training steps of the planned run.

    Attributes:
      run: Planned run.
      probe_rank: Rank of the probe's adapters, at the same gain.
      prior: Belief about the planned run's best rate before the probe.
      probe_steps: Number of steps of the runs from which the best rate is fitted.
      screen_steps: Number of steps of the screening runs; None if there is no screening.
      learning_rate: Middle of the grid of learning rates, for runs of ``probe_steps`` steps.
      spacing: Ratio of adjacent learning rates.
      budget: Maximum cost of the probe.
      training_costs: Cost of training the first 0, 1, 2, ... steps of a run.
      setup_cost: Cost of what is evaluated once, included in the budget.
      evaluation_cost: Cost of one evaluation of the held-out records.
      evaluation_tokens: Number of tokens of one evaluation.
    """

    run: Run
    probe_rank: int
    prior: RateBelief
    probe_steps: int
    screen_steps: int | None
    learning_rate: float
    spacing: float
    budget: float
    training_costs: tuple[float, ...]
    setup_cost: float
    evaluation_cost: float
    evaluation_tokens: float

    @property
    def steps(self) -> int:
        """Number of optimizer steps of the planned run."""
        return self.run.steps or 0

    def probe_run(self, steps: int) -> Run:
        """Return the properties of a run of the probe with a number of steps."""
        return replace(self.run, rank=self.probe_rank, steps=steps)

    @property
    def carry(self) -> LogChange:
        """Change of the logarithm of the best rate from the probe's full runs to the planned run."""
        return best_rate_change(self.probe_run(self.probe_steps), self.run)

    @property
    def expected_spread(self) -> float:
        """Standard deviation of the logarithm of the best rate that the probe is expected to leave."""
        # Error of the minimum of a parabola through three losses, by that of their differences.
        by_records = self.paired_error / (2 * CURVATURE * math.log(self.spacing))
        probe_variance = self.carry.spread**2 + SEED_SPREAD**2 + FIT_SPREAD**2 + by_records**2
        return (self.prior.spread**-2 + 1 / probe_variance) ** -0.5

    @property
    def expected_regret(self) -> float:
        """Regret in nats per token that the probe is expected to leave."""
        return 0.5 * CURVATURE * self.expected_spread**2

    @property
    def beats_prior(self) -> bool:
        """Whether the probe is expected to leave at most `MAX_SHARE_LEFT` of the prior's expected regret."""
        return self.expected_regret <= MAX_SHARE_LEFT * self.prior.expected_regret

    @property
    def paired_error(self) -> float:
        """Expected error of the difference of two held-out losses in nats per token."""
        return PAIRED_ERROR / math.sqrt(self.evaluation_tokens)

    @property
    def needed_tokens(self) -> int:
        """Number of held-out tokens at which the error is `MAX_ERROR_SHARE` of the difference that one rate makes."""
        difference = 0.5 * CURVATURE * math.log(self.spacing) ** 2
        return math.ceil((PAIRED_ERROR / (MAX_ERROR_SHARE * difference)) ** 2)

    def held_out_tokens(self, batch_tokens: float) -> int:
        """Return the maximum number of held-out tokens of one evaluation.

        Args:
          batch_tokens: Number of tokens of a training step.
        """
        return math.floor(self.evaluation_cost * batch_tokens / EVALUATION_COST * (1 + 1e-9))

    def cost_of_trial(self, steps: int) -> float:
        """Return the cost of a run that does not diverge."""
        return self.training_costs[steps] + self.evaluation_cost

    def cost_of_run(self, run: ProbeRun) -> float:
        """Return the cost of a finished run. One that diverged was not evaluated, or only once more."""
        if run.diverged_at is None:
            return self.cost_of_trial(run.steps)
        evaluation_cost = self.evaluation_cost if run.diverged_at >= run.steps else 0.0
        return self.training_costs[run.diverged_at] + evaluation_cost

    def spent(self, runs: Sequence[ProbeRun]) -> float:
        """Return the cost of all finished runs and of what is evaluated once."""
        return self.setup_cost + math.fsum(self.cost_of_run(run) for run in runs)

    def sentence(self) -> str:
        """Return a sentence with the runs and the maximum cost, to be shown before the probe starts."""
        runs = (
            f"trains {MIN_FULL_RUNS} or more learning rates for {self.probe_steps} steps each, without screening, "
            f"which begins at {self._screening_begins():,} planned steps"
        )
        if self.screen_steps is not None:
            runs = (
                f"screens {MIN_SCREENING_RUNS} or more learning rates, fewer if some diverge, for {self.screen_steps} "
                f"steps each, then trains the best and its neighbours, {MIN_FULL_RUNS} or more rates, for "
                f"{self.probe_steps} steps each"
            )
        records = ""
        if self.evaluation_tokens < self.needed_tokens:
            records = (
                f" Its held-out losses are over {self.evaluation_tokens:,.0f} tokens; about {self.needed_tokens:,} are "
                "needed to see the differences between its rates clearly."
            )
        return (
            f"Without a probe the rate is {self.prior.rates.best:.3g}, with an expected regret of "
            f"{self.prior.expected_regret:.4f} nats per token. The probe {runs}. It costs at most {self.budget:.4g} "
            f"training steps, {self.budget / self.steps:.1%} of the planned {self.steps:,}, and is expected to leave "
            f"{self.expected_regret:.4f}.{records}"
        )

    def _screening_begins(self) -> int:
        """Return the smallest number of planned steps at which a probe of the same share of the cost has screening."""
        training = _cost_of_training(MIN_SCREENED_STEPS, _count_runs(MIN_SCREENED_STEPS), self.training_costs)
        cost = training / (1 - EVALUATION_SHARE) + self.setup_cost
        return max(math.ceil(cost * self.steps / self.budget), MIN_STEPS_RATIO * MIN_SCREENED_STEPS)


def make_plan(
    run: Run,
    *,
    probe_rank: int,
    parameters: float | None = None,
    family: str | None = None,
    batch_tokens: float,
    step_tokens: Sequence[float] | None = None,
    held_out_tokens: float,
    setup_tokens: float = 0.0,
    learning_rate: float | None = None,
    budget: float = BUDGET,
) -> ProbePlan:
    """Plan a probe within a share of the planned run's cost.

    The number of steps of a run is at most `MAX_PROBE_STEPS` and a sixteenth of the planned steps. It is the largest
    one at which the minimum number of runs and one or two extensions of the grid fit into the budget. The smallest
    probe has no extension. Runs of fewer than `MIN_MEASURED_STEPS` steps have a coarser grid. The number of held-out
    tokens is reduced to what the rest of the budget allows.

    Screening begins at full runs of `MIN_SCREENED_STEPS` steps, a third of which is `MIN_SCREENING_STEPS`. At the
    default budget and without ``setup_tokens`` these fit from 1,695 planned steps on. A shorter probe trains every rate
    at full length, the middle of the grid first, and moves towards the lower loss. Screening reaches more rates at the
    cost of the length of the full runs. With 8 and 16 steps it would fit from 1,318 planned steps on, where the same
    budget pays for five full runs of 22 steps, which find a best rate of 1/4 to 8 times the middle. It begins later so
    that the full runs stay longer: the range of the rate widens with the ratio of the planned steps to theirs.

    Args:
      run: Planned run, with its number of steps.
      probe_rank: Rank of the probe's adapters, at the same gain.
      parameters: Number of parameters of the model in billions, for the prior; None is not known.
      family: Family of the model, for the prior; None is another than those of the public sweeps.
      batch_tokens: Mean number of tokens of a training step of the planned run.
      step_tokens: Number of tokens of each of the first `MAX_PROBE_STEPS` steps, on which every run of the probe is
        trained; None is ``batch_tokens`` each. Steps cost as many mean steps as have their tokens, and at least their
        number.
      held_out_tokens: Number of held-out tokens that are available.
      setup_tokens: Number of tokens that are evaluated once per probe, besides the held-out losses.
      learning_rate: Median of the prior, in place of the public sweeps'; its spread stays theirs.
      budget: Maximum cost of the probe as a share of the planned run, above 0 and at most 1.

    Returns:
      The plan.

    Raises:
      InputError: If an argument is out of range, or if the budget is too small for a probe.
    """
    check_integer("steps", run.steps)
    check_integer("probe_rank", probe_rank)
    steps = run.steps or 0
    check_positive("batch_tokens", batch_tokens)
    check_positive("held_out_tokens", held_out_tokens)
    check_not_negative("setup_tokens", setup_tokens)
    check_share("budget", budget)
    if learning_rate is not None:
        check_positive("learning_rate", learning_rate)
    # All costs are in units of a training step of the planned run.
    setup_cost = EVALUATION_COST * setup_tokens / batch_tokens
    totals = itertools.accumulate([batch_tokens] * MAX_PROBE_STEPS if step_tokens is None else step_tokens)
    costs = (0.0, *(max(float(number), tokens / batch_tokens) for number, tokens in enumerate(totals, 1)))
    total = budget * steps - setup_cost
    # Candidates, from the largest to the smallest: number of steps of a run, and numbers of screening and full runs.
    longest = min(MAX_PROBE_STEPS, max(steps // MIN_STEPS_RATIO, MIN_PROBE_STEPS))
    candidates = [(number, _count_runs(number)) for number in range(longest, MIN_PROBE_STEPS - 1, -1)]
    # The smallest probe cannot extend its grid.
    candidates.append((MIN_PROBE_STEPS, (0, MIN_FULL_RUNS)))
    # The first candidate whose runs fit into the budget's share for training.
    training_budget = (1 - EVALUATION_SHARE) * total
    affordable = (candidate for candidate in candidates if _cost_of_training(*candidate, costs) <= training_budget)
    chosen = next(affordable, None)
    if chosen is None:
        cost = _cost_of_training(*candidates[-1], costs) / (1 - EVALUATION_SHARE) + setup_cost
        raise InputError(
            f"budget must be at least {math.ceil(100 * cost / steps) / 100:g} for a probe of a run of {steps} steps, "
            f"got {budget:g}. Raise budget, or leave it out for the rate that public sweeps lead to expect."
        )
    probe_steps, (screening_runs, full_runs) = chosen
    # The rest of the budget pays for the evaluations, of all held-out tokens or fewer.
    cost_per_evaluation = (total - _cost_of_training(*chosen, costs)) / (screening_runs + full_runs)
    evaluation_cost = min(cost_per_evaluation, EVALUATION_COST * held_out_tokens / batch_tokens)
    prior = rate_prior(run, family=family, parameters=parameters)
    if learning_rate is not None:
        prior = replace(prior, mean=math.log(learning_rate))
    # The grid of the probe has the prior's median at its middle, transferred to the probe's rank and steps.
    to_probe = best_rate_change(run, replace(run, rank=probe_rank, steps=probe_steps))
    return ProbePlan(
        run=run,
        probe_rank=probe_rank,
        prior=prior,
        probe_steps=probe_steps,
        screen_steps=_screen_steps(probe_steps) if screening_runs else None,
        learning_rate=math.exp(prior.mean + to_probe.mean),
        spacing=2.0 if probe_steps >= MIN_MEASURED_STEPS else 3.0,
        budget=budget * steps,
        training_costs=costs,
        setup_cost=setup_cost,
        evaluation_cost=evaluation_cost,
        evaluation_tokens=evaluation_cost * batch_tokens / EVALUATION_COST,
    )


def explain_useless_probe(plan: ProbePlan, **settings: Any) -> str | None:
    """Explain why a probe is not expected to beat the prior, and name the budget of one that is.

    Args:
      plan: Plan of the probe.
      **settings: Arguments of `make_plan` from which the plan was made, without ``budget``.

    Returns:
      A sentence; None if the probe is expected to beat the prior, see `ProbePlan.beats_prior`.
    """
    if plan.beats_prior:
        return None
    share = plan.budget / plan.steps
    larger = (make_plan(plan.run, budget=budget, **settings) for budget in LARGER_BUDGETS if budget > share)
    useful = next((other for other in larger if other.beats_prior), None)
    remedy = f"no budget up to the cost of the run ({plan.steps:,} steps) is expected to do better"
    if useful is not None:
        remedy = f"budget={useful.budget / useful.steps:.2g} is expected to leave {useful.expected_regret:.4f}"
    return (
        f"A probe of {share:.0%} of the run's cost is expected to leave {plan.expected_regret:.4f} of the prior's "
        f"{plan.prior.expected_regret:.4f} nats per token, which is not worth its cost; {remedy}."
    )


def next_trial(plan: ProbePlan, runs: Sequence[ProbeRun]) -> Trial | None:
    """Choose the next run of a probe; None if the probe is complete.

    The probe is complete if the best rate lies between two measured ones, or if the budget does not allow another run.

    Args:
      plan: Plan of the probe.
      runs: Finished runs, in any order.

    Returns:
      The learning rate and the number of steps of the next run, or None.
    """
    # The tolerance is for the rounding of sums of costs.
    remaining = plan.budget * (1 + 1e-9) - plan.spent(runs)
    centre = 0
    if plan.screen_steps is not None:
        # First phase: short runs. It leaves enough for three runs of the second.
        screened = _by_index(plan, runs, plan.screen_steps)
        reserve = MIN_FULL_RUNS * plan.cost_of_trial(plan.probe_steps)
        shift = _grid_shift(plan, plan.probe_steps, plan.screen_steps)
        index = _next_index(screened, shift, width=MIN_SCREENING_RUNS // 2)
        if index is not None and remaining - reserve >= plan.cost_of_trial(plan.screen_steps):
            return _trial(plan, index, plan.screen_steps)
        # The best rate of the screening, transferred to the second phase's number of steps. If every rate diverged, the
        # second phase starts below all of them.
        finite = {index: loss for index, loss in screened.items() if math.isfinite(loss)}
        best = min(finite, key=finite.__getitem__) if finite else min(screened, default=0) - ALL_DIVERGED_JUMP
        centre = best - shift
    # Second phase: runs of full length, from the centre on until the best rate has two neighbours.
    index = _next_index(_by_index(plan, runs, plan.probe_steps), centre, width=0)
    if index is None or remaining < plan.cost_of_trial(plan.probe_steps):
        return None
    return _trial(plan, index, plan.probe_steps)


def scaled_warmup(warmup: int, steps: int, probe_steps: int) -> int:
    """Return the number of warm-up steps of a probe's run: the same share of the run, rounded down.

    Examples:
      >>> scaled_warmup(100, 2000, 28)
      1
    """
    return warmup * probe_steps // steps


def _screen_steps(probe_steps: int) -> int:
    return probe_steps // SCREENING_SHARE


def _count_runs(probe_steps: int) -> tuple[int, int]:
    """Return the numbers of screening runs and of full runs that must fit into the budget."""
    if probe_steps >= MIN_SCREENED_STEPS:
        return MIN_SCREENING_RUNS + 1, 4
    return 0, MIN_FULL_RUNS + (2 if probe_steps >= MIN_MEASURED_STEPS else 1)


def _cost_of_training(probe_steps: int, runs: tuple[int, int], costs: Sequence[float]) -> float:
    return runs[0] * costs[_screen_steps(probe_steps)] + runs[1] * costs[probe_steps]


def _grid_shift(plan: ProbePlan, old_steps: int, new_steps: int) -> int:
    """Return by how many grid steps the best rate changes with the number of steps."""
    change = best_rate_change(plan.probe_run(old_steps), plan.probe_run(new_steps))
    return round(change.mean / math.log(plan.spacing))


def _trial(plan: ProbePlan, index: int, steps: int) -> Trial:
    return Trial(plan.learning_rate * plan.spacing**index, steps)


def _by_index(plan: ProbePlan, runs: Sequence[ProbeRun], steps: int) -> dict[int, float]:
    """Return the losses of the runs of a phase by the index of their rate in the grid."""
    return {
        round(math.log(run.learning_rate / plan.learning_rate) / math.log(plan.spacing)): run.total
        for run in runs
        if run.steps == steps
    }


def _next_index(losses: Mapping[int, float], centre: int, *, width: int) -> int | None:
    """Return the index of the next rate of a phase, or None if its best rate lies between two measured ones.

    Args:
      losses: Loss by index; infinite if the run diverged.
      centre: Index of the middle of the initial grid.
      width: Number of initial rates on either side of it.
    """
    # Rates above one that diverged are not trained: they would diverge too.
    lowest_diverged = min((index for index, loss in losses.items() if math.isinf(loss)), default=math.inf)
    # The initial grid, from the centre outwards: centre, +1, -1, +2, -2, ...
    initial = [centre, *(centre + side * distance for distance in range(1, width + 1) for side in (1, -1))]
    for index in initial:
        if index not in losses and index < lowest_diverged:
            return index
    if min(losses.values()) == math.inf:
        return min(losses) - ALL_DIVERGED_JUMP
    # Extend the grid until the lowest loss has a measured neighbour on both sides.
    best = min(losses, key=losses.__getitem__)
    for index in (best + 1, best - 1):
        if index not in losses and index < lowest_diverged:
            return index
    return None
