"""The probe for a learning rate on a PyTorch model: its result, its resumption, and the unchanged model."""

import copy
import functools
import json
import logging
import math
import re
import sys

import pandas as pd
import pytest
from support import torch_chats, torch_models
from support.torch_models import peft, torch, transformers

from rora_theory import InputError
from rora_theory.advice.best_rate import Run
from rora_theory.measure import tune
from rora_theory.measure.batches import find_masks
from rora_theory.measure.tuning.examples import digest, held_out_groups, read_batches
from rora_theory.measure.tuning.prior import rate_prior
from rora_theory.measure.tuning.result import Tuning
from rora_theory.measure.tuning.training import LedParts, config_gain, probe_config

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers and peft
STEPS = 256
"""The shortest probe: three to four runs of a few steps."""


def batches(count, seed=0, rows=2, length=8):
    """Return rows that count upwards, which the model can learn within a few steps."""
    random = torch.Generator().manual_seed(seed)
    starts = torch.randint(3, torch_models.VOCABULARY - length, (count, rows, 1), generator=random)
    return [
        {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens.clone()}
        for tokens in starts + torch.arange(length)
    ]


def config(**entries):
    return peft.LoraConfig(**{"r": 32, "lora_alpha": 16, "target_modules": "all-linear"} | entries)


def tune_linear(model=None, **arguments):
    arguments = {
        "config": config(), "steps": STEPS, "learning_rate": 2e-3, "train": batches(12), "held_out": batches(3, seed=1),
        "budget": 0.1,
    } | arguments  # fmt: skip
    return tune(torch_models.model() if model is None else model, **arguments)


@pytest.fixture(scope="module")
def usual() -> Tuning:
    return tune_linear()


def test_a_probe_reports_a_rate_and_leaves_the_model_as_it_was(usual) -> None:
    """The model's unusual modes, gradients and checkpointing do not change the result."""
    model = torch_models.model()
    model.gradient_checkpointing_enable()
    model.train()
    model.model.layers[0].eval()
    model.lm_head.weight.requires_grad_(False)
    settings, before = config(), torch_models.state_of(model)
    entries = copy.deepcopy(vars(settings))
    result = tune_linear(model, config=settings)
    torch_models.assert_unchanged(model, before)
    assert vars(settings) == entries
    assert result.low < result.learning_rate < result.high
    assert result.cost.spent <= 0.1 * STEPS
    assert (result.config.r, result.config.lora_alpha) == (32, 16)
    curve = result.curve
    assert len(curve) >= 3
    assert (curve["steps"] == result.probe_steps).all()
    assert curve["held_out_loss"].nunique() == len(curve)
    assert curve["learning_rate"].is_monotonic_increasing
    assert result.displacement_constant > 0
    assert any("rank 8" in sentence for sentence in result.assumptions)
    assert curve["held_out_loss"].to_numpy() == pytest.approx(usual.curve["held_out_loss"].to_numpy(), rel=1e-4)


def test_a_classifiers_head_is_trained_by_every_run_anew_and_put_back() -> None:
    """PEFT trains a copy of the head of a classifier, which it leaves in the model."""
    classes = transformers.LlamaConfig(**torch_models.TEXT, num_labels=3)
    model = torch_models.initialised(transformers.LlamaForSequenceClassification(classes)).eval()
    data = [batch | {"labels": batch["input_ids"][:, 0] % 3} for batch in batches(12, rows=4, length=4)]
    arguments = {"train": data, "held_out": data[:4], "config": config(task_type="SEQ_CLS")}
    before, calls = torch_models.state_of(model), []

    def interrupted(network, batch):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return network(**batch).loss

    with pytest.raises(KeyboardInterrupt):
        tune_linear(model, **arguments, loss=interrupted)
    torch_models.assert_unchanged(model, before)
    first, second = (tune_linear(model, **arguments) for _ in range(2))
    torch_models.assert_unchanged(model, before)
    pd.testing.assert_frame_equal(first.curve, second.curve, rtol=1e-6)
    assert any("score" in sentence for sentence in first.assumptions)


