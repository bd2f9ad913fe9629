"""Carrying alpha and the learning rate to another rank: against the exact law, in closed cases, as PEFT reads it."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rora_theory import InputError, scaling_factor
from rora_theory.adapter_config import FILE
from rora_theory.adapters import LoraConfig
from rora_theory.advice import measured, text
from rora_theory.advice.lora_config import read_adapter_config
from rora_theory.advice.measured import STEPS_EXPONENTS, default_displacement_constants
from rora_theory.advice.setting import CROSS_TALK, SIGNAL, Setting, growth, step_ratio
from rora_theory.advice.transfer import transfer
from rora_theory.io import frames
from rora_theory.llama import LlamaConfig
from rora_theory.theory import displacement, laws

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
    fixed, fixed_rs = steps["alpha = 32, unchanged"], steps["alpha = 32, unchanged, use_rslora"]
    assert fixed.step.mean == pytest.approx(1)
    assert fixed_rs.step.mean == pytest.approx(16)  # sqrt(256)
    assert steps["alpha = 2r"].step.mean == pytest.approx(16)
    assert steps["alpha = r"].step.mean == pytest.approx(8)
    assert steps["alpha = 2r, use_rslora"].step.mean == pytest.approx(16**2)  # gamma 2 -> 2 sqrt(256)
    in_modules = transfer(Setting(16, 32.0, 2e-4), 256, {"a": 0.0, "b": 1e12}).alternatives()[0]
    assert in_modules.step == pytest.approx((0.5, 0.25, 1.0))  # the geometric mean, and the ends
    assert in_modules.learning_rate == pytest.approx(4e-4)


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
        (lambda: Setting(0, 16.0, 1e-3), "rank .*got 0"),
        (lambda: Setting(8, -1.0, 1e-3), "alpha .*got -1.0"),
        (lambda: Setting(8, 16.0, 0.0), "learning_rate .*got 0.0"),
        (lambda: Setting(8, 16.0, 1e-3, optimizer="lion"), "optimizer .*got 'lion'"),
        (lambda: Setting(8, 16.0, 1e-3, init="pissa"), "init .*got 'pissa'"),
        (lambda: transfer({"r": 16}, rank=128), "old must be a Setting.*'r': 16"),
        (lambda: transfer(Setting(8, 16.0, 1e-3), 0), "rank .*got 0"),
        (lambda: transfer(Setting(8, 16.0, 1e-3), 16, "both"), "regime must be .*'both'"),
        (lambda: transfer(Setting(8, 16.0, 1e-3), 16, alpha=0.0), "alpha .*got 0.0"),
        (lambda: transfer(Setting(8, 16.0, 1e-3), 16, steps=0), "steps.*0"),
        (lambda: transfer(Setting(8, 16.0, 1e-3), 16, steps=9, to_steps=1.5), "to_steps.*1.5"),
        (lambda: transfer(Setting(8, 16.0, 1e-3), 16, to_steps=9), "steps must be given together with to_steps.*9"),
        (lambda: transfer(Setting(8, 16.0, 1e-3), 16, schedule="triangle"), "schedule.*'triangle'"),
        (lambda: transfer(Setting(8, 16.0, 1e-3), 16, to_schedule="cosine"), "schedule must be given.*'cosine'"),
        (lambda: transfer(Setting(8, 16.0, 1e-3), 16, displacement_constant=-1.0), "displacement_constant.*-1.0"),
        (lambda: transfer(Setting(8, 16.0, 1e-3), 16, displacement_constant=math.nan), "displacement_constant.*nan"),
        (lambda: transfer(Setting(8, 16.0, 1e-3), 16, {"m": 1.0}, steps=9), "steps.*AdamW.*measured.*9"),
        (lambda: transfer(Setting(8, 16.0, 1e-3, optimizer="sgd"), 16, steps=9), "steps.*SGD.*signal.*9"),
        (
            lambda: transfer(Setting(8, 16.0, 1e-3, init="gaussian"), 16, schedule="linear"),
            "schedule.*gaussian.*linear",
        ),
        (lambda: transfer(Setting(8, 16.0, 1e-3), 16, {}), "regime must have at least one module"),
        (lambda: transfer(Setting(8, 16.0, 1e-3), 16, {"a": 1.0, "m": math.nan}), "linear_term of m .*nan"),
        (lambda: transfer(Setting(8, 16.0, 1e-3), 16, {"a": 1.0, "m": -1.0}), "linear_term of m .*-1.0"),
        (lambda: transfer(Setting(8, 16.0, 1e-3), 16, {"q": "x"}), "linear_term of q .*'x'"),
        (lambda: transfer(Setting(8, 16.0, 1e-3), 16, {"q": 10**400}), "linear_term of q .*10"),
        (lambda: transfer(Setting(8, 16.0, 1e-3), 16, {3: 1.0}), "regime must have names.*3"),
        (lambda: growth(8, 16, "x"), "linear_term .*'x'"),
        (lambda: growth(8, 16, -math.inf), "linear_term .*-inf"),
        *[
            (lambda regime=regime: transfer(Setting(8, 16.0, 1e-3), 16, regime), f"regime must be .*{said}")
            for regime, said in ((None, "None"), (5.0, "5.0"), (["q"], r"\['q'\]"))
        ],
        (lambda: Setting(8, 10**400, 1e-3), "alpha .*got 10"),
        (lambda: Setting(8, 16.0, 1e-3, optimizer=["adam"]), r"optimizer .*got \['adam'\]"),
        (lambda: transfer(Setting(8, 1e-100, 1e-3, optimizer="sgd"), 16, alpha=1e100), "alpha .*1e-100.*1e.100"),
        (lambda: transfer(Setting(8, 4e-323, 1e-3, init="gaussian"), 4), "alpha .*3.95253e-323"),
        (lambda: transfer(Setting(8, 1.0, 1.0), 8, alpha=5e-323), "alpha .*4.94066e-323"),
        (lambda: transfer(Setting(8, 16.0, 3e-4), 16).peft_config(target_modules=0.5), "targets .*got 0.5"),
        (lambda: transfer(Setting(8, 16.0, 3e-4), 16).peft_config(target_modules=[3]), r"targets .*got \[3\]"),
        *[
            (
                lambda regime=regime, alpha=alpha: transfer(
                    Setting(8, 16.0, 1e-3), 16, regime, alpha=alpha
                ).peft_config(target_modules=["q_proj"], per="foo"),
                "per must be one of one, type, module, got 'foo'",
            )
            for regime in ("signal", {"model.layers.0.q_proj": 1.0})
            for alpha in (None, 8.0)
        ],
        (
            lambda: transfer(Setting(8, 16.0, 1e-3), 16, {"a": 1.0}).lora_arguments(["type"]),
            r"per must be .*\['type'\]",
        ),
        (
            lambda: step_ratio(Setting(8, 16.0, 1e-3, optimizer="sgd"), Setting(8, 16.0, 1e-3), 0.0),
            "optimizer .*'adamw'.*'sgd'",
        ),
        (
            lambda: step_ratio(Setting(8, 16.0, 1e-3, init="gaussian"), Setting(8, 16.0, 1e-3), 0.0),
            "init .*'kaiming_uniform'.*'gaussian'",
        ),
        (lambda: growth(0, 8, 0.0), "rank .*got 0"),
        (lambda: growth(8, 0, 0.0), "rank .*got 0"),
        (
            lambda: transfer(Setting(8, 16.0, 1e-3, init="normal"), 16).peft_config(target_modules=["q_proj"]),
            "init must be one that PEFT has.*'normal'",
        ),
    ],
)
def test_bad_input_is_named(call, said) -> None:
    with pytest.raises(InputError, match=said) as error:
        call()
    assert "\n" not in str(error.value)


def test_headings_say_what_was_tuned() -> None:
    tuned = Setting(8, 16.0, 3e-4)
    start = "Rank 8 to 128, lora, alpha 16, rate 0.0003, adamw, kaiming_uniform; regime "
    assert text.describe_tuned(transfer(tuned, 128, "cross-talk"), "train") == f"{start}assumed: cross-talk"
    measured = transfer(tuned, 128, {"m": 1.0})
    assert text.describe_tuned(measured, "train") == f"{start}measured at 1 module, train tokens"
    heading = text.describe_alternatives(transfer(replace(tuned, rule=0.25), 64))
    assert heading == "Learning rate for common choices at rank 64, under kappa 0.25 unless stated"


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
@pytest.mark.parametrize("rule", ["lora", "rora", 0.25])
@given(st.integers(1, 4096), st.floats(1.0, 1e3), st.integers(1, 10**5), st.integers(1, 10**5))
def test_the_rate_is_the_displacement_law_s(optimizer, rule, rank, alpha, steps, to_steps) -> None:
    """At any rank, alpha and number of steps, with the default constants of both numbers of steps."""
    old = Setting(16, 32.0, 2e-4, optimizer=optimizer)
    advice = transfer(old, rank, rule=rule, alpha=alpha, steps=steps, to_steps=to_steps)
    ranges = [default_displacement_constants(count) for count in (steps, to_steps)]
    expected = displacement.carry_rate(
        2e-4,
        old_strength=32.0,
        new_strength=scaling_factor(rule, alpha=alpha, rank=rank) * rank,
        displacement_constants=(min(low for low, _ in ranges), max(high for _, high in ranges)),
        old_steps=steps,
        new_steps=to_steps,
        steps_exponents=STEPS_EXPONENTS,
    )
    assert advice.rate_range == pytest.approx(expected, rel=1e-9)
    assert advice.learning_rate == advice.rate_range.best
    assert advice.alpha == alpha


def test_alpha_2r_at_both_ranks() -> None:
    """The most common habit: scaling 2 at ranks 16 and 128 divides the rate by 3.2 to 6.2."""
    old = Setting(16, 32.0, 2e-4)
    advice = transfer(old, 128, alpha=256.0)
    row = next(row for row in advice.alternatives() if row.name == "alpha = 2r")
    assert tuple(row.divisor) == pytest.approx((4.9, 3.2, 6.2), abs=0.05)
    assert row.learning_rate == pytest.approx(advice.learning_rate, rel=1e-12)
    # 16 is one of the ranks that the law carries to itself: nothing changes.
    same = next(row for row in transfer(old, 16).alternatives() if row.name == "alpha = 2r")
    assert same.divisor == pytest.approx((1.0, 1.0, 1.0))


def test_one_s_own_constant_takes_the_place_of_the_published_ones() -> None:
    """A range is left, since the coherence of the steps is not known; with K = 0 the first step's rate is exact."""
    old = Setting(16, 32.0, 2e-4)
    advice = transfer(old, 128, alpha=256.0, displacement_constant=100.0)
    ends = [
        2e-4 * displacement.best_rate_factor(32.0, 256.0, displacement_constant=100.0, coherence=coherence)
        for coherence in (1.0, 2.0)
    ]
    assert advice.rate_range == pytest.approx((ends[0], ends[0], ends[1]))
    assert "with the given K = 100," in advice.sentence()
    frozen = transfer(old, 128, alpha=256.0, displacement_constant=0.0)
    assert frozen.rate_range == pytest.approx((2.5e-5,) * 3)


