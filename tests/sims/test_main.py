"""The command `rora`: its list of commands, their arguments, and refused names."""

import re
import runpy
import sys

import pytest

from sims import __main__ as main


def run_main(monkeypatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/rora", *words])
    for name in [name for name in sys.modules if name.startswith(("sims.", "figures."))]:
        if name.count(".") == 1 and "__main__" not in name:
            monkeypatch.delitem(sys.modules, name)  # a process of its own has not imported the command
    main.main()


def test_every_command_is_listed_with_its_sentence(monkeypatch, capsys) -> None:
    listed = main.describe_commands("sims")
    assert {"transfer", "regime", "finetune", "variance_sweep", "sweep"} <= set(listed)
    assert not {"common", "__main__"} & set(listed)
    monkeypatch.setenv("COLUMNS", "80")
    assert all(says.endswith((".", "?")) for says in (*listed.values(), *main.describe_commands("figures").values()))
    run_main(monkeypatch)
    shown = capsys.readouterr().out
    assert all(name in shown for name in (*listed, "figures"))
    assert max(map(len, shown.splitlines())) <= 80
    run_main(monkeypatch, "figures")
    assert "norm_vs_rank" in capsys.readouterr().out


def test_a_name_runs_its_command(monkeypatch, capsys) -> None:
    run_main(monkeypatch, "transfer", "--from-rank", "16", "--to-rank", "128", "--lr", "2e-4")
    assert "keep lora_alpha=16" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(SystemExit, match="0"):
        run_main(monkeypatch, "variance-sweep", "--help")
    assert capsys.readouterr().out.startswith("usage: python -m sims.variance_sweep")
    with pytest.raises(SystemExit):
        run_main(monkeypatch, "figures", "exponent_map", "--help")
    assert capsys.readouterr().out.startswith("usage: python -m figures.exponent_map")


def test_an_unknown_command_is_refused_by_name(monkeypatch, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        run_main(monkeypatch, "transfre")
    err = capsys.readouterr().err
    assert re.match("error: .*'transfre'.* transfer, ", err)
    run_main(monkeypatch, "--version")
    assert capsys.readouterr().out.startswith("rora-theory ")


def test_figures_without_a_name_lists_the_commands(monkeypatch, capsys) -> None:
    def run_figures(*words: str) -> None:
        monkeypatch.setattr(sys, "argv", ["figures", *words])
        monkeypatch.delitem(sys.modules, "figures.__main__", raising=False)  # where another test has imported it
        runpy.run_module("figures", run_name="__main__")

    run_figures()
    out, err = capsys.readouterr()
    assert (err, "norm_vs_rank" in out) == ("", True)
    with pytest.raises(SystemExit, match="2"):
        run_figures("transfre")
    out, err = capsys.readouterr()
    assert re.fullmatch("error: .*'transfre'.*\n", err)
    assert out == ""
