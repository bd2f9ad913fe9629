"""Identity of a run: every setting that determines its results, and the content of its model, adapter and data.

Each command is stopped where it opens its folder; the configuration it opens with is its identity.
"""

import json
import os
import shutil
import sys
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

import jax
import pandas as pd
import pytest
from support.commands import work_of
from tyro.conf import Fixed

from rora_theory.errors import InputError
from rora_theory.lab import adapters, llama
from rora_theory.lab.evaluate.scoring import Scoring
from rora_theory.lab.finetune import FinetuneConfig
from rora_theory.lab.llama import hub, loading
from rora_theory.lab.pretrain import ModelShape, PretrainSettings
from rora_theory.lab.sweep.grid import SweepGrid
from rora_theory.measure.rank_check.rules import CheckConfig
from rora_theory.measure.regimes.module_regime import RegimeConfig
from rora_theory.runs.cluster import ClusterConfig
from rora_theory.runs.folder import RunFolder, path_of
from rora_theory.runs.lock import acquire
from rora_theory.runs.reading import as_json
from sims import (
    coordinate_check,
    evaluate,
    finetune,
    lr_transfer,
    pretrain,
    prune,
    regime,
    sweep,
    training_dynamics,
    transfer,
    variance_sweep,
)
from sims.common import inputs
from sims.common.record_batches import BatchConfig, PairConfig


class Opened(Exception):  # noqa: N818 (a way out, not an error)
    """Raised once a command has opened its folder."""

    def __init__(self, identity: Any, cells: Any = None, models: Any = ()) -> None:
        self.identity, self.cells = json.loads(json.dumps(as_json(identity))), cells
        self.models = [item.sha256 for item in models]


@pytest.fixture(autouse=True)
def _stop_at_the_folder(monkeypatch) -> None:
    def run_folder(_name: str, config: Any, *, models: Any = (), **_: Any) -> None:
        raise Opened(as_json(config), cells[-1] if cells else None, models)

    cells: list[Any] = []
    describe_models = sweep.describe_models

    def keep(actual: Any, *rest: Any) -> Any:
        cells.append(json.loads(json.dumps(as_json(actual))))
        return describe_models(actual, *rest)

    monkeypatch.setattr(RunFolder, "open", run_folder)
    monkeypatch.setattr(sweep, "describe_models", keep)
    monkeypatch.setattr(sweep.CellTrainer, "open", lambda *_: [])
    monkeypatch.setattr(sweep.CellTrainer, "count_tokens", lambda *_: ([], []))
    monkeypatch.setattr(sweep, "count_record_tokens", lambda *_: pd.DataFrame())


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory) -> Path:
    base = llama.load(model)
    settings = adapters.LoraConfig(rank=2, alpha=4.0, target_modules=("q_proj",))
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    adapters.save_peft(folder, settings.build(jax.random.key(0), base.config, base.params))
    return folder


def settings(name: str, model: object, data: Path) -> Any:
    """Return a command's configuration on the tiny model, or that of a simulation."""
    model = str(model)
    train = (str(data / "train.json"),)
    return {
        "regime": regime.RegimeOptions(train, model, batches=PairConfig(4, 4, 400), measured=RegimeConfig(rows=0)),
        "transfer": transfer.TransferOptions(2, 4, check_batch_size=4, check=(model, *train)),
        "coordinate_check": coordinate_check.CoordinateCheckOptions(
            train, model, check=CheckConfig(ranks=(2, 4)),
            records=BatchConfig(batch_size=2, held_out=6, cutoff=160, template="clean"),
        ),
        "finetune": finetune.FinetuneOptions(
            train, model, training=FinetuneConfig(rank=2, batch_size=8, held_out=4, warmup=4)
        ),
        "prune": prune.PruneOptions(train, model, share=0.85, windows=10, held_out=3, seq=32),
        "pretrain": pretrain.PretrainOptions(
            train, shape=ModelShape(1, 16, 24, 2, 16, 300), settings=PretrainSettings(6, 4, warmup=1, held_out=4)
        ),
        "evaluate": evaluate.EvaluateOptions(model, tasks=("piqa",), data_dir=str(data)),
        "sweep": sweep.SweepOptions(
            (*train, str(data / "other.json")), accuracy=True,
            grid=SweepGrid((model,), methods=("lora",), ranks=(2,), seeds=(0,)),
            training=sweep.Training(held_out=6, batch_size=8, warmup=1), tasks=("piqa",), data_dir=str(data),
        ),
        "lr_transfer": lr_transfer.LrTransferOptions(),
        "training_dynamics": training_dynamics.TrainingDynamicsOptions(),
        "variance_sweep": variance_sweep.VarianceSweepOptions(),
    }[name]  # fmt: skip


