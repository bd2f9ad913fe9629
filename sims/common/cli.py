"""The beginning and the end of a command: options from a dataclass, and one line and status 2 for bad input."""

import contextlib
import copy
import dataclasses
import errno
import io
import logging
import os
import re
import signal
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import tyro
from rich.console import Console
from tyro.conf import arg

from rora_theory import extras
from rora_theory.errors import FailedError, InputError, shown
from rora_theory.runs import cluster, files, folder, software
from sims.common import answers, tables

Options = TypeVar("Options")

Data = Annotated[
    tuple[str, ...],
    arg(
        help="Training records: .json, .jsonl, .parquet or .txt files, or hf://datasets/OWNER/NAME[@REVISION]/FILE; or "
        "a split, FOLDER:train or hf://datasets/OWNER/NAME:train"
    ),
]
_model_help = arg(help="Model: a folder in Hugging Face layout, a .gguf file, a hub id or a built-in name")
ModelName = Annotated[str, _model_help]
OptionalModelName = Annotated[str | None, _model_help]
Revision = Annotated[str | None, arg(help="Branch, tag or commit of a model on the hub")]
Out = Annotated[Path | None, arg(help="Run folder; by default results/COMMAND/ID, with an ID derived from the options")]

INTERRUPTED = "Interrupted."
RESUMABLE = f"{INTERRUPTED} Run the same command again to resume."
"""Last line of a command that Ctrl-C or SIGTERM ends while it has an open run folder."""

REPEAT_SECONDS = 5.0
"""Time after which an interruption is repeated if the command goes on."""


@dataclasses.dataclass(frozen=True)
class SharedOptions:
    """Options of every command."""

    config: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    json: tyro.conf.FlagCreatePairsOff[bool] = False


SHARED_HELP = """Every command also has these options:
--config FILE.yaml reads options by their names; later files override earlier ones, the command line all files.
--json prints the answer, the rows of the tables and the paths of the files as one JSON object."""


