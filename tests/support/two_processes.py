"""Program of each process of `test_distributed.py`: training of the tiny model, alone or with the others.

``python two_processes.py MODEL FOLDER HOST:PORT NUMBER``: the first process prints the losses and the shapes of its
parts of a weight.
"""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rora_theory.lab.finetune import Batches, FinetuneConfig, Trainer, choose_widths, distributed, tokenize
from rora_theory.lab.finetune.distributed import ProcessConfig
from rora_theory.lab.finetune.sharding import Layout
from rora_theory.lab.llama.model import abstract_params
from rora_theory.lab.llama.weights import load_hf
from support import tiny

CONFIG = FinetuneConfig(rank=2, alpha=4, template="clean", batch_size=4, steps=3, warmup=0, lr=0.01, evaluate_every=2)


def train(folder: Path, params: Any, layout: Layout | None = None) -> list[float]:
    """Return training and validation losses, in order."""
    examples = tokenize(tiny.records(12), tiny.ByteEncoder(), template=CONFIG.template)
    widths = choose_widths(examples.input_lengths, 1)
    adapter = CONFIG.adapter().build(jax.random.key(1), tiny.CONFIG, params)
    train, held_out = (Batches(examples, widths, batch_size=4, seed=seed) for seed in (1, None))
    run = Trainer(params, tiny.CONFIG, adapter, CONFIG, train, held_out, folder, layout=layout)
    losses = [event.loss for event in run.train()]
    run.close()
    return losses


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    several = ProcessConfig(False, sys.argv[3], 2, int(sys.argv[4])).join(timeout=60)
    layout = Layout.over(jax.devices(), split_weights=True)
    shardings = layout.shardings(abstract_params(tiny.CONFIG))
    params = load_hf(Path(sys.argv[1]), tiny.CONFIG, jnp.float32, shardings)
    weight = params["layers"]["mlp.up_proj"]["weight"]
    report = {
        "several": several,
        "processes": jax.process_count(),
        "devices": len(jax.devices()),
        "parts": [list(shard.data.shape) for shard in weight.addressable_shards],
        "losses": train(Path(sys.argv[2]), params, layout),
    }
    if distributed.is_first():
        print(json.dumps(report))
    assert np.isfinite(report["losses"]).all()


if __name__ == "__main__":
    main()
