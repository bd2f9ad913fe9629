"""Write Tables I and II of the paper together with a run of sims.sweep, as Markdown and CSV.

python -m figures.benchmark_tables RUN

The rows of the run are means over seeds with standard errors over items; the paper's rows are as printed. The Markdown
file states the run's data, training and protocol above the table, and alpha, learning rate and seeds in each row.
"""

import html
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
import tyro

from figures import style
from figures.sweep import at_best_rate, model_name
from rora_theory.lab.data.tasks import TASKS
from rora_theory.paper import published
from rora_theory.runs import frames

HEAD = (
    "source", "model", "protocol", "rank", "method", "alpha", "params_percent", "learning_rate", "rate_choice", "seeds",
    "diverged", "unparsed",
)  # fmt: skip
METHODS = {
    "base": "none",
    "full": "full fine-tuning",
    "prefix": "Prefix",
    "series": "Series",
    "parallel": "Parallel",
} | {
    "lora": "LoRA",
    "dora": "DoRA",
    "rora": "RoRA",
    "dora-rora": "DoRA, alpha/sqrt(r)",
    "quarter": "LoRA, alpha/r^(1/4)",
}


@dataclass(frozen=True)
class BenchmarkTablesOptions:
    run: Annotated[Path, tyro.conf.Positional]
    """Folder of sims.sweep."""
    layout: Literal["I", "II"] | None = None
    """I (by model) or II (by rank); by default II if the run has several ranks."""
    tuned: bool = False
    """Show each method and rank at its best learning rate only, instead of one row for each rate"""
    out: Path | None = None
    """Folder for table_I.md and .csv, or table_II.md and .csv; by default the run folder."""


@dataclass(frozen=True)
class Line:
    """One row of a table.

    Attributes:
      source: Origin of the row, ``this run`` or ``paper, as printed``.
      model: Name of the model.
      protocol: Scoring protocol.
      rank: Rank of the adapter; None if the method has none or it is not stated.
      method: Name of the method in the table.
      alpha: Alpha of the adapter, or None.
      params_percent: Trainable share of the parameters in percent, or None.
      learning_rate: Peak learning rate, or None.
      rate_choice: Entry ``best_rate`` of the run's `results.csv`; empty for the paper.
      seeds: Number of seeds averaged; None for the paper.
      diverged: Number of seeds that diverged; None for the paper.
      unparsed: Share of answers without a label in percent, mean over tasks; None if not stated.
      scores: Percent and standard error for each of the eight tasks. A score that was not measured is None, and so is
        an error that is not stated.
      average: Percent and standard error of the average over tasks, or None.
    """

    source: str
    model: str
    protocol: str
    rank: int | None
    method: str
    alpha: float | None
    params_percent: float | None
    learning_rate: float | None
    rate_choice: str
    seeds: int | None
    diverged: int | None
    unparsed: float | None
    scores: tuple[tuple[float, float | None] | None, ...]
    average: tuple[float, float | None] | None


def write_benchmark_tables(config: BenchmarkTablesOptions) -> Sequence[Path]:
    """Write the Markdown and the CSV file of the table."""
    manifest, rows = style.read_frame(config.run, "sweep")
    if config.tuned:
        rows = pd.concat([rows[rows["method"] == "base"], at_best_rate(config.run, rows)])
    ours = run_lines(rows, manifest.get("models", {}))
    if not any(line.average for line in ours):
        style.fail(f"{config.run}/results.csv: has no cell with accuracy. Choose a run without --no-accuracy.")
    has_several_ranks = len({line.rank for line in ours if line.rank}) > 1
    layout = config.layout or ("II" if has_several_ranks else "I")
    table = sort_lines([*ours, *paper_lines(layout)], layout)
    folder = config.out or config.run
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"table_{layout}.md", folder / f"table_{layout}.csv"]
    paths[0].write_text(markdown(table, layout, manifest))
    paths[1].write_text(lines_to_csv(table))
    return paths


def run_lines(rows: pd.DataFrame, models: dict[str, Any]) -> list[Line]:
    """Return one line for each model, method, rank, alpha and learning rate, averaged over the scored seeds."""
    # A cell counts if it was scored or diverged.
    counted = rows[(rows["status"] == "diverged") | ((rows["status"] == "complete") & rows["average"].notna())]
    lines = []
    keys = ["model", "method", "rank", "alpha", "learning_rate"]
    for _, group in counted.groupby(keys, dropna=False, sort=False):
        # The settings are those of the group; scores are means over its seeds that finished.
        first = frames.rows(group[:1])[0]
        total = models.get(first["model"], {}).get("parameters")
        trainable = next(iter(group["trainable_parameters"].dropna()), None)
        scored = group[group["status"] == "complete"]
        lines.append(
            Line(
                source="this run",
                model=model_name(first["model"]),
                protocol=next(iter(scored["protocol"]), ""),
                rank=first["rank"],
                method=METHODS.get(first["method"], first["method"]),
                alpha=first["alpha"],
                params_percent=100 * int(trainable) / (total + int(trainable)) if trainable and total else None,
                learning_rate=first["learning_rate"],
                rate_choice=first.get("best_rate") or "",
                seeds=len(scored),
                diverged=len(group) - len(scored),
                unparsed=100 * _mean(scored["average_unparsed"]) if len(scored) else None,
                scores=tuple(mean_score(scored, key) for key in TASKS),
                average=mean_score(scored, "average"),
            )
        )
    return lines


