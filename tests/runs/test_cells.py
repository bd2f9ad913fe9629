"""Cells run once, a failure is named and the other cells finish, and interruptions leave identical files."""

import errno
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rora_theory.errors import InputError
from rora_theory.runs import cells, files
from rora_theory.runs.cells import CellOutcome, in_process
from rora_theory.runs.folder import RunFolder
from rora_theory.runs.journal import Journal
from rora_theory.runs.reading import CELLS, key_of, read_finished_cells
from sims.common import cli
from sims.common.cells import run_with_bar


@dataclass(frozen=True)
class Square:
    """Cell that squares its number."""

    side: int
    kind: str = "plain"

    def __str__(self) -> str:
        return f"side {self.side}"


SIDES = [Square(side) for side in (3, 1, 2)]


def area(cell: Square, _: Path) -> dict[str, Any]:
    row = {"side": np.int64(cell.side), "gone": float("inf"), "note": None, "kept": np.bool_(True)}
    return {"area": np.float64(cell.side) ** 2 / 3, "rows": [row]}


def write_files(cell: Square, folder: Path) -> float:
    """Write a file of the cell, and a checkpoint as an interrupted attempt leaves it."""
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    (folder / "checkpoints" / "1").write_text("half")
    (folder / "losses.csv").write_text(f"loss\n{cell.side}\n")
    return cell.side / 3


def failing(side: int, error: BaseException, work: Callable[..., Any] = area) -> Callable[[Square, Path], Any]:
    """Return work that raises an error at the end of one cell."""

    def work_until_error(cell: Square, folder: Path) -> Any:
        value = work(cell, folder)
        if cell.side == side:
            raise error
        return value

    return work_until_error


NO_SQUARE = ValueError("no such square")


def fail_if_called(cell: Square, _: Path) -> None:
    pytest.fail(f"{cell} is done twice")


def opened(path: Path, **config: Any) -> RunFolder:
    return RunFolder.open("squares", {"unit": "m"} | config, out=path)


def finished_run(path: Path, sides: Sequence[Square] = SIDES, work: Callable[..., Any] = write_files) -> RunFolder:
    """Run the cells, write a table of their results and finish the folder."""
    folder = opened(path)
    run_with_bar(sides, work, folder, write=lambda values: folder.write("results.csv", f"{values}\n"))
    folder.finish()
    return folder


def test_a_key_depends_on_all_fields_of_a_cell() -> None:
    assert key_of({"a": 1, "b": (1, 2)}) == key_of({"b": [1, 2], "a": 1})
    assert len({key_of({"a": 1}), key_of({"a": 2}), key_of({"a": 1, "b": None}), key_of({"a": 1.5})}) == 4
    assert key_of(Square(1)) == key_of({"side": 1, "kind": "plain"}) != key_of(Square(1, "bold"))


def test_results_are_in_the_order_of_the_cells_and_computed_once(tmp_path, capsys) -> None:
    """NumPy's numbers become Python's and are read back with all digits."""
    folder = opened(tmp_path)
    first = run_with_bar(SIDES, area, folder, describe=lambda value: f"{value['area']:.2f} m")
    assert [value["area"] for value in first] == pytest.approx([3.0, 1 / 3, 4 / 3])
    row = first[0]["rows"][0]
    assert row == {"side": 3, "gone": float("inf"), "note": None, "kept": True}
    assert (type(row["side"]), type(row["kept"])) == (int, bool)
    assert capsys.readouterr().out.splitlines() == [
        "[1/3] side 3: 3.00 m, 0 s", "[2/3] side 1: 0.33 m, 0 s", "[3/3] side 2: 1.33 m, 0 s"
    ]  # fmt: skip
    folder.finish()
    folder = opened(tmp_path)
    more = [Square(4), *reversed(SIDES), Square(4)]
    again = run_with_bar(more[1:4], fail_if_called, folder)
    assert again == first[::-1]
    assert run_with_bar(more, area, folder, describe=lambda _: "new")[1:4] == again
    assert capsys.readouterr().out == "[1/5] side 4: new, 0 s\n", "once, although it is in the list twice"
    in_order = [finished.cell["side"] for finished in read_finished_cells(tmp_path).values()]
    assert in_order == [4, 2, 1, 3], "all, in the order of the cells"
    assert read_finished_cells(tmp_path / "none") == {}


