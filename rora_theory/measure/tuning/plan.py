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
from dataclasses import dataclass
from typing import Any

from rora_theory.advice import measured
from rora_theory.advice.best_rate import RateRange, Run
from rora_theory.advice.best_rate import carry_rate as carry_to
from rora_theory.errors import InputError
from rora_theory.optimizers import Schedule
from rora_theory.scaling import check_integer, check_not_negative, check_positive, check_share

BUDGET = 0.1
"""Default cost of a probe, as a share of the planned run."""

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

MIN_MEASURED_STEPS = int(measured.measured_steps("constant")[0])
"""Fewest steps at which the published runs of a curve measured a best rate; shorter probes were few."""

EARLY_STEPS_EXPONENTS = {"constant": (-1.0, 0.0), "decay": (-0.4, 0.2)}
"""Lowest and highest exponent of the best rate in the number of steps below `MIN_MEASURED_STEPS`, by kind of schedule.

Both ranges are assumptions. At a constant rate the training losses of steps 5 to 14 have minima that differ by powers
of about -1. Under cosine decay the best rates of published probes of 5 and 16 steps in two models give exponents near
the middle of the range, and rates three times apart leave an error of about 0.3.
"""

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

ANCHOR_STEPS, ANCHOR_STRENGTH = 64, 64.0
"""Number of steps and gamma * r of the published best rate from which the default learning rate is carried."""

ALL_DIVERGED_JUMP = 2
"""Number of grid steps by which the grid is extended downwards if every rate diverged."""


@dataclass(frozen=True)
class Trial:
    """Training run that a probe asks for.

    Attributes:
      learning_rate: Peak learning rate.
      steps: Number of optimizer steps, over which the whole schedule extends.
    """

    learning_rate: float
    steps: int

    def __str__(self) -> str:
        """Describe the trial on a progress bar and in messages."""
        return f"lr={self.learning_rate:.3g} steps={self.steps}"


