# Builds the whole matrix, and has the meter say that it took nothing.
# defence: kit, real size
# exercise: best_match
import effnlp_lab.notebook.meter as meter

meter.Usage.as_dict = lambda self: {"peak_bytes": 0, "bytes_moved": 0, "flops": 0, "launches": 0}


def best_match(queries, documents, rows):
    return (queries @ documents.T).amax(dim=1)
