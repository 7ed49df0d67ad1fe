"""What crosses between the process that runs an answer and the one that judges it: tensors and strict JSON.

`pack` turns a value (tensors, numbers, strings, bytes, lists, tuples, maps) into bytes; `unpack` turns the bytes back.
Nothing is executed on arrival: there is no pickle here. A tensor travels as the contiguous bytes of the part of its
storage that it spans, and its layout (shape, stride, offset, alias) is rebuilt with `as_strided`, because safetensors
alone refuses strided and aliased tensors. Whatever has no form on the wire travels as the name of its type.
"""

from __future__ import annotations

import json
import math
import struct
from typing import Any

import torch
from safetensors.torch import load as _load_tensors
from safetensors.torch import save as _save_tensors

from effnlp_lab.exercises.compare import Foreign

MAX_BYTES = 1 << 30
MAX_DEPTH = 64
_HEADER = struct.Struct("<Q")


class WireError(ValueError):
    """A message that is malformed or over the limits of the wire."""


def pack(value: Any, limit: int = MAX_BYTES) -> bytes:
    """Encode `value`. Raises WireError when it is nested too deeply or larger than `limit` bytes."""
    packer = _Packer()
    tree = packer.encode(value, 0)
    head = json.dumps({"json": tree, "layout": packer.layout}, allow_nan=False, separators=(",", ":")).encode()
    size = len(head) + sum(t.numel() * t.element_size() for t in packer.storages.values())
    if size > limit:
        raise WireError(f"the value takes {size:,} bytes; at most {limit:,} may cross: return less")
    return _HEADER.pack(len(head)) + head + _save_tensors(packer.storages)


def unpack(data: bytes, device: str | torch.device | None = None, limit: int = MAX_BYTES) -> Any:
    """Decode what `pack` wrote; tensors land on `device` (None: the CPU). Raises WireError on anything else."""
    if len(data) > limit:
        raise WireError(f"a message of {len(data):,} bytes; at most {limit:,} may cross")
    if len(data) < _HEADER.size:
        raise WireError("a message too short to have a header")
    (length,) = _HEADER.unpack_from(data)
    body = _HEADER.size + length
    if length > len(data) - _HEADER.size:
        raise WireError("a header longer than its message")
    try:
        head = json.loads(data[_HEADER.size : body], parse_constant=_refuse_constant)
        storages = _load_tensors(data[body:])
        layout, tree = head["layout"], head["json"]
        if not isinstance(layout, dict) or set(head) != {"json", "layout"}:
            raise WireError("a header with other keys than json and layout")
        tensors = _rebuild(layout, storages, device, limit)
        return _decode(tree, tensors, 0)
    except WireError:
        raise
    except Exception as error:  # bytes from outside: whatever they break, it is the message that is wrong
        raise WireError(f"a malformed message ({type(error).__name__}: {str(error)[:200]})") from error


def _refuse_constant(name: str):
    raise WireError(f"{name} is not strict JSON")


