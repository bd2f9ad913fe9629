"""How a command begins and ends: options from a dataclass, and one line where the input is bad, status 2."""

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
from rora_theory import cluster, extras
from rora_theory.errors import FailedError, InputError
from rora_theory.io import files
from rora_theory.runs import folder, software
from rora_theory.runs.reading import flat
from sims.common import answers, options, tables

Config = TypeVar("Config")

SHARED: Any = (
    (
        "config",
        Annotated[
            Path | None,
            arg(help="a YAML file of options; later files override earlier ones, the command line all"),
        ],
        None,
    ),
    (
        "json",
        Annotated[
            bool,
            tyro.conf.FlagCreatePairsOff,
            arg(help="print the answer, the tables' rows and the files as one JSON object, nothing else"),
        ],
        False,
    ),
    ("version", Annotated[bool, tyro.conf.FlagCreatePairsOff, arg(help="print versions and end")], False),
)
"""Options of every command beside its own."""

FORM = (
    tyro.conf.OmitArgPrefixes,
    tyro.conf.OmitSubcommandPrefixes,
    tyro.conf.SuppressFixed,
    tyro.conf.HelptextFromCommentsOff,
)
"""How options are named: without the names of the dataclasses that they are in. No comment is read as an option's help,
for which each file would be parsed at each call."""
_DATA = """.json, .jsonl, .parquet or .txt files, of the hub as hf://datasets/OWNER/NAME[@REVISION]/FILE; or a split, \
as FOLDER:train or hf://datasets/OWNER/NAME:train"""
Data = Annotated[tuple[str, ...], arg(help=_DATA)]
"""Training records, of any command that reads them."""
ModelName = Annotated[str, arg(help="a folder in Hugging Face layout, a .gguf file, a hub id or a built-in name")]
Revision = Annotated[str | None, arg(help="branch, tag or commit of a model on the hub")]
Out = Annotated[Path | None, arg(help="run folder; none is results/COMMAND/ID with ID from the arguments")]

PROGRAM: str | None = None
"""What the process was started as, for ``--help``; None is ``python -m NAME``."""

LARGEST = 2**63 - 1
"""Largest absolute value of an integer on a command line: what arrays and random keys hold. Options have their own."""

_LONGEST = 300
"""Letters of a word in a message; a longer one is a number of hundreds of digits or a name that no file can have."""

_WIDE = 10**6
"""Columns in which no message of the option parser is folded."""


def parse(config: type[Config], argv: Sequence[str] | None = None, *, description: str) -> Config:
    """Parse ``argv`` into the dataclass ``config``.

    Lists are separated by spaces (``--ranks 8 16 32``), names use hyphens, booleans are flags (``--merge``,
    ``--no-merge``), and ``--help`` is drawn from the attribute docstrings. Every command takes ``--config FILE.yaml``,
    whose entries are options by their names, once or several times (later files override earlier ones, and the command
    line overrides all), and ``--version``.

    Args:
      config: what the command line fills.
      argv: None is the process's own.
      description: of the command.

    Raises:
      InputError: an unknown option, a value that is missing or can't be read, a word that is not UTF-8, an
        integer that no array or key holds, or an ``out`` that can't be written to; names the file and the key where
        that stands in a file.
      SystemExit: after ``--help`` and ``--version``, with status 0.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError:
            raise InputError(f"{word!a} on the command line is not UTF-8; accepted are names in UTF-8") from None
    if "--version" in words:
        tell_versions()
        raise SystemExit(0)
    if {"-h", "--help"} & set(words):
        return _parse(config, words, description)
    known = options.of(config)
    options.check_words(words, known)
    words, read = options.expand(words, known)
    try:
        found = _parse(config, words, description)
        for name, value in flat(found).items():
            several = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else (value,)
            if large := [one for one in several if isinstance(one, int) and abs(one) > LARGEST]:
                option = name.replace("_", "-")
                raise InputError(f"--{option} is {large[0]}; accepted is an integer of at most {LARGEST:,}")
        if isinstance(out := getattr(found, "out", None), Path):
            files.check_folder(out)
            if not getattr(found, "list", False) and not hasattr(found, "processes"):  # which look on, or take part
                folder.check_free(out)
    except InputError as error:
        raise InputError(options.place(str(error), read)) from None
    if "--json" in words:
        answers.ask()
    return found


@functools.cache
def whole(config: type) -> Any:
    """A command's options and the shared ones as one dataclass, so that they stand in one list."""
    return dataclasses.make_dataclass(config.__name__, SHARED, bases=(config,), frozen=True, kw_only=True)


