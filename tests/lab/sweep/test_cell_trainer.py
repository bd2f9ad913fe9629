"""A cell's work on a tiny checkpoint: a seed's methods start alike, and every measurement is of the adapted model."""

import dataclasses
import itertools
import json
from functools import partial

import jax
import numpy as np
import pytest
from support import chat_templates, checkpoint, tiny
from support.sweeps import sweep_plan

from rora_theory.errors import InputError
from rora_theory.lab import llama
from rora_theory.lab.adapters import LoraConfig, PrefixConfig
from rora_theory.lab.data.prompt_preview import preview_prompt
from rora_theory.lab.data.records import DataConfig
from rora_theory.lab.data.sources import read_tasks
from rora_theory.lab.evaluate import scoring
from rora_theory.lab.evaluate.scoring import Scoring, score
from rora_theory.lab.finetune import FinetuneConfig
from rora_theory.lab.finetune.held_out import record_losses
from rora_theory.lab.llama import locate
from rora_theory.lab.llama.quantised import QuantisedWeight
from rora_theory.lab.sweep.cell_trainer import CellTrainer, EvaluatedCell
from rora_theory.lab.sweep.grid import SweepCell
from rora_theory.lab.sweep.records import draw_records
from rora_theory.lab.sweep.runs import Reading, ReadRun

SHARED = FinetuneConfig(batch_size=4, cutoff=400, widths=1, template="clean", held_out=0)


@pytest.fixture(scope="module")
def cell_trainer(tmp_path_factory) -> CellTrainer:
    """Return the tiny checkpoint in memory, as a sweep holds it."""
    data = checkpoint.two_files(tmp_path_factory.mktemp("data"))
    for task, labels in (("boolq", ("true", "false")), ("piqa", ("solution1", "solution2"))):
        checkpoint.questions(data, task, labels)
    model = str(checkpoint.model(tmp_path_factory.mktemp("model")))
    records = draw_records([str(data / name / "train.json") for name in ("one", "two")], held_out=6, train_records=12)
    tasks, _ = read_tasks(str(data), ("boolq", "piqa"), None)
    cell_trainer = CellTrainer(sweep_plan(SHARED, records, {model: locate(model)}, tasks=tasks))
    assert cell_trainer.open(model) == []
    return cell_trainer


def test_methods_of_a_seed_share_init_and_order_and_seeds_do_not(cell_trainer) -> None:
    def begin(method: str, rank: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        adapter, batches = cell_trainer.begin(SweepCell("m", method, rank, 64.0, 1e-3, seed, (9,)).training(SHARED))
        return np.asarray(adapter.params["mlp.up_proj"]["lora_A"]), np.stack(
            [b.inputs for b in map(batches.__getitem__, range(3))]
        )

    first = begin("lora", 4, 0)
    for method in ("rora", "dora", "quarter", "dora-rora"):
        for ours, theirs in zip(first, begin(method, 4, 0), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(first[1], begin("lora", 2, 0)[1])
    drawn = [first, begin("lora", 4, 1), begin("lora", 4, 2)]
    for (first_A, first_order), (second_A, second_order) in itertools.combinations(drawn, 2):
        assert not np.any(first_A == second_A)
        assert not np.array_equal(first_order, second_order)
    assert len({np.unique(order.reshape(12, -1), axis=0).tobytes() for _, order in drawn}) == 1, "the same records"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "prefix"])
def test_the_adapted_model_is_scored(cell_trainer, kind, tmp_path, monkeypatch) -> None:
    """Every measurement includes the adapter, merged or beside the weights."""
    settings, size = {"lora": (LoraConfig(rank=2, alpha=4.0), 1.0), "prefix": (PrefixConfig(3), 30.0)}[kind]
    fresh = settings.build(jax.random.key(0), cell_trainer.model.config, cell_trainer.model.params)
    adapter = fresh.replace(
        jax.tree.map(lambda a: a + size * jax.random.normal(jax.random.key(1), a.shape), fresh.params)
    )
    read = Reading(1, [1.0], [1.0])
    monkeypatch.setattr(cell_trainer, "train", lambda *_: EvaluatedCell(ReadRun([2.0], [read]), {}, adapter))
    scored_models = []

    def scored(params, config, tokenizer, items, settings, **options):
        assert settings == cell_trainer.plan.scoring
        scored_models.append((params, options["adapter"]))
        return score(params, config, tokenizer, items, settings, **options)

    monkeypatch.setattr(scoring, "score", scored)
    (model,) = cell_trainer.plan.located
    rank, alpha = (2, 4.0) if kind == "lora" else (None, None)
    cell = SweepCell(model, kind, rank, alpha, 1e-3, 0, (1,), evaluation={})
    assert len(cell_trainer.evaluate_cell(cell, tmp_path).samples) == len(cell_trainer.plan.tasks["boolq"]) + len(
        cell_trainer.plan.tasks["piqa"]
    )
    base = cell_trainer.model.params
    for params, unmerged in scored_models:
        assert unmerged is (adapter if kind == "prefix" else None)
        if kind == "lora":
            jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6), params, adapter.merge(base))
    assert len(scored_models) == 2, "tasks"
    losses = cell_trainer._read_out(1, *cell_trainer._merged(adapter)).losses
    expected = record_losses(base, cell_trainer.model.config, cell_trainer.held_out, adapter=adapter)
    assert losses == pytest.approx([record.loss for record in expected], rel=1e-4)
    plain = record_losses(base, cell_trainer.model.config, cell_trainer.held_out)
    assert abs(sum(record.loss for record in plain) / sum(losses) - 1) > 1e-3


