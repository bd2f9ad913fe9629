"""Result of a probe: the learning rate for the planned run, its range, and the evidence for both."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rora_theory.advice import measured
from rora_theory.advice.best_rate import RateRange
from rora_theory.measure.tuning.curve import EDGE_FACTOR, FittedRate, curve_frame, fit_best_rate
from rora_theory.measure.tuning.plan import MIN_MEASURED_STEPS, ProbePlan, ProbeRun, carry_steps
from rora_theory.optimizers import Schedule

if TYPE_CHECKING:  # they take as long to import as a short command to run
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class ProbeCost:
    """Cost of a probe, in training steps of the planned run.

    Attributes:
      spent: Cost of the probe's runs.
      budget: Maximum that the plan allowed.
      steps: Number of steps of the planned run.
    """

    spent: float
    budget: float
    steps: int

    @property
    def share(self) -> float:
        """Cost of the probe's runs divided by that of the planned run."""
        return self.spent / self.steps

    def sentence(self) -> str:
        """Return a sentence with the cost. A token of an evaluation counts as half a token of training."""
        return (
            f"The probe cost as much as {self.spent:.4g} training steps, {self.share:.1%} of the planned "
            f"{self.steps:,} (limit {self.budget:.4g})."
        )


@dataclass(frozen=True, eq=False)
class Tuning:
    """Learning rate for a planned run, found by a probe.

    Attributes:
      learning_rate: Learning rate for the planned run.
      low: Lowest rate of the range in which the best one is expected.
      high: Highest rate of the range.
      config: Settings of the planned run's adapter: PEFT's ``LoraConfig``, or its entries as a dictionary.
      expected_regret: Cost of such a rate in published runs.
      curve: Frame with a row for each run of the probe: ``learning_rate``, ``steps``, ``held_out_loss``,
        ``stopped_early`` and ``diverged_at``.
      probe: Best rate of the probe itself, before it is carried to the planned run.
      probe_steps: Number of steps of the runs from which that rate was fitted.
      displacement_constant: Constant K measured in the probe, see `rora_theory.laws.displacement`; None if unknown.
      assumptions: Sentences that state what the result assumes.
      cost: Cost of the probe.
    """

    learning_rate: float
    low: float
    high: float
    config: Any
    expected_regret: measured.ProbeRegret
    curve: "pd.DataFrame"
    probe: FittedRate
    probe_steps: int
    displacement_constant: float | None
    assumptions: tuple[str, ...]
    cost: ProbeCost

    def sentence(self) -> str:
        """Return the learning rate with its range, an edge of the grid at which it lies, and the cost of the probe."""
        return (
            f"Train {self.cost.steps:,} steps at learning rate {self.learning_rate:.3g} "
            f"(range {self.low:.2g} to {self.high:.2g}). {_describe_edge(self.probe)}{self.cost.sentence()}"
        )

    def plot(self, axis: "Axes | None" = None) -> "Figure":
        """Plot the held-out losses against the learning rate, with the probe's best rate and the planned run's range.

        A cross at the upper edge marks a rate that diverged. Save the figure with ``tuned.plot().savefig("tune.png")``.

        Args:
          axis: Axes to draw on; None creates a figure.

        Returns:
          The figure.
        """
        import matplotlib.pyplot as plt

        from rora_theory import plots

        # The learning rate and its range for the planned run lie behind the curves of the probe.
        with plt.rc_context(plots.STYLE):
            if axis is None:
                axis = plt.subplots(figsize=(6.4, 3.0), layout="constrained")[1]
            axis.axvspan(self.low, self.high, color=plots.BAND_COLOUR, zorder=0)
            axis.axvline(self.learning_rate, color="black", label=f"for {self.cost.steps:,} steps, with range")
            axis.axvline(
                self.probe.learning_rate,
                color="grey",
                linestyle=plots.DOTTED,
                label=f"best at {self.probe_steps} steps",
            )
        losses = {
            f"{steps} steps": dict(zip(runs["learning_rate"], runs["held_out_loss"], strict=True))
            for steps, runs in self.curve.groupby("steps")
        }
        figure = plots.plot_losses(losses, axis=axis)
        # The band and both rates leave no room for the legend inside.
        with plt.rc_context(plots.STYLE):
            axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1.0))
        return figure


def conclude(
    plan: ProbePlan,
    runs: Sequence[ProbeRun],
    tokens: Sequence[int],
    *,
    config: Any,
    rank: int,
    probe_rank: int,
    remarks: Sequence[str] = (),
) -> Tuning:
    """Fit the best rate of a complete probe and carry it to the planned run.

    Args:
      plan: Plan of the probe.
      runs: Finished runs.
      tokens: Number of tokens of each held-out record.
      config: Settings of the planned run's adapter.
      rank: Rank of the planned run.
      probe_rank: Rank of the probe.
      remarks: Further assumptions.

    Returns:
      The result.

    Raises:
      InputError: If every run diverged.
    """
    # Best rate of the probe's own runs, at its rank and number of steps.
    fitted = fit_best_rate(plan, runs, tokens)
    # The range covers the fit's interval, the exponents in the steps and the measured dependence on the rank.
    rates = carry_fitted(
        RateRange(fitted.low, fitted.learning_rate, fitted.high),
        steps=(plan.probe_steps, plan.steps),
        ranks=(probe_rank, rank),
        schedule=plan.schedule,
    )
    assumptions = (*_assumptions(plan, fitted, rank, probe_rank), *remarks)
    return Tuning(
        learning_rate=rates.best,
        low=rates.low,
        high=rates.high,
        config=config,
        expected_regret=expected_regret(
            same_rank=rank == probe_rank,
            schedule=plan.schedule,
            probe_steps=plan.probe_steps,
            is_edge=bool(fitted.edge),
        ),
        curve=curve_frame(plan, runs, tokens),
        probe=fitted,
        probe_steps=plan.probe_steps,
        displacement_constant=fitted.displacement_constant,
        assumptions=assumptions,
        cost=ProbeCost(plan.spent(runs), plan.budget, plan.steps),
    )


