"""Run everything that needs an NVIDIA GPU, in at most nine minutes; each result is written as soon as it is known.

    python benchmarks/gather_wheels.py               beforehand, on a machine with a package index
    python benchmarks/gather_wheels.py --install     on the machine with the GPU
    python benchmarks/gpu.py --out gpu.jsonl

Sections, the most valuable first:

  rate        the card's own rates of bfloat16 products and of copies, as a reference for the other sections
  tests       `pytest -m gpu`: fused attention, whole steps against the CPU's, bitwise resumption, bfloat16
  training    LLaMA-7B shapes, random weights, LoRA and DoRA of ranks 8 and 128, batches of 16 x 256 and 4 x 2048:
              tokens/s, share of the card's rate, and peak memory beside the compiler's analysis; compared with
              torch + peft (bfloat16 autocast, fused attention, eager and compiled)
  scoring     log-likelihoods of random choices, as in the protocol `harness`, compared with transformers
  generation  4 beams, 32 new tokens, compared with transformers
  sweep       `python -m sims.variance_sweep` at its defaults

Every part runs in a process of its own with a time limit. A part that fails, hangs or runs out of memory therefore
loses its own results only. ``--rehearse`` runs the same code on a CPU at tiny sizes.
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
RECORD_PREFIX = "@record "
"""Beginning of a line with a worker's record; the rest of the line is a JSON object."""

READY = "@ready"
"""Line that a worker prints once it is set up."""

PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "numpy", "optax", "orbax-checkpoint", "torch",
            "transformers", "peft")  # fmt: skip
Section = Literal["rate", "tests", "training", "scoring", "generation", "sweep"]
RESERVED: dict[str, float] = {"rate": 25, "tests": 80, "training": 200, "scoring": 55, "generation": 55, "sweep": 45}
"""Seconds of the nine minutes that each section is guaranteed: earlier sections must leave them."""

TOTAL_SECONDS = 540.0
"""Time of all sections that `RESERVED` refers to."""
CLOSING = 12.0
"""Seconds reserved for ending running processes and for the last lines."""


@dataclass(frozen=True)
class GpuOptions:
    out: Path = Path("gpu.jsonl")
    """File of JSON lines, to which the records are appended"""
    minutes: float = 9.0
    """Time of all sections together, in minutes"""
    sections: tuple[Section, ...] = ("rate", "tests", "training", "scoring", "generation", "sweep")
    """Sections to run"""
    rehearse: bool = False
    """Run tiny sizes on a CPU, to show that everything runs; nothing is measured"""


@dataclass(frozen=True)
class Cell:
    """Training run to time.

    Attributes:
      method: ``"lora"`` or ``"dora"``.
      rank: Rank of the adapter.
      rows: Number of sequences in a batch.
      width: Number of tokens of a sequence.
      compiled: Whether the peer compiles its layers with torch.compile.
    """

    method: str
    rank: int
    rows: int
    width: int
    compiled: bool = False

    @property
    def name(self) -> str:
        """Name of the run in the records."""
        return f"{self.method} r={self.rank} {self.rows}x{self.width}{' compiled' if self.compiled else ''}"


