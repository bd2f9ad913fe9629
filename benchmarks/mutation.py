"""Test the tests: count the small faults in groups of modules that they detect.

    python benchmarks/mutation.py                                # all modules, 60 mutants of each, drawn at seed 0
    python benchmarks/mutation.py slopes rate_optimum --most 0   # every mutant of two modules
    python benchmarks/mutation.py bridge data --most 10          # modules of two groups
    python benchmarks/mutation.py tuning sweep --kind realistic  # the faults of benchmarks/realistic_faults.py

A mutant is one module with one operator, comparison, number or condition changed (cosmic-ray's operators, `OPERATORS`;
`SCRIPT_OPERATORS` for the calculator, which is JavaScript). It is killed if a test file of the module or an example in
its docstrings fails on it, or if its time runs out. The groups are `judging` (statistics, advice and verdicts),
`sweep` (a sweep's best rates, regrets and change tables), `bridge` (PyTorch), `tuning` (a rate without a tuned run),
`data` (records and batches), `workers` (cells computed with Ray) and `pages` (the calculator and the numbers in the
pages). Operators do not write what a person gets wrong, such as a worker that writes into another run's folder; these
faults are a list, `benchmarks.realistic_faults`.
The modules that the tests need are imported once. Each mutant runs in a fork that imports only what depends on the
module, so that it takes about a second, or some seconds in the bridge. It needs the extra `mutation` and is run on
demand, not with the test suite.
"""

import argparse
import ast
import difflib
import importlib
import importlib.util
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]

JUDGING = {
    "rate_optimum": ("rora_theory/stats/rate_optimum.py", "tests/stats/test_rate_optimum.py"),
    "slopes": ("rora_theory/stats/slopes.py", "tests/stats/test_slopes.py"),
    "paired": ("rora_theory/stats/paired.py", "tests/stats/test_paired.py"),
    "engine": ("rora_theory/stats/verdicts.py", "tests/stats/test_verdicts.py tests/measure/regimes/test_tables.py"),
    "estimate": ("rora_theory/stats/estimate.py", "tests/stats/test_estimate.py"),
    "moments": ("rora_theory/stats/moments.py", "tests/stats/test_moments.py"),
    "setting": ("rora_theory/advice/setting.py", "tests/advice/test_transfer.py"),
    "transfer": ("rora_theory/advice/transfer.py", "tests/advice/test_transfer.py"),
    "transferred": ("rora_theory/advice/transferred.py", "tests/advice/test_transfer.py"),
    "run_change": ("rora_theory/advice/run_change.py", "tests/advice/test_transfer.py"),
    "verdicts": ("rora_theory/paper/verdicts.py", "tests/paper/test_verdicts.py tests/test_answers_in_words.py"),
    "trained_runs": ("rora_theory/stats/trained_runs.py", "tests/stats/test_trained_runs.py"),
    "rate_curves": ("rora_theory/stats/rate_curves.py", "tests/stats/test_rate_curves.py tests/stats/test_regret.py"),
}
"""Modules of statistics, advice and verdicts, which run no model, with the files that test them."""

ANALYSIS = "tests/lab/sweep/test_analysis.py"
ESTIMATES = f"tests/lab/sweep/test_rate_estimates.py {ANALYSIS}"

