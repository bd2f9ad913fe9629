r"""Samplers of w in the paper's setting, streamed in blocks: the direct one that judges, and the reduced ones.

- ``"direct"`` draws A, x and x', differentiates the loss, takes the optimizer's step and reads the layer at x'
  (`rora_theory.theory.first_step`). Any init; costs r p_in normals a draw.
- ``"pairs"`` draws, given the inputs, the r Gaussian pairs (a_k . x, a_k . x') instead of A. Gaussian A only.
- ``"chi_square"`` (SGD) uses that :math:`\sum_k u_k v_k` of r such pairs is, in law,
  :math:`\frac{s_2}{2} |x||x'| [(1 + c) Q_1 - (1 - c) Q_2]` with :math:`Q_1, Q_2 \sim \chi^2_r` independent and c the
  cosine of the inputs: constant cost in r and p_in. Gaussian A only.

The inputs, too, are reduced: with :math:`x' = \rho x + \sqrt{1 - \rho^2} z` only :math:`|x|`, the component of x' along
x and the length of the rest matter, drawn from :math:`\chi_{p}`, a normal and :math:`\chi_{p-1}`.

The stream is cut into blocks whose size depends on the setting alone; block i draws from keys of its own. So the
numbers do not depend on how many blocks a call takes, on how many devices, or on where a run was interrupted.
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
from rora_theory.optimizers import make_optimizer
from rora_theory.random.chi_squares import chi_squares
from rora_theory.random.draws import draw_A, stream_key
from rora_theory.random.normals import keys_at, standard_normal
from rora_theory.stats.estimate import Estimate
from rora_theory.stats.moments import Moments
from rora_theory.theory import first_step
from rora_theory.theory.laws import Optimizer, check_overlap, check_step

Sampler = Literal["direct", "pairs", "chi_square"]

_BLOCK_NUMBERS = 2**22
"""Random numbers a block draws at most (16 MiB), unless a single draw needs more."""

_STEP_NUMBERS = 2**18
"""Random numbers the direct sampler holds at once, unless a single draw needs more: they stay in a core's cache."""

_MOST_DRAWS = 2**14
"""Draws a block holds at most; the reduced samplers' blocks hold just these."""

_PAIRS_AT_ONCE = 8
"""Pairs of each draw that are held at once, so that memory does not grow with the rank."""

_LEAST_DRAWS = 256
"""Draws before a standard error is trusted to end a run."""


@dataclass(frozen=True)
class RandomStep:
    r"""What is simulated: w = dM x' after one step on :math:`L = \sum_i w_i` (so delta_i = 1) at input x.

    Attributes:
      rank, p_in, p_out: sizes, >= 1.
      scaling: gamma > 0.
      learning_rate: eta > 0.
      overlap: rho in [-1, 1].
      optimizer: ``"sgd"`` or ``"adam"`` (sign limit).
      init: distribution of A.
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
        check_overlap(self.overlap)
        inits.entries(self.init, rank=self.rank, p_in=self.p_in)


@dataclass(frozen=True)
class Sums:
    """Moments of one stream: of w_1, and of the squared norm.

    Attributes:
      first: moments of w_1.
      norm2: moments of the squared norm over all p_out outputs.
    """

    first: Moments = field(default_factory=Moments)
    norm2: Moments = field(default_factory=Moments)

    def add(self, block: Float[np.ndarray, "2 n"]) -> "Sums":
        """With one more block."""
        return Sums(self.first.add(block[0]), self.norm2.add(block[1]))

    @property
    def count(self) -> int:
        """Draws so far."""
        return self.first.count

    def to_json(self) -> dict[str, Any]:
        """Plain types that keep every bit."""
        return {"first": self.first.to_json(), "norm2": self.norm2.to_json()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Sums":
        """What `to_json` wrote."""
        return cls(Moments.from_json(data["first"]), Moments.from_json(data["norm2"]))


def setting_key(seed: int, setting: RandomStep, sampler: Sampler) -> PRNGKeyArray:
    """`rora_theory.random.draws.stream_key` of one setting's stream."""
    values = ", ".join(f"{name}={value!r}" for name, value in vars(setting).items())
    return stream_key(seed, f"(Setting({values}), {sampler!r})")  # the name that published runs have


def best_sampler(setting: RandomStep) -> Sampler:
    """The cheapest exact sampler of a setting."""
    if not inits.entries(setting.init, rank=setting.rank, p_in=setting.p_in).is_normal:
        return "direct"
    return "chi_square" if setting.optimizer == "sgd" else "pairs"


