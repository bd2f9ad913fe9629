r"""DoRA: LoRA updates the direction of a weight's rows, and their norms are trained separately (Liu et al. 2024).

.. math:: W' = \frac{m}{n} \odot (W + \gamma B A), \qquad n_i = \lVert (W + \gamma B A)_i \rVert_2

The magnitude m has one number per output row. The norm n is a constant of the gradient (their Section 4.3), with any
scaling rule. The bias is added afterwards and not scaled.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from rora_theory.lab.adapters.widen import widen
from rora_theory.lab.llama import linear
from rora_theory.lab.llama.model import ALWAYS_SAVED, SAVED_PRODUCT

TINY = 1e-30
"""Smallest divisor of the magnitude, so that a row of zeros gives zeros instead of NaN."""


def apply(
    x: Float[Array, "*b i"],
    dropped: Float[Array, "*b i"],
    weight: Float[Array, "o i"],
    bias: Float[Array, " o"] | None,
    scaled_A: Float[Array, "r i"],
    B: Float[Array, "o r"],
    magnitude: Float[Array, " o"],
    adapted: Array,
) -> Float[Array, "*b o"]:
    r"""Apply a module adapted by DoRA.

    The output is :math:`W x + (c - 1) W x_d + c\, \gamma B A x_d + b` with :math:`c = m / n`. Without dropout,
    :math:`x_d = x` and it is :math:`c\,(W x + \gamma B A x) + b`, which takes one product with W. With dropout it takes
    two, in the forward and in the backward pass, because :math:`x_d` differs from x in random elements of every row.

    Args:
      dropped: Inputs after dropout, :math:`x_d`; without dropout, the same object as ``x``.
      weight: Frozen weight W.
      bias: Frozen bias, or None.
      scaled_A: Scaled lora_A, gamma A, in float32; cast to the dtype of ``x`` for the products.
      B: Matrix lora_B in float32; cast to the dtype of ``x`` for the products.
      magnitude: Trained row norms m.
      adapted: Boolean scalar, False in a layer that is not adapted, where c is 1.

    Returns:
      Outputs of the adapted module. Elementwise operations are computed in float32.
    """
    # Ratio of the trained to the present row norms.
    c = factor(magnitude, checkpoint_name(row_norms(weight, scaled_A, B), ALWAYS_SAVED), adapted)
    # Low-rank update of the inputs after dropout, through the rank.
    inner = checkpoint_name(linear(dropped, scaled_A.astype(x.dtype)), SAVED_PRODUCT)
    update = widen(inner, B.astype(x.dtype))
    base = linear(x, weight)
    c = jnp.broadcast_to(c, base.shape)
    wide_base, wide_update = base.astype(jnp.float32), update.astype(jnp.float32)
    # The gradient of c needs the term that c multiplies: save it, so that no product with W is computed again.
    if dropped is x:
        y = c * checkpoint_name(wide_base + wide_update, SAVED_PRODUCT)
    else:
        dropped_base = linear(dropped, weight).astype(jnp.float32)
        y = (wide_base - dropped_base) + c * checkpoint_name(dropped_base + wide_update, SAVED_PRODUCT)
    if bias is not None:
        y = y + jnp.broadcast_to(bias, y.shape).astype(jnp.float32)
    return y.astype(x.dtype)


def factor(magnitude: Float[Array, " o"], norm: Float[Array, " o"], adapted: Array) -> Float[Array, " o"]:
    """Compute c = m / n, which is finite for a row of zeros, and 1 if ``adapted`` is False."""
    return jnp.where(adapted, magnitude / jnp.maximum(norm, TINY), jnp.ones((), jnp.float32))


def row_norms(weight: Float[Array, "o i"], scaled_A: Float[Array, "r i"], B: Float[Array, "o r"]) -> Float[Array, " o"]:
    r"""Compute the row norms of :math:`V = W + B(\gamma A)` without forming V. They are constants of the gradient.

    .. math:: n_i^2 = |W_i|^2 + 2 B_i \cdot (W A^\top)_i + B_i (A A^\top) B_i^\top

    with gamma inside A. This reads W but writes no array of its size, which would be most of the cost of the direct
    formula on a GPU. The relative error of n is about :math:`\epsilon (|W_i|^2 + |V_i - W_i|^2) / n_i^2`, which is
    float32's own unless the update almost cancels the weight.

    Args:
      weight: Frozen weight W; its products are computed in its dtype.
      scaled_A: Scaled lora_A, gamma A, in float32.
      B: Matrix lora_B in float32.

    Returns:
      Row norms n in float32, at least 0.
    """
    weight, scaled_A, B = jax.lax.stop_gradient((weight, scaled_A, B))
    # Use the update as `apply` does: rounded to the weight's dtype.
    A, wide_A = scaled_A.astype(weight.dtype), scaled_A.astype(weight.dtype).astype(jnp.float32)
    wide_B = B.astype(weight.dtype).astype(jnp.float32)
    highest = jax.lax.Precision.HIGHEST
    # |W_i|^2.
    weight_squares = jnp.sum(jnp.square(weight.astype(jnp.float32)), axis=1)
    # W A^T, the only product with W.
    cross = jnp.einsum("oi,ri->or", weight, A, precision=highest, preferred_element_type=jnp.float32)
    # B (A A^T), through the Gram matrix of A's rows.
    gram = jnp.einsum("ri,qi->rq", wide_A, wide_A, precision=highest)
    B_gram = jnp.einsum("oq,rq->or", wide_B, gram, precision=highest)
    # Rounding may make the sum slightly negative.
    return jnp.sqrt(jnp.maximum(weight_squares + jnp.sum((2.0 * cross + B_gram) * wide_B, axis=1), 0.0))
