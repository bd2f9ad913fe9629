r"""Equations 1-15 of the RoRA paper (Liu et al., arXiv 2501.04315) as printed, one function per equation.

Nothing is corrected here: `theory.laws` has the exact laws, and `paper.verdicts` compares the two. Symbols:
:math:`m_0` [p_out, p_in] is the frozen weight, A has shape [r, p_in] and B [p_out, r], :math:`\gamma` is the scaling,
:math:`\eta` the learning rate, :math:`\delta_i = \partial L / \partial w_i`, and x and x' = x^(t+1) are the inputs
before and after the step. NumPy arrays give NumPy results, and JAX arrays give JAX results.
"""

import math
from typing import Any

from jaxtyping import Float

from rora_theory.scaling import scaling_factor


def _namespace(array: Any) -> Any:
    """Return the array's own library, NumPy or JAX. JAX is thus not imported for NumPy arrays."""
    return array.__array_namespace__()


def eq1_output(
    m0: Float[Any, "p_out p_in"],
    lora_B: Float[Any, "p_out r"],
    lora_A: Float[Any, "r p_in"],
    x: Float[Any, " p_in"],
    scaling: float,
) -> Float[Any, " p_out"]:
    r"""Eq. 1: :math:`\mathcal H(x) = m_0 x + \Delta m\, x = (m_0 + \gamma B A) x`. A definition; no assumptions."""
    return _namespace(m0).einsum("oi,i->o", m0 + scaling * _namespace(lora_B).einsum("or,ri->oi", lora_B, lora_A), x)


def eq2_increment(
    lora_B: Float[Any, "p_out r"], lora_A: Float[Any, "r p_in"], x: Float[Any, " p_in"], scaling: float
) -> Float[Any, " p_out"]:
    r"""Eq. 2: :math:`w_i = \gamma \sum_j \sum_k B_{ik} A_{kj} x_j`. A definition; no assumptions."""
    return scaling * _namespace(lora_B).einsum("ik,kj,j->i", lora_B, lora_A, x)


def gradient_A(
    delta: Float[Any, " p_out"], lora_B: Float[Any, "p_out r"], x: Float[Any, " p_in"], scaling: float
) -> Float[Any, "r p_in"]:
    r"""Above Eq. 3: :math:`\partial L / \partial A_{kj} = \gamma \sum_i \delta_i B_{ik} x_j`; chain rule, one x."""
    return scaling * _namespace(delta).einsum("i,ik,j->kj", delta, lora_B, x)


def gradient_B(
    delta: Float[Any, " p_out"], lora_A: Float[Any, "r p_in"], x: Float[Any, " p_in"], scaling: float
) -> Float[Any, "p_out r"]:
    r"""Above Eq. 3: :math:`\partial L / \partial B_{ik} = \gamma\, \delta_i \sum_j A_{kj} x_j`; chain rule, one x."""
    return scaling * _namespace(delta).einsum("i,kj,j->ik", delta, lora_A, x)


def eq3_first_step_B(
    delta: Float[Any, " p_out"],
    lora_A: Float[Any, "r p_in"],
    x: Float[Any, " p_in"],
    scaling: float,
    learning_rate: float,
) -> Float[Any, "p_out r"]:
    r"""Eq. 3: :math:`B^{(t+1)}_{ik} = -\eta\, \delta_i \gamma \sum_j A_{kj} x^{(t)}_j`.

    Assumes B^(t) = 0, one sample, and plain gradient descent: not Adam, which the paper trains with.
    """
    return -learning_rate * scaling * _namespace(delta).einsum("i,kj,j->ik", delta, lora_A, x)


def eq4_increment(
    delta: Float[Any, " p_out"],
    lora_A: Float[Any, "r p_in"],
    x: Float[Any, " p_in"],
    x_next: Float[Any, " p_in"],
    scaling: float,
    learning_rate: float,
) -> Float[Any, " p_out"]:
    r"""Eq. 4: :math:`w_i = -\eta \delta_i \gamma^2 \sum_j \sum_k \sum_l A_{kl} x^{(t)}_l A_{kj} x^{(t+1)}_j`.

    Assumes Eq. 3, and that A has not moved, which is true at the first step (dL/dA = 0).
    """
    return -learning_rate * scaling**2 * delta * _namespace(lora_A).einsum("kl,l,kj,j->", lora_A, x, lora_A, x_next)


def eq5_variance(second_moment: float, mean: float) -> float:
    r"""Eq. 5: :math:`Var[w] = E[w^2] - (E[w])^2`. An identity."""
    return second_moment - mean**2


