"""Cells: each done once, a failing one named and the rest done, the same bytes whatever stopped the run."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rora_theory.errors import InputError
from rora_theory.io import files
from rora_theory.runs import cells
from rora_theory.runs.cells import CellOutcome, in_process
from rora_theory.runs.folder import RunFolder
from rora_theory.runs.journal import Journal
from rora_theory.runs.reading import CELLS, key_of, read_finished_cells
from sims.common import cli
from sims.common.cells import run_with_bar


@dataclass(frozen=True)
class Square:
    """A cell."""

    side: int
    kind: str = "plain"

    def __str__(self) -> str:
        return f"side {self.side}"


SIDES = [Square(side) for side in (3, 1, 2)]


def area(cell: Square, _: Path) -> dict[str, Any]:
    row = {"side": np.int64(cell.side), "gone": float("inf"), "note": None, "kept": np.bool_(True)}
    return {"area": np.float64(cell.side) ** 2 / 3, "rows": [row]}


def drawn(cell: Square, folder: Path) -> float:
    """A cell with a file, whose result needs what an earlier attempt left."""
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    (folder / "checkpoints" / "1").write_text("half")
    (folder / "losses.csv").write_text(f"loss\n{cell.side}\n")
    return cell.side / 3


def failing(side: int, work: Callable[..., Any] = area) -> Callable[[Square, Path], Any]:
    def run(cell: Square, folder: Path) -> Any:
        if cell.side == side:
            raise ValueError("no such square")
        return work(cell, folder)

    return run


def stopping(side: int, work: Callable[..., Any] = area) -> Callable[[Square, Path], Any]:
    """Ctrl-C in the middle of a cell, after what it wrote."""

    def run(cell: Square, folder: Path) -> Any:
        value = work(cell, folder)
        if cell.side == side:
            raise KeyboardInterrupt
        return value

    return run


def never(cell: Square, _: Path) -> None:
    pytest.fail(f"{cell} is done twice")


def opened(path: Path, **config: Any) -> RunFolder:
    return RunFolder.open("squares", {"unit": "m"} | config, out=path)


def table(folder: RunFolder, values: list[Any]) -> None:
    folder.write("results.csv", "".join(f"{value}\n" for value in values))


def test_a_cell_is_all_its_fields() -> None:
    assert key_of({"a": 1, "b": (1, 2)}) == key_of({"b": [1, 2], "a": 1})
    assert len({key_of({"a": 1}), key_of({"a": 2}), key_of({"a": 1, "b": None}), key_of({"a": 1.5})}) == 4
    assert key_of(Square(1)) == key_of({"side": 1, "kind": "plain"}) != key_of(Square(1, "bold"))


def test_results_come_in_the_order_of_the_cells_and_are_done_once(tmp_path, capsys) -> None:
    """numpy's numbers become Python's, and are read back to the bit."""
    folder = opened(tmp_path)
    first = run_with_bar(SIDES, area, folder, words=lambda value: f"{value['area']:.2f} m")
    assert [value["area"] for value in first] == [3.0, 1 / 3, 4 / 3]
    row = first[0]["rows"][0]
    assert row == {"side": 3, "gone": float("inf"), "note": None, "kept": True}
    assert (type(row["side"]), type(row["kept"])) == (int, bool)
    assert capsys.readouterr().out.splitlines() == [
        "[1/3] side 3: 3.00 m, 0 s", "[2/3] side 1: 0.33 m, 0 s", "[3/3] side 2: 1.33 m, 0 s"
    ]  # fmt: skip
    folder.finish()
    folder = opened(tmp_path)
    more = [Square(4), *reversed(SIDES), Square(4)]
    again = run_with_bar(more[1:4], never, folder)
    assert again == first[::-1]
    assert run_with_bar(more, area, folder, words=lambda _: "new")[1:4] == again
    assert capsys.readouterr().out == "[1/5] side 4: new, 0 s\n", "once, though it is twice in the list"
    assert [one.cell["side"] for one in read_finished_cells(tmp_path).values()] == [4, 2, 1, 3], (
        "all, in the order of the cells"
    )
    assert read_finished_cells(tmp_path / "none") == {}


def test_a_run_that_was_stopped_leaves_the_same_bytes(tmp_path) -> None:
    """After each of the cells, with what a kill leaves of a line."""
    whole = opened(tmp_path / "whole")
    run_with_bar(SIDES, drawn, whole, write=lambda values: table(whole, values))
    whole.finish()
    for stop in (3, 1, 2):
        folder = opened(tmp_path / str(stop))
        with pytest.raises(KeyboardInterrupt):
            run_with_bar(SIDES, stopping(stop, drawn), folder)
        left = folder.path / "cells" / key_of(Square(stop)) / "checkpoints" / "1"
        assert left.read_text() == "half", "the cell goes on from it"
        folder.stop("interrupted")
        with (folder.path / CELLS).open("a") as file:
            file.write('{"key": "')
        assert len(read_finished_cells(folder.path)) == SIDES.index(Square(stop))
        assert (folder.path / CELLS).read_text().endswith('{"key": "'), "to look is to change nothing"
        folder = opened(tmp_path / str(stop))
        run_with_bar(SIDES, drawn, folder, write=lambda values, folder=folder: table(folder, values))
        folder.finish()
        for name in ("results.csv", CELLS, *(f"cells/{key_of(cell)}/losses.csv" for cell in SIDES)):
            assert (folder.path / name).read_bytes() == (whole.path / name).read_bytes(), name
        assert not list(folder.path.glob("cells/*/checkpoints")), "a done cell needs none"


def test_a_run_that_ended_before_a_done_cell_s_checkpoints_went_clears_them(tmp_path) -> None:
    folder = opened(tmp_path)
    run_with_bar(SIDES, drawn, folder)
    folder.finish()
    drawn(SIDES[0], tmp_path / "cells" / key_of(SIDES[0]))
    run_with_bar(SIDES, never, opened(tmp_path))
    assert not list(tmp_path.glob("cells/*/checkpoints"))
    assert len(list(tmp_path.glob("cells/*/losses.csv"))) == 3


def rewritten(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change every line of a journal and seal it again, as whoever made the folder could have."""
    journal = Journal(path / CELLS, opened(path).identity)
    for entry in journal.entries:
        change(entry)
    journal.rewrite(journal.entries)


