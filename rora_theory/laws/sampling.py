r"""Samplers of w in the paper's setting, streamed in blocks: one direct sampler and two reduced ones.

- ``"direct"`` draws A, x and x', differentiates the loss, takes the optimizer's step and evaluates the layer at x'
  (`rora_theory.laws.first_step`). It serves as the reference, accepts any initialisation, and costs r p_in normals
  per draw.
- ``"pairs"`` draws the r Gaussian pairs (a_k . x, a_k . x') given the inputs, instead of A. Gaussian A only.
- ``"chi_square"`` (SGD) uses the law of :math:`\sum_k u_k v_k` over r such pairs,
  :math:`\frac{s_2}{2} |x||x'| [(1 + c) Q_1 - (1 - c) Q_2]` with independent :math:`Q_1, Q_2 \sim \chi^2_r` and c the
  cosine of the inputs. Its cost depends on neither r nor p_in. Gaussian A only.

The inputs are reduced too. With :math:`x' = \rho x + \sqrt{1 - \rho^2} z` only :math:`|x|`, the component of x' along
x and the length of the remainder matter. They are drawn from :math:`\chi_{p}`, a normal and :math:`\chi_{p-1}`.

The stream is divided into blocks; the block size depends on the setting alone, and block i has its own keys. The
numbers therefore do not depend on the number of blocks per call, the number of devices, or interruptions.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from operator import itemgetter
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Key, PRNGKeyArray

from rora_theory import inits
from rora_theory.errors import InputError
from rora_theory.laws.first_step import take_first_step
from rora_theory.laws.moments import check_step
from rora_theory.laws.random.chi_squares import sample_chi_squares
from rora_theory.laws.random.draws import draw_A, stream_key
from rora_theory.laws.random.normals import keys_at, standard_normal
from rora_theory.optimizers import Optimizer, make_optimizer
from rora_theory.scaling import check_between
from rora_theory.stats.estimate import Estimate
from rora_theory.stats.moments import Moments

Sampler = Literal["direct", "pairs", "chi_square"]

_MAX_BLOCK_NUMBERS = 2**22
"""Maximum number of random numbers in a block (16 MiB), unless a single draw needs more."""

_MAX_STEP_NUMBERS = 2**18
"""Maximum number of random numbers that the direct sampler holds at once, so that they fit in a core's cache."""

_MAX_BLOCK_DRAWS = 2**14
"""Maximum number of draws in a block, and the exact number for the reduced samplers."""

_PAIRS_AT_ONCE = 8
"""Number of pairs of each draw held at once, so that memory does not grow with the rank."""

_MIN_DRAWS = 256
"""Number of draws before the estimated standard error may stop the sampling."""


@dataclass(frozen=True)
class RandomStep:
    r"""Setting of a simulation: w = dM x' after one step on :math:`L = \sum_i w_i` (so delta_i = 1) at input x.

    Attributes:
      rank: Rank r of the adapter, 1 or more.
      p_in: Number of inputs, 1 or more.
      p_out: Number of outputs, 1 or more.
      scaling: Scaling factor gamma, above 0.
      learning_rate: Learning rate eta, above 0.
      overlap: Correlation rho of x and x', from -1 to 1.
      optimizer: Optimizer of the step, ``"sgd"`` or ``"adam"`` (sign limit).
      init: Initialisation of A.
    """

    rank: int
    p_in: int
    p_out: int = 1
    scaling: float = 1.0
    learning_rate: float = 1.0
    overlap: float = 0.0
    optimizer: Optimizer = "sgd"
    init: inits.Init = "normal"

    def __post_init__(self) -> None:
        check_step(rank=self.rank, scaling=self.scaling, learning_rate=self.learning_rate, optimizer=self.optimizer)
        check_between("overlap", self.overlap, -1, 1)
        inits.entries(self.init, rank=self.rank, p_in=self.p_in)


