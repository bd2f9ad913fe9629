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

from rora_theory.adapters import LoraAdapter, LoraConfig, init, load_peft, rewrite_portable, save_peft
from rora_theory.errors import InputError
from rora_theory.io.files import write_whole
from rora_theory.llama import LlamaConfig, forward
from rora_theory.llama.weights import save_hf
from sims.common import cli, tables

END = 0
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
    eos_token_id=END,
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
TORCH = ("peft", "transformers")
PROMPTS, PROMPT, NEW = 16, 8, 24


@dataclass(frozen=True)
class Config:
    """What to compare with."""

    llama_cpp: Path
    """llama.cpp's source tree"""
    out: Path | None = None
    """where to write the figures as JSON"""
    seed: int = 0
    """of weights and prompts"""


def random_model(seed: int) -> dict[str, Any]:
    """Sample weights of `SHAPE`, normal with deviation 1/sqrt(inputs) so that logits differ by more than rounding."""
    from rora_theory.llama import abstract_params

    leaves, tree = jax.tree.flatten(abstract_params(SHAPE, jnp.float32))
    keys = jax.random.split(jax.random.key(seed), len(leaves))

    def one(key: jax.Array, leaf: Any) -> jax.Array:
        if leaf.shape in ((SHAPE.hidden_size,), (SHAPE.num_hidden_layers, SHAPE.hidden_size)):
            return jnp.ones(leaf.shape)  # norms
        return jax.random.normal(key, leaf.shape) / leaf.shape[-1] ** 0.5

    params: dict[str, Any] = jax.tree.unflatten(tree, [one(key, leaf) for key, leaf in zip(keys, leaves, strict=True)])
    return params | {"lm_head": params["lm_head"].at[END].set(0.0)}


def random_adapter(config: LoraConfig, params: dict[str, Any], seed: int) -> LoraAdapter:
    """Sample an adapter with a random B, so that gamma B A is about half as large as the weight, and random magnitudes.

    DoRA's magnitudes differ from the weight's row norms, which a client that doesn't load them would compute itself.
    """
    adapter: LoraAdapter = init(jax.random.key(seed), config, SHAPE, params)
    changed = {}
    for index, target in enumerate(adapter.targets):
        own = dict(adapter.params[target.module])
        rows = jnp.arange(target.width) < jnp.asarray(target.ranks)[:, None]
        noise = 0.05 * jax.random.normal(jax.random.fold_in(jax.random.key(seed + 1), index), own["lora_B"].shape)
        changed[target.module] = own | {"lora_B": jnp.where(rows[:, None], noise, 0.0)}
        if adapter.config.use_dora:
            key = jax.random.fold_in(jax.random.key(seed + 2), index)
            scale = 1 + 0.2 * jax.random.normal(key, own["lora_magnitude_vector"].shape)
            changed[target.module] |= {"lora_magnitude_vector": scale * own["lora_magnitude_vector"]}
    return adapter.replace(changed)


def greedy(params: dict[str, Any], adapter: LoraAdapter | None, prompts: np.ndarray) -> np.ndarray:
    """`NEW` greedy tokens after each prompt, by whole forward passes."""
    step = jax.jit(lambda tokens: forward(params, tokens, SHAPE, adapter))
    tokens = np.zeros((len(prompts), PROMPT + NEW), np.int32)
    tokens[:, :PROMPT] = prompts
    for at in range(PROMPT, PROMPT + NEW):
        tokens[:, at] = np.asarray(step(jnp.asarray(tokens)))[:, at - 1].argmax(axis=-1)
    return tokens[:, PROMPT:]


