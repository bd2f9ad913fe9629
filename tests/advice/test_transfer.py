"""Carrying alpha and the learning rate to another rank: against the exact law, in closed cases, as PEFT reads it."""

import json
import math
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rora_theory import InputError, scaling_factor
from rora_theory.adapter_config import FILE
from rora_theory.adapters import LoraConfig
from rora_theory.advice.lora_config import read_adapter_config
from rora_theory.advice.setting import CROSS_TALK, SIGNAL, Setting, growth, step_ratio
from rora_theory.advice.transfer import LONGEST, MEASURED_POWERS, MEASURED_RANKS, MEASURED_STRENGTHS, transfer
from rora_theory.io import frames
from rora_theory.llama import LlamaConfig
from rora_theory.theory import horizon, laws

ROOT = Path(__file__).parents[2]

ranks = st.integers(1, 4096)
settings = st.builds(
    Setting,
    rank=ranks,
    alpha=st.floats(0.1, 1e3),
    learning_rate=st.floats(1e-6, 1.0),
    rule=st.sampled_from(["lora", "rora", 0.25]),
    optimizer=st.sampled_from(["sgd", "momentum", "adam", "adamw"]),
    init=st.sampled_from(["kaiming_uniform", "gaussian"]),
)
linear_terms = st.one_of(st.just(SIGNAL), st.just(CROSS_TALK), st.floats(-0.9, 1e4))

FAMILY = {"sgd": "sgd", "momentum": "sgd", "adam": "adam", "adamw": "adam"}


def rms(setting: Setting, grad: np.ndarray, x: np.ndarray) -> float:
    """The law's rms of w, in the sign limit."""
    law = laws.first_step_moments(
        grad,
        x,
        rank=setting.rank,
        scaling=setting.scaling,
        learning_rate=setting.learning_rate,
        optimizer=FAMILY[setting.optimizer],
        init=setting.init,
    )
    return math.sqrt(float(np.mean(law.second_moment)))


def linear_term(setting: Setting, grad: np.ndarray, x: np.ndarray) -> float:
    """From the law at ranks 1 and 2, gamma held: E(2) / E(1) = (4 + 2c) / (1 + c)."""
    ones = [replace(setting, rank=rank, alpha=1.0, rule=0.0, init="kaiming_uniform") for rank in (1, 2)]
    if setting.init == "gaussian":  # the law of its shape at a deviation that does not depend on the rank
        ones = [replace(one, init="normal") for one in ones]
    ratio = (rms(ones[1], grad, x) / rms(ones[0], grad, x)) ** 2
    return (4 - ratio) / (ratio - 2)


@pytest.fixture(scope="module")
def layer() -> tuple[np.ndarray, np.ndarray]:
    """A gradient of two samples and inputs that overlap with one of them."""
    random = np.random.default_rng(0)
    x = random.normal(size=(2, 24))
    grad = random.normal(size=(5, 2)) @ x
    return grad, np.concatenate([x, 0.3 * x[:1] + random.normal(size=(3, 24))])


@pytest.mark.parametrize("init", ["kaiming_uniform", "gaussian"])
@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam", "adamw"])
@pytest.mark.parametrize("rule", ["lora", "rora", 0.25])
def test_step_ratio_is_the_law_s(layer, init, optimizer, rule) -> None:
    """For any rule, optimizer and init, and so the carried alpha and rate give the old step exactly."""
    old = Setting(8, 16.0, 3e-4, rule, optimizer, init)
    new = replace(old, rank=128, alpha=5.0, learning_rate=1e-3)
    c = linear_term(old, *layer)
    assert step_ratio(new, old, c) == pytest.approx(
        rms(new, *layer) / rms(old, *layer), rel=1e-6
    )  # uniform Adam's integral
    found = transfer(old, 128, {"m": c})
    by_alpha = replace(found.unchanged, alpha=found.alpha_at_old_rate)
    by_rate = replace(found.unchanged, learning_rate=found.rate_at_alpha)
    assert rms(by_alpha, *layer) == pytest.approx(rms(old, *layer), rel=1e-6)
    assert rms(by_rate, *layer) == pytest.approx(rms(old, *layer), rel=1e-6)


@given(settings, ranks, linear_terms)
def test_either_change_keeps_the_step(old: Setting, rank: int, c: float) -> None:
    found = transfer(old, rank, {"m": c})
    assert step_ratio(replace(found.unchanged, alpha=found.alpha_at_old_rate), old, c) == pytest.approx(1, rel=1e-9)
    assert step_ratio(replace(found.unchanged, learning_rate=found.rate_at_alpha), old, c) == pytest.approx(1, rel=1e-9)
    back = transfer(replace(found.unchanged, alpha=found.alpha_at_old_rate), old.rank, {"m": c})
    assert back.alpha == pytest.approx(old.alpha, rel=1e-9)


@given(ranks, ranks, st.floats(0, 1e6))
def test_growth_lies_between_its_limits(old: int, new: int, c: float) -> None:
    low, high = sorted([growth(old, new, CROSS_TALK), growth(old, new, SIGNAL)])
    assert low * (1 - 1e-12) <= growth(old, new, c) <= high * (1 + 1e-12)


