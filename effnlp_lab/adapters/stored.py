"""The two files of an adapter: whole or absent on disk, checked when they are read.

Each is written beside its name and then takes it in one step, the configuration last. The weights carry a digest of the
configuration that they were saved with, so that one save killed between the two is seen.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from effnlp_lab.adapters.adapter import check_finite
from effnlp_lab.errors import UsageError

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def write_files(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write both files. After an error the folder is what it was."""
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    parts = [folder / (name + ".part") for name in (WEIGHTS, CONFIG)]
    try:
        save_file(tensors, parts[0], metadata={"format": "pt", "config_sha256": _digest(text)})
        parts[1].write_text(text, encoding="utf-8")
        for part in parts:
            _flush(part)
        for part in parts:
            os.replace(part, part.with_suffix(""))
    except BaseException:
        for part in parts:
            part.unlink(missing_ok=True)
        if made and not any(folder.iterdir()):
            folder.rmdir()
        raise


def read_files(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Both files, on the CPU. Raises UsageError for one that is missing, cut short, or holds NaN or infinity."""
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise UsageError(
                f"{folder} holds no {name}: give the folder that save_adapter or PEFT's save_pretrained made."
            )
    text = (folder / CONFIG).read_text(encoding="utf-8", errors="replace")
    try:
        config = json.loads(text)
        if not isinstance(config, dict):
            raise ValueError("not an object")
    except ValueError:
        raise UsageError(f"{folder / CONFIG} is damaged or cut short: save the adapter again.") from None
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            digest = (file.metadata() or {}).get("config_sha256")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, ValueError) as error:
        raise UsageError(f"{folder / WEIGHTS} is damaged or cut short ({error}): save the adapter again.") from None
    if digest not in (None, _digest(text)):
        raise UsageError(f"{folder} holds weights and a configuration of two different saves: save the adapter again.")
    check_finite(tensors, str(folder / WEIGHTS))
    return config, tensors


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
