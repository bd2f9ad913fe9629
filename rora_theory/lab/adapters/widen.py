"""Product with an adapter's second matrix, with a gradient that avoids a large copy."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rora_theory.lab.llama import linear


@jax.custom_vjp
def widen(inner: Float[Array, "*b r"], B: Float[Array, "o r"]) -> Float[Array, "*b o"]:
    r"""Compute :math:`h B^\top` as `rora_theory.lab.llama.linear` does.

    The gradient in B is computed as :math:`(h^\top \bar y)^\top` and not as :math:`\bar y^\top h`, which automatic
    differentiation would use. The sums are the same, but XLA on a CPU first transposes the left operand of such a
    product, and :math:`\bar y` is the wide one.
    """
    return linear(inner, B)


def _forward(inner: Array, B: Array) -> tuple[Array, tuple[Array, Array]]:
    return linear(inner, B), (inner, B)


def _backward(residuals: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    inner, B = residuals
    cotangent = cotangent.astype(B.dtype)
    d_inner = jnp.einsum("...o,or->...r", cotangent, B).astype(inner.dtype)
    d_B = jnp.einsum("...r,...o->ro", inner.astype(B.dtype), cotangent).T
    return d_inner, d_B


widen.defvjp(_forward, _backward)
