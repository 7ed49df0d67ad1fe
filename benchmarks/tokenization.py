"""Training and encoding on the CPU beside Hugging Face's `tokenizers` and `tiktoken`, results verified equal.

The text is 8 MB of the course's training text; the vocabulary has 32,768 tokens. Ours runs on one core. `tokenizers`
uses all cores, and beside that one; it is given the text as documents, as it wants it, and tiktoken the text as a
whole. Every run starts with empty caches: a tokenizer that has seen a word before answers from memory.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from effnlp_lab.course.text import load_text, text_version
from effnlp_lab.device import Device
from effnlp_lab.notebook.bench import Comparison, compare
from effnlp_lab.tokenization import GPT2, Tokenizer

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

MEGABYTES = 8
VOCABULARY = 32768


def run(device: Device, folder: Path) -> list[Comparison]:
    """Train and encode `MEGABYTES` of course text (1 MB and 4,096 tokens with fast sizes asked for by EFFNLP_FAST)."""
    small = os.environ.get("EFFNLP_FAST", "").strip().lower() in ("1", "true")
    size, vocabulary = (1_000_000, 4096) if small else (MEGABYTES * 1_000_000, VOCABULARY)
    text = "".join(load_text("course-train", limit_bytes=size).texts())
    size = len(text.encode("utf-8"))
    return [_training(text, size, vocabulary, device), _encoding(text, size, vocabulary, device)]


def _training(text: str, size: int, vocabulary: int, device: Device) -> Comparison:
    documents = documents_of(text)
    contestants = {
        "tensors, 1 core": lambda: Tokenizer.train(text, vocabulary, method="tensor"),
        "heap, 1 core": lambda: Tokenizer.train(text, vocabulary, method="heap"),
        "tokenizers": lambda: train_huggingface(documents, vocabulary),
        "tokenizers, 1 core": _one_core()(lambda: train_huggingface(documents, vocabulary)),
    }
    result = compare(
        f"Train byte-level BPE: {size / 1e6:.1f} MB to {vocabulary:,} tokens", contestants,
        ours="tensors, 1 core", peer="tokenizers", repeats=3, warmup=1, device=device,
    )
    made = {name: contestant() for name, contestant in contestants.items()}
    expected = huggingface_merges(made.pop("tokenizers"))
    for name, tokenizer in made.items():
        merges = tokenizer.merges if isinstance(tokenizer, Tokenizer) else huggingface_merges(tokenizer)
        require(merges == expected, f"the merges of {name} differ from those of tokenizers")
    result.checks.append(f"the {len(expected):,} merges of all are the same, in the same order")
    result.notes.append(f"Text: {text_version('course-train')}.")
    result.notes.append("tokenizers is given documents of 10,000 characters, and uses all cores unless one is named.")
    return result


def _encoding(text: str, size: int, vocabulary: int, device: Device) -> Comparison:
    import tiktoken
    from tokenizers import Tokenizer as HuggingFace

    trained = Tokenizer.train(text, vocabulary, special_tokens=["<|endoftext|>"])
    content = _json_of(trained)
    ranks, special = trained.ranks(), trained.special_tokens
    documents = documents_of(text)

    def fresh() -> Tokenizer:
        return Tokenizer(trained.tokens, trained.merges, special)

    waiting: dict[str, list] = {}
    makers = {
        "tensors": fresh, "words": fresh,
        "huggingface": lambda: HuggingFace.from_str(content),
        "huggingface alone": lambda: HuggingFace.from_str(content),
        "tiktoken": lambda: tiktoken.Encoding("ours", pat_str=GPT2, mergeable_ranks=ranks, special_tokens=special),
    }
    repeats, warmup = 3, 1
    for name, make in makers.items():  # made before the clock starts, one for each run and one to verify
        waiting[name] = [make() for _ in range(repeats + warmup + 1)]
    contestants = {
        "encode_tensor, 1 core": lambda: waiting["tensors"].pop().encode_tensor(text),
        "encode, 1 core": lambda: waiting["words"].pop().encode(text, special=False),
        "tokenizers, batch": lambda: waiting["huggingface"].pop().encode_batch_fast(documents),
        "tokenizers, batch, 1 core": _one_core()(
            lambda: waiting["huggingface alone"].pop().encode_batch_fast(documents)),
        "tiktoken, one text": lambda: waiting["tiktoken"].pop().encode_ordinary(text),
    }
    result = compare(
        f"Encode {size / 1e6:.1f} MB with {vocabulary:,} tokens, caches empty", contestants,
        ours="encode_tensor, 1 core", peer="tokenizers, batch", unit="MB/s", work=size,
        repeats=repeats, warmup=warmup, device=device,
    )
    plain = HuggingFace.from_str(json.dumps({**json.loads(content), "added_tokens": []}))
    expected = plain.encode(text).ids
    require(waiting["tensors"][0].encode_tensor(text).tolist() == expected, "encode_tensor differs from tokenizers")
    require(waiting["words"][0].encode(text, special=False) == expected, "encode differs from tokenizers")
    require(waiting["tiktoken"][0].encode_ordinary(text) == expected, "tiktoken differs from tokenizers")
    require(trained.decode(expected) == text, "decoding does not give the text back")
    result.checks.append(f"the {len(expected):,} ids of ours (both), tokenizers and tiktoken are the same")
    result.checks.append("decoding gives the text back")
    return result


@contextlib.contextmanager
def _one_core() -> Iterator[None]:
    """`tokenizers` asks the environment, at each call, whether it may use more than one."""
    before = os.environ["TOKENIZERS_PARALLELISM"]
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        os.environ["TOKENIZERS_PARALLELISM"] = before


def documents_of(text: str) -> list[str]:
    """`text` cut into documents of about 10,000 characters, between a line's last character and its newline.

    GPT-2's pattern cuts there whatever comes before and after, so that the words are those of the whole text.
    """
    documents, begin = [], 0
    while begin < len(text):
        end = text.find("\n", begin + 10_000)
        while end > 0 and text[end - 1].isspace():
            end = text.find("\n", end + 1)
        end = len(text) if end < 0 else end
        documents.append(text[begin:end])
        begin = end
    return documents


def train_huggingface(documents, vocabulary: int):
    """Hugging Face's byte-level BPE, trained on `documents`."""
    from tokenizers import Tokenizer as HuggingFace
    from tokenizers import models, pre_tokenizers, trainers

    tokenizer = HuggingFace(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=alphabet, min_frequency=0, show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def huggingface_merges(tokenizer) -> list[tuple[int, int]]:
    """The merges of a Hugging Face tokenizer, as pairs of ids."""
    model = json.loads(tokenizer.to_str())["model"]
    return [(model["vocab"][left], model["vocab"][right]) for left, right in model["merges"]]


def require(condition: bool, complaint: str) -> None:
    """A benchmark of unequal work is worth nothing: raise when `condition` does not hold."""
    if not condition:
        raise AssertionError(f"No figure: {complaint}.")


def _json_of(tokenizer: Tokenizer) -> str:
    from effnlp_lab.tokenization.huggingface import to_json

    return json.dumps(to_json(tokenizer))
