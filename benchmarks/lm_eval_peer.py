"""Run lm-evaluation-harness's own tasks on local records, with its own model class.

The hub may be out of reach, so each task is lm-eval's own YAML with one change: its dataset consists of the local
records in the schema of the hub's dataset. Its functions and templates render the text. lm-eval lacks what the local
data lack: BoolQ's passage is empty. HellaSwag's contexts are stored in one piece and without WikiHow's bracketed marks,
so this package divides them into ``ctx_a`` and ``ctx_b`` (`choices.hellaswag_parts`).
"""

import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HOME", tempfile.mkdtemp(prefix="lm-eval-"))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import datasets
import lm_eval.tasks
import numpy as np
import torch
import transformers
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks._yaml_loader import load_yaml

from rora_theory.lab.data.tasks import TaskRecord
from rora_theory.lab.evaluate.choices import hellaswag_parts
from rora_theory.lab.llama import Model

TASK_FILES = {
    "boolq": "super_glue/boolq/default.yaml",
    "piqa": "piqa/piqa.yaml",
    "social_i_qa": "siqa/siqa.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "winogrande": "winogrande/default.yaml",
    "ARC-Easy": "arc/arc_easy.yaml",
    "ARC-Challenge": "arc/arc_challenge.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
}


def hub_document(record: TaskRecord) -> dict[str, Any]:
    """Return a record in the schema of the dataset that lm-eval reads for its task."""
    question, choices, gold = record.question, list(record.choices), record.gold
    letters = [chr(ord("A") + number) for number in range(len(choices))]
    match record.task:
        case "boolq":
            label = int(record.answer == "true")
            return {"question": question.removesuffix("?"), "passage": "", "label": label}
        case "piqa":
            return {"goal": question, "sol1": choices[0], "sol2": choices[1], "label": gold}
        case "social_i_qa":
            context, _, rest = question.partition(" ")  # the task joins both with a space again
            answers = {f"answer{letter}": text for letter, text in zip(letters, choices, strict=True)}
            return {"context": context, "question": rest, **answers, "label": str(gold + 1)}
        case "hellaswag":
            parts = dict(zip(("activity_label", "ctx_a", "ctx_b"), hellaswag_parts(question), strict=True))
            return {**parts, "endings": choices, "label": str(gold)}
        case "winogrande":
            options = {"option1": choices[0], "option2": choices[1]}
            return {"sentence": question, **options, "answer": str(gold + 1)}
        case "openbookqa":
            listed = {"text": choices, "label": letters}
            return {"question_stem": question, "choices": listed, "answerKey": letters[gold]}
        case _:
            listed = {"text": choices, "label": letters}
            return {"question": question, "choices": listed, "answerKey": letters[gold]}


def task(key: str, records: list[TaskRecord]) -> ConfigurableTask:
    """Return lm-eval's task over records, with its requests.

    Args:
      key: Name of the task, a key of `TASK_FILES`.
      records: Records of the task.
    """
    path = Path(lm_eval.tasks.__file__).parent / TASK_FILES[key]
    config = load_yaml(path)
    split = config.get("test_split") or config["validation_split"]
    # Replace the hub's dataset by the records, as the only split.
    rows = datasets.Dataset.from_list([hub_document(record) for record in records])
    config |= {"custom_dataset": lambda **_: datasets.DatasetDict({split: rows}), "metadata": {}}
    config |= {"training_split": None, "validation_split": split, "test_split": None}
    config.pop("tag", None)
    configured = ConfigurableTask(config=config)
    configured.build_all_requests()
    return configured


def torch_model(model: Model) -> transformers.LlamaForCausalLM:
    """Return transformers' model with the same weights in float32."""
    config = transformers.LlamaConfig(**model.config.to_hf())
    with torch.device("meta"):
        peer = transformers.LlamaForCausalLM(config)
    # Weights by transformers' names; the stacked arrays of the layers are split.
    state = {
        "model.embed_tokens.weight": model.params["embed_tokens"],
        "model.norm.weight": model.params["norm"],
    }
    if not model.config.tie_word_embeddings:
        state["lm_head.weight"] = model.params["lm_head"]
    for name, value in model.params["layers"].items():
        tensors = value.items() if isinstance(value, dict) else [("weight", value)]
        for kind, stack in tensors:
            for layer in range(model.config.num_hidden_layers):
                state[f"model.layers.{layer}.{name}.{kind}"] = stack[layer]
    tensors = {name: torch.from_numpy(np.array(value, np.float32)) for name, value in state.items()}
    peer.to_empty(device="cpu")
    peer.load_state_dict(tensors, strict=not model.config.tie_word_embeddings)
    peer.tie_weights()
    # The rotary embedding is not among the weights, so it is undefined after to_empty: build it anew.
    peer.model.rotary_emb = type(peer.model.rotary_emb)(config)
    return peer.eval()


def harness_model(model: Model, batch_size: int) -> HFLM:
    """Return lm-eval's model class with the same weights and tokenizer; weights and softmax are float32."""
    return HFLM(
        pretrained=torch_model(model),
        tokenizer=model.tokenizer.backend,
        batch_size=batch_size,
        device="cpu",
        softmax_dtype="float32",
    )
