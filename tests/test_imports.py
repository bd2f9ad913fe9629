"""Imports of the package: no cycle among its modules, no JAX for the laws, and no extra for the core."""

import ast
import graphlib
import importlib.util
import json
import pkgutil
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import rora_theory
from rora_theory import extras
from rora_theory.errors import InputError

ROOT = Path(__file__).parents[1]

NAMES = {"rora_theory"} | {module.name for module in pkgutil.walk_packages(rora_theory.__path__, "rora_theory.")}

WITH_EXTRAS = (*(f"lab.{name}" for name in ("adapters", "data", "evaluate", "finetune", "llama", "pretrain", "sweep")),)
"""Packages beyond the core install."""
OF_A_MODEL = (
    "adapters", "batches", "callback", "chats", "hooks", "modules", "progress", "rank_check.check", "regimes.model",
    "transfer_check", "tuning",
)  # fmt: skip
"""Modules of `measure` that run a model and need the extra ``torch``."""
WITH_JAX = (
    *(
        "rora_theory.runs.devices",
        *(f"rora_theory.laws.random.{name}" for name in ("chi_squares", "draws", "nested", "normals")),
        *(f"rora_theory.laws.{name}" for name in ("first_step", "sampling")),
    ),
    *(f"rora_theory.paper.{name}" for name in ("quantities", "simulation", "verdicts")),
    "rora_theory.measure.regimes.drawn_steps",
)
"""Modules of the core with arrays on a device."""

CORE = sorted(
    name
    for name in NAMES
    if not name.startswith(tuple(f"rora_theory.{package}" for package in WITH_EXTRAS))
    and name not in [f"rora_theory.measure.{module}" for module in OF_A_MODEL]
)
WITHOUT_JAX = [name for name in CORE if name not in WITH_JAX]

EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def import_names(extra: str) -> set[str]:
    """Return the names by which the packages of an extra are imported."""
    distributions = {re.split(r"[^\w]", requirement)[0] for requirement in EXTRAS[extra]}
    return {"google" if name == "protobuf" else name for name in distributions}


EXTRA_PACKAGES = set().union(*map(import_names, ("finetune", "torch", "logging", "cluster")))
"""Packages of the extras, by the names that they are imported by."""

HIDE_EXTRA_PACKAGES = f"""
import importlib, importlib.abc, sys
class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {EXTRA_PACKAGES}:
            raise ModuleNotFoundError(f"hidden: {{name}}", name=name)
sys.meta_path.insert(0, Hidden())
"""
"""Code after which no package of the extras can be imported."""


def test_every_hidden_package_belongs_to_an_extra() -> None:
    finetune = {"datasets", "gguf", "google", "huggingface_hub", "jinja2", "orbax", "pyarrow", "safetensors"}
    finetune |= {"sentencepiece", "tokenizers", "transformers"}
    assert finetune | {"peft", "torch", "tensorboardX", "wandb", "ray"} == EXTRA_PACKAGES
    assert {name for names in extras.PACKAGES.values() for name in names} == EXTRA_PACKAGES
    for extra, names in extras.PACKAGES.items():
        assert import_names(extra) == set(names)


def fresh(code: str) -> str:
    """Return what the code prints in a separate process with the extras hidden and nothing on standard error."""
    command = [sys.executable, "-c", HIDE_EXTRA_PACKAGES + code]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert (process.stderr, process.returncode) == ("", 0)
    return process.stdout