def test_the_longest_batches_first_are_within_the_budget() -> None:
    """As in a loader that is sorted by length: the steps of the probe have more tokens than the mean of all."""
    long, short = batches(6, length=40), batches(58, length=8)
    tokens = 0

    def loss(model, batch):
        nonlocal tokens
        tokens += batch["input_ids"].numel() / (1 if torch.is_grad_enabled() else 2)
        return model(**batch).loss

    result = tune_linear(train=[*long, *short], loss=loss, steps=800)
    planned = 800 * (6 * 80 + 58 * 16) / 64
    assert tokens <= 0.1 * planned
    assert result.cost.share == pytest.approx(tokens / planned)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_small_gradients_of_a_float16_model_are_not_rounded_to_zero(dtype) -> None:
    """As over many tokens: each one's share of the gradient is below the smallest number of float16."""

    class Stopped(Exception):  # noqa: N818
        pass

    def gradients(dtype) -> torch.Tensor:
        """Return the gradients at the first update of a probe."""

        class Optimizer(torch.optim.AdamW):
            def step(self) -> None:
                grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
                raise Stopped(torch.cat([grad.float().flatten() for grad in grads]))

        with pytest.raises(Stopped) as stopped:
            tune_linear(
                torch_models.model().to(dtype),
                train=batches(1, rows=8, length=48),
                loss=lambda model, batch: 1e-5 * model(**batch).loss,
                make_optimizer=lambda parameters, rate: Optimizer(parameters, lr=rate),
            )
        return stopped.value.args[0]

    exact = gradients(torch.float64)
    tolerance = {torch.float16: 0.1, torch.float32: 1e-4}[dtype]
    assert float((gradients(dtype) - exact).norm() / exact.norm()) < tolerance


def test_a_batch_without_labels_counts_as_nothing() -> None:
    """Beside other batches of its step it changes nothing; alone it would give a loss of 0 / 0."""
    empty = batches(1)[0] | {"labels": torch.full((2, 8), -100)}
    data = [batch for labelled in batches(12) for batch in (labelled, empty)]
    held_out = batches(1, seed=1)
    with_empty, alone = (
        tune_linear(train=train, accumulation=count, held_out=held_out).curve
        for train, count in ((data, 2), (batches(12), 1))
    )
    pd.testing.assert_frame_equal(with_empty, alone, rtol=1e-4)
    with pytest.raises(InputError, match=r"train .*label.* 3"):
        tune_linear(train=[*batches(2), empty, *batches(9)])


def test_a_longer_probe_screens_rates_first() -> None:
    result = tune_linear(steps=1700, learning_rate=1e-3)
    assert result.curve["steps"].nunique() == 2
    assert set(result.curve["stopped_early"]) == {False, True}
    assert result.cost.share <= 0.1
    assert any("were repeated" in sentence for sentence in result.assumptions)


def test_a_diverged_rate_is_infinite_loss() -> None:
    """A rate whose loss is not finite raises no error, and the probe continues at lower rates."""

    def loss(model, batch):
        value = model(**batch).loss
        largest = max(float(p.detach().abs().max()) for name, p in model.named_parameters() if "lora_B" in name)
        return value * math.nan if largest > 0.01 else value

    result = tune_linear(loss=loss, learning_rate=1e-3)
    diverged = result.curve[result.curve["diverged_at"].notna()]
    assert set(diverged["held_out_loss"]) == {math.inf}
    lowest = result.curve.loc[result.curve["held_out_loss"].idxmin()]
    assert lowest["learning_rate"] < diverged["learning_rate"].min()


def without_finite(quantity: str, model, loss):
    """Return a loss that is not finite, or the loss itself with a gradient that is not finite."""
    if quantity == "loss":
        return loss * math.nan
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return loss + sum((parameter - parameter.detach()).abs().sqrt().sum() for parameter in trained)


@pytest.mark.parametrize("quantity", ["loss", "gradient"])
def test_a_divergence_is_named_by_its_step(quantity) -> None:
    """The third step of the first run diverges, and no higher rate is trained."""
    calls = []

    def loss(model, batch):
        value = model(**batch).loss
        if torch.is_grad_enabled():
            calls.append(1)
        return without_finite(quantity, model, value) if len(calls) == 3 else value

    curve = tune_linear(loss=loss).curve
    assert curve["diverged_at"].dropna().tolist() == [3]
    assert curve["held_out_loss"].tolist()[-1] == math.inf


