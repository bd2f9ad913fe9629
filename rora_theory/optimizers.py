"""Names of optimizers and schedules, the first step that each optimizer takes, and their optax implementations."""

import re
from typing import TYPE_CHECKING, Any, Literal, get_args

from rora_theory.errors import InputError, shown
from rora_theory.scaling import check_choice

if TYPE_CHECKING:  # the names do not need JAX
    import optax
    from jaxtyping import Array, Float

OptimizerName = Literal["sgd", "momentum", "adam", "adamw"]
"""Name of an optimizer."""

OPTIMIZER_NAMES: tuple[OptimizerName, ...] = get_args(OptimizerName)

Optimizer = Literal["sgd", "adam"]
"""Optimizer of the first step: ``"sgd"`` moves B by eta times the gradient, ``"adam"`` by its smoothed sign."""

OPTIMIZERS: tuple[Optimizer, ...] = get_args(Optimizer)

Schedule = Literal["constant", "linear", "cosine"]
"""Shape of the learning rate after the warm-up: constant, or linear or cosine decay to 0."""

SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)

DISPLAY_NAMES: dict[str, str] = {"sgd": "SGD", "momentum": "SGD with momentum", "adam": "Adam", "adamw": "AdamW"}
"""Names of optimizers in text."""

FAMILY: dict[OptimizerName, Optimizer] = {"sgd": "sgd", "momentum": "sgd", "adam": "adam", "adamw": "adam"}
"""Optimizer whose first step each one takes.

Momentum takes the step of SGD, times a constant for Nesterov momentum. AdamW takes the step of Adam: weight decay has
no effect on B = 0 and multiplies A by 1 - eta lambda at any rank.
"""

MOMENTUM = 0.9
EPSILON = 1e-8
WEIGHT_DECAY = 0.01
"""Defaults of PyTorch, as are Adam's betas of 0.9 and 0.999."""


def scaling_power(optimizer: Optimizer) -> int:
    """Return the power of gamma in the first update: 2 for SGD (gradient and forward pass), 1 for Adam (forward pass).

    Raises:
      InputError: The optimizer is unknown.
    """
    check_choice("optimizer", optimizer, OPTIMIZERS)
    return 2 if optimizer == "sgd" else 1


def parse_optimizer(name: str) -> OptimizerName:
    """Parse an optimizer's name; all AdamW names of the Hugging Face Trainer's ``optim`` are accepted.

    Raises:
      InputError: The advice does not cover the optimizer.

    Examples:
      >>> [parse_optimizer(name) for name in ("sgd", "AdamW", "adamw_torch_fused", "paged_adamw_8bit")]
      ['sgd', 'adamw', 'adamw', 'adamw']
    """
    lowercase = name.lower() if isinstance(name, str) else name
    if lowercase in OPTIMIZER_NAMES:
        return lowercase
    if isinstance(lowercase, str) and re.fullmatch(r"(paged_)?adamw(_\w+)?", lowercase):
        return "adamw"
    raise InputError(
        f"optimizer must be one of {', '.join(OPTIMIZER_NAMES)} or a Trainer's name of AdamW such as adamw_bnb_8bit, "
        f"got {shown(name)}. For Lion and signSGD, adam describes the first step alone; no other is covered."
    )


def make_optimizer(
    name: OptimizerName, learning_rate: "Float[Array, ''] | float", *, epsilon: float = EPSILON
) -> "optax.GradientTransformation":
    """Return optax's SGD, SGD with momentum 0.9, Adam, or AdamW with decoupled weight decay 0.01.

    Args:
      name: Name of the optimizer.
      learning_rate: Learning rate, which may be traced.
      epsilon: Epsilon of Adam and AdamW. At 0 their first step is the sign of the gradient, which is 0 for a gradient
        of 0.

    Raises:
      InputError: The name is unknown.
    """
    import optax

    eps = max(epsilon, 1e-30)  # avoid 0 / 0 for a gradient of 0
    if name == "sgd":
        return optax.sgd(learning_rate)
    if name == "momentum":
        return optax.sgd(learning_rate, momentum=MOMENTUM)
    if name == "adam":
        return optax.adam(learning_rate, eps=eps)
    if name == "adamw":
        return optax.adamw(learning_rate, eps=eps, weight_decay=WEIGHT_DECAY)
    raise InputError(f"optimizer must be one of {', '.join(OPTIMIZER_NAMES)}, got {shown(name)}")


def schedule_factor(schedule: Schedule, step: Any, *, steps: int, warmup: int = 0) -> Any:
    r"""Compute the learning rate of an update divided by the peak.

    The rate rises linearly from 0 during the warm-up. Then it is constant, or decays to 0 one step after the last,
    linearly or as :math:`(1 + \cos(\pi u)) / 2`, with the completed share u of the decay. These are the schedules of
    transformers and, with a warm-up, of optax.

    Args:
      schedule: Shape after the warm-up.
      step: Index of the update, from 0: an integer, an array of them, or a JAX array, which may be traced.
      steps: Number of updates of the whole run.
      warmup: Number of warm-up steps.

    Returns:
      The factor, of the shape of ``step``.

    Raises:
      InputError: The schedule is unknown.

    Examples:
      >>> import numpy as np
      >>> schedule_factor("cosine", np.arange(4), steps=4).round(2).tolist()
      [1.0, 0.85, 0.5, 0.15]
    """
    check_choice("schedule", schedule, SCHEDULES)
    import numpy as np

    xp: Any = np
    if not isinstance(step, (int, np.integer, np.ndarray)):  # only a step that JAX compiles needs JAX
        import jax.numpy as xp
    progress = xp.clip((step - warmup) / max(1, steps - warmup), 0.0, 1.0)
    shapes = {"constant": 1.0, "linear": 1.0 - progress, "cosine": (1.0 + xp.cos(np.pi * progress)) / 2}
    return xp.where(step < warmup, step / max(1, warmup), shapes[schedule])
