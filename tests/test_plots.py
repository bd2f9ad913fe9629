"""Plots of measurements: the axes show the data, and the figures can be saved."""

import itertools
import operator

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from rora_theory import InputError, plots

RANKS = (2, 8, 32)
BOTTOM = operator.attrgetter("y0")


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def check_frames(splits=("train", "held_out"), steps=(1, 2, 10)) -> tuple[pd.DataFrame, pd.DataFrame]:
    sizes, slopes = [], []
    for split in splits:
        for step in steps:
            for position, quantity in enumerate(("hidden", "logits")):
                where = {"quantity": quantity, "split": split, "module": "model", "step": step}
                slopes.append(where | {"slope": 0.1 * step, "half_width": 0.05})
                for rank in RANKS:
                    value = step * 10**position * rank**0.1
                    sizes += [where | {"rank": rank, "seed": seed, "value": (seed + 1) * value} for seed in (0, 1)]
    return pd.DataFrame(sizes), pd.DataFrame(slopes)


def line_of(container) -> tuple[list[float], list[float]]:
    x, y = container.lines[0].get_data()
    return list(x), list(y)


@pytest.mark.parametrize("splits", [("train",), ("train", "held_out")])
def test_a_check_has_its_sizes_and_slopes(tmp_path, splits) -> None:
    sizes, slopes = check_frames(splits)
    figure = plots.plot_check(sizes, slopes, 0.25)
    assert len(figure.axes) == 2 * len(splits)
    for row, split in enumerate(splits):
        size_axis, slope_axis = figure.axes[2 * row : 2 * row + 2]
        # Two quantities, each at the first and the last step.
        drawn = [line_of(container) for container in size_axis.containers]
        assert len(drawn) == 4
        expected = [("hidden", 1), ("hidden", 10), ("logits", 1), ("logits", 10)]
        for (x, y), (quantity, step) in zip(drawn, expected, strict=True):
            rows = sizes[(sizes["split"] == split) & (sizes["quantity"] == quantity) & (sizes["step"] == step)]
            assert x == list(RANKS)
            assert y == pytest.approx(rows.groupby("rank")["value"].mean().tolist())
        slope_line = ([1, 2, 10], pytest.approx([0.1, 0.2, 1.0]))
        assert [line_of(container) for container in slope_axis.containers] == [slope_line] * 2
        assert (size_axis.get_xscale(), size_axis.get_yscale()) == ("log", "log")
    labels = ["final hidden state", "logits", "step 1", "step 10", "flat: within ±0.25"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == labels
    figure.savefig(tmp_path / "check.png")
    assert (tmp_path / "check.png").stat().st_size > 10_000


def test_a_check_without_slopes_or_with_a_seed_that_diverged_is_drawn() -> None:
    sizes, slopes = check_frames(("train",), (1,))
    sizes.loc[0, "value"] = np.nan
    figure = plots.plot_check(sizes, slopes.drop(columns=["slope", "half_width"]), 0.25)
    assert np.isnan(np.asarray(line_of(figure.axes[0].containers[0])[1], float)).tolist() == [True, False, False]


def crossing_frame(modules: int = 2, layers: int = 3) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"layer": layer, "module": f"model.layers.{layer}.attn.m{index}", "optimizer": optimizer}
            | {"crossing_rank": 10.0 + layer + index, "lower_quartile": 5.0, "upper_quartile": 20.0}
            for layer in range(layers)
            for index in range(modules)
            for optimizer in ("sgd", "adam")
        ]
    )


@pytest.mark.parametrize("modules", [1, 2, 9])
def test_a_regime_has_a_panel_for_each_type_of_module(tmp_path, modules) -> None:
    figure = plots.plot_regime(crossing_frame(modules), "a title")
    assert [axis.get_title() for axis in figure.axes] == [f"m{index}" for index in range(modules)]
    for index, axis in enumerate(figure.axes):
        for line in axis.lines:
            assert line.get_xdata().tolist() == [0, 1, 2]
            assert line.get_ydata().tolist() == [10.0 + index, 11.0 + index, 12.0 + index]
        assert [line.get_label() for line in axis.lines] == ["SGD", "Adam"]
        assert len(axis.collections) == 2
    assert figure.legends[0].get_title().get_text() == "a title"
    figure.savefig(tmp_path / "regime.png")
    with pytest.raises(InputError, match=r"crossings .*got none"):
        plots.plot_regime(crossing_frame(layers=0).reindex(columns=crossing_frame().columns))


