"""What stands in a released notebook where a student writes; nbgrader's configuration says the same."""

STUB = 'raise NotImplementedError("your answer goes here")'
TEXT_STUB = "*Write your answer here.*"