@pytest.mark.parametrize(
    ("optimizer", "regime", "rule", "alpha"),
    [  # the exponent that keeps the step: alpha moves by 16^(kappa of the rule - kappa that is flat)
        ("adamw", "signal", "lora", 16.0),
        ("adamw", "signal", "rora", 16.0 * 16**-0.5),
        ("adamw", "cross-talk", "lora", 16.0 * 16**0.5),
        ("adamw", "cross-talk", "rora", 16.0),
        ("sgd", "signal", "lora", 16.0 * 16**0.5),
        ("momentum", "signal", "rora", 16.0),
        ("sgd", "cross-talk", "lora", 16.0 * 16**0.75),
        ("sgd", "cross-talk", 0.25, 16.0),
    ],
)
def test_the_four_corners(optimizer, regime, rule, alpha) -> None:
    found = transfer(Setting(8, 16.0, 3e-4, rule, optimizer), 128, regime)
    assert found.alpha == pytest.approx(alpha, rel=1e-12)
    # gamma enters SGD's step twice, the rate once: the rate has to make up the square of what alpha makes up.
    power = 2 if FAMILY[optimizer] == "sgd" else 1
    assert found.rate_at_alpha == pytest.approx(3e-4 * (alpha / 16) ** power, rel=1e-12)


@pytest.mark.parametrize(("optimizer", "power"), [("adamw", 1), ("sgd", 2)])
def test_gaussian_init_costs_a_factor_of_the_rank(optimizer, power) -> None:
    """Its deviation 1/r makes up a factor r'/r in alpha, at any regime."""
    plain, gaussian = (
        transfer(Setting(8, 16.0, 3e-4, "lora", optimizer, init), 128, {"m": 7.0})
        for init in ("kaiming_uniform", "gaussian")
    )
    assert gaussian.alpha == pytest.approx(16 * plain.alpha, rel=1e-12)
    assert gaussian.rate_at_alpha == pytest.approx(16**power * plain.rate_at_alpha, rel=1e-12)


def test_common_choices() -> None:
    """LoRA, Adam, signal: the step is gamma r. rsLoRA multiplies it by sqrt(r), alpha = 2r by what gamma does."""
    found = transfer(Setting(16, 32.0, 2e-4, "lora", "adamw"), 256)
    steps = {each.name: each for each in found.alternatives()}
    assert len(steps) == 6
    fixed, fixed_rs = steps["alpha = 32, as it was"], steps["alpha = 32, as it was, use_rslora"]
    assert fixed.step == pytest.approx(1)
    assert fixed_rs.step == pytest.approx(16)  # sqrt(256)
    assert fixed_rs.learning_rate == pytest.approx(2e-4 / 16)
    assert steps["alpha = 2r"].step == pytest.approx(16)
    assert steps["alpha = r"].step == pytest.approx(8)
    assert steps["alpha = 2r, use_rslora"].step == pytest.approx(16**2)  # gamma 2 -> 2 sqrt(256)
    measured = transfer(Setting(16, 32.0, 2e-4), 256, {"a": 0.0, "b": 1e12}).alternatives()[0]
    assert (measured.smallest, measured.largest) == pytest.approx((0.25, 1.0))
    assert measured.step == pytest.approx(0.5)  # the geometric mean


MEASURED = {
    f"model.layers.{layer}.{module}": 2.0 + 7 * layer + 3 * position
    for layer in range(2)
    for position, module in enumerate(("self_attn.q_proj", "mlp.down_proj"))
}
CONFIG = LlamaConfig(64, 128, 160, 2, 2, 2, 64)


def written(text: str) -> dict:
    """The keyword arguments that the snippet passes, as Python reads them."""
    space: dict = {}
    exec(text.replace("from peft import LoraConfig", "LoraConfig = dict"), space)
    return space["config"]


@pytest.mark.parametrize("rule", ["lora", "rora", 0.25])
@pytest.mark.parametrize("per", ["one", "type", "module"])
def test_snippet_gives_every_module_its_scaling(rule, per) -> None:
    """Read by this package's own matching of PEFT's patterns, module by module; six digits are written."""
    found = transfer(Setting(4, 16.0, 3e-4, rule), 32, MEASURED)
    config = written(found.peft_config(target_modules=["q_proj", "down_proj"], per=per))
    assert config["r"] == 32
    assert config["init_lora_weights"] is True
    lora = LoraConfig(
        rank=config["r"],
        alpha=config["lora_alpha"],
        rule="rslora" if config["use_rslora"] else "lora",
        target_modules=config["target_modules"],
        alpha_pattern=config.get("alpha_pattern", {}),
    )
    assert config["use_rslora"] is False, "which several servers ignore"
    alphas = {module.name: module.alpha for module in found.modules}
    mean = lambda values: math.exp(np.mean(np.log(values)))  # noqa: E731
    seen = 0
    for row in lora.table(CONFIG):
        first, _, last = row.layers.partition("-")
        for layer in range(int(first), int(last or first) + 1):
            own = f"model.layers.{layer}.{row.module}"
            same = [alpha for name, alpha in alphas.items() if name.endswith(row.module)]
            alpha = {"one": mean(list(alphas.values())), "type": mean(same), "module": alphas[own]}[per]
            assert row.scaling == pytest.approx(scaling_factor(rule, alpha=alpha, rank=32), rel=1e-5)
            seen += 1
    assert seen == len(MEASURED)