def test_the_base_has_the_storage_of_the_settings(cell_trainer, tmp_path, monkeypatch) -> None:
    """A sweep or horizon with ``--quantization`` trains on rounded weights, not on those of the file."""
    monkeypatch.setattr(checkpoint, "CONFIG", tiny.WIDE)
    model = str(checkpoint.model(tmp_path))
    shared = dataclasses.replace(SHARED, quantization="q4_0")
    rounded = CellTrainer(sweep_plan(shared, cell_trainer.plan.records, {model: locate(model)}))
    rounded.open(model)
    weight = rounded.model.params["layers"]["mlp.up_proj"]["weight"]
    assert isinstance(weight, QuantisedWeight)
    assert weight.kind == "q4_0"
    exact = llama.load(model).params["layers"]["mlp.up_proj"]["weight"]
    error = np.linalg.norm(weight.dense() - exact) / np.linalg.norm(exact)
    assert 0.02 < error < 0.2, "4 bits round by a few per cent"


def test_another_machine_finds_a_model_that_it_lacks_by_its_name(cell_trainer, tmp_path, monkeypatch) -> None:
    """The unpickled trainer has no model; its files are looked up by hub id and commit if the path is not there."""
    (here,) = cell_trainer.plan.located.values()
    away = dataclasses.replace(here, name="me/model", path=tmp_path / "elsewhere", repository="me/model", commit="c")
    make, arguments = cell_trainer.__reduce__()
    trainer = make(dataclasses.replace(*arguments, located={"me/model": away}))
    asked = []
    monkeypatch.setattr(llama, "locate", lambda *name_and_commit: asked.append(name_and_commit) or here)
    assert trainer.open("me/model") == []
    assert set(asked) == {("me/model", "c")}
    asked.clear()
    make(*arguments).open(here.name)
    assert not asked


def test_a_held_out_record_longer_than_the_context_is_refused(cell_trainer, tmp_path) -> None:
    """Losses are over whole records, so none is cut within its answer."""
    rows = [{"instruction": word, "output": "a" * 600} for word in checkpoint.WORDS[:6]]
    (tmp_path / "long.json").write_text(json.dumps(rows))
    records = draw_records([str(tmp_path / "long.json")], held_out=2)
    longer = CellTrainer(sweep_plan(SHARED, records, cell_trainer.plan.located))
    with pytest.raises(InputError, match=r"held-out records .* 512 tokens"):
        longer.open(*cell_trainer.plan.located)


def test_chats_are_rendered_by_the_models_template(tmp_path, monkeypatch) -> None:
    """A template that needs the date is refused without one, as cells of one folder run on many days."""
    model = checkpoint.model(tmp_path)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    chats = [
        {"conversations": [{"from": "human", "value": word}, {"from": "gpt", "value": "yes"}]}
        for word in checkpoint.WORDS[:6]
    ]
    (tmp_path / "chats.json").write_text(json.dumps(chats))

    def open_bench(template: str, **config: str) -> CellTrainer:
        (model / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
        records = draw_records([str(tmp_path / "chats.json")], held_out=2, config=DataConfig(**config))
        shared = FinetuneConfig(loss_on="answer", held_out=2, batch_size=4)
        cell_trainer = CellTrainer(
            sweep_plan(shared, records, {"model": locate(model)}, scoring=Scoring("label", None))
        )
        cell_trainer.open("model")
        return cell_trainer

    cell_trainer = open_bench(chat_templates.LLAMA3)
    for examples, count in ((cell_trainer.train_examples, 4), (cell_trainer.held_out, 2)):
        prompts = [preview_prompt(examples, index, cell_trainer.model.tokenizer) for index in range(len(examples))]
        ending = "assistant<|end_header_id|>\n\n⟦yes<|eot_id|>⟧"
        assert [prompt.endswith(ending) for prompt in prompts] == [True] * count
    with pytest.raises(InputError, match="chat_date"):
        open_bench(chat_templates.DATED)
    cell_trainer = open_bench(chat_templates.DATED, chat_date="2026-01-31")
    first_prompt = preview_prompt(cell_trainer.train_examples, 0, cell_trainer.model.tokenizer)
    assert first_prompt.startswith("31 Jan 2026<user>")
    monkeypatch.setattr(llama, "load", lambda *_: pytest.fail("weights are read before the chats are rendered"))
    with pytest.raises(InputError, match=r"4 of 4 records .*\(1\) \S*chats\.json: record \d: .*\(4\) "):
        open_bench("{{ raise_exception('no') }}")
