"""Several seeds at once: divergence, and the trained factor."""

import numpy as np
import pytest

from rora_theory.lab.toy import dynamics, ensemble

CONFIG = dynamics.ProblemConfig(p_in=8, p_out=2, samples=2, held_out=2)


@pytest.mark.slow
def test_a_diverged_run_stays_diverged(monkeypatch):
    """A run counts as diverged from the first recorded step whose loss is too high, whatever follows."""
    losses = np.array([[1.0, 20.0, 0.5], [1.0, 9.0, 0.5]])
    measures = dynamics.Measures(*[losses] * len(dynamics.Measures._fields))
    monkeypatch.setattr(dynamics, "trajectories", lambda *_, **__: measures)
    drawn = ensemble.draw_ensemble(CONFIG, rank=4, seeds=range(2))
    _, diverged = ensemble.ensemble_trajectories(*drawn, scaling=1.0, learning_rate=0.1, optimizer="sgd", steps=(1, 2))
    assert diverged.tolist() == [[False, True, True], [False, False, False]]
