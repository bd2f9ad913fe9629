"""The run-time type checker of all tests: beartype, with int taken where float is asked (PEP 484)."""

from beartype import BeartypeConf, beartype

checker = beartype(conf=BeartypeConf(is_pep484_tower=True))
