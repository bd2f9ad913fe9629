"""`python -m sims.regime` on a tiny checkpoint: results, the verdict, resumption by layer, figures."""

import json
from pathlib import Path

import jax
import numpy as np
import pandas as pd
import pytest
from support import checkpoint, commands, drawings

from figures import regime as figure
from rora_theory import scaling_factor
from rora_theory.lab import adapters
from rora_theory.lab.finetune import read_records, split_records, tokenize
from rora_theory.lab.llama import load
from rora_theory.measure import record_batches
from rora_theory.measure.layers.model_layers import record
from rora_theory.measure.record_batches import PairConfig
from rora_theory.measure.regimes import tables as regime_tables
from rora_theory.measure.regimes import thin
from sims import regime

ARGUMENTS = "--ranks 1 4 16 --targets q_proj down_proj --batch-size 4 --held-out 4 --tokens 16 --rows 4096"
THIN = f"{ARGUMENTS} --rows 0 --layers 1"


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> str:
    return str(checkpoint.records(tmp_path_factory.mktemp("records") / "train.json"))


@pytest.fixture(scope="module")
def inputs(model, records) -> list[str]:
    """Return the options with the model and the data."""
    return ["--model", str(model), "--data", records]


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("regime") / "run"
    commands.output(commands.run(regime.main, *inputs, ARGUMENTS, "--out", out))
    return out


@pytest.mark.slow
def test_results(finished) -> None:
    """There is a row for every module, split, optimizer, init, rule and rank, measured under the first rule; gamma's
    power gives the others.
    """
    rows = commands.rows(finished / "results.csv")
    assert len(rows) == 2 * 2 * 2 * 2 * 2 * 3 * 3
    assert {row["module"] for row in rows} == {
        f"model.layers.{layer}.{name}" for layer in (0, 1) for name in ("self_attn.q_proj", "mlp.down_proj")
    }
    by_key = {tuple(row[k] for k in ("module", "split", "optimizer", "init", "rank", "rule")): row for row in rows}
    for (*key, rank, rule), row in by_key.items():
        assert bool(row["measured"]) == (rule == "lora")
        kappa = "lora" if rule == "lora" else float(row["kappa"])
        assert float(row["scaling"]) == pytest.approx(scaling_factor(kappa, alpha=16, rank=int(rank)), rel=1e-12)
        ratio = float(row["scaling"]) / float(by_key[*key, rank, "lora"]["scaling"])
        power = 2 if key[2] == "sgd" else 1
        expected = float(by_key[*key, rank, "lora"]["predicted"]) * ratio**power
        assert float(row["predicted"]) == pytest.approx(expected, rel=1e-3)  # Adam's epsilon, under lora alone


@pytest.mark.slow
def test_losses_are_of_the_batch_and_of_other_records(finished, model, records) -> None:
    """The batch has the records that were not held out; the library's tests check given batches."""
    model, all_records = load(model), read_records([records])
    pair = record_batches.make_batch_pair(PairConfig(4, 4), all_records, model.tokenizer)
    rest, held_out = split_records(all_records, 4, 0)
    for part, part_records in ((pair.train, rest[:4]), (pair.held_out, held_out)):
        examples = tokenize(part_records, model.tokenizer)
        assert [row[:n].tolist() for row, n in zip(part.inputs, examples.input_lengths, strict=True)] == [
            examples[i][:-1].tolist() for i in range(4)
        ]
    names = ("self_attn.q_proj", "mlp.down_proj")
    read = {
        "train": record(model.params, model.config, pair.train, names),
        "heldout": record(model.params, model.config, pair.held_out, names, gradients=False),
    }
    manifest = json.loads((finished / "manifest.json").read_text())
    assert manifest["training_loss"] == pytest.approx(read["train"].loss, rel=1e-6)
    assert manifest["heldout_loss"] == pytest.approx(read["heldout"].loss, rel=1e-6)
    assert read["train"].loss != pytest.approx(read["heldout"].loss, rel=1e-3)


@pytest.mark.slow
def test_verdict(finished) -> None:
    """The law holds: 96 comparisons have a total false-alarm rate of 0.01 with a fixed seed, and the mean over
    modules is within its error.
    """
    verdict = json.loads((finished / "verdict.json").read_text())
    assert (verdict["verdict"], verdict["comparisons"], verdict["outside"]) == ("holds", 96, 0)
    for row in commands.rows(finished / "judge.csv"):
        assert abs(float(row["mean_ratio"]) - 1) < 5 * float(row["standard_error"])  # 24 means, false alarm 1e-5


@pytest.mark.slow
@pytest.mark.usefixtures("carried")
def test_a_resumed_run_writes_the_bytes_of_an_uninterrupted_one(inputs, finished, tmp_path) -> None:
    commands.check_resumption(regime.main, [*inputs, ARGUMENTS], finished, tmp_path / "run")


@pytest.mark.slow
def test_figures(finished) -> None:
    assert drawings.names(figure, finished) == {"regime_depth", "regime_takeover", "regime_rms"}


@pytest.mark.slow
def test_a_trained_adapter_is_measured_in_the_weights(inputs, model, records, finished, tmp_path) -> None:
    """The model with the merged adapter gives the same files, and other figures than before training."""
    base, lora = load(model), adapters.LoraConfig(rank=2, alpha=4, rule="lora")
    fresh = adapters.init(jax.random.key(0), lora, base.config, base.params)
    trained = adapters.replace(fresh, jax.tree.map(lambda leaf: leaf + 0.1, fresh.params))
    adapters.save_peft(tmp_path / "adapter", trained)
    adapters.save_merged(tmp_path / "merged", trained, base)
    tables = {}
    for name, words in {
        "beside": [*inputs, "--adapter", tmp_path / "adapter"],
        "inside": ["--model", tmp_path / "merged", "--data", records],
    }.items():
        commands.output(commands.run(regime.main, *words, THIN, "--out", tmp_path / name))
        tables[name] = [(tmp_path / name / file).read_bytes() for file in (regime_tables.CROSSINGS, "takeover.csv")]
    assert tables["beside"] == tables["inside"]
    ranks = [
        pd.read_csv(folder / regime_tables.CROSSINGS).query("layer == 1")["crossing_rank"].to_numpy()
        for folder in (tmp_path / "beside", finished)
    ]
    assert (np.abs(ranks[0] / ranks[1] - 1) > 1e-3).all()
    manifest = json.loads((tmp_path / "beside" / "manifest.json").read_text())
    assert manifest["config"]["adapter_sha256"] == adapters.adapter_digest(tmp_path / "adapter")


@pytest.mark.slow
def test_a_thin_run_warns_and_no_path_is_in_its_files(finished, model) -> None:
    """Sixteen tokens per module suffice to measure a spread, which is too wide here; both layers are listed."""
    manifest = json.loads((finished / "manifest.json").read_text())
    assert manifest["warnings"] == thin.regime_warnings(pd.read_csv(finished / "crossing_ranks.csv"), 2)
    assert manifest["model_layers"] == 2
    for path in finished.iterdir():
        assert str(model.parent) not in path.read_text().replace(json.dumps(str(finished)), ""), path
