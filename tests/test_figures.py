"""Every published figure is drawn again from `results/published`, and none is cut, hidden or unlabelled."""

import contextlib
import io
import json
import re
import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from support import drawings
from support.drawings import draw

from figures import (
    accuracy,
    accuracy_vs_rank,
    best_rate_vs_rank,
    coordinate_check,
    displacement_ratio,
    exponent_map,
    exponent_vs_gain,
    gain_laws,
    horizon,
    layers_vs_rank,
    loss_by_phase,
    loss_curves,
    loss_vs_rate,
    lr_transfer,
    minima,
    norm_vs_rank,
    rank_ratios,
    regime,
    regret_by_model,
    style,
    training_dynamics,
)
from sims.common import cli

PUBLISHED = Path(__file__).parents[1] / "results" / "published"
FIGURES = {
    "variance_sweep": [(norm_vs_rank, {}), (exponent_map, None)],
    "evidence": [(best_rate_vs_rank, {}), (regret_by_model, {}), (loss_by_phase, {})],
    "real_layers": [(layers_vs_rank, {})],
    "regime": [(regime, {})],
    "regime_held_out": [(regime, {})],
    "regime_gemma": [(regime, {})],
    "coordinate_check": [(coordinate_check, {})],
    "lr_transfer": [(lr_transfer, {})],
    "lr_transfer_smollm2": [(lr_transfer, {})],
    "training_dynamics": [(training_dynamics, {})],
    "rank_sweep": [
        (accuracy_vs_rank, {"lr": 3e-4}),
        (loss_vs_rate, {"rank": 32, "top": 1.7}),
        (loss_curves, {"rank": 128}),
    ],
    "accuracy": [(accuracy, {})],
    "accuracy_pruned": [(accuracy, {"name": "SmolLM2-135M pruned to half"})],
    "horizon": [
        (horizon, {}),
        (minima, {}),
        (exponent_vs_gain, {}),
        (displacement_ratio, {}),
    ],
    "horizon_gemma": [(displacement_ratio, {}), (exponent_vs_gain, {"ranks": (8, 128)})],
    "small_models": [(gain_laws, {})],
    "medium_model": [(gain_laws, {})],
    "small_more": [(rank_ratios, {})],
    "rank_sweep_pruned": [
        (accuracy_vs_rank, {"lr": 3e-4, "name": "SmolLM2-135M pruned to half"}),
        (loss_vs_rate, {"rank": 32, "name": "SmolLM2-135M pruned to half"}),
    ],
}
PHONE_PIXELS = 358
"""Width of a page's text on a screen of 390 pixels."""
SAVE = style.save
"""Function that writes a figure; fixtures replace it while the module's tests run."""
CASES = [(folder, module, options) for folder, plots in FIGURES.items() for module, options in plots]


@pytest.fixture
def captured_figures():
    """Return figures that the test draws."""
    with drawings.captured() as figures:
        yield figures


@pytest.fixture(scope="module")
def published():
    """Return all published figures drawn again, by folder and name, and the messages about missing files."""
    figures, errors = {}, io.StringIO()
    with contextlib.ExitStack() as stack, contextlib.redirect_stderr(errors):
        for folder, module, options in CASES:
            by_name = stack.enter_context(drawings.captured())
            draw(module, PUBLISHED / folder, options)
            figures |= {(folder, name): figure for name, figure in by_name.items()}
        yield figures, errors.getvalue()


def legends(figure) -> list:
    return [*figure.legends, *(axis.get_legend() for axis in figure.axes if axis.get_legend())]


def check(figure) -> None:
    """Check that nothing exceeds the figure's edge, and that the legend below covers no panel."""
    page = figure.bbox
    renderer = figure.canvas.get_renderer()
    panels = [axis.get_tightbbox(renderer) for axis in figure.axes]
    for box in [*(legend.get_window_extent(renderer) for legend in legends(figure)), *panels]:
        assert page.x0 - 1 <= box.x0 <= box.x1 <= page.x1 + 1
        assert page.y0 - 1 <= box.y0 <= box.y1 <= page.y1 + 1
    for legend in figure.legends:
        assert not any(legend.get_window_extent(renderer).overlaps(panel) for panel in panels)


def legend_text(figure) -> str:
    """Return all words of the legends and their titles."""
    texts = [text.get_text() for legend in legends(figure) for text in (legend.get_title(), *legend.get_texts())]
    return " ".join(" ".join(texts).split())


