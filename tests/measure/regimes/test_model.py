"""The regime of a PyTorch model: every module's G is autograd's for all kinds of model, and the model is unchanged."""

import subprocess
import sys
import weakref
from copy import deepcopy
from dataclasses import replace
from mmap import mmap
from statistics import geometric_mean

import numpy as np
import pandas as pd
import pytest
from support import torch_models
from support.torch_models import padded, peft, torch, transformers

from rora_theory import InputError, Setting, transfer
from rora_theory.advice.best_rate import Run, transfer_rate
from rora_theory.measure import hooks, regime, tokens
from rora_theory.measure.batches import MasksByShape
from rora_theory.measure.modules import linear_modules, linear_size, select_modules, without_adapters
from rora_theory.measure.regimes import model as torch_regimes
from rora_theory.measure.regimes import terms
from rora_theory.measure.regimes.module_regime import RegimeConfig

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers and peft
SMALL = RegimeConfig(ranks=(1, 4), rules=("lora",), inits=("gaussian",), rows=0, tokens=9)
BATCHES = torch_models.batch(seed=0), torch_models.batch(seed=1)


def run_backward(model, modules, loss, calls=None) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the loss and G of every module, as the hooks compute it."""
    grads: dict[str, torch.Tensor] = {}
    calls = calls or dict.fromkeys(modules, 1)
    value = hooks.backward(model, modules, loss, calls, lambda name, grad, _: grads.__setitem__(name, grad))
    return value, grads


def gradients(model, batch) -> dict[str, torch.Tensor]:
    """Return G of every module that a pass of the model calls."""
    modules = select_modules(model, None)
    calls: dict[str, int] = {}
    hooks.read_modules(
        modules, lambda: float(model(**batch).loss), lambda name, _: calls.update({name: calls.get(name, 0) + 1})
    )
    return run_backward(model, modules, lambda: model(**batch).loss, calls)[1]


def autograd(model, batch) -> dict[str, torch.Tensor]:
    """Return the gradient of every linear module's weight, [p_out, p_in], of a plain backward pass."""
    copied = deepcopy(model).requires_grad_(True)
    copied(**batch).loss.backward()
    is_transposed = transformers.pytorch_utils.Conv1D
    return {
        name: module.weight.grad.T if isinstance(module, is_transposed) else module.weight.grad
        for name, module in select_modules(copied, None).items()
    }