def start(name: str, config: Any) -> Opened:
    """Run a command until it opens its folder."""
    with pytest.raises(Opened) as caught:
        work_of(sys.modules[f"sims.{name}"])(config)
    return caught.value


WITH_A_MODEL = ("regime", "transfer", "coordinate_check", "finetune", "prune", "evaluate", "sweep")


@pytest.mark.parametrize("name", [name for name in WITH_A_MODEL if name != "sweep"])
def test_a_folder_in_use_is_refused_before_weights_are_read(name, model, data, tmp_path, monkeypatch) -> None:
    """Without --out too, the folder's name follows from the identity of the weights, not from their values."""
    monkeypatch.chdir(tmp_path)
    config = settings(name, model, data)
    path = path_of(name, start(name, config).identity)
    path.mkdir(parents=True)
    lock = acquire(path)

    def load(*_: Any) -> None:
        raise AssertionError("weights are read")

    monkeypatch.setattr(loading, "load_hf", load)
    monkeypatch.setattr(inputs, "load_model", load)
    with pytest.raises(InputError, match=rf"^{path}: is in use by process"):
        work_of(sys.modules[f"sims.{name}"])(config)
    os.close(lock)
    with pytest.raises(AssertionError, match="weights are read"):
        work_of(sys.modules[f"sims.{name}"])(config)


def flip(file: Path, at: int) -> None:
    """Change one byte of ``file`` in place, at the offset ``at``."""
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", WITH_A_MODEL)
def test_a_run_is_identified_by_the_content_of_its_inputs(name, model, data, tmp_path) -> None:
    """One bit of the last weight, a blank in the tokenizer, or a word of the last record makes another run.

    Another place of model and records is none.
    """
    model_copy, data_copy = tmp_path / "P1" / "hf", tmp_path / "data"
    shutil.copytree(model, model_copy)
    shutil.copytree(data, data_copy)
    config = settings(name, model_copy, data_copy)
    first = start(name, config)
    assert first.models == [llama.model_digest(model)], "the storage of the weights is recorded"
    flip(model_copy / "model.safetensors", -4)  # the lowest byte of the last float32
    weights = start(name, config)
    flip(model_copy / "model.safetensors", -4)
    assert first.identity.keys() == weights.identity.keys()
    differing = [key for key in first.identity if first.identity[key] != weights.identity[key]]
    assert differing == ["model_sha256"]
    if name != "sweep":  # whose folder may hold several models, told apart by their paths
        original = start(name, settings(name, model, data))
        assert original.identity == first.identity
        assert original.identity["model_sha256"] == llama.model_digest(model)
    with (model_copy / "tokenizer.json").open("a") as file:
        file.write(" ")
    tokenizer = start(name, config)
    file = data_copy / "piqa" / "test.json" if name == "evaluate" else data_copy / "train.json"
    rows = json.loads(file.read_text())
    rows[-1]["instruction"] = rows[-1]["instruction"].replace("is it", "was it")
    rows[-1]["output"] += "" if name == "evaluate" else "?"
    file.write_text(json.dumps(rows))
    records = start(name, config)
    identities = [item.identity for item in (first, weights, tokenizer, records)]
    assert [identities.count(identity) for identity in identities] == [1] * 4


@pytest.mark.parametrize("name", WITH_A_MODEL)
def test_a_moved_branch_is_another_run(name, model, data, monkeypatch) -> None:
    """The identity includes the commit, so that a new commit with the same files differs.

    The revision asked for is looked up once, and is itself no part of the run: two names of a commit are one.
    """
    actual: list[dict[str, Any]] = []
    revisions: list[str | None] = []
    config = settings(name, "org/tiny", data)
    for commit, revision in (("aaaa", "main"), ("bbbb", "main"), ("bbbb", "v2")):

        def download(
            repository: str, revision: str | None, *, commit: str = commit, **_: bool
        ) -> tuple[Path, str, str]:
            revisions.append(revision)
            return model, repository, commit

        monkeypatch.setattr(hub, "_download", download)
        named = replace(config, revision=revision) if name != "transfer" else config
        actual.append(start(name, named).identity)
    assert revisions == ([None] * 3 if name == "transfer" else ["main", "main", "v2"])
    if name != "sweep":
        assert actual[2] == actual[1]
    key, values = ("commits", [{"org/tiny": "aaaa"}, {"org/tiny": "bbbb"}])
    if name != "sweep":
        key, values = "commit", ["aaaa", "bbbb"]
        assert actual[0]["model"] == "org/tiny"
    assert [item[key] for item in actual[:2]] == values
    assert {name for name in actual[0] if actual[0][name] != actual[1][name]} == {key}


