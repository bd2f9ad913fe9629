"""The first adapter step by automatic differentiation: the definition that judges laws and samplers.

Nothing here knows a closed form: a loss of the adapted layer is differentiated in A and B, an optax optimizer takes its
step, and the layer is read.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float


class Increment(NamedTuple):
    """The adapter's increment dM = gamma B A as a function, never formed as a matrix.

    Attributes:
      lora_A: [r, p_in].
      lora_B: [p_out, r].
      scaling: gamma.
    """

    lora_A: Float[Array, "r p_in"]
    lora_B: Float[Array, "p_out r"]
    scaling: Float[Array, ""] | float

    def __call__(self, x: Float[Array, "*tokens p_in"]) -> Float[Array, "*tokens p_out"]:
        """w = gamma B A x (Eq. 2)."""
        inner = jnp.einsum("...i,ri->...r", x, self.lora_A)
        return self.scaling * jnp.einsum("...r,or->...o", inner, self.lora_B)

    def inner(self, grad: Float[Array, "p_out p_in"]) -> Float[Array, ""]:
        """<G, dM>: the linear loss whose gradient in the full weight is G."""
        return self.scaling * jnp.vdot(self.lora_B, jnp.einsum("oi,ri->or", grad, self.lora_A))


def run(
    loss: Callable[[Increment], Float[Array, ""]],
    lora_A: Float[Array, "r p_in"],
    *,
    p_out: int,
    scaling: Float[Array, ""] | float,
    optimizer: optax.GradientTransformation,
) -> Increment:
    """The increment after one optimizer step on ``loss`` from B = 0.

    Args:
      loss: a differentiable function of the `Increment`, e.g. ``lambda dm: jnp.vdot(delta, dm(x))`` or
        ``lambda dm: dm.inner(grad)``.
      lora_A: A at the start.
      p_out: rows of B.
      scaling: gamma, from `rora_theory.scaling_factor`.
      optimizer: an optax optimizer, see `rora_theory.optimizers.make_optimizer`; steps A and B together.

    Returns:
      The stepped `Increment`; call it at x' for w.
    """
    params = (lora_A, jnp.zeros((p_out, lora_A.shape[0]), lora_A.dtype))
    grads = jax.grad(lambda pair: loss(Increment(pair[0], pair[1], scaling)))(params)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes floats and its integer step count
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
    lora_A, lora_B = optax.apply_updates(params, updates)
    return Increment(lora_A, lora_B, scaling)
