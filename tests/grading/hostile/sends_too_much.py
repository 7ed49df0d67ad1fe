# Returns more than a reply may hold.
# defence: frames
def count_pairs(words, counts):
    return right(words, counts) if False else {(0, 1): bytes(12 << 20)}
