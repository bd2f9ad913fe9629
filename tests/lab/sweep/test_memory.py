"""Memory of a cell: it depends on the rank and method, not on the rate and seed."""

from dataclasses import replace

import pytest
from support.tiny import LARGE

from rora_theory.lab.finetune import FinetuneConfig, capacity
from rora_theory.lab.finetune.loss import LOGITS_BYTES
from rora_theory.lab.llama import count_parameters
from rora_theory.lab.sweep import memory

RUN = FinetuneConfig(rank=4, batch_size=16, cutoff=160, dropout=0.0)


@pytest.mark.slow
def test_cells_are_distinguished_by_settings_that_affect_memory(monkeypatch) -> None:
    """They differ by rank and method, not by rate and seed; the width is at most the model's maximum."""
    estimates = []

    def record_estimate(model, run, width):
        estimates.append((width, estimate_step(model, run, width)))
        return estimates[-1][1]

    estimate_step = capacity.estimate_step
    monkeypatch.setattr(capacity, "estimate_step", record_estimate)
    monkeypatch.setattr(memory, "LOGITS_BYTES", 0)
    small, large, full = (
        memory.cell_memory(LARGE, replace(RUN, **changes), "float32")
        for changes in ({}, {"rank": 32}, {"method": "full", "rank": FinetuneConfig.rank})
    )
    assert small < large < full
    width, planned = estimates[0]
    assert width == LARGE.max_position_embeddings
    assert small == planned.on_cpu("float32") + capacity.RESERVE
    assert memory.cell_memory(LARGE, replace(RUN, lr=1.0, seed=7), "float32") == small
    assert len(estimates) == 3, "the last is known"


def test_measuring_needs_the_weights_twice() -> None:
    """The weights and their merged copy, and a block of logits."""
    base = 4 * count_parameters(LARGE)
    assert memory.cell_memory(LARGE, None, "float32") == 2 * base + LOGITS_BYTES + capacity.RESERVE
    half = memory.cell_memory(LARGE, None, "bfloat16")
    assert half == base + LOGITS_BYTES + capacity.RESERVE
