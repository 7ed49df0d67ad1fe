"""The trainer, the word finder and the encoder on a GPU, beside the definition, `tokenizers` and the CPU."""

from __future__ import annotations

import json
import random

import pytest
import torch

from effnlp_lab.course.text import load_text
from effnlp_lab.tokenization import SCRIPTS, Tokenizer, count_words, plain
from effnlp_lab.tokenization.tensor_trainer import train_tensor
from effnlp_lab.tokenization.tensor_words import distinct_words


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return [*load_text("course-train", limit_bytes=3_000_000).texts(), *SCRIPTS.values(), "it's ''s  \n\n 've'll"]


@pytest.mark.parametrize("ties", ["smallest", "largest"])
def test_trainer_equals_the_definition_on_small_alphabets(ties):
    for seed in range(40):
        dice = random.Random(seed)
        letters = dice.choice([1, 2, 3, 5])
        words = [[dice.randrange(letters) for _ in range(dice.randrange(1, 12))] for _ in range(dice.randrange(1, 12))]
        counts = [dice.randrange(1, 5) for _ in words]
        flat = torch.tensor([symbol for word in words for symbol in word], device="cuda")
        lengths = torch.tensor([len(word) for word in words], device="cuda")
        merges = train_tensor(flat, lengths, torch.tensor(counts, device="cuda"), 40, ties, letters)
        assert merges == plain.train(words, counts, 40, ties, letters)


@pytest.mark.parametrize("chunk", [1 << 12, 1 << 25])
def test_words_are_those_of_the_pattern(documents, chunk, monkeypatch):
    monkeypatch.setattr("effnlp_lab.tokenization.tensor_words.GPU_CHUNK", chunk)
    few = documents[-40:]
    data, lengths, counts = distinct_words(few, "cuda")
    assert data.device.type == "cuda"
    raw, ends = bytes(data.cpu().numpy()), torch.cumsum(lengths, 0).tolist()
    words = [raw[end - length : end].decode() for end, length in zip(ends, lengths.tolist(), strict=True)]
    assert dict(zip(words, counts.tolist(), strict=True)) == count_words(few)


def test_merges_are_those_of_huggingface_in_the_same_order(documents):
    from tokenizers import Tokenizer as HuggingFace
    from tokenizers import models, pre_tokenizers, trainers

    ours = Tokenizer.train(documents, 16384, device="cuda", method="tensor")
    theirs = HuggingFace(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=16384, initial_alphabet=alphabet, min_frequency=0, show_progress=False
    )
    theirs.train_from_iterator(documents, trainer)
    model = json.loads(theirs.to_str())["model"]
    assert ours.merges == [(model["vocab"][left], model["vocab"][right]) for left, right in model["merges"]]


def test_encoding_equals_the_cpu(documents):
    tokenizer = Tokenizer.train(documents, 4096, device="cuda", method="tensor")
    ids = tokenizer.encode_tensor(documents, device="cuda")
    assert ids.device.type == "cuda" and ids.dtype == torch.int32
    assert torch.equal(ids.cpu(), tokenizer.encode_tensor(documents))
    assert tokenizer.decode(ids.tolist()) == "".join(documents)
