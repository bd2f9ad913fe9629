"""All figures under one name: ``python -m figures NAME ...`` is ``rora figures NAME ...``."""

import sys

from sims.__main__ import FIGURES, main

if __name__ == "__main__":
    sys.argv.insert(1, FIGURES)
    main()