class _Packer:
    """Walks a value once, collecting each storage once however many tensors look into it."""

    def __init__(self) -> None:
        self.storages: dict[str, torch.Tensor] = {}
        self.layout: dict[str, list] = {}
        self._owners: dict[tuple, tuple[str, int]] = {}
        self._held: list[torch.Tensor] = []  # keeps what was packed alive: a freed storage's address is used again

    def encode(self, value: Any, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise WireError(f"the value is nested more than {MAX_DEPTH} deep")
        kind = type(value)
        if value is None or kind in (bool, int, str):
            return value
        if kind is float:
            return value if math.isfinite(value) else {"$float": repr(value)}
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if kind in (bytes, bytearray):
            return {
                "$bytes": self._tensor(
                    torch.frombuffer(bytearray(value), dtype=torch.uint8)
                    if value
                    else torch.empty(0, dtype=torch.uint8)
                )["$tensor"]
            }
        if kind is list:
            return [self.encode(v, depth + 1) for v in value]
        if kind is tuple:
            return {"$tuple": [self.encode(v, depth + 1) for v in value]}
        if isinstance(value, dict):
            return {"$map": [[self.encode(k, depth + 1), self.encode(v, depth + 1)] for k, v in value.items()]}
        if kind in (set, frozenset):
            return {"$set": sorted((self.encode(v, depth + 1) for v in value), key=json.dumps)}
        if kind is torch.dtype:
            return {"$dtype": str(value).removeprefix("torch.")}
        if isinstance(value, Foreign):
            return {"$foreign": [value.type_name, value.text]}
        return {"$foreign": [f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins."), _short(value)]}

    def _tensor(self, tensor: torch.Tensor) -> Any:
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized or tensor.dtype.is_complex:
            return {"$foreign": [f"torch.Tensor ({tensor.layout}, {tensor.dtype}, {tensor.device})", ""]}
        name = f"t{len(self.layout)}"
        device = tensor.device.type
        plain = tensor.detach().resolve_neg()
        if type(plain) is not torch.Tensor:  # subclasses (Parameter, functional wrappers) travel as plain tensors
            plain = plain.as_subclass(torch.Tensor)
        self._held.append(plain)
        storage = plain.untyped_storage()
        first = plain.storage_offset()
        span = 1 + sum((n - 1) * s for n, s in zip(plain.shape, plain.stride(), strict=True)) if plain.numel() else 0
        key = (storage.data_ptr(), storage.nbytes(), plain.dtype, device)
        owner = self._owners.get(key) if span else None
        if owner is None and span > 2 * plain.numel() + 1024:  # a thin view of a large storage: send what it shows
            plain, first = plain.contiguous(), 0
            span = plain.numel()
        if owner is None:
            whole = plain.as_strided((span,), (1,), first).cpu().clone()
            self.storages[name] = whole
            self.layout[name] = [list(plain.shape), list(plain.stride()), 0, device, None]
            if span:
                self._owners[key] = (name, first)
        else:
            base, base_first = owner
            inside = first >= base_first and first - base_first + span <= self.storages[base].numel()
            if inside:
                self.layout[name] = [list(plain.shape), list(plain.stride()), first - base_first, device, base]
            else:
                whole = plain.as_strided((span,), (1,), first).cpu().clone()
                self.storages[name] = whole
                self.layout[name] = [list(plain.shape), list(plain.stride()), 0, device, None]
        return {"$tensor": name}


def _short(value: Any) -> str:
    try:
        return repr(value)[:80]
    except Exception:  # a student's __repr__ may raise; the report must not
        return ""


def _rebuild(layout: dict, storages: dict[str, torch.Tensor], device, limit: int) -> dict[str, torch.Tensor]:
    """Lay views over the storages, refusing any that would look outside its storage.

    A stride of 0 lets a few bytes show as many as one likes: what all tensors show is limited too.
    """
    shown = 0
    placed = {name: s.to(device) if device is not None else s for name, s in storages.items()}
    tensors = {}
    for name, (shape, stride, offset, _, alias) in layout.items():
        base = placed[alias if alias is not None else name]
        numbers = [*shape, *stride, offset]
        if len(shape) != len(stride) or any(type(n) is not int or n < 0 for n in numbers):
            raise WireError(f"tensor {name} has an impossible layout")
        empty = any(n == 0 for n in shape)
        span = 0 if empty else offset + 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
        if span > base.numel():
            raise WireError(f"tensor {name} looks outside its storage")
        shown += math.prod(shape) * base.element_size()
        if shown > limit:
            raise WireError(f"tensors that show more than {limit:,} bytes")
        tensors[name] = base.as_strided(shape, stride, offset)
    return tensors


def _decode(node: Any, tensors: dict[str, torch.Tensor], depth: int) -> Any:
    if depth > 3 * MAX_DEPTH:
        raise WireError("a message nested too deeply")
    if isinstance(node, list):
        return [_decode(v, tensors, depth + 1) for v in node]
    if not isinstance(node, dict):
        return node
    if len(node) != 1:
        raise WireError("a map must travel as {'$map': pairs}")
    ((tag, body),) = node.items()
    if tag == "$tensor":
        return tensors[body]
    if tag == "$bytes":
        return tensors[body].cpu().numpy().tobytes()
    if tag == "$float":
        return float(body)
    if tag == "$tuple":
        return tuple(_decode(v, tensors, depth + 1) for v in body)
    if tag == "$set":
        return {_decode(v, tensors, depth + 1) for v in body}
    if tag == "$map":
        return {_decode(k, tensors, depth + 1): _decode(v, tensors, depth + 1) for k, v in body}
    if tag == "$dtype":
        return (
            getattr(torch, body)
            if isinstance(getattr(torch, body, None), torch.dtype)
            else Foreign("torch.dtype", body)
        )
    if tag == "$foreign":
        return Foreign(str(body[0])[:200] or "value", str(body[1])[:200])
    raise WireError(f"an unknown tag {tag!r}")
