"""Prune a LLaMA model: fewer layers, heads and feed-forward features, by what they contribute on calibration text.

    python -m sims.prune --text DATA/ARC-Easy/train.json --share 0.5

The run folder holds `model/`, the pruned model in Hugging Face layout, and `results.csv`, a line for each layer of the
original: its influence, and what was kept of it. The criteria, and their sources, are in `rora_theory.llama.pruning`.
Perplexity before and after is that of text that was not calibrated on. Nothing is retrained.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rora_theory import digests, files
from rora_theory.data.prompts import training_text
from rora_theory.errors import InputError
from rora_theory.finetune import read_records
from rora_theory.finetune.loss import cross_entropy
from rora_theory.llama.pruning import Kept, Scores, Shape, Statistics
from rora_theory.llama.tokenizer import Tokenizer
from rora_theory.seeds import check_seed
from sims.common import cli, tables
from sims.common.progress import progress_bar
from sims.common.run_folder import RunFolder

NAME, MODEL = "prune", "model"
COLUMNS = ("layer", "influence", "kept", "heads", "heads_kept_score", "features_kept_score")
UNITS = {
    "influence": "mean over tokens of 1 - cosine between the residual stream before and after the layer",
    "heads": "indices of the key/value heads kept",
    "heads_kept_score": "share of the layer's squared score in the heads kept",
    "features_kept_score": "share of the layer's squared score in the feed-forward features kept",
}


@dataclass(frozen=True)
class Config:
    """What to prune, and how far."""

    text: tuple[str, ...]
    """calibration text: .txt files, or training records (.json, .jsonl, hf://datasets/...) as prompts"""
    model: str = "smollm2-135m"
    """a folder in Hugging Face layout, a .gguf file, a hub id or a built-in name"""
    revision: str | None = None
    """branch, tag or commit of a model on the hub"""
    share: float = 0.5
    """parameters to keep, embeddings counted"""
    layers: int | None = None
    """layers to keep; none is in proportion"""
    kv_heads: int | None = None
    """key/value heads to keep, with the query heads that share them; none is in proportion"""
    width: int | None = None
    """feed-forward features to keep; none is what the share leaves room for"""
    windows: int = 128
    """pieces of the text to calibrate on"""
    held_out: int = 32
    """other pieces, for the perplexity"""
    seq: int = 256
    """tokens of a piece"""
    batch_size: int = 4
    """pieces worked on at once"""
    seed: int = 0
    """seed of the choice of pieces"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """type of the weights, read and written"""
    out: Path | None = None
    """run folder; none is results/prune/RUN_ID"""


def check(config: Config) -> None:
    """Raise `InputError` where a setting is out of range. What depends on the model is checked when there is one."""
    if not config.text:
        raise InputError("text is empty; accepted are .txt files or training records")
    cli.check_integers(config, windows=1, held_out=1, seq=2, batch_size=1, layers=1, kv_heads=1, width=1)
    if not 0 < config.share <= 1:
        raise InputError(f"--share is {config.share}; accepted is a number above 0, at most 1")
    check_seed(config.seed)


def read_texts(sources: Sequence[str]) -> list[str]:
    """The documents of several files.

    Raises:
      InputError: a file that is missing, unreadable or empty.
    """
    found = []
    for source in sources:
        if not source.endswith(".txt"):
            found += [training_text(r.instruction, r.output, "train", input=r.input) for r in read_records([source])]
            continue
        text = files.read_text(source)
        if not text.strip():
            raise InputError(f"{source}: is empty; accepted is a text file")
        found.append(text)
    return found


def cut(texts: Sequence[str], tokenizer: Tokenizer, config: Config) -> tuple[np.ndarray, np.ndarray]:
    """Windows to calibrate on and windows held out, [count, seq] each, chosen at random without overlap.

    Documents follow one another with the end token between them.

    Raises:
      InputError: too little text.
    """
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    tokens = [token for ids in tokenizer.encode_batch(list(texts)) for token in (*ids, *end)]
    count, wanted = len(tokens) // config.seq, config.windows + config.held_out
    if count < wanted:
        raise InputError(
            f"text has {len(tokens):,} tokens, {count} windows of {config.seq}; accepted is enough for {wanted}, "
            "--windows and --held-out together"
        )
    windows = np.asarray(tokens[: count * config.seq], np.int32).reshape(count, config.seq)
    order = np.random.default_rng(config.seed).permutation(count)[:wanted]
    return windows[order[: config.windows]], windows[order[config.windows :]]


def calibrate(model: Any, windows: np.ndarray, batch: int) -> Statistics:
    """The statistics of all windows, summed in float64."""
    from rora_theory.llama import pruning

    total: Statistics | None = None
    with progress_bar("calibrating", len(windows)) as bar:
        for rows in np.split(windows, range(batch, len(windows), batch)):
            sums = [np.asarray(one, np.float64) for one in pruning.measure(model.params, rows, model.config)]
            total = Statistics(*(sums if total is None else (a + b for a, b in zip(total, sums, strict=True))))
            bar.advance(len(rows))
    assert total is not None
    return total


def perplexity(params: Any, config: Any, windows: np.ndarray, batch: int) -> float:
    """exp of the mean next-token loss over all windows."""
    import jax

    from rora_theory import llama

    @jax.jit
    def loss(params: Any, rows: jax.Array) -> jax.Array:
        hidden = llama.hidden_states(params, rows[:, :-1], config)
        head = params["embed_tokens"] if config.tie_word_embeddings else params["lm_head"]
        return cross_entropy(hidden, head, rows[:, 1:], jax.numpy.ones(rows[:, 1:].shape, jax.numpy.float32))

    parts = np.split(windows, range(batch, len(windows), batch))
    mean = math.fsum(float(loss(params, rows)) for rows in parts) / (windows.shape[0] * (windows.shape[1] - 1))
    return math.exp(mean) if mean < 700 else math.inf


def rows_of(scores: Scores, kept: Kept) -> list[dict[str, Any]]:
    """A line for each layer of the original."""
    rows = []
    for layer, influence in enumerate(scores.layers.tolist()):
        row: dict[str, Any] = {"layer": layer, "influence": influence, "kept": layer in kept.layers}
        if row["kept"]:
            at = kept.layers.tolist().index(layer)
            row["heads"] = " ".join(map(str, kept.heads[at].tolist()))
            for name, values, chosen in (
                ("heads_kept_score", scores.heads[layer], kept.heads[at]),
                ("features_kept_score", scores.features[layer], kept.features[at]),
            ):
                total = float(np.sum(values**2))
                row[name] = float(np.sum(values[chosen] ** 2)) / total if total else 1.0
        rows.append(row)
    return rows


def main() -> None:
    """Run the command."""
    from rora_theory.llama import count_parameters, load, pruning
    from rora_theory.llama.saving import save_model

    config = cli.parse(Config, description=(__doc__ or "").split("\n", 1)[0])
    check(config)
    texts = read_texts(config.text)
    model = load(config.model, config.dtype, config.revision)
    cli.tell(model.remarks)
    shape = pruning.plan(model.config, config.share, layers=config.layers, kv_heads=config.kv_heads, width=config.width)
    longest = model.config.max_position_embeddings
    if config.seq > longest:
        raise InputError(f"seq is {config.seq}; accepted is at most {longest}, the model's max_position_embeddings")
    windows, held_out = cut(texts, model.tokenizer, config)
    identity = asdict(config) | model.origin.identity() | {"text": digests.of_json(texts)}
    for name in ("out", "batch_size", "revision"):
        del identity[name]
    folder = RunFolder.open(NAME, identity, out=config.out, seed=config.seed, extra={"units": UNITS})
    if not (folder.holds(MODEL) and folder.holds("results.csv")):
        folder.clear(MODEL)
        statistics = calibrate(model, windows, config.batch_size)
        scores = pruning.score(model.params, statistics, model.config)
        kept = pruning.choose(scores, shape)
        params, pruned = pruning.prune(model.params, model.config, kept)
        counts = [count_parameters(one) for one in (model.config, pruned)]
        models = ((model.params, model.config), (params, pruned))
        measured = {
            f"perplexity_{name}": [perplexity(*one, text, config.batch_size) for one in models]
            for name, text in (("held_out", held_out), ("calibration", windows))
        }
        folder.write_rows(COLUMNS, rows_of(scores, kept))
        folder.update(shape=shape._asdict(), parameters=counts, share=counts[1] / counts[0], **measured)
        save_model(folder.path / MODEL, replace(model, params=params, config=pruned))
        folder.record(MODEL)
    folder.finish()
    show(folder, model.config, shape)
    print(f"{folder.path}: model/, results.csv, manifest.json")


def show(folder: RunFolder, config: Any, shape: Shape) -> None:
    """Print what was kept."""
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
    tables.print_table(f"{folder.entry('share'):.1%} of the parameters kept", ("", "before", "after"), cells)


if __name__ == "__main__":
    cli.run(main)
