"""The definitions, both trainers, the encoder and the decoder, beside `tokenizers` and `tiktoken`."""

from __future__ import annotations

import itertools
import json
import random

import pytest
import tiktoken
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HuggingFace
from tokenizers import models, pre_tokenizers, trainers

from effnlp_lab.errors import UsageError
from effnlp_lab.tokenization import (
    ALPHABET,
    GPT2,
    SCRIPTS,
    UNKNOWN,
    CharTokenizer,
    Tokenizer,
    WordTokenizer,
    bytes_of,
    fertility,
    fit,
    ids_of,
    letters_of,
    plain,
    train_heap,
)
from effnlp_lab.tokenization.pretokenize import GPT4, count_words, split
from effnlp_lab.tokenization.tensor_trainer import train_tensor
from effnlp_lab.tokenization.tensor_words import distinct_words
from effnlp_lab.tokenization.word_encoder import LONG, encode_word

# Assigned characters only: libraries carry different versions of Unicode, and so do not agree on the newest letters.
CHARACTERS = st.characters(exclude_categories=("Cs", "Cn", "Co"))
SOUP = st.text(st.sampled_from(list("  \n\t\r'stmdlvreSTaZé1٣½.,!\"\x1c\x85\u00a0\u3000漢😀_")), max_size=60)
TEXTS = st.one_of(SOUP, st.text(CHARACTERS, max_size=60))
ENDS = "<|endoftext|>"


@pytest.fixture(scope="module")
def text() -> str:
    """Three modules of the standard library and a sentence in each of several scripts."""
    import argparse
    import inspect
    import textwrap
    import typing

    code = "".join(inspect.getsource(module) for module in (argparse, textwrap, typing))
    return code + "\n".join(SCRIPTS.values()) * 3


@pytest.fixture(scope="module")
def trained(text: str) -> Tokenizer:
    return Tokenizer.train(text, 1500, special_tokens=[ENDS, "<|pad|>"])


@pytest.fixture(scope="module")
def opened(trained: Tokenizer, tmp_path_factory) -> HuggingFace:
    """Our saved tokenizer, opened by Hugging Face's library."""
    return HuggingFace.from_file(str(trained.save(tmp_path_factory.mktemp("tokenizer"))))


def huggingface_merges(documents: list[str], vocab_size: int, cut=None) -> list[tuple[int, int]]:
    tokenizer = HuggingFace(models.BPE())
    tokenizer.pre_tokenizer = cut or pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"initial_alphabet": alphabet, "min_frequency": 0, "show_progress": False}
    tokenizer.train_from_iterator(documents, trainers.BpeTrainer(vocab_size=vocab_size, **options))
    model = json.loads(tokenizer.to_str())["model"]
    return [(model["vocab"][left], model["vocab"][right]) for left, right in model["merges"]]


