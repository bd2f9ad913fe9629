"""The rank coordinate check of PEFT models: which rule preserves the first steps, and that the check can fail."""

import copy
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from support import torch_models
from support.torch_models import peft, torch, transformers

from rora_theory import InputError
from rora_theory.measure import coordinate_check

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers and peft
RANKS = (4, 8, 16)
BATCHES = torch_models.batch(seed=0), torch_models.batch(seed=1)


def maker(base=None, **arguments) -> partial:
    """Return a function of the rank that adds a fresh adapter to the same base."""
    arguments = {"target_modules": "all-linear", "lora_alpha": 16} | arguments
    return partial(torch_models.adapted, torch_models.model() if base is None else base, **arguments)


def rms(change: torch.Tensor) -> float:
    return float(change.detach().square().mean().sqrt())


def trained(model, values):
    """Return a model with these values in its adapter."""
    adapter = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter, value in zip(adapter, values, strict=True):
            parameter.copy_(value)
    return model


def outputs(model, batch) -> dict[str, Any]:
    """Return a model's additions to its modules' outputs, its logits, and its head's input if there is one."""
    values = {"output": []}
    hooks = [
        module.lora_B["default"].register_forward_hook(lambda _, __, y: values["output"].append(y))
        for module in model.modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    ]
    if head := model.get_base_model().get_output_embeddings():
        hooks.append(head.register_forward_pre_hook(lambda _, args: values.update(hidden=args[0])))
    with torch.no_grad():
        result = model(**batch)
    for hook in hooks:
        hook.remove()
    return values | {"logits": result.logits, "loss": result.loss}


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", {"target_modules": ["q_proj"], "use_rslora": True}),
        pytest.param("t5", {"target_modules": ["q"], "task_type": "SEQ_2_SEQ_LM"}, marks=pytest.mark.slow),
        pytest.param("vit", {"target_modules": "all-linear", "task_type": None}, marks=pytest.mark.slow),
    ],
)
def test_the_changes_are_those_of_the_model_itself(family, config) -> None:
    """The changes equal those of PEFT's own forward pass after two steps, at the tokens in the loss.

    They are those of hidden states and logits, and the adapter's addition to its module's output.
    """
    base, ends = torch_models.model(family), []
    make_model = maker(base, **config)

    def optimizer(parameters, rank):  # noqa: ARG001
        ends.append(parameters)
        return torch.optim.SGD(parameters, lr=0.1)

    batch, held_out = torch_models.batch(family), torch_models.batch(family, seed=1)
    if family == "t5":
        batch["labels"][0, 3:] = -100
    real = batch["labels"] != -100
    if family == "llama":
        real[:, -1] = False  # the last token has no target
    check = coordinate_check(
        make_model, batch, RANKS[:2], held_out=held_out, make_optimizer=optimizer, steps=(2,), seeds=2
    )
    assert not [name for name, _ in base.named_modules() if "lora" in name]
    model = make_model(RANKS[1])  # on the base that the check has left as it was
    before = outputs(model, batch)
    after = outputs(trained(model, ends[-1]), batch)
    sizes = check.sizes.query(f"rank == {RANKS[1]} and seed == 1").set_index(["module", "split", "quantity"])["value"]
    for name in before.keys() & {"hidden", "logits"}:
        assert sizes["model", "train", name] == pytest.approx(rms((after[name] - before[name])[real]), rel=1e-4), name
        assert sizes["model", "train", name] > 0
    if family == "llama":
        added = 16 / 8**0.5 * torch.stack(after["output"])  # rsLoRA's scaling
        assert sizes["q_proj", "train", "output"] == pytest.approx(rms(added[:, real]), rel=1e-4)
    for split, used in (("train", batch), ("held_out", held_out)):
        assert sizes["model", split, "loss"] == pytest.approx(float(outputs(model, used)["loss"]), rel=1e-6)
    assert set(sizes["model", "train"].index) == before.keys() - {"output"}
    assert np.isfinite(check.sizes["value"]).all()


def test_draws_of_A_are_nested_over_ranks_and_differ_otherwise() -> None:
    """Draws are uniform within PEFT's bound, and differ between layers and seeds."""
    starts = []

    def optimizer(parameters, rank):  # noqa: ARG001
        starts.append([parameter.detach().clone() for parameter in parameters])
        return torch.optim.Adam(parameters, lr=1e-3)

    for seed in (0, 5):
        coordinate_check(
            maker(target_modules=["q_proj"]), BATCHES[0], (4, 16), make_optimizer=optimizer, steps=(1,), seeds=2,
            seed=seed,
        )  # fmt: skip
    small, large, *other_seeds = (starts[i][0] for i in (0, 1, 2, 4))
    assert torch.equal(small, large[:4])
    assert not any(torch.equal(small, other) for other in (starts[0][2], *other_seeds))
    assert 0.2 < float(large.abs().max()) <= 0.25  # 1 / sqrt(p_in)


