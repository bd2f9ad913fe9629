"""Every number of the documents comes from ``results/published``: this writes them in, or checks that they are right.

    python docs/fill.py            # fill README.md and docs/**/*.md
    python docs/fill.py --check    # exit status 1 where a document says something else than the files

A document marks a place as ``<!-- = NAME -->...<!-- / -->``, a table or a word in a sentence; NAME is a function
registered below. What stands between the marks is replaced. The marks of `marks.py` are filled and checked too; new
text uses those.
"""

import itertools
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import marks
import numpy as np
import pandas as pd
from scipy import stats

from rora_theory.advice.setting import Setting
from rora_theory.advice.transfer import transfer
from rora_theory.finetune import FinetuneConfig, capacity
from rora_theory.io import frames
from rora_theory.measure.layers.layer_grid import layer_exponents
from rora_theory.paper import audit, published
from rora_theory.stats.moments import agreement
from rora_theory.sweep import results

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = ROOT / "results" / "published"
PLACE = re.compile(r"(<!-- = (?P<name>[\w.:-]+) -->)(?P<text>.*?)(<!-- / -->)", re.DOTALL)

BREAK = re.compile(r"^(?!\s*(?:\||#|```|<!--|$)).*\n {0,3}<!-- = (?P<name>[\w.:-]+) -->", re.MULTILINE)
"""A place that begins a line of a paragraph: Markdown takes a comment there for HTML, and ends the paragraph."""

BLOCKS: dict[str, Callable[[], str]] = {}

RULES = {
    "lora": "`alpha / r`",
    "rora": "`alpha / sqrt(r)`",
    "0.25": "`alpha / r^0.25`",
    "quarter": "`alpha / r^0.25`",
}
METHODS = {
    "prefix": "Prefix",
    "series": "Series",
    "parallel": "Parallel",
    "lora": "LoRA",
    "dora": "DoRA",
    "rora": "RoRA",
}


def block(name: str) -> Callable[[Callable[[], str]], Callable[[], str]]:
    """Register what fills a place."""

    def register(make: Callable[[], str]) -> Callable[[], str]:
        if name in BLOCKS:
            raise ValueError(f"two blocks are named {name}")
        BLOCKS[name] = make
        return make

    return register


@cache
def csv(path: str) -> pd.DataFrame:
    """A table of a published run."""
    return frames.read_csv(PUBLISHED / path)


@cache
def read(path: str) -> Any:
    """A JSON file of a published run."""
    return json.loads((PUBLISHED / path).read_text())


def one(frame: pd.DataFrame, **where: Any) -> pd.Series:
    """The one row that has these values."""
    for name, value in where.items():
        frame = frame[frame[name] == value]
    if len(frame) != 1:
        raise ValueError(f"{len(frame)} rows have {where}; a document needs one")
    return frame.iloc[0]