def test_an_adapter_is_identified_by_both_of_its_files(model, data, adapter, tmp_path) -> None:
    copy = Path(shutil.copytree(adapter, tmp_path / "adapter"))

    def identity(folder: Path | None) -> dict[str, Any]:
        return start("evaluate", replace(settings("evaluate", model, data), adapter=folder)).identity

    first = identity(copy)
    assert identity(adapter) == first, "the location of an adapter does not matter"
    flip(copy / "adapter_model.safetensors", -4)
    weights = identity(copy)
    flip(copy / "adapter_model.safetensors", -4)
    entries = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(entries | {"lora_alpha": 4}))
    assert len({item["adapter_sha256"] for item in (first, weights, identity(copy))}) == 3
    assert identity(None).get("adapter_sha256") is None


@pytest.mark.parametrize("name", ["evaluate", "sweep"])
def test_other_texts_of_a_protocol_are_another_run(name, model, data, monkeypatch) -> None:
    config = settings(name, model, data)
    actual = [start(name, config)]
    monkeypatch.setattr(Scoring, "texts", "another version")
    actual.append(start(name, config))
    assert actual[0].identity != actual[1].identity


OF_CHATS = {"chat_template", "chat_date"}
"""Settings that affect only the template ``chat``."""

NEUTRAL = {
    "regime": {*OF_CHATS, "show", "format", "fields"},
    "transfer": {"task_type", *OF_CHATS, "show", "format", "fields"},
    "coordinate_check": {*OF_CHATS, "show", "format", "fields"},
    "prune": {"batch_size", "format", "fields"},
    "pretrain": {"evaluate_every", "checkpoint_every", "format", "fields"},
    "evaluate": {"batch_size"},
    "sweep": {"checkpoint_every", "save_adapters", "score_batch_size", "format", "fields", "show", "parts"},
    "lr_transfer": {"judge"},  # chooses among losses that are all saved
}
"""Settings that change no result, or that enter the identity through the values derived from them."""

OF_A_CELL = {
    "methods", "ranks", "gains", "alpha", "lrs", "full_lrs", "read_at", "axes", "seeds",
}  # fmt: skip
"""Settings of sims.sweep that the cells of one folder may differ in."""

OTHER: dict[str, Any] = {
    "dtype": "bfloat16", "targets": ("q_proj",), "loss_on": "answer", "ranks": (2, 8), "rules": (0.3,), "rule": 0.3,
    "optimizers": ("sgd",), "optimizer": "sgd", "inits": ("gaussian",), "init": "gaussian", "template": "clean",
    "lrs": (0.1,), "reference_rank": 6,
    "model": ("mlp",), "starts": ("A",), "overlap": 0.5, "overlaps": (0.25,), "draws": 8,
    "format": "alpaca", "fields": {"input": "more"}, "chat_template": "chatml", "chat_date": "2026-01-31",
    "relative_error": 0.1, "sampler": "direct", "judge": "train", "noise": 0.2, "dropout": 0.1,
    "steps": 2, "schedule": "constant", "betas": (0.8, 0.9),
    "regime": {"layers": (0,), "rows": 4096},
    "transfer": {
        "regime": "cross-talk", "to_rule": "rora", "task_type": "SEQ_CLS", "to_alpha": 32.0, "alpha": 8.0,
        "seeds": (0, 3), "lr": 1e-3,
    },
    "coordinate_check": {"steps": (1, 3), "seeds": (0, 3), "batches": "fresh", "template": "train"},
    "finetune": {
        "batch_size": 32, "lr": 0.1, "rank_pattern": {"q_proj": 1},
        "alpha_pattern": {"q_proj": 1.0},
    },
    "prune": {"share": 0.9, "seq": 30},
    "pretrain": {"hidden_size": 32, "heads": 4, "context": 24, "accumulation": 2, "steps": 7, "batch_size": 5},
    "evaluate": {"tasks": ("boolq",), "protocol": "label", "template": "clean", "limit": 2},
    "sweep": {
        "methods": ("rora",), "ranks": (4,), "seeds": (1,),
        "gains": (4.0,), "full_lrs": (0.1,), "read_at": (2, 3), "axes": ("clip=2",),
        "train_records": 8, "limit": 2, "tasks": ("boolq",), "protocol": "harness",
        "eval_template": "eval", "quantization": "q8_0",
    },
    "lr_transfer": {
        "ranks": (4, 8), "teacher_rank": 2,
        "read_at": (7,), "methods": ("rora",), "seeds": (0, 3), "adam_lrs": (0.1, 0.2, 0.3), "sgd_lrs": (0.1, 0.2, 0.3),
    },
    "training_dynamics": {
        "ranks": (4, 8), "teacher_rank": 2, "read_at": (1, 3), "methods": ("rora",), "seeds": (0, 3),
        "adam_lrs": (0.1,), "sgd_lrs": (0.1,),
    },
}  # fmt: skip
"""Another value of a setting, of all commands or of one, where its negation or one more is none."""


