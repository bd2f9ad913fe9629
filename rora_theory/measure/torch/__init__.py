"""Measurements of a PyTorch model in its own process, dtype and device, without JAX.

The functions mirror those of `rora_theory.measure` and return the same data frames:

    from rora_theory import Setting
    from rora_theory.measure import torch as measure

    measured = measure.regime(model, batch, held_out)
    config, learning_rate, advice = measured.transfer(Setting(16, 32, 2e-4), rank=128)
    measure.coordinate_check(make_model, batch, ranks=(2, 8, 32)).assert_flat()    # in a test suite
    measure.tune(model, batches, held_out_batches, config=LoraConfig(r=128), steps=2000).learning_rate

This package needs the extra ``torch`` (torch, transformers, peft).
"""

from typing import TYPE_CHECKING

from rora_theory import lazy_modules

if TYPE_CHECKING:
    from rora_theory.measure.torch.callback import RegimeCallback
    from rora_theory.measure.torch.chats import ChatCollator
    from rora_theory.measure.torch.check import TorchCheck, coordinate_check
    from rora_theory.measure.torch.regimes import TorchRegime, regime
    from rora_theory.measure.torch.tuning import tune

__all__ = ["ChatCollator", "RegimeCallback", "TorchCheck", "TorchRegime", "coordinate_check", "regime", "tune"]

__getattr__, __dir__ = lazy_modules.attributes(
    __name__,
    {
        "ChatCollator": "rora_theory.measure.torch.chats",
        "TorchCheck": "rora_theory.measure.torch.check",
        "TorchRegime": "rora_theory.measure.torch.regimes",
        "RegimeCallback": "rora_theory.measure.torch.callback",
        "coordinate_check": "rora_theory.measure.torch.check",
        "regime": "rora_theory.measure.torch.regimes",
        "tune": "rora_theory.measure.torch.tuning",
    },
)
