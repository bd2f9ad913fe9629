"""Result of a probe: the learning rate for the planned run, its range, and the evidence for both."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rora_theory.advice.constants import CONSTANTS
from rora_theory.errors import InputError
from rora_theory.measure.tuning.belief import RateBelief
from rora_theory.measure.tuning.curve import CURVE_COLUMNS, compute_displacement_constant, curve_frame
from rora_theory.measure.tuning.plan import ProbePlan
from rora_theory.measure.tuning.posterior import Posterior, update
from rora_theory.measure.tuning.trial import ProbeRun
from rora_theory.runs import frames

if TYPE_CHECKING:  # they take as long to import as a short command to run
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


MAX_SEARCH_WIDTH = 10.0
"""Ratio of the ends of a range above which a search within it costs more than it gains."""


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
      posterior: Belief about the best rate before and after the probe.
      curve: Frame with a row for each run of the probe: ``learning_rate``, ``steps``, ``held_out_loss``,
        ``stopped_early`` and ``diverged_at``.
      probe_steps: Number of steps of the probe's full runs; 0 without a probe.
      displacement_constant: Constant K measured in the probe, see `rora_theory.laws.displacement`; None if unknown.
      assumptions: Sentences that state what the result assumes.
      cost: Cost of the probe.
    """

    learning_rate: float
    low: float
    high: float
    config: Any
    posterior: Posterior
    curve: "pd.DataFrame"
    probe_steps: int
    displacement_constant: float | None
    assumptions: tuple[str, ...]
    cost: ProbeCost

    @property
    def expected_regret(self) -> float:
        """Expected regret of the learning rate in nats per token, for a curve of typical curvature."""
        return self.posterior.belief.expected_regret

    def sentence(self) -> str:
        """Return the learning rate with its range, how the probe changed it, and the cost of the probe."""
        width = self.high / self.low
        range_words = f"90% range {self.low:.2g} to {self.high:.2g}"
        if width > MAX_SEARCH_WIDTH:
            range_words += ", too wide to search"
        rate = (
            f"Train {self.cost.steps:,} steps at learning rate {self.learning_rate:.3g} ({range_words}); its expected "
            f"regret is {self.expected_regret:.4f} nats per token."
        )
        return rate if not self.probe_steps else f"{rate} {self.posterior.sentence()} {self.cost.sentence()}"

    def plot(self, axis: "Axes | None" = None) -> "Figure":
        """Plot the held-out losses against the learning rate, with the planned run's rates before and after the probe.

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
            prior = self.posterior.prior.rates.best
            axis.axvline(prior, color="grey", linestyle=plots.DOTTED, label="before the probe")
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
    remarks: Sequence[str] = (),
) -> Tuning:
    """Update the prior by the full runs of a complete probe.

    Args:
      plan: Plan of the probe.
      runs: Finished runs.
      tokens: Number of tokens of each held-out record.
      config: Settings of the planned run's adapter.
      remarks: Further assumptions.

    Returns:
      The result.

    Raises:
      InputError: If every run diverged, or all gave the same loss.
    """
    full = [run for run in runs if run.steps == plan.probe_steps]
    if not any(math.isfinite(run.total) for run in full):
        rates = [run.learning_rate for run in runs]
        lowest = f", the lowest at {min(rates):.3g}" if rates else ""
        raise InputError(f"every run of the probe diverged{lowest}. Pass a lower learning_rate.")
    # Equal losses of several rates mean that nothing was trained.
    finished = [run.losses for run in full if run.diverged_at is None]
    if len(finished) > 1 and len(set(finished)) == 1:
        raise InputError(
            "the probe must change the held-out loss, got the same loss at every learning rate. Check that the "
            "optimizer uses the rate and that the loss depends on the adapters."
        )
    posterior = update(plan.prior, full, tokens, plan.carry)
    lowest_run = min(full, key=lambda run: run.total)
    return _tuning(
        plan,
        posterior,
        config=config,
        curve=curve_frame(plan, runs, tokens),
        constant=compute_displacement_constant(plan, full, lowest_run.learning_rate),
        assumptions=(*_assumptions(plan), *remarks),
        spent=plan.spent(runs),
    )


def conclude_without_probe(prior: RateBelief, *, steps: int, config: Any, remarks: Sequence[str] = ()) -> Tuning:
    """Return the result of no probe: the prior.

    Args:
      prior: Belief about the planned run's best rate.
      steps: Number of optimizer steps of the planned run.
      config: Settings of the planned run's adapter.
      remarks: Further sentences for the assumptions, such as why there is no probe.
    """
    low, best, high = prior.rates
    return Tuning(
        best, low, high, config, Posterior(prior, prior), frames.from_rows([], CURVE_COLUMNS), 0, None,
        (_PRIOR_SENTENCE, *remarks), ProbeCost(0.0, 0.0, steps),
    )  # fmt: skip


_PRIOR_SENTENCE = (
    "The prior is the best rate of 35 public models (1B to 1T parameters) by size, transferred to this scaling, rank, "
    "batch, number of steps and schedule by the law of the advice."
)


def _tuning(
    plan: ProbePlan,
    posterior: Posterior,
    *,
    config: Any,
    curve: Any,
    constant: float | None,
    assumptions: tuple[str, ...],
    spent: float,
) -> Tuning:
    low, best, high = posterior.belief.rates
    cost = ProbeCost(spent, plan.budget, plan.steps)
    return Tuning(best, low, high, config, posterior, curve, plan.probe_steps, constant, assumptions, cost)


def _assumptions(plan: ProbePlan) -> list[str]:
    power = CONSTANTS["steps_exponent"]
    sentences = [
        _PRIOR_SENTENCE,
        f"From {plan.probe_steps} to {plan.steps:,} steps the best rate is assumed to change as "
        f"steps^{power.value:.2f} (standard deviation of the exponent {power.spread:.2f}; {power.source}).",
        "The probe has one seed. The range includes the spread between seeds of the published runs.",
    ]
    if plan.probe_rank != plan.run.rank:
        power = CONSTANTS["rank_exponent"]
        sentences.append(
            f"The probe has rank {plan.probe_rank} at the same scaling times rank, and its rate is transferred as "
            f"rank^{power.value:.2f}."
        )
    return sentences
