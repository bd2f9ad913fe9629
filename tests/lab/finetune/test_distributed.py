"""Two processes joined by JAX's runtime take the steps of one; a failure to join is one line."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from support import tiny, two_processes

from rora_theory.errors import InputError
from rora_theory.lab.finetune import FinetuneConfig, distributed
from rora_theory.lab.finetune.distributed import ProcessConfig
from rora_theory.lab.finetune.outputs import OutputConfig
from rora_theory.lab.llama.weights import save_hf

TESTS = Path(__file__).parents[2]
SCRIPT = TESTS / "support" / "two_processes.py"


@pytest.mark.slow
def test_two_processes_compute_the_steps_of_one(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(TESTS.parent), str(TESTS)))}
    save_hf(tmp_path / "model", tiny.params(), tiny.CONFIG)
    command = [sys.executable, str(SCRIPT), str(tmp_path / "model"), str(tmp_path / "two"), f"localhost:{port}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    children = [subprocess.Popen([*command, str(number)], env=environment, **pipes) for number in range(2)]
    try:
        expected = two_processes.train(tmp_path / "one", tiny.params())  # on one device, meanwhile
        outputs = [child.communicate(timeout=240) for child in children]
    finally:
        for child in children:
            child.kill()
            child.communicate()
    if any("gloo" in error.lower() and "not available" in error.lower() for _, error in outputs):
        pytest.skip("this jaxlib has no gloo collectives for the CPU")
    assert [child.returncode for child in children] == [0, 0], outputs
    # Gloo prints its own lines before.
    reports = [[line for line in out.splitlines() if line.startswith("{")] for out, _ in outputs]
    assert [len(lines) for lines in reports] == [1, 0], "the first process alone reports"
    report = json.loads(reports[0][0])
    assert (report["several"], report["processes"], report["devices"]) == (True, 2, 4)
    assert report["parts"] == [[2, 6, 16]] * 2, "each process holds its part of the weights"
    # Sums over rows and devices in another order: float32 roundings, 6e-8 each, of losses near log 128.
    np.testing.assert_allclose(report["losses"], expected, rtol=2e-6)
    assert len(expected) == 3 + 2
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == sorted(p.name for p in (tmp_path / "one").iterdir())


def test_a_single_process_does_not_connect():
    assert ProcessConfig().join() is False
    assert distributed.is_first()


def test_options_are_those_of_jax(monkeypatch):
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **_: calls.append(args))
    ProcessConfig(distributed=True).join()
    ProcessConfig(False, "host:1", 4, 3).join()
    assert calls == [(None, None, None), ("host:1", 4, 3)]


def test_processes_that_cannot_connect(monkeypatch):
    """JAX's own reason is in the message, here that this process already uses its devices."""
    jax.devices()
    with pytest.raises(InputError, match=r"several processes: cannot connect \(.*before.*\)"):
        ProcessConfig(distributed=True).join()
    for error in (ValueError("Number of processes must be defined."), RuntimeError("DEADLINE_EXCEEDED: none\nmore")):

        def unreachable(*_, error=error, **__):
            raise error

        monkeypatch.setattr(jax.distributed, "initialize", unreachable)
        with pytest.raises(InputError, match=re.escape(f"({str(error).splitlines()[0]})")):
            ProcessConfig(False, "localhost:1234", 2, 1).join()


@pytest.mark.parametrize(
    ("output", "training", "out"),
    [({}, {}, None), ({"merge": True}, {}, "run"), ({}, {"method": "full"}, "run")],
)
def test_outputs_that_several_processes_cannot_write_are_refused(output, training, out):
    OutputConfig().check_several_processes(FinetuneConfig(), Path("run"))
    with pytest.raises(InputError, match=r"several processes .*out .*merge .*method full"):
        OutputConfig(**output).check_several_processes(FinetuneConfig(**training), out and Path(out))
