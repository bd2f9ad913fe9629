"""The teacher-student problem: change of output, steps, the first step's law, and measurements."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rora_theory import laws, optimizers
from rora_theory.errors import InputError
from rora_theory.lab.sweep import controlled
from rora_theory.lab.sweep.controlled import ProblemConfig
from rora_theory.validation.rules import check_steps

LINEAR = "linear", ProblemConfig(p_in=24, p_out=6, samples=4, held_out=5, overlap=0.5, teacher_rank=2)
MLP = "mlp", ProblemConfig(p_in=12, hidden=9, p_out=4, samples=5, held_out=3, teacher_rank=2)
draw_problem = jax.jit(controlled.draw_problem, static_argnames=("config", "model"))
draw_adapters = jax.jit(controlled.draw_adapters, static_argnames=("config", "model", "rank"))
output_change = jax.jit(controlled.output_change)


def draw_pair(model, config, rank=4, seed=0):
    problem_key, adapter_key = jax.random.split(jax.random.key(seed))
    return draw_problem(problem_key, config, model), draw_adapters(adapter_key, config, model, rank=rank)


def stacked(config, rank, seeds):
    """Return one problem with many adapters, over which the laws average."""
    problem = draw_problem(jax.random.key(1), config, "linear")
    keys = jax.random.split(jax.random.key(2), seeds)
    adapters = jax.vmap(lambda key: draw_adapters(key, config, "linear", rank=rank))(keys)
    repeated = jax.tree.map(lambda a: np.broadcast_to(np.asarray(a), (seeds, *a.shape)), problem)
    return problem, repeated, adapters


def wide(tree):
    return jax.tree.map(lambda a: np.asarray(a, np.float64), tree)


def output(weights, adapters, x, scaling):
    """Compute the adapted model's output in float64 by its definition."""
    for index, (weight, tensors) in enumerate(zip(weights, adapters, strict=True)):
        x = x @ (weight + scaling * tensors["lora_B"] @ tensors["lora_A"]).T
        x = np.tanh(x) if index < len(weights) - 1 else x
    return x


@pytest.mark.slow
@pytest.mark.parametrize("size", [1e-6, 1e-2, 3.0])
@pytest.mark.parametrize(("model", "config"), [LINEAR, MLP])
def test_change_is_the_difference_of_outputs(model, config, size):
    """The float32 change is accurate to 3e-6 of its largest entry at any size: there is no cancellation."""
    problem, adapters = draw_pair(model, config)
    keys = jax.random.split(jax.random.key(5), len(adapters))
    adapters = tuple(
        {**t, "lora_B": size * jax.random.normal(k, t["lora_B"].shape)} for t, k in zip(adapters, keys, strict=True)
    )
    zero = tuple({**t, "lora_B": 0 * t["lora_B"]} for t in wide(adapters))
    weights, x = wide(problem.weights), wide(problem.x_train)
    exact = output(weights, wide(adapters), x, 0.7) - output(weights, zero, x, 0.7)
    actual = np.asarray(output_change(adapters, problem.weights, problem.x_train, 0.7))
    np.testing.assert_allclose(actual, exact, rtol=0, atol=3e-6 * np.abs(exact).max())