def assert_same(grads, expected, tolerance=2e-5) -> None:
    """Compare to the rounding of float32 sums, relative to each gradient's largest entry."""
    assert set(grads) == set(expected) != set()
    for name, grad in expected.items():
        scale = float(grad.abs().max())
        torch.testing.assert_close(grads[name].float(), grad.float(), rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("family", torch_models.CONFIGS)
def test_every_family(family) -> None:
    """G is autograd's, the modules are those that PEFT adapts with all-linear, and every figure is finite."""
    model = torch_models.model(family)
    batch, held_out = (torch_models.batch(family, seed) for seed in (0, 1))
    assert_same(gradients(model, batch), autograd(model, batch))
    measured = regime(model, batch, held_out, config=replace(SMALL, exact=True))
    adapted = torch_models.adapted(deepcopy(model), target_modules="all-linear", task_type=measured.task_type)
    tuners = {  # experts that lie in one parameter are no linear modules
        name.removeprefix("base_model.model.")
        for name, module in adapted.named_modules()
        if isinstance(module, peft.tuners.lora.Linear)
    }
    assert set(measured.crossings["module"]) == tuners
    assert measured.left_out == {}
    has_experts = any(".experts." in name for name in tuners)  # transformers 4
    assert (measured.unmasked != ()) == (family == "vit" or has_experts)
    for frame, columns in (
        (measured.crossings, ["signal", "cross_talk", "crossing_rank", "linear_term"]),
        (measured.results, ["predicted"]),
        (measured.crossing_distances, ["crossing_distance"]),
    ):
        figures = frame[columns].to_numpy()
        assert np.isfinite(figures).all()
        assert (figures > (-1 if "linear_term" in columns else 0)).all()
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert measured.training_loss == pytest.approx(float(model(**batch).loss), rel=1e-6)
    assert measured.held_out_loss == pytest.approx(float(model(**held_out).loss), rel=1e-6)


class Calls(torch.nn.Module):
    """Model with a linear module that runs twice, two that share a weight, and experts that are not reached."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.twice = torch.nn.Linear(6, 6)
        self.first, self.second = torch.nn.Linear(6, 5), torch.nn.Linear(6, 5)
        self.second.weight = self.first.weight
        self.experts = torch.nn.ModuleList([torch.nn.Linear(6, 4) for _ in range(3)])

    def forward(self, x):
        x = torch.tanh(self.twice(torch.tanh(self.twice(x))))
        self.experts[0](x)  # no loss depends on it
        self.experts[1](x[None, :0])
        y = self.first(x)
        y.mul_(0.5)  # in place, after the hook has seen it
        return y + 0 * self.experts[2](x).sum() + 2 * self.second(torch.sin(x))


def test_modules_run_twice_sharing_a_weight_or_not_reached() -> None:
    """A module's G is the sum over its calls.

    Two modules of one weight have separate G, which add up to the weight's. Modules that no token or no gradient
    reaches are named and left out.
    """
    model = Calls()
    batch, held_out = {"x": torch.randn(7, 6)}, {"x": torch.randn(8, 6)}

    def loss(model, batch):
        return model(batch["x"]).square().mean()

    modules = {name: getattr(model, name) for name in ("twice", "first", "second")}
    value, grads = run_backward(model, modules, lambda: loss(model, batch), {"twice": 2, "first": 1, "second": 1})
    loss(model, batch).backward()
    torch.testing.assert_close(grads["twice"], model.twice.weight.grad)
    torch.testing.assert_close(grads["first"] + grads["second"], model.first.weight.grad)
    assert not torch.allclose(grads["first"], grads["second"])
    measured = regime(model, batch, held_out, loss=loss, config=SMALL)
    assert measured.training_loss == pytest.approx(value)
    left_out = {"experts.0": "no gradient", "experts.1": "no held-out token", "experts.2": "no gradient"}
    assert measured.left_out == left_out
    assert set(measured.crossings["module"]) == set(modules)
    counts = measured.tokens.set_index(["module", "split"])[["all", "read"]]
    assert tuple(counts.loc[("twice", "train")]) == (14, 9)
    assert tuple(counts.loc[("first", "heldout")]) == (8, 8)

    def uneven(model, batch):
        return loss(model, batch) + (loss(model, batch) if len(batch["x"]) == 7 else 0)

    with pytest.raises(InputError, match=r"second .*held-out batch .*1"):
        regime(model, batch, held_out, loss=uneven, config=SMALL)
    # More calls in the held-out batch are no fault: its gradient is not computed.
    signals = [
        regime(model, held_out, batch, loss=function, config=SMALL).crossings.query("split == 'train'")["signal"]
        for function in (uneven, loss)
    ]
    np.testing.assert_allclose(*signals, rtol=1e-6)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant) -> None:
    """G is the same although a block's inputs are dropped and computed again, also for a frozen model."""
    model, batch = torch_models.model(), BATCHES[0]
    expected = autograd(model, batch)
    model.requires_grad_(False).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    # Remove transformers' own help for frozen embeddings, which not every model has.
    model.get_input_embeddings()._forward_hooks.clear()
    assert model.is_gradient_checkpointing
    assert_same(gradients(model, batch), expected)


def test_one_gradient_at_a_time(monkeypatch) -> None:
    """When a module's G is computed, the others' are freed, and its inputs are freed right after."""
    model = torch_models.model()
    modules = select_modules(model, None)
    gradients: list[weakref.ref] = []
    keepers: list[weakref.ref] = []
    apply = hooks._SavedInput.apply

    def recorded(*arguments) -> torch.Tensor:
        output = apply(*arguments)
        keepers.append(weakref.ref(output.grad_fn))
        return output

    def use(_, grad, __) -> None:
        assert not [ref for ref in gradients if ref() is not None]
        gradients.append(weakref.ref(grad))
        assert sum(ref() is not None for ref in keepers) == len(modules) - len(gradients)

    monkeypatch.setattr(hooks._SavedInput, "apply", recorded)
    hooks.backward(model, modules, lambda: model(**BATCHES[0]).loss, dict.fromkeys(modules, 1), use)
    assert len(gradients) == len(keepers) == len(modules)


def test_the_base_of_a_peft_model_is_measured() -> None:
    """The base's regime has its module names for any adapters; with the adapters active the gradient differs.

    The model, its adapters, flags, hooks and random numbers are unchanged.
    """
    model = torch_models.model()
    targets = ["q_proj", "down_proj"]
    plain = regime(model, *BATCHES, targets, config=SMALL, adapters="on")  # it has none
    adapted = torch_models.adapted(model, target_modules=targets, lora_dropout=0.1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    adapted.train()
    before = torch_models.state_of(adapted)
    measured = regime(adapted, *BATCHES, config=SMALL)
    torch_models.assert_unchanged(adapted, before)
    pd.testing.assert_frame_equal(measured.crossings, plain.crossings)
    assert set(measured.target_modules) == set(targets)
    with_adapters = regime(adapted, *BATCHES, config=SMALL, adapters="on")
    assert (with_adapters.crossings["signal"] != plain.crossings["signal"]).all()
    adapted.merge_adapter()
    with pytest.raises(InputError, match="an adapter is merged"):
        regime(adapted, *BATCHES, config=SMALL)


def test_gradients_of_a_bfloat16_module_are_summed_in_float32() -> None:
    """The reference is float64: a gradient rounded to bfloat16 would be off by up to one part in 2^8."""
    random = torch.Generator().manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 4, bias=False, dtype=torch.bfloat16))
    x, delta = (torch.randn(300, size, generator=random).bfloat16() for size in (8, 4))
    batch = {"x": x, "delta": delta}

    def loss(model, batch):
        return (model(batch["x"]).float() * batch["delta"].float()).sum()

    expected = delta.double().T @ x.double()
    _, grads = run_backward(model, {"0": model[0]}, lambda: loss(model, batch))
    assert_same(grads, {"0": expected}, tolerance=1e-6)
    measured = regime(model, batch, batch, loss=loss, config=replace(SMALL, tokens=300))
    (row,) = measured.crossings.query("optimizer == 'sgd' and split == 'heldout'").to_dict("records")
    law = terms.compute_terms(expected.numpy(), x.double().numpy(), optimizer="sgd", init="gaussian").crossing()
    for name in ("signal", "cross_talk"):
        assert row[name] == pytest.approx(getattr(law, name), rel=1e-5)