@pytest.mark.parametrize(
    ("arguments", "training", "verdict"),
    [
        ({}, {"learning_rate": 1e-6}, "flat"),
        ({"use_rslora": True}, {"learning_rate": 1e-6}, "grows with the rank"),
        ({"use_rslora": True}, {"make_optimizer": lambda parameters, _: torch.optim.SGD(parameters, lr=1e-3)}, "flat"),
        ({"init_lora_weights": "gaussian"}, {"learning_rate": 1e-6}, "shrinks with the rank"),
    ],
    ids=["alpha/r, AdamW", "alpha/sqrt(r), AdamW", "alpha/sqrt(r), SGD", "gaussian, AdamW"],
)
def test_the_rule_that_preserves_the_first_step(arguments, training, verdict) -> None:
    """The law holds where the signal dominates: on the trained batch, which has few tokens."""
    batch = torch_models.batch(rows=1, length=3)
    check = coordinate_check(maker(**arguments), batch, (32, 64, 128), steps=(1, 2), seeds=3, band=0.25, **training)
    assert check.verdict == verdict
    assert check.sentence().startswith("The first steps of the whole model ")
    assert f"(verdict: {verdict}; ranks 32 to 128, steps up to 2, 3 draws)." in check.sentence()
    assert len(check.sentence().split()) <= 35
    assert "Use float32" in replace(check, verdict="nothing moved").sentence()
    assert "in `slopes`" in replace(check, verdict="mixed (1 flat, 1 grows)").sentence()
    assert check.scope.startswith("Measured on LlamaForCausalLM in float32 ")
    assert "at ranks 32, 64 and 128, after 1 and 2 steps of" in check.scope
    assert "3 draws of A, 1 training batch and no held-out batch" in check.scope
    if verdict == "flat":
        check.assert_flat()
    else:
        with pytest.raises(
            AssertionError, match=f"(hidden|logits) of the model on train at step 1 is not flat but {verdict[:5]}"
        ):
            check.assert_flat()


def test_custom_loss_optimizer_and_batches() -> None:
    """Batches are used in turn; a rate that falls with the rank cancels a scaling that grows with it."""
    batches = [torch_models.batch(seed=seed, rows=1, length=3) for seed in (0, 1)]
    first_tokens = []

    def loss(model, batch):
        if torch.is_grad_enabled():
            first_tokens.append(int(batch["input_ids"][0, 0]))
        return model(**batch).loss

    def optimizer(parameters, rank):
        return torch.optim.AdamW(parameters, lr=1e-6 / rank**0.5)

    check = coordinate_check(
        maker(use_rslora=True), batches, (32, 128), make_optimizer=optimizer, loss=loss, steps=(1, 3), seeds=2,
        band=0.25,
    )  # fmt: skip
    assert first_tokens == [int(batches[step % 2]["input_ids"][0, 0]) for step in range(3)] * 4
    assert check.verdict == "flat"
    assert "AdamW at 1.76777e-07; AdamW at 8.83883e-08" in check.scope


@pytest.mark.parametrize("training", [False, True])
def test_models_are_stepped_in_their_own_mode_and_share_their_dropout(training) -> None:
    """While B is zero, a step's loss depends on the dropout masks alone, which are equal at every rank."""
    base, batch = torch_models.model("gpt2"), torch_models.batch("gpt2")
    make_model = maker(base, target_modules=["c_attn"], lora_dropout=0.3)
    plain = float(base(**batch).loss)
    modes_before, losses = [], []

    def make_in_mode(rank):
        model = make_model(rank).train(training)
        base.transformer.h[0].eval()  # a block whose mode differs from the model's
        modes_before[:] = [module.training for module in model.modules()]
        return model

    def loss(model, batch):
        value = model(**batch).loss
        modes = [module.training for module in model.modules()]
        if torch.is_grad_enabled():
            assert modes == modes_before
            losses.append(float(value))
        else:
            assert not any(modes)
            assert float(value) == pytest.approx(plain, rel=1e-6)
        return value

    frozen = {"make_optimizer": lambda parameters, _: torch.optim.SGD(parameters, lr=0.0)}
    coordinate_check(make_in_mode, batch, RANKS, loss=loss, steps=(1, 2), seeds=2, **frozen)
    by_rank = np.reshape(losses, (2, len(RANKS), 2))  # seeds, ranks, steps
    np.testing.assert_allclose(by_rank, np.broadcast_to(by_rank[:, :1], by_rank.shape), rtol=1e-6)
    apart = np.diff(np.sort(by_rank[:, 0], axis=None)) / plain
    assert (apart > 1e-4 if training else apart < 1e-6).all(), "in training, a mask for each seed and step"
    assert (base.training, {module.training for module in base.modules()}) == (training, {training, False})
    assert not any(module.training for module in base.transformer.h[0].modules())