def gpt4_cut():
    split_first = pre_tokenizers.Split(pattern=_regex(GPT4), behavior="isolated")
    return pre_tokenizers.Sequence([split_first, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _regex(source: str):
    from tokenizers import Regex

    return Regex(source)


def as_tensors(words: list[list[int]], counts: list[int]):
    kept = [(word, count) for word, count in zip(words, counts, strict=True) if word]
    flat = torch.tensor([symbol for word, _ in kept for symbol in word], dtype=torch.int64)
    lengths = torch.tensor([len(word) for word, _ in kept], dtype=torch.int64)
    return flat, lengths, torch.tensor([count for _, count in kept], dtype=torch.int64)


# Definitions


def test_counting_overlaps_and_merging_does_not():
    assert plain.count_pairs([[1, 1, 1], [1, 2]], [2, 5]) == {(1, 1): 4, (1, 2): 5}
    assert plain.merge([1, 1, 1, 1, 1], (1, 1), 9) == [9, 9, 1]
    assert plain.merge([2, 1], (1, 2), 9) == [2, 1]


def test_ties_go_to_the_smallest_pair_or_to_the_largest():
    pairs = {(2, 1): 3, (1, 9): 3, (0, 0): 2}
    assert plain.best_pair(pairs) == (1, 9)
    assert plain.best_pair(pairs, "largest") == (2, 1)


def test_alphabet_is_the_one_of_huggingface():
    assert [letters_of(token) for token in ALPHABET] == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert all(bytes_of(letters_of(token)) == token for token in ALPHABET)
    with pytest.raises(ValueError, match="stands for no byte"):
        bytes_of("漢")


def test_definition_equals_huggingface(text):
    few = text[:20_000]
    words = count_words(few)
    merges = plain.train([ids_of(word.encode()) for word in words], list(words.values()), 256 + 120)
    assert merges == huggingface_merges([few], 256 + 120)


# Pre-tokenization


@settings(max_examples=200, deadline=None)
@given(TEXTS)
@pytest.mark.parametrize("pattern", ["gpt2", "gpt4"])
def test_words_are_those_of_huggingface(pattern, text):
    cut = pre_tokenizers.ByteLevel(add_prefix_space=False) if pattern == "gpt2" else gpt4_cut()
    ours = split(text, pattern)
    assert [text[begin:end] for _, (begin, end) in cut.pre_tokenize_str(text)] == ours
    assert "".join(ours) == text


@settings(max_examples=100, deadline=None)
@given(st.lists(TEXTS, max_size=4), st.sampled_from([3, 17, 1 << 18]))
@example(["¼»\0"], 3)
def test_words_by_tensors_are_those_of_the_pattern(documents, chunk):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("effnlp_lab.tokenization.tensor_words.CPU_CHUNK", chunk)
        data, lengths, counts = distinct_words(documents)
    ends = torch.cumsum(lengths, 0).tolist()
    raw = bytes(data.tolist())
    words = [raw[end - length : end].decode() for end, length in zip(ends, lengths.tolist(), strict=True)]
    assert dict(zip(words, counts.tolist(), strict=True)) == count_words(documents)
    assert len(set(words)) == len(words)


def test_short_words_have_hashes_of_their_own():
    """All of up to three bytes, of an alphabet with zero and its neighbours: a longer word is no shorter one."""
    from effnlp_lab.tokenization.tensor_words import Hasher, to_tensor

    alphabet = [0, 1, 2, 3, 31, 32, 97, 98, 127, 128, 187, 188, 194, 239, 240, 244]
    words = [bytes(word) for length in (1, 2, 3) for word in itertools.product(alphabet, repeat=length)]
    length = torch.tensor([len(word) for word in words])
    start = torch.cumsum(length, 0) - length
    found = Hasher(torch.device("cpu")).words(to_tensor(b"".join(words), "cpu"), start, length)
    assert len(found.unique()) == len(words)


def test_equal_hashes_of_different_words_are_noticed():
    from effnlp_lab.tokenization.tensor_words import Hasher, find_words, to_tensor

    hasher = Hasher(torch.device("cpu"))
    hasher.power = torch.zeros_like(hasher.power)  # every word of one length has the same hash
    with pytest.raises(RuntimeError, match="same 64-bit hash"):
        find_words(to_tensor(b"ab\ncd", "cpu"), [0], hasher)


# Training


@pytest.mark.parametrize("ties", ["smallest", "largest"])
def test_trainers_equal_the_definition_on_small_alphabets(ties):
    for seed in range(60):
        dice = random.Random(seed)
        letters = dice.choice([1, 2, 3, 5])
        words = [[dice.randrange(letters) for _ in range(dice.randrange(12))] for _ in range(dice.randrange(1, 12))]
        counts = [dice.randrange(1, 5) for _ in words]
        expected = plain.train(words, counts, 40, ties, letters)
        assert train_heap(words, counts, 40, ties, letters) == expected
        assert train_tensor(*as_tensors(words, counts), 40, ties, letters) == expected


@pytest.mark.parametrize("method", ["heap", "tensor"])
def test_merges_are_those_of_huggingface_in_the_same_order(method, text):
    documents = text.split("\n\n")
    trained = Tokenizer.train(documents, 3000, method=method)
    assert trained.merges == huggingface_merges(documents, 3000)
    assert len(trained.merges) == 3000 - 256


@pytest.mark.parametrize("method", ["heap", "tensor"])
def test_gpt4_pattern_trains_like_huggingface(method, text):
    trained = Tokenizer.train(text, 1000, pattern="gpt4", method=method)
    assert trained.merges == huggingface_merges([text], 1000, gpt4_cut())


def test_methods_agree_when_ties_go_to_the_largest(text):
    few = text[:5000]
    merges = [Tokenizer.train(few, 330, ties="largest", method=method).merges for method in ("plain", "heap", "tensor")]
    assert merges[0] == merges[1] == merges[2]
    assert merges[0] != Tokenizer.train(few, 330, method="plain").merges


def test_training_ends_when_no_pair_is_left():
    for method in ("plain", "heap", "tensor"):
        trained = Tokenizer.train("abab", 1000, special_tokens=[ENDS], method=method)
        assert [trained.tokens[i] for i in range(256, 259)] == [b"ab", b"abab", ENDS.encode()]
        assert trained.special_tokens == {ENDS: 258}


def test_tensor_trainer_reports_progress(text):
    seen: list[tuple[int, int]] = []
    Tokenizer.train(text[:20_000], 400, method="tensor", progress=lambda made, wanted: seen.append((made, wanted)))
    assert seen[-1] == (144, 144) and seen == sorted(seen)


# Encoding and decoding


def test_ids_are_those_of_huggingface_and_tiktoken(trained, opened, text):
    ids = trained.encode(text)
    assert ids == opened.encode(text).ids
    assert ids == tiktoken_of(trained).encode(text, allowed_special="all")
    assert ids == trained.encode_tensor(text).tolist()
    assert trained.decode(ids) == text == opened.decode(ids, skip_special_tokens=False)


def tiktoken_of(tokenizer: Tokenizer) -> tiktoken.Encoding:
    special = tokenizer.special_tokens
    return tiktoken.Encoding("ours", pat_str=GPT2, mergeable_ranks=tokenizer.ranks(), special_tokens=special)


@settings(max_examples=200, deadline=None)
@given(TEXTS)
def test_any_text_encodes_alike_and_comes_back(trained, opened, text):
    ids = trained.encode(text)
    assert ids == opened.encode(text).ids == tiktoken_of(trained).encode(text, allowed_special="all")
    assert trained.encode_tensor(text).tolist() == trained.encode(text, special=False)
    assert trained.decode(ids) == text


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=80))
def test_any_bytes_come_back(trained, data):
    ids = trained.encode_bytes(data)
    assert trained.decode_bytes(ids) == data
    assert trained.decode(ids) == data.decode("utf-8", errors="replace")


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=60), st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=6))
def test_word_encoder_equals_the_definition(word, pairs):
    merges = [pair for number, pair in enumerate(dict.fromkeys(pairs)) if max(pair) < 4 + number]
    merges = [pair for number, pair in enumerate(merges) if max(pair) < 4 + number]
    rank = {pair: number for number, pair in enumerate(merges)}
    merged = [4 + number for number in range(len(merges))]
    expected = plain.encode(word, merges, 4)
    assert encode_word(word, rank, merged) == expected
    assert encode_word([0] * (LONG + 1) + word, rank, merged) == plain.encode([0] * (LONG + 1) + word, merges, 4)