@pytest.mark.parametrize("key", ["{victim}", "../../victim", "0123456789abcdef", "", 3, None, ["a"]])
def test_a_key_that_is_not_its_cell_s_hash_removes_nothing(tmp_path, key) -> None:
    run, kept = tmp_path / "run", tmp_path / "victim" / "checkpoints" / "mine"
    kept.parent.mkdir(parents=True)
    kept.write_text("mine")
    folder = opened(run)
    run_with_bar(SIDES[:1], drawn, folder)
    folder.finish()
    named = key.format(victim=kept.parents[1]) if isinstance(key, str) else key
    rewritten(run, lambda entry: entry.update(key=named))
    with pytest.raises(InputError, match=rf"{CELLS}: line 1: "):
        run_with_bar(SIDES[:1], drawn, opened(run))
    assert kept.read_text() == "mine"


@pytest.mark.parametrize(
    "change",
    [{"cell": [1]}, {"files": ["a"]}, {"files": None}, {"files": {"../../victim": ""}}, {"files": {"/etc/passwd": ""}}],
)
def test_a_cell_of_the_wrong_type_or_with_a_file_elsewhere_is_refused(tmp_path, change) -> None:
    folder = opened(tmp_path)
    run_with_bar(SIDES[:1], area, folder)
    folder.finish()
    rewritten(tmp_path, lambda entry: entry.update(change))
    with pytest.raises(InputError, match=CELLS):
        read_finished_cells(tmp_path)


