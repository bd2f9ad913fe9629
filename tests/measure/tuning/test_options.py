"""Options of `tune`: what each of them changes, against a training loop by hand, and their defaults."""

import inspect
import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
from support import torch_chats, torch_models
from support.torch_models import peft, torch

from rora_theory.advice.best_rate import Run
from rora_theory.measure import tune
from rora_theory.measure.tuning import search
from rora_theory.measure.tuning.prior import rate_prior
from rora_theory.measure.tuning.result import Tuning

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers and peft

STEPS = 256
DEFAULTS: dict[str, Any] = {
    "train": None, "held_out": None,
    "steps": 2000, "schedule": "cosine", "warmup": 0, "tokenizer": None, "batch_size": 8, "accumulation": 1,
    "max_length": 1024, "learning_rate": None, "family": None, "weight_decay": 0.0, "max_grad_norm": 1.0,
    "make_optimizer": None, "loss": None, "probe_rank": 8, "budget": 0.0, "seed": 0, "checkpoint": None,
    "progress": False,
}  # fmt: skip
"""Every option of `tune` that has a default."""


def batches(count: int, seed: int = 0, rows: int = 2, length: int = 8) -> list[dict[str, Any]]:
    """Return rows that count upwards, of which each has another number of labels."""
    random = torch.Generator().manual_seed(seed)
    starts = torch.randint(3, torch_models.VOCABULARY - length, (count, rows, 1), generator=random)
    data = []
    for index, tokens in enumerate(starts + torch.arange(length)):
        labels = tokens.clone()
        for row in range(rows):
            labels[row, : (rows * index + row) % (length - 2)] = -100
        data.append({"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels})
    return data


def config(**entries: Any) -> Any:
    return peft.LoraConfig(**{"r": 32, "lora_alpha": 16, "target_modules": "all-linear"} | entries)


@pytest.fixture
def first_run_only(monkeypatch) -> None:
    """Stop every probe after the first of its runs, which trains at the middle of the grid."""
    next_trial = search.next_trial
    monkeypatch.setattr(search, "next_trial", lambda plan, runs: None if runs else next_trial(plan, runs))


def run(**arguments: Any) -> Tuning:
    """Tune a tiny model within a budget that pays for the evaluation of all held-out rows."""
    usual = {
        "config": config(), "steps": STEPS, "learning_rate": 2e-3, "train": batches(12), "held_out": batches(3, seed=1),
        "budget": 0.2,
    }  # fmt: skip
    return tune(torch_models.model(), **usual | arguments)


def held_out_loss(result: Tuning) -> float:
    (row,) = result.curve.to_dict("records")
    return row["held_out_loss"]


def by_hand(
    result: Tuning,
    *,
    settings: Any = None,
    schedule: str = "cosine",
    warmup: int = 0,
    accumulation: int = 1,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    make_optimizer: Any = None,
    probe_rank: int = 8,
    seed: int = 0,
) -> float:
    """Return the held-out loss of a probe's run, trained and evaluated by PEFT and PyTorch."""
    settings = config() if settings is None else settings
    (row,) = result.curve.to_dict("records")
    steps, peak, data = row["steps"], row["learning_rate"], batches(12)
    model = torch_models.model().train()
    torch.manual_seed(seed)
    gain = settings.lora_alpha * (settings.r**0.5 if settings.use_rslora else 1.0)
    small = config(r=min(probe_rank, settings.r), lora_alpha=gain, lora_dropout=settings.lora_dropout)
    adapted = peft.get_peft_model(model, small)
    parameters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    if make_optimizer is None:
        optimizer = torch.optim.AdamW(parameters, lr=peak, weight_decay=weight_decay)
    else:
        optimizer = make_optimizer(parameters, peak)
        peak = optimizer.param_groups[0]["lr"]
    warmup = warmup * steps // STEPS
    for step in range(steps):
        progress = (step - warmup) / (steps - warmup)
        decay = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}[schedule]
        optimizer.param_groups[0]["lr"] = peak * (step / warmup if step < warmup else decay)
        optimizer.zero_grad()
        # Mean over the labels of all batches of the step.
        parts = [label_losses(adapted, data[(step * accumulation + i) % len(data)]) for i in range(accumulation)]
        torch.cat(parts).mean().backward()
        if max_grad_norm:
            torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
        optimizer.step()
    adapted.eval()
    with torch.no_grad():
        return float(torch.cat([label_losses(adapted, batch) for batch in batches(3, seed=1)]).mean())


def label_losses(model: Any, batch: dict[str, Any]) -> Any:
    """Return the cross entropy of every label of a batch."""
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return losses[labels.flatten() != -100]


def sgd(parameters: Any, rate: float) -> Any:
    return torch.optim.SGD(parameters, lr=100 * rate)


TRAINING: dict[str, dict[str, Any]] = {
    "schedule": {"schedule": "linear"},
    "warmup": {"warmup": 100},
    "accumulation": {"accumulation": 2},
    "weight_decay": {"weight_decay": 20.0},
    "max_grad_norm": {"max_grad_norm": 0.02, "make_optimizer": sgd},
    "no clipping": {"max_grad_norm": 0.0, "make_optimizer": sgd},
    "make_optimizer": {"make_optimizer": sgd},
    "probe_rank": {"probe_rank": 2},
    "seed": {"seed": 3},
    "dropout": {"settings": config(lora_dropout=0.5)},
    "scaling": {"settings": config(use_rslora=True)},
    "rank": {"settings": config(r=1)},
}
"""Options of the training runs, each with another value than its default."""


@pytest.mark.usefixtures("first_run_only")
@pytest.mark.parametrize("name", TRAINING)
def test_a_run_with_another_option_is_that_of_a_loop_by_hand(name) -> None:
    """The held-out loss is that of the option, and not that of the loop without it."""
    changes = TRAINING[name]
    result = run(**{"config" if option == "settings" else option: value for option, value in changes.items()})
    loss = held_out_loss(result)
    assert loss == pytest.approx(by_hand(result, **changes), rel=2e-5)
    option = next(iter(changes))
    without = {other: value for other, value in changes.items() if other != option}
    assert abs(loss / by_hand(result, **without) - 1) > 1e-3


def recorded_batches(**arguments: Any) -> list[Any]:
    """Return the token ids of the first training batch of texts, and the number of labels of its loss."""
    shapes: list[Any] = []

    def loss(model: Any, batch: Any) -> Any:  # noqa: ARG001
        shapes.append(tuple(batch["input_ids"].shape))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(train=["abcd" * 5] * 40, tokenizer=torch_chats.tokenizer("~"), loss=loss, **arguments)
    return shapes


@pytest.mark.usefixtures("first_run_only")
def test_records_are_read_in_batches_of_a_size_and_length() -> None:
    assert recorded_batches() == [(8, 20)]
    assert recorded_batches(batch_size=4) == [(4, 20)]
    assert recorded_batches(max_length=12) == [(8, 12)]


@pytest.mark.usefixtures("first_run_only")
def test_the_batches_of_the_longest_probe_are_read() -> None:
    """That is 64 steps of accumulated batches, and not the whole of a loader."""
    read: list[Any] = []

    def train() -> Iterator[Any]:
        for batch in itertools.cycle(batches(4)):
            read.append(batch)
            yield batch

    run(train=train(), accumulation=3)
    assert len(read) == 3 * 64


@pytest.mark.usefixtures("first_run_only")
def test_the_loss_is_the_caller_s() -> None:
    doubled = run(loss=lambda model, batch: 2 * model(**batch).loss, max_grad_norm=0.0)
    assert held_out_loss(doubled) == pytest.approx(2 * held_out_loss(run(max_grad_norm=0.0)), rel=1e-3)


def test_the_planned_run_moves_the_prior() -> None:
    """Its steps, schedule and batch, the scaling and rank of its adapters, and the family and size of the model."""
    parameters = sum(parameter.numel() for parameter in torch_models.model().parameters()) / 1e9
    usual = {"rank": 32, "gain": 16.0, "steps": STEPS, "schedule": "cosine", "batch_size": 8}
    priors = []
    for arguments, changes, family in (
        ({}, {}, None),
        ({"steps": 4000}, {"steps": 4000}, None),
        ({"schedule": "constant"}, {"schedule": "constant"}, None),
        ({"batch_size": 3}, {"batch_size": 3}, None),
        ({"accumulation": 5}, {"batch_size": 40}, None),
        ({"config": config(lora_alpha=64)}, {"gain": 64.0}, None),
        ({"config": config(r=64, lora_alpha=32, use_rslora=True)}, {"rank": 64, "gain": 256.0}, None),
        ({"family": "Qwen3"}, {}, "Qwen3"),
    ):
        result = run(**{"budget": 0, "train": None, "held_out": None} | arguments)
        priors.append(result.posterior.prior)
        assert priors[-1] == rate_prior(Run(**usual | changes), family=family, parameters=parameters)
    assert len(set(priors)) == len(priors)


@pytest.mark.usefixtures("first_run_only")
def test_the_guess_the_budget_and_the_checkpoint(tmp_path) -> None:
    """A guess is the prior's median, the budget is a share of the planned steps, and a checkpoint is written."""
    path = tmp_path / "probe.json"
    result = run(learning_rate=5e-3, budget=0.15, checkpoint=path)
    assert result.posterior.prior.rates.best == pytest.approx(5e-3)
    assert result.cost.budget == pytest.approx(0.15 * STEPS)
    assert path.exists()


@pytest.mark.usefixtures("first_run_only")
def test_batches_that_are_given_keep_their_size() -> None:
    """The prior of a probe is that of the batches' own size, and repeated held-out records are named."""
    result = run(learning_rate=None, accumulation=2, family="Qwen3", batch_size=64, held_out=batches(12)[:2])
    parameters = sum(parameter.numel() for parameter in torch_models.model().parameters()) / 1e9
    expected = rate_prior(Run(32, 16.0, STEPS, "cosine", 4), family="Qwen3", parameters=parameters)
    assert result.posterior.prior == expected
    assert [text for text in result.assumptions if text.startswith("4 held-out records equal training")]


TESTED = {
    **dict.fromkeys(TRAINING, test_a_run_with_another_option_is_that_of_a_loop_by_hand),
    **dict.fromkeys(("batch_size", "max_length", "tokenizer"), test_records_are_read_in_batches_of_a_size_and_length),
    **dict.fromkeys(("steps", "family"), test_the_planned_run_moves_the_prior),
    **dict.fromkeys(("learning_rate", "budget", "checkpoint"), test_the_guess_the_budget_and_the_checkpoint),
    **dict.fromkeys(
        ("train", "held_out"), "tests/measure/tuning/test_search.py::test_a_probe_needs_both_kinds_of_data"
    ),
    "loss": test_the_loss_is_the_caller_s,
    "progress": "tests/measure/tuning/test_search.py::test_the_cost_is_stated_before_the_first_run",
}
"""Test of each option, in which another value changes the result."""


def test_every_option_is_tested_and_has_its_default() -> None:
    parameters = inspect.signature(tune).parameters.values()
    defaults = {
        parameter.name: parameter.default for parameter in parameters if parameter.default is not parameter.empty
    }
    assert defaults == DEFAULTS
    assert set(defaults) <= set(TESTED)
