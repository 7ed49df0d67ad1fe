# %% [markdown]
# # Lab 01: Tokenization
#
# A language model never sees text. It sees a list of whole numbers, its **tokens**, and everything that it costs is
# paid per token: one pass through all layers for each of them, one row of keys and values in the cache, and attention
# scores for every pair. A tokenizer that says the same thing in half as many tokens makes every later technique
# of this course twice as cheap before it begins, and attention four times.
#
# In this lab you compare the three ways to cut a text, words, characters and subwords, and then build the one that
# won: **byte-level byte-pair encoding** (BPE), the tokenizer of GPT-2 and, with small changes, of most models since.
# At the end your encoder gives the same ids as two production libraries, token for token.
#
# | | exercise | points | minutes | difficulty |
# |---|---|---|---|---|
# | 1 | `measure_tokens`: three numbers for a tokenization | 1 | 15 | 1 of 5 |
# | 2 | `count_pairs`: count the pairs | 1 | 15 | 2 of 5 |
# | 3 | `merge_pair`: merge one pair | 1.5 | 20 | 2 of 5 |
# | 4 | `train_bpe`: train byte-level BPE | 3 | 45 | 3 of 5 |
# | 5 | `encode_bpe`: encode by rank | 2 | 40 | 3 of 5 |
# | 6 | `decode_bpe`: decode any bytes | 1.5 | 25 | 2 of 5 |
# | stretch | `encode_special`: special tokens | badge | 30 | 3 of 5 |
# | stretch | `fertility`: scripts and code | badge | 20 | 2 of 5 |
#
# **Time.** About three and a half hours: the core exercises, the reading and the measurements. Stretch exercises come on top.
#
# **You need** Python's lists, dictionaries, strings and bytes; no model is trained here, and no GPU is needed.
#
# **How a check works.** Under each blank stands one call, `check(...)`. It runs your function on fresh random cases,
# compares with a reference, and says what went wrong, by name where it recognises the slip. Run it as often as you like.
#
# {assistants} The six core blanks are 3 to 10 lines each, and the point of the lab is that you have once held the whole
# algorithm in your own head.
#
# **Libraries.** `tokenizers`, `tiktoken`, `sentencepiece`, `transformers` and this kit's own tokenizer are refused
# inside your answers, and are compared with them in the demos.

# %% tags=["parameters"]
DEVICE = "auto"
FAST = "auto"

# %%
import effnlp_lab
from effnlp_lab import check

from collections import Counter

import regex

device = effnlp_lab.start("01_tokenization", device=DEVICE, fast=FAST)

# %% [markdown]
# ## 1. Words, characters, subwords
#
# Here is one sentence, cut in three ways (where a subword tokenizer cuts depends on its training). Spaces are part of the text, so we keep them, drawn as `·` before the word
# that they lead:
#
# ```
#  character   [T][h][i][s][·][i][s][·][t][o][k][e][n][i][z][i][n][g][.]     19 tokens
#  subword     [This]      [·is]   [·token]      [izing]            [.]       5 tokens
#  word        [This]      [·is]   [·tokenizing]                    [.]       4 tokens
#
#              few symbols <---------------------------------> short sequences
# ```
#
# Each end has its price.
#
# - A **word** vocabulary is large and never large enough. Every row of the embedding and of the output layer is a vector
#   of weights, so a vocabulary of $V$ tokens in a model of width $d$ costs $2Vd$ weights; and a word that training
#   never met becomes `<unknown>`: its meaning is lost before the model starts.
# - A **character** vocabulary is small, but the sequences are long and a single letter means little.
# - **Subwords** keep frequent words whole and spell rare ones in pieces, so that nothing is unknown.
#
# The next cell has the two simple ways as code. Both lose nothing: the tokens joined are the text again. The pattern
# that cuts words is GPT-2's (Radford et al., 2019). We call its pieces **pre-tokens**; a leading space stays with its
# word.