def test_gradients_of_a_float16_model_do_not_vanish() -> None:
    """A token's share of a mean over many tokens and classes is less than the smallest number of float16."""
    torch.manual_seed(0)
    settings = torch_models.TEXT | {"vocab_size": 4096, "hidden_size": 32}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)).eval()
    batch = torch_models.batch(rows=16, length=64)
    assert_same(gradients(deepcopy(model).half(), batch), autograd(model, batch), tolerance=0.005)


def test_weights_that_are_loaded_when_needed() -> None:
    """`device_map` leaves weights on the device "meta" between calls."""
    accelerate = pytest.importorskip("accelerate", reason="device_map: accelerate")
    model = torch_models.model()
    expected = autograd(model, BATCHES[0])
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(weight.is_meta for weight in select_modules(model, None)["model.layers.0.self_attn.q_proj"].parameters())
    assert_same(gradients(model, BATCHES[0]), expected)
    assert regime(model, *BATCHES, config=SMALL).left_out == {}


class Packed(torch.nn.Module):
    """Stand-in for a quantised linear module, whose integers are unpacked when it runs and have no gradient."""

    levels = 127

    def __init__(self, linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().max() / self.levels
        self.register_buffer("scale", scale)
        self.pack((linear.weight.detach() / scale).round().to(torch.int8))

    def pack(self, quants) -> None:
        self.weight = torch.nn.Parameter(quants, requires_grad=False)

    def unpacked(self):
        return self.weight

    def forward(self, x):
        return x @ (self.unpacked().to(x.dtype) * self.scale).T


class PackedInPairs(Packed):
    """Stand-in that packs two 4-bit numbers in a byte: a buffer of one column with half as many entries as weights."""

    levels = 7

    def pack(self, quants) -> None:
        even, odd = (quants + 8).to(torch.uint8).reshape(-1, 2).T
        self.register_buffer("weight", (even | odd << 4)[:, None])

    def unpacked(self):
        pairs = torch.cat([self.weight & 15, self.weight >> 4], dim=1)
        return (pairs.to(torch.int8) - 8).reshape(self.out_features, self.in_features)


def bitsandbytes_of_4_bits(linear) -> torch.nn.Module:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="quantised modules: pip install bitsandbytes")
    packed = bitsandbytes.nn.Linear4bit(linear.in_features, linear.out_features, False, compute_dtype=torch.float32)
    packed.load_state_dict({"weight": linear.weight})
    return packed.to("cpu")


