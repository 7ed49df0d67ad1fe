"""Judges the answers of lab 01: cases, right outputs by the definition in `effnlp_lab.tokenization.plain`, mistakes.

Here the id of a byte is its value, so that a student need not know GPT-2's order of the bytes.
"""

from __future__ import annotations

import regex

from effnlp_lab.exercises.reference import Case, Mistake, Reference, Rng, edit
from effnlp_lab.tokenization import plain
from effnlp_lab.tokenization.pretokenize import split

Pair = tuple[int, int]
BYTES = [bytes([byte]) for byte in range(256)]


def count_pairs(words: list[list[int]], counts: list[int]) -> dict[Pair, int]:
    return plain.count_pairs(words, counts)


def merge_pair(word: list[int], pair: Pair, new_id: int) -> list[int]:
    return plain.merge(word, pair, new_id)


def train_bpe(words: list[list[int]], counts: list[int], vocab_size: int) -> list[Pair]:
    return plain.train(words, counts, vocab_size)


def encode_bpe(text: str, merges: list[Pair]) -> list[int]:
    return [i for word in split(text) for i in plain.encode(list(word.encode("utf-8")), merges)]


def decode_bpe(ids: list[int], merges: list[Pair]) -> str:
    return plain.decode(ids, plain.vocabulary(merges, BYTES))


EARLIER = {
    "count_pairs": count_pairs,
    "merge_pair": merge_pair,
    "train_bpe": train_bpe,
    "encode_bpe": encode_bpe,
    "decode_bpe": decode_bpe,
}


def some_ids(rng: Rng, count: int, high: int = 255) -> list[int]:
    """`count` different ids, ascending."""
    found: set[int] = set()
    while len(found) < count:
        found.add(rng.int(0, high))
    return sorted(found)


def some_words(rng: Rng, letters: list, count: int, longest: int) -> list[list]:
    """Random words of two letters and more."""
    return [[rng.choice(letters) for _ in range(rng.int(2, longest))] for _ in range(count)]


class MeasureTokens(Reference):
    exercise = "measure_tokens"
    mistakes = (
        Mistake(
            "characters for bytes",
            "Tokens per byte divides by the bytes of the text in UTF-8, and not by its characters.",
            edit('"".join(test).encode("utf-8")', '"".join(test)'),
        ),
        Mistake(
            "types counted",
            "The unknown rate counts occurrences: an unknown token that occurs five times counts five times.",
            edit("unknown / len(test)", "len(set(test) - vocabulary) / len(set(test))"),
        ),
        Mistake(
            "vocabulary of both",
            "The vocabulary comes from the training text alone; with the test text in it nothing is unknown.",
            edit("set(train)", "set(train) | set(test)"),
        ),
        Mistake(
            "repeats in the vocabulary",
            "A vocabulary holds each token once, however often it occurs.",
            edit('"vocabulary": len(vocabulary)', '"vocabulary": len(train)'),
        ),
        Mistake(
            "known rate",
            "That is the share of known tokens; the unknown rate is what is left.",
            edit("token not in vocabulary", "token in vocabulary"),
        ),
        Mistake(
            "bytes per token",
            "That is bytes per token; asked for is its inverse, tokens per byte.",
            edit("len(test) / text_bytes", "text_bytes / len(test)"),
        ),
    )

    def cases(self, rng, variant):
        yield self._case(rng, "words seen and unseen", "ascii", "abcdefgh")
        yield self._case(rng, "punctuation", "ascii", "xyz.,;")
        yield Case("one known token", {"train": ["to", " be"], "test": [" be"]}, part="ascii")
        yield Case("one unknown token", {"train": ["to", " be"], "test": [" or"]}, part="ascii")
        yield Case("nothing to learn from", {"train": [], "test": ["a", "b", "a"]}, part="ascii")
        yield self._case(rng, "letters of two bytes", "unicode", "éüñжд")
        yield self._case(rng, "letters of three and four bytes", "unicode", "你好あ🙂🙃")

    def _case(self, rng: Rng, name: str, part: str, letters: str) -> Case:
        """Unknown tokens occur more often than known ones, so that tokens and distinct tokens give different rates."""
        tokens = list(dict.fromkeys(" " + "".join(word) for word in some_words(rng, list(letters), 24, 5)))
        known, unknown = tokens[:8], tokens[8 : 8 + rng.int(1, 3)]
        train = rng.shuffled(known + [rng.choice(known) for _ in range(rng.int(1, 9))])
        test = rng.shuffled(known[: rng.int(4, 8)] + unknown * rng.int(4, 6))
        return Case(name, {"train": train, "test": test}, part=part)

    def expected(self, inputs, variant):
        train, test = inputs["train"], inputs["test"]
        text = "".join(test)
        known = dict.fromkeys(train)
        return {
            "vocabulary": len(known),
            "unknown_rate": len([t for t in test if t not in known]) / len(test),
            "tokens_per_byte": len(test) / len(text.encode("utf-8")),
        }


