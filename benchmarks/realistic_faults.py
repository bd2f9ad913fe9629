"""Faults that a person might make, for `benchmarks/mutation.py`.

Operators change one number or comparison; these faults leave out, confuse or forget something. A fault's old text
occurs exactly once in its file, which `tests/test_mutation.py` checks, so that the list follows the code.
"""

from typing import NamedTuple


class Fault(NamedTuple):
    """A fault in a file, and what it breaks.

    Attributes:
      path: Path of the file in the repository.
      old: Text of the file, which occurs once.
      new: Text in its place.
      breaks: Description of the wrong behaviour.
    """

    path: str
    old: str
    new: str
    breaks: str


CLUSTER = "rora_theory/runs/cluster.py"
FILL = "docs/fill.py"
CALCULATOR = "docs/assets/transfer.mjs"
SWEEP = "rora_theory/lab/sweep"
TUNING = "rora_theory/measure/tuning.py"
RATE_PRIOR = "rora_theory/evidence/rate_prior.py"
TUNE_COMMAND = "sims/tune.py"

WORKERS_FAULTS = [
    Fault(
        CLUSTER,
        "if reference not in _loaded_work:",
        "if True:",
        "a worker loads its models again for every cell",
    ),
    Fault(
        CLUSTER,
        "if not folder.parents[1].is_dir():",
        "if not folder.is_absolute():",
        "a worker writes into a folder of its own node",
    ),
    Fault(
        CLUSTER,
        "yield CellOutcome(index, error.cause)",
        "yield CellOutcome(len(pending), error.cause)",
        "an exception is attributed to another cell",
    ),
    Fault(
        CLUSTER,
        "yield outcome._replace(position=index)",
        "yield outcome",
        "every result is that of the first cell",
    ),
    Fault(
        CLUSTER,
        "error.cause.__cause__ = error",
        "pass",
        "the worker's traceback is lost",
    ),
    Fault(
        CLUSTER,
        "except ray.exceptions.RayError as error:\n                    yield CellOutcome(index, error)",
        "except ray.exceptions.RayError:\n                    continue",
        "a cell whose node died disappears",
    ),
    Fault(
        CLUSTER,
        "_session.close()",
        "_session.pop_all()",
        "cells run on after an interruption",
    ),
    Fault(
        CLUSTER,
        '_temp_dir=f"{folder}/ray"',
        '_temp_dir="/tmp/ray"',
        "Ray's session lies in a folder that every user can enter",
    ),
    Fault(
        CLUSTER,
        '    "OMP_NUM_THREADS": str(os.cpu_count() or 1),',
        "   ",
        "workers have one NumPy thread, so that their results have other bits",
    ),
    Fault(
        CLUSTER,
        "(VARIABLES | local).items()",
        "VARIABLES.items()",
        "a local session listens on the network",
    ),
    Fault(
        CLUSTER,
        "signal.signal(signal.SIGTERM, sigterm_handler)  # Ray replaces it",
        "pass",
        "SIGTERM is handled by Ray after the start",
    ),
    Fault(
        CLUSTER,
        "math.ceil(config.workers * config.cell_cpus)",
        "config.workers",
        "a cell of two CPUs halves the number of workers",
    ),
    Fault(
        CLUSTER,
        "int((self.cell_memory or 0) * 2**30)",
        "int((self.cell_memory or 0) * 10**9)",
        "memory is reserved in gigabytes in place of GiB",
    ),
    Fault(
        CLUSTER,
        "if self.address is None and needed > available.get(name, 0):",
        "if needed > available.get(name, 0):",
        "a cluster that may get another node is refused",
    ),
    Fault(
        CLUSTER,
        "ray.remote(max_retries=RETRIES, **self.needs)",
        "ray.remote(**self.needs)",
        "the number of attempts is Ray's",
    ),
]

