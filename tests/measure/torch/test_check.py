"""The rank coordinate check of PEFT models: which rule keeps the first steps, and that it can fail."""

import numpy as np
import pytest

from rora_theory import InputError

torch = pytest.importorskip("torch", reason="the bridge: the extra torch")
peft = pytest.importorskip("peft", reason="the bridge: the extra torch")
pytest.importorskip("transformers", reason="the bridge: the extra torch")

from support import torch_models  # noqa: E402

from rora_theory.measure.torch import coordinate_check  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers and peft
RANKS = (4, 8, 16)


def made(family="llama", **arguments):
    """Of a rank, an adapter on one and the same base."""
    base = torch_models.model(family)
    arguments = {"target_modules": "all-linear", "lora_alpha": 16, "task_type": "CAUSAL_LM"} | arguments

    def make_model(rank):
        return peft.get_peft_model(base, peft.LoraConfig(r=rank, **arguments))

    make_model.base = base
    return make_model


def sgd(parameters, rank):  # noqa: ARG001
    return torch.optim.SGD(parameters, lr=1e-3)


def slow_adamw(parameters, rank):  # noqa: ARG001
    return torch.optim.AdamW(parameters, lr=1e-6)


@pytest.mark.parametrize(("use_rslora", "scaling"), [(False, 0.5), (True, 2.0)])
def test_the_first_step_by_hand(use_rslora, scaling) -> None:
    """The check reports the changes that PEFT's own forward pass shows after one step of Adam.

    They are those of hidden states and logits, and what an adapter adds to its module's output, at alpha 8 and rank 16.
    A is nested over ranks, uniform within PEFT's bound, and different for each seed.
    """
    batch, held_out = torch_models.batch(seed=0), torch_models.batch(seed=1)
    make_model = made(target_modules=["q_proj"], lora_alpha=8, use_rslora=use_rslora)
    starts, trained = [], []

    def optimizer(parameters, rank):  # noqa: ARG001
        starts.append([each.detach().clone() for each in parameters])
        trained.append(parameters)
        return torch.optim.Adam(parameters, lr=1e-3)

    found = coordinate_check(make_model, batch, RANKS, held_out=held_out, make_optimizer=optimizer, steps=(1,), seeds=2)
    small, large, other = (starts[i][0] for i in (0, 2, 3))
    assert torch.equal(small, large[:4])
    assert not torch.equal(small, other)
    assert not torch.equal(small, starts[0][2])  # of the next layer
    assert 0.2 < float(large.abs().max()) <= 0.25  # 1 / sqrt(p_in)
    coordinate_check(make_model, batch, RANKS[:2], make_optimizer=optimizer, steps=(1,), seeds=2, seed=5)
    assert not torch.equal(starts[6][0], small)  # other draws
    assert not [name for name, _ in make_model.base.named_modules() if "lora" in name]
    again = make_model(16)  # on the base that the check has left as it was
    own = [each for each in again.parameters() if each.requires_grad]
    before = again(**batch, output_hidden_states=True)
    with torch.no_grad():
        for one, other in zip(own, trained[5], strict=True):
            one.copy_(other)
    added = []
    for layer in (0, 1):
        module = again.base_model.model.model.layers[layer].self_attn.q_proj
        module.lora_B["default"].register_forward_hook(lambda _, __, y: added.append(y))
    after = again(**batch, output_hidden_states=True)
    values = found.sizes.query("rank == 16 and seed == 1 and split == 'train'").set_index("quantity")["value"]
    real = slice(None), slice(None, -1)  # the last token has no target
    expected = {
        "hidden": (after.hidden_states[-1] - before.hidden_states[-1])[real],
        "logits": (after.logits - before.logits)[real],
        "output": scaling * torch.stack(added)[:, :, :-1],
    }
    for name, change in expected.items():
        assert values[name] == pytest.approx(float(change.square().mean().sqrt()), rel=1e-4)
    assert values["loss"] == pytest.approx(float(after.loss), rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "optimizer", "verdict"),
    [
        ({}, slow_adamw, "flat"),
        ({"use_rslora": True}, slow_adamw, "grows with the rank"),
        ({"use_rslora": True}, sgd, "flat"),
        ({}, sgd, "shrinks with the rank"),
        ({"init_lora_weights": "gaussian"}, slow_adamw, "shrinks with the rank"),
    ],
    ids=["alpha/r, AdamW", "alpha/sqrt(r), AdamW", "alpha/sqrt(r), SGD", "alpha/r, SGD", "gaussian, AdamW"],
)
def test_which_rule_keeps_the_first_step(arguments, optimizer, verdict) -> None:
    """As the law has it where signal leads: on the batch that was learned, whose tokens are few."""
    batch = torch_models.batch(rows=1, length=3)
    found = coordinate_check(
        made(**arguments), batch, (32, 64, 128), make_optimizer=optimizer, steps=(1, 2), seeds=3, band=0.25
    )
    assert found.verdict == verdict
    assert found.sentence().startswith("The first steps of the whole model ")
    assert f"(verdict: {verdict}). Measured on LlamaForCausalLM in float32" in found.sentence()
    assert "at ranks 32, 64 and 128, after 1 and 2 steps of" in found.scope
    assert "3 draws of A, 1 training batch and no held-out batch" in found.scope
    if verdict == "flat":
        found.assert_flat()
    else:
        with pytest.raises(
            AssertionError, match=f"(hidden|logits) of model on train at step 1 is not flat but {verdict[:5]}"
        ):
            found.assert_flat()
    with pytest.raises(InputError, match="split 'held_out'"):
        found.assert_flat(split="held_out")


