"""Gemma 3 270M, with the weights of the installed package, against transformers and PEFT; and rounding in bfloat16."""

import dataclasses

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import gguf_files
from support.peft_training import next_token_loss

from rora_theory.lab import adapters
from rora_theory.lab.llama import LlamaConfig, forward, load
from rora_theory.lab.llama.gguf_file import open_gguf
from rora_theory.lab.llama.model import embed, rms_norm
from rora_theory.lab.llama.weights import expected_shapes

NAME, ROWS, LAYERS = "gemma3-270m", 4096, 6
"""Embeddings and layers that are compared, to spare the peer's time and memory: the sixth layer has no window."""

TINY = LlamaConfig(
    *(48, 24, 40, 2, 2, 1, 8),
    model_type="gemma3_text",
    query_pre_attn_scalar=8,
    rope_local_base_freq=1e4,
    sliding_window=4,
    full_attention_layers=(1,),
)


@pytest.fixture(scope="module")
def model():
    gguf_files.packaged(NAME)
    return load(NAME)


def reference_tensors(path, config) -> dict:
    """Return the file's tensors that are compared by transformers' names; the `gguf` package dequantises."""
    names = {gguf_files.tensor_name(name, config): name for name in expected_shapes(config)}
    tensors = {}
    for tensor in open_gguf(path).tensors:
        if (name := names.get(tensor.name)) is None:
            continue
        values = gguf.dequantize(tensor.data[:ROWS], gguf.GGMLQuantizationType(tensor.tensor_type))
        tensors[name] = values - 1 if name.endswith("norm.weight") else values
    return tensors


@pytest.fixture(scope="module")
def compared(model):
    """Return a reduced model of transformers, its configuration and weights, and a text.

    The text is longer than the sliding window.
    """
    if model.source.is_dir():
        pytest.skip("the hub's folder is cached, which is read instead of the package's file")
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    # Every default of transformers' class that the model does not share is named.
    settings = transformers.Gemma3TextConfig(
        vocab_size=ROWS, hidden_size=640, intermediate_size=2048, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=1, max_position_embeddings=32768, sliding_window=512, attn_implementation="eager",
    )  # fmt: skip
    theirs = transformers.Gemma3ForCausalLM(settings).eval()
    assert model.config.full_attention_layers == (5, 11, 17)
    config = dataclasses.replace(model.config, vocab_size=ROWS, num_hidden_layers=LAYERS, full_attention_layers=(5,))
    tensors = {name: torch.tensor(values) for name, values in reference_tensors(model.source, config).items()}
    assert theirs.load_state_dict(tensors, strict=False).missing_keys == ["lm_head.weight"]  # tied
    text = " ".join(f"Sentence {i} of a long text about rivers, ships and lamps." for i in range(120))
    tokens = np.array([[token for token in model.tokenizer.encode(text) if token < ROWS][:560]])
    assert tokens.shape == (1, 560)
    layers = jax.tree.map(lambda stacked: stacked[:LAYERS], model.params["layers"])
    params = model.params | {"embed_tokens": model.params["embed_tokens"][:ROWS], "layers": layers}
    return theirs, config, params, tokens


@pytest.mark.slow
def test_logits_equal_transformers(compared):
    theirs, config, params, tokens = compared
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens), logits_to_keep=8).logits.numpy()
    logits = jax.jit(forward, static_argnames="config")(params, jnp.asarray(tokens), config)[:, -8:]
    # Float32 sums in another order through the layers.
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of peft
def test_gradients_of_an_adapter_equal_pefts(compared, tmp_path):
    """LoRA on every linear module, with B other than 0, so that A has a gradient too. Few tokens spare time."""
    theirs, config, params, tokens = compared
    tokens = tokens[:, :48]
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    settings = adapters.LoraConfig(rank=4, alpha=8.0, rule="rora", target_modules="all-linear")
    adapter = settings.build(jax.random.key(0), config, params)
    random = np.random.default_rng(0)
    noisy = {
        module: tensors | {"lora_B": jnp.asarray(random.normal(0, 0.01, tensors["lora_B"].shape), jnp.float32)}
        for module, tensors in adapter.params.items()
    }
    adapter = adapter.replace(noisy)
    adapters.save_peft(tmp_path, adapter)
    adapted = peft.PeftModel.from_pretrained(theirs, tmp_path, is_trainable=True)
    ids = torch.tensor(tokens)
    expected_loss = adapted(input_ids=ids, labels=ids).loss
    expected_loss.backward()
    expected = {name: value.grad.numpy() for name, value in adapted.named_parameters() if value.grad is not None}
    adapted.unload()

    @jax.jit  # with the weights as an argument: as constants they would be folded for minutes
    def differentiate(trained, params):
        loss = next_token_loss(params, jnp.asarray(tokens), config, adapter)
        return jax.value_and_grad(loss, has_aux=True)(trained)

    (value, _), gradient = differentiate(adapter.params, params)
    assert float(value) == pytest.approx(float(expected_loss.detach()), rel=1e-5)
    for module, tensors in gradient.items():
        for name, stacked in tensors.items():
            for layer in range(LAYERS):
                key = f"base_model.model.model.layers.{layer}.{module}.{name}.default.weight"
                theirs_of_layer = expected.pop(key)
                atol = 1e-4 * np.abs(theirs_of_layer).max()
                assert atol > 0, key
                np.testing.assert_allclose(stacked[layer], theirs_of_layer, rtol=0, atol=atol, err_msg=key)
    assert not expected


def test_bfloat16_rounds_where_the_checkpoints_reference_does():
    """The factor of the embeddings is rounded, sqrt(24) to 4.90625; a norm rounds after the product with 1 + w."""
    table = jnp.linspace(-1, 1, 48 * 24, dtype=jnp.bfloat16).reshape(48, 24)
    embeddings = embed({"embed_tokens": table}, jnp.array([[3]]), TINY)
    np.testing.assert_array_equal(embeddings[0, 0], table[3] * jnp.bfloat16(4.90625))
    weight = jnp.linspace(0, 0.01, 24, dtype=jnp.bfloat16)  # 1 + w in bfloat16 would lose most of w
    wide = np.asarray(table[5], np.float32)
    scaled = wide / np.sqrt(np.mean(wide**2) + np.float32(TINY.rms_norm_eps)) * (1 + np.asarray(weight, np.float32))
    np.testing.assert_allclose(
        np.asarray(rms_norm(table[5], weight, TINY), np.float32), scaled, rtol=2**-8, atol=0, strict=True
    )