def test_four_times_the_steps_halve_the_rate() -> None:
    """Also where alpha is free, and in the other direction."""
    old = Setting(16, 32.0, 2e-4)
    longer, shorter = transfer(old, 128, steps=64, to_steps=256), transfer(old, 128, steps=256, to_steps=64)
    assert (longer.alpha, longer.learning_rate) == (32.0, pytest.approx(1e-4))
    assert shorter.learning_rate == pytest.approx(4e-4)
    assert "multiply the learning rate by 2," in shorter.sentence()
    assert "fewer steps than the tuned one were not compared" in shorter.sentence()
    assert longer.rate_range.low < longer.learning_rate < longer.rate_range.high
    same = transfer(old, 128, steps=64)
    assert (same.run.to_steps, same.learning_rate) == (64, 2e-4)


def test_a_schedule_that_was_not_measured_is_named(monkeypatch) -> None:
    """It leaves the rate alone; once there is a factor, the rate and its range include it."""
    old, to = Setting(16, 32.0, 2e-4), {"schedule": "constant", "to_schedule": "cosine"}
    advice = transfer(old, 128, **to)
    assert advice.learning_rate == 2e-4
    assert "from constant to cosine was not measured and is left out of the rate" in advice.sentence()
    assert "with this schedule" in advice.sentence()
    assert "schedule" not in transfer(old, 128, schedule="constant").sentence()
    assert "not with this schedule" in transfer(old, 128, schedule="linear").sentence()
    monkeypatch.setitem(measured.MEASURED_SCHEDULE_FACTORS, "cosine", (1.2, 2.0))
    advice = transfer(old, 128, **to)
    assert advice.rate_range == pytest.approx((2e-4 * 1.2, 2e-4 * math.sqrt(2.4), 2e-4 * 2.0))
    back = transfer(old, 128, schedule="cosine", to_schedule="constant")
    assert back.rate_range == pytest.approx((2e-4 / 2.0, 2e-4 / math.sqrt(2.4), 2e-4 / 1.2))


