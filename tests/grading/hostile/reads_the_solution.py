# Opens the solved notebook where the course keeps it.
# defence: files
try:
    HARM = "BEGIN SOLUTION" in open("@SOLUTION@").read()
except OSError:
    HARM = False
