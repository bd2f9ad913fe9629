"""Write files of records in the form of their suffix."""

import json
from pathlib import Path
from typing import Any

import pandas as pd


def write(path: Path, content: Any) -> str:
    """Write bytes or text as they are, and rows by the file's suffix; return the path as a source of records."""
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str):
        path.write_text(content)
    elif path.suffix == ".parquet":
        pd.DataFrame(content).to_parquet(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(content))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return str(path)
