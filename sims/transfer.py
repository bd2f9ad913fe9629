"""What alpha, or what learning rate, keeps the change of the model the same when the rank changes.

    python -m sims.transfer --from-rank 8 --to-rank 128 --alpha 16 --lr 3e-4 --rule lora --optimizer adamw
    python -m sims.transfer --from ADAPTER/adapter_config.json --lr 3e-4 --to-rank 128 --to-rule rslora --to-alpha 16

The first sentence says what to set and for how long it holds. Under Adam the answer has two ends, the first step's and
a long run's; --steps with --takeover (measured) or --p-in (assumed) gives the value between them. The regime is
assumed (signal, the default, whose alpha keeps the whole model's first step, or cross-talk) or
measured: --regime RUN takes a run of sims.regime, and alphas then differ by module and keep each module's own step.
Then follow a short table, what rules of thumb and `use_rslora` would do, and a PEFT `LoraConfig` to paste;
--json prints the same as JSON. --check
MODEL DATA... takes the first real steps of the model at both ranks and writes them to a run folder.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import geometric_mean
from typing import Annotated, Any, Literal, cast

import numpy as np
import tyro

from rora_theory import frames, seals
from rora_theory.advice.lora_config import ALL_LINEAR, PAPER_TARGETS, TaskType, peft_targets, read_adapter_config
from rora_theory.advice.setting import FAMILY, REGIMES, SIGNAL, Setting, Trainer, step_ratio
from rora_theory.advice.transfer import ALL, Advice, transfer
from rora_theory.errors import InputError
from rora_theory.files import read_json
from rora_theory.inits import Init
from rora_theory.measure.regime_tables import CROSSING_COLUMNS, CROSSINGS
from rora_theory.scaling import KAPPAS, exponent
from rora_theory.seeds import check_seed
from sims.common import cli, tables
from sims.common.cells import Cells
from sims.common.progress import progress_bar
from sims.common.run_folder import RunFolder
from sims.common.scalings import parse_rule

NAME = "transfer"
COLUMNS = (
    "plan", "rank", "alpha", "learning_rate", "scaling", "alpha_pattern", "quantity", "module", "layer", "seed", "rms",
)  # fmt: skip
SUMMARY_COLUMNS = (
    "plan",
    "rank",
    "alpha",
    "learning_rate",
    "quantity",
    "ratio",
    "standard_error",
    "smallest",
    "largest",
)
UNITS = {
    "rms": "root mean square over held-out tokens and outputs of the change that the first step makes: of a module's "
    "own w = gamma B A x', of the final hidden states, of the logits",
    "ratio": "of the rms (root mean square over seeds) to that of the tuned setting; quantity modules: the geometric "
    "mean over modules, smallest and largest of them beside it",
}


@dataclass(frozen=True)
class Config:
    """What was tuned, and where it is to go."""

    from_rank: int = 8
    """the rank that was tuned"""
    to_rank: int = 128
    """the new rank"""
    alpha: float = 16.0
    """alpha at the old rank"""
    lr: float = 3e-4
    """learning rate at the old rank"""
    rule: str = "lora"
    """lora (alpha / r), rora or rslora (alpha / sqrt(r)), or an exponent kappa"""
    to_rule: str | None = None
    """rule at the new rank; left out, it stays as it is"""
    optimizer: str = "adamw"
    """sgd, momentum, adam or adamw; others have no law here"""
    init: str = "kaiming_uniform"
    """law of lora_A: kaiming_uniform (PEFT's default), gaussian (PEFT's, of deviation 1/r), normal or rademacher"""
    regime: str = "signal"
    """signal, cross-talk, or the folder of a sims.regime run"""
    split: Literal["train", "heldout"] = "heldout"
    """tokens of a measured regime: other text (heldout) or the batch that gave the gradient (train)"""
    per: Literal["one", "type", "module"] = "type"
    """which modules of a measured regime share an alpha: one for all, one a type, or one for each layer's module"""
    targets: tuple[str, ...] | None = None
    """target_modules of the LoraConfig: names separated by spaces, or all-linear; none is a measured regime's own, and
    the paper's five where the regime is assumed"""
    task_type: TaskType = "CAUSAL_LM"
    """task_type of the LoraConfig"""
    check: tuple[str, ...] = ()
    """a model and data files: take the first real steps at both ranks"""
    items: int = 8
    """records of --check's batch, and as many held-out ones"""
    seeds: int = 4
    """draws of A of --check"""
    seed: int = 0
    """of the records' split and of A"""
    out: Path | None = None
    """run folder of --check; none is results/transfer/RUN_ID"""
    from_: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """a saved adapter's folder or its adapter_config.json: gives --from-rank, --alpha, --rule, --init and --targets"""
    to_alpha: float | None = None
    """alpha at the new rank; the learning rate then makes up for it. Left out, alpha makes up and the rate stays"""
    steps: int | None = None
    """steps of the planned run, at a constant rate (Adam, regime signal)"""
    takeover: float | None = None
    """distance of A at which its part in the change is as large as B's; 1e-3 to 6e-3 in SmolLM2-135M's modules"""
    p_in: int | None = None
    """inputs of the modules, in place of --takeover: it is then assumed, as for one sample"""
    json: bool = False
    """print the advice as JSON, and nothing else"""


