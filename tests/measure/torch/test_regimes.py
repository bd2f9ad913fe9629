"""The bridge to PyTorch: every module's G is autograd's own, on all kinds of model, and the model stays as it is."""

import subprocess
import sys
import weakref
from copy import deepcopy
from dataclasses import replace
from statistics import geometric_mean

import numpy as np
import pandas as pd
import pytest

from rora_theory import InputError, Setting, transfer
from rora_theory.measure import tokens
from rora_theory.measure.layers import drawn_steps
from rora_theory.measure.regimes import terms
from rora_theory.measure.regimes.module_regime import RegimeConfig

torch = pytest.importorskip("torch", reason="the bridge: the extra torch")
peft = pytest.importorskip("peft", reason="the bridge: the extra torch")
transformers = pytest.importorskip("transformers", reason="the bridge: the extra torch")

from support import torch_models  # noqa: E402

from rora_theory.measure.torch import batches, hooks, regime  # noqa: E402
from rora_theory.measure.torch import regimes as torch_regimes  # noqa: E402
from rora_theory.measure.torch.modules import base_model, chosen, linear_modules, without_adapters  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers and peft
SMALL = RegimeConfig(ranks=(1, 4), rules=("lora",), inits=("gaussian",), rows=0, tokens=9)


def gradients(model, batch) -> dict[str, torch.Tensor]:
    """G of every module, as the hooks form it."""
    modules = chosen(model, None)
    found: dict[str, torch.Tensor] = {}
    calls: dict[str, int] = {}

    def count(name, _) -> None:
        calls[name] = calls.get(name, 0) + 1

    hooks.read_modules(modules, lambda: float(model(**batch).loss), count)
    hooks.backward(
        model,
        modules,
        lambda: model(**batch).loss,
        calls,
        lambda name, grad, _: found.__setitem__(name, grad),
    )
    return found


def autograd(model, batch) -> dict[str, torch.Tensor]:
    """The gradient of every linear module's weight, [p_out, p_in], of a plain backward pass."""
    own = deepcopy(model)
    for parameter in own.parameters():
        parameter.requires_grad_(True)
    own(**batch).loss.backward()
    found = {}
    for name, module in chosen(own, None).items():
        grad = module.weight.grad
        found[name] = grad.T if isinstance(module, transformers.pytorch_utils.Conv1D) else grad
    return found


