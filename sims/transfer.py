"""Print the alpha and learning rate to set when the rank, the rule or the number of steps changes.

    python -m sims.transfer --from-rank 16 --to-rank 128 --alpha 32 --lr 2e-4
    python -m sims.transfer --from-rank 16 --to-rank 128 --alpha 32 --to-alpha 256 --lr 2e-4 --steps 64 --to-steps 256
    python -m sims.transfer --from-rank 16 --to-rank 16 --alpha 32 --lr 2e-4 --batch-size 4 --to-batch-size 64
    python -m sims.transfer --from ADAPTER/adapter_config.json --lr 3e-4 --to-rank 128 --to-rule rslora --to-alpha 16

The evidence comes first, then the answer. Its cost in measured runs and its limits follow, then the learning rates of
common choices, and a PEFT `LoraConfig` to paste. Under Adam with PEFT's default initialisation the learning rate
follows measured laws of the scaling, the rank, the steps and the batch; otherwise the size of the first step is
preserved. The regime is the part of the first step that dominates: signal, along the gradient of the full weight (the
default, which describes the whole model), or cross-talk, which the random directions of A add. It can be measured:
--regime RUN loads a run of sims.regime, and alphas then differ by module and preserve each module's own first step.
--check MODEL DATA... trains the model for one step at both ranks, and writes the sizes of the changes to a run folder.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from rora_theory.advice import text
from rora_theory.advice.setting import REGIMES
from rora_theory.advice.trainer_configs import write_trainer_config
from rora_theory.advice.transfer import Advice
from rora_theory.defaults import MEASURE_BATCH_SIZE
from rora_theory.errors import InputError
from rora_theory.lab.data.records import DataConfig
from rora_theory.laws.random.seeds import check_seed
from rora_theory.measure.transfer_request import Advised, TransferConfig, advise
from rora_theory.runs.folder import RunFolder, check_free, path_of
from rora_theory.runs.summary import key_figures
from rora_theory.validation.ranges import Count, check_ranges
from rora_theory.validation.rules import check_list, check_unread
from sims.common import answers, cli, tables
from sims.common.cells import run_table
from sims.common.summaries import summarised

NAME = "transfer"


@dataclass(frozen=True)
class TransferOptions(TransferConfig):
    """Tuned setting, new rank, and an optional check on a model."""

    from_: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    write: Path | None = None
    """New file, in the format of --from, with the advised rank, alpha, rule and learning rate, and with --to-steps and
    --to-schedule; other keys are kept"""
    check: tuple[str, ...] = ()
    """A model and one or more data files, on which to run the real first steps at both ranks"""
    reading: DataConfig = field(default_factory=DataConfig)
    check_batch_size: Count = MEASURE_BATCH_SIZE
    """Number of records in the batch of --check, and of held-out records"""
    seeds: tuple[int, ...] = (0, 1, 2, 3)
    """Seeds of A in --check"""
    seed: int = 0
    """Seed of the split of the records and of all draws"""
    out: Path | None = None
    """Run folder of --check; the default is results/transfer/RUN_ID"""

    def __post_init__(self) -> None:
        if len(self.check) == 1:
            raise InputError(f"check must be a model and one or more data files, got {self.check[0]}")
        if self.write is not None and self.from_ is None:
            raise InputError(f"write {self.write} requires --from with the file to change")
        check_ranges(self)
        check_list("seeds", self.seeds, check_seed, fewest=2)
        check_seed("seed", self.seed)
        # Options of the check have no effect without it.
        if not self.check:
            check_unread(self, "reading", "check_batch_size", "seeds", "seed", "out", requires="--check")
        super().__post_init__()


def report(config: TransferOptions, advised: Advised) -> None:
    """Write the file of --write, and print the answer, the tables and the configuration to paste."""
    advice, peft, limits = advised
    snippet = advice.peft_config(**peft)  # raises before anything is written or printed
    if config.from_ is not None and config.write is not None:
        per = "one" if config.regime in REGIMES else config.per
        write_trainer_config(config.from_, config.write, advice, per=per)
    target_modules = peft["target_modules"]
    if advice.follows_displacement_law and {"rank", "gain"} & set(advice.changed):
        tables.print_text(f"{text.describe_evidence()}\n")
    answers.print_answer(advice.answer(), [limits] if limits else [], **advice.as_dict(), target_modules=target_modules)
    details = advice.details()
    tables.print_text(f"\n{details}\n" if details else "")
    if advice.regime != "signal":
        print_modules(config, advice)
    print_alternatives(advice)
    print(snippet)
    if advice.regime == "measured" and not advice.fixes_alpha:
        tables.print_text(f"\n{text.describe_whole_model(advice)} --check runs the steps.")


def print_modules(config: TransferOptions, advice: Advice) -> None:
    """Print the alpha and the learning rate that preserve the first step, by type of module or by regime."""
    flag = ", with use_rslora" if advice.is_rslora else ""
    tables.print_records(
        text.describe_tuned(advice, config.split),
        [group._asdict() for group in advice.groups_by_regime()],
        {
            "": "{name}",
            f"alpha at rate {advice.old.learning_rate:g}{flag}": "{alpha:.6g}",  # with the digits of the configuration
            f"rate at alpha {advice.unchanged.alpha:g}{flag}": "{learning_rate:.4g}",
            "step if neither changes": "{step_ratio:.4g}",
        },
    )


def print_alternatives(advice: Advice) -> None:
    """Print the learning rates that common choices of alpha and rule need."""
    formats = {"choice": "{name}", "scaling": "{scaling:.4g}"}
    if advice.follows_displacement_law:
        formats["learning rate (range)"] = "{rate_range:.3g}"
    else:
        formats |= {"first step": "{step:.4g} x", "rate that preserves it": "{learning_rate:.3g}"}
    if advice.rate_limits is not None:
        formats["in a long run"] = "{rate_limits.long_run:.3g}"
    rows = [vars(row) | {"scaling": row.setting.scaling} for row in advice.alternatives()]
    tables.print_records(text.describe_alternatives(advice), rows, formats)


def take_first_steps(config: TransferOptions, advised: Advised) -> None:
    """Print the advice, run the first step of every candidate on the model, and print the sizes of the changes.

    Raises:
      InputError: If a setting of the check is out of range or does not fit the model.
    """
    from rora_theory.measure import transfer_check
    from rora_theory.measure.batches import check_unseen
    from rora_theory.measure.modules import select_modules
    from sims.common import inputs, prompts, record_batches

    # Batches of the check.
    advice, targets = advised.advice, advised.peft["target_modules"]
    source = inputs.read_inputs(config.check[1:], config.check[0], config.reading)
    pair_config = record_batches.PairConfig(config.check_batch_size, config.check_batch_size)
    pair = record_batches.make_batch_pair(pair_config, source, seed=config.seed)
    identity: dict[str, Any] = {name: getattr(config, name) for name in ("check_batch_size", "seeds", "seed")}
    identity |= {"targets": targets} | advice.identity() | source.identity
    check_free(path_of(NAME, identity, config.out))
    # Nothing is written before the inputs are checked. The advice is printed before the model takes steps.
    select_modules(source.skeleton, targets)
    model = source.model
    check_unseen(model, pair.held_out, pair.train)
    report(config, advised)
    # Run every candidate with every seed.
    checker = transfer_check.FirstStepChecker(model, pair.train, pair.held_out, targets, config.seed)
    extra, models = {"units": transfer_check.UNITS, "device": inputs.describe_device(model)}, [source.origin]
    folder = RunFolder.open(NAME, identity, out=config.out, seed=config.seed, extra=extra, models=models)
    prompts.print_prompts(pair.examples, source.tokenizer, config.reading.show)
    steps = run_table(
        list(transfer_check.first_steps(advice, config.seeds)),
        lambda cell, _: checker.rows(advice, cell),
        folder,
        transfer_check.COLUMNS,
        title="first steps",
    )
    # Ratio of every candidate's change to that of the tuned setting.
    summary = transfer_check.summarise_ratios(steps, advice)
    folder.write_frame(summary, "summary.csv")
    print()
    # Key figures and the printed table.
    scope = ("plan", "rank", "alpha", "learning_rate", "quantity")
    ratios = key_figures(
        summary,
        "first change relative to the tuned setting's",
        "ratio",
        over="draws",
        scope=scope,
    )
    with summarised(folder, ratios, answer=advice.sentence()):
        tables.print_table(
            f"First step on {config.check[0]}: root mean square of the change, relative to the tuned setting, over "
            f"{len(config.seeds)} draws of A, with standard errors in brackets",
            transfer_check.HEADS,
            transfer_check.format_candidates(summary),
        )
    folder.finish()
    answers.print_files(folder.path)


def transfer_setting(config: TransferOptions) -> None:
    """Print the advice, and check it on a model if one is given."""
    advised = advise(config)
    (take_first_steps if config.check else report)(config, advised)
    if config.write is not None:
        answers.print_files(config.write.parent, [config.write.name])


main = cli.command(TransferOptions, transfer_setting, __doc__)

if __name__ == "__main__":
    main()
