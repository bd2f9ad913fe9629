"""Tables of a run: exact floats, whole numbers without decimals, published files to the byte, damage by line."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from rora_theory.errors import InputError
from rora_theory.runs import frames

PUBLISHED = Path(__file__).parents[1] / "results" / "published"
TABLES = sorted(path for path in PUBLISHED.glob("*/*.csv") if not path.name.startswith("table_"))


def test_published_tables_are_written_again_to_the_byte() -> None:
    assert len(TABLES) > 50
    for path in TABLES:
        text = path.read_text()
        assert frames.to_csv(frames.read_csv(path, text.splitlines()[0].split(","))) == text, path


def test_floats_are_written_as_python_does_and_read_to_the_bit(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = (rng.standard_normal(4000) * 10.0 ** rng.integers(-320, 300, 4000)).tolist()
    values += [0.0, -0.0, 1.0, 1e-4, 1e-5, 0.1, 1e15, 1e16, 123456789012345680.0, math.inf, -math.inf, 5e-324]
    text = frames.to_csv(pd.DataFrame({"value": values}))
    assert text.splitlines() == ["value", *map(repr, values)]
    (tmp_path / "a.csv").write_text(text)
    assert frames.read_csv(tmp_path / "a.csv")["value"].tolist() == values


def test_rows_become_a_frame_of_the_requested_columns(tmp_path: Path) -> None:
    """Columns keep their order, integers stay integers beside missing ones, and a numeric rule stays text."""
    rows = [
        {"rank": 8, "rule": "0.25", "loss": 0.5, "control": True, "said": 'a, "b"', "more": 1},
        {"rule": "0.5", "loss": None, "control": False, "said": ""},
        {"rank": 16, "rule": "1", "loss": math.nan, "control": True, "said": None},
    ]
    columns = ["loss", "rank", "rule", "control", "said", "none"]
    frame = frames.from_rows(rows, columns)
    text = 'loss,rank,rule,control,said,none\n0.5,8,0.25,True,"a, ""b""",\n,,0.5,False,,\n,16,1,True,,\n'
    assert frames.to_csv(frame) == text
    (tmp_path / "a.csv").write_text(text)
    again = frames.read_csv(tmp_path / "a.csv", columns)
    assert frames.to_csv(again) == text
    assert again["rule"].tolist() == ["0.25", "0.5", "1"]
    assert again["rank"].isna().tolist() == [False, True, False]
    assert [again[name].dtype for name in ("loss", "control")] == [np.float64, np.bool_]
    assert frames.to_csv(frames.from_rows([], ["a", "b"])) == "a,b\n"


def test_rows_are_chosen_by_their_values_and_a_missing_one_has_none() -> None:
    rows = [{"rank": 8, "rule": "lora"}, {"rule": "lora"}, {"rank": 8, "rule": "rora"}, {"rank": 8}]
    table = frames.from_rows(rows, ["rank", "rule"])
    assert frames.where(table, {"rank": 8, "rule": "lora"}).index.tolist() == [0]
    assert frames.where(table, {"rule": "lora"}).index.tolist() == [0, 1]
    assert frames.where(table, {"rank": 16}).empty


def test_numbers_of_several_kinds_stay_as_they_are() -> None:
    rows = [{"kappa": 1, "loss": 0.5}, {"kappa": 0.5, "loss": np.float64(1)}, {"kappa": "best", "loss": None}]
    frame = frames.from_rows(rows, ["kappa", "loss"])
    assert frames.to_csv(frame) == "kappa,loss\n1,0.5\n0.5,1.0\nbest,\n"
    assert frame["loss"].dtype == np.float64


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a,b\n1,2\n3\n", "line 3 .* 2 fields, got 1"),
        (b"a,b\n1,2,3\n", "line 2 .* 2 fields, got 3"),
        (b'a,b\n"x\ny",2\n3\n', "line 4 .* 2 fields, got 1"),
        (b"a,b\n1,2\n3,4", "line 3 is cut off. Expected the file as the run wrote it"),
        (b"b,a\n1,2\n", "line 1 is not the header a,b"),
        (b"a,b\n\xff,2\n", "byte 4 is not UTF-8"),
        (b"a,b\n\n", "line 2 .* 2 fields, got 0"),
    ],
)
def test_a_damaged_table_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"a\.csv: {message}"):
        frames.read_csv(path, ["a", "b"])


def test_a_missing_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a\.csv: no such file. Expected a run's table"):
        frames.read_csv(tmp_path / "a.csv", accepted="a run's table")
