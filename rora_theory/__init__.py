"""How a low-rank adapter's scaling must depend on its rank: advice, measurement, exact laws, and LLaMA in JAX.

    import rora_theory as rt

    tuned = rt.Setting(rank=16, alpha=32, learning_rate=2e-4)
    rt.transfer(tuned, rank=128).sentence()

The packages `laws`, `stats`, `paper`, `advice`, `evidence` and `measure` and their modules are attributes that are
imported at first use, so that JAX is not loaded unless it is needed. The core install contains them, except the parts
of `measure` that run a model. The JAX path, `lab` (models, adapters, data, fine-tuning, evaluation, sweeps), needs the
extra ``finetune``.
"""

from typing import TYPE_CHECKING

from rora_theory import lazy_modules
from rora_theory.errors import InputError
from rora_theory.scaling import scaling_factor

if TYPE_CHECKING:
    from rora_theory import advice, evidence, laws, measure, paper, stats
    from rora_theory.advice.setting import Setting
    from rora_theory.advice.transfer import Advice, transfer

__all__ = [
    "Advice",
    "InputError",
    "Setting",
    "advice",
    "evidence",
    "laws",
    "measure",
    "paper",
    "scaling_factor",
    "stats",
    "transfer",
]

__getattr__, __dir__ = lazy_modules.attributes(
    __name__,
    {
        "Advice": "rora_theory.advice.transfer",
        "Setting": "rora_theory.advice.setting",
        "transfer": "rora_theory.advice.transfer",
    },
)
