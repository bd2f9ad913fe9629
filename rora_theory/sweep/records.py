"""The records of a sweep: a seeded sample of the training files, and held-out ones that no cell trains on."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rora_theory.data.formats import AnyRecord, question, records_digest
from rora_theory.data.records import DataConfig, RecordSet, read_record_set
from rora_theory.errors import InputError
from rora_theory.random.seeds import check_seed
from rora_theory.scaling import check_integer

Shares = Literal["equal", "proportional"]
"""What each file gives: as many records as the others, or in proportion to its size."""


@dataclass(frozen=True)
class RecordSplit:
    """The records of all cells.

    Attributes:
      train: training records.
      held_out: records of the validation loss, with the file and the index each comes from.
      source: all records, and how they were read.
    """

    train: list[AnyRecord]
    held_out: list[tuple[str, int, AnyRecord]]
    source: RecordSet

    @property
    def summary(self) -> dict[str, Any]:
        """Sizes and digests."""
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
    shares: Shares = "equal",
    seed: int = 42,
    config: DataConfig | None = None,
) -> RecordSplit:
    """Held-out and training records, seeded, no instruction (see `formats.question`) in both.

    Args:
      data: training files, as `rora_theory.data.records.read_record_set` takes them.
      held_out: how many records to set aside.
      train_records: how many of the others; None is all.
      shares: what each file gives to both.
      seed: of the order that they are taken in.
      config: how the files are read; None is the default.

    Raises:
      InputError: a number or seed out of range, a file that is missing or bad, has too few records for its share, or
        texts without answers.
    """
    check_integer("held_out", held_out, least=2)
    if train_records is not None:
        check_integer("train_records", train_records)
    check_seed(seed, "data_seed")
    found = read_record_set(data, config)
    for source, (name, _) in zip(data, found.formats, strict=True):
        if name == "text":
            raise InputError(
                f"{source}: holds texts, and a sweep measures losses on answers; accepted are prompts with responses, "
                "or chats"
            )
    ends = np.cumsum([0, *(count for _, count in found.formats)]).tolist()
    files = [found.records[begin:end] for begin, end in itertools.pairwise(ends)]
    asked = [[question(record) for record in records] for records in files]
    random = np.random.default_rng(seed)
    orders = [random.permutation(len(records)).tolist() for records in files]
    sizes = [len(records) for records in files]
    kept: list[tuple[str, int, AnyRecord]] = []
    taken: set[str] = set()
    wanted = apportion(held_out, sizes, shares)
    for source, records, own, order, count in zip(data, files, asked, orders, wanted, strict=True):
        fresh = [i for i in order if own[i] not in taken]
        fresh = list({own[i]: i for i in reversed(fresh)}.values())[::-1]
        if len(fresh) < count:
            raise InputError(f"{source}: has {len(fresh)} records to hold out; accepted is {count}, its share")
        kept += [(_short(source), i, records[i]) for i in fresh[:count]]
        taken |= {own[i] for i in fresh[:count]}
    train: list[AnyRecord] = []
    rest = [
        [records[i] for i in order if own[i] not in taken]
        for records, own, order in zip(files, asked, orders, strict=True)
    ]
    counts = [len(part) for part in rest] if train_records is None else apportion(train_records, sizes, shares)
    for source, part, count in zip(data, rest, counts, strict=True):
        if len(part) < count:
            raise InputError(
                f"{source}: has {len(part)} records beside the held-out ones; accepted is {count}, its share of "
                f"train_records {train_records} in {shares} shares"
            )
        train += part[:count]
    if not train:
        raise InputError(f"held_out is {held_out} of {sum(sizes)} records; accepted are fewer than all")
    return RecordSplit(train, kept, found)


def apportion(total: int, sizes: Sequence[int], shares: Shares) -> list[int]:
    """``total`` split over the files: evenly, or by size with the largest remainders rounded up.

    Examples:
      >>> apportion(10, [90, 10, 50], "equal"), apportion(10, [90, 10, 50], "proportional")
      ([4, 3, 3], [6, 1, 3])
    """
    weights = [1] * len(sizes) if shares == "equal" else list(sizes)
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [math.floor(part) for part in exact]
    by_remainder = sorted(range(len(sizes)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def _short(source: str) -> str:
    """The last folder and the name of a file."""
    return "/".join(Path(source).parts[-2:])
