"""The bridge in unusual settings of PyTorch, PEFT and the model: right gradients, and an unchanged model."""

from functools import partial

import numpy as np
import pytest
from support import torch_models
from support.torch_models import peft, torch, transformers

from rora_theory import InputError, Setting
from rora_theory.measure import coordinate_check, hooks, regime
from rora_theory.measure.regimes.module_regime import RegimeConfig

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers and peft
SMALL = RegimeConfig(ranks=(1, 4), rules=("lora",), inits=("gaussian",), optimizers=("sgd",), rows=0, tokens=9)
BATCHES = torch_models.batch(seed=0), torch_models.batch(seed=1)


def signals(model, *batches, **arguments) -> np.ndarray:
    """Return the measured signal of every module, which needs its gradient and its inputs."""
    return regime(model, *(batches or BATCHES), config=SMALL, **arguments).crossings["signal"].to_numpy(float)


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    """Return the signals of the tiny model in PyTorch's usual settings."""
    return signals(torch_models.model())


@pytest.fixture
def precisions():
    """Restore PyTorch's settings of float32 products after the test."""
    if not hasattr(torch.backends, "fp32_precision"):
        pytest.skip("torch before 2.9 has one way to set the precision")
    backends = (torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    yield backends
    for backend, value in zip(backends, before, strict=True):
        backend.fp32_precision = value


@pytest.mark.parametrize("place", [0, 1])
def test_tf32_that_the_attributes_set(place, expected, precisions) -> None:
    """The getter of the older function raises if tf32 is set as transformers' tf32=True sets it."""
    for backend in precisions[1:]:
        backend.fp32_precision = "none"
    precisions[place].fp32_precision = "tf32"
    before = [backend.fp32_precision for backend in precisions]
    with hooks._full_precision("cpu"):
        assert [backend.fp32_precision for backend in precisions[1:]] == ["ieee", "ieee"]
    assert signals(torch_models.model()) == pytest.approx(expected)
    assert [backend.fp32_precision for backend in precisions] == before
    precisions[0].fp32_precision = "ieee"  # what followed the general setting still does
    assert [backend.fp32_precision for backend in precisions] == ["ieee", ["ieee", "tf32"][place], "ieee"]


def test_a_learned_prompt_is_switched_off(expected) -> None:
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(torch_models.model(), config)
    assert signals(model) == pytest.approx(expected)
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(InputError, match=r"adapters .*'off' .*'on'"):
        signals(model, adapters="on")


class Normalised(torch.nn.Module):
    """Module with buffers that every forward pass in training mode updates."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(6, 6)
        self.norm = torch.nn.BatchNorm1d(6)
        self.spectral = torch.nn.utils.parametrizations.spectral_norm(torch.nn.Linear(6, 4))

    def forward(self, x):
        return self.spectral(self.norm(self.first(x)))


def squares(model, batch) -> torch.Tensor:
    return model(batch["x"]).square().mean()


def random_inputs() -> list[dict[str, torch.Tensor]]:
    return [{"x": torch.randn(7, 6)} for _ in range(2)]


def test_buffers_are_restored() -> None:
    model, batches = Normalised().train(), random_inputs()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert len(before) == 5

    def make_model(rank):
        return torch_models.adapted(model.train(), rank, target_modules=["first"], task_type=None)

    measurements = (
        partial(signals, model, *batches, loss=squares),
        partial(coordinate_check, make_model, batches[0], (1, 2), loss=squares, steps=(1,), seeds=2),
    )
    for measure in measurements:
        measure()
        for name, buffer in model.named_buffers():
            torch.testing.assert_close(buffer, before[name], rtol=0, atol=0)


class Routed(torch.nn.Module):
    """Linear module that returns more than a tensor, as the router of Llama 4 does."""

    class Router(torch.nn.Linear):
        def forward(self, x):
            logits = super().forward(x)
            return logits.softmax(-1), logits

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router = self.Router(6, 2)
        self.experts = torch.nn.ModuleList([torch.nn.Linear(6, 5), torch.nn.Linear(6, 5)])

    def forward(self, x):
        shares, _ = self.router(x)
        return sum(shares[:, i : i + 1] * expert(x) for i, expert in enumerate(self.experts))


def test_a_module_that_returns_no_tensor_is_left_out() -> None:
    """It is named with what it returns, and excluded from PEFT's targets."""
    batches = random_inputs()
    measured = regime(Routed(), *batches, loss=squares, config=RegimeConfig(rows=0, inits=("gaussian",)))
    assert measured.left_out == {"router": "returns a tuple"}
    assert set(measured.crossings["module"]) == {"experts.0", "experts.1"}
    config = measured.transfer(Setting(2, 4.0, 1e-3, init="gaussian"), 4).config
    assert torch.isfinite(squares(peft.get_peft_model(Routed(), config), batches[0]))
    with pytest.raises(InputError, match="router: returns a tuple"):
        regime(Routed(), *batches, ["router"], loss=squares, config=SMALL)


def test_embeddings_that_return_no_tensor() -> None:
    """The patch embeddings of Swin return a tuple, which is passed on unchanged."""
    model, batches = Routed(), random_inputs()
    before = signals(model, *batches, loss=squares)
    model.get_input_embeddings = lambda: model.router
    assert signals(model, *batches, loss=squares) == pytest.approx(before)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_user_hook_that_changes_an_output(in_place) -> None:
    """G is the weight's gradient as autograd computes it, whatever a hook does to the output."""
    model, batch, grads = torch_models.model(), BATCHES[0], {}
    module = model.model.layers[0].mlp.up_proj
    module.register_forward_hook(lambda _, __, y: y.mul_(3.0) if in_place else torch.tanh(3.0 * y))
    hooks.backward(
        model, {"up": module}, lambda: model(**batch).loss, {"up": 1}, lambda name, grad, _: grads.update({name: grad})
    )
    model(**batch).loss.backward()
    torch.testing.assert_close(grads["up"], module.weight.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inside_a_context_without_gradients(mode, expected) -> None:
    model = torch_models.model()
    with mode():
        batches = [torch_models.batch(seed=seed) for seed in (0, 1)]
        assert signals(model, *batches) == pytest.approx(expected)
        checked = coordinate_check(partial(torch_models.adapted, model), batches[0], (1, 2), steps=(1,), seeds=2)
    assert np.isfinite(checked.sizes["value"]).all()


def test_autocast(expected) -> None:
    """Passes run in bfloat16 and figures are computed in float32; a check's outputs follow the updated weights."""
    model = torch_models.model()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.is_autocast_cache_enabled()
        assert signals(model, progress=True) == pytest.approx(expected, rel=0.05)
        checked = coordinate_check(
            partial(torch_models.adapted, model), BATCHES[0], (1, 2), learning_rate=0.1, steps=(1,), seeds=2
        )
        assert torch.is_autocast_cache_enabled()
    assert (checked.sizes["value"] > 0).all()


def test_weights_without_gradients_are_refused() -> None:
    with torch.inference_mode():
        model = torch_models.model()
    with pytest.raises(InputError, match=r"created within torch\.inference_mode"):
        signals(model)


def test_progress_is_shown_on_request(capsys) -> None:
    """The bars name the work and count the steps."""
    # The bars follow transformers' setting, which another test may have changed.
    transformers.utils.logging.enable_progress_bar()
    model = torch_models.model()
    make_model = partial(torch_models.adapted, model)
    for arguments in ({}, {"progress": True}):
        regime(model, *BATCHES, ["q_proj"], config=SMALL, **arguments)
        measured = capsys.readouterr().err
        coordinate_check(make_model, BATCHES[0], (1, 2), steps=(1, 2), seeds=2, **arguments)
        checked = capsys.readouterr().err
        if not arguments:
            assert measured == checked == ""
    assert "Measuring 2 modules: 100%" in measured
    assert "Checking 2 ranks with 2 draws of A" in checked
    assert "8/8" in checked
    for part in ("rank 1: outputs of the base model", "training step 1 of 2", "train outputs after step 2"):
        assert part in checked


def test_llama_4() -> None:
    config = {**torch_models.TEXT, "intermediate_size_mlp": 24, "num_local_experts": 2, "num_experts_per_tok": 1}
    torch.manual_seed(0)
    model = torch_models.initialised(transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**config))).eval()
    measured = regime(model, *BATCHES, config=SMALL)
    assert set(measured.left_out.values()) == {"returns a tuple"}
    assert all(name.endswith("router") for name in measured.left_out)


def test_weights_on_the_meta_device_are_refused() -> None:
    model = torch_models.model()
    model.model.layers[1].self_attn.q_proj.to("meta")
    batch = torch_models.batch()
    with pytest.raises(InputError, match=r"layers\.1\.self_attn\.q_proj on the meta device"):
        regime(model, batch, batch)
    with pytest.raises(InputError, match=r"layers\.1\.self_attn\.q_proj.* on the meta device"):
        coordinate_check(lambda rank: torch_models.adapted(model, rank), batch, ranks=(1, 2), steps=(1,), seeds=2)
