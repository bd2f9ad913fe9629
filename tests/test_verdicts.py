"""The verdicts themselves, and that a wrong claim gets a wrong verdict."""

from collections.abc import Sequence

import jax
import pytest

from rora_theory import paper, sampling, verdicts

EXPECTED = {
    "1": "holds",
    "2": "holds",
    "gradient A": "holds",
    "gradient B": "holds",
    "3": "holds",
    "4": "holds",
    "5": "holds",
    "6": "holds in a limit",
    "7": "holds in a limit",
    "8": "holds in a limit",
    "9": "holds in a limit",
    "10": "holds",
    "11": "holds in a limit",
    "12": "fails",
    "13": "holds in a limit",
    "14": "holds in a limit",
    "15": "holds in a limit",
}


def sample(setting: sampling.Setting) -> sampling.Sums:
    key = jax.random.fold_in(jax.random.key(9), setting.rank + 10_000 * int(10 * setting.overlap))
    return sampling.estimate(setting, "chi_square", key, relative_error=0.01)


def judged(ranks: Sequence[int] = tuple(2**n for n in range(11)), p_in: int = 4096) -> dict[str, verdicts.Verdict]:
    found = verdicts.judge(sample, ranks=ranks, p_in=p_in, p_out=4096)
    return {verdict.equation: verdict for verdict in found}


def test_every_equation_has_its_verdict() -> None:
    found = judged()
    assert {equation: verdict.status for equation, verdict in found.items()} == EXPECTED
    assert "4098" in found["9"].evidence  # the exact ratio at r = 1, p_in = 4096
    assert "31.6" in found["12"].evidence
    assert all(verdict.where and verdict.evidence for verdict in found.values())


def test_a_small_sweep_gives_the_same_verdicts() -> None:
    """A limit that the sweep's own ranks and width don't reach is looked for where it is."""
    found = judged(ranks=(1, 4, 16), p_in=64)
    assert {equation: verdict.status for equation, verdict in found.items()} == EXPECTED


@pytest.mark.parametrize(
    ("name", "wrong", "equation", "status"),
    [
        ("eq4_increment", lambda *a: 2 * a[0], "4", "fails"),
        ("gradient_B", lambda delta, A, x, gamma: -gamma * delta[:, None] * (A @ x)[None], "gradient B", "fails"),
        (
            "eq9_variance",
            lambda delta, *, rank, p_in, scaling, learning_rate: rank * p_in * (p_in + rank + 1),
            "9",
            "holds",
        ),
        ("eq9_variance", lambda delta, *, rank, p_in, scaling, learning_rate: rank**3 * p_in, "9", "fails"),
        ("eq8_second_moment", lambda delta, *, rank, p_in, scaling, learning_rate: rank * p_in, "8", "fails"),
    ],
)
def test_another_claim_another_verdict(
    monkeypatch: pytest.MonkeyPatch, name: str, wrong: object, equation: str, status: str
) -> None:
    monkeypatch.setattr(paper, name, wrong)
    assert judged()[equation].status == status
