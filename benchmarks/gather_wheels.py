"""The pure-Python wheels that benchmarks/gpu.py needs, for a machine that reaches no package index.

    python benchmarks/gather_wheels.py               where an index is reached: into .wheels, which git does not keep
    python benchmarks/gather_wheels.py --install     there: those whose package is missing; what is installed stays

Gathered are the core's and the extra `finetune`'s requirements and what the tests need, with what these need in turn,
as far as they are pure Python. Compiled ones (jax, numpy, scipy, ...) the machine has, or they are named as missing.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator
from email.parser import Parser
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".wheels"
PYTHON = "3.12"
TESTS = ("beartype", "hypothesis", "pytest")
PURE = ["--only-binary=:all:", "--no-deps", "--python-version", PYTHON, "--implementation", "py", "--abi", "none"]


def wanted() -> list[str]:
    """Requirements of the core, of the extra `finetune` and of the marked tests."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    tests = [one for one in project["optional-dependencies"]["test"] if name_of(one) in TESTS]
    return [*project["dependencies"], *project["optional-dependencies"]["finetune"], *tests]


def name_of(requirement: str) -> str:
    """A requirement's package, as an index spells it."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\s<>=!~;\[(]", requirement, maxsplit=1)[0]).lower()


def download(requirement: str, folder: Path) -> Path | None:
    """The newest pure wheel that meets a requirement; None where its wheels are compiled."""
    with tempfile.TemporaryDirectory(dir=folder) as own:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            *PURE,
            "--platform",
            "any",
            "-d",
            own,
            requirement,
        ]
        if subprocess.run(command, capture_output=True).returncode:
            return None
        (wheel,) = Path(own).iterdir()
        return wheel.rename(folder / wheel.name)


def needs(wheel: Path) -> Iterator[str]:
    """What a wheel requires on Linux at `PYTHON`, extras left out."""
    from packaging.requirements import Requirement

    with zipfile.ZipFile(wheel) as file:
        name = next(name for name in file.namelist() if name.endswith(".dist-info/METADATA"))
        told = Parser().parsestr(file.read(name).decode())
    environment = {"python_version": PYTHON, "sys_platform": "linux", "platform_system": "Linux", "extra": ""}
    for text in told.get_all("Requires-Dist", []):
        one = Requirement(text)
        if one.marker is None or one.marker.evaluate(environment):
            yield f"{one.name}{one.specifier}"


def gather(folder: Path) -> tuple[list[Path], list[str]]:
    """Download all; the wheels, and the packages that have no pure one."""
    folder.mkdir(exist_ok=True)
    waiting, seen = wanted(), set[str]()
    wheels, compiled = list[Path](), list[str]()
    while waiting:
        requirement = waiting.pop(0)
        if (name := name_of(requirement)) in seen:
            continue
        seen.add(name)
        if (wheel := download(requirement, folder)) is None:
            compiled.append(name)
        else:
            wheels.append(wheel)
            waiting += needs(wheel)
    return wheels, compiled


def missing(names: list[str]) -> list[str]:
    """Which packages are not installed."""
    found = []
    for name in names:
        try:
            distribution(name)
        except PackageNotFoundError:
            found.append(name)
    return found


def install(folder: Path) -> list[str]:
    """Install the wheels of packages that are missing here; their names."""
    wheels = {name_of(wheel.name.split("-")[0]): wheel for wheel in sorted(folder.glob("*.whl"))}
    names = missing(list(wheels))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--break-system-packages"]
    if names:
        subprocess.run([*command, *(str(wheels[name]) for name in names)], check=True)
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--install", action="store_true", help="install the wheels that were gathered")
    if parser.parse_args().install:
        print("installed:", ", ".join(install(FOLDER)) or "nothing")
        print("still missing:", ", ".join(missing([name_of(one) for one in wanted()])) or "nothing")
        return
    wheels, compiled = gather(FOLDER)
    size = sum(wheel.stat().st_size for wheel in wheels) / 1e6
    print(f"{len(wheels)} wheels, {size:.0f} MB, in {FOLDER}")
    print("compiled, to be there:", ", ".join(compiled))


if __name__ == "__main__":
    main()