def table(heads: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n" + "\n".join(lines) + "\n"


def signed(value: float, error: float, digits: int = 2) -> str:
    """A figure with its sign and its error."""
    return f"{value:+.{digits}f} ± {error:.{digits}f}"


def _facts(run: str) -> dict[str, str]:
    """What a run was: device, versions, revision and end, each empty where its manifest does not have it."""
    found = read(f"{run}/manifest.json")
    parts = found.get("sessions") or found.get("runs") or [{}]
    packages, revision = (found.get(name) or parts[-1].get(name) for name in ("packages", "git_revision"))
    commit, _, changes = (revision or "").partition("+")
    several = len({part.get("git_revision") for part in parts}) > 1
    return {
        "device": found.get("device", "").removesuffix(" (cpu)"),
        "versions": ", ".join(f"{name} {packages[name]}" for name in ("jax", "numpy")) if packages else "",
        "revision": f"revision {commit[:10]}{' with changes' if changes else ''}" if commit else "",
        "sessions": f"the last of {len(parts)} sessions" if several else "",
        "end": found.get("end") or parts[-1].get("end") or found.get("start", ""),
    }


def bound(values: Iterable[float], digits: int) -> str:
    """What no value exceeds: the largest, rounded upwards."""
    return f"{math.ceil(round(max(values) * 10**digits, 6)) / 10**digits:.{digits}f}"


def manifest(*runs: str) -> str:
    """What runs of one folder were, in a line: what all or most of them share, and in brackets those that differ."""
    facts, parts = {Path(run).name: _facts(run) for run in runs}, []
    for name in ("device", "versions", "revision", "end"):
        values: dict[str, list[str]] = {}
        for run, found in facts.items():
            value = found[name][:10] if name == "end" else found[name]
            last = f", {found['sessions']}" if name == "revision" and found["sessions"] else ""
            values.setdefault(f"{value}{last}", []).append(run)
        usual, *others = sorted(values, key=lambda value: (not value, -len(values[value])))
        rest = "; ".join(
            f"{_listed(values[value])}: {value.removeprefix('revision ') or 'not kept'}" for value in others
        )
        said = f"{'ended ' if name == 'end' else ''}{usual}" + (f" ({rest})" if rest else "")
        parts += [said] if usual else []
    where = runs[0] if len(runs) == 1 else f"{Path(runs[0]).parent}"
    many = "" if len(runs) == 1 else f", {len(runs)} runs"
    return f"`results/published/{where}`{many}: {'; '.join(parts)}."


def _listed(names: list[str]) -> str:
    """Names in a sentence."""
    quoted = [f"`{name}`" for name in names]
    return " and ".join([", ".join(quoted[:-1]), quoted[-1]] if len(quoted) > 1 else quoted)


RUNS = [
    str(path.parent.relative_to(PUBLISHED))
    for path in sorted([*PUBLISHED.glob("*/manifest.json"), *PUBLISHED.glob("*/*/manifest.json")])
]
for _run in RUNS:
    block(f"run:{_run.replace('/', '.')}")(partial(manifest, _run))
for _group in dict.fromkeys(Path(run).parent for run in RUNS if "/" in run):
    block(f"runs:{_group}")(partial(manifest, *(run for run in RUNS if Path(run).parent == _group)))


# The suite on other versions.


VERSIONS = ("python", "jax", "numpy", "which", "tests", "passed", "failed", "skipped", "revision", "date")


@block("versions")
def versions() -> str:
    """What `.ci/versions` wrote, a line for each time that it ran the suite."""
    which = {
        "floor": "every direct dependency at its floor of then",
        "newest": "everything at its newest",
        "lock": "the locked versions",
    }
    rows = [
        [row["python"], row["jax"], row["numpy"], which.get(row["which"], "this JAX, the rest at its newest")]
        + [row[name] for name in VERSIONS[4:]]
        for row in frames.rows(frames.read_csv(PUBLISHED / "versions.csv", words=VERSIONS))
    ]
    return table(["Python", "JAX", "NumPy", "packages", *VERSIONS[4:]], rows)


# The verdicts on the paper's equations.


@block("verdicts")
def verdicts() -> str:
    rows = [
        [v["equation"], v["claim"], v["status"], v["where"], v["evidence"]]
        for v in read("variance_sweep/verdicts.json")
    ]
    return table(["Eq.", "claim", "verdict", "where", "what shows it"], rows)


@block("verdicts.took")
def verdicts_took() -> str:
    """How long the published run of the first command took, on what."""
    found = read("variance_sweep/manifest.json")
    devices, _, kind = _facts("variance_sweep")["device"].partition(" x ")
    return f"{found['last_session_seconds']:.0f} s on {devices} host devices of a {kind.upper()}"


@block("eq9.rank1")
def eq9() -> str:
    evidence = next(v["evidence"] for v in read("variance_sweep/verdicts.json") if v["equation"] == "9")
    return re.findall(r"exact (\d+)", evidence)[0]


# Real layers.


@block("layers.exponents")
def layers_exponents() -> str:
    results, crossings = csv("real_layers/results.csv"), csv("real_layers/crossing_ranks.csv")
    held = results[(results["split"] == "heldout") & (results["quantity"] == "rms")]
    fits, rows = layer_exponents(held, low=8, high=128), []
    for layer, optimizer in dict.fromkeys(zip(held["layer"], held["optimizer"], strict=True)):
        where = one(crossings, layer=layer, split="heldout", optimizer=optimizer)
        low, high = where["lower_quartile"], where["upper_quartile"]
        cells = []
        for rule in ("lora", "rora", "0.25"):
            fit = one(fits, layer=layer, optimizer=optimizer, rule=rule)
            cells.append(signed(fit["slope"], fit["standard_error"], 3))
        rows.append(
            [
                layer.removeprefix("model.layers."),
                {"sgd": "SGD", "adam": "Adam"}[optimizer],
                f"{where['crossing_rank']:.1f} ({low:.1f} to {high:.1f})",
                *cells,
            ]
        )
    return table(["layer", "optimizer", "r\\* (quartiles)", *(RULES[rule] for rule in ("lora", "rora", "0.25"))], rows)


@block("layers.agreement")
def layers_agreement() -> str:
    rows = csv("real_layers/results.csv")
    rows = rows[(rows["rule"] == "lora") & (rows["quantity"] == "rms")]
    found = agreement(*(rows[name].tolist() for name in ("estimate", "standard_error", "exact")))
    return (
        f"{len(rows)} figures under one rule (the others are powers of gamma away): measured and exact rms differ by "
        f"at most {100 * found.largest_gap:.1f}%, the largest |z| is {found.largest_score:.2f}, the rms of z "
        f"{found.rms_score:.2f}"
    )


def _regime(optimizer: str, split: str = "heldout") -> pd.DataFrame:
    rows = csv("regime/crossing_ranks.csv")
    return rows[(rows["optimizer"] == optimizer) & (rows["split"] == split) & (rows["init"] == "kaiming_uniform")]


@block("regime.crossings")
def regime_crossings() -> str:
    rows = []
    for optimizer, name in (("sgd", "SGD"), ("adam", "Adam")):
        for down, kind in ((True, "`down_proj`"), (False, "the other modules")):
            found = _regime(optimizer)
            found = found[found["module"].str.endswith("down_proj") == down]
            pooled, median = found["crossing_rank"], found["median"]
            rows.append(
                [
                    name,
                    kind,
                    str(len(found)),
                    f"{pooled.min():.1f} to {pooled.max():.1f}",
                    f"{median.min():.1f} to {median.max():.1f}",
                    f"{int((pooled > 8).sum())}",
                ]
            )
    return table(
        ["optimizer", "modules", "how many", "r\\*, tokens pooled", "median over tokens", "of them r\\* > 8"], rows
    )


def _held_out(name: str, run: str = "regime_held_out") -> pd.DataFrame:
    """A table of a run at honestly held-out tokens: default init, held-out split, kinds of module beside."""
    rows = csv(f"{run}/{name}.csv")
    rows = rows[rows["split"] == "heldout"]
    rows = rows[rows["init"] == "kaiming_uniform"] if "init" in rows else rows
    return rows.assign(kind=rows["module"].str.rpartition(".")[2])


def _over_layers(values: pd.Series) -> str:
    return f"{values.median():.1f} ({values.min():.1f} to {values.max():.1f})"


@block("regime.held_out")
def regime_held_out() -> str:
    rows = []
    for (optimizer, kind), found in _held_out("crossing_ranks").groupby(["optimizer", "kind"], sort=False):
        cells = [_over_layers(found[column]) for column in ("crossing_rank", "median")]
        counts = [f"{int((found[column] > 8).sum())}" for column in ("crossing_rank", "median")]
        rows.append([{"sgd": "SGD", "adam": "Adam"}[optimizer], f"`{kind}`", str(len(found)), *cells, *counts])
    rows.sort(key=lambda row: row[0], reverse=True)
    heads = ["layers", "r\\*, tokens pooled", "r\\*, median over tokens", "pooled r\\* > 8", "median r\\* > 8"]
    return table(["optimizer", "module", *heads], rows)


def _led_by_cross_talk(rank: int) -> str:
    """The modules whose pooled r* under Adam is above a rank, of all of them."""
    found = _held_out("crossing_ranks").query("optimizer == 'adam'")["crossing_rank"]
    return f"{int((found > rank).sum())} of {len(found)}"


block("regime.led.8")(partial(_led_by_cross_talk, 8))
block("regime.led.16")(partial(_led_by_cross_talk, 16))


@block("regime.takeover")
def regime_takeover() -> str:
    rate = read("regime_held_out/manifest.json")["config"]["learning_rate"]
    rows = []
    for kind, found in _held_out("takeover").groupby("kind", sort=False):
        steps = [_over_layers(found.loc[found["rank"] == rank, "takeover"] / rate) for rank in (8, 32, 128)]
        turned = found.loc[found["rank"] == 8, "turn_5"] / rate
        rows.append([f"`{kind}`", str(len(turned)), *steps, _over_layers(turned)])
    heads = [f"steps t_A, r = {rank}" for rank in (8, 32, 128)]
    return table(["module", "layers", *heads, "5% of the signs have turned"], rows)


@block("regime.masked")
def regime_masked() -> str:
    found = _held_out("tokens")
    every, seen = (int(found[name].iloc[0]) for name in ("all", "seen"))
    sinks = found["sinks"]
    return (
        f"Of {every} held-out tokens {seen} begin as a training record does; besides, a module has {sinks.min()} to "
        f"{sinks.max()} sinks ({int((sinks > 0).sum())} of {len(sinks)} modules have any)"
    )


AFTER = (0, 16, 256)
"""Steps of training after which the regime of a fresh adapter was measured."""


def _after(text: str) -> pd.DataFrame:
    """By kind of module, in columns by steps of training: r* under Adam, pooled and of the median token, and the steps
    t_A of r = 32; the rows are layers.
    """
    found = {}
    for steps in AFTER:
        run = f"regime_after/{text}_{steps}"
        ranks = _held_out("crossing_ranks", run)
        ranks = ranks[ranks["optimizer"] == "adam"].set_index(["kind", "layer"])
        moved = _held_out("takeover", run)
        moved = moved[moved["rank"] == 32].set_index(["kind", "layer"])["takeover"]
        found |= {("r*", steps): ranks["median"]}
        found |= {("t_A", steps): moved / read(f"{run}/manifest.json")["config"]["lr"]}
    return pd.DataFrame(found)


TEXTS = {"templated": "questions in the template", "plain": "a novel"}


@block("regime.after")
def regime_after() -> str:
    rows = []
    for text, words in TEXTS.items():
        for kind, layers in _after(text).groupby(level="kind", sort=False):
            cells = [_over_layers(layers[name, steps]) for name in ("r*", "t_A") for steps in AFTER]
            rows.append([words, f"`{kind}`", *cells])
    heads = [f"{name}{f' after {steps}' if steps else ' before'}" for name in ("r\\*", "t_A") for steps in AFTER]
    return table(["text", "module", *heads], rows)


def _after_ratio(steps: int) -> str:
    """The largest change of a median over layers after so many steps, either way."""
    changes = []
    for text in TEXTS:
        medians = _after(text).groupby(level="kind").median()
        changes += [abs(np.log(medians[name, steps] / medians[name, 0])).max() for name in ("r*", "t_A")]
    return f"{np.exp(max(changes)):.1f}"


def _down_after(text: str) -> str:
    """The median r* of `down_proj` after 256 steps over that before."""
    medians = _after(text).groupby(level="kind").median().loc["down_proj"]
    return f"{medians['r*', 256] / medians['r*', 0]:.1f}"


def _later_after(text: str) -> str:
    """How many times as late A would lead after 256 steps, over the kinds of modules."""
    medians = _after(text).groupby(level="kind").median()
    later = medians["t_A", 256] / medians["t_A", 0]
    return f"{later.min():.1f} to {later.max():.1f}"


def _novel_over_templated() -> pd.DataFrame:
    """Medians over layers in a novel over those in questions in a template, by kind of module."""
    templated, plain = (_after(text).groupby(level="kind").median() for text in ("templated", "plain"))
    return plain / templated


for _text in TEXTS:
    block(f"regime.after.down.{_text}")(partial(_down_after, _text))
    block(f"regime.after.later.{_text}")(partial(_later_after, _text))
for _steps in AFTER:
    block(f"regime.after.novel.{_steps}")(
        lambda steps=_steps: f"{_novel_over_templated().loc['down_proj', ('r*', steps)]:.1f}"
    )


@block("regime.after.novel.others")
def regime_after_novel_others() -> str:
    """The modules but `down_proj` before training: r* of the two texts, and t_A of a novel over that of questions."""
    others = _novel_over_templated().drop("down_proj")
    apart, later = 100 * abs(others["r*", 0] - 1), others["t_A", 0]
    return f"within {bound(apart, 0)}%, and t_A is {later.min():.1f} to {later.max():.1f} times as late"


block("regime.after.ratio")(partial(_after_ratio, 16))
block("regime.after.ratio.256")(partial(_after_ratio, 256))


@block("regime.after.losses")
def regime_after_losses() -> str:
    parts = []
    for text, words in TEXTS.items():
        losses = [read(f"regime_after/{text}_{steps}/manifest.json")["heldout_loss"] for steps in AFTER]
        parts.append(f"{losses[0]:.2f} to {losses[1]:.2f} and {losses[2]:.2f} nats a token ({words})")
    return " and from ".join(parts)


@block("regime.set.by.one")
def regime_set_by_one() -> str:
    """Pooled r* and its median over tokens under SGD, in the module where they are furthest apart."""
    found = _regime("sgd")
    far = found.loc[(found["median"] / found["crossing_rank"]).idxmax()]
    assert far["module"].endswith("down_proj"), "the sentence says so"
    return f"the pooled r\\* was {far['crossing_rank']:.1f} and the median {far['median']:.0f}"


@block("regime.judge")
def regime_judge() -> str:
    found = read("regime/verdict.json")
    return (
        f"{found['comparisons']} figures, {found['outside']} outside 2% or their error bar (for a false alarm of "
        f"{found['false_alarm']:g} over all); largest |t| {found['largest_t']:.2f}"
    )


# The coordinate check.


@block("coordinate.slopes")
def coordinate_slopes() -> str:
    slopes = csv("coordinate_check/slopes.csv")
    slopes = slopes[slopes["quantity"] == "hidden"]
    cases = [
        ("adamw", "lora", "kaiming_uniform", "AdamW, `alpha / r`"),
        ("adamw", "rora", "kaiming_uniform", "AdamW, `alpha / sqrt(r)`"),
        ("sgd", "lora", "kaiming_uniform", "SGD, `alpha / r`"),
        ("sgd", "rora", "kaiming_uniform", "SGD, `alpha / sqrt(r)`"),
    ]
    main = slopes[slopes["control"] == 0]
    found = [
        (name, main[(main["optimizer"] == optimizer) & (main["rule"] == rule) & (main["init"] == init)])
        for optimizer, rule, init, name in cases
    ]
    controls = slopes[slopes["control"] == 1]
    found += [
        (f"control: AdamW, {_control(*key)}", group) for key, group in controls.groupby(["rule", "init"], sort=False)
    ]
    rows = []
    for name, group in found:
        cells = [
            signed(row["slope"], row["half_width"])
            for split in ("train", "held_out")
            for step in (1, 10)
            for row in [one(group, split=split, step=step)]
        ]
        rows.append([name, *cells])
    return table(["", "training batch, step 1", "step 10", "held-out batch, step 1", "step 10"], rows)


def _first_slope(rule: str, init: str, control: int) -> str:
    """AdamW's slope of the hidden states' change after step 1, training batch."""
    found = csv("coordinate_check/slopes.csv").query("quantity == 'hidden' and split == 'train' and step == 1")
    row = one(found[found["optimizer"] == "adamw"], rule=rule, init=init, control=control)
    return signed(row["slope"], row["half_width"])


block("coordinate.gaussian")(partial(_first_slope, "lora", "gaussian", 1))
block("coordinate.constant")(partial(_first_slope, "0", "kaiming_uniform", 1))


def _control(rule: str, init: str) -> str:
    if init == "gaussian":
        return "`alpha / r`, `gaussian` init"
    return "constant gamma" if rule == "0" else RULES[rule]


@block("transfer.check")
def transfer_check() -> str:
    frame = csv("transfer/summary.csv")
    rows = []
    for plan in dict.fromkeys(frame["plan"]):
        if plan == "tuned":
            continue
        cells = [one(frame, plan=plan, quantity=quantity) for quantity in ("modules", "hidden", "logits")]
        alpha, rate = cells[0]["alpha"], cells[0]["learning_rate"]
        texts = [f"{cell['ratio']:.3f} ± {cell['standard_error']:.3f}" for cell in cells]
        rows.append([plan, f"{alpha:.4g}", f"{rate:.3g}", *texts])
    return table(["at r = 128", "alpha", "rate", "modules (rms)", "final hidden states", "logits"], rows)


OUTPUTS = ("hidden", "logits")


def _checked(plan: str, *quantities: str) -> list[pd.Series]:
    return [one(csv("transfer/summary.csv"), plan=plan, quantity=quantity) for quantity in quantities]


def _grown(plan: str, digits: int, *quantities: str) -> str:
    """By what these changed more, the least and the largest."""
    ratios = sorted(row["ratio"] for row in _checked(plan, *quantities))
    return " to ".join(dict.fromkeys(f"{ratio:.{digits}f}" for ratio in (ratios[0], ratios[-1])))


@block("transfer.within")
def transfer_within() -> str:
    """How far the advice may be from keeping the outputs' change: deviation and half a 95% interval over the draws."""
    draws = read("transfer/manifest.json")["config"]["seeds"]
    reach = stats.t.ppf(0.975, draws - 1)
    found = [abs(row["ratio"] - 1) + reach * row["standard_error"] for row in _checked("neither changed", *OUTPUTS)]
    return f"{bound((100 * each for each in found), 0)}% (95%, {draws} draws)"


block("transfer.modules")(lambda: f"{_checked('neither changed', 'modules')[0]['ratio']:.2f}")
block("transfer.one_alpha")(lambda: _grown("one alpha", 2, *OUTPUTS))
block("transfer.by_module")(lambda: _grown("alpha by module", 1, *OUTPUTS))
block("transfer.rslora")(lambda: _grown("neither changed, use_rslora", 1, "modules", *OUTPUTS))


# Later steps.


def _exponents(model: str, optimizer: str, rule: str, start_rank: int, quantity: str) -> list[str]:
    frame = csv("training_dynamics/exponents.csv")
    frame = frame[
        (frame["model"] == model)
        & (frame["start"] == "A")
        & (frame["trained"] == "both")
        & (frame["optimizer"] == optimizer)
        & (frame["rule"] == rule)
        & (frame["lowest_rank"] == start_rank)
        & (frame["highest_rank"] == 1024)
        & (frame["quantity"] == quantity)
    ]
    return [
        signed(row["slope"], row["standard_error"], 3) for step in (1, 10, 30, 100) for row in [one(frame, step=step)]
    ]


@block("dynamics.exponents")
def dynamics_exponents() -> str:
    cases = [
        ("SGD, `alpha / sqrt(r)` (rsLoRA's theorem: flat)", "sgd", "rora"),
        ("Adam, `alpha / r` (flat, where the change is Theta(r) at fixed gamma)", "adam", "lora"),
    ]
    rows = []
    for name, optimizer, rule in cases:
        for model in ("linear", "mlp"):
            for low in (64, 4):
                cells = _exponents(model, optimizer, rule, low, "output_train")
                rows.append([name, model, f"{low} to 1024", *cells])
    return table(["claim", "model", "ranks", "step 1", "step 10", "step 30", "step 100"], rows)


@block("dynamics.answers")
def dynamics_answers() -> str:
    rows = [[a["question"], a["answer"], a["figures"]] for a in read("training_dynamics/answers.json")]
    return table(["question", "answer", "slope or exponent by step, ± one standard error"], rows)


# The best rate.


@block("rates.toy")
def rates_toy() -> str:
    frame = csv("lr_transfer/slopes.csv")
    rows = []
    for _, row in frame.iterrows():
        rows.append(
            [
                {"sgd": "SGD", "adam": "Adam"}[row["optimizer"]],
                {"both": "A and B", "B": "B alone"}[row["trained"]],
                RULES[row["rule"]],
                row["ranks"].replace(" ", ", "),
                signed(row["slope"], row["half_width"]),
                f"{row['signal']:+.2f}",
                f"{row['cross-talk']:+.2f}",
                "" if pd.isna(row["A moves"]) else f"{row['A moves']:+.2f}",
            ]
        )
    heads = [
        "optimizer",
        "trained",
        "rule",
        "ranks",
        "slope of the best rate",
        "first step, signal",
        "first step, cross-talk",
    ]
    return table([*heads, "long run, A-led"], rows)


@block("rates.toy.horizon")
def rates_toy_horizon() -> str:
    """Slopes of the best rate in the rank at every horizon, by either loss."""
    rows = []
    for judge, words in (("train", "training"), ("held_out", "held-out")):
        for folder in sorted(
            (PUBLISHED / "horizon_toy").glob(f"{judge}_*"), key=lambda one: int(one.name.split("_")[-1])
        ):
            found = csv(f"horizon_toy/{folder.name}/slopes.csv").set_index("rule")
            cells = [
                signed(found.loc[rule, "slope"], found.loc[rule, "half_width"]) for rule in ("lora", "rora", "0.25")
            ]
            apart = found.loc["rora", "slope"] - found.loc["lora", "slope"]
            rows.append([words, folder.name.split("_")[-1], *cells, f"{apart:+.2f}"])
    rows.append(["the law, A-led", "", *(f"{slope:+.2f}" for slope in A_LED.values()), f"{A_LED['rora']:+.2f}"])
    return table(["loss", "steps", *list(RULES.values())[:3], "second less first"], rows)


A_LED = {"lora": 0.0, "rora": -0.25, "0.25": -0.375}
"""Slopes of Adam's best rate in the rank by the law of a long run, in which A's own motion leads."""


@block("rates.toy.gamma")
def rates_toy_gamma() -> str:
    """How far gamma's part of the slope is from the law's at most, over horizons and losses."""
    slopes = [csv(f"horizon_toy/{path.name}/slopes.csv") for path in (PUBLISHED / "horizon_toy").iterdir()]
    parts = [one(own, rule="rora")["slope"] - one(own, rule="lora")["slope"] for own in slopes]
    return bound((abs(part - A_LED["rora"]) for part in parts), 2)


@block("rates.toy.short")
def rates_toy_short() -> str:
    """How far the slopes up to 30 steps are from the law's at most, over rules and losses."""
    apart = []
    for judge, steps in itertools.product(("train", "held_out"), (10, 30)):
        found = csv(f"horizon_toy/{judge}_{steps}/slopes.csv")
        apart += [abs(one(found, rule=rule)["slope"] - slope) for rule, slope in A_LED.items()]
    return bound(apart, 2)


def _toy_slope(run: str, rule: str = "lora") -> str:
    """How the best rate of a rule under Adam moves with the rank in a run of the controlled problem."""
    found = one(csv(f"horizon_toy/{run}/slopes.csv"), rule=rule)
    return signed(found["slope"], found["half_width"])


block("rates.toy.slope.held_out_100")(partial(_toy_slope, "held_out_100"))
block("rates.toy.slope.train_100")(partial(_toy_slope, "train_100"))


@block("rates.model.horizon")
def rates_model_horizon() -> str:
    """Exponents of the best rate in gamma r and in the rank of the real model, at every horizon."""
    rows = []
    for row in frames.rows(csv("horizon/exponents.csv")):
        by_strength = row["over"] == "strength"
        what = (
            "r = {at:g}: from gamma r = {first:g} to {second:g}",
            "gamma r = {at:g}: from r = {first:g} to {second:g}",
        )
        law = law_range(row)
        found = signed(row["exponent"], row["half_width"])
        cells = [str(row["step"]), what[not by_strength].format(**row), found, str(row["seeds"])]
        parts = f"{row['by_parts']:+.2f}: {row['by_parts_verdict']}" if row["by_parts"] is not None else ""
        rows.append([*cells, f"{law}: {row['verdict']}", parts])
    heads = ["steps", "compared", "exponent of the best rate", "seeds", "the law's: verdict"]
    return table([*heads, "by the measured parts: verdict"], rows)


@block("rates.model.horizon.best")
def rates_model_horizon_best() -> str:
    rows = [
        [
            str(row["step"]),
            *((f"{row['rank']:g}", f"{row['strength']:g}") if row["rank"] else ("full", "")),
            f"{row['best_rate']:.2g}",
            f"{row['best_loss']:.3f}",
            f"{row['seeds']}",
            row["edge"] or "",
        ]
        for row in frames.rows(csv("horizon/best.csv"))
    ]
    return table(["steps", "rank", "gamma r", "best rate", "least loss", "seeds", "at the grid's edge"], rows)


def _beside(run: str, start: str, form: str, *more: Callable[[dict[str, Any]], str]) -> list[list[str]]:
    """Cells of what stands beside what starts so in a run of sims.horizon: which, ``more``, the ratio of the best rates
    in this form, the difference of the least losses and the seeds."""
    found = csv(f"{run}/beside.csv")
    return [
        [
            *(f"{row[name]:g}" for name in ("step", "rank", "strength")),
            *(each(row) for each in more),
            f"{row['ratio']:{form}}",
            signed(row["difference"], row["half_width"], 3),
            f"{row['seeds']}",
        ]
        for row in frames.rows(found[found["beside"].str.startswith(start)])
    ]


@block("rates.model.full")
def rates_model_full() -> str:
    """Adapters at their best rates beside full fine-tuning of the same modules."""
    heads = ["steps", "rank", "gamma r", "best rate over full fine-tuning's", "least loss less full fine-tuning's"]
    return table([*heads, "seeds"], _beside("horizon", "full", ".1f"))


@block("rates.model.ranks")
def rates_model_ranks() -> str:
    """Lower ranks beside the largest at one gamma r, each at its own best rate."""
    rows = _beside("horizon", "r = ", ".2f", lambda row: row["beside"])
    return table(["steps", "rank", "gamma r", "beside", "ratio of best rates", "least loss less", "seeds"], rows)


@block("rates.model.strengths")
def rates_model_strengths() -> str:
    """Gamma r = 64 beside 724 at one rank, each at its own best rate."""
    rows = _beside("horizon", "gamma", ".1f", lambda row: row["verdict"].partition(" (")[0])
    rows = [[step, rank, *figures, seeds, verdict] for step, rank, _, verdict, *figures, seeds in rows]
    heads = ["steps", "rank", "best rate over that at 724", "least loss less that at 724", "seeds", "verdict"]
    return table(heads, rows)


@block("rates.model.one_rate")
def rates_model_one_rate() -> str:
    """Gamma r = 64 beside 724 at one rank and one rate."""
    rows = [
        [
            *(f"{row['step']}", f"{row['rank']}", f"{row['learning_rate']:.1e}"),
            signed(row["difference"], row["half_width"], 3),
            f"{row['seeds']}",
        ]
        for row in frames.rows(csv("horizon/one_rate.csv"))
    ]
    return table(["steps", "rank", "rate of both", "loss at 64 less loss at 724", "seeds"], rows)


LOW_RATE = 0.00017783
"""The lowest at which both ran."""


def _two_strengths(step: int, rank: int, rate: float | None = None) -> dict[str, Any]:
    """Gamma r = 64 beside 724 at a rank: each at its own best rate, or both at this one."""
    if rate is None:
        return one(csv("horizon/beside.csv"), step=step, rank=rank, beside="gamma r = 724")
    return one(csv("horizon/one_rate.csv"), step=step, rank=rank, learning_rate=rate)


def _loss_apart(step: int, rank: int, rate: float | None = None) -> str:
    """Loss at gamma r = 64 less that at 724, nats a token, with half a 95% interval."""
    found = _two_strengths(step, rank, rate)
    return signed(found["difference"], found["half_width"], 3)


for _step in (64, 256):
    block(f"rates.model.strengths.128.{_step}")(partial(_loss_apart, _step, 128))


@block("rates.model.strengths.bound")
def rates_model_strengths_bound() -> str:
    """How far the two strengths may be apart at r = 128 after 64 and 256 steps, interval and grid included."""
    most = 0.0
    for step in (64, 256):
        found = re.search(r"\(([-+.\d]+)% ± ([.\d]+)%\)", _two_strengths(step, 128)["verdict"])
        assert found
        most = max(most, abs(float(found[1])) + float(found[2]))
    return f"{bound([most], 0)}%"


block("rates.model.strengths.ratio")(lambda: f"{_two_strengths(64, 128)['ratio']:.1f}")
block("rates.model.strengths.verdicts")(
    lambda: ", ".join(
        f"{_two_strengths(step, 128)['verdict'].split(' (')[1].rstrip(')')} after {step}" for step in (16, 64, 256)
    )
)
for _step in (16, 64, 256):
    block(f"rates.model.one_rate.8.{_step}")(partial(_loss_apart, _step, 8, LOW_RATE))
for _step in (16, 64):
    block(f"rates.model.one_rate.128.{_step}")(partial(_loss_apart, _step, 128, LOW_RATE))


def law_range(row: Any) -> str:
    """The law of the median takeover, and from 5% to 95% of the modules' where they differ."""
    middle, low, high = (f"{row[name]:+.2f}" for name in ("law", "law_low", "law_high"))
    return middle if low == high else f"{middle} ({low} to {high})"


@block("rates.model.steps")
def rates_model_steps() -> str:
    """How the best rate moves with the steps of the run."""
    rows = [
        [
            *((f"{row['rank']:g}", f"{row['strength']:g}") if row["rank"] else ("full", "")),
            f"{row['first']} to {row['second']}",
            signed(row["exponent"], row["half_width"], 2),
            f"{row['seeds']}",
            f"{law_range(row)}: {row['verdict']}",
        ]
        for row in frames.rows(csv("horizon/steps.csv"))
    ]
    heads = [
        "rank",
        "gamma r",
        "steps",
        "exponent of the best rate in the steps",
        "seeds",
        "a constant gradient's: verdict",
    ]
    return table(heads, rows)


@block("rates.model.attention")
def rates_model_attention() -> str:
    """Adapters in the attention alone beside those in all modules, each at its own best rate."""
    best = csv("horizon_attention/best.csv").set_index(["step", "rank", "strength"])

    def rate(row: dict[str, Any]) -> str:
        found = best.loc[(row["step"], row["rank"], row["strength"])]
        return f"{found['best_rate']:.2g}" + (" (edge)" if isinstance(found["edge"], str) else "")

    rows = _beside("horizon_attention", "targets", ".2f", rate)
    heads = ["steps", "rank", "gamma r", "best rate", "over that of all modules", "least loss less that of all modules"]
    return table([*heads, "seeds"], rows)


def _nearest_best(step: int, rank: int, strength: float) -> pd.Series:
    """Which part leads in the run whose rate is nearest the best one, that of the last horizon which has one."""
    best = csv("horizon/best.csv")
    best = best[(best["rank"] == rank) & (best["strength"] == strength) & (best["step"] <= step)]
    rate = best.sort_values("step")["best_rate"].iloc[-1]
    led = csv("horizon/led.csv")
    own = led[(led["step"] == step) & (led["rank"] == rank) & (led["strength"] == strength)]
    return own.loc[np.abs(np.log(own["learning_rate"] / rate)).idxmin()]


@block("rates.model.led")
def rates_model_led() -> str:
    """A-led over B-led part of the change near the best rates, beside the law's, and the exponent that it gives."""
    led, rows = csv("horizon/led.csv"), []
    for step, rank, strength in sorted(set(led[["step", "rank", "strength"]].itertuples(index=False, name=None))):
        row = _nearest_best(step, rank, strength)
        ratio, exponent = (
            f"{row[name]:{form}} ({row[f'{name}_low']:{form}} to {row[f'{name}_high']:{form}})"
            for name, form in (("ratio", ".2g"), ("exponent", "+.2f"))
        )
        rate, law = (f"{row[name]:.2g}" for name in ("learning_rate", "law_ratio"))
        rows.append([f"{step}", f"{rank}", f"{strength:g}", rate, ratio, law, exponent])
    heads = ["steps", "rank", "gamma r", "rate", "A-led over B-led", "by the law", "exponent that keeps the change"]
    return table(heads, rows)


@block("rates.model.neighbours")
def rates_model_neighbours() -> str:
    """How far apart the least loss and those of its two neighbours are at most after 64 steps, a seed each."""
    spreads = []
    runs = csv("horizon/results.csv").query("step == 64").sort_values("learning_rate")
    for _, own in runs.groupby(["rank", "strength", "seed"], dropna=False):
        losses = own["validation_loss"].to_numpy()
        at = int(losses.argmin())
        spreads.append(losses[max(at - 1, 0) : at + 2].max() - losses[at])
    return f"{bound(spreads, 3)} nats ({len(spreads)} cases)"


PREDICTED_PARTS = (-0.93, -0.65)
"""Where the exponent of the parts was to lie after 64 steps (the second prediction of the folder's README)."""


block("rates.model.led.range")(lambda: " and ".join(f"{each:.2f}" for each in PREDICTED_PARTS))


@block("rates.model.led.predicted")
def rates_model_led_predicted() -> str:
    """How many runs have their exponent in the predicted range: every seed of r = 8 and 128 at gamma r = 64, read after
    64 steps, at the rate nearest the best one."""
    led, found = csv("horizon/led.csv").query("step == 64 and strength == 64"), []
    for rank in (8, 128):
        rate = _nearest_best(64, rank, 64.0)["learning_rate"]
        found += led[(led["rank"] == rank) & np.isclose(led["learning_rate"], rate)]["exponent"].tolist()
    low, high = PREDICTED_PARTS
    inside = sum(low <= each <= high for each in found)
    return f"{inside} of {len(found)} runs ({min(found):+.2f} to {max(found):+.2f})"


PREDICTED_CHANGE = (0.5, 0.8)
"""The change at gamma r = 724 over that at 64 after 256 steps, as the third prediction of the same README has it."""


def _change_by_rate(step: int) -> str:
    """The change over that at the next lower rate of the grid, a quarter of a decade below, over all such pairs."""
    led, ratios = csv("horizon/led.csv").query(f"step == {step}"), []
    for _, own in led.groupby(["rank", "strength", "seed"]):
        grown = own.sort_values("learning_rate")[["learning_rate", "change"]].pipe(np.log).diff().dropna()
        ratios += np.exp(grown.loc[np.isclose(grown["learning_rate"], np.log(10) / 4, atol=0.01), "change"]).tolist()
    return f"{min(ratios):.2f} to {max(ratios):.2f} (median {np.median(ratios):.2f}, {len(ratios)} pairs)"


def _change_ratios(step: int, predicted: tuple[float, float] | None = None) -> str:
    """The change at the best rate of gamma r = 724 over that at the best rate of 64, at every rank that has both."""
    parts = []
    for rank, own in csv("horizon/change.csv").query(f"step == {step}").groupby("rank"):
        change = own.set_index("strength")["change"]
        if {64, 724} <= set(change.index):
            ratio, seeds = change[724] / change[64], int(own["seeds"].min())
            where = "" if predicted is None or predicted[0] <= ratio <= predicted[1] else "not "
            judged = "" if predicted is None else f", {where}as predicted"
            parts.append(f"{ratio:.2f} (r = {rank:g}, {_seeds(seeds)}{judged})")
    return " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else parts[0]


for _step in (16, 64, 256):
    block(f"rates.model.change.rate.{_step}")(partial(_change_by_rate, _step))
block("rates.model.change.predicted")(lambda: " to ".join(f"{each:g}" for each in PREDICTED_CHANGE))
block("rates.model.change.64")(partial(_change_ratios, 64))
block("rates.model.change.256")(partial(_change_ratios, 256, PREDICTED_CHANGE))


@block("rates.model.change")
def rates_model_change() -> str:
    """How much larger the change is at the best rate of gamma r = 724 than at that of 64."""
    found, rows = csv("horizon/change.csv"), []
    for (step, rank), own in found.groupby(["step", "rank"]):
        ends = own.sort_values("strength")
        if len(ends) < 2:
            continue
        first, last = ends.iloc[0], ends.iloc[-1]
        error = f"{2 ** math.hypot(first['log2_error'], last['log2_error']):.2f}"
        if own["edge"].notna().any():
            error = "a best rate at the grid's edge"
        cells = [f"{row['change']:.3g} at {row['best_rate']:.2g}" for row in (first, last)]
        rows.append([f"{step}", f"{rank:g}", *cells, f"{last['change'] / first['change']:.2f}", error])
    heads = ["steps", "rank", "rms change, gamma r = 64", "gamma r = 724", "second over first"]
    return table([*heads, "factor of one standard error (of the best rates)"], rows)


def _strength_row(step: int, rank: int) -> pd.Series:
    """How the best rate moves with gamma r at this rank and horizon, beside the law."""
    return csv("horizon/exponents.csv").set_index(["over", "step", "at"]).loc["strength", step, rank]


def _exponent_at(step: int, rank: int) -> str:
    found = _strength_row(step, rank)
    return signed(found["exponent"], found["half_width"])


NUMBERS = {1: "one", 2: "two", 3: "three"}


def _seeds(count: int) -> str:
    """How many seeds, in words."""
    return f"{NUMBERS.get(count, count)} seed{'s' if count > 1 else ''}"


def _as_factor(row: pd.Series, grows: float, digits: int = 1) -> str:
    """What an exponent is as a factor where its base grows so much, with its 95% interval."""
    ends = sorted(grows ** (row["exponent"] + sign * row["half_width"]) for sign in (-1, 1))
    low, value, high = (f"{each:.{digits}f}" for each in (ends[0], grows ** row["exponent"], ends[1]))
    return f"{value} ({low} to {high})"


def _steps_row(strength: float, rank: int) -> pd.Series:
    return one(csv("horizon/steps.csv"), rank=rank, strength=strength, first=16, second=256)


def _steps_at(strength: float, rank: int = 8) -> str:
    """The exponent of the best rate in the steps, from the shortest to the longest run."""
    found = _steps_row(strength, rank)
    return signed(found["exponent"], found["half_width"])


def _steps_factor(strength: float, rank: int = 8) -> str:
    """By what the best rate changes where the steps become four times as many."""
    return _as_factor(_steps_row(strength, rank), 4, 2)


def _steps_factors(rank: int) -> str:
    """Both strengths, with the seeds."""
    rows = [_steps_row(strength, rank) for strength in (64, 724)]
    first, second = (_as_factor(row, 4, 2) for row in rows)
    return f"{first} at gamma r = 64 and {second} at 724, {_seeds(min(row['seeds'] for row in rows))}"


def _change_growth(first: int, second: int) -> str:
    """The exponent of the change in the steps within one run at r = 8, over all runs that were read at both."""
    led = csv("horizon/led.csv").query("rank == 8").set_index(["strength", "learning_rate", "seed"])
    early, late = (led[led["step"] == step]["change"] for step in (first, second))
    powers = (np.log(late / early) / math.log(second / first)).dropna()
    return f"{powers.min():.2f} to {powers.max():.2f} (median {powers.median():.2f}, {len(powers)} runs)"


block("rates.model.growth.early")(lambda: _change_growth(16, 64))
block("rates.model.growth.late")(lambda: _change_growth(64, 256))
block("rates.model.steps.factor.64")(lambda: _steps_factor(64))
block("rates.model.steps.factor.724")(lambda: _steps_factor(724))
block("rates.model.steps.factors.r128")(lambda: _steps_factors(128))
block("rates.model.steps.64")(lambda: _steps_at(64))
block("rates.model.steps.724")(lambda: _steps_at(724))
block("rates.model.steps.64.r128")(lambda: _steps_at(64, 128))
block("rates.model.steps.724.r128")(lambda: _steps_at(724, 128))
block("rates.model.steps.law.724.r128")(lambda: f"{_steps_row(724, 128)['law']:+.2f}")
block("rates.model.steps.law.fall")(lambda: f"{4 ** _steps_row(64, 8)['law']:.2f}")


def _horizon_factor(rank: int, step: int = 64) -> str:
    """By what the best rate fell between the two strengths, with its 95% interval."""
    found = _strength_row(step, rank)
    return _as_factor(found, found["first"] / found["second"])


block("rates.model.horizon.factor")(lambda: _horizon_factor(8))
block("rates.model.horizon.factor.r128")(lambda: _horizon_factor(128))
block("rates.model.horizon.factor.256")(lambda: _horizon_factor(8, 256))


def _rank_row(first: int) -> pd.Series:
    """How the best rate of `alpha / r` (alpha 64: gamma r = 64) moves from this rank to 128 after 64 steps."""
    return one(csv("horizon/exponents.csv"), over="rank", step=64, at=64, first=first)


def _rank_exponent(first: int) -> str:
    found = _rank_row(first)
    return signed(found["exponent"], found["half_width"])


def _rank_law(first: int) -> str:
    """Up to what the law has for that factor: it keeps the first step of 95% of the modules, cross-talk included."""
    found = _rank_row(first)
    return f"{(found['second'] / found['first']) ** found['law_high']:.1f}"


for _rank in (1, 8, 32):
    block(f"rates.model.rank.law.{_rank}")(partial(_rank_law, _rank))


def _rank_factor(first: int) -> str:
    """The best rate of r = 128 over that of this rank."""
    found = _rank_row(first)
    return _as_factor(found, found["second"] / found["first"])


@block("rates.model.rank.factors")
def rates_model_rank_factors() -> str:
    """The best rate of r = 128 over those of the lower ranks, with what all three intervals span."""
    rows = [_rank_row(rank) for rank in (1, 8, 32)]
    powers = [[row["exponent"] + sign * row["half_width"] for sign in (-1, 0, 1)] for row in rows]
    found = np.array([(row["second"] / row["first"]) ** np.array(own) for row, own in zip(rows, powers, strict=True)])
    low, high = found[:, 1].min(), found[:, 1].max()
    seeds = " or ".join(NUMBERS[count] for count in sorted({int(row["seeds"]) for row in rows}))
    spans = f"{seeds} seeds; 95% intervals between {found[:, 0].min():.1f} and {found[:, 2].max():.1f}"
    return f"{low:.1f} to {high:.1f} times those of r = 1, 8 and 32 ({spans})"


block("rates.model.rank")(lambda: _rank_exponent(8))
for _rank in (1, 32):
    block(f"rates.model.rank.{_rank}")(partial(_rank_exponent, _rank))
for _rank in (1, 8, 32):
    block(f"rates.model.rank.factor.{_rank}")(partial(_rank_factor, _rank))


@block("rates.model.rank.ratio.1")
def rates_model_rank_ratio() -> str:
    """The best rate of r = 1 over that of r = 128, after 64 steps at gamma r = 64."""
    return f"{one(csv('horizon/beside.csv'), step=64, rank=1, strength=64, beside='r = 128')['ratio']:.1f}"


def _best_rates(step: int) -> str:
    """The least and the largest best rate over ranks at gamma r = 64."""
    rates = csv("horizon/best.csv").query(f"step == {step} and strength == 64")["best_rate"]
    return f"{rates.min():.1e} to {rates.max():.1e}"


block("rates.model.best.64")(partial(_best_rates, 64))
block("rates.model.best.256")(partial(_best_rates, 256))


def _attention_loss(run: str, rank: int) -> str:
    """Least loss after 64 steps at gamma r = 64, mean over the two seeds that the attention alone ran."""
    found = csv(f"{run}/results.csv").query(f"step == 64 and rank == {rank} and strength == 64 and seed < 2")
    return f"{found.groupby('seed')['validation_loss'].min().mean():.3f}"


ALL_MODULES = "targets q_proj k_proj v_proj up_proj down_proj"
"""What the runs in the attention alone stand beside."""


@block("rates.model.attention.behind")
def rates_model_attention_behind() -> str:
    """Least loss of the attention alone less that of all modules after 64 steps."""
    parts = []
    for rank in (8, 128):
        row = one(csv("horizon_attention/beside.csv"), step=64, rank=rank, beside=ALL_MODULES)
        parts.append(f"{signed(row['difference'], row['half_width'], 3)} (r = {rank})")
    return " and ".join(parts)


@block("rates.model.attention.ratio")
def rates_model_attention_ratio() -> str:
    """The best rate of the attention alone over that of all modules after 64 steps at r = 128, with its interval."""
    found = one(csv("horizon_attention/beside.csv"), step=64, rank=128, error_over="seeds", seeds=2, beside=ALL_MODULES)
    low, high = (found["ratio"] * 2 ** (sign * found["ratio_log2_half_width"]) for sign in (-1, 1))
    return f"{found['ratio']:.1f} ({low:.1f} to {high:.1f})"


block("rates.model.attention.128")(lambda: _attention_loss("horizon_attention", 128))
block("rates.model.attention.all")(lambda: _attention_loss("horizon", 8))


@block("rates.model.behind")
def rates_model_behind() -> str:
    """How far r = 1 and r = 8 are behind r = 128 after 64 steps at gamma r = 64."""
    found = csv("horizon/beside.csv").query("step == 64 and strength == 64 and beside == 'r = 128'").set_index("rank")
    parts = (f"{signed(found['difference'][rank], found['half_width'][rank], 3)} (r = {rank})" for rank in (1, 8))
    return " and ".join(parts)


@block("rates.model.full.ratio")
def rates_model_full_ratio() -> str:
    """An adapter's best rate over full fine-tuning's after 64 steps at gamma r = 64, over ranks."""
    found = csv("horizon/beside.csv").query("step == 64 and strength == 64 and beside == 'full'")["ratio"]
    return f"{found.min():.1f} to {found.max():.1f}"


@block("rates.model.horizon.law")
def rates_model_horizon_law() -> str:
    """The law's exponents after 64 steps at both ranks: the median module, and 5% and 95% of all."""
    found = csv("horizon/exponents.csv")
    own = found[(found["over"] == "strength") & (found["step"] == 64)]
    return f"{own['law'].mean():+.2f} ({own['law_low'].min():+.2f} to {own['law_high'].max():+.2f})"


def _parts_at(step: int, rank: int) -> str:
    found = _strength_row(step, rank)
    return f"{found['by_parts']:+.2f}"


def _ratio_at(step: int, rank: int) -> str:
    """Measured and the law's ratio of the parts near the best rate at gamma r = 64."""
    row = _nearest_best(step, rank, 64.0)
    return f"{row['ratio']:.1f} where the law had {row['law_ratio']:.0f}"


def _predicted(step: int) -> str:
    """The law's exponent as it was written down before the runs: the median module, and a best rate of 1e-3 at 64."""
    found = csv("horizon/predictions.csv").query(f"steps == {step} and quantile == 0.5 and rate == 0.001")
    return f"{found['exponent'].item():.2f}"


for _step in (16, 64):
    block(f"rates.model.predicted.{_step}")(partial(_predicted, _step))


@block("rates.model.horizon.law.256")
def rates_model_horizon_law_long() -> str:
    """The law's exponent after 256 steps at r = 8."""
    found = _strength_row(256, 8)
    return law_range(found)


for _step in (16, 64, 256):
    for _rank in (8, 128):
        _at = {"step": _step, "rank": _rank}
        block(f"rates.model.horizon.{_step}.r{_rank}")(partial(_exponent_at, **_at))
        block(f"rates.model.parts.{_step}.r{_rank}")(partial(_parts_at, **_at))
        block(f"rates.model.ratio.{_step}.r{_rank}")(partial(_ratio_at, **_at))


@block("rates.toy.comparison")
def rates_toy_comparison() -> str:
    rows = []
    for found in read("lr_transfer/comparison.json"):
        if (found["first"], found["second"]) != ("lora", "rora"):
            continue
        relative, half = (100 * found[name] / found["second_loss"] for name in ("difference", "half_width"))
        rows.append(
            [
                {"sgd": "SGD", "adam": "Adam"}[found["optimizer"]],
                {"both": "A and B", "B": "B alone"}[found["trained"]],
                f"{relative:+.1f}% ± {half:.1f}%",
                f"{found['ratio']:.2f}",
                f"{found['scaling_ratio']:.2f}",
            ]
        )
    heads = ["optimizer", "trained", "loss of `alpha / r` less that of `alpha / sqrt(r)`", "best rates' ratio"]
    return table([*heads, "ratio by the first step alone"], rows)


PAIRS = (("lora", "rora"), ("lora", "0.25"), ("rora", "0.25"))


def _toy_apart(run: str, first: str, second: str) -> dict[str, Any]:
    """How two rules compare in a run of the controlled problem, Adam, A and B trained."""
    found = [each for each in read(f"horizon_toy/{run}/comparison.json") if each["first"] == first]
    return next(each for each in found if each["second"] == second)


def _per_cent(found: dict[str, Any]) -> str:
    relative, half = (100 * found[name] / found["second_loss"] for name in ("difference", "half_width"))
    return f"{relative:+.1f}% ± {half:.1f}%"


@block("rates.toy.comparison.horizon")
def rates_toy_comparison_horizon() -> str:
    """Every pair of rules at every horizon, by either loss."""
    rows = []
    for judge, words in (("held_out", "held-out"), ("train", "training")):
        for steps in (10, 30, 100, 300, 1000):
            cells = []
            for pair in PAIRS:
                found = _toy_apart(f"{judge}_{steps}", *pair)
                cells.append(f"{_per_cent(found)}: {'undecided' if 'undecided' in found['verdict'] else 'decided'}")
            rows.append([words, f"{steps}", *cells])
    return table(["loss", "steps", *(f"{RULES[first]} less {RULES[second]}" for first, second in PAIRS)], rows)


@block("rates.toy.frozen")
def rates_toy_frozen() -> str:
    """`alpha / r` less `alpha / sqrt(r)` with A frozen, Adam and SGD."""
    found = [each for each in read("lr_transfer/comparison.json") if each["trained"] == "B"]
    found = [each for each in found if (each["first"], each["second"]) == ("lora", "rora")]
    return " and ".join(f"{_per_cent(each)} ({'Adam' if each['optimizer'] == 'adam' else 'SGD'})" for each in found)


for _run in ("held_out_100", "held_out_300", "held_out_1000"):
    for _first, _second in PAIRS:
        block(f"rates.toy.apart.{_run}.{_first}.{_second}")(
            lambda run=_run, first=_first, second=_second: _per_cent(_toy_apart(run, first, second))
        )


@block("rates.model")
def rates_model() -> str:
    best, slopes = csv("lr_transfer_smollm2/best.csv"), csv("lr_transfer_smollm2/slopes.csv")
    rows = []
    for rule in ("lora", "rora", "quarter"):
        own = best[best["rule"] == rule].set_index("rank")
        slope = one(slopes, rule=rule)
        rates = [f"{own.loc[rank, 'best_rate']:.1e}" for rank in (8, 32, 128)]
        losses = [f"{own.loc[rank, 'best_loss']:.3f}" for rank in (8, 32, 128)]
        rows.append([RULES[rule], *rates, signed(slope["slope"], slope["half_width"]), ", ".join(losses)])
    heads = ["", "best rate at r = 8", "32", "128", "slope in r", "loss at the best rate: r = 8, 32, 128"]
    return table(heads, rows)


def _best(rule: str, rank: int) -> float:
    return float(one(csv("lr_transfer_smollm2/best.csv"), rule=rule, rank=rank)["best_rate"])


@block("rates.model.slope.lora")
def rates_model_slope() -> str:
    row = one(csv("lr_transfer_smollm2/slopes.csv"), rule="lora")
    return signed(row["slope"], row["half_width"])


@block("rates.model.lora.spread")
def rates_model_lora_spread() -> str:
    """The largest best rate of `alpha / r` over the least, r = 8, 32 and 128."""
    rates = [_best("lora", rank) for rank in (8, 32, 128)]
    return f"{max(rates) / min(rates):.1f}"


@block("rates.model.ratio")
def rates_model_ratio() -> str:
    """Best rate of alpha / r over that of alpha / sqrt(r) at r = 128."""
    return f"{_best('lora', 128) / _best('rora', 128):.1f}"


def _by_the_law(schedule: list[float] | None) -> str:
    """The ratio of `rates_model_ratio` by the law: 16 steps, 5% and 95% of the modules' takeover distances."""
    alpha, steps = 64, 16
    tuned = Setting(rank=128, alpha=alpha, learning_rate=_best("lora", 128))
    found = []
    moved = _held_out("takeover")
    for takeover in moved.loc[moved["rank"] == 128, "takeover"].quantile([0.05, 0.95]):
        plan = {"steps": steps, "takeover": takeover, "schedule": schedule}
        advice = transfer(tuned, 128, rule="rslora", alpha=alpha, **plan)
        found.append(tuned.learning_rate / advice.law_rate)
    return f"{min(found):.1f} to {max(found):.1f}"


@block("rates.model.law.constant")
def rates_model_law_constant() -> str:
    return _by_the_law(None)


@block("rates.model.law.falling")
def rates_model_law_falling() -> str:
    """With a rate that falls to 0 along a line."""
    return _by_the_law([1 - step / 16 for step in range(16)])


@block("rates.model.exponent")
def rates_model_exponent() -> str:
    """Slope of the best rate against gamma r over the nine points."""
    best = csv("lr_transfer_smollm2/best.csv")
    gamma = csv("lr_transfer_smollm2/results.csv").drop_duplicates(["rule", "rank"])
    both = best.merge(gamma[["rule", "rank", "scaling"]], on=["rule", "rank"])
    slope, _ = np.polyfit(np.log(both["scaling"] * both["rank"]), np.log(both["best_rate"]), 1)
    return f"{slope:.2f}"


@block("rates.model.losses.lora")
def rates_model_losses() -> str:
    """LoRA's loss at its best rate, r = 8, 32, 128."""
    best = csv("lr_transfer_smollm2/best.csv")
    return ", ".join(f"{one(best, rule='lora', rank=rank)['best_loss']:.3f}" for rank in (8, 32, 128))


def _model_comparison(second: str) -> str:
    """Of the loss of alpha / r less that of another rule, each at its own best rate."""
    return _per_cent(next(c for c in read("lr_transfer_smollm2/comparison.json") if c["second"] == second))


block("rates.model.comparison")(partial(_model_comparison, "rora"))
block("rates.model.comparison.quarter")(partial(_model_comparison, "quarter"))


# The paper's tables.


def _findings(check: Callable[..., list[audit.Finding]], *more: Any) -> list[audit.Finding]:
    return check(published.published_rows("RoRA paper"), *more)


@block("audit.averages")
def audit_averages() -> str:
    """Printed averages that the entries do not allow, the paper's and then the others'."""
    texts = []
    for row in sorted(published.published_rows(), key=lambda row: row.source != "RoRA paper"):
        if audit.averages([row]):
            low, high = (
                math.ceil(1e4 * audit.mean_bounds(row)[0]) / 1e4,
                math.floor(1e4 * audit.mean_bounds(row)[1]) / 1e4,
            )
            texts.append(f"{row.label} prints {row.average:.1f} ({low:.4f} to {high:.4f})")
    return "; ".join(texts)


@block("audit.difference")
def audit_difference() -> str:
    """Quoted differences beside those of the printed entries."""
    found = _findings(audit.differences, published.claims())
    texts = [f"{one.text.split(';')[0]}: {one.expected:.2f} by the entries" for one in found]
    return "; ".join(dict.fromkeys(texts))


@block("audit.repeated")
def audit_repeated() -> str:
    """Rows of one model that share most of their entries."""
    texts = [f"{one.where.replace(' = ', ' and ')}: {one.printed:.0f}" for one in _findings(audit.repeated)]
    return "; ".join(text.replace("Table II, Sheared-LLaMA-1.3B ", "") for text in texts)


@block("audit.impossible")
def audit_impossible() -> str:
    found = _findings(audit.impossible)
    return f"{len(found)} of the paper's OpenBookQA entries, {', '.join(f'{one.printed:.1f}' for one in found)}"


@block("audit.chance")
def audit_chance() -> str:
    found = _findings(audit.below_chance)
    distances = [-one.z for one in found if one.z is not None]
    tables = {one.where.split(",")[0] for one in found}
    return (
        f"{len(found)} entries of {' and '.join(sorted(tables))} are below guessing by {min(distances):.1f} to "
        f"{max(distances):.1f} standard errors"
    )


@block("audit.error")
def audit_error() -> str:
    errors = [audit.average_error(row.scores) for row in published.published_rows("RoRA paper")]
    return f"{min(errors):.2f} to {max(errors):.2f} points"


# What fits on a card.


def _planned(model: str, device: str, config: FinetuneConfig) -> str:
    """Of r = 128, 16 x 256 tokens and a bfloat16 base or blocks."""
    found, card = capacity.account(capacity.MODELS[model], config, 256), capacity.DEVICES[device]
    verdict = "of" if found.fits(card) else "beyond"
    return f"{found.total / 1e9:.1f} GB {verdict} the {(card.memory - capacity.RESERVE) / 1e9:.1f} that are usable"


_WIDE = FinetuneConfig(rank=128, batch_size=16, dtype="bfloat16", remat=True)
_BLOCKS = replace(_WIDE, quantization="q4_0")
block("capacity.13b")(partial(_planned, "llama-13b", "a6000", _WIDE))
block("capacity.13b.kept")(partial(_planned, "llama-13b", "a6000", replace(_WIDE, remat=False)))
block("capacity.13b.q4")(partial(_planned, "llama-13b", "rtx4090", _BLOCKS))
block("capacity.70b.q4")(partial(_planned, "llama2-70b", "h100", _BLOCKS))


# Benchmarks.


def _sweep(run: str) -> pd.DataFrame:
    frame = csv(f"{run}/results.csv")
    return frame[frame["status"] == "complete"]


def _losses(run: str, method: str, rank: int, rate: float, column: str = "validation_loss") -> list[float]:
    frame = _sweep(run)
    own = frame[(frame["method"] == method) & (frame["rank"] == rank) & np.isclose(frame["learning_rate"], rate)]
    return own.sort_values("seed")[column].tolist()


def _mean(values: list[float]) -> float:
    return float(np.mean(values))


def _difference(run: str, method: str, rank: int, rate: float, rates: str = "same") -> pd.Series:
    frame = csv(f"{run}/differences.csv")
    frame = frame[(frame["rates"] == rates) & (frame["against"] == "lora") & (frame["method"] == method)]
    frame = frame[(frame["rank"] == rank) & np.isclose(frame["learning_rate"], rate)]
    return one(frame)


def _by_rank(run: str, ranks: tuple[int, ...]) -> str:
    frame = _sweep(run)
    rows = []
    for rank in ranks:
        first = frame[(frame["rank"] == rank) & np.isclose(frame["learning_rate"], 3e-4) & (frame["seed"] == 0)]
        lora, rora = one(first, method="lora"), one(first, method="rora")
        seeds = len(_losses(run, "rora", rank, 3e-4))
        cells = [f"{rank}", f"{seeds}", f"{lora['gamma']:.3g}, {rora['gamma']:.3g}"]
        cells += [f"{_mean(_losses(run, 'lora', rank, 3e-4)):.3f} ± {lora['validation_error']:.3f}"]
        for method in ("dora", "rora"):
            found = _difference(run, method, rank, 3e-4)
            over_seeds = found["loss_seed_error"]
            seed = "" if pd.isna(over_seeds) else f" (seeds {over_seeds:.3f})"
            digits = 4 if method == "dora" else 3
            cells.append(f"{found['loss']:+.{digits}f} ± {found['loss_error']:.{digits + 1}f}{seed}")
        answers = [f"{_mean(_losses(run, method, rank, 3e-4, 'answer_loss')):.2f}" for method in ("lora", "rora")]
        rows.append([*cells, ", ".join(answers)])
    heads = ["r", "seeds", "gamma: LoRA, RoRA", "LoRA: held-out loss", "DoRA less LoRA", "RoRA less LoRA"]
    return table([*heads, "on answers: LoRA, RoRA"], rows)


def _ends(run: str, ranks: tuple[int, int]) -> str:
    """RoRA less LoRA at 3e-4, at two ranks, without sign."""
    return " to ".join(f"{-_difference(run, 'rora', rank, 3e-4)['loss']:.2f}" for rank in ranks)


@block("sweep.rising")
def sweep_rising() -> str:
    """Whether RoRA less LoRA at 3e-4 grows from each rank to the next."""
    found = csv("rank_sweep/differences.csv").query("rates == 'same' and against == 'lora' and method == 'rora'")
    found = found[np.isclose(found["learning_rate"], 3e-4)].sort_values("rank")
    return "grew with the rank" if (np.diff(found["loss"]) < 0).all() else "did not grow with every rank"


def _accuracies_by_label(run: str) -> str:
    """Least and largest average accuracy of LoRA and of RoRA at 3e-4, seed 0, over ranks; the largest error."""
    rows = _sweep(run).query("seed == 0 and method in ('lora', 'rora')")
    rows = 100 * rows[np.isclose(rows["learning_rate"], 3e-4)].set_index("method")[["average", "average_error"]]
    ends = {method: rows.loc[method, "average"].agg(["min", "max"]) for method in ("lora", "rora")}
    texts = [f"{METHODS[method]}'s {low:.1f} to {high:.1f}%" for method, (low, high) in ends.items()]
    return f"{' and '.join(texts)} (each ± {rows['average_error'].max():.1f})"


for _run in ("rank_sweep", "rank_sweep_pruned"):
    _name = "sweep" if _run == "rank_sweep" else "pruned"
    _least = 4 if _run == "rank_sweep" else 8
    block(f"{_name}.ends")(partial(_ends, _run, (_least, 128)))
    block(f"{_name}.by-label")(partial(_accuracies_by_label, _run))


@block("sweep.by-rank")
def sweep_by_rank() -> str:
    return _by_rank("rank_sweep", (4, 8, 16, 32, 64, 128))


@block("pruned.by-rank")
def pruned_by_rank() -> str:
    return _by_rank("rank_sweep_pruned", (8, 16, 32, 64, 128))


def _rates(run: str, methods: tuple[str, ...]) -> str:
    frame = _sweep(run)
    rows = []
    for method in methods:
        ranked = method in ("lora", "dora", "rora")
        own = frame[(frame["method"] == method) & ((frame["rank"] == 32) if ranked else frame["rank"].isna())]
        means = own.groupby("learning_rate")["validation_loss"].mean()
        cells = []
        for rate in sorted(means.index):
            losses = own[np.isclose(own["learning_rate"], rate)].sort_values("seed")["validation_loss"]
            text = f"{rate:.0e}".replace("e-0", "e-") + ": " + ", ".join(f"{loss:.3f}" for loss in losses)
            cells.append(f"**{text}**" if rate == means.idxmin() else text)
        rows.append([METHODS[method], f"{own['trainable_parameters'].iloc[0] / 1e6:.2f}", "; ".join(cells)])
    return table(["method", "trained (millions)", "rate: held-out loss of each seed; the best rate is bold"], rows)


@block("sweep.rates")
def sweep_rates() -> str:
    return _rates("rank_sweep", ("prefix", "series", "parallel", "lora", "dora", "rora"))


@block("pruned.rates")
def pruned_rates() -> str:
    return _rates("rank_sweep_pruned", ("lora", "dora", "rora"))


@block("sweep.dora.low")
def sweep_dora_low() -> str:
    """DoRA less LoRA at 3e-4 at r = 4 and 8, without sign."""
    found = [-_difference("rank_sweep", "dora", rank, 3e-4)["loss"] for rank in (4, 8)]
    return f"{min(found):.4f} to {max(found):.4f}"


def _best_differences(run: str) -> str:
    frame = csv(f"{run}/differences.csv")
    frame = frame[(frame["rates"] == "best") & (frame["against"] == "lora")]
    frame = frame[(frame["rank"] == 32) | frame["rank"].isna()]
    rows = [
        [
            METHODS[row["method"]],
            f"{row['learning_rate']:.0e}".replace("e-0", "e-"),
            f"{row['against_rate']:.0e}".replace("e-0", "e-"),
            f"{row['loss']:+.4f} ± {row['loss_error']:.4f}",
            "" if pd.isna(row["loss_seed_error"]) else f"{row['loss_seed_error']:.4f}",
            f"{int(row['seeds'])}",
            f"{_hidden(run, row['method']):.3f}",
        ]
        for _, row in frame.iterrows()
    ]
    heads = ["less LoRA, each at its best", "its rate", "LoRA's", "nats, ± s.e. over records", "s.e. over seeds"]
    return table([*heads, "seeds", "the grid of rates may hide"], rows)


def _hidden(run: str, method: str) -> float:
    """What the grids of rates of a method and of LoRA at r = 32 may hide of the difference of their best losses."""
    marked = results.marked_rates(csv(f"{run}/results.csv"))
    own = marked[marked["method"].isin(["lora", method]) & (marked["rank"].isna() | (marked["rank"] == 32))]
    if len(own) != (1 if method == "lora" else 2) or own["grid_error"].isna().any():
        raise SystemExit(f"error: {run}: {method} or lora has no bound of what its grid hides")
    return float(own["grid_error"].max())


@block("sweep.variants")
def sweep_variants() -> str:
    """How far LoRA, DoRA and RoRA are apart at r = 32, each at its best rate, and what their grids hide."""
    least = [
        _mean(_losses("rank_sweep", *setting))
        for setting in (("lora", 32, 3e-3), ("dora", 32, 3e-3), ("rora", 32, 1e-3))
    ]
    hidden = sorted(100 * _hidden("rank_sweep", method) / least[0] for method in ("dora", "rora"))
    apart = bound([100 * (max(least) / min(least) - 1)], 1)
    return f"by at most {apart}%; the true difference may be {hidden[0]:.0f} to {hidden[1]:.0f}% either way"


@block("sweep.dora.best")
def sweep_dora_best() -> str:
    """DoRA less LoRA at r = 32, each at its best rate."""
    found = _difference("rank_sweep", "dora", 32, 3e-3, "best")
    return f"{found['loss']:+.4f} ± {found['loss_error']:.4f}"


block("sweep.gap.grid")(lambda: f"{_hidden('rank_sweep', 'rora'):.2f}")
block("pruned.gap.grid")(lambda: f"{_hidden('rank_sweep_pruned', 'rora'):.2f}")


def _toy_sgd(rule: str) -> str:
    """How the best rate of SGD under a rule moves with the rank in the controlled problem."""
    row = one(csv("lr_transfer/slopes.csv"), optimizer="sgd", trained="both", rule=rule)
    return signed(row["slope"], row["half_width"])


block("rates.toy.sgd")(lambda: _toy_sgd("rora"))
block("rates.toy.sgd.lora")(lambda: _toy_sgd("lora"))
block("rates.toy.sgd.quarter")(lambda: _toy_sgd("0.25"))


@block("rates.toy.sgd.product")
def rates_toy_sgd_product() -> str:
    """Gamma times SGD's best rate over all ranks and rules of the controlled problem: the ends, and how many."""
    found, config = csv("lr_transfer/best.csv"), read("lr_transfer/manifest.json")["config"]
    own = found[(found["optimizer"] == "sgd") & (found["trained"] == "both")]
    products = own["best_rate"] * config["gamma"] * (config["reference_rank"] / own["rank"]) ** own["kappa"]
    return f"{products.min():.3f} to {products.max():.3f} over {len(products)} ranks and rules"


@block("sweep.best")
def sweep_best() -> str:
    return _best_differences("rank_sweep")


@block("pruned.best")
def pruned_best() -> str:
    return _best_differences("rank_sweep_pruned")


def _gap(run: str, rates: str, rate: float) -> str:
    found = _difference(run, "rora", 32, rate, rates)
    return f"{found['loss']:+.3f} ± {found['loss_error']:.3f}"


block("sweep.gap.same")(lambda: _gap("rank_sweep", "same", 3e-4))
block("sweep.gap.best")(lambda: _gap("rank_sweep", "best", 1e-3))
block("pruned.gap.same")(lambda: _gap("rank_sweep_pruned", "same", 3e-4))
block("pruned.gap.best")(lambda: _gap("rank_sweep_pruned", "best", 1e-3))


@block("sweep.gap.seeds")
def sweep_gap_seeds() -> str:
    """Half a 95% interval, by Student's t over two seeds, of RoRA less LoRA at each one's best rate."""
    found = _difference("rank_sweep", "rora", 32, 1e-3, "best")
    assert found["seeds"] == 2
    return f"{12.706 * found['loss_seed_error']:.2f}"


@block("sweep.boolq")
def sweep_boolq() -> str:
    """BoolQ's accuracies by `label` at 3e-4: how many are one of the two that one label for all items gives."""
    rows = _sweep("rank_sweep")
    rows = rows[rows["boolq"].notna() & (rows["learning_rate"] == 3e-4) & rows["method"].isin(["lora", "dora", "rora"])]
    most = float(rows["boolq"].mode().iloc[0])
    same, other = int(np.isclose(rows["boolq"], most).sum()), int(np.isclose(rows["boolq"], 1 - most).sum())
    return f"{100 * most:.1f}% in {same} and {100 * (1 - most):.1f}% in {other} of {len(rows)} runs at 3e-4"


@block("regime.takeover.range")
def regime_takeover_range() -> str:
    """The takeover distances of the modules at held-out tokens, all ranks: 5% and 95%."""
    low, high = _held_out("takeover")["takeover"].quantile([0.05, 0.95])
    return f"{low:.4f} to {high:.4f}"


@block("sweep.base")
def sweep_base() -> str:
    row = one(_sweep("rank_sweep"), method="base")
    return f"{row['validation_loss']:.3f} ± {row['validation_error']:.3f}"


@block("sweep.accuracy")
def sweep_accuracy() -> str:
    row = one(_sweep("rank_sweep"), method="base")
    return (
        f"the model alone has {100 * row['average']:.1f}% ± {100 * row['average_error']:.1f}%, "
        f"guessing {100 * row['average_chance']:.1f}%"
    )


def _points(row: pd.Series, name: str, form: str = ".1f") -> str:
    """A share and its standard error, in per cent or points."""
    return f"{100 * row[name]:{form}} ± {100 * row[f'{name}_error']:.1f}"


def _gain(run: str, method: str, against: str) -> str:
    """Points of the average accuracy of a method less another's, paired."""
    return _points(one(csv(f"{run}/differences.csv"), method=method, against=against), "average", "+.1f")


def _apart(run: str) -> str:
    """Of the other adapters less LoRA."""
    found = set(csv(f"{run}/differences.csv")["method"])
    return " and ".join(f"{_gain(run, name, 'lora')} ({METHODS[name]})" for name in ("rora", "dora") if name in found)


for _name, _run in (("accuracy", "accuracy"), ("pruned.accuracy", "accuracy_pruned")):
    block(f"{_name}.gain")(partial(_gain, _run, "lora", "base"))
    block(f"{_name}.apart")(partial(_apart, _run))


def _accuracies(run: str) -> str:
    """Accuracies by the harness protocol, and paired differences of the average."""
    frame, gained = _sweep(run), csv(f"{run}/differences.csv")
    rows = []
    for method in [name for name in ("base", "lora", "rora", "dora") if name in set(frame["method"])]:
        own = one(frame, method=method)
        cells = ["the model alone", ""] if method == "base" else [METHODS[method], f"{own['learning_rate']:g}"]
        cells += [f"{own['validation_loss']:.3f} ± {own['validation_error']:.3f}"]
        cells += [_points(own, name) for name in ("ARC-Easy", "piqa", "average")]
        for against in ("base", "lora"):
            pair = gained[(gained["method"] == method) & (gained["against"] == against)]
            cells.append("" if pair.empty else _points(one(pair), "average", "+.1f"))
        rows.append(cells)
    heads = ["", "rate", "held-out loss (nats)", "ARC-Easy %", "PIQA %", "average %"]
    return table([*heads, "average less the model alone", "average less LoRA"], rows)


block("accuracy.table")(partial(_accuracies, "accuracy"))
block("pruned.accuracy.table")(partial(_accuracies, "accuracy_pruned"))


@block("pruned.accuracy.lost")
def pruned_accuracy_lost() -> str:
    """Points of the average accuracy between the model and its pruned half, both alone."""
    whole, half = (one(_sweep(run), method="base")["average"] for run in ("accuracy", "accuracy_pruned"))
    return f"{100 * (whole - half):.0f}"


@block("prune.facts")
def prune_facts() -> str:
    found = read("prune/manifest.json")
    whole, kept = found["parameters"]
    before, after = found["perplexity_held_out"]
    return (
        f"{kept / 1e6:.1f} of {whole / 1e6:.1f} million parameters; its perplexity on held-out prompts goes from "
        f"{before:.1f} to {after:.0f}"
    )


# Speed.


def tokens_rows(found: dict[str, Any]) -> list[list[str]]:
    """Of the part ``tokens`` of `benchmarks/finetune.py`."""
    ours, peer = found["tokens"]["ours"], found["tokens"]["peer"]
    return [
        [
            "LoRA r = 8, 4 x 256 tokens: tokens/s",
            f"{ours['tokens_per_second']:.0f}",
            f"{peer['tokens_per_second']:.0f}",
            f"{ours['tokens_per_second'] / peer['tokens_per_second']:.2f}",
        ],
        [
            "the same: peak memory of the process (GB)",
            f"{ours['peak_memory_gb']:.2f}",
            f"{peer['peak_memory_gb']:.2f}",
            f"{ours['peak_memory_gb'] / peer['peak_memory_gb']:.2f}",
        ],
    ]


def _tokens(run: str) -> dict[str, Any]:
    return read(f"{run}/benchmark.json")["tokens"]


for _name, _run in (("amd", "finetune_speed"), ("avx2", "finetune_speed_avx2"), ("intel", "finetune_speed_intel")):
    block(f"speed.{_name}.memory")(lambda run=_run: f"{_tokens(run)['memory_ratio']:.2f}")
    if _name != "intel":
        block(f"speed.{_name}.time")(lambda run=_run: f"{1 / _tokens(run)['speed_ratio']:.2f}")
block("speed.intel.speed")(lambda: f"{_tokens('finetune_speed_intel')['speed_ratio']:.2f}")
block("speed.avx2.text.time")(lambda: f"{1 / read('finetune_speed_avx2/text.json')['text']['speed_ratio']:.2f}")


@block("speed.intel.saved")
def speed_intel_saved() -> str:
    """By what the change of widen.py shortened a step on the Intel server."""
    before, after = (
        read(f"finetune_speed_intel/{name}.json")["tokens"]["ours"]["seconds_a_step"]["median"]
        for name in ("before", "benchmark")
    )
    return f"{100 * (1 - after / before):.0f}%"


@block("speed.spread")
def speed_spread() -> str:
    """Quartiles of the time of a step over its median, of both sides in the first table's run."""
    found = [_tokens("finetune_speed")[side]["seconds_a_step"] for side in ("ours", "peer")]
    low, high = (
        extreme(each[name] / each["median"] for each in found)
        for extreme, name in ((min, "lower_quartile"), (max, "upper_quartile"))
    )
    return f"{low:.2f} and {high:.2f} times the median, over {found[0]['count']} steps of each side"


@block("speed.finetune")
def speed_finetune() -> str:
    return table(["", "here", "torch + peft", "ratio"], tokens_rows(read("finetune_speed/benchmark.json")))


@block("speed.finetune.avx2")
def speed_finetune_avx2() -> str:
    whole, text = (read(f"finetune_speed_avx2/{name}.json") for name in ("benchmark", "text"))
    return table(["", "here", "torch + peft", "ratio"], [*tokens_rows(whole), text_row(text)])


@block("speed.intel")
def speed_intel() -> str:
    rows = []
    for name, file in (("as it was", "before"), ("as it is", "benchmark")):
        found = read(f"finetune_speed_intel/{file}.json")["tokens"]
        ours, peer = (found[side]["tokens_per_second"] for side in ("ours", "peer"))
        memory = f"{found['memory_ratio']:.2f}"
        rows.append([name, f"{ours:.0f}", f"{peer:.0f}", f"{ours / peer:.2f}", memory])
    return table(["LoRA r = 8, 4 x 256 tokens", "here: tokens/s", "torch + peft", "ratio", "memory ratio"], rows)


@block("speed.machine")
def speed_machine() -> str:
    machine = read("finetune_speed/benchmark.json")["machine"]
    return f"{machine['processor']}, {machine['cores']} cores"


@block("speed.machine.intel")
def speed_machine_intel() -> str:
    machine = read("finetune_speed_intel/benchmark.json")["machine"]
    return f"{machine['processor'].replace('(R)', '')}, {machine['cores']} cores"


@block("speed.machine.evaluate")
def speed_machine_evaluate() -> str:
    machine = read("evaluate_speed/benchmark.json")["machine"]
    return f"{machine['processor']}, {machine['cores']} cores, and no more"


def text_row(found: dict[str, Any]) -> list[str]:
    """Of the part ``text`` of `benchmarks/finetune.py`."""
    text = found["text"]
    ours, peer = (text[side]["examples_per_second"]["median"] for side in ("ours", "peer"))
    return ["real text, batch 16: examples/s", f"{ours:.2f}", f"{peer:.2f}", f"{text['speed_ratio']:.2f}"]


@block("speed.rest")
def speed_rest() -> str:
    finetune, evaluate = read("finetune_speed/benchmark.json"), read("evaluate_speed/benchmark.json")
    rows, methods = [text_row(finetune)], finetune["methods"]
    for dropout in ("0", "0.05"):
        cells = [f"{methods[f'{side}, dropout {dropout}']['dora_over_lora']:.2f}" for side in ("ours", "peer")]
        rows.append([f"DoRA's step over LoRA's, r = 128, dropout {dropout}", *cells, ""])
    own = [task for task in evaluate["harness"] if task["task"] in evaluate["config"]["tasks"]]
    items = sum(task["items"] for task in own)
    seconds = [sum(task["ours_s"] for task in own), sum(task["lm_eval_s"]["32"] for task in own)]
    rate = [f"{items / each:.1f}" for each in seconds]
    rows.append([f"`harness`, {items} items: items/s, lm-eval at batch 32", *rate, f"{seconds[1] / seconds[0]:.2f}"])
    speeds = {
        side: max(run["items_per_s"] for run in evaluate["generate"] if run["side"] == side)
        for side in ("ours", "transformers")
    }
    ratio = speeds["ours"] / speeds["transformers"]
    name = "`generate`, 4 beams: items/s, each at its fastest batch"
    rows.append([name, f"{speeds['ours']:.2f}", f"{speeds['transformers']:.2f}", f"{ratio:.2f}"])
    return table(["", "here", "the peer", "ratio"], rows)


@block("speed.evaluate.avx2")
def speed_evaluate_avx2() -> str:
    """Evaluation beside the usual tools on a processor with AVX2 alone, and what the products of `harness` take."""
    found = read("evaluate_speed_avx2/benchmark.json")
    whole = one(pd.DataFrame(found["harness"]), task="all")
    theirs = min(whole["lm_eval_s"].values())
    ours, peer = (
        min(row["seconds"] for row in found["generate"] if row["side"] == side) for side in ("ours", "transformers")
    )
    rows = [
        ["`harness`, 800 items: s", f"{whole['ours_s']:.0f}", f"{theirs:.0f}", f"{theirs / whole['ours_s']:.2f}"],
        ["its products alone: s", f"{whole['products_s']:.0f}", "", f"{theirs / whole['products_s']:.2f}"],
        ["`generate`, 32 items: s", f"{ours:.0f}", f"{peer:.0f}", f"{peer / ours:.2f}"],
    ]
    return table(["", "here", "the peer", "ratio"], rows)


@block("speed.machine.avx2")
def speed_machine_avx2() -> str:
    """Of all three benchmarks."""
    files = ("finetune_speed_avx2/benchmark", "finetune_speed_avx2/text", "evaluate_speed_avx2/benchmark")
    machines = [read(f"{name}.json")["machine"] for name in files]
    (words,) = {f"{m['processor']} with {' and '.join(m['instruction_sets'])}, {m['cores']} cores" for m in machines}
    return words


BENCHMARKS = {
    "finetune_speed/benchmark": "first table, real text, DoRA's step",
    "evaluate_speed/benchmark": "`harness`, `generate`",
    "finetune_speed_intel/before": "as it was",
    "finetune_speed_intel/benchmark": "as it is",
    "finetune_speed_avx2/benchmark": "training, AVX2 alone: tokens",
    "finetune_speed_avx2/text": "training, AVX2 alone: real text",
    "evaluate_speed_avx2/benchmark": "evaluation, AVX2 alone",
    "methods_cost/benchmark": "six methods",
    "memory/benchmark": "memory",
    "parity/parity": "agreement with transformers and peft",
    "harness_parity/parity": "agreement with lm-eval",
}
"""The benchmarks of the page of speed, and what it has from each."""


@block("speed.runs")
def speed_runs() -> str:
    """What each benchmark was, as far as its file has it."""
    rows = []
    for name, words in BENCHMARKS.items():
        found = read(f"{name}.json")
        machine = found.get("machine", {})
        packages = machine.get("packages") or machine.get("versions") or {}
        shown = [each for each in ("jax", "torch", "transformers", "peft", "lm-eval") if each in packages]
        where = f"{machine['processor']}, {machine['cores']} cores" if machine else ""
        others = "" if "others" not in found else f"{100 * found['others']:.1f}%"
        cells = [where, ", ".join(f"{each} {packages[each]}" for each in shown), others]
        rows.append([f"`{name}.json`", words, *(cell or "not kept" for cell in cells)])
    return table(["file", "what", "machine", "versions", "taken by other processes"], rows)


@block("speed.runs.dated")
def speed_runs_dated() -> str:
    """How many of these files have a revision or a date."""
    kept = [name for name in BENCHMARKS if {"git_revision", "date"} & set(read(f"{name}.json").get("machine", {}))]
    return f"{len(kept) or 'none'} of these {len(BENCHMARKS)} files"


@block("speed.methods")
def speed_methods() -> str:
    sizes = read("methods_cost/benchmark.json")["sizes"]
    rows = []
    for size, found in sizes.items():
        for name, form in (
            ("time of a step over LoRA's", lambda m: f"{m['time_over_lora']['median']:.2f}"),
            ("peak memory of the process (GB)", lambda m: f"{m['peak_memory_gb']:.2f}"),
            ("trained, % of all parameters", lambda m: f"{100 * m['trainable_share']:.2f}"),
        ):
            rows.append(
                [
                    size,
                    name,
                    *(form(found[method]) for method in ("lora", "rora", "dora", "prefix", "series", "parallel")),
                ]
            )
    return table(["size", "", "LoRA", "RoRA", "DoRA", "prefix", "series", "parallel"], rows)


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f}"


