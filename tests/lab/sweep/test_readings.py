"""Readings of a run on the way: each is that of a run that ends there."""

from dataclasses import replace

import pandas as pd
import pytest
from support import checkpoint
from support.sweeps import sweep_plan

from rora_theory.lab.finetune import FinetuneConfig, StepCompleted
from rora_theory.lab.finetune.metrics import Metrics
from rora_theory.lab.llama import locate
from rora_theory.lab.sweep import change_parts
from rora_theory.lab.sweep.cell_trainer import CellTrainer
from rora_theory.lab.sweep.records import draw_records
from rora_theory.lab.sweep.runs import Reading, ReadRun

TRAINING = FinetuneConfig(
    rank=2, alpha=4, rule="lora", lr=1e-2, warmup=1, schedule="constant", dropout=0.0, batch_size=4, cutoff=400,
    widths=1, template="clean", held_out=0, seed=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def cell_trainer(tmp_path_factory) -> CellTrainer:
    data = checkpoint.two_files(tmp_path_factory.mktemp("data"))
    model = str(checkpoint.model(tmp_path_factory.mktemp("model")))
    records = draw_records([str(data / name / "train.json") for name in ("one", "two")], held_out=6, train_records=12)
    cell_trainer = CellTrainer(sweep_plan(TRAINING, records, {model: locate(model)}), measures_parts=True)
    cell_trainer.open(model)
    return cell_trainer


@pytest.fixture(scope="module")
def full_run(cell_trainer) -> ReadRun:
    """A run of five steps, read three times."""
    return cell_trainer.train(TRAINING, (2, 3, 5)).run


def assert_same_readings(run: ReadRun, expected: list[Reading]) -> None:
    assert [reading.step for reading in run.readings] == [reading.step for reading in expected]
    for reading, other in zip(run.readings, expected, strict=True):
        assert reading.losses == pytest.approx(other.losses, rel=1e-6)
        assert reading.answer_losses == pytest.approx(other.answer_losses, rel=1e-6)
        pd.testing.assert_frame_equal(pd.DataFrame(reading.parts), pd.DataFrame(other.parts), rtol=1e-5)


@pytest.mark.slow
def test_an_intermediate_reading_equals_that_of_a_shorter_run(cell_trainer, full_run) -> None:
    assert [reading.step for reading in full_run.readings] == [2, 3, 5]
    assert len(full_run.train_losses) == 5
    assert len({tuple(reading.losses) for reading in full_run.readings}) == 3
    short_run = cell_trainer.train(TRAINING, (3,)).run
    assert_same_readings(short_run, full_run.readings[1:2])
    assert short_run.train_losses == pytest.approx(full_run.train_losses[:3], rel=1e-6)
    first, _, last = (pd.DataFrame(reading.parts) for reading in full_run.readings)
    assert list(first) == ["layer", "module", *change_parts.PARTS]
    assert (first["A_part"] == 0).all(), "the first rate is 0, and while B = 0 A has no gradient"
    assert (first["B_part"] > 0).all()
    assert ((last["A_part"] > 0) & (last["A_part"] < last["B_part"])).all()
    tokens, answers = cell_trainer.count_tokens(next(iter(cell_trainer.plan.located)))
    assert len(tokens) == len(answers) == len(full_run.readings[0].losses) == 6
    assert all(0 < answer < count for count, answer in zip(tokens, answers, strict=True))


@pytest.mark.slow
def test_a_run_that_diverges_keeps_the_readings_before(cell_trainer, full_run, monkeypatch) -> None:
    read_out = CellTrainer._read_out

    def spoil(self, step, *model) -> Reading:
        reading = read_out(self, step, *model)
        return replace(reading, losses=[float("nan")] * len(reading.losses)) if step == 3 else reading

    monkeypatch.setattr(CellTrainer, "_read_out", spoil)
    run = cell_trainer.train(TRAINING, (2, 3)).run
    assert_same_readings(run, full_run.readings[:1])
    assert run.diverged_at == 3


@pytest.mark.slow
@pytest.mark.parametrize("interrupted_at", ["step 5", "reading"])
def test_a_long_run_resumes_from_its_checkpoint(cell_trainer, full_run, monkeypatch, tmp_path, interrupted_at) -> None:
    """Its losses include those of the steps before the interruption, and no step is repeated but those after 4."""
    plan = replace(cell_trainer.plan, training=replace(TRAINING, checkpoint_every=2))
    monkeypatch.setattr(cell_trainer, "plan", plan)
    add, read_out, steps = Metrics.add, CellTrainer._read_out, []

    def interrupt(metrics, event):
        if getattr(event, "step", 0) == 5 and isinstance(event, StepCompleted):
            raise KeyboardInterrupt
        add(metrics, event)

    def count(metrics, event):
        steps.append(event.step)
        add(metrics, event)

    def interrupt_reading(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        if interrupted_at == "reading":
            patched.setattr(CellTrainer, "_read_out", interrupt_reading)
        else:
            patched.setattr(Metrics, "add", interrupt)
        with pytest.raises(KeyboardInterrupt):
            cell_trainer.train(TRAINING, (5,), folder=tmp_path)
    monkeypatch.setattr(Metrics, "add", count)
    assert CellTrainer._read_out is read_out
    run = cell_trainer.train(TRAINING, (5,), folder=tmp_path).run
    assert_same_readings(run, full_run.readings[-1:])
    assert run.train_losses == pytest.approx(full_run.train_losses, rel=1e-6)
    assert steps == ([5, 5] if interrupted_at == "step 5" else [5])  # the step, and the pause for the reading
