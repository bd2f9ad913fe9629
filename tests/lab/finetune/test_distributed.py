"""Two processes joined by JAX's runtime take the steps of one; a failure to join is one line."""

import json
import os
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
from rora_theory.lab.finetune.outputs import OutputConfig
from rora_theory.lab.llama.weights import save_hf

TESTS = Path(__file__).parents[2]
SCRIPT = TESTS / "support" / "two_processes.py"


@pytest.mark.slow
def test_two_processes_compute_the_steps_of_one(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "PYTHONPATH": str(TESTS),
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": "2",
    }
    save_hf(tmp_path / "model", tiny.params(), tiny.CONFIG)
    command = [sys.executable, str(SCRIPT), str(tmp_path / "model"), str(tmp_path / "two")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    children = [
        subprocess.Popen(command, env=environment | {"JAX_PROCESS_ID": str(number)}, **pipes) for number in range(2)
    ]
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
    assert report["parts"] == [[2, 12, 16]] * 2, "each process holds its part of the weights"
    # Sums over rows and devices in another order: float32 roundings, 6e-8 each, of losses near log 128.
    np.testing.assert_allclose(report["losses"], expected, rtol=2e-6)
    assert len(expected) == 3 + 2
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == sorted(p.name for p in (tmp_path / "one").iterdir())


@pytest.fixture
def alone(monkeypatch):
    """Set an environment that names no other process."""
    for name in list(os.environ):
        if name in distributed.VARIABLES or name.startswith("SLURM_"):
            monkeypatch.delenv(name)
    return monkeypatch


@pytest.fixture
def joined(alone):
    """Record the positional arguments of every call of JAX's own function, which is not run."""
    calls = []
    alone.setattr(jax.distributed, "initialize", lambda *args, **_: calls.append(args))
    return calls


@pytest.mark.usefixtures("alone")
def test_a_single_process_does_not_connect():
    assert distributed.initialize() is False
    assert distributed.initialize("localhost:1234", 1, 0) is False
    assert distributed.is_first()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ((None, 2, 0), r"coordinator \(JAX_COORDINATOR_ADDRESS\) not set"),
        (("localhost:1234", None, None), r"num_processes \(JAX_NUM_PROCESSES\), process_id \(JAX_PROCESS_ID\) not set"),
        (("localhost", 2, 0), "coordinator .*HOST:PORT .* got 'localhost'"),
        (("localhost:99999", 2, 0), "coordinator .* got 'localhost:99999'"),
        (("localhost:1234", 0, 0), "num_processes .* 1, got 0"),
        (("localhost:1234", 2, 2), "process_id .* from 0 to 1, got 2"),
    ],
)
@pytest.mark.usefixtures("alone")
def test_options_are_refused_by_name(options, match):
    with pytest.raises(InputError, match=match):
        distributed.initialize(*options)


def test_environment_variables_replace_the_options(alone, joined):
    for name, value in zip(distributed.VARIABLES, ("host:1", "4", "3"), strict=True):
        alone.setenv(name, value)
    distributed.initialize()
    distributed.initialize(process_id=2)
    assert joined == [("host:1", 4, 3), ("host:1", 4, 2)]
    alone.setenv("JAX_PROCESS_ID", "one")
    with pytest.raises(InputError, match=r"process_id .* got 'one'"):
        distributed.initialize()


def test_jax_detects_slurm(alone, joined):
    task = {"JOB_ID": "7", "STEP_NODELIST": "node[1-2]", "NTASKS": "2", "PROCID": "1", "LOCALID": "0"}
    for name, value in task.items():
        alone.setenv(f"SLURM_{name}", value)
    distributed.initialize()
    assert joined == [(None, None, None)]
    alone.setenv("SLURM_NTASKS", "1")
    assert distributed.initialize() is False, "one task needs no connection"


def test_processes_that_cannot_connect(alone):
    def unreachable(*_, **__):
        raise RuntimeError("DEADLINE_EXCEEDED: no answer\nmore lines")

    alone.setattr(jax.distributed, "initialize", unreachable)
    with pytest.raises(InputError, match=r"\(DEADLINE_EXCEEDED: no answer\)"):
        distributed.initialize("localhost:1234", 2, 1)


@pytest.mark.parametrize(
    ("output", "training", "out"),
    [({}, {}, None), ({"merge": True}, {}, "run"), ({}, {"method": "full"}, "run")],
)
def test_outputs_that_several_processes_cannot_write_are_refused(output, training, out):
    OutputConfig().check_several_processes(FinetuneConfig(), Path("run"))
    with pytest.raises(InputError, match=r"several processes .*--out .*--merge .*method full"):
        OutputConfig(**output).check_several_processes(FinetuneConfig(**training), out and Path(out))
