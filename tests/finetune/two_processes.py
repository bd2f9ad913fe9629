"""What each process of `test_distributed.py` runs: the tiny model's training, alone or with the others.

python two_processes.py FOLDER    prints the losses and files that this process is to write
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import tiny

from rora_theory import adapters
from rora_theory.finetune import (
    Batches,
    FinetuneConfig,
    Stepped,
    Trainer,
    choose_widths,
    distributed,
    sharding,
    tokenize,
)
from rora_theory.finetune.sharding import Layout

CONFIG = FinetuneConfig(
    rank=2, alpha=4, template="clean", batch=4, max_steps=3, warmup=0, learning_rate=0.01, evaluate_every=2
)


def train(folder: Path, layout: Layout | None = None) -> list[float]:
    """Training and validation losses, in order."""
    examples = tokenize(tiny.records(12), tiny.ByteEncoder(), template=CONFIG.template)
    widths = choose_widths(examples.sizes, 1)
    params = tiny.params() if layout is None else layout.params(tiny.params())
    adapter = adapters.init(jax.random.key(1), CONFIG.lora(), tiny.CONFIG, params)
    train, held_out = (Batches(examples, widths, batch=4, seed=seed) for seed in (1, None))
    run = Trainer(params, tiny.CONFIG, adapter, CONFIG, train, held_out, folder, layout=layout)
    losses = [event.loss for event in run.run() if isinstance(event, Stepped) or event.step]
    run.close()
    return losses


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    several = distributed.initialize(timeout=60)
    layout = Layout(sharding.mesh(fsdp=2))
    weight = layout.params(tiny.params())["layers"]["mlp.up_proj"]["weight"]
    report = {
        "several": several,
        "processes": jax.process_count(),
        "devices": len(jax.devices()),
        "parts": [list(shard.data.shape) for shard in weight.addressable_shards],
        "losses": train(Path(sys.argv[1]), layout),
    }
    if distributed.is_first():
        print(json.dumps(report))
    assert np.isfinite(report["losses"]).all()


if __name__ == "__main__":
    main()
