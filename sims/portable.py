"""Rewrite an adapter so that every client applies it with the scaling that it was trained with.

    python -m sims.portable results/finetune/RUN/adapter --out served

The adapter may belong to any model and come from any trainer that writes PEFT's format. The result is LoRA with one
rank, one alpha and `use_rslora` false; docs/serving.md lists the clients that need this. A DoRA adapter cannot be
written this way: pass `--model` to merge it and write the whole model in Hugging Face layout.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from rora_theory.errors import InputError
from sims.common import answers, cli


@dataclass(frozen=True)
class PortableOptions:
    adapter: Annotated[Path, tyro.conf.Positional]
    """Folder of an adapter in PEFT's format"""
    out: Path
    """New or empty folder for the result"""
    model: str | None = None
    """Model to merge the adapter into: a folder, a .gguf file, a hub id or a built-in name; by default, not merged"""
    revision: cli.Revision = None


def rewrite_adapter(config: PortableOptions) -> None:
    """Write the adapter, or the model that it is merged into.

    Raises:
      InputError: If the adapter or the model cannot be used; nothing is written then.
    """
    from rora_theory.lab import adapters

    if config.out.exists() and (not config.out.is_dir() or any(config.out.iterdir())):
        raise InputError(f"out must be a new or empty folder, got {config.out}")
    # With a model, merge the adapter into its weights.
    if config.model is not None:
        from rora_theory.lab import llama

        model = llama.load(config.model, revision=config.revision)
        adapters.save_merged(config.out, adapters.load_adapter(config.adapter, model), model)
        answers.print_answer("The adapter was merged into the model.")
        answers.print_files(config.out)
        return
    # Without one, rewrite the adapter's own files.
    if config.revision is not None:
        raise InputError("revision has no effect without --model. Set both, or neither.")
    adapters.rewrite_portable(config.adapter, config.out)
    answers.print_answer(
        "The adapter was rewritten with one rank, one alpha, no use_rslora and the same scaling for every client."
    )
    answers.print_files(config.out)


main = cli.command(PortableOptions, rewrite_adapter, __doc__)

if __name__ == "__main__":
    main()
