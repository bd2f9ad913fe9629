"""The beginning and the end of a command: options from a dataclass, and one line and status 2 for bad input."""

import contextlib
import copy
import dataclasses
import errno
import functools
import io
import logging
import os
import re
import signal
import sys
import threading
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import tyro
from rich.console import Console
from tyro.conf import arg

import sims
from rora_theory import extras
from rora_theory.errors import FailedError, InputError
from rora_theory.runs import cluster, files, folder, software
from rora_theory.runs.reading import flatten
from sims.common import answers, help_texts, options, tables

Options = TypeVar("Options")

SHARED_OPTIONS: Any = (
    (
        "config",
        Annotated[
            Path | None,
            arg(help="YAML file of options; later files override earlier ones, the command line overrides all files"),
        ],
        None,
    ),
    (
        "json",
        Annotated[
            bool,
            tyro.conf.FlagCreatePairsOff,
            arg(help="Print the answer, the rows of the tables and the paths of the files as one JSON object"),
        ],
        False,
    ),
    ("version", Annotated[bool, tyro.conf.FlagCreatePairsOff, arg(help="Print the versions and exit")], False),
)
"""Options of every command."""

PARSER_SETTINGS = (
    tyro.conf.OmitArgPrefixes,
    tyro.conf.OmitSubcommandPrefixes,
    tyro.conf.SuppressFixed,
    tyro.conf.HelptextFromCommentsOff,
)
"""Settings of the option parser: option names without the names of the dataclasses that contain them, and no help from
comments, for which tyro would parse each source file at each call."""

Data = Annotated[
    tuple[str, ...],
    arg(
        help="Training records: .json, .jsonl, .parquet or .txt files, or hf://datasets/OWNER/NAME[@REVISION]/FILE; or "
        "a split, FOLDER:train or hf://datasets/OWNER/NAME:train"
    ),
]
ModelName = Annotated[
    str, arg(help="Model: a folder in Hugging Face layout, a .gguf file, a hub id or a built-in name")
]
Revision = Annotated[str | None, arg(help="Branch, tag or commit of a model on the hub")]
Out = Annotated[Path | None, arg(help="Run folder; by default results/COMMAND/ID, with an ID derived from the options")]

PROGRAM: str | None = None
"""Name of the program in ``--help``; by default ``python -m NAME``."""

MAX_INTEGER = 2**63 - 1
"""Largest absolute value of an integer option: the range of arrays and random keys. Most options have lower limits."""

_MAX_WORD_LENGTH = 300
"""Length beyond which a word of an error message is shortened."""

_UNFOLDED = 10**6
"""Width in columns at which no error message of the option parser is folded."""


def parse(config: type[Options], argv: Sequence[str] | None = None, *, description: str) -> Options:
    """Parse a command line into a dataclass.

    Lists are separated by spaces (``--ranks 8 16 32``), names use hyphens, booleans are flags (``--merge``,
    ``--no-merge``), and ``--help`` shows the attribute docstrings. Every command also has ``--version``, ``--json`` and
    ``--config FILE.yaml``, a file of options by name. ``--config`` may be repeated: later files override earlier ones,
    and the command line overrides all files.

    Args:
      config: Dataclass of the options.
      argv: Words of the command line; by default, those of the process.
      description: Description of the command in ``--help``.

    Returns:
      The dataclass with the parsed options.

    Raises:
      InputError: If an option is unknown, its value is missing or invalid, a word is not UTF-8, an integer is too
        large for an array, or ``out`` cannot be written. The message names the file and the key of an option that a
        file sets.
      SystemExit: After ``--help`` and ``--version``, with status 0.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError:
            raise InputError(f"{word!a} on the command line is not valid UTF-8. Use names in UTF-8.") from None
    if "--version" in words:
        print_versions()
        raise SystemExit(0)
    if {"-h", "--help"} & set(words):
        return _parse(config, words, description)
    # Replace --config FILE by the options in the file, then parse all options together.
    known = options.options_of(config)
    options.check_words(words, known)
    words, option_files = options.expand(words, known)
    try:
        parsed = _parse(config, words, description)
        _check_integers(parsed)
        # Refuse an unusable run folder before any work. A command that lists a run, or that is one of several
        # processes of it, may read a folder that is in use.
        if isinstance(out := getattr(parsed, "out", None), Path):
            files.check_folder(out)
            if not getattr(parsed, "list", False) and not hasattr(parsed, "processes"):
                folder.check_free(out)
    except InputError as error:
        raise InputError(options.add_place(str(error), option_files, known)) from None
    if "--json" in words:
        answers.collect_json()
    return parsed


def _check_integers(config: Any) -> None:
    for name, value in flatten(config).items():
        values = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else (value,)
        for number in values:
            if isinstance(number, int) and abs(number) > MAX_INTEGER:
                option = name.replace("_", "-")
                raise InputError(f"--{option} must be an integer of at most {MAX_INTEGER:,}, got {number}")


@functools.cache
def with_shared_options(config: type) -> Any:
    """Return a dataclass of a command's options and the shared ones, which ``--help`` shows in one list."""
    return dataclasses.make_dataclass(config.__name__, SHARED_OPTIONS, bases=(config,), frozen=True, kw_only=True)


