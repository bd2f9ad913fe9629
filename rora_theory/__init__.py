"""How a low-rank adapter's scaling must depend on its rank: exact laws, samplers that judge them, and LLaMA.

The theory (`scaling`, `paper`, `laws`, `first_step`, `sampling`, `statistics`, `verdicts`) needs only the core
install. The LLaMA path (`llama`, `adapters`, `finetune`, `commonsense`) needs the extra ``finetune``.
"""

from rora_theory.errors import InputError
from rora_theory.scaling import scaling_factor

__all__ = ["InputError", "scaling_factor"]
