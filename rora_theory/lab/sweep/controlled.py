r"""A teacher-student problem on which adapters are trained for many steps: a linear layer or a small MLP.

The teacher is the student's frozen base with a low-rank change of every layer, so that an adapter of sufficient rank
can represent it:

.. math::
    f(x) = W_2 \tanh(W_1 x), \qquad f^*(x) = (W_2 + D_2) \tanh((W_1 + D_1) x) + \text{noise}

The linear problem is one layer without the tanh. The adapter adds :math:`\gamma B A` to each layer, and the loss is
:math:`L = \frac{1}{2n} \sum_s |f_{adapted}(x_s) - f^*(x_s)|^2`. Inputs have unit variance and share a direction,
:math:`x = \sqrt{\rho}\, m + \sqrt{1-\rho}\, z`, so that two inputs overlap by about :math:`\rho`.

The model computes its change :math:`f_{adapted} - f` directly, not as the difference of two outputs: the first steps
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
from rora_theory.laws.random import nested
from rora_theory.optimizers import OptimizerName, make_optimizer
from rora_theory.scaling import check_between
from rora_theory.validation.ranges import Count, NotNegative, check_ranges
from rora_theory.validation.rules import check_steps

Model = Literal["linear", "mlp"]
"""Architecture of teacher and student."""

MODELS: tuple[Model, ...] = get_args(Model)

Weights = tuple[Float[Array, "_out _in"], ...]
"""Frozen weight W of each layer."""

Adapters = tuple[dict[str, Array], ...]
"""Factors ``{"lora_A": [r, in], "lora_B": [out, r]}`` of each layer."""


@dataclass(frozen=True)
class ProblemConfig:
    """Sizes and distribution of the problem.

    Raises:
      InputError: If a value is out of range.
    """

    p_in: Count = 512
    """Number of inputs of the model"""
    hidden: Count = 128
    """Number of hidden units of the mlp"""
    p_out: Count = 32
    """Number of outputs of the model"""
    samples: Count = 8
    """Number of training inputs, all used in every step"""
    held_out: Count = 32
    """Number of held-out inputs"""
    overlap: float = 0.0
    """Overlap of any two inputs, from 0 to 1"""
    teacher_rank: Count = 4
    """Rank of the teacher's change in each layer, at most the smallest adapter rank"""
    noise: NotNegative = 0.1
    """Standard deviation of the noise on the targets; the linear problem's targets have root mean square 1"""

    def __post_init__(self) -> None:
        check_ranges(self)
        check_between("overlap", self.overlap, 0, 1)

    def shapes(self, model: Model) -> tuple[tuple[int, int], ...]:
        """Return the shape (out, in) of each layer of a model."""
        if model == "linear":
            return ((self.p_out, self.p_in),)
        return ((self.hidden, self.p_in), (self.p_out, self.hidden))

    def check_ranks(self, ranks: Sequence[int]) -> None:
        """Raise `InputError` if the teacher's change has a higher rank than the smallest adapter."""
        if self.teacher_rank > min(ranks):
            raise InputError(
                f"teacher_rank must be at most the smallest rank, {min(ranks)}, so that every adapter can represent "
                f"the teacher; got {self.teacher_rank}"
            )


class Problem(NamedTuple):
    """A sampled problem, as a pytree.

    Attributes:
      weights: Frozen weight W of each layer.
      x_train: Training inputs.
      x_held_out: Held-out inputs.
      target_train: Change of the output to learn on the training inputs: teacher minus base.
      target_held_out: Change of the output to learn on the held-out inputs.
    """

    weights: Weights
    x_train: Float[Array, "n p_in"]
    x_held_out: Float[Array, "m p_in"]
    target_train: Float[Array, "n p_out"]
    target_held_out: Float[Array, "m p_out"]


class Measures(NamedTuple):
    """Measurements during training, as a pytree; every field has a leading axis of recorded steps.

    Attributes:
      loss_train: Loss L on the training inputs.
      loss_held_out: Loss L on the held-out inputs.
      output_train: Root mean square of the change of the output over training inputs and outputs.
      output_held_out: Root mean square of the change of the output over held-out inputs and outputs.
      delta_frobenius: Frobenius norm of gamma B A over all layers.
    """

    loss_train: Float[Array, "*s"]
    loss_held_out: Float[Array, "*s"]
    output_train: Float[Array, "*s"]
    output_held_out: Float[Array, "*s"]
    delta_frobenius: Float[Array, "*s"]