@dataclass(frozen=True)
class StreamMoments:
    """Running moments of one stream.

    Attributes:
      first: Moments of the first output, w_1.
      norm2: Moments of the squared norm over all p_out outputs.
    """

    first: Moments = field(default_factory=Moments)
    norm2: Moments = field(default_factory=Moments)

    def add(self, block: Float[np.ndarray, "2 n"]) -> "StreamMoments":
        """Return the moments with one more block."""
        return StreamMoments(self.first.add(block[0]), self.norm2.add(block[1]))

    @property
    def count(self) -> int:
        """Number of draws so far."""
        return self.first.count

    def to_json(self) -> dict[str, Any]:
        """Return the moments as JSON types, without loss of precision."""
        return {"first": self.first.to_json(), "norm2": self.norm2.to_json()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "StreamMoments":
        """Restore the moments from the output of `to_json`."""
        return cls(Moments.from_json(data["first"]), Moments.from_json(data["norm2"]))


def setting_key(seed: int, setting: RandomStep, sampler: Sampler) -> PRNGKeyArray:
    """Return the key of a setting's stream, see `rora_theory.laws.random.draws.stream_key`."""
    values = ", ".join(f"{name}={value!r}" for name, value in vars(setting).items())
    # The streams of published runs depend on this text, so it must not change.
    return stream_key(seed, f"(Setting({values}), {sampler!r})")


def best_sampler(setting: RandomStep) -> Sampler:
    """Return the cheapest exact sampler of a setting."""
    if not inits.entries(setting.init, rank=setting.rank, p_in=setting.p_in).is_normal:
        return "direct"
    return "chi_square" if setting.optimizer == "sgd" else "pairs"


def block_draws(setting: RandomStep, sampler: Sampler) -> int:
    """Return the number of draws in one block."""
    if sampler != "direct":
        return _MAX_BLOCK_DRAWS
    return int(np.clip(_MAX_BLOCK_NUMBERS // (setting.rank * setting.p_in), 1, _MAX_BLOCK_DRAWS))


def stream(
    setting: RandomStep,
    sampler: Sampler,
    key: PRNGKeyArray,
    *,
    first_block: int = 0,
    blocks: int | None = None,
    batch: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Iterator[Float[np.ndarray, "2 n"]]:
    """Yield the blocks ``first_block``, ``first_block + 1``, ... with the rows w_1 and |w|_2^2, in float64.

    Args:
      setting: Setting to simulate.
      sampler: Sampler, see the module's documentation.
      key: Key of the stream.
      first_block: Index of the first block, to resume a stream.
      blocks: Number of blocks, rounded up to whole batches. None yields blocks without end.
      batch: Number of blocks that a device computes in one call.
      devices: Devices that share the blocks. None uses the default device.

    Yields:
      One block of shape [2, draws].

    Raises:
      InputError: If a reduced sampler is not exact for the initialisation.
    """
    for blocks_of_settings in _streams((setting,), sampler, key, first_block, blocks, batch, devices):
        yield blocks_of_settings[0]


def _streams(
    settings: Sequence[RandomStep],
    sampler: Sampler,
    key: PRNGKeyArray,
    first_block: int,
    blocks: int | None,
    batch: int,
    devices: Sequence[jax.Device] | None,
) -> Iterator[Float[np.ndarray, "settings 2 n"]]:
    """Yield the blocks of several settings that take their steps from the same draws."""
    kind = BlockKind.from_settings(settings, sampler)
    block_count = None if blocks is None else -(-blocks // batch) * batch

    # One axis of devices that share a call's blocks; no more devices than batches.
    used_devices = list(devices or jax.devices()[:1])[: None if block_count is None else max(block_count // batch, 1)]
    mesh = Mesh(np.array(used_devices), "devices")
    replicated, sharded = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("devices",)))
    arguments = jax.device_put((key, kind.arguments(settings)), replicated)
    blocks_per_device = jax.device_put(np.int32(batch), replicated)

    # Calls run asynchronously. All have the same shape, so that every device runs one program.
    pending: deque[tuple[int, Array]] = deque()
    call_size = len(used_devices) * batch
    for call in itertools.count() if block_count is None else range(-(-block_count // call_size)):
        start = call * call_size
        needed = call_size if block_count is None else min(call_size, block_count - start)
        indices = jax.device_put(np.arange(call_size, dtype=np.uint32) + np.uint32(first_block + start), sharded)
        pending.append((needed, _blocks(*arguments, indices, blocks_per_device, kind=kind, mesh=mesh)))
        # Two calls in flight keep every device busy while the host adds up. The first call runs alone, because it may
        # suffice.
        if call == 0 or len(pending) >= 2:
            yield from _to_host(*pending.popleft())
    for needed, computed in pending:
        yield from _to_host(needed, computed)


def _to_host(
    needed: int, computed: Float[Array, "blocks settings 2 draws"]
) -> Float[np.ndarray, "needed settings 2 draws"]:
    return np.asarray(computed, np.float64)[:needed]


def estimate_moments(
    setting: RandomStep,
    sampler: Sampler,
    key: PRNGKeyArray,
    *,
    relative_error: float = 0.005,
    draws: int | None = None,
    batch: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> StreamMoments:
    """Sample until the relative standard error of E[w_1^2] is reached, or for an exact number of draws.

    Args:
      setting: Setting to simulate.
      sampler: Sampler, see the module's documentation.
      key: Key of the stream.
      relative_error: Relative standard error of the second moment at which sampling stops, above 0. Sampling stops
        after 256 draws at the earliest.
      draws: Exact number of draws, 1 or more, instead of a relative error.
      batch: Number of blocks that a device computes in one call.
      devices: Devices that share the blocks. None uses the default device.

    Returns:
      The moments. They depend only on the setting, the sampler, the key and the stopping rule.
    """
    (moments,) = estimate_settings(
        (setting,), sampler, key, relative_error=relative_error, draws=draws, batch=batch, devices=devices
    )
    return moments


def estimate_settings(
    settings: Sequence[RandomStep],
    sampler: Sampler,
    key: PRNGKeyArray,
    *,
    relative_error: float = 0.005,
    draws: int | None = None,
    batch: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> list[StreamMoments]:
    """Sample several settings from the same draws of A and the inputs, with a separate step for each setting.

    Args:
      settings: Settings that differ in the scaling only, or also in the optimizer with the direct sampler.
      sampler: Sampler, see the module's documentation.
      key: Key of the stream.
      relative_error: Relative standard error of the first setting's second moment at which sampling stops. Settings of
        one optimizer share it up to rounding, because w is proportional to a power of the scaling.
      draws: Exact number of draws, 1 or more, instead of a relative error.
      batch: Number of blocks that a device computes in one call.
      devices: Devices that share the blocks. None uses the default device.

    Returns:
      The moments of each setting.

    Raises:
      InputError: If the settings differ in other fields, or a reduced sampler is not exact for the initialisation.
    """
    totals = [StreamMoments() for _ in settings]
    blocks = None if draws is None else -(-draws // block_draws(settings[0], sampler))
    for sampled in _streams(settings, sampler, key, 0, blocks, batch, devices):
        # The last block may hold more draws than requested.
        needed = sampled if draws is None else sampled[..., : draws - totals[0].count]
        totals = [moments.add(block) for moments, block in zip(totals, needed, strict=True)]
        if _has_enough_draws(totals[0], relative_error, draws):
            break
    return totals


def _has_enough_draws(moments: StreamMoments, relative_error: float, draws: int | None) -> bool:
    """Return whether a stream has the requested number of draws, or without one the requested precision."""
    if draws is not None:
        return moments.count >= draws
    if moments.count < _MIN_DRAWS:
        return False
    second: Estimate = moments.first.second_moment
    return second.error <= relative_error * second.value


@dataclass(frozen=True)
class BlockKind:
    """Static arguments of a compiled block, one for each program that the compiler produces.

    The reduced samplers receive all sizes as dynamic arguments, so that one program serves every setting.

    Attributes:
      sampler: Sampler of the block.
      optimizers: Optimizer of each setting.
      init: Initialisation of A.
      rank: Rank of the adapter.
      p_in: Number of inputs.
      p_out: Number of outputs.
      draws: Number of draws in a block.
      step: Number of draws computed at once, so that their random numbers fit in a core's cache.
    """

    sampler: Sampler
    optimizers: tuple[Optimizer, ...]
    init: inits.Init = "normal"
    rank: int = 1
    p_in: int = 1
    p_out: int = 1
    draws: int = _MAX_BLOCK_DRAWS
    step: int = _MAX_BLOCK_DRAWS

    @classmethod
    def from_settings(cls, settings: Sequence[RandomStep], sampler: Sampler) -> "BlockKind":
        """Return the kind of block that serves several settings.

        Args:
          settings: Settings that share their draws, see `estimate_settings`.
          sampler: Sampler of the block.

        Returns:
          The static arguments of the block.

        Raises:
          InputError: If the settings cannot share their draws, or the sampler is not exact for them.
        """
        setting, optimizers = settings[0], tuple(setting.optimizer for setting in settings)
        # The settings must be equal once the fields that may differ are set to one value.
        distinct = {replace(other, scaling=setting.scaling) for other in settings}
        if sampler == "direct":
            distinct = {replace(other, optimizer=setting.optimizer) for other in distinct}
        if len(distinct) > 1:
            fields = "scaling and optimizer" if sampler == "direct" else "scaling"
            raise InputError(f"settings must differ only in {fields} for the {sampler} sampler, got other differences")
        # The other samplers draw products with A, whose distribution is known for Gaussian entries only.
        normal = inits.entries(setting.init, rank=setting.rank, p_in=setting.p_in).is_normal
        if sampler != "direct" and not normal:
            raise InputError(
                f"init {setting.init} has no {sampler} sampler. Use the direct sampler, or init normal or gaussian."
            )
        if sampler == "chi_square" and setting.optimizer != "sgd":
            raise InputError(
                f"the chi_square sampler requires optimizer sgd, got {setting.optimizer}. Use pairs or direct."
            )
        # Only the direct sampler draws A itself, so only its program depends on the sizes.
        if sampler != "direct":
            return cls(sampler, optimizers)
        draws = block_draws(setting, sampler)
        # Number of draws that are computed together; their entries of A must fit in a core's cache.
        step = int(np.clip(_MAX_STEP_NUMBERS // (setting.rank * setting.p_in), 1, draws))
        return cls(sampler, optimizers, setting.init, setting.rank, setting.p_in, setting.p_out, draws, step)

    def arguments(self, settings: Sequence[RandomStep]) -> dict[str, np.ndarray]:
        """Return the dynamic arguments of a block by name, in float32."""
        setting = settings[0]
        law = inits.entries(setting.init, rank=setting.rank, p_in=setting.p_in)
        values = {
            "rank": setting.rank,
            "p_in": setting.p_in,
            "p_out": setting.p_out,
            "scalings": [other.scaling for other in settings],
            "learning_rate": setting.learning_rate,
            "overlap": setting.overlap,
            # Weight of the independent z in x' = overlap x + fresh z, with which x' has the variance of x.
            "fresh": np.sqrt(1 - setting.overlap**2),
            "deviation": law.deviation,
        }
        return {name: np.asarray(value, np.float32) for name, value in values.items()}


@partial(jax.jit, static_argnames=("kind", "mesh"))
def _blocks(
    key: PRNGKeyArray,
    arguments: dict[str, Array],
    indices: Array,
    blocks_per_device: Array,
    *,
    kind: BlockKind,
    mesh: Mesh,
) -> Float[Array, "blocks settings 2 draws"]:
    """Compute the blocks with these indices, an equal number on each device of the mesh, one after the other.

    The number of blocks per device is a dynamic argument. If it were static, the compiler would use different programs
    for one block and for several blocks in a loop, with different rounding.
    """
    sample = {"direct": _direct, "pairs": _pairs, "chi_square": _chi_square}[kind.sampler]

    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec(), PartitionSpec("devices"), PartitionSpec()),
        out_specs=PartitionSpec("devices"),
        check_vma=False,
    )
    def compute_on_device(
        key: PRNGKeyArray, arguments: dict[str, Array], indices: Array, blocks_per_device: Array
    ) -> Array:
        def add_block(
            position: Array, blocks: Float[Array, "padded settings 2 draws"]
        ) -> Float[Array, "padded settings 2 draws"]:
            block = sample(partial(keys_at, key, padded[position]), arguments, kind)
            # The barrier keeps the compiler from fusing the block with the loop, which would change its rounding.
            return blocks.at[position].set(jax.lax.optimization_barrier(block))

        # One unused index more: with a single one, its position would be static too.
        padded = jnp.append(indices, indices[-1])
        blocks = jnp.zeros((len(padded), len(arguments["scalings"]), 2, kind.draws), jnp.float32)
        return jax.lax.fori_loop(0, blocks_per_device, add_block, blocks)[: len(indices)]

    return compute_on_device(key, arguments, indices, blocks_per_device)


Keys = Callable[[int], Key[Array, " count"]]
"""Function that returns the requested number of keys of a block."""


def _direct(keys: Keys, arguments: dict[str, Array], kind: BlockKind) -> Float[Array, "settings 2 draws"]:
    """Sample a block by the definition: draw A and the inputs, differentiate, take the step, evaluate at x'."""
    delta = jnp.ones(kind.p_out, jnp.float32)
    # Neighbouring settings with one optimizer share a program, which maps over their scalings.
    settings = list(zip(kind.optimizers, arguments["scalings"], strict=True))
    groups = [
        (name, jnp.stack([gamma for _, gamma in group])) for name, group in itertools.groupby(settings, itemgetter(0))
    ]

    def draw_step(draw_keys: Key[Array, "2"]) -> Float[Array, "settings 2"]:
        # A, the training input x and the correlated input x' at which the layer is evaluated.
        lora_A = draw_A(draw_keys[0], kind.init, rank=kind.rank, p_in=kind.p_in)
        x, z = standard_normal(draw_keys[1], (2, kind.p_in))
        x_next = arguments["overlap"] * x + arguments["fresh"] * z

        def evaluate_step(name: Optimizer, scaling: Float[Array, ""]) -> Float[Array, "2"]:
            step = take_first_step(
                lambda dm: jnp.vdot(delta, dm(x)),
                lora_A,
                p_out=kind.p_out,
                scaling=scaling,
                optimizer=make_optimizer(name, arguments["learning_rate"], epsilon=0.0),
            )
            # One output for the mean of w, and the squared norm of all outputs for its second moment.
            w = step(x_next)
            return jnp.stack([w[0], jnp.vdot(w, w)])

        return jnp.concatenate([jax.lax.map(partial(evaluate_step, name), scalings) for name, scalings in groups])

    # Steps of equal size: an incomplete last step would be compiled as a second program. The last step may therefore
    # repeat draws from the start of the block, which are cut off.
    step_count = -(-kind.draws // kind.step)
    step_size = -(-kind.draws // step_count)
    draw_keys = keys(2 * kind.draws).reshape(kind.draws, 2)[jnp.arange(step_count * step_size) % kind.draws]
    return jnp.moveaxis(jax.lax.map(draw_step, draw_keys, batch_size=step_size)[: kind.draws], 0, -1)


def _inputs(
    keys: Key[Array, "2"], arguments: dict[str, Array], kind: BlockKind, rank_chi_squares: int = 0
) -> tuple[Array, ...]:
    """Draw |x| and the components of x' along x and across it, then chi squares with ``rank`` degrees of freedom.

    Each is a vector with one value per draw.
    """
    across_freedom = arguments["p_in"] - 1  # at 0, x' has no component across x
    freedoms = [arguments["p_in"], jnp.maximum(across_freedom, 1)] + [arguments["rank"]] * rank_chi_squares
    length2, across2, *chi_squares = sample_chi_squares(keys[0], jnp.stack(freedoms), kind.draws)
    length = jnp.sqrt(length2)
    # x' = overlap x + fresh z: along x it has overlap |x| and a normal component of z, across it the rest of z.
    along = arguments["overlap"] * length + arguments["fresh"] * standard_normal(keys[1], (kind.draws,))
    across = arguments["fresh"] * jnp.sqrt(jnp.where(across_freedom > 0, across2, 0))
    return length, along, across, *chi_squares


def _pairs(keys: Keys, arguments: dict[str, Array], kind: BlockKind) -> Float[Array, "settings 2 draws"]:
    """Sample a block from the pairs (a_k . x, a_k . x') given the inputs, a few pairs at a time."""
    *input_keys, key_u, key_v = keys(4)
    length, along, across = _inputs(jnp.stack(input_keys), arguments, kind)
    rank, s = arguments["rank"], arguments["deviation"]
    shape = (_PAIRS_AT_ONCE, kind.draws)

    def add_pairs(group: Array, total: Float[Array, " draws"]) -> Float[Array, " draws"]:
        # The last group may have more pairs than the rank; the surplus is masked.
        is_counted = group * _PAIRS_AT_ONCE + jnp.arange(_PAIRS_AT_ONCE) < rank.astype(jnp.int32)
        u = standard_normal(keys_at(key_u, group.astype(jnp.uint32), 1)[0], shape)  # a_k . x / (s |x|)
        if kind.optimizers[0] == "adam":
            # sign(u_k) times the component of v_k along x; the components across x are added after the loop.
            return total + jnp.sum(jnp.abs(u), axis=0, where=is_counted[:, None])
        z = standard_normal(keys_at(key_v, group.astype(jnp.uint32), 1)[0], shape)
        v = along[None] * u + across[None] * z  # a_k . x' / s
        return total + jnp.sum(u * v, axis=0, where=is_counted[:, None])

    group_count = -(-rank.astype(jnp.int32) // _PAIRS_AT_ONCE)
    total = jax.lax.fori_loop(0, group_count, add_pairs, jnp.zeros(kind.draws, jnp.float32))
    if kind.optimizers[0] == "sgd":
        return _outputs_of_sum(s**2 * length * total, arguments, kind)
    # sum_k sign(u_k) v_k: the components across x are r independent normals, summed as one normal of variance r.
    across_sum = jnp.sqrt(rank) * standard_normal(key_v, (kind.draws,))
    return _outputs_of_sum(s * (along * total + across * across_sum), arguments, kind)


def _chi_square(keys: Keys, arguments: dict[str, Array], kind: BlockKind) -> Float[Array, "settings 2 draws"]:
    """Sample a block from two chi squares of the rank, given the inputs."""
    length, along, across, plus, minus = _inputs(keys(2), arguments, kind, rank_chi_squares=2)
    size = jnp.hypot(along, across)
    # |x'| (1 + c) and |x'| (1 - c). The smaller one, |x'| - |along|, is written without its cancellation for nearly
    # parallel inputs.
    small = across**2 / jnp.maximum(size + jnp.abs(along), jnp.finfo(jnp.float32).tiny)
    large = size + jnp.abs(along)
    total = jnp.where(along >= 0, large * plus - small * minus, small * plus - large * minus)
    return _outputs_of_sum(arguments["deviation"] ** 2 * length / 2 * total, arguments, kind)


def _outputs_of_sum(
    total: Float[Array, " draws"], arguments: dict[str, Array], kind: BlockKind
) -> Float[Array, "settings 2 draws"]:
    """Compute w_1 and |w|^2 from the sum over k of (gradient or its sign) times (a_k . x'), for delta_i = 1."""
    gamma = arguments["scalings"]
    step = arguments["learning_rate"] * (gamma**2 if kind.optimizers[0] == "sgd" else gamma)
    w = -step[:, None] * total[None]
    return jnp.stack([w, arguments["p_out"] * w**2], axis=1)
