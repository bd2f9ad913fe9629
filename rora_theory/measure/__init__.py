"""Measurements of a PyTorch or PEFT model in its own process, dtype and device, and a learning rate to start from.

    from rora_theory import Setting, measure

    measured = measure.regime(model, batch, held_out)
    config, learning_rate, advice = measured.transfer(Setting(16, 32, 2e-4), rank=128)
    measure.coordinate_check(make_model, batch, ranks=(2, 8, 32)).assert_flat()    # in a test suite
    measure.tune(model, config=LoraConfig(r=128), steps=2000, batch_size=8).learning_rate

The functions need the extra ``torch`` (torch, transformers, peft), which is imported at first use. The statistics
behind them, `regimes.module_regime` and `rank_check.rules`, need NumPy alone.
"""

from typing import TYPE_CHECKING

from rora_theory import lazy_modules

if TYPE_CHECKING:
    from rora_theory.measure.callback import RegimeCallback
    from rora_theory.measure.chats import ChatCollator
    from rora_theory.measure.rank_check.check import TorchCheck, coordinate_check
    from rora_theory.measure.regimes.model import TorchRegime, regime
    from rora_theory.measure.regimes.module_regime import RegimeConfig
    from rora_theory.measure.tuning import tune

__all__ = [
    "ChatCollator",
    "RegimeCallback",
    "RegimeConfig",
    "TorchCheck",
    "TorchRegime",
    "coordinate_check",
    "regime",
    "tune",
]

__getattr__, __dir__ = lazy_modules.attributes(
    __name__,
    {
        "ChatCollator": "rora_theory.measure.chats",
        "RegimeCallback": "rora_theory.measure.callback",
        "RegimeConfig": "rora_theory.measure.regimes.module_regime",
        "TorchCheck": "rora_theory.measure.rank_check.check",
        "TorchRegime": "rora_theory.measure.regimes.model",
        "coordinate_check": "rora_theory.measure.rank_check.check",
        "regime": "rora_theory.measure.regimes.model",
        "tune": "rora_theory.measure.tuning",
    },
)
