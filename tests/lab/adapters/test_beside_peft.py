"""Compare adapters with peft, where it is installed: what it loads, and what it then computes."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from support.peft_files import change_config, change_tensors

from rora_theory.lab.adapters import load_peft, rewrite_portable, save_peft

pytest.importorskip("torch", reason="beside peft: the extra peers")
pytest.importorskip("peft", reason="beside peft: the extra peers")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "entries",
    [
        {"init_lora_weights": None},
        {"target_modules": ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj", "c_attn"]},
        {"layers_to_transform": [0, 1, 2, 7]},
        {"target_modules": r".*\.(q|k|v|up|down)_proj|lm_head", "exclude_modules": ["lm_head"]},
        {"rank_pattern": {".*down_proj": 2, r"layers\.1\.self_attn\.q_proj": 6, ".*q_proj": 4, ".*[02].*k_proj": 3}},
    ],
    ids=["null init", "unknown target", "layer out of range", "targeted and excluded", "overlapping patterns"],
)
def test_peft_and_this_package_compute_the_same(entries, golden, config, params, tokens, run, tmp_path) -> None:
    """Read, written again and in portable form, it computes the same in peft to 2e-5 (float32 sums)."""
    source = Path(shutil.copytree(golden.FOLDER / "lora_patterns", tmp_path / "peft"))
    change_config(source, **entries)
    expected = golden.peft_logits(source)
    adapter = load_peft(source, config)
    np.testing.assert_allclose(run(params, tokens, adapter), expected, rtol=0, atol=2e-5)
    save_peft(tmp_path / "again", adapter)
    rewrite_portable(source, tmp_path / "portable")
    for name in ("again", "portable"):
        np.testing.assert_allclose(golden.peft_logits(tmp_path / name), expected, rtol=0, atol=2e-5)


@pytest.mark.filterwarnings("ignore")
def test_both_support_a_rank_above_the_width_of_a_module(golden, config, params, tokens, run, tmp_path) -> None:
    source = Path(shutil.copytree(golden.FOLDER / "lora", tmp_path / "peft"))
    change_config(source, r=12, target_modules=["k_proj"])
    rng = np.random.default_rng(0)
    shapes = {"A": (12, 16), "B": (8, 12)}
    tensors = {
        f"base_model.model.model.layers.{layer}.self_attn.k_proj.lora_{kind}.weight": rng.normal(size=shape)
        for layer in range(3)
        for kind, shape in shapes.items()
    }
    tensors = {name: (0.3 * tensor).astype(np.float32) for name, tensor in tensors.items()}
    change_tensors(source, lambda golden_tensors: (golden_tensors.clear(), golden_tensors.update(tensors)))
    logits = run(params, tokens, load_peft(source, config))
    np.testing.assert_allclose(logits, golden.peft_logits(source), rtol=0, atol=2e-5)