# %%
GPT2_PATTERN = regex.compile(r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


def pretokenize(text: str) -> list[str]:
    """The pre-tokens of `text`: words with their leading space, numbers, punctuation, white space."""
    return GPT2_PATTERN.findall(text)


def characters(text: str) -> list[str]:
    """The characters (Unicode code points) of `text`."""
    return list(text)


# %% tags=["nbval-check-output"]
sample = "This is tokenizing."
print("words     ", pretokenize(sample))
print("characters", characters(sample))

# %% [markdown]
# ### Exercise 1: three numbers for a tokenization
#
# *1 point, about 15 minutes, difficulty 1 of 5.*
#
# To compare ways of cutting we need numbers. Let `train` be the tokens of a training text and `test` those of another
# text, cut in the same way. With the vocabulary $\mathcal{V}$, the set of tokens that occur in `train`,
#
# $$\text{vocabulary} = |\mathcal{V}|, \qquad
# \text{unknown rate} = \frac{|\{i : \text{test}_i \notin \mathcal{V}\}|}{|\text{test}|}, \qquad
# \text{tokens per byte} = \frac{|\text{test}|}{\text{bytes of the test text}}.$$
#
# Why bytes? Because they do not depend on the tokenizer, nor on the script. In UTF-8 an English letter takes one byte,
# `é` two, `中` three and most emoji four. The test text is `test` joined, since nothing was lost.
#
# <details><summary>Hint 1</summary>
#
# Which of the three numbers looks at distinct tokens, and which at every occurrence? The formula for the unknown rate
# runs over positions $i$, so a token that occurs five times counts five times.
# </details>
# <details><summary>Hint 2</summary>
#
# A `set` of the training tokens answers "is it known?" at once. `"".join(test)` is the test text, and
# `text.encode("utf-8")` are its bytes.
# </details>

# %% exercise="measure_tokens"
def measure_tokens(train: list[str], test: list[str]) -> dict[str, int | float]:
    """Vocabulary size, unknown rate and tokens per byte of a way to cut texts.

    train: tokens of the training text (may be empty: then every token of `test` is unknown)
    test: tokens of the test text, at least one, none of them empty
    Returns {"vocabulary": int, the number of distinct tokens in `train`,
             "unknown_rate": float from 0 to 1, the share of `test` that is not in the vocabulary,
             "tokens_per_byte": float, tokens in `test` over the UTF-8 bytes of the test text}.
    """
    ### BEGIN SOLUTION
    vocabulary = set(train)
    unknown = sum(token not in vocabulary for token in test)
    text_bytes = len("".join(test).encode("utf-8"))
    return {
        "vocabulary": len(vocabulary),
        "unknown_rate": unknown / len(test),
        "tokens_per_byte": len(test) / text_bytes,
    }
    ### END SOLUTION


# %% check="measure_tokens"
check("measure_tokens", measure_tokens)

# %% [markdown]
# ### Measure it
#
# The course's text is Python source that is already on your machine: its comments and docstrings are English, the rest
# is code. Some files are kept apart as the test text. The exact text differs between Python versions, and so do the
# figures below, a little.
#
# **Predict first.** Of a hundred words (pre-tokens) in the test text, how many never occurred in the training text?
# Write your guess in the next cell before you run the one after it. It counts a little, by how close it is; and a
# prediction that fails is what makes a measurement stick.

# %% predict="unknown_words"
my_unknown_words_of_100 = None  # your guess, a number from 0 to 100

# %% tags=["demo"]
from effnlp_lab.course.text import load_text, text_version

train_size = device.pick(fast=1_000_000, full=8_000_000)
test_size = device.pick(fast=100_000, full=1_000_000)
train_text = "".join(load_text("course-train", limit_bytes=train_size).texts())
test_text = "".join(load_text("course-heldout", limit_bytes=test_size).texts())
test_bytes = len(test_text.encode("utf-8"))
print(f"training text {len(train_text):,} characters, test text {len(test_text):,} ({text_version()})")
print(test_text[1000:1400])

# %% tags=["demo"] needs=["measure_tokens"]
by_word = measure_tokens(pretokenize(train_text), pretokenize(test_text))
by_character = measure_tokens(characters(train_text), characters(test_text))
print(f"{'':12}{'vocabulary':>12}{'unknown':>10}{'tokens per byte':>18}")
for way, row in (("characters", by_character), ("words", by_word)):
    print(f"{way:12}{row['vocabulary']:12,}{row['unknown_rate']:10.2%}{row['tokens_per_byte']:18.3f}")
if my_unknown_words_of_100 is not None:
    print(f"You predicted {my_unknown_words_of_100} unknown words of 100; "
          f"measured: {100 * by_word['unknown_rate']:.1f}.")

# %% [markdown]
# Two lessons are in the table. Characters: a vocabulary of hundreds (a thousand or two at full size), almost nothing unknown,
# and about one token a byte, the longest sequences there are. Words: short sequences, but tens of times the vocabulary, and
# still a share of the test text is lost. Would more training text mend that? Only slowly, as the next plot shows.
#
# ### Why words run out: Zipf's law
#
# Sort the words by how often they occur. The frequency of the word of rank $r$ falls roughly as $f(r) \propto r^{-s}$
# with $s$ near 1 (Zipf, 1935): a straight line on logarithmic axes. The line's right end is a long shelf of words that
# occur once, and the next text brings its own shelf. However much we read, new words keep coming.

# %% tags=["demo"]
from effnlp_lab.notebook import plots

frequency = sorted(Counter(pretokenize(train_text)).values(), reverse=True)
ranks = range(1, len(frequency) + 1)
once = sum(count == 1 for count in frequency) / len(frequency)
figure, axes = plots.figure(
    "Words of the training text by frequency", "rank of the word", "occurrences",
    caption=f"{once:.0%} of the {len(frequency):,} distinct words occur exactly once.",
)
axes.loglog(ranks, frequency, marker="", label="measured")
axes.loglog(ranks, [frequency[0] / r for r in ranks], marker="", label="Zipf's law, slope -1")
axes.set_ylim(bottom=0.7)
axes.legend()
plots.show(figure, f"Occurrences of each word against its rank on logarithmic axes: close to a "
                   f"straight line of slope minus one, ending in a shelf of words that occur once, "
                   f"{once:.0%} of all.")

# %% [markdown]
# ## 2. Byte-pair encoding: count the pairs
#
# BPE (Gage, 1994; for words, Sennrich, Haddow and Birch, 2016) starts from the smallest pieces and grows larger ones
# where they pay. We start from **bytes**: there are 256, every text in every script is made of them, and so nothing can
# be unknown. Then we look for the pair of neighbours that occurs most often, write it as one new token, and repeat:
#
# ```
#  a a a b d a a a b a c        most frequent pair: (a, a), 4 times     Z = aa
#  Z   a b d Z   a b a c        most frequent pair: (a, b), twice       Y = ab
#  Z   Y   d Z   Y   a c        most frequent pair: (Z, Y), twice       X = ZY
#  X       d X       a c        every pair occurs once: 5 tokens
# ```
#
# From 11 tokens to 5, with three new symbols. (In the second line (Z, a) occurs twice as well; section 4 settles ties.) The vocabulary is as large as you let it grow: its size is yours to choose.
#
# Two conventions keep this cheap and sensible. Pairs are counted **inside pre-tokens** only, so that no token spans
# two words; and as a word such as `·the` occurs thousands of times, we keep each distinct word once, with its count.
# A word is then a list of ids; the id of a byte is its value, 0 to 255.

# %%
def count_words(text: str) -> tuple[list[list[int]], list[int]]:
    """The distinct pre-tokens of `text`, each as the list of its bytes, and how often each occurs."""
    counts = Counter(pretokenize(text))
    return [list(word.encode("utf-8")) for word in counts], list(counts.values())


# %% tags=["nbval-check-output"]
for seen, times in zip(*count_words("see the sea, the sea")):
    print(times, bytes(seen), seen)

# %% [markdown]
# ### Exercise 2: count the pairs
#
# *1 point, about 15 minutes, difficulty 2 of 5.*
#
# $$\text{count}(a, b) = \sum_w c_w \cdot |\{i : w_i = a,\ w_{i+1} = b\}|,$$
#
# where $w$ runs over the distinct words and $c_w$ is how often word $w$ occurs. Note what the formula says of runs: it
# counts positions $i$, so in `a a a` the pair (a, a) occurs **twice**, at positions 0 and 1. Occurrences may overlap.
#
# <details><summary>Hint 1</summary>
#
# A word of $n$ ids has $n - 1$ pairs of neighbours. `zip(word, word[1:])` walks over them.
# </details>
# <details><summary>Hint 2</summary>
#
# `pairs.get(pair, 0)` is the count so far, 0 for a pair that is new. Add the count of the word, not 1.
# </details>

# %% exercise="count_pairs"
def count_pairs(words: list[list[int]], counts: list[int]) -> dict[tuple[int, int], int]:
    """How often each pair of neighbouring ids occurs.

    words: distinct or not, each a list of ids; a word of fewer than two ids has no pairs
    counts: how often each word occurs, at least 1; as many as words
    Returns a dict from (left id, right id), a tuple, to the count. Occurrences overlap: (7, 7) occurs
    twice in [7, 7, 7]. A pair that occurs nowhere is not in the dict. No pair spans two words.
    """
    ### BEGIN SOLUTION
    pairs = {}
    for word, count in zip(words, counts):
        for pair in zip(word, word[1:]):
            pairs[pair] = pairs.get(pair, 0) + count
    return pairs
    ### END SOLUTION


# %% check="count_pairs"
check("count_pairs", count_pairs)

# %% tags=["demo"] needs=["count_pairs"]
course_words, course_counts = count_words(train_text)
found = count_pairs(course_words, course_counts)
print(f"{len(course_words):,} distinct words, {len(found):,} distinct pairs; the most frequent:")
for top in sorted(found, key=found.get, reverse=True)[:8]:
    print(f"  {bytes(top)!r:8} {found[top]:8,}")

# %% [markdown]
# ## 3. Merge one pair
#
# ### Exercise 3: merge one pair
#
# *1.5 points, about 20 minutes, difficulty 2 of 5.*
#
# Merging rewrites a word: every occurrence of the pair becomes the new id. Here, unlike in counting, occurrences **cannot**
# overlap, because an id that is used up is gone. We read from left to right:
#
# ```
#  word             pair     new id     result
#  [c, a, b, d]     (a, b)   X          [c, X, d]
#  [a, a, a]        (a, a)   X          [X, a]         and not [a, X], nor [X, X]
#  [a, a, a, a]     (a, a)   X          [X, X]
# ```
#
# <details><summary>Hint 1</summary>
#
# A `for` loop over positions cannot skip. Use `while`, and step by 2 after a merge and by 1 otherwise.
# </details>
# <details><summary>Hint 2</summary>
#
# Mind the end of the word: the last id has no right neighbour, and must not be lost. A slice helps:
# `word[i : i + 2]` is shorter than two at the end, and so never equals the pair.
# </details>

# %% exercise="merge_pair"
def merge_pair(word: list[int], pair: tuple[int, int], new_id: int) -> list[int]:
    """`word` with every occurrence of `pair` replaced by `new_id`, from left to right, without overlaps.

    word: a list of ids, possibly empty; it stays as it is
    pair: (left id, right id); the two may be equal
    new_id: an id that does not occur in `word`
    Returns a new list.
    """
    ### BEGIN SOLUTION
    merged = []
    i = 0
    while i < len(word):
        if tuple(word[i : i + 2]) == pair:
            merged.append(new_id)
            i += 2
        else:
            merged.append(word[i])
            i += 1
    return merged
    ### END SOLUTION


# %% check="merge_pair"
check("merge_pair", merge_pair)

# %% [markdown]
# ## 4. Train
#
# Training is the loop around what you have: count, choose, merge, and again.
#
# $$(a^*, b^*) = \operatorname*{arg\,max}_{(a, b)} \ \text{count}(a, b)$$
#
# The list of merges, in order, **is** the tokenizer: the merge with number $m$ (from 0) makes the token with id
# $256 + m$. One thing is left open, and decides whether two programs agree: which pair wins when several have the
# highest count? Your rule is printed by the next cell. It may differ from your neighbour's.

# %%
effnlp_lab.variant("train_bpe")

# %% [markdown]
# ### Exercise 4: train byte-level BPE
#
# *3 points, about 45 minutes, difficulty 3 of 5.*
#
# Pairs are compared as tuples of ids: (3, 9) is smaller than (5, 1), and (5, 1) smaller than (5, 2). With the rule
# "smallest" and three pairs at the highest count, (5, 2), (3, 9) and (5, 1), the winner is (3, 9); with "largest", (5, 2).
#
# `vocab_size` counts all tokens, the 256 bytes included. Training ends when the vocabulary is full or when no pair is
# left. A pair that occurs only once is merged like any other.
#
# You may call `count_pairs` and `merge_pair`. Counting everything again after each merge is slow, and it is the
# definition; the demo shows what a production trainer does instead.
#
# <details><summary>Hint 1</summary>
#
# The new ids are `range(256, vocab_size)`. For each of them: count the pairs, stop if there are none, choose the best,
# rewrite all words, note the pair.
# </details>
# <details><summary>Hint 2</summary>
#
# `max(pairs, key=pairs.get)` returns the *first* of several best pairs in the order of the dict, and so breaks ties by
# accident. `max` and `min` can compare tuples: give them a key that holds the count *and* the pair.
# </details>
# <details><summary>Hint 3</summary>
#
# "Highest count, then smallest pair" mixes a maximum with a minimum. Negate the count, and both are minima:
# the key of a pair is `(-count, pair)`. For "highest count, then largest pair" both are maxima.
# </details>

# %% exercise="train_bpe"
def train_bpe(words: list[list[int]], counts: list[int], vocab_size: int) -> list[tuple[int, int]]:
    """The merges of byte-pair encoding, in the order of training (Sennrich et al., 2016, algorithm 1).

    words: distinct pre-tokens, each a list of byte values; counts: how often each occurs, at least 1.
        Both stay as they are
    vocab_size: the number of tokens to reach, the 256 bytes included; 256 or less means no merges
    Returns the list of merged pairs (left id, right id), tuples. Merge number m, from 0, makes the id
    256 + m. Of several pairs with the highest count your tie rule chooses one; pairs are compared as
    tuples of ids. Ends early when no word has two ids left.
    """
    ### BEGIN SOLUTION
    merges = []
    for new_id in range(256, vocab_size):
        pairs = count_pairs(words, counts)
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        words = [merge_pair(word, best, new_id) for word in words]
        merges.append(best)
    return merges
    ### END SOLUTION


# %% check="train_bpe"
check("train_bpe", train_bpe)

# %% tags=["demo", "nbval-check-output"] needs=["merge_pair", "train_bpe"]
toy_merges = train_bpe([list(b"aaabdaaabac")], [1], 259)
toy = list(b"aaabdaaabac")
for step, chosen in enumerate(toy_merges):
    toy = merge_pair(toy, chosen, 256 + step)
    print(f"merge {step}: {chosen} -> {256 + step}   {len(toy)} tokens left")

# %% [markdown]
# ### Measure it
#
# **Predict first.** Your trainer counts every pair again for every merge. The kit's trainer keeps an index from pairs to
# the words that hold them, and corrects the counts of those words alone; Hugging Face's `tokenizers` does the same
# in Rust. On the same text and the same number of merges: how many times faster than yours will `tokenizers` be?

# %% predict="training_speedup"
my_speedup_of_tokenizers = None  # your guess: 2, 10, 100, ...

# %% tags=["demo"] needs=["train_bpe"]
from effnlp_lab.notebook import bench
from effnlp_lab.tokenization.heap_trainer import train_heap

try:
    import tokenizers
except ImportError:
    tokenizers = None

small_text, small_size = train_text[:150_000], 256 + device.pick(fast=100, full=300)


def train_tokenizers(text, vocab_size):
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = byte_level
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=byte_level.alphabet(), show_progress=False)
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer


