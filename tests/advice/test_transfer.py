"""Transfer of alpha and the learning rate to another rank: the exact law, closed cases, and PEFT's reading."""

import json
import math
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.tiny import WIDE

from rora_theory import InputError, laws, scaling_factor
from rora_theory.advice import text
from rora_theory.advice.adapter_config import FILE
from rora_theory.advice.best_rate import Run, transfer_rate
from rora_theory.advice.constants import CONSTANTS, EVIDENCE, GROWTH
from rora_theory.advice.setting import CROSS_TALK, SIGNAL, Setting, rank_growth, step_ratio
from rora_theory.advice.trainer_configs import read_trainer_config
from rora_theory.advice.transfer import transfer
from rora_theory.lab.adapters import LoraConfig

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
    """Compute the law's root mean square of w, in the sign limit."""
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
    """Compute the linear term from the law at ranks 1 and 2, with gamma held: E(2) / E(1) = (4 + 2c) / (1 + c)."""
    # The law of the Gaussian shape at a deviation that does not depend on the rank is that of ``normal``.
    init = "normal" if setting.init == "gaussian" else "kaiming_uniform"
    first, second = (replace(setting, rank=rank, alpha=1.0, rule=0.0, init=init) for rank in (1, 2))
    ratio = (rms(second, grad, x) / rms(first, grad, x)) ** 2
    return (4 - ratio) / (ratio - 2)


@pytest.fixture(scope="module")
def layer() -> tuple[np.ndarray, np.ndarray]:
    """Return a gradient of two samples, and inputs that overlap with one of them."""
    random = np.random.default_rng(0)
    x = random.normal(size=(2, 24))
    grad = random.normal(size=(5, 2)) @ x
    return grad, np.concatenate([x, 0.3 * x[:1] + random.normal(size=(3, 24))])


@pytest.mark.parametrize("init", ["kaiming_uniform", "gaussian"])
@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam", "adamw"])
@pytest.mark.parametrize("rule", ["lora", "rora", 0.25])
def test_step_ratio_is_the_law_s(layer, init, optimizer, rule) -> None:
    """The ratio is exact for any rule, optimizer and init, so the transferred alpha and rate preserve the old step."""
    old = Setting(8, 16.0, 3e-4, rule, optimizer, init)
    new = replace(old, rank=128, alpha=5.0, learning_rate=1e-3)
    c = linear_term(old, *layer)
    # The tolerance is that of the integral for a uniform distribution under Adam.
    assert step_ratio(new, old, c) == pytest.approx(rms(new, *layer) / rms(old, *layer), rel=1e-6)
    advice = transfer(old, 128, {"m": c})
    for change in ({"alpha": advice.alpha_at_old_rate}, {"learning_rate": advice.rate_at_alpha}):
        assert rms(replace(advice.unchanged, **change), *layer) == pytest.approx(rms(old, *layer), rel=1e-6)


@given(settings, ranks, linear_terms)
def test_changing_either_alpha_or_the_rate_preserves_the_step(old: Setting, rank: int, c: float) -> None:
    advice = transfer(old, rank, {"m": c})
    by_alpha = replace(advice.unchanged, alpha=advice.alpha_at_old_rate)
    by_rate = replace(advice.unchanged, learning_rate=advice.rate_at_alpha)
    assert [step_ratio(new, old, c) for new in (by_alpha, by_rate)] == pytest.approx([1, 1], rel=1e-9)
    assert transfer(by_alpha, old.rank, {"m": c}).alpha == pytest.approx(old.alpha, rel=1e-9)


@given(ranks, ranks, st.floats(0, 1e6))
def test_growth_lies_between_its_limits(old: int, new: int, c: float) -> None:
    low, high = sorted([rank_growth(old, new, CROSS_TALK), rank_growth(old, new, SIGNAL)])
    assert low * (1 - 1e-12) <= rank_growth(old, new, c) <= high * (1 + 1e-12)


