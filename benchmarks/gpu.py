"""All that needs an NVIDIA GPU, in one command of at most nine minutes; each figure is written as soon as it is known.

    python benchmarks/gather_wheels.py               beforehand, where a package index is reached
    python benchmarks/gather_wheels.py --install     there
    python benchmarks/gpu.py --out gpu.jsonl

In order of value:

  rate        the card's own rate of bfloat16 products and of copies, against which the rest is set
  tests       `pytest -m gpu`: fused attention, whole steps beside the CPU's, resumption to the bit, bfloat16
  training    LLaMA-7B shapes, random weights, LoRA and DoRA of ranks 8 and 128, batches of 16 x 256 and 4 x 2048:
              tokens/s, share of the card's rate, peak memory beside what `sims.capacity` plans; beside torch + peft
              (bfloat16 autocast, fused attention, as it is and compiled)
  scoring     log-likelihoods of made-up choices, as `harness` asks for them, beside transformers
  generation  4 beams, 32 new tokens, beside transformers
  sweep       `python -m sims.variance_sweep` at its defaults

Every part runs in a process of its own with a time limit, so that one that fails, hangs or runs out of memory loses its
own figures alone. ``--rehearse`` is the same code on a CPU at tiny sizes.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
MARK = "@record "
"""What a worker's answers begin with; the rest of a line is a JSON object."""

READY = "@ready"
"""A worker's line once it is set up."""

PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "numpy", "optax", "orbax-checkpoint", "torch",
            "transformers", "peft")  # fmt: skip
Section = Literal["rate", "tests", "training", "scoring", "generation", "sweep"]
RESERVED: dict[str, float] = {"rate": 25, "tests": 80, "training": 200, "scoring": 55, "generation": 55, "sweep": 45}
"""Seconds that earlier sections leave to a section, of nine minutes."""

WHOLE = 540.0
CLOSING = 12.0
"""Seconds kept for ending what still runs and for the last lines."""


@dataclass(frozen=True)
class Config:
    """Settings of the benchmark."""

    out: Path = Path("gpu.jsonl")
    """file of JSON lines; what it has already is kept"""
    minutes: float = 9.0
    """time for everything"""
    sections: tuple[Section, ...] = ("rate", "tests", "training", "scoring", "generation", "sweep")
    """sections to run"""
    rehearse: bool = False
    """tiny sizes on a CPU: shows that everything runs, measures nothing"""


@dataclass(frozen=True)
class Cell:
    """One training run that is timed."""

    method: str
    rank: int
    rows: int
    width: int
    compiled: bool = False

    @property
    def name(self) -> str:
        """As the figures name it."""
        return f"{self.method} r={self.rank} {self.rows}x{self.width}{' compiled' if self.compiled else ''}"


@dataclass(frozen=True)
class Sizes:
    """What is run: the model's shape, and how much of everything."""

    platform: str
    model: dict[str, Any]
    ranks: tuple[int, ...]
    shapes: tuple[tuple[int, int], ...]
    product: int
    copied: int
    steps: int
    items: int
    prompts: int
    new_tokens: int
    sweep: tuple[str, ...] = ()

    def cells(self, shape: tuple[int, int]) -> list[Cell]:
        """Runs of one shape, least memory first: of what a device has held at most only a new height is seen."""
        return [Cell(method, rank, *shape) for rank in self.ranks for method in ("lora", "dora")]


SEVEN_B = Sizes(
    platform="cuda",
    model={
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
    },
    ranks=(8, 128),
    shapes=((16, 256), (4, 2048)),
    product=8192,
    copied=2**30,
    steps=5,
    items=200,
    prompts=16,
    new_tokens=32,
)
REHEARSAL = Sizes(
    platform="cpu",
    model={
        "vocab_size": 256,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    },
    ranks=(2, 4),
    shapes=((2, 16), (1, 32)),
    product=64,
    copied=2**16,
    steps=2,
    items=4,
    prompts=2,
    new_tokens=4,
    sweep=("--ranks", "1", "4", "--p-in", "64", "--p-out", "4", "--relative-error", "0.1"),
)


