"""Make tests/golden/prefix/ with transformers and peft, and check that peft loads the files of this package.

    python tests/golden/make_prefix.py

The folder is as peft saves it, of the base model of `make_adapters.py`, with `golden.npz`: logits without and with
padding on the left, the gradient of the mean next-token loss in the prefix, the losses of 20 AdamW steps, and the
likeliest tokens, one after another, by peft's forward pass.
"""

import shutil
import sys
from pathlib import Path

import numpy as np
from make_adapters import SHAPE, TOKENS, base_params, peft_difference, torch_base, torch_loss, train

FOLDER = Path(__file__).parent / "prefix"
VIRTUAL_TOKENS, PADDED, NEW = 5, 4, 6
MASK = np.ones_like(TOKENS)
MASK[0, :PADDED] = 0


def make() -> None:
    """Write the folder."""
    import torch
    from peft import PrefixTuningConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(torch_base(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL_TOKENS))
    model.eval()
    model.save_pretrained(FOLDER)
    (FOLDER / "README.md").unlink(missing_ok=True)
    tokens, mask = torch.from_numpy(TOKENS), torch.from_numpy(MASK)
    (trained,) = (value for value in model.parameters() if value.requires_grad)
    loss, logits = torch_loss(model)
    loss.backward()
    arrays = {"logits": logits.detach().numpy(), "count": np.asarray(trained.numel())}
    arrays["gradient"] = trained.grad.numpy().copy()
    with torch.no_grad():
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        arrays["padded"] = model(tokens, attention_mask=mask, position_ids=positions).logits.numpy()
        # By the forward pass: under transformers 5 peft's own `generate` reads no prefix (its cache is ignored).
        sequences, masks = tokens, mask
        for _ in range(NEW):
            positions = (masks.cumsum(1) - 1).clamp(min=0)
            new = model(sequences, attention_mask=masks, position_ids=positions).logits[:, -1:].argmax(-1)
            sequences, masks = torch.cat([sequences, new], 1), torch.cat([masks, torch.ones_like(new)], 1)
        arrays["generated"] = sequences[:, tokens.shape[1] :].numpy()
    losses = train(model, [trained])
    np.savez_compressed(FOLDER / "golden.npz", losses=losses, **arrays)


def check_ours() -> dict[str, float]:
    """Return the largest differences of logits: ours from peft's, and peft's on our file of another prefix."""
    import jax
    import jax.numpy as jnp

    from rora_theory.lab.adapters import PrefixConfig, load_peft
    from rora_theory.lab.llama import LlamaConfig, forward

    config, params, tokens = LlamaConfig(**SHAPE), base_params(), jnp.asarray(TOKENS)
    expected = np.load(FOLDER / "golden.npz")["logits"]
    ours = np.asarray(forward(params, tokens, config, load_peft(FOLDER, config)))
    other = PrefixConfig(3).build(jax.random.key(1), config, params)
    return {
        "ours on peft's": float(np.abs(ours - expected).max()),
        "peft on ours": peft_difference(other, forward(params, tokens, config, other)),
    }


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    make()
    differences = check_ours()
    for name, difference in differences.items():
        print(f"{name}: logits differ by at most {difference:.1e}")
    if max(differences.values()) > 1e-5:
        sys.exit("peft does not compute from our files what we do")


if __name__ == "__main__":
    main()
