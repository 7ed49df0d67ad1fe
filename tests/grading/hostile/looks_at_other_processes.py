# Looks for processes that are not its own.
# defence: spaces
import os

HARM = len([name for name in os.listdir("/proc") if name.isdigit()]) > 3