@dataclass(frozen=True)
class Sizes:
    """Sizes of everything that is run.

    Attributes:
      platform: JAX's name of the device, which is torch's name too.
      model: Shape of the model, as fields of both configurations of LLaMA.
      ranks: Ranks of the adapters.
      shapes: Rows and width of the batches.
      product: Width of the square matrices of the section rate.
      copied: Number of bfloat16 numbers that the section rate copies.
      steps: Number of timed training steps of each cell.
      items: Number of scored items.
      prompts: Number of prompts of the section generation.
      new_tokens: Number of tokens generated after each prompt.
      sweep: Arguments of sims.variance_sweep.
    """

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
        """Return the runs of one shape, least memory first, since a device reports only its highest peak so far."""
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
    """File of JSON lines, each of which is printed as text too.

    Attributes:
      records: Records that were written.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self.records = path, list[dict[str, Any]]()

    def write(self, section: str, name: str, **results: Any) -> None:
        """Append a record, which is on the disk when this returns."""
        record = {"section": section, "name": name} | results
        self.records.append(record)
        with self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        print(describe(record), flush=True)

    def find(self, section: str, name: str) -> dict[str, Any]:
        """Return the record of a name, or an empty dictionary."""
        return next((r for r in self.records if (r["section"], r["name"]) == (section, name)), {})


@dataclass(frozen=True)
class WorkerTask:
    """Program of a worker, and the parts that it runs one after another.

    Attributes:
      section: Section of the records.
      side: ``"ours"`` or ``"peer"``.
      script: File name of the program.
      spec: Settings of the program, a JSON object.
      names: Names of the parts.
      environment: Additional environment variables.
    """

    section: str
    side: str
    script: str
    spec: dict[str, Any]
    names: list[str]
    environment: dict[str, str] = field(default_factory=dict)


def run_worker(log: Log, task: WorkerTask, until: float) -> None:
    """Run the parts of a task in a process and log each record.

    A process that dies in a part is started again for the parts after it. One that dies before it is set up ends the
    task.

    Args:
      log: Log of the records.
      task: Program and parts to run.
      until: Time of `time.monotonic` at which the process is ended. Unfinished parts are logged as out of time.
    """
    waiting = list(task.names)
    ready = False

    def read(line: str) -> None:
        nonlocal ready
        ready = ready or line == READY
        if line.startswith(RECORD_PREFIX):
            record = json.loads(line.removeprefix(RECORD_PREFIX))
            name = record.pop("name")
            waiting.remove(name)
            log.write(task.section, f"{task.side} {name}", **record)

    while waiting and until - time.monotonic() > 1:
        command = [sys.executable, str(HERE / task.script), json.dumps(task.spec | {"names": waiting})]
        ready = False
        status, messages = run_process(command, until, task.environment, read)
        if time.monotonic() > until - 0.2:
            break
        # The process has ended by itself. It crashed in the first waiting part, or in its set-up, which they all need.
        for name in waiting[: 1 if ready else None]:
            waiting.remove(name)
            log.write(task.section, f"{task.side} {name}", status="crashed", exit_status=status, output=messages)
    for name in waiting:
        log.write(task.section, f"{task.side} {name}", status="out of time")


def run_process(
    command: Sequence[str], until: float, environment: dict[str, str], read: Callable[[str], None]
) -> tuple[int, str]:
    """Run a command from the repository's root, and end it and its children when the time is over.

    Args:
      command: Program and arguments.
      until: Time of `time.monotonic` at which the command is ended.
      environment: Additional environment variables.
      read: Function that is called with every line of the command's standard output.

    Returns:
      The exit status, and the last 2,000 characters of standard error.
    """
    inherited = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
    with tempfile.TemporaryFile("w+") as messages:
        options: dict[str, Any] = {"stderr": messages, "text": True, "cwd": ROOT, "env": inherited | environment}
        with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True, **options) as process:
            timer = threading.Timer(max(until - time.monotonic(), 0.1), kill, (process,))
            timer.start()
            try:
                assert process.stdout is not None
                for line in process.stdout:
                    read(line.rstrip("\n"))
                status = process.wait()
            finally:
                timer.cancel()
                kill(process)
        messages.seek(0)
        return status, messages.read()[-2000:]


def outcome(status: int, until: float) -> str:
    """Return "done", "failed" or "out of time" for the exit status and the time limit of `run_process`."""
    if status == -signal.SIGKILL and time.monotonic() >= until:
        return "out of time"
    return "failed" if status else "done"


def kill(process: subprocess.Popen[str]) -> None:
    """Kill a process and all processes that it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


def send_record(record: dict[str, Any]) -> None:
    """Send a worker's record to `run_worker`."""
    print(RECORD_PREFIX + json.dumps(record), flush=True)


def run_parts(spec: dict[str, Any], work: Callable[[str], dict[str, Any]]) -> None:
    """Run the parts of a worker and send a record of each, also of one that raises an exception.

    Args:
      spec: Settings of the worker with the ``names`` of its parts.
      work: Function that runs the part of a given name and returns its results.
    """
    print(READY, flush=True)
    for name in spec["names"]:
        begin = time.perf_counter()
        try:
            results = {"status": "done"} | work(name)
        except Exception as error:
            results = {"status": "failed", "error": f"{type(error).__name__}: {error}"[:600]}
        send_record({"name": name} | results | {"wall_seconds": round(time.perf_counter() - begin, 2)})


# Inputs of both sides: the same token ids.


def random_items(count: int, vocabulary: int, longest: int = 100) -> list[list[tuple[tuple[int, ...], int]]]:
    """Return items of four choices, each as the tokens of context and choice and the number of the choice's tokens.

    Args:
      count: Number of items.
      vocabulary: Number of tokens in the vocabulary.
      longest: Maximum number of tokens of a context, which has at least 30. The first 20 are the same in all items.
    """
    random = np.random.default_rng(0)
    shared = random.integers(3, vocabulary, 20).tolist()
    items = []
    for _ in range(count):
        context = (*shared, *random.integers(3, vocabulary, random.integers(10, longest - 19)).tolist())
        sizes = random.integers(1, 13, 4).tolist()
        items.append([((*context, *random.integers(3, vocabulary, size).tolist()), size) for size in sizes])
    return items


