"""Pretraining: every weight is trained, runs repeat and resume, and the saved model is the one that was trained."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rora_theory.errors import InputError
from rora_theory.lab import llama
from rora_theory.lab.finetune import StepCompleted, ValidationCompleted
from rora_theory.lab.finetune.loss import cross_entropy, cross_entropy_of_trained_head
from rora_theory.lab.llama.saving import tokenizer_files
from rora_theory.lab.llama.weights import save_hf
from rora_theory.lab.pretrain import (
    ModelShape,
    PretrainSettings,
    prepare_windows,
    start_pretraining,
    train_tokenizer,
    unigram_loss,
)

SHAPE = ModelShape(layers=2, hidden_size=32, intermediate_size=48, heads=2, context=16, vocabulary=300)
SETTINGS = PretrainSettings(steps=6, batch_size=4, warmup=1, lr=0.01, held_out=4, evaluate_every=3, checkpoint_every=2)
NAMES = ("Ann", "Bo", "Cy", "Di", "Ed")
TEXTS = [" ".join(f"{a} saw {b} and {b} saw {a}." for a, b in itertools.permutations(NAMES, 2)) * 6]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, SHAPE.vocabulary)


def train(tokenizer, settings=SETTINGS, checkpoints=None, *, steps=None):
    """Return the losses by step and the trainer of a run, which ends after ``steps`` as if it were killed."""
    data = prepare_windows(TEXTS, tokenizer, SHAPE, settings)
    trainer = start_pretraining(data, tokenizer, SHAPE, settings, checkpoints)
    losses = {}
    for event in trainer.train():
        if isinstance(event, StepCompleted):
            losses[event.step] = event.loss
            if event.step == steps:
                break
    trainer.close()
    return losses, trainer


@pytest.mark.slow
def test_a_run_is_seeded_and_resumes(tokenizer, tmp_path):
    losses, trainer = train(tokenizer)
    again, _ = train(tokenizer)
    assert again == losses
    other, _ = train(tokenizer, PretrainSettings(**vars(SETTINGS) | {"seed": 1}))
    assert other != losses
    begun, _ = train(tokenizer, checkpoints=tmp_path / "run", steps=4)
    rest, resumed = train(tokenizer, checkpoints=tmp_path / "run")
    assert 1 < min(rest) <= 5, "the second part begins after a checkpoint"
    assert begun | rest == losses
    jax.tree.map(np.testing.assert_array_equal, resumed.adapter("last").params, trainer.adapter("last").params)


@pytest.mark.slow
def test_every_weight_is_trained_and_the_loss_falls_below_the_tokens_frequencies():
    settings = PretrainSettings(steps=60, batch_size=8, warmup=5, lr=0.01, held_out=8, evaluate_every=60)
    texts = ["the quick brown fox jumps over the lazy dog. " * 60]
    tokenizer = train_tokenizer(texts, 257)
    data = prepare_windows(texts, tokenizer, SHAPE, settings)
    trainer = start_pretraining(data, tokenizer, SHAPE, settings, None)
    before = jax.device_get(trainer.adapter("last").params)
    (validation,) = [event for event in trainer.train() if isinstance(event, ValidationCompleted)]
    # Most letters follow from the one before them.
    assert validation.loss < 0.5 * data.summary["unigram_loss"]
    changed = jax.tree.map(lambda new, old: bool(np.any(new != old)), trainer.adapter("last").params, before)
    assert all(jax.tree.leaves(changed)), changed


@pytest.mark.slow
def test_transformers_computes_the_same_logits(tokenizer, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    _, trainer = train(tokenizer)
    config, params = SHAPE.llama_config(tokenizer), trainer.adapter("last").params
    save_hf(tmp_path / "model", params, config, files=tokenizer_files(tokenizer, config))
    text = "Ann saw Bo and Bo"
    ours = llama.load(tmp_path / "model")
    ids = ours.tokenizer.encode(text)
    assert ids == tokenizer.encode(text) == transformers.AutoTokenizer.from_pretrained(tmp_path / "model").encode(text)
    logits = llama.forward(ours.params, jnp.array([ids]), ours.config)
    network = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        theirs = network(torch.tensor([ids])).logits.numpy()
    np.testing.assert_allclose(logits, theirs, atol=1e-4)
    assert float(jnp.std(logits)) > 0.01, "a model of zeros would agree with itself"


def test_the_loss_of_a_trained_head_is_the_cross_entropy_with_a_gradient_in_the_head():
    keys = jax.random.split(jax.random.key(0), 3)
    hidden, head = jax.random.normal(keys[0], (2, 3, 8)), jax.random.normal(keys[1], (11, 8))
    targets, weights = jax.random.randint(keys[2], (2, 3), 0, 11), jnp.array([[1.0, 1, 0], [1, 0, 1]])
    loss, (d_hidden, d_head) = jax.value_and_grad(cross_entropy_of_trained_head, (0, 1))(hidden, head, targets, weights)
    frozen, d_frozen = jax.value_and_grad(cross_entropy)(hidden, head, targets, weights)
    np.testing.assert_allclose(loss, frozen, rtol=1e-5)
    np.testing.assert_allclose(d_hidden, d_frozen, atol=1e-5)
    # The logits z = H W^T give W the gradient (p - y)^T H.
    errors = jax.nn.softmax(hidden @ head.T) - jax.nn.one_hot(targets, 11)
    np.testing.assert_allclose(d_head, jnp.einsum("btv,btd->vd", weights[..., None] * errors, hidden), atol=1e-5)


def test_windows_and_the_loss_of_frequencies(tokenizer):
    data = prepare_windows(TEXTS, tokenizer, SHAPE, SETTINGS)
    batch = data.train[0]
    assert batch.inputs.shape == batch.targets.shape == (4, 16)
    np.testing.assert_array_equal(batch.inputs[:, 1:], batch.targets[:, :-1])
    assert batch.weights.all()
    assert data.summary["trained_on"] + data.summary["validated_on"] == data.summary["tokens"] // 17
    # Tokens 0 and 1 are counted 5 + 1 and 1 + 1 times; the held-out window predicts 1, then 0.
    windows = np.array([[0, 0, 0], [0, 1, 0]]), np.array([[0, 1, 0]])
    assert unigram_loss(*windows) == pytest.approx(-(math.log(2 / 8) + math.log(6 / 8)) / 2, rel=1e-12)


def test_any_text_survives_the_tokenizer(tokenizer):
    text = "Ünïcode \n\t 漢字 saw <b>"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(train_tokenizer(["a"], 257).backend) == 257


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ModelShape(vocabulary=256), "vocabulary.*257.*256"),
        (lambda: ModelShape(hidden_size=36, heads=4), "hidden_size.*4.*36"),
        (lambda: ModelShape(context=60), "context.*8.*60"),
        (lambda: PretrainSettings(steps=10, warmup=10), "warmup.*10"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_refuses_a_short_text(tokenizer):
    with pytest.raises(InputError, match=r"at least 5 windows.*got 0"):
        prepare_windows(["short"], tokenizer, SHAPE, SETTINGS)
