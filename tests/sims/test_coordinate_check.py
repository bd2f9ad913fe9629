"""The check as a command on a tiny checkpoint: rows, slopes, controls, going on, batches fixed or fresh, bad input."""

import csv
import itertools
import json
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from support import checkpoint

from figures import coordinate_check as figure
from figures import style
from rora_theory import scaling_factor
from rora_theory.data.batches import Batch
from rora_theory.llama import load
from rora_theory.llama.weights import save_hf
from rora_theory.measure.coordinate_table import Coordinate
from rora_theory.measure.coordinates import Checker
from rora_theory.measure.rank_check import Case, CheckConfig, cases, cell_rows, fits
from sims import coordinate_check as sim
from sims.common.cells import CELLS

ARGUMENTS = (
    "--ranks 2 4 16 --rules lora --optimizers adamw --targets q_proj down_proj --steps 1 3 --seeds 8 --batch 2 "
    "--held-out 6 --cutoff 160 --template clean --adam-rate 1e-5 --band 0.35"
)
SMALL = ARGUMENTS.split()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return checkpoint.model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return checkpoint.records(tmp_path_factory.mktemp("data") / "train.json", 40)


@pytest.fixture(scope="module")
def finished(model, data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("check") / "run"
    sim.main(["--data", str(data), "--model", str(model), *SMALL, "--out", str(out)])
    return out


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def verdict(finished, **wanted):
    rows = [r for r in rows_of(finished / "slopes.csv") if all(r[name] == value for name, value in wanted.items())]
    assert len(rows) == 1
    return float(rows[0]["slope"]), rows[0]["verdict"]


def test_rules_and_controls(finished):
    """alpha/r is flat under AdamW at the first step; kappa = 0 grows by one power more, and gaussian A shrinks."""
    wanted = {"split": "train", "step": "1", "quantity": "output"}
    for module in ("self_attn.q_proj", "mlp.down_proj", "model"):
        slope, found = verdict(finished, rule="lora", init="kaiming_uniform", module=module, **wanted)
        assert found == "flat"
        unscaled, found = verdict(finished, rule="0", module=module, **wanted)
        assert found == "grows"
        assert unscaled - slope == pytest.approx(1, abs=0.02)  # gamma enters the first Adam step once
        assert verdict(finished, init="gaussian", module=module, **wanted)[1] == "shrinks"


def test_rows(finished, model):
    rows = rows_of(finished / "results.csv")
    assert tuple(rows[0]) == sim.COLUMNS
    # Of each of 2 modules: 2 gradients, output and inner on two splits, delta; of the model 3 on two splits.
    assert len(rows) == 3 * 8 * 3 * 2 * (2 * (2 + 4 + 1) + 6)
    assert {row["control"] for row in rows if row["rule"] == "0" or row["init"] == "gaussian"} == {"1"}
    for row in rows:
        assert float(row["scaling"]) == pytest.approx(2 * (8 / int(row["rank"])) ** float(row["kappa"]))
    manifest = json.loads((finished / "manifest.json").read_text())
    assert manifest["config"]["model"] == model.name
    assert str(model.parent) not in json.dumps(manifest["config"])


class Watching(Checker):
    """In a checker's place: keeps what a cell asks of it and measures nothing."""

    def __init__(self) -> None:
        pass

    def run(self, setting, key, batch_of, held_out, *, steps):
        self.asked = {
            "setting": setting,
            "key": jax.random.key_data(key).tolist(),
            "held_out": held_out,
            "steps": steps,
        }
        self.asked["batches"] = [batch_of(step) for step in range(3)]
        yield Coordinate("loss", "train", "model", 1), 1.25


def batch_of(token: int) -> Batch:
    tokens = np.full((1, 1), token, np.int32)
    return Batch(tokens, tokens, np.ones((1, 1), np.float32), None)


def test_what_a_cell_asks_for():
    """One A a seed, the same for all ranks and rules; each seed's own batches; each optimizer's own rate."""
    config = CheckConfig(adam_rate=1.0, sgd_rate=2.0, momentum_rate=3.0, gamma=5.0, reference_rank=4)
    keys = set()
    for seed in range(3):
        own = set()
        for optimizer, rate in {"adamw": 1.0, "adam": 1.0, "sgd": 2.0, "momentum": 3.0}.items():
            for rule, rank in itertools.product(("lora", "rora"), (2, 16)):
                checker = Watching()
                case = Case(optimizer, rule, "gaussian", False)
                held_out = batch_of(seed)
                (row,) = cell_rows(config, checker, case, seed, rank, partial("{}.{}".format, seed), held_out)
                asked = checker.asked
                own.add(tuple(asked["key"]))
                assert asked["batches"] == [f"{seed}.{step}" for step in range(3)]
                assert asked["held_out"] is held_out
                assert asked["steps"] == config.steps
                setting = asked["setting"]
                assert (setting.rank, setting.rule, setting.init, setting.optimizer) == (
                    rank,
                    rule,
                    "gaussian",
                    optimizer,
                )
                assert setting.learning_rate == row["learning_rate"] == rate
                gamma = 5 * (4 / rank) ** {"lora": 1, "rora": 0.5}[rule]
                assert scaling_factor(rule, alpha=setting.alpha, rank=rank) == row["scaling"] == pytest.approx(gamma)
                assert (row["rank"], row["seed"], row["rule"], row["quantity"], row["value"]) == (
                    rank,
                    seed,
                    rule,
                    "loss",
                    1.25,
                )
        assert len(own) == 1
        keys |= own
    assert len(keys) == 3


@pytest.mark.parametrize(("optimizer", "power"), [("adamw", 1), ("adam", 1), ("sgd", 2), ("momentum", 2)])
def test_the_exponent_that_would_have_been_flat(optimizer, power):
    """A change as gamma^p r^(1/2): with gamma = alpha / r^kappa its slope is 1/2 - p kappa, and kappa = 1/(2p) is flat.

    Ranks in no order; two modules, whose outputs are averaged in the logarithm; two seeds a factor apart.
    """
    config = CheckConfig(
        ranks=(32, 2, 8), rules={"lora": "lora"}, optimizers=(optimizer,), controls=False, steps=(1,), seeds=2
    )
    frame = {"optimizer": optimizer, "rule": "lora", "init": "kaiming_uniform", "step": 1, "split": "train"}
    rows = []
    for rank, seed in itertools.product(config.ranks, range(2)):
        own = frame | {"rank": rank, "seed": seed}
        value = (1 + seed) * rank ** (0.5 - power)
        rows += [own | {"module": "a", "quantity": "output", "value": value * rank**0.2}]
        rows += [own | {"module": "b", "quantity": "output", "value": 9 * value * rank**-0.2}]
        rows += [own | {"module": "model", "quantity": "hidden", "value": value}]
        rows += [
            own | {"module": "a", "quantity": "inner", "value": 1.0},
            own | {"module": "a", "quantity": "grad_A", "value": 0.0},
        ]
        rows += [own | {"module": "model", "quantity": "loss", "value": 2.0}]
    found = {(row["quantity"], row["module"]): row for row in fits(config, rows)}
    assert found.keys() == {("output", "a"), ("output", "b"), ("output", "model"), ("hidden", "model"), ("inner", "a")}
    for key, more in (
        (("output", "a"), 0.2),
        (("output", "b"), -0.2),
        (("output", "model"), 0.0),
        (("hidden", "model"), 0.0),
    ):
        assert found[key]["slope"] == pytest.approx(0.5 - power + more, abs=1e-4)
        assert found[key]["kappa_flat"] == pytest.approx((0.5 + more) / power, abs=1e-3)
        assert found[key]["verdict"] == "shrinks"
    assert "kappa_flat" not in found["inner", "a"]
    assert found["inner", "a"]["verdict"] == "flat"
    gone = [row | {"value": float("nan")} if row["quantity"] == "hidden" else row for row in rows]
    assert {row["module"]: row["verdict"] for row in fits(config, gone) if row["quantity"] == "hidden"} == {
        "model": "diverged"
    }


def test_controls_are_what_was_not_asked_for():
    def made(**more) -> list[tuple]:
        return [tuple(case) for case in cases(sim.check(sim.Config(data=(), **more)))]

    plain = [(o, r, "kaiming_uniform", False) for o in ("adamw", "sgd") for r in ("lora", "rora")]
    assert made(controls=False) == plain
    assert made() == [*plain, ("adamw", "0", "kaiming_uniform", True), ("adamw", "lora", "gaussian", True)]
    assert made(rules=("0.25", "0.0"))[-1] == ("adamw", "0.25", "gaussian", True)
    assert not any(case[3] for case in made(rules=("0",), inits=("kaiming_uniform", "gaussian")))


def test_goes_on_and_refuses_another_model(finished, model, data, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "manifest.json").write_bytes((finished / "manifest.json").read_bytes())
    lines = (finished / CELLS).read_text().splitlines(keepends=True)
    (out / CELLS).write_text("".join(lines[:-2]))
    command = ["--data", str(data), "--model", str(model), *SMALL, "--out", str(out)]
    sim.main(command)
    for name in ("results.csv", "slopes.csv"):
        assert (out / name).read_bytes() == (finished / name).read_bytes()
    other = tmp_path / model.name
    loaded = load(model)
    save_hf(other, jax.tree.map(lambda a: 2 * a, loaded.params), loaded.config, tokenizer_from=model)
    with pytest.raises(SystemExit) as stopped:
        sim.main(["--data", str(data), "--model", str(other), *SMALL, "--out", str(out)])
    assert stopped.value.code == 2


def test_fresh_batches(model, data):
    """Fixed: one batch in every step; fresh: another in each; no held-out record is trained on."""
    loaded = load(model)
    records = sim.read_records([str(data)])
    found = {}
    for kind in ("fixed", "fresh"):
        config = sim.Config(data=(str(data),), batches=kind, batch=2, held_out=6, cutoff=160, template="clean", seeds=2)
        found[kind] = sim.prepare(config, records, loaded)
    fixed, fresh = found["fixed"], found["fresh"]
    np.testing.assert_array_equal(fixed.batch(0, 0).inputs, fixed.batch(0, 3).inputs)
    assert not np.array_equal(fresh.batch(0, 0).inputs, fresh.batch(0, 3).inputs)
    assert not np.array_equal(fixed.batch(0, 0).inputs, fixed.batch(1, 0).inputs)
    trained = {row.tobytes() for step in range(17) for row in fresh.batch(0, step).inputs}
    assert len(trained) == 34
    for row, weights in zip(fresh.held_out[0].inputs, fresh.held_out[0].weights, strict=True):
        assert row.tobytes() not in trained
        first = int(np.argmax(weights))  # what is read begins where the prompt's common opening ends
        assert any(row[:first].tobytes() == other[: first * row.itemsize] for other in trained)
        assert not any(row[: first + 1].tobytes() == other[: (first + 1) * row.itemsize] for other in trained)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("--ranks 4", "--ranks"),
        ("--ranks 2 64", "rank"),
        ("--rules lora lora", "--rules"),
        ("--seeds 1", "--seeds"),
        ("--steps 0", "steps"),
        ("--sgd-rate -1", "--sgd-rate"),
        ("--held-out 40", "validation"),
        ("--model nowhere/at/all", "nowhere/at/all"),
        ("--targets z_proj", "z_proj"),
    ],
)
def test_bad_input(arguments, named, model, data, tmp_path, capsys):
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as stopped:
        sim.main(["--data", str(data), "--model", str(model), *SMALL, *arguments.split(), "--out", str(out)])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert named in error
    assert not out.exists()