@block("memory.devices")
def memory_devices() -> str:
    rows = []
    for found in read("memory/benchmark.json")["measurements"]:
        if (found["side"], found["base"]) == ("ours", "float32"):
            planned, program, peak = found["planned"], found["program"], found["peak"]["median"]
            ratios = [f"{size / planned:.2f}" for size in (program, peak)]
            rows.append([f"{found['devices']}", *map(_gb, (planned, program, peak)), *ratios])
    heads = [
        "devices",
        "planned: GB a device",
        "XLA's account",
        "measured peak",
        "XLA's over the plan",
        "measured over it",
    ]
    return table(heads, rows)


BASES = {"int8": "int8 (bitsandbytes)", "nf4": "NF4 (bitsandbytes)"}


@block("memory.bases")
def memory_bases() -> str:
    found = {
        (one["side"], one["base"]): [
            _gb(one["held" if one["side"] == "peer" else "base_bytes"]),
            _gb(one["peak"]["median"]),
        ]
        for one in read("memory/benchmark.json")["measurements"]
        if one["devices"] == 1
    }
    rows = [
        [BASES.get(base, base), *(found.get(("ours", base)) or ["", ""]), *(found.get(("peer", base)) or ["", ""])]
        for base in dict.fromkeys(base for _, base in found)
    ]
    return table(["base", "here: weights (GB)", "peak of a step", "torch + peft: weights", "peak of a step"], rows)


