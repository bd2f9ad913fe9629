"""A seed beyond those that are told apart is refused by every command, before anything is read."""

import dataclasses
import importlib
import pkgutil
import sys

import jax
import pytest

import sims
from rora_theory import InputError
from rora_theory.seeds import COUNT, check_seed
from sims import finetune
from sims.common import cli
from sims.common.run_folder import RunFolder

WORK = {"finetune": "finetune", "rank_sweep": "sweep", "transfer": "main"}
"""A command's function of its configuration, where it is not ``run``."""

MORE = {"transfer": {"check": ("nowhere", "nowhere.json")}, "prune": {"text": ("nowhere.json",)}}


def commands() -> list[tuple[str, str]]:
    """Every command with every setting of it that is a seed or several."""
    classes = {
        module.name: getattr(importlib.import_module(f"sims.{module.name}"), "Config", None)
        for module in pkgutil.iter_modules(sims.__path__)
    }
    lists = {"rank_sweep": ("seeds",)}  # the others' is a number of seeds
    return [
        (name, field.name)
        for name, config in classes.items()
        for field in (() if config is None else dataclasses.fields(config))
        if field.name in ("seed", "data_seed", "training", *lists.get(name, ()))
    ]


def test_the_seeds_that_are_accepted_are_told_apart() -> None:
    keys = {tuple(jax.random.key_data(jax.random.key(seed)).tolist()) for seed in (0, 1, 2**32 - 2, 2**32 - 1)}
    assert len(keys) == 4
    assert COUNT == 2**32
    for seed in (0, 1, 2**32 - 1):
        check_seed(seed)


def test_every_command_with_a_seed_is_tried() -> None:
    named = {name for name, _ in commands()}
    assert named == {
        "coordinate_check", "finetune", "lr_transfer", "prune", "rank_sweep", "regime", "training_dynamics", "transfer",
        "variance_sweep",
    }  # fmt: skip


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("seed", [2**32, -1, 10**30])
@pytest.mark.parametrize(("name", "setting"), commands())
def test_a_seed_beyond_them_is_one_line(name, setting, seed, tmp_path, monkeypatch, capsys) -> None:
    module = sys.modules[f"sims.{name}"]
    needed = {field.name: ("nowhere.json",) for field in dataclasses.fields(module.Config) if field.name == "data"}
    value = {"seeds": (seed,), "training": finetune.FinetuneConfig(seed=seed)}.get(setting, seed)
    config = module.Config(**needed, **MORE.get(name, {}), **{setting: value, "out": tmp_path / "run"})
    monkeypatch.setattr(cli, "parse", lambda *_, **__: config)
    monkeypatch.setattr(RunFolder, "open", lambda *_, **__: pytest.fail("not refused"))
    with pytest.raises(SystemExit) as stopped:
        cli.run(module.main if name == "prune" else lambda: getattr(module, WORK.get(name, "run"))(config))
    assert stopped.value.code == 2
    said = {"training": "seed"}.get(setting, setting)
    error = capsys.readouterr().err
    assert f"{said} is {seed}; accepted is an integer from 0 to 2^32 - 1\n" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("seed", [True, 1.0, "1", None])
def test_what_is_no_integer_is_no_seed(seed) -> None:
    with pytest.raises(InputError, match="seed is "):
        check_seed(seed)
