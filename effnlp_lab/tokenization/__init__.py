"""Tokenization: byte-pair encoding on bytes, from its definition to trainers for a CPU and for a GPU.

`plain` is the definition (and what answers are graded against), `Tokenizer` what an engineer would use: it trains with
`heap_trainer` or `tensor_trainer`, encodes with `word_encoder` and `tensor_encoder`, and reads and writes Hugging
Face's `tokenizer.json`.
"""

from effnlp_lab.tokenization.alphabet import ALPHABET, byte_of_id, bytes_of, id_of_byte, ids_of, letters_of
from effnlp_lab.tokenization.fertility import SCRIPTS, Fit, fertility, fit
from effnlp_lab.tokenization.heap_trainer import train_heap
from effnlp_lab.tokenization.levels import UNKNOWN, CharTokenizer, WordTokenizer
from effnlp_lab.tokenization.plain import best_pair, count_pairs, decode, encode, merge, train, vocabulary
from effnlp_lab.tokenization.pretokenize import GPT2, GPT4, PATTERNS, count_words, split
from effnlp_lab.tokenization.tokenizer import Tokenizer
from effnlp_lab.tokenization.word_encoder import encode_word

__all__ = [
    "ALPHABET", "GPT2", "GPT4", "PATTERNS", "SCRIPTS", "UNKNOWN", "CharTokenizer", "Fit", "Tokenizer", "WordTokenizer",
    "best_pair", "byte_of_id", "bytes_of", "count_pairs", "count_words", "decode", "encode", "encode_word",
    "fertility", "fit", "id_of_byte", "ids_of", "letters_of", "merge", "split", "train", "train_heap", "train_tensor",
    "vocabulary",
]


def __getattr__(name: str):
    """`train_tensor` imports torch, which the rest of the room does without."""
    if name == "train_tensor":
        from effnlp_lab.tokenization.tensor_trainer import train_tensor

        return train_tensor
    raise AttributeError(f"module 'effnlp_lab.tokenization' has no attribute {name!r}")
