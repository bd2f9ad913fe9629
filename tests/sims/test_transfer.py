"""`python -m sims.transfer`: tables and snippet, a measured regime, the check on a model, bad input."""

import csv
import json
import re
from pathlib import Path

import pytest
from support import checkpoint, regime_runs

from rora_theory.advice.setting import Setting
from rora_theory.advice.transfer import transfer as carry
from rora_theory.data.records import DataConfig
from rora_theory.errors import InputError
from rora_theory.measure.record_batches import PairConfig
from rora_theory.measure.regimes import saved_run as regime_run
from rora_theory.measure.regimes import tables as regime_tables
from rora_theory.measure.regimes.module_regime import RegimeConfig
from rora_theory.measure.transfer_request import TransferConfig, advise
from rora_theory.runs import seals
from sims import regime, transfer
from sims.common import cli


def snippet(text: str) -> dict:
    """The keyword arguments of the printed LoraConfig."""
    code = text[text.index("from peft") :]
    code = code[: code.index("\n)") + 2]
    space: dict = {}
    exec(code.replace("from peft import LoraConfig", "LoraConfig = dict"), space)
    return space["config"]


def config_of(arguments: str) -> transfer.Config:
    return cli.parse(transfer.Config, arguments.split(), description="")


def test_as_a_user_runs_it(capsys) -> None:
    """The question of most users: LoRA under AdamW keeps alpha and the rate; alpha = 2r asks for a lower rate."""
    transfer.run(config_of("--from-rank 8 --to-rank 128 --alpha 16 --lr 3e-4 --rule lora --optimizer adamw"))
    said = capsys.readouterr()
    assert said.err == ""
    config = snippet(said.out)
    assert config.pop("target_modules") == ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
    assert config == {
        "task_type": "CAUSAL_LM", "r": 128, "lora_alpha": 16, "use_rslora": False, "init_lora_weights": True
    }  # fmt: skip
    lines = {line.split("  ")[0].strip(): line.split() for line in said.out.splitlines() if line.strip()}
    assert said.out.splitlines()[0] == (
        "From rank 8 to 128 with AdamW: keep lora_alpha=16 and the learning rate 0.0003."
    )
    rows = {row.name: row for row in carry(Setting(8, 16.0, 3e-4), 128).alternatives()}
    for name in ("alpha = 2r", "alpha = 16, unchanged, use_rslora"):
        row = rows[name]
        cells = [f"{row.setting.scaling:.4g}", *f"{row.divisor:.3g}".split(), f"{row.learning_rate:.3g}"]
        assert lines[name][-len(cells) :] == cells
    assert lines["alpha = 16, unchanged"][-3:] == ["0.125", "1", "0.0003"]


def test_both_limits_of_a_regime_that_is_assumed(capsys) -> None:
    transfer.run(transfer.Config(regime="cross-talk"))
    text = capsys.readouterr().out
    lines = {line.split("  ")[0].strip(): line.split() for line in text.splitlines() if line.strip()}
    assert lines["cross-talk"][1:] == ["64", "0.0012", "0.25"]
    assert lines["signal"][1:] == ["16", "0.0003", "1"]


@pytest.mark.parametrize(
    "arguments",
    [
        "--to-rule rslora --to-alpha 64 --to-rank 1024 --steps 64 --to-steps 256 --schedule linear",
        "--to-alpha 2048 --to-rank 1024 --schedule constant --to-schedule cosine",
        "--rule 0.25 --optimizer sgd",
        "--init gaussian --to-rule rslora",
        "--regime cross-talk --rule rora",
    ],
)
def test_the_output_fits_80_columns(capsys, monkeypatch, arguments) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    transfer.run(config_of(arguments))
    text = capsys.readouterr().out
    assert max(map(len, text[: text.index("from peft")].splitlines())) <= 80
    assert text.startswith("From rank 8 to ")


