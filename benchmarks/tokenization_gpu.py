"""Training on a GPU beside Hugging Face's `tokenizers` on all CPU cores, on 100 MB and on 1 GB; merges verified equal.

100 MB are the course's training text. For 1 GB there is not enough Python on a machine: the text is repeated, each
further copy with its small letters exchanged (vowels among vowels, consonants among consonants), so that most of its
words are new and lengths and frequencies stay those of real text.
"""

from __future__ import annotations

import importlib.util
import os
import random
from collections.abc import Iterator
from pathlib import Path

from effnlp_lab.course.text import load_text, text_version
from effnlp_lab.device import Device
from effnlp_lab.notebook.bench import Comparison, compare
from effnlp_lab.tokenization import Tokenizer

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

NEEDS = "cuda"
VOCABULARY = 32768
VOWELS, CONSONANTS = "aeiou", "bcdfghjklmnpqrstvwxyz"


def run(device: Device, folder: Path) -> list[Comparison]:
    """Train on 100 MB, then on 1 GB (on 2 and 20 MB where EFFNLP_FAST asks for small sizes)."""
    small = os.environ.get("EFFNLP_FAST", "").strip().lower() in ("1", "true")
    sizes = (2_000_000, 20_000_000) if small else (100_000_000, 1_000_000_000)
    beside = _beside(folder)
    Tokenizer.train(list(corpus(1_000_000)), 1000, method="tensor", device=device.torch)  # load the kernels
    return [_training(size, device, beside, 3 if size <= 100_000_000 else 1) for size in sizes]


def corpus(size: int) -> Iterator[str]:
    """Documents of `size` bytes in all: the course's text, then copies of it with other letters."""
    seed, left = 0, size
    while left > 0:
        table = _exchange(seed)
        for document in load_text("course-train").texts():
            data = document.encode("utf-8").translate(table)[:left]  # only a to z change: still UTF-8
            left -= len(data)
            yield data.decode("utf-8", errors="ignore")
            if left <= 0:
                return
        seed += 1


def _exchange(seed: int) -> bytes:
    """A table for `bytes.translate`; seed 0 changes nothing."""
    dice = random.Random(seed)
    shuffled = "".join("".join(dice.sample(letters, len(letters))) for letters in (VOWELS, CONSONANTS))
    source = (VOWELS + CONSONANTS).encode()
    return bytes.maketrans(source, shuffled.encode() if seed else source)


def _training(size: int, device: Device, beside, repeats: int) -> Comparison:
    import torch

    documents = list(corpus(size))
    made = {}

    def ours() -> None:
        made["ours"] = Tokenizer.train(documents, VOCABULARY, method="tensor", device=device.torch)

    def theirs() -> None:
        made["tokenizers"] = beside.train_huggingface(documents, VOCABULARY)

    if device.kind == "cuda":
        torch.cuda.reset_peak_memory_stats()
    result = compare(
        f"Train byte-level BPE on a GPU: {size / 1e6:,.0f} MB to {VOCABULARY:,} tokens",
        {"tensors on the GPU": ours, "tokenizers": theirs},
        ours="tensors on the GPU", peer="tokenizers", repeats=repeats, warmup=0, device=device,
    )
    expected = beside.huggingface_merges(made["tokenizers"])
    beside.require(made["ours"].merges == expected, "the merges differ from those of tokenizers")
    result.checks.append(f"the {len(expected):,} merges are the same, in the same order")
    if device.kind == "cuda":
        result.notes.append(f"Peak GPU memory: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB.")
    result.notes.append(f"Text: {text_version('course-train')}; repeated with exchanged letters where it is too short.")
    result.notes.append(f"tokenizers uses {os.cpu_count()} CPU cores; ours includes cutting and counting words.")
    return result


def _beside(folder: Path):
    """The CPU suite beside this file, for what both need."""
    spec = importlib.util.spec_from_file_location("effnlp_benchmark_tokenization_cpu", folder / "tokenization.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