def fixed(config: type, *names: str) -> type:
    """A dataclass as ``config``, of which some fields are no options: they stay at their defaults."""
    hints, mark = typing.get_type_hints(config, include_extras=True), typing.cast(Any, tyro.conf.Fixed)
    fields = {field.name: copy.copy(field) for field in dataclasses.fields(config)}
    own = [(name, mark[hints[name]], fields[name]) for name in names]
    return dataclasses.make_dataclass(config.__name__, own, bases=(config,), frozen=True)


def tell_versions() -> None:
    """Print the versions of the package and of what its results depend on."""
    print(", ".join(" ".join(one) for one in software.versions().items()))


def _parse(config: Any, words: Sequence[str], description: str) -> Any:
    """What the option parser makes of the words; its box of an error becomes one line."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    said = io.StringIO()
    shown = io.TextIOWrapper(io.BytesIO(), encoding=getattr(sys.stdout, "encoding", None) or "utf-8")
    asked = {"-h", "--help"} & set(words)
    try:
        with (
            _columns(Console().width if asked else _WIDE),
            contextlib.redirect_stderr(said),
            contextlib.redirect_stdout(shown),
        ):
            found: Any = tyro.cli(
                whole(config),
                prog=PROGRAM or (f"python -m {spec.name}" if spec else None),
                args=words,
                description=description,
                config=FORM,
            )
    except SystemExit as stop:
        if not stop.code:
            shown.seek(0)
            tables.print_text(shown.read().rstrip())  # the option parser folds its boxes alone
            raise
        cause = stop.__context__  # a `__post_init__` says itself what it refuses
        while cause is not None and not isinstance(cause, InputError):
            cause = cause.__context__
        raise cause or InputError(_line(said.getvalue())) from None
    return config(**{field.name: getattr(found, field.name) for field in dataclasses.fields(config)})


@contextlib.contextmanager
def _columns(count: int) -> Iterator[None]:
    """The width that the option parser takes the terminal to have."""
    before = os.environ.pop("COLUMNS", None)
    os.environ["COLUMNS"] = str(count)
    try:
        yield
    finally:
        del os.environ["COLUMNS"]
        os.environ |= {} if before is None else {"COLUMNS": before}


_UNREAD = re.compile(r"(string to float: |invalid literal for int\(\) .*: |instantiated from \[)(?P<word>'[^']*')")
"""How the option parser says that a word is of no kind that an option takes."""


def _kinds(takes: str) -> str:
    """What an option takes: of the parser's ``{None,lora,rora}|FLOAT`` *lora, rora or a number*."""
    words = {"INT": "an integer", "FLOAT": "a number"}
    *first, last = dict.fromkeys(words.get(word, word) for word in re.findall(r"[\w-]+", takes) if word != "None")
    return " or ".join(filter(None, (", ".join(first), last)))


def _line(box: str) -> str:
    """One line of what the option parser says in a box: what is wrong, then the option's form or names like it."""
    rows = [line.strip("│|") for line in box.splitlines() if not line.startswith(("╭", "╰", "+"))]
    parts: list[list[str]] = [[]]
    for row in rows:
        if row.strip(" ─-"):
            parts[-1].append(row)
        elif row.strip():
            parts.append([])
    if "╭" not in box:  # in plain letters the title is a part of its own
        parts = parts[1:] or parts
    wrong = " ".join(" ".join(parts[0]).partition("Got errors:")[0].split()).rstrip(".")
    wrong = wrong.removeprefix("Error parsing ").replace(". Expected", "; accepted is")
    wrong, one, choices = wrong.partition("one of (")  # of a set, whose order is another each time
    wrong += one and "one of " + ", ".join(sorted(choices.rstrip(")").replace("'", "").split(", ")))
    if chosen := re.match(r"invalid choice ('.*') for argument '(--[\w-]+)'", wrong):
        wrong = f"{chosen[2]} is {chosen[1]}{wrong[chosen.end() :]}"
    form = [row.strip() for part in parts[1:] for row in part if row.startswith("     ") and row[5] != " "]
    option, _, takes = form[0].partition(" ") if form else ("", "", "")
    if "..." in takes and (commas := re.search(r"'([^' ]+,[^' ]+)'", wrong)):
        return f"{option} has {commas[0]}; accepted are values apart by spaces: {option} {commas[1].replace(',', ' ')}"
    if form and (unread := _UNREAD.search(wrong)):
        return f"{option} is {unread['word']}; accepted is {': '.join([_kinds(takes), *form[1:]])}"
    if form and "Argument helptext:" in box:
        wrong += f"; accepted is {': '.join(form)}"
    elif form and "Perhaps you meant:" in box:
        wrong += f", perhaps {', '.join(form)}"
    return wrong if "; accepted" in wrong else f"{wrong}; accepted is what --help lists"