def test_a_result_of_the_wrong_type_is_refused_before_work_starts(tmp_path) -> None:
    folder = opened(tmp_path)
    run_with_bar(SIDES[:1], area, folder)
    folder.finish()
    rewritten(tmp_path, lambda entry: entry.update(value="3"))
    with pytest.raises(InputError, match=rf"{CELLS}: is damaged \(TypeError"):
        run_with_bar(SIDES, never, opened(tmp_path), write=lambda values: [value["area"] for value in values])


@pytest.mark.parametrize("link", ["cells", "cells/{key}", "cells/{key}/checkpoints", "results.csv"])
def test_nothing_is_written_or_removed_through_a_link_out_of_the_folder(tmp_path, link) -> None:
    run, victim = tmp_path / "run", tmp_path / "victim"
    folder = opened(run)
    run_with_bar(SIDES[:1], drawn, folder)
    folder.finish()
    for kept in (victim / "checkpoints" / "mine", victim / key_of(SIDES[0]) / "checkpoints" / "mine"):
        kept.parent.mkdir(parents=True)
        kept.write_text("mine")
    place = run / link.format(key=key_of(SIDES[0]))
    if place.is_dir():
        shutil.rmtree(place)
    place.symlink_to(victim)
    with pytest.raises(InputError, match=r"symbolic link out of|which is not a path inside"):
        run_with_bar(SIDES, drawn, opened(run))
    assert len([path for path in victim.rglob("*") if path.is_file()]) == 2


def test_a_failing_cell_is_named_and_the_others_are_done(tmp_path, capsys) -> None:
    folder, tables = opened(tmp_path), []
    with pytest.raises(cli.FailedError, match=r"1 of 3 cells failed, the first side 1 \(ValueError: no such square\)"):
        run_with_bar(SIDES, failing(1), folder, write=lambda values: tables.append(len(values)))
    assert tables == [2], "the table has what is done"
    own = tmp_path / "cells" / key_of(Square(1))
    assert (
        f"side 1 failed (ValueError: no such square); its traceback is in {own}/error.txt\n" in capsys.readouterr().err
    )
    assert "in run" in (own / "error.txt").read_text()
    assert len(run_with_bar(SIDES, area, folder, words=lambda _: "done")) == 3
    assert capsys.readouterr().out == "[2/3] side 1: done, 0 s\n", "tried again, the others not"
    assert not own.exists()


def test_a_run_with_a_failing_cell_ends_with_status_1(tmp_path, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: run_with_bar(SIDES, failing(2), opened(tmp_path)) and None)
    assert stop.value.code == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: 1 of 3 cells failed, the first side 2 ")
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert (manifest["status"], manifest["error"][:5]) == ("failed", "1 of ")


def test_a_runner_may_end_cells_in_any_order(tmp_path, capsys) -> None:
    """As one that works on several at once: what is assembled is in the order of the cells all the same."""

    def last_first(work, todo, begun):
        for place in range(len(todo)):
            begun(place)
        for place in reversed(range(len(todo))):
            result = ValueError("lost") if todo[place][0].side == 1 else work(*todo[place])
            yield CellOutcome(place, result, 2.4, f"n{place % 2}")

    folder = opened(tmp_path / "a")
    with pytest.raises(cli.FailedError, match=r"1 of 3 cells failed, the first side 1 \(ValueError: lost\)"):
        run_with_bar(SIDES, area, folder, runner=last_first, words=lambda value: f"{value['area']:.2f} m")
    said = capsys.readouterr()
    assert said.out == "[3/3] side 2: 1.33 m, 2 s\n[1/3] side 3: 3.00 m, 2 s\n"
    assert said.err.startswith("note: side 1 failed (ValueError: lost)")
    assert run_with_bar(SIDES, area, folder) == run_with_bar(SIDES, area, opened(tmp_path / "b"), runner=in_process)
    assert (folder.path / CELLS).read_bytes() == (tmp_path / "b" / CELLS).read_bytes()


