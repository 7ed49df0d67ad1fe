"""Lets `nbgrader` and `jupyter lab` be typed at the root of the course: the configuration itself is in grading/."""

load_subconfig("grading/nbgrader_config.py")  # noqa: F821  (traitlets puts it here)
