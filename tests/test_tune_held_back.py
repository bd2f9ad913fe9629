"""The judgement of `tune` on cases that were kept apart: two cases of a tiny model, and the criterion."""

import json
import math
import shutil
import string

import pandas as pd
import pytest
from support import torch_chats, torch_models

pytest.importorskip("torch_lr_finder", reason="the extra peers")
from benchmarks import tune_held_back as judged
from rora_theory.stats.regret import loss_at

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers, peft and torch_lr_finder
CASES = (
    judged.Case("first", "small", "tiny", "lines.txt", 8, 16.0, 48, budget=0.5),
    judged.Case("second", "full", "tiny", "pairs.jsonl", 4, 64.0, 40, "constant", budget=0.5, seed=3),
)
LETTERS = "abcdefhij"


def records(count: int) -> list[str]:
    """Return lines that a model learns within a few steps: rotations of the letters."""
    return [(LETTERS * 4)[index % 9 : index % 9 + 12 + index % 5] for index in range(count)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return a folder with predictions, a tiny model and records."""
    monkeypatch.setattr(judged, "JUDGED", 16)
    monkeypatch.setattr(judged, "HELD_OUT", 16)
    monkeypatch.setattr(judged, "MAX_RATES", 6)
    torch_models.model().save_pretrained(tmp_path / "model")
    torch_chats.tokenizer("~").save_pretrained(tmp_path / "model")
    (tmp_path / "lines.txt").write_text("\n".join(records(120)) + "\n")
    pairs = [{"prompt": line[:4], "completion": line[4:]} for line in records(120)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    published = json.loads((judged.HELD_BACK / judged.PREDICTIONS).read_text())
    cases = [vars(case) for case in CASES]
    (tmp_path / judged.PREDICTIONS).write_text(json.dumps(published | {"cases": cases}))
    return tmp_path


@pytest.mark.slow
def test_two_cases_are_run_resumed_and_reported(folder, monkeypatch, capsys) -> None:
    words = ["run", "--models", f"tiny={folder / 'model'}", "--data", str(folder), "--out", str(folder)]
    monkeypatch.setattr("sys.argv", ["tune_held_back", *words])
    judged.main()
    monkeypatch.setattr(judged, "run_case", lambda _: pytest.fail("a finished case is run again"))
    judged.main()
    verdict = judged.report(folder)
    assert verdict["cases"] == {"small": 1, "full": 1}
    assert verdict["verdict"] == "undecided", "two cases are too few"
    table = pd.read_csv(folder / "held_back.csv")
    assert table["case"].tolist() == ["first", "second"]
    policies = ("prior", "tune", "fixed 0.0002", "fixed 0.0005", "fixed 0.0007", "range test")
    assert (table[list(policies)] >= 0).all(axis=None)
    assert verdict["mean"] == pytest.approx(table["tune"].mean())
    assert "range test" in capsys.readouterr().out
    assert set(pd.read_csv(folder / "policies.csv")["policy"]) == set(policies)
    # The regret is that of the measured curve.
    result = json.loads((folder / "cases" / "first.json").read_text())
    tokens = sum(result["tokens"])
    losses = [[math.inf if row is None else sum(row) / tokens for _, row in result["curve"]]]
    rates = [rate for rate, _ in result["curve"]]
    loss, _ = loss_at(judged.np.array(rates), judged.np.array(losses), result["rates"]["tune"])
    assert table["tune"][0] == pytest.approx(float(loss[0]) - min(losses[0]))
    assert result["rates"]["fixed 0.0005"] == pytest.approx(5e-4 * 4**0.75), "G is 16"
    assert judged.MIN_RATE < result["rates"]["range test"] < judged.MAX_RATE
    assert result["probe"]["cost"] <= 0.5
    assert len(result["probe"]["curve"]) >= 3


@pytest.mark.usefixtures("folder")
def test_the_range_test_leaves_the_model_as_it_was() -> None:
    model = torch_models.model()
    before = torch_models.state_of(model)
    runs = judged.CaseRuns(CASES[0], model, torch_chats.tokenizer("~"), records(120))
    first, second = (runs.range_test() for _ in range(2))
    assert first == pytest.approx(second)
    torch_models.assert_unchanged(model, before)


def test_no_policy_sees_the_records_on_which_it_is_judged() -> None:
    lines = [f"{letter}{number}" for letter in string.ascii_letters for number in range(10)]
    parts = judged.split_records(CASES[0], lines)
    assert [len(part) for part in parts] == [520 - 288, 96, 192]
    assert len(set().union(*map(set, parts))) == 520


@pytest.mark.parametrize(
    ("best", "limit", "ends"), [(1e-3, math.inf, (2.5e-4, 4e-3)), (1e-1, math.inf, None), (1e-3, 2e-3, None)]
)
def test_the_grid_is_extended_until_the_lowest_loss_lies_inside(best, limit, ends) -> None:
    def losses(rate):
        return None if rate > limit else [1 + math.log(rate / best) ** 2]

    curve = judged.measure_curve(losses, 1e-3)
    rates = list(curve)
    finite = {rate: row[0] for rate, row in curve.items() if row is not None}
    lowest = min(finite, key=finite.get)
    assert rates[0] < lowest < rates[-1]
    assert sum(row is None for row in curve.values()) <= 1, "nothing above a rate that diverged"
    if ends:
        assert (rates[0], rates[-1]) == pytest.approx(ends)


def outcomes(tune: float, prior: float, *, covers: float = 0.9, small: int = 20, full: int = 4) -> pd.DataFrame:
    kinds = ["small"] * small + ["full"] * full
    covered = [index < round(covers * len(kinds)) for index in range(len(kinds))]
    return pd.DataFrame({"kind": kinds, "tune": tune, "prior": prior, "tune covers": covered})


def test_the_criterion_can_fail() -> None:
    """Each clause by itself fails the claim; fewer cases than planned leave it undecided."""
    criterion, _ = judged.read_predictions(judged.HELD_BACK)
    assert judged.judge(outcomes(0.002, 0.005), criterion)["verdict"] == "holds"
    worst = outcomes(0.001, 0.005)
    worst.loc[0, "tune"] = 0.02
    failing = {
        "mean regret relative to the prior's": outcomes(0.003, 0.005),
        "mean regret": outcomes(0.006, 0.013),
        "largest regret": worst,
        "coverage": outcomes(0.002, 0.005, covers=1.0),
    }
    for clause, table in failing.items():
        verdict = judged.judge(table, criterion)
        assert verdict["verdict"] == "fails"
        assert [name for name, holds in verdict["clauses"].items() if not holds] == [clause]
    assert judged.judge(outcomes(0.002, 0.005, full=3), criterion)["verdict"] == "undecided"
    assert judged.judge(pd.DataFrame(), criterion)["verdict"] == "undecided"


def test_policies_are_compared_with_the_prior_case_by_case() -> None:
    """The difference has the error over cases, by Student's t; a rate is compared with the best one."""
    regrets = {"prior": [0.02, 0.03, 0.04], "tune": [0.01, 0.03, 0.05]}
    rates = {"prior": [1e-3, 2e-3, 4e-3], "tune": [4e-3, 2e-3, 1e-3]}
    table = pd.DataFrame({"vertex": [2e-3] * 3, "tune covers": [True, True, False]})
    table["tune covers vertex"] = [True, False, False]
    for name, values in regrets.items():
        table[name], table[f"{name}, rate"], table[f"{name}, bound"] = values, rates[name], False
    prior, tuned = judged.summarise(table).to_dict("records")
    assert prior["mean"] == pytest.approx(0.03)
    assert math.isnan(prior["minus_prior"])
    assert (tuned["minus_prior"], tuned["half_width"]) == pytest.approx((0, 4.303 * 0.01 / 3**0.5), rel=1e-3, abs=1e-12)
    assert tuned["better_than_prior"] == 1
    assert (prior["lowest_ratio"], prior["median_ratio"], prior["highest_ratio"]) == pytest.approx((0.5, 1, 2))
    assert (tuned["coverage"], tuned["vertex_coverage"]) == pytest.approx((2 / 3, 1 / 3))


def test_the_published_tables_and_verdict_are_those_of_the_published_cases(tmp_path) -> None:
    shutil.copytree(judged.HELD_BACK / "cases", tmp_path / "cases")
    shutil.copy(judged.HELD_BACK / judged.PREDICTIONS, tmp_path)
    verdict = judged.report(tmp_path)
    assert verdict == json.loads((judged.HELD_BACK / "verdict.json").read_text())
    for name in ("held_back.csv", "policies.csv", "changes.csv"):
        pd.testing.assert_frame_equal(pd.read_csv(tmp_path / name), pd.read_csv(judged.HELD_BACK / name))


def test_the_published_cases_are_kept_apart() -> None:
    """At least 20 of small models and 4 full runs, with names of their own, outside of the settings that were tuned."""
    _, cases = judged.read_predictions(judged.HELD_BACK)
    assert len({case.name for case in cases}) == len(cases)
    small = [case for case in cases if case.kind == "small"]
    assert (len(small) >= 20, len(cases) - len(small) >= 4) == (True, True)
    assert not {case.rank for case in small} & {2, 8, 64}, "ranks of the grid"
    assert not {case.alpha for case in small} & {4.0, 32.0, 256.0, 2048.0}, "gains of the grid"