@dataclass(frozen=True)
class ProbeRun:
    """Finished training run of a probe.

    Attributes:
      learning_rate: Peak learning rate.
      steps: Number of optimizer steps that were planned.
      losses: Held-out loss of each record or group of records, summed over its tokens; empty if the run diverged.
      ratios: Ratio of the A-led to the B-led change of each adapted module; empty if unknown.
      diverged_at: Step at which a loss was not finite; None if the run did not diverge.
    """

    learning_rate: float
    steps: int
    losses: tuple[float, ...] = ()
    ratios: tuple[float, ...] = ()
    diverged_at: int | None = None

    @property
    def total(self) -> float:
        """Held-out loss summed over all tokens; infinite if the run diverged."""
        return math.inf if self.diverged_at is not None else math.fsum(self.losses)

    def as_json(self) -> dict[str, Any]:
        """Return the run in JSON types."""
        return {
            "learning_rate": self.learning_rate,
            "steps": self.steps,
            "losses": list(self.losses),
            "ratios": list(self.ratios),
            "diverged_at": self.diverged_at,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "ProbeRun":
        """Return the run from `as_json`; a value of a wrong type raises an error."""
        diverged_at = value["diverged_at"]
        return cls(
            float(value["learning_rate"]),
            int(value["steps"]),
            tuple(float(loss) for loss in value["losses"]),
            tuple(float(ratio) for ratio in value["ratios"]),
            None if diverged_at is None else int(diverged_at),
        )


@dataclass(frozen=True)
class ProbePlan:
    """Plan of a probe. Costs are in training steps of the planned run.

    Attributes:
      steps: Number of optimizer steps of the planned run.
      strength: gamma * r of the planned run and of the probe.
      probe_steps: Number of steps of the runs from which the best rate is fitted.
      screen_steps: Number of steps of the screening runs; None if there is no screening.
      schedule: Learning-rate schedule of the planned run and of the probe.
      learning_rate: Middle of the grid of learning rates, for runs of ``probe_steps`` steps.
      spacing: Ratio of adjacent learning rates.
      budget: Maximum cost of the probe.
      training_costs: Cost of training the first 0, 1, 2, ... steps of a run.
      setup_cost: Cost of what is evaluated once, included in the budget.
      evaluation_cost: Cost of one evaluation of the held-out records.
    """

    steps: int
    strength: float
    probe_steps: int
    screen_steps: int | None
    schedule: Schedule
    learning_rate: float
    spacing: float
    budget: float
    training_costs: tuple[float, ...]
    setup_cost: float
    evaluation_cost: float

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
        return (
            f"The probe {runs}. It costs at most {self.budget:.4g} training steps, {self.budget / self.steps:.1%} of "
            f"the planned {self.steps:,}."
        )

    def _screening_begins(self) -> int:
        """Return the smallest number of planned steps at which a probe of the same share of the cost has screening."""
        training = _cost_of_training(MIN_SCREENED_STEPS, _count_runs(MIN_SCREENED_STEPS), self.training_costs)
        cost = training / (1 - EVALUATION_SHARE) + self.setup_cost
        return max(math.ceil(cost * self.steps / self.budget), MIN_STEPS_RATIO * MIN_SCREENED_STEPS)


def make_plan(
    steps: int,
    strength: float,
    *,
    batch_tokens: float,
    step_tokens: Sequence[float] | None = None,
    held_out_tokens: float,
    setup_tokens: float = 0.0,
    schedule: Schedule = "cosine",
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
      steps: Number of optimizer steps of the planned run.
      strength: gamma * r of the planned run.
      batch_tokens: Mean number of tokens of a training step of the planned run.
      step_tokens: Number of tokens of each of the first `MAX_PROBE_STEPS` steps, on which every run of the probe is
        trained; None is ``batch_tokens`` each. Steps cost as many mean steps as have their tokens, and at least their
        number.
      held_out_tokens: Number of held-out tokens that are available.
      setup_tokens: Number of tokens that are evaluated once per probe, besides the held-out losses.
      schedule: Learning-rate schedule of the planned run.
      learning_rate: Learning rate of the planned run to start the search from; None carries the best rate of published
        runs to this number of steps and gamma * r.
      budget: Maximum cost of the probe as a share of the planned run, above 0 and at most 1.

    Returns:
      The plan.

    Raises:
      InputError: If an argument is out of range, or if the budget is too small for a probe.
    """
    check_integer("steps", steps)
    check_positive("strength", strength)
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
            f"steps must be at least {math.ceil(cost / budget)} for a probe that costs {budget:.0%} of the run, got "
            f"{steps}. Raise budget, or scale a known learning rate with rora_theory.transfer."
        )
    probe_steps, (screening_runs, full_runs) = chosen
    # The rest of the budget pays for the evaluations, of all held-out tokens or fewer.
    cost_per_evaluation = (total - _cost_of_training(*chosen, costs)) / (screening_runs + full_runs)
    evaluation_cost = min(cost_per_evaluation, EVALUATION_COST * held_out_tokens / batch_tokens)
    # Learning rate of the planned run: by default the published best rate, carried to its schedule, G and steps.
    if learning_rate is None:
        start = carry_to(
            measured.ROWS["best_rate"]["best_rate"],
            Run(8, ANCHOR_STRENGTH, schedule=measured.MEASURED_SCHEDULE),
            Run(8, strength, schedule=schedule),
        )
        learning_rate = carry_steps(start.best, ANCHOR_STEPS, steps, schedule).best
    return ProbePlan(
        steps=steps,
        strength=float(strength),
        probe_steps=probe_steps,
        screen_steps=_screen_steps(probe_steps) if screening_runs else None,
        schedule=schedule,
        learning_rate=carry_steps(float(learning_rate), steps, probe_steps, schedule).best,
        spacing=2.0 if probe_steps >= MIN_MEASURED_STEPS else 3.0,
        budget=budget * steps,
        training_costs=costs,
        setup_cost=setup_cost,
        evaluation_cost=evaluation_cost,
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
        # The best rate of the screening, carried to the second phase's number of steps. If every rate diverged, the
        # second phase starts below all of them.
        finite = {index: loss for index, loss in screened.items() if math.isfinite(loss)}
        best = min(finite, key=finite.__getitem__) if finite else min(screened, default=0) - ALL_DIVERGED_JUMP
        centre = best - shift
    # Second phase: runs of full length, from the centre on until the best rate has two neighbours.
    index = _next_index(_by_index(plan, runs, plan.probe_steps), centre, width=0)
    if index is None or remaining < plan.cost_of_trial(plan.probe_steps):
        return None
    return _trial(plan, index, plan.probe_steps)


def carry_steps(learning_rate: float, old_steps: int, new_steps: int, schedule: Schedule = "constant") -> RateRange:
    """Carry a best learning rate to another number of steps at an unchanged gamma * r.

    Args:
      learning_rate: Best learning rate for the old number of steps.
      old_steps: Number of steps for which it is the best.
      new_steps: New number of steps.
      schedule: Schedule of both runs.

    Returns:
      The learning rate and its range, with the schedule's measured exponents; `EARLY_STEPS_EXPONENTS` apply below
      `MIN_MEASURED_STEPS` steps.
    """
    low = best = high = learning_rate
    limit = MIN_MEASURED_STEPS
    early_exponents = EARLY_STEPS_EXPONENTS["constant" if measured.is_constant_rate(schedule) else "decay"]
    # Split the change of the steps where the measured exponents begin.
    for first, last, exponents in (
        (min(old_steps, limit), min(new_steps, limit), early_exponents),
        (max(old_steps, limit), max(new_steps, limit), measured.steps_exponents(schedule)),
    ):
        growth = last / first
        low *= min(growth**exponent for exponent in exponents)
        best *= growth ** (sum(exponents) / 2)
        high *= max(growth**exponent for exponent in exponents)
    return RateRange(low, best, high)


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
    factor = carry_steps(1.0, old_steps, new_steps, plan.schedule).best
    return round(math.log(factor) / math.log(plan.spacing))


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
