"""A quantized model on the disk: whole or absent, and refused with a sentence when it was cut.

The folder holds config.json, quantization.json (settings, and bits and group size of each module), model.safetensors
(the codes in the kernels' order, and all other weights), and the tokenizer where one was given.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from effnlp_lab.errors import UsageError
from effnlp_lab.quantization.layers import replace_linears
from effnlp_lab.quantization.linear import QuantizedLinear

WEIGHTS, INDEX = "model.safetensors", "quantization.json"


def save_quantized(model: nn.Module, folder: str | Path, *, tokenizer: Any = None) -> Path:
    """Write a quantized model to a new folder, which appears when it is complete. Raises UsageError where one is."""
    folder = Path(folder)
    check_target(folder)
    modules = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    if not modules:
        raise UsageError("The model has no quantized layer: quantize_model it first, or use save_pretrained.")
    part = folder.with_name(folder.name + ".writing")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        model.config.save_pretrained(part)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(part)
        if tokenizer is not None:
            tokenizer.save_pretrained(part)
        write_tensors(part / WEIGHTS, _state(model))
        content = {"modules": {name: _shape(module) for name, module in modules.items()}}
        content |= getattr(model, "quantization", {"settings": {}}) | content
        (part / INDEX).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(part, folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return folder


def load_quantized(folder: str | Path, *, device: torch.device | str = "cpu") -> nn.Module:
    """The model that `save_quantized` wrote, ready to generate. Raises UsageError where the folder cannot be used."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    folder = Path(folder)
    for name in ("config.json", INDEX, WEIGHTS):
        if not (folder / name).is_file():
            raise UsageError(f"{folder} is no quantized model (no {name}): give a folder that save_quantized wrote.")
    try:
        content = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        shapes = dict(content["modules"])
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{folder / INDEX} is damaged: save the model there again.") from None
    weights = read_tensors(folder / WEIGHTS)
    config = AutoConfig.from_pretrained(folder)
    with _no_memory_for_parameters():
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    replace_linears(model, {name: _empty(**shape) for name, shape in shapes.items()})
    _fill(model, weights, folder)
    model.quantization = content
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.to(device).eval()


def check_target(folder: Path) -> None:
    """Refuse a folder that is there already: nothing is overwritten."""
    if folder.exists():
        raise UsageError(f"{folder} is there already: choose another folder, or remove it first.")


class LayerStore:
    """The finished layers of a run in `<folder>.partial`, a file each, for one set of settings."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.path = folder.with_name(folder.name + ".partial")
        index = self.path / "settings.json"
        if index.is_file():
            found = json.loads(index.read_text(encoding="utf-8"))
            other = [key for key in settings if found.get(key) != settings[key]]
            if other:
                what = "model, modules or calibration text" if other == ["run"] else ", ".join(other)
                raise UsageError(
                    f"{self.path} was begun with another {what}: go on with the same, or remove it to start anew."
                )
        else:
            self.path.mkdir(parents=True, exist_ok=True)
            part = index.with_suffix(".part")
            part.write_text(json.dumps(settings), encoding="utf-8")
            os.replace(part, index)

    def save(self, index: int, layer: dict[str, tuple[QuantizedLinear, float | None]]) -> None:
        states = {name: module.state_dict() for name, (module, _) in layer.items()}
        tensors = {f"{name}/{key}": value for name, state in states.items() for key, value in state.items()}
        notes = {name: json.dumps([_shape(module), error]) for name, (module, error) in layer.items()}
        write_tensors(self._file(index), tensors, notes)

    def load(self, index: int, device: torch.device) -> dict[str, tuple[QuantizedLinear, float | None]] | None:
        """A finished layer, or None. Raises UsageError for a damaged file."""
        path = self._file(index)
        if not path.is_file():
            return None
        tensors = read_tensors(path)
        with safe_open(path, "pt") as file:
            notes = {name: json.loads(text) for name, text in (file.metadata() or {}).items()}
        found = {}
        for name, (shape, error) in notes.items():
            module = _empty(**shape)
            own = {key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")}
            module.load_state_dict(own, assign=True)
            found[name] = (module.to(device), error)
        return found

    def _file(self, index: int) -> Path:
        return self.path / f"layer-{index:05d}.safetensors"


def write_tensors(path: Path, tensors: dict[str, Tensor], notes: dict[str, str] | None = None) -> None:
    """A safetensors file that is whole or absent."""
    part = path.with_name(path.name + ".part")
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, part, metadata=notes)
    with part.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(part, path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Raises UsageError for a file that was cut or is no safetensors file."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    except Exception as error:  # safetensors raises its own kind, and OSError
        raise UsageError(
            f"{path} is damaged or cut short ({path.stat().st_size:,} bytes; {str(error).splitlines()[0]}): take it "
            "from its source again."
        ) from None


def _state(model: nn.Module) -> dict[str, Tensor]:
    """The model's tensors, those that are tied once."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    return {name: value for name, value in model.state_dict().items() if name not in tied}


def _shape(module: QuantizedLinear) -> dict[str, Any]:
    return {
        "in_features": module.in_features, "out_features": module.out_features, "bits": module.bits,
        "group_size": module.group_size, "bias": module.bias is not None,
    }  # fmt: skip


def _empty(in_features: int, out_features: int, bits: int, group_size: int, bias: bool, **_: Any) -> QuantizedLinear:
    return QuantizedLinear(in_features, out_features, bits, group_size, bias=bias, device="meta")


def _fill(model: nn.Module, weights: dict[str, Tensor], folder: Path) -> None:
    """Give the model its tensors, and refuse files that do not belong together."""
    try:
        missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    except RuntimeError as error:
        what = str(error).splitlines()[-1].strip()
        raise UsageError(f"{folder / WEIGHTS} does not fit config.json: {what}") from None
    model.tie_weights()
    empty = [name for name, value in model.state_dict().items() if value.is_meta]
    if unexpected or empty:
        raise UsageError(
            f"{folder / WEIGHTS} does not fit config.json ({len(unexpected) + len(empty)} tensors, such as "
            f"{[*unexpected, *empty][0]}): both must come from one save_quantized."
        )


@contextmanager
def _no_memory_for_parameters() -> Iterator[None]:
    """Modules made inside have parameters without memory; buffers, which no file holds, are real."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register
