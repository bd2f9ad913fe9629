"""The trainer's callback: what it logs and when, and that training is unchanged by it."""

import logging
from statistics import geometric_mean
from types import SimpleNamespace

import pytest
from support import torch_models
from support.torch_models import peft, transformers

from rora_theory import InputError, Setting, transfer
from rora_theory.measure import RegimeCallback, regime
from rora_theory.measure.callback import read_setting
from rora_theory.measure.regimes.module_regime import RegimeConfig

pytest.importorskip("accelerate", reason="transformers' trainer: accelerate")
pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers and peft
BATCHES = torch_models.batch(seed=0), torch_models.batch(seed=1)
GIVEN = Setting(2, 4.0, 2e-3)


def lora(**arguments):
    arguments = {"lora_alpha": 4, "target_modules": ["q_proj", "down_proj"], "lora_dropout": 0.1} | arguments
    return torch_models.adapted(torch_models.model(), **arguments)


def trainer_arguments(optim: str = "adamw_torch", **arguments) -> SimpleNamespace:
    """Return a stand-in for a trainer's arguments."""
    return SimpleNamespace(optim=optim, learning_rate=2e-3, **arguments)


def trainer_state(step: int = 0, *, max_steps: int = 3, is_first: bool = True) -> SimpleNamespace:
    return SimpleNamespace(global_step=step, max_steps=max_steps, is_world_process_zero=is_first)


def train(folder, model, *callbacks):
    """Train for one epoch, three steps of two records each, and return the trainer."""
    rows = torch_models.batch(seed=5, rows=6)
    data = [{name: value[i] for name, value in rows.items()} for i in range(6)]
    args = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=2, logging_steps=1, save_strategy="no", report_to=[], use_cpu=True,
        disable_tqdm=True, seed=0, learning_rate=2e-3, num_train_epochs=1, optim="adamw_torch",
    )  # fmt: skip
    trainer = transformers.Trainer(model, args, train_dataset=data)
    for make in callbacks:
        trainer.add_callback(make(trainer.log))
    trainer.train()
    return trainer


@pytest.mark.slow
def test_the_regime_is_logged_with_the_loss(tmp_path, caplog) -> None:
    """At steps 0 and 2 it logs what `regime` measures there; the losses equal those of a run without it.

    The advice is that of the first step and of a long run, as the initialisation is gaussian.
    """
    callbacks = []

    def watched(log):
        callbacks.append(RegimeCallback(log, *BATCHES, to_rank=8, steps=(0, 2)))
        return callbacks[0]

    with caplog.at_level(logging.INFO, "rora_theory.measure.callback"):
        trainer = train(tmp_path, lora(init_lora_weights="gaussian"), watched)
    plain = train(tmp_path, lora(init_lora_weights="gaussian"))
    assert trainer.args.max_steps == -1
    losses, expected = ([row["loss"] for row in run.state.log_history if "loss" in row] for run in (trainer, plain))
    assert losses == pytest.approx(expected, rel=1e-6)
    assert len(losses) == 3
    logged = {row["step"]: row for row in trainer.state.log_history if "regime/crossing_rank" in row}
    assert list(logged) == [0, 2]
    config = RegimeConfig(ranks=(2,), rules=("lora",), optimizers=("adam",), inits=("gaussian",), rows=0)
    measured = regime(lora().train(), *BATCHES, config=config)  # B = 0: the base
    assert set(callbacks[0].measured) == {0, 2}
    crossing_distance = geometric_mean(
        measured.crossing_distances.query("split == 'heldout' and rank == 8")["crossing_distance"]
    )
    crossing_rank = measured.crossings.query("split == 'heldout'")["crossing_rank"].median()
    assert logged[0]["regime/crossing_rank"] == pytest.approx(crossing_rank, rel=1e-5)
    assert logged[0]["regime/steps_until_A_dominates"] == pytest.approx(crossing_distance / 2e-3, rel=1e-5)
    advised = transfer(Setting(2, 4.0, 2e-3, init="gaussian"), 8)
    assert logged[0]["regime/alpha"] == pytest.approx(advised.alpha, rel=1e-5)
    assert logged[0]["regime/learning_rate"] == 2e-3
    assert logged[2]["regime/crossing_rank"] != logged[0]["regime/crossing_rank"]
    assert sum("From rank 2 to 8 with AdamW" in record.message for record in caplog.records) == 2