@pytest.mark.parametrize(
    ("optimizer", "regime", "rule", "alpha"),
    [  # alpha changes by 16^(kappa of the rule - kappa that preserves the step)
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
def test_optimizers_and_regimes_in_closed_form(optimizer, regime, rule, alpha) -> None:
    advice = transfer(Setting(8, 16.0, 3e-4, rule, optimizer), 128, regime)
    assert advice.alpha == pytest.approx(alpha, rel=1e-12)
    # SGD's step has the square of gamma and the rate once: the rate changes by the square of alpha's factor.
    power = 2 if FAMILY[optimizer] == "sgd" else 1
    assert advice.rate_at_alpha == pytest.approx(3e-4 * (alpha / 16) ** power, rel=1e-12)


def test_common_choices() -> None:
    """In Adam's signal regime LoRA's step is gamma r; rsLoRA multiplies it by sqrt(r), alpha = 2r by gamma."""
    old = Setting(16, 32.0, 2e-4, "lora", "adamw")
    steps = {choice.name: choice.step.mean for choice in transfer(old, 256).alternatives()}
    expected = {
        "alpha = 32, unchanged": 1,
        "alpha = 32, unchanged, use_rslora": 16,  # sqrt(256)
        "alpha = 2r": 16,
        "alpha = r": 8,
        "alpha = 2r, use_rslora": 16**2,  # gamma 2 -> 2 sqrt(256)
    }
    assert {name: steps[name] for name in expected} == pytest.approx(expected)
    assert len(steps) == 6
    in_modules = transfer(old, 256, {"a": 0.0, "b": 1e12}).alternatives()[0]
    assert in_modules.step == pytest.approx((0.5, 0.25, 1.0))  # the geometric mean, and the ends
    assert in_modules.learning_rate == pytest.approx(4e-4)


MEASURED = {
    f"model.layers.{layer}.{module}": 2.0 + 7 * layer + 3 * position
    for layer in range(2)
    for position, module in enumerate(("self_attn.q_proj", "mlp.down_proj"))
}


def written(text: str) -> dict:
    """Return the keyword arguments that the snippet passes, as Python reads them."""
    space: dict = {}
    exec(text.replace("from peft import LoraConfig", "LoraConfig = dict"), space)
    return space["config"]


@pytest.mark.parametrize("rule", ["lora", "rora", 0.25])
@pytest.mark.parametrize("per", ["one", "type", "module"])
def test_snippet_gives_every_module_its_scaling(rule, per) -> None:
    """This package matches PEFT's patterns module by module; six digits are written."""
    advice = transfer(Setting(4, 16.0, 3e-4, rule), 32, MEASURED)
    source = advice.peft_config(target_modules=["q_proj", "down_proj"], per=per)
    config = written(source)
    assert (config["r"], config["init_lora_weights"], config["task_type"]) == (32, True, "CAUSAL_LM")
    comments = {"lora": "", "rora": f"  # the same adapter as {advice.alpha:.6g} with use_rslora=True"}
    comments[0.25] = f"  # alpha / r with the gamma of {advice.alpha:.6g} / r^0.25"
    assert f"lora_alpha={advice.lora_alpha:.6g},{comments[rule]}\n" in source
    assert config["use_rslora"] is False, "several servers ignore it"
    lora = LoraConfig(
        rank=config["r"],
        alpha=config["lora_alpha"],
        rule="lora",
        target_modules=config["target_modules"],
        alpha_pattern=config.get("alpha_pattern", {}),
    )
    alphas = {module.name: module.alpha for module in advice.modules}
    modules = []
    for row in lora.table(WIDE):
        first, _, last = row.layers.partition("-")
        for layer in range(int(first), int(last or first) + 1):
            name = f"model.layers.{layer}.{row.module}"
            groups = {"one": list(alphas), "type": [n for n in alphas if n.endswith(row.module)], "module": [name]}
            alpha = math.exp(np.mean([math.log(alphas[member]) for member in groups[per]]))
            assert row.scaling == pytest.approx(scaling_factor(rule, alpha=alpha, rank=32), rel=1e-5)
            modules.append(name)
    assert sorted(modules) == sorted(MEASURED)


@pytest.mark.slow
def test_snippet_works_in_peft() -> None:
    """The snippet is executed as printed, and PEFT's own scaling of each module is checked on a torch model."""
    torch = pytest.importorskip("torch")
    LoraModel = pytest.importorskip("peft.tuners.lora").LoraModel
    advice = transfer(Setting(4, 16.0, 3e-4, "rora"), 32, MEASURED)
    space: dict = {}
    exec(advice.peft_config(target_modules=["q_proj", "down_proj"], per="module"), space)

    def layer() -> torch.nn.Module:
        parts = {"self_attn": "q_proj", "mlp": "down_proj"}
        return torch.nn.ModuleDict({a: torch.nn.ModuleDict({b: torch.nn.Linear(64, 64)}) for a, b in parts.items()})

    model = torch.nn.ModuleDict({"model": torch.nn.ModuleDict({"layers": torch.nn.ModuleList([layer(), layer()])})})
    LoraModel(model, space["config"], "default")
    modules = dict(model.named_modules())
    for module in advice.modules:
        expected = scaling_factor("rora", alpha=module.alpha, rank=32)
        assert modules[module.name].scaling["default"] == pytest.approx(expected, rel=1e-5)


OLD = Setting(8, 16.0, 1e-3)
SGD, GAUSSIAN = replace(OLD, optimizer="sgd"), replace(OLD, init="gaussian")


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Setting(0, 16.0, 1e-3), "rank .*got 0"),
        (lambda: Setting(8, -1.0, 1e-3), "alpha .*got -1.0"),
        (lambda: Setting(8, 10**400, 1e-3), "alpha .*got 10"),
        (lambda: Setting(8, 16.0, 0.0), "learning_rate .*got 0.0"),
        (lambda: Setting(8, 16.0, 1e-3, optimizer="lion"), "optimizer .*got 'lion'"),
        (lambda: Setting(8, 16.0, 1e-3, optimizer=["adam"]), r"optimizer .*got \['adam'\]"),
        (lambda: Setting(8, 16.0, 1e-3, init="pissa"), "init .*got 'pissa'"),
        (lambda: transfer({"r": 16}, rank=128), "old .*Setting.*'r': 16"),
        (lambda: transfer(OLD, 0), "rank .*got 0"),
        (lambda: transfer(OLD, 16, alpha=0.0), "alpha .*got 0.0"),
        (lambda: transfer(OLD, 16, steps=0), "steps.*0"),
        (lambda: transfer(OLD, 16, steps=9, to_steps=1.5), "to_steps.*1.5"),
        (lambda: transfer(OLD, 16, to_steps=9), "steps .*to_steps.*9"),
        (lambda: transfer(OLD, 16, schedule="triangle"), "schedule.*'triangle'"),
        (lambda: transfer(OLD, 16, to_schedule="cosine"), "schedule .*to_schedule.*'cosine'"),
        (lambda: transfer(OLD, 16, displacement_constant=-1.0), "displacement_constant.*-1.0"),
        (lambda: transfer(OLD, 16, displacement_constant=math.nan), "displacement_constant.*nan"),
        (lambda: transfer(OLD, 16, {"m": 1.0}, steps=9), "steps.*AdamW.*measured.*9"),
        (lambda: transfer(SGD, 16, steps=9), "steps.*SGD.*signal.*9"),
        (lambda: transfer(GAUSSIAN, 16, schedule="linear"), "schedule.*gaussian.*linear"),
        (lambda: transfer(OLD, 16, "both"), "regime .*'both'"),
        (lambda: transfer(OLD, 16, ["q"]), r"regime .*\['q'\]"),
        (lambda: transfer(OLD, 16, {}), "regime .*module.*empty"),
        (lambda: transfer(OLD, 16, {"a": 1.0, "m": math.nan}), "linear_term of m .*nan"),
        (lambda: transfer(OLD, 16, {"a": 1.0, "m": -1.0}), "linear_term of m .*-1.0"),
        (lambda: transfer(OLD, 16, {"q": 10**400}), "linear_term of q .*10"),
        (lambda: transfer(OLD, 16, {3: 1.0}), "regime .*names.*3"),
        (lambda: rank_growth(8, 16, "x"), "linear_term .*'x'"),
        (lambda: rank_growth(8, 16, -math.inf), "linear_term .*-inf"),
        (lambda: rank_growth(0, 8, 0.0), "rank .*got 0"),
        (lambda: rank_growth(8, 0, 0.0), "rank .*got 0"),
        (lambda: step_ratio(SGD, OLD, 0.0), "optimizer .*'adamw'.*'sgd'"),
        (lambda: step_ratio(GAUSSIAN, OLD, 0.0), "init .*'kaiming_uniform'.*'gaussian'"),
        # An alpha beyond the range of floats, at the end and on the way.
        (lambda: transfer(replace(SGD, alpha=1e-100), 16, alpha=1e100), "alpha .*1e-100.*1e.100"),
        (lambda: transfer(replace(GAUSSIAN, alpha=4e-323), 4), "alpha .*3.95253e-323"),
        (lambda: transfer(Setting(8, 1.0, 1.0), 8, alpha=5e-323), "alpha .*4.94066e-323"),
        (lambda: transfer(OLD, 16).peft_config(target_modules=[3]), r"targets .*got \[3\]"),
        (lambda: transfer(OLD, 16).lora_arguments("foo"), "per .*one, type, module, got 'foo'"),
        (lambda: transfer(OLD, 16, {"q": 1.0}, alpha=8.0).lora_arguments(["type"]), r"per .*\['type'\]"),
        (
            lambda: transfer(replace(OLD, init="normal"), 16).lora_arguments(),
            "init .*PEFT.*'normal'",
        ),
    ],
)
def test_bad_input_is_named(call, message) -> None:
    with pytest.raises(InputError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_a_validated_setting_is_immutable() -> None:
    advice = transfer(OLD, 16)
    for value in (OLD, advice, advice.run, advice.alternatives()[0]):
        with pytest.raises(FrozenInstanceError):
            value.rank = 0


def test_headings_state_the_tuned_setting() -> None:
    tuned = Setting(8, 16.0, 3e-4)
    start = "Rank 8 to 128, lora, alpha 16, rate 0.0003, adamw, kaiming_uniform; regime "
    assert text.describe_tuned(transfer(tuned, 128, "cross-talk"), "train") == f"{start}assumed: cross-talk"
    measured = transfer(tuned, 128, {"m": 1.0})
    assert text.describe_tuned(measured, "train") == f"{start}measured at 1 module, train tokens"
    heading = text.describe_alternatives(transfer(replace(tuned, rule=0.25), 64))
    assert heading == "Learning rate for common choices at rank 64, under kappa 0.25 unless stated"


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
@pytest.mark.parametrize("rule", ["lora", "rora", 0.25])
@given(st.integers(1, 4096), st.floats(1.0, 1e3), st.integers(1, 10**5), st.integers(1, 10**5), st.integers(1, 10**4))
def test_the_rate_is_that_of_the_best_rate_s_law(optimizer, rule, rank, alpha, steps, to_steps, batch_size) -> None:
    old = Setting(16, 32.0, 2e-4, optimizer=optimizer)
    run = {"steps": steps, "to_steps": to_steps, "batch_size": 8, "to_batch_size": batch_size}
    advice = transfer(old, rank, rule=rule, alpha=alpha, schedule="constant", to_schedule="cosine", **run)
    gain = scaling_factor(rule, alpha=alpha, rank=rank) * rank
    expected = transfer_rate(2e-4, Run(16, 32.0, steps, "constant", 8), Run(rank, gain, to_steps, "cosine", batch_size))
    assert advice.rate_range == pytest.approx(expected, rel=1e-9)
    assert advice.learning_rate == advice.rate_range.best
    assert advice.alpha == alpha


@given(settings, st.integers(1, 4096), st.integers(1, 4096), st.floats(0.1, 1e3), st.floats(0.1, 1e3))
def test_a_change_there_and_back_is_the_identity(setting, rank, third_rank, alpha, third_alpha) -> None:
    """So is a path: over a third rank and alpha, the same rate results."""
    old = replace(setting, optimizer="adamw", init="kaiming_uniform")
    there = transfer(old, rank, alpha=alpha).setting
    back = transfer(there, old.rank, alpha=old.alpha).setting
    assert back.learning_rate == pytest.approx(old.learning_rate, rel=1e-9)
    third = transfer(old, third_rank, alpha=third_alpha).setting
    assert transfer(third, rank, alpha=alpha).learning_rate == pytest.approx(there.learning_rate, rel=1e-9)


def test_at_one_gain_the_rate_follows_the_rank() -> None:
    """Eight times the rank asks for 1.39 times the rate, in either direction, and alpha is kept under alpha / r."""
    old = Setting(16, 32.0, 2e-4)
    up, down = transfer(old, 128), transfer(replace(old, rank=128), 16)
    factor = 8 ** CONSTANTS["rank_exponent"].value
    assert (up.alpha, down.alpha) == (32.0, 32.0)
    assert up.learning_rate == pytest.approx(2e-4 * factor)
    assert down.learning_rate == pytest.approx(2e-4 / factor)
    assert 1.3 < factor < 1.5
    assert up.rate_range.low < 2.3e-4, "keeping the rate nearly lies in the range"


def test_alpha_2r_at_both_ranks() -> None:
    """The most common habit: scaling 2 at ranks 16 and 128."""
    old = Setting(16, 32.0, 2e-4)
    advice = transfer(old, 128, alpha=256.0)
    row = next(row for row in advice.alternatives() if row.name == "alpha = 2r")
    assert row.learning_rate == pytest.approx(advice.learning_rate, rel=1e-12)
    assert row.rate_range == pytest.approx(advice.rate_range)
    assert 3 < 2e-4 / row.learning_rate < 4
    # 16 is one of the ranks that the law carries to itself: nothing changes.
    same = next(row for row in transfer(old, 16).alternatives() if row.name == "alpha = 2r")
    assert same.rate_range == pytest.approx((2e-4, 2e-4, 2e-4))


def test_a_custom_constant_replaces_the_published_one() -> None:
    """With K = 0 the rate is the first step's, times the factor of the rank."""
    old = Setting(16, 32.0, 2e-4)
    frozen = transfer(old, 128, alpha=256.0, displacement_constant=0.0)
    assert frozen.learning_rate == pytest.approx(2.5e-5 * 8 ** CONSTANTS["rank_exponent"].value)
    assert "with the given K = 0" in frozen.sentence()
    assert frozen.learning_rate < transfer(old, 128, alpha=256.0).learning_rate


def test_more_steps_lower_the_rate_by_a_power_of_their_number() -> None:
    """This also holds where alpha is free, and in the other direction."""
    old = Setting(16, 32.0, 2e-4)
    longer, shorter = transfer(old, 16, steps=64, to_steps=256), transfer(old, 16, steps=256, to_steps=64)
    factor = 4 ** CONSTANTS["steps_exponent"].value
    assert 0.6 < factor < 0.8
    assert (longer.alpha, longer.learning_rate) == (32.0, pytest.approx(2e-4 * factor))
    assert shorter.learning_rate == pytest.approx(2e-4 / factor)
    assert longer.rate_range.low < longer.learning_rate < longer.rate_range.high
    same = transfer(old, 16, steps=64)
    assert (same.run.to_steps, same.learning_rate) == (64, 2e-4)


def test_a_larger_batch_takes_a_higher_rate() -> None:
    old = Setting(16, 32.0, 2e-4)
    advice = transfer(old, 16, batch_size=4, to_batch_size=64)
    exponent = CONSTANTS["batch_exponent"].value
    assert advice.learning_rate == pytest.approx(2e-4 * 16**exponent)
    assert 0 < exponent < 0.6, "below the square root's 0.5 or near it"
    assert "from batches of 4 to 64" in advice.sentence()
    with pytest.raises(InputError, match=r"batch_size .*to_batch_size 64"):
        transfer(old, 16, to_batch_size=64)


def test_a_schedule_that_was_not_measured_is_named() -> None:
    """It does not change the rate. A schedule with a measured factor changes the rate and its range."""
    old, to = Setting(16, 32.0, 2e-4), {"schedule": "constant", "to_schedule": "cosine"}
    advice = transfer(old, 16, schedule="constant", to_schedule="linear")
    assert advice.learning_rate == 2e-4
    assert "from constant to linear was not measured and is left out of the rate" in advice.sentence()
    published = transfer(old, 16, **to)
    assert published.rate_range.low > 1.5 * 2e-4, "the best peak rate is higher than the best constant one"
    assert "schedule" not in transfer(old, 16, schedule="constant").sentence()
    back = transfer(old, 16, schedule="cosine", to_schedule="constant")
    assert back.learning_rate * published.learning_rate == pytest.approx(2e-4**2)


def test_the_cost_is_the_published_regret() -> None:
    """It is that of a change of the rank alone, of the gain, of the steps and of the batch; no change has none."""
    old = Setting(16, 32.0, 2e-4)
    rank, gain = transfer(old, 128).sentence(), transfer(old, 128, alpha=256.0).sentence()
    assert f"{EVIDENCE['fixed_gain_all_ranks']['keep']:.4f} at most; this advice" in rank
    # The gain grows eight times, from 32 to 256.
    assert f"{GROWTH['8']['keep']:.3f} at most; this advice {GROWTH['8']['advice_mean']:.4f}" in gain
    assert f"{GROWTH['4']['keep']:.3f} at most" in transfer(old, 128, alpha=128.0).sentence()
    assert f"cost {EVIDENCE['use_rslora']['regret']:.2f}." in gain
    assert "use_rslora" not in transfer(old, 128, alpha=8.0).sentence(), "the gain falls"
    assert "cost" not in transfer(old, 16).sentence()
    longer = transfer(old, 16, steps=64, to_steps=256).sentence()
    larger = transfer(old, 16, batch_size=4, to_batch_size=64).sentence()
    of_steps = [f"{EVIDENCE[name]['mean']:.3f}" for name in ("steps_keep", "steps_advice")]
    of_steps += [f"{EVIDENCE['steps_keep']['largest']:.2f} in a pair", f"{EVIDENCE['steps_advice']['largest']:.3f}."]
    of_steps += [f"{EVIDENCE[f'steps_{name}']['power']:.2f}" for name in ("steepest", "flattest")]
    of_batch = [f"{EVIDENCE['batch_keep']['regret']:.3f} nats", f"{EVIDENCE['batch_advice']['regret']:.4f}"]
    assert all(number in longer for number in of_steps)
    assert "steeper in the two larger ones" in longer
    assert all(number in larger for number in of_batch)
    assert of_steps[0] not in larger
    assert of_batch[0] not in longer
    assert longer.startswith("At rank 16, from 64 to 256 steps with AdamW")
    evidence, fixed, moved = text.describe_evidence(), EVIDENCE["fixed_gain"], EVIDENCE["alpha_r"]
    assert f"{fixed['runs']:,} public runs of {fixed['models']} models" in evidence
    assert f"cost at most {fixed['keep']:.4f} nats" in evidence
    assert f"this advice {moved['advice_mean']:.4f} and {moved['advice']:.4f}." in evidence


def test_ranges_under_cosine_decay_are_said_to_be_narrow() -> None:
    tested = EVIDENCE["cosine"]
    remark = f"held {tested['in_stated_range']} of {tested['ratios']} ratios"
    by_whole_curves = f"and {EVIDENCE['cosine_whole_curve']['in_stated_range']} by whole curves"
    old = Setting(16, 32.0, 2e-4)
    assert by_whole_curves in transfer(old, 128, schedule="cosine").sentence()
    assert remark in transfer(old, 128, schedule="cosine").sentence()
    assert remark in transfer(old, 128, schedule="constant", to_schedule="cosine").sentence()
    assert remark not in transfer(old, 128, schedule="linear").sentence()


def test_a_tuned_run_with_the_flag_is_not_taken_to_be_without_it() -> None:
    assert "taken to be" not in transfer(Setting(64, 16.0, 2e-4, rule="rslora"), 256).sentence()


def test_values_outside_the_measured_range_are_named() -> None:
    inside = transfer(Setting(16, 32.0, 2e-4), 128, alpha=256.0, steps=64, to_steps=256)
    assert inside.outside == ()
    assert "Outside" not in inside.sentence()
    outside = transfer(Setting(256, 0.5, 2e-4), 512, alpha=4096.0, steps=8, to_steps=50_000)
    assert [phrase.partition(" (")[0] for phrase in outside.outside] == [
        "rank 512", "scaling times rank 0.5 and 4096", "steps 8 and 50000",
    ]  # fmt: skip
    assert f"Outside the measured range: {'; '.join(outside.outside)}." in outside.sentence()
    # use_rslora with alpha 64 at rank 128 is the published 724, up to rounding.
    assert transfer(Setting(8, 64.0, 2e-4), 128, rule="rslora", alpha=64.0).outside == ()


@pytest.mark.parametrize(
    ("old", "alpha", "value"),
    [(1e-320, None, "1e-320"), (1e-307, None, "1e-307"), (1e-300, 1e-307, "1e-307"), (1e-307, 1e-300, "1e-307")],
)
def test_an_alpha_that_is_too_small_for_the_law_is_named(old, alpha, value) -> None:
    with pytest.raises(InputError, match=f"^alpha .* {value}:"):
        _ = transfer(Setting(8, old, 1e-3), 16, alpha=alpha).learning_rate
    assert transfer(Setting(8, 1e-305, 1e-3), 16).learning_rate == pytest.approx(
        1e-3 * 2 ** CONSTANTS["rank_exponent"].value
    )


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
    """The first step preserves gamma^2 r and a long run gamma. Under alpha / r the rate times r' / r suits both."""
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
    # With the initialisation of standard deviation 1/r, other values suit both.
    gaussian = Setting(8, 16.0, 3e-4, optimizer=optimizer, init="gaussian")
    suggested = replace(gaussian, rank=128, alpha=4096.0, learning_rate=1.875e-5)
    assert step_ratio(suggested, gaussian, SIGNAL) == pytest.approx(1)
    assert suggested.scaling * suggested.learning_rate == pytest.approx(2 * 3e-4)
    assert "lora_alpha=4096 and the learning rate 1.87e-05 suit both." in transfer(gaussian, 128).sentence()
    other = transfer(Setting(8, 16.0, 3e-4, "rora", optimizer), 128).sentence()
    gain = 16 / 8**0.5 * 8
    assert f"lora_alpha={gain:.6g} and the learning rate 0.0048 suit both." in other


@pytest.mark.parametrize(
    ("setting", "new", "words"),
    [
        ({}, {}, ["keep lora_alpha=16 and multiply the learning rate by 1.5"]),
        (
            {},
            {"rule": "rslora"},
            [
                "keep lora_alpha=16 without use_rslora and multiply the learning rate by 1.5",
                "To keep use_rslora, set lora_alpha=1.41421 with it",
                "SGLang, llama.cpp and Ollama ignore the flag and serve it 11.3 times too weak",
                "The tuned run is taken to be without use_rslora",
                "`rora portable`",
            ],
        ),
        (
            {},
            {"rule": "rslora", "alpha": 16.0},
            [
                "set lora_alpha=181.019 without use_rslora and divide the learning rate by 3.",
                "Scaling times rank goes from 16 to 181,",
                f"displacement law with the published K = {CONSTANTS['displacement_constant'].value:.0f}",
            ],
        ),
        ({"rule": "rslora"}, {}, ["set lora_alpha=45.2548 without use_rslora and multiply the learning rate by 1.5"]),
        ({}, {"alpha": 8.0}, ["multiply the learning rate by 2."]),
        ({}, {"rule": 0.25, "alpha": 16.0}, ["the same adapter as alpha 16 under alpha / r^0.25."]),
        ({"init": "gaussian"}, {"alpha": 16.0}, ["multiply the learning rate by 16, to 0.0048.", "gaussian were not"]),
        ({"optimizer": "momentum"}, {}, ["SGD with momentum", "set lora_alpha=64", "exceeds 1", "Clipping"]),
        ({}, {"regime": {"a": 3.0, "b": 3.0}}, ["measured at 2 modules."]),
        ({}, {"regime": {"a": 3.0}}, ["measured at 1 module.", "each module's first update", "not covered"]),
        ({}, {"regime": "cross-talk"}, ["set lora_alpha=64", "assumed: cross-talk"]),
    ],
)
def test_the_sentence_begins_with_the_answer(setting, new, words) -> None:
    advice = transfer(Setting(8, 16.0, 3e-4, **setting), 128, **new)
    sentence = advice.sentence()
    assert sentence.startswith("From rank 8 to 128 with ")
    assert sentence == f"{advice.answer()} {advice.details()}"
    for word in words:
        assert word in sentence


@pytest.mark.parametrize("regime", ["signal", "cross-talk", {"a": 3.0}])
def test_all_outputs_state_the_same_rate(regime) -> None:
    """The numbers, the config and the JSON state the same rate."""
    advice = transfer(Setting(16, 32.0, 2e-4), 128, regime, rule="rslora", alpha=32.0)
    if regime != "signal":
        assert (advice.rate_range, advice.learning_rate) == (None, advice.rate_at_alpha)
    assert f"# learning rate {advice.learning_rate:.6g}" in advice.peft_config(target_modules=["q_proj"])
    assert advice.as_dict()["learning_rate"] == advice.setting.learning_rate == advice.learning_rate


def test_json_output_is_strict_json() -> None:
    """The output is strict JSON: it has no infinity and no Python names."""
    for regime in ("cross-talk", {"a": 1.0, "b": math.inf}, "signal"):
        advice = transfer(Setting(8, 16.0, 3e-4), 128, regime)
        read = json.loads(json.dumps(advice.as_dict(), allow_nan=False))
        assert read["alpha"] == advice.alpha
        assert read["new"]["rank"] == 128
        assert [row["name"] for row in read["choices"]] == [row.name for row in advice.alternatives()]
    assert read["rate_range"] == pytest.approx(advice.rate_range._asdict())
    assert read["choices"][0]["learning_rate"] == pytest.approx(advice.learning_rate)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("small", [np.float32, np.float16, np.float64])
def test_numpy_numbers_are_converted(small) -> None:
    """The answer has JSON types, and the computation is in float64."""
    setting = {"alpha": small(16), "learning_rate": small(3e-4), "rule": small(0.25)}
    plain_setting = {name: float(value) for name, value in setting.items()}
    for regime, new in (
        ({"a": small(1.5), "b": small(math.inf)}, {}),
        ("signal", {"steps": np.int64(20), "to_steps": np.int16(90), "displacement_constant": small(96)}),
        ("signal", {"steps": np.int32(3), "rule": small(0.5), "alpha": small(8.1)}),
    ):
        plain_new = {name: value.tolist() for name, value in new.items()}
        terms = regime if isinstance(regime, str) else {name: float(term) for name, term in regime.items()}
        advice = transfer(Setting(np.int64(8), **setting), np.int16(128), regime, **new)
        plain = transfer(Setting(8, **plain_setting), 128, terms, **plain_new)
        assert json.dumps(advice.as_dict(), allow_nan=False) == json.dumps(plain.as_dict(), allow_nan=False)
        assert {type(value) for value in vars(advice.old).values()} == {int, float, str}


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
        assert read_trainer_config(path)[:5] == expected
        remarks = [remark.partition(":")[0] for remark in read_trainer_config(path).remarks]
        defaults = [name for name in ("r", "lora_alpha") if name not in entries]
        assert remarks == [f"{tmp_path / FILE} has no {name}" for name in defaults]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type .*got 'IA3'"),
        ({"r": 0}, r"\br .*got 0"),
        ({"r": True}, r"\br .*got True"),
        ({"lora_alpha": -1}, "lora_alpha .*got -1"),
        ({"use_rslora": "yes"}, "use_rslora .*got 'yes'"),
        ({"init_lora_weights": "eva"}, "init_lora_weights .*got 'eva'"),
        ({"init_lora_weights": False}, "init_lora_weights .*got False"),
        ({"init_lora_weights": 1}, "init_lora_weights .*got 1\\."),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern .*got {'q_proj': 4}"),
        ({"target_modules": ["q_proj", "q_proj"]}, "targets .*got 'q_proj' in 'q_proj q_proj'"),
        ({"target_modules": [3]}, r"target_modules .*got \[3\]"),
        ({"target_modules": "*_proj"}, "targets .*got '\\*_proj' .nothing to repeat at position 0"),
        ({"task_type": "CHAT"}, "task_type .*got 'CHAT'"),
    ],
)
def test_a_saved_adapter_without_a_law_is_named(tmp_path, entries, message) -> None:
    (tmp_path / FILE).write_text(json.dumps({"peft_type": "LORA"} | entries))
    with pytest.raises(InputError, match=message) as error:
        read_trainer_config(tmp_path)
    assert FILE in str(error.value)
    assert "\n" not in str(error.value)