class CountPairs(Reference):
    exercise = "count_pairs"
    mistakes = (
        Mistake(
            "overlaps skipped",
            "Occurrences overlap in counting, not in merging.",
            """
def count_pairs(words, counts):
    pairs = {}
    for word, count in zip(words, counts):
        i = 0
        while i + 1 < len(word):
            pair = (word[i], word[i + 1])
            pairs[pair] = pairs.get(pair, 0) + count
            i += 2 if tuple(word[i + 1 : i + 3]) == pair else 1
    return pairs
""",
        ),
        Mistake(
            "counts ignored",
            "Word w occurs counts[w] times, and so do its pairs: add counts[w], not 1.",
            edit("pairs.get(pair, 0) + count", "pairs.get(pair, 0) + 1"),
        ),
        Mistake(
            "last word wins",
            "A pair may occur in many words: add to what it has, instead of replacing it.",
            edit("pairs.get(pair, 0) + count", "count"),
        ),
        Mistake(
            "across words",
            "The last id of a word and the first of the next are not neighbours: no pair spans two words.",
            """
def count_pairs(words, counts):
    pairs, last = {}, None
    for word, count in zip(words, counts):
        for item in word:
            if last is not None:
                pairs[last, item] = pairs.get((last, item), 0) + count
            last = item
    return pairs
""",
        ),
        Mistake(
            "order ignored",
            "A pair has an order: (a, b) and (b, a) are two pairs.",
            edit("in zip(word, word[1:])", "in map(tuple, map(sorted, zip(word, word[1:])))"),
        ),
        Mistake(
            "last pair missed",
            "A word of n ids has n - 1 pairs: the last one is missing.",
            edit("zip(word, word[1:])", "zip(word, word[1:-1])"),
        ),
    )

    def cases(self, rng, variant):
        a, b, c, d, e, f = rng.shuffled(some_ids(rng, 6))
        yield Case("one word", {"words": [[a, b, c]], "counts": [rng.int(2, 9)]}, part="counts")
        yield Case("both orders", {"words": [[a, b], [b, a], [c, d]], "counts": rng.ints(3, 2, 9)}, part="counts")
        yield Case(
            "one pair in three words",
            {"words": [[a, b], [c, a, b], [a, b, d]], "counts": rng.ints(3, 2, 9)},
            part="counts",
        )
        yield Case("the same word twice", {"words": [[e, f], [e, f]], "counts": [3, rng.int(4, 9)]}, part="counts")
        yield Case("words without pairs", {"words": [[a], [], [b]], "counts": [5, 2, 3]}, part="counts")
        yield Case("no words", {"words": [], "counts": []}, part="counts")
        letters = [a, b, c, 256 + rng.int(0, 50_000)]
        yield Case(
            "random words",
            {"words": self._no_runs(some_words(rng, letters, 12, 8)), "counts": rng.ints(12, 1, 1_000_000)},
            part="counts",
        )
        yield Case("three of the same", {"words": [[a, a, a]], "counts": [rng.int(1, 9)]}, part="overlaps")
        yield Case("two and two", {"words": [[b, b, c, c]], "counts": [rng.int(1, 9)]}, part="overlaps")
        yield Case(
            "runs in words",
            {"words": [[a] * rng.int(3, 7) + [b], [b] + [a] * 4, [d, d]], "counts": rng.ints(3, 1, 99)},
            part="overlaps",
        )
        yield Case(
            "random runs", {"words": some_words(rng, [a, b], 8, 9), "counts": rng.ints(8, 1, 99)}, part="overlaps"
        )

    @staticmethod
    def _no_runs(words: list[list[int]]) -> list[list[int]]:
        return [[x for x, before in zip(word, [None, *word], strict=False) if x != before] for word in words]

    def expected(self, inputs, variant):
        return plain.count_pairs(inputs["words"], inputs["counts"])