def test_the_first_process_alone_measures_64_tokens_for_rank_128() -> None:
    """These are the defaults, on batches with 72 tokens that have a target."""
    batches = [torch_models.batch(seed=seed, rows=8, length=10) for seed in (0, 1)]
    callback = RegimeCallback(lambda logged: None, *batches, setting=GIVEN)
    for is_first in (False, True):
        callback.on_step_begin(trainer_arguments(), trainer_state(is_first=is_first), None, model=lora())
        assert set(callback.measured) == ({0} if is_first else set())
    assert callback.transfers[0].advice.setting.rank == 128
    assert set(callback.measured[0].tokens["read"]) == {64}


def test_under_sgd_no_crossing_distance_is_logged() -> None:
    """The setting is read from the run; an explicit setting has precedence."""
    logged: list[dict] = []
    model, arguments = lora(use_rslora=True, init_lora_weights="gaussian"), trainer_arguments("sgd")
    of_run = Setting(2, 4.0, 2e-3, "rslora", "sgd", "gaussian")
    other = Setting(16, 8.0, 1e-3, "lora", "sgd", "gaussian")
    for setting, expected in ((None, of_run), (other, other)):
        callback = RegimeCallback(logged.append, *BATCHES, to_rank=8, setting=setting)
        callback.on_train_begin(arguments, trainer_state(), None, model=model)
        callback.on_step_begin(arguments, trainer_state(), None, model=model)
        assert callback.transfers[0].advice.old == expected
        assert set(logged[-1]) == {f"regime/{name}" for name in ("crossing_rank", "alpha", "learning_rate")}


@pytest.mark.parametrize("name", ["paged_adamw_8bit", "paged_adamw_32bit", "paged_adamw"])
def test_paged_optimizers_count_as_the_optimizer_that_they_page(name) -> None:
    assert read_setting(lora(), trainer_arguments(name)) == Setting(2, 4.0, 2e-3, "lora", "adamw")


def test_the_active_adapter_determines_the_setting(caplog) -> None:
    model = lora()
    model.add_adapter("other", peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], use_dora=True))
    assert read_setting(model, trainer_arguments()).rank == 2
    assert not caplog.records
    model.set_adapter("other")
    assert read_setting(model, trainer_arguments()) == Setting(4, 6.0, 2e-3, "lora", "adamw")
    assert "use_dora" in caplog.text
    assert read_setting(model.get_base_model(), trainer_arguments()).rank == 4


@pytest.mark.parametrize(
    ("steps", "at_begin", "at_end"), [((0, 10, 12), "[10, 12]", ""), ((0, 3, 9), "", "[9]"), ((0,), "", "")]
)
def test_unreachable_steps(steps, at_begin, at_end, caplog) -> None:
    """It is named before training if the run is shorter, and at its end if it stopped early."""
    state = trainer_state(4, max_steps=10)
    callback = RegimeCallback(print, *BATCHES, setting=GIVEN, steps=steps)
    for event, missed in ((callback.on_train_begin, at_begin), (callback.on_train_end, at_end)):
        caplog.clear()
        event(trainer_arguments(), state, None)
        assert len(caplog.records) == bool(missed)
        assert f"steps {missed}" in caplog.text or not missed
        callback.measured |= dict.fromkeys({0, 3} & set(steps))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"to_rank": 0}, r"rank .*\b0"),
        ({"steps": (-1,)}, r"steps .*-1"),
        ({"setting": {"r": 2}}, r"^setting .*{'r': 2}"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_arguments(arguments, message) -> None:
    with pytest.raises(InputError, match=message):
        RegimeCallback(print, *BATCHES, **arguments)


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        (None, {}, "no LoRA adapter"),
        ({}, {"optim": "adafactor"}, "optim .*'adafactor'"),
        ({}, {"optim": "paged_lion_8bit"}, "optim .* 'paged_lion_8bit'"),
        ({"init_lora_weights": "orthogonal"}, {}, "init_lora_weights .*'orthogonal'"),
        ({"rank_pattern": {"q_proj": 8}}, {}, "^rank_pattern .*{'q_proj': 8}"),
        ({"alpha_pattern": {"q_proj": 8}}, {}, "^alpha_pattern .*{'q_proj': 8}"),
        ({}, {"fsdp": ["full_shard"]}, "FSDP or DeepSpeed"),
        ({}, {"deepspeed": "zero3.json"}, "FSDP or DeepSpeed"),
    ],
)
def test_a_run_without_one_known_setting_is_refused_as_training_begins(config, arguments, message) -> None:
    model = torch_models.model() if config is None else lora(**config)
    callback = RegimeCallback(print, *BATCHES)
    with pytest.raises(InputError, match=message):
        callback.on_train_begin(trainer_arguments(**arguments), trainer_state(), None, model=model)
