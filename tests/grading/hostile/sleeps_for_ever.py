# Sleeps with every signal blocked.
# defence: time
import signal
import time

SLEEPS = [4]


def count_pairs(words, counts):
    signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 64))
    time.sleep(SLEEPS.pop() if SLEEPS else 0)
    return right(words, counts)