def test_the_tuned_rule_is_kept(capsys) -> None:
    """Under rora the row 'unchanged' has use_rslora; the config has the same adapter under alpha / r, and a comment
    says whose alpha it is, as under another kappa."""
    transfer.run(transfer.Config(rule="rora"))
    text = capsys.readouterr().out
    config = snippet(text)
    assert (config["use_rslora"], config["lora_alpha"]) == (False, pytest.approx(4 * 128**0.5, rel=1e-5))
    assert "# the same adapter as 4 with use_rslora=True" in text  # 16 / sqrt(16)
    lines = {line.split("  ")[0].strip(): line.split() for line in text.splitlines() if line.strip()}
    assert "under rora unless stated" in text
    rows = {row.name: row for row in carry(Setting(8, 16.0, 3e-4, "rora"), 128).alternatives()}
    unchanged = rows["alpha = 16, unchanged"]  # gamma of 16 / sqrt(128)
    assert lines["alpha = 16, unchanged"][4:6] == ["1.414", f"{unchanged.divisor.mean:.3g}"]
    assert "0.125" in lines["alpha = 16, unchanged, without use_rslora"]
    transfer.run(transfer.Config(rule=0.25))
    text = capsys.readouterr().out
    line = next(line for line in text.splitlines() if line.strip().startswith("lora_alpha="))
    alpha = 16 * (128 / 8) ** (0.25 - 1)
    assert line.endswith(f"# alpha / r with the gamma of {alpha:.6g} / r^0.25")
    assert snippet(text)["lora_alpha"] / 128 == pytest.approx(alpha / 128**0.25, rel=1e-5)


@pytest.mark.parametrize(
    ("targets", "task_type", "written"),
    [
        (("all-linear",), "CAUSAL_LM", "all-linear"),
        (("o_proj", "self_attn.q_proj"), "SEQ_CLS", ["o_proj", "self_attn.q_proj"]),
    ],
)
@pytest.mark.parametrize("rule", ["lora", "rora"])
def test_what_is_printed_is_what_peft_takes(capsys, targets, task_type, written, rule) -> None:
    """The user's targets and task type, as PEFT's own LoraConfig reads them."""
    transfer.run(transfer.Config(targets=targets, task_type=task_type, rule=rule))
    text = capsys.readouterr().out
    config = snippet(text)
    assert (config["target_modules"], config["task_type"]) == (written, task_type)
    pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    read = peft.LoraConfig(**config)
    assert read.target_modules == (written if isinstance(written, str) else set(written))
    assert (read.task_type, read.use_rslora) == (task_type, False)


@pytest.fixture
def run(tmp_path) -> Path:
    return regime_runs.write(tmp_path / "run")


@pytest.mark.parametrize(("optimizer", "split", "base"), [("adamw", "heldout", 1.0), ("sgd", "train", 60.0)])
def test_a_measured_regime(run, capsys, optimizer, split, base) -> None:
    """The terms of the asked optimizer and split, a pattern by type."""
    config = transfer.Config(regime=str(run), optimizer=optimizer, split=split)
    transfer.run(config)
    written = snippet(capsys.readouterr().out)
    terms = {
        f"model.layers.{layer}.{name}": base + 5 * layer + 2 * position
        for layer in (0, 1)
        for position, name in enumerate(("self_attn.q_proj", "mlp.down_proj"))
    }
    expected = carry(Setting(8, 16.0, 3e-4, "lora", optimizer), 128, terms)
    assert written["target_modules"] == ["q_proj", "down_proj"]
    assert written["lora_alpha"] == pytest.approx(expected.alpha, rel=1e-5)
    assert written["alpha_pattern"] == pytest.approx(expected.by_type(), rel=1e-5)


def test_a_measured_regime_prints_one_alpha(run, capsys) -> None:
    """The table's and the snippet's; what it does to the whole model's step is said, another alpha is not advised."""
    transfer.run(transfer.Config(regime=str(run), optimizer="adamw"))
    text = capsys.readouterr().out
    alpha = snippet(text)["lora_alpha"]
    assert (
        next(line.split()[2] for line in text.splitlines() if line.split()[:2] == ["all", "modules"]) == f"{alpha:.6g}"
    )
    after = " ".join(text[text.index("These alphas") :].split())
    assert f"is then {alpha / 16:.3g} times the tuned one." in after  # LoRA, Adam, signal: the step is alpha
    assert "--regime" not in after


@pytest.mark.parametrize(
    ("manifest", "config", "said"),
    [
        ({"status": "complete", "model_layers": 2}, {}, None),
        ({"status": "complete"}, {}, None),
        ({"status": "complete", "model_layers": 30}, {}, "it has 2 of the model's 30 layers (0 1)"),
        ({"status": "running", "model_layers": 30}, {}, "30 layers (0 1), and the run is not complete"),
        ({"status": "complete", "config": {"layers": [0, 1]}}, {}, "it has layers 0 1 only"),
        ({"status": "complete"}, {"targets": ("all-linear",)}, "all-linear adapts more modules than it has"),
        ({"status": "complete", "config": {"targets": ["all-linear"]}}, {"targets": ("all-linear",)}, None),
    ],
)
def test_a_thin_regime_is_said_to_be_thin(run, capsys, manifest, config, said) -> None:
    sealed = seals.seal({"experiment": "regime", "config": {}} | manifest)
    (run / "manifest.json").write_text(json.dumps(sealed))
    transfer.run(transfer.Config(regime=str(run), **config))
    text = capsys.readouterr().out
    if said is None:
        assert "is thin" not in text
    else:
        assert said in text[text.index("This regime is thin") : text.index("Learning rate for common choices")]


