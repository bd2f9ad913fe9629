"""The gallery has every published figure with its command, and the commands are current. The list has every run."""

import dataclasses
import importlib
import json
import re
from pathlib import Path

import gallery
import pytest
from support.commands import options_class

from sims.common import cli

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_every_published_figure_is_in_it() -> None:
    written = (ROOT / "docs" / "gallery.md").read_text()
    assert gallery.markdown() in written, "python docs/fill.py writes it anew"
    shown = re.findall(r"!\[[^]]+\]\(\.\./results/(published/[^)]+)\)", written)
    published = {path.relative_to(ROOT / "results").as_posix() for path in (ROOT / "results/published").rglob("*.png")}
    assert sorted(shown) == sorted(published)
    for path in {path.parent for path in (ROOT / "results/published").rglob("*.png")}:
        runs = [path] if (path / "manifest.json").exists() else sorted(path.glob("seed_*"))
        assert runs
        assert all(f"(../{run.relative_to(ROOT).as_posix()}/manifest.json)" in written for run in runs), path
    assert "```" not in re.sub(r"<details.*?</details>", "", written, flags=re.DOTALL), "commands are folded"


def test_a_figure_that_a_page_shows_has_the_page_s_alternative_text() -> None:
    readme = (gallery.ROOT / "README.md").read_text()
    (text,) = re.findall(r"!\[([^]]+)\]\(results/published/horizon/minima.png\)", readme)
    assert f"[![{' '.join(text.split())}](../results/published/horizon/minima.png)]" in gallery.markdown()


def test_every_published_run_is_in_the_list_with_its_model() -> None:
    rows = [line for line in gallery.runs_markdown().splitlines() if line.startswith("| `")]
    assert len(rows) == len(list((ROOT / "results/published").rglob("manifest.json")))
    (gemma,) = [row for row in rows if row.startswith("| `horizon_gemma` |")]
    assert gemma.startswith("| `horizon_gemma` | `rora sweep` | Gemma 3 270M | [tables](../results/published/horizon_")
    (public,) = [row for row in rows if row.startswith("| `evidence` |")]
    assert "| public models |" in public
    (toy,) = [row for row in rows if row.startswith("| `lr_transfer` |")]
    assert "| simulation |" in toy
    (language,) = [row for row in rows if row.startswith("| `lr_transfer_smollm2` |")]
    assert "| SmolLM2-135M |" in language


@pytest.mark.slow
def test_its_figures_have_the_options_of_today() -> None:
    """A figure is drawn again with the options of the manifest; the command of the data is that of the run's commit."""
    for figure in gallery.figures():
        config = options_class(importlib.import_module(f"figures.{figure.command}"))
        takes_folder = {field.name for field in dataclasses.fields(config)} & {"run", "runs"}
        words = figure.manifest.get("figures", {}).get(figure.path.stem, [])
        assert dataclasses.is_dataclass(
            cli.parse(config, [*(["folder"] if takes_folder else []), *words], description="")
        )
        sessions = [figure.manifest, *figure.manifest["sessions"]]
        assert all(run["git_revision"] for run in sessions if run.get("command")), figure.path
    drawn = {figure.path.stem: figure for figure in gallery.figures()}
    assert drawn["regime_crossing_distance"].command == "regime"
    assert "teps after which A dominates under Adam" in drawn["regime_crossing_distance"].caption
    assert "Slopes in the rank" in drawn["training_dynamics_linear_exponents"].caption
    assert drawn["coordinate_check"].caption != drawn["coordinate_check_slopes"].caption


def test_a_figure_that_nothing_draws_or_that_has_no_run_is_refused(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(gallery, "PUBLISHED", tmp_path)
    (tmp_path / "norm_vs_rank.png").touch()
    with pytest.raises(FileNotFoundError, match=r"manifest\.json"):
        gallery.figures()
    (tmp_path / "manifest.json").write_text(json.dumps({"experiment": "variance_sweep"}))
    assert [figure.command for figure in gallery.figures()] == ["norm_vs_rank"]
    (tmp_path / "pie.png").touch()
    with pytest.raises(ValueError, match=r"pie.png.*accuracy, accuracy_vs_rank"):
        gallery.figures()
