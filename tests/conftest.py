"""Settings of all tests: strict JAX semantics, host devices, run-time shape checks, and locations of data."""

import atexit
import errno
import functools
import gc
import importlib.util
import os
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# `datasets` reports the data sets that it reads to a server, also those of a stand-in for the hub.
os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # if it is set, older versions do not warn when Ray forks
# Ray reads this when it is imported, and transformers may import it: listen on the loopback address only.
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
# The workers of pytest-xdist share the cores, on which idle threads of OpenBLAS would spin.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Most of the suite's time is compilation. Programs are not optimised, and all processes share one compilation cache.
# Code is generated in one piece: several threads make workers that share the cores a sixth slower.
# XLA reads the flags at each compilation: the fixture `optimised` changes them for tests with many random draws.
# JAX 0.11 has no flag for simpler emitters, and XLA ends the process on an unknown flag.
# TEST_XLA_FLAGS adds flags (.ci/kernels); XLA_FLAGS replaces all of them.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_flags_reset=true --xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
    + " --xla_cpu_use_fusion_emitters=false" * (tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11))
    + f" {os.environ.get('TEST_XLA_FLAGS', '')}",
)
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="rora-tests-")
    # To store and look up a smaller program takes as long as compiling it.
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.15"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
# If Python must not write compiled modules next to their sources, every process would compile its imports again, which
# takes seconds. This process and all that it starts, including the workers, share a temporary folder of such modules.
if os.environ.pop("PYTHONDONTWRITEBYTECODE", ""):
    os.environ["PYTHONPYCACHEPREFIX"] = tempfile.mkdtemp(prefix="rora-tests-")
    atexit.register(shutil.rmtree, os.environ["PYTHONPYCACHEPREFIX"], ignore_errors=True)

import jax
import jaxtyping
import pytest
from hypothesis import settings
from hypothesis.internal.conjecture import providers
from jax._src.interpreters import mlir
from jaxtyping import install_import_hook
from support import checker
from tyro._parsers import ParserSpecification

jaxtyping.jaxtyped = checker.jaxtyped
install_import_hook("rora_theory", "support.checker.checker")

# JAX lowers every program in a new context, and loading all dialects takes longer than lowering an operation.
mlir.make_ir_context = functools.cache(mlir.make_ir_context)

_parsers: dict[Any, ParserSpecification] = {}


def _parser(config: Any, *, make: Callable[..., Any] = ParserSpecification.from_callable_or_type, **where: Any) -> Any:
    """Return a command's option parser, which is built once, as that takes longer than parsing."""
    if where["parent_classes"]:
        return make(config, **where)
    key = config, where["description"]
    if key not in _parsers:
        _parsers[key] = make(config, **where)
    return _parsers[key]


ParserSpecification.from_callable_or_type = staticmethod(_parser)  # type: ignore[method-assign]

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Seeded (derandomized): a test passes or fails the same way everywhere. Hypothesis also draws from the constants of all
# imported modules. Collecting them takes seconds and would make the draws depend on earlier tests.
assert hasattr(providers, "_get_local_constants"), "this version of hypothesis gathers constants elsewhere"
providers._get_local_constants = lambda: providers._local_constants
settings.register_profile("ci", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("ci")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Start with the files that have the most slow tests, so that no worker is left with one at the end.

    Files that use `optimised` come first of all. That fixture drops all compiled programs, of which there are few then.
    """
    _skip_without_torch(items)
    if hasattr(config, "workerinput"):
        slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
        first = {item.path for item in items if "optimised" in getattr(item, "fixturenames", ())}
        items.sort(key=lambda item: (item.path not in first, -slow[item.path]))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Assign all tests of a file to one worker, so that shared fixtures are built once."""
    from xdist.scheduler import LoadFileScheduling

    if config.getoption("dist") != "load":
        return None
    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log)


