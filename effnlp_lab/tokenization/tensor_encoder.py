"""Encoding a large text: each distinct word is encoded once, and the ids are put together by tensor operations."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from effnlp_lab.tokenization.tensor_words import Hasher, chunks, find_words, one_thread, spans, to_tensor

CACHE_WORDS = 1 << 20


def encode_corpus(
    texts: str | Iterable[str], ids_of_word: MutableMapping[bytes, tuple[int, ...]], device: torch.device | str = "cpu"
) -> Tensor:
    """The ids of all texts, int32 [tokens], one text after another, cut by GPT-2's pattern.

    `ids_of_word[word]` gives the ids of any word, encoding it if need be; it is emptied when it has grown large.
    """
    with one_thread(device):
        return _encode_corpus(texts, ids_of_word, device)


def _encode_corpus(texts, ids_of_word, device) -> Tensor:
    hasher = Hasher(torch.device(device))
    parts: list[Tensor] = []
    for data, begins in chunks(texts, hasher.chunk):
        if len(ids_of_word) > CACHE_WORDS:
            ids_of_word.clear()
        words = find_words(to_tensor(data, device), begins, hasher)
        starts, lengths = words.start[words.first].tolist(), words.length[words.first].tolist()
        ids = [ids_of_word[data[start : start + length]] for start, length in zip(starts, lengths, strict=True)]
        table = _tensor(chain.from_iterable(ids), np.int32, device)
        length = _tensor(map(len, ids), np.int64, device)
        begin = torch.cumsum(length, 0) - length
        parts.append(table[spans(begin[words.of], length[words.of])])
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int32, device=device)


def _tensor(values: Iterable[int], dtype: type, device: torch.device | str) -> Tensor:
    return torch.from_numpy(np.fromiter(values, dtype=dtype)).to(device)
