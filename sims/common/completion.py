"""Shell completion of ``rora``: a script with all commands and their options, written by tyro."""

import contextlib
import dataclasses
import importlib
import io
from collections.abc import Mapping
from typing import Annotated, Any, Union

import tyro

from rora_theory.errors import InputError
from sims.common import cli, help_texts

SHELLS = ("bash", "zsh")


def completion_script(shell: str, commands: Mapping[str, Mapping[str, str]]) -> str:
    """Return the completion script of a shell.

    Args:
      shell: Name of the shell, see `SHELLS`.
      commands: Descriptions of the commands by name, for each package. The commands of all packages but the first
        follow the package's name on the command line.

    Returns:
      The script, for the shell to source.

    Raises:
      InputError: If the shell is not supported.
    """
    if shell not in SHELLS:
        raise InputError(f"--print-completion must be {' or '.join(SHELLS)}, got {shell or 'nothing'}")
    (first_package, first_commands), *other_packages = commands.items()
    # One subcommand for each command, as in the program itself.
    choices = _configs(first_package, first_commands)
    for package, descriptions in other_packages:
        inner: Any = Union[tuple(_configs(package, descriptions))]  # noqa: UP007 (of a list)
        choices.append(_named(package, dataclasses.make_dataclass(package, [("name", inner)]), f"the {package}"))
    # tyro prints the script and exits; catch both.
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        union: Any = Union[tuple(choices)]  # noqa: UP007
        words = ["--tyro-write-completion", shell, "-"]
        tyro.cli(union, prog="rora", args=words, config=cli.PARSER_SETTINGS, registry=help_texts.registry)
    return text.getvalue()


def _configs(package: str, descriptions: Mapping[str, str]) -> list[Any]:
    return [
        _named(name, cli.with_shared_options(_options_class(f"{package}.{name}")), description)
        for name, description in descriptions.items()
    ]


def _options_class(name: str) -> type:
    """Return the dataclass of a command's options, which is named after its module."""
    return getattr(importlib.import_module(name), f"{name.rpartition('.')[2].title().replace('_', '')}Options")


def _named(name: str, config: type, description: str) -> Any:
    return Annotated[config, tyro.conf.subcommand(name, description=description, prefix_name=False)]