def random_prompts(count: int, vocabulary: int, longest: int = 160) -> list[list[int]]:
    """Return prompts of 60 to ``longest`` tokens, of which the first 40 are the same in all."""
    random = np.random.default_rng(1)
    shared = random.integers(3, vocabulary, 40).tolist()
    return [
        [*shared, *random.integers(3, vocabulary, random.integers(20, longest - 39)).tolist()] for _ in range(count)
    ]


def summarise_timings(values: Sequence[float]) -> dict[str, Any]:
    """Return the median of a few timings in seconds, and all of them."""
    return {"seconds": float(np.median(values)), "timings": [round(value, 5) for value in values]}


# The sections.


def run_rate(log: Log, sizes: Sizes, until: float) -> None:
    """Measure the rates of matrix products and copies that the device reaches at best."""
    run_worker(log, our_task("rate", sizes, ["card"]), until)


def run_tests(log: Log, sizes: Sizes, until: float) -> None:
    """Run the GPU tests, with a record for each.

    XLA adds in a fixed order, since otherwise no two runs agree bitwise.
    """
    # The tests compare the GPU with the CPU, so both platforms are needed; a rehearsal has only the CPU.
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
        if match := re.match(r"tests/\S+::(.+?) (PASSED|FAILED|SKIPPED|ERROR)", line):
            log.write("tests", match[1], status=match[2].lower())

    status, messages = run_process(command, until, environment, read)
    # Counts of outcomes in pytest's last line.
    counts = re.findall(r"(\d+) (passed|failed|skipped|error)", lines[-1]) if lines else []
    outcomes = {name: int(count) for count, name in counts}
    output = "" if status == 0 else "\n".join(lines)[-6000:] + messages
    log.write("tests", "pytest", status=outcome(status, until), exit_status=status, output=output, **outcomes)


def run_training(log: Log, sizes: Sizes, until: float) -> None:
    """Time the training steps of both sides at each shape; each side gets an equal part of the remaining time."""
    rounds = [(side, shape) for shape in sizes.shapes for side in ("ours", "peer")]
    rate = log.find("rate", "ours card").get("product_flops_per_second")
    for number, (side, shape) in enumerate(rounds):
        now = time.monotonic()
        limit = now + (until - now) / (len(rounds) - number)
        cells = sizes.cells(shape)
        if side == "ours":
            task = our_task("training", sizes, [cell.name for cell in cells], rate=rate)
        else:
            cells += [Cell(cell.method, cell.rank, *shape, compiled=True) for cell in cells]
            task = peer_task("training", sizes, [cell.name for cell in cells])
        task.spec["cells"] = {cell.name: asdict(cell) for cell in cells}
        run_worker(log, task, limit)


def run_scoring(log: Log, sizes: Sizes, until: float) -> None:
    """Time the scoring of both sides."""
    run_both_sides(log, sizes, until, "scoring", ["4 choices"])


def run_generation(log: Log, sizes: Sizes, until: float) -> None:
    """Time the generation of both sides."""
    run_both_sides(log, sizes, until, "generation", ["4 beams"])


def run_both_sides(log: Log, sizes: Sizes, until: float, section: str, names: list[str]) -> None:
    """Run this side with half of the remaining time, then the peer with the rest."""
    now = time.monotonic()
    run_worker(log, our_task(section, sizes, names), now + (until - now) / 2)
    run_worker(log, peer_task(section, sizes, names), until)


def run_sweep(log: Log, sizes: Sizes, until: float) -> None:
    """Run sims.variance_sweep as a command, whose manifest has its time."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "sims.variance_sweep", *sizes.sweep, "--out", folder]
        begin = time.monotonic()
        status, messages = run_process(command, until, {"JAX_PLATFORMS": sizes.platform}, lambda _: None)
        results: dict[str, Any] = {"exit_status": status, "wall_seconds": round(time.monotonic() - begin, 1)}
        manifest = Path(folder) / "manifest.json"
        if status == 0 and manifest.exists():
            entries = json.loads(manifest.read_text())
            results |= {name: entries.get(name) for name in ("device", "last_session_seconds")}
            verdicts = json.loads((Path(folder) / "verdicts.json").read_text())
            results["verdicts"] = [verdict["status"] for verdict in verdicts]
        log.write("sweep", "variance_sweep", status=outcome(status, until), output=messages[-600:], **results)


RUNS: dict[str, Callable[[Log, Sizes, float], None]] = {
    "rate": run_rate,
    "tests": run_tests,
    "training": run_training,
    "scoring": run_scoring,
    "generation": run_generation,
    "sweep": run_sweep,
}


def our_task(section: str, sizes: Sizes, names: list[str], **settings: Any) -> WorkerTask:
    """Return a task of this package's side, which reuses programs that were compiled on this machine before.

    Args:
      section: Section of the task.
      sizes: Sizes of everything that is run.
      names: Names of the parts.
      **settings: Additional settings of the worker.
    """
    environment = {
        "JAX_PLATFORMS": sizes.platform,
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92",
        "JAX_COMPILATION_CACHE_DIR": os.path.join(tempfile.gettempdir(), "rora-gpu-programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1",
    }
    spec = {"section": section, "sizes": asdict(sizes)} | settings
    return WorkerTask(section, "ours", "gpu_ours.py", spec, names, environment)


def peer_task(section: str, sizes: Sizes, names: list[str]) -> WorkerTask:
    """Return a task of the peer's side, torch."""
    environment = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    return WorkerTask(section, "peer", "gpu_peer.py", {"section": section, "sizes": asdict(sizes)}, names, environment)