@pytest.mark.slow
def test_published_figures_are_drawn_again_and_nothing_is_cut(published) -> None:
    figures, errors = published
    names = {(path.parent.name, path.stem) for path in PUBLISHED.glob("*/*.png")}
    assert names == {(path.parent.name, path.stem) for path in PUBLISHED.glob("*/*.svg")}
    assert set(figures) == names
    assert not errors
    for figure in figures.values():
        check(figure)


@pytest.mark.slow
def test_published_figures_can_be_read_on_a_phone(published) -> None:
    """Every letter has at least 9 pixels, legends have few entries, and models have names in words."""
    for (folder, name), figure in published[0].items():
        entries = [len(legend.get_texts()) for legend in legends(figure)]
        scale = PHONE_PIXELS / (72 * figure.get_figwidth())  # pixels per point
        assert min(text.get_fontsize() for text in figure.findobj(Text) if text.get_text()) * scale > 9, (folder, name)
        assert not re.search("smollm2|gemma3", legend_text(figure)), (folder, name)
        assert all(count <= 8 for count in entries), (folder, name, entries)
        if name in ("horizon", "accuracy_vs_rank"):
            assert len(figure.axes) == 3, (folder, name)
        if folder in ("rank_sweep_pruned", "accuracy_pruned"):
            assert legend_text(figure).startswith("SmolLM2-135M pruned to half, ")


def test_no_text_overlaps_the_error_bars_of_a_horizon(published) -> None:
    figure = published[0]["horizon", "horizon"]
    renderer = figure.canvas.get_renderer()
    for axis in figure.axes:
        segments = [
            axis.transData.transform(segment)
            for container in axis.containers
            for bars in container.lines[2]
            for segment in bars.get_segments()
        ]
        ends = [(segment.min(axis=0), segment.max(axis=0)) for segment in segments if np.isfinite(segment).all()]
        bars = [Bbox(corners).padded(1) for corners in ends]
        boxes = [text.get_window_extent(renderer) for text in axis.texts]
        assert bars
        assert not any(box.overlaps(bar) for box in boxes for bar in bars)


def test_each_panel_against_the_rate_has_several(published) -> None:
    """The pruned half's accuracy was measured at one rate alone."""
    for (_, name), figure in published[0].items():
        for axis in figure.axes if name == "loss_vs_rate" else ():
            assert len({x for line in axis.lines if line.get_marker() in style.MARKERS for x in line.get_xdata()}) > 1
    assert len(published[0]["rank_sweep_pruned", "loss_vs_rate"].axes) == 1
    assert len(published[0]["rank_sweep", "loss_vs_rate"].axes) == 2


@pytest.mark.parametrize(
    ("module", "folder", "options", "words"),
    [
        (regime, "regime", {"init": "foo"}, "--init .* gaussian, kaiming_unif"),
        (regime, "regime", {"modules": ("foo",)}, "--modules .* model.layers.0"),
        (coordinate_check, "regime", {}, "{}: .*coordinate_check, got .*regime"),
        (accuracy, "rank_sweep", {"rank": 8}, "{}/differences.csv has no column 'boolq'. Choose a run"),
        (accuracy, "accuracy", {"rank": 7}, "{}: has the ranks 32. Choose one with --rank"),
        (accuracy_vs_rank, "rank_sweep", {}, "0.0003, 0.001, 0.003, 0.01"),
        (accuracy_vs_rank, "rank_sweep", {"lr": 5.0}, "--lr .* 0.0003, 0.001"),
        (accuracy_vs_rank, "rank_sweep", {"alpha": 7.0}, "--alpha .* 64"),
        (accuracy_vs_rank, "rank_sweep", {"model": "foo"}, "--model .* smol"),
        (accuracy_vs_rank, "rank_sweep", {"tuned": True, "lr": 3e-4}, "lr 0.0003 has no effect with --t"),
        (loss_curves, "rank_sweep", {"rank": 7}, "--rank .* 4, 8, 16, 32, 64"),
        (loss_curves, "rank_sweep", {"rank": 8, "lr": 7.0}, "--lr .* 0.0003, got 7\n"),
        (loss_curves, "rank_sweep", {"rank": 8, "seed": 9}, "--seed .* 0, 1, got 9\n"),
        (loss_curves, "accuracy/cells/c086b664d48fe8c8", {"rank": 8}, "rank 8 has no effect without the run"),
        (loss_vs_rate, "rank_sweep", {}, "{}: has the ranks 4, 8, 16, 32, 64, 128. Choose one with --rank"),
        (displacement_ratio, "horizon", {"steps": (7,)}, "--steps"),
        (exponent_vs_gain, "horizon", {"steps": 7}, "--steps"),
    ],
)
def test_a_setting_that_a_run_does_not_have_is_refused_before_anything_is_drawn(
    module, folder, options, words, tmp_path, capsys
) -> None:
    """If there are several rates, none is drawn without a choice."""
    with pytest.raises(SystemExit) as stopped:
        cli.run_command(lambda: draw(module, PUBLISHED / folder, options | {"out": tmp_path / "new"}))
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.startswith("error: ")
    assert re.search(words.format(re.escape(str(PUBLISHED / folder))), error)
    assert (error.count("\n"), (tmp_path / "new").exists()) == (1, False)


