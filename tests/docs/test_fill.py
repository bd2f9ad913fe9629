"""The numbers in the documents: a stale one is found, and a run's line says what its manifest has and no more."""

import json

import fill
import pytest


@pytest.fixture
def published(monkeypatch, tmp_path):
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


def test_a_run_in_a_line(published) -> None:
    published(plain=RUN, changed=RUN | {"git_revision": "0123456789abcdef+changes"}, bare={"config": {}})
    said = "1 x cpu; jax 0.10.2, numpy 2.4.6; revision 0123456789"
    assert fill.manifest("some/plain") == f"`results/published/some/plain`: {said}; ended 2026-11-26."
    assert f"{said} with changes;" in fill.manifest("some/changed")
    assert fill._facts("some/bare") == dict.fromkeys(("device", "versions", "revision", "sessions", "end"), "")


def test_a_run_of_several_revisions_names_the_last_as_such(published) -> None:
    one, last = ({"git_revision": revision * 10, "packages": RUN["packages"]} for revision in ("a", "b"))
    published(
        grown=RUN | {"git_revision": "b" * 10, "sessions": [one, last, last]}, same=RUN | {"sessions": [one, one]}
    )
    assert "; revision bbbbbbbbbb, the last of 3 sessions; " in fill.manifest("some/grown")
    assert "sessions" not in fill.manifest("some/same")
    both = fill.manifest("some/same", "some/grown")
    assert "; revision 0123456789 (`grown`: bbbbbbbbbb, the last of 3 sessions); " in both


def test_several_runs_in_a_line(published) -> None:
    later = {"git_revision": "f" * 12, "end": "2026-11-27T00:00:00+00:00"}
    published(a=RUN, b=RUN, c=RUN, d=RUN | later, e=RUN | {"git_revision": "f" * 12})
    assert fill.manifest(*(f"some/{name}" for name in "abcde")) == (
        "`results/published/some`, 5 runs: 1 x cpu; jax 0.10.2, numpy 2.4.6; "
        "revision 0123456789 (`d` and `e`: ffffffffff); ended 2026-11-26 (`d`: 2026-11-27)."
    )


def test_a_bound_is_rounded_upwards() -> None:
    assert [fill.bound([0.001, 0.0208], digits) for digits in (2, 3)] == ["0.03", "0.021"]
    assert fill.bound([1.2], 0) == "2"
    assert fill.bound([0.07], 2) == "0.07", "0.07 * 100 is a little above 7"


def test_a_stale_number_is_found_and_mended(monkeypatch, tmp_path, capsys) -> None:
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


def test_a_number_at_the_beginning_of_a_line_would_end_its_paragraph() -> None:
    place = "<!-- = verdicts.took -->1 s<!-- / -->"
    for text in (f"It took\n{place} here.", f"- It took\n  {place} here."):
        with pytest.raises(
            SystemExit, match=r"^error: page.md: verdicts.took begins a line and ends its paragraph; put"
        ):
            fill.fill(text, "page.md")
    for text in (f"It took {place}\nhere.", f"It took:\n\n{place}", f"| a |\n{place}", f"# Title\n{place}"):
        assert fill.fill(text, "page.md").startswith(text.split("<!--")[0])
