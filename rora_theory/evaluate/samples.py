"""The file of a run's scored items, a sealed line each, kept as they come."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from rora_theory.data.tasks import TaskRecord
from rora_theory.errors import InputError
from rora_theory.evaluate.scoring import Sample, Scoring, in_order, score_tasks
from rora_theory.io.files import naming_damage
from rora_theory.llama import Adapter, Model
from rora_theory.runs.journal import Journal

FILE = "samples.jsonl"
"""Its name in a run's folder."""


class Samples:
    """Scored items of a run, those of earlier parts of it included.

    Args:
      path: of the file.
      identity: of the run.
      records: that the run scores.
      protocol: by which.

    Attributes:
      found: the samples so far.

    Raises:
      InputError: a line is damaged, or of a record or protocol that this run does not score; names the line.
    """

    def __init__(self, path: Path, identity: str, records: Sequence[TaskRecord], protocol: str) -> None:
        self._journal, self._protocol = Journal(path, identity), protocol
        gold = {(record.task, record.index): record.answer for record in records}
        found: dict[tuple[str, int], Sample] = {}
        for number, line in enumerate(self._journal.entries, start=1):
            with naming_damage(f"{path}: line {number}"):
                plain = dict(line)
                named = plain.pop("protocol")
                pairs = tuple((str(label), float(value)) for label, value in plain.pop("log_likelihoods"))
                sample = Sample(**plain, log_likelihoods=pairs)
                key = (sample.task, sample.index)
                is_new = key not in found and isinstance(sample.correct, bool)
            if named != protocol or gold.get(key) != sample.gold or not is_new:
                raise InputError(
                    f"{path}: line {number} is of {named} {key}, which this run does not score, or scores once"
                )
            found[key] = sample
        self.found = list(found.values())

    def add(self, sample: Sample) -> None:
        """Write one sample more."""
        self._journal.append({"protocol": self._protocol} | asdict(sample), sync=False)
        self.found.append(sample)

    def score(
        self,
        model: Model,
        tasks: Mapping[str, Sequence[TaskRecord]],
        scoring: Scoring,
        *,
        adapter: Adapter | None = None,
        batch_size: int = 8,
    ) -> Iterator[Sample]:
        """Score what is lacking, see `score_tasks`: each sample is kept before it is yielded; then all are in order."""
        done = {(sample.task, sample.index) for sample in self.found}
        if len(done) < sum(map(len, tasks.values())):
            for sample in score_tasks(model, tasks, scoring, adapter=adapter, batch_size=batch_size, done=done):
                self.add(sample)
                yield sample
        self.sort()

    def sort(self) -> None:
        """Put all in order, so that the file is the same however often the run was stopped."""
        self.found = in_order(self.found)
        self._journal.rewrite([{"protocol": self._protocol} | asdict(sample) for sample in self.found])