def test_own_targets_of_a_measured_regime(run, capsys) -> None:
    """Their terms alone decide; one that was not measured is refused."""
    transfer.run(transfer.Config(regime=str(run), targets=("down_proj",)))
    written = snippet(capsys.readouterr().out)
    terms = {f"model.layers.{layer}.mlp.down_proj": 3.0 + 5 * layer for layer in (0, 1)}
    expected = carry(Setting(8, 16.0, 3e-4, "lora", "adamw"), 128, terms)
    assert written["target_modules"] == ["down_proj"]
    assert written["lora_alpha"] == pytest.approx(expected.alpha, rel=1e-5)
    with pytest.raises(transfer.InputError, match=r"--targets has o_proj, which .* measured: q_proj down_proj"):
        transfer.advise(transfer.Config(regime=str(run), targets=("q_proj", "o_proj")))


@pytest.mark.slow
@pytest.mark.usefixtures("carried")
def test_check_on_a_model(tmp_path) -> None:
    """SGD in a tiny model: without change the step grows, and the alphas of a measured regime bring it back."""
    model, data = checkpoint.model(tmp_path / "model"), checkpoint.records(tmp_path / "train.json")
    regime.run(
        regime.Config(
            data=(str(data),), model=str(model), targets=("q_proj", "down_proj"), batches=PairConfig(4, 4),
            measured=RegimeConfig(optimizers=("sgd",), rows=0, tokens=10**6), out=tmp_path / "regime",
        )
    )  # fmt: skip
    config = transfer.Config(
        from_rank=2,
        to_rank=8,
        rule=0.0,
        optimizer="sgd",
        lr=1e-4,
        regime=str(tmp_path / "regime"),
        check=(str(model), str(data)),
        batch_size=4,
        seeds=tuple(range(24)),
        out=tmp_path / "out",
    )
    transfer.run(config)
    with (tmp_path / "out" / "summary.csv").open(newline="") as file:
        rows = {(row["plan"], row["quantity"]): row for row in csv.DictReader(file)}
    run = regime_run.read_regime_run(tmp_path / "regime", optimizer="sgd", init="kaiming_uniform", split="heldout")
    terms = run.linear_terms
    found = carry(Setting(2, 16.0, 1e-4, 0.0, "sgd"), 8, terms)
    grown = found.alternative("", found.unchanged).step.mean
    for plan, expected in (("neither changed", grown), ("one alpha", 1), ("one rate", 1), ("alpha by module", 1)):
        row = rows[plan, "modules"]
        error = float(row["standard_error"])
        assert error < 0.1 * expected
        assert abs(float(row["ratio"]) - expected) < 4.5 * error, plan  # 4 comparisons: false alarm 3e-5
    assert grown > 2  # so that the tuned step's return is no accident
    assert {row["plan"] for row in rows.values()} >= {"neither changed, use_rslora", "alpha by type"}


