"""Prune a LLaMA model: fewer layers, heads and feed-forward features, by what they contribute on calibration text.

    python -m sims.prune --text DATA/ARC-Easy/train.json --share 0.5

The run folder holds `model/`, the pruned model in Hugging Face layout, and `results.csv`, a line for each layer of the
original: its influence, and what was kept of it. The criteria, and their sources, are in `rora_theory.llama.pruning`.
Perplexity before and after is that of text that was not calibrated on. Nothing is retrained.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from rora_theory.data import windows as text_windows
from rora_theory.data.records import FormatConfig
from rora_theory.errors import InputError
from rora_theory.io import digests
from rora_theory.random.seeds import check_seed
from rora_theory.runs.folder import RunFolder, check_free, path_of
from rora_theory.runs.summary import KeyFigure
from rora_theory.validation.ranges import Count, Plural, Share, check_ranges
from sims.common import answers, cli, tables
from sims.common.progress import progress_bar
from sims.common.summaries import summarised

if TYPE_CHECKING:
    import numpy as np

    from rora_theory.llama.pruning import PrunedShape

NAME, MODEL = "prune", "model"


@dataclass(frozen=True)
class Config:
    """What to prune, and how far."""

    text: tuple[str, ...]
    """calibration text: .txt files, or training records (.json, .jsonl, hf://datasets/...) as prompts"""
    model: cli.ModelName = "smollm2-135m"
    revision: cli.Revision = None
    reading: FormatConfig = field(default_factory=FormatConfig)
    share: Share = 0.5
    """parameters to keep, embeddings counted"""
    layers: Count | None = None
    """layers to keep; none is in proportion"""
    kv_heads: Count | None = None
    """key/value heads to keep, with the query heads that share them; none is in proportion"""
    width: Count | None = None
    """feed-forward features to keep; none is what the share leaves room for"""
    windows: Count = 128
    """pieces of the text to calibrate on"""
    held_out: Count = 32
    """other pieces, for the perplexity"""
    seq: Plural = 256
    """tokens of a piece"""
    batch_size: Count = 4
    """pieces worked on at once"""
    seed: int = 0
    """seed of the choice of pieces"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """type of the weights, read and written"""
    out: cli.Out = None

    def __post_init__(self) -> None:
        if not self.text:
            raise InputError("text is empty; accepted are .txt files or training records")
        check_ranges(self)
        check_seed(self.seed)


def run(config: Config) -> None:
    """Measure, prune, measure again; what an earlier part of the run finished stays."""
    from rora_theory.finetune.held_out import perplexity
    from rora_theory.llama import count_parameters, load, locate, pruning
    from rora_theory.llama.saving import save_model

    texts = text_windows.read_texts(config.text, config.reading)
    origin = locate(config.model, config.revision)
    identity = asdict(config) | origin.identity() | {"text": digests.of_json(texts)}
    for name in ("out", "batch_size", "revision", "reading"):
        del identity[name]
    check_free(path_of(NAME, identity, config.out))
    model = load(origin, config.dtype)
    cli.tell(model.remarks)
    shape = pruning.plan_shape(
        model.config, config.share, layers=config.layers, kv_heads=config.kv_heads, width=config.width
    )
    longest = model.config.max_position_embeddings
    if config.seq > longest:
        raise InputError(f"seq is {config.seq}; accepted is at most {longest}, the model's max_position_embeddings")
    sizes = {"seq": config.seq, "windows": config.windows, "held_out": config.held_out}
    windows, held_out = text_windows.sample_windows(texts, model.tokenizer, **sizes, seed=config.seed)
    extra = {"units": pruning.UNITS}
    folder = RunFolder.open(NAME, identity, out=config.out, seed=config.seed, extra=extra, models=[origin])
    if not (folder.has_files(MODEL) and folder.has_files("results.csv")):
        folder.clear(MODEL)
        pruned, kept = pruning.prune_model(model, batches(windows, config.batch_size), shape)
        models = [(one.params, one.config) for one in (model, pruned)]
        counts = [count_parameters(shape_of) for _, shape_of in models]
        measured = {
            f"perplexity_{name}": [perplexity(*one, text, batch_size=config.batch_size) for one in models]
            for name, text in (("held_out", held_out), ("calibration", windows))
        }
        folder.write_frame(kept)
        folder.update(shape=shape._asdict(), parameters=counts, share=counts[1] / counts[0], **measured)
        save_model(folder.path / MODEL, pruned)
        folder.record_files(MODEL)
    figures = [KeyFigure("share of the parameters", float(folder.entry("share")))]
    for before, value in zip(("original", "pruned"), folder.entry("perplexity_held_out"), strict=True):
        figures.append(KeyFigure("perplexity of held-out text", float(value), scope={"model": before}))
    with summarised(folder, figures):
        show(folder, model.config, shape)
    folder.finish()
    answers.tell_files(folder.path)


def batches(windows: "np.ndarray", size: int) -> "Iterator[np.ndarray]":
    """The windows, so many at a time, with a bar."""
    with progress_bar("calibrating", len(windows)) as bar:
        for start in range(0, len(windows), size):
            yield windows[start : start + size]
            bar.advance(len(windows[start : start + size]))


def show(folder: RunFolder, config: Any, shape: "PrunedShape") -> None:
    """Print what was kept, and at what price."""
    before, after = map(float, folder.entry("perplexity_held_out"))
    answers.say(
        f"{folder.entry('share'):.1%} of the parameters are kept; the perplexity of held-out text goes from "
        f"{before:.4g} to {after:.4g}."
    )
    own = (config.num_hidden_layers, config.num_key_value_heads, config.intermediate_size)
    cells = [
        ("layers", own[0], shape.layers),
        ("key/value heads", own[1], shape.kv_heads),
        ("feed-forward width", own[2], shape.width),
        ("parameters", *(f"{count:,}" for count in folder.entry("parameters"))),
        *(
            (f"perplexity, {words}", *(f"{float(value):.4g}" for value in folder.entry(f"perplexity_{name}")))
            for name, words in (("held_out", "held-out text"), ("calibration", "calibration text"))
        ),
    ]
    tables.print_table("What was kept", ("", "before", "after"), cells)


main = cli.command(Config, run, __doc__)

if __name__ == "__main__":
    main()