contestants = {
    "yours": lambda: train_bpe(*count_words(small_text), small_size),
    "the kit": lambda: train_heap(*count_words(small_text), small_size),
}
missing = {}
if tokenizers:
    contestants["tokenizers"] = lambda: train_tokenizers(small_text, small_size)
else:
    missing["tokenizers"] = "not installed: pip install tokenizers"
speed = bench.compare(
    f"From {len(small_text):,} characters to {small_size - 256} merges", contestants,
    ours="yours", peer="tokenizers", repeats=3, warmup=0, device=device, missing=missing)
print(speed.table())
if my_speedup_of_tokenizers is not None and speed.ratio:
    print(f"You predicted that tokenizers is {my_speedup_of_tokenizers} times faster; "
          f"measured: {1 / speed.ratio:.0f} times.")

# %% [markdown]
# The work of your trainer is (number of merges) x (length of all distinct words): each merge reads everything. With an
# index a merge touches only the words that hold its pair, and most pairs are rare, so that later merges cost almost
# nothing. The gap therefore widens with the vocabulary: ten times the merges cost you nearly ten times as long, and
# the libraries, which spend most of their time on reading the text, little more. When you have solved your own, read the kit's
# `effnlp_lab/tokenization/heap_trainer.py`: it is 80 lines.
#
# ### Are they the same merges?
#
# Speed is worth nothing if the result differs. `tokenizers` breaks ties by the smallest pair of ids, but numbers the 256
# bytes in another order (GPT-2's: printable characters first). Your function does not care what the first 256 ids
# mean, so we hand it the words in that numbering and compare the two lists of merges.