@pytest.mark.slow
def test_problem():
    """Inputs have the configured overlap; the linear target has unit variance, the teacher's rank, and added noise."""
    config = ProblemConfig(p_in=400, p_out=300, samples=60, held_out=2, overlap=0.3, teacher_rank=3, noise=0.0)
    problem = draw_problem(jax.random.key(0), config, "linear")
    x, target = wide(problem.x_train), wide(problem.target_train)
    cosines = (x @ x.T)[np.triu_indices(60, 1)] / 400
    assert np.mean(cosines) == pytest.approx(0.3, abs=5 * 0.3 * np.sqrt(2 / 400))  # fluctuation of |m|^2
    assert np.mean(x**2) == pytest.approx(1, abs=5 * 0.3 * np.sqrt(2 / 400))
    assert np.linalg.matrix_rank(target, tol=1e-4 * np.linalg.norm(target)) == 3
    # Var over the rows of D's factor: three directions, each x's projection of variance 1 with overlap.
    assert 0.3 < np.mean(target**2) < 3
    noisy = draw_problem(jax.random.key(0), ProblemConfig(**{**vars(config), "noise": 0.5}), "linear")
    difference = wide(noisy.target_train) - target
    assert np.std(difference) == pytest.approx(0.5, rel=5 / np.sqrt(2 * difference.size))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_first_step_has_the_exact_law(optimizer):
    """Mean squares over 4000 adapters agree with `laws.first_step_moments`; |z| < 5 on six figures."""
    problem, repeated, adapters = stacked(LINEAR[1], 8, 4000)
    rate, scaling = 1e-3, 0.5
    stacked_measures = controlled.trajectories(
        adapters, repeated, scaling, jnp.array([rate]), optimizer=optimizer, steps=(1,)
    )
    measures = jax.tree.map(lambda field: field[:, 0], stacked_measures)
    grad = -wide(problem.target_train).T @ wide(problem.x_train) / LINEAR[1].samples
    for field, x in (("output_train", problem.x_train), ("output_held_out", problem.x_held_out)):
        law = laws.first_step_moments(
            grad,
            wide(x),
            rank=8,
            scaling=scaling,
            learning_rate=rate,
            optimizer=optimizer,
            init="kaiming_uniform",
            epsilon=optimizers.EPSILON,
        )
        squares = np.asarray(getattr(measures, field), np.float64)[:, 1] ** 2
        error = np.std(squares) / np.sqrt(len(squares))
        assert abs(np.mean(squares) - np.mean(law.second_moment)) < 5 * error
    squares = np.asarray(measures.delta_frobenius, np.float64)[:, 1] ** 2
    assert abs(np.mean(squares) - law.matrix_second_moment) < 5 * np.std(squares) / np.sqrt(len(squares))


@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
@pytest.mark.parametrize("freeze_A", [False, True])
def test_steps_by_hand(optimizer, freeze_A):
    """Four steps of both factors agree with explicit gradients and the optimizers' formulas, in float64."""
    problem, adapters = draw_pair(*LINEAR)
    rate, scaling, steps = 0.02, 0.8, 4
    x, target = wide(problem.x_train), wide(problem.target_train)
    state = wide(adapters)[0]
    first, second = ({name: np.zeros_like(a) for name, a in state.items()} for _ in range(2))
    for step in range(1, steps + 1):
        residual = (scaling * x @ state["lora_A"].T @ state["lora_B"].T - target) / len(x)
        G = residual.T @ x
        grads = {"lora_A": scaling * state["lora_B"].T @ G, "lora_B": scaling * G @ state["lora_A"].T}
        for name, g in grads.items():
            if optimizer == "momentum":
                first[name] = optimizers.MOMENTUM * first[name] + g
                update = first[name]
            else:
                first[name] = 0.9 * first[name] + 0.1 * g
                second[name] = 0.999 * second[name] + 0.001 * g**2
                update = first[name] / (1 - 0.9**step)
                update = update / (np.sqrt(second[name] / (1 - 0.999**step)) + optimizers.EPSILON)
                update = update + optimizers.WEIGHT_DECAY * state[name]
            if name == "lora_B" or not freeze_A:
                state[name] = state[name] - rate * update
    measures = controlled.trajectory(
        adapters, problem, scaling=scaling, learning_rate=rate, optimizer=optimizer, steps=(2, steps), freeze_A=freeze_A
    )
    delta = scaling * state["lora_B"] @ state["lora_A"]
    residual = (x @ delta.T - target) / len(x)
    expected = {
        "delta_frobenius": np.linalg.norm(delta),
        "output_train": np.sqrt(np.mean((x @ delta.T) ** 2)),
        "output_held_out": np.sqrt(np.mean((wide(problem.x_held_out) @ delta.T) ** 2)),
        "loss_train": np.sum((x @ delta.T - target) ** 2) / (2 * len(x)),
    }
    for name, value in expected.items():
        # Adam divides by gradients that pass near zero, where float32 rounding is not small: 2e-4.
        assert float(getattr(measures, name)[2]) == pytest.approx(value, rel=2e-4), name


@pytest.mark.usefixtures("unchecked")
def test_bad_settings():
    with pytest.raises(InputError, match=r"optimizer.*'lion'"):
        optimizers.make_optimizer("lion", 0.1)
    for steps in ((), (0, 1), (2, 2), (3, 1)):
        with pytest.raises(InputError, match="steps"):
            check_steps(steps)
