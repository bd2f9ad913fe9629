"""The trainer's callback: what it logs and when, and that the training goes on as without it."""

import logging
from statistics import geometric_mean
from types import SimpleNamespace

import pytest

from rora_theory import InputError, Setting, transfer

torch = pytest.importorskip("torch", reason="the bridge: the extra torch")
peft = pytest.importorskip("peft", reason="the bridge: the extra torch")
transformers = pytest.importorskip("transformers", reason="the bridge: the extra torch")
pytest.importorskip("accelerate", reason="transformers' trainer: accelerate")

from support import torch_models  # noqa: E402

from rora_theory.measure.regimes.module_regime import RegimeConfig  # noqa: E402
from rora_theory.measure.torch import RegimeCallback, regime  # noqa: E402
from rora_theory.measure.torch.callback import read_setting  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers and peft
BATCHES = torch_models.batch(seed=0), torch_models.batch(seed=1)


def lora(**arguments):
    torch.manual_seed(0)
    arguments = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"], "lora_dropout": 0.1} | arguments
    return peft.get_peft_model(torch_models.model(), peft.LoraConfig(task_type="CAUSAL_LM", **arguments))


def trained(folder, model, *callbacks, **arguments):
    """Train for one epoch, three steps of two records each, and return the trainer."""
    rows = torch_models.batch(seed=5, rows=6)
    data = [{name: value[i] for name, value in rows.items()} for i in range(6)]
    arguments = {"learning_rate": 2e-3, "num_train_epochs": 1, "optim": "adamw_torch"} | arguments
    args = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=2, logging_steps=1, save_strategy="no", report_to=[], use_cpu=True,
        disable_tqdm=True, seed=0, **arguments,
    )  # fmt: skip
    trainer = transformers.Trainer(model, args, train_dataset=data)
    for make in callbacks:
        trainer.add_callback(make(trainer.log))
    trainer.train()
    return trainer


@pytest.mark.slow
def test_logs_beside_the_loss(tmp_path, caplog) -> None:
    """At steps 0 and 2, what `regime` finds there; the losses are to the bit those of a run without it.

    The advice is that of the first step and of a long run, as the initialisation is gaussian.
    """
    kept = {}

    def watched(log):
        kept["callback"] = RegimeCallback(log, *BATCHES, to_rank=8, steps=(0, 2))
        return kept["callback"]

    with caplog.at_level(logging.INFO, "rora_theory.measure.torch.callback"):
        trainer = trained(tmp_path, lora(init_lora_weights="gaussian"), watched)
    plain = trained(tmp_path, lora(init_lora_weights="gaussian"))
    assert trainer.args.max_steps == -1
    losses = [[row["loss"] for row in each.state.log_history if "loss" in row] for each in (trainer, plain)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 3
    logged = {row["step"]: row for row in trainer.state.log_history if "regime/crossing_rank" in row}
    assert list(logged) == [0, 2]
    config = RegimeConfig(ranks=(2,), rules=("lora",), optimizers=("adam",), inits=("gaussian",), rows=0)
    expected = regime(lora().train(), *BATCHES, config=config)  # B = 0: the base
    callback = kept["callback"]
    assert set(callback.measured) == {0, 2}
    takeover = held_out_takeover(expected, 8)
    carried = transfer(Setting(2, 4.0, 2e-3, init="gaussian"), 8)
    held_out = expected.crossings.query("split == 'heldout'")["crossing_rank"].median()
    assert logged[0]["regime/crossing_rank"] == pytest.approx(held_out, rel=1e-5)
    assert logged[0]["regime/steps_until_A_leads"] == pytest.approx(takeover / 2e-3, rel=1e-5)
    assert logged[0]["regime/alpha"] == pytest.approx(carried.alpha, rel=1e-5)
    assert logged[0]["regime/learning_rate"] == 2e-3
    assert logged[2]["regime/crossing_rank"] != logged[0]["regime/crossing_rank"]
    assert sum("From rank 2 to 8 with AdamW" in record.message for record in caplog.records) == 2


def held_out_takeover(found, rank: int) -> float:
    """The geometric mean of the modules' takeover distances at a measured rank."""
    return geometric_mean(found.takeover.query(f"split == 'heldout' and rank == {rank}")["takeover"])


def test_the_first_process_alone_measures_64_tokens_for_rank_128() -> None:
    """The defaults, of batches with 72 tokens that have a target."""
    batches = [torch_models.batch(seed=seed, rows=8, length=10) for seed in (0, 1)]
    callback = RegimeCallback(lambda logged: None, *batches, setting=Setting(2, 4.0, 2e-3))
    for is_first in (False, True):
        state = SimpleNamespace(global_step=0, max_steps=3, is_world_process_zero=is_first)
        callback.on_step_begin(told(), state, None, model=lora())
        assert set(callback.measured) == ({0} if is_first else set())
    assert callback.transfers[0].advice.setting.rank == 128
    assert set(callback.measured[0].tokens["read"]) == {64}


@pytest.mark.slow
def test_the_run_s_own_setting(tmp_path) -> None:
    """Of its LoraConfig and optimizer; or the one that is given."""
    found = []

    def watched(log):
        found.append(RegimeCallback(log, *BATCHES, to_rank=8))
        return found[-1]

    def given(log):
        found.append(RegimeCallback(log, *BATCHES, setting=Setting(16, 8.0, 1e-3, "lora", "adamw", "gaussian")))
        return found[-1]

    sgd = {"optim": "sgd", "max_steps": 1}
    trainer = trained(tmp_path, lora(use_rslora=True, init_lora_weights="gaussian"), watched, given, **sgd)
    assert found[0].transfers[0].advice.old == Setting(2, 4.0, 2e-3, "rslora", "sgd", "gaussian")
    assert found[1].transfers[0].advice.old.rank == 16
    first = next(row for row in trainer.state.log_history if "regime/alpha" in row)
    assert "regime/steps_until_A_leads" not in first


def told(optim: str = "adamw_torch", **arguments) -> SimpleNamespace:
    """In the place of a trainer's arguments."""
    return SimpleNamespace(optim=optim, learning_rate=2e-3, **arguments)


@pytest.mark.parametrize("name", ["paged_adamw_8bit", "paged_adamw_32bit", "paged_adamw"])
def test_paged_optimizers_are_what_they_page(name) -> None:
    assert read_setting(lora(), told(name)) == Setting(2, 4.0, 2e-3, "lora", "adamw")
    with pytest.raises(InputError, match=r"optim .* 'paged_lion_8bit'"):
        read_setting(lora(), told("paged_lion_8bit"))


@pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern"])
def test_modules_of_several_ranks_or_alphas_have_no_one_setting(name) -> None:
    with pytest.raises(InputError, match=f"^{name} .*{{'q_proj': 8}}"):
        read_setting(lora(**{name: {"q_proj": 8}}), told())


def test_the_active_adapter_is_the_one_that_learns(caplog) -> None:
    model = lora()
    model.add_adapter("other", peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], use_dora=True))
    assert read_setting(model, told()).rank == 2
    assert not caplog.records
    model.set_adapter("other")
    assert read_setting(model, told()) == Setting(4, 6.0, 2e-3, "lora", "adamw")
    assert "use_dora" in caplog.text
    assert read_setting(model.get_base_model(), told()).rank == 4


