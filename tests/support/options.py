"""Options of every kind, as a command declares them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Inner:
    """Options of a part."""

    batch_size: int = 16
    """records a step, of --steps"""
    steps: int = 1
    """updates"""
    ranks_of: dict[str, int] = field(default_factory=dict)
    """by module"""


@dataclass(frozen=True)
class Options:
    """Options."""

    data: tuple[str, ...]
    """files"""
    ranks: tuple[int, ...] = (1, 2)
    """ranks of the adapter"""
    limit: int | None = None
    """most items"""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """whose step"""
    merge: bool = False
    """whether to merge"""
    accuracy: bool = True
    """whether to score"""
    remat: bool | Literal["mlp"] = False
    """what to make again"""
    inner: Inner = field(default_factory=Inner)
    seeds: tuple[int, ...] | None = None
    """seeds"""
    rules: tuple[Literal["lora"] | float, ...] = ()
    """rules"""
    out: Path | None = None
    """run folder"""