SWEEP = {
    "policies": ("rora_theory/evidence/policies.py", f"tests/evidence/test_regrets.py {ANALYSIS}"),
    "policy_regrets": (
        "rora_theory/evidence/regrets.py",
        f"tests/evidence/test_regrets.py tests/lab/sweep/test_regret.py {ANALYSIS}",
    ),
    "sweep_analysis": ("rora_theory/lab/sweep/analysis.py", ESTIMATES),
    "sweep_change_parts": (
        "rora_theory/lab/sweep/change_parts.py",
        f"tests/lab/sweep/test_change_parts.py {ANALYSIS}",
    ),
    "sweep_curves": ("rora_theory/lab/sweep/curves.py", ESTIMATES),
    "sweep_differences": ("rora_theory/lab/sweep/differences.py", "tests/lab/sweep/test_differences.py"),
    "sweep_law": ("rora_theory/lab/sweep/law.py", f"tests/lab/sweep/test_read_regime.py {ANALYSIS}"),
    "sweep_regret": ("rora_theory/lab/sweep/regret.py", f"tests/lab/sweep/test_regret.py {ANALYSIS}"),
    "sweep_results": (
        "rora_theory/lab/sweep/results.py",
        "tests/lab/sweep/test_differences.py tests/lab/sweep/test_results.py",
    ),
    "sweep_runs": ("rora_theory/lab/sweep/runs.py", f"tests/lab/sweep/test_runs.py {ESTIMATES}"),
    "curve_optima": ("rora_theory/stats/curve_optima.py", "tests/stats/test_curve_optima.py"),
    "regret": ("rora_theory/stats/regret.py", "tests/stats/test_regret.py"),
}
"""Modules that find the best rates of a sweep and judge them, with the files that test them."""

BRIDGE = {
    "torch_batches": (
        "rora_theory/measure/batches.py",
        "tests/measure/regimes/test_model.py tests/measure/test_tokens.py tests/measure/regimes/test_modes.py",
    ),
    "torch_callback": ("rora_theory/measure/callback.py", "tests/measure/test_callback.py"),
    "torch_chats": ("rora_theory/measure/chats.py", "tests/measure/test_chats.py"),
    "torch_check": ("rora_theory/measure/rank_check/check.py", "tests/measure/rank_check/test_check.py"),
    "torch_hooks": (
        "rora_theory/measure/hooks.py",
        "tests/measure/regimes/test_model.py tests/measure/regimes/test_modes.py",
    ),
    "torch_modules": (
        "rora_theory/measure/modules.py",
        "tests/measure/test_callback.py tests/measure/regimes/test_model.py tests/measure/regimes/test_modes.py "
        "tests/measure/rank_check/test_check.py",
    ),
    "torch_regimes": (
        "rora_theory/measure/regimes/model.py",
        "tests/measure/regimes/test_model.py tests/measure/regimes/test_modes.py tests/measure/test_tokens.py",
    ),
}
"""Modules of the PyTorch bridge with the files that test them."""

TUNING = {
    "rate_prior": ("rora_theory/evidence/rate_prior.py", "tests/evidence/test_rate_prior.py"),
    "tuning": ("rora_theory/measure/tuning.py", "tests/measure/test_tuning.py"),
    "tune": ("sims/tune.py", "tests/sims/test_tune.py"),
}
"""Modules of the rate for a planned run that has not been tuned, with the files that test them."""

DATA = {
    "batches": ("rora_theory/lab/data/batches.py", "tests/lab/data/test_batches.py tests/lab/data/test_chat.py"),
    "chat": ("rora_theory/chat_templates.py", "tests/lab/data/test_chat.py"),
    "formats": (
        "rora_theory/lab/data/formats.py",
        "tests/lab/data/test_formats.py tests/lab/data/test_records.py tests/lab/data/test_chat.py",
    ),
    "texts": ("rora_theory/lab/data/texts.py", "tests/lab/data/test_chat.py tests/lab/data/test_batches.py"),
    "windows": ("rora_theory/lab/data/windows.py", "tests/lab/data/test_windows.py"),
}
"""Modules that read chats and other records and make batches of them, with the files that test them."""

WORKERS = {"cluster": ("rora_theory/runs/cluster.py", "tests/runs/test_cluster.py")}
"""Modules that compute cells with Ray, with the files that test them. The test of a real cluster is left out."""

PAGES = {
    "calculator": ("docs/assets/transfer.mjs", "tests/docs/test_calculator.py"),
    "fill": ("docs/fill.py", "tests/docs/test_fill.py"),
}
"""The calculator, and the program that writes numbers into the pages, with the files that test them."""

