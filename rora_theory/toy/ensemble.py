"""Runs of the controlled problem over several seeds at once, each with a problem and an adapter of its own."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from rora_theory.inits import Init
from rora_theory.optimizers import OptimizerName
from rora_theory.toy import dynamics
from rora_theory.toy.dynamics import Adapters, Problem, ProblemConfig, Start


def draw_ensemble(
    config: ProblemConfig,
    *,
    rank: int,
    seeds: Sequence[int],
    seed: int = 0,
    start: Start = "A",
    init: Init = "kaiming_uniform",
) -> tuple[Adapters, Problem]:
    """Adapters and problems with a leading axis of seeds; those of one seed are the same, or nested, at every rank.

    Args:
      config: of the problem.
      rank: of the adapters.
      seeds: of the problems and adapters.
      seed: of all draws.
      start, init: see `dynamics.draw_adapters`.
    """
    keys = jax.vmap(lambda s: jax.random.split(jax.random.fold_in(jax.random.key(seed), s)))(
        np.asarray(seeds, np.uint32)
    )
    problems = jax.vmap(lambda key: dynamics.draw_problem(key, config))(keys[:, 0])
    adapters = jax.vmap(lambda key: dynamics.draw_adapters(key, config, rank=rank, start=start, init=init))(keys[:, 1])
    return adapters, problems


def ensemble_trajectories(
    adapters: Adapters,
    problems: Problem,
    *,
    scaling: float,
    learning_rate: float,
    optimizer: OptimizerName,
    steps: tuple[int, ...],
    frozen: str | None = None,
) -> tuple[dict[str, Float[np.ndarray, "seeds moments"]], Bool[np.ndarray, "seeds moments"]]:
    """`dynamics.Measures` by name, before the first step and after each of ``steps``, and where a run has diverged.

    Once diverged, a run stays so: what it does later means nothing.
    """
    measured = dynamics.trajectories(
        adapters, problems, scaling, learning_rate, optimizer=optimizer, steps=steps, frozen=frozen
    )
    values = {name: np.asarray(value, np.float64) for name, value in measured._asdict().items()}
    finite = np.all([np.isfinite(value) for value in values.values()], axis=0)
    bounded = values["loss_train"] <= dynamics.DIVERGED * values["loss_train"][:, :1]
    return values, np.maximum.accumulate(~(finite & bounded), axis=1)


def losses_at_rates(
    adapters: Adapters,
    problems: Problem,
    *,
    scaling: float,
    rates: Sequence[float] | Float[np.ndarray, " rates"],
    optimizer: OptimizerName,
    steps: int,
    frozen: str | None = None,
) -> tuple[Float[np.ndarray, "seeds rates"], Float[np.ndarray, "seeds rates"]]:
    """Training and held-out loss after ``steps`` updates at every rate; both infinite where the run diverged."""
    found = dynamics.final_losses(
        adapters,
        problems,
        scaling,
        jnp.asarray(rates, jnp.float32),
        optimizer=optimizer,
        steps=steps,
        frozen=frozen,
    )
    train, held_out = (np.asarray(part, np.float64) for part in found)
    # A loss that is finite and far above its start is no point of a curve either.
    start = np.asarray(jax.vmap(dynamics.start_loss)(problems), np.float64)[:, None]
    gone = ~(train <= dynamics.DIVERGED * start)
    return np.where(gone, np.inf, train), np.where(gone, np.inf, held_out)