def without_options(config: type, *names: str) -> type:
    """Return a dataclass like ``config`` in which some fields are not options and keep their defaults."""
    hints, mark = typing.get_type_hints(config, include_extras=True), typing.cast(Any, tyro.conf.Fixed)
    fields = {field.name: copy.copy(field) for field in dataclasses.fields(config)}
    fixed_fields = [(name, mark[hints[name]], fields[name]) for name in names]
    return dataclasses.make_dataclass(config.__name__, fixed_fields, bases=(config,), frozen=True)


def print_versions() -> None:
    """Print the versions of the package and of the packages that its results depend on."""
    print(", ".join(" ".join(version) for version in software.versions().items()))


def _parse(config: Any, words: Sequence[str], description: str) -> Any:
    """Parse words with tyro; an error of tyro becomes an `InputError` of one line."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    wants_help = bool({"-h", "--help"} & set(words))
    # tyro draws its boxes in the encoding of standard output; `_one_line` expects the frame in UTF-8.
    encoding = getattr(sys.stdout, "encoding", None) if wants_help else None
    out, err = io.TextIOWrapper(io.BytesIO(), encoding=encoding or "utf-8"), io.StringIO()
    try:
        with (
            _columns(Console().width if wants_help else _UNFOLDED),
            contextlib.redirect_stderr(err),
            contextlib.redirect_stdout(out),
        ):
            parsed: Any = tyro.cli(
                with_shared_options(config),
                prog=PROGRAM or (f"python -m {spec.name}" if spec else None),
                args=words,
                description=description,
                config=PARSER_SETTINGS,
                registry=help_texts.registry,
            )
    except SystemExit as stop:
        if not stop.code:
            out.seek(0)
            # tyro folds the boxes, but not the description, and doubles some of its blank lines.
            tables.print_text(re.sub(r"\n{3,}", "\n\n", out.read().rstrip()))
            raise
        # An InputError of a `__post_init__` is reported unchanged.
        cause = stop.__context__
        while cause is not None and not isinstance(cause, InputError):
            cause = cause.__context__
        raise cause or InputError(_one_line(err.getvalue())) from None
    return config(**{field.name: getattr(parsed, field.name) for field in dataclasses.fields(config)})


@contextlib.contextmanager
def _columns(count: int) -> Iterator[None]:
    """Set the width that tyro assumes for the terminal."""
    before = os.environ.pop("COLUMNS", None)
    os.environ["COLUMNS"] = str(count)
    try:
        yield
    finally:
        del os.environ["COLUMNS"]
        os.environ |= {} if before is None else {"COLUMNS": before}


def _one_line(box: str) -> str:
    """Return an error message of tyro without its frame, its title and the attempts with each type, as one line."""
    text = "\n".join(row.strip("│ ") for row in box.splitlines() if not row.startswith(("╭", "╰")))
    text = re.sub(r"\n\nGot errors:.*?(?=\n─)", "", text, flags=re.DOTALL)
    paragraphs = [" ".join(paragraph.split()).rstrip(".") for paragraph in re.split(r"\n─+\n", text)]
    return ". ".join(paragraphs) + "."


def command(config: type[Options], work: Callable[[Options], object], description: str | None) -> Callable[..., None]:
    """Return the ``main`` of a command, which parses its arguments or the command line, and runs the command.

    Args:
      config: Dataclass of the options.
      work: Function that does the work.
      description: Description of the command in ``--help``.

    Returns:
      The function, see `run_command`.
    """

    def main(argv: Sequence[str] | None = None) -> None:
        run_command(lambda: work(parse(config, argv, description=(description or "").strip())))

    return main


def run_command(main: Callable[[], object]) -> None:
    """Run a command; a failure becomes one line on standard error and an exit status.

    The status is 2 for bad input, for files that cannot be used and for lack of memory, 1 for `FailedError`, 130 for
    Ctrl-C and 143 for SIGTERM, which a cluster sends. An open run is marked as failed or interrupted. If the reader of
    the output has gone (``| head``), the command ends silently with 141, the status of a process that a closed pipe
    ends.

    Args:
      main: Function that does the work.
    """
    open_before = folder.count_open()
    _library.propagate = False  # another library's handler of the root logger would print each note again
    try:
        with _interruptible(), answers.reporting():
            try:
                main()
            except SystemExit:  # after --help
                sys.stdout.flush()
                raise
            sys.stdout.flush()
    except SystemExit:
        raise
    except BaseException as error:
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
            print(sims.STOPPED if is_resumable else sims.INTERRUPTED, file=sys.stderr)
        sys.exit(exit_status)
    finally:
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
        return "interrupted", None, 128 + (signal.SIGTERM if _terminated else signal.SIGINT)
    if isinstance(error, OSError):
        advice = "" if error.errno == errno.ENOSPC else " Pass a file or folder that can be used."
        return "failed", f"{error.filename or 'file'}: {error.strerror or error}.{advice}", 2
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)[:100]:  # the status in JAX's message
        return "failed", f"out of memory ({error}). Use smaller sizes, or fewer at once.", 2
    return "failed", None, None


_terminated: list[int] = []
"""Not empty after SIGTERM. Libraries that wait may replace the exception that the signal raises."""


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Raise `KeyboardInterrupt` in the main thread on SIGTERM and Ctrl-C while the block runs."""
    _terminated.clear()
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _: object) -> None:
        _terminated.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    if signal.getsignal(signal.SIGINT) is sims.stop:  # imports are done: from here on the run folder is closed
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is sims.stop else before)


def print_notes(notes: Sequence[str]) -> None:
    """Print notes that do not stop the work, one per line, on standard error."""
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


class _Notes(logging.Handler):
    """Handler that prints the library's warnings as notes, and its other messages as text."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a message of the library."""
        if record.levelno >= logging.WARNING:
            print_notes([record.getMessage()])
        else:
            tables.print_text(record.getMessage())


_library = logging.getLogger("rora_theory")
_library.addHandler(_Notes())
_library.setLevel(logging.INFO)


def fail(message: str, *, status: int = 2) -> NoReturn:
    """Print one line ``error: ...`` on standard error and exit.

    Args:
      message: Error message.
      status: Exit status.

    Raises:
      SystemExit: Always.
    """
    print("error: " + " ".join(map(_shorten, message.split())), file=sys.stderr)
    sys.exit(status)


def _shorten(word: str) -> str:
    """Return a word as a terminal can show it; a very long word is reduced to its two ends."""
    shown = tables.printable(word)
    if len(shown) <= _MAX_WORD_LENGTH:
        return shown
    return f"{shown[: _MAX_WORD_LENGTH // 2]}...{shown[-_MAX_WORD_LENGTH // 4 :]}"