def pytest_collection_finish() -> None:
    """Freeze modules and tests, so that the garbage collector does not scan them repeatedly."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 100)


def pytest_sessionfinish() -> None:
    """Collect once and freeze, as pytest collects garbage five times before it ends."""
    gc.collect()
    gc.freeze()


def _folder(variable: str) -> Path:
    value = os.environ.get(variable)
    if not value:
        pytest.skip(f"{variable} is not set")
    if not Path(value).exists():
        pytest.fail(f"{variable} is {value!r}, which does not exist")
    return Path(value)


@pytest.fixture(scope="module")
def optimised() -> Iterator[None]:
    """Compile a module's programs with optimisation and fusion, as a user does, also in its child processes."""
    before = os.environ["XLA_FLAGS"]
    os.environ["XLA_FLAGS"] = before.replace("level=0", "level=1").replace("emitters=false", "emitters=true")
    jax.clear_caches()
    yield
    os.environ["XLA_FLAGS"] = before
    jax.clear_caches()


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Turn run-time type checks off, as for a user who passes a wrong type."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def time_limit() -> Callable[[float], AbstractContextManager[None]]:
    """Return ``time_limit(seconds)``, a context that fails instead of waiting forever."""

    @contextmanager
    def limit(seconds: float) -> Iterator[None]:
        def stop(*_: object) -> None:
            raise TimeoutError(f"not done in {seconds} s")

        before = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    return limit


@pytest.fixture(scope="session")
def commonsense_dir() -> Path:
    """Return the folder of the eight tasks' data in the LLM-Adapters schema."""
    return _folder("RORA_COMMONSENSE_DIR")


@pytest.fixture(scope="session")
def layer_data() -> Path:
    """Return an .npz file with gradients and inputs of real layers."""
    path = _folder("RORA_LAYER_DATA")
    return next(iter(sorted(path.glob("*.npz")))) if path.is_dir() else path


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    """Return the folder of the tiny model of `support.checkpoint`, which no test changes."""
    from support import checkpoint

    return checkpoint.model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def prompts_read(monkeypatch) -> list[int]:
    """Return a list of the lengths of all shared prompts that are read once for their continuations."""
    from rora_theory.lab.llama import shared_prompt

    lengths: list[int] = []

    def counted(*args, read=shared_prompt.read_prompt):
        lengths.append(len(args[1]))
        return read(*args)

    monkeypatch.setattr(shared_prompt, "read_prompt", counted)
    return lengths


@pytest.fixture
def full_disk(monkeypatch):
    """Return a function after which one write stores half of its bytes, and the next one none."""

    def fill() -> None:
        written, real = [], os.write

        def write(descriptor: int, data: bytes) -> int:
            if written:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            written.append(1)
            return real(descriptor, bytes(data[: len(data) // 2]))

        monkeypatch.setattr(os, "write", write)

    yield fill
    monkeypatch.undo()


MEASURING = ("regime", "coordinate_check", "tune", "transfer")
"""Commands that load a model in PyTorch; `transfer` with ``--check`` alone."""

WITH_TORCH = {
    "test_regime.py": (),
    "test_coordinate_check.py": (),
    "test_tune.py": (),
    "test_identities.py": MEASURING,
    "test_own_data.py": MEASURING,
    "test_refusals.py": MEASURING,
    "test_bad_input.py": tuple(f"sims.{name}" for name in MEASURING),
    "test_transfer.py": ("test_check_on_a_model", "test_no_file_is_written_if_the_check_is_refused"),
}
"""Files of tests that need PyTorch, with the beginnings of their cases or their names; without any, all of a file."""


def _skip_without_torch(items: list[pytest.Item]) -> None:
    """Skip the tests of commands that measure a model where PyTorch is not installed."""
    if importlib.util.find_spec("torch") is not None:
        return
    for item in items:
        folder, name = item.path.parent.name, item.path.name
        case = item.name.partition("[")[2] or item.name
        if name in WITH_TORCH and folder in ("sims", "tests") and case.startswith(WITH_TORCH[name] or ""):
            item.add_marker(pytest.mark.skip(reason="the extra torch"))
