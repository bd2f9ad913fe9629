"""`python -m sims.transfer`: tables and snippet, a measured regime, saved adapters and trainers' files, the check."""

import json
import re
from pathlib import Path

import pytest
import yaml
from support import commands

from rora_theory.advice.constants import CONSTANTS, EVIDENCE
from rora_theory.advice.setting import Setting
from rora_theory.advice.transfer import transfer as carry
from rora_theory.errors import InputError
from rora_theory.measure.regimes import saved_run
from rora_theory.measure.regimes.module_regime import RegimeConfig
from rora_theory.measure.transfer_request import TransferConfig, advise
from sims import regime, transfer
from sims.common.record_batches import PairConfig


def answer(arguments: str) -> str:
    """Return what the command prints."""
    return commands.output(commands.run_command(transfer.main, arguments))


def snippet(text: str) -> dict:
    """Return the keyword arguments of the printed LoraConfig."""
    code = text[text.index("from peft") :]
    code = code[: code.index("\n)") + 2]
    space: dict = {}
    exec(code.replace("from peft import LoraConfig", "LoraConfig = dict"), space)
    return space["config"]


def cells(text: str) -> dict[str, list[str]]:
    """Return the words of each line by its first column."""
    return {line.split("  ")[0].strip(): line.split() for line in text.splitlines() if line.strip()}


def test_the_command_as_a_user_runs_it() -> None:
    """The question of most users: the evidence first, then LoRA under AdamW, which keeps alpha; alpha = 2r lowers the
    rate.
    """
    text = answer("--from-rank 8 --to-rank 128 --alpha 16 --lr 3e-4 --rule lora --optimizer adamw")
    assert snippet(text) == {
        "target_modules": ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"], "task_type": "CAUSAL_LM",
        "r": 128, "lora_alpha": 16, "use_rslora": False, "init_lora_weights": True,
    }  # fmt: skip
    evidence, _, rest = text.partition("\n\n")
    assert evidence.startswith("In ")
    assert f"public runs of {EVIDENCE['fixed_gain']['models']} models" in evidence
    assert rest.startswith("From rank 8 to 128 with AdamW: keep lora_alpha=16 and multiply the learning rate by")
    lines = cells(text)
    rows = {row.name: row for row in carry(Setting(8, 16.0, 3e-4), 128).alternatives()}
    for name in ("alpha = 2r", "alpha = 16, unchanged, use_rslora"):
        row = rows[name]
        low, best, high = row.rate_range
        assert lines[name][-5:] == [f"{row.setting.scaling:.4g}", f"{best:.3g}", f"({low:.2g}", "to", f"{high:.2g})"]


def test_both_limits_of_a_regime_that_is_assumed() -> None:
    lines = cells(answer("--regime cross-talk"))
    assert lines["cross-talk"][1:] == ["64", "0.0012", "0.25"]
    assert lines["signal"][1:] == ["16", "0.0003", "1"]


def test_the_tuned_rule_is_kept() -> None:
    """Under rora the row 'unchanged' has use_rslora; the config has the same adapter under alpha / r."""
    text = answer("--rule rora")
    config, lines = snippet(text), cells(text)
    assert (config["use_rslora"], config["lora_alpha"]) == (False, pytest.approx(4 * 128**0.5, rel=1e-5))
    assert "under rora unless stated" in text
    rows = {row.name: row for row in carry(Setting(8, 16.0, 3e-4, "rora"), 128).alternatives()}
    unchanged = rows["alpha = 16, unchanged"]  # gamma of 16 / sqrt(128)
    assert lines["alpha = 16, unchanged"][4:6] == ["1.414", f"{unchanged.learning_rate:.3g}"]
    assert "0.125" in lines["alpha = 16, unchanged, without use_rslora"]
    text = answer("--rule 0.25")
    alpha = 16 * (128 / 8) ** (0.25 - 1)
    assert snippet(text)["lora_alpha"] / 128 == pytest.approx(alpha / 128**0.25, rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "targets", "task_type"),
    [
        ("--targets all-linear", "all-linear", "CAUSAL_LM"),
        ("--targets o_proj self_attn.q_proj --task-type SEQ_CLS", ["o_proj", "self_attn.q_proj"], "SEQ_CLS"),
    ],
)
def test_the_printed_config_works_in_peft(arguments, targets, task_type) -> None:
    """PEFT's own LoraConfig reads the user's targets and task type."""
    config = snippet(answer(f"{arguments} --rule rora"))
    assert (config["target_modules"], config["task_type"]) == (targets, task_type)
    pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    read = peft.LoraConfig(**config)
    assert read.target_modules == (targets if isinstance(targets, str) else set(targets))
    assert (read.task_type, read.use_rslora) == (task_type, False)