def test_the_cost_is_the_published_one() -> None:
    """Of the pairs that differ in the same settings, by the law, or by keeping the rate if only the rank changes."""
    published = frames.read_csv(ROOT / "results" / "published" / "horizon" / "policies.csv")
    old = Setting(16, 32.0, 2e-4)
    for asked, changed, policy in (
        ({"rank": 128}, "rank", "keep the rate"),
        ({"rank": 16, "alpha": 64.0}, "strength", "displacement"),
        ({"rank": 128, "alpha": 256.0}, "rank strength", "displacement"),
        ({"rank": 16, "steps": 16, "to_steps": 64}, "steps", "displacement and steps"),
        ({"rank": 128, "steps": 16, "to_steps": 64}, "rank steps", "displacement and steps"),
        ({"rank": 128, "alpha": 256.0, "steps": 16, "to_steps": 64}, "rank strength steps", "displacement and steps"),
    ):
        advice = transfer(old, **asked)
        (row,) = frames.rows(frames.where(published, {"changed": changed, "policy": policy}))
        assert advice.measured_cost == (row["pairs"], row["median"], row["largest"], row["largest_error"])
        assert f"at most {row['largest']:.4f} nats per token ({row['pairs']} pairs" in advice.sentence()
    assert transfer(old, 16).measured_cost is None
    assert "cost" not in transfer(old, 16).sentence()
    assert "cost 0.14." in advice.sentence(), "use_rslora at the tuned rate"


