"""One name for all commands: what it lists, hands over and refuses."""

import runpy
import shlex
import shutil
import subprocess
import sys

import pytest

from sims import __main__ as main
from sims.common import cli


def run(monkeypatch, *words: str, program: str = "rora") -> None:
    monkeypatch.setattr(cli, "PROGRAM", None)
    monkeypatch.setattr(sys, "argv", [f"/usr/bin/{program}", *words])
    for name in [name for name in sys.modules if name.startswith(("sims.", "figures."))]:
        if name.count(".") == 1 and "__main__" not in name:
            monkeypatch.delitem(sys.modules, name)  # a process of its own has not imported the command
    main.main()


def test_every_command_is_listed_with_its_sentence(monkeypatch, capsys) -> None:
    found = main.describe_commands("sims")
    assert {"transfer", "regime", "finetune", "variance_sweep", "rank_sweep", "horizon"} <= set(found)
    assert not {"common", "__main__"} & set(found)
    monkeypatch.setenv("COLUMNS", "80")
    assert all(says.endswith((".", "?")) for says in (*found.values(), *main.describe_commands("figures").values()))
    run(monkeypatch)
    shown = capsys.readouterr().out
    assert all(name in shown for name in (*found, "figures"))
    assert max(map(len, shown.splitlines())) <= 80
    run(monkeypatch, "figures")
    assert "norm_vs_rank" in capsys.readouterr().out


def test_it_is_the_command_of_that_name(monkeypatch, capsys) -> None:
    words = ["--from-rank", "16", "--to-rank", "128", "--lr", "2e-4"]
    run(monkeypatch, "transfer", *words)
    ours = capsys.readouterr().out
    assert "keep lora_alpha=16" in " ".join(ours.split())
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "variance-sweep", "--help")
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("usage: rora variance-sweep")
    with pytest.raises(SystemExit):
        run(monkeypatch, "figures", "exponent_map", "--help")
    assert capsys.readouterr().out.startswith("usage: rora figures exponent_map")


def test_what_is_no_command_is_refused_by_name(monkeypatch, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "transfre")
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert "'transfre'" in err
    assert "transfer, " in err
    run(monkeypatch, "--version")
    assert capsys.readouterr().out.startswith("rora-theory ")


def test_the_figures_by_themselves_list_the_commands(monkeypatch, capsys) -> None:
    def run_it(*words: str) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["figures", *words])
        monkeypatch.delitem(sys.modules, "figures.__main__", raising=False)  # where another test has imported it
        runpy.run_module("figures", run_name="__main__")
        return capsys.readouterr()

    out, err = run_it()
    assert err == ""
    assert "norm_vs_rank" in out
    with pytest.raises(SystemExit) as stop:
        run_it("transfre")
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    assert err.startswith("error: ")
    assert "'transfre'" in err
    assert err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="bash, to complete in")
def test_a_shell_completes_commands_and_options(monkeypatch, capsys, tmp_path) -> None:
    """As bash asks: words so far, of which the last is begun."""
    run(monkeypatch, "--print-completion", "bash")
    script = tmp_path / "rora.bash"
    script.write_text(capsys.readouterr().out)
    asked = {
        ("",): {*main.describe_commands("sims"), "figures"},
        ("tra",): {"transfer", "training_dynamics"},
        ("transfer", "--split", ""): {"train", "heldout"},
        ("rank_sweep", "--desig"): {"--design"},  # its description has more than one line
        ("figures", "norm_vs_rank", "--ou"): {"--out"},
        ("variance_sweep", "--conf"): {"--config"},
        ("transfer", "--optimizer", "ada"): {"adam", "adamw"},  # or the name of another library's optimizer
        ("transfer", "--to-rule", ""): {"lora", "rora", "rslora"},  # or a number
    }
    lines = [f"source {script}"]
    for words in asked:
        lines += [f"COMP_WORDS=(rora {' '.join(map(shlex.quote, words))}) COMP_CWORD={len(words)} COMPREPLY=()"]
        lines += ["_tyro_rora", 'echo "${COMPREPLY[@]}"']
    done = subprocess.run(["bash", "-c", "\n".join(lines)], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    found = [set(line.split()) - {"-h", "--help"} for line in done.stdout.splitlines()]
    assert found == list(asked.values())
    run(monkeypatch, "--print-completion", "zsh")
    assert capsys.readouterr().out.startswith("#compdef rora")
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "--print-completion", "fish")
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert all(word in err for word in ("--print-completion", "fish", "bash", "zsh"))
