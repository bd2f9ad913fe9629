"""Compare the texts of one adapter here and in peft, transformers and llama.cpp, in PEFT's form and in portable form.

    python benchmarks/serving.py --llama-cpp SOURCE --out results/published/serving/serving.json

SOURCE is llama.cpp's source tree, whose `convert_lora_to_gguf.py` makes the adapters' GGUF files (the sdist of
llama-cpp-python has one at vendor/llama.cpp); the runtime is the package xllamacpp. The model is a tiny random LLaMA in
float32, every linear module is adapted at rank 32, and decoding is greedy: 24 tokens after each of 16 random prompts.

All clients compute in float32: llama.cpp runs with a float32 cache and without flash attention, whose kernels on a CPU
convert keys and values to float16 whatever the cache's type. No client forbids a token: the model's end token has a
logit of zero everywhere, so greedy decoding never selects it. The clients still add in different orders, so two texts
can differ where two tokens are almost equally likely.
"""

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hardware import silence_transformers

from rora_theory.errors import InputError
from rora_theory.lab.adapters import LoraAdapter, LoraConfig, load_peft, rewrite_portable, save_peft
from rora_theory.lab.llama import LlamaConfig, forward
from rora_theory.lab.llama.weights import save_hf
from rora_theory.runs.files import write_whole
from sims.common import cli, tables

END_ID = 0
"""End token. Its row of the output layer is zero, and the largest of the other logits is positive."""

SHAPE = LlamaConfig(
    vocab_size=320,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=128,
    tie_word_embeddings=False,
    eos_token_id=END_ID,
)
ADAPTERS = {
    "lora": LoraConfig(32, 16, "lora", "all-linear"),
    "rora": LoraConfig(32, 16, "rora", "all-linear"),
    "kappa 0.25": LoraConfig(32, 4, 0.25, "all-linear"),
    "lora, rank_pattern": LoraConfig(32, 16, "lora", "all-linear", rank_pattern={"down_proj": 8, "q_proj": 16}),
    "rora, alpha_pattern": LoraConfig(32, 16, "rora", "all-linear", alpha_pattern={"down_proj": 64, ".*v_proj": 4}),
    "rora, rank_pattern": LoraConfig(32, 16, "rora", "all-linear", rank_pattern={"down_proj": 8, "q_proj": 16}),
    "dora": LoraConfig(32, 16, "lora", "all-linear", use_dora=True),
}
TORCH_CLIENTS = ("peft", "transformers")
PROMPT_COUNT, PROMPT_LENGTH, NEW_TOKENS = 16, 8, 24
"""Number of prompts, tokens of a prompt, and tokens generated after each."""


@dataclass(frozen=True)
class ServingOptions:
    llama_cpp: Path
    """Source tree of llama.cpp"""
    out: Path | None = None
    """JSON file for the results"""
    seed: int = 0
    """Seed of the weights and prompts"""


def random_model(seed: int) -> dict[str, Any]:
    """Sample weights of `SHAPE`, normal with deviation 1/sqrt(inputs) so that logits differ by more than rounding."""
    from rora_theory.lab.llama import abstract_params

    leaves, tree = jax.tree.flatten(abstract_params(SHAPE, jnp.float32))
    keys = jax.random.split(jax.random.key(seed), len(leaves))

    def draw(key: jax.Array, leaf: Any) -> jax.Array:
        if leaf.shape in ((SHAPE.hidden_size,), (SHAPE.num_hidden_layers, SHAPE.hidden_size)):
            return jnp.ones(leaf.shape)  # weights of norms
        return jax.random.normal(key, leaf.shape) / leaf.shape[-1] ** 0.5

    params: dict[str, Any] = jax.tree.unflatten(tree, [draw(key, leaf) for key, leaf in zip(keys, leaves, strict=True)])
    return params | {"lm_head": params["lm_head"].at[END_ID].set(0.0)}


def random_adapter(config: LoraConfig, params: dict[str, Any], seed: int) -> LoraAdapter:
    """Sample an adapter with a random B, so that gamma B A is about half as large as the weight, and random magnitudes.

    DoRA's magnitudes differ from the weight's row norms, which a client that doesn't load them would compute itself.
    """
    adapter: LoraAdapter = config.build(jax.random.key(seed), SHAPE, params)
    # Replace B, and DoRA's magnitudes, module by module.
    changed = {}
    for index, target in enumerate(adapter.targets):
        tensors = dict(adapter.params[target.module])
        # Rows beyond a layer's own rank are padding, which must stay zero.
        rows = jnp.arange(target.width) < jnp.asarray(target.ranks)[:, None]
        noise = 0.05 * jax.random.normal(jax.random.fold_in(jax.random.key(seed + 1), index), tensors["lora_B"].shape)
        changed[target.module] = tensors | {"lora_B": jnp.where(rows[:, None], noise, 0.0)}
        if adapter.config.use_dora:
            key = jax.random.fold_in(jax.random.key(seed + 2), index)
            scale = 1 + 0.2 * jax.random.normal(key, tensors["lora_magnitude_vector"].shape)
            changed[target.module] |= {"lora_magnitude_vector": scale * tensors["lora_magnitude_vector"]}
    return adapter.replace(changed)