def draw_problem(key: PRNGKeyArray, config: ProblemConfig, model: Model) -> Problem:
    """Sample the base, the teacher and the inputs; base weights are N(0, 1/in)."""
    # Inputs that share the direction ``shared``.
    inputs_key, noise_key, *layer_keys = jax.random.split(key, 2 + len(config.shapes(model)))
    shared_key, specific_key = jax.random.split(inputs_key)
    total = config.samples + config.held_out
    shared = jax.random.normal(shared_key, (1, config.p_in))
    specific = jax.random.normal(specific_key, (total, config.p_in))
    x = math.sqrt(config.overlap) * shared + math.sqrt(1 - config.overlap) * specific
    # Base weights, and the teacher's low-rank change of each layer.
    weights, changes = [], []
    for layer_key, (out, fan_in) in zip(layer_keys, config.shapes(model), strict=True):
        base_key, left_key, right_key = jax.random.split(layer_key, 3)
        weights.append(jax.random.normal(base_key, (out, fan_in)) / math.sqrt(fan_in))
        # Scaled so that the entries of D x have variance 1 like those of x.
        right = jax.random.normal(right_key, (config.teacher_rank, fan_in)) / math.sqrt(fan_in)
        left = jax.random.normal(left_key, (out, config.teacher_rank))
        changes.append(left @ right / math.sqrt(config.teacher_rank))
    # Targets: the teacher's change of the output plus noise.
    target = _output_change(tuple(weights), x, lambda layer, u: u @ changes[layer].T)
    target = target + config.noise * jax.random.normal(noise_key, target.shape)
    n = config.samples
    return Problem(tuple(weights), x[:n], x[n:], target[:n], target[n:])


def draw_adapters(key: PRNGKeyArray, config: ProblemConfig, model: Model, *, rank: int) -> Adapters:
    """Sample the initial adapters: A as PEFT does, nested over ranks (`rora_theory.laws.random.nested`), and B = 0."""
    adapters = []
    for index, (out, fan_in) in enumerate(config.shapes(model)):
        # A key for each layer.
        lora_A = nested.draw_nested_A(jax.random.fold_in(key, index), "kaiming_uniform", rank=rank, p_in=fan_in)
        adapters.append({"lora_A": lora_A, "lora_B": jnp.zeros((out, rank), jnp.float32)})
    return tuple(adapters)


def output_change(
    adapters: Adapters,
    weights: Weights,
    x: Float[Array, "n p_in"],
    scaling: Float[Array, ""] | float,
) -> Float[Array, "n p_out"]:
    """Compute the adapters' change of the output, without cancellation."""

    def delta(layer: int, u: Array) -> Array:
        tensors = adapters[layer]
        return scaling * ((u @ tensors["lora_A"].T) @ tensors["lora_B"].T)

    return _output_change(weights, x, delta)


def loss(
    adapters: Adapters,
    weights: Weights,
    x: Float[Array, "n p_in"],
    target: Float[Array, "n p_out"],
    scaling: Float[Array, ""] | float,
) -> Float[Array, ""]:
    """Compute the loss L: half the squared error, summed over outputs and averaged over inputs."""
    return jnp.sum((output_change(adapters, weights, x, scaling) - target) ** 2) / (2 * x.shape[0])


def trajectory(
    adapters: Adapters,
    problem: Problem,
    *,
    scaling: Float[Array, ""] | float,
    learning_rate: Float[Array, ""] | float,
    optimizer: OptimizerName,
    steps: tuple[int, ...],
    freeze_A: bool = False,
) -> Measures:
    """Train one seed's adapters, and measure before the first step and after each of ``steps``.

    Args:
      adapters: Initial adapters.
      problem: Problem from `draw_problem`.
      scaling: Scaling factor gamma, from `rora_theory.scaling_factor`.
      learning_rate: Learning rate eta, above 0.
      optimizer: Name of the optimizer, see `rora_theory.optimizers.make_optimizer`; it uses full batches.
      steps: Numbers of updates at which to measure, ascending, each 1 or more.
      freeze_A: Whether B is trained alone.

    Returns:
      The measurements, with an axis of ``1 + len(steps)``.
    """
    check_steps(steps)
    transformation = make_optimizer(optimizer, learning_rate)
    update = _update(transformation, problem, scaling, freeze_A=freeze_A)

    # Each element of the scan runs to the next recorded step and measures there.
    def segment(carry: tuple[Adapters, Any], length: Array) -> tuple[tuple[Adapters, Any], Measures]:
        carry = jax.lax.fori_loop(0, length, update, carry)
        return carry, measure_student(carry[0], problem, scaling)

    # The first segment has length 0, which measures the start.
    lengths = jnp.asarray([end - begin for begin, end in itertools.pairwise((0, 0, *steps))], jnp.int32)
    return jax.lax.scan(segment, (adapters, transformation.init(adapters)), lengths)[1]


