"""Search for a learning rate by a short probe: the plan of its runs, the fit of the best rate, and its transfer.

This package needs NumPy alone. `rora_theory.measure.tune` and `sims.tune` train the runs that it plans.
"""

from rora_theory import lazy_modules

__getattr__, __dir__ = lazy_modules.attributes(__name__)
