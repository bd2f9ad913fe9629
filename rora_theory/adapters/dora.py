r"""DoRA: a weight's direction from LoRA, its row norms trained on their own (Liu et al. 2024).

.. math:: W' = \frac{m}{n} \odot (W + \gamma B A), \qquad n_i = \lVert (W + \gamma B A)_i \rVert_2

with the magnitude m one number an output row. n is held constant in the gradient (their Section 4.3), under
either rule for gamma. The bias is added after, not scaled.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from rora_theory.adapters.widen import widen
from rora_theory.llama import linear
from rora_theory.llama.model import PRODUCT, SMALL

TINY = 1e-30
"""Least norm divided by: a row of zeros stays one instead of turning into NaN."""


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
    r"""The adapted module: :math:`W x + (c - 1) W x_d + c\, \gamma B A x_d + b` with :math:`c = m / n`.

    Without dropout :math:`x_d = x` and this is :math:`c\,(W x + \gamma B A x) + b`, one product with W. With
    dropout it takes two, here and in the backward pass: :math:`x_d` differs from x in a random few elements
    of every row, and no exact product with W is cheaper than a whole one.

    Args:
      x: input.
      dropped: :math:`x_d`, or ``x`` itself (the same object) without dropout.
      weight, bias: of the frozen module.
      scaled_A, B: gamma A and B in float32, cast to the dtype of ``x`` for the products.
      magnitude: m.
      adapted: boolean scalar; False (a layer the adapter leaves alone) makes c one.

    Returns:
      array like the plain module's output, computed in float32 where it is elementwise.
    """
    c = factor(magnitude, checkpoint_name(row_norms(weight, scaled_A, B), SMALL), adapted)
    inner = checkpoint_name(linear(dropped, scaled_A.astype(x.dtype)), PRODUCT)
    update = widen(inner, B.astype(x.dtype))
    base = linear(x, weight)
    c = jnp.broadcast_to(c, base.shape)
    wide_base, wide_update = base.astype(jnp.float32), update.astype(jnp.float32)
    # The gradient of c takes what c multiplies: kept, so that no product with W is made again for it.
    if dropped is x:
        y = c * checkpoint_name(wide_base + wide_update, PRODUCT)
    else:
        again = linear(dropped, weight).astype(jnp.float32)
        y = (wide_base - again) + c * checkpoint_name(again + wide_update, PRODUCT)
    if bias is not None:
        y = y + jnp.broadcast_to(bias, y.shape).astype(jnp.float32)
    return y.astype(x.dtype)


def factor(magnitude: Float[Array, " o"], norm: Float[Array, " o"], adapted: Array) -> Float[Array, " o"]:
    """c = m / n, finite for a row of zeros too; one where ``adapted`` is False."""
    return jnp.where(adapted, magnitude / jnp.maximum(norm, TINY), jnp.ones((), jnp.float32))


def row_norms(weight: Float[Array, "o i"], scaled_A: Float[Array, "r i"], B: Float[Array, "o r"]) -> Float[Array, " o"]:
    r"""Row norms of :math:`V = W + B(\gamma A)`, constant in the gradient, without forming V.

    .. math:: n_i^2 = |W_i|^2 + 2 B_i \cdot (W A^\top)_i + B_i (A A^\top) B_i^\top

    with gamma inside A: it reads W but writes nothing of its size, which is most of what the direct way costs
    on a GPU. The relative error of n is about :math:`\epsilon (|W_i|^2 + |V_i - W_i|^2) / n_i^2`: float32's
    own unless the update cancels the weight almost wholly.

    Args:
      weight: W; its products are made in its dtype.
      scaled_A, B: gamma A and B in float32.

    Returns:
      n in float32, >= 0.
    """
    weight, scaled_A, B = jax.lax.stop_gradient((weight, scaled_A, B))
    # The update as `apply` multiplies it: rounded to the weight's dtype.
    A, wide_A = scaled_A.astype(weight.dtype), scaled_A.astype(weight.dtype).astype(jnp.float32)
    wide_B = B.astype(weight.dtype).astype(jnp.float32)
    highest = jax.lax.Precision.HIGHEST
    own = jnp.sum(jnp.square(weight.astype(jnp.float32)), axis=1)
    crossed = jnp.einsum("oi,ri->or", weight, A, precision=highest, preferred_element_type=jnp.float32)
    gram = jnp.einsum("ri,qi->rq", wide_A, wide_A, precision=highest)
    through = jnp.einsum("oq,rq->or", wide_B, gram, precision=highest)
    return jnp.sqrt(jnp.maximum(own + jnp.sum((2.0 * crossed + through) * wide_B, axis=1), 0.0))
