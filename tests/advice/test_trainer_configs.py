"""Settings in the files of PEFT, Axolotl and LLaMA-Factory are read, transferred, and written again."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import yaml

from rora_theory.advice.adapter_config import FILE
from rora_theory.advice.setting import Setting
from rora_theory.advice.trainer_configs import read_trainer_config, write_trainer_config
from rora_theory.advice.transfer import Advice, transfer
from rora_theory.errors import InputError

AXOLOTL = """\
base_model: NousResearch/Llama-3.2-1B
datasets:
  - path: teknium/GPT4-LLM-Cleaned   # a comment
    type: alpaca

adapter: lora
lora_model_dir:

lora_r: 16  # tuned
lora_alpha: 32
lora_dropout: 0.05
lora_target_modules:
  - q_proj
  - v_proj

num_epochs: 2
optimizer: adamw_8bit
learning_rate: 2e-4
# the end
"""

LLAMA_FACTORY = """\
### method
stage: sft
finetuning_type: lora
lora_rank: 8
lora_target: all

### train
learning_rate: 1.0e-4
lr_scheduler_type: cosine
max_steps: 500
"""


def written(path: Path, text: str) -> Path:
    path.write_text(text, newline="")
    return path


def advice_for(path: Path, rank: int = 128, **new) -> Advice:
    tuned = read_trainer_config(path)
    rate = tuned.learning_rate or 3e-4
    return transfer(Setting(tuned.rank, tuned.alpha, rate, tuned.rule, tuned.optimizer or "adamw"), rank, **new)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # A rate without a dot; the missing schedule is Axolotl's default.
        (AXOLOTL, (16, 32.0, "lora", "kaiming_uniform", ("q_proj", "v_proj"), 2e-4, "adamw", "cosine", None, 2.0)),
        # Without alpha it is twice the rank, and the targets of ``all`` are PEFT's all-linear.
        (LLAMA_FACTORY, (8, 16.0, "lora", "kaiming_uniform", ("all-linear",), 1e-4, "adamw", "cosine", 500, 3.0)),
        (
            "adapter: qlora\nlora_r: 8\nlora_alpha: 8\nlora_target_linear: true\npeft_use_rslora: true\n"
            "peft_init_lora_weights: gaussian\nlearning_rate: 1e-3\nmax_steps: 7\noptimizer: sgd\n",
            (8, 8.0, "rslora", "gaussian", ("all-linear",), 1e-3, "sgd", "cosine", 7, 1.0),
        ),
        (
            "stage: pt\n",
            (8, 16.0, "lora", "kaiming_uniform", ("all-linear",), 5e-5, "adamw", "linear", None, 3.0),
        ),
        (
            '{"lora_rank": 4, "lora_alpha": 2, "use_rslora": true, "lora_target": "q_proj, v_proj", "optim": "sgd"}',
            (4, 2.0, "rslora", "kaiming_uniform", ("q_proj", "v_proj"), 5e-5, "sgd", "linear", None, 3.0),
        ),
    ],
)
def test_values_and_defaults(tmp_path, text, expected) -> None:
    tuned = read_trainer_config(written(tmp_path / "config", text))
    assert (*tuned[:5], tuned.learning_rate, tuned.optimizer, tuned.schedule, tuned.steps, tuned.epochs) == expected
    assert tuned.other_entries == ({"lora_dropout": 0.05} if "lora_dropout" in text else {})
    assert bool(tuned.remarks) == ("learning_rate" not in text)


@pytest.mark.parametrize(
    ("text", "first_words"),
    [
        (LLAMA_FACTORY.replace("learning_rate: 1.0e-4", ""), "has no learning_rate"),
        (LLAMA_FACTORY + "use_dora: true\n", "use_dora"),
        (LLAMA_FACTORY + "loraplus_lr_ratio: 16\n", "loraplus_lr_ratio"),
        (LLAMA_FACTORY + "adapter_name_or_path: saves/first\n", "adapter_name_or_path"),
        (AXOLOTL.replace("lora_model_dir:", "lora_model_dir: out"), "lora_model_dir"),
        (AXOLOTL + "loraplus_lr_ratio: 16\n", "loraplus_lr_ratio"),
        (AXOLOTL + "embedding_lr: 1.0e-5\n", "embedding_lr"),
        (AXOLOTL + "embedding_lr_scale: 0.5\n", "embedding_lr_scale"),
        (AXOLOTL + "lr_groups: [{name: o, modules: [o_proj], lr: 1.0e-6}]\n", "lr_groups"),
        (AXOLOTL + "peft_trainable_token_indices: [3]\n", "peft_trainable_token_indices"),
        (AXOLOTL + "peft_layer_replication: [[0, 4], [2, 6]]\n", "peft_layer_replication"),
        (AXOLOTL + "relora: true\npeft_layers_to_transform: [1]\n", "peft_layers_to_transform, relora"),
    ],
)
def test_settings_that_the_law_does_not_cover_get_a_remark(tmp_path, text, first_words) -> None:
    (remark,) = read_trainer_config(written(tmp_path / "config.yaml", text)).remarks
    assert re.search(rf"\b{first_words}\b", remark)


def test_a_file_without_target_modules_is_read(tmp_path) -> None:
    """PEFT's empty list adapts the target parameters alone."""
    entries = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": [], "target_parameters": ["experts.up"]}
    (tmp_path / FILE).write_text(json.dumps(entries))
    saved = read_trainer_config(tmp_path)
    assert (saved.targets, saved.expression) == (None, None)
    assert saved.other_entries == {"target_parameters": ["experts.up"]}
    (tmp_path / FILE).write_text(json.dumps(entries | {"target_parameters": None}))
    with pytest.raises(InputError, match=r"targets .*empty"):
        read_trainer_config(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base_model: x\n", "format .*neither"),
        ("adapter: lora\nlora_rank: 8\n", "Axolotl and LLaMA-Factory"),
        ("- adapter\n", "format .*Axolotl"),
        ("adapter: [\n", "is not YAML"),
        ("adapter: llama-adapter\n", "adapter .*got 'llama-adapter'"),
        ("adapter: lora\nlora_alpha: 8\nlearning_rate: 1e-4\n", "lora_r .*no value"),
        ("adapter: lora\nlora_r: 8\nlearning_rate: 1e-4\n", "lora_alpha .*no value"),
        ("adapter: lora\nlora_r: 8\nlora_alpha: 8\n", "learning_rate .*got None"),
        ("adapter: lora\nlora_r: 8\nlora_alpha: 8\nlearning_rate: fast\n", "learning_rate .*got 'fast'"),
        ("adapter: lora\nlora_r: 8\nlora_alpha: 8\nlearning_rate: .inf\n", "learning_rate .*got inf"),
        ("adapter: lora\nlora_r: 8.5\nlora_alpha: 8\nlearning_rate: 1.\n", "lora_r .*got 8.5"),
        (AXOLOTL + "lora_rank_pattern: {q_proj: 4}\n", "rank_pattern .*got {'q_proj': 4}"),
        (AXOLOTL + "peft_init_lora_weights: pissa\n", "init_lora_weights .*got 'pissa'"),
        (AXOLOTL + "peft: {loftq_config: {loftq_bits: 4}}\n", "loftq_config"),
        (AXOLOTL.replace("0.05", "[0.05]"), "lora_dropout .*got \\[0.05\\]"),
        (AXOLOTL.replace("0.05", "1.5"), "lora_dropout .*got 1.5"),
        (AXOLOTL.replace("adamw_8bit", "muon"), "optimizer .*got 'muon'"),
        (LLAMA_FACTORY.replace("type: lora", "type: full"), "finetuning_type .*got 'full'"),
        (LLAMA_FACTORY + "pissa_init: true\n", "pissa_init .*got True"),
        (LLAMA_FACTORY + "use_muon: true\n", "use_muon .*got True"),
        (LLAMA_FACTORY + "use_rslora: maybe\n", "use_rslora .*got 'maybe'"),
        (LLAMA_FACTORY.replace("500", "many"), "max_steps .*got 'many'"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_in_one_line(tmp_path, text, message) -> None:
    path = written(tmp_path / "config.yaml", text)
    with pytest.raises(InputError, match=message) as error:
        read_trainer_config(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def written_rate(advice) -> str:
    """Return the learning rate as it stands in a file: six digits."""
    return repr(float(f"{advice.learning_rate:.6g}"))


def test_axolotl_is_written_with_its_comments(tmp_path) -> None:
    """At another rank of plain LoRA the rank and the rate change in the file; with a fixed alpha that changes too.

    The space before a comment may change with the length of the value.
    """
    path, out = written(tmp_path / "config.yml", AXOLOTL), tmp_path / "new.yml"
    write_trainer_config(path, out, advice := advice_for(path))
    rate = written_rate(advice)
    assert out.read_text() == AXOLOTL.replace("lora_r: 16  #", "lora_r: 128 #").replace("2e-4", rate)
    advice = advice_for(path, alpha=256.0)
    write_trainer_config(path, tmp_path / "fixed.yml", advice)
    expected = AXOLOTL.replace("lora_r: 16  #", "lora_r: 128 #").replace("lora_alpha: 32", "lora_alpha: 256")
    rate = yaml.safe_load((tmp_path / "fixed.yml").read_text())["learning_rate"]
    assert rate == pytest.approx(advice.learning_rate, rel=1e-5)
    assert (tmp_path / "fixed.yml").read_text() == expected.replace("2e-4", repr(rate))
    read = read_trainer_config(tmp_path / "fixed.yml")
    assert (read.rank, read.alpha, read.learning_rate) == (128, 256.0, rate)


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_llama_factory_is_written_with_an_alpha_that_it_had_by_default(tmp_path, newline) -> None:
    """The default would be twice the new rank, so the file must state the alpha that is kept."""
    path, out = written(tmp_path / "config.yaml", LLAMA_FACTORY.replace("\n", newline)), tmp_path / "new.yaml"
    write_trainer_config(path, out, advice := advice_for(path, 64))
    expected = LLAMA_FACTORY.replace("lora_rank: 8", "lora_alpha: 16\nlora_rank: 64").replace("\n", newline)
    expected = expected.replace("1.0e-4", written_rate(advice))
    assert out.read_bytes().decode() == expected


def test_null_values_and_flow_style_are_edited(tmp_path) -> None:
    for number, alpha in enumerate(('"lora_alpha": null, ', "")):
        path = written(tmp_path / f"{number}.json", f'{{"lora_rank": 4, {alpha}"learning_rate": 0.001}}')
        write_trainer_config(path, out := tmp_path / f"new_{number}.json", advice := advice_for(path, 8))
        rate = pytest.approx(advice.learning_rate, rel=1e-5)
        assert json.loads(out.read_text()) == {"lora_rank": 8, "lora_alpha": 8, "learning_rate": rate}
    path = written(tmp_path / "empty.yaml", "stage: sft\nlora_alpha:  # default\nlora_rank:\n")
    write_trainer_config(path, tmp_path / "new_empty.yaml", advice := advice_for(path, 16))
    text = f"stage: sft\nlora_alpha: 16 # default\nlearning_rate: {written_rate(advice)}\nlora_rank: 16\n"
    assert (tmp_path / "new_empty.yaml").read_text() == text


def test_the_run_to_which_the_rate_belongs_is_written(tmp_path) -> None:
    """A rate for another number of steps or schedule is wrong in a file that keeps the old ones."""
    path = written(tmp_path / "config.yaml", LLAMA_FACTORY + "warmup_ratio: 0.1\n")
    run = {"steps": 500, "to_steps": 2000, "schedule": "cosine", "to_schedule": "constant"}
    for number, options in enumerate((run, {"steps": 500, "to_steps": 2000}, {"steps": 500, "schedule": "cosine"})):
        advice = advice_for(path, 8, alpha=16.0, **options)
        write_trainer_config(path, out := tmp_path / f"{number}.yaml", advice)
        read = read_trainer_config(out)
        assert read.learning_rate == pytest.approx(advice.learning_rate, rel=1e-5)
        assert read.steps == options.get("to_steps", 500)
        assert read.schedule == options.get("to_schedule", "cosine")
    # Without this name the Trainer skips the warm-up.
    assert yaml.safe_load((tmp_path / "0.yaml").read_text())["lr_scheduler_type"] == "constant_with_warmup"
    # In JSON the name is quoted, and a number of steps that followed from the epochs is stated.
    path = written(tmp_path / "config.json", '{\n\t"stage": "sft", "learning_rate": 1e-4\n}')
    write_trainer_config(path, tmp_path / "new.json", advice_for(path, 8, alpha=16.0, **run))
    values = json.loads((tmp_path / "new.json").read_text())
    assert (values["max_steps"], values["lr_scheduler_type"]) == (2000, "constant")


ALIASES = """\
# an example
datasets:
  - &chats {path: a/b, type: chat_template}   # shared
test_datasets:
  - <<: *chats
    split: test
adapter: lora
lora_r: &rank   16  # tuned
lora_alpha: *rank
learning_rate: &rate 2.0e-4
embedding_lr: 1.0e-4
"""


def test_a_file_with_aliases_is_read_and_written_with_the_changed_values(tmp_path) -> None:
    path = written(tmp_path / "config.yml", ALIASES)
    tuned = read_trainer_config(path)
    assert (tuned.rank, tuned.alpha, tuned.learning_rate) == (16, 16.0, 2e-4)
    # The rank alone changes, not its alias; a value that an alias stands for stays.
    for alpha in (None, 64.0):
        out = tmp_path / f"{alpha}.yml"
        write_trainer_config(path, out, advice := advice_for(path, 128, alpha=alpha))
        values = yaml.safe_load(out.read_text())
        assert (values["lora_r"], values["lora_alpha"]) == (128, alpha or 16)
        assert values["learning_rate"] == pytest.approx(advice.learning_rate, rel=1e-5)
        assert values["test_datasets"] == [{"path": "a/b", "type": "chat_template", "split": "test"}]
        assert all(comment in out.read_text() for comment in ("# an example", "# shared", "# tuned", "<<: *chats"))
    text = "micro_batch_size: &n 8\nadapter: lora\nlora_r: *n\nlora_alpha: 8\nlearning_rate: 1.0e-4\n"
    path = written(tmp_path / "size.yml", text)
    write_trainer_config(path, tmp_path / "new_size.yml", advice := advice_for(path, 64))
    expected = text.replace("*n", "64").replace("1.0e-4", written_rate(advice))
    assert (tmp_path / "new_size.yml").read_text() == expected


def test_a_key_that_is_merged_is_overridden(tmp_path) -> None:
    text = "base: &base\n  lora_rank: 8 # shared\n  lora_alpha: 16\n<<: *base\nstage: sft\nlearning_rate: 1.0e-4\n"
    path = written(tmp_path / "config.yaml", text)
    assert read_trainer_config(path).rank == 8
    write_trainer_config(path, tmp_path / "new.yaml", advice := advice_for(path, 64))
    expected = text.replace("1.0e-4", written_rate(advice)) + "lora_rank: 64\n"
    assert (tmp_path / "new.yaml").read_text() == expected
    assert read_trainer_config(tmp_path / "new.yaml").rank == 64


def test_a_rule_is_written_with_an_integer_alpha(tmp_path) -> None:
    """Both trainers need an integer alpha: the file gets alpha / r if it gives one, else use_rslora, else an error."""
    path = written(tmp_path / "config.yml", AXOLOTL)
    # gamma = 16 / sqrt(128) has no integer alpha under alpha / r.
    write_trainer_config(path, tmp_path / "rslora.yml", advice_for(path, rule="rslora", alpha=16.0))
    values = yaml.safe_load((tmp_path / "rslora.yml").read_text())
    assert (values["lora_r"], values["lora_alpha"], values["peft_use_rslora"]) == (128, 16, True)
    # An old rslora setting whose alpha is an integer under alpha / r drops the flag.
    path = written(tmp_path / "old.yml", AXOLOTL + "peft_use_rslora: true\n")
    advice = advice_for(path)
    write_trainer_config(path, tmp_path / "plain.yml", advice)
    values = yaml.safe_load((tmp_path / "plain.yml").read_text())
    assert (values["lora_alpha"], values["peft_use_rslora"]) == (128, False)
    path = written(tmp_path / "odd.yml", AXOLOTL.replace("lora_r: 16", "lora_r: 8") + "peft_use_rslora: true\n")
    with pytest.raises(InputError, match=r"integer lora_alpha, got 90\.5097 .*rslora .* 9 "):
        write_trainer_config(path, tmp_path / "never.yml", advice_for(path, 100))
    # The remedy of the message works.
    write_trainer_config(path, tmp_path / "remedy.yml", advice_for(path, 100, rule="rslora", alpha=9.0))
    with pytest.raises(InputError, match=r"integer lora_alpha, got .* lora "):
        write_trainer_config(path, tmp_path / "never.yml", advice_for(path, rule=0.25))
    assert not (tmp_path / "never.yml").exists()


def test_peft_s_file_is_written_with_its_other_entries(tmp_path) -> None:
    values = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "use_rslora": True, "bias": "none", "later": [1]}
    (tmp_path / FILE).write_text(json.dumps(values))
    for path in (tmp_path, tmp_path / FILE):
        out = tmp_path / f"{path.suffix}.new"
        write_trainer_config(path, out, advice_for(path, 100))
        assert json.loads(out.read_text()) == values | {"r": 100, "lora_alpha": 128, "use_rslora": False}
    renamed = tmp_path / "other.json"
    (tmp_path / FILE).rename(renamed)
    assert read_trainer_config(renamed).rank == 16


def test_unsupported_changes_to_a_file_are_refused(tmp_path) -> None:
    path = written(tmp_path / "config.yml", AXOLOTL)
    with pytest.raises(InputError, match=r"config\.yml"):
        write_trainer_config(path, path, advice_for(path))
    with pytest.raises(InputError, match=r"none is not a folder"):
        write_trainer_config(path, tmp_path / "none" / "new.yml", advice_for(path))
    measured = advice_for(path, regime={"model.layers.0.q_proj": 0.5, "model.layers.0.v_proj": 20.0})
    with pytest.raises(InputError, match=r"per .*got 'type'"):
        write_trainer_config(path, tmp_path / "new.yml", measured, per="type")


@pytest.mark.slow
def test_a_lora_config_of_peft_is_changed_by_the_advice() -> None:
    peft = pytest.importorskip("peft")
    old = peft.LoraConfig(r=16, lora_alpha=32, target_modules=["v_proj", "q_proj"], use_rslora=True, use_dora=True)
    advice = transfer(Setting(old.r, old.lora_alpha, 2e-4, "rslora"), 64)
    new = dataclasses.replace(old, **advice.lora_arguments())
    assert (new.r, new.lora_alpha, new.use_rslora) == (64, pytest.approx(128), False)
    changed = {name for name, value in new.to_dict().items() if old.to_dict()[name] != value}
    assert changed == {"r", "lora_alpha", "use_rslora"}
