"""Run a command: ``rora NAME ...`` is ``python -m sims.NAME ...``, and ``rora figures NAME ...`` draws a figure.

rora transfer --from-rank 16 --to-rank 128
rora figures norm_vs_rank RUN
"""

import ast
import importlib
import pkgutil
import runpy
import sys
from pathlib import Path

from rora_theory.runs import software
from sims.common import tables

FIGURES = "figures"


def describe_commands(package: str) -> dict[str, str]:
    """Return the first sentence of the docstring of each command in a package, without importing the commands."""
    descriptions = {}
    for folder in importlib.import_module(package).__path__:
        for module in pkgutil.iter_modules([folder]):
            path = Path(folder) / f"{module.name}.py"
            if module.ispkg or module.name.startswith("_") or '__name__ == "__main__"' not in path.read_text("utf-8"):
                continue
            descriptions[module.name] = (ast.get_docstring(ast.parse(path.read_bytes())) or "").split("\n")[0]
    return descriptions


def main() -> None:
    """Run the command that the first word of the command line names."""
    # `rora figures NAME` runs a module of the other package.
    package, program, words = "sims", "rora", sys.argv[1:]
    if words[:1] == [FIGURES]:
        package, program, words = FIGURES, f"rora {FIGURES}", words[1:]
    commands = describe_commands(package)
    listed = commands | ({FIGURES: "Draw figures of saved runs; rora figures lists them."} if package == "sims" else {})
    word = words[0] if words else "--help"
    name = word.replace("-", "_")
    if name in commands:
        # Run the module as `python -m` does.
        sys.argv = [f"{package}.{name}", *words[1:]]
        runpy.run_module(f"{package}.{name}", run_name="__main__", alter_sys=True)
    elif word in ("-h", "--help"):
        tables.print_table(
            f"{program} NAME --help lists the options of a command.", ["command", "description"], listed.items(), left=2
        )
    elif word == "--version":
        print(", ".join(" ".join(version) for version in software.versions().items()))
    else:
        print(f"error: unknown command {word!r}; supported: {', '.join(listed)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
