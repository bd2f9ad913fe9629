"""Steps, schedule and batch size of the tuned and of the new run."""

from dataclasses import dataclass

from rora_theory.advice.best_rate import RateRange, Run, transfer_rate
from rora_theory.advice.constants import SCHEDULE_FACTORS
from rora_theory.advice.setting import Setting
from rora_theory.errors import InputError, shown
from rora_theory.optimizers import SCHEDULES, Schedule
from rora_theory.scaling import check_choice, check_integer, check_not_negative


@dataclass(frozen=True)
class RunChange:
    """Numbers of steps, schedules and batch sizes of the tuned and of the new run, and the displacement constant.

    Attributes:
      steps: Number of optimizer steps for which the rate was tuned; None if it is not known.
      to_steps: Number of optimizer steps of the new run; by default the same.
      schedule: Schedule with which the rate was tuned; None if it is not known.
      to_schedule: Schedule of the new run; by default the same.
      batch_size: Number of records per optimizer step with which the rate was tuned; None if it is not known.
      to_batch_size: Number of records per optimizer step of the new run; by default the same.
      displacement_constant: Displacement constant K of the user's own runs; None uses the published one.

    Raises:
      InputError: If a value is out of range, or is given for the new run but not for the tuned one.
    """

    steps: int | None = None
    to_steps: int | None = None
    schedule: Schedule | None = None
    to_schedule: Schedule | None = None
    batch_size: int | None = None
    to_batch_size: int | None = None
    displacement_constant: float | None = None

    def __post_init__(self) -> None:
        # Numbers of NumPy are converted to Python's.
        for name in ("steps", "to_steps", "batch_size", "to_batch_size"):
            value = getattr(self, name)
            if value is not None:
                check_integer(name, value)
                object.__setattr__(self, name, int(value))
        for name in ("schedule", "to_schedule"):
            schedule = getattr(self, name)
            if schedule is not None:
                check_choice(name, schedule, SCHEDULES)
        if self.displacement_constant is not None:
            check_not_negative("displacement_constant", self.displacement_constant)
            object.__setattr__(self, "displacement_constant", float(self.displacement_constant))
        # A new value has no effect without the old one. Without a new value, the setting does not change.
        for name in ("steps", "schedule", "batch_size"):
            old, new = getattr(self, name), getattr(self, f"to_{name}")
            if old is None and new is not None:
                raise InputError(f"{name} must be given together with to_{name}, got to_{name} {shown(new)} alone")
            if new is None:
                object.__setattr__(self, f"to_{name}", old)

    @property
    def given(self) -> dict[str, object]:
        """Names and values of the arguments that were given."""
        return {name: value for name, value in vars(self).items() if value is not None}

    @property
    def changed(self) -> tuple[str, ...]:
        """Names of the properties that differ between the two runs."""
        return tuple(
            name for name in ("steps", "schedule", "batch_size") if getattr(self, name) != getattr(self, f"to_{name}")
        )

    @property
    def has_unmeasured_schedule(self) -> bool:
        """Whether either schedule is one under which no run was measured."""
        return any(
            schedule is not None and schedule not in SCHEDULE_FACTORS for schedule in (self.schedule, self.to_schedule)
        )

    def transfer_rate(self, old: Setting, new: Setting) -> RateRange:
        """Compute the best rate of the new setting in the new run, from that of the old setting in the tuned run.

        Args:
          old: Tuned setting with its learning rate.
          new: New setting; its learning rate is not read.

        Returns:
          The best rate with its range.
        """
        return transfer_rate(
            old.learning_rate,
            Run(old.rank, old.gain, self.steps, self.schedule, self.batch_size),
            Run(new.rank, new.gain, self.to_steps, self.to_schedule, self.to_batch_size),
            displacement_constant=self.displacement_constant,
        )
