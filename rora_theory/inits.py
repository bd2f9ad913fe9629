"""How A starts: iid entries of mean 0, told by variance, kurtosis and characteristic function, and drawn by NumPy.

`rora_theory.random.draws` draws from them on the device, with JAX.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float

from rora_theory.errors import InputError
from rora_theory.scaling import check_integer, check_rank

Init = Literal["normal", "kaiming_uniform", "rademacher", "gaussian"]
"""Name of A's initial distribution; see `entries`."""

INITS: tuple[Init, ...] = get_args(Init)


@dataclass(frozen=True)
class Entries:
    """Distribution of one entry of A.

    Attributes:
      shape: ``"normal"``, ``"uniform"`` or ``"rademacher"``.
      variance: s2 = E[a^2].
      kurtosis: k = E[a^4] / s2^2: 3 normal, 9/5 uniform, 1 Rademacher.
    """

    shape: Literal["normal", "uniform", "rademacher"]
    variance: float
    kurtosis: float

    @property
    def deviation(self) -> float:
        """s = sqrt(s2)."""
        return math.sqrt(self.variance)

    @property
    def is_normal(self) -> bool:
        """Whether the entries are Gaussian, so that (A x, A x') is a Gaussian pair."""
        return self.shape == "normal"

    def characteristic(self, t: Float[np.ndarray, "..."]) -> tuple[np.ndarray, np.ndarray]:
        """phi(t) = E[cos(t a)] and its derivative, elementwise; t in units of 1/a."""
        if self.shape == "normal":
            phi = np.exp(-self.variance * t**2 / 2)
            return phi, -self.variance * t * phi
        if self.shape == "rademacher":
            return np.cos(self.deviation * t), -self.deviation * np.sin(self.deviation * t)
        half = math.sqrt(3 * self.variance)
        y = half * t
        phi = np.sinc(y / np.pi)
        # (cos y - sin y / y) / y cancels at small y: its series is -y/3 + y^3/30 - y^5/840.
        small = np.abs(y) < 0.05
        safe = np.where(small, 1.0, y)
        slope = np.where(small, -y / 3 + y**3 / 30 - y**5 / 840, (np.cos(safe) - np.sin(safe) / safe) / safe)
        return phi, half * slope


def entries(init: Init, *, rank: int, p_in: int) -> Entries:
    """The distribution of A's entries.

    Args:
      init: ``"normal"`` N(0, 1), the paper's assumption; ``"kaiming_uniform"`` U(-1/sqrt(p_in), 1/sqrt(p_in)),
        variance 1/(3 p_in), PEFT's default (``init_lora_weights=True``); ``"rademacher"`` +-1 with equal
        probability; ``"gaussian"`` N(0, 1/rank^2), PEFT's ``init_lora_weights="gaussian"``, the one whose variance
        depends on the rank.
      rank: rows of A, >= 1.
      p_in: columns of A, >= 1.

    Raises:
      InputError: an unknown name, or a size that is no integer of 1 or more.
    """
    check_rank(rank)
    check_integer("p_in", p_in)
    if init == "normal":
        return Entries("normal", 1.0, 3.0)
    if init == "kaiming_uniform":
        return Entries("uniform", 1.0 / (3.0 * p_in), 9.0 / 5.0)
    if init == "rademacher":
        return Entries("rademacher", 1.0, 1.0)
    if init == "gaussian":
        return Entries("normal", 1.0 / rank**2, 3.0)
    raise InputError(f"init is {init!r}; accepted are {', '.join(INITS)}")


def draw(random: np.random.Generator, init: Init, *, rank: int, p_in: int) -> Float[np.ndarray, "rank p_in"]:
    """A of that law, row after row: a generator of one seed gives the same first rows at any rank, up to `Entries`'
    deviation.

    Examples:
      >>> small, large = (draw(np.random.default_rng(0), "gaussian", rank=r, p_in=4) for r in (2, 8))
      >>> bool(np.allclose(small / 4, large[:2], rtol=1e-15))
      True
    """
    law = entries(init, rank=rank, p_in=p_in)
    shape = (rank, p_in)
    if law.shape == "normal":
        return law.deviation * random.standard_normal(shape)
    if law.shape == "uniform":
        return math.sqrt(3 * law.variance) * (2 * random.random(shape) - 1)
    return law.deviation * (2.0 * random.integers(0, 2, shape) - 1)