def assert_same(found, expected, tolerance=2e-5) -> None:
    """To rounding of float32 sums, relative to each gradient's largest entry."""
    assert list(found) != []
    assert set(found) == set(expected)
    for name, grad in expected.items():
        scale = float(grad.abs().max())
        torch.testing.assert_close(found[name].float(), grad.float(), rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("family", torch_models.CONFIGS)
def test_every_family(family) -> None:
    """G is autograd's; the modules are those that PEFT adapts with all-linear; every figure is finite."""
    model = torch_models.model(family)
    batch, held_out = (torch_models.batch(family, seed) for seed in (0, 1))
    assert_same(gradients(model, batch), autograd(model, batch))
    found = regime(model, batch, held_out, config=replace(SMALL, exact=True))
    config = peft.LoraConfig(target_modules="all-linear", task_type=found.task_type)
    adapted = peft.get_peft_model(deepcopy(model), config)
    tuners = {  # experts that lie in one parameter are no linear modules
        name.removeprefix("base_model.model.")
        for name, module in adapted.named_modules()
        if isinstance(module, peft.tuners.lora.Linear)
    }
    assert set(found.crossings["module"]) == tuners
    assert found.left_out == {}
    assert (found.unmasked != ()) == (family == "vit" or any(".experts." in name for name in tuners))  # transformers 4
    for frame, columns in (
        (found.crossings, ["signal", "cross_talk", "crossing_rank", "linear_term"]),
        (found.results, ["predicted"]),
        (found.takeover, ["takeover"]),
    ):
        figures = frame[columns].to_numpy()
        assert np.isfinite(figures).all()
        assert (figures > (-1 if "linear_term" in columns else 0)).all()
    assert all(each.requires_grad and each.grad is None for each in model.parameters())
    assert found.training_loss == pytest.approx(float(model(**batch).loss), rel=1e-6)
    assert found.held_out_loss == pytest.approx(float(model(**held_out).loss), rel=1e-6)


class Calls(torch.nn.Module):
    """A linear module that is run twice, two that share one weight, and an expert that is never reached."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.twice = torch.nn.Linear(6, 6)
        self.first, self.second = torch.nn.Linear(6, 5), torch.nn.Linear(6, 5)
        self.second.weight = self.first.weight
        self.experts = torch.nn.ModuleList([torch.nn.Linear(6, 4), torch.nn.Linear(6, 4)])

    def forward(self, x):
        x = torch.tanh(self.twice(torch.tanh(self.twice(x))))
        self.experts[0](x)  # no loss depends on it
        y = self.first(x)
        y.mul_(0.5)  # in place, after the hook has seen it
        return y + 2 * self.second(torch.sin(x))


def test_modules_run_twice_sharing_a_weight_or_not_reached() -> None:
    """A module's G is the sum over its calls; two modules of one weight have their own, which add up to the weight's.
    What no token or no gradient reaches is named and left out."""
    model = Calls()
    x, other = torch.randn(7, 6), torch.randn(8, 6)

    def loss(model, batch):
        return model(batch["x"]).square().mean()

    grads: dict[str, torch.Tensor] = {}
    modules = {name: getattr(model, name) for name in ("twice", "first", "second")}
    calls = {"twice": 2, "first": 1, "second": 1}
    value = hooks.backward(
        model, modules, lambda: loss(model, {"x": x}), calls, lambda name, grad, _: grads.__setitem__(name, grad)
    )
    loss(model, {"x": x}).backward()
    torch.testing.assert_close(grads["twice"], model.twice.weight.grad)
    torch.testing.assert_close(grads["first"] + grads["second"], model.first.weight.grad)
    assert not torch.allclose(grads["first"], grads["second"])
    found = regime(model, {"x": x}, {"x": other}, loss=loss, config=SMALL)
    assert found.training_loss == pytest.approx(value)
    assert found.left_out == {"experts.1": "no held-out token", "experts.0": "no gradient"}
    assert set(found.crossings["module"]) == set(modules)
    counts = found.tokens.set_index(["module", "split"])[["all", "read"]]
    assert tuple(counts.loc[("twice", "train")]) == (14, 9)
    assert tuple(counts.loc[("first", "heldout")]) == (8, 8)

    def uneven(model, batch):
        return loss(model, batch) + (loss(model, batch) if len(batch["x"]) == 7 else 0)

    with pytest.raises(InputError, match=r"second .*held-out batch .*1"):
        regime(model, {"x": x}, {"x": other}, loss=uneven, config=SMALL)
    more_held_out = regime(model, {"x": other}, {"x": x}, loss=uneven, config=SMALL)
    expected = regime(model, {"x": other}, {"x": x}, loss=loss, config=SMALL)
    same = (each.crossings.query("split == 'train'")["signal"] for each in (more_held_out, expected))
    np.testing.assert_allclose(*same, rtol=1e-6)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradient_checkpointing(family, reentrant) -> None:
    """The same G, though a block's inputs are dropped and computed again; also of a model that is frozen."""
    model, batch = torch_models.model(family), torch_models.batch(family)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    expected = autograd(model, batch)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for hook in model.get_input_embeddings()._forward_hooks.copy():
        del model.get_input_embeddings()._forward_hooks[hook]  # transformers' own help, which not every model has
    runs = []
    hook = model.base_model.register_forward_hook(lambda *_: runs.append(1)) if family == "llama" else None
    assert_same(gradients(model, batch), expected)
    assert hook is None or runs


def test_one_gradient_at_a_time(monkeypatch) -> None:
    """When a module's G comes, the others' are gone; and as soon as it is formed nothing keeps the module's inputs."""
    model, batch = torch_models.model(), torch_models.batch()
    modules = chosen(model, None)
    gradients: list[weakref.ref] = []
    keepers: list[weakref.ref] = []
    apply = hooks._SavedInput.apply

    def kept(*arguments) -> torch.Tensor:
        found = apply(*arguments)
        keepers.append(weakref.ref(found.grad_fn))
        return found

    def use(_, grad, __) -> None:
        assert not [ref for ref in gradients if ref() is not None]
        gradients.append(weakref.ref(grad))
        assert sum(ref() is not None for ref in keepers) == len(modules) - len(gradients)

    monkeypatch.setattr(hooks._SavedInput, "apply", kept)
    hooks.backward(model, modules, lambda: model(**batch).loss, dict.fromkeys(modules, 1), use)
    assert len(gradients) == len(keepers) == len(modules)


def state(model) -> tuple:
    """What a measurement must leave as it is."""
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        {name: (each.requires_grad, each.grad is None) for name, each in model.named_parameters()},
        {name: (len(each._forward_hooks), each.training) for name, each in model.named_modules()},
        torch.get_rng_state(),
    )


