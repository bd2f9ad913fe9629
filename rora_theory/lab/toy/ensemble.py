"""Training runs of several seeds at once, each with its own problem and adapter."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from rora_theory.inits import Init
from rora_theory.lab.toy import dynamics
from rora_theory.lab.toy.dynamics import Adapters, Problem, ProblemConfig, Start
from rora_theory.optimizers import OptimizerName


def draw_ensemble(
    config: ProblemConfig,
    *,
    rank: int,
    seeds: Sequence[int],
    seed: int = 0,
    start: Start = "A",
    init: Init = "kaiming_uniform",
) -> tuple[Adapters, Problem]:
    """Sample adapters and problems with a leading axis of seeds.

    The problem of a seed is the same at every rank, and its adapters are nested over ranks.

    Args:
      config: Settings of the problem.
      rank: Rank of the adapters.
      seeds: Seeds of the problems and adapters.
      seed: Seed from which all keys are derived.
      start: Factor with a random initialisation, see `dynamics.draw_adapters`.
      init: Initialisation of A.

    Returns:
      The adapters and the problems.
    """
    # Two keys for each seed, [seeds, 2]: one of the problem and one of the adapters.
    keys = jax.vmap(lambda member: jax.random.split(jax.random.fold_in(jax.random.key(seed), member)))(
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
) -> tuple[dict[str, Float[np.ndarray, "seeds recorded"]], Bool[np.ndarray, "seeds recorded"]]:
    """Train an ensemble and measure it before the first step and after each of ``steps``.

    Args:
      adapters: Initial adapters with a leading axis of seeds.
      problems: Problems with a leading axis of seeds.
      scaling: Scaling factor gamma.
      learning_rate: Learning rate, above 0.
      optimizer: Name of the optimizer.
      steps: Numbers of updates at which to measure, ascending.
      frozen: Factor that is not trained, ``"A"`` or ``"B"``. None trains both.

    Returns:
      The fields of `dynamics.Measures` by name, and a mask of diverged runs. A run that has diverged counts as diverged
      at all later steps.
    """
    measured = dynamics.trajectories(
        adapters, problems, scaling, learning_rate, optimizer=optimizer, steps=steps, frozen=frozen
    )
    values = {name: np.asarray(value, np.float64) for name, value in measured._asdict().items()}
    is_finite = np.all([np.isfinite(value) for value in values.values()], axis=0)
    is_bounded = values["loss_train"] <= dynamics.DIVERGED * values["loss_train"][:, :1]
    # Along the steps, a run stays diverged once it has diverged.
    return values, np.maximum.accumulate(~(is_finite & is_bounded), axis=1)


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
    """Compute the losses of an ensemble after ``steps`` updates at every learning rate.

    Args:
      adapters: Initial adapters with a leading axis of seeds.
      problems: Problems with a leading axis of seeds.
      scaling: Scaling factor gamma.
      rates: Learning rates, above 0.
      optimizer: Name of the optimizer.
      steps: Number of updates.
      frozen: Factor that is not trained, ``"A"`` or ``"B"``. None trains both.

    Returns:
      Training and held-out losses; both are infinite for a run that diverged.
    """
    final = dynamics.final_losses(
        adapters,
        problems,
        scaling,
        jnp.asarray(rates, jnp.float32),
        optimizer=optimizer,
        steps=steps,
        frozen=frozen,
    )
    train, held_out = (np.asarray(losses, np.float64) for losses in final)
    # A loss that is finite but far above its initial value counts as diverged too.
    start_losses = np.asarray(jax.vmap(dynamics.start_loss)(problems), np.float64)[:, None]
    has_diverged = ~(train <= dynamics.DIVERGED * start_losses)
    return np.where(has_diverged, np.inf, train), np.where(has_diverged, np.inf, held_out)
