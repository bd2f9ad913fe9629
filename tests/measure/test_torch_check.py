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


def test_the_first_step_by_hand() -> None:
    """What one step of Adam changes of hidden states and logits, and what a module's adapter adds, from PEFT's own
    forward pass; A is nested over ranks, uniform within PEFT's bound, another one for another seed."""
    batch, held_out = torch_models.batch(seed=0), torch_models.batch(seed=1)
    make_model = made(target_modules=["q_proj"], lora_alpha=8)
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
        "output": 8 / 16 * torch.stack(added)[:, :, :-1],
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
    assert (
        f"What a step changes of the whole model: {verdict}. Found on LlamaForCausalLM in float32" in found.sentence()
    )
    assert "at ranks 32, 64 and 128, after 1 and 2 steps of" in found.scope
    assert "3 draws of A, 1 training batch and none held out" in found.scope
    if verdict == "flat":
        found.assert_flat()
    else:
        with pytest.raises(
            AssertionError, match=f"(hidden|logits) of model on train at step 1 is not flat but {verdict[:5]}"
        ):
            found.assert_flat()
    with pytest.raises(InputError, match="nothing was read of split 'held_out'"):
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


def test_a_held_out_batch_is_read_where_it_is_new() -> None:
    """Nothing of a batch is apart from itself."""
    batch = torch_models.batch()
    with pytest.raises(InputError, match="no held-out token is apart from the trained ones"):
        coordinate_check(made(), batch, RANKS, held_out=batch, steps=(1,), seeds=2)
    found = coordinate_check(made(), batch, RANKS, held_out=torch_models.batch(seed=1), steps=(1,), seeds=2)
    assert set(found.slopes["split"]) == {"train", "held_out"}
    assert set(found.slopes.query("module == 'down_proj'")["quantity"]) == {"output"}
    assert np.isfinite(found.sizes["value"]).all()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "t5", "vit"])
def test_other_families(family) -> None:
    task = {"t5": "SEQ_2_SEQ_LM", "vit": None}.get(family, "CAUSAL_LM")
    held_out = torch_models.batch(family, seed=1)
    found = coordinate_check(
        made(family, task_type=task), torch_models.batch(family), RANKS, held_out=held_out, steps=(1, 2), seeds=2
    )
    quantities = {"logits"} if family == "vit" else {"hidden", "logits"}
    assert set(found.slopes.query("module == 'model'")["quantity"]) == quantities
    assert np.isfinite(found.sizes["value"]).all()


def test_bad_input() -> None:
    batch = torch_models.batch()
    base = torch_models.model()

    def trained(rank):
        return peft.get_peft_model(
            torch_models.model(), peft.LoraConfig(r=rank, target_modules=["q_proj"], init_lora_weights=False)
        )

    cases = [
        (made(), (4,), {}, "--ranks has 1 values; accepted are 2 or more"),
        (made(), RANKS, {"steps": (2, 1)}, "steps are 2 1; accepted are ascending"),
        (made(), RANKS, {"seeds": 1}, "seeds is 1; accepted is an integer of 2 or more"),
        (lambda _: made()(8), RANKS, {}, r"make_model\(4\) gives .* an adapter of rank 8; accepted is rank 4"),
        (lambda _: base, RANKS, {}, r"make_model\(4\) gives a model without LoRA"),
        (trained, RANKS, {}, "a B that is not zero; accepted is a fresh adapter"),
        (made(init_lora_weights="eva"), RANKS, {}, "init_lora_weights is 'eva', whose steps are not covered here"),
    ]
    for make_model, ranks, arguments, message in cases:
        with pytest.raises(InputError, match=message):
            coordinate_check(make_model, batch, ranks, **arguments)