def read_texts(path: Path) -> pd.DataFrame:
    """Read a table without changing its numbers."""
    return pd.read_csv(path, dtype=str, keep_default_na=False)


def part(source: Path, target: Path, **chosen) -> Path:
    """Copy a run with only the rows that have one of the chosen values."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.png", "*.svg"))
    for path in target.glob("*.csv"):
        rows = read_texts(path)
        for name in chosen.keys() & set(rows):
            rows = rows[rows[name].isin(chosen[name])]
        rows.to_csv(path, index=False)
    manifest = json.loads((target / "manifest.json").read_text())
    (target / "manifest.json").write_text(json.dumps(manifest))
    return target


def test_legends_of_few_panels_are_not_clipped(captured_figures, tmp_path) -> None:
    """Under Adam the paper has no line, and the legend omits it."""
    for name, overlaps in (("one", ("0.5",)), ("two", ("0.0", "0.5"))):
        run = part(PUBLISHED / "variance_sweep", tmp_path / name, overlap=overlaps, optimizer=("adam",))
        norm_vs_rank.draw_norm_vs_rank(norm_vs_rank.NormVsRankOptions(run))
        check(captured_figures["norm_vs_rank"])
        assert "Eq. 11" not in legend_text(captured_figures["norm_vs_rank"])
    for name, optimizers in (("sgd", ("sgd",)), ("both", ("sgd", "adamw"))):
        chosen = {"optimizer": optimizers, "rule": ("lora",), "control": ("0",)}
        run = part(PUBLISHED / "coordinate_check", tmp_path / name, **chosen)
        coordinate_check.draw_coordinate_check(coordinate_check.CoordinateCheckOptions(run))
        check(captured_figures["coordinate_check_slopes"])


@pytest.mark.slow
def test_a_rule_has_one_colour_and_one_label_in_all_figures(published) -> None:
    looks: dict[str, set] = {}
    for axis in [axis for figure in published[0].values() for axis in figure.axes]:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            line = handle.lines[0] if hasattr(handle, "lines") else handle
            if not hasattr(line, "get_color"):  # a band, which is no rule
                continue
            # Beside a label may stand a rank, or a slope.
            looks.setdefault(label.partition(", r =")[0].partition(":")[0], set()).add(line.get_color())
    named = {style.METHODS[name][0] for name in ("lora", "rora", "quarter", "dora")}
    assert named <= set(looks)
    assert {label: len(looks[label]) for label in named} == dict.fromkeys(named, 1)


def test_names_of_one_rule_look_the_same() -> None:
    names = {"rslora": "rora", "0.5": "rora", "1": "lora", "1.0": "lora", "0.25": "quarter", ".25": "quarter"}
    for name, same in names.items():
        assert style.look(name, 3) == style.look(same, 0)
    assert style.look("0.3", 0) != style.look("0.3", 1), "a rule without a name takes its colour by position"


@pytest.mark.slow
def test_ticks_of_ranks_and_steps_are_whole_numbers_that_were_run(published) -> None:
    figures, _ = published
    last = {name: figure.axes[-1] for (folder, name), figure in figures.items() if folder == "training_dynamics"}
    exponents, rms = (last[f"training_dynamics_linear_{name}"] for name in ("exponents", "rms"))
    assert [label.get_text() for label in exponents.get_xticklabels()] == ["1", "5", "30"]
    assert [label.get_text() for label in rms.get_xticklabels()] == ["4", "64", "1024"]


def test_a_step_of_one_has_no_fractional_ticks(captured_figures, tmp_path) -> None:
    cell = tmp_path / "run"
    cell.mkdir()
    config = {"method": "lora", "rule": "rora", "rank": 8, "lr": 1e-3}
    (cell / "manifest.json").write_text(json.dumps({"config": config}))
    (cell / "metrics.jsonl").write_text("".join(f'{{"event": "step", "step": {n}, "loss": {n}}}\n' for n in (1, 2, 3)))
    draw(loss_curves, cell, {})
    assert all(float(tick).is_integer() for tick in captured_figures["loss_curves"].axes[0].get_xticks())


@pytest.mark.slow
def test_points_lie_at_the_rates_that_were_run_and_top_is_respected(published) -> None:
    figure = published[0]["rank_sweep", "loss_vs_rate"]
    rates = set(pd.read_csv(PUBLISHED / "rank_sweep" / "results.csv")["learning_rate"])
    left = figure.axes[0]
    assert left.get_ylim()[1] == 1.7
    for container in left.containers:
        assert set(container.lines[0].get_xdata()) <= rates
    assert "a single seed" in legend_text(figure)
    assert "diverged" not in legend_text(figure), "no run diverged"


@pytest.mark.slow
def test_contours_are_complete_and_their_labels_are_upright(published) -> None:
    for axis in published[0]["variance_sweep", "exponent_map"].axes[:2]:
        lines = next(child for child in axis.collections if hasattr(child, "levels"))
        assert [text.get_text() for text in axis.texts] == [f"{level:.3g}" for level in lines.levels]
        for text, path in zip(axis.texts, lines.get_paths(), strict=True):
            assert text.get_rotation() == 0
            assert len(path.to_polygons(closed_only=False)) == 1, "one line without a gap"
            label = axis.transData.transform(text.get_position())
            line = axis.transData.transform(path.vertices)
            assert (((line - label) ** 2).sum(axis=1) ** 0.5).min() < 3, "within 3 pixels of its line"


@pytest.mark.slow
def test_crosses_and_bands_are_explained_in_the_legend(published) -> None:
    figures, _ = published
    assert "at the grid's edge" in legend_text(figures["lr_transfer", "lr_transfer"])
    assert "are left out" in legend_text(figures["lr_transfer", "lr_transfer"])
    assert "SGD, quartiles over tokens" in legend_text(figures["regime", "regime_depth"])
    for folder, name in (
        ("training_dynamics", "training_dynamics_linear_exponents"),
        ("coordinate_check", "coordinate_check_slopes"),
    ):
        assert "flat: within ±0.1" in legend_text(figures[folder, name])
    slopes = legend_text(figures["training_dynamics", "training_dynamics_linear_exponents"])
    assert "over ranks 4 to 1024;" in slopes


@pytest.mark.slow
def test_the_legend_has_no_points_if_no_adapter_was_stepped(published, captured_figures, tmp_path) -> None:
    run = part(PUBLISHED / "regime", tmp_path / "run")
    rows = read_texts(run / "results.csv").assign(measured="", standard_error="", adapters="")
    rows.to_csv(run / "results.csv", index=False)
    draw(regime, run, {})
    assert "points" not in legend_text(captured_figures["regime_rms"])
    assert "points: adapters drawn and stepped" in legend_text(published[0]["regime", "regime_rms"])


def test_rounding_errors_change_no_svg_file(tmp_path) -> None:
    """Another processor's errors of 1e-7 of each value move points by up to 1e-5 and change all hashed names."""

    def draw(name: str, factor: float) -> str:
        figure, axes = plt.subplots()
        axes.set(xlim=(0, 5 * factor), ylim=(-1, 2 * factor))
        axes.set_title("0.123456 (x=0.1234567)", loc="left")  # the middle of a text may lie between two hundredths
        axes.plot([0, 1.1 * factor, 4.3], [-0.7 * factor, 0.9, 1.3 * factor], "o-")
        axes.imshow([[0.0, 1.0]], extent=(1, 2 * factor, 0, 1))
        SAVE(figure, tmp_path, name)
        return (tmp_path / f"{name}.svg").read_text()

    svg = draw("exact", 1.0)
    assert svg == draw("rounded", 1 + 1e-7)
    assert svg != draw("changed", 1 + 1e-2)
    assert "0.123456 (x=0.1234567)" in svg
    assert "data:image/png;base64," in svg
    names = re.findall(r'\bid="([^"]*)"', svg)
    assert len(names) == len(set(names))
    assert {*re.findall(r'(?:url\(|href=")#([^")]*)', svg)} <= set(names)