PAGES_FAULTS = [
    Fault(FILL, "RELATIVE_TOLERANCE = 1e-6", "RELATIVE_TOLERANCE = 1e-2", "a condition selects a neighbouring value"),
    Fault(
        FILL,
        "return value is target if value is None or target is None else str(value) == text",
        "return str(value) == text",
        "a missing value is not selected by an empty condition",
    ),
    Fault(
        FILL,
        "[min(values_of(column)), max(values_of(column))]",
        "[values_of(column)[0], values_of(column)[-1]]",
        "a range has the first and the last value in place of the lowest and the highest",
    ),
    Fault(FILL, "statistics.median(", "statistics.mean(", "a median is a mean"),
    Fault(
        FILL,
        "len({tuple(row[column] for column in columns) for row in rows})",
        "len(rows)",
        "repeated combinations count",
    ),
    Fault(
        FILL,
        '[PACKAGED, ROOT / "README.md", *(ROOT / page for page in pages)]',
        "[PACKAGED, *(ROOT / page for page in pages)]",
        "the README is not checked",
    ),
    Fault(FILL, '.rglob("*.md")', '.glob("*.md")', "pages in folders are not checked"),
    Fault(FILL, "if not arguments and new != old:", "if new != old:", "--check writes the pages"),
    Fault(FILL, "return int(bool(remaining))", "return 0", "the status of --check is always 0"),
    Fault(
        FILL,
        ', key=lambda path: re.sub(r"\\d+", lambda n: n[0].zfill(9), str(path)))',
        ")",
        "rows of several files are in the order of their names' characters",
    ),
    Fault(
        FILL,
        '"divisor_low": setting.learning_rate / high}',
        '"divisor_low": setting.learning_rate / low}',
        "the range of a divisor has one end twice",
    ),
    Fault(FILL, '{"COLUMNS": "80", ', "{", "lines of a command's output are those of the terminal"),
    Fault(
        FILL,
        'if arguments or ": error: " in problem]',
        "if arguments]",
        "a mark that cannot be filled is not reported when pages are written",
    ),
    Fault(
        FILL,
        'value, spec = float(f"{value:.{SIGNIFICANT_DIGITS}g}"), spec or "g"',
        'spec = spec or "g"',
        "a tie is rounded by the processor's last bit",
    ),
    Fault(
        FILL,
        "return tuple(columns | row for row in rows)",
        "return tuple(rows)",
        "a column that the first rows lack cannot be selected",
    ),
    Fault(CALCULATOR, "const growth = Math.log(next / old);", "const growth = Math.log2(next / old);", "octaves"),
    Fault(
        CALCULATOR,
        "Math.hypot(spread, laws.pair[1])",
        "spread",
        "the range leaves out the spread between pairs of runs",
    ),
    Fault(CALCULATOR, 'KAPPAS[inputs["to-rule"] ?? rule]', 'KAPPAS[inputs["to-rule"] ?? "lora"]', "the rule is lost"),
    Fault(
        CALCULATOR,
        "const newOf = (name) => inputs[`to-${name}`] ?? inputs[name];",
        "const newOf = (name) => inputs[`to-${name}`];",
        "an unchanged schedule counts as one that was not measured",
    ),
    Fault(
        CALCULATOR,
        "const spread = Math.hypot(...terms.map((term) => term[1]));",
        "const spread = terms.reduce((sum, term) => sum + term[1], 0);",
        "independent errors are added",
    ),
    Fault(
        CALCULATOR,
        "power(laws.batch_exponent,",
        "power(laws.steps_exponent,",
        "the batch has the exponent of the steps",
    ),
    Fault(
        CALCULATOR,
        'power(laws.rank_exponent, inputs["from-rank"], rank)',
        'power(laws.rank_exponent, rank, inputs["from-rank"])',
        "the rank's power has the wrong sign",
    ),
    Fault(CALCULATOR, "value >= 2 ** 31)", "value >= 2 ** 53)", "a rank is accepted that the library refuses"),
    Fault(CALCULATOR, '"to-alpha": 2 * rank,', '"to-alpha": 2 * alpha,', "alpha = 2r is twice the tuned alpha"),
    Fault(CALCULATOR, "low: rate / factor, high: rate * factor", "low: rate, high: rate * factor", "half a range"),
    Fault(
        CALCULATOR,
        "Math.hypot(before[1], after[1])]",
        "after[1]]",
        "the error of the tuned run's schedule is left out",
    ),
    Fault(
        CALCULATOR,
        "if (old === next || !before || !after) return [0, 0];",
        "if (!before || !after) return [0, 0];",
        "an unchanged schedule widens the range",
    ),
    Fault(
        CALCULATOR,
        'Math.max(512, inputs["from-rank"], inputs["to-rank"])',
        'Math.max(512, inputs["from-rank"])',
        "the chart ends below the new rank",
    ),
]