def write_gguf(path: Path, folder: Path) -> None:
    """The model of a Hugging Face folder in llama.cpp's layout, with a vocabulary of numbers."""
    import gguf
    import safetensors.numpy

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
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_eos_token_id(END)  # a GPT-2 vocabulary that names none ends at token 11
    writer.add_token_list([f"<{index}>" for index in range(SHAPE.vocab_size)])
    writer.add_token_types([1] * SHAPE.vocab_size)
    writer.add_token_merges(["< >"])  # an empty list is no list
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, SHAPE.num_hidden_layers)
    for name, tensor in safetensors.numpy.load((folder / "model.safetensors").read_bytes()).items():
        for module, heads in (("q_proj", SHAPE.num_attention_heads), ("k_proj", SHAPE.num_key_value_heads)):
            if f"{module}." in name:  # llama.cpp turns neighbouring pairs of a head, Hugging Face its halves
                halves = tensor.reshape(heads, 2, SHAPE.head_dim // 2, -1)
                tensor = halves.swapaxes(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def convert(source: Path, base: Path, adapter: Path, out: Path) -> str | None:
    """llama.cpp's own conversion of an adapter; its last line where it refuses."""
    command = [sys.executable, str(source / "convert_lora_to_gguf.py"), "--outtype", "f32", "--base", str(base)]
    done = subprocess.run([*command, "--outfile", str(out), str(adapter)], capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


def from_torch(base: Path, adapter: Path | None, prompts: np.ndarray, client: str) -> np.ndarray:
    """`NEW` greedy tokens after each prompt, by transformers, which reads the adapter itself or has it from peft."""
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
    found = model.generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=NEW,
        do_sample=False,
        pad_token_id=END,
    )
    return np.asarray(found[:, PROMPT:].numpy())


def served(model: Path, adapter: Path | None, prompts: np.ndarray) -> np.ndarray:
    """`NEW` greedy tokens after each prompt, by llama.cpp."""
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
        "n_predict": NEW,
        "temperature": 0,
        "top_k": 1,
        "return_tokens": True,
        "cache_prompt": False,
    }
    found = []
    for prompt in prompts:
        answer = server.handle_completions(request | {"prompt": prompt.tolist()})
        if "choices" not in answer:
            raise InputError(f"llama.cpp answers {answer!r:.200}; accepted is a completion")
        found.append([int(number) for number in re.findall(r"<(\d+)>", answer["choices"][0]["text"])])
    return np.asarray(found)


def equal(texts: np.ndarray, ours: np.ndarray) -> int:
    """How many texts are ours to the last token."""
    return int((texts == ours).all(axis=1).sum())


def main() -> None:
    """Compare every adapter in both forms."""
    config = cli.parse(Config, description=(__doc__ or "").split("\n", 1)[0])
    if not (config.llama_cpp / "convert_lora_to_gguf.py").is_file():
        raise InputError(f"{config.llama_cpp}: has no convert_lora_to_gguf.py; accepted is llama.cpp's source tree")
    params = random_model(config.seed)
    prompts = np.random.default_rng(config.seed).integers(3, SHAPE.vocab_size, (PROMPTS, PROMPT))
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_hf(folder / "base", params, SHAPE)
        write_gguf(folder / "base.gguf", folder / "base")
        ours = greedy(params, None, prompts)
        texts = {client: from_torch(folder / "base", None, prompts, client) for client in TORCH}
        texts["llama.cpp"] = served(folder / "base.gguf", None, prompts)
        rows.append({"adapter": "none"} | {client: equal(found, ours) for client, found in texts.items()})
        for label, settings in ADAPTERS.items():
            adapter = random_adapter(settings, params, config.seed)
            ours = greedy(params, adapter, prompts)
            peft = folder / label / "peft"
            save_peft(peft, adapter, base_model=str(folder / "base"))
            for form in ("peft", "portable"):
                row: dict[str, Any] = {"adapter": label, "form": form}
                rows.append(row)
                try:
                    if form == "portable":
                        rewrite_portable(peft, folder / label / form)
                        row["here"] = equal(greedy(params, load_peft(folder / label / form, SHAPE), prompts), ours)
                except InputError as error:
                    row["refused"] = "here: " + str(error).removeprefix(f"{peft}/")
                    continue
                row |= {
                    client: equal(from_torch(folder / "base", folder / label / form, prompts, client), ours)
                    for client in TORCH
                }
                file = folder / label / f"{form}.gguf"
                reason = convert(config.llama_cpp, folder / "base", folder / label / form, file)
                if reason is not None:
                    row["refused"] = f"convert_lora_to_gguf.py: {reason}"
                    continue
                row["llama.cpp"] = equal(served(folder / "base.gguf", file, prompts), ours)
    columns = ("adapter", "form", "here", *TORCH, "llama.cpp")
    cells = [["" if row.get(column) is None else row[column] for column in columns] for row in rows]
    tables.print_table(f"texts equal to ours, of {PROMPTS}", columns, cells, left=2)
    for row in rows:
        if "refused" in row:
            tables.print_text(f"{row['adapter']}, {row['form']}: {row['refused']}")
    if config.out:
        named = ("rora-theory", "jax", "torch", "transformers", "peft", "gguf", "xllamacpp")
        versions = {name: version(name) for name in named}
        settings = {label: asdict(one) for label, one in ADAPTERS.items()}
        figures = {"prompts": PROMPTS, "new_tokens": NEW, "seed": config.seed, "versions": versions}
        figures |= {"adapters": settings, "rows": rows}
        config.out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(config.out, json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    cli.run(main)
