"""Start and end of commands: one line for a refused option, none for a closed pipe, one for Ctrl-C."""

import logging
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from support import commands
from support.options import Inner, Options

from rora_theory.errors import InputError
from sims.common import cli


@dataclass(frozen=True)
class Checked:
    """Options with a range."""

    rank: int = 1
    """of the adapter"""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError(f"--rank must be at least 1, got {self.rank} [x]")


@dataclass(frozen=True)
class Checks:
    """Nested options with ranges."""

    part: Checked = field(default_factory=Checked)
    """a part"""


@dataclass(frozen=True)
class Parent:
    """Options with a nested part whose defaults differ from the part's own."""

    inner: Inner = field(default_factory=lambda: Inner(batch_size=3))


def parse(*words: str, config: Any = Options) -> Any:
    return cli.parse(config, list(words), description="")


def test_valid_options_are_parsed() -> None:
    assert parse("--data", "a", "b", "--limit", "3", "--out", "new/run") == Options(
        ("a", "b"), limit=3, out=Path("new/run")
    )
    assert parse("--data", "a,b.json", "--out", "new,run").data == ("a,b.json",), "a comma in a name is not a list"


def test_a_parent_sets_the_defaults_of_a_part() -> None:
    assert parse(config=Parent) == Parent()
    assert parse("--steps", "2", config=Parent).inner == Inner(batch_size=3, steps=2)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--limit", "x"], ["--limit", "'x'", "most items"]),
        (["--ranks", "8", "1.5"], ["--ranks", "'1.5'", "ranks of the adapter"]),
        (["--ranks", "8,16"], ["--ranks", "'8,16'"]),
        (["--optimizer", "sgdd"], ["--optimizer", "'sgdd'", "adam"]),
        (["--rank", "8"], ["--rank, 8", "--ranks"]),
        (["--merge", "True"], ["True"]),
        (["--config"], ["--config", "1 values"]),
    ],
)
def test_invalid_options_are_named_with_status_2(
    words: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse("--data", "a", *words)
    out, err = capsys.readouterr()
    assert out == ""
    assert [part for part in parts if part not in err] == [], err


def parsed(tmp_path: Path, text: str, *words: str) -> Options:
    (tmp_path / "run.yaml").write_text(text)
    return parse("--config", str(tmp_path / "run.yaml"), *words)


def test_a_file_gives_options_and_the_command_line_overrides_it(tmp_path: Path) -> None:
    text = """
    data: [a b.json, c]
    ranks: [8, 16]
    limit: null
    merge: true
    remat: mlp
    batch-size: 4
    ranks_of: {q: 2, k: 3}
    steps: 7
    """
    full = Options(("a b.json", "c"), (8, 16), merge=True, remat="mlp", inner=Inner(4, 7, {"q": 2, "k": 3}))
    assert parsed(tmp_path, text) == full
    overridden = parsed(tmp_path, text, "--steps=9", "--no-merge", "--batch_size", "5", "--ranks", "1")
    assert overridden == replace(full, ranks=(1,), merge=False, inner=replace(full.inner, steps=9, batch_size=5))
    assert parsed(tmp_path, "limit: 3\n", "--data", "a").limit == 3
    assert parsed(tmp_path, "merge: false\n", "--data", "a", "--merge").merge
    assert not parsed(tmp_path, "accuracy: false\n", "--data", "a").accuracy
    assert parsed(tmp_path, "limit: x\n", "--data", "a", "--limit", "3").limit == 3


def test_later_files_override_earlier_ones_and_the_command_line_overrides_all(tmp_path: Path) -> None:
    for name, text in (("a", "data: [x]\nlimit: 1\nsteps: 2\nmerge: true"), ("b", "limit: 3\nmerge: false")):
        (tmp_path / f"{name}.yaml").write_text(text)
    first, second = (str(tmp_path / f"{name}.yaml") for name in "ab")
    merged = Options(("x",), limit=3, merge=False, inner=Inner(steps=9))
    assert parse("--config", first, "--steps", "9", f"--config={second}") == merged
    swapped = replace(merged, limit=1, merge=True)
    assert parse("--config", second, "--config", first, "--steps=9") == swapped


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("epochs: 3", "--epochs"),
        ("limit: x", "'x'"),
        ("ranks: [8, 1.5]", "'1.5'"),
        ("optimizer: sgdd", "'sgdd'"),
        ("merge: maybe", "maybe"),
        ("limit: true", "--limit"),
        ("steps: [1, 2]", "2"),
    ],
)
def test_invalid_options_in_a_file_are_refused_like_those_of_the_command_line(
    tmp_path: Path, text: str, part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        parsed(tmp_path, text, "--data", "a")
    assert part in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    ["steps: 3\nlimit: 1\nsteps: 3", "[1, 2]", "", "data: [", "data: !!python/name:os.system", "steps: !!int ''"],
)
def test_a_file_that_is_no_mapping_in_yaml_is_named(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(str(tmp_path / 'run.yaml'))}: "):
        parsed(tmp_path, text, "--data", "a")
    with pytest.raises(InputError, match=r"none\.yaml"):
        parse("--config", str(tmp_path / "none.yaml"))