@pytest.mark.slow
def test_snippet_works_in_peft() -> None:
    """Pasted as it is, on a torch model: PEFT's own scaling of each module."""
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    import torch

    found = transfer(Setting(4, 16.0, 3e-4, "rora"), 32, MEASURED)
    space: dict = {}
    exec(found.peft_config(target_modules=["q_proj", "down_proj"], per="module"), space)
    from peft.tuners.lora import LoraModel

    def layer() -> torch.nn.Module:
        parts = {"self_attn": "q_proj", "mlp": "down_proj"}
        return torch.nn.ModuleDict({a: torch.nn.ModuleDict({b: torch.nn.Linear(64, 64)}) for a, b in parts.items()})

    model = torch.nn.ModuleDict({"model": torch.nn.ModuleDict({"layers": torch.nn.ModuleList([layer(), layer()])})})
    LoraModel(model, space["config"], "default")
    modules = dict(model.named_modules())
    for module in found.modules:
        expected = scaling_factor("rora", alpha=module.alpha, rank=32)
        assert modules[module.name].scaling["default"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: Setting(0, 16.0, 1e-3), "rank is 0"),
        (lambda: Setting(8, -1.0, 1e-3), "alpha is -1.0"),
        (lambda: Setting(8, 16.0, 0.0), "learning_rate is 0.0"),
        (lambda: Setting(8, 16.0, 1e-3, optimizer="lion"), "optimizer is 'lion'"),
        (lambda: Setting(8, 16.0, 1e-3, init="pissa"), "init is 'pissa'"),
        (lambda: transfer({"r": 16}, rank=128), "old is {'r': 16}; accepted is a Setting"),
        (lambda: transfer(Setting(8, 16.0, 1e-3), 0), "rank is 0"),
        (lambda: transfer(Setting(8, 16.0, 1e-3), 16, "both"), "regime is 'both'"),
        (lambda: transfer(Setting(8, 16.0, 1e-3), 16, alpha=0.0), "alpha is 0.0"),
        (lambda: transfer(Setting(8, 16.0, 1e-3), 16, takeover=1e-3), "takeover is 0.001 without steps"),
        (lambda: transfer(Setting(8, 16.0, 1e-3), 16, steps=0), "steps is 0"),
        (
            lambda: transfer(Setting(8, 16.0, 1e-3), 16, steps=9),
            "steps is 9 without takeover and p_in; accepted is one",
        ),
        (lambda: transfer(Setting(8, 16.0, 1e-3), 16, steps=1, schedule=[1.0]), "steps is 1 without takeover and p_in"),
        (lambda: transfer(Setting(8, 16.0, 1e-3), 16, steps=10**7 + 1, p_in=9), "accepted is an integer of at most 1"),
        (lambda: transfer(Setting(8, 16.0, 1e-3), 16, steps=9, takeover=math.nan), "takeover is nan"),
        (lambda: transfer(Setting(8, 16.0, 1e-3), 16, steps=9, takeover=1e-3, p_in=9), "takeover is 0.001 and p_in 9"),
        (lambda: transfer(Setting(8, 16.0, 1e-3), 16, steps=9, p_in=0), "p_in is 0"),
        (lambda: transfer(Setting(8, 16.0, 1e-3), 16, steps=9, p_in=9, schedule=[1.0]), "schedule has 1 factors for 9"),
        (
            lambda: transfer(Setting(8, 16.0, 1e-3), 16, {"m": 1.0}, steps=9),
            "steps is 9 with AdamW and the regime meas",
        ),
        (lambda: transfer(Setting(8, 16.0, 1e-3, optimizer="sgd"), 16, steps=9), "steps is 9 with SGD and the regime"),
        (lambda: transfer(Setting(8, 16.0, 1e-3), 16, {}), "regime has no module"),
        (lambda: transfer(Setting(8, 16.0, 1e-3), 16, {"a": 1.0, "m": math.nan}), "linear_term of m is nan"),
        (lambda: transfer(Setting(8, 16.0, 1e-3), 16, {"a": 1.0, "m": -1.0}), "linear_term of m is -1.0"),
        (lambda: transfer(Setting(8, 16.0, 1e-3), 16, {"q": "x"}), "linear_term of q is 'x'"),
        (lambda: transfer(Setting(8, 16.0, 1e-3), 16, {"q": 10**400}), "linear_term of q is 10"),
        (lambda: transfer(Setting(8, 16.0, 1e-3), 16, {3: 1.0}), "regime has the module 3"),
        (lambda: growth(8, 16, "x"), "linear_term is 'x'"),
        (lambda: growth(8, 16, -math.inf), "linear_term is -inf"),
        *[
            (lambda regime=regime: transfer(Setting(8, 16.0, 1e-3), 16, regime), f"regime is {said}; accepted are sig")
            for regime, said in ((None, "None"), (5.0, "5.0"), (["q"], r"\['q'\]"))
        ],
        (lambda: Setting(8, 10**400, 1e-3), "alpha is 10"),
        (lambda: Setting(8, 16.0, 1e-3, optimizer=["adam"]), r"optimizer is \['adam'\]"),
        (lambda: transfer(Setting(8, 1e-100, 1e-3, optimizer="sgd"), 16, alpha=1e100), "alpha is 1e.100 after 1e-100"),
        (lambda: transfer(Setting(8, 4e-323, 1e-3, init="gaussian"), 4), "alpha is 3.95253e-323 after 3.95253e-323"),
        (lambda: transfer(Setting(8, 1.0, 1.0), 8, alpha=5e-323), "alpha is 4.94066e-323 after 1"),
        (lambda: transfer(Setting(8, 16.0, 3e-4), 16).peft_config(target_modules=0.5), "targets .*got 0.5"),
        (lambda: transfer(Setting(8, 16.0, 3e-4), 16).peft_config(target_modules=[3]), r"targets .*got \[3\]"),
        (lambda: transfer(Setting(8, 16.0, 3e-4), 16, steps=3, takeover=1e-300), "takeover.*1e-300"),
        (lambda: transfer(Setting(8, 16.0, 3e-4), 16, steps=3, takeover=5e-324), "takeover.*5e-324"),
        *[
            (lambda bad=bad: transfer(Setting(8, 16.0, 1e-3), 16, steps=2, schedule=bad), f"schedule {said}")
            for bad, said in (
                (0.5, "is 0.5; accepted is a factor"),
                ("ab", "is 'ab'; accepted is a factor"),
                ([1.0, None], r"is \[1.0, None\]; accepted is a factor"),
                ([[1.0], [1.0, 2.0]], r"is \[\[1.0\], \[1.0, 2.0\]\]; accepted is a factor"),
                ([math.nan, -1], "has nan at step 1"),
                ([1.0, -1], "has -1.0 at step 2"),
                ([1.0, math.inf], "has inf at step 2"),
            )
        ],
        *[
            (
                lambda regime=regime, alpha=alpha: transfer(
                    Setting(8, 16.0, 1e-3), 16, regime, alpha=alpha
                ).peft_config(target_modules=["q_proj"], per="foo"),
                "per is 'foo'; accepted are one, type, module",
            )
            for regime in ("signal", {"model.layers.0.q_proj": 1.0})
            for alpha in (None, 8.0)
        ],
        (lambda: transfer(Setting(8, 16.0, 1e-3), 16, {"a": 1.0}).lora_arguments(["type"]), r"per is \['type'\]"),
        (
            lambda: step_ratio(Setting(8, 16.0, 1e-3, optimizer="sgd"), Setting(8, 16.0, 1e-3), 0.0),
            "optimizer is 'sgd' after 'adamw'",
        ),
        (
            lambda: step_ratio(Setting(8, 16.0, 1e-3, init="gaussian"), Setting(8, 16.0, 1e-3), 0.0),
            "init is 'gaussian' after 'kaiming_uniform'",
        ),
        (lambda: growth(0, 8, 0.0), "rank is 0"),
        (lambda: growth(8, 0, 0.0), "rank is 0"),
        (
            lambda: transfer(Setting(8, 16.0, 1e-3, init="normal"), 16).peft_config(target_modules=["q_proj"]),
            "init is 'normal', which PEFT does not have",
        ),
    ],
)
def test_bad_input_is_named(call, said) -> None:
    with pytest.raises(InputError, match=said) as error:
        call()
    assert "\n" not in str(error.value)


