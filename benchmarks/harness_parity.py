"""Our `harness` protocol against lm-evaluation-harness itself: text, log-likelihoods and choices, item by item.

    python benchmarks/harness_parity.py --data-dir DATA --items 200 --out parity.json

The texts of all records are compared: lm-eval's own task files make theirs, from the local records in the schema of
the hub's dataset (`lm_eval_peer` says what these lack). Of the first ``--items`` of each task both sides then score
the choices with the same weights and tokenizer in float32; 0 compares texts alone and loads no model. The choices that
differ most are scored once more in float64, which says whose rounding it is: a sum over a hundred tokens has a hundred
errors of torch's float32 log-softmax, all of one sign. Exit status 1 where a text differs, a choice although its
margin exceeds the tolerance, or a log-likelihood by more than the tolerance both from lm-eval's and from float64's.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rora_theory.data import sources, tasks
from rora_theory.errors import InputError
from rora_theory.evaluate import choices, scoring
from rora_theory.io.files import write_whole
from rora_theory.llama import Model, load
from sims.common import cli


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the benchmark."""

    model: str = "smollm2-135m"
    """model of both sides"""
    data_dir: Path = Path("commonsense")
    """folder in the LLM-Adapters schema"""
    tasks: tuple[str, ...] = tuple(tasks.TASKS)
    """tasks to compare"""
    items: int = 200
    """records of each task whose choices are scored, from the first on; texts are compared of all"""
    batch_size: int = 8
    """of lm-eval"""
    tolerance: float = 1e-3
    """largest accepted difference of a choice's log-likelihood"""
    checked: int = 4
    """choices of each task, those that differ most, that are scored in float64 too"""
    out: Path | None = None
    """JSON file for the figures"""

    def __post_init__(self) -> None:
        if self.items < 0:
            raise InputError(f"--items is {self.items}; accepted is an integer of 0 or more")


def local_gaps(records: list[tasks.TaskRecord]) -> str:
    """What the local data of a task do not have of the hub's dataset; empty where nothing is missing."""
    if records[0].task == "boolq":
        return (
            "no passages: lm-eval's template is filled with an empty one, so these are not its published task's texts"
        )
    if records[0].task == "social_i_qa":
        return "context and question in one string: divided at its first space, where the template joins them again"
    if records[0].task == "hellaswag":
        parts = [choices.hellaswag_parts(record.question) for record in records]
        count = sum(bool(fragment) for _, _, fragment in parts)
        return (
            f"contexts in one piece, without WikiHow's bracketed marks: ctx_b is the fragment after the last sentence "
            f"({count} of {len(records)} records have one)"
        )
    return ""


def compare_texts(key: str, records: list[tasks.TaskRecord]) -> dict[str, Any]:
    """How many records have another context or continuation than lm-eval's own task asks about."""
    import lm_eval_peer

    asked = [
        [(choice.context, choice.continuation) for choice in choices.harness_choices(record)] for record in records
    ]
    theirs: list[list[tuple[str, str]]] = [[] for _ in records]
    for instance in lm_eval_peer.task(key, records).instances:
        theirs[instance.doc_id].append(tuple(instance.args))
    different = [index for index, pair in enumerate(zip(asked, theirs, strict=True)) if pair[0] != pair[1]]
    row = {"texts_compared": len(records), "texts_differ": len(different), "first_that_differ": different[:5]}
    return row | {"missing_in_data": local_gaps(records)}


def compare_choices(
    config: Config, key: str, records: list[tasks.TaskRecord], model: Model, peer: Any, exact: Any
) -> dict[str, Any]:
    """One task: how far the two sides are apart, and on the worst choices how far each is from float64."""
    import lm_eval_peer

    task = tasks.get_task(key)
    asked = [choices.harness_choices(record) for record in records]
    theirs = lm_eval_peer.task(key, records)
    by_item: list[list[Any]] = [[] for _ in records]
    for instance in theirs.instances:
        by_item[instance.doc_id].append(instance)

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
    row: dict[str, Any] = {"n": n, "requests": len(gaps), "largest_difference": gaps[0][0]}
    row |= {"beyond_tolerance": beyond, "checked_in_float64": len(errors)}
    row |= {"error_ours": ours_error, "error_lm_eval": their_error}
    row |= {"disagreements": int(disagreements), "near_ties": int(near_ties)}
    row |= {"acc_ours": right[0, 0] / n, "acc_lm_eval": right[0, 1] / n}
    if task.harness_norm:
        row |= {"acc_norm_ours": right[1, 0] / n, "acc_norm_lm_eval": right[1, 1] / n}
    row["choices_passed"] = bool(not disagreements and (not beyond or ours_error <= config.tolerance))
    return row


def float64(exact: Any, scored: choices.Scored) -> float:
    """The log-likelihood of a choice by transformers in float64."""
    with torch.no_grad():
        logits = exact(torch.tensor([scored.tokens[:-1]])).logits[0, -scored.count :]
    tokens = torch.tensor(scored.tokens[-scored.count :])
    return float(torch.log_softmax(logits, dim=-1).gather(1, tokens[:, None]).sum())


def main(config: Config) -> bool:
    import lm_eval_peer

    all_records = {}
    for key in config.tasks:
        task = tasks.get_task(key)
        all_records[key] = tasks.read_task(sources.locate_task(config.data_dir, task), task)
    rows = {key: {"task": key} | compare_texts(key, records) for key, records in all_records.items()}
    for row in rows.values():
        print(json.dumps(row), flush=True)
    if config.items:
        model = load(config.model)
        peer = lm_eval_peer.harness_model(model, config.batch_size)
        exact = lm_eval_peer.torch_model(model).double()
        for key, records in all_records.items():
            rows[key] |= compare_choices(config, key, records[: config.items], model, peer, exact)
            print(json.dumps(rows[key], default=float), flush=True)
    if config.out is not None:
        figures = {"config": dataclasses.asdict(config), "tasks": list(rows.values())}
        write_whole(
            config.out,
            json.dumps(figures, indent=2, default=lambda value: str(value) if isinstance(value, Path) else float(value))
            + "\n",
        )
    return all(not row["texts_differ"] and row.get("choices_passed", True) for row in rows.values())


if __name__ == "__main__":
    cli.run(lambda: sys.exit(0 if main(cli.parse(Config, description=__doc__)) else 1))