def describe_machine() -> dict[str, Any]:
    """Return the cards and the versions of the software."""
    machine: dict[str, Any] = {"python": sys.version.split()[0], "processors": os.cpu_count()}
    for name in PACKAGES:
        try:
            machine[name] = version(name)
        except PackageNotFoundError:
            machine[name] = None
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version,utilization.gpu", "--format=csv,noheader"]
    try:
        listing = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
        machine["cards"] = listing.split("\n")
    except (OSError, subprocess.SubprocessError) as error:
        machine["cards"] = f"nvidia-smi: {error}"
    return machine


def describe(record: dict[str, Any]) -> str:
    """Return a record as one line of text."""
    parts = [f"{record['section']}: {record['name']}: {record.get('status', '')}"]
    # Keys of the record that are printed, with their format and unit.
    formats = {
        "product_flops_per_second": ("{:.1f} TFLOP/s", 1e-12),
        "copied_bytes_per_second": ("copies {:.2f} TB/s", 1e-12),
        "tokens_per_second": ("{:.0f} tokens/s", 1),
        "utilisation": ("{:.1%} of the card's rate", 1),
        "peak_bytes": ("peak {:.2f} GB", 1e-9),
        "compiler_bytes": ("{:.2f} GB by the compiler's analysis", 1e-9),
        "items_per_second": ("{:.2f} items/s", 1),
        "last_session_seconds": ("{:.1f} s", 1),
    }
    for key, (template, unit) in formats.items():
        if isinstance(value := record.get(key), (int, float)):
            parts.append(template.format(value * unit))
    return ", ".join([*parts, *([record["error"]] if "error" in record else [])])


def compare_sides(log: Log) -> Iterator[str]:
    """Yield a line of text with this side's rate relative to the peer's best, for each part that both sides ran."""
    for record in log.records:
        side, _, name = record["name"].partition(" ")
        if side != "ours":
            continue
        for key in ("tokens_per_second", "items_per_second"):
            peers = [log.find(record["section"], f"peer {name}{suffix}") for suffix in ("", " compiled")]
            peer_rates = [rate for peer in peers if (rate := peer.get(key))]
            if record.get(key) and peer_rates:
                yield f"{record['section']}: {name}: {record[key] / max(peer_rates):.2f} times the peer's {key}"


def main(config: GpuOptions) -> bool:
    """Run the sections, and return whether every part succeeded."""
    begin = time.monotonic()
    finish = begin + 60 * config.minutes - min(CLOSING, 6 * config.minutes)
    sizes = REHEARSAL if config.rehearse else SEVEN_B
    log = Log(config.out)
    log.write("machine", "rehearsal on a CPU" if config.rehearse else "GPU", status="done", **describe_machine())
    # A section ends early enough to leave later ones their reserved time, and may use what earlier ones left over.
    scale = 60 * config.minutes / TOTAL_SECONDS
    for number, section in enumerate(config.sections):
        reserved = scale * sum(RESERVED[name] for name in config.sections[number + 1 :])
        until = max(finish - reserved, time.monotonic() + 1)
        started = time.monotonic()
        if started > finish - 1:
            log.write(section, "all", status="out of time")
            continue
        try:
            RUNS[section](log, sizes, min(until, finish))
        except Exception as error:
            log.write(section, "all", status="failed", error=f"{type(error).__name__}: {error}"[:600])
        log.write(section, "section", status="ended", wall_seconds=round(time.monotonic() - started, 1))
    lines = list(compare_sides(log))
    log.write("summary", "ours over the peer", status="done", lines=lines, seconds=round(time.monotonic() - begin, 1))
    print("\n".join(lines))
    return all(record.get("status") in ("done", "passed", "ended") for record in log.records)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from sims.common import cli

    cli.run_command(lambda: sys.exit(0 if main(cli.parse(GpuOptions, description=__doc__ or "")) else 1))
