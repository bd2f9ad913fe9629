"""Take AdamW steps on an adapter, as the golden scripts do with torch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rora_theory.lab.llama import forward


def next_token_loss(params, tokens, config, adapter):
    """Return the function from trained arrays to the mean loss of the next token and the logits."""

    def loss(trained):
        logits = forward(params, tokens, config, adapter.replace(trained))
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])), logits

    return loss


def train_as_peft(adapter, params, tokens, config, *, steps, rate):
    """Take ``steps`` steps with the defaults of torch.optim.AdamW.

    Returns:
      The first step's logits and gradient, the losses, and the trained arrays after the last step.
    """
    optimizer = optax.adamw(rate, eps=1e-8, weight_decay=0.01)
    loss = next_token_loss(params, tokens, config, adapter)

    @jax.jit
    def step(trained, state):
        (value, logits), gradient = jax.value_and_grad(loss, has_aux=True)(trained)
        with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer count
            updates, state = optimizer.update(gradient, state, trained)
        return optax.apply_updates(trained, updates), state, value, logits, gradient

    trained, state = adapter.params, optimizer.init(adapter.params)
    trained, state, value, logits, gradient = step(trained, state)
    losses = [float(value)]
    for _ in range(steps - 1):
        trained, state, value, *_ = step(trained, state)
        losses.append(float(value))
    assert losses[-1] < losses[0] - 0.01, "the steps reduce the loss"
    return logits, gradient, np.array(losses), trained