def other(command: str, name: str, value: Any) -> Any:
    known = OTHER | OTHER.get(command, {})
    if name in known:
        return known[name]
    return not value if isinstance(value, bool) else value + 1


def changes(command: str, config: Any, skip: set[str]) -> dict[str, Any]:
    """Return the configuration with one setting changed, by the name of the setting."""
    actual, hints = {}, get_type_hints(type(config), include_extras=True)
    for field in fields(config):
        if Fixed in getattr(hints[field.name], "__metadata__", ()):  # no setting of this command
            continue
        value = getattr(config, field.name)
        if is_dataclass(value):
            inner = changes(command, value, skip)
            actual |= {name: replace(config, **{field.name: changed}) for name, changed in inner.items()}
        elif field.name not in skip:
            actual[field.name] = replace(config, **{field.name: other(command, field.name, value)})
    return actual


SKIPPED = {"data", "text", "model", "adapter", "revision", "check", "data_dir"}
SKIPPED |= {field.name for field in fields(ClusterConfig)}  # the files are the same: tests/runs/test_cluster.py
SKIPPED |= {"out", "devices", "list", "compare_to"}
"""Inputs, which the other tests change; where results go and are computed; and options of a command's other modes."""

OF_TRANSFER = {
    "from_", "write", "steps", "to_steps", "schedule", "to_schedule", "batch_size", "to_batch_size",
    "displacement_constant", "split", "per",
}  # fmt: skip
"""Settings of sims.transfer that are given with others, or do not change a first step."""


def check_settings(name: str, config: Any, skipped: set[str]) -> None:
    """Check that exactly the neutral settings leave a command's identity unchanged."""
    before = start(name, config)
    same, in_cells = set(), set()
    for setting, changed in changes(name, config, skipped).items():
        after = start(name, changed)
        if after.identity == before.identity:
            (same if after.cells == before.cells else in_cells).add(setting)
    assert same == NEUTRAL.get(name, set())
    assert in_cells == (OF_A_CELL if name == "sweep" else set())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["regime", "transfer", "coordinate_check", "prune", "pretrain", "evaluate", "sweep"])
def test_every_setting_that_changes_a_result_is_in_the_identity(name, model, data) -> None:
    # The regime of a sweep enters its analysis alone.
    skipped = {"transfer": OF_TRANSFER, "sweep": {"regime"}}.get(name, set())
    check_settings(name, settings(name, model, data), SKIPPED | skipped)


@pytest.mark.parametrize("name", ["lr_transfer", "training_dynamics", "variance_sweep"])
def test_every_setting_of_a_simulation_is_in_its_identity(name, model, data) -> None:
    """Only the output folder and the devices are excluded."""
    config = settings(name, model, data)
    check_settings(name, config, SKIPPED - {"model"})
    elsewhere = {"devices": 1} if name == "variance_sweep" else {}
    changed = replace(config, out=Path("elsewhere"), **elsewhere)
    assert start(name, changed).identity == start(name, config).identity


@pytest.mark.slow
def test_every_setting_of_a_fine_tuning_run_is_in_its_identity(model, data) -> None:
    """The identity of each method has all settings except those of other methods."""
    config = settings("finetune", model, data)
    ranked = {"rule", "rank", "alpha", "rank_pattern", "alpha_pattern", "init", "lr_multiplier_A"}
    for method, similar_method, size, missing in (
        ("lora", "dora", {"rank": 2}, {"virtual_tokens", "bottleneck"}),
        ("series", "parallel", {"bottleneck": 4}, {"virtual_tokens", *ranked}),
    ):
        training = FinetuneConfig(method=method, batch_size=16, held_out=4, warmup=1, dropout=0.0, **size)
        before = start("finetune", replace(config, training=training)).identity
        assert missing.isdisjoint(before)
        # This model's weights cannot be in blocks; `test_finetune` changes the quantization of one that can.
        assert "quantization" in before
        changed = changes("finetune", training, {"method", "quantization", *missing})
        for name, other_training in (changed | {"method": replace(training, method=similar_method)}).items():
            after = start("finetune", replace(config, training=other_training)).identity
            assert after != before, (method, name)
    for name, value in (("keep", "last"), ("merge", True)):
        changed = replace(config, output=replace(config.output, **{name: value}))
        assert start("finetune", changed).identity == start("finetune", config).identity