@block("memory.machine")
def memory_machine() -> str:
    found = read("memory/benchmark.json")
    run = found["config"]
    return (
        f"{found['machine']['processor']}, LoRA r = {run['rank']}, {run['rows']} x {run['seq']} tokens, "
        f"{found['measurements'][0]['peak']['count']} process a figure"
    )


@block("parity.model")
def parity_model() -> str:
    rows = read("parity/parity.json")["rows"]
    logits = max(row["logits"] for row in rows)
    gradients = max(row.get("gradients", 0.0) for row in rows)
    peers = max(row.get("gradients, peer", 0.0) for row in rows)
    losses = max(row.get("losses", 0.0) for row in rows)
    return (
        f"logits within {logits:.0e} of the largest, gradients within {gradients:.0e} of each tensor's largest entry "
        f"(peft's own in float32: {peers:.0e}), the losses of 20 steps within {losses:.0e}"
    )


@block("parity.harness")
def parity_harness() -> str:
    tasks = read("harness_parity/parity.json")["tasks"]
    items, choices = (sum(task[name] for task in tasks) for name in ("texts_compared", "n"))
    texts, choice = (sum(task[name] for task in tasks) for name in ("texts_differ", "disagreements"))
    requests, beyond = (sum(task[name] for task in tasks) for name in ("requests", "beyond_tolerance"))
    return (
        f"{texts} of {items} items differ in text, {choice} of {choices} items in the choice, and {beyond} of "
        f"{requests} log-likelihoods by more than 1e-3"
    )


