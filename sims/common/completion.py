"""Completion of ``rora`` in a shell: a script of all commands and their options, which the option parser writes."""

import ast
import contextlib
import dataclasses
import importlib
import io
import re
from collections.abc import Mapping
from typing import Annotated, Any, Union

import tyro

from rora_theory.errors import InputError
from sims.common import cli

SHELLS = ("bash", "zsh")


def script(shell: str, commands: Mapping[str, Mapping[str, str]]) -> str:
    """The script that a shell reads.

    Args:
      shell: one of `SHELLS`.
      commands: of each package its commands, each with what it says of itself; those of another package than the first
        stand behind the package's name.

    Raises:
      InputError: another shell.
    """
    if shell not in SHELLS:
        raise InputError(f"--print-completion is {shell or 'empty'}; accepted are {', '.join(SHELLS)}")
    (first, own), *others = commands.items()
    choices = _configs(first, own)
    for package, names in others:
        inner: Any = Union[tuple(_configs(package, names))]  # noqa: UP007 (of a list)
        choices.append(_named(package, dataclasses.make_dataclass(package, [("name", inner)]), f"the {package}"))
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        every: Any = Union[tuple(choices)]  # noqa: UP007
        tyro.cli(every, prog="rora", args=["--tyro-write-completion", shell, "-"], config=cli.FORM)
    return re.sub("^COMPLETION_SPEC = (.*)", _mend, said.getvalue(), flags=re.M)


_CHOICES = re.compile(r"\[?\{([\w-]+(?:,[\w-]+)*)\}\|")
"""How the description of an option begins that takes one of some names or another value."""


def _mend(line: re.Match[str]) -> str:
    """The line of the script that lists all options, with names offered where other values are accepted too."""
    spec = ast.literal_eval(line[1])
    commands = [spec]
    while commands:
        command = commands.pop()
        commands += (command.get("subcommands") or {}).values()
        for option in command["options"]:
            description = option["description"]
            if not option.get("choices") and (choices := _CHOICES.match(description)):
                names = [name for name in choices[1].split(",") if name != "None"]
                option |= {"type": "choice", "choices": names} if names else {}
            # A shell takes each line of a description for a word to offer.
            option["description"] = description.replace("\n", " ")
    return f"COMPLETION_SPEC = {spec!r}"


def _configs(package: str, names: Mapping[str, str]) -> list[Any]:
    modules = {name: importlib.import_module(f"{package}.{name}") for name in names}
    return [_named(name, cli.whole(modules[name].Config), says) for name, says in names.items()]


def _named(name: str, config: type, says: str) -> Any:
    return Annotated[config, tyro.conf.subcommand(name, description=says, prefix_name=False)]