def test_figures(finished, tmp_path, capsys):
    style.main(figure.draw, figure.Config(finished, out=tmp_path))
    assert len(capsys.readouterr().out.split()) == 4
    assert all(path.stat().st_size > 5000 for path in tmp_path.iterdir())


def published() -> tuple[sim.Config, list[dict]]:
    """The published run on SmolLM2-135M: its settings and slopes."""
    folder = Path(__file__).parents[2] / "results" / "published" / "coordinate_check"
    config = json.loads((folder / "manifest.json").read_text())["config"]
    names = ("band", "batches", "controls", "inits", "optimizers", "ranks", "rules", "seeds", "steps")
    settings = {name: tuple(config[name]) if isinstance(config[name], list) else config[name] for name in names}
    numbers = ("step", "slope", "half_width", "kappa_flat")
    rows = [
        row | {"step": int(row["step"])} | {name: float(row[name]) for name in numbers if row[name]}
        for row in rows_of(folder / "slopes.csv")
    ]
    return sim.Config(data=(), **settings), [row | {"step": int(row["step"])} for row in rows]


def verdicts_of(config, rows, monkeypatch) -> dict[str, list[str]]:
    """The rows of the table of verdicts, by rule."""
    tables = []
    monkeypatch.setattr(sim.tables, "print_table", lambda title, columns, rows, **_: tables.append((title, list(rows))))
    sim.report(config, sim.check(config), rows, [])
    title, found = tables[-1]
    assert title.startswith("Verdicts")
    return {row[0]: [*row[1:3], row[7]] for row in found}


