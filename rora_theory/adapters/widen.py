r"""The product with an adapter's second matrix, whose gradient is formed the cheap way round."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rora_theory.llama import linear


@jax.custom_vjp
def widen(inner: Float[Array, "*b r"], B: Float[Array, "o r"]) -> Float[Array, "*b o"]:
    r""":math:`h B^\top`, as `rora_theory.llama.linear` computes it.

    The gradient in B is taken as :math:`(h^\top \bar y)^\top` and not as :math:`\bar y^\top h`, which is what automatic
    differentiation writes: the same sums, but XLA on a CPU copies the left operand of such a product into transposed
    order first, and that is the wide :math:`\bar y`.
    """
    return linear(inner, B)


def _forward(inner: Array, B: Array) -> tuple[Array, tuple[Array, Array]]:
    return linear(inner, B), (inner, B)


def _backward(kept: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    inner, B = kept
    g = cotangent.astype(B.dtype)
    d_inner = jnp.einsum("...o,or->...r", g, B).astype(inner.dtype)
    d_B = jnp.einsum("...r,...o->ro", inner.astype(B.dtype), g).T
    return d_inner, d_B


widen.defvjp(_forward, _backward)