@pytest.mark.parametrize(
    ("arguments", "optimizer", "base", "types"),
    [
        ("--optimizer adamw --split heldout", "adamw", 1.0, ["q_proj", "down_proj"]),
        ("--optimizer sgd --split train", "sgd", 60.0, ["q_proj", "down_proj"]),
        ("--targets down_proj", "adamw", 1.0, ["down_proj"]),
    ],
)
def test_a_measured_regime(regime_run, arguments, optimizer, base, types) -> None:
    """The terms are those of the requested optimizer, split and targets, with a pattern for each type."""
    written = snippet(answer(f"--regime {regime_run} {arguments}"))
    terms = {
        f"model.layers.{layer}.{name}": base + 5 * layer + 2 * position
        for layer in (0, 1)
        for position, name in enumerate(("self_attn.q_proj", "mlp.down_proj"))
        if name.split(".")[1] in types
    }
    expected = carry(Setting(8, 16.0, 3e-4, "lora", optimizer), 128, terms)
    assert written["target_modules"] == types
    assert written["lora_alpha"] == pytest.approx(expected.alpha, rel=1e-5)
    if len(types) > 1:
        assert written["alpha_pattern"] == pytest.approx(expected.by_type(), rel=1e-5)


def test_a_measured_regime_prints_one_alpha(regime_run) -> None:
    """Table and snippet have one alpha.

    Its effect on the whole model's step is stated, and no other alpha is advised.
    """
    text = answer(f"--regime {regime_run} --optimizer adamw")
    alpha = snippet(text)["lora_alpha"]
    assert cells(text)["all modules"][2] == f"{alpha:.6g}"
    after = " ".join(text[text.index("These alphas") :].split())
    assert f"is then {alpha / 16:.3g} times the tuned one." in after  # LoRA, Adam, signal: the step is alpha
    assert "--regime" not in after


@pytest.mark.parametrize(
    ("manifest", "targets", "message"),
    [
        ({"model_layers": 2}, "", None),
        ({}, "", None),
        ({"model_layers": 30}, "", "it has 2 of the model's 30 layers (0 1)"),
        ({"status": "running", "model_layers": 30}, "", "30 layers (0 1), and the run is not complete"),
        ({"config": {"layers": [0, 1]}}, "", "it has layers 0 1 only"),
        ({}, "--targets all-linear", "all-linear adapts more modules than it has"),
        ({"config": {"targets": ["all-linear"]}}, "--targets all-linear", None),
    ],
)
def test_a_thin_regime_gets_a_warning(regime_run, manifest, targets, message) -> None:
    entries = {"experiment": "regime", "status": "complete", "config": {}} | manifest
    (regime_run / "manifest.json").write_text(json.dumps(entries))
    text = answer(f"--regime {regime_run} {targets}")
    if message is None:
        assert "is thin" not in text
    else:
        assert message in text[text.index("This regime is thin") : text.index("Learning rate for common choices")]


