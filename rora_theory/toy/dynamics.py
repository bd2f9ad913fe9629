r"""Adapters trained for many steps on a controlled problem: teacher and student, a linear layer or a small MLP.

The teacher is the student's frozen base with a low-rank change of every layer, so that an adapter of enough rank can
reach it:

.. math::
    f(x) = W_2 \tanh(W_1 x), \qquad f^*(x) = (W_2 + D_2) \tanh((W_1 + D_1) x) + \text{noise}

and the linear problem is one layer without the tanh. The adapter adds :math:`\gamma B A` to each layer, and the loss is
:math:`L = \frac{1}{2n} \sum_s |f_{adapted}(x_s) - f^*(x_s)|^2`. Inputs have unit variance and share a direction,
:math:`x = \sqrt{\rho}\, m + \sqrt{1-\rho}\, z`, so that two of them overlap by about :math:`\rho`.

The model is written in its change :math:`f_{adapted} - f`, never as the difference of two outputs: the first steps
change an output by parts in a million.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from rora_theory.errors import InputError
from rora_theory.inits import Init
from rora_theory.optimizers import OptimizerName, make_optimizer
from rora_theory.toy import nested
from rora_theory.validation.ranges import Count, NotNegative, check_ranges
from rora_theory.validation.rules import check_steps

Model = Literal["linear", "mlp"]
Start = Literal["A", "B"]
"""The factor that starts random; the other starts at zero."""

MODELS: tuple[Model, ...] = get_args(Model)
STARTS: tuple[Start, ...] = get_args(Start)

DIVERGED = 10.0
"""A run whose training loss comes to this many times its start, or stops being finite, has diverged."""

_SQUARINGS = 12
"""Of the spectral norm's Gram matrix."""

Weights = tuple[Float[Array, "_out _in"], ...]
"""W of each layer."""

Adapters = tuple[dict[str, Array], ...]
"""``{"lora_A": [r, in], "lora_B": [out, r]}`` of each layer."""


@dataclass(frozen=True)
class ProblemSize:
    """Size and law of the problem.

    Raises:
      InputError: a value out of range.
    """

    p_in: Count = 512
    """inputs of the model"""
    hidden: Count = 128
    """hidden units of the mlp"""
    p_out: Count = 32
    """outputs of the model"""
    samples: Count = 8
    """training inputs, all in every step"""
    held_out: Count = 32
    """held-out inputs"""
    overlap: float = 0.0
    """overlap of any two inputs, from 0 to 1"""
    teacher_rank: Count = 4
    """rank of the change to learn, in each layer: at most the least rank, or capacity decides"""
    noise: NotNegative = 0.1
    """standard deviation of the noise on the targets, whose change has root mean square 1 in the linear problem"""

    def __post_init__(self) -> None:
        check_ranges(self, str)
        if not 0 <= self.overlap <= 1:
            raise InputError(f"overlap is {self.overlap!r}; accepted is a number from 0 to 1")

    def check_ranks(self, ranks: Sequence[int]) -> None:
        """Raise `InputError` where the teacher's change is of a higher rank than the least of the adapters'."""
        if self.teacher_rank > min(ranks):
            least = f"at most the least rank, {min(ranks)}, below which capacity decides"
            raise InputError(f"--teacher-rank is {self.teacher_rank}; accepted is {least}")