class MergePair(Reference):
    exercise = "merge_pair"
    mistakes = (
        Mistake(
            "overlaps merged",
            "Occurrences overlap in counting, not in merging.",
            """
def merge_pair(word, pair, new_id):
    starts = {i for i in range(len(word) - 1) if (word[i], word[i + 1]) == pair}
    return [new_id if i in starts else word[i] for i in range(len(word)) if i in starts or i - 1 not in starts]
""",
        ),
        Mistake(
            "from the right",
            "Merge from left to right: in a run of three the first two become one.",
            """
def merge_pair(word, pair, new_id):
    merged, i = [], len(word)
    while i > 0:
        if i > 1 and (word[i - 2], word[i - 1]) == pair:
            merged.append(new_id)
            i -= 2
        else:
            merged.append(word[i - 1])
            i -= 1
    return merged[::-1]
""",
        ),
        Mistake(
            "second id kept", "Both ids of the pair go: step over two ids after a merge.", edit("i += 2", "i += 1")
        ),
        Mistake(
            "first alone",
            "Every occurrence is merged, and not the first alone.",
            """
def merge_pair(word, pair, new_id):
    for i in range(len(word) - 1):
        if (word[i], word[i + 1]) == pair:
            return word[:i] + [new_id] + word[i + 2:]
    return list(word)
""",
        ),
        Mistake(
            "last id lost",
            "The last id has no right neighbour, and still belongs to the word.",
            edit("i < len(word)", "i < len(word) - 1"),
        ),
        Mistake(
            "either order",
            "A pair has an order: (a, b) and (b, a) are two pairs.",
            edit("tuple(word[i : i + 2]) == pair", "tuple(word[i : i + 2]) in (pair, pair[::-1])"),
        ),
    )

    def cases(self, rng, variant):
        a, b, c, d = rng.shuffled(some_ids(rng, 4))
        new = rng.int(256, 60_000)
        for name, word in (
            ("once, in the middle", [c, a, b, d]),
            ("at the beginning", [a, b, c]),
            ("at the end", [c, d, a, b]),
            ("several times", [a, b, c, a, b, a, b, d]),
            ("the whole word", [a, b]),
            ("nowhere", [a, c, b, d]),
            ("the other order", [b, a, c, b, a]),
            ("one id", [a]),
            ("no ids", []),
            ("the first id alone at the end", [a, b, a]),
        ):
            yield Case(name, {"word": word, "pair": (a, b), "new_id": new}, part="merge")
        word = [rng.choice([a, b, c]) for _ in range(rng.int(20, 40))]
        yield Case("a random word", {"word": word, "pair": (a, b), "new_id": new}, part="merge")
        for name, word in (
            ("three of the same", [a, a, a]),
            ("four of the same", [a, a, a, a]),
            ("a run between others", [b, *[a] * rng.int(3, 9), c, a, a]),
            ("runs at random", [rng.choice([a, a, b]) for _ in range(rng.int(20, 40))]),
        ):
            yield Case(name, {"word": word, "pair": (a, a), "new_id": new}, part="overlaps")

    def expected(self, inputs, variant):
        return plain.merge(inputs["word"], inputs["pair"], inputs["new_id"])


