"""What to set when the rank changes, from an assumed or a measured regime."""

from rora_theory import lazy_modules

__getattr__, __dir__ = lazy_modules.attributes(__name__)