def read_from(config: Config) -> Config:
    """The options with what a saved adapter says in the place of their defaults.

    Raises:
      InputError: a file that is no LoRA's, or an option that was given and says another thing.
    """
    if config.from_ is None:
        return config
    saved = read_adapter_config(config.from_)
    found: dict[str, Any] = {"from_rank": saved.rank, "alpha": saved.alpha, "rule": saved.rule, "init": saved.init}
    for name, value in found.items():
        given = getattr(config, name)
        if given not in (getattr(Config, name), value):
            option = "--" + name.replace("_", "-")
            raise InputError(f"{option} is {given!r}, and {config.from_} has {value!r}; accepted is one of the two")
    cli.tell(saved.remarks)
    return replace(config, **found, targets=config.targets or saved.targets)


def measured(run: Path, *, optimizer: Trainer, init: Init, split: str) -> dict[str, float]:
    """Linear terms of a run of sims.regime, by the modules' full names.

    Raises:
      InputError: no such run, or one that did not measure this optimizer and init.
    """
    path = run / CROSSINGS
    if not path.is_file():
        raise InputError(f"{run}: has no {CROSSINGS}; accepted are {', '.join(REGIMES)} or a run folder of sims.regime")
    problem = seals.problem(run)
    if problem is not None:
        raise InputError(f"{problem}; accepted is the run as sims.regime wrote it")
    wanted = {"optimizer": FAMILY[optimizer], "init": init, "split": split}
    rows = frames.read(path, CROSSING_COLUMNS)
    rows = rows[(rows[list(wanted)] == list(wanted.values())).all(axis=1)]
    found = {}
    for index, module, term in rows[["module", "linear_term"]].itertuples():
        try:
            found[module] = float(term)
        except ValueError:
            found[module] = math.nan
        if math.isnan(found[module]):
            raise InputError(f"{path}: line {index + 2} has linear_term {term!r}; accepted is a number")
    if not found:
        said = ", ".join(f"{name} {value}" for name, value in wanted.items())
        raise InputError(f"{path}: has no row of {said}; accepted is a run that measured them")
    return found


def plan(config: Config) -> tuple[Advice, str | list[str], str]:
    """The transfer that is asked for, PEFT's ``target_modules``, and what a measured regime leaves open or nothing."""
    trainer, init = cast(Trainer, config.optimizer), cast(Init, config.init)  # checked by Setting
    old = Setting(config.from_rank, config.alpha, config.lr, parse_rule(config.rule, "--rule"), trainer, init)
    rule = None if config.to_rule is None else parse_rule(config.to_rule, "--to-rule")
    to = {"rule": rule, "alpha": config.to_alpha}
    run_plan = {"steps": config.steps, "takeover": config.takeover, "p_in": config.p_in}
    asked = None if config.targets is None else peft_targets(config.targets)
    if config.regime in REGIMES:
        found = transfer(old, config.to_rank, config.regime, **to, **run_plan)  # type: ignore[arg-type]
        return found, asked or list(PAPER_TARGETS), ""
    run = Path(config.regime)
    terms = measured(run, optimizer=trainer, init=init, split=config.split)
    if isinstance(asked, list):
        kept = {name: c for name, c in terms.items() if any(_ends_with(name, target) for target in asked)}
        for target in asked:
            if not any(_ends_with(name, target) for name in kept):
                raise InputError(
                    f"--targets has {target}, which {run} did not measure; accepted are {' '.join(_types(terms))}"
                )
        terms = kept
    found = transfer(old, config.to_rank, terms, **to, **run_plan)  # type: ignore[arg-type]
    return found, asked or _types(terms), gaps(run, terms, asked)