@pytest.mark.parametrize("pack", [Packed, PackedInPairs, bitsandbytes_of_4_bits])
def test_quantised_modules(pack) -> None:
    """G is that of the model with the quantised weights, which are read by running each module on the identity.

    The weights are counted as those of a plain module, and are not copied during the measurement.
    """
    model, plain = torch_models.model(), torch_models.model()
    for name, linear in select_modules(plain, None).items():
        parent, _, last = name.rpartition(".")
        packed = pack(linear)
        assert linear_size(packed) == linear.weight.numel()
        setattr(model.get_submodule(parent), last, packed)
        with torch.no_grad():
            linear.weight.copy_(packed(torch.eye(linear.in_features)).T)
    assert_same(gradients(model, BATCHES[0]), autograd(plain, BATCHES[0]), tolerance=1e-4)
    # Buffers of a model in training are restored, which writes to them and counts their versions up.
    versions = {name: module.weight._version for name, module in select_modules(model.train(), None).items()}
    assert len(regime(model, *BATCHES, config=SMALL).tokens) == 2 * len(select_modules(plain, None))
    assert {name: module.weight._version for name, module in select_modules(model, None).items()} == versions


def test_wrapped_models() -> None:
    model = torch_models.model()
    wrapped = torch.nn.DataParallel(torch.compile(model))
    tables = [regime(network, *BATCHES, ["q_proj"], config=SMALL).crossings for network in (model, wrapped)]
    pd.testing.assert_frame_equal(*tables)


def test_every_token_of_every_call_is_as_likely_to_be_read() -> None:
    """In 40 draws of 32 tokens from 8 calls of 20 to 180 tokens, the shares are within 4 binomial deviations, and
    places of different calls are independent. A single call's tokens are those of `choose_tokens`.
    """
    sizes = [20, 60, 100, 180] * 2
    shares, pairs = np.zeros(len(sizes)), 0
    for seed in range(40):
        sampler = torch_regimes._InputSampler(RegimeConfig(rows=0, tokens=32, seed=seed), MasksByShape(), mask=False)
        for call, size in enumerate(sizes):
            place = torch.arange(size, dtype=torch.float32)
            sampler.add("again", torch.stack([torch.full_like(place, call), place, torch.ones_like(place)], dim=1))
        sample = sampler.inputs["again"]
        assert sampler.counts["again"] == {"all": 720, "seen": 0, "sinks": 0, "read": 32}
        assert len(np.unique(sample, axis=0)) == 32
        shares += np.bincount(sample[:, 0].astype(int), minlength=len(sizes))
        pairs += 32 - len(np.unique(sample[:, 1]))
    expected = np.array(sizes) / sum(sizes)
    deviations = np.sqrt(40 * 32 * expected * (1 - expected))
    assert (np.abs(shares - 40 * 32 * expected) < 4 * deviations).all()
    drawn = [np.random.default_rng(i).choice(np.concatenate([range(n) for n in sizes]), 32, False) for i in range(400)]
    assert pairs / 40 == pytest.approx(np.mean([32 - len(np.unique(places)) for places in drawn]), abs=1.0)
    x = torch.randn(100, 3)
    sampler.add("once", x)
    indices = tokens.choose_tokens(x.norm(dim=1).numpy(), None, count=32, seed=39, name="once").indices
    np.testing.assert_array_equal(sampler.inputs["once"], x.numpy()[indices])


