"""Samplers: the reduced one equals the direct one in distribution; keys of streams; memory."""

import hashlib
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from support.streams import take

from rora_theory import InputError
from rora_theory.laws import sampling
from rora_theory.laws.sampling import RandomStep
from rora_theory.optimizers import OPTIMIZERS, Optimizer

CASES = [
    (RandomStep(rank=3, p_in=5, overlap=0.4, p_out=4), "chi_square"),
    (RandomStep(rank=3, p_in=5, overlap=0.4, p_out=4, scaling=0.6, learning_rate=0.5), "pairs"),
    (RandomStep(rank=33, p_in=5, overlap=-0.7), "pairs"),
    (RandomStep(rank=2, p_in=1, overlap=1.0), "chi_square"),
    (RandomStep(rank=5, p_in=6, overlap=0.3, optimizer="adam", init="gaussian", scaling=0.5), "pairs"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("setting", "sampler"), CASES)
def test_reduced_equals_direct_in_distribution(setting: RandomStep, sampler: sampling.Sampler) -> None:
    """Two-sample Kolmogorov-Smirnov tests of 30000 draws each have a total false-alarm rate of 1e-6."""
    direct = take(setting, "direct", 30_000)[0]
    reduced = take(setting, sampler, 30_000, seed=1)[0]
    assert stats.ks_2samp(direct, reduced).pvalue > 1e-6 / len(CASES)


@pytest.mark.slow
@pytest.mark.parametrize(("sampler", "optimizer"), [("direct", "sgd"), ("pairs", "adam")])
def test_each_setting_has_its_own_step_of_the_same_draws(
    sampler: sampling.Sampler, optimizer: Optimizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several settings give the same estimates together as alone, from the same key and number of draws.

    The direct sampler takes one block and a half, with both optimizers at once.
    """
    monkeypatch.setattr(sampling, "_MAX_BLOCK_NUMBERS", 200 * 3 * 6)
    setting, key = RandomStep(rank=3, p_in=6, p_out=2, optimizer=optimizer, learning_rate=0.1), jax.random.key(4)
    optimizers = OPTIMIZERS if sampler == "direct" else (optimizer,)
    settings = [replace(setting, scaling=gamma, optimizer=name) for name in optimizers for gamma in (2.0, 0.5)]
    all_sums = sampling.estimate_settings(settings, sampler, key, draws=300)
    for separate, sums in zip(settings, all_sums, strict=True):
        alone = sampling.estimate_moments(separate, sampler, key, draws=300)
        assert sums.count == alone.count == 300
        for both, other in ((sums.first, alone.first), (sums.norm2, alone.norm2)):
            # Sums of the same draws, which two programs round in their own order.
            assert both.second_moment.value == pytest.approx(other.second_moment.value, rel=1e-5)
            assert both.second_moment.error == pytest.approx(other.second_moment.error, rel=1e-5)


def test_several_devices_share_the_blocks_and_compute_no_extra_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """41 draws in blocks of 20 take three blocks in order; every device computes full batches."""
    computed: list[int] = []
    used: set[jax.Device] = set()

    def blocks(_key: object, _numbers: object, indices: jax.Array, _turns: object, **_: object) -> jax.Array:
        computed.extend(np.asarray(indices).tolist())
        used.update(indices.devices())
        return jnp.broadcast_to(jnp.float32(np.asarray(indices))[:, None, None, None], (len(indices), 1, 2, 20))

    monkeypatch.setattr(sampling, "_MAX_BLOCK_DRAWS", 20)
    monkeypatch.setattr(sampling, "_blocks", blocks)
    setting, expected = RandomStep(rank=2, p_in=5), [0.0] * 20 + [1.0] * 20 + [2.0]
    for number, batch, count in ((1, 1, 3), (2, 1, 4), (4, 1, 3), (1, 2, 4), (2, 2, 4)):
        computed.clear()
        used.clear()
        devices = jax.devices()[:number]
        sums = sampling.estimate_moments(
            setting, "chi_square", jax.random.key(0), draws=41, batch=batch, devices=devices
        )
        assert (sums.count, computed) == (41, list(range(count)))
        assert sums.first.mean.value == pytest.approx(np.mean(expected))
        assert used == set(devices[: count // batch])
        options = {"batch": batch, "devices": devices}
        assert take(setting, "chi_square", 41, **options)[0].tolist() == expected, "the blocks continue in order"
        requested = list(sampling.stream(setting, "chi_square", jax.random.key(0), blocks=3, first_block=5, **options))
        assert [block[0, 0] for block in requested] == list(range(5, 5 + -(-3 // batch) * batch)), "complete batches"


def test_a_stream_has_the_key_of_published_runs() -> None:
    """Published numbers can be reproduced: the key is derived from the text of the published setting."""
    step = RandomStep(rank=4, p_in=64, p_out=8, overlap=0.5, optimizer="adam", init="gaussian")
    text = (
        "(Setting(rank=4, p_in=64, p_out=8, scaling=1.0, learning_rate=1.0, overlap=0.5, optimizer='adam', "
        "init='gaussian'), 'pairs')"
    )
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")
    expected = jax.random.fold_in(jax.random.key(3), number)
    np.testing.assert_array_equal(*map(jax.random.key_data, (expected, sampling.setting_key(3, step, "pairs"))))


@pytest.mark.slow
def test_memory_is_bounded() -> None:
    """By XLA's memory analysis of a block, memory does not grow with the draws, and with r p_in only by one adapter."""
    for rank, p_in, sampler, limit in [
        (4096, 1 << 20, "pairs", 64e6),
        (10**6, 1 << 20, "chi_square", 64e6),
        (256, 4096, "direct", 64e6),
    ]:
        kind = sampling.BlockKind.from_settings([RandomStep(rank=rank, p_in=p_in)], sampler)  # type: ignore[arg-type]
        numbers = kind.arguments([RandomStep(rank=rank, p_in=p_in)])
        arguments = (jax.random.key(0), numbers, np.arange(64, dtype=np.uint32), np.int32(64))
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), "devices")
        memory = sampling._blocks.lower(*arguments, kind=kind, mesh=mesh).compile().memory_analysis()
        assert memory.temp_size_in_bytes + memory.output_size_in_bytes < limit


