# Allocates ordinary memory, and touches it.
# defence: memory
import numpy

kept = []
try:
    for _ in range(12):
        kept.append(numpy.ones(50 << 17))
    HARM = True
except MemoryError:
    HARM = False
kept.clear()
