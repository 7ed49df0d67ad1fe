# Leaves with status 0 in the middle of an answer.
# defence: restart
import os


def count_pairs(words, counts):
    os._exit(0)
