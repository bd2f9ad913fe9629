"""`python -m sims.evidence`: tables and figures of the public sweeps without a network, and a user's own sweep."""

import json
import socket
from pathlib import Path

import pytest
from support import commands

from rora_theory.evidence import source_tables
from sims import evidence

OWN = """model,rank,alpha,rule,learning_rate,loss,steps,seed,comment
mine,8,16,lora,1e-4,1.10,300,0,a
mine,8,16,lora,3e-4,1.05,300,0,b
mine,8,16,lora,1e-3,1.08,300,0,c
mine,8,16,lora,3e-3,,300,0,diverged
mine,64,128,lora,3e-5,1.09,300,0,d
mine,64,128,lora,1e-4,1.04,300,0,e
mine,64,128,lora,3e-4,1.06,300,0,f
"""


@pytest.mark.slow
def test_the_public_sweeps_need_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the command opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("COLUMNS", "80")
    text = commands.output(commands.run_command(evidence.main, "--out", tmp_path / "run"))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    for title in ("Tinker, 35 models", "Qwen2.5-7B, alpha = r", "Qwen3-4B", "Apertus"):
        assert any(line.startswith(title) for line in lines)
    # The sentence at the end states what the tables have.
    end = " ".join(text[text.index("In public runs") : text.index("files in")].split())
    policies = {
        (row["source"], row["policy"]): float(row["mean"])
        for row in commands.rows(tmp_path / "run" / "policies.csv")
        if row["pairs_of"] == "all ranks"
    }
    for key in (("tinker", "keep the rate"), ("tinker", "advice, left out"), ("qwen2.5-7b", "advice")):
        assert f"{policies[key]:.4f}" in end
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["answer"].startswith("In public runs")


def test_a_users_own_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    path = tmp_path / "runs.csv"
    path.write_text(OWN)
    text = commands.output(commands.run_command(evidence.main, "--add", path, "--out", tmp_path / "run"))
    best = commands.rows(tmp_path / "run" / "best_rates.csv")
    assert [(row["rank"], row["gain"], row["place"]) for row in best] == [
        ("8", "16.0", "inside"),
        ("64", "128.0", "inside"),
    ]
    costs = commands.rows(tmp_path / "run" / "results.csv")
    (row,) = (row for row in costs if row["policy"] == "advice" and row["rank"] == "64")
    assert f"{float(row['learning_rate']):.3g}" in text
    assert f"{float(row['regret']):.4f} nats per token" not in text  # the sentence has the mean over both directions
    pairs = [float(row["regret"]) for row in costs if row["policy"] == "advice"]
    assert f"would have cost {sum(pairs) / 2:.4f}" in " ".join(text.split())


def test_without_two_best_rates_the_answer_says_what_to_add(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_text("\n".join(OWN.splitlines()[:5]) + "\n")
    text = " ".join(
        commands.output(commands.run_command(evidence.main, "--add", path, "--out", tmp_path / "run")).split()
    )
    assert "1 of 1 best rates lies inside" in text
    assert "Add learning rates" in text


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("learning_rate,", "lr,", ("'learning_rate'",)),
        ("mine,8,16,lora,3e-4,1.05", "mine,8,16,lora,3e-4,low", ("line 3", "loss", "'low'")),
        ("mine,8,16,lora,3e-4,1.05", "mine,8,16,dora,3e-4,1.05", ("line 3", "rule", "'dora'")),
        ("mine,8,16,lora,3e-4,1.05,300", "mine,8,16,lora,3e-4,1.05,0", ("line 3", "steps", "'0'")),
        ("mine,8,16,lora,3e-4,1.05,300,0,b", "mine,8,16,lora,3e-4", ("line 3",)),
    ],
)
def test_bad_columns_and_values_are_named_in_one_line(
    tmp_path: Path, old: str, new: str, words: tuple[str, ...]
) -> None:
    path = tmp_path / "runs.csv"
    path.write_text(OWN.replace(old, new))
    line = commands.refusal(commands.run_command(evidence.main, "--add", path, "--out", tmp_path / "run"))
    assert all(word in line for word in ("runs.csv", *words))
    assert not (tmp_path / "run").exists()


def test_too_few_rates_and_needless_options_are_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_tables, "sweep_tables", lambda *_: pytest.fail("a table is computed"))
    path = tmp_path / "runs.csv"
    path.write_text("\n".join(OWN.splitlines()[:3]) + "\n")
    assert "three learning rates" in commands.refusal(commands.run_command(evidence.main, "--add", path))
    assert "--originals" in commands.refusal(
        commands.run_command(evidence.main, "--add", path, "--originals", tmp_path)
    )
    assert "tmp" in commands.refusal(
        commands.run_command(evidence.main, "--originals", tmp_path, "--out", tmp_path / "run")
    )
    assert not (tmp_path / "run").exists()
