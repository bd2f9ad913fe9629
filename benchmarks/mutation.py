"""Mutation run over the judging layer: how many small faults do the tests see?

    python -m benchmarks.mutation                             # all modules, 60 mutants of each, drawn at seed 0
    python -m benchmarks.mutation slopes rate_optimum --most 0  # every mutant of two

A mutant is one module with one operator, comparison, number or condition changed (cosmic-ray's operators, `OPERATORS`).
It is killed where a test file of the module fails on it, or its time runs out. Everything is imported once, and each
mutant runs in a fork that imports anew only what depends on the module, so that it costs about a second. Extra
`mutation`; on demand, not part of the suite.
"""

import argparse
import ast
import difflib
import importlib
import importlib.util
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import cache
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import NamedTuple

MODULES = {
    "rate_optimum": ("rora_theory/stats/rate_optimum.py", "tests/stats/test_rate_optimum.py"),
    "slopes": ("rora_theory/stats/slopes.py", "tests/stats/test_slopes.py"),
    "paired": ("rora_theory/stats/paired.py", "tests/stats/test_paired.py"),
    "estimate": ("rora_theory/stats/estimate.py", "tests/stats/test_estimate.py"),
    "moments": ("rora_theory/stats/moments.py", "tests/stats/test_moments.py"),
    "setting": ("rora_theory/advice/setting.py", "tests/advice/test_transfer.py"),
    "transfer": ("rora_theory/advice/transfer.py", "tests/advice/test_transfer.py"),
    "verdicts": ("rora_theory/paper/verdicts.py", "tests/paper/test_verdicts.py"),
    "differences": ("rora_theory/sweep/differences.py", "tests/sweep/test_differences.py"),
    "trained_runs": (
        "rora_theory/sweep/trained_runs.py",
        "tests/sweep/test_trained_runs.py tests/sims/test_lr_transfer.py",
    ),
    "horizon_law": ("rora_theory/sweep/horizon_law.py", "tests/sweep/test_horizons.py"),
    "horizon_curves": ("rora_theory/sweep/horizon_curves.py", "tests/sweep/test_horizons.py"),
    "horizon_parts": ("rora_theory/sweep/horizon_parts.py", "tests/sweep/test_horizons.py"),
    "horizon_runs": ("rora_theory/sweep/horizon_runs.py", "tests/sweep/test_horizons.py"),
    "sweep_results": ("rora_theory/sweep/results.py", "tests/sweep/test_differences.py tests/sweep/test_results.py"),
    "rate_curves": ("rora_theory/stats/rate_curves.py", "tests/stats/test_rate_curves.py"),
}
"""Pure modules of the judging layer with the files that test them."""

LEFT_OUT = (
    "finished or finite_but_diverged or figures or interval_covers or errors_cover or error_covers "
    "or what_is_judged or b_alone or every_equation or small_sweep or works_in_peft or goes_on "
    "or test_rows or frozen_adam"
)
"""Tests that train, sample or draw: seconds each, for the wiring of a whole command."""

BINARY = "Add_Sub Sub_Add Mul_Div Div_Mul Pow_Mul FloorDiv_Mul Mod_Mul"
COMPARISONS = "Eq_NotEq NotEq_Eq Lt_LtE Lt_GtE LtE_Lt LtE_Gt Gt_GtE Gt_LtE GtE_Gt GtE_Lt Is_IsNot IsNot_Is"
OPERATORS = (
    *(f"core/ReplaceBinaryOperator_{name}" for name in BINARY.split()),
    *(f"core/ReplaceComparisonOperator_{name}" for name in COMPARISONS.split()),
    *(f"core/ReplaceUnaryOperator_Delete_{name}" for name in ("Not", "USub")),
    *(f"core/{name}" for name in ("AddNot", "NumberReplacer", "ReplaceAndWithOr", "ReplaceOrWithAnd")),
    *(f"core/{name}" for name in ("ReplaceTrueWithFalse", "ReplaceFalseWithTrue", "ZeroIterationForLoop")),
)

ROOMS = ("rora_theory", "sims", "figures")

IGNORED = ("-W", "ignore::pytest.PytestAssertRewriteWarning")  # plugins among the libraries that are imported before

LIBRARIES = (
    "numpy scipy.stats jax jax.numpy optax hypothesis beartype jaxtyping pytest matplotlib.pyplot tyro rich tokenizers"
)


class Mutant(NamedTuple):
    """A module's changed source, and the change as a diff."""

    source: str
    change: str


def mutants(path: Path) -> Iterator[Mutant]:
    """Every mutant of a module that is another program, each once."""
    from cosmic_ray import plugins
    from cosmic_ray.mutating import mutate_code

    original = path.read_text()
    whole = ast.parse(original)
    seen = {ast.dump(whole)}
    for name in OPERATORS:
        operator, occurrence = plugins.get_operator(name)(), 0
        while (source := mutate_code(original, operator, occurrence)) is not None:
            occurrence += 1
            try:
                tree = ast.parse(source)
            except SyntaxError:
                continue
            if ast.dump(tree) not in seen and _fixed(tree) == _fixed(whole):
                seen.add(ast.dump(tree))
                lines = difflib.unified_diff(original.splitlines(), source.splitlines(), n=0, lineterm="")
                yield Mutant(source, "\n".join(line for line in lines if not line.startswith(("---", "+++"))))


