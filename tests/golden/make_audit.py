"""Write `results/published/audit/findings.csv`, with a row for each finding of the audit of the printed tables.

python tests/golden/make_audit.py
"""

import dataclasses
from pathlib import Path

import pandas as pd

from rora_theory.paper import audit, published
from rora_theory.runs import frames

PATH = Path(__file__).parents[2] / "results" / "published" / "audit" / "findings.csv"


def findings() -> pd.DataFrame:
    """Return every finding of the audit as a row."""
    rows = map(dataclasses.asdict, audit.audit(published.published_rows(), published.claims()))
    return frames.from_rows(rows, [field.name for field in dataclasses.fields(audit.Finding)])


if __name__ == "__main__":
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_text(frames.to_csv(findings()))
