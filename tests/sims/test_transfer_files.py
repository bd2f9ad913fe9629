"""`python -m sims.transfer --from FILE --write FILE`: configuration files of trainers."""

import json

import pytest
import yaml

from rora_theory.advice.setting import Setting
from rora_theory.measure.transfer_request import TransferConfig, advise
from sims import transfer

AXOLOTL = """\
base_model: a/model  # the base
adapter: lora
lora_r: 16
lora_alpha: 32
lora_target_modules: [q_proj, v_proj]
optimizer: sgd
learning_rate: 2e-4
"""


def test_the_setting_is_that_of_the_file(tmp_path) -> None:
    """The learning rate and the optimizer too; the same value given twice is accepted, another is refused."""
    path = tmp_path / "config.yml"
    path.write_text(AXOLOTL)
    advice, peft, _ = advise(TransferConfig(from_=path, lr=2e-4))
    assert advice.old == Setting(16, 32.0, 2e-4, "lora", "sgd")
    assert peft["target_modules"] == ["q_proj", "v_proj"]
    for given, message in (
        ({"lr": 1e-4}, r"--lr .*0\.0001.* 0\.0002"),
        ({"optimizer": "adam"}, "--optimizer .*adam.* sgd"),
    ):
        with pytest.raises(transfer.InputError, match=message):
            advise(TransferConfig(from_=path, **given))


def test_the_tuned_run_is_that_of_the_file_where_the_new_run_is_another(tmp_path) -> None:
    path = tmp_path / "config.yml"
    path.write_text(AXOLOTL.replace("sgd", "adamw_8bit") + "max_steps: 64\nlr_scheduler: constant\n")
    given = TransferConfig(from_=path, to_alpha=256.0, to_steps=256, to_schedule="constant")
    stated = TransferConfig(
        from_rank=16, alpha=32.0, lr=2e-4, to_alpha=256.0,
        steps=64, to_steps=256, schedule="constant", to_schedule="constant",
    )  # fmt: skip
    assert advise(given).advice.learning_rate == pytest.approx(advise(stated).advice.learning_rate)
    path.write_text(AXOLOTL.replace("sgd", "adamw_8bit"))
    with pytest.raises(transfer.InputError, match="steps must"):
        advise(TransferConfig(from_=path, to_steps=256))


def test_a_file_is_written_in_its_own_format(tmp_path, capsys) -> None:
    path, out = tmp_path / "config.yml", tmp_path / "new.yml"
    path.write_text(AXOLOTL.replace("sgd", "adamw_8bit"))
    transfer.main(["--from", str(path), "--to-rank", "64", "--write", str(out), "--json"])
    answer = json.loads(capsys.readouterr().out)
    assert answer["files"] == [str(out)]
    assert out.read_text() == path.read_text().replace("lora_r: 16", "lora_r: 64")
    assert answer["lora_alpha"] == yaml.safe_load(out.read_text())["lora_alpha"]


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("model: x\n", [], "config.yml: the format"),
        (AXOLOTL, ["--write", "{folder}/config.yml"], "config.yml: the file exists"),
        (AXOLOTL, ["--to-rule", "rslora", "--to-alpha", "7.5", "--write", "{folder}/new.yml"], "integer lora_alpha"),
        (None, ["--write", "{folder}/new.yml"], "--write"),
    ],
)
def test_a_wrong_file_ends_with_one_line_and_status_2(tmp_path, capsys, text, options, message) -> None:
    words = [option.format(folder=tmp_path) for option in options]
    if text is not None:
        (tmp_path / "config.yml").write_text(text)
        words += ["--from", str(tmp_path / "config.yml")]
    with pytest.raises(SystemExit) as stopped:
        transfer.main(words)
    out, error = capsys.readouterr()
    assert (stopped.value.code, out, error.count("\n")) == (2, "", 1)
    assert message in error
    assert not (tmp_path / "new.yml").exists()
