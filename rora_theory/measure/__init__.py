"""Measurements of a model on one batch: regime by module, real first steps, and the rank coordinate check.

`regime`, `check_transfer` and `coordinate_check` take a loaded model and batches, and return data frames. They print
nothing, and train for at most the few steps of the check. They need the extra ``finetune``.
"""

from typing import TYPE_CHECKING

from rora_theory import lazy_modules

if TYPE_CHECKING:
    from rora_theory.measure.rank_check.check import CheckConfig, coordinate_check
    from rora_theory.measure.regimes.model import regime
    from rora_theory.measure.regimes.module_regime import RegimeConfig
    from rora_theory.measure.transfer_check import check_transfer

__all__ = ["CheckConfig", "RegimeConfig", "check_transfer", "coordinate_check", "regime"]

__getattr__, __dir__ = lazy_modules.attributes(
    __name__,
    {
        "CheckConfig": "rora_theory.measure.rank_check.check",
        "RegimeConfig": "rora_theory.measure.regimes.module_regime",
        "coordinate_check": "rora_theory.measure.rank_check.check",
        "check_transfer": "rora_theory.measure.transfer_check",
        "regime": "rora_theory.measure.regimes.model",
    },
)
