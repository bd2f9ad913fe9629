"""Training runs of a probe: what a plan asks for, and what a finished run gave."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


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
      ratios: Ratio of the A part to the B part of each adapted module; empty if unknown.
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
