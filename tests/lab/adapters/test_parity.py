"""LoRA, RoRA and DoRA against transformers and peft: logits, gradients, a loss curve, counts and merged weights."""

import numpy as np
import pytest
from make_adapters import CASES
from support.peft_training import train_as_peft

from rora_theory.lab.adapters import load_peft


def test_every_case_is_tested(golden) -> None:
    assert set(CASES) == {path.name for path in golden.FOLDER.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_peft(name: str, golden, config, params, tokens, run) -> None:
    """Logits agree to 1e-5, gradients and 20 AdamW losses to a relative 1e-4: float32 sums in another order."""
    expected = np.load(golden.FOLDER / name / "golden.npz")
    adapter = load_peft(golden.FOLDER / name, config)
    assert adapter.count() == int(expected["count"])
    logits, gradient, losses, trained = train_as_peft(
        adapter, params, tokens, config, steps=golden.STEPS, rate=golden.RATE
    )
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=1e-5)
    compare_gradients(gradient, adapter, expected)
    np.testing.assert_allclose(losses, expected["losses"], rtol=1e-4)
    for target in adapter.targets:  # 20 steps on, padding is still exactly zero
        for layer, rank in enumerate(target.ranks):
            assert not np.any(trained[target.module]["lora_A"][layer, rank:])
            assert not np.any(trained[target.module]["lora_B"][layer, :, rank:])
    # 2e-5: the merged weights are rounded to float32 once more than the adapter's branch is.
    np.testing.assert_allclose(run(adapter.merge(params), tokens), expected["logits"], rtol=0, atol=2e-5)


def compare_gradients(gradient, adapter, expected) -> None:
    """Check every tensor that peft trains, to 1e-4 of its largest entry, and that all other entries are zero."""
    compared = 0
    for target in adapter.targets:
        for layer, rank in enumerate(target.ranks):
            tensors = {kind: np.array(value[layer]) for kind, value in gradient[target.module].items()}
            parts = {"lora_A": np.s_[:rank], "lora_B": np.s_[:, :rank], "lora_magnitude_vector": np.s_[:]}
            for kind, tensor in tensors.items() if rank else ():
                suffix = "" if kind == "lora_magnitude_vector" else ".weight"
                theirs = expected[f"grad:base_model.model.model.layers.{layer}.{target.module}.{kind}{suffix}"]
                assert np.abs(theirs).max() > 1e-6, "a vanishing gradient would agree with anything"
                np.testing.assert_allclose(tensor[parts[kind]], theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())
                tensor[parts[kind]] = 0
                compared += 1
            assert not any(tensor.any() for tensor in tensors.values())
    assert compared == sum(key.startswith("grad:") for key in expected.files)