def test_the_tables_follow_every_few_seconds(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(cells, "WRITE_INTERVAL", -1.0)
    seen: list[list[float]] = []
    work = lambda cell, _: cell.side  # noqa: E731
    run_with_bar(SIDES, work, opened(tmp_path), write=seen.append)
    assert seen == [[3], [3, 1], [3, 1, 2], [3, 1, 2]]


def test_a_full_disk_ends_the_run_and_is_no_fault_of_a_cell(tmp_path, monkeypatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    folder = opened(tmp_path)
    key = key_of(Square(1))
    work = lambda cell, path: full() if cell.side == 1 else area(cell, path)  # noqa: E731
    with pytest.raises(InputError, match=rf"cells/{key}: cannot be written \(No space left on device\)"):
        run_with_bar(SIDES, work, folder)
    with monkeypatch.context() as patch:
        patch.setattr(files, "_write", full)
        with pytest.raises(InputError, match=r"cells\.jsonl: cannot be written \(No space left on device\)"):
            run_with_bar(SIDES, area, folder)
    assert [value["area"] for value in run_with_bar(SIDES[:1], never, folder)] == [3.0]
    assert len(run_with_bar(SIDES, area, folder)) == 3


def changed(path: Path) -> pytest.RaisesExc:
    return pytest.raises(InputError, match=rf"{path.name}: (line 1 is damaged or )?was changed since the run wrote it")


@pytest.mark.parametrize("end", [lambda folder: folder.finish(), lambda folder: folder._release()])
def test_what_was_changed_by_hand_does_not_pass(tmp_path, end) -> None:
    """A result, a file, or what a cell is: after a run's end, and after a kill, when no digest is in the manifest."""
    folder = opened(tmp_path)
    run_with_bar(SIDES, drawn, folder)
    end(folder)
    own = tmp_path / "cells" / key_of(Square(3))
    for path, old, new in (
        (tmp_path / CELLS, "1.0", "1.1"), (own / "losses.csv", "3", "2"), (own / "cell.json", "plain", "bold")
    ):  # fmt: skip
        whole = path.read_text()
        assert old in whole
        path.write_text(whole.replace(old, new, 1))
        with changed(path):
            run_with_bar(SIDES, never, opened(tmp_path))
        path.write_text(whole)
    run_with_bar(SIDES, never, opened(tmp_path))


def test_a_cell_whose_file_was_removed_is_done_again(tmp_path, capsys) -> None:
    folder = opened(tmp_path)
    run_with_bar(SIDES, drawn, folder)
    folder.finish()
    file = tmp_path / "cells" / key_of(Square(2)) / "losses.csv"
    file.unlink()
    folder = opened(tmp_path)

    def otherwise(cell: Square, path: Path) -> float:
        drawn(cell, path)
        (path / "losses.csv").write_text("seconds\n9\n")  # as a measured time would differ
        return 7.0

    assert run_with_bar(SIDES, otherwise, folder, words=lambda _: "again") == [1.0, 1 / 3, 7.0]
    assert capsys.readouterr().out == "[3/3] side 2: again, 0 s\n"
    folder._release()  # killed: the file before is not taken for the one that was changed
    assert run_with_bar(SIDES, never, opened(tmp_path)) == [1.0, 1 / 3, 7.0]


def test_a_folder_may_grow_by_what_was_not_known(tmp_path) -> None:
    """An entry that is None in one part of a run, and the same in all others."""

    def grown(evaluation: Any, **config: Any) -> RunFolder:
        return RunFolder.open("squares", {"unit": "m"} | config, out=tmp_path, extensible={"evaluation": evaluation})

    first = grown(None)
    run_with_bar(SIDES, area, first)
    first.finish()
    for evaluation in (None, {"limit": 3}, None, {"limit": 3}):
        folder = grown(evaluation)
        run_with_bar(SIDES, never, folder)
        folder.finish()
    assert folder.entry("config") == {"unit": "m", "evaluation": {"limit": 3}}
    before = (tmp_path / "manifest.json").read_bytes()
    with pytest.raises(InputError, match=r"evaluation there \{'limit': 3\}, here \{'limit': 4\}"):
        grown({"limit": 4})
    with pytest.raises(InputError, match="unit there 'm', here 'km'"):
        grown(None, unit="km")
    assert (tmp_path / "manifest.json").read_bytes() == before