@pytest.mark.parametrize("quantity", ["loss", "gradient"])
def test_a_divergence_before_the_first_update_is_refused(quantity) -> None:
    """It does not depend on the learning rate, so that lower rates are not tried."""
    calls = []

    def loss(model, batch):
        calls.append(1)
        value = model(**batch).loss
        return without_finite(quantity, model, value)

    with pytest.raises(InputError, match=f"train .* {quantity}.* nan .* 1"):
        tune_linear(loss=loss)
    assert len(calls) == 1


def test_a_probe_that_cannot_beat_the_prior_says_so_before_it_trains_and_names_the_budget_that_can(caplog) -> None:
    """The sentence comes before the model learns anything, and the named budget needs no such sentence."""
    calls: list[str] = []

    def counted(model, batch):
        calls.append(caplog.text)
        return model(**batch).loss

    # Batches of four tokens pay for an evaluation of few tokens.
    data = {"train": batches(12, rows=1, length=4), "held_out": batches(8, seed=1, rows=1, length=4)}
    with caplog.at_level(logging.INFO, logger="rora_theory.measure.tuning.search"):
        useless = tune_linear(steps=240, budget=0.1, loss=counted, **data)
        (sentence,) = [sentence for sentence in useless.assumptions if "budget=" in sentence]
        assert sentence in calls[0]
        useful = float(re.search(r"budget=([\d.]+)", sentence)[1])
        assert 0.1 < useful <= 1
        assert not any("budget=" in text for text in tune_linear(steps=240, budget=useful, **data).assumptions)


def test_by_default_the_result_is_the_prior_and_no_data_are_needed() -> None:
    """The planned run's scaling, rank, batch, steps and schedule move the rate; data would have no effect."""
    parameters = sum(p.numel() for p in torch_models.model().parameters()) / 1e9
    expected = rate_prior(Run(32, 16.0, STEPS, "cosine", 8), parameters=parameters)
    planned = {"config": config(), "steps": STEPS, "batch_size": 4, "accumulation": 2}
    result = tune(torch_models.model(), **planned)
    assert result.posterior.belief == result.posterior.prior == expected
    assert (result.cost.spent, len(result.curve)) == (0, 0)
    for data in ("train", "held_out"):
        with pytest.raises(InputError, match="no effect without a budget"):
            tune(torch_models.model(), **planned, **{data: [3]})


@pytest.mark.parametrize("missing", ["train", "held_out"])
def test_a_probe_needs_both_kinds_of_data(missing) -> None:
    with pytest.raises(InputError, match=r"train and held_out .* budget 0\.1"):
        tune_linear(**{missing: None})


def test_rates_without_an_effect_are_refused() -> None:
    """Equal losses would otherwise count as a best rate at the lower end."""
    with pytest.raises(InputError, match="same loss"):
        tune_linear(make_optimizer=lambda parameters, _: torch.optim.AdamW(parameters, lr=0.0))


def test_autocast_of_the_caller(usual) -> None:
    """Each pass uses the updated adapters, although autocast caches weights until its end."""
    with torch.autocast("cpu", torch.bfloat16):
        result = tune_linear()
    assert result.displacement_constant == pytest.approx(usual.displacement_constant, rel=0.1)


def test_a_shuffled_loader_yields_the_same_batches_again() -> None:
    """An interrupted probe resumes in the same process too, and training sees the order of its generator's seed."""
    rows = [{name: value[0] for name, value in batch.items()} for batch in batches(16, rows=1)]
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    loader = torch.utils.data.DataLoader(rows, batch_size=2, shuffle=True, generator=generators[0])
    sampler = torch.utils.data.RandomSampler(rows, generator=generators[1])
    states = [generator.get_state() for generator in generators]
    tune_linear(train=loader, held_out=torch.utils.data.DataLoader(rows, batch_size=2, sampler=sampler))
    for generator, state in zip(generators, states, strict=True):
        assert torch.equal(generator.get_state(), state)


def test_a_convolution_is_trained_without_its_ratio() -> None:
    data = [torch_models.batch("vit", seed=seed, rows=4) for seed in range(4)]
    settings = config(target_modules=r".*(patch_embeddings\.projection|query|q_proj)")
    assert tune_linear(torch_models.model("vit"), train=data, held_out=data, config=settings).displacement_constant > 0


