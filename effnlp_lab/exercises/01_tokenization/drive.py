"""How the answers of lab 01 are called: by position, so that a student may rename the arguments."""


def measure_tokens(answer, train, test):
    return answer(train, test)


def count_pairs(answer, words, counts):
    return answer(words, counts)


def merge_pair(answer, word, pair, new_id):
    return answer(word, pair, new_id)


def train_bpe(answer, words, counts, vocab_size):
    return answer(words, counts, vocab_size)


def encode_bpe(answer, text, merges):
    return answer(text, merges)


def decode_bpe(answer, ids, merges):
    return answer(ids, merges)


def encode_special(answer, text, merges, special):
    return answer(text, merges, special)


def fertility(answer, texts, merges, baseline):
    return answer(texts, merges, baseline)