def gaps(run: Path, terms: Mapping[str, float], targets: str | list[str] | None) -> str:
    """One sentence on what a run of sims.regime did not measure; empty where it measured all.

    Raises:
      InputError: its manifest can't be read.
    """
    manifest = read_json(run / "manifest.json", accepted="the manifest of a run of sims.regime")
    settings = manifest.get("config", {}) if isinstance(manifest, dict) else {}
    layers = sorted({int(name.split(".layers.")[1].split(".")[0]) for name in terms if ".layers." in name})
    of_all = manifest.get("model_layers") if isinstance(manifest, dict) else None
    missing = []
    if of_all is not None and len(layers) < of_all:
        missing.append(f"it has {len(layers)} of the model's {of_all} layers ({' '.join(map(str, layers))})")
    elif of_all is None and settings.get("layers") is not None:
        missing.append(f"it was made for layers {' '.join(map(str, layers))} alone")
    if not isinstance(manifest, dict) or manifest.get("status") != "complete":
        missing.append("it has not ended")
    if targets == ALL_LINEAR and settings.get("targets") != [ALL_LINEAR]:
        missing.append(f"{ALL_LINEAR} adapts more than the modules that it has ({' '.join(_types(terms))})")
    if not missing:
        return ""
    return (
        f"This regime is thin: {', and '.join(missing)}. What it has not measured gets the mean of what it has; "
        "nothing here says how far that is off."
    )


def _types(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))


def _ends_with(name: str, target: str) -> bool:
    """As PEFT matches a name in a list."""
    return name == target or name.endswith(f".{target}")


def report(config: Config, found: Advice, targets: str | list[str], thin: str) -> None:
    """Print the sentence, the tables and the snippet, and what the regime leaves open."""
    old, new = found.old, found.unchanged
    tables.print_text(found.sentence() + "\n")
    is_measured = found.modules[0].name != ALL
    regime = f"measured at {len(found.modules)} modules, {config.split} tokens" if is_measured else config.regime
    rule = old.rule if isinstance(old.rule, str) else f"kappa {old.rule:g}"
    title = (
        f"Rank {old.rank} to {new.rank}, {rule}, alpha {old.alpha:g}, rate {old.learning_rate:g}, {old.optimizer}, "
        f"{old.init}; regime: {regime}"
    )
    rows = [["all modules" if is_measured else ALL, *_figures(found, [m.name for m in found.modules])]]
    if is_measured:
        for kind in found.by_type():
            names = [module.name for module in found.modules if module.name.rpartition(".")[2] == kind]
            rows.append([kind, *_figures(found, names)])
    else:
        other = next(name for name in REGIMES if name != config.regime)
        against = transfer(old, new.rank, other, rule=new.rule, alpha=config.to_alpha)  # type: ignore[arg-type]
        rows[0][0] = config.regime
        rows.append([other, *_figures(against, [ALL])])
    heads = ["", f"alpha at rate {old.learning_rate:g}", f"rate at alpha {new.alpha:g}", "step if neither changes"]
    tables.print_table(title, heads, rows)
    if thin:
        tables.print_text(thin + "\n")
    planned = found.rates is not None and found.rates.planned is not None
    heads = ["choice", "gamma", "first step", "rate that undoes it"]
    heads += [f"at {config.steps} steps"] * planned + ["in a long run"] * (found.rates is not None)
    choices = []
    for each in found.rows():
        later = [] if each.rates is None else [rate for rate in each.rates[1:] if rate is not None]
        step = _spread(each.step, each.smallest, each.largest) + " x"
        cells = [f"{each.setting.scaling:.4g}", step, f"{each.learning_rate:.3g}"]
        choices.append([each.name, *cells, *(f"{rate:.3g}" for rate in later)])
    tables.print_table(
        f"Rules of thumb at rank {new.rank}, {rule} where nothing else is said: the first step against the tuned "
        "one's (range over modules)",
        heads,
        choices,
    )
    print(found.peft_config(target_modules=targets, per=config.per, task_type=config.task_type))
    if is_measured and not found.fixes_alpha:
        whole = step_ratio(found.setting, old, SIGNAL)
        tables.print_text(
            "\nThese alphas keep the rms of each module's own output, cross-talk included. Cross-talk does not add up "
            f"over modules, the signal does: where it leads, the whole model's first step is then {whole:.3g} times "
            "the tuned one's. --check takes the steps."
        )