# %% tags=["demo"] needs=["train_bpe"]
import tempfile
from pathlib import Path

from effnlp_lab.tokenization.alphabet import ids_of
from effnlp_lab.tokenization.tokenizer import Tokenizer

counted = Counter(pretokenize(small_text))
gpt2_words = [ids_of(word.encode("utf-8")) for word in counted]  # the bytes in GPT-2's numbering
mine = train_bpe(gpt2_words, list(counted.values()), small_size)
my_rule = "smallest" if train_bpe([[1, 2], [3, 4]], [1, 1], 257) == [(1, 2)] else "largest"
kit = train_heap(gpt2_words, list(counted.values()), small_size, ties=my_rule)
print(f"the kit, ties to the {my_rule}: {len(mine)} merges, identical: {mine == kit}")
if tokenizers:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tokenizer.json"
        train_tokenizers(small_text, small_size).save(str(file))
        theirs = Tokenizer.load(file).merges
    same = next((n for n, (a, b) in enumerate(zip(mine, theirs)) if a != b), len(mine))
    print(f"tokenizers, ties to the smallest: {len(theirs)} merges, identical: {mine == theirs}")
    if mine != theirs:
        why = ", because your tie rule is another" if my_rule == "largest" else ""
        print(f"They part at merge {same}{why}.")
else:
    print("tokenizers is not installed, and so was not compared: pip install tokenizers")

# %% [markdown]
# ## 5. Encode
#
# A new text, and a list of merges. Which tokens? The tempting answer is to take the longest token that fits, from the left.
# That is another tokenizer. BPE **replays its training**: in each word, of all pairs of neighbours that are
# among the merges, it merges the one that training merged *first*, the one of the lowest rank; and again, until no
# pair of the word is among the merges. The **rank** of a pair is its place in the list of merges.
#
# ```
#  merges    rank 0: (l, o)=lo    rank 1: (e, r)=er    rank 2: (o, w)=ow    rank 3: (ow, e)=owe
#
#  o w e r   ranks of the pairs:  (o, w) 2   (w, e) none   (e, r) 1     lowest: (e, r)
#  o w er    ranks of the pairs:  (o, w) 2   (w, er) none               lowest: (o, w)
#  ow er     ranks of the pairs:  (ow, er) none                         done: 2 tokens
#
#  the longest match from the left would have given   owe r
# ```
#
# Both cover the word with two tokens; only one is what the model saw in training.
#
# ### Exercise 5: encode by rank
#
# *2 points, about 40 minutes, difficulty 3 of 5.*
#
# $$\text{next merge} = \operatorname*{arg\,min}_{i} \ \text{rank}(w_i, w_{i+1})$$
#
# over the pairs of the word that have a rank. Cut the text with `pretokenize` first: no merge crosses a boundary between
# pre-tokens. Each pre-token starts as its bytes in UTF-8.
#
# <details><summary>Hint 1</summary>
#
# A dict from pair to rank answers "is it among the merges, and when was it made?" at once:
# `{pair: number for number, pair in enumerate(merges)}`.
# </details>
# <details><summary>Hint 2</summary>
#
# For one word: list the neighbours that are in the dict. None left: done. Otherwise take the one of the lowest rank $r$
# and call `merge_pair(word, pair, 256 + r)`. If the pair occurs several times in the word, all of them go at once.
# </details>
# <details><summary>Hint 3</summary>
#
# Another right way: go through all merges in order, and apply each to the word. Why does it give the same? Because a
# merge can only make pairs that hold its new id, and these have higher ranks. It is slow: thousands of merges a word.
# </details>

