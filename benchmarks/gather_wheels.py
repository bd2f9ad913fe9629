"""Gather the pure-Python wheels that benchmarks/gpu.py needs on a machine without access to a package index.

    python benchmarks/gather_wheels.py               on a machine with an index: download into .wheels, ignored by git
    python benchmarks/gather_wheels.py --install     on the other machine: install what is missing, change nothing else

The wheels are those of the core's requirements, of the extra `finetune` and of the GPU tests, with their dependencies,
as far as they are pure Python. Compiled packages (jax, numpy, scipy, ...) must be installed on the other machine
already; those that are not are listed as missing.
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
WHEELS = ROOT / ".wheels"
PYTHON = "3.12"
"""Python version of the machine that the wheels are for."""
TEST_PACKAGES = ("beartype", "hypothesis", "pytest")
PURE_ONLY = ["--only-binary=:all:", "--no-deps", "--python-version", PYTHON, "--implementation", "py", "--abi", "none"]


def required_packages() -> list[str]:
    """Return the requirements of the core, of the extra `finetune` and of the GPU tests."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    tests = [requirement for requirement in extras["test"] if package_name(requirement) in TEST_PACKAGES]
    return [*project["dependencies"], *extras["finetune"], *tests]


def package_name(requirement: str) -> str:
    """Return the normalised name of a requirement's package, as an index spells it."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\s<>=!~;\[(]", requirement, maxsplit=1)[0]).lower()


def download(requirement: str, folder: Path) -> Path | None:
    """Download the newest pure wheel that meets a requirement, and return its path; None if its wheels are compiled."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            *PURE_ONLY,
            "--platform",
            "any",
            "-d",
            scratch,
            requirement,
        ]
        if subprocess.run(command, capture_output=True).returncode:
            return None
        (wheel,) = Path(scratch).iterdir()
        return wheel.rename(folder / wheel.name)


def dependencies(wheel: Path) -> Iterator[str]:
    """Yield the requirements of a wheel on Linux with the version `PYTHON`, without those of its extras."""
    from packaging.requirements import Requirement

    with zipfile.ZipFile(wheel) as file:
        name = next(name for name in file.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(file.read(name).decode())
    environment = {"python_version": PYTHON, "sys_platform": "linux", "platform_system": "Linux", "extra": ""}
    for text in metadata.get_all("Requires-Dist", []):
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate(environment):
            yield f"{requirement.name}{requirement.specifier}"


def gather(folder: Path) -> tuple[list[Path], list[str]]:
    """Download all wheels with their dependencies.

    Returns:
      The paths of the wheels, and the names of the packages without a pure wheel.
    """
    folder.mkdir(exist_ok=True)
    # Breadth first: each downloaded wheel adds its dependencies to the queue.
    queue, known = required_packages(), set[str]()
    wheels, compiled = list[Path](), list[str]()
    while queue:
        requirement = queue.pop(0)
        if (name := package_name(requirement)) in known:
            continue
        known.add(name)
        if (wheel := download(requirement, folder)) is None:
            compiled.append(name)
        else:
            wheels.append(wheel)
            queue += dependencies(wheel)
    return wheels, compiled


def missing_packages(names: list[str]) -> list[str]:
    """Return those of the packages that are not installed."""
    missing = []
    for name in names:
        try:
            distribution(name)
        except PackageNotFoundError:
            missing.append(name)
    return missing


def install(folder: Path) -> list[str]:
    """Install the wheels of the packages that are missing here, and return their names."""
    wheels = {package_name(wheel.name.split("-")[0]): wheel for wheel in sorted(folder.glob("*.whl"))}
    names = missing_packages(list(wheels))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--break-system-packages"]
    if names:
        subprocess.run([*command, *(str(wheels[name]) for name in names)], check=True)
    return names


def main() -> None:
    """Gather the wheels, or install them, and print what is missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--install", action="store_true", help="install the wheels that were gathered")
    if parser.parse_args().install:
        print("installed:", ", ".join(install(WHEELS)) or "nothing")
        names = [package_name(requirement) for requirement in required_packages()]
        print("still missing:", ", ".join(missing_packages(names)) or "nothing")
        return
    wheels, compiled = gather(WHEELS)
    size = sum(wheel.stat().st_size for wheel in wheels) / 1e6
    print(f"{len(wheels)} wheels, {size:.0f} MB, in {WHEELS}")
    print("compiled, to be there:", ", ".join(compiled))


if __name__ == "__main__":
    main()
