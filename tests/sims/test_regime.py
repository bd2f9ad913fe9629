"""`python -m sims.regime` on a tiny checkpoint: figures, the judge, resuming by layer, bad input, figures drawn."""

import contextlib
import csv
import json
import math
import re
import shutil
from dataclasses import fields
from pathlib import Path

import jax
import numpy as np
import pandas as pd
import pytest
from support import checkpoint

from figures import regime as figure
from figures import style
from rora_theory import InputError, adapters, scaling_factor
from rora_theory.finetune import read_records, split_records, tokenize
from rora_theory.llama import load
from rora_theory.measure import record_batches, tokens, unseen
from rora_theory.measure.layers.model_layers import real_tokens, record
from rora_theory.measure.record_batches import PairConfig
from rora_theory.measure.regimes import tables as regime_tables
from rora_theory.measure.regimes import thin
from rora_theory.measure.regimes.module_regime import RegimeConfig
from rora_theory.measure.regimes.tables import JudgeConfig
from rora_theory.optimizers import scaling_power
from rora_theory.runs.reading import CELLS
from sims import regime
from sims.common import cli

SMALL = {
    "ranks": (1, 4, 16),
    "targets": ("q_proj", "down_proj"),
    "batch_size": 4,
    "held_out": 4,
    "tokens": 16,
    "rows": 4096,
}
PARTS = {"batches": PairConfig, "measured": RegimeConfig, "judged": JudgeConfig}


def config_of(**options) -> regime.Config:
    """The command's configuration, its own options and those of what is measured alike."""
    for part, kind in PARTS.items():
        own = [field.name for field in fields(kind) if field.name in options]
        options[part] = kind(**{name: options.pop(name) for name in own})
    return regime.Config(**options)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("inputs")
    data = checkpoint.records(folder / "train.json")
    return {"model": str(checkpoint.model(folder / "model")), "data": (str(data),)}


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("regime") / "run"
    regime.run(config_of(**inputs, **SMALL, out=out))
    return out


@pytest.mark.slow
def test_results(finished) -> None:
    """Every module, split, optimizer, init, rule and rank; measured under the first rule; others by gamma's power."""
    rows = rows_of(finished / "results.csv")
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
def test_crossings(finished) -> None:
    """The linear term carries the predictions from rank to rank, and r* is the definition's ratio."""
    rows = rows_of(finished / "results.csv")
    predicted = {
        tuple(row[k] for k in ("module", "split", "optimizer", "init", "rank")): float(row["predicted"])
        for row in rows
        if row["rule"] == "rora"
    }
    crossings = rows_of(finished / "crossing_ranks.csv")
    assert tuple(crossings[0]) == regime_tables.CROSSING_COLUMNS
    assert json.loads((finished / "manifest.json").read_text())["model_layers"] == 2  # by which a thin run is told
    assert len(crossings) == 2 * 2 * 2 * 2 * 2
    for row in crossings:
        key = tuple(row[k] for k in ("module", "split", "optimizer", "init"))
        power = scaling_power(row["optimizer"])
        # gamma^p of rora falls by 4^(-p/2) from rank 4 to 16, gaussian's deviation by 4^-p.
        strength = (4**-0.5 * (0.25 if row["init"] == "gaussian" else 1)) ** power
        c = float(row["linear_term"])
        expected = strength * math.sqrt(16 * (16 + c) / (4 * (4 + c)))
        assert predicted[*key, "16"] / predicted[*key, "4"] == pytest.approx(expected, rel=1e-6)
        ratio = float(row["cross_talk"]) / float(row["signal"])
        whole = ratio if row["optimizer"] == "sgd" else 1 + math.pi / 2 * ratio
        assert float(row["crossing_rank"]) == pytest.approx(whole, rel=1e-9)
        assert float(row["lower_quartile"]) <= float(row["median"]) <= float(row["upper_quartile"])


