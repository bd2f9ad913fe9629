"""The audit finds in the printed tables what its page quotes."""

from pathlib import Path

import pandas as pd

from rora_theory.runs import frames
from sims import audit

PUBLISHED = Path(__file__).parents[2] / "results" / "published" / "audit" / "findings.csv"


def test_published_findings(tmp_path, capsys) -> None:
    audit.main(["--out", str(tmp_path / "run")])
    findings = frames.read_csv(tmp_path / "run" / "findings.csv")
    pd.testing.assert_frame_equal(findings, frames.read_csv(PUBLISHED), check_dtype=False, rtol=1e-9)
    answer, _, report = capsys.readouterr().out.partition("\n")
    assert f"{len(findings)} findings" in answer
    assert "Table I, LLaMA-13B Parallel" in report
