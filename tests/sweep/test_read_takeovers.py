"""The takeover distances that the grid's predictions are from: one init and split of a run of sims.regime."""

import pytest

from rora_theory import frames
from rora_theory.errors import InputError
from rora_theory.measure.regime_tables import TAKEOVER, TAKEOVER_COLUMNS
from rora_theory.sweep.horizons import read_takeovers

ROWS = [
    {"layer": layer, "module": f"model.layers.{layer}.mlp.up_proj", "split": split, "init": init, "rank": 8}
    | {
        "takeover": (1 + layer)
        * {"kaiming_uniform": 1.0, "gaussian": 10.0}[init]
        * {"train": 100.0, "heldout": 1.0}[split]
    }
    for init in ("gaussian", "kaiming_uniform")
    for layer in range(2)
    for split in ("train", "heldout")
]


def test_takeovers_are_those_of_peft_s_init_at_held_out_tokens(tmp_path) -> None:
    table = frames.of(ROWS, TAKEOVER_COLUMNS)
    (tmp_path / TAKEOVER).write_text(frames.to_csv(table))
    assert read_takeovers(tmp_path) == [1.0, 2.0]


@pytest.mark.parametrize(("column", "value"), [("init", "kaiming_uniform"), ("split", "heldout")])
def test_a_run_without_them_is_bad_input(tmp_path, column, value) -> None:
    table = frames.of([row for row in ROWS if row[column] != value], TAKEOVER_COLUMNS)
    (tmp_path / TAKEOVER).write_text(frames.to_csv(table))
    with pytest.raises(InputError, match=r"takeover\.csv: has no held-out row of kaiming_uniform"):
        read_takeovers(tmp_path)
