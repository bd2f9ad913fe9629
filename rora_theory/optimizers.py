"""Optimizers as users name them, in words, and whose first step each one takes."""

from typing import Literal, get_args

from rora_theory.theory.laws import Optimizer

OptimizerName = Literal["sgd", "momentum", "adam", "adamw"]
"""An optimizer as users name it."""

OPTIMIZER_NAMES: tuple[OptimizerName, ...] = get_args(OptimizerName)

WORDS: dict[str, str] = {"sgd": "SGD", "momentum": "SGD with momentum", "adam": "Adam", "adamw": "AdamW"}
"""As sentences name them."""

FAMILY: dict[OptimizerName, Optimizer] = {"sgd": "sgd", "momentum": "sgd", "adam": "adam", "adamw": "adam"}
"""Whose first step each one takes. Momentum's is SGD's, times a constant where it is Nesterov's. AdamW's is Adam's:
weight decay does nothing to B = 0 and multiplies A by 1 - eta lambda at any rank."""