class Log:
    """The file of JSON lines, and a line of text for each."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self.records = path, list[dict[str, Any]]()

    def write(self, section: str, name: str, **figures: Any) -> None:
        """Append a record; it is on the disk when this returns."""
        record = {"section": section, "name": name} | figures
        self.records.append(record)
        with self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        print(describe(record), flush=True)

    def find(self, section: str, name: str) -> dict[str, Any]:
        """The record of that name; empty where there is none."""
        return next((r for r in self.records if (r["section"], r["name"]) == (section, name)), {})


@dataclass(frozen=True)
class Task:
    """A worker's program and what it is to do: one thing after another, each with a name."""

    section: str
    side: str
    script: str
    spec: dict[str, Any]
    names: list[str]
    environment: dict[str, str] = field(default_factory=dict)


def run_worker(log: Log, task: Task, until: float) -> None:
    """Have a process do what ``task`` names, and record each answer; begun again without a part that killed it.

    A part that is not done at ``until`` (of `time.monotonic`) is recorded as out of time. A process that ends before it
    is set up ends the task.
    """
    waiting = list(task.names)
    ready = False

    def read(line: str) -> None:
        nonlocal ready
        ready = ready or line == READY
        if line.startswith(MARK):
            record = json.loads(line.removeprefix(MARK))
            name = record.pop("name")
            waiting.remove(name)
            log.write(task.section, f"{task.side} {name}", **record)

    while waiting and until - time.monotonic() > 1:
        command = [sys.executable, str(HERE / task.script), json.dumps(task.spec | {"names": waiting})]
        ready = False
        status, last = stream(command, until, task.environment, read)
        if time.monotonic() > until - 0.2:
            break
        for name in waiting[: 1 if ready else None]:
            waiting.remove(name)
            log.write(task.section, f"{task.side} {name}", status="crashed", exit_status=status, output=last)
    for name in waiting:
        log.write(task.section, f"{task.side} {name}", status="out of time")


def stream(
    command: Sequence[str], until: float, environment: dict[str, str], read: Callable[[str], None]
) -> tuple[int, str]:
    """Run a command, give every line of its output to ``read``, end it and its children at ``until``.

    Returns:
      exit status, and the end of its messages.
    """
    own = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
    with tempfile.TemporaryFile("w+") as messages:
        options: dict[str, Any] = {"stderr": messages, "text": True, "cwd": ROOT, "env": own | environment}
        with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True, **options) as process:
            timer = threading.Timer(max(until - time.monotonic(), 0.1), end, (process,))
            timer.start()
            try:
                assert process.stdout is not None
                for line in process.stdout:
                    read(line.rstrip("\n"))
                status = process.wait()
            finally:
                timer.cancel()
                end(process)
        messages.seek(0)
        return status, messages.read()[-2000:]


def how(status: int, until: float) -> str:
    """How a command of `stream` ended."""
    if status == -signal.SIGKILL and time.monotonic() >= until:
        return "out of time"
    return "failed" if status else "done"


def end(process: subprocess.Popen[str]) -> None:
    """End a process and all that it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


def answer(record: dict[str, Any]) -> None:
    """A worker's record, sent."""
    print(MARK + json.dumps(record), flush=True)


def each(spec: dict[str, Any], work: Callable[[str], dict[str, Any]]) -> None:
    """A worker's loop: ``work(name)`` for every name that is asked for; one that fails says why, the next goes on."""
    print(READY, flush=True)
    for name in spec["names"]:
        begin = time.perf_counter()
        try:
            found = {"status": "done"} | work(name)
        except Exception as error:
            found = {"status": "failed", "error": f"{type(error).__name__}: {error}"[:600]}
        answer({"name": name} | found | {"wall_seconds": round(time.perf_counter() - begin, 2)})


# What both sides are given: the same texts of the same lengths, in token ids.


def made_items(count: int, vocabulary: int, longest: int = 100) -> list[list[tuple[tuple[int, ...], int]]]:
    """Items of four choices: tokens of context and choice, and how many of them are the choice's.

    Contexts have 30 to ``longest`` tokens, of which all share the first 20, and choices 1 to 12.
    """
    random = np.random.default_rng(0)
    shared = random.integers(3, vocabulary, 20).tolist()
    found = []
    for _ in range(count):
        context = (*shared, *random.integers(3, vocabulary, random.integers(10, longest - 19)).tolist())
        sizes = random.integers(1, 13, 4).tolist()
        found.append([((*context, *random.integers(3, vocabulary, size).tolist()), size) for size in sizes])
    return found


