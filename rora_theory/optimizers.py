"""Optimizers as users name them, in words, and whose first step each one takes."""

import re
from typing import Literal, get_args

from rora_theory.errors import InputError, shown
from rora_theory.theory.laws import Optimizer

OptimizerName = Literal["sgd", "momentum", "adam", "adamw"]
"""An optimizer as users name it."""

OPTIMIZER_NAMES: tuple[OptimizerName, ...] = get_args(OptimizerName)

WORDS: dict[str, str] = {"sgd": "SGD", "momentum": "SGD with momentum", "adam": "Adam", "adamw": "AdamW"}
"""As sentences name them."""

FAMILY: dict[OptimizerName, Optimizer] = {"sgd": "sgd", "momentum": "sgd", "adam": "adam", "adamw": "adam"}
"""Whose first step each one takes. Momentum's is SGD's, times a constant where it is Nesterov's. AdamW's is Adam's:
weight decay does nothing to B = 0 and multiplies A by 1 - eta lambda at any rank."""


def optimizer_named(name: str) -> OptimizerName:
    """The optimizer of a name: its own, or AdamW by one of the names that the Hugging Face Trainer's ``optim`` has.

    Raises:
      InputError: another optimizer, which the advice here does not cover.

    Example:
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
