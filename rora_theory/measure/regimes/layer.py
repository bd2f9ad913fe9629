"""Gradient and inputs of one linear module, from which its regime is computed."""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float

Split = Literal["train", "heldout"]
"""Batch of the tokens at which a layer's inputs are sampled: the batch of the gradient, or other text."""

SPLITS: tuple[Split, ...] = get_args(Split)


@dataclass(frozen=True)
class Layer:
    """Gradient and inputs of one linear module.

    Attributes:
      name: Name of the module, for example ``model.layers.0.self_attn.q_proj``.
      grad: Gradient G = dL/dm of the full weight m.
      inputs: Inputs of the module at sampled tokens, for each of `SPLITS`.
    """

    name: str
    grad: Float[np.ndarray, "p_out p_in"]
    inputs: dict[str, Float[np.ndarray, "tokens p_in"]]