GROUPS = {
    "judging": JUDGING, "sweep": SWEEP, "bridge": BRIDGE, "tuning": TUNING, "data": DATA, "workers": WORKERS,
    "pages": PAGES,
}  # fmt: skip
MODULES = {name: module for group in GROUPS.values() for name, module in group.items()}

SKIPPED_TESTS = (
    "interval_covers", "standard_errors_cover", "both_errors_cover", "every_equation", "works_in_peft",
    "nothing_of_jax", "wrapped_models", "every_family and not llama and not gpt2 and not t5", "workers_write",
    "no_cluster_at",
)  # fmt: skip
"""Tests that train, sample, draw or start a process: seconds each, for the wiring of a whole command."""

BINARY = "Add_Sub Sub_Add Mul_Div Div_Mul Pow_Mul FloorDiv_Mul Mod_Mul"
COMPARISONS = "Eq_NotEq NotEq_Eq Lt_LtE Lt_GtE LtE_Lt LtE_Gt Gt_GtE Gt_LtE GtE_Gt GtE_Lt Is_IsNot IsNot_Is"
OPERATORS = (
    *(f"core/ReplaceBinaryOperator_{name}" for name in BINARY.split()),
    *(f"core/ReplaceComparisonOperator_{name}" for name in COMPARISONS.split()),
    *(f"core/ReplaceUnaryOperator_Delete_{name}" for name in ("Not", "USub")),
    *(f"core/{name}" for name in ("AddNot", "NumberReplacer", "ReplaceAndWithOr", "ReplaceOrWithAnd")),
    *(f"core/{name}" for name in ("ReplaceTrueWithFalse", "ReplaceFalseWithTrue", "ZeroIterationForLoop")),
)

SCRIPT_OPERATORS = {
    r" \+ ": " - ", r" - ": " + ", r" \* ": " / ", r" / ": " * ", r" \*\* ": " * ",
    r" < ": " <= ", r" > ": " >= ", r" >= ": " > ", r" === ": " !== ", r" !== ": " === ",
    r" == ": " != ", r" != ": " == ", r" && ": " || ", r" \|\| ": " && ", r"!(?=[A-Za-z(])": "",
    r"(?<![\w.])\d+(?:\.\d+)?(?![\w.])": lambda number: f"{float(number[0]) + 1:g}", r"(?<=\W)-(?=\w)": "",
}  # fmt: skip
"""Replacements of operators, comparisons, conditions and numbers in JavaScript, by the pattern of what they replace."""

KINDS = ("operators", "realistic")
"""Kinds of mutants: by the operators above, and those that `benchmarks.realistic_faults` lists."""

MAX_WAIT_RATIO = 20
"""Ratio of elapsed to processor time at which a mutant that waits for ever is stopped."""

PACKAGES = ("rora_theory", "sims", "figures")

IGNORED = ("-W", "ignore::pytest.PytestAssertRewriteWarning")  # plugins among the libraries that are imported before

LIBRARIES = (
    "numpy scipy.stats jax jax.numpy optax hypothesis beartype jaxtyping pytest matplotlib.pyplot tyro rich tokenizers"
)

BRIDGE_LIBRARIES = "torch peft.tuners.lora accelerate transformers.trainer transformers.training_args"


class Mutant(NamedTuple):
    """A module's changed source, and the change as a diff."""

    source: str
    change: str


def mutants(path: Path) -> list[Mutant]:
    """Return every mutant of a module by the operators that is a different program, each once."""
    if path.suffix == ".mjs":
        return list(script_mutants(path.read_text()))
    from cosmic_ray import plugins
    from cosmic_ray.mutating import mutate_code

    original = path.read_text()
    original_tree = ast.parse(original)
    seen, different = {ast.dump(original_tree)}, []
    for name in OPERATORS:
        operator, occurrence = plugins.get_operator(name)(), 0
        while (source := mutate_code(original, operator, occurrence)) is not None:
            occurrence += 1
            try:
                tree = ast.parse(source)
            except SyntaxError:
                continue
            if ast.dump(tree) not in seen and _fixed_parts(tree) == _fixed_parts(original_tree):
                seen.add(ast.dump(tree))
                different.append(Mutant(source, _difference(original, source)))
    return different


