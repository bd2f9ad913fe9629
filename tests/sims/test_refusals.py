"""Bad input that a command refuses by its own checks: one line and status 2, before it writes anything.

`tests/test_bad_input.py` tests the values that every option of a type refuses, and
`tests/validation/test_configurations.py` those that the configurations of the library refuse.
"""

import importlib
import re
from pathlib import Path

import pytest
from support import commands

BASE = {
    "coordinate_check": "--model MODEL --data TRAIN --ranks 2 4 --held-out 6",
    "evaluate": "--model MODEL --data-dir DATA --tasks boolq piqa",
    "finetune": "--model MODEL --data TRAIN --rank 2 --alpha 4 --batch-size 8 --held-out 8 --template clean --warmup 2",
    "lr_transfer": "",
    "pretrain": "--data TRAIN --context 16 --held-out 4 --batch-size 4",
    "prune": "--model MODEL --text TRAIN --share 0.85 --windows 10 --held-out 3 --seq 32",
    "sweep": "--accuracy --model MODEL --data ONE TWO --batch-size 4 --steps 3 --warmup 1 --held-out 6 "
    "--train-records 12 --tasks boolq piqa --data-dir DATA",
    "regime": "--model MODEL --data TRAIN --batch-size 4 --held-out 4 --targets q_proj down_proj --ranks 1 4 16",
    "transfer": "",
}
"""Words of each command that are right."""

CASES = [
    ("coordinate_check", "--held-out 40", "--held-out .* 40, got 40"),
    ("coordinate_check", "--model nowhere/at/all", "nowhere/at/all"),
    ("coordinate_check", "--targets z_proj", "z_proj"),
    ("coordinate_check", "--targets q_proj q_proj", "--targets .*q_proj q_proj"),
    ("evaluate", "--tasks piqa piqa", "tasks .* piqa piqa"),
    ("evaluate", "--adapter /nowhere", "--adapter .*/nowhere"),
    ("evaluate", "--adapter DATA", "adapter_config.json"),
    ("evaluate", "--model /nowhere", "/nowhere: no such path"),
    ("evaluate", "--protocol label --num-beams 8", "--num-beams 8 .* --protocol label"),
    ("evaluate", "--protocol harness --max-new-tokens 8", "--max-new-tokens 8 .* --protocol harness"),
    ("finetune", "--held-out 40", "--held-out .* 40, got 40"),
    ("finetune", "--model TRUNCATED", "TRUNCATED"),
    ("finetune", "--model nowhere", "nowhere"),
    ("finetune", "--rank 17", "rank .* 16 at model.layers.0"),
    ("finetune", "--targets w_proj", "'w_proj', which matches no module"),
    ("finetune", "--warmup 99 --steps 2", "warmup .* 2, got 99"),
    ("finetune", "--warmup 12 --epochs 3", "warmup .* 12, got 12"),
    ("finetune", "--method dora --serve-as portable", "--serve-as portable .* dora"),
    ("sweep", "--ranks 2 999", "rank .* 16 at model.layers.0.* 999"),
    ("sweep", "--targets z_proj", "'z_proj'"),
    ("sweep", "--warmup 9", "warmup .* 3, got 9"),
    ("sweep", "--axes depth=3", "axes .*'depth'"),
    ("sweep", "--gains 4 --methods rora", "--gains .*RoRA"),
    ("pretrain", "--data BLANK.txt", "BLANK.txt: is empty"),
    ("pretrain", "--heads 3", "hidden-size .* 3, got 128"),
    ("pretrain", "--held-out 4000", "at least 4001 windows"),
    ("pretrain", "--accumulation 3", "accumulation .* 4, got 3"),
    ("prune", "--text BLANK.txt", "BLANK.txt: is empty"),
    ("prune", "--windows 1000", "at least 1003 windows"),
    ("prune", "--share 0.1", "share .*0.1"),
    ("prune", "--seq 600", "--seq .* 512.* 600"),
    ("sweep", "--ranks 64", "64"),
    ("sweep", "--held-out 100", "records to hold out"),
    ("sweep", "--data-dir none", "none"),
    ("sweep", "--warmup 3", "warmup .* 3, got 3"),
    ("regime", "--layers 0 0", "--layers .* 0 0"),
    ("regime", "--targets q_proj q_proj", "--targets .* q_proj q_proj"),
    ("regime", "--targets c_proj", "target_modules .*'c_proj'"),
    ("regime", "--batch-size 39", "at least 43 records .* 40"),
    ("regime", "--adapter missing", "--adapter .* missing"),
    ("regime", "--data SAME.json --rows 0", r"all \d+ held-out tokens .* mask off"),
    ("transfer", "--rule 400", "400.0"),
    ("transfer", "--check smollm2-135m", "--check .* smollm2-135m"),
    ("transfer", "--check smollm2-135m none.json", "none.json: no such file"),
    ("transfer", "--check smollm2-135m none.json --seeds 1", "--seeds .* 1"),
    ("transfer", "--targets q_proj,v_proj", "'q_proj,v_proj'"),
    ("transfer", "--targets q_proj all-linear", "'all-linear' in 'q_proj all-linear'"),
    ("transfer", "--targets", "empty list"),
    ("transfer", "--check-batch-size 4", "--check-batch-size 4 .* --check"),
    ("transfer", "--seeds 0 1", "--seeds 0 1 .* --check"),
    ("transfer", "--seed 1", "--seed 1 .* --check"),
    ("transfer", "--out new", "--out new .* --check"),
    ("transfer", "--format text", "--format text .* --check"),
    ("transfer", "--regime REGIME --targets q_proj o_proj", "--targets .*o_proj.* q_proj down_proj"),
    ("transfer", "--write new.yml", "--write"),
    ("transfer", "--from nowhere", "nowhere: no such file"),
]
"""Command, invalid options, and pattern of the error message."""


@pytest.fixture
def place(model, data, regime_run, tmp_path, monkeypatch) -> dict[str, str]:
    """Return a working directory with invalid files, and the paths for the placeholders in capitals."""
    for name, content in {
        "SAME.json": "[" + ", ".join(['{"instruction": "Say it.", "output": "It."}'] * 8) + "]",
        "BLANK.txt": " \n",
    }.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "TRUNCATED").mkdir()
    for file in model.iterdir():
        content = file.read_bytes()
        (tmp_path / "TRUNCATED" / file.name).write_bytes(content[:-100] if file.suffix == ".safetensors" else content)
    monkeypatch.chdir(tmp_path)
    paths = {"MODEL": model, "DATA": data, "TRAIN": data / "train.json", "REGIME": regime_run}
    paths |= {"ONE": data / "one" / "train.json", "TWO": data / "two" / "train.json"}
    return {word: str(path) for word, path in paths.items()}


@pytest.mark.parametrize(("command", "words", "message"), CASES)
def test_bad_input_is_one_line_before_anything_is_written(command, words, message, place) -> None:
    main = importlib.import_module(f"sims.{command}").main
    arguments = [place.get(word, word) for word in f"{BASE[command]} {words}".split()]
    ended = commands.run_command(main, *arguments, "" if command == "transfer" else "--out run")
    assert re.search(message, commands.refusal(ended))
    assert not ended.out or command != "transfer"
    assert not Path("run").exists()