def test_headings_say_what_was_tuned() -> None:
    tuned = Setting(8, 16.0, 3e-4)
    start = "Rank 8 to 128, lora, alpha 16, rate 0.0003, adamw, kaiming_uniform; regime: "
    assert transfer(tuned, 128).heading("train") == f"{start}signal, the first row; the other limit is below"
    assert transfer(tuned, 128, {"m": 1.0}).heading("train") == f"{start}measured at 1 module, train tokens"
    said = transfer(replace(tuned, rule=0.25), 64).choices_heading()
    assert said.startswith("Other common choices at rank 64, kappa 0.25 where nothing else is said: the first step, ")


def change(setting: Setting, rate: float, steps: int, start_takeover: float) -> float:
    """gamma r b (s + a s_old / takeover) of sign descent, summed step by step: the law where the signal leads."""
    deviation = 1 / setting.rank if setting.init == "gaussian" else 1.0
    b = a = 0.0
    for _ in range(steps):
        a += rate if b > 0 else 0.0
        b += rate
    return setting.scaling * setting.rank * b * (deviation + a / start_takeover)


@pytest.mark.parametrize("init", ["kaiming_uniform", "gaussian"])
@pytest.mark.parametrize("rule", ["lora", "rora", 0.25])
def test_the_planned_horizon_keeps_the_change(init, rule, monkeypatch) -> None:
    """Against sign descent summed step by step, by alpha and by rate, at a rho where neither part is small."""
    constant = horizon.distances
    monkeypatch.setattr(horizon, "distances", lambda rates, **other: constant(rates, **other | {"decay": None}))
    old = Setting(8, 16.0, 3e-4, "lora", "adamw", init)
    takeover = 3e-3  # at the old rank
    deviation = 1 / 8 if init == "gaussian" else 1.0
    plan = {"steps": 20, "takeover": takeover}
    wanted = change(old, old.learning_rate, 20, takeover / deviation)
    by_rate = transfer(old, 128, rule=rule, alpha=24.0, **plan)
    assert 0.5 < by_rate.plan.rho < 3
    low, high = sorted([by_rate.rates.first_step, by_rate.rates.A_led])
    assert low <= by_rate.rates.planned <= high
    got = change(by_rate.setting, by_rate.rates.planned, 20, takeover / deviation)
    assert got == pytest.approx(wanted, rel=1e-9)  # the two parts are exactly proportional to the rate and its square
    by_alpha = transfer(old, 128, rule=rule, **plan)
    assert by_alpha.learning_rate == old.learning_rate
    assert change(by_alpha.setting, old.learning_rate, 20, takeover / deviation) == pytest.approx(wanted, rel=1e-9)


