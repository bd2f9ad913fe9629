"""Experiments whose cells fine-tune a model, on Ray: what two workers leave is what a single process does."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
from support import checkpoint

from rora_theory import frames
from sims import horizon, rank_sweep

RECORDS = "--train-records 12 --held-out 4 --cutoff 400 --batch-size 4 --warmup 0"
SWEEP = f"{RECORDS} --methods lora --ranks 2 4 --seeds 0 --steps 1 --widths 1 --dropout 0 --no-accuracy"
HORIZON = f"{RECORDS} --ranks 2 --strengths 4 --lrs 1e-3 --read-at 1 --full-lrs 1e-3"
MEASURED = re.compile(r'"(?:\w*seconds|compilations|digest|cells/\w+/metrics\.jsonl)": ("\w+"|[^,}]+)')
"""What a cell measures of its own work, and digests of that."""


def content(out: Path) -> dict[str, str]:
    """All files of a run but its manifest and lock, without what its cells measured of time."""
    found = {}
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        name = str(path.relative_to(out))
        if name == "results.csv":
            rows = frames.read_csv(path)
            found[name] = frames.to_csv(rows.drop(columns=[column for column in rows if "seconds" in column]))
        elif name not in ("manifest.json", ".lock"):
            found[name] = MEASURED.sub("", path.read_text())
    return found


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="the extra cluster (Ray) is not installed")
@pytest.mark.parametrize(("main", "words", "files"), [(rank_sweep.main, SWEEP, 10), (horizon.main, HORIZON, 5)])
def test_two_workers_leave_the_bytes_of_one_process(main, words, files, tmp_path, capfd) -> None:
    data, model = checkpoint.two_files(tmp_path), checkpoint.model(tmp_path / "model")
    records = [str(data / name / "train.json") for name in ("one", "two")]
    command = ["--data", *records, "--model", str(model), *words.split(), "--out"]
    main([*command, str(tmp_path / "run" / "one")])
    main([*command, str(tmp_path / "run" / "two"), "--workers", "2", "--cell-memory", "plan"])
    one, two = (content(tmp_path / "run" / name) for name in ("one", "two"))
    assert len(one) == files
    assert one == two
    said = capfd.readouterr()
    assert said.err == ""
    assert "done here: 2 on node " in said.out
    (node,) = json.loads((tmp_path / "run" / "two" / "manifest.json").read_text())["sessions"][-1]["cells"].values()
    assert len(node) == 2
    assert min(node.values()) > 0
