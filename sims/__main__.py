"""All commands under one name: ``rora NAME ...`` is ``python -m sims.NAME ...``, ``rora figures NAME ...`` draws.

rora transfer --from-rank 16 --to-rank 128
rora figures norm_vs_rank RUN
"""

import ast
import importlib
import pkgutil
import runpy
import sys
from pathlib import Path

ROOM = "figures"


def names(package: str) -> dict[str, str]:
    """The commands of a package with what each says of itself, read without importing any of them."""
    found = {}
    for folder in importlib.import_module(package).__path__:
        for module in pkgutil.iter_modules([folder]):
            path = Path(folder) / f"{module.name}.py"
            if module.ispkg or module.name.startswith("_") or '__name__ == "__main__"' not in path.read_text("utf-8"):
                continue
            found[module.name] = (ast.get_docstring(ast.parse(path.read_bytes())) or "").split("\n")[0]
    return found


def main() -> None:
    """Hand the command line over to the command that its first word names."""
    from sims.common import cli, completion

    package, words = "sims", sys.argv[1:]
    if words[:1] == [ROOM]:
        package, words = ROOM, words[1:]
    commands = names(package)
    listed = commands | ({ROOM: "Plots of saved runs; rora figures lists them."} if package == "sims" else {})
    name = words[0].replace("-", "_") if words else "--help"
    if name in ("_h", "__help", "--help"):
        show(package, listed)
        return
    if name == "__version":
        cli.tell_versions()
        return
    if name == "__print_completion":
        every = {each: names(each) for each in ("sims", ROOM)}
        cli.run(lambda: print(completion.script(" ".join(words[1:]), every)))
        return
    if name not in commands:
        print(f"error: {words[0]} is no command; accepted are {', '.join(listed)}", file=sys.stderr)
        sys.exit(2)
    if Path(sys.argv[0]).stem == "rora":
        cli.PROGRAM = " ".join(["rora", *sys.argv[1 : len(sys.argv) - len(words) + 1]])
    sys.argv = [f"{package}.{name}", *words[1:]]
    runpy.run_module(f"{package}.{name}", run_name="__main__", alter_sys=True)


def show(package: str, commands: dict[str, str]) -> None:
    """Print the commands, each with its sentence."""
    from sims.common import tables

    start = "rora" if package == "sims" else f"rora {ROOM}"
    tables.print_table(
        f"{start} NAME --help says what a command takes.", ["command", "what it does"], commands.items(), left=2
    )


if __name__ == "__main__":
    main()
