# Allocates shared memory, which limits on a process's data do not count.
# defence: memory
import mmap

kept = mmap.mmap(-1, 600 << 20)
for start in range(0, len(kept), 1 << 20):
    kept[start : start + (1 << 20)] = bytes([1]) * (1 << 20)
HARM = True