class TrainBpe(Reference):
    exercise = "train_bpe"
    mistakes = (
        Mistake(
            "ties to the first seen",
            "The counts are right; ties go to the smallest id pair (the largest, if your rule says so), and not to the "
            "pair that was seen first.",
            edit("min(pairs, key=lambda pair: (-pairs[pair], pair))", "max(pairs, key=lambda pair: pairs[pair])"),
        ),
        Mistake(
            "ties to the last seen",
            "The counts are right; ties go to the smallest id pair (the largest, if your rule says so), and not to the "
            "pair that was seen last.",
            edit(
                "min(pairs, key=lambda pair: (-pairs[pair], pair))",
                "max(reversed(pairs), key=lambda pair: pairs[pair])",
            ),
        ),
        Mistake(
            "ties to the largest",
            "The counts are right; ties go to the smallest id pair.",
            edit(
                "min(pairs, key=lambda pair: (-pairs[pair], pair))", "max(pairs, key=lambda pair: (pairs[pair], pair))"
            ),
        ),
        Mistake(
            "ties by text",
            "The counts are right; ties compare ids, and not the bytes that the tokens stand for.",
            """
def train_bpe(words, counts, vocab_size):
    merges, tokens = [], [bytes([byte]) for byte in range(256)]
    for new_id in range(256, vocab_size):
        pairs = count_pairs(words, counts)
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], tokens[pair[0]], tokens[pair[1]]))
        words = [merge_pair(word, best, new_id) for word in words]
        merges.append(best)
        tokens.append(tokens[best[0]] + tokens[best[1]])
    return merges
""",
        ),
        Mistake(
            "overlaps not counted",
            "Occurrences overlap in counting, not in merging: three of the same hold two pairs.",
            """
def train_bpe(words, counts, vocab_size):
    merges = []
    for new_id in range(256, vocab_size):
        pairs = {}
        for word, count in zip(words, counts):
            i = 0
            while i + 1 < len(word):
                pair = (word[i], word[i + 1])
                pairs[pair] = pairs.get(pair, 0) + count
                i += 2 if tuple(word[i + 1 : i + 3]) == pair else 1
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        words = [merge_pair(word, best, new_id) for word in words]
        merges.append(best)
    return merges
""",
        ),
        Mistake(
            "across words",
            "No merge crosses from one word to the next: count and merge inside each word.",
            (
                edit(
                    "merges = []",
                    "merges = []\n    words = [[i for word, count in zip(words, counts) "
                    "for _ in range(count) for i in word]]",
                ),
                edit("count_pairs(words, counts)", "count_pairs(words, [1])"),
            ),
        ),
        Mistake(
            "counted once",
            "Every merge changes the counts: count the pairs again after each one.",
            """
def train_bpe(words, counts, vocab_size):
    pairs = count_pairs(words, counts)
    ranked = sorted(pairs, key=lambda pair: (-pairs[pair], pair))
    return ranked[:max(vocab_size - 256, 0)]
""",
        ),
        Mistake(
            "words count once",
            "Word w occurs counts[w] times: its pairs weigh that much.",
            edit("count_pairs(words, counts)", "count_pairs(words, [1] * len(words))"),
        ),
        Mistake(
            "too many merges",
            "256 of the vocab_size tokens are the bytes: that leaves vocab_size - 256 merges.",
            edit("range(256, vocab_size)", "range(256, 256 + vocab_size)"),
        ),
        Mistake(
            "ids off by one",
            "The bytes are ids 0 to 255: the first merge makes id 256.",
            edit("merge_pair(word, best, new_id)", "merge_pair(word, best, new_id + 1)"),
        ),
        Mistake(
            "no stop",
            "A small text runs out of pairs before the vocabulary is full: stop there.",
            edit("        if not pairs:\n            break\n", ""),
        ),
        Mistake(
            "rare pairs left",
            "A pair that occurs once is merged too: training ends when no pair is left, or the vocabulary is full.",
            edit("if not pairs:", "if not pairs or max(pairs.values()) < 2:"),
        ),
    )

    def cases(self, rng, variant):
        a, b, c, d = rng.shuffled(some_ids(rng, 4))
        n = rng.int(4, 30)
        yield self._case("a run outweighs a pair", "merges", [[a, a, a], [b, c]], [2 * n, 3 * n], 259)
        yield self._case("a pair across words", "merges", [[a, b], [b, a, d], [b, a, c]], [9 * n, n, 2 * n], 259)
        yield self._case(
            "one frequent word", "merges", [[a, b], [c, d], [c, d, b], [d, c, d, a]], [9 * n, n, 2 * n, n], 257
        )
        yield self._without_ties(rng, "few letters, many words", 4, 24, 10)
        yield self._without_ties(rng, "tokens of tokens", 2, 16, 8)
        e, f, _, g = sorted((a, b, c, d))
        # after (e, f) five pairs tie: smallest (f, e), largest (256, g), first (g, e), last (g, f), by text (256, e)
        words = [[g, e], [f, e], [e, f, g], [e, f, e], [e, f], [g, f]]
        yield self._case("ties with a new id", "ties", words, [n] * 6, 258)
        yield self._ties(rng, "four equal pairs", [], 260)
        yield self._ties(rng, "four equal pairs with the same left id", rng.ints(1, 0, 255), 258)
        low = ["low", "lower", "newest", "widest"]
        yield self._case(
            "Sennrich's four words", "ties", [list(w.encode()) for w in low], [5, 2, 6, 3], 256 + rng.int(8, 12)
        )
        yield self._case(
            "ties at random", "ties", some_words(rng, [a, b, c, d], 8, 6), rng.ints(8, 1, 2), 256 + rng.int(6, 16)
        )
        yield self._case("no merge", "limits", [[a, b, c]], [n], 256)
        yield self._case("fewer tokens than bytes", "limits", [[a, b, c]], [n], rng.int(0, 255))
        yield self._case("one merge", "limits", [[a, b, a, b, c]], [n], 257)
        yield self._case("no pair left", "limits", [[a, b], [b, c, d], [c]], [n, n + 2, n + 5], 256 + rng.int(20, 40))
        yield self._case("pairs that occur once", "limits", [[a, b, c, d]], [1], 256 + rng.int(3, 6))
        yield self._case("words of one letter", "limits", [[a], [b], []], [n, n, 1], 260)
        yield self._case("no words", "limits", [], [], 300)

    @staticmethod
    def _case(name: str, part: str, words: list, counts: list[int], vocab_size: int) -> Case:
        return Case(name, {"words": words, "counts": counts, "vocab_size": vocab_size}, part=part)

    def _without_ties(self, rng: Rng, name: str, letters: int, count: int, merges: int) -> Case:
        """Words in which no tie is met, so that a slip shows whatever the tie rule."""
        while True:
            alphabet = some_ids(rng, letters)
            words, counts = some_words(rng, alphabet, count, 7), rng.ints(count, 1, 60)
            size = 256 + merges
            if plain.train(words, counts, size) == plain.train(words, counts, size, "largest"):
                return self._case(name, "merges", words, counts, size)

    def _ties(self, rng: Rng, name: str, left: list[int], size: int) -> Case:
        """Four pairs of equal count, of which neither the first nor the last seen is the smallest or the largest."""
        ids = rng.shuffled(some_ids(rng, 8))
        pairs = sorted([[*left, i] for i in ids[:4]] if left else [ids[2 * i : 2 * i + 2] for i in range(4)])
        first, second, third, fourth = pairs
        inner, outer = rng.shuffled([second, third]), rng.shuffled([first, fourth])
        return self._case(name, "ties", [inner[0], *outer, inner[1]], [rng.int(1, 9)] * 4, size)

    def expected(self, inputs, variant):
        return plain.train(inputs["words"], inputs["counts"], inputs["vocab_size"], variant["ties"])