def test_what_lies_outside_the_measured_range_is_named() -> None:
    inside = transfer(Setting(16, 32.0, 2e-4), 128, alpha=256.0, steps=16, to_steps=256)
    assert inside.outside == ()
    assert "Outside" not in inside.sentence()
    outside = transfer(Setting(256, 8.0, 2e-4), 512, alpha=1024.0, steps=8, to_steps=5000)
    assert outside.outside == (
        "rank 256 and 512 (measured: 1 to 128)",
        "scaling times rank 8 and 1024 (measured: 16 to 724)",
        "steps 8 and 5000 (measured: 16 to 256)",
    )
    assert f"Outside the measured range: {'; '.join(outside.outside)}." in outside.sentence()
    # use_rslora with alpha 64 at rank 128 is the published 724, up to rounding.
    assert transfer(Setting(8, 64.0, 2e-4), 128, rule="rslora", alpha=64.0).outside == ()
    assert "a lower rank than the tuned one were not compared" in transfer(Setting(128, 32.0, 2e-4), 16).sentence()


def test_limits_of_the_first_step_and_of_a_long_run() -> None:
    """With A's deviation 1 / r the first step asks for a constant scaling, and a long run for a constant alpha."""
    gaussian = transfer(Setting(8, 16.0, 3e-4, init="gaussian"), 128).alpha_limits
    assert (gaussian.first_step, gaussian.long_run) == pytest.approx((256.0, 16.0))
    rates = transfer(Setting(8, 16.0, 3e-4, init="gaussian"), 128, alpha=256.0).rate_limits
    assert (rates.first_step, rates.long_run) == pytest.approx((3e-4, 3e-4 / 4))
    for regime in ("signal", "cross-talk", {"m": 1.0}):
        assert transfer(Setting(8, 16.0, 3e-4), 128, regime).alpha_limits is None
        assert transfer(Setting(8, 16.0, 3e-4), 128, regime).rate_limits is None
    assert transfer(Setting(8, 16.0, 3e-4, init="gaussian"), 128).rate_range is None


