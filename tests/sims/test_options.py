"""Options of the commands on a model: what each of them changes in the work that the command hands to the library.

Each command runs until it calls the library, which is replaced by a recorder. What the library makes of its arguments
is tested beside it. `tests/test_options.py` lists the test of every option.
"""

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support import commands, torch_models

from rora_theory.measure.rank_check import check as rank_checks
from rora_theory.measure.regimes import model as regimes
from rora_theory.runs.folder import RunFolder
from sims import coordinate_check, finetune, regime, tune
from sims.common import inputs, prompts, record_batches


class Recorded(BaseException):
    """Raised instead of the library's work, with what it was given."""

    def __init__(self, **values: Any) -> None:
        self.values = values


def plain(value: Any) -> Any:
    """Return a value that compares equal if its tensors, records and settings do."""
    if isinstance(value, torch_models.torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {name: plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return value


@pytest.fixture(autouse=True)
def recorded(monkeypatch, tmp_path) -> None:
    """Replace the work of the library, the model and the run folder."""
    opened: dict[str, Any] = {}

    def open_folder(*_: Any, **options: Any) -> SimpleNamespace:
        opened.update(out=options["out"], seed=options.get("seed"))
        return SimpleNamespace(path=tmp_path / "run", update=lambda **_: None)

    def record(**values: Any) -> None:
        raise Recorded(**opened | {name: plain(value) for name, value in values.items()})

    monkeypatch.setattr(RunFolder, "open", open_folder)
    monkeypatch.setattr(prompts, "print_prompts", lambda _, __, count: opened.update(show=count))
    monkeypatch.setattr(inputs, "load_model", lambda _, __, dtype: opened.update(dtype=dtype) or torch_models.model())
    monkeypatch.setattr(
        tune,
        "expected_rate",
        lambda run, *, config, family, parameters: record(
            **vars(run), config=config, family=family, parameters=parameters
        ),
    )
    monkeypatch.setattr(
        regimes,
        "regime",
        lambda _, train, held_out, targets, *, config, layers: record(
            train=train, held_out=held_out, targets=targets, config=config, layers=layers
        ),
    )
    for module, name in ((regime, "run_with_bar"), (coordinate_check, "run_table")):
        monkeypatch.setattr(module, name, lambda cells, work, *_, **__: work(cells[-1], tmp_path))

    def measure(adapted: Any, rank: int, seeds: list[int], make_optimizer: Any, **batches: Any) -> None:
        optimizer = make_optimizer(list(adapted.parameters()), rank)
        layers = {name: layer for name, layer in adapted.named_modules() if hasattr(layer, "lora_A") and layer.lora_A}
        record(
            **batches,
            rank=rank,
            seeds=seeds,
            optimizer=(type(optimizer).__name__, optimizer.param_groups[0]["lr"]),
            adapted=sorted({name.rpartition(".")[2] for name in layers}),
            scaling=next(iter(next(iter(layers.values())).scaling.values())),
            init=adapted.peft_config["default"].init_lora_weights,
        )

    monkeypatch.setattr(
        rank_checks,
        "FirstSteps",
        lambda train, held_out, steps, *, label: SimpleNamespace(
            measure=partial(measure, train=train, held_out=held_out, steps=steps)
        ),
    )

    def share(_: Any, __: Any, *, split_weights: bool) -> tuple[None, None]:
        opened.update(split_weights=split_weights)
        return None, None

    monkeypatch.setattr(finetune.sharding, "layout_over_all_devices", share)
    monkeypatch.setattr(
        finetune.llama,
        "load",
        lambda _, dtype, *, shardings, quantization: record(dtype=dtype, quantization=quantization),
    )


def hand_over(module: Any, config: Any) -> dict[str, Any]:
    """Return what a command gives to the library."""
    with pytest.raises(Recorded) as caught:
        commands.work_of(module)(config)
    return caught.value.values


def changed(config: Any, name: str, value: Any) -> Any:
    """Return a command's options with one of them, or of their parts, replaced."""
    for entry in fields(config):
        part = getattr(config, entry.name)
        if entry.name == name:
            return replace(config, **{name: value})
        if is_dataclass(part) and name in {inner.name for inner in fields(part)}:
            return replace(config, **{entry.name: replace(part, **{name: value})})
    raise AssertionError(f"no option {name}")


PAIR = {"train", "held_out"}
TUNE: dict[str, tuple[Any, set[str]]] = {
    "steps": (500, {"steps"}),
    "rank": (64, {"rank", "config"}),
    "alpha": (32.0, {"gain", "config"}),
    "rule": ("rora", {"gain", "config"}),
    "targets": (("q_proj",), {"config"}),
    "batch_size": (2, {"batch_size"}),
    "schedule": ("linear", {"schedule"}),
    "family": ("Qwen3", {"family"}),
}
REGIME: dict[str, tuple[Any, set[str]]] = {
    "template": ("clean", PAIR),
    "dtype": ("bfloat16", {"dtype"}),
    "targets": (("q_proj",), {"targets"}),
    "layers": ((1,), {"layers"}),
    "batch_size": (3, {"train"}),
    "held_out": (5, PAIR),
    "cutoff": (30, PAIR),
    "loss_on": ("answer", PAIR),
    **{
        name: (value, {"config"})
        for name, value in (
            ("ranks", (2, 4)), ("rules", ("rora",)), ("optimizers", ("adam",)), ("inits", ("normal",)), ("alpha", 8.0),
            ("lr", 1e-3), ("rows", 2048), ("tokens", 9), ("mask", False), ("exact", True),
        )
    },
    "seed": (5, {*PAIR, "config", "seed"}),
    "show": (2, {"show"}),
    "out": (Path("elsewhere"), {"out"}),
}  # fmt: skip
CHECK: dict[str, tuple[Any, set[str]]] = {
    "ranks": ((2, 4), {"rank", "scaling"}),
    "rules": (("rora", "lora"), {"scaling"}),
    "optimizers": (("sgd", "adamw"), {"optimizer"}),
    "inits": (("gaussian",), {"init"}),
    "gamma": (4.0, {"scaling"}),
    "reference_rank": (4, {"scaling"}),
    "sgd_lr": (0.5, {"optimizer"}),
    "steps": ((1, 3), {"steps"}),
    "seeds": ((0, 7), {*PAIR, "seeds"}),
    "targets": (("q_proj",), {"adapted"}),
    "batches": ("fresh", {"train"}),
    "batch_size": (3, PAIR),
    "held_out": (7, PAIR),
    "cutoff": (40, PAIR),
    "template": ("clean", PAIR),
    "show": (2, {"show"}),
    "out": (Path("elsewhere"), {"out"}),
}
FINETUNE: dict[str, tuple[Any, set[str]]] = {
    "dtype": ("bfloat16", {"dtype"}),
    "quantization": ("q8_0", {"quantization"}),
    "fsdp": (True, {"split_weights"}),
}
"""Another value of each option, and all that it changes in the arguments of the library."""

OPTIONS: dict[Any, tuple[dict[str, tuple[Any, set[str]]], Callable[[str, str], Any]]] = {
    tune: (TUNE, lambda _, model: tune.TuneOptions(model)),
    regime: (
        REGIME,
        lambda data, model: regime.RegimeOptions(
            (data,), model, batches=record_batches.PairConfig(4, 4, 400), measured=regime.RegimeConfig(tokens=16)
        ),
    ),
    coordinate_check: (
        CHECK,
        lambda data, model: coordinate_check.CoordinateCheckOptions(
            (data,), model, records=record_batches.BatchConfig(batch_size=2, held_out=6, cutoff=160, template="train"),
            check=coordinate_check.CheckConfig(ranks=(2, 16), seeds=(0, 1), steps=(1, 2), controls=False),
        ),
    ),
    finetune: (
        FINETUNE,
        lambda data, model: finetune.FinetuneOptions(
            (data,), model, training=finetune.FinetuneConfig(rank=2, batch_size=8, held_out=4, warmup=1)
        ),
    ),
}  # fmt: skip
CASES = [(module, name) for module, (table, _) in OPTIONS.items() for name in table]


@pytest.fixture(scope="module")
def usual() -> dict[Any, Any]:
    """Return what each command gives to the library by its usual options, once it has been asked."""
    return {}


@pytest.mark.parametrize(
    ("module", "name"), CASES, ids=[f"{module.__name__.rpartition('.')[2]} {name}" for module, name in CASES]
)
def test_an_option_reaches_the_library(module, name, model, data, usual) -> None:
    """It changes what the library is given, and nothing else of it."""
    table, make = OPTIONS[module]
    value, expected = table[name]
    config = make(str(data / "train.json"), str(model))
    if module not in usual:
        usual[module] = hand_over(module, config)
    before, after = usual[module], hand_over(module, changed(config, name, value))
    assert {what for what in before if before[what] != after[what]} == expected
    if expected == {name}:
        assert after[name] == plain(value)
