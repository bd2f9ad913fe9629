"""Compare the samplers of the first step with a direct sampler in NumPy: time to equal standard error.

    python benchmarks/variance.py

Times are medians over repeated timings. All samplers have the same setting: p_in = 4096, rank 64, overlap 0.5, SGD. The
number of draws for a given standard error depends on the setting alone, not on the sampler. The ratio of times per draw
is therefore the ratio of times to equal standard error. Run it on a quiet machine.
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
from hardware import OtherLoad, describe_machine, format_machine

from rora_theory.laws import sampling
from rora_theory.runs import devices
from sims.common import cli
from sims.common.tables import print_table

SETTING = sampling.RandomStep(rank=64, p_in=4096, p_out=1, overlap=0.5)
REPEATS = 7
"""Number of timings of each sampler."""
SECONDS = 1.0
"""Duration of a timing."""


def time_per_draw(start: Callable[[], Iterator[int]]) -> list[float]:
    """Return the seconds per draw of `REPEATS` timings, after a warm-up.

    Args:
      start: Function that returns an iterator over blocks of draws, which yields the number of draws of each block.
    """
    blocks = start()
    for _ in range(4):
        next(blocks)
    timings = []
    for _ in range(REPEATS):
        begin, draws = time.perf_counter(), 0
        while time.perf_counter() - begin < SECONDS:
            draws += next(blocks)
        timings.append((time.perf_counter() - begin) / draws)
    return timings


def run_sampler(sampler: sampling.Sampler, places: list[jax.Device]) -> Iterator[int]:
    """Draw from one of the package's samplers and sum the moments as the sweep does; yield each block's draws."""
    sums = sampling.StreamMoments()
    for block in sampling.stream(SETTING, sampler, jax.random.key(0), devices=places):
        sums = sums.add(block)
        yield block.shape[1]


def run_numpy(threads: int) -> Iterator[int]:
    """Draw by a direct sampler in NumPy, one generator for each thread; yield the number of draws of each block.

    It uses float32 ziggurat normals and BLAS products. A draw is -(A x) . (A x'), the change w of one output.
    """
    rank, p_in, rho = SETTING.rank, SETTING.p_in, SETTING.overlap
    generators = [np.random.default_rng(seed) for seed in range(threads)]
    buffers = [np.empty((rank, p_in), np.float32) for _ in range(threads)]

    def draw(thread: int, draws: int = 16) -> list[float]:
        generator, A = generators[thread], buffers[thread]
        changes = []
        for _ in range(draws):
            generator.standard_normal(dtype=np.float32, out=A)
            x = generator.standard_normal(p_in, dtype=np.float32)
            # A second input whose overlap with the first is rho.
            x_next = rho * x + np.sqrt(1 - rho**2).astype(np.float32) * generator.standard_normal(
                p_in, dtype=np.float32
            )
            changes.append(-float((A @ x) @ (A @ x_next)))
        return changes

    with ThreadPoolExecutor(threads) as pool:
        while True:
            yield sum(len(changes) for changes in pool.map(draw, range(threads)))


def run_normals(places: list[jax.Device]) -> Iterator[int]:
    """Draw only the r p_in normal numbers of each draw, in the shapes of the direct sampler; yield each block's draws.

    The numbers are summed, so that the compiler cannot remove them.
    """
    kind = sampling.BlockKind.from_settings([SETTING], "direct")
    shape = (kind.step * SETTING.rank, SETTING.p_in)

    @jax.jit
    def block(key: jax.Array) -> jax.Array:
        keys = jax.random.split(key, kind.draws // kind.step)
        return jax.lax.map(lambda part: jnp.sum(jax.random.normal(part, shape)), keys)

    # Two blocks on every device are always pending, so that no device waits for the host.
    keys = [jax.device_put(jax.random.key(number), place) for number, place in enumerate(places)]
    pending = [block(key) for key in keys for _ in range(2)]
    turn = 0
    while True:
        pending.append(block(keys[turn % len(keys)]))
        turn += 1
        pending.pop(0).block_until_ready()
        yield kind.draws


@dataclass(frozen=True)
class VarianceOptions:
    """Command line without options."""


def main(_: VarianceOptions) -> None:
    """Time all samplers and print the table."""
    other_load = OtherLoad()
    places = devices.pick(None)
    cores = len(places)
    runs = {
        "direct, NumPy": partial(run_numpy, cores),
        "jax.random.normal alone": partial(run_normals, places),
        "direct": partial(run_sampler, "direct", places),
        "pairs": partial(run_sampler, "pairs", places),
        "chi_square": partial(run_sampler, "chi_square", places),
    }
    # Time all samplers on the same devices, one after another.
    times = {name: time_per_draw(start) for name, start in runs.items()}
    medians = {name: statistics.median(timings) for name, timings in times.items()}
    print(format_machine(describe_machine(packages=("jax", "jaxlib", "numpy"))))
    print(other_load.describe())
    print_table(
        f"p_in = {SETTING.p_in}, rank = {SETTING.rank}: microseconds a draw over {REPEATS} timings",
        ["sampler", "median", "min", "max", "NumPy / this", "this / normals alone"],
        [
            [
                name,
                *(f"{1e6 * value:.4g}" for value in (medians[name], min(timings), max(timings))),
                f"{medians['direct, NumPy'] / medians[name]:.4g}",
                f"{medians[name] / medians['jax.random.normal alone']:.3g}",
            ]
            for name, timings in times.items()
        ],
    )


if __name__ == "__main__":
    cli.run_command(lambda: main(cli.parse(VarianceOptions, description=__doc__)))
