"""Model families that pad, repeat or share what others do not: measured as PEFT trains them, or named with a reason."""

import json
import re
from copy import deepcopy
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import torch_models
from support.torch_models import peft, torch, transformers

from rora_theory import InputError
from rora_theory.lab.llama import LlamaConfig, forward, init_params
from rora_theory.lab.llama.weights import save_hf
from rora_theory.measure import coordinate_check, hooks, regime
from rora_theory.measure.modules import select_modules
from rora_theory.measure.regimes.module_regime import RegimeConfig

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]  # of transformers and peft
SMALL = RegimeConfig(ranks=(1, 4), rules=("lora",), inits=("gaussian",), rows=0, tokens=9)
TOKENS = {"vocab_size": torch_models.VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}
ENCODER_DECODER = {
    "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "decoder_start_token_id": 2,
}  # fmt: skip
SMALL_TEXT = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "max_position_embeddings": 80}
LATENT = {"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "kv_lora_rank": 8}
FAMILIES = {
    "longformer": lambda: transformers.LongformerForMaskedLM(
        transformers.LongformerConfig(
            **TOKENS, **SMALL_TEXT, num_hidden_layers=2, attention_window=[4, 4], sep_token_id=2
        )
    ),
    "led": lambda: transformers.LEDForConditionalGeneration(
        transformers.LEDConfig(**TOKENS, **ENCODER_DECODER, attention_window=[4, 4], max_encoder_position_embeddings=64)
    ),
    "prophetnet": lambda: transformers.ProphetNetForConditionalGeneration(
        transformers.ProphetNetConfig(
            **TOKENS, hidden_size=16, encoder_ffn_dim=24, num_encoder_layers=2, num_encoder_attention_heads=2,
            decoder_ffn_dim=24, num_decoder_layers=2, num_decoder_attention_heads=2, max_position_embeddings=64,
            decoder_start_token_id=0,
        )
    ),
    "zamba2": lambda: transformers.Zamba2ForCausalLM(
        transformers.Zamba2Config(
            **TOKENS, **HEADS, hidden_size=16, num_hidden_layers=4, layers_block_type=["mamba", "hybrid"] * 2,
            num_mem_blocks=1, mamba_d_state=8, n_mamba_heads=2, mamba_headdim=16, attention_head_dim=16,
            attention_hidden_size=32, intermediate_size=24, chunk_size=4, adapter_rank=4,
        )
    ),
    "rwkv": lambda: transformers.RwkvForCausalLM(
        transformers.RwkvConfig(
            **{name: TOKENS[name] for name in ("vocab_size", "bos_token_id", "eos_token_id")}, context_length=32,
            hidden_size=16, num_hidden_layers=2, attention_hidden_size=16, intermediate_size=24,
        )
    ),
    "kimi linear": lambda: transformers.KimiLinearForCausalLM(
        transformers.KimiLinearConfig(
            **TOKENS, **HEADS, **LATENT, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_experts=4,
            moe_intermediate_size=12, num_experts_per_token=2, linear_head_dim=8, linear_num_heads=2,
            layer_types=["linear_attention", "full_attention"],
        )
    ),
    "longcat": lambda: transformers.LongcatFlashForCausalLM(
        transformers.LongcatFlashConfig(
            **TOKENS, **LATENT, hidden_size=16, num_layers=2, num_hidden_layers=4, num_attention_heads=2, head_dim=4,
            ffn_hidden_size=24, q_lora_rank=8, moe_topk=2, n_routed_experts=4, zero_expert_num=2,
            expert_ffn_hidden_size=12,
        )
    ),
    "fsmt": lambda: transformers.FSMTForConditionalGeneration(
        transformers.FSMTConfig(
            langs=["en", "de"], src_vocab_size=64, tgt_vocab_size=64, **ENCODER_DECODER, pad_token_id=0,
            bos_token_id=1, eos_token_id=2, max_position_embeddings=64,
        )
    ),
    "mobilebert": lambda: transformers.MobileBertForMaskedLM(
        transformers.MobileBertConfig(
            **SMALL_TEXT, vocab_size=64, num_hidden_layers=2, embedding_size=8, intra_bottleneck_size=8,
            num_feedforward_networks=2, pad_token_id=0,
        )
    ),
}  # fmt: skip


def build(family: str):
    if not hasattr(transformers, "KimiLinearConfig") and family == "kimi linear":
        pytest.skip("transformers without Kimi Linear")
    torch.manual_seed(0)
    return torch_models.initialised(FAMILIES[family]()).eval()


def batch(family: str, seed: int = 0, length: int = 9):
    """Return random tokens; the labels of an encoder and decoder are shorter than the text, except FSMT's."""
    kind = "t5" if family in ("led", "prophetnet") else "llama"
    return torch_models.batch(kind, seed, length=length)


def assert_peft_agrees(model, batch) -> None:
    """Compare gamma G A^T of every module with the gradient of B that PEFT's training computes at B = 0."""
    modules, calls, grads = select_modules(model, None), {}, {}
    hooks.read_modules(
        modules, lambda: float(model(**batch).loss), lambda name, _: calls.update({name: calls.get(name, 0) + 1})
    )
    reached = {name: modules[name] for name in calls}
    hooks.backward(model, reached, lambda: model(**batch).loss, calls, lambda name, grad, _: grads.update({name: grad}))
    adapted = peft.get_peft_model(deepcopy(model), peft.LoraConfig(r=4, target_modules=list(grads))).train(
        model.training
    )
    adapted(**batch).loss.backward()
    for name, grad in grads.items():
        layer = adapted.base_model.model.get_submodule(name)
        expected = layer.lora_B["default"].weight.grad
        own = layer.scaling["default"] * grad @ layer.lora_A["default"].weight.T.float()
        torch.testing.assert_close(own, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
    assert grads


@pytest.mark.parametrize("family", sorted({*FAMILIES} - {"longcat"}))  # PEFT's LoRA fails on LongCat's experts
def test_every_gradient_is_that_of_peft(family) -> None:
    model = build(family)
    # The evaluation mode of RWKV writes in place to what autograd needs.
    assert_peft_agrees(model.train() if family == "rwkv" else model, batch(family))


def test_blocks_that_share_weights_have_gradients_of_their_own() -> None:
    """PEFT gives each block its own adapter: G of a block is not that of the weight, which sums over blocks."""
    model = build("zamba2")
    blocks = [layer.shared_transformer.self_attn.q_proj for layer in model.model.layers[1::2]]
    assert blocks[0] is not blocks[1]
    assert blocks[0].weight is blocks[1].weight
    table = regime(model, batch("zamba2"), batch("zamba2", 1), ["q_proj"], config=SMALL)
    assert len(set(table.crossings["module"])) == 2


@pytest.mark.parametrize(
    ("family", "part", "positions"),
    [
        ("longformer", "encoder.layer", "12 x 3|3 x 12"),
        ("led", "encoder.layers", "12 x 3|3 x 12"),
        ("prophetnet", "decoder.layers", "3 x 15"),
    ],
)
def test_modules_that_read_other_positions_are_left_out(family, part, positions) -> None:
    """Rows padded to a multiple of the window, or streams of predictions, are no tokens of the batch."""
    model = build(family)
    measured = regime(model, batch(family), batch(family, 1), config=SMALL)
    padded = {name for name, reason in measured.left_out.items() if "positions" in reason}
    assert padded
    assert all(part in name for name in padded)
    assert all(any(text in measured.left_out[name] for text in positions.split("|")) for name in padded)
    # Modules of ProphetNet that read both the batch's tokens and the streams are measured over both, and named.
    assert set(measured.tokens["all"]) <= ({27, 45} if family == "prophetnet" else {15, 27})
    assert bool(measured.unmasked) is (family == "prophetnet")
    # The training batch alone may be padded.
    if family == "longformer":
        mixed = regime(model, batch(family), batch(family, 1, length=8), config=SMALL)
        assert {name for name, reason in mixed.left_out.items() if "positions" in reason} == padded
        whole = regime(model, batch(family, 0, 8), batch(family, 1, 8), config=SMALL)
        assert padded <= set(whole.crossings["module"])
        with pytest.raises(InputError, match=r"query: reads 12 x 3 positions"):
            regime(model, batch(family), batch(family, 1), ["query"], config=SMALL)


def test_a_check_leaves_out_modules_that_read_other_positions(caplog, monkeypatch) -> None:
    monkeypatch.setattr("logging.Logger.propagate", True, raising=False)
    make_model = partial(torch_models.adapted, build("longformer"), target_modules=["query", "dense"], task_type=None)
    check = coordinate_check(make_model, batch("longformer"), (1, 2), steps=(1,), seeds=2)
    kinds = set(check.slopes.query("quantity == 'output'")["module"])
    assert "query" not in kinds
    assert {"hidden", "logits"} <= set(check.slopes["quantity"])
    assert caplog.text.count("output of query was not measured: it reads 12 x 3 positions") == 1


class Overlapping(torch.nn.Linear):
    """Planted fault: a linear module of an invented family that adds chunks of its neighbours with the same weight."""

    def forward(self, x):
        y = super().forward(x)
        return y + torch.nn.functional.linear(x.roll(1, 0), self.weight)


class Twins(torch.nn.Module):
    """Planted fault: another module multiplies by the weight without calling the module."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(6, 6)

    def forward(self, x):
        return torch.tanh(self.first(x)) @ self.first.weight


class Invented(torch.nn.Module):
    def __init__(self, fault: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.plain = torch.nn.Linear(6, 6)
        self.block = {"none": torch.nn.Linear, "overlapping": Overlapping}.get(fault, lambda *_: Twins())(6, 6)

    def forward(self, x):
        return self.block(torch.tanh(self.plain(x)))


@pytest.mark.parametrize(("fault", "name"), [("none", ""), ("overlapping", "block"), ("twins", r"block\.first")])
def test_an_unknown_family_is_refused(fault, name) -> None:
    """G of one module of each kind is compared with autograd's gradient of its weight; nothing is left behind."""
    model = Invented(fault)
    model.plain.weight.requires_grad_(False)
    model.plain.weight.grad = torch.ones(6, 6)
    before = torch_models.state_of(model)
    measure = partial(
        regime, model, {"x": torch.randn(7, 6)}, {"x": torch.randn(8, 6)},
        loss=lambda model, batch: model(batch["x"]).square().mean(), config=SMALL,
    )  # fmt: skip
    if fault == "none":
        measure()
    else:
        with pytest.raises(InputError, match=rf"gradient of {name} differs by \d+% .*target_modules"):
            measure()
        assert set(measure(target_modules=["plain"]).crossings["module"]) == {"plain"}
    after = torch_models.state_of(model)
    assert before["parameters"].keys() == after["parameters"].keys()
    assert before["modules"] == after["modules"]
    for key, (_, requires_grad, _) in before["parameters"].items():
        assert after["parameters"][key][1] == requires_grad
    torch.testing.assert_close(model.plain.weight.grad, torch.ones(6, 6))


def measurements(family, model):
    """Yield each measurement of a model as a function."""
    yield partial(regime, model, batch(family), batch(family, 1), config=SMALL)
    make_model = partial(torch_models.adapted, model, target_modules="all-linear", task_type=None)
    yield partial(coordinate_check, make_model, batch(family), (1, 2), held_out=batch(family, 1), steps=(1,), seeds=2)


UNSUPPORTED = {
    "rwkv": "backward pass failed with RuntimeError: .*modified by an inplace operation",
    "longcat": "experts in one parameter|forward pass of Longcat.* failed with RuntimeError: mat1 and mat2|mm: mat1",
}
"""What the model's own code refuses: evaluation mode in RWKV, PEFT's LoRA on LongCat's experts."""


def refusal(measure) -> str:
    """Return the message of the `InputError` that a measurement raises, or an empty string."""
    try:
        measure()
    except InputError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("family", ["rwkv", "kimi linear", "longcat", "fsmt", "mobilebert"])
def test_a_measurement_ends_with_figures_or_one_line(family) -> None:
    """Each measurement succeeds or names what the model does not support, and leaves no adapters behind."""
    model = build(family)
    names = [name for name, _ in model.named_modules()]
    for measure in measurements(family, model):
        message = refusal(measure)
        assert "\n" not in message
        assert not message or re.search(UNSUPPORTED.get(family, "^$"), message), message
        assert [name for name, _ in model.named_modules()] == names


def test_an_error_of_the_model_is_one_line() -> None:
    """FSMT does not shift labels: those of another length than the text make its loss fail."""
    for measure in measurements("led", build("fsmt")):
        with pytest.raises(
            InputError, match=r"forward pass of FSMT.* failed with ValueError: Expected input"
        ) as caught:
            measure()
        assert "\n" not in str(caught.value)
        assert isinstance(caught.value.__cause__, ValueError)


def test_an_error_of_the_backward_pass_is_one_line() -> None:
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(_, x):
            return x.clone()

        @staticmethod
        def backward(*_):
            raise NotImplementedError("no kernel")

    def loss(model, batch):
        return Broken.apply(model(**batch).loss)

    for measure in measurements("llama", torch_models.model()):
        with pytest.raises(InputError, match="backward pass failed with NotImplementedError: no kernel"):
            measure(loss=loss)


def test_lack_of_memory_is_not_blamed_on_the_batch() -> None:
    """PyTorch's own error for an array that no machine holds."""

    def loss(*_):
        return torch.empty(1 << 55).sum()

    for measure in measurements("llama", torch_models.model()):
        with pytest.raises(RuntimeError, match="can't allocate memory"):
            measure(loss=loss)


@pytest.fixture
def one_process(tmp_path):
    """Run in a process group of one, which FSDP needs."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", ["FSDP1", "FSDP2", "meta", "offloaded"])
def test_weights_that_are_not_in_one_process_are_refused(kind, one_process) -> None:  # noqa: ARG001
    from torch.distributed import fsdp

    model = torch_models.model()
    if kind == "FSDP1":
        model = fsdp.FullyShardedDataParallel(model, device_id=torch.device("cpu"))
    elif kind == "FSDP2":
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        model = fsdp.fully_shard(model, mesh=mesh)
    elif kind == "meta":
        model = model.to("meta")
    else:
        pytest.importorskip("accelerate").cpu_offload(model, execution_device=torch.device("cpu"))
    regime_of, check = measurements("llama", model)
    # Accelerate loads offloaded weights for a measurement, but autograd cannot train through them.
    refused = [check] if kind == "offloaded" else [regime_of, check]
    named = "on the meta device" if kind in ("meta", "offloaded") else "shards .*FSDP"
    for measure in refused:
        with pytest.raises(InputError, match=named) as caught:
            measure()
        assert "\n" not in str(caught.value)


def quantise(model, make_linear) -> None:
    for name, linear in select_modules(model, None).items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, make_linear(linear))


def test_bitsandbytes_of_8_bits() -> None:
    """G is that of PEFT's training, whose activations are rounded to 8 bits."""
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="quantised modules: pip install bitsandbytes")

    def make_linear(linear):
        packed = bitsandbytes.nn.Linear8bitLt(linear.in_features, linear.out_features, False, has_fp16_weights=False)
        packed.load_state_dict({"weight": linear.weight})
        return packed.to("cpu")

    model = torch_models.model()
    quantise(model, make_linear)
    assert_peft_agrees(model, batch("llama"))
    for measure in measurements("llama", model):
        measure()


def test_bitsandbytes_of_4_bits_that_fails_is_one_line() -> None:
    """On a CPU, bitsandbytes repacks weights without gradients and then cannot read them in some shapes."""
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="quantised modules: pip install bitsandbytes")

    def make_linear(linear):
        packed = bitsandbytes.nn.Linear4bit(linear.in_features, linear.out_features, False, torch.float32)
        packed.load_state_dict({"weight": linear.weight})
        return packed.to("cpu")

    torch.manual_seed(0)
    sizes = torch_models.TEXT | {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32}
    model = torch_models.initialised(transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))).eval()
    quantise(model, make_linear)
    for measure in measurements("llama", model):
        assert "\n" not in refusal(measure)


def test_gemma_3_without_windows_in_transformers(tmp_path) -> None:
    """A model of full layers alone is saved so that transformers loads it and computes the same logits."""
    settings = {"model_type": "gemma3_text", "rope_theta": 1e6, "rope_local_base_freq": 1e4, "query_pre_attn_scalar": 8}
    config = LlamaConfig(64, 16, 24, 3, 2, 1, 8, pad_token_id=0, **settings)
    params = jax.tree.map(lambda leaf: 10 * leaf if leaf.ndim > 1 else leaf, init_params(jax.random.key(0), config))
    save_hf(tmp_path, params, config)
    tokens = batch("llama")["input_ids"]
    model = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path), dtype=torch.float32)
    expected = np.asarray(forward(params, jnp.asarray(tokens.numpy()), config))
    with torch.no_grad():
        np.testing.assert_allclose(model(tokens).logits.numpy(), expected, atol=1e-4)
    assert LlamaConfig.from_hf(json.loads((tmp_path / "config.json").read_text())) == config