# %% exercise="encode_bpe"
def encode_bpe(text: str, merges: list[tuple[int, int]]) -> list[int]:
    """The token ids of `text`.

    text: any str, possibly empty
    merges: as train_bpe returns them; the pair at place r has rank r and makes the id 256 + r. No pair
        occurs twice, and a merge uses only bytes and ids that earlier merges made
    Returns the ids of all pre-tokens (`pretokenize`), one after another. Each begins as the values of
    its UTF-8 bytes; the pair of the lowest rank is merged, wherever in the pre-token it stands, until
    none of the pre-token's pairs is in `merges`.
    """
    ### BEGIN SOLUTION
    rank = {pair: number for number, pair in enumerate(merges)}
    ids = []
    for pretoken in pretokenize(text):
        word = list(pretoken.encode("utf-8"))
        while known := [pair for pair in zip(word, word[1:]) if pair in rank]:
            best = min(known, key=lambda pair: rank[pair])
            word = merge_pair(word, best, 256 + rank[best])
        ids += word
    return ids
    ### END SOLUTION


# %% check="encode_bpe"
check("encode_bpe", encode_bpe)

# %% tags=["demo", "nbval-check-output"] needs=["encode_bpe"]
example_merges = [(ord("l"), ord("o")), (ord("e"), ord("r")), (ord("o"), ord("w")), (258, ord("e"))]
print("ower ->", encode_bpe("ower", example_merges), "  (258 is ow, 257 is er)")

# %% [markdown]
# Now with merges from real text. The cell after next paints the tokens of a few sentences; a border marks each token, and
# the number under it is its id.

# %% tags=["demo"] needs=["encode_bpe"]
from effnlp_lab.tokenization.heap_trainer import train_heap
from effnlp_lab.tokenization.plain import vocabulary as spell

# the kit's trainer, because yours would take minutes here
course_merges = train_heap(*count_words(train_text), device.pick(fast=4096, full=32_768))
course_tokens = spell(course_merges, [bytes([byte]) for byte in range(256)])
longest = sorted((t for t in course_tokens if t.strip().isalpha()), key=len, reverse=True)[:5]
print(f"{len(course_tokens):,} tokens. The first merges made {course_tokens[256:264]}")
print(f"The longest tokens of letters are {longest}")

# %% tags=["demo"] needs=["encode_bpe"]
import html

from IPython.display import display


def paint(text):
    """Show the tokens of `text`, each in a box over its id; a space is drawn as a dot."""
    ids = encode_bpe(text, course_merges)
    pieces = [course_tokens[i].decode("utf-8", errors="replace") for i in ids]
    pieces = [piece.replace(" ", "\u00b7").replace("\n", "\u21b5") for piece in pieces]
    boxes = "".join(
        '<span style="display:inline-block;text-align:center;margin:2px 1px">'
        '<code style="border:1px solid currentColor;border-radius:3px;padding:1px 3px">'
        f"{html.escape(piece)}</code><br><small>{i}</small></span>"
        for piece, i in zip(pieces, ids))
    note = f"{len(ids)} tokens, {len(text.encode('utf-8')) / len(ids):.2f} bytes a token"
    display({"text/html": f"<div>{boxes} <small>{note}</small></div>",
             "text/plain": f"{' | '.join(pieces)}   {note}"}, raw=True)


for line in ("This is tokenizing.", "def tokenize(self, text):\n    return self.encode(text)",
             "antidisestablishmentarianism", "Wie hei\u00dft du? \u4f60\u597d \U0001f642"):
    paint(line)

# %% [markdown]
# ### The same ids as the libraries
#
# The oracle of this lab was written by others. We give your merges to Hugging Face's `tokenizers` and to OpenAI's
# `tiktoken`, encode the same test text with all of them, and compare the ids. If one differs, the cell says where. The
# speeds come after a warm-up run; the kit and `tokenizers` remember words that they have met, which most words are.

# %% tags=["demo"] needs=["encode_bpe"]
import tempfile
from pathlib import Path

from effnlp_lab.notebook import bench
from effnlp_lab.tokenization.tokenizer import Tokenizer

part = test_text[:50_000]
part_bytes = len(part.encode("utf-8"))
kit_tokenizer = Tokenizer(course_tokens, course_merges)
encoders = {
    "yours": lambda: encode_bpe(part, course_merges),
    "the kit": lambda: kit_tokenizer.encode(part),
}
missing = {}
try:
    import tokenizers
    with tempfile.TemporaryDirectory() as folder:
        file = kit_tokenizer.save(Path(folder) / "tokenizer.json")
        hugging = tokenizers.Tokenizer.from_file(str(file))
    encoders["tokenizers"] = lambda: hugging.encode(part).ids
except ImportError:
    missing["tokenizers"] = "not installed: pip install tokenizers"
try:
    import tiktoken
    openai = tiktoken.Encoding("lab01", pat_str=GPT2_PATTERN.pattern,
                               mergeable_ranks=kit_tokenizer.ranks(), special_tokens={})
    encoders["tiktoken"] = lambda: openai.encode(part)
except ImportError:
    missing["tiktoken"] = "not installed: pip install tiktoken"

mine = encode_bpe(part, course_merges)
for library, encode in encoders.items():
    theirs = encode()
    part_at = next((n for n, (a, b) in enumerate(zip(mine, theirs)) if a != b), len(mine))
    verdict = "identical to yours" if theirs == mine else f"they part from yours at id {part_at}"
    if library != "yours":
        print(f"{library:12}{len(theirs):,} ids, {verdict}")
print()
encoding = bench.compare(
    f"Encoding {part_bytes:,} bytes with {len(course_tokens):,} tokens", encoders, ours="yours",
    peer="tokenizers", unit="MB/s", work=part_bytes, repeats=3, warmup=1, device=device, missing=missing)
