"""One batch of a model: the law's terms by module, real steps, and the rank coordinate check."""

from rora_theory import lazily

__getattr__, __dir__ = lazily.attributes(__name__)
