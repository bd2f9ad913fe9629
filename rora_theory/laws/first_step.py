"""The first adapter step by automatic differentiation: the reference that laws and samplers are tested against.

No closed form is used. A loss of the adapted layer is differentiated with respect to A and B, an optax optimizer takes
its step, and the layer is evaluated.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float


class Increment(NamedTuple):
    """The adapter's increment dM = gamma B A as a function, without forming the matrix.

    Attributes:
      lora_A: Factor A, shape [r, p_in].
      lora_B: Factor B, shape [p_out, r].
      scaling: Scaling factor gamma.
    """

    lora_A: Float[Array, "r p_in"]
    lora_B: Float[Array, "p_out r"]
    scaling: Float[Array, ""] | float

    def __call__(self, x: Float[Array, "*tokens p_in"]) -> Float[Array, "*tokens p_out"]:
        """Apply the increment: w = gamma B A x (Eq. 2)."""
        inner = jnp.einsum("...i,ri->...r", x, self.lora_A)
        return self.scaling * jnp.einsum("...r,or->...o", inner, self.lora_B)

    def inner(self, grad: Float[Array, "p_out p_in"]) -> Float[Array, ""]:
        """Return <G, dM>, the linear loss that has gradient G with respect to the full weight."""
        return self.scaling * jnp.vdot(self.lora_B, jnp.einsum("oi,ri->or", grad, self.lora_A))


def take_first_step(
    loss: Callable[[Increment], Float[Array, ""]],
    lora_A: Float[Array, "r p_in"],
    *,
    p_out: int,
    scaling: Float[Array, ""] | float,
    optimizer: optax.GradientTransformation,
) -> Increment:
    """Take one optimizer step on ``loss`` from B = 0.

    Args:
      loss: Differentiable function of the `Increment`, e.g. ``lambda dm: jnp.vdot(delta, dm(x))`` or
        ``lambda dm: dm.inner(grad)``.
      lora_A: Initial value of A.
      p_out: Number of rows of B.
      scaling: Scaling factor gamma, from `rora_theory.scaling_factor`.
      optimizer: Optax optimizer that updates A and B together, see `rora_theory.optimizers.make_optimizer`.

    Returns:
      The `Increment` after the step. Call it at x' to compute w.
    """
    params = (lora_A, jnp.zeros((p_out, lora_A.shape[0]), lora_A.dtype))
    grads = jax.grad(lambda factors: loss(Increment(factors[0], factors[1], scaling)))(params)
    with jax.numpy_dtype_promotion("standard"):  # optax multiplies floats by its integer step count
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
    lora_A, lora_B = optax.apply_updates(params, updates)
    return Increment(lora_A, lora_B, scaling)
