"""How a low-rank adapter's scaling must depend on its rank: advice, measurement, exact laws, and LLaMA in JAX.

    import rora_theory as rt

    tuned = rt.Setting(rank=16, alpha=32, learning_rate=2e-4)
    rt.transfer(tuned, rank=128).sentence()

The rooms `theory`, `stats`, `paper`, `advice` and `measure` and their modules are attributes, imported when they are
first asked for: no JAX is loaded where no array on a device is needed. The core install has all of these but what of
`measure` runs a model; the LLaMA path (`llama`, `adapters`, `data`, `finetune`, `evaluate`) needs the extra
``finetune``.
"""

from typing import TYPE_CHECKING

from rora_theory import lazily
from rora_theory.errors import InputError
from rora_theory.scaling import scaling_factor

if TYPE_CHECKING:
    from rora_theory import advice, measure, paper, stats, theory
    from rora_theory.advice.setting import Setting
    from rora_theory.advice.transfer import Advice, transfer

__all__ = [
    "Advice",
    "InputError",
    "Setting",
    "advice",
    "measure",
    "paper",
    "scaling_factor",
    "stats",
    "theory",
    "transfer",
]

__getattr__, __dir__ = lazily.attributes(
    __name__,
    {
        "Advice": "rora_theory.advice.transfer",
        "Setting": "rora_theory.advice.setting",
        "transfer": "rora_theory.advice.transfer",
    },
)