def test_an_interrupted_probe_resumes_and_refuses_other_settings(usual, tmp_path) -> None:
    path, model = tmp_path / "new" / "probe.json", torch_models.model()
    random_state = torch.get_rng_state()
    calls, last = [], [14]  # a run has 5 steps and evaluates 5 groups

    def loss(model, batch):
        if len(calls) == last[0]:
            raise KeyboardInterrupt
        calls.append(1)
        return model(**batch).loss

    before = torch_models.state_of(model)
    with pytest.raises(KeyboardInterrupt):
        tune_linear(model, loss=loss, checkpoint=path)
    torch_models.assert_unchanged(model, before)
    assert len(json.loads(path.read_text())["runs"]) == 1
    calls.clear()
    last[0] = -1
    resumed = tune_linear(model, checkpoint=path, loss=loss)
    pd.testing.assert_frame_equal(resumed.curve, usual.curve, rtol=1e-6)
    assert resumed.learning_rate == pytest.approx(usual.learning_rate)
    assert len(calls) == (len(usual.curve) - 1) * (usual.probe_steps + 5)  # held-out rows that the budget affords
    # The same optimizer by another function, in a wrapper without a name; nothing is trained again.
    calls.clear()
    make_optimizer = functools.partial(torch.optim.AdamW, weight_decay=0.0)
    stored = tune_linear(model, checkpoint=path, loss=functools.partial(loss), make_optimizer=make_optimizer)
    assert stored.curve.equals(resumed.curve)
    assert not calls
    for changed in (
        {"make_optimizer": lambda parameters, rate: torch.optim.SGD(parameters, lr=rate)},
        {"make_optimizer": lambda parameters, rate: torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95))},
        {"loss": None},
        {"model": torch_models.model(seed=1)},
        {"seed": 1},
        {"warmup": 50},
        {"accumulation": 2},
        {"max_grad_norm": 0.5},
        {"budget": 0.11},
        {"train": batches(12, seed=5)},
        {"held_out": batches(3, seed=6)},
        {"config": config(lora_alpha=8)},
        {"schedule": "linear"},
    ):
        torch.set_rng_state(random_state)  # the same adapters are drawn
        with pytest.raises(InputError, match="another probe"):
            tune_linear(**{"model": model, "checkpoint": path, "loss": loss} | changed)
    path.write_text(path.read_text()[:100])
    with pytest.raises(InputError, match=r"probe\.json"):
        tune_linear(model, checkpoint=path, loss=loss)


def test_texts_chats_and_tokenized_records() -> None:
    tokenizer = torch_chats.tokenizer("~")
    texts = ["abc abcd", "had a word", "is bad"]
    chats = [
        {"messages": [{"role": "user", "content": "ab"}, {"role": "assistant", "content": text}]} for text in texts
    ]
    ids = [{"input_ids": tokenizer(text)["input_ids"]} for text in texts]
    reading = {"tokenizer": tokenizer, "batch_size": 2, "max_length": 64}
    as_text, as_ids, as_field = (
        read_batches(data, "train", **reading) for data in (texts, ids, [{"text": text} for text in texts])
    )
    assert [batch["input_ids"].shape[0] for batch in as_text] == [2, 1]
    for other in (as_ids, as_field):
        for first, second in zip(as_text, other, strict=True):
            assert all(torch.equal(first[name], second[name]) for name in first)
    labels = read_batches(chats, "train", **reading)[0]["labels"]
    assert 0 < int((labels != -100).sum()) < labels.numel()
    assert int((as_text[0]["labels"] == -100).sum()) == int((as_text[0]["attention_mask"] == 0).sum())
    groups = held_out_groups(torch_models.model(), as_text)
    assert [group.targets for group in groups] == [len(text) - 1 for text in texts]
    assert [group.tokens for group in groups] == [len(text) for text in texts]  # without padding
    assert len(read_batches(as_text, "train", **reading, count=1)) == 1


