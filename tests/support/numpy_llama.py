"""LLaMA and the papers' adapters in numpy and float64, written from the definitions by layer and head.

Nothing of the package is used. Weights come by Hugging Face's names (`tests/golden/make_adapters.py`).
"""

import math

import numpy as np


def logits(weights, shape, tokens, *, module=None):
    """Compute logits, [rows, tokens, vocabulary].

    Args:
      weights: Weights by Hugging Face's names.
      shape: Configuration as a dictionary; theta is 10000.
      tokens: Token ids, [rows, tokens].
      module: Function ``module(layer, name, x, z)`` that returns the output of an adapted module from the input x and
        the output z of the linear module; None for the base model.
    """
    weights = {name: np.asarray(value, np.float64) for name, value in weights.items()}
    return np.stack([_row(weights, shape, row, module) for row in np.asarray(tokens)])


def _row(weights, shape, tokens, module):
    heads, kv_heads, width = shape["num_attention_heads"], shape["num_key_value_heads"], shape["head_dim"]
    x = weights["model.embed_tokens.weight"][tokens]
    positions = np.arange(len(tokens))
    for layer in range(shape["num_hidden_layers"]):
        name = f"model.layers.{layer}."

        def linear(module_name, u, layer=layer, name=name):
            z = u @ weights[f"{name}{module_name}.weight"].T + weights.get(f"{name}{module_name}.bias", 0.0)
            return z if module is None else module(layer, module_name, u, z)

        u = _norm(x, weights[name + "input_layernorm.weight"], shape["rms_norm_eps"])
        q, k, v = (linear(f"self_attn.{kind}_proj", u).reshape(len(tokens), -1, width) for kind in "qkv")
        outs = []
        for head in range(heads):
            shared = head // (heads // kv_heads)
            keys, values = _turned(k[:, shared], positions), v[:, shared]
            scores = _turned(q[:, head], positions) @ keys.T / math.sqrt(width)
            for i in range(len(tokens)):
                scores[i, i + 1 :] = -np.inf
            chances = np.exp(scores - scores.max(axis=1, keepdims=True))
            outs.append(chances / chances.sum(axis=1, keepdims=True) @ values)
        x = x + linear("self_attn.o_proj", np.concatenate(outs, axis=1))
        u = _norm(x, weights[name + "post_attention_layernorm.weight"], shape["rms_norm_eps"])
        gate = linear("mlp.gate_proj", u)
        x = x + linear("mlp.down_proj", gate / (1 + np.exp(-gate)) * linear("mlp.up_proj", u))
    return _norm(x, weights["model.norm.weight"], shape["rms_norm_eps"]) @ weights["lm_head.weight"].T


def llama3_divisors(plain, factor, low_freq_factor, high_freq_factor, original_max_position_embeddings):
    """Compute the divisors of frequencies by LLaMA 3.1's scaling, in a loop as in llama.cpp's converter."""
    divisors = []
    for wavelength in 2 * np.pi / np.asarray(plain, np.float64):
        turns = original_max_position_embeddings / wavelength
        if turns > high_freq_factor:
            divisors.append(1.0)
        elif turns < low_freq_factor:
            divisors.append(factor)
        else:
            smooth = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors)


def loss(logits, tokens):
    """Return the mean cross-entropy of the next token."""
    tokens = np.asarray(tokens)
    top = logits.max(axis=-1, keepdims=True)
    log_chances = logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))
    return -np.mean(np.take_along_axis(log_chances[:, :-1], tokens[:, 1:, None], axis=-1))


def _norm(x, weight, eps):
    return weight * x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps)


def _turned(x, positions):
    """Apply the rotary embedding: the pair (x_i, x_{i + h/2}) as a complex number, times e^{i position
    10000^{-2i/h}}.
    """
    half = x.shape[1] // 2
    angle = positions[:, None] * 10000.0 ** (-np.arange(half) / half)
    pairs = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angle)
    return np.concatenate([pairs.real, pairs.imag], axis=1)