def test_entries_that_are_not_carried_over_get_a_remark(tmp_path) -> None:
    text = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "use_dora": True, "target_modules": ".*proj", "new": 1}
    (tmp_path / FILE).write_text(json.dumps(text))
    saved = read_trainer_config(tmp_path)
    assert (saved.targets, saved.expression, saved.other_entries) == (None, ".*proj", {"use_dora": True})
    assert [remark.split()[0] for remark in saved.remarks] == ["use_dora", "new"]


def test_sgd_names_its_regime_and_a_measured_one_has_a_pattern() -> None:
    """In an assumed regime all modules are alike and need no pattern; a single measured module has one."""
    assert transfer(SGD, 32).alpha_pattern("type") == {}
    assert transfer(SGD, 32, {"model.layers.0.mlp.up_proj": 3.0}).alpha_pattern("type").keys() == {"up_proj"}
    assert "assumed to be above the crossing rank" in transfer(SGD, 32).sentence()
    sentence = transfer(SGD, 32, "cross-talk").sentence()
    assert "the regime is assumed: cross-talk" in sentence
    assert "suit both" not in sentence


def test_groups_are_over_all_modules_and_by_type() -> None:
    """Groups have geometric means with their ends; an assumed regime has one group."""
    terms = {"model.layers.0.q_proj": 0.0, "model.layers.1.q_proj": 5.0, "model.layers.0.up_proj": 50.0}
    advice = transfer(Setting(8, 16.0, 3e-4), 128, terms)
    every, q_proj, up_proj = advice.groups()
    assert [every.name, q_proj.name, up_proj.name] == ["all modules", "q_proj", "up_proj"]
    alphas = [module.alpha for module in advice.modules]
    assert q_proj.alpha == pytest.approx((math.sqrt(alphas[0] * alphas[1]), min(alphas[:2]), max(alphas[:2])))
    assert every.step_ratio.smallest == up_proj.step_ratio.mean < every.step_ratio.largest == q_proj.step_ratio.largest
    assert advice.by_type() == {"q_proj": q_proj.alpha.mean, "up_proj": up_proj.alpha.mean}
    (only,) = transfer(Setting(8, 16.0, 3e-4), 128).groups()
    assert (only.name, only.alpha) == ("all modules", pytest.approx((16.0, 16.0, 16.0)))


def test_a_fixed_alpha_stays_fixed() -> None:
    """The configuration has no alpha pattern, and in both limits the rate compensates."""
    old = Setting(8, 16.0, 3e-4)
    assert transfer(old, 128, {"a.q_proj": 1.0, "b.v_proj": 9.0}, alpha=8.0).lora_arguments()["alpha_pattern"] == {}
    groups = transfer(old, 128, rule="rslora", alpha=24.0).groups_by_regime()
    for group in groups:
        (in_regime,) = transfer(old, 128, group.name, rule="rslora", alpha=24.0).groups()
        assert group.learning_rate.mean == in_regime.learning_rate.mean
    assert [group.name for group in groups] == ["signal", "cross-talk"]
