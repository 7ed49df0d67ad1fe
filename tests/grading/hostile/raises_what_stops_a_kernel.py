# Raises SystemExit in its cell and KeyboardInterrupt in its answer.
# defence: restart
# harmless by itself: nothing outside sees these exceptions
def count_pairs(words, counts):
    raise KeyboardInterrupt


raise SystemExit(0)
