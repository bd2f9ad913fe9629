"""Memory of a compiled step, and of the device."""

import jax
import pytest
from support import tiny

from rora_theory.lab.finetune import FinetuneConfig, Trainer, prepare
from rora_theory.lab.finetune.memory import GB, StepMemory, device_memory

CONFIG = FinetuneConfig(rank=2, alpha=4, batch_size=4, steps=3, warmup=0, held_out=0, dropout=0.0, widths=1)


def test_a_run_uses_the_step_that_it_has_analysed(params, caplog) -> None:
    """The arguments are the weights, the state and a batch; the loop compiles nothing more for batches of one width."""
    data = prepare(tiny.records(12), tiny.ByteEncoder(), CONFIG)
    adapter = CONFIG.adapter().build(jax.random.key(0), tiny.CONFIG, params)
    trainer = Trainer(params, tiny.CONFIG, adapter, CONFIG, data.train, None, None)
    memory = trainer.compile()
    batch = data.train[data.train.widest_step]
    assert batch.inputs.shape[1] == max(data.summary["widths"])
    trained = jax.tree.leaves(trainer._state._replace(key=None))
    held = sum(array.nbytes for array in (*jax.tree.leaves((params, batch)), *trained))
    assert memory.arguments == pytest.approx(held, abs=64)
    assert memory.temporaries > 0
    assert memory.total == memory.arguments + memory.temporaries
    with jax.log_compiles():
        list(trainer.train())
    assert "jit(step)" not in caplog.text


class Device:
    device_kind, platform = "card", "gpu"

    def memory_stats(self) -> dict[str, int]:
        return {"bytes_limit": 48 * 10**9}


@pytest.mark.usefixtures("unchecked")
def test_the_memory_of_a_device() -> None:
    assert device_memory(Device()) == 48 * 10**9
    assert GB < device_memory(jax.devices("cpu")[0]) < 1e5 * GB
    text = StepMemory(2 * 10**9, 10**9).describe(Device())
    assert "3.00 GB (arguments 2.00, temporaries 1.00); card has 48.0 GB" in text