def test_ends_of_the_horizon() -> None:
    """use_rslora at r = 128: 11.3 and 3.4; alpha / r: all agree; gaussian: gamma first, alpha / r in the end."""
    tuned = Setting(128, 16.0, 3e-4)
    rates = transfer(tuned, 128, rule="rslora", alpha=16.0).rates
    assert (3e-4 / rates.first_step, 3e-4 / rates.A_led) == pytest.approx((128**0.5, 128**0.25))
    assert rates.planned is None
    assert list(transfer(Setting(8, 16.0, 3e-4), 128, steps=9, p_in=576).alphas) == pytest.approx([16.0] * 3)
    gaussian = transfer(Setting(8, 16.0, 3e-4, init="gaussian"), 128).alphas
    assert (gaussian.first_step, gaussian.A_led) == pytest.approx((256.0, 16.0))
    assert transfer(Setting(8, 16.0, 3e-4), 128, {"m": 1.0}).alphas is None


@pytest.mark.parametrize("optimizer", ["sgd", "momentum"])
def test_ends_of_sgd_s_horizon(optimizer) -> None:
    """Gamma^2 r at the first step, gamma alone in a long run; under alpha / r the rate times r' / r serves both."""
    old = Setting(8, 16.0, 3e-4, optimizer=optimizer)
    alphas = transfer(old, 128).alphas
    assert (alphas.first_step, alphas.planned, alphas.A_led) == (pytest.approx(64.0), None, pytest.approx(256.0))
    assert list(transfer(old, 128, alpha=16.0).rates) == [pytest.approx(4.8e-3), None, pytest.approx(4.8e-3)]
    rates = transfer(old, 128, rule="rora", alpha=16.0).rates
    gamma = 16 / 128**0.5
    assert rates.first_step == pytest.approx(3e-4 * 2**2 * 8 / (gamma**2 * 128))
    assert rates.A_led == pytest.approx(3e-4 * 2 / gamma)
    said = transfer(old, 128).sentence()
    assert "set alpha 64 under alpha / r" in said
    assert "The first step asks for this alpha; a long run, where A's motion leads, asks for 256." in said
    assert "Alpha 16 under alpha / r and the rate 0.0048 serve both." in said
    assert "serve both" not in transfer(old, 128, alpha=16.0).sentence()
    assert transfer(old, 128, {"m": 1.0}).alphas is None
    other = transfer(Setting(8, 16.0, 3e-4, "rora", optimizer), 128).sentence()
    strength = 16 / 8**0.5 * 8
    assert f"Alpha {strength:.6g} under alpha / r and the rate 0.0048 serve both." in other


def test_the_first_step_s_end_is_the_first_step_s_advice() -> None:
    """One law by two routes: `step_ratio`, and the horizon's with nothing of A."""
    for init in ("kaiming_uniform", "gaussian"):
        found = transfer(Setting(8, 16.0, 3e-4, init=init), 128, rule="rora", alpha=20.0)
        assert found.rates.first_step == pytest.approx(found.rate_at_alpha, rel=1e-12)
        assert found.alphas.first_step == pytest.approx(found.alpha_at_old_rate, rel=1e-12)


def test_an_assumed_takeover_distance() -> None:
    """1 / (sqrt(3) p_in) under PEFT's default: the closed form for a sample of Gaussian entries, to 5%."""
    plan = transfer(Setting(8, 16.0, 3e-4), 128, steps=16, p_in=4096).plan
    assert plan.takeover == pytest.approx(1 / (math.sqrt(3) * 4096))
    assert plan.is_assumed
    x = np.random.default_rng(0).normal(size=4096)
    exact = math.sqrt(2 / (3 * 4096 * math.pi)) * np.linalg.norm(x) / np.sum(np.abs(x))
    assert exact == pytest.approx(plan.takeover, rel=0.05)  # |x|_1 varies by 1% or so
    gaussian = transfer(Setting(8, 16.0, 3e-4, init="gaussian"), 128, steps=4, p_in=64).plan
    assert gaussian.takeover == pytest.approx(1 / 64), "the deviation 1 / 8 over sqrt(64)"