@pytest.mark.parametrize("optimizer", ["sgd", "momentum"])
def test_limits_under_sgd(optimizer) -> None:
    """Gamma^2 r at the first step, gamma alone in a long run; under alpha / r the rate times r' / r suits both."""
    old = Setting(8, 16.0, 3e-4, optimizer=optimizer)
    assert transfer(old, 128).alpha_limits == pytest.approx((64.0, 256.0))
    assert transfer(old, 128, alpha=16.0).rate_limits == pytest.approx((4.8e-3, 4.8e-3))
    rates = transfer(old, 128, rule="rora", alpha=16.0).rate_limits
    gamma = 16 / 128**0.5
    assert rates.first_step == pytest.approx(3e-4 * 2**2 * 8 / (gamma**2 * 128))
    assert rates.long_run == pytest.approx(3e-4 * 2 / gamma)
    sentence = transfer(old, 128).sentence()
    assert "set lora_alpha=64 and keep the learning rate 0.0003." in sentence
    assert "a long run, where the motion of A dominates, lora_alpha=256 preserves the change." in sentence
    assert "lora_alpha=16 and the learning rate 0.0048 suit both." in sentence
    assert "The page on SGD" in sentence
    assert "and the change in a long run" in transfer(old, 128, alpha=16.0).sentence()
    assert transfer(old, 128, {"m": 1.0}).alpha_limits is None
    other = transfer(Setting(8, 16.0, 3e-4, "rora", optimizer), 128).sentence()
    strength = 16 / 8**0.5 * 8
    assert f"lora_alpha={strength:.6g} and the learning rate 0.0048 suit both." in other


def test_the_first_step_s_limit_is_the_first_step_s_advice() -> None:
    """One law by two routes: `step_ratio` of the signal, and the modules'."""
    for other in ({"init": "gaussian"}, {"optimizer": "sgd"}):
        advice = transfer(Setting(8, 16.0, 3e-4, **other), 128, rule="rora", alpha=20.0)
        assert advice.rate_limits.first_step == pytest.approx(advice.rate_at_alpha, rel=1e-12)
        assert advice.alpha_limits.first_step == pytest.approx(advice.alpha_at_old_rate, rel=1e-12)


@pytest.mark.parametrize(
    ("setting", "asked", "words"),
    [
        ({}, {}, ["keep lora_alpha=16 and the learning rate 0.0003."]),
        (
            {},
            {"rule": "rslora"},
            [
                "keep lora_alpha=16 without use_rslora and the learning rate 0.0003.",
                "as lora_alpha=1.41421 with use_rslora, which SGLang, llama.cpp and Ollama serve 11.3 times too weak",
                "`rora portable`",
            ],
        ),
        (
            {},
            {"rule": "rslora", "alpha": 16.0},
            [
                "set lora_alpha=181.019 without use_rslora and divide the learning rate by 5.73, to 5.23e-05 (range",
                "displacement law with the measured K = 16.6 to 210 (Gemma 3 270M and SmolLM2-135M), as",
                "scaling times rank goes from 16 to 181.",
                "narrower if the number of steps is given",
            ],
        ),
        ({}, {"rule": "rslora", "alpha": 16.0, "steps": 50}, ["with the measured K = 16.9"]),
        ({"rule": "rslora"}, {}, ["set lora_alpha=45.2548 without use_rslora and keep the learning rate 0.0003."]),
        ({}, {"alpha": 8.0}, ["multiply the learning rate by 1.52, to"]),
        ({}, {"rule": 0.25, "alpha": 16.0}, ["the same adapter as alpha 16 under alpha / r^0.25."]),
        ({"init": "gaussian"}, {"alpha": 16.0}, ["multiply the learning rate by 16, to 0.0048.", "gaussian were not"]),
        ({"optimizer": "momentum"}, {}, ["SGD with momentum", "set lora_alpha=64", "exceeds 1", "Clipping"]),
        ({}, {"regime": {"a": 3.0, "b": 3.0}}, ["measured at 2 modules."]),
        ({}, {"regime": {"a": 3.0}}, ["measured at 1 module.", "each module's first update", "not covered"]),
        ({}, {"regime": "cross-talk"}, ["set lora_alpha=64", "assumed: cross-talk"]),
    ],
)
def test_the_sentence_answers_first(setting, asked, words) -> None:
    advice = transfer(Setting(8, 16.0, 3e-4, **setting), 128, **asked)
    sentence = advice.sentence()
    assert sentence.startswith("From rank 8 to 128 with ")
    assert sentence == f"{advice.answer()} {advice.details()}"
    for word in words:
        assert word in sentence