def _figures(found: Advice, names: Sequence[str]) -> list[str]:
    modules = [module for module in found.modules if module.name in set(names)]
    alphas, rates, steps = ([getattr(m, name) for m in modules] for name in ("alpha", "learning_rate", "unchanged"))
    return [
        _spread(geometric_mean(alphas), min(alphas), max(alphas), digits=6),  # as the snippet has it
        *[_spread(geometric_mean(values), min(values), max(values)) for values in (rates, steps)],
    ]


def _spread(value: float, low: float, high: float, *, digits: int = 4) -> str:
    text = f"{value:.{digits}g}"
    return text if high - low < 1e-9 * high else f"{text} ({low:.3g} to {high:.3g})"


def plans(found: Advice) -> dict[str, tuple[Setting, dict[str, float]]]:
    """Settings whose first steps the check compares, and their alphas by module."""
    new, old = found.unchanged, found.old
    chosen: dict[str, tuple[Setting, dict[str, float]]] = {
        "tuned": (old, {}),
        "neither changed": (new, {}),
        "one alpha": (replace(new, alpha=found.alpha_at_old_rate), {}),
        "one rate": (replace(new, learning_rate=found.rate_at_alpha), {}),
    }
    if exponent(new.rule) != KAPPAS["rslora"]:
        chosen["neither changed, use_rslora"] = (replace(new, rule="rslora"), {})
    if found.modules[0].name != ALL:
        for per in ("type", "module"):
            chosen[f"alpha by {per}"] = (replace(new, alpha=found.alpha_at_old_rate), found.alpha_pattern(per))
    return chosen


def check(config: Config, found: Advice, targets: str | list[str]) -> None:
    """Take the first real step of every plan, several draws of A each, and report its size against the tuned one's.

    Raises:
      InputError: settings of the check, or the extra ``finetune`` is not installed.
    """
    try:
        import jax

        from rora_theory.llama import load
        from rora_theory.measure.model_layers import RealStep
        from sims.common import real_batch
    except ImportError as error:
        raise InputError(
            f"--check needs the extra finetune, as in pip install 'rora-theory[finetune]' ({error})"
        ) from error

    model_name, *data = config.check
    model = load(model_name)
    cli.tell(model.remarks)
    pair = real_batch.batches(data, model.tokenizer, items=config.items, heldout_items=config.items, seed=config.seed)
    chosen = plans(found)
    terms = {module.name: module.linear_term for module in found.modules}
    names = ("from_rank", "to_rank", "alpha", "lr", "rule", "to_rule", "optimizer", "init", "items", "seeds", "seed")
    identity: dict[str, Any] = {name: getattr(config, name) for name in names} | {"linear_terms": terms}
    identity |= {} if config.to_alpha is None else {"to_alpha": config.to_alpha}
    identity |= model.origin.identity() | {"records_sha256": real_batch.digest(data), "targets": targets}
    folder = RunFolder.open(NAME, identity, out=config.out, seed=config.seed, extra={"units": UNITS})
    stepper = RealStep(model.params, model.config, pair.train, pair.heldout, targets)
    kept = Cells(folder)
    rows: list[dict[str, Any]] = []
    with progress_bar("first steps", len(chosen) * config.seeds, fields="{plan}") as bar:
        for name, (setting, pattern) in chosen.items():
            for seed in range(config.seeds):
                bar.advance(0, plan=name)
                key = jax.random.fold_in(jax.random.key(config.seed), seed)
                take = partial(_step, stepper, name, setting, pattern, seed, key)
                rows += kept.do(f"{name}, seed {seed}", take)
                folder.write_rows(COLUMNS, rows)
                bar.advance(1, plan=name)
    summary = summarise(rows, chosen)
    folder.write_rows(SUMMARY_COLUMNS, summary, "summary.csv")
    folder.finish()
    lines: dict[str, list[str]] = {}
    for row in summary:
        text = f"{row['ratio']:.3f} ± {row['standard_error']:.3f}"
        if row["quantity"] == "modules":
            text += f" ({row['smallest']:.2f} to {row['largest']:.2f})"
        lines.setdefault(row["plan"], [f"{row['alpha']:.4g}", f"{row['learning_rate']:.3g}"]).append(text)
    print()
    tables.print_table(
        f"The first step really taken on {model_name}: rms of the change against the tuned setting's, {config.seeds} "
        "draws of A ± s.e.",
        ["plan", "alpha", "rate", "modules: mean (range)", "final hidden states", "logits"],
        [[name, *cells] for name, cells in lines.items() if name != "tuned"],
    )
    tables.print_text(f"written to {folder.path}")