def test_the_steps_are_the_user_s() -> None:
    """Batches in turn; a rate that falls with the rank undoes a scaling that grows with it."""
    batches = [torch_models.batch(seed=seed, rows=1, length=3) for seed in (0, 1)]
    seen = []

    def loss(model, batch):
        if torch.is_grad_enabled():
            seen.append(int(batch["input_ids"][0, 0]))
        return model(**batch).loss

    def optimizer(parameters, rank):
        return torch.optim.AdamW(parameters, lr=1e-6 / rank**0.5)

    make_model = made(use_rslora=True)
    found = coordinate_check(
        make_model, batches, (32, 128), make_optimizer=optimizer, loss=loss, steps=(1, 3), seeds=2, band=0.25
    )
    first = [int(each["input_ids"][0, 0]) for each in batches]
    assert seen == [first[0], first[1], first[0]] * 4
    assert found.verdict == "flat"
    assert "AdamW at 1.76777e-07; AdamW at 8.83883e-08" in found.scope


@pytest.mark.parametrize("training", [False, True])
def test_models_are_stepped_in_their_own_mode_and_share_their_dropout(training) -> None:
    """While B is zero, the loss of a step depends on the dropout masks alone: they are equal at every rank."""
    make_model = made("gpt2", target_modules=["c_attn"], lora_dropout=0.3)
    base, batch = make_model.base, torch_models.batch("gpt2")
    plain = float(base(**batch).loss)
    own_modes, losses = [], []

    def make_in_mode(rank):
        model = make_model(rank).train(training)
        base.transformer.h[0].eval()  # a block whose mode differs from the model's
        own_modes[:] = [module.training for module in model.modules()]
        return model

    def loss(model, batch):
        value = model(**batch).loss
        modes = [module.training for module in model.modules()]
        if torch.is_grad_enabled():
            assert modes == own_modes
            losses.append(float(value))
        else:
            assert not any(modes)
            assert float(value) == pytest.approx(plain, rel=1e-6)
        return value

    def frozen(parameters, rank):  # noqa: ARG001
        return torch.optim.SGD(parameters, lr=0.0)

    coordinate_check(make_in_mode, batch, RANKS, make_optimizer=frozen, loss=loss, steps=(1, 2), seeds=2)
    by_rank = np.reshape(losses, (2, len(RANKS), 2))  # seeds, ranks, steps
    np.testing.assert_allclose(by_rank, np.broadcast_to(by_rank[:, :1], by_rank.shape), rtol=1e-6)
    apart = np.diff(np.sort(by_rank[:, 0], axis=None)) / plain
    assert (apart > 1e-4 if training else apart < 1e-6).all(), "in training, a mask for each seed and step"
    in_training = {module.training for module in base.modules()}
    assert (base.training, in_training) == (training, {training, False})
    assert not any(module.training for module in base.transformer.h[0].modules())


@pytest.mark.parametrize(
    ("rate", "told"), [(3e-4, "AdamW at 0.0003,"), (lambda rank: rank * 1e-5, "AdamW at 4e-05; AdamW at 8e-05,")]
)
def test_the_learning_rate_is_the_user_s(rate, told) -> None:
    """A number or a function of the rank: under Adam a step's change of an adapter is proportional to it."""
    found = coordinate_check(
        made(target_modules=["q_proj"]), torch_models.batch(), RANKS[:2], learning_rate=rate, steps=(1,), seeds=2
    )
    assert told in found.scope
    plain = coordinate_check(
        made(target_modules=["q_proj"]), torch_models.batch(), RANKS[:2], learning_rate=1e-5, steps=(1,), seeds=2
    )
    sizes, expected = (each.sizes.query("quantity == 'output'").set_index("rank")["value"] for each in (found, plain))
    factors = {rank: (rate(rank) if callable(rate) else rate) / 1e-5 for rank in RANKS[:2]}
    np.testing.assert_allclose(sizes / expected, sizes.index.map(factors), rtol=1e-3)