def test_masked_tokens_of_tokenized_records() -> None:
    """Padding is left out; what is no completion, or not the assistant's, is read and has no label."""
    reading = {"tokenizer": torch_chats.tokenizer("~"), "batch_size": 4, "max_length": 4}
    records = [
        {"input_ids": [0, 0, 5, 6, 7, 8, 9], "attention_mask": [0, 0, 1, 1, 1, 1, 1]},
        {"input_ids": [5, 6, 7, 8, 0], "attention_mask": [1, 1, 1, 1, 0], "labels": [-100, 6, 7, 8, -100]},
        {"input_ids": [5, 6, 7, 8], "completion_mask": [0, 0, 1, 1]},
        {"input_ids": [5, 6, 7, 8], "assistant_masks": [0, 1, 0, 1]},
    ]
    (batch,) = read_batches(records, "train", **reading)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8]] * 4
    assert batch["labels"].tolist() == [[5, 6, 7, 8], [-100, 6, 7, 8], [-100, -100, 7, 8], [-100, 6, -100, 8]]
    with pytest.raises(InputError, match=r"train .* 2 .*attention_mask .* 1$"):
        read_batches([{"input_ids": [5, 6], "attention_mask": [1]}], "train", **reading)
    for record, named in (
        ({"input_ids": [5, 6], "labels": 1}, "labels 1"),
        ({"input_ids": [[5], [6]]}, r"input_ids \[\[5\], \[6\]\]"),
    ):
        with pytest.raises(InputError, match=f"train .*{named}"):
            read_batches([record], "train", **reading)


def test_held_out_images_are_split_into_rows() -> None:
    """Without token ids each row counts as one token and has one label."""
    groups = held_out_groups(torch_models.model("vit"), [torch_models.batch("vit", rows=3)])
    assert [(group.targets, group.tokens) for group in groups] == [(1, 1)] * 3
    assert [group.batch["pixel_values"].shape[0] for group in groups] == [1] * 3


@pytest.mark.parametrize("shared", [torch.tensor(2.0), torch.ones(1, 9), torch.ones(9)])
def test_held_out_rows_with_a_tensor_for_all_of_them_stay_together(shared) -> None:
    (group,) = held_out_groups(torch_models.model(), [torch_models.batch(rows=3) | {"shared": shared}])
    assert group.batch["input_ids"].shape == (3, 9)
    assert group.batch["shared"] is shared


def test_the_digest_of_batches_depends_on_names_types_shapes_and_values() -> None:
    """Equal bytes may be different tensors."""
    zeros = torch.zeros(2, 3)
    others = [{"x": zeros.T}, {"x": zeros.int()}, {"y": zeros}, {"x": zeros + 1}, {"x": zeros, "y": zeros}]
    assert len({digest([batch]) for batch in [{"x": zeros}, *others]}) == 6
    assert digest([{"x": zeros, "n": 1}]) == digest([{"x": zeros.clone(), "n": 2}])
    assert digest([{"x": zeros}] * 2) != digest([{"x": zeros}])


def prompted(config_class):
    """Return a model with a learned prompt, which adds no layers to the base model."""
    settings = config_class(task_type="CAUSAL_LM", num_virtual_tokens=3)
    return peft.get_peft_model(torch_models.model(), settings)


def unread():
    pytest.fail("data were read")
    yield


class Wrapped(torch.nn.Module):
    """Model of another package, which PEFT can't adapt for a task of transformers."""

    def __init__(self, inner) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, **batch):
        return self.inner(**batch)


def activated():
    """Return a configuration of adapters that act after a token of the text only."""
    settings = config()
    settings.alora_invocation_tokens = [5]  # the constructor warns
    return settings


