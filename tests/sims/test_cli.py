"""Start and end of commands: one line for a refused option, none for a closed pipe, one for Ctrl-C."""

import contextlib
import logging
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from support import commands
from support.options import Inner, Options

import sims
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
        (["--limit", "x"], ["--limit", "'x'", "INT", "most items", "--help"]),
        (["--ranks", "8", "1.5"], ["--ranks", "'1.5'", "[INT [INT ...]]", "ranks of the adapter", "--help"]),
        (["--optimizer", "sgdd"], ["--optimizer", "'sgdd'", "'sgd'", "'adam'"]),
        (["--remat", "maybe"], ["--remat", "'maybe'", "'mlp'"]),
        (["--ranks", "8,16"], ["--ranks", "'8,16'", "Use --ranks 8 16."]),
        (["--ranks=8,16"], ["--ranks", "'8,16'", "Use --ranks 8 16."]),
        (["--rules", "lora,0.5"], ["--rules", "'lora,0.5'", "Use --rules lora 0.5."]),
        (["--seeds", "0,1"], ["--seeds", "'0,1'", "Use --seeds 0 1."]),
        (["--limit", "8,16"], ["--limit", "'8,16'", "INT"]),
        (["--limit"], ["--limit", "1 value"]),
        (["--rank", "8"], ["--rank, 8", "--ranks [INT [INT ...]]", "--help"]),
        (["--limit", "1" + "0" * 30], ["--limit", "got 1" + "0" * 30]),
        (["--ranks", "8", "9" * 19], ["--ranks", "got 999"]),
        (["--ranks-of", "q", "9" * 19], ["--ranks-of", "got 999"]),
        (["--merge", "True"], ["--merge", "'True'", "Use --merge or --no-merge."]),
        (["--merge=false"], ["--merge", "'false'"]),
        (["--config"], ["--config", "1 value"]),
        (["--data", os.fsdecode(b"caf\xe9.json")], [r"'caf\udce9.json'", "UTF-8"]),
    ],
)
def test_invalid_options_are_named_with_the_accepted_values(words: list[str], parts: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        parse("--data", "a", *words)
    message = str(caught.value)
    assert [part for part in parts if part not in message] == [], message
    assert "\n" not in message
    assert not set("╭│─╰") & set(message), "the option parser's frame"


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
    assert parsed(tmp_path, "remat: true\n", "--data", "a").remat is True
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
    for wrong in ("steps: x", "epochs: 3"):
        (tmp_path / "b.yaml").write_text(wrong)
        with pytest.raises(InputError, match=rf"^{re.escape(second)}: key {wrong.split(':')[0]}: "):
            parse("--config", first, "--config", second)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs: 3", "key epochs:.* data, ranks, limit, optimizer, merge, accuracy, remat"),
        ("batch: 3", "key batch:.* batch-size"),
        ("limit: x", "key limit:.*'x'"),
        ("ranks: [8, 1.5]", "key ranks:.*'1.5'"),
        ("ranks: 8 16", "key ranks:.*'8 16'"),
        ("optimizer: sgdd", "key optimizer:.*'sgdd'"),
        ("merge: maybe", "key merge:.*'maybe'"),
        ("limit: true", "key limit:.*'True'"),
        ("steps: [1, 2]", r"key steps:.*\[1, 2\]"),
        (f"steps: {2**63}", f"key steps:.*{2**63}"),
        ("batch-size: 3\nbatch_size: 4", "key batch-size:.* twice"),
        ("steps: 3\nlimit: 1\nsteps: 3", ".*duplicate key.*steps"),
        ("[1, 2]", r".*\[1, 2\]"),
        ("", ".*None"),
        ("data: [", ".*YAML.*while parsing"),
        ("data: !!python/name:os.system", ".*YAML.*could not determine a constructor"),
        ("steps: !!int ''", ".*YAML"),
        ("steps: !!bool x", ".*YAML"),
        ("merge: !!timestamp x", ".*YAML"),
    ],
)
def test_invalid_options_in_a_file_are_named_with_file_and_key(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(str(tmp_path / 'run.yaml'))}: {message}"):
        parsed(tmp_path, text, "--data", "a")


def test_a_tab_is_read_or_refused_like_the_rest_of_the_file(tmp_path: Path) -> None:
    """libyaml accepts a tab before a comment, which PyYAML's own parser refuses."""
    with contextlib.suppress(InputError):
        assert parsed(tmp_path, "steps: 3\t# a tab\n", "--data", "a").inner.steps == 3


