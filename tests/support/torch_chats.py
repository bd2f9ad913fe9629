"""A tokenizer of letters with a chat template, for tiny models of `torch_models`.

A test file that imports this module is skipped without the extra torch.
"""

from typing import Any

import pytest

tokenizers = pytest.importorskip("tokenizers", reason="the extra finetune")
transformers = pytest.importorskip("transformers", reason="the bridge: the extra torch")

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MARKS = ("<system>", "<user>", "<assistant>")


def tokenizer(pad: str | None) -> Any:
    """Return a tokenizer with one token for each letter, x for unknown ones.

    Args:
      pad: Padding token: ``"</s>"`` is the end token, ``"~"`` one of its own; None is none.
    """
    vocabulary = {letter: i for i, letter in enumerate(["~", "</s>", *MARKS, "\n", *"abcdefhij wordsx?"])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="x"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    wrapped.add_special_tokens({"additional_special_tokens": list(MARKS)} | ({"pad_token": pad} if pad else {}))
    wrapped.chat_template = TEMPLATE
    return wrapped