def test_a_falling_schedule_moves_A_less() -> None:
    asked = {"rule": "rslora", "alpha": 16.0, "steps": 16, "takeover": 3e-3}
    constant, falling = (
        transfer(Setting(8, 16.0, 3e-4), 128, schedule=each, **asked)
        for each in (None, [1 - step / 16 for step in range(16)])
    )
    assert falling.plan.rho < 0.7 * constant.plan.rho
    assert falling.plan.schedule
    assert not constant.plan.schedule


@pytest.mark.parametrize(
    ("setting", "asked", "words"),
    [
        ({}, {}, ["keep alpha 16 under alpha / r", "keep the learning rate 0.0003", "in short and in long runs"]),
        (
            {},
            {"rule": "rslora"},
            [
                "keep alpha 16 under alpha / r, without use_rslora, and keep the learning rate 0.0003.",
                "as alpha 1.41421 with use_rslora, which SGLang, llama.cpp and Ollama serve 11.3 times too weak",
                "`rora portable`",
            ],
        ),
        (
            {},
            {"rule": "rslora", "alpha": 16.0},
            [
                "set alpha 181.019",
                "set the learning rate 4.75e-05",
                "put the rate at 4.4e-05 to 5.1e-05",
                "By the law the first step asks for 2.65e-05, and a long run, where A's motion leads, for 8.92e-05.",
            ],
        ),
        (
            {},
            {"rule": "rslora", "alpha": 16.0, "steps": 50, "takeover": 3e-3},
            [
                "set the learning rate 4.75e-05",
                "By the law 50 steps ask for 7.42e-05: the first step asks for the learning rate 2.65e-05, a long",
                "0.003, is given as measured",
                "rate is taken as constant",
            ],
        ),
        (
            {"init": "gaussian"},
            {"rule": "rslora", "alpha": 16.0},
            ["The first step asks for this learning rate; a long run", "The planned steps and a takeover distance"],
        ),
        ({}, {"rule": "rslora", "alpha": 16.0, "steps": 9, "takeover": 3e-3}, ["the law's at 9 steps", "Measured"]),
        ({}, {"rule": 0.25, "alpha": 16.0, "steps": 50, "p_in": 576}, ["assumed from one sample", "alpha / r^0.25"]),
        ({"optimizer": "momentum"}, {}, ["SGD with momentum", "set alpha 64", "is above 1", "clipping"]),
        ({}, {"regime": {"a": 3.0, "b": 3.0}}, ["measured at 2 modules."]),
        ({}, {"regime": {"a": 3.0}}, ["measured at 1 module.", "each module's first step", "not known"]),
        ({}, {"regime": "cross-talk"}, ["set alpha 64", "assumed: cross-talk"]),
    ],
)
def test_the_sentence_says_what_to_set_and_for_how_long(setting, asked, words) -> None:
    said = transfer(Setting(8, 16.0, 3e-4, **setting), 128, **asked).sentence()
    assert said.startswith("Going from rank 8 to 128 with ")
    for word in words:
        assert word in said


def test_what_was_measured_is_told_where_it_was() -> None:
    """Beside the law under Adam and PEFT's default init: of the rank where gamma r stays, of gamma r where it grows."""
    old = Setting(16, 32.0, 2e-4)
    for advice in (transfer(old, 128), transfer(replace(old, rank=128), 16)):
        assert advice.scope()[-2:] == [MEASURED_RANKS, LONGEST]
    grown = transfer(old, 128, rule="rslora", alpha=32.0)
    low, high = (2e-4 * 128 ** (power / 2) for power in MEASURED_POWERS)
    assert grown.measured_rates == pytest.approx((low, high))
    assert grown.scope()[:2] == [
        f"Measured runs put the rate at {low:.2g} to {high:.2g}; this is the middle.",
        MEASURED_STRENGTHS,
    ]
    assert grown.rates.first_step < low < high < grown.rates.A_led
    far = transfer(old, 512, rule="rslora", alpha=32.0).scope()
    assert MEASURED_STRENGTHS in far
    assert not any("put the rate" in each for each in far), "gamma r grows 22.6 times"
    assert transfer(old, 16, rule="rslora", alpha=8.0).scope()[-1] != LONGEST, "the same adapter"
    for other in (replace(old, optimizer="sgd"), replace(old, init="gaussian")):
        for asked in ({}, {"rule": "rslora", "alpha": 32.0}):
            assert not any("Measured" in each for each in transfer(other, 128, **asked).scope())