@pytest.mark.parametrize("upper", [40.0, 100.0, 3000.0])
def test_the_labels_of_crossing_ranks_do_not_overlap(upper) -> None:
    """The axes span one and a half, two and three decades."""
    figure = plots.plot_regime(crossing_frame().assign(lower_quartile=1.2, upper_quartile=upper))
    figure.canvas.draw()
    axis = figure.axes[0].yaxis
    texts = [tick.label1 for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()) if tick.label1.get_text()]
    low, high = figure.axes[0].get_ylim()
    boxes = sorted((text.get_window_extent() for text in texts if low <= text.get_position()[1] <= high), key=BOTTOM)
    assert len(boxes) >= 3
    assert all(below.y1 < above.y0 for below, above in itertools.pairwise(boxes))


def test_losses_against_the_rate(tmp_path) -> None:
    """The plot has means over seeds at ascending rates and a cross for each infinite loss."""
    losses = {"rank 8": {1e-3: [2.0, 2.2], 1e-4: [3.0, 3.0], 1e-2: [float("inf"), 2.0]}, "rank 32": {1e-3: 2.5}}
    figure = plots.plot_losses(losses)
    (axis,) = figure.axes
    assert line_of(axis.containers[0]) == ([1e-4, 1e-3], pytest.approx([3.0, 2.1]))
    assert line_of(axis.containers[1]) == ([1e-3], [2.5])
    crosses = [line for line in axis.lines if line.get_marker() == "x" and len(line.get_xdata())]
    assert [line.get_xdata().tolist() for line in crosses] == [[1e-2]]
    assert axis.get_xscale() == "log"
    figure.savefig(tmp_path / "losses.png")
    assert plots.plot_losses({"": {1e-3: 1.0}}).axes[0].get_legend() is None
    with pytest.raises(InputError, match=r"losses .*got none"):
        plots.plot_losses({"rank 8": {}})


@pytest.mark.filterwarnings("ignore")  # of transformers and peft
def test_results_of_the_bridge_are_plotted(tmp_path) -> None:
    """`TorchCheck.plot` and `TorchRegime.plot` show the frames of the result."""
    pytest.importorskip("torch", reason="the bridge: the extra torch")
    peft = pytest.importorskip("peft", reason="the bridge: the extra torch")
    pytest.importorskip("transformers", reason="the bridge: the extra torch")
    from support import torch_models

    from rora_theory.measure import coordinate_check, regime

    base, batch, held_out = torch_models.model("llama"), torch_models.batch(seed=0), torch_models.batch(seed=1)
    measured = regime(base, batch, held_out, ["q_proj", "down_proj"])
    figure = measured.plot()
    rows = measured.crossings_of("adam", "kaiming_uniform", "heldout")
    for axis, kind in zip(figure.axes, ("q_proj", "down_proj"), strict=True):
        (line,) = (line for line in axis.lines if line.get_label() == "Adam")
        expected = rows[rows["module"].str.endswith(kind)]
        assert line.get_xdata().tolist() == expected["layer"].tolist()
        assert line.get_ydata().tolist() == pytest.approx(expected["crossing_rank"].tolist())
    with pytest.raises(InputError, match="init normal"):
        measured.plot(init="normal")
    check = coordinate_check(
        lambda rank: peft.get_peft_model(base, peft.LoraConfig(r=rank, target_modules=["q_proj"])),
        batch,
        (4, 8),
        held_out=held_out,
        steps=(1,),
        seeds=2,
    )
    figure = check.plot()
    x, y = line_of(figure.axes[0].containers[0])
    hidden = check.sizes[(check.sizes["quantity"] == "hidden") & (check.sizes["split"] == "train")]
    assert (x, y) == ([4, 8], pytest.approx(hidden.groupby("rank")["value"].mean().tolist()))
    figure.savefig(tmp_path / "check.png")