LONGEST_MATCH = """
def encode_bpe(text, merges):
    tokens = {bytes([i]): i for i in range(256)}
    names = list(tokens)
    for rank, (left, right) in enumerate(merges):
        names.append(names[left] + names[right])
        tokens[names[-1]] = 256 + rank
    ids = []
    for word in pretokenize(text):
        data = word.encode("utf-8")
        while data:
            longest = max(n for n in range(1, len(data) + 1) if data[:n] in tokens)
            ids.append(tokens[data[:longest]])
            data = data[longest:]
    return ids
"""


class EncodeBpe(Reference):
    exercise = "encode_bpe"
    mistakes = (
        Mistake("longest match", "Encoding applies the lowest rank, not the longest token.", LONGEST_MATCH),
        Mistake(
            "leftmost pair",
            "Of all the pairs in the word, the one of the lowest rank is merged first, not the leftmost.",
            edit("min(known, key=lambda pair: rank[pair])", "known[0]"),
        ),
        Mistake(
            "highest rank",
            "The lowest rank goes first: it is the merge that training made earliest.",
            edit("min(known", "max(known"),
        ),
        Mistake(
            "across words",
            "No merge crosses a pre-token boundary: cut the text with pretokenize, and encode each word.",
            edit("pretokenize(text)", "[text]"),
        ),
        Mistake(
            "code points",
            "A word starts as its bytes in UTF-8, and not as the code points of its characters.",
            edit('list(pretoken.encode("utf-8"))', "[ord(letter) for letter in pretoken]"),
        ),
        Mistake(
            "one merge",
            "Go on merging until no pair of the word is among the merges.",
            edit("while known :=", "if known :="),
        ),
        Mistake("rank for id", "The merge of rank r makes id 256 + r.", edit("256 + rank[best]", "rank[best]")),
    )

    def cases(self, rng, variant):
        a, b, c, d = rng.shuffled([ord(letter) for letter in rng.shuffled("abcdefghijklm")[:4]])
        # bc=256, cd=257, ab=258, bcd=259, abc=260: a, bcd by rank; abc, d by length; ab, cd from the left
        apart = [(b, c), (c, d), (a, b), (256, d), (a, 256)]
        yield self._case("four letters, three ways", "words", self._text([a, b, c, d]), apart)
        # ab=256, cd=257, bc=258, bcd=259: "bcd" is b, cd by rank, bcd by length, and "abcd" is ab, cd
        merges = [(a, b), (c, d), (b, c), (258, d)]
        yield self._case("a longer token exists", "words", self._text([b, c, d]), merges)
        yield self._case("the lowest rank stands right", "words", self._text([c, b, c, d, d]), merges)
        yield self._case("all four letters", "words", self._text([a, b, c, d]), merges)
        yield self._case("one letter", "words", self._text([a]), merges)
        yield self._case("two letters", "words", self._text([a, b]), merges)
        yield self._case("no merges", "words", self._text([a, b, c]), [])
        yield self._case("no merge fits", "words", self._text([d, c, b, a]), merges)
        yield self._case(
            "a run of one letter", "words", self._text([a] * rng.int(5, 9)), [(a, a), (256, 256), (256, a)]
        )
        trained = self._trained(rng, [a, b, c, d])
        for length in (8, 16, 24):
            word = [rng.choice([a, b, c, d]) for _ in range(length)]
            yield self._case(f"a random word of {length} letters", "words", self._text(word), trained)
        yield self._case("empty text", "text", "", merges)
        yield self._case(
            "a merge over a space",
            "text",
            self._text([a]) + " " + self._text([b]) + "," + self._text([c]),
            [(a, 32), (32, b), (b, ord(",")), (ord(","), c)],
        )
        words = [self._text([rng.choice([a, b, c, d]) for _ in range(rng.int(1, 7))]) for _ in range(12)]
        yield self._case("several words", "text", " ".join(words), trained)
        yield self._case(
            "punctuation and numbers", "text", f"{words[0]}, it's {words[1]}  {words[2]}42!\n\n {words[3]}", trained
        )
        yield self._case(
            "letters of several bytes",
            "text",
            "naïve café, Ωμέγα 你好 🙂",
            [(0xC3, 0xA9), (0xC3, 0xAF), (0xE4, 0xBD), (257, ord("v")), (258, 0xA0), (0xF0, 0x9F), (ord("f"), 256)],
        )

    @staticmethod
    def _case(name: str, part: str, text: str, merges: list[Pair]) -> Case:
        return Case(name, {"text": text, "merges": merges}, part=part)

    @staticmethod
    def _text(letters: list[int]) -> str:
        return bytes(letters).decode("ascii")

    @staticmethod
    def _trained(rng: Rng, letters: list[int]) -> list[Pair]:
        """Merges as training makes them: some words begin with a space."""
        words = [rng.choice([[], [32]]) + word for word in some_words(rng, letters, 16, 8)]
        return plain.train(words, rng.ints(16, 1, 20), 256 + rng.int(12, 20))

    def expected(self, inputs, variant):
        return encode_bpe(inputs["text"], inputs["merges"])