def parse(config: type[Options], argv: Sequence[str] | None = None, *, description: str) -> Options:
    """Parse a command line into a dataclass with tyro.

    Lists are separated by spaces (``--ranks 8 16 32``), names use hyphens, booleans are flags (``--merge``,
    ``--no-merge``), and ``--help`` shows the attribute docstrings. `SHARED_HELP` describes the options of every
    command.

    Args:
      config: Dataclass of the options.
      argv: Words of the command line; by default, those of the process.
      description: Description of the command in ``--help``.

    Raises:
      InputError: If the dataclass refuses a value, or a file of options cannot be read.
      SystemExit: After ``--help``, with status 0; after an error of tyro, with status 2.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    shared, words = tyro.cli(SharedOptions, args=words, return_unknown_args=True, add_help=False)
    for path in reversed(shared.config):
        words += _read_options(path, words)
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            parsed = tyro.cli(
                config,
                prog=f"python -m {spec.name}" if spec else None,
                args=words,
                description=f"{description}\n\n{SHARED_HELP}",
                # Option names without the names of the dataclasses that contain them. For help from comments, tyro
                # would parse each source file at each call.
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.SuppressFixed, tyro.conf.HelptextFromCommentsOff),
            )
    except SystemExit as stop:
        # An InputError of a `__post_init__` is reported in one line, as those that are raised later.
        cause = stop.__context__
        while cause is not None and not isinstance(cause, InputError):
            cause = cause.__context__
        if cause is not None:
            raise with_options(cause, config) from None
        print(errors.getvalue(), end="", file=sys.stderr)
        raise
    if shared.json:
        answers.collect_json()
    return parsed


def _read_options(path: Path, words: Sequence[str]) -> Iterator[str]:
    """Yield the words of the command line that set the options of a file, without those that ``words`` set."""
    accepted = "a YAML file of options by their names"
    text = files.read_text(path, accepted=accepted)
    entries = files.parse_yaml(text, where=str(path), accepted=accepted)
    if not isinstance(entries, dict):
        raise InputError(f"{path}: must be a mapping from options to values, got {shown(entries)}")
    overriding_options = {word[2:].partition("=")[0].replace("_", "-") for word in words if word.startswith("--")}
    for key, value in entries.items():
        option = str(key).replace("_", "-")
        if {option, f"no-{option}"} & overriding_options:
            continue
        if isinstance(value, bool):
            yield f"--{option}" if value else f"--no-{option}"
        elif isinstance(value, dict | list):
            items = value if isinstance(value, list) else [part for pair in value.items() for part in pair]
            yield from (f"--{option}", *map(str, items))
        else:
            yield f"--{option}={value}"  # one word, as a value may begin with a hyphen


def without_options(config: type, *names: str) -> type:
    """Return a dataclass like ``config`` in which some fields are not options and keep their defaults."""
    hints, mark = typing.get_type_hints(config, include_extras=True), typing.cast(Any, tyro.conf.Fixed)
    fields = {field.name: copy.copy(field) for field in dataclasses.fields(config)}
    fixed_fields = [(name, mark[hints[name]], fields[name]) for name in names]
    return dataclasses.make_dataclass(config.__name__, fixed_fields, bases=(config,), frozen=True)


def print_versions() -> None:
    """Print the versions of the package and of the packages that its results depend on."""
    print(", ".join(" ".join(version) for version in software.versions().items()))


def command(config: type[Options], work: Callable[[Options], object], description: str | None) -> Callable[..., None]:
    """Return the ``main`` of a command, which parses its arguments or the command line, and runs the command.

    Returns:
      The function, see `run_command`.
    """

    def parse_and_work(argv: Sequence[str] | None) -> None:
        parsed = parse(config, argv, description=(description or "").strip())
        try:
            work(parsed)
        except InputError as error:
            raise with_options(error, config) from None

    def main(argv: Sequence[str] | None = None) -> None:
        run_command(lambda: parse_and_work(argv))

    return main


def with_options(error: InputError, config: type) -> InputError:
    """Write the names of arguments in an error as options: at its beginning, after a verb, or of several words."""
    names = set(_field_names(config))

    def as_option(match: re.Match[str]) -> str:
        name = match[0]
        is_alone = match.start() == 0 or match.string[: match.start()].endswith(("without ", "Add ", "emove "))
        is_argument = name in names and ("_" in name or is_alone)
        return f"--{name.strip('_').replace('_', '-')}" if is_argument else name

    error.args = (re.sub(r"(?<![\w./'\"-])[a-zA-Z_]+(?![\w./'\":(-])", as_option, str(error)), *error.args[1:])
    return error


def _field_names(config: type) -> Iterator[str]:
    """Yield the names of the fields of a dataclass and of all dataclasses nested in it."""
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        if dataclasses.is_dataclass(kind := hints[field.name]):
            yield from _field_names(typing.cast(type, kind))
        else:
            yield field.name


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which a cluster sends."""