@pytest.mark.parametrize("spread", [{"fsdp": ["full_shard"]}, {"deepspeed": "zero3.json"}])
def test_weights_that_are_spread_over_processes_are_refused(spread) -> None:
    callback = RegimeCallback(print, *BATCHES, setting=Setting(2, 4.0, 2e-3))
    with pytest.raises(InputError, match="FSDP or DeepSpeed"):
        callback.on_train_begin(told(**spread), None, None, model=None)


@pytest.mark.parametrize(
    ("steps", "at_begin", "at_end"), [((0, 10, 12), "[10, 12]", ""), ((0, 3, 9), "", "[9]"), ((0,), "", "")]
)
def test_a_step_that_is_never_reached(steps, at_begin, at_end, caplog) -> None:
    """Named before training where the run is shorter, and at its end where it stopped early."""
    state = SimpleNamespace(max_steps=10, global_step=4, is_world_process_zero=True)
    callback = RegimeCallback(print, *BATCHES, setting=Setting(2, 4.0, 2e-3), steps=steps)
    for event, missed in ((callback.on_train_begin, at_begin), (callback.on_train_end, at_end)):
        caplog.clear()
        event(told(), state, None)
        assert len(caplog.records) == bool(missed)
        assert f"steps {missed}" in caplog.text or not missed
        callback.measured |= dict.fromkeys({0, 3} & set(steps))


@pytest.mark.usefixtures("unchecked")
def test_what_is_no_setting_is_refused_before_the_training() -> None:
    with pytest.raises(InputError, match=r"^setting .*{'r': 2}"):
        RegimeCallback(print, *BATCHES, setting={"r": 2})


@pytest.mark.slow
def test_bad_input(tmp_path) -> None:
    with pytest.raises(InputError, match=r"rank .*\b0"):
        RegimeCallback(print, *BATCHES, to_rank=0)
    with pytest.raises(InputError, match=r"steps .*-1"):
        RegimeCallback(print, *BATCHES, steps=(-1,))
    cases = [
        (torch_models.model(), {}, "no LoRA adapter"),
        (lora(), {"optim": "adafactor"}, "optim .*'adafactor'"),
        (lora(init_lora_weights="orthogonal"), {}, "init_lora_weights .*'orthogonal'"),
    ]
    for model, arguments, message in cases:
        with pytest.raises(InputError, match=message):
            trained(tmp_path, model, lambda log: RegimeCallback(log, *BATCHES), **arguments)
