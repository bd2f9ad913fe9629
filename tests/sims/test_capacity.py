"""`python -m sims.capacity`: the paper's table, one model by item, and models from folders."""

import json
import re

import pytest
from support import commands
from support.tiny import WIDE

from sims import capacity


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(WIDE.to_hf()))
    return tmp_path


def plan(*words: object) -> str:
    return commands.output(commands.run(capacity.main, *words))


@pytest.mark.slow
def test_the_papers_models_on_an_a6000():
    out = plan("--examples 1600 --epochs 2")
    rows = [line.split() for line in out.splitlines() if re.search(r"fits?\b", line)]
    verdicts = {(row[0], row[1]): "not" not in row for row in rows if row[0] in capacity.PAPER_MODELS}
    assert len(verdicts) == 10
    assert all(verdicts[name, "yes"] for name in capacity.PAPER_MODELS), "with rematerialisation all fit"
    assert verdicts["sheared-llama-1.3b", "no"]
    assert "rank 128, batch 16 x 256, bfloat16 base" in out
    seven = next(row for row in rows if row[:2] == ["llama-7b", "yes"])
    base, adam, activations, total = map(float, seven[3:7])
    assert (base, adam) == (13.5, 2.7), "two bytes a weight; twelve a trained parameter"
    assert activations == 1.1, "32 layers' inputs, 16 x 256 x 4096 in bfloat16"
    # Weights 13.48, sixteen bytes a trained parameter 3.59, activations 1.07, and 1.30 for one layer at work.
    assert total == pytest.approx(13.48 + 3.59 + 1.07 + 1.30, abs=0.15)
    hours = float(seven[-2])
    assert hours == pytest.approx(200 * float(seven[-3]) / 3600, abs=0.06)
    # The largest model without rematerialisation: the same figure in the table and on its own.
    assert next(row for row in rows if row[:2] == ["llama-13b", "no"])[6] == "51.9"
    assert "does not fit (51.9 GB of 50.0 GB)" in plan("--model llama-13b")


@pytest.mark.slow
def test_one_model_by_part(folder):
    settings = "--rank 4 --batch-size 4 --seq 32 --method dora --dtype float32 --device h100 --steps 3600"
    out = plan("--model", folder, settings, "--compile --measure")
    for part in ("base", "adapter", "optimizer", "gradients", "activations", "working", "total", "logits"):
        assert re.search(rf"{part}\W.*\d\.\d\d\b", out), part
    words = " ".join(out.split())
    assert "NVIDIA H100 SXM 80 GB: fits" in out
    assert "the whole run" in out
    assert re.search(r"XLA's analysis .* arguments 0.00 GB \(estimated 0.00\)", words)
    assert re.search(r"Measured .* peak .* GB, estimated .* s per step", words)


def test_several_custom_devices(folder):
    out = plan("--model", folder, "--rank 4 --batch-size 8 --seq 32 --memory 24 --tflops 120 --replicas 2 --fsdp 2")
    assert "4 devices (replicas 2 x fsdp 2)" in out
    assert re.search(r"weights of modules\W+in 2\W", out)
    assert re.search(r"norms\W+whole\W", out)
    assert "split in 4: 2 rows per device" in " ".join(out.split())
    assert "a device of 24 GB and 120 TFLOP/s: fits (0.0 GB of 23.0 GB)" in " ".join(out.split())


@pytest.mark.slow
def test_a_run_that_does_not_fit_gets_advice_to_reduce_memory():
    out = plan("--model llama3-8b --device rtx4090 --dtype float32")
    advice = "reduce memory with --remat True, a smaller --batch-size"
    assert re.search(rf"RTX 4090 24 GB: does not fit \(.* GB of 24.8 GB\); {advice}", out)
    out = plan("--model llama3-8b --device rtx4090 --remat True")
    assert re.search(r"fits \(.*\); needs XLA_PYTHON_CLIENT_MEM_FRACTION=0\.\d\d or more", out)