@pytest.mark.slow
def test_figures_are_of_the_batch_and_of_other_records(finished, inputs) -> None:
    """The batch is the records that were not held out; its gradient, and both splits' tokens, are in every figure."""
    model, records = load(inputs["model"]), read_records(inputs["data"])
    pair = record_batches.make_batch_pair(PairConfig(4, 4), records, model.tokenizer)
    rest, held_out = split_records(records, 4, 0)
    for part, own in ((pair.train, rest[:4]), (pair.held_out, held_out)):
        examples = tokenize(own, model.tokenizer)
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
    for row in rows_of(finished / "crossing_ranks.csv"):
        if (row["optimizer"], row["init"]) == ("sgd", "gaussian"):
            module, layer = row["module"].split(".", 3)[3], int(row["layer"])
            every = read[row["split"]].inputs[module][layer]
            masked = np.zeros(len(every), bool)
            if row["split"] == "heldout":
                masked = unseen.mark_seen(pair.held_out, [pair.train])[real_tokens(pair.held_out)]
                masked = masked | tokens.sinks(np.linalg.norm(every, axis=1))
            grad, x = read["train"].gradient(module, layer), every[tokens.sample(16, 0, masked)]
            expected = np.sum(np.float64(grad) ** 2) * np.mean(np.sum(np.float64(x) ** 2, axis=1))
            assert float(row["cross_talk"]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_verdict(finished) -> None:
    """The law holds: 96 comparisons at false alarm 0.01 in all, seeded; the mean over modules lies in its own error."""
    verdict = json.loads((finished / "verdict.json").read_text())
    assert (verdict["verdict"], verdict["comparisons"], verdict["outside"]) == ("holds", 96, 0)
    for row in rows_of(finished / "judge.csv"):
        assert abs(float(row["mean_ratio"]) - 1) < 5 * float(row["standard_error"])  # 24 means, false alarm 1e-5


@pytest.mark.slow
def test_the_judge_can_fail(finished) -> None:
    """A law that is wrong by a twentieth more than the error bar, in one figure, is found."""
    rows = [
        {k: float(v) if k in ("predicted", "measured", "standard_error") else v for k, v in row.items()}
        | {"adapters": int(row["adapters"])}
        for row in rows_of(finished / "results.csv")
        if row["measured"]
    ]
    verdict = regime_tables.judge_regime(pd.DataFrame(rows))
    bars = {int(count): bar for count, bar in verdict["error_bars_in_standard_errors"].items()}
    for factor, word in ((0.99, "holds"), (1.05, "fails")):
        row = max(rows, key=lambda row: row["standard_error"] / row["predicted"])
        allowed = max(0.02, bars[row["adapters"]] * row["standard_error"] / row["predicted"])
        changed = [
            other if other is not row else row | {"measured": row["predicted"] * (1 + factor * allowed)}
            for other in rows
        ]
        assert regime_tables.judge_regime(pd.DataFrame(changed))["verdict"] == word


@pytest.mark.slow
@pytest.mark.usefixtures("carried")
def test_an_interrupted_run_goes_on_to_the_same_bytes(inputs, finished, tmp_path) -> None:
    """The second layer is lost: of its line a part is there."""
    out = tmp_path / "run"
    out.mkdir()
    (out / "manifest.json").write_bytes((finished / "manifest.json").read_bytes())
    first, second = (finished / CELLS).read_text().splitlines(keepends=True)
    (out / CELLS).write_text(first + second[:-1])
    regime.run(config_of(**inputs, **SMALL, out=out))
    for name in ("results.csv", "crossing_ranks.csv", "takeover.csv", "tokens.csv", "judge.csv", "verdict.json"):
        assert (out / name).read_bytes() == (finished / name).read_bytes(), name


@pytest.mark.slow
def test_figures(finished, tmp_path) -> None:
    with figure.plt.rc_context(style.STYLE):
        paths = figure.draw(figure.Config(finished, out=tmp_path))
    names = ("regime_depth", "regime_takeover", "regime_rms")
    assert [path.name for path in paths] == [name + suffix for name in names for suffix in (".png", ".svg")]
    assert all(path.stat().st_size for path in paths)


@pytest.mark.slow
def test_no_path_in_the_files(finished, inputs) -> None:
    for path in finished.iterdir():
        text = path.read_text()
        assert str(Path(inputs["model"]).parent) not in text.replace(json.dumps(str(finished)), ""), path


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"ranks": (0,)}, "--ranks must be an integer of 1 or more, got 0"),
        ({"ranks": (4, 4)}, "--ranks must have different values, got 4 4"),
        ({"rules": ("lore",)}, "0.25, got 'lore'"),
        ({"rules": ("rora", 0.5)}, "--rules must have different rules, got one rule twice: rora 0.5"),
        ({"targets": ()}, "--targets must have 1 or more values, got 0"),
        ({"targets": ("q_proj", "q_proj")}, "--targets must have different values, got q_proj q_proj"),
        ({"held_out": 0}, "--held-out must be an integer of 1 or more, got 0"),
        ({"lr": 0.0}, "lr must be a finite number above 0, got 0.0"),
        ({"tolerance": -1.0}, "tolerance must be a finite number above 0, got -1.0"),
        ({"inits": ("pissa",)}, "inits has an unknown value 'pissa'"),
        ({"optimizers": ("lion",)}, "'lion'; supported: "),
        ({"rows": 32}, "rows must be 0 or at least 64"),
        ({"tokens": 0}, "tokens must be an integer of 1 or more, got 0"),
        ({"rows": 10**9}, "--rows must be at most 100,000,000, got 1000000000"),
        ({"layers": (-1,)}, "--layers must be an integer of 0 or more, got -1"),
        ({"false_alarm": 1.0}, "false_alarm must be between 0 and 1, got 1.0"),
        ({"targets": ("c_proj",)}, "target_modules has 'c_proj'"),
        ({"batch_size": 19}, "at least 23 records (--batch-size and --held-out), got 20"),
        ({"data": ("missing.json",)}, "missing.json: no such file"),
        ({"adapter": Path("missing")}, "--adapter must be the folder of an adapter in PEFT's format, got missing"),
    ],
)
def test_bad_input(inputs, tmp_path, capsys, changed, said) -> None:
    """One line, exit status 2, nothing written."""
    with pytest.raises(SystemExit) as stopped:
        cli.run(lambda: regime.run(config_of(**(inputs | SMALL | {"out": tmp_path / "run"} | changed))))
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_trained_adapter_is_measured_in_the_weights(inputs, finished, tmp_path) -> None:
    """As the model with it merged, to the byte; and elsewhere than before the training."""
    base, lora = load(inputs["model"]), adapters.LoraConfig(rank=2, alpha=4, rule="lora")
    fresh = adapters.init(jax.random.key(0), lora, base.config, base.params)
    trained = adapters.replace(fresh, jax.tree.map(lambda one: one + 0.1, fresh.params))
    adapters.save_peft(tmp_path / "adapter", trained)
    adapters.save_merged(tmp_path / "merged", trained, base)
    thin = SMALL | {"rows": 0, "layers": (1,)}
    cases = {
        "beside": inputs | {"adapter": tmp_path / "adapter"},
        "inside": inputs | {"model": str(tmp_path / "merged")},
    }
    tables = {}
    for name, one in cases.items():
        regime.run(config_of(**one, **thin, out=tmp_path / name))
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
def test_plain_text_is_read_a_line_a_record(inputs, tmp_path) -> None:
    random = np.random.default_rng(1)
    lines = [" ".join(random.choice(checkpoint.WORDS, 9)) for _ in range(12)]
    (tmp_path / "text.txt").write_text("\n".join(lines) + "\n")
    text = inputs | {"data": (str(tmp_path / "text.txt"),)}
    regime.run(config_of(**text, **SMALL | {"rows": 0, "layers": (1,)}, out=tmp_path / "run"))
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["config"]["template"] == "plain"
    counts = pd.read_csv(tmp_path / "run" / "tokens.csv").query("split == 'heldout'")
    assert (counts["seen"] < 4 * 3).all(), "no template: of each record the beginning token and a letter or two"


