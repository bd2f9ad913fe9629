"""A checkpoint is complete or absent; a full disk and a damaged file are named."""

import contextlib
import gc
import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rora_theory.errors import InputError
from rora_theory.lab.finetune.checkpoints import Checkpoints, Progress
from rora_theory.lab.finetune.step import State


def state(value=1.0, size=10):
    leaf = jnp.full((size,), value)
    return State(jnp.int32(3), {"a": leaf}, {"m": 2 * leaf}, jax.random.key(5))


@pytest.fixture
def checkpoints(tmp_path):
    opened = Checkpoints(tmp_path / "c")
    yield opened
    with contextlib.suppress(InputError):
        opened.close()


@pytest.fixture
def saved(checkpoints):
    """Return the checkpoints after the first one is written."""
    checkpoints.save(state(), Progress(1))
    checkpoints.wait()
    return checkpoints


def test_restoring_returns_everything_that_was_saved(checkpoints, tmp_path):
    checkpoints.save(state(0.1), Progress(3, 2, 0.7))
    checkpoints.wait()
    again = Checkpoints(tmp_path / "c")
    assert again.latest == 3
    restored, progress = again.restore(3, state())
    assert progress == Progress(3, 2, 0.7)
    assert jax.tree.structure(restored) == jax.tree.structure(state())
    assert jnp.array_equal(jax.random.key_data(restored.key), jax.random.key_data(state().key))
    jax.tree.map(np.testing.assert_array_equal, restored[:3], state(0.1)[:3])
    again.close()


def test_the_saved_state_may_be_donated_at_once(checkpoints):
    donated = state(7.0, 1_000_000)
    overwrite = jax.jit(lambda s: jax.tree.map(lambda a: a if a.ndim == 0 else a * 0, s), donate_argnums=0)
    checkpoints.save(donated, Progress(1))
    overwrite(donated)
    checkpoints.wait()
    restored, _ = checkpoints.restore(1, state(0.0, 1_000_000))
    assert float(restored.params["a"].min()) == 7.0


def test_keeps_the_latest_and_the_best(checkpoints):
    for step, best in ((1, None), (2, 2), (3, 2), (4, 4), (5, 4)):
        checkpoints.save(state(), Progress(step, best, None))
    checkpoints.wait()
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["4", "5"]


def test_an_unfinished_checkpoint_of_a_killed_process_is_ignored(tmp_path):
    first = Checkpoints(tmp_path)
    first.save(state(), Progress(1))
    first.close()
    # As orbax leaves it: the folder it was filling, not yet renamed.
    (tmp_path / "1").rename(tmp_path / "2.orbax-checkpoint-tmp")
    again = Checkpoints(tmp_path)
    again.save(state(), Progress(1))
    again.close()
    assert again.latest == 1
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


# A failed write may report on a separate thread, after the library's event loop is closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_is_named_and_the_earlier_checkpoint_stays(saved):
    refused = pytest.raises(InputError, match=r"/c: .*\(File too large\)")
    with file_size_limit(100_000), refused:  # saving runs in the background: either call may find the disk full
        saved.save(State(jnp.int32(2), {"a": noise()}, {}, jax.random.key(0)), Progress(2))
        saved.wait()
    again = Checkpoints(saved.folder)
    assert again.latest == 1
    again.restore(1, state())
    again.close()


def test_lack_of_memory_does_not_count_as_damage(saved, monkeypatch):
    def restore(*_, **__):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes.")

    monkeypatch.setattr(saved._manager, "restore", restore)
    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
        saved.restore(1, state())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_checkpoint_and_another_adapter_s_are_named(saved):
    with pytest.raises(InputError, match=r"/c/1: .*cannot be read"):
        saved.restore(1, state(size=11))
    for file in (saved.folder / "1" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:10])
    with pytest.raises(InputError, match=r"/c/1: .*cannot be read \(.*\)"):
        saved.restore(1, state())
    gc.collect()  # objects of the failed read would otherwise warn in a later test


def test_a_folder_that_cannot_be_created_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"/file/c: .*checkpoints"):
        Checkpoints(tmp_path / "file" / "c")


def noise():
    """Return a megabyte that does not compress."""
    return jax.random.normal(jax.random.key(0), (250_000,))


@contextlib.contextmanager
def file_size_limit(size):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
