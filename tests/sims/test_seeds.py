"""A seed beyond those that are told apart is refused by every command, before anything is read."""

import dataclasses
import importlib
import pkgutil
import re
import sys
from typing import get_type_hints

import jax
import pytest

import sims
from rora_theory import InputError
from rora_theory.seeds import COUNT, check_seed
from sims.common import cli
from sims.common.run_folder import RunFolder

WORK = {"finetune": "finetune", "rank_sweep": "sweep", "transfer": "main"}
"""A command's function of its configuration, where it is not ``run``."""

MORE = {"transfer": {"check": ("nowhere", "nowhere.json")}, "prune": {"text": ("nowhere.json",)}}


SEEDS = ("seed", "data_seed", "seeds")


def commands() -> list[tuple[str, str | None, str]]:
    """Every command with every setting of it that is a seed or several, and where that is: here, or in which part."""
    found: list[tuple[str, str | None, str]] = []
    for module in pkgutil.iter_modules(sims.__path__):
        config = getattr(importlib.import_module(f"sims.{module.name}"), "Config", None)
        for setting, hint in ({} if config is None else get_type_hints(config)).items():
            inner = get_type_hints(hint) if dataclasses.is_dataclass(hint) else {setting: hint}
            part = setting if dataclasses.is_dataclass(hint) else None
            # A number of seeds is no seed.
            found += [
                (module.name, part, name)
                for name, kind in inner.items()
                if name in SEEDS and (name, kind) != ("seeds", int)
            ]
    return found


def test_the_seeds_that_are_accepted_are_told_apart() -> None:
    keys = {tuple(jax.random.key_data(jax.random.key(seed)).tolist()) for seed in (0, 1, 2**32 - 2, 2**32 - 1)}
    assert len(keys) == 4
    assert COUNT == 2**32
    for seed in (0, 1, 2**32 - 1):
        check_seed(seed)


def test_every_command_with_a_seed_is_tried() -> None:
    named = {name for name, _, _ in commands()}
    assert named == {
        "coordinate_check", "finetune", "horizon", "lr_transfer", "prune", "rank_sweep", "regime", "training_dynamics",
        "transfer", "variance_sweep",
    }  # fmt: skip
    assert {("finetune", "training", "seed"), ("rank_sweep", None, "seeds")} <= set(commands())


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("seed", [2**32, -1, 10**30])
@pytest.mark.parametrize(("name", "part", "setting"), commands())
def test_a_seed_beyond_them_is_one_line(name, part, setting, seed, tmp_path, monkeypatch, capsys) -> None:
    module = sys.modules[f"sims.{name}"]
    needed = {field.name: ("nowhere.json",) for field in dataclasses.fields(module.Config) if field.name == "data"}

    def config(*_, **__):
        given = {setting: (*range(20), seed) if setting == "seeds" else seed}
        if part is not None:
            given = {part: get_type_hints(module.Config)[part](**given)}
        return module.Config(**needed, **MORE.get(name, {}), **given, out=tmp_path / "run")

    monkeypatch.setattr(cli, "parse", config)
    monkeypatch.setattr(RunFolder, "open", lambda *_, **__: pytest.fail("not refused"))
    with pytest.raises(SystemExit) as stopped:
        cli.run(module.main if name == "prune" else lambda: getattr(module, WORK.get(name, "run"))(config()))
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert re.search(rf"(--)?{setting.rstrip('s')}s? is {seed}; accepted is an integer from 0 to 2\^32 - 1\n", error)
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("seed", [True, 1.0, "1", None])
def test_what_is_no_integer_is_no_seed(seed) -> None:
    with pytest.raises(InputError, match="seed is "):
        check_seed(seed)
