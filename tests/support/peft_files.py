"""Read and change the two files of a saved adapter."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def change_config(folder: Path, **entries: Any) -> None:
    (folder / "adapter_config.json").write_text(json.dumps(read_config(folder) | entries))


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load((folder / "adapter_model.safetensors").read_bytes())


def change_tensors(folder: Path, change: Callable[[dict[str, np.ndarray]], Any], *, metadata: bool = True) -> None:
    """Change the tensors, and write them with PEFT's metadata or without any."""
    tensors = read_tensors(folder)
    change(tensors)
    data = safetensors.numpy.save(tensors, metadata={"format": "pt"} if metadata else None)
    (folder / "adapter_model.safetensors").write_bytes(data)
