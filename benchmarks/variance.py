"""The samplers of the first step beside a NumPy direct sampler, in one run: time to equal standard error.

    python benchmarks/variance.py

Medians over repeated timings; at p_in = 4096, rank 64, overlap 0.5, SGD, all at the same setting. Draws needed for a
standard error depend on the setting alone, not on the sampler, so the ratio of times per draw is the ratio at equal
standard error. Run it on a quiet machine.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from hardware import Others, in_words, machine

from rora_theory.runs import devices
from rora_theory.theory import sampling
from sims.common import cli
from sims.common.tables import print_table

SETTING = sampling.RandomStep(rank=64, p_in=4096, p_out=1, overlap=0.5)
REPEATS = 7
SECONDS = 1.0


def per_draw(start: Callable[[], Iterator[int]]) -> list[float]:
    """Seconds a draw, ``REPEATS`` times, each over about a second, after a warm-up."""
    steps = start()
    for _ in range(4):
        next(steps)
    found = []
    for _ in range(REPEATS):
        begin, draws = time.perf_counter(), 0
        while time.perf_counter() - begin < SECONDS:
            draws += next(steps)
        found.append((time.perf_counter() - begin) / draws)
    return found


def ours(sampler: sampling.Sampler, places: list[jax.Device]) -> Iterator[int]:
    """Draws of the package's sampler, moments summed as the sweep does."""
    sums = sampling.Sums()
    for block in sampling.stream(SETTING, sampler, jax.random.key(0), devices=places):
        sums = sums.add(block)
        yield block.shape[1]


def numpy_direct(threads: int) -> Iterator[int]:
    """The direct sampler in NumPy: float32 ziggurat normals, BLAS products, one generator a thread on every core."""
    rank, p_in, rho = SETTING.rank, SETTING.p_in, SETTING.overlap
    generators = [np.random.default_rng(seed) for seed in range(threads)]
    buffers = [np.empty((rank, p_in), np.float32) for _ in range(threads)]

    def some(thread: int, draws: int = 16) -> list[float]:
        generator, A = generators[thread], buffers[thread]
        found = []
        for _ in range(draws):
            generator.standard_normal(dtype=np.float32, out=A)
            x = generator.standard_normal(p_in, dtype=np.float32)
            x_next = rho * x + np.sqrt(1 - rho**2).astype(np.float32) * generator.standard_normal(
                p_in, dtype=np.float32
            )
            found.append(-float((A @ x) @ (A @ x_next)))
        return found

    with ThreadPoolExecutor(threads) as pool:
        while True:
            yield sum(len(found) for found in pool.map(some, range(threads)))


def normals(places: list[jax.Device]) -> Iterator[int]:
    """`jax.random.normal` alone: a draw's r p_in numbers, in the direct sampler's own portions, kept by a sum."""
    kind = sampling.BlockKind.from_settings([SETTING], "direct")
    shape = (kind.step * SETTING.rank, SETTING.p_in)

    @jax.jit
    def block(key: jax.Array) -> jax.Array:
        keys = jax.random.split(key, kind.draws // kind.step)
        return jax.lax.map(lambda part: jnp.sum(jax.random.normal(part, shape)), keys)

    keys = [jax.device_put(jax.random.key(number), place) for number, place in enumerate(places)]
    pending = [block(key) for key in keys for _ in range(2)]
    turn = 0
    while True:
        pending.append(block(keys[turn % len(keys)]))
        turn += 1
        pending.pop(0).block_until_ready()
        yield kind.draws


@dataclass(frozen=True)
class Config:
    """Nothing to choose."""


def main(_: Config) -> None:
    """Time all five and print the table."""
    others = Others()
    places = devices.pick(None)
    cores = len(places)
    runs = {
        "direct, NumPy": partial(numpy_direct, cores),
        "jax.random.normal alone": partial(normals, places),
        "direct": partial(ours, "direct", places),
        "pairs": partial(ours, "pairs", places),
        "chi_square": partial(ours, "chi_square", places),
    }
    times = {name: per_draw(start) for name, start in runs.items()}
    medians = {name: statistics.median(found) for name, found in times.items()}
    print(in_words(machine(packages=("jax", "jaxlib", "numpy"))))
    print(others.in_words())
    print_table(
        f"p_in = {SETTING.p_in}, rank = {SETTING.rank}: microseconds a draw over {REPEATS} timings",
        ["sampler", "median", "min", "max", "NumPy / this", "this / normals alone"],
        [
            [
                name,
                *(f"{1e6 * value:.4g}" for value in (medians[name], min(found), max(found))),
                f"{medians['direct, NumPy'] / medians[name]:.4g}",
                f"{medians[name] / medians['jax.random.normal alone']:.3g}",
            ]
            for name, found in times.items()
        ],
    )


if __name__ == "__main__":
    cli.run(lambda: main(cli.parse(Config, description=__doc__)))
