"""Prune layers, heads and feed-forward features of a LLaMA model by their contribution on calibration text.

    python -m sims.prune --text DATA/ARC-Easy/train.json --share 0.5

The run folder contains `model/`, the pruned model in Hugging Face layout, and `results.csv`, one row per layer of the
original model with its influence and its remaining size. `lab.llama.pruning` documents the criteria and their
sources. The perplexities before and after are measured on text that was not used for calibration. The pruned model is
not retrained.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from rora_theory.defaults import SMALL_BATCH_SIZE
from rora_theory.errors import InputError
from rora_theory.lab.data import windows as text_windows
from rora_theory.lab.data.records import FormatConfig
from rora_theory.laws.random.seeds import check_seed
from rora_theory.runs import digests
from rora_theory.runs.folder import RunFolder, check_free, path_of
from rora_theory.runs.summary import KeyFigure
from rora_theory.validation.ranges import AtLeastTwo, Count, Share, check_ranges
from sims.common import answers, cli, tables
from sims.common.progress import progress_bar
from sims.common.summaries import summarised

if TYPE_CHECKING:
    import numpy as np

    from rora_theory.lab.llama.pruning import PrunedShape

NAME, MODEL = "prune", "model"


@dataclass(frozen=True)
class PruneOptions:
    text: tuple[str, ...]
    """Calibration text: .txt files, or training records (.json, .jsonl, hf://datasets/...), which become prompts"""
    model: cli.ModelName = "smollm2-135m"
    revision: cli.Revision = None
    reading: FormatConfig = field(default_factory=FormatConfig)
    share: Share = 0.5
    """Fraction of the parameters to keep, embeddings included"""
    windows: Count = 128
    """Number of windows of the text for calibration"""
    held_out: Count = 32
    """Number of other windows for the perplexity"""
    seq: AtLeastTwo = 256
    """Number of tokens of a window"""
    batch_size: Count = SMALL_BATCH_SIZE
    """Number of windows per batch"""
    seed: int = 0
    """Seed of the choice of windows"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the weights of both models"""
    out: cli.Out = None

    def __post_init__(self) -> None:
        if not self.text:
            raise InputError("text must be one or more .txt files or files of training records, got none")
        check_ranges(self)
        check_seed("seed", self.seed)


def prune_checkpoint(config: PruneOptions) -> None:
    """Prune the model and measure its perplexity before and after, unless the run folder has the results."""
    from rora_theory.lab.finetune.held_out import perplexity
    from rora_theory.lab.llama import count_parameters, load, locate, pruning
    from rora_theory.lab.llama.saving import save_model

    texts = text_windows.read_texts(config.text, config.reading)
    origin = locate(config.model, config.revision)
    # Settings that do not affect the result are not part of the identity.
    identity = asdict(config) | origin.identity() | {"text": digests.of_json(texts)}
    for name in ("out", "batch_size", "revision", "reading"):
        del identity[name]
    check_free(path_of(NAME, identity, config.out))
    model = load(origin, config.dtype)
    cli.print_notes(origin.terms)
    # Sizes of the pruned model, and windows of text for calibration and evaluation.
    shape = pruning.plan_shape(model.config, config.share)
    longest = model.config.max_position_embeddings
    if config.seq > longest:
        raise InputError(f"seq must be at most {longest}, the model's max_position_embeddings, got {config.seq}")
    sizes = {"seq": config.seq, "windows": config.windows, "held_out": config.held_out}
    windows, held_out = text_windows.sample_windows(texts, model.tokenizer, **sizes, seed=config.seed)
    extra = {"units": pruning.UNITS}
    folder = RunFolder.open(NAME, identity, out=config.out, seed=config.seed, extra=extra, models=[origin])
    # A finished run has the model and the table; anything less is computed again.
    if not (folder.has_files(MODEL) and (folder.path / "results.csv").is_file()):
        folder.clear(MODEL)
        pruned, layers = pruning.prune_model(model, batches(windows, config.batch_size), shape)
        # Size and perplexity of both models.
        models = [(measured_model.params, measured_model.config) for measured_model in (model, pruned)]
        counts = [count_parameters(model_config) for _, model_config in models]
        measured = {
            f"perplexity_{name}": [
                perplexity(params, model_config, text, batch_size=config.batch_size) for params, model_config in models
            ]
            for name, text in (("held_out", held_out), ("calibration", windows))
        }
        folder.write_frame(layers)
        folder.update(shape=shape._asdict(), parameters=counts, share=counts[1] / counts[0], **measured)
        save_model(folder.path / MODEL, pruned)
        folder.record_files(MODEL)
    # Key figures, from the manifest, so that a repeated command reports them too.
    figures = [KeyFigure("share of the parameters", float(folder.entry("share")))]
    for name, value in zip(("original", "pruned"), folder.entry("perplexity_held_out"), strict=True):
        figures.append(KeyFigure("perplexity of held-out text", float(value), scope={"model": name}))
    with summarised(folder, figures):
        report(folder, model.config, shape)
    folder.finish()
    answers.print_files(folder.path)


def batches(windows: "np.ndarray", size: int) -> "Iterator[np.ndarray]":
    """Yield batches of the windows under a progress bar."""
    with progress_bar("calibrating", len(windows)) as bar:
        for start in range(0, len(windows), size):
            yield windows[start : start + size]
            bar.advance(len(windows[start : start + size]))


def report(folder: RunFolder, config: Any, shape: "PrunedShape") -> None:
    """Print the sizes and the perplexities before and after."""
    before, after = map(float, folder.entry("perplexity_held_out"))
    answers.print_answer(
        f"The pruned model has {folder.entry('share'):.1%} of the parameters. Its perplexity on held-out text is "
        f"{after:.4g}, that of the original model {before:.4g}."
    )
    # Sizes and perplexities of both models, side by side.
    cells = [
        ("layers", config.num_hidden_layers, shape.layers),
        ("key/value heads", config.num_key_value_heads, shape.kv_heads),
        ("feed-forward width", config.intermediate_size, shape.width),
        ("parameters", *(f"{count:,}" for count in folder.entry("parameters"))),
        *(
            (f"perplexity, {words}", *(f"{float(value):.4g}" for value in folder.entry(f"perplexity_{name}")))
            for name, words in (("held_out", "held-out text"), ("calibration", "calibration text"))
        ),
    ]
    tables.print_table("Sizes and perplexities", ("", "before", "after"), cells)


main = cli.command(PruneOptions, prune_checkpoint, __doc__)

if __name__ == "__main__":
    main()
