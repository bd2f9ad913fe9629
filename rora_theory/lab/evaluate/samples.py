"""File of a run's samples, one line per item, appended one by one."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from rora_theory.defaults import SCORE_BATCH_SIZE
from rora_theory.errors import InputError
from rora_theory.lab.data.tasks import TaskRecord
from rora_theory.lab.evaluate.scoring import Sample, Scoring, in_order, score_tasks
from rora_theory.lab.llama import Adapter, Model
from rora_theory.runs.files import naming_damage
from rora_theory.runs.journal import Journal

FILE = "samples.jsonl"
"""Name of the file in a run's folder."""


class Samples:
    """Samples of a run, those before an interruption included.

    Args:
      records: Records that the run scores.
      protocol: Name of the protocol.

    Attributes:
      scored: Samples that were scored so far.

    Raises:
      InputError: If a line is damaged, or is a sample of another record or protocol, or a repeated one.
    """

    def __init__(self, path: Path, records: Sequence[TaskRecord], protocol: str) -> None:
        self._journal, self._protocol = Journal(path), protocol
        gold = {(record.task, record.index): record.answer for record in records}
        samples: dict[tuple[str, int], Sample] = {}
        for number, line in enumerate(self._journal.entries, start=1):
            # Parse the line.
            with naming_damage(f"{path}: line {number}"):
                values = dict(line)
                line_protocol = values.pop("protocol")
                pairs = tuple((str(label), float(value)) for label, value in values.pop("log_likelihoods"))
                sample = Sample(**values, log_likelihoods=pairs)
                key = (sample.task, sample.index)
                is_new = key not in samples and isinstance(sample.correct, bool)
            # It must be the first sample of one of this run's records.
            if line_protocol != protocol or gold.get(key) != sample.gold or not is_new:
                raise InputError(
                    f"{path}: line {number} is of {line_protocol} {key}, which this run does not score or has already "
                    "scored. Restore the file, or remove it to score all items again."
                )
            samples[key] = sample
        self.scored = list(samples.values())

    def add(self, sample: Sample) -> None:
        """Append a sample to the file."""
        self._journal.append({"protocol": self._protocol} | asdict(sample), sync=False)
        self.scored.append(sample)

    def score(
        self,
        model: Model,
        tasks: Mapping[str, Sequence[TaskRecord]],
        scoring: Scoring,
        *,
        adapter: Adapter | None = None,
        batch_size: int = SCORE_BATCH_SIZE,
    ) -> Iterator[Sample]:
        """Score the remaining records, see `score_tasks`, and sort the file at the end.

        Each sample is written to the file before it is yielded.

        Args:
          batch_size: See `rora_theory.lab.evaluate.score`.
        """
        done = {(sample.task, sample.index) for sample in self.scored}
        if len(done) < sum(map(len, tasks.values())):
            for sample in score_tasks(model, tasks, scoring, adapter=adapter, batch_size=batch_size, done=done):
                self.add(sample)
                yield sample
        self.sort()

    def sort(self) -> None:
        """Sort the samples, so that the file does not depend on interruptions of the run."""
        self.scored = in_order(self.scored)
        self._journal.rewrite([{"protocol": self._protocol} | asdict(sample) for sample in self.scored])