@dataclass(frozen=True)
class ProblemConfig(ProblemSize):
    """The problem: its size and its model."""

    model: Model = "linear"
    """linear [p_out, p_in], or mlp [p_out, hidden] tanh [hidden, p_in]"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model not in MODELS:
            raise InputError(f"model is {self.model!r}; accepted are {', '.join(MODELS)}")

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """(out, in) of each layer."""
        if self.model == "linear":
            return ((self.p_out, self.p_in),)
        return ((self.hidden, self.p_in), (self.p_out, self.hidden))


class Problem(NamedTuple):
    """One draw of the problem. A pytree.

    Attributes:
      weights: the frozen base, W of each layer.
      x_train, x_held_out: inputs.
      target_train, target_held_out: the change of output to learn, teacher less base.
    """

    weights: Weights
    x_train: Float[Array, "n p_in"]
    x_held_out: Float[Array, "m p_in"]
    target_train: Float[Array, "n p_out"]
    target_held_out: Float[Array, "m p_out"]


class Measures(NamedTuple):
    """What is read after some steps; every field has a leading axis of recorded steps. A pytree.

    Attributes:
      loss_train, loss_held_out: L.
      output_train, output_held_out: root mean square of the change of output, over inputs and outputs.
      delta_frobenius: |gamma B A|_F, over layers together.
      delta_spectral: largest |gamma B A|_2 of a layer.
      inner: root mean square of A x on the training inputs, over ranks and layers.
      grad_A, grad_B: Frobenius norms of the gradients, over layers together.
    """

    loss_train: Float[Array, "*s"]
    loss_held_out: Float[Array, "*s"]
    output_train: Float[Array, "*s"]
    output_held_out: Float[Array, "*s"]
    delta_frobenius: Float[Array, "*s"]
    delta_spectral: Float[Array, "*s"]
    inner: Float[Array, "*s"]
    grad_A: Float[Array, "*s"]
    grad_B: Float[Array, "*s"]


def draw_problem(key: PRNGKeyArray, config: ProblemConfig) -> Problem:
    """Draw the base, the teacher and the inputs; base weights are N(0, 1/in)."""
    inputs, noise, *layers = jax.random.split(key, 2 + len(config.shapes))
    common, own = jax.random.split(inputs)
    total = config.samples + config.held_out
    mean = jax.random.normal(common, (1, config.p_in))
    x = math.sqrt(config.overlap) * mean + math.sqrt(1 - config.overlap) * jax.random.normal(own, (total, config.p_in))
    weights, changes = [], []
    for layer, (out, fan_in) in zip(layers, config.shapes, strict=True):
        base, left, right = jax.random.split(layer, 3)
        weights.append(jax.random.normal(base, (out, fan_in)) / math.sqrt(fan_in))
        # Entries of D x have variance 1 where those of x have.
        rows = jax.random.normal(right, (config.teacher_rank, fan_in)) / math.sqrt(fan_in)
        changes.append(jax.random.normal(left, (out, config.teacher_rank)) @ rows / math.sqrt(config.teacher_rank))
    target = _change(tuple(weights), x, lambda layer, u: u @ changes[layer].T)
    target = target + config.noise * jax.random.normal(noise, target.shape)
    n = config.samples
    return Problem(tuple(weights), x[:n], x[n:], target[:n], target[n:])


def draw_adapters(
    key: PRNGKeyArray, config: ProblemConfig, *, rank: int, start: Start = "A", init: Init = "kaiming_uniform"
) -> Adapters:
    """Adapters before the first step, nested over ranks (`rora_theory.toy.nested`); their change is zero.

    Args:
      key: of the random factor.
      config: gives the layers' shapes.
      rank: r; it may exceed the layers' widths, which the laws do not mind.
      start: ``"A"``: A by the law ``init``, B = 0. ``"B"``: A = 0, B by `nested.draw_b`.
      init: law of A.
    """
    if start not in STARTS:
        raise InputError(f"start is {start!r}; accepted are {', '.join(STARTS)}")
    found = []
    for index, (out, fan_in) in enumerate(config.shapes):
        own = jax.random.fold_in(key, index)
        if start == "A":
            lora_A, lora_B = nested.draw_a(own, init, rank=rank, p_in=fan_in), jnp.zeros((out, rank), jnp.float32)
        else:
            lora_A, lora_B = jnp.zeros((rank, fan_in), jnp.float32), nested.draw_b(own, p_out=out, rank=rank)
        found.append({"lora_A": lora_A, "lora_B": lora_B})
    return tuple(found)


def change(
    adapters: Adapters,
    weights: Weights,
    x: Float[Array, "n p_in"],
    scaling: Float[Array, ""] | float,
) -> Float[Array, "n p_out"]:
    """The change of output that the adapters make, free of cancellation."""

    def delta(layer: int, u: Array) -> Array:
        tensors = adapters[layer]
        return scaling * ((u @ tensors["lora_A"].T) @ tensors["lora_B"].T)

    return _change(weights, x, delta)


def loss(
    adapters: Adapters,
    weights: Weights,
    x: Float[Array, "n p_in"],
    target: Float[Array, "n p_out"],
    scaling: Float[Array, ""] | float,
) -> Float[Array, ""]:
    """L: half the squared error, summed over outputs, averaged over inputs."""
    return jnp.sum((change(adapters, weights, x, scaling) - target) ** 2) / (2 * x.shape[0])


def trajectory(
    adapters: Adapters,
    problem: Problem,
    *,
    scaling: Float[Array, ""] | float,
    learning_rate: Float[Array, ""] | float,
    optimizer: OptimizerName,
    steps: tuple[int, ...],
    frozen: str | None = None,
) -> Measures:
    """Train, and measure before the first step and after each of ``steps``: one scan, for one seed.

    Args:
      adapters: at the start.
      problem: drawn by `draw_problem`.
      scaling: gamma, from `rora_theory.scaling_factor`.
      learning_rate: eta > 0.
      optimizer: see `rora_theory.optimizers.make_optimizer`; full batches.
      steps: numbers of updates, ascending, each 1 or more.
      frozen: ``"A"`` or ``"B"``: the factor that is not trained; None trains both.

    Returns:
      `Measures` with an axis of ``1 + len(steps)``.
    """
    check_steps(steps)
    transformation = make_optimizer(optimizer, learning_rate)
    update = _update(transformation, problem, scaling, frozen)

    def segment(carry: tuple[Adapters, Any], length: Array) -> tuple[tuple[Adapters, Any], Measures]:
        carry = jax.lax.fori_loop(0, length, update, carry)
        return carry, measure_student(carry[0], problem, scaling)

    lengths = jnp.asarray([end - begin for begin, end in itertools.pairwise((0, 0, *steps))], jnp.int32)
    return jax.lax.scan(segment, (adapters, transformation.init(adapters)), lengths)[1]


@partial(jax.jit, static_argnames=("optimizer", "steps", "frozen"))
def trajectories(
    adapters: Adapters,
    problem: Problem,
    scaling: Float[Array, ""] | float,
    learning_rate: Float[Array, ""] | float,
    *,
    optimizer: OptimizerName,
    steps: tuple[int, ...],
    frozen: str | None = None,
) -> Measures:
    """`trajectory` over a leading axis of seeds in ``adapters`` and ``problem``: fields are [seeds, 1 + steps]."""

    def one(params: Adapters, drawn: Problem) -> Measures:
        return trajectory(
            params,
            drawn,
            scaling=scaling,
            learning_rate=learning_rate,
            optimizer=optimizer,
            steps=steps,
            frozen=frozen,
        )

    return jax.vmap(one)(adapters, problem)


def start_loss(problem: Problem) -> Float[Array, ""]:
    """Training loss before the first update, when adapters add nothing."""
    return jnp.sum(problem.target_train**2) / (2 * problem.target_train.shape[0])


@partial(jax.jit, static_argnames=("optimizer", "steps", "frozen"))
def final_losses(
    adapters: Adapters,
    problem: Problem,
    scaling: Float[Array, ""] | float,
    learning_rates: Float[Array, " rates"],
    *,
    optimizer: OptimizerName,
    steps: int,
    frozen: str | None = None,
) -> tuple[Float[Array, "seeds rates"], Float[Array, "seeds rates"]]:
    """Training and held-out loss after ``steps`` updates, over seeds (leading axis of the trees) and rates."""

    def one(params: Adapters, drawn: Problem, rate: Array) -> tuple[Array, Array]:
        transformation = make_optimizer(optimizer, rate)
        update = _update(transformation, drawn, scaling, frozen)
        end = jax.lax.fori_loop(0, steps, update, (params, transformation.init(params)))[0]
        return (
            loss(end, drawn.weights, drawn.x_train, drawn.target_train, scaling),
            loss(end, drawn.weights, drawn.x_held_out, drawn.target_held_out, scaling),
        )

    return jax.vmap(jax.vmap(one, in_axes=(None, None, 0)), in_axes=(0, 0, None))(adapters, problem, learning_rates)


def measure_student(adapters: Adapters, problem: Problem, scaling: Float[Array, ""] | float) -> Measures:
    """`Measures` of one moment, without the axis of steps."""
    grads = jax.grad(loss)(adapters, problem.weights, problem.x_train, problem.target_train, scaling)
    train, held_out = (change(adapters, problem.weights, x, scaling) for x in (problem.x_train, problem.x_held_out))
    inner: list[Array] = []

    def watch(layer: int, u: Array) -> Array:
        tensors = adapters[layer]
        inner.append(u @ tensors["lora_A"].T)
        return scaling * (inner[-1] @ tensors["lora_B"].T)

    _change(problem.weights, problem.x_train, watch)
    products = [t["lora_B"] @ t["lora_A"] for t in adapters]
    return Measures(
        loss_train=jnp.sum((train - problem.target_train) ** 2) / (2 * train.shape[0]),
        loss_held_out=jnp.sum((held_out - problem.target_held_out) ** 2) / (2 * held_out.shape[0]),
        output_train=_rms(train),
        output_held_out=_rms(held_out),
        delta_frobenius=scaling * _norm(products),
        delta_spectral=scaling * jnp.max(jnp.stack([spectral_norm(product) for product in products])),
        inner=jnp.sqrt(sum(jnp.sum(a**2) for a in inner) / sum(a.size for a in inner)),
        grad_A=_norm([g["lora_A"] for g in grads]),
        grad_B=_norm([g["lora_B"] for g in grads]),
    )


def spectral_norm(matrix: Float[Array, "m n"]) -> Float[Array, ""]:
    r"""Largest singular value, from below: the root of :math:`\mathrm{tr}\,K^{p+1} / \mathrm{tr}\,K^p` of the smaller
    Gram matrix K, p = 2^12 by repeated squaring.

    Exact to float32 rounding unless other singular values are within 1/p of the largest; never off by more than
    min(m, n) / (5 p). Products alone: batched LAPACK calls of one program can wait for each other for ever on a CPU's
    thread pool.
    """
    size = jnp.maximum(jnp.max(jnp.abs(matrix)), jnp.finfo(jnp.float32).tiny)
    wide = (matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T) / size  # squares of small changes underflow
    gram = wide @ wide.T

    def square(_: Array, power: Array) -> Array:
        power = power @ power
        return power / jnp.maximum(jnp.trace(power), jnp.finfo(jnp.float32).tiny)

    start = gram / jnp.maximum(jnp.trace(gram), jnp.finfo(jnp.float32).tiny)
    power = jax.lax.fori_loop(0, _SQUARINGS, square, start)
    return size * jnp.sqrt(jnp.sum(power * gram))  # traces are normalised to 1


def _change(weights: tuple[Array, ...], x: Array, delta: Callable[[int, Array], Array]) -> Array:
    """Change of output where layer l adds ``delta(l, its input)``: activations and their changes go side by side."""
    hidden, moved = x, None
    for layer, weight in enumerate(weights):
        now = hidden if moved is None else hidden + moved
        added = delta(layer, now)
        if moved is not None:
            added = added + moved @ weight.T
        if layer == len(weights) - 1:
            return added
        before = hidden @ weight.T
        hidden, moved = jnp.tanh(before), _tanh_difference(before, added)
    raise AssertionError("a model has at least one layer")


def _tanh_difference(a: Array, d: Array) -> Array:
    """tanh(a + d) - tanh(a), for small d as sinh(d) / (cosh(a + d) cosh(a)), which has no cancellation."""
    small = jnp.abs(d) < 1
    kept = jnp.where(small, d, 0.0)
    cosh = jnp.clip(a, -30.0, 30.0)  # beyond, tanh is 1 to float32 and the quotient is 0
    exact = jnp.sinh(kept) / (jnp.cosh(cosh + kept) * jnp.cosh(cosh))
    return jnp.where(small, exact, jnp.tanh(a + d) - jnp.tanh(a))


def _update(
    transformation: optax.GradientTransformation, problem: Problem, scaling: Any, frozen: str | None
) -> Callable[[Any, tuple[Adapters, Any]], tuple[Adapters, Any]]:
    """The body of a loop over full-batch steps; its carry is the adapters and the optimizer's state."""

    def loss_of(adapters: Adapters) -> Array:
        return loss(adapters, problem.weights, problem.x_train, problem.target_train, scaling)

    def update(_: Any, carry: tuple[Adapters, Any]) -> tuple[Adapters, Any]:
        adapters, state = carry
        # Optax leans on type promotion; this package's own code passes under the strict rules too.
        with jax.numpy_dtype_promotion("standard"):
            updates, state = transformation.update(jax.grad(loss_of)(adapters), state, adapters)
            if frozen is not None:
                held = f"lora_{frozen}"
                updates = tuple({**tensors, held: jnp.zeros_like(tensors[held])} for tensors in updates)
            return optax.apply_updates(adapters, updates), state

    return update


def _rms(a: Array) -> Array:
    return jnp.sqrt(jnp.mean(a**2))


def _norm(arrays: Sequence[Array]) -> Array:
    return jnp.sqrt(sum(jnp.sum(a**2) for a in arrays))