def test_exponents_are_drawn_between_neighbours_of_each_rank() -> None:
    """16 to 724 is left out because 64 lies between. Pairs with one seed divide none with more, but each other."""
    rows = [(16, 64, 2), (64, 724, 3), (16, 724, 2), (64, 181, 1), (181, 724, 1)]
    table = pd.DataFrame(rows, columns=["first", "second", "seeds"]).assign(
        step=64, over="gain", at="8", exponent=-0.7, standard_error=0.1, edge=False
    )
    config = exponent_vs_gain.ExponentVsGainOptions((PUBLISHED / "horizon",))
    ((rank, pairs),) = exponent_vs_gain.neighbours_by_rank(table, config)
    assert rank == "8"
    ends = list(zip(pairs["first"], pairs["second"], strict=True))
    assert ends == [(16, 64), (64, 181), (64, 724), (181, 724)]
    ((_, pairs),) = exponent_vs_gain.neighbours_by_rank(table.assign(seeds=1), config)
    assert list(zip(pairs["first"], pairs["second"], strict=True)) == [(16, 64), (64, 181), (181, 724)]
    of_another_rank = exponent_vs_gain.ExponentVsGainOptions((PUBLISHED / "horizon",), ranks=(16,))
    assert not exponent_vs_gain.neighbours_by_rank(table, of_another_rank)