class DecodeBpe(Reference):
    exercise = "decode_bpe"
    mistakes = (
        Mistake(
            "token by token",
            "A character may span tokens: join the bytes first, and decode them together.",
            edit(
                'b"".join(tokens[i] for i in ids).decode("utf-8", errors="replace")',
                '"".join(tokens[i].decode("utf-8", errors="replace") for i in ids)',
            ),
        ),
        Mistake(
            "strict",
            'Not every list of ids is valid UTF-8: decode with errors="replace", which puts U+FFFD for what is not.',
            edit('ids).decode("utf-8", errors="replace")', 'ids).decode("utf-8")'),
        ),
        Mistake(
            "dropped",
            "What is not UTF-8 becomes U+FFFD, and is not dropped: a reader should see that something was there.",
            edit('ids).decode("utf-8", errors="replace")', 'ids).decode("utf-8", errors="ignore")'),
        ),
        Mistake(
            "a character a byte",
            "Bytes are UTF-8, in which a character takes one to four of them: chr() of each byte is Latin-1.",
            edit('ids).decode("utf-8", errors="replace")', 'ids).decode("latin-1")'),
        ),
        Mistake(
            "halves swapped",
            "A merge joins its left half and then its right half.",
            edit("tokens[left] + tokens[right]", "tokens[right] + tokens[left]"),
        ),
    )

    def cases(self, rng, variant):
        a, b, c, d = rng.shuffled([ord(letter) for letter in rng.shuffled("abcdefghijklm")[:4]])
        merges = [(a, b), (32, 256), (256, c), (258, 257), (d, d)]
        yield self._case("bytes alone", "text", list(f"plain text, {rng.int(0, 999)}\n".encode()), [])
        yield self._case("one merge", "text", [256], [(a, b)])
        yield self._case("tokens of tokens", "text", [258, 257, 259, 32, 260, a], merges)
        yield self._case("the same token again", "text", [256, 256, 257, 257], merges)
        yield self._case("no ids", "text", [], merges)
        yield self._case("random tokens", "text", rng.shuffled([256, 257, 258, 259, 260, a, b, c, d, 32] * 2), merges)
        halves = [(0xC3, 0xA9), (0xF0, 0x9F), (257, 0x99), (0xBD, 0xA0), (ord("f"), 0xC3)]
        yield self._case("a character of two bytes", "bytes", [ord("c"), 256, 0xC3, 0xA9], halves)
        yield self._case(
            "characters that span tokens", "bytes", [0xE4, 259, 260, 0xA9, 257, 0x99, 0x82, 258, 0x82], halves
        )
        yield self._case("half a character", "bytes", [ord("x"), 260, ord("y"), 257], halves)
        yield self._case("not UTF-8", "bytes", [0xFF, ord("a"), 0x80, 0xC3], [])
        yield self._case("random bytes", "bytes", list(rng.bytes(rng.int(40, 60))), [])
        yield self._case(
            "random halves", "bytes", [rng.choice([0xC3, 0xA9, 256, 257, 258, 259, 260]) for _ in range(30)], halves
        )

    @staticmethod
    def _case(name: str, part: str, ids: list[int], merges: list[Pair]) -> Case:
        return Case(name, {"ids": ids, "merges": merges}, part=part)

    def expected(self, inputs, variant):
        if variant["invalid"] == "replace":
            return decode_bpe(inputs["ids"], inputs["merges"])
        tokens = plain.vocabulary(inputs["merges"], BYTES)
        return b"".join(tokens[i] for i in inputs["ids"]).decode("utf-8", errors="backslashreplace")