def test_the_verdict_is_on_the_whole_model(monkeypatch):
    """The rule that keeps the model's hidden states and logits is called flat, whatever its modules' own outputs do."""
    config, rows = published()
    found = verdicts_of(config, rows, monkeypatch)
    whole, own, kappa = found["AdamW, alpha/r, A kaiming_uniform"]
    assert (whole, kappa) == ("flat", "1.00")
    assert own.startswith("mixed (")
    assert "shrinks" in own
    assert found["SGD, alpha/sqrt(r), A kaiming_uniform"][0] == "flat"
    assert found["AdamW, alpha/sqrt(r), A kaiming_uniform"][0] == "grows with the rank"
    assert found["SGD, alpha/r, A kaiming_uniform"][0] == "shrinks with the rank"
    controls = {name: row[0] for name, row in found.items() if name.endswith("(control)")}
    assert list(controls.values()) == [
        "grows with the rank, as a control must",
        "shrinks with the rank, as a control must",
    ]


def test_one_slope_that_is_not_flat_is_enough(monkeypatch):
    """Of the hidden states or of the logits, on either split, at any step; a control that is flat has no power."""
    config, rows = published()
    own = [row for row in rows if (row["optimizer"], row["rule"], row["control"]) == ("adamw", "lora", "0")]
    for quantity, split, step in (("hidden", "train", 2), ("logits", "held_out", 10)):
        (chosen,) = [row for row in own if (row["quantity"], row["split"], row["step"]) == (quantity, split, step)]
        others = [row for row in rows if row is not chosen]
        found = verdicts_of(config, [*others, chosen | {"verdict": "undecided"}], monkeypatch)
        assert found["AdamW, alpha/r, A kaiming_uniform"][0] == "mixed (15 flat, 1 undecided)"
    flat = [row | {"verdict": "flat"} if row["rule"] == "0" else row for row in rows]
    found = verdicts_of(config, flat, monkeypatch)
    assert found["AdamW, kappa = 0, A kaiming_uniform (control)"][:2] == ["FLAT: the check has no power"] * 2


def test_the_figure_has_the_table_s_intervals():
    """Half of the 95% interval, as stored and printed."""
    config, rows = published()
    manifest = {"config": {"model": "m", "batches": config.batches, "seeds": config.seeds, "band": config.band}}
    text = [{name: str(value) for name, value in row.items()} for row in rows]
    drawn = figure.exponents(manifest, text)
    bars = drawn.axes[0].containers[0]  # the first case, trained on, the first module
    own = [row for row in rows if row["split"] == "train" and row["module"] == "self_attn.q_proj"]
    own = [row for row in own if row["quantity"] == "output"][: len(config.steps)]
    half = [(high - low) / 2 for (_, low), (_, high) in bars[2][0].get_segments()]
    np.testing.assert_allclose(half, [row["half_width"] for row in own], rtol=1e-9)