def realistic_mutants(path: Path) -> list[Mutant]:
    """Return the mutants of a module that `benchmarks.realistic_faults` lists."""
    original = path.read_text()
    faults = [
        fault for fault in importlib.import_module("benchmarks.realistic_faults").FAULTS if Path(fault.path) == path
    ]
    sources = {fault: original.replace(fault.old, fault.new) for fault in faults}
    return [Mutant(source, f"{fault.breaks}\n{_difference(original, source)}") for fault, source in sources.items()]


def script_mutants(original: str) -> Iterator[Mutant]:
    """Yield every mutant of a JavaScript module; comments, texts and what begins a line stay as they are."""
    for pattern, new in SCRIPT_OPERATORS.items():
        for match in re.finditer(pattern, original):
            line = original[original.rfind("\n", 0, match.start()) + 1 : match.start()]
            is_in_text = line.count('"') % 2 or line.count("`") % 2
            if not is_in_text and not line.lstrip().startswith(("//", "/*")) and "//" not in line:
                source = original[: match.start()] + (new(match) if callable(new) else new) + original[match.end() :]
                yield Mutant(source, _difference(original, source))


def _difference(original: str, source: str) -> str:
    lines = difflib.unified_diff(original.splitlines(), source.splitlines(), n=0, lineterm="")
    return "\n".join(line for line in lines if not line.startswith(("---", "+++")))


def _fixed_parts(tree: ast.AST) -> list[str]:
    """Return the parts that no mutant changes: keyword-only arguments, and the fields of classes with their defaults.

    The operators would replace the star before keyword-only arguments as if it were a product.
    """
    nodes = list(ast.walk(tree))
    keywords = [ast.dump(keyword) for node in nodes if isinstance(node, ast.arguments) for keyword in node.kwonlyargs]
    statements = [statement for node in nodes if isinstance(node, ast.ClassDef) for statement in node.body]
    return keywords + [ast.dump(statement) for statement in statements if isinstance(statement, ast.AnnAssign)]


@cache
def project_files() -> dict[str, Path]:
    """Return the paths of the project's modules, and of what the tests share, by their names."""
    files = {_name(path): path for room in PACKAGES for path in Path(room).rglob("*.py")}
    shared = {_name(path.relative_to("tests")): path for path in Path("tests/support").glob("*.py")}
    return files | shared


@cache
def direct_imports() -> dict[str, set[str]]:
    """Return what importing each module of the project imports directly, with the packages that contain it.

    An import in a function is not among them: it runs in the fork, where it finds the mutant.
    """
    return {name: _imported_by(path, name) - {name} for name, path in project_files().items()}


def _imported_by(path: Path, *names: str, in_functions: bool = False) -> set[str]:
    """Return the modules that a file imports and the given ones, with the packages that contain them."""
    direct = set(names)
    for node in _import_statements(ast.parse(path.read_text()), in_functions):
        if isinstance(node, ast.Import):
            direct |= {alias.name for alias in node.names}
        else:
            members = [f"{node.module}.{alias.name}" for alias in node.names]
            direct |= {member if member in project_files() else str(node.module) for member in members}
    return {module for inner in direct for module in (inner, *_packages(inner))}


