"""Write `generation.json`: what transformers generates with tiny random models, greedily and with beams.

    python tests/golden/make_generation.py

Needs the extra ``peers``. The weights are drawn from NumPy's generator by tensor name and seed, here and in the tests,
so that the file holds none. Every case is run in float32 as one batch with left padding, and in float64
prompt by prompt; only cases with the same result in both are kept, so that none hangs on rounding. (A padded
batch in float64 is NaN in transformers 5.24, whose softmax is in float32 and whose mask is not.)
"""

import json
import zlib
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
NEW_TOKENS = 12
MODELS: dict[str, dict] = {
    "grouped": {
        "model_type": "llama",
        "vocab_size": 40,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    },
    "tied": {
        "model_type": "llama",
        "vocab_size": 32,
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
    },
}
BEAM = {"num_beams": 4}
# (model, settings of the search; {} is greedy, number of end tokens, seeds)
PLAN: list[tuple[str, dict, int, range]] = [
    ("grouped", {}, 1, range(8)),
    ("grouped", BEAM, 1, range(16)),
    ("grouped", BEAM, 2, range(8)),
    ("grouped", {**BEAM, "num_beams": 3}, 8, range(8)),
    ("tied", {}, 2, range(4)),
    ("tied", BEAM, 0, range(8)),
]


def draw(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Draw tensor ``name`` of a random model in float64, with logits sharp enough that near ties are rare."""
    values = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(shape)
    if name.endswith("norm.weight"):
        return 1 + 0.3 * values
    scale = {"model.embed_tokens.weight": 0.5, "lm_head.weight": 3 / np.sqrt(shape[-1])}
    return values * scale.get(name, 1.5 / np.sqrt(shape[-1]))


def prompts(name: str, seed: int) -> list[list[int]]:
    """Return five prompts of lengths 1 to 20; token 0 pads."""
    rng = np.random.default_rng([seed, 7])
    lengths = [20, 1, *rng.integers(2, 20, 3).tolist()]
    return [rng.integers(1, MODELS[name]["vocab_size"], n).tolist() for n in lengths]


def generate(network, texts: list[list[int]], settings: dict, eos: list[int], new_tokens: int) -> list[list[int]]:
    """Return what transformers generates after texts of one batch, up to the first end token."""
    import torch
    from transformers import GenerationConfig

    longest = max(map(len, texts))
    tokens = torch.tensor([[0] * (longest - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (longest - len(text)) + [1] * len(text) for text in texts])
    network.generation_config = GenerationConfig()
    search = GenerationConfig(
        do_sample=False, max_new_tokens=new_tokens, eos_token_id=eos or None, pad_token_id=0, **settings
    )
    with torch.no_grad():
        out = network.generate(tokens, attention_mask=mask, generation_config=search)
    rows = []
    for row in out[:, longest:].tolist():
        end = next((at + 1 for at, token in enumerate(row) if token in eos), len(row))
        rows.append(row[:end])
    return rows


def main() -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    def model(name: str, seed: int, dtype: torch.dtype) -> LlamaForCausalLM:
        settings = {key: value for key, value in MODELS[name].items() if key != "model_type"}
        network = LlamaForCausalLM(LlamaConfig(**settings, attn_implementation="eager")).to(dtype).eval()
        state = {
            key: torch.tensor(draw(key, tuple(value.shape), seed), dtype=dtype)
            for key, value in network.state_dict().items()
            if not (key == "lm_head.weight" and network.config.tie_word_embeddings)
        }
        network.load_state_dict(state, strict=False)
        return network

    cases = []
    for name, settings, ends, seeds in PLAN:
        for seed in seeds:
            wide, narrow = (model(name, seed, dtype) for dtype in (torch.float64, torch.float32))
            texts = prompts(name, seed)
            # End tokens that the model likes: those it generates most often when nothing ends a text.
            free = [token for row in generate(narrow, texts, BEAM, [], NEW_TOKENS) for token in row if token]
            eos = sorted(np.bincount(free).argsort()[::-1][1 : 1 + ends].tolist())
            search = settings or {"num_beams": 1}, eos, NEW_TOKENS
            answers = generate(narrow, texts, *search)
            if answers == [generate(wide, [text], *search)[0] for text in texts]:
                cases.append({"model": name, "seed": seed, "settings": settings, "eos": eos, "new": answers})
            else:
                print("left out, hangs on rounding:", name, seed, settings)
    lengths = np.bincount([len(row) for case in cases for row in case["new"]], minlength=NEW_TOKENS + 1)
    print(len(cases), "cases; rows by length:", lengths[1:].tolist())
    lines = ",\n".join(json.dumps(case, separators=(",", ":")) for case in cases)
    (HERE / "generation.json").write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
