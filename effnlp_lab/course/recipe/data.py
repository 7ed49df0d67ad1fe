"""The recipe's first stages: a tokenizer trained on the training text, and that text as token shards."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from effnlp_lab.course.recipe.encode import encode_all
from effnlp_lab.course.recipe.folder import read_json, write_json
from effnlp_lab.course.recipe.settings import END_OF_TEXT, PAD, Recipe
from effnlp_lab.course.text import installed_packages, load_text
from effnlp_lab.device import Device
from effnlp_lab.streaming import Shards, ShardWriter, Windows
from effnlp_lab.tokenization import Tokenizer

LIBRARY = "standard library"


@dataclass(frozen=True)
class CourseData:
    """The shards, and how many bytes of each source they were made from."""

    tokenizer: Tokenizer
    library: Shards | None
    packages: Shards | None
    heldout: Shards
    sources: dict[str, int]  # bytes of text: the standard library and each package
    heldout_bytes: int
    heldout_names: list[str]

    @property
    def pad(self) -> int:
        return self.tokenizer.special_tokens[PAD]


class Mixture:
    """Windows of several shards as one view for the loader, some of them several times.

    Items are {"input_ids": [context + 1]}: a window and the first token after it.
    """

    def __init__(self, views: Sequence[Windows], repeats: Sequence[int]) -> None:
        self.views, self.repeats = list(views), list(repeats)
        lengths = [len(view) * times for view, times in zip(views, repeats, strict=True)]
        self.ends = np.cumsum(lengths)
        parts = (f"{view.fingerprint}*{times}" for view, times in zip(views, repeats, strict=True))
        self.fingerprint = "+".join(parts)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        return {"input_ids": self.batch([number])["input_ids"][0]}

    def batch(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """{"input_ids": int64 [len(numbers), context + 1]}"""
        of = np.searchsorted(self.ends, numbers, side="right")
        begin = np.concatenate([[0], self.ends])[of]
        rows = [self.views[view].batch([int(n - first) % len(self.views[view])])
                for view, n, first in zip(of, numbers, begin, strict=True)]  # fmt: skip
        return {"input_ids": torch.cat(rows)}


def make_tokenizer(recipe: Recipe, folder: Path, device: Device) -> Tokenizer:
    """Train the tokenizer, or read the one that is there."""
    path = folder / "tokenizer"
    if not (path / "tokenizer.json").exists():
        texts = [text for _, _, text in _training(recipe)]
        special = recipe.special_tokens
        tokenizer = Tokenizer.train(texts, recipe.vocabulary, special_tokens=special, device=device.torch)
        tokenizer.save(path)
        config = read_json(path / "tokenizer_config.json")
        write_json(path / "tokenizer_config.json", {**config, "pad_token": PAD})
    return Tokenizer.load(path)


def make_shards(recipe: Recipe, folder: Path) -> CourseData:
    """Encode training and held-out text on all cores into `folder`/shards, or open what is there.

    Every document ends in <|endoftext|>; held-out documents also begin with it.
    """
    tokenizer = Tokenizer.load(folder / "tokenizer")
    target, count = folder / "shards", tokenizer.vocab_size
    training = {"library": lambda: _of(recipe, library=True), "packages": lambda: _of(recipe, library=False)}
    sources: dict[str, int] = {}
    for name, documents in training.items():
        if not (target / f"{name}.json").exists():
            write_json(target / f"{name}.json", _sizes(documents()))
        sizes = read_json(target / f"{name}.json")
        sources.update(sizes)
        if sizes and not (target / name).exists():
            _write(target / name, [text for _, _, text in documents()], folder, count)
    heldout = list(load_text("course-heldout", limit_bytes=recipe.heldout_bytes))
    if not (target / "heldout").exists():
        _write(target / "heldout", [document.text for document in heldout], folder, count, begin=True)
    opened = {name: Shards(target / name, count) if (target / name).exists() else None
              for name in ("library", "packages", "heldout")}  # fmt: skip
    _training.cache_clear()
    return CourseData(
        tokenizer=tokenizer, sources=sources, heldout_names=[document.name for document in heldout],
        heldout_bytes=sum(len(document.text.encode()) for document in heldout), **opened,
    )  # fmt: skip


def mixture(recipe: Recipe, data: CourseData) -> Mixture:
    """What a model is trained on: an epoch has the packages once, and the standard library `library_repeats` times."""
    parts = [(shards, times) for shards, times in ((data.packages, 1), (data.library, recipe.library_repeats))
             if shards is not None and times > 0 and shards.tokens > recipe.context]  # fmt: skip
    return Mixture([Windows(shards, recipe.context, overlap=1) for shards, _ in parts], [times for _, times in parts])


def heldout_rows(data: CourseData, context: int, documents: Iterable[int] | None = None) -> tuple[Tensor, list[int]]:
    """Held-out documents in rows of `context` predictions: int64 [rows, context + 1], and the document of each row.

    No row holds two documents. A row begins with the token that the row before it predicted last, the first with
    <|endoftext|>; every other token is predicted once. What is left of the last row is <|pad|>.
    """
    rows, owners = [], []
    for number in range(data.heldout.documents) if documents is None else documents:
        ids = torch.from_numpy(data.heldout.document(number).astype(np.int64))
        for begin in range(0, max(len(ids) - 1, 0), context):
            row = ids[begin : begin + context + 1]
            rows.append(torch.nn.functional.pad(row, (0, context + 1 - len(row)), value=data.pad))
            owners.append(number)
    return torch.stack(rows), owners


@lru_cache(maxsize=1)
def _training(recipe: Recipe) -> list[tuple[str, str, str]]:
    """(source, name, text) of every training document."""
    packages = set(installed_packages())
    documents = load_text("course-train", limit_bytes=recipe.text_bytes)
    firsts = ((document.name.split("/")[0], document) for document in documents)
    return [(first if first in packages else LIBRARY, document.name, document.text) for first, document in firsts]


def _of(recipe: Recipe, library: bool) -> list[tuple[str, str, str]]:
    return [document for document in _training(recipe) if (document[0] == LIBRARY) == library]


def _sizes(documents: list[tuple[str, str, str]]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for source, _, text in documents:
        sizes[source] = sizes.get(source, 0) + len(text.encode())
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))


def _write(target: Path, texts: list[str], folder: Path, vocabulary: int, begin: bool = False) -> None:
    end = Tokenizer.load(folder / "tokenizer").special_tokens[END_OF_TEXT]
    with ShardWriter(target, vocabulary) as writer:
        for ids in encode_all(texts, folder / "tokenizer"):
            writer.add(np.concatenate([[end] if begin else [], ids, [end]]).astype(np.int64))
