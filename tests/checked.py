"""The type checker of the test run: an int is a float to it, as it is to Python's typing (PEP 484)."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