@pytest.mark.slow
@pytest.mark.usefixtures("pickled_work")
def test_check_on_a_model(model, data, tmp_path) -> None:
    """Under SGD in a tiny model the unchanged step grows, and the alphas of a measured regime restore it."""
    regime.measure_regime(
        regime.RegimeOptions(
            data=(str(data / "train.json"),), model=str(model), targets=("q_proj", "down_proj"),
            batches=PairConfig(4, 4), measured=RegimeConfig(optimizers=("sgd",), rows=0, tokens=10**6),
            out=tmp_path / "regime",
        )
    )  # fmt: skip
    config = transfer.TransferOptions(
        from_rank=2, to_rank=8, rule=0.0, optimizer="sgd", lr=1e-4, regime=str(tmp_path / "regime"), check_batch_size=4,
        check=(str(model), str(data / "train.json")), seeds=tuple(range(16)), out=tmp_path / "out",
    )  # fmt: skip
    transfer.transfer_setting(config)
    rows = commands.rows(tmp_path / "out" / "summary.csv")
    run = saved_run.read_regime_run(tmp_path / "regime", optimizer="sgd", init="kaiming_uniform", split="heldout")
    actual = carry(Setting(2, 16.0, 1e-4, 0.0, "sgd"), 8, run.linear_terms)
    grown = actual.alternative("", actual.unchanged).step.mean
    for plan, expected in (("neither changed", grown), ("one alpha", 1), ("one rate", 1), ("alpha by module", 1)):
        row = commands.selected(rows, plan=plan, quantity="modules")
        error = float(row["standard_error"])
        assert error < 0.1 * expected
        assert abs(float(row["ratio"]) - expected) < 5 * error, plan  # 4 comparisons, t of 15: false alarm 6e-4
    assert grown > 2  # so that the tuned step's return is no accident
    assert {row["plan"] for row in rows} >= {"neither changed, use_rslora", "alpha by type"}


SAVED = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture
def save(tmp_path):
    """Write a saved adapter's configuration, and return its folder."""

    def write(entries: dict) -> Path:
        (tmp_path / "adapter_config.json").write_text(json.dumps(entries))
        return tmp_path

    return write


def test_from_a_saved_adapter_as_json(save) -> None:
    """The old setting is read from the file; the figures are the library's, beside the answer and the tables' rows."""
    saved = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "target_modules": ["q_proj"], "use_dora": True}
    arguments = f"--from {save(saved)} --lr 2e-4 --to-rule rslora --to-alpha 32 --steps 50 --to-steps 90 --json"
    _, out, err = commands.run_command(transfer.main, arguments)
    assert err.startswith("note: use_dora is set")
    expected = carry(Setting(16, 32.0, 2e-4), 128, rule="rslora", alpha=32.0, steps=50, to_steps=90)
    actual = json.loads(out)
    extra = {name: actual.pop(name) for name in ("answer", "warnings", "tables", "files")}
    assert actual == expected.as_dict() | {"target_modules": ["q_proj"]}
    assert (extra["answer"], extra["warnings"], extra["files"]) == (expected.answer(), [], [])
    (table,) = extra["tables"]
    assert [(row["scaling"], row["learning rate (range)"]) for row in table["rows"]] == [
        (row.setting.scaling, f"{row.rate_range:.3g}") for row in expected.alternatives()
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--from-rank 8", "--from-rank is 8, but {} has 16"),
        ("--alpha 16", "--alpha is 16.0, but {} has 32.0"),
        ("--rule lora", "--rule is lora, but {} has rslora"),
        ("--init gaussian", "--init is gaussian, but {} has kaiming_uniform"),
        ("--targets q_proj", "--targets is q_proj, but {} has q_proj v_proj"),
    ],
)
def test_options_that_contradict_a_saved_adapter_are_refused(save, options, message) -> None:
    """This includes the defaults: an explicit option is never mistaken for a missing one."""
    folder = save(SAVED)
    ended = commands.run_command(transfer.main, "--from", folder, options)
    assert commands.refusal(ended).startswith(f"error: {message.format(folder)}.")


