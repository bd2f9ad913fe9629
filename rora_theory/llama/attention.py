"""Grouped-query attention by `jax.nn.dot_product_attention`: cuDNN's fused kernel where it fits, else XLA."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rora_theory.errors import InputError

ROUTES = ("auto", "xla", "cudnn")


def choose_route(route: str, dtype: jnp.dtype, head_dim: int) -> Literal["xla", "cudnn"]:
    """The implementation to use.

    ``"auto"`` is cuDNN on an NVIDIA GPU of compute capability 8 or more, in bfloat16 or
    float16, where ``head_dim`` is a multiple of 8 up to 128; XLA everywhere else.

    Raises:
      InputError: an unknown route.
    """
    if route not in ROUTES:
        raise InputError(f"attention is {route!r}; accepted are {', '.join(ROUTES)}")
    if route != "auto":
        return "cudnn" if route == "cudnn" else "xla"
    fits = dtype in (jnp.bfloat16, jnp.float16) and head_dim % 8 == 0 and head_dim <= 128
    return "cudnn" if fits and _has_fused_kernel() else "xla"


def _has_fused_kernel() -> bool:
    if jax.default_backend() != "gpu":
        return False
    capability = getattr(jax.local_devices()[0], "compute_capability", None)  # absent on AMD
    return isinstance(capability, str) and float(capability) >= 8.0


def attend(
    q: Float[Array, "b s n d"],
    k: Float[Array, "b t k d"],
    v: Float[Array, "b t k d"],
    mask: Bool[Array, "#b 1 s t"] | None,
    *,
    route: Literal["xla", "cudnn"],
) -> Float[Array, "b s n d"]:
    r""":math:`\mathrm{softmax}(q k^\top / \sqrt d)\, v` for each head, softmax in float32.

    Args:
      q: queries; head n reads key/value head ``n // (n_heads / kv_heads)``.
      k, v: keys and values.
      mask: True where a query may attend to a key; None is causal, with s = t. A row of False alone gives a
        finite value that means nothing.
      route: implementation.
    """
    if route == "xla":
        # In float32 throughout: XLA's route differentiates a bfloat16 product into one of mixed dtypes.
        dtype = q.dtype
        q, k, v = q.astype(jnp.float32), k.astype(jnp.float32), v.astype(jnp.float32)
        out = jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=mask is None, implementation="xla")
        return out.astype(dtype)
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=mask is None, implementation="cudnn")