def eq6_mean(
    delta: float,
    *,
    rank: int,
    p_in: int,
    scaling: float,
    learning_rate: float,
    mean_A: float = 0.0,
    mean_x: float = 0.0,
) -> float:
    r"""Eq. 6: :math:`E[w_i] = -\eta \delta_i \gamma^2 \sum_{j,k,l} E[A_{kl}] E[x_l] E[A_{kj}] E[x'_j]`.

    Assumes that all four factors are independent in every term. However, A_kl and A_kj are the same variable if l = j,
    and x and x' are independent only for inputs that share nothing.
    """
    return -learning_rate * delta * scaling**2 * p_in**2 * rank * mean_A**2 * mean_x**2


def eq7_variance(second_moment: float) -> float:
    r"""Eq. 7: :math:`Var[w] = E[w^2]`. Assumes Eq. 6's E[w] = 0."""
    return second_moment


def eq8_second_moment(
    delta: float,
    *,
    rank: int,
    p_in: int,
    scaling: float,
    learning_rate: float,
    second_moment_A: float = 1.0,
    second_moment_x: float = 1.0,
) -> float:
    r"""Eq. 8: :math:`E[w^2] = \eta^2 \delta^2 \gamma^4 \sum_{j,k,l} E[A_{kl}^2] E[x_l^2] E[A_{kj}^2] E[x'^2_j]`.

    Counts p_in^2 r equal terms. The square's cross terms (k, l, j) != (k', l', j') are dropped, and
    E[A_kl^2 A_kj^2] is also factorised at l = j.
    """
    return (learning_rate * delta * scaling**2) ** 2 * p_in**2 * rank * second_moment_A**2 * second_moment_x**2


def eq9_variance(delta: float, *, rank: int, p_in: int, scaling: float, learning_rate: float) -> float:
    r"""Eq. 9: :math:`Var[w_i] = E[w_i^2] = \eta^2 \delta_i^2 \gamma^4 r^2 p_{in}`.

    Assumes unit variances and zero means, A, x and x' iid normal and independent, SGD from B = 0.
    """
    return (learning_rate * delta * scaling**2) ** 2 * rank**2 * p_in


def eq10_norm(
    delta: Float[Any, " p_out"],
    lora_A: Float[Any, "r p_in"],
    x: Float[Any, " p_in"],
    x_next: Float[Any, " p_in"],
    scaling: float,
    learning_rate: float,
) -> Float[Any, ""]:
    r"""Eq. 10: :math:`\|w\|_2 = \sqrt{\sum_i (\eta \delta_i \gamma^2 \sum_{j,k,l} A_{kl} x_l A_{kj} x'_j)^2}`."""
    form = _namespace(lora_A).einsum("kl,l,kj,j->", lora_A, x, lora_A, x_next)
    return _namespace(delta).sqrt(_namespace(delta).sum((learning_rate * delta * scaling**2 * form) ** 2))


def eq11_norm(
    delta: Float[Any, " p_out"], *, rank: int, p_in: int, scaling: float, learning_rate: float
) -> Float[Any, ""]:
    r"""Eq. 11: :math:`\|w\|_2 \approx \sqrt{p_{out}\, \eta^2 \gamma^4 r^2 p_{in} \max_i \delta_i^2}`.

    Assumes Eq. 9 and that every output's term equals the largest.
    """
    largest = _namespace(delta).max(delta**2)
    unit_variance = eq9_variance(1.0, rank=rank, p_in=p_in, scaling=scaling, learning_rate=learning_rate)
    return _namespace(delta).sqrt(delta.shape[0] * unit_variance * largest)


def eq12_constant(delta_max: float, *, p_out: int, p_in: int, learning_rate: float) -> float:
    r"""Constant below Eq. 12 as printed: :math:`c = \sqrt{p_{out} p_{in} \eta}\, \delta_m`."""
    return math.sqrt(p_out * p_in * learning_rate) * delta_max


def eq12_norm(constant: float, *, rank: int, scaling: float) -> float:
    r"""Eq. 12: :math:`\|w\|_2 \approx c\, \gamma^2 r`. Assumes Eq. 11."""
    return constant * scaling**2 * rank


def eq13_norm(constant: float, *, rank: int, scaling: float) -> float:
    r"""Eq. 13: :math:`\|w\|_2 \approx c\, \gamma^2 O_r(r)`, with O_r(r) = r, its leading form. Assumes Eq. 12."""
    return constant * scaling**2 * rank


def eq14_lora_norm(constant: float, *, alpha: float, rank: int) -> float:
    r"""Eq. 14: :math:`\|w\|_2 \approx c\, \alpha^2 O_r(1/r)`: Eq. 13 with LoRA's rule; the step vanishes as 1/r."""
    return eq13_norm(constant, rank=rank, scaling=scaling_factor("lora", alpha=alpha, rank=rank))


def eq15_rora_norm(constant: float, *, alpha: float, rank: int) -> float:
    r"""Eq. 15: :math:`\|w\|_2 \approx c\, \alpha^2 O_r(1)`: Eq. 13 with RoRA's rule, independent of r."""
    return eq13_norm(constant, rank=rank, scaling=scaling_factor("rora", alpha=alpha, rank=rank))