def test_options_that_agree_with_a_saved_adapter_are_accepted(save) -> None:
    """Rules are compared by exponent and targets as sets; a regular expression cannot contradict a list."""
    options = {
        "from_rank": 16, "alpha": 32.0, "rule": "rora", "init": "kaiming_uniform", "targets": ("v_proj", "q_proj"),
    }  # fmt: skip
    actual, peft, _ = advise(TransferConfig(from_=save(SAVED), to_rank=64, **options))
    assert (actual.old, peft["target_modules"]) == (Setting(16, 32.0, 3e-4, "rora"), ["v_proj", "q_proj"])
    folder = save(SAVED | {"target_modules": "q_.*", "init_lora_weights": "gaussian"})
    actual, peft, _ = advise(TransferConfig(from_=folder, to_rank=64, targets=("v_proj",)))
    assert actual.old == Setting(16, 32.0, 3e-4, "rslora", init="gaussian")
    assert peft["target_modules"] == ["v_proj"]


def test_a_missing_learning_rate_of_a_saved_adapter_is_named(save) -> None:
    """The default replaces it, which may not be the tuned rate; there is no remark on an explicit rate."""
    folder = save(SAVED)
    remark = commands.run_command(transfer.main, "--from", folder).err
    assert f"{folder} has no learning rate" in remark
    assert "0.0003" in remark
    assert "as lr" in remark
    assert not commands.run_command(transfer.main, "--from", folder, "--lr 3e-4").err


OWN = {
    "task_type": "SEQ_CLS", "use_dora": True, "lora_dropout": 0.05, "bias": "lora_only", "modules_to_save": ["score"],
    "layers_to_transform": [0, 1], "exclude_modules": ["lm_head"], "target_modules": r".*\.[qv]_proj",
}  # fmt: skip


def test_the_printed_config_keeps_the_entries_of_the_saved_one(save) -> None:
    """It has the entries that stay at another rank and none of PEFT's defaults; an unknown entry is named."""
    saved = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "bias": "none", "lora_bias": False, "loftq_config": {}}
    arguments = f"--from {save(saved | OWN | {'eva_config': {'rho': 2.0}})} --lr 2e-4"
    extra = {"r": 128, "lora_alpha": 32, "use_rslora": False, "init_lora_weights": True}
    ended = commands.run_command(transfer.main, arguments)
    assert "eva_config" in ended.err
    assert snippet(ended.out) == OWN | extra
    save(saved)
    assert snippet(answer(f"{arguments} --task-type TOKEN_CLS")).keys() == {*extra, "target_modules", "task_type"}
    assert "task_type" not in snippet(answer(arguments)), "the file has none"


AXOLOTL = """\
base_model: a/model  # the base
adapter: lora
lora_r: 16
lora_alpha: 32
lora_target_modules: [q_proj, v_proj]
optimizer: OPTIMIZER
learning_rate: 2e-4
"""


@pytest.fixture
def axolotl(tmp_path):
    """Write a configuration of Axolotl, and return its path."""

    def write(optimizer: str = "adamw_8bit", more: str = "") -> Path:
        (tmp_path / "config.yml").write_text(AXOLOTL.replace("OPTIMIZER", optimizer) + more)
        return tmp_path / "config.yml"

    return write


def test_the_setting_is_that_of_a_trainers_file(axolotl) -> None:
    """It includes learning rate and optimizer. An option with the same value is accepted, with another one refused."""
    path = axolotl("sgd")
    advice, peft, _ = advise(TransferConfig(from_=path, lr=2e-4))
    assert advice.old == Setting(16, 32.0, 2e-4, "lora", "sgd")
    assert peft["target_modules"] == ["q_proj", "v_proj"]
    for options, message in (
        ({"lr": 1e-4}, r"lr .*0\.0001.* 0\.0002"),
        ({"optimizer": "adam"}, "optimizer .*adam.* sgd"),
    ):
        with pytest.raises(InputError, match=message):
            advise(TransferConfig(from_=path, **options))


def test_the_tuned_run_is_read_from_the_file_if_the_new_run_differs(axolotl) -> None:
    path = axolotl(more="max_steps: 64\nlr_scheduler: constant\n")
    options = TransferConfig(from_=path, to_alpha=256.0, to_steps=256, to_schedule="constant")
    stated = TransferConfig(
        from_rank=16, alpha=32.0, lr=2e-4, to_alpha=256.0,
        steps=64, to_steps=256, schedule="constant", to_schedule="constant",
    )  # fmt: skip
    assert advise(options).advice.learning_rate == pytest.approx(advise(stated).advice.learning_rate)
    with pytest.raises(InputError, match=r"steps .*256"):
        advise(TransferConfig(from_=axolotl(), to_steps=256))