SWEEP_FAULTS = [
    # ---- conditions, curves and best rates
    Fault(
        f"{SWEEP}/runs.py",
        "return diverged_at is not None and diverged_at <= step and self.steps in (None, step)",
        "return diverged_at is not None and diverged_at <= step",
        "a run that diverged under a decaying rate counts at other lengths",
    ),
    Fault(
        f"{SWEEP}/runs.py",
        "setdefault(run.steps or 0, [])",
        "setdefault(0, [])",
        "runs of two lengths under a decaying rate are merged",
    ),
    Fault(
        f"{SWEEP}/runs.py",
        'return reading.answer_losses if self.loss_on == "answer" else reading.losses',
        "return reading.losses",
        "runs that learned answers are judged by all tokens",
    ),
    Fault(
        f"{SWEEP}/runs.py",
        "diverged_at=min(divergences, default=None),",
        "diverged_at=longest.read.diverged_at,",
        "a divergence of the shorter of two merged runs is forgotten",
    ),
    Fault(
        f"{SWEEP}/runs.py",
        'for name in ("model_sha256", "data"):',
        'for name in ("model_sha256",):',
        "losses over other records are compared",
    ),
    Fault(
        f"{SWEEP}/curves.py",
        "if run.rate and run.reaches(step)]",
        "if run.rate and run.losses(step) is not None]",
        "a run that diverged is left out of its curve, so that its rate is no edge",
    ),
    Fault(
        f"{SWEEP}/curves.py",
        "if (shared := at_shared_seeds(first, second))\n",
        "if (shared := (first, second))\n",
        "curves are compared over seeds that they do not share",
    ),
    Fault(
        f"{SWEEP}/curves.py",
        "seeds = sorted(by_seed.keys() & other_by_seed.keys())",
        "seeds = sorted(by_seed.keys())",
        "a seed without a partner is compared",
    ),
    Fault(
        f"{SWEEP}/curves.py",
        "(other for other in adapters if other.rank == curve.rank), key",
        "adapters, key",
        "gains of different ranks are compared",
    ),
    Fault(
        f"{SWEEP}/results.py",
        'rows["status"].isin(("complete", "diverged"))',
        'rows["status"].isin(("complete",))',
        "a rate that diverged is not an end of the rates",
    ),
    Fault(
        f"{SWEEP}/results.py",
        "for _, group in final_rows(rows).groupby",
        "for _, group in rows.groupby",
        "the best rate is chosen among losses of different steps",
    ),
    Fault(
        f"{SWEEP}/results.py",
        'seed = int(group.groupby("seed")["learning_rate"].nunique().idxmax())',
        'seed = int(group.loc[group["loss"].idxmin(), "seed"])',
        "the best rate is the luckiest seed's",
    ),
    Fault(
        f"{SWEEP}/results.py",
        "max(0, reading.step - 10) : reading.step]",
        "-10:]",
        "the training loss of every read-out is that of the end",
    ),
    Fault(
        f"{SWEEP}/curves.py",
        '_estimates(labels, "ratio", (1.0, -1.0), (first, second), edge)',
        '_estimates(labels, "ratio", (-1.0, 1.0), (first, second), edge)',
        "a ratio of best rates is inverted",
    ),
    Fault(
        f"{SWEEP}/curves.py",
        "is_end = edge and (estimator == THREE_POINTS or logs.error < ROUNDING)",
        "is_end = False",
        "the end of a grid has an interval",
    ),
    Fault(
        f"{SWEEP}/curves.py",
        "2 ** (logs.value + width)}",
        "math.exp(logs.value + width)}",
        "octaves are taken for natural logarithms",
    ),
    Fault(
        f"{SWEEP}/analysis.py",
        'schedule=settings["schedule"])',
        'schedule=shared["schedule"])',
        "the law of a group with another schedule is that of the shared one",
    ),
    Fault(
        f"{SWEEP}/analysis.py",
        'warmup=settings["warmup"],',
        'warmup=shared["warmup"],',
        "the law of a group with another warm-up is that of the shared one",
    ),
    Fault(
        f"{SWEEP}/analysis.py",
        "compare_at_one_rate(runs, tokens[loss_on], step)",
        'compare_at_one_rate(runs, tokens["all"], step)',
        "losses of answers are divided by the numbers of all tokens",
    ),
    Fault(
        f"{SWEEP}/analysis.py",
        'if key == next(iter(groups)) and "model" not in described:',
        "if key == next(iter(groups)):",
        "losses of two models are compared",
    ),
    # ---- exponents and laws
    Fault(
        f"{SWEEP}/law.py",
        "octaves = math.log2(second / first)\n            labels",
        "octaves = math.log(second / first)\n            labels",
        "octaves are taken for natural logarithms in the exponent of a gain or rank",
    ),
    Fault(
        f"{SWEEP}/law.py",
        "octaves = math.log2(second / first)\n            slope",
        "octaves = math.log(second / first)\n            slope",
        "octaves are taken for natural logarithms in the exponent of the steps",
    ),
    Fault(
        f"{SWEEP}/law.py",
        "weight = 1 / (len(group) * octaves)",
        "weight = 1 / octaves",
        "a pooled exponent is a sum in place of a mean",
    ),
    Fault(
        f"{SWEEP}/law.py",
        "pooled = tuple(at for at, seeds in seeds_at.items() if seeds == max(seeds_at.values()))",
        "pooled = tuple(seeds_at)",
        "a rank with one seed leaves one seed of the others in the pool",
    ),
    Fault(
        f"{SWEEP}/law.py",
        "steps=steps, warmup=self.warmup)",
        "steps=steps, warmup=0)",
        "the law leaves out the warm-up",
    ),
    Fault(
        f"{SWEEP}/law.py",
        "for curve in curves[step] if step > 1 or not law.warmup else ():",
        "for curve in curves[step]:",
        "a step at the rate 0 has a best rate",
    ),
    Fault(
        f"{SWEEP}/law.py",
        "if curve.rank else [math.inf]",
        "",
        "full fine-tuning has an A that takes over",
    ),
    Fault(
        f"{SWEEP}/law.py",
        'return "first" if first.edge else "second" if second.edge else ""',
        'return "first" if first.edge else ""',
        "an edge of the second curve is forgotten",
    ),
    Fault(
        f"{SWEEP}/law.py",
        'optimizer="adam", init="kaiming_uniform", split="heldout")',
        'optimizer="sgd", init="kaiming_uniform", split="heldout")',
        "linear terms are those of SGD",
    ),
    Fault(
        f"{SWEEP}/law.py",
        "whole_curve_log2_rates([sign * weight for _ in group for sign in (-1.0, 1.0)], *ends)",
        "whole_curve_log2_rates([sign * weight for _ in group for sign in (1.0, -1.0)], *ends)",
        "an exponent of whole curves has the wrong sign",
    ),
    # ---- parts of the change
    Fault(
        f"{SWEEP}/change_parts.py",
        "x = x[~mark_sinks(np.linalg.norm(x, axis=1))]",
        "pass",
        "attention sinks dominate the parts of the change",
    ),
    Fault(
        f"{SWEEP}/change_parts.py",
        "x @ (trained_A[layer] - start_A[layer]).T",
        "x @ trained_A[layer].T",
        "the A part contains the B part",
    ),
    Fault(
        f"{SWEEP}/change_parts.py",
        "rms = gamma * np.sqrt(",
        "rms = np.sqrt(",
        "the parts of the change are without the adapter's scaling",
    ),
    Fault(
        f"{SWEEP}/change_parts.py",
        'runs[runs["learning_rate"] <= (optimum or 0.0) * 10 ** (GRID_STEP / 2)]',
        "runs",
        "runs above the best rate give the displacement constant",
    ),
    Fault(
        f"{SWEEP}/change_parts.py",
        'gain * near_best["ratio"] * (1 + near_best["ratio"])',
        'gain * near_best["ratio"]',
        "the displacement constant leaves out the A part",
    ),
    Fault(
        f"{SWEEP}/change_parts.py",
        "moved = b > 0",
        "moved = b >= 0",
        "a module that has not moved has a ratio",
    ),
    # ---- regret and policies
    Fault(
        f"{SWEEP}/regret.py",
        'inside = costs[~costs["is_edge"].astype(bool)] if len(costs) else costs',
        "inside = costs",
        "pairs with an edge are counted in the summary",
    ),
    Fault(
        "rora_theory/evidence/policies.py",
        "transfer_rate(rate, old, new).best",
        "transfer_rate(rate, Run(old.rank, old.gain), Run(new.rank, new.gain)).best",
        "the policy of the advice ignores the number of steps",
    ),
    Fault(
        "rora_theory/evidence/policies.py",
        "key=lambda steps: abs(math.log(steps / _steps(old))))",
        "key=lambda steps: abs(steps - _steps(old)))",
        "the nearest number of steps is not the nearest in log",
    ),
    Fault(
        "rora_theory/evidence/policies.py",
        "(_steps(new) / _steps(old)) ** -0.5",
        "(_steps(new) / _steps(old)) ** 0.5",
        "the rate of the policy displacement and steps rises with the steps",
    ),
    Fault(
        f"{SWEEP}/regret.py",
        "return new.rank >= old.rank and (new.steps or 0) >= (old.steps or 0)",
        "return new.rank >= old.rank",
        "a rate is carried to shorter runs",
    ),
    Fault(
        f"{SWEEP}/regret.py",
        "return self._covering[condition, seeds] or self.curves[condition]",
        "return self.curves[condition]",
        "a rate that some seeds ran is a bound of all",
    ),
    Fault(
        f"{SWEEP}/regret.py",
        "bool(tuned.edge or target.edge)",
        "bool(target.edge)",
        "an edge of the curve on which the rate was tuned is forgotten",
    ),
    Fault(
        "rora_theory/evidence/regrets.py",
        'int(pairs["is_lower_bound"].sum())',
        "0",
        "lower bounds are not named in the summary",
    ),
    Fault(
        "rora_theory/stats/regret.py",
        "losses - curve.losses[:, [curve.lowest]], axis=0)",
        "losses - curve.lowest_losses()[:, None], axis=0)",
        "the noise of single seeds counts as regret",
    ),
    Fault(
        "rora_theory/stats/regret.py",
        "- curve.losses[:, lowest]",
        "- curve.lowest_losses()",
        "the error of a regret is that of another reference than its value",
    ),
    Fault(
        "rora_theory/stats/rate_curves.py",
        "return usable, scipy.interpolate.PchipInterpolator(x, y, axis=1)",
        "return usable, scipy.interpolate.CubicSpline(x, y, axis=1)",
        "a regret between two rates may be negative",
    ),
    Fault(
        "rora_theory/stats/regret.py",
        "return 100 * self.nats.value / self.lowest_loss",
        "return 100 * self.nats.value",
        "per cent of 1 nat",
    ),
    # ---- intervals over seeds, and differences
    Fault(
        "rora_theory/stats/rate_curves.py",
        "return combine_errors(by_seeds, by_records) if by_seeds.has_error else by_records",
        "return by_records",
        "the spread between seeds is left out of the interval",
    ),
    Fault(
        "rora_theory/stats/rate_curves.py",
        "return max((combined, by_seeds, by_records), key=Estimate.half_width)",
        "return combined",
        "few samples make the combined interval narrower than one of its parts",
    ),
    Fault(
        "rora_theory/stats/estimate.py",
        "special.stdtrit(self.n - 1, 0.5 + confidence / 2)",
        "special.ndtri(0.5 + confidence / 2)",
        "the interval of few seeds is a normal distribution's",
    ),
    Fault(
        "rora_theory/stats/curve_optima.py",
        "x, finite = np.log2(curve.rates), np.isfinite(curve.losses)",
        "x, finite = np.log(curve.rates), np.isfinite(curve.losses)",
        "the optimum of a whole curve is a natural logarithm in place of octaves",
    ),
    Fault(
        "rora_theory/stats/trained_runs.py",
        "return combine_errors(by_seeds, replace(over_records, over=RECORDS))",
        "return replace(over_records, over=RECORDS)",
        "a difference at one rate leaves out the spread between seeds",
    ),
    Fault(
        f"{SWEEP}/differences.py",
        "(row, base or against[seed]) for seed, row in group.items()",
        "(row, base or next(iter(against.values()))) for seed, row in group.items()",
        "cells of different seeds are paired",
    ),
    Fault(
        f"{SWEEP}/differences.py",
        "if rank and (lora_rank, lora_alpha) != (rank, alpha):",
        "if rank and lora_rank != rank:",
        "methods at different alphas are compared",
    ),
    Fault(
        f"{SWEEP}/differences.py",
        '_check_same(pairs, losses, RECORD, "measured on different records")',
        "pass",
        "losses of different records are compared",
    ),
    Fault(
        f"{SWEEP}/differences.py",
        "max(gap for gap in gaps if gap is not None)",
        "min(gap for gap in gaps if gap is not None)",
        "the error of the grid is the smaller of the two",
    ),
]

