"""Our `harness` protocol against lm-evaluation-harness itself: text, log-likelihoods and choices, item by item.

    python benchmarks/harness_parity.py --data-dir DATA --items 200 --out parity.json

Both sides score the same records with the same weights and tokenizer in float32. The choices that differ most are
scored once more in float64, which says whose rounding it is: a sum over a hundred tokens has a hundred errors of
torch's float32 log-softmax, all of one sign. Exit status 1 where a request's text differs, a choice although its
margin exceeds the tolerance, or a log-likelihood by more than the tolerance both from lm-eval's and from float64's.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import lm_eval_peer
import numpy as np
import torch

from rora_theory.commonsense import choices, scoring, sources, tasks
from rora_theory.llama import Model, load
from sims.common import cli
from sims.common.run_folder import write_whole


@dataclasses.dataclass(frozen=True)
class Config:
    model: str = "smollm2-135m"
    """model of both sides"""
    data_dir: Path = Path("commonsense")
    """folder in the LLM-Adapters schema"""
    tasks: tuple[str, ...] = tuple(tasks.TASKS)
    """tasks to compare"""
    items: int = 200
    """records of each task, from the first on"""
    batch_size: int = 8
    """of lm-eval"""
    tolerance: float = 1e-3
    """largest accepted difference of a choice's log-likelihood"""
    checked: int = 4
    """choices of each task, those that differ most, that are scored in float64 too"""
    out: Path | None = None
    """JSON file for the figures"""


def compare(config: Config, key: str, model: Model, peer: Any, exact: Any) -> dict[str, Any]:
    """One task: how far the two sides are apart, and on the worst choices how far each is from float64."""
    task = tasks.task_named(key)
    records = tasks.read(sources.locate(config.data_dir, task), task)[: config.items]
    asked = [choices.harness_choices(record) for record in records]
    theirs = lm_eval_peer.task(key, records)
    by_item: list[list[Any]] = [[] for _ in records]
    for instance in theirs.instances:
        by_item[instance.doc_id].append(instance)
    requests = [[(choice.context, choice.continuation) for choice in item] for item in asked]
    text_equal = requests == [[tuple(one.args) for one in item] for item in by_item]

    answers = peer.loglikelihood(theirs.instances, disable_tqdm=True)
    results = {id(instance): answer for instance, answer in zip(theirs.instances, answers, strict=True)}
    samples = list(scoring.score(model.params, model.config, model.tokenizer, records, scoring.Scoring("harness")))
    samples.sort(key=lambda sample: sample.index)

    gaps: list[tuple[float, int, int]] = []
    values: dict[tuple[int, int], tuple[float, float]] = {}
    right = np.zeros((2, 2), int)
    disagreements = near_ties = 0
    for sample, item in zip(samples, by_item, strict=True):
        answered = [results[id(instance)] for instance in item]
        ours = np.array([value for _, value in sample.log_likelihoods])
        other = np.array([value for value, _ in answered])
        for choice, pair in enumerate(zip(ours, other, strict=True)):
            values[sample.index, choice] = pair
            gaps.append((abs(pair[0] - pair[1]), sample.index, choice))
        scored = theirs.process_results(item[0].doc, answered)
        right += np.array([[sample.correct, scored["acc"]], [sample.correct_norm or 0, scored.get("acc_norm", 0)]], int)
        if ours.argmax() != other.argmax():
            margin = np.diff(np.sort(other)[-2:])[0]
            disagreements += margin > 2 * config.tolerance
            near_ties += margin <= 2 * config.tolerance

    items = choices.encode_choices(model.tokenizer, asked, max_length=model.config.max_position_embeddings)
    errors = []
    gaps.sort(reverse=True)
    beyond = sum(bool(gap > config.tolerance) for gap, _, _ in gaps)
    for _, index, choice in gaps[: max(config.checked, beyond)]:
        value = float64(exact, items[index][choice])
        errors.append([abs(side - value) for side in values[index, choice]])
    ours_error, their_error = np.max(errors, axis=0)
    n = len(records)
    row = {"task": key, "n": n, "requests": len(gaps), "text_equal": text_equal, "largest_difference": gaps[0][0]}
    row |= {"beyond_tolerance": beyond, "checked_in_float64": len(errors)}
    row |= {"error_ours": ours_error, "error_lm_eval": their_error}
    row |= {"disagreements": int(disagreements), "near_ties": int(near_ties)}
    row |= {"acc_ours": right[0, 0] / n, "acc_lm_eval": right[0, 1] / n}
    if task.harness_norm:
        row |= {"acc_norm_ours": right[1, 0] / n, "acc_norm_lm_eval": right[1, 1] / n}
    row["passed"] = bool(text_equal and not disagreements and (not beyond or ours_error <= config.tolerance))
    return row


def float64(exact: Any, scored: choices.Scored) -> float:
    """The log-likelihood of a choice by transformers in float64."""
    with torch.no_grad():
        logits = exact(torch.tensor([scored.tokens[:-1]])).logits[0, -scored.count :]
    tokens = torch.tensor(scored.tokens[-scored.count :])
    return float(torch.log_softmax(logits, dim=-1).gather(1, tokens[:, None]).sum())


def main(config: Config) -> bool:
    model = load(config.model)
    peer = lm_eval_peer.harness_model(model, config.batch_size)
    exact = lm_eval_peer.torch_model(model).double()
    rows = []
    for key in config.tasks:
        rows.append(compare(config, key, model, peer, exact))
        print(json.dumps(rows[-1], default=float), flush=True)
    if config.out is not None:
        figures = {"config": dataclasses.asdict(config), "tasks": rows}
        write_whole(
            config.out,
            json.dumps(figures, indent=2, default=lambda value: str(value) if isinstance(value, Path) else float(value))
            + "\n",
        )
    return all(row["passed"] for row in rows)


if __name__ == "__main__":
    settings = cli.parse(Config, description=__doc__)
    cli.run(lambda: sys.exit(0 if main(settings) else 1))