@pytest.mark.parametrize("regime", ["signal", "cross-talk", {"a": 3.0}])
def test_the_rate_to_set_is_the_measured_one_where_it_was_measured(regime) -> None:
    """In the sentence, the config and the JSON; the law's where the runs say nothing."""
    old, to = Setting(16, 32.0, 2e-4), {"rule": "rslora", "alpha": 32.0}
    advice = transfer(old, 128, regime, **to)
    if regime != "signal":
        assert (advice.measured_rates, advice.learning_rate) == (None, advice.rate_at_alpha)
        return
    low, high = advice.measured_rates
    assert low < advice.learning_rate < high
    assert advice.learning_rate == pytest.approx(math.sqrt(low * high))
    assert f"# learning rate {advice.learning_rate:.6g}" in advice.peft_config(target_modules=["q_proj"])
    assert advice.as_dict()["learning_rate"] == advice.setting.learning_rate == advice.learning_rate
    planned = {"takeover": 3e-3}
    assert transfer(old, 128, **to, steps=16, **planned).learning_rate == advice.learning_rate
    short = transfer(old, 128, **to, steps=15, **planned)
    assert (short.measured_rates, short.learning_rate) == (None, short.rates.planned)
    falling = transfer(old, 16, alpha=32.0 / 4)
    assert falling.learning_rate == pytest.approx(2e-4 * 4**0.76)
    for other in (replace(old, optimizer="sgd"), replace(old, init="gaussian")):
        assert transfer(other, 128, **to).measured_rates is None
    assert transfer(old, 512, **to).measured_rates is None, "gamma r grows 22.6 times"
    assert transfer(old, 128, alpha=32.0).learning_rate == pytest.approx(2e-4), "gamma r stays"


def test_measured_sentences_state_the_published_exponents() -> None:
    """A power e of a quantity that grows by a factor f multiplies the best rate by f^e; a fall is told as 1 / f^e."""
    published = frames.read_csv(ROOT / "results" / "published" / "horizon" / "exponents.csv")

    def powers(**where: object) -> tuple[float, float]:
        (row,) = frames.rows(frames.where(published, where))
        return row["exponent"], row["half_width"]

    for sentence, grows, where in (
        (MEASURED_RANKS, 16, {"over": "rank", "step": 64, "at": 64, "first": 8}),
        (MEASURED_RANKS, 4, {"over": "rank", "step": 64, "at": 64, "first": 32}),
        (MEASURED_STRENGTHS, 64 / 724, {"over": "strength", "step": 64, "at": 8, "first": 64}),
        (MEASURED_STRENGTHS, 64 / 724, {"over": "strength", "step": 256, "at": 8, "first": 64}),
    ):
        power, half = powers(**where)
        low, high = sorted((grows ** (power - half), grows ** (power + half)))
        assert f"{grows**power:.1f} ({low:.1f} to {high:.1f})" in sentence
    steps = [powers(over="strength", step=step, at=8, first=64)[0] for step in (64, 256)]
    assert pytest.approx(steps, abs=0.005) == MEASURED_POWERS


def test_what_json_gets_is_json() -> None:
    """Strict: no infinity, no name of Python's."""
    for regime in ("cross-talk", {"a": 1.0, "b": math.inf}, "signal"):
        found = transfer(Setting(8, 16.0, 3e-4), 128, regime)
        read = json.loads(json.dumps(found.as_dict(), allow_nan=False))
        assert read["alpha"] == found.alpha
        assert read["new"]["rank"] == 128
        assert [row["name"] for row in read["choices"]] == [row.name for row in found.alternatives()]
    assert read["rates"] == {"first_step": pytest.approx(3e-4), "planned": None, "A_led": pytest.approx(3e-4)}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("small", [np.float32, np.float16, np.float64])
def test_numbers_of_numpy_are_python_s(small) -> None:
    """In the answer, which JSON takes, and in the computation, which is float64 whatever they were."""
    given = {"alpha": small(16), "learning_rate": small(3e-4), "rule": small(0.25)}
    for regime, asked in (
        ({"a": small(1.5), "b": small(math.inf)}, {}),
        ("signal", {"steps": np.int64(2), "takeover": small(3e-3), "schedule": np.array([1, 0.3], small)}),
        ("signal", {"steps": np.int32(3), "p_in": np.int16(576), "rule": small(0.5), "alpha": small(8.1)}),
    ):
        plain = {name: value.tolist() for name, value in asked.items()}
        terms = regime if isinstance(regime, str) else {name: float(term) for name, term in regime.items()}
        found = transfer(Setting(np.int64(8), **given), np.int16(128), regime, **asked)
        own = transfer(Setting(8, **{name: float(value) for name, value in given.items()}), 128, terms, **plain)
        assert json.dumps(found.as_dict(), allow_nan=False) == json.dumps(own.as_dict(), allow_nan=False)
        assert {type(value) for value in vars(found.old).values()} == {int, float, str}