def test_the_schedule_of_the_file_decides_the_range_for_another_number_of_steps(axolotl) -> None:
    """The default of Axolotl is cosine; a schedule without a law is named."""
    stated = {"steps": 64, "to_steps": 256, "schedule": "cosine"}
    expected = carry(Setting(16, 32.0, 2e-4), 128, **stated).rate_range
    for more in ("", "lr_scheduler: cosine\n"):
        options = TransferConfig(from_=axolotl(more=f"max_steps: 64\n{more}"), to_steps=256)
        assert advise(options).advice.rate_range == pytest.approx(expected)
    warm = axolotl(more="max_steps: 64\nlr_scheduler: constant_with_warmup\n")
    assert advise(TransferConfig(from_=warm, to_steps=256)).advice.run.schedule == "constant"


def test_a_schedule_without_measured_runs_is_named(axolotl, caplog) -> None:
    path = axolotl(more="max_steps: 64\nlr_scheduler: rex\n")
    assert advise(TransferConfig(from_=path, to_steps=256)).advice.run.schedule is None
    assert "'rex'" in caplog.text


@pytest.mark.parametrize("modules", [[], None])
def test_an_adapter_of_parameters_alone_is_printed_without_modules(save, modules) -> None:
    saved = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_parameters": ["experts.gate_up_proj"]}
    config = snippet(answer(f"--from {save(saved | {'target_modules': modules})} --lr 2e-4"))
    assert (config["target_modules"], config["target_parameters"]) == ([], ["experts.gate_up_proj"])


def test_a_displacement_constant_of_zero_is_accepted() -> None:
    """It is the limit in which A does not move; `transfer` and the calculator accept it."""
    options = TransferConfig(from_rank=16, alpha=32.0, lr=2e-4, to_alpha=256.0, displacement_constant=0.0)
    factor = 8 ** CONSTANTS["rank_exponent"].value
    assert advise(options).advice.learning_rate == pytest.approx(2e-4 / 8 * factor)


def test_a_file_is_written_in_its_format_without_overwriting(axolotl, tmp_path) -> None:
    path, out = axolotl(), tmp_path / "new.yml"
    answered = json.loads(answer(f"--from {path} --to-rank 64 --write {out} --json"))
    assert answered["files"] == [str(out)]
    rate = f"{answered['learning_rate']:.6g}"
    assert out.read_text() == path.read_text().replace("lora_r: 16", "lora_r: 64").replace("2e-4", rate)
    assert answered["lora_alpha"] == yaml.safe_load(out.read_text())["lora_alpha"]
    for options, message in (
        (f"--write {path}", "config.yml: the file exists"),
        (f"--to-rule rslora --to-alpha 7.5 --write {tmp_path}/other.yml", "integer lora_alpha"),
    ):
        ended = commands.run_command(transfer.main, "--from", path, options)
        assert message in commands.refusal(ended)
    assert not (tmp_path / "other.yml").exists()


def test_no_file_is_written_if_the_check_is_refused(axolotl, model, data, tmp_path) -> None:
    """Not if the records do not exist, and not if every held-out token repeats a training record."""
    path, same = axolotl(), data / "same.json"
    same.write_text(json.dumps([{"instruction": "Say it.", "output": "It."}] * 8))
    for records, message in ((tmp_path / "none.json", "none.json: no such file"), (same, "held-out tokens")):
        words = ["--check-batch-size", "4", "--out", tmp_path / "run", "--write", tmp_path / "new.yml"]
        ended = commands.run_command(transfer.main, "--from", path, "--to-rank 64 --check", model, records, *words)
        assert re.search(message, commands.refusal(ended))
        assert [item.name for item in tmp_path.iterdir()] == ["config.yml"]