class EncodeSpecial(Reference):
    exercise = "encode_special"
    mistakes = (
        Mistake(
            "as plain text",
            "A special token written in the text becomes its one id: cut it out before you encode.",
            """
def encode_special(text, merges, special):
    return encode_bpe(text, merges)
""",
        ),
        Mistake(
            "not escaped",
            'Escape the special tokens in your regular expression: there | means "or".',
            edit("regex.escape(name)", "name"),
        ),
        Mistake(
            "shorter first",
            "Where two special tokens begin at the same place, the longer one is meant.",
            edit("sorted(special, key=len, reverse=True)", "sorted(special, key=len)"),
        ),
        Mistake(
            "separators dropped",
            "The special tokens themselves are missing: put the pattern in a group, so that split keeps them.",
            edit('f"({pattern})"', "pattern"),
        ),
        Mistake(
            "longest anywhere",
            "Read from the left: a special token that begins earlier wins, even over a longer one.",
            """
def encode_special(text, merges, special):
    for name in sorted(special, key=len, reverse=True):
        before, found, after = text.partition(name)
        if found:
            return encode_special(before, merges, special) + [special[name]] + encode_special(after, merges, special)
    return encode_bpe(text, merges)
""",
        ),
    )

    def cases(self, rng, variant):
        merges = [
            (ord("e"), ord("n")),
            (256, ord("d")),
            (ord("|"), ord(">")),
            (ord("a"), ord("b")),
            (32, 259),
            (ord("<"), ord("|")),
        ]
        end = 256 + len(merges) + rng.int(0, 9)
        special = {"<|end|>": end, "<|pad|>": end + 1}
        for name, text in (
            ("one in the middle", "ab ab<|end|>ab end"),
            ("at both ends", "<|end|>ab<|pad|>"),
            ("two in a row", "ab<|pad|><|pad|> ab"),
            ("none", "the end | of <ab>"),
            ("nothing else", "<|end|>"),
            ("empty text", ""),
            ("spaces around", "ab <|end|> ab"),
        ):
            yield Case(name, {"text": text, "merges": merges, "special": special}, part="split")
        longer = {"<a>": end, "<a><b>": end + 1, "<b>": end + 2}
        items = rng.shuffled(list(longer.items()))
        yield Case(
            "one begins like another",
            {"text": "ab<a><b><a>ab<b>", "merges": merges, "special": dict(items)},
            part="overlaps",
        )
        crossing = dict(rng.shuffled([("ab", end), ("bcd|", end + 1)]))
        yield Case(
            "one begins inside another", {"text": "abcd| bcd|", "merges": merges, "special": crossing}, part="overlaps"
        )

    def expected(self, inputs, variant):
        special = inputs["special"]
        names = regex.compile("|".join(map(regex.escape, sorted(special, key=len, reverse=True))))
        ids, begin = [], 0
        for found in names.finditer(inputs["text"]):
            ids += encode_bpe(inputs["text"][begin : found.start()], inputs["merges"]) + [special[found.group()]]
            begin = found.end()
        return ids + encode_bpe(inputs["text"][begin:], inputs["merges"])


