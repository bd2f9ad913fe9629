"""Optimizers as users name them, in words, whose first step each one takes, and the steps themselves, by optax."""

import re
from typing import TYPE_CHECKING, Literal, get_args

from rora_theory.errors import InputError, shown
from rora_theory.theory.laws import Optimizer

if TYPE_CHECKING:  # names and words need no JAX
    import optax
    from jaxtyping import Array, Float

OptimizerName = Literal["sgd", "momentum", "adam", "adamw"]
"""An optimizer as users name it."""

OPTIMIZER_NAMES: tuple[OptimizerName, ...] = get_args(OptimizerName)

WORDS: dict[str, str] = {"sgd": "SGD", "momentum": "SGD with momentum", "adam": "Adam", "adamw": "AdamW"}
"""As sentences name them."""

FAMILY: dict[OptimizerName, Optimizer] = {"sgd": "sgd", "momentum": "sgd", "adam": "adam", "adamw": "adam"}
"""Whose first step each one takes. Momentum's is SGD's, times a constant where it is Nesterov's. AdamW's is Adam's:
weight decay does nothing to B = 0 and multiplies A by 1 - eta lambda at any rank."""

MOMENTUM = 0.9
EPSILON = 1e-8
WEIGHT_DECAY = 0.01
"""PyTorch's defaults; Adam's betas are 0.9 and 0.999."""


def optimizer_named(name: str) -> OptimizerName:
    """The optimizer of a name: its own, or AdamW by one of the names that the Hugging Face Trainer's ``optim`` has.

    Raises:
      InputError: another optimizer, which the advice here does not cover.

    Examples:
      >>> [optimizer_named(name) for name in ("sgd", "AdamW", "adamw_torch_fused", "paged_adamw_8bit")]
      ['sgd', 'adamw', 'adamw', 'adamw']
    """
    word = name.lower() if isinstance(name, str) else name
    if word in OPTIMIZER_NAMES:
        return word
    if isinstance(word, str) and re.fullmatch(r"(paged_)?adamw(_\w+)?", word):
        return "adamw"
    raise InputError(
        f"optimizer is {shown(name)}; accepted are {', '.join(OPTIMIZER_NAMES)}, or a Trainer's name of AdamW such as "
        "adamw_bnb_8bit: Lion and signSGD take Adam's first step, so ask with adam; no other is covered"
    )


def make_optimizer(
    name: OptimizerName, learning_rate: "Float[Array, ''] | float", *, epsilon: float = EPSILON
) -> "optax.GradientTransformation":
    """SGD, SGD with momentum 0.9, Adam, or AdamW with decoupled weight decay 0.01, by optax.

    Args:
      name: of the optimizer.
      learning_rate: eta; it may be traced.
      epsilon: Adam's and AdamW's; at 0 their first step is the sign of the gradient, and 0 where that is 0.

    Raises:
      InputError: an unknown name.
    """
    import optax

    eps = max(epsilon, 1e-30)  # 0 / 0 where no gradient comes
    if name == "sgd":
        return optax.sgd(learning_rate)
    if name == "momentum":
        return optax.sgd(learning_rate, momentum=MOMENTUM)
    if name == "adam":
        return optax.adam(learning_rate, eps=eps)
    if name == "adamw":
        return optax.adamw(learning_rate, eps=eps, weight_decay=WEIGHT_DECAY)
    raise InputError(f"optimizer is {shown(name)}; accepted are {', '.join(OPTIMIZER_NAMES)}")