def test_an_exponent_of_one_seed_is_hollow_in_the_colour_of_its_model(captured_figures) -> None:
    """Points, band and line of a model have the same colour. Crosses mark a best rate at the end of its grid."""
    runs = (PUBLISHED / "horizon_gemma", PUBLISHED / "horizon")
    exponent_vs_gain.draw_exponent_vs_gain(exponent_vs_gain.ExponentVsGainOptions(runs, ranks=(8, 128)))
    (axes,) = captured_figures["exponent_vs_gain"].axes
    drawn_points = {
        (container.lines[0].get_color(), round(float(y), 3)): container.lines[0].get_fillstyle()
        for container in axes.containers
        for y in container.lines[0].get_ydata()
    }
    expected, bounds = {}, set()
    for run, colour in zip(runs, style.COLOURS, strict=False):
        table = style.read_table(run, "pooled.csv")
        config = exponent_vs_gain.ExponentVsGainOptions((run,), ranks=(8, 128))
        for _, pairs in exponent_vs_gain.neighbours_by_rank(table, config):
            for exponent, seeds in zip(pairs["exponent"], pairs["seeds"], strict=True):
                expected[colour, round(exponent, 3)] = "none" if seeds == 1 else "full"
            bounds |= {round(exponent, 3) for exponent in pairs.loc[pairs["edge"], "exponent"]}
    assert drawn_points == expected
    assert set(expected.values()) == {"none", "full"}
    crosses = {round(float(y), 3) for line in axes.lines if line.get_marker() == "x" for y in line.get_ydata()}
    assert len(bounds) > 0
    assert crosses == bounds
    bands = [to_hex(band.get_facecolor()[0]).upper() for band in axes.collections if band.get_alpha() == 0.2]
    # Lines without markers and with more points than the horizontal one.
    laws = [line.get_color() for line in axes.lines if line.get_marker() == "None" and len(line.get_xdata()) > 2]
    assert bands == laws == list(style.COLOURS[:2])
    assert len(captured_figures["exponent_vs_gain"].legends[0].get_texts()) == 8


def test_two_runs_of_the_horizon_share_a_figure(captured_figures) -> None:
    """For two runs of one model the folders name the series, and the legend has at most eight entries."""
    runs = (PUBLISHED / "horizon", PUBLISHED / "horizon")
    displacement_ratio.draw_displacement_ratio(displacement_ratio.DisplacementRatioOptions(runs, steps=(16, 64)))
    words = legend_text(captured_figures["displacement_ratio"])
    assert words.count("horizon, 16 steps") == words.count("horizon, 64 steps") == 2
    check(captured_figures["displacement_ratio"])