def test_the_base_of_a_peft_model_is_measured() -> None:
    """As without PEFT, under its names, whatever the adapters are; with them on it is another gradient. The model, its
    adapters, what needs a gradient, hooks and the random numbers stay as they are."""
    model = torch_models.model()
    batch, held_out = torch_models.batch(seed=0), torch_models.batch(seed=1)
    targets = ["q_proj", "down_proj"]
    plain = regime(model, batch, held_out, targets, config=SMALL)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=targets, lora_dropout=0.1, task_type="CAUSAL_LM")
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    adapted.train()
    before, output = state(adapted), adapted.eval()(**batch).logits
    adapted.train()
    found = regime(adapted, batch, held_out, config=SMALL)
    after = state(adapted)
    assert before[1:3] == after[1:3]
    for one, other in ((before[0], after[0]), (before[3], after[3])):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    torch.testing.assert_close(adapted.eval()(**batch).logits, output)
    pd.testing.assert_frame_equal(found.crossings, plain.crossings)
    assert set(found.target_modules) == set(targets)
    with_adapters = regime(adapted, batch, held_out, config=SMALL, adapters="on")
    assert (with_adapters.crossings["signal"] != plain.crossings["signal"]).all()
    adapted.merge_adapter()
    with pytest.raises(InputError, match="an adapter is merged"):
        regime(adapted, batch, held_out, config=SMALL)


def test_bfloat16() -> None:
    """Products of bfloat16 numbers, added in float32: autograd's own G but for its last rounding, one in 2^8."""
    model, batch = torch_models.model().to(torch.bfloat16), torch_models.batch()
    assert_same(gradients(model, batch), autograd(model, batch), tolerance=2.0**-8)
    found = regime(model, batch, torch_models.batch(seed=1), config=SMALL)
    assert np.isfinite(found.crossings["crossing_rank"]).all()


def test_gradients_of_a_bfloat16_module_are_summed_in_float32() -> None:
    """Against float64: a gradient rounded to bfloat16 would be off by up to one part in 2^8."""
    random = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(8, 4, bias=False, dtype=torch.bfloat16)
    x, delta = (torch.randn(300, size, generator=random).bfloat16() for size in (8, 4))

    def loss(model, batch):
        return (model(batch["x"]).float() * batch["delta"].float()).sum()

    model = torch.nn.Sequential(layer)
    expected = delta.double().T @ x.double()
    grads: dict[str, torch.Tensor] = {}
    hooks.backward(
        model,
        {"0": layer},
        lambda: loss(model, {"x": x, "delta": delta}),
        {"0": 1},
        lambda name, grad, _: grads.__setitem__(name, grad),
    )
    assert_same(grads, {"0": expected}, tolerance=1e-6)
    batch = {"x": x, "delta": delta}
    found = regime(model, batch, batch, loss=loss, config=replace(SMALL, tokens=300))
    (row,) = found.crossings.query("optimizer == 'sgd' and split == 'heldout'").to_dict("records")
    law = terms.terms(expected.numpy(), x.double().numpy(), optimizer="sgd", init="gaussian").crossing(slice(None))
    for name in ("signal", "cross_talk"):
        assert row[name] == pytest.approx(getattr(law, name), rel=1e-5)


def test_weights_that_are_loaded_when_needed() -> None:
    """As `device_map` places them: they lie on the device "meta" between calls."""
    accelerate = pytest.importorskip("accelerate", reason="device_map: accelerate")
    model, batch = torch_models.model(), torch_models.batch()
    expected = autograd(model, batch)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(each.is_meta for each in chosen(model, None)["model.layers.0.self_attn.q_proj"].parameters())
    assert_same(gradients(model, batch), expected)
    assert regime(model, batch, torch_models.batch(seed=1), config=SMALL).left_out == {}


