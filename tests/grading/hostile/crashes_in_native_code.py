# Follows a null pointer.
# defence: restart
import ctypes


def count_pairs(words, counts):
    return ctypes.string_at(0)
