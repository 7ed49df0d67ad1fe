"""Encoding the recipe's text on all cores. Imports no torch, which every process would have to load."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from effnlp_lab.tokenization import Tokenizer

GROUP_CHARACTERS = 1 << 20  # of text that a process encodes at a time


def encode_all(texts: Sequence[str], tokenizer: Path, processes: int | None = None) -> Iterator[np.ndarray]:
    """The ids of each text, uint16 [tokens], in order, encoded by as many processes as there are cores and work."""
    from tqdm.auto import tqdm

    groups = list(_groups(texts))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = min(cores if processes is None else processes, len(groups))
    if processes <= 1:
        _open(tokenizer)
        yield from (ids for group in groups for ids in _encode(group))
        return
    with _no_gpu_in_children(), ProcessPoolExecutor(
        processes, mp_context=get_context("spawn"), initializer=_open, initargs=(tokenizer,)
    ) as pool:  # fmt: skip
        try:
            for encoded in tqdm(pool.map(_encode, groups), "tokenizing", len(groups), unit="MB"):
                yield from encoded
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


@contextmanager
def _no_gpu_in_children() -> Iterator[None]:
    """Processes started inside import the package without asking for a GPU, which would cost each of them seconds."""
    before = os.environ.get("EFFNLP_DEVICE")
    os.environ["EFFNLP_DEVICE"] = "cpu"
    try:
        yield
    finally:
        if before is None:
            del os.environ["EFFNLP_DEVICE"]
        else:
            os.environ["EFFNLP_DEVICE"] = before


_tokenizer: Tokenizer | None = None


def _open(path: Path) -> None:
    global _tokenizer
    _tokenizer = Tokenizer.load(path)


def _encode(texts: list[str]) -> list[np.ndarray]:
    return [np.array(_tokenizer.encode(text, special=False), dtype=np.uint16) for text in texts]


def _groups(texts: Iterable[str]) -> Iterator[list[str]]:
    group: list[str] = []
    size = 0
    for text in texts:
        group.append(text)
        size += len(text)
        if size >= GROUP_CHARACTERS:
            yield group
            group, size = [], 0
    if group:
        yield group