def test_a_regime_that_was_changed_is_not_advised_from(run) -> None:
    path = run / regime_tables.CROSSINGS
    path.write_text(path.read_text().replace("6.0", "9.0"))
    with pytest.raises(InputError, match=f"{regime_tables.CROSSINGS}: .*Use the run as sims.regime wrote it"):
        transfer.advise(transfer.Config(regime=str(run)))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"rule": "lore"}, "got 'lore'"),
        ({"to_rank": 0}, "--to-rank must be an integer of 1 or more, got 0"),
        (
            {"to_rule": float("inf")},
            "got inf",
        ),
        ({"lr": -1.0}, "--lr must be a finite number above 0, got -1.0"),
        ({"regime": "nowhere"}, "nowhere has no crossing_ranks.csv"),
        ({"check": ("smollm2-135m",)}, "--check must be a model and one or more data files, got smollm2-135m"),
        ({"check": ("smollm2-135m", "x.json"), "seeds": (1,)}, "--seeds must have 2 or more values, got 1"),
        ({"check": ("smollm2-135m", "x.json"), "seed": -1}, "got -1"),
        ({"targets": ("q_proj,v_proj",)}, "got 'q_proj,v_proj' in 'q_proj,v_proj'"),
        ({"targets": ("q_proj", "all-linear")}, "got 'all-linear' in 'q_proj all-linear'"),
        ({"targets": ("q_proj", "q_proj")}, "got 'q_proj' in 'q_proj q_proj'"),
        ({"targets": ()}, "got an empty list"),
        ({"task_type": "causal"}, "got 'causal'"),
        (
            {"optimizer": "muon"},
            "got 'muon'",
        ),
        ({"init": "eva"}, "got 'eva'"),
        ({"init": "normal"}, "init must be one that PEFT has (kaiming_uniform, gaussian), got 'normal'"),
        ({"optimizer": "sgd", "steps": 9}, "steps must be left out with SGD"),
        ({"to_steps": 9}, "steps must be given together with to_steps, got to_steps 9 alone"),
        ({"steps": 0}, "--steps must be an integer of 1 or more, got 0"),
        ({"to_schedule": "cosine"}, "schedule must be given together with to_schedule"),
        ({"displacement_constant": 0.0}, "--displacement-constant must be a finite number above 0, got 0.0"),
        ({"batch_size": 4}, "--batch-size 4 has no effect without --check"),
        ({"seeds": (0, 1)}, "--seeds 0 1 has no effect without --check"),
        ({"seed": 1}, "--seed 1 has no effect without --check"),
        ({"out": Path("new")}, "--out new has no effect without --check"),
        ({"reading": DataConfig(format="text")}, "--format text has no effect without --check"),
        (
            {"split": "train"},
            "--split train has no effect without --regime RUN",
        ),
        ({"per": "one", "regime": "cross-talk"}, "--per one has no effect without --regime RUN"),
        ({"check": ("smollm2-135m", "no.json")}, "no.json: no such file"),
        ({"from_": Path("nowhere")}, "nowhere: no such file"),
        ({"rule": 400.0}, "got 400.0"),
    ],
)
def test_bad_input(capsys, changed, said) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.run(lambda: transfer.run(transfer.Config(**changed)))
    assert stopped.value.code == 2
    out, error = capsys.readouterr()
    assert said in error
    assert error.count("\n") == 1
    assert not out, "refused before anything is said"


def test_from_a_saved_adapter_as_json(tmp_path, capsys) -> None:
    """The old setting is the file's; the figures are the library's, beside the answer and the tables' rows."""
    saved = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "target_modules": ["q_proj"], "use_dora": True}
    (tmp_path / "adapter_config.json").write_text(json.dumps(saved))
    arguments = f"--from {tmp_path} --lr 2e-4 --to-rule rslora --to-alpha 32 --steps 50 --to-steps 90"
    transfer.main([*arguments.split(), "--json"])
    out, err = capsys.readouterr()
    assert err.startswith("note: use_dora is set")
    expected = carry(Setting(16, 32.0, 2e-4), 128, rule="rslora", alpha=32.0, steps=50, to_steps=90)
    found = json.loads(out)
    own = {name: found.pop(name) for name in ("answer", "warnings", "tables", "files")}
    assert found == expected.as_dict() | {"target_modules": ["q_proj"]}
    assert (own["answer"], own["warnings"], own["files"]) == (expected.answer(), [], [])
    (table,) = own["tables"]
    assert [row["scaling"] for row in table["rows"]] == [row.setting.scaling for row in expected.alternatives()]
    assert [row["learning_rate"] for row in table["rows"]] == [row.learning_rate for row in expected.alternatives()]
    with pytest.raises(transfer.InputError, match=r"--from-rank is 4, but .* has 16\."):
        transfer.run(config_of(arguments + " --from-rank 4"))
    transfer.run(config_of(arguments + " --from-rank 16"))


SAVED = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"from_rank": 8}, "--from-rank is 8, but {} has 16"),
        ({"alpha": 16.0}, "--alpha is 16.0, but {} has 32.0"),
        ({"rule": "lora"}, "--rule is lora, but {} has rslora"),
        ({"init": "gaussian"}, "--init is gaussian, but {} has kaiming_uniform"),
        ({"targets": ("q_proj",)}, "--targets is q_proj, but {} has q_proj v_proj"),
    ],
)
def test_what_contradicts_a_saved_adapter_is_refused(tmp_path, given, said) -> None:
    """The defaults too, which used to count as not given: on the command line and in the library."""
    (tmp_path / "adapter_config.json").write_text(json.dumps(SAVED))
    expected = rf"^{re.escape(said.format(tmp_path))}\."
    with pytest.raises(InputError, match=expected):
        advise(TransferConfig(from_=tmp_path, **given))
    words = [f"--{name.replace('_', '-')}={value[0] if name == 'targets' else value}" for name, value in given.items()]
    with pytest.raises(InputError, match=expected):
        transfer.run(cli.parse(transfer.Config, [f"--from={tmp_path}", *words], description=""))