def _step(
    stepper: Any, name: str, setting: Setting, pattern: Mapping[str, float], seed: int, key: Any
) -> list[dict[str, Any]]:
    """The rows of one first step."""
    change = stepper.change(setting, key, pattern)
    frame = {
        "plan": name,
        "rank": setting.rank,
        "alpha": setting.alpha,
        "learning_rate": setting.learning_rate,
        "scaling": setting.scaling,
        "alpha_pattern": len(pattern),
        "seed": seed,
    }
    rows = [
        frame | {"quantity": "module", "module": module, "layer": layer, "rms": float(value)}
        for module, values in change.modules.items()
        for layer, value in enumerate(values)
    ]
    whole = {"hidden": change.hidden, "logits": change.logits}
    return rows + [frame | {"quantity": quantity, "rms": value} for quantity, value in whole.items()]


def summarise(
    rows: Sequence[Mapping[str, Any]], chosen: Mapping[str, tuple[Setting, dict[str, float]]]
) -> list[dict[str, Any]]:
    """Ratios to the tuned setting's: root mean squares over seeds, standard errors by leaving one out (jackknife)."""
    seeds = sorted({row["seed"] for row in rows})

    def squares(plan: str, quantity: str) -> np.ndarray:
        """[seeds, modules]."""
        own = [row for row in rows if row["plan"] == plan and row["quantity"] == quantity]
        return np.array([[row["rms"] ** 2 for row in own if row["seed"] == seed] for seed in seeds])

    found = []
    for name, (setting, _) in chosen.items():
        for quantity in ("module", "hidden", "logits"):
            pair = squares(name, quantity), squares("tuned", quantity)

            def ratios(kept: Sequence[int], pair: tuple[np.ndarray, np.ndarray] = pair) -> np.ndarray:
                top, bottom = (np.mean(part[list(kept)], axis=0) for part in pair)
                return np.sqrt(top / bottom)

            def mean(kept: Sequence[int], of: Any = ratios) -> float:
                return geometric_mean(of(kept))

            every = range(len(seeds))
            left_out = np.array([mean([seed for seed in every if seed != out]) for out in every])
            spread = (len(seeds) - 1) * float(np.mean((left_out - np.mean(left_out)) ** 2))
            all_ratios = ratios(every)
            found.append(
                {
                    "plan": name,
                    "rank": setting.rank,
                    "alpha": setting.alpha,
                    "learning_rate": setting.learning_rate,
                    "quantity": "modules" if quantity == "module" else quantity,
                    "ratio": mean(every),
                    "standard_error": math.sqrt(spread),
                    "smallest": float(np.min(all_ratios)),
                    "largest": float(np.max(all_ratios)),
                }
            )
    return found


def main(config: Config) -> None:
    """Report, and check where asked."""
    if len(config.check) == 1:
        raise InputError(f"--check is {config.check[0]}; accepted are a model and one or more data files")
    cli.check_integers(config, from_rank=1, to_rank=1, items=1, seeds=2)
    check_seed(config.seed, "--seed")
    cli.check_positives(config, "lr", "to_alpha")
    if config.to_rule in ("none", "None"):
        accepted = f"{', '.join(KAPPAS)} or a finite exponent, and without --to-rule the rule stays as it is"
        raise InputError(f"--to-rule is {config.to_rule!r}; accepted are {accepted}")
    if config.json and config.check:
        raise InputError("--json comes with --check; accepted is one of them: the check writes its own files")
    config = read_from(config)
    found, targets, thin = plan(config)
    if config.json:
        said = found.as_dict() | {"target_modules": targets} | ({"remark": thin} if thin else {})
        print(json.dumps(said, indent=2))
        return
    report(config, found, targets, thin)
    if config.check:
        check(config, found, targets)


if __name__ == "__main__":
    cli.run(lambda: main(cli.parse(Config, description=(__doc__ or "").strip())))