def block_draws(setting: RandomStep, sampler: Sampler) -> int:
    """Draws in one block."""
    if sampler != "direct":
        return _MOST_DRAWS
    return int(np.clip(_BLOCK_NUMBERS // (setting.rank * setting.p_in), 1, _MOST_DRAWS))


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
    """Yield blocks ``first_block``, ``first_block + 1``, ...: rows w_1 and |w|_2^2, in float64.

    Args:
      setting: what to simulate.
      sampler: see the module.
      key: the stream's key.
      first_block: where to go on from.
      blocks: how many, rounded up to whole batches; None is without end.
      batch: blocks a device call computes.
      devices: the devices that share the blocks; None is the default device.

    Raises:
      InputError: a reduced sampler for an init it is not exact for.
    """
    for found in _streams((setting,), sampler, key, first_block, blocks, batch, devices):
        yield found[0]


def _streams(
    settings: Sequence[RandomStep],
    sampler: Sampler,
    key: PRNGKeyArray,
    first_block: int,
    blocks: int | None,
    batch: int,
    devices: Sequence[jax.Device] | None,
) -> Iterator[Float[np.ndarray, "settings 2 n"]]:
    """`stream` of some settings that take their steps from the same draws."""
    kind = BlockKind.of(settings, sampler)
    wanted = None if blocks is None else -(-blocks // batch) * batch
    places = list(devices or jax.devices()[:1])[: None if wanted is None else max(wanted // batch, 1)]
    mesh = Mesh(np.array(places), "places")
    everywhere, shared = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("places",)))
    arguments = jax.device_put((key, kind.numbers(settings)), everywhere)
    turns = jax.device_put(np.int32(batch), everywhere)
    pending: deque[tuple[int, Array]] = deque()
    size = len(places) * batch  # of a turn, in which all devices run one program
    for turn in itertools.count() if wanted is None else range(-(-wanted // size)):
        start = turn * size
        kept = size if wanted is None else min(size, wanted - start)
        indices = jax.device_put(np.arange(size, dtype=np.uint32) + np.uint32(first_block + start), shared)
        pending.append((kept, _blocks(*arguments, indices, turns, kind=kind, mesh=mesh)))
        # Two turns in flight keep every device busy while the host sums; the first, which may be enough, is alone.
        if turn == 0 or len(pending) >= 2:
            yield from _read(*pending.popleft())
    for found in pending:
        yield from _read(*found)


def _read(kept: int, found: Float[Array, "blocks settings 2 draws"]) -> Float[np.ndarray, "kept settings 2 draws"]:
    return np.asarray(found, np.float64)[:kept]


def estimate(
    setting: RandomStep,
    sampler: Sampler,
    key: PRNGKeyArray,
    *,
    relative_error: float = 0.005,
    draws: int | None = None,
    batch: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Sums:
    """Draw until E[w_1^2] is known to ``relative_error`` (one standard error), or exactly ``draws`` draws.

    Args:
      setting, sampler, key, batch, devices: as `stream` takes them.
      relative_error: of the second moment, > 0; at least 256 draws are taken.
      draws: an exact number instead, 1 or more.

    Returns:
      The sums. They depend on setting, sampler, key and the stopping rule alone.
    """
    (sums,) = estimate_each(
        (setting,), sampler, key, relative_error=relative_error, draws=draws, batch=batch, devices=devices
    )
    return sums


def estimate_each(
    settings: Sequence[RandomStep],
    sampler: Sampler,
    key: PRNGKeyArray,
    *,
    relative_error: float = 0.005,
    draws: int | None = None,
    batch: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> list[Sums]:
    """`estimate` of each of some settings from the same draws of A and the inputs, by a step of each one's own.

    Args:
      settings: that differ in the scaling alone, or with the direct sampler in the optimizer too.
      sampler, key, draws, batch, devices: as `estimate` takes them.
      relative_error: of the first setting; those of one optimizer share it but for rounding, since w carries a power
        of the scaling.

    Raises:
      InputError: settings that differ in more, or a reduced sampler for an init it is not exact for.
    """
    sums = [Sums() for _ in settings]
    blocks = None if draws is None else -(-draws // block_draws(settings[0], sampler))
    for found in _streams(settings, sampler, key, 0, blocks, batch, devices):
        kept = found if draws is None else found[..., : draws - sums[0].count]
        sums = [one.add(part) for one, part in zip(sums, kept, strict=True)]
        if _enough(sums[0], relative_error, draws):
            break
    return sums


def _enough(sums: Sums, relative_error: float, draws: int | None) -> bool:
    if draws is not None:
        return sums.count >= draws
    if sums.count < _LEAST_DRAWS:
        return False
    second: Estimate = sums.first.second_moment
    return second.error <= relative_error * second.value


@dataclass(frozen=True)
class BlockKind:
    """What a compiled block depends on: no size for the reduced samplers, to which they are numbers.

    Attributes:
      sampler, init, rank, p_in, p_out: as `RandomStep` and `stream` have them.
      optimizers: of the settings.
      draws: of a block.
      step: draws that are made at once, so that their numbers stay in a core's cache.
    """

    sampler: Sampler
    optimizers: tuple[Optimizer, ...]
    init: inits.Init = "normal"
    rank: int = 1
    p_in: int = 1
    p_out: int = 1
    draws: int = _MOST_DRAWS
    step: int = _MOST_DRAWS

    @classmethod
    def of(cls, settings: Sequence[RandomStep], sampler: Sampler) -> "BlockKind":
        """The blocks of some settings; raises `InputError` where `estimate_each` does."""
        setting, optimizers = settings[0], tuple(one.optimizer for one in settings)
        rest = {replace(one, scaling=setting.scaling) for one in settings}
        if sampler == "direct":
            rest = {replace(one, optimizer=setting.optimizer) for one in rest}
        if len(rest) > 1:
            own = "scaling and the optimizer" if sampler == "direct" else "scaling"
            raise InputError(f"settings differ in more than the {own}; accepted by {sampler} are those that do not")
        normal = inits.entries(setting.init, rank=setting.rank, p_in=setting.p_in).is_normal
        if sampler != "direct" and not normal:
            raise InputError(
                f"init {setting.init} has no reduced sampler; accepted are direct, or init normal or gaussian"
            )
        if sampler == "chi_square" and setting.optimizer != "sgd":
            raise InputError("the chi_square sampler is SGD's; accepted for adam are pairs and direct")
        if sampler != "direct":
            return cls(sampler, optimizers)
        draws = block_draws(setting, sampler)
        step = int(np.clip(_STEP_NUMBERS // (setting.rank * setting.p_in), 1, draws))
        return cls(sampler, optimizers, setting.init, setting.rank, setting.p_in, setting.p_out, draws, step)

    def numbers(self, settings: Sequence[RandomStep]) -> dict[str, np.ndarray]:
        """What a block is given beside its key and index, by name."""
        setting = settings[0]
        law = inits.entries(setting.init, rank=setting.rank, p_in=setting.p_in)
        values = {
            "rank": setting.rank,
            "p_in": setting.p_in,
            "p_out": setting.p_out,
            "scalings": [one.scaling for one in settings],
            "learning_rate": setting.learning_rate,
            "overlap": setting.overlap,
            "fresh": np.sqrt(1 - setting.overlap**2),
            "deviation": law.deviation,
        }
        return {name: np.asarray(value, np.float32) for name, value in values.items()}


@partial(jax.jit, static_argnames=("kind", "mesh"))
def _blocks(
    key: PRNGKeyArray, numbers: dict[str, Array], indices: Array, turns: Array, *, kind: BlockKind, mesh: Mesh
) -> Float[Array, "blocks settings 2 draws"]:
    """Blocks of these indices, an equal part on each device of the mesh, one after the other.

    How many a device makes is ``turns``, an argument: a compiler that knew it would make one block alone of other
    programs than several in a loop, whose sums round otherwise.
    """
    sample = {"direct": _direct, "pairs": _pairs, "chi_square": _chi_square}[kind.sampler]

    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec(), PartitionSpec("places"), PartitionSpec()),
        out_specs=PartitionSpec("places"),
        check_vma=False,
    )
    def own(key: PRNGKeyArray, numbers: dict[str, Array], indices: Array, turns: Array) -> Array:
        def one(turn: Array, found: Float[Array, "more settings 2 draws"]) -> Float[Array, "more settings 2 draws"]:
            block = sample(partial(keys_at, key, more[turn]), numbers, kind)
            return found.at[turn].set(jax.lax.optimization_barrier(block))

        more = jnp.append(indices, indices[-1])  # of two or more: the place of a lone block would be known too
        found = jnp.zeros((len(more), len(numbers["scalings"]), 2, kind.draws), jnp.float32)
        return jax.lax.fori_loop(0, turns, one, found)[: len(indices)]

    return own(key, numbers, indices, turns)


Keys = Callable[[int], Key[Array, " count"]]
"""So many keys of a block."""


def _direct(keys: Keys, numbers: dict[str, Array], kind: BlockKind) -> Float[Array, "settings 2 draws"]:
    delta = jnp.ones(kind.p_out, jnp.float32)
    each = list(zip(kind.optimizers, numbers["scalings"], strict=True))
    # One program for the neighbours of one optimizer.
    groups = [(name, jnp.stack([gamma for _, gamma in own])) for name, own in itertools.groupby(each, itemgetter(0))]

    def one(own: Key[Array, "2"]) -> Float[Array, "settings 2"]:
        lora_A = draw_A(own[0], kind.init, rank=kind.rank, p_in=kind.p_in)
        x, fresh = standard_normal(own[1], (2, kind.p_in))
        x_next = numbers["overlap"] * x + numbers["fresh"] * fresh

        def read(name: Optimizer, scaling: Float[Array, ""]) -> Float[Array, "2"]:
            step = first_step.run(
                lambda dm: jnp.vdot(delta, dm(x)),
                lora_A,
                p_out=kind.p_out,
                scaling=scaling,
                optimizer=make_optimizer(name, numbers["learning_rate"], epsilon=0.0),
            )
            w = step(x_next)
            return jnp.stack([w[0], jnp.vdot(w, w)])

        return jnp.concatenate([jax.lax.map(partial(read, name), scalings) for name, scalings in groups])

    # Whole steps, the last of which may begin anew: one that is not whole would be compiled as a program of its own.
    turns = -(-kind.draws // kind.step)
    step = -(-kind.draws // turns)
    own = keys(2 * kind.draws).reshape(kind.draws, 2)[jnp.arange(turns * step) % kind.draws]
    return jnp.moveaxis(jax.lax.map(one, own, batch_size=step)[: kind.draws], 0, -1)


def _inputs(keys: Key[Array, "2"], numbers: dict[str, Array], kind: BlockKind, others: int = 0) -> tuple[Array, ...]:
    """|x|, and the components of x' along x and across it, for each draw; and so many others, chi squares of the
    rank."""
    freedom = numbers["p_in"] - 1  # with none, x' has no part across x
    freedoms = [numbers["p_in"], jnp.maximum(freedom, 1)] + [numbers["rank"]] * others
    length2, across2, *squares = chi_squares(keys[0], jnp.stack(freedoms), kind.draws)
    length = jnp.sqrt(length2)
    along = numbers["overlap"] * length + numbers["fresh"] * standard_normal(keys[1], (kind.draws,))
    return length, along, numbers["fresh"] * jnp.sqrt(jnp.where(freedom > 0, across2, 0)), *squares


def _pairs(keys: Keys, numbers: dict[str, Array], kind: BlockKind) -> Float[Array, "settings 2 draws"]:
    *of_inputs, key_u, key_v = keys(4)
    length, along, across = _inputs(jnp.stack(of_inputs), numbers, kind)
    rank, s = numbers["rank"], numbers["deviation"]
    shape = (_PAIRS_AT_ONCE, kind.draws)

    def some_pairs(turn: Array, total: Float[Array, " draws"]) -> Float[Array, " draws"]:
        counted = turn * _PAIRS_AT_ONCE + jnp.arange(_PAIRS_AT_ONCE) < rank.astype(jnp.int32)
        u = standard_normal(keys_at(key_u, turn.astype(jnp.uint32), 1)[0], shape)  # a_k . x / (s |x|)
        if kind.optimizers[0] == "adam":
            return total + jnp.sum(jnp.abs(u), axis=0, where=counted[:, None])
        fresh = standard_normal(keys_at(key_v, turn.astype(jnp.uint32), 1)[0], shape)
        v = along[None] * u + across[None] * fresh  # a_k . x' / s
        return total + jnp.sum(u * v, axis=0, where=counted[:, None])

    turns = -(-rank.astype(jnp.int32) // _PAIRS_AT_ONCE)
    total = jax.lax.fori_loop(0, turns, some_pairs, jnp.zeros(kind.draws, jnp.float32))
    if kind.optimizers[0] == "sgd":
        return _finish(s**2 * length * total, numbers, kind)
    # sum_k sign(u_k) v_k: the across part is a sum of r independent normals, one normal of variance r.
    rest = jnp.sqrt(rank) * standard_normal(key_v, (kind.draws,))
    return _finish(s * (along * total + across * rest), numbers, kind)


def _chi_square(keys: Keys, numbers: dict[str, Array], kind: BlockKind) -> Float[Array, "settings 2 draws"]:
    length, along, across, plus, minus = _inputs(keys(2), numbers, kind, others=2)
    size = jnp.hypot(along, across)
    # size - |along| cancels where the inputs are nearly parallel: across^2 / (size + |along|) does not.
    small = across**2 / jnp.maximum(size + jnp.abs(along), jnp.finfo(jnp.float32).tiny)
    large = size + jnp.abs(along)
    total = jnp.where(along >= 0, large * plus - small * minus, small * plus - large * minus)
    return _finish(numbers["deviation"] ** 2 * length / 2 * total, numbers, kind)


def _finish(
    total: Float[Array, " draws"], numbers: dict[str, Array], kind: BlockKind
) -> Float[Array, "settings 2 draws"]:
    """w_1 and |w|^2 from sum_k of (gradient or its sign) times (a_k . x'), delta_i = 1."""
    gamma = numbers["scalings"]
    step = numbers["learning_rate"] * (gamma**2 if kind.optimizers[0] == "sgd" else gamma)
    w = -step[:, None] * total[None]
    return jnp.stack([w, numbers["p_out"] * w**2], axis=1)