def carry_fitted(fitted: RateRange, *, steps: tuple[int, int], ranks: tuple[int, int], schedule: Schedule) -> RateRange:
    """Carry the best rate of a probe, with its interval, to the planned run at the same gamma * r.

    Args:
      fitted: Best rate of the probe.
      steps: Number of steps of the probe and of the planned run.
      ranks: Rank of the probe and of the planned run.
      schedule: Learning-rate schedule of both.

    Returns:
      The rate, and a range that also covers the exponents in the steps and in the rank.
    """
    by_steps, by_rank = carry_steps(1.0, *steps, schedule), rank_factors(*ranks, schedule)
    return RateRange(
        fitted.low * by_steps.low * by_rank.low,
        fitted.best * by_steps.best * by_rank.best,
        fitted.high * by_steps.high * by_rank.high,
    )


def rank_factors(old_rank: int, new_rank: int, schedule: Schedule = "constant") -> RateRange:
    """Return the factor of the best rate at another rank and the same gamma * r.

    The law keeps the rate. The range covers the 95% intervals of the exponents in the rank that were measured from
    rank 8 to 128, and includes 1.

    Args:
      old_rank: Rank at which the rate was tuned.
      new_rank: New rank.
      schedule: Learning-rate schedule; with a decay, the exponents of both schedules that were measured apply.
    """
    exponents = [end for row in measured.rank_exponents(schedule) for end in (row.low, row.high)]
    factors = [(new_rank / old_rank) ** exponent for exponent in exponents]
    return RateRange(min(1.0, *factors), 1.0, max(1.0, *factors))


def expected_regret(
    *, same_rank: bool, schedule: Schedule, probe_steps: int, is_edge: bool = False
) -> measured.ProbeRegret:
    """Return the regret that the rates of published probes had.

    It is the largest of those that apply: few short probes were run, and few whose best rate lay at an end.

    Args:
      same_rank: Whether the probe has the rank of the planned run.
      schedule: Learning-rate schedule; the probes under cosine decay stand for a linear decay too.
      probe_steps: Number of steps of the probe's runs. Probes of less than `MIN_MEASURED_STEPS` have an entry.
      is_edge: Whether the best rate lies at an end of the probe's rates. Such probes have an entry too.
    """
    applying: list[measured.Probes] = ["same_rank" if same_rank else "other_rank"]
    if probe_steps < MIN_MEASURED_STEPS:
        applying.append("short")
    if is_edge:
        applying.append("at_edge")
    return max((measured.probe_regret(probes, schedule) for probes in applying), key=lambda cost: cost.largest)


def _assumptions(plan: ProbePlan, fitted: FittedRate, rank: int, probe_rank: int) -> list[str]:
    # Assumptions of every probe, with the scope in which they were measured.
    low, high = measured.steps_exponents(plan.schedule)
    scopes = [_scope("constant", "at a constant rate")]
    if not measured.is_constant_rate(plan.schedule):
        scopes.append(_scope("cosine", "under cosine decay, with one seed"))
    sentences = [
        f"From {plan.probe_steps} to {plan.steps:,} steps the best rate is assumed to change as the number of steps to "
        f"the power of {low:g} to {high:g}, which was measured in SmolLM2-135M with batches of 4: "
        f"{' and '.join(scopes)}.",
        f"The {plan.schedule} schedule, the batches and the optimizer of the planned run are those of the probe, with "
        "the schedule scaled to its number of steps. After another batch size, model or data set, run another probe.",
        "The probe has one seed. The range includes the spread between seeds of the published runs.",
    ]
    # Assumptions that hold for some probes only.
    if rank != probe_rank:
        by_rank = rank_factors(probe_rank, rank, plan.schedule)
        exponents = measured.rank_exponents(plan.schedule)
        sources = ", ".join(f"{row.model} ({row.schedule} schedule)" for row in exponents)
        sentences.append(
            f"The probe has rank {probe_rank} at the same gamma * r = {plan.strength:g}, at which the law does not "
            f"change the best rate. The range allows for {by_rank.low:.1f} to {by_rank.high:.1f} times the rate, which "
            f"covers the intervals that the best rates at ranks 8 and 128 give in {sources}."
        )
    if plan.probe_steps < MIN_MEASURED_STEPS:
        sentences.append(
            f"The budget allowed runs of {plan.probe_steps} steps only. Below {MIN_MEASURED_STEPS} steps few best "
            "rates were measured, so that the range is wide. A larger budget narrows it."
        )
    if fitted.edge:
        sentences.append(f"{_describe_edge(fitted)}The range is extended by a factor of {EDGE_FACTOR:g}.")
    return sentences


def _scope(schedule: Schedule, description: str) -> str:
    """Return the numbers of steps of the published runs under a schedule, with its description."""
    low, high = measured.measured_steps(schedule)
    return f"{low:,} to {high:,} steps {description}"


def _describe_edge(fitted: FittedRate) -> str:
    """Return a sentence and a space if the best rate lies at an end of the grid, else an empty string."""
    if not fitted.edge:
        return ""
    side = {"low": "lower", "high": "higher"}[fitted.edge]
    return (
        f"The best rate lies at the {fitted.edge} end of the probe's grid and may be {side}: repeat the probe with a "
        f"{side} learning_rate, or raise budget. "
    )
