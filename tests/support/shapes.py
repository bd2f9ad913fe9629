"""Configurations of published models, by short name: random weights and counts of parameters need no more."""

from rora_theory.lab.llama.config import LlamaConfig

SHAPES = {
    "llama-7b": LlamaConfig(32000, 4096, 11008, 32, 32, 32, 128),
    "llama-13b": LlamaConfig(32000, 5120, 13824, 40, 40, 40, 128),
    "llama2-7b": LlamaConfig(32000, 4096, 11008, 32, 32, 32, 128, rms_norm_eps=1e-5, max_position_embeddings=4096),
    "llama2-70b": LlamaConfig(32000, 8192, 28672, 80, 64, 8, 128, rms_norm_eps=1e-5, max_position_embeddings=4096),
    "llama3-8b": LlamaConfig(
        128256, 4096, 14336, 32, 32, 8, 128, rms_norm_eps=1e-5, rope_theta=500000.0, max_position_embeddings=8192
    ),
    "sheared-llama-1.3b": LlamaConfig(
        32000, 2048, 5504, 24, 16, 16, 128, rms_norm_eps=1e-5, max_position_embeddings=4096
    ),
    "mistral-7b": LlamaConfig(
        32000,
        4096,
        14336,
        32,
        32,
        8,
        128,
        rms_norm_eps=1e-5,
        max_position_embeddings=32768,
        model_type="mistral",
        sliding_window=4096,
    ),
    "qwen2.5-7b": LlamaConfig(
        152064, 3584, 18944, 28, 28, 4, 128, rope_theta=1e6, max_position_embeddings=131072, model_type="qwen2"
    ),
    "qwen3-8b": LlamaConfig(
        151936, 4096, 12288, 36, 32, 8, 128, rope_theta=1e6, max_position_embeddings=40960, model_type="qwen3"
    ),
    "smollm2-135m": LlamaConfig(
        49152,
        576,
        1536,
        30,
        9,
        3,
        64,
        rms_norm_eps=1e-5,
        rope_theta=100000.0,
        tie_word_embeddings=True,
        max_position_embeddings=8192,
    ),
    "gemma3-270m": LlamaConfig(
        262144,
        640,
        2048,
        18,
        4,
        1,
        256,
        rope_theta=1e6,
        tie_word_embeddings=True,
        max_position_embeddings=32768,
        model_type="gemma3_text",
        sliding_window=512,
        full_attention_layers=(5, 11, 17),
        query_pre_attn_scalar=256,
        rope_local_base_freq=1e4,
    ),
}