@pytest.mark.slow
def test_the_laws_and_advice_need_no_jax() -> None:
    """Imports and calls need none: equations of the paper with NumPy's arrays, a law, the exponent after the first
    step, and the command that advises, also with a measured regime.
    """
    options = "--from-rank 8 --to-rank 128 --alpha 16 --lr 3e-4 --rule lora --optimizer adamw --json"
    run = str(ROOT / "results" / "published" / "regime")
    code = f"""
for name in {WITHOUT_JAX}:
    importlib.import_module(name)
    assert "jax" not in sys.modules, name
import runpy, numpy as np, rora_theory as rt
assert not hasattr(rt, "nothing") and not hasattr(rt.laws, "nothing")
assert {{*rt.__all__, "lab"}} <= set(dir(rt))
equations, laws = rt.paper.equations, rt.laws
assert {{*laws.__all__, "sampling"}} <= set(dir(laws))
assert rt.transfer(rt.Setting(16, 32, 2e-4), rank=128).alpha == 32 and rt.transfer is rt.advice.transfer.transfer
assert rt.stats.slopes and rt.measure and issubclass(rt.InputError, ValueError)
lora_A, x = np.eye(2, 3), np.ones(3)
print(float(equations.eq10_norm(np.ones(4), lora_A, x, x, 1.0, 0.5)))
print(round(float(laws.first_step_moments(np.ones((4, 3)), x, rank=8, scaling=1.0).second_moment[0]), 6))
print(laws.constant_gradient.rate_exponents(0.0).rank)
for more in ([], ["--regime", {run!r}]):
    sys.argv = ["sims.transfer", *{options.split()}, *more]
    runpy.run_module("sims.transfer", run_name="__main__", alter_sys=True)
assert "jax" not in sys.modules
"""
    laws, _, advice = fresh(code).partition("{")
    assert laws.split() == ["2.0", "720.0", "-1.0"]  # 720 = r (r + 2) |x|^4
    decoder = json.JSONDecoder()
    assumed, end = decoder.raw_decode("{" + advice)
    measured, _ = decoder.raw_decode(("{" + advice)[end:].lstrip())
    assert (assumed["alpha"], assumed["regime"]) == (16.0, "signal")
    assert 4e-4 < assumed["learning_rate"] < 5e-4, "it follows the rank"
    assert (measured["regime"], measured["learning_rate"]) == ("measured", 3e-4)
    assert measured["alpha"] > 16.0


@pytest.mark.slow
def test_the_core_and_the_help_of_every_command_need_no_extra(tmp_path) -> None:
    """This covers each module and each command of ``rora`` and ``rora figures``; a command that needs an extra names
    it.
    """
    assert len(CORE) > len(WITHOUT_JAX) > 30  # the walk sees something
    assert {*WITH_JAX, *(f"rora_theory.measure.{module}" for module in OF_A_MODEL)} <= NAMES
    records = [{"instruction": f"Question {i}?", "input": "", "output": f"Answer {i}."} for i in range(40)]
    (tmp_path / "records.json").write_text(json.dumps(records))
    commands_of_extras = {
        "regime": ["--data", "records.json"],
        "transfer": ["--check", "smollm2-135m", "records.json"],
        "finetune": ["--data", "records.json", "--held-out", "8"],
        "variance_sweep": ["--workers", "2"],
    }
    code = f"""
for name in {CORE}:
    importlib.import_module(name)
assert not {{"scipy.stats", "scipy.optimize"}} & {{*sys.modules}}, "slow to import: a second a command"
import contextlib, io, os
from sims import __main__ as commands
os.chdir({str(tmp_path)!r})
def ended(package, name, words):
    sys.argv = ["rora", *(["figures"] if package == "figures" else []), name, *words]
    # A command that another one builds on is imported already, about which runpy would warn in this process.
    sys.modules.pop(f"{{package}}.{{name}}", None)
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            commands.main()
        except SystemExit as stop:
            return stop.code, out.getvalue().startswith("usage: "), err.getvalue()
names = [(package, name) for package in ("sims", "figures") for name in commands.describe_commands(package)]
helps = {{f"{{package}} {{name}}": ended(package, name, ["--help"]) for package, name in names}}
print(json.dumps([helps, {{name: ended("sims", name, words) for name, words in {commands_of_extras}.items()}}]))
"""
    helps, refused = json.loads(fresh("import json\n" + code))
    assert len(helps) > 20  # the walk sees something
    assert {name: end for name, end in helps.items() if end != [0, True, ""]} == {}
    for name, (status, _, error) in refused.items():
        extra = {"finetune": "finetune", "variance_sweep": "cluster"}.get(name, "torch")
        assert (status, error.count("\n")) == (2, 1), error
        assert error.startswith("error: ")
        assert f"rora-theory[{extra}]" in error