def _fixed(tree: ast.AST) -> list[str]:
    """What is no arithmetic, and changes in no mutant: arguments by keyword alone, and defaults of a class's fields."""
    nodes = list(ast.walk(tree))
    keywords = [ast.dump(one) for node in nodes if isinstance(node, ast.arguments) for one in node.kwonlyargs]
    fields = [one for node in nodes if isinstance(node, ast.ClassDef) for one in node.body]
    return keywords + [ast.dump(one) for one in fields if isinstance(one, ast.AnnAssign)]


@cache
def imports() -> dict[str, set[str]]:
    """What each module of the project imports from the project, the packages that a module lies in among them."""
    files = {_name(path): path for room in ROOMS for path in Path(room).rglob("*.py")}
    found: dict[str, set[str]] = {}
    for name, path in files.items():
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found[name] |= {one.name for one in node.names}
            elif isinstance(node, ast.ImportFrom):
                parts = [f"{node.module}.{one.name}" for one in node.names]
                found[name] |= {part if part in files else str(node.module) for part in parts}
        found[name] = {other for one in (name, *found[name]) for other in (one, *_packages(one))} - {name}
    return found


def dependents(name: str) -> set[str]:
    """A module and all that import it, directly or not."""
    found = {name}
    while more := {other for other, needs in imports().items() if needs & found} - found:
        found |= more
    return found


def _name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _packages(name: str) -> list[str]:
    return [name[:end] for end, letter in enumerate(name) if letter == "."]


def prepare(path: Path) -> None:
    """Import what does not depend on a module, as the tests do; no device is touched, so that forks are safe."""
    from jaxtyping import install_import_hook

    install_import_hook("rora_theory", "support.checker.checker")
    for name in imports().keys() - dependents(_name(path)):
        importlib.import_module(name)


def killed(path: Path, mutant: Mutant, tests: list[str], seconds: float) -> bool:
    """Whether a test fails with ``mutant`` in the module's place; the file itself is not touched."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        _test(path, mutant, tests)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) != 0
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def _test(path: Path, mutant: Mutant, tests: list[str]) -> None:
    """In the child: pytest's exit status is the process's."""
    import pytest

    place, read, stats = str(path.resolve()), SourceFileLoader.get_data, SourceFileLoader.path_stats

    def get_data(self: SourceFileLoader, name: str) -> bytes:
        return mutant.source.encode() if os.path.realpath(name) == place else read(self, name)

    def path_stats(self: SourceFileLoader, name: str) -> object:
        if os.path.realpath(name) == place:
            raise OSError("the mutant has no compiled file")
        return stats(self, name)

    SourceFileLoader.get_data = get_data  # type: ignore[method-assign]
    SourceFileLoader.path_stats = path_stats  # type: ignore[method-assign,assignment]
    sys.dont_write_bytecode = True
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    code = 70
    try:
        code = int(
            pytest.main([*tests, "-x", "-q", "--tb=no", "-p", "no:cacheprovider", *IGNORED, "-k", f"not ({LEFT_OUT})"])
        )
    finally:
        os._exit(code)


def main() -> None:
    """Run, and print each module's score and survivors."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("modules", nargs="*", default=list(MODULES), help=f"any of {', '.join(MODULES)}; none is all")
    parser.add_argument("--most", type=int, default=60, help="mutants of a module, drawn at random; 0 is all")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--seconds", type=float, default=60.0, help="a mutant that takes longer counts as killed")
    arguments = parser.parse_args()
    if importlib.util.find_spec("cosmic_ray") is None:
        parser.error("cosmic-ray is not there; accepted after pip install 'rora-theory[mutation]'")
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "OPENBLAS_NUM_THREADS": "1",
        "XLA_FLAGS": "--xla_backend_optimization_level=1",
    }
    os.environ |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="rora-mutation-"))
    sys.path.insert(0, str(Path("tests").resolve()))
    for name in LIBRARIES.split():
        importlib.import_module(name)
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:  # a clean process for each module
        settings = (arguments.most, arguments.seed, arguments.seconds)
        found = pool.starmap(judge, [(name, *settings) for name in arguments.modules], chunksize=1)
    tried, dead = (sum(counts) for counts in zip(*found, strict=True))
    print(f"{dead} of {tried} killed: {dead / tried:.1%}")


def judge(name: str, most: int, seed: int, seconds: float) -> tuple[int, int]:
    """How many mutants of a module were tried, and how many of them killed; prints the others."""
    path, tests = Path(MODULES[name][0]), MODULES[name][1].split()
    prepare(path)
    if killed(path, Mutant(path.read_text(), ""), tests, 10 * seconds):
        raise RuntimeError(f"{name}: the tests fail without a mutant")
    every = list(mutants(path))
    random.Random(seed).shuffle(every)
    tried = every[: most or None]
    survivors = [mutant for mutant in tried if not killed(path, mutant, tests, seconds)]
    for mutant in survivors:
        print(f"{path}: survives\n{mutant.change}")
    print(f"{name}: {len(tried) - len(survivors)} of {len(tried)} killed ({len(every)} in all)", flush=True)
    return len(tried), len(tried) - len(survivors)


if __name__ == "__main__":
    main()