def test_custom_learning_rates() -> None:
    """Under Adam an adapter's change in a step is proportional to the rate, which may depend on the rank."""
    sizes = {}

    def optimizer(parameters, rank):
        return torch.optim.AdamW(parameters, lr=rank * 1e-5)

    for name, arguments, described in (
        ("plain", {"learning_rate": 1e-5}, "AdamW at 1e-05,"),
        ("number", {"learning_rate": 3e-4}, "AdamW at 0.0003,"),
        ("function", {"make_optimizer": optimizer}, "AdamW at 4e-05; AdamW at 8e-05,"),
    ):
        check = coordinate_check(
            maker(target_modules=["q_proj"]), BATCHES[0], RANKS[:2], steps=(1,), seeds=2, **arguments
        )
        assert described in check.scope
        sizes[name] = check.sizes.query("quantity == 'output'").set_index("rank")["value"]
    np.testing.assert_allclose(sizes["number"] / sizes["plain"], 30, rtol=1e-3)
    np.testing.assert_allclose(sizes["function"] / sizes["plain"], sizes["plain"].index, rtol=1e-3)


@pytest.mark.parametrize("family", ["llama", pytest.param("vit", marks=pytest.mark.slow)])
def test_outputs_of_an_unchanged_base_are_computed_once(family) -> None:
    """They are the reference of every rank and draw, unless `make_model` returns another base or changes it in place.
    A vision model has no output embeddings at which to read logits."""
    batch, held_out = torch_models.batch(family), torch_models.batch(family, seed=1)
    base, seeds = torch_models.model(family), list(range(6)) * 2
    passes: list[bool] = []

    def changed_in_place() -> Any:
        base.load_state_dict(torch_models.model(family, seed=seeds.pop(0)).state_dict())
        return base

    def check(make_base) -> tuple[np.ndarray, tuple[int, int]]:
        """Return the sizes, and the numbers of training steps and of other forward passes."""

        def make_model(rank):
            arguments = {"target_modules": "all-linear", "task_type": None if family == "vit" else "CAUSAL_LM"}
            model = torch_models.adapted(make_base(), rank, **arguments)
            model.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
            return model

        passes.clear()
        arguments = {"held_out": held_out, "steps": (1, 2), "seeds": 2}
        sizes = coordinate_check(make_model, batch, RANKS, **arguments).sizes["value"].to_numpy()
        return sizes, (passes.count(True), passes.count(False))

    shared, calls = check(lambda: base)
    assert calls == (12, 26)
    copies, calls = check(lambda: torch_models.model(family))
    assert calls == (12, 36)
    np.testing.assert_allclose(copies, shared, rtol=1e-5)
    # References of other weights would make the first changes as large as the outputs.
    in_place, calls = check(changed_in_place)
    assert calls == (12, 36)
    different, _ = check(lambda: torch_models.model(family, seed=seeds.pop(0)))
    np.testing.assert_allclose(in_place, different, rtol=1e-5)


def test_every_rank_starts_from_the_head_of_a_shared_classifier() -> None:
    """PEFT trains a copy of a classifier's head, which it leaves in the base model."""
    classes = transformers.LlamaConfig(**torch_models.TEXT, num_labels=3)
    base = torch_models.initialised(transformers.LlamaForSequenceClassification(classes)).eval()
    batches = [batch | {"labels": batch["input_ids"][:, 0] % 3} for batch in BATCHES]
    head, before = base.score, torch_models.state_of(base)

    def sizes(make_base) -> np.ndarray:
        def make_model(rank):
            return torch_models.adapted(make_base(), rank, target_modules=["q_proj"], task_type="SEQ_CLS")

        return coordinate_check(make_model, batches, RANKS, learning_rate=0.1).sizes["value"].to_numpy()

    copies, shared = sizes(lambda: copy.deepcopy(base)), sizes(lambda: base)
    np.testing.assert_allclose(copies, shared, rtol=1e-4, atol=1e-7)
    assert base.score is head
    assert all(torch.equal(value, before["tensors"][name]) for name, value in base.state_dict().items())