@pytest.mark.slow
@pytest.mark.parametrize("installed", [True, False])
def test_tokenizers_chats_and_records_need_no_torch(installed, model_folder, tmp_path) -> None:
    """transformers neither imports PyTorch, where it is installed, nor says that it is missing."""
    chat = [{"role": "user", "content": "fox"}, {"role": "assistant", "content": "dog"}]
    (tmp_path / "x.json").write_text(json.dumps([{"messages": chat}]))
    code = f"""
import importlib.machinery, sys
find_spec = importlib.machinery.PathFinder.find_spec
def hide(cls, name, path=None, target=None):
    return None if name.partition(".")[0] in ("torch", "peft") else find_spec(name, path, target)
if not {installed}:
    importlib.machinery.PathFinder.find_spec = classmethod(hide)
from rora_theory.lab.finetune import read_records, tokenize
from rora_theory.lab.data.chat import load_chat_template
from rora_theory.lab.llama.tokenizer import Tokenizer
tokenizer = Tokenizer.from_folder({str(model_folder)!r})
chat = load_chat_template(tokenizer, "chatml")
examples = tokenize(read_records([{str(tmp_path / "x.json")!r}]), tokenizer, chat=chat, answer_only=True)
print(tokenizer.decode(examples.tokens[examples.is_target]), "torch" in sys.modules)
"""
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (process.stderr, process.returncode) == ("", 0)
    assert process.stdout.split() == ["dog<|im_end|>", "False"]


def load_with(tokenizers) -> None:
    """Call a library as a module of the package does."""
    try:
        tokenizers.models.load()
    except tokenizers.Error:
        pytest.fail("nothing of the package is raised")


def test_a_placeholder_replaces_a_missing_package() -> None:
    """It may be a base class, an annotation or an except clause.

    When used, it names the extra, also if the package is broken.
    """
    tokenizers = extras.missing(ModuleNotFoundError("no", name="tokenizers.models"))

    class Reader(tokenizers.Reader):
        at: tokenizers.Place | None = None

    with pytest.raises(InputError, match=r"^tokenizers is not .*rora-theory\[finetune\]"):
        Reader("file")
    with pytest.raises(InputError):
        load_with(tokenizers)
    with pytest.raises(InputError, match="wrong libc"):
        extras.missing(ImportError("wrong libc", name="orbax.checkpoint"))()
    other = ImportError("no", name="nowhere")
    with pytest.raises(ImportError) as raised:
        extras.missing(other)
    assert raised.value is other
    assert extras.missing_message(ValueError("no")) is None


DRAWN_ORDER = (
    ("defaults", "errors"),
    ("extras", "lazy_modules", "plots", "scaling"),
    ("chat_templates", "inits", "optimizers"),
    ("runs", "validation"),
    ("runs.cluster", "stats"),
    ("laws",),
    ("advice", "paper"),
    ("evidence",),
    ("lab", "lab.llama", "measure"),
    ("lab.adapters", "lab.data"),
    ("lab.finetune",),
    ("lab.evaluate", "lab.pretrain"),
    ("lab.sweep",),
    ("rora_theory",),
    ("sims",),
    ("figures",),
)
"""Packages in rows, from the bottom to the top. A package imports from the rows below it, and nothing from its own."""

ROWS = {package: row for row, packages in enumerate(DRAWN_ORDER) for package in packages}


def package_of(module: str) -> str:
    """Return the package of a module as `DRAWN_ORDER` names it."""
    top, _, below = module.partition(".")
    if top != "rora_theory" or not below:
        return top
    two = ".".join(below.split(".")[:2])
    return two if any(two in row for row in DRAWN_ORDER) else below.partition(".")[0]