@pytest.mark.usefixtures("unchecked")
def test_a_schedule_of_jax_s_is_read() -> None:
    """As optax gives it, a scalar a step."""
    found = [
        transfer(Setting(8, 16.0, 3e-4), 128, "signal", steps=2, takeover=1e-3, schedule=each)
        for each in ([jnp.float32(1.0), jnp.float32(0.5)], [1.0, 0.5], np.array([1.0, 0.5]))
    ]
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ({}, (8, 8.0, "lora", "kaiming_uniform", None)),
        (
            {"r": 16, "lora_alpha": 32, "use_rslora": True, "target_modules": ["v_proj", "q_proj"]},
            (16, 32.0, "rslora", "kaiming_uniform", ("v_proj", "q_proj")),
        ),
        (
            {"init_lora_weights": "gaussian", "target_modules": "all-linear"},
            (8, 8.0, "lora", "gaussian", ("all-linear",)),
        ),
    ],
)
def test_a_saved_adapter_is_read(tmp_path, entries, expected) -> None:
    (tmp_path / FILE).write_text(json.dumps({"peft_type": "LORA"} | entries))
    for path in (tmp_path, tmp_path / FILE):
        assert read_adapter_config(path)[:5] == expected
        silent = [f"{path.parent / FILE if path.suffix else path / FILE} has no {name}" for name in ("r", "lora_alpha")]
        found = [remark.partition(":")[0] for remark in read_adapter_config(path).remarks]
        assert found == [remark for remark in silent if remark.split()[-1] not in entries]


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"peft_type": "IA3"}, "peft_type .*got 'IA3'"),
        ({"r": 0}, "r must.*got 0"),
        ({"r": True}, "r must.*got True"),
        ({"lora_alpha": -1}, "lora_alpha .*got -1"),
        ({"use_rslora": "yes"}, "use_rslora .*got 'yes'"),
        (
            {"init_lora_weights": "eva"},
            "init_lora_weights .*got 'eva'",
        ),
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights .*got 'lora_ga'"),
        ({"init_lora_weights": False}, "init_lora_weights .*got False"),
        ({"init_lora_weights": 1}, "init_lora_weights .*got 1\\."),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern .*got {'q_proj': 4}"),
        ({"target_modules": ["q_proj", "q_proj"]}, "targets .*got 'q_proj' in 'q_proj q_proj'"),
        ({"target_modules": [3]}, r"target_modules .*got \[3\]"),
        ({"target_modules": "*_proj"}, "targets .*got '\\*_proj' .nothing to repeat at position 0"),
        ({"task_type": "CHAT"}, "task_type .*got 'CHAT'"),
        ({"target_modules": [f"m{i}" for i in range(100_000)]}, "'target_modules' .*got 100,000"),
    ],
)
def test_a_saved_adapter_without_a_law_is_named(tmp_path, entries, said) -> None:
    (tmp_path / FILE).write_text(json.dumps({"peft_type": "LORA"} | entries))
    with pytest.raises(InputError, match=said) as error:
        read_adapter_config(tmp_path)
    assert FILE in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_not_carried_over_is_remarked(tmp_path) -> None:
    text = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "use_dora": True, "target_modules": ".*proj", "new": 1}
    (tmp_path / FILE).write_text(json.dumps(text))
    saved = read_adapter_config(tmp_path)
    assert (saved.targets, saved.expression, saved.others) == (None, ".*proj", {"use_dora": True})
    assert [remark.split()[0] for remark in saved.remarks] == ["use_dora", "new"]


def test_an_assumed_regime_has_no_pattern_and_one_module_has_its_own() -> None:
    """All modules alike need no pattern; a measured one is named, even where it is alone."""
    old = Setting(rank=8, alpha=16, learning_rate=1e-3, optimizer="sgd")
    assert transfer(old, 32).alpha_pattern("type") == {}
    assert transfer(old, 32, {"model.layers.0.mlp.up_proj": 3.0}).alpha_pattern("type").keys() == {"up_proj"}


def test_sgd_s_scope_names_its_regime() -> None:
    old = Setting(rank=8, alpha=16, learning_rate=1e-3, optimizer="sgd")
    assert "This takes both ranks to be above the crossing rank" in transfer(old, 32).sentence()
    cross = transfer(old, 32, "cross-talk").sentence()
    assert "the regime is assumed: cross-talk" in cross
    assert cross.endswith("clipping of the gradient changes the law.")


def test_groups_are_over_all_modules_and_by_type() -> None:
    """Geometric means with their ends; an assumed regime has one group."""
    terms = {"model.layers.0.q_proj": 0.0, "model.layers.1.q_proj": 5.0, "model.layers.0.up_proj": 50.0}
    advice = transfer(Setting(8, 16.0, 3e-4), 128, terms)
    every, q_proj, up_proj = advice.groups()
    assert [every.name, q_proj.name, up_proj.name] == ["all modules", "q_proj", "up_proj"]
    alphas = [module.alpha for module in advice.modules]
    assert q_proj.alpha == pytest.approx((math.sqrt(alphas[0] * alphas[1]), min(alphas[:2]), max(alphas[:2])))
    assert every.unchanged.smallest == up_proj.unchanged.mean < every.unchanged.largest == q_proj.unchanged.largest
    assert advice.by_type() == {"q_proj": q_proj.alpha.mean, "up_proj": up_proj.alpha.mean}
    (only,) = transfer(Setting(8, 16.0, 3e-4), 128).groups()
    assert (only.name, only.alpha) == ("all modules", pytest.approx((16.0, 16.0, 16.0)))


def test_a_fixed_alpha_stays_fixed() -> None:
    """It has no pattern beside it, and in both limits the rate makes up for it."""
    old = Setting(8, 16.0, 3e-4)
    assert transfer(old, 128, {"a.q_proj": 1.0, "b.v_proj": 9.0}, alpha=8.0).lora_arguments()["alpha_pattern"] == {}
    found = transfer(old, 128, rule="rslora", alpha=24.0).groups_by_regime()
    for group in found:
        (own,) = transfer(old, 128, group.name, rule="rslora", alpha=24.0).groups()
        assert group.learning_rate.mean == own.learning_rate.mean
    assert [group.name for group in found] == ["signal", "cross-talk"]