def test_a_resumed_run_writes_the_same_bytes(tmp_path) -> None:
    """The run is interrupted at the end of each cell, with the half line that a kill leaves."""
    uninterrupted = finished_run(tmp_path / "uninterrupted")
    for stop in (3, 1, 2):
        folder = opened(tmp_path / str(stop))
        with pytest.raises(KeyboardInterrupt):
            run_with_bar(SIDES, failing(stop, KeyboardInterrupt(), write_files), folder)
        checkpoint = folder.path / "cells" / key_of(Square(stop)) / "checkpoints" / "1"
        assert checkpoint.read_text() == "half", "the cell resumes from it"
        folder.stop("interrupted")
        (checkpoint.parents[1] / ".00ff.part").touch()  # a file that was being written
        with (folder.path / CELLS).open("a") as file:
            file.write('{"key": "')
        assert len(read_finished_cells(folder.path)) == SIDES.index(Square(stop))
        assert (folder.path / CELLS).read_text().endswith('{"key": "'), "reading changes nothing"
        finished_run(folder.path)
        for name in ("results.csv", CELLS, *(f"cells/{key_of(cell)}/losses.csv" for cell in SIDES)):
            assert (folder.path / name).read_bytes() == (uninterrupted.path / name).read_bytes(), name
        assert not list(folder.path.glob("cells/*/checkpoints")), "a finished cell needs none"
        assert not list(folder.path.rglob(".*.part"))
    # A run can also end between saving a cell and removing its checkpoints.
    write_files(SIDES[0], uninterrupted.path / "cells" / key_of(SIDES[0]))
    finished_run(uninterrupted.path, work=fail_if_called)
    assert not list(uninterrupted.path.glob("cells/*/checkpoints"))
    assert len(list(uninterrupted.path.glob("cells/*/losses.csv"))) == 3


@pytest.mark.parametrize(
    "change",
    [
        {"key": "../../victim"}, {"key": "0123456789abcdef"}, {"key": 3}, {"cell": [1]}, {"files": [3]},
        {"files": None}, {"files": ["../../victim"]}, {"files": ["/etc/passwd"]},
    ],
)  # fmt: skip
def test_an_entry_with_another_key_type_or_a_file_elsewhere_removes_nothing(tmp_path, change) -> None:
    run, checkpoint = tmp_path / "run", tmp_path / "victim" / "checkpoints" / "mine"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_text("mine")
    finished_run(run, SIDES[:1])
    journal = Journal(run / CELLS)
    journal.rewrite([entry | change for entry in journal.entries])
    for read in (lambda: read_finished_cells(run), lambda: run_with_bar(SIDES[:1], write_files, opened(run))):
        with pytest.raises(InputError, match=CELLS):
            read()
    assert checkpoint.read_text() == "mine"


def test_a_result_of_the_wrong_type_is_refused_before_work_starts(tmp_path) -> None:
    finished_run(tmp_path, SIDES[:1], lambda *_: "3")
    with pytest.raises(InputError, match=rf"{CELLS}: is damaged \(TypeError"):
        run_with_bar(SIDES, fail_if_called, opened(tmp_path), write=lambda values: [value["area"] for value in values])


@pytest.mark.parametrize("link", ["cells", "cells/{key}", "cells/{key}/checkpoints", "results.csv"])
def test_nothing_is_written_or_removed_through_a_link_out_of_the_folder(tmp_path, link) -> None:
    run, victim = tmp_path / "run", tmp_path / "victim"
    finished_run(run, SIDES[:1])
    for file in (victim / "checkpoints" / "mine", victim / key_of(SIDES[0]) / "checkpoints" / "mine"):
        file.parent.mkdir(parents=True)
        file.write_text("mine")
    place = run / link.format(key=key_of(SIDES[0]))
    if place.is_dir():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)
    place.symlink_to(victim)
    with pytest.raises(InputError, match=r"symbolic link out of|which is not a path inside"):
        run_with_bar(SIDES, write_files, opened(run))
    assert len([path for path in victim.rglob("*") if path.is_file()]) == 2


def test_a_failing_cell_is_named_and_the_others_are_computed(tmp_path, capsys) -> None:
    """The command ends with status 1; the next run tries the failed cell again."""
    lengths: list[int] = []
    work = failing(1, NO_SQUARE)
    with pytest.raises(SystemExit) as stop:
        cli.run_command(
            lambda: run_with_bar(SIDES, work, opened(tmp_path), write=lambda rows: lengths.append(len(rows)))
        )
    assert stop.value.code == 1
    assert lengths == [2], "the table has the finished cells"
    cell_folder = tmp_path / "cells" / key_of(Square(1))
    lines = capsys.readouterr().err.splitlines()
    reason = "side 1 failed (ValueError: no such square); its traceback is in"
    assert any(f"{reason} {cell_folder / 'error.txt'}" in line for line in lines)
    assert lines[-1].startswith("error: 1 of 3 cells failed, the first side 1 (ValueError: no such square)")
    assert "in work_until_error" in (cell_folder / "error.txt").read_text()
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert (manifest["status"], manifest["error"][:5]) == ("failed", "1 of ")
    assert len(run_with_bar(SIDES, area, opened(tmp_path), describe=lambda _: "done")) == 3
    assert capsys.readouterr().out == "[2/3] side 1: done, 0 s\n", "only the failed cell is computed again"
    assert not cell_folder.exists()