def imported(path: Path, names: set[str]) -> Iterator[str]:
    """Yield the modules that a file imports: at its top, inside a function, or for type checkers alone."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in names)
        elif isinstance(node, ast.ImportFrom) and node.module in names:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in names else node.module


def upward_imports(graph: dict[str, set[str]]) -> list[str]:
    """Return the imports from another package that is not in a lower row."""
    return [
        f"{module} imports {target}"
        for module, targets in graph.items()
        for target in sorted(targets)
        if package_of(target) != package_of(module) and ROWS[package_of(target)] >= ROWS[package_of(module)]
    ]


def test_imports_point_one_way() -> None:
    """No module imports from a row above its own or beside it, and no imports form a cycle."""
    files = {}
    for top in ("rora_theory", "sims", "figures"):
        for path in (ROOT / top).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    graph = {name: set(imported(path, set(files))) - {name} for name, path in files.items()}
    assert len(graph["rora_theory.laws.moments"]) >= 3  # the imports are found
    assert {package_of(name) for name in graph} == set(ROWS)
    assert upward_imports(graph) == []
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" imports ".join(error.args[1]))


def test_an_upward_import_is_found_anywhere(tmp_path) -> None:
    file, names = tmp_path / "laws.py", {"rora_theory.stats", "rora_theory.lab.llama", "rora_theory.lab.llama.hub"}
    file.write_text(
        "from rora_theory import stats\nif TYPE_CHECKING:\n    from rora_theory.lab.llama import hub\n"
        "def load():\n    import rora_theory.lab.llama\n"
    )
    graph = {"rora_theory.laws.moments": set(imported(file, names | {"rora_theory"}))}
    assert graph["rora_theory.laws.moments"] == names
    assert len(upward_imports(graph)) == 2


PACKAGES = ("rora_theory", "sims", "figures", "benchmarks")


def private(path: Path) -> Iterator[str]:
    """Yield private names that a file uses of another module of the repository, except those of named tuples."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    taken = [
        alias
        for node in nodes
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in PACKAGES
        for alias in node.names
    ]
    bound = {alias.asname or alias.name for alias in taken}
    reached = (node for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name))
    attributes = [node.attr for node in reached if node.value.id in bound]
    for name in (*(alias.name for alias in taken), *attributes):
        if name.startswith("_") and not name.startswith("__") and name not in dir(NamedTuple("Any", [])):
            yield name


def test_modules_use_only_public_names_of_each_other(tmp_path) -> None:
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    assert len(files) > 200  # the walk sees something
    assert {str(path): names for path in files if (names := list(private(path)))} == {}
    (tmp_path / "one.py").write_text("from rora_theory import laws\nfrom sims.common import _cli\nlaws._law\n")
    assert list(private(tmp_path / "one.py")) == ["_cli", "_law"]


def test_imports_of_scripts_exist() -> None:
    """Most scripts have no other test. Imports of an extra that is not installed are left out."""
    scripts = [path for folder in ("benchmarks", "docs", "tests/golden") for path in (ROOT / folder).glob("*.py")]
    assert len(scripts) > 20
    missing = []
    for path in scripts:
        for node in ast.walk(ast.parse(path.read_text())):
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            if module.split(".")[0] in ("rora_theory", "sims", "figures"):
                try:
                    missing += [f"{path}: {alias.name}" for alias in node.names if not has(module, alias.name)]
                except ModuleNotFoundError as error:
                    missing += [] if error.name in EXTRA_PACKAGES else [f"{path}: {error}"]
    assert missing == []


def has(package: str, name: str) -> bool:
    """Return whether a module has an attribute, or a package a module, of this name."""
    module = importlib.import_module(package)
    within = hasattr(module, "__path__") and importlib.util.find_spec(f"{package}.{name}") is not None
    return within or hasattr(module, name)