def made_prompts(count: int, vocabulary: int, longest: int = 160) -> list[list[int]]:
    """Prompts of 60 to ``longest`` tokens that begin alike."""
    random = np.random.default_rng(1)
    shared = random.integers(3, vocabulary, 40).tolist()
    return [
        [*shared, *random.integers(3, vocabulary, random.integers(20, longest - 39)).tolist()] for _ in range(count)
    ]


def middle(values: Sequence[float]) -> dict[str, Any]:
    """Median and all of a few timings, in seconds."""
    return {"seconds": float(np.median(values)), "timings": [round(value, 5) for value in values]}


# The sections.


def run_rate(log: Log, sizes: Sizes, until: float) -> None:
    run_worker(log, ours("rate", sizes, ["card"]), until)


def run_tests(log: Log, sizes: Sizes, until: float) -> None:
    """The marked tests, one record each; sums go in a fixed order, without which no run repeats another's bits."""
    environment = {"JAX_PLATFORMS": "cuda,cpu", "XLA_FLAGS": "--xla_gpu_deterministic_ops=true"}
    if sizes.platform == "cpu":
        environment = {"JAX_PLATFORMS": "cpu", "RORA_GPU_REHEARSAL": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-v",
        "-m",
        "gpu",
        "-W",
        "default",
        "-p",
        "no:cacheprovider",
        "tests/test_gpu.py",
    ]
    lines: list[str] = []

    def read(line: str) -> None:
        lines.append(line)
        if found := re.match(r"tests/\S+::(.+?) (PASSED|FAILED|SKIPPED|ERROR)", line):
            log.write("tests", found[1], status=found[2].lower())

    status, last = stream(command, until, environment, read)
    counts = re.findall(r"(\d+) (passed|failed|skipped|error)", lines[-1]) if lines else []
    figures = {what: int(count) for count, what in counts}
    output = "" if status == 0 else "\n".join(lines)[-6000:] + last
    log.write("tests", "pytest", status=how(status, until), exit_status=status, output=output, **figures)


def run_training(log: Log, sizes: Sizes, until: float) -> None:
    """Both sides of each shape, each with an equal part of the time that is left."""
    rounds = [(side, shape) for shape in sizes.shapes for side in ("ours", "peer")]
    rate = log.find("rate", "ours card").get("product_flops_per_second")
    for number, (side, shape) in enumerate(rounds):
        now = time.monotonic()
        limit = now + (until - now) / (len(rounds) - number)
        cells = sizes.cells(shape)
        if side == "ours":
            task = ours("training", sizes, [cell.name for cell in cells], rate=rate)
        else:
            cells += [Cell(cell.method, cell.rank, *shape, compiled=True) for cell in cells]
            task = peer("training", sizes, [cell.name for cell in cells])
        task.spec["cells"] = {cell.name: asdict(cell) for cell in cells}
        run_worker(log, task, limit)


def run_scoring(log: Log, sizes: Sizes, until: float) -> None:
    both(log, sizes, until, "scoring", ["4 choices"])


def run_generation(log: Log, sizes: Sizes, until: float) -> None:
    both(log, sizes, until, "generation", ["4 beams"])


def both(log: Log, sizes: Sizes, until: float, section: str, names: list[str]) -> None:
    """This side with half of the time, then the peer with what is left."""
    now = time.monotonic()
    run_worker(log, ours(section, sizes, names), now + (until - now) / 2)
    run_worker(log, peer(section, sizes, names), until)


