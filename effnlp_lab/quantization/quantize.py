"""A whole model, layer by layer: one layer on the device, progress shown, finished layers kept on the disk."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from effnlp_lab.errors import UsageError
from effnlp_lab.quantization.calibration import Activations
from effnlp_lab.quantization.checkpoint import LayerStore, check_target, save_quantized
from effnlp_lab.quantization.checks import check_bits, check_group_size, check_weight
from effnlp_lab.quantization.gptq import gptq_quantize, layer_error
from effnlp_lab.quantization.grid import QuantizedWeight, round_to_nearest
from effnlp_lab.quantization.hessian import Hessian, inverse_factor
from effnlp_lab.quantization.layers import decoder_layers, linear_names, on_device, replace_linears
from effnlp_lab.quantization.linear import QuantizedLinear

METHODS = ("gptq", "rtn")


@dataclass(frozen=True)
class Settings:
    """How a model is quantized; kept beside its weights."""

    method: str = "gptq"
    bits: int = 4
    group_size: int | None = 128
    symmetric: bool = False
    act_order: bool = False
    damping: float = 0.01
    scale_dtype: str = "float16"


@torch.no_grad()
def quantize_model(
    model: nn.Module, calibration: Tensor | None = None, *, method: str = "gptq", bits: int = 4,
    group_size: int | None = 128, symmetric: bool = False, act_order: bool = False, damping: float = 0.01,
    scale_dtype: torch.dtype = torch.float16, modules: Sequence[str] | None = None,
    device: torch.device | str | None = None, batch_size: int = 4, folder: str | Path | None = None,
    tokenizer: Any = None, progress: bool = True,
) -> nn.Module:  # fmt: skip
    """Quantize the linear modules of a model's decoder layers in place, and return the model.

    calibration: token ids [sequences, length] for "gptq"; "rtn" needs none. modules: which modules, by whole names or
    their last parts; None: all. device: where a layer is worked on, one at a time, while the model stays where it is;
    None: the model's own. folder: where the result is saved; finished layers are kept in `<folder>.partial` until then,
    and a call with the same arguments goes on from there. batch_size: sequences at a time. Errors of each module are in
    `model.quantization["modules"]`. Raises UsageError, before anything is changed, for what cannot be quantized.
    """
    settings = Settings(method, bits, group_size, symmetric, act_order, damping, str(scale_dtype)[6:])
    prefix, layers = decoder_layers(model)
    names = linear_names(model, modules)
    ids = check_everything(model, prefix, names, settings, calibration)
    store = None
    if folder is not None:
        check_target(Path(folder))
        store = LayerStore(Path(folder), asdict(settings) | {"run": _fingerprint(model, names, ids)})
    target = torch.device(device) if device is not None else model.get_input_embeddings().weight.device
    model.eval()
    flow = None if ids is None else Activations(model, layers, ids, batch_size, target)
    report: dict[str, dict[str, Any]] = {}
    bar = tqdm(layers, desc=f"{method}, {bits} bits", unit="layer", disable=not progress)
    for index, layer in enumerate(bar):
        with on_device(layer, target):
            found = store.load(index, target) if store else None
            if found is None:
                found = quantize_layer(layer, names[index], settings, flow, f"{prefix}.{index}")
                if store:
                    store.save(index, found)
            replace_linears(layer, {name: module for name, (module, _) in found.items()})
            if flow is not None and index + 1 < len(layers):
                flow.run(layer, keep=True)
        report |= {f"{prefix}.{index}.{name}": _entry(module, error) for name, (module, error) in found.items()}
    model.quantization = {"settings": asdict(settings), "modules": report}
    if store:
        save_quantized(model, folder, tokenizer=tokenizer)
        shutil.rmtree(store.path)
    return model


Quantized = dict[str, tuple[QuantizedLinear, float | None]]


def quantize_layer(
    layer: nn.Module, names: list[str], settings: Settings, flow: Activations | None, called: str
) -> Quantized:
    """Quantized modules of one layer, each with its error relative to round to nearest (None without calibration)."""
    todo = [name for name in names if isinstance(layer.get_submodule(name), nn.Linear)]
    found: Quantized = {
        name: (layer.get_submodule(name), None) for name in names if name not in todo  # quantized before
    }  # fmt: skip
    if flow is None:
        return found | {name: (_rtn(layer.get_submodule(name), settings), None) for name in todo}
    for several, hessian in flow.hessians(layer, todo) if todo else ():
        first = f"{called}.{several[0]}"
        shared = None if settings.act_order else inverse_factor(hessian.matrix, settings.damping, first)
        for name in several:
            found[name] = _gptq(layer.get_submodule(name), hessian, shared, settings, f"{called}.{name}")
    return {name: found[name] for name in names}


def _codes(weight: Tensor, settings: Settings) -> QuantizedWeight:
    return round_to_nearest(
        weight, settings.bits, settings.group_size, symmetric=settings.symmetric,
        scale_dtype=getattr(torch, settings.scale_dtype),
    )  # fmt: skip


def _rtn(linear: nn.Linear, settings: Settings) -> QuantizedLinear:
    return QuantizedLinear.of(_codes(linear.weight, settings), linear.bias)


def _gptq(
    linear: nn.Linear, hessian: Hessian, factor: Tensor | None, settings: Settings, name: str
) -> tuple[QuantizedLinear, float]:
    matrix = hessian.matrix
    quantized = gptq_quantize(
        linear.weight, matrix, settings.bits, settings.group_size, symmetric=settings.symmetric,
        act_order=settings.act_order, damping=settings.damping, scale_dtype=getattr(torch, settings.scale_dtype),
        factor=factor, name=name,
    )  # fmt: skip
    plain = _codes(linear.weight, settings)
    ours, worst = (layer_error(linear.weight, codes.dequantize(), matrix) for codes in (quantized, plain))
    return QuantizedLinear.of(quantized, linear.bias), ours / worst if worst else 1.0


def check_everything(
    model: nn.Module, prefix: str, names: list[list[str]], settings: Settings, calibration: Tensor | None
) -> Tensor | None:
    """Refuse with a sentence, before any work, what would fail in the middle. Returns the calibration ids."""
    if settings.method not in METHODS:
        raise UsageError(f"There is no method {settings.method!r}: choose one of {', '.join(METHODS)}.")
    check_bits(settings.bits)
    for index, inner in enumerate(names):
        for name in inner:
            module, whole = model.get_submodule(f"{prefix}.{index}.{name}"), f"{prefix}.{index}.{name}"
            check_group_size(settings.group_size, module.in_features, whole)
            if isinstance(module, nn.Linear):
                check_weight(module.weight, whole)
    if settings.method == "rtn":
        return None
    if calibration is None:
        raise UsageError("GPTQ needs calibration text: give token ids [sequences, length] (calibration_sequences).")
    ids = torch.as_tensor(calibration)
    if ids.ndim != 2 or not ids.numel() or ids.is_floating_point():
        raise UsageError(f"calibration has shape {list(ids.shape)}: expected token ids [sequences, length].")
    size = model.get_input_embeddings().weight.shape[0]
    if int(ids.min()) < 0 or int(ids.max()) >= size:
        raise UsageError(f"calibration holds tokens beyond the model's {size}: use the tokenizer of this model.")
    return ids.long()


def _entry(module: QuantizedLinear, error: float | None) -> dict[str, Any]:
    return {"bits": module.bits, "group_size": module.group_size, "error_over_rtn": error}


def _fingerprint(model: nn.Module, names: list[list[str]], ids: Tensor | None) -> str:
    """Of what must be the same to go on: the modules, the calibration text, and the weights that stay as they are."""
    digest = hashlib.sha256(repr(names).encode())
    if ids is not None:
        digest.update(ids.cpu().numpy().tobytes())
    for name, value in model.state_dict().items():
        if "norm" in name or "embed" in name:
            digest.update(name.encode() + value.flatten()[:4096].float().cpu().numpy().tobytes())
    return digest.hexdigest()
