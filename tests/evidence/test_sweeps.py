"""Tables of runs: the shipped one is the published one, curves average repeats, bad values are named in one line."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from rora_theory.errors import InputError
from rora_theory.evidence.best_rates import best_rates, estimate_exponent
from rora_theory.evidence.sources import PACKAGE, SOURCES, original_path
from rora_theory.evidence.sweeps import RunRecord, load_sweeps, noise_of, read_run_table, sweeps_of
from rora_theory.stats.rate_curves import REPEATS

RATES = (1e-4, 3e-4, 1e-3, 3e-3)
HEADER = "model,rank,alpha,rule,learning_rate,loss"


def parabola(rank: int, best: float, *, level: float = 1.0, seed: int = 0, model: str = "m") -> list[RunRecord]:
    """Return runs whose log loss is a parabola in the log rate, with its minimum at ``best``."""
    return [
        RunRecord(model, rank, 32.0, "lora", rate, level * math.exp(0.02 * math.log(rate / best) ** 2), 10, 4, seed)
        for rate in RATES
    ]


def test_the_shipped_runs_are_the_published_ones_and_the_diverged_runs(originals: Path) -> None:
    published = pd.read_csv(original_path("tinker", originals))
    shipped = pd.read_csv(Path(str(PACKAGE.joinpath("tinker_sft_sweep.csv"))))
    ended = shipped[np.isfinite(shipped["loss"])]
    columns = ["model", "rank", "learning_rate", "loss"]
    both = [
        frame[columns].sort_values(columns).to_numpy().tolist()
        for frame in (ended, published.rename(columns={"test_nll": "loss"}))
    ]
    assert both[0] == both[1]
    assert len(ended) == 548
    assert len(shipped) - len(ended) == 111
    assert set(shipped["alpha"]) == {32}
    assert (set(shipped["steps"]), set(shipped["batch_size"])) == (
        {SOURCES["tinker"].steps},
        {SOURCES["tinker"].batch_size},
    )


def test_best_rates_and_exponents_of_known_parabolas() -> None:
    runs = [run for rank in (4, 16, 64) for run in parabola(rank, 4e-4 * rank**0.15)]
    (sweep,) = sweeps_of(runs, "s")
    assert [fit.best_rate for fit in sweep.fits] == pytest.approx([4e-4 * rank**0.15 for rank in (4, 16, 64)])
    assert estimate_exponent([sweep])[0].value == pytest.approx(0.15)
    assert best_rates([sweep])["place"].tolist() == ["inside"] * 3
    with pytest.raises(InputError, match="sweeps"):
        estimate_exponent([sweep], ranks=(64, 64))


def test_a_best_rate_at_an_end_or_beside_a_diverged_run_is_not_inside() -> None:
    runs = [run for rank, best in ((1, 1e-5), (2, 1e-2), (4, 4e-4), (8, 1e-3)) for run in parabola(rank, best)]
    runs = [
        run if (run.rank, run.learning_rate) != (8, 3e-3) else RunRecord("m", 8, 32.0, "lora", 3e-3, math.inf, 10, 4)
        for run in runs
    ]
    table = best_rates(sweeps_of(runs, "s"))
    assert table["place"].tolist() == ["low end", "high end", "inside", "beside a diverged run"]
    assert table["best_rate"].tolist() == pytest.approx([1e-4, 3e-3, 4e-4, 1e-3])


def test_repeats_are_averaged_and_give_the_noise() -> None:
    random = np.random.default_rng(3)
    runs = [run for rank in range(1, 31) for run in parabola(rank, 5e-4)]
    repeats = [run for rank in range(1, 31) for run in parabola(rank, 5e-4, seed=1)[:2]]
    noisy = [
        RunRecord(
            run.model,
            run.rank,
            run.alpha,
            run.rule,
            run.learning_rate,
            run.loss * math.exp(0.001 * random.normal()),
            10,
            4,
            run.seed,
        )
        for run in runs + repeats
    ]
    (sweep,) = sweeps_of(noisy, "s")
    noise = noise_of([sweep], [{(1, 1.0, 32.0): [run for run in noisy if run.rank == rank]} for rank in range(1, 31)])
    assert noise.degrees == 60
    # A standard deviation from 60 degrees of freedom has a relative error of 9%: 4 of these fail once in 16,000.
    assert np.all(np.abs(noise.at(np.array(RATES)) / 0.001 - 1) < 0.5)
    cell = [run.loss for run in noisy if run.rank == 7 and run.learning_rate == RATES[0]]
    curve = sweep.curves[6]
    assert curve.losses[0, 0] == pytest.approx(np.mean(cell))
    assert curve.resampled_over == REPEATS
    # The value is measured, the error comes from the noise.
    fit = sweep.fits[6]
    assert fit.log2_rate.value == pytest.approx(math.log2(curve.optima[0].rate))
    spread = np.std(np.log2([best.rate for best in curve.over_resamples.optima]), ddof=1)
    assert fit.log2_rate.error == pytest.approx(spread * math.sqrt(61 / 60))


def test_seeds_of_a_full_grid_are_rows() -> None:
    (sweep,) = sweeps_of([*parabola(4, 4e-4), *parabola(4, 6e-4, seed=5)], "s")
    assert sweep.curves[0].seeds == (0, 5)
    assert sweep.fits[0].best_rate == pytest.approx(math.sqrt(4e-4 * 6e-4))


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("m,0,32,lora,1e-4,1.0", "rank", "0"),
        ("m,8,-1,lora,1e-4,1.0", "alpha", "-1"),
        ("m,8,32,qlora,1e-4,1.0", "rule", "qlora"),
        ("m,8,32,lora,0,1.0", "learning_rate", "0"),
        ("m,8,32,lora,1e-4,-2.0", "loss", "-2"),
        ("m,8,32,lora,1e-4,good", "loss", "good"),
        (",8,32,lora,1e-4,1.0", "model", "''"),
        ("m,8.5,32,lora,1e-4,1.0", "rank", "8.5"),
        ("m,8,32,lora,1e-4,0", "loss", "0"),
    ],
)
def test_a_bad_value_is_named_with_its_line(tmp_path: Path, line: str, name: str, value: str) -> None:
    path = tmp_path / "runs.csv"
    path.write_text(f"{HEADER}\nm,8,32,lora,1e-4,1.0\n{line}\n")
    with pytest.raises(InputError, match=rf"runs\.csv: line 3: {name} must be .*got .*{value}"):
        read_run_table(path)


def test_a_missing_column_and_an_empty_table_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_text("model,rank,alpha,rule,learning_rate\nm,8,32,lora,1e-4\n")
    with pytest.raises(InputError, match="'loss'"):
        read_run_table(path)
    path.write_text(f"{HEADER}\n")
    with pytest.raises(InputError, match="one run"):
        read_run_table(path)


def test_an_empty_loss_inf_and_nan_diverged(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_text(f"{HEADER},seed\nm,8,32,0.25,1e-4,,1\nm,8,32,lora,1e-4,inf,2\nm,8,32,rslora,1e-4,nan,\n")
    runs = read_run_table(path)
    assert [run.loss for run in runs] == [math.inf] * 3
    assert [run.rule for run in runs] == [0.25, "lora", "rslora"]
    assert [run.seed for run in runs] == [1, 2, 0]


def test_sources_without_a_licence_need_their_originals(tmp_path: Path) -> None:
    assert load_sweeps("qwen3-4b") == []
    with pytest.raises(InputError, match=r"qwen3_4b_alpha_32\.csv"):
        load_sweeps("qwen3-4b", tmp_path)


def test_independent_best_rates_and_exponent_of_the_public_runs(originals: Path) -> None:
    """Vertices through three points and the pooled slope, in a few lines of NumPy, against the package's numbers."""
    table = best_rates(load_sweeps("tinker"))
    frame = pd.read_csv(original_path("tinker", originals))
    points = []
    for row in table[table["place"] == "inside"].itertuples():
        runs = frame[(frame["model"] == row.model) & (frame["rank"] == row.rank)]
        means = runs.groupby("learning_rate")["test_nll"].mean()
        x, y = np.log(means.index.to_numpy()), np.log(means.to_numpy())
        i = int(y.argmin())
        if np.sum(np.abs(x - x[i]) <= math.log(3.5)) > 3:
            continue  # a denser grid, fitted by more than three points
        a, b, _ = np.polyfit(x[i - 1 : i + 2], y[i - 1 : i + 2], 2)
        assert row.best_rate == pytest.approx(math.exp(-b / (2 * a)), rel=1e-6)
        points.append((row.model, math.log(row.rank), -b / (2 * a)))
    assert len(points) > 70
    numerator = denominator = 0.0
    for model in {model for model, _, _ in points}:
        x, y = (np.array([point[i] for point in points if point[0] == model]) for i in (1, 2))
        numerator += (x - x.mean()) @ (y - y.mean())
        denominator += (x - x.mean()) @ (x - x.mean())
    assert estimate_exponent(load_sweeps("tinker"))[0].value == pytest.approx(numerator / denominator, abs=0.01)
    # The first look of the README of the originals, by a parabola in the loss itself.
    qwen = load_sweeps("qwen2.5-7b", originals)
    assert [fit.best_rate for fit in qwen[0].fits if fit.is_inside] == pytest.approx(
        [3.8e-4, 2.9e-4, 1.8e-4, 1.26e-4, 7.7e-5], rel=0.03
    )
    assert estimate_exponent(qwen)[0].value == pytest.approx(-0.585, abs=0.01)