def test_samples_are_read_from_a_file() -> None:
    """They are the same arrays as before, and none is left in memory. A second call samples other tokens."""
    sampler = torch_regimes._InputSampler(RegimeConfig(rows=0, tokens=4), MasksByShape(), mask=False)
    x = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    for name, inputs in (("q", x), ("k", x), ("transposed", x.T), ("rows", x[:5]), ("twice", x), ("twice", x)):
        sampler.add(name, inputs)
    np.testing.assert_array_equal(sampler.inputs["q"], sampler.inputs["k"])
    assert not np.array_equal(sampler.inputs["q"], sampler.inputs["twice"])
    assert sampler.counts["twice"] == {"all": 12, "seen": 0, "sinks": 0, "read": 4}
    before = {name: rows.copy() for name, rows in sampler.inputs.items()}
    sampler.finish()
    assert set(sampler.inputs) == set(before)
    for name, rows in before.items():
        np.testing.assert_array_equal(sampler.inputs[name], rows)
        owner = sampler.inputs[name]
        while isinstance(owner, np.ndarray):
            owner = owner.base
        assert isinstance(owner, mmap)


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_a_module_measured_with_others_has_its_own_inputs(family) -> None:
    """Its inputs equal those of a separate measurement, in which it can share nothing with another module."""
    model, batches = torch_models.model(family), [torch_models.batch(family, seed) for seed in (0, 1)]
    config = replace(SMALL, inits=("kaiming_uniform",))
    together = regime(model, *batches, config=config)
    for name in together.crossings["module"].unique():
        alone = regime(model, *batches, "^" + name.replace(".", r"\.") + "$", config=config)
        for frame, expected in (
            (together.crossings, alone.crossings),
            (together.crossing_distances, alone.crossing_distances),
        ):
            rows = frame[frame["module"] == name].reset_index(drop=True)
            pd.testing.assert_frame_equal(rows, expected, rtol=1e-5)


def test_keys_are_those_of_the_tokens_that_could_be_read() -> None:
    """The keys are uniform if all tokens are read, and the smallest ones otherwise; means are within 5 deviations."""
    counts = {"all": 10, "seen": 5, "sinks": 3, "read": 2}
    keys = [torch_regimes._sample_keys(counts, [seed]) for seed in range(200)]
    assert np.mean(keys) == pytest.approx(0.5, abs=5 * 12**-0.5 / 20)
    smaller = [torch_regimes._sample_keys(counts | {"read": 1}, [seed]) for seed in range(200)]
    assert np.mean(smaller) == pytest.approx(1 / 3, abs=5 * 18**-0.5 / 200**0.5)


TEMPLATE = [1, 5, 6, 7]
TRAIN = [[*TEMPLATE, 9, 10, 33], [*TEMPLATE, 11, 12, 13, 34]]
HELD_OUT = [[*TEMPLATE, 10, 10, 8, 35], [*TEMPLATE, 11, 14, 36], [*TEMPLATE, 9, 10, 20, 3, 37]]


