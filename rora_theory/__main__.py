"""The library has no command of its own: ``python -m rora_theory`` is ``python -m sims``, which lists what there is."""

import runpy

if __name__ == "__main__":
    runpy.run_module("sims", run_name="__main__", alter_sys=True)