UNLABELLED = torch.ones(2, 4, dtype=torch.long)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"steps": 50}, r"budget .*0\.36.* 50 steps"),
        ({"family": "none"}, "family .*'none'"),
        ({"schedule": "step"}, "schedule .*'step'"),
        ({"warmup": 300}, "warmup .* 300"),
        ({"max_grad_norm": -1.0}, "max_grad_norm"),
        ({"train": []}, "train .* none"),
        ({"train": "text"}, "train .* str"),
        ({"train": ["text"]}, "tokenizer"),
        ({"train": [3]}, "train .* int"),
        ({"config": {"r": 8}}, r"config .*{'r': 8}"),
        ({"config": config(bias="all")}, "bias"),
        ({"config": config(rank_pattern={"q_proj": 4})}, "rank_pattern"),
        ({"config": config(modules_to_save=["lm_head"])}, "modules_to_save"),
        ({"config": activated()}, "alora_invocation_tokens"),
        ({"config": config(target_modules=".*(q_proj|layernorm)")}, "config .*RMSNorm"),
        ({"model": lambda: Wrapped(torch_models.model()), "config": config(task_type="CAUSAL_LM")}, "config .*Wrapped"),
        ({"config": config(target_modules=["none_such"])}, "target_modules .*'none_such'"),
        ({"held_out": [{"input_ids": UNLABELLED}]}, "labels"),
        ({"held_out": [{"input_ids": UNLABELLED, "labels": torch.full_like(UNLABELLED, -100)}]}, "label"),
        ({"held_out": batches(1, rows=2, length=50)}, "held_out"),
        ({"held_out": batches(1, rows=1)}, "held_out .* two"),
        ({"model": lambda: torch_models.adapted(torch_models.model())}, "model .*adapters"),
        (
            {"model": lambda: prompted(peft.PromptTuningConfig), "train": unread(), "held_out": unread()},
            "model .*adapters .*PROMPT_TUNING",
        ),
        ({"model": lambda: prompted(peft.PrefixTuningConfig)}, "model .*adapters .*PREFIX_TUNING"),
        ({"model": lambda: prompted(peft.PromptEncoderConfig)}, "model .*adapters .*P_TUNING"),
        ({"model": lambda: torch.nn.Sequential(prompted(peft.PromptTuningConfig))}, "model .*adapters"),
        ({"model": lambda: torch_models}, "model .*module"),
        ({"train": ["text"], "tokenizer": 3}, "tokenizer .* 3$"),
        ({"loss": 3}, "loss .* 3$"),
        ({"loss": lambda *_: None}, "loss .* None$"),
        ({"make_optimizer": 3}, "make_optimizer .* 3$"),
        ({"make_optimizer": lambda *_: None}, "make_optimizer .* None$"),
        ({"checkpoint": 3}, "checkpoint .* 3$"),
        ({"config": config(target_modules="(")}, r"target_modules .*'\('"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_input_is_refused_before_work(arguments, named) -> None:
    model = arguments.get("model", torch_models.model)()
    before = torch_models.state_of(model) if isinstance(model, torch.nn.Module) else None
    with pytest.raises(InputError, match=named) as refused:
        tune_linear(**arguments | {"model": model})
    assert "\n" not in str(refused.value)
    if before is not None:
        torch_models.assert_unchanged(model, before)


def test_offloaded_weights_are_refused() -> None:
    """Autograd can't train through weights that are on the device "meta" between calls."""
    with pytest.raises(InputError, match=r"model .*memory"):
        tune_linear(torch_models.model().to("meta"))


@pytest.mark.parametrize("progress", [True, False])
def test_the_cost_is_stated_before_the_first_run(progress, capsys, caplog, monkeypatch) -> None:
    """Above the progress bar if there is one, in the log otherwise."""
    # The commands print the library's log: leave out their handler, which other tests of this process may have added.
    monkeypatch.setattr(logging.getLogger("rora_theory"), "handlers", [])
    caplog.set_level("INFO", logger="rora_theory")
    shown = []

    def loss(model, batch):  # noqa: ARG001
        shown.append((capsys.readouterr(), caplog.text))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune_linear(loss=loss, progress=progress)
    ((captured, log),) = shown
    assert captured.out == ""
    stated, silent = (captured.err, log) if progress else (log, captured.err)
    for expected in ("5 steps", "25.6 training steps", "10.0% of the planned 256"):
        assert expected in stated
    assert "25.6" not in silent
    assert bool(captured.err) is progress


def test_the_probe_has_the_planned_gain() -> None:
    for planned, gain in ((config(), 16.0), (config(use_rslora=True), 16 * 32**0.5)):
        small = probe_config(planned, 8)
        assert config_gain(planned) == pytest.approx(gain)
        assert config_gain(small) == pytest.approx(gain)
        assert small.r == 8


@pytest.mark.parametrize("dora", [False, True])
def test_the_ratio_of_the_parts(dora) -> None:
    """The A part over the B part of each module agrees with PEFT's forward pass, at tokens that count.

    Padding does not count, nor what repeats the beginning of a training record.
    """
    model = torch_models.model()
    settings = config(r=4, target_modules=["q_proj"], use_dora=dora)
    adapted = peft.get_peft_model(model, settings, adapter_name="probe")
    layers = [layer.self_attn.q_proj for layer in model.model.layers]
    parts, batch = LedParts(layers), batches(1)[0]
    batch["attention_mask"][0, 5:] = 0
    train = batches(1, seed=1)[0]
    train["input_ids"][0, :3] = batch["input_ids"][1, :3]
    counted = (batch["attention_mask"] == 1) & (torch.arange(8) < 7)  # nothing follows the last token
    counted[1, :3] = False
    factors = [[layer.lora_A["probe"].weight, layer.lora_B["probe"].weight] for layer in layers]
    starts = [A.detach().clone() for A, _ in factors]
    inputs = []
    with torch.no_grad():
        for layer, pair in zip(layers, factors, strict=True):
            for factor in pair:
                factor.add_(0.1 * torch.randn_like(factor))
            layer.register_forward_hook(lambda _, args, __: inputs.append(args[0][counted]))
        with parts.reading(find_masks(model, batch, train)):
            adapted(**batch)
        for ratio, (A, B), start, x in zip(parts.ratios(), factors, starts, inputs, strict=True):
            A_part, B_part = ((x @ part.T @ B.T).norm() for part in (A - start, start))
            assert ratio == pytest.approx(float(A_part / B_part), rel=1e-4)


def test_bfloat16_and_dropout() -> None:
    """Every probe of a model draws the same adapters and dropout masks."""
    model = torch_models.model().to(torch.bfloat16)
    first, second = (tune_linear(model, config=config(lora_dropout=0.1, use_dora=True)) for _ in range(2))
    assert next(model.parameters()).dtype == torch.bfloat16
    assert any("DoRA" in sentence for sentence in first.assumptions)
    pd.testing.assert_frame_equal(first.curve, second.curve, rtol=1e-6)


def test_held_out_rows_that_equal_training_rows_are_counted() -> None:
    """Padding does not count, and a row with another token is another row."""
    from rora_theory.measure.tuning.examples import Group, count_repeated

    def batch(*rows: list[int]) -> dict:
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        return {"input_ids": ids, "attention_mask": (ids != 0).long()}

    groups = [Group(batch([5, 6], [5, 6, 7, 8]), 4, 6), Group(batch([5, 6, 9]), 2, 3)]
    assert count_repeated(groups, [batch([5, 6, 7]), batch([5, 6], [1, 2, 3])]) == 1
    assert count_repeated(groups, [batch([5, 6, 7])]) == 0


def test_held_out_rows_that_are_training_rows_are_named(caplog) -> None:
    """Such rows are counted before the first run and in the result."""
    logging.getLogger("rora_theory").addHandler(caplog.handler)
    train, shorter = batches(12), batches(3, seed=1, length=7)
    named = []

    def loss(model, batch):
        named.append(caplog.text)
        return model(**batch).loss

    result = tune_linear(train=train, held_out=[train[4], *shorter], loss=loss)
    logging.getLogger("rora_theory").removeHandler(caplog.handler)
    assert "2 held-out records equal training records" in named[0]
    assert any("2 held-out records equal" in sentence for sentence in result.assumptions)


def test_progress_from_the_start(capsys) -> None:
    """What is computed is printed before the batches are read, and then for every run and part of the held-out rows."""
    printed = []

    def train():
        printed.append(capsys.readouterr().err)
        yield from batches(12)

    tune_linear(train=train(), progress=True)
    assert "Reading the batches ..." in printed[0]
    shown = capsys.readouterr().err
    for part in ("Preparing the adapters ...", "training lr=", "held-out rows, part 1 of "):
        assert part in shown


def test_an_interrupted_script_ends_with_one_line(monkeypatch, capsys, tmp_path) -> None:
    """A caller still receives the exception; the hook of uncaught exceptions prints one line for it, and no other."""
    others = []
    monkeypatch.setattr("sys.excepthook", lambda *arguments: others.append(arguments))
    calls = []

    def loss(model, batch):
        calls.append(1)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return model(**batch).loss

    path = tmp_path / "probe.json"
    with pytest.raises(KeyboardInterrupt) as caught:
        tune_linear(loss=loss, checkpoint=path)
    capsys.readouterr()  # what the probe reported before
    sys.excepthook(caught.type, caught.value, caught.tb)
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert line.startswith("Interrupted. ")
    sys.excepthook(ValueError, ValueError("other"), None)
    assert [arguments[0] for arguments in others] == [ValueError]
    done = json.loads(path.read_text())["runs"]
    assert done
    tune_linear(loss=loss, checkpoint=path)
    assert json.loads(path.read_text())["runs"][: len(done)] == done
