"""What to set when the rank changes, from an assumed or a measured regime."""

from rora_theory import lazily

__getattr__, __dir__ = lazily.attributes(__name__)