def _import_statements(node: ast.AST, in_functions: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """Yield the imports that run: without those for type checkers, and without those in functions unless requested."""
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        yield node
        return
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not in_functions:
        return
    is_for_checkers = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    for child in node.orelse if is_for_checkers else ast.iter_child_nodes(node):  # type: ignore[attr-defined]
        yield from _import_statements(child, in_functions)


def needed_modules(path: Path, tests: list[str]) -> set[str]:
    """Return the modules of the project that a module and its tests import, directly or not."""
    modules: set[str] = set()
    files = [file for file in (path, *map(Path, tests)) if file.suffix == ".py"]
    more = set().union(*(_imported_by(file, in_functions=True) for file in files))
    while more := (more & direct_imports().keys()) - modules:
        modules |= more
        more = set().union(*(direct_imports()[name] for name in more))
    return modules


def dependents(name: str) -> set[str]:
    """Return a module and all modules that import it, directly or not."""
    modules = {name}
    while more := {other for other, needs in direct_imports().items() if needs & modules} - modules:
        modules |= more
    return modules


def _name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _packages(name: str) -> list[str]:
    return [name[:end] for end, letter in enumerate(name) if letter == "."]


def prepare(path: Path, tests: list[str]) -> None:
    """Import what a module's tests need and what does not depend on it; no device is touched, so that forks are safe.

    Args:
      path: Path of the module.
      tests: Files that test the module.
    """
    import jaxtyping
    from support import checker

    jaxtyping.jaxtyped = checker.jaxtyped  # as in the tests' `conftest.py`
    jaxtyping.install_import_hook("rora_theory", "support.checker.checker")
    for name in needed_modules(path, tests) - dependents(_name(path)):
        if name.split(".")[0] in PACKAGES:
            importlib.import_module(name)
    if any("torch_models" in Path(file).read_text() for file in tests):
        for name in BRIDGE_LIBRARIES.split():
            importlib.import_module(name)
        models = importlib.import_module("support.torch_models")
        for family in ("llama", "gpt2", "t5"):  # transformers imports a family's code when it is first used
            models.model(family)
    # A module that is loaded already would be tested in place of its mutants.
    if _name(path) in sys.modules:
        raise RuntimeError(f"{_name(path)} was imported before its mutants")


def is_killed(path: Path, mutant: Mutant, tests: list[str], seconds: float) -> bool:
    """Return whether a test fails with a mutant in the module's place; the file itself is not touched.

    Args:
      path: Path of the module.
      mutant: Changed source of the module.
      tests: Files that test the module.
      seconds: Processor time after which the mutant counts as killed, so that a busy machine kills none.
    """
    sys.stdout.flush()  # otherwise the child would print the buffer again
    child = os.fork()
    if child == 0:
        limit = math.ceil(seconds)
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
        _test(path, mutant, tests)
    # A mutant may also wait without using the processor, so elapsed time is limited too.
    deadline = time.monotonic() + MAX_WAIT_RATIO * seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) != 0
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def _test(path: Path, mutant: Mutant, tests: list[str]) -> None:
    """Run pytest in the forked child, and end the process with its exit status."""
    import pytest

    # Importing the module reads the mutant's source; every other file is read as usual.
    mutated_file, read, stats = str(path.resolve()), SourceFileLoader.get_data, SourceFileLoader.path_stats

    def get_data(self: SourceFileLoader, name: str) -> bytes:
        return mutant.source.encode() if os.path.realpath(name) == mutated_file else read(self, name)

    def path_stats(self: SourceFileLoader, name: str) -> object:
        if os.path.realpath(name) == mutated_file:
            raise OSError("the mutant has no compiled file")
        return stats(self, name)

    SourceFileLoader.get_data = get_data  # type: ignore[method-assign]
    SourceFileLoader.path_stats = path_stats  # type: ignore[method-assign,assignment]
    copy = shutil.copy

    def copy_mutant(old: str | Path, new: str | Path) -> object:
        copied = copy(old, new)
        if os.path.realpath(old) == mutated_file:
            (Path(new) / path.name if Path(new).is_dir() else Path(new)).write_text(mutant.source)
        return copied

    shutil.copy = copy_mutant  # type: ignore[assignment]  # the tests of a script copy it
    sys.dont_write_bytecode = True
    # Discard all output: only the exit status counts.
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    code = 70
    try:
        options = ["--doctest-modules", "-x", "-q", "--tb=no", "-p", "no:cacheprovider", *IGNORED]
        # pytest itself would load a file that it is given, instead of the mutant, unless jaxtyping's hook does.
        examples = [str(path)] if path.parts[0] == "rora_theory" else []
        skipped = " or ".join(f"({name})" for name in SKIPPED_TESTS)
        code = int(pytest.main([*examples, *tests, *options, "-k", f"not ({skipped})"]))
    finally:
        os._exit(code)