def test_long_words_encode_like_tiktoken(trained):
    dice = random.Random(0)
    for letters in ("a", "ab", "etaoinshr"):
        word = "".join(dice.choice(letters) for _ in range(5000))
        assert trained.encode(word) == tiktoken_of(trained).encode_ordinary(word)


def test_a_character_may_span_tokens():
    tokenizer = Tokenizer.from_merges([])
    ids = tokenizer.encode("漢é")
    assert len(ids) == 5
    assert tokenizer.decode(ids) == "漢é"
    assert tokenizer.decode(ids[:1]) == "\ufffd"


def test_special_tokens_are_one_id_and_can_be_plain_text(trained, opened):
    written = f"a{ENDS} b<|pad|>"
    ids = trained.encode(written)
    assert ids == opened.encode(written).ids
    assert trained.special_tokens[ENDS] in ids and trained.decode(ids) == written
    as_text = trained.encode(written, special=False)
    assert not set(as_text) & set(trained.special_tokens.values()) and trained.decode(as_text) == written


def test_of_two_special_tokens_the_longer_is_found():
    tokenizer = Tokenizer.from_merges([], ["<|a|>", "<|a|><|b|>"])
    assert tokenizer.encode("<|a|><|b|><|a|>") == [257, 256]


# Save and load