STEP = RandomStep(rank=1, p_in=2)


@pytest.mark.parametrize(
    ("sampler", "settings", "message"),
    [
        ("pairs", [replace(STEP, init="rademacher")], "init rademacher.*pairs"),
        ("chi_square", [replace(STEP, optimizer="adam")], "chi_square.*adam"),
        ("direct", [STEP, replace(STEP, overlap=0.5)], "settings.* scaling and optimizer for the direct"),
        ("direct", [STEP, replace(STEP, learning_rate=0.5)], "settings.* scaling and optimizer for the direct"),
        ("pairs", [STEP, replace(STEP, optimizer="adam")], "settings.* scaling for the pairs"),
    ],
)
def test_settings_that_a_sampler_cannot_draw(
    sampler: sampling.Sampler, settings: list[RandomStep], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        sampling.estimate_settings(settings, sampler, jax.random.key(0), draws=1)


@pytest.mark.parametrize(("name", "value"), [("scaling", -1.0), ("overlap", 2.0), ("rank", 0)])
def test_a_step_out_of_range(name: str, value: float) -> None:
    with pytest.raises(InputError, match=f"{name}.* {value}"):
        replace(STEP, **{name: value})


@pytest.mark.slow
def test_kolmogorov_smirnov_would_see_a_wrong_sampler() -> None:
    """One pair too many of three, or an overlap off by 0.1, is rejected at the same level."""
    direct = take(CASES[0][0], "direct", 30_000)[0]
    sizes = {"p_in": 5, "p_out": 4}
    for wrong in (RandomStep(rank=4, overlap=0.4, **sizes), RandomStep(rank=3, overlap=0.5, **sizes)):
        assert stats.ks_2samp(direct, take(wrong, "chi_square", 30_000, seed=1)[0]).pvalue < 1e-6 / len(CASES)