def test_a_held_out_batch_is_read_where_it_is_new() -> None:
    """Nothing of a batch is apart from itself."""
    batch = torch_models.batch()
    with pytest.raises(InputError, match="held_out has no token"):
        coordinate_check(made(), batch, RANKS, held_out=batch, steps=(1,), seeds=2)
    found = coordinate_check(made(), batch, held_out=torch_models.batch(seed=1), steps=(1,), seeds=2)
    assert found.table.ranks == (2, 8, 32, 128), "the default"
    assert set(found.slopes["split"]) == {"train", "held_out"}
    assert set(found.slopes.query("module == 'down_proj'")["quantity"]) == {"output"}
    assert np.isfinite(found.sizes["value"]).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "task", "targets"),
    [("gpt2", "CAUSAL_LM", ["c_attn"]), ("t5", "SEQ_2_SEQ_LM", ["q"]), ("vit", None, "all-linear")],
)
def test_other_families(family, task, targets) -> None:
    """The check reports the changes that the model's own forward pass shows, at the tokens that are in the loss."""
    make_model, trained = made(family, task_type=task, target_modules=targets), []

    def optimizer(parameters, rank):  # noqa: ARG001
        trained.append(parameters)
        return torch.optim.SGD(parameters, lr=0.1)

    batch, held_out = torch_models.batch(family), torch_models.batch(family, seed=1)
    real = torch.ones(batch["labels"].shape, dtype=torch.bool)
    if family == "gpt2":
        real[:, -1] = False  # the last token has no target
    if family == "t5":
        batch["labels"][0, 3:] = -100
        real = batch["labels"] != -100
    found = coordinate_check(
        make_model, batch, RANKS[:2], held_out=held_out, make_optimizer=optimizer, steps=(2,), seeds=2
    )
    model = make_model(RANKS[1])
    adapter = [parameter for parameter in model.parameters() if parameter.requires_grad]
    start = outputs(model, batch)
    with torch.no_grad():
        for parameter, value in zip(adapter, trained[-1], strict=True):
            parameter.copy_(value)
    sizes = found.sizes.query(f"rank == {RANKS[1]} and seed == 1 and module == 'model'")
    for name, after in outputs(model, batch).items():
        change = (after - start[name])[real]
        value = sizes.query("split == 'train' and quantity == @name")["value"].item()
        assert value == pytest.approx(float(change.square().mean().sqrt()), rel=1e-4), name
        assert value > 0
    losses = sizes.query("quantity == 'loss'").set_index("split")["value"]
    for split, own in (("train", batch), ("held_out", held_out)):
        assert losses[split] == pytest.approx(float(model(**own).loss.detach()), rel=1e-6)
    assert {*sizes["quantity"]} == {*start, "loss"}
    assert np.isfinite(found.sizes["value"]).all()


def outputs(model, batch) -> dict[str, torch.Tensor]:
    """The logits of a model, and what its output head reads where it has one for every token."""
    found, head = {}, model.get_base_model().get_output_embeddings()
    hook = head and head.register_forward_pre_hook(lambda _, args: found.update(hidden=args[0]))
    with torch.no_grad():
        found["logits"] = model(**batch).logits
    if hook:
        hook.remove()
    return found


def test_bad_input() -> None:
    batch = torch_models.batch()
    base = torch_models.model()

    def trained(rank):
        return peft.get_peft_model(
            torch_models.model(), peft.LoraConfig(r=rank, target_modules=["q_proj"], init_lora_weights=False)
        )

    cases = [
        (made(), (4,), {}, r"ranks .*\b[14]\b"),
        (made(), RANKS, {"steps": (2, 1)}, "steps .*2,? 1"),
        (made(), RANKS, {"seeds": 1}, r"seeds .*\b1\b"),
        (lambda _: made()(8), RANKS, {}, r"make_model\(4\) .* rank 4, got rank 8 "),
        (lambda _: base, RANKS, {}, r"make_model\(4\) .* LoRA"),
        (trained, RANKS, {}, r"make_model\(4\) .* B that is not zero"),
        (made(init_lora_weights="eva"), RANKS, {}, "init_lora_weights .*'eva'"),
    ]
    for make_model, ranks, arguments, message in cases:
        with pytest.raises(InputError, match=message):
            coordinate_check(make_model, batch, ranks, **arguments)
