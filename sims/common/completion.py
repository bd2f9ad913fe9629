"""Completion of ``rora`` in a shell: a script of all commands and their options, which the option parser writes."""

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
    # A shell takes each line of a description for a word to offer.
    return re.sub("^COMPLETION_SPEC = .*", lambda spec: spec[0].replace("\\n", " "), said.getvalue(), flags=re.M)


def _configs(package: str, names: Mapping[str, str]) -> list[Any]:
    modules = {name: importlib.import_module(f"{package}.{name}") for name in names}
    return [_named(name, cli.whole(modules[name].Config), says) for name, says in names.items()]


def _named(name: str, config: type, says: str) -> Any:
    return Annotated[config, tyro.conf.subcommand(name, description=says, prefix_name=False)]
