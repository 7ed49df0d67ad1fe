"""Right answers of lab 01 that are written differently from the solution: no check may refuse one."""

ANSWERS = {
    "measure_tokens": [
        '''
def measure_tokens(train, test):
    counts = Counter(train)
    known = [token for token in test if counts[token] > 0]
    return {
        "tokens_per_byte": len(test) / sum(len(bytes(token, "utf-8")) for token in test),
        "unknown_rate": 1 - len(known) / len(test),
        "vocabulary": len(counts),
    }
''',
        '''
def measure_tokens(train, test):
    seen, unknown, size = [], 0, 0
    for token in train:
        if token not in seen:
            seen.append(token)
    for token in test:
        unknown += 0 if token in seen else 1
        for letter in token:
            point = ord(letter)
            size += 1 if point < 0x80 else 2 if point < 0x800 else 3 if point < 0x10000 else 4
    return dict(vocabulary=len(seen), unknown_rate=unknown / len(test), tokens_per_byte=len(test) / size)
''',
    ],
    "count_pairs": [
        '''
def count_pairs(words, counts):
    pairs = Counter()
    for number in range(len(words)):
        for i in range(len(words[number]) - 1):
            pairs[words[number][i], words[number][i + 1]] += counts[number]
    return pairs
''',
        '''
def count_pairs(words, counts):
    if not words:
        return {}
    found = count_pairs(words[1:], counts[1:])
    before = None
    for item in words[0]:
        if before is not None:
            found.setdefault((before, item), 0)
            found[before, item] += counts[0]
        before = item
    return found
''',
    ],
    "merge_pair": [
        '''
def merge_pair(word, pair, new_id):
    merged, skip = [], False
    for i, item in enumerate(word):
        if skip:
            skip = False
        elif i + 1 < len(word) and item == pair[0] and word[i + 1] == pair[1]:
            merged.append(new_id)
            skip = True
        else:
            merged.append(item)
    return merged
''',
        '''
def merge_pair(word, pair, new_id):
    merged = []
    for item in word:
        if merged and (merged[-1], item) == pair:
            merged[-1] = new_id
        else:
            merged.append(item)
    return merged
''',
        '''
def merge_pair(word, pair, new_id):
    text = "".join(map(chr, word))
    return [ord(letter) for letter in text.replace(chr(pair[0]) + chr(pair[1]), chr(new_id))]
''',
    ],
    "train_bpe": [
        '''
def train_bpe(words, counts, vocab_size):
    table = [(tuple(word), count) for word, count in zip(words, counts)]
    merges = []
    while 256 + len(merges) < vocab_size:
        pairs = {}
        for word, count in table:
            for i in range(1, len(word)):
                pairs[word[i - 1], word[i]] = pairs.get((word[i - 1], word[i]), 0) + count
        if len(pairs) == 0:
            return merges
        highest = max(pairs.values())
        merges.append(sorted(pair for pair, count in pairs.items() if count == highest)[0])
        new_id, rewritten = 255 + len(merges), []
        for word, count in table:
            new, i = [], 0
            while i < len(word):
                hit = word[i : i + 2] == merges[-1]
                new.append(new_id if hit else word[i])
                i += 2 if hit else 1
            rewritten.append((tuple(new), count))
        table = rewritten
    return merges
''',
        '''
def train_bpe(words, counts, vocab_size):
    words, merges = [list(word) for word in words], []
    pairs = Counter()
    for word, count in zip(words, counts):
        for pair in zip(word, word[1:]):
            pairs[pair] += count
    for new_id in range(256, vocab_size):
        alive = {pair: count for pair, count in pairs.items() if count > 0}
        if not alive:
            break
        best = None
        for pair, count in alive.items():
            if best is None or count > alive[best] or (count == alive[best] and pair < best):
                best = pair
        merges.append(best)
        for number, word in enumerate(words):
            if any(pair == best for pair in zip(word, word[1:])):
                pairs.subtract({p: c * counts[number] for p, c in Counter(zip(word, word[1:])).items()})
                words[number] = merge_pair(word, best, new_id)
                pairs.update({p: c * counts[number]
                              for p, c in Counter(zip(words[number], words[number][1:])).items()})
    return merges
''',
    ],
    "encode_bpe": [
        '''
def encode_bpe(text, merges):
    ids = []
    for piece in pretokenize(text):
        word = list(piece.encode())
        for number, pair in enumerate(merges):
            word = merge_pair(word, pair, 256 + number)
        ids.extend(word)
    return ids
''',
        '''
def encode_bpe(text, merges):
    ranks = dict(zip(merges, range(256, 256 + len(merges))))

    def one(word):
        best, at = None, None
        for i in range(len(word) - 1):
            rank = ranks.get((word[i], word[i + 1]))
            if rank is not None and (best is None or rank < best):
                best, at = rank, i
        return word if best is None else one(word[:at] + (best,) + word[at + 2 :])

    return [i for piece in pretokenize(text) for i in one(tuple(piece.encode("utf8")))]
''',
    ],
    "decode_bpe": [
        '''
def decode_bpe(ids, merges):
    def spell(i):
        if i < 256:
            return bytes([i])
        left, right = merges[i - 256]
        return spell(left) + spell(right)

    data = b""
    for i in ids:
        data += spell(i)
    return str(data, "utf-8", "replace")
''',
        '''
def decode_bpe(ids, merges):
    import codecs

    stack, data = list(ids)[::-1], bytearray()
    while stack:
        top = stack.pop()
        if top > 255:
            left, right = merges[top - 256]
            stack += [right, left]
        else:
            data.append(top)
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    return decoder.decode(bytes(data)) + decoder.decode(b"", final=True)
''',
    ],
    "encode_special": [
        '''
def encode_special(text, merges, special):
    ids, begin, i = [], 0, 0
    while i < len(text):
        here = [name for name in special if text.startswith(name, i)]
        if here:
            name = max(here, key=len)
            ids += encode_bpe(text[begin:i], merges) + [special[name]]
            i += len(name)
            begin = i
        else:
            i += 1
    return ids + encode_bpe(text[begin:], merges)
''',
        '''
def encode_special(text, merges, special):
    places = [(text.find(name), -len(name), name) for name in special if name in text]
    if not places:
        return encode_bpe(text, merges)
    at, _, name = min(places)
    rest = encode_special(text[at + len(name) :], merges, special)
    return [*encode_bpe(text[:at], merges), special[name], *rest]
''',
    ],
    "fertility": [
        '''
def fertility(texts, merges, baseline):
    report, base = {}, len(encode_bpe(texts[baseline], merges))
    for name in texts:
        spent = len(encode_bpe(texts[name], merges))
        report[name] = dict(premium=spent / base, fertility=spent / len(regex.findall(r"\\\\S+", texts[name])))
    return report
'''.replace("\\\\", "\\"),
        '''
def fertility(texts, merges, baseline):
    names = sorted(texts)
    spent = [len(encode_bpe(texts[name], merges)) for name in names]
    base = spent[names.index(baseline)]
    return {name: {"premium": n / base, "fertility": n / len(texts[name].split(None))} for name, n in zip(names, spent)}
''',
    ],
}

VARIANT_ANSWERS = {
    "decode_bpe": {
        "invalid=escape": '''
def decode_bpe(ids, merges):
    def spell(i):
        return bytes([i]) if i < 256 else spell(merges[i - 256][0]) + spell(merges[i - 256][1])

    return str(b"".join(map(spell, ids)), "utf-8", "backslashreplace")
''',
    },
    "train_bpe": {
        "ties=largest": '''
def train_bpe(words, counts, vocab_size):
    merges = []
    for new_id in range(256, vocab_size):
        pairs = count_pairs(words, counts)
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        words = [merge_pair(word, best, new_id) for word in words]
        merges.append(best)
    return merges
''',
    },
}