class Packed(torch.nn.Module):
    """Stands in for a quantised linear module: whole numbers, unpacked when it is run, of no use to autograd."""

    def __init__(self, linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().max() / 127
        self.register_buffer("scale", scale)
        self.weight = torch.nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x):
        return x @ (self.weight.to(x.dtype) * self.scale).T


def quantised(model, make) -> torch.nn.Module:
    """The model with other modules in place of its linear ones."""
    own = deepcopy(model)
    for name, module in chosen(own, None).items():
        parent, _, last = name.rpartition(".")
        setattr(own.get_submodule(parent), last, make(module))
    return own


def assert_quantised(model) -> None:
    """G is that of the model whose weights are the quantised ones: each is read off by running it on the identity."""
    batch = torch_models.batch()
    plain = deepcopy(torch_models.model())
    with torch.no_grad():
        for name, module in chosen(plain, None).items():
            own = chosen(model, None)[name]
            module.weight.copy_(own(torch.eye(own.in_features)).T)
    assert_same(gradients(model, batch), autograd(plain, batch), tolerance=1e-4)
    found = regime(model, batch, torch_models.batch(seed=1), config=SMALL)
    assert len(found.tokens) == 2 * len(chosen(plain, None))


def test_quantised_modules() -> None:
    assert_quantised(quantised(torch_models.model(), Packed))


def test_bitsandbytes_of_4_bits() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="quantised modules: bitsandbytes")

    def packed(linear):
        own = bitsandbytes.nn.Linear4bit(linear.in_features, linear.out_features, False, compute_dtype=torch.float32)
        own.load_state_dict({"weight": linear.weight})
        return own.to("cpu")

    assert_quantised(quantised(torch_models.model(), packed))


def test_bitsandbytes_of_8_bits() -> None:
    """Activations are quantised too, so that no plain model has its gradient: it is near the one of plain weights."""
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="quantised modules: bitsandbytes")

    def packed(linear):
        own = bitsandbytes.nn.Linear8bitLt(linear.in_features, linear.out_features, False, has_fp16_weights=False)
        own.load_state_dict({"weight": linear.weight})
        return own.to("cpu")

    model, batch = torch_models.model(), torch_models.batch()
    found, expected = gradients(quantised(model, packed), batch), autograd(model, batch)
    assert set(found) == set(expected)
    for name, grad in expected.items():
        assert float(torch.cosine_similarity(found[name].flatten(), grad.flatten(), 0)) > 0.98


@pytest.mark.slow
def test_wrapped_models() -> None:
    model, batch, held_out = torch_models.model(), torch_models.batch(), torch_models.batch(seed=1)
    plain = regime(model, batch, held_out, config=SMALL)
    for wrapped in (torch.nn.DataParallel(model), torch.compile(model)):
        pd.testing.assert_frame_equal(regime(wrapped, batch, held_out, config=SMALL).crossings, plain.crossings)


def test_every_token_of_every_call_is_as_likely_to_be_read() -> None:
    """Of 40 draws of 32 tokens from 8 calls of 20 to 160 tokens, the shares within 4 of a binomial's deviations; no
    place of a call is tied to that place in another. A single call's are those of `choose_tokens`."""
    sizes = range(20, 180, 20)
    shares, pairs = np.zeros(len(sizes)), 0
    for seed in range(40):
        sampler = torch_regimes._InputSampler(RegimeConfig(rows=0, tokens=32, seed=seed), {}, mask=False)
        for call, size in enumerate(sizes):
            at = torch.arange(size, dtype=torch.float32)
            sampler.add("again", torch.stack([torch.full_like(at, call), at, torch.ones_like(at)], dim=1))
        read = sampler.inputs["again"]
        assert sampler.counts["again"] == {"all": 720, "seen": 0, "sinks": 0, "read": 32}
        assert len(np.unique(read, axis=0)) == 32
        shares += np.bincount(read[:, 0].astype(int), minlength=len(sizes))
        pairs += 32 - len(np.unique(read[:, 1]))
    expected = np.array(sizes) / sum(sizes)
    deviations = np.sqrt(40 * 32 * expected * (1 - expected))
    assert (np.abs(shares - 40 * 32 * expected) < 4 * deviations).all()
    drawn = [np.random.default_rng(i).choice(np.concatenate([range(n) for n in sizes]), 32, False) for i in range(400)]
    assert pairs / 40 == pytest.approx(np.mean([32 - len(np.unique(each)) for each in drawn]), abs=1.5)
    once = torch_regimes._InputSampler(RegimeConfig(rows=0, tokens=32), {}, mask=False)
    x = torch.randn(100, 3)
    once.add("once", x)
    chosen_ones = tokens.choose_tokens(x.norm(dim=1).numpy(), None, count=32, seed=0, name="once").indices
    np.testing.assert_array_equal(once.inputs["once"], x.numpy()[chosen_ones])