def mean_score(group: pd.DataFrame, column: str) -> tuple[float, float | None] | None:
    """Return the mean over seeds in percent, and the standard error over items, which all seeds share."""
    values = group[group[column].notna()]
    return (100 * _mean(values[column]), 100 * _mean(values[f"{column}_error"])) if len(values) else None


def paper_lines(layout: str) -> list[Line]:
    """Return the paper's rows of a layout."""
    return [
        Line(
            source="paper, as printed",
            model=row.model,
            protocol="generate (the paper's)",
            rank=row.rank,
            method=row.method,
            alpha=None,
            params_percent=row.params_percent,
            learning_rate=row.learning_rate,
            rate_choice="",
            seeds=None,
            diverged=None,
            unparsed=None,
            scores=tuple((score, None) for score in row.scores),
            average=(row.average, None),
        )
        for row in published.published_rows("RoRA paper")
        if row.table == layout
    ]


def sort_lines(lines: Sequence[Line], layout: str) -> list[Line]:
    """Sort lines by model (I) or by rank (II): the run before the paper, methods in the order of the paper."""
    methods = list(METHODS.values())

    def order(line: Line) -> tuple[Any, ...]:
        method = methods.index(line.method) if line.method in methods else len(methods)
        rank, is_from_paper = line.rank or 0, line.source != "this run"
        return (is_from_paper, method, rank) if layout == "I" else (rank, is_from_paper, method)

    return sorted(lines, key=order) if layout == "II" else _by_model(sorted(lines, key=order))


def _by_model(lines: Sequence[Line]) -> list[Line]:
    models = list(dict.fromkeys((line.source, line.model) for line in lines))
    return [line for model in models for line in lines if (line.source, line.model) == model]


def markdown(lines: Sequence[Line], layout: str, manifest: dict[str, Any]) -> str:
    """Return the Markdown table, with the settings of the run above it."""
    config = manifest["config"]
    data, evaluation, training = config["data"], config.get("evaluation") or {}, config["training"]
    protocol = escaped(str(evaluation.get("protocol")))
    columns = ["Rank", "Model", "Method"] if layout == "II" else ["Model", "Rank", "Method"]
    header = [*columns, "# Params (%)", *published.NAMES, "Average", "Unparsed", "Source"]
    text = [
        # Caption, header and alignment.
        f"Table {layout}. Accuracy in percent, with its standard error over items in brackets.",
        f"This run: protocol {protocol}, {_count(evaluation.get('limit'), 'items a task')}; "
        f"{data['train_records']} training records, {_count(training['steps'], 'steps')} of {training['batch']}. "
        "The paper's rows are its printed numbers, on its own models and protocol: they are not comparable with this "
        "run's, only the differences within each are.",
        "",
        "| " + " | ".join(header) + " |",
        "| " + " | ".join(["---"] * 3 + ["---:"] * (len(header) - 4) + ["---"]) + " |",
    ]
    # One line for each row; the layouts differ in the order of the first columns.
    for line in lines:
        rank = "" if line.rank is None else str(line.rank)
        first = [rank, line.model] if layout == "II" else [line.model, rank]
        share = "" if line.params_percent is None else f"{line.params_percent:.2f}"
        scores = [_score(score) for score in (*line.scores, line.average)]
        unparsed = "" if line.unparsed is None else f"{line.unparsed:.1f}"
        cells = [*first, line.method, share, *scores, unparsed, _source(line)]
        text.append("| " + " | ".join(map(escaped, cells)) + " |")
    return "\n".join(text) + "\n"


def escaped(text: str) -> str:
    """Escape a text from a file, so that Markdown shows it literally and it adds no markup, HTML or cells."""
    marks = re.sub(r"([\\`*_{}\[\]|~])", r"\\\1", " ".join(text.split()))
    return html.escape(marks, quote=False)


def lines_to_csv(lines: Iterable[Line]) -> str:
    """Return a tidy CSV text with one column for each score and one for its standard error."""
    names = [*published.NAMES, "average"]
    rows = []
    for line in lines:
        scores = zip(names, (*line.scores, line.average), strict=True)
        pairs = {name: score if score is not None else (None, None) for name, score in scores}
        rows.append(
            vars(line) | {f"{name}{end}": pair[end != ""] for name, pair in pairs.items() for end in ("", "_error")}
        )
    return frames.to_csv(frames.from_rows(rows, [*HEAD, *(f"{name}{end}" for name in names for end in ("", "_error"))]))


def _source(line: Line) -> str:
    """Return the source of a row, with the remaining settings of a row of the run."""
    if line.seeds is None or line.learning_rate is None:
        return line.source
    words = [line.source, _count(line.seeds, "seed")]
    words += [f"{line.diverged} diverged"] if line.diverged else []
    words += [f"alpha {line.alpha:g}"] if line.alpha else []
    choice = {"yes": " (best tried)", "edge": " (best tried, at the grid's edge)"}.get(line.rate_choice, "")
    words.append(f"lr {line.learning_rate:g}{choice}")
    return ", ".join(words)


def _score(score: tuple[float, float | None] | None) -> str:
    if score is None:
        return ""
    value, error = score
    return f"{value:.1f}" if error is None else f"{value:.1f} ({error:.1f})"


def _count(value: int | None, unit: str) -> str:
    return f"all {unit}" if value is None else f"{value} {unit}" + ("s" if unit == "seed" and value != 1 else "")


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return math.fsum(numbers) / len(numbers)


if __name__ == "__main__":
    style.command(write_benchmark_tables, BenchmarkTablesOptions, __doc__)