def command(config: type[Config], work: Callable[[Config], object], description: str | None) -> Callable[..., None]:
    """A command's ``main``: parses the command line, or the words it is given, and does the work, see `run`."""

    def main(argv: Sequence[str] | None = None) -> None:
        run(lambda: work(parse(config, argv, description=(description or "").strip())))

    return main


def run(main: Callable[[], object]) -> None:
    """Run ``main``; what it can't do becomes one line on stderr and an exit status.

    Bad input and files that can't be used or written: 2; no memory: 2; `FailedError`: 1; Ctrl-C: 130; SIGTERM, what a
    cluster sends: 143. A run that is open by then is marked as failed or interrupted. Where nobody reads the output any
    more (``| head``), it ends without a word, with the 141 of a process that the closed pipe ends.
    """
    before = folder.count_open()
    _library.propagate = False  # a library may have given the root logger a handler, which would say it again
    try:
        with _interruptible(), answers.reported():
            try:
                main()
            except SystemExit:  # after --help
                sys.stdout.flush()
                raise
            sys.stdout.flush()
    except SystemExit:
        raise
    except BaseException as error:
        how, said, status = _ending(error)
        resumable = folder.count_open() > before
        folder.end_all(how, said, skip=before)
        if status is None:
            raise
        if said is not None:
            fail(said, status=status)
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left goes nowhere at the exit
        else:
            print(sims.STOPPED if resumable else sims.INTERRUPTED, file=sys.stderr)
        sys.exit(status)
    finally:
        _library.propagate = True
        folder.end_all("failed", skip=before)
        cluster.leave()


def _ending(error: BaseException) -> tuple[str, str | None, int | None]:
    """How a run ends that raised this, its line of error, and its exit status (128 and the signal's number where one
    ended it, as shells have it); no status for what is a fault of the program."""
    if isinstance(error, (InputError, FailedError)):
        return "failed", str(error), 1 if isinstance(error, FailedError) else 2
    if (message := extras.missing_message(error)) is not None:
        return "failed", message, 2
    if isinstance(error, BrokenPipeError):
        return "interrupted", None, 128 + signal.SIGPIPE
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", None, 128 + (signal.SIGTERM if _terminated else signal.SIGINT)
    if isinstance(error, OSError):
        accepted = "" if error.errno == errno.ENOSPC else "; accepted is a file or folder that can be used"
        return "failed", f"{error.filename or 'file'}: {error.strerror or error}{accepted}", 2
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)[:100]:  # JAX's word for it
        return "failed", f"out of memory ({error}); accepted is what fits: smaller sizes or fewer at once", 2
    return "failed", None, None


_terminated: list[int] = []
"""Not empty after SIGTERM, which is as Ctrl-C but for the exit status. Libraries that wait make another error of it."""


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM and Ctrl-C raise `KeyboardInterrupt` in the main thread while the block runs."""
    _terminated.clear()
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _: object) -> None:
        _terminated.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    if signal.getsignal(signal.SIGINT) is sims.stop:  # the command is imported: from here on a run is put away
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is sims.stop else before)


def tell(remarks: Sequence[str]) -> None:
    """Print what the user should know though the work goes on, a line each, on standard error."""
    for remark in remarks:
        print(f"note: {remark}", file=sys.stderr)


class _Notes(logging.Handler):
    """Tells what the library warns of, and prints what it says besides."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            tell([record.getMessage()])
        else:
            tables.print_text(record.getMessage())


_library = logging.getLogger("rora_theory")
_library.addHandler(_Notes())
_library.setLevel(logging.INFO)


def fail(message: str, *, status: int = 2) -> NoReturn:
    """Print one line ``error: ...`` on stderr and exit."""
    print("error: " + " ".join(map(_word, message.split())), file=sys.stderr)
    sys.exit(status)


def _word(word: str) -> str:
    """A word as `tables.printable` has it, and of a very long one the ends."""
    shown = tables.printable(word)
    return shown if len(shown) <= _LONGEST else f"{shown[: _LONGEST // 2]}...{shown[-_LONGEST // 4 :]}"
