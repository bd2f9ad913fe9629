"""`tune` of a PyTorch model: the planned run from PEFT's configuration and the model's size, and what is refused."""

import copy
from typing import Any

import pytest
from support import torch_models
from support.torch_models import peft, torch

from rora_theory import InputError
from rora_theory.advice.best_rate import Run
from rora_theory.evidence.rate_prior import rate_prior
from rora_theory.measure import tune
from rora_theory.measure.modules import count_parameters
from rora_theory.measure.tuning import config_gain

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers and peft


def config(**entries: Any) -> Any:
    return peft.LoraConfig(**{"r": 32, "lora_alpha": 16, "target_modules": "all-linear"} | entries)


def test_the_planned_run_moves_the_prior() -> None:
    """Its steps, schedule and batch, the scaling and rank of its adapters, and the family and size of the model."""
    parameters = sum(parameter.numel() for parameter in torch_models.model().parameters()) / 1e9
    usual: dict[str, Any] = {"rank": 32, "gain": 16.0, "steps": 256, "schedule": "cosine", "batch_size": 8}
    beliefs = []
    for arguments, changes, family in (
        ({}, {}, None),
        ({"steps": 4000}, {"steps": 4000}, None),
        ({"schedule": "constant"}, {"schedule": "constant"}, None),
        ({"batch_size": 3}, {"batch_size": 3}, None),
        ({"config": config(lora_alpha=64)}, {"gain": 64.0}, None),
        ({"config": config(r=64, lora_alpha=32, use_rslora=True)}, {"rank": 64, "gain": 256.0}, None),
        ({"family": "Qwen3"}, {}, "Qwen3"),
    ):
        planned: dict[str, Any] = {"config": config(), "steps": 256, "batch_size": 8} | arguments
        result = tune(torch_models.model(), **planned)
        beliefs.append(result.belief)
        assert beliefs[-1] == rate_prior(Run(**usual | changes), family=family, parameters=parameters)
        assert (result.steps, vars(result.config)) == (planned["steps"], vars(planned["config"]))
    assert len(set(beliefs)) == len(beliefs)


def test_the_model_and_the_configuration_are_left_as_they_are() -> None:
    model, settings = torch_models.model(), config(use_dora=True)
    before, entries = torch_models.state_of(model), copy.deepcopy(vars(settings))
    result = tune(model, config=settings, steps=256, batch_size=8)
    torch_models.assert_unchanged(model, before)
    assert vars(settings) == entries
    assert result.config is not settings
    assert any("DoRA" in sentence for sentence in result.assumptions)
    assert not any("DoRA" in text for text in tune(model, config=config(), steps=2, batch_size=1).assumptions)


def test_weights_need_not_be_in_memory() -> None:
    """Weights on the device "meta" have sizes; the rate does not depend on their values."""
    planned = {"config": config(), "steps": 256, "batch_size": 8}
    loaded, empty = torch_models.model(seed=1), torch_models.model().to("meta")
    assert tune(loaded, **planned).belief == tune(empty, **planned).belief


class Packed(torch.nn.Module):
    """Linear layer with several weights in one element, or with its weights in a buffer, as quantised ones have."""

    def __init__(self, elements: int | None) -> None:
        super().__init__()
        self.in_features, self.out_features = 6, 10
        if elements is not None:
            self.weight = torch.nn.Parameter(torch.zeros(elements, dtype=torch.uint8), requires_grad=False)
        self.bias = torch.nn.Parameter(torch.zeros(10))


@pytest.mark.parametrize("elements", [60, 30, None])
def test_quantised_weights_count_by_their_number(elements) -> None:
    """60 weights and 10 biases, beside 21 other parameters."""
    model = torch.nn.Sequential(torch.nn.Embedding(7, 3), Packed(elements))
    assert count_parameters(model) == 60 + 10 + 21


@pytest.mark.parametrize("family", torch_models.CONFIGS)
def test_tied_embeddings_count_once(family) -> None:
    """As transformers counts, in models of text and of images."""
    model = torch_models.model(family)
    assert count_parameters(model) == model.num_parameters()


def test_the_gain_of_a_configuration() -> None:
    assert config_gain(config()) == pytest.approx(16.0)
    assert config_gain(config(use_rslora=True)) == pytest.approx(16 * 32**0.5)


def prompted(config_class: Any) -> Any:
    """Return a model with a learned prompt, which adds no layers to the base model."""
    settings = config_class(task_type="CAUSAL_LM", num_virtual_tokens=3)
    return peft.get_peft_model(torch_models.model(), settings)


def activated() -> Any:
    """Return a configuration of adapters that act after a token of the text only."""
    settings = config()
    settings.alora_invocation_tokens = [5]  # the constructor warns
    return settings


def sharded() -> Any:
    """Return a model with a weight as DeepSpeed shards it."""
    model = torch_models.model()
    model.lm_head.weight.ds_id = 0
    return model


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"steps": 0}, "steps .* 0"),
        ({"batch_size": 0}, "batch_size .* 0"),
        ({"family": "none"}, "family .*'none'"),
        ({"schedule": "step"}, "schedule .*'step'"),
        ({"config": {"r": 8}}, r"config .*{'r': 8}"),
        ({"config": config(bias="all")}, "bias"),
        ({"config": config(rank_pattern={"q_proj": 4})}, "rank_pattern"),
        ({"config": config(modules_to_save=["lm_head"])}, "modules_to_save"),
        ({"config": config(init_lora_weights="pissa")}, "pissa"),
        ({"config": activated()}, "alora_invocation_tokens"),
        ({"config": config(target_modules=["none_such"])}, "target_modules .*'none_such'"),
        ({"config": config(target_modules="(")}, r"target_modules .*'\('"),
        ({"model": lambda: torch_models.adapted(torch_models.model())}, "model .*adapters"),
        ({"model": lambda: prompted(peft.PromptTuningConfig)}, "model .*adapters .*PROMPT_TUNING"),
        ({"model": lambda: prompted(peft.PrefixTuningConfig)}, "model .*adapters .*PREFIX_TUNING"),
        ({"model": lambda: prompted(peft.PromptEncoderConfig)}, "model .*adapters .*P_TUNING"),
        ({"model": lambda: torch.nn.Sequential(prompted(peft.PromptTuningConfig))}, "model .*adapters"),
        ({"model": sharded}, "model .*shards in lm_head"),
        ({"model": lambda: torch_models}, "model .*module"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_input_is_refused(arguments, named) -> None:
    model = arguments.get("model", torch_models.model)()
    planned = {"config": config(), "steps": 256, "batch_size": 8} | arguments | {"model": model}
    with pytest.raises(InputError, match=named) as refused:
        tune(**planned)
    assert "\n" not in str(refused.value)