def packed_rows(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    """Put all records in one row; each record starts at position 0."""
    ids = torch.tensor([[token for row in rows for token in row]])
    positions = torch.tensor([[position for row in rows for position in range(len(row))]])
    return {"input_ids": ids, "position_ids": positions, "labels": ids.clone()}


@pytest.mark.parametrize(
    ("held_out", "counts"),
    [
        (padded(HELD_OUT), (21, 15, 6)),
        (padded(HELD_OUT, left=True), (21, 15, 6)),
        (packed_rows(HELD_OUT), (23, 15, 8)),  # in separate rows, the last token of a record has no target
    ],
    ids=["padded on the right", "padded on the left", "packed"],
)
def test_held_out_tokens_that_were_seen_and_padding_are_not_read(held_out, counts) -> None:
    """The template's 12 tokens with a target, and 3 more, begin as trained rows do."""
    model, train = torch_models.model(), padded(TRAIN, left="position_ids" not in held_out)
    measured = regime(model, train, held_out, ["q_proj"], config=SMALL)
    rows = measured.tokens.set_index("split")[["all", "seen", "read"]]
    assert set(rows.loc["heldout"].itertuples(index=False, name=None)) == {counts}
    assert set(rows.loc["train"].itertuples(index=False, name=None)) == {(13, 0, 9)}
    assert measured.unmasked == ()
    plain = regime(model, train, held_out, ["q_proj"], config=replace(SMALL, mask=False))
    assert set(plain.tokens["seen"]) == {0}


@pytest.fixture(scope="module", name="measured")
def measured_regime() -> torch_regimes.TorchRegime:
    """Return two kinds of module at the default configuration, with predicted sizes."""
    config = replace(torch_regimes.DEFAULT, exact=True)
    return regime(torch_models.model(), *BATCHES, ["q_proj", "v_proj"], config=config)


def terms_of(measured, split: str) -> dict[str, float]:
    """Return each module's linear term under Adam with the gaussian init."""
    rows = measured.crossings.query(f"optimizer == 'adam' and init == 'gaussian' and split == '{split}'")
    return dict(zip(rows["module"], rows["linear_term"], strict=True))


def test_crossing_distance_is_the_held_out_one_of_the_nearest_measured_rank(measured) -> None:
    """The nearest of the ranks 8, 32 and 128 on a logarithmic scale is used, with a geometric mean over modules."""
    assert set(measured.results["rank"]) == {8, 128}, "the ranks of the default configuration"
    assert set(measured.crossings["optimizer"]) == {"sgd", "adam"}
    rows = measured.crossing_distances.query("init == 'gaussian'")
    means = rows.groupby(["split", "rank"])["crossing_distance"].agg(geometric_mean)
    for rank, nearest in ((1, 8), (15, 8), (18, 32), (60, 32), (70, 128), (4096, 128)):
        assert measured.crossing_distance_at(rank, "gaussian") == pytest.approx(means["heldout", nearest], rel=1e-12)
    assert means["train", 8] != pytest.approx(means["heldout", 8], rel=1e-3)


def test_transfer(measured) -> None:
    """The advice uses the measured linear terms; with it PEFT scales by the stated gamma."""
    tuned = Setting(2, 4.0, 3e-4, init="gaussian")
    config, rate, advice = measured.transfer(tuned, rank=8, rule="rslora", regime="measured")
    expected = transfer(tuned, 8, terms_of(measured, "heldout"), rule="rslora")
    assert advice == expected
    trained = measured.transfer(tuned, 8, rule="rslora", regime="measured", split="train").advice
    assert trained == transfer(tuned, 8, terms_of(measured, "train"), rule="rslora") != advice
    assert (config.r, config.use_rslora, config.init_lora_weights, rate) == (8, False, "gaussian", 3e-4)
    assert config.lora_alpha == pytest.approx(expected.alpha * 8**0.5)
    for name, module in peft.get_peft_model(torch_models.model(), config).named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            kind = name.rpartition(".")[2]
            assert module.scaling["default"] == pytest.approx(expected.by_type()[kind] / 8**0.5)
    default = replace(tuned, init="kaiming_uniform")
    whole_model = measured.transfer(default, rank=8, alpha=4.0, steps=50, to_steps=90)
    assert whole_model.config.alpha_pattern == {}
    assert whole_model.advice == transfer(default, 8, alpha=4.0, steps=50, to_steps=90)
    assert whole_model.learning_rate == whole_model.advice.rate_range.best
    assert measured.transfer(default).advice == transfer(default, 128)


@pytest.mark.usefixtures("unchecked")
def test_transfers_without_a_measurement_are_refused(measured) -> None:
    with pytest.raises(InputError, match=r"crossing distance .* init 'rademacher'"):
        measured.crossing_distance_at(2, "rademacher")
    with pytest.raises(InputError, match="optimizer adam, init rademacher"):
        measured.transfer(Setting(2, 4.0, 3e-4, init="rademacher"), rank=8)
    with pytest.raises(InputError, match=r"^setting .*{'r': 2}"):
        measured.transfer({"r": 2}, rank=8)


def test_the_advice_agrees_with_the_crossing_rank(measured, caplog) -> None:
    """Below the crossing rank of a typical module the advice is still the whole model's, without a warning."""
    measured = replace(measured, crossings=measured.crossings.assign(crossing_rank=31.5))
    sentence = measured.sentence()
    assert "above rank 31.5 " in sentence
    assert "range 31.5 to 31.5" in sentence
    assert len(sentence.split()) <= 35
    assert "coordinate check" in sentence
    assert "whole model can differ" in sentence
    for rank in (8, 16, 128):
        advised = transfer_rate(3e-4, Run(16, 16.0), Run(rank, 16.0)).best
        assert measured.transfer(Setting(16, 16.0, 3e-4), rank).learning_rate == pytest.approx(advised)
    assert not caplog.records


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_modules": ["q_proj", "w_proj"]}, "target_modules .*'w_proj'.* q_proj, k_proj"),
        ({"target_modules": ["embed_tokens"]}, "target_modules .*'embed_tokens'"),
        ({"target_modules": r".*\.w_proj"}, "target_modules .*w_proj"),
        ({"layers": [7]}, r"layers \[7\] .* layers 0 to 1$"),
        ({"batch": {"input_ids": BATCHES[0]["input_ids"]}}, "loss .* input_ids.* labels"),
        ({"loss": lambda model, batch: model(**batch).loss * np.inf}, "loss .* inf"),
        ({"loss": lambda *_: torch.tensor(1.0)}, "loss .*gradient"),
        ({"batch": padded(TRAIN), "held_out": padded(TRAIN)}, r"13 held-out tokens.* 13 "),
        ({"model": 3}, "model .* 3$"),
        ({"batch": None}, "batch .* None$"),
        ({"batch": [BATCHES[0]]}, r"batch .* \["),
        ({"held_out": {}}, "held_out .* {}$"),
        ({"held_out": {name: value[:0] for name, value in BATCHES[1].items()}}, r"held_out .*input_ids .*\(0, 9\)"),
        ({"target_modules": 3}, "target_modules .* 3$"),
        ({"target_modules": "("}, r"target_modules .*'\('"),
        ({"layers": 0}, "layers .* 0$"),
        ({"loss": 3}, "loss .* 3$"),
        ({"loss": lambda *_: None}, "loss .* None$"),
        ({"loss": lambda model, batch: model(**batch).logits}, r"loss .*\(3, 9, 64\)"),
        ({"config": {}}, "config .* {}$"),
        ({"adapters": "maybe"}, "adapters .*'maybe'"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_input(arguments, message) -> None:
    model = torch_models.model()
    arguments = {"model": model, "batch": BATCHES[0], "held_out": BATCHES[1], "config": SMALL} | arguments
    with pytest.raises(InputError, match=message) as caught:
        regime(**arguments)
    assert "\n" not in str(caught.value)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.slow
def test_nothing_of_jax_is_imported() -> None:
    """JAX's threads would make a fork of the user's process unsafe, such as that of a data loader."""
    code = """
import sys, torch, transformers
from rora_theory import measure
model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(
    vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2))
ids = [torch.randint(3, 64, (2, 9)) for _ in range(2)]
measure.regime(model, *({"input_ids": each, "labels": each} for each in ids), ["q_proj"])
assert "jax" not in sys.modules, "jax was imported"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr


def test_layers_are_a_sample_of_the_model() -> None:
    sample = regime(torch_models.model(), *BATCHES, config=SMALL, layers=[1])
    assert set(sample.crossings["layer"]) == {1}
    assert sum("1 of the model's 2 layers" in text for text in sample.crossings.attrs["warnings"]) == 1
    assert sample.target_modules == "all-linear"
    with pytest.raises(InputError, match=r"layers \[3\] .* layers -1 to -1$"):
        select_modules(torch.nn.ModuleDict({"outside": torch.nn.Linear(2, 2)}), None, [3])


def test_a_head_is_no_target_of_all_linear() -> None:
    """Heads of language models and of sequence classification are no targets."""
    configuration = transformers.LlamaConfig(**torch_models.TEXT, num_labels=2)
    for model, head in (
        (transformers.LlamaForSequenceClassification(configuration), "score"),
        (torch_models.model(), "lm_head"),
    ):
        assert set(linear_modules(model)) - set(select_modules(model, None)) == {head}
        assert list(select_modules(model, [head])) == [head]


def test_adapters_that_were_off_stay_off() -> None:
    model = torch_models.adapted(torch_models.model())
    layers = [module for module in model.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    model.disable_adapter_layers()
    layers[0].enable_adapters(True)
    layers[0].lora_A["default"].requires_grad_(False)  # PEFT trains what it enables
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    with without_adapters(model):
        assert all(layer.disable_adapters for layer in layers)
    assert [layer.disable_adapters for layer in layers] == [False, *[True] * (len(layers) - 1)]
    assert [parameter.requires_grad for parameter in model.parameters()] == trainable