def test_keys_are_those_of_the_tokens_that_could_be_read() -> None:
    """Where all of them are read the keys are uniform: the mean of 400 is 0.5 within five standard errors."""
    counts = {"all": 10, "seen": 5, "sinks": 3, "read": 2}
    keys = [torch_regimes._sample_keys(counts, [seed]) for seed in range(200)]
    assert np.mean(keys) == pytest.approx(0.5, abs=5 * 12**-0.5 / 20)
    fewest = [torch_regimes._sample_keys(counts | {"read": 1}, [seed]) for seed in range(200)]
    assert np.mean(fewest) == pytest.approx(1 / 3, abs=5 * 18**-0.5 / 200**0.5), "the smaller of two"


def test_tokens_of_encoder_and_decoder_of_one_size_are_not_told_apart() -> None:
    """Only a token that counts in both is read, and it was seen where either was."""
    batch = torch_models.batch("t5", rows=1, length=6)
    batch["attention_mask"] = torch.tensor([[1, 1, 1, 1, 0, 0]])
    batch["labels"] = torch.tensor([[5, -100, 6, -100, -100, 7]])
    trained = {"input_ids": batch["input_ids"][:, :2]}
    found = batches.find_masks(torch_models.model("t5"), batch, trained)[(1, 6)]
    assert found.real.tolist() == [True, False, True, False, False, False]
    assert found.seen.tolist() == [True, True, False, False, False, False]


