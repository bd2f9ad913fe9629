"""Other people's sweeps: losses, best rates, exponents, and the regret of every policy that carries a learning rate."""

from rora_theory import lazy_modules

__getattr__, __dir__ = lazy_modules.attributes(__name__)