print(encoding.table())

# %% [markdown]
# ### How large should a vocabulary be?
#
# Here is the trade that you now control. Each point on the curve is a tokenizer with another number of merges; the two
# marks are the extremes from section 1.

# %% tags=["demo"] needs=["measure_tokens"]
from effnlp_lab.notebook import plots
from effnlp_lab.tokenization.heap_trainer import train_heap
from effnlp_lab.tokenization.plain import vocabulary as spell
from effnlp_lab.tokenization.tokenizer import Tokenizer

all_merges = train_heap(*count_words(train_text), device.pick(fast=4096, full=32_768))
all_tokens = spell(all_merges, [bytes([byte]) for byte in range(256)])
sizes = [256 * 2**n for n in range(8) if 256 * 2**n <= len(all_tokens)]
sized = [Tokenizer(all_tokens[:size], all_merges[: size - 256]) for size in sizes]
rates = [len(tokenizer.encode(test_text)) / test_bytes for tokenizer in sized]

figure, axes = plots.figure("What a larger vocabulary buys", "vocabulary (tokens)", "tokens per byte",
                            caption="Lower is better. Characters and words are points; BPE lets you choose.")
axes.plot(sizes, rates, label="byte-level BPE, nothing unknown")
_, second, third = plots.looks(3)
for way, row, look in (("characters", by_character, second), ("words", by_word, third)):
    axes.plot(row["vocabulary"], row["tokens_per_byte"], **{**look, "linestyle": "", "markersize": 8},
              label=f"{way}, {row['unknown_rate']:.1%} unknown")
axes.set_xscale("log", base=2)
axes.set_xticks(sizes + [2 * sizes[-1]], [f"{size:,}" for size in sizes + [2 * sizes[-1]]])
axes.set_ylim(0, 1.1)
axes.legend()
points = ", ".join(f"{rate:.2f} at {size:,}" for size, rate in zip(sizes, rates))
plots.show(figure, f"Tokens per byte against vocabulary size: {points}. Characters lie near 1, words "
                   "lower and far to the right.")
for size, rate in zip(sizes, rates):
    print(f"{size:8,} tokens: {rate:.3f} tokens per byte, {1 / rate:.2f} bytes per token")

# %% [markdown]
# Read the curve from the left. The first few hundred merges buy most of the saving; every doubling after that buys
# less, while the embedding and the output layer double. This is why small models use vocabularies of 4,096 to 50,000
# tokens and large models 100,000 and more: in a large model those matrices weigh less beside everything else.
#
# ## 6. Decode
#
# The way back is a lookup: every id stands for some bytes. Ids below 256 stand for the byte of that value, and the id
# $256 + m$ for the bytes of the left half of merge $m$ followed by those of its right half.
#
# There is one trap. A character of another script takes two to four bytes, and a token may hold only part of them:
#
# | text | its bytes | tokens | each token decoded alone | bytes joined first |
# |---|---|---|---|---|
# | é | `C3 A9` | `[C3] [A9]` | � � | é |
# | 🙂 | `F0 9F 99 82` | `[F0 9F] [99] [82]` | � � � | 🙂 |
#
# And a model may write any ids whatever, so some lists of ids are no valid UTF-8 at all. Decoding must not raise: what
# is invalid becomes U+FFFD, the replacement character `�`, exactly as Python's `errors="replace"` does it, or is
# written out, as `errors="backslashreplace"` does it: a reader wants the one, whoever looks for a bug the other. Yours:

# %%
effnlp_lab.variant("decode_bpe")

# %% [markdown]
# ### Exercise 6: decode any bytes
#
# *1.5 points, about 25 minutes, difficulty 2 of 5.*
#
# $$\text{bytes}(256 + m) = \text{bytes}(a_m) \, \| \, \text{bytes}(b_m), \qquad
# \text{text} = \text{UTF-8}^{-1}\big(\text{bytes}(t_1) \, \| \, \text{bytes}(t_2) \, \| \dots\big)$$
#
# where $(a_m, b_m)$ is merge $m$ and $\|$ joins.
#
# <details><summary>Hint 1</summary>
#
# Build the list of all tokens' bytes first. It begins with `bytes([0])`, `bytes([1])`, ... `bytes([255])`, and each
# merge appends one entry, made of two that are already there.
# </details>
# <details><summary>Hint 2</summary>
#
# `b"".join(...)` joins bytes; `.decode("utf-8", errors=...)` turns them into a str. Once, at the end.
# </details>

# %% exercise="decode_bpe"
def decode_bpe(ids: list[int], merges: list[tuple[int, int]]) -> str:
    """The text of token ids.

    ids: any list of ids from 0 to 255 + len(merges), possibly empty
    merges: as train_bpe returns them
    Returns the str whose UTF-8 bytes are those of the tokens joined. Bytes that are not valid UTF-8
    become what your variant says; nothing is raised.
    """
    ### BEGIN SOLUTION
    tokens = [bytes([byte]) for byte in range(256)]
    for left, right in merges:
        tokens.append(tokens[left] + tokens[right])
    return b"".join(tokens[i] for i in ids).decode("utf-8", errors="replace")
    ### END SOLUTION


# %% check="decode_bpe"
check("decode_bpe", decode_bpe)

# %% tags=["demo", "nbval-check-output"] needs=["encode_bpe", "decode_bpe"]
for line in ("naïve café", "你好, 世界", "🙂🙃", "x = [1, 2]\n"):
    back = decode_bpe(encode_bpe(line, example_merges), example_merges)
    print(f"{line!r:16} comes back unchanged: {back == line}")

# %% [markdown]
# A chat window meets the trap at every emoji: it shows tokens as they arrive, and a token may end in the middle of a
# character. The cure is to hold bytes back until they make a whole character.

# %% tags=["demo"] needs=["encode_bpe", "decode_bpe"]
import codecs

patient = codecs.getincrementaldecoder("utf-8")(errors="replace")
print(f"{'id':>6}  {'bytes':26}{'alone':14}held back until whole")
for one in encode_bpe("Zo\u00eb: \u4f60\u597d \U0001f642", course_merges):
    spelled = course_tokens[one]
    alone = decode_bpe([one], course_merges)
    print(f"{one:6}  {spelled!r:26}{alone!r:14}{patient.decode(spelled)!r}")