def test_a_runner_may_end_cells_in_any_order(tmp_path, capsys) -> None:
    """Results are in the order of the cells even if a runner computes several at once."""

    def last_first(work, todo, on_start):
        for place in range(len(todo)):
            on_start(place)
        for place in reversed(range(len(todo))):
            result = ValueError("lost") if todo[place][0].side == 1 else work(*todo[place])
            yield CellOutcome(place, result, 2.4, f"n{place % 2}")

    folder = opened(tmp_path / "a")
    with pytest.raises(cli.FailedError, match=r"1 of 3 cells failed, the first side 1 \(ValueError: lost\)"):
        run_with_bar(SIDES, area, folder, runner=last_first, describe=lambda value: f"{value['area']:.2f} m")
    streams = capsys.readouterr()
    assert streams.out == "[3/3] side 2: 1.33 m, 2 s\n[1/3] side 3: 3.00 m, 2 s\n"
    assert streams.err.startswith("note: side 1 failed (ValueError: lost)")
    assert run_with_bar(SIDES, area, folder) == run_with_bar(SIDES, area, opened(tmp_path / "b"), runner=in_process)
    assert (folder.path / CELLS).read_bytes() == (tmp_path / "b" / CELLS).read_bytes()


def test_the_tables_are_written_every_few_seconds(tmp_path, monkeypatch) -> None:
    """After a cell whose end is more than five seconds after the last time, and at the end."""
    now, written = [100.0], []
    monkeypatch.setattr(cells, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def work(cell: Square, _: Path) -> float:
        now[0] += {3: 5.5, 1: 4.0, 2: 0.9}[cell.side]
        return cell.side

    run_with_bar(SIDES, work, opened(tmp_path / "slow"), write=written.append)
    assert written == [[3], [3, 1, 2]], "4.9 seconds are too few"


def test_a_full_disk_ends_the_run_and_is_not_blamed_on_a_cell(tmp_path, monkeypatch) -> None:
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def full(*_: Any) -> None:
        raise error

    folder = opened(tmp_path)
    key = key_of(Square(1))
    with pytest.raises(InputError, match=rf"cells/{key}: cannot be written \(No space left on device\)"):
        run_with_bar(SIDES, failing(1, error), folder)
    with monkeypatch.context() as patch:
        patch.setattr(files, "_write", full)
        with pytest.raises(InputError, match=r"cells\.jsonl: cannot be written \(No space left on device\)"):
            run_with_bar(SIDES, area, folder)
    assert [value["area"] for value in run_with_bar(SIDES[:1], fail_if_called, folder)] == [3.0]
    assert len(run_with_bar(SIDES, area, folder)) == 3


@pytest.mark.parametrize("name", ["cells", f"cells/{key_of(Square(1))}"])
def test_a_file_in_place_of_a_folder_is_refused_before_work(tmp_path, name) -> None:
    folder = opened(tmp_path)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("")
    with pytest.raises(InputError, match=f"{name}.* a file"):
        run_with_bar(SIDES, fail_if_called, folder)


def test_a_cell_whose_file_was_removed_is_computed_again(tmp_path, capsys) -> None:
    finished_run(tmp_path)
    (tmp_path / "cells" / key_of(Square(2)) / "losses.csv").unlink()
    capsys.readouterr()
    folder = opened(tmp_path)

    def otherwise(cell: Square, path: Path) -> float:
        write_files(cell, path)
        (path / "losses.csv").write_text("seconds\n9\n")  # as a measured time would differ
        return 7.0

    expected = pytest.approx([1.0, 1 / 3, 7.0])
    assert run_with_bar(SIDES, otherwise, folder, describe=lambda _: "again") == expected
    assert capsys.readouterr().out == "[3/3] side 2: again, 0 s\n"
    folder._release()  # killed: the file before is not taken for the one that was changed
    assert run_with_bar(SIDES, fail_if_called, opened(tmp_path)) == expected
