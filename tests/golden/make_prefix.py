"""Make tests/golden/prefix/ with transformers and peft, and check that peft loads the files of this package.

    python tests/golden/make_prefix.py

The folder is as peft saves it, of the base model of `make_adapters.py`, with `golden.npz`: logits without and with
padding on the left, the gradient of the mean next-token loss in the prefix, the losses of 20 AdamW steps, and the
likeliest tokens, one after another, by peft's forward pass.
"""

import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from make_adapters import RATE, SHAPE, STEPS, TOKENS, base_params, torch_base, torch_loss

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
    arrays = {"logits": logits.detach().numpy(), "count": np.asarray(trained.numel()), "gradient": trained.grad.numpy()}
    arrays["gradient"] = arrays["gradient"].copy()
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
    optimizer = torch.optim.AdamW([trained], lr=RATE)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss, _ = torch_loss(model)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    np.savez_compressed(FOLDER / "golden.npz", losses=np.asarray(losses), **arrays)


def check_ours() -> dict[str, float]:
    """Return the largest differences of logits: ours from peft's, and peft's on our file of another prefix."""
    import jax
    import jax.numpy as jnp
    import torch
    from peft import PeftModel

    from rora_theory.adapters import PrefixConfig, init, load_peft, save_peft
    from rora_theory.llama import LlamaConfig, forward

    config, params = LlamaConfig(**SHAPE), base_params()
    read = load_peft(FOLDER, config)
    expected = np.load(FOLDER / "golden.npz")["logits"]
    differences = {"ours on peft's": np.abs(forward(params, jnp.asarray(TOKENS), config, read) - expected).max()}
    other = init(jax.random.key(1), PrefixConfig(3), config, params)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        save_peft(folder, other)
        theirs = torch_loss(PeftModel.from_pretrained(torch_base(), folder))[1].numpy()
    differences["peft on ours"] = np.abs(forward(params, jnp.asarray(TOKENS), config, other) - theirs).max()
    return {name: float(value) for name, value in differences.items()}


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