def test_the_base_is_free_of_adapters_after_an_error() -> None:
    base, calls = torch_models.model(), []
    before = torch_models.state_of(base)["modules"]

    def loss(model, batch):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return model(**batch).loss

    with pytest.raises(KeyboardInterrupt):
        coordinate_check(maker(base), BATCHES[0], RANKS, loss=loss, steps=(1,))
    assert torch_models.state_of(base)["modules"] == before


def test_the_identity_that_dora_multiplies_is_no_input() -> None:
    """The first update of A and B is nearly LoRA's, and so is the size of B A x."""
    sizes = [
        coordinate_check(maker(target_modules=["q_proj"], use_dora=dora), BATCHES[0], RANKS, steps=(1,), seeds=2)
        .sizes.query("quantity == 'output'")["value"]
        .to_numpy()
        for dora in (False, True)
    ]
    np.testing.assert_allclose(*sizes, rtol=1e-3)


def test_a_loss_that_does_not_call_the_head() -> None:
    """The logits are then those of the model; without any the check would report that nothing moved."""

    def loss(model, batch):
        base = model.get_base_model()
        logits = base.model(input_ids=batch["input_ids"]).last_hidden_state @ base.lm_head.weight.T
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())

    arguments = (maker(), BATCHES[0], RANKS)
    usual, own = (coordinate_check(*arguments, loss=function, steps=(1,), seeds=2) for function in (None, loss))
    assert set(own.sizes["quantity"]) == {"hidden", "logits", "output", "loss"}
    np.testing.assert_allclose(own.sizes["value"], usual.sizes["value"], rtol=1e-3)


def test_a_convolution() -> None:
    """The rows of its A are drawn as those of a linear module with as many inputs."""
    make_model = maker(torch_models.model("vit"), target_modules=r".*patch_embeddings\.projection", task_type=None)
    check = coordinate_check(make_model, torch_models.batch("vit"), RANKS, steps=(1,), seeds=2)
    assert (check.sizes.query("quantity == 'output'")["value"] > 0).all()


def test_a_held_out_batch_is_measured_at_its_unseen_tokens() -> None:
    """No token of a batch is new relative to the same batch."""
    batch, held_out = BATCHES
    with pytest.raises(InputError, match="held_out has no token"):
        coordinate_check(maker(), batch, RANKS, held_out=batch, steps=(1,), seeds=2)
    check = coordinate_check(maker(), batch, held_out=held_out, steps=(1,))
    assert list(dict.fromkeys(check.sizes["rank"])) == [2, 8, 32, 128], "the default"
    assert set(check.sizes["seed"]) == {0, 1, 2}, "the default"
    assert set(check.slopes["split"]) == {"train", "held_out"}
    assert set(check.slopes.query("module == 'down_proj'")["quantity"]) == {"output"}
    assert np.isfinite(check.sizes["value"]).all()


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        ({}, {"ranks": (4,)}, r"^ranks .*\b[14]\b"),
        ({}, {"ranks": (4, 4)}, "^ranks .* 4 4$"),
        ({}, {"steps": (2, 1)}, "steps .*2,? 1"),
        ({}, {"seeds": 1}, r"seeds .*\b1\b"),
        ({}, {"make_model": lambda _: maker()(8)}, r"make_model\(4\) .* rank 4, got rank 8 "),
        ({}, {"make_model": lambda _: torch_models.model()}, r"make_model\(4\) .* LoRA"),
        ({"init_lora_weights": False}, {}, r"make_model\(4\) .* B that is not zero"),
        ({"init_lora_weights": "eva"}, {}, "init_lora_weights .*'eva'"),
        ({}, {"make_model": 3}, "make_model .* 3$"),
        ({}, {"make_model": lambda _: None}, r"make_model\(4\) .* None$"),
        ({}, {"batch": 3}, "batch .* 3$"),
        ({}, {"batch": []}, "batch .* none$"),
        ({}, {"batch": [BATCHES[0], 3]}, "batch .* 3$"),
        ({}, {"held_out": {}}, "held_out .* {}$"),
        ({}, {"ranks": 3}, "ranks .* 3$"),
        ({}, {"steps": 3}, "steps .* 3$"),
        ({}, {"steps": ("a",)}, "steps .* 'a'$"),
        ({}, {"learning_rate": "x"}, "learning_rate .* 'x'$"),
        ({}, {"make_optimizer": 3}, "make_optimizer .* 3$"),
        ({}, {"make_optimizer": lambda *_: None}, "make_optimizer .* None$"),
        ({}, {"loss": lambda *_: None}, "loss .* None$"),
        ({}, {"band": float("nan")}, "band .* nan$"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_input(config, arguments, message) -> None:
    with pytest.raises(InputError, match=message):
        coordinate_check(**{"make_model": maker(**config), "batch": BATCHES[0], "ranks": RANKS} | arguments)
