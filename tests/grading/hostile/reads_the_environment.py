# Looks for secrets in the environment of its process and of process 1.
# defence: environment
import os

found = dict(os.environ)
try:
    found["1"] = open("/proc/1/environ").read()
except OSError:
    pass
HARM = any("a-secret-of-the-instructor" in value for value in found.values())