class Fertility(Reference):
    exercise = "fertility"
    mistakes = (
        Mistake(
            "pre-tokens for words",
            "A word here is what white space separates: text.split(), and not the pre-tokens.",
            edit("len(text.split())", "len(pretokenize(text))"),
        ),
        Mistake(
            "characters for words",
            "Fertility divides by words, and not by characters.",
            edit("len(text.split())", "len(text)"),
        ),
        Mistake(
            "premium inverted",
            "The premium is this text's tokens over the baseline's: above 1 means that it costs more.",
            edit("tokens[name] / tokens[baseline]", "tokens[baseline] / tokens[name]"),
        ),
        Mistake(
            "words one by one",
            "Encode the whole text: a word that has lost its leading space has other tokens.",
            edit("len(encode_bpe(text, merges))", "sum(len(encode_bpe(word, merges)) for word in text.split())"),
        ),
        Mistake(
            "premium of fertilities",
            "The premium compares tokens, and not tokens per word: languages cut words differently.",
            edit(
                "tokens[name] / tokens[baseline]",
                "tokens[name] / len(text.split()) / (tokens[baseline] / len(texts[baseline].split()))",
            ),
        ),
    )

    def cases(self, rng, variant):
        merges = [
            (32, ord("a")),
            (256, ord("n")),
            (ord("t"), ord("h")),
            (258, ord("e")),
            (0xD0, 0xB0),
            (0xE4, 0xBA),
            (32, 259),
        ]
        texts = {
            "English": "the man and the other, an ant",
            "Russian": "человек, а не муравей",
            "Chinese": "人人生而自由, 平等",
            "code": "def f(a):\n    return a + the[0]",
        }
        names = rng.shuffled(list(texts))
        shuffled = {name: texts[name] for name in names}
        yield Case("four texts", {"texts": shuffled, "merges": merges, "baseline": "English"})
        yield Case("another baseline", {"texts": shuffled, "merges": merges, "baseline": names[0]})
        yield Case("the baseline alone", {"texts": {"a": "an ant"}, "merges": merges, "baseline": "a"})
        words = ["".join(word) for word in some_words(rng, list("anthe"), 10, 6)]
        yield Case(
            "white space of all kinds",
            {"texts": {"x": "  " + "  \n".join(words), "y": "the ant "}, "merges": merges, "baseline": "y"},
        )

    def expected(self, inputs, variant):
        lengths = {name: len(encode_bpe(text, inputs["merges"])) for name, text in inputs["texts"].items()}
        return {
            name: {
                "fertility": lengths[name] / len(text.split()),
                "premium": lengths[name] / lengths[inputs["baseline"]],
            }
            for name, text in inputs["texts"].items()
        }


REFERENCES = {
    cls.exercise: cls()
    for cls in (MeasureTokens, CountPairs, MergePair, TrainBpe, EncodeBpe, DecodeBpe, EncodeSpecial, Fertility)
}