def test_invalid_options_on_the_command_line_are_not_attributed_to_a_file(tmp_path: Path) -> None:
    for text, *words in (
        ("steps: 3\nlimit: 4\n", "--limit", "x"),
        ("steps: 3\n", "--limit", "steps"),
        ("steps: 3\n", "--batch-size", "x"),  # whose help names --steps
    ):
        with pytest.raises(InputError, match=words[0]) as caught:
            parsed(tmp_path, text, "--data", "steps", *words)
        assert "run.yaml" not in str(caught.value)
    assert parsed(tmp_path, "steps: 3\n", "--data", "steps").inner.steps == 3, "a value is no option"
    with pytest.raises(InputError, match=r"none\.yaml"):
        parse("--config", str(tmp_path / "none.yaml"))


def test_versions(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        parse("--version")
    assert re.fullmatch(r"rora-theory \d[\w.]*, jax \d[\w.]*(, \w+ \d[\w.]*)*\n", capsys.readouterr().out)


def test_ranges_are_checked_when_the_configuration_is_created(tmp_path: Path) -> None:
    """The message of `__post_init__` is printed unchanged, for the command's own configuration and for a nested one."""
    for config in (Checked, Checks):
        with pytest.raises(InputError, match=r"^--rank must be at least 1, got -1 \[x\]$"):
            parse("--rank", "-1", config=config)
    (tmp_path / "run.yaml").write_text("rank: -1")
    with pytest.raises(InputError, match=r"^.*run\.yaml: key rank: --rank must be at least 1, got -1 \[x\]$"):
        parse("--config", str(tmp_path / "run.yaml"), config=Checks)


def test_a_missing_option_is_named() -> None:
    with pytest.raises(InputError, match=r"--data \[STR \[STR \.\.\.\]\] files \(required\)\."):
        parse()


def test_help_is_as_wide_as_the_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    with pytest.raises(SystemExit, match="0"):
        parse("--help")
    assert 50 < max(map(len, capsys.readouterr().out.splitlines())) <= 60
    assert os.environ["COLUMNS"] == "60"


def test_library_messages_are_printed_once_with_other_log_handlers(capsys: pytest.CaptureFixture[str]) -> None:
    other = logging.StreamHandler(sys.stderr)  # as absl gives the root logger one
    logging.getLogger().addHandler(other)
    try:
        cli.run_command(lambda: logging.getLogger("rora_theory.runs").warning("two versions"))
    finally:
        logging.getLogger().removeHandler(other)
    assert capsys.readouterr().err == "note: two versions\n"


LONG = "7" * 400


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (InputError(f"rank is {LONG};\n bad"), f"error: rank is {LONG[:150]}...{LONG[:74]}; bad\n"),
        (InputError("a\x1b[31m\udce9: no such file"), "error: a\\x1b[31m\\udce9: no such file\n"),
        (FileNotFoundError(2, "No such file", "a.json"), "error: a.json: No such file. "),
        (MemoryError("Unable to allocate 8 TiB"), "error: out of memory (Unable to allocate 8 TiB). "),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory"), "error: out of memory (RESOURCE_EXHAUSTED: Out of memory)"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_failures_are_one_line(error: BaseException, line: str) -> None:
    def work() -> None:
        raise error

    assert commands.refusal(commands.run_command(lambda _: cli.run_command(work))).startswith(line)


@pytest.mark.parametrize(
    "words", ["print('x' * 10**6)", "print('x')", "cli.parse(Options, ['--help'], description='')"]
)
def test_a_closed_pipe_ends_the_command_silently(words: str) -> None:
    """The pipe closes as in ``| head``, during the output or after the end."""
    code = f"from sims.common import cli\nfrom support.options import Options\ncli.run_command(lambda: {words})"
    read, write = os.pipe()
    os.close(read)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUNBUFFERED": ""}
    done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, env=environment)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize(
    ("words", "slow", "number"),
    [
        ("-m sims.variance_sweep", "jax", signal.SIGTERM),
        ("-m figures.regime", "matplotlib", signal.SIGINT),
        ("{rora} variance_sweep", "jax", signal.SIGINT),
        ("{rora} variance_sweep", "tyro", signal.SIGTERM),
    ],
)
def test_a_signal_while_importing_ends_a_command_with_one_line(
    tmp_path: Path, words: str, slow: str, number: signal.Signals
) -> None:
    """A package takes a minute to import here, and reports the start of the import."""
    (tmp_path / f"{slow}.py").write_text("import time; print('begun', flush=True); time.sleep(60)")
    (script := tmp_path / "rora").write_text("from sims.__main__ import main; main()")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])}
    process = subprocess.Popen(
        [sys.executable, *words.format(rora=script).split()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests in the background ignore it
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"begun\n"
    process.send_signal(number)
    assert process.communicate(timeout=30) == (b"", f"{sims.STOPPED}\n".encode())
    assert process.returncode == 128 + number
