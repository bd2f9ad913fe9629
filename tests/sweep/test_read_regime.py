"""The takeover distances and crossing ranks that the grid's law is of: one init and split of a run of sims.regime."""

import pytest

from rora_theory import frames
from rora_theory.errors import InputError
from rora_theory.measure.regime_tables import CROSSING_COLUMNS, CROSSINGS, TAKEOVER, TAKEOVER_COLUMNS
from rora_theory.sweep.horizons import read_regime

ROWS = [
    {"layer": layer, "module": f"model.layers.{layer}.mlp.up_proj", "split": split, "init": init, "rank": 8}
    | {"optimizer": optimizer}
    | dict.fromkeys(
        ("takeover", "crossing_rank"),
        (1 + layer)
        * {"kaiming_uniform": 1.0, "gaussian": 10.0}[init]
        * {"train": 100.0, "heldout": 1.0}[split]
        * {"adam": 1.0, "sgd": 1000.0}[optimizer],
    )
    for init in ("gaussian", "kaiming_uniform")
    for layer in range(2)
    for split in ("train", "heldout")
    for optimizer in ("sgd", "adam")
]


def write(folder, rows) -> None:
    takeovers = [row for row in rows if row["optimizer"] == "adam"]
    (folder / TAKEOVER).write_text(frames.to_csv(frames.of(takeovers, TAKEOVER_COLUMNS)))
    (folder / CROSSINGS).write_text(frames.to_csv(frames.of(rows, CROSSING_COLUMNS)))


def test_they_are_those_of_peft_s_init_at_held_out_tokens_under_adam(tmp_path) -> None:
    write(tmp_path, ROWS)
    assert read_regime(tmp_path) == ([1.0, 2.0], [1.0, 2.0])


@pytest.mark.parametrize(("column", "value"), [("init", "kaiming_uniform"), ("split", "heldout")])
def test_a_run_without_them_is_bad_input(tmp_path, column, value) -> None:
    write(tmp_path, [row for row in ROWS if row[column] != value])
    with pytest.raises(InputError, match=r"takeover\.csv: has no held-out row of kaiming_uniform"):
        read_regime(tmp_path)


def test_crossing_ranks_of_sgd_are_not_adam_s(tmp_path) -> None:
    write(tmp_path, ROWS)
    (tmp_path / CROSSINGS).write_text(
        frames.to_csv(frames.of([row for row in ROWS if row["optimizer"] == "sgd"], CROSSING_COLUMNS))
    )
    with pytest.raises(InputError, match=r"crossing_ranks\.csv: has no held-out row of kaiming_uniform under adam"):
        read_regime(tmp_path)
