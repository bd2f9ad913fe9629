"""A seed beyond those that are told apart is refused by every command, before anything is read."""

import dataclasses
import importlib
import pkgutil
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import jax
import numpy as np
import pytest

import sims
from rora_theory import InputError
from rora_theory.random.seeds import SEED_COUNT, check_seed
from rora_theory.runs.folder import RunFolder
from sims.common import cli

MORE = {
    "transfer": {"check": ("nowhere", "nowhere.json")},
    "prune": {"text": ("nowhere.json",)},
    "layer_sweep": {"layers": Path("nowhere.npz")},
}


SEEDS = ("seed", "data_seed", "seeds")


def commands() -> list[tuple[str, tuple[str, ...]]]:
    """Every command with every setting of it that is a seed or several, by the parts of its configuration it is in."""

    def walk(config: type) -> Iterator[tuple[str, ...]]:
        for setting, hint in get_type_hints(config).items():
            if dataclasses.is_dataclass(hint):
                yield from ((setting, *rest) for rest in walk(hint))
            elif setting in SEEDS and (setting, hint) != ("seeds", int):  # a number of seeds is no seed
                yield (setting,)

    configs = {
        module.name: getattr(importlib.import_module(f"sims.{module.name}"), "Config", None)
        for module in pkgutil.iter_modules(sims.__path__)
    }
    return [(name, path) for name, config in configs.items() if config is not None for path in walk(config)]


def changed(config: Any, path: tuple[str, ...], value: Any) -> Any:
    """A configuration with one of its settings, or of its parts', changed."""
    inner = value if len(path) == 1 else changed(getattr(config, path[0]), path[1:], value)
    return dataclasses.replace(config, **{path[0]: inner})


def test_the_seeds_that_are_accepted_are_told_apart() -> None:
    keys = {tuple(jax.random.key_data(jax.random.key(seed)).tolist()) for seed in (0, 1, 2**32 - 2, 2**32 - 1)}
    assert len(keys) == 4
    assert SEED_COUNT == 2**32
    for seed in (0, 1, 2**32 - 1):
        check_seed("seed", seed)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("kind", [np.int64, np.uint64])
def test_a_seed_of_numpy_is_the_seed_of_its_value(kind) -> None:
    for seed in (0, 3, 2**32 - 1):
        check_seed("seed", kind(seed))
        keys = [jax.random.key_data(jax.random.key(one)).tolist() for one in (seed, kind(seed))]
        assert keys[0] == keys[1]
    with pytest.raises(InputError, match="seed must be "):
        check_seed("seed", kind(2**32))


def test_every_command_with_a_seed_is_tried() -> None:
    named = {name for name, _ in commands()}
    assert named == {
        "coordinate_check", "finetune", "horizon", "layer_sweep", "lr_transfer", "prune", "rank_sweep", "regime",
        "training_dynamics", "transfer", "tune", "variance_sweep",
    }  # fmt: skip
    assert {("finetune", ("training", "seed")), ("rank_sweep", ("seeds",))} <= set(commands())


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("seed", [2**32, -1, 10**30])
@pytest.mark.parametrize(("name", "path"), commands())
def test_a_seed_beyond_them_is_one_line(name, path, seed, tmp_path, monkeypatch, capsys) -> None:
    module, setting = sys.modules[f"sims.{name}"], path[-1]
    needed = {field.name: ("nowhere.json",) for field in dataclasses.fields(module.Config) if field.name == "data"}

    def begin() -> None:
        config = module.Config(**needed, **MORE.get(name, {}), out=tmp_path / "run")
        value = (*range(20), seed) if setting == "seeds" else seed
        module.run(changed(config, path, value))

    monkeypatch.setattr(RunFolder, "open", lambda *_, **__: pytest.fail("not refused"))
    with pytest.raises(SystemExit) as stopped:
        cli.run(begin)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert re.search(rf"(--)?{setting.rstrip('s')}s? must be .*, got {seed}\n", error)
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("seed", [True, 1.0, "1", None])
def test_what_is_no_integer_is_no_seed(seed) -> None:
    with pytest.raises(InputError, match="seed must be "):
        check_seed("seed", seed)