def test_what_a_saved_adapter_says_too_is_accepted(tmp_path) -> None:
    """A rule is its exponent, targets are a set; a regular expression is no list that could contradict."""
    (tmp_path / "adapter_config.json").write_text(json.dumps(SAVED))
    given = {"from_rank": 16, "alpha": 32.0, "rule": "rora", "init": "kaiming_uniform", "targets": ("v_proj", "q_proj")}
    found, peft, _ = advise(TransferConfig(from_=tmp_path, to_rank=64, **given))
    assert (found.old, peft["target_modules"]) == (Setting(16, 32.0, 3e-4, "rora"), ["v_proj", "q_proj"])
    (tmp_path / "adapter_config.json").write_text(json.dumps(SAVED | {"target_modules": "q_.*"}))
    found, peft, _ = advise(TransferConfig(from_=tmp_path, to_rank=64, targets=("v_proj",)))
    assert (found.old, peft["target_modules"]) == (Setting(16, 32.0, 3e-4, "rslora"), ["v_proj"])


def test_the_initialisation_is_that_of_the_saved_adapter(tmp_path, capsys) -> None:
    """PEFT's gaussian has the deviation 1 / r, so that alpha at the first step grows as the rank."""
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(SAVED | {"use_rslora": False, "init_lora_weights": "gaussian"}))
    transfer.run(config_of(f"--from {tmp_path} --lr 2e-4 --to-rank 64"))
    written = snippet(capsys.readouterr().out)
    assert (written["init_lora_weights"], written["lora_alpha"]) == ("gaussian", 4 * 32)
    found, _, _ = advise(TransferConfig(from_=tmp_path, to_rank=64))
    assert found.old == Setting(16, 32.0, 3e-4, "lora", init="gaussian")


OWN = {
    "task_type": "SEQ_CLS", "use_dora": True, "lora_dropout": 0.05, "bias": "lora_only", "modules_to_save": ["score"],
    "layers_to_transform": [0, 1], "exclude_modules": ["lm_head"], "target_modules": r".*\.[qv]_proj",
}  # fmt: skip


def test_the_config_to_paste_has_what_the_saved_one_has(tmp_path, capsys) -> None:
    """What stays as it is at another rank; of PEFT's defaults nothing, and what is not known is named."""
    saved = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "bias": "none", "lora_bias": False, "loftq_config": {}}
    path, asked = tmp_path / "adapter_config.json", f"--from {tmp_path} --lr 2e-4"
    path.write_text(json.dumps(saved | OWN | {"eva_config": {"rho": 2.0}}))
    transfer.run(config_of(asked))
    said = capsys.readouterr()
    own = {"r": 128, "lora_alpha": 32, "use_rslora": False, "init_lora_weights": True}
    assert snippet(said.out) == OWN | own
    path.write_text(json.dumps(saved))
    transfer.run(config_of(f"{asked} --task-type TOKEN_CLS"))
    assert snippet(capsys.readouterr().out).keys() == {*own, "target_modules", "task_type"}
    transfer.run(config_of(asked))
    assert "task_type" not in snippet(capsys.readouterr().out), "the file has none"


def test_the_answer_comes_first_and_the_rate_is_one(capsys) -> None:
    transfer.run(config_of("--from-rank 128 --to-rule rslora --to-alpha 16 --steps 50"))
    text = capsys.readouterr().out
    assert text.startswith("From rank 128 to 128 with AdamW: set lora_alpha=181.019 without use_rslora and divide ")
    advice = carry(Setting(128, 16.0, 3e-4), 128, rule="rslora", alpha=16.0, steps=50)
    row = next(
        line.split() for line in text.splitlines() if line.strip().startswith("alpha = 16, unchanged, use_rslora")
    )
    assert row[-1] == f"{advice.learning_rate:.3g}"
    assert f"# learning rate {advice.learning_rate:.6g}" in text
    assert not snippet(text)["use_rslora"]