TUNING_FAULTS = [
    Fault(
        TUNING,
        "gain = config_gain(config)",
        "gain = config.lora_alpha",
        "use_rslora is ignored",
    ),
    Fault(
        TUNING,
        "config=copy.deepcopy(config)",
        "config=config",
        "the result shares the configuration of the caller, which PEFT changes",
    ),
    Fault(
        TUNING,
        "parameters=count_parameters(model) / 1e9",
        "parameters=count_parameters(model)",
        "the size of the model is in single parameters",
    ),
    Fault(
        RATE_PRIOR,
        "return RateBelief(start.log_mean + change.mean,",
        "return RateBelief(start.log_mean - change.mean,",
        "the prior is transferred in the wrong direction",
    ),
    Fault(
        RATE_PRIOR,
        "math.hypot(start.log_spread, change.spread))",
        "start.log_spread)",
        "the error of the law is left out of the prior",
    ),
    Fault(
        RATE_PRIOR,
        "distance = self.spread**2 - 4 * LOG_STEP",
        "distance = self.spread**2 - 2 * LOG_STEP",
        "three runs gain half of what they do",
    ),
    Fault(
        RATE_PRIOR,
        "z = LOG_STEP / (2 * self.spread)",
        "z = LOG_STEP / self.spread",
        "the outer rates are kept only where the best rate lies beyond them",
    ),
    Fault(
        RATE_PRIOR,
        "return 0.5 * CURVATURE * self.spread**2",
        "return CURVATURE * self.spread**2",
        "the expected regret of a parabola is doubled",
    ),
    Fault(
        RATE_PRIOR,
        "factor = math.exp(QUANTILE * self.spread)",
        "factor = math.exp(self.spread)",
        "the 90% range holds two thirds",
    ),
    Fault(
        RATE_PRIOR,
        "if parameters is not None and not min(sizes) <= parameters <= max(sizes):",
        "if parameters is not None and min(sizes) <= parameters <= max(sizes):",
        "an extrapolated rate does not say so",
    ),
    Fault(
        TUNE_COMMAND,
        '"lora_alpha": self.gain,',
        '"lora_alpha": self.alpha,',
        "PEFT's alpha is not that of the rule",
    ),
    Fault(
        TUNE_COMMAND,
        "revision, config_only=True)",
        "revision)",
        "the weights of a hub id are downloaded for its configuration",
    ),
]

FAULTS = [*WORKERS_FAULTS, *PAGES_FAULTS, *SWEEP_FAULTS, *TUNING_FAULTS]
"""All faults. The pages are those of `docs`, and the others modules of the library."""
