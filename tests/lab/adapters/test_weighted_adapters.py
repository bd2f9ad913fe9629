"""Effect of PEFT's `add_weighted_adapter` on the scaling of adapters of several rules and ranks (docs/serving.md)."""

import re
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from support import torch_models  # noqa: E402

PAGE = Path(__file__).parents[3] / "docs" / "serving.md"
WEIGHTS = (0.7, 0.3)
pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers and peft


def make_model(first: dict, second: dict):
    """Return a PEFT model with two adapters whose B is not zero."""
    model = peft.get_peft_model(torch_models.model("llama"), config(**first), "first")
    model.add_adapter("second", config(**second))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    return model


def config(rank: int, alpha: float, use_rslora: bool):
    return peft.LoraConfig(r=rank, lora_alpha=alpha, use_rslora=use_rslora, target_modules=["q_proj", "down_proj"])


def layers(model) -> list:
    return [module for module in model.modules() if isinstance(module, peft.tuners.lora.Linear)]


def weighted_sum(layer):
    return sum(w * layer.get_delta_weight(name) for w, name in zip(WEIGHTS, ("first", "second"), strict=True))


def combine(model, combination_type: str) -> None:
    model.add_weighted_adapter(["first", "second"], list(WEIGHTS), "both", combination_type=combination_type)


PLAIN = {"rank": 4, "alpha": 8.0, "use_rslora": False}
RSLORA = {"rank": 9, "alpha": 8.0, "use_rslora": True}


def test_the_page_s_example_is_the_exact_sum() -> None:
    """The rsLoRA adapter comes first, and its flag is set again afterwards."""
    (code,) = (code for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S) if "weighted" in code)
    model = make_model(RSLORA, PLAIN)
    exec(code, {"model": model})
    for layer in layers(model):
        assert layer.scaling["both"] == 1.0
        assert layer.r["both"] == 13
        torch.testing.assert_close(layer.get_delta_weight("both"), weighted_sum(layer), rtol=1e-4, atol=1e-4)
    assert model.peft_config["first"].use_rslora is True


def test_plain_lora_first_gives_the_sum_and_rslora_first_may_be_too_strong() -> None:
    """PEFT copies the first adapter's flag, which adds the root of the new rank unless the version has corrected it."""
    model = make_model(PLAIN, RSLORA)
    combine(model, "cat")
    for layer in layers(model):
        torch.testing.assert_close(layer.get_delta_weight("both"), weighted_sum(layer), rtol=1e-4, atol=1e-4)
    model = make_model(RSLORA, PLAIN)
    combine(model, "cat")
    for layer in layers(model):
        factor = float((layer.get_delta_weight("both") / weighted_sum(layer)).median())
        assert factor == pytest.approx(13**0.5, rel=1e-3) or factor == pytest.approx(1.0, rel=1e-3)
        assert factor == pytest.approx(layer.scaling["both"], rel=1e-3)


def test_svd_is_the_closest_matrix_of_the_largest_rank() -> None:
    model = make_model(PLAIN, RSLORA)
    combine(model, "svd")
    for layer in layers(model):
        u, s, vh = torch.linalg.svd(weighted_sum(layer), full_matrices=False)
        closest = u[:, :9] @ torch.diag(s[:9]) @ vh[:9]
        torch.testing.assert_close(layer.get_delta_weight("both"), closest, rtol=1e-3, atol=1e-3)


def test_linear_takes_one_rank_and_is_not_the_sum() -> None:
    """It multiplies the sum of the B by the sum of the A, each weighted by the root of weight times scaling."""
    model = make_model(PLAIN, RSLORA)
    with pytest.raises(ValueError, match="same r"):
        combine(model, "linear")
    model = make_model(PLAIN, PLAIN | {"use_rslora": True})
    combine(model, "linear")
    for layer in layers(model):
        roots = [(w * layer.scaling[name]) ** 0.5 for w, name in zip(WEIGHTS, ("first", "second"), strict=True)]
        A, B = (
            sum(root * matrices[name].weight for root, name in zip(roots, ("first", "second"), strict=True))
            for matrices in (layer.lora_A, layer.lora_B)
        )
        torch.testing.assert_close(layer.get_delta_weight("both"), B @ A, rtol=1e-4, atol=1e-4)
        assert (B @ A - weighted_sum(layer)).norm() > 0.1 * weighted_sum(layer).norm()
