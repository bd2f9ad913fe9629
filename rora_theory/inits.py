"""Initial distributions of A: iid entries of mean 0 with known variance, kurtosis and characteristic function.

`draw` samples them with NumPy, `rora_theory.laws.random.draws` with JAX on the device.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float

from rora_theory.errors import InputError
from rora_theory.scaling import check_integer

Init = Literal["normal", "kaiming_uniform", "rademacher", "gaussian"]
"""Name of an initial distribution of A, see `entries`."""

INITS: tuple[Init, ...] = get_args(Init)


@dataclass(frozen=True)
class Entries:
    """Distribution of one entry of A.

    Attributes:
      shape: Family of the distribution, ``"normal"``, ``"uniform"`` or ``"rademacher"``.
      variance: Variance, s2 = E[a^2].
      kurtosis: Kurtosis, k = E[a^4] / s2^2: 3 for normal, 9/5 for uniform, 1 for Rademacher entries.
    """

    shape: Literal["normal", "uniform", "rademacher"]
    variance: float
    kurtosis: float

    @property
    def deviation(self) -> float:
        """Standard deviation, s = sqrt(s2)."""
        return math.sqrt(self.variance)

    @property
    def is_normal(self) -> bool:
        """Whether the entries, and therefore A x and A x' together, are Gaussian."""
        return self.shape == "normal"

    def characteristic(self, t: Float[np.ndarray, "..."]) -> tuple[np.ndarray, np.ndarray]:
        """Compute the characteristic function phi(t) = E[cos(t a)] and its derivative, elementwise."""
        if self.shape == "normal":
            phi = np.exp(-self.variance * t**2 / 2)
            return phi, -self.variance * t * phi
        if self.shape == "rademacher":
            return np.cos(self.deviation * t), -self.deviation * np.sin(self.deviation * t)
        half = math.sqrt(3 * self.variance)
        y = half * t
        phi = np.sinc(y / np.pi)
        # (cos y - sin y / y) / y cancels at small y: use its series -y/3 + y^3/30 - y^5/840 there.
        small = np.abs(y) < 0.05
        safe = np.where(small, 1.0, y)
        slope = np.where(small, -y / 3 + y**3 / 30 - y**5 / 840, (np.cos(safe) - np.sin(safe) / safe) / safe)
        return phi, half * slope


def entries(init: Init, *, rank: int, p_in: int) -> Entries:
    """Return the distribution of the entries of A.

    Args:
      init: Name of the distribution: ``"normal"`` is N(0, 1), the paper's assumption; ``"kaiming_uniform"`` is
        U(-1/sqrt(p_in), 1/sqrt(p_in)) with variance 1/(3 p_in), PEFT's default (``init_lora_weights=True``);
        ``"rademacher"`` is +-1 with equal probability; ``"gaussian"`` is N(0, 1/rank^2), PEFT's
        ``init_lora_weights="gaussian"``, the only one whose variance depends on the rank.
      rank: Number of rows of A, 1 or more.
      p_in: Number of columns of A, 1 or more.

    Raises:
      InputError: The name is unknown, or a size is not an integer of 1 or more.
    """
    check_integer("rank", rank)
    check_integer("p_in", p_in)
    # Shape, variance and kurtosis of an entry.
    if init == "normal":
        return Entries("normal", 1.0, 3.0)
    # PEFT's default: uniform on [-1/sqrt(p_in), 1/sqrt(p_in)].
    if init == "kaiming_uniform":
        return Entries("uniform", 1.0 / (3.0 * p_in), 9.0 / 5.0)
    if init == "rademacher":
        return Entries("rademacher", 1.0, 1.0)
    # PEFT's gaussian: standard deviation 1/r.
    if init == "gaussian":
        return Entries("normal", 1.0 / rank**2, 3.0)
    raise InputError(f"init must be one of {', '.join(INITS)}, got {init!r}")


def draw(random: np.random.Generator, init: Init, *, rank: int, p_in: int) -> Float[np.ndarray, "rank p_in"]:
    """Draw A row by row, so that a generator of a given seed draws the same first rows at any rank.

    Args:
      random: Generator of random numbers.
      init: Name of the distribution, see `entries`.
      rank: Number of rows of A, 1 or more.
      p_in: Number of columns of A, 1 or more.

    Examples:
      >>> small, large = (draw(np.random.default_rng(0), "gaussian", rank=r, p_in=4) for r in (2, 8))
      >>> bool(np.allclose(small / 4, large[:2], rtol=1e-15))
      True
    """
    distribution = entries(init, rank=rank, p_in=p_in)
    shape = (rank, p_in)
    if distribution.shape == "normal":
        return distribution.deviation * random.standard_normal(shape)
    if distribution.shape == "uniform":
        return math.sqrt(3 * distribution.variance) * (2 * random.random(shape) - 1)
    return distribution.deviation * (2.0 * random.integers(0, 2, shape) - 1)
