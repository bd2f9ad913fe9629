"""Pretrain a small LLaMA model on text, from random weights and with a vocabulary of its own.

    python -m sims.pretrain --data prose.txt --steps 8000
    python -m sims.pretrain --data prose.txt --layers 6 --hidden-size 192 --intermediate-size 512 --heads 6

The run folder contains `model/` in Hugging Face layout, which every command with `--model` and transformers load,
`metrics.jsonl` and `results.csv` (the losses), and `checkpoints/`. The same command resumes an interrupted run from its
last checkpoint, with the same numbers. The manifest has the SHA-256 of the text. Documents are separated by an end
token and cut into windows of `--context` tokens.
"""

from contextlib import closing
from dataclasses import asdict, dataclass, field

from rora_theory.errors import InputError
from rora_theory.lab import llama, pretrain
from rora_theory.lab.data import windows
from rora_theory.lab.data.records import FormatConfig
from rora_theory.lab.finetune import run_report
from rora_theory.lab.finetune.checkpoints import silence_checkpoint_logs
from rora_theory.lab.llama.saving import tokenizer_files
from rora_theory.lab.llama.weights import save_hf
from rora_theory.lab.pretrain import ModelShape, PretrainSettings
from rora_theory.runs import devices, digests
from rora_theory.runs.folder import RunFolder, check_free, path_of
from rora_theory.runs.summary import KeyFigure
from sims.common import answers, cli
from sims.common.summaries import summarised
from sims.finetune import train

NAME, MODEL = "pretrain", "model"


@dataclass(frozen=True)
class PretrainOptions:
    """Options of the pretraining."""

    data: tuple[str, ...]
    """Text: .txt files, each one document, or records (.json, .jsonl, .csv, .parquet), each one document"""
    reading: FormatConfig = field(default_factory=FormatConfig)
    shape: ModelShape = field(default_factory=ModelShape)
    settings: PretrainSettings = field(default_factory=PretrainSettings)
    out: cli.Out = None

    def __post_init__(self) -> None:
        if not self.data:
            raise InputError("data must be one or more files of text, got none")


def pretrain_model(config: PretrainOptions) -> None:
    """Train the tokenizer and the model, and write the model."""
    silence_checkpoint_logs()
    texts = windows.read_texts(config.data, config.reading)
    # How often the run is evaluated and saved changes no number of it.
    identity = asdict(config.shape) | asdict(config.settings) | {"text_sha256": digests.of_json(texts)}
    for name in ("evaluate_every", "checkpoint_every"):
        del identity[name]
    path = path_of(NAME, identity, config.out)
    check_free(path)
    tokenizer = pretrain.train_tokenizer(texts, config.shape.vocabulary)
    data = pretrain.prepare_windows(texts, tokenizer, config.shape, config.settings)
    llama_config = config.shape.llama_config(tokenizer)
    parameters = llama.count_parameters(llama_config)
    extra = {"device": devices.describe_devices(devices.pick(1)), "parameters": parameters}
    folder = RunFolder.open(NAME, identity, out=path, seed=config.settings.seed, extra=extra)
    folder.update(data=data.summary)
    tokens, epochs = data.summary["tokens"], data.summary["epochs"]
    print(f"{parameters:,} weights, {tokens:,} tokens of text, {epochs:.2g} epochs")
    checkpoints = folder.path / "checkpoints"
    with closing(pretrain.start_pretraining(data, tokenizer, config.shape, config.settings, checkpoints)) as trainer:
        events = train(trainer, folder)
        params = trainer.adapter("last").params
    if not folder.has_files(MODEL):
        folder.clear(MODEL)
        save_hf(folder.path / MODEL, params, llama_config, files=tokenizer_files(tokenizer, llama_config))
        folder.record_files(MODEL)
    rows = run_report.summary_rows(events, parameters)
    figures = [KeyFigure(row["what"], row["value"], scope={"step": row["step"]}) for row in rows]
    figures.append(KeyFigure("loss of the tokens' frequencies", data.summary["unigram_loss"]))
    with summarised(folder, figures):
        loss = next(event["loss"] for event in reversed(events) if event["event"] == "validation")
        answers.print_answer(
            f"The held-out loss is {loss:.4f} nats per token; that of the tokens' frequencies alone is "
            f"{data.summary['unigram_loss']:.4f}."
        )
    folder.finish()
    answers.print_files(folder.path)


main = cli.command(PretrainOptions, pretrain_model, __doc__)

if __name__ == "__main__":
    main()
