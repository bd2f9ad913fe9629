"""Write a run folder of sims.regime without a model."""

from pathlib import Path

from rora_theory.measure.regimes import tables as regime_tables
from rora_theory.runs import frames
from rora_theory.runs.folder import RunFolder


def write(path: Path) -> Path:
    """Write crossing ranks and crossing distances of two types of module in two layers.

    The linear term distinguishes rows except by the law of A, and the distance distinguishes all.
    """
    folder = RunFolder.open("regime", {}, out=path)
    apart = {"adam": 0, "sgd": 50, "heldout": 0, "train": 9}
    rows = [
        dict.fromkeys(regime_tables.CROSSING_COLUMNS, 1.0)
        | {"module": f"model.layers.{layer}.{name}", "layer": layer, "optimizer": optimizer, "init": init}
        | {"split": split, "tokens": 64}
        | {"linear_term": 1.0 + 5 * layer + 2 * position + apart[optimizer] + apart[split]}
        for layer in (0, 1)
        for position, name in enumerate(("self_attn.q_proj", "mlp.down_proj"))
        for optimizer in ("sgd", "adam")
        for init in ("kaiming_uniform", "gaussian")
        for split in ("train", "heldout")
    ]  # fmt: skip
    folder.write_frame(frames.from_rows(rows, regime_tables.CROSSING_COLUMNS), regime_tables.CROSSINGS)
    rows = [
        row
        | {"rank": 8, "crossing_distance": row["linear_term"] * {"kaiming_uniform": 0.01, "gaussian": 7.0}[row["init"]]}
        for row in rows
        if row["optimizer"] == "adam"
    ]
    folder.write_frame(
        frames.from_rows(rows, regime_tables.CROSSING_DISTANCE_COLUMNS), regime_tables.CROSSING_DISTANCES
    )
    folder.finish()
    return folder.path
