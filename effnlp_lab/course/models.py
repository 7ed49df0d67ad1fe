"""The models that every lab shares: small, trained by the kit on Python source, shipped with it.

- `course-base`: about 7 million parameters, Llama architecture;
- `course-draft`: about 1 million, the same tokenizer, distilled from `course-base` to guess its next token.

`effnlp train-course-models` makes both. Each is a folder that plain `transformers` opens; `load_model` adds the device
and the dtype, opens hub models with the same call, and refuses files that are missing or cut short with a sentence.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effnlp_lab.device import Device, resolve
from effnlp_lab.errors import UsageError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

COURSE_MODELS = ("course-base", "course-draft")
WEIGHTS = Path(__file__).with_name("weights")
WEIGHTS_FILE = "model.safetensors"
MAKE_THEM = "take a complete checkout or wheel, or make them with `effnlp train-course-models` and load its folder"


def load_model(
    name: str | Path = "course-base",
    *,
    device: str | torch.device | Device = "auto",
    dtype: torch.dtype | str | None = None,
    **options: Any,
) -> PreTrainedModel:
    """A causal language model on `device`, ready to evaluate: a course model, a folder, or one of the hub.

    name: "course-base", "course-draft", a folder that `transformers` saved, or a hub name such as
    "HuggingFaceTB/SmolLM2-135M", which needs a network once. device: "auto", "cpu", "cuda", a `torch.device` or what
    `effnlp_lab.start` returned. dtype: None for the one in which the device computes at full speed (float32 on a CPU).
    Further options go to `from_pretrained` (`attn_implementation=...`). Raises UsageError for an unknown name, and for
    weights that are missing, cut short or do not fit their configuration; DeviceError for a device that is not there.
    """
    target, usual = _device(device)
    options = {"dtype": _dtype(dtype) or usual, **options}
    folder = find_model(name)
    model = _from_hub(str(name), options) if folder is None else _from_folder(folder, options)
    return model.to(target).eval()


def load_tokenizer(name: str | Path = "course-base") -> PreTrainedTokenizerBase:
    """The tokenizer of a model, as `transformers` opens it; the course models share one.

    `effnlp_lab.tokenization.Tokenizer.load(find_model(name))` opens the same file with the kit's own. Raises UsageError
    as `load_model` does.
    """
    from transformers import AutoTokenizer

    folder = find_model(name)
    if folder is None:
        return _asked_of_the_hub(str(name), "tokenizer", AutoTokenizer.from_pretrained)
    if not (folder / "tokenizer.json").is_file() and not (folder / "tokenizer_config.json").is_file():
        raise UsageError(f"The tokenizer of {_called(folder)} is missing (no tokenizer.json): {_remedy(folder)}.")
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UsageError(f"The tokenizer of {_called(folder)} cannot be read ({_reason(error)}).") from error


def find_model(name: str | Path) -> Path | None:
    """The folder of a course model or of a local one; None for what looks like a hub name. Loads nothing.

    Raises UsageError, with the nearest names, for what is none of the three.
    """
    word = str(name).strip()
    if word in COURSE_MODELS:
        return WEIGHTS / word
    path = Path(name).expanduser()
    if word and path.is_dir():
        return path
    if path.is_file():
        raise UsageError(f"{path.name} is a file: give the folder that holds config.json and {WEIGHTS_FILE}.")
    if isinstance(name, Path) or word.startswith((".", "/", "~")) or word.count("/") > 1:
        raise UsageError(f"There is no folder {word}: check the path, or give one of {', '.join(COURSE_MODELS)}.")
    if "/" in word:
        return None
    near = difflib.get_close_matches(word.lower(), COURSE_MODELS, n=2, cutoff=0.75)
    near = near or [name for name in COURSE_MODELS if name.endswith(f"-{word.lower()}")]
    if near or not word or word.startswith("course"):
        meant = f"did you mean {' or '.join(near)}?" if near else f"choose one of {', '.join(COURSE_MODELS)}."
        raise UsageError(f"There is no model {word!r}: {meant}")
    return None


def check_weights(folder: Path) -> None:
    """Raise UsageError when the folder's configuration or weights are missing or cut short. Reads headers only."""
    for file in ("config.json", WEIGHTS_FILE):
        if not (folder / file).is_file() and not (file == WEIGHTS_FILE and _weights_in_parts(folder)):
            raise UsageError(f"The weights of {_called(folder)} are missing (no {file}): {_remedy(folder)}.")
    for path in sorted(folder.glob("*.safetensors")):
        expected, found = _promised_bytes(path), path.stat().st_size
        if expected != found:
            promised = "has no readable header" if expected is None else f"should have {expected:,} bytes"
            raise UsageError(
                f"{path.name} of {_called(folder)} is damaged or cut short: it has {found:,} bytes and {promised}; "
                f"{_remedy(folder)}."
            )


def _from_folder(folder: Path, options: dict[str, Any]) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    check_weights(folder)
    try:
        with _no_progress_bar():
            model, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    except (OSError, KeyError, RuntimeError) as error:
        raise UsageError(f"{_called(folder)} cannot be loaded ({_reason(error)}): {_remedy(folder)}.") from error
    wrong = [*found["missing_keys"], *found["unexpected_keys"], *(key[0] for key in found["mismatched_keys"])]
    if wrong:  # transformers would start these from random numbers
        raise UsageError(
            f"The weights of {_called(folder)} do not fit its config.json ({len(wrong)} tensors, such as "
            f"{sorted(wrong)[0]}): both files must come from one training run; {_remedy(folder)}."
        )
    return model


def _from_hub(name: str, options: dict[str, Any]) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    return _asked_of_the_hub(name, "model", AutoModelForCausalLM.from_pretrained, **options)


def _asked_of_the_hub(name: str, kind: str, load, **options: Any):
    try:
        return load(name, **options)
    except Exception as error:  # the hub's libraries raise many kinds, from HTTP errors to OSError
        raise UsageError(
            f"The {kind} {name!r} could not be loaded from the hub ({_reason(error)}): check its name and the network, "
            f"or use one of {', '.join(COURSE_MODELS)}, which need none."
        ) from error


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """A small model loads in a moment: no bar of `transformers` on stderr."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _device(device: str | torch.device | Device) -> tuple[torch.device, torch.dtype]:
    """The device, and the dtype that is usual there."""
    import torch

    if isinstance(device, torch.device):
        return device, torch.float32 if device.type == "cpu" else resolve(device.type).dtype
    found = device if isinstance(device, Device) else resolve(device)
    return found.torch, found.dtype


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    import torch

    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    short = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
    found = getattr(torch, short.get(dtype, dtype), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise UsageError(f"Unknown dtype {dtype!r}: expected 'float32', 'bfloat16', 'float16' or a torch.dtype.")
    return found


def _promised_bytes(path: Path) -> int | None:
    """The size that a safetensors file's header gives it; None when there is no header to read."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(length)) if length < path.stat().st_size else None
            ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
        except (ValueError, AttributeError, KeyError, TypeError, IndexError):
            return None
    return 8 + length + max(ends, default=0)


def _weights_in_parts(folder: Path) -> bool:
    """Whether the folder holds weights as other models keep them: several safetensors files, or PyTorch's own."""
    return any((folder / name).is_file() for name in (f"{WEIGHTS_FILE}.index.json", "pytorch_model.bin"))


def _called(folder: Path) -> str:
    return folder.name if folder.parent == WEIGHTS else f"the folder {folder.name}"


def _remedy(folder: Path) -> str:
    return MAKE_THEM if folder.parent == WEIGHTS else "save the model there again"


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