def test_held_out_text_that_is_all_masked_is_bad_input(inputs, tmp_path, capsys) -> None:
    """It tells nothing of other text: refused before the run, and no cell that failed."""
    (tmp_path / "same.json").write_text(json.dumps([{"instruction": "Say it.", "output": "It."}] * 8))
    own = inputs | SMALL | {"data": (str(tmp_path / "same.json"),), "out": tmp_path / "run"}
    with pytest.raises(SystemExit) as stopped:
        cli.run(lambda: regime.run(config_of(**own)))
    error = capsys.readouterr().err
    assert (stopped.value.code, error.count("\n")) == (2, 1)
    assert re.search(r"error: all \d+ held-out tokens .* or --no-mask", error)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_thin_run_says_so_in_its_manifest(finished) -> None:
    """Sixteen tokens a module are enough to tell a spread, which here is too wide; both layers are there."""
    words = json.loads((finished / "manifest.json").read_text())["warnings"]
    assert words == thin.regime_warnings(pd.read_csv(finished / "crossing_ranks.csv"), 2)


@pytest.mark.slow
def test_a_damaged_file_is_named(inputs, finished, tmp_path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    shutil.copytree(finished, out, dirs_exist_ok=True)
    for name, line in ((CELLS, "line 1 "), ("results.csv", ""), ("crossing_ranks.csv", "")):
        whole = (out / name).read_text()
        (out / name).write_text(whole.replace("kaiming_uniform", "gaussian", 1))
        with pytest.raises(InputError, match=f"{name}: {line}(was changed|is damaged or was changed) since"):
            regime.run(config_of(**inputs, **SMALL, out=out))
        with pytest.raises(SystemExit) if name != CELLS else contextlib.nullcontext():
            style.read_frame(out, "regime")
        (out / name).write_text(whole)
    (out / "results.csv").write_text("")
    (out / "results.csv").unlink()
    regime.run(config_of(**inputs, **SMALL, out=out))
    assert (out / "results.csv").read_bytes() == (finished / "results.csv").read_bytes()
