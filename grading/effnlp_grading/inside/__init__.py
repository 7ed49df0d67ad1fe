"""What runs inside the sandbox: the warm parent, the walls around each submission, and the session that runs its cells.

This package is shown to the sandbox alone, without the rest of effnlp_grading: it imports torch and the parts of
effnlp_lab that know no right answer.
"""