def main() -> None:
    """Test the mutants of the chosen modules, and print the survivors and the score of each module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    names = [*GROUPS, *MODULES]
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=f"any of {', '.join(names)}; none is all")
    parser.add_argument("--most", type=int, default=60, help="number of mutants of a module, drawn at random; 0 is all")
    parser.add_argument(
        "--kind", choices=KINDS, help="mutants of the operators or of the realistic faults; by default both"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw")
    parser.add_argument("--seconds", type=float, default=60.0, help="processor time after which a mutant is killed")
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.modules) - set(names)):
        parser.error(f"unknown module {unknown[0]!r}; choose from {', '.join(names)}")
    chosen = list(dict.fromkeys(module for name in arguments.modules or GROUPS for module in GROUPS.get(name, [name])))
    if importlib.util.find_spec("cosmic_ray") is None:
        parser.error("cosmic-ray is not installed. Run pip install 'rora-theory[mutation]'.")
    # Set the environment before JAX is imported: fast compilation on the CPU, with a cache that all forks share.
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "OPENBLAS_NUM_THREADS": "1",
        "XLA_FLAGS": "--xla_backend_optimization_level=1",
    }
    os.environ |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="rora-mutation-"))
    os.chdir(ROOT)
    sys.path[0] = str(ROOT)  # in place of this folder, whose scripts have names of packages
    sys.path.insert(1, str(ROOT / "tests"))
    for name in LIBRARIES.split():
        importlib.import_module(name)
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:  # a clean process for each module
        kinds = KINDS if arguments.kind is None else (arguments.kind,)
        settings = (kinds, arguments.most, arguments.seed, arguments.seconds)
        scores = pool.starmap(score_module, [(name, *settings) for name in chosen], chunksize=1)
    for kind in kinds:
        planted, killed = (sum(counts) for counts in zip(*(score[kind] for score in scores), strict=True))
        print(f"{kind}: {killed} of {planted} killed ({killed / max(planted, 1):.1%})")


def score_module(
    name: str, kinds: Sequence[str], max_mutants: int, seed: int, seconds: float
) -> dict[str, tuple[int, int]]:
    """Print the surviving mutants of a module, and return the numbers of planted and of killed ones by kind."""
    path, tests = Path(MODULES[name][0]), MODULES[name][1].split()
    samples = {kind: (mutants(path) if kind == "operators" else realistic_mutants(path)) for kind in kinds}
    if "operators" in samples:
        random.Random(seed).shuffle(samples["operators"])
        samples["operators"] = samples["operators"][: max_mutants or None]
    if not any(samples.values()):
        return dict.fromkeys(kinds, (0, 0))
    prepare(path, tests)
    if is_killed(path, Mutant(path.read_text(), ""), tests, 10 * seconds):
        raise RuntimeError(f"{name}: the tests fail without a mutant")
    scores = {}
    for kind, sample in samples.items():
        killed_count = 0
        for mutant in sample:
            if is_killed(path, mutant, tests, seconds):
                killed_count += 1
            else:
                print(f"{path}: survives\n{mutant.change}", flush=True)
        scores[kind] = len(sample), killed_count
    counts = ", ".join(f"{killed} of {planted} {kind}" for kind, (planted, killed) in scores.items())
    print(f"{name}: killed are {counts}", flush=True)
    return scores


if __name__ == "__main__":
    main()