@pytest.mark.parametrize("pattern", ["gpt2", "gpt4"])
def test_transformers_opens_what_we_save(pattern, text, tmp_path):
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    ours = Tokenizer.train(text, 600, special_tokens=[ENDS], pattern=pattern)
    ours.save(tmp_path)
    sample = f"def f(x):\n    return x'll  1234{ENDS}\n\nΌλοι 漢"
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert theirs(sample)["input_ids"] == ours.encode(sample)
    named = AutoTokenizer.from_pretrained(tmp_path)
    assert named.eos_token_id == ours.special_tokens[ENDS] and len(named) == ours.vocab_size
    assert named.decode(ours.encode(sample)) == sample
    again = Tokenizer.load(tmp_path)
    assert (again.tokens, again.merges, again.special_tokens) == (ours.tokens, ours.merges, ours.special_tokens)
    assert again.encode(sample) == ours.encode(sample)


def test_loads_what_huggingface_trained(text, tmp_path):
    theirs = HuggingFace(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=800, initial_alphabet=alphabet, special_tokens=[ENDS], show_progress=False
    )
    theirs.train_from_iterator([text], trainer)
    theirs.save(str(tmp_path / "theirs.json"))
    ours = Tokenizer.load(tmp_path / "theirs.json")
    assert ours.special_tokens == {ENDS: 0}
    assert ours.encode(text + ENDS) == theirs.encode(text + ENDS).ids == [*ours.encode_tensor(text).tolist(), 0]


def test_saving_twice_gives_the_same_file(trained, tmp_path):
    first, second = (trained.save(tmp_path / name).read_bytes() for name in ("a.json", "b.json"))
    assert first == second and not list(tmp_path.glob("*.part"))


# Words and characters, fertility


def test_words_and_characters_meet_the_unknown():
    words, letters = WordTokenizer.train("a cat a dog a cat", 3), CharTokenizer.train("abba", 2)
    assert words.pieces == [UNKNOWN, " a", " cat"] and words.encode(" a cow") == [1, 0]
    assert words.decode([1, 0]) == f" a{UNKNOWN}"
    assert letters.pieces == [UNKNOWN, "a"] and letters.encode("abc") == [1, 0, 0]
    assert fit(words, " a cow", unknown_id=0).unknown_rate == 0.5
    assert WordTokenizer.train("a b").vocab_size == 3


def test_fertility_counts_words_and_is_higher_where_the_script_is_strange(trained):
    measured = fit(Tokenizer.from_merges([]), "two words")
    assert (measured.words, measured.tokens, measured.bytes, measured.fertility) == (2, 9, 9, 4.5)
    assert fit(CharTokenizer.train("漢字"), "漢字").fertility == 1
    english = Tokenizer.train("all human beings are born free and equal " * 50, 400)
    by_script = fertility(english)
    assert set(by_script) == set(SCRIPTS)
    assert by_script["Hindi"].fertility > 3 * by_script["English"].fertility
    assert all(found.unknown_rate == 0 for found in by_script.values())


