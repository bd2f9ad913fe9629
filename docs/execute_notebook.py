"""Execute a notebook without Jupyter and write its outputs into the file.

    python docs/execute_notebook.py docs/notebooks/three-rates.ipynb

All code cells run in one namespace, in order. A cell's outputs are what it prints and the Matplotlib figures that are
open at its end, as PNG. What goes to the standard error, such as progress bars, is left out.
"""

import base64
import contextlib
import io
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib

DPI = 110
"""Resolution of the figures."""


def code_cells(notebook: dict[str, Any]) -> Iterator[dict[str, Any]]:
    return (cell for cell in notebook["cells"] if cell["cell_type"] == "code")


def execute(notebook: dict[str, Any], on_cell: Callable[[], Any] = lambda: None) -> dict[str, Any]:
    """Execute the code cells, replace their outputs, and return the namespace."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.close("all")  # figures that the caller left open are not the notebook's

    namespace: dict[str, Any] = {"__name__": "__main__"}
    for count, cell in enumerate(code_cells(notebook), start=1):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("".join(cell["source"]), f"cell {count}", "exec"), namespace)
        cell["execution_count"] = count
        cell["outputs"] = []
        if printed.getvalue():
            lines = printed.getvalue().splitlines(keepends=True)
            cell["outputs"].append({"output_type": "stream", "name": "stdout", "text": lines})
        for number in plt.get_fignums():
            cell["outputs"].append(figure_output(plt.figure(number)))
        plt.close("all")
        on_cell()
    return namespace


def figure_output(figure: Any) -> dict[str, Any]:
    png = io.BytesIO()
    # Without the version of Matplotlib, the same figure has the same bytes.
    figure.savefig(png, format="png", dpi=DPI, metadata={"Software": None})
    data = {"image/png": base64.b64encode(png.getvalue()).decode()}
    return {"output_type": "display_data", "data": data, "metadata": {}}


def main(path: Path) -> None:
    notebook = json.loads(path.read_text())
    warnings.simplefilter("ignore")
    execute(notebook, lambda: print(".", end="", file=sys.stderr, flush=True))
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
