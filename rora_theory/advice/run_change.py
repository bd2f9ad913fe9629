"""Number of steps and schedule of the tuned and of the new run, and their effect on the best rate."""

import math
from dataclasses import dataclass

from rora_theory.advice.measured import (
    MEASURED_SCHEDULE_FACTORS,
    default_displacement_constants,
    schedule_factors,
    steps_exponents,
)
from rora_theory.errors import InputError, shown
from rora_theory.laws.displacement import RateRange, carry_rate
from rora_theory.optimizers import SCHEDULES, Schedule
from rora_theory.scaling import check_choice, check_integer, check_not_negative


@dataclass(frozen=True)
class RunChange:
    """Numbers of steps and schedules of the tuned and of the new run, and the displacement constant.

    Attributes:
      steps: Number of optimizer steps for which the rate was tuned; None if it is not known.
      to_steps: Number of optimizer steps of the new run; by default the same.
      schedule: Schedule with which the rate was tuned; None if it is not known.
      to_schedule: Schedule of the new run; by default the same.
      displacement_constant: Displacement constant K of the user's own runs; None uses the published range.

    Raises:
      InputError: If a value is out of range, or is given for the new run but not for the tuned one.
    """

    steps: int | None = None
    to_steps: int | None = None
    schedule: Schedule | None = None
    to_schedule: Schedule | None = None
    displacement_constant: float | None = None

    def __post_init__(self) -> None:
        """Validate the settings."""
        # Numbers of NumPy are converted to Python's.
        for name, value in (("steps", self.steps), ("to_steps", self.to_steps)):
            if value is not None:
                check_integer(name, value)
                object.__setattr__(self, name, int(value))
        for name, schedule in (("schedule", self.schedule), ("to_schedule", self.to_schedule)):
            if schedule is not None:
                check_choice(name, schedule, SCHEDULES)
        if self.displacement_constant is not None:
            check_not_negative("displacement_constant", self.displacement_constant)
            object.__setattr__(self, "displacement_constant", float(self.displacement_constant))
        # A new value has no effect without the old one. Without a new value, the setting does not change.
        for name, old, new in (
            ("steps", self.steps, self.to_steps),
            ("schedule", self.schedule, self.to_schedule),
        ):
            if old is None and new is not None:
                raise InputError(f"{name} must be given together with to_{name}, got to_{name} {shown(new)} alone")
            if new is None:
                object.__setattr__(self, f"to_{name}", old)

    @property
    def given(self) -> dict[str, object]:
        """Names and values of the arguments that were given."""
        return {name: value for name, value in vars(self).items() if value is not None}

    @property
    def displacement_constants(self) -> tuple[float, float]:
        """Lowest and highest K: the user's own, or the published ones after either number of steps."""
        if self.displacement_constant is not None:
            return self.displacement_constant, self.displacement_constant
        ranges = [default_displacement_constants(steps) for steps in {self.steps, self.to_steps}]
        return min(low for low, _ in ranges), max(high for _, high in ranges)

    @property
    def steps_exponents(self) -> tuple[float, float]:
        """Lowest and highest exponent of the best rate in the number of steps, under the schedules of both runs."""
        return steps_exponents(self.schedule, self.to_schedule)

    @property
    def changes_steps(self) -> bool:
        """Whether the two numbers of steps differ."""
        return self.steps != self.to_steps

    @property
    def changes_schedule(self) -> bool:
        """Whether the two schedules differ."""
        return self.schedule != self.to_schedule

    @property
    def schedule_factors(self) -> tuple[float, float] | None:
        """Lowest and highest factor of the best rate due to the schedule; None if it was not measured."""
        if self.schedule is None or self.to_schedule is None:
            return 1.0, 1.0
        return schedule_factors(self.schedule, self.to_schedule)

    @property
    def has_unmeasured_schedule(self) -> bool:
        """Whether either schedule is one under which no run was measured."""
        measured = (None, *MEASURED_SCHEDULE_FACTORS)
        return any(schedule not in measured for schedule in (self.schedule, self.to_schedule))

    def carry(self, learning_rate: float, *, old_strength: float, new_strength: float) -> RateRange:
        """Compute the best rate of the new run by the displacement law.

        A schedule that was not measured leaves the rate as it is.

        Args:
          learning_rate: Best rate of the tuned run.
          old_strength: gamma r of the tuned run.
          new_strength: gamma r of the new run.

        Returns:
          The best rate with its range.
        """
        rates = carry_rate(
            learning_rate,
            old_strength=old_strength,
            new_strength=new_strength,
            displacement_constants=self.displacement_constants,
            old_steps=self.steps,
            new_steps=self.to_steps,
            steps_exponents=self.steps_exponents,
        )
        # The factor of the schedule is known up to a range, too. Its best value is the geometric mean of the ends.
        low, high = self.schedule_factors or (1.0, 1.0)
        return RateRange(rates.low * low, rates.best * math.sqrt(low * high), rates.high * high)
