"""Settings of a fine-tuning run: what each changes in the adapter, the data, the optimizer and the step."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny

from rora_theory.lab.finetune import FinetuneConfig, Trainer, prepare
from rora_theory.lab.finetune import loop as loops
from rora_theory.lab.finetune import step as steps

ADAPTER: list[tuple[dict[str, Any], str, Any]] = [
    ({"rank": 8}, "rank", 8),
    ({"rule": 0.3}, "rule", 0.3),
    ({"alpha": 8.0}, "alpha", 8.0),
    ({"targets": ("q_proj",)}, "target_modules", ("q_proj",)),
    ({"rank_pattern": {"q_proj": 2}}, "rank_pattern", (("q_proj", 2),)),
    ({"alpha_pattern": {"q_proj": 2.0}}, "alpha_pattern", (("q_proj", 2.0),)),
    ({"init": "gaussian"}, "init", "gaussian"),
    ({"dropout": 0.25}, "dropout", 0.25),
    ({"method": "dora"}, "use_dora", True),
    ({"virtual_tokens": 3, "method": "prefix"}, "virtual_tokens", 3),
    ({"bottleneck": 16, "method": "series"}, "width", 16),
]
"""Settings, the first of them under test, and the value of an attribute of the adapter's configuration with them."""


@pytest.mark.parametrize(("settings", "attribute", "value"), ADAPTER)
def test_settings_of_the_adapter(settings, attribute, value) -> None:
    """The setting changes its attribute of the adapter's configuration, and no other."""
    first = next(iter(settings))
    without = {name: given for name, given in settings.items() if name != first}
    before, after = (dataclasses.asdict(FinetuneConfig(**given).adapter()) for given in (without, settings))
    assert after[attribute] == value
    assert {name for name in after if after[name] != before[name]} == {attribute}


RECORDS = tiny.records(20)
TEXTS = {"texts", "held-out texts"}
DATA: dict[str, tuple[Any, set[str]]] = {
    "template": ("clean", {*TEXTS, "widths", "order", "targets"}),
    "cutoff": (40, {*TEXTS, "widths", "order", "targets"}),
    "held_out": (3, {*TEXTS, "order", "steps", "targets"}),
    "widths": (1, {"widths", "order"}),
    "batch_size": (2, {"order", "steps"}),
    "epochs": (1, {"order", "steps"}),
    "steps": (4, {"order", "steps"}),
    "seed": (1, {*TEXTS, "order", "targets"}),
    "loss_on": ("answer", {"targets"}),
}
"""Another value of each setting of the data, and all that it changes."""


def prepared(**changes: Any) -> dict[str, Any]:
    """Return what `prepare` makes of the records."""
    config = FinetuneConfig(**{"held_out": 6, "batch_size": 4, "epochs": 2, "template": "plain"} | changes)
    data = prepare(RECORDS, tiny.ByteEncoder(), config)
    assert data.validation is not None
    train, held_out = data.train.examples, data.validation.examples
    batches = [data.train[step] for step in range(len(data.train))]
    return {
        "texts": sorted(train[index].tolist() for index in range(len(train))),
        "held-out texts": [held_out[index].tolist() for index in range(len(held_out))],
        "widths": data.summary["widths"],
        "order": [batch.inputs[:, 1:4].tolist() for batch in batches],
        "steps": len(batches),
        "targets": sorted(int(train.target_mask(index).sum()) for index in range(len(train))),
    }