def padded(rows: list[list[int]], *, left: bool) -> dict[str, torch.Tensor]:
    """Rows padded with 0, as a tokenizer and a collator make them."""
    width = max(map(len, rows))
    ids, mask = torch.zeros((len(rows), width), dtype=torch.long), torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(len(row))
        ids[i, place], mask[i, place] = torch.tensor(row), 1
    found = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    return found if left else found | {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


TEMPLATE = [1, 5, 6, 7]
TRAIN = [[*TEMPLATE, 9, 10, 33], [*TEMPLATE, 11, 12, 13, 34]]
HELD_OUT = [[*TEMPLATE, 10, 10, 8, 35], [*TEMPLATE, 11, 14, 36], [*TEMPLATE, 9, 10, 20, 3, 37]]


@pytest.mark.parametrize("left", [False, True])
def test_held_out_tokens_that_were_seen_and_padding_are_not_read(left) -> None:
    """Whichever side is padded: of 21 tokens with a target the template's 12 and 3 more begin as trained rows."""
    model = torch_models.model()
    found = regime(model, padded(TRAIN, left=left), padded(HELD_OUT, left=left), ["q_proj"], config=SMALL)
    counts = found.tokens.set_index("split")[["all", "seen", "read"]]
    assert {tuple(row) for row in counts.loc["heldout"].to_numpy()} == {(21, 15, 6)}
    assert {tuple(row) for row in counts.loc["train"].to_numpy()} == {(13, 0, 9)}
    assert found.unmasked == ()
    whole = RegimeConfig(**vars(SMALL) | {"mask": False})
    plain = regime(model, padded(TRAIN, left=left), padded(HELD_OUT, left=left), ["q_proj"], config=whole)
    assert set(plain.tokens["seen"]) == {0}
    with pytest.raises(InputError, match=r"13 held-out tokens.* 13 "):
        regime(model, padded(TRAIN, left=left), padded(TRAIN, left=left), ["q_proj"], config=SMALL)


class Twice(torch.nn.Module):
    """A linear module that every token passes twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embeddings, self.linear = torch.nn.Embedding(64, 6), torch.nn.Linear(6, 6)

    def forward(self, input_ids, **_):
        return self.linear(torch.tanh(self.linear(self.embeddings(input_ids))))


def test_no_call_of_a_module_is_read_at_held_out_tokens_that_were_seen() -> None:
    model, read = Twice(), {}

    def loss(model, batch):
        return model(**batch).square().mean()

    measure = torch_regimes.module_regime.measure_module

    def watched(config, layer, *rest):
        read.update(layer.inputs)
        return measure(config, layer, *rest)

    batches = [{"input_ids": torch.tensor(rows)} for rows in ([[1, 5, 6, 7, 9]], [[1, 5, 6, 8, 10]])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_regimes.module_regime, "measure_module", watched)
        found = regime(model, *batches, loss=loss, config=SMALL)
    counts = found.tokens.set_index("split")[["all", "seen", "read"]]
    assert tuple(counts.loc["heldout"]) == (10, 6, 4)
    assert tuple(counts.loc["train"]) == (10, 0, 9)
    first = model.embeddings(batches[1]["input_ids"][0, 3:])
    expected = torch.cat([first, torch.tanh(model.linear(first))]).detach().numpy()
    order = np.lexsort(expected.T), np.lexsort(read["heldout"].T)
    np.testing.assert_allclose(read["heldout"][order[1]], expected[order[0]], rtol=1e-6)


def test_padding_of_encoder_and_decoder_changes_nothing() -> None:
    """T5 with three more tokens that the encoder does not attend to, and two labels that are in no loss."""
    model, config, pad = torch_models.model("t5"), replace(SMALL, tokens=64), torch.nn.functional.pad
    batches = [torch_models.batch("t5", seed) for seed in (0, 1)]
    padded_batches = [
        {
            "input_ids": pad(batch["input_ids"], (0, 3)),
            "attention_mask": pad(torch.ones_like(batch["input_ids"]), (0, 3)),
            "labels": pad(batch["labels"], (0, 2), value=-100),
        }
        for batch in batches
    ]
    plain, found = (regime(model, *each, config=config) for each in (batches, padded_batches))
    assert set(found.tokens["read"]) == {27, 15}
    pd.testing.assert_frame_equal(found.tokens, plain.tokens)
    pd.testing.assert_frame_equal(found.crossings, plain.crossings, rtol=1e-4)


def test_packed_records_begin_where_positions_do() -> None:
    model = torch_models.model()
    packed = {
        "input_ids": torch.tensor([[row for each in HELD_OUT for row in each]]),
        "position_ids": torch.tensor([[at for each in HELD_OUT for at in range(len(each))]]),
    }
    packed["labels"] = packed["input_ids"].clone()
    found = regime(model, padded(TRAIN, left=False), packed, ["q_proj"], config=SMALL)
    assert set(found.tokens.query("split == 'heldout'")["seen"]) == {15}


@pytest.mark.parametrize("rows", [0, pytest.param(16, marks=pytest.mark.slow)])
def test_equal_to_the_jax_route(rows, tmp_path) -> None:
    """Module by module on one checkpoint, with one draw of A's rows: the frames agree to float32's rounding. Adapters
    that are stepped are the same too."""
    from support import checkpoint

    from rora_theory.data.batches import Batch
    from rora_theory.llama import load
    from rora_theory.measure.regimes import model as regimes

    folder = checkpoint.model(tmp_path)
    config = transformers.LlamaConfig(**torch_models.TEXT | {"vocab_size": 300, "tie_word_embeddings": True})
    torch.manual_seed(0)
    torch_models.initialised(transformers.LlamaForCausalLM(config)).save_pretrained(folder)

    def both(records) -> tuple[Batch, dict[str, torch.Tensor]]:
        own = padded(records, left=False)
        ids, weights = own["input_ids"].numpy().astype(np.int32), own["attention_mask"].numpy().astype(np.float32)
        return Batch(ids[:, :-1], ids[:, 1:], weights[:, 1:], None), own

    train, held_out = both(TRAIN), both(HELD_OUT)
    config = RegimeConfig(**vars(SMALL) | {"inits": ("kaiming_uniform", "gaussian"), "rows": rows})
    targets = ["q_proj", "k_proj", "up_proj", "down_proj"]
    known = load(folder)
    expected = regimes.regime(known, train[0], held_out[0], config, target_modules=targets)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = regime(model, train[1], held_out[1], targets, config=config, lora_A=drawn_steps.takeover_rows)
    assert found.training_loss == pytest.approx(expected.training_loss, rel=1e-5)
    assert found.held_out_loss == pytest.approx(expected.held_out_loss, rel=1e-5)
    keys = ["module", "split", "optimizer", "init", "rule", "rank"]
    for name in ("tokens", "crossings", "results", "takeover"):
        mine, other = (
            getattr(each, name).sort_values([key for key in keys if key in getattr(each, name)], ignore_index=True)
            for each in (found, expected)
        )
        assert list(mine.columns) == list(other.columns)
        tolerance = 2e-4 if name == "takeover" else 2e-5  # quotients of sums in which much cancels
        for column in mine:
            if mine[column].dtype.kind == "f":
                np.testing.assert_allclose(mine[column], other[column], rtol=tolerance, err_msg=f"{name} {column}")
            else:
                assert mine[column].tolist() == other[column].tolist()


def terms_of(found, split: str) -> dict[str, float]:
    """Each module's linear term under Adam with the gaussian init."""
    rows = found.crossings.query(f"optimizer == 'adam' and init == 'gaussian' and split == '{split}'")
    return dict(zip(rows["module"], rows["linear_term"], strict=True))


def takeover_of(found, rank: int, init: str, split: str = "heldout") -> float:
    """The geometric mean of the modules' takeover distances."""
    rows = found.takeover.query(f"rank == {rank} and init == '{init}' and split == '{split}'")
    return geometric_mean(rows["takeover"])


def test_takeover_distance_is_the_held_out_one_of_the_nearest_measured_rank() -> None:
    """Nearest on a logarithmic scale, among the ranks 8, 32 and 128."""
    config = replace(torch_regimes.DEFAULT, exact=True)
    found = regime(torch_models.model(), torch_models.batch(), torch_models.batch(seed=1), ["q_proj"], config=config)
    assert set(found.results["rank"]) == {8, 128}, "the ranks of the default configuration"
    assert set(found.crossings["optimizer"]) == {"sgd", "adam"}
    for rank, nearest in ((1, 8), (15, 8), (18, 32), (60, 32), (70, 128), (4096, 128)):
        expected = takeover_of(found, nearest, "gaussian")
        assert found.takeover_at(rank, "gaussian") == pytest.approx(expected, rel=1e-12)
    assert takeover_of(found, 8, "gaussian", "train") != pytest.approx(takeover_of(found, 8, "gaussian"), rel=1e-3)


def test_transfer() -> None:
    """The advice of the measured linear terms; PEFT, told so, scales by the gamma that it names."""
    model = torch_models.model()
    found = regime(
        model, torch_models.batch(), torch_models.batch(seed=1), ["q_proj", "v_proj"], config=RegimeConfig(rows=0)
    )
    tuned = Setting(2, 4.0, 3e-4, init="gaussian")
    config, rate, advice = found.transfer(tuned, rank=8, rule="rslora", regime="measured")
    expected = transfer(tuned, 8, terms_of(found, "heldout"), rule="rslora")
    assert advice == expected
    trained = terms_of(found, "train")
    assert found.transfer(tuned, 8, rule="rslora", regime="measured", split="train").advice == transfer(
        tuned, 8, trained, rule="rslora"
    )
    assert trained != terms_of(found, "heldout")
    assert (config.r, config.use_rslora, config.init_lora_weights, rate) == (8, False, "gaussian", 3e-4)
    assert config.lora_alpha == pytest.approx(expected.alpha * 8**0.5)
    adapted = peft.get_peft_model(model, config)
    for name, module in adapted.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            kind = name.rpartition(".")[2]
            assert module.scaling["default"] == pytest.approx(expected.by_type()[kind] / 8**0.5)
    default = replace(tuned, init="kaiming_uniform")
    whole = found.transfer(default, rank=8, alpha=4.0, steps=50, to_steps=90)
    assert whole.config.alpha_pattern == {}
    assert whole.advice == transfer(default, 8, alpha=4.0, steps=50, to_steps=90)
    assert whole.learning_rate == whole.advice.rate_range.best
    with pytest.raises(InputError, match=r"takeover distance .* init 'rademacher'"):
        found.takeover_at(2, "rademacher")
    with pytest.raises(InputError, match="optimizer adam, init rademacher"):
        found.transfer(Setting(2, 4.0, 3e-4, init="rademacher"), rank=8)


@pytest.mark.usefixtures("unchecked")
def test_what_is_carried_is_a_setting() -> None:
    batches = torch_models.batch(), torch_models.batch(seed=1)
    found = regime(torch_models.model(), *batches, ["q_proj"], config=RegimeConfig(rows=0))
    with pytest.raises(InputError, match=r"^setting .*{'r': 2}"):
        found.transfer({"r": 2}, rank=8)


def test_the_advice_and_the_crossing_rank_are_one_statement(caplog) -> None:
    """Below a typical module's crossing rank the advice is the whole model's all the same, and nothing warns of it."""
    found = regime(
        torch_models.model(), torch_models.batch(), torch_models.batch(seed=1), ["q_proj"], config=RegimeConfig(rows=0)
    )
    found = replace(found, crossings=found.crossings.assign(crossing_rank=31.5))
    said = found.sentence()
    assert "above rank 31.5 " in said
    assert "cross-talk averages out over modules" in said
    for rank in (8, 16, 128):
        assert found.transfer(Setting(16, 16.0, 3e-4), rank).learning_rate == 3e-4
    assert not caplog.records


def test_bad_input() -> None:
    model, batch, held_out = torch_models.model(), torch_models.batch(), torch_models.batch(seed=1)
    unlabelled = {"input_ids": batch["input_ids"]}
    cases = [
        (
            batch,
            held_out,
            ["q_proj", "w_proj"],
            {},
            "target_modules .*'w_proj'.* q_proj, k_proj",
        ),
        (batch, held_out, ["embed_tokens"], {}, "target_modules .*'embed_tokens'"),
        (batch, held_out, r".*\.w_proj", {}, "target_modules .*w_proj"),
        (batch, held_out, None, {"layers": [7]}, "layers \\[7\\] .* layers 0 to 1$"),
        (unlabelled, held_out, None, {}, "loss .* input_ids.* labels"),
        (batch, held_out, None, {"loss": lambda model, batch: model(**batch).loss * np.inf}, "loss .* inf"),
        (batch, held_out, None, {"loss": lambda *_: torch.tensor(1.0)}, "loss .*gradient"),
    ]
    for one, other, targets, kwargs, message in cases:
        with pytest.raises(InputError, match=message):
            regime(model, one, other, targets, config=SMALL, **kwargs)
        assert not any(each._forward_hooks for each in model.modules())


@pytest.mark.slow
def test_nothing_of_jax_is_imported() -> None:
    """A fork of the user's process (a loader of data) must not meet JAX's threads."""
    code = """
import sys, torch, transformers
from rora_theory.measure import torch as bridge
model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(
    vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2))
ids = [torch.randint(3, 64, (2, 9)) for _ in range(2)]
bridge.regime(model, *({"input_ids": each, "labels": each} for each in ids), ["q_proj"])
assert "jax" not in sys.modules, "jax was imported"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr


def test_layers_are_a_sample_of_the_model() -> None:
    model, batch, held_out = torch_models.model(), torch_models.batch(), torch_models.batch(seed=1)
    found = regime(model, batch, held_out, config=SMALL, layers=[1])
    assert set(found.crossings["layer"]) == {1}
    said = [text for text in found.crossings.attrs["warnings"] if "layers" in text]
    assert len(said) == 1
    assert "1 of the model's 2 layers" in said[0]
    assert found.target_modules == "all-linear"
    assert base_model(model) is model


def test_a_head_is_no_target_of_all_linear() -> None:
    """Neither the head of a language model, nor that of sequence classification."""
    configuration = transformers.LlamaConfig(**torch_models.TEXT, num_labels=2)
    for model, head in (
        (transformers.LlamaForSequenceClassification(configuration), "score"),
        (torch_models.model(), "lm_head"),
    ):
        assert head in linear_modules(model)
        assert set(linear_modules(model)) - set(chosen(model, None)) == {head}
        assert list(chosen(model, [head])) == [head]


def test_adapters_that_were_off_stay_off() -> None:
    model = peft.get_peft_model(torch_models.model(), peft.LoraConfig(target_modules=["q_proj"]))
    layers = [module for module in model.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    model.disable_adapter_layers()
    layers[0].enable_adapters(True)
    needed = [parameter.requires_grad for parameter in model.parameters()]
    with without_adapters(model):
        assert all(layer.disable_adapters for layer in layers)
    assert [layer.disable_adapters for layer in layers] == [False, *[True] * (len(layers) - 1)]
    assert [parameter.requires_grad for parameter in model.parameters()] == needed