@partial(jax.jit, static_argnames=("optimizer", "steps", "freeze_A"))
def trajectories(
    adapters: Adapters,
    problem: Problem,
    scaling: Float[Array, ""] | float,
    learning_rates: Float[Array, " rates"],
    *,
    optimizer: OptimizerName,
    steps: tuple[int, ...],
    freeze_A: bool = False,
) -> Measures:
    """Compute `trajectory` for a leading axis of seeds in both pytrees and every learning rate in one compiled call.

    The fields are [seeds, rates, 1 + steps].
    """

    def train_one(params: Adapters, seed_problem: Problem, rate: Array) -> Measures:
        return trajectory(
            params,
            seed_problem,
            scaling=scaling,
            learning_rate=rate,
            optimizer=optimizer,
            steps=steps,
            freeze_A=freeze_A,
        )

    return jax.vmap(jax.vmap(train_one, in_axes=(None, None, 0)), in_axes=(0, 0, None))(
        adapters, problem, learning_rates
    )


def measure_student(adapters: Adapters, problem: Problem, scaling: Float[Array, ""] | float) -> Measures:
    """Measure the student once, without an axis of steps."""
    train, held_out = (
        output_change(adapters, problem.weights, x, scaling) for x in (problem.x_train, problem.x_held_out)
    )
    squares = sum(jnp.sum((tensors["lora_B"] @ tensors["lora_A"]) ** 2) for tensors in adapters)
    return Measures(
        loss_train=jnp.sum((train - problem.target_train) ** 2) / (2 * train.shape[0]),
        loss_held_out=jnp.sum((held_out - problem.target_held_out) ** 2) / (2 * held_out.shape[0]),
        output_train=_rms(train),
        output_held_out=_rms(held_out),
        delta_frobenius=scaling * jnp.sqrt(squares),
    )


def _output_change(weights: tuple[Array, ...], x: Array, delta: Callable[[int, Array], Array]) -> Array:
    """Propagate activations and their changes side by side; layer l adds ``delta(l, its input)`` to its output."""
    # Changes are propagated by themselves: the difference of two outputs would cancel in float32.
    hidden, hidden_change = x, None
    for layer, weight in enumerate(weights):
        adapted_input = hidden if hidden_change is None else hidden + hidden_change
        # Change of this layer's output: by its own adapter, and by the change of its input.
        added = delta(layer, adapted_input)
        if hidden_change is not None:
            added = added + hidden_change @ weight.T
        if layer == len(weights) - 1:
            return added
        before = hidden @ weight.T
        hidden, hidden_change = jnp.tanh(before), _tanh_difference(before, added)
    raise AssertionError("a model has at least one layer")


def _tanh_difference(a: Array, d: Array) -> Array:
    """Compute tanh(a + d) - tanh(a); for small d as sinh(d) / (cosh(a + d) cosh(a)), which avoids cancellation."""
    is_small = jnp.abs(d) < 1
    small_change = jnp.where(is_small, d, 0.0)
    bounded = jnp.clip(a, -30.0, 30.0)  # beyond 30, tanh is 1 in float32 and the quotient is 0
    quotient = jnp.sinh(small_change) / (jnp.cosh(bounded + small_change) * jnp.cosh(bounded))
    return jnp.where(is_small, quotient, jnp.tanh(a + d) - jnp.tanh(a))


def _update(
    transformation: optax.GradientTransformation, problem: Problem, scaling: Any, *, freeze_A: bool
) -> Callable[[Any, tuple[Adapters, Any]], tuple[Adapters, Any]]:
    """Return the body of a loop over full-batch steps; its carry is the adapters and the optimizer's state."""

    def loss_of(adapters: Adapters) -> Array:
        return loss(adapters, problem.weights, problem.x_train, problem.target_train, scaling)

    def update(_: Any, carry: tuple[Adapters, Any]) -> tuple[Adapters, Any]:
        adapters, state = carry
        # Optax relies on type promotion; this package's code also passes under the strict rules.
        with jax.numpy_dtype_promotion("standard"):
            updates, state = transformation.update(jax.grad(loss_of)(adapters), state, adapters)
            # A frozen A gets a gradient, but its update is dropped.
            if freeze_A:
                updates = tuple({**tensors, "lora_A": jnp.zeros_like(tensors["lora_A"])} for tensors in updates)
            return optax.apply_updates(adapters, updates), state

    return update


def _rms(a: Array) -> Array:
    return jnp.sqrt(jnp.mean(a**2))
