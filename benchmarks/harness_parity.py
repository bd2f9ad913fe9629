"""Compare the protocol `harness` with lm-evaluation-harness item by item: texts, log-likelihoods and choices.

    python benchmarks/harness_parity.py --data-dir DATA --items 200 --out parity.json

The texts of all records are compared. lm-eval's own task files render its texts, from the local records in the schema
of the hub's dataset (`lm_eval_peer` states what these lack). Then both sides score the choices of the first ``--items``
records of each task with the same weights and tokenizer in float32; 0 compares texts only and loads no model. The
choices that differ most are scored again in float64, which shows on which side the rounding is: a sum over a hundred
tokens contains a hundred errors of torch's float32 log-softmax, all of one sign.

The exit status is 1 if a text differs, if a choice differs although its margin exceeds the tolerance, or if a
log-likelihood differs by more than the tolerance from both lm-eval's and the one in float64.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hardware import silence_transformers

from rora_theory.defaults import SCORE_BATCH_SIZE
from rora_theory.errors import InputError
from rora_theory.lab.data import sources, tasks
from rora_theory.lab.evaluate import choices, scoring
from rora_theory.lab.llama import Model, load
from rora_theory.runs.files import write_whole
from sims.common import cli


@dataclasses.dataclass(frozen=True)
class HarnessParityOptions:
    model: str = "smollm2-135m"
    """Model of both sides"""
    data_dir: Path = Path("commonsense")
    """Folder of the tasks in the LLM-Adapters schema"""
    tasks: tuple[str, ...] = tuple(tasks.TASKS)
    """Tasks to compare"""
    items: int = 200
    """Number of records of each task whose choices are scored; the texts of all are compared"""
    batch_size: int = SCORE_BATCH_SIZE
    """Batch size of lm-eval"""
    tolerance: float = 1e-3
    """Largest accepted difference of a choice's log-likelihood"""
    checked: int = 4
    """Number of choices of each task, those that differ most, that are scored in float64 too"""
    out: Path | None = None
    """JSON file for the results"""

    def __post_init__(self) -> None:
        if self.items < 0:
            raise InputError(f"--items must be an integer of at least 0, got {self.items}")


def describe_gaps(records: list[tasks.TaskRecord]) -> str:
    """Describe what the local data of a task lack of the hub's dataset; return an empty string if they lack nothing."""
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
    """Count the records whose context or continuation differs from that of lm-eval's own task."""
    import lm_eval_peer

    our_texts = [
        [(choice.context, choice.continuation) for choice in choices.harness_choices(record)] for record in records
    ]
    # lm-eval lists the choices of all items; collect them by item.
    peer_texts: list[list[tuple[str, str]]] = [[] for _ in records]
    for instance in lm_eval_peer.task(key, records).instances:
        peer_texts[instance.doc_id].append(tuple(instance.args))
    pairs = zip(our_texts, peer_texts, strict=True)
    different = [index for index, (ours, theirs) in enumerate(pairs) if ours != theirs]
    row = {"texts_compared": len(records), "texts_differ": len(different), "first_that_differ": different[:5]}
    return row | {"missing_in_data": describe_gaps(records)}


