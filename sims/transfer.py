"""What alpha, or what learning rate, keeps the change of the model the same when the rank changes.

    python -m sims.transfer --from-rank 8 --to-rank 128 --alpha 16 --lr 3e-4 --rule lora --optimizer adamw
    python -m sims.transfer --from ADAPTER/adapter_config.json --lr 3e-4 --to-rank 128 --to-rule rslora --to-alpha 16

The first sentence says what to set and for how long it holds. Under Adam the answer has two ends, the first step's and
a long run's; --steps with --takeover (measured) or --p-in (assumed) gives the value between them. The regime is assumed
(signal, the default, whose alpha keeps the whole model's first step, or cross-talk) or measured: --regime RUN takes a
run of sims.regime, and alphas then differ by module and keep each module's own step. Then follow a short table, what
rules of thumb and `use_rslora` would do, and a PEFT `LoraConfig` to paste. --check MODEL DATA... takes the first real
steps of the model at both ranks and writes them to a run folder.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from rora_theory.cluster import ClusterConfig
from rora_theory.data.records import DataConfig
from rora_theory.errors import InputError
from rora_theory.measure.transfer_request import Advised, TransferConfig, advise
from rora_theory.random.seeds import check_seed
from rora_theory.runs.folder import RunFolder, check_free, path_of
from rora_theory.runs.summary import key_figures
from rora_theory.validation.ranges import Count, check_ranges
from rora_theory.validation.rules import check_seeds, check_unread
from sims.common import answers, cli, tables
from sims.common.cells import run_table
from sims.common.summaries import summarised

NAME = "transfer"


@dataclass(frozen=True)
class Config(TransferConfig):
    """What was tuned, and where it is to go."""

    from_: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """a saved adapter's folder or its adapter_config.json: gives --from-rank, --alpha, --rule, --init and --targets,
    none of which may then be another, and the LoraConfig's other entries"""
    check: tuple[str, ...] = ()
    """a model and data files: take the first real steps at both ranks"""
    reading: DataConfig = field(default_factory=DataConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    batch_size: Count = 8
    """records of --check's batch, and as many held-out ones"""
    seeds: tuple[int, ...] = (0, 1, 2, 3)
    """draws of A of --check"""
    seed: int = 0
    """of the records' split and of all draws"""
    out: Path | None = None
    """run folder of --check; none is results/transfer/RUN_ID"""

    def __post_init__(self) -> None:
        if len(self.check) == 1:
            raise InputError(f"--check is {self.check[0]}; accepted are a model and one or more data files")
        check_ranges(self)
        check_seeds(self.seeds, fewest=2)
        check_seed(self.seed, "--seed")
        if not self.check:
            check_unread(self, "reading", "cluster", "batch_size", "seeds", "seed", "out", requires="--check")
        super().__post_init__()


def report(config: Config, advised: Advised) -> None:
    """Print the sentence, the tables and the snippet, and what the regime leaves open."""
    found, peft, thin = advised
    snippet = found.peft_config(**peft)  # refused first
    answers.print_answer(
        found.sentence(), [thin] if thin else [], **found.as_dict(), target_modules=peft["target_modules"]
    )
    print()
    flag = ", with use_rslora" if found.is_rslora else ""
    tables.print_records(
        found.heading(config.split),
        [group._asdict() for group in found.groups_by_regime()],
        {
            "": "{name}",
            f"alpha at rate {found.old.learning_rate:g}{flag}": "{alpha:.6g}",  # as many digits as the snippet has
            f"rate at alpha {found.unchanged.alpha:g}{flag}": "{learning_rate:.4g}",
            "step if neither changes": "{unchanged:.4g}",
        },
    )
    forms = {"choice": "{name}", "gamma": "{gamma:.4g}", "first step": "{steps:.4g} x"}
    forms["rate that corrects it"] = "{learning_rate:.3g}"
    if found.plan is not None:
        forms[f"at {found.plan.steps} steps"] = "{rates.planned:.3g}"
    if found.rates is not None:
        forms["in a long run"] = "{rates.A_led:.3g}"
    tables.print_records(
        found.choices_heading(),
        [vars(each) | {"gamma": each.setting.scaling, "steps": each.steps} for each in found.alternatives()],
        forms,
    )
    print(snippet)
    if found.regime == "measured" and not found.fixes_alpha:
        tables.print_text(f"\n{found.whole_model()} --check takes the steps.")


def take_first_steps(config: Config, advised: Advised) -> None:
    """Report, take the first real step of every candidate, and report its size against the tuned one's.

    Raises:
      InputError: settings of the check.
    """
    from rora_theory.measure import record_batches, transfer_check
    from rora_theory.measure.layers.model_layers import RealStep
    from sims.common import prompts

    found, targets = advised.advice, advised.peft["target_modules"]
    runner, seed = config.cluster.runner(), config.seed
    read = prompts.read_inputs(config.check[1:], config.check[0], config.reading)
    size = record_batches.PairConfig(config.batch_size, config.batch_size)
    pair = record_batches.pair(size, **read.texts(), seed=config.seed)
    identity: dict[str, Any] = {name: getattr(config, name) for name in ("batch_size", "seeds", "seed")}
    identity |= {"targets": targets} | found.identity() | read.identity
    check_free(path_of(NAME, identity, config.out))
    report(config, advised)
    stepper = RealStep(read.model.params, read.model.config, pair.train, pair.held_out, targets)
    extra, models = {"units": transfer_check.UNITS}, [read.origin]
    folder = RunFolder.open(NAME, identity, out=config.out, seed=config.seed, extra=extra, models=models)
    prompts.save_prompts(folder, pair.examples, read.tokenizer, show=config.reading.show)
    steps = run_table(
        list(transfer_check.first_steps(found, config.seeds)),
        lambda cell, _: transfer_check.first_step_rows(stepper, found, cell, seed),
        folder,
        transfer_check.COLUMNS,
        runner=runner,
        title="first steps",
    )
    summary = transfer_check.summarise(steps, found)
    folder.write_frame(summary, "summary.csv")
    print()
    scope = ("plan", "rank", "alpha", "learning_rate", "quantity")
    ratios = key_figures(
        summary, "rms change of the first step over the tuned one's", "ratio", over="draws", scope=scope
    )
    with summarised(folder, ratios, answer=found.sentence()):
        tables.print_table(
            f"The first step really taken on {config.check[0]}: rms of the change against the tuned setting's, "
            f"{len(config.seeds)} draws of A ± s.e.",
            transfer_check.HEADS,
            transfer_check.format_candidates(summary),
        )
    folder.finish()
    answers.print_files(folder.path)


def run(config: Config) -> None:
    """Report, and check where asked."""
    (take_first_steps if config.check else report)(config, advise(config))


main = cli.command(Config, run, __doc__)

if __name__ == "__main__":
    main()
