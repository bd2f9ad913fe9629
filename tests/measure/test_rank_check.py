"""The check as a library call: frames of a tiny model, verdicts that follow from the slopes, wrong settings."""

import numpy as np
import pytest
from support import checkpoint

from rora_theory import InputError, measure
from rora_theory.data.batches import Batch
from rora_theory.llama import load
from rora_theory.measure.coordinate_table import in_a_word
from rora_theory.measure.rank_check import Case, CheckConfig, cases, fits, verdicts


def batch(seed: int) -> Batch:
    tokens = np.random.default_rng(seed).integers(2, 300, (2, 7)).astype(np.int32)
    return Batch(tokens[:, :-1], tokens[:, 1:], np.ones((2, 6), np.float32), None)


def test_frames(tmp_path, capfd) -> None:
    """Silent; a row a rank, seed and coordinate; slopes are those of the sizes, verdicts those of the slopes."""
    model = load(checkpoint.model(tmp_path))
    config = CheckConfig(
        ranks=(2, 8), rules={"half": 0.5}, optimizers=("adamw",), controls=False, steps=(1,), seeds=2, adam_rate=1e-5
    )
    found = measure.coordinate_check(model, batch(0), batch(1), config, target_modules=["q_proj"])
    assert len(found.sizes) == 2 * 2 * (2 + 4 + 1 + 6)
    outputs = found.sizes.query("quantity == 'output' and split == 'train'").pivot(
        index="seed", columns="rank", values="value"
    )
    (slope,) = found.slopes.query("quantity == 'output' and split == 'train' and module == 'self_attn.q_proj'")["slope"]
    assert slope == pytest.approx(np.log(outputs[8] / outputs[2]).mean() / np.log(4), abs=1e-4)
    (verdict,) = found.verdicts.itertuples()
    assert (verdict.optimizer, verdict.rule, verdict.control) == ("adamw", "half", False)
    whole = found.slopes[found.slopes["quantity"].isin(["hidden", "logits"])]["verdict"].tolist()
    assert verdict.whole_model == in_a_word(whole)
    fresh = measure.coordinate_check(model, [batch(0), batch(2)], batch(1), config, target_modules=["q_proj"])
    np.testing.assert_array_equal(fresh.sizes["value"], found.sizes["value"])  # one step has the first batch alone
    assert not any(capfd.readouterr())


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"ranks": (2,)}, "ranks is '2'; accepted are 2 or more, each once"),
        ({"ranks": (0, 2)}, "rank is 0"),
        ({"optimizers": ("lion",)}, "--optimizers has 'lion'"),
        ({"inits": ("pissa",)}, "--inits has 'pissa'"),
        ({"seeds": 1}, "seeds is 1"),
        ({"steps": (2, 1)}, "steps"),
        ({"band": 0.0}, "--band"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_settings_out_of_range(changed, said) -> None:
    with pytest.raises(InputError, match=said):
        CheckConfig(**changed)


def test_a_control_that_is_flat_has_no_power() -> None:
    config = CheckConfig(ranks=(2, 8), rules={"lora": "lora"}, optimizers=("adamw",), steps=(1,), seeds=2)
    assert list(cases(config))[-1] == Case("adamw", "lora", "gaussian", True)
    rows = [
        {"optimizer": case.optimizer, "rule": case.rule, "init": case.init, "rank": rank, "seed": seed, "step": 1}
        | {"split": split, "module": module, "quantity": quantity, "value": 1.0 + seed}
        for case in cases(config)
        for rank in config.ranks
        for seed in range(2)
        for split in ("train", "held_out")
        for module, quantity in (("a", "output"), ("model", "hidden"), ("model", "logits"))
    ]
    found = verdicts(config, fits(config, rows))
    assert [row["whole_model"] for row in found] == ["flat", *["FLAT: the check has no power"] * 2]
    assert {row["flat held_out 1"] for row in found} == {"1 of 1"}