def run_sweep(log: Log, sizes: Sizes, until: float) -> None:
    """The command itself, whose own manifest says how long it took."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "sims.variance_sweep", *sizes.sweep, "--out", folder]
        begin = time.monotonic()
        status, last = stream(command, until, {"JAX_PLATFORMS": sizes.platform}, lambda _: None)
        figures: dict[str, Any] = {"exit_status": status, "wall_seconds": round(time.monotonic() - begin, 1)}
        manifest = Path(folder) / "manifest.json"
        if status == 0 and manifest.exists():
            told = json.loads(manifest.read_text())
            figures |= {name: told.get(name) for name in ("device", "last_session_seconds")}
            held = json.loads((Path(folder) / "verdicts.json").read_text())
            figures["verdicts"] = [one["status"] for one in held]
        log.write("sweep", "variance_sweep", status=how(status, until), output=last[-600:], **figures)


RUNS: dict[str, Callable[[Log, Sizes, float], None]] = {
    "rate": run_rate,
    "tests": run_tests,
    "training": run_training,
    "scoring": run_scoring,
    "generation": run_generation,
    "sweep": run_sweep,
}


def ours(section: str, sizes: Sizes, names: list[str], **more: Any) -> Task:
    """Work for this package's side; a program that was compiled once on this machine is found again."""
    environment = {
        "JAX_PLATFORMS": sizes.platform,
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92",
        "JAX_COMPILATION_CACHE_DIR": os.path.join(tempfile.gettempdir(), "rora-gpu-programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1",
    }
    spec = {"section": section, "sizes": asdict(sizes)} | more
    return Task(section, "ours", "gpu_ours.py", spec, names, environment)


def peer(section: str, sizes: Sizes, names: list[str]) -> Task:
    """Work for torch's side."""
    environment = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    return Task(section, "peer", "gpu_peer.py", {"section": section, "sizes": asdict(sizes)}, names, environment)


def machine() -> dict[str, Any]:
    """The card and the software."""
    found: dict[str, Any] = {"python": sys.version.split()[0], "processors": os.cpu_count()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version,utilization.gpu", "--format=csv,noheader"]
    try:
        found["cards"] = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split(
            "\n"
        )
    except (OSError, subprocess.SubprocessError) as error:
        found["cards"] = f"nvidia-smi: {error}"
    return found


def describe(record: dict[str, Any]) -> str:
    """A record in one line of text."""
    parts = [f"{record['section']}: {record['name']}: {record.get('status', '')}"]
    figures = {
        "product_flops_per_second": ("{:.1f} TFLOP/s", 1e-12),
        "copied_bytes_per_second": ("copies {:.2f} TB/s", 1e-12),
        "tokens_per_second": ("{:.0f} tokens/s", 1),
        "utilisation": ("{:.1%} of the card's rate", 1),
        "peak_bytes": ("peak {:.2f} GB", 1e-9),
        "planned_bytes": ("planned {:.2f} GB", 1e-9),
        "items_per_second": ("{:.2f} items/s", 1),
        "last_session_seconds": ("{:.1f} s", 1),
    }
    for key, (form, unit) in figures.items():
        if isinstance(value := record.get(key), (int, float)):
            parts.append(form.format(value * unit))
    return ", ".join([*parts, *([record["error"]] if "error" in record else [])])


def comparisons(log: Log) -> Iterator[str]:
    """This side over the peer at its best, for everything that both did."""
    for record in log.records:
        side, _, name = record["name"].partition(" ")
        if side != "ours":
            continue
        for key in ("tokens_per_second", "items_per_second"):
            theirs = [log.find(record["section"], f"peer {name}{how}").get(key) for how in ("", " compiled")]
            known = [value for value in theirs if value]
            if record.get(key) and known:
                yield f"{record['section']}: {name}: {record[key] / max(known):.2f} times the peer's {key}"


def main(config: Config) -> bool:
    """Run the sections; whether all that was tried was done."""
    begin = time.monotonic()
    finish = begin + 60 * config.minutes - min(CLOSING, 6 * config.minutes)
    sizes = REHEARSAL if config.rehearse else SEVEN_B
    log = Log(config.out)
    log.write("machine", "rehearsal on a CPU" if config.rehearse else "GPU", status="done", **machine())
    scale = 60 * config.minutes / WHOLE
    for number, section in enumerate(config.sections):
        later = scale * sum(RESERVED[name] for name in config.sections[number + 1 :])
        until = max(finish - later, time.monotonic() + 1)
        started = time.monotonic()
        if started > finish - 1:
            log.write(section, "all", status="out of time")
            continue
        try:
            RUNS[section](log, sizes, min(until, finish))
        except Exception as error:
            log.write(section, "all", status="failed", error=f"{type(error).__name__}: {error}"[:600])
        log.write(section, "section", status="ended", wall_seconds=round(time.monotonic() - started, 1))
    lines = list(comparisons(log))
    log.write("summary", "ours over the peer", status="done", lines=lines, seconds=round(time.monotonic() - begin, 1))
    print("\n".join(lines))
    return all(record.get("status") in ("done", "passed", "ended") for record in log.records)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from sims.common import cli

    cli.run(lambda: sys.exit(0 if main(cli.parse(Config, description=__doc__ or "")) else 1))