# Bad input


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda t: Tokenizer.train("text", 256, special_tokens=[ENDS]), "vocab_size=256 is too small.*at least 257"),
        (lambda t: Tokenizer.train("", 300), "text is empty"),
        (lambda t: Tokenizer.train([], 300, method="tensor"), "text is empty"),
        (lambda t: Tokenizer.train(b"bytes", 300), "Expected text as str, got bytes"),
        (lambda t: Tokenizer.train(["a", 3], 300), "Expected text as str, got int"),
        (lambda t: Tokenizer.train("a", 300.0), "vocab_size as an int"),
        (lambda t: Tokenizer.train("a", 300, ties="first"), "Unknown tie rule 'first'"),
        (lambda t: Tokenizer.train("a", 300, method="gpu"), "Unknown training method 'gpu'"),
        (lambda t: Tokenizer.train("a", 300, pattern="("), "nor a regular expression"),
        (lambda t: Tokenizer.train("a", 300, special_tokens=["<s>", "<s>"]), "given twice"),
        (lambda t: Tokenizer.train("a", 300, special_tokens=["a"]), "also an ordinary token"),
        (lambda t: Tokenizer.train("a", 300, special_tokens=[""]), "non-empty str"),
        (lambda t: t.encode(b"x"), "Expected text as str, got bytes"),
        (lambda t: t.encode("\ud800"), "half a surrogate pair at character 0"),
        (lambda t: t.encode_tensor("\ud800"), "half a surrogate pair"),
        (lambda t: t.encode_bytes("x"), "Expected bytes, got str"),
        (lambda t: t.decode([t.vocab_size]), "is outside the vocabulary"),
        (lambda t: t.decode([-1]), "Id -1 is outside"),
        (lambda t: Tokenizer(t.tokens[1:], []), "lacks the byte 0x21"),
        (lambda t: Tokenizer(t.tokens, [(0, 9999)]), "makes no token of the vocabulary"),
        (lambda t: fit(t, "..."), "holds no word"),
        (lambda t: WordTokenizer.train("a", 1), "vocab_size=1 is too small"),
        (lambda t: CharTokenizer.train(""), "text is empty"),
    ],
)
def test_bad_input_is_told_in_one_sentence(call, sentence, trained):
    with pytest.raises(UsageError, match=sentence):
        call(trained)


def _changed(change):
    def write(content: dict) -> str:
        change(content)
        return json.dumps(content)

    return write


@pytest.mark.parametrize(
    ("write", "sentence"),
    [
        (lambda content: "{", "is not JSON"),
        (lambda content: "[]", "holds no BPE model"),
        (_changed(lambda c: c["model"].update(type="WordPiece")), "holds no BPE model"),
        (_changed(lambda c: c["model"].update(byte_fallback=True)), "sets byte_fallback"),
        (_changed(lambda c: c.update(normalizer={"type": "NFC"})), "a normalizer"),
        (_changed(lambda c: c["pre_tokenizer"].update(add_prefix_space=True)), "without a prefix space"),
        (_changed(lambda c: c.update(pre_tokenizer={"type": "Whitespace"})), "without a prefix space"),
        (_changed(lambda c: c["model"]["merges"].append(["q"])), "cannot be read"),
        (_changed(lambda c: c["model"]["merges"].append(["!", "漢"])), "cannot be read"),
        (_changed(lambda c: c["model"]["vocab"].update({"abc": 10_000})), "no token has the id"),
    ],
)
def test_a_broken_file_is_told_in_one_sentence(write, sentence, trained, tmp_path):
    from effnlp_lab.tokenization.huggingface import to_json

    path = tmp_path / "tokenizer.json"
    path.write_text(write(json.loads(json.dumps(to_json(trained)))), encoding="utf-8")
    with pytest.raises(UsageError, match=sentence):
        Tokenizer.load(path)


def test_a_missing_file_is_told_in_one_sentence(tmp_path):
    with pytest.raises(UsageError, match="There is no tokenizer.json"):
        Tokenizer.load(tmp_path)
