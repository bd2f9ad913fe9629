"""Rewrite an adapter so that every client serves it at the scale it was trained at.

    python -m sims.portable results/finetune/RUN/adapter --out served

The adapter may be of any model and from any trainer that writes PEFT's format. Written is LoRA with one rank, one alpha
and `use_rslora` false; docs/serving.md says which clients need that. A DoRA adapter has no such form: with `--model`
it is merged, and a whole model in Hugging Face layout is written.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from rora_theory.errors import InputError
from sims.common import answers, cli


@dataclass(frozen=True)
class Config:
    """What to rewrite, and where to."""

    adapter: Annotated[Path, tyro.conf.Positional]
    """an adapter's folder as PEFT writes it"""
    out: Path
    """a new or empty folder"""
    model: str | None = None
    """merge into this model, and write that: a folder, a .gguf file, a hub id or a built-in name"""
    revision: cli.Revision = None


def run(config: Config) -> None:
    """Write the adapter, or the model it was merged into. Raises `InputError` before anything is written."""
    from rora_theory import adapters

    if config.out.exists() and (not config.out.is_dir() or any(config.out.iterdir())):
        raise InputError(f"{config.out}: is not empty; accepted is a new or empty folder")
    if config.model is not None:
        from rora_theory import llama

        model = llama.load(config.model, revision=config.revision)
        adapters.save_merged(config.out, adapters.load_peft(config.adapter, model.config, model.params), model)
        answers.say("The adapter is merged into the model.")
        answers.tell_files(config.out)
        return
    if config.revision is not None:
        raise InputError("revision is given without model; accepted is both")
    adapters.rewrite_portable(config.adapter, config.out)
    answers.say(
        "What was written has one rank, one alpha and no use_rslora, at the same gamma: every client serves it alike."
    )
    answers.tell_files(config.out)


main = cli.command(Config, run, __doc__)

if __name__ == "__main__":
    main()
