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
    from sims.common import cli

    # `rora figures NAME` runs a module of the other package.
    package, words = "sims", sys.argv[1:]
    if words[:1] == [FIGURES]:
        package, words = FIGURES, words[1:]
    commands = describe_commands(package)
    listed = commands | ({FIGURES: "Draw figures of saved runs; rora figures lists them."} if package == "sims" else {})
    name = words[0].replace("-", "_") if words else "--help"
    # Options of the program itself: the line above has replaced their hyphens.
    if name in ("_h", "__help", "--help"):
        print_commands(package, listed)
        return
    if name == "__version":
        cli.print_versions()
        return
    if name not in commands:
        print(f"error: unknown command {words[0]!r}; supported: {', '.join(listed)}", file=sys.stderr)
        sys.exit(2)
    # Run the module as `python -m` does.
    sys.argv = [f"{package}.{name}", *words[1:]]
    runpy.run_module(f"{package}.{name}", run_name="__main__", alter_sys=True)


def print_commands(package: str, commands: dict[str, str]) -> None:
    """Print the commands of a package with their descriptions."""
    from sims.common import tables

    program = "rora" if package == "sims" else f"rora {FIGURES}"
    title = f"{program} NAME --help lists the options of a command."
    tables.print_table(title, ["command", "description"], commands.items(), left=2)


if __name__ == "__main__":
    main()