# %% [markdown]
# ## Stretch A: special tokens
#
# *A badge, about 30 minutes, difficulty 3 of 5.*
#
# Models need tokens that no text can produce by accident: the end of a document, the start of a chat turn. They are kept
# apart from BPE: cut the text at every special token, encode the pieces between as usual, and put the special id
# where the special token stood. Two rules make this unambiguous: read **from the left**, and where two special
# tokens begin at the same place, the **longer** one is meant.
#
# This is also where a service is attacked: if a user's text may contain `<|end|>` and you encode it with this function,
# the user ends your document. Text from outside belongs through `encode_bpe`.
#
# <details><summary>Hint 1</summary>
#
# A regular expression with `|` between the alternatives reads from the left and tries the alternatives in the order in
# which you wrote them. Which order gives the longer one first?
# </details>
# <details><summary>Hint 2</summary>
#
# Special tokens such as `<|end|>` hold a `|`, which means "or": `regex.escape` makes it a plain letter. With a group
# around the whole pattern, `regex.split` keeps the separators among the pieces.
# </details>

# %% exercise="encode_special"
def encode_special(text: str, merges: list[tuple[int, int]], special: dict[str, int]) -> list[int]:
    """The token ids of `text`, in which special tokens are written out.

    special: text of each special token (at least one, none empty) and its id
    Special tokens are found from the left, and the longest one of those that begin at the same place
    is taken. The text between two of them is encoded by itself, as encode_bpe does.
    Returns the ids, in the order of the text.
    """
    ### BEGIN SOLUTION
    longest_first = sorted(special, key=len, reverse=True)
    pattern = "|".join(regex.escape(name) for name in longest_first)
    ids = []
    for piece in regex.split(f"({pattern})", text):
        if piece in special:
            ids.append(special[piece])
        else:
            ids += encode_bpe(piece, merges)
    return ids
    ### END SOLUTION


# %% check="encode_special"
check("encode_special", encode_special)

# %% tags=["demo"] needs=["encode_special"]
course_special = {"<|end|>": len(course_tokens), "<|user|>": len(course_tokens) + 1}
chat = "<|user|> What does <|end|> mean?<|end|>"
mine = encode_special(chat, course_merges, course_special)
print(mine)
print(f"as plain text, where nobody can end your document: {encode_bpe(chat, course_merges)}")
try:
    import tiktoken
    openai_special = tiktoken.Encoding(
        "lab01-special", pat_str=GPT2_PATTERN.pattern, special_tokens=course_special,
        mergeable_ranks={token: i for i, token in enumerate(course_tokens)})
    print(f"tiktoken gives the same: {openai_special.encode(chat, allowed_special='all') == mine}")
except ImportError:
    print("tiktoken is not installed, and so was not compared: pip install tiktoken")

# %% [markdown]
# ## Stretch B: fertility across scripts and code
#
# *A badge, about 20 minutes, difficulty 2 of 5.*
#
# A tokenizer is fair to what it was trained on. Two numbers show it. **Fertility** (Rust et al., 2021) is the number of
# tokens a word; the **premium** (Petrov et al., 2023) is how many times more tokens a text takes than the same text in
# a baseline language. Who pays by the token pays the premium in money, in waiting time and in context length.
#
# $$\text{fertility} = \frac{\text{tokens}}{\text{words}}, \qquad
# \text{premium} = \frac{\text{tokens}}{\text{tokens of the baseline text}}$$
#
# <details><summary>Hint 1</summary>
#
# A word here is what white space separates, `text.split()`. Chinese, Japanese and Thai do not put spaces between words, and so their
# fertility looks absurd: that is a weakness of the measure, which the premium does not share.
# </details>

# %% exercise="fertility"
def fertility(
    texts: dict[str, str], merges: list[tuple[int, int]], baseline: str
) -> dict[str, dict[str, float]]:
    """Tokens per word, and tokens relative to a baseline, for each text.

    texts: name -> text, each with at least one word; baseline: one of the names
    Returns name -> {"fertility": tokens of the text / number of words in text.split(),
                     "premium": tokens of the text / tokens of the baseline's text}.
    A text's tokens are those of encode_bpe on the whole text.
    """
    ### BEGIN SOLUTION
    tokens = {name: len(encode_bpe(text, merges)) for name, text in texts.items()}
    return {
        name: {"fertility": tokens[name] / len(text.split()), "premium": tokens[name] / tokens[baseline]}
        for name, text in texts.items()
    }
    ### END SOLUTION


# %% check="fertility"
check("fertility", fertility)

# %% tags=["demo"] needs=["fertility"]
from effnlp_lab.notebook import plots

# Article 1 of the Universal Declaration of Human Rights (United Nations, 1948)
declaration = {
    "English": "All human beings are born free and equal in dignity and rights. They are endowed "
               "with reason and conscience and should act towards one another in a spirit of "
               "brotherhood.",
    "French": "Tous les êtres humains naissent libres et égaux en dignité et en droits. Ils sont "
              "doués de raison et de conscience et doivent agir les uns envers les autres dans un "
              "esprit de fraternité.",
    "German": "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit "
              "Vernunft und Gewissen begabt und sollen einander im Geiste der Brüderlichkeit "
              "begegnen.",
    "Russian": "Все люди рождаются свободными и равными в своем достоинстве и правах. Они наделены "
               "разумом и совестью и должны поступать в отношении друг друга в духе братства.",
    "Hindi": "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है। "
             "उन्हें बुद्धि और अन्तरात्मा की देन प्राप्त है और परस्पर उन्हें भाईचारे के भाव से "
             "बर्ताव करना चाहिए।",
    "Chinese": "人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心，并应以兄弟关系的精神相对待。",
    "Japanese": "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。"
                "人間は、理性と良心とを授けられており、互いに同胞の精神をもって行動しなければならない。",
}
report = fertility({**declaration, "Python code": test_text[:2000]}, course_merges, "English")


