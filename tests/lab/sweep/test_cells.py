"""Grids and their cells: alpha, rule and rate vary separately; the files of options have the paper's cells."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.sweeps import sweep_plan

from rora_theory.errors import InputError
from rora_theory.lab.finetune import FinetuneConfig
from rora_theory.lab.sweep.cells import cells_of
from rora_theory.lab.sweep.grid import SweepCell, SweepGrid
from rora_theory.runs.reading import key_of
from sims.common import cli
from sims.sweep import SweepOptions, Training

SHARED = FinetuneConfig()
CONFIGS = Path(__file__).parents[3] / "configs"


def cells(grid: SweepGrid) -> list[SweepCell]:
    return cells_of(grid, SHARED, train_records=1600, evaluation={"protocol": "label"})


def configured(name: str) -> SweepOptions:
    """Return the options of a file in the folder ``configs``."""
    return cli.parse(SweepOptions, ["--config", str(CONFIGS / f"{name}.yaml"), "--data", "x.json"], description="")


def test_a_rule_changes_gamma_alone() -> None:
    fixed = [cell for cell in cells(SweepGrid()) if cell.rank]
    assert {cell.alpha for cell in fixed} == {64.0}
    assert {cell.gamma for cell in fixed if cell.method == "lora"} == {16.0, 8.0, 4.0, 2.0, 1.0, 0.5}
    assert {cell.gamma for cell in fixed if cell.method == "rora" and cell.rank == 64} == {8.0}


def test_the_paper_s_configurations_have_its_cells() -> None:
    table = cells(configured("table1").grid)
    llama = [(c.method, c.rank, c.rate) for c in table if c.model == "yahma/llama-7b-hf" and c.rank != 128]
    assert llama == [
        ("base", None, None), ("prefix", None, 3e-2), ("series", None, 3e-4), ("parallel", None, 3e-4),
        ("lora", 32, 3e-4), ("dora", 32, 2e-4), ("rora", 32, 3e-4),
    ]  # fmt: skip
    assert {c.rate for c in table if c.method == "dora" and "Llama-3" in c.model} == {1e-4}
    dropouts = {c.method: c.training(SHARED).dropout for c in table if c.method != "base"}
    assert dropouts == dict.fromkeys(("lora", "dora", "rora"), 0.05) | dict.fromkeys(
        ("prefix", "series", "parallel"), 0.0
    )
    assert {c.read_at for c in table if c.method != "base"} == {(300,)}, "three epochs of 1600 records in batches of 16"
    assert len({key_of(cell) for cell in table}) == len(table) == 4 * 10
    assert {cell.rank for cell in cells(configured("fig1").grid)} == {None, 4, 8, 16, 32, 64, 128, 256}
    assert {cell.rank for cell in cells(configured("table2").grid)} == {None, 8, 16, 32, 64, 128}
    assert {(c.method, c.rank) for c in cells(configured("fig3").grid)} == {(m, 128) for m in ("lora", "dora", "rora")}
    for name in ("table1", "table2", "fig1", "fig3"):
        options = configured(name)
        assert (options.training.dtype, options.protocol, options.grid.seeds) == ("bfloat16", "generate", (42,))


def test_every_file_of_options_is_one() -> None:
    names = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    assert names == ["fig1", "fig3", "horizon", "table1", "table2"]
    horizon = configured("horizon")
    assert (horizon.training.batch_size, horizon.training.schedule, horizon.parts) == (4, "constant", True)
    assert (horizon.grid.gains, horizon.grid.lrs) == ((64.0, 724.0), (3e-4, 1e-3, 3e-3))


def test_settings_of_methods_with_a_rank_do_not_affect_other_methods() -> None:
    """These are alpha, targets and dropout; all other settings apply to every run."""
    shared = FinetuneConfig(alpha=16.0, targets=("q_proj",), dropout=0.2, cutoff=99, epochs=2, remat="mlp")
    for method, rank in (("lora", 4), ("dora", 4), ("series", None), ("prefix", None)):
        cell = SweepCell("m", method, rank, None if rank is None else shared.alpha, 1e-3, 7, (9,))
        config = cell.training(shared)
        of_rank = (16.0, ("q_proj",), 0.2) if rank else (FinetuneConfig.alpha, None, 0.0)
        assert (config.alpha, config.targets, config.dropout) == of_rank
        assert (config.method, config.cutoff, config.steps, config.remat) == (method, 99, 9, "mlp")
        assert (config.lr, config.seed) == (1e-3, 7)
    with pytest.raises(InputError, match=r"rank .*\b0\b"):
        SweepCell("m", "lora", 0, 16.0, 1e-3, 7, (9,)).training(shared)


def test_gains_read_outs_and_further_axes() -> None:
    """G is alpha under alpha / r. A rate that decays needs a run for each number of steps."""
    design = SweepGrid(
        methods=("lora",), ranks=(8,), gains=(64.0, 724.0), lrs=(1e-3,), full_lrs=(1e-5,), seeds=(0,),
        read_at=(16, 64), axes=("schedule=constant,cosine", "batch_size=4,32"),
    )  # fmt: skip
    shared = replace(SHARED, schedule="constant", warmup=4, batch_size=4)
    made = cells_of(design, shared, train_records=1600)
    assert {(c.alpha, c.gamma) for c in made if c.rank} == {(64.0, 8.0), (724.0, 90.5)}
    assert {(c.method, c.rate) for c in made} == {("lora", 1e-3), ("full", 1e-5)}
    runs = {(c.axes.get("schedule"), c.axes.get("batch_size"), c.read_at) for c in made}
    assert runs == {(None, size, (16, 64)) for size in (None, 32)} | {
        ("cosine", size, (step,)) for size in (None, 32) for step in (16, 64)
    }
    training = next(c for c in made if c.axes == {"schedule": "cosine", "batch_size": 32}).training(shared)
    assert (training.schedule, training.batch_size, training.steps) == ("cosine", 32, 16)
    assert len({key_of(c) for c in made}) == len(made) == 2 * 3 * 3
    with pytest.raises(InputError, match=r"gains .*RoRA"):
        replace(design, methods=("rora",))
    assert replace(design, axes=("weight_decay=1e-2,0",)).variants() == [{"weight_decay": 0.01}, {"weight_decay": 0}]
    wrong = ("depth=3", "'depth'"), ("schedule=", "'schedule='"), ("batch_size=4,4", "'batch_size=4,4'")
    for axis, message in (*wrong, ("clip=[1", r"'clip=\[1': is not YAML")):
        with pytest.raises(InputError, match=f"axes .*{message}"):
            replace(design, axes=(axis,))


@pytest.mark.parametrize(
    ("read_at", "warmup", "message"), [((1, 2), 4, "read_at .* 4.* 1$"), ((16, 64), 64, "64, got 64")]
)
def test_a_warm_up_leaves_steps_to_read(read_at, warmup, message) -> None:
    design = SweepGrid(methods=("lora",), ranks=(8,), read_at=read_at)
    with pytest.raises(InputError, match=message):
        cells_of(design, replace(SHARED, schedule="constant", warmup=warmup), train_records=1600)


@pytest.mark.usefixtures("unchecked")
def test_a_sweep_is_identified_by_its_shared_settings() -> None:
    """Defaults are included; two values of one setting give identities that differ in it alone."""
    records = SimpleNamespace(summary={})
    for config in (FinetuneConfig, Training):
        settings = [
            sweep_plan(config(quantization=kind), records, {}).identity()["settings"] for kind in ("none", "q8_0")
        ]
        assert settings[0]["quantization"] == "none"
        assert settings[1] == settings[0] | {"quantization": "q8_0"}
