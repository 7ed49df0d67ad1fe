"""The instructor's side: grading submissions with nbgrader, a made-up class to try it on, and a report."""
