"""The numbers in the documents: a stale one is found, and a run's line says what its manifest has and no more."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def fill(monkeypatch):
    monkeypatch.syspath_prepend(DOCS)  # where it finds the gallery
    spec = importlib.util.spec_from_file_location("fill", DOCS / "fill.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("gallery", None)


@pytest.fixture
def published(fill, monkeypatch, tmp_path):
    """Writes manifests of runs where `fill` looks for them."""
    monkeypatch.setattr(fill, "PUBLISHED", tmp_path)

    def write(**manifests) -> None:
        for name, manifest in manifests.items():
            (tmp_path / "some" / name).mkdir(parents=True)
            (tmp_path / "some" / name / "manifest.json").write_text(json.dumps(manifest))

    return write


RUN = {
    "device": "1 x cpu (cpu)",
    "packages": {"jax": "0.10.2", "numpy": "2.4.6", "scipy": "1"},
    "git_revision": "0123456789abcdef",
    "end": "2026-11-26T07:09:12+00:00",
}


def test_a_run_in_a_line(fill, published) -> None:
    published(plain=RUN, changed=RUN | {"git_revision": "0123456789abcdef+changes"}, bare={"config": {}})
    said = "1 x cpu; jax 0.10.2, numpy 2.4.6; revision 0123456789"
    assert fill.manifest("some/plain") == f"`results/published/some/plain`: {said}; ended 2026-11-26."
    assert f"{said} with changes;" in fill.manifest("some/changed")
    assert fill._facts("some/bare") == dict.fromkeys(("device", "versions", "revision", "sessions", "end"), "")


def test_a_run_of_several_revisions_names_the_last_as_such(fill, published) -> None:
    one, last = ({"git_revision": revision * 10, "packages": RUN["packages"]} for revision in ("a", "b"))
    published(
        grown=RUN | {"git_revision": "b" * 10, "sessions": [one, last, last]}, same=RUN | {"sessions": [one, one]}
    )
    assert "; revision bbbbbbbbbb (the last of 3 sessions); " in fill.manifest("some/grown")
    assert "sessions" not in fill.manifest("some/same")


def test_several_runs_in_a_line(fill, published) -> None:
    later = {"git_revision": "f" * 12, "end": "2026-11-27T00:00:00+00:00"}
    published(a=RUN, b=RUN, c=RUN, d=RUN | later, e=RUN | {"git_revision": "f" * 12})
    assert fill.manifest(*(f"some/{name}" for name in "abcde")) == (
        "`results/published/some`, 5 runs: 1 x cpu; jax 0.10.2, numpy 2.4.6; "
        "revision 0123456789 (`d` and `e`: ffffffffff); ended 2026-11-26 (`d`: 2026-11-27)."
    )


def test_a_bound_is_rounded_upwards(fill) -> None:
    assert [fill.bound([0.001, 0.0208], digits) for digits in (2, 3)] == ["0.03", "0.021"]
    assert fill.bound([1.2], 0) == "2"


def test_a_stale_number_is_found_and_mended(fill, monkeypatch, tmp_path, capsys) -> None:
    page = tmp_path / "page.md"
    monkeypatch.setattr(fill, "ROOT", tmp_path)
    monkeypatch.setattr(fill, "documents", lambda: [page])
    monkeypatch.setitem(fill.BLOCKS, "one.figure", lambda: "0.5")
    page.write_text("It was <!-- = one.figure -->0.4<!-- / --> of it.\n")
    assert fill.main(["--check"]) == 1
    assert "page.md: one.figure is not what results/published gives" in capsys.readouterr().out
    assert fill.main([]) == 0
    assert page.read_text() == "It was <!-- = one.figure -->0.5<!-- / --> of it.\n"
    assert fill.main(["--check"]) == 0
    page.write_text("<!-- = no.figure --><!-- / -->")
    with pytest.raises(SystemExit, match=r"page.md: there are no numbers named no.figure"):
        fill.main([])
