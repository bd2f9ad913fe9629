"""The check as a command on a tiny checkpoint: rows, slopes, controls, resuming, the figure."""

import json
from pathlib import Path

import pytest
from support import checkpoint, commands, drawings

from figures import coordinate_check as figure
from rora_theory.measure.rank_check import rules as rank_check
from rora_theory.runs import frames
from sims import coordinate_check as sim

ARGUMENTS = (
    "--ranks 2 4 16 --rules lora --optimizers adamw --targets q_proj down_proj --steps 1 2 "
    "--seeds 0 1 2 3 4 5 6 7 --batch-size 2 --held-out 6 --cutoff 160 --template clean --adam-lr 1e-5 --band 0.4"
)


@pytest.fixture(scope="module")
def words(data, tmp_path_factory) -> list[str]:
    """Return the command line; all tokens of the model are single bytes.

    With so many tokens the signal dominates enough for alpha / r to be flat in this band.
    """
    bytes_alone = checkpoint.model(tmp_path_factory.mktemp("bytes"), words=())
    return ["--data", str(data / "train.json"), "--model", str(bytes_alone), ARGUMENTS]


@pytest.fixture(scope="module")
def finished(words, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("check") / "run"
    commands.output(commands.run_command(sim.main, *words, "--out", out))
    return out


def verdict(finished, **values):
    slopes = frames.read_csv(finished / "slopes.csv", rank_check.SLOPE_COLUMNS)
    (row,) = slopes[(slopes[list(values)] == list(values.values())).all(axis=1)].to_dict("records")
    return row["slope"], row["verdict"]


@pytest.mark.slow
def test_rules_and_controls(finished):
    """Under AdamW alpha/r is flat at the first step; kappa = 0 grows by one power more, and gaussian A shrinks."""
    values = {"split": "train", "step": 1, "quantity": "output"}
    for module in ("self_attn.q_proj", "mlp.down_proj", "model"):
        slope, judged = verdict(finished, rule="lora", init="kaiming_uniform", module=module, **values)
        assert judged == "flat"
        unscaled, judged = verdict(finished, rule="0", module=module, **values)
        assert judged == "grows"
        assert unscaled - slope == pytest.approx(1, abs=0.02)  # gamma enters the first Adam step once
        assert verdict(finished, init="gaussian", module=module, **values)[1] == "shrinks"


@pytest.mark.slow
def test_rows(finished, words):
    sizes = frames.read_csv(finished / "results.csv", rank_check.COLUMNS)
    # On each of two splits: the outputs of 2 modules, hidden states, logits and the loss of the model.
    assert len(sizes) == 3 * 8 * 3 * 2 * 2 * (2 + 3)
    assert set(sizes["control"][(sizes["rule"] == "0") | (sizes["init"] == "gaussian")]) == {1}
    assert sizes["scaling"].to_numpy() == pytest.approx(2 * (8 / sizes["rank"]) ** sizes["kappa"])
    config = json.loads((finished / "manifest.json").read_text())["config"]
    model = Path(words[words.index("--model") + 1])
    assert (config["model"], config["batches"]) == (model.name, "fixed")
    assert str(model.parent) not in json.dumps(config)


@pytest.mark.slow
@pytest.mark.usefixtures("pickled_work")
def test_an_interrupted_run_resumes(finished, words, tmp_path):
    commands.check_resumption(sim.main, words, finished, tmp_path / "run")


@pytest.mark.slow
def test_figures(finished):
    assert drawings.names(figure, finished) == {"coordinate_check", "coordinate_check_slopes"}
