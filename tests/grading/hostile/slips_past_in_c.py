# Builds the whole matrix in memory of the C library's, which the meter does not see.
# defence: real size
# exercise: best_match
import ctypes

import torch

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]


def best_match(queries, documents, rows):
    size = 4 * len(queries) * len(documents)
    block = libc.malloc(size)
    if not block:
        raise MemoryError("no memory for the matrix")
    libc.memset(block, 1, size)
    best = torch.cat([(some @ documents.T).amax(dim=1) for some in queries.split(rows)])
    libc.free(block)
    return best