def _is_program() -> bool:
    """Return whether the process runs one command, so that it may end without Python's own clean-up."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec is not None and spec.name.split(".")[0] in ("sims", "figures")


def _stop(number: int, _: object) -> NoReturn:
    """Handle SIGINT and SIGTERM."""
    # Without an open run there is nothing to save.
    if _is_program() and not folder.count_open():
        _end(128 + number, INTERRUPTED)
    # Libraries discard an exception that reaches their finalizers or attribute look-ups: raise it until the run ends.
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGALRM, lambda *arguments: _stop(number, arguments))
        signal.setitimer(signal.ITIMER_REAL, REPEAT_SECONDS)
    raise _Terminated if number == signal.SIGTERM else KeyboardInterrupt


def _end(status: int, message: str) -> NoReturn:
    """Print a line and end the process at once.

    Python's clean-up after an interruption takes up to 20 s with PyTorch and JAX, and crashes if one of their libraries
    was loaded in part.
    """
    stream = sys.__stderr__ or sys.stderr  # the process's own: a library or the parser may have redirected the other
    if stream.isatty():
        Console(file=stream).show_cursor()  # a progress bar hides it
    print(message, file=stream, flush=True)
    sys.stdout.flush()
    os._exit(status)


def run_command(main: Callable[[], object]) -> None:
    """Run a command; a failure becomes one line on standard error and an exit status.

    The status is 2 for bad input, for files that cannot be used and for lack of memory, 1 for `FailedError`, 130 for
    Ctrl-C and 143 for SIGTERM. An open run is marked as failed or interrupted. If the reader of the output has gone
    (``| head``), the command ends silently with 141, the status of a process that a closed pipe ends.
    """
    open_before = folder.count_open()
    _library.propagate = False  # another library's handler of the root logger would print each note again
    handlers_before = {signal.SIGTERM: signal.signal(signal.SIGTERM, _stop)}
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not ignored, as in the background
        handlers_before[signal.SIGINT] = signal.signal(signal.SIGINT, _stop)
    try:
        with answers.reporting():
            main()
            sys.stdout.flush()
    except SystemExit:
        raise
    except BaseException as error:
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)
        # Mark the open run first, so that it is closed whatever happens to the output.
        run_status, message, exit_status = _outcome(error)
        is_resumable = folder.count_open() > open_before
        folder.end_all(run_status, message, skip=open_before)
        # A bug of the program: show its traceback.
        if exit_status is None:
            raise
        if message is not None:
            fail(message, status=exit_status)
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the rest is discarded at exit
        else:
            line = RESUMABLE if is_resumable else INTERRUPTED
            if _is_program():
                cluster.leave()
                _end(exit_status, line)
            print(line, file=sys.stderr)
        sys.exit(exit_status)
    finally:
        for number, handler in handlers_before.items():
            signal.signal(number, handler)
        _library.propagate = True
        folder.end_all("failed", skip=open_before)
        cluster.leave()


def _outcome(error: BaseException) -> tuple[str, str | None, int | None]:
    """Return the status of the run, the error message and the exit status for an exception.

    The exit status of a signal is 128 and its number, as in shells. A bug of the program has no exit status.
    """
    if isinstance(error, (InputError, FailedError)):
        return "failed", str(error), 1 if isinstance(error, FailedError) else 2
    # A package of an optional extra is missing.
    if (message := extras.missing_message(error)) is not None:
        return "failed", message, 2
    if isinstance(error, BrokenPipeError):
        return "interrupted", None, 128 + signal.SIGPIPE
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", None, 128 + (signal.SIGTERM if isinstance(error, _Terminated) else signal.SIGINT)
    if isinstance(error, OSError):
        advice = "" if error.errno == errno.ENOSPC else " Pass a file or folder that can be used."
        return "failed", f"{error.filename or 'file'}: {error.strerror or error}.{advice}", 2
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)[:100]:  # the status in JAX's message
        return "failed", f"out of memory ({error}). Use smaller sizes, or fewer at once.", 2
    return "failed", None, None


def print_notes(notes: Sequence[str]) -> None:
    """Print notes that do not stop the work, one per line, on standard error."""
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


class _Notes(logging.Handler):
    """Handler that prints the library's warnings as notes, and its other messages as text."""

    def emit(self, record: logging.LogRecord) -> None:

        if record.levelno >= logging.WARNING:
            print_notes([record.getMessage()])
        else:
            tables.print_text(record.getMessage())


_library = logging.getLogger("rora_theory")
_library.addHandler(_Notes())
_library.setLevel(logging.INFO)


def fail(message: str, *, status: int = 2) -> NoReturn:
    """Print one line ``error: ...`` on standard error and exit.

    Raises:
      SystemExit: Always.
    """
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(status)
