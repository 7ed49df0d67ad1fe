"""Save and load the tokenizer as Hugging Face's `tokenizer.json`, which `transformers` and `tokenizers` open."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effnlp_lab.errors import UsageError
from effnlp_lab.tokenization import alphabet
from effnlp_lab.tokenization.pretokenize import GPT2, pattern_source

if TYPE_CHECKING:
    from effnlp_lab.tokenization.tokenizer import Tokenizer

FILE = "tokenizer.json"
OTHER_KINDS = (
    "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges", "dropout",
)


def save(tokenizer: Tokenizer, path: str | Path) -> Path:
    """Write `path` (a .json file), or tokenizer.json and tokenizer_config.json into the folder `path`."""
    path = Path(path)
    if path.suffix == ".json":
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, to_json(tokenizer))
        return path
    path.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if "<|endoftext|>" in tokenizer.special_tokens:
        config["bos_token"] = config["eos_token"] = "<|endoftext|>"
    _write(path / "tokenizer_config.json", config)
    _write(path / FILE, to_json(tokenizer))
    return path / FILE


def load(path: str | Path) -> Tokenizer:
    """Read a tokenizer.json, or the folder that holds one. Raises UsageError when it is not byte-level BPE."""
    path = Path(path)
    path = path / FILE if path.is_dir() else path
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"There is no {path.name} in {path.parent}: give the file, or its folder.") from None
    except ValueError as error:
        raise UsageError(f"{path.name} is not JSON ({error}): save the tokenizer again.") from None
    return from_json(content, path.name)


def to_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of a tokenizer.json."""
    letters = [alphabet.letters_of(token) for token in tokenizer.tokens]
    for name, number in tokenizer.special_tokens.items():
        letters[number] = name
    added = [
        {"id": number, "content": name, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
        for name, number in sorted(tokenizer.special_tokens.items(), key=lambda item: item[1])
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    pattern = pattern_source(tokenizer.pattern)
    if pattern == GPT2:
        cut: dict[str, Any] = byte_level
    else:
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        cut = {"type": "Sequence", "pretokenizers": [split, {**byte_level, "use_regex": False}]}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": cut,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: number for number, token in enumerate(letters)},
            "merges": [[letters[left], letters[right]] for left, right in tokenizer.merges],
        },
    }


def from_json(content: Any, name: str = FILE) -> Tokenizer:
    """The tokenizer of a tokenizer.json's content. Raises UsageError when it does something that ours does not do."""
    from effnlp_lab.tokenization.tokenizer import Tokenizer

    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or not {"merges", "vocab"} <= model.keys():
        raise _unlike(name, "it holds no BPE model with a vocabulary and merges")
    for key in OTHER_KINDS:
        if model.get(key):
            raise _unlike(name, f"its model sets {key}")
    if content.get("normalizer"):
        raise _unlike(name, "it changes the text before cutting it (a normalizer)")
    pattern = _pattern(content.get("pre_tokenizer"), name)
    try:
        special = {token["content"]: int(token["id"]) for token in content.get("added_tokens") or []}
        vocabulary = {**model["vocab"], **special}
        tokens: list[bytes | None] = [None] * (max(vocabulary.values()) + 1)
        for letters, number in vocabulary.items():
            tokens[number] = letters.encode() if letters in special else alphabet.bytes_of(letters)
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        merges = [(vocabulary[left], vocabulary[right]) for left, right in pairs]
    except UsageError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise _unlike(name, f"its vocabulary, merges or added tokens cannot be read ({error})") from None
    if None in tokens:
        raise _unlike(name, f"no token has the id {tokens.index(None)}")
    return Tokenizer(tokens, merges, special, pattern)


def _pattern(cut: Any, name: str) -> str:
    steps = cut.get("pretokenizers", [cut]) if isinstance(cut, dict) else []
    *splits, last = steps or [None]
    if not isinstance(last, dict) or last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        raise _unlike(name, "it does not cut the text as ByteLevel without a prefix space")
    if not splits and last.get("use_regex", True):
        return "gpt2"
    if len(splits) != 1 or splits[0].get("type") != "Split" or last.get("use_regex", True):
        raise _unlike(name, "it cuts the text in more than one step")
    source = (splits[0].get("pattern") or {}).get("Regex")
    if source is None or splits[0].get("behavior") != "Isolated" or splits[0].get("invert"):
        raise _unlike(name, "it cuts the text in a way that drops or joins words")
    return source


def _unlike(name: str, reason: str) -> UsageError:
    return UsageError(
        f"{name} is not a byte-level BPE tokenizer of this kit's kind: {reason}; "
        "open it with transformers.AutoTokenizer instead."
    )


def _write(path: Path, content: dict[str, Any]) -> None:
    """Write beside and rename, so that an interruption leaves the old file."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)