def greedy_tokens(params: dict[str, Any], adapter: LoraAdapter | None, prompts: np.ndarray) -> np.ndarray:
    """Return `NEW_TOKENS` greedy tokens after each prompt, [prompts, new tokens], by full forward passes."""
    step = jax.jit(lambda tokens: forward(params, tokens, SHAPE, adapter))
    tokens = np.zeros((len(prompts), PROMPT_LENGTH + NEW_TOKENS), np.int32)
    tokens[:, :PROMPT_LENGTH] = prompts
    for position in range(PROMPT_LENGTH, PROMPT_LENGTH + NEW_TOKENS):
        tokens[:, position] = np.asarray(step(jnp.asarray(tokens)))[:, position - 1].argmax(axis=-1)
    return tokens[:, PROMPT_LENGTH:]


def write_gguf(path: Path, folder: Path) -> None:
    """Write the model of a Hugging Face folder as a GGUF file, with the numbers of the tokens as its vocabulary."""
    import gguf
    import safetensors.numpy

    # Shape of the model.
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(SHAPE.max_position_embeddings)
    writer.add_embedding_length(SHAPE.hidden_size)
    writer.add_block_count(SHAPE.num_hidden_layers)
    writer.add_feed_forward_length(SHAPE.intermediate_size)
    writer.add_head_count(SHAPE.num_attention_heads)
    writer.add_head_count_kv(SHAPE.num_key_value_heads)
    writer.add_layer_norm_rms_eps(SHAPE.rms_norm_eps)
    writer.add_rope_freq_base(SHAPE.rope_theta)
    writer.add_rope_dimension_count(SHAPE.head_dim)
    writer.add_vocab_size(SHAPE.vocab_size)
    # Vocabulary: the token of id n is <n>.
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_eos_token_id(END_ID)  # by default, token 11 ends a GPT-2 vocabulary
    writer.add_token_list([f"<{index}>" for index in range(SHAPE.vocab_size)])
    writer.add_token_types([1] * SHAPE.vocab_size)
    writer.add_token_merges(["< >"])  # the writer omits an empty list
    # Tensors under llama.cpp's names.
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, SHAPE.num_hidden_layers)
    for name, tensor in safetensors.numpy.load((folder / "model.safetensors").read_bytes()).items():
        for module, heads in (("q_proj", SHAPE.num_attention_heads), ("k_proj", SHAPE.num_key_value_heads)):
            # llama.cpp rotates neighbouring pairs of a head's entries, Hugging Face pairs from its two halves.
            if f"{module}." in name:
                halves = tensor.reshape(heads, 2, SHAPE.head_dim // 2, -1)
                tensor = halves.swapaxes(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def convert(source: Path, base: Path, adapter: Path, out: Path) -> str | None:
    """Convert an adapter with llama.cpp's own script; return None, or the last line of its error message."""
    command = [sys.executable, str(source / "convert_lora_to_gguf.py"), "--outtype", "f32", "--base", str(base)]
    process = subprocess.run(
        [*command, "--outfile", str(out), str(adapter)], capture_output=True, text=True, check=False
    )
    return None if process.returncode == 0 else process.stderr.strip().splitlines()[-1]


def torch_tokens(base: Path, adapter: Path | None, prompts: np.ndarray, client: str) -> np.ndarray:
    """Return `NEW_TOKENS` greedy tokens after each prompt from transformers, with the adapter loaded by a client."""
    import peft
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    if adapter is not None and client == "transformers":
        model.load_adapter(str(adapter))
    elif adapter is not None:
        model = peft.PeftModel.from_pretrained(model, str(adapter)).eval()
    tokens = torch.from_numpy(prompts)
    generated = model.generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=END_ID,
    )
    return np.asarray(generated[:, PROMPT_LENGTH:].numpy())


def llama_cpp_tokens(model: Path, adapter: Path | None, prompts: np.ndarray) -> np.ndarray:
    """Return `NEW_TOKENS` greedy tokens after each prompt from llama.cpp's server."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.n_ctx, params.n_parallel, params.warmup, params.n_gpu_layers, params.verbosity = 128, 1, False, 0, -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    # Both are needed for attention in float32: flash attention ignores the cache's type.
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if adapter is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    server = xllamacpp.Server(params)
    request = {
        "n_predict": NEW_TOKENS,
        "temperature": 0,
        "top_k": 1,
        "return_tokens": True,
        "cache_prompt": False,
    }
    texts = []
    for prompt in prompts:
        answer = server.handle_completions(request | {"prompt": prompt.tolist()})
        if "choices" not in answer:
            raise InputError(f"llama.cpp must answer with a completion, got {answer!r:.200}")
        texts.append([int(number) for number in re.findall(r"<(\d+)>", answer["choices"][0]["text"])])
    return np.asarray(texts)


def count_equal(texts: np.ndarray, ours: np.ndarray) -> int:
    """Return the number of texts that equal ours in every token."""
    return int((texts == ours).all(axis=1).sum())


def main() -> None:
    """Compare every adapter in both forms with all clients, and print and write the numbers of equal texts."""
    silence_transformers()
    config = cli.parse(ServingOptions, description=(__doc__ or "").split("\n", 1)[0])
    if not (config.llama_cpp / "convert_lora_to_gguf.py").is_file():
        raise InputError(f"{config.llama_cpp} has no convert_lora_to_gguf.py. Pass llama.cpp's source tree.")
    params = random_model(config.seed)
    prompts = np.random.default_rng(config.seed).integers(3, SHAPE.vocab_size, (PROMPT_COUNT, PROMPT_LENGTH))
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_hf(folder / "base", params, SHAPE)
        write_gguf(folder / "base.gguf", folder / "base")
        # The base model alone: any difference here is not the adapter's.
        ours = greedy_tokens(params, None, prompts)
        texts = {client: torch_tokens(folder / "base", None, prompts, client) for client in TORCH_CLIENTS}
        texts["llama.cpp"] = llama_cpp_tokens(folder / "base.gguf", None, prompts)
        rows.append({"adapter": "none"} | {client: count_equal(tokens, ours) for client, tokens in texts.items()})
        for label, settings in ADAPTERS.items():
            adapter = random_adapter(settings, params, config.seed)
            ours = greedy_tokens(params, adapter, prompts)
            peft = folder / label / "peft"
            save_peft(peft, adapter, base_model=str(folder / "base"))
            for form in ("peft", "portable"):
                row: dict[str, Any] = {"adapter": label, "form": form}
                rows.append(row)
                # The portable form, read by this package. Some adapters have none.
                try:
                    if form == "portable":
                        rewrite_portable(peft, folder / label / form)
                        row["here"] = count_equal(
                            greedy_tokens(params, load_peft(folder / label / form, SHAPE), prompts), ours
                        )
                except InputError as error:
                    row["refused"] = "here: " + str(error).removeprefix(f"{peft}/")
                    continue
                # The clients on torch, then llama.cpp, whose converter may refuse an adapter.
                row |= {
                    client: count_equal(torch_tokens(folder / "base", folder / label / form, prompts, client), ours)
                    for client in TORCH_CLIENTS
                }
                file = folder / label / f"{form}.gguf"
                reason = convert(config.llama_cpp, folder / "base", folder / label / form, file)
                if reason is not None:
                    row["refused"] = f"convert_lora_to_gguf.py: {reason}"
                    continue
                row["llama.cpp"] = count_equal(llama_cpp_tokens(folder / "base.gguf", file, prompts), ours)
    columns = ("adapter", "form", "here", *TORCH_CLIENTS, "llama.cpp")
    cells = [["" if row.get(column) is None else row[column] for column in columns] for row in rows]
    tables.print_table(f"texts equal to ours, of {PROMPT_COUNT}", columns, cells, left=2)
    for row in rows:
        if "refused" in row:
            tables.print_text(f"{row['adapter']}, {row['form']}: {row['refused']}")
    if config.out:
        packages = ("rora-theory", "jax", "torch", "transformers", "peft", "gguf", "xllamacpp")
        versions = {name: version(name) for name in packages}
        settings = {label: asdict(adapter_config) for label, adapter_config in ADAPTERS.items()}
        results = {"prompts": PROMPT_COUNT, "new_tokens": NEW_TOKENS, "seed": config.seed, "versions": versions}
        results |= {"adapters": settings, "rows": rows}
        config.out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(config.out, json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    cli.run_command(main)