@pytest.mark.parametrize("regime", ["signal", "cross-talk", {"a": 3.0}])
def test_the_rate_is_one_everywhere(regime) -> None:
    """In the numbers, the config and the JSON."""
    advice = transfer(Setting(16, 32.0, 2e-4), 128, regime, rule="rslora", alpha=32.0)
    if regime != "signal":
        assert (advice.rate_range, advice.learning_rate) == (None, advice.rate_at_alpha)
    assert f"# learning rate {advice.learning_rate:.6g}" in advice.peft_config(target_modules=["q_proj"])
    assert advice.as_dict()["learning_rate"] == advice.setting.learning_rate == advice.learning_rate


def test_what_json_gets_is_json() -> None:
    """Strict: no infinity, no name of Python's."""
    for regime in ("cross-talk", {"a": 1.0, "b": math.inf}, "signal"):
        found = transfer(Setting(8, 16.0, 3e-4), 128, regime)
        read = json.loads(json.dumps(found.as_dict(), allow_nan=False))
        assert read["alpha"] == found.alpha
        assert read["new"]["rank"] == 128
        assert [row["name"] for row in read["choices"]] == [row.name for row in found.alternatives()]
    assert read["rate_range"] == pytest.approx({"low": 3e-4, "best": 3e-4, "high": 3e-4})
    assert read["measured_cost"]["pairs"] == found.measured_cost.pairs
    assert read["choices"][0]["divisor"] == pytest.approx({"mean": 1.0, "smallest": 1.0, "largest": 1.0})


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("small", [np.float32, np.float16, np.float64])
def test_numbers_of_numpy_are_python_s(small) -> None:
    """In the answer, which JSON takes, and in the computation, which is float64 whatever they were."""
    given = {"alpha": small(16), "learning_rate": small(3e-4), "rule": small(0.25)}
    for regime, asked in (
        ({"a": small(1.5), "b": small(math.inf)}, {}),
        ("signal", {"steps": np.int64(20), "to_steps": np.int16(90), "displacement_constant": small(96)}),
        ("signal", {"steps": np.int32(3), "rule": small(0.5), "alpha": small(8.1)}),
    ):
        plain = {name: value.tolist() for name, value in asked.items()}
        terms = regime if isinstance(regime, str) else {name: float(term) for name, term in regime.items()}
        found = transfer(Setting(np.int64(8), **given), np.int16(128), regime, **asked)
        own = transfer(Setting(8, **{name: float(value) for name, value in given.items()}), 128, terms, **plain)
        assert json.dumps(found.as_dict(), allow_nan=False) == json.dumps(own.as_dict(), allow_nan=False)
        assert {type(value) for value in vars(found.old).values()} == {int, float, str}


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
    assert (saved.targets, saved.expression, saved.other_entries) == (None, ".*proj", {"use_dora": True})
    assert [remark.split()[0] for remark in saved.remarks] == ["use_dora", "new"]


def test_an_assumed_regime_has_no_pattern_and_one_module_has_its_own() -> None:
    """All modules alike need no pattern; a measured one is named, even where it is alone."""
    old = Setting(rank=8, alpha=16, learning_rate=1e-3, optimizer="sgd")
    assert transfer(old, 32).alpha_pattern("type") == {}
    assert transfer(old, 32, {"model.layers.0.mlp.up_proj": 3.0}).alpha_pattern("type").keys() == {"up_proj"}


def test_cross_talk_under_sgd_names_its_regime() -> None:
    old = Setting(rank=8, alpha=16, learning_rate=1e-3, optimizer="sgd")
    assert "assumed to be above the crossing rank" in transfer(old, 32).sentence()
    sentence = transfer(old, 32, "cross-talk").sentence()
    assert "the regime is assumed: cross-talk" in sentence
    assert "suit both" not in sentence


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