def test_ranges_are_checked_when_the_configuration_is_created() -> None:
    """The message of `__post_init__` is printed unchanged, for the command's own configuration and for a nested one."""
    for config in (Checked, Checks):
        with pytest.raises(InputError, match=r"^--rank must be at least 1, got -1 \[x\]$"):
            parse("--rank", "-1", config=config)


def test_a_missing_option_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse()
    assert "--data [STR [STR ...]]" in capsys.readouterr().err


def test_help_has_the_options_of_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        parse("--help")
    out = capsys.readouterr().out
    assert all(word in out for word in ("--config FILE.yaml", "--json", "--limit", "most items"))


def test_library_messages_are_printed_once_with_other_log_handlers(capsys: pytest.CaptureFixture[str]) -> None:
    other = logging.StreamHandler(sys.stderr)  # as absl gives the root logger one
    logging.getLogger().addHandler(other)
    try:
        cli.run_command(lambda: logging.getLogger("rora_theory.runs").warning("two versions"))
    finally:
        logging.getLogger().removeHandler(other)
    assert capsys.readouterr().err == "note: two versions\n"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (InputError("rank is 7;\n bad"), "error: rank is 7; bad\n"),
        (FileNotFoundError(2, "No such file", "a.json"), "error: a.json: No such file. "),
        (MemoryError("Unable to allocate 8 TiB"), "error: out of memory (Unable to allocate 8 TiB). "),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory"), "error: out of memory (RESOURCE_EXHAUSTED: Out of memory)"),
        (
            RuntimeError("CUDA out of memory.\nmore"),
            "error: out of memory (CUDA out of memory.)",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_failures_are_one_line(error: BaseException, line: str) -> None:
    def work() -> None:
        raise error

    assert commands.refusal(commands.run_command(lambda _: cli.run_command(work))).startswith(line)


@pytest.mark.parametrize(
    ("message", "printed"),
    [
        ("axes must be one of batch_size, warmup, got 'foo'", "--axes must be one of batch_size, warmup, got 'foo'"),
        ("steps are too many. Lower batch_size.", "--steps are too many. Lower --batch-size."),
        ("model/batch_size.json has no axes", "model/batch_size.json has no axes"),
    ],
)
def test_arguments_are_named_as_options_and_values_are_not(message: str, printed: str) -> None:
    @dataclass(frozen=True)
    class Config:
        batch_size: int = 1
        steps: int = 1
        axes: str = ""

    assert str(cli.with_options(InputError(message), Config)) == printed


@pytest.mark.parametrize("words", ["print('x' * 10**6)", "print('x')"])
def test_a_closed_pipe_ends_the_command_silently(words: str) -> None:
    """The pipe closes as in ``| head``, during the output or after the end."""
    code = f"from sims.common import cli\nfrom support.options import Options\ncli.run_command(lambda: {words})"
    read, write = os.pipe()
    os.close(read)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUNBUFFERED": ""}
    done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, env=environment)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


STOPPED_PROGRAM = """
import atexit, os, signal, sys, time
from pathlib import Path
from rora_theory.runs.folder import RunFolder
from sims.common import cli

def work():
    if len(sys.argv) > 1:
        RunFolder.open("stopped", {}, out=Path(sys.argv[1]))
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(100)

signal.signal(signal.SIGINT, signal.default_int_handler)
atexit.register(os.abort)  # a library that crashes while Python cleans up
cli._module_of_process = lambda: "sims.stopped"
cli.run_command(work)
"""


@pytest.mark.slow
@pytest.mark.parametrize("has_run", [False, True])
def test_ctrl_c_ends_with_one_line_and_its_status(has_run: bool, tmp_path: Path) -> None:
    """The status is 130 even if a library would crash while Python cleans up."""
    words = [sys.executable, "-c", STOPPED_PROGRAM, *[str(tmp_path / "run")] * has_run]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300)
    line = cli.RESUMABLE if has_run else cli.INTERRUPTED
    assert (ended.returncode, ended.stderr) == (130, line + "\n")
    if has_run:
        assert '"interrupted"' in (tmp_path / "run" / "manifest.json").read_text()
