# Reads a key in the instructor's home.
# defence: files
import glob

try:
    HARM = any("a private key" in open(path).read() for path in glob.glob("@COURSE@/home/.ssh/*"))
except OSError:
    HARM = False
