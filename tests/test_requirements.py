"""The locked versions satisfy pyproject.toml on every supported Python."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PYTHONS = ("3.11", "3.12", "3.13")
LOCKS = {"all.txt": {"all"}, "test.txt": {"cluster", "docs", "finetune", "logging", "test"}}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def required(extras: set[str]) -> Iterator[Requirement]:
    """Return direct dependencies of the core and of the extras, which may name other extras."""
    texts = [*PROJECT["dependencies"], *(text for name in extras for text in PROJECT["optional-dependencies"][name])]
    for requirement in map(Requirement, texts):
        if canonicalize_name(requirement.name) == PROJECT["name"]:
            yield from required(requirement.extras)
        else:
            yield requirement


def locked(name: str) -> list[tuple[Requirement, list[str]]]:
    """Return pinned requirements of a lock file with their hashes."""
    text = (ROOT / "requirements" / name).read_text().replace("\\\n", " ")
    lines = [line.split("--hash=") for line in text.splitlines() if line and not line.startswith("#")]
    return [(Requirement(line[0]), [digest.strip() for digest in line[1:]]) for line in lines]


def versions(name: str, python: str) -> dict[str, str]:
    """Return locked versions by package on Linux."""
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.9",
        "sys_platform": "linux",
        "platform_machine": "x86_64",
        "platform_system": "Linux",
        "os_name": "posix",
        "platform_python_implementation": "CPython",
        "implementation_name": "cpython",
    }
    pins = [pin for pin, _ in locked(name) if pin.marker is None or pin.marker.evaluate(environment)]
    assert len({canonicalize_name(pin.name) for pin in pins}) == len(pins), "two versions of one package"
    return {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}


def unmet(name: str, python: str) -> list[str]:
    """Return the requirements that the lock does not satisfy."""
    pinned = versions(name, python)
    return [
        str(requirement)
        for requirement in required(LOCKS[name])
        if (version := pinned.get(canonicalize_name(requirement.name))) is None
        or not requirement.specifier.contains(version, prereleases=True)
    ]


@pytest.mark.parametrize("python", PYTHONS)
def test_the_locks_satisfy_pyproject_with_the_same_versions(python: str) -> None:
    for name in LOCKS:
        assert not unmet(name, python), "run .ci/lock"
    small, large = versions("test.txt", python), versions("all.txt", python)
    assert small.items() <= large.items()
    assert {"peft", "torch"} <= large.keys() - small.keys()


def test_a_missing_package_and_an_old_one_are_reported(monkeypatch) -> None:
    lacking = ["jax>=99", "package-that-is-not-locked"]
    monkeypatch.setitem(PROJECT, "dependencies", [*PROJECT["dependencies"], *lacking])
    assert unmet("test.txt", "3.11") == lacking


@pytest.mark.parametrize("name", LOCKS)
def test_every_pin_is_exact_and_has_hashes(name: str) -> None:
    for pin, hashes in locked(name):
        assert re.fullmatch(r"==[^=,*]+", str(pin.specifier)), pin
        assert hashes, pin
        assert all(re.fullmatch("sha256:[0-9a-f]{64}", digest) for digest in hashes), pin


def test_all_has_every_extra_that_users_need() -> None:
    extras = set(PROJECT["optional-dependencies"]) - {"all", "browser", "mutation", "peers"}
    (user_extras,) = map(Requirement, PROJECT["optional-dependencies"]["all"])
    assert user_extras.extras == extras
    assert extras - LOCKS["test.txt"] == {"torch"}


def test_the_lock_covers_the_oldest_supported_python() -> None:
    assert PROJECT["requires-python"] == f">={PYTHONS[0]}"
    assert f"--python-version {PYTHONS[0]} " in (ROOT / ".ci" / "lock").read_text()