def bars(title, xlabel, caption, values):
    figure, axes = plots.figure(title, xlabel, "text", caption=caption)
    drawn = axes.barh(list(values), list(values.values()), color=plots.COLOURS["blue"])
    axes.bar_label(drawn, [f"{value:.1f}" for value in values.values()], padding=3)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.1)
    spoken = ", ".join(f"{name} {value:.1f}" for name, value in values.items())
    plots.show(figure, f"{title}, {xlabel}: {spoken}.")


bars("The same article, in tokens", "premium: tokens relative to English",
     "The tokenizer was trained on Python source with English comments.",
     {name: report[name]["premium"] for name in declaration})
bars("Fertility", "tokens per word between white space", "Chinese and Japanese put no spaces between words.",
     {name: row["fertility"] for name, row in report.items()})

# %% [markdown]
# Two things add up in a premium: how many bytes a letter takes in UTF-8 (one in English, two in Russian, three in Hindi,
# Chinese and Japanese), and how much of the script the trainer saw. Chinese says much with few characters, which makes
# up for some of it. Spaces between words are what fertility hangs on: without them it says nothing.
#
# ## The receipt
#
# Every technique of this course has to earn its place by what it saves. Here a small model (width 256, 8 layers, 6.3
# million weights besides the embeddings) reads the same text in tokens of each kind. With $n$ tokens, $P$ weights and a
# vocabulary of $V$ it costs about $2n(P + 256V)$ operations for the matrices and the output layer, and
# $2 \cdot 8 \cdot 256\, n^2$ for causal attention; memory is that of its key-value cache.
# Time is that of cutting the text. The words are cheaper still, and lose a part of what they read; their output layer is
# also the largest.

# %% tags=["demo"] needs=["measure_tokens", "train_bpe", "encode_bpe", "decode_bpe"]
from effnlp_lab.device import ceilings
from effnlp_lab.notebook.receipt import Receipt

WIDTH, LAYERS, KV_WIDTH, BODY = 256, 8, 128, 6_291_456  # a small Llama; BODY: its weights without embeddings
READ = 8192  # bytes of text that it reads


def price(tokens_per_byte, vocabulary_size):
    """Quality, FLOPs (matrices, causal attention, output layer) and bytes of the key-value cache."""
    tokens = tokens_per_byte * READ
    flops = tokens * 2 * (BODY + WIDTH * vocabulary_size) + 2 * LAYERS * WIDTH * tokens**2
    return {"quality": tokens_per_byte, "flops": flops, "peak_bytes": tokens * 2 * KV_WIDTH * LAYERS * 2}


part_ids = encode_bpe(part, course_merges)
own = price(len(part_ids) / part_bytes, len(course_tokens))
exact = "comes back exactly" if decode_bpe(part_ids, course_merges) == part else "does not come back"
simple = {}
for way, cut in (("characters", characters), ("words", pretokenize)):
    row = measure_tokens(cut(train_text), cut(part))
    simple[way] = {**price(row["tokens_per_byte"], row["vocabulary"]),
                   "note": f"{row['unknown_rate']:.1%} unknown"}
receipt = Receipt("01", quality="tokens per byte", device=device,
                  title=f"A small Llama reads {READ:,} bytes; time is that of encoding {part_bytes:,} bytes")
receipt.add("baseline", "characters", **simple["characters"])
cut_seconds = bench.timed(lambda: pretokenize(part), device)
receipt.add("baseline", "words", **simple["words"], seconds=cut_seconds)
receipt.add("yours", "BPE", **own, seconds=encoding.median("yours"), note=f"none unknown, text {exact}")
receipt.add("reference", "the kit", **own, seconds=encoding.median("the kit"), note="same ids")
if "tokenizers" in encoding.seconds:
    receipt.add("library", "tokenizers", **own, seconds=encoding.median("tokenizers"), note="same ids")
copy_seconds = 2 * part_bytes / ceilings(device).copy_bytes_per_second
receipt.add("limit", "memory copy", seconds=copy_seconds, note="copies the text, encodes nothing")
receipt.show()
print(f"saved as {receipt.save().name}")

# %% [markdown]
# ## In your own words
#
# A bank trains a tokenizer for a service that answers in German and English and writes some Python. Should it have 4,000
# tokens or 40,000? Say what you would measure, on which text, and what would decide.
#
# Write 60 to 120 words. A person reads and grades them.

# %% [markdown] written="vocabulary_size"
# **Rubric, for whoever grades** (shares of the points; another answer as good earns them too)
#
# - 0.3: more merges mean fewer tokens a byte, and with them fewer steps and shorter contexts; the gain gets
#   smaller and smaller.
# - 0.3: what a larger vocabulary costs: embedding and output layer, the logits, tokens too rare to be learned.
# - 0.3: measures tokens a byte (fertility) on held-out text of its own, for each language and for code apart.
# - 0.1: names a choice and what would change it.

# %% [markdown]
# ## What you have learned
#
# - Words are never enough (Zipf's law), characters are too many; subwords spell what they do not know, and bytes
#   make "unknown" impossible.
# - BPE is a loop: count pairs (they overlap), merge the best one (merges do not overlap), repeat. The merges, in
#   order, are the whole tokenizer, and the rule for ties is part of it.
# - Encoding replays the merges by rank; the longest match is another tokenizer. Decoding joins bytes first.
# - A larger vocabulary buys shorter sequences with rapidly falling returns; what it buys depends on the text it was
#   trained on, and other scripts pay a premium.
#
# ## Read on
#
# - P. Gage, "A New Algorithm for Data Compression", 1994: where byte pairs come from.
# - R. Sennrich, B. Haddow, A. Birch, "Neural Machine Translation of Rare Words with Subword Units", 2016: algorithm 1 is
#   your `train_bpe`.
# - A. Radford et al., "Language Models are Unsupervised Multitask Learners", 2019, section 2.2: bytes instead of
#   characters, and the pattern that cuts words.
# - T. Kudo, "Subword Regularization", 2018: the unigram tokenizer, the other family.
# - P. Rust et al., "How Good is Your Tokenizer?", 2021; A. Petrov et al., "Language Model Tokenizers Introduce Unfairness
#   Between Languages", 2023: fertility and the premium.
# - In the kit: `effnlp_lab/tokenization/plain.py` is the definition that graded you, `heap_trainer.py` the production
#   algorithm, `tensor_trainer.py` the same merges many at a time on a GPU.