def compare_choices(
    config: HarnessParityOptions, key: str, records: list[tasks.TaskRecord], model: Model, peer: Any, exact: Any
) -> dict[str, Any]:
    """Compare the log-likelihoods and choices of one task, and check the largest differences in float64.

    Args:
      config: Settings of the benchmark.
      key: Name of the task.
      records: Records to score.
      model: Model of this side.
      peer: lm-eval's model class with the same weights.
      exact: Model of transformers with the same weights in float64.

    Returns:
      Row of the task: largest differences and errors, numbers of disagreements, and the accuracies of both sides.
    """
    import lm_eval_peer

    task = tasks.get_task(key)
    # lm-eval's requests, by item, and its answers.
    peer_task = lm_eval_peer.task(key, records)
    by_item: list[list[Any]] = [[] for _ in records]
    for instance in peer_task.instances:
        by_item[instance.doc_id].append(instance)
    answers = peer.loglikelihood(peer_task.instances, disable_tqdm=True)
    results = {id(instance): answer for instance, answer in zip(peer_task.instances, answers, strict=True)}
    # This side's scores, in the order of the records.
    samples = list(scoring.score(model.params, model.config, model.tokenizer, records, scoring.Scoring("harness")))
    samples.sort(key=lambda sample: sample.index)

    # Compare item by item. ``correct`` counts right answers: rows are acc and acc_norm, columns this side and lm-eval.
    gaps: list[tuple[float, int, int]] = []
    values: dict[tuple[int, int], tuple[float, float]] = {}
    correct = np.zeros((2, 2), int)
    disagreements = near_ties = 0
    for sample, instances in zip(samples, by_item, strict=True):
        item_answers = [results[id(instance)] for instance in instances]
        ours = np.array([value for _, value in sample.log_likelihoods])
        theirs = np.array([value for value, _ in item_answers])
        for choice, pair in enumerate(zip(ours, theirs, strict=True)):
            values[sample.index, choice] = pair
            gaps.append((abs(pair[0] - pair[1]), sample.index, choice))
        scores = peer_task.process_results(instances[0].doc, item_answers)
        correct += np.array(
            [[sample.correct, scores["acc"]], [sample.correct_norm or 0, scores.get("acc_norm", 0)]], int
        )
        # Two choices within the rounding of both sides may be ordered either way.
        if ours.argmax() != theirs.argmax():
            margin = np.diff(np.sort(theirs)[-2:])[0]
            disagreements += margin > 2 * config.tolerance
            near_ties += margin <= 2 * config.tolerance

    # Errors of both sides against float64: all choices beyond the tolerance, and at least the worst ones.
    item_choices = [choices.harness_choices(record) for record in records]
    items = choices.encode_choices(model.tokenizer, item_choices, max_length=model.config.max_position_embeddings)
    errors = []
    gaps.sort(reverse=True)
    beyond = sum(bool(gap > config.tolerance) for gap, _, _ in gaps)
    for _, index, choice in gaps[: max(config.checked, beyond)]:
        value = exact_log_likelihood(exact, items[index][choice])
        errors.append([abs(side - value) for side in values[index, choice]])
    ours_error, their_error = np.max(errors, axis=0)
    n = len(records)
    row: dict[str, Any] = {"n": n, "requests": len(gaps), "largest_difference": gaps[0][0]}
    row |= {"beyond_tolerance": beyond, "checked_in_float64": len(errors)}
    row |= {"error_ours": ours_error, "error_lm_eval": their_error}
    row |= {"disagreements": int(disagreements), "near_ties": int(near_ties)}
    row |= {"acc_ours": correct[0, 0] / n, "acc_lm_eval": correct[0, 1] / n}
    if task.harness_norm:
        row |= {"acc_norm_ours": correct[1, 0] / n, "acc_norm_lm_eval": correct[1, 1] / n}
    row["choices_passed"] = bool(not disagreements and (not beyond or ours_error <= config.tolerance))
    return row


def exact_log_likelihood(exact: Any, scored: choices.EncodedChoice) -> float:
    """Return the log-likelihood of a choice by a model of transformers in float64."""
    with torch.no_grad():
        logits = exact(torch.tensor([scored.tokens[:-1]])).logits[0, -scored.count :]
    tokens = torch.tensor(scored.tokens[-scored.count :])
    return float(torch.log_softmax(logits, dim=-1).gather(1, tokens[:, None]).sum())


def main(config: HarnessParityOptions) -> bool:
    """Compare all tasks, print and write their rows, and return whether every comparison passed."""
    silence_transformers()
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
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(config).items()}
        comparison = {"config": settings, "tasks": list(rows.values())}
        write_whole(config.out, json.dumps(comparison, indent=2, default=float) + "\n")
    return all(not row["texts_differ"] and row.get("choices_passed", True) for row in rows.values())


if __name__ == "__main__":
    cli.run_command(lambda: sys.exit(0 if main(cli.parse(HarnessParityOptions, description=__doc__)) else 1))
