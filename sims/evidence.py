"""Test the advice on other people's sweeps, from 1B to 1T parameters, or on your own.

    python -m sims.evidence
    python -m sims.evidence --add runs.csv

Public sweeps of rank and learning rate show what it costs to carry a best rate to another rank: kept, divided by any
power of G, or as `rora transfer` advises. G is the scaling times the rank. The losses of Tinker's sweep are in the
package; sweeps without a licence are represented by figures that were computed from them, unless --originals names a
folder with their files. Nothing is trained and no network is needed.

--add reads a table of runs with the columns model, rank, alpha, rule, learning_rate and loss, and optionally steps,
batch_size and seed; a run that diverged has no loss, or inf. Its best rates and regrets are printed, and where the
advice would have gone.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rora_theory.errors import InputError
from rora_theory.evidence import absolute_rates, histories, regrets, source_tables, starting_rates
from rora_theory.evidence.policies import LEFT_OUT
from rora_theory.evidence.sources import SOURCES
from rora_theory.evidence.sweeps import load_sweeps, read_run_table, sweeps_of
from rora_theory.runs import files, frames
from rora_theory.runs.folder import RunFolder
from rora_theory.runs.summary import key_figures
from sims.common import answers, cli, tables
from sims.common.summaries import summarised

if TYPE_CHECKING:
    import pandas as pd

NAME = "evidence"

ADVICE, KEEP = "advice", "keep the rate"


@dataclass(frozen=True)
class EvidenceOptions:
    add: Path | None = None
    """Table of your own runs, as CSV; it is reported instead of the public sweeps"""
    originals: Path | None = None
    """Folder with the original files of the public sweeps, from which everything is then computed"""
    out: cli.Out = None

    def __post_init__(self) -> None:
        if self.add is not None and self.originals is not None:
            raise InputError(f"originals {self.originals} has no effect with --add")


def report_evidence(config: EvidenceOptions) -> None:
    """Compute the tables, write them to the run folder, and print them with the answer."""
    if config.add is not None:
        report_own(config.add, config.out)
        return
    computed = source_tables.all_tables(config.originals)
    best, costs = computed["best_rates"], computed["regrets"]
    by_policy, absolute = (
        regrets.summarise_regrets(costs),
        absolute_rates.summarise_absolute_regrets(computed["absolute_rates"]),
    )
    spreads, starting = histories.spread_table(computed["loss_differences"]), starting_rates.starting_table()
    identity = {"add": None, "originals": config.originals is not None}
    folder = RunFolder.open(NAME, identity, out=config.out, seed=0, extra={"units": UNITS})
    written = {"results.csv": costs, "best_rates.csv": best, "policies.csv": by_policy}
    written |= {"absolute_policies.csv": absolute, "starting_rates.csv": starting, "loss_spreads.csv": spreads}
    written["sources.csv"] = source_tables.source_table()
    written |= {f"{name}.csv": table for name, table in computed.items() if name not in ("best_rates", "regrets")}
    # Pages name sources by their titles.
    for name in ("exponents.csv", "calibration.csv"):
        written[name] = written[name].assign(title=written[name]["source"].map(title_of))
    for name, table in written.items():
        folder.write_frame(table, name)
    figures = key_figures(
        by_policy, "mean regret, nats per token", "mean", "mean_error", over="models",
        scope=("source", "pairs_of", "policy"),
    )  # fmt: skip
    with summarised(folder, figures):
        print_policies(by_policy[by_policy["pairs_of"] == "all ranks"])
        print_exponents(computed["exponents"])
        print_rates(rates_by_rank(best))
        print_calibration(computed["calibration"])
        print_starting_rates(starting, absolute)
        print_histories(spreads, computed["speeds"])
        answers.print_answer(answer(by_policy))
    folder.finish()
    answers.print_files(folder.path)


UNITS = {
    "regret": "nats per token above the lowest measured loss of the new setting; infinite if the runs there diverged",
    "gain": "G, the scaling times the rank",
    "standard_error": "from the noise of repeated runs; of a mean, the jackknife's over models",
    "place": "where a best rate lies in its grid; not inside: a bound, or known to a grid step",
}


def answer(by_policy: "pd.DataFrame") -> str:
    """Return the answer in a sentence."""
    rows = {(row["source"], row["policy"]): row for row in frames.rows(by_policy[by_policy["pairs_of"] == "all ranks"])}
    fixed, along = (rows[source, KEEP]["mean"] for source in ("tinker", "qwen2.5-7b"))
    left_out, advised = rows["tinker", LEFT_OUT]["mean"], rows["qwen2.5-7b", ADVICE]["mean"]
    return (
        f"In public runs of {rows['tinker', KEEP]['models']} models at alpha 32, keeping the rate at another rank cost "
        f"{fixed:.4f} nats per token on average, and the advice, fitted to the other models, {left_out:.4f}. With "
        f"alpha = r (Qwen2.5-7B), keeping the rate cost {along:.4f} and the advice {advised:.4f}."
    )


def title_of(source: str) -> str:
    """Return the name of a source in tables."""
    return SOURCES[source].title if source in SOURCES else source


def print_policies(by_policy: "pd.DataFrame") -> None:
    """Print the regrets of every policy, a table for each source."""
    for source, rows in by_policy.groupby("source", sort=False):
        first = frames.rows(rows)[0]
        bounds = ""
        if first["bound_pairs"]:
            bounds = f". {first['bound_pairs']} further pairs have a best rate that is only a bound"
        models = "1 model" if first["models"] == 1 else f"{first['models']} models"
        tables.print_records(
            f"{title_of(source)}: regret in nats per token of a best rate transferred to another rank, over "
            f"{first['pairs']} pairs of {models}{bounds}",
            rows,
            {"policy": "{policy}", "mean": "{mean:.4f}", "standard error": "{mean_error:.4f}", "median": "{median:.4f}"}
            | {"90% below": "{percentile_90:.4f}", "largest": "{largest:.4f}", "off grid": "{lower_bounds}"}
            | ({"lost": "{lost}"} if rows["lost"].any() else {}),
        )


def print_exponents(exponents: "pd.DataFrame") -> None:
    """Print the exponents of the best rate."""
    rows = exponents[exponents["method"] == "vertex"].assign(title=exponents["source"].map(title_of))
    tables.print_records(
        "Exponent of the best rate in the rank ± half its 95% interval, over models or, for one model, over its ranks. "
        "G is the same at every rank, except with alpha = r",
        rows,
        {"source": "{title}", "from r": "{from_rank}", "to r": "{to_rank}", "exponent": "{exponent:+.3f}"}
        | {"±": "{half_width:.3f}", "models": "{models}", "best rates": "{curves}"},
    )


def rates_by_rank(best: "pd.DataFrame") -> "pd.DataFrame":
    """Summarise the best rates over the models of a source at each rank."""
    rows: list[dict[str, Any]] = []
    for (source, rank), members in best.groupby(["source", "rank"], sort=False):
        inside = members[members["place"] == "inside"]["best_rate"].to_numpy(float)
        rates: dict[str, Any] = dict.fromkeys(("rate", "lowest", "highest"))
        if len(inside):
            rates = {"rate": float(np.exp(np.log(inside).mean())), "lowest": inside.min(), "highest": inside.max()}
        counts = {"inside": len(inside), "bounds": len(members) - len(inside)}
        rows.append({"source": source, "rank": rank} | rates | counts)
    order = list(best["source"].unique())
    rows.sort(key=lambda row: (order.index(row["source"]), row["rank"]))
    return frames.from_rows(rows, ["source", "rank", "rate", "lowest", "highest", "inside", "bounds"])


def print_rates(by_rank: "pd.DataFrame") -> None:
    """Print the best rates by rank."""
    tables.print_records(
        "Best rates inside their grids: geometric mean, lowest and highest over models, and the number of bounds",
        by_rank.assign(title=by_rank["source"].map(title_of)),
        {"source": "{title}", "r": "{rank}", "rate": "{rate:.3g}", "lowest": "{lowest:.3g}"}
        | {"highest": "{highest:.3g}", "models": "{inside}", "bounds": "{bounds}"},
    )


def print_calibration(calibration: "pd.DataFrame") -> None:
    """Print how often the best rate lies in the range of the advice."""
    tables.print_records(
        "Share of the pairs whose best rate lies in the 90% range of rora transfer, its standard error over models, "
        "and the share with the error of the best rates themselves. The scale is 1 for a calibrated range and less for "
        "a wide one",
        calibration.assign(title=calibration["source"].map(title_of)),
        {"source": "{title}", "share": "{share:.0%}", "standard error": "{share_error:.0%}"}
        | {"with errors": "{share_with_errors:.0%}", "pairs": "{pairs}", "high / low": "{median_width:.2f}"}
        | {"scale": "{needed_scale:.2f}"},
    )


def print_starting_rates(starting: "pd.DataFrame", absolute: "pd.DataFrame") -> None:
    """Print the starting rates by family and size, and what they and a public formula cost."""
    tables.print_records(
        f"Rates to start from at r = {starting_rates.RANK} and alpha {starting_rates.ALPHA:g} (alpha / r, batches of "
        "128, 780 steps, linear decay): mean over models, and the interval for 95% of further models",
        starting,
        {"family": "{family}", "parameters": "{size}", "rate": "{rate:.2g}", "from": "{low:.2g}", "to": "{high:.2g}"}
        | {"models": "{models}", "bounds": "{bounds}"},
        left=2,
    )
    tables.print_records(
        "Regret in nats per token of rates that are chosen without a tuned run, over ranks at alpha 32",
        absolute[absolute["source"] == "tinker"],
        {"rate": "{policy}", "mean": "{mean:.4f}", "median": "{median:.4f}", "90% below": "{percentile_90:.4f}"}
        | {"largest": "{largest:.4f}", "within 2x": "{within_factor_2:.0%}"},
    )


def print_histories(spreads: "pd.DataFrame", speeds: "pd.DataFrame") -> None:
    """Print the differences of the loss between ranks by phase, and the speeds."""
    shown = spreads[np.isclose(spreads["learning_rate"], 1e-4)]
    tables.print_records(
        "Apertus, alpha 32, rate 1e-4: largest difference of the mean training loss between ranks, nats per token",
        shown,
        {"model": "{model}", "steps": "{first_step} to {last_step}", "ranks": "{from_rank} to {to_rank}"}
        | {"difference": "{spread:.4f}"},
    )
    tables.print_records(
        "Speed at which the loss falls relative to r = 512, rate 1e-5, steps 8 to 120, with its 95% interval",
        speeds,
        {"model": "{model}", "r": "{rank}", "speed": "{speed:.3f}", "from": "{low:.3f}", "to": "{high:.3f}"},
    )


def report_own(path: Path, out: Path | None) -> None:
    """Report a user's own runs: best rates, where the advice would have gone, and the regret of every policy.

    Raises:
      InputError: If the table is invalid, or no setting has a best rate.
    """
    sweeps = sweeps_of(read_run_table(path), path.stem)
    if not any(sweep.fits for sweep in sweeps):
        raise InputError(
            f"{path} must have a setting with runs at three learning rates or more, of which one did not diverge"
        )
    reference = load_sweeps(source_tables.REFERENCE)
    computed = source_tables.sweep_tables(sweeps, reference)
    best, costs = computed["best_rates"], computed["regrets"]
    by_policy = regrets.summarise_regrets(costs)
    identity = {"add": hashlib.sha256(files.read_bytes(path)).hexdigest(), "originals": False}
    folder = RunFolder.open(NAME, identity, out=out, seed=0, extra={"units": UNITS, "table": str(path)})
    written = {"results.csv": costs, "best_rates.csv": best, "policies.csv": by_policy}
    for name, table in (written | {f"{name}.csv": computed[name] for name in ("exponents", "calibration")}).items():
        folder.write_frame(table, name)
    with summarised(folder):
        tables.print_records(
            "Best rates, with half the 95% interval of their log2 where runs were repeated",
            best,
            {"model": "{model}", "r": "{rank}", "G": "{gain:g}", "best rate": "{best_rate:.3g}"}
            | {"±": "{log2_half_width:.2f}", "loss": "{best_loss:.4f}", "place in the grid": "{place}"},
        )
        if len(costs):
            print_advice(costs, best)
        if len(by_policy):
            print_policies(by_policy[by_policy["pairs_of"] == "all ranks"])
        answers.print_answer(own_answer(by_policy, best))
    folder.finish()
    answers.print_files(folder.path)


def print_advice(costs: "pd.DataFrame", best: "pd.DataFrame") -> None:
    """Print where the advice would have gone from each setting to those of a higher rank or G."""
    keys = ("model", "steps", "old_rank", "old_gain", "rank", "gain")
    setting = ("model", "steps", "rank", "gain")

    def values_of(row: Mapping[str, Any], names: Sequence[str]) -> tuple[Any, ...]:
        return tuple(row[name] for name in names)

    regrets_of_keeping = {values_of(row, keys): row["regret"] for row in frames.rows(costs[costs["policy"] == KEEP])}
    measured = {values_of(row, setting): row["best_rate"] for row in frames.rows(best)}
    shown = [
        row
        | {"kept": regrets_of_keeping[values_of(row, keys)], "best": measured[values_of(row, setting)]}
        | {"mark": "" if row["place"] == "inside" else "*"}
        for row in frames.rows(costs[costs["policy"] == ADVICE])
        if (row["rank"], row["gain"]) > (row["old_rank"], row["old_gain"])
    ]
    tables.print_records(
        "Rate of rora transfer from each best rate to a higher rank, the best rate there (* only a bound), and the "
        "regrets in nats per token of the advice and of keeping the rate",
        shown,
        {"model": "{model}", "r": "{old_rank} to {rank}", "G": "{old_gain:g} to {gain:g}"}
        | {"tuned": "{tuned_rate:.3g}", "advised": "{learning_rate:.3g}", "best": "{best:.3g}{mark}"}
        | {"regret": "{regret:.4f}", "kept": "{kept:.4f}"},
    )


def own_answer(by_policy: "pd.DataFrame", best: "pd.DataFrame") -> str:
    """Return the answer on a user's own runs in a sentence."""
    rows = {row["policy"]: row for row in frames.rows(by_policy) if row["pairs_of"] == "all ranks"}
    if ADVICE not in rows:
        inside = int((best["place"] == "inside").sum())
        return (
            f"{inside} of {len(best)} best rates {'lies' if inside == 1 else 'lie'} inside the measured rates: regrets "
            "need two of one model. Add learning rates beyond the ends."
        )
    advice, keep = rows[ADVICE], rows[KEEP]
    cost = f"{advice['mean']:.4f}" if isfinite(advice["mean"]) else "a run that diverged"
    keep_cost = f"{keep['mean']:.4f}" if isfinite(keep["mean"]) else "a run that diverged"
    return (
        f"Over {advice['pairs']} pairs of settings, the rate of rora transfer would have cost {cost} nats per token on "
        f"average ({advice['largest']:.4f} at most), keeping the rate {keep_cost} ({keep['largest']:.4f} at most)."
    )


main = cli.command(EvidenceOptions, report_evidence, __doc__)

if __name__ == "__main__":
    main()
