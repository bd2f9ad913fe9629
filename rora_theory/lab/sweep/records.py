"""Records of a sweep: seeded samples of the training files for training and for the held-out set."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rora_theory.errors import InputError
from rora_theory.lab.data.formats import AnyRecord, question_key, records_digest
from rora_theory.lab.data.records import DataConfig, RecordSet, read_record_set
from rora_theory.laws.random.seeds import check_seed
from rora_theory.scaling import check_integer


@dataclass(frozen=True)
class RecordSplit:
    """Records of all cells.

    Attributes:
      train: Training records.
      held_out: Held-out records, each with its file and its index in the file.
      source: All records, and the settings with which they were read.
    """

    train: list[AnyRecord]
    held_out: list[tuple[str, int, AnyRecord]]
    source: RecordSet

    @property
    def summary(self) -> dict[str, Any]:
        """Sizes and digests of the records."""
        return {
            "train_records": len(self.train),
            "train_sha256": records_digest(self.train),
            "held_out": len(self.held_out),
            "held_out_sha256": records_digest([record for _, _, record in self.held_out]),
        } | self.source.config.identity()


def draw_records(
    data: Sequence[str],
    *,
    held_out: int,
    train_records: int | None = None,
    seed: int = 42,
    config: DataConfig | None = None,
) -> RecordSplit:
    """Sample held-out and training records such that no instruction is in both (see `formats.question_key`).

    Args:
      data: Training files, see `rora_theory.lab.data.records.read_record_set`.
      held_out: Number of held-out records.
      train_records: Number of training records; None uses all others.
      seed: Seed of the sample.
      config: Settings with which to read the files; None is the default.

    Raises:
      InputError: If a number or seed is out of range, or if a file is missing or invalid, has too few records for its
        share, or has texts without answers.
    """
    check_integer("held_out", held_out, minimum=2)
    if train_records is not None:
        check_integer("train_records", train_records)
    check_seed("data_seed", seed)
    record_set = read_record_set(data, config)
    for source, (name, _) in zip(data, record_set.formats, strict=True):
        if name == "text":
            raise InputError(
                f"{source}: a sweep measures losses on answers, got texts. Use prompts with responses, or chats."
            )
    # Records and questions by file, in a random order.
    ends = np.cumsum([0, *(count for _, count in record_set.formats)]).tolist()
    files = [record_set.records[begin:end] for begin, end in itertools.pairwise(ends)]
    questions = [[question_key(record) for record in records] for records in files]
    random = np.random.default_rng(seed)
    orders = [random.permutation(len(records)).tolist() for records in files]
    sizes = [len(records) for records in files]
    # Held-out records of each file, with different questions over all files.
    held_out_records: list[tuple[str, int, AnyRecord]] = []
    held_out_questions: set[str] = set()
    held_out_counts = split_evenly(held_out, len(sizes))
    for source, records, file_questions, order, count in zip(
        data, files, questions, orders, held_out_counts, strict=True
    ):
        unused = [i for i in order if file_questions[i] not in held_out_questions]
        # The first record of each question in this order, since later items of a dict comprehension win. Questions that
        # occur several times are placed at their last occurrence, on which published samples depend.
        unused = list({file_questions[i]: i for i in reversed(unused)}.values())[::-1]
        if len(unused) < count:
            raise InputError(
                f"{source} must have {count} records to hold out, all with different questions (its share of held_out "
                f"{held_out}), got {len(unused)}"
            )
        held_out_records += [(_short_path(source), i, records[i]) for i in unused[:count]]
        held_out_questions |= {file_questions[i] for i in unused[:count]}
    # Training records: those without a held-out question.
    train: list[AnyRecord] = []
    remaining = [
        [records[i] for i in order if file_questions[i] not in held_out_questions]
        for records, file_questions, order in zip(files, questions, orders, strict=True)
    ]
    # Without a number, all remaining records of every file; otherwise shares of it.
    if train_records is None:
        train_counts = [len(records) for records in remaining]
    else:
        train_counts = split_evenly(train_records, len(sizes))
    # The first records of the random order, as many as the file's share.
    for source, records, count in zip(data, remaining, train_counts, strict=True):
        if len(records) < count:
            raise InputError(
                f"{source} must have {count} records besides the held-out ones (its share of train_records "
                f"{train_records}), got {len(records)}"
            )
        train += records[:count]
    if not train:
        raise InputError(f"held_out must be less than the number of records, {sum(sizes)}, got {held_out}")
    return RecordSplit(train, held_out_records, record_set)


def split_evenly(total: int, count: int) -> list[int]:
    """Split a number over files, the first of which get what is left over.

    Examples:
      >>> split_evenly(10, 3)
      [4, 3, 3]
    """
    return [total // count + (index < total % count) for index in range(count)]


def _short_path(source: str) -> str:
    """Return the last folder and the name of a file."""
    return "/".join(Path(source).parts[-2:])