@block("bridge.agreement")
def bridge_agreement() -> str:
    found = read("bridge/agreement.json")
    return f"{found['modules']} modules to {max(found['differences'].values()):.1e} of itself"


@block("bridge.cost")
def bridge_cost() -> str:
    found = read("bridge/cost.json")
    medians = {case: statistics.median(times) for case, times in found["seconds"].items()}
    peaks = {case: statistics.median(sizes) / 2**30 for case, sizes in found["peak_bytes_above_the_model"].items()}
    rows = [
        [case, f"{took:.1f}", f"{took / medians['training step']:.2f}", f"{peaks[case]:.2f}"]
        for case, took in medians.items()
    ]
    return table(["", "seconds", "over a training step", "peak above the model (GiB)"], rows)


@block("bridge.cost.machine")
def bridge_cost_machine() -> str:
    found = read("bridge/cost.json")
    rounds = found["config"]["rounds"]
    return f"{found['machine']['processor']}, {found['machine']['cores']} cores, medians of {rounds} turns"


def fill(text: str, where: str) -> str:
    """The text with every place filled."""
    if found := BREAK.search(text):
        raise SystemExit(f"error: {where}: {found['name']} begins a line and ends its paragraph; put it behind a word")

    def put(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in BLOCKS:
            raise SystemExit(f"error: {where}: there are no numbers named {name}")
        return match[1] + BLOCKS[name]() + match[4]

    return PLACE.sub(put, text)


def documents() -> list[Path]:
    """README and every page."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def main(argv: list[str]) -> int:
    """Fill or check; the number of documents that differed."""
    if argv not in ([], ["--check"]):
        raise SystemExit(f"error: arguments are {' '.join(argv)}; accepted is none, or --check")
    stale = 0
    for path in documents():
        if "published" in path.relative_to(ROOT).parts:
            continue
        old = path.read_text()
        new = fill(old, str(path.relative_to(ROOT)))
        if new == old:
            continue
        stale += 1
        if argv:
            for was, now in zip(PLACE.finditer(old), PLACE.finditer(new), strict=True):
                if was["text"] != now["text"]:
                    print(f"{path.relative_to(ROOT)}: {was['name']} is not what results/published gives")
        else:
            path.write_text(new)
    if argv:
        print(f"{stale} documents differ from results/published" if stale else "every number is what the files give")
    return max(min(stale, 1) if argv else 0, marks.main(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
