"""Our `harness` protocol against lm-evaluation-harness itself: text, log-likelihoods and choices, item by
item.

    python benchmarks/harness_parity.py --data-dir DATA --items 200 --out parity.json

Both sides score the same records with the same weights and tokenizer in float32. Exit status 1 where a
request's text differs, a log-likelihood by more than the tolerance, or a choice although its margin exceeds
the tolerance.
"""

import dataclasses
import json
import sys
import time
from pathlib import Path

import lm_eval_peer
import numpy as np

from rora_theory.commonsense import choices, scoring, sources, tasks
from rora_theory.llama import load
from sims.common import cli
from sims.common.run_folder import write_whole


@dataclasses.dataclass(frozen=True)
class Config:
    model: str = "smollm2-135m"
    """Model for both sides."""
    data_dir: Path = Path("commonsense")
    """Folder in the LLM-Adapters schema."""
    tasks: tuple[str, ...] = tuple(tasks.TASKS)
    """Tasks to compare."""
    items: int = 200
    """Records of each task, from the first on."""
    batch_size: int = 8
    """Of lm-eval."""
    tolerance: float = 1e-3
    """Largest accepted difference of a choice's log-likelihood."""
    out: Path | None = None
    """JSON file for the figures."""


def main(config: Config) -> bool:
    model = load(config.model)
    peer = lm_eval_peer.harness_model(model, config.batch_size)
    rows = []
    for key in config.tasks:
        task = tasks.task_named(key)
        records = tasks.read(sources.locate(config.data_dir, task), task)[: config.items]
        rows.append(compare(key, records, model, peer, config.tolerance))
        print(json.dumps(rows[-1]), flush=True)
    if config.out is not None:
        write_whole(
            config.out,
            json.dumps({"config": dataclasses.asdict(config), "tasks": rows}, indent=2, default=str),
        )
    return all(
        row["text_equal"] and row["largest_difference"] <= config.tolerance and not row["disagreements"]
        for row in rows
    )


def compare(key: str, records: list, model, peer, tolerance: float) -> dict:  # type: ignore[no-untyped-def]
    task = lm_eval_peer.task(key, records)
    asked = [choices.harness_choices(record) for record in records]
    requests = [[(choice.context, choice.continuation) for choice in item] for item in asked]
    theirs_by_item: list[list] = [[] for _ in records]
    for instance in task.instances:
        theirs_by_item[instance.doc_id].append(instance)
    text_equal = requests == [[tuple(one.args) for one in item] for item in theirs_by_item]

    started = time.perf_counter()
    answers = iter(peer.loglikelihood(task.instances, disable_tqdm=True))
    theirs_s = time.perf_counter() - started
    theirs = {id(instance): next(answers) for instance in task.instances}
    started = time.perf_counter()
    samples = sorted(
        scoring.score(model.params, model.config, model.tokenizer, records, scoring.Scoring("harness")),
        key=lambda sample: sample.index,
    )
    ours_s = time.perf_counter() - started

    largest, disagreements, near_ties, right = 0.0, 0, 0, {"acc": [0, 0], "acc_norm": [0, 0]}
    for sample, item in zip(samples, theirs_by_item, strict=True):
        results = [theirs[id(instance)] for instance in item]
        ours = np.array([value for _, value in sample.log_likelihoods])
        values = np.array([value for value, _ in results])
        largest = max(largest, float(np.abs(ours - values).max()))
        scored = task.process_results(item[0].doc, results)
        for metric, flag in (("acc", sample.correct), ("acc_norm", sample.correct_norm)):
            if metric not in scored:
                continue
            right[metric][0] += int(flag)
            right[metric][1] += int(scored[metric])
        if int(ours.argmax()) != int(values.argmax()):
            top = np.sort(values)[::-1]
            if top[0] - top[1] > 2 * tolerance:
                disagreements += 1
            else:
                near_ties += 1
    n = len(records)
    return {
        "task": key,
        "n": n,
        "requests": len(task.instances),
        "text_equal": text_equal,
        "largest_difference": largest,
        "disagreements": disagreements,
        "near_ties": near_ties,
        "acc_ours": right["acc"][0] / n,
        "acc_lm_eval": right["acc"][1] / n,
        "acc_norm_ours": right["acc_norm"][0] / n if tasks.TASKS[key].harness_norm else None,
        "acc_norm_lm_eval": right["acc_norm"][1] / n if tasks.TASKS[key].harness_norm else None,
        "seconds_ours_with_compilation": round(ours_s, 2),
        "seconds_lm_eval": round(theirs_s, 2),
    }


if __name__ == "__main__":
    config = cli.parse(Config, description=__doc__)
    cli.run(lambda: sys.exit(0 if main(config) else 1))