@pytest.mark.parametrize("name", DATA)
def test_settings_of_the_data(name) -> None:
    value, changed = DATA[name]
    before, after = prepared(), prepared(**{name: value})
    assert {what for what in before if before[what] != after[what]} == changed
    if name == "cutoff":
        assert max(map(len, after["texts"])) == 40
    if name in ("batch_size", "widths"):
        assert len(after["order"][0] if name == "batch_size" else after["widths"]) == value
    if name in ("epochs", "steps"):
        assert after["steps"] == {"epochs": before["steps"] // 2, "steps": 4}[name]


def updates(count: int = 3, **changes: Any) -> dict[str, np.ndarray]:
    """Return the updates of two tensors after some steps on constant gradients of different sizes."""
    config = FinetuneConfig(**{"warmup": 0, "lr": 0.1, "schedule": "constant", "clip": float("inf")} | changes)
    optimizer = steps.finetune_optimizer(config, 10)
    params = {"lora_A": jnp.array([1.0, -2.0]), "lora_B": jnp.array([3.0])}
    state = optimizer.init(params)
    for step in range(count):
        gradients = {"lora_A": jnp.array([1e-3, 2.0]) * (step + 1), "lora_B": jnp.array([-0.5])}
        with jax.numpy_dtype_promotion("standard"):
            change, state = optimizer.update(gradients, state, params)
    return {name: np.asarray(value, np.float64) for name, value in change.items()}


def adamw(
    count: int = 3,
    *,
    rate: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.999),
    epsilon: float = 1e-8,
    decay: float = 0.0,
    clip: float = np.inf,
) -> np.ndarray:
    """Return the same updates as the paper of AdamW defines them, in float64."""
    params, first, second = np.array([1.0, -2.0, 3.0]), np.zeros(3), np.zeros(3)
    for step in range(1, count + 1):
        gradient = np.array([1e-3 * step, 2.0 * step, -0.5])
        gradient *= min(1.0, clip / np.linalg.norm(gradient))
        first = betas[0] * first + (1 - betas[0]) * gradient
        second = betas[1] * second + (1 - betas[1]) * gradient**2
        scale = np.sqrt(second / (1 - betas[1] ** step)) + epsilon
        change = -rate * (first / (1 - betas[0] ** step) / scale + decay * params)
    return change


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {}),
        ({"lr": 0.3}, {"rate": 0.3}),
        ({"betas": (0.5, 0.6)}, {"betas": (0.5, 0.6)}),
        ({"epsilon": 0.1}, {"epsilon": 0.1}),
        ({"weight_decay": 0.2}, {"decay": 0.2}),
        ({"clip": 0.7, "epsilon": 0.1}, {"clip": 0.7, "epsilon": 0.1}),
        ({"schedule": "linear"}, {"rate": 0.08}),
        ({"schedule": "cosine"}, {"rate": 0.05 * (1 + np.cos(0.2 * np.pi))}),
        ({"warmup": 4}, {"rate": 0.05}),
    ],
)
def test_settings_of_the_optimizer(settings, expected) -> None:
    """The third update of ten is AdamW's at the rate of the schedule."""
    change, usual = updates(**settings), adamw()
    reference = adamw(**expected)
    np.testing.assert_allclose([*change["lora_A"], *change["lora_B"]], reference, rtol=1e-4)
    assert not settings or np.abs(reference / usual - 1).max() > 0.01


def test_the_rate_of_lora_A() -> None:
    usual, changed = updates(), updates(lr_multiplier_A=0.25)
    np.testing.assert_allclose(changed["lora_A"], 0.25 * usual["lora_A"], rtol=1e-6)
    np.testing.assert_allclose(changed["lora_B"], usual["lora_B"], rtol=1e-6)


def test_settings_of_the_loop(params, monkeypatch) -> None:
    """They determine when a run validates and saves, its length, its keys, and the step that is compiled."""
    compiled: list[FinetuneConfig] = []
    monkeypatch.setattr(loops.steps, "train_step", lambda _, __, config, *___, **____: compiled.append(config))

    def trainer(**changes: Any) -> Trainer:
        small = {"rank": 2, "held_out": 6, "batch_size": 4, "epochs": 3, "evaluate_every": 4, "checkpoint_every": 3}
        config = FinetuneConfig(**small | {"template": "plain", "warmup": 0} | changes)
        data = prepare(RECORDS, tiny.ByteEncoder(), config)
        adapter = config.adapter().build(jax.random.key(config.seed), tiny.CONFIG, params)
        return Trainer(params, tiny.CONFIG, adapter, config, data.train, data.validation, None)

    def moments(run: Trainer) -> tuple[list[int], list[int]]:
        numbers = range(1, run.steps + 1)
        return [step for step in numbers if run.validates(step)], [step for step in numbers if run.saves(step)]

    usual = trainer()
    assert usual.steps == 12
    assert moments(usual) == ([4, 8, 12], [3, 4, 6, 8, 9, 12])
    assert moments(trainer(evaluate_every=5)) == ([5, 10, 12], [3, 5, 6, 9, 10, 12])
    assert moments(trainer(checkpoint_every=7)) == ([4, 8, 12], [4, 7, 8, 12])
    assert trainer(steps=5).steps == 5
    compiled.clear()
    for name, value in (("accumulation", 2), ("remat", True), ("dropout", 0.5)):
        trainer(**{name: value})
        assert getattr(compiled.pop(), name) == value
